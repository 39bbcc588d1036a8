"""Tables of a PostgreSQL database that others write, by a watermark on (updated_at, id).

A watermark alone loses rows: a transaction that commits late brings an `updated_at` that was passed. So time is cut in two
at a *horizon*, below which nothing can come any more: `overlap_s` before now, and before the beginning of the oldest
transaction that we can see (asked for before the rows are read, so that what commits in between is seen by one of the two).

- **Below the horizon** rows are walked once, in order of (updated_at, id), through a server-side cursor.
- **Above it** every look makes one grouped query: for each second its rows and the sum of a hash of (id, updated_at,
  transaction). Only a second whose sum has changed is read, whoever changed it and however late; when none has, the look
  is over. Rows without `updated_at` are one more such group.

What the horizon cannot promise (a clock further behind than the overlap, a transaction of another role that is open longer
than it and hidden from us, an `updated_at` that is not set) the comparison of all keys finds (service.py).
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Final

import asyncpg
import orjson
import structlog

from preservarium.extract.named import NamedTables, SourceError
from preservarium.extract.source import (
    FIELDS,
    INSTANTS,
    KEYS,
    STEP_ROWS,
    Change,
    Position,
    Step,
    Table,
    Version,
    Woken,
)
from preservarium.settings import Settings
from preservarium.stores import connections

log = structlog.get_logger(__name__)

#: A transaction that is open for longer does not hold the horizon back: somebody forgot it, and the seconds that are
#: looked at are at most so many.
HOLD_MAX_S: Final = 3_600
#: Rows so far above the horizon are one group: clocks that are ahead by hours must not make a group a second.
AHEAD_MAX_S: Final = 7_200
#: Ids that notices may name before all keys are compared instead.
GONE_MAX: Final = 10_000
CONNECT_S: Final = 10.0
#: A look at a table that has no index on updated_at reads all of it.
STATEMENT_S: Final = 600.0

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)?")
_TIME_TYPES: Final = frozenset({"timestamp with time zone", "timestamp without time zone"})
_NO_TIME: Final = "none"
_LATER: Final = "later"


def quoted(name: str) -> str:
    """A table's or column's name as an SQL identifier.

    Raises:
        SourceError: it is none.
    """
    if not _NAME.fullmatch(name):
        message = f"{name!r} is no name of a table or column"
        raise SourceError(message)
    return ".".join(f'"{part}"' for part in name.split("."))


class _Table:
    """One table's SQL."""

    def __init__(
        self, table: Table, name: str, columns: Mapping[str, str], types: Mapping[str, str], xmin: bool
    ) -> None:
        self.name = quoted(name)
        given = {field: columns.get(field, field) for field in ("id", "updated_at", *FIELDS[table])}
        for field in ("id", "updated_at", KEYS[table]):
            if given[field] not in types:
                message = f"{name} has no column {given[field]!r} for {field}; name it in PRESERVARIUM_EXTRACT__{table.upper()}_COLUMNS"
                raise SourceError(message)
        for field in columns:
            if field not in given or columns[field] not in types:
                message = f"{name}: {field}={columns[field]} names no field that we know, or no column that there is"
                raise SourceError(message)
        self.id, self.at = quoted(given["id"]), quoted(given["updated_at"])
        self.id_type, self.at_type = types[given["id"]], types[given["updated_at"]]
        if self.at_type not in _TIME_TYPES:
            message = f"{name}.{given['updated_at']} is of type {self.at_type}; a watermark needs a timestamp"
            raise SourceError(message)
        #: Orders changes of one instant. Views have none.
        self.place = "xmin::text::bigint" if xmin else "0::bigint"
        self.fields = [field for field in FIELDS[table] if given[field] in types]
        selected = [f"{self.id}::text", _us(self.at), self.place]
        for field in self.fields:
            column, kind = quoted(given[field]), types[given[field]]
            if kind in _TIME_TYPES or kind == "date":
                selected.append(_us(column))
            elif kind == "boolean" or (field in INSTANTS and kind in ("bigint", "integer")):
                selected.append(column)
            else:
                selected.append(f"{column}::text")
        self.select = f"SELECT {', '.join(selected)} FROM {self.name}"
        self.versions = f"SELECT {self.id}::text, {_us(self.at)}, {self.place} FROM {self.name}"
        digest = f"sum(hashtextextended(concat_ws(' ', {self.id}, {self.at}, {self.place}), 0))::text"
        # Two halves, so that each can use an index.
        self.groups = (
            f"SELECT CASE WHEN {self.at} < $2::text::{self.at_type} THEN date_trunc('second', {self.at})::text"
            f" ELSE '{_LATER}' END, count(*), {digest} FROM {self.name} WHERE {self.at} >= $1::text::{self.at_type} GROUP BY 1"
            f" UNION ALL SELECT '{_NO_TIME}', count(*), {digest} FROM {self.name} WHERE {self.at} IS NULL HAVING count(*) > 0"
        )

    def change(self, row: Any) -> Change:
        """A row of `select` as a change."""
        version = row[1] or 0, row[2]
        return Change(row[0], version, version, dict(zip(self.fields, row[3:], strict=True)))


