"""Topics on a real Kafka: made as declared, compared, and what differs is named."""

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from click.testing import CliRunner

from preservarium.__main__ import cli
from preservarium.cli import doctor
from preservarium.embedded.kafka import MockKafka
from preservarium.settings import Settings, load
from preservarium.streaming import topics_admin
from preservarium.topics import DEVICE_REGISTRY, RAW, STATE_TABLES, TOPICS


@pytest.fixture
def settings(kafka: str, topic_prefix: str) -> Settings:
    return load(
        kafka={
            "bootstrap_servers": kafka,
            "topic_prefix": topic_prefix,
            "partitions": 3,
            "group": topic_prefix.rstrip("."),
        },
        normalize={"decoded_topic": f"{topic_prefix}decoded"},
    )


async def test_topics_are_made_as_declared_and_only_once(settings: Settings) -> None:
    before = await topics_admin.compare(settings)
    assert len(before.missing) == len(TOPICS) + len(STATE_TABLES)
    first = await topics_admin.create(settings)
    assert sorted(first.created) == sorted(before.missing)
    assert first.equal
    assert first.config_known
    second = await topics_admin.create(settings)
    assert second.created == []
    assert second.equal
    by_name = {d.name: a for d, a in second.topics}
    raw = by_name[RAW.full(settings.kafka.topic_prefix)]
    devices = by_name[DEVICE_REGISTRY.full(settings.kafka.topic_prefix)]
    assert raw is not None
    assert devices is not None
    assert (raw.partitions, raw.replication, raw.config["retention.ms"]) == (3, 1, "86400000")
    assert raw.config["compression.type"] == "zstd"
    assert int(raw.config["max.message.bytes"]) > settings.kafka.record_bytes_max
    assert devices.config["cleanup.policy"] == "compact"


async def test_creating_at_the_same_time_is_no_error(settings: Settings) -> None:
    done = await asyncio.gather(*(topics_admin.create(settings) for _ in range(3)))
    assert all(c.equal for c in done)


async def test_what_differs_is_named(settings: Settings) -> None:
    name = RAW.full(settings.kafka.topic_prefix)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    await admin.create_topics([NewTopic(name, 2, 1, topic_configs={"retention.ms": "1000"})])
    await admin.close()
    found = await topics_admin.create(settings)
    assert name not in found.created
    assert found.missing == []
    lines = found.differences()
    assert f"{name}: partitions 2, declared 3" in lines
    assert f"{name}: retention.ms 1000, declared 86400000" in lines
    assert any(line.startswith(f"{name}: compression.type") for line in lines)
    assert all(line.startswith(name) for line in lines)


async def test_topics_that_are_there_get_what_they_need_and_keep_what_they_have(settings: Settings) -> None:
    prefix, group = settings.kafka.topic_prefix, settings.kafka.group
    status, changelog, other = (
        f"{prefix}worker_status",
        f"{group}-alarm_states-changelog",
        f"{group}-employees-changelog",
    )
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        own = {"retention.ms": "12345678", "cleanup.policy": "delete"}
        more = {"cleanup.policy": "compact", "min.compaction.lag.ms": "700000"}  # more than is needed
        await admin.create_topics(
            [
                NewTopic(status, 3, 1, topic_configs=own), NewTopic(changelog, 3, 1, topic_configs={"cleanup.policy": "compact"}),
                NewTopic(other, 3, 1, topic_configs=more),
            ]
        )  # fmt: skip
    finally:
        await admin.close()
    first = await topics_admin.create(settings)
    assert sorted(first.altered) == [
        f"{changelog}: min.compaction.lag.ms is 600000 now", f"{status}: message.timestamp.type is LogAppendTime now",
    ]  # fmt: skip
    by_name = {d.name: a for d, a in first.topics}
    assert by_name[status].config["message.timestamp.type"] == "LogAppendTime"
    assert by_name[status].config["retention.ms"] == "12345678"  # told, and the owner's affair
    assert f"{status}: retention.ms 12345678, declared 3600000" in first.differences()
    assert by_name[other].config["min.compaction.lag.ms"] == "700000"
    assert by_name[changelog].config["cleanup.policy"] == "compact"
    assert (await topics_admin.create(settings)).altered == []


