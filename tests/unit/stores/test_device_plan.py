"""What a curve is drawn from: never more points than were asked for, never from what does not reach back so far."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.stores.device_reads import DAY_US, US, levels, plan

NOW = 1_760_000_000 * US
HOUR, MINUTE = 3_600 * US, 60 * US


@pytest.mark.parametrize(
    ("span_us", "ago_us", "points", "level", "width_us"),
    [
        (HOUR, 0, 1_000, "raw", 3_600_000), (DAY_US, 0, 1_000, "1m", 2 * MINUTE), (7 * DAY_US, 0, 1_000, "1m", 11 * MINUTE),
        (30 * DAY_US, 0, 1_000, "1m", 44 * MINUTE), (60 * DAY_US, 0, 1_000, "1h", 2 * HOUR), (365 * DAY_US, 0, 1_000, "1h", 9 * HOUR),
        (5 * 365 * DAY_US, 0, 1_000, "1d", 2 * DAY_US), (5 * 365 * DAY_US, 0, 5_000, "1d", DAY_US),
        # What is not kept so fine any more is drawn from what is.
        (HOUR, 100 * DAY_US, 1_000, "1m", MINUTE), (HOUR, 200 * DAY_US, 1_000, "1h", HOUR), (DAY_US, 4 * 365 * DAY_US, 1_000, "1d", DAY_US),
    ],
)  # fmt: skip
def test_the_level_follows_the_span_and_how_long_it_is_kept(span_us, ago_us, points, level, width_us):
    found, width = plan(NOW - ago_us - span_us, NOW - ago_us, points, NOW, 90)
    assert (found.name, width) == (level, width_us)


@given(
    span_us=st.integers(1, 6 * 366 * DAY_US), ago_us=st.integers(-DAY_US, 6 * 366 * DAY_US), points=st.integers(10, 5_000), retention=st.integers(8, 4_000)
)  # fmt: skip
def test_bins_are_whole_buckets_and_no_more_than_points(span_us, ago_us, points, retention):
    begin = NOW - ago_us - span_us
    level, width = plan(begin, begin + span_us, points, NOW, retention)
    assert width > 0
    assert width * points >= span_us
    assert not level.width_us or width % level.width_us == 0
    assert not level.kept_us or begin >= NOW - level.kept_us
    # A coarser level that reaches back as far would have buckets wider than a point.
    for coarser in levels(retention):
        if coarser.width_us > level.width_us and (not coarser.kept_us or begin >= NOW - coarser.kept_us):
            assert coarser.width_us > -(-span_us // points)
