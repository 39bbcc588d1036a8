"""A stored reading beside what its message becomes once more: the same bit by bit, or where not."""

from dataclasses import replace
from typing import Any

import pytest

from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.rederivation import (
    Judged,
    StoredReading,
    bits,
    compare,
    find,
    judged,
    needs_others,
    verdicts,
)
from preservarium.domain.quality.validation import Limits
from preservarium.domain.readings.lineage import Coordinates

AT = 1_790_000_000_000_000
LIMITS = Limits(future_skew_us=300_000_000, store_failed=False, series_max=500)
DATATYPES: dict[str, Any] = {
    "temperature": {
        "name": "temperature", "rev": 1, "kind": "number", "unit": "°C",
        "fail_span": {"min": -40, "max": 85}, "suspect_span": {"min": 0, "max": 40},
        "tests": {"rate_of_change": {"threshold": 1, "fail_threshold": 5}, "spike": {"suspect_threshold": 3}},
    },
    "energy": {"name": "energy", "rev": 1, "kind": "number", "unit": "kWh", "counter": {}},
    "door": {"name": "door", "rev": 1, "kind": "boolean", "unit": ""},
}  # fmt: skip
CHECKS = compile_checks(None, DATATYPES.get)


def message(*readings: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "device_id": "d1", "connector_mode": "MQTT", "topic": "a/b", "timestamp": AT, "received_at": AT + 5, "raw_partition": 1,
        "raw_offset": 7, "raw_index": 0, "parser": "p@1", "config_rev": 3, "generation": 0, "clock": "device",
        "readings": [{"component_type": "temperature", "pin_position": "-1", "unit": "°C", **r} for r in readings],
    } | fields  # fmt: skip


def stored(**fields: Any) -> StoredReading:
    return replace(
        StoredReading(
            "d1", "MQTT", "temperature", "-1", AT, 21.5, None, "°C", "a/b", 1, (), AT + 5, Coordinates(1, 7, 0), "p@1", 3, "", 0,
            False, AT + 9,
        ),
        **fields,
    )  # fmt: skip


def derived(*readings: dict[str, Any], **fields: Any) -> Judged:
    return judged(message(*readings, **fields), CHECKS, LIMITS)


def differing(row: StoredReading, made: Judged) -> set[str]:
    return {one.field for one in compare(row, made)}


def test_the_same_bit_by_bit() -> None:
    assert compare(stored(), derived({"value": 21.5})) == ()
    # A whole number is stored as a double.
    assert compare(stored(value=21.0), derived({"value": 21})) == ()


@pytest.mark.parametrize(
    ("row", "reading"),
    [
        ({"value": 21.500000000000004}, {"value": 21.5}),
        ({"value": -0.0}, {"value": 0.0}),
        ({"value": None, "value_text": "21.5"}, {"value": 21.5}),
    ],
)
def test_one_bit_is_a_difference(row: dict[str, Any], reading: dict[str, Any]) -> None:
    assert "value" in differing(stored(**row), derived(reading))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unit", "K"), ("device_id", "d2"), ("connector_mode", "LoRaWAN"), ("topic", ""), ("received_at", AT + 6), ("parser", "p@2"),
        ("experiment_id", "x"), ("quality", 3), ("flags", ("gross_range",)), ("value_text", "x"),
    ],
)  # fmt: skip
def test_every_field_counts(field: str, value: Any) -> None:
    assert field in differing(stored(**{field: value}), derived({"value": 21.5}))


def test_a_reading_that_the_message_has_not() -> None:
    for row in (stored(component_type="humidity"), stored(pin_position="2"), stored(timestamp=AT - 1)):
        assert differing(row, derived({"value": 21.5})) == {"reading"}


def test_what_would_be_refused_is_told_with_the_test_that_says_so() -> None:
    (difference,) = compare(stored(value=99.0), derived({"value": 99.0}))
    assert difference.field == "reading"
    assert "outside -40 … 85" in difference.derived


def test_flags_of_one_value_are_judged_again() -> None:
    row = stored(value=50.0, quality=3, flags=("gross_range",))
    assert compare(row, derived({"value": 50.0})) == ()
    assert differing(replace(row, flags=(), quality=1), derived({"value": 50.0})) == {"flags", "quality"}


def test_flags_that_other_messages_brought_are_taken_as_they_are() -> None:
    assert compare(stored(quality=3, flags=("rate_of_change", "spike")), derived({"value": 21.5})) == ()
    # But no verdict makes a suspect value good.
    both = stored(value=50.0, quality=1, flags=("gross_range", "rate_of_change"))
    assert differing(both, derived({"value": 50.0})) == {"quality"}


def test_an_instant_that_was_shared_is_moved_later_and_only_then() -> None:
    made = derived({"value": 21.5}, clock="received")
    assert find(stored(timestamp=AT + 3), made) is not None
    assert find(stored(timestamp=AT + 1_000_000), made) is None
    # A reading with a time of its own is not moved.
    own = derived({"value": 21.5, "timestamp": AT - 60_000_000})
    assert find(stored(timestamp=AT - 60_000_000), own) is not None
    assert find(stored(timestamp=AT - 59_999_999), own) is None


def test_what_other_messages_decided_is_known() -> None:
    energy = derived({"component_type": "energy", "unit": "kWh", "value": 12.0})
    assert needs_others(stored(component_type="energy_consumption", unit="kWh"), energy)
    assert not needs_others(stored(component_type="energy", unit="kWh"), energy)
    assert not needs_others(stored(component_type="water_consumption"), energy), "no counter of that name sent it"
    # A verdict that a later message brought, and a later value of the same instant.
    assert needs_others(stored(revised=True, timestamp=AT - 60_000_000), derived({"value": 21.5}))
    assert not needs_others(stored(revised=True), derived({"value": 21.5}))
    assert compare(stored(revised=True), derived({"value": 21.5})) == ()


def test_judging_again_leaves_the_message_as_it_was() -> None:
    given = message({"value": 50, "flags": ["inexact"]}, {"component_type": "door", "unit": "", "value": 1.0})
    before = {**given, "readings": [dict(r) for r in given["readings"]]}
    made = judged(given, CHECKS, LIMITS)
    assert given == before
    assert [r["flags"] for r in made.readings if "flags" in r] == [["inexact", "gross_range"]]
    assert all("quality" in r for r in made.readings)


def test_verdicts_name_the_bounds_and_no_infinity() -> None:
    check = CHECKS.series("temperature")
    said = verdicts({"unit": "°C"}, ("gross_range", "rate_of_change", "spike", "inexact"), check)
    assert said == [
        {"test": "gross_range", "unit": "°C", "fail_min": -40, "fail_max": 85, "suspect_min": 0, "suspect_max": 40},
        {"test": "rate_of_change", "unit": "°C", "threshold_per_s": 1, "fail_threshold_per_s": 5},
        {"test": "spike", "unit": "°C", "suspect_threshold": 3},
        {"test": "inexact", "unit": "°C"},
    ]


def test_bits() -> None:
    assert bits(None) is None
    assert bits(0.0) != bits(-0.0)
    assert bits(2) == bits(2.0)
