"""A chattering alarm whose remedy is known: the search finds it, and the machine that runs live agrees."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.alarms.history import Playback
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.alarms.suggestion import DELAYS_S, SPARED, advise, deadbands

S = 1_000_000
T = 1_700_000_000 * S
RULE = {
    "name": "hot",
    "rev": 1,
    "component_type": "temperature",
    "kind": "high",
    "severity": "major",
    "threshold": 25.0,
}


def compiled(rule):
    device = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "rules": {"hot": {}}}
    found = compile_rules(device, None, {"hot": rule}.get, lambda _: None)
    if found.problems:
        raise ValueError(found.problems)
    return found


def messages(values):
    """A reading every ten seconds."""
    return [
        {
            "generation": 0, "raw_partition": 0, "raw_offset": n, "raw_index": 0, "timestamp": T + n * 10 * S, "received_at": T + n * 10 * S,
            "readings": [{"component_type": "temperature", "pin_position": "-1", "value": value, "quality": 1}],
        }
        for n, value in enumerate(values)
    ]  # fmt: skip


#: Noise of ±0.2 around the threshold, three readings above and three below, and two real excursions.
NERVOUS = (
    ([25.2] * 3 + [24.8] * 3) * 20
    + [30.0] * 60
    + [20.0] * 30
    + ([25.2] * 3 + [24.8] * 3) * 20
    + [31.0] * 60
    + [20.0] * 30
)


def test_the_known_remedies_are_found_and_do_what_they_say():
    played = messages(NERVOUS)
    to_us = T + len(NERVOUS) * 10 * S
    advice = advise(played, "d", RULE, compiled, to_us)
    assert not advice.calm
    assert advice.transitions == 84  # 40 noises and two excursions, each there and back
    by_parameter = {one.parameter: one for one in advice.suggestions}
    # Below 25 − 0.2 the noise never comes; off (and on) it stays for 20 s, so a delay of 20 s is over just then.
    assert {name: one.value for name, one in by_parameter.items()} == {
        "deadband": 0.3,
        "off_delay_s": 30,
        "on_delay_s": 30,
    }
    for parameter, one in by_parameter.items():
        assert one.spared >= SPARED
        playback = Playback("d", compiled({**RULE, parameter: one.value}))
        for message in played:
            playback.take(message)
        tallies = playback.close(to_us).tallies.values()
        assert sum(t.transitions for t in tallies) == one.transitions
        assert sum(t.active_us for t in tallies) == one.active_us
        # And the next smaller candidate does not spare enough.
        ladder = deadbands(11.0) if parameter == "deadband" else list(DELAYS_S)
        less = max(candidate for candidate in ladder if candidate < one.value)
        playback = Playback("d", compiled({**RULE, parameter: less}))
        for message in played:
            playback.take(message)
        assert sum(t.transitions for t in playback.close(to_us).tallies.values()) > advice.transitions * (1 - SPARED)


def test_a_calm_alarm_is_left_alone():
    advice = advise(messages([20, 30] * 5), "d", RULE, compiled, T + 100 * S)
    assert advice.calm
    assert advice.suggestions == []
    assert advice.tried == 0


def test_a_rule_that_cannot_have_a_parameter_is_not_offered_it():
    rule = {**RULE, "repeat": {"count": 2, "within_s": 60}}
    advice = advise(messages(NERVOUS), "d", rule, compiled, T + len(NERVOUS) * 10 * S)
    assert {one.parameter for one in advice.suggestions} == {"deadband", "off_delay_s"}


def test_a_process_that_truly_swings_is_not_silenced():
    # Every swing goes through the whole range: a dead-band that spares them is one that never lets the alarm end.
    values = ([30.0] * 40 + [10.0] * 40) * 15
    advice = advise(messages(values), "d", RULE, compiled, T + len(values) * 10 * S)
    assert "deadband" not in {one.parameter for one in advice.suggestions}
    # And a delay that outlasts every swing is one under which nothing is told.
    assert "on_delay_s" not in {one.parameter for one in advice.suggestions}


@given(st.floats(1e-6, 1e9))
def test_deadbands_are_few_ascending_and_within_the_scale(scale):
    found = deadbands(scale)
    assert found == sorted(set(found))
    assert 15 <= len(found) <= 20
    assert scale / 1000 <= found[0] * 1.01
    assert found[-1] <= scale * 1.01


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_no_range_no_deadband(scale):
    assert deadbands(scale) == []
