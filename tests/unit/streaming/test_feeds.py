"""The group feed's rules: flights, order, pauses, where to start, commits. Its consumer here is a list."""

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.client import ConnectionGroup
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaConnectionError
from consumer_fakes import subscription
from record_fakes import Rec

from preservarium.clock import SystemClock
from preservarium.errors import Fatal, Retry
from preservarium.settings import Agents, Kafka, LiveSettings, Settings
from preservarium.streaming import feeds
from preservarium.streaming.feeds import GroupFeed
from preservarium.streaming.runner import Runner
from preservarium.streaming.stage import Batch, Effects


class Consumer:
    """Serves records 0, 1, 2, … of each partition from its position, unless paused."""

    def __init__(self, ends: Mapping[int, int]) -> None:
        self.ends = dict(ends)
        self.positions = dict.fromkeys(ends, 0)
        self.paused_now: set[int] = set()
        self._fetcher = SimpleNamespace(_fetch_max_wait_ms=0)
        self._client = SimpleNamespace(_metadata_max_age_ms=0, _conns={})
        self._subscription = subscription(self.positions, self.ends)
        self.gaps: dict[int, set[int]] = {}  # offsets that hold no record: markers, what compaction took
        self.asked_ends = 0
        self.commits: list[dict[int, int]] = []
        self.commit_error: Exception | None = None
        self.polls = 0
        self.asked_ms: list[tuple[int, int]] = []  # wait of each poll, and of fetches meanwhile
        self.fetch_max = 10

    def _tp(self, partition: int) -> TopicPartition:
        return TopicPartition("x.t", partition)

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        self.polls += 1
        self.asked_ms.append((timeout_ms, self._fetcher._fetch_max_wait_ms))
        await asyncio.sleep(0)
        found: dict[TopicPartition, list[Any]] = {}
        for partition, position in self.positions.items():
            end = min(self.ends[partition], position + min(self.fetch_max, max_records))
            if partition not in self.paused_now and end > position:
                gaps = self.gaps.get(partition, set())
                if records := [Rec(o) for o in range(position, end) if o not in gaps]:
                    found[self._tp(partition)] = records
                self.positions[partition] = end
        if not found:
            await asyncio.sleep(0.001)
        return found

    def assignment(self) -> set[TopicPartition]:
        return {self._tp(p) for p in self.positions}

    def pause(self, *tps: TopicPartition) -> None:
        self.paused_now |= {tp.partition for tp in tps}

    def resume(self, *tps: TopicPartition) -> None:
        self.paused_now -= {tp.partition for tp in tps}

    def seek(self, tp: TopicPartition, offset: int) -> None:
        if tp.partition not in self.positions:
            raise IllegalStateError
        self.positions[tp.partition] = offset

    async def seek_to_beginning(self, tp: TopicPartition) -> None:
        self.seek(tp, 0)

    async def committed(self, tp: TopicPartition) -> int | None:
        return None

    async def end_offsets(self, tps: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        self.asked_ends += 1
        return {tp: self.ends[tp.partition] for tp in tps}

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> None:
        if self.commit_error is not None:
            raise self.commit_error
        self.commits.append({tp.partition: offset for tp, offset in offsets.items()})


class Group:
    """A feed, its consumer and a handler that writes down what it gets."""

    def __init__(
        self, ends: Mapping[int, int], *, offsets: Mapping[int, int] | None = None, flights: int = 2, **options: Any
    ) -> None:
        self.live = LiveSettings(
            Settings(agents=Agents(backoff_s=0.001, backoff_max_s=0.002), kafka=Kafka(commit_interval_s=0.01))
        )
        self.consumer = Consumer(ends)
        self.flights: list[list[tuple[int, list[int]]]] = []
        self.seen: dict[int, list[int]] = {p: [] for p in ends}
        self.underway: list[set[int]] = []
        self.underway_max = 0
        self.go = asyncio.Event()
        self.go.set()
        self.errors: list[Exception] = []
        self.asked: list[list[int]] = []
        self.ask_errors: list[Exception] = []
        self.offsets = dict(offsets) if offsets is not None else None
        on_assigned = self._on_assigned if offsets is not None else None
        runner = Runner("group", self._handle, publisher=self, put_state=self._put, live=self.live, clock=SystemClock())
        self.feed = GroupFeed(
            "group",
            "t",
            kafka_topic="x.t",
            group="g",
            runner=runner,
            live=self.live,
            records_max=lambda: options.get("records_max", 25),
            linger_s=lambda: options.get("linger_s", 0.0),
            flights=flights,
            on_assigned=on_assigned,
        )

    async def publish(self, sends: Sequence[Any]) -> dict[str, int]:
        return {}

    async def _put(self, table: str, partition: int, items: Any) -> None:
        raise AssertionError

    async def _on_assigned(self, partitions: list[int]) -> Mapping[int, int]:
        self.asked.append(sorted(partitions))
        if self.ask_errors:
            raise self.ask_errors.pop(0)
        assert self.offsets is not None
        return {p: self.offsets[p] for p in partitions if p in self.offsets}

    async def _handle(self, batches: Sequence[Batch]) -> Effects:
        self.flights.append([(b.partition, [r.offset for r in b.records]) for b in batches])
        mine = {b.partition for b in batches}
        assert not any(mine & other for other in self.underway), "a partition is in two flights"
        self.underway.append(mine)
        self.underway_max = max(self.underway_max, len(self.underway))
        try:
            await self.go.wait()
            if self.errors:
                raise self.errors.pop(0)
        finally:
            self.underway.remove(mine)
        for batch in batches:
            self.seen[batch.partition] += [r.offset for r in batch.records]
        return Effects()

    async def __aenter__(self) -> "Group":
        self.feed._consumer = self.consumer
        self.feed.assign(self.consumer.positions)
        self.poll = asyncio.create_task(self.feed._poll(self.consumer))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.poll.cancel()
        await asyncio.wait([self.poll])
        await self.feed.revoke(list(self.feed.lanes))


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_every_record_once_in_order_and_committed() -> None:
    async with Group({0: 100, 1: 37, 2: 0}) as group:
        await until(lambda: group.seen == {0: [*range(100)], 1: [*range(37)], 2: []})
        await until(lambda: not any(lane.uncommitted for lane in group.feed.lanes.values()))
        assert group.feed.lanes[0].committed == 100
        assert group.feed.lanes[1].committed == 37
        assert group.underway_max <= 2
        assert all(sum(len(o) for _, o in flight) <= 25 for flight in group.flights)


async def test_a_feed_with_nothing_to_do_asks_rarely_and_comes_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "IDLE_AFTER_S", 0.02)
    async with Group({0: 5, 1: 0}) as group:
        assert group.consumer.asked_ms[:1] in ([], [(feeds.POLL_MS, feeds.FETCH_WAIT_MS)])
        # A poll ends with the session at the latest, so that a lost membership is noticed.
        await until(lambda: any(ms > 15_000 and fetch == feeds.IDLE_POLL_MS for ms, fetch in group.consumer.asked_ms))
        assert group.consumer.asked_ms[0] == (feeds.POLL_MS, feeds.FETCH_WAIT_MS)
        group.consumer.ends[1] = 3
        asked = len(group.consumer.asked_ms)
        await until(lambda: group.seen[1] == [0, 1, 2])
        await until(lambda: any(wait == feeds.FETCH_WAIT_MS for _, wait in group.consumer.asked_ms[asked:]))


