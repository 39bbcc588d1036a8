"""One device's alarms: messages and actions in, transitions out, the same however they are cut into batches."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.alarms.action import SHELVE_S_MAX, Action, parse_action
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.gone import Gone
from preservarium.domain.alarms.machine import Refusal, State
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.alarms.state import ALARMS_PER_DEVICE_MAX
from preservarium.domain.alarms.turn import Outcome
from preservarium.errors import ReasonCode, Reject

S = 1_000_000
T = 1_700_000_000 * S
DATATYPE: Any = {"name": "air_temperature", "rev": 1, "kind": "number", "unit": "°C"}
HOT: Any = {
    "name": "hot", "rev": 3, "component_type": "air_temperature", "kind": "high", "severity": "major", "threshold": 30,
    "recipients": ["ops"],
}  # fmt: skip
DEVICE: Any = {"device_id": "dev-1", "rev": 1, "type": "box", "enabled": True, "name": "Attic"}


def rules(*docs: Any, **fields: Any) -> DeviceRules:
    found = {d["name"]: d for d in docs} or {"hot": {**HOT, **fields}}
    device = {**DEVICE, "rules": {name: {} for name in found}}
    return compile_rules(device, None, found.get, lambda _: DATATYPE)


RULES = rules()


def message(offset: int, *values: Any, at: float | None = None, generation: int = 0, **reading: Any) -> dict[str, Any]:
    at_us = T + round((offset if at is None else at) * S)
    return {
        "device_id": "dev-1", "connector_mode": "MQTT", "topic": "", "timestamp": at_us, "received_at": at_us + S // 2,
        "raw_partition": 2, "raw_offset": offset, "raw_index": 0, "parser": "p@1", "config_rev": 1,
        "generation": generation,
        "readings": [
            {"component_type": "air_temperature", "pin_position": "-1", "value": v, "unit": "°C", "quality": 1, **reading}
            for v in values
        ],
    }  # fmt: skip


def action(word: str, at: float = 100, **fields: Any) -> Action:
    line = {"device_id": "dev-1", "rule": "hot", "action": word, "actor": "ann", "at": T + round(at * S), **fields}
    return parse_action(line)


def names(outcome: Outcome) -> list[str]:
    return [t["transition"] for t in outcome.transitions]


def test_a_transition_tells_everything():
    alarms = DeviceAlarms("dev-1")
    outcome = alarms.observe(message(7, 31.5), RULES)
    (line,) = outcome.transitions
    assert {k: v for k, v in line.items() if not k.endswith("_id")} == {
        "sequence": 1,
        "device_name": "Attic",
        "rule": "hot",
        "rule_rev": 3,
        "kind": "high",
        "group": "",
        "component_type": "air_temperature",
        "pin_position": "-1",
        "severity": "major",
        "transition": "raised",
        "state": "unacknowledged",
        "occurred_at": T + 7 * S,
        "detected_at": T + 7 * S + S // 2,
        "cleared_at": None,
        "transition_at": T + 7 * S,
        "value": 31.5,
        "unit": "°C",
        "threshold": 30.0,
        "message": "Attic: air_temperature is 31.5 °C, above 30 °C",
        "recipients": ["ops"],
        "actor": None,
        "comment": None,
        "raw_partition": 2,
        "raw_offset": 7,
        "raw_index": 0,
        "first_out": False,
        "chattering": False,
        "generation": 0,
    }
    assert line["device_id"] == "dev-1"
    outcome = alarms.observe(message(8, 20.0), RULES)
    assert names(outcome) == ["cleared"]
    assert outcome.transitions[0]["alarm_id"] == line["alarm_id"]
    assert outcome.transitions[0]["cleared_at"] == T + 8 * S
    assert outcome.transitions[0]["occurred_at"] == T + 7 * S


def test_a_rerun_is_skipped():
    alarms = DeviceAlarms("dev-1")
    assert names(alarms.observe(message(1, 31), RULES)) == ["raised"]
    again = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(alarms.document())))
    outcome = again.observe(message(1, 31), RULES)
    assert outcome.duplicate
    assert outcome.transitions == []


@pytest.mark.parametrize(
    "reading",
    [{"quality": 4}, {"quality": 9}, {"value": None}, {"flags": ["unit_unknown"], "quality": 3}, {"revised": True}],
)
def test_what_cannot_be_trusted_raises_nothing(reading: dict[str, Any]):
    outcome = DeviceAlarms("dev-1").observe(message(1, 99.0, **reading), RULES)
    assert outcome.transitions == []
    assert outcome.evaluated == 0


def test_suspect_values_do_raise():
    assert names(DeviceAlarms("dev-1").observe(message(1, 99.0, quality=3), RULES)) == ["raised"]


def test_each_pin_is_an_alarm_of_its_own():
    alarms = DeviceAlarms("dev-1")
    lines = [
        alarms.observe(message(i, 31, pin_position=pin), RULES).transitions[0] for i, pin in enumerate(["0", "1"], 1)
    ]
    assert lines[0]["alarm_id"] != lines[1]["alarm_id"]
    only_one = rules({**HOT, "pin_position": "1"})
    assert names(DeviceAlarms("dev-1").observe(message(1, 31, pin_position="0"), only_one)) == []


def test_late_readings_are_counted_and_change_nothing():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1, 31, at=100), RULES)
    outcome = alarms.observe(message(2, 20, at=50), RULES)
    assert (outcome.transitions, outcome.late) == ([], 1)


def test_auto_acknowledged_alarms_end_with_their_condition():
    quick = rules({**HOT, "parameters": {"acknowledge": "auto"}})
    alarms = DeviceAlarms("dev-1")
    states = [
        t["state"] for i, v in enumerate([31, 20, 31, 20], 1) for t in alarms.observe(message(i, v), quick).transitions
    ]
    assert states == ["unacknowledged", "normal"] * 2
    assert alarms.document()["g"]["0"]["a"] == {"hot": {"-1": [T + 4 * S, 0, None]}}


def test_a_replay_has_its_own_alarms_and_ids():
    alarms = DeviceAlarms("dev-1")
    live = alarms.observe(message(1, 31), RULES).transitions[0]
    replay = alarms.observe(message(1, 31, generation=1), RULES).transitions[0]
    assert replay["alarm_id"] != live["alarm_id"]
    assert replay["generation"] == 1
    assert [a.state for _, a in alarms.alarms(1)] == [State.UNACKNOWLEDGED]


def test_a_rule_that_is_gone_withdraws_its_alarm():
    alarms = DeviceAlarms("dev-1")
    raised = alarms.observe(message(1, 31), RULES).transitions[0]
    outcome = alarms.observe(message(2, 31), rules({**HOT, "name": "other", "threshold": 99}))
    assert names(outcome) == ["withdrawn"]
    assert outcome.transitions[0]["alarm_id"] == raised["alarm_id"]
    assert outcome.transitions[0]["cleared_at"] == T + S
    assert "hot" not in alarms.document()["g"]["0"]["a"]


def test_an_unknown_device_withdraws_nothing():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1, 31), RULES)
    assert alarms.observe(message(2, 31), None).transitions == []
    assert names(alarms.observe(message(3, 20), RULES)) == ["cleared"]


def test_a_device_has_a_limit_of_alarms_and_says_so_once():
    alarms = DeviceAlarms("dev-1")
    limited = []
    for i in range(ALARMS_PER_DEVICE_MAX + 3):
        outcome = alarms.observe(message(i, 31, pin_position=str(i)), RULES)
        limited.append(outcome.limited)
        if i % 100 == 0:
            alarms = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(alarms.document())))
    assert limited == [False] * ALARMS_PER_DEVICE_MAX + [True, False, False]
    assert len(list(alarms.alarms())) == ALARMS_PER_DEVICE_MAX


# --- actions


def test_operators_act_in_order_with_the_readings():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1, 31), RULES)
    outcome = alarms.act(action("acknowledge", comment="on my way"), RULES, "a0", 5, 0)
    (line,) = outcome.transitions
    assert (line["transition"], line["state"], line["actor"], line["comment"]) == (
        "acknowledged",
        "acknowledged",
        "ann",
        "on my way",
    )
    assert line["transition_at"] == T + 100 * S
    assert line["raw_offset"] == 1
    assert alarms.act(action("acknowledge"), RULES, "a0", 5, 0).duplicate
    assert alarms.act(action("acknowledge"), RULES, "a0", 6, 0).refusal is Refusal.ALREADY_ACKNOWLEDGED
    assert [t["state"] for t in alarms.observe(message(2, 20), RULES).transitions] == ["normal"]


def test_an_action_on_another_occurrence_is_refused():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1, 31), RULES)
    outcome = alarms.act(action("acknowledge", alarm_id="0" * 32), RULES, "a0", 1, 0)
    assert outcome.refusal is Refusal.OTHER_OCCURRENCE


def test_an_action_on_no_alarm_is_refused():
    alarms = DeviceAlarms("dev-1")
    assert alarms.act(action("acknowledge", rule="nope"), RULES, "a0", 1, 0).refusal is Refusal.UNKNOWN_ALARM
    assert alarms.act(action("acknowledge"), None, "a0", 2, 0).refusal is Refusal.UNKNOWN_ALARM
    assert alarms.act(action("acknowledge"), RULES, "a0", 3, 0).refusal is Refusal.NOT_RAISED


def test_a_shelf_ends_by_itself_with_the_next_message():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1, 31), RULES)
    assert names(alarms.act(action("shelve", at=2, duration_s=60), RULES, "a0", 1, 0)) == ["shelved"]
    alarms = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(alarms.document())))
    assert names(alarms.observe(message(3, 31, at=30), RULES)) == []
    outcome = alarms.observe(message(4, 31, at=70), RULES)
    assert names(outcome) == ["unshelved", "raised"]
    assert outcome.transitions[0]["transition_at"] == T + 62 * S
    assert "until" not in alarms.document()["g"]["0"]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"action": "explode"}, "there is no action 'explode'"),
        ({"action": ["x"]}, "there is no action ['x']"),
        ({"at": 5}, "at: 5 is no instant in µs"),
        ({"at": True}, "at: True is no instant in µs"),
        ({"rule": None}, "rule: None is no text"),
        ({"actor": ""}, "actor: '' is no text"),
        ({"device_id": "x" * 300}, "device_id: 'xxx"),
        ({"action": "comment"}, "comment: '' is no text"),
        ({"action": "shelve", "duration_s": 0}, "duration_s: 0 is not over 0"),
        ({"action": "shelve", "duration_s": SHELVE_S_MAX + 1}, "duration_s: 604801 is not"),
        ({"action": "shelve", "duration_s": float("nan")}, "duration_s: nan is not"),
        ({"action": "shelve", "one_shot": 1}, "one_shot: 1 is no boolean"),
        ({"comment": "a\0b"}, "comment: 'a\\x00b' is no text"),
    ],
)
def test_a_wrong_action_is_refused_with_the_field(fields: dict[str, Any], text: str):
    line = {"device_id": "d", "rule": "hot", "action": "acknowledge", "actor": "ann", "at": T, **fields}
    with pytest.raises(Reject) as e:
        parse_action(line)
    assert e.value.code is ReasonCode.ACTION_INVALID
    assert str(e.value).startswith(text)


def test_the_key_names_the_device_where_the_line_does_not():
    line = {"rule": "hot", "action": "acknowledge", "actor": "ann", "at": T}
    assert parse_action(line, "dev-9").device_id == "dev-9"


# --- the same however it is cut

STEP = st.one_of(
    st.tuples(st.just("reading"), st.floats(25, 35), st.integers(-5, 30), st.sampled_from(["0", "1"])),
    st.tuples(
        st.just("action"),
        st.sampled_from(["acknowledge", "clear", "shelve", "unshelve", "out_of_service", "return_to_service"]),
        st.integers(0, 30),
        st.sampled_from(["0", "1"]),
    ),
)


@given(st.lists(STEP, max_size=30), st.lists(st.integers(1, 5)), st.sampled_from([0, 10]), st.booleans())
def test_batches_crashes_and_reruns_make_no_difference(
    steps: list[tuple[Any, ...]], cuts: list[int], delay_s: int, latching: bool
):
    watched = rules({**HOT, "on_delay_s": delay_s, "off_delay_s": delay_s, "parameters": {"latching": latching}})
    inputs: list[tuple[str, Any]] = []
    at = 0
    for i, (kind, what, gap, pin) in enumerate(steps):
        at = max(0, at + gap)
        if kind == "reading":
            inputs.append((kind, message(i, what, at=at, pin_position=pin)))
        else:
            inputs.append(
                (kind, action(what, at=at, pin_position=pin, **({"duration_s": 20} if what == "shelve" else {})))
            )

    def apply(alarms: DeviceAlarms, i: int) -> list[Any]:
        kind, what = inputs[i]
        if kind == "reading":
            return list(alarms.observe(what, watched).transitions)
        return list(alarms.act(what, watched, "a0", i, 0).transitions)

    whole = DeviceAlarms("dev-1")
    expected = [t for i in range(len(inputs)) for t in apply(whole, i)]

    document: Any = None
    told: list[Any] = []
    start = 0
    sizes = iter(cuts)
    while start < len(inputs):
        end = min(len(inputs), start + next(sizes, 3))
        for crash in (True, False):  # the first run of a batch dies before its state is written
            alarms = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(document)) if document else None)
            batch = [t for i in range(start, end) for t in apply(alarms, i)]
            if not crash:
                told += batch
                document = alarms.document()
        # The batch once more, because it was not acknowledged: everything is skipped.
        again = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(document)))
        assert [t for i in range(start, end) for t in apply(again, i)] == []
        start = end
    assert told == expected
    if inputs:
        assert orjson.dumps(document) == orjson.dumps(whole.document())
    assert len({t["transition_id"] for t in told}) == len(told)


def test_a_refused_action_leaves_no_state():
    alarms = DeviceAlarms("dev-1")
    for i in range(3):
        assert alarms.act(action("acknowledge", pin_position=f"x{i}"), RULES, "a0", i, 0).refusal is Refusal.NOT_RAISED
    assert alarms.document()["g"]["0"] == {"m": {"a0": [2, 0]}, "a": {}}


def test_the_state_of_an_alarm_is_small():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1_000_000_000, 31.23456), RULES)
    assert len(orjson.dumps(alarms.document())) < 400


# --- what nothing watches any more

OTHER: Any = {**HOT, "name": "other", "threshold": 99}


def compiled(found: dict[str, Any], **device: Any) -> DeviceRules:
    return compile_rules(
        {**DEVICE, "rules": {name: {} for name in found}, **device}, None, found.get, lambda _: DATATYPE
    )


GONE: Any = [
    (None, "device_removed"),
    (compiled({"hot": HOT}, enabled=False), "device_disabled"),
    (compiled({"other": OTHER}), "rule_removed"),
    (compiled({"hot": HOT}, rules={"hot": None}), "rule_disabled"),
    (compiled({"hot": {**HOT, "enabled": False}}), "rule_disabled"),
    (compiled({"hot": HOT}, rules={"hot": {"enabled": False}}), "rule_disabled"),
    (compiled({"hot": {**HOT, "severity": "awful"}}), "rule_unusable"),
    (compiled({"hot": {**HOT, "pin_position": "7"}}), "rule_moved"),
    (compiled({"hot": {**HOT, "component_type": "soil_temperature"}}), "rule_moved"),
]


@pytest.mark.parametrize(("now", "reason"), GONE)
@pytest.mark.parametrize("before", ["", "acknowledge", "shelve", "out_of_service", "suppress"])
def test_an_alarm_that_nothing_watches_ends_without_a_message_and_says_why(now: Any, reason: str, before: str):
    alarms = DeviceAlarms("dev-1")
    raised = alarms.observe(message(1, 31), RULES).transitions[0]
    if before:
        assert alarms.act(action(before), RULES, "a0", 1, 0).refusal is None
    alarms = DeviceAlarms("dev-1", orjson.loads(orjson.dumps(alarms.document())))
    assert alarms.stands
    assert alarms.stands_without_rule(now)
    assert not alarms.stands_without_rule(RULES)
    outcome = alarms.withdraw_unwatched(T + 500 * S, now)
    (line,) = outcome.transitions
    assert (line["transition"], line["state"], line["reason"]) == ("withdrawn", "normal", reason)
    assert line["comment"] == Gone[reason.upper()].value
    assert (line["alarm_id"], line["component_type"]) == (raised["alarm_id"], "air_temperature")
    assert (line["transition_at"], line["detected_at"], line["former"]) == (T + S, T + 500 * S, ["ops"])
    assert outcome.standing == {("hot", "-1"): None}
    alarms.document()
    assert not alarms.stands
    # Once: also where the tick is repeated after it was stored.
    assert alarms.withdraw_unwatched(T + 501 * S, now).transitions == []


def test_a_message_that_comes_first_tells_the_same_end():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1, 31), RULES)
    document = orjson.loads(orjson.dumps(alarms.document()))
    disabled = compiled({"hot": HOT}, enabled=False)
    (by_tick,) = DeviceAlarms("dev-1", document).withdraw_unwatched(T + 9 * S, disabled).transitions
    (by_message,) = alarms.observe(message(2, 31), disabled).transitions
    assert {**by_tick, "detected_at": 0} == {**by_message, "detected_at": 0}


def test_an_alarm_of_before_this_release_has_no_series_and_stays_with_its_rule():
    alarms = DeviceAlarms("dev-1")
    alarms.observe(message(1, 31), RULES)
    document = orjson.loads(orjson.dumps(alarms.document()))
    del document["g"]["0"]["a"]["hot"]["-1"][-1]["y"]
    moved = compiled({"hot": {**HOT, "component_type": "soil_temperature"}})
    assert not DeviceAlarms("dev-1", document).stands_without_rule(moved)


@pytest.mark.parametrize("now", [rules for rules, _ in GONE])
@pytest.mark.parametrize(
    ("before", "word", "names_then", "state"),
    [
        ("", "acknowledge", ["acknowledged"], State.ACKNOWLEDGED),
        ("", "shelve", ["shelved"], State.SHELVED),
        ("", "suppress", ["suppressed"], State.SUPPRESSED),
        ("", "out_of_service", ["out_of_service"], State.OUT_OF_SERVICE),
        ("", "comment", ["commented"], State.UNACKNOWLEDGED),
        ("", "clear", ["withdrawn"], State.NORMAL),
        ("acknowledge", "clear", ["withdrawn"], State.NORMAL),
        ("shelve", "unshelve", ["withdrawn"], State.NORMAL),
        ("suppress", "unsuppress", ["withdrawn"], State.NORMAL),
        ("out_of_service", "return_to_service", ["withdrawn"], State.NORMAL),
    ],
)
def test_operators_can_act_on_what_stands_though_nothing_watches_it(
    now: Any, before: str, word: str, names_then: list[str], state: State
):
    alarms = DeviceAlarms("dev-1")
    raised = alarms.observe(message(1, 31), RULES).transitions[0]
    if before:
        assert alarms.act(action(before), RULES, "a0", 1, 0).refusal is None
    outcome = alarms.act(action(word, 200, alarm_id=raised["alarm_id"], comment="c"), now, "a0", 2, 0)
    assert (outcome.refusal, names(outcome), outcome.state) == (None, names_then, state)
    assert outcome.transitions[-1]["actor"] == "ann"
    assert outcome.transitions[-1]["comment"] == "c"
    # And what still stands ends all the same.
    ends = alarms.withdraw_unwatched(T + 500 * S, now)
    assert names(ends) == ([] if state is State.NORMAL else ["withdrawn"])


def test_what_is_listed_and_not_known_any_more_leaves_the_list():
    alarms = DeviceAlarms("dev-1")
    outcome = alarms.act(action("acknowledge", alarm_id="f" * 32), RULES, "a0", 1, 0)
    assert outcome.refusal is Refusal.OTHER_OCCURRENCE
    assert outcome.standing == {("hot", "-1"): None}


def test_an_alarm_that_its_group_suppressed_ends_with_its_rule():
    master = {**HOT, "name": "power", "group": "g", "group_master": True}
    both = compiled({"power": master, "hot": {**HOT, "group": "g"}})
    alarms = DeviceAlarms("dev-1")
    assert names(alarms.observe(message(1, 31), both)) == ["raised"]
    assert {point.rule: alarm.state for point, alarm in alarms.alarms()} == {
        "power": State.UNACKNOWLEDGED,
        "hot": State.SUPPRESSED,
    }
    outcome = alarms.withdraw_unwatched(T + 9 * S, compiled({"power": master}))
    # It was never told of, so nothing is told of its end.
    assert outcome.transitions == []
    assert outcome.standing == {("hot", "-1"): None}
    assert [(point.rule, alarm.state) for point, alarm in alarms.alarms() if alarm.state is not State.NORMAL] == [
        ("power", State.UNACKNOWLEDGED)
    ]
