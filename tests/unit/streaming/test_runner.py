"""What becomes of a batch: order of effects, retries, bisection, fuse."""

import asyncio
import gc
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from prometheus_client import REGISTRY
from record_fakes import Rec

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.errors import Fatal, ReasonCode, Reject, Retry
from preservarium.settings import Agents, LiveSettings, Settings
from preservarium.settings import Fuse as FuseSettings
from preservarium.streaming.runner import FuseBlown, Progress, Runner
from preservarium.streaming.stage import Batch, Effects, Send


def batch(*offsets: int, partition: int = 3) -> Batch:
    return Batch("iot_raw_data", partition, [Rec(o) for o in offsets])


def live(**agents: Any) -> LiveSettings:
    fuse = agents.pop("fuse", None)
    return LiveSettings(Settings(agents=Agents(**agents), **({"fuse": fuse} if fuse else {})))


class World:
    """Publisher, state and handler that write down what happens, in order."""

    def __init__(self, handler: Callable[[Sequence[Batch]], Effects], *, name: str = "test", **agents: Any) -> None:
        self.events: list[Any] = []
        self.acked: list[int] = []
        self.calls: list[list[int]] = []
        self.publish_errors: list[Exception] = []
        self.state_errors: list[Exception] = []
        self.clock = ManualClock()
        self.handler = handler
        self.sent: list[Send] = []
        self.runner = Runner(
            name, self._handle, publisher=self, put_state=self._put, live=live(**agents), clock=self.clock
        )

    async def _handle(self, batches: Sequence[Batch]) -> Effects:
        self.calls.append([r.offset for b in batches for r in b.records])
        return self.handler(batches)

    async def publish(self, sends: Sequence[Send]) -> dict[str, int]:
        if self.publish_errors:
            raise self.publish_errors.pop(0)
        self.sent += sends
        self.events.append("sends")
        return {"t": len(sends)}

    async def _put(self, table: str, partition: int, items: dict[bytes, bytes | None]) -> None:
        if self.state_errors:
            raise self.state_errors.pop(0)
        self.events.append(("put", table, partition, items))

    def _ack(self, done: Batch) -> None:
        self.events.append("ack")
        self.acked += [r.offset for r in done.records]

    async def run(self, *batches: Batch, **kwargs: Any) -> None:
        await self.runner.process(batches, self._ack, **kwargs)

    def errors(self) -> list[dict[str, Any]]:
        return [json.loads(s.value or b"") for s in self.sent if s.topic is topics.ERRORS]


def full(world: "World") -> Callable[[Sequence[Batch]], Effects]:
    def handler(batches: Sequence[Batch]) -> Effects:
        effects = Effects([Send(topics.STANDARDIZED, r.key, r.value) for b in batches for r in b.records])
        effects.put("states", b"k", b"v")
        effects.after.append(lambda: world.events.append("after"))
        return effects

    return handler


async def test_effects_are_carried_out_in_the_order_that_makes_a_crash_harmless() -> None:
    world = World(lambda _: Effects())
    world.handler = full(world)
    await world.run(batch(5, 6))
    assert world.events == ["sends", ("put", "states", 3, {b"k": b"v"}), "ack", "after"]


async def test_a_batch_whose_sends_fail_is_run_again_and_writes_no_state_before() -> None:
    world = World(lambda _: Effects())
    world.handler = full(world)
    world.publish_errors = [Retry("no Kafka"), Retry("no Kafka")]
    await world.run(batch(1))
    assert world.calls == [[1], [1], [1]]
    assert world.events == ["sends", ("put", "states", 3, {b"k": b"v"}), "ack", "after"]


async def test_a_batch_whose_state_fails_is_not_acknowledged() -> None:
    world = World(lambda _: Effects())
    world.handler = full(world)
    world.state_errors = [Retry("no changelog")]
    await world.run(batch(1))
    assert world.events == ["sends", "sends", ("put", "states", 3, {b"k": b"v"}), "ack", "after"]


async def test_a_dependency_that_is_down_is_waited_for_without_limit_and_longer_and_longer() -> None:
    left = [Retry("down")] * 50
    progress = Progress()
    paused: list[bool] = []

    def handler(_: Sequence[Batch]) -> Effects:
        paused.append(progress.paused)
        if left:
            raise left.pop()
        return Effects()

    world = World(handler, backoff_s=0.2, backoff_max_s=10)
    began_s = world.clock.monotonic_s()
    await world.run(batch(1, 2), progress=progress)
    assert world.acked == [1, 2]
    assert len(world.calls) == 51
    assert 40 * 5 < world.clock.monotonic_s() - began_s < 50 * 10
    assert paused == [False] + [True] * 50
    assert not progress.paused