async def test_the_doctor_says_what_a_topic_needs(settings: Settings, monkeypatch: Any) -> None:
    await topics_admin.create(settings)
    monkeypatch.setattr(topics_admin, "NEEDED", ("retention.ms",))
    assert (await doctor.check_kafka(settings))[-1].found == f"all {len(TOPICS) + len(STATE_TABLES)} are there"
    status = f"{settings.kafka.topic_prefix}worker_status"
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    try:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, status, {"retention.ms": "1000"})])
    finally:
        await admin.close()
    async with asyncio.timeout(20):  # a broker learns of it a moment later
        while (finding := (await doctor.check_kafka(settings))[-1]).state is doctor.State.GREEN:
            await asyncio.sleep(0.1)
    assert (finding.state, finding.found) == (doctor.State.YELLOW, f"{status} needs retention.ms=3600000")
    assert "preservarium migrate" in finding.advice


async def test_the_other_service_s_topic_is_left_as_it_is(settings: Settings) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka.bootstrap_servers)
    await admin.start()
    await admin.create_topics(
        [NewTopic(settings.normalize.decoded_topic, 1, 1, topic_configs={"retention.ms": "1000"})]
    )
    await admin.close()
    assert (await topics_admin.create(settings)).equal


async def test_the_largest_record_is_taken(settings: Settings) -> None:
    await topics_admin.create(settings)
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka.bootstrap_servers, max_request_size=settings.kafka.record_bytes_max + 1_000
    )
    await producer.start()
    try:
        sent = await producer.send_and_wait(
            RAW.full(settings.kafka.topic_prefix), b"x" * settings.kafka.record_bytes_max, b"k"
        )
    finally:
        await producer.stop()
    assert sent.offset == 0


async def test_a_replication_that_the_cluster_cannot_give_is_refused(settings: Settings) -> None:
    three = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"replication": 3})})
    with pytest.raises(topics_admin.TopicsError, match="InvalidReplicationFactor"):
        await topics_admin.create(three)


async def test_brokers_that_are_not_there_are_given_up() -> None:
    with pytest.raises(topics_admin.TopicsError, match=r"Kafka at 127\.0\.0\.1:1 cannot be reached"):
        await topics_admin.compare(load(kafka={"bootstrap_servers": "127.0.0.1:1"}), wait_s=0.3)


async def test_a_broker_without_create_topics_makes_them_when_asked_for(tmp_path: Path) -> None:
    broker = MockKafka(tmp_path / "mock")
    broker.start()
    try:
        settings = load(kafka={"bootstrap_servers": broker.bootstrap_servers, "partitions": 4})
        made = await topics_admin.create(settings, wait_s=5)
        assert len(made.created) == len(TOPICS) + len(STATE_TABLES)
        assert not made.config_known
        assert made.equal
        other = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"partitions": 12})})
        assert "iot_raw_data: partitions 4, declared 12" in (await topics_admin.create(other)).differences()
    finally:
        broker.stop()


def test_the_command_exits_1_where_something_differs(settings: Settings, monkeypatch: Any) -> None:
    monkeypatch.setenv("PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS", settings.kafka.bootstrap_servers)
    monkeypatch.setenv("PRESERVARIUM_KAFKA__TOPIC_PREFIX", settings.kafka.topic_prefix)
    monkeypatch.setenv("PRESERVARIUM_KAFKA__PARTITIONS", "3")
    monkeypatch.setenv("PRESERVARIUM_KAFKA__GROUP", settings.kafka.group)
    monkeypatch.setenv("PRESERVARIUM_NORMALIZE__DECODED_TOPIC", settings.normalize.decoded_topic)
    missing = CliRunner().invoke(cli, ["topics", "--json"])
    assert missing.exit_code == 1
    assert len(orjson.loads(missing.output)["missing"]) == len(TOPICS) + len(STATE_TABLES)
    made = CliRunner().invoke(cli, ["migrate", "--only", "kafka", "--json"])
    assert made.exit_code == 0, made.output
    equal = CliRunner().invoke(cli, ["topics"])
    assert equal.exit_code == 0
    assert "as declared" in equal.output
    monkeypatch.setenv("PRESERVARIUM_KAFKA__PARTITIONS", "4")
    other = CliRunner().invoke(cli, ["topics"])
    assert other.exit_code == 1
    assert "partitions 3, declared 4" in other.output
