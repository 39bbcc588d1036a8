"""Looking into topics, a page at a time: the newest records first, or from a place on; and what comes, as it comes.

Nothing is committed and no group is joined. Of a page as many records are read as it shows, of each partition; only where a key or a
text is looked for, more are read through, up to a limit, and the page says how many.
"""

import asyncio
import base64
import heapq
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from preservarium import topics
from preservarium.domain.readings.address import same_address
from preservarium.errors import PreservariumError, Retry, reason
from preservarium.operations.raw_records import Records, RecordsError
from preservarium.settings import Settings
from preservarium.streaming import kafka_clients
from preservarium.topics import BY_NAME, STATE_TABLES, changelog

#: Records that one page reads through where something is looked for: some hundred MB at most, and a second or two.
SCAN_MAX: Final = 20_000
#: Bytes of one value that are shown; of a record of many lines the first ones.
VALUE_BYTES_MAX: Final = 16_384
#: Lines of one record that are shown: a file may pack thousands into one.
LINES_MAX: Final = 20
#: One look for what is new.
POLL_MS: Final = 500
#: Records of one look that are shown: a topic may bring thousands a second, and people read ten.
LIVE_MAX: Final = 100


class TopicUnknown(PreservariumError):
    """There is no such topic, or not such a partition of it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records of a topic."""

    partition: int | None = None  #: None: all
    key: str = ""  #: a device's address in any spelling, or any key; "" for all
    text: str = ""  #: within the value, as it is written; "" for all
    from_us: int | None = None  #: from this time on, by the record's own; None: the newest first
    offset: int | None = None  #: from this offset on
    limit: int = 50

    @property
    def onward(self) -> bool:
        """Whether a page goes on in time, and not back."""
        return self.from_us is not None or self.offset is not None

    def takes(self, record: Any) -> bool:
        """Whether a record is one of them."""
        if self.key and not same_address((record.key or b"").decode(errors="replace"), self.key):
            return False
        return not self.text or self.text.encode() in (record.value or b"")


def names(settings: Settings) -> dict[str, tuple[str, str, str]]:
    """Every topic of ours: name -> (full name, what the key is, what a value is)."""
    prefix, group = settings.kafka.topic_prefix, settings.kafka.group
    found = {t.name: (t.full(prefix), t.key, t.record) for t in BY_NAME.values()}
    if settings.normalize.decoded_topic:
        found[topics.DECODED.name] = (settings.normalize.decoded_topic, topics.DECODED.key, topics.DECODED.record)
    for table in STATE_TABLES:
        name = changelog(table, group)
        found[name] = (name, "key of the table", f"value of the table {table}, and its fences")
    return found


def full_name(settings: Settings, name: str) -> str:
    """The name of one of our topics in the cluster.

    Raises:
        TopicUnknown: it is none of ours.
    """
    known = names(settings)
    if name not in known:
        message = f"there is no topic {name!r} of ours"
        raise TopicUnknown(message)
    return known[name][0]


async def listed(settings: Settings) -> list[dict[str, Any]]:
    """Our topics with what Kafka holds of them: partitions, and offsets from the first to the last.

    Raises:
        Retry: Kafka does not answer.
    """
    found: list[dict[str, Any]] = []
    try:
        async with Records(settings) as records:
            for name, (full, key, record) in names(settings).items():
                partitions = sorted(await records.partitions(full))
                found.append(
                    {"name": name, "full_name": full, "key": key, "record": record, "partitions": len(partitions)}
                )
            spans = await _spans(records, [(each["full_name"], p) for each in found for p in range(each["partitions"])])
    except RecordsError as e:
        raise Retry(str(e)) from None
    for each in found:
        held = [spans.get((each["full_name"], p), (0, 0)) for p in range(each["partitions"])]
        each["records"] = sum(end - begin for begin, end in held)
        each["spans"] = [{"partition": p, "begin": begin, "end": end} for p, (begin, end) in enumerate(held)]
    return found


async def _spans(records: Records, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], tuple[int, int]]:
    tps = [TopicPartition(topic, partition) for topic, partition in wanted]
    if not tps:
        return {}
    begins, ends = await records.bounds(tps)
    return {(tp.topic, tp.partition): (begins[tp], ends[tp]) for tp in tps}


