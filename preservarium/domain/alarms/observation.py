"""Readings become what happens to alarms: straight from their message, in the order of event time, or as silence.

Most readings are evaluated as they come. Rules with a `lateness_s` wait until none that is older is to be expected; rules
of several series, and groups, take what one instant says as a whole.
"""

from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, Final, NamedTuple

from preservarium.domain.alarms.evaluation import evaluate, take
from preservarium.domain.alarms.machine import Event, Occasion
from preservarium.domain.alarms.rule import DeviceRules, Rule, RuleSet
from preservarium.domain.alarms.silence import overdue, silent
from preservarium.domain.alarms.state import ALARMS_PER_DEVICE_MAX, Live, held, oldest_held
from preservarium.domain.alarms.turn import Turn
from preservarium.domain.alarms.watch import Evaluation, Verdict, Watch
from preservarium.domain.expressions import ARITHMETIC_ERRORS
from preservarium.domain.readings.lineage import Coordinates
from preservarium.domain.readings.reading import TIMESTAMP_MIN_US, Quality

#: Series of one device that rules of several series may take in; as many as it may have alarms.
INPUTS_PER_DEVICE_MAX: Final = ALARMS_PER_DEVICE_MAX

#: Readings of one device that wait to be put in order, for each `lateness_s`; about 100 bytes each. Where there are more,
#: the oldest waits no longer.
HELD_PER_DEVICE_MAX: Final = 256

#: Readings of this quality (fail, missing) say nothing about the process.
_QUALITY_UNUSABLE: Final = int(Quality.FAIL)

_EVENTS: Final[Mapping[Evaluation, Event]] = {
    Evaluation.RAISED: Event.RAISE,
    Evaluation.GRAVER: Event.RAISE_SEVERITY,
    Evaluation.LESS_GRAVE: Event.LOWER_SEVERITY,
}


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


def observe(turn: Turn, message: Mapping[str, Any]) -> None:
    """Take the readings of one validated message."""
    for one in turn.rules.sets:
        if not one.lateness_us and not one.ordered:
            _straight(turn, message, one)
            continue
        samples = sorted(_samples(message, one))
        if not one.lateness_us:
            turn.outcome.evaluated += len(samples)
            _evaluate(turn, samples, one)
        elif samples or held(turn.state.kept, one.lateness_us) is not None:
            _hold(turn, message, samples, one)


def pass_time(turn: Turn, now_us: int) -> None:
    """Evaluate what has waited for others long enough, and notice what is silent."""
    kept = turn.state.kept
    for one in turn.rules.sets:
        waiting = held(kept, one.lateness_us) if one.lateness_us else None
        if waiting is not None and waiting["q"] and waiting["seen"] + one.lateness_us <= now_us:
            _release(turn, len(waiting["q"]), one)
        # What still waits may be what a series is waited for.
        shown = min(now_us - one.lateness_us, oldest_held(kept, one.lateness_us))
        _notice(turn, _quiet(one, turn.rules), overdue, shown, now_us)


def wait_anew(turn: Turn) -> None:
    """Let readings wait as the rules are now."""
    kept, sets = turn.state.kept, turn.rules.sets
    waited = {str(one.lateness_us) for one in sets}
    for lateness in [one for one in kept.get("i", {}) if one not in waited]:
        del kept["i"][lateness]
    for lateness in [one for one in kept.get("h", {}) if one not in waited]:
        # Rules that waited so long wait otherwise now: what others have evaluated already is late to them.
        samples = [_Sample(*sample) for sample in kept["h"].pop(lateness)["q"]]
        for one in sets:
            waiting = held(kept, one.lateness_us)
            if waiting is not None:
                waiting["q"] = sorted([*waiting["q"], *map(list, samples)])
            else:
                _evaluate(turn, samples, one)


def _straight(turn: Turn, message: Mapping[str, Any], rule_set: RuleSet) -> None:
    """Readings straight from their message: the way of most."""
    by_type = rule_set.by_type
    points, outcome = turn.state.points, turn.outcome
    message_at = message["timestamp"]
    received_at = message["received_at"] if turn.as_received else None
    readings = message["readings"]
    for reading in readings:
        if "timestamp" in reading:
            readings = sorted(readings, key=lambda reading: _instant(reading, message_at))
            break
    evaluated = 0
    for reading in readings:
        watching = by_type.get(reading["component_type"])
        if watching is None or not usable(reading):
            continue
        evaluated += 1
        value = reading["value"]
        at = reading.get("timestamp")
        if at is None:
            at = message_at
        pin = reading["pin_position"]
        late = False
        for rule in watching:
            if rule.pin_position is not None and rule.pin_position != pin:
                continue
            live = points.get((rule.name, pin)) or turn.live(rule.name, pin)
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
            late = _told(turn, live, rule, pin, verdicts, sample) or late
        if late:
            outcome.late += 1
    outcome.evaluated += evaluated


