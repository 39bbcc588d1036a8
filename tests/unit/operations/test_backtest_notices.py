"""Transitions of a back-test through the grouping that runs live, in their own time."""

from preservarium.domain.notices import Policy
from preservarium.operations.backtest_notices import Heard, kept, played

S = 1_000_000
T = 1_700_000_000 * S
DEVICE = {"device_id": "d", "rev": 1, "type": "t", "enabled": True}
RECIPIENT = {"name": "ops", "rev": 1, "channel": "mail", "address": "ops@example.com"}


def line(second: int, transition: str, device: str = "d", sequence: int = 1, escalation=()):
    raised = transition == "raised"
    return kept(
        {
            "alarm_id": f"{device}-a", "transition_id": f"{device}-{sequence}", "sequence": sequence, "device_id": device, "device_name": device,
            "rule": "hot", "component_type": "temperature", "pin_position": "-1", "severity": "major", "transition": transition,
            "state": "unacknowledged" if raised else "returned_unacknowledged", "occurred_at": T, "detected_at": T, "transition_at": T + second * S,
            "cleared_at": None if raised else T + second * S, "value": 1.0, "message": "hot", "recipients": ["ops"], "generation": 0,
        },
        {**DEVICE, "device_id": device},
        escalation,
    )  # fmt: skip


def count(*lines, seconds: int, **policy):
    heard = [Heard() for _ in range(2)]
    for number, one in enumerate(lines):
        heard[number % 2].add(one)
    return played(
        [one.packed() for one in heard], {"ops": RECIPIENT}.get, lambda _: Policy(**policy), (), T + seconds * S
    )


def test_what_comes_within_group_wait_is_one_notice():
    lines = [line(n, "raised", f"d{n}") for n in range(10)]
    assert count(*reversed(lines), seconds=600) == {"ops": {"alarms": 1}}


def test_what_stands_is_repeated_and_what_is_over_is_not():
    assert count(line(0, "raised"), seconds=3 * 14_400 + 60) == {"ops": {"alarms": 1, "repeat": 3}}
    assert count(line(0, "raised"), line(400, "cleared", sequence=2), seconds=50_000) == {"ops": {"alarms": 2}}


def test_nothing_is_planned_beyond_the_end():
    assert count(line(0, "raised"), seconds=10) == {"ops": {}}


def test_an_escalation_tells_another_one_later():
    lines = [line(0, "raised", escalation=[{"after_s": 900, "recipients": ["chief@example.com"]}])]
    assert count(*lines, seconds=600)["chief@example.com"] == {}
    assert count(*lines, seconds=1_000)["chief@example.com"] == {"alarms": 1}


def test_what_is_kept_takes_a_hundred_bytes_a_transition():
    heard = Heard()
    for number in range(5_000):
        heard.add(line(number, "raised", f"dev-{number}"))
    packed = heard.packed()
    assert len(packed) < 150 * heard.count
