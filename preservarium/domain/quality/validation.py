"""Standardized messages become validated ones: what one device's state is, and how a message's readings are judged.

A message is received (`arrival.py` says what is due then), and what is due is judged by the tests of `tests.py`.
Nothing here waits or reads a clock. Functions change the messages and state documents they are given, in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Final

from preservarium.domain.quality.arrival import IN_ORDER_OF_ARRIVAL, Arrival, Order, arrive, generation_of, silent
from preservarium.domain.quality.checks import FAIL, MISSING, SUSPECT, DeviceChecks
from preservarium.domain.quality.instants import Came, remember, settle_second
from preservarium.domain.quality.meter import consumed, first_state
from preservarium.domain.quality.tests import (
    AT,
    Failure,
    against_climatology,
    against_location,
    against_series,
    convert,
    new_series,
    range_failure,
    syntax_failure,
    time_failure,
)
from preservarium.errors import ReasonCode

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 2

_HOUR_US: Final = 3_600_000_000

# {"v": 2, "g": {generation: {"m": marks, "s": {"mode\tcomponent\tpin": series}, "c": {the same: meter, see
#   domain/quality/meter.py} where there are counters, "k": [hour, least delay in it, in the hour before] of a device's clock, of
#   domain/quality/instants.py "u": [instant as it came, as it was given], "n": [latest instant, {series: value}], and of
#   domain/quality/arrival.py "r": remembered messages, "w": latest instant, "h": [[offset, message]] held back}}, "limited": 1 once reported}
# (a series is in tests.py)

State = dict[str, Any]


def new_state() -> State:
    """The state document of a device that nothing is known of."""
    return {"v": STATE_VERSION, "g": {}}


def from_version_1(state: State) -> None:
    """Bring a document of version 1 to this one, in place: of a counter it had the last state only."""
    for generation in state["g"].values():
        if "c" in generation:
            generation["c"] = {key: first_state(*last) for key, last in generation["c"].items()}
    state["v"] = STATE_VERSION


@dataclass(frozen=True, slots=True)
class Limits:
    """What the settings say."""

    future_skew_us: int  #: a device's clock may be this far ahead of `received_at`
    store_failed: bool  #: readings that fail stay in the message, flagged
    series_max: int  #: series of one device that keep state
    skew_noted_us: float = inf  #: a device's clock that is further off has its messages say so
    order: Order = IN_ORDER_OF_ARRIVAL  #: how messages are put into order


@dataclass(slots=True)
class Outcome:
    """What became of a message, or of some of them."""

    duplicate: bool = False  #: applied before; nothing else was done
    passed: int = 0  #: readings that go on, revisions not counted
    failures: list[Failure] = field(default_factory=list)
    limited: bool = False  #: for the first time, a series got no state because the device has too many


def receive(
    message: dict[str, Any], checks: DeviceChecks, state: State, limits: Limits, at: tuple[int, int] = (0, 0)
) -> Arrival:
    """Take one standardized message in: what is due then is to be judged, in its order.

    Messages of one device must come in the order of their partition. How they are cut into batches makes no difference.

    Args:
        message: a standardized message; its readings are put aside as `repeated` where they came before, and it is given the skew of its
            device's clock where that is large.
        checks: of the message's device.
        state: of the message's device; changed in place. Where the message is no duplicate it is to be written back.
        limits: the settings.
        at: offset of its record in the topic that it was read from, and how many messages that record has released before.
    """
    generation = generation_of(message, state)
    received_at, message_at = message["received_at"], message["timestamp"]
    own_time = time_failure(message_at, received_at + limits.future_skew_us, checks.birth_us) is None
    order = limits.order
    own_instants = checks.same_instant == "both"
    if own_instants or (checks.lateness_us is not None and checks.lateness_us != order.lateness_us):
        lateness_us = order.lateness_us if checks.lateness_us is None else checks.lateness_us
        order = replace(order, lateness_us=lateness_us, own_instants=own_instants)
    arrival = arrive(message, generation, order, at, own_time=own_time)
    if own_time and not arrival.duplicate and message.get("clock") == "device":
        skew_us = _clock_skew(generation, received_at, message_at)
        if abs(skew_us) > limits.skew_noted_us:
            message["clock_skew"] = skew_us
    return arrival


def fall_silent(state: State, below: int, offset: int) -> list[dict[str, Any]]:
    """The device is silent: what was held back is due (`arrival.silent`), of every generation."""
    due: list[dict[str, Any]] = []
    for generation in state["g"].values():
        due += silent(generation, below, (offset, len(due)))
    return due


def validate(message: dict[str, Any], checks: DeviceChecks, state: State, limits: Limits) -> Outcome:
    """`receive` and `judge` in one, for a message that nothing holds back."""
    arrival = receive(message, checks, state, limits)
    if arrival.duplicate:
        return Outcome(duplicate=True)
    (due,) = arrival.due
    return judge(due, checks, state, limits)


def judge(
    message: dict[str, Any], checks: DeviceChecks, state: State, limits: Limits, outcome: Outcome | None = None
) -> Outcome:
    """Check the readings of a message that is due, and make it a validated one, in place.

    Sets `quality` of every reading, adds to its `flags`, converts what is not in its datatype's unit, takes out what failed
    (unless the settings keep it), and appends revisions.

    Args:
        message: a standardized message that `receive` gave.
        checks: of the message's device.
        state: of the message's device; changed in place.
        limits: the settings.
        outcome: of messages before, which this one's is added to and which is given back.
    """
    if outcome is None:
        outcome = Outcome()
    generation = generation_of(message, state)
    came: Sequence[Came] = ()
    if message.get("clock") == "device" and checks.same_instant != "both" and message["readings"]:
        came, again = settle_second(message, generation, overwrites=checks.same_instant == "last")
        for reading in again:
            text = "the series has another value at this instant of the device's clock (same_instant: first)"
            outcome.failures.append(Failure(ReasonCode.SAME_INSTANT, text, reading))
    series_states = generation["s"]
    message_at = message["timestamp"]
    latest = message["received_at"] + limits.future_skew_us
    of_message = time_failure(message_at, latest, checks.birth_us)
    by_type = checks._by_type
    kept: list[dict[str, Any]] = []
    revisions: list[dict[str, Any]] = []
    failures = outcome.failures

    for reading in message["readings"]:
        component_type = reading["component_type"]
        check = by_type[component_type]
        value = reading.get("value")
        kind = type(value)
        if (
            check.plain
            and of_message is None
            and (kind is float or kind is int)
            and check.low <= value <= check.high
            and (check.unit is None or reading["unit"] == check.unit)
            and "timestamp" not in reading
        ):
            reading["quality"] = check.passed
            kept.append(reading)
            continue
        at = reading.get("timestamp")
        if at is None:
            at = message_at
        failure = of_message if at == message_at else time_failure(at, latest, checks.birth_us)
        quality = check.passed
        # What normalize has flagged stays so, whatever is found here.
        flags: list[str] | None = reading.get("flags")
        comparable = False

        if failure is None:
            if (kind is float or kind is int) and check.kind == "number":
                comparable = True
                if check.unit is not None and reading["unit"] != check.unit:
                    comparable = convert(reading, check.unit)
                    if comparable:
                        value = reading["value"]
                    else:
                        quality = SUSPECT
                        if flags is None or "unit_unknown" not in flags:
                            flags = [*(flags or ()), "unit_unknown"]
                if comparable:
                    if value < check.fail_min or value > check.fail_max:
                        failure = range_failure(value, check)
                    elif value < check.suspect_min or value > check.suspect_max:
                        quality, flags = SUSPECT, [*(flags or ()), "gross_range"]
                    if check.rare:
                        if check.circular is not None:
                            message.setdefault("circular", {})[component_type] = check.circular
                        if check.climatology is not None and failure is None:
                            quality, flags, failure = against_climatology(check.climatology, at, value, quality, flags)
                        if check.stale_us is not None and message["received_at"] - at > check.stale_us:
                            quality, flags = SUSPECT, [*(flags or ()), "stale"]
            elif value is None and reading.get("value_text") is None:
                quality, flags = MISSING, [*(flags or ()), "missing"]
            else:
                failure = syntax_failure(reading, check)

        if check.stateful and comparable and failure is None:
            key = f"{message['connector_mode']}\t{component_type}\t{reading['pin_position']}"
            series = series_states.get(key)
            if series is None:
                if len(series_states) < limits.series_max:
                    series_states[key] = new_series(at, value, check, quality, flags)
                elif "limited" not in state:
                    state["limited"] = 1
                    outcome.limited = True
            elif at > series[AT]:
                quality, flags, failure = against_series(
                    series, reading, at, value, check, quality, flags, revisions, failures
                )

        if failure is None:
            reading["quality"] = quality
            if flags:
                reading["flags"] = flags
            kept.append(reading)
            if check.counter is not None and comparable:
                key = f"{message['connector_mode']}\t{component_type}\t{reading['pin_position']}"
                meters = generation.setdefault("c", {})
                if key in meters or len(meters) < limits.series_max:
                    derived = consumed(meters, key, reading, at, value, check.counter)
                    if derived is not None:
                        revisions.append(derived)
                elif "limited" not in state:
                    state["limited"] = 1
                    outcome.limited = True
            continue
        test, code, text = failure
        reading["quality"] = FAIL
        reading["flags"] = [*(flags or ()), test]
        failures.append(Failure(code, text, reading))
        # An instant outside the bounds cannot be stored at all: the databases check it too.
        if limits.store_failed and test != "timestamp_invalid":
            kept.append(reading)

    if checks.location is not None:
        against_location(kept, checks.location)
    outcome.passed += len(kept)
    message["readings"] = kept + revisions if revisions else kept
    if came:
        remember(came, message, generation)
    return outcome


def _clock_skew(generation: dict[str, Any], received_at: int, at: int) -> int:
    """How far the device's clock is ahead (behind: negative), µs, by its quickest message of this and the last hour.

    A message takes its time, and what was kept back takes longer; the quickest one is the best that is known. So what is
    behind by seconds may be the network, and what is ahead is the clock.
    """
    hour, delay = received_at // _HOUR_US, received_at - at
    kept = generation.get("k")
    if kept is None or not kept[0] <= hour <= kept[0] + 1:
        kept = generation["k"] = [hour, delay, delay]
    elif hour > kept[0]:
        kept[:] = [hour, delay, kept[1]]
    elif delay < kept[1]:
        kept[1] = delay
    return -int(min(kept[1], kept[2]))
