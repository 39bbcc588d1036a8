"""Whether a worker's clock can be acted on."""

from typing import Any

import pytest
from structlog.testing import CapturingLogger

from preservarium import clock as clocks
from preservarium import metrics
from preservarium.clock import COMPARED_WITHIN_S, FIRST_WAIT_S, ClockCheck, ManualClock
from preservarium.console.health import judge


def compared(skew_max_s: float = 60.0, ahead_s: float = 0.0) -> tuple[ManualClock, ClockCheck]:
    clock = ManualClock()
    check = ClockCheck(clock, lambda: skew_max_s)
    right_us = clock.now_us()
    clock.jump(ahead_s)
    sent_s = clock.monotonic_s()
    clock.advance(0.2)
    check.compare(right_us + 100_000, sent_s)
    return clock, check


def test_a_clock_that_is_right_is_trusted():
    clock, check = compared()
    clock.advance(86_400)
    assert check.is_sound()
    assert check.skew_s == pytest.approx(0, abs=1e-3)
    assert check.problem == ""


@pytest.mark.parametrize("ahead_s", [3_600.0, -3_600.0, 20 * 86_400.0, 61.0])
def test_a_jump_is_seen_at_once_and_so_is_its_end(ahead_s: float, monkeypatch: pytest.MonkeyPatch):
    # Not structlog's own capture: whichever test set a level before would decide what is seen.
    logs = CapturingLogger()
    monkeypatch.setattr(clocks, "log", logs)
    clock, check = compared()
    clock.jump(ahead_s)
    assert not check.is_sound()
    assert not check.is_sound()
    assert metrics.CLOCK_SKEW_SECONDS._value.get() == pytest.approx(ahead_s)
    assert f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} Kafka's" in check.problem
    clock.jump(-ahead_s)
    assert check.is_sound()
    assert [(call.method_name, call.args) for call in logs.calls] == [
        ("error", ("clock_wrong",)),
        ("info", ("clock_right_again",)),
    ]


def test_a_clock_that_was_wrong_from_the_start_and_is_corrected_is_trusted():
    clock, check = compared(ahead_s=-7_200)
    assert not check.is_sound()
    clock.jump(7_200)
    assert check.is_sound()


def test_a_difference_below_the_bound_is_none_and_without_a_bound_none_counts():
    assert compared(ahead_s=59)[1].is_sound()
    assert compared(skew_max_s=0, ahead_s=1e6)[1].is_sound()


def test_before_anything_was_compared_a_worker_that_will_compare_waits_a_moment():
    clock = ManualClock()
    check = ClockCheck(clock, lambda: 60)
    assert check.is_sound()
    assert check.skew_s is None
    check.expect()
    assert not check.is_sound()
    assert check.problem == ""
    clock.advance(FIRST_WAIT_S)
    assert check.is_sound()


def test_a_comparison_that_took_long_is_none():
    clock = ManualClock()
    check = ClockCheck(clock, lambda: 60)
    sent_s = clock.monotonic_s()
    clock.advance(COMPARED_WITHIN_S + 1)
    check.compare(0, sent_s)
    assert check.skew_s is None


def test_a_worker_with_a_wrong_clock_is_not_ready_and_alive():
    report: dict[str, Any] = {
        "problems": [], "stages": {}, "recovering": False, "rebalancing": False, "assignment": ["t-0"],
        "topics": [], "kafka": {"state": "up", "detail": ""}, "clock": compared(ahead_s=3_600)[1].problem,
    }  # fmt: skip
    found = judge(report, [])
    assert found.alive
    assert not found.ready
    assert found.ready_reasons == [
        "this machine's clock is 3600 s ahead of Kafka's: nothing that time alone causes is done here"
    ]
