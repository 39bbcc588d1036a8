"""Instants as devices, networks and people write them, to whole microseconds since the epoch, UTC."""

import math
from datetime import UTC, datetime
from typing import Any, Final

#: Unit of a number by its size: 1e11 s is the year 5138, 1e11 ms is 1973; so every instant from 1973 on is unambiguous.
_SECONDS_BELOW: Final = 1e11
_MILLISECONDS_BELOW: Final = 1e14
_MICROSECONDS_BELOW: Final = 1e17
_NANOSECONDS_BELOW: Final = 1e20

#: Longest text that is read as an instant: ISO 8601 with nanoseconds and an offset has 35 characters.
_TEXT_CHARACTERS_MAX: Final = 64

UNITS_US: Final[dict[str, float]] = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}


def instant_us(value: Any, unit: str | None = None) -> int | None:
    """Microseconds since the epoch, or None where `value` is no instant.

    Args:
        value: a number (or its text), or ISO 8601 text; without an offset it is UTC.
        unit: s, ms, us or ns for numbers; None tells by the size.
    """
    if isinstance(value, str):
        return _from_text(value, unit)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if unit is not None:
        if abs(value) >= _NANOSECONDS_BELOW:
            return None
        return value * 1_000_000 if unit == "s" and isinstance(value, int) else round(value * UNITS_US[unit])
    size = abs(value)
    if size < _SECONDS_BELOW:
        return value * 1_000_000 if isinstance(value, int) else round(value * 1e6)
    if size < _MILLISECONDS_BELOW:
        return value * 1_000 if isinstance(value, int) else round(value * 1e3)
    if size < _MICROSECONDS_BELOW:
        return round(value)
    if size < _NANOSECONDS_BELOW:
        return int(value // 1_000)
    return None


def _from_text(text: str, unit: str | None) -> int | None:
    if not text or len(text) > _TEXT_CHARACTERS_MAX:
        return None
    text = text.strip()
    try:
        at = datetime.fromisoformat(_six_digits(text))
    except ValueError:
        try:
            return instant_us(int(text), unit)
        except ValueError:
            try:
                return instant_us(float(text), unit)
            except ValueError:
                return None
    except OverflowError:
        return None
    if text.isdigit():
        # fromisoformat takes 20240101 for a date; a number of eight digits may be either, and devices send numbers.
        return instant_us(int(text), unit)
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    delta = at - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def _six_digits(text: str) -> str:
    """Cut a fraction to microseconds: networks write nanoseconds, which fromisoformat does not read."""
    head, dot, tail = text.partition(".")
    if not dot:
        return text
    digits = len(tail) - len(tail.lstrip("0123456789"))
    return f"{head}.{tail[: min(digits, 6)].ljust(6, '0')}{tail[digits:]}"
