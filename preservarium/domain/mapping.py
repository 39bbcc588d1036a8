"""From a decoded field to its datatype: component type, pin, canonical unit.

The order is: the device's mapping, the type's mapping, the field's own name. A field that is mapped to None is left out.
What a datatype's `kind` makes of a value:

| kind | numbers | booleans | text |
|------|---------|----------|------|
| number | converted into the datatype's unit | 1 or 0 | a number in text, else refused |
| boolean | 1 or 0, else refused | `value` 1.0 or 0.0, no `value_text` | true/false, on/off, yes/no, open/closed, else refused |
| text | as text | `true`, `false` | `value_text` |
| no datatype | in the unit it came in | `value` 1.0 or 0.0 | `value_text` |
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from preservarium.domain.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, FieldMapping
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.reading import PIN_POSITION_NONE, UNKNOWN
from preservarium.domain.units import canonical, conversion

#: Columns of the databases.
COMPONENT_CHARACTERS_MAX: Final = 120
PIN_CHARACTERS_MAX: Final = 120
TEXT_CHARACTERS_MAX: Final = 4_096
#: Different fields of one device kept mapped; a device whose field names never repeat must not fill the memory.
TARGETS_MAX: Final = 4_096
#: Whole numbers beyond this are not exact as floats, and every store and JavaScript client holds floats.
_EXACT: Final = 2**53

UNIT_UNKNOWN: Final = "unit_unknown"
UNIT_MISMATCH: Final = "unit_mismatch"

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
    factor: float
    offset: float
    linear: bool  #: whether there is anything to calculate
    flags: tuple[str, ...]

    def reading(self, value: Any, name: str) -> dict[str, Any]:
        """A reading of this value, without its time.

        Raises:
            Reject: VALUE_TYPE or VALUE_NOT_FINITE; `name` is named in the message.
        """
        kind = type(value)
        if self.kind == "text" or (self.kind is None and kind is str):
            return self._text(value)
        if self.kind == "boolean":
            value = _boolean(value, name)
        elif kind is bool:
            value = 1.0 if value else 0.0
        elif kind is str:
            value = _number(value, name)
        if self.linear:
            value = value * self.factor + self.offset
        if type(value) is not int:
            if not math.isfinite(value):
                message = f"{name} has no finite value"
                raise Reject(ReasonCode.VALUE_NOT_FINITE, message)
        elif not -_EXACT <= value <= _EXACT:
            value = float(value)
        reading: dict[str, Any] = {
            "component_type": self.component_type,
            "pin_position": self.pin_position,
            "value": value,
            "unit": self.unit,
        }
        if self.flags:
            reading["flags"] = list(self.flags)
        return reading

    def _text(self, value: Any) -> dict[str, Any]:
        text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
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


def _boolean(value: Any, name: str) -> float:
    if isinstance(value, str):
        found = _WORDS.get(value.strip().lower())
        if found is not None:
            return found
    elif value in {0, 1}:
        return float(value)
    message = f"{name} is {value!r:.80}, neither true nor false"
    raise Reject(ReasonCode.VALUE_TYPE, message)


def _number(value: str, name: str) -> float:
    try:
        return float(value)
    except ValueError:
        message = f"{name} is {value!r:.80}, not a number"
        raise Reject(ReasonCode.VALUE_TYPE, message) from None


class Mapper:
    """The mapping of one device. Targets are worked out once for each (name, unit, pin) that it sends."""

    __slots__ = ("_datatypes", "_lookup", "_mappings", "_targets")

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
        factor = mapping.get("scale", 1.0) if mapping else 1.0
        offset = mapping.get("offset", 0.0) if mapping else 0.0
        shown, flags, change = _unit(spelled, datatype.get("unit"))
        # Scale and offset of the mapping come first: they are in the unit that the field comes in.
        factor, offset = factor * change[0], offset * change[0] + change[1]
        return Target(
            component, position, datatype.get("kind"), shown, factor, offset,
            factor != 1 or offset != 0, flags,
        )  # fmt: skip


def _unit(spelled: str | None, wanted: str | None) -> tuple[str, tuple[str, ...], tuple[float, float]]:
    """(unit of the reading, flags, factor and offset)."""
    given, known = canonical(spelled)
    if wanted is None:
        return given, () if known else (UNIT_UNKNOWN,), (1.0, 0.0)
    if not given:
        # A device that names no unit is taken at the registry's word.
        return wanted, (), (1.0, 0.0)
    if given == canonical(wanted)[0]:
        return wanted, (), (1.0, 0.0)
    linear = conversion(given, wanted)
    if linear is None:
        return given, (UNIT_MISMATCH if known else UNIT_UNKNOWN,), (1.0, 0.0)
    return wanted, (), linear
