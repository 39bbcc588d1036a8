"""Kafka topics: made as they are declared, and compared with what is there.

Faust does not create plain topics and never looks at existing ones, so this is the one place that does.
"""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    KafkaConnectionError,
    KafkaError,
    TopicAlreadyExistsError,
    for_code,
)

from preservarium import topics as declared_topics
from preservarium.errors import PreservariumError
from preservarium.settings import Settings
from preservarium.streaming import kafka_clients
from preservarium.topics import TOPICS, Topic
from preservarium.waiting import until_up

log = structlog.get_logger(__name__)

#: A batch is compressed and framed: this much above the largest record is left for its headers, key and batch header.
RECORD_OVERHEAD_BYTES: Final = 65_536
#: A new topic is usable when its leaders are known to the broker we ask; seconds even on a busy machine.
READY_WAIT_S: Final = 30.0
REQUEST_TIMEOUT_MS: Final = 30_000
#: What was altered is known to every broker within this time.
SEEN_S: Final = 10.0
#: What our guarantees need of a topic that is there already: the broker's clock beside a worker's, and writes of workers that were
#: taken for dead still there to be seen. Everything else is the affair of whoever runs the cluster, and is told.
NEEDED: Final = ("message.timestamp.type", "min.compaction.lag.ms")
#: Of a topic's configuration, that this topic has it of its own, and not from its broker (Kafka's ConfigSource).
_OF_TOPIC: Final = 1


class TopicsError(PreservariumError):
    """The topics cannot be made or looked at."""


@dataclass(frozen=True, slots=True)
class Declared:
    """A topic as it should be in this cluster."""

    name: str  #: with prefix
    partitions: int | None  #: None: whatever its owner made
    replication: int | None
    config: dict[str, str]  #: empty where the topic has another owner
    create_partitions: int
    create_replication: int


@dataclass(frozen=True, slots=True)
class Actual:
    """A topic as it is."""

    partitions: int
    replication: int
    config: dict[str, str]


@dataclass(slots=True)
class Comparison:
    """Declared topics beside the actual ones."""

    topics: list[tuple[Declared, Actual | None]] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)  #: one line for each
    #: False where the broker cannot say how its topics are configured (librdkafka's in-memory broker)
    config_known: bool = True

    @property
    def missing(self) -> list[str]:
        """Names of declared topics that do not exist."""
        return [d.name for d, a in self.topics if a is None]

    def differences(self) -> list[str]:
        """One line for each thing that is not as declared; missing topics are not among them."""
        lines: list[str] = []
        for declared, actual in self.topics:
            if actual is None:
                continue
            if declared.partitions is not None and actual.partitions != declared.partitions:
                lines.append(f"{declared.name}: partitions {actual.partitions}, declared {declared.partitions}")
            if declared.replication is not None and actual.replication != declared.replication:
                lines.append(f"{declared.name}: replication {actual.replication}, declared {declared.replication}")
            if self.config_known:
                for key, value in declared.config.items():
                    there = actual.config.get(key)
                    if there != value:
                        lines.append(f"{declared.name}: {key} {there}, declared {value}")
        return lines

    def needs(self) -> dict[str, dict[str, str]]:
        """Name of a topic -> what of `NEEDED` it does not have."""
        found: dict[str, dict[str, str]] = {}
        for declared, actual in self.topics:
            for key in NEEDED if actual is not None and self.config_known else ():
                wanted, there = declared.config.get(key), actual.config.get(key) if actual else None
                if wanted is None or wanted == there:
                    continue
                if wanted.isdigit() and there and there.isdigit() and int(there) > int(wanted):
                    continue  # more than is needed
                found.setdefault(declared.name, {})[key] = wanted
        return found

    @property
    def equal(self) -> bool:
        """Whether everything is there and as declared."""
        return not self.missing and not self.differences()

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "topics": [{**asdict(d), "actual": asdict(a) if a else None} for d, a in self.topics],
            "created": self.created,
            "altered": self.altered,
            "missing": self.missing,
            "differences": self.differences(),
            "config_known": self.config_known,
            "equal": self.equal,
        }


