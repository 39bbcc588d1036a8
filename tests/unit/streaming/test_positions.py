"""Positions with gaps, and the ages by which a lane without progress is known."""

from typing import Any

import pytest
from record_fakes import Rec

from preservarium.errors import Fatal
from preservarium.streaming import positions
from preservarium.streaming.positions import Standing


class Told(Standing):
    """A lane that writes its gaps down."""

    def __init__(self, expected: int | None = None) -> None:
        super().__init__(3)
        self.start_at(expected)
        self.gaps: list[tuple[int, int, int]] = []

    def take(self, *offsets: int, after: int | None = None) -> list[int]:
        return [r.offset for r in self.take_on([Rec(o) for o in offsets], after, lambda *gap: self.gaps.append(gap))]

    def passes(self, offset: int) -> None:
        self.pass_to(offset, lambda *gap: self.gaps.append(gap))

    def ack(self, *offsets: int) -> None:
        self.acknowledge([Rec(o) for o in offsets], "t")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Now:
        s = 1_000.0

        def __call__(self) -> float:
            return self.s

    made = Now()
    monkeypatch.setattr(positions, "monotonic", made)
    return made


def test_a_marker_behind_the_last_record_is_done_with_it() -> None:
    lane = Told(0)
    assert lane.take(0, 1, after=3) == [0, 1]
    lane.ack(0)
    assert lane.position == 1, "not before"
    lane.ack(1)
    assert (lane.position, lane.expected) == (3, 3)
    assert lane.gaps == []


def test_a_marker_that_comes_alone_is_passed_and_one_behind_work_waits_for_it() -> None:
    lane = Told(5)
    lane.passes(6)
    assert (lane.position, lane.gaps) == (6, [(3, 5, 6)])
    lane.take(6, 7)
    lane.passes(9)
    assert lane.position == 6
    lane.ack(6, 7)
    assert lane.position == 9
    lane.passes(9)
    lane.passes(4)
    assert (lane.position, lane.expected, len(lane.gaps)) == (9, 9, 2)


def test_where_nothing_is_known_of_the_beginning_there_is_no_gap() -> None:
    lane = Told(None)
    lane.passes(40)
    assert (lane.position, lane.gaps) == (40, [])
    other = Told(None)
    assert other.take(7, 9) == [7, 9]
    assert other.gaps == []


def test_a_gap_before_records_is_told_once_and_what_is_known_is_dropped() -> None:
    lane = Told(2)
    lane.take(10, 11)
    assert lane.gaps == [(3, 2, 10)]
    assert lane.take(9, 10, 11) == []
    assert lane.take(11, 12) == [12]
    assert lane.gaps == [(3, 2, 10)]


def test_parts_of_a_batch_are_acknowledged_one_after_the_other() -> None:
    lane = Told(0)
    lane.take(*range(8), after=10)
    for part in ((0, 1), (2, 3), (4,), (5,), (6, 7)):
        lane.ack(*part)
    assert lane.position == 10
    with pytest.raises(Fatal, match="acknowledged 8 after 10 in t-3"):
        lane.ack(7)


def test_a_store_that_is_ahead_moves_the_lane_forward_and_never_back() -> None:
    lane = Told(0)
    lane.take(0, 1, 2)
    lane.move_to(2)
    assert (lane.position, lane.expected) == (2, 3)
    assert lane.since_s is not None
    lane.move_to(20)
    assert (lane.position, lane.expected, lane.since_s) == (20, 20, None)
    lane.move_to(7)
    assert (lane.position, lane.expected) == (20, 20)
    assert lane.take(3, 4, 19, 20, 21) == [20, 21], "what is fetched below it is the store's already"


def test_the_age_is_that_of_the_oldest_record_that_waits(now: Any) -> None:
    lane = Told(0)
    assert (lane.unacknowledged_age_s(now.s), lane.uncommitted_age_s(now.s)) == (0, 0)
    now.s += 600  # idle for minutes, and then one record
    lane.take(0)
    assert lane.unacknowledged_age_s(now.s) == 0
    now.s += 3
    lane.take(1, 2)
    assert lane.unacknowledged_age_s(now.s) == 3
    lane.ack(0)
    assert lane.unacknowledged_age_s(now.s) == 0, "the next one is the first since now"
    now.s += 2
    assert (lane.unacknowledged_age_s(now.s), lane.uncommitted_age_s(now.s)) == (2, 2)
    lane.note_commit(1)
    assert lane.uncommitted_age_s(now.s) == 0
    lane.ack(1, 2)
    assert lane.unacknowledged_age_s(now.s) == 0
    now.s += 5
    assert lane.uncommitted_age_s(now.s) == 5
    lane.note_commit(3)
    now.s += 5_000
    assert (lane.unacknowledged_age_s(now.s), lane.uncommitted_age_s(now.s)) == (0, 0)


def test_what_is_committed_beyond_the_position_is_not_committed_again() -> None:
    """A plan begins at a record; the position may stand before a gap below it."""
    lane = Told(0)
    lane.take(0, 1)
    lane.ack(0, 1)
    assert lane.uncommitted
    lane.note_commit(9)
    assert not lane.uncommitted
