"""Records written into an empty partition so that each has the offset that it had in another cluster.

Kafka gives offsets, and no client may choose them. But they are counted, so what is missing in between can be written too:

- **Below the first record** stand fillers: empty records in large batches that compress to next to nothing. They are deleted
  (`DeleteRecords`) once they are counted, so that the log begins where it is to begin.
- **Gaps between records** (markers of transactions, records of aborted ones) are made as they were made there: a gap of one
  offset is the marker of a transaction that commits the record before it, a larger one is a transaction that is aborted. All our
  consumers read what is committed (`kafka_clients.reading`), so they see the records and nothing else.

Kafka says of each batch where it came to stand. Anything but the expected offset means that somebody else writes: that ends it.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, Protocol

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete

from preservarium.errors import PreservariumError
from preservarium.settings import Kafka
from preservarium.streaming import kafka_clients

#: Fillers of one batch: 0.4 MiB before compression, which a broker unpacks to count them.
FILL_RECORDS: Final = 50_000
#: A filler takes 8 bytes: its share of what a record may have is what an uncompressed batch of them may hold.
FILL_RECORD_BYTES: Final = 8
FILL_BATCH_BYTES: Final = 1 << 20
#: Records go in batches of so many bytes, as the publisher's.
BATCH_BYTES: Final = 256 << 10
#: Kafka acknowledges a batch within this time.
ACK_MS: Final = 60_000
STOP_S: Final = 10.0


class OffsetsDifferError(PreservariumError):
    """A record has not the offset that it must have: somebody else writes to the topic."""


class Kept(Protocol):
    """A record with the offset that it is to have."""

    @property
    def offset(self) -> int:
        """That it is to have; of no meaning where records are appended."""
        ...

    @property
    def timestamp_ms(self) -> int:
        """Negative: when it is written."""
        ...

    @property
    def key(self) -> bytes | None:
        """Of the record."""
        ...

    @property
    def value(self) -> bytes | None:
        """Of the record."""
        ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes | None]]:
        """Of the record."""
        ...


class Writer:
    """Producers for one restore; partitions may be written at the same time, each by one task."""

    def __init__(self, kafka: Kafka) -> None:
        self._kafka = kafka
        self._batch_bytes = min(BATCH_BYTES, kafka.record_bytes_max)
        self._producers: list[Any] = []
        self._records: Any = None
        self._fillers: Any = None
        self._transactions: Any = None
        self._transaction = asyncio.Lock()
        self._admin: Any = None
        self._consumer: Any = None
        self._fill: dict[int, Any] = {}

    async def start(self) -> None:
        """Connect.

        Raises:
            KafkaError, OSError: no broker takes us.
        """
        kafka = self._kafka
        self._records = await self._producer(enable_idempotence=True, max_batch_size=self._batch_bytes)
        # Not idempotent, so that one batch can be sent again and again as it is. What a retry doubles shows in the offsets.
        self._fillers = await self._producer(max_batch_size=FILL_BATCH_BYTES)
        self._admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka), request_timeout_ms=ACK_MS)
        await self._admin.start()
        # For ends alone, so of all that is written, and not only of what is committed.
        self._consumer = AIOKafkaConsumer(**kafka_clients.connection(kafka), enable_auto_commit=False)
        await self._consumer.start()

    async def stop(self) -> None:
        """Disconnect."""
        for client in (*self._producers, self._consumer, self._admin):
            if client is not None:
                await kafka_clients.stop(client, STOP_S)

    async def rewrite(
        self, topic: str, partition: int, begin: int, end: int, records: AsyncIterator[Sequence[Kept]]
    ) -> int:
        """Fill an empty partition.

        Args:
            topic: its full name.
            partition: of the topic.
            begin: offset at which the log begins, where no record comes first; below the first record.
            end: offset of the next record that somebody will write.
            records: with growing offsets from `begin` on.

        Returns:
            How many records there are.

        Raises:
            OffsetsDifferError: the partition was not empty, or somebody else writes to it.
            KafkaError: Kafka does not take it.
        """
        at = _At(self, topic, partition)
        written = 0
        async for some in records:
            for record in some:
                if not written:
                    await at.fill(record.offset)
                    begin = record.offset
                await at.put(record)
                written += 1
        await at.finish(end) if written else await at.fill(end)
        low = begin if written else end
        if low:
            await self._admin.delete_records(
                {TopicPartition(topic, partition): RecordsToDelete(low)}, timeout_ms=ACK_MS
            )
        return written

    async def append(self, topic: str, partition: int, records: Sequence[Kept]) -> None:
        """Write records wherever they come to stand, in their order.

        Raises:
            KafkaError: Kafka does not take it.
        """
        await self._send(topic, partition, records, None)

    async def _producer(self, **options: Any) -> Any:
        kafka = self._kafka
        producer = AIOKafkaProducer(
            **kafka_clients.connection(kafka),
            client_id=f"{kafka.group}-restore",
            acks="all",
            compression_type=None if kafka.compression == "none" else kafka.compression,
            max_request_size=max(kafka.record_bytes_max, FILL_BATCH_BYTES),
            request_timeout_ms=ACK_MS,
            **options,
        )
        self._producers.append(producer)
        await producer.start()
        return producer

    async def _send(
        self, topic: str, partition: int, records: Sequence[Kept], expected: int | None, producer: Any = None
    ) -> None:
        producer = producer or self._records
        position = 0
        while position < len(records):
            builder = producer.create_batch()
            first = position
            while position < len(records):
                record = records[position]
                taken = builder.append(
                    timestamp=_time_of(record), key=record.key, value=record.value, headers=list(record.headers)
                )
                if taken is None:
                    break
                position += 1
            builder.close()
            metadata = await (await producer.send_batch(builder, topic, partition=partition))
            if expected is not None:
                _check(topic, partition, metadata, expected + first)

    async def _send_fillers(self, topic: str, partition: int, count: int, expected: int) -> None:
        compressed = self._kafka.compression != "none"
        most = (
            FILL_RECORDS
            if compressed
            else max(1, min(FILL_RECORDS, self._kafka.record_bytes_max // (2 * FILL_RECORD_BYTES)))
        )
        while count:
            now = min(count, most)
            builder = self._fill.get(now)
            if builder is None:
                builder = self._fillers.create_batch()
                for _ in range(now):
                    # The oldest time there is: retention takes them with the first segment that it can.
                    builder.append(timestamp=1, key=None, value=b"")
                builder.close()
                if now == most:  # made once; the last one of a partition has a size of its own
                    self._fill[now] = builder
            metadata = await (await self._fillers.send_batch(builder, topic, partition=partition))
            _check(topic, partition, metadata, expected)
            expected += now
            count -= now

    async def _until(self, topic: str, partition: int, end: int) -> None:
        """Wait for a marker: Kafka writes it after it has said that the transaction is over."""
        tp = TopicPartition(topic, partition)
        async with asyncio.timeout(ACK_MS / 1000):
            while True:
                found = (await self._consumer.end_offsets([tp]))[tp]
                if found >= end:
                    break
                await asyncio.sleep(0.01)
        if found > end:
            _differ(topic, partition, found - 1, end - 1)

    @asynccontextmanager
    async def _in_transaction(self) -> AsyncIterator[Any]:
        async with self._transaction:
            if self._transactions is None:
                self._transactions = await self._producer(
                    transactional_id=f"{self._kafka.group}-restore", max_batch_size=self._batch_bytes
                )
            yield self._transactions


class _At:
    """Where the writing of one partition is."""

    def __init__(self, writer: Writer, topic: str, partition: int) -> None:
        self._writer = writer
        self._topic, self._partition = topic, partition
        self._next = 0  #: offset of the next record to be sent
        #: in a row; the last one is kept back, because a gap of one behind it makes it one of a transaction
        self._waiting: list[Kept] = []
        self._bytes = 0

    async def fill(self, until: int) -> None:
        await self._writer._send_fillers(self._topic, self._partition, until - self._next, self._next)
        self._next = until

    async def put(self, record: Kept) -> None:
        expected = self._next + len(self._waiting)
        if record.offset < expected:
            message = f"{self._topic}-{self._partition}: offset {record.offset} comes after {expected - 1}"
            raise OffsetsDifferError(message)
        if record.offset > expected:
            await self._gap(record.offset - expected)
        self._waiting.append(record)
        self._bytes += len(record.value or b"") + len(record.key or b"")
        if self._bytes > BATCH_BYTES:
            await self._flush(self._waiting[:-1])
            self._waiting = self._waiting[-1:]
            self._bytes = 0

    async def finish(self, end: int) -> None:
        if gap := end - self._next - len(self._waiting):
            await self._gap(gap)
        await self._flush(self._waiting)
        self._waiting = []

    async def _flush(self, records: list[Kept]) -> None:
        await self._writer._send(self._topic, self._partition, records, self._next)
        self._next += len(records)

    async def _gap(self, offsets: int) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if offsets == 1:
            await self._flush(waiting[:-1])
            await self._transact(waiting[-1:], commit=True)
            return
        await self._flush(waiting)
        while offsets:
            # Each has a marker, too, and none may be left that would be a marker alone.
            now = offsets if offsets <= FILL_RECORDS else FILL_RECORDS - 1
            await self._transact([_NOTHING] * (now - 1), commit=False)
            offsets -= now

    async def _transact(self, records: Sequence[Any], *, commit: bool) -> None:
        """Send these in a transaction; its marker has an offset, too."""
        async with self._writer._in_transaction() as producer:
            await producer.begin_transaction()
            await self._writer._send(self._topic, self._partition, records, self._next, producer)
            await (producer.commit_transaction() if commit else producer.abort_transaction())
        self._next += len(records) + 1
        await self._writer._until(self._topic, self._partition, self._next)


class _Nothing:
    """What an aborted transaction writes."""

    offset = -1
    timestamp_ms = 1
    key = None
    value = b""
    headers: Sequence[tuple[str, bytes | None]] = ()


_NOTHING: Final = _Nothing()


def _time_of(record: Kept) -> int | None:
    return record.timestamp_ms if record.timestamp_ms >= 0 else None


def _check(topic: str, partition: int, metadata: Any, expected: int) -> None:
    if metadata is None or metadata.offset != expected:
        _differ(topic, partition, None if metadata is None else metadata.offset, expected)


def _differ(topic: str, partition: int, offset: int | None, expected: int) -> NoReturn:
    message = (
        f"{topic}-{partition}: a record came to stand at {offset} and not at {expected}: the partition was not empty, or "
        "somebody else writes to it"
    )
    raise OffsetsDifferError(message)
