"""Meters from state to state: noise and glitches cost nothing, resets count, and what is in doubt says so."""

import random
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import Meter, S, T, message, reading

from preservarium.domain.quality.counter import Counter
from preservarium.domain.quality.meter import advance, first_state
from preservarium.domain.quality.validation import Limits, from_version_1, validate
from preservarium.errors import ReasonCode

RESET, GLITCH, JUMP = ["counter_reset"], ["counter_glitch"], ["counter_jump"]
STEADY = tuple(range(1_000, 1_010))  #: so that the usual step is known: 1


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((1_000.02, 1_000.01, 1_000.03), [(0, []), (0.01, [])]),
        ((1_000, 0, 1_001, 1_002), [(0, RESET), (1, GLITCH), (1, [])]),
        ((1_000, 37, 1_001, 1_002), [(0, RESET), (1, GLITCH), (1, [])]),
        ((1_000, 0, 0, 1_001), [(0, RESET), (0, []), (1, GLITCH)]),
        ((1_000, 37, 0, 1_001), [(0, RESET), (0, RESET), (1, GLITCH)]),
        ((1_000, 0, 999.99, 1_000.5), [(0, RESET), (0, GLITCH), (0.5, [])]),
        ((1_000, 0, 0.5, 1.2), [(0, RESET), (0.5, RESET), (0.7, [])]),
        ((1_000, 3, 3.5, 4), [(0, RESET), (3.5, RESET), (0.5, [])]),
        ((10, 20, 0, 25), [(10, []), (0, RESET), (25, RESET)]),
        ((1_000, 990, 992, 993), [(0, RESET), (2, RESET), (1, [])]),  # a state from before: it did not start at zero
        ((1_000, 990, 1_001), [(0, RESET), (1, GLITCH)]),
        # what was told meanwhile is taken from what follows
        ((1_000, 3, 5, 1_001, 1_003, 1_008), [(0, RESET), (5, RESET), (0, GLITCH), (0, GLITCH), (3, GLITCH)]),
        ((60_000, 0, 60_001), [(0, RESET), (1, GLITCH)]),
    ],
)  # fmt: skip
def test_what_is_told(values, told):
    assert Meter().all(*values) == told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((1.5, 2.5), [(1.5, RESET), (1, RESET)]),  # a few usual steps: a reset is told at once
        ((50, 51), [(0, RESET), (51, RESET)]),
        ((0, 700, 1_010), [(0, RESET), (0, RESET), (1, GLITCH)]),
        ((0, 50, 100, 150), [(0, RESET), (0, RESET), (100, RESET), (50, [])]),  # a new pace
        ((65_535, 1_010, 1_011), [(0, JUMP), (1, GLITCH), (1, [])]),
        ((65_535, 65_535, 1_010), [(0, JUMP), (0, []), (1, GLITCH)]),
        ((65_535, 0, 1_010), [(0, JUMP), (0, RESET), (1, GLITCH)]),
        ((65_535, 65_536, 65_537), [(0, JUMP), (64_527, JUMP), (1, [])]),  # it stays there
        ((1_500, 1_501), [(491, []), (1, [])]),  # much, but no garbage
    ],
)
def test_what_is_told_of_a_meter_whose_pace_is_known(values, told):
    meter = Meter()
    assert meter.all(*STEADY) == [(1, [])] * 9
    assert meter.all(*values) == told


def test_a_long_silence_explains_a_large_step():
    meter = Meter()
    meter.all(*STEADY)
    assert [(r["value"], r.get("flags")) for r in meter.reads(1e5, 2_600)] == [(1_591, None)]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((60_009, 0, 60_010, 60_011), [(0, RESET), (1, GLITCH), (1, [])]),  # rolling over would be 39,991 steps
        ((99_998, 99_999, 0, 1), [(0, JUMP), (39_990, JUMP), (1, []), (1, [])]),
    ],
)
def test_a_zero_is_not_always_a_rollover(values, told):
    meter = Meter(width=100_000)
    meter.all(*range(60_000, 60_010))
    assert meter.all(*values[1:] if values[0] == 60_009 else values) == told


def test_a_glitch_that_looks_like_a_rollover_costs_nothing_in_the_end():
    meter = Meter(width=100_000)
    told = meter.all(99_985, 99_986, 99_987, 99_988, 0, 99_989, *range(99_990, 100_000), 0, 1)
    assert told[3:5] == [(12, []), (0, GLITCH)]
    assert sum(value for value, _ in told) == 100_001 - 99_985
    assert told[-1] == (1, [])
    assert Meter(width=100_000).all(60_000, 0, 60_001) == [(0, RESET), (1, GLITCH)]  # nor with no pace known


def test_the_tolerance_is_the_registry_s_or_what_the_series_shows():
    assert Meter(tolerance=5).all(10, 6, 12) == [(0, []), (2, [])]
    assert Meter(tolerance=0).all(1_000.02, 1_000.01, 1_000.03) == [(0, RESET), (0.01, GLITCH)]
    # In steps of 0.25 a fall of 0.25 is noise, whatever the decimals say.
    assert Meter().all(1_000, 1_000.25, 1_000.5, 1_000.25, 1_000.75)[2:] == [(0, []), (0.25, [])]
    # What a conversion of units leaves behind the twelfth digit is no decimal.
    assert Meter().all(1_000.0200000000001, 1_000.01, 1_000.03)[0] == (0, [])


