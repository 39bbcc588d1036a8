"""The second feed on a real Kafka: what only a broker's behaviour shows."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from time import monotonic
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from preservarium import feeds
from preservarium.clock import SystemClock
from preservarium.feeds import GroupFeed
from preservarium.runner import Runner
from preservarium.settings import LiveSettings, load
from preservarium.stage import Batch, Effects

PARTITIONS = 4


class Member:
    """A worker's part of a group: a feed whose store says where each partition starts, and what it was given."""

    def __init__(self, kafka: str, topic: str, stored: dict[int, int]) -> None:
        self.live = LiveSettings(load(kafka={"bootstrap_servers": kafka, "session_timeout_s": 6}))
        self._stored = stored
        self.feed = GroupFeed(
            "stage",
            topic,
            kafka_topic=topic,
            group=f"{topic}.group",
            runner=Runner(
                "stage", self._handle, publisher=self, put_state=self._put, live=self.live, clock=SystemClock()
            ),
            live=self.live,
            records_max=lambda: 100,
            linger_s=lambda: 0.0,
            flights=1,
            on_assigned=self._on_assigned,
        )
        self.task = asyncio.create_task(self.feed.run())

    async def publish(self, sends: Sequence[Any]) -> dict[str, int]:
        return {}

    async def _put(self, table: str, partition: int, items: Any) -> None:
        raise AssertionError

    async def _on_assigned(self, partitions: list[int]) -> Mapping[int, int]:
        return {p: self._stored.get(p, 0) for p in partitions}

    async def _handle(self, batches: Sequence[Batch]) -> Effects:
        for batch in batches:
            assert batch.records[0].offset == self._stored.get(batch.partition, 0)
            self._stored[batch.partition] = batch.records[-1].offset + 1
        return Effects()

    def ready(self, partitions: int) -> bool:
        return len(self.feed.lanes) == partitions and all(lane.known for lane in self.feed.lanes.values())

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def until(condition: Callable[[], bool], within_s: float) -> float:
    began = monotonic()
    while not condition():
        assert monotonic() - began < within_s
        await asyncio.sleep(0.01)
    return monotonic() - began


@pytest.fixture
async def topic(kafka: str, topic_prefix: str) -> str:
    name = f"{topic_prefix}fed"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    await admin.create_topics([NewTopic(name, PARTITIONS, 1)])
    await admin.close()
    return name


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
        began = monotonic()
        assert await first.feed.ends() == dict.fromkeys(range(PARTITIONS), 2)
        assert monotonic() - began < 1
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
