"""How far each reading can be trusted: the QARTOD tests, streaming, one device at a time.

Flags and names follow the IOOS QARTOD manuals ("Manual for Real-Time Quality Control", tests 1–9) and the parameter
names those of ioos-qc. Each reading gets `quality`, the aggregate of its tests by QARTOD's precedence (fail over
suspect over good over not evaluated), and `flags`: what normalize has noted (`inexact`, `unit_mismatch`), and the names of the tests that
said suspect, fail or missing; where there is neither, there is no `flags`.

| test | parameters | says |
|---|---|---|
| syntax (`type`) | the datatype's kind | fail |
| `missing` | – | missing: there is neither a number nor a text |
| `unit_unknown` | the datatype's unit | suspect: no conversion is known, so no other value test is made |
| `timestamp_invalid`, `timestamp_future`, `timestamp_before_birth` | bounds, allowed skew, birth | fail |
| `gross_range` | `fail_span`, `suspect_span` | outside: fail, suspect |
| `counter_negative` | of a counter | below zero: fail |
| `climatology` | `members` (domain/quality/climatology.py) | outside what the season and the hour allow: fail, suspect |
| `stale` | the datatype's `stale_after_s` | suspect: older than this when it was received |
| `gap` | `threshold` in seconds | suspect: the first after a longer time without a reading |
| `rate_of_change` | `threshold`, `fail_threshold`, units per second | over: suspect, fail |
| `flat_line` | `suspect_threshold`, `fail_threshold` in seconds, `tolerance` | range < tolerance for so long: suspect, fail |
| `location` | the device's `meta.location`: `latitude`, `longitude`, `range_m` | suspect: the device is elsewhere |
| `attenuated_signal` | `suspect_threshold`, `fail_threshold`, `test_period` in seconds, `check_type` std or range | varied less: suspect, fail |
| `spike` | `suspect_threshold`, `fail_threshold`, `method` | the reading BEFORE this one: suspect, fail |

The future is judged against `received_at`, never against the clock of the worker: a re-run and a replay say the same.
Spike is known one reading late (QARTOD test 6 looks at n−1 when n comes). The verdict then follows as one more reading
in the later message: same series, the earlier timestamp, `revised`: it updates the row that stands.

A value that fails (range, rate of change, time) never enters the reference of the next one. A reading that is not
younger than the last one of its series gets no test that needs its neighbours: history is not rewritten.

Of a circular quantity (`circular` of its datatype; domain/circular.py) the rate, the spike, the flat line and the attenuated signal go by
the shorter way round from reading to reading.

A counter (`counter` of its datatype: `width`, `swaps`, `tolerance`; domain/quality/counter.py) brings a reading of its own with each of its
readings: `<name>_consumption`, `derived`, what was consumed since the one before (domain/quality/meter.py). Where a part of it is unknown or
in doubt it is suspect: `counter_reset`, `counter_glitch`, `counter_jump`, `counter_swap`. A state below zero fails (`counter_negative`). A counter's reading that comes late brings none: the interval that it lies in has been
told as a whole, so that the sum of a series' consumption is what the meter counted, in whatever order its readings came.
"""

from collections.abc import Mapping
from math import isfinite
from typing import Any, Final, NamedTuple

from preservarium.domain.circular import arc
from preservarium.domain.quality.checks import (
    ATTENUATED_BUCKETS,
    FAIL,
    GOOD,
    NOT_EVALUATED,
    SUSPECT,
    Attenuated,
    FlatLine,
    Location,
    SeriesCheck,
    Spike,
)
from preservarium.domain.quality.climatology import Climatology
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.domain.readings.units import conversion
from preservarium.errors import ReasonCode

#: Extremes kept of a flat line's window, each side. Sixteen keep one series under 1.5 KiB of state at 17-digit
#: instants; a flat signal needs one or two, and only a slow drift inside the tolerance needs many.
FLAT_EXTREMES_MAX: Final = 16

_SECOND_US: Final = 1_000_000

# The state of a series is a list, because there are many of them and they are written for every batch.
AT, _VALUE, _QUALITY, _FLAGS, _AT_BEFORE, _VALUE_BEFORE, _FLAT_SINCE, _FLAT_MAX, _FLAT_MIN, _BUCKETS = range(10)


class Failure(NamedTuple):
    """A reading for `iot_errors`."""

    code: ReasonCode
    text: str
    reading: dict[str, Any]  #: with its quality and flags


