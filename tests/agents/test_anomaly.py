"""The anomaly stage: alerts of the series that the registry has judged, the same for any batches and after a crash."""

import os
import pickle
import random
from base64 import b85encode
from typing import Any

import orjson
import pytest
from quality_support import S, StateTable, World, batch, catalogue, errors, lines, live, message, offer, reading, record

from preservarium import topics
from preservarium.domain.quality.anomaly import Detector, detector_of, judge, new_series
from preservarium.domain.quality.checks import compile_checks
from preservarium.errors import Fatal
from preservarium.stages.anomaly import Detection
from preservarium.stages.river_models import MODELS_PER_DEVICE_MAX, RiverModel

TEMP: dict[str, Any] = {
    "name": "temp", "kind": "number", "unit": "°C", "tests": {"anomaly": {"warm_up": 50, "window": 32, "seasonal": False}},
}  # fmt: skip
OTHER: dict[str, Any] = {"name": "other", "kind": "number", "unit": "°C"}


class Stage:
    def __init__(self, **settings: Any) -> None:
        self.world = World(catalogue(("datatype", TEMP), ("datatype", OTHER)))
        self.detection = Detection(
            StateTable(self.world, "a"),
            self.world.known,
            self.world.documents,
            live(anomaly=settings),
            self.world.clock,
        )

    async def run(self, *records: Any, crash: bool = False) -> list[Any]:
        self.effects = await self.detection(batch(topics.VALIDATED, *records))
        return self.effects.sends if crash else self.world.carry_out(self.effects, 3)


def history(n: int = 200, *, component_type: str = "temp") -> list[Any]:
    rng = random.Random(7)
    values = [20 + rng.gauss(0, 0.5) + (15 if 120 <= i < 140 else 0) for i in range(n)]
    return [record(i, message(i, reading(v, component_type), at=i * 60)) for i, v in enumerate(values)]


async def test_an_anomaly_begins_and_ends():
    stage = Stage()
    sends = await stage.run(*history())
    begins, ends = lines(sends, topics.ANOMALIES)
    assert (begins["state"], ends["state"]) == ("begins", "ends")
    assert 120 <= begins["raw_offset"] <= 122
    assert 140 <= ends["raw_offset"] <= 165
    assert begins["score"] > begins["threshold"] == 2.5
    assert begins["expected"] == pytest.approx(20, abs=1)
    assert {s.key for s in sends} == {b"dev-1"}
    assert {s.partition for s in sends} == {3}
    assert len(orjson.dumps(stage.world.tables["a", 3, b"dev-1"].decode())) < 2_048


async def test_batches_crashes_and_runs_again_make_no_difference():
    records = history()
    once = lines(await Stage().run(*records), topics.ANOMALIES)
    stage, found = Stage(), []
    for start in range(0, 200, 7):
        part = records[max(0, start - 3) : start + 7]  # some of it once more
        crashed = await stage.run(*part, crash=True)
        again = await stage.run(*part)
        assert [s.value for s in crashed] == [s.value for s in again]
        found += lines(again, topics.ANOMALIES)
    assert found == once


async def test_what_is_not_configured_costs_no_state():
    stage = Stage()
    assert await stage.run(*history(component_type="other")) == []
    assert stage.world.tables == {}


async def test_too_many_series_are_told_once():
    stage = Stage(series_per_device_max=1)
    sends = await stage.run(*(record(i, message(i, reading(1.0, pin_position=str(i)))) for i in range(3)))
    assert [code for code, _ in errors(sends)] == ["state_limit"]


def test_seasons_are_learned_by_the_hour():
    rng = random.Random(3)
    found: dict[bool, int] = {}
    for seasonal in (False, True):
        detector, series, found[seasonal] = Detector(seasonal=seasonal), new_series(), 0
        for i in range(21 * 144):
            at = 1_700_006_400 * S + i * 600 * S
            hour = i // 6 % 24
            value = 20 + rng.gauss(0, 0.3) + (8 if hour == 12 else 0)
            if i >= 20 * 144 and hour == 3:
                value += 8  # usual at noon, not at night
            judgement = judge(series, at, value, detector)
            if i >= 20 * 144 and hour in (3, 4) and judgement is not None:
                found[seasonal] += judgement.begins
    assert found[True] == 1


def test_late_readings_are_not_judged():
    series = new_series()
    judge(series, 10, 1.0, Detector())
    before = orjson.dumps(series)
    assert judge(series, 10, 99.0, Detector()) is None
    assert orjson.dumps(series) == before


@pytest.mark.parametrize(
    "document",
    [{"x": 1}, {"threshold": 0}, {"threshold": "x"}, {"threshold": float("inf")}, {"window": 1}, {"window": 97},
     {"warm_up": 10}, {"smoothing": 0}, {"smoothing": 2}],
)  # fmt: skip
def test_detectors_that_cannot_be_are_named(document):
    with pytest.raises(ValueError):
        detector_of(document)
    datatype = {**TEMP, "rev": 1, "tests": {"anomaly": document}}
    check = compile_checks(None, lambda _: datatype).series("temp")  # type: ignore[arg-type, return-value]
    assert check.anomaly is None
    assert len(check.problems) == 1


