"""PostgreSQL's migrations: its lock, its layout, a transaction a file."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
import structlog

from preservarium.settings import Settings
from preservarium.stores.connections import NeedsSession, session
from preservarium.stores.migrate.files import MIGRATIONS, Layout, Migration, load_files
from preservarium.stores.migrate.progress import Applied, Report, compare, run
from preservarium.stores.migrate.statements import MigrationError
from preservarium.waiting import one_line, until_up

log = structlog.get_logger(__name__)

#: Session advisory lock of the runner; any constant that nothing else in this database uses.
LOCK_KEY: Final = 0x5052_4553_4D49  # "PRESMI"
#: Another runner may be at work this long before we give up; the longest migration seen in practice is minutes.
LOCK_WAIT_S: Final = 900.0
#: The first file that the hypertables' layout alone has.
_HYPERTABLES: Final = "0002a"
#: A migration waits this long for a table lock, so that it never queues all other users behind it for long.
TABLE_LOCK_WAIT_S: Final = 60

#: Errors that a server that is starting, or a network that is not there yet, gives. Wrong credentials are not among them.
_NOT_YET: Final = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.PostgresConnectionError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InternalClientError,
)


async def connect_postgres(settings: Settings, *, wait_s: float = 0.0, what: str = "this command") -> Any:
    """Open a connection that is a session, waiting with back-off for a server that is starting.

    Args:
        settings: where it is.
        wait_s: how long to go on trying; 0 tries once.
        what: is to be done, for people.

    Raises:
        MigrationError: it could not be reached in that time, or it refuses us.
    """

    async def attempt() -> Any:
        try:
            return await session(settings.postgres, what)
        except NeedsSession as e:
            raise MigrationError(str(e)) from e

    return await until_up("PostgreSQL", attempt, not_yet=_NOT_YET, wait_s=wait_s, error=MigrationError)


@asynccontextmanager
async def runner_lock(connection: Any, *, wait_s: float = LOCK_WAIT_S) -> AsyncIterator[None]:
    """Hold the advisory lock that makes us the only runner.

    It is asked for in a loop: a session that waits inside `pg_advisory_lock` holds a snapshot, and the other runner's
    CREATE INDEX CONCURRENTLY would wait for that snapshot for ever.

    Raises:
        MigrationError: another runner kept it for longer than `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK_KEY):
        if time.monotonic() > deadline:
            message = f"another `preservarium migrate` has been at work for more than {wait_s:g} s"
            raise MigrationError(message)
        await asyncio.sleep(0.1)
    try:
        yield
    finally:
        if not connection.is_closed():
            await connection.execute("SELECT pg_advisory_unlock($1)", LOCK_KEY)


_BOOKKEEPING_POSTGRES: Final = """
CREATE TABLE IF NOT EXISTS schema_migrations (
  version     text PRIMARY KEY,
  file        text NOT NULL,
  checksum    text NOT NULL,
  status      text NOT NULL CHECK (status IN ('in_progress', 'completed')),
  started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
  applied_at  timestamptz,
  duration_ms bigint
);
CREATE TABLE IF NOT EXISTS schema_facts (
  name   text PRIMARY KEY,
  value  text NOT NULL,
  set_at timestamptz NOT NULL DEFAULT now()
);
"""


async def _postgres_state(connection: Any) -> tuple[dict[str, Applied], Layout, bool]:
    """(applied versions, layout, whether the layout is remembered); reads only, also before the first migration."""
    applied: dict[str, Applied] = {}
    if await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL"):
        rows = await connection.fetch(
            "SELECT version, checksum, status, applied_at, duration_ms FROM schema_migrations"
        )
        applied = {r[0]: Applied(*r[1:]) for r in rows}
        remembered = await connection.fetchval("SELECT value FROM schema_facts WHERE name = 'layout'")
        if remembered == "timescaledb" and _HYPERTABLES not in applied and await _is_apache(connection):
            remembered = None  # a run before this could do no more than remember it
        if remembered is not None:
            return applied, "timescaledb" if remembered == "timescaledb" else "plain", True
    return applied, await detect_layout(connection), False


async def _is_apache(connection: Any) -> bool:
    """Whether this is TimescaleDB's Apache edition, as far as that can be told before the extension is made."""
    found: bool = await connection.fetchval("SELECT current_setting('timescaledb.license', true) = 'apache'")
    return bool(found)


async def detect_layout(connection: Any) -> Layout:
    """Whether this server can do TimescaleDB: it is installed in the database, or available and preloaded.

    Its Apache edition has neither compression nor policies, so on it tables are partitioned by PostgreSQL itself.
    """
    if await _is_apache(connection):
        return "plain"
    if await connection.fetchval("SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"):
        return "timescaledb"
    if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')"):
        return "plain"
    try:
        preloaded = await connection.fetchval("SELECT current_setting('shared_preload_libraries', true)")
    except asyncpg.InsufficientPrivilegeError:
        return "timescaledb"  # we may not look; CREATE EXTENSION will tell
    # Without preloading CREATE EXTENSION ends the session with FATAL.
    return "timescaledb" if "timescaledb" in (preloaded or "") else "plain"


async def migrate_postgres(
    settings: Settings,
    *,
    directory: Path = MIGRATIONS,
    dry_run: bool = False,
    allow_blocking: bool = True,
    wait_s: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Bring PostgreSQL's schema up to date. Idempotent; safe to start several times at once.

    Args:
        settings: where the database is, and the placeholders' values.
        directory: folder with `postgres/`.
        dry_run: only say what would be done.
        allow_blocking: whether files marked `-- blocking` may run on a database that has been in use.
        wait_s: how long to wait for a server that is starting.
        progress: called with the name of each file that was applied.

    Raises:
        MigrationError: names file, statement and the database's error. What came before it stays applied.
    """
    files = load_files("postgres", directory)
    connection = await connect_postgres(settings, wait_s=wait_s)
    try:
        if dry_run:
            applied, layout, remembered = await _postgres_state(connection)
            report = compare("postgres", files, applied, layout, settings)
            report.layout_remembered = remembered
            return report
        async with runner_lock(connection):
            await connection.execute(_BOOKKEEPING_POSTGRES)
            applied, layout, remembered = await _postgres_state(connection)
            if not remembered:
                if layout == "timescaledb" and not await _create_timescaledb(settings, connection):
                    layout = "plain"
                await connection.execute(
                    "INSERT INTO schema_facts (name, value) VALUES ('layout', $1)"
                    " ON CONFLICT (name) DO UPDATE SET value = excluded.value, set_at = now()",
                    layout,
                )
            report = compare("postgres", files, applied, layout, settings)
            _refuse_blocking(report, bool(applied), allow_blocking)
            pending = {f.version for f in report.pending}
            for m in files:
                if m.version in pending:
                    await _apply_postgres(connection, m, settings)
                    report.applied.append(m.file)
                    progress(m.file)
            applied, layout, remembered = await _postgres_state(connection)
            final = compare("postgres", files, applied, layout, settings)
            final.applied, final.layout_remembered = report.applied, remembered
            return final
    finally:
        await connection.close(timeout=5)


def _refuse_blocking(report: Report, in_use: bool, allowed: bool) -> None:
    names = [f.file for f in report.pending if f.blocking]
    if names and in_use and not allowed:
        message = f"{', '.join(names)}: marked blocking; run again with --allow-blocking when the tables may be locked"
        raise MigrationError(message)


class _ApacheEdition(Exception):
    """Undoes the transaction in which it was found out."""


async def _create_timescaledb(settings: Settings, connection: Any) -> bool:
    """Make the extension, unless it turns out to be the Apache edition, whose default says so only once it is loaded.

    Returns:
        Whether it is there, and whole.
    """
    try:
        # In a session of its own, which has not loaded anything else of it.
        own = await connect_postgres(settings)
        try:
            async with own.transaction():
                await own.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
                if await _is_apache(own):
                    raise _ApacheEdition
        finally:
            await own.close(timeout=5)
    except _ApacheEdition:
        log.warning(
            "TimescaleDB is the Apache edition, without compression and policies",
            action="tables are partitioned by PostgreSQL itself",
        )
        return False
    except Exception as e:
        message = (
            f"TimescaleDB is available and cannot be made an extension of this database ({one_line(e)}): "
            "let a superuser run CREATE EXTENSION timescaledb, or remove it from the server"
        )
        raise MigrationError(message) from e
    return True


async def _apply_postgres(connection: Any, m: Migration, settings: Settings) -> None:
    started = time.monotonic()
    statements = m.statements(settings)
    done = """
        INSERT INTO schema_migrations (version, file, checksum, status, applied_at, duration_ms)
        VALUES ($1, $2, $3, 'completed', clock_timestamp(), $4)
        ON CONFLICT (version) DO UPDATE SET
          file = $2, checksum = $3, status = 'completed', applied_at = clock_timestamp(), duration_ms = $4
    """

    def spent_ms() -> int:
        return round((time.monotonic() - started) * 1000)

    if m.transactional:
        async with connection.transaction():
            await connection.execute(f"SET LOCAL lock_timeout = '{TABLE_LOCK_WAIT_S}s'")
            await run(connection.execute, m, statements)
            await connection.execute(done, m.version, m.file, m.checksum, spent_ms())
    else:
        await connection.execute(
            "INSERT INTO schema_migrations (version, file, checksum, status) VALUES ($1, $2, $3, 'in_progress') ON CONFLICT DO NOTHING",
            m.version, m.file, m.checksum,
        )  # fmt: skip
        await run(connection.execute, m, statements)
        await connection.execute(done, m.version, m.file, m.checksum, spent_ms())
    log.info("migration applied", store="postgres", file=m.file, duration_ms=spent_ms())


async def postgres_status(settings: Settings, *, directory: Path = MIGRATIONS, wait_s: float = 0.0) -> Report:
    """What was applied to PostgreSQL and what was not. Changes nothing."""
    return await migrate_postgres(settings, directory=directory, dry_run=True, wait_s=wait_s)
