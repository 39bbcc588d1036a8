"""From a decoded field to its datatype: component type, pin, canonical unit.

The order is: the device's mapping, the type's mapping, the field's own name. A field that is mapped to None is left out.
What a datatype's `kind` makes of a value:

| kind | numbers | booleans | text |
|------|---------|----------|------|
| number | converted into the datatype's unit | 1 or 0 | a number in text, else refused |
| boolean | 1 or 0, else refused | `value` 1.0 or 0.0, no `value_text` | true/false, on/off, yes/no, open/closed, else refused |
| text | as they were written, with all digits | `true`, `false` | `value_text` |
| no datatype | in the unit it came in | `value` 1.0 or 0.0 | `value_text`; a number where a known unit stands beside it |

Text becomes a number by number.py and by nothing else, here and nowhere before: `00123` is a number or a serial number by what the
datatype says. A whole number that no double holds is rounded and flagged `inexact`; give it a datatype of kind text where its
digits matter.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from preservarium.domain.decoders.base import Layout
from preservarium.domain.readings.number import Written, number_of, says_not_finite
from preservarium.domain.readings.reading import PIN_POSITION_NONE, UNKNOWN
from preservarium.domain.readings.units import IDENTITY, ROUNDS, Linear, canonical, conversion
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, FieldMapping
from preservarium.errors import ReasonCode, Reject

#: Columns of the databases.
COMPONENT_CHARACTERS_MAX: Final = 120
PIN_CHARACTERS_MAX: Final = 120
TEXT_CHARACTERS_MAX: Final = 4_096
#: Different fields of one device kept mapped; a device whose field names never repeat must not fill the memory.
TARGETS_MAX: Final = 4_096
#: Layouts of one device kept planned: it has a few kinds of messages.
PLANS_MAX: Final = 256
#: Whole numbers beyond this are not exact as floats, and every store and JavaScript client holds floats.
_EXACT: Final = 2**53

UNIT_UNKNOWN: Final = "unit_unknown"
UNIT_MISMATCH: Final = "unit_mismatch"
INEXACT: Final = "inexact"

_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z][a-z])")
_NOT_WORD: Final = re.compile(r"[^\w]+")
_WORDS: Final = {
    "true": 1.0, "on": 1.0, "yes": 1.0, "open": 1.0, "1": 1.0,
    "false": 0.0, "off": 0.0, "no": 0.0, "closed": 0.0, "0": 0.0,
}  # fmt: skip

DatatypeLookup = Callable[[str], DatatypeDoc | None]


def default_component(name: str) -> str:
    """A field's name as a component type: `airTemperature` and `Air temperature` are both `air_temperature`."""
    text = _NOT_WORD.sub("_", _CAMEL.sub("_", name)).strip("_").lower()
    return text[:COMPONENT_CHARACTERS_MAX] or UNKNOWN


@dataclass(frozen=True, slots=True)
class Target:
    """Where one field goes, with the arithmetic worked out."""

    component_type: str
    pin_position: str
    kind: str | None  #: of the datatype; None where there is none
    unit: str  #: of the reading
    change: Linear | None  #: of a number; None: there is nothing to calculate
    flags: tuple[str, ...]
    measured: bool  #: whether there is a unit and no datatype: then a text is a number where it is one
    plain: bool  #: a number that is finite and exact becomes a reading as it is

    def reading(self, value: Any, name: str) -> dict[str, Any]:
        """A reading of this value, without its time.

        Raises:
            Reject: VALUE_TYPE or VALUE_NOT_FINITE; `name` is named in the message.
        """
        kind = type(value)
        if self.plain and (kind is float or kind is int) and -_EXACT <= value <= _EXACT:
            return {
                "component_type": self.component_type,
                "pin_position": self.pin_position,
                "value": value,
                "unit": self.unit,
            }
        if self.kind == "text":
            return self._text(value, name)
        if self.kind == "boolean":
            value = _boolean(value, name)
        elif kind is bool:
            value = 1.0 if value else 0.0
        elif kind is str or kind is Written:
            number = value.number if kind is Written else number_of(value)
            if self.kind is None and not (number is not None and (self.measured or (kind is Written and value.typed))):
                return self._text(value, name)
            value = _given(number, value, name)
        flags = self.flags
        if self.change is not None:
            value = self.change.apply(value)
        if type(value) is not int:
            if not math.isfinite(value):
                message = f"{name} has no finite value"
                raise Reject(ReasonCode.VALUE_NOT_FINITE, message)
        elif not -_EXACT <= value <= _EXACT:
            value, flags = _rounded(value, name, flags)
        reading: dict[str, Any] = {
            "component_type": self.component_type,
            "pin_position": self.pin_position,
            "value": value,
            "unit": self.unit,
        }
        if flags:
            reading["flags"] = list(flags)
        return reading

    def _text(self, value: Any, name: str) -> dict[str, Any]:
        if isinstance(value, float) and not math.isfinite(value):
            message = f"{name} has no finite value"
            raise Reject(ReasonCode.VALUE_NOT_FINITE, message)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        reading: dict[str, Any] = {
            "component_type": self.component_type,
            "pin_position": self.pin_position,
            # PostgreSQL's text holds no NUL.
            "value_text": text.replace("\0", "")[:TEXT_CHARACTERS_MAX],
            "unit": self.unit,
        }
        if self.flags:
            reading["flags"] = list(self.flags)
        return reading


