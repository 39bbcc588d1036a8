"""Records of a topic by their offsets: no scan, no group, nothing is committed.

What Kafka has deleted is told apart from what never stood at an offset: a partition's beginning says so.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from preservarium.errors import PreservariumError, reason
from preservarium.settings import Settings
from preservarium.streaming import kafka_clients

#: A broker answers within this time, or is told as not to be asked.
ASK_S: Final = 10.0
#: Records that are fetched at once.
RECORDS_MAX: Final = 500
#: Offsets that are so far apart are sought one by one; nearer ones are read through.
GAP_MAX: Final = 1_000


class RecordsError(PreservariumError):
    """Kafka cannot be asked for records."""


class Span:
    """What Kafka holds of a partition: offsets from `begin` to before `end`."""

    __slots__ = ("begin", "end")

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end


class Records:
    """Reads records by their offsets. For one task at a time.

    Args:
        settings: where Kafka is.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: Any = None
        self._spans: dict[TopicPartition, Span | None] = {}
        self._partitions: dict[str, frozenset[int]] = {}

    async def __aenter__(self) -> "Records":
        """Connect.

        Raises:
            RecordsError: Kafka cannot be reached.
        """
        self._consumer = AIOKafkaConsumer(
            **kafka_clients.reading(self._settings.kafka),
            group_id=None,
            enable_auto_commit=False,
            # What is deleted under our hands is passed over, and what follows it is read: by itself it would go to the end.
            auto_offset_reset="earliest",
            max_partition_fetch_bytes=self._settings.kafka.fetch_bytes_max,
            fetch_max_wait_ms=200,
        )
        try:
            async with asyncio.timeout(ASK_S):
                await self._consumer.start()
        except (KafkaError, OSError, TimeoutError) as e:
            await kafka_clients.stop(self._consumer)
            raise self._error(e) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect."""
        await kafka_clients.stop(self._consumer, 5.0)

    def _error(self, e: BaseException) -> RecordsError:
        return RecordsError(f"Kafka cannot be asked at {self._settings.kafka.bootstrap_servers}: {reason(e)}")

    async def partitions(self, topic: str) -> frozenset[int]:
        """Partitions of a topic (full name); none where there is no such topic.

        Raises:
            RecordsError: Kafka cannot be asked.
        """
        if topic not in self._partitions:
            # Asked of all topics: naming one that is missing makes it on brokers that auto-create.
            admin = AIOKafkaAdminClient(**kafka_clients.connection(self._settings.kafka))
            try:
                async with asyncio.timeout(ASK_S):
                    await admin.start()
                    there = await admin.describe_topics(None)
            except (KafkaError, OSError, TimeoutError) as e:
                raise self._error(e) from None
            finally:
                await kafka_clients.stop(admin, 5.0)
            self._partitions = {
                found["topic"]: frozenset(p["partition"] for p in found["partitions"])
                for found in there
                if not found["error_code"]
            }
        return self._partitions.get(topic, frozenset())

    async def span(self, topic: str, partition: int, *, again: bool = False) -> Span | None:
        """What Kafka holds of a partition of a topic (full name); None where there is none.

        Args:
            topic: full name.
            partition: its number.
            again: ask again, also where it was asked before.

        Raises:
            RecordsError: Kafka cannot be asked.
        """
        tp = TopicPartition(topic, partition)
        if tp not in self._spans or again:
            if partition not in await self.partitions(topic):
                self._spans[tp] = None
            else:
                try:
                    async with asyncio.timeout(ASK_S):
                        begins = await self._consumer.beginning_offsets([tp])
                        ends = await self._consumer.end_offsets([tp])
                except (KafkaError, OSError, TimeoutError) as e:
                    raise self._error(e) from None
                self._spans[tp] = Span(begins[tp], ends[tp])
        return self._spans[tp]

    async def at(self, topic: str, partition: int, offsets: Iterable[int]) -> dict[int, Any]:
        """Records by their offsets; those that Kafka does not hold are left out.

        Args:
            topic: full name.
            partition: its number.
            offsets: which.

        Raises:
            RecordsError: Kafka cannot be asked.
        """
        span = await self.span(topic, partition)
        found: dict[int, Any] = {}
        if span is None:
            return found
        wanted = sorted({offset for offset in offsets if span.begin <= offset < span.end})
        for run in _runs(wanted):
            needed = set(run)
            async for records in self.between(topic, partition, run[0], run[-1] + 1):
                found.update({record.offset: record for record in records if record.offset in needed})
        return found

    async def between(self, topic: str, partition: int, begin: int, end: int) -> AsyncIterator[Sequence[Any]]:
        """Records from offset `begin` to before `end`, both of which Kafka holds, some at a time.

        Raises:
            RecordsError: Kafka cannot be asked, or gives nothing.
        """
        if begin >= end:
            return
        tp = TopicPartition(topic, partition)
        consumer = self._consumer
        consumer.assign([tp])
        consumer.seek(tp, begin)
        at = begin
        try:
            while at < end:
                before = at
                async with asyncio.timeout(2 * ASK_S):
                    got = await consumer.getmany(
                        tp, timeout_ms=round(ASK_S * 1_000), max_records=min(RECORDS_MAX, end - at)
                    )
                    at = await consumer.position(tp)
                records = [record for record in got.get(tp, ()) if record.offset < end]
                if records:
                    yield records
                elif at < end and at == before:
                    message = f"Kafka is silent: {topic}[{partition}] was not read from {at} to {end}"
                    raise RecordsError(message)
        except (KafkaError, OSError, TimeoutError) as e:
            raise self._error(e) from None

    async def since(self, topic: str, partitions: Iterable[int], at_us: int) -> dict[int, int]:
        """Where the records of a time and later begin, by partition; its end where none is so late.

        Raises:
            RecordsError: Kafka cannot be asked.
        """
        tps = [TopicPartition(topic, p) for p in partitions]
        if not tps:
            return {}
        try:
            async with asyncio.timeout(ASK_S):
                found = await kafka_clients.offsets_since(self._consumer, dict.fromkeys(tps, max(0, at_us // 1_000)))
        except (KafkaError, OSError, TimeoutError) as e:
            raise self._error(e) from None
        return {tp.partition: offset for tp, offset in found.items()}


def _runs(offsets: Sequence[int]) -> list[list[int]]:
    """Offsets in order, cut where the next one is far."""
    runs: list[list[int]] = []
    for offset in offsets:
        if runs and offset - runs[-1][-1] <= GAP_MAX:
            runs[-1].append(offset)
        else:
            runs.append([offset])
    return runs
