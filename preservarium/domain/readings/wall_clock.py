"""Instants that a device writes as the clock on its wall shows them, without saying how far that is from UTC.

An hour that the clock shows twice, when it is put back, is resolved by order: what stands in one payload is written in the order of time, and where it
goes back, the hour has begun anew. Where nothing stands before it, the pass counts that is nearer to when the message was received; of a message that comes
later than `LIVE_US` nobody knows, and it is the first. Either way it is told: the instant is a `Twice`, and its readings are flagged `time_ambiguous`. A
time that the clock skips is counted on from before the change.
"""

from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from preservarium.domain.readings.instant import instant_us, iso_us
from preservarium.domain.readings.number import number_of

#: The flag of readings whose instant the clock has shown twice.
TIME_AMBIGUOUS: Final = "time_ambiguous"
#: A message that is received within this time of one of the two passes is of that one.
LIVE_US: Final = 45 * 60_000_000
_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001 - what a wall shows has no zone
_MICROSECOND: Final = timedelta(microseconds=1)


class Twice(int):
    """An instant, µs, whose time on the wall clock came twice."""

    __slots__ = ()


class WallClock:
    """The clock of a time zone.

    Args:
        name: of the zone, as the IANA database has it.

    Raises:
        ValueError: there is none of that name.
    """

    __slots__ = ("_zone", "name")

    def __init__(self, name: Any) -> None:
        try:
            if not isinstance(name, str):
                raise ValueError
            self._zone = ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            message = f"there is no time zone {name!r:.60}; they are named like Europe/Berlin"
            raise ValueError(message) from None
        self.name = name

    def instant(self, value: Any, unit: str | None, received_at: int, before: int | None = None) -> int | None:
        """µs since the epoch; None where `value` is no instant.

        Args:
            value: a number (or its text), or ISO 8601 text: with an offset it says itself what it means.
            unit: of numbers, see `instant_us`.
            received_at: when the message was received, µs.
            before: the instant that stands before it in the same payload, µs.

        Returns:
            A `Twice` where the clock has shown this time twice.
        """
        at = instant_us(value, unit)
        if at is None or not isinstance(value, str):
            return at
        if number_of(value) is not None or iso_us(value, with_offset=True) is not None:
            return at
        try:
            wall = _EPOCH + timedelta(microseconds=at)
            first = at - self._offset_us(wall, 0)
            second = at - self._offset_us(wall, 1)
        except OverflowError:
            return at  # a year that no calendar has; the limits of instants refuse it
        if second <= first:
            return first
        if before is not None:
            return Twice(second if first < before else first)
        nearer = first if abs(received_at - first) <= abs(received_at - second) else second
        return Twice(nearer if abs(received_at - nearer) <= LIVE_US else first)

    def _offset_us(self, wall: datetime, fold: int) -> int:
        offset = wall.replace(tzinfo=self._zone, fold=fold).utcoffset()
        assert offset is not None, "a zone has an offset"
        return offset // _MICROSECOND


@lru_cache(maxsize=256)
def wall_clock(name: str) -> WallClock:
    """The clock of a zone, made once.

    Raises:
        ValueError: there is none of that name.
    """
    return WallClock(name)
