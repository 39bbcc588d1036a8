"""Anomalies: readings that are unlike the recent past of their series, by robust streaming statistics.

A score is how many robust standard deviations a reading stands off what was expected of it, or, if that is less, how many
thirds of the deviation that 99 of 100 readings keep under: what a series does once in a while is not news. Expected is the median of the
last readings; their spread is the median absolute deviation (times 1.4826, its ratio to the standard deviation of a normal
distribution). Where the series is seasonal, what is judged is the rest after the profile of the hour (an exponentially
weighted mean of each hour of the day, UTC, which an outlier moves by a few deviations at most). Single readings are noise: the
score that is judged is an exponentially weighted mean of the single scores, each cut off at four thresholds.

Of a circular quantity (domain/circular.py) every distance is the shorter arc, the median is taken beside the mean direction of the last
readings, and the typical size of the values is the period.

A model (of river, an extra) may take the place of the single score. It is given the distance in deviations, begins to learn
after the warm-up and to judge after as many readings again, and its threshold is on the scale of its scores.

An anomaly begins where the score is over the threshold and ends where it is under half of it. There is no judgement before
the warm-up. Only readings younger than the last one of their series count, so a history is judged the same however its
messages are cut into batches. Nothing here waits or reads a clock; the state is changed in place.
"""

from collections.abc import Mapping
from math import fsum, isfinite
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

from preservarium.domain.circular import arc, direction, unit_vector, wrapped

#: Readings whose median and deviation are looked at; as numbers of four digits, half of what a series' state may have.
WINDOW_MAX: Final = 96

#: Median and deviation are computed anew after so many readings: it is what costs time, and they move slowly.
RENEW_EVERY: Final = 8

#: Standard deviations of a normal distribution in one median absolute deviation.
_MAD_SIGMA: Final = 1.4826

#: A deviation is never less than this part of the typical size of the values, or a steady series would alarm at each step.
_SPREAD_MIN: Final = 1e-3

#: Share of a new day in the profile of an hour is one in so many readings of that hour, once there are so many.
_PROFILE_READINGS: Final = 60

#: Outliers move a profile by so many deviations at most.
_PROFILE_CUT: Final = 3.0

#: The deviation that this share of the readings keeps under is followed, in steps of this part of itself. What a series does
#: once in a while, it may do: so many robust deviations of it are no anomaly.
_TAIL_SHARE: Final = 0.99
_TAIL_STEP: Final = 0.03
_TAIL_SIGMA: Final = 3.0

_HOUR_US: Final = 3_600_000_000


#: Models that may judge, by the names of their classes in `river.anomaly`. Others take a millisecond for a reading.
MODELS: Final = ("GaussianScorer", "StandardAbsoluteDeviation", "HalfSpaceTrees", "OneClassSVM")


class Model(Protocol):
    """What judges in place of the single score."""

    def score(self, rest: float) -> float:
        """Score of a reading, `rest` robust standard deviations off its series' median; then learn it."""
        ...


class Detector(NamedTuple):
    """How a series is judged."""

    threshold: float = 2.5
    window: int = 64
    warm_up: int = 288  #: readings before the first judgement
    smoothing: float = 0.2  #: weight of the newest score, 1: no smoothing
    seasonal: bool = True
    model: str | None = None  #: one of `MODELS`
    model_parameters: Mapping[str, Any] = MappingProxyType({})  #: of its constructor
    circular: float | None = None  #: period of a circular quantity; the datatype says it


def detector_of(document: Mapping[str, Any]) -> Detector:
    """The detector that a datatype's test `anomaly` declares.

    Raises:
        ValueError: a parameter is unknown, no number, or outside its bounds.
    """
    unknown = set(document) - (set(Detector._fields) - {"circular"})
    if unknown:
        text = f"there is no parameter {', '.join(sorted(unknown))}"
        raise ValueError(text)
    model, parameters = document.get("model"), document.get("model_parameters") or {}
    if model is not None and (model not in MODELS or "threshold" not in document):
        text = f"model must be one of {', '.join(MODELS)}, with a threshold on its scale; not {model!r:.100}"
        raise ValueError(text)
    if not isinstance(parameters, Mapping) or (parameters and model is None):
        text = "model_parameters must be parameters of a model"
        raise ValueError(text)
    others = ("seasonal", "model", "model_parameters")
    numbers = {name: float(value) for name, value in document.items() if name not in others}
    if not all(map(isfinite, numbers.values())):
        text = "every parameter must be a finite number"
        raise ValueError(text)
    default = Detector()
    detector = Detector(
        threshold=numbers.get("threshold", default.threshold),
        window=int(numbers.get("window", default.window)),
        warm_up=int(numbers.get("warm_up", default.warm_up)),
        smoothing=numbers.get("smoothing", default.smoothing),
        seasonal=bool(document.get("seasonal", default.seasonal)),
        model=model,
        model_parameters=parameters,
    )
    if not (detector.threshold > 0 and 0 < detector.smoothing <= 1):
        text = "threshold must be over 0, smoothing over 0 and at most 1"
        raise ValueError(text)
    if not (8 <= detector.window <= WINDOW_MAX and detector.warm_up >= detector.window):
        text = f"window must be 8 to {WINDOW_MAX}, warm_up at least as much"
        raise ValueError(text)
    return detector