def _rounded(value: int, name: str, flags: tuple[str, ...]) -> tuple[float, tuple[str, ...]]:
    try:
        number = float(value)
    except OverflowError:
        message = f"{name} is a whole number of {value.bit_length()} bits"
        raise Reject(ReasonCode.VALUE_NOT_FINITE, message) from None
    return number, flags if number == value else (*flags, INEXACT)


def _boolean(value: Any, name: str) -> float:
    if isinstance(value, Written) and value.typed:
        value = value.number
    if isinstance(value, str):
        found = _WORDS.get(value.strip().lower())
        if found is not None:
            return found
    elif value in {0, 1}:
        return float(value)
    message = f"{name} is {value!r:.80}, neither true nor false"
    raise Reject(ReasonCode.VALUE_TYPE, message)


def _given(number: float | None, text: str, name: str) -> float:
    if number is not None:
        return number
    if says_not_finite(text):
        message = f"{name} has no finite value"
        raise Reject(ReasonCode.VALUE_NOT_FINITE, message)
    message = f"{name} is {text!r:.80}, not a number"
    raise Reject(ReasonCode.VALUE_TYPE, message)


#: A reading of any value of one field: `LEFT_OUT`, or None where only the long way can tell.
_Read = Callable[[Any], dict[str, Any] | None]
_LEFT_OUT: Final[dict[str, Any]] = {}


class _Column(NamedTuple):
    """What becomes of one field of a layout."""

    component_type: str | None  #: None: `read` says everything
    pin_position: str
    unit: str
    multiplier: float | None  #: see `Linear`; None: a number stays as it is
    summand: float
    divisor: float
    read: _Read


class _Plan(NamedTuple):
    columns: tuple[_Column, ...]
    distinct: bool  #: no two of them go to the same series


def _column(target: Target | None, name: str) -> _Column:
    def read(value: Any) -> dict[str, Any] | None:
        kind = type(value)
        if kind is str:
            if len(value) > TEXT_CHARACTERS_MAX:
                return None
        elif kind is not float and kind is not int and kind is not bool:
            return None
        if target is None:
            return _LEFT_OUT
        try:
            return target.reading(value, name)
        except Reject:
            return None

    if target is None or target.flags or target.kind not in (None, "number"):
        return _Column(None, "", "", None, 0.0, 1.0, read)
    component, pin, unit, change = target.component_type, target.pin_position, target.unit, target.change
    if change is None:
        return _Column(component, pin, unit, None, 0.0, 1.0, read)
    return _Column(component, pin, unit, change.multiplier, change.summand, change.divisor, read)


#: Of what is never looked at.
_IGNORED: Final = _Column(None, "", "", None, 0.0, 1.0, lambda _: _LEFT_OUT)
#: Of a layout that can only go the long way.
_NO_PLAN: Final = _Plan((), distinct=False)


