"""Group feeds on a real Kafka, in the test's own process, and what writes to their topic."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from preservarium.clock import SystemClock
from preservarium.settings import LiveSettings, load
from preservarium.streaming.feeds import GroupFeed
from preservarium.streaming.runner import Runner
from preservarium.streaming.stage import Batch, Effects

SESSION_S = 6.0  # the least that a broker takes by default


class Member:
    """A worker's part of a group: a feed, a store that says where each partition starts, and what it was given."""

    def __init__(self, kafka: str, topic: str, stored: dict[int, int], *, with_offsets: bool = True) -> None:
        self.live = LiveSettings(
            load(kafka={"bootstrap_servers": kafka, "session_timeout_s": SESSION_S, "commit_interval_s": 0.2})
        )
        self.topic = topic
        self.stored = stored
        self.seen: dict[int, list[int]] = {}
        self.values: list[bytes] = []
        self.gaps: list[tuple[int, int, int]] = []
        self.hold: asyncio.Event | None = None
        self.feed = GroupFeed(
            "stage",
            topic,
            kafka_topic=topic,
            group=f"{topic}.group",
            runner=Runner(
                "stage", self.handle, publisher=self, put_state=self._put, live=self.live, clock=SystemClock()
            ),
            live=self.live,
            records_max=lambda: 100,
            linger_s=lambda: 0.0,
            flights=1,
            on_assigned=self._on_assigned if with_offsets else None,
        )
        self.feed.on_gap = lambda *gap: self.gaps.append(gap)
        self.task = asyncio.create_task(self.feed.run())

    async def publish(self, sends: Sequence[Any]) -> dict[str, int]:
        return {}

    async def _put(self, table: str, partition: int, items: Any) -> None:
        raise AssertionError

    async def _on_assigned(self, partitions: list[int]) -> Mapping[int, int]:
        return {p: self.stored.get(p, 0) for p in partitions}

    async def handle(self, batches: Sequence[Batch]) -> Effects:
        if self.hold is not None:
            await self.hold.wait()
        for batch in batches:
            assert batch.records[0].offset >= self.stored.get(batch.partition, 0), "given twice"
            self.seen.setdefault(batch.partition, []).extend(r.offset for r in batch.records)
            self.values += [r.value or b"" for r in batch.records]
            self.stored[batch.partition] = batch.records[-1].offset + 1
        return Effects()

    def ready(self, partitions: int) -> bool:
        return len(self.feed.lanes) == partitions and all(lane.known for lane in self.feed.lanes.values())

    async def committed(self, partition: int) -> int | None:
        """What the group has committed, as Kafka says."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.live().kafka.bootstrap_servers)
        await admin.start()
        try:
            tp = TopicPartition(self.topic, partition)
            found = await admin.list_consumer_group_offsets(self.feed.group, partitions=[tp])
            return found[tp].offset if tp in found else None
        finally:
            await admin.close()

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


class Transactions:
    """A producer that writes in transactions, and remembers what it committed."""

    def __init__(self, kafka: str, topic: str) -> None:
        self.topic = topic
        self.committed: list[bytes] = []
        self._producer = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=f"{topic}-writer")

    async def __aenter__(self) -> "Transactions":
        await self._producer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._producer.stop()

    async def begin(self, *values: bytes, partition: int = 0) -> None:
        await self._producer.begin_transaction()
        for value in values:
            await self._producer.send_and_wait(self.topic, value, key=b"d", partition=partition)
        self._values = values

    async def commit(self) -> None:
        await self._producer.commit_transaction()
        self.committed += self._values

    async def abort(self) -> None:
        await self._producer.abort_transaction()


async def make_topic(kafka: str, name: str, partitions: int, **config: str) -> str:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    await admin.create_topics([NewTopic(name, partitions, 1, topic_configs=config)])
    await admin.close()
    return name


async def until(condition: Callable[[], Any], within_s: float, say: Callable[[], str] = str) -> float:
    """Wait for a condition; how long that took, s."""
    began = monotonic()
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return monotonic() - began
        assert monotonic() - began < within_s, say()
        await asyncio.sleep(0.01)
