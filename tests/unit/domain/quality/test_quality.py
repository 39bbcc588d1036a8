"""Quality control of one device: flags, failures, state, and that batches make no difference."""

from copy import deepcopy
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.quality.checks import COMPILED_MAX, UNCHECKED, CheckCompiler, DeviceChecks, compile_checks
from preservarium.domain.quality.tests import FLAT_EXTREMES_MAX
from preservarium.domain.quality.validation import STATE_VERSION, Limits, Outcome, new_state, validate
from preservarium.errors import ReasonCode

S = 1_000_000
T = 1_700_000_000 * S
LIMITS = Limits(future_skew_us=300 * S, store_failed=False, series_max=500)
KEEP = Limits(future_skew_us=300 * S, store_failed=True, series_max=500)

DATATYPES: dict[str, Any] = {
    "temp": {
        "name": "temp", "rev": 1, "kind": "number", "unit": "°C",
        "fail_span": {"min": -40, "max": 85}, "suspect_span": {"min": -20, "max": 50},
    },
    "bare": {"name": "bare", "rev": 1, "kind": "number", "unit": "°C"},
    "door": {"name": "door", "rev": 1, "kind": "boolean", "unit": ""},
    "state": {"name": "state", "rev": 1, "kind": "text", "unit": ""},
    "all": {
        "name": "all", "rev": 1, "kind": "number", "unit": "m",
        "fail_span": {"min": -100, "max": 100},
        "tests": {
            "rate_of_change": {"threshold": 5, "fail_threshold": 20},
            "flat_line": {"suspect_threshold": 30, "fail_threshold": 60, "tolerance": 0.5},
            "spike": {"suspect_threshold": 4, "fail_threshold": 8},
        },
    },
}  # fmt: skip
CHECKS = compile_checks(None, DATATYPES.get)


def reading(component_type: str = "temp", value: Any = 20.0, **fields: Any) -> dict[str, Any]:
    unit = (DATATYPES.get(component_type) or {}).get("unit", "")
    return {"component_type": component_type, "pin_position": "-1", "value": value, "unit": unit, **fields}


def message(*readings: dict[str, Any], offset: int = 0, at: float = 0, **fields: Any) -> dict[str, Any]:
    at_us = T + round(at * S)
    return {
        "device_id": "dev-1", "connector_mode": "MQTT", "topic": "", "timestamp": at_us, "received_at": at_us,
        "raw_partition": 0, "raw_offset": offset, "raw_index": 0, "parser": "p@1", "config_rev": 1, "generation": 0,
        "readings": list(readings), **fields,
    }  # fmt: skip


def check(
    one: dict[str, Any], checks: DeviceChecks = CHECKS, limits: Limits = LIMITS, state: Any = None
) -> tuple[list[tuple[Any, list[str]]], Outcome]:
    outcome = validate(one, checks, new_state() if state is None else state, limits)
    return [(r["quality"], r.get("flags", [])) for r in one["readings"]], outcome


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (20.0, (1, [])),
        (50, (1, [])),
        (-20.0, (1, [])),
        (50.1, (3, ["gross_range"])),
        (-40, (3, ["gross_range"])),
        (None, (9, ["missing"])),
    ],
)
def test_gross_range_includes_its_bounds(value: Any, expected: Any):
    assert check(message(reading(value=value)))[0] == [expected]


def test_what_fails_leaves_the_message_with_its_reason():
    bad = reading(value=85.5)
    found, outcome = check(message(bad, reading(value=1.0)))
    assert found == [(1, [])]
    (failure,) = outcome.failures
    assert failure.code is ReasonCode.VALUE_RANGE
    assert failure.text == "85.5 °C is outside -40 … 85"
    assert failure.reading == {**bad, "quality": 4, "flags": ["gross_range"]}
    assert outcome.passed == 1


def test_what_fails_stays_flagged_where_the_settings_say_so():
    found, outcome = check(message(reading(value=85.5)), limits=KEEP)
    assert found == [(4, ["gross_range"])]
    assert len(outcome.failures) == 1
    assert outcome.passed == 1


