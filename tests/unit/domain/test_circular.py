"""Circular quantities: arcs, directions, and that turning every reading changes no verdict."""

from itertools import pairwise
from math import cos, hypot, log, pi, radians, sin, sqrt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import S, message, reading

from preservarium.domain.circular import arc, direction, period_of, unit_vector, wrapped
from preservarium.domain.quality import anomaly
from preservarium.domain.quality.anomaly import Detector, detector_of
from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.validation import Limits, new_state, validate
from preservarium.domain.registry.documents import Datatype

LIMITS = Limits(future_skew_us=300 * S, store_failed=True, series_max=10)


@pytest.mark.parametrize(
    ("a", "b", "period", "way"),
    [
        (1, 359, 360, 2), (359, 1, 360, -2), (10, 350, 360, 20), (90, 90, 360, 0), (180, 0, 360, 180), (0, 180, 360, 180),
        (-10, 370, 360, -20), (23.5, 0.5, 24, -1), (0.25, 0.75, 1, 0.5), (1e308, -1e308, 360, None), (720, 0, 360, 0),
    ],
)  # fmt: skip
def test_an_arc_is_the_shorter_way(a, b, period, way):
    found = arc(a, b, period)
    assert -period / 2 < found <= period / 2
    if way is not None:
        assert found == way


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6), st.sampled_from([360.0, 24.0, 2 * pi, 1e-3]))
def test_an_arc_leads_from_the_one_to_the_other(a, b, period):
    way = arc(a, b, period)
    assert abs(way) <= period / 2
    assert abs(arc(b + way, a, period)) < 1e-6
    assert 0 <= wrapped(a, period) < period
    assert arc(wrapped(a, period), a, period) == pytest.approx(0, abs=1e-9)


def test_the_mean_and_the_spread_of_directions():
    def of(*values: float) -> Any:
        vectors = [unit_vector(value, 360) for value in values]
        return direction(sum(x for x, _ in vectors), sum(y for _, y in vectors), len(values), 360)

    assert of(350, 10).mean == pytest.approx(0)
    assert of(90).spread == 0
    assert of(0, 90).mean == pytest.approx(45)
    values = (10, 20, 60, 350)
    length = hypot(sum(cos(radians(v)) for v in values), sum(sin(radians(v)) for v in values)) / 4
    assert of(*values).spread == pytest.approx(sqrt(-2 * log(length)) * 180 / pi)
    assert of(0, 120, 240) == (None, None)
    assert direction(*unit_vector(18, 24), 1, 24).mean == pytest.approx(18)


@pytest.mark.parametrize("circular", [0, -360, "x", True, [], float("inf"), float("nan")])
def test_a_period_that_cannot_be(circular):
    datatype: Any = {"name": "wind", "rev": 1, "kind": "number", "unit": "°", "circular": circular}
    check = compile_checks(None, {"wind": datatype}.get).series("wind")
    assert check.circular is None
    assert check.problems == (f"wind: circular must be the period, a number over 0, not {circular!r}",)


def test_a_counter_is_not_circular_and_neither_is_a_text():
    with pytest.raises(ValueError, match="a counter is not circular"):
        period_of({"circular": 360, "counter": {}})
    for other in ({"kind": "text"}, {"kind": "number", "counter": {}}):
        with pytest.raises(ValueError, match="is not circular"):
            Datatype.model_validate({"name": "x", "unit": "", "circular": 360, **other})
    assert Datatype.model_validate({"name": "x", "unit": "°", "kind": "number", "circular": 360}).circular == 360
    with pytest.raises(ValueError, match="there is no parameter circular"):
        detector_of({"circular": 360})


def judged(values: list[float], unit: str = "°", step_s: float = 60, **datatype: Any) -> list[tuple[int, list[str]]]:
    """(quality, flags) of each reading in the end, revisions applied."""
    wind: Any = {"name": "wind", "rev": 1, "kind": "number", "unit": "°", "circular": 360, **datatype}
    checks, state = compile_checks(None, {"wind": wind}.get), new_state()
    assert checks.series("wind").problems == ()
    found: dict[int, tuple[int, list[str]]] = {}
    for offset, value in enumerate(values):
        one = message(offset, reading(value, "wind", unit), at=offset * step_s)
        validate(one, checks, state, LIMITS)
        assert one["circular"] == {"wind": 360}
        for each in one["readings"]:
            found[each.get("timestamp", one["timestamp"])] = each["quality"], each.get("flags", [])
    return list(found.values())


