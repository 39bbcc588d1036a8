"""Upkeep of the readings' storage: partitions and retention of plain PostgreSQL, the late lane, roll-ups, and jobs that do not run.

Every worker's timer calls it, and one at a time does the work: each piece is a transaction of its own, behind one lock that ends
with it, and bounded on the server, so that nothing of it outlives its worker. What fails is kept in `storage_runs` and counts
nothing against the breaker of those who write: a long statement says nothing about the database's health.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
import structlog

from preservarium import metrics
from preservarium.breaker import Breaker
from preservarium.clock import Clock
from preservarium.errors import Retry, reason
from preservarium.settings import Settings
from preservarium.stores.connections import session
from preservarium.stores.postgres import INFRASTRUCTURE_ERRORS, PostgresPool, retry

_log = structlog.get_logger(__name__)

#: Staged rows moved in one transaction: some 100 ms, so that live writes never wait long.
LATE_ROWS_MAX: Final = 20_000
#: Of one piece: a fraction of a second as a rule. A piece that takes `PIECE_S` is undone, and the next one is half of it.
PAIRS_MAX: Final = 5_000
MINUTES_MAX: Final = 60
#: The server ends a piece then.
PIECE_S: Final = 60.0
#: No piece of the late lane, or of the roll-ups, begins later in one turn: what is left goes on at the next. Each has its own time, so that
#: a back-fill of months does not keep the roll-ups waiting.
SHARE_S: Final = 20.0
#: A policy that upkeep runs: compressing a chunk of a large fleet takes minutes. The server ends it then.
JOB_S: Final = 900.0
#: Chunks are dropped under an exclusive lock: give up soon rather than queue every writer behind it.
JOB_LOCK_S: Final = 10.0
#: The server's own workers have so long beyond a job's interval, and after its start.
GRACE_S: Final = 600.0
_JOBS_LOCK: Final = 7_236_481_303

#: What says that a statement was too long, or somebody in its way.
_TOO_LONG: Final = (TimeoutError, asyncpg.QueryCanceledError, asyncpg.LockNotAvailableError)
#: What says that the server is not to be asked at all. A statement that is cancelled is an intervention, too.
_NOT_THERE: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
)


class Upkeep:
    """Upkeep by one worker. For one task at a time; `run_overdue` may run beside the others.

    Args:
        settings: asked at each turn.
        pool: shared with those who write.
        clock: for how long a turn takes, and retention.
        breaker: asked, never told: nothing is tried while it is open.
        stages_late: whether there is a late lane; known once the pool is connected.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        *,
        pool: PostgresPool,
        clock: Clock,
        breaker: Breaker,
        stages_late: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._clock = clock
        self._breaker = breaker
        self._stages_late = stages_late
        self._pairs = PAIRS_MAX
        self._minutes = MINUTES_MAX

    async def turn(self) -> None:
        """One turn of the timer: partitions and retention where TimescaleDB does not, the late lane, roll-ups.

        Several workers may call it: one does the work, the others return.

        Raises:
            Retry: the database cannot be reached.
        """
        self._refuse_while_open()
        s = self._settings().sink
        await self._reach(self._pool.ready())
        if self._pool.engine == "plain":
            ours = await self._job("upkeep", lambda: self._partitions(s.chunk_days, s.retention_days))
            if ours is False:
                return
        if self._stages_late():
            await self._job("late rows", lambda: self._merge(s.chunk_days, s.retention_days))
        await self._job("rollups", self._refresh)

    async def _partitions(self, chunk_days: int, retention_days: int) -> bool | None:
        ours: bool = await self._piece("SELECT storage_maintain($1, $2)", chunk_days, retention_days)
        return ours

    async def _merge(self, chunk_days: int, retention_days: int) -> bool | None:
        until_s = self._clock.monotonic_s() + SHARE_S
        keep_from = datetime.fromtimestamp(self._clock.now_us() // 1_000_000, UTC) - timedelta(days=retention_days)
        statement = "SELECT merge_late($1::text::interval, $2, $3)"
        while moved := await self._piece(statement, f"{chunk_days} days", LATE_ROWS_MAX, keep_from):
            if self._clock.monotonic_s() > until_s:
                break
        return moved is not None

    async def _refresh(self) -> bool | None:
        """Bring the roll-ups to what is marked, piece by piece, each half of the one before where that took too long."""
        until_s = self._clock.monotonic_s() + SHARE_S
        more: bool | None = True
        while more and self._clock.monotonic_s() < until_s:
            try:
                more = await self._piece(
                    "SELECT refresh_rollups($1, make_interval(mins => $2))", self._pairs, self._minutes
                )
            except _TOO_LONG:
                self._pairs, self._minutes = max(1, self._pairs // 2), max(1, self._minutes // 2)
                raise
            self._pairs, self._minutes = min(PAIRS_MAX, self._pairs * 2), min(MINUTES_MAX, self._minutes * 2)
        return more is not None

    async def apply_policies(self) -> None:
        """Bring TimescaleDB's chunk interval, compression and retention to what the settings say; what is so is left alone.

        Raises:
            Retry: the database cannot be reached, or refuses.
        """
        self._refuse_while_open()
        s = self._settings().sink
        await self._reach(self._pool.ready())
        if self._pool.engine == "timescaledb":
            statement = "SELECT storage_policies($1, $2, $3)"
            await self._reach(self._piece(statement, s.chunk_days, s.compress_after_days, s.retention_days))

    async def failing_jobs(self) -> list[str]:
        """Jobs whose last run failed, for health: they fail silently otherwise.

        Raises:
            Retry: the database cannot be reached.
        """
        self._refuse_while_open()
        found = await self._reach(
            self._piece("SELECT coalesce(array_agg(job ORDER BY job), '{}') FROM storage_jobs WHERE NOT succeeded")
        )
        return list(found)

    async def run_overdue(self, *, grace_s: float = GRACE_S) -> list[str]:
        """Run TimescaleDB's policies whose time is over and that its own workers do not run, one after the other.

        One worker does, the others return. Each is ended by the server after `JOB_S`.

        Args:
            grace_s: how long over their time.

        Returns:
            The names of those that were run, whatever came of them.

        Raises:
            Retry: the database cannot be reached.
        """
        self._refuse_while_open()
        await self._reach(self._pool.ready())
        if self._pool.engine != "timescaledb":
            return []
        overdue = "SELECT job_id, job FROM storage_overdue(make_interval(secs => $1))"
        if not await self._reach(self._piece(f"SELECT EXISTS ({overdue})", grace_s)):
            return []
        # A job is no part of a transaction, and the lock is the session's: both end with this connection.
        connection = await self._reach(session(self._settings().postgres, "running overdue jobs of TimescaleDB"))
        try:
            if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _JOBS_LOCK):
                return []
            await connection.execute(
                f"SET statement_timeout = '{JOB_S:g}s'; SET lock_timeout = '{JOB_LOCK_S:g}s'; SET idle_session_timeout = '60s'"
            )
            ran = []
            for job_id, name in await connection.fetch(overdue, grace_s):
                await self._run(connection, job_id, name)
                ran.append(name)
            return ran
        except INFRASTRUCTURE_ERRORS as e:
            raise retry(e) from e
        finally:
            connection.terminate()

    async def _run(self, connection: Any, job_id: int, name: str) -> None:
        fault = None
        started_s = self._clock.monotonic_s()
        try:
            # A little later than the server would: then its word is heard.
            await connection.execute(f"CALL run_job({job_id:d})", timeout=JOB_S + 30)
        except (TimeoutError, asyncpg.PostgresError) as e:
            if isinstance(e, _NOT_THERE) and not isinstance(e, _TOO_LONG):
                raise
            fault = reason(e)
        metrics.STORAGE_JOBS_RUN.labels("failed" if fault else "done").inc()
        spent_s = round(self._clock.monotonic_s() - started_s, 3)
        _log.warning("overdue job run", job=name, spent_s=spent_s, error=fault, action="run `preservarium doctor`")
        await connection.execute("SELECT storage_ran($1, $2)", f"job {job_id}", fault)

    # --- asking

    def _refuse_while_open(self) -> None:
        if wait_s := self._breaker.open_for_s:
            message = f"{self._breaker.name} is down, tried again in {wait_s:.1f} s: {self._breaker.reason}"
            raise Retry(message)

    async def _piece(self, query: str, *arguments: Any) -> Any:
        """What a query of one value gives, in a transaction that the server ends."""
        async with self._pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT set_config('statement_timeout', $1, true)", f"{PIECE_S:g}s")
            return await connection.fetchval(query, *arguments, timeout=PIECE_S + 10)

    async def _reach(self, asked: Awaitable[Any]) -> Any:
        try:
            return await asked
        except INFRASTRUCTURE_ERRORS as e:
            raise retry(e) from e

    async def _job(self, name: str, work: Callable[[], Awaitable[bool | None]]) -> bool | None:
        """Do a part of the work, and keep what became of it.

        Returns:
            What the work gives; False where another worker is at it, None where it failed.

        Raises:
            Retry: the database cannot be reached.
        """
        fault = None
        done: bool | None = None
        try:
            done = await work()
        except _TOO_LONG as e:
            fault = reason(e)
        except _NOT_THERE as e:
            raise retry(e) from e
        except asyncpg.PostgresError as e:
            fault = reason(e)
        if fault is not None:
            _log.warning("storage upkeep failed", job=name, error=fault, action="tried again at the next turn")
        if done is not False:
            await self._reach(self._piece("SELECT storage_ran($1, $2)", name, fault))
        return done
