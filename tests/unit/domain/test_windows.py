"""Windows: what they hold, when they close, and that order, duplicates, batches and crashes change nothing."""

import random
from math import cos, fsum, hypot, pi, radians
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import S, message, reading

from preservarium.domain.circular import arc
from preservarium.domain.quality import validation
from preservarium.domain.quality.arrival import Order
from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.validation import Limits
from preservarium.domain.windows import (
    VALUE_MAX,
    Nature,
    Plan,
    Spec,
    dump_state,
    from_version_1,
    new_state,
    next_end_us,
    observe,
    parse_specs,
    silence,
)

#: A whole day, so that windows of any size begin here.
T = 1_699_920_000 * S
LATENESS_S = 60


def plan(windows: str = "60s", *, horizon_s: float = 600, series_max: int = 10, panes_max: int = 500) -> Plan:
    return Plan(parse_specs(windows), LATENESS_S * S, round(horizon_s * S), series_max, panes_max)


def at(offset: int, seconds: float, value: Any, *more: Any, **fields: Any) -> Any:
    return message(offset, reading(value, **fields), *more, timestamp=T + round(seconds * S))


def plain(component_type: str) -> None:
    return None


class Device:
    """State that goes through bytes between any two messages, as it does between batches."""

    def __init__(self, made: Plan, natures: Any = plain) -> None:
        self.plan, self.natures, self.state = made, natures, new_state()
        self.windows: list[Any] = []

    def observe(self, *messages: Any) -> list[Any]:
        found: list[Any] = []
        for one in messages:
            self.outcome = observe(one, self.state, self.plan, self.natures)
            found += self.outcome.windows
            self.state = orjson.loads(dump_state(self.state))
        self.windows += found
        return found

    def silence(self, seconds: float) -> list[Any]:
        found = silence("dev-1", self.state, T + round(seconds * S), self.plan, self.natures)
        self.windows += found
        self.state = orjson.loads(dump_state(self.state))
        return found

    def final(self) -> dict[str, Any]:
        """The last record of each window, without what tells how it came about."""
        return {
            w["window_id"]: {k: v for k, v in w.items() if k not in ("revision", "closed_by")} for w in self.windows
        }


def test_a_window_closes_when_the_watermark_comes_to_its_end():
    device = Device(plan())
    assert device.observe(at(0, 0, 20.0), at(1, 30, 22.0), at(2, 59.999, 21.0), at(3, 119, 5)) == []
    (window,) = device.observe(at(4, 120, 6))
    assert {k: window[k] for k in ("count", "min", "max", "mean", "sum", "last", "revision", "closed_by")} == {
        "count": 3, "min": 20.0, "max": 22.0, "mean": 21.0, "sum": 63.0, "last": 21.0, "revision": 0,
        "closed_by": "watermark",
    }  # fmt: skip
    assert (window["window_start"], window["window_end"], window["size_s"]) == (T, T + 60 * S, 60)
    assert (window["device_id"], window["component_type"], window["unit"]) == ("dev-1", "temp", "°C")
    assert window["last_at"] == T + 59_999_000
    assert device.observe(at(5, 125, 6)) == []
    assert next_end_us(device.state) == T + 120 * S


@pytest.mark.parametrize("stored_every", [1, 7, 1_000])
def test_a_sum_is_exact_of_however_many_values_and_its_state_stays_small(stored_every: int):
    rng = random.Random(stored_every)
    values = [rng.choice([-1, 1]) * rng.uniform(1, 10) * 10.0 ** rng.randint(-12, 18) for _ in range(600)]
    values += [-value for value in rng.sample(values, 300)]
    state, made, sizes = new_state(), plan("1h"), []
    for number, value in enumerate(values):
        observe(at(number, number, value), state, made, plain)
        if number % stored_every == 0:
            stored = dump_state(state)
            sizes.append(len(stored))
            state = orjson.loads(stored)
    (window,) = silence("dev-1", state, T + 3_600 * S, made, plain)
    assert (window["count"], window["sum"]) == (900, fsum(values))
    assert max(sizes) < 512


