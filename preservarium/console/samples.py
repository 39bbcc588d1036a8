"""The pipeline's counters, sampled once a second: what the console shows as rates.

Everything is read from the metrics of this process (`preservarium.metrics`), so the console can show nothing that
Prometheus does not see. Rates are differences of counters; a counter that went back (it cannot while the process
lives) would count as zero and not as a negative rate.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from preservarium import metrics

#: Five minutes at one sample a second: long enough for "errors of late", and a few hundred kilobytes at most.
SAMPLES_MAX: Final = 300
#: A rate is taken over this many seconds: shorter flickers with every batch, longer hides a stop.
RATE_WINDOW_S: Final = 5.0
#: Points of a stage's small curve on the page.
HISTORY_POINTS: Final = 60


@dataclass(slots=True)
class StageSample:
    """What one stage has counted since the process started, and its gauges now."""

    received: float = 0
    sent: float = 0
    readings: float = 0
    refused: dict[str, float] = field(default_factory=dict)  #: reason code -> inputs
    retries: float = 0
    pending: float = 0
    lag: float = 0
    commit_age_s: float = 0
    paused: float = 0
    fuse_blown: bool = False

    @property
    def errors(self) -> float:
        """Inputs refused, of every code."""
        return sum(self.refused.values())


@dataclass(slots=True)
class Sample:
    """All counters at one instant."""

    at_s: float  #: monotonic seconds
    stages: dict[str, StageSample]
    connectors: dict[str, float]  #: connector -> device messages taken
    connectors_refused: dict[str, float]  #: connector -> device messages refused at the door
    breakers: dict[str, int]  #: dependency -> 0 closed, 1 half-open, 2 open
    stores: dict[str, dict[str, float]]  #: store -> outcome -> rows
    rebalances: dict[str, float]  #: group -> rebalances


def _values(metric: Any) -> Iterable[tuple[dict[str, str], float]]:
    """The labels and value of each series of a counter or gauge."""
    for family in metric.collect():
        for sample in family.samples:
            # Counters come with a second series per label set: the time of their creation.
            if not sample.name.endswith("_created"):
                yield sample.labels, sample.value


def read(at_s: float) -> Sample:
    """Read every counter the console shows. Blocks for well under a millisecond; sends nothing.

    Args:
        at_s: the monotonic instant to note in the sample, seconds.
    """
    stages: dict[str, StageSample] = {}

    def stage(labels: dict[str, str]) -> StageSample:
        return stages.setdefault(labels["stage"], StageSample())

    for labels, value in _values(metrics.RECORDS_RECEIVED):
        stage(labels).received += value
    for labels, value in _values(metrics.RECORDS_SENT):
        stage(labels).sent += value
    for labels, value in _values(metrics.READINGS):
        stage(labels).readings += value
    for labels, value in _values(metrics.REFUSED):
        refused = stage(labels).refused
        refused[labels["code"]] = refused.get(labels["code"], 0) + value
    for labels, value in _values(metrics.BATCH_RETRIES):
        stage(labels).retries += value
    for labels, value in _values(metrics.PENDING_RECORDS):
        stage(labels).pending += value
    for labels, value in _values(metrics.LAG_RECORDS):
        stage(labels).lag += value
    for labels, value in _values(metrics.COMMIT_AGE_SECONDS):
        s = stage(labels)
        s.commit_age_s = max(s.commit_age_s, value)
    for labels, value in _values(metrics.PARTITIONS_PAUSED):
        stage(labels).paused += value
    for labels, value in _values(metrics.FUSE_BLOWN):
        s = stage(labels)
        s.fuse_blown = s.fuse_blown or value > 0
    stores: dict[str, dict[str, float]] = {}
    for labels, value in _values(metrics.STORE_ROWS):
        stores.setdefault(labels["store"], {})[labels["outcome"]] = value
    return Sample(
        at_s,
        stages,
        {labels["connector"]: value for labels, value in _values(metrics.CONNECTOR_MESSAGES)},
        _summed(_values(metrics.CONNECTOR_REFUSED), "connector"),
        {labels["dependency"]: int(value) for labels, value in _values(metrics.BREAKER_STATE)},
        stores,
        {labels["group"]: value for labels, value in _values(metrics.REBALANCES)},
    )


def _summed(values: Iterable[tuple[dict[str, str], float]], label: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for labels, value in values:
        sums[labels[label]] = sums.get(labels[label], 0) + value
    return sums


def _rate(counted: float, seconds: float) -> float:
    return round(max(0.0, counted) / seconds, 1) if seconds > 0 else 0.0


class History:
    """The last five minutes of samples, oldest first, bounded."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)

    def add(self, sample: Sample) -> None:
        """Keep a sample; instants grow."""
        if self._samples and sample.at_s < self._samples[-1].at_s:
            message = "samples come in the order of time"
            raise ValueError(message)
        self._samples.append(sample)

    @property
    def last(self) -> Sample | None:
        """The newest sample."""
        return self._samples[-1] if self._samples else None

    def _before(self, seconds: float) -> Sample | None:
        """The newest sample that is at least `seconds` old, else the oldest there is."""
        if not self._samples:
            return None
        limit = self._samples[-1].at_s - seconds
        # Newest first: the one looked for is a few samples from the end.
        for sample in reversed(self._samples):
            if sample.at_s <= limit:
                return sample
        return self._samples[0]

    def rates(self, stage: str) -> dict[str, float]:
        """Per-second rates of a stage over the last `RATE_WINDOW_S`: received, sent, readings, errors."""
        new, old = self.last, self._before(RATE_WINDOW_S)
        if new is None or old is None or new.at_s <= old.at_s:
            return {"received": 0.0, "sent": 0.0, "readings": 0.0, "errors": 0.0}
        a, b = old.stages.get(stage, StageSample()), new.stages.get(stage, StageSample())
        seconds = new.at_s - old.at_s
        return {
            name: _rate(getattr(b, name) - getattr(a, name), seconds)
            for name in ("received", "sent", "readings", "errors")
        }

    def arriving(self, stage: str) -> float:
        """Records a second that came into the partitions which the stage reads here, whether it has read them or not."""
        new, old = self.last, self._before(RATE_WINDOW_S)
        if new is None or old is None:
            return 0.0
        a, b = old.stages.get(stage, StageSample()), new.stages.get(stage, StageSample())
        return _rate(b.received + b.lag - a.received - a.lag, new.at_s - old.at_s)

    def curve(self, stage: str) -> list[float]:
        """Records a second that the stage received, one point a sample, oldest first, at most `HISTORY_POINTS`."""
        tail = list(self._samples)[-(HISTORY_POINTS + 1) :]
        points = []
        for a, b in itertools.pairwise(tail):
            counted = b.stages.get(stage, StageSample()).received - a.stages.get(stage, StageSample()).received
            points.append(_rate(counted, b.at_s - a.at_s))
        return points

    def errors(self) -> list[dict[str, Any]]:
        """Refused inputs by stage and code: since the process started, and in the samples kept (five minutes)."""
        if (new := self.last) is None:
            return []
        old = self._samples[0]
        rows: list[dict[str, Any]] = []
        for name, stage in new.stages.items():
            before = old.stages.get(name, StageSample()).refused
            for code, total in stage.refused.items():
                rows.append(
                    {
                        "stage": name,
                        "code": code,
                        "recent": int(total - before.get(code, 0)),
                        "total": int(total),
                    }
                )
        # Most of late first; then by name, so that the order does not flicker.
        rows.sort(key=lambda row: (-row["recent"], -row["total"], row["stage"], row["code"]))
        return rows

    def connectors(self) -> dict[str, dict[str, float]]:
        """Messages taken and refused at the door by connector, and the rate taken, per second."""
        new, old = self.last, self._before(RATE_WINDOW_S)
        if new is None or old is None:
            return {}
        seconds = new.at_s - old.at_s
        return {
            name: {
                "taken": int(new.connectors.get(name, 0)),
                "refused": int(new.connectors_refused.get(name, 0)),
                "per_s": _rate(new.connectors.get(name, 0) - old.connectors.get(name, 0), seconds),
            }
            for name in sorted({*new.connectors, *new.connectors_refused})
        }

    def stores(self) -> dict[str, dict[str, Any]]:
        """Rows by outcome of each store, and the rate stored, per second."""
        new, old = self.last, self._before(RATE_WINDOW_S)
        if new is None or old is None:
            return {}
        return {
            name: {
                "rows": {outcome: int(value) for outcome, value in sorted(rows.items())},
                "per_s": _rate(rows.get("stored", 0) - old.stores.get(name, {}).get("stored", 0), new.at_s - old.at_s),
            }
            for name, rows in sorted(new.stores.items())
        }

    @property
    def span_s(self) -> float:
        """Seconds between the oldest and the newest sample."""
        return self._samples[-1].at_s - self._samples[0].at_s if self._samples else 0.0
