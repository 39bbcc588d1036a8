"""One device's alarms: messages and operators' actions in, transitions out, state between them.

Rules (`rules.py`) say when a condition changes, the machine (`alarm.py`) what follows; here both meet the records of
the pipeline and the state document of `tables/alarm_states.py`. The alarm agent is the only writer of that state:
people act through `alarm_actions`, in order with the readings.
"""

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, Final, NamedTuple, NotRequired, TypedDict

from preservarium.domain.alarm import (
    NEW,
    SILENT,
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
from preservarium.domain.expressions import ARITHMETIC_ERRORS
from preservarium.domain.lineage import GENERATION_LIVE, Coordinates, applied, generation_state, is_applied, position_of
from preservarium.domain.reading import PIN_POSITION_NONE, TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Quality
from preservarium.domain.rules import (
    NO_RULES,
    DeviceRules,
    Evaluation,
    Rule,
    RuleSet,
    Verdict,
    Watch,
    evaluate,
    level_of,
    overdue,
    render,
    silent,
    take,
)

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 1

#: Alarms (rule × pin) of one device that have state: 100 rules on 5 pins, about 100 KiB when every one is raised.
ALARMS_PER_DEVICE_MAX: Final = 500

#: Series of one device that rules of several series may take in; as many as it may have alarms.
INPUTS_PER_DEVICE_MAX: Final = ALARMS_PER_DEVICE_MAX

#: Readings of one device that wait to be put in order, for each `lateness_s`; about 100 bytes each. Where there are more,
#: the oldest waits no longer.
HELD_PER_DEVICE_MAX: Final = 256

#: An alarm chatters that is raised so often in so short a time (ISA-18.2, section 16: three times a minute) …
CHATTER_RAISES: Final = 3
CHATTER_US: Final = 60_000_000

#: … until it was not raised for so long.
CALM_US: Final = 600_000_000

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
    former: NotRequired[list[str]]  #: who was told of the occurrence before and is not named by the rule any more
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
    told: tuple[str, ...] = ()  #: recipients that the rule has named since the occurrence began


_UNUSED: Final = _Live(Watch(), NEW)


class _Sample(NamedTuple):
    """A reading with where it came from; in this order samples are evaluated."""

    at: int  #: event time
    component_type: str
    pin_position: str
    value: float
    received_at: int
    raw_partition: int
    raw_offset: int
    raw_index: int


_EVENTS: Final[Mapping[Evaluation, Event]] = {
    Evaluation.RAISED: Event.RAISE,
    Evaluation.GRAVER: Event.RAISE_SEVERITY,
    Evaluation.LESS_GRAVE: Event.LOWER_SEVERITY,
}
_LIFTS: Final = frozenset({Event.UNSHELVE, Event.RESTORE})


# {"v": 1, "g": {generation: kept}, "limited": 1 once reported, "due": when `tick` has something to do}
# kept, of which only the first two are always there:
#   "m" marks, "a" {rule: {pin: row}},
#   "until" end of the shelf that ends first,
#   "c" {rule: {pin: [chatters, last raises …]}}, "f" {group: when its first alarm was raised},
#   "s" {group: [[rule, pin] that its master suppresses]},
#   and for each lateness in µs: "i" {component type: {pin: [at, value]}} (inputs of rules of several series),
#   "h" {"q": samples that wait, "to": newest event time, "seen": reception of the last message}.
# A row is a list, because there are many of them and they are written for every batch: three fields of the watch, twelve
# of the alarm while it is not normal, and a dictionary of what few rules have.
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
        #: as of the last message, action or tick
        self._rules: DeviceRules | None = None
        #: of the present message
        self._as_received = True

    def document(self) -> dict[str, Any]:
        """The state as JSON-able data."""
        for generation, points in self._live.items():
            kept = self._document["g"].get(str(generation))
            if kept is None:  # displaced by a later replay
                continue
            for (rule, pin), live in points.items():
                kept["a"].setdefault(rule, {})[pin] = _pack(live)
        if self._rules is not None:
            due = self._due(self._rules)
            if due is not None:
                self._document["due"] = due
            else:
                self._document.pop("due", None)
        return self._document

    def _due(self, rules: DeviceRules) -> int | None:
        """When `tick` has something to do, µs; None: never, as things stand. Only the live generation is told of time."""
        kept = self._document["g"].get(str(GENERATION_LIVE))
        if kept is None:
            return None
        found = [kept["until"]] if "until" in kept else []
        for one in rules.sets:
            held = _held(kept, one.lateness_us) if one.lateness_us else None
            if held is not None and held["q"]:
                found.append(held["seen"] + one.lateness_us)
        for rule in rules.no_data:
            for pin, row in kept["a"].get(rule.name, {}).items():
                if not row[1] and row[0] and rule.pin_position in (None, pin):
                    deadline = rule.told_at(row[0], row[2])
                    # Beyond what waits to be put in order, nothing is known yet: whatever releases that asks again.
                    if deadline is not None and deadline < _oldest_held(kept, rule.lateness_us):
                        found.append(deadline + rule.lateness_us + 1)
        return min(found, default=None)

    def alarms(self, generation: int = GENERATION_LIVE) -> Iterator[tuple[Point, Alarm]]:
        """Every alarm that has state, for inspection."""
        kept = self.document()["g"].get(str(generation), {"a": {}})
        for rule, pins in kept["a"].items():
            for pin, row in pins.items():
                yield Point(self._device_id, rule, pin, generation), _unpack(row).alarm

    def observe(self, message: Mapping[str, Any], rules: DeviceRules | None, *, as_received: bool = True) -> Outcome:
        """Take one validated message.

        Readings that failed or are missing, texts, and readings in a unit that is not the datatype's are not evaluated;
        suspect ones are: an alarm missed is worse than one looked at.

        Args:
            message: a validated message of this device; messages come in the order of their partition.
            rules: the device's rules; None where the device is unknown now: nothing is evaluated or withdrawn.
            as_received: messages come as they were received, so that a silence that a clock would have told of before
                this one came is told now. Otherwise, of stored readings in the order of their own time, `received_at`
                says nothing of silence.
        """
        outcome = Outcome()
        self._as_received = as_received
        generation = message["generation"]
        kept = self._generation(generation)
        source, offset, index = position_of(message)
        if is_applied(kept["m"], source, offset, index):
            outcome.duplicate = True
            return outcome
        applied(kept["m"], source, offset, index)
        if rules is None:
            return outcome
        self._housekeeping(kept, generation, message["received_at"], rules, outcome)
        for one in rules.sets:
            if not one.lateness_us and not one.ordered:
                self._observe(kept, generation, message, one, rules, outcome)
                continue
            samples = sorted(_samples(message, one))
            if not one.lateness_us:
                outcome.evaluated += len(samples)
                self._evaluate(kept, generation, samples, one, rules, outcome)
            elif samples or _held(kept, one.lateness_us) is not None:
                self._hold(kept, generation, message, samples, one, rules, outcome)
        return outcome

    def _observe(
        self,
        kept: dict[str, Any],
        generation: int,
        message: Mapping[str, Any],
        rule_set: RuleSet,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """Readings straight from their message: the way of most."""
        by_type = rule_set.by_type
        points = self._live.setdefault(generation, {})
        message_at = message["timestamp"]
        received_at = message["received_at"] if self._as_received else None
        readings = message["readings"]
        if len(readings) > 1 and any("timestamp" in reading for reading in readings):
            readings = sorted(readings, key=lambda reading: _instant(reading, message_at))
        for reading in readings:
            watching = by_type.get(reading["component_type"])
            if watching is None or not _usable(reading):
                continue
            value = reading["value"]
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
                if rule.plain:
                    verdict = evaluate(rule, live.watch, value, at)
                    if verdict is None or verdict.evaluation is Evaluation.PENDING:
                        continue
                    verdicts: Sequence[Verdict] = (verdict,)
                else:
                    verdicts = take(rule, live.watch, value, at, received_at)
                    if not verdicts:
                        continue
                sample = _Sample(at, "", pin, value, message["received_at"], *_coordinates(message))
                late = self._told(generation, live, rule, pin, verdicts, sample, rules, outcome) or late
            outcome.late += late

    def _hold(
        self,
        kept: dict[str, Any],
        generation: int,
        message: Mapping[str, Any],
        samples: Sequence[_Sample],
        rule_set: RuleSet,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """Keep readings until none that is older is to be expected, then evaluate them in the order of event time."""
        outcome.evaluated += len(samples)
        held = kept.setdefault("h", {}).setdefault(str(rule_set.lateness_us), {"q": [], "to": 0, "seen": 0})
        queue: list[Any] = held["q"]
        for sample in samples:
            insort(queue, list(sample))
        held["to"] = max([held["to"], *(sample.at for sample in samples)])
        held["seen"] = max(held["seen"], message["received_at"])
        ready = held["to"] - rule_set.lateness_us
        count = next((i for i, sample in enumerate(queue) if sample[0] >= ready), len(queue))
        self._release(kept, generation, max(count, len(queue) - HELD_PER_DEVICE_MAX), rule_set, rules, outcome)

    def _release(
        self,
        kept: dict[str, Any],
        generation: int,
        count: int,
        rule_set: RuleSet,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        queue: list[Any] = kept["h"][str(rule_set.lateness_us)]["q"]
        samples = [_Sample(*sample) for sample in queue[:count]]
        del queue[:count]
        self._evaluate(kept, generation, samples, rule_set, rules, outcome)

    def _evaluate(
        self,
        kept: dict[str, Any],
        generation: int,
        samples: Sequence[_Sample],
        rule_set: RuleSet,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """Samples in order. What one instant says is taken in as a whole, masters of groups first."""
        known: dict[str, dict[str, list[Any]]] = {}
        if rule_set.several and samples:
            known = kept.setdefault("i", {}).setdefault(str(rule_set.lateness_us), {})
        points = self._live.setdefault(generation, {})
        start = 0
        while start < len(samples):
            end = start
            while end < len(samples) and samples[end].at == samples[start].at:
                end += 1
            together = samples[start:end]
            if rule_set.silences:
                first = together[0]
                self._notice(kept, generation, rule_set.silences, silent, first.at, first.received_at, rules, outcome)
                received_at = self._received(first, rule_set.lateness_us)
                if received_at is not None:
                    self._notice(kept, generation, rule_set.silences, overdue, received_at, received_at, rules, outcome)
            inputs = self._take_inputs(known, together, rule_set, outcome) if rule_set.several else {}
            late: set[int] = set()
            for masters in (True, False) if rule_set.masters else (False,):
                for number, sample in enumerate(together):
                    for rule in rule_set.by_type.get(sample.component_type, ()):
                        if (
                            rule.group_master is masters
                            and rule.pin_position in (None, sample.pin_position)
                            and self._single(kept, generation, rule, sample, rules, outcome)
                        ):
                            late.add(number)
                for (_, pin), (rule, sample) in inputs.items():
                    if rule.group_master is masters:
                        self._several(kept, known, points, generation, rule, pin, sample, rules, outcome)
            outcome.late += len(late)
            start = end

    def _received(self, sample: _Sample, lateness_us: int) -> int | None:
        """Up to where a clock tells of silence before a sample is taken; None: not at all."""
        return sample.received_at - lateness_us if self._as_received else None

    def _notice(
        self,
        kept: dict[str, Any],
        generation: int,
        watching: Sequence[Rule],
        found_by: Callable[[Rule, Watch, int], Verdict | None],
        now: int,
        detected_at: int,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """Raise what no-data rules have to say at `now`, in the order of the deadlines, masters of groups first."""
        points = self._live.setdefault(generation, {})
        found: list[tuple[int, bool, str, str, _Live]] = []
        for rule in watching:
            for pin in {*kept["a"].get(rule.name, {}), *(pin for name, pin in points if name == rule.name)}:
                live = self._point(generation, kept, points, rule.name, pin, outcome)
                if live is None or rule.pin_position not in (None, pin):
                    continue
                verdict = found_by(rule, live.watch, now)
                if verdict is not None:
                    found.append((verdict.at, not rule.group_master, rule.name, pin, live))
        for at, _, name, pin, live in sorted(found, key=lambda one: one[:4]):
            nothing = _Sample(at, "", pin, 0.0, detected_at, 0, 0, 0)
            verdicts = (Verdict(Evaluation.RAISED, at),)
            self._told(generation, live, rules.by_name[name], pin, verdicts, nothing, rules, outcome)

    def _single(
        self,
        kept: dict[str, Any],
        generation: int,
        rule: Rule,
        sample: _Sample,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> bool:
        points = self._live.setdefault(generation, {})
        live = self._point(generation, kept, points, rule.name, sample.pin_position, outcome)
        if live is None:
            return False
        verdicts = take(rule, live.watch, sample.value, sample.at, self._received(sample, rule.lateness_us))
        if not verdicts:
            return False
        return self._told(generation, live, rule, sample.pin_position, verdicts, sample, rules, outcome)

    def _take_inputs(
        self,
        known: dict[str, dict[str, list[Any]]],
        samples: Sequence[_Sample],
        rule_set: RuleSet,
        outcome: Outcome,
    ) -> dict[tuple[str, str], tuple[Rule, _Sample]]:
        """Remember what rules of several series take in; (rule, pin) that it concerns -> the newest of the samples."""
        concerned: dict[tuple[str, str], tuple[Rule, _Sample]] = {}
        for sample in samples:
            watching = rule_set.several.get(sample.component_type)
            if watching is None:
                continue
            pins = known.setdefault(sample.component_type, {})
            held = pins.get(sample.pin_position)
            if held is None:
                if sum(map(len, known.values())) >= INPUTS_PER_DEVICE_MAX:
                    self._limited(outcome)
                    continue
            elif sample.at <= held[0]:
                outcome.late += 1
                continue
            pin = sample.pin_position
            pins[pin] = [sample.at, sample.value]
            for rule in watching:
                if rule.everywhere:
                    # Where its own series is not there yet, nothing comes of it.
                    concerned[rule.name, pin] = rule, sample
                else:
                    for one in self._pins(rule, sample, known):
                        concerned[rule.name, one] = rule, sample
        return concerned

    def _pins(self, rule: Rule, sample: _Sample, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The pins of a rule of several series that a sample says something of."""
        if rule.pin_position is not None:
            return [rule.pin_position]
        own = known.get(rule.component_type, {})
        for taken in rule.inputs:
            # A pin that the rule names concerns every pin of its own.
            if taken.pin_position == sample.pin_position and taken.component_type == sample.component_type:
                return sorted(own)
        return [sample.pin_position] if sample.pin_position in own else []

    def _several(
        self,
        kept: dict[str, Any],
        known: Mapping[str, Mapping[str, Any]],
        points: dict[tuple[str, str], _Live],
        generation: int,
        rule: Rule,
        pin: str,
        sample: _Sample,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """Evaluate a rule of several series, at the instant of the newest of them."""
        series = known.get(rule.component_type)
        own = series.get(pin) if series else None
        if own is None:
            return  # its own series is not there yet: no alarm to keep a state for
        live = points.get((rule.name, pin)) or self._point(generation, kept, points, rule.name, pin, outcome)
        if live is None:
            return
        at = oldest = own[0]
        values = [own[1]]
        for component_type, fixed in rule.inputs:
            series = known.get(component_type)
            found = series.get(pin if fixed is None else fixed) if series else None
            if found is None:
                oldest = TIMESTAMP_MIN_US - rule.inputs_max_age_us  # missing is older than anything
                continue
            if found[0] > at:
                at = found[0]
            elif found[0] < oldest:
                oldest = found[0]
            values.append(found[1])
        value = _computed(rule, values) if at - oldest <= rule.inputs_max_age_us else None
        verdicts: Sequence[Verdict]
        if value is not None and rule.plain and at > live.watch.at:
            verdict = evaluate(rule, live.watch, value, at)
            if verdict is None or verdict.evaluation is Evaluation.PENDING:
                return
            verdicts = (verdict if rule.threshold is None else verdict._replace(value=value),)
        else:
            verdicts = take(rule, live.watch, value, at)
            if not verdicts:
                return
        self._told(generation, live, rule, pin, verdicts, sample._replace(value=own[1]), rules, outcome)

    def _told(
        self,
        generation: int,
        live: _Live,
        rule: Rule,
        pin: str,
        verdicts: Sequence[Verdict],
        sample: _Sample,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> bool:
        """Let the machine know what a reading changed; whether the reading was late."""
        late = False
        for verdict in verdicts:
            if verdict.evaluation is Evaluation.LATE:
                late = True
            elif verdict.evaluation is Evaluation.RETURNED:
                event = Event.RETURN if rule.acknowledge else Event.RETURN_AUTO
                event = Event.RETURN_LATCHING if rule.latching else event
                self._happens(generation, live, rule, pin, event, verdict, sample, rules, outcome)
            elif verdict.evaluation is not Evaluation.PENDING:
                self._happens(generation, live, rule, pin, _EVENTS[verdict.evaluation], verdict, sample, rules, outcome)
        return late

    def _happens(
        self,
        generation: int,
        live: _Live,
        rule: Rule,
        pin: str,
        event: Event,
        verdict: Verdict,
        sample: _Sample,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        value: float | None = sample.value if verdict.value is None else verdict.value
        raw: Coordinates | None = Coordinates(sample.raw_partition, sample.raw_offset, sample.raw_index)
        if rule.no_data_us and event is Event.RAISE:
            value = raw = None  # nothing came: that is the evidence
        severity = rule.severity_of(verdict.level)
        now = Occasion(verdict.at, sample.received_at, severity, value=value, raw=raw)
        self._apply(Point(self._device_id, rule.name, pin, generation), live, event, now, rule, rules, outcome)

    def tick(self, now_us: int, rules: DeviceRules | None) -> Outcome:
        """Let time pass: shelves end, silence is noticed, readings that waited for others are evaluated.

        Of the live generation only: a replay's time is that of its messages. Nothing is done twice, so a tick that is
        repeated after a crash tells the same.

        Args:
            now_us: an instant for which everything that was received before it has been observed: silence is only
                silence when nothing is on its way. Then ticks change nothing of the history but when it is told.
            rules: the device's rules; None where the device is unknown now: nothing happens.
        """
        outcome = Outcome()
        kept = self._document["g"].get(str(GENERATION_LIVE))
        if rules is None or kept is None:
            return outcome
        self._housekeeping(kept, GENERATION_LIVE, now_us, rules, outcome)
        for one in rules.sets:
            held = _held(kept, one.lateness_us) if one.lateness_us else None
            if held is not None and held["q"] and held["seen"] + one.lateness_us <= now_us:
                self._release(kept, GENERATION_LIVE, len(held["q"]), one, rules, outcome)
            # What still waits may be what a series is waited for.
            shown = min(now_us - one.lateness_us, _oldest_held(kept, one.lateness_us))
            self._notice(kept, GENERATION_LIVE, _quiet(one, rules), overdue, shown, now_us, rules, outcome)
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
        self._rules = rules or self._rules
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
            self._limited(outcome)
            return None
        self._counts[generation] = count + 1
        live = points[rule, pin] = _Live(Watch(), NEW)
        return live

    def _limited(self, outcome: Outcome) -> None:
        if "limited" not in self._document:
            self._document["limited"] = 1
            outcome.limited = True

    def _housekeeping(
        self,
        kept: dict[str, Any],
        generation: int,
        now: int,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """What time and the registry did since the last message: shelves that ran out, rules that are gone."""
        self._rules = rules
        points = self._live.setdefault(generation, {})
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
            kept.get("c", {}).pop(name, None)
        for group in sorted(kept.get("s", {})):
            self._regroup(kept, generation, group, Occasion(now, now), rules, outcome)
        waited = {str(one.lateness_us) for one in rules.sets}
        for lateness in [one for one in kept.get("i", {}) if one not in waited]:
            del kept["i"][lateness]
        for lateness in [one for one in kept.get("h", {}) if one not in waited]:
            # Rules that waited so long wait otherwise now: what others have evaluated already is late to them.
            samples = [_Sample(*sample) for sample in kept["h"].pop(lateness)["q"]]
            for one in rules.sets:
                held = _held(kept, one.lateness_us)
                if held is not None:
                    held["q"] = sorted([*held["q"], *map(list, samples)])
                else:
                    self._evaluate(kept, generation, samples, one, rules, outcome)

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
        """Let an event happen to an alarm, as its group has it."""
        if rule is None or not rule.group:
            self._step(point, live, event, now, rule, rules, outcome, action)
            return
        kept = self._document["g"][str(point.generation)]
        if rule.group_master:
            self._step(point, live, event, now, rule, rules, outcome, action)
            self._regroup(kept, point.generation, rule.group, now, rules, outcome)
            return
        suppressed = kept.get("s", {}).get(rule.group)
        if suppressed is not None:
            shelf_ends = event is Event.UNSHELVE and live.alarm.state is State.SHELVED
            if shelf_ends or (event is Event.RAISE and live.alarm.state not in SILENT):
                suppressed.append([point.rule, point.pin_position])
                self._step(point, live, Event.SUPPRESS, now, rule, rules, outcome, action)
            if shelf_ends:
                return
        self._step(point, live, event, now, rule, rules, outcome, action)
        if suppressed is not None and event is Event.RESTORE and live.alarm.state is State.UNACKNOWLEDGED:
            suppressed.append([point.rule, point.pin_position])
            self._step(point, live, Event.SUPPRESS, now, rule, rules, outcome)

    def _step(
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
        kept = self._document["g"][str(point.generation)]
        before = live.alarm
        if rule is not None:
            value = before.value if now.value is None else now.value
            severity = now.severity or rule.severity_of(level_of(live.watch))
            now = replace(now, severity=severity, message=_message(point, rule, rules, value, severity))
            if event is Event.RAISE and before.state not in SILENT:
                if rule.group:
                    now = replace(now, first_out=_first_out(kept, rule, rules, now.at))
                _count_raise(kept, point, now.at)
        result = step(point, before, event, now)
        live.alarm = result.alarm
        outcome.refusal = result.refusal
        if result.alarm.shelved_until is not None:
            kept["until"] = min(kept.get("until", result.alarm.shelved_until), result.alarm.shelved_until)
        chattering = _chatters(kept, point, now.at)
        notified = rule.notified if rule is not None else ()
        for transition in result.transitions:
            line = _line(point, transition, now, rule, rules, action, chattering)
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
            outcome.standing[point.rule, point.pin_position] = _standing(
                point, Transition(done, result.alarm), now, rule, rules, action, chattering
            )

    def _regroup(
        self,
        kept: dict[str, Any],
        generation: int,
        group: str,
        now: Occasion,
        rules: DeviceRules,
        outcome: Outcome,
    ) -> None:
        """Suppress the group's alarms, or let them come back, where its masters have changed."""
        points = self._live.setdefault(generation, {})
        members: list[tuple[Rule, str, _Live]] = []
        for rule in rules.groups.get(group, ()):
            for pin in sorted({*kept["a"].get(rule.name, {}), *(p for r, p in points if r == rule.name)}):
                live = self._point(generation, kept, points, rule.name, pin, outcome)
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
                    point = Point(self._device_id, rule.name, pin, generation)
                    self._step(point, live, Event.SUPPRESS, occasion, rule, rules, outcome)
        elif not stands and group in suppressed:
            by_master = dict.fromkeys((name, pin) for name, pin in suppressed.pop(group))
            if not suppressed:
                del kept["s"]
            for name, pin in by_master:
                one = rules.by_name.get(name)
                suppressed_one = self._point(generation, kept, points, name, pin, outcome) if one else None
                if suppressed_one is not None and suppressed_one.alarm.state is State.SUPPRESSED:
                    point = Point(self._device_id, name, pin, generation)
                    self._step(point, suppressed_one, Event.UNSUPPRESS, occasion, one, rules, outcome)


def _instant(reading: Mapping[str, Any], message_at: int) -> int:
    at: int | None = reading.get("timestamp")
    return message_at if at is None else at


def _usable(reading: Mapping[str, Any]) -> bool:
    """Whether a reading says something of the process."""
    if reading.get("value") is None or reading.get("quality", 0) >= _QUALITY_UNUSABLE or reading.get("revised"):
        return False
    flags = reading.get("flags")
    return not (flags and "unit_unknown" in flags)


def _coordinates(message: Mapping[str, Any]) -> tuple[int, int, int]:
    return message["raw_partition"], message["raw_offset"], message["raw_index"]


def _samples(message: Mapping[str, Any], rule_set: RuleSet) -> Iterator[_Sample]:
    """The readings that a set of rules takes."""
    by_type, several = rule_set.by_type, rule_set.several
    message_at, received_at = message["timestamp"], message["received_at"]
    partition, offset, index = _coordinates(message)
    for reading in message["readings"]:
        component_type = reading["component_type"]
        if (component_type in by_type or component_type in several) and _usable(reading):
            pin, value = reading["pin_position"], reading["value"]
            at = _instant(reading, message_at)
            yield _Sample(at, component_type, pin, value, received_at, partition, offset, index)


def _quiet(rule_set: RuleSet, rules: DeviceRules) -> list[Rule]:
    """The no-data rules of a set."""
    return [rule for rule in rules.no_data if rule.lateness_us == rule_set.lateness_us]


def _held(kept: Mapping[str, Any], lateness_us: int) -> dict[str, Any] | None:
    held: dict[str, Any] | None = kept.get("h", {}).get(str(lateness_us))
    return held


def _oldest_held(kept: Mapping[str, Any], lateness_us: int) -> int:
    """Event time of the oldest reading that waits; beyond all where none does."""
    held = _held(kept, lateness_us)
    return held["q"][0][0] if held is not None and held["q"] else TIMESTAMP_MAX_US


def _computed(rule: Rule, values: Sequence[float]) -> float | None:
    """What a rule's function says; None where the numbers do not allow an answer."""
    assert rule.function is not None
    try:
        value = float(rule.function(*values))
    except ARITHMETIC_ERRORS:
        return None
    return value if isfinite(value) else None


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


def _message(point: Point, rule: Rule, rules: DeviceRules, value: float | None, severity: str) -> str:
    threshold = rule.threshold_of(severity)
    fields = {
        "device_id": point.device_id,
        "name": rules.device_name,
        "rule": rule.name,
        "component_type": rule.component_type,
        "pin_position": point.pin_position,
        "value": "" if value is None else value,
        "unit": rule.unit,
        "threshold": "" if threshold is None else threshold,
        "severity": severity,
    }
    return render(rule.message, fields)


def _line(
    point: Point,
    transition: Transition,
    now: Occasion,
    rule: Rule | None,
    rules: DeviceRules,
    action: Action | None,
    chattering: bool,
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
        "group": rule.group if rule else "",
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


def _standing(
    point: Point,
    last: Transition,
    now: Occasion,
    rule: Rule | None,
    rules: DeviceRules,
    action: Action | None,
    chattering: bool,
) -> StandingDoc | None:
    alarm = last.alarm
    if alarm.state is State.NORMAL:
        return None
    return {
        **_line(point, last, now, rule, rules, action, chattering),
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
    more: dict[str, Any] = {}
    if watch.higher:
        more["h"] = [[int(one.active), one.since] for one in watch.higher]
    if watch.times:
        more["t"] = watch.times
    if watch.past:
        more["p"] = watch.past
    if alarm.first_out:
        more["f"] = 1
    if live.told:
        more["r"] = live.told
    if more:
        row.append(more)
    return row


def _unpack(row: _Row) -> _Live:
    more: dict[str, Any] = row[-1] if len(row) in (4, 16) else {}
    watch = Watch(
        row[0],
        bool(row[1]),
        row[2],
        [Watch(0, bool(active), since) for active, since in more.get("h", ())],
        list(more.get("t", ())),
        [list(one) for one in more.get("p", ())],
    )
    if len(row) <= 4:
        return _Live(watch, NEW)
    (state, active_at, occurrence, sequence, occurred_at, severity, text, cleared_at, value, raw, until, one_shot) = (
        row[3:15]
    )
    alarm = Alarm(
        State(state), watch.active, active_at, occurrence, sequence, occurred_at, severity, text, cleared_at, value,
        None if raw is None else Coordinates(*raw), until, bool(one_shot), bool(more.get("f")),
    )  # fmt: skip
    return _Live(watch, alarm, tuple(more.get("r", ())))
