"""Lanes: order, back-pressure a partition, positions, and what a stop abandons."""

import asyncio
from collections.abc import Sequence
from functools import partial
from time import monotonic, time
from typing import Any

import pytest
from faust.types import TP
from test_runner import Rec

from preservarium import kafka_clients
from preservarium.clock import SystemClock
from preservarium.domain.errors import Fatal, Retry
from preservarium.runner import Runner
from preservarium.settings import Agents, LiveSettings, Settings
from preservarium.stage import Batch, Effects, Tick
from preservarium.transport import ON_THE_WAY_S, BatchConsumerThread, Fetched, Lane, Stage, Stages, _fetchable


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

    soon_ms = round(time() * 1_000) + 60_000  # of fetches that are answered after all that happens here
    assert handled(None, None) is None
    assert handled(Fetched(0, 0, -1), None) is None  # assigned, not fetched
    assert handled(Fetched(70_000, 5, 5), Fetched(soon_ms, 7, 7)) == 70_000_000
    assert handled(None, Fetched(80_000, 7, 7)) == 80_000_000  # another worker has the one before
    assert handled(Fetched(soon_ms, 5, 6), Fetched(soon_ms, 7, 7)) is None
    assert handled(Fetched(soon_ms, 5, 5), Fetched(soon_ms, 7, 9)) is None
    # Records that the consumer has handed over and that did not get here yet, the first ones of the assignment.
    for _ in range(2):
        assert handled(Fetched(soon_ms, 6, 6, 5), Fetched(soon_ms, 7, 7)) is None
    # Or there are none, because they had become too old.
    stages._moved[first] = 6, monotonic() - ON_THE_WAY_S
    assert handled(Fetched(soon_ms, 6, 6, 5), Fetched(soon_ms, 7, 7)) == soon_ms * 1_000
    assert handled(Fetched(soon_ms, 6, 6, 6), Fetched(soon_ms, 7, 7)) == soon_ms * 1_000
    # A record that the stage before is working on, and then one that came of it.
    before.go.clear()
    lane = before.stage.lane(0)
    lane.expected = 5
    before.push(0, 5)
    await before.began.wait()
    assert handled(Fetched(soon_ms, 6, 6), Fetched(soon_ms, 7, 7)) is None
    before.go.set()
    await until(lambda: before.position(0) == 6)
    assert handled(Fetched(soon_ms, 6, 6), Fetched(1_000, 7, 7)) is None  # was asked before that was written
    assert handled(Fetched(soon_ms, 6, 6), Fetched(soon_ms, 7, 7)) == soon_ms * 1_000
    # Records that were fetched and did not get here yet.
    assert handled(Fetched(soon_ms, 7, 7), Fetched(soon_ms, 7, 7)) is None
    # What other stages do with the last topic is their own affair.
    other = Feed(name="other")
    stages.add("x.late", other.stage)
    other.stage.lane(0).expected = 3
    assert handled(Fetched(soon_ms, 6, 6), Fetched(soon_ms, 7, 7)) == soon_ms * 1_000
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
    assert not past(Fetched(0, 0, -1)), "it was not asked for yet"
    assert not past(Fetched(1, 5, 7, 5))
    assert not past(Fetched(1, 7, 7, 5)), "they are on their way here"
    lane = feed.stage.lane(0)
    lane.expected = 5
    feed.push(0, 5, 6)
    await until(lambda: feed.position(0) == 7)
    assert past(Fetched(1, 9, 9, 5)), "what came later is no backlog"
    await lane.close(1)
    feed.stage.drop([0])
    assert past(Fetched(2, 9, 9, 9)), "assigned anew, and nothing is there"


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
