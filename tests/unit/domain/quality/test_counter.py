"""Meters: consumption is never negative, and its sum is what the meter counted, whatever the order of its readings."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import Meter, S, T

from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.counter import Counter, State, Swap, counter_of, step


@pytest.mark.parametrize(
    ("before", "after", "width", "consumption", "event"),
    [
        (10, 12.5, None, 2.5, None),
        (10, 10, 100, 0, None),
        (99_990, 10, 100_000, 20, "rollover"),
        (50_001, 2, 100_000, 2, "reset"),  # rolling over would mean half the width and more
        (50_003, 2, 100_000, 49_999, "rollover"),
        (99_990, 10, None, 10, "reset"),
        (150_000, 10, 100_000, 10, "reset"),  # never within its width
        (10, -3, 100, 0, "reset"),
        (1_000.02, 1_000.01, None, 0, None),  # one in the last decimal is noise
        (1_000.02, 1_000.0, None, 1_000, "reset"),
        (1_000, 999, None, 0, None),
        (100, 99, None, 99, "reset"),  # one percent is no noise
        (1_000.123456789, 1_000.12, None, 1_000.12, "reset"),
    ],
)
def test_consumption_between_two_states(before, after, width, consumption, event):
    assert step(State(1, before), State(2, after), Counter(width)) == (consumption, event)


@pytest.mark.parametrize(
    ("swaps", "consumption", "event"),
    [
        ([Swap(150, 1_010, 0)], 10 + 7, "swap"),
        ([Swap(150, 1_010, 5)], 10 + 2, "swap"),
        ([Swap(150, None, 0)], 7, "swap_unread"),
        ([Swap(140, 1_003, 0), Swap(160, 20, 1)], 3 + 20 + 6, "swap"),
        ([Swap(140, 1_003, 0), Swap(160, None, 1)], 3 + 6, "swap_unread"),
        ([Swap(200, 1_001, 0)], 1 + 7, "swap"),  # an instant belongs to the new meter
        ([Swap(100, 1, 0), Swap(201, 9_999, 0)], 7, "reset"),
    ],
)
def test_another_meter(swaps, consumption, event):
    assert step(State(100, 1_000), State(200, 7), Counter(None, tuple(swaps))) == (consumption, event)


def test_a_counter_as_the_registry_has_it():
    swaps = [{"at": "2024-05-01T12:00:00Z", "final": 12}, {"at": 1_600_000_000, "initial": 3}]
    assert counter_of({"width": 1e5, "swaps": swaps}) == Counter(
        1e5, (Swap(1_600_000_000 * S, None, 3.0), Swap(1_714_564_800 * S, 12.0, 0.0))
    )
    assert counter_of({}) == Counter()
    assert counter_of({"tolerance": 0}) == Counter(tolerance=0.0)


@pytest.mark.parametrize(("tolerance", "consumption"), [(3, 0), (2.99, 7), (0, 7)])
def test_a_tolerance_of_the_registry_counts_and_no_other(tolerance, consumption):
    assert step(State(1, 10), State(2, 7), Counter(tolerance=tolerance)).consumption == consumption


@pytest.mark.parametrize(
    "document",
    [
        *({"width": width} for width in (0, -1, "x", [], float("inf"), float("nan"))),
        {"swaps": 1}, {"swaps": [1]}, {"swaps": [{"final": 1}]}, {"swaps": [{"at": 1, "final": "x"}]},
        {"swaps": [{"at": 1_700_000_000}] * 101},
        *({"tolerance": tolerance} for tolerance in (-0.01, "x", [], float("inf"), float("nan"))),
    ],
)  # fmt: skip
def test_a_counter_that_cannot_be(document):
    with pytest.raises(ValueError, match=r"must be|needs the instant"):
        counter_of(document)
    meter = {"name": "m", "rev": 1, "kind": "number", "unit": "", "counter": document}
    check = compile_checks(None, lambda _: meter).series("m")  # type: ignore[arg-type, return-value]
    assert check.counter is None
    assert len(check.problems) == 1


def test_a_counter_brings_its_consumption_as_a_reading():
    meter = Meter(width=1_000)
    assert meter.reads(0, 990) == []
    assert meter.reads(60, 995) == [
        {
            "component_type": "meter_consumption", "pin_position": "-1", "value": 5, "unit": "m³", "timestamp": T + 60 * S,
            "quality": 1, "derived": True,
        }
    ]  # fmt: skip
    assert [r["value"] for r in meter.reads(120, 5)] == [10]
    assert meter.reads(90, 998) == []  # late: its interval has been told
    assert meter.reads(180, 2e6) == []  # failed: no state of the meter
    (reset,) = meter.reads(240, 2)
    assert (reset["value"], reset["quality"], reset["flags"]) == (2, 3, ["counter_reset"])
    assert meter.outcome.passed == 1


def test_a_swap_is_told_by_the_registry():
    meter = Meter(swaps=[{"at": (T + 90 * S), "final": 1_002, "initial": 10}, {"at": T + 200 * S}])
    meter.reads(60, 1_000)
    assert [(r["value"], r["quality"]) for r in meter.reads(120, 11)] == [(3, 1)]
    assert [(r["value"], r["flags"]) for r in meter.reads(240, 4)] == [(4, ["counter_swap"])]


def test_counters_are_limited():
    meter = Meter()
    for pin in range(5):
        meter.reads(pin, 1, pin_position=str(pin))
        assert meter.outcome.limited == (pin == 3)
    assert [r["value"] for r in meter.reads(10, 3, pin_position="0")] == [2]
    assert meter.reads(11, 3, pin_position="4") == []


@given(
    st.lists(st.tuples(st.integers(1, 1_000), st.integers(0, 400)), min_size=2, max_size=30),
    st.integers(0, 999),
    st.integers(0, 2**32).map(random.Random),
)
@settings(max_examples=100, deadline=None)
def test_the_sum_is_what_was_counted_also_where_readings_come_late(steps, begin, rng):
    at, count, states = 0, begin, []
    for seconds, consumed in steps:
        at, count = at + seconds, count + consumed
        states.append((at, count))
    # Late readings come after one that is younger, the first and the last where they belong.
    middle = sorted(states[1:-1], key=lambda state: state[0] + rng.uniform(0, 500))
    meter = Meter(width=100_000)
    derived = [r for seconds, value in (states[0], *middle, states[-1]) for r in meter.reads(seconds, value)]
    assert all(r["value"] >= 0 for r in derived)
    assert sum(r["value"] for r in derived) == count - states[0][1]
    assert [r["timestamp"] for r in derived] == sorted({r["timestamp"] for r in derived})
