"""The second feed: a stage with a consumer group of its own, through aiokafka's public API.

For stages that write to a database or a mail server: when that is down, only this stage stops; its lag is that of its
own group, and it can be replayed by resetting one group. In Faust's eyes it is an agent on a channel that nothing is
sent to: `faust agents` lists it, the worker starts, supervises and stops it.

    poll loop → lanes (a partition each) → flights (of several partitions, planned ones of one; to records_max or linger_s)
             ↑ pause/resume                 └─ Runner (handler, effects) → lanes' positions → commit

A partition is in at most one flight, so its order is kept, and its position is one number. The poll loop never waits for
a flight: a stage that retries for an hour keeps its group membership.

A planned feed is for stores that recognise a repeated write but have no transaction for offsets. Before the handler sees
a batch, its bounds are committed to Kafka as the metadata of the offset that it starts from; whoever comes to own the
partition hands over exactly the same batch first. The group fences: a worker that is no member any more cannot plan.

It is one file because it is one loop: consumer, lanes and flights change together at every rebalance.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, Final, Protocol, runtime_checkable

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from preservarium import metrics
from preservarium.breaker import back
from preservarium.errors import Fatal, Retry, reason
from preservarium.settings import LiveSettings
from preservarium.streaming import kafka_clients
from preservarium.streaming.group_lanes import GroupLane
from preservarium.streaming.positions import OnGap
from preservarium.streaming.runner import Progress, Runner
from preservarium.streaming.stage import Batch

log = structlog.get_logger(__name__)

#: Gives, for partitions just assigned (or about to be tried again), the offset to start from; a partition that it leaves
#: out starts where Kafka's commit stands. The answer wins over Kafka's, because the store's transaction made it.
OnAssigned = Callable[[list[int]], Awaitable[Mapping[int, int]]]


class Memory(Protocol):
    """What a planned stage must still know after a crash, as of the group's offset: a short text beside it."""

    def recall(self, partition: int, text: str) -> None:
        """Take a partition over; `text` is what `remember` gave for its offset, empty where there is none."""
        ...

    def remember(self, partition: int) -> str:
        """What is to be known of everything acknowledged so far; at most 3,900 bytes (brokers take 4 KiB)."""
        ...


@runtime_checkable
class Rereading(Memory, Protocol):
    """A memory that takes records a second time for what they are, when somebody has moved the group's offset."""

    async def reread(self, below: Mapping[int, int]) -> None:
        """After `recall`: nobody knows who set these partitions' offsets, so records before the offsets given may be written already.

        Raises:
            Retry: the store cannot be asked now.
        """
        ...


#: A poll returns after this time at the latest; flights start, commits and pauses happen at least this often.
POLL_MS: Final = 50
#: A fetch request waits this long at the broker (see transport.FETCH_WAIT_MS).
FETCH_WAIT_MS: Final = 100
#: A feed that has had nothing to do for so long asks less often: ten fetches and twenty polls a second, for nothing, are
#: 0.5 % of a core for each stage.
IDLE_AFTER_S: Final = 3.0
#: Then a fetch waits this long, and the poll with it. It covers every partition, so that the first record of any still comes
#: at once. Half of a request's time-out, a third of the watchdog's. What is asked after a rebalance does not wait for it: see
#: `assign`.
IDLE_POLL_MS: Final = 30_000
#: Heartbeats within a session's time-out. Three is what Kafka's documentation asks for, and each is what an idle feed costs.
HEARTBEATS: Final = 3
#: aiokafka looks whether there is something to fetch this often besides being told; 0.2 s is its own value.
FETCHER_TURN_S: Final = 0.2
#: Flights of records that may wait in memory besides those under way, in equal shares of the partitions: one to start at
#: once when a flight ends, and one more, because shares are never filled evenly.
WAITING_FLIGHTS: Final = 2
#: A rebalance or stop waits this long for flights; a database transaction that takes longer is abandoned.
FLIGHT_STOP_S: Final = 8.0
#: And as long for those that were cancelled: where a connection does not even let itself be closed, nobody waits for it.
FLIGHT_CANCEL_S: Final = 2.0
#: Longest wait for a commit: polling and rebalances wait for it, and without it a suffix is merely read again.
COMMIT_TIMEOUT_S: Final = 5.0
#: Leaving a group takes this long at most.
LEAVE_TIMEOUT_S: Final = 5.0
#: A consumer that met an error is made anew after this time, which doubles with each further try, with jitter.
RECONNECT_S: Final = 1.0
RECONNECT_MAX_S: Final = 10.0
#: A consumer that worked for so long is healed: the next error is a new one.
HEALED_S: Final = 60.0
#: A consumer finds its brokers within this time, or is made anew.
CONNECT_S: Final = 15.0
#: A poll that takes longer waits for an assignment that does not come: a rebalance takes a minute at most.
POLL_MAX_S: Final = 75.0
#: Metadata of a committed offset that is the start of a planned batch; the batch's end follows.
PLAN: Final = "planned:"
#: Before a stage's memory, in the metadata of a committed offset.
MEMORY: Final = "|"
#: Topics that do not exist yet, and partitions added to those that do, are looked for this often.
METADATA_AGE_MS: Final = 30_000
#: And by a feed that has nothing to do: Kafka's own value. What it asks waits behind its long fetch, and a rebalance would
#: wait with it; so it is told of added partitions (`topic_changed`).
IDLE_METADATA_AGE_MS: Final = 300_000


