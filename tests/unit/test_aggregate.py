"""Windows: what they hold, when they close, and that order, duplicates, batches and crashes change nothing."""

import random
from math import fsum
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_support import S, message, reading

from preservarium.domain.aggregate import (
    VALUE_MAX,
    Plan,
    Spec,
    dump_state,
    new_state,
    next_end_us,
    observe,
    parse_specs,
    silence,
)
from preservarium.domain.counter import Counter

#: A whole day, so that windows of any size begin here.
T = 1_699_920_000 * S
LATENESS_S = 60


def plan(windows: str = "60s", *, horizon_s: float = 600, series_max: int = 10, panes_max: int = 500) -> Plan:
    return Plan(parse_specs(windows), LATENESS_S * S, round(horizon_s * S), series_max, panes_max)


def at(offset: int, seconds: float, value: Any, *more: Any, **fields: Any) -> Any:
    return message(offset, reading(value, **fields), *more, timestamp=T + round(seconds * S))


def no_counter(component_type: str) -> None:
    return None


class Device:
    """State that goes through bytes between any two messages, as it does between batches."""

    def __init__(self, made: Plan, counters: Any = no_counter) -> None:
        self.plan, self.counters, self.state = made, counters, new_state()
        self.windows: list[Any] = []

    def observe(self, *messages: Any) -> list[Any]:
        found: list[Any] = []
        for one in messages:
            self.outcome = observe(one, self.state, self.plan, self.counters)
            found += self.outcome.windows
            self.state = orjson.loads(dump_state(self.state))
        self.windows += found
        return found

    def silence(self, seconds: float) -> list[Any]:
        found = silence("dev-1", self.state, T + round(seconds * S), self.plan, self.counters)
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
            outcome = observe(one, device.state, made, no_counter)
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


def test_windows_of_a_counter_say_what_was_consumed():
    device = Device(plan("60s,2m/1m"), lambda name: Counter(1_000) if name == "temp" else None)
    device.observe(at(0, 0, 900), at(2, 50, 990), at(1, 30, 950))
    device.observe(at(3, 70, 5), at(4, 100, 30))
    device.observe(at(5, 61, 999), at(6, 100, 1, component_type="other"))
    device.silence(1_000)
    consumed = {
        (w["size_s"], (w["window_start"] - T) // S): w.get("consumption")
        for w in device.windows
        if w["component_type"] == "temp"
    }
    assert consumed == {(60, 0): 90, (60, 60): 31, (120, -60): 90, (120, 0): 130, (120, 60): 31}
    assert all("consumption" not in w for w in device.windows if w["component_type"] == "other")
