"""What was refused, and bringing it in once its cause is mended: `iot_errors` as a dead letter queue.

A redrive sends the original bytes to `iot_raw_data` again, keyed by the device, with the header `attempt` one higher.
For each it writes a marker to `iot_redriven`, keyed by the raw coordinates of the input, after Kafka has acknowledged
the bytes: a second redrive of the same selection sends nothing. A crash between the two repeats at most
one batch, which the stores' natural keys make harmless.
"""

import base64
import binascii
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, Final

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from preservarium import kafka_clients, topics
from preservarium.domain.errors import PreservariumError
from preservarium.publish import Publisher
from preservarium.records import ATTEMPT_HEADER, GENERATION_HEADER
from preservarium.settings import LiveSettings, Settings
from preservarium.stage import Send
from preservarium.topics import Topic

#: Inputs sent before their markers are: what a crash may repeat.
BATCH: Final = 500
#: A read that brings nothing for so long has failed.
SILENCE_MS: Final = 30_000


class DlqError(PreservariumError):
    """The dead letters cannot be read."""


@dataclass(frozen=True, slots=True)
class Letter:
    """An error line, and where it stands in `iot_errors`."""

    id: str  #: partition:offset
    line: dict[str, Any]

    @property
    def input(self) -> bytes | None:
        """The original bytes of an input of `iot_raw_data`; None where they are not (wholly) kept."""
        line = self.line
        if line.get("topic") != topics.RAW.name or not line.get("device_id") or "raw_partition" not in line:
            return None
        if str(line.get("message", "")).endswith(" bytes kept]"):
            return None
        if "raw" in line:
            return str(line["raw"]).encode()
        try:
            return base64.b64decode(line["raw_b64"], validate=True) if "raw_b64" in line else None
        except binascii.Error:
            return None

    @property
    def coordinates(self) -> str:
        """What names its input: raw partition/offset/index."""
        line = self.line
        return f"{line.get('raw_partition')}/{line.get('raw_offset')}/{line.get('raw_index', 0)}"


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
        if self.device is not None and line.get("device_id") != self.device:
            return False
        return bool(line.get("first_seen", 0) >= self.since_us)


@dataclass(slots=True)
class Redriven:
    """What a redrive did."""

    matched: int = 0
    sent: int = 0  #: or would be sent, in a dry run
    already: int = 0  #: redriven before
    unusable: int = 0  #: the input is not in the line: it came from another topic, or was too large

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
        DlqError: there is none.
    """
    partition_text, _, offset_text = identity.partition(":")
    if not (partition_text.isdigit() and offset_text.isdigit()):
        message = f"{identity!r} is no id of an error: PARTITION:OFFSET, as `preservarium dlq list` prints"
        raise DlqError(message)
    wanted = (int(partition_text), int(offset_text))
    async with aclosing(_records(settings, topics.ERRORS, 0, only=wanted)) as records:
        async for partition, record in records:
            if (partition, record.offset) == wanted:
                line = orjson.loads(record.value or b"null")
                if isinstance(line, dict):
                    return Letter(identity, line)
    message = f"there is no error {identity}"
    raise DlqError(message)


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
            if waiting and not dry_run:
                await publisher.publish([_raw(each) for each in waiting])
                await publisher.publish([_marker(each, now_us) for each in waiting])
            done.sent += len(waiting)
            waiting.clear()
            if progress is not None:
                progress(done)

        everything = Select(select.codes, select.device, select.since_us)
        async with aclosing(letters(settings, everything)) as found:
            async for each in found:
                done.matched += 1
                if each.coordinates in known:
                    done.already += 1
                    continue
                if each.input is None:
                    done.unusable += 1
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


def _raw(each: Letter) -> Send:
    line = each.line
    headers: tuple[tuple[str, bytes], ...] = ((ATTEMPT_HEADER, b"%d" % (int(line.get("attempt", 1)) + 1)),)
    if line.get("generation"):
        headers += ((GENERATION_HEADER, b"%d" % int(line["generation"])),)
    # A record that is not in our envelope was received when Kafka took it: that must stay.
    at_ms = int(line.get("first_seen", 0)) // 1_000
    return Send(topics.RAW, str(line["device_id"]).encode(), each.input, headers=headers, timestamp_ms=at_ms or None)


def _marker(each: Letter, now_us: int) -> Send:
    value = {"error": each.id, "code": each.line.get("code"), "device_id": each.line.get("device_id"), "at": now_us}
    return Send(topics.REDRIVEN, each.coordinates.encode(), orjson.dumps(value))


async def _records(
    settings: Settings, topic: Topic, since_us: int, *, only: tuple[int, int] | None = None
) -> AsyncGenerator[tuple[int, Any], None]:
    """(partition, record) of a topic, to the end that it has now; without a group, so that nothing is committed."""
    name = topic.full(settings.kafka.topic_prefix)
    try:
        numbers = await _partitions(settings, name)
    except KafkaError as e:
        message = f"Kafka cannot be reached: {e}"
        raise DlqError(message) from None
    consumer = AIOKafkaConsumer(
        **kafka_clients.connection(settings.kafka),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=4 << 20,
    )
    try:
        await consumer.start()
    except KafkaError as e:
        await kafka_clients.stop(consumer)
        message = f"Kafka cannot be reached: {e}"
        raise DlqError(message) from None
    try:
        partitions = [TopicPartition(name, p) for p in numbers]
        if only is not None:
            partitions = [tp for tp in partitions if tp.partition == only[0]]
        if not partitions:
            return
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions)
        if since_us:
            found = await consumer.offsets_for_times(dict.fromkeys(partitions, max(0, since_us // 1_000)))
            starts = {tp: found[tp].offset if found.get(tp) else ends[tp] for tp in partitions}
        if only is not None:
            starts = {tp: max(only[1], starts[tp]) for tp in partitions}
            ends = {tp: min(only[1] + 1, ends[tp]) for tp in partitions}
        for tp in partitions:
            if starts[tp] >= ends[tp]:
                continue
            consumer.assign([tp])
            consumer.seek(tp, starts[tp])
            while await consumer.position(tp) < ends[tp]:
                got = await consumer.getmany(tp, timeout_ms=SILENCE_MS, max_records=2_000)
                if not got and await consumer.position(tp) < ends[tp]:
                    message = f"Kafka is silent: {name}[{tp.partition}] was not read to its end"
                    raise DlqError(message)
                for record in got.get(tp, ()):
                    if record.offset < ends[tp]:
                        yield tp.partition, record
    except KafkaError as e:
        message = f"{name} cannot be read: {e}"
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
