"""What a write says that the roll-ups must look at again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.readings.reading import TIMESTAMP_MIN_US
from preservarium.stores.timescale_rows import PREFIX, Bounds, marks_of

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
#: Two in the afternoon of some day.
NOW = TIMESTAMP_MIN_US + 9_000 * DAY + 14 * HOUR
BOUNDS = Bounds(
    oldest=NOW - 90 * DAY,
    newest=NOW + DAY,
    late=TIMESTAMP_MIN_US,
    current=NOW - 600_000_000,
    today=NOW // DAY * DAY,
)


def marks(rows: list[tuple[int, int]]):
    """Of rows as (series, timestamp)."""
    prefixes = [PREFIX.pack(4, series, 8) for series, _ in rows]
    return marks_of(prefixes, [at for _, at in rows], sorted(set(prefixes)), BOUNDS)


def covered(made, series: int, at: int) -> bool:
    """Whether a row is marked."""
    since = at - TIMESTAMP_MIN_US
    if any(begin <= since < end for begin, end in made.ranges):
        return True
    return (since // HOUR, series) in set(zip(made.hours, made.series, strict=True))


@given(
    st.sampled_from([NOW - 85 * DAY, NOW - 3 * HOUR, NOW - HOUR, NOW - 3 * MINUTE]).flatmap(
        lambda oldest: st.lists(
            st.tuples(
                st.integers(1, 40), st.integers(oldest, oldest + 86 * DAY - 1) | st.integers(oldest, oldest + 2 * HOUR)
            ),
            max_size=200,
        )
    )
)
def test_every_row_is_marked_and_no_other_hour_but_of_a_short_write(rows):
    made = marks(rows)
    assert all(covered(made, series, at) for series, at in rows)
    late = {((at - TIMESTAMP_MIN_US) // HOUR, series) for series, at in rows if at < BOUNDS.current}
    pairs = set(zip(made.hours, made.series, strict=True))
    last = min(max((at for _, at in rows), default=0), BOUNDS.current - 1)
    hours = range(min((hour for hour, _ in late), default=0), (last - TIMESTAMP_MIN_US) // HOUR + 1)
    if late and len(hours) <= 2:  # all series of a write of two hours
        assert pairs <= {(hour, series) for hour in hours for series, _ in rows}
    else:
        assert pairs == late
    assert (made.hours, len(made.ranges) <= 64) == (sorted(made.hours), True)
    # Hours and days may be marked whole; before what is current nothing is marked of all series.
    assert all(end + TIMESTAMP_MIN_US > BOUNDS.current for _, end in made.ranges)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(NOW - 40 * DAY, NOW)), min_size=1, max_size=300))
def test_the_rows_of_the_table_hold_each_pair_once(rows):
    made = marks([(series, at) for series, at in rows for series in range(series, series + 20)])
    numbers = [n for first, last, _ in made.slices for n in range(first, last + 1)]
    assert numbers == list(range(1, len(made.series) + 1))
    assert all(last - first < 1000 for first, last, _ in made.slices)
    today = (BOUNDS.today - TIMESTAMP_MIN_US) // HOUR
    for first, last, shown in made.slices:
        assert {hour >= today for hour in made.hours[first - 1 : last]} == {shown}


def test_what_comes_as_it_is_measured_marks_minutes_alone():
    made = marks([(series, NOW - series * 1000) for series in range(1, 5000)])
    assert made.slices == []
    assert [(end - begin) // MINUTE for begin, end in made.ranges] == [1]


@pytest.mark.parametrize("rows", [[], [(1, NOW)], [(1, NOW - DAY)]])
def test_of_few_rows(rows):
    made = marks(rows)
    assert len(made.ranges) + len(made.slices) == len(rows)
