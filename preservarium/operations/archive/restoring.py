"""Archived records brought somewhere else: into a topic, or as files to another place."""

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from preservarium import topics
from preservarium.domain.archive import Segment
from preservarium.errors import PreservariumError, reason
from preservarium.operations.archive.reading import connections
from preservarium.operations.raw_records import Records
from preservarium.settings import Archive, Settings
from preservarium.stores import archive_index as index
from preservarium.stores.archive_files import ArchiveError, Files, Reader
from preservarium.streaming import kafka_clients

#: Records that are on their way to Kafka at once.
FLIGHT_RECORDS: Final = 2_000
#: Where a restored record stood: `PARTITION:OFFSET`. Its new place has other coordinates.
ORIGIN_HEADER: Final = "archived_from"
#: Segments of one restore; each is some hundred thousand records.
SEGMENTS_MAX: Final = 1_000_000

Progress = Callable[[int, int, str], None]  #: (records done, records, where)


class RestoreError(PreservariumError):
    """It cannot be restored there; the message says why."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records: those of a time by Kafka's clock, of some partitions."""

    topic: str  #: declared name
    from_ms: int | None = None
    to_ms: int | None = None  #: before
    partitions: tuple[int, ...] = ()  #: none: all
    epoch: int | None = None  #: None: that of the settings

    def takes(self, time_ms: int) -> bool:
        """Whether a record of this time is meant."""
        return (self.from_ms is None or time_ms >= self.from_ms) and (self.to_ms is None or time_ms < self.to_ms)


@dataclass(slots=True)
class Restored:
    """What was brought."""

    files: int = 0
    records: int = 0
    bytes: int = 0
    there: int = 0  #: files that the other place had already
    empty: int = 0  #: records with neither key nor value: our client cannot send such, and they say nothing

    def document(self) -> dict[str, int]:
        """As JSON."""
        return {
            "files": self.files,
            "records": self.records,
            "bytes": self.bytes,
            "there": self.there,
            "empty": self.empty,
        }


async def select(settings: Settings, wanted: Wanted) -> list[Segment]:
    """The files that have wanted records, in the order of partitions and offsets.

    Raises:
        RestoreError: they are too many for one go.
    """
    epoch = settings.archive.epoch if wanted.epoch is None else wanted.epoch
    pool = connections(lambda: settings, "preservarium-archive-restore")
    found: list[Segment] = []
    try:
        after = ("", -1, -1, -1)
        while True:
            async with pool.acquire() as connection:
                page = await index.segments(
                    connection, wanted.topic, epoch=epoch, partitions=wanted.partitions, from_ms=wanted.from_ms,
                    to_ms=wanted.to_ms, after=after,
                )  # fmt: skip
            found += page
            if len(page) < index.PAGE:
                return found
            if len(found) >= SEGMENTS_MAX:
                message = f"these are more than {SEGMENTS_MAX:,} files: narrow the time"
                raise RestoreError(message)
            last = page[-1]
            after = last.topic, last.epoch, last.partition, last.first
    finally:
        await pool.close()


