"""The `batch://` Faust transport: whole fetches of one partition go to a stage, instead of one event at a time.

Stock Faust makes some five tasks an event (12,000 events a second and core); this hands over what a fetch brought, at
2 to 5 µs a record, and commits only what is finished. It stays one Faust app: agents, tables, changelogs, assignor, web
and command line are Faust's; only topics that a stage reads take the way below.

    fetch loop (BatchConsumer._drain_messages)
      └─ Lane of each (stage, partition): pending records → Runner (handler, effects) → position acknowledged
           └─ commit (BatchConsumer._new_offset): the smallest position of the partition's lanes

A lane works in order, one batch at a time, so its position is one number and what lies below it is finished: a commit
cannot pass an unfinished record. Lanes of different partitions run concurrently. A rebalance waits a bounded time for
the batches under way, commits what they acknowledged and abandons the rest, which the next owner reads again.

This module is the one place that leans on private parts of Faust (0.15.3) and, through it, of aiokafka (0.14). Each is
marked "Hook" and held by tests/contract/test_faust_hooks.py, so that an upgrade fails loudly.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from time import monotonic, time
from typing import Any, Final, NamedTuple

import structlog
from faust.transport.consumer import ensure_TP
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from preservarium import kafka_clients, metrics, state
from preservarium.domain.errors import Fatal
from preservarium.runner import Progress, Runner
from preservarium.settings import LiveSettings
from preservarium.stage import Batch, Record, Tick, TickHandler

log = structlog.get_logger(__name__)

#: A fetch request waits this long at the broker for data. Short, because a partition whose buffer was just emptied joins
#: the next request only: with Faust's 1500 ms a quiet system delayed single messages by as much.
FETCH_WAIT_MS: Final = 100
#: A fetch that leaves out full or paused partitions returns after this time, so that they join again soon.
PARTIAL_FETCH_S: Final = 0.05
#: Otherwise a fetch returns after this time even without records; stopping waits for it.
FETCH_S: Final = 1.0
#: A rebalance or stop waits this long for the batches under way; then they are abandoned, un-acknowledged.
#: Well below the rebalance timeout (60 s), and longer than Kafka takes to acknowledge a batch.
HANDLER_STOP_S: Final = 8.0
#: Longest wait for the last commit before partitions are given away; without it their suffix is merely read again.
LAST_COMMIT_S: Final = 5.0
#: A stage that acts on the time does so this often, where it says nothing else.
TICK_S: Final = 5.0


#: What the consumer hands over is with its lane long before.
ON_THE_WAY_S: Final = 3.0


class Fetched(NamedTuple):
    """How far the last answer to a fetch went."""

    at_ms: int  #: when it came, by this machine's clock
    position: int  #: offset of the next record that the consumer will hand over
    end: int  #: the partition's high watermark
    start: int | None = None  #: where the assignment began; None: nothing was ever committed


def skipped(stage: str, topic: str, partition: int, expected: int, got: int) -> None:
    """Say that records are missing: Kafka's retention took them before the stage came to them."""
    metrics.RECORDS_SKIPPED.labels(stage).inc(got - expected)
    log.error(
        "offsets_skipped",
        action="records are lost to this stage; give the topic a longer retention, or the stage more workers",
        stage=stage,
        topic=topic,
        partition=partition,
        expected=expected,
        got=got,
    )


