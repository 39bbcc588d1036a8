"""Alarm rules: from registry documents to conditions that readings make true, in event time.

A rule watches one component type of a device, each pin on its own unless it names one. What it needs between readings
is a `Watch`: the condition as it stands, and since when the opposite is pending. `evaluate` takes one reading of a plain
rule (a threshold and nothing else) and `take` one of any rule; both say whether the condition changed. What follows
from that is the business of `alarm.py`. docs/ALARM_RULES.md shows every kind.

Time is the readings' own. A delay is over when two readings that are at least so far apart both say so, with none
between them that disagrees: one reading alone never satisfies a duration, however old it is. A silence longer than
`gap_max_s` starts a delay anew, since nobody knows what the value did meanwhile.

A reading that is not younger than the last one evaluated changes nothing (`Evaluation.LATE`): the history that people
were told of is not rewritten. Back-tests over stored data see it in its place, and `lateness_s` waits for it.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite
from typing import Any, Final, NamedTuple, NoReturn, cast

from preservarium.domain.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, RuleDoc
from preservarium.domain.expressions import compile_expression
from preservarium.domain.reading import TIMESTAMP_MIN_US
from preservarium.domain.schedule import Calendar, compile_calendar
from preservarium.domain.units import canonical

#: Rules that watch one device. Each costs a comparison for every reading of its component type.
RULES_PER_DEVICE_MAX: Final = 100

#: A message to people; mail subjects and SMS end far below it, and the state of a raised alarm holds it.
MESSAGE_CHARS_MAX: Final = 400

#: Gravest first.
SEVERITIES: Final = ("critical", "major", "minor", "warning", "indeterminate")

#: Kinds that compare one reading with a threshold.
THRESHOLDS: Final = ("high", "low")

KINDS: Final = (*THRESHOLDS, "rate", "deviation", "expression", "no_data")

#: Levels of a rule beyond its first: one for each severity.
LEVELS_MAX: Final = len(SEVERITIES) - 1

#: Readings that a repeat count waits for; each is kept in the state until then.
REPEAT_MAX: Final = 20

#: Parts of a rate's window: what is kept of it lies at least a part apart.
RATE_PARTS: Final = 8

#: Series that a rule may take in beside its own; what people can still explain to each other.
INPUTS_MAX: Final = 8

#: Durations of a rule. A year: longer ones are mistakes of a unit.
DURATION_S_MAX: Final = 366 * 86_400.0

#: How far back readings may be put in order; they are held in the state for so long.
LATENESS_S_MAX: Final = 7 * 86_400.0

#: In which an alarm is the first of its group, where no rule of it says otherwise.
FIRST_OUT_S_DEFAULT: Final = 60.0

_MESSAGES: Final[Mapping[str, str]] = {
    "high": "{name}: {component_type} is {value} {unit}, above {threshold} {unit}",
    "low": "{name}: {component_type} is {value} {unit}, below {threshold} {unit}",
    "rate": "{name}: {component_type} changes by {value} {unit}, more than {threshold} {unit}",
    "deviation": "{name}: {component_type} is off by {value} {unit}, more than {threshold} {unit}",
    "expression": "{name}: {rule}",
    "no_data": "{name}: no {component_type} for {threshold} {unit}",
}
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")

#: Fields that only some kinds of rule have; a field that a rule cannot use is refused, since it would mislead.
_FIELDS: Final[Mapping[str, tuple[str, ...]]] = {
    "threshold": (*THRESHOLDS, "rate", "deviation", "expression"),
    "deadband": (*THRESHOLDS, "rate", "deviation", "expression"),
    "levels": (*THRESHOLDS, "rate", "deviation", "expression"),
    "on_delay_s": (*THRESHOLDS, "rate", "deviation", "expression"),
    "off_delay_s": (*THRESHOLDS, "rate", "deviation", "expression"),
    "repeat": (*THRESHOLDS, "rate", "deviation", "expression"),
    "direction": ("rate", "deviation"),
    "window_s": ("rate",),
    "per_s": ("rate",),
    "setpoint": ("deviation",),
    "reference": ("deviation",),
    "expression": ("expression",),
    "inputs": ("expression",),
    "inputs_max_age_s": ("deviation", "expression"),
    "no_data_s": ("no_data",),
}
_PER: Final[Mapping[float, str]] = {1.0: "s", 60.0: "min", 3_600.0: "h", 86_400.0: "d"}

RuleLookup = Callable[[str], RuleDoc | None]
DatatypeLookup = Callable[[str], DatatypeDoc | None]


class Level(NamedTuple):
    """A severity and the threshold at which it begins."""

    severity: str
    threshold: float
    raise_over: float  #: as in `Rule`
    clear_at: float


class Input(NamedTuple):
    """A series that a rule takes in beside its own."""

    component_type: str
    pin_position: str | None  #: None: that of the alarm


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled rule. Thresholds are in the datatype's canonical unit, durations in µs of event time."""

    name: str
    rev: int
    component_type: str
    pin_position: str | None  #: None: each pin on its own
    kind: str  #: one of `KINDS`
    severity: str  #: of the first level
    threshold: float | None  #: of the first level; of no_data, seconds; None: an expression that is true or false
    sign: int  #: 1, or -1 where the condition lies below: value and limits are compared after multiplication with it
    raise_over: float  #: sign · threshold; the condition begins above it
    clear_at: float  #: the condition ends at or below it: raise_over − dead-band
    on_delay_us: int
    off_delay_us: int
    gap_max_us: int | None  #: a longer silence starts a delay anew
    unit: str  #: of threshold and value
    message: str
    recipients: tuple[str, ...]
    notified: tuple[str, ...]  #: the recipients and those of the escalation
    latching: bool  #: stays until an operator resets it, though the process has returned to normal
    acknowledge: bool  #: an operator must acknowledge it; otherwise the return to normal ends it
    plain: bool = True  #: `evaluate` is enough; of several series, for what their function says at a later instant
    levels: tuple[Level, ...] = ()  #: the graver ones, in order
    repeat: int = 1  #: readings within `repeat_us` that must meet the condition
    repeat_us: int = 0
    fold: Callable[[float], float] | None = None  #: rate, deviation: of the signed difference, what is compared
    setpoint: float = 0.0  #: of a deviation from a constant
    window_us: int = 0  #: of a rate
    per_us: int = 0  #: of a rate: its unit of time
    function: Callable[..., Any] | None = None  #: of several series: of the own value and those of `inputs`
    inputs: tuple[Input, ...] = ()
    everywhere: bool = False  #: of several series: neither it nor an input names a pin
    inputs_max_age_us: int = 0
    no_data_us: int = 0
    calendar: Calendar | None = None  #: when it watches; None: always
    group: str = ""
    group_master: bool = False  #: while its alarm is raised, the others of the group are suppressed
    first_out_us: int = 0
    lateness_us: int = 0

    def deadline(self, at: int) -> int | None:
        """When a series whose last reading is of `at` has been silent for too long; µs. None: never."""
        if self.calendar is None:
            return at + self.no_data_us
        return self.calendar.deadline(at, self.no_data_us)

    def told_at(self, at: int, heard_at: int | None) -> int | None:
        """When a clock may say that such a series is silent, µs; None: never. `heard_at`: `Watch.since` of a silence."""
        deadline = self.deadline(at)
        if deadline is None or heard_at is None:
            return deadline
        again = self.deadline(heard_at)
        return None if again is None else max(deadline, again)

    def severity_of(self, level: int) -> str:
        """The severity of a level; 0 is the first."""
        return self.levels[level - 1].severity if 0 < level <= len(self.levels) else self.severity

    def threshold_of(self, severity: str) -> float | None:
        """The threshold at which a severity begins."""
        return next((one.threshold for one in self.levels if one.severity == severity), self.threshold)


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of a device that wait equally long for late readings."""

    lateness_us: int
    by_type: Mapping[str, tuple[Rule, ...]]  #: of one series each
    several: Mapping[str, tuple[Rule, ...]]  #: of several series, under each component type that they take in
    ordered: bool  #: what readings say depends on what was said before of others: several series, groups
    silences: tuple[Rule, ...]  #: of no_data, in groups: they must be noticed before what comes later
    masters: bool  #: one of them is the master of a group


@dataclass(frozen=True, slots=True)
class DeviceRules:
    """The rules that watch one device."""

    device_name: str
    by_type: Mapping[str, tuple[Rule, ...]]  #: of one series each, that wait for no late readings
    by_name: Mapping[str, Rule]
    problems: tuple[str, ...] = ()  #: what of the configuration cannot be used, for people
    sets: tuple[RuleSet, ...] = ()
    no_data: tuple[Rule, ...] = ()
    groups: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)


NO_RULES: Final = DeviceRules("", {}, {})


def compile_rules(
    device: DeviceDoc, device_type: DeviceTypeDoc | None, rule: RuleLookup, datatype: DatatypeLookup
) -> DeviceRules:
    """The rules of one device: those of its type and its own, under its overrides.

    A rule that cannot be used is left out and named in `problems`: the others watch on.

    Args:
        device: the device. `rules` overrides fields by rule name; None switches a rule off; a name that the type
            does not have adds the rule.
        device_type: its type.
        rule: the catalogue's look-up by name.
        datatype: the catalogue's look-up by name, for the unit and the longest silence.
    """
    overrides = device.get("rules") or {}
    inherited = (device_type.get("rules") or []) if device_type else []
    # A device that is switched off sends nothing that is taken, and its silence is no alarm.
    names = list(dict.fromkeys([*inherited, *overrides])) if device.get("enabled", True) else []
    compiled: dict[str, Rule] = {}
    problems: list[str] = []
    for name in names:
        override = overrides.get(name, {})
        doc = rule(name)
        if override is None:
            continue
        if doc is None:
            problems.append(f"rule {name}: not in the registry")
            continue
        merged = cast(RuleDoc, {**doc, **override, "name": name})
        if not merged.get("enabled", True):
            continue
        if len(compiled) >= RULES_PER_DEVICE_MAX:
            problems.append(f"rule {name}: a device may have {RULES_PER_DEVICE_MAX} rules")
            continue
        try:
            compiled[name] = compile_rule(merged, datatype(merged["component_type"]), device.get("outages"))
        except (KeyError, TypeError, ValueError) as e:
            problems.append(f"rule {name}: {f'{e} is missing' if isinstance(e, KeyError) else e}")
    groups: dict[str, tuple[Rule, ...]] = {}
    for one in compiled.values():
        if one.group:
            groups[one.group] = (*groups.get(one.group, ()), one)
    sets = tuple(
        _rule_set(lateness_us, [one for one in compiled.values() if one.lateness_us == lateness_us])
        for lateness_us in sorted({one.lateness_us for one in compiled.values()})
    )
    return DeviceRules(
        device_name=device.get("name") or device["device_id"],
        by_type=sets[0].by_type if sets and not sets[0].lateness_us else {},
        by_name=compiled,
        problems=tuple(problems),
        sets=sets,
        no_data=tuple(one for one in compiled.values() if one.kind == "no_data"),
        groups=groups,
    )


def _rule_set(lateness_us: int, rules: Sequence[Rule]) -> RuleSet:
    by_type: dict[str, tuple[Rule, ...]] = {}
    several: dict[str, tuple[Rule, ...]] = {}
    for one in rules:
        if one.function is None:
            by_type[one.component_type] = (*by_type.get(one.component_type, ()), one)
            continue
        for component_type in dict.fromkeys([one.component_type, *(i.component_type for i in one.inputs)]):
            several[component_type] = (*several.get(component_type, ()), one)
    silences = tuple(one for one in rules if one.kind == "no_data" and one.group)
    masters = any(one.group_master for one in rules)
    return RuleSet(lateness_us, by_type, several, bool(several) or bool(silences) or masters, silences, masters)


def compile_rule(doc: RuleDoc, datatype: DatatypeDoc | None, outages: Any = None) -> Rule:
    """One rule.

    `parameters` may hold `latching` (bool), `acknowledge` (`operator`, the default, or `auto`) and `gap_max_s`
    (seconds; default: the datatype's `stale_after_s`, else unlimited).

    Args:
        doc: the rule, under the device's overrides.
        datatype: of its component type.
        outages: of the device, beside those of the rule.

    Raises:
        KeyError: a field is missing.
        ValueError: a field cannot be used; the message says which.
    """
    kind = doc["kind"]
    if kind not in KINDS:
        _refuse(f"there is no kind {kind!r}")
    if doc["severity"] not in SEVERITIES:
        _refuse(f"there is no severity {doc['severity']!r}")
    for name, kinds in _FIELDS.items():
        if doc.get(name) is not None and kind not in kinds:
            _refuse(f"{name}: a rule of kind {kind} has none")
    parameters = doc.get("parameters") or {}
    unknown = set(parameters) - {"acknowledge", "latching", "gap_max_s"}
    if unknown:
        _refuse(f"parameters: there is no {sorted(unknown)[0]!r}")
    acknowledge = parameters.get("acknowledge", "operator")
    if acknowledge not in ("operator", "auto"):
        _refuse(f"acknowledge is operator or auto, not {acknowledge!r}")
    unit = canonical(datatype["unit"])[0] if datatype else ""
    if not isinstance(parameters.get("latching", False), bool):
        _refuse("latching is true or false")
    gap_max = parameters.get("gap_max_s", datatype.get("stale_after_s") if datatype else None)
    own = _OWN[kind](doc, unit) if kind in _OWN else {}
    sign = -1 if kind == "low" else 1
    threshold = own.pop("threshold", None)
    if threshold is None and (kind != "expression" or doc.get("threshold") is not None):
        threshold = _number(doc, "threshold", None, least=0.0 if kind in ("rate", "deviation") else None)
    if threshold is None and doc.get("levels"):
        _refuse("levels: an expression that has levels has a threshold, too")
    if threshold is None and doc.get("deadband"):
        _refuse("deadband: an expression that has one has a threshold, too")
    deadband = _number(doc, "deadband", 0.0, least=0.0)
    on_delay_us = _duration(doc, "on_delay_s", 0.0)
    limit = sign * (threshold or 0.0)
    group = doc.get("group") or ""
    if not group and (doc.get("group_master") or doc.get("first_out_s") is not None):
        _refuse("group_master and first_out_s are of a rule that has a group")
    rule: dict[str, Any] = {
        "levels": _levels(doc, sign, limit, deadband),
        **_repeat(doc, on_delay_us),
        "calendar": compile_calendar(doc.get("schedule"), doc.get("outages"), outages),
        **own,
    }
    if kind == "no_data" and rule["calendar"] is not None and not _can_be_silent(doc, own["no_data_us"]):
        _refuse("no_data_s: its schedule has no span so long")
    compares = kind in THRESHOLDS or "function" in own
    plain = compares and not rule["levels"] and rule["repeat"] == 1 and rule["calendar"] is None
    return Rule(
        name=doc["name"],
        rev=doc["rev"],
        component_type=doc["component_type"],
        pin_position=doc.get("pin_position"),
        kind=kind,
        severity=doc["severity"],
        threshold=threshold,
        sign=sign,
        raise_over=limit,
        clear_at=limit - deadband,
        on_delay_us=on_delay_us,
        off_delay_us=_duration(doc, "off_delay_s", 0.0),
        gap_max_us=None if gap_max is None else round(float(gap_max) * 1e6),
        message=doc.get("message") or _MESSAGES[kind],
        recipients=tuple(doc.get("recipients") or ()),
        notified=tuple(
            dict.fromkeys(
                [
                    *(doc.get("recipients") or ()),
                    *(name for step in doc.get("escalation") or () for name in step["recipients"]),
                ]
            )
        ),
        everywhere=doc.get("pin_position") is None and all(i.pin_position is None for i in own.get("inputs", ())),
        latching=bool(parameters.get("latching", False)),
        acknowledge=acknowledge == "operator",
        plain=plain,
        group=group,
        group_master=bool(doc.get("group_master")),
        first_out_us=_duration(doc, "first_out_s", FIRST_OUT_S_DEFAULT),
        lateness_us=_duration(doc, "lateness_s", 0.0, most=LATENESS_S_MAX),
        **{"unit": unit, **rule},
    )


def _levels(doc: RuleDoc, sign: int, limit: float, deadband: float) -> tuple[Level, ...]:
    """Each graver than the one before and beyond it: so at most one severity holds at a time."""
    found = doc.get("levels") or []
    if len(found) > LEVELS_MAX:
        _refuse(f"levels: {len(found)} beside the first; {LEVELS_MAX} are allowed")
    levels: list[Level] = []
    severity, before = doc["severity"], limit
    for one in found:
        if set(one) != {"threshold", "severity"}:
            _refuse("levels: a level has threshold and severity")
        threshold = _number(one, "threshold", None)
        if one["severity"] not in SEVERITIES or SEVERITIES.index(one["severity"]) >= SEVERITIES.index(severity):
            _refuse(f"levels: {one['severity']!r} is not graver than {severity!r}")
        if sign * threshold <= before:
            _refuse(f"levels: {threshold:g} is not beyond {sign * before:g}")
        severity, before = one["severity"], sign * threshold
        levels.append(Level(severity, threshold, before, before - deadband))
    return tuple(levels)


def _repeat(doc: RuleDoc, on_delay_us: int) -> dict[str, int]:
    found = doc.get("repeat")
    if found is None:
        return {"repeat": 1, "repeat_us": 0}
    if set(found) != {"count", "within_s"}:
        _refuse("repeat: it has count and within_s")
    count = found["count"]
    if type(count) is not int or not 2 <= count <= REPEAT_MAX:
        _refuse(f"repeat: count is a whole number from 2 to {REPEAT_MAX}")
    if on_delay_us or doc.get("levels"):
        _refuse("repeat: a rule that counts has neither on_delay_s nor levels")
    return {"repeat": count, "repeat_us": _duration(found, "within_s", None, least=1e-6)}


def _rate(doc: RuleDoc, unit: str) -> dict[str, Any]:
    per_s = _number(doc, "per_s", None)
    if per_s not in _PER:
        _refuse("per_s: a rate is per 1, 60, 3600 or 86400 seconds")
    return {
        "fold": _direction(doc),
        "window_us": _duration(doc, "window_s", None, least=1e-6),
        "per_us": round(per_s * 1e6),
        "unit": f"{unit}/{_PER[per_s]}",
    }


def _deviation(doc: RuleDoc, unit: str) -> dict[str, Any]:
    reference = doc.get("reference")
    if (reference is None) == (doc.get("setpoint") is None):
        _refuse("a deviation is from a setpoint or from a reference")
    fold = _direction(doc)
    if reference is None:
        if doc.get("inputs_max_age_s") is not None:
            _refuse("inputs_max_age_s: a deviation from a setpoint has none")
        return {"fold": fold, "setpoint": _number(doc, "setpoint", None)}
    return {
        "function": lambda value, other: fold(value - other),
        "inputs": (_input("reference", reference),),
        "inputs_max_age_us": _duration(doc, "inputs_max_age_s", None, least=1e-6),
    }


def _expression(doc: RuleDoc, unit: str) -> dict[str, Any]:
    inputs = doc.get("inputs") or {}
    if len(inputs) > INPUTS_MAX:
        _refuse(f"inputs: {len(inputs)}; {INPUTS_MAX} are allowed")
    if "value" in inputs:
        _refuse("inputs: value is the rule's own series")
    return {
        "function": compile_expression(doc["expression"], ("value", *inputs)),
        "inputs": tuple(_input(f"inputs: {name}", one) for name, one in inputs.items()),
        # An expression over its own value alone takes in nothing that could be too old.
        "inputs_max_age_us": _duration(doc, "inputs_max_age_s", None if inputs else 0.0),
    }


def _no_data(doc: RuleDoc, unit: str) -> dict[str, Any]:
    wait_us = _duration(doc, "no_data_s", None, least=1.0)
    return {"no_data_us": wait_us, "threshold": wait_us / 1e6, "unit": "s"}


def _can_be_silent(doc: RuleDoc, wait_us: int) -> bool:
    week = compile_calendar(doc.get("schedule"))
    return week is None or week.deadline(TIMESTAMP_MIN_US, wait_us) is not None


_OWN: Final[Mapping[str, Callable[[RuleDoc, str], dict[str, Any]]]] = {
    "rate": _rate,
    "deviation": _deviation,
    "expression": _expression,
    "no_data": _no_data,
}


def _direction(doc: RuleDoc) -> Callable[[float], float]:
    folds: dict[str, Callable[[float], float]] = {"either": abs, "rise": _same, "fall": _opposite}
    direction = doc.get("direction") or "either"
    if direction not in folds:
        _refuse(f"direction is {', '.join(folds)}, not {direction!r}")
    return folds[direction]


def _same(difference: float) -> float:
    return difference


def _opposite(difference: float) -> float:
    return -difference


def _input(name: str, doc: Any) -> Input:
    if not isinstance(doc, Mapping) or set(doc) - {"component_type", "pin_position"} or "component_type" not in doc:
        _refuse(f"{name} has a component_type and perhaps a pin_position")
    return Input(doc["component_type"], doc.get("pin_position"))


def _duration(
    doc: Mapping[str, Any], key: str, default: float | None, least: float = 0.0, most: float = DURATION_S_MAX
) -> int:
    """A duration in seconds as µs."""
    seconds = _number(doc, key, default, least=least)
    if seconds > most:
        _refuse(f"{key} is more than {most:.0f}")
    return round(seconds * 1e6)


def _number(doc: Mapping[str, Any], key: str, default: float | None, least: float | None = None) -> float:
    value = doc.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    number = float(value)
    if not isfinite(number):
        _refuse(f"{key} is not finite")
    if least is not None and number < least:
        _refuse(f"{key} is less than {least:g}")
    return number


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fill `{name}` placeholders; unknown ones stay as they are.

    Not `str.format`: templates come from the registry, and format would let one reach into objects.
    """
    text = _PLACEHOLDER.sub(lambda m: _text(values[m[1]]) if m[1] in values else m[0], template)
    # A value without a unit leaves a gap before punctuation.
    return " ".join(text.replace(" ,", ",").split())[:MESSAGE_CHARS_MAX]


def _text(value: Any) -> str:
    # Twelve digits hide the noise of a unit conversion and none of what a sensor resolves.
    return f"{value:.12g}" if isinstance(value, float) else str(value)


# --- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Watch:
    """What one rule knows about one pin between readings. Instants are µs of event time."""

    at: int = 0  #: last reading evaluated; 0: none yet
    active: bool = False  #: the condition, after dead-band and delays
    #: when the opposite was first seen, while its delay runs; of a silence, while there is none, when a reading was
    #: received that came after its own deadline
    since: int | None = None
    higher: list["Watch"] = field(default_factory=list)  #: of the graver levels; their `at` is not used
    times: list[int] = field(default_factory=list)  #: of a repeat count: readings that met the condition
    past: list[list[Any]] = field(default_factory=list)  #: of a rate: [instant, value] of its window, and one before


def level_of(watch: Watch) -> int:
    """The gravest level that holds; 0 is the first."""
    level = 0
    for one in watch.higher:
        level += one.active
    return level


class Evaluation(StrEnum):
    """What a reading did to a watch."""

    UNCHANGED = "unchanged"
    PENDING = "pending"  #: a delay runs
    LATE = "late"  #: not younger than the last reading evaluated: nothing was changed
    RAISED = "raised"  #: the condition is now true
    RETURNED = "returned"  #: the condition is no longer true
    GRAVER = "graver"  #: the condition is true, and now of a graver level
    LESS_GRAVE = "less_grave"  #: it is true still, of a less grave level


class Verdict(NamedTuple):
    """An evaluation with its instant."""

    evaluation: Evaluation
    at: int  #: when the condition changed, µs of event time: the end of the delay; else the reading's time
    level: int = 0  #: which holds after it; of RETURNED, which held before
    value: float | None = None  #: what was compared, where that is not the reading itself


def evaluate(rule: Rule, watch: Watch, value: float, at: int) -> Verdict | None:
    """Take one reading of a plain rule into `watch`, in place; None where nothing changed, which is the common case.

    Args:
        rule: the rule.
        watch: its watch for the reading's pin.
        value: in the datatype's canonical unit; of several series, what their function says.
        at: the reading's own time, µs.
    """
    before = watch.at
    if at <= before:
        return Verdict(Evaluation.LATE, at)
    watch.at = at
    scaled = rule.sign * value
    # The two common answers, before anything is called.
    if watch.active:
        if scaled > rule.clear_at:
            watch.since = None
            return None
    elif scaled <= rule.raise_over:
        watch.since = None
        return None
    return _advance(rule, rule, watch, scaled, at, before)


def take(rule: Rule, watch: Watch, value: float | None, at: int, received_at: int | None = None) -> list[Verdict]:
    """Take one reading of any rule into `watch`, in place.

    Args:
        rule: the rule.
        watch: its watch for the reading's pin.
        value: in the datatype's canonical unit; of a rule of several series, what its function says, and None where
            that cannot be decided: what stands stays, and a delay that runs starts anew.
        at: the reading's own time, µs. Of several series, that of the newest: it may be the same again.
        received_at: for silence, when the reading was received, µs; None: only the readings' own time counts.

    Returns:
        What changed, in event time: a silence or a schedule's end may be told together with the reading's own change.
    """
    before = watch.at
    if at < before or (at == before and rule.function is None):
        return [Verdict(Evaluation.LATE, at)]
    if rule.no_data_us:
        return _take_presence(rule, watch, at, received_at)
    told: list[Verdict] = []
    watches = True
    if rule.calendar is not None:
        inside, end = rule.calendar.span(before)
        if not inside or end <= at:
            if watch.active:
                ended = end if inside else before  # or nobody was to watch, as the rule is now
                told.append(Verdict(Evaluation.RETURNED, ended, level_of(watch)))
            _forget(watch)
        watches = rule.calendar.span(at)[0]
    watch.at = at
    if not watches:
        return told
    compared = _compared(rule, watch, value, at, before)
    if compared is None:
        watch.since = None
        for one in watch.higher:
            one.since = None
        return told
    scaled = rule.sign * compared
    own = None if rule.fold is None and rule.function is None else compared
    if not rule.levels:
        verdict = _advance(rule, rule, watch, scaled, at, before)
        if verdict is not None:
            told.append(verdict if own is None or rule.threshold is None else verdict._replace(value=own))
        return told
    told += _take_levels(rule, watch, scaled, at, before, own)
    return told


def silent(rule: Rule, watch: Watch, at: int) -> Verdict | None:
    """Whether a no-data rule's series, whose next reading is of `at`, was silent for too long; marks it so, in place."""
    return _silent(rule, watch, at, None)


def overdue(rule: Rule, watch: Watch, now_us: int) -> Verdict | None:
    """Whether a no-data rule's series is silent for too long by a clock; marks it so, in place.

    A reading that was received after its own deadline shows that the series is heard of again, however old what it
    says: from then on a clock waits once more, while the alarm, if it comes, is still of the deadline of the readings.
    """
    return _silent(rule, watch, now_us, watch.since)


def _silent(rule: Rule, watch: Watch, now_us: int, heard_at: int | None) -> Verdict | None:
    if watch.active or not watch.at:
        return None
    deadline, told_at = rule.deadline(watch.at), rule.told_at(watch.at, heard_at)
    if deadline is None or told_at is None or told_at >= now_us:
        return None
    watch.active = True
    # Kept, because a reading that comes late after all cannot end the silence before it began.
    watch.since = deadline
    return Verdict(Evaluation.RAISED, deadline)


def _take_presence(rule: Rule, watch: Watch, at: int, received_at: int | None) -> list[Verdict]:
    told: list[Verdict] = []
    raised = silent(rule, watch, at)
    if raised is None and received_at is not None:
        # A clock would have said so before this came: it has the same history whether one was looked at or not.
        raised = overdue(rule, watch, received_at)
    if raised is not None:
        told.append(raised)
    if watch.active:
        told.append(Verdict(Evaluation.RETURNED, max(at, watch.since or 0)))
        watch.active = False
    watch.at, watch.since = at, None
    deadline = rule.deadline(at)
    if received_at is not None and deadline is not None and received_at > deadline:
        watch.since = received_at
    return told


def _compared(rule: Rule, watch: Watch, value: float | None, at: int, before: int) -> float | None:
    """The number that stands against the threshold; None: undecided."""
    if value is None or rule.fold is None:
        return value
    if not rule.window_us:
        return rule.fold(value - rule.setpoint)
    past = watch.past
    if rule.gap_max_us is not None and at - before > rule.gap_max_us:
        past.clear()
    oldest = at - rule.window_us
    # The youngest that lies a whole window back.
    found = bisect_right(past, oldest, key=lambda one: one[0])
    if found > 1:
        del past[: found - 1]
    rate = None
    if found:
        then, was = past[0]
        rate = rule.fold((value - was) / (at - then) * rule.per_us)
    if not past or at - past[-1][0] >= rule.window_us // RATE_PARTS:
        past.append([at, value])
    return rate


def _take_levels(rule: Rule, watch: Watch, scaled: float, at: int, before: int, own: float | None) -> Sequence[Verdict]:
    higher = watch.higher
    del higher[len(rule.levels) :]  # the rule had more of them before
    while len(higher) < len(rule.levels):
        higher.append(Watch())
    stood = level_of(watch)
    # The two common answers, before anything is called: nothing holds, or what holds goes on holding.
    if watch.active:
        top = rule.levels[stood - 1].clear_at if stood else rule.clear_at
        steady = scaled > top and (stood == len(higher) or scaled <= rule.levels[stood].raise_over)
    else:
        steady = scaled <= rule.raise_over
    if steady:
        watch.since = None
        for one in higher:
            one.since = None
        return ()
    changes = [_advance(rule, rule, watch, scaled, at, before)]
    changes += [_advance(rule, level, one, scaled, at, before) for level, one in zip(rule.levels, higher, strict=True)]
    #: instant -> levels that changed then; all of one reading are raised, or all return
    instants: dict[int, list[int]] = {}
    pending = False
    for number, change in enumerate(changes):
        if change is not None and change.evaluation in (Evaluation.RAISED, Evaluation.RETURNED):
            instants.setdefault(change.at, []).append(number)
        pending = pending or change is not None
    told: list[Verdict] = []
    for instant in sorted(instants):
        first, last = instants[instant][0], instants[instant][-1]
        if (changes[first] or _NOTHING).evaluation is Evaluation.RAISED:
            told.append(Verdict(Evaluation.GRAVER if first else Evaluation.RAISED, instant, last, own))
        elif first:
            told.append(Verdict(Evaluation.LESS_GRAVE, instant, first - 1, own))
            stood = first - 1
        else:
            told.append(Verdict(Evaluation.RETURNED, instant, stood, own))
    return told or ([Verdict(Evaluation.PENDING, at)] if pending else [])


_NOTHING: Final = Verdict(Evaluation.UNCHANGED, 0)


def _advance(rule: Rule, level: Rule | Level, watch: Watch, scaled: float, at: int, before: int) -> Verdict | None:
    """One level's condition, dead-band and delays."""
    if watch.active:
        if scaled > level.clear_at:
            watch.since = None
            return None
        delay_us = rule.off_delay_us
    else:
        if scaled <= level.raise_over:
            watch.since = None
            return None
        delay_us = rule.on_delay_us
        if rule.repeat > 1 and not _repeated(rule, watch, at):
            return Verdict(Evaluation.PENDING, at)
    changed_at = at
    if delay_us:
        since = watch.since
        if since is None or (rule.gap_max_us is not None and at - before > rule.gap_max_us):
            watch.since = at
            return Verdict(Evaluation.PENDING, at)
        if at - since < delay_us:
            return Verdict(Evaluation.PENDING, at)
        changed_at = since + delay_us
        watch.since = None
    watch.active = not watch.active
    return Verdict(Evaluation.RAISED if watch.active else Evaluation.RETURNED, changed_at)


def _repeated(rule: Rule, watch: Watch, at: int) -> bool:
    """Count a reading that meets the condition; whether there are enough within the window now."""
    times = watch.times
    if not times or times[-1] < at:
        times.append(at)
    while times[0] < at - rule.repeat_us:
        del times[0]
    if len(times) < rule.repeat:
        return False
    times.clear()
    return True


def _forget(watch: Watch) -> None:
    """Begin anew, because nobody watched for a while."""
    watch.active, watch.since = False, None
    watch.higher.clear()
    watch.times.clear()
    watch.past.clear()
