"""What a back-up takes of each part and gives back: offsets, positions with what is noted beside them, state, the registry."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import OffsetAndMetadata
from sink_support import execute, fetch

from preservarium import topics
from preservarium.operations.backup.create import create
from preservarium.operations.backup.files import BackupError, Manifest
from preservarium.operations.backup.kafka import Reader
from preservarium.operations.backup.restore import Restored, restore
from preservarium.registry.apply import apply
from preservarium.settings import Settings, load
from preservarium.streaming import topics_admin
from preservarium.streaming.fencing import FENCE_HEADER, FENCE_KEY
from preservarium.streaming.topics_admin import TopicsError

pytestmark = [pytest.mark.kafka, pytest.mark.postgres]

PARTITIONS = 2
READERS = [
    Reader(topics.VALIDATED.name, "sink", "sink"),
    Reader(topics.VALIDATED.name, "sync"),
    Reader(topics.RAW.name, ""),
]
REGISTRY = """
manufacturers: [{name: Own}]
datatypes: [{name: number, kind: number, unit: ""}]
parsers: [{name: own, kind: json, status: active, source: {}}]
device_types: [{name: own, manufacturer: Own, parser: own}]
devices: [{device_id: 70b3d57ba0270578, type: own}, {device_id: Dev-1, type: own}]
"""
PLAN = "planned:9|[[0,1,5,0]]"


def silent(done: int, total: int, what: str) -> None:
    pass


@dataclass
class Side:
    """A system without workers."""

    settings: Settings

    def full(self, topic: topics.Topic) -> str:
        return topic.full(self.settings.kafka.topic_prefix)

    async def produce(self, topic: str, partition: int, *records: Any) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.settings.kafka.bootstrap_servers) as producer:
            for key, value, *headers in records:
                await producer.send_and_wait(topic, value, key=key, partition=partition, headers=headers)

    async def commit(self, suffix: str, topic: topics.Topic, partition: int, offset: int, metadata: str) -> None:
        async with self.consumer(group_id=f"{self.settings.kafka.group}{suffix}") as consumer:
            tp = TopicPartition(self.full(topic), partition)
            consumer.assign([tp])
            await consumer.commit({tp: OffsetAndMetadata(offset, metadata)})

    def consumer(self, **options: Any) -> Any:
        kafka = self.settings.kafka.bootstrap_servers
        return AIOKafkaConsumer(
            bootstrap_servers=kafka, enable_auto_commit=False, isolation_level="read_committed", **options
        )

    async def read(self, topic: str, partition: int) -> tuple[int, int, list[tuple[int, bytes | None, bytes | None]]]:
        """Where the log begins and ends, and its records."""
        async with self.consumer() as consumer:
            tp = TopicPartition(topic, partition)
            begin, end = (await consumer.beginning_offsets([tp]))[tp], (await consumer.end_offsets([tp]))[tp]
            consumer.assign([tp])
            consumer.seek(tp, begin)
            found: list[tuple[int, bytes | None, bytes | None]] = []
            while await consumer.position(tp) < end:
                records: Sequence[Any] = (await consumer.getmany(timeout_ms=5_000)).get(tp, ())
                found += [(record.offset, record.key, record.value) for record in records]
            return begin, end, found


def side(kafka: str, name: str, dsn: str, **more: Any) -> Side:
    return Side(
        load(
            kafka={"bootstrap_servers": kafka, "topic_prefix": f"{name}.", "group": name, "partitions": PARTITIONS}
            | more,
            postgres={"url": dsn},
            clickhouse={"enabled": False, "url": ""},
        )
    )


@pytest.fixture
async def first(kafka: str, topic_prefix: str, dsn: str, tmp_path: Path) -> Side:
    """A system that has worked: ten validated messages, of which the sink has seven and sync five."""
    made = side(kafka, f"{topic_prefix}a", dsn)
    await topics_admin.create(made.settings)
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    await apply(made.settings, tmp_path / "registry.yaml", actor="test")
    validated = made.full(topics.VALIDATED)
    await made.produce(validated, 1, *((b"k%d" % n, b"v%d" % n) for n in range(10)))
    await execute(dsn, f"INSERT INTO sink_offsets VALUES ('sink', '{topics.VALIDATED.name}', 1, 0, 7)")
    await made.commit("-sync", topics.VALIDATED, 1, 5, PLAN)
    await made.produce(made.full(topics.ERRORS), 0, (b"d", b"refused"))
    await made.produce(made.full(topics.ALARM_STANDING), 0, (b"a", b"1"), (b"b", b"1"), (b"a", b"2"), (b"b", None))
    await made.produce(
        topics.changelog("alarm_states", made.settings.kafka.group), 0,
        (FENCE_KEY, b"1"), (b"dev", b"old", (FENCE_HEADER, b"0")), (b"gone", b"x", (FENCE_HEADER, b"0")),
        (FENCE_KEY, b"2"), (b"dev", b"new", (FENCE_HEADER, b"3")), (b"dev", b"stale", (FENCE_HEADER, b"0")),
        (b"gone", None, (FENCE_HEADER, b"3")),
    )  # fmt: skip
    return made


@pytest.fixture
def second(kafka: str, topic_prefix: str, pg_dsn: str) -> Side:
    """Empty servers, with another prefix and group."""
    return side(kafka, f"{topic_prefix}b", pg_dsn)


async def copied(first: Side, directory: Path, **options: Any) -> Manifest:
    return await create(first.settings, directory, READERS, silent, **options)


async def filled(second: Side, directory: Path, **options: Any) -> Restored:
    return await restore(second.settings, directory, silent, **options)


async def test_everything_comes_back_where_it_was(first: Side, second: Side, tmp_path: Path) -> None:
    await copied(first, tmp_path / "copy")
    await filled(second, tmp_path / "copy", dry_run=True)
    done = await filled(second, tmp_path / "copy")
    # From the slowest reader on, at the offsets that they had.
    records = [(n, b"k%d" % n, b"v%d" % n) for n in range(5, 10)]
    assert await second.read(second.full(topics.VALIDATED), 1) == (5, 10, records)
    assert await second.read(second.full(topics.VALIDATED), 0) == (0, 0, [])
    assert await second.read(second.full(topics.ERRORS), 0) == (0, 1, [(0, b"d", b"refused")])
    assert [(k, v) for _, k, v in (await second.read(second.full(topics.ALARM_STANDING), 0))[2]] == [(b"a", b"2")]
    # What a stale worker wrote, and the fences of those that are no more, are not there.
    changelog = topics.changelog("alarm_states", second.settings.kafka.group)
    assert (await second.read(changelog, 0))[2] == [(0, b"dev", b"new")]
    async with second.consumer(group_id=f"{second.settings.kafka.group}-sync") as consumer:
        tp = TopicPartition(second.full(topics.VALIDATED), 1)
        consumer.assign([tp])
        assert await consumer.committed(tp) == 5
    made = await copied(second, tmp_path / "again")
    assert made.groups["sync"][topics.VALIDATED.name][1].metadata == PLAN
    assert made.sinks == {"sink": {topics.VALIDATED.name: {1: 7}}}
    assert done.records == 7
    assert done.values == 1
    both = "SELECT stream_id, version, hash FROM event_store ORDER BY position"
    before, after = await fetch(first.settings.postgres.dsn, both), await fetch(second.settings.postgres.dsn, both)
    assert before == after
    assert len(before) == 6


async def test_the_registry_s_topics_and_table_are_made_of_the_documents(
    first: Side, second: Side, tmp_path: Path
) -> None:
    await copied(first, tmp_path / "copy")
    await filled(second, tmp_path / "copy")
    keys: dict[str, set[bytes | None]] = {}
    table = topics.changelog("device_configs", second.settings.kafka.group)
    devices, types = second.full(topics.DEVICE_REGISTRY), second.full(topics.TYPE_REGISTRY)
    for partition in range(PARTITIONS):
        for topic in (devices, types, table):
            keys.setdefault(topic, set()).update(key for _, key, _ in (await second.read(topic, partition))[2])
        assert {k for _, k, _ in (await second.read(table, partition))[2]} == {
            k for _, k, _ in (await second.read(devices, partition))[2]
        }, "a device is looked up where its messages are"
    assert keys[types] == {b"datatype/number", b"parser/own", b"type/own"}
    assert {b"70b3d57ba0270578", b"Dev-1"} <= keys[devices]


async def test_a_database_of_a_later_moment_is_kept_and_what_it_has_stored_is_not_covered(
    first: Side, second: Side, kafka: str, topic_prefix: str, dsn: str, tmp_path: Path
) -> None:
    await copied(first, tmp_path / "copy", without=["postgres"])
    with pytest.raises(BackupError, match="made without postgres"):
        await filled(second, tmp_path / "copy")
    with pytest.raises(BackupError, match="restore it first"):
        await filled(second, tmp_path / "copy", keep_postgres=True)
    later = side(kafka, f"{topic_prefix}c", dsn)
    await execute(dsn, "UPDATE sink_offsets SET next_offset = 15")
    await filled(later, tmp_path / "copy", keep_postgres=True)
    records = [(n, b"k%d" % n, b"v%d" % n) for n in range(5, 10)]
    assert await later.read(later.full(topics.VALIDATED), 1) == (5, 15, records)


async def test_a_database_that_is_older_than_the_copy_is_refused(
    first: Side, kafka: str, topic_prefix: str, dsn: str, tmp_path: Path
) -> None:
    await copied(first, tmp_path / "copy", without=["postgres"])
    await execute(dsn, "UPDATE sink_offsets SET next_offset = 3")
    with pytest.raises(BackupError, match="older than the back-up"):
        await filled(side(kafka, f"{topic_prefix}c", dsn), tmp_path / "copy", keep_postgres=True)


async def test_servers_that_are_not_empty_are_refused(first: Side, second: Side, tmp_path: Path) -> None:
    await copied(first, tmp_path / "copy")
    with pytest.raises(BackupError, match="has tables already"):
        await filled(first, tmp_path / "copy")
    with pytest.raises(BackupError, match=r"Kafka has (records|consumer groups)"):
        await filled(first, tmp_path / "copy", keep_postgres=True)
    other = side(
        second.settings.kafka.bootstrap_servers, second.settings.kafka.group, second.settings.postgres.dsn, partitions=3
    )
    with pytest.raises(BackupError, match=r"topics of 2 partitions, kafka\.partitions is 3"):
        await filled(other, tmp_path / "copy")
    with pytest.raises(BackupError, match="is not empty"):
        await copied(first, tmp_path / "copy")
    assert not (await fetch(second.settings.postgres.dsn, "SELECT FROM pg_class WHERE relname = 'devices'"))


async def test_a_broker_that_is_away_is_told(first: Side, tmp_path: Path) -> None:
    away = side("127.0.0.1:1", "away", first.settings.postgres.dsn)
    with pytest.raises((BackupError, TopicsError), match=r"127\.0\.0\.1:1"):
        await copied(away, tmp_path / "copy")
