"""One more topic of events as a table in PostgreSQL: what a declaration needs, and the store that follows it.

Each event is a row with a key of its own. An event that comes again changes nothing: the first one stays, or, where the
declaration names a revision, the highest (of equal ones the later). Rows and offsets are one transaction; what
PostgreSQL refuses is bisected to the row, and the rest commits. The declarations are in preservarium/stores/tables.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, Final

import orjson

from preservarium.breaker import Breaker
from preservarium.clock import Clock
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.errors import ReasonCode
from preservarium.settings import Settings
from preservarium.stores.base import (
    TEXT_CHARS_MAX,
    BeforeCommit,
    Moves,
    Rejected,
    WriteResult,
    text_fault,
    timestamp_code,
)
from preservarium.stores.events import instant as to_datetime
from preservarium.stores.postgres import DATA_ERRORS, OffsetStore, PostgresPool, count_of
from preservarium.topics import Topic

#: Old rows deleted in one statement: some 50 ms, so that writers hardly wait.
PRUNE_ROWS_MAX: Final = 10_000

_REQUIRED: Final[Any] = object()

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: where its value comes from, and what it must be."""

    name: str
    type: str  #: PostgreSQL's
    convert: Callable[[Any], Any]  #: raises ValueError or TypeError, saying why, where the value cannot be stored
    field: str  #: of the line; "" for the whole line
    default: Any  #: where the line has none, or null

    def of(self, line: Line) -> Any:
        """The column's value.

        Raises:
            ValueError, TypeError, OverflowError: there is none that could be stored.
        """
        value = line.get(self.field) if self.field else line
        if value is None:
            if self.default is _REQUIRED:
                message = f"{self.field} is missing"
                raise ValueError(message)
            return self.default
        try:
            return self.convert(value)
        except (TypeError, ValueError) as e:
            message = f"{self.field or self.name}: {e}"
            raise ValueError(message) from e


def _column(kind: str, convert: Callable[[Any], Any]) -> Callable[..., Column]:
    def declare(name: str, field: str | None = None, *, default: Any = _REQUIRED) -> Column:
        return Column(name, kind, convert, name if field is None else field, default)

    return declare


def _text(value: Any) -> str:
    if fault := text_fault(value, TEXT_CHARS_MAX):
        raise ValueError(fault)
    return str(value)


def _instant(value: Any) -> Any:
    if fault := timestamp_code(value, oldest_us=TIMESTAMP_MIN_US, newest_us=TIMESTAMP_MAX_US):
        raise ValueError(fault[1])
    return to_datetime(value)


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not float("-inf") < value < float("inf"):
        message = f"{value!r} is no finite number"
        raise ValueError(message)
    return float(value)