def test_a_swap_says_whether_a_fall_was_a_glitch():
    swap = {"at": T + 150 * S, "final": 1_003, "initial": 0}
    assert Meter(swaps=[swap]).all(1_000, 0, 5) == [(0, RESET), (3 + 5, [])]
    assert Meter(swaps=[{**swap, "final": 4}]).all(1_000, 2, 5) == [(0, RESET), (4 + 5, [])]  # reset, then exchanged
    assert Meter(swaps=[{"at": T + 150 * S}]).all(1_000, 2, 5) == [(0, RESET), (2 + 5, ["counter_swap"])]
    assert Meter(swaps=[{"at": T + 690 * S, "final": 1_010}]).all(*STEADY, 65_535, 5)[-2:] == [(0, JUMP), (1 + 5, [])]


def test_a_state_below_zero_is_refused_with_a_reason_of_its_own():
    meter = Meter()
    assert meter.all(10, -1) == []
    (failure,) = meter.outcome.failures
    assert (failure.code, failure.text) == (ReasonCode.COUNTER_NEGATIVE, "-1 m³ of a counter")
    assert failure.reading["flags"] == ["counter_negative"]
    assert meter.all(12) == [(2, [])]
    meter.limits = Limits(future_skew_us=300 * S, store_failed=True, series_max=3)
    meter.all(-0.5)
    one = message(99, reading(-2, "meter", "m³"), timestamp=T + 999 * S, received_at=T + 999 * S)
    validate(one, meter.checks, meter.state, meter.limits)
    assert [(r["quality"], r["flags"]) for r in one["readings"]] == [(4, ["counter_negative"])]


def test_a_state_of_the_version_before_goes_on():
    meter = Meter()
    meter.state = {"v": 1, "g": {"0": {"m": {}, "s": {}, "c": {"MQTT\tmeter\t-1": [T, 10]}}, "2": {"m": {}, "s": {}}}}
    from_version_1(meter.state)
    assert meter.all(12) == [(2, [])]


small_steps = st.integers(1, 3)


@given(
    st.integers(500, 100_000),
    st.lists(small_steps, min_size=1, max_size=40),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_glitches_cost_nothing(begin: int, steps: list[int], data: Any):
    """Zero or garbage, a few times the same, downwards at any time and upwards once the pace is known."""
    values, level, glitches = [begin], begin, 0
    for seen, step in enumerate(steps):
        garbage = st.integers(0, level - 50)
        if seen - glitches > 8:
            garbage |= st.integers(level + 100_000, 2**32)
        times = data.draw(st.sampled_from([0, 0, 0, 1, 3]))
        if times:
            values += [data.draw(garbage)] * times
            glitches += 1
        level += step
        values.append(level)
    # What was told at once of a small value is paid back by then: four usual steps a glitch, at most.
    values += range(level + 1, level + 12 * glitches + 1)
    level = values[-1]
    meter = Meter()
    meter.datatype["fail_span"] = None
    told = meter.all(*values)
    assert sum(value for value, _ in told) == level - begin
    assert sum(flags == GLITCH for _, flags in told) >= glitches
    assert sum("counter_reset" in flags or "counter_jump" in flags for _, flags in told) == glitches


@given(st.lists(st.lists(small_steps, min_size=15, max_size=30), min_size=1, max_size=5), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_what_is_consumed_after_a_reset_counts(lives: list[list[int]], shown: int):
    """A meter that is on from zero, or from what it has already counted, again and again."""
    values, expected = [20], -20
    for number, life in enumerate(lives):
        level = shown if number else 20
        values += [level, *(level := level + step for step in life)]
        expected += level
    told = Meter().all(*values)
    assert sum(value for value, _ in told) == expected
    assert [flags for _, flags in told].count(GLITCH) == 0


@given(st.lists(st.floats(0, 1e15) | st.integers(0, 70_000), min_size=1, max_size=40), st.sampled_from([None, 65_536]))
@settings(max_examples=200, deadline=None)
def test_whatever_comes_nothing_is_negative_and_the_state_is_small(values, width):
    meter, counter = first_state(0, values[0]), Counter(width)
    for at, value in enumerate(values[1:], 1):
        told = advance(meter, at, value, counter)
        assert told is not None
        assert 0 <= told.consumption < float("inf")
        assert len(orjson.dumps(meter)) < 250
        meter = orjson.loads(orjson.dumps(meter))
    assert advance(meter, len(values) - 1, 1e9, counter) is None or len(values) == 1


@given(st.lists(st.integers(0, 50), min_size=3, max_size=40), st.integers(0, 2**32).map(random.Random))
@settings(max_examples=50, deadline=None)
def test_repeated_and_late_states_change_nothing(values, rng):
    plain, with_repeats = Meter(), Meter()
    expected = [r for n, value in enumerate(values) for r in plain.reads(n * 60, value)]
    told = []
    for n, value in enumerate(values):
        told += with_repeats.reads(n * 60, value)
        if rng.random() < 0.5:
            earlier = rng.randrange(n + 1)
            assert with_repeats.reads(earlier * 60, rng.choice(values)) == []
    assert told == expected
