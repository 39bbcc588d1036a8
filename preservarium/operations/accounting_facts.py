"""The facts that the audit of a run is made of (accounting.py), read from Kafka, PostgreSQL and ClickHouse."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from preservarium import topics
from preservarium.operations.accounting import Bag, Ledger, Window
from preservarium.settings import Kafka, Settings
from preservarium.streaming import kafka_clients, records
from preservarium.streaming.stage import Batch
from preservarium.topics import Topic

#: Topics that the audit reads, in the order of the flow.
AUDITED: Final[tuple[Topic, ...]] = (topics.RAW, topics.STANDARDIZED, topics.VALIDATED, topics.ERRORS)
#: A read from Kafka that brings nothing for so long has failed.
SILENCE_S: Final = 30.0


async def open_window(kafka: Kafka) -> Window:
    """Note where a run begins: the end offsets now. Take it before anything of the run writes.

    Raises:
        TimeoutError: Kafka does not answer.
    """
    async with _Reader(kafka) as consumer:
        start: dict[str, dict[int, int]] = {}
        for topic in AUDITED:
            partitions = await _partitions(kafka, topic.full(kafka.topic_prefix))
            ends = await consumer.end_offsets(partitions)
            start[topic.name] = {tp.partition: offset for tp, offset in ends.items()}
        return Window(start)


async def read_topics(ledger: Ledger, window: Window, kafka: Kafka, *, payload_bytes_max: int) -> None:
    """Feed the run's topics to the ledger, from the window's start to the end that they have now.

    Raises:
        TimeoutError: Kafka stays silent.
    """
    async with _Reader(kafka) as consumer:
        for topic in AUDITED:
            async for batch in _scan(consumer, kafka, topic, window.start[topic.name]):
                if topic is topics.RAW:
                    ledger.add_raw(batch, payload_bytes_max=payload_bytes_max)
                    await ledger.run_scripts()
                    continue
                parsed, _ = records.parse_trusted(batch)
                lines = [line for lines in parsed for line in lines]
                if topic is topics.STANDARDIZED:
                    ledger.add_standardized(lines)
                elif topic is topics.VALIDATED:
                    ledger.add_validated(lines)
                else:
                    ledger.add_errors(lines)


class _Reader:
    """A consumer without a group: it reads beside the pipeline and commits nothing."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._consumer: Any = None

    async def __aenter__(self) -> Any:
        from aiokafka import AIOKafkaConsumer

        self._consumer = AIOKafkaConsumer(
            **kafka_clients.reading(self._kafka),
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            # The audit runs after the work: large fetches cost nobody anything.
            max_partition_fetch_bytes=4 << 20,
        )
        await self._consumer.start()
        return self._consumer

    async def __aexit__(self, *_: object) -> None:
        await kafka_clients.stop(self._consumer)


async def _partitions(kafka: Kafka, topic: str) -> list[Any]:
    from aiokafka import TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka))
    await admin.start()
    try:
        # A topic that was made a moment ago may not be known at once.
        async with asyncio.timeout(SILENCE_S):
            while True:
                (found,) = await admin.describe_topics([topic])
                if found["partitions"]:
                    return [TopicPartition(topic, p) for p in sorted(p["partition"] for p in found["partitions"])]
                await asyncio.sleep(0.2)
    finally:
        await admin.close()


async def _scan(consumer: Any, kafka: Kafka, topic: Topic, start: Mapping[int, int]) -> AsyncIterator[Batch]:
    partitions = await _partitions(kafka, topic.full(kafka.topic_prefix))
    ends = await consumer.end_offsets(partitions)
    firsts = await consumer.beginning_offsets(partitions)
    todo = {tp: ends[tp] for tp in partitions if ends[tp] > start.get(tp.partition, 0)}
    for tp in todo:
        if firsts[tp] > start.get(tp.partition, 0):
            message = f"{tp.topic}[{tp.partition}]: the run's first records are past their retention already"
            raise ValueError(message)
    # One partition at a time: a bounded amount in memory, and records in their order.
    for tp, end in todo.items():
        consumer.assign([tp])
        consumer.seek(tp, start.get(tp.partition, 0))
        while await consumer.position(tp) < end:
            async with asyncio.timeout(SILENCE_S):
                got = await consumer.getmany(tp, timeout_ms=1_000, max_records=5_000)
            found = [record for record in got.get(tp, ()) if record.offset < end]
            if found:
                yield Batch(topic.name, tp.partition, found)