@dataclass(frozen=True, slots=True)
class Page:
    """Records of one page."""

    records: list[dict[str, Any]]  #: the newest first, or going on where that is wanted
    next: dict[int, int] | None  #: where each partition goes on; None: nothing is left (now)
    scanned: int  #: records that were read through
    partitions: int


async def page(settings: Settings, name: str, wanted: Wanted, at: Mapping[int, int] | None = None) -> Page:
    """A page of a topic.

    Args:
        settings: where Kafka is.
        name: of one of our topics.
        wanted: which records.
        at: `next` of the page before.

    Raises:
        TopicUnknown: there is no such topic or partition.
        Retry: Kafka does not answer.
    """
    full = full_name(settings, name)
    try:
        async with Records(settings) as records:
            there = sorted(await records.partitions(full))
            if not there:
                message = f"topic {full} is not there: run `preservarium migrate`"
                raise TopicUnknown(message)
            if wanted.partition is not None and wanted.partition not in there:
                message = f"{name} has no partition {wanted.partition}: it has {len(there)}, from 0 on"
                raise TopicUnknown(message)
            chosen = there if wanted.partition is None else [wanted.partition]
            read = _onward if wanted.onward else _back
            return await read(records, full, chosen, wanted, at)
    except RecordsError as e:
        raise Retry(str(e)) from None