EVERYTHING: dict[str, Any] = {
    **DATATYPES,
    "all": {
        **DATATYPES["all"],
        "suspect_span": {"min": -50, "max": 50},
        "tests": {
            **DATATYPES["all"]["tests"],
            "gap": {"threshold": 40},
            "attenuated_signal": {"suspect_threshold": 2, "fail_threshold": 0.5, "test_period": 60},
            "climatology": {"members": [{"period": "hour", "tspan": [0, 23], "vspan": [-10, 10], "fspan": [-60, 60]}]},
        },
        "stale_after_s": 20,
    },
}  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["all", "all", "all", "temp", "door", "state", "bare", "never heard of"]),
            st.sampled_from([0, 0, 0.1, 1, 6, 30, 60, 200, None]), st.sampled_from(["m", "furlong"]),
            st.booleans(), st.integers(1, 45), st.sampled_from([0, 30]),
        ),
        max_size=25,
    )
)  # fmt: skip
def test_what_normalize_has_flagged_stays_flagged_whatever_is_found(steps: list[Any]):
    checks = compile_checks(None, EVERYTHING.get)
    assert checks.series("all").problems == ()
    states, found, at = (new_state(), new_state()), ([], []), 0
    for offset, (kind, value, unit, flagged, later_s, late_s) in enumerate(steps):
        at += later_s
        for one, state, to in zip((True, False), states, found, strict=True):
            more = {"flags": ["inexact"]} if one and flagged else {}
            line = message(
                reading(kind, value, **({"unit": unit} if kind == "all" else {}), **more),
                offset=offset, at=at, received_at=T + (at + late_s) * S,
            )  # fmt: skip
            outcome = validate(line, checks, state, KEEP)
            # A reading, and the verdict on the one before it, which has that one's flags.
            to.append([(r["quality"], r.get("flags", []), r.get("timestamp", T + at * S)) for r in line["readings"]])
            assert all(f.reading["flags"] for f in outcome.failures)
    flagged_at = {T + sum(s[4] for s in steps[: i + 1]) * S for i, step in enumerate(steps) if step[3]}
    for with_it, without in zip(*found, strict=True):
        assert with_it == [
            (quality, ["inexact", *flags] if when in flagged_at else flags, when) for quality, flags, when in without
        ]


def test_a_unit_that_is_another_kinds_is_flagged_once_and_not_forgotten():
    for given_flags in ([], ["unit_mismatch"], ["unit_unknown"]):
        one = message(reading(unit="furlong", **({"flags": given_flags} if given_flags else {})))
        assert check(one)[0] == [(3, list(dict.fromkeys([*given_flags, "unit_unknown"])))]


def test_a_value_that_nothing_is_known_about_is_not_evaluated():
    assert check(message(reading("bare"), reading("never heard of", "x")))[0] == [(2, []), (2, [])]


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (reading(value=True), "True is no number"),
        (reading(value=None, value_text="hot"), "'hot' is no number"),
        (reading("door", 2), "2 is no boolean"),
        (reading("door", None, value_text="open"), "'open' is no boolean"),
        (reading("state", 5), "5 is no text"),
    ],
)
def test_a_value_of_another_kind_fails(one: dict[str, Any], text: str):
    found, outcome = check(message(one))
    assert found == []
    assert [(f.code, f.text) for f in outcome.failures] == [(ReasonCode.VALUE_TYPE, text)]


def test_booleans_are_stored_as_numbers_and_texts_as_they_are():
    one = message(reading("door", True), reading("door", 0.0), reading("state", None, value_text="idle"))
    assert check(one)[0] == [(1, [])] * 3
    assert [r["value"] for r in one["readings"]] == [1, 0, None]


def test_a_known_unit_is_converted_before_it_is_judged():
    one = message(reading(value=300.0, unit="K"), reading(value=212.0, unit="°F"), reading(value=21.0, unit="Cel"))
    found, outcome = check(one)
    assert found == [(1, []), (1, [])]
    assert one["readings"][0]["value"] == pytest.approx(26.85)
    assert [r["unit"] for r in one["readings"]] == ["°C", "°C"]
    assert outcome.failures[0].reading["value"] == pytest.approx(100)


