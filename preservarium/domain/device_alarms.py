"""One device's alarms: messages and operators' actions in, transitions out, state between them.

Rules (`rules.py`) say when a condition changes, the machine (`alarm.py`) what follows; here both meet the records of
the pipeline and the state document of `tables/alarm_states.py`. The alarm agent is the only writer of that state:
people act through `alarm_actions`, in order with the readings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NotRequired, TypedDict

from preservarium.domain.alarm import (
    NEW,
    TRANSITION_NAMES,
    Alarm,
    Event,
    Occasion,
    Point,
    Refusal,
    State,
    Transition,
    step,
)
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.lineage import GENERATION_LIVE, Coordinates, applied, generation_state, is_applied, position_of
from preservarium.domain.reading import PIN_POSITION_NONE, TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Quality
from preservarium.domain.rules import NO_RULES, DeviceRules, Evaluation, Rule, Watch, evaluate, render

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 1

#: Alarms (rule × pin) of one device that have state: 100 rules on 5 pins, about 100 KiB when every one is raised.
ALARMS_PER_DEVICE_MAX: Final = 500

#: A shelved alarm comes back by itself. A week spans a planned outage; whoever needs longer takes it out of service.
SHELVE_S_MAX: Final = 7 * 86_400

#: Where the operator names no time.
SHELVE_S_DEFAULT: Final = 3_600

#: A comment is a note, not a report.
COMMENT_CHARS_MAX: Final = 2_000

#: Names in an action; the registry's own names are far shorter.
NAME_CHARS_MAX: Final = 255

#: An action's id is a UUID or what else its sender makes unique.
ACTION_ID_CHARS_MAX: Final = 64

#: Ids of the last actions that a device's state keeps, so that a sender may repeat one. A repetition comes within seconds,
#: and nobody acts on one device more often than this in them.
ACTIONS_REMEMBERED: Final = 16

#: Readings of this quality (fail, missing) say nothing about the process.
_QUALITY_UNUSABLE: Final = int(Quality.FAIL)


# --- operators' actions ----------------------------------------------------------------------------------------------

#: Word of an action -> event.
ACTIONS: Final[Mapping[str, Event]] = {
    "acknowledge": Event.ACKNOWLEDGE,
    "clear": Event.CLEAR,
    "comment": Event.COMMENT,
    "shelve": Event.SHELVE,
    "unshelve": Event.UNSHELVE,
    "suppress": Event.SUPPRESS,
    "unsuppress": Event.UNSUPPRESS,
    "out_of_service": Event.REMOVE,
    "return_to_service": Event.RESTORE,
}


class ActionDoc(TypedDict):
    """A line of `alarm_actions`, keyed by device."""

    action_id: NotRequired[str]  #: the same again is one action
    device_id: str
    rule: str
    pin_position: NotRequired[str]  #: absent: "-1"
    action: str  #: a word of `ACTIONS`
    actor: str  #: who
    at: int  #: when, µs since the epoch, UTC
    comment: NotRequired[str]
    duration_s: NotRequired[float]  #: shelve; absent: an hour
    one_shot: NotRequired[bool]  #: shelve: also ends when the condition returns to normal
    alarm_id: NotRequired[str]  #: the occurrence that the operator saw; another one is not touched


@dataclass(frozen=True, slots=True)
class Action:
    """A checked action."""

    device_id: str
    rule: str
    pin_position: str
    event: Event
    actor: str
    at: int  #: µs
    comment: str = ""
    until: int | None = None  #: µs
    one_shot: bool = False
    alarm_id: str | None = None
    action_id: str = ""


def parse_action(line: Mapping[str, Any], device_id: str | None = None) -> Action:
    """Check a line of `alarm_actions`, which anyone may have written.

    Args:
        line: the parsed line.
        device_id: what the record's key says, where the line names no device.

    Raises:
        Reject: `action_invalid`; the message names the field.
    """
    word = line.get("action")
    event = ACTIONS.get(word) if isinstance(word, str) else None
    if event is None:
        raise Reject(ReasonCode.ACTION_INVALID, f"there is no action {word!r:.100}")
    at = line.get("at")
    if type(at) is not int or not TIMESTAMP_MIN_US <= at <= TIMESTAMP_MAX_US:
        raise Reject(ReasonCode.ACTION_INVALID, f"at: {at!r:.100} is no instant in µs")
    until = None
    if event is Event.SHELVE:
        duration_s = line.get("duration_s", SHELVE_S_DEFAULT)
        # `not (a < b)` also refuses NaN.
        if type(duration_s) not in (int, float) or not 0 < duration_s <= SHELVE_S_MAX:
            text = f"duration_s: {duration_s!r:.100} is not over 0 and at most {SHELVE_S_MAX}"
            raise Reject(ReasonCode.ACTION_INVALID, text)
        until = at + round(duration_s * 1e6)
    one_shot = line.get("one_shot", False)
    if not isinstance(one_shot, bool):
        raise Reject(ReasonCode.ACTION_INVALID, f"one_shot: {one_shot!r:.100} is no boolean")
    occurrence, action_id = line.get("alarm_id"), line.get("action_id")
    return Action(
        device_id=_name(line, "device_id", device_id),
        rule=_name(line, "rule"),
        pin_position=_name(line, "pin_position", PIN_POSITION_NONE),
        event=event,
        actor=_name(line, "actor"),
        at=at,
        comment=_name(line, "comment", "", COMMENT_CHARS_MAX, empty=event is not Event.COMMENT),
        until=until,
        one_shot=one_shot,
        alarm_id=None if occurrence is None else _name(line, "alarm_id"),
        action_id="" if action_id is None else _name(line, "action_id", chars_max=ACTION_ID_CHARS_MAX),
    )


def _name(
    line: Mapping[str, Any],
    key: str,
    default: str | None = None,
    chars_max: int = NAME_CHARS_MAX,
    *,
    empty: bool = False,
) -> str:
    value = line.get(key)
    if value is None:
        value = default
    if not isinstance(value, str) or len(value) > chars_max or "\0" in value or not (value or empty):
        raise Reject(ReasonCode.ACTION_INVALID, f"{key}: {value!r:.100} is no text of at most {chars_max} characters")
    return value


# --- the alarms of one device ----------------------------------------------------------------------------------------


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


class AnswerDoc(TypedDict):
    """A line of `alarm_answers`: what became of an operator's action. Instants are µs since the epoch, UTC."""

    action_id: str
    device_id: str
    rule: str
    pin_position: str
    alarm_id: str  #: the occurrence that it was done to; "" where there was none
    action: str
    actor: str
    comment: str
    at: int  #: when, as the operator said
    until: int | None  #: shelved until
    one_shot: bool
    outcome: str  #: done or refused
    code: str  #: why refused, e.g. already_acknowledged; "" where done
    reason: str  #: the same for people
    state: str  #: of the alarm after it; "" where it is unknown
    transitions: list[str]  #: ids of the transitions that it caused
    answered_at: int