#: (name of the test, reason, text for people)
Failed = tuple[str, ReasonCode, str]


def time_failure(at: Any, latest: int, birth_us: int) -> Failed | None:
    """Whether `at` is no instant that a reading can have; the latest and the earliest are in µs."""
    if type(at) is not int or not TIMESTAMP_MIN_US <= at <= TIMESTAMP_MAX_US:
        return "timestamp_invalid", ReasonCode.TIMESTAMP_INVALID, f"timestamp {at!r} is no instant of 2000 … 2100"
    if at > latest:
        text = f"timestamp {at} is {(at - latest) / _SECOND_US:.3f} s later than the allowed clock skew"
        return "timestamp_future", ReasonCode.TIMESTAMP_FUTURE, text
    if at < birth_us:
        text = f"timestamp {at} is earlier than the device's birth {birth_us}"
        return "timestamp_before_birth", ReasonCode.TIMESTAMP_BEFORE_BIRTH, text
    return None


def range_failure(value: float, check: SeriesCheck) -> Failed:
    """What is said of a value outside the range (QARTOD test 4)."""
    if check.counter is not None and value < 0:
        return "counter_negative", ReasonCode.COUNTER_NEGATIVE, f"{value} {check.unit or ''}".strip() + " of a counter"
    bounds = f"{check.fail_min:g} … {check.fail_max:g}"
    return "gross_range", ReasonCode.VALUE_RANGE, f"{value} {check.unit or ''} is outside {bounds}".replace("  ", " ")


def syntax_failure(reading: dict[str, Any], check: SeriesCheck) -> Failed | None:
    """Whether something that is no number in a number's place is of its datatype's kind; booleans become 0 and 1."""
    value = reading.get("value")
    if check.kind == "any":
        return None
    if check.kind == "text":
        if value is None and isinstance(reading["value_text"], str):
            return None
    elif check.kind == "boolean" and value in (0, 1) and reading.get("value_text") is None:
        reading["value"] = int(value)
        return None
    given = reading["value_text"] if value is None else value
    return "type", ReasonCode.VALUE_TYPE, f"{given!r:.200} is no {check.kind}"


def convert(reading: dict[str, Any], unit: str) -> bool:
    """Bring a number into `unit`; False where no conversion is known, then the reading stays as it is."""
    given = reading["unit"]
    # A device that names no unit is taken at the registry's word.
    if given:
        linear = conversion(given, unit)
        if linear is None:
            return False
        value = linear.apply(reading["value"])
        if not isfinite(value):
            return False
        reading["value"] = value
    reading["unit"] = unit
    return True


def against_climatology(
    climatology: Climatology, at: int, value: float, quality: int, flags: list[str] | None
) -> tuple[int, list[str] | None, Failed | None]:
    """QARTOD test 5: whether a value is outside what the season and the hour allow."""
    member = climatology.at(at)
    if member is None:
        return quality, flags, None
    if value < member.fail_min or value > member.fail_max:
        text = f"{value} is outside {member.fail_min:g} … {member.fail_max:g}, the climatology at its time"
        return quality, flags, ("climatology", ReasonCode.QUALITY_FAIL, text)
    if value < member.suspect_min or value > member.suspect_max:
        return SUSPECT, [*(flags or ()), "climatology"], None
    return GOOD if quality == NOT_EVALUATED else quality, flags, None