def test_a_missing_unit_is_the_registrys():
    one = message(reading(unit=""))
    assert check(one)[0] == [(1, [])]
    assert one["readings"][0]["unit"] == "°C"


def test_an_unknown_unit_is_flagged_and_never_dropped():
    one = message(reading(value=1e9, unit="furlong"))
    assert check(one)[0] == [(3, ["unit_unknown"])]
    assert (one["readings"][0]["value"], one["readings"][0]["unit"]) == (1e9, "furlong")


# --- time


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"timestamp": T + 301 * S}, ReasonCode.TIMESTAMP_FUTURE),
        ({"timestamp": 0}, ReasonCode.TIMESTAMP_INVALID),
        ({"timestamp": "now"}, ReasonCode.TIMESTAMP_INVALID),
        ({"timestamp": T + 0.5}, ReasonCode.TIMESTAMP_INVALID),
        ({"timestamp": T - 101 * S}, ReasonCode.TIMESTAMP_BEFORE_BIRTH),
    ],
)
def test_impossible_instants_fail(fields: dict[str, Any], code: ReasonCode):
    checks = compile_checks({"birth": T - 100 * S}, DATATYPES.get)  # type: ignore[typeddict-item]
    found, outcome = check({**message(reading()), **fields}, checks)
    assert found == []
    assert [f.code for f in outcome.failures] == [code]
    kept, _ = check({**message(reading()), **fields}, checks, KEEP)
    # No database takes an instant outside the bounds, so it cannot be kept either.
    assert kept == ([] if code is ReasonCode.TIMESTAMP_INVALID else [(4, [str(code)])])


def test_a_readings_own_instant_is_the_one_that_counts():
    found, outcome = check(message(reading(timestamp=T + 400 * S), reading(timestamp=T - S), reading(timestamp=None)))
    assert found == [(1, []), (1, [])]
    assert [f.code for f in outcome.failures] == [ReasonCode.TIMESTAMP_FUTURE]


# --- tests that need the past


def play(*values: tuple[float, float], state: Any = None) -> list[tuple[float, int, list[str]]]:
    """(seconds, value) … -> (seconds, quality, flags) of everything that goes on, in order."""
    state = new_state() if state is None else state
    told = []
    for i, (at, value) in enumerate(values):
        one = message(reading("all", value), offset=i, at=at)
        validate(one, CHECKS, state, KEEP)
        told += [
            ((r.get("timestamp", one["timestamp"]) - T) / S, r["quality"], r.get("flags", [])) for r in one["readings"]
        ]
    return told


def test_rate_of_change():
    assert play((0, 0), (1, 5), (2, 10.5), (3, 31)) == [
        (0, 1, []),
        (1, 1, []),
        (2, 3, ["rate_of_change"]),
        (3, 4, ["rate_of_change"]),
    ]


def test_a_rejected_value_never_enters_the_reference_of_the_next():
    # 90 fails; 1 is compared with 0, not with 90.
    assert play((0, 0), (1, 90), (2, 1)) == [(0, 1, []), (1, 4, ["rate_of_change"]), (2, 1, [])]
    assert play((0, 0), (1, 101), (2, 1))[2] == (2, 1, [])


def test_a_spike_is_told_when_its_successor_comes():
    assert play((0, 0), (1, 4.5), (2, 0), (3, 0.6)) == [
        (0, 1, []),
        (1, 1, []),
        (2, 1, []),
        (1, 3, ["spike"]),
        (3, 1, []),
    ]


def test_a_revision_names_its_reading():
    state = new_state()
    for i, value in enumerate([0, 9, 0]):
        one = message(reading("all", value, pin_position="7"), offset=i, at=i * 3)
        outcome = validate(one, CHECKS, state, LIMITS)
    assert one["readings"][1] == {
        "component_type": "all", "pin_position": "7", "value": 9, "unit": "m", "timestamp": T + 3 * S,
        "quality": 4, "flags": ["spike"], "revised": True,
    }  # fmt: skip
    assert [f.code for f in outcome.failures] == [ReasonCode.QUALITY_FAIL]
    assert outcome.passed == 1


