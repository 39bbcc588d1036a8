"""Instants as people give them to commands: ISO 8601, or so long ago."""

import re
import time
from datetime import UTC, datetime
from typing import Any, Final

import click

from preservarium.domain.instant import instant_us

_SPAN: Final = re.compile(r"(\d+)([smhd])")
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


def shown(us: Any) -> str:
    """An instant in µs for people, to the second; nothing where there is none."""
    return datetime.fromtimestamp(us / 1e6, UTC).isoformat(timespec="seconds") if isinstance(us, int) else ""


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
