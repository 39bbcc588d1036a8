"""What happens to a device's alarms in one turn: at a message, at an operator's action, or because time passes.

An event happens to one alarm, and the machine (`machine.py`) says what follows. Where the alarm is of a group, its master
suppresses the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from preservarium.domain.alarms.action import Action
from preservarium.domain.alarms.gone import Gone
from preservarium.domain.alarms.line import StandingDoc, TransitionDoc, message_of, standing_of, transition_line
from preservarium.domain.alarms.machine import (
    NEW,
    SILENT,
    TRANSITION_NAMES,
    UNWATCHED,
    Event,
    Occasion,
    Point,
    Refusal,
    State,
    Transition,
    step,
)
from preservarium.domain.alarms.rule import DeviceRules, Rule
from preservarium.domain.alarms.state import Generation, Live
from preservarium.domain.alarms.watch import level_of
from preservarium.domain.readings.lineage import GENERATION_LIVE

#: An alarm chatters that is raised so often in so short a time (ISA-18.2, section 16: three times a minute) …
CHATTER_RAISES: Final = 3
CHATTER_US: Final = 60_000_000

#: … until it was not raised for so long.
CALM_US: Final = 600_000_000


@dataclass(slots=True)
class Outcome:
    """What a message or an action caused, or some messages together."""

    duplicate: bool = False  #: applied before; nothing else was done
    transitions: list[TransitionDoc] = field(default_factory=list)
    evaluated: int = 0  #: readings that a rule took
    late: int = 0  #: of them, those not younger than the last one
    refusal: Refusal | None = None  #: of an action
    limited: bool = False  #: for the first time, an alarm got no state because the device has too many
    #: (rule, pin) of each live alarm that changed -> how it stands; None: normal
    standing: dict[tuple[str, str], StandingDoc | None] = field(default_factory=dict)
    alarm_id: str = ""  #: of an action: the occurrence that it was done to
    state: State | None = None  #: of an action: of its alarm, afterwards


@dataclass(slots=True)
class Turn:
    """One turn: whose alarms, by which rules, and what comes of it."""

    device_id: str
    state: Generation
    rules: DeviceRules
    outcome: Outcome
    as_received: bool = True  #: messages come as they were received, so a clock may have been told of silence before

    def point(self, rule: str, pin: str) -> Point:
        """The name of an alarm."""
        return Point(self.device_id, rule, pin, self.state.number)

    def live(self, rule: str, pin: str) -> Live | None:
        """An alarm's state; None where the device has too many."""
        live = self.state.point(rule, pin)
        if live is None:
            self.outcome.limited = True
        return live

    def happens(
        self, pin: str, live: Live, event: Event, now: Occasion, rule: Rule, action: Action | None = None
    ) -> None:
        """Let an event happen to the alarm of a rule on a pin, as its group has it."""
        point = self.point(rule.name, pin)
        if not rule.group:
            self._step(point, live, event, now, rule, action)
            return
        if rule.group_master:
            self._step(point, live, event, now, rule, action)
            self.regroup(rule.group, now)
            return
        suppressed = self.state.kept.get("s", {}).get(rule.group)
        if suppressed is not None:
            shelf_ends = event is Event.UNSHELVE and live.alarm.state is State.SHELVED
            if shelf_ends or (event is Event.RAISE and live.alarm.state not in SILENT):
                suppressed.append([point.rule, point.pin_position])
                self._step(point, live, Event.SUPPRESS, now, rule, action)
            if shelf_ends:
                return
        self._step(point, live, event, now, rule, action)
        if suppressed is not None and event is Event.RESTORE and live.alarm.state is State.UNACKNOWLEDGED:
            suppressed.append([point.rule, point.pin_position])
            self._step(point, live, Event.SUPPRESS, now, rule)

    def unwatched(
        self, rule: str, pin: str, live: Live, event: Event, at: int, gone: Gone, action: Action | None
    ) -> None:
        """Let an event happen to an alarm that nothing watches any more; at: when that became known, µs."""
        event = UNWATCHED.get(event, event)
        if event is not Event.WITHDRAW:
            self._step(self.point(rule, pin), live, event, _occasion(at, at, action), None, action)
            return
        # It ends in the event time of what was seen last of it.
        seen = max(live.watch.at, live.alarm.occurred_at)
        self._step(self.point(rule, pin), live, event, _occasion(seen, at, action), None, action, gone)

    def _step(
        self,
        point: Point,
        live: Live,
        event: Event,
        now: Occasion,
        rule: Rule | None,
        action: Action | None = None,
        gone: Gone | None = None,
    ) -> None:
        kept, rules, outcome = self.state.kept, self.rules, self.outcome
        before = live.alarm
        if rule is not None:
            value = before.value if now.value is None else now.value
            severity = now.severity or rule.severity_of(level_of(live.watch))
            now = replace(now, severity=severity, message=message_of(point, rule, rules, value, severity))
            if event is Event.RAISE and before.state not in SILENT:
                if rule.group:
                    now = replace(now, first_out=_first_out(kept, rule, rules, now.at))
                _count_raise(kept, point, now.at)
            live.component_type = rule.component_type
        result = step(point, before, event, now)
        live.alarm = result.alarm
        component_type = live.component_type
        if live.alarm == NEW:
            live.component_type = ""
        outcome.refusal = result.refusal
        if result.alarm.shelved_until is not None:
            kept["until"] = min(kept.get("until", result.alarm.shelved_until), result.alarm.shelved_until)
        chattering = _chatters(kept, point, now.at)
        notified = rule.notified if rule is not None else ()
        for transition in result.transitions:
            line = transition_line(point, transition, now, rule, rules, action, chattering, component_type, gone)
            if transition.alarm.sequence == 1:  # what was before it has had its end
                live.told = ()
            if former := [name for name in live.told if name not in notified]:
                line["former"] = former
            live.told = (*former, *notified)
            outcome.transitions.append(line)
        if not result.alarm.alarm_id:
            live.told = ()
        if result.alarm != before and point.generation == GENERATION_LIVE:
            done = result.transitions[-1].name if result.transitions else TRANSITION_NAMES[event]
            outcome.standing[point.rule, point.pin_position] = standing_of(
                point, Transition(done, result.alarm), now, rule, rules, action, chattering, component_type
            )

    def regroup(self, group: str, now: Occasion) -> None:
        """Suppress the group's alarms, or let them come back, where its masters have changed."""
        kept = self.state.kept
        members: list[tuple[Rule, str, Live]] = []
        for rule in self.rules.groups.get(group, ()):
            for pin in sorted(self.state.pins(rule.name)):
                live = self.live(rule.name, pin)
                if live is not None:
                    members.append((rule, pin, live))
        stands = any(
            rule.group_master and live.alarm.active and live.alarm.state is not State.OUT_OF_SERVICE
            for rule, _, live in members
        )
        occasion = Occasion(now.at, now.detected_at)
        suppressed = kept.get("s", {})
        if stands and group not in suppressed:
            kept.setdefault("s", {})[group] = []
            for rule, pin, live in members:
                # A normal alarm is suppressed when it would be raised; what an operator set aside stays with the operator.
                if not rule.group_master and live.alarm.state is not State.NORMAL and live.alarm.state not in SILENT:
                    kept["s"][group].append([rule.name, pin])
                    self._step(self.point(rule.name, pin), live, Event.SUPPRESS, occasion, rule)
        elif not stands and group in suppressed:
            by_master = dict.fromkeys((name, pin) for name, pin in suppressed.pop(group))
            if not suppressed:
                del kept["s"]
            for name, pin in by_master:
                one = self.rules.by_name.get(name)
                suppressed_one = self.live(name, pin) if one else None
                if suppressed_one is not None and suppressed_one.alarm.state is State.SUPPRESSED:
                    self._step(self.point(name, pin), suppressed_one, Event.UNSUPPRESS, occasion, one)


