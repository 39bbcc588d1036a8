"""When a rule watches: weekly hours in a named time zone, less planned outages.

Everything is worked out in event time from the rule alone, so live and replay agree. What the changes of the clock mean
is in `domain.local_time`: hours that the clock shows twice are watched twice, those that it skips do not come.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC
from typing import Any, Final, NoReturn
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from preservarium.domain.local_time import DAY_MINUTES, DAYS, Hours, Span, spans
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US

#: Entries of a weekly schedule: three shifts on each day.
HOURS_MAX: Final = 21

#: Planned outages of a rule or a device; a year of weekly ones. Those that are over can be taken out.
OUTAGES_MAX: Final = 60

#: Times that a deadline may be pushed on by hours in which nobody watches; far more than a sensible rule meets.
PUSHES_MAX: Final = 100

#: Hours are worked out so far around an instant. Those that leave out nothing but what the clock skips in one week are one
#: span of two weeks; any other is shorter.
_AROUND_US: Final = 15 * 86_400_000_000


class Calendar:
    """The time in which a rule watches; remembers the span that was asked for last.

    Args:
        hours: of the week; none: always.
        zone: of the hours.
        outages: spans in µs, [from, to), in which nobody watches.
    """

    def __init__(self, hours: Sequence[Hours], zone: ZoneInfo | None, outages: Sequence[Span]) -> None:
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

    def _week(self, at: int) -> list[Span]:
        """The hours around an instant."""
        if not self._hours:
            return []
        assert self._zone is not None
        return spans(self._hours, self._zone, at - _AROUND_US, at + _AROUND_US)


def compile_calendar(schedule: Any, *outages: Any) -> Calendar | None:
    """The calendar of a rule; None where it always watches.

    Args:
        schedule: {time_zone, hours: [{days, from, to}]}; None: always. Without `days`, each day; `to` may be 24:00,
            and where it is not after `from` it is on the next day.
        outages: lists of {from, to} in µs, or None.

    Raises:
        ValueError: it cannot be used; the message says why.
    """
    planned = [_outage(outage) for listed in outages for outage in listed or ()]
    if len(planned) > OUTAGES_MAX:
        _refuse(f"outages: {len(planned)}; a rule and its device may have {OUTAGES_MAX} together")
    if schedule is None:
        return Calendar((), None, planned) if planned else None
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
    entries = [_entry(entry) for entry in hours]
    if spans(entries, UTC, 0, 2 * _AROUND_US) == [(0, 2 * _AROUND_US)]:
        _refuse("schedule: its hours cover the whole week; leave it out")
    return Calendar(entries, zone, planned)


def _entry(entry: Any) -> Hours:
    if not isinstance(entry, Mapping) or set(entry) - {"days", "from", "to"} or not {"from", "to"} <= set(entry):
        _refuse("schedule: an entry of hours has days, from and to")
    days = entry.get("days") or DAYS
    if not isinstance(days, list | tuple) or any(day not in DAYS for day in days):
        _refuse(f"schedule: days are of {', '.join(DAYS)}")
    begin, end = _minute(entry["from"]), _minute(entry["to"])
    if begin in (DAY_MINUTES, end):
        _refuse(f"schedule: {entry['from']} to {entry['to']} is no span")
    return Hours(begin, end, frozenset(DAYS.index(day) for day in days))


def _minute(text: Any) -> int:
    hour, _, minute = text.partition(":") if isinstance(text, str) else ("", "", "")
    if not (len(hour) == 2 and len(minute) == 2 and (hour + minute).isascii() and (hour + minute).isdigit()):
        _refuse(f"schedule: {text!r} is no local time such as 08:00")
    found = int(hour) * 60 + int(minute)
    if int(minute) > 59 or found > DAY_MINUTES:
        _refuse(f"schedule: {text!r} is no local time such as 08:00")
    return found


def _outage(outage: Any) -> Span:
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
