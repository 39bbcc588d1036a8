"""What alarms did over a time: how often, how long, how nervously; and how two histories of one process differ.

Fed with transitions as `DeviceAlarms` gives them, in the order of event time, one device after the other. Instants and
durations are µs of event time. An alarm lasts from `occurred_at` to `cleared_at`: acknowledging changes nothing of that.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, NamedTuple

from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.turn import CHATTER_RAISES, CHATTER_US

#: End of an alarm that still stands, in a history: after every instant.
OPEN: Final = 1 << 62


class AlarmKey(NamedTuple):
    """Which alarm: a rule on a pin of a device."""

    device_id: str
    rule: str
    pin_position: str


@dataclass(slots=True)
class Tally:
    """What one alarm did."""

    raised: int = 0
    cleared: int = 0
    active_us: int = 0  #: in all; of one that still stands, to the end of the time looked at
    longest_us: int = 0
    standing: int = 0  #: 1 where it stands at the end
    chatter: int = 0  #: times that it was raised as the third or later within a minute
    suppressed: int = (
        0  #: times that a master of its group suppressed it while it stood; what was never raised counts nowhere
    )
    first_out: int = 0  #: times that it was raised first of its group
    severity: str = ""  #: of the last time that it was raised
    first_at: int | None = None
    last_at: int | None = None

    @property
    def transitions(self) -> int:
        """Raised and cleared: what a dead-band or a delay could have spared."""
        return self.raised + self.cleared

    def document(self) -> dict[str, Any]:
        """As JSON; durations in seconds."""
        return {
            "severity": self.severity,
            "raised": self.raised,
            "transitions": self.transitions,
            "active_s": self.active_us / 1e6,
            "longest_s": self.longest_us / 1e6,
            "mean_s": self.active_us / self.raised / 1e6 if self.raised else None,
            "standing": self.standing,
            "chatter": self.chatter,
            "suppressed": self.suppressed,
            "first_out": self.first_out,
            "first_at": self.first_at,
            "last_at": self.last_at,
        }


class History:
    """The alarms of one device under one set of rules.

    Args:
        device_id: the device.
        rules: names of the rules whose alarms count; None: all.
    """

    def __init__(self, device_id: str, rules: frozenset[str] | None = None) -> None:
        self._device_id = device_id
        self._rules = rules
        self.tallies: dict[AlarmKey, Tally] = {}
        self.spans: dict[AlarmKey, array[int]] = {}
        #: recipient -> transitions that it would be told of
        self.told: dict[str, int] = {}
        self._recent: dict[AlarmKey, list[int]] = {}

    def take(self, transitions: Iterable[Mapping[str, Any]]) -> None:
        """Take transitions; others than those of the process and of its group change nothing."""
        for one in transitions:
            word = one["transition"]
            if word not in ("raised", "cleared", "suppressed") or (
                self._rules is not None and one["rule"] not in self._rules
            ):
                continue
            key = AlarmKey(self._device_id, one["rule"], one["pin_position"])
            if word == "suppressed":
                self.tallies.setdefault(key, Tally()).suppressed += 1
                continue
            for recipient in one["recipients"]:
                self.told[recipient] = self.told.get(recipient, 0) + 1
            if word == "raised":
                self._raised(key, one["occurred_at"], one["severity"], bool(one.get("first_out")))
            else:
                self._cleared(key, one["cleared_at"])

    def _raised(self, key: AlarmKey, at: int, severity: str, first_out: bool) -> None:
        tally = self.tallies.setdefault(key, Tally())
        spans = self.spans.setdefault(key, array("q"))
        if tally.standing:  # the same occurrence once more, e.g. after it was suppressed
            return
        tally.standing = 1
        tally.raised += 1
        tally.first_out += first_out
        tally.severity = severity
        tally.first_at = at if tally.first_at is None else tally.first_at
        tally.last_at = at
        spans.extend((at, OPEN))
        recent = self._recent.setdefault(key, [])
        recent.append(at)
        if len(recent) >= CHATTER_RAISES:
            tally.chatter += at - recent[-CHATTER_RAISES] <= CHATTER_US
            del recent[: -CHATTER_RAISES + 1]

    def _cleared(self, key: AlarmKey, at: int) -> None:
        tally = self.tallies.get(key)
        if tally is None or not tally.standing:
            return
        tally.standing = 0
        tally.cleared += 1
        spans = self.spans[key]
        spans[-1] = max(at, spans[-2])
        self._lasted(tally, spans[-1] - spans[-2])

    @staticmethod
    def _lasted(tally: Tally, lasted_us: int) -> None:
        tally.active_us += lasted_us
        tally.longest_us = max(tally.longest_us, lasted_us)

    def close(self, to_us: int) -> None:
        """The time looked at ends; what stands, stands until then."""
        for key, tally in self.tallies.items():
            if tally.standing:
                spans = self.spans[key]
                spans[-1] = max(to_us, spans[-2])
                self._lasted(tally, spans[-1] - spans[-2])


class Playback:
    """One device's readings through one set of rules, as a worker would see them if nothing ever came late.

    Args:
        device_id: the device.
        rules: its rules.
        names: rules whose alarms count; None: all.
        heard: called with what is told.
    """

    def __init__(
        self,
        device_id: str,
        rules: DeviceRules,
        names: frozenset[str] | None = None,
        heard: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
    ) -> None:
        self.history = History(device_id, names)
        self._heard = heard
        self._alarms = DeviceAlarms(device_id)
        self._rules = rules
        #: whether readings wait for others: what the rules say then also depends on what is said to them together
        self._waits = any(one.lateness_us for one in rules.sets)

    def take(self, message: Mapping[str, Any]) -> None:
        """Take a message; they come in the order of their times, and so do the readings of one.

        Silence needs no tick on the way: a series' next reading says the same with the same times, and in a group every
        instant does.
        """
        if not self._waits:
            self._observe(message)
            return
        readings: Sequence[Mapping[str, Any]] = message["readings"]
        start = 0
        for now_us, together in groupby(readings, lambda reading: _instant(reading, message)):
            self._tick(now_us)
            instant = list(together)
            part = {"raw_index": message["raw_index"] + start, "timestamp": now_us, "received_at": now_us}
            self._observe({**message, **part, "readings": instant})
            start += len(instant)

    def _observe(self, message: Mapping[str, Any]) -> None:
        outcome = self._alarms.observe(message, self._rules, as_received=False)
        if outcome.transitions:
            self._tell(outcome.transitions)

    def close(self, to_us: int) -> History:
        """Let time pass to the end."""
        self._tick(to_us)
        self.history.close(to_us)
        return self.history

    def _tick(self, now_us: int) -> None:
        outcome = self._alarms.tick(now_us, self._rules)
        if outcome.transitions:
            self._tell(outcome.transitions)

    def _tell(self, transitions: Sequence[Mapping[str, Any]]) -> None:
        self.history.take(transitions)
        if self._heard is not None:
            self._heard(transitions)


def _instant(reading: Mapping[str, Any], message: Mapping[str, Any]) -> int:
    at: int = reading.get("timestamp", message["timestamp"])
    return at


@dataclass(slots=True)
class Difference:
    """How alarms under new rules differ from those under the old ones."""

    both: int = 0  #: alarms that stood at the same time under both, paired one to one
    only_new: int = 0
    only_old: int = 0
    active_new_us: int = 0
    active_old_us: int = 0
    #: of the pairs: by how much the new one lasted longer (negative: shorter), in all
    longer_us: int = 0

    def add(self, other: "Difference") -> None:
        """Take in another."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def document(self) -> dict[str, Any]:
        """As JSON; durations in seconds."""
        return {
            "both": self.both,
            "only_new": self.only_new,
            "only_live": self.only_old,
            "active_new_s": self.active_new_us / 1e6,
            "active_live_s": self.active_old_us / 1e6,
            "pairs_longer_s": self.longer_us / 1e6,
        }


def compare(new: Sequence[int], old: Sequence[int]) -> Difference:
    """Compare when an alarm stood under new rules with when it stood under old ones.

    Alarms that overlap in time (or touch) are the same event seen by both; each is paired once, the earliest first. So
    of ten short alarms in the time of a long one, one is in both and nine are on one side only.

    Args:
        new: begin, end, begin, end, … in order.
        old: the same.
    """
    found = Difference(active_new_us=_length(new), active_old_us=_length(old))
    i = j = 0
    while i < len(new) and j < len(old):
        if new[i + 1] < old[j]:
            found.only_new += 1
            i += 2
        elif old[j + 1] < new[i]:
            found.only_old += 1
            j += 2
        else:
            found.both += 1
            found.longer_us += (new[i + 1] - new[i]) - (old[j + 1] - old[j])
            i += 2
            j += 2
    found.only_new += (len(new) - i) // 2
    found.only_old += (len(old) - j) // 2
    return found


def _length(spans: Sequence[int]) -> int:
    return sum(spans[1::2]) - sum(spans[::2])
