"""`preservarium adopt offsets`: consumers of the old service's topic, switched over on real servers."""

import asyncio
import json
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from click.testing import CliRunner
from documented import ROOT
from sink_support import live

from preservarium import topics
from preservarium.__main__ import cli
from preservarium.operations.sync_status import group_positions
from preservarium.stores.timescale import TimescaleStore
from preservarium.streaming import topics_admin

GROUP = "old_group"


@pytest.fixture
async def settings(dsn: str, kafka: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    values = {
        "postgres": {"url": dsn},
        "kafka": {"bootstrap_servers": kafka, "topic_prefix": topic_prefix, "group": f"{topic_prefix}g", "partitions": 2},
        "normalize": {"decoded_topic": f"{topic_prefix}old"},
        "clickhouse": {"enabled": "true", "url": "http://127.0.0.1:9"},
    }  # fmt: skip
    for section, fields in values.items():
        for name, value in fields.items():
            monkeypatch.setenv(f"PRESERVARIUM_{section}__{name}".upper(), str(value))
    made = live(**values)
    await topics_admin.create(made())
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    for partition, count in ((0, 50), (1, 5)):
        for _ in range(count):
            await producer.send_and_wait(f"{topic_prefix}old", b"{}", partition=partition)
    await producer.stop()
    return made


async def old_group(settings: Any, offsets: dict[int, int]) -> Any:
    """A member of the old service's group that has committed these offsets; to be stopped."""
    kafka, full = settings().kafka, settings().normalize.decoded_topic
    consumer = AIOKafkaConsumer(
        full,
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=f"{kafka.topic_prefix}{GROUP}",
        enable_auto_commit=False,
    )
    await consumer.start()
    async with asyncio.timeout(20):
        while not consumer.assignment():
            await asyncio.sleep(0.05)
    await consumer.commit({TopicPartition(full, p): at for p, at in offsets.items()})
    return consumer


async def run(*arguments: str) -> Any:
    done = await asyncio.to_thread(CliRunner().invoke, cli, ["adopt", "offsets", *arguments])
    return done.exit_code, done.output


async def test_our_stages_begin_where_the_old_group_stands(settings, topic_prefix):
    group = ("--group", f"{topic_prefix}{GROUP}")
    code, text = await run(*group, "--yes")
    assert (code, "has committed nothing" in text) == (1, True)
    consumer = await old_group(settings, {0: 40, 1: 3})
    code, text = await run(*group, "--dry-run", "--overlap", "10", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["members"] == 1
    assert {p: at["to"] for p, at in found["partitions"].items()} == {"0": 30, "1": 0}
    code, text = await run(*group, "--yes")
    assert (code, "stop the old service first" in text) == (1, True)
    await consumer.stop()
    code, text = await run(*group, "--overlap", "10", "--yes")
    assert code == 0, text
    store = TimescaleStore(settings, sink="sink-decoded")
    assert await store.offsets(topics.DECODED.name, [0, 1]) == {0: 30, 1: 0}
    await store.close()
    positions = (await group_positions(settings(), [("sync-decoded", topics.DECODED)]))["sync-decoded"]
    assert {p: at.committed for p, at in positions.items()} == {0: 30, 1: 0}
    # Once is enough.
    code, text = await run(*group, "--yes")
    assert (code, "say --force" in text) == (1, True)
    assert (await run(*group, "--overlap", "0", "--yes", "--force"))[0] == 0
    # What the guide prints for the shell.
    monitored = await asyncio.to_thread(CliRunner().invoke, cli, ["topics", "read", "decoded_iot_data", "--limit", "1"])
    assert monitored.exit_code == 0, monitored.output
    guide = (ROOT / "docs/guides/timescale.md").read_text(encoding="utf-8")
    for command in ("adopt offsets --dry-run", "topics read decoded_iot_data --limit 1", "doctor"):
        assert f"`preservarium {command}`" in guide