class Lane:
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
        "advanced_s",
        "backlog_end",
        "committed",
        "committed_s",
        "expected",
        "partition",
        "position",
        "progress",
    )

    def __init__(self, stage: "Stage", partition: int, live: LiveSettings) -> None:
        self._stage = stage
        self._live = live
        self._batches: deque[list[Record]] = deque()
        self._batches_records = 0
        self._wake = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._tick_at_s = monotonic() + stage.tick_s()
        self._ticked = False
        self.partition = partition
        #: offset of the first record that is not acknowledged; None before the first acknowledgement
        self.position: int | None = None
        #: end of the partition when somebody first asked for it (`Stages.past_backlog`)
        self.backlog_end: int | None = None
        #: offset that the next record should have, to drop what is delivered twice
        self.expected: int | None = None
        self.committed: int | None = None
        self.committed_s = self.advanced_s = monotonic()
        self.progress = Progress()

    @property
    def pending_records(self) -> int:
        """Records fetched and not yet handed to the handler."""
        return self._batches_records

    @property
    def full(self) -> bool:
        """Whether as many records wait as may."""
        return self._batches_records >= self._live().agents.pending_records_max

    @property
    def uncommitted(self) -> bool:
        """Whether records are acknowledged and not yet committed."""
        return self.position is not None and self.position != self.committed

    @property
    def busy(self) -> bool:
        """Whether records wait, are processed, or are not committed."""
        return bool(self._batches) or self.progress.since_s is not None or self.uncommitted

    def push(self, records: list[Record]) -> None:
        """Add what a fetch brought, in offset order; what is known already is dropped."""
        if self._closed:
            return
        expected = self.expected
        if expected is not None and records[0].offset != expected:
            if records[0].offset < expected:
                records = [record for record in records if record.offset >= expected]
                if not records:
                    return
            elif not self._stage.compacted:
                skipped(self._stage.name, self._stage.topic, self.partition, expected, records[0].offset)
        self.expected = records[-1].offset + 1
        self._batches.append(records)
        self._batches_records += len(records)
        self._wake.set()
        self.start()

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

    def _take(self) -> list[Record]:
        """The next records, fetches merged up to `agents.records_max`."""
        batches = self._batches
        records_max = self._live().agents.records_max
        records = batches.popleft()
        if len(records) > records_max:
            batches.appendleft(records[records_max:])
            records = records[:records_max]
        elif batches and len(records) + len(batches[0]) <= records_max:
            records = list(records)
            while batches and len(records) + len(batches[0]) <= records_max:
                records += batches.popleft()
        self._batches_records -= len(records)
        return records

    def _ack(self, batch: Batch) -> None:
        offset = batch.records[-1].offset + 1
        if self.position is not None and offset <= self.position:
            message = f"acknowledged {offset} after {self.position} in {batch.topic}-{batch.partition}"
            raise Fatal(message)
        self.position = offset
        self.advanced_s = monotonic()

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
        compacted: bool = False,
        on_tick: TickHandler | None = None,
        tick_s: Callable[[], float] = lambda: TICK_S,
        after: Sequence[str] = (),
    ) -> None:
        self.name = name
        #: topics (full names) of the stages whose output this one reads at last, the first one first
        self.after = after
        self.topic = topic  #: declared name, without prefix
        self.topic_full = topic_full or topic  #: name in the cluster
        self.compacted = compacted  #: offsets of the topic have gaps
        self.runner = runner
        self.on_tick = on_tick
        self.tick_s = tick_s
        self.lanes: dict[int, Lane] = {}
        self._live = live
        self._failed: asyncio.Future[None] | None = None
        self._error: BaseException | None = None
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
        #: partition of which nothing came here -> where the consumer is all the same, and since when, s
        self._moved: dict[TP, tuple[int, float]] = {}

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
        return reached or (found.position >= lane.backlog_end and self._handled_all(tp, [lane], found))

    def _handled_all(self, tp: TP, lanes: Sequence[Lane], found: Fetched) -> bool:
        """Whether every record that the consumer has handed over came to the lanes and was acknowledged."""
        came = [lane for lane in lanes if lane.expected is not None]
        if came:
            return all(lane.expected == lane.position == found.position for lane in came)
        if found.start in (None, found.position):
            return True
        # The first records are on their way here, or Kafka's retention took what would have been next.
        before, since_s = self._moved.get(tp, (None, 0.0))
        if before != found.position:
            self._moved[tp] = found.position, monotonic()
            return False
        return monotonic() - since_s >= ON_THE_WAY_S

    def handled_us(self, stage: Stage, fetched: Callable[[TP], Fetched | None], partition: int) -> int | None:
        """Up to when a stage and those before it have worked off a partition: what Kafka held then went through all.

        Topics are co-partitioned, so one worker has the same partition of all of them; one that is assigned to another
        worker all the same is left out.

        Returns:
            µs by this machine's clock; None: records are under way, or the present assignment was not fetched yet.
        """
        earliest_ms: int | None = None
        idle_s = inf
        for topic in (*stage.after, stage.topic_full):
            tp = TP(topic, partition)
            found = fetched(tp)
            if found is None:
                continue
            last = topic == stage.topic_full
            lanes = [lane for lane in self.lanes(tp) if not last or lane is stage.lanes.get(partition)]
            if found.position != found.end or not self._handled_all(tp, lanes, found):
                return None
            # What the stage before wrote last must have been there when this topic was asked for.
            if time() - found.at_ms / 1e3 >= idle_s:
                return None
            idle_s = min((monotonic() - lane.advanced_s for lane in lanes), default=idle_s)
            earliest_ms = found.at_ms if earliest_ms is None else min(earliest_ms, found.at_ms)
        return None if earliest_ms is None else earliest_ms * 1_000

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