def _hold(turn: Turn, message: Mapping[str, Any], samples: Sequence[_Sample], rule_set: RuleSet) -> None:
    """Keep readings until none that is older is to be expected, then evaluate them in the order of event time."""
    turn.outcome.evaluated += len(samples)
    waiting = turn.state.kept.setdefault("h", {}).setdefault(str(rule_set.lateness_us), {"q": [], "to": 0, "seen": 0})
    queue: list[Any] = waiting["q"]
    for sample in samples:
        insort(queue, list(sample))
    waiting["to"] = max([waiting["to"], *(sample.at for sample in samples)])
    waiting["seen"] = max(waiting["seen"], message["received_at"])
    ready = waiting["to"] - rule_set.lateness_us
    count = next((i for i, sample in enumerate(queue) if sample[0] >= ready), len(queue))
    _release(turn, max(count, len(queue) - HELD_PER_DEVICE_MAX), rule_set)


def _release(turn: Turn, count: int, rule_set: RuleSet) -> None:
    queue: list[Any] = turn.state.kept["h"][str(rule_set.lateness_us)]["q"]
    samples = [_Sample(*sample) for sample in queue[:count]]
    del queue[:count]
    _evaluate(turn, samples, rule_set)


def _evaluate(turn: Turn, samples: Sequence[_Sample], rule_set: RuleSet) -> None:
    """Samples in order. What one instant says is taken in as a whole, masters of groups first."""
    known: dict[str, dict[str, list[Any]]] = {}
    if rule_set.several and samples:
        known = turn.state.kept.setdefault("i", {}).setdefault(str(rule_set.lateness_us), {})
    start = 0
    while start < len(samples):
        end = start
        while end < len(samples) and samples[end].at == samples[start].at:
            end += 1
        together = samples[start:end]
        if rule_set.silences:
            first = together[0]
            _notice(turn, rule_set.silences, silent, first.at, first.received_at)
            received_at = _received(turn, first, rule_set.lateness_us)
            if received_at is not None:
                _notice(turn, rule_set.silences, overdue, received_at, received_at)
        inputs = _take_inputs(turn, known, together, rule_set) if rule_set.several else {}
        late: set[int] = set()
        for masters in (True, False) if rule_set.masters else (False,):
            for number, sample in enumerate(together):
                for rule in rule_set.by_type.get(sample.component_type, ()):
                    if (
                        rule.group_master is masters
                        and rule.pin_position in (None, sample.pin_position)
                        and _single(turn, rule, sample)
                    ):
                        late.add(number)
            for (_, pin), (rule, sample) in inputs.items():
                if rule.group_master is masters:
                    _several(turn, known, rule, pin, sample)
        turn.outcome.late += len(late)
        start = end


def _received(turn: Turn, sample: _Sample, lateness_us: int) -> int | None:
    """Up to where a clock tells of silence before a sample is taken; None: not at all."""
    return sample.received_at - lateness_us if turn.as_received else None


def _notice(
    turn: Turn,
    watching: Sequence[Rule],
    found_by: Callable[[Rule, Watch, int], Verdict | None],
    now: int,
    detected_at: int,
) -> None:
    """Raise what no-data rules have to say at `now`, in the order of the deadlines, masters of groups first."""
    found: list[tuple[int, bool, str, str, Live]] = []
    for rule in watching:
        for pin in turn.state.pins(rule.name):
            live = turn.live(rule.name, pin)
            if live is None or rule.pin_position not in (None, pin):
                continue
            verdict = found_by(rule, live.watch, now)
            if verdict is not None:
                found.append((verdict.at, not rule.group_master, rule.name, pin, live))
    for at, _, name, pin, live in sorted(found, key=lambda one: one[:4]):
        nothing = _Sample(at, "", pin, 0.0, detected_at, 0, 0, 0)
        _told(turn, live, turn.rules.by_name[name], pin, (Verdict(Evaluation.RAISED, at),), nothing)


def _single(turn: Turn, rule: Rule, sample: _Sample) -> bool:
    """Evaluate a rule of one series; whether the sample was late."""
    live = turn.live(rule.name, sample.pin_position)
    if live is None:
        return False
    verdicts = take(rule, live.watch, sample.value, sample.at, _received(turn, sample, rule.lateness_us))
    if not verdicts:
        return False
    return _told(turn, live, rule, sample.pin_position, verdicts, sample)


