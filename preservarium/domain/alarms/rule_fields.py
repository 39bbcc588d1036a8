"""Numbers in rule documents, which people write: durations, limits, and what to say of those that cannot be used."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final, NoReturn

#: Durations of a rule. A year: longer ones are mistakes of a unit.
DURATION_S_MAX: Final = 366 * 86_400.0


def duration_us(
    doc: Mapping[str, Any], key: str, default: float | None, least: float = 0.0, most: float = DURATION_S_MAX
) -> int:
    """A duration in seconds, as µs; as `number_of` besides."""
    seconds = number_of(doc, key, default, least=least)
    if seconds > most:
        refuse(f"{key} is more than {most:.0f}")
    return round(seconds * 1e6)


def number_of(doc: Mapping[str, Any], key: str, default: float | None, least: float | None = None) -> float:
    """A number that is finite and not less than `least`; `default` None: it must be given.

    Raises:
        KeyError: it is missing.
        ValueError: it cannot be used; the message says why.
    """
    value = doc.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    number = float(value)
    if not isfinite(number):
        refuse(f"{key} is not finite")
    if least is not None and number < least:
        refuse(f"{key} is less than {least:g}")
    return number


def refuse(text: str) -> NoReturn:
    """Say what of a document cannot be used.

    Raises:
        ValueError: with that text.
    """
    raise ValueError(text)
