"""Topics that a process follows by itself, without a group: what they hold, or held lately, and then whatever comes."""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from mode import Service

from preservarium.errors import Retry, reason
from preservarium.settings import Kafka, LiveSettings
from preservarium.streaming import kafka_clients
from preservarium.streaming.fencing import Change, change_of

log = structlog.get_logger(__name__)

#: One look for new records; also how long a stop can take.
POLL_MS: Final = 500
#: A broker that does not answer for so long is given up and asked anew.
REQUEST_TIMEOUT_MS: Final = 30_000
#: New partitions and moved leaders are noticed within this time.
METADATA_AGE_MS: Final = 30_000
#: A consumer does not say that its brokers are gone, so they are asked this often, and given so long to answer.
PROBE_S: Final = 5.0
PROBE_TIMEOUT_S: Final = 10.0
BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 10.0

#: Is given the records of a poll of one partition, and whether they were there when the reading began.
Take = Callable[[Sequence[Any], bool], None]


async def follow(
    kafka: Kafka,
    sources: Mapping[str, int | None],
    take: Take,
    caught_up: Callable[[], None],
    *,
    client: str,
    stopped: Callable[[], bool],
    once: bool = False,
    records_max: int | None = None,
) -> None:
    """Read topics until `stopped`; with `once`, only what is there now. Of a partition, records come in order.

    Args:
        kafka: where.
        sources: full names of the topics, each with the time from which on it is read, ms since the epoch; None: all of it.
        take: is given what is read.
        caught_up: called once, when everything that was there at the begin was given to `take`.
        client: the client's name, for the broker's logs.
        stopped: asked between polls.
        once: return when caught up.
        records_max: of what is there at the begin, at most so many records of each partition, the newest. None: all.

    Raises:
        Retry: a topic is not there.
        KafkaError, OSError: Kafka cannot be read (TimeoutError among them).
    """
    # Assigned by us: where partitions are added, aiokafka's own assignment would begin all of them again.
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(kafka),
        client_id=client,
        group_id=None,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        metadata_max_age_ms=METADATA_AGE_MS,
    )
    try:
        await consumer.start()
        # Hook: all topics are asked for, because naming one that is missing makes it on brokers that auto-create.
        there = await consumer._client.fetch_all_metadata()
        if missing := sorted(sources.keys() - there.topics()):
            message = f"topic {missing[0]} is not there: run `preservarium migrate`"
            raise Retry(message)
        assigned = _partitions(there, sources)
        consumer.assign(assigned)
        ends = await consumer.end_offsets(assigned)
        lately = {tp: since_ms for tp in assigned if (since_ms := sources[tp.topic]) is not None}
        for tp, offset in (await kafka_clients.offsets_since(consumer, lately) if lately else {}).items():
            consumer.seek(tp, offset)
        if records_max is not None:
            for tp in assigned:
                if await consumer.position(tp) < ends[tp] - records_max:
                    consumer.seek(tp, ends[tp] - records_max)
        first = True
        probed_s = monotonic()
        while not stopped():
            if monotonic() - probed_s > PROBE_S:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await consumer.end_offsets(assigned[:1])
                if added := [tp for tp in _partitions(consumer, sources) if tp not in assigned]:
                    assigned = await _extended(consumer, assigned, added)
                probed_s = monotonic()
            if first and all([await consumer.position(tp) >= end for tp, end in ends.items()]):
                first = False
                caught_up()
                if once:
                    return
            for records in (await consumer.getmany(timeout_ms=POLL_MS)).values():
                take(records, first)
    finally:
        await kafka_clients.stop(consumer)


def _partitions(known: Any, topics: Iterable[str]) -> list[TopicPartition]:
    """Every partition of the topics that a consumer, or an answer of Kafka, knows."""
    return [TopicPartition(t, p) for t in topics for p in sorted(known.partitions_for_topic(t) or ())]


async def _extended(consumer: Any, assigned: list[TopicPartition], added: list[TopicPartition]) -> list[TopicPartition]:
    """Read added partitions too, from their beginning, and the others from where they are."""
    places = {tp: await consumer.position(tp) for tp in assigned}
    consumer.assign([*assigned, *added])
    for tp, offset in places.items():
        consumer.seek(tp, offset)
    log.info("partitions_added", partitions=[f"{tp.topic}-{tp.partition}" for tp in added])
    return [*assigned, *added]


async def read_span(live: LiveSettings, topic: str, partition: int, first: int, end: int | None) -> list[Change]:
    """Records of a changelog, read beside whoever follows it.

    Args:
        live: where Kafka is.
        topic: its full name.
        partition: of it.
        first: offset of the first record wanted.
        end: offset after the last one; None: all that there is now.

    Raises:
        Retry: Kafka does not answer in time.
    """
    kafka = live().kafka
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(kafka),
        group_id=None,
        auto_offset_reset="none",
        enable_auto_commit=False,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
    )
    changes: list[Change] = []
    tp = TopicPartition(topic, partition)
    try:
        async with asyncio.timeout(kafka.session_timeout_s):
            await consumer.start()
            consumer.assign([tp])
            ends, begins = await consumer.end_offsets([tp]), await consumer.beginning_offsets([tp])
            stop = ends[tp] if end is None else min(end, ends[tp])
            consumer.seek(tp, max(first, begins[tp]))
            while await consumer.position(tp) < stop:
                for records in (await consumer.getmany(tp, timeout_ms=POLL_MS)).values():
                    changes += [change_of(record) for record in records if record.offset < stop]
    except (KafkaError, TimeoutError) as e:
        message = f"the changelog {topic}-{partition} cannot be read: {e!r}"
        raise Retry(message) from e
    finally:
        await kafka_clients.stop(consumer)
    return changes


class Follower(Service):
    """Keeps something current from topics for as long as it runs; what keeps it from that is waited out.

    What was read stays meanwhile: whoever asks is told by `current` that it may be old.
    """

    abstract = True
    what = "topic"  #: that is kept current, for the log

    @property
    def current(self) -> bool:
        """Whether everything was read, and nothing stands in the way of what comes."""
        raise NotImplementedError

    async def read(self) -> None:
        """Follow until the service stops; see `follow` for what it raises."""
        raise NotImplementedError

    def hindered(self, why: str) -> None:
        """Told each time that it could not be read."""

    @Service.task
    async def _follow(self) -> None:
        pause_s = BACKOFF_FIRST_S
        said = False
        while not self.should_stop:
            try:
                await self.read()
            except Exception as e:
                if self.current:
                    pause_s, said = BACKOFF_FIRST_S, False
                if not said:
                    log.warning("not_followed", what=self.what, error=f"{type(e).__name__}: {e}")
                    said = True
                self.hindered(str(e) if isinstance(e, Retry) else f"Kafka: {reason(e)}")
                await self.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)