def _take_inputs(
    turn: Turn, known: dict[str, dict[str, list[Any]]], samples: Sequence[_Sample], rule_set: RuleSet
) -> dict[tuple[str, str], tuple[Rule, _Sample]]:
    """Remember what rules of several series take in; (rule, pin) that it concerns -> the newest of the samples."""
    concerned: dict[tuple[str, str], tuple[Rule, _Sample]] = {}
    for sample in samples:
        watching = rule_set.several.get(sample.component_type)
        if watching is None:
            continue
        pins = known.setdefault(sample.component_type, {})
        before = pins.get(sample.pin_position)
        if before is None:
            if sum(map(len, known.values())) >= INPUTS_PER_DEVICE_MAX:
                turn.outcome.limited = True
                continue
        elif sample.at <= before[0]:
            turn.outcome.late += 1
            continue
        pin = sample.pin_position
        pins[pin] = [sample.at, sample.value]
        for rule in watching:
            if rule.everywhere:
                # Where its own series is not there yet, nothing comes of it.
                concerned[rule.name, pin] = rule, sample
            else:
                for one in _pins(rule, sample, known):
                    concerned[rule.name, one] = rule, sample
    return concerned


def _pins(rule: Rule, sample: _Sample, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The pins of a rule of several series that a sample says something of."""
    if rule.pin_position is not None:
        return [rule.pin_position]
    own = known.get(rule.component_type, {})
    for taken in rule.inputs:
        # A pin that the rule names concerns every pin of its own.
        if taken.pin_position == sample.pin_position and taken.component_type == sample.component_type:
            return sorted(own)
    return [sample.pin_position] if sample.pin_position in own else []


def _several(turn: Turn, known: Mapping[str, Mapping[str, Any]], rule: Rule, pin: str, sample: _Sample) -> None:
    """Evaluate a rule of several series, at the instant of the newest of them."""
    series = known.get(rule.component_type)
    own = series.get(pin) if series else None
    if own is None:
        return  # its own series is not there yet: no alarm to keep a state for
    live = turn.state.points.get((rule.name, pin)) or turn.live(rule.name, pin)
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
    _told(turn, live, rule, pin, verdicts, sample._replace(value=own[1]))


def _told(turn: Turn, live: Live, rule: Rule, pin: str, verdicts: Sequence[Verdict], sample: _Sample) -> bool:
    """Let the alarm know what a reading changed; whether the reading was late."""
    late = False
    for verdict in verdicts:
        if verdict.evaluation is Evaluation.LATE:
            late = True
        elif verdict.evaluation is Evaluation.RETURNED:
            event = Event.RETURN if rule.acknowledge else Event.RETURN_AUTO
            event = Event.RETURN_LATCHING if rule.latching else event
            _happens(turn, live, rule, pin, event, verdict, sample)
        elif verdict.evaluation is not Evaluation.PENDING:
            _happens(turn, live, rule, pin, _EVENTS[verdict.evaluation], verdict, sample)
    return late


def _happens(turn: Turn, live: Live, rule: Rule, pin: str, event: Event, verdict: Verdict, sample: _Sample) -> None:
    value: float | None = sample.value if verdict.value is None else verdict.value
    raw: Coordinates | None = Coordinates(sample.raw_partition, sample.raw_offset, sample.raw_index)
    if rule.no_data_us and event is Event.RAISE:
        value = raw = None  # nothing came: that is the evidence
    severity = rule.severity_of(verdict.level)
    now = Occasion(verdict.at, sample.received_at, severity, value=value, raw=raw)
    turn.happens(pin, live, event, now, rule)


def _instant(reading: Mapping[str, Any], message_at: int) -> int:
    at: int | None = reading.get("timestamp")
    return message_at if at is None else at


def usable(reading: Mapping[str, Any]) -> bool:
    """Whether a reading says something of the process."""
    if reading.get("value") is None or reading.get("quality", 0) >= _QUALITY_UNUSABLE or reading.get("revised"):
        return False
    return "flags" not in reading or "unit_unknown" not in (reading["flags"] or ())


def _coordinates(message: Mapping[str, Any]) -> tuple[int, int, int]:
    return message["raw_partition"], message["raw_offset"], message["raw_index"]


def _samples(message: Mapping[str, Any], rule_set: RuleSet) -> Iterator[_Sample]:
    """The readings that a set of rules takes."""
    by_type, several = rule_set.by_type, rule_set.several
    message_at, received_at = message["timestamp"], message["received_at"]
    partition, offset, index = _coordinates(message)
    for reading in message["readings"]:
        component_type = reading["component_type"]
        if (component_type in by_type or component_type in several) and usable(reading):
            pin, value = reading["pin_position"], reading["value"]
            at = _instant(reading, message_at)
            yield _Sample(at, component_type, pin, value, received_at, partition, offset, index)


def _quiet(rule_set: RuleSet, rules: DeviceRules) -> list[Rule]:
    """The no-data rules of a set."""
    return [rule for rule in rules.no_data if rule.lateness_us == rule_set.lateness_us]


def _computed(rule: Rule, values: Sequence[float]) -> float | None:
    """What a rule's function says; None where the numbers do not allow an answer."""
    assert rule.function is not None
    try:
        value = float(rule.function(*values))
    except ARITHMETIC_ERRORS:
        return None
    return value if isfinite(value) else None
