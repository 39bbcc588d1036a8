"""Alarms as control rooms know them: the state machine of ISA-18.2 / IEC 62682.

The machine is the literal table `TRANSITIONS`, every state × every event, and `step`. Names are those of ISA-18.2
(figure "alarm state transition diagram", states A to I); docs/reference/alarm_states.md is generated from the table
(`python -m preservarium.domain.alarms.machine`) and a test holds both equal.

There is one alarm for each (device, rule, pin). Each time that it leaves normal it has an *occurrence*, with an id of
its own made of (device, rule, pin, occurred_at, generation); each transition of the occurrence has an id made of that
and a sequence number. So a crash or a replay sends the same ids again and never doubles an alarm.

Three instants, µs since the epoch, UTC: `occurred_at` and `cleared_at` are event time, the readings' own, at the end of
the rule's delay; `detected_at` is when the message that brought the evidence was received. Nothing depends on the
clock of the worker: live and replay tell the same story.

While shelved, suppressed or out of service, the process is watched on in silence; whoever lifts that gets a new
annunciation if the condition is true then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, NamedTuple

from preservarium.domain.readings.lineage import Coordinates, alarm_id, transition_id
from preservarium.domain.state_pictures import StatePage


class State(StrEnum):
    """Where an alarm stands; the letter is that of ISA-18.2."""

    NORMAL = "normal"  #: A
    UNACKNOWLEDGED = "unacknowledged"  #: B: the condition is true, nobody has answered
    ACKNOWLEDGED = "acknowledged"  #: C: the condition is true, an operator knows
    RETURNED_UNACKNOWLEDGED = "returned_unacknowledged"  #: D: over, but nobody has answered
    LATCHED_UNACKNOWLEDGED = "latched_unacknowledged"  #: E: over, nobody has answered, needs a reset
    LATCHED = "latched"  #: F: over and acknowledged, needs a reset
    SHELVED = "shelved"  #: G: an operator set it aside, for a time
    SUPPRESSED = "suppressed"  #: H: suppressed by design
    OUT_OF_SERVICE = "out_of_service"  #: I: taken out for maintenance


class Event(StrEnum):
    """What happens to an alarm."""

    RAISE = "raise"  #: the condition became true
    RETURN = "return"  #: it is no longer true
    RETURN_AUTO = "return_auto"  #: the same, of a rule that asks for no acknowledgement
    RETURN_LATCHING = "return_latching"  #: the same, of a latching rule
    RAISE_SEVERITY = "raise_severity"  #: the condition is true and became graver: whoever acknowledged is asked again
    LOWER_SEVERITY = "lower_severity"  #: it is true still and less grave
    ACKNOWLEDGE = "acknowledge"
    CLEAR = "clear"  #: an operator resets a latched alarm
    SHELVE = "shelve"
    UNSHELVE = "unshelve"  #: by an operator, or because the time is over
    SUPPRESS = "suppress"
    UNSUPPRESS = "unsuppress"
    REMOVE = "remove"  #: out of service
    RESTORE = "restore"  #: back into service
    COMMENT = "comment"
    WITHDRAW = "withdraw"  #: nothing watches the alarm any more (gone.py)


class Refusal(StrEnum):
    """Why an event is refused in a state; the text is for people."""

    NOT_RAISED = "the alarm is normal"
    ALREADY_RAISED = "the alarm is raised already"
    ALREADY_RETURNED = "the condition has returned to normal already"
    STILL_RAISED = "the condition is still true"
    NOT_ACKNOWLEDGED = "the alarm must be acknowledged first"
    ALREADY_ACKNOWLEDGED = "the alarm is acknowledged already"
    NOT_SHELVED = "the alarm is not shelved"
    IS_SHELVED = "the alarm is shelved"
    NOT_SUPPRESSED = "the alarm is not suppressed"
    IS_SUPPRESSED = "the alarm is suppressed by design"
    IN_SERVICE = "the alarm is in service"
    IS_OUT_OF_SERVICE = "the alarm is out of service"
    UNKNOWN_ALARM = "no such rule watches the device"
    OTHER_OCCURRENCE = "the occurrence is over, or another one has taken its place"
    TOO_MANY_ALARMS = "the device has as many alarms as it may have"


_S, _E, _R = State, Event, Refusal

# fmt: off
TRANSITIONS: Final[Mapping[State, Mapping[Event, State | Refusal]]] = {
    _S.NORMAL: {
        _E.RAISE:           _S.UNACKNOWLEDGED,
        _E.RETURN:          _R.NOT_RAISED,
        _E.RETURN_AUTO:     _R.NOT_RAISED,
        _E.RETURN_LATCHING: _R.NOT_RAISED,
        _E.RAISE_SEVERITY:  _R.NOT_RAISED,
        _E.LOWER_SEVERITY:  _R.NOT_RAISED,
        _E.ACKNOWLEDGE:     _R.NOT_RAISED,
        _E.CLEAR:           _R.NOT_RAISED,
        _E.SHELVE:          _S.SHELVED,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _S.SUPPRESSED,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _R.NOT_RAISED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.UNACKNOWLEDGED: {
        _E.RAISE:           _R.ALREADY_RAISED,
        _E.RETURN:          _S.RETURNED_UNACKNOWLEDGED,
        _E.RETURN_AUTO:     _S.NORMAL,
        _E.RETURN_LATCHING: _S.LATCHED_UNACKNOWLEDGED,
        _E.RAISE_SEVERITY:  _S.UNACKNOWLEDGED,
        _E.LOWER_SEVERITY:  _S.UNACKNOWLEDGED,
        _E.ACKNOWLEDGE:     _S.ACKNOWLEDGED,
        _E.CLEAR:           _R.STILL_RAISED,
        _E.SHELVE:          _S.SHELVED,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _S.SUPPRESSED,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _S.UNACKNOWLEDGED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.ACKNOWLEDGED: {
        _E.RAISE:           _R.ALREADY_RAISED,
        _E.RETURN:          _S.NORMAL,
        _E.RETURN_AUTO:     _S.NORMAL,
        _E.RETURN_LATCHING: _S.LATCHED,
        _E.RAISE_SEVERITY:  _S.UNACKNOWLEDGED,
        _E.LOWER_SEVERITY:  _S.ACKNOWLEDGED,
        _E.ACKNOWLEDGE:     _R.ALREADY_ACKNOWLEDGED,
        _E.CLEAR:           _R.STILL_RAISED,
        _E.SHELVE:          _S.SHELVED,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _S.SUPPRESSED,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _S.ACKNOWLEDGED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.RETURNED_UNACKNOWLEDGED: {
        _E.RAISE:           _S.UNACKNOWLEDGED,
        _E.RETURN:          _R.ALREADY_RETURNED,
        _E.RETURN_AUTO:     _R.ALREADY_RETURNED,
        _E.RETURN_LATCHING: _R.ALREADY_RETURNED,
        _E.RAISE_SEVERITY:  _R.ALREADY_RETURNED,
        _E.LOWER_SEVERITY:  _R.ALREADY_RETURNED,
        _E.ACKNOWLEDGE:     _S.NORMAL,
        _E.CLEAR:           _R.NOT_ACKNOWLEDGED,
        _E.SHELVE:          _S.SHELVED,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _S.SUPPRESSED,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _S.RETURNED_UNACKNOWLEDGED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.LATCHED_UNACKNOWLEDGED: {
        _E.RAISE:           _S.UNACKNOWLEDGED,
        _E.RETURN:          _R.ALREADY_RETURNED,
        _E.RETURN_AUTO:     _R.ALREADY_RETURNED,
        _E.RETURN_LATCHING: _R.ALREADY_RETURNED,
        _E.RAISE_SEVERITY:  _R.ALREADY_RETURNED,
        _E.LOWER_SEVERITY:  _R.ALREADY_RETURNED,
        _E.ACKNOWLEDGE:     _S.LATCHED,
        _E.CLEAR:           _R.NOT_ACKNOWLEDGED,
        _E.SHELVE:          _S.SHELVED,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _S.SUPPRESSED,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _S.LATCHED_UNACKNOWLEDGED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.LATCHED: {
        _E.RAISE:           _S.UNACKNOWLEDGED,
        _E.RETURN:          _R.ALREADY_RETURNED,
        _E.RETURN_AUTO:     _R.ALREADY_RETURNED,
        _E.RETURN_LATCHING: _R.ALREADY_RETURNED,
        _E.RAISE_SEVERITY:  _R.ALREADY_RETURNED,
        _E.LOWER_SEVERITY:  _R.ALREADY_RETURNED,
        _E.ACKNOWLEDGE:     _R.ALREADY_ACKNOWLEDGED,
        _E.CLEAR:           _S.NORMAL,
        _E.SHELVE:          _S.SHELVED,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _S.SUPPRESSED,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _S.LATCHED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.SHELVED: {
        _E.RAISE:           _S.SHELVED,
        _E.RETURN:          _S.SHELVED,
        _E.RETURN_AUTO:     _S.SHELVED,
        _E.RETURN_LATCHING: _S.SHELVED,
        _E.RAISE_SEVERITY:  _S.SHELVED,
        _E.LOWER_SEVERITY:  _S.SHELVED,
        _E.ACKNOWLEDGE:     _R.IS_SHELVED,
        _E.CLEAR:           _R.IS_SHELVED,
        _E.SHELVE:          _S.SHELVED,
        _E.UNSHELVE:        _S.NORMAL,
        _E.SUPPRESS:        _S.SUPPRESSED,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _S.SHELVED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.SUPPRESSED: {
        _E.RAISE:           _S.SUPPRESSED,
        _E.RETURN:          _S.SUPPRESSED,
        _E.RETURN_AUTO:     _S.SUPPRESSED,
        _E.RETURN_LATCHING: _S.SUPPRESSED,
        _E.RAISE_SEVERITY:  _S.SUPPRESSED,
        _E.LOWER_SEVERITY:  _S.SUPPRESSED,
        _E.ACKNOWLEDGE:     _R.IS_SUPPRESSED,
        _E.CLEAR:           _R.IS_SUPPRESSED,
        _E.SHELVE:          _R.IS_SUPPRESSED,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _R.IS_SUPPRESSED,
        _E.UNSUPPRESS:      _S.NORMAL,
        _E.REMOVE:          _S.OUT_OF_SERVICE,
        _E.RESTORE:         _R.IN_SERVICE,
        _E.COMMENT:         _S.SUPPRESSED,
        _E.WITHDRAW:        _S.NORMAL,
    },
    _S.OUT_OF_SERVICE: {
        _E.RAISE:           _S.OUT_OF_SERVICE,
        _E.RETURN:          _S.OUT_OF_SERVICE,
        _E.RETURN_AUTO:     _S.OUT_OF_SERVICE,
        _E.RETURN_LATCHING: _S.OUT_OF_SERVICE,
        _E.RAISE_SEVERITY:  _S.OUT_OF_SERVICE,
        _E.LOWER_SEVERITY:  _S.OUT_OF_SERVICE,
        _E.ACKNOWLEDGE:     _R.IS_OUT_OF_SERVICE,
        _E.CLEAR:           _R.IS_OUT_OF_SERVICE,
        _E.SHELVE:          _R.IS_OUT_OF_SERVICE,
        _E.UNSHELVE:        _R.NOT_SHELVED,
        _E.SUPPRESS:        _R.IS_OUT_OF_SERVICE,
        _E.UNSUPPRESS:      _R.NOT_SUPPRESSED,
        _E.REMOVE:          _R.IS_OUT_OF_SERVICE,
        _E.RESTORE:         _S.NORMAL,
        _E.COMMENT:         _S.OUT_OF_SERVICE,
        _E.WITHDRAW:        _S.NORMAL,
    },
}
# fmt: on

#: Event -> the transition's name in `iot_alerts` and in `alarm_events`.
TRANSITION_NAMES: Final[Mapping[Event, str]] = {
    Event.RAISE: "raised",
    Event.RETURN: "cleared",
    Event.RETURN_AUTO: "cleared",
    Event.RETURN_LATCHING: "cleared",
    Event.RAISE_SEVERITY: "severity_raised",
    Event.LOWER_SEVERITY: "severity_lowered",
    Event.ACKNOWLEDGE: "acknowledged",
    Event.CLEAR: "reset",
    Event.SHELVE: "shelved",
    Event.UNSHELVE: "unshelved",
    Event.SUPPRESS: "suppressed",
    Event.UNSUPPRESS: "unsuppressed",
    Event.REMOVE: "out_of_service",
    Event.RESTORE: "returned_to_service",
    Event.COMMENT: "commented",
    Event.WITHDRAW: "withdrawn",
}
#: A new occurrence took the place of one that had returned and still waited for an acknowledgement or a reset.
SUPERSEDED: Final = "superseded"

#: What becomes of an event whose alarm is not watched any more. It cannot be raised again, so what would let it be annunciated
#: ends it, and so does a reset, since nothing says that its condition is over. Whatever else people do is done, until the
#: process ends it.
UNWATCHED: Final[Mapping[Event, Event]] = {
    Event.CLEAR: Event.WITHDRAW,
    Event.UNSHELVE: Event.WITHDRAW,
    Event.UNSUPPRESS: Event.WITHDRAW,
    Event.RESTORE: Event.WITHDRAW,
}

RETURNS: Final = frozenset({Event.RETURN, Event.RETURN_AUTO, Event.RETURN_LATCHING})
SEVERITY_CHANGES: Final = frozenset({Event.RAISE_SEVERITY, Event.LOWER_SEVERITY})
#: States in which the condition is watched and not annunciated.
SILENT: Final = frozenset({State.SHELVED, State.SUPPRESSED, State.OUT_OF_SERVICE})
_LIFTS: Final = frozenset({Event.UNSHELVE, Event.UNSUPPRESS, Event.RESTORE})


@dataclass(frozen=True, slots=True)
class Point:
    """Which alarm: a rule on a pin of a device, in a generation."""

    device_id: str
    rule: str
    pin_position: str
    generation: int


@dataclass(frozen=True, slots=True)
class Alarm:
    """An alarm's state. Instants are µs since the epoch, UTC."""

    state: State = State.NORMAL
    active: bool = False  #: the condition, also while it is not annunciated
    active_at: int | None = None  #: event time of the condition's last change
    alarm_id: str = ""  #: the occurrence; "" while there is none
    sequence: int = 0  #: transitions of the occurrence so far
    occurred_at: int = 0  #: event time
    severity: str = ""  #: as it stands; of a rule with levels it changes while the alarm is raised
    message: str = ""  #: for people, as it was when it was raised, or raised to a graver severity
    cleared_at: int | None = None  #: event time
    value: float | None = None  #: of the reading that changed the condition last
    raw: Coordinates | None = None  #: of the message that held it
    shelved_until: int | None = None  #: then it comes back by itself
    one_shot: bool = False  #: shelved until the condition returns to normal
    first_out: bool = False  #: the occurrence was raised first in its group


