"""Topics that somebody writes in transactions: what was aborted is never seen, and markers are neither loss nor lag."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete
from feed_support import Member, Transactions, make_topic, until
from worker_support import PARTITIONS, Worker, read_all

from preservarium import topics
from preservarium.settings import load
from preservarium.streaming.following import follow


@pytest.fixture
async def topic(kafka: str, topic_prefix: str) -> str:
    return await make_topic(kafka, f"{topic_prefix}fed", 1)


async def write_some(writer: Transactions, rounds: int = 5) -> None:
    """Committed and aborted ones in turn; the last record of the log is a marker."""
    for n in range(rounds):
        await writer.begin(b"aborted-%d" % n, b"aborted too")
        await writer.abort()
        await writer.begin(b"committed-%d" % n, b"and %d" % n)
        await writer.commit()


@pytest.mark.parametrize("with_offsets", [True, False])
async def test_a_group_feed_sees_what_was_committed_and_catches_up_with_a_marker(
    kafka: str, topic: str, with_offsets: bool
) -> None:
    member = Member(kafka, topic, {}, with_offsets=with_offsets)
    try:
        async with Transactions(kafka, topic) as writer:
            await write_some(writer)
            await until(lambda: len(member.values) == len(writer.committed), 30)
            lane = member.feed.lanes[0]
            # 5 × (2 aborted, marker, 2 committed, marker)
            await until(lambda: lane.position == lane.end == 30, 5)
            await until(lambda: lane.committed == 30, 5)
            assert await member.committed(0) == 30, "so Kafka's own tools see no lag either"
            await writer.begin(b"open")
            await asyncio.sleep(1.0)
            assert lane.end == lane.position == 30, "what may be read ends where a transaction is open"
            await writer.commit()
            await until(lambda: lane.committed == 32, 5)
            await writer.begin(b"never")
            await writer.abort()
            await until(lambda: lane.committed == 34, 10, lambda: "nothing but what was aborted")
            assert member.values == writer.committed
    finally:
        await member.stop()


async def test_a_group_feed_that_was_away_goes_on_behind_a_marker(kafka: str, topic: str) -> None:
    stored: dict[int, int] = {}
    async with Transactions(kafka, topic) as writer:
        for _ in range(2):
            member = Member(kafka, topic, stored)
            await write_some(writer, 2)
            await until(lambda m=member: len(m.seen.get(0, ())) == 4, 30)
            await until(lambda m=member: not m.feed.lanes[0].uncommitted, 5)
            await member.stop()
            assert await member.committed(0) in (12, 24)
    assert stored == {0: 23}


@pytest.fixture
def worker(kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Worker(kafka, topic_prefix, tmp_path, monkeypatch)
    yield made
    made.workers.stop()


async def test_a_worker_passes_on_what_was_committed_and_says_nothing_of_loss(worker: Worker) -> None:
    await worker.make_topics()
    number = await worker.ready("down", WORKER_DOWN=str(worker.directory / "never"))
    async with Transactions(worker.kafka, topics.RAW.full(worker.prefix)) as writer:
        await write_some(writer)
        validated = topics.VALIDATED.full(worker.prefix)
        await until(lambda: worker.stage("keep").get("lag") == worker.stage("forward").get("lag") == 0, 20)

        async def passed() -> bool:
            return [r.value for r in await read_all(worker.kafka, validated, PARTITIONS)] == writer.committed

        await until(passed, 20, lambda: worker.workers.log(number)[-2_000:])
        await until(lambda: worker.stage("forward")["lag"] == 0, 10, lambda: str(worker.stage("forward")))
        await until(lambda: worker.stage("forward")["commit_age_s"] == 0, 10)
        # What is aborted alone moves the log and brings nothing.
        await writer.begin(b"never")
        await writer.abort()
        await asyncio.sleep(3)
        assert worker.stage("forward")["lag"] == 0
    await worker.stop(number)
    assert "offsets_skipped" not in worker.workers.log(number)
    again = await worker.ready("down", WORKER_DOWN=str(worker.directory / "never"))
    await until(lambda: worker.stage("forward").get("lag") == 0, 10)
    await worker.stop(again)
    assert "offsets_skipped" not in worker.workers.log(again)
    assert [r.value for r in await read_all(worker.kafka, validated, PARTITIONS)] == writer.committed


@pytest.mark.parametrize("behind", [True, False])
async def test_records_that_retention_took_are_told_within_seconds(worker: Worker, behind: bool) -> None:
    """Whether something is left behind them or not."""
    await worker.make_topics()
    raw = topics.RAW.full(worker.prefix)
    first = await worker.ready("down", WORKER_DOWN=str(worker.directory / "never"))
    async with Transactions(worker.kafka, raw) as writer:
        await write_some(writer, 1)

        async def passed() -> bool:
            return len(await read_all(worker.kafka, topics.VALIDATED.full(worker.prefix), PARTITIONS)) == 2

        await until(passed, 20)
        await worker.stop(first)
        await write_some(writer, 4)
        admin = AIOKafkaAdminClient(bootstrap_servers=worker.kafka)
        await admin.start()
        await admin.delete_records({TopicPartition(raw, 0): RecordsToDelete(before_offset=26 if behind else 30)})
        await admin.close()
    again = await worker.ready("down", WORKER_DOWN=str(worker.directory / "never"))
    await until(lambda: "offsets_skipped" in worker.workers.log(again), 5, lambda: worker.workers.log(again))
    await until(lambda: worker.stage("forward").get("lag") == 0, 20)
    await worker.stop(again)
    (line,) = [json.loads(x) for x in worker.workers.log(again).splitlines() if "offsets_skipped" in x]
    assert (line["stage"], line["topic"], line["partition"], line["expected"]) == ("forward", "iot_raw_data", 0, 6)
    assert line["lost"] == (20 if behind else 24)


async def test_followers_see_what_was_committed_and_come_to_the_end(kafka: str, topic: str) -> None:
    values: list[bytes] = []
    async with Transactions(kafka, topic) as writer:
        await write_some(writer)
        await writer.begin(b"open")
        async with asyncio.timeout(20):
            await follow(
                load(kafka={"bootstrap_servers": kafka}).kafka,
                {topic: None},
                lambda records, _: values.extend(r.value for r in records),
                lambda: None,
                client="test",
                stopped=lambda: False,
                once=True,
            )
        await writer.abort()
    assert values == writer.committed