async def _back(
    records: Records, full: str, chosen: Sequence[int], wanted: Wanted, at: Mapping[int, int] | None
) -> Page:
    """The newest records before the places of `at`."""
    spans = await _spans(records, [(full, p) for p in chosen])
    before = {p: min(spans[full, p][1], (at or {}).get(p, 1 << 62)) for p in chosen}
    found: list[Any] = []
    scanned = 0
    looking = bool(wanted.key or wanted.text)
    #: how far back each partition was read
    read_to = dict(before)
    share = max(1, SCAN_MAX // len(chosen)) if looking else wanted.limit
    for p in chosen:
        mine: list[Any] = []
        stop = max(spans[full, p][0], before[p] - share)
        at_offset = before[p]
        while at_offset > stop and len(mine) < wanted.limit:
            begin = max(stop, at_offset - max(500 if looking else wanted.limit, 1))
            piece: list[Any] = []
            async for some in records.between(full, p, begin, at_offset):
                piece += some
            scanned += len(piece)
            mine = [record for record in piece if wanted.takes(record)] + mine
            at_offset = begin
        read_to[p] = at_offset
        found += mine
    found.sort(key=lambda r: (r.timestamp, r.partition, r.offset), reverse=True)
    shown = found[: wanted.limit]
    following: dict[int, int] = {}
    for p in chosen:
        left = [r.offset for r in found[wanted.limit :] if r.partition == p]
        # What was read and has no place on this page is read again for the next.
        following[p] = max(left) + 1 if left else read_to[p]
    more = any(following[p] > spans[full, p][0] for p in chosen)
    return Page([line_of(r) for r in shown], following if more else None, scanned, len(chosen))


async def _onward(
    records: Records, full: str, chosen: Sequence[int], wanted: Wanted, at: Mapping[int, int] | None
) -> Page:
    """The first records from the places on."""
    spans = await _spans(records, [(full, p) for p in chosen])
    if at:
        start = {p: at.get(p, spans[full, p][1]) for p in chosen}
    elif wanted.from_us is not None:
        start = await records.since(full, chosen, wanted.from_us)
    else:
        start = dict.fromkeys(chosen, wanted.offset or 0)
    start = {p: min(max(start[p], spans[full, p][0]), spans[full, p][1]) for p in chosen}
    looking = bool(wanted.key or wanted.text)
    share = max(1, SCAN_MAX // len(chosen)) if looking else wanted.limit
    scanned = 0
    found: list[Any] = []
    read_to = dict(start)
    for p in chosen:
        mine: list[Any] = []
        end = min(spans[full, p][1], start[p] + share)
        while read_to[p] < end and len(mine) < wanted.limit:
            stop = min(end, read_to[p] + max(500 if looking else wanted.limit, 1))
            async for some in records.between(full, p, read_to[p], stop):
                scanned += len(some)
                mine += [record for record in some if wanted.takes(record)]
            read_to[p] = stop
        found += mine
    shown = heapq.nsmallest(wanted.limit, found, key=lambda r: (r.timestamp, r.partition, r.offset))
    taken = {(r.partition, r.offset) for r in shown}
    following: dict[int, int] = {}
    for p in chosen:
        left = [r.offset for r in found if r.partition == p and (p, r.offset) not in taken]
        following[p] = min(left) if left else read_to[p]
    more = any(following[p] < spans[full, p][1] for p in chosen)
    return Page([line_of(r) for r in shown], following if more else None, scanned, len(chosen))


async def live(settings: Settings, name: str, wanted: Wanted) -> AsyncIterator[dict[str, Any]]:
    """What comes into a topic from now on: `{records, left_out}` each half second, also where nothing came. Ends with its caller.

    Raises:
        TopicUnknown: there is no such topic or partition.
        Retry: Kafka does not answer.
    """
    full = full_name(settings, name)
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(settings.kafka), group_id=None, enable_auto_commit=False, auto_offset_reset="latest"
    )
    try:
        async with Records(settings) as records:
            there = sorted(await records.partitions(full))
        chosen = there if wanted.partition is None else [p for p in there if p == wanted.partition]
        if not chosen:
            message = f"topic {full} is not there, or has no such partition"
            raise TopicUnknown(message)
        tps = [TopicPartition(full, p) for p in chosen]
        await consumer.start()
        consumer.assign(tps)
        # From now on, and not from when the first look is made.
        for tp, end in (await consumer.end_offsets(tps)).items():
            consumer.seek(tp, end)
        yield {"records": [], "left_out": 0}
        while True:
            polled = await consumer.getmany(timeout_ms=POLL_MS, max_records=2_000)
            came = sorted(
                (r for some in polled.values() for r in some if wanted.takes(r)),
                key=lambda r: (r.timestamp, r.partition, r.offset),
            )
            yield {
                "records": [line_of(r) for r in came[-LIVE_MAX:]],
                "left_out": max(0, len(came) - LIVE_MAX),
            }
            if len(came) > LIVE_MAX:
                # A topic that brings thousands a second would take a core; people see a sample.
                await asyncio.sleep(POLL_MS / 1_000)
    except RecordsError as e:
        raise Retry(str(e)) from None
    except (KafkaError, OSError) as e:
        message = f"Kafka: {reason(e)}"
        raise Retry(message) from e
    finally:
        await kafka_clients.stop(consumer, 5.0)


def line_of(record: Any) -> dict[str, Any]:
    """A record as JSON: where it stands, its key and headers, and its value as lines of JSON, as text, or in base64."""
    value = record.value
    shown: dict[str, Any] = {
        "partition": record.partition,
        "offset": record.offset,
        "at": record.timestamp * 1_000,
        "key": None if record.key is None else record.key.decode("utf-8", "backslashreplace"),
        "headers": {name: (data or b"").decode("utf-8", "backslashreplace") for name, data in record.headers},
        "bytes": None if value is None else len(value),
        "cut": False,
    }
    if value is None:
        return shown | {"kind": "tombstone", "value": None}
    cut = value[:VALUE_BYTES_MAX]
    parts = [part for part in value.split(b"\n", LINES_MAX) if part.strip()]
    if parts and all(len(part) <= VALUE_BYTES_MAX for part in parts[:LINES_MAX]):
        try:
            lines = [orjson.loads(part) for part in parts[:LINES_MAX]]
            return shown | {"kind": "lines", "value": lines, "cut": len(parts) > LINES_MAX}
        except orjson.JSONDecodeError:
            pass
    try:
        text = value.decode() if len(value) <= VALUE_BYTES_MAX else cut.decode("utf-8", "ignore")
        return shown | {"kind": "text", "value": text, "cut": len(cut) < len(value)}
    except UnicodeDecodeError:
        return shown | {"kind": "base64", "value": base64.b64encode(cut).decode(), "cut": len(cut) < len(value)}