class Mapper:
    """The mapping of one device. Targets are worked out once for each (name, unit, pin) that it sends."""

    __slots__ = ("_datatypes", "_lookup", "_mappings", "_plans", "_targets")

    def __init__(self, device: DeviceDoc, device_type: DeviceTypeDoc, datatype: DatatypeLookup) -> None:
        self._mappings: dict[str, FieldMapping | None] = {
            **(device_type.get("mapping") or {}),
            **(device.get("mapping") or {}),
        }
        self._datatypes: tuple[Mapping[str, Mapping[str, Any]], ...] = (
            device_type.get("datatypes") or {},
            device.get("datatypes") or {},
        )
        self._lookup = datatype
        self._targets: dict[tuple[str, str | None, str | None], Target | None] = {}
        self._plans: dict[Layout, _Plan] = {}

    def readings(self, layout: Layout, values: Sequence[Any]) -> list[dict[str, Any]] | None:
        """The readings of a row, without their times: what `target` and `Target.reading` make of each field, at a fraction of the cost.

        Args:
            layout: what the fields are.
            values: of the fields, in the same order; None for one that is absent.

        Returns:
            None where something is out of the ordinary, so that the message must go the long way, field by field.
        """
        plan = self._plans.get(layout)
        if plan is None:
            plan = self._planned(layout)
        if plan is _NO_PLAN:
            return None
        readings: list[dict[str, Any]] = []
        for value, (component, pin, unit, multiplier, summand, divisor, read) in zip(values, plan.columns, strict=True):
            if value is None:
                continue
            kind = type(value)
            if component is not None and (kind is float or kind is int) and -_EXACT <= value <= _EXACT:
                if multiplier is None:
                    readings.append({"component_type": component, "pin_position": pin, "value": value, "unit": unit})
                    continue
                # The quick way of Linear.apply, written out: a call costs as much as the rest of a reading.
                whole = value * 1e6 + ROUNDS - ROUNDS
                product = whole * multiplier
                if -1e15 < product < 1e15 and whole / 1e6 == value:
                    value = (product + summand) / divisor
                    readings.append({"component_type": component, "pin_position": pin, "value": value, "unit": unit})
                    continue
            reading = read(value)
            if reading is None:
                return None
            if reading is not _LEFT_OUT:
                readings.append(reading)
        if not plan.distinct and len({(r["component_type"], r["pin_position"]) for r in readings}) < len(readings):
            return None
        return readings

    def _planned(self, layout: Layout) -> _Plan:
        try:
            targets = [head and (self.target(*head), head[0]) for head in layout.heads]
        except Reject:
            plan = _NO_PLAN
        else:
            series = [(t[0].component_type, t[0].pin_position) for t in targets if t and t[0] is not None]
            columns = tuple(_column(*target) if target else _IGNORED for target in targets)
            plan = _Plan(columns, len(set(series)) == len(series))
        if len(self._plans) < PLANS_MAX:
            self._plans[layout] = plan
        return plan

    def target(self, name: str, unit: str | None, pin: str | None) -> Target | None:
        """Where a field goes; None where it is left out."""
        key = (name, unit, pin)
        try:
            return self._targets[key]
        except KeyError:
            target = self._target(name, unit, pin)
            if len(self._targets) < TARGETS_MAX:
                self._targets[key] = target
            return target

    def _target(self, name: str, unit: str | None, pin: str | None) -> Target | None:
        mapping: FieldMapping | None = None
        if name in self._mappings:
            mapping = self._mappings[name]
            if mapping is None:
                return None
        component = mapping["component_type"] if mapping else default_component(name)
        position = (mapping.get("pin_position") if mapping else None) or pin or PIN_POSITION_NONE
        position = "".join(c for c in position[:PIN_CHARACTERS_MAX] if c.isprintable()) or PIN_POSITION_NONE
        datatype: dict[str, Any] = dict(self._lookup(component) or {})
        for overrides in self._datatypes:
            datatype.update(overrides.get(component, {}))
        spelled = unit or (mapping.get("unit") if mapping else None)
        shown, flags, change = _unit(spelled, datatype.get("unit"))
        if mapping:
            # Scale and offset of the mapping come first: they are in the unit that the field comes in.
            change = _own(mapping, name).then(change)
        kind = datatype.get("kind")
        number = kind is None or kind == "number"
        return Target(
            component, position, kind, shown, None if change.is_identity else change, flags,
            kind is None and bool(shown) and not flags, number and change.is_identity and not flags,
        )  # fmt: skip


def _own(mapping: FieldMapping, name: str) -> Linear:
    try:
        return Linear.of(mapping.get("scale", 1), mapping.get("offset", 0))
    except (ValueError, OverflowError):
        raise Reject(ReasonCode.MAPPING_FAILED, f"the mapping of {name} scales by what is no number") from None


def _unit(spelled: str | None, wanted: str | None) -> tuple[str, tuple[str, ...], Linear]:
    """(unit of the reading, flags, how to get there)."""
    given, known = canonical(spelled)
    if wanted is None:
        return given, () if known else (UNIT_UNKNOWN,), IDENTITY
    if not given:
        # A device that names no unit is taken at the registry's word.
        return wanted, (), IDENTITY
    if given == canonical(wanted)[0]:
        return wanted, (), IDENTITY
    linear = conversion(given, wanted)
    if linear is None:
        return given, (UNIT_MISMATCH if known else UNIT_UNKNOWN,), IDENTITY
    return wanted, (), linear
