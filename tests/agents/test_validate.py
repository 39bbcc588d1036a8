"""The validate stage: one record out for one in, state once a batch, failures told."""

from typing import Any

import orjson
import pytest
from quality_support import StateTable, World, batch, catalogue, errors, lines, live, message, offer, reading, record

from preservarium import topics
from preservarium.errors import Fatal, Retry
from preservarium.stages.validate import Validation
from preservarium.streaming.stage import RECORDS_A_TURN

TEMP: dict[str, Any] = {"name": "temp", "kind": "number", "unit": "°C", "fail_span": {"min": -40, "max": 85}}
STEEP: dict[str, Any] = {**TEMP, "name": "steep", "tests": {"rate_of_change": {"threshold": 1}}}


class Stage:
    def __init__(self, **settings: Any) -> None:
        self.world = World(catalogue(("datatype", TEMP), ("datatype", STEEP)))
        self.live = live(**settings)
        self.validation = Validation(
            StateTable(self.world, "s"), self.world.known, self.world.documents, self.live, self.world.clock
        )

    async def run(self, *records: Any, crash: bool = False) -> list[Any]:
        effects = await self.validation(batch(topics.STANDARDIZED, *records))
        self.effects = effects
        return effects.sends if crash else self.world.carry_out(effects, 3)


async def test_one_record_out_for_one_record_in():
    stage = Stage()
    one = message(1, reading(20.0))
    two = message(2, reading(21.0))
    sends = await stage.run(
        record(7, one, two, trace=b"00-ab", generation=b"0", other=b"x"), record(8, message(3, reading(90)))
    )
    assert len(sends) == 2
    (out,) = [s for s in sends if s.topic is topics.VALIDATED]
    assert (out.key, out.partition, out.headers) == (b"dev-1", 3, (("trace", b"00-ab"), ("generation", b"0")))
    flagged = [{**m, "readings": [{**m["readings"][0], "quality": 1}]} for m in (one, two)]
    assert lines(sends, topics.VALIDATED) == flagged
    assert stage.effects.refused == {"value_range": 1}


async def test_a_failed_reading_is_told_with_everything_to_redrive_it():
    stage = Stage()
    sends = await stage.run(record(8, message(3, reading(90), reading(20))))
    (line,) = lines(sends, topics.ERRORS)
    assert line["code"] == "value_range"
    assert (line["topic"], line["partition"], line["offset"], line["index"]) == ("iot_standardized_data", 3, 8, 0)
    assert (line["raw_partition"], line["raw_offset"], line["raw_index"]) == (3, 3, 0)
    assert (line["device_id"], line["parser"], line["config_rev"], line["generation"]) == ("dev-1", "p@1", 1, 0)
    raw = orjson.loads(line["raw"])
    assert [r["value"] for r in raw["readings"]] == [90]
    assert raw["readings"][0]["flags"] == ["gross_range"]
    assert [r["value"] for m in lines(sends, topics.VALIDATED) for r in m["readings"]] == [20]


async def test_the_settings_may_keep_what_failed():
    stage = Stage(quality={"store_failed": True})
    sends = await stage.run(record(8, message(3, reading(90))))
    assert len(errors(sends)) == 1
    assert [r["quality"] for m in lines(sends, topics.VALIDATED) for r in m["readings"]] == [4]


async def test_a_crash_before_the_state_is_written_sends_the_same_again_and_one_after_it_nothing():
    stage = Stage()
    records = [record(i, message(i, reading(20 + i, "steep"), at=i * 10)) for i in range(5)]
    first = await stage.run(*records, crash=True)
    again = await stage.run(*records)
    assert [s.value for s in first] == [s.value for s in again]
    assert await stage.run(*records) == []
    # And the next batch goes on from where the last one ended.
    more = await stage.run(*records[3:], record(5, message(5, reading(99, "steep", unit="°C"), at=41)))
    assert [m["raw_offset"] for m in lines(more, topics.VALIDATED)] == []
    assert errors(more) == [("value_range", "99 °C is outside -40 … 85")]


