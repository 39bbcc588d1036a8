"""Partitions that somebody adds to a topic while it is read: followers and groups of their own read them, too."""

import asyncio
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions
from feed_support import Member, make_topic, until

from preservarium.settings import Kafka
from preservarium.streaming import feeds, following

pytestmark = pytest.mark.kafka


async def add(kafka: str, topic: str, count: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        answer = await admin.create_partitions({topic: NewPartitions(count)})
        assert [code for _, code, *_ in answer.topic_errors] == [0], answer
    finally:
        await admin.close()


async def send(kafka: str, topic: str, partition: int, value: bytes = b"x") -> None:
    # A client of its own: one that has known fewer partitions would have to notice first.
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    try:
        await producer.send_and_wait(topic, value, partition=partition)
    finally:
        await producer.stop()


async def test_a_follower_reads_them_from_their_beginning(kafka: str, topic_prefix: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(following, "METADATA_AGE_MS", 500)
    monkeypatch.setattr(following, "PROBE_S", 0.5)
    topic = await make_topic(kafka, f"{topic_prefix}followed", 1)
    await send(kafka, topic, 0, b"before")
    found: list[tuple[int, bytes, bool]] = []
    ready, over = asyncio.Event(), asyncio.Event()

    def take(records: Any, first: bool) -> None:
        found.extend((r.partition, r.value, first) for r in records)

    async def follow() -> None:
        settings = Kafka(bootstrap_servers=kafka)
        await following.follow(settings, {topic: None}, take, ready.set, client="test", stopped=over.is_set)

    reading = asyncio.create_task(follow())
    try:
        async with asyncio.timeout(30):
            await ready.wait()
        await add(kafka, topic, 3)
        for partition in (2, 1, 0):
            await send(kafka, topic, partition, b"after %d" % partition)
        await until(lambda: len(found) >= 4, 30)
        await send(kafka, topic, 0, b"last")
        await until(lambda: len(found) >= 5, 30)
        # Nothing comes twice: what was read is not begun again.
        assert found[0] == (0, b"before", True)
        assert sorted(found[1:4]) == [(p, b"after %d" % p, False) for p in range(3)]
        assert found[4:] == [(0, b"last", False)]
    finally:
        over.set()
        await asyncio.wait([reading])
    assert reading.exception() is None


async def test_a_group_of_its_own_reads_them_when_it_is_told(kafka: str, topic_prefix: str) -> None:
    topic = await make_topic(kafka, f"{topic_prefix}grouped", 2)
    stored: dict[int, int] = {}
    member = Member(kafka, topic, stored)
    try:
        await until(lambda: member.ready(2), 30)
        # As long idle as it gets: nothing is asked of the broker by itself for minutes.
        await until(lambda: member.feed._consumer._fetcher._fetch_max_wait_ms == feeds.IDLE_POLL_MS, 10)
        await add(kafka, topic, 4)
        await send(kafka, topic, 3)
        member.feed.topic_changed(4)
        # At once, or where the broker knew nothing of it yet, at the next look.
        await until(lambda: member.ready(4), 60)
        await until(lambda: stored == {3: 1}, 30)
        await send(kafka, topic, 2)
        await until(lambda: stored == {2: 1, 3: 1}, 30)
    finally:
        await member.stop()
