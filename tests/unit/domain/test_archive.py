"""Ranges, paths and days of the archive's files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.archive import AHEAD_MAX_MS, Segment, day_of, ends_day, first_day, named

DAY_MS = 86_400_000
NOW_MS = 1_764_547_200_000  # 2025-12-01T00:00:00Z


def segment(**other: object) -> Segment:
    fields: dict[str, object] = {
        "topic": "iot_raw_data", "epoch": 0, "partition": 3, "first": 5, "next": 9, "day": "2025-12-01", "records": 4,
        "value_bytes": 10, "file_bytes": 20, "sha256": "ab" * 32, "min_time_ms": 1, "max_time_ms": 2,
    }  # fmt: skip
    return Segment(**{**fields, **other})  # type: ignore[arg-type]


@given(
    topic=st.from_regex(r"[A-Za-z0-9._-]{1,60}", fullmatch=True),
    epoch=st.integers(0, 1_000_000),
    partition=st.integers(0, 2**31 - 1),
    first=st.integers(0, 2**63 - 2),
    length=st.integers(1, 10**9),
    digest=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
)
def test_a_path_says_what_the_segment_says(
    topic: str, epoch: int, partition: int, first: int, length: int, digest: str
) -> None:
    one = segment(topic=topic, epoch=epoch, partition=partition, first=first, next=first + length, sha256=digest)
    found = named(one.path)
    assert found is not None
    assert (found.topic, found.epoch, found.partition, found.first, found.next, found.day) == (
        topic, epoch, partition, first, first + length, one.day,
    )  # fmt: skip
    assert digest.startswith(found.hash)
    assert Segment.of(one.document()) == one


@pytest.mark.parametrize(
    "path",
    [
        "",
        "notes.parquet",
        segment().path + ".part",
        segment().path.replace("2025-12-01", "2025-02-30"),
        segment().path.replace("partition=3", "partition=three"),
        segment(first=9, next=9).path,
        "../" + segment().path,
        segment().path.replace(".parquet", ".PARQUET"),
    ],
)
def test_what_is_not_ours_is_not_taken_for_it(path: str) -> None:
    assert named(path) is None


def test_paths_of_one_day_sort_by_offset() -> None:
    paths = [segment(first=n, next=n + 1).path for n in (2, 10, 9_999_999_999)]
    assert sorted(paths) == paths


@pytest.mark.parametrize(
    ("time_ms", "day"),
    [(0, "1970-01-01"), (-1, "1970-01-01"), (NOW_MS - 1, "2025-11-30"), (NOW_MS, "2025-12-01"), (2**62, "9999-12-31")],
)
def test_every_time_has_a_day(time_ms: int, day: str) -> None:
    assert day_of(time_ms) == day


def test_days_do_not_go_back_and_a_clock_ahead_does_not_take_them_along() -> None:
    today = day_of(NOW_MS)
    assert first_day(NOW_MS - 5 * DAY_MS, None, NOW_MS) == "2025-11-26"
    assert first_day(NOW_MS - 5 * DAY_MS, today, NOW_MS) == today
    assert first_day(NOW_MS + 400 * DAY_MS, None, NOW_MS) == today
    assert not ends_day(NOW_MS - DAY_MS, today, NOW_MS)
    assert not ends_day(NOW_MS + DAY_MS - 1, today, NOW_MS + DAY_MS)
    assert ends_day(NOW_MS + DAY_MS, today, NOW_MS + DAY_MS)
    # A stray of next year ends nothing.
    assert not ends_day(NOW_MS + 400 * DAY_MS, today, NOW_MS)
    assert ends_day(NOW_MS + AHEAD_MAX_MS, "2025-11-30", NOW_MS)
