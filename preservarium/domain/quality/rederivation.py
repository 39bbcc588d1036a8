"""Deriving a stored reading once more from its raw bytes, and saying whether it comes out bit by bit as it is stored.

What a message alone decides is decided again by the code that runs live (`normalize`, `judge`): value, text, unit, instant,
how it came, who it belongs to, and the tests that look at one value. What other messages decided is not: the tests that need
the readings before (`OF_NEIGHBOURS`), a counter's consumption, a later verdict. Flags of those tests are taken as they are stored.

Numbers are compared by their bits as IEEE 754 doubles, which is how both stores keep them: -0 is not 0.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from preservarium.domain.quality.checks import DeviceChecks, SeriesCheck
from preservarium.domain.quality.tests import Failure
from preservarium.domain.quality.validation import Limits, judge, new_state
from preservarium.domain.readings.lineage import Coordinates
from preservarium.domain.readings.reading import PIN_POSITION_NONE, Quality

#: Tests whose verdict needs other messages than the reading's own.
OF_NEIGHBOURS: Final = frozenset({
    "rate_of_change", "spike", "flat_line", "gap", "attenuated_signal",
    "counter_reset", "counter_glitch", "counter_jump", "counter_swap",
})  # fmt: skip
#: Messages that share an instant which is not their own get one each, later by 1 µs (instants.py). So many in a row are sought for.
MOVED_MAX_US: Final = 100_000


class Status(StrEnum):
    """What a comparison came to."""

    IDENTICAL = "identical"
    DIFFERENT = "different"
    UNVERIFIABLE = "unverifiable"


class Unverifiable(StrEnum):
    """Why a reading cannot be derived again."""

    RAW_GONE = "raw_gone"  #: Kafka has the raw record no more
    OTHER_MESSAGES = "other_messages"  #: a counter's consumption, or a later verdict: other messages decided it, too
    NO_CONFIGURATION = "no_configuration"  #: the registry has no such device, type or parser, and had none
    NO_SANDBOX = "no_sandbox"  #: its parser is a script, and no sandbox starts here


@dataclass(frozen=True, slots=True)
class StoredReading:
    """A row as a store has it. Instants µs since the epoch, UTC."""

    device_id: str
    connector_mode: str
    component_type: str
    pin_position: str
    timestamp: int  #: the device's time
    value: float | None
    value_text: str | None
    unit: str
    topic: str
    quality: int
    flags: tuple[str, ...]
    received_at: int
    raw: Coordinates
    parser: str  #: name@version
    config_rev: int
    experiment_id: str
    generation: int
    revised: bool  #: a later message brought this verdict
    ingested_at: int | None  #: when it was stored; None where the store did not note it


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that came out otherwise."""

    field: str
    stored: Any
    derived: Any


@dataclass(frozen=True, slots=True)
class Judged:
    """A message derived again, with its readings judged by what they say themselves."""

    message: Mapping[str, Any]  #: as normalize made it
    readings: Sequence[Mapping[str, Any]]  #: of it, judged; those that fail are not among them unless they are stored
    failures: Sequence[Failure]


def judged(message: Mapping[str, Any], checks: DeviceChecks, limits: Limits) -> Judged:
    """Judge a standardized message as the first of its device: by the tests that look at one value.

    Args:
        message: as normalize made it; it is not altered.
        checks: of its device.
        limits: the settings.
    """
    copy = {**message, "readings": [_copied(reading) for reading in message["readings"]]}
    outcome = judge(copy, checks, new_state(), limits)
    return Judged(message, copy["readings"], tuple(outcome.failures))


def _copied(reading: Mapping[str, Any]) -> dict[str, Any]:
    return {**reading, "flags": list(reading["flags"])} if "flags" in reading else dict(reading)


def needs_others(stored: StoredReading, derived: Judged) -> bool:
    """Whether other messages than its own decided a reading: a later verdict on it, or what validate derives of a series."""
    if stored.revised:
        # A value that overwrote another one of its instant (`same_instant: last`) is its message's own.
        return find(stored, derived) is None
    mine = {(r["component_type"], r.get("pin_position", PIN_POSITION_NONE)) for r in derived.message["readings"]}
    of_counter = stored.component_type.removesuffix("_consumption")
    return (
        of_counter != stored.component_type
        and (stored.component_type, stored.pin_position) not in mine
        and (of_counter, stored.pin_position) in mine
    )


