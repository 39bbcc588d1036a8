"""What was refused, and bringing it in once its cause is mended: `iot_errors` as a dead letter queue.

A redrive goes to the stage that failed: the original bytes to `iot_raw_data` again, keyed by the device, with the header `attempt` one higher;
of what a sink of events refused, the event to its own topic again (`_STAGES`). What cannot be redriven at all is told as such. What a
stage behind normalize refused is read from `iot_raw_data` once more, for as long as that topic keeps it. Of a message of which only
parts were refused (a line, a record) these are sent, each in the envelope that it was in. The message has the instant of
receipt that it had: where it is in no envelope that says so, it is put into one.
For each it writes a marker to `iot_redriven`, keyed by the raw coordinates of the input, after Kafka has acknowledged
the bytes: a second redrive of the same selection sends nothing. A crash between the two repeats at most
one batch, which the stores' natural keys make harmless.

A discard writes the same marker with who and why, after an event of the stream `dlq/discards` says so: what is discarded is not redriven, and stays in
`iot_errors` for as long as that keeps it.
"""

import base64
import binascii
import hashlib
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from preservarium import topics
from preservarium.domain.readings import json_text
from preservarium.domain.readings.address import canonical_address, same_address
from preservarium.errors import PreservariumError, Reject, reason
from preservarium.settings import LiveSettings, Settings
from preservarium.stores import events
from preservarium.stores.migrate import connect_postgres
from preservarium.streaming import kafka_clients
from preservarium.streaming.publish import Publisher
from preservarium.streaming.records import (
    ATTEMPT_HEADER,
    FOREIGN_CONNECTOR,
    GENERATION_HEADER,
    RECEIVED_HEADER,
    is_envelope,
    original_line,
    parse_raw,
    payload_of,
    raw_line,
    received_ms,
)
from preservarium.streaming.stage import Send
from preservarium.topics import Topic

#: Inputs sent before their markers are: what a crash may repeat.
BATCH: Final = 500
#: A read that brings nothing for so long has failed.
SILENCE_MS: Final = 30_000


#: Topics of events that nobody reads but those who store them, each by an id of its own: an event that a store refused is sent there again,
#: and changes nothing where it stands already. Not iot_alerts, from which people are told.
_STORED_ONLY: Final = {
    topic.name: topic
    for topic in (
        topics.ANOMALIES, topics.AGGREGATES, topics.COMMAND_EVENTS, topics.NOTICE_RECEIPTS, topics.ALARM_ANSWERS,
        topics.TASK_EVENTS,
    )
}  # fmt: skip

#: The stream of what was discarded.
DISCARDS: Final = "dlq/discards"
#: Inputs of one discard: what a person can answer for, and some 50 MB of coordinates.
DISCARDED_MAX: Final = 100_000
#: Of a discard the first ids that its event names; a digest covers all.
NAMED_MAX: Final = 1_000
#: Bars of counts over time: more fit on no screen.
BUCKETS_MAX: Final = 400
#: Causes that are counted apart.
CAUSES_MAX: Final = 1_000


class DlqError(PreservariumError):
    """The dead letters cannot be read."""


class NoSuchError(DlqError):
    """There is no such error."""


#: Of an error's id: a partition (32 bits) and an offset (64 bits) have no more digits.
ID_LENGTH_MAX: Final = 10 + 1 + 19


@dataclass(frozen=True, slots=True)
class Letter:
    """An error line, and where it stands in `iot_errors`."""

    id: str  #: partition:offset
    line: dict[str, Any]

    @property
    def input(self) -> bytes | None:
        """The original bytes of an input of `iot_raw_data`, or a part of it in its envelope; None where they are not (wholly) kept."""
        line = self.line
        if self.event_topic is not None and not str(line.get("message", "")).endswith(" bytes kept]"):
            return _bytes_of(line)
        if line.get("topic") != topics.RAW.name or not line.get("device_id") or "raw_partition" not in line:
            return None
        if str(line.get("message", "")).endswith(" bytes kept]"):
            return None
        try:
            raw = str(line["raw"]).encode() if "raw" in line else base64.b64decode(line["raw_b64"], validate=True)
            return raw_line(line["device_id"], raw, **line["envelope"]) if "part" in line else raw
        except (KeyError, TypeError, binascii.Error, Reject):
            return None

    @property
    def event_topic(self) -> Topic | None:
        """The topic that an event which a store refused is sent to again; None where it is no such event."""
        return _STORED_ONLY.get(str(self.line.get("topic")))

    @property
    def coordinates(self) -> str:
        """What names its input: raw partition/offset/index, and where it is a part of a message the number of that.

        Of what is no raw message its topic comes first.
        """
        line = self.line
        if self.event_topic is not None:
            return "/".join(str(line.get(name, 0)) for name in ("topic", "partition", "offset", "index"))
        part = f"/{line['part']}" if "part" in line else ""
        return f"{line.get('raw_partition')}/{line.get('raw_offset')}/{line.get('raw_index', 0)}{part}"