def declare(topic: Topic, settings: Settings) -> Declared | None:
    """What a declared topic is in this cluster; None where the settings switch it off."""
    kafka = settings.kafka
    if topic is declared_topics.DECODED:
        if not settings.normalize.decoded_topic:
            return None
        # Its owner is the service that we replace: made if it is missing, otherwise left as it is.
        return Declared(settings.normalize.decoded_topic, None, None, {}, kafka.partitions, kafka.replication)
    config = {
        "cleanup.policy": "compact" if topic.compacted else "delete",
        "compression.type": "uncompressed" if kafka.compression == "none" else kafka.compression,
        "max.message.bytes": str(kafka.record_bytes_max + RECORD_OVERHEAD_BYTES),
    }
    if not topic.compacted:
        config["retention.ms"] = str(-1 if topic.retention_ms is None else topic.retention_ms)
    config.update(topic.config)
    return Declared(
        topic.full(kafka.topic_prefix), kafka.partitions, kafka.replication, config, kafka.partitions, kafka.replication
    )


def declare_all(settings: Settings) -> list[Declared]:
    """Every declared topic of this cluster, and the changelogs of the state tables."""
    return [
        *(d for d in (declare(t, settings) for t in TOPICS) if d is not None),
        *declare_changelogs(settings, declared_topics.STATE_TABLES),
    ]


def declare_changelogs(settings: Settings, tables: Iterable[str]) -> list[Declared]:
    """The changelogs of state tables: as Faust would make them, but with a lag of compaction (streaming/fencing.py)."""
    kafka = settings.kafka
    config = {
        "cleanup.policy": "compact",
        "compression.type": "uncompressed" if kafka.compression == "none" else kafka.compression,
        "max.message.bytes": str(kafka.record_bytes_max + RECORD_OVERHEAD_BYTES),
        "min.compaction.lag.ms": str(declared_topics.CHANGELOG_COMPACTION_LAG_MS),
    }
    return [
        Declared(
            declared_topics.changelog(table, kafka.group),
            kafka.partitions,
            kafka.replication,
            config,
            kafka.partitions,
            kafka.replication,
        )
        for table in tables
    ]


async def compare(settings: Settings, *, wait_s: float = 0.0) -> Comparison:
    """Look at the topics and change nothing.

    Args:
        settings: where the brokers are and what is declared.
        wait_s: how long to wait for brokers that are starting.

    Raises:
        TopicsError: no broker could be reached in that time.
    """
    admin = await _connect(settings, wait_s)
    try:
        return await _compare(admin, declare_all(settings))
    finally:
        await admin.close()


async def create(settings: Settings, *, wait_s: float = 0.0) -> Comparison:
    """Make the declared topics that are missing, and give those that are there what they need (`NEEDED`). Idempotent.

    Arguments as in `compare`. Where the brokers refuse to alter a topic, it is among the differences still.

    Raises:
        TopicsError: the brokers cannot be reached, or refuse to make a topic.
    """
    found = await _create_missing(settings, declare_all(settings), wait_s)
    if not (needs := found.needs()):
        return found
    admin = await _connect(settings, wait_s)
    try:
        altered = await _alter(admin, needs)
        after = await _until_seen(admin, declare_all(settings), altered)
    finally:
        await admin.close()
    after.created = found.created
    after.altered = [f"{name}: {key} is {v} now" for name in altered for key, v in needs[name].items()]
    return after


async def create_changelogs(settings: Settings, tables: Iterable[str], *, wait_s: float = 0.0) -> Comparison:
    """Make the changelogs of these tables that are missing, and wait until every one has leaders.

    A worker that joins its group before the brokers know a changelog would be assigned none of it.

    Raises:
        TopicsError: as `create`.
    """
    return await _create_missing(settings, declare_changelogs(settings, tables), wait_s)


async def _create_missing(settings: Settings, declared: list[Declared], wait_s: float) -> Comparison:
    admin = await _connect(settings, wait_s)
    try:
        before = await _compare(admin, declared)
        missing = [d for d in declared if d.name in set(before.missing)]
        if not missing:
            return before
        if await _has_controller(admin):
            created = await _create(admin, missing)
        else:
            # librdkafka's in-memory broker has no CreateTopics; it makes a topic that metadata is asked for.
            created = [d.name for d in missing]
            await admin.describe_topics(created)
        after = await _until_ready(admin, declared)
        after.created = created
        log.info("topics created", topics=after.created)
        return after
    finally:
        await admin.close()


