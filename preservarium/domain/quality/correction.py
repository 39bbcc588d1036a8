"""What people correct in stored readings: values that are void, wrong by a factor or an offset, or somebody else's.

A correction makes a row of a row: when it was measured, received and of which raw bytes stays. It says so by a flag, and its quality is judged
again by the bounds of its datatype; what they refuse cannot be put in by hand. Of a counter, what was consumed follows (`reconsumed`), by the
code that runs live.

Numbers are computed exactly and rounded once: 20.1 × 10 is 201, not 201.00000000000003.

Nothing here waits or reads a clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

from preservarium.domain.quality.checks import SeriesCheck
from preservarium.domain.quality.counter import Counter, Swap
from preservarium.domain.quality.meter import Meter, consumed
from preservarium.domain.readings.reading import Quality

#: Flags of rows that people have changed: they do not come out of their bytes.
CORRECTED: Final = "corrected"
VOIDED: Final = "voided"
FLAGS: Final = frozenset({CORRECTED, VOIDED})

#: Flags of tests that look at one value: judged again where the value is another one.
_OF_VALUE: Final = frozenset({"gross_range", "climatology", "missing"})


class CorrectionError(ValueError):
    """It cannot be corrected so; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """What of a stored reading may be corrected. Instants µs since the epoch, UTC."""

    at: int
    value: float | None
    value_text: str | None
    quality: int
    flags: tuple[str, ...]


def exact(text: str) -> Fraction:
    """A number as people write it: 0.1, 1/1000, 1e-3.

    Raises:
        CorrectionError: it is none.
    """
    try:
        return Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        message = f"{text!r} is no number: write 0.1, -2.5, 1/1000 or 1e-3"
        raise CorrectionError(message) from None


def void(row: Row) -> Row:
    """The row says that there is no value: it was none of its device."""
    flags = (*(flag for flag in row.flags if flag not in FLAGS and flag not in _OF_VALUE), VOIDED)
    return replace(row, value=None, value_text=None, quality=int(Quality.MISSING), flags=flags)


def with_value(row: Row, value: float, check: SeriesCheck) -> Row:
    """The row with another value, judged by the bounds of its datatype.

    Raises:
        CorrectionError: they refuse it.
    """
    if not check.fail_min <= value <= check.fail_max:
        message = f"{value} is outside of what the datatype takes ({check.fail_min} to {check.fail_max})"
        raise CorrectionError(message)
    flags = tuple(flag for flag in row.flags if flag not in FLAGS and flag not in _OF_VALUE)
    quality = check.passed
    if not check.suspect_min <= value <= check.suspect_max:
        flags, quality = (*flags, "gross_range"), int(Quality.SUSPECT)
    elif flags:
        # What other tests found suspicious stays so.
        quality = max(quality, int(Quality.SUSPECT)) if row.quality == int(Quality.SUSPECT) else quality
    return replace(row, value=value, value_text=None, quality=quality, flags=(*flags, CORRECTED))


def linear(row: Row, factor: Fraction, offset: Fraction, check: SeriesCheck) -> Row | None:
    """The row with its value times `factor` plus `offset`; None where it has no number.

    Raises:
        CorrectionError: the bounds refuse what comes out, or it is no number of 64 bits.
    """
    if row.value is None:
        return None
    try:
        # The shortest decimal is what the device said; its binary neighbour is only how it is kept.
        value = float(Fraction(repr(row.value)) * factor + offset)
    except OverflowError:
        message = f"{row.value} times {float(factor)} is no number that can be stored"
        raise CorrectionError(message) from None
    return with_value(row, value, check)


def moved(row: Row) -> Row:
    """The row as it stands under another device."""
    flags = tuple(flag for flag in row.flags if flag not in FLAGS)
    return replace(row, flags=(*flags, CORRECTED))


# --- counters


def consumption(readings: Iterable[Row], counter: Counter) -> dict[int, dict[str, Any]]:
    """What a counter consumed, by the instants of its states: the derived readings that validate makes of them.

    Args:
        readings: its states in the order of their instants; those without a number, or that failed, are passed over.
        counter: how it counts.
    """
    meters: dict[str, Meter] = {}
    found: dict[int, dict[str, Any]] = {}
    for row in readings:
        if row.value is None or row.quality in (int(Quality.FAIL), int(Quality.MISSING)):
            continue
        about: dict[str, Any] = {"component_type": "", "pin_position": "", "unit": "", "quality": row.quality}
        if said := [flag for flag in row.flags if flag not in FLAGS]:
            about["flags"] = said
        told = consumed(meters, "", about, row.at, row.value, counter)
        if told is not None:
            found[row.at] = told
    return found


def reconsumed(
    before: Sequence[Row], after: Sequence[Row], counter: Counter, corrected: Counter | None = None
) -> Mapping[int, dict[str, Any] | None]:
    """Where the consumption of a counter is another one by a correction: instant -> the derived reading, or None where there is none any more.

    Both are derived from where `before` begins, so that what a meter's past would have told makes no difference of its own.

    Args:
        before: its states as they stood, from well before what is corrected to well after it.
        after: the same, corrected.
        counter: how it counts.
        corrected: how it counts by the correction; None: as before.
    """
    was, now = consumption(before, counter), consumption(after, corrected or counter)
    found: dict[int, dict[str, Any] | None] = {}
    for at in sorted(was.keys() | now.keys()):
        if was.get(at) != now.get(at):
            one = now.get(at)
            if one is not None:
                one = {**one, "flags": [*one.get("flags", ()), CORRECTED]}
            found[at] = one
    return found


def exchanged(counter: Counter, at: int, final: float | None, initial: float) -> Counter:
    """The counter with one exchange of its meter more.

    Raises:
        CorrectionError: one is registered at that instant.
    """
    if any(swap.at == at for swap in counter.swaps):
        message = "an exchange at that instant is registered with the device already"
        raise CorrectionError(message)
    return counter._replace(swaps=tuple(sorted((*counter.swaps, Swap(at, final, initial)))))