@dataclass(frozen=True, slots=True)
class Occasion:
    """When and by what an event comes."""

    at: int  #: event time for what the process does, the operator's time for actions; µs
    detected_at: int  #: reception of the message that brings the evidence, or the operator's time; µs
    severity: str = ""  #: of the rule
    message: str = ""  #: of the rule, filled in
    value: float | None = None
    raw: Coordinates | None = None
    until: int | None = None  #: for SHELVE
    one_shot: bool = False  #: for SHELVE
    first_out: bool = False  #: for RAISE


class Transition(NamedTuple):
    """A transition of an occurrence, and the alarm as it stands after it."""

    name: str
    alarm: Alarm

    @property
    def id(self) -> str:
        """Deterministic id."""
        return transition_id(self.alarm.alarm_id, self.name, self.alarm.sequence)


class Step(NamedTuple):
    """What an event did."""

    alarm: Alarm
    transitions: tuple[Transition, ...]  #: of occurrences only: what is done to a normal alarm is state, not history
    refusal: Refusal | None = None  #: then nothing changed


NEW: Final = Alarm()


def step(point: Point, alarm: Alarm, event: Event, now: Occasion) -> Step:
    """Apply one event.

    Args:
        point: which alarm; part of the ids.
        alarm: as it stands.
        event: what happens.
        now: when, and by what.

    Returns:
        The alarm after it and its transitions in order; or the same alarm and why the event is refused.
    """
    target = TRANSITIONS[alarm.state][event]
    if isinstance(target, Refusal):
        return Step(alarm, (), target)
    if event is Event.RAISE or event in RETURNS:
        alarm = replace(alarm, active=event is Event.RAISE, active_at=now.at, value=now.value, raw=now.raw or alarm.raw)
    if event is Event.RAISE:
        if target in SILENT:
            return Step(alarm, ())
        return _raise(point, alarm, now.at, now)
    if event in SEVERITY_CHANGES:
        return _change_severity(alarm, target, event, now)
    transitions: list[Transition] = []
    changes: dict[str, Any] = {"state": target}
    if (event in RETURNS or event is Event.WITHDRAW) and alarm.alarm_id and alarm.cleared_at is None:
        changes["cleared_at"] = now.at
    if event is Event.SHELVE:
        changes["shelved_until"], changes["one_shot"] = now.until, now.one_shot
    elif target is not State.SHELVED:
        changes["shelved_until"], changes["one_shot"] = None, False
    # An occurrence that returned while it was not annunciated is cleared once; a second return is of no occurrence.
    tells = bool(alarm.alarm_id) and not (event in RETURNS and alarm.cleared_at is not None)
    alarm = replace(alarm, sequence=alarm.sequence + tells, **changes)
    if tells:
        transitions.append(Transition(TRANSITION_NAMES[event], alarm))
    if target is State.SHELVED and alarm.one_shot and event in RETURNS:
        lifted = step(point, alarm, Event.UNSHELVE, now)
        return Step(lifted.alarm, (*transitions, *lifted.transitions))
    if event in _LIFTS and alarm.active:
        raised = _raise(point, alarm, alarm.active_at or now.at, now)
        return Step(raised.alarm, (*transitions, *raised.transitions))
    if target is State.NORMAL:
        alarm = NEW  # nothing of an occurrence that is over is kept
    return Step(alarm, tuple(transitions))