def test_a_flat_line_is_suspect_then_fails_then_recovers():
    told = play(*((float(i), 1.0 + (i % 2) * 0.3) for i in range(0, 80, 10)), (80, 3.0))
    assert [q for _, q, _ in told] == [1, 1, 1, 3, 3, 3, 4, 4, 1]
    assert told[3][2] == ["flat_line"]


def test_late_readings_get_no_test_that_needs_their_neighbours():
    state = new_state()
    assert play((0, 0), (10, 0.6), (5, 90), (10, 90), state=state)[2:] == [(5, 1, []), (10, 1, [])]
    assert state["g"]["0"]["s"]["MQTT\tall\t-1"][0:2] == [T + 10 * S, 0.6]


def test_the_flat_window_is_bounded_and_never_called_flat_too_early():
    state = new_state()
    # A drift inside the tolerance: each value is a new extreme, more of them than are kept.
    values = [(float(i), -i * 0.004) for i in range(100)]
    exact = [1 if i < 30 else 3 if i < 60 else 4 for i in range(100)]
    told = [q for _, q, _ in play(*values, state=state)]
    assert all(q <= e for q, e in zip(told, exact, strict=True))
    assert told[50] == 3
    series = state["g"]["0"]["s"]["MQTT\tall\t-1"]
    assert max(len(series[7]), len(series[8])) <= FLAT_EXTREMES_MAX
    assert len(orjson.dumps(state)) < 2_048


def test_a_device_has_a_limit_of_series_and_says_so_once():
    limits = Limits(S, False, 2)
    state = new_state()
    limited = []
    for i in range(5):
        one = message(reading("all", 1.0, pin_position=str(i)), offset=i)
        limited.append(validate(one, CHECKS, state, limits).limited)
        assert one["readings"][0]["quality"] == 1
    assert limited == [False, False, True, False, False]
    assert len(state["g"]["0"]["s"]) == 2


def test_without_a_test_that_needs_it_a_series_has_no_state():
    state = new_state()
    check(message(reading()), state=state)
    assert state == {"v": STATE_VERSION, "g": {"0": {"m": {"0": [0, 0]}, "s": {}}}}


# --- compilation


def test_overrides_win_field_by_field():
    device: Any = {"device_id": "d", "datatypes": {"temp": {"fail_span": {"min": 0, "max": 10}}}}
    device_type: Any = {"name": "t", "datatypes": {"temp": {"fail_span": {"min": 0, "max": 5}, "suspect_span": None}}}
    checks = compile_checks(device, DATATYPES.get, device_type)
    assert (checks.series("temp").fail_max, checks.series("temp").suspect_max) == (10, float("inf"))
    assert compile_checks(None, DATATYPES.get, device_type).series("temp").fail_max == 5


def test_datatypes_without_overrides_are_compiled_once():
    compiler = CheckCompiler(DATATYPES.get)
    assert compiler.device(None).series("temp") is compiler.device(None).series("temp")
    assert compiler.device(None).series("nope") is UNCHECKED


def test_invented_field_names_do_not_fill_the_memory():
    checks = compile_checks(None, DATATYPES.get)
    for i in range(COMPILED_MAX + 10):
        checks.series(f"field {i}")
    assert len(checks._by_type) == COMPILED_MAX


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kind": "colour"}, "x: kind 'colour' is not number, text or boolean"),
        ({"tests": {"telepathy": {}}}, "x: there is no test 'telepathy'"),
        ({"tests": {"flat_line": {"suspect_threshold": 5}}}, "x: flat_line: tolerance is missing"),
        ({"tests": {"rate_of_change": {"threshold": 0}}}, "x: rate_of_change: threshold must be over 0, not 0"),
        ({"tests": {"rate_of_change": 5}}, "x: rate_of_change: 'int' object has no attribute 'get'"),
        ({"tests": {"spike": {"method": "guess"}}}, "x: spike: method 'guess' is not average or differential"),
        ({"fail_span": {"min": "low"}}, "x: fail_span has no numbers min and max"),
        ({"fail_span": {"min": float("nan"), "max": 1}}, "x: fail_span is not a number"),
        (
            {"fail_span": {"min": 0, "max": 1}, "suspect_span": {"min": 0, "max": 2}},
            "x: suspect_span reaches beyond fail_span",
        ),
    ],
)
def test_what_cannot_be_used_is_named_once_and_the_rest_works(fields: dict[str, Any], problem: str):
    compiler = CheckCompiler(lambda _: {"name": "x", "rev": 1, "kind": "number", "unit": "m", **fields})  # type: ignore[arg-type, return-value, typeddict-item]
    found, _ = check(message(reading("x", 0.5, unit="m")), compiler.device(None))
    assert found[0][0] in (1, 2)
    assert compiler.take_problems() == [problem]
    assert compiler.take_problems() == []


