"""How many workers a load needs: what one worker asks for by what it measures, and what a planned load will take.

Pure: costs and loads come in as numbers, and what comes out says what it was made of.
"""

from dataclasses import dataclass
from math import ceil
from typing import Final

#: A worker is to be this busy. The rest is for bursts, for a worker that fails, and because latency grows steeply beyond.
TARGET_UTILISATION: Final = 0.7
#: A backlog is to be worked off within this time beside what arrives.
CATCH_UP_S: Final = 300.0
#: A backlog asks for at most so many times the workers: the group is assigned anew at each change, and a doubling is
#: looked at again after some minutes.
GROWTH_MAX: Final = 2.0
#: Less lag than this is how batches come and go.
LAG_NORMAL_S: Final = 10.0


def wanted_share(utilisation: float, lag_s: float) -> float:
    """The workers that one worker's share of the load needs: 1 where it is as busy as it should be, 0.5 half as busy.

    The sum over all workers is the number wanted. A worker that is busy all the time shows no more than 1 / TARGET_UTILISATION of what it
    lacks, so its lag says the rest. Lag of a worker that is hardly busy is not for want of workers (it waits for a database, say),
    and asks for none.

    Args:
        utilisation: share of a core that its event loop uses, 0 to 1.
        lag_s: of its slowest stage, s.
    """
    share = max(0.0, min(1.0, utilisation)) / TARGET_UTILISATION
    if utilisation < TARGET_UTILISATION or lag_s <= LAG_NORMAL_S:
        return round(share, 3)
    return round(share * min(GROWTH_MAX, 1 + lag_s / CATCH_UP_S), 3)


def workers_wanted(shares: float, *, least: int, most: int) -> int:
    """The number of workers, of what all shares add up to."""
    return max(least, min(most, ceil(round(shares, 3))))


@dataclass(frozen=True, slots=True)
class Costs:
    """What a load costs. The defaults are what docs/PERFORMANCE.md and bench/capacity.py measured, and two assumptions that say so."""

    #: µs of a worker's CPU for each message and each reading, with every stage on: 23.4 µs a reading with four in a message, and 2.76 times as
    #: much with one, of which these two follow
    message_us: float = 54.9
    reading_us: float = 9.7
    rule_us: float = 0.94  #: for each alarm rule of a reading's series
    #: rows a second that one PostgreSQL has stored, on two cores, with its client beside it
    postgres_rows_per_s: float = 555_000.0
    #: the same of one ClickHouse
    clickhouse_rows_per_s: float = 547_000.0
    postgres_row_bytes: float = 161.0  #: table and indexes, before compression
    clickhouse_row_bytes: float = 0.0  #: 0: not known
    #: of all topics that a message of four readings goes through, packed, once: of a fleet of one kind, and others pack worse; 0: not known
    kafka_message_bytes: float = 103.0
    broker_bytes_per_s: float = 30e6  #: assumed: written to one broker, replicas among it
    partition_readings_per_s: float = 15_000.0  #: assumed: half of a worker, so that a backlog of one can be worked off


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be carried."""

    messages_per_s: float
    readings: float = 4.0  #: in a message
    rules: float = 0.0  #: alarm rules of a series, beyond what a fleet has that is measured
    replication: int = 3
    peak: float = 2.0  #: the busiest minute, as a multiple
    raw_hours: float = 24.0  #: Kafka keeps records so long, by and large


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that a load needs."""

    name: str
    used: float  #: share of what one, or all of those that are planned, can do at the peak; beyond 1 it does not carry the load
    advice: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load needs."""

    workers: int
    partitions: int
    brokers: int | None  #: None: sizes are not known
    readings_per_s: float
    worker_readings_per_s: float  #: that one worker carries, as busy as it should be
    kafka_gb: float | None  #: on all brokers, replicas among it
    postgres_gb_per_day: float | None
    clickhouse_gb_per_day: float | None
    parts: tuple[Part, ...]  #: the one that is short of room first
    headroom: float  #: the load may grow by this factor before the first one is full

    @property
    def bottleneck(self) -> Part:
        """What is full first."""
        return self.parts[0]


def plan(load: Load, costs: Costs, *, workers: int | None = None, partitions: int | None = None) -> Plan:
    """What a load needs, and what is full first.

    Args:
        load: what is to be carried.
        costs: what it costs.
        workers: that there are; None: as many as it needs.
        partitions: that there are; None: as many as it needs.

    Raises:
        ValueError: a number is not positive.
    """
    if load.messages_per_s <= 0 or load.readings <= 0 or load.peak < 1 or load.replication < 1:
        message = "rate, readings and replication must be positive, and the peak at least 1"
        raise ValueError(message)
    readings = load.messages_per_s * load.readings
    message_us = costs.message_us + load.readings * (costs.reading_us + load.rules * costs.rule_us)
    # Of one worker, whose event loop is one core.
    full = 1e6 / message_us * load.readings
    carried = full * TARGET_UTILISATION
    least = max(2, ceil(readings * load.peak / full), ceil(readings / carried))
    planned = workers or least
    # Each worker is to have several, so that one that fails is shared out evenly.
    wanted_partitions = max(12, _rounded(max(3 * least, readings * load.peak / costs.partition_readings_per_s)))
    shared = partitions or wanted_partitions
    bytes_per_s = load.messages_per_s * costs.kafka_message_bytes * load.replication
    brokers = max(load.replication, ceil(bytes_per_s * load.peak / costs.broker_bytes_per_s)) if bytes_per_s else None
    peak = readings * load.peak
    parts = [
        Part("workers", peak / (full * min(planned, shared)), "start more workers, up to one a partition"),
        Part(
            "partitions",
            peak / (full * shared),
            "more partitions (docs/OPERATING.md, Partitions): a worker without one has nothing to do",
        ),
        Part(
            "PostgreSQL",
            peak / costs.postgres_rows_per_s,
            "a faster server; beyond one server divide the devices among systems of their own (kafka.topic_prefix, kafka.group)",
        ),
        Part("ClickHouse", peak / costs.clickhouse_rows_per_s, "more cores, then shards (clickhouse.cluster)"),
    ]
    if brokers is not None:
        parts.append(
            Part(
                "brokers",
                bytes_per_s * load.peak / (costs.broker_bytes_per_s * brokers),
                "more brokers, or faster disks",
            )
        )
    parts.sort(key=lambda part: -part.used)

    def daily(row_bytes: float) -> float | None:
        return readings * 86_400 * row_bytes / 1e9 if row_bytes else None

    return Plan(
        workers=least,
        partitions=wanted_partitions,
        brokers=brokers,
        readings_per_s=readings,
        worker_readings_per_s=carried,
        kafka_gb=bytes_per_s * load.raw_hours * 3_600 / 1e9 if bytes_per_s else None,
        postgres_gb_per_day=daily(costs.postgres_row_bytes),
        clickhouse_gb_per_day=daily(costs.clickhouse_row_bytes),
        parts=tuple(parts),
        headroom=1 / parts[0].used,
    )


def _rounded(partitions: float) -> int:
    """To a number that many numbers of workers divide."""
    return ceil(partitions / 12) * 12
