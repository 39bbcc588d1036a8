"""Alarm rules: from registry documents to what watches a device.

A rule that cannot be used is left out and said to be: the others watch on. What is of one kind of rule only is in
`rule_kinds.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

from preservarium.domain.alarms.calm import calm_rules
from preservarium.domain.alarms.gone import Gone
from preservarium.domain.alarms.rule import KINDS, SEVERITIES, THRESHOLDS, DeviceRules, Level, Rule, RuleSet
from preservarium.domain.alarms.rule_fields import duration_us, number_of, refuse
from preservarium.domain.alarms.rule_kinds import FIELDS, MESSAGES, OWN_FIELDS, can_be_silent
from preservarium.domain.alarms.schedule import compile_calendar
from preservarium.domain.readings.units import canonical
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, RuleDoc, datatype_of

#: Rules that watch one device. Each costs a comparison for every reading of its component type.
RULES_PER_DEVICE_MAX: Final = 100

#: Levels of a rule beyond its first: one for each severity.
LEVELS_MAX: Final = len(SEVERITIES) - 1

#: Readings that a repeat count waits for; each is kept in the state until then.
REPEAT_MAX: Final = 20

#: How far back readings may be put in order; they are held in the state for so long.
LATENESS_S_MAX: Final = 7 * 86_400.0

#: In which an alarm is the first of its group, where no rule of it says otherwise.
FIRST_OUT_S_DEFAULT: Final = 60.0

RuleLookup = Callable[[str], RuleDoc | None]
DatatypeLookup = Callable[[str], DatatypeDoc | None]


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
        datatype: the catalogue's look-up by name, for the unit, the period and the longest silence; a type and a device may
            override what it finds.
    """
    overrides = device.get("rules") or {}
    inherited = (device_type.get("rules") or []) if device_type else []
    # A device that is switched off sends nothing that is taken, and its silence is no alarm.
    names = list(dict.fromkeys([*inherited, *overrides])) if device.get("enabled", True) else []
    compiled: dict[str, Rule] = {}
    problems: list[str] = []
    left_out: dict[str, Gone] = {} if device.get("enabled", True) else {"": Gone.DEVICE_DISABLED}
    for name in names:
        override = overrides.get(name, {})
        doc = rule(name)
        if override is None:
            left_out[name] = Gone.RULE_DISABLED
            continue
        if doc is None:
            problems.append(f"rule {name}: not in the registry")
            continue
        merged = cast(RuleDoc, {**doc, **override, "name": name})
        if not merged.get("enabled", True):
            left_out[name] = Gone.RULE_DISABLED
            continue
        if len(compiled) >= RULES_PER_DEVICE_MAX:
            left_out[name] = Gone.RULE_UNUSABLE
            problems.append(f"rule {name}: a device may have {RULES_PER_DEVICE_MAX} rules")
            continue
        try:
            component_type = merged["component_type"]
            effective = datatype_of(datatype(component_type), component_type, device_type, device)
            compiled[name] = compile_rule(merged, effective, device.get("outages"))
        except (KeyError, TypeError, ValueError) as e:
            left_out[name] = Gone.RULE_UNUSABLE
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
        calm=calm_rules(sets),
        left_out=left_out,
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
        datatype: of its component type, as it is for the device.
        outages: of the device, beside those of the rule.

    Raises:
        KeyError: a field is missing.
        ValueError: a field cannot be used; the message says which.
    """
    kind = doc["kind"]
    if kind not in KINDS:
        refuse(f"there is no kind {kind!r}")
    if doc["severity"] not in SEVERITIES:
        refuse(f"there is no severity {doc['severity']!r}")
    for name, kinds in FIELDS.items():
        if doc.get(name) is not None and kind not in kinds:
            refuse(f"{name}: a rule of kind {kind} has none")
    parameters = doc.get("parameters") or {}
    unknown = set(parameters) - {"acknowledge", "latching", "gap_max_s"}
    if unknown:
        refuse(f"parameters: there is no {sorted(unknown)[0]!r}")
    acknowledge = parameters.get("acknowledge", "operator")
    if acknowledge not in ("operator", "auto"):
        refuse(f"acknowledge is operator or auto, not {acknowledge!r}")
    unit = canonical(datatype["unit"])[0] if datatype else ""
    if not isinstance(parameters.get("latching", False), bool):
        refuse("latching is true or false")
    gap_max = parameters.get("gap_max_s", datatype.get("stale_after_s") if datatype else None)
    own = OWN_FIELDS[kind](doc, unit, datatype or {}) if kind in OWN_FIELDS else {}
    sign = -1 if kind == "low" else 1
    threshold = own.pop("threshold", None)
    if threshold is None and (kind != "expression" or doc.get("threshold") is not None):
        threshold = number_of(doc, "threshold", None, least=0.0 if kind in ("rate", "deviation") else None)
    if threshold is None and doc.get("levels"):
        refuse("levels: an expression that has levels has a threshold, too")
    if threshold is None and doc.get("deadband"):
        refuse("deadband: an expression that has one has a threshold, too")
    deadband = number_of(doc, "deadband", 0.0, least=0.0)
    on_delay_us = duration_us(doc, "on_delay_s", 0.0)
    limit = sign * (threshold or 0.0)
    group = doc.get("group") or ""
    if not group and (doc.get("group_master") or doc.get("first_out_s") is not None):
        refuse("group_master and first_out_s are of a rule that has a group")
    rule: dict[str, Any] = {
        "levels": _levels(doc, sign, limit, deadband),
        **_repeat(doc, on_delay_us),
        "calendar": compile_calendar(doc.get("schedule"), doc.get("outages"), outages),
        **own,
    }
    if kind == "no_data" and rule["calendar"] is not None and not can_be_silent(doc, own["no_data_us"]):
        refuse("no_data_s: its schedule has no span so long")
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
        off_delay_us=duration_us(doc, "off_delay_s", 0.0),
        gap_max_us=None if gap_max is None else round(float(gap_max) * 1e6),
        message=doc.get("message") or MESSAGES[kind],
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
        first_out_us=duration_us(doc, "first_out_s", FIRST_OUT_S_DEFAULT),
        lateness_us=duration_us(doc, "lateness_s", 0.0, most=LATENESS_S_MAX),
        **{"unit": unit, **rule},
    )


def _levels(doc: RuleDoc, sign: int, limit: float, deadband: float) -> tuple[Level, ...]:
    """Each graver than the one before and beyond it: so at most one severity holds at a time."""
    found = doc.get("levels") or []
    if len(found) > LEVELS_MAX:
        refuse(f"levels: {len(found)} beside the first; {LEVELS_MAX} are allowed")
    levels: list[Level] = []
    severity, before = doc["severity"], limit
    for one in found:
        if set(one) != {"threshold", "severity"}:
            refuse("levels: a level has threshold and severity")
        threshold = number_of(one, "threshold", None)
        if one["severity"] not in SEVERITIES or SEVERITIES.index(one["severity"]) >= SEVERITIES.index(severity):
            refuse(f"levels: {one['severity']!r} is not graver than {severity!r}")
        if sign * threshold <= before:
            refuse(f"levels: {threshold:g} is not beyond {sign * before:g}")
        severity, before = one["severity"], sign * threshold
        levels.append(Level(severity, threshold, before, before - deadband))
    return tuple(levels)


def _repeat(doc: RuleDoc, on_delay_us: int) -> dict[str, int]:
    found = doc.get("repeat")
    if found is None:
        return {"repeat": 1, "repeat_us": 0}
    if set(found) != {"count", "within_s"}:
        refuse("repeat: it has count and within_s")
    count = found["count"]
    if type(count) is not int or not 2 <= count <= REPEAT_MAX:
        refuse(f"repeat: count is a whole number from 2 to {REPEAT_MAX}")
    if on_delay_us or doc.get("levels"):
        refuse("repeat: a rule that counts has neither on_delay_s nor levels")
    return {"repeat": count, "repeat_us": duration_us(found, "within_s", None, least=1e-6)}
