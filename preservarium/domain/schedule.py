"""When a rule watches: weekly hours in a named time zone, less planned outages.

Everything is worked out in event time from the rule alone, so live and replay agree. Local times follow the zone's
own changes of the clock; a local time that a change skips is read with the offset from before it.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Final, NoReturn
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from preservarium.domain.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US

#: Days of the week as a rule names them, in the order of `date.weekday`.
DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

#: Entries of a weekly schedule: three shifts on each day.
HOURS_MAX: Final = 21

#: Planned outages of a rule or a device; a year of weekly ones. Those that are over can be taken out.
OUTAGES_MAX: Final = 60

#: Times that a deadline may be pushed on by hours in which nobody watches; far more than a sensible rule meets.
PUSHES_MAX: Final = 100

_DAY_MINUTES: Final = 24 * 60

_Span = tuple[int, int]
#: weekdays, minute of the day at which it begins, minute at which it ends (over 1440: on the next day)
_Hours = tuple[frozenset[int], int, int]


class Calendar:
    """The time in which a rule watches; remembers the span that was asked for last.

    Args:
        hours: of the week; none: always.
        zone: of the hours.
        outages: spans in µs, [from, to), in which nobody watches.
    """

    def __init__(self, hours: Sequence[_Hours], zone: ZoneInfo | None, outages: Sequence[_Span]) -> None:
        self._hours = tuple(hours)
        self._zone = zone
        self._outages = tuple(sorted(outages))
        self._known = (0, 0, False)

    def span(self, at: int) -> tuple[bool, int]:
        """Whether the rule watches at `at`, and until when that stays so; µs."""
        begin, end, inside = self._known
        if not begin <= at < end:
            self._known = begin, end, inside = self._find(at)
        return inside, end

    def deadline(self, at: int, wait_us: int) -> int | None:
        """The instant `wait_us` after `at`; time in which nobody watches starts the wait anew. None: never."""
        deadline = at + wait_us
        for _ in range(PUSHES_MAX):
            inside, end = self.span(at)
            if inside and end >= deadline:
                return deadline
            if end >= TIMESTAMP_MAX_US:
                return None
            if not inside:
                deadline = end + wait_us
            at = end
        return None

    def _find(self, at: int) -> tuple[int, int, bool]:
        begin, end = TIMESTAMP_MIN_US - 1, TIMESTAMP_MAX_US
        inside = not self._hours
        for start, stop in self._week(at):
            if start <= at < stop:
                begin, end, inside = start, stop, True
                break
            if stop <= at:
                begin = stop
            else:
                end = start
                break
        for start, stop in self._outages:
            if start <= at < stop:
                # Next to it, nobody may watch either: then the next question says so.
                begin, end, inside = start, stop, False
            elif inside and stop <= at:
                begin = max(begin, stop)
            elif inside and start > at:
                end = min(end, start)
        return begin, end, inside

    def _week(self, at: int) -> list[_Span]:
        """The hours around an instant, those that touch made one."""
        if not self._hours:
            return []
        assert self._zone is not None
        today = datetime.fromtimestamp(at // 1_000_000, self._zone).date()
        spans: list[_Span] = []
        for days in range(-9, 10):
            day = today + timedelta(days=days)
            spans += [
                (self._instant(day, begin), self._instant(day, end))
                for weekdays, begin, end in self._hours
                if day.weekday() in weekdays
            ]
        joined: list[_Span] = []
        for begin, end in sorted(spans):
            if joined and begin <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((begin, end))
        return joined

    def _instant(self, day: date, minute: int) -> int:
        local = datetime.combine(day + timedelta(days=minute // _DAY_MINUTES), time(), self._zone)
        return int(local.replace(hour=minute // 60 % 24, minute=minute % 60).timestamp()) * 1_000_000


def compile_calendar(schedule: Any, *outages: Any) -> Calendar | None:
    """The calendar of a rule; None where it always watches.

    Args:
        schedule: {time_zone, hours: [{days, from, to}]}; None: always. Without `days`, each day; `to` may be 24:00,
            and where it is not after `from` it is on the next day.
        outages: lists of {from, to} in µs, or None.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    spans = [_outage(outage) for listed in outages for outage in listed or ()]
    if len(spans) > OUTAGES_MAX:
        _refuse(f"outages: {len(spans)}; a rule and its device may have {OUTAGES_MAX} together")
    if schedule is None:
        return Calendar((), None, spans) if spans else None
    unknown = set(schedule) - {"time_zone", "hours"}
    if unknown:
        _refuse(f"schedule: there is no {sorted(unknown)[0]!r}")
    name = schedule.get("time_zone")
    try:
        zone = ZoneInfo(name)
    except (ZoneInfoNotFoundError, TypeError, ValueError, OSError):
        _refuse(f"schedule: {name!r} is no time zone, e.g. Europe/Berlin or UTC")
    hours = schedule.get("hours")
    if not isinstance(hours, list) or not 1 <= len(hours) <= HOURS_MAX:
        _refuse(f"schedule: hours is a list of 1 to {HOURS_MAX} entries")
    calendar = Calendar([_entry(entry) for entry in hours], zone, spans)
    week = calendar._week(int(datetime(2024, 1, 10, tzinfo=UTC).timestamp()) * 1_000_000)
    if len(week) == 1:
        _refuse("schedule: its hours cover the whole week; leave it out")
    return calendar


def _entry(entry: Any) -> _Hours:
    if not isinstance(entry, Mapping) or set(entry) - {"days", "from", "to"} or not {"from", "to"} <= set(entry):
        _refuse("schedule: an entry of hours has days, from and to")
    days = entry.get("days") or DAYS
    if not isinstance(days, list | tuple) or any(day not in DAYS for day in days):
        _refuse(f"schedule: days are of {', '.join(DAYS)}")
    begin, end = _minute(entry["from"]), _minute(entry["to"])
    if begin in (_DAY_MINUTES, end):
        _refuse(f"schedule: {entry['from']} to {entry['to']} is no span")
    return frozenset(DAYS.index(day) for day in days), begin, end if end > begin else end + _DAY_MINUTES


def _minute(text: Any) -> int:
    hour, _, minute = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (len(hour) == 2 and len(minute) == 2 and (hour + minute).isascii() and (hour + minute).isdigit()):
        _refuse(f"schedule: {text!r} is no local time such as 08:00")
    found = int(hour) * 60 + int(minute)
    if int(minute) > 59 or found > _DAY_MINUTES:
        _refuse(f"schedule: {text!r} is no local time such as 08:00")
    return found


def _outage(outage: Any) -> _Span:
    if not isinstance(outage, Mapping) or set(outage) != {"from", "to"}:
        _refuse("outages: an outage has from and to")
    begin, end = outage["from"], outage["to"]
    if type(begin) is not int or type(end) is not int:
        _refuse("outages: from and to are instants in µs")
    if not TIMESTAMP_MIN_US <= begin < end <= TIMESTAMP_MAX_US:
        _refuse("outages: to is not after from")
    return begin, end


def _refuse(text: str) -> NoReturn:
    raise ValueError(text) from None
