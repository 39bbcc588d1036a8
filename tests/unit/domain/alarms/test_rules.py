"""Alarm rules: compiled from documents, evaluated in event time."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.alarms.evaluation import evaluate
from preservarium.domain.alarms.rule import MESSAGE_CHARS_MAX, Rule, measured, render
from preservarium.domain.alarms.rules import RULES_PER_DEVICE_MAX, compile_rule, compile_rules
from preservarium.domain.alarms.watch import Evaluation, Watch

S = 1_000_000
T = 1_700_000_000 * S
DATATYPE: Any = {"name": "air_temperature", "rev": 1, "kind": "number", "unit": "°C"}


def rule(**fields: Any) -> Rule:
    doc: Any = {"name": "hot", "rev": 3, "component_type": "air_temperature", "kind": "high", "severity": "major"}
    doc["threshold"] = 30.0
    return compile_rule({**doc, **fields}, fields.pop("datatype", DATATYPE))


def play(one: Rule, *readings: tuple[float, float]) -> list[tuple[str, float]]:
    """(seconds, value) … -> (evaluation, seconds) of what was not unchanged."""
    watch = Watch()
    found = []
    for at, value in readings:
        verdict = evaluate(one, watch, value, T + round(at * S))
        if verdict is not None:
            found.append((str(verdict.evaluation), (verdict.at - T) / S))
    return found


def test_high_begins_above_the_threshold_and_ends_at_it():
    assert play(rule(), (0, 30.0), (1, 30.1), (2, 31), (3, 30.0), (4, 29)) == [("raised", 1), ("returned", 3)]


def test_low_is_the_mirror_image():
    one = rule(kind="low", threshold=2.0, deadband=0.5)
    assert play(one, (0, 2.0), (1, 1.9), (2, 2.2), (3, 2.5), (4, 9)) == [("raised", 1), ("returned", 3)]


def test_inside_the_deadband_nothing_ends():
    readings = [(float(i), v) for i, v in enumerate([31, 29, 31, 28.1, 29.9, 28.0])]
    assert play(rule(deadband=2.0), *readings) == [("raised", 0), ("returned", 5)]


def test_an_on_delay_is_over_at_its_end_not_at_the_reading_that_proves_it():
    assert play(rule(on_delay_s=10), (0, 31), (4, 32), (13, 33)) == [("pending", 0), ("pending", 4), ("raised", 10)]


def test_one_old_sample_satisfies_no_duration():
    assert play(rule(on_delay_s=600), (-86_400, 35)) == [("pending", -86_400)]
    # Nor do two at the same instant.
    assert play(rule(on_delay_s=600), (0, 35), (0, 35)) == [("pending", 0), ("late", 0)]


def test_a_reading_that_disagrees_starts_the_delay_anew():
    assert play(rule(on_delay_s=10), (0, 31), (5, 29), (6, 31), (12, 31), (16, 31)) == [
        ("pending", 0),
        ("pending", 6),
        ("pending", 12),
        ("raised", 16),
    ]


def test_an_off_delay_holds_the_alarm():
    one = rule(off_delay_s=60)
    assert play(one, (0, 31), (10, 20), (30, 31), (40, 20), (99, 20), (100, 20)) == [
        ("raised", 0),
        ("pending", 10),
        ("pending", 40),
        ("pending", 99),
        ("returned", 100),
    ]


def test_a_silence_starts_a_delay_anew():
    one = rule(on_delay_s=60, parameters={"gap_max_s": 30})
    # 3600 begins anew after an hour's silence; 3660 comes 40 s after 3620, so it begins anew, too.
    assert play(one, (0, 31), (3600, 31), (3620, 31), (3660, 31))[-1] == ("pending", 3660)
    assert play(one, (0, 31), (3600, 31), (3620, 31), (3640, 31), (3660, 31))[-1] == ("raised", 3660)
    assert play(rule(on_delay_s=60), (0, 31), (3600, 31))[-1] == ("raised", 60)


def test_the_longest_silence_comes_from_the_datatype():
    datatype = {**DATATYPE, "stale_after_s": 30}
    assert rule(datatype=datatype).gap_max_us == 30 * S
    assert rule(datatype=datatype, parameters={"gap_max_s": 5}).gap_max_us == 5 * S


def test_late_readings_do_not_rewrite_history():
    watch = Watch()
    one = rule()
    assert evaluate(one, watch, 31, T + 10 * S) is not None
    before = (watch.at, watch.active, watch.since)
    verdict = evaluate(one, watch, 20, T + 5 * S)
    assert verdict is not None
    assert verdict.evaluation is Evaluation.LATE
    assert (watch.at, watch.active, watch.since) == before


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(20, 40)), max_size=60),
    st.floats(0, 5),
    st.integers(0, 120),
    st.integers(0, 120),
)
def test_raised_and_returned_alternate_in_event_time(
    steps: list[tuple[int, float]], deadband: float, on_s: int, off_s: int
):
    one = rule(deadband=deadband, on_delay_s=on_s, off_delay_s=off_s)
    at = 0.0
    readings = []
    for gap, value in steps:
        at += gap
        readings.append((at, value))
    changes = [x for x in play(one, *readings) if x[0] in ("raised", "returned")]
    assert [x[0] for x in changes] == ["raised", "returned"] * (len(changes) // 2) + ["raised"] * (len(changes) % 2)
    times = [x[1] for x in changes]
    assert times == sorted(times)
    # The same, told from the definition: all readings for on_s before the instant stand over the threshold.
    for name, when in changes:
        if name == "raised":
            assert all(v > 30 for t, v in readings if when - on_s <= t <= when)
        else:
            assert all(v <= 30 - deadband for t, v in readings if when - off_s <= t <= when)


# --- compilation


def device(**fields: Any) -> Any:
    return {"device_id": "dev-1", "rev": 1, "type": "box", "enabled": True, **fields}


HOT: Any = {
    "name": "hot", "rev": 3, "component_type": "air_temperature", "kind": "high", "severity": "major", "threshold": 30
}  # fmt: skip
TYPE: Any = {"name": "box", "rev": 1, "manufacturer": "x", "parser": "p", "rules": ["hot"]}


def compiled(dev: Any, docs: dict[str, Any], device_type: Any = TYPE) -> Any:
    return compile_rules(dev, device_type, docs.get, lambda _: DATATYPE)


def test_rules_come_from_the_type_under_the_devices_overrides():
    rules = compiled(device(name="Attic", rules={"hot": {"threshold": 40}}), {"hot": HOT})
    assert rules.device_name == "Attic"
    assert rules.by_name["hot"].threshold == 40
    assert rules.by_type["air_temperature"] == (rules.by_name["hot"],)
    assert rules.problems == ()


def test_a_device_may_switch_a_rule_off_or_add_one():
    cold = {**HOT, "name": "cold", "kind": "low", "threshold": 1}
    rules = compiled(device(rules={"hot": None, "cold": {}}), {"hot": HOT, "cold": cold})
    assert list(rules.by_name) == ["cold"]


def test_disabled_rules_do_not_watch():
    assert compiled(device(), {"hot": {**HOT, "enabled": False}}).by_name == {}
    assert list(compiled(device(rules={"hot": {"enabled": True}}), {"hot": {**HOT, "enabled": False}}).by_name) == [
        "hot"
    ]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"kind": "sideways"}, "there is no kind 'sideways'"),
        ({"severity": "meh"}, "there is no severity 'meh'"),
        ({"threshold": None}, "'threshold' is missing"),
        ({"threshold": "x"}, "could not convert string to float: 'x'"),
        ({"threshold": float("nan")}, "threshold is not finite"),
        ({"deadband": -1}, "deadband is less than 0"),
        ({"on_delay_s": -1}, "on_delay_s is less than 0"),
        ({"parameters": {"acknowledge": "never"}}, "acknowledge is operator or auto, not 'never'"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named_and_the_others_watch(fields: dict[str, Any], text: str):
    docs = {"hot": {**HOT, **fields}, "fine": {**HOT, "name": "fine"}}
    rules = compiled(device(rules={"fine": {}}), docs)
    assert list(rules.by_name) == ["fine"]
    assert rules.problems == (f"rule hot: {text}",)


def test_a_rule_that_is_not_in_the_registry_is_named():
    assert compiled(device(), {}).problems == ("rule hot: not in the registry",)


def test_a_device_has_a_limit_of_rules():
    docs = {f"r{i}": {**HOT, "name": f"r{i}"} for i in range(RULES_PER_DEVICE_MAX + 2)}
    rules = compiled(device(rules={name: {} for name in docs}), docs, None)
    assert len(rules.by_name) == RULES_PER_DEVICE_MAX
    assert len(rules.problems) == 2


def test_messages_are_filled_and_never_evaluated():
    assert render(
        "{name}: {value} {unit}, {threshold}", {"name": "A", "value": 0.1 + 0.2, "unit": "", "threshold": 1}
    ) == ("A: 0.3, 1")
    assert render("{value.__class__} {nope} {}", {"value": 1}) == "{value.__class__} {nope} {}"
    assert len(render("{value}", {"value": "x" * 5_000})) == MESSAGE_CHARS_MAX


def test_a_value_that_is_not_there_is_seen_to_be_missing():
    template = "CO2 at {value} {unit}, above {threshold}"
    fields: dict[str, Any] = {"value": None, "unit": "ppm", "threshold": None}
    assert render(template, fields) == "CO2 at – ppm, above –"
    assert render(template, {**fields, "value": 0.0, "threshold": 0}) == "CO2 at 0 ppm, above 0"
    assert [measured(None, "ppm"), measured(0, "ppm"), measured(1e6 / 3, ""), measured(1234567.5, "ppm")] == [
        "", "0 ppm", "333333.333333", "1234567.5 ppm",
    ]  # fmt: skip