TESTS = {
    "rate_of_change": {"tests": {"rate_of_change": {"threshold": 1 / 12, "fail_threshold": 1}}},
    "spike": {"tests": {"spike": {"suspect_threshold": 15, "fail_threshold": 60}}},
    "spike, differential": {"tests": {"spike": {"suspect_threshold": 15, "fail_threshold": 60, "method": "differential"}}},
    "flat_line": {"tests": {"flat_line": {"suspect_threshold": 120, "fail_threshold": 240, "tolerance": 5}}},
    "attenuated_signal": {
        "tests": {"attenuated_signal": {"suspect_threshold": 8, "fail_threshold": 2, "test_period": 480, "check_type": "range"}}
    },
    "attenuated_signal, std": {
        "tests": {"attenuated_signal": {"suspect_threshold": 8, "fail_threshold": 2, "test_period": 480}}
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("test", "values", "flagged"),
    [
        ("rate_of_change", [359, 1, 357, 1, 5, 20], [5]),
        ("spike", [1, 359, 2, 30, 1, 358, 357], [3]),
        ("spike, differential", [1, 359, 340, 1, 2], [2]),
        ("flat_line", [1, 359, 0, 358, 1, 359, 90], [2, 3, 4, 5]),
        ("attenuated_signal", [1, 359] * 6, [8, 9, 10, 11]),
        ("attenuated_signal, std", [1, 359] * 6, [8, 9, 10, 11]),
    ],
)
def test_the_tests_go_by_the_shorter_way(test, values, flagged):
    found = judged(values, **TESTS[test])
    assert [n for n, (_, flags) in enumerate(found) if flags] == flagged
    assert {flag for _, flags in found for flag in flags} == {test.partition(",")[0]}


def test_the_period_is_in_the_datatype_s_unit():
    near_north = [radians(359), radians(1)] * 3
    assert judged(near_north, "rad", **TESTS["rate_of_change"]) == judged([359, 1] * 3, **TESTS["rate_of_change"])
    assert all(not flags for _, flags in judged(near_north, "rad", **TESTS["rate_of_change"]))


def test_a_revision_keeps_the_value_as_it_came():
    wind: Any = {"name": "wind", "rev": 1, "kind": "number", "unit": "°", "circular": 360, **TESTS["spike"]}
    checks, state, readings = compile_checks(None, {"wind": wind}.get), new_state(), []
    for offset, value in enumerate([-1, 400, 1]):
        one = message(offset, reading(value, "wind", "°"))
        validate(one, checks, state, LIMITS)
        readings += one["readings"]
    (revised,) = [r for r in readings if r.get("revised")]
    assert (revised["value"], revised["quality"]) == (400, 3)


def test_a_message_without_circular_readings_says_nothing_of_it():
    one = message(0, reading(1, "wind", "furlong"), reading(2, "temp"))
    wind: Any = {"name": "wind", "rev": 1, "kind": "number", "unit": "°", "circular": 360}
    validate(one, compile_checks(None, {"wind": wind}.get), new_state(), LIMITS)
    assert "circular" not in one


def test_a_vane_that_goes_round_is_not_flat():
    around = [n * 40 % 360 for n in range(40)]
    assert all(not flags for _, flags in judged(around, **TESTS["flat_line"]))
    assert all(not flags for _, flags in judged(around, **TESTS["attenuated_signal"]))


eighths = st.integers(0, 2_879).map(lambda n: n / 8)


@given(
    st.lists(eighths | st.sampled_from([0.0, 0.5, 359.5, 358.0, 3.0]), min_size=1, max_size=30),
    st.integers(-8_000, 8_000).map(lambda n: n / 8),
    st.sampled_from(sorted(TESTS)),
)
@settings(max_examples=300, deadline=None)
def test_turning_every_reading_changes_no_verdict(values, turn, test):
    # Eighths are exact in binary, so that no verdict hangs on rounding; half a turn has two shorter ways.
    if any(abs(arc(a, b, 360)) == 180 for a, b in pairwise(values)):
        values = [value / 2 for value in values]
    assert judged([value + turn for value in values], **TESTS[test]) == judged(values, **TESTS[test])


def test_an_anomaly_of_a_direction_is_a_turn_and_not_the_way_past_north():
    detector = Detector(threshold=3, window=16, warm_up=32, smoothing=0.5, circular=360.0)

    def told(by: float, seasonal: bool) -> list[tuple[int, bool, float]]:
        series, found = anomaly.new_series(), []
        values = [(355 + n * 7 % 10 + by) % 360 for n in range(200)] + [(180 + by) % 360] * 10 + [by % 360] * 40
        for n, value in enumerate(values):
            one = anomaly.judge(series, (n + 1) * 600 * S, value, detector._replace(seasonal=seasonal))
            if one is not None:
                found.append((n, one.begins, round(arc(one.expected, by, 360), 1)))
        return found

    for seasonal in (False, True):
        plain = told(0, seasonal)
        assert [begins for _, begins, _ in plain] == [True, False]
        assert 200 <= plain[0][0] < 205
        assert abs(plain[0][2]) < 6
        for by in (10, 95, 181, 270.5):
            turned = told(by, seasonal)
            assert [one[:2] for one in turned] == [one[:2] for one in plain]
            assert [one[2] for one in turned] == pytest.approx([one[2] for one in plain], abs=0.2)
