"""Schema migrations of PostgreSQL and ClickHouse: forward only, checksummed, one runner at a time.

The rules for the files are in migrations/README.md; `lint` checks a file against them. What was applied is recorded in
`schema_migrations` of each database; what the PostgreSQL database can do (TimescaleDB or plain partitions) is found out
at the first migration and remembered in `schema_facts`, because the two layouts do not mix.
"""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

import asyncpg
import structlog
from pydantic import SecretStr

from preservarium.domain.errors import PreservariumError
from preservarium.settings import Settings
from preservarium.waiting import one_line, until_up

log = structlog.get_logger(__name__)

#: Top-level folder of the checkout: the application is run from it and no wheel carries the files.
MIGRATIONS: Final = Path(__file__).resolve().parents[2] / "migrations"

Store = Literal["postgres", "clickhouse"]
Layout = Literal["timescaledb", "plain"]
Status = Literal["not_started", "in_progress", "completed", "not_needed"]

#: Session advisory lock of the runner; any constant that nothing else in this database uses.
LOCK_KEY: Final = 0x5052_4553_4D49  # "PRESMI"
#: Another runner may be at work this long before we give up; the longest migration seen in practice is minutes.
LOCK_WAIT_S: Final = 900.0
#: A migration waits this long for a table lock, so that it never queues all other users behind it for long.
TABLE_LOCK_WAIT_S: Final = 60

_FILE_NAME: Final = re.compile(
    r"(?P<version>\d{4}[a-z]?)_(?:(?P<phase>pre|post)_)?(?P<what>[a-z0-9]+(?:_[a-z0-9]+)*)\.sql"
)
_HEADER: Final = re.compile(r"--\s*(requires:\s*(?P<requires>\S+)|(?P<flag>no-transaction|blocking))\s*$")
_PLACEHOLDER: Final = re.compile(r"\{\{(.*?)\}\}")
_PLACEHOLDER_NAME: Final = re.compile(r"[a-z_]+(\.[a-z_]+)?")
#: What a substituted value may consist of: nothing that could end a literal or a statement.
_PLACEHOLDER_VALUE: Final = re.compile(r"[A-Za-z0-9_./:-]*")


class MigrationError(PreservariumError):
    """A migration cannot be applied."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement of a file."""

    number: int  #: 1 for the first
    line: int  #: line of its first word, 1 for the first
    sql: str


@dataclass(frozen=True, slots=True)
class Migration:
    """A migration file."""

    store: Store
    version: str  #: four digits and an optional letter; sorts in the order of application
    file: str  #: name without folder
    phase: Literal["", "pre", "post"]  #: before or after the new code runs
    text: str
    checksum: str  #: SHA-256 of the text with LF line ends, hexadecimal
    requires: Layout | None  #: None: needed in every layout
    transactional: bool
    blocking: bool  #: takes strong locks on tables that may be large

    def statements(self, settings: Settings) -> list[Statement]:
        """The statements with settings put in.

        Raises:
            MigrationError: a placeholder names no setting, or a secret, or its value has unsafe characters.
        """
        found = split(self.text, backslash_escapes=self.store == "clickhouse")
        return [replace(s, sql=substitute(s.sql, settings, f"{self.file}: statement {s.number}")) for s in found]


@dataclass(frozen=True, slots=True)
class FileState:
    """A migration file and what the database knows of it."""

    version: str
    file: str
    status: Status
    requires: str | None = None
    blocking: bool = False
    statements: int = 0
    applied_at: datetime | None = None
    duration_ms: int | None = None


@dataclass(slots=True)
class Report:
    """What a run found and did in one database."""

    store: Store
    layout: Layout | None = None  #: PostgreSQL: how measurements are laid out
    layout_remembered: bool = False  #: False: what a first migration would choose
    files: list[FileState] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)  #: files applied by this run
    newer: list[str] = field(default_factory=list)  #: versions that the database has and this checkout does not

    @property
    def pending(self) -> list[FileState]:
        """Files that are still to be applied."""
        return [f for f in self.files if f.status in {"not_started", "in_progress"}]


