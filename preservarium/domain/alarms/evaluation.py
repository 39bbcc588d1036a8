"""Readings against rules, in event time: whether a condition changed. What follows from that is said in `machine.py`.

What a rule needs between readings is a `Watch`: the condition as it stands, and since when the opposite is pending.
`evaluate` takes one reading of a plain rule (a threshold and nothing else) and `take` one of any rule; both say whether
the condition changed.

Time is the readings' own. A delay is over when two readings that are at least so far apart both say so, with none
between them that disagrees: one reading alone never satisfies a duration, however old it is. A silence longer than
`gap_max_s` starts a delay anew, since nobody knows what the value did meanwhile.

A reading that is not younger than the last one evaluated changes nothing (`Evaluation.LATE`): the history that people
were told of is not rewritten. Back-tests over stored data see it in its place, and `lateness_s` waits for it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from preservarium.domain.alarms.rule import Level, Rule
from preservarium.domain.alarms.silence import take_presence
from preservarium.domain.alarms.watch import Evaluation, Verdict, Watch, level_of

#: Parts of a rate's window: what is kept of it lies at least a part apart.
RATE_PARTS: Final = 8

_NOTHING: Final = Verdict(Evaluation.UNCHANGED, 0)


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
        return take_presence(rule, watch, at, received_at)
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


def _compared(rule: Rule, watch: Watch, value: float | None, at: int, before: int) -> float | None:
    """The number that stands against the threshold; None: undecided."""
    if value is None or rule.fold is None:
        return value
    if not rule.window_us:
        return rule.fold(rule.difference(value, rule.setpoint))
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
        rate = rule.fold(rule.difference(value, was) / (at - then) * rule.per_us)
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
