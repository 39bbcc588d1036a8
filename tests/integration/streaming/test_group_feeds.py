"""The second feed on a real Kafka: what only a broker's behaviour shows."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from feed_support import Member, make_topic, until

from preservarium.streaming import feeds

PARTITIONS = 4


@pytest.fixture
async def topic(kafka: str, topic_prefix: str) -> str:
    return await make_topic(kafka, f"{topic_prefix}fed", PARTITIONS)


@pytest.fixture
async def send(kafka: str, topic: str) -> AsyncIterator[Callable[[], Any]]:
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()

    async def one_each() -> None:
        await asyncio.gather(*[await producer.send(topic, b"x", partition=p) for p in range(PARTITIONS)])

    yield one_each
    await producer.stop()


async def test_an_idle_group_is_there_at_once_for_a_record_and_after_a_rebalance(
    kafka: str, topic: str, send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Its fetches wait for half a minute at the broker, which answers nothing else on their connection meanwhile."""
    stored: dict[int, int] = {}
    first = Member(kafka, topic, stored)
    members = [first]
    try:
        await until(lambda: first.ready(PARTITIONS), 30)
        await send()
        await until(lambda: stored == dict.fromkeys(range(PARTITIONS), 1), 10)

        async def idle(member: Member) -> None:
            await until(lambda: member.feed._consumer._fetcher._fetch_max_wait_ms == feeds.IDLE_POLL_MS, 10)
            await asyncio.sleep(1.0)  # a short fetch ends, and a long one is under way

        await idle(first)
        await send()
        await until(lambda: stored == dict.fromkeys(range(PARTITIONS), 2), 3)
        await idle(first)
        assert {p: lane.end for p, lane in first.feed.lanes.items()} == dict.fromkeys(range(PARTITIONS), 2)
        second = Member(kafka, topic, stored)
        members.append(second)
        # A member that is there joins again at its next heartbeat; what comes after that must not wait.
        heartbeat_s = first.live().kafka.session_timeout_s / feeds.HEARTBEATS
        await until(lambda: second.ready(PARTITIONS // 2) and first.ready(PARTITIONS // 2), heartbeat_s + 5)
        await send()
        await until(lambda: stored == dict.fromkeys(range(PARTITIONS), 3), 3)
        assert "Failed fetch" not in caplog.text
    finally:
        for member in members:
            await member.stop()
