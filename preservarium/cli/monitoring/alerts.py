"""Every alert, declared once: condition, what it means, what to do, and the series by which a test makes it fire and resolve.

Each has a `hold`: the condition is true for so long before anybody is told. A scrape is every 10 s and rules are looked at as often, so a
dependency that is frozen is told of within 7 (ours) + 10 + 10 + hold seconds.
"""

from dataclasses import dataclass
from typing import Final, Literal

from preservarium.cli.monitoring.names import used

#: How often Prometheus asks, and looks at the rules.
SCRAPE_S: Final = 10
#: What is stored within this time counts as in time, of so many in a hundred: the service level that SLO rules watch.
SLO_S: Final = 10
SLO_RATIO: Final = 0.99

Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Series:
    """A series in a rule's test: what it is while all is well, and while it is not."""

    name: str  #: with its labels
    good: float
    bad: float
    grows: bool = False  #: the numbers are what is added in 15 s
    back: bool = False  #: of what grows: at the end it is 0 again, as a gauge can be and a counter cannot


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert."""

    name: str
    group: str
    severity: Severity
    expression: str
    hold: str  #: Prometheus' `for`
    summary: str  #: one sentence, with Prometheus' templates
    means: str
    do: tuple[str, ...]  #: steps, the first one first
    test: tuple[Series, ...]
    labels: tuple[tuple[str, str], ...] = ()  #: of the alert that the test expects, besides severity
    shown: str = ""  #: `summary` as the test's series make it; empty: it has no template
    bad_minutes: int = 20  #: of the test
    good_minutes: int = 20  #: of the test, before and after


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recording rule."""

    name: str
    expression: str
    meaning: str


RECORDED: Final = (
    Recorded(
        "preservarium:workers_wanted",
        "ceil(sum(preservarium_workers_wanted))",
        "The number of workers that the load needs, for a HorizontalPodAutoscaler, KEDA or people.",
    ),
    Recorded(
        "preservarium:refused:ratio_rate5m",
        "sum by (stage) (rate(preservarium_refused_total[5m])) / (sum by (stage) (rate(preservarium_refused_total[5m]))"
        " + (sum by (stage) (rate(preservarium_readings_total[5m]))"
        " or sum by (stage) (rate(preservarium_records_received_total[5m]))))",
        "Share of a stage's inputs that went to iot_errors: of readings where it counts them, else of records.",
    ),
    Recorded(
        "preservarium:stored_in_time:ratio_rate5m",
        f'sum(rate(preservarium_end_to_end_seconds_bucket{{to="postgres",since="receipt",le="{SLO_S:.1f}"}}[5m]))'
        ' / sum(rate(preservarium_end_to_end_seconds_count{to="postgres",since="receipt"}[5m]))',
        f"Share of batches whose oldest message was in PostgreSQL within {SLO_S} s of its reception.",
    ),
    Recorded(
        "preservarium:stored_in_time:ratio_rate1h",
        f'sum(rate(preservarium_end_to_end_seconds_bucket{{to="postgres",since="receipt",le="{SLO_S:.1f}"}}[1h]))'
        ' / sum(rate(preservarium_end_to_end_seconds_count{to="postgres",since="receipt"}[1h]))',
        "The same over an hour.",
    ),
)

#: What every worker has of its own accord, in tests.
_AT: Final = 'instance="w1",job="preservarium"'
_AT_LABELS: Final = (("instance", "w1"), ("job", "preservarium"))


def _s(name: str, labels: str, good: float, bad: float, *, grows: bool = False) -> Series:
    inside = ",".join(part for part in (labels, _AT) if part)
    return Series(f"{name}{{{inside}}}", good, bad, grows)


def _histogram(name: str, labels: str, below: str, above: str, *, to: str = "") -> tuple[Series, ...]:
    """Two buckets of a histogram: observations lie below `below` while all is well, between both while it is not."""
    comma = "," if labels else ""
    return (
        _s(f"{name}_bucket", f'{labels}{comma}le="{below}"', 10, 0, grows=True),
        _s(f"{name}_bucket", f'{labels}{comma}le="{above}"', 10, 10, grows=True),
        _s(f"{name}_bucket", f'{labels}{comma}le="+Inf"', 10, 10, grows=True),
    )