def test_a_span_the_wrong_way_round_is_turned():
    series = compile_checks(None, lambda _: {"kind": "number", "fail_span": {"min": 9, "max": 1}}).series("x")  # type: ignore[arg-type, return-value, typeddict-item]
    assert (series.fail_min, series.fail_max) == (1, 9)


# --- duplicates and determinism


def test_a_rerun_is_skipped_and_a_replay_is_not():
    state = new_state()
    first = message(reading("all", 1.0), offset=5)
    assert not validate(deepcopy(first), CHECKS, state, LIMITS).duplicate
    before = orjson.dumps(state)
    again = deepcopy(first)
    assert validate(again, CHECKS, state, LIMITS).duplicate
    assert again == first
    assert validate(message(reading("all", 1.0), offset=4, at=9), CHECKS, state, LIMITS).duplicate
    assert orjson.dumps(state) == before
    assert not validate(message(reading("all", 1.0), offset=5, raw_index=1), CHECKS, state, LIMITS).duplicate
    assert not validate(message(reading("all", 1.0), offset=4, raw_partition=1), CHECKS, state, LIMITS).duplicate
    assert not validate(message(reading("all", 1.0), offset=4, generation=1), CHECKS, state, LIMITS).duplicate


VALUE = st.one_of(
    st.floats(-120, 120), st.sampled_from([0, 1, 1.25, None, True]), st.integers(-(2**53), 2**53), st.floats(1, 2)
)


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(["temp", "all", "door", "new"]), VALUE), min_size=1, max_size=3),
            st.integers(-10, 40),
            st.sampled_from([0, 0, 0, 1]),
        ),
        max_size=25,
    ),
    st.lists(st.integers(1, 6)),
    st.booleans(),
)
def test_batches_crashes_and_reruns_make_no_difference(steps: Any, cuts: list[int], keep: bool):
    limits = KEEP if keep else LIMITS
    inputs = []
    at = 100
    for i, (readings, gap, generation) in enumerate(steps):
        at += gap
        inputs.append(message(*(reading(c, v) for c, v in readings), offset=i, at=at, generation=generation))

    def apply(state: Any, batch: list[dict[str, Any]]) -> list[bytes]:
        told = []
        for one in deepcopy(batch):
            outcome = validate(one, CHECKS, state, limits)
            if not outcome.duplicate:
                told.append(orjson.dumps([one, [list(f) for f in outcome.failures]], default=str))
        return told

    whole = new_state()
    expected = apply(whole, inputs)

    stored = orjson.dumps(new_state())
    told: list[bytes] = []
    start = 0
    sizes = iter(cuts)
    while start < len(inputs):
        batch = inputs[start : start + next(sizes, 4)]
        apply(orjson.loads(stored), batch)  # dies before the state is written
        state = orjson.loads(stored)
        told += apply(state, batch)
        stored = orjson.dumps(state)
        assert apply(orjson.loads(stored), inputs[: start + len(batch)][-len(batch) :]) == []
        start += len(batch)
    assert told == expected
    assert stored == orjson.dumps(whole)


def run_clock(delays_s: list[tuple[float, float]], **fields: Any) -> list[Any]:
    checks = compile_checks(None, lambda _: None)
    state, found = new_state(), []
    for i, (received_s, delay_s) in enumerate(delays_s):
        one = {
            "device_id": "d", "connector_mode": "M", "timestamp": T + round((received_s - delay_s) * S),
            "received_at": T + round(received_s * S), "raw_partition": 0, "raw_offset": i, "raw_index": 0, "generation": 0,
            "clock": "device", "readings": [{"component_type": "x", "pin_position": "-1", "value": 1, "unit": ""}], **fields,
        }  # fmt: skip
        validate(one, checks, state, Limits(300 * S, False, 10, skew_noted_us=60 * S))
        found.append(one.get("clock_skew"))
    return found


