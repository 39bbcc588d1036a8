"""Meters: what was consumed between two states of a counter that only counts up.

A counter goes up, rolls over at its declared width, starts again at zero (reset), or another meter takes its place
(swap). Consumption is never negative, and a state below zero is none (domain/quality/tests.py refuses it). `step` says what two
states tell by themselves, where the later is less and no swap is registered:

- within the tolerance (`tolerance`; else the finest step that was seen, or the last decimal, and a thousandth of the state
  at most) it is noise: nothing was consumed, and what was shown before still counts,
- with a declared `width` (the modulus: a counter of five digits has 100,000, one of 32 bits 2**32) it rolled over, if
  that means that less than half the width was consumed: the rule of serial number arithmetic (RFC 1982, section 3.2),
- else it was reset, and what it shows was consumed since: the rest before the reset is unknown and not guessed.

A swap is registered with the device, as `counter: {swaps: [{at, final, initial}]}` among its datatypes: what the old meter
showed at the end, and the new one at its beginning (0 where it is not said).

What is unknown is in the result's `event`; a reset that lies between two states of which the later is larger cannot be seen. What more
than two states tell is in domain/quality/meter.py.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final, Literal, NamedTuple

from preservarium.domain.readings.instant import instant_us

#: Swaps of one counter; a meter is exchanged every few years.
SWAPS_MAX: Final = 100

#: A fall by this share of the state is noise whatever the meter's resolution was taken for: no reset ends so near.
_NOISE_SHARE: Final = 1e-3
#: Differences of decimal numbers are off by some last bits.
_ROUNDING: Final = 1.001


class Swap(NamedTuple):
    """Another meter took the place of the counter."""

    at: int  #: µs since the epoch, UTC
    final: float | None  #: what the old one showed; None: nobody read it
    initial: float  #: what the new one began with


class Counter(NamedTuple):
    """How a counter counts."""

    width: float | None = None  #: modulus, in the datatype's unit; None: it does not roll over
    swaps: tuple[Swap, ...] = ()  #: in the order of time
    tolerance: float | None = None  #: a fall by this is noise, in the datatype's unit; None: by the meter's resolution


class State(NamedTuple):
    """What a counter showed."""

    at: int  #: µs since the epoch, UTC
    value: float


class Step(NamedTuple):
    """From one state to the next."""

    consumption: float  #: in the counter's unit, never negative
    #: what happened between; where it is neither None, `rollover` nor `swap`, a part of the consumption is unknown or doubtful
    event: Literal["rollover", "reset", "glitch", "jump", "swap", "swap_unread"] | None = None


def counter_of(document: Mapping[str, Any]) -> Counter:
    """The counter that a datatype's `counter` declares.

    Raises:
        ValueError: the width is no number over 0, the tolerance none of at least 0, or a swap is not one.
    """
    width = document.get("width")
    if width is not None:
        width = _number("width", width)
        if width <= 0:
            text = f"width must be a number over 0, not {document['width']!r}"
            raise ValueError(text)
    tolerance = document.get("tolerance")
    if tolerance is not None:
        tolerance = _number("tolerance", tolerance)
        if tolerance < 0:
            text = f"tolerance must be a number of at least 0, not {document['tolerance']!r}"
            raise ValueError(text)
    swaps = document.get("swaps") or ()
    if not isinstance(swaps, list | tuple) or len(swaps) > SWAPS_MAX:
        text = f"swaps must be a list of at most {SWAPS_MAX}"
        raise ValueError(text)
    return Counter(width, tuple(sorted(map(_swap, swaps), key=lambda swap: swap.at)), tolerance)


def _swap(document: Any) -> Swap:
    at = instant_us(document.get("at")) if isinstance(document, Mapping) else None
    if at is None:
        text = f"a swap needs the instant `at`: {document!r:.100}"
        raise ValueError(text)
    final = document.get("final")
    return Swap(
        at, None if final is None else _number("final", final), _number("initial", document.get("initial") or 0)
    )


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        text = f"{name} must be a number, not {value!r}"
        raise ValueError(text)
    return number


def step(before: State, after: State, counter: Counter) -> Step:
    """What was consumed from the state `before` to the later state `after`, as far as these two tell."""
    for swap in counter.swaps:
        if before.at < swap.at <= after.at:
            first = 0.0 if swap.final is None else _count(before.value, swap.final, counter).consumption
            rest = step(State(swap.at, swap.initial), after, counter)
            unread = swap.final is None or rest.event == "swap_unread"
            return Step(first + rest.consumption, "swap_unread" if unread else "swap")
    return _count(before.value, after.value, counter)


def _count(before: float, after: float, counter: Counter) -> Step:
    if after >= before:
        return Step(after - before)
    if before - after <= noise(before, counter, 0.0):
        return Step(0.0)
    width = counter.width
    if width is not None and after >= 0 and before < width:
        wrapped = width - before + after
        if wrapped < width / 2:
            return Step(wrapped, "rollover")
    return Step(max(after, 0.0), "reset")


def noise(level: float, counter: Counter, finest: float) -> float:
    """By how much a meter may fall from `level` and not have moved; `finest` is the finest step that was seen, 0 where none was."""
    if counter.tolerance is not None:
        return counter.tolerance * _ROUNDING
    return min(finest or _last_decimal(level), level * _NOISE_SHARE) * _ROUNDING


def _last_decimal(value: float) -> float:
    # Twelve digits: what a conversion of units leaves behind them is no resolution.
    decimals = f"{value:.12g}".partition(".")[2]
    return 10.0 ** -len(decimals) if decimals.isdigit() else 1.0
