"""What a worker's timer does for changes that were promoted: windows whose time is over are made once more of the rows, and are done with."""

from typing import Any, Final

from preservarium.operations.changes.following import Follower
from preservarium.settings import Settings
from preservarium.stores.changes import LOCK
from preservarium.stores.connections import session
from preservarium.stores.maintenance import Maintenance
from preservarium.stores.postgres import INFRASTRUCTURE_ERRORS, PostgresPool, retry

_DUE: Final = "SELECT EXISTS (SELECT FROM change_windows WHERE NOT settled AND due_at <= now())"


async def settle(settings: Settings, pool: PostgresPool) -> int:
    """Settle some windows that are due; how many. One worker does, and none while a change is being carried out.

    Args:
        settings: where the databases are.
        pool: asked whether there are any: as a rule there are none, and nothing is connected.

    Raises:
        Retry: PostgreSQL cannot be reached.
        PreservariumError: ClickHouse cannot be reached, or refuses.
    """
    try:
        async with pool.acquire() as connection:
            if not await connection.fetchval(_DUE):
                return 0
        alone = await session(settings.postgres, "windows of changes")
        try:
            if not await alone.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
                return 0
            return await _settle(settings, alone)
        finally:
            alone.terminate()
    except INFRASTRUCTURE_ERRORS as e:
        raise retry(e) from e


async def _settle(settings: Settings, connection: Any) -> int:
    if not settings.clickhouse.enabled:
        return await Follower(settings, connection, None).settle()
    clickhouse = Maintenance(settings)
    await clickhouse.connect()
    try:
        return await Follower(settings, connection, clickhouse).settle()
    finally:
        await clickhouse.close()
