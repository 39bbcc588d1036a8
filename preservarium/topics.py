"""Every Kafka topic, declared once: partitions, retention, compression, key, record.

`preservarium migrate` creates them; `preservarium topics` compares what is declared with what is there.
Topics keyed by device have the same partition count, because tables and streams are co-partitioned by
murmur2(device) % N, the default of the Java clients and of aiokafka.
"""

from dataclasses import dataclass
from typing import Final

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS


@dataclass(frozen=True, slots=True)
class Topic:
    """A declared topic."""

    name: str  #: without the prefix that the settings may put before it
    key: str  #: what the record key is
    record: str  #: what a value (or a line of it) is
    retention_ms: int | None  #: None: kept for ever (compacted topics keep the newest value of each key)
    compacted: bool = False
    config: tuple[tuple[str, str], ...] = ()  #: further topic settings of Kafka
    writers: str = ""  #: who writes it and is no stage: stages say of themselves what they write
    readers: str = ""  #: who reads it and is no stage

    def full(self, prefix: str) -> str:
        """The name in the cluster."""
        return prefix + self.name


RAW = Topic(
    "iot_raw_data",
    "device address",
    "raw message, one a line",
    24 * HOUR_MS,
    writers="connectors, `dlq redrive`",
    readers="`trace`, `lineage verify`, `replay reset`",
)
STANDARDIZED = Topic(
    "iot_standardized_data",
    "device address",
    "standardized message, one a line",
    24 * HOUR_MS,
    writers="`replay reset`",
)
VALIDATED = Topic("iot_validated_data", "device address", "validated message, one a line", 7 * DAY_MS)
ERRORS = Topic(
    "iot_errors", "device address", "error line", 14 * DAY_MS, writers="`replay reset`", readers="`dlq`, `trace`"
)
#: As long as what it tells about: iot_errors.
REDRIVEN = Topic(
    "iot_redriven",
    "raw coordinates",
    "marker of an input that was redriven",
    14 * DAY_MS,
    writers="`dlq redrive`",
    readers="`dlq`",
)
ALERTS = Topic("iot_alerts", "device address", "alarm transition", 14 * DAY_MS)
ANOMALIES = Topic("anomaly_alerts", "device address", "anomaly", 14 * DAY_MS)
AGGREGATES = Topic("iot_aggregates", "device address", "closed window of one series", 7 * DAY_MS)
COMMANDS = Topic(
    "device_commands",
    "device address",
    "request, cancel or report of a command",
    7 * DAY_MS,
    writers="console, HTTP API, `commands`, connectors (what networks and devices report)",
)
COMMAND_EVENTS = Topic("command_events", "device address", "transition of a command", 14 * DAY_MS)
DOWNLINKS = Topic("device_downlinks", "device address", "try of a command, to be sent", 7 * DAY_MS)
#: As long as a command can live (commands.EXPIRES_S_MAX).
MAILBOX = Topic(
    "device_mailbox",
    "device address",
    "downlink for a device that fetches, or what it has",
    7 * DAY_MS,
    writers="HTTP connector",
    readers="HTTP connector, in memory",
)
#: As long as what they tell about: iot_alerts.
NOTICE_EVENTS = Topic("notice_events", "recipient", "transition that a recipient is to hear of", 14 * DAY_MS)
NOTICES = Topic("notices", "recipient", "notice to one recipient", 14 * DAY_MS)
NOTICE_RECEIPTS = Topic("notice_receipts", "recipient", "what became of a notice", 14 * DAY_MS)
DEVICE_REGISTRY = Topic(
    "iot_device_registry", "device address", "device configuration", None, compacted=True, writers="registry's relay"
)
TYPE_REGISTRY = Topic(
    "iot_type_registry",
    "kind/name",
    "datatype, parser, device type, rule or recipient",
    None,
    compacted=True,
    writers="registry's relay",
    readers="every worker's catalogue, in memory",
)
ALARM_ACTIONS = Topic(
    "alarm_actions",
    "device address",
    "operator action",
    7 * DAY_MS,
    writers="console, HTTP API, `alarms`, links in notices",
)
ALARM_ANSWERS = Topic(
    "alarm_answers",
    "device address",
    "what became of an operator action",
    14 * DAY_MS,
    readers="whoever sent the action",
)
#: Compacted, because an alarm may stand for longer than any retention: whoever reads it knows all that is not normal.
ALARM_STANDING = Topic(
    "alarm_standing",
    "[device address, rule, pin]",
    "alarm that is not normal, as it stands",
    None,
    compacted=True,
    readers="every worker's alarm list, in memory; `alarms`",
)
#: Its segments are closed every hour, or Kafka would keep what is older for a week. Records have the broker's time: with it
#: each worker compares its own clock.
WORKER_STATUS = Topic(
    "worker_status",
    "worker",
    "how a worker is: breakers, fuses, health",
    HOUR_MS,
    config=(("segment.ms", str(HOUR_MS)), ("message.timestamp.type", "LogAppendTime")),
    writers="every worker",
    readers="every worker's console, in memory",
)
TASK_EVENTS = Topic("task_events", "file id", "task event", 7 * DAY_MS, writers="change data capture, extract")
EMPLOYEES = Topic(
    "employees", "employee code", "employee", None, compacted=True, writers="change data capture, extract"
)
#: Input of the sink service that this replaces; its name is a setting, its partitions are whatever its owner made.
DECODED = Topic(
    "decoded_iot_data", "any", "old service's message", 24 * HOUR_MS, writers="the replaced services' normalizer"
)

TOPICS: Final[tuple[Topic, ...]] = (
    RAW, STANDARDIZED, VALIDATED, ERRORS, REDRIVEN, ALERTS, ANOMALIES, AGGREGATES, COMMANDS,
    COMMAND_EVENTS, DOWNLINKS, MAILBOX,
    NOTICE_EVENTS, NOTICES, NOTICE_RECEIPTS,
    DEVICE_REGISTRY, TYPE_REGISTRY, ALARM_ACTIONS, ALARM_ANSWERS, ALARM_STANDING, WORKER_STATUS, TASK_EVENTS, EMPLOYEES, DECODED,
)  # fmt: skip

BY_NAME: Final = {t.name: t for t in TOPICS}

#: Names of the state tables (tables/). Each has a changelog, `<kafka.group>-<table>-changelog`, that Faust names and we make.
STATE_TABLES: Final[tuple[str, ...]] = (
    "device_configs", "series_states", "window_states", "anomaly_states", "alarm_states", "command_states",
    "notice_states", "employees",
)  # fmt: skip

#: What a changelog keeps uncompacted: Kafka must not take a stale worker's value for the newest one before the owner has
#: written over it (streaming/fencing.py), which takes a minute at most.
CHANGELOG_COMPACTION_LAG_MS: Final = 10 * 60_000


def changelog(table: str, group: str) -> str:
    """The full name of a table's changelog: it has no prefix, but the consumer group's name."""
    return f"{group}-{table}-changelog"
