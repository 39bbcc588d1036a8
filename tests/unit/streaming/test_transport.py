"""Lanes: order, back-pressure a partition, positions, and what a stop abandons."""

import asyncio
from collections.abc import Sequence
from functools import partial
from time import monotonic, time
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from faust.types import TP
from record_fakes import Rec
from structlog.testing import capture_logs

from preservarium import metrics
from preservarium.clock import SystemClock
from preservarium.errors import Fatal, Retry
from preservarium.settings import Agents, LiveSettings, Settings
from preservarium.streaming import kafka_clients, transport
from preservarium.streaming.lanes import Fetched, Lane, Stage, Stages
from preservarium.streaming.runner import Runner
from preservarium.streaming.stage import Batch, Effects, Tick
from preservarium.streaming.transport import BatchConsumer, BatchConsumerThread, Fetch, _fetchable


class Feed:
    """One stage whose handler waits until it is let go."""

    def __init__(self, *, name: str = "lanes", **agents: Any) -> None:
        self.live = LiveSettings(Settings(agents=Agents(**{"pending_records_max": 100, "backoff_s": 0.001, **agents})))
        self.calls: list[tuple[int, list[int]]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.began = asyncio.Event()
        self.error: Exception | None = None
        self.sent = 0

        async def handler(batches: Sequence[Batch]) -> Effects:
            (batch,) = batches
            self.calls.append((batch.partition, [r.offset for r in batch.records]))
            self.began.set()
            await self.go.wait()
            if self.error is not None:
                raise self.error
            return Effects()

        async def put(table: str, partition: int, items: Any) -> None:
            raise AssertionError

        runner = Runner(name, handler, publisher=self, put_state=put, live=self.live, clock=SystemClock())
        self.stage = Stage(name, "iot_raw_data", runner, self.live)
        self.stages = Stages()
        self.stages.add("x.iot_raw_data", self.stage)

    async def publish(self, sends: Sequence[Any]) -> dict[str, int]:
        self.sent += len(sends)
        return {}

    def push(self, partition: int, *offsets: int) -> Lane:
        lane = self.stage.lane(partition)
        lane.push([Rec(o) for o in offsets])
        return lane

    def position(self, partition: int) -> int | None:
        return self.stages.position(TP("x.iot_raw_data", partition))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_fetches_of_one_partition_are_merged_and_processed_in_order() -> None:
    feed = Feed(records_max=5)
    feed.go.clear()
    feed.push(0, 1)
    await feed.began.wait()
    feed.push(0, 2, 3)
    feed.push(0, 4, 5)
    feed.push(0, 6, 7)
    feed.go.set()
    await until(lambda: feed.position(0) == 8)
    assert feed.calls == [(0, [1]), (0, [2, 3, 4, 5]), (0, [6, 7])]


async def test_a_fetch_larger_than_a_batch_is_split() -> None:
    feed = Feed(records_max=2)
    feed.push(0, 1, 2, 3, 4, 5)
    await until(lambda: feed.position(0) == 6)
    assert feed.calls == [(0, [1, 2]), (0, [3, 4]), (0, [5])]


async def test_partitions_run_concurrently() -> None:
    feed = Feed()
    feed.go.clear()
    feed.push(0, 1)
    feed.push(1, 1)
    await settle()
    assert sorted(feed.calls) == [(0, [1]), (1, [1])]
    feed.go.set()
    await until(lambda: feed.position(0) == feed.position(1) == 2)


async def test_what_is_delivered_twice_is_processed_once() -> None:
    feed = Feed()
    feed.push(0, 1, 2, 3)
    feed.push(0, 2, 3, 4)
    feed.push(0, 3, 4)
    await until(lambda: feed.position(0) == 5)
    assert [o for _, offsets in feed.calls for o in offsets] == [1, 2, 3, 4]


async def test_gaps_of_compacted_topics_are_no_obstacle() -> None:
    feed = Feed()
    feed.push(0, 1, 5, 9)
    await until(lambda: feed.position(0) == 10)


async def test_a_position_is_known_only_when_something_is_finished() -> None:
    feed = Feed()
    assert feed.position(0) is None
    feed.go.clear()
    feed.push(0, 7)
    await settle()
    assert feed.position(0) is None
    feed.go.set()
    await until(lambda: feed.position(0) == 8)


async def test_a_full_partition_is_left_out_of_fetching_and_others_go_on() -> None:
    feed = Feed(pending_records_max=100)
    feed.go.clear()
    full = feed.push(0, 0)
    await feed.began.wait()
    feed.push(0, *range(1, 101))
    other = feed.push(1, *range(50))
    assert not _fetchable([full])
    assert _fetchable([other])
    assert _fetchable([]), "a partition that nothing came from yet"
    feed.go.set()
    await until(lambda: feed.position(0) == 101)
    assert _fetchable([full])


async def test_a_partition_that_waits_for_a_dependency_is_left_out_of_fetching() -> None:
    feed = Feed(backoff_s=10)
    feed.error = Retry("down")
    lane = feed.push(0, 1)
    await until(lambda: lane.progress.paused)
    assert not _fetchable([lane])
    other = Feed(name="other").push(0, 1)
    assert _fetchable([lane, other]), "for the sake of another stage on the topic, until this one is full"
    lane.push([Rec(o) for o in range(2, 200)])
    assert not _fetchable([lane, other])
    await lane.close(0)


async def test_two_stages_on_a_topic_commit_what_both_have_finished() -> None:
    feed, slow = Feed(), Feed(name="slow")
    feed.stages.add("x.iot_raw_data", slow.stage)
    slow.go.clear()
    feed.push(0, 1, 2, 3)
    slow.push(0, 1)
    await until(lambda: feed.stage.lane(0).position == 4)
    assert feed.position(0) is None
    slow.go.set()
    await until(lambda: slow.stage.lane(0).position == 2)
    assert feed.position(0) == 2
    slow.push(0, 2, 3)
    await until(lambda: feed.position(0) == 4)


async def test_a_stop_waits_for_the_batch_under_way_and_drops_what_waits() -> None:
    feed = Feed()
    feed.go.clear()
    lane = feed.push(0, 1)
    await feed.began.wait()
    feed.push(0, 2)
    closing = asyncio.create_task(feed.stage.close_lanes(wait_s=5))
    await settle()
    assert not closing.done()
    feed.go.set()
    await closing
    assert lane.position == 2, "finished within the wait: to be committed"
    assert feed.calls == [(0, [1])]
    lane.push([Rec(2)])
    await settle()
    assert feed.calls == [(0, [1])]


async def test_a_stop_abandons_a_batch_that_takes_too_long() -> None:
    feed = Feed()
    feed.go.clear()
    lane = feed.push(0, 1)
    await feed.began.wait()
    await feed.stage.close_lanes(wait_s=0.01)
    assert lane.position is None
    assert feed.position(0) is None


async def test_a_stop_does_not_wait_for_a_dependency() -> None:
    feed = Feed(backoff_s=60)
    feed.error = Retry("down")
    lane = feed.push(0, 1)
    await until(lambda: lane.progress.paused)
    async with asyncio.timeout(1):
        await feed.stage.close_lanes(wait_s=30)
    assert lane.position is None


async def test_a_dropped_lane_starts_anew() -> None:
    feed = Feed()
    feed.push(0, 5)
    await until(lambda: feed.position(0) == 6)
    await feed.stage.close_lanes()
    feed.stage.drop([0])
    assert feed.position(0) is None
    feed.push(0, 2)
    await until(lambda: feed.position(0) == 3)


async def test_a_fatal_error_ends_the_agent() -> None:
    feed = Feed()
    feed.error = Fatal("no way on")

    class Channel:
        iterated = False

        def __aiter__(self) -> None:
            self.iterated = True

    class Stream:
        channel = Channel()

    body = asyncio.create_task(feed.stage.run(Stream()))
    await settle()
    assert Stream.channel.iterated, "the topic is subscribed"
    feed.push(0, 1)
    with pytest.raises(Fatal, match="no way on"):
        await body
    assert feed.position(0) is None


async def test_an_acknowledgement_that_goes_back_is_a_programming_error() -> None:
    feed = Feed()
    lane = feed.stage.lane(0)
    lane._ack(Batch("iot_raw_data", 0, [Rec(5)]))
    with pytest.raises(Fatal, match="acknowledged 6 after 6"):
        lane._ack(Batch("iot_raw_data", 0, [Rec(5)]))


async def test_time_passes_for_a_partition_without_records_and_in_turn_with_its_batches() -> None:
    feed = Feed()
    ticks: list[Tick] = []
    fails = [RuntimeError("once")]
    working = False

    async def on_tick(tick: Tick) -> Effects:
        assert not working
        ticks.append(tick)
        if fails:
            raise fails.pop()
        return Effects([object()])  # type: ignore[list-item]

    feed.stage.on_tick, feed.stage.tick_s = on_tick, lambda: 0.005
    lane = feed.stage.lane(4)
    lane.start()
    await until(lambda: len(ticks) >= 3)
    # What failed is not repeated, and the next tick is still the first that was done.
    assert [t.first for t in ticks[:3]] == [True, True, False]
    assert {t.partition for t in ticks} == {4}
    assert lane.position is None
    assert not lane.uncommitted
    feed.go.clear()
    feed.push(4, 1, 2)
    await feed.began.wait()
    working = True
    feed.push(4, 3)
    await asyncio.sleep(0.02)
    working = False
    count = len(ticks)
    feed.go.set()
    await until(lambda: feed.position(4) == 4)
    await until(lambda: len(ticks) > count)
    assert any(t.behind for t in ticks)
    assert feed.sent == len(ticks) - 1
    await lane.close(1)
    count = len(ticks)
    await asyncio.sleep(0.02)
    assert len(ticks) == count


async def test_no_time_passes_while_the_clock_is_wrong_and_batches_go_on() -> None:
    feed = Feed()
    ticks: list[Tick] = []
    sound = True

    async def on_tick(tick: Tick) -> Effects:
        ticks.append(tick)
        return Effects()

    feed.stage.on_tick, feed.stage.tick_s = on_tick, lambda: 0.005
    feed.stage.runner.clock_is_sound = lambda: sound
    feed.stage.lane(4).start()
    await until(lambda: len(ticks) >= 2)
    sound = False
    await asyncio.sleep(0.02)
    count = len(ticks)
    feed.push(4, 1)
    await until(lambda: feed.position(4) == 2)
    await asyncio.sleep(0.03)
    assert len(ticks) == count
    sound = True
    await until(lambda: len(ticks) > count)


async def test_a_tick_knows_what_waits_in_kafka_here_and_before() -> None:
    before, feed = Feed(name="before"), Feed(name="after")
    feed.stage.after, feed.stage.topic_full = ["x.iot_raw_data"], "x.late"
    stages = before.stages
    stages.add("x.late", feed.stage)
    known: dict[TP, Fetched | None] = {}
    stages.watch(known.get)
    first, last = TP("x.iot_raw_data", 0), TP("x.late", 0)

    def handled(at: Fetched | None, and_at: Fetched | None) -> int | None:
        known.update({first: at, last: and_at})
        return feed.stage.handled_us(0)

    soon_s = monotonic() + 60  # of fetches that are asked for after all that happens here

    def about(found_us: int | None, asked_s: float) -> bool:
        return found_us is not None and abs(found_us / 1e6 - time() - (asked_s - monotonic())) < 0.1

    assert handled(None, None) is None
    assert handled(Fetched(None, 0, -1), None) is None  # assigned, not fetched
    assert about(handled(Fetched(soon_s - 70, 5, 5), Fetched(soon_s, 7, 7)), soon_s - 70)
    assert about(handled(None, Fetched(soon_s - 80, 7, 7)), soon_s - 80)  # another worker has the one before
    assert handled(Fetched(soon_s, 5, 6), Fetched(soon_s, 7, 7)) is None
    assert handled(Fetched(soon_s, 5, 5), Fetched(soon_s, 7, 9)) is None
    # A record that the stage before is working on, and then one that came of it.
    before.go.clear()
    lane = before.stage.lane(0)
    lane.expected = 5
    before.push(0, 5)
    await before.began.wait()
    assert handled(Fetched(soon_s, 6, 6), Fetched(soon_s, 7, 7)) is None
    before.go.set()
    await until(lambda: before.position(0) == 6)
    assert (
        handled(Fetched(soon_s, 6, 6), Fetched(lane.advanced_s - 0.01, 7, 7)) is None
    )  # asked before that was written
    assert about(handled(Fetched(soon_s, 6, 6), Fetched(soon_s, 7, 7)), soon_s)
    # The end of a transaction behind it is no record.
    lane.passed(7)
    assert about(handled(Fetched(soon_s, 7, 7), Fetched(soon_s, 7, 7)), soon_s)
    # What other stages do with the last topic is their own affair.
    other = Feed(name="other")
    stages.add("x.late", other.stage)
    other.stage.lane(0).expected = 3
    assert about(handled(Fetched(soon_s, 7, 7), Fetched(soon_s, 7, 7)), soon_s)
    await lane.close(1)


async def test_the_end_of_a_backlog_is_the_end_that_there_was_at_first() -> None:
    feed = Feed()
    feed.stage.topic_full = "x.iot_raw_data"
    tp = TP("x.iot_raw_data", 0)
    known: dict[TP, Fetched | None] = {}
    feed.stages.watch(known.get)

    def past(found: Fetched | None) -> bool:
        known[tp] = found
        return feed.stages.past_backlog("lanes", 0)

    assert past(None), "it is another worker's"
    assert not past(Fetched(None, 0, -1)), "it was not asked for yet"
    assert not past(Fetched(1.0, 5, 8))
    lane = feed.stage.lane(0)
    lane.expected = 5
    feed.go.clear()
    feed.push(0, 5, 6)
    assert not past(Fetched(1.0, 7, 8)), "they are being worked on"
    feed.go.set()
    await until(lambda: feed.position(0) == 7)
    assert not past(Fetched(1.0, 7, 8))
    lane.passed(8)
    assert past(Fetched(1.0, 9, 9)), "the end of a transaction is no record, and what came later is no backlog"
    await lane.close(1)
    feed.stage.drop([0])
    assert past(Fetched(2.0, 9, 9)), "assigned anew, and nothing is there"


async def test_a_tick_that_says_fatal_ends_the_worker() -> None:
    feed = Feed()

    async def on_tick(tick: Tick) -> Effects:
        raise Fatal("no")

    feed.stage.on_tick, feed.stage.tick_s = on_tick, lambda: 0.001
    feed.stage.lane(0).start()
    await until(lambda: feed.stage._error is not None)
    assert isinstance(feed.stage._error, Fatal)


async def test_the_consumers_thread_ends_also_where_the_consumer_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs:
        ended = ""

        async def stop(self) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.ended = "cancelled"
                raise

    monkeypatch.setattr(kafka_clients, "stop", partial(kafka_clients.stop, within_s=0.05))
    thread = object.__new__(BatchConsumerThread)
    thread._consumer = consumer = Hangs()
    async with asyncio.timeout(5):
        await thread.on_thread_stop()
    assert consumer.ended == "cancelled"


async def test_what_a_full_disk_does_not_take_of_a_changelog_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "RESTORE_RETRY_S", 0.0)
    consumer = BatchConsumer.__new__(BatchConsumer)
    given_back: list[Any] = []
    told: list[Any] = []
    full, other = TP("x-changelog", 0), TP("x-changelog", 1)

    def restore(tp: TP, records: list[Any]) -> list[Any]:
        if tp == full:
            raise Retry("no space for local state")
        return records[-1:]

    async def give_back(fetched: Any) -> None:
        given_back.append(fetched)

    async def deliver_stock(fetched: Any, _generation: int) -> None:
        told.append(fetched)

    consumer.app = SimpleNamespace(stages=Stages())
    consumer._delivered, consumer._sought = {}, False
    monkeypatch.setattr(consumer, "_restore", restore)
    monkeypatch.setattr(consumer, "_give_back", give_back)
    monkeypatch.setattr(consumer, "_deliver_stock", deliver_stock)
    await consumer._deliver(Fetch({full: [Rec(3), Rec(4)], other: [Rec(7), Rec(8)]}, {}), 1)
    assert [[record.offset for record in records] for records in given_back[0].values()] == [[3, 4]]
    assert list(given_back[0]) == [full]
    assert [{tp: [r.offset for r in records] for tp, records in told[0].items()}] == [{other: [8]}]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_nothing_reaches_a_lane_until_the_consumer_has_gone_back_to_the_commits(
    monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """A new lane would take the first records that come for its beginning, and pass over what the old one held below them."""
    consumer = BatchConsumer.__new__(BatchConsumer)
    topic, changelog = TP("t", 0), TP("x-changelog", 0)
    reached: list[Any] = []
    given_back: list[Any] = []

    class Closing:
        on_tick = None
        lanes: ClassVar[dict[int, Any]] = {}

        async def close_lanes(self, wait_s: float) -> None:
            # The fetch loop has its turn.
            await consumer._deliver(Fetch({topic: [Rec(62)], changelog: [Rec(7)]}, {topic: 63}), turn)

        def drop(self, partitions: list[int]) -> None:
            """Nothing is there."""

    class One(list[Any]):
        def of(self, name: str) -> list[Any]:
            return list(self) if name == "t" else []

        def watch(self, fetched: Any) -> None:
            """Nothing is fetched."""

    class Lane:
        def push(self, records: list[Any], after: int | None) -> None:
            reached.append([record.offset for record in records])

        def passed(self, position: int) -> None:
            reached.append(position)

    async def seek(_self: Any) -> None:
        if cancelled:
            raise asyncio.CancelledError

    async def give_back(fetched: Any) -> None:
        given_back.append({tp: [r.offset for r in records] for tp, records in fetched.items()})

    async def deliver_stock(fetched: Any, _turn: Any) -> None:
        reached.append(("restored", *fetched))

    consumer.app = SimpleNamespace(stages=One([Closing()]), consumer_generation_id=4)
    consumer.flow_active = True
    consumer._sought, consumer._seeks = True, 0
    consumer._delivered, consumer._held, consumer._read_offset = {}, {}, {topic: 54}
    monkeypatch.setattr(BatchConsumer.__mro__[1], "perform_seek", seek)
    monkeypatch.setattr(consumer, "assignment", set)
    monkeypatch.setattr(consumer, "_lane", lambda _stage, _tp: Lane())
    monkeypatch.setattr(consumer, "_restore", lambda _tp, records: records)
    monkeypatch.setattr(consumer, "_give_back", give_back)
    monkeypatch.setattr(consumer, "_deliver_stock", deliver_stock)
    turn = consumer._turn
    try:
        await consumer.perform_seek()
    except asyncio.CancelledError:
        assert cancelled
    # Tables go on being restored; nothing else is taken, and nothing is lost.
    assert reached == [("restored", changelog)]
    assert given_back == [{topic: [62]}]
    reached.clear()
    await consumer._deliver(Fetch({topic: [Rec(54)]}, {topic: 55}), consumer._turn)
    assert reached == ([] if cancelled else [[54]])
    # What was asked for before, and comes only now, is of the positions before.
    assert consumer._current(turn) == cancelled
    assert consumer._current(consumer._turn)


class Coordinator:
    """What a group has committed."""

    def __init__(self, committed: dict[Any, tuple[int, str]]) -> None:
        self.committed = committed

    async def fetch_committed_offsets(self, partitions: Sequence[Any]) -> dict[Any, Any]:
        return {tp: OffsetAndMetadata(*self.committed.get(tp, (-1, ""))) for tp in partitions}


class Committing:
    """A consumer, as far as commits go."""

    def __init__(self, ends: dict[Any, int], committed: dict[Any, tuple[int, str]]) -> None:
        self.ends = ends
        self._coordinator = Coordinator(committed)

    async def end_offsets(self, tps: Sequence[Any]) -> dict[Any, int]:
        return {tp: self.ends[tp] for tp in tps}

    async def commit(self, offsets: Any = None) -> None:
        self._coordinator.committed.update(offsets or {})


async def test_an_offset_that_no_worker_has_committed_is_told_once() -> None:
    parts = [TopicPartition("t", p) for p in range(4)]
    committed = {parts[0]: (5, "worker"), parts[1]: (3, ""), parts[2]: (10, "by hand")}
    inner = Committing(dict.fromkeys(parts, 10), committed)
    kafka_clients.mark_commits(inner)
    thread = BatchConsumerThread.__new__(BatchConsumerThread)
    thread._ensure_consumer = lambda: inner  # type: ignore[method-assign]

    async def call(what: Any, *arguments: Any) -> Any:
        return await what(*arguments)

    thread.call_thread = call  # type: ignore[method-assign]
    consumer = BatchConsumer.__new__(BatchConsumer)
    stages = SimpleNamespace(of=lambda topic: [topic] if topic == "t" else [])
    consumer.app = SimpleNamespace(conf=SimpleNamespace(id="told-once"), stages=stages)
    consumer._thread = thread
    consumer.assignment = lambda: {*(TP("t", p) for p in range(4)), TP("changelog", 0)}  # type: ignore[method-assign]
    counted = metrics.OFFSETS_FOREIGN.labels("told-once")._value.get
    with capture_logs() as logs:
        await consumer._look_for_foreign()
        # That of the second one was set back; the third stands at the end, where nothing comes again; the last has none.
        (line,) = logs
        assert (line["event"], line["offsets"], line["records"]) == ("offsets_set_from_outside", {"t-1": 3}, 7)
        assert "preservarium replay reset --stage normalize" in line["action"]
        assert counted() == 1
        await consumer._look_for_foreign()
    assert len(logs) == 1
    assert committed[parts[1]] == (3, "worker")


async def test_commits_are_marked_and_what_is_noted_beside_them_stays() -> None:
    parts = [TopicPartition("t", p) for p in range(3)]
    committed: dict[Any, tuple[int, str]] = {}
    inner = Committing({}, committed)
    kafka_clients.mark_commits(inner)
    await inner.commit({parts[0]: 4, parts[1]: (5, ""), parts[2]: OffsetAndMetadata(6, "planned:9")})
    assert committed == {parts[0]: (4, "worker"), parts[1]: (5, "worker"), parts[2]: (6, "planned:9")}