async def _connect(settings: Settings, wait_s: float) -> Any:
    async def attempt() -> Any:
        admin = AIOKafkaAdminClient(
            **kafka_clients.connection(settings.kafka),
            client_id="preservarium-admin",
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        try:
            await admin.start()
        except BaseException as e:
            with suppress(KafkaError, OSError):
                await admin.close()
            if isinstance(e, KafkaConnectionError) and (reason := await kafka_clients.refusal(settings.kafka)):
                raise KafkaConnectionError(reason) from None
            raise
        return admin

    what = f"Kafka at {settings.kafka.bootstrap_servers}"
    return await until_up(what, attempt, not_yet=(KafkaError, OSError), wait_s=wait_s, error=TopicsError)


async def _has_controller(admin: Any) -> bool:
    cluster = await admin.describe_cluster()
    return cluster["controller_id"] in {broker["node_id"] for broker in cluster["brokers"]}


async def _create(admin: Any, missing: Sequence[Declared]) -> list[str]:
    """Make topics; returns the names of those that we, and nobody else, made."""
    created: list[str] = []
    response = await admin.create_topics(
        [NewTopic(d.name, d.create_partitions, d.create_replication, topic_configs=dict(d.config)) for d in missing]
    )
    for name, code, *rest in response.topic_errors:
        error = for_code(code)
        if not code:
            created.append(name)
        elif error is not TopicAlreadyExistsError:  # another runner was faster: just what we wanted
            message = f"topic {name}: {error.__name__}{f': {rest[0]}' if rest and rest[0] else ''}"
            raise TopicsError(message)
    return created


async def _alter(admin: Any, needs: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Set what topics need; the names of those that were altered. What else they have of their own, they keep."""
    entries = await _entries(admin, [*needs])
    resources = []
    for name, wanted in needs.items():
        # Kafka's AlterConfigs sets all that a topic has of its own, so that is repeated. One that cannot be read cannot be.
        own = {e[0]: e[1] for e in entries[name] if len(e) > _SOURCE + 2 and e[_SOURCE] == _OF_TOPIC}
        if all(value is not None for value in own.values()):
            resources.append(ConfigResource(ConfigResourceType.TOPIC, name, {**own, **wanted}))
    if not resources:
        return []
    altered: list[str] = []
    for response in await admin.alter_configs(resources):
        for code, error, _kind, name in response.resources:
            if code:
                log.warning("topic_not_altered", topic=name, error=error or for_code(code).__name__)
            else:
                altered.append(name)
    return altered


async def _until_seen(admin: Any, declared: Sequence[Declared], altered: Sequence[str]) -> Comparison:
    """The comparison once the broker that is asked knows what another one has taken, or after `SEEN_S`."""
    deadline = time.monotonic() + SEEN_S
    while True:
        found = await _compare(admin, declared)
        if not found.needs().keys() & set(altered) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.1)


async def _until_ready(admin: Any, declared: Sequence[Declared]) -> Comparison:
    """Wait until all topics have leaders; a producer that is faster than that gets errors."""
    deadline = time.monotonic() + READY_WAIT_S
    while True:
        found = await _compare(admin, declared)
        if not found.missing:
            return found
        if time.monotonic() > deadline:
            message = f"topics without leader after {READY_WAIT_S:g} s: {', '.join(found.missing)}"
            raise TopicsError(message)
        await asyncio.sleep(0.1)


async def _compare(admin: Any, declared: Sequence[Declared]) -> Comparison:
    # All topics are asked for, not ours by name: naming one that is missing makes it on brokers that auto-create.
    metadata = {t["topic"]: t for t in await admin.describe_topics(None) if not t["error_code"]}
    here = [d.name for d in declared if d.name in metadata]
    result = Comparison()
    configs: dict[str, dict[str, str]] = {}
    if here:
        try:
            configs = await _configs(admin, here)
        except IncompatibleBrokerVersion:
            result.config_known = False
    for d in declared:
        topic = metadata.get(d.name)
        actual = None
        if topic is not None and all(p["leader"] >= 0 for p in topic["partitions"]):
            partitions = topic["partitions"]
            replication = min((len(p["replicas"]) for p in partitions), default=0)
            wanted = configs.get(d.name, {})
            actual = Actual(len(partitions), replication, {k: wanted[k] for k in d.config if k in wanted})
        result.topics.append((d, actual))
    return result


async def _configs(admin: Any, names: Sequence[str]) -> dict[str, dict[str, str]]:
    return {name: {e[0]: e[1] for e in entries} for name, entries in (await _entries(admin, names)).items()}


#: Where an entry says whose it is; before it are name, value and whether it can be changed.
_SOURCE: Final = 3


async def _entries(admin: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    """The configuration of topics, as the protocol has it."""
    responses = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name) for name in names])
    found: dict[str, list[Any]] = {}
    for response in responses:
        for code, error, _kind, name, entries in response.resources:
            if code:
                message = f"topic {name}: cannot read its configuration: {error or for_code(code).__name__}"
                raise TopicsError(message)
            found[name] = list(entries)
    return found
