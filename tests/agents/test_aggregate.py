"""The aggregate stage: closed windows out, state once a batch, silent devices found, too many series told."""

from typing import Any

import orjson
import pytest
from quality_support import S, StateTable, T, World, batch, catalogue, errors, lines, live, message, reading, record

from preservarium import topics
from preservarium.errors import Fatal
from preservarium.stages.aggregate import Aggregation
from preservarium.streaming.stage import Tick

METER: dict[str, Any] = {"name": "meter", "kind": "number", "unit": "m³", "counter": {"width": 1_000}}
PARTITION = 3


class Stage:
    def __init__(self, world: World | None = None, **settings: Any) -> None:
        self.world = world or World(catalogue(("datatype", METER)))
        self.live = live(aggregate={"windows": "1m", "lateness_s": 0, "horizon_s": 600, **settings})
        self.aggregation = Aggregation(
            StateTable(self.world, "w"), self.world.known, self.world.documents, self.live, self.world.clock
        )
        self.first = True

    async def run(self, *records: Any) -> list[Any]:
        self.effects = await self.aggregation(batch(topics.VALIDATED, *records))
        return self.world.carry_out(self.effects, PARTITION)

    async def tick(self, *, behind: bool = False) -> list[Any]:
        tick = Tick(PARTITION, self.world.clock.now_us(), self.first, behind)
        self.first = False
        return lines(self.world.carry_out(await self.aggregation.tick(tick), PARTITION), topics.AGGREGATES)


def at(offset: int, seconds: float, value: Any = 1.0, device: str = "dev-1", **fields: Any) -> Any:
    start = T // (60 * S) * 60 * S
    one = message(offset, reading(value, **fields), device=device)
    return {**one, "timestamp": start + round(seconds * S)}


def meter_reading(offset: int, seconds: float, value: float, consumption: float | None) -> Any:
    """As validate tells it."""
    one = at(offset, seconds, value, component_type="meter", unit="m³")
    if consumption is not None:
        derived = {"timestamp": one["timestamp"], "derived": True}
        one["readings"].append(reading(consumption, "meter_consumption", "m³", **derived))
    return one


async def test_windows_go_where_the_reading_came_from_with_its_headers():
    stage = Stage()
    assert await stage.run(record(1, at(1, 0), generation=b"0", trace=b"00-a", other=b"x")) == []
    (send,) = await stage.run(record(2, at(2, 60), at(3, 120), generation=b"0", trace=b"00-a", other=b"x"))
    assert (send.topic, send.key, send.partition) == (topics.AGGREGATES, b"dev-1", PARTITION)
    assert dict(send.headers) == {"generation": b"0", "trace": b"00-a"}
    assert [line["sum"] for line in lines([send], topics.AGGREGATES)] == [1.0, 1.0]


async def test_state_is_put_once_for_each_device_and_a_run_again_sends_nothing():
    stage = Stage()
    records = [record(i, at(i, i * 10, device=f"dev-{i % 2}")) for i in range(10)]
    sends = await stage.run(*records)
    assert sorted(stage.effects.puts["w"]) == [b"dev-0", b"dev-1"]
    assert len(sends) == 2
    assert await stage.run(*records) == []


async def test_a_counter_of_the_catalogue_has_consumption():
    stage = Stage()
    stage.world.devices["dev-1"] = {
        "device_id": "dev-1", "rev": 1, "type": "t", "enabled": True,
        "datatypes": {"own": {"counter": {}}, "meter": {"description": "x"}},
    }  # fmt: skip
    values = [(0, 990, None), (10, 995, 5), (20, 5, 10), (61, 5, 0)]
    sends = await stage.run(*(record(i, meter_reading(i, *one)) for i, one in enumerate(values)))
    assert [line["consumption"] for line in lines(sends, topics.AGGREGATES) if "consumption" in line] == [15.0]


async def test_a_direction_of_the_catalogue_has_a_mean_and_no_extremes():
    wind = {"name": "wind_direction", "kind": "number", "unit": "°", "circular": 360}
    stage = Stage(World(catalogue(("datatype", wind))))
    sends = await stage.run(
        *(record(i, at(i, i, (1, 359)[i % 2], component_type="wind_direction", unit="°")) for i in range(62))
    )
    (window,) = lines(sends, topics.AGGREGATES)
    assert (window["mean"], window["circular"], "min" in window, "max" in window) == (0.0, 360.0, False, False)


async def test_silent_devices_are_found_also_after_a_restart():
    stage = Stage(silence_s=60)
    clock = stage.world.clock
    assert await stage.tick() == []
    await stage.run(record(1, at(1, 0)), record(2, at(2, 0, device="dev-2")))
    clock.advance(90)
    assert await stage.tick() == []  # the window ended 50 s ago: within the silence that is allowed
    clock.advance(20)
    await stage.run(record(3, at(3, 30, device="dev-2")))
    assert await stage.tick(behind=True) == []
    (window,) = await stage.tick()
    assert (window["device_id"], window["closed_by"]) == ("dev-1", "silence")
    assert await stage.tick() == []
    again = Stage(stage.world, silence_s=60)
    assert await again.tick() == []  # a worker that has just come waits as long as one that was there
    clock.advance(61)
    (window,) = await again.tick()
    assert (window["device_id"], window["count"]) == ("dev-2", 2)


async def test_too_many_series_are_told():
    stage = Stage(series_per_device_max=1)
    sends = await stage.run(record(1, at(1, 0), at(2, 1, pin_position="2"), at(3, 1, pin_position="3")))
    assert [code for code, _ in errors(sends)] == ["state_limit"]
    assert stage.effects.refused == {"state_limit": 1}


async def test_what_is_too_large_for_a_record_is_split():
    stage = Stage()
    stage.live = stage.aggregation._live = live(
        aggregate={"windows": "1m", "lateness_s": 0, "horizon_s": 600}, kafka={"record_bytes_max": 10_000}
    )
    many = {**at(1, 0), "readings": [reading(1.0, pin_position=str(p)) for p in range(40)]}
    sends = await stage.run(record(1, many), record(2, at(2, 100)))
    assert len(sends) > 1
    assert max(len(s.value) for s in sends) < 10_000
    assert len(lines(sends, topics.AGGREGATES)) == 40


async def test_state_of_a_newer_release_ends_the_worker():
    stage = Stage()
    stage.world.tables["w", PARTITION, b"dev-1"] = orjson.dumps({"v": 99})
    with pytest.raises(Fatal):
        await stage.run(record(1, at(1, 0)))


def test_windows_that_cannot_be_are_named_at_the_start():
    with pytest.raises(ValueError, match=r"PRESERVARIUM_AGGREGATE__WINDOWS.*multiple of the hop"):
        Stage(windows="1h/7m")