def _us(sql: str) -> str:
    """µs since the epoch; an infinite instant is none. Without a zone it is in the session's."""
    sql = f"({sql})::timestamptz"
    return f"CASE WHEN isfinite({sql}) THEN (extract(epoch FROM {sql}) * 1000000)::bigint END"


class PostgresSource(NamedTables):
    """A PostgreSQL database (14 or newer). See preservarium/extract/source.py."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        super().__init__(settings)
        self._connection: Any = None
        self._listener: Any = None
        self._tables: dict[Table, _Table] = {}
        #: groups above the horizon whose rows were sent: table -> second -> (rows, sum)
        self._sent: dict[Table, dict[str, tuple[int, str]]] = {}
        #: where each table was read to, while we live; what is recorded may be older
        self._at: dict[Table, str] = {}
        self._woken = Woken()
        self._wake = asyncio.Event()

    async def open(self) -> None:
        """See `Source`."""
        s = self._settings().extract
        self._sent, self._at, self._woken = {}, {}, Woken(overflow=False)
        self._connection = await self._connect()
        # Another connection: the first is inside a cursor's transaction for minutes when much is to be read.
        self._listener = await self._connect()
        self._listener.add_termination_listener(self._told)
        if s.channel:
            await self._listener.add_listener(s.channel, self._told)
        for table in self.tables:
            name, columns = self._name(table), self._mapped(table)
            kind = await self._connection.fetchval(
                "SELECT relkind::text FROM pg_class WHERE oid = to_regclass($1)", quoted(name)
            )
            if kind is None:
                message = f"there is no table {name} in the source"
                raise SourceError(message)
            types = await self._connection.fetch(
                "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
                " WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
                quoted(name),
            )
            self._tables[table] = _Table(table, name, columns, {r[0]: r[1] for r in types}, kind in ("r", "p"))

    async def _connect(self) -> Any:
        try:
            return await connections.connect(
                self._settings().extract.dsn,
                what="reading the source (cursors, LISTEN)",
                timeout=CONNECT_S,
                command_timeout=STATEMENT_S,
                server_settings={
                    "application_name": "preservarium-extract",
                    "timezone": self._settings().extract.time_zone,
                    "default_transaction_read_only": "on",
                    # What a compiled plan saves on a small query is less than compiling costs.
                    "jit": "off",
                },
            )
        except connections.NeedsSession as e:
            message = (
                "PRESERVARIUM_EXTRACT__URL leads to a pooler in transaction mode, and reading the source needs a session of"
                " its own (cursors, LISTEN): give the server's own address"
            )
            raise SourceError(message) from e
        except ValueError as e:
            # Not its text: it may hold the password.
            message = "PRESERVARIUM_EXTRACT__URL cannot be read as postgresql://user:password@host:port/database"
            raise SourceError(message) from e

    async def close(self) -> None:
        """See `Source`."""
        for connection in (self._listener, self._connection):
            if connection is not None:
                with suppress(
                    asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError
                ):
                    await connection.close(timeout=2)
        self._listener = self._connection = None

    # --- reading

    async def _horizon(self) -> tuple[str, str, int]:
        """(the second below which nothing can come any more, a second far above it, now).

        The seconds are text in the session's time zone, now is in µs since the epoch.

        Other roles' transactions are hidden from a role without pg_read_all_stats; for them the overlap must do.
        """
        row = await self._connection.fetchrow(
            """
            SELECT date_trunc('second', h)::text, date_trunc('second', h + make_interval(secs => $3))::text,
                   (extract(epoch FROM now()) * 1000000)::bigint FROM (
              SELECT greatest(now() - make_interval(secs => $2), least(
                now() - make_interval(secs => $1),
                (SELECT min(xact_start) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()),
                (SELECT min(prepared) FROM pg_prepared_xacts WHERE database = current_database()))) AS h) x
            """,
            float(self._settings().extract.overlap_s),
            float(max(HOLD_MAX_S, self._settings().extract.overlap_s)),
            float(AHEAD_MAX_S),
        )
        return row[0], row[1], row[2]

    async def read(self, table: Table, position: Position | None) -> AsyncIterator[Step]:
        """See `Source`."""
        t = self._tables[table]
        horizon, ahead, now_us = await self._horizon()
        if table not in self._sent:
            async for step in self._walk(t, position, horizon, now_us):
                yield step
            self._sent[table] = {}
            self._at[table] = horizon
        groups = {r[0]: (r[1], r[2]) for r in await self._connection.fetch(t.groups, self._at[table], ahead)}
        before = self._sent[table]
        # What is gone from a group is found by its key.
        self._sent[table] = {name: found for name, found in before.items() if name in groups}
        for name in sorted(groups):
            if before.get(name) == groups[name]:
                continue
            async for rows in self._group(t, name, ahead):
                yield Step([t.change(r) for r in rows], position={"at": self._at[table]}, observed_us=now_us)
            self._sent[table][name] = groups[name]
        # Rows of the seconds below are settled now: they were read after the horizon was drawn.
        self._at[table] = max(self._at[table], horizon)

    async def _walk(self, t: _Table, position: Position | None, horizon: str, now_us: int) -> AsyncIterator[Step]:
        where, arguments = f"{t.at} < $1::text::{t.at_type}", [horizon]
        if position is not None and position.get("walk"):
            arguments += position["walk"]
            where += f" AND ({t.at}, {t.id}) > ($2::text::{t.at_type}, $3::text::{t.id_type})"
        elif position is not None and position.get("at"):
            arguments.append(position["at"])
            where += f" AND {t.at} >= $2::text::{t.at_type}"
        query = f"{t.select.replace('SELECT ', f'SELECT {t.at}::text, ', 1)} WHERE {where} ORDER BY {t.at}, {t.id}"
        async with aclosing(self._cursor(query, *arguments)) as pages:
            async for rows in pages:
                position = {"walk": [rows[-1][0], rows[-1][1]]}
                yield Step([t.change(r[1:]) for r in rows], position=position, observed_us=now_us)
        if position is None or "walk" in position:
            yield Step(position={"at": horizon})

    async def _group(self, t: _Table, name: str, ahead: str) -> AsyncIterator[list[Any]]:
        if name == _NO_TIME:
            where, arguments = f"{t.at} IS NULL", []
        elif name == _LATER:
            where, arguments = f"{t.at} >= $1::text::{t.at_type}", [ahead]
        else:
            # Not `< + 1 second`: infinity is not less than itself.
            at = f"$1::text::{t.at_type}"
            where, arguments = f"{t.at} BETWEEN {at} AND {at} + INTERVAL '999999 microseconds'", [name]
        async with aclosing(self._cursor(f"{t.select} WHERE {where}", *arguments)) as pages:
            async for rows in pages:
                yield rows

    async def _cursor(self, query: str, *arguments: Any) -> AsyncGenerator[list[Any], None]:
        """Rows of one picture of the table, `STEP_ROWS` at a time, through a cursor on the server.

        To be closed by who leaves it early: its transaction is open until then.
        """
        async with self._connection.transaction(isolation="repeatable_read", readonly=True):
            cursor = await self._connection.cursor(query, *arguments, timeout=STATEMENT_S)
            while rows := await cursor.fetch(STEP_ROWS):
                yield rows

    async def versions(self, table: Table) -> AsyncIterator[list[tuple[str, Version | None]]]:
        """See `Source`."""
        async with aclosing(self._cursor(self._tables[table].versions)) as pages:
            async for rows in pages:
                yield [(r[0], (r[1] or 0, r[2])) for r in rows]

    async def rows(self, table: Table, ids: Sequence[str]) -> list[Change]:
        """See `Source`."""
        t = self._tables[table]
        found = await self._connection.fetch(f"{t.select} WHERE {t.id} = ANY ($1::text[]::{t.id_type}[])", list(ids))
        return [t.change(r) for r in found]

    async def now_us(self) -> int:
        """See `Source`."""
        now: int = await self._connection.fetchval("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
        return now

    # --- waiting

    def _told(self, *told: Any) -> None:
        """A notice (connection, process, channel, payload), or the end of the connection."""
        payload = told[3] if len(told) == 4 else ""
        if payload:
            with suppress(orjson.JSONDecodeError, TypeError, AttributeError, KeyError):
                notice = orjson.loads(payload)
                table, gone = notice["table"], notice.get("gone")
                if gone is not None and table in FIELDS:
                    ids = self._woken.gone.setdefault(table, set())
                    if len(ids) < GONE_MAX:
                        ids.add(str(gone))
                    else:
                        self._woken.overflow = True
        self._wake.set()

    async def wait(self, timeout_s: float) -> Woken:
        """See `Source`.

        Raises:
            OSError: the connection that listens is gone.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        self._wake.clear()
        if self._listener is None or self._listener.is_closed():
            message = "the source has closed the connection"
            raise ConnectionError(message)
        woken, self._woken = self._woken, Woken()
        return woken