async def to_topic(
    settings: Settings, segments: Sequence[Segment], wanted: Wanted, name: str, *, progress: Progress = lambda *_: None
) -> Restored:
    """Write records into a topic, each into the partition of its number and in order, with its key, bytes, time and headers.

    A header says where it stood. Repeating it writes the records again.

    Args:
        settings: where Kafka and the archive are.
        segments: what `select` gave.
        wanted: which records of them.
        name: of the topic, in the cluster; it must be there, with enough partitions.
        progress: told how far it is.

    Raises:
        RestoreError: the topic is one of the system's own, is not there, or Kafka does not take the records.
        ArchiveError: a file cannot be read.
    """
    own = {topic.full(settings.kafka.topic_prefix) for topic in topics.TOPICS} | {settings.normalize.decoded_topic}
    if name in own or name in topics.BY_NAME:
        message = (
            f"{name} is a topic of this system: records would come in a second time, with other coordinates. "
            "To derive them anew: `preservarium replay reset`, which reads the archive by itself"
        )
        raise RestoreError(message)
    async with Records(settings, archived=False) as records:
        there = await records.partitions(name)
    if missing := sorted({s.partition for s in segments} - there):
        message = (
            f"topic {name} has no partition {missing[0]}: make it first"
            if there
            else f"there is no topic {name}: make it first"
        )
        raise RestoreError(message)
    done, total = Restored(), sum(s.records for s in segments)
    producer = AIOKafkaProducer(
        **kafka_clients.connection(settings.kafka), acks="all", enable_idempotence=True,
        compression_type=None if settings.kafka.compression == "none" else settings.kafka.compression,
        max_request_size=settings.kafka.record_bytes_max + 65_536,
    )  # fmt: skip
    files = Files(settings.archive)
    try:
        await producer.start()
        flight: list[Any] = []
        for segment in segments:
            reader = await asyncio.to_thread(Reader, files, segment.path)
            try:
                groups = reader.records(segment.first, segment.next)
                while (group := await asyncio.to_thread(next, groups, None)) is not None:
                    for record in group:
                        if not wanted.takes(record.timestamp):
                            continue
                        if record.key is None and record.value is None:
                            done.empty += 1
                            continue
                        origin = (ORIGIN_HEADER, f"{segment.partition}:{record.offset}".encode())
                        flight.append(
                            await producer.send(
                                name, record.value, record.key, segment.partition,
                                record.timestamp if record.timestamp >= 0 else None, [*record.headers, origin],
                            )
                        )  # fmt: skip
                        done.records += 1
                        done.bytes += len(record.value or b"")
                        if len(flight) >= FLIGHT_RECORDS:
                            await asyncio.gather(*flight)
                            flight = []
                    progress(done.records, total, f"{segment.partition}:{group[-1].offset}" if group else "")
            finally:
                await asyncio.to_thread(reader.close)
            done.files += 1
        await asyncio.gather(*flight)
        progress(done.records, done.records, "")
    except (KafkaError, OSError, TimeoutError) as e:
        message = f"Kafka does not take the records of {name}: {reason(e)}; {done.records:,} were sent"
        raise RestoreError(message) from None
    finally:
        await kafka_clients.stop(producer)
    return done


async def to_place(
    settings: Settings, segments: Sequence[Segment], place: Archive, *, progress: Progress = lambda *_: None
) -> Restored:
    """Copy files to another place, each verified on the way. What is there already, with the same bytes, is left.

    Args:
        settings: where the archive is.
        segments: what `select` gave. Files are copied whole: records at the ends may be of another time.
        place: where to; its URL, and how to log in.
        progress: told how far it is.

    Raises:
        RestoreError: it is the archive itself.
        ArchiveError: a file cannot be read, is damaged, or cannot be written.
    """
    source, target = Files(settings.archive), Files(place)
    if place.url.rstrip("/") == settings.archive.url.rstrip("/"):
        message = f"{place.url} is the archive itself"
        raise RestoreError(message)
    await asyncio.to_thread(target.check)
    done, total = Restored(), sum(s.records for s in segments)
    number, name = tempfile.mkstemp(prefix="preservarium-archive-")
    os.close(number)
    local = Path(name)
    try:
        for segment in segments:
            progress(done.records, total, segment.path)
            if await asyncio.to_thread(_is_there, target, segment):
                done.there += 1
            else:
                digest, size = await asyncio.to_thread(source.sha256, segment.path, local)
                if (digest, size) != (segment.sha256, segment.file_bytes):
                    message = f"{source.url}: {segment.path} is damaged: its SHA-256 is {digest}, and should be {segment.sha256}"
                    raise ArchiveError(message)
                await asyncio.to_thread(target.put, local, segment.path)
                done.files += 1
                done.bytes += size
            done.records += segment.records
        progress(total, total, "")
    finally:
        await asyncio.to_thread(local.unlink, True)
    return done


def _is_there(target: Files, segment: Segment) -> bool:
    if target.size(segment.path) != segment.file_bytes:
        return False
    return target.sha256(segment.path)[0] == segment.sha256