def _integer(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        message = f"{value!r} is no integer"
        raise ValueError(message)
    return value


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        message = f"{value!r} is neither true nor false"
        raise ValueError(message)
    return value


def _json(value: Any) -> str:
    encoded = orjson.dumps(value).decode()
    if "\\u0000" in encoded:
        message = "holds NUL"
        raise ValueError(message)
    return encoded


#: Columns of each kind: `text("rule")`, `instant("at", "timestamp")` (µs since the epoch in the line), `integer("n", default=0)`.
text = _column("text", _text)
instant = _column("timestamptz", _instant)
number = _column("float8", _number)
integer = _column("bigint", _integer)
boolean = _column("boolean", _boolean)
#: Any JSON value; with the field "" the whole line.
document = _column("jsonb", _json)


@dataclass(frozen=True)
class EventTable:
    """How the events of a topic become rows."""

    topic: Topic  #: a line of it is an event
    table: str  #: made by a migration, with a primary key or unique constraint on `key`
    key: tuple[str, ...]  #: names of the columns that say which event it is
    columns: tuple[Column, ...]
    #: Name of the column whose highest value counts; empty: an event is final, the first one stays.
    revision: str = ""
    #: A statement for what follows from events stored for the first time, in the same transaction: its arguments are their
    #: keys, an array for each column of `key`, in the order of the topic. Not together with `revision`.
    then: str = ""
    #: Name of the timestamptz column by which old rows are deleted; empty: kept for ever.
    kept_by: str = ""
    #: How long, in days.
    kept_days: Callable[[Settings], int] = lambda _: 0
    #: Tables that `then` writes, with the column by which their rows are deleted alike; where it is NULL a row is kept.
    kept_with: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = [column.name for column in self.columns]
        assert len(set(names)) == len(names), "a column is declared twice"
        assert self.key, "an event has a key"
        assert set(self.key) <= set(names), "the key is of declared columns"
        assert not self.revision or (self.revision in names and not self.then), "revision: a declared column"

    def row(self, line: Line) -> tuple[Any, ...]:
        """The row of a line.

        Raises:
            ValueError, TypeError, OverflowError: it cannot be stored.
        """
        return tuple(column.of(line) for column in self.columns)

    @cached_property
    def key_at(self) -> tuple[int, ...]:
        """Where the key's columns are in a row."""
        names = [column.name for column in self.columns]
        return tuple(names.index(name) for name in self.key)

    @cached_property
    def revision_at(self) -> int | None:
        """Where the revision is in a row."""
        names = [column.name for column in self.columns]
        return names.index(self.revision) if self.revision else None

    @cached_property
    def insert(self) -> str:
        """The statement that stores rows; its arguments are arrays, one a column."""
        names = ", ".join(column.name for column in self.columns)
        arrays = ", ".join(f"${n}::{column.type}[]" for n, column in enumerate(self.columns, 1))
        statement = f"INSERT INTO {self.table} AS t ({names}) SELECT * FROM unnest({arrays}) ON CONFLICT ({', '.join(self.key)})"
        if not self.revision:
            return f"{statement} DO NOTHING" + (f" RETURNING {', '.join(self.key)}" if self.then else "")
        others = [column.name for column in self.columns if column.name not in self.key]
        new, old = (", ".join(f"{side}.{name}" for name in others) for side in ("excluded", "t"))
        return (
            f"{statement} DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in others)}"
            f" WHERE excluded.{self.revision} >= t.{self.revision} AND ({new}) IS DISTINCT FROM ({old})"
        )

    @cached_property
    def prunes(self) -> tuple[str, ...]:
        """Statements that delete up to $2 rows of a table each, older than $1."""
        return tuple(
            f"DELETE FROM {table} WHERE ctid = ANY(ARRAY(SELECT ctid FROM {table} WHERE {at} < $1 ORDER BY {at} LIMIT $2))"
            for table, at in ((self.table, self.kept_by), *self.kept_with)
        )


class EventStore(OffsetStore):
    """Stores the events of one topic.

    Args:
        declared: where to.
        settings: asked at each write.
        sink: whose offsets; each consumer group has its own.
        pool: shared connections; its own where none is given.
        clock: for retention.
        breaker: shared by all that use the database; its own where none is given.
    """

    def __init__(
        self,
        declared: EventTable,
        settings: Callable[[], Settings],
        *,
        sink: str,
        pool: PostgresPool | None = None,
        clock: Clock | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        super().__init__(settings, sink=sink, pool=pool or PostgresPool(settings), clock=clock, breaker=breaker)
        self.declared = declared

    @property
    def tables(self) -> tuple[str, ...]:
        """Every table that events are written to: the declared one, then those that follow from it."""
        return (self.declared.table, *re.findall(r"\bINSERT INTO (\w+)", self.declared.then))

    async def write(
        self, lines: Sequence[Line], moves: Moves, *, before_commit: BeforeCommit | None = None
    ) -> WriteResult:
        """Store events and offsets, or neither. `Rejected.reading` is 0.

        What is stored already, or of an older revision, is a duplicate.

        Raises:
            Moved: the offsets are not what `moves` expects; nothing was written.
            Retry: the database cannot be reached; whether it was written shows in `offsets`.
        """
        return await self._counted(lambda: self._write(lines, moves, before_commit))

    async def prune(self) -> int:
        """Delete some of the rows that are too old; how many.

        Raises:
            Retry: the database cannot be reached.
        """
        if not self.declared.kept_by:
            return 0
        kept = timedelta(days=self.declared.kept_days(self._settings()))

        async def delete(connection: Any) -> int:
            # What is deleted is gone: a worker's clock that is ahead of the database's must not say what is old.
            now = await connection.fetchval("SELECT least($1::timestamptz, now())", to_datetime(self._clock.now_us()))
            before = now - kept
            return sum(
                [count_of(await connection.execute(one, before, PRUNE_ROWS_MAX)) for one in self.declared.prunes]
            )

        return await self._ask(delete)

    async def _write(self, lines: Sequence[Line], moves: Moves, before_commit: BeforeCommit | None) -> WriteResult:
        key_at, revision_at = self.declared.key_at, self.declared.revision_at
        rows: dict[tuple[Any, ...], tuple[int, tuple[Any, ...]]] = {}
        rejected: list[Rejected] = []
        for index, line in enumerate(lines):
            try:
                row = self.declared.row(line)
            except (TypeError, ValueError, AttributeError, OverflowError) as e:
                rejected.append(Rejected(index, 0, ReasonCode.STORE_REJECTED, f"{type(e).__name__}: {e}"))
                continue
            key = tuple(row[n] for n in key_at)
            stands = rows.get(key)
            if stands is None or (revision_at is not None and row[revision_at] >= stands[1][revision_at]):
                rows[key] = index, row
        async with self._pool.acquire() as connection, self._fence(connection, moves), connection.transaction():
            await self._move(connection, moves)
            accepted = await self._store(connection, list(rows.items()), rejected)
            rejected.sort(key=lambda r: r.message)
            if before_commit is not None:
                await before_commit(rejected)
        return WriteResult(accepted, len(lines) - accepted - len(rejected), rejected)

    async def _store(
        self,
        connection: Any,
        items: list[tuple[tuple[Any, ...], tuple[int, tuple[Any, ...]]]],
        rejected: list[Rejected],
    ) -> int:
        """Store what can be stored of the rows, and say what cannot; how many were new."""
        if not items:
            return 0
        try:
            async with connection.transaction():
                return await self._insert(connection, items)
        except DATA_ERRORS as e:
            if len(items) == 1:
                text = f"{type(e).__name__}: {e}"
                rejected.append(Rejected(items[0][1][0], 0, ReasonCode.STORE_REJECTED, text))
                return 0
        half = len(items) // 2
        first = await self._store(connection, items[:half], rejected)
        return first + await self._store(connection, items[half:], rejected)

    async def _insert(self, connection: Any, items: list[tuple[tuple[Any, ...], tuple[int, tuple[Any, ...]]]]) -> int:
        # By key: two writers in opposite orders would wait for each other.
        columns = map(list, zip(*(row for _, (_, row) in sorted(items, key=lambda item: item[0])), strict=True))
        if not self.declared.then:
            return count_of(await connection.execute(self.declared.insert, *columns))
        new = {tuple(found) for found in await connection.fetch(self.declared.insert, *columns)}
        if new:
            keys = [key for key, _ in items if key in new]
            await connection.execute(self.declared.then, *map(list, zip(*keys, strict=True)))
        return len(new)