async def test_an_idle_feed_asks_often_again_from_a_rebalance_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its next turn: a fetch from an offset that is about to be corrected must not wait for long."""
    monkeypatch.setattr(feeds, "IDLE_AFTER_S", 0.05)
    async with Group({0: 5}) as group:
        fetcher = group.consumer._fetcher
        for happens in (lambda: group.feed.assign([]), lambda: group.feed.revoke([])):
            await until(lambda: fetcher._fetch_max_wait_ms == feeds.IDLE_POLL_MS)
            assert group.consumer._client._metadata_max_age_ms == feeds.IDLE_METADATA_AGE_MS
            waited = happens()
            if waited is not None:
                await waited
            assert fetcher._fetch_max_wait_ms == feeds.FETCH_WAIT_MS
            assert group.consumer._client._metadata_max_age_ms == feeds.METADATA_AGE_MS


async def test_only_an_assignment_after_idling_hangs_up_on_whoever_holds_an_answer_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feeds, "IDLE_AFTER_S", 0.05)
    closed: list[str] = []
    connections = {
        (1, group): SimpleNamespace(close=lambda reason, name=name: closed.append(name))
        for group, name in ((ConnectionGroup.DEFAULT, "fetches"), (ConnectionGroup.COORDINATION, "coordinator"))
    }
    async with Group({0: 5}) as group:
        group.consumer._client._conns = connections
        group.feed.assign([])
        assert closed == []
        await until(lambda: group.consumer._fetcher._fetch_max_wait_ms == feeds.IDLE_POLL_MS)
        await group.feed.revoke([])
        assert closed == []
        group.feed.assign([])
        assert closed == ["fetches"]
        group.feed.assign([])
        assert closed == ["fetches"]


async def test_a_flight_is_formed_over_several_partitions() -> None:
    async with Group(dict.fromkeys(range(8), 3), linger_s=0.05) as group:
        await until(lambda: all(len(offsets) == 3 for offsets in group.seen.values()))
        assert len(group.flights) == 1
        assert sorted(partition for partition, _ in group.flights[0]) == [*range(8)]


async def test_a_partition_that_has_its_share_in_memory_does_not_linger_for_company() -> None:
    """It is not fetched any more, and the others have nothing: whoever waited for a full flight would wait in vain."""
    async with Group({0: 500} | dict.fromkeys(range(1, 8), 0), records_max=100, linger_s=3600.0) as group:
        await until(lambda: len(group.seen.get(0, ())) >= 400)


async def test_a_slow_flight_stops_neither_polling_nor_the_other_flights() -> None:
    async with Group({0: 500, 1: 500}, flights=2, records_max=10) as group:
        group.go.clear()
        await until(lambda: group.underway_max == 2)
        polls = group.consumer.polls
        await until(lambda: group.consumer.paused_now == {0, 1})
        await until(lambda: group.consumer.polls > polls + 10)
        assert all(lane.pending_records <= 40 for lane in group.feed.lanes.values()), "memory is bounded"
        group.go.set()
        await until(lambda: group.seen == {0: [*range(500)], 1: [*range(500)]})


async def test_the_stores_offset_wins_at_the_start() -> None:
    async with Group({0: 10, 1: 10}, offsets={0: 7}) as group:
        await until(lambda: group.seen == {0: [7, 8, 9], 1: [*range(10)]})


async def test_nothing_is_handed_over_before_the_store_says_where_to_start() -> None:
    group = Group({0: 30}, offsets={0: 20})
    group.ask_errors = [Retry("down")] * 20
    async with group:
        await until(lambda: len(group.asked) > 10)
        assert group.flights == []
        await until(lambda: group.seen[0] == [*range(20, 30)])


@pytest.mark.parametrize("error", [IllegalStateError, AssertionError, KafkaConnectionError])
async def test_a_start_that_fails_for_one_partition_is_tried_again_for_that_one(error: type[Exception]) -> None:
    """A group that is being joined again has no assignment for a moment; the others go on, and none begins twice."""
    group = Group({0: 30, 1: 10, 2: 30}, offsets={0: 20, 2: 25})
    fails, seek = [1, 1, 1], group.consumer.seek

    def failing(tp: TopicPartition, offset: int) -> None:
        if tp.partition == 1 and fails:
            fails.pop()
            raise error
        seek(tp, offset)

    group.consumer.seek = failing  # type: ignore[method-assign]
    async with group:
        await until(lambda: group.seen == {0: [*range(20, 30)], 1: [*range(10)], 2: [*range(25, 30)]})
        assert not fails
        assert group.asked[0] == [0, 1, 2]
        assert 0 not in group.asked[-1], "what has begun is not begun again"


async def test_a_start_waits_for_a_consumer_that_is_made_anew() -> None:
    group = Group({0: 30}, offsets={0: 20})
    async with group:
        group.feed._consumer = None
        await until(lambda: len(group.asked) > 3)
        assert group.flights == []
        group.feed._consumer = group.consumer
        await until(lambda: group.seen[0] == [*range(20, 30)])


async def test_a_retry_asks_the_store_again_and_skips_what_it_holds() -> None:
    group = Group({0: 10}, offsets={0: 0})
    group.errors = [Retry("the answer to the commit was lost")]
    async with group:
        group.go.clear()
        await until(lambda: len(group.flights) == 1)
        group.offsets = {0: 4}
        group.go.set()
        await until(lambda: group.feed.lanes[0].position == 10)
        assert group.seen[0] == [4, 5, 6, 7, 8, 9]


async def test_a_retry_finds_that_everything_is_stored() -> None:
    group = Group({0: 10}, offsets={0: 0})
    group.errors = [Retry("the answer to the commit was lost")]
    async with group:
        group.go.clear()
        await until(lambda: len(group.flights) == 1)
        group.offsets = {0: 10}
        group.go.set()
        await until(lambda: group.feed.lanes[0].committed == 10)
        assert group.seen[0] == []


async def test_a_store_that_lost_something_is_given_it_again() -> None:
    group = Group({0: 30}, offsets={0: 10})
    async with group:
        await until(lambda: group.seen[0] == [*range(10, 30)])
        group.consumer.ends[0] = 35
        group.errors = [Retry("restored from a backup")]
        group.offsets = {0: 15}
        await until(lambda: group.seen[0][20:] == [*range(15, 35)])
        await until(lambda: group.feed.lanes[0].committed == 35)


async def test_a_revoke_waits_for_flights_and_commits_them() -> None:
    async with Group({0: 10, 1: 10}) as group:
        group.go.clear()
        await until(lambda: len(group.underway) >= 1)
        revoking = asyncio.create_task(group.feed.revoke([0, 1]))
        await asyncio.sleep(0.01)
        assert not revoking.done()
        group.go.set()
        await revoking
        done = {p: len(offsets) for p, offsets in group.seen.items() if offsets}
        committed: dict[int, int] = {}
        for commit in group.consumer.commits:
            committed |= commit
        assert committed == done
        assert group.feed.lanes == {}


async def test_a_revoke_abandons_what_waits_for_a_dependency() -> None:
    group = Group({0: 10})
    group.live()  # back-off is a millisecond: so many that it is still waiting
    group.errors = [Retry("down")] * 1_000_000
    async with group:
        await until(lambda: len(group.flights) > 3)
        await group.feed.revoke([0])
        assert group.consumer.commits == []
        flights = len(group.flights)
        await asyncio.sleep(0.02)
        assert len(group.flights) == flights


async def test_a_refused_commit_is_no_error() -> None:
    group = Group({0: 10})
    group.consumer.commit_error = CommitFailedError("rebalanced")
    async with group:
        await until(lambda: group.seen[0] == [*range(10)])
        await asyncio.sleep(0.05)
        assert not group.poll.done()
        group.consumer.commit_error = None
        await until(lambda: group.consumer.commits == [{0: 10}])


async def test_a_fatal_error_ends_the_feed() -> None:
    group = Group({0: 10})
    group.errors = [Fatal("no way on")]
    async with group:
        with pytest.raises(Fatal, match="no way on"):
            await group.poll


async def test_records_of_an_assignment_not_yet_announced_are_read_again() -> None:
    async with Group({0: 5}) as group:
        await until(lambda: group.seen[0] == [*range(5)])
        await group.feed.revoke([0])
        group.consumer.positions[0] = 2
        await until(lambda: group.consumer.polls > 20)
        assert group.seen[0] == [*range(5)]
        group.feed.assign([0])
        await until(lambda: group.seen[0][5:] == [2, 3, 4])
