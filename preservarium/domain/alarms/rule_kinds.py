"""What is of one kind of alarm rule only: which fields it has, and what of a `Rule` they become."""

from collections.abc import Callable, Mapping
from functools import partial
from operator import sub
from typing import Any, Final

from preservarium.domain.alarms.rule import THRESHOLDS, Input
from preservarium.domain.alarms.rule_fields import duration_us, number_of, refuse
from preservarium.domain.alarms.schedule import compile_calendar
from preservarium.domain.circular import arc, period_of
from preservarium.domain.expressions import compile_expression
from preservarium.domain.readings.reading import TIMESTAMP_MIN_US
from preservarium.domain.registry.device import RuleDoc

#: Series that a rule may take in beside its own; what people can still explain to each other.
INPUTS_MAX: Final = 8

#: What people are told where a rule has no text of its own.
MESSAGES: Final[Mapping[str, str]] = {
    "high": "{name}: {component_type} is {value} {unit}, above {threshold} {unit}",
    "low": "{name}: {component_type} is {value} {unit}, below {threshold} {unit}",
    "rate": "{name}: {component_type} changes by {value} {unit}, more than {threshold} {unit}",
    "deviation": "{name}: {component_type} is off by {value} {unit}, more than {threshold} {unit}",
    "expression": "{name}: {rule}",
    "no_data": "{name}: no {component_type} for {threshold} {unit}",
}

#: Fields that only some kinds of rule have; a field that a rule cannot use is refused, since it would mislead.
FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "threshold": (*THRESHOLDS, "rate", "deviation", "expression"),
    "deadband": (*THRESHOLDS, "rate", "deviation", "expression"),
    "levels": (*THRESHOLDS, "rate", "deviation", "expression"),
    "on_delay_s": (*THRESHOLDS, "rate", "deviation", "expression"),
    "off_delay_s": (*THRESHOLDS, "rate", "deviation", "expression"),
    "repeat": (*THRESHOLDS, "rate", "deviation", "expression"),
    "direction": ("rate", "deviation"),
    "window_s": ("rate",),
    "per_s": ("rate",),
    "setpoint": ("deviation",),
    "reference": ("deviation",),
    "expression": ("expression",),
    "inputs": ("expression",),
    "inputs_max_age_s": ("deviation", "expression"),
    "no_data_s": ("no_data",),
}
_PER: Final[Mapping[float, str]] = {1.0: "s", 60.0: "min", 3_600.0: "h", 86_400.0: "d"}


def _rate(doc: RuleDoc, unit: str, datatype: Mapping[str, Any]) -> dict[str, Any]:
    per_s = number_of(doc, "per_s", None)
    if per_s not in _PER:
        refuse("per_s: a rate is per 1, 60, 3600 or 86400 seconds")
    return {
        "fold": _direction(doc),
        "difference": _difference(datatype),
        "window_us": duration_us(doc, "window_s", None, least=1e-6),
        "per_us": round(per_s * 1e6),
        "unit": f"{unit}/{_PER[per_s]}",
    }


def _deviation(doc: RuleDoc, unit: str, datatype: Mapping[str, Any]) -> dict[str, Any]:
    reference = doc.get("reference")
    if (reference is None) == (doc.get("setpoint") is None):
        refuse("a deviation is from a setpoint or from a reference")
    fold, difference = _direction(doc), _difference(datatype)
    if reference is None:
        if doc.get("inputs_max_age_s") is not None:
            refuse("inputs_max_age_s: a deviation from a setpoint has none")
        return {"fold": fold, "difference": difference, "setpoint": number_of(doc, "setpoint", None)}
    return {
        "function": lambda value, other: fold(difference(value, other)),
        "inputs": (_input("reference", reference),),
        "inputs_max_age_us": duration_us(doc, "inputs_max_age_s", None, least=1e-6),
    }


def _expression(doc: RuleDoc, unit: str, datatype: Mapping[str, Any]) -> dict[str, Any]:
    inputs = doc.get("inputs") or {}
    if len(inputs) > INPUTS_MAX:
        refuse(f"inputs: {len(inputs)}; {INPUTS_MAX} are allowed")
    if "value" in inputs:
        refuse("inputs: value is the rule's own series")
    return {
        "function": compile_expression(doc["expression"], ("value", *inputs)),
        "inputs": tuple(_input(f"inputs: {name}", one) for name, one in inputs.items()),
        # An expression over its own value alone takes in nothing that could be too old.
        "inputs_max_age_us": duration_us(doc, "inputs_max_age_s", None if inputs else 0.0),
    }


def _no_data(doc: RuleDoc, unit: str, datatype: Mapping[str, Any]) -> dict[str, Any]:
    wait_us = duration_us(doc, "no_data_s", None, least=1.0)
    return {"no_data_us": wait_us, "threshold": wait_us / 1e6, "unit": "s"}


def can_be_silent(doc: RuleDoc, wait_us: int) -> bool:
    """Whether the schedule of a rule of silence has a span that is long enough."""
    week = compile_calendar(doc.get("schedule"))
    return week is None or week.deadline(TIMESTAMP_MIN_US, wait_us) is not None


#: Kind -> (document, unit of its component type, the datatype) -> the fields of `Rule` that are its own.
OWN_FIELDS: Final[Mapping[str, Callable[[RuleDoc, str, Mapping[str, Any]], dict[str, Any]]]] = {
    "rate": _rate,
    "deviation": _deviation,
    "expression": _expression,
    "no_data": _no_data,
}


def _direction(doc: RuleDoc) -> Callable[[float], float]:
    folds: dict[str, Callable[[float], float]] = {"either": abs, "rise": _same, "fall": _opposite}
    direction = doc.get("direction") or "either"
    if direction not in folds:
        refuse(f"direction is {', '.join(folds)}, not {direction!r}")
    return folds[direction]


def _difference(datatype: Mapping[str, Any]) -> Callable[[float, float], float]:
    """From one number to another: of a circular quantity, by the shorter way."""
    period = period_of(datatype)
    return sub if period is None else partial(arc, period=period)


def _same(difference: float) -> float:
    return difference


def _opposite(difference: float) -> float:
    return -difference


def _input(name: str, doc: Any) -> Input:
    if not isinstance(doc, Mapping) or set(doc) - {"component_type", "pin_position"} or "component_type" not in doc:
        refuse(f"{name} has a component_type and perhaps a pin_position")
    return Input(doc["component_type"], doc.get("pin_position"))
