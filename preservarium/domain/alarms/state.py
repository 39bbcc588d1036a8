"""What is remembered of a device's alarms: the state document of `tables/alarm_states.py`, and what of it is unpacked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from preservarium.domain.alarms.gone import Gone
from preservarium.domain.alarms.machine import NEW, Alarm, State
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.watch import Watch
from preservarium.domain.readings.lineage import Coordinates
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 1

#: Alarms (rule × pin) of one device that have state: 100 rules on 5 pins, about 100 KiB when every one is raised.
ALARMS_PER_DEVICE_MAX: Final = 500

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

#: Lengths of a row: with nothing but the watch, and of a normal alarm at most.
ROW_PLAIN, _ROW_NORMAL_MAX = 3, 4


@dataclass(slots=True)
class Live:
    """The state of one point (rule and pin), unpacked."""

    watch: Watch
    alarm: Alarm
    told: tuple[str, ...] = ()  #: recipients that the rule has named since the occurrence began
    component_type: str = ""  #: of the series, while the alarm is not normal


_UNUSED: Final = Live(Watch(), NEW)


class Generation:
    """The alarms of one device in one generation.

    Args:
        number: of the generation.
        kept: what the document has of it; `pack` brings it up to date.
    """

    __slots__ = ("_count", "checked", "kept", "number", "points")

    def __init__(self, number: int, kept: dict[str, Any]) -> None:
        self.number = number
        self.kept = kept
        #: (rule, pin) -> state, of those that were asked for
        self.points: dict[tuple[str, str], Live] = {}
        #: the rules that the state was last compared with
        self.checked: DeviceRules | None = None
        #: points that have state, unpacked or not; None: not counted yet
        self._count: int | None = None

    def point(self, rule: str, pin: str) -> Live | None:
        """A point's state, unpacked once; None where the device has too many."""
        live = self.points.get((rule, pin))
        if live is not None:
            return live
        pins = self.kept["a"].get(rule)
        row = pins.get(pin) if pins else None
        if row is not None:
            live = self.points[rule, pin] = unpack(row)
            return live
        count = self._counted()
        if count >= ALARMS_PER_DEVICE_MAX:
            return None
        self._count = count + 1
        live = self.points[rule, pin] = Live(Watch(), NEW)
        return live

    def pins(self, rule: str) -> set[str]:
        """The pins of a rule that have state."""
        return {*self.kept["a"].get(rule, {}), *(pin for name, pin in self.points if name == rule)}

    def everything(self) -> set[tuple[str, str]]:
        """(rule, pin) of everything that has state."""
        return {(rule, pin) for rule, pins in self.kept["a"].items() for pin in pins} | set(self.points)

    def gone(self, rules: DeviceRules) -> list[tuple[str, str, Gone]]:
        """(rule, pin, why) of everything that has state and is not watched any more, in order."""
        self.pack()
        return sorted((name, pin, why) for name, pin, why, _ in _gone(self.kept, rules))

    def forget(self, rule: str, pin: str) -> None:
        """Keep no state of a point."""
        self._count = self._counted() - 1
        self.points.pop((rule, pin), None)
        pins = self.kept["a"].get(rule, {})
        if pins.pop(pin, None) is not None and not pins:
            del self.kept["a"][rule]

    def forget_unused(self, rule: str, pin: str) -> None:
        """Keep no state for a pin that only actions have named: no reading, and normal."""
        if self.points[rule, pin] == _UNUSED:
            self.forget(rule, pin)

    def _counted(self) -> int:
        return len(self.everything()) if self._count is None else self._count

    def pack(self) -> None:
        """Bring `kept` up to date."""
        rows = self.kept["a"]
        for (rule, pin), live in self.points.items():
            pins = rows.get(rule)
            if pins is None:
                pins = rows[rule] = {}
            pins[pin] = _pack(live)


def held(kept: Mapping[str, Any], lateness_us: int) -> dict[str, Any] | None:
    """What waits to be put in order for so long."""
    found: dict[str, Any] | None = kept.get("h", {}).get(str(lateness_us))
    return found


def oldest_held(kept: Mapping[str, Any], lateness_us: int) -> int:
    """Event time of the oldest reading that waits; beyond all where none does."""
    found = held(kept, lateness_us)
    return found["q"][0][0] if found is not None and found["q"] else TIMESTAMP_MAX_US


def _pack(live: Live) -> _Row:
    watch, alarm = live.watch, live.alarm
    row: _Row = [watch.at, int(watch.active), watch.since]
    if alarm is NEW and not (watch.higher or watch.times or watch.past or live.told or live.component_type):
        return row
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
    if live.component_type:
        more["y"] = live.component_type
    if more:
        row.append(more)
    return row


def unpack(row: _Row) -> Live:
    """The state of a point as the document has it."""
    if len(row) == ROW_PLAIN:
        return Live(Watch(row[0], bool(row[1]), row[2]), NEW)
    more: dict[str, Any] = row[-1] if len(row) in (4, 16) else {}
    watch = Watch(
        row[0],
        bool(row[1]),
        row[2],
        [Watch(0, bool(active), since) for active, since in more.get("h", ())],
        list(more.get("t", ())),
        [list(one) for one in more.get("p", ())],
    )
    if len(row) <= _ROW_NORMAL_MAX:
        return Live(watch, NEW)
    (state, active_at, occurrence, sequence, occurred_at, severity, text, cleared_at, value, raw, until, one_shot) = (
        row[3:15]
    )
    alarm = Alarm(
        State(state), watch.active, active_at, occurrence, sequence, occurred_at, severity, text, cleared_at, value,
        None if raw is None else Coordinates(*raw), until, bool(one_shot), bool(more.get("f")),
    )  # fmt: skip
    return Live(watch, alarm, tuple(more.get("r", ())), more.get("y", ""))


def stands(kept: Mapping[str, Any]) -> bool:
    """Whether an alarm of the generation is not normal; of what was packed."""
    for pins in kept["a"].values():
        for row in pins.values():
            if len(row) > _ROW_NORMAL_MAX:
                return True
    return False


def is_watched(kept: Mapping[str, Any], rules: DeviceRules) -> bool:
    """Whether a rule watches every row of the generation; of what was packed."""
    return next(_gone(kept, rules), None) is None


def stands_without_rule(kept: Mapping[str, Any], rules: DeviceRules) -> bool:
    """Whether an alarm of the generation is not normal and not watched any more; of what was packed."""
    return any(standing for *_, standing in _gone(kept, rules))


def _gone(kept: Mapping[str, Any], rules: DeviceRules) -> Iterator[tuple[str, str, Gone, bool]]:
    """(rule, pin, why, whether it is not normal) of rows that no rule watches any more."""
    for name, pins in kept["a"].items():
        rule = rules.by_name.get(name)
        anywhere = rule is not None and rule.pin_position is None
        for pin, row in pins.items():
            if anywhere and len(row) == ROW_PLAIN:
                continue  # normal and watched: so are most
            more = row[-1] if len(row) in (4, 16) else {}
            why = rules.gone(name, pin, more.get("y", ""))
            if why is not None:
                yield name, pin, why, len(row) > _ROW_NORMAL_MAX
