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
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, Final, NamedTuple

import structlog
from faust.transport.consumer import ensure_TP
from faust.transport.drivers import TRANSPORTS
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from preservarium import metrics
from preservarium.errors import Retry
from preservarium.streaming import kafka_clients
from preservarium.streaming.fencing import change_of
from preservarium.streaming.lanes import Fetched, Lane, Stage, Stages
from preservarium.streaming.local_store import Store

log = structlog.get_logger(__name__)

#: A fetch request waits this long at the broker for data. Short, because a partition whose buffer was just emptied joins
#: the next request only: with Faust's 1500 ms a quiet system delayed single messages by as much.
FETCH_WAIT_MS: Final = 100
#: A fetch that leaves out full or paused partitions returns after this time, so that they join again soon.
PARTIAL_FETCH_S: Final = 0.05
#: Otherwise a fetch returns after this time even without records; stopping waits for it.
FETCH_S: Final = 1.0
#: What comes before the consumer has gone back to the commits is given back, and asked for again after this time.
SEEKING_S: Final = 0.01
#: The consumer's positions are looked at this often besides: markers and aborted transactions move them and bring no records.
#: Each look costs some 30 µs; ticks wait for it before they believe that a partition is worked off.
PLACES_S: Final = 0.1
#: News of a topic (partitions, leaders) come within this time.
METADATA_AGE_S: Final = 30.0
#: What a full disk did not take of a changelog is read again after this time.
RESTORE_RETRY_S: Final = 1.0
#: What is known of the group's offsets is asked for within this time.
FOREIGN_S: Final = 5.0
#: Longest wait for the last commit before partitions are given away; without it their suffix is merely read again.
LAST_COMMIT_S: Final = 5.0

#: What the base classes say of starting and stopping goes with the rest of Faust's log.
_FAUST_LOG: Final = logging.getLogger("faust.transport")


class Fetch(NamedTuple):
    """What one turn of the fetch loop brought, all of it of one moment."""

    records: dict[TP, list[Any]]
    places: dict[TP, int]  #: where the consumer goes on: of these, and now and then of every partition


NOTHING: Final = Fetch({}, {})


class BatchConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread, with a short fetch wait and a way to give records back."""

    logger = _FAUST_LOG
    _places_at_s = 0.0

    def _create_worker_consumer(self, transport: Any) -> Any:
        # Hook: Faust fixes fetch_max_wait_ms at 1500 and gives no setting for it; aiokafka reads the attribute at start.
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        # Likewise: Faust reads committed transactions only where it writes some itself.
        consumer._isolation_level = kafka_clients.reading(self.app.live().kafka)["isolation_level"]
        return consumer

    async def on_start(self) -> None:
        """Start the consumer; records of topics that stages read stay as they were parsed."""
        await super().on_start()
        kafka_clients.keep_as_parsed(self._consumer, lambda topic: bool(self.consumer.app.stages.of(topic)))
        kafka_clients.note_when_asked(self._consumer)
        kafka_clients.mark_commits(self._consumer)

    async def foreign(self, tps: Sequence[TP]) -> dict[TP, tuple[int, int]]:
        """Partitions of which the group's offset was set by another tool: (offset, the partition's end); without those at the end."""
        found: dict[TP, tuple[int, int]] = await self.call_thread(self._foreign, tps)
        return found

    async def _foreign(self, tps: Sequence[TP]) -> dict[TP, tuple[int, int]]:
        consumer = self._ensure_consumer()
        committed = await kafka_clients.commits(consumer, [driver.TopicPartition(tp.topic, tp.partition) for tp in tps])
        foreign = {tp: at.offset for tp, at in committed.items() if at.metadata != kafka_clients.OWN}
        if not foreign:
            return {}
        ends = await consumer.end_offsets(list(foreign))
        # So that it is told once.
        await consumer.commit(foreign)
        return {ensure_TP(tp): (offset, ends[tp]) for tp, offset in foreign.items() if ends[tp] > offset}

    def stay_active(self) -> None:
        """Say that the worker goes on, though it asks for no records now."""
        if self._consumer is not None:
            kafka_clients.stay_active(self._consumer)

    def highwater(self, tp: TP) -> int | None:
        """Where a partition ends, of what may be read, as its last fetch said; None: it did not, or it is not ours."""
        # Hook: Faust's version takes the end of transactions under way, and fails for a partition that was just revoked.
        place = kafka_clients.place_of(self._ensure_consumer(), driver.TopicPartition(tp.topic, tp.partition))
        return None if place is None else place.end

    async def fetch(self, active: set[TP], timeout: float) -> Fetch:
        """Records of partitions, and where the consumer stands then; both empty after `timeout` seconds at the latest."""
        fetched: Fetch = await self.call_thread(self._fetch, active, timeout)
        return fetched

    async def _fetch(self, active: set[TP], timeout: float) -> Fetch:
        consumer = self._ensure_consumer()
        found = await self._fetch_records(consumer, active, timeout=timeout, max_records=consumer._max_poll_records)
        # No other call of this thread comes between: a position is that of the records.
        records = {ensure_TP(tp): batch for tp, batch in found.items()}
        stages = self.consumer.app.stages
        wanted = {tp for tp in records if stages.of(tp.topic)}
        if (now_s := monotonic()) >= self._places_at_s:
            self._places_at_s = now_s + PLACES_S
            wanted |= {tp for tp in self.assignment() if stages.of(tp.topic)}
        places: dict[TP, int] = {}
        for tp in wanted:
            place = kafka_clients.place_of(consumer, driver.TopicPartition(tp.topic, tp.partition))
            if place is not None and place.position is not None:
                places[tp] = place.position
        return Fetch(records, places)

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
        #: up to where everything was handed to the lanes, of the present assignment
        self._delivered: dict[TP, int] = {}
        #: partition with open transactions -> (what it held at a time, that time), and the time before it that is passed
        self._held: dict[TP, tuple[int, float, float | None]] = {}
        #: whether the consumer has gone back to the commits since lanes were dropped: until then, none is begun
        self._sought = False
        self._seeks = 0

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
                    self._thread.stay_active()
                    await self.wait(self.can_resume_flow, timeout=FETCH_S)
                    continue
                turn = self._turn
                fetch = await self._wait_fetch()
                if stopping():
                    return
                if self._current(turn):
                    await self._deliver(fetch, turn)
                elif fetch.records:
                    await self._give_back(fetch.records)
                if not fetch.records:
                    await asyncio.sleep(0)
        except self.consumer_stopped_errors:
            if not self.app.should_stop:
                raise
        except asyncio.CancelledError:
            if not self.app.should_stop:
                raise
        except Exception:
            log.exception("fetch_loop_failed")
            raise

    @property
    def _turn(self) -> tuple[int, int]:
        """Of the assignment, and of the positions in it."""
        return self.app.consumer_generation_id, self._seeks

    def _current(self, turn: tuple[int, int]) -> bool:
        return bool(self.flow_active) and self._turn == turn

    async def _wait_fetch(self) -> Fetch:
        # Instead of Faust's _wait_next_records, which sleeps a second when every partition is over its limit, and knows no
        # limit a partition.
        active = self._get_active_partitions()
        lanes = self._stages
        ready = {tp for tp in active if _fetchable(lanes.lanes(tp))}
        if not ready:
            self._thread.stay_active()
            self._room.clear()
            try:
                async with asyncio.timeout(PARTIAL_FETCH_S):
                    await self._room.wait()
            except TimeoutError:
                pass
            return NOTHING
        return await self._thread.fetch(ready, FETCH_S if len(ready) == len(active) else PARTIAL_FETCH_S)

    async def _deliver(self, fetch: Fetch, turn: tuple[int, int]) -> None:
        stages, delivered = self._stages, self._delivered
        others: dict[TP, list[Any]] = {}
        later: dict[TP, list[Any]] = {}
        early: dict[TP, list[Any]] = {}
        for tp, records in fetch.records.items():
            readers = stages.of(tp.topic)
            if not readers:
                try:
                    others[tp] = self._restore(tp, records)
                except Retry as e:
                    later[tp] = records
                    log.warning("restoring_waits", topic=tp.topic, partition=tp.partition, error=str(e))
                continue
            if not self._sought:
                early[tp] = records
                continue
            after = fetch.places.get(tp)
            for stage in readers:
                self._lane(stage, tp).push(records, after)
            delivered[tp] = records[-1].offset + 1 if after is None else after
        for tp, position in fetch.places.items() if self._sought else ():
            if delivered.get(tp) != position:
                delivered[tp] = position
                # At the beginning of a topic of which nothing was ever committed there is nothing to say.
                if position != (self._read_offset[tp] or 0):
                    for stage in stages.of(tp.topic):
                        self._lane(stage, tp).passed(position)
        if early:
            await self._give_back(early)
        if others:
            await self._deliver_stock(others, turn)
        if later:
            await self._give_back(later)
            await asyncio.sleep(RESTORE_RETRY_S)
        elif early:
            await asyncio.sleep(SEEKING_S)

    def _lane(self, stage: Stage, tp: TP) -> Lane:
        lane = stage.lane(tp.partition)
        if lane.expected is None:
            lane.expected = self._read_offset[tp]  # the commit, since the seek to it
        return lane

    def _restore(self, tp: TP, records: list[Any]) -> list[Any]:
        """Write changelog records (recovery, standby) to their store in one batch; give what Faust must see itself.

        Faust's way takes 100 µs a record: 18 minutes for 10 million keys, and a core for a busy standby. The last
        record still goes it, so that Faust's own accounting sees how far recovery is; the store knows it already.
        """
        # Hook: Faust's recovery service.
        recovery = self.app.tables.recovery
        table = recovery.tp_to_table.get(tp)
        if table is None or not records or not isinstance(table.data, Store):
            return records
        if tp in recovery.active_tps:
            offsets = recovery.active_offsets
        elif tp in recovery.standby_tps:
            offsets = recovery.standby_offsets
        else:
            return []
        buffered = recovery.buffers[table]
        if buffered:
            # Older than these: written later, it would undo them.
            table.apply_changelog_batch(buffered)
            buffered.clear()
        table.data.take(tp.partition, map(change_of, records))
        if len(records) > 1:
            offsets[tp] = max(offsets.get(tp) or -1, records[-2].offset)
            self._read_offset[tp] = records[-2].offset
        return records[-1:]

    async def _deliver_stock(self, fetched: Mapping[TP, list[Any]], turn: tuple[int, int]) -> None:
        """Changelogs, the reply topic and ordinary agents, event by event, as Faust does."""
        read_offset = self._read_offset
        left = {tp: (records[0].offset, records[-1].offset + 1) for tp, records in fetched.items() if records}
        for tp, record in self.scheduler.iterate(fetched):
            if not self._current(turn):
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

    async def _give_back(self, fetched: Mapping[TP, list[Any]]) -> None:
        spans = {tp: (records[0].offset, records[-1].offset + 1) for tp, records in fetched.items()}
        log.info("fetch_given_back", records=sum(len(records) for records in fetched.values()))
        await self._thread.call_thread(self._thread.give_back, spans)

    def _fetched(self, tp: TP) -> Fetched | None:
        """How far a partition was fetched; None: it is not this worker's."""
        consumer = self._thread._consumer if self._thread is not None else None
        place = (
            kafka_clients.place_of(consumer, driver.TopicPartition(tp.topic, tp.partition))
            if consumer is not None
            else None
        )
        if place is None:
            return None
        delivered = self._delivered.get(tp)
        if place.end is None or place.held is None or delivered is None:
            return Fetched(None, 0, -1)  # not fetched yet
        return Fetched(self._passed_s(tp, place, delivered), delivered, place.end)

    def _passed_s(self, tp: TP, place: kafka_clients.Place, delivered: int) -> float | None:
        """When Kafka held nothing beyond where we are.

        Behind an open transaction lie records that may be read only when it ends, also those of others. Where one is always
        open, that time is found by waiting until what was held at a time is passed.
        """
        assert place.held is not None
        if place.asked_s is None or place.held == place.end:
            self._held.pop(tp, None)
            return place.asked_s
        held, at_s, passed_s = self._held.get(tp, (place.held, place.asked_s, None))
        if delivered >= held:
            held, at_s, passed_s = place.held, place.asked_s, at_s
        self._held[tp] = held, at_s, passed_s
        return passed_s

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
            for tp, offset in offsets.items():
                for lane in self._stages.lanes(ensure_TP(tp)):
                    lane.note_commit(max(offset, lane.committed or 0))
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
        for table in self.app.state_tables.values():
            for tp in revoked:
                if tp.topic == table.changelog:
                    table.revoked(tp.partition)
        for tp in revoked:
            tp = ensure_TP(tp)
            self._delivered.pop(tp, None)
            self._held.pop(tp, None)
            for stage in self._stages.of(tp.topic):
                await stage.close_lanes([tp.partition], wait_s=0)
                stage.drop([tp.partition])

    async def perform_seek(self) -> None:
        """Go back to the committed offsets: whatever lanes hold is read again."""
        # Hook: after recovery. The flow has resumed for it, and closing lanes takes its time: records that came to a new lane
        # meanwhile would be the first that it knows, and what the old one held below them would be passed over. Where a
        # rebalance cancels this, the next recovery does it again, and lanes wait for that.
        self._sought = False
        for stage in self._stages:
            await stage.close_lanes(wait_s=0)
            stage.drop(list(stage.lanes))
        await super().perform_seek()
        self._delivered.clear()
        self._held.clear()
        self._seeks += 1
        self._sought = True
        self._stages.watch(self._fetched)
        for tp in self.assignment():
            for stage in self._stages.of(tp.topic):
                if stage.on_tick is not None:
                    stage.lane(tp.partition).start()
        await self._look_for_foreign()
        log.info(
            "partitions_assigned",
            generation=self.app.consumer_generation_id,
            partitions=sum(bool(self._stages.of(tp.topic)) for tp in self.assignment()),
        )

    async def _look_for_foreign(self) -> None:
        """Tell of offsets that another tool has set, and that nothing is derived again by them. Best effort."""
        tps = [ensure_TP(tp) for tp in self.assignment() if self._stages.of(tp.topic)]
        if not tps:
            return
        try:
            async with asyncio.timeout(FOREIGN_S):
                foreign = await self._thread.foreign(tps)
        except (driver.KafkaError, driver.ConsumerStoppedError, OSError, TimeoutError) as e:
            log.info("offsets_not_looked_at", error=repr(e))
            return
        if foreign:
            metrics.OFFSETS_FOREIGN.labels(self.app.conf.id).inc(len(foreign))
            log.warning(
                "offsets_set_from_outside",
                group=self.app.conf.id,
                offsets={f"{tp.topic}-{tp.partition}": offset for tp, (offset, _) in sorted(foreign.items())},
                records=sum(end - offset for offset, end in foreign.values()),
                action="nothing is derived again: what a stage has applied it skips; "
                "`preservarium replay reset --stage normalize` derives anew, under a new generation",
                hint="by a command, by Kafka's tools, or by a release before this one",
            )

    async def verify_all_partitions_active(self) -> None:
        """Nothing: Faust's detector knows only its own streams and would cry wolf; our watchdog looks at the lanes."""
        # Hook: called by Faust's livelock detector.


class Transport(driver.Transport):
    """Kafka by aiokafka, consumed in batches."""

    Consumer = BatchConsumer


# Faust finds a transport by the scheme of the broker URL in this registry.
TRANSPORTS.aliases["batch"] = "preservarium.streaming.transport:Transport"
