"""The rows of the service that this replaces, carried over from its table piece by piece.

A piece is a stretch of time. One transaction stores its rows, reads them back, compares counts and checksums, and notes the piece in
`adoption_pieces` (`adopt_piece`, migrations/postgres/0023_former_service.sql); so a run that ends anywhere goes on where it ended. The newest
come first: they are what is looked at. A piece's width follows what the one before took. Between pieces it rests, for the workers' sake.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg

from preservarium.clock import Clock, SystemClock
from preservarium.errors import PreservariumError, reason
from preservarium.settings import Settings
from preservarium.stores.migrate import former
from preservarium.stores.migrate.former import Former

#: Rows of a piece: a second or two, so that nobody who writes waits long for what it holds.
ROWS_WANTED: Final = 20_000
WIDTH_FIRST: Final = timedelta(minutes=10)
WIDTH_MIN: Final = timedelta(milliseconds=1)
WIDTH_MAX: Final = timedelta(days=32)
#: The server ends a piece then; the next is a quarter as wide.
PIECE_S: Final = 120.0
#: Deadlocks with those who write, lost connections: so often in a row, then somebody must look.
TRIES_MAX: Final = 5
#: Reading the whole of the old table, for its count or to verify a piece.
LONG_S: Final = 3_600.0

#: What can be stored, of the old table's instants; and what cannot: all of it is refused, and kept.
_PLAUSIBLE: Final = "{at} >= '2000-01-01 00:00+00' AND {at} < '2100-01-01 00:00+00'"
_IMPLAUSIBLE: Final = (("2100-01-01 00:00+00", "infinity"), ("-infinity", "2000-01-01 00:00+00"))

_BUSY: Final = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
    asyncpg.UniqueViolationError,
)


class AdoptionError(PreservariumError):
    """The old service's rows cannot be carried over; the message says why, and what can be done."""


@dataclass(slots=True)
class Progress:
    """How far the old table is carried over."""

    table: str
    rows_total: int  #: of the old table
    rows: int = 0  #: of those, looked at
    stored: int = 0
    stood: int = 0  #: were there already
    refused: int = 0  #: are in `iot_measurements_refused`
    too_old: int = 0  #: older than the retention: in the old table alone
    pieces: int = 0
    checksum: int = 0
    #: what is left of the old table: [begin, end) of its rows that no piece covers; None: nothing
    left: tuple[datetime, datetime] | None = None

    @property
    def done(self) -> bool:
        """Whether every row was looked at."""
        return self.left is None and self.rows == self.rows_total


@dataclass(slots=True)
class Verified:
    """What a second look found."""

    pieces: int = 0
    rows: int = 0
    present: int = 0
    refused: int = 0
    too_old: int = 0
    #: pieces in which the tables differ: (begin, end, rows of the old table, of those present)
    differ: list[tuple[str, str, int, int]] = field(default_factory=list)
    #: rows of the old table that no piece covers
    uncovered: int = 0

    @property
    def same(self) -> bool:
        """Whether everything is there."""
        return not self.differ and not self.uncovered


