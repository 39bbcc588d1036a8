"""Lanes of the shared feed: the records of one partition wait here for one stage and are worked on in order.

`Stages` knows who reads a topic, up to where a partition is finished (which is what may be committed), and up to when it
is worked off (which is what a tick may rely on).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import inf
from time import monotonic
from typing import Any, Final, NamedTuple

import structlog
from faust.types import TP

from preservarium import metrics
from preservarium.settings import LiveSettings
from preservarium.streaming.positions import OnGap, Standing
from preservarium.streaming.runner import Progress, Runner
from preservarium.streaming.stage import Batch, Record, Tick, TickHandler

log = structlog.get_logger(__name__)

#: A rebalance or stop waits this long for the batches under way; then they are abandoned, un-acknowledged.
#: Well below the rebalance timeout (60 s), and longer than Kafka takes to acknowledge a batch.
HANDLER_STOP_S: Final = 8.0
#: A stage that acts on the time does so this often, where it says nothing else.
TICK_S: Final = 5.0


class Fetched(NamedTuple):
    """How far a partition was fetched."""

    asked_s: float | None  #: monotonic time; what Kafka held then lies below `end`. None: that is not known yet
    position: int  #: everything below it was handed to the lanes, or does not exist
    end: int  #: of what may be read (the last stable offset); -1: not known yet


def skipped(stage: str, topic: str, partition: int, expected: int, got: int, start: int) -> None:
    """Say that records are missing: Kafka's retention took them before the stage came to them.

    Args:
        stage: its name.
        topic: its declared name.
        partition: of it.
        expected: the first offset that was not read yet.
        got: the one that came instead.
        start: where the partition's log begins now, behind `expected`.
    """
    lost = min(got, start) - expected
    metrics.RECORDS_SKIPPED.labels(stage).inc(lost)
    log.error(
        "offsets_skipped",
        action="records are lost to this stage; give the topic a longer retention, or the stage more workers",
        stage=stage,
        topic=topic,
        partition=partition,
        expected=expected,
        got=got,
        log_start=start,
        lost=lost,
    )


class Lane(Standing):
    """One partition of one stage: records wait here and are processed in order."""

    __slots__ = (
        "_batches",
        "_batches_records",
        "_closed",
        "_live",
        "_stage",
        "_task",
        "_tick_at_s",
        "_ticked",
        "_wake",
        "backlog_end",
        "progress",
    )

    def __init__(self, stage: "Stage", partition: int, live: LiveSettings) -> None:
        super().__init__(partition)
        self._stage = stage
        self._live = live
        self._batches: deque[Sequence[Record]] = deque()
        self._batches_records = 0
        self._wake = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._tick_at_s = monotonic() + stage.tick_s()
        self._ticked = False
        #: end of the partition when somebody first asked for it (`Stages.past_backlog`)
        self.backlog_end: int | None = None
        self.progress = Progress()

    @property
    def pending_records(self) -> int:
        """Records fetched and not yet handed to the handler."""
        return self._batches_records

    @property
    def full(self) -> bool:
        """Whether as many records wait as may."""
        return self._batches_records >= self._live().agents.pending_records_max

    def push(self, records: Sequence[Record], after: int | None = None) -> None:
        """Add what a fetch brought, in offset order; what is known already is dropped.

        Args:
            records: of the fetch.
            after: where the consumer goes on.
        """
        if self._closed:
            return
        new = self.take_on(records, after, self._stage.on_gap)
        if not new:
            return
        self._batches.append(new)
        self._batches_records += len(new)
        self._wake.set()
        self.start()

    def passed(self, offset: int) -> None:
        """The consumer has come to `offset` without records."""
        if not self._closed:
            self.pass_to(offset, self._stage.on_gap)

    def start(self) -> None:
        """Begin to work and to tick, before the first records come."""
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._run(), name=f"{self._stage.name}-{self.partition}")

    async def close(self, wait_s: float) -> bool:
        """Take nothing more on, wait up to `wait_s` for the batch under way, then abandon it; whether it did."""
        self._closed = True
        self._batches.clear()
        self._batches_records = 0
        self._wake.set()
        task = self._task
        if task is None or task.done():
            return False
        # A batch that waits for a dependency or the fuse would not be done in time: it is abandoned at once.
        if not self.progress.paused:
            await asyncio.wait([task], timeout=wait_s)
        if task.done():
            return False
        if not self.progress.paused:
            log.warning("batch_abandoned", stage=self._stage.name, partition=self.partition, waited_s=wait_s)
        task.cancel()
        await asyncio.wait([task], timeout=HANDLER_STOP_S)
        return True

    def _take(self) -> Sequence[Record]:
        """The next records, fetches merged up to `agents.records_max`."""
        batches = self._batches
        records_max = self._live().agents.records_max
        records = batches.popleft()
        if len(records) > records_max:
            batches.appendleft(records[records_max:])
            records = records[:records_max]
        elif batches and len(records) + len(batches[0]) <= records_max:
            merged = list(records)
            while batches and len(merged) + len(batches[0]) <= records_max:
                merged += batches.popleft()
            records = merged
        self._batches_records -= len(records)
        return records

    def _ack(self, batch: Batch) -> None:
        self.acknowledge(batch.records, batch.topic)

    async def _run(self) -> None:
        stage = self._stage
        process, topic, partition = stage.runner.process, stage.topic, self.partition
        try:
            while not self._closed:
                if stage.on_tick is not None and monotonic() >= self._tick_at_s:
                    await self._tick(stage.on_tick)
                    continue
                if not self._batches:
                    self._wake.clear()
                    await self._wait()
                    continue
                await process([Batch(topic, partition, self._take())], self._ack, self.progress)
                stage.on_room()
        except asyncio.CancelledError:
            raise
        except BaseException as e:
            stage.fail(e)

    async def _wait(self) -> None:
        """For records, or until the next tick."""
        if self._stage.on_tick is None:
            await self._wake.wait()
            return
        try:
            async with asyncio.timeout(max(0.0, self._tick_at_s - monotonic())):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _tick(self, handler: TickHandler) -> None:
        stage = self._stage
        if not stage.runner.clock_is_sound():
            self._tick_at_s = monotonic() + stage.tick_s()
            return
        now_us = stage.runner.now_us()
        handled_us = stage.handled_us(self.partition)
        behind = bool(self._batches) or handled_us is None
        tick = Tick(self.partition, now_us, not self._ticked, behind, None if behind else min(now_us, handled_us or 0))
        self._ticked = await stage.runner.tick(tick, handler, self.progress) or self._ticked
        self._tick_at_s = monotonic() + stage.tick_s()


class Stage:
    """A stage on the shared feed: its handler's runner and its lanes."""

    def __init__(
        self,
        name: str,
        topic: str,
        runner: Runner,
        live: LiveSettings,
        *,
        topic_full: str = "",
        on_tick: TickHandler | None = None,
        tick_s: Callable[[], float] = lambda: TICK_S,
        after: Sequence[str] = (),
    ) -> None:
        self.name = name
        #: topics (full names) of the stages whose output this one reads at last, the first one first
        self.after = after
        self.topic = topic  #: declared name, without prefix
        self.topic_full = topic_full or topic  #: name in the cluster
        self.runner = runner
        self.on_tick = on_tick
        self.tick_s = tick_s
        self.lanes: dict[int, Lane] = {}
        self._live = live
        self._failed: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
        #: told of offsets that came without records; who knows where the log begins says whether any are lost
        self.on_gap: OnGap = lambda partition, expected, got: None
        self.on_room: Callable[[], None] = lambda: None
        self.on_abandon: Callable[[], None] = lambda: None
        #: partition -> everything that Kafka held then is handled, µs; None: something waits (see `Stages.handled_us`).
        #: Of a stage that names none before it, only what was fetched counts.
        self.handled_us: Callable[[int], int | None] = lambda _: self.runner.now_us()

    def lane(self, partition: int) -> Lane:
        """The lane of a partition, made on first use."""
        lane = self.lanes.get(partition)
        if lane is None:
            lane = self.lanes[partition] = Lane(self, partition, self._live)
        return lane

    def fail(self, error: BaseException) -> None:
        """A lane met an error that ends the worker."""
        self._error = self._error or error
        if self._failed is not None and not self._failed.done():
            self._failed.set_result(None)

    async def run(self, stream: Any) -> None:
        """The body of the Faust agent: subscribe, then wait until a lane fails.

        Raises:
            Fatal: and whatever else ended a lane; Faust's CrashingSupervisor ends the worker with it.
        """
        # Iterating over a topic is what registers it with Faust's conductor, which subscribes to it.
        stream.channel.__aiter__()
        self._failed = asyncio.get_running_loop().create_future()
        if self._error is None:
            await self._failed
        assert self._error is not None
        raise self._error

    async def close_lanes(self, partitions: Iterable[int] | None = None, *, wait_s: float = HANDLER_STOP_S) -> None:
        """Close lanes; they keep their positions until `drop`."""
        chosen = (
            list(self.lanes.values()) if partitions is None else [self.lanes[p] for p in partitions if p in self.lanes]
        )
        if chosen and any(await asyncio.gather(*(lane.close(wait_s) for lane in chosen))):
            self.on_abandon()

    def drop(self, partitions: Iterable[int]) -> None:
        """Forget lanes; what they had not committed is read again by whoever is assigned next."""
        for partition in partitions:
            self.lanes.pop(partition, None)


