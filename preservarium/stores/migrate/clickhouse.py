"""ClickHouse's migrations: no transactions, so every statement can be repeated."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import structlog

from preservarium.settings import Settings
from preservarium.stores.migrate.files import MIGRATIONS, Migration, load_files
from preservarium.stores.migrate.progress import Applied, Report, compare, run
from preservarium.stores.migrate.statements import MigrationError, substitute
from preservarium.waiting import until_up

log = structlog.get_logger(__name__)

_BOOKKEEPING_CLICKHOUSE: Final = """
CREATE TABLE IF NOT EXISTS schema_migrations {{clickhouse.on_cluster}} (
  version String, file String, checksum String, status LowCardinality(String), at DateTime64(3, 'UTC'), duration_ms UInt64
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(at) ORDER BY version
"""


async def connect_clickhouse(settings: Settings, *, database: str | None = None, wait_s: float = 0.0) -> Any:
    """An async client of ClickHouse's HTTP interface, waiting with back-off for a server that is starting.

    Args:
        settings: where it is.
        database: default database of the statements; None for the server's own default.
        wait_s: how long to go on trying; 0 tries once.

    Raises:
        MigrationError: it could not be reached in that time.
    """
    # Imported here: workers without ClickHouse, and every command that does not need it, start faster.
    import clickhouse_connect
    from clickhouse_connect.driver.exceptions import OperationalError

    host, port, user, password, secure = settings.clickhouse.parts

    async def attempt() -> Any:
        return await clickhouse_connect.get_async_client(
            host=host,
            port=port,
            username=user,
            password=password,
            secure=secure,
            ca_cert=settings.clickhouse.ssl_ca_file or None,
            database=database or "__default__",
            connect_timeout=min(10, settings.clickhouse.timeout_s),
            send_receive_timeout=settings.clickhouse.timeout_s,
            # Sessions are serialized by the server and of no use to us.
            autogenerate_session_id=False,
        )

    return await until_up(
        "ClickHouse", attempt, not_yet=(OSError, TimeoutError, OperationalError), wait_s=wait_s, error=MigrationError
    )


async def migrate_clickhouse(
    settings: Settings,
    *,
    directory: Path = MIGRATIONS,
    dry_run: bool = False,
    wait_s: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Bring ClickHouse's schema up to date. Idempotent.

    ClickHouse has no transactions over DDL, so each statement can be repeated (`lint` checks it) and a file that was
    interrupted is run again from its first statement. It has no advisory locks either: `migrate_all` holds PostgreSQL's.

    Raises:
        MigrationError: names file, statement and the server's error.
    """
    files = load_files("clickhouse", directory)
    name = settings.clickhouse.database
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        message = f"clickhouse.database: {name!r} is not a plain identifier"
        raise MigrationError(message)
    client = await connect_clickhouse(settings, wait_s=wait_s)
    try:
        exists = await client.command(
            "SELECT count() FROM system.databases WHERE name = {n:String}", parameters={"n": name}
        )
        if not int(exists):
            if dry_run:
                return compare("clickhouse", files, {}, None, settings)
            on_cluster = substitute("{{clickhouse.on_cluster}}", settings, "clickhouse")
            await client.command(f"CREATE DATABASE IF NOT EXISTS {name} {on_cluster}")
    finally:
        await client.close()
    client = await connect_clickhouse(settings, database=name, wait_s=wait_s)
    try:
        if not dry_run:
            await client.command(substitute(_BOOKKEEPING_CLICKHOUSE, settings, "clickhouse"))
        report = compare("clickhouse", files, await _clickhouse_state(client, name), None, settings)
        if dry_run:
            return report
        pending = {f.version for f in report.pending}
        for m in files:
            if m.version not in pending:
                continue
            started = time.monotonic()
            await _mark_clickhouse(client, m, "in_progress", 0)
            await run(client.command, m, m.statements(settings))
            await _mark_clickhouse(client, m, "completed", round((time.monotonic() - started) * 1000))
            log.info("migration applied", store="clickhouse", file=m.file)
            report.applied.append(m.file)
            progress(m.file)
        final = compare("clickhouse", files, await _clickhouse_state(client, name), None, settings)
        final.applied = report.applied
        return final
    finally:
        await client.close()


async def _clickhouse_state(client: Any, database: str) -> dict[str, Applied]:
    there = await client.command(
        "SELECT count() FROM system.tables WHERE database = {d:String} AND name = 'schema_migrations'",
        parameters={"d": database},
    )
    if not int(there):
        return {}
    found = await client.query(
        "SELECT version, checksum, status, at, duration_ms FROM schema_migrations FINAL", tz_mode="aware"
    )
    return {r[0]: Applied(r[1], r[2], r[3] if r[2] == "completed" else None, int(r[4])) for r in found.result_rows}


async def _mark_clickhouse(client: Any, m: Migration, status: str, duration_ms: int) -> None:
    await client.command(
        "INSERT INTO schema_migrations SELECT {v:String}, {f:String}, {c:String}, {s:String}, now64(3, 'UTC'), {d:UInt64}",
        parameters={"v": m.version, "f": m.file, "c": m.checksum, "s": status, "d": duration_ms},
        # A row that is still in a server's buffer would not be seen by the next statement.
        settings={"async_insert": 0},
    )
