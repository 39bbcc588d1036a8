"""PostgreSQL by its own tools, ClickHouse by its own format."""

import asyncio
import gzip
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import asyncpg

from preservarium import tls
from preservarium.embedded.postgres import find_binaries
from preservarium.errors import reason
from preservarium.operations.backup.files import GZIP_LEVEL, BackupError
from preservarium.operations.sync_status import STAGES
from preservarium.settings import Settings
from preservarium.stores.migrate import connect_clickhouse, connect_postgres

#: Tables of ClickHouse that stages write; what views make of them is made again when their rows are inserted.
TABLES: Final = tuple(table for _, _, table in STAGES)
#: Pieces of a file on its way to or from ClickHouse.
PIECE_BYTES: Final = 1 << 20
#: Of what a tool says, the end.
SAID_CHARS: Final = 800

Step = Callable[[str], None]


# --- PostgreSQL


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of the database, for as long as its transaction is open."""

    id: str
    #: sink -> topic -> partition -> next offset
    sinks: dict[str, dict[str, dict[int, int]]]
    timescaledb: bool
    major: int  #: of the server


@asynccontextmanager
async def snapshot(settings: Settings) -> AsyncIterator[Snapshot]:
    """Hold a moment of the database, in which rows and the sinks' offsets belong together."""
    connection = await connect_postgres(settings, what="a back-up")
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await connection.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield Snapshot(
                await connection.fetchval("SELECT pg_export_snapshot()"),
                await sink_positions(connection, settings.sink.generation),
                bool(await connection.fetchval("SELECT true FROM pg_extension WHERE extname = 'timescaledb'")),
                connection.get_server_version().major,
            )
    finally:
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            await connection.close(timeout=5)


async def sink_positions(connection: Any, generation: int) -> dict[str, dict[str, dict[int, int]]]:
    """Where the sinks stand: sink -> topic -> partition -> next offset."""
    found: dict[str, dict[str, dict[int, int]]] = {}
    for sink, topic, partition, offset in await connection.fetch(
        "SELECT sink, topic, partition, next_offset FROM sink_offsets WHERE generation = $1", generation
    ):
        found.setdefault(sink, {}).setdefault(topic, {})[partition] = offset
    return found


async def dump(settings: Settings, taken: Snapshot, path: Path) -> None:
    """pg_dump of a snapshot.

    Raises:
        BackupError: there is no pg_dump that is as new as the server, or it fails.
    """
    await _run(
        settings,
        "pg_dump",
        taken.major,
        "--format=custom",
        f"--snapshot={taken.id}",
        "--no-owner",
        "--no-acl",
        f"--file={path}",
    )


async def load(settings: Settings, path: Path, *, timescaledb: bool) -> None:
    """pg_restore into an empty database, in one transaction where the extension lets us.

    Raises:
        BackupError: as `dump`.
    """
    connection = await connect_postgres(settings, what="a restore")
    try:
        major = connection.get_server_version().major
        if timescaledb:
            await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
            await connection.execute("SELECT timescaledb_pre_restore()")
        whole = () if timescaledb else ("--single-transaction",)
        await _run(settings, "pg_restore", major, "--no-owner", "--no-acl", "--exit-on-error", *whole, str(path))
        if timescaledb:
            await connection.execute("SELECT timescaledb_post_restore()")
        await connection.execute("ANALYZE")
    finally:
        await connection.close(timeout=5)


async def is_empty(settings: Settings) -> bool:
    """Whether the database has no tables but those of extensions."""
    connection = await connect_postgres(settings, what="a restore")
    try:
        found = await connection.fetchval(
            "SELECT count(*) FROM pg_class c WHERE c.relkind IN ('r', 'p') AND c.relnamespace = to_regnamespace(current_schema())"
            " AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')"
        )
        return not found
    finally:
        await connection.close(timeout=5)


