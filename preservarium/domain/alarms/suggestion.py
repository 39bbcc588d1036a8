"""What would calm an alarm: the smallest dead-band, on-delay or off-delay that spares nine tenths of its transitions.

Each candidate is played through the code that runs live (`Playback`), over the readings as they were. A larger dead-band
never makes more transitions, and neither does a longer delay as a rule, so the ladders of candidates are searched by
halves, and what is found is what was measured, not what was supposed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from preservarium.domain.alarms.history import Difference, History, Playback, compare
from preservarium.domain.alarms.rule import DeviceRules

#: Share of the transitions that must be spared.
SPARED: Final = 0.9
#: Fewer transitions need no calming, and of few nothing can be learnt.
TRANSITIONS_MIN: Final = 20

#: Steps of a decade that people read easily.
_STEPS: Final = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
#: Decades below the largest dead-band.
_DECADES: Final = 3
#: Delays that people would set, up to what is a shift.
DELAYS_S: Final = (
    5,
    10,
    15,
    20,
    30,
    45,
    60,
    90,
    120,
    180,
    300,
    600,
    900,
    1_200,
    1_800,
    2_700,
    3_600,
    7_200,
    14_400,
    28_800,
)


class Measured(NamedTuple):
    """What a rule does over the readings."""

    transitions: int
    raised: int
    returned: int
    active_us: int
    history: History


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A changed parameter and what it does."""

    parameter: str  #: deadband, off_delay_s, on_delay_s
    value: float
    before: float  #: as the rule has it
    transitions: int
    spared: float  #: share of the transitions
    raised: int
    active_us: int
    difference: Difference  #: from the rule as it is

    def document(self) -> dict[str, Any]:
        """As JSON; durations in seconds."""
        return {
            "parameter": self.parameter,
            "value": self.value,
            "before": self.before,
            "transitions": self.transitions,
            "spared": self.spared,
            "raised": self.raised,
            "active_s": self.active_us / 1e6,
            "against_live": self.difference.document(),
        }


@dataclass(slots=True)
class Advice:
    """What was found; the best first."""

    transitions: int  #: under the rule as it is
    raised: int
    active_us: int
    chatter: int
    suggestions: list[Suggestion] = field(default_factory=list)
    tried: int = 0  #: candidates that were played through

    @property
    def calm(self) -> bool:
        """Whether there is nothing to spare."""
        return self.transitions < TRANSITIONS_MIN


def deadbands(scale: float) -> list[float]:
    """Candidates up to `scale` (in the reading's unit), ascending: six in a decade."""
    if not scale > 0:
        return []
    exponent = 0
    while 10.0**exponent < scale:
        exponent += 1
    while 10.0 ** (exponent - 1) >= scale:
        exponent -= 1
    ladder = [step * 10.0**power for power in range(exponent - _DECADES - 1, exponent + 1) for step in _STEPS]
    return [float(f"{one:.3g}") for one in ladder if scale / 10.0**_DECADES <= one <= scale]


def advise(
    messages: Sequence[Mapping[str, Any]],
    device_id: str,
    rule: Mapping[str, Any],
    compiled: Callable[[Mapping[str, Any]], DeviceRules],
    to_us: int,
) -> Advice:
    """Find what would calm an alarm of one device.

    Args:
        messages: the device's readings in the order of event time, as `DeviceAlarms.observe` takes them.
        device_id: the device.
        rule: the rule with the device's overrides in it.
        compiled: the device's rules with the rule replaced by another; raises ValueError where that cannot be used.
        to_us: end of the time, µs.
    """
    name = rule["name"]

    def measure(changes: Mapping[str, Any]) -> Measured:
        playback = Playback(device_id, compiled({**rule, **changes}), frozenset({name}))
        for message in messages:
            playback.take(message)
        history = playback.close(to_us)
        tallies = history.tallies.values()
        return Measured(
            sum(t.transitions for t in tallies),
            sum(t.raised for t in tallies),
            sum(t.cleared for t in tallies),
            sum(t.active_us for t in tallies),
            history,
        )

    now = measure({})
    advice = Advice(now.transitions, now.raised, now.active_us, sum(t.chatter for t in now.history.tallies.values()))
    if advice.calm:
        return advice
    enough = now.transitions * (1 - SPARED)
    ladders = {
        "deadband": deadbands(_scale(messages, rule)),
        "off_delay_s": [float(one) for one in DELAYS_S],
        "on_delay_s": [float(one) for one in DELAYS_S],
    }
    for parameter, ladder in ladders.items():
        before = float(rule.get(parameter) or 0.0)
        candidates = [one for one in ladder if one > before]
        found: dict[int, Measured] = {}
        low, high = 0, len(candidates)  # the first that is enough lies in low … high; high is none
        try:
            while low < high:
                middle = (low + high) // 2
                found[middle] = measure({parameter: candidates[middle]})
                advice.tried += 1
                if found[middle].transitions <= enough:
                    high = middle
                else:
                    low = middle + 1
        except ValueError:
            continue  # a rule of its kind has no such parameter
        best = found.get(high)
        if best is None or not best.raised:
            continue  # none is enough, or nothing at all would be told any more
        if parameter == "deadband" and best.returned == 0:
            continue  # so wide that nothing ever ended it
        difference = Difference()
        for key in now.history.spans.keys() | best.history.spans.keys():
            difference.add(compare(best.history.spans.get(key, ()), now.history.spans.get(key, ())))
        advice.suggestions.append(
            Suggestion(
                parameter=parameter,
                value=candidates[high],
                before=before,
                transitions=best.transitions,
                spared=1 - best.transitions / now.transitions,
                raised=best.raised,
                active_us=best.active_us,
                difference=difference,
            )
        )
    # The one under which the alarm stands for about as long as it does now changes its meaning least.
    advice.suggestions.sort(key=lambda one: abs(one.active_us - now.active_us))
    return advice


def _scale(messages: Sequence[Mapping[str, Any]], rule: Mapping[str, Any]) -> float:
    """The largest dead-band that could mean something: how far the readings range."""
    low, high = float("inf"), float("-inf")
    for message in messages:
        for reading in message["readings"]:
            value = reading.get("value")
            if value is not None and reading["component_type"] == rule["component_type"]:
                low, high = min(low, value), max(high, value)
    return high - low if high > low else 0.0