class Stages:
    """The stages of an app by Kafka topic."""

    def __init__(self) -> None:
        self._by_topic: dict[str, list[Stage]] = {}
        self._fetched: Callable[[TP], Fetched | None] = lambda _: None

    def add(self, topic: str, stage: Stage) -> None:
        """Register a stage under the full name of its topic."""
        self._by_topic.setdefault(topic, []).append(stage)

    def watch(self, fetched: Callable[[TP], Fetched | None]) -> None:
        """Let ticks know how far the consumer is; None: the partition is not assigned to this worker."""
        self._fetched = fetched
        for stage in self:
            if stage.after:
                stage.handled_us = partial(self.handled_us, stage, fetched)

    def past_backlog(self, name: str, partition: int) -> bool:
        """Whether a stage has handled what its partition held when the worker had just taken it over."""
        stage = next(stage for stage in self if stage.name == name)
        tp = TP(stage.topic_full, partition)
        found = self._fetched(tp)
        if found is None:  # another worker's
            return True
        if found.end < 0:
            return False
        lane = stage.lane(partition)
        if lane.backlog_end is None:
            lane.backlog_end = found.end
        reached = lane.position is not None and lane.position >= lane.backlog_end
        return reached or (found.position >= lane.backlog_end and _handled_all([lane]))

    def handled_us(self, stage: Stage, fetched: Callable[[TP], Fetched | None], partition: int) -> int | None:
        """Up to when a stage and those before it have worked off a partition: what Kafka held then went through all.

        Topics are co-partitioned, so one worker has the same partition of all of them; one that is assigned to another
        worker all the same is left out.

        Returns:
            µs by this machine's clock; None: records are under way, or the present assignment was not fetched yet.
        """
        now_s = monotonic()
        asked_s = idle_s = inf
        for topic in (*stage.after, stage.topic_full):
            tp = TP(topic, partition)
            found = fetched(tp)
            if found is None:
                continue
            last = topic == stage.topic_full
            lanes = [lane for lane in self.lanes(tp) if not last or lane is stage.lanes.get(partition)]
            if found.asked_s is None or found.position < found.end or not _handled_all(lanes):
                return None
            # What the stage before wrote last must have been there when this topic was asked for.
            if now_s - found.asked_s >= idle_s:
                return None
            idle_s = min((now_s - lane.advanced_s for lane in lanes), default=idle_s)
            asked_s = min(asked_s, found.asked_s)
        return None if asked_s == inf else stage.runner.now_us() - round((now_s - asked_s) * 1e6)

    def __len__(self) -> int:
        return sum(len(stages) for stages in self._by_topic.values())

    def __iter__(self) -> Iterator[Stage]:
        for stages in self._by_topic.values():
            yield from stages

    def of(self, topic: str) -> Sequence[Stage]:
        """The stages that read a topic (full name)."""
        return self._by_topic.get(topic, ())

    def lanes(self, tp: TP) -> list[Lane]:
        """The lanes of a partition that exist."""
        return [lane for stage in self.of(tp.topic) if (lane := stage.lanes.get(tp.partition)) is not None]

    def position(self, tp: TP) -> int | None:
        """The offset up to which every stage has finished the partition."""
        positions: list[int] = []
        for stage in self.of(tp.topic):
            lane = stage.lanes.get(tp.partition)
            if lane is None or lane.position is None:
                return None
            positions.append(lane.position)
        return min(positions) if positions else None

    def assigned(self) -> list[TP]:
        """Partitions that have a lane."""
        return sorted(
            {TP(topic, partition) for topic, stages in self._by_topic.items() for s in stages for partition in s.lanes}
        )


def _handled_all(lanes: Iterable[Lane]) -> bool:
    """Whether everything that came to these lanes is acknowledged."""
    return all(lane.expected is None or lane.expected == lane.position for lane in lanes)