class Adoption:
    """The carrying over, by one process at a time. For one task at a time.

    Args:
        connection: a session of the database's owner.
        settings: the retention.
        found: what `migrate` found of the old service.
        clock: for the retention.
    """

    def __init__(self, connection: Any, settings: Settings, found: Former, *, clock: Clock | None = None) -> None:
        self._connection = connection
        self._settings = settings
        self.found = found
        self._clock = clock or SystemClock()

    @classmethod
    async def of(cls, connection: Any, settings: Settings, *, clock: Clock | None = None) -> "Adoption":
        """The carrying over in the database of a connection.

        Raises:
            AdoptionError: no migration has found an old service here, or its table is gone.
        """
        found = await former.known(connection)
        if found is None:
            message = (
                "no old service was found in this database: its table iot_measurements is recognised by `preservarium migrate`"
                " (in the database and schema that the settings name)"
            )
            raise AdoptionError(message)
        if not found.restored:
            message = "`preservarium migrate` was interrupted: run it again"
            raise AdoptionError(message)
        if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", found.table):
            message = f"the old service's table {found.table} is gone: there is nothing to carry over"
            raise AdoptionError(message)
        return cls(connection, settings, found, clock=clock)

    async def progress(self) -> Progress:
        """How far it is. Counts the old table."""
        row = await self._connection.fetchrow(
            "SELECT coalesce(sum(rows), 0)::bigint, coalesce(sum(stored), 0)::bigint, coalesce(sum(stood), 0)::bigint,"
            " coalesce(sum(refused), 0)::bigint, coalesce(sum(too_old), 0)::bigint, count(*), coalesce(sum(checksum), 0)::numeric::text,"
            f" min(from_at) FILTER (WHERE {_PLAUSIBLE.format(at='from_at')}) FROM adoption_pieces"
        )
        total, first, last = await self._connection.fetchrow(
            f"SELECT count(*), min(timestamp) FILTER (WHERE {_PLAUSIBLE.format(at='timestamp')}),"
            f" max(timestamp) FILTER (WHERE {_PLAUSIBLE.format(at='timestamp')}) FROM {self.found.table}",
            timeout=LONG_S,
        )
        rows, stored, stood, refused, too_old, pieces, checksum, begun_at = row
        found = Progress(self.found.table, total, rows, stored, stood, refused, too_old, pieces, int(checksum))
        if first is not None and begun_at is None:
            found.left = first, last + timedelta(microseconds=1)
        elif first is not None and first < begun_at:
            found.left = first, begun_at
        return found

    async def older(self) -> int:
        """Rows of the old table that are older than what is kept here."""
        found: int = await self._connection.fetchval(
            f"SELECT count(*) FROM {self.found.table} WHERE timestamp < $1 AND timestamp >= '2000-01-01 00:00+00'",
            self._keep_from(),
            timeout=LONG_S,
        )
        return found

    async def run(
        self,
        *,
        leave_older: bool = False,
        rest: float = 0.25,
        told: Callable[[int, int, str], None] = lambda done, total, what: None,
    ) -> Progress:
        """Carry over what is left, the newest rows first.

        Args:
            leave_older: leave in the old table what is older than `sink.retention_days`; else that is refused before anything is done.
            rest: how long to rest after a piece, of the time that it took.
            told: rows done, rows in all, where it is.

        Raises:
            AdoptionError: rows are older than what is kept; a piece did not come out equal, or failed again and again; another process is at it.
        """
        lock = "SELECT pg_try_advisory_lock($1)"
        if not await self._connection.fetchval(lock, _LOCK):
            msg = "another `preservarium adopt` is at it"
            raise AdoptionError(msg)
        try:
            if not leave_older and (older := await self.older()):
                message = (
                    f"{older:,} rows of {self.found.table} are older than sink.retention_days={self._settings.sink.retention_days}, and would be"
                    " dropped: set PRESERVARIUM_SINK__RETENTION_DAYS to what is to be kept, for this command and the workers, or say"
                    " --leave-older"
                )
                raise AdoptionError(message)
            found = await self.progress()
            keep_from = self._keep_from()
            # What no clock can have said. Infinity is an instant to PostgreSQL, and none to Python.
            for begin_text, end_text in _IMPLAUSIBLE:
                noted = await self._connection.fetchval(
                    "SELECT count(*) FROM adoption_pieces WHERE from_at = $1::text::timestamptz", begin_text
                )
                if not noted:
                    found.rows += await self._piece(begin_text, end_text, keep_from) or 0
            width = WIDTH_FIRST
            while found.left is not None:
                first, end = found.left
                begin = max(first, end - width)
                told(found.rows, found.rows_total, f"{end:%Y-%m-%d %H:%M}")
                began_s = self._clock.monotonic_s()
                rows = await self._piece(begin.isoformat(), end.isoformat(), keep_from, narrow=end - begin <= WIDTH_MIN)
                spent_s = self._clock.monotonic_s() - began_s
                if rows is None:
                    width = max(WIDTH_MIN, width / 4)
                    continue
                found.rows += rows
                found.pieces += 1
                found.left = (first, begin) if begin > first else None
                width = _next_width(width, rows, spent_s)
                await asyncio.sleep(rest * spent_s)
            found = await self.progress()
            told(found.rows, found.rows_total, "")
            if found.rows != found.rows_total:
                message = (
                    f"{found.table} has {found.rows_total:,} rows, and {found.rows:,} were carried over: something was written to it, or deleted,"
                    " meanwhile; say --again to look at all of it once more"
                )
                raise AdoptionError(message)
            return found
        finally:
            if not self._connection.is_closed():
                await self._connection.execute("SELECT pg_advisory_unlock($1)", _LOCK)

    async def again(self) -> None:
        """Forget how far it is: the next run looks at every row once more. What is stored stays, and is found standing."""
        await self._connection.execute("DELETE FROM adoption_pieces")
        await self._connection.execute("DELETE FROM iot_measurements_refused WHERE source = 'adopt'")

    async def verify(self, told: Callable[[int, int, str], None] = lambda done, total, what: None) -> Verified:
        """Compare both tables, piece by piece: each row looked up, counts and checksums beside what was noted. Changes nothing."""
        found = Verified()
        keep_from = self._keep_from()
        total = await self._connection.fetchval(f"SELECT count(*) FROM {self.found.table}", timeout=LONG_S)
        pieces = await self._connection.fetch(
            "SELECT from_at::text, to_at::text, rows, refused, too_old, checksum, from_at < $1 FROM adoption_pieces ORDER BY from_at DESC",
            keep_from,
        )
        for begin, end, rows, refused, too_old, checksum, ages in pieces:
            told(found.rows, total, end)
            row = await self._connection.fetchrow(
                "SELECT in_old, present, old_sum, new_sum FROM adoption_compared($1, $2::text::timestamptz, $3::text::timestamptz, $4)",
                self.found.table, begin, end, keep_from, timeout=LONG_S,
            )  # fmt: skip
            in_old, present, old_sum, new_sum = row
            found.pieces += 1
            found.rows += in_old
            found.present += present
            found.refused += refused
            found.too_old += too_old
            # What retention has dropped since is in the old table alone: the sums leave it out, both of them.
            dropped = old_sum != checksum and ages
            if in_old != rows or old_sum != new_sum or not (dropped or old_sum == checksum):
                found.differ.append((begin, end, in_old, present))
        found.uncovered = total - found.rows
        return found

    async def drop(self) -> None:
        """Drop the old table.

        Raises:
            AdoptionError: not all of it is carried over, or something stands on it.
        """
        found = await self.progress()
        if not found.done or found.too_old:
            what = (
                f"{found.too_old:,} of its rows are older than what is kept, and are nowhere else"
                if found.done
                else "not all of it is carried over"
            )
            msg = f"{found.table} is not dropped: {what}; DROP TABLE does it all the same"
            raise AdoptionError(msg)
        try:
            async with self._connection.transaction():
                await self._connection.execute("SET LOCAL lock_timeout = '60s'")
                await self._connection.execute(f"DROP TABLE {found.table}")
        except asyncpg.DependentObjectsStillExistError as e:
            msg = f"{found.table} is not dropped: {e.detail or reason(e)}"
            raise AdoptionError(msg) from e

    # --- one piece

    async def _piece(self, begin: str, end: str, keep_from: datetime, *, narrow: bool = True) -> int | None:
        """Carry over a stretch; None where it takes too long."""
        for attempt in range(1, TRIES_MAX + 1):
            try:
                async with self._connection.transaction():
                    await self._connection.execute(
                        "SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', '10s', true)",
                        f"{PIECE_S:g}s",
                    )
                    if self.found.hypertable:
                        # What is compressed already may be there, too: a run that was interrupted, a chunk of the workers.
                        await self._connection.execute(
                            "SELECT set_config('timescaledb.max_tuples_decompressed_per_dml_transaction', '0', true)"
                        )
                    rows: int = await self._connection.fetchval(
                        "SELECT rows FROM adopt_piece($1, $2::text::timestamptz, $3::text::timestamptz, $4)",
                        self.found.table, begin, end, keep_from, timeout=PIECE_S + 10,
                    )  # fmt: skip
                    return rows
            except (asyncpg.QueryCanceledError, TimeoutError) as e:
                if narrow:
                    msg = f"rows of {begin} take more than {PIECE_S:g} s: {reason(e)}"
                    raise AdoptionError(msg) from e
                return None
            except _BUSY as e:
                if attempt == TRIES_MAX:
                    msg = f"rows of {begin} to {end}: {reason(e)}"
                    raise AdoptionError(msg) from e
                await asyncio.sleep(0.2 * attempt)
            except (asyncpg.RaiseError, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as e:
                msg = f"rows of {begin} to {end}: {reason(e)}"
                raise AdoptionError(msg) from e
        msg = "unreachable"
        raise AssertionError(msg)

    def _keep_from(self) -> datetime:
        now = datetime.fromtimestamp(self._clock.now_us() / 1e6, UTC)
        return now - timedelta(days=self._settings.sink.retention_days)


#: Session advisory lock; any constant that nothing else in this database uses.
_LOCK: Final = 7_236_481_305


def _next_width(width: timedelta, rows: int, spent_s: float) -> timedelta:
    """How wide the next piece is to be: `ROWS_WANTED` rows, or two seconds, whichever is less; at most four times as wide."""
    factor = 4.0
    if rows:
        factor = min(factor, ROWS_WANTED / rows)
    if spent_s > 0.5:
        factor = min(factor, 2.0 / spent_s)
    return min(WIDTH_MAX, max(WIDTH_MIN, width * max(0.1, factor)))