def test_later_data_corrects_and_too_late_data_is_counted():
    device = Device(plan(horizon_s=300))
    device.observe(at(0, 10, 1), at(1, 200, 2))
    (window,) = device.observe(at(2, 20, 5))
    assert (window["revision"], window["count"], window["sum"], window["closed_by"]) == (1, 2, 6.0, "late")
    assert window["window_id"] == device.windows[0]["window_id"]
    (again,) = device.observe(at(3, 30, 1))
    assert (again["revision"], again["sum"]) == (2, 7.0)
    (first,) = device.observe(at(4, 70, 9))  # a window that had no reading is new, however late
    assert (first["revision"], first["count"]) == (0, 1)
    # The window [0, 60) takes corrections until the watermark is at 360.
    device.observe(at(5, 419, 1))
    assert device.observe(at(6, 40, 1))[0]["revision"] == 3
    device.observe(at(7, 420, 1))
    assert device.observe(at(8, 40, 1)) == []
    assert device.outcome.dropped == 1
    assert device.outcome.taken == 0


def test_hopping_windows_share_their_panes():
    device = Device(plan("3m/1m", horizon_s=600))
    windows = device.observe(*(at(i, i * 30, i) for i in range(20)))
    spans = {(w["window_start"] - T) // (60 * S): (w["count"], w["sum"]) for w in windows}
    # The first ones began before there was a reading.
    assert spans == {
        -2: (2, 1.0),
        -1: (4, 6.0),
        0: (6, 15.0),
        1: (6, 27.0),
        2: (6, 39.0),
        3: (6, 51.0),
        4: (6, 63.0),
        5: (6, 75.0),
    }
    late = device.observe(at(20, 65, 100))
    assert {(w["window_start"] - T) // (60 * S): (w["sum"], w["revision"]) for w in late} == {
        -1: (106.0, 1), 0: (115.0, 1), 1: (127.0, 1)
    }  # fmt: skip
    # A late reading is also in the windows that are still open.
    device.observe(at(21, 8.5 * 60, 1000))
    windows = device.observe(at(22, 11 * 60, 0))
    assert next(w for w in windows if w["window_start"] == T + 7 * 60 * S)["sum"] == sum(range(14, 20)) + 1000


def test_silence_closes_what_has_ended_and_what_comes_after_is_a_correction():
    device = Device(plan("60s,1h"))
    device.observe(at(0, 10, 1))
    assert device.silence(59) == []
    (window,) = device.silence(61)
    assert (window["size_s"], window["closed_by"], window["revision"]) == (60, "silence", 0)
    assert device.silence(3_599) == []
    late = device.observe(at(1, 20, 2), at(2, 90, 3))
    assert [(w["size_s"], w["revision"], w["sum"]) for w in late] == [(60, 1, 3.0)]
    assert [(w["size_s"], w["sum"]) for w in device.silence(4_000)] == [(60, 3.0), (3_600, 6.0)]
    assert next_end_us(device.state) is None
    # A silence is not the device's time: corrections are still taken.
    device.silence(1_000_000)
    assert [w["revision"] for w in device.observe(at(3, 30, 1))] == [1, 2]


def test_what_does_not_count_is_left_out():
    device = Device(plan())
    device.observe(
        at(0, 0, 1.0),
        at(1, 1, 100.0, quality=4),
        at(2, 2, None, quality=9),
        at(3, 3, 100.0, quality=3, flags=["unit_unknown"]),
        at(4, 4, 100.0, quality=3, flags=["spike"], revised=True),
        at(5, 5, None, value_text="x"),
        at(6, 6, True),
        at(7, 7, VALUE_MAX * 10),
        at(8, 8, 2.0, quality=3, flags=["gross_range"]),
        at(9, 9, 1.0, pin_position="a\tb"),
    )
    assert [(w["count"], w["sum"]) for w in device.observe(at(10, 200, 0))] == [(2, 3.0)]


def test_readings_with_times_of_their_own():
    device = Device(plan())
    own = reading(7, timestamp=T + 30 * S)
    (window,) = device.observe(at(0, 500, 1, own))
    assert (window["count"], window["sum"], window["closed_by"]) == (1, 7.0, "watermark")


def test_a_run_again_changes_nothing_and_generations_are_apart():
    device = Device(plan())
    device.observe(at(0, 0, 1), at(1, 1, 2))
    assert device.observe(at(0, 0, 1), at(1, 1, 2)) == []
    assert device.outcome.duplicate
    device.observe({**at(0, 0, 1), "generation": 2})
    live, replay = device.silence(100)
    assert (live["generation"], live["count"]) == (0, 2)
    assert (replay["generation"], replay["count"]) == (2, 1)
    assert live["window_id"] != replay["window_id"]


def test_limits_are_told_once():
    device = Device(plan(series_max=2))
    many = message(0, *[reading(1.0, pin_position=str(p)) for p in range(4)], timestamp=T)
    device.observe(many)
    assert device.outcome.limited
    assert device.outcome.taken == 2
    device.observe(at(1, 1, 1, pin_position="9"))
    assert not device.outcome.limited
    with pytest.raises(ValueError, match="need 364 panes a series; 200 are allowed"):
        plan("60s", horizon_s=21_600, panes_max=200)


def test_state_does_not_grow_with_time():
    device = Device(plan("1h,24h,6h/1h", horizon_s=6 * 3_600))
    sizes = []
    for i in range(3_000):
        device.observe(at(i, i * 600, 20 + i % 7 / 10))
        sizes.append(len(dump_state(device.state)))
    assert max(sizes[1_000:]) <= max(sizes[:1_000]) * 1.05
    assert max(sizes) < 2_048
    device.observe(*(at(3_000 + i, 3_000 * 600 + i * 86_400, 1, pin_position=str(i)) for i in range(9)))
    assert len(device.state["g"]["0"]["s"]) <= 3  # series that ended are forgotten


@pytest.mark.parametrize(
    ("text", "specs"),
    [("60s", [(60, 60)]), (" 5m , 24h/1h,5m", [(300, 300), (86_400, 3_600)]), ("1d", [(86_400, 86_400)]), ("", [])],
)
def test_windows_as_people_write_them(text, specs):
    assert parse_specs(text) == tuple(Spec(*spec) for spec in specs)


@pytest.mark.parametrize(
    "text", ["1", "0s", "1h/7m", "1h/2h", "h", "-1h", "1h/0s", "1w", ",".join(f"{n}s" for n in range(1, 11))]
)
def test_windows_that_cannot_be(text):
    with pytest.raises(ValueError, match="window"):
        parse_specs(text)


# --- the property ----------------------------------------------------------------------------------------------------

WINDOWS = "60s,5m/1m,10m"


def oracle(messages: list[Any], made: Plan) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Every window by definition, over all readings at once."""
    found: dict[tuple[Any, ...], list[tuple[int, float]]] = {}
    for one in messages:
        for each in one["readings"]:
            for size_s, hop_s in made.specs:
                size, hop = size_s * S, hop_s * S
                start = one["timestamp"] // hop * hop
                while start + size > one["timestamp"]:
                    key = (each["component_type"], each["pin_position"], size_s, hop_s, start)
                    found.setdefault(key, []).append((one["timestamp"], each["value"]))
                    start -= hop
    return {
        key: (len(v), min(x for _, x in v), max(x for _, x in v), fsum(x for _, x in v), max(v)[1])
        for key, v in found.items()
    }


def as_oracle(device: Device) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    return {
        (w["component_type"], w["pin_position"], w["size_s"], w["hop_s"], w["window_start"]): (
            w["count"], w["min"], w["max"], w["sum"], w["last"]
        )
        for w in device.final().values()
    }  # fmt: skip


numbers = (
    st.floats(-1e12, 1e12, allow_nan=False) | st.sampled_from([0.1, 0.2, -0.0, 1e16, -1e16, 1.0]) | st.integers(-5, 5)
)


@st.composite
def histories(draw: Any) -> list[tuple[float, list[tuple[str, float]]]]:
    """(second, readings of some pins), in event time."""
    times = sorted(draw(st.lists(st.integers(0, 2_000), min_size=1, max_size=40)))
    return [(t, draw(st.lists(st.tuples(st.sampled_from("ab"), numbers), min_size=1, max_size=2))) for t in times]


def messages_of(history: list[tuple[float, list[tuple[str, float]]]]) -> list[Any]:
    return [
        message(i, *[reading(v, pin_position=p) for p, v in found], timestamp=T + round(t * S))
        for i, (t, found) in enumerate(history)
    ]


@given(histories(), st.integers(0, 2**32).map(random.Random))
@settings(max_examples=150, deadline=None)
def test_order_within_the_lateness_duplicates_batches_and_crashes_change_nothing(history, rng: random.Random):
    made = plan(WINDOWS)
    reference = Device(made)
    reference.observe(*messages_of(history))
    expected = oracle(messages_of(history), made)

    # Each message is late by up to the lateness: none is dropped, none corrects.
    shuffled = messages_of(sorted(history, key=lambda one: one[0] + rng.uniform(0, LATENESS_S)))
    device = Device(made)
    stored, position = dump_state(device.state), 0
    records: dict[tuple[str, int], Any] = {}
    while position < len(shuffled):
        batch = shuffled[position : position + rng.randint(1, 7)]
        device.state = orjson.loads(stored)
        crash_at = rng.randint(0, len(batch)) if rng.random() < 0.4 else None
        for i, one in enumerate(batch):
            if i == crash_at:
                break
            outcome = observe(one, device.state, made, plain)
            assert not outcome.late
            for window in outcome.windows:
                # What a crash makes again is the same, to the last bit.
                known = records.setdefault((window["window_id"], window["revision"]), window)
                assert orjson.dumps(known) == orjson.dumps(window)
            device.windows += outcome.windows
        else:
            stored = dump_state(device.state)
            position += max(0, len(batch) - rng.randint(0, 2)) or len(batch)  # some of it comes again
    device.state = orjson.loads(stored)
    assert device.silence(10_000) is not None
    reference.silence(10_000)
    assert as_oracle(device) == as_oracle(reference) == expected
    assert sorted(map(orjson.dumps, device.final().values())) == sorted(map(orjson.dumps, reference.final().values()))


@given(histories(), st.integers(0, 2**32).map(random.Random))
@settings(max_examples=100, deadline=None)
def test_any_order_within_the_horizon_gives_the_same_windows_by_corrections(history, rng: random.Random):
    made = plan(WINDOWS, horizon_s=2_000)
    messages = messages_of(history)
    rng.shuffle(history)
    device = Device(made)
    for one in messages_of(history):
        device.observe(one)
        if rng.random() < 0.1:
            device.silence(rng.uniform(0, 2_500))
    device.silence(10_000)
    assert as_oracle(device) == oracle(messages, made)
    revisions: dict[str, int] = {}
    for window in device.windows:
        assert window["revision"] == revisions.get(window["window_id"], -1) + 1
        revisions[window["window_id"]] = window["revision"]


# --- counters --------------------------------------------------------------------------------------------------------


def counts(component_type: str) -> Nature:
    return Nature(counts=component_type == "meter")


def test_windows_of_a_counter_sum_what_validate_told():
    device = Device(plan("60s,2m/1m"), counts)

    def told(offset: int, seconds: float, value: float, consumption: float | None) -> Any:
        more = {} if consumption is None else {"timestamp": T + round(seconds * S), "derived": True}
        derived = [reading(consumption, "meter_consumption", "m³", **more)] if more else []
        return at(offset, seconds, value, *derived, component_type="meter", unit="m³")

    device.observe(told(0, 0, 900, None), told(1, 30, 950, 50), told(2, 50, 990, 40), told(3, 40, 970, None))
    device.observe(told(4, 70, 5, 15), told(5, 100, 30, 25))
    device.observe(at(6, 61, 999, component_type="other"), at(7, 100, 1, component_type="other"))
    device.silence(1_000)
    consumed = {
        (w["size_s"], (w["window_start"] - T) // S): (w["count"], w["consumption"])
        for w in device.windows
        if w["component_type"] == "meter"
    }
    assert consumed == {
        (60, 0): (4, 90), (60, 60): (2, 40), (120, -60): (4, 90), (120, 0): (6, 130), (120, 60): (2, 40)
    }  # fmt: skip
    assert all("consumption" not in w for w in device.windows if w["component_type"] != "meter")


def test_state_of_the_version_before_goes_on():
    """Its counters' panes had the first reading where the consumption is now."""
    start_s = T // S
    closed = [[[60, start_s - 60, 1, 1.0, 1.0, T - S, 1.0, T - S, 1.0, 1.0]], {}]
    panes = [
        [60, start_s, 2, 3.0, 5.0, T + 9 * S, 5.0, T + S, 3.0, 8.0],
        [60, start_s + 60, 1, 2.0, 2.0, T + 61 * S, 2.0, None, None, 2.0],
    ]
    key = "MQTT\tmeter\t-1\tm³"
    made = plan(horizon_s=600)
    device = Device(made, counts)
    device.state = {
        "v": 1, "g": {"0": {
            "m": {}, "a": T + 61 * S, "c": T, "n": T + 60 * S, "w": made.name, "s": {key: [panes, orjson.dumps(closed).decode()]},
        }},
    }  # fmt: skip
    from_version_1(device.state)
    eaten = reading(4.0, "meter_consumption", "m³", timestamp=T + 20 * S, derived=True)
    device.observe(at(1, 20, 9, eaten, component_type="meter", unit="m³"))
    device.observe(
        at(
            2,
            -1,
            2,
            reading(1.0, "meter_consumption", "m³", timestamp=T - S, derived=True),
            component_type="meter",
            unit="m³",
        )
    )
    device.silence(1_000)
    found = {
        (w["window_start"] - T) // S: w["consumption"]
        for w in device.final().values()
        if w["component_type"] == "meter"
    }
    assert found == {-60: 1.0, 0: 2.0 + 4.0, 60: 0.0}


METER: Any = {"name": "meter", "rev": 1, "kind": "number", "unit": "m³"}


@st.composite
def lives_of_a_meter(draw: Any) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """(second, state) in event time, and how it counts: all that can happen to a meter."""
    width = draw(st.sampled_from([None, 1_000.0]))
    at, level, states, swaps = 0, draw(st.sampled_from([0.0, 10.0, 990.0])), [], []
    for what in draw(st.lists(st.sampled_from("rrrrrrgGdsz="), min_size=1, max_size=40)):
        at += draw(st.integers(1, 120))
        if what == "r":
            level += draw(st.sampled_from([0.0, 0.1, 0.3, 1.0, 7.0, 300.0]))
            if width is not None:
                level %= width
        elif what == "z":
            level = draw(st.sampled_from([0.0, 0.2]))
        elif what == "s":
            final = draw(st.sampled_from([None, level + 0.1]))
            level = draw(st.sampled_from([0.0, 5.0]))
            swaps.append({"at": T + at * S, "final": final, "initial": level})
        shown = {"g": 0.0, "G": draw(st.sampled_from([37.0, 65_535.0])), "d": max(0.0, level - 0.1)}.get(what, level)
        states.append((at, shown))
        if what == "=":
            states.append((at, shown))
    counter: dict[str, Any] = {"swaps": swaps}
    if width is not None:
        counter["width"] = width
    return states, counter


@given(
    lives_of_a_meter(),
    st.sampled_from([0, 60, 300]),
    st.sampled_from(["60s", "60s,5m/1m,10m", "7s,14s", "1h,24h,24h/1h"]),
    st.integers(0, 2**32).map(random.Random),
)
@settings(max_examples=150, deadline=None)
def test_a_window_consumes_what_its_readings_say_whatever_happens(life, lateness_s, windows, rng: random.Random):
    states, counter = life
    checks = compile_checks(None, lambda name: {**METER, "counter": counter} if name == "meter" else None)
    limits = Limits(300 * S, store_failed=True, series_max=10, order=Order(lateness_us=lateness_s * S, repeats_max=20))
    state = validation.new_state()
    made = Plan(parse_specs(windows), LATENESS_S * S, 10_000 * S, 10, 10_000)
    device = Device(made, counts)
    validated: list[Any] = []

    def take(due: list[Any]) -> None:
        for one in due:
            validation.judge(one, checks, state, limits)
            validated.append(one)
            device.observe(one)

    # Out of order by more than either lateness, some twice.
    arrivals = sorted(enumerate(states), key=lambda one: one[1][0] + rng.choice([0, 0, 0, rng.uniform(0, 400)]))
    for offset, (_, (seconds, value)) in enumerate(arrivals):
        repeats = [offset] if rng.random() < 0.9 else [offset, offset + 1_000]
        for number in repeats:
            one = at(number, seconds, value, component_type="meter", unit="m³", clock="device")
            one["received_at"] = T + 100_000 * S
            take(validation.receive(one, checks, state, limits, (len(validated), 0)).due)
        if rng.random() < 0.05:
            device.silence(seconds + rng.uniform(0, 200))
    take(validation.fall_silent(state, 10**9, 10**6))
    device.silence(10**6)

    told = [
        (r["timestamp"], r["value"])
        for one in validated
        for r in one["readings"]
        if r["component_type"] == "meter_consumption"
    ]
    final = list(device.final().values())
    for window in final:
        if window["component_type"] == "meter":
            inside = [value for when, value in told if window["window_start"] <= when < window["window_end"]]
            assert window["consumption"] == fsum(inside), window
    # So the windows of one size add up to the readings, and those of the consumption say the same.
    smallest = min(made.specs)
    whole = {
        name: fsum(w[field] for w in final if w["component_type"] == name and (w["size_s"], w["hop_s"]) == smallest)
        for name, field in (("meter", "consumption"), ("meter_consumption", "sum"))
    }
    assert whole["meter"] == pytest.approx(fsum(value for _, value in told), abs=1e-6)
    assert whole["meter"] == pytest.approx(whole["meter_consumption"], abs=1e-6)


def test_a_reset_within_an_hour_counts_whole():
    checks = compile_checks(None, lambda name: {**METER, "counter": {}} if name == "meter" else None)
    state, limits = validation.new_state(), Limits(300 * S, store_failed=False, series_max=10)
    device = Device(plan("1h,24h", horizon_s=0), counts)
    told = []
    for offset, value in enumerate((10, 20, 0, 25)):
        one = at(offset, offset * 600, value, component_type="meter", unit="m³")
        one["received_at"] = one["timestamp"]
        validation.validate(one, checks, state, limits)
        told += [r["value"] for r in one["readings"] if r.get("derived")]
        device.observe(one)
    device.silence(200_000)
    assert sum(told) == 35
    assert [w["consumption"] for w in device.windows if w["component_type"] == "meter"] == [35, 35]


# --- circular quantities ---------------------------------------------------------------------------------------------


def is_a_direction(component_type: str) -> Nature:
    return Nature(circular=360.0)


def test_a_window_of_directions_has_their_vector_mean_and_no_extremes():
    device = Device(plan("60s,1h"), is_a_direction)
    device.observe(*(at(i, i, (1, 359)[i % 2]) for i in range(60)))
    device.silence(4_000)
    for window in device.windows:
        assert (window["mean"], window["count"], window["last"], window["circular"]) == (0.0, 60, 359, 360.0)
        assert window["spread"] == pytest.approx(1.0, abs=1e-3)
        assert (window["cos_sum"], window["sin_sum"]) == (pytest.approx(60 * cos(radians(1))), 0.0)
        assert not {"min", "max", "sum", "consumption"} & window.keys()


def test_directions_that_point_all_ways_alike_have_no_mean():
    device = Device(plan(), is_a_direction)
    device.observe(*(at(i, i, value) for i, value in enumerate((10, 190, 100, 280))))
    (window,) = device.silence(100)
    assert (window["mean"], window["spread"], window["count"]) == (None, None, 4)


def test_where_a_datatype_becomes_circular_a_window_counts_what_came_since():
    nature: list[Any] = [None]
    device = Device(plan("1m,5m"), lambda name: nature[0])
    device.observe(at(0, 0, 359), at(1, 61, 358))
    nature[0] = Nature(circular=360.0)
    device.observe(at(2, 70, 350), at(3, 130, 1), at(4, 140, 359))
    windows = {(w["size_s"], (w["window_start"] - T) // S): w for w in device.silence(400)}
    assert windows[60, 60]["max"] == 358  # began before
    assert (windows[60, 120]["mean"], windows[60, 120]["count"]) == (0.0, 2)
    assert (windows[300, 0]["mean"], windows[300, 0]["count"]) == (0.0, 2)


directions = st.integers(0, 3_599).map(lambda tenths: tenths / 10)


@given(
    st.lists(st.tuples(st.integers(0, 2_000), directions), min_size=1, max_size=40, unique_by=lambda one: one[0]),
    st.integers(-7_200, 7_200).map(lambda tenths: tenths / 10),
    st.sampled_from([360.0, 24.0, 2 * pi, 400.0]),
    st.integers(0, 2**32).map(random.Random),
)
@settings(max_examples=150, deadline=None)
def test_turning_every_reading_turns_the_mean_and_the_last_and_nothing_else(history, turn, period, rng: random.Random):
    def final(by: float) -> dict[Any, Any]:
        device = Device(plan(WINDOWS, horizon_s=2_000), lambda name: Nature(circular=period))
        for offset, (seconds, value) in enumerate(shuffled):
            device.observe(at(offset, seconds, (value + by) / 360 * period))
        device.silence(10_000)
        return {(w["size_s"], w["hop_s"], w["window_start"]): w for w in device.final().values()}

    shuffled = list(history)
    rng.shuffle(shuffled)
    still, turned = final(0), final(turn)
    assert still.keys() == turned.keys()
    near = pytest.approx(0.0, abs=1e-6 * period)
    for key, window in still.items():
        other = turned[key]
        assert other["count"] == window["count"]
        assert arc(other["last"] - window["last"], turn / 360 * period, period) == near
        length = hypot(window["cos_sum"], window["sin_sum"]) / window["count"]
        if length > 1e-3:  # nearer to nothing, rounding alone has a direction
            assert arc(other["mean"] - window["mean"], turn / 360 * period, period) == near
            assert other["spread"] - window["spread"] == pytest.approx(0.0, abs=1e-4 * period)
            assert 0 <= other["mean"] < period
