"""What every store in PostgreSQL stands on: connections, sorted errors, and offsets that move with the rows.

A consumer's offsets are rows of `sink_offsets`, moved by compare-and-set in the transaction of what was read up to
them. So they are the truth, Kafka's commit a hint, and a writer that lost its partition finds out before it commits.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import asyncpg

from preservarium import metrics
from preservarium.breaker import Breaker
from preservarium.clock import Clock, SystemClock
from preservarium.errors import PreservariumError, Retry, reason
from preservarium.settings import Settings
from preservarium.stores.base import Moved, Moves, WriteResult
from preservarium.stores.connections import Pool, Use

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


class PostgresPool(Pool):
    """A pool of connections to the settings' database.

    Args:
        settings: asked when the pool is made.
        name: shown by the server as application_name.
        temporary: as of `Pool`.
    """

    def __init__(
        self, settings: Callable[[], Settings], name: str = "preservarium-sink", *, temporary: str = ""
    ) -> None:
        super().__init__(
            lambda: settings().postgres.dsn,
            connections_max=lambda: settings().postgres.pool_max,
            connect_timeout_s=lambda: settings().postgres.connect_timeout_s,
            command_timeout_s=lambda: settings().postgres.command_timeout_s,
            server_settings={"application_name": name},
            temporary=temporary,
        )
        self.engine = ""  #: timescaledb or plain, once connected

    async def _made(self, pool: Any) -> None:
        use = Use(self)
        connection = await use.of(pool)
        try:
            self.engine = await connection.fetchval("SELECT storage_engine()")
        except BaseException as e:
            await use.__aexit__(type(e), e, None)
            raise
        await use.__aexit__(None, None, None)

    def is_clean(self, error: BaseException) -> bool:
        """See `Pool`: a row's fault, or another transaction in the way, leaves a connection as it was."""
        return isinstance(error, (PreservariumError, *DATA_ERRORS, *CONFLICTS))


class PostgresPing:
    """Whether the server answers, asked over a connection of its own: one of the pool may be waited for while all are at work.

    Args:
        settings: asked when it connects.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._pool = Pool(
            lambda: settings().postgres.dsn,
            connections_max=lambda: 1,
            connect_timeout_s=lambda: settings().postgres.connect_timeout_s,
            command_timeout_s=lambda: settings().postgres.command_timeout_s,
            server_settings={"application_name": "preservarium-ping"},
        )

    async def __call__(self) -> None:
        """Return when it has answered.

        Raises:
            OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: it does not, or lets nobody in.
        """
        async with self._pool.acquire() as connection:
            await connection.execute("SELECT 1")

    async def close(self) -> None:
        """Close the connection."""
        await self._pool.close()


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
    return Retry(f"PostgreSQL: {reason(error)}{hint}")
