"""Instants that a message must have: what preservarium/domain/instant.py reads, within the bounds of a device's time."""

from typing import Any

from preservarium.domain import instant
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US


def instant_us(value: Any) -> int:
    """µs since the epoch, UTC, of ISO 8601 text (UTC where it has no offset) or of a number in s, ms, µs or ns.

    Raises:
        Reject: `timestamp_invalid`: no instant, or outside 2000-01-01 … 2100-01-01.
    """
    us = instant.instant_us(value)
    if us is None or not TIMESTAMP_MIN_US <= us <= TIMESTAMP_MAX_US:
        why = "no instant" if us is None else "outside 2000 … 2100"
        raise Reject(ReasonCode.TIMESTAMP_INVALID, f"{why}: {str(value)[:80]!r}")
    return us
