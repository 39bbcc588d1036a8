"""Circular quantities: directions, orientations, phases, hours of a day. After a period they are where they were.

A datatype says `circular: 360`, its period in its own unit. Then the distance of two values is the shorter arc between them; the mean is the
direction of the sum of their unit vectors, in [0, period); the spread is the circular standard deviation (Mardia and Jupp,
"Directional Statistics", 2000, section 2.3), from the length of that sum. There is neither a minimum nor a maximum, and no sum.
"""

from collections.abc import Mapping
from math import atan2, cos, hypot, log, pi, remainder, sin, sqrt
from typing import Any, Final, NamedTuple

#: Far beyond any unit; within them no product of a period overflows, here or in a database.
_PERIOD_MIN: Final = 1e-100
_PERIOD_MAX: Final = 1e100
#: Unit vectors whose sum is shorter than this share of their number point all ways alike: rounding alone would give it a direction.
_LENGTH_MIN: Final = 1e-9


def period_of(datatype: Mapping[str, Any]) -> float | None:
    """The period that a datatype declares with `circular`; None where it declares none.

    Raises:
        ValueError: it is no number over 0, or the datatype is a counter.
    """
    circular = datatype.get("circular")
    if circular is None:
        return None
    try:
        period = float(circular)
    except (TypeError, ValueError):
        period = 0.0
    if isinstance(circular, bool) or not _PERIOD_MIN <= period <= _PERIOD_MAX:
        text = f"circular must be the period, a number over 0, not {circular!r:.100}"
        raise ValueError(text)
    if datatype.get("counter") is not None:
        text = "a counter is not circular"
        raise ValueError(text)
    return period


def arc(a: float, b: float, period: float) -> float:
    """From `b` to `a` by the shorter way: over -period/2, up to period/2.

    Raises:
        ValueError: the period is 0, or a number is not finite.
    """
    # Both within a period first: their difference cannot overflow then, and is as exact as they are.
    way = remainder(remainder(a, period) - remainder(b, period), period)
    return -way if way == -period / 2 else way


def wrapped(value: float, period: float) -> float:
    """The value in [0, period)."""
    within = value % period
    # A negative number that is almost 0 is rounded up to the period.
    return 0.0 if within == period else within


def unit_vector(value: float, period: float) -> tuple[float, float]:
    """(cos, sin) of a value as an angle."""
    angle = remainder(value, period) / period * 2 * pi
    return cos(angle), sin(angle)


class Direction(NamedTuple):
    """What the sums of unit vectors say; both None where the vectors point all ways alike."""

    mean: float | None  #: in [0, period)
    spread: float | None  #: circular standard deviation, in the unit of the period


def direction(cos_sum: float, sin_sum: float, count: float, period: float) -> Direction:
    """Mean and spread of `count` values of which the unit vectors were added up."""
    length = hypot(cos_sum, sin_sum) / count
    if length < _LENGTH_MIN:
        return Direction(None, None)
    turn = period / (2 * pi)
    # Rounding may make equal vectors a little longer than one each.
    return Direction(wrapped(atan2(sin_sum, cos_sum) * turn, period), sqrt(max(0.0, -2 * log(length))) * turn)
