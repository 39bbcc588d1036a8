"""What is told of alarms: the lines of `iot_alerts`, and of `alarm_standing`."""

from typing import NotRequired, TypedDict

from preservarium.domain.alarms.action import Action
from preservarium.domain.alarms.gone import Gone
from preservarium.domain.alarms.machine import Occasion, Point, State, Transition
from preservarium.domain.alarms.rule import DeviceRules, Rule, render


class TransitionDoc(TypedDict):
    """A line of `iot_alerts`. Instants are µs since the epoch, UTC."""

    alarm_id: str  #: the occurrence
    transition_id: str
    sequence: int  #: 1 for the occurrence's first transition, then one more each
    device_id: str
    device_name: str  #: for people
    rule: str
    rule_rev: int
    kind: str  #: of the rule; "" where the rule is gone
    group: str  #: the rule's suppression group; "" where it has none
    component_type: str
    pin_position: str
    severity: str
    transition: str  #: raised, cleared, acknowledged, …, superseded, withdrawn
    state: str  #: after the transition
    occurred_at: int
    detected_at: int  #: of this transition: reception of the message that brought it, or the operator's time
    cleared_at: int | None
    transition_at: int  #: of this transition in event time, or the operator's time
    value: float | None
    unit: str
    threshold: float | None
    message: str  #: for people, as it was when it was raised
    recipients: list[str]  #: names in the registry
    former: NotRequired[list[str]]  #: who was told of the occurrence before and is not named by the rule any more
    reason: NotRequired[
        str
    ]  #: of `withdrawn`: the code of `gone.Gone`; `comment` is its text, unless an operator wrote one
    actor: str | None  #: who, where an operator did it
    comment: str | None
    raw_partition: int | None  #: the message that brought the evidence
    raw_offset: int | None
    raw_index: int | None
    first_out: bool  #: raised first in its group
    chattering: bool  #: raised again and again lately
    generation: int


class StandingDoc(TransitionDoc):
    """Value of `alarm_standing`: an alarm that is not normal, with what was done to it last.

    `alarm_id` is "" where it is shelved, suppressed or out of service without having been raised.
    """

    active: bool  #: the condition, also while it is not annunciated
    active_at: int | None  #: event time of its last change
    shelved_until: int | None
    one_shot: bool


def message_of(point: Point, rule: Rule, rules: DeviceRules, value: float | None, severity: str) -> str:
    """What people are told of an alarm."""
    fields = {
        "device_id": point.device_id,
        "name": rules.device_name,
        "rule": rule.name,
        "component_type": rule.component_type,
        "pin_position": point.pin_position,
        "value": value,
        "unit": rule.unit,
        "threshold": rule.threshold_of(severity),
        "severity": severity,
    }
    return render(rule.message, fields)


def transition_line(
    point: Point,
    transition: Transition,
    now: Occasion,
    rule: Rule | None,
    rules: DeviceRules,
    action: Action | None,
    chattering: bool,
    component_type: str,
    gone: Gone | None = None,
) -> TransitionDoc:
    """What is told of a transition; `component_type` is of the alarm's series, `gone` why nothing watches it any more."""
    alarm = transition.alarm
    raw = alarm.raw
    line: TransitionDoc = {
        "alarm_id": alarm.alarm_id,
        "transition_id": transition.id,
        "sequence": alarm.sequence,
        "device_id": point.device_id,
        "device_name": rules.device_name,
        "rule": point.rule,
        "rule_rev": rule.rev if rule else 0,
        "kind": rule.kind if rule else "",
        "group": rule.group if rule else "",
        "component_type": component_type,
        "pin_position": point.pin_position,
        "severity": alarm.severity,
        "transition": transition.name,
        "state": alarm.state.value,
        "occurred_at": alarm.occurred_at,
        "detected_at": now.detected_at,
        "cleared_at": alarm.cleared_at,
        "transition_at": now.at,
        "value": alarm.value,
        "unit": rule.unit if rule else "",
        "threshold": rule.threshold_of(alarm.severity) if rule else None,
        "message": alarm.message,
        "recipients": list(rule.recipients) if rule else [],
        "actor": action.actor if action else None,
        "comment": action.comment if action and action.comment else None,
        "raw_partition": raw.partition if raw else None,
        "raw_offset": raw.offset if raw else None,
        "raw_index": raw.line if raw else None,
        "first_out": alarm.first_out,
        "chattering": chattering,
        "generation": point.generation,
    }
    if gone is not None:
        line["reason"] = gone.code
        line["comment"] = line["comment"] or gone.value
    return line


def standing_of(
    point: Point,
    last: Transition,
    now: Occasion,
    rule: Rule | None,
    rules: DeviceRules,
    action: Action | None,
    chattering: bool,
    component_type: str,
) -> StandingDoc | None:
    """How an alarm stands after its last transition; None: normal."""
    alarm = last.alarm
    if alarm.state is State.NORMAL:
        return None
    return {
        **transition_line(point, last, now, rule, rules, action, chattering, component_type),
        "severity": alarm.severity or now.severity,
        # What a rule says of its condition is said of one that holds, or did when the alarm was raised.
        "message": alarm.message or (now.message if alarm.active else ""),
        "active": alarm.active,
        "active_at": alarm.active_at,
        "shelved_until": alarm.shelved_until,
        "one_shot": alarm.one_shot,
    }
