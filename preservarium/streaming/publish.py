"""Producing to Kafka: `publish` returns when every record is acknowledged, or raises.

One idempotent producer a process, fed with whole batches per partition (aiokafka's `create_batch`/`send_batch`: 4 to 10
times the records per second of `send`, because no future is made for each record). A batch is closed before it is
handed over, so it leaves at once: under load, requests under way make the batches grow, and without load nothing lingers.

Order: the records of one `publish` for one partition are acknowledged batch by batch, so what Kafka holds of a failed
call is a prefix of it. A downstream stage that skips what it has seen (by coordinates) can therefore never skip a gap.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, TypeAlias

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
)
from aiokafka.partitioner import murmur2
from mode import Service

from preservarium.errors import Fatal, ReasonCode, Reject, Retry, reason
from preservarium.settings import LiveSettings
from preservarium.streaming import kafka_clients
from preservarium.streaming.stage import Send

log = structlog.get_logger(__name__)

#: Most bytes of one batch, before compression: large enough that the broker's cost a request disappears, small enough
#: that a batch compresses in about a millisecond of the event loop and stays below the broker's 1 MiB.
BATCH_BYTES_MAX: Final = 262_144
#: Kafka's own fields of a record, beyond key, value and headers (varints, attributes, timestamp delta): an upper bound.
RECORD_OVERHEAD_BYTES: Final = 64
#: Longest wait for an acknowledgement, whatever the session timeout says.
REQUEST_TIMEOUT_MAX_S: Final = 60.0
#: Share of the session timeout that an acknowledgement may take. Below 1, because a worker that Kafka has declared dead
#: must not have anything left in its queues: its late state would land behind that of the worker that took over.
SESSION_SHARE: Final = 0.75
#: A producer that is given up is closed within this time; its connections are cut first, so nothing hangs on it.
CLOSE_TIMEOUT_S: Final = 5.0

#: News of a topic (partitions, leaders) come within this time.
METADATA_AGE_MS: Final = 30_000

_ROTATION = itertools.count()

#: What a batch is filled from: sends, or key/value pairs of a changelog.
Records: TypeAlias = Sequence[Send] | Sequence[tuple[bytes, bytes | None]]


@lru_cache(maxsize=131_072)  # keys are device addresses: a fleet of 100,000 fits in some 20 MiB
def _key_hash(key: bytes) -> int:
    return int(murmur2(key)) & 0x7FFFFFFF


def partition_of(key: bytes | None, partitions: int) -> int:
    """The partition that a key belongs to: murmur2 as the Java clients have it; keyless records take turns."""
    if key is None:
        return next(_ROTATION) % partitions
    return _key_hash(key) % partitions


class _Connection:
    """One producer and what waits on it. A producer that failed once is not used again."""

    def __init__(self, producer: Any) -> None:
        self.producer = producer
        self.waiting: set[asyncio.Future[Any]] = set()
        self.partitions: dict[str, int] = {}
        #: (topic, partition) -> whose turn it is to wait for room there. aiokafka lets all that wait run after one batch
        #: and takes the whole time since the beginning off their limit at each turn: eight callers at one partition
        #: were timed out within half a second.
        self.turns: dict[tuple[str, int], asyncio.Lock] = {}
        self.closed = False
        #: a call was cancelled while batches of it were under way: they may go out at any time
        self.orphans = False

    async def abandon(self) -> None:
        """Close at once; what is queued is never sent.

        `stop()` would flush first, and that is what must not happen: the records may be another worker's by now.
        """
        if self.closed:
            return
        self.closed = True
        for future in list(self.waiting):
            future.cancel()
        producer = self.producer
        # Private: AIOKafkaProducer has no way to stop without a flush. tests/contract holds it.
        sender = producer._sender
        producer._closed = True
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                task = sender.sender_task
                if task is not None:
                    task.cancel()
                await producer.client.close()
                if task is not None:
                    await asyncio.wait([task])

    async def close(self) -> None:
        """Flush and close."""
        if self.closed:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.producer.stop()
            self.closed = True
        except (TimeoutError, KafkaError):
            await self.abandon()


class Publisher(Service):
    """The process's producer. Connects on first use; a Kafka that cannot be reached is a `Retry`, never an exit."""

    logger = logging.getLogger("mode.publisher")

    def __init__(self, live: LiveSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._live = live
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        #: records acknowledged since the start
        self.acknowledged = 0

    @property
    def timeout_s(self) -> float:
        """Longest wait for the acknowledgement of one batch, in seconds."""
        return min(REQUEST_TIMEOUT_MAX_S, self._live().kafka.session_timeout_s * SESSION_SHARE)

    async def on_stop(self) -> None:
        """Flush what is under way and close."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        if self._closing:
            await asyncio.wait(self._closing)

    async def publish(self, sends: Sequence[Send]) -> dict[str, int]:
        """Produce `sends`; return when all are acknowledged by all in-sync replicas.

        Records for one partition keep their order, also across calls that are awaited one after the other.

        Returns:
            Records acknowledged, by declared topic name.

        Raises:
            Retry: Kafka cannot be reached, or did not acknowledge in time. Some records may be there.
            Reject: a record is larger than Kafka takes (`output_too_large`); nothing of this call was sent where that
                is known beforehand.
            Fatal: a topic has fewer partitions than declared.
        """
        if not sends:
            return {}
        settings = self._live().kafka
        size_max = settings.record_bytes_max - RECORD_OVERHEAD_BYTES
        partitions = settings.partitions
        groups: dict[tuple[str, int], list[Send]] = {}
        for send in sends:
            size = len(send.value) if send.value is not None else 0
            if send.key is not None:
                size += len(send.key)
            if send.headers:
                size += sum(len(name) + len(value) + 10 for name, value in send.headers)
            if size > size_max:
                message = f"a record of {size} bytes for {send.topic.name} is over {settings.record_bytes_max}"
                raise Reject(ReasonCode.OUTPUT_TOO_LARGE, message)
            partition = partition_of(send.key, partitions) if send.partition is None else send.partition
            group = groups.get((send.topic.name, partition))
            if group is None:
                groups[send.topic.name, partition] = [send]
            else:
                group.append(send)
        counts: dict[str, int] = {}
        for (topic, _), group in groups.items():
            counts[topic] = counts.get(topic, 0) + len(group)
        prefix = settings.topic_prefix
        await self._deliver([(prefix + topic, partition, group) for (topic, partition), group in groups.items()])
        return counts

    async def append(
        self,
        topic: str,
        partition: int,
        items: Sequence[tuple[bytes, bytes | None]],
        headers: tuple[tuple[str, bytes], ...] = (),
    ) -> int | None:
        """Produce key/value pairs, each with `headers`, to one partition of a topic that is named in full (a changelog).

        Returns:
            The offset of the last one; None where Kafka did not say (a repeated request that it had already stored).

        Raises:
            Retry: as `publish`.
            Reject: as `publish`.
            Fatal: as `publish`.
        """
        size_max = self._live().kafka.record_bytes_max - RECORD_OVERHEAD_BYTES
        for key, value in items:
            if len(key) + len(value or b"") > size_max:
                message = f"a state of {len(value or b'')} bytes for {topic} is over {size_max}"
                raise Reject(ReasonCode.OUTPUT_TOO_LARGE, message)
        offsets = await self._deliver([(topic, partition, items)], list(headers))
        return offsets[0]

    def drop_orphans(self) -> None:
        """Throw the producer away where a cancelled call left batches in it; other calls under way are retried.

        For a stage whose partitions go to another worker: what it had queued must not land after that worker's.
        """
        connection = self._connection
        if connection is not None and connection.orphans:
            log.warning("producer_dropped", reason="a batch was abandoned while its records were under way")
            self._close_later(connection)

    async def ensure_topic(self, topic: str) -> None:
        """Ask for a topic's metadata, which makes brokers that create topics on demand create it.

        Raises:
            Retry: it is not there (yet).
        """
        connection = await self._connect()
        await self._partitions(connection, topic, check=False)

    async def _connect(self) -> _Connection:
        connection = self._connection
        if connection is not None and not connection.closed:
            return connection
        async with self._connecting:
            connection = self._connection
            if connection is not None and not connection.closed:
                return connection
            if self.should_stop:
                message = "the publisher is stopping"
                raise Retry(message)
            settings = self._live().kafka
            producer = AIOKafkaProducer(
                **kafka_clients.connection(settings),
                client_id=f"{settings.group}-publisher",
                acks="all",
                enable_idempotence=True,
                linger_ms=settings.linger_ms,
                compression_type=None if settings.compression == "none" else settings.compression,
                max_batch_size=BATCH_BYTES_MAX,
                max_request_size=settings.record_bytes_max,
                request_timeout_ms=round(self.timeout_s * 1000),
                metadata_max_age_ms=METADATA_AGE_MS,
            )
            connection = _Connection(producer)
            try:
                # With idempotence, aiokafka tries for ever to get a producer id.
                async with asyncio.timeout(self.timeout_s):
                    await producer.start()
            except (KafkaError, OSError, TimeoutError) as e:
                self._close_later(connection)
                message = f"Kafka cannot be reached at {settings.bootstrap_servers}: {reason(e)}"
                raise Retry(message) from e
            except asyncio.CancelledError:
                self._close_later(connection)
                raise
            self._connection = connection
            return connection

    def _close_later(self, connection: _Connection) -> None:
        if self._connection is connection:
            self._connection = None
        task = asyncio.create_task(connection.abandon())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _partitions(self, connection: _Connection, topic: str, *, check: bool = True) -> None:
        try:
            async with asyncio.timeout(self.timeout_s):
                found = len(await connection.producer.partitions_for(topic))
        except (KafkaError, TimeoutError) as e:
            message = f"topic {topic} is not there: {reason(e)}"
            raise Retry(message) from e
        declared = self._live().kafka.partitions
        # More than declared are told elsewhere (kafka_watch.py): keys keep the places that they have.
        if check and found < declared:
            message = f"topic {topic} has {found} partitions, {declared} are declared: see `preservarium topics`"
            raise Fatal(message)
        connection.partitions[topic] = found

    async def _deliver(
        self, groups: Sequence[tuple[str, int, Records]], headers: Sequence[tuple[str, bytes]] = ()
    ) -> list[int | None]:
        """Send every group, batch after batch; the offset of each group's last record. Pairs are sent with `headers`."""
        connection = await self._connect()
        for topic in {topic for topic, _, _ in groups}:
            if topic not in connection.partitions:
                await self._partitions(connection, topic)
        producer = connection.producer
        offsets: list[int | None] = [None] * len(groups)
        position = [0] * len(groups)
        pending = list(range(len(groups)))
        futures: dict[asyncio.Future[Any], tuple[int, int]] = {}
        try:
            async with asyncio.timeout(self.timeout_s) as deadline:
                while pending:
                    # A round: one batch of every group. The next round begins when all are acknowledged, which costs
                    # nothing (a producer has one request a partition under way) and makes what is stored a prefix.
                    for index in pending:
                        topic, partition, records = groups[index]
                        builder = producer.create_batch()
                        position[index], count = _fill(builder, records, position[index], headers)
                        builder.close()  # closed: it does not linger, and no `send` adds to it
                        async with connection.turns.setdefault((topic, partition), asyncio.Lock()):
                            future = await producer.send_batch(builder, topic, partition=partition)
                        futures[future] = (index, count)
                        connection.waiting.add(future)
                    # wait, and not gather: a failure must not leave its siblings running unseen
                    done, _ = await asyncio.wait(futures)
                    for future in done:
                        connection.waiting.discard(future)
                        index, count = futures.pop(future)
                        if future.cancelled():
                            message = "the connection to Kafka was given up"
                            raise Retry(message)
                        metadata = future.result()
                        self.acknowledged += count
                        offsets[index] = (
                            metadata.offset + count - 1 if metadata is not None and metadata.offset >= 0 else None
                        )
                    pending = [index for index in pending if position[index] < len(groups[index][2])]
                    deadline.reschedule(asyncio.get_running_loop().time() + self.timeout_s)
        except (MessageSizeTooLargeError, RecordListTooLargeError) as e:
            self._close_later(connection)  # the sequence numbers have a hole now
            message = f"Kafka refused a batch as too large: {reason(e)}; compare max.message.bytes of the topics"
            raise Reject(ReasonCode.OUTPUT_TOO_LARGE, message) from e
        except (KafkaError, TimeoutError) as e:
            self._close_later(connection)
            topics = ", ".join(sorted({topic for topic, _, _ in groups}))
            if isinstance(e, InvalidTopicError):
                message = f"Kafka says that a topic's name is invalid: {topics}"
                raise Fatal(message) from e
            message = f"Kafka did not acknowledge records for {topics}: {reason(e)}"
            raise Retry(message) from e
        finally:
            for future in futures:
                connection.waiting.discard(future)
                if not future.done():
                    connection.orphans = True
                    future.cancel()
                elif not future.cancelled():
                    future.exception()  # seen: asyncio need not report it
        return offsets


def _fill(builder: Any, records: Records, start: int, headers: Sequence[tuple[str, bytes]] = ()) -> tuple[int, int]:
    """Append records from `start` until the batch is full; (position of the next, records taken)."""
    append = builder.append
    position = start
    rest: Iterable[Send | tuple[bytes, bytes | None]] = itertools.islice(records, start, None)
    for record in rest:
        if isinstance(record, Send):
            metadata = append(
                timestamp=record.timestamp_ms, key=record.key, value=record.value, headers=list(record.headers)
            )
        else:
            metadata = append(timestamp=None, key=record[0], value=record[1], headers=headers)
        if metadata is None:
            break
        position += 1
    return position, position - start