@dataclass(frozen=True, slots=True)
class Select:
    """Which error lines."""

    codes: Collection[str] = ()  #: empty: all
    device: str | None = None
    since_us: int = 0  #: first seen then or later
    limit: int | None = None
    until_us: int | None = None  #: first seen then or earlier; None: whenever
    stages: Collection[str] = ()  #: refused by one of these; empty: by any
    parsers: Collection[str] = ()  #: of one of these parsers: name, or name@version; empty: of any, or of none
    ids: Collection[str] = ()  #: these, by partition:offset; empty: all
    open_only: bool = False  #: without what was redriven or discarded

    def takes(self, line: dict[str, Any]) -> bool:
        """Whether a line is one of them; ids and what became of it are not asked for."""
        if self.codes and line.get("code") not in self.codes:
            return False
        if self.stages and line.get("stage") not in self.stages:
            return False
        if self.parsers:
            parser = str(line.get("parser") or "")
            if parser not in self.parsers and parser.rpartition("@")[0] not in self.parsers:
                return False
        if self.device is not None and not same_address(str(line.get("device_id")), self.device):
            return False
        first_seen = line.get("first_seen", 0)
        return bool(first_seen >= self.since_us and (self.until_us is None or first_seen <= self.until_us))

    @property
    def narrows(self) -> bool:
        """Whether it leaves anything out."""
        whole = (self.codes, self.stages, self.parsers, self.ids, self.device, self.since_us, self.until_us)
        return any(whole)

    def document(self) -> dict[str, Any]:
        """What narrows it, as JSON."""
        found: dict[str, Any] = {
            "codes": sorted(self.codes), "stages": sorted(self.stages), "parsers": sorted(self.parsers), "device": self.device,
            "since": self.since_us or None, "until": self.until_us, "ids": len(self.ids) or None,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value}


@dataclass(slots=True)
class Redriven:
    """What a redrive did."""

    matched: int = 0
    sent: int = 0  #: or would be sent, in a dry run
    already: int = 0  #: redriven before, or discarded
    unusable: int = (
        0  #: the input is not to be had: too large for an error line, or past the retention of `iot_raw_data`
    )

    def document(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)


async def letters(settings: Settings, select: Select) -> AsyncGenerator[Letter, None]:
    """The error lines of a selection, partition by partition in their order, to the end that the topic has now.

    Raises:
        NoSuchError: an id is none.
        DlqError: Kafka cannot be reached, or has no such topic.
    """
    found = 0
    only = [_place(identity) for identity in select.ids] if select.ids else None
    settled = await marks(settings) if select.open_only else {}
    async with aclosing(_records(settings, topics.ERRORS, 0 if only else select.since_us, only=only)) as records:
        async for partition, record in records:
            try:
                line = orjson.loads(record.value or b"null")
            except orjson.JSONDecodeError:
                continue
            if isinstance(line, dict) and select.takes(line):
                each = Letter(f"{partition}:{record.offset}", line)
                if each.coordinates in settled:
                    continue
                yield each
                found += 1
                if select.limit is not None and found >= select.limit:
                    return


def _place(identity: str) -> tuple[int, int]:
    """Partition and offset of an id.

    Raises:
        NoSuchError: it is none.
    """
    partition_text, _, offset_text = identity.partition(":")
    if not (
        identity.isascii() and partition_text.isdigit() and offset_text.isdigit() and len(identity) <= ID_LENGTH_MAX
    ):
        message = f"{identity!r} is no id of an error: PARTITION:OFFSET, as `preservarium dlq list` prints"
        raise NoSuchError(message)
    return int(partition_text), int(offset_text)


