"""What a back-up takes of Kafka, and who reads what."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError

from preservarium import topics
from preservarium.errors import reason
from preservarium.operations.backup.files import BackupError, Entry, Position
from preservarium.settings import Settings
from preservarium.streaming import kafka_clients, topics_admin
from preservarium.streaming.fencing import Kept, change_of
from preservarium.topics import Topic

#: The broker answers a fetch within this time, or is told as not to be asked.
FETCH_S: Final = 30.0
#: A fetch waits this long for records. One that is still under way at the end of a partition holds up the next partition, and
#: a system has hundreds of them: half a second each would be minutes.
FETCH_WAIT_MS: Final = 10
RECORDS_AT_ONCE: Final = 2_000
STOP_S: Final = 5.0

#: Made anew from PostgreSQL, where they come from: a copy taken later than the database's would hold what it does not know.
FROM_REGISTRY: Final = frozenset({topics.DEVICE_REGISTRY.name, topics.TYPE_REGISTRY.name})
#: The table that workers make of `iot_device_registry`.
DEVICE_TABLE: Final = "device_configs"
#: How workers are that are no more.
NOT_COPIED: Final = frozenset({topics.WORKER_STATUS.name}) | FROM_REGISTRY


class Reader(NamedTuple):
    """A stage that reads a topic."""

    topic: str  #: declared name
    group: str  #: suffix of its consumer group; empty: the shared one
    sink: str = ""  #: where the database's offsets say where it stands: its name there


def copied(settings: Settings) -> list[tuple[Topic, str]]:
    """Topics that a back-up holds, with their full names: those that keep time, and those that keep the newest of each key."""
    found = [(topic, topics_admin.declare(topic, settings)) for topic in topics.TOPICS if topic.name not in NOT_COPIED]
    return [(topic, declared.name) for topic, declared in found if declared is not None]


def changelogs(settings: Settings) -> dict[str, str]:
    """Table -> full name of its changelog, of the tables that a back-up holds."""
    return {
        table: topics.changelog(table, settings.kafka.group) for table in topics.STATE_TABLES if table != DEVICE_TABLE
    }


def group_name(settings: Settings, suffix: str) -> str:
    """The full name of a consumer group."""
    return f"{settings.kafka.group}-{suffix}" if suffix else settings.kafka.group


class Cluster:
    """Kafka, for one task. An async context manager; what goes wrong in it with Kafka is a BackupError."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.consumer: Any = None
        self.admin: Any = None

    async def __aenter__(self) -> Self:
        kafka = self._settings.kafka
        self.consumer = AIOKafkaConsumer(
            **kafka_clients.reading(kafka),
            enable_auto_commit=False,
            max_partition_fetch_bytes=kafka.fetch_bytes_max,
            fetch_max_wait_ms=FETCH_WAIT_MS,
        )
        self.admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka))
        try:
            await self.consumer.start()
            await self.admin.start()
        except (KafkaError, OSError) as e:
            await self._stop()
            message = f"Kafka cannot be asked at {kafka.bootstrap_servers}: {reason(e)}"
            raise BackupError(message) from e
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._stop()
        if isinstance(error, KafkaError):
            message = f"Kafka at {self._settings.kafka.bootstrap_servers}: {reason(error)}"
            raise BackupError(message) from error

    async def _stop(self) -> None:
        for client in (self.consumer, self.admin):
            await kafka_clients.stop(client, STOP_S)

    async def partitions(self) -> dict[str, int]:
        """Every topic that there is: full name -> partitions."""
        # All are asked for: naming one that is missing makes it on brokers that auto-create.
        return {t["topic"]: len(t["partitions"]) for t in await self.admin.describe_topics(None) if not t["error_code"]}

    async def ends(self, names: Mapping[str, int]) -> dict[TopicPartition, int]:
        """Where each partition of these topics ends now: (full name -> partitions)."""
        tps = _tps(names)
        return dict(await self.consumer.end_offsets(tps)) if tps else {}

    async def begins(self, names: Mapping[str, int]) -> dict[TopicPartition, int]:
        """Where each partition of these topics begins now."""
        tps = _tps(names)
        return dict(await self.consumer.beginning_offsets(tps)) if tps else {}

    async def committed(self, group: str) -> dict[TopicPartition, Position]:
        """What a group has committed, by its full name."""
        while True:
            try:
                found = await self.admin.list_consumer_group_offsets(group)
            except GroupCoordinatorNotAvailableError:
                # A cluster that has had no group yet makes the topic for their offsets now.
                await asyncio.sleep(0.5)
            else:
                return {tp: Position(at.offset, at.metadata or "") for tp, at in found.items() if at.offset >= 0}

    async def groups(self) -> set[str]:
        """Names of all groups that there are."""
        return {name for name, *_ in await self.admin.list_consumer_groups()}

    async def records(self, tp: TopicPartition, begin: int, end: int) -> AsyncIterator[Sequence[Any]]:
        """Records of a partition from one offset that it has to another, in their order.

        Raises:
            BackupError: Kafka gives nothing for half a minute, or has deleted what was to be read.
        """
        if begin >= end:
            return
        self.consumer.assign([tp])
        self.consumer.seek(tp, begin)
        at = begin
        while at < end:
            fetched = (await self.consumer.getmany(timeout_ms=round(FETCH_S * 1000), max_records=RECORDS_AT_ONCE)).get(
                tp
            )
            at = await self.consumer.position(tp)
            if not fetched and at < end:
                message = f"Kafka gave nothing of {tp.topic}-{tp.partition} from {at} for {FETCH_S:.0f} s"
                raise BackupError(message)
            if some := [record for record in fetched or () if record.offset < end]:
                yield some

    async def newest(self, tp: TopicPartition, begin: int, end: int) -> list[Entry]:
        """The newest record of each key of a compacted partition, in their order; deleted keys are left out."""
        found: dict[bytes, Entry] = {}
        async for records in self.records(tp, begin, end):
            for entry in map(entry_of, records):
                if entry.key is None:
                    continue
                found.pop(entry.key, None)
                if entry.value is not None:
                    found[entry.key] = entry
        return list(found.values())

    async def values(self, tp: TopicPartition, begin: int, end: int) -> list[Entry]:
        """What a changelog says that its table holds: by the rule of fences, so that what a stale worker wrote is left out."""
        kept, found = Kept(), dict[bytes, bytes]()
        async for records in self.records(tp, begin, end):
            for key, value in kept.take(map(change_of, records)).items():
                if key.startswith(b"\0"):
                    continue  # the rule's own notes
                if value is None:
                    found.pop(key, None)
                else:
                    found[key] = value
        return [Entry(n, -1, key, value) for n, (key, value) in enumerate(found.items())]