# --- files ---------------------------------------------------------------------------------------------------------


def parse_file(store: Store, path: Path) -> Migration:
    """Read one migration file.

    Raises:
        MigrationError: its name or a header line is not what migrations/README.md says.
    """
    name = _FILE_NAME.fullmatch(path.name)
    if name is None:
        message = f"{path.name}: a migration is named NNNN[a]_[pre_|post_]what.sql, lower case"
        raise MigrationError(message)
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    requires: Layout | None = None
    flags: set[str] = set()
    for line in text.splitlines():
        if line.strip() and not line.startswith("--"):
            break
        header = _HEADER.fullmatch(line.strip())
        if header is None:
            continue
        if header["flag"]:
            flags.add(header["flag"])
        elif header["requires"] == "timescaledb":
            requires = "timescaledb"
        elif header["requires"] == "plain":
            requires = "plain"
        else:
            message = f"{path.name}: `requires: {header['requires']}` is neither timescaledb nor plain"
            raise MigrationError(message)
    phase: Literal["", "pre", "post"] = "pre" if name["phase"] == "pre" else "post" if name["phase"] == "post" else ""
    return Migration(
        store=store,
        version=name["version"],
        file=path.name,
        phase=phase,
        text=text,
        checksum=hashlib.sha256(text.encode()).hexdigest(),
        requires=requires,
        transactional="no-transaction" not in flags,
        blocking="blocking" in flags,
    )


def load_files(store: Store, directory: Path = MIGRATIONS) -> list[Migration]:
    """The migrations of one database in the order of application.

    Raises:
        MigrationError: a file is misnamed, or two have the same version.
    """
    found = [parse_file(store, path) for path in sorted((directory / store).glob("*")) if path.name != "README.md"]
    by_version: dict[str, Migration] = {}
    for migration in found:
        other = by_version.setdefault(migration.version, migration)
        if other is not migration:
            message = f"{migration.file}: version {migration.version} is taken by {other.file}"
            raise MigrationError(message)
    return sorted(found, key=lambda m: m.version)


def split(text: str, *, backslash_escapes: bool = False) -> list[Statement]:
    """Cut SQL into statements at the semicolons that stand outside quotes, dollar quotes and comments.

    Args:
        text: the file.
        backslash_escapes: whether a backslash escapes in every '…' (ClickHouse) or only in E'…' (PostgreSQL).

    Raises:
        MigrationError: a quote or comment is not closed.
    """
    statements: list[Statement] = []
    start: int | None = None  # first character of the statement's first word
    i = 0

    def end(stop: int) -> None:
        nonlocal start
        if start is not None:
            sql = text[start:stop].rstrip()
            statements.append(Statement(len(statements) + 1, text.count("\n", 0, start) + 1, sql))
        start = None

    while i < len(text):
        c = text[i]
        if text.startswith("--", i):
            newline = text.find("\n", i)
            i = len(text) if newline < 0 else newline
        elif text.startswith("/*", i):
            i = _skip_comment(text, i)
        elif c == ";":
            end(i)
            i += 1
        elif c.isspace():
            i += 1
        else:
            if start is None:
                start = i
            if c in "'\"`":
                escapes = c == "'" and (backslash_escapes or (i > 0 and text[i - 1] in "eE" and not _word(text, i - 2)))
                i = _skip_quoted(text, i, escapes=escapes)
            elif c == "$" and (tag := re.compile(r"\$([A-Za-z_]\w*)?\$").match(text, i)) and not _word(text, i - 1):
                close = text.find(tag[0], tag.end())
                if close < 0:
                    raise _unclosed(text, i, tag[0])
                i = close + len(tag[0])
            else:
                i += 1
    end(len(text))
    return statements


