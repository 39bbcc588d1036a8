"""Reading a topic for people: its records as lines, decoded, with instants that can be read.

A value of ours is newline-delimited JSON, so a record may be several messages; each becomes a line of its own. What is no
JSON is shown as text, or in base64. Instants stay as they are (µs since the epoch), with the same in ISO 8601 beside them.
"""

import asyncio
import base64
import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson

from preservarium.cli.instants import ISO, iso, with_iso
from preservarium.domain.readings.address import same_address
from preservarium.errors import PreservariumError, reason
from preservarium.settings import Settings
from preservarium.streaming import kafka_clients
from preservarium.topics import BY_NAME

#: Kafka must answer within this time.
ANSWER_S: Final = 30.0
#: One look for what is new.
POLL_MS: Final = 500
#: Records of one fetch: a topic may hold millions, and of most only the last are shown.
FETCH_RECORDS: Final = 2_000


class TopicsReadError(PreservariumError):
    """The topic cannot be read."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records are wanted."""

    partitions: Sequence[int] = ()  #: none: all
    key: str | None = None
    since_us: int | None = None  #: by the record's time
    until_us: int | None = None
    offset: int | None = None  #: of each partition; negative: counted from the end
    limit: int = 100  #: lines; the last ones, where nothing says where to begin
    follow: bool = False

    @property
    def from_start(self) -> bool:
        """Whether it is said where to begin: then the first lines are meant and not the last."""
        return self.since_us is not None or self.offset is not None


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """A message of a record."""

    at_us: int  #: the record's time; it orders the lines of several partitions
    partition: int
    offset: int
    index: int  #: within its record
    key: str | None
    value: Any  #: None: a tombstone, or text that is no JSON under `value_text` or `value_b64`
    kind: str = "value"  #: value, value_text, value_b64
    headers: tuple[tuple[str, str], ...] = ()

    def document(self, topic: str) -> dict[str, Any]:
        """For JSON."""
        document = {
            "topic": topic,
            "partition": self.partition,
            "offset": self.offset,
            "index": self.index,
            "time": self.at_us,
            f"time{ISO}": iso(self.at_us),
            "key": self.key,
            self.kind: with_iso(self.value) if self.kind == "value" else self.value,
        }
        return document | ({"headers": dict(self.headers)} if self.headers else {})

    def text(self) -> str:
        """For people: time, place, key, value."""
        value = orjson.dumps(with_iso(self.value)).decode() if self.kind == "value" else self.value
        where = f"{self.partition}:{self.offset}" + (f".{self.index}" if self.index else "")
        return f"{iso(self.at_us)}  {where}  {self.key or '-'}  {value}"


def lines_of(record: Any, partition: int) -> list[Line]:
    """The messages of a record."""

    def line(index: int, value: Any, kind: str = "value") -> Line:
        return Line(record.timestamp * 1_000, partition, record.offset, index, key, value, kind, headers)

    key = None if record.key is None else _text(record.key)
    headers = tuple((name, _text(value)) for name, value in record.headers)
    if record.value is None:
        return [line(0, None)]
    try:
        parts = [part for part in record.value.split(b"\n") if part.strip()]
        return [line(index, orjson.loads(part)) for index, part in enumerate(parts)] or [line(0, "", "value_text")]
    except orjson.JSONDecodeError:
        pass
    try:
        return [line(0, record.value.decode(), "value_text")]
    except UnicodeDecodeError:
        return [line(0, base64.b64encode(record.value).decode(), "value_b64")]


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "backslashreplace")


def full_name(name: str, settings: Settings) -> str:
    """The topic's name in the cluster: ours get the prefix, others are taken as they are given."""
    if name == "decoded_iot_data" and settings.normalize.decoded_topic:
        return settings.normalize.decoded_topic
    topic = BY_NAME.get(name)
    return topic.full(settings.kafka.topic_prefix) if topic is not None else name


async def read(settings: Settings, name: str, wanted: Wanted, take: Callable[[Line], None]) -> int:
    """Read a topic and give its lines to `take`; how many there were.

    Args:
        settings: where Kafka is.
        name: a declared topic, or any other of the cluster, by its full name.
        wanted: which records. With `follow` it goes on until it is cancelled.
        take: is given each line, in the order of time as far as it is known, and of each partition in order.

    Raises:
        TopicsReadError: the topic or a partition is not there, or Kafka does not answer.
    """
    from aiokafka.errors import KafkaError

    try:
        async with _reader(settings, full_name(name, settings), wanted) as (consumer, begin, ends):
            taken = 0
            # Where everything from a place on is wanted, nothing has to be put into order, or kept, before it is shown.
            for line in [] if wanted.follow and wanted.from_start else await _stored(consumer, begin, ends, wanted):
                take(line)
                taken += 1
            while wanted.follow:
                polled = await consumer.getmany(timeout_ms=POLL_MS)
                fresh = [line for tp, records in polled.items() for line in _matching(records, tp.partition, wanted)]
                for line in sorted(fresh):
                    take(line)
                    taken += 1
            return taken
    except (KafkaError, OSError) as e:
        message = f"{name} cannot be read from {settings.kafka.bootstrap_servers}: {reason(e)}"
        raise TopicsReadError(message) from e


