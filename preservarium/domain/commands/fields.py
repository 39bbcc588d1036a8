"""Checks of single fields of commands, whoever wrote them. The message names the field."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final, NoReturn

#: Names, keys, actors; the registry's own names are far shorter.
NAME_CHARS_MAX: Final = 255


def name_of(line: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """The name, key or id in a field.

    Raises:
        ValueError: there is none and no default, or it is no text of 1 to `NAME_CHARS_MAX` characters.
    """
    value = line.get(name)
    if value is None:
        value = default
    if not isinstance(value, str) or not 0 < len(value) <= NAME_CHARS_MAX or "\0" in value:
        refuse(f"{name}: {value!r:.100} is no text of 1 to {NAME_CHARS_MAX} characters")
    return value


def within(
    given: Mapping[str, Any], name: str, most: float, *, least: float | None = None, whole: bool = False
) -> None:
    """Check a number, where it is given.

    Args:
        given: field -> value.
        name: of the field.
        most: the largest.
        least: the smallest; None: anything over 0.
        whole: whether it must be a whole number.

    Raises:
        ValueError: it is none of these numbers.
    """
    if name not in given:
        return
    value = given[name]
    good = type(value) is int if whole else is_number(value)
    if not good or value > most or (value < least if least is not None else value <= 0):
        refuse(f"{name}: {value!r:.100} is not {'over 0' if least is None else f'{least:g}'} to {most:g}")


def is_number(value: Any) -> bool:
    """Whether it is a finite number; a truth value is none."""
    return type(value) in (int, float) and isfinite(value)


def refuse(text: str) -> NoReturn:
    """Raise a ValueError: an expression of one line where a check fails."""
    raise ValueError(text)
