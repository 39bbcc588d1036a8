"""What every store in PostgreSQL stands on: connections, sorted errors, and offsets that move with the rows.

A consumer's offsets are rows of `sink_offsets`, moved by compare-and-set in the transaction of what was read up to
them. So they are the truth, Kafka's commit a hint, and a writer that lost its partition finds out before it commits.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import asyncpg

from preservarium import metrics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.errors import PreservariumError, Retry
from preservarium.settings import Settings
from preservarium.stores.base import Moved, Moves, WriteResult
from preservarium.stores.breaker import Breaker

T = TypeVar("T")

#: A deadlock or a serialisation failure is over at once; three in a row mean something else.
CONFLICTS_MAX: Final = 3
#: What says that the row is at fault: data (22), integrity (23), a limit such as an index row's size (54).
DATA_ERRORS: Final = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.RaiseError,
)
CONFLICTS: Final = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
#: What says that nothing can be known about the row. InternalClientError: the pool may hand out a connection that the
#: server has just ended (asyncpg issue 1069). Errors of PostgreSQL outside DATA_ERRORS are here as well: a missing
#: table or right, a full disk, a standby are no row's fault, and waiting loses nothing.
INFRASTRUCTURE_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

_NOT_MIGRATED: Final = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError)


_FRESH: Final = """
INSERT INTO sink_offsets (sink, topic, partition, generation, next_offset)
SELECT $1, t, p, $2, n FROM unnest($3::text[], $4::int[], $5::bigint[]) AS u(t, p, n) ORDER BY t, p ON CONFLICT DO NOTHING"""
#: Begins a statement that moves offsets and does more; `SELECT count(*) FROM moved` must be the number of partitions.
MOVED: Final = """
WITH moved AS (
  UPDATE sink_offsets AS o SET next_offset = u.next, updated_at = now()
  FROM unnest($3::text[], $4::int[], $5::bigint[], $6::bigint[]) AS u(topic, partition, expected, next)
  WHERE o.sink = $1 AND o.generation = $2 AND o.topic = u.topic AND o.partition = u.partition AND o.next_offset = u.expected
  RETURNING 1)"""


class PostgresPool:
    """A pool of connections to the settings' database, made when first needed and again after `close`.

    Args:
        settings: asked when the pool is made.
        name: shown by the server as application_name.
        prepare: a statement that each new connection runs, such as one that makes a temporary table.
    """

    def __init__(self, settings: Callable[[], Settings], name: str = "preservarium-sink", *, prepare: str = "") -> None:
        self._settings = settings
        self._name = name
        self._statement = prepare
        self._pool: Any = None
        self._lock = asyncio.Lock()
        self.engine = ""  #: timescaledb or plain, once connected

    def acquire(self) -> "_Connection":
        """A connection for an `async with` block, given back at its end, closed where it failed."""
        return _Connection(self)

    async def ready(self) -> Any:
        """The asyncpg pool; makes it where there is none."""
        if self._pool is not None:
            return self._pool
        async with self._lock:
            if self._pool is None:
                s = self._settings().postgres
                pool = await asyncpg.create_pool(
                    s.dsn,
                    min_size=0,
                    max_size=s.pool_max,
                    timeout=s.connect_timeout_s,
                    command_timeout=s.command_timeout_s,
                    # Connections are given back clean or closed, so the round trip of RESET ALL is saved.
                    reset=_no_reset,
                    init=self._prepare,
                    server_settings={"application_name": self._name},
                )
                try:
                    self.engine = await pool.fetchval("SELECT storage_engine()")
                except BaseException:
                    pool.terminate()
                    raise
                self._pool = pool
        return self._pool

    async def _prepare(self, connection: Any) -> None:
        if self._statement:
            await connection.execute(self._statement)

    @property
    def connect_timeout_s(self) -> float:
        """How long a connection may take to be had."""
        return self._settings().postgres.connect_timeout_s

    async def close(self) -> None:
        """Close every connection."""
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                await asyncio.wait_for(pool.close(), self.connect_timeout_s)
            except (TimeoutError, *INFRASTRUCTURE_ERRORS):
                pool.terminate()


async def _no_reset(_connection: Any) -> None:
    return None


class _Connection:
    """One use of a pooled connection."""

    def __init__(self, pool: PostgresPool) -> None:
        self._owner = pool
        self._pool: Any = None
        self._connection: Any = None

    async def __aenter__(self) -> Any:
        self._pool = await self._owner.ready()
        self._connection = await self._pool.acquire(timeout=self._owner.connect_timeout_s)
        return self._connection

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        connection = self._connection
        if error is not None and not isinstance(error, (PreservariumError, *DATA_ERRORS, *CONFLICTS)):
            # Cancelled in the middle, or broken, or nobody knows: not a connection to hand on.
            connection.terminate()
        await self._pool.release(connection)


class OffsetStore:
    """A store whose offsets are in PostgreSQL, in the transaction of its rows.

    Safe for concurrent use within one event loop; two writes of one partition must follow each other.

    Args:
        settings: asked at each write.
        sink: whose offsets; each consumer group has its own.
        pool: connections.
        clock: for what is measured.
        breaker: shared by all that use the database.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        *,
        sink: str,
        pool: PostgresPool,
        clock: Clock | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        self.sink = sink
        self.breaker = breaker or Breaker("postgres", lambda: settings().breaker, clock=clock)
        self._settings = settings
        self._pool = pool
        self._clock = clock or SystemClock()

    async def offsets(self, topic: str, partitions: Sequence[int]) -> dict[int, int | None]:
        """The next offset of each partition; None where nothing of it was ever written.

        Raises:
            Retry: the database cannot be reached.
        """
        if not partitions:
            return {}

        async def read(connection: Any) -> dict[int, int | None]:
            found = await self._positions(connection, [(topic, p) for p in partitions])
            return {p: found[topic, p] for p in partitions}

        return await self._ask(read)

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

    # --- for the stores

    async def _ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """What `question` gives for a connection; `Retry` where the database cannot be asked."""
        async with self.breaker:
            try:
                async with self._pool.acquire() as connection:
                    return await question(connection)
            except INFRASTRUCTURE_ERRORS as e:
                raise retry(e) from e

    async def _counted(self, write: Callable[[], Awaitable[WriteResult]]) -> WriteResult:
        """One write behind the breaker: tried again where another transaction is in its way, and counted.

        Raises:
            Moved: the offsets are not what the write expects.
            Retry: the database cannot be reached; whether it was written shows in `offsets`.
        """
        started = self._clock.monotonic_s()
        async with self.breaker:
            try:
                for attempt in range(CONFLICTS_MAX):
                    try:
                        result = await write()
                        break
                    except CONFLICTS:
                        if attempt == CONFLICTS_MAX - 1:
                            raise
            except INFRASTRUCTURE_ERRORS as e:
                self._forget()  # what comes back may be another server, or an older state of this one
                raise retry(e) from e
        metrics.STORE_SECONDS.labels("postgres").observe(self._clock.monotonic_s() - started)
        count = metrics.STORE_ROWS.labels
        count("postgres", "stored").inc(result.accepted)
        if result.duplicates:
            count("postgres", "duplicate").inc(result.duplicates)
        if result.rejected:
            count("postgres", "rejected").inc(len(result.rejected))
        return result

    def _forget(self) -> None:
        """Drop what memory says of the database."""

    async def _move(self, connection: Any, moves: Moves) -> None:
        """Compare-and-set of the offsets, within a transaction.

        Raises:
            Moved: without positions: `_fence` reads them when this transaction is undone.
        """
        known = await self._move_fresh(connection, moves)
        if known and await connection.fetchval(f"{MOVED} SELECT count(*) FROM moved", *known) != len(known[2]):
            raise Moved({})

    async def _move_fresh(self, connection: Any, moves: Moves) -> list[Any]:
        """First rows of partitions that have none.

        Returns:
            Arguments of `MOVED` for the others; empty where there are none.

        Raises:
            Moved: another writer was first.
        """
        generation = self._settings().sink.generation
        fresh = sorted((t, p, m.next) for (t, p), m in moves.items() if m.expected is None)
        if fresh:
            status = await connection.execute(_FRESH, self.sink, generation, *map(list, zip(*fresh, strict=True)))
            if count_of(status) != len(fresh):
                raise Moved({})
        known = sorted((t, p, m.expected, m.next) for (t, p), m in moves.items() if m.expected is not None)
        return [self.sink, generation, *map(list, zip(*known, strict=True))] if known else []

    @asynccontextmanager
    async def _fence(self, connection: Any, moves: Moves) -> AsyncIterator[None]:
        try:
            yield
        except Moved:
            raise Moved(await self._positions(connection, moves)) from None

    async def _positions(self, connection: Any, keys: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int | None]:
        wanted = list(keys)
        rows = await connection.fetch(
            "SELECT o.topic, o.partition, o.next_offset FROM unnest($3::text[], $4::int[]) AS u(t, p)"
            " JOIN sink_offsets o ON o.sink = $1 AND o.generation = $2 AND o.topic = u.t AND o.partition = u.p",
            self.sink,
            self._settings().sink.generation,
            [t for t, _ in wanted],
            [p for _, p in wanted],
        )
        found: dict[tuple[str, int], int | None] = dict.fromkeys(wanted)
        found.update({(topic, partition): next_offset for topic, partition, next_offset in rows})
        return found


def count_of(status: str) -> int:
    """Rows of a command's status, such as "INSERT 0 12"."""
    return int(status.rsplit(" ", 1)[1])


def retry(error: BaseException) -> Retry:
    """What the caller is told of an error of the database: try again."""
    hint = "; run `preservarium migrate`" if isinstance(error, _NOT_MIGRATED) else ""
    return Retry(f"PostgreSQL: {type(error).__name__}: {error}{hint}")
