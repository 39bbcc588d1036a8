"""Instants as people give them to commands, and as commands show them: ISO 8601, UTC."""

import re
import time
from datetime import UTC, datetime
from typing import Any, Final

import click

from preservarium.domain.readings.instant import instant_us

_SPAN: Final = re.compile(r"([0-9]+)([smhd])")
#: Instants in whole microseconds between these are told: 2000 to 2100. No other number of ours is of that size.
INSTANT_MIN_US: Final = 946_684_800_000_000
INSTANT_MAX_US: Final = 4_102_444_800_000_000
#: Behind a field's name: the instant in ISO 8601.
ISO: Final = "_iso"
#: What devices send is theirs: nothing is added to it.
THEIRS: Final = frozenset({"payload", "meta"})

_INSTANT: Final = re.compile(r"(?<![\w.])\d{15,16}(?![\w.]*\d)")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def now_us() -> int:
    """The clock, µs since the epoch."""
    return time.time_ns() // 1_000


def when(text: str, option: str) -> int:
    """µs of an ISO 8601 instant (UTC where it names no offset), or of so long ago (30m, 2h, 7d).

    Args:
        text: what was given.
        option: its name, for the message.

    Raises:
        UsageError: it is neither.
    """
    if span := _SPAN.fullmatch(text.strip()):
        before = now_us() - int(span[1]) * _SECONDS[span[2]] * 1_000_000
        if before < 0:
            message = f"{option}: {text!r} ago is before 1970"
            raise click.UsageError(message)
        return before
    at = instant_us(text)
    if at is None:
        message = f"{option}: {text!r} is neither an instant (ISO 8601) nor a time like 30m, 2h, 7d"
        raise click.UsageError(message)
    return at


def shown(at: Any) -> str:
    """An instant (µs since the epoch, or a datetime) for people, to the second; nothing where there is none."""
    if isinstance(at, int | float):
        at = datetime.fromtimestamp(at / 1e6, UTC)
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if isinstance(at, datetime) else ""


def iso(us: int) -> str:
    """An instant in ISO 8601, to the millisecond, or to the microsecond where it has one."""
    at = datetime.fromtimestamp(us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    rest = us % 1_000_000
    return f"{at}.{rest:06d}Z" if rest % 1_000 else f"{at}.{rest // 1_000:03d}Z"


def with_iso(value: Any) -> Any:
    """A message with each instant in ISO 8601 beside it, under the field's name and `_iso`."""
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for name, each in value.items():
            found[name] = each if name in THEIRS else with_iso(each)
            if type(each) is int and INSTANT_MIN_US <= each < INSTANT_MAX_US and f"{name}{ISO}" not in value:
                found[f"{name}{ISO}"] = iso(each)
        return found
    if isinstance(value, list):
        return [with_iso(each) for each in value]
    return value


def told(value: Any) -> Any:
    """A value for people: an instant with what it means, anything else as it is."""
    instant = type(value) is int and INSTANT_MIN_US <= value < INSTANT_MAX_US
    return f"{value} ({iso(value)})" if instant else value


def readable(text: Any) -> str:
    """A message for people, with the instants in it (µs since the epoch) in ISO 8601."""

    def instant(found: "re.Match[str]") -> str:
        us = int(found[0])
        return iso(us) if INSTANT_MIN_US <= us < INSTANT_MAX_US else found[0]

    return _INSTANT.sub(instant, str(text or ""))


def shown_span(seconds: float | None) -> str:
    """A duration for people, in its two largest units."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds:.3g} s"
    rest, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