#: What became of an input.
REDRIVEN: Final = "redriven"
DISCARDED: Final = "discarded"


async def marks(settings: Settings) -> dict[str, str]:
    """Coordinates of inputs that were redriven or discarded, and which of the two; the last word counts.

    Raises:
        DlqError: Kafka cannot be read.
    """
    found: dict[str, str] = {}
    async for _, record in _records(settings, topics.REDRIVEN, 0):
        try:
            outcome = orjson.loads(record.value or b"{}").get("outcome", REDRIVEN)
        except (orjson.JSONDecodeError, AttributeError):
            outcome = REDRIVEN
        found[(record.key or b"").decode(errors="replace")] = outcome
    return found


async def letter(settings: Settings, identity: str) -> Letter:
    """One error line by its id.

    Raises:
        NoSuchError: there is none.
        DlqError: Kafka cannot be read.
    """
    wanted = _place(identity)
    async with aclosing(_records(settings, topics.ERRORS, 0, only=[wanted])) as records:
        async for partition, record in records:
            if (partition, record.offset) == wanted:
                line = orjson.loads(record.value or b"null")
                if isinstance(line, dict):
                    return Letter(identity, line)
    message = f"there is no error {identity}"
    raise NoSuchError(message)


async def original(settings: Settings, found: Letter) -> bytes | None:
    """The original bytes of an error's input: of the line, else out of `iot_raw_data`; None where they are not to be had.

    Raises:
        DlqError: Kafka cannot be read.
    """
    return (await _inputs(settings, [found])).get(found.id)


async def redrive(
    settings: Settings,
    select: Select,
    *,
    now_us: int,
    dry_run: bool = False,
    discarded: bool = False,
    progress: Callable[[Redriven], None] | None = None,
) -> Redriven:
    """Send the inputs of a selection again to the stage that failed, each once, however often this is called.

    Args:
        settings: where Kafka is.
        select: which; its limit counts what is sent.
        now_us: for the markers, µs.
        dry_run: only count.
        discarded: what was discarded, too, once more.
        progress: called after each batch.

    Raises:
        DlqError: Kafka cannot be read.
        Retry: Kafka does not take the records; what was acknowledged is marked.
    """
    done = Redriven()
    publisher = Publisher(LiveSettings(settings))
    try:
        await publisher.ensure_topic(topics.REDRIVEN.full(settings.kafka.topic_prefix))
        known = await marks(settings)
        waiting: list[Letter] = []

        async def flush() -> None:
            inputs = await _inputs(settings, waiting)
            found = [(each, _again(each, inputs[each.id])) for each in waiting if each.id in inputs]
            if found and not dry_run:
                await publisher.publish([send for _, send in found])
                await publisher.publish([_marker(each, now_us) for each, _ in found])
            done.sent += len(found)
            done.unusable += len(waiting) - len(found)
            waiting.clear()
            if progress is not None:
                progress(done)

        everything = replace(select, limit=None, open_only=False)
        async with aclosing(letters(settings, everything)) as selected:
            async for each in selected:
                done.matched += 1
                outcome = known.get(each.coordinates)
                if outcome == REDRIVEN or (outcome == DISCARDED and not discarded):
                    done.already += 1
                    continue
                known[each.coordinates] = REDRIVEN
                waiting.append(each)
                if len(waiting) >= BATCH:
                    await flush()
                if select.limit is not None and done.sent + len(waiting) >= select.limit:
                    break
        await flush()
        return done
    finally:
        await publisher.on_stop()


@dataclass(slots=True)
class Discarded:
    """What a discard did."""

    matched: int = 0
    discarded: int = 0  #: or would be, in a dry run
    already: int = 0  #: redriven or discarded before
    version: int | None = None  #: of the event that says so

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


