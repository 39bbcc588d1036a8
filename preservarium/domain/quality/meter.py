"""A meter from state to state: what it consumed, told glitches apart from resets.

Two states tell what domain/quality/counter.py says. But a device may send a zero or garbage and then go on where it was. At the fall
nobody can tell that from a reset; what comes next can. So a meter's usual step is remembered, and the level that it fell from:

- At an unexplained fall what it shows is told at once where that is a few usual steps; else it waits for the next state. It never counts
  where it is near the old level, or a thousand usual steps: a meter that starts at zero was not there yet.
- Back at its old level, by more than a few usual steps, it was there all the time (glitch): what was consumed since that level counts,
  less what was told meanwhile. What was told too much is taken from what follows.
- Going on from where it fell to, it was reset, and what waited is told. A rise of more than a few usual steps waits first.
- A rise by a thousand usual steps (jump) waits for the next state likewise: it stays up there, or it was garbage.
- A rollover is told at once where it is as plausible as that, and remembered like a fall.

What is unknown or in doubt is said by the event of a step, and in the flags of its reading.
"""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.quality.counter import Counter, State, Step, noise, step
from preservarium.domain.readings.reading import Quality

#: Behind the name of a counter's datatype: the series of what it consumed between readings.
CONSUMPTION_SUFFIX: Final = "_consumption"

#: What leaves a part of a step's consumption unknown or in doubt -> flag.
_DOUBTS: Final = {
    "reset": "counter_reset",
    "glitch": "counter_glitch",
    "jump": "counter_jump",
    "swap_unread": "counter_swap",
}

#: A fall to more than this share of the state is none to zero. (Home Assistant's limit between a dip and a reset.)
_NEAR_SHARE: Final = 0.9
#: A meter comes by itself to where it was before a fall in at most so many usual steps; a longer one is the end of a glitch.
_GROWTH_STEPS: Final = 4
#: More usual steps at once than any use of a meter: garbage, or long unseen. Garbage of 16 or 32 bits is mostly more.
_GARBAGE_STEPS: Final = 1_000
#: Steps after which the usual one is known, and states after which a fall is history.
_KNOWN_STEPS: Final = 8

# A list, because there are many and they are written for every batch: instant, state that counts (the highest, where noise
# followed), finest step, number of steps up to _KNOWN_STEPS, usual step and µs that it takes, what was told too much, doubt.

_AT, _VALUE, _FINEST, _SEEN, _STEP, _SPAN, _OWED, _DOUBT = range(8)

# A doubt: why, the level before, what was told since, what waits, states since.
_WHY, _LEVEL, _TOLD, _DUE, _SINCE = range(5)

Meter = list[Any]


def first_state(at: int, value: float) -> Meter:
    """A meter of which one state is known."""
    return [at, value, 0.0, 0, 0.0, 0.0, 0.0, None]


def advance(meter: Meter, at: int, value: float, counter: Counter) -> Step | None:
    """Take the next state of a meter in.

    Args:
        meter: what is known of it (`first_state`); changed in place.
        at: of the state, µs since the epoch, UTC.
        value: what it shows, at least 0.
        counter: how it counts.

    Returns:
        What is told of the time since the state before; None where it is not younger than that.
    """
    if at <= meter[_AT]:
        return None
    if any(meter[_AT] < swap.at <= at for swap in counter.swaps):
        told = _swapped(meter, at, value, counter)
    elif meter[_DOUBT] is None:
        told = _followed(meter, at, value, counter)
    elif meter[_DOUBT][_WHY] == "jump":
        told = _after_jump(meter, at, value, counter)
    else:
        told = _after_fall(meter, at, value, counter)
    meter[_AT] = at
    if meter[_OWED] and told.consumption:
        paid = min(meter[_OWED], told.consumption)
        meter[_OWED] -= paid
        return Step(told.consumption - paid, told.event or "glitch")
    return told


def _followed(meter: Meter, at: int, value: float, counter: Counter) -> Step:
    """Nothing is in doubt."""
    last = meter[_VALUE]
    change = value - last
    if change < 0:
        return Step(0.0) if -change <= noise(last, counter, meter[_FINEST]) else _fell(meter, at, value, counter)
    if _is_jump(meter, at, change):
        meter[_VALUE], meter[_DOUBT] = value, ["jump", last, 0.0, change, 0]
        return Step(0.0, "jump")
    _rose(meter, at, value)
    return Step(change)


def _fell(meter: Meter, at: int, value: float, counter: Counter) -> Step:
    """Below what it showed, and neither noise nor a swap explains it."""
    last, usual = meter[_VALUE], _usual(meter, at)
    told = step(State(meter[_AT], last), State(at, value), counter)
    meter[_VALUE] = value
    if told.event == "rollover":
        assert counter.width is not None
        certain = _GARBAGE_STEPS * usual if usual else counter.width * (1 - _NEAR_SHARE)
        if told.consumption <= certain:
            meter[_DOUBT] = ["rollover", last, told.consumption, 0.0, 0]
            return told
        if not usual:
            meter[_DOUBT] = ["reset", last, 0.0, told.consumption, 0]
            return Step(0.0, "reset")
    since_zero = value if value < _NEAR_SHARE * last and (not usual or value <= _GARBAGE_STEPS * usual) else 0.0
    if since_zero <= _GROWTH_STEPS * usual:
        meter[_DOUBT] = ["reset", last, since_zero, 0.0, 0]
        return Step(since_zero, "reset")
    meter[_DOUBT] = ["reset", last, 0.0, since_zero, 0]
    return Step(0.0, "reset")