async def test_a_fatal_error_is_passed_on_and_acknowledges_nothing() -> None:
    def handler(_: Sequence[Batch]) -> Effects:
        raise Fatal("no way on")

    world = World(handler)
    with pytest.raises(Fatal, match="no way on"):
        await world.run(batch(1))
    assert world.acked == []
    assert len(world.calls) == 1


@pytest.mark.parametrize("poison", [0, 1, 6, 7, 12])
async def test_the_one_record_that_fails_is_set_aside_and_the_rest_is_processed(poison: int) -> None:
    def handler(batches: Sequence[Batch]) -> Effects:
        if any(r.offset == poison for b in batches for r in b.records):
            raise KeyError("defect")
        return Effects([Send(topics.STANDARDIZED, r.key, b"%d" % r.offset) for b in batches for r in b.records])

    world = World(handler, attempts_max=3)
    await world.run(batch(*range(13)))
    assert world.acked == list(range(13)), "acknowledged once each, in order"
    passed = [int(s.value or b"") for s in world.sent if s.topic is topics.STANDARDIZED]
    assert passed == [o for o in range(13) if o != poison], "in order, once each"
    (line,) = world.errors()
    assert (line["code"], line["partition"], line["offset"], line["device_id"]) == ("handler_failed", 3, poison, "dev")
    assert line["raw_offset"] == poison
    assert "KeyError" in line["message"]
    assert world.calls[:3] == [list(range(13))] * 3, "the whole batch is tried attempts_max times first"


async def test_a_record_that_fails_by_chance_is_not_taken_for_poison() -> None:
    tries = iter([True, True, True, True, False])

    def handler(_: Sequence[Batch]) -> Effects:
        if next(tries):
            raise RuntimeError("chance")
        return Effects()

    world = World(handler, attempts_max=2)
    await world.run(batch(1, 2))  # twice whole; 1: fails, fails → …
    assert world.acked == [1, 2]
    assert [line["offset"] for line in world.errors()] == [1]


async def test_a_reject_out_of_the_handler_is_bisected_without_a_second_try() -> None:
    def handler(batches: Sequence[Batch]) -> Effects:
        if any(r.offset == 2 for b in batches for r in b.records):
            raise Reject(ReasonCode.OUTPUT_TOO_LARGE, "too much")
        return Effects()

    world = World(handler)
    await world.run(batch(1, 2, 3))
    assert world.acked == [1, 2, 3]
    (line,) = world.errors()
    assert (line["code"], line["message"], line["offset"]) == ("output_too_large", "too much", 2)
    assert world.calls.count([1, 2, 3]) == 1


async def test_poison_in_one_of_several_partitions_leaves_the_others_alone() -> None:
    def handler(batches: Sequence[Batch]) -> Effects:
        if any(b.partition == 4 for b in batches):
            raise RuntimeError("defect")
        return Effects()

    world = World(handler, attempts_max=1)
    await world.run(batch(1, partition=3), batch(1, partition=4), batch(1, partition=5))
    assert world.acked == [1, 1, 1]
    assert [line["partition"] for line in world.errors()] == [4]


async def test_before_a_retry_the_feed_says_what_is_left() -> None:
    left = [Retry("the commit's answer was lost")]

    def handler(_: Sequence[Batch]) -> Effects:
        if left:
            raise left.pop()
        return Effects()

    async def recheck(batches: Sequence[Batch]) -> Sequence[Batch]:
        return [Batch(b.topic, b.partition, b.records[1:]) for b in batches]

    world = World(handler)
    await world.run(batch(1, 2, 3), recheck=recheck)
    assert world.calls == [[1, 2, 3], [2, 3]]


async def test_nothing_left_after_a_recheck_ends_the_work() -> None:
    def handler(_: Sequence[Batch]) -> Effects:
        raise Retry("answer lost")

    async def recheck(_: Sequence[Batch]) -> Sequence[Batch]:
        return []

    world = World(handler)
    await world.run(batch(1), recheck=recheck)
    assert world.calls == [[1]]