async def test_state_is_put_once_for_each_device():
    stage = Stage()
    await stage.run(*(record(i, message(i, reading(20.0), device=f"dev-{i % 2}")) for i in range(10)))
    assert sorted(stage.effects.puts["s"]) == [b"dev-0", b"dev-1"]


async def test_overrides_of_a_device_count_and_changes_are_seen():
    stage = Stage()
    stage.world.devices["dev-1"] = {
        "device_id": "dev-1", "rev": 1, "type": "box", "enabled": True, "datatypes": {"temp": {"fail_span": {"max": 10}}},
    }  # fmt: skip
    assert len(errors(await stage.run(record(1, message(1, reading(20)))))) == 1
    del stage.world.devices["dev-1"]["datatypes"]
    assert len(errors(await stage.run(record(2, message(2, reading(20)))))) == 1  # still remembered
    stage.validation.checks.forget("dev-1")
    assert errors(await stage.run(record(3, message(3, reading(20))))) == []
    offer(stage.world.documents, "datatype", **{**TEMP, "fail_span": {"min": 0, "max": 5}})
    assert len(errors(await stage.run(record(4, message(4, reading(20)))))) == 1
    offer(
        stage.world.documents, "type", name="box", manufacturer="m", parser="p", datatypes={"temp": {"fail_span": None}}
    )
    assert errors(await stage.run(record(5, message(5, reading(20))))) == []


async def test_a_bad_record_takes_nothing_with_it():
    stage = Stage()
    sends = await stage.run(record(1, b'{"torn'), record(2, message(2, reading(20))))
    assert [e[0] for e in errors(sends)] == ["envelope_not_json"]
    assert len(lines(sends, topics.VALIDATED)) == 1


async def test_a_record_that_outgrows_kafka_is_split():
    stage = Stage(kafka={"record_bytes_max": 10_000})
    many = [message(1, *[reading(20, pin_position=str(p)) for p in range(30)], raw_index=i) for i in range(8)]
    sends = await stage.run(record(1, *many))
    values = [s.value for s in sends if s.topic is topics.VALIDATED]
    assert len(values) > 1
    assert max(map(len, values)) < 10_000
    assert [m["raw_index"] for m in lines(sends, topics.VALIDATED)] == list(range(8))
    huge = message(2, *[reading(20, pin_position=str(p)) for p in range(200)])
    sends = await stage.run(record(2, huge, message(3, reading(1))))
    assert [e[0] for e in errors(sends)] == ["output_too_large"]
    assert [m["raw_offset"] for m in lines(sends, topics.VALIDATED)] == [3]


async def test_too_many_series_are_told_once():
    stage = Stage(quality={"series_per_device_max": 2})
    one = message(1, *[reading(20, "steep", pin_position=str(p)) for p in range(4)])
    sends = await stage.run(record(1, one), record(2, message(2, reading(20, "steep", pin_position="9"))))
    assert [e[0] for e in errors(sends)] == ["state_limit"]
    assert sum(len(m["readings"]) for m in lines(sends, topics.VALIDATED)) == 5


async def test_nothing_is_judged_before_the_catalogue_was_read():
    stage = Stage()
    stage.world.documents._ready.clear()

    async def not_yet(timeout_s: float = 0) -> None:
        raise Retry("not read")

    stage.world.documents.ready = not_yet  # type: ignore[method-assign]
    with pytest.raises(Retry):
        await stage.run(record(1, message(1, reading(20))))


async def test_state_of_a_newer_release_ends_the_worker():
    stage = Stage()
    stage.world.tables["s", 3, b"dev-1"] = orjson.dumps({"v": 99})
    with pytest.raises(Fatal):
        await stage.run(record(1, message(1, reading(20))))


async def test_a_large_batch_lets_others_run():
    stage = Stage()
    records = [record(i, message(i, reading(20), at=i)) for i in range(RECORDS_A_TURN * 2 + 1)]
    sends = await stage.run(*records)
    assert len(sends) == len(records)
    state = orjson.loads(stage.world.tables["s", 3, b"dev-1"])
    assert state["g"]["0"]["m"] == {"3": [RECORDS_A_TURN * 2, 0]}