def entry_of(record: Any) -> Entry:
    """A record as it is copied."""
    headers = tuple((name, value) for name, value in record.headers or ())
    return Entry(record.offset, record.timestamp, record.key, record.value, headers)


def _tps(names: Mapping[str, int]) -> list[TopicPartition]:
    return [TopicPartition(name, partition) for name, count in names.items() for partition in range(count)]


def starts(
    topic: str,
    readers: Iterable[Reader],
    begins: Mapping[int, int],
    groups: Mapping[str, Mapping[str, Mapping[int, Position]]],
    sinks: Mapping[str, Mapping[str, Mapping[int, int]]],
) -> dict[int, int]:
    """From which offset on each partition of a topic is needed: what comes before has had its effect wherever it is read.

    Args:
        topic: declared name.
        readers: every stage that reads a topic.
        begins: where the partitions begin.
        groups: suffix -> topic -> partition -> where the group stands.
        sinks: sink -> topic -> partition -> where the database stands.

    Returns:
        Partition -> the lowest position of its readers; of a reader that has none, and of a topic that no stage reads, the beginning.
    """
    reading = [reader for reader in readers if reader.topic == topic]
    found = {}
    for partition, begin in begins.items():
        positions = []
        for reader in reading:
            if reader.sink:
                positions.append(sinks.get(reader.sink, {}).get(topic, {}).get(partition, begin))
            else:
                at = groups.get(reader.group, {}).get(topic, {}).get(partition)
                positions.append(begin if at is None else at.offset)
        found[partition] = max(begin, min(positions, default=begin))
    return found