def tool(name: str, major: int) -> Path:
    """A program of PostgreSQL's that is at least as new as the server.

    Raises:
        BackupError: there is none.
    """
    places = [Path(found)] if (found := shutil.which(name)) else []
    places += [binaries.directory / name for binaries in find_binaries()]
    seen = []
    for place in places:
        try:
            said = subprocess.run([place, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
        except OSError:
            continue
        version = re.search(r"(\d+)", said)
        if version and int(version[1]) >= major:
            return place
        seen.append(f"{place}: {said.strip()}")
    message = f"no {name} of PostgreSQL {major} or newer on this machine ({'; '.join(seen) or 'none at all'})"
    raise BackupError(message)


async def _run(settings: Settings, name: str, major: int, *arguments: str) -> None:
    program = await asyncio.to_thread(tool, name, major)
    url = urlsplit(settings.postgres.session_dsn)
    userinfo, at, place = url.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    # A password among the arguments could be read by everybody on this machine.
    database = urlunsplit(url._replace(netloc=f"{user}{at}{place}"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")} | {
        "PGAPPNAME": f"preservarium {name}"
    }
    if password:
        environment["PGPASSWORD"] = unquote(password)
    process = await asyncio.create_subprocess_exec(
        program, f"--dbname={database}", *arguments, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        _, said = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode:
        message = f"{name} failed: {said.decode('utf-8', 'replace').strip()[-SAID_CHARS:]}"
        raise BackupError(message)


# --- ClickHouse


class ClickHouseFiles:
    """Rows of ClickHouse to and from files, a partition each. An async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client: Any = None
        self._http: Any = None

    async def __aenter__(self) -> "ClickHouseFiles":
        s = self._settings.clickhouse
        *_, user, password, secure = s.parts
        context: ssl.SSLContext | bool = tls.client_context("clickhouse", ca_file=s.ssl_ca_file) if secure else True
        self._client = await connect_clickhouse(self._settings)
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context),
            # As long as it takes: a partition may be large.
            timeout=aiohttp.ClientTimeout(total=None, connect=10),
            headers={"X-ClickHouse-User": user, "X-ClickHouse-Key": password},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        await self._client.close()

    async def partitions(self, table: str) -> list[str]:
        """Ids of the partitions that a table has; none where there is no such table."""
        found = await self._client.query(
            "SELECT DISTINCT partition_id FROM system.parts WHERE database = {d:String} AND table = {t:String} AND active AND rows > 0"
            " ORDER BY partition_id",
            parameters={"d": self._settings.clickhouse.database, "t": table},
        )
        return [row[0] for row in found.result_rows]

    async def rows(self, table: str) -> int:
        """How many rows a table has, each key once."""
        (found,) = (
            await self._client.query(f"SELECT count() FROM {self._settings.clickhouse.database}.{table} FINAL")
        ).result_rows
        return int(found[0])

    async def export(self, table: str, partition: str, path: Path) -> None:
        """Write the rows of a partition to a file, each key once.

        Raises:
            BackupError: ClickHouse refuses.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        query = f"SELECT * FROM {table} FINAL WHERE _partition_id = {{p:String}} FORMAT Native"
        async with self._post({"param_p": partition}, query.encode()) as response:
            with gzip.open(path, "wb", compresslevel=GZIP_LEVEL) as file:
                async for piece in response.content.iter_chunked(PIECE_BYTES):
                    await asyncio.to_thread(file.write, piece)

    async def insert(self, table: str, path: Path) -> None:
        """Insert the rows of a file.

        Raises:
            BackupError: ClickHouse refuses, or the file is damaged.
        """

        async def pieces() -> AsyncIterator[bytes]:
            with gzip.open(path, "rb") as file:
                while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                    yield piece

        settings = {"query": f"INSERT INTO {table} FORMAT Native", "async_insert": "0", "insert_deduplicate": "0"}
        async with self._post(settings, pieces()) as response:
            await response.read()

    @asynccontextmanager
    async def _post(self, parameters: Mapping[str, str], body: Any) -> AsyncIterator[Any]:
        host, port, _, _, secure = self._settings.clickhouse.parts
        url = f"{'https' if secure else 'http'}://{host}:{port}/"
        query = {"database": self._settings.clickhouse.database, "wait_end_of_query": "1", **parameters}
        try:
            async with self._http.post(url, params=query, data=body) as response:
                if response.status != 200:
                    text = " ".join((await response.text(errors="replace")).split())
                    message = f"ClickHouse: {text[:SAID_CHARS]}"
                    raise BackupError(message)
                yield response
        except (aiohttp.ClientError, OSError) as e:
            message = f"ClickHouse at {host}:{port}: {reason(e)}"
            raise BackupError(message) from e
