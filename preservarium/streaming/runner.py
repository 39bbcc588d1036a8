"""Carries out what a stage's handler decides: effects in order, retries, bisection, fuse. Both feeds use it.

What becomes of an exception:

| raised by the handler or by an effect | what happens |
|---|---|
| `Retry` | the same batches again, with back-off and jitter, without limit |
| `Fatal` | passed on: the worker ends |
| `Reject` | no second try: bisected at once, because the same input gives the same answer |
| anything else | `agents.attempts_max` tries, then bisected |

Bisection processes the halves one after the other, each with its own effects and acknowledgement, down to the one
record that fails; that record goes to `iot_errors`, and the rest is processed. Cancellation abandons what is not
acknowledged, which is safe at every point (see preservarium/streaming/stage.py).
"""

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any, Final, Protocol

import structlog

from preservarium import metrics
from preservarium.breaker import back
from preservarium.clock import Clock
from preservarium.errors import Fatal, ReasonCode, Reject, Retry
from preservarium.settings import LiveSettings
from preservarium.streaming.records import error_line, error_send
from preservarium.streaming.stage import Batch, Effects, GroupHandler, Send, Tick, TickHandler
from preservarium.waiting import watcher

log = structlog.get_logger(__name__)

#: After so many records in a row have failed all their tries, a record gets one try: the fault is in the code and not
#: in the record, and waiting would only delay the fuse.
FAILURES_PATIENT_MAX: Final = 3

#: The longest that one step of a handler takes by its own limits, where its stage says nothing else: a statement or a request.
PATIENCE_S: Final = 30.0

#: Acknowledges the records of a batch; batches of a partition are acknowledged in order.
Ack = Callable[[Batch], None]
#: Asked before a batch that met a `Retry` is tried again; gives the batches that are still to be processed.
Recheck = Callable[[Sequence[Batch]], Awaitable[Sequence[Batch]]]


class Publishing(Protocol):
    """What the runner needs of a publisher."""

    async def publish(self, sends: Sequence[Send]) -> dict[str, int]:
        """Return when every record is acknowledged; the records by topic name."""
        ...


#: Writes state: (table, partition, items) -> when changelog and store hold it.
PutState = Callable[[str, int, dict[bytes, bytes | None]], Awaitable[None]]
#: Makes sure that a partition of a table is this worker's: (table, partition); raises Retry where it is not.
Prove = Callable[[str, int], Awaitable[None]]


class FuseBlown(Exception):
    """Too much of the input is refused: the fault is more likely ours than the input's."""


class Fuse:
    """Counts, per stage, the share of records that a defect of ours would refuse, over a sliding window of records."""

    def __init__(self, stage: str, live: LiveSettings) -> None:
        self._stage = stage
        self._live = live
        self._window: deque[tuple[float, float]] = deque()
        self._records = 0.0
        self._refused = 0.0
        self._closed = asyncio.Event()
        self._closed.set()
        #: why it blew; empty while it holds
        self.reason = ""
        metrics.FUSE_BLOWN.labels(stage).set(0)

    @property
    def blown(self) -> bool:
        """Whether the stage is stopped."""
        return not self._closed.is_set()

    def report(self) -> dict[str, Any]:
        """How it stands, for people and as JSON: `blown`, `reason`, and of the last `records` how many were `refused` for
        what may be our fault; it blows above `refused_max`.
        """
        settings = self._live().fuse
        return {
            "blown": self.blown,
            "reason": self.reason,
            "records": round(self._records),
            "refused": round(self._refused),
            "refused_max": round(settings.invalid_ratio_max * settings.window_records),
        }

    def check(self, records: int, refused: dict[str, int]) -> None:
        """Count a batch, before any of its effects is carried out.

        Raises:
            FuseBlown: the share of refused records in the window is over the limit.
        """
        settings = self._live().fuse
        codes = settings.codes
        count = sum(n for code, n in refused.items() if code in codes.split(",")) if refused else 0
        window = self._window
        window.append((records, count))
        self._records += records
        self._refused += count
        while self._records > settings.window_records:
            # Of a batch that lies half outside the window, half of what it refused counts.
            old_records, old_refused = window.popleft()
            gone = min(old_records, self._records - settings.window_records)
            share = gone / old_records
            self._records -= gone
            self._refused -= old_refused * share
            if share < 1:
                window.appendleft((old_records - gone, old_refused * (1 - share)))
        if count and self._refused > settings.invalid_ratio_max * settings.window_records:
            self.reason = f"{self._refused:.0f} of the last {self._records:.0f} records refused ({settings.codes})"
            self._closed.clear()
            metrics.FUSE_BLOWN.labels(self._stage).set(1)
            log.error(
                "fuse_blown",
                action="the partition is paused; nothing is lost. Mend the cause, then restart or reset the fuse",
                stage=self._stage,
                refused=round(self._refused),
                records=round(self._records),
                codes=settings.codes,
            )
            raise FuseBlown(self.reason)

    def reset(self) -> None:
        """Close the fuse and forget the window: paused partitions go on."""
        self._window.clear()
        self._records = self._refused = 0.0
        self.reason = ""
        self._closed.set()
        metrics.FUSE_BLOWN.labels(self._stage).set(0)

    async def wait_closed(self) -> None:
        """Return when the fuse is (again) closed."""
        await self._closed.wait()