def _word(text: str, i: int) -> bool:
    return i >= 0 and (text[i].isalnum() or text[i] == "_")


def _unclosed(text: str, i: int, what: str) -> MigrationError:
    line = text.count("\n", 0, i) + 1
    return MigrationError(f"line {line}: {what} is not closed")


def _skip_comment(text: str, i: int) -> int:
    depth = 0
    begin = i
    while i < len(text):
        if text.startswith("/*", i):
            depth += 1
            i += 2
        elif text.startswith("*/", i):
            depth -= 1
            i += 2
            if depth == 0:
                return i
        else:
            i += 1
    raise _unclosed(text, begin, "/*")


def _skip_quoted(text: str, i: int, *, escapes: bool) -> int:
    quote = text[i]
    begin = i
    i += 1
    while i < len(text):
        if escapes and text[i] == "\\":
            i += 2
        elif text[i] == quote:
            if text.startswith(quote, i + 1):
                i += 2
            else:
                return i + 1
        else:
            i += 1
    raise _unclosed(text, begin, quote)


#: Tokens that a table remembers, in blocks: an hour of twelve partitions' inserts at the rate of a busy worker, and a token
#: is only ever repeated for the last batch of a partition. A replicated table also forgets by time; a day is longer than any
#: batch waits for its worker.
DEDUP_BLOCKS: Final = 10_000
_DEDUP_PLAIN: Final = f"non_replicated_deduplication_window = {DEDUP_BLOCKS}"
_DEDUP_REPLICATED: Final = (
    f"replicated_deduplication_window = {DEDUP_BLOCKS}, replicated_deduplication_window_seconds = 86400"
)


