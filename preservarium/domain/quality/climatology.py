"""QARTOD test 5, climatology: what a value may be at this season, at this hour.

Members are spans of values, each for a span of time: of a `period` (month, hour, …: numbers, both ends inside) or, without
one, of the calendar (instants). They are applied in order, and the last one that covers the instant counts, as in ioos-qc
`climatology_test`; where none does, the test says nothing. Everything is in UTC.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any, Final, NamedTuple

from preservarium.domain.readings.instant import instant_us

#: Members of one datatype: a span for each hour of each month.
MEMBERS_MAX: Final = 288

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

#: Names as pandas has (and had) them, because ioos-qc takes those.
PERIODS: Final[Mapping[str, Callable[[datetime], int]]] = {
    "year": lambda t: t.year,
    "quarter": lambda t: (t.month + 2) // 3,
    "month": lambda t: t.month,
    "week": lambda t: t.isocalendar().week,
    "weekofyear": lambda t: t.isocalendar().week,
    "dayofyear": lambda t: t.timetuple().tm_yday,
    "day": lambda t: t.day,
    "dayofweek": lambda t: t.weekday(),
    "day_of_year": lambda t: t.timetuple().tm_yday,
    "day_of_week": lambda t: t.weekday(),
    "hour": lambda t: t.hour,
    "minute": lambda t: t.minute,
}


class Member(NamedTuple):
    """What values may be at some time."""

    period: str | None
    begin: float  #: in the period's numbers, else µs since the epoch; both ends belong to the member
    end: float
    suspect_min: float
    suspect_max: float
    fail_min: float = -inf
    fail_max: float = inf


class Climatology(NamedTuple):
    """The members of one datatype."""

    members: tuple[Member, ...]

    def at(self, at_us: int) -> Member | None:
        """The member that counts at an instant, µs since the epoch, UTC."""
        when: datetime | None = None
        found = None
        for member in self.members:
            if member.period is None:
                number = at_us
            else:
                when = when or _EPOCH + timedelta(microseconds=at_us)
                number = PERIODS[member.period](when)
            if member.begin <= number <= member.end:
                found = member
        return found


def climatology_of(document: Mapping[str, Any]) -> Climatology:
    """The test that `members` declare: a list of `{tspan, vspan, fspan?, period?}`, spans as [min, max].

    Raises:
        ValueError: a member is not of that form.
    """
    members = document.get("members")
    if not isinstance(members, list) or not 0 < len(members) <= MEMBERS_MAX:
        text = f"members must be a list of 1 to {MEMBERS_MAX}"
        raise ValueError(text)
    return Climatology(tuple(map(_member, members)))


def _member(document: Any) -> Member:
    if not isinstance(document, Mapping):
        text = f"a member has tspan and vspan: {document!r:.100}"
        raise ValueError(text)
    if document.get("zspan") is not None:
        text = "zspan: readings have no depth"
        raise ValueError(text)
    period = document.get("period")
    if period is not None and period not in PERIODS:
        text = f"period {period!r} is not one of {', '.join(PERIODS)}"
        raise ValueError(text)
    begin, end = _span("tspan", document.get("tspan"), number=period is not None)
    suspect = _span("vspan", document.get("vspan"))
    fail = (-inf, inf) if document.get("fspan") is None else _span("fspan", document["fspan"])
    return Member(period, begin, end, *suspect, *fail)


def _span(name: str, span: Any, *, number: bool = True) -> tuple[float, float]:
    values: list[float] = []
    if isinstance(span, Sequence) and not isinstance(span, str) and len(span) == 2:
        for one in span:
            try:
                value = float(one) if number else instant_us(one)
            except (TypeError, ValueError):
                value = None
            if value is not None and value == value:
                values.append(value)
    if len(values) != 2:
        text = f"{name} must be two {'numbers' if number else 'instants'}, not {span!r:.100}"
        raise ValueError(text)
    return min(values), max(values)