async def read_postgres(ledger: Ledger, dsn: str) -> None:
    """Feed the rows of the run's span of time to the ledger, from PostgreSQL."""
    from preservarium.stores.connections import connect

    ledger.stores.setdefault("postgres", Bag())
    if ledger.timestamp_min is None or ledger.timestamp_max is None:
        return
    connection = await connect(dsn, what="the accounting", timeout=SILENCE_S)
    try:
        async with connection.transaction(readonly=True):
            cursor = await connection.cursor(_ROWS, _instant(ledger.timestamp_min), _instant(ledger.timestamp_max))
            while rows := await cursor.fetch(10_000):
                ledger.add_rows("postgres", rows)
    finally:
        await connection.close()


#: Rows that came too late for their chunk wait in a table of their own; one that is in both is merged already.
_ROWS: Final = """
SELECT device_id, connector_mode, component_type, pin_position,
       (extract(epoch FROM timestamp) * 1000000)::bigint AS timestamp_us, value, value_text
FROM iot_measurements WHERE timestamp BETWEEN $1 AND $2
UNION ALL
SELECT s.device_id, s.connector_mode, s.component_type, s.pin_position,
       (extract(epoch FROM l.timestamp) * 1000000)::bigint, l.value, l.value_text
FROM measurements_late l JOIN series s USING (series_id)
WHERE l.timestamp BETWEEN $1 AND $2 AND NOT EXISTS (
  SELECT FROM measurements m WHERE m.series_id = l.series_id AND m.timestamp = l.timestamp)
"""


async def read_clickhouse(ledger: Ledger, settings: Settings) -> None:
    """Feed the rows of the run's span of time to the ledger, from ClickHouse.

    FINAL: rows that a repeated insert left twice count once they are merged, which the engine does in its own time; how
    many wait for that is noted. What FINAL leaves twice is twice.
    """
    from preservarium.stores.migrate import connect_clickhouse

    ledger.stores.setdefault("clickhouse", Bag())
    if ledger.timestamp_min is None or ledger.timestamp_max is None:
        return
    client = await connect_clickhouse(settings, database=settings.clickhouse.database, wait_s=SILENCE_S)
    try:
        span = "timestamp BETWEEN fromUnixTimestamp64Micro({a:Int64}) AND fromUnixTimestamp64Micro({b:Int64})"
        bounds: dict[str, Any] = {"a": ledger.timestamp_min, "b": ledger.timestamp_max}
        counted = await client.query(f"SELECT count() FROM measurements WHERE {span}", parameters=bounds)
        found = 0
        # In slices, so that one answer stays small whatever the run was.
        for part in range(_SLICES):
            rows = await client.query(
                "SELECT device_id, connector_mode, component_type, pin_position, toUnixTimestamp64Micro(timestamp), value, value_text"
                f" FROM measurements FINAL WHERE {span} AND cityHash64(device_id) % {_SLICES} = {part}",
                parameters=bounds,
            )
            ledger.add_rows("clickhouse", rows.result_rows)
            found += len(rows.result_rows)
        ledger.unmerged["clickhouse"] = counted.result_rows[0][0] - found
    finally:
        await client.close()


#: Parts that ClickHouse's rows are asked for in.
_SLICES: Final = 16


async def group_lag(settings: Settings, groups: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Records that consumer groups have not committed yet.

    Args:
        settings: where Kafka is.
        groups: (group, topic without prefix).

    Returns:
        The lag of each pair, read in the order of the flow: where all are 0, nothing is under way between them that
        was there when the first was read.
    """
    from aiokafka import TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient

    kafka, prefix = settings.kafka, settings.kafka.topic_prefix
    order = {topic.name: n for n, topic in enumerate(topics.TOPICS)}
    admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka))
    await admin.start()
    try:
        async with _Reader(kafka) as consumer:
            lags: dict[tuple[str, str], int] = {}
            for group, topic in sorted(groups, key=lambda pair: (order.get(pair[1], len(order)), pair)):
                partitions = [
                    TopicPartition(prefix + topic, tp.partition) for tp in await _partitions(kafka, prefix + topic)
                ]
                committed = await admin.list_consumer_group_offsets(group, partitions=partitions)
                ends = await consumer.end_offsets(partitions)
                begins = await consumer.beginning_offsets(partitions)
                lag = 0
                for tp in partitions:
                    offset = committed[tp].offset if tp in committed else -1
                    # Nothing committed yet: everything that is there is still to be read.
                    lag += max(0, ends[tp] - (offset if offset >= 0 else begins[tp]))
                lags[group, topic] = lag
            return lags
    finally:
        await admin.close()


def _instant(us: int) -> datetime:
    # Whole microseconds: a float of seconds would round the last digit.
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)