def substitute(sql: str, settings: Settings, where: str) -> str:
    """Put settings in the place of {{section.field}}.

    Besides the settings there are three derived names for clusters: {{clickhouse.on_cluster}} (`ON CLUSTER 'name'` or
    nothing), {{clickhouse.replicated}} (`Replicated` or nothing, to stand before an engine's name; path and replica are
    the server's `default_replica_path` and `default_replica_name`), and {{clickhouse.dedup_window}} (the settings that make
    the engine remember the tokens of inserts: replicated tables have other names for them).

    Raises:
        MigrationError: no such setting, a secret, or a value with characters that are not allowed in SQL files.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        cluster = settings.clickhouse.cluster
        if name == "clickhouse.on_cluster":
            text = cluster
        elif name == "clickhouse.replicated":
            return "Replicated" if cluster else ""
        elif name == "clickhouse.dedup_window":
            return _DEDUP_REPLICATED if cluster else _DEDUP_PLAIN
        else:
            text = _setting(settings, name, where)
        if not _PLACEHOLDER_VALUE.fullmatch(text):
            message = f"{where}: the value of {name} has characters that may not stand in SQL: {text!r}"
            raise MigrationError(message)
        if name == "clickhouse.on_cluster":
            return f"ON CLUSTER '{text}'" if text else ""
        return text

    return _PLACEHOLDER.sub(value, sql)


def _setting(settings: Settings, name: str, where: str) -> str:
    value: Any = settings
    if not _PLACEHOLDER_NAME.fullmatch(name):
        message = f"{where}: {{{{{name}}}}} is not the name of a setting"
        raise MigrationError(message)
    for part in name.split("."):
        if part not in type(value).model_fields:
            message = f"{where}: there is no setting {name}"
            raise MigrationError(message)
        value = getattr(value, part)
    if isinstance(value, SecretStr) or not isinstance(value, str | int | float):
        message = f"{where}: {name} may not stand in SQL"
        raise MigrationError(message)
    return str(value).lower() if isinstance(value, bool) else str(value)


_IDEMPOTENT: Final = re.compile(
    r"(?is)^(create\s+or\s+replace\b|.*\bif\s+(not\s+)?exists\b|insert\s+into\b.*\bon\s+conflict\b|grant\b|comment\s+on\b"
    r"|alter\s+table\s+.*\b(modify|reset|materialize)\s+(ttl|setting|comment|column)\b|alter\s+.*\bset\s*\(|select\b|call\b|do\b|analyze\b)"
)


def lint(migration: Migration, settings: Settings) -> list[str]:
    """What is wrong with a file by the rules of migrations/README.md; empty where nothing is."""
    faults: list[str] = []
    try:
        statements = migration.statements(settings)
    except MigrationError as e:
        return [str(e)]
    if not statements:
        faults.append("has no statement")
    if migration.store == "clickhouse" and migration.requires:
        faults.append("`requires` is for PostgreSQL")
    repeatable = migration.store == "clickhouse" or not migration.transactional
    for s in statements:
        where = f"statement {s.number} (line {s.line})"
        first = s.sql.split(None, 1)[0].lower()
        if first in {"begin", "commit", "rollback", "start"}:
            faults.append(f"{where}: the runner opens and closes the transaction")
        if re.search(r"(?i)\bconcurrently\b", s.sql) and migration.transactional:
            faults.append(f"{where}: CONCURRENTLY needs `-- no-transaction`")
        if migration.store == "clickhouse" and re.search(r"(?i)replicated_deduplication_window", _raw(migration, s)):
            faults.append(f"{where}: a cluster has other names for it: {{{{clickhouse.dedup_window}}}}")
        if repeatable and not _IDEMPOTENT.match(s.sql):
            faults.append(f"{where}: a step without transaction may run twice: IF [NOT] EXISTS or OR REPLACE")
    return faults


def _raw(migration: Migration, statement: Statement) -> str:
    """A statement as it stands in its file, without settings."""
    return split(migration.text, backslash_escapes=migration.store == "clickhouse")[statement.number - 1].sql


# --- PostgreSQL ----------------------------------------------------------------------------------------------------

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


async def connect_postgres(settings: Settings, *, wait_s: float = 0.0) -> Any:
    """Open a connection, waiting with back-off for a server that is starting.

    Args:
        settings: where it is.
        wait_s: how long to go on trying; 0 tries once.

    Raises:
        MigrationError: it could not be reached in that time, or it refuses us.
    """

    async def attempt() -> Any:
        return await asyncpg.connect(settings.postgres.dsn, timeout=settings.postgres.connect_timeout_s)

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


@dataclass(frozen=True, slots=True)
class _Applied:
    checksum: str
    status: str
    applied_at: datetime | None
    duration_ms: int | None


async def _postgres_state(connection: Any) -> tuple[dict[str, _Applied], Layout, bool]:
    """(applied versions, layout, whether the layout is remembered); reads only, also before the first migration."""
    applied: dict[str, _Applied] = {}
    if await connection.fetchval("SELECT to_regclass('schema_migrations') IS NOT NULL"):
        rows = await connection.fetch(
            "SELECT version, checksum, status, applied_at, duration_ms FROM schema_migrations"
        )
        applied = {r[0]: _Applied(*r[1:]) for r in rows}
        remembered = await connection.fetchval("SELECT value FROM schema_facts WHERE name = 'layout'")
        if remembered is not None:
            return applied, "timescaledb" if remembered == "timescaledb" else "plain", True
    return applied, await detect_layout(connection), False


async def detect_layout(connection: Any) -> Layout:
    """Whether this server can do TimescaleDB: it is installed in the database, or available and preloaded."""
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


def _compare(
    store: Store, files: Sequence[Migration], applied: dict[str, _Applied], layout: Layout | None, settings: Settings
) -> Report:
    """The state of every file.

    Raises:
        MigrationError: an applied file was edited, or a file is missing or new below one that was applied.
    """
    report = Report(store, layout)
    newest = max((v for v, a in applied.items() if a.status == "completed"), default="")
    known = {m.version for m in files}
    for version in sorted(applied.keys() - known):
        if files and version < files[-1].version:
            message = f"{store}: version {version} was applied and its file is missing"
            raise MigrationError(message)
        report.newer.append(version)
    for m in files:
        done = applied.get(m.version)
        status: Status = "not_started"
        if done is not None:
            # One that failed halfway may be mended and is run again from its start.
            if done.status == "completed" and done.checksum != m.checksum:
                message = f"{m.file}: was edited after it was applied; undo the edit and write a new migration"
                raise MigrationError(message)
            status = "completed" if done.status == "completed" else "in_progress"
        elif m.requires and layout and m.requires != layout:
            status = "not_needed"
        elif m.version < newest:
            message = f"{m.file}: newer versions (up to {newest}) were applied; give it a higher number"
            raise MigrationError(message)
        report.files.append(
            FileState(
                m.version,
                m.file,
                status,
                m.requires,
                m.blocking,
                len(m.statements(settings)),
                done.applied_at if done else None,
                done.duration_ms if done else None,
            )
        )
    return report


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
            report = _compare("postgres", files, applied, layout, settings)
            report.layout_remembered = remembered
            return report
        async with runner_lock(connection):
            await connection.execute(_BOOKKEEPING_POSTGRES)
            applied, layout, remembered = await _postgres_state(connection)
            if not remembered:
                if layout == "timescaledb":
                    await _create_timescaledb(connection)
                await connection.execute(
                    "INSERT INTO schema_facts (name, value) VALUES ('layout', $1) ON CONFLICT (name) DO NOTHING", layout
                )
            report = _compare("postgres", files, applied, layout, settings)
            _refuse_blocking(report, bool(applied), allow_blocking)
            pending = {f.version for f in report.pending}
            for m in files:
                if m.version in pending:
                    await _apply_postgres(connection, m, settings)
                    report.applied.append(m.file)
                    progress(m.file)
            applied, layout, remembered = await _postgres_state(connection)
            final = _compare("postgres", files, applied, layout, settings)
            final.applied, final.layout_remembered = report.applied, remembered
            return final
    finally:
        await connection.close(timeout=5)


def _refuse_blocking(report: Report, in_use: bool, allowed: bool) -> None:
    names = [f.file for f in report.pending if f.blocking]
    if names and in_use and not allowed:
        message = f"{', '.join(names)}: marked blocking; run again with --allow-blocking when the tables may be locked"
        raise MigrationError(message)


async def _create_timescaledb(connection: Any) -> None:
    try:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
    except Exception as e:
        message = (
            f"TimescaleDB is available and cannot be made an extension of this database ({one_line(e)}): "
            "let a superuser run CREATE EXTENSION timescaledb, or remove it from the server"
        )
        raise MigrationError(message) from e


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
            await _run(connection.execute, m, statements)
            await connection.execute(done, m.version, m.file, m.checksum, spent_ms())
    else:
        await connection.execute(
            "INSERT INTO schema_migrations (version, file, checksum, status) VALUES ($1, $2, $3, 'in_progress') ON CONFLICT DO NOTHING",
            m.version, m.file, m.checksum,
        )  # fmt: skip
        await _run(connection.execute, m, statements)
        await connection.execute(done, m.version, m.file, m.checksum, spent_ms())
    log.info("migration applied", store="postgres", file=m.file, duration_ms=spent_ms())


async def _run(execute: Callable[[str], Awaitable[Any]], m: Migration, statements: Sequence[Statement]) -> None:
    for s in statements:
        try:
            await execute(s.sql)
        except Exception as e:
            hint = getattr(e, "hint", None)
            message = f"{m.store}/{m.file}: statement {s.number} (line {s.line}): {one_line(e)}" + (
                f" (hint: {hint})" if hint else ""
            )
            raise MigrationError(message) from e


async def postgres_status(settings: Settings, *, directory: Path = MIGRATIONS, wait_s: float = 0.0) -> Report:
    """What was applied to PostgreSQL and what was not. Changes nothing."""
    return await migrate_postgres(settings, directory=directory, dry_run=True, wait_s=wait_s)


# --- ClickHouse ----------------------------------------------------------------------------------------------------

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
                return _compare("clickhouse", files, {}, None, settings)
            on_cluster = substitute("{{clickhouse.on_cluster}}", settings, "clickhouse")
            await client.command(f"CREATE DATABASE IF NOT EXISTS {name} {on_cluster}")
    finally:
        await client.close()
    client = await connect_clickhouse(settings, database=name, wait_s=wait_s)
    try:
        if not dry_run:
            await client.command(substitute(_BOOKKEEPING_CLICKHOUSE, settings, "clickhouse"))
        report = _compare("clickhouse", files, await _clickhouse_state(client, name), None, settings)
        if dry_run:
            return report
        pending = {f.version for f in report.pending}
        for m in files:
            if m.version not in pending:
                continue
            started = time.monotonic()
            await _mark_clickhouse(client, m, "in_progress", 0)
            await _run(client.command, m, m.statements(settings))
            await _mark_clickhouse(client, m, "completed", round((time.monotonic() - started) * 1000))
            log.info("migration applied", store="clickhouse", file=m.file)
            report.applied.append(m.file)
            progress(m.file)
        final = _compare("clickhouse", files, await _clickhouse_state(client, name), None, settings)
        final.applied = report.applied
        return final
    finally:
        await client.close()


async def _clickhouse_state(client: Any, database: str) -> dict[str, _Applied]:
    there = await client.command(
        "SELECT count() FROM system.tables WHERE database = {d:String} AND name = 'schema_migrations'",
        parameters={"d": database},
    )
    if not int(there):
        return {}
    found = await client.query(
        "SELECT version, checksum, status, at, duration_ms FROM schema_migrations FINAL", tz_mode="aware"
    )
    return {r[0]: _Applied(r[1], r[2], r[3] if r[2] == "completed" else None, int(r[4])) for r in found.result_rows}


async def _mark_clickhouse(client: Any, m: Migration, status: str, duration_ms: int) -> None:
    await client.command(
        "INSERT INTO schema_migrations SELECT {v:String}, {f:String}, {c:String}, {s:String}, now64(3, 'UTC'), {d:UInt64}",
        parameters={"v": m.version, "f": m.file, "c": m.checksum, "s": status, "d": duration_ms},
        # A row that is still in a server's buffer would not be seen by the next statement.
        settings={"async_insert": 0},
    )


# --- both ----------------------------------------------------------------------------------------------------------


async def migrate_all(
    settings: Settings,
    *,
    stores: Sequence[Store] = ("postgres", "clickhouse"),
    directory: Path = MIGRATIONS,
    dry_run: bool = False,
    allow_blocking: bool = True,
    wait_s: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Report]:
    """Bring the databases up to date, one runner at a time over both.

    ClickHouse is left out where it is not enabled. Arguments and errors as in `migrate_postgres`.
    """
    reports: list[Report] = []
    if "postgres" in stores:
        reports.append(
            await migrate_postgres(
                settings,
                directory=directory,
                dry_run=dry_run,
                allow_blocking=allow_blocking,
                wait_s=wait_s,
                progress=lambda f: progress(f"postgres/{f}"),
            )
        )
    if "clickhouse" in stores and settings.clickhouse.enabled:

        async def clickhouse() -> Report:
            return await migrate_clickhouse(
                settings,
                directory=directory,
                dry_run=dry_run,
                wait_s=wait_s,
                progress=lambda f: progress(f"clickhouse/{f}"),
            )

        if dry_run or "postgres" not in stores:
            reports.append(await clickhouse())
        else:
            connection = await connect_postgres(settings, wait_s=wait_s)
            try:
                async with runner_lock(connection):
                    reports.append(await clickhouse())
            finally:
                await connection.close(timeout=5)
    return reports