def find(stored: StoredReading, derived: Judged) -> Mapping[str, Any] | None:
    """The derived reading that a stored one is; None where the message has none for its series and instant."""
    best: Mapping[str, Any] | None = None
    for reading in derived.readings:
        if reading.get("derived") or reading.get("revised"):
            continue
        if (reading["component_type"], reading["pin_position"]) != (stored.component_type, stored.pin_position):
            continue
        moved = stored.timestamp - instant_of(derived.message, reading)
        if moved == 0:
            return reading
        # With `same_instant: both` also a device's own instant moves.
        if 0 < moved <= MOVED_MAX_US and "timestamp" not in reading:
            best = reading
    return best


def instant_of(message: Mapping[str, Any], reading: Mapping[str, Any]) -> int:
    """The instant of a reading, µs since the epoch, UTC."""
    at: int = reading.get("timestamp", message["timestamp"])
    return at


def compare(stored: StoredReading, derived: Judged) -> tuple[Difference, ...]:
    """What of a stored reading came out otherwise; nothing where it is the same bit by bit.

    Args:
        stored: the row.
        derived: its message, derived again.
    """
    reading = find(stored, derived)
    if reading is None:
        said = "; ".join(failure.text for failure in derived.failures[:3]) or "no such reading"
        return (Difference("reading", _named(stored), said),)
    message = derived.message
    found: list[Difference] = []

    def same(field: str, is_: Any, would_be: Any) -> None:
        if is_ != would_be:
            found.append(Difference(field, is_, would_be))

    value = reading.get("value")
    if bits(stored.value) != bits(value):
        found.append(Difference("value", stored.value, value))
    same("value_text", stored.value_text or None, reading.get("value_text") or None)
    same("unit", stored.unit, reading.get("unit") or "")
    same("device_id", stored.device_id, message["device_id"])
    same("connector_mode", stored.connector_mode, message["connector_mode"])
    same("topic", stored.topic, message["topic"] or "")
    same("received_at", stored.received_at, message["received_at"])
    same("parser", stored.parser, message["parser"])
    same("experiment_id", stored.experiment_id, message.get("experiment_id") or "")
    mine = tuple(flag for flag in stored.flags if flag not in OF_NEIGHBOURS)
    would_be = tuple(flag for flag in reading.get("flags") or () if flag not in OF_NEIGHBOURS)
    same("flags", mine, would_be)
    quality = int(reading.get("quality", Quality.NOT_EVALUATED))
    if len(mine) == len(stored.flags):
        same("quality", stored.quality, quality)
    elif stored.quality < quality:
        found.append(Difference("quality", stored.quality, quality))
    return tuple(found)


def _named(stored: StoredReading) -> str:
    return f"{stored.component_type} (pin {stored.pin_position}) at {stored.timestamp}"


def bits(value: float | None) -> int | None:
    """The bits of a number as a double; None where there is none."""
    if value is None:
        return None
    number: int = struct.unpack(">q", struct.pack(">d", value))[0]
    return number


def verdicts(reading: Mapping[str, Any], flags: Sequence[str], check: SeriesCheck) -> list[dict[str, Any]]:
    """The flags of a reading, each with the bounds of its test as they are compiled; for people.

    Args:
        reading: with its `unit`.
        flags: names of the tests that did not say good.
        check: the checks of its component type.
    """
    bounds: dict[str, dict[str, Any]] = {
        "gross_range": {
            "fail_min": check.fail_min, "fail_max": check.fail_max,
            "suspect_min": check.suspect_min, "suspect_max": check.suspect_max,
        },
        "unit_unknown": {"unit": check.unit},
        "type": {"kind": check.kind},
        "stale": {"stale_after_s": None if check.stale_us is None else check.stale_us / 1e6},
        "gap": {"threshold_s": None if check.gap_us is None else check.gap_us / 1e6},
    }  # fmt: skip
    if check.rate is not None:
        bounds["rate_of_change"] = {"threshold_per_s": check.rate.suspect, "fail_threshold_per_s": check.rate.fail}
    if check.spike is not None:
        bounds["spike"] = {"suspect_threshold": check.spike.suspect, "fail_threshold": check.spike.fail}
    if check.flat is not None:
        bounds["flat_line"] = {
            "suspect_threshold_s": check.flat.suspect_us / 1e6,
            "fail_threshold_s": check.flat.fail_us / 1e6,
            "tolerance": check.flat.tolerance,
        }
    if check.attenuated is not None:
        bounds["attenuated_signal"] = {
            "suspect_threshold": check.attenuated.suspect,
            "fail_threshold": check.attenuated.fail,
        }
    return [{"test": flag, "unit": reading.get("unit"), **finite(bounds.get(flag, {}))} for flag in flags]


def finite(bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds without those that bound nothing: JSON has no infinity."""
    return {
        name: bound
        for name, bound in bounds.items()
        if bound is not None and not (isinstance(bound, float) and bound in (float("inf"), float("-inf")))
    }
