"""Out of order, twice, cut anywhere, crashed anywhere: validate and aggregate tell the same in the end."""

import asyncio
from random import Random
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import S, StateTable, T, World, batch, catalogue, lines, live, message, reading, record

from preservarium import topics
from preservarium.stages.aggregate import Aggregation
from preservarium.stages.validate import Validation
from preservarium.streaming.stage import Tick

PARTITION = 3
LATENESS_S = 30
TEMP: dict[str, Any] = {
    "name": "temp", "kind": "number", "unit": "°C", "fail_span": {"min": -40, "max": 85},
    "tests": {
        "rate_of_change": {"threshold": 1, "fail_threshold": 3},
        "spike": {"suspect_threshold": 5, "fail_threshold": 20},
        "flat_line": {"suspect_threshold": 25, "fail_threshold": 60, "tolerance": 0.5},
        "gap": {"threshold": 40},
        "attenuated_signal": {"suspect_threshold": 0.4, "fail_threshold": 0.01, "test_period": 80},
    },
}  # fmt: skip
METER: dict[str, Any] = {"name": "meter", "kind": "number", "unit": "m³", "counter": {"width": 1_000}}


class Pipeline:
    """validate and aggregate of one partition, with what a store would hold of their output."""

    def __init__(self, **quality: Any) -> None:
        self.world = World(catalogue(("datatype", TEMP), ("datatype", METER)))
        self.live = live(
            quality={"lateness_s": LATENESS_S, **quality}, aggregate={"windows": "1m,5m/1m", "lateness_s": 0}
        )
        self.rows: dict[Any, Any] = {}
        self.windows: dict[str, Any] = {}
        self.released: list[Any] = []
        self.validated = 0
        self.standardized = 0
        self.start()

    def start(self) -> None:
        """A worker that knows nothing but the tables."""
        of = (self.world.known, self.world.documents, self.live, self.world.clock)
        self.validation = Validation(StateTable(self.world, "s"), *of)
        self.aggregation = Aggregation(StateTable(self.world, "w"), *of)
        self.first = True

    def put(self, lines_of: list[list[Any]]) -> list[Any]:
        """Records of the topic that validate reads."""
        records = []
        for one in lines_of:
            records.append(record(self.standardized, *one))
            self.standardized += 1
        return records

    async def run(self, records: list[Any], *, crash: bool = False) -> None:
        effects = await self.validation(batch(topics.STANDARDIZED, *records))
        if crash:
            # Sent and acknowledged, but neither state nor offset were written: the same batch comes again.
            await self.downstream(effects.sends)
            self.start()
            effects = await self.validation(batch(topics.STANDARDIZED, *records))
        await self.downstream(self.world.carry_out(effects, PARTITION))

    async def downstream(self, sends: list[Any]) -> None:
        records = []
        for value in (s.value for s in sends if s.topic is topics.VALIDATED):
            records.append(record(self.validated, *value.split(b"\n")))
            self.validated += 1
            for line in value.split(b"\n"):
                self.store(orjson.loads(line))
        if records:
            effects = await self.aggregation(batch(topics.VALIDATED, *records))
            for window in lines(self.world.carry_out(effects, PARTITION), topics.AGGREGATES):
                kept = {k: v for k, v in window.items() if k not in ("revision", "closed_by")}
                if self.windows.get(window["window_id"], (-1,))[0] <= window["revision"]:
                    self.windows[window["window_id"]] = (window["revision"], kept)

    def store(self, line: Any) -> None:
        self.released.append(line)
        for one in line["readings"]:
            key = (line["device_id"], one["component_type"], one.get("timestamp", line["timestamp"]))
            if key not in self.rows or one.get("revised"):
                self.rows[key] = (one["value"], one["quality"], tuple(one.get("flags", ())))

    async def silence(self) -> None:
        for _ in range(2):  # the first of a new owner finds what is held
            self.world.clock.advance(3_600)
            tick = Tick(PARTITION, self.world.clock.now_us(), self.first, behind=False)
            self.first = False
            effects = await self.validation.tick(tick)
            sends = self.world.carry_out(effects, PARTITION)
            if sends:
                await self.run(self.put([[s.value] for s in sends]))

    def told(self) -> tuple[Any, Any]:
        return self.rows, {name: window for name, (_, window) in self.windows.items()}


def sent(seed: int, count: int) -> list[tuple[float, dict[str, Any]]]:
    """(seconds, readings) in event-time order: drifts, steps, spikes, flat stretches, and a counter that rolls over."""
    rng = Random(seed)
    at, value, meter, history = 0.0, 20.0, rng.choice([0, 950]), []
    for _ in range(count):
        at += rng.choice([1, 5, 10, 10, 20, 60])
        value += rng.choice([0, 0, 0, rng.uniform(-1, 1), rng.choice([-30, 30])])
        meter = (meter + rng.randint(0, 9)) % 1_000
        history.append((at, {"temp": value, "meter": meter}))
    return history