# --- models of river


def with_model(name: str, threshold: float, **parameters: Any) -> Stage:
    stage = Stage()
    tests = {
        "anomaly": {**TEMP["tests"]["anomaly"], "model": name, "threshold": threshold, "model_parameters": parameters}
    }
    offer(stage.world.documents, "datatype", **{**TEMP, "tests": tests})
    return stage


def longer() -> list[Any]:
    """Calm for the detector's warm-up and the model's, then twenty readings that stand off, then calm."""
    rng = random.Random(7)
    values = [20 + rng.gauss(0, 0.5) + (15 if 200 <= i < 220 else 0) for i in range(320)]
    return [record(i, message(i, reading(v), at=i * 60)) for i, v in enumerate(values)]


CASES = [
    ("GaussianScorer", 0.9, {}),
    ("StandardAbsoluteDeviation", 3.0, {}),
    ("HalfSpaceTrees", 0.7, {"n_trees": 5, "height": 5, "window_size": 40}),
    ("OneClassSVM", 0.02, {"nu": 0.2}),
]


@pytest.mark.parametrize(("name", "threshold", "parameters"), CASES, ids=[c[0] for c in CASES])
async def test_a_model_judges_and_crashes_make_no_difference(
    name: str, threshold: float, parameters: dict[str, Any]
) -> None:
    records = longer()
    once = lines(await with_model(name, threshold, **parameters).run(*records), topics.ANOMALIES)
    begins = [a for a in once if a["state"] == "begins"]
    assert any(200 <= a["raw_offset"] <= 206 for a in begins)
    assert all(a["raw_offset"] >= 100 for a in begins), "judged before its second warm-up"
    cut, told = with_model(name, threshold, **parameters), []
    for i in range(0, len(records), 37):
        part = records[i : i + 37]
        await cut.run(*part, crash=True)
        told += lines(await cut.run(*part), topics.ANOMALIES)
    assert told == once


async def test_other_parameters_begin_a_new_model():
    stage = with_model("GaussianScorer", 0.9)
    records = longer()
    await stage.run(*records[:150])
    before = orjson.loads(stage.world.tables["a", 3, b"dev-1"])["g"]["0"]["s"]["MQTT\ttemp\t-1"][9][0]
    tests = {"anomaly": {**TEMP["tests"]["anomaly"], "model": "OneClassSVM", "threshold": 1}}
    offer(stage.world.documents, "datatype", **{**TEMP, "tests": tests})
    await stage.run(*records[150:160])
    after = orjson.loads(stage.world.tables["a", 3, b"dev-1"])["g"]["0"]["s"]["MQTT\ttemp\t-1"][9][0]
    assert (before, after) == ("GaussianScorer {}", "OneClassSVM {}")


async def test_a_model_that_cannot_be_made_leaves_the_series_judged_without():
    stage = with_model("GaussianScorer", 2.5, no_such_parameter=1)
    begins, ends = lines(await stage.run(*longer()), topics.ANOMALIES)
    assert (begins["state"], ends["state"]) == ("begins", "ends")


async def test_only_some_series_of_a_device_have_a_model():
    stage = with_model("StandardAbsoluteDeviation", 3.0)
    for i in range(60):
        pins = [reading(20.0 + i % 3, pin_position=str(pin)) for pin in range(MODELS_PER_DEVICE_MAX + 2)]
        await stage.run(record(i, message(i, *pins, at=i * 60)))
    series = orjson.loads(stage.world.tables["a", 3, b"dev-1"])["g"]["0"]["s"]
    assert sum(len(one) == 10 for one in series.values()) == MODELS_PER_DEVICE_MAX


def test_state_that_names_other_classes_is_refused() -> None:
    harmful = b85encode(pickle.dumps(os.system)).decode()
    with pytest.raises(Fatal, match="system"):
        RiverModel("GaussianScorer", {}, harmful)


def test_a_model_too_large_is_refused() -> None:
    model = RiverModel("HalfSpaceTrees", {"n_trees": 40, "height": 8})
    model.score(0.0)
    with pytest.raises(ValueError, match="may have 65536"):
        model.dump()


@pytest.mark.parametrize(
    "parameters",
    [
        {"model": "HalfSpaceTrees"},
        {"model": "LocalOutlierFactor", "threshold": 1},
        {"model_parameters": {"a": 1}},
        {"model": "OneClassSVM", "threshold": 1, "model_parameters": [1]},
    ],
)
def test_a_model_needs_a_name_and_a_threshold(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="model"):
        detector_of(parameters)
