"""Records of a topic by their offsets, of Kafka or the archive: no scan, no group, nothing is committed.

What Kafka has deleted comes out of the archive, where that has it. What neither has is told apart from what never stood at an offset: a
partition's beginning says so.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from preservarium.errors import PreservariumError, reason
from preservarium.operations.archive.reading import ArchivedRecords
from preservarium.settings import Settings
from preservarium.stores.archive_files import ArchivedRecord
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
    """What there is of a partition: offsets from `begin` to before `end`, of which Kafka holds those from `kafka` on."""

    __slots__ = ("begin", "end", "kafka")

    def __init__(self, begin: int, end: int, kafka: int | None = None) -> None:
        self.begin, self.end = begin, end
        self.kafka = begin if kafka is None else kafka


def source_of(record: Any) -> str:
    """Where a record came from: kafka, or archive."""
    return "archive" if isinstance(record, ArchivedRecord) else "kafka"


class Records:
    """Reads records by their offsets. For one task at a time.

    Args:
        settings: where Kafka and the archive are.
        archived: whether what Kafka holds no more is read from the archive, where there is one.
    """

    def __init__(self, settings: Settings, *, archived: bool = True) -> None:
        self._settings = settings
        self._archive = ArchivedRecords(settings) if archived and settings.archive.url else None
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
        kafka_clients.keep_as_parsed(self._consumer, lambda _topic: True)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect."""
        if self._archive is not None:
            await self._archive.close()
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
        """What there is of a partition of a topic (full name); None where there is none.

        Args:
            topic: full name.
            partition: its number.
            again: ask again, also where it was asked before.

        Raises:
            RecordsError: Kafka cannot be asked.
            ArchiveError: the archive cannot be asked.
        """
        tp = TopicPartition(topic, partition)
        if tp not in self._spans or again:
            archived = None if self._archive is None else await self._archive.span(topic, partition)
            if partition not in await self.partitions(topic):
                self._spans[tp] = None if archived is None else Span(*archived, archived[1])
            else:
                try:
                    async with asyncio.timeout(ASK_S):
                        begins = await self._consumer.beginning_offsets([tp])
                        ends = await self._consumer.end_offsets([tp])
                except (KafkaError, OSError, TimeoutError) as e:
                    raise self._error(e) from None
                begin = begins[tp] if archived is None else min(archived[0], begins[tp])
                self._spans[tp] = Span(begin, ends[tp], begins[tp])
        return self._spans[tp]

    async def bounds(
        self, partitions: Sequence[TopicPartition]
    ) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
        """First offsets and ends of partitions that are there, of many topics at once.

        Raises:
            RecordsError: Kafka cannot be asked.
        """
        try:
            async with asyncio.timeout(ASK_S):
                begins = await self._consumer.beginning_offsets([*partitions])
                return begins, await self._consumer.end_offsets([*partitions])
        except (KafkaError, OSError, TimeoutError) as e:
            raise self._error(e) from None

    async def at(self, topic: str, partition: int, offsets: Iterable[int]) -> dict[int, Any]:
        """Records by their offsets; those that neither Kafka nor the archive has are left out.

        Args:
            topic: full name.
            partition: its number.
            offsets: which.

        Raises:
            RecordsError: Kafka cannot be asked.
            ArchiveError: the archive cannot be read.
        """
        span = await self.span(topic, partition)
        found: dict[int, Any] = {}
        if span is None:
            return found
        asked = set(offsets)
        if self._archive is not None and (gone := {offset for offset in asked if span.begin <= offset < span.kafka}):
            found.update(await self._archive.at(topic, partition, gone))
        wanted = sorted({offset for offset in asked if span.kafka <= offset < span.end})
        for run in _runs(wanted):
            needed = set(run)
            async for records in self.between(topic, partition, run[0], run[-1] + 1):
                found.update({record.offset: record for record in records if record.offset in needed})
        return found

    async def between(self, topic: str, partition: int, begin: int, end: int) -> AsyncIterator[Sequence[Any]]:
        """Records from offset `begin` to before `end`, which lie within the partition's span, some at a time.

        Raises:
            RecordsError: Kafka cannot be asked, or gives nothing.
            ArchiveError: the archive cannot be read.
        """
        if self._archive is not None and begin < end:
            span = await self.span(topic, partition)
            if span is not None and begin < span.kafka:
                async for archived in self._archive.between(topic, partition, begin, min(end, span.kafka)):
                    yield archived
                begin = span.kafka
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
            ArchiveError: the archive cannot be read.
        """
        tps = [TopicPartition(topic, p) for p in partitions]
        archived: dict[int, int] = {}
        for tp in tps if self._archive is not None else ():
            assert self._archive is not None
            span = await self.span(topic, tp.partition)
            if span is None or span.begin >= span.kafka:
                continue
            offset = await self._archive.since(topic, tp.partition, at_us)
            if offset is not None and offset < span.kafka:
                archived[tp.partition] = offset
        tps = [tp for tp in tps if tp.partition not in archived]
        if not tps:
            return archived
        try:
            async with asyncio.timeout(ASK_S):
                found = await kafka_clients.offsets_since(self._consumer, dict.fromkeys(tps, max(0, at_us // 1_000)))
        except (KafkaError, OSError, TimeoutError) as e:
            raise self._error(e) from None
        return archived | {tp.partition: offset for tp, offset in found.items()}


def _runs(offsets: Sequence[int]) -> list[list[int]]:
    """Offsets in order, cut where the next one is far."""
    runs: list[list[int]] = []
    for offset in offsets:
        if runs and offset - runs[-1][-1] <= GAP_MAX:
            runs[-1].append(offset)
        else:
            runs.append([offset])
    return runs
