"""Weekly hours in a named time zone: the one place that knows what happens when the clocks change.

Hours are what a clock on the wall shows. An hour that the clock shows twice counts both times, one that it skips does not
come, and hours that begin or end in what is skipped begin or end with the change.

Instants are µs since the epoch, UTC.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import pairwise
from typing import Final

DAY_MINUTES: Final = 24 * 60

#: Days of the week as people name them, in the order of `date.weekday`.
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

_MINUTE_US: Final = 60_000_000
_DAY_US: Final = DAY_MINUTES * _MINUTE_US
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_LOCAL: Final = _EPOCH.replace(tzinfo=None)
_MICROSECOND: Final = timedelta(microseconds=1)
#: Changes are looked for between instants this far apart: no zone has changed its clocks twice within it.
_STEP_US: Final = _DAY_US // 4
#: Days of which the changes are remembered together, and how many such stretches: 20 years in some 20 zones.
_STRETCH_US: Final = 32 * _DAY_US
_STRETCHES_MAX: Final = 5_000
#: A clock is put back by less than this, the change of a date line included.
_PUT_BACK_MAX_US: Final = 2 * _DAY_US

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hours:
    """Hours of the local day; into the next day where `until` is not later than `since`."""

    since: int  #: minute of the day
    until: int  #: minute of the day, not included
    days: frozenset[int] = frozenset(range(7))  #: on which they begin, 0 Monday

    @property
    def end(self) -> int:
        """`until`, counted from the midnight before `since`."""
        return self.until if self.until > self.since else self.until + DAY_MINUTES


def local(at_us: int, zone: tzinfo) -> datetime:
    """Local time."""
    return (_EPOCH + timedelta(microseconds=at_us)).astimezone(zone)


def covers(hours: Sequence[Hours], clock: datetime) -> bool:
    """Whether a wall clock that shows `clock` is within the hours."""
    minute, day = clock.hour * 60 + clock.minute, clock.weekday()
    return any(
        (day in one.days and one.since <= minute < one.end)
        or ((day - 1) % 7 in one.days and minute < one.end - DAY_MINUTES)
        for one in hours
    )


def spans(hours: Sequence[Hours], zone: tzinfo, begin_us: int, end_us: int) -> list[Span]:
    """The spans within [begin, end) in which `covers` is true, in order; those that touch are one."""
    joined: list[Span] = []
    for begin, end in sorted(_pieces(hours, zone, begin_us, end_us)):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def furthest(at_us: int, zone: tzinfo) -> datetime:
    """The latest time, without a zone, that the local clock has shown until now: it stands still while hours come again."""
    seen = [at_us] + [change - 1 for change in changes(zone, at_us - _PUT_BACK_MAX_US, at_us + 1)]
    return max(local(one, zone).replace(tzinfo=None) for one in seen)


def changes(zone: tzinfo, begin_us: int, end_us: int) -> list[int]:
    """The instants after `begin` and before `end` at which the zone's offset is another one than just before."""
    stretches = range(begin_us // _STRETCH_US, (end_us - 1) // _STRETCH_US + 1)
    return [at for stretch in stretches for at in _changes(zone, stretch) if begin_us < at < end_us]


@lru_cache(maxsize=_STRETCHES_MAX)
def _changes(zone: tzinfo, stretch: int) -> tuple[int, ...]:
    first = stretch * _STRETCH_US
    return tuple(
        _change(zone, at - _STEP_US, at)
        for at in range(first + _STEP_US - 1, first + _STRETCH_US, _STEP_US)
        if _offset_us(zone, at - _STEP_US) != _offset_us(zone, at)
    )


def _change(zone: tzinfo, before: int, after: int) -> int:
    """Where between two instants the offset changes."""
    old = _offset_us(zone, before)
    while after - before > 1:
        middle = (before + after) // 2
        before, after = (middle, after) if _offset_us(zone, middle) == old else (before, middle)
    return after


def _offset_us(zone: tzinfo, at_us: int) -> int:
    offset = local(at_us, zone).utcoffset()
    assert offset is not None, "a zone has an offset"
    return offset // _MICROSECOND


def _pieces(hours: Sequence[Hours], zone: tzinfo, begin_us: int, end_us: int) -> Iterator[Span]:
    """The hours between each two changes of the clock, where local time is UTC and a constant."""
    edges = [begin_us, *changes(zone, begin_us, end_us), end_us]
    for first, last in pairwise(edges):
        offset = _offset_us(zone, first)
        # From the day before, of which a span may reach over midnight.
        for day in range((first + offset) // _DAY_US - 1, (last + offset - 1) // _DAY_US + 1):
            weekday = (_EPOCH_LOCAL + timedelta(days=day)).weekday()
            for one in hours:
                if weekday in one.days:
                    begin = max(first, day * _DAY_US + one.since * _MINUTE_US - offset)
                    end = min(last, day * _DAY_US + one.end * _MINUTE_US - offset)
                    if begin < end:
                        yield begin, end
