"""The alarm's state machine: total, documented, and what each step tells."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.alarms.machine import (
    NEW,
    RETURNS,
    SILENT,
    TRANSITION_NAMES,
    TRANSITIONS,
    Alarm,
    Event,
    Occasion,
    Point,
    Refusal,
    State,
    step,
)
from preservarium.domain.readings.lineage import Coordinates, alarm_id, transition_id

POINT = Point("dev-1", "too hot", "-1", 0)
T = 1_700_000_000_000_000
S = 1_000_000


def run(*events: Event, alarm: Alarm = NEW, start: int = T) -> tuple[Alarm, list[tuple[str, str, str]]]:
    """Apply events a second apart; every one must be legal. Gives (transition, state, occurrence) of each."""
    told: list[tuple[str, str, str]] = []
    for i, event in enumerate(events):
        at = start + i * S
        result = step(
            POINT, alarm, event, Occasion(at, at + S, "major", "hot", 21.5, Coordinates(0, i, 0), until=at + 3600 * S)
        )
        assert result.refusal is None, (event, alarm.state, result.refusal)
        alarm = result.alarm
        told += [(t.name, str(t.alarm.state), t.alarm.alarm_id) for t in result.transitions]
    return alarm, told


def reach(state: State) -> Alarm:
    """An alarm in `state`, by a legal way."""
    ways: dict[State, tuple[Event, ...]] = {
        State.NORMAL: (),
        State.UNACKNOWLEDGED: (Event.RAISE,),
        State.ACKNOWLEDGED: (Event.RAISE, Event.ACKNOWLEDGE),
        State.RETURNED_UNACKNOWLEDGED: (Event.RAISE, Event.RETURN),
        State.LATCHED_UNACKNOWLEDGED: (Event.RAISE, Event.RETURN_LATCHING),
        State.LATCHED: (Event.RAISE, Event.ACKNOWLEDGE, Event.RETURN_LATCHING),
        State.SHELVED: (Event.RAISE, Event.SHELVE),
        State.SUPPRESSED: (Event.RAISE, Event.SUPPRESS),
        State.OUT_OF_SERVICE: (Event.RAISE, Event.REMOVE),
    }
    alarm, _ = run(*ways[state])
    assert alarm.state is state
    return alarm


def test_the_table_covers_every_state_and_every_event():
    assert set(TRANSITIONS) == set(State)
    for row in TRANSITIONS.values():
        assert set(row) == set(Event)
    assert set(TRANSITION_NAMES) == set(Event)


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", list(Event))
def test_every_pair_either_changes_the_alarm_or_says_why_not(state: State, event: Event):
    alarm = reach(state)
    result = step(POINT, alarm, event, Occasion(T + 100 * S, T + 101 * S, "major", "hot", 1.0, None, until=T + 200 * S))
    target = TRANSITIONS[state][event]
    if isinstance(target, Refusal):
        assert result == (alarm, (), target)
    else:
        assert result.refusal is None
        lifted = event in (Event.UNSHELVE, Event.UNSUPPRESS, Event.RESTORE)
        # What is lifted while the condition is true is annunciated in the same step.
        assert result.alarm.state is (State.UNACKNOWLEDGED if lifted and alarm.active else target)


def test_every_state_is_reached_from_normal():
    assert {reach(s).state for s in State} == set(State)


def test_every_refusal_of_the_table_is_used():
    used = {t for row in TRANSITIONS.values() for t in row.values() if isinstance(t, Refusal)}
    assert set(Refusal) - used == {Refusal.UNKNOWN_ALARM, Refusal.OTHER_OCCURRENCE, Refusal.TOO_MANY_ALARMS}


def test_an_alarm_that_is_acknowledged_ends_with_its_condition():
    first = alarm_id("dev-1", "too hot", "-1", T, 0)
    alarm, told = run(Event.RAISE, Event.ACKNOWLEDGE, Event.RETURN)
    assert told == [
        ("raised", "unacknowledged", first),
        ("acknowledged", "acknowledged", first),
        ("cleared", "normal", first),
    ]
    assert alarm == NEW


def test_an_alarm_that_returns_waits_for_its_acknowledgement():
    alarm, told = run(Event.RAISE, Event.RETURN)
    assert alarm.state is State.RETURNED_UNACKNOWLEDGED
    assert alarm.cleared_at == T + S
    alarm, told = run(Event.ACKNOWLEDGE, alarm=alarm)
    assert [t[:2] for t in told] == [("acknowledged", "normal")]
    assert alarm == NEW


def test_a_new_excursion_takes_the_place_of_one_that_nobody_acknowledged():
    alarm, told = run(Event.RAISE, Event.RETURN, Event.RAISE)
    first = alarm_id("dev-1", "too hot", "-1", T, 0)
    second = alarm_id("dev-1", "too hot", "-1", T + 2 * S, 0)
    assert told[2:] == [("superseded", "normal", first), ("raised", "unacknowledged", second)]
    assert (alarm.alarm_id, alarm.sequence, alarm.cleared_at) == (second, 1, None)


def test_a_latched_alarm_stays_until_it_is_reset():
    alarm, told = run(Event.RAISE, Event.RETURN_LATCHING, Event.ACKNOWLEDGE)
    assert alarm.state is State.LATCHED
    alarm, told = run(Event.CLEAR, alarm=alarm)
    assert [t[:2] for t in told] == [("reset", "normal")]


def test_a_shelved_alarm_is_silent_and_comes_back_as_the_same_occurrence():
    alarm, told = run(Event.RAISE, Event.SHELVE, Event.UNSHELVE)
    assert [t[:2] for t in told] == [
        ("raised", "unacknowledged"),
        ("shelved", "shelved"),
        ("unshelved", "normal"),
        ("raised", "unacknowledged"),
    ]
    assert len({t[2] for t in told}) == 1
    assert alarm.sequence == 4


def test_what_happens_while_shelved_is_told_when_it_is_lifted():
    alarm, told = run(Event.RAISE, Event.SHELVE, Event.RETURN, Event.RAISE, Event.RETURN, Event.RAISE, Event.UNSHELVE)
    first = alarm_id("dev-1", "too hot", "-1", T, 0)
    last = alarm_id("dev-1", "too hot", "-1", T + 5 * S, 0)
    assert told == [
        ("raised", "unacknowledged", first),
        ("shelved", "shelved", first),
        ("cleared", "shelved", first),
        ("unshelved", "normal", first),
        ("raised", "unacknowledged", last),
    ]
    assert alarm.occurred_at == T + 5 * S


def test_the_first_return_while_shelved_is_the_one_that_counts():
    alarm, _ = run(Event.RAISE, Event.SHELVE, Event.RETURN, Event.RAISE, Event.RETURN)
    assert alarm.cleared_at == T + 2 * S


def test_a_one_shot_shelf_ends_with_the_condition():
    alarm, _ = run(Event.RAISE)
    shelved = step(POINT, alarm, Event.SHELVE, Occasion(T + S, T + S, until=T + 99 * S, one_shot=True)).alarm
    result = step(POINT, shelved, Event.RETURN, Occasion(T + 2 * S, T + 2 * S, "major", "hot", 1.0))
    assert [t.name for t in result.transitions] == ["cleared", "unshelved"]
    assert result.alarm == NEW


def test_shelving_a_normal_alarm_is_state_and_no_history():
    alarm, told = run(Event.SHELVE, Event.RAISE, Event.RETURN)
    assert told == []
    assert alarm.state is State.SHELVED


def test_a_withdrawn_rule_ends_its_alarm():
    _, told = run(Event.RAISE, Event.WITHDRAW)
    assert [t[:2] for t in told] == [("raised", "unacknowledged"), ("withdrawn", "normal")]


def test_ids_depend_on_nothing_but_the_occurrence():
    alarm = reach(State.UNACKNOWLEDGED)
    result = step(POINT, alarm, Event.ACKNOWLEDGE, Occasion(T + S, T + S))
    assert result.transitions[0].id == transition_id(alarm.alarm_id, "acknowledged", 2)


@given(st.lists(st.sampled_from(list(Event)), max_size=40))
def test_any_sequence_of_events_keeps_the_alarm_consistent(events: list[Event]):
    alarm = NEW
    seen: set[str] = set()
    sequences: dict[str, int] = {}
    for i, event in enumerate(events):
        at = T + i * S
        result = step(
            POINT, alarm, event, Occasion(at, at, "major", "hot", 1.0, None, until=at + S, one_shot=i % 2 == 0)
        )
        alarm = result.alarm
        for transition in result.transitions:
            assert transition.id not in seen
            seen.add(transition.id)
            # The transitions of one occurrence are numbered without a gap.
            occurrence = transition.alarm.alarm_id
            assert transition.alarm.sequence == sequences.get(occurrence, 0) + 1
            sequences[occurrence] = transition.alarm.sequence
        if result.refusal is None and (event is Event.RAISE or event in RETURNS):
            assert alarm.active == (event is Event.RAISE)
        if alarm.state is State.NORMAL:
            assert alarm.alarm_id == ""
        if alarm.state not in SILENT and alarm.state is not State.NORMAL:
            assert alarm.alarm_id
            assert (alarm.cleared_at is None) == (alarm.state in (State.UNACKNOWLEDGED, State.ACKNOWLEDGED))
        assert (alarm.shelved_until is not None) == (alarm.state is State.SHELVED)
