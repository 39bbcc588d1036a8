"""The short way of readings that change nothing: by far the most, so it is made to cost little.

A device is calm where every row of its state is watched, none waits for time, and its rules look at one reading alone (`calm_rules`).
Then a reading on the quiet side of its thresholds moves the instant of its row and does nothing else, and neither rows nor alarms need
be unpacked. What is not so takes the way of `observation.py`, which gives the same: a property test holds both to that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from preservarium.domain.alarms.rule import CalmRules, Rule, RuleSet
from preservarium.domain.alarms.state import ROW_PLAIN
from preservarium.domain.readings.lineage import take

#: What a generation holds besides its rows while something waits for time, or for another series.
_WAITING = frozenset({"until", "i", "h", "s"})


def calm_rules(sets: Sequence[RuleSet]) -> CalmRules | None:
    """What the short way needs of a device's rules; None where they need more than one reading or the time."""
    if len(sets) != 1 or sets[0].lateness_us or sets[0].ordered:
        return None
    found = sets[0].by_type
    if not all(rule.plain and rule.function is None for rules in found.values() for rule in rules):
        return None
    return {component_type: tuple(_of(rule) for rule in rules) for component_type, rules in found.items()}


def _of(rule: Rule) -> tuple[str, str | None, int, float]:
    return rule.name, rule.pin_position, rule.sign, rule.raise_over


def waits(kept: Mapping[str, Any]) -> bool:
    """Whether something of a generation waits for more than its next reading."""
    return not _WAITING.isdisjoint(kept)


def stays_calm(
    message: Mapping[str, Any], rules: CalmRules, kept: dict[str, Any], usable: Callable[[Mapping[str, Any]], bool]
) -> int | None:
    """Take a message all of whose readings change nothing.

    Args:
        message: a validated message.
        rules: of its device.
        kept: the generation of its device; changed in place.
        usable: whether a reading says something of the process.

    Returns:
        How many readings a rule took, -1 where the message was applied before; None: it must go the long way, and nothing was changed.
    """
    rows = kept["a"]
    at = message["timestamp"]
    evaluated = 0
    moved: list[tuple[list[Any], int, Any]] = []
    for reading in message["readings"]:
        watching = rules.get(reading["component_type"])
        if watching is None or not usable(reading):
            continue
        if "timestamp" in reading:
            break
        evaluated += 1
        value, pin = reading["value"], reading["pin_position"]
        for name, own_pin, sign, raise_over in watching:
            if own_pin is not None and own_pin != pin:
                continue
            pins = rows.get(name)
            row = pins.get(pin) if pins else None
            if row is None or len(row) != ROW_PLAIN or row[1] or at <= row[0] or not sign * value <= raise_over:
                break
            moved.append((row, row[0], row[2]))
            row[0], row[2] = at, None
        else:
            continue
        break
    else:
        return evaluated if take(kept["m"], message) else _undo(moved, -1)
    return _undo(moved, None)


def _undo(moved: list[tuple[list[Any], int, Any]], answer: int | None) -> int | None:
    for row, at, since in reversed(moved):
        row[0], row[2] = at, since
    return answer
