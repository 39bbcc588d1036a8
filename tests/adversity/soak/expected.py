"""What the stores should hold, computed from the messages alone. Pure, and shares no code with the product."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import fsum
from typing import Final, TypeVar

US: Final = 1_000_000

K = TypeVar("K")
V = TypeVar("V")

#: Component types of a message, and which of its numbers each is.
COMPONENTS: Final = ("temperature", "number")

#: (device, component type, window's size in s, window's start in s)
WindowKey = tuple[str, str, int, int]
#: count, sum, min, max, last, last's instant in µs
WindowValue = tuple[int, float, float, float, float, int]
#: (device, rule, transition, its instant in µs)
Transition = tuple[str, str, str, int]


@dataclass(slots=True)
class Expected:
    """Of all messages."""

    readings: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)  #: (device, instant) -> values
    windows: dict[WindowKey, WindowValue] = field(default_factory=dict)
    transitions: set[Transition] = field(default_factory=set)
    standing: set[tuple[str, str]] = field(default_factory=set)  #: (device, rule) of alarms that are active at the end
    repeated: int = 0  #: messages that the raw topic holds twice


def expect(
    messages: Iterable[tuple[str, int, int, float]],
    sizes_s: Iterable[int],
    threshold: float,
    silent_s: int,
) -> Expected:
    """Expect of messages, in the order of each device's time.

    Args:
        messages: (device, instant in µs, number, temperature).
        sizes_s: of windows.
        threshold: above it an alarm is raised; nothing lies within its dead-band.
        silent_s: a device that says nothing for longer has an alarm.
    """
    found = Expected()
    devices: dict[str, list[tuple[int, int, float]]] = {}
    for device, at_us, number, temperature in messages:
        if (device, at_us) in found.readings:
            found.repeated += 1
            continue
        found.readings[device, at_us] = (temperature, float(number))
        devices.setdefault(device, []).append((at_us, number, temperature))
    for device, said in devices.items():
        said.sort()
        _alarms(found, device, said, threshold, silent_s * US)
        for size_s in sizes_s:
            _windows(found.windows, device, said, size_s)
    return found


def _alarms(found: Expected, device: str, said: list[tuple[int, int, float]], threshold: float, silent_us: int) -> None:
    hot = False
    before_us: int | None = None
    for at_us, _, temperature in said:
        if before_us is not None and at_us - before_us > silent_us:
            found.transitions.add((device, "silent", "raised", before_us + silent_us))
            found.transitions.add((device, "silent", "cleared", at_us))
        before_us = at_us
        if (temperature > threshold) != hot:
            hot = not hot
            found.transitions.add((device, "hot", "raised" if hot else "cleared", at_us))
    assert before_us is not None
    # Everybody is silent in the end, and the run is not over before that is found.
    found.transitions.add((device, "silent", "raised", before_us + silent_us))
    found.standing.add((device, "silent"))
    if hot:
        found.standing.add((device, "hot"))


def _windows(
    windows: dict[WindowKey, WindowValue], device: str, said: list[tuple[int, int, float]], size_s: int
) -> None:
    panes: dict[int, list[tuple[int, int, float]]] = {}
    for one in said:
        panes.setdefault(one[0] // US // size_s * size_s, []).append(one)
    for start_s, pane in panes.items():
        last = pane[-1]
        for component, values, final in (
            ("temperature", [t for _, _, t in pane], last[2]),
            ("number", [float(n) for _, n, _ in pane], float(last[1])),
        ):
            windows[device, component, size_s, start_s] = (
                len(pane), fsum(values), min(values), max(values), final, last[0],
            )  # fmt: skip


@dataclass(slots=True)
class Verdict:
    """What a store holds beside what it should."""

    expected: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0  #: there and otherwise than it should be, or there and not to be expected
    examples: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether there is nothing to complain of."""
        return not (self.lost or self.doubled or self.wrong)

    def say(self, text: str) -> None:
        """Keep an example, of the first few."""
        if len(self.examples) < 20:
            self.examples.append(text)


def compare(expected: Mapping[K, V], rows: Iterable[tuple[K, V]]) -> Verdict:
    """Each expected key once, with its value, and no other."""
    verdict = Verdict(expected=len(expected))
    seen: set[K] = set()
    for key, value in rows:
        if key in seen:
            verdict.doubled += 1
            verdict.say(f"doubled {key}: {value}")
        elif key not in expected:
            verdict.wrong += 1
            verdict.say(f"not expected {key}: {value}")
        elif expected[key] != value:
            verdict.wrong += 1
            verdict.say(f"wrong {key}: {value}, expected {expected[key]}")
        seen.add(key)
    for key in expected.keys() - seen:
        verdict.lost += 1
        verdict.say(f"lost {key}: {expected[key]}")
    return verdict