def _after_fall(meter: Meter, at: int, value: float, counter: Counter) -> Step:
    """Whether it came back to its old level, fell again, or goes on from where it fell to."""
    why, level, told, due, since = doubt = meter[_DOUBT]
    change = value - meter[_VALUE]
    usual = _usual(meter, at)
    if value >= level - noise(level, counter, meter[_FINEST]) and change > _GROWTH_STEPS * usual:
        gained = max(value - level, 0.0)
        meter[_VALUE], meter[_DOUBT] = max(value, level), None
        meter[_OWED] += max(told - gained, 0.0)
        return Step(max(gained - told, 0.0), "glitch")
    if change < 0 and -change > noise(meter[_VALUE], counter, meter[_FINEST]):
        again = _fell(meter, at, value, counter)
        doubt = meter[_DOUBT]
        doubt[_LEVEL] = level
        doubt[_TOLD] += told
        doubt[_DUE] += due
        return again
    if change <= 0:
        return Step(0.0)
    if usual and not since and change > max(_GROWTH_STEPS * usual, due):
        meter[_VALUE] = value  # garbage once more, or a new pace: the next state tells
        doubt[_DUE] += change
        return Step(0.0, "reset")
    _rose(meter, at, value)
    if value > level or since + 1 == _KNOWN_STEPS:
        meter[_DOUBT] = None
    else:
        doubt[_TOLD], doubt[_DUE], doubt[_SINCE] = told + due + change, 0.0, since + 1
    # The first step from where it fell to is told with what waited, and rests on the fall having been a reset.
    return Step(due + change, "reset" if due or (why == "reset" and not since) else None)


def _after_jump(meter: Meter, at: int, value: float, counter: Counter) -> Step:
    """Whether it stays where it jumped to."""
    _, level, _, due, _ = meter[_DOUBT]
    change = value - meter[_VALUE]
    within = noise(level, counter, meter[_FINEST])
    if -within <= change <= 0:
        return Step(0.0)
    meter[_DOUBT] = None
    if change > 0:
        meter[_VALUE] = value
        return Step(due + change, "jump")
    meter[_VALUE] = max(value, level)
    if value >= level - within:
        return Step(meter[_VALUE] - level, "glitch")
    return _fell(meter, at, value, counter)


def _swapped(meter: Meter, at: int, value: float, counter: Counter) -> Step:
    """Another meter is there now; what the old one showed at the end says whether its fall or jump was a glitch."""
    before, waiting = meter[_VALUE], 0.0
    if meter[_DOUBT] is not None:
        why, level, told, due, _ = meter[_DOUBT]
        final = next(swap.final for swap in counter.swaps if meter[_AT] < swap.at <= at)
        if final is not None and final >= level - noise(level, counter, meter[_FINEST]):
            before, waiting = level, -told
        elif why != "jump":
            waiting = due
        else:
            before = level
    told = step(State(meter[_AT], before), State(at, value), counter)
    meter[_VALUE], meter[_FINEST], meter[_DOUBT] = value, 0.0, None
    return Step(max(told.consumption + waiting, 0.0), told.event)


def _rose(meter: Meter, at: int, value: float) -> None:
    """Go on to a state that is in no doubt, and learn the meter's usual step of it."""
    change = value - meter[_VALUE]
    meter[_VALUE] = value
    if not change:
        return
    change = _short(change)
    if not meter[_FINEST] or change < meter[_FINEST]:
        meter[_FINEST] = change
    seen = meter[_SEEN] = min(meter[_SEEN] + 1, _KNOWN_STEPS)
    meter[_STEP] = _short(meter[_STEP] + (change - meter[_STEP]) / seen)
    meter[_SPAN] = _short(meter[_SPAN] + (at - meter[_AT] - meter[_SPAN]) / seen)


def _usual(meter: Meter, at: int) -> float:
    """The usual step; more where the last state is longer ago than it takes. 0: none was seen."""
    step: float = meter[_STEP]
    return step * max(1.0, (at - meter[_AT]) / meter[_SPAN]) if step else 0.0


def _is_jump(meter: Meter, at: int, change: float) -> bool:
    return meter[_SEEN] == _KNOWN_STEPS and change > _GARBAGE_STEPS * _usual(meter, at)


def _short(value: float) -> float:
    """Seven digits: more than an estimate can tell, and half the state."""
    return float(f"{value:.7g}")


def consumed(
    meters: dict[str, Meter], key: str, reading: Mapping[str, Any], at: int, value: float, counter: Counter
) -> dict[str, Any] | None:
    """The reading of what a counter consumed since its last state; None where there is nothing to tell.

    Args:
        meters: what is known of the device's, by `key`; changed in place.
        key: of the counter's series.
        reading: its state, judged.
        at: of the reading, µs since the epoch, UTC.
        value: what it shows.
        counter: how it counts.
    """
    meter = meters.get(key)
    if meter is None:
        meters[key] = first_state(at, value)
        return None
    told = advance(meter, at, value, counter)
    if told is None:
        return None
    derived = {
        "component_type": reading["component_type"] + CONSUMPTION_SUFFIX,
        "pin_position": reading["pin_position"],
        "value": told.consumption,
        "unit": reading["unit"],
        "timestamp": at,
        "quality": reading["quality"],
        "derived": True,
    }
    flags = list(reading.get("flags") or ())
    if told.event in _DOUBTS:
        flags.append(_DOUBTS[told.event])
        derived["quality"] = int(Quality.SUSPECT)
    if flags:
        derived["flags"] = flags
    return derived
