"""A worker whose shared group somebody has set back by Kafka's own tools: it says so, once, and what does what was wanted."""

import json
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from worker_support import PARTITIONS, Worker, until

from preservarium import topics
from preservarium.streaming.stage import Send

RECORDS = 60


@pytest.fixture
def worker(kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Worker(kafka, topic_prefix, tmp_path, monkeypatch)
    yield made
    made.workers.stop()


def told(worker: Worker, number: int) -> list[dict[str, Any]]:
    lines = [line for line in worker.workers.log(number).splitlines() if "offsets_set_from_outside" in line]
    return [json.loads(line[line.index("{") :]) for line in lines]


async def committed(worker: Worker) -> dict[int, tuple[int, str]]:
    """What the group has committed of the raw topic, with what is noted beside it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=worker.kafka)
    await admin.start()
    try:
        tps = [TopicPartition(topics.RAW.full(worker.prefix), p) for p in range(PARTITIONS)]
        found = await admin.list_consumer_group_offsets(worker.live().kafka.group, partitions=tps)
    finally:
        await admin.close()
    return {tp.partition: (at.offset, at.metadata) for tp, at in found.items()}


async def test_a_shared_group_that_was_set_back(worker: Worker) -> None:
    await worker.make_topics()
    await worker.publish([Send(topics.RAW, b"k%d" % n, b"v") for n in range(RECORDS)])

    async def life() -> list[dict[str, Any]]:
        number = await worker.ready("state")
        await until(lambda: worker.stage("remember").get("lag") == 0, 30, lambda: str(worker.report()))
        await worker.stop(number)
        return told(worker, number)

    assert await life() == []
    stood = await committed(worker)
    assert sum(offset for offset, _ in stood.values()) == RECORDS
    assert {noted for _, noted in stood.values()} == {"worker"}

    consumer = AIOKafkaConsumer(
        bootstrap_servers=worker.kafka, group_id=worker.live().kafka.group, enable_auto_commit=False
    )
    await consumer.start()
    tps = [TopicPartition(topics.RAW.full(worker.prefix), p) for p in range(PARTITIONS)]
    consumer.assign(tps)
    await consumer.commit(dict.fromkeys(tps, (0, "")))
    await consumer.stop()

    (line,) = await life()
    assert line["records"] == RECORDS
    assert set(line["offsets"].values()) == {0}
    assert "preservarium replay reset --stage normalize" in line["action"]
    assert await committed(worker) == stood
    assert await life() == []