def standardized(raw_offset: int, at: float, values: dict[str, Any]) -> Any:
    readings = [reading(values["temp"]), reading(values["meter"], "meter", "m³")]
    return message(raw_offset, *readings, at=at, clock="device")


async def in_order(history: list[tuple[float, dict[str, Any]]]) -> tuple[Any, Any]:
    pipeline = Pipeline()
    for offset, one in enumerate(history):
        await pipeline.run(pipeline.put([[standardized(offset, *one)]]))
    await pipeline.silence()
    return pipeline.told()


async def disturbed(history: list[tuple[float, dict[str, Any]]], rng: Random) -> tuple[Any, Any]:
    arrivals = [(at + rng.uniform(0, LATENESS_S - 0.001), at, values) for at, values in history]
    again = [(when + rng.uniform(0, 20), at, values) for when, at, values in arrivals if rng.random() < 0.2]
    arrivals = sorted(arrivals + again, key=lambda one: one[0])
    messages = [standardized(offset, at, values) for offset, (_, at, values) in enumerate(arrivals)]
    pipeline = Pipeline()
    position = 0
    while position < len(messages):
        records = []
        for _ in range(rng.randint(1, 4)):
            size = rng.randint(1, 3)
            records.append(messages[position : position + size])
            position += size
            if rng.random() < 0.2:  # normalize crashed, and sent a record again
                records.append(records[rng.randrange(len(records))])
        await pipeline.run(pipeline.put([one for one in records if one]), crash=rng.random() < 0.3)
    await pipeline.silence()
    return pipeline.told()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 60))
def test_order_copies_cuts_and_crashes_make_no_difference(seed: int, count: int) -> None:
    history = sent(seed, count)
    rows, windows = asyncio.run(in_order(history))
    assert rows
    assert len({key for key in rows if key[1] == "meter_consumption"}) == count - 1
    assert asyncio.run(disturbed(history, Random(seed + 1))) == (rows, windows)


async def test_without_lateness_nothing_waits_and_nothing_is_stamped():
    pipeline = Pipeline(lateness_s=0)
    history = sent(1, 5)
    for offset, place in enumerate((0, 2, 1, 3, 4)):
        await pipeline.run(pipeline.put([[standardized(offset, *history[place])]]))
    assert [m["raw_offset"] for m in pipeline.released] == [0, 1, 2, 3, 4]
    assert not any("released" in m for m in pipeline.released)


async def test_what_is_held_goes_on_when_the_watermark_passes():
    pipeline = Pipeline()
    for offset, at in ((0, 10.0), (1, 5.0), (2, 39.9)):
        await pipeline.run(pipeline.put([[standardized(offset, at, {"temp": 20.0, "meter": 1})]]))
    assert [m["raw_offset"] for m in pipeline.released] == [1]  # 39.9 − 30 has passed 5
    await pipeline.run(pipeline.put([[standardized(3, 40.0, {"temp": 20.0, "meter": 1})]]))
    assert [(m["raw_offset"], m["released"]) for m in pipeline.released] == [(1, [2, 0]), (0, [3, 0])]


async def test_what_is_later_than_allowed_goes_on_at_once():
    pipeline = Pipeline()
    for offset, at in ((0, 0.0), (1, 100.0), (2, 50.0)):
        await pipeline.run(pipeline.put([[standardized(offset, at, {"temp": 20.0, "meter": 1})]]))
    assert [m["raw_offset"] for m in pipeline.released] == [0, 2]


async def test_a_silent_device_is_told_through_the_log_also_by_the_next_owner():
    pipeline = Pipeline()
    await pipeline.run(pipeline.put([[standardized(0, 0.0, {"temp": 20.0, "meter": 1})]]))
    pipeline.start()
    now = pipeline.world.clock.now_us()
    assert (await pipeline.validation.tick(Tick(PARTITION, now, True, False))).sends == []
    later = now + LATENESS_S * S
    assert (await pipeline.validation.tick(Tick(PARTITION, later, False, True))).sends == []
    effects = await pipeline.validation.tick(Tick(PARTITION, later, False, False))
    (send,) = effects.sends
    assert (send.topic, send.key, send.partition) == (topics.STANDARDIZED, b"dev-1", PARTITION)
    # Not carried out: it is told again.
    assert len((await pipeline.validation.tick(Tick(PARTITION, later, False, False))).sends) == 1
    pipeline.world.carry_out(effects, PARTITION)
    assert (await pipeline.validation.tick(Tick(PARTITION, later, False, False))).sends == []
    assert pipeline.released == []
    # What came after the record was written goes on waiting.
    (silent,) = pipeline.put([[send.value]])
    await pipeline.run(pipeline.put([[standardized(1, 1.0, {"temp": 20.0, "meter": 1})]]))
    await pipeline.run([silent])
    assert [m["raw_offset"] for m in pipeline.released] == [0]


