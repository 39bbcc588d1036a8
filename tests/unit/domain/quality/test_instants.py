"""One instant, one reading of a series."""

import copy
from typing import Any

import pytest
from quality_support import message, reading

from preservarium.domain.quality.checks import CheckCompiler, DeviceChecks
from preservarium.domain.quality.instants import give_instant
from preservarium.domain.quality.validation import Limits, new_state, validate

AT = 1_760_000_000_000_000
LIMITS = Limits(future_skew_us=10**12, store_failed=False, series_max=100)


class Device:
    """A device, its state, and what was made of its messages."""

    def __init__(self, same_instant: str | None = None, **datatype: Any) -> None:
        documents = {"temp": {"name": "temp", "kind": "number", "unit": "°C", **datatype}}
        device_type: Any = {"name": "k", "rev": 1, "manufacturer": "m", "parser": "p"}
        if same_instant:
            device_type["same_instant"] = same_instant
        self.checks = DeviceChecks(CheckCompiler(lambda name: documents.get(name)), None, device_type)  # type: ignore[arg-type,return-value]
        self.state = new_state()
        self.offset = 0
        self.sent: list[dict[str, Any]] = []

    def say(self, *readings: dict[str, Any], at: int = AT, **fields: Any) -> Any:
        sent = copy.deepcopy(
            message(self.offset, *readings, **({"clock": "device", "timestamp": at, "received_at": at} | fields))
        )
        self.offset += 1
        outcome = validate(sent, self.checks, self.state, LIMITS)
        self.sent.append(sent)
        return outcome

    def rows(self) -> list[tuple[int, Any]]:
        """(µs after AT, value) of what goes to the stores."""
        return [(r.get("timestamp", m["timestamp"]) - AT, r.get("value")) for m in self.sent for r in m["readings"]]


def test_of_two_values_at_one_instant_the_first_stays_and_the_other_is_told():
    device = Device()
    device.say(reading(20.0))
    outcome = device.say(reading(21.0))
    assert device.rows() == [(0, 20.0)]
    assert [(f.code, f.reading["value"]) for f in outcome.failures] == [("same_instant", 21.0)]


def test_the_same_value_again_counts_nowhere():
    device = Device()
    device.say(reading(20.0))
    outcome = device.say(reading(20.0), reading(50.0, "humidity"))
    assert not outcome.failures
    assert device.rows() == [(0, 20.0), (0, 50.0)]
    assert [r["component_type"] for r in device.sent[1]["repeated"]] == ["temp"]


def test_series_and_pins_are_told_apart():
    device = Device()
    device.say(reading(20.0))
    outcome = device.say(reading(21.0, pin_position="2"), reading(22.0, "humidity"))
    assert not outcome.failures
    assert device.rows() == [(0, 20.0), (0, 21.0), (0, 22.0)]


def test_a_value_that_was_refused_does_not_stand_in_the_way():
    device = Device(fail_span={"max": 85})
    outcome = device.say(reading(999.0))
    assert [f.code for f in outcome.failures] == ["value_range"]
    assert not device.say(reading(21.0)).failures
    assert device.rows() == [(0, 21.0)]


def test_a_redrive_of_the_same_value_is_judged_anew():
    device = Device()
    device.say(reading(20.0))
    device.say(reading(20.0), attempt=2)
    assert device.rows() == [(0, 20.0), (0, 20.0)]


def test_units_are_compared_as_they_came():
    device = Device()
    device.say(reading(68.0, unit="°F"))
    assert not device.say(reading(68.0, unit="°F")).failures
    assert len(device.rows()) == 1


def test_the_last_value_overwrites_where_the_type_says_so():
    device = Device("last")
    for value in (20.0, 21.0, 22.0):
        assert not device.say(reading(value)).failures
    assert device.rows() == [(0, 20.0), (0, 21.0), (0, 22.0)]
    readings = [m["readings"][0] for m in device.sent]
    assert [(r.get("revised"), r.get("replaces")) for r in readings] == [(None, None), (True, 20.0), (True, 21.0)]


def test_both_values_are_kept_where_the_type_says_so():
    device = Device("both")
    for value in (20.0, 21.0, 22.0):
        device.say(reading(value))
    device.say(reading(23.0), at=AT + 1)
    device.say(reading(24.0), at=AT + 500)
    assert device.rows() == [(0, 20.0), (1, 21.0), (2, 22.0), (3, 23.0), (500, 24.0)]
    assert [m.get("moved_from") for m in device.sent] == [None, AT, AT, AT + 1, None]


def test_texts_are_values_too():
    device = Device()
    device.say({"component_type": "door", "pin_position": "-1", "value": None, "value_text": "open", "unit": ""})
    outcome = device.say(
        {"component_type": "door", "pin_position": "-1", "value": None, "value_text": "closed", "unit": ""}
    )
    assert [f.code for f in outcome.failures] == ["same_instant"]


def test_readings_with_a_time_of_their_own_are_none_of_the_messages_instant():
    device = Device()
    device.say(reading(20.0))
    outcome = device.say(reading(21.0) | {"timestamp": AT - 60_000_000})
    assert not outcome.failures
    assert device.rows() == [(0, 20.0), (-60_000_000, 21.0)]


@pytest.mark.parametrize("clock", ["received"])
def test_a_message_that_was_held_up_keeps_its_time(clock):
    device = Device()
    for at in (AT, AT, AT - 5, AT):
        device.say(reading(20.0), at=at, clock=clock)
    assert [at for at, _ in device.rows()] == [0, 1, -5, 2]


def test_a_redrive_has_the_same_instant_at_each_try():
    device = Device()
    device.say(reading(20.0), clock="received")
    for _ in range(2):
        device.say(reading(21.0), at=AT + 700, clock="received", attempt=2)
    device.say(reading(22.0), at=AT + 1, clock="received")
    assert [at for at, _ in device.rows()] == [0, 700, 700, 1]


def test_µs_given_ahead_of_the_clock_are_caught_up_with():
    state: dict[str, Any] = {}
    given = []
    for came in (0, 0, 0, 1, 2, 3, 50):
        one = {"timestamp": came}
        give_instant(one, state)
        given.append(one["timestamp"])
    assert given == [0, 1, 2, 3, 4, 5, 50]
