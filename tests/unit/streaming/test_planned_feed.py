"""A planned feed: after a crash the same batch comes again with the same bounds, so a store that knows its token drops it."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError
from consumer_fakes import subscription
from record_fakes import Rec

from preservarium import metrics
from preservarium.clock import SystemClock
from preservarium.errors import Retry
from preservarium.settings import Agents, Kafka, LiveSettings, Settings
from preservarium.streaming import feeds
from preservarium.streaming.feeds import GroupFeed
from preservarium.streaming.group_lanes import GroupLane
from preservarium.streaming.runner import Runner
from preservarium.streaming.stage import Batch, Effects


class Coordinator:
    """Kafka's part: committed offsets with metadata, and which member may commit."""

    def __init__(self, ends: Mapping[int, int]) -> None:
        self.ends = dict(ends)
        self.committed: dict[int, tuple[int, str]] = {}
        self.member: object = None
        self.plans = 0


class Consumer:
    def __init__(self, kafka: Coordinator) -> None:
        self.kafka = kafka
        self.positions = dict.fromkeys(kafka.ends, 0)
        self.paused_now: set[int] = set()
        self._fetcher = SimpleNamespace(_fetch_max_wait_ms=0)
        self._client = SimpleNamespace(_metadata_max_age_ms=0)
        self._subscription = subscription(self.positions, kafka.ends)
        self.fetch_max = 7
        self.refuse: Exception | None = None
        kafka.member = self

    async def getmany(self, *, timeout_ms: int, max_records: int) -> dict[TopicPartition, list[Any]]:
        await asyncio.sleep(0)
        found = {}
        for partition, position in self.positions.items():
            end = min(self.kafka.ends[partition], position + min(self.fetch_max, max_records))
            if partition not in self.paused_now and end > position:
                found[TopicPartition("x.t", partition)] = [Rec(o) for o in range(position, end)]
                self.positions[partition] = end
        if not found:
            await asyncio.sleep(0.001)
        return found

    def assignment(self) -> set[TopicPartition]:
        return {TopicPartition("x.t", p) for p in self.positions}

    def pause(self, *tps: TopicPartition) -> None:
        self.paused_now |= {tp.partition for tp in tps}

    def resume(self, *tps: TopicPartition) -> None:
        self.paused_now -= {tp.partition for tp in tps}

    def seek(self, tp: TopicPartition, offset: int) -> None:
        self.positions[tp.partition] = offset

    async def seek_to_beginning(self, tp: TopicPartition) -> None:
        self.seek(tp, 0)

    async def committed(self, tp: TopicPartition) -> int | None:
        return self.kafka.committed.get(tp.partition, (None, ""))[0]

    async def end_offsets(self, tps: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return {tp: self.kafka.ends[tp.partition] for tp in tps}

    async def commit(self, offsets: Mapping[TopicPartition, int | tuple[int, str]]) -> None:
        await asyncio.sleep(0)
        if self.refuse is not None:
            raise self.refuse
        if self.kafka.member is not self:
            raise CommitFailedError
        for tp, value in offsets.items():
            offset, metadata = (value, "") if isinstance(value, int) else value
            self.kafka.plans += bool(metadata)
            self.kafka.committed[tp.partition] = offset, metadata


class Table:
    """A store that recognises the token of a repeated insert."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        self.tokens: dict[tuple[int, int, int], list[int]] = {}
        self.repeats = 0

    def insert(self, partition: int, offsets: list[int]) -> None:
        token = (partition, offsets[0], offsets[-1] + 1)
        if token in self.tokens:
            assert self.tokens[token] == offsets
            self.repeats += 1
            return
        self.tokens[token] = offsets
        self.rows += [(partition, offset) for offset in offsets]


class Worker:
    def __init__(
        self,
        kafka: Coordinator,
        table: Table,
        records_max: int,
        monkeypatch: pytest.MonkeyPatch,
        memory: "Memory | None" = None,
    ) -> None:
        self.table = table
        self.kafka = kafka
        self.errors: list[BaseException] = []  # raised after the insert, one a call
        self.before: list[BaseException] = []  # raised before it
        self.inserted = asyncio.Event()
        self.hold: asyncio.Event | None = None
        self.stuck: set[int] = set()  # partitions whose insert never ends
        live = LiveSettings(
            Settings(
                agents=Agents(backoff_s=0.001, backoff_max_s=0.002, attempts_max=2), kafka=Kafka(commit_interval_s=0.01)
            )
        )
        self.feed: GroupFeed

        async def handler(batches: Sequence[Batch]) -> Effects:
            await self.feed.record_plan(batches)
            if {batch.partition for batch in batches} & self.stuck:
                await asyncio.Event().wait()
            if self.before:
                raise self.before.pop(0)
            if self.hold is not None:
                await self.hold.wait()
            for batch in batches:
                self.table.insert(batch.partition, [r.offset for r in batch.records])
            self.inserted.set()
            if self.errors:
                raise self.errors.pop(0)
            return Effects()

        async def put_state(*_: Any) -> None:
            raise AssertionError

        self.feed = GroupFeed(
            "group", "t", kafka_topic="x.t", group="g", live=live, records_max=lambda: records_max, linger_s=lambda: 0.0,
            flights=2, on_assigned=None, planned=True, memory=memory,
            runner=Runner("group", handler, publisher=self, put_state=put_state, live=live, clock=SystemClock()),
        )  # fmt: skip
        consumer = self.consumer = Consumer(kafka)
        self.feed._consumer = consumer

        async def read_plans(lanes: Sequence[GroupLane]) -> dict[int, int]:
            class Admin:
                def __init__(self, **_: Any) -> None: ...

                async def start(self) -> None: ...

                async def close(self) -> None: ...

                async def list_consumer_group_offsets(self, _group: str, partitions: Any) -> Any:
                    from aiokafka.structs import OffsetAndMetadata

                    return {tp: OffsetAndMetadata(*kafka.committed.get(tp.partition, (-1, ""))) for tp in partitions}

            monkeypatch.setattr(feeds, "AIOKafkaAdminClient", Admin)
            return await GroupFeed._read_plans(self.feed, lanes)

        self.feed._read_plans = read_plans  # type: ignore[method-assign]

    async def publish(self, sends: Sequence[Any]) -> dict[str, int]:
        return {}

    async def __aenter__(self) -> "Worker":
        self.feed.assign(self.consumer.positions)
        self.poll = asyncio.create_task(self.feed._poll(self.consumer))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.poll.cancel()
        await asyncio.wait([self.poll])
        await self.feed.revoke(list(self.feed.lanes))

    def die(self) -> None:
        """kill -9: nothing is awaited, nothing committed."""
        self.poll.cancel()
        for task in [*self.feed._flights, *self.feed._starts]:
            task.cancel()


@pytest.fixture
def worker(monkeypatch):
    def make(kafka: Coordinator, table: Table, records_max: int = 25, memory: Memory | None = None) -> Worker:
        return Worker(kafka, table, records_max, monkeypatch, memory)

    return make


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_bounds_are_committed_before_the_insert_and_cleared_after_it(worker):
    kafka, table = Coordinator({0: 20}), Table()
    w = worker(kafka, table)
    w.hold = asyncio.Event()
    async with w:
        await until(lambda: kafka.committed)
        assert kafka.committed[0] == (0, "planned:7")
        assert table.rows == []
        w.hold.set()
        await until(lambda: kafka.committed[0] == (20, ""))
    assert table.rows == [(0, o) for o in range(20)]


async def test_a_batch_written_before_a_crash_comes_again_with_the_same_bounds(worker):
    kafka, table = Coordinator({0: 5}), Table()
    dead = worker(kafka, table)
    dead.errors = [Retry("the answer was lost")] * 1000
    await dead.__aenter__()
    await dead.inserted.wait()
    dead.die()
    kafka.ends[0] = 90  # meanwhile more came: other bounds would be natural
    async with worker(kafka, table, records_max=50) as other:
        await until(lambda: kafka.committed[0] == (90, ""))
        assert other.feed.lanes[0].position == 90
    assert table.repeats >= 1
    assert sorted(table.rows) == [(0, o) for o in range(90)]


async def test_a_partition_does_not_wait_for_the_insert_of_another(worker):
    kafka, table = Coordinator({0: 60, 1: 60, 2: 60}), Table()
    w = worker(kafka, table)
    w.stuck = {1}
    await w.__aenter__()
    await until(lambda: {p: kafka.committed.get(p) for p in (0, 2)} == {0: (60, ""), 2: (60, "")})
    assert sorted(table.rows) == [(p, o) for p in (0, 2) for o in range(60)]
    w.die()
    async with worker(kafka, table):
        await until(lambda: kafka.committed[1] == (60, ""))
    assert sorted(table.rows) == [(p, o) for p in range(3) for o in range(60)]


async def test_a_plan_larger_than_the_limit_of_now_is_kept_whole(worker):
    kafka, table = Coordinator({0: 200}), Table()
    kafka.committed[0] = (10, "planned:110")
    table.insert(0, [*range(10)])
    table.insert(0, [*range(10, 110)])
    async with worker(kafka, table, records_max=8):
        await until(lambda: kafka.committed[0] == (200, ""))
    assert table.repeats == 1
    assert sorted(table.rows) == [(0, o) for o in range(200)]


async def test_what_retention_deleted_of_a_plan_is_gone_and_the_rest_goes_on(worker):
    kafka, table = Coordinator({0: 60}), Table()
    kafka.committed[0] = (10, "planned:30")
    w = worker(kafka, table)
    seek = w.consumer.seek
    w.consumer.seek = lambda tp, offset: seek(tp, max(40, offset))
    async with w:
        await until(lambda: kafka.committed[0] == (60, ""))
    assert sorted(table.rows) == [(0, o) for o in range(40, 60)]


async def test_a_worker_that_is_no_member_any_more_writes_nothing(worker):
    kafka, table = Coordinator({0: 50}), Table()
    stale = worker(kafka, table)
    async with stale:
        kafka.member = None
        await asyncio.sleep(0.05)
        assert table.rows == []


async def test_metadata_of_others_is_no_plan(worker):
    kafka, table = Coordinator({0: 20, 1: 20, 2: 20}), Table()
    kafka.committed = {0: (5, "by hand"), 1: (5, "planned:x"), 2: (5, "planned:3")}
    async with worker(kafka, table):
        await until(lambda: all(c == (20, "") for c in kafka.committed.values()))
    assert sorted(table.rows) == [(p, o) for p in range(3) for o in range(5, 20)]


class Memory:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, str | int]] = []

    def recall(self, partition: int, text: str) -> None:
        self.told.append(("recall", partition, text))

    def remember(self, partition: int) -> str:
        return "m"

    async def reread(self, below: Mapping[int, int]) -> None:
        self.told += [("reread", partition, offset) for partition, offset in below.items()]


async def test_a_memory_is_told_how_far_records_may_be_written_where_no_worker_has_set_the_offset(worker):
    kafka, table, memory = Coordinator({0: 20, 1: 21, 2: 22, 3: 23}), Table(), Memory()
    # By another tool, by a worker, under a worker's plan, and by nobody yet.
    kafka.committed = {0: (5, ""), 1: (6, "|known"), 2: (7, "planned:9|known")}
    told = metrics.OFFSETS_FOREIGN.labels("g")._value.get()
    async with worker(kafka, table, memory=memory):
        await until(lambda: all(kafka.committed.get(p, ("", ""))[0] == 20 + p for p in range(4)))
    assert sorted(memory.told) == [
        ("recall", 0, ""), ("recall", 1, "known"), ("recall", 2, "known"), ("recall", 3, ""), ("reread", 0, 20), ("reread", 3, 23),
    ]  # fmt: skip
    assert metrics.OFFSETS_FOREIGN.labels("g")._value.get() - told == 1, "nobody has set the last one"
    # From now on the offsets are a worker's own.
    again = Memory()
    async with worker(kafka, table, memory=again):
        await until(lambda: len(again.told) >= 4)
    assert {what for what, *_ in again.told} == {"recall"}


async def test_a_defect_that_is_bisected_keeps_every_part_planned(worker):
    kafka, table = Coordinator({0: 16}), Table()
    w = worker(kafka, table)
    w.before = [ValueError("defect")] * 9
    async with w:
        await until(lambda: kafka.committed.get(0) == (16, ""))
    assert len(table.rows) == len(set(table.rows)) >= 10


@pytest.mark.parametrize("seed", range(8))
async def test_crashes_at_random_points_leave_every_record_once(worker, seed):
    rng = random.Random(seed)
    kafka, table = Coordinator({p: rng.randrange(300) for p in range(3)}), Table()
    for _ in range(12):
        w = worker(kafka, table, records_max=rng.choice([3, 10, 40]))
        w.consumer.fetch_max = rng.choice([1, 5, 20])
        w.errors = [Retry("lost") for _ in range(rng.randrange(4))]
        w.before = [Retry("down") for _ in range(rng.randrange(3))]
        await w.__aenter__()
        await asyncio.sleep(rng.uniform(0, 0.03))
        if rng.random() < 0.3:
            await w.__aexit__()
        else:
            w.die()
        for p in kafka.ends:
            kafka.ends[p] += rng.randrange(40)
    async with worker(kafka, table):
        await until(lambda: all(kafka.committed.get(p) == (end, "") for p, end in kafka.ends.items() if end))
    assert sorted(table.rows) == [(p, o) for p, end in kafka.ends.items() for o in range(end)]