def _raise(point: Point, alarm: Alarm, occurred_at: int, now: Occasion) -> Step:
    """Annunciate: a new occurrence, or the one that stands where its condition never returned."""
    transitions: tuple[Transition, ...] = ()
    if alarm.alarm_id and alarm.cleared_at is None:
        severity = now.severity or alarm.severity  # it may have changed while nobody was told
        alarm = replace(alarm, state=State.UNACKNOWLEDGED, severity=severity, sequence=alarm.sequence + 1)
    else:
        if alarm.alarm_id and alarm.state is not State.NORMAL:
            over = replace(alarm, state=State.NORMAL, active=False, sequence=alarm.sequence + 1)
            transitions = (Transition(SUPERSEDED, over),)
        alarm = replace(
            alarm,
            state=State.UNACKNOWLEDGED,
            alarm_id=alarm_id(point.device_id, point.rule, point.pin_position, occurred_at, point.generation),
            sequence=1,
            occurred_at=occurred_at,
            severity=now.severity,
            message=now.message,
            cleared_at=None,
            first_out=now.first_out,
        )
    return Step(alarm, (*transitions, Transition(TRANSITION_NAMES[Event.RAISE], alarm)))


def _change_severity(alarm: Alarm, target: State, event: Event, now: Occasion) -> Step:
    """The occurrence goes on, graver or less grave. While it is not annunciated, lifting tells the severity of then."""
    if target in SILENT:
        return Step(alarm, ())
    message = now.message if event is Event.RAISE_SEVERITY else alarm.message
    alarm = replace(
        alarm,
        state=target,
        severity=now.severity,
        message=message,
        value=now.value,
        raw=now.raw or alarm.raw,
        sequence=alarm.sequence + 1,
    )
    return Step(alarm, (Transition(TRANSITION_NAMES[event], alarm),))


# --- the picture -----------------------------------------------------------------------------------------------------

#: docs/reference/alarm_states.md. The withdrawal leads to normal from everywhere, and what changes nothing would only hide the rest.
PAGE: Final = StatePage(
    title="Alarm states",
    module="preservarium.domain.alarms.machine",
    introduction=(
        "The states are those of ISA-18.2 / IEC 62682. `withdraw` (the device or the rule is gone, or the",
        "rule watches another series now: `preservarium/domain/alarms/gone.py`) leads to normal from every state,",
        "and events that leave the state as it is are not drawn. When shelving, suppression or out of service ends and the",
        "condition is true, the alarm is raised at once: the step goes through normal to unacknowledged.",
    ),
    machine=TRANSITIONS,
    refusals=Refusal,
    begin=State.NORMAL,
    drawn=lambda state, event, target: event is not Event.WITHDRAW and target is not state,
)

if __name__ == "__main__":
    print(PAGE.text(), end="")
