"""Meters: what was consumed between two states of a counter that only counts up.

A counter goes up, rolls over at its declared width, or starts again at zero (reset, exchange). Consumption is never
negative. Where the state falls, two causes are possible:

- with a declared `width` (the modulus: a counter of five digits has 100,000, one of 32 bits 2**32) it rolled over, if
  that means that less than half the width was consumed: the rule of serial number arithmetic (RFC 1982, section 3.2),
- else it was reset, and what it shows was consumed since: the rest before the reset is unknown and not guessed.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final, Literal, NamedTuple

#: Behind the name of a counter's datatype: the series of what it consumed between readings.
CONSUMPTION_SUFFIX: Final = "_consumption"


class Counter(NamedTuple):
    """How a counter counts."""

    width: float | None = None  #: modulus, in the datatype's unit; None: it does not roll over


class Step(NamedTuple):
    """From one state to the next."""

    consumption: float  #: in the counter's unit, never negative
    event: Literal["rollover", "reset"] | None = None


def counter_of(document: Mapping[str, Any]) -> Counter:
    """The counter that a datatype's `counter` declares.

    Raises:
        ValueError: the width is no number over 0.
    """
    width = document.get("width")
    if width is None:
        return Counter()
    try:
        number = float(width)
    except (TypeError, ValueError):
        number = 0.0
    if not (number > 0 and isfinite(number)):
        text = f"width must be a number over 0, not {width!r}"
        raise ValueError(text)
    return Counter(number)


def step(before: float, after: float, counter: Counter) -> Step:
    """What was consumed from the state `before` to the later state `after`."""
    if after >= before:
        return Step(after - before)
    width = counter.width
    if width is not None and after >= 0 and before < width:
        wrapped = width - before + after
        if wrapped < width / 2:
            return Step(wrapped, "rollover")
    return Step(max(after, 0.0), "reset")
