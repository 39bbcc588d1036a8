"""Records get the offsets that they had: a reader of what is committed sees the same log, and the next record comes where it must."""

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from feed_support import make_topic

from preservarium.settings import load
from preservarium.streaming.same_offsets import FILL_RECORDS, OffsetsDifferError, Writer

#: Of today, or Kafka's retention takes the records while they are looked at.
NOW_MS = time.time_ns() // 1_000_000 - 60_000


@dataclass(frozen=True)
class Old:
    """A record as it was."""

    offset: int
    timestamp_ms: int = NOW_MS
    key: bytes | None = b"dev"
    value: bytes | None = b"{}"
    headers: Sequence[tuple[str, bytes | None]] = ()


def old(*offsets: int, **fields: Any) -> list[Old]:
    return [Old(n, NOW_MS + n, b"k%d" % n, b"v%d" % n, **fields) for n in offsets]


async def some_at_a_time(records: Sequence[Old], size: int = 3) -> AsyncIterator[Sequence[Old]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


async def written(
    kafka: str, topic: str, begin: int, end: int, records: Sequence[Old], compression: str = "zstd"
) -> int:
    writer = Writer(load(kafka={"bootstrap_servers": kafka, "group": topic, "compression": compression}).kafka)
    try:
        await writer.start()
        return await writer.rewrite(topic, 0, begin, end, some_at_a_time(records))
    finally:
        await writer.stop()


async def log_of(kafka: str, topic: str) -> tuple[int, int, list[Old]]:
    """Where the log begins and ends, and what a reader of the committed sees."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka, isolation_level="read_committed", enable_auto_commit=False)
    await consumer.start()
    try:
        tp = TopicPartition(topic, 0)
        begin, end = (await consumer.beginning_offsets([tp]))[tp], (await consumer.end_offsets([tp]))[tp]
        consumer.assign([tp])
        consumer.seek(tp, begin)
        found: list[Old] = []
        while await consumer.position(tp) < end:
            for record in (await consumer.getmany(timeout_ms=5_000)).get(tp, ()):
                found.append(Old(record.offset, record.timestamp, record.key, record.value, tuple(record.headers)))
        return begin, end, found
    finally:
        await consumer.stop()


CASES = {
    "from the beginning": (0, 3, old(0, 1, 2)),
    "from an offset on": (7, 10, old(7, 8, 9)),
    "from far on": (2 * FILL_RECORDS + 3, 2 * FILL_RECORDS + 5, old(2 * FILL_RECORDS + 3, 2 * FILL_RECORDS + 4)),
    "nothing left": (FILL_RECORDS + 1, FILL_RECORDS + 1, []),
    "nothing ever": (0, 0, []),
    "behind what a store has": (5, 9, []),
    "a marker": (5, 10, old(5, 6, 8, 9)),
    "markers one after the other": (5, 12, old(5, 7, 9, 11)),
    "what was aborted": (5, 14, old(5, 8, 12, 13)),
    "a marker at the end": (5, 8, old(5, 6)),
    "something aborted at the end": (5, 20, old(5, 6)),
    "much that was aborted": (5, 2 * FILL_RECORDS + 100, old(5, 2 * FILL_RECORDS + 6, 2 * FILL_RECORDS + 7)),
    "all but one more than a transaction": (5, 7 + FILL_RECORDS + 1, old(5, 6)),
    "a gap at the beginning": (5, 11, old(9, 10)),
    "headers": (1, 3, [*old(1, headers=(("rev", b"1"), ("none", None), ("empty", b""))), Old(2, 5, None, b"keyless")]),
    "no value": (1, 3, [Old(1, value=None), Old(2, key=b"other")]),
    "more than a batch": (3, 9, [Old(n, value=bytes([n]) * 200_000) for n in (3, 4, 5, 7, 8)]),
}


@pytest.mark.parametrize("case", CASES)
async def test_offsets_are_what_they_were(kafka: str, topic_prefix: str, case: str) -> None:
    begin, end, records = CASES[case]
    topic = await make_topic(kafka, f"{topic_prefix}same", 1)
    assert await written(kafka, topic, begin, end, records) == len(records)
    first = records[0].offset if records else end
    assert await log_of(kafka, topic) == (first, end, records)
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        assert (await producer.send_and_wait(topic, b"next", partition=0)).offset == end


async def test_without_compression_fillers_are_as_many(kafka: str, topic_prefix: str) -> None:
    topic = await make_topic(kafka, f"{topic_prefix}same", 1)
    records = old(FILL_RECORDS * 3 + 1)
    await written(kafka, topic, records[0].offset, records[0].offset + 1, records, "none")
    assert await log_of(kafka, topic) == (records[0].offset, records[0].offset + 1, records)


@pytest.mark.parametrize("begin", [0, 3])
async def test_a_partition_that_is_not_empty_is_refused(kafka: str, topic_prefix: str, begin: int) -> None:
    topic = await make_topic(kafka, f"{topic_prefix}same", 1)
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        await producer.send_and_wait(topic, b"somebody's", partition=0)
    with pytest.raises(OffsetsDifferError, match="somebody else writes"):
        await written(kafka, topic, begin, begin + 1, old(begin))


async def test_records_out_of_order_are_refused(kafka: str, topic_prefix: str) -> None:
    topic = await make_topic(kafka, f"{topic_prefix}same", 1)
    with pytest.raises(OffsetsDifferError, match="offset 5 comes after 6"):
        await written(kafka, topic, 5, 8, old(5, 6, 5))