class Progress:
    """Where the processing of one piece of work stands, for health and back-pressure."""

    __slots__ = ("alive_s", "paused", "reason", "since_s", "tries")

    def __init__(self) -> None:
        self.paused = False  #: waiting for a dependency or the fuse: fetch nothing more
        self.reason = ""
        self.tries = 0
        #: monotonic time when the handler was given what it works on; None while it does not, also between two tries
        self.since_s: float | None = None
        self.alive_s = 0.0  #: monotonic time of its last sign of life


class Runner:
    """Runs one stage's handler."""

    def __init__(
        self,
        stage: str,
        handler: GroupHandler,
        *,
        publisher: Publishing,
        put_state: PutState,
        live: LiveSettings,
        clock: Clock,
        turn: Callable[[int], AbstractAsyncContextManager[Any]] = lambda _: nullcontext(),
        prove: Prove | None = None,
        clock_is_sound: Callable[[], bool] = lambda: True,
        patience_s: Callable[[], float] = lambda: PATIENCE_S,
    ) -> None:
        self.stage = stage
        #: whether the time may be acted on (clock.py)
        self.clock_is_sound = clock_is_sound
        #: a handler that gives no sign of life for longer is stuck: its own time limits are over by then
        self.patience_s = patience_s
        self._prove = prove
        #: entered, with the partition, from before the handler reads state until after its state is written
        self._turn = turn
        self.fuse = Fuse(stage, live)
        self._handler = handler
        self._publisher = publisher
        self._put_state = put_state
        self._live = live
        self._clock = clock
        self._failures_in_row = 0
        self._received = metrics.RECORDS_RECEIVED.labels(stage)
        self._seconds = metrics.BATCH_SECONDS.labels(stage)
        self._sent: dict[str, Any] = {}

    async def process(
        self, batches: Sequence[Batch], ack: Ack, progress: Progress | None = None, *, recheck: Recheck | None = None
    ) -> None:
        """Process `batches` and return when all their records are acknowledged.

        Raises:
            Fatal: the worker must end.
        """
        progress = progress or Progress()
        try:
            await self._process(batches, ack, progress, recheck, self._live().agents.attempts_max)
        finally:
            progress.paused = False
            progress.reason = ""
            progress.tries = 0

    async def _process(
        self, batches: Sequence[Batch], ack: Ack, progress: Progress, recheck: Recheck | None, attempts_max: int
    ) -> None:
        attempts = waits = 0
        while batches:
            try:
                with self._at_work(progress):
                    async with self._turn(batches[0].partition):
                        await self._once(batches, ack)
            except Retry as e:
                waits += 1
                metrics.BATCH_RETRIES.labels(self.stage, "retry").inc()
                await self._wait(progress, waits, e, paused=True)
                if recheck is not None:
                    batches = await self._recheck(recheck, batches, progress)
            except FuseBlown as e:
                progress.paused, progress.reason = True, str(e)
                await self.fuse.wait_closed()
                progress.paused, progress.reason = False, ""
            except Fatal:
                raise
            except Reject as e:
                await self._isolate(batches, ack, progress, recheck, e)
                return
            except Exception as e:
                attempts += 1
                metrics.BATCH_RETRIES.labels(self.stage, "defect").inc()
                if attempts >= attempts_max:
                    await self._isolate(batches, ack, progress, recheck, e)
                    return
                await self._wait(progress, attempts, e, paused=False)
            else:
                return

    @contextmanager
    def _at_work(self, progress: Progress) -> Iterator[None]:
        """While the handler works, it can say that it is alive."""
        clock_s = self._clock.monotonic_s
        progress.since_s = progress.alive_s = clock_s()

        def alive() -> None:
            progress.alive_s = clock_s()

        watcher.set(alive)
        try:
            yield
        finally:
            watcher.set(None)
            progress.since_s = None

    async def _once(self, batches: Sequence[Batch], ack: Ack) -> None:
        started_s = self._clock.monotonic_s()
        effects = await self._handler(batches)
        records = sum(len(batch.records) for batch in batches)
        self.fuse.check(records, effects.refused)
        await self._carry_out(batches[0].partition, effects)
        for batch in batches:
            ack(batch)
        self._failures_in_row = 0
        self._received.inc(records)
        for code, count in effects.refused.items():
            metrics.REFUSED.labels(self.stage, code).inc(count)
        self._seconds.observe(self._clock.monotonic_s() - started_s)
        self._after(effects)

    async def tick(self, tick: Tick, handler: TickHandler, progress: Progress) -> bool:
        """Let `handler` act on the time and carry out its effects; whether that was done.

        What fails is not tried again here: no state was written, so the next tick does it.

        Raises:
            Fatal: the worker must end.
        """
        try:
            with self._at_work(progress):
                async with self._turn(tick.partition):
                    effects = await handler(tick)
                    if effects.sends and self._prove is not None:
                        # A batch that a stale worker repeats says the same once more. What it thinks of the time is another
                        # matter, and must not be told.
                        for table in effects.puts:
                            await self._prove(table, tick.partition)
                    await self._carry_out(tick.partition, effects)
        except Fatal:
            raise
        except Exception as e:
            metrics.BATCH_RETRIES.labels(self.stage, "tick").inc()
            known = isinstance(e, Retry)
            log.warning("tick_failed", stage=self.stage, error=repr(e), exc_info=None if known else e)
            return False
        for code, count in effects.refused.items():
            metrics.REFUSED.labels(self.stage, code).inc(count)
        self._after(effects)
        return True

    def _after(self, effects: Effects) -> None:
        for callback in effects.after:
            try:
                callback()
            except Exception:
                log.exception("after_effect_failed", stage=self.stage)
        # The callbacks know the work that made these effects, and it knows them: what goes in a circle stays, with all
        # the states that it read, until the cycle collector has a look at everything, which it seldom does.
        effects.after.clear()

    def now_us(self) -> int:
        """The time by the runner's clock, µs since the epoch, UTC."""
        return self._clock.now_us()

    async def _carry_out(self, partition: int, effects: Effects) -> None:
        if effects.sends:
            for topic, count in (await self._publisher.publish(effects.sends)).items():
                counter = self._sent.get(topic)
                if counter is None:
                    counter = self._sent[topic] = metrics.RECORDS_SENT.labels(self.stage, topic)
                counter.inc(count)
        for table, items in effects.puts.items():
            await self._put_state(table, partition, items)

    async def _isolate(
        self, batches: Sequence[Batch], ack: Ack, progress: Progress, recheck: Recheck | None, error: Exception
    ) -> None:
        """Process smaller parts, in order, so that only the record that fails is set aside."""
        if len(batches) > 1:
            for batch in batches:
                await self._process([batch], ack, progress, recheck, 1)
            return
        batch = batches[0]
        if len(batch.records) > 1:
            log.warning(
                "batch_bisected",
                stage=self.stage,
                topic=batch.topic,
                partition=batch.partition,
                first_offset=batch.records[0].offset,
                records=len(batch.records),
                error=repr(error),
            )
            middle = len(batch.records) // 2
            for part in (batch.records[:middle], batch.records[middle:]):
                # A last try or a patient one: a record that fails by chance must not be taken for poison.
                patient = len(part) == 1 and self._failures_in_row < FAILURES_PATIENT_MAX
                attempts_max = self._live().agents.attempts_max if patient else 1
                await self._process([batch.part(part)], ack, progress, recheck, attempts_max)
            return
        await self._set_aside(batch, ack, progress, error)

    async def _set_aside(self, batch: Batch, ack: Ack, progress: Progress, error: Exception) -> None:
        """Send the one record of `batch` to `iot_errors` and acknowledge it."""
        patient = self._failures_in_row < FAILURES_PATIENT_MAX
        self._failures_in_row += 1
        record = batch.records[0]
        code = error.code if isinstance(error, Reject) else ReasonCode.HANDLER_FAILED
        log.error(
            "record_set_aside",
            stage=self.stage,
            code=str(code),
            topic=batch.topic,
            partition=batch.partition,
            offset=record.offset,
            error=repr(error),
            # A defect that hits everything need not be shown for each record.
            exc_info=error if code == ReasonCode.HANDLER_FAILED and patient else None,
        )
        line = error_line(
            self.stage,
            code,
            str(error) if isinstance(error, Reject) else f"{type(error).__name__}: {error}",
            topic=batch.topic,
            partition=batch.partition,
            now_us=self._clock.now_us(),
            record=record,
            device_id=record.key.decode("utf-8", "replace") if record.key else None,
        )
        effects = Effects([error_send(line)], refused={str(code): 1})
        waits = 0
        while True:
            try:
                self.fuse.check(1, effects.refused)
                await self._carry_out(batch.partition, effects)
                break
            except FuseBlown as e:
                progress.paused, progress.reason = True, str(e)
                await self.fuse.wait_closed()
                progress.paused, progress.reason = False, ""
            except Retry as e:
                waits += 1
                await self._wait(progress, waits, e, paused=True)
        metrics.REFUSED.labels(self.stage, str(code)).inc()
        self._received.inc()
        ack(batch)

    async def _recheck(self, recheck: Recheck, batches: Sequence[Batch], progress: Progress) -> Sequence[Batch]:
        waits = 0
        while True:
            try:
                return await recheck(batches)
            except Retry as e:
                waits += 1
                await self._wait(progress, waits, e, paused=True)

    async def _wait(self, progress: Progress, tries: int, error: Exception, *, paused: bool) -> None:
        settings = self._live().agents
        delay_s = min(settings.backoff_max_s, settings.backoff_s * 2 ** min(tries - 1, 16))
        delay_s *= random.uniform(0.5, 1.0)  # jitter, so that partitions do not try in step
        progress.paused = paused
        progress.reason = str(error) or repr(error)
        progress.tries = tries
        # The first of a row and then ever fewer: an outage of an hour is some ten lines and not a thousand.
        if tries & (tries - 1) == 0:
            log.warning(
                "batch_waits",
                stage=self.stage,
                kind="retry" if paused else "defect",
                tries=tries,
                delay_s=round(delay_s, 2),
                error=repr(error),
                exc_info=None if paused else error,
            )
        if paused:
            await back.or_after(self._clock.sleep(delay_s))
        else:
            await self._clock.sleep(delay_s)
