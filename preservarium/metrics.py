"""Every metric, declared once: name, kind, unit, labels, meaning.

Counters end in `_total`; the unit is the last word before it. Documentation, dashboards and alert rules are made from
`CATALOGUE`. Use the module's attributes: `RECORDS_RECEIVED.labels("normalize").inc(n)`.
"""

from dataclasses import dataclass
from typing import Literal

from prometheus_client import Counter, Gauge, Histogram

NAMESPACE = "preservarium"

#: Seconds from a quick database round trip to a stuck dependency.
LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """A declared metric."""

    name: str  #: as Prometheus sees it
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str


CATALOGUE: dict[str, Metric] = {}


def _declare(name: str, kind: Literal["counter", "gauge", "histogram"], labels: tuple[str, ...], meaning: str) -> str:
    full = f"{NAMESPACE}_{name}"
    if full in CATALOGUE:
        message = f"metric {full} is declared twice"
        raise ValueError(message)
    CATALOGUE[full] = Metric(full, kind, labels, meaning)
    return full


def _counter(name: str, meaning: str, *labels: str) -> Counter:
    return Counter(_declare(name, "counter", labels, meaning), meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(_declare(name, "gauge", labels, meaning), meaning, labels)


def _histogram(name: str, meaning: str, *labels: str, buckets: tuple[float, ...] = LATENCY_BUCKETS_S) -> Histogram:
    return Histogram(_declare(name, "histogram", labels, meaning), meaning, labels, buckets=buckets)


# --- every stage ---
RECORDS_RECEIVED = _counter("records_received_total", "Kafka records handed to a stage.", "stage")
RECORDS_SKIPPED = _counter(
    "records_skipped_total", "Records that Kafka no longer had when a stage came to them.", "stage"
)
RECORDS_SENT = _counter("records_sent_total", "Kafka records that a stage produced, acknowledged.", "stage", "topic")
READINGS = _counter("readings_total", "Readings that a stage passed on.", "stage")
CLOCK_SKEW_SECONDS = _gauge(
    "clock_skew_seconds",
    "How far this worker's clock is ahead of Kafka's; beyond agents.clock_skew_max_s no tick runs.",
)
DUPLICATES = _counter("duplicates_total", "Lines that a stage skipped, because it had applied them before.", "stage")
REPEATED = _counter("repeated_total", "Messages whose device, or a network on the way, sent them twice.")
WITHOUT_PAYLOAD = _counter(
    "messages_without_payload_total", "Raw messages that carried nothing of their device: nothing is stored of them."
)
REFUSED = _counter("refused_total", "Inputs that went to iot_errors.", "stage", "code")
BATCH_SECONDS = _histogram("batch_seconds", "Time from handing over a batch to its acknowledgement.", "stage")
BATCH_RETRIES = _counter("batch_retries_total", "Batches tried again.", "stage", "kind")
PENDING_RECORDS = _gauge("pending_records", "Records fetched and not yet acknowledged.", "stage")
LAG_RECORDS = _gauge(
    "lag_records", "Records in Kafka that a stage has not acknowledged.", "stage", "topic", "partition"
)
COMMIT_AGE_SECONDS = _gauge(
    "commit_age_seconds", "How long the oldest record that a stage was given has not been committed.", "stage"
)
PARTITIONS_PAUSED = _gauge("partitions_paused", "Partitions paused for a dependency or a fuse.", "stage")
PARTITIONS_UNREAD = _gauge(
    "partitions_unread", "Partitions that somebody added to a topic, and that no stage with state may read.", "topic"
)
REBALANCES = _counter("rebalances_total", "Group rebalances seen.", "group")
OFFSETS_FOREIGN = _counter(
    "offsets_foreign_total",
    "Partitions whose offset in Kafka no worker has committed: another tool has set it.",
    "group",
)
WATCHDOG = _counter("watchdog_total", "What the group watchdog did.", "action")

# --- dependencies ---
BREAKER_STATE = _gauge("breaker_state", "0 closed, 1 half-open, 2 open.", "dependency")
BREAKER_OPENED = _counter("breaker_opened_total", "Times a circuit breaker opened.", "dependency")
DEPENDENCY_ANSWERS = _gauge(
    "dependency_answers",
    "1 while a server answers when it is asked for nothing else, 0 while it does not.",
    "dependency",
)
FUSE_BLOWN = _gauge("fuse_blown", "1 while a stage is stopped because too much of its input is refused.", "stage")
CACHE = _counter("cache_total", "Look-ups by outcome.", "cache", "outcome")

# --- registry ---
REGISTRY_OUTBOX = _gauge("registry_outbox_rows", "Registry changes that the relay is about to send.")
REGISTRY_RELAYED = _counter("registry_relayed_total", "Registry records that the relay sent, acknowledged.")
REGISTRY_DOCUMENTS = _gauge("registry_documents", "Documents of iot_type_registry in this worker's memory.", "kind")
REGISTRY_REV = _gauge("registry_rev", "Highest revision of iot_type_registry that this worker has seen.")

# --- extract ---
EXTRACT_ROWS = _counter(
    "extract_rows_total", "Rows that the source told of: sent, gone, or known already.", "table", "outcome"
)
EXTRACT_LOOKS = _counter(
    "extract_looks_total", "Looks at a table, and whether they found a change.", "table", "outcome"
)
EXTRACT_LEADS = _gauge("extract_leads", "1 in the worker that extracts.")

# --- connectors ---
CONNECTOR_MESSAGES = _counter("connector_messages_total", "Device messages taken, acknowledged by Kafka.", "connector")
CONNECTOR_REFUSED = _counter("connector_refused_total", "Device messages refused at the door.", "connector", "reason")
CONNECTOR_RECONNECTS = _counter(
    "connector_reconnects_total", "Connections lost or given up for a redelivery.", "connector"
)

# --- state ---
STATE_DAMAGED = _counter("state_damaged_total", "Local stores that were damaged, set aside and restored.", "table")
STATE_FENCED = _counter("state_fenced_total", "Writes of state that were not this worker's to make any more.", "table")
RESTORES_ANEW = _counter(
    "restores_anew_total", "Times that restoring tables began anew: a step failed or took too long."
)
STATE_REPAIRED = _counter("state_repaired_total", "Values written again over those of a stale worker.", "table")

# --- stores ---
STORE_ROWS = _counter("store_rows_total", "Rows by outcome: stored, duplicate, rejected.", "store", "outcome")
STORE_SECONDS = _histogram("store_seconds", "Time of one write, begin to commit.", "store")
STORAGE_JOBS_FAILING = _gauge("storage_jobs_failing", "Background jobs of the storage whose last run failed.")
STORAGE_JOBS_RUN = _counter(
    "storage_jobs_run_total",
    "Background jobs of TimescaleDB that a worker ran, because the server did not: done, failed.",
    "outcome",
)

# --- dashboards ---
DASHBOARD_ANSWERS = _counter(
    "dashboard_answers_total",
    "Answers by origin: asked of ClickHouse, shared with one under way, cached.",
    "dashboard",
    "origin",
)
DASHBOARD_SECONDS = _histogram("dashboard_seconds", "Time of one query of a dashboard.", "dashboard")
DASHBOARD_CACHE_BYTES = _gauge("dashboard_cache_bytes", "Answers that are kept.")

# --- windows ---
WINDOWS = _counter("windows_total", "Records of windows by cause: watermark, silence, late.", "cause")
AGGREGATE_LATE = _counter(
    "aggregate_late_total", "Late readings by outcome: corrected, dropped beyond the horizon.", "outcome"
)

# --- anomalies ---
ANOMALIES = _counter("anomalies_total", "Anomalies that began.")

# --- alarms and notices ---
ALARM_LATE = _counter("alarm_late_total", "Readings no younger than the last one of their alarm: not evaluated.")
ALARM_TRANSITIONS = _counter("alarm_transitions_total", "Alarm transitions.", "transition", "severity")
ALARM_BOARD_CURRENT = _gauge("alarm_board_current", "1 while this worker's alarm list is everything, and of now.")
ALARM_ANSWER_SECONDS = _histogram("alarm_answer_seconds", "Time from an operator's action to the machine's answer.")
ALARM_ACTIONS = _counter("alarm_actions_total", "Operators' actions by outcome: done, refused.", "action", "outcome")
# Each worker that has the alarm list sees the whole system: take the maximum over the workers, not the sum.
ALARMS_STANDING = _gauge("alarms_standing", "Annunciated alarms that stand, in the whole system.", "severity")
ALARMS_WAITING = _gauge("alarms_waiting", "Of them, those that nobody has acknowledged.", "severity")
ALARMS_CHATTERING = _gauge("alarms_chattering", "Standing alarms that chatter, in the whole system.")
ALARMS_RECENT = _gauge(
    "alarms_recent",
    "Annunciations of the last 10 minutes by recipient, in the whole system; '' is everybody.",
    "recipient",
)
ALARM_FLOOD = _gauge(
    "alarm_flood", "1 while the recipient has a flood: above 10 in 10 minutes, until below 5.", "recipient"
)
NOTICES = _counter("notices_total", "Notices by outcome: sent, retried, refused, skipped.", "channel", "outcome")
NOTICE_NUMBERS = _counter(
    "notice_numbers_total",
    "Notices whose number does not follow the one before: after a gap (notices are missing, or their plan was lost), or back (state of the group stage was lost). They are sent all the same.",
    "stage",
    "what",
)
NOTICE_SECONDS = _histogram(
    "notice_seconds",
    "Time from planning a notice until its channel took or refused it.",
    "channel",
    buckets=(1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0),
)

# --- commands ---
COMMAND_EVENTS = _counter("command_events_total", "Transitions of commands to devices.", "event", "state")
COMMANDS_REPEATED = _counter("commands_repeated_total", "Requests whose idempotency key was known: not repeated.")
COMMAND_REPORTS_IGNORED = _counter(
    "command_reports_ignored_total", "Reports of commands that had ended, or of another try."
)
COMMANDS_ASKED = _counter("commands_asked_total", "Commands that transitions of alarms asked for.")
DOWNLINKS = _counter("downlinks_total", "Downlinks by outcome: sent, expired, failed, duplicate.", "format", "outcome")

# --- parser scripts ---
SCRIPT_FAULTS = _counter("script_faults_total", "Calls of parser scripts without a result.", "code")
PARSER_EXAMPLES_FAILING = _gauge("parser_examples_failing", "Examples of active parsers that fail; checked at start.")
SANDBOX_KILLS = _counter("sandbox_kills_total", "Sandbox processes killed for a script that did not end.", "lane")