# A series' state is a list: there are many, and they are written for every batch.
_AT, _SEEN, _SCORE, _ACTIVE, _MEDIAN, _SPREAD, _RECENT, _PROFILE, _TAIL = range(9)

#: Index behind a series' own state, where the stage keeps its model.
MODEL: Final = 9

Series = list[Any]


def _short(value: float) -> float:
    """Seven digits: more than statistics can tell, and half the state."""
    return float(f"{value:.7g}")


class Judgement(NamedTuple):
    """Where an anomaly begins or ends."""

    begins: bool
    score: float
    expected: float


def new_series() -> Series:
    """The state of a series that nothing is known of."""
    return [0, 0, 0.0, 0, 0.0, 0.0, [], [], 0.0]


def judge(series: Series, at: int, value: float, detector: Detector, model: Model | None = None) -> Judgement | None:
    """Take a reading in; what it changes, or None. `at` in µs since the epoch, UTC."""
    if at <= series[_AT]:
        return None
    series[_AT] = at
    seen = series[_SEEN]
    base = 0.0
    slot: list[Any] | None = None
    if detector.seasonal:
        profile = series[_PROFILE]
        if not profile:
            profile.extend([0, 0.0] for _ in range(24))
        slot = profile[at // _HOUR_US % 24]
        base = slot[1] if slot[0] else value
    period = detector.circular
    rest = value - base if period is None else arc(value, base, period)
    judgement = None
    if seen >= detector.warm_up:
        away = rest - series[_MEDIAN] if period is None else arc(rest, series[_MEDIAN], period)
        off = abs(away)
        spread = max(series[_SPREAD], series[_TAIL] / _TAIL_SIGMA)
        single = min(off / spread if model is None else model.score(away / spread), 4 * detector.threshold)
        if model is not None and seen < 2 * detector.warm_up:
            single = 0.0
        expected = base + series[_MEDIAN] if period is None else wrapped(base + series[_MEDIAN], period)
        score = series[_SCORE] + detector.smoothing * (single - series[_SCORE])
        series[_SCORE] = score
        if not series[_ACTIVE] and score > detector.threshold:
            series[_ACTIVE] = 1
            judgement = Judgement(True, round(score, 3), expected)
        elif series[_ACTIVE] and score < detector.threshold / 2:
            series[_ACTIVE] = 0
            judgement = Judgement(False, round(score, 3), expected)
        # A quantile by small steps: up where it is exceeded, down, much less, where not.
        step = _TAIL_STEP * (_TAIL_SHARE if off > series[_TAIL] else _TAIL_SHARE - 1)
        series[_TAIL] = max(series[_TAIL], series[_SPREAD]) * (1 + step)
    recent = series[_RECENT]
    recent.append(_short(rest))
    if len(recent) > detector.window:
        del recent[0]
    if slot is not None:
        slot[0] = min(slot[0] + 1, _PROFILE_READINGS)
        cut = _PROFILE_CUT * series[_SPREAD] if seen >= detector.warm_up else abs(rest)
        profile_value = base + max(-cut, min(cut, rest)) / slot[0]
        slot[1] = _short(profile_value if period is None else wrapped(profile_value, period))
    seen += 1
    series[_SEEN] = seen
    if seen >= detector.warm_up and (seen % RENEW_EVERY == 0 or seen == detector.warm_up):
        middle = len(recent) // 2
        if period is None:
            median = sorted(recent)[middle]
            size = max(abs(base + median), abs(value))
            distances = [abs(one - median) for one in recent]
        else:
            median, size = _median_direction(recent, period), period
            distances = [abs(arc(one, median, period)) for one in recent]
        spread = sorted(distances)[middle] * _MAD_SIGMA
        series[_MEDIAN] = median
        # The spread follows slowly, so that a quiet hour does not make the next change an anomaly.
        before = series[_SPREAD]
        spread = max(spread, before + (spread - before) * _SPREAD_SHARE) if before else spread
        series[_SPREAD] = _short(max(spread, size * _SPREAD_MIN, 1e-9))
    return judgement


#: Share of the present spread in the one that is used where it falls.
_SPREAD_SHARE: Final = 0.02


def _median_direction(values: list[float], period: float) -> float:
    """The median as seen from their mean direction; over -period/2, up to period/2."""
    vectors = [unit_vector(value, period) for value in values]
    mean = direction(fsum(x for x, _ in vectors), fsum(y for _, y in vectors), len(vectors), period).mean
    around = values[-1] if mean is None else mean
    middle = sorted(arc(value, around, period) for value in values)[len(values) // 2]
    return arc(around + middle, 0.0, period)