async def discard(
    settings: Settings, select: Select, *, actor: str, cause: str, now_us: int, dry_run: bool = False
) -> Discarded:
    """Say of the inputs of a selection that nothing more is to be done about them.

    First an event of the stream `dlq/discards` says who, why and which; then each is marked. A crash between the two leaves some
    unmarked, and the same discard again marks those, with an event of its own.

    Args:
        settings: where Kafka and PostgreSQL are.
        select: which; it must narrow.
        actor: who.
        cause: why, for people.
        now_us: when, µs.
        dry_run: only count.

    Raises:
        DlqError: Kafka cannot be read; the selection is everything, or too much; no reason is given.
        MigrationError: PostgreSQL cannot be reached: nothing was discarded.
        Retry: Kafka does not take the marks.
    """
    if not select.narrows:
        message = "a discard of everything is refused: say which by a code, a stage, a parser, a device or a time"
        raise DlqError(message)
    if not cause.strip() and not dry_run:
        message = "a discard needs a reason: it goes into the event store"
        raise DlqError(message)
    done = Discarded()
    publisher = Publisher(LiveSettings(settings))
    try:
        await publisher.ensure_topic(topics.REDRIVEN.full(settings.kafka.topic_prefix))
        known = await marks(settings)
        chosen: dict[str, Letter] = {}
        async with aclosing(letters(settings, replace(select, limit=None, open_only=False))) as selected:
            async for each in selected:
                done.matched += 1
                if each.coordinates in known or each.coordinates in chosen:
                    done.already += 1
                    continue
                if len(chosen) >= min(select.limit or DISCARDED_MAX, DISCARDED_MAX):
                    if select.limit is not None and select.limit <= DISCARDED_MAX:
                        break
                    message = f"more than {DISCARDED_MAX} at once: narrow the selection, or give a limit"
                    raise DlqError(message)
                # The bytes are not needed any more.
                chosen[each.coordinates] = Letter(
                    each.id, {name: each.line.get(name) for name in ("code", "device_id")}
                )
        done.discarded = len(chosen)
        if chosen and not dry_run:
            done.version = await _tell(settings, select, chosen, actor, cause.strip(), now_us)
            why = {"outcome": DISCARDED, "actor": actor, "reason": cause.strip()}
            marked = [_marker(each, now_us, coordinates, **why) for coordinates, each in chosen.items()]
            for start in range(0, len(marked), BATCH):
                await publisher.publish(marked[start : start + BATCH])
        return done
    finally:
        await publisher.on_stop()


async def _tell(
    settings: Settings, select: Select, chosen: dict[str, Letter], actor: str, cause: str, now_us: int
) -> int:
    digest = hashlib.sha256("\n".join(sorted(chosen)).encode()).hexdigest()
    ids = [each.id for each in chosen.values()]
    data = {
        "reason": cause,
        "selection": select.document(),
        "count": len(chosen),
        "ids": ids[:NAMED_MAX],
        "coordinates_sha256": digest,
    }
    connection = await connect_postgres(settings, what="a discard")
    try:
        async with connection.transaction():
            version = (await events.heads(connection, [DISCARDS])).get(DISCARDS, (0, b""))[0]
            new = events.NewEvent(DISCARDS, version, "discarded", data)
            return (await events.append(connection, [new], actor=actor, at_us=now_us))[DISCARDS]
    finally:
        await connection.close(timeout=5)


@dataclass(slots=True)
class Cause:
    """How often something was refused, and when."""

    stage: str
    code: str
    parser: str  #: "" where it is not told apart, or none is known
    total: int = 0
    redriven: int = 0
    discarded: int = 0
    first_us: int = 0
    last_us: int = 0
    counts: list[int] = field(default_factory=list)  #: by bucket, the oldest first


@dataclass(slots=True)
class Counts:
    """Refusals by cause over time."""

    from_us: int
    bucket_us: int
    buckets: int
    causes: list[Cause]  #: those with most first
    complete: bool  #: False: there were more than `CAUSES_MAX` causes, and those that came last are in none


