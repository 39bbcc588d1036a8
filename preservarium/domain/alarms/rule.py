"""An alarm rule as it is when it is compiled: what it watches, when its condition holds, whom it tells of it.

A rule watches one component type of a device, each pin on its own unless it names one. docs/ALARM_RULES.md shows every
kind; `rules.py` makes them, `evaluation.py` takes readings by them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import sub
from typing import Any, Final, NamedTuple

from preservarium.domain.alarms.gone import Gone
from preservarium.domain.alarms.schedule import Calendar

#: A message to people; mail subjects and SMS end far below it, and the state of a raised alarm holds it.
MESSAGE_CHARS_MAX: Final = 400

#: Gravest first.
SEVERITIES: Final = ("critical", "major", "minor", "warning", "indeterminate")

#: Kinds that compare one reading with a threshold.
THRESHOLDS: Final = ("high", "low")

KINDS: Final = (*THRESHOLDS, "rate", "deviation", "expression", "no_data")

_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")


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
    difference: Callable[[float, float], float] = sub  #: rate, deviation: from the second number to the first
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


#: Component type -> of each rule that watches it: name, pin or None, sign, and where its condition begins.
CalmRules = Mapping[str, tuple[tuple[str, str | None, int, float], ...]]


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
    #: for the short way of readings that change nothing (calm.py); None: there is none
    calm: CalmRules | None = None
    #: why rules that the registry has for the device do not watch it; "" names the device itself
    left_out: Mapping[str, Gone] = field(default_factory=dict)

    def gone(self, name: str, pin: str, component_type: str) -> Gone | None:
        """Why nothing watches an alarm any more; None where its rule does.

        Args:
            name: of its rule.
            pin: its pin.
            component_type: of the series in which it occurred; "" where that is not known.
        """
        rule = self.by_name.get(name)
        if rule is None:
            return self.left_out.get("") or self.left_out.get(name) or Gone.RULE_REMOVED
        if rule.pin_position not in (None, pin) or component_type not in ("", rule.component_type):
            return Gone.RULE_MOVED
        return None


NO_RULES: Final = DeviceRules("", {}, {})
#: Of a device that is not registered.
NO_DEVICE: Final = DeviceRules("", {}, {}, left_out={"": Gone.DEVICE_REMOVED})


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fill `{name}` placeholders; unknown ones stay as they are, and a value that is not there (None) is a dash.

    Not `str.format`: templates come from the registry, and format would let one reach into objects.
    """
    text = _PLACEHOLDER.sub(lambda m: _text(values[m[1]]) if m[1] in values else m[0], template)
    # A value without a unit leaves a gap before punctuation.
    return " ".join(text.replace(" ,", ",").split())[:MESSAGE_CHARS_MAX]


def measured(value: float | None, unit: str) -> str:
    """A value for people, with its unit; "" where there is none."""
    return "" if value is None else f"{_text(value)} {unit}".rstrip()


def _text(value: Any) -> str:
    if value is None:
        return "–"
    # Twelve digits hide the noise of a unit conversion and none of what a sensor resolves.
    return f"{value:.12g}" if isinstance(value, float) else str(value)