@dataclass(slots=True)
class Outcome:
    """What a message or an action caused."""

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
class _Live:
    """A point's state, unpacked."""

    watch: Watch
    alarm: Alarm


_UNUSED: Final = _Live(Watch(), NEW)


# {"v": 1, "g": {generation: {"m": marks, "a": {rule: {pin: row}}}}, "limited": 1 once reported}
# A row is a list, because there are many of them and they are written for every batch. The last fields are there only
# while the alarm is not normal.
_Row = list[Any]


class DeviceAlarms:
    """The alarms of one device: takes messages and actions in order, and gives the transitions they cause.

    Made of the state document, which `document` gives back after any number of messages; how they are cut into batches
    makes no difference. Not to be shared between tasks.
    """

    def __init__(self, device_id: str, document: Mapping[str, Any] | None = None) -> None:
        self._device_id = device_id
        self._document: dict[str, Any] = dict(document) if document else {"v": STATE_VERSION, "g": {}}
        self._live: dict[int, dict[tuple[str, str], _Live]] = {}
        #: generation -> alarms that have state, unpacked or not
        self._counts: dict[int, int] = {}
        #: generation -> the rules that its state was last compared with
        self._checked: dict[int, DeviceRules] = {}

    def document(self) -> dict[str, Any]:
        """The state as JSON-able data."""
        for generation, points in self._live.items():
            kept = self._document["g"].get(str(generation))
            if kept is None:  # displaced by a later replay
                continue
            for (rule, pin), live in points.items():
                kept["a"].setdefault(rule, {})[pin] = _pack(live)
        return self._document

    def alarms(self, generation: int = GENERATION_LIVE) -> Iterator[tuple[Point, Alarm]]:
        """Every alarm that has state, for inspection."""
        kept = self.document()["g"].get(str(generation), {"a": {}})
        for rule, pins in kept["a"].items():
            for pin, row in pins.items():
                yield Point(self._device_id, rule, pin, generation), _unpack(row).alarm

    def observe(self, message: Mapping[str, Any], rules: DeviceRules | None) -> Outcome:
        """Take one validated message.

        Readings that failed or are missing, texts, and readings in a unit that is not the datatype's are not evaluated;
        suspect ones are: an alarm missed is worse than one looked at.

        Args:
            message: a validated message of this device; messages come in the order of their partition.
            rules: the device's rules; None where the device is unknown now: nothing is evaluated or withdrawn.
        """
        outcome = Outcome()
        generation = message["generation"]
        kept = self._generation(generation)
        source, offset, index = position_of(message)
        if is_applied(kept["m"], source, offset, index):
            outcome.duplicate = True
            return outcome
        applied(kept["m"], source, offset, index)
        if rules is None:
            return outcome
        self._housekeeping(kept, generation, message, rules, outcome)
        by_type = rules.by_type
        if not by_type:
            return outcome
        points = self._live.setdefault(generation, {})
        message_at = message["timestamp"]
        for reading in message["readings"]:
            watching = by_type.get(reading["component_type"])
            if watching is None:
                continue
            value = reading.get("value")
            if value is None or reading.get("quality", 0) >= _QUALITY_UNUSABLE or reading.get("revised"):
                continue
            flags = reading.get("flags")
            if flags and "unit_unknown" in flags:
                continue
            at = reading.get("timestamp")
            if at is None:
                at = message_at
            pin = reading["pin_position"]
            outcome.evaluated += 1
            late = False
            for rule in watching:
                if rule.pin_position is not None and rule.pin_position != pin:
                    continue
                live = points.get((rule.name, pin)) or self._point(generation, kept, points, rule.name, pin, outcome)
                if live is None:
                    continue
                verdict = evaluate(rule, live.watch, value, at)
                if verdict is None or verdict.evaluation is Evaluation.PENDING:
                    continue
                if verdict.evaluation is Evaluation.LATE:
                    late = True
                    continue
                raw = Coordinates(message["raw_partition"], offset, index)
                now = Occasion(verdict.at, message["received_at"], value=value, raw=raw)
                if verdict.evaluation is Evaluation.RAISED:
                    event = Event.RAISE
                elif rule.latching:
                    event = Event.RETURN_LATCHING
                else:
                    event = Event.RETURN if rule.acknowledge else Event.RETURN_AUTO
                self._apply(Point(self._device_id, rule.name, pin, generation), live, event, now, rule, rules, outcome)
            outcome.late += late
        return outcome

    def act(self, action: Action, rules: DeviceRules | None, source: str, offset: int, index: int) -> Outcome:
        """Take one operator's action.

        Args:
            action: of this device.
            rules: the device's rules.
            source: which topic and partition it came from; its own watermark.
            offset: offset in it.
            index: line within the record.

        Returns:
            An outcome whose `refusal` says why nothing changed, where that is so.
        """
        outcome = Outcome()
        kept = self._generation(GENERATION_LIVE)
        if is_applied(kept["m"], source, offset, index):
            outcome.duplicate = True
            return outcome
        applied(kept["m"], source, offset, index)
        if action.action_id:
            remembered: list[str] = kept.setdefault("acts", [])
            if action.action_id in remembered:
                outcome.duplicate = True
                return outcome
            remembered.append(action.action_id)
            del remembered[:-ACTIONS_REMEMBERED]
        rule = (rules or NO_RULES).by_name.get(action.rule)
        if rules is None or rule is None or rule.pin_position not in (None, action.pin_position):
            outcome.refusal = Refusal.UNKNOWN_ALARM
            return outcome
        points = self._live.setdefault(GENERATION_LIVE, {})
        live = self._point(GENERATION_LIVE, kept, points, rule.name, action.pin_position, outcome)
        if live is None:
            outcome.refusal = Refusal.TOO_MANY_ALARMS
            return outcome
        outcome.alarm_id = live.alarm.alarm_id
        if action.alarm_id is not None and action.alarm_id != live.alarm.alarm_id:
            outcome.refusal = Refusal.OTHER_OCCURRENCE
        else:
            point = Point(self._device_id, rule.name, action.pin_position, GENERATION_LIVE)
            now = Occasion(action.at, action.at, until=action.until, one_shot=action.one_shot)
            self._apply(point, live, action.event, now, rule, rules, outcome, action)
        outcome.state = live.alarm.state
        self._forget_unused(GENERATION_LIVE, kept, rule.name, action.pin_position)
        return outcome

    def _forget_unused(self, generation: int, kept: Mapping[str, Any], rule: str, pin: str) -> None:
        """Keep no state for a pin that only actions have named: no reading, and normal."""
        points = self._live[generation]
        if points[rule, pin] != _UNUSED:
            return
        del points[rule, pin]
        self._counts[generation] = self._count(generation, kept) - 1
        pins = kept["a"].get(rule, {})
        if pins.pop(pin, None) is not None and not pins:
            del kept["a"][rule]

    def _count(self, generation: int, kept: Mapping[str, Any]) -> int:
        count = self._counts.get(generation)
        if count is None:
            points = self._live.get(generation, {})
            count = len({(r, p) for r, pins in kept["a"].items() for p in pins} | set(points))
        return count

    def _generation(self, generation: int) -> dict[str, Any]:
        generations: dict[str, dict[str, Any]] = self._document["g"]
        known = str(generation) in generations
        kept = generation_state(generations, generation, lambda: {"m": {}, "a": {}})
        if not known:
            for memory in (self._live, self._counts, self._checked):
                memory.pop(generation, None)
        return kept

    def _point(
        self,
        generation: int,
        kept: Mapping[str, Any],
        points: dict[tuple[str, str], _Live],
        rule: str,
        pin: str,
        outcome: Outcome,
    ) -> _Live | None:
        """The point's state, unpacked once; None where the device has too many."""
        live = points.get((rule, pin))
        if live is not None:
            return live
        pins = kept["a"].get(rule)
        row = pins.get(pin) if pins else None
        if row is not None:
            live = points[rule, pin] = _unpack(row)
            return live
        count = self._count(generation, kept)
        if count >= ALARMS_PER_DEVICE_MAX:
            if "limited" not in self._document:
                self._document["limited"] = 1
                outcome.limited = True
            return None
        self._counts[generation] = count + 1
        live = points[rule, pin] = _Live(Watch(), NEW)
        return live

    def _housekeeping(
        self,
        kept: dict[str, Any],
        generation: int,
        message: Mapping[str, Any],
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """What time and the registry did since the last message: shelves that ran out, rules that are gone."""
        points = self._live.setdefault(generation, {})
        now = message["received_at"]
        until = kept.get("until")
        if until is not None and until <= now:
            self._unshelve(kept, points, generation, now, rules, outcome)
        if self._checked.get(generation) is rules:
            return
        self._checked[generation] = rules
        self._counts[generation] = self._count(generation, kept)
        gone = {name for name in kept["a"] if name not in rules.by_name}
        gone.update(name for name, _ in points if name not in rules.by_name)
        for name in sorted(gone):
            for pin in sorted({*kept["a"].get(name, {}), *(p for r, p in points if r == name)}):
                live = self._point(generation, kept, points, name, pin, outcome)
                if live is not None and live.alarm != NEW:
                    point = Point(self._device_id, name, pin, generation)
                    at = max(live.watch.at, live.alarm.occurred_at)
                    self._apply(point, live, Event.WITHDRAW, Occasion(at, now), None, rules, outcome)
                if points.pop((name, pin), None) is not None:
                    self._counts[generation] -= 1
            kept["a"].pop(name, None)

    def _unshelve(
        self,
        kept: dict[str, Any],
        points: dict[tuple[str, str], _Live],
        generation: int,
        now: int,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        waiting: list[int] = []
        everything = {(r, p) for r, pins in kept["a"].items() for p in pins} | set(points)
        for name, pin in sorted(everything):
            rule = rules.by_name.get(name)
            live = self._point(generation, kept, points, name, pin, outcome)
            if rule is None or live is None or live.alarm.shelved_until is None:
                continue
            until = live.alarm.shelved_until
            if until > now:
                waiting.append(until)
                continue
            point = Point(self._device_id, name, pin, generation)
            self._apply(point, live, Event.UNSHELVE, Occasion(until, now), rule, rules, outcome)
            self._forget_unused(generation, kept, name, pin)
        kept.pop("until", None)
        if waiting:
            kept["until"] = min(waiting)

    def _apply(
        self,
        point: Point,
        live: _Live,
        event: Event,
        now: Occasion,
        rule: Rule | None,
        rules: DeviceRules,
        outcome: Outcome,
        action: Action | None = None,
    ) -> None:
        if rule is not None:
            value = live.alarm.value if now.value is None else now.value
            now = replace(now, severity=rule.severity, message=_message(point, rule, rules, value))
        before = live.alarm
        result = step(point, before, event, now)
        live.alarm = result.alarm
        outcome.refusal = result.refusal
        if result.alarm.shelved_until is not None:
            kept = self._document["g"][str(point.generation)]
            kept["until"] = min(kept.get("until", result.alarm.shelved_until), result.alarm.shelved_until)
        for transition in result.transitions:
            outcome.transitions.append(_line(point, transition, now, rule, rules, action))
        if result.alarm != before and point.generation == GENERATION_LIVE:
            done = result.transitions[-1].name if result.transitions else TRANSITION_NAMES[event]
            outcome.standing[point.rule, point.pin_position] = _standing(
                point, Transition(done, result.alarm), now, rule, rules, action
            )


def _message(point: Point, rule: Rule, rules: DeviceRules, value: float | None) -> str:
    fields = {
        "device_id": point.device_id,
        "name": rules.device_name,
        "rule": rule.name,
        "component_type": rule.component_type,
        "pin_position": point.pin_position,
        "value": "" if value is None else value,
        "unit": rule.unit,
        "threshold": rule.threshold,
        "severity": rule.severity,
    }
    return render(rule.message, fields)


def _line(
    point: Point,
    transition: Transition,
    now: Occasion,
    rule: Rule | None,
    rules: DeviceRules,
    action: Action | None,
) -> TransitionDoc:
    alarm = transition.alarm
    raw = alarm.raw
    return {
        "alarm_id": alarm.alarm_id,
        "transition_id": transition.id,
        "sequence": alarm.sequence,
        "device_id": point.device_id,
        "device_name": rules.device_name,
        "rule": point.rule,
        "rule_rev": rule.rev if rule else 0,
        "kind": rule.kind if rule else "",
        "group": "",
        "component_type": rule.component_type if rule else "",
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
        "threshold": rule.threshold if rule else None,
        "message": alarm.message,
        "recipients": list(rule.recipients) if rule else [],
        "actor": action.actor if action else None,
        "comment": action.comment if action and action.comment else None,
        "raw_partition": raw.partition if raw else None,
        "raw_offset": raw.offset if raw else None,
        "raw_index": raw.line if raw else None,
        "first_out": False,
        "chattering": False,
        "generation": point.generation,
    }


def _standing(
    point: Point, last: Transition, now: Occasion, rule: Rule | None, rules: DeviceRules, action: Action | None
) -> StandingDoc | None:
    alarm = last.alarm
    if alarm.state is State.NORMAL:
        return None
    return {
        **_line(point, last, now, rule, rules, action),
        "severity": alarm.severity or now.severity,
        "message": alarm.message or now.message,
        "active": alarm.active,
        "active_at": alarm.active_at,
        "shelved_until": alarm.shelved_until,
        "one_shot": alarm.one_shot,
    }


def _pack(live: _Live) -> _Row:
    watch, alarm = live.watch, live.alarm
    row: _Row = [watch.at, int(watch.active), watch.since]
    if alarm != NEW:
        row += [
            alarm.state.value, alarm.active_at, alarm.alarm_id, alarm.sequence, alarm.occurred_at, alarm.severity, alarm.message,
            alarm.cleared_at, alarm.value, alarm.raw and list(alarm.raw), alarm.shelved_until, int(alarm.one_shot),
        ]  # fmt: skip
    return row


def _unpack(row: _Row) -> _Live:
    watch = Watch(row[0], bool(row[1]), row[2])
    if len(row) == 3:
        return _Live(watch, NEW)
    (state, active_at, occurrence, sequence, occurred_at, severity, text, cleared_at, value, raw, until, one_shot) = (
        row[3:]
    )
    alarm = Alarm(
        State(state), watch.active, active_at, occurrence, sequence, occurred_at, severity, text, cleared_at, value,
        None if raw is None else Coordinates(*raw), until, bool(one_shot),
    )  # fmt: skip
    return _Live(watch, alarm)
