"""The short way of readings that change nothing gives what the long way gives."""

from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.alarms.action import parse_action
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules

S = 1_000_000
T = 1_700_000_000 * S


def rule(name: str, component: str = "temp", **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "rev": 1,
        "component_type": component,
        "kind": "high",
        "severity": "major",
        "threshold": 30,
        **fields,
    }


HIGH = rule("high", deadband=2)
SLOW = rule("slow", threshold=28, on_delay_s=5, off_delay_s=3, severity="minor")
LOW = rule("low", kind="low", threshold=20)
PIN = rule("pin", pin_position="1", threshold=27)
OTHER = rule("other", "humidity", threshold=25)
FIRST = rule("first", threshold=31, group="g", first_out_s=60)
#: What must go the long way, beside what may not.
LONG = [
    rule("levels", levels=[{"threshold": 33, "severity": "critical"}]),
    rule("repeats", repeat={"count": 2, "within_s": 60}),
    rule("rate", kind="rate", threshold=5, window_s=60, per_s=60),
    {**rule("silent", kind="no_data", no_data_s=60), "threshold": None},
    rule("waits", lateness_s=10),
    rule("master", group="g", group_master=True),
]


def rules(*docs: dict[str, Any]) -> DeviceRules:
    found = {d["name"]: d for d in docs}
    device: Any = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in found}}
    lookup: Any = found.get
    return compile_rules(device, None, lookup, lambda _: None)


READING = st.fixed_dictionaries(
    {
        "component_type": st.sampled_from(["temp", "temp", "humidity", "unwatched"]),
        "pin_position": st.sampled_from(["-1", "1"]),
        "value": st.one_of(st.floats(18, 34), st.integers(18, 34), st.none(), st.just(float("nan"))),
        "unit": st.just(""),
        "quality": st.sampled_from([1, 1, 1, 3, 4]),
    },
    optional={
        "timestamp": st.integers(T - 20 * S, T + 60 * S),
        "revised": st.just(True),
        "flags": st.sampled_from([["unit_unknown"], ["spike"], None]),
    },
)
PLAIN = st.fixed_dictionaries(
    {
        "component_type": st.just("temp"),
        "pin_position": st.sampled_from(["-1", "1"]),
        "value": st.floats(20, 31),
        "unit": st.just(""),
        "quality": st.just(1),
    }
)
STEP = st.one_of(
    st.tuples(st.just("message"), st.lists(READING, max_size=4), st.integers(-3, 8), st.sampled_from([0, 0, 0, 7])),
    st.tuples(st.just("message"), st.lists(PLAIN, min_size=1, max_size=3), st.integers(1, 8), st.just(0)),
    st.tuples(
        st.just("action"), st.sampled_from(["acknowledge", "shelve", "out_of_service"]), st.integers(0, 8), st.just(0)
    ),
    st.tuples(st.just("again"), st.just(""), st.just(0), st.just(0)),
    st.tuples(st.just("time"), st.just(""), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("other rules"), st.just(""), st.just(0), st.just(0)),
)
SETS = [(HIGH,), (HIGH, SLOW, LOW), (HIGH, PIN, OTHER), (FIRST, LOW), *((HIGH, one) for one in LONG)]


def run(steps: list[Any], cuts: list[int], sets: list[DeviceRules]) -> list[Any]:
    """Everything that is told, and the state after each batch."""
    told: list[Any] = []
    document: Any = None
    at, used, last = T, 0, None
    sizes = iter(cuts)
    alarms, left = DeviceAlarms("d"), next(sizes, 3)
    for number, (kind, what, gap, generation) in enumerate(steps):
        at += gap * S
        one: Any = None
        if kind == "message":
            last = {
                "device_id": "d", "connector_mode": "m", "timestamp": at, "received_at": at + S, "raw_partition": 0,
                "raw_offset": number, "raw_index": 0, "generation": generation, "readings": [dict(r) for r in what],
            }  # fmt: skip
            one = alarms.observe(last, sets[used])
        elif kind == "again" and last is not None:
            one = alarms.observe(last, sets[used])
        elif kind == "time":
            one = alarms.tick(at, sets[used])
        elif kind == "action":
            line = {"device_id": "d", "rule": "high", "action": what, "actor": "a", "at": at, "pin_position": "-1"}
            one = alarms.act(
                parse_action({**line, **({"duration_s": 5} if what == "shelve" else {})}), sets[used], "a", number, 0
            )
        else:
            used = (used + 1) % len(sets)
        if one is not None:
            told.append(
                (one.duplicate, one.transitions, one.evaluated, one.late, one.limited, one.standing, one.refusal)
            )
        left -= 1
        if left <= 0:
            document = orjson.loads(orjson.dumps(alarms.document()))
            told.append((document, alarms.stands))
            alarms, left = DeviceAlarms("d", document), next(sizes, 3)
    told.append(orjson.loads(orjson.dumps(alarms.document())))
    return told


@given(
    st.lists(STEP, max_size=25), st.lists(st.integers(1, 5)), st.lists(st.sampled_from(SETS), min_size=1, max_size=3)
)
def test_both_ways_tell_the_same(steps: list[Any], cuts: list[int], docs: list[Any]):
    sets = [rules(*one) for one in docs]
    assert repr(run(steps, cuts, sets)) == repr(run(steps, cuts, [replace(one, calm=None) for one in sets]))


@pytest.mark.parametrize("docs", SETS)
def test_only_what_looks_at_one_reading_has_a_short_way(docs: Any):
    watched = rules(*docs)
    assert watched.problems == ()
    assert (watched.calm is None) is (docs[-1] in LONG)


def test_a_calm_device_goes_the_short_way(monkeypatch: pytest.MonkeyPatch):
    watched = rules(HIGH, SLOW)
    message: Any = {
        "timestamp": T, "received_at": T, "raw_partition": 0, "raw_offset": 1, "raw_index": 0, "generation": 0,
        "readings": [{"component_type": "temp", "pin_position": "-1", "value": 22.0, "unit": "", "quality": 1}],
    }  # fmt: skip
    first = DeviceAlarms("d")
    first.observe(message, watched)
    document = first.document()
    monkeypatch.setattr("preservarium.domain.alarms.device.observe", lambda *_: pytest.fail("the long way"))
    alarms = DeviceAlarms("d", document)
    outcome = alarms.observe({**message, "timestamp": T + S, "raw_offset": 2}, watched)
    assert (outcome.evaluated, outcome.transitions) == (1, [])
    assert alarms.document()["g"]["0"]["a"] == {"high": {"-1": [T + S, 0, None]}, "slow": {"-1": [T + S, 0, None]}}