class MembershipLostError(Exception):
    """The group has this member no more, and the consumer does not know it."""


class GroupFeed:
    """Runs a stage in a consumer group of its own."""

    def __init__(
        self,
        name: str,
        topic: str,
        *,
        kafka_topic: str,
        group: str,
        runner: Runner,
        live: LiveSettings,
        records_max: Callable[[], int],
        linger_s: Callable[[], float],
        flights: int,
        on_assigned: OnAssigned | None,
        planned: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.name = name
        self.topic = topic  #: declared name
        self.kafka_topic = kafka_topic  #: name in the cluster
        self.group = group
        #: the worker's name in the group, by which it is known again after a restart; None: it has none
        self.instance: str | None = None
        self.runner = runner
        self.lanes: dict[int, GroupLane] = {}
        #: monotonic time of the poll loop's last turn; None while not running
        self.polled_s: float | None = None
        #: why the consumer is not connected; empty while it is
        self.trouble = "not started"
        self._live = live
        self._records_max = records_max
        self._linger_s = linger_s
        self._flights_max = flights
        self._on_assigned = on_assigned
        self._planned = planned
        self._memory = memory
        #: told of offsets that came without records; who knows where the log begins says whether any are lost
        self.on_gap: OnGap = lambda partition, expected, got: None
        #: a plan must not be overtaken on its way by the commit before it
        self._commit_turn = asyncio.Lock()
        self._flights: dict[asyncio.Task[None], list[GroupLane]] = {}
        self._starts: set[asyncio.Task[None]] = set()
        self._consumer: Any = None
        self._error: BaseException | None = None
        self._failures = 0  #: consumers in a row that met an error
        self._healing = False  #: the last one did, and the next one has nothing yet
        #: monotonic time when the group was last known to have this member
        self._member_s = monotonic()
        #: since when every commit has failed; None where the last one did not
        self._commits_fail_s: float | None = None
        self._paused: set[int] = set()
        self._busy_s = monotonic()  #: when there was last something to do
        self._held_back = False  #: a broker may hold back the answer to a fetch for long
        self._partitions_told = 0  #: that the topic has, by whoever watches it; 0: nobody has told

    async def run(self) -> None:
        """Poll until cancelled; then stop as at a rebalance: wait for flights, commit, leave the group.

        Whatever goes wrong with the consumer, it is closed and made anew.

        Raises:
            Fatal: the worker must end.
        """
        while True:
            began_s = monotonic()
            try:
                await self._run_consumer()
            except Fatal:
                raise
            except Exception as e:
                self._failures = 1 if monotonic() - began_s > HEALED_S else self._failures + 1
                self._healing = True
                self._say(e)
            delay_s = min(RECONNECT_MAX_S, RECONNECT_S * 2 ** min(self._failures - 1, 16))
            await back.or_after(asyncio.sleep(delay_s * random.uniform(0.5, 1.0)))

    def _say(self, e: Exception) -> None:
        self.trouble = reason(e)
        # The first of a row and then ever fewer.
        if self._failures & (self._failures - 1) == 0:
            known = isinstance(e, (KafkaError, OSError, TimeoutError, MembershipLostError))
            log.warning(
                "group_feed_reconnects",
                stage=self.name,
                group=self.group,
                tries=self._failures,
                error=repr(e),
                exc_info=None if known else e,
            )

    async def _run_consumer(self) -> None:
        settings = self._live().kafka
        consumer = AIOKafkaConsumer(
            **kafka_clients.reading(settings),
            client_id=f"{settings.group}-{self.name}",
            group_id=self.group,
            group_instance_id=self.instance,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=settings.fetch_bytes_max,
            fetch_max_wait_ms=FETCH_WAIT_MS,
            session_timeout_ms=round(settings.session_timeout_s * 1000),
            heartbeat_interval_ms=round(settings.session_timeout_s * 1000 / HEARTBEATS),
            rebalance_timeout_ms=60_000,
            request_timeout_ms=60_000,
            metadata_max_age_ms=METADATA_AGE_MS,
            partition_assignment_strategy=(RoundRobinPartitionAssignor,),
        )
        self._consumer = consumer
        self._error = None
        lost = False
        try:
            async with asyncio.timeout(CONNECT_S):
                await consumer.start()
            kafka_clients.keep_as_parsed(consumer, lambda topic: topic == self.kafka_topic)
            kafka_clients.note_heartbeats(consumer, self._heard)
            kafka_clients.mark_commits(consumer)
            consumer.subscribe([self.kafka_topic], listener=_Listener(self))
            self.trouble = ""
            await self._poll(consumer)
        except MembershipLostError:
            lost = True
            raise
        finally:
            self.polled_s = None
            try:
                # Shielded: a worker that stops cancels this task, and the last commit must still go out.
                await asyncio.shield(asyncio.ensure_future(self._leave(consumer, lost=lost)))
            finally:
                self._consumer = None

    async def _leave(self, consumer: Any, *, lost: bool = False) -> None:
        # Where somebody else is the owner, what is under way is his as well, and so is the commit.
        await self.revoke(list(self.lanes), wait_s=0 if lost else FLIGHT_STOP_S, commit=not lost)
        await kafka_clients.stop(consumer, LEAVE_TIMEOUT_S)

    def _heard(self) -> None:
        """The group has said that this is its member."""
        self._member_s = monotonic()

    # --- polling ------------------------------------------------------------------------------------------------

    async def _poll(self, consumer: Any) -> None:
        commit_at_s = monotonic() + self._live().kafka.commit_interval_s
        while True:
            self.polled_s = now_s = monotonic()
            if self._error is not None:
                raise self._error
            self._check_membership(now_s)
            self._start_flights()
            self._pause_full(consumer)
            if self._flights or self._paused or any(lane.busy or not lane.known for lane in self.lanes.values()):
                self._busy_s = now_s
            self._set_pace(consumer)
            if now_s >= commit_at_s:
                commit_at_s = now_s + self._live().kafka.commit_interval_s
                await self._commit(consumer)
            async with asyncio.timeout(POLL_MAX_S):
                fetched = await consumer.getmany(timeout_ms=self._poll_ms(), max_records=self._records_max())
            self._take(consumer, fetched)

    def _take(self, consumer: Any, fetched: Mapping[TopicPartition, Sequence[Any]]) -> None:
        """Put what a poll brought into the lanes. Without a wait, so that positions are those of these records."""
        for tp, records in fetched.items():
            lane = self.lanes.get(tp.partition)
            if lane is None:
                # Its assignment is not announced yet: read again then.
                kafka_clients.seek(consumer, tp, records[0].offset)
            elif lane.known:
                # What getmany gives is from the position as it is now: a seek drops what was fetched before it.
                if lane.expected is None:
                    lane.expected = lane.committed = records[0].offset
                place = kafka_clients.place_of(consumer, tp)
                lane.push(records, place.position if place is not None else None)
            # Otherwise it is not said yet where to start: the seek to come brings what is needed of this again.
        self.look(consumer)

    def look(self, consumer: Any = None) -> None:
        """See how far the consumer is: what a transaction or compaction left empty comes as no record."""
        consumer = consumer or self._consumer
        if consumer is None:
            return
        for lane in self.lanes.values():
            place = kafka_clients.place_of(consumer, TopicPartition(self.kafka_topic, lane.partition))
            if place is None:
                continue
            lane.end = place.end
            if lane.known and place.position is not None:
                if lane.expected is None:
                    lane.expected = lane.committed = place.position
                lane.passed(place.position)

    def _check_membership(self, now_s: float) -> None:
        """Notice that the group has gone on without us, also where aiokafka waits for an answer that does not come.

        Raises:
            MembershipLostError: by now the partitions are another worker's.
        """
        timeout_s = self._live().kafka.session_timeout_s
        if self.lanes and now_s - self._member_s > timeout_s:
            message = f"the group has not answered for {now_s - self._member_s:.0f} s"
            raise MembershipLostError(message)
        if self._commits_fail_s is not None and now_s - self._commits_fail_s > timeout_s:
            message = f"every commit has failed for {now_s - self._commits_fail_s:.0f} s"
            raise MembershipLostError(message)

    def _poll_ms(self) -> int:
        """Until something falls due: a linger, a flight that may end, the end of the session."""
        if self._flights or any(lane.pending_records for lane in self.lanes.values()):
            return max(1, min(POLL_MS, round(self._linger_s() * 250)))
        if not self._idle:
            return POLL_MS
        left_s = self._member_s + self._live().kafka.session_timeout_s - monotonic()
        return max(POLL_MS, min(IDLE_POLL_MS, round(left_s * 1000)))

    def _set_pace(self, consumer: Any) -> None:
        # Hook: aiokafka reads these for every request and turn, and has no settings that can change.
        idle, fetcher = self._idle, consumer._fetcher
        if fetcher is None:
            return  # it did not start
        fetcher._fetch_max_wait_ms = IDLE_POLL_MS if idle else FETCH_WAIT_MS
        fetcher._fetcher_timeout = IDLE_POLL_MS / 1000 if idle else FETCHER_TURN_S
        consumer._client._metadata_max_age_ms = IDLE_METADATA_AGE_MS if idle and self.lanes else METADATA_AGE_MS
        self._held_back = self._held_back or idle

    def topic_changed(self, count: int) -> None:
        """The topic has so many partitions: look now, and often until the consumer sees them; they are shared out anew.

        The broker that this consumer asks may learn of it later than the one that told.
        """
        self._partitions_told = count
        self._wake()
        if self._consumer is not None:
            self._consumer._client.force_metadata_update()

    def _wake(self) -> None:
        """Ask often again, and at once: a long fetch from the wrong offset would hold up the seek to the right one."""
        self._busy_s = monotonic()
        if self._consumer is not None:
            self._set_pace(self._consumer)

    @property
    def _idle(self) -> bool:
        return monotonic() - self._busy_s > IDLE_AFTER_S and self._sees_all()

    def _sees_all(self) -> bool:
        if self._consumer is None or not self._partitions_told:
            return True
        return len(self._consumer.partitions_for_topic(self.kafka_topic) or ()) >= self._partitions_told

    def _share(self) -> int:
        """Most records of one partition that wait in memory."""
        return max(1, self._records_max() * WAITING_FLIGHTS // max(1, len(self.lanes)))

    def _pause_full(self, consumer: Any) -> None:
        """Fetch neither partitions that wait for a dependency nor those of which enough is in memory."""
        limit = self._share()
        paused = {
            lane.partition
            for lane in self.lanes.values()
            if not lane.known
            or lane.progress.paused
            # A batch planned before is handed over whole, also where the limit has become smaller since.
            or (lane.pending_records >= limit and lane.plan_complete)
        }
        if paused != self._paused:
            assigned = {tp.partition: tp for tp in consumer.assignment()}
            with contextlib.suppress(IllegalStateError):
                consumer.pause(*(assigned[p] for p in paused - self._paused if p in assigned))
                consumer.resume(*(assigned[p] for p in self._paused - paused if p in assigned))
            self._paused = paused

    # --- flights ------------------------------------------------------------------------------------------------

    def _start_flights(self) -> None:
        records_max, linger_s, share = self._records_max(), self._linger_s(), self._share()
        while len(self._flights) < self._flights_max:
            ready = [
                x
                for x in self.lanes.values()
                if x.pending_records and not x.flying and not x.closing and x.plan_complete
            ]
            if not ready:
                return
            ready.sort(key=lambda lane: lane.waiting_since_s)
            now_s = monotonic()
            if self._planned:
                # An insert is of one partition, so each goes when it is due itself, and waits for no other's.
                ready = [x for x in ready if x.pending_records >= share or now_s - x.waiting_since_s >= linger_s][:1]
                if not ready:
                    return
            else:
                waiting = sum(lane.pending_records for lane in ready)
                # Nothing is waited for where a partition has its share: it is not fetched any more, so no company would come.
                full = max(lane.pending_records for lane in ready) >= share
                if waiting < records_max and not full and now_s - ready[0].waiting_since_s < linger_s:
                    return
            batches: list[Batch] = []
            flying: list[GroupLane] = []
            room = records_max
            for lane in ready:
                records = lane.take(room) if lane.plan is None else lane.take_plan()
                if not records:
                    continue
                batches.append(Batch(self.topic, lane.partition, records))
                flying.append(lane)
                lane.flying = True
                room -= len(records)
                if room <= 0:
                    break
            if not batches:
                continue
            task = asyncio.create_task(self._fly(batches, flying), name=f"{self.name}-flight")
            self._flights[task] = flying
            task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        given_up = task not in self._flights
        for lane in self._flights.pop(task, ()):
            lane.flying = False
        if not task.cancelled() and (error := task.exception()) is not None:
            if not given_up:
                self._fail(error)
        elif self._consumer is not None:
            self._start_flights()  # at once: the poll loop may be waiting

    def _fail(self, error: BaseException) -> None:
        """Have the poll loop end with an error; the worker's end comes before a new consumer."""
        if self._error is None or isinstance(error, Fatal):
            self._error = error

    async def _fly(self, batches: Sequence[Batch], lanes: Sequence[GroupLane]) -> None:
        progress = Progress()
        for lane in lanes:
            lane.progress = progress
        # By lane and not by number: after a rebalance a partition may have another one, which this flight knows nothing of.
        mine = {lane.partition: lane for lane in lanes}
        recheck = partial(self._recheck, mine) if self._on_assigned is not None else None
        await self.runner.process(batches, partial(self._ack, mine), progress, recheck=recheck)

    def _ack(self, lanes: Mapping[int, GroupLane], batch: Batch) -> None:
        lane = lanes[batch.partition]
        if lane.revoked:
            return
        offset = batch.records[-1].offset + 1
        if lane.position is not None and offset <= lane.position:
            # Two workers at one partition, and the store has let the other one through.
            message = f"acknowledged {offset} after {lane.position} in {batch.topic}-{batch.partition}"
            self._fail(MembershipLostError(message))
            return
        lane.acknowledge(batch.records, batch.topic)

    async def _recheck(self, lanes: Mapping[int, GroupLane], batches: Sequence[Batch]) -> Sequence[Batch]:
        """Before a retry: the store may hold part of it (a commit whose answer was lost), or less than was thought."""
        assert self._on_assigned is not None
        offsets = await self._on_assigned([batch.partition for batch in batches])
        kept: list[Batch] = []
        for batch in batches:
            start, lane = offsets.get(batch.partition), lanes[batch.partition]
            if lane.revoked:
                continue
            first = batch.records[0].offset
            if start is None or start == first:
                kept.append(batch)
                continue
            if start > first:
                records = [r for r in batch.records if r.offset >= start]
                lane.move_to(start)
                lane.skip_below(start)
                if records:
                    kept.append(batch.part(records))
            else:
                # The store lost something (restored from a backup): go back to where it stands.
                log.warning("store_is_behind", stage=self.name, partition=batch.partition, store=start, was=first)
                lane.clear()
                lane.start_at(start)
            self._seek(batch.partition, start, forward=start > first)
        return kept

    def _seek(self, partition: int, offset: int, *, forward: bool) -> None:
        """Fetch from there on; `forward`: unless the consumer is there already."""
        tp = TopicPartition(self.kafka_topic, partition)
        place = kafka_clients.place_of(self._consumer, tp) if self._consumer is not None else None
        if place is not None and not (forward and place.position is not None and place.position >= offset):
            self._consumer.seek(tp, offset)

    async def record_plan(self, batches: Sequence[Batch]) -> None:
        """Commit the bounds of batches that are about to be written.

        Raises:
            Retry: Kafka cannot be reached, or the partition is no longer ours.
        """
        offsets: dict[TopicPartition, tuple[int, str]] = {}
        plans: dict[int, tuple[int, int]] = {}
        # Those of the flight that this is called in: one that was given up must not speak for another assignment.
        lanes = {lane.partition: lane for lane in self._flights.get(asyncio.current_task(), ())}  # type: ignore[arg-type]
        for batch in batches:
            lane = lanes.get(batch.partition)
            if lane is None or lane.revoked or self._consumer is None:
                message = f"{batch.topic}-{batch.partition} has gone to another worker"
                raise Retry(message)
            plan = batch.records[0].offset, batch.records[-1].offset + 1
            if lane.planned != plan:
                offsets[TopicPartition(self.kafka_topic, batch.partition)] = (
                    plan[0],
                    f"{PLAN}{plan[1]}{self._remembered(batch.partition)}",
                )
                plans[batch.partition] = plan
        if not offsets:
            return
        try:
            async with self._commit_turn, asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._consumer.commit(offsets)
        except (KafkaError, TimeoutError) as e:
            message = f"the plan was not committed: {reason(e)}"
            raise Retry(message) from e
        self._heard()
        for partition, plan in plans.items():
            lanes[partition].planned = plan
            lanes[partition].note_commit(plan[0])

    def _remembered(self, partition: int) -> str:
        return "" if self._memory is None else MEMORY + self._memory.remember(partition)

    async def _read_plans(self, lanes: Sequence[GroupLane]) -> dict[int, int]:
        """Where the group stands, and what it had planned there."""
        admin = AIOKafkaAdminClient(**kafka_clients.connection(self._live().kafka))
        try:
            await admin.start()
            tps = [TopicPartition(self.kafka_topic, lane.partition) for lane in lanes]
            found = await admin.list_consumer_group_offsets(self.group, partitions=tps)
        finally:
            await admin.close()
        starts: dict[int, int] = {}
        foreign: dict[int, int] = {}
        unknown: list[int] = []
        for lane in lanes:
            committed = found.get(TopicPartition(self.kafka_topic, lane.partition))
            if committed is None or committed.offset < 0:
                unknown.append(lane.partition)
                if self._memory is not None:
                    self._memory.recall(lane.partition, "")
                continue
            if not self._is_own(committed.metadata):
                foreign[lane.partition] = committed.offset
            starts[lane.partition] = lane.committed = committed.offset
            text, _, remembered = committed.metadata.partition(MEMORY)
            if self._memory is not None:
                self._memory.recall(lane.partition, remembered)
            text = text.removeprefix(PLAN)
            if text != committed.metadata and text.isdigit() and int(text) > committed.offset:
                lane.plan = int(text)
                lane.planned = committed.offset, lane.plan
        if foreign or (unknown and isinstance(self._memory, Rereading)):
            await self._take_over_foreign(foreign, unknown)
        return starts

    # --- offsets that another tool has set

    def _is_own(self, noted: str) -> bool:
        """Whether a worker has committed an offset, by what is noted beside it."""
        return noted.startswith(PLAN) or (noted == kafka_clients.OWN if self._memory is None else MEMORY in noted)

    async def _take_over_foreign(self, foreign: Mapping[int, int], unknown: Sequence[int]) -> None:
        """Of a planned feed: tell the memory how far records may be written already, and whoever looks at the log."""
        tps = [TopicPartition(self.kafka_topic, p) for p in (*foreign, *unknown)]
        ends = {tp.partition: end for tp, end in (await self._consumer.end_offsets(tps)).items()}
        known = isinstance(self._memory, Rereading)
        if isinstance(self._memory, Rereading):
            await self._memory.reread(ends)
        again = {p: offset for p, offset in foreign.items() if ends[p] > offset}
        if again:
            action = (
                "what is written already is left out" if known else "what is behind the offsets is handed over again"
            )
            await self._tell_foreign(again, again, action)

    async def _look_for_foreign(self, lanes: Sequence[GroupLane], starts: Mapping[int, int]) -> None:
        """Of a feed whose store says where it stands: tell of an offset in Kafka that says something else, and why it does not count.

        Best effort: what cannot be asked is not told.
        """
        tps = [TopicPartition(self.kafka_topic, lane.partition) for lane in lanes if not lane.revoked]
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                committed = await kafka_clients.commits(self._consumer, tps)
        except (KafkaError, OSError, TimeoutError, AttributeError):  # the consumer may have been stopped
            return
        foreign = {
            tp.partition: at.offset
            for tp, at in committed.items()
            if not self._is_own(at.metadata) and starts.get(tp.partition, at.offset) != at.offset
        }
        if foreign:
            action = (
                "they do not count: the database's sink_offsets say where this stage stands; "
                f"`preservarium replay reset --stage {self.name}` moves those"
            )
            await self._tell_foreign(foreign, starts, action)

    async def _tell_foreign(self, foreign: Mapping[int, int], starts: Mapping[int, int], action: str) -> None:
        metrics.OFFSETS_FOREIGN.labels(self.group).inc(len(foreign))
        log.warning(
            "offsets_set_from_outside",
            stage=self.name,
            group=self.group,
            offsets=dict(sorted(foreign.items())),
            starts={p: starts[p] for p in sorted(foreign)},
            action=action,
            hint="by a command, by Kafka's tools, or by a release before this one",
        )
        # So that it is told once.
        noted = {
            TopicPartition(self.kafka_topic, p): (starts[p], self._remembered(p) or kafka_clients.OWN) for p in foreign
        }
        with contextlib.suppress(KafkaError, IllegalStateError, TimeoutError):
            async with self._commit_turn, asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._consumer.commit(noted)

    # --- rebalance ----------------------------------------------------------------------------------------------

    def assign(self, partitions: Iterable[int]) -> None:
        """Partitions are ours now; find out where to start, and fetch nothing of them before that is known."""
        metrics.REBALANCES.labels(self.group).inc()
        self._heard()
        self._commits_fail_s = None
        if self._healing:
            self._healing = False
            log.info("group_feed_healed", stage=self.name, group=self.group, tries=self._failures)
        self._wake()
        if self._held_back and self._consumer is not None:
            # The fetch of the assignment before is nobody's now, but its broker would answer nothing else until it ends.
            kafka_clients.hang_up(self._consumer)
            self._held_back = False
        new = sorted(partitions)
        for partition in new:
            self.lanes[partition] = GroupLane(partition, self.on_gap)
        if not new:
            return
        if self._on_assigned is None and not self._planned:
            for partition in new:
                self.lanes[partition].known = True
            return
        task = asyncio.create_task(self._find_start([self.lanes[p] for p in new]))
        self._starts.add(task)
        task.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starts.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _find_start(self, lanes: list[GroupLane]) -> None:
        delay_s = self._live().agents.backoff_s
        while lanes := [lane for lane in lanes if not lane.revoked and not lane.known]:
            try:
                offsets: Mapping[int, int]
                if self._planned:
                    offsets = await self._read_plans(lanes)
                else:
                    assert self._on_assigned is not None
                    offsets = await self._on_assigned([lane.partition for lane in lanes])
                await self._check_ends(offsets)
                if not self._planned:
                    await self._look_for_foreign(lanes, offsets)
                if all([await self._start(lane, offsets.get(lane.partition)) for lane in lanes]):
                    return
            except Fatal:
                raise
            except Exception as e:
                metrics.BATCH_RETRIES.labels(self.name, "retry").inc()
                log.warning(
                    "start_unknown", stage=self.name, error=repr(e), exc_info=None if isinstance(e, Retry) else e
                )
                for lane in lanes:
                    lane.progress.reason = str(e)
            await back.or_after(asyncio.sleep(delay_s))
            delay_s = min(delay_s * 2, self._live().agents.backoff_max_s)

    async def _start(self, lane: GroupLane, start: int | None) -> bool:
        """Begin a lane at an offset, or where the group stands; False: the consumer has not the partition now."""
        consumer = self._consumer
        if lane.revoked or consumer is None:
            return False
        tp = TopicPartition(self.kafka_topic, lane.partition)
        # Also where the store says nothing: a poll may have passed over records meanwhile.
        if start is None:
            # A consumer that was stopped meanwhile never answers.
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                start = await consumer.committed(tp)
        if lane.revoked or consumer is not self._consumer:
            return False
        if start is None:
            try:
                await consumer.seek_to_beginning(tp)
            except (IllegalStateError, AssertionError):  # as `kafka_clients.seek`
                return False
        elif not kafka_clients.seek(consumer, tp, start):
            return False
        lane.progress.reason = ""
        lane.start_at(start)
        lane.committed = lane.committed if lane.committed is not None else start
        lane.known = True
        return True

    async def _check_ends(self, offsets: Mapping[int, int]) -> None:
        """Refuse to start behind a partition's end: consumers would silently go elsewhere and skip what comes.

        Raises:
            Retry: the topic was made anew (or lost its end), so that the offsets that are known are not its own.
        """
        if not offsets:
            return
        consumer = self._consumer
        if consumer is None:
            message = "the consumer is being connected anew"
            raise Retry(message)
        ends = await consumer.end_offsets([TopicPartition(self.kafka_topic, p) for p in offsets])
        for tp, end in ends.items():
            if offsets[tp.partition] > end:
                message = (
                    f"{tp.topic}-{tp.partition} ends at {end}, and {offsets[tp.partition]} is stored already: "
                    "was the topic made anew? Then open a new generation (sink.generation), or reset the group's offsets"
                )
                raise Retry(message)

    async def revoke(self, partitions: Iterable[int], *, wait_s: float = FLIGHT_STOP_S, commit: bool = True) -> None:
        """Partitions go to another worker: wait for their flights, commit what is acknowledged, forget the rest."""
        self._wake()
        lanes = [self.lanes[p] for p in partitions if p in self.lanes]
        for lane in lanes:
            lane.closing = True
            lane.clear()
        flights = {task: flying for task, flying in self._flights.items() if any(lane in lanes for lane in flying)}
        waiting = [t for t, flying in flights.items() if not flying[0].progress.paused]
        if waiting and wait_s:
            await asyncio.wait(waiting, timeout=wait_s)
        for task in flights:
            if not task.done():
                log.warning("flight_abandoned", stage=self.name, partitions=[x.partition for x in flights[task]])
                task.cancel()
        if flights:
            _, hanging = await asyncio.wait(flights, timeout=FLIGHT_CANCEL_S)
            for task in hanging:
                # Whatever becomes of it concerns nobody: its lanes are revoked, and stores have fences of their own.
                self._flights.pop(task, None)
                log.warning("flight_hangs", stage=self.name, partitions=[x.partition for x in flights[task]])
        if commit and self._consumer is not None and any(lane.uncommitted for lane in lanes):
            await self._commit(self._consumer)
        for lane in lanes:
            lane.revoked = True
            if self.lanes.get(lane.partition) is lane:
                del self.lanes[lane.partition]
        self._paused -= {lane.partition for lane in lanes}

    async def _commit(self, consumer: Any) -> None:
        async with self._commit_turn:
            await self._commit_positions(consumer)

    async def _commit_positions(self, consumer: Any) -> None:
        offsets = {
            TopicPartition(self.kafka_topic, lane.partition): lane.position
            for lane in self.lanes.values()
            if lane.uncommitted
        }
        if not offsets:
            return
        began_s = monotonic()
        try:
            # Bounded: aiokafka tries for ever while it finds no coordinator.
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await consumer.commit(
                    offsets
                    if self._memory is None
                    else {tp: (offset, self._remembered(tp.partition)) for tp, offset in offsets.items()}
                )
        except (CommitFailedError, IllegalStateError) as e:
            # A rebalance came first: the next owner reads these again.
            self._commits_fail_s = self._commits_fail_s or began_s
            log.info("commit_refused", stage=self.name, error=repr(e))
            return
        except (KafkaError, TimeoutError) as e:
            self._commits_fail_s = self._commits_fail_s or began_s
            log.warning("commit_failed", stage=self.name, error=repr(e))
            return
        self._commits_fail_s = None
        self._heard()
        for tp, offset in offsets.items():
            lane = self.lanes.get(tp.partition)
            if lane is not None and offset is not None:
                lane.note_commit(offset)
                lane.planned = None


class _Listener(ConsumerRebalanceListener):
    """aiokafka's rebalance callbacks; they run in the group's own task, beside the poll loop."""

    def __init__(self, feed: GroupFeed) -> None:
        self._feed = feed

    async def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        await self._feed.revoke([tp.partition for tp in revoked])

    async def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        self._feed.assign(tp.partition for tp in assigned)