def against_location(readings: list[dict[str, Any]], location: Location) -> None:
    """QARTOD test 3: whether the device is where it was put; its pairs of latitude and longitude that are not are suspect."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for reading in readings:
        if reading["component_type"] in ("latitude", "longitude") and type(reading.get("value")) in (int, float):
            found.setdefault(reading["pin_position"], {})[reading["component_type"]] = reading
    for pair in found.values():
        if (
            len(pair) == 2
            and location.distance_m(pair["latitude"]["value"], pair["longitude"]["value"]) > location.range_m
        ):
            for reading in pair.values():
                if reading["quality"] != FAIL:
                    reading["quality"] = SUSPECT
                    reading["flags"] = [*reading.get("flags", ()), "location"]


def new_series(at: int, value: float, check: SeriesCheck, quality: int, flags: list[str] | None) -> list[Any]:
    """The state of a series after its first reading."""
    series = [at, value, quality, flags, None, None, None, None, None]
    if check.flat is not None:
        _flat(series, at, value, check.flat, check.circular)
    if check.attenuated is not None:
        _varied(series, at, value, check.attenuated, check.circular)
    return series


def against_series(
    series: list[Any],
    reading: dict[str, Any],
    at: int,
    value: float,
    check: SeriesCheck,
    quality: int,
    flags: list[str] | None,
    revisions: list[dict[str, Any]],
    failures: list[Failure],
) -> tuple[int, list[str] | None, Failed | None]:
    """The tests that need the readings before; moves the series on unless the value fails against it."""
    failure: Failed | None = None
    last, circular = series[_VALUE], check.circular
    change = value - last if circular is None else arc(value, last, circular)
    if check.rate is not None:
        rate = abs(change) * _SECOND_US / (at - series[AT])
        if rate > check.rate.fail:
            text = f"{value} changed by {rate:g} {check.unit or ''}/s, over {check.rate.fail:g}"
            return quality, flags, ("rate_of_change", ReasonCode.QUALITY_FAIL, text)
        if rate > check.rate.suspect:
            quality = SUSPECT
            flags = [*flags, "rate_of_change"] if flags else ["rate_of_change"]
    if check.gap_us is not None and at - series[AT] > check.gap_us:
        quality, flags = SUSPECT, [*(flags or ()), "gap"]
    if check.attenuated is not None:
        varied = _varied(series, at, value, check.attenuated, circular)
        if varied is not None and varied < check.attenuated.fail:
            # As with a flat line, the value stays: so the signal is seen to stay weak.
            text = f"varied by {varied:g}, under {check.attenuated.fail:g}"
            failure = ("attenuated_signal", ReasonCode.QUALITY_FAIL, text)
        elif varied is not None and varied < check.attenuated.suspect:
            quality, flags = SUSPECT, [*(flags or ()), "attenuated_signal"]
    if check.flat is not None:
        flat_us = _flat(series, at, value, check.flat, circular)
        if flat_us >= check.flat.fail_us:
            # The value is part of the flat line: it stays in the window, so that the line is seen to go on.
            text = f"flat within {check.flat.tolerance:g} for {flat_us / _SECOND_US:g} s"
            failure = ("flat_line", ReasonCode.QUALITY_FAIL, text)
        elif flat_us >= check.flat.suspect_us:
            quality = SUSPECT
            flags = [*flags, "flat_line"] if flags else ["flat_line"]
    if check.spike is not None:
        if series[_AT_BEFORE] is not None:
            before, after = series[_VALUE_BEFORE], value
            if circular is not None:
                before, after = last - arc(last, before, circular), last + change
            verdict, distance = _spike(before, last, after, check.spike)
            if verdict != GOOD:
                revised = _revision(series, reading, verdict)
                revisions.append(revised)
                if verdict == FAIL:
                    text = f"{last} stands {distance:g} {check.unit or ''} off its neighbours"
                    failures.append(Failure(ReasonCode.QUALITY_FAIL, text, revised))
        series[_AT_BEFORE], series[_VALUE_BEFORE] = series[AT], last
        series[_QUALITY], series[_FLAGS] = (quality, flags) if failure is None else (FAIL, [*(flags or ()), failure[0]])
    series[AT], series[_VALUE] = at, value
    return quality, flags, failure


def _varied(series: list[Any], at: int, value: float, attenuated: Attenuated, circular: float | None) -> float | None:
    """How much the values of the period up to `at` varied; takes `value` in. None: it is not a period yet.

    The period is kept as eighths: [begin, count, mean, sum of squared differences from it, min, max]. So the period
    judged is the last one rounded to an eighth, where ioos-qc `attenuated_signal_test` keeps every value. A circular quantity
    has its last value besides, as it was counted on round by round.
    """
    if len(series) == _BUCKETS:
        series.append([at, []])
    if circular is not None:
        value = _beside(value, *series[_BUCKETS][2:], period=circular)
        series[_BUCKETS][2:] = [value]
    began, buckets = series[_BUCKETS][:2]
    begin = at // attenuated.bucket_us * attenuated.bucket_us
    if buckets and buckets[-1][0] == begin:
        bucket = buckets[-1]
        bucket[1] += 1
        change = value - bucket[2]
        bucket[2] += change / bucket[1]
        bucket[3] += change * (value - bucket[2])
        bucket[4] = min(bucket[4], value)
        bucket[5] = max(bucket[5], value)
    else:
        buckets.append([begin, 1, value, 0.0, value, value])
    oldest = begin - (ATTENUATED_BUCKETS - 1) * attenuated.bucket_us
    while buckets[0][0] < oldest:
        buckets.pop(0)
    if at - began < ATTENUATED_BUCKETS * attenuated.bucket_us:
        return None
    count = sum(bucket[1] for bucket in buckets)
    if count < 2:
        return None
    if attenuated.by_range:
        varied: float = max(bucket[5] for bucket in buckets) - min(bucket[4] for bucket in buckets)
        return varied
    mean = sum(bucket[1] * bucket[2] for bucket in buckets) / count
    squares = sum(bucket[3] + bucket[1] * (bucket[2] - mean) ** 2 for bucket in buckets)
    return float((squares / count) ** 0.5)


def _spike(before: float, value: float, after: float, spike: Spike) -> tuple[int, float]:
    """The verdict on `value` between its neighbours, and the distance judged (ioos-qc `spike_test`)."""
    if spike.differential:
        rise, fall = value - before, after - value
        distance = 0.0 if rise * fall >= 0 else min(abs(rise), abs(fall))
    else:
        distance = abs(value - (before + after) / 2)
    if distance > spike.fail:
        return FAIL, distance
    return (SUSPECT if distance > spike.suspect else GOOD), distance


def _revision(series: list[Any], later: Mapping[str, Any], verdict: int) -> dict[str, Any]:
    """The last reading of the series once more, with the verdict that only its successor could bring."""
    return {
        "component_type": later["component_type"],
        "pin_position": later["pin_position"],
        "value": series[_VALUE],
        "unit": later["unit"],
        "timestamp": series[AT],
        "quality": max(verdict, series[_QUALITY]),
        "flags": [*(series[_FLAGS] or ()), "spike"],
        "revised": True,
    }


def _beside(value: float, last: float | None = None, *, period: float) -> float:
    """The value counted on round by round: as far from the last one as the shorter way is."""
    return value if last is None else last + arc(value, last, period)


def _flat(series: list[Any], at: int, value: float, flat: FlatLine, circular: float | None) -> int:
    """For how long, µs up to `at`, all values have stayed within the tolerance; takes `value` into the window.

    The window is the longest run of latest readings whose range is under the tolerance, kept as two lists of extremes
    (the usual sliding-window minimum and maximum). An extreme is [since, at, value]: it is the extreme of every
    window that begins from `since` to `at`. At regular intervals the verdict is that of ioos-qc `flat_line_test`,
    which looks at a window of `threshold` seconds; at irregular ones it goes by time where ioos-qc counts readings.
    """
    if series[_FLAT_SINCE] is None:
        series[_FLAT_SINCE], series[_FLAT_MAX], series[_FLAT_MIN] = at, [[at, at, value]], [[at, at, value]]
        return 0
    highs, lows = series[_FLAT_MAX], series[_FLAT_MIN]
    if circular is not None:
        value = _beside(value, highs[-1][2], period=circular)  # the newest reading is in both lists
    since = at
    while highs and highs[-1][2] <= value:
        since = highs.pop()[0]
    highs.append([since, at, value])
    since = at
    while lows and lows[-1][2] >= value:
        since = lows.pop()[0]
    lows.append([since, at, value])
    # The newest reading is in both lists, and its range with itself is 0: this ends before a list is empty.
    while highs[0][2] - lows[0][2] >= flat.tolerance:
        if highs[0][1] < lows[0][1]:
            highs.pop(0)
            series[_FLAT_SINCE] = max(series[_FLAT_SINCE], highs[0][0])
        else:
            lows.pop(0)
            series[_FLAT_SINCE] = max(series[_FLAT_SINCE], lows[0][0])
    for extremes in (highs, lows):
        if len(extremes) > FLAT_EXTREMES_MAX:
            _coarsen(extremes)
    duration: int = at - series[_FLAT_SINCE]
    return duration


def _coarsen(extremes: list[list[Any]]) -> None:
    """Join the two neighbours that differ least, keeping the more extreme value: the range is never under-estimated.

    So a drifting signal may be called flat later than exact, never earlier.
    """
    at = min(range(len(extremes) - 1), key=lambda i: abs(extremes[i][2] - extremes[i + 1][2]))
    extremes[at][1] = extremes[at + 1][1]
    del extremes[at + 1]