async def test_too_many_held_let_the_oldest_go():
    pipeline = Pipeline(held_per_device_max=2)
    for offset, at in ((0, 3.0), (1, 1.0), (2, 2.0)):
        await pipeline.run(pipeline.put([[standardized(offset, at, {"temp": 20.0, "meter": 1})]]))
    assert [m["raw_offset"] for m in pipeline.released] == [1]


async def test_a_device_may_have_a_lateness_of_its_own():
    pipeline = Pipeline()
    pipeline.world.devices["dev-1"] = {"device_id": "dev-1", "rev": 1, "type": "t", "enabled": True, "lateness_s": 0}
    await pipeline.run(pipeline.put([[standardized(0, 0.0, {"temp": 20.0, "meter": 1})]]))
    assert [m["raw_offset"] for m in pipeline.released] == [0]


async def test_a_message_sent_twice_passes_without_its_readings():
    pipeline = Pipeline(lateness_s=0)
    first, again = (standardized(offset, 1.0, {"temp": 20.0, "meter": 1}) for offset in (0, 1))
    other = standardized(2, 2.0, {"temp": 21.0, "meter": 1})
    given_readings = orjson.loads(orjson.dumps(again["readings"]))
    for one in (first, again, other):
        await pipeline.run(pipeline.put([[one]]))
    assert [len(m["readings"]) for m in pipeline.released] == [2, 0, 3]  # with what the meter consumed
    assert pipeline.released[1]["repeated"] == given_readings


async def test_a_redrive_is_no_repeat():
    pipeline = Pipeline(lateness_s=0)
    one = standardized(0, 1.0, {"temp": 20.0, "meter": 1})
    again = {**standardized(1, 1.0, {"temp": 20.0, "meter": 1}), "attempt": 2}
    for line in (one, again, {**again, "raw_offset": 2}):
        await pipeline.run(pipeline.put([[line]]))
    assert [len(m["readings"]) for m in pipeline.released] == [2, 2, 0]


async def test_no_more_is_remembered_than_the_settings_say():
    pipeline = Pipeline(lateness_s=0, repeats_remembered=2)
    for offset, at in enumerate((1.0, 2.0, 3.0, 1.0, 3.0)):
        await pipeline.run(pipeline.put([[standardized(offset, at, {"temp": 20.0, "meter": 1})]]))
    assert ["repeated" in m for m in pipeline.released] == [False, False, False, False, True]


async def test_without_a_clock_of_its_own_nothing_is_a_repeat():
    pipeline = Pipeline(lateness_s=0)
    for offset in (0, 1):
        one = {**standardized(offset, 1.0, {"temp": 20.0, "meter": 1}), "clock": "received"}
        await pipeline.run(pipeline.put([[one]]))
    assert [len(m["readings"]) for m in pipeline.released] == [2, 3]  # with what the meter consumed
    first, second = pipeline.released
    assert second["timestamp"] == first["timestamp"] + 1
    assert second["moved_from"] == first["timestamp"]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_messages_without_a_time_of_their_own_keep_their_order_and_each_its_row(records, random):
    """However many share a ms of Kafka's, however they are cut into batches, wherever it crashes."""
    at = sorted(ms for of_record in records for ms in of_record)
    places = iter(at)
    sent = [[next(places) for _ in of_record] for of_record in records]

    def run(cuts: bool) -> list[tuple[int, int]]:
        async def work() -> list[tuple[int, int]]:
            pipeline = Pipeline(lateness_s=0)
            lines_of, offset = [], 0
            for of_record in sent:
                lines_of.append([
                    {**standardized(offset + n, ms / 1_000, {"temp": 20.0, "meter": 1}), "clock": "received"}
                    for n, ms in enumerate(of_record)
                ])  # fmt: skip
                offset += len(of_record)
            waiting = pipeline.put(lines_of)
            while waiting:
                count = random.randint(1, len(waiting)) if cuts else len(waiting)
                await pipeline.run(waiting[:count], crash=cuts and random.random() < 0.3)
                waiting = waiting[count:]
            return [(m["raw_offset"], m["timestamp"]) for m in {m["raw_offset"]: m for m in pipeline.released}.values()]

        return asyncio.run(work())

    whole = run(cuts=False)
    assert whole == run(cuts=True)
    instants = [at for _, at in sorted(whole)]
    assert len(whole) == len(at)
    assert instants == sorted(set(instants))
    assert all(0 <= given - ms * 1_000 - T < 1_000 for given, ms in zip(instants, at, strict=True))