def test_a_clock_that_is_off_is_told_by_its_quickest_message():
    assert run_clock([(0, -100), (10, 500), (20, -120)]) == [100 * S, 100 * S, 120 * S]
    assert run_clock([(0, 5_000), (10, 2)]) == [-5_000 * S, None]  # kept back, then in time
    assert run_clock([(0, 2), (10, 5_000)]) == [None, None]
    # What an hour before last showed is forgotten: the clock may have been set.
    assert run_clock([(0, 0), (3_600, 90), (7_200, 90), (100_000, 70)]) == [None, None, -90 * S, -70 * S]
    assert run_clock([(0, 5_000)], clock="received") == [None]


@pytest.mark.parametrize(
    ("latitude", "longitude", "quality"), [(52.0, 13.0, 2), (52.004, 13.0, 2), (52.005, 13.0, 3), (-52.0, 13.0, 3)]
)
def test_a_device_that_is_elsewhere(latitude, longitude, quality):
    location = {"latitude": 52.0, "longitude": 13.0, "range_m": 500}
    device: Any = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "meta": {"location": location}}
    checks = compile_checks(device, lambda _: None)
    one = {
        "device_id": "d", "connector_mode": "M", "timestamp": T, "received_at": T, "raw_partition": 0, "raw_offset": 1,
        "raw_index": 0, "generation": 0, "readings": [
            {"component_type": name, "pin_position": "-1", "value": value, "unit": "°"}
            for name, value in (("latitude", latitude), ("longitude", longitude), ("other", 1.0))
        ],
    }  # fmt: skip
    validate(one, checks, new_state(), LIMITS)
    assert [r["quality"] for r in one["readings"]] == [quality, quality, 2]  # type: ignore[union-attr]
    assert one["readings"][0].get("flags") == (["location"] if quality == 3 else None)  # type: ignore[index]
    assert compile_checks({**device, "meta": {"location": {"latitude": 1}}}, lambda _: None).location is None


def test_gaps_and_old_news():
    datatype: Any = {
        "name": "x", "rev": 1, "kind": "number", "unit": "m", "stale_after_s": 60, "tests": {"gap": {"threshold": 100}},
    }  # fmt: skip
    checks, state, found = compile_checks(None, lambda _: datatype), new_state(), []
    for i, (at, delay) in enumerate([(0, 0), (100, 60), (201, 0), (210, 61)]):
        one = {
            "device_id": "d", "connector_mode": "M", "timestamp": T + at * S, "received_at": T + (at + delay) * S,
            "raw_partition": 0, "raw_offset": i, "raw_index": 0, "generation": 0,
            "readings": [{"component_type": "x", "pin_position": "-1", "value": 1, "unit": "m"}],
        }  # fmt: skip
        validate(one, checks, state, LIMITS)
        found.append(one["readings"][0].get("flags"))  # type: ignore[index]
    assert found == [None, None, ["gap"], ["stale"]]


@pytest.mark.parametrize(
    "tests",
    [
        {"climatology": {}}, {"climatology": {"members": [1]}}, {"climatology": {"members": [{"tspan": [1, 2]}]}},
        {"climatology": {"members": [{"tspan": [1, 2], "vspan": [0, 1], "period": "moon"}]}},
        {"climatology": {"members": [{"tspan": [1, 2], "vspan": [0, 1], "zspan": [0, 1]}]}},
        {"climatology": {"members": [{"tspan": ["x", 2], "vspan": [0, 1]}]}}, {"gap": {}},
        {"attenuated_signal": {"suspect_threshold": 1}},
        {"attenuated_signal": {"suspect_threshold": 1, "test_period": 1, "check_type": "x"}},
    ],
)  # fmt: skip
def test_tests_that_cannot_be_are_named(tests):
    datatype: Any = {"name": "x", "rev": 1, "kind": "number", "unit": "m", "tests": tests}
    assert len(compile_checks(None, lambda _: datatype).series("x").problems) == 1