ALERTS: Final = (
    # --- dependencies: told within a minute
    Alert(
        "DependencyDown",
        "dependencies",
        "critical",
        "min by (dependency) (preservarium_dependency_answers) == 0",
        "10s",
        "{{ $labels.dependency }} does not answer",
        "A server that workers need gives no answer to a ping within 5 s, or refuses it. What needs it is paused, everything else goes"
        " on. Nothing is lost as long as Kafka keeps what waits (see `LagTowardsRetention`).",
        (
            "`preservarium doctor` says from this machine what the server says.",
            "Mend the server. Workers go on by themselves within seconds; do not restart them.",
            "Only some workers say so? Look at the network between them and the server.",
        ),
        (_s("preservarium_dependency_answers", 'dependency="postgres"', 1, 0),),
        (("dependency", "postgres"),),
        "postgres does not answer",
    ),
    Alert(
        "BreakerOpen",
        "dependencies",
        "warning",
        "max by (dependency) (preservarium_breaker_state) == 2",
        "1m",
        "The breaker of {{ $labels.dependency }} is open",
        "Several uses of a server have failed in a row, though it may answer a ping: a full disk, a missing right, a missing migration, a"
        " statement that takes too long.",
        (
            "The overview, or `preservarium doctor`, shows what the server said last.",
            "`run preservarium migrate` in that text: the database is older than the workers.",
            "It closes by itself at the first use that succeeds.",
        ),
        (_s("preservarium_breaker_state", 'dependency="clickhouse"', 0, 2),),
        (("dependency", "clickhouse"),),
        "The breaker of clickhouse is open",
    ),
    Alert(
        "PoolExhausted",
        "dependencies",
        "warning",
        "min_over_time(preservarium_pool_waiting[2m]) > 0",
        "1m",
        "All connections of the pool {{ $labels.pool }} of {{ $labels.instance }} are in use",
        "Something has waited for a connection to PostgreSQL all the time: the server is slow, or the pool is too small.",
        (
            "What takes long? `SELECT query, mean_exec_time FROM pg_stat_statements ORDER BY total_exec_time DESC LIMIT 10`, where the extension is there; else `pg_stat_activity`.",
            "Is the server idle? Then raise `postgres.pool_max`, within the server's `max_connections` for all workers together.",
        ),
        (_s("preservarium_pool_waiting", 'pool="preservarium-sink"', 0, 3),),
        (("pool", "preservarium-sink"), *_AT_LABELS),
        "All connections of the pool preservarium-sink of w1 are in use",
    ),
    Alert(
        "UnderReplicated",
        "dependencies",
        "warning",
        "max by (topic) (preservarium_under_replicated_partitions) > 0",
        "5m",
        "{{ $labels.topic }}: {{ $value | printf \"%.0f\" }} partitions have fewer replicas than they should",
        "A broker is away or cannot keep up. One more that fails may stop the topic, or take what it alone has.",
        ("Look at the brokers: is one down, is a disk full, is one far behind?",),
        (_s("preservarium_under_replicated_partitions", 'topic="iot_raw_data"', 0, 2),),
        (("topic", "iot_raw_data"),),
        "iot_raw_data: 2 partitions have fewer replicas than they should",
    ),
    # --- workers
    Alert(
        "WorkerDown",
        "workers",
        "critical",
        'up{job="preservarium"} == 0',
        "30s",
        "{{ $labels.instance }} gives Prometheus no answer",
        "A worker is gone or hangs, or Prometheus may not ask it. The others take over its partitions after `kafka.session_timeout_s`.",
        (
            "Is the process there? Its log ends with why it stopped: `worker_gives_up`, `worker_stop_hangs`, or nothing (out of memory).",
            "403 `host_unknown`: add the name by which Prometheus asks to `web.allowed_hosts`.",
            "Start it again; it needs no cleaning up.",
        ),
        (_s("up", "", 1, 0),),
        _AT_LABELS,
        "w1 gives Prometheus no answer",
    ),
    Alert(
        "WorkerSilent",
        "workers",
        "warning",
        'max(preservarium_workers{state="gone"}) > 0 and max(preservarium_workers{state="there"})'
        ' < max(max_over_time(preservarium_workers{state="there"}[1h]))',
        "1m",
        "{{ $value | printf \"%.0f\" }} workers are silent, and fewer are there than before",
        "A worker has said nothing to the others for 20 s and did not take its leave. It may not be one that Prometheus knows.",
        (
            "The overview names it (*gone*), with what it said last.",
            "Was it stopped on purpose, by SIGKILL? Then this ends by itself within the hour; SIGTERM says goodbye.",
        ),
        (
            _s("preservarium_workers", 'state="gone"', 0, 1),
            _s("preservarium_workers", 'state="there"', 3, 2),
        ),
        (),
        "1 workers are silent, and fewer are there than before",
    ),
    Alert(
        "WorkerRestarts",
        "workers",
        "warning",
        "changes(process_start_time_seconds{job=\"preservarium\"}[30m]) > 3",
        "0s",
        "{{ $labels.instance }} has been started {{ $value | printf \"%.0f\" }} times within half an hour",
        "A worker dies again and again, or is restarted for its health.",
        (
            "Its log before each start says why: exit code 70 is a lost group, 2 a wrong setting, 137 the kernel (memory).",
            "Health asks only for what a restart mends; where it does not help, look at `/health`.",
        ),
        (Series(f"process_start_time_seconds{{{_AT}}}", 0, 40, grows=True),),
        _AT_LABELS,
        "w1 has been started 6 times within half an hour",
        bad_minutes=6,
        good_minutes=40,
    ),
    Alert(
        "WorkerCpu",
        "workers",
        "warning",
        "rate(preservarium_loop_cpu_seconds_total[5m]) > 0.8"
        " or rate(process_cpu_seconds_total{job=\"preservarium\"}[5m]) / on (instance, job) preservarium_cpu_cores > 0.8",
        "10m",
        "{{ $labels.instance }} uses {{ $value | humanizePercentage }} of what CPU it can use",
        "The event loop of a worker is one thread: near 1 it is full, latency grows, and lag follows. Or the whole process is near its limit.",
        (
            "`preservarium capacity` says how many workers this load needs; start them, up to one a partition.",
            "What does it do? `py-spy top --pid …` on its machine.",
        ),
        (
            _s("preservarium_loop_cpu_seconds_total", "", 4, 13.5, grows=True),
            _s("process_cpu_seconds_total", "", 5, 14, grows=True),
            _s("preservarium_cpu_cores", "", 2, 2),
        ),
        _AT_LABELS,
        "w1 uses 90% of what CPU it can use",
        bad_minutes=30,
    ),
    Alert(
        "WorkerMemory",
        "workers",
        "warning",
        "preservarium_memory_bytes / preservarium_memory_limit_bytes > 0.85",
        "5m",
        "{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its memory",
        "At 100 % the kernel ends the process; it is started again and nothing is lost, but it may happen again.",
        (
            "Give it more, or fewer devices: more workers share the state.",
            "Lower `normalize.config_cache_devices_max` and `agents.pending_records_max`.",
        ),
        (
            _s("preservarium_memory_bytes", "", 300e6, 475e6),
            _s("preservarium_memory_limit_bytes", "", 500e6, 500e6),
        ),
        _AT_LABELS,
        "w1 uses 95% of its memory",
    ),
    Alert(
        "DiskFilling",
        "workers",
        "warning",
        "preservarium_disk_free_bytes / preservarium_disk_size_bytes < 0.1",
        "5m",
        "{{ $value | humanizePercentage }} of the disk of {{ $labels.instance }} are free",
        "The disk of the data directory (state tables) is nearly full. A worker that cannot write its state stops.",
        (
            "What fills it? State has 1 to 2 KiB a series (docs/OPERATING.md, What state takes).",
            "Directories of workers that are gone may be deleted: `faust -A preservarium reset`.",
        ),
        (
            _s("preservarium_disk_free_bytes", "", 50e9, 5e9),
            _s("preservarium_disk_size_bytes", "", 100e9, 100e9),
        ),
        _AT_LABELS,
        "5% of the disk of w1 are free",
    ),
    Alert(
        "LoopBlocked",
        "workers",
        "warning",
        "histogram_quantile(0.9, sum by (le, instance) (rate(preservarium_loop_delay_seconds_bucket[5m]))) > 0.5",
        "5m",
        "The event loop of {{ $labels.instance }} comes late to its timers",
        "Something holds up the whole worker: a large batch, a machine that swaps, a neighbour that takes its CPU.",
        ("The machine's load says whether it is ours; `py-spy top --pid …` on its machine says what it does.",),
        _histogram("preservarium_loop_delay_seconds", "", "0.5", "1.0"),
        (("instance", "w1"),),
        "The event loop of w1 comes late to its timers",
    ),
    Alert(
        "ClockSkew",
        "workers",
        "warning",
        "abs(preservarium_clock_skew_seconds) > 10",
        "1m",
        "The clock of {{ $labels.instance }} is off by {{ $value | printf \"%.0f\" }} s",
        "Compared with Kafka's. Beyond `agents.clock_skew_max_s` (60 s) the worker does nothing for reasons of time: no notices, no silence.",
        ("Set the machine's clock (NTP). It goes on by itself.",),
        (_s("preservarium_clock_skew_seconds", "", 0.02, -30),),
        _AT_LABELS,
        "The clock of w1 is off by 30 s",
    ),
    Alert(
        "MoreWorkersWanted",
        "workers",
        "info",
        'preservarium:workers_wanted > count(up{job="preservarium"} == 1)',
        "10m",
        "The load asks for {{ $value | printf \"%.0f\" }} workers, and fewer are there",
        "The workers are busier than they should be, or cannot work off their lag. An autoscaler acts on the same number.",
        ("Start more, up to one a partition; `preservarium capacity` says what stands in the way first.",),
        (_s("preservarium_workers_wanted", "", 0.6, 1.4), _s("up", "", 1, 1)),
        (),
        "The load asks for 2 workers, and fewer are there",
    ),
    # --- the way of the data
    Alert(
        "StageStalled",
        "pipeline",
        "critical",
        "preservarium_commit_age_seconds > 120 and preservarium_partitions_paused == 0 and preservarium_pending_records > 0",
        "30s",
        "{{ $labels.stage }} of {{ $labels.instance }} has made no progress for {{ $value | printf \"%.0f\" }} s",
        "A stage has work, waits for nothing that is known to be down, and finishes none of it.",
        (
            "`/health` of that worker says which partition; an orchestrator restarts on it.",
            "It comes back after a restart? Then one batch is too heavy: the log has `batch_waits`.",
        ),
        (
            _s("preservarium_commit_age_seconds", 'stage="validate"', 0.5, 200),
            _s("preservarium_partitions_paused", 'stage="validate"', 0, 0),
            _s("preservarium_pending_records", 'stage="validate"', 100, 100),
        ),
        (("stage", "validate"), *_AT_LABELS),
        "validate of w1 has made no progress for 200 s",
    ),
    Alert(
        "StageBehind",
        "pipeline",
        "warning",
        "max by (stage) (preservarium_lag_seconds) > 60",
        "5m",
        "{{ $labels.stage }} is {{ $value | humanizeDuration }} behind",
        "What comes in waits longer than a minute for this stage: it is slower than its input, or waits for a server.",
        (
            "Is a dependency down (`DependencyDown`, `BreakerOpen`)? Mend that.",
            "Are workers busy (`WorkerCpu`)? Start more.",
            "One partition only? One device, or one gateway, sends most of the data.",
        ),
        (_s("preservarium_lag_seconds", 'stage="sink"', 0.4, 90),),
        (("stage", "sink"),),
        "sink is 1m 30s behind",
    ),
    Alert(
        "LagTowardsRetention",
        "pipeline",
        "critical",
        "max by (stage) (predict_linear(preservarium_lag_seconds[30m], 6 * 3600)) > max by (stage) (preservarium_retention_seconds)"
        " and max by (stage) (preservarium_lag_seconds) > 600",
        "10m",
        "{{ $labels.stage }} falls behind so fast that Kafka deletes what it has not read within six hours",
        "Records that nobody has read when their topic's retention is over are lost to this stage.",
        (
            "Lengthen the topic's retention at once: `kafka-configs.sh --alter --entity-type topics --entity-name … --add-config retention.ms=…`.",
            "Then see `StageBehind`.",
        ),
        (
            Series(f'preservarium_lag_seconds{{stage="sync",{_AT}}}', 0, 60, grows=True, back=True),
            _s("preservarium_retention_seconds", 'stage="sync"', 7200, 7200),
        ),
        (("stage", "sync"),),
        "sync falls behind so fast that Kafka deletes what it has not read within six hours",
        bad_minutes=60,
        good_minutes=60,
    ),
    Alert(
        "LagNearRetention",
        "pipeline",
        "critical",
        "max by (stage) (preservarium_lag_seconds) / max by (stage) (preservarium_retention_seconds) > 0.5",
        "1m",
        "{{ $labels.stage }} is behind by {{ $value | humanizePercentage }} of what Kafka keeps",
        "Half of the time is over in which what waits can still be read.",
        ("As `LagTowardsRetention`.",),
        (
            _s("preservarium_lag_seconds", 'stage="sync"', 1, 64800),
            _s("preservarium_retention_seconds", 'stage="sync"', 86400, 86400),
        ),
        (("stage", "sync"),),
        "sync is behind by 75% of what Kafka keeps",
    ),
    Alert(
        "RecordsLost",
        "pipeline",
        "critical",
        "sum by (stage) (increase(preservarium_records_skipped_total[15m])) > 0",
        "0s",
        "{{ $labels.stage }} has missed records that Kafka has deleted",
        "Retention took records before the stage came to them. The log line `offsets_skipped` has the offsets.",
        (
            "Lost to sync only? `preservarium sync verify --repair` brings them from PostgreSQL.",
            "Lost to sink? `preservarium replay` derives them again while the raw records are there.",
            "Lost to normalize? They are gone; ask the senders to repeat.",
        ),
        (_s("preservarium_records_skipped_total", 'stage="sink"', 0, 10, grows=True),),
        (("stage", "sink"),),
        "sink has missed records that Kafka has deleted",
    ),
    Alert(
        "FuseBlown",
        "pipeline",
        "critical",
        "max by (stage, instance) (preservarium_fuse_blown) == 1",
        "0s",
        "The fuse of {{ $labels.stage }} of {{ $labels.instance }} has blown",
        "So much of the input is refused for reasons of ours that the stage was stopped before it empties the topic into iot_errors.",
        (
            "`preservarium dlq list` shows the reasons. Usually a parser or a release that was just rolled out: take it back.",
            "Then close the fuse on that worker's overview, or restart it.",
        ),
        (_s("preservarium_fuse_blown", 'stage="normalize"', 0, 1),),
        (("instance", "w1"), ("stage", "normalize")),
        "The fuse of normalize of w1 has blown",
    ),
    Alert(
        "ErrorRatio",
        "pipeline",
        "warning",
        "preservarium:refused:ratio_rate5m > 0.05 and on (stage) sum by (stage) (increase(preservarium_refused_total[5m])) > 20",
        "5m",
        "{{ $labels.stage }} refuses {{ $value | humanizePercentage }} of its inputs",
        "More than 5 % go to iot_errors. Their bytes are kept, with a reason code.",
        (
            "`/refusals`, or `preservarium dlq list`, shows the causes: devices that are not registered, a parser that does not fit.",
            "Mend the cause, then `preservarium dlq redrive --code …` brings them in.",
        ),
        (
            _s("preservarium_refused_total", 'stage="validate",code="value_range"', 0.1, 25, grows=True),
            _s("preservarium_readings_total", 'stage="validate"', 75, 75, grows=True),
            _s("preservarium_records_received_total", 'stage="validate"', 20, 20, grows=True),
        ),
        (("stage", "validate"),),
        "validate refuses 25% of its inputs",
    ),
    Alert(
        "IntakeStopped",
        "pipeline",
        "warning",
        'sum(rate(preservarium_records_received_total{stage="normalize"}[10m])) == 0'
        ' and sum(rate(preservarium_records_received_total{stage="normalize"}[1h])) > 0',
        "5m",
        "No message of any device has come for ten minutes",
        "Something came within the last hour, and nothing comes now.",
        (
            "Are the connectors there (`preservarium_connector_messages_total`), and connected to their broker?",
            "Does `normalize` have lag? Then it is not the intake: see `StageBehind`.",
        ),
        (_s("preservarium_records_received_total", 'stage="normalize"', 50, 0, grows=True),),
        (),
        "No message of any device has come for ten minutes",
        bad_minutes=40,
    ),
    Alert(
        "PartitionsUnread",
        "pipeline",
        "critical",
        "max by (topic) (preservarium_partitions_unread) > 0",
        "1m",
        "{{ $value | printf \"%.0f\" }} partitions of {{ $labels.topic }} are read by nobody",
        "Somebody has added partitions to a topic of the shared feed. What is written to them is read by no stage.",
        ("docs/OPERATING.md, Partitions, says how to change their number.",),
        (_s("preservarium_partitions_unread", 'topic="iot_raw_data"', 0, 4),),
        (("topic", "iot_raw_data"),),
        "4 partitions of iot_raw_data are read by nobody",
    ),
    Alert(
        "StateDamaged",
        "pipeline",
        "warning",
        "sum by (table, instance) (increase(preservarium_state_damaged_total[30m])) > 0",
        "0s",
        "A local store of {{ $labels.table }} on {{ $labels.instance }} was damaged",
        "It was set aside and restored from Kafka; nothing is lost. A disk that damages files does it again.",
        ("Look at the disk and at the kernel's log.",),
        (_s("preservarium_state_damaged_total", 'table="series_states"', 0, 1, grows=True),),
        (("instance", "w1"), ("table", "series_states")),
        "A local store of series_states on w1 was damaged",
        good_minutes=40,
    ),
    Alert(
        "RebalancesOften",
        "pipeline",
        "warning",
        "sum by (group) (increase(preservarium_rebalances_total[15m])) > 20",
        "5m",
        "The group {{ $labels.group }} is assigned anew all the time",
        "Each time stages pause for seconds. Workers that come and go, or that are too slow to say that they are alive.",
        ("Which worker restarts (`WorkerRestarts`) or is blocked (`LoopBlocked`)?",),
        (_s("preservarium_rebalances_total", 'group="preservarium"', 0, 1, grows=True),),
        (("group", "preservarium"),),
        "The group preservarium is assigned anew all the time",
        bad_minutes=30,
    ),
    Alert(
        "RegistryNotRelayed",
        "pipeline",
        "warning",
        "max(min_over_time(preservarium_registry_outbox_rows[10m])) > 0",
        "1m",
        "Changes of the registry do not reach the workers",
        "What was registered is in PostgreSQL, and has waited for ten minutes to be sent to Kafka.",
        (
            "A pooler in transaction mode before PostgreSQL: set `postgres.direct_url`.",
            "The log of the worker that leads the relay says why.",
        ),
        (_s("preservarium_registry_outbox_rows", "", 0, 5),),
        (),
        "Changes of the registry do not reach the workers",
        bad_minutes=30,
    ),
    # --- time
    Alert(
        "ProcessingTimeExceeded",
        "latency",
        "warning",
        "histogram_quantile(0.95, sum by (le) (rate(data_processing_latency_seconds_bucket[5m]))) > 300",
        "1m",
        "Readings need {{ $value | humanizeDuration }} from reception to PostgreSQL",
        "The 95th percentile is beyond five minutes.",
        ("As `StageBehind`: the stage with the largest `preservarium_lag_seconds` is the one.",),
        _histogram("data_processing_latency_seconds", "", "300.0", "900.0"),
        (),
        "Readings need 14m 30s from reception to PostgreSQL",
    ),
    Alert(
        "SloBurnFast",
        "latency",
        "critical",
        f"1 - preservarium:stored_in_time:ratio_rate5m > 14.4 * (1 - {SLO_RATIO:g})"
        f" and 1 - preservarium:stored_in_time:ratio_rate1h > 14.4 * (1 - {SLO_RATIO:g})",
        "2m",
        f"Too many readings are stored later than {SLO_S} s after their reception",
        f"{SLO_RATIO:.0%} are to be stored within {SLO_S} s. At this pace the month's allowance is used up within two days.",
        ("As `StageBehind`.",),
        (
            *_histogram("preservarium_end_to_end_seconds", 'to="postgres",since="receipt"', "10.0", "30.0"),
            _s("preservarium_end_to_end_seconds_count", 'to="postgres",since="receipt"', 10, 10, grows=True),
        ),
        (),
        f"Too many readings are stored later than {SLO_S} s after their reception",
        bad_minutes=60,
        good_minutes=75,
    ),
    Alert(
        "SyncSlow",
        "latency",
        "warning",
        'histogram_quantile(0.95, sum by (le) (rate(preservarium_store_seconds_bucket{store="clickhouse"}[5m]))) > 30',
        "5m",
        "Inserts into ClickHouse take {{ $value | humanizeDuration }}",
        "The 95th percentile of one insert is beyond 30 s.",
        (
            "`system.query_log` has what ClickHouse does; too many parts show in `SELECT table, count() FROM system.parts WHERE active GROUP BY table`.",
            "Is its disk full, or does it merge?",
        ),
        _histogram("preservarium_store_seconds", 'store="clickhouse"', "30.0", "60.0"),
        (),
        "Inserts into ClickHouse take 58.5s",
    ),
    Alert(
        "StoreSlow",
        "latency",
        "warning",
        'histogram_quantile(0.95, sum by (le) (rate(preservarium_store_seconds_bucket{store="postgres"}[5m]))) > 5',
        "5m",
        "Transactions of the sink take {{ $value | humanizeDuration }}",
        "The 95th percentile of one transaction is beyond 5 s.",
        ("`pg_stat_activity` and `pg_stat_statements` show what PostgreSQL does; does it wait for its disk, or for locks?",),
        _histogram("preservarium_store_seconds", 'store="postgres"', "5.0", "10.0"),
        (),
        "Transactions of the sink take 9.75s",
    ),
    Alert(
        "DashboardSlow",
        "latency",
        "warning",
        "histogram_quantile(0.95, sum by (le, dashboard) (rate(preservarium_dashboard_seconds_bucket[10m]))) > 2",
        "5m",
        "The dashboard {{ $labels.dashboard }} takes {{ $value | humanizeDuration }}",
        "The 95th percentile of its queries is beyond 2 s.",
        ("`system.query_log` has ClickHouse's queries; does it merge, or insert more than usual?",),
        _histogram("preservarium_dashboard_seconds", 'dashboard="latest"', "2.0", "5.0"),
        (("dashboard", "latest"),),
        "The dashboard latest takes 4.85s",
    ),
    Alert(
        "CacheMisses",
        "latency",
        "warning",
        'sum by (cache) (rate(preservarium_cache_total{outcome="hit"}[15m])) / sum by (cache) (rate(preservarium_cache_total[15m])) < 0.7'
        " and sum by (cache) (rate(preservarium_cache_total[15m])) > 20",
        "15m",
        "Only {{ $value | humanizePercentage }} of the look-ups of {{ $labels.cache }} find what they want in memory",
        "Each miss is a look into the table, or a question to the database.",
        (
            "More devices than the cache holds: raise `normalize.config_cache_devices_max`, or start more workers.",
            "Right after a start, or after a change of a device type, it is normal and ends by itself.",
        ),
        (
            _s("preservarium_cache_total", 'cache="compiled_configs",outcome="hit"', 900, 500, grows=True),
            _s("preservarium_cache_total", 'cache="compiled_configs",outcome="miss"', 10, 500, grows=True),
        ),
        (("cache", "compiled_configs"),),
        "Only 50% of the look-ups of compiled_configs find what they want in memory",
        bad_minutes=45,
        good_minutes=30,
    ),
    Alert(
        "HttpErrors",
        "latency",
        "warning",
        'sum by (route) (rate(preservarium_http_seconds_count{code=~"5..",route!~"/health|/ready"}[5m]))'
        ' / sum by (route) (rate(preservarium_http_seconds_count[5m])) > 0.05'
        ' and sum by (route) (increase(preservarium_http_seconds_count{code=~"5..",route!~"/health|/ready"}[5m])) > 5',
        "5m",
        "{{ $value | humanizePercentage }} of the requests to {{ $labels.route }} fail",
        "503 says that something that the route needs is not there now, 500 a defect of ours (it stands in the log).",
        ("The answers and the worker's log say why.",),
        (
            _s("preservarium_http_seconds_count", 'route="/ingest",method="POST",code="202"', 90, 90, grows=True),
            _s("preservarium_http_seconds_count", 'route="/ingest",method="POST",code="503"', 0, 30, grows=True),
        ),
        (("route", "/ingest"),),
        "25% of the requests to /ingest fail",
    ),
    # --- stores and people
    Alert(
        "StorageJobsFailing",
        "stores",
        "warning",
        "max(preservarium_storage_jobs_failing) > 0",
        "5m",
        "{{ $value | printf \"%.0f\" }} background jobs of the storage fail",
        "Compression, retention, partitions ahead or roll-ups do not run. Rows are stored all the same, as long as there are partitions.",
        ("The view `storage_jobs` has what each said last.", "`preservarium doctor` knows the usual causes."),
        (_s("preservarium_storage_jobs_failing", "", 0, 2),),
        (),
        "2 background jobs of the storage fail",
    ),
    Alert(
        "NoticesRefused",
        "people",
        "critical",
        'sum by (channel) (increase(preservarium_notices_total{outcome="refused"}[15m])) > 0',
        "0s",
        "Notices by {{ $labels.channel }} do not reach anybody",
        "A mail server, a webhook or an Apprise service has refused notices, or could not be reached for as long as they are tried.",
        (
            "`preservarium notices` shows which, and what was said.",
            "Somebody who should know of an alarm may not: look at `/alarms`.",
        ),
        (_s("preservarium_notices_total", 'channel="mail",outcome="refused"', 0, 1, grows=True),),
        (("channel", "mail"),),
        "Notices by mail do not reach anybody",
    ),
    Alert(
        "AlarmListOld",
        "people",
        "warning",
        "max(preservarium_alarm_board_current) == 0",
        "2m",
        "No worker has an alarm list that is complete and of now",
        "Operators see on the page why: Kafka is away, or more alarms stand than the list holds.",
        ("As `DependencyDown` for Kafka.",),
        (_s("preservarium_alarm_board_current", "", 1, 0),),
        (),
        "No worker has an alarm list that is complete and of now",
    ),
)  # fmt: skip


def check() -> set[str]:
    """The metrics that the rules use.

    Raises:
        UnknownMetric: one that there is not, in a rule or in its test.
        ValueError: two alerts of one name.
    """
    names = [alert.name for alert in ALERTS]
    if len(names) != len(set(names)):
        message = "two alerts have one name"
        raise ValueError(message)
    found: set[str] = set()
    for expression in [a.expression for a in ALERTS] + [r.expression for r in RECORDED]:
        found |= used(expression)
    for alert in ALERTS:
        for series in alert.test:
            used(series.name)
    return found