#: What the base classes say of starting and stopping goes with the rest of Faust's log.
_FAUST_LOG: Final = logging.getLogger("faust.transport")


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread, with a short fetch wait and a way to give records back."""

    logger = _FAUST_LOG

    def _create_worker_consumer(self, transport: Any) -> Any:
        # Hook: Faust fixes fetch_max_wait_ms at 1500 and gives no setting for it; aiokafka reads the attribute at start.
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        return consumer

    async def on_start(self) -> None:
        """Start the consumer; records of topics that stages read stay as they were parsed."""
        await super().on_start()
        kafka_clients.keep_as_parsed(self._consumer, lambda topic: bool(self.consumer.app.stages.of(topic)))

    async def on_thread_stop(self) -> None:
        """Stop the queue of calls and then the consumer, which may take so long and no longer."""
        # Hook: Faust's own waits for aiokafka's consumer without limit, and the worker waits for this thread.
        await super(driver.AIOKafkaConsumerThread, self).on_thread_stop()
        if self._consumer is not None:
            await kafka_clients.stop(self._consumer)

    async def give_back(self, spans: Mapping[TP, tuple[int, int]]) -> None:
        """Read (first, next) spans again: a rebalance came between their fetch and their delivery.

        A fetch that began before a rebalance can end after it, with records of the new assignment; to drop them would
        lose them, because the position has moved past them. A position that has been set since is left alone.
        """
        consumer = self._ensure_consumer()
        # Hook: aiokafka's position without a wait; `position()` would wait for a partition that has none.
        subscription = consumer._subscription.subscription
        assignment = subscription.assignment if subscription is not None else None
        for tp, (first, after) in spans.items():
            partition = driver.TopicPartition(tp.topic, tp.partition)
            if assignment is None or partition not in assignment.tps:
                continue
            position = assignment.state_value(partition)
            if position.has_valid_position and position.position == after:
                consumer.seek(partition, first)


def _fetchable(lanes: Sequence[Lane]) -> bool:
    """Whether to fetch a partition: no stage is full, and not every stage is paused.

    Where several stages read one topic, a paused one still takes records until it is full, for the sake of the others.
    """
    return not lanes or (not any(lane.full for lane in lanes) and not all(lane.progress.paused for lane in lanes))


class BatchConsumer(driver.Consumer):
    """Faust's consumer; partitions that stages read are delivered in batches to their lanes."""

    logger = _FAUST_LOG

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._room = asyncio.Event()
        #: monotonic time of the fetch loop's last turn, for the watchdog
        self.fetched_s = monotonic()

    @property
    def _stages(self) -> Stages:
        stages: Stages = self.app.stages
        return stages

    def _new_consumer_thread(self) -> BatchConsumerThread:
        # Hook: where the driver makes its thread.
        return BatchConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # --- fetching -----------------------------------------------------------------------------------------------

    async def _drain_messages(self, fetcher: Any) -> None:
        # Hook: the fetch loop; Faust's Fetcher service runs it.
        def stopping() -> bool:
            return self._stopped.is_set() or fetcher._stopped.is_set()

        for stage in self._stages:
            stage.on_room = self._room.set
        try:
            while not stopping():
                self.fetched_s = monotonic()
                if not self.flow_active:
                    await self.wait(self.can_resume_flow)
                    continue
                generation = self.app.consumer_generation_id
                records, _ = await self._wait_next_records(FETCH_S)
                if stopping():
                    return
                if not records:
                    await asyncio.sleep(0)
                    continue
                if not self._current(generation):
                    await self._give_back(records)
                    continue
                await self._deliver(records, generation)
        except self.consumer_stopped_errors:
            if not self.app.should_stop:
                raise
        except asyncio.CancelledError:
            if not self.app.should_stop:
                raise
        except Exception:
            log.exception("fetch_loop_failed")
            raise

    def _current(self, generation: int) -> bool:
        return bool(self.flow_active) and self.app.consumer_generation_id == generation

    async def _wait_next_records(self, timeout: float) -> tuple[dict[Any, list[Any]], set[TP]]:
        # Hook: Faust's version sleeps a second when every partition is over its limit, and knows no limit a partition.
        active = self._get_active_partitions()
        lanes = self._stages
        ready = {tp for tp in active if _fetchable(lanes.lanes(tp))}
        if not ready:
            self._room.clear()
            try:
                async with asyncio.timeout(PARTIAL_FETCH_S):
                    await self._room.wait()
            except TimeoutError:
                pass
            return {}, ready
        if len(ready) < len(active):
            timeout = min(timeout, PARTIAL_FETCH_S)
        return await self._getmany(active_partitions=ready, timeout=timeout), ready

    async def _deliver(self, fetched: Mapping[Any, list[Any]], generation: int) -> None:
        stages = self._stages
        others: dict[TP, list[Any]] = {}
        for key, records in fetched.items():
            tp = ensure_TP(key)
            readers = stages.of(tp.topic)
            if not readers:
                others[tp] = self._restore(tp, records)
                continue
            for stage in readers:
                lane = stage.lane(tp.partition)
                if lane.expected is None:
                    lane.expected = self._read_offset[tp]  # the commit, since the seek to it
                lane.push(records)
        if others:
            await self._deliver_stock(others, generation)

    def _restore(self, tp: TP, records: list[Any]) -> list[Any]:
        """Write changelog records (recovery, standby) to their store in one batch; give what Faust must see itself.

        Faust's way takes 100 µs a record: 18 minutes for 10 million keys, and a core for a busy standby. The last
        record still goes it, so that Faust's own accounting sees how far recovery is; writing it again is harmless.
        """
        # Hook: Faust's recovery service.
        recovery = self.app.tables.recovery
        table = recovery.tp_to_table.get(tp)
        if table is None or len(records) < 2 or not hasattr(table.data, "_db_for_partition"):
            return records
        if tp in recovery.active_tps:
            offsets = recovery.active_offsets
        elif tp in recovery.standby_tps:
            offsets = recovery.standby_offsets
        else:
            return records
        seen = offsets.get(tp)
        if seen is not None:
            records = [record for record in records if record.offset > seen]
            if len(records) < 2:
                return records
        buffered = recovery.buffers[table]
        if buffered:
            # Older than these: written later, it would undo them.
            table.apply_changelog_batch(buffered)
            buffered.clear()
        state.apply(table.data, tp.partition, [(record.key, record.value) for record in records], records[-1].offset)
        offsets[tp] = records[-2].offset
        self._read_offset[tp] = records[-2].offset
        return records[-1:]

    async def _deliver_stock(self, fetched: Mapping[TP, list[Any]], generation: int) -> None:
        """Changelogs, the reply topic and ordinary agents, event by event, as Faust does."""
        read_offset = self._read_offset
        left = {tp: (records[0].offset, records[-1].offset + 1) for tp, records in fetched.items() if records}
        for tp, record in self.scheduler.iterate(fetched):
            if not self._current(generation):
                await self._thread.call_thread(self._thread.give_back, left)
                return
            message = self._to_message(tp, record)
            offset = message.offset
            read = read_offset[tp]
            if read is None or offset >= read:
                if read and offset - read > 1 and self.app.topics.acks_enabled_for(tp.topic):
                    await self._add_gap(tp, read + 1, offset)
                await self.wait_first(self.callback(message), self.suspend_flow.wait())
                read_offset[tp] = offset
            left[tp] = (offset + 1, left[tp][1])

    async def _give_back(self, fetched: Mapping[Any, list[Any]]) -> None:
        spans = {ensure_TP(tp): (records[0].offset, records[-1].offset + 1) for tp, records in fetched.items()}
        log.info("fetch_given_back", records=sum(len(records) for records in fetched.values()))
        await self._thread.call_thread(self._thread.give_back, spans)

    def _fetched(self, tp: TP) -> Fetched | None:
        """What the last fetch of a partition said; None: it is not this worker's."""
        # Hook: aiokafka's own notes, written by the consumer's thread: when (last), how far, and where it stands.
        consumer = self._thread._consumer if self._thread is not None else None
        subscription = consumer._subscription.subscription if consumer is not None else None
        assignment = subscription.assignment if subscription is not None else None
        partition = driver.TopicPartition(tp.topic, tp.partition)
        if assignment is None or partition not in assignment.tps:
            return None
        found = assignment.state_value(partition)
        at_ms = found.timestamp
        if at_ms is None or not found.has_valid_position:
            return Fetched(0, 0, -1)  # not fetched yet
        return Fetched(at_ms, found.position, found.highwater, self._read_offset[tp])

    # --- acknowledgement and commit -----------------------------------------------------------------------------

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        # Hook: the partitions that a commit looks at.
        yield from (tp for tp in super()._filter_tps_with_pending_acks(topics) if not self._stages.of(tp.topic))
        yield from (tp for tp in self._stages.assigned() if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        # Hook: the offset to commit. Faust's version can pass an unfinished event (its issue 606).
        if not self._stages.of(tp.topic):
            offset: int | None = super()._new_offset(tp)
            return offset
        return self._stages.position(tp)

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        # Hook: the commit itself.
        done: bool = await super()._commit(offsets)
        if done:
            now_s = monotonic()
            for tp, offset in offsets.items():
                for lane in self._stages.lanes(ensure_TP(tp)):
                    lane.committed = max(offset, lane.committed or 0)
                    lane.committed_s = now_s
        return done

    async def wait_empty(self) -> None:
        """Let the batches under way end, and commit what is acknowledged. Called before a rebalance and at stop."""
        # Hook: Faust waits here, without limit, for its own streams.
        await asyncio.gather(*(stage.close_lanes() for stage in self._stages))
        try:
            async with asyncio.timeout(LAST_COMMIT_S):
                # A commit under way may have begun before the last acknowledgement, and Faust lets no second one start.
                await self.maybe_wait_for_commit_to_finish()
                await super().wait_empty()
        except TimeoutError:
            log.warning("last_commit_timed_out", action="what is not committed is read again", waited_s=LAST_COMMIT_S)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Rebalance: `wait_empty` has been called within super(); now forget the lanes."""
        # Hook: called for every partition, because Faust's rebalances are eager.
        await super().on_partitions_revoked(revoked)
        metrics.REBALANCES.labels(self.app.conf.id).inc()
        for tp in revoked:
            tp = ensure_TP(tp)
            for stage in self._stages.of(tp.topic):
                await stage.close_lanes([tp.partition], wait_s=0)
                stage.drop([tp.partition])

    async def perform_seek(self) -> None:
        """Go back to the committed offsets: whatever lanes hold is read again."""
        # Hook: after recovery, before the flow resumes.
        for stage in self._stages:
            await stage.close_lanes(wait_s=0)
            stage.drop(list(stage.lanes))
        await super().perform_seek()
        self._stages.watch(self._fetched)
        for tp in self.assignment():
            for stage in self._stages.of(tp.topic):
                if stage.on_tick is not None:
                    stage.lane(tp.partition).start()
        log.info(
            "partitions_assigned",
            generation=self.app.consumer_generation_id,
            partitions=sum(bool(self._stages.of(tp.topic)) for tp in self.assignment()),
        )

    async def verify_all_partitions_active(self) -> None:
        """Nothing: Faust's detector knows only its own streams and would cry wolf; our watchdog looks at the lanes."""
        # Hook: called by Faust's livelock detector.


class Transport(driver.Transport):
    """Kafka by aiokafka, consumed in batches."""

    Consumer = BatchConsumer


# Faust finds a transport by the scheme of the broker URL in this registry.
TRANSPORTS.aliases["batch"] = "preservarium.transport:Transport"