def _occasion(at: int, detected_at: int, action: Action | None) -> Occasion:
    until, one_shot = (action.until, action.one_shot) if action else (None, False)
    return Occasion(at, detected_at, until=until, one_shot=one_shot)


def _first_out(kept: dict[str, Any], rule: Rule, rules: DeviceRules, at: int) -> bool:
    """Whether no alarm of the group was raised within its window before; notes that one is now."""
    window_us = max(one.first_out_us for one in rules.groups[rule.group])
    firsts: dict[str, int] = kept.setdefault("f", {})
    for group in [one for one in firsts if one not in rules.groups]:
        del firsts[group]
    first = firsts.get(rule.group)
    if first is not None and abs(at - first) <= window_us:
        return False
    firsts[rule.group] = at
    return True


def _count_raise(kept: dict[str, Any], point: Point, at: int) -> None:
    """Note that an alarm is raised, and forget what was long ago."""
    raises: dict[str, dict[str, list[int]]] = kept.setdefault("c", {})
    for rule in list(raises):
        for pin in [pin for pin, found in raises[rule].items() if at - found[-1] > CALM_US]:
            del raises[rule][pin]
        if not raises[rule]:
            del raises[rule]
    found = raises.setdefault(point.rule, {}).setdefault(point.pin_position, [0])
    found[1:] = [*found[1:], at][-CHATTER_RAISES:]
    if len(found) > CHATTER_RAISES and found[-1] - found[1] <= CHATTER_US:
        found[0] = 1


def _chatters(kept: Mapping[str, Any], point: Point, at: int) -> bool:
    found = kept.get("c", {}).get(point.rule, {}).get(point.pin_position)
    return bool(found and found[0] and at - found[-1] <= CALM_US)