async def test_an_after_effect_that_raises_stops_nothing() -> None:
    def boom() -> None:
        raise ValueError("cache")

    effects = Effects(after=[boom])
    world = World(lambda _: effects)
    effects.after.append(lambda: world.events.append("second"))
    await world.run(batch(1))
    assert world.events == ["ack", "second"]


async def test_what_a_batch_took_is_free_when_it_is_done_without_the_cycle_collector() -> None:
    class Work:
        """As the stages have it: it knows its effects, and they call it."""

        def __init__(self) -> None:
            self.effects = Effects(after=[self.count])

        def count(self) -> None:
            counted.append(1)

    counted: list[int] = []
    works: list[weakref.ref[Work]] = []

    def handler(_: Sequence[Batch]) -> Effects:
        work = Work()
        works.append(weakref.ref(work))
        return work.effects

    world = World(handler)
    gc.disable()
    try:
        await world.run(batch(1))
        await world.run(batch(2))
        alive = [work() for work in works]
    finally:
        gc.enable()
    assert counted == [1, 1]
    assert alive == [None, None]


async def test_the_fuse_stops_before_anything_is_sent_and_goes_on_when_reset() -> None:
    settings = FuseSettings(window_records=10, invalid_ratio_max=0.5, codes="handler_failed")

    def handler(batches: Sequence[Batch]) -> Effects:
        records = [r for b in batches for r in b.records]
        return Effects(
            [Send(topics.ERRORS, None, b'{"n":%d}' % r.offset) for r in records],
            refused={"handler_failed": len(records)},
        )

    world = World(handler, fuse=settings, name="fused")
    progress = Progress()
    task = asyncio.create_task(world.run(batch(*range(6)), progress=progress))
    while not world.runner.fuse.blown:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert progress.paused
    assert "6 of the last 6" in progress.reason
    assert world.sent == []
    assert REGISTRY.get_sample_value("preservarium_fuse_blown", {"stage": "fused"}) == 1
    world.handler = lambda _: Effects()
    world.runner.fuse.reset()
    await task
    assert world.acked == list(range(6))
    assert REGISTRY.get_sample_value("preservarium_fuse_blown", {"stage": "fused"}) == 0


@pytest.mark.parametrize(
    ("batches", "blows"),
    [
        ([(100, 0), (10, 10)], False),  # 10 refused are less than half of the window of 100
        ([(40, 40), (11, 11)], True),
        ([(1000, 0), (60, 60)], True),  # what is older than the window does not dilute it
        ([(200, 60)], False),  # one large batch: 60 are over half the window, but a third of what was looked at
        ([(10, 10)] * 5, False),  # 50 is not more than half of 100
        ([(10, 10)] * 6, True),
    ],
)
def test_the_fuse_counts_over_a_window(batches: list[tuple[int, int]], blows: bool) -> None:
    world = World(lambda _: Effects(), fuse=FuseSettings(window_records=100, invalid_ratio_max=0.5, codes="a,b"))
    fuse = world.runner.fuse

    def feed() -> None:
        for records, refused in batches:
            fuse.check(records, {"b": refused, "other": 1_000})

    if blows:
        with pytest.raises(FuseBlown):
            feed()
    else:
        feed()
    assert fuse.blown is blows
    report = fuse.report()
    assert (report["blown"], report["refused_max"], bool(report["reason"])) == (blows, 50, blows)
    assert (report["refused"] > 50) is blows


async def test_a_release_that_fails_on_everything_trips_the_fuse_soon() -> None:
    def handler(_: Sequence[Batch]) -> Effects:
        raise RuntimeError("bad release")

    world = World(handler, fuse=FuseSettings(window_records=100), attempts_max=5)
    task = asyncio.create_task(world.run(batch(*range(500))))
    while not world.runner.fuse.blown:
        await asyncio.sleep(0)
    assert len(world.errors()) == 50, "half of the window, not the topic"
    assert world.clock.monotonic_s() < 30, "patience with single records ends when they all fail"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.acked == list(range(50))


async def test_cancellation_abandons_the_batch_unacknowledged() -> None:
    began = asyncio.Event()

    class Slow(World):
        async def publish(self, sends: Sequence[Send]) -> dict[str, int]:
            began.set()
            await asyncio.Event().wait()
            return {}

    world = Slow(lambda b: Effects([Send(topics.STANDARDIZED, b"k", b"v")]))
    task = asyncio.create_task(world.run(batch(1)))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.acked == []
