"""How the extract stands, whether its source is as the settings say, and having everything sent again: for
`preservarium extract`.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import asyncpg
import orjson

from preservarium.errors import PreservariumError
from preservarium.extract.ledger import Ledger
from preservarium.extract.service import LEADER_LOCK_KEY, send_of, source_of
from preservarium.extract.source import Table
from preservarium.settings import Settings
from preservarium.stores.connections import session


class ExtractError(PreservariumError):
    """What was asked of the extract cannot be done now."""


@dataclass(frozen=True, slots=True)
class TableStatus:
    """What is recorded of one table."""

    table: Table
    rows: int  #: whose last state was sent
    gone: int  #: whose deletion was sent, and is remembered
    pending: int  #: events that are on their way, or that a crash left half sent
    position: dict[str, Any] | None  #: None: it has not begun
    moved_at: datetime | None
    compared_at: datetime | None  #: when all keys were last compared


@dataclass(frozen=True, slots=True)
class Status:
    """What is recorded, and whether a worker extracts now."""

    leads: bool
    tables: Sequence[TableStatus]


@dataclass(frozen=True, slots=True)
class Found:
    """A table of the source."""

    table: Table
    example: dict[str, Any] | None  #: a row as it would be sent; None: there is none


@asynccontextmanager
async def _ours(settings: Settings) -> AsyncIterator[Any]:
    postgres = settings.postgres
    connection = await session(postgres, "asking how extraction stands", command_timeout=postgres.command_timeout_s)
    try:
        yield connection
    finally:
        await connection.close(timeout=2)


async def status(settings: Settings) -> Status:
    """What our database says.

    Raises:
        ExtractError: its tables are not there.
        OSError, TimeoutError, asyncpg.PostgresError: it cannot be asked.
    """
    async with _ours(settings) as connection:
        try:
            rows = await connection.fetch(
                "SELECT p.source, position, coalesce(jsonb_array_length(pending), 0), updated_at, reconciled_at, r.here, r.gone"
                " FROM extract_positions p LEFT JOIN (SELECT source, count(*) FILTER (WHERE changed_us >= 0) AS here,"
                " count(*) FILTER (WHERE changed_us < 0) AS gone FROM extract_rows GROUP BY source) r USING (source) ORDER BY 1"
            )
        except asyncpg.UndefinedTableError as e:
            message = "the extract's tables are not there: preservarium migrate"
            raise ExtractError(message) from e
        lock = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1"
        leads = await connection.fetchval(
            f"{lock} AND (classid::bigint << 32 | objid::bigint) = $1"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
            LEADER_LOCK_KEY,
        )
    return Status(
        leads,
        [TableStatus(r[0], r[5] or 0, r[6] or 0, r[2], orjson.loads(r[1]) or None, r[3], r[4]) for r in rows],
    )


async def check(settings: Callable[[], Settings]) -> list[Found]:
    """Open the source as a worker would, and read a row of each table; nothing is sent or recorded.

    Raises:
        SourceError: it is not as the settings say.
        OSError, TimeoutError and the driver's errors: it cannot be reached.
    """
    source = source_of(settings)
    found = []
    try:
        await source.open()
        for table in source.tables:
            example = None
            async with aclosing(cast(AsyncGenerator[Any, None], source.versions(table))) as pages:
                async for page in pages:
                    rows = await source.rows(table, [id for id, _ in page[:1]])
                    # It may have gone meanwhile.
                    if rows:
                        example = orjson.loads(send_of(table, rows[0], rows[0].order).value or b"null")
                        break
            found.append(Found(table, example))
    finally:
        await source.close()
    return found


async def again(settings: Settings, tables: Sequence[Table]) -> int:
    """Have every row of these tables sent again; returns the rows that were sent before.

    Raises:
        ExtractError: a worker extracts now.
        OSError, TimeoutError, asyncpg.PostgresError: our database cannot be asked.
    """
    async with _ours(settings) as connection:
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LEADER_LOCK_KEY):
            message = "a worker extracts now: stop the workers first"
            raise ExtractError(message)
        return sum([await Ledger(connection).again(table) for table in tables])
