"""Hours in local time, across both changes of the clock: schedules, quiet hours and digests against a walk over UTC minutes."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from preservarium.domain.alarms.schedule import compile_calendar
from preservarium.domain.local_time import DAYS, Hours, changes, spans
from preservarium.domain.notices import Policy

S = 1_000_000
MINUTE = 60 * S
BERLIN = ZoneInfo("Europe/Berlin")
#: Zones and an instant near which their clocks change: by an hour, by half an hour, at midnight, by a whole day.
CHANGES = [
    ("Europe/Berlin", "2026-10-25T01:00Z"),
    ("Europe/Berlin", "2027-03-28T01:00Z"),
    ("America/New_York", "2026-11-01T06:00Z"),
    ("Australia/Lord_Howe", "2026-04-04T15:00Z"),
    ("Australia/Lord_Howe", "2026-10-03T15:30Z"),
    ("America/Asuncion", "2024-03-24T03:00Z"),  # Sunday's midnight is Saturday, 23:00
    ("America/Havana", "2026-03-08T05:00Z"),  # no midnight
    ("America/St_Johns", "2010-11-07T02:31Z"),  # one minute of Sunday, and Saturday again
    ("Pacific/Apia", "2011-12-30T10:00Z"),  # no 30th of December
    ("Asia/Kolkata", "2026-10-25T01:00Z"),  # none
]


def us(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * S


def at(zone: ZoneInfo, instant_us: int) -> datetime:
    return datetime.fromtimestamp(instant_us // S, zone)


def shows(zone: ZoneInfo, instant_us: int, hours: Hours) -> bool:
    """The oracle: what a person with a clock on the wall and a calendar would say."""
    clock = at(zone, instant_us).replace(tzinfo=None)
    for back in (0, 1):
        midnight = datetime(clock.year, clock.month, clock.day) - timedelta(days=back)
        minutes = (clock - midnight) // timedelta(minutes=1)
        if midnight.weekday() in hours.days and hours.since <= minutes < hours.end:
            return True
    return False


def schedule(zone: str, *hours: Hours) -> dict[str, Any]:
    def text(minute: int) -> str:
        return f"{minute // 60:02}:{minute % 60:02}"

    return {
        "time_zone": zone,
        "hours": [
            {"from": text(h.since), "to": text(h.until), "days": [DAYS[d] for d in sorted(h.days)]} for h in hours
        ],
    }


_hours = st.builds(
    Hours,
    # Near the changes, where it matters, and anywhere.
    st.one_of(st.integers(0, 240), st.integers(0, 1439)),
    st.one_of(st.integers(0, 240), st.integers(0, 1439)),
    st.one_of(st.just(frozenset(range(7))), st.frozensets(st.integers(0, 6), min_size=1)),
).filter(lambda hours: hours.since != hours.until)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.sampled_from(CHANGES), st.lists(_hours, min_size=1, max_size=3), st.integers(-1_500, 1_500))
@example(CHANGES[0], [Hours(135, 165)], 0)
@example(CHANGES[1], [Hours(135, 165)], 0)
@example(CHANGES[1], [Hours(90, 150), Hours(150, 240)], 0)
def test_schedules_and_quiet_hours_are_those_of_the_clock_on_the_wall(
    change: tuple[str, str], hours: list[Hours], shift: int
):
    name, instant = change
    zone, begin = ZoneInfo(name), us(instant) + (shift - 800) * MINUTE
    expected = [any(shows(zone, begin + n * MINUTE, one) for one in hours) for n in range(1_600)]
    policy = Policy(quiet=tuple(hours), zone=zone)
    assert [policy.is_quiet(begin + n * MINUTE) for n in range(1_600)] == expected
    try:
        calendar = compile_calendar(schedule(name, *hours))
    except ValueError:
        return  # the whole week, or midnight to midnight said in another way
    assert calendar is not None
    assert [calendar.span(begin + n * MINUTE)[0] for n in range(1_600)] == expected
    # A span says the same for all of it, and is not cut in two where nothing changes.
    inside, end = calendar.span(begin)
    assert inside is expected[0]
    if end < begin + 1_600 * MINUTE:
        assert expected[: (end - begin) // MINUTE] == [inside] * ((end - begin) // MINUTE)
        assert expected[(end - begin) // MINUTE] is not inside


@pytest.mark.parametrize(("zone", "instant"), CHANGES[:-1])
def test_the_change_of_a_clock_is_found_to_the_microsecond(zone: str, instant: str):
    found = changes(ZoneInfo(zone), us(instant) - 86_400 * S, us(instant) + 86_400 * S)
    assert found == [us(instant)]
    assert changes(ZoneInfo(zone), us(instant), us(instant) + 86_400 * S) == []


def test_both_passes_through_an_hour_are_watched():
    calendar = compile_calendar(schedule("Europe/Berlin", Hours(135, 165)))
    assert calendar is not None
    first = us("2026-10-25T00:15Z"), us("2026-10-25T00:45Z")
    second = us("2026-10-25T01:15Z"), us("2026-10-25T01:45Z")
    assert spans([Hours(135, 165)], BERLIN, us("2026-10-25T00:00Z"), us("2026-10-25T03:00Z")) == [first, second]
    assert calendar.span(us("2026-10-25T00:20Z")) == (True, first[1])
    assert calendar.span(us("2026-10-25T00:50Z")) == (False, second[0])
    assert calendar.span(us("2026-10-25T01:20Z")) == (True, second[1])
    # A wait that begins in the first pass and is not over in it starts anew with the second.
    assert calendar.deadline(us("2026-10-25T00:40Z"), 600 * S) == us("2026-10-25T01:25Z")


@pytest.mark.parametrize(
    ("hours", "expected"),
    [
        (Hours(135, 165), []),  # the clock never shows it
        (Hours(90, 150), [("2027-03-28T00:30Z", "2027-03-28T01:00Z")]),
        (Hours(150, 240), [("2027-03-28T01:00Z", "2027-03-28T02:00Z")]),
        (Hours(60, 240), [("2027-03-28T00:00Z", "2027-03-28T02:00Z")]),
        (Hours(1380, 150, frozenset({5})), [("2027-03-27T22:00Z", "2027-03-28T01:00Z")]),
    ],
)
def test_what_the_clock_skips_does_not_come(hours: Hours, expected: list[tuple[str, str]]):
    found = spans([hours], BERLIN, us("2027-03-27T12:00Z"), us("2027-03-28T12:00Z"))
    assert found == [(us(begin), us(end)) for begin, end in expected]


@pytest.mark.parametrize(("name", "instant"), CHANGES)
@pytest.mark.parametrize("minute", [0, 1, 30, 60, 110, 150, 180, 1_410])
def test_a_daily_digest_comes_once_a_day_whatever_the_clock_does(name: str, instant: str, minute: int):
    zone = ZoneInfo(name)
    policy = Policy(digest="day", digest_minute=minute, zone=zone)
    begin = us(instant) - 3 * 1440 * MINUTE
    walked = [begin + n * MINUTE for n in range(6 * 1440)]
    periods = [policy.period(one) for one in walked]
    # The oracle: the digest of a date is due when a clock has first shown its time, or a later one, of that date.
    due: set[datetime] = set()
    told = [0]
    for one in walked:
        clock = at(zone, one).replace(tzinfo=None) - timedelta(minutes=minute)
        date = datetime(clock.year, clock.month, clock.day)
        told.append(told[-1] + (not due or date > max(due)))
        due.add(date)
    beats = [a != b for a, b in pairwise(periods)]
    assert beats == [a != b for a, b in pairwise(told[1:])]
    assert periods == sorted(periods)


def test_an_hourly_digest_comes_with_each_hour_of_utc():
    policy = Policy(digest="hour", zone=BERLIN)
    begin = us("2026-10-25T00:00Z")
    assert [policy.period(begin + n * 1800 * S) - policy.period(begin) for n in range(6)] == [0, 0, 1, 1, 2, 2]
    assert begin == int(datetime(2026, 10, 25, tzinfo=UTC).timestamp()) * S