async def counts(settings: Settings, select: Select, *, now_us: int, bucket_s: int, by_parser: bool = False) -> Counts:
    """Count the refusals of a selection by stage, code and, if that is wanted, the parser's version, over time.

    Args:
        settings: where Kafka is.
        select: which; from `since_us` on, which is needed, to `until_us` or now.
        now_us: the clock, µs.
        bucket_s: the width of a bar, in seconds.
        by_parser: tell versions of parsers apart.

    Raises:
        DlqError: Kafka cannot be read; more than `BUCKETS_MAX` buckets.
    """
    end = now_us if select.until_us is None else select.until_us
    width = bucket_s * 1_000_000
    first = select.since_us // width
    buckets = max(1, end // width - first + 1)
    if buckets > BUCKETS_MAX:
        message = f"{buckets} bars of {bucket_s} s: at most {BUCKETS_MAX}; begin later, or make them wider"
        raise DlqError(message)
    known = await marks(settings)
    causes: dict[tuple[str, str, str], Cause] = {}
    complete = True
    async with aclosing(letters(settings, replace(select, limit=None, open_only=False))) as selected:
        async for each in selected:
            line, outcome = each.line, known.get(each.coordinates)
            if select.open_only and outcome is not None:
                continue
            at = int(line.get("first_seen", 0))
            key = str(line.get("stage")), str(line.get("code")), str(line.get("parser") or "") if by_parser else ""
            cause = causes.get(key)
            if cause is None:
                if len(causes) >= CAUSES_MAX:
                    complete = False
                    continue
                cause = causes[key] = Cause(*key, first_us=at, counts=[0] * buckets)
            cause.total += 1
            cause.redriven += outcome == REDRIVEN
            cause.discarded += outcome == DISCARDED
            cause.first_us, cause.last_us = min(cause.first_us, at), max(cause.last_us, at)
            # What has the time of a clock that is ahead is counted at the end.
            cause.counts[min(buckets - 1, max(0, at // width - first))] += 1
    ordered = sorted(causes.values(), key=lambda each: (-each.total, each.stage, each.code, each.parser))
    return Counts(first * width, width, buckets, ordered, complete)


def _bytes_of(line: dict[str, Any]) -> bytes | None:
    try:
        return str(line["raw"]).encode() if "raw" in line else base64.b64decode(line["raw_b64"], validate=True)
    except (KeyError, TypeError, binascii.Error):
        return None


def _again(each: Letter, original: bytes) -> Send:
    """What is sent: a raw message, or an event to where it was."""
    topic = each.event_topic
    if topic is None:
        return _raw(each, original)
    line = each.line
    attempt = b"%d" % (int(line.get("attempt", 1)) + 1)
    # Its key is a device's address, or what else the topic goes by: it is the record's, as it was.
    key = str(line["device_id"]).encode() if line.get("device_id") else None
    return Send(topic, key, original, int(line["partition"]), headers=((ATTEMPT_HEADER, attempt),))


#: Of one ms, the µs from which messages that came in no envelope are put: those before are for what came live.
_REDRIVEN_US: Final = 500


async def _inputs(settings: Settings, waiting: Sequence[Letter]) -> dict[str, bytes]:
    """The original bytes by the id of the letter; those that are not in the line are looked for in `iot_raw_data`."""
    found: dict[str, bytes] = {}
    wanted: dict[tuple[int, int], list[Letter]] = {}
    for each in waiting:
        if each.input is not None:
            found[each.id] = each.input
        elif (
            each.event_topic is None
            and isinstance(each.line.get("raw_partition"), int)
            and isinstance(each.line.get("raw_offset"), int)
        ):
            wanted.setdefault((each.line["raw_partition"], each.line["raw_offset"]), []).append(each)
    payload_bytes_max = settings.normalize.payload_bytes_max
    async for partition, record in _records(settings, topics.RAW, 0, only=list(wanted)):
        messages, errors = parse_raw(record, topics.RAW.name, partition, payload_bytes_max=payload_bytes_max)
        alone = len(messages) + len(errors) == 1
        lines = {message["raw_index"]: message for message in messages}
        for each in wanted[partition, record.offset]:
            index = each.line.get("raw_index", 0)
            if index in lines:
                found[each.id] = original_line(record.value, index, alone=alone)
                each.line["received_at"] = received_ms(record) * 1_000
                each.line["device_id"] = lines[index]["device"]
    return found


def _raw(each: Letter, original: bytes) -> Send:
    line = each.line
    headers: tuple[tuple[str, bytes], ...] = ((ATTEMPT_HEADER, b"%d" % (int(line.get("attempt", 1)) + 1)),)
    if line.get("generation"):
        headers += ((GENERATION_HEADER, b"%d" % int(line["generation"])),)
    # What is in no envelope was received when Kafka took it, and that must stay.
    received_at = int(line.get("received_at") or line.get("first_seen", 0))
    if received_at > 0:
        headers += ((RECEIVED_HEADER, b"%d" % (received_at // 1_000)),)
    return Send(
        topics.RAW,
        canonical_address(str(line["device_id"])).encode(),
        _stamped(original, line, received_at),
        headers=headers,
    )


def _stamped(original: bytes, line: dict[str, Any], received_at: int) -> bytes:
    """An input that says nothing of its receipt in an envelope that does: within its ms, by its coordinates.

    So it has an instant that no other message has, the same at each try.
    """
    if str(line.get("code", "")).startswith("envelope_"):
        return original  # whatever it is, it is no message
    place = _REDRIVEN_US + (int(line["raw_offset"]) + int(line.get("raw_index", 0))) % _REDRIVEN_US
    fields: dict[str, Any] = {"received_at": received_at // 1_000 * 1_000 + place}
    parsed = payload_of(original)
    # Byte by byte: what a parser makes of a number is not what the device wrote. What stands around JSON does not go into it.
    inner = json_text.bare(original).strip()
    if is_envelope(parsed):
        if "received_at" in parsed:
            return original
        return orjson.dumps(fields)[:-1] + b"," + inner[1:]
    fields |= {"device": line["device_id"], "connector": FOREIGN_CONNECTOR}
    if isinstance(parsed, bytes):
        return orjson.dumps({**fields, "payload_b64": base64.b64encode(parsed).decode()})
    return orjson.dumps(fields)[:-1] + b',"payload":' + inner + b"}"


def _marker(each: Letter, now_us: int, coordinates: str = "", **more: str) -> Send:
    value = {
        "error": each.id,
        "code": each.line.get("code"),
        "device_id": each.line.get("device_id"),
        "at": now_us,
        **more,
    }
    return Send(topics.REDRIVEN, (coordinates or each.coordinates).encode(), orjson.dumps(value))


async def _records(
    settings: Settings, topic: Topic, since_us: int, *, only: Sequence[tuple[int, int]] | None = None
) -> AsyncGenerator[tuple[int, Any], None]:
    """(partition, record) of a topic, to the end that it has now; without a group, so that nothing is committed."""
    name = topic.full(settings.kafka.topic_prefix)
    try:
        numbers = await _partitions(settings, name)
    except KafkaError as e:
        message = f"Kafka cannot be reached: {reason(e)}"
        raise DlqError(message) from None
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(settings.kafka),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 << 20,
    )
    try:
        await consumer.start()
    except KafkaError as e:
        await kafka_clients.stop(consumer)
        message = f"Kafka cannot be reached: {reason(e)}"
        raise DlqError(message) from None
    try:
        partitions = [TopicPartition(name, p) for p in numbers]
        if only is not None:
            partitions = [tp for tp in partitions if any(p == tp.partition for p, _ in only)]
        if not partitions:
            return
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions)
        if since_us:
            times_ms = dict.fromkeys(partitions, max(0, since_us // 1_000))
            starts = await kafka_clients.offsets_since(consumer, times_ms)
        for tp in partitions:
            spans = [(starts[tp], ends[tp])]
            if only is not None:
                offsets = sorted({offset for partition, offset in only if partition == tp.partition})
                spans = [(max(offset, starts[tp]), min(offset + 1, ends[tp])) for offset in offsets]
            for start, end in spans:
                if start >= end:
                    continue
                consumer.assign([tp])
                consumer.seek(tp, start)
                while await consumer.position(tp) < end:
                    got = await consumer.getmany(tp, timeout_ms=SILENCE_MS, max_records=2_000 if only is None else 1)
                    if not got and await consumer.position(tp) < end:
                        message = f"Kafka is silent: {name}[{tp.partition}] was not read to its end"
                        raise DlqError(message)
                    for record in got.get(tp, ()):
                        if record.offset < end:
                            yield tp.partition, record
    except KafkaError as e:
        message = f"{name} cannot be read: {reason(e)}"
        raise DlqError(message) from None
    finally:
        await kafka_clients.stop(consumer)


async def _partitions(settings: Settings, name: str) -> list[int]:
    """Partitions of a topic; none where it does not exist."""
    admin = AIOKafkaAdminClient(**kafka_clients.connection(settings.kafka))
    try:
        await admin.start()
        (found,) = await admin.describe_topics([name])
        return sorted(p["partition"] for p in found["partitions"])
    finally:
        await admin.close()
