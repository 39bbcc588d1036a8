"""What was refused, and bringing it in once its cause is mended: `iot_errors` as a dead letter queue.

A redrive sends the original bytes to `iot_raw_data` again, keyed by the device, with the header `attempt` one higher. What a
stage behind normalize refused is read from `iot_raw_data` once more, for as long as that topic keeps it. Of a message of which only
parts were refused (a line, a record) these are sent, each in the envelope that it was in. The message has the instant of
receipt that it had: where it is in no envelope that says so, it is put into one.
For each it writes a marker to `iot_redriven`, keyed by the raw coordinates of the input, after Kafka has acknowledged
the bytes: a second redrive of the same selection sends nothing. A crash between the two repeats at most
one batch, which the stores' natural keys make harmless.
"""

import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
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
    def coordinates(self) -> str:
        """What names its input: raw partition/offset/index, and where it is a part of a message the number of that."""
        line = self.line
        part = f"/{line['part']}" if "part" in line else ""
        return f"{line.get('raw_partition')}/{line.get('raw_offset')}/{line.get('raw_index', 0)}{part}"


@dataclass(frozen=True, slots=True)
class Select:
    """Which error lines."""

    codes: Collection[str] = ()  #: empty: all
    device: str | None = None
    since_us: int = 0  #: first seen then or later
    limit: int | None = None

    def takes(self, line: dict[str, Any]) -> bool:
        """Whether a line is one of them."""
        if self.codes and line.get("code") not in self.codes:
            return False
        if self.device is not None and not same_address(str(line.get("device_id")), self.device):
            return False
        return bool(line.get("first_seen", 0) >= self.since_us)


@dataclass(slots=True)
class Redriven:
    """What a redrive did."""

    matched: int = 0
    sent: int = 0  #: or would be sent, in a dry run
    already: int = 0  #: redriven before
    unusable: int = (
        0  #: the input is not to be had: too large for an error line, or past the retention of `iot_raw_data`
    )

    def document(self) -> dict[str, int]:
        """As JSON."""
        return asdict(self)


async def letters(settings: Settings, select: Select) -> AsyncGenerator[Letter, None]:
    """The error lines of a selection, partition by partition in their order, to the end that the topic has now.

    Raises:
        DlqError: Kafka cannot be reached, or has no such topic.
    """
    found = 0
    async with aclosing(_records(settings, topics.ERRORS, select.since_us)) as records:
        async for partition, record in records:
            try:
                line = orjson.loads(record.value or b"null")
            except orjson.JSONDecodeError:
                continue
            if isinstance(line, dict) and select.takes(line):
                yield Letter(f"{partition}:{record.offset}", line)
                found += 1
                if select.limit is not None and found >= select.limit:
                    return


async def letter(settings: Settings, identity: str) -> Letter:
    """One error line by its id.

    Raises:
        NoSuchError: there is none.
        DlqError: Kafka cannot be read.
    """
    partition_text, _, offset_text = identity.partition(":")
    if not (
        identity.isascii() and partition_text.isdigit() and offset_text.isdigit() and len(identity) <= ID_LENGTH_MAX
    ):
        message = f"{identity!r} is no id of an error: PARTITION:OFFSET, as `preservarium dlq list` prints"
        raise NoSuchError(message)
    wanted = (int(partition_text), int(offset_text))
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
    progress: Callable[[Redriven], None] | None = None,
) -> Redriven:
    """Send the inputs of a selection again, each once, however often this is called.

    Args:
        settings: where Kafka is.
        select: which; its limit counts what is sent.
        now_us: for the markers, µs.
        dry_run: only count.
        progress: called after each batch.

    Raises:
        DlqError: Kafka cannot be read.
        Retry: Kafka does not take the records; what was acknowledged is marked.
    """
    done = Redriven()
    known: set[str] = set()
    publisher = Publisher(LiveSettings(settings))
    try:
        await publisher.ensure_topic(topics.REDRIVEN.full(settings.kafka.topic_prefix))
        async for _, record in _records(settings, topics.REDRIVEN, 0):
            known.add((record.key or b"").decode(errors="replace"))
        waiting: list[Letter] = []

        async def flush() -> None:
            inputs = await _inputs(settings, waiting)
            found = [(each, _raw(each, inputs[each.id])) for each in waiting if each.id in inputs]
            if found and not dry_run:
                await publisher.publish([send for _, send in found])
                await publisher.publish([_marker(each, now_us) for each, _ in found])
            done.sent += len(found)
            done.unusable += len(waiting) - len(found)
            waiting.clear()
            if progress is not None:
                progress(done)

        everything = Select(select.codes, select.device, select.since_us)
        async with aclosing(letters(settings, everything)) as selected:
            async for each in selected:
                done.matched += 1
                if each.coordinates in known:
                    done.already += 1
                    continue
                known.add(each.coordinates)
                waiting.append(each)
                if len(waiting) >= BATCH:
                    await flush()
                if select.limit is not None and done.sent + len(waiting) >= select.limit:
                    break
        await flush()
        return done
    finally:
        await publisher.on_stop()


#: Of one ms, the µs from which messages that came in no envelope are put: those before are for what came live.
_REDRIVEN_US: Final = 500


async def _inputs(settings: Settings, waiting: Sequence[Letter]) -> dict[str, bytes]:
    """The original bytes by the id of the letter; those that are not in the line are looked for in `iot_raw_data`."""
    found: dict[str, bytes] = {}
    wanted: dict[tuple[int, int], list[Letter]] = {}
    for each in waiting:
        if each.input is not None:
            found[each.id] = each.input
        elif isinstance(each.line.get("raw_partition"), int) and isinstance(each.line.get("raw_offset"), int):
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


def _marker(each: Letter, now_us: int) -> Send:
    value = {"error": each.id, "code": each.line.get("code"), "device_id": each.line.get("device_id"), "at": now_us}
    return Send(topics.REDRIVEN, each.coordinates.encode(), orjson.dumps(value))


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
