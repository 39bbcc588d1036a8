"""What confirms a command: a word of the way to the device, or what the device says afterwards."""

import ast
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

from preservarium.domain.commands.fields import is_number, refuse
from preservarium.domain.expressions import ARITHMETIC_ERRORS, FUNCTIONS, ExpressionError, compile_expression
from preservarium.domain.readings.reading import Quality

_QUALITY_UNUSABLE: Final = int(Quality.FAIL)

#: The broker's acknowledgement; the network's or the device's; any uplink. Else an object: readings.
CONFIRM_WORDS: Final = ("published", "delivered", "uplink")
_CONFIRM_FIELDS: Final = frozenset({"component_type", "pin_position", "equals", "tolerance", "min", "max", "field"})

Confirm = str | Mapping[str, Any]


def check_confirm(confirm: Any) -> Confirm:
    """A confirmation as it may be asked for.

    One of `CONFIRM_WORDS`; or readings of one message: `{component_type, pin_position?}` with `equals` (and
    `tolerance`), with `min` and/or `max`, or with `field`, the name of a field of the command that the reading
    must equal; or `{expression, pin_position?}` over component types, true where all of them are in the message.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(confirm, str):
        if confirm not in CONFIRM_WORDS:
            refuse(f"{confirm!r:.100} is not one of {', '.join(CONFIRM_WORDS)}, and no object")
        return confirm
    if not isinstance(confirm, Mapping):
        refuse("neither a word nor an object")
    if "pin_position" in confirm and not isinstance(confirm["pin_position"], str):
        refuse("pin_position is no text")
    if "expression" in confirm:
        if unknown := confirm.keys() - {"expression", "pin_position"}:
            refuse(f"{sorted(unknown)[0]} does not go with expression")
        if not isinstance(confirm["expression"], str):
            refuse("expression is no text")
        _compiled(confirm["expression"])
        return confirm
    if unknown := confirm.keys() - _CONFIRM_FIELDS:
        refuse(f"there is no {sorted(unknown)[0]!r:.100}")
    if not isinstance(confirm.get("component_type"), str):
        refuse("component_type is missing")
    ways = [("equals" in confirm), ("min" in confirm or "max" in confirm), ("field" in confirm)]
    if sum(ways) != 1:
        refuse("give one of equals, min and max, field")
    for name in ("tolerance", "min", "max"):
        if name in confirm and not is_number(confirm[name]):
            refuse(f"{name} is no number")
    if "equals" in confirm and not (is_number(confirm["equals"]) or isinstance(confirm["equals"], str | bool)):
        refuse("equals is neither a number nor a text")
    if "field" in confirm and not isinstance(confirm["field"], str):
        refuse("field is no text")
    return confirm


def resolve_confirm(confirm: Confirm, given: Mapping[str, Any]) -> Confirm:
    """The same confirmation with `field` replaced by the value that the command gives it.

    Raises:
        ValueError: the command does not have the field, or it is neither a number nor a text.
    """
    if isinstance(confirm, str) or "field" not in confirm:
        return confirm
    name = confirm["field"]
    if name not in given:
        refuse(f"the confirmation wants the field {name!r:.100}")
    kept = {k: v for k, v in confirm.items() if k != "field"}
    return check_confirm({**kept, "equals": given[name]})


def is_confirmed(confirm: Confirm, readings: list[Mapping[str, Any]]) -> bool:
    """Whether a message with these validated readings confirms the command; failed and revised readings say nothing."""
    if isinstance(confirm, str):
        return confirm == "uplink"
    pin = confirm.get("pin_position")
    usable = [
        r
        for r in readings
        if r.get("quality", 0) < _QUALITY_UNUSABLE
        and not r.get("revised")
        and (pin is None or r["pin_position"] == pin)
    ]
    if "expression" in confirm:
        names, evaluate = _compiled(confirm["expression"])
        values: dict[str, Any] = {}
        for reading in usable:
            if reading.get("value") is not None:
                values.setdefault(reading["component_type"], reading["value"])
        if not all(name in values for name in names):
            return False
        try:
            return bool(evaluate(*(values[name] for name in names)))
        except ARITHMETIC_ERRORS:
            return False
    return any(r["component_type"] == confirm["component_type"] and _matches(confirm, r) for r in usable)


def _matches(confirm: Mapping[str, Any], reading: Mapping[str, Any]) -> bool:
    value = reading.get("value")
    if "equals" in confirm:
        wanted = confirm["equals"]
        if isinstance(wanted, str):
            return bool(reading.get("value_text") == wanted)
        return value is not None and abs(value - wanted) <= confirm.get("tolerance", 0)
    return value is not None and confirm.get("min", value) <= value <= confirm.get("max", value)


@lru_cache(maxsize=1_000)
def _compiled(text: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """The component types that an expression names, and its function of them."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        message = f"{text!r:.100}: not an expression"
        raise ExpressionError(message) from None
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - FUNCTIONS.keys()
    names = tuple(sorted(found))
    if not names:
        message = f"{text!r:.100}: it names no component type"
        raise ExpressionError(message)
    return names, compile_expression(text, names)