@asynccontextmanager
async def _reader(
    settings: Settings, topic: str, wanted: Wanted
) -> AsyncIterator[tuple[Any, dict[Any, int], dict[Any, int]]]:
    """A consumer that stands where reading begins, these places, and the ends of the partitions."""
    from aiokafka import AIOKafkaConsumer, TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient

    admin = AIOKafkaAdminClient(**kafka_clients.connection(settings.kafka))
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(settings.kafka),
        group_id=None,
        enable_auto_commit=False,
        max_poll_records=FETCH_RECORDS,
        auto_offset_reset="none",
    )
    try:
        async with asyncio.timeout(ANSWER_S):
            await admin.start()
            there = sorted(await admin.list_topics())
            if topic not in there:
                ours = {each.full(settings.kafka.topic_prefix) for each in BY_NAME.values()}
                advice = "run `preservarium migrate`" if topic in ours else f"there are {', '.join(there)}"
                message = f"topic {topic} is not there: {advice}"
                raise TopicsReadError(message)
            (described,) = await admin.describe_topics([topic])
            all_of = sorted(p["partition"] for p in described["partitions"])
            if missing := sorted(set(wanted.partitions) - set(all_of)):
                message = f"{topic} has no partition {missing[0]}: it has {len(all_of)}, 0 to {all_of[-1]}"
                raise TopicsReadError(message)
            partitions = [TopicPartition(topic, p) for p in wanted.partitions or all_of]
            await consumer.start()
            consumer.assign(partitions)
            ends = await consumer.end_offsets(partitions)
            firsts = await consumer.beginning_offsets(partitions)
            begin = await _begin(consumer, wanted, firsts, ends)
            for tp, offset in begin.items():
                consumer.seek(tp, offset)
        yield consumer, begin, ends
    finally:
        await admin.close()
        await kafka_clients.stop(consumer)


async def _begin(consumer: Any, wanted: Wanted, firsts: dict[Any, int], ends: dict[Any, int]) -> dict[Any, int]:
    if wanted.since_us is not None:
        return await kafka_clients.offsets_since(consumer, dict.fromkeys(ends, max(0, wanted.since_us // 1000)))
    if wanted.offset is not None:
        places = {tp: wanted.offset if wanted.offset >= 0 else ends[tp] + wanted.offset for tp in ends}
    elif wanted.key is not None or wanted.until_us is not None:
        places = dict(firsts)  # where the last ones that match are is not known
    else:
        places = {tp: ends[tp] - wanted.limit for tp in ends}
    return {tp: min(max(place, firsts[tp]), ends[tp]) for tp, place in places.items()}


async def _stored(consumer: Any, begin: dict[Any, int], ends: dict[Any, int], wanted: Wanted) -> list[Line]:
    """What is wanted of what was there at the start: the first `limit` lines, or the last ones."""
    found: dict[Any, deque[Line]] = {}
    waiting = {tp for tp in ends if begin[tp] < ends[tp]}
    while waiting:
        async with asyncio.timeout(ANSWER_S):
            polled = await consumer.getmany(*waiting, timeout_ms=POLL_MS)
        for tp, records in polled.items():
            lines = found.setdefault(tp, deque(maxlen=None if wanted.from_start else wanted.limit))
            lines.extend(_matching([r for r in records if r.offset < ends[tp]], tp.partition, wanted))
            if wanted.from_start and len(lines) >= wanted.limit:
                waiting.discard(tp)
        for tp in [tp for tp in waiting if await consumer.position(tp) >= ends[tp]]:
            waiting.discard(tp)
    for tp, end in ends.items():
        consumer.seek(tp, end)
    merged = list(heapq.merge(*(sorted(lines) for lines in found.values())))
    return merged[: wanted.limit] if wanted.from_start else merged[-wanted.limit :]


def _matching(records: Sequence[Any], partition: int, wanted: Wanted) -> list[Line]:
    lines: list[Line] = []
    for record in records:
        at_us = record.timestamp * 1_000
        # To the ms: Kafka's times have no more.
        if wanted.since_us is not None and at_us < wanted.since_us // 1_000 * 1_000:
            continue
        if wanted.until_us is not None and at_us >= wanted.until_us:
            continue
        for line in lines_of(record, partition):
            if wanted.key is None or (line.key is not None and same_address(line.key, wanted.key)):
                lines.append(line)
    return lines
