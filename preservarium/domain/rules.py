"""Alarm rules: from registry documents to conditions that readings make true, in event time.

A rule watches one component type of a device, each pin on its own unless it names one. What it needs between readings
is a `Watch`: the condition as it stands, and since when the opposite is pending. `evaluate` takes one reading and says
whether the condition changed; what follows from that is the business of `alarm.py`.

Time is the readings' own. A delay is over when two readings that are at least so far apart both say so, with none
between them that disagrees: one reading alone never satisfies a duration, however old it is. A silence longer than
`gap_max_s` starts a delay anew, since nobody knows what the value did meanwhile.

A reading that is not younger than the last one evaluated changes nothing (`Evaluation.LATE`): the history that people
were told of is not rewritten. Back-tests over stored data see it in its place.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from typing import Any, Final, Literal, NamedTuple, cast

from preservarium.domain.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, RuleDoc
from preservarium.domain.units import canonical

#: Rules that watch one device. Each costs a comparison for every reading of its component type.
RULES_PER_DEVICE_MAX: Final = 100

#: A message to people; mail subjects and SMS end far below it, and the state of a raised alarm holds it.
MESSAGE_CHARS_MAX: Final = 400

SEVERITIES: Final = ("critical", "major", "minor", "warning", "indeterminate")

_MESSAGE_HIGH: Final = "{name}: {component_type} is {value} {unit}, above {threshold} {unit}"
_MESSAGE_LOW: Final = "{name}: {component_type} is {value} {unit}, below {threshold} {unit}"
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")

RuleLookup = Callable[[str], RuleDoc | None]
DatatypeLookup = Callable[[str], DatatypeDoc | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """A compiled rule. Thresholds are in the datatype's canonical unit, durations in µs of event time."""

    name: str
    rev: int
    component_type: str
    pin_position: str | None  #: None: each pin on its own
    kind: Literal["high", "low"]
    severity: str
    threshold: float
    sign: int  #: 1 high, -1 low: value and limits are compared after multiplication with it
    raise_over: float  #: sign · threshold; the condition begins above it
    clear_at: float  #: the condition ends at or below it: raise_over − dead-band
    on_delay_us: int
    off_delay_us: int
    gap_max_us: int | None  #: a longer silence starts a delay anew
    unit: str
    message: str
    recipients: tuple[str, ...]
    latching: bool  #: stays until an operator resets it, though the process has returned to normal
    acknowledge: bool  #: an operator must acknowledge it; otherwise the return to normal ends it


@dataclass(frozen=True, slots=True)
class DeviceRules:
    """The rules that watch one device."""

    device_name: str
    by_type: Mapping[str, tuple[Rule, ...]]
    by_name: Mapping[str, Rule]
    problems: tuple[str, ...] = ()  #: what of the configuration cannot be used, for people


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
    names = list(dict.fromkeys([*inherited, *overrides]))
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
            compiled[name] = compile_rule(merged, datatype(merged["component_type"]))
        except (KeyError, TypeError, ValueError) as e:
            problems.append(f"rule {name}: {f'{e} is missing' if isinstance(e, KeyError) else e}")
    by_type: dict[str, tuple[Rule, ...]] = {}
    for one in compiled.values():
        by_type[one.component_type] = (*by_type.get(one.component_type, ()), one)
    return DeviceRules(device.get("name") or device["device_id"], by_type, compiled, tuple(problems))


def compile_rule(doc: RuleDoc, datatype: DatatypeDoc | None) -> Rule:
    """One rule.

    `parameters` may hold `latching` (bool), `acknowledge` (`operator`, the default, or `auto`) and `gap_max_s`
    (seconds; default: the datatype's `stale_after_s`, else unlimited).

    Raises:
        KeyError: a field is missing.
        ValueError: a field cannot be used; the message says which.
    """
    kind = doc["kind"]
    if kind not in ("high", "low"):
        _refuse(f"there is no kind {kind!r}")
    if doc["severity"] not in SEVERITIES:
        _refuse(f"there is no severity {doc['severity']!r}")
    parameters = doc.get("parameters") or {}
    acknowledge = parameters.get("acknowledge", "operator")
    if acknowledge not in ("operator", "auto"):
        _refuse(f"acknowledge is operator or auto, not {acknowledge!r}")
    threshold = _number(doc, "threshold", None)
    gap_max = parameters.get("gap_max_s", datatype.get("stale_after_s") if datatype else None)
    sign = 1 if kind == "high" else -1
    return Rule(
        name=doc["name"],
        rev=doc["rev"],
        component_type=doc["component_type"],
        pin_position=doc.get("pin_position"),
        kind=cast(Literal["high", "low"], kind),
        severity=doc["severity"],
        threshold=threshold,
        sign=sign,
        raise_over=sign * threshold,
        clear_at=sign * threshold - _number(doc, "deadband", 0.0, least=0.0),
        on_delay_us=round(_number(doc, "on_delay_s", 0.0, least=0.0) * 1e6),
        off_delay_us=round(_number(doc, "off_delay_s", 0.0, least=0.0) * 1e6),
        gap_max_us=None if gap_max is None else round(float(gap_max) * 1e6),
        unit=canonical(datatype["unit"])[0] if datatype else "",
        message=doc.get("message") or (_MESSAGE_HIGH if kind == "high" else _MESSAGE_LOW),
        recipients=tuple(doc.get("recipients") or ()),
        latching=bool(parameters.get("latching", False)),
        acknowledge=acknowledge == "operator",
    )


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


def _refuse(text: str) -> None:
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
    since: int | None = None  #: when the opposite was first seen, while its delay runs


class Evaluation(StrEnum):
    """What a reading did to a watch."""

    UNCHANGED = "unchanged"
    PENDING = "pending"  #: a delay runs
    LATE = "late"  #: not younger than the last reading evaluated: nothing was changed
    RAISED = "raised"  #: the condition is now true
    RETURNED = "returned"  #: the condition is no longer true


class Verdict(NamedTuple):
    """An evaluation with its instant."""

    evaluation: Evaluation
    at: int  #: when the condition changed, µs of event time: the end of the delay; else the reading's time


def evaluate(rule: Rule, watch: Watch, value: float, at: int) -> Verdict | None:
    """Take one reading into `watch`, in place; None where nothing changed, which is the common case.

    Args:
        rule: the rule.
        watch: its watch for the reading's pin.
        value: in the datatype's canonical unit.
        at: the reading's own time, µs.
    """
    before = watch.at
    if at <= before:
        return Verdict(Evaluation.LATE, at)
    watch.at = at
    scaled = rule.sign * value
    if watch.active:
        if scaled > rule.clear_at:
            watch.since = None
            return None
        delay_us = rule.off_delay_us
    else:
        if scaled <= rule.raise_over:
            watch.since = None
            return None
        delay_us = rule.on_delay_us
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
