"""Copies records of Kafka into files, each exactly once.

Of one partition, by whoever holds its lease:

1. Records are read by their offsets and written to a local file, until it is full, its day ends, or Kafka has no more.
2. The file is **planned**: its name, with range and hash, stands in the index beside the position.
3. It is uploaded under that name.
4. In one transaction its row is written and the position moved behind it.

A crash before 2 leaves a local file, which the next start deletes. One between 2 and 4 leaves a plan: whoever takes the partition over looks
for the file, and where it is whole it is recorded (4), else it is deleted and made anew. So no offset is in two files and no file is without a
row; but where two workers are at one partition, because one of them was taken for dead: then the one that comes too late takes its own
file away, unless it is the same.

What Kafka deletes before it is archived is lost to the archive; that is noted, counted and told.
"""

import asyncio
import os
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time_ns
from typing import Any, Final

import asyncpg
import structlog

from preservarium import metrics, topics
from preservarium.domain.archive import Segment, ends_day, first_day
from preservarium.errors import PreservariumError, reason
from preservarium.operations.archive.reading import connections
from preservarium.operations.raw_records import Records, Span
from preservarium.settings import Settings, SettingsError
from preservarium.stores import archive_index as index
from preservarium.stores.archive_files import ArchiveError, Files, Writer
from preservarium.stores.archive_index import Lease, LeaseLost
from preservarium.topics import Topic

log = structlog.get_logger(__name__)

#: Kafka is asked this often how far its partitions are.
LOOK_S: Final = 30.0
#: A lease is renewed this often while a file is being made.
RENEW_S: Final = 60.0
#: Uploading one file: less than a lease, which is renewed just before.
UPLOAD_S: Final = 0.8 * index.LEASE_S
#: Waits after a failure, which double.
BACKOFF_S: Final = 2.0
BACKOFF_MAX_S: Final = 120.0
#: Files that are deleted at one look where their time is over.
EXPIRED_MAX: Final = 1_000
#: Prefix of local files; those of a process that is gone are deleted.
SPOOL: Final = "archive-"

#: Whatever else happens is a defect; all of it is told, counted, and tried again.
EXPECTED: Final = (PreservariumError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError)

Progress = Callable[[int, int, str], None]  #: (records done, records to do as of the look, where)

#: Local files of this process that are being written or uploaded.
_in_use: set[Path] = set()


def archived_topics(settings: Settings) -> list[Topic]:
    """The topics that are to be archived.

    Raises:
        SettingsError: one is not declared, is compacted, or is switched off.
    """
    found: list[Topic] = []
    for name in settings.archive.topic_names:
        topic = topics.BY_NAME.get(name)
        why = ""
        if topic is None:
            why = f"there is no topic {name}; there are: {', '.join(t.name for t in topics.TOPICS if not t.compacted)}"
        elif topic.compacted:
            why = f"{name} is compacted: Kafka keeps it"
        elif topic is topics.DECODED and not settings.normalize.decoded_topic:
            why = f"{name} is not read (PRESERVARIUM_NORMALIZE__DECODED_TOPIC)"
        if why:
            message = f"PRESERVARIUM_ARCHIVE__TOPICS: {why}"
            raise SettingsError(message)
        assert topic is not None
        found.append(topic)
    return found


def full_name(settings: Settings, topic: Topic) -> str:
    """A topic's name in the cluster; that of the replaced service is a setting."""
    return settings.normalize.decoded_topic if topic is topics.DECODED else topic.full(settings.kafka.topic_prefix)


@dataclass(slots=True)
class Done:
    """What one turn has archived."""

    segments: list[Segment] = field(default_factory=list)
    lost: int = 0  #: offsets that Kafka had deleted before
    deleted: int = 0  #: files whose time was over

    @property
    def records(self) -> int:
        """Records of these files."""
        return sum(segment.records for segment in self.segments)

    @property
    def file_bytes(self) -> int:
        """Bytes of these files."""
        return sum(segment.file_bytes for segment in self.segments)


class Archiver:
    """Archives what is due. For one task at a time; to be closed.

    Args:
        settings: asked at each turn.
        files: the place; None: that of the settings.
        spool: folder of local files; None: below `data_dir`.
    """

    def __init__(
        self, settings: Callable[[], Settings], *, files: Files | None = None, spool: Path | None = None
    ) -> None:
        self._settings = settings
        self.files = files or Files(settings().archive)
        self._spool = spool or Path(settings().data_dir).absolute() / "archive-spool"
        self._pool = connections(settings, "preservarium-archive")
        self._owner = f"{os.getpid()}-{uuid.uuid4().hex}"
        self._checked = False

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

    async def run(self, wait: Callable[[float], Any], stopping: Callable[[], bool]) -> None:
        """Archive for as long as it is not to stop; whatever is down, it is tried again.

        Args:
            wait: waits so many seconds, or until it is to stop.
            stopping: whether it is.
        """
        pause_s, said = BACKOFF_S, ""
        while not stopping():
            try:
                await self.turn()
                if said:
                    log.info("archive_goes_on")
                pause_s, said = BACKOFF_S, ""
                await wait(min(LOOK_S, self._settings().archive.interval_s))
            except Exception as e:
                # Also a defect of ours: the stream does not stop for it, and Kafka keeps what is not archived for a while.
                metrics.ARCHIVE_FAILURES.inc()
                text = f"{type(e).__name__}: {reason(e)}"
                if text != said:
                    log.warning("archive_interrupted", error=text, exc_info=None if isinstance(e, EXPECTED) else e)
                said = text
                await wait(pause_s)
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    async def turn(self, *, now: bool = False, progress: Progress = lambda *_: None) -> Done:
        """Archive what is due, and delete files whose time is over.

        Args:
            now: also what could wait.
            progress: told how far it is.

        Raises:
            ArchiveError: the place cannot be written to.
            RecordsError: Kafka cannot be asked.
            asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError: the index cannot be asked.
        """
        settings = self._settings()
        if not self._checked:
            await asyncio.to_thread(self._prepare)
            self._checked = True
        done = Done()
        wrong: ArchiveError | None = None
        async with Records(settings, archived=False) as records:
            for topic in archived_topics(settings):
                try:
                    await self._topic(records, topic, done, now, progress)
                except ArchiveError as e:
                    wrong = wrong or e  # the others go on
        await self._expire(done)
        if wrong is not None:
            raise wrong
        return done

    def _prepare(self) -> None:
        self._spool.mkdir(parents=True, exist_ok=True)
        for left in self._spool.glob(f"{SPOOL}*"):
            # Of a process that is gone; in a container, also of one that had our id.
            pid = left.name.removeprefix(SPOOL).partition("-")[0]
            ours = pid == str(os.getpid())
            if left not in _in_use and (ours or not (pid.isdigit() and Path(f"/proc/{pid}").exists())):
                left.unlink(missing_ok=True)
        self.files.check()

    async def _topic(self, records: Records, topic: Topic, done: Done, now: bool, progress: Progress) -> None:
        settings = self._settings()
        archive, full = settings.archive, full_name(settings, topic)
        spans: dict[int, Span] = {}
        for partition in sorted(await records.partitions(full)):
            if (found := await records.span(full, partition)) is not None:
                spans[partition] = found
        async with self._pool.acquire() as connection:
            standing = await index.standings(connection, topic.name, archive.epoch)
            if fresh := {p: at.begin for p, at in spans.items() if p not in standing}:
                await index.begin(connection, topic.name, archive.epoch, fresh)
                standing = await index.standings(connection, topic.name, archive.epoch)
        waiting = {p: at.end - standing[p].next for p, at in spans.items()}
        ages = {p: _age_s(standing[p].archived_at) for p, n in waiting.items() if n > 0}
        metrics.ARCHIVE_LAG_RECORDS.labels(topic.name).set(sum(n for n in waiting.values() if n > 0))
        longest_s = max((age for age in ages.values() if age is not None), default=0.0)
        metrics.ARCHIVE_LAG_SECONDS.labels(topic.name).set(longest_s)
        if wrong := sorted(p for p, n in waiting.items() if n < 0):
            p = wrong[0]
            message = (
                f"{full}[{p}] ends at {spans[p].end}, and {standing[p].next} is archived already: was the topic made anew? "
                "Then raise PRESERVARIUM_ARCHIVE__EPOCH"
            )
            raise ArchiveError(message)
        due = [
            p
            for p, n in waiting.items()
            if n > 0 and (now or n >= archive.segment_records_max or _is_due(ages[p], archive.interval_s))
        ]
        total, before = sum(waiting[p] for p in due), done.records
        progress(0, total, topic.name)

        def tell(where: str) -> None:
            progress(min(total, done.records - before), total, where)

        # Who waits longest comes first: where a worker ends in the middle, none is left behind for ever.
        for partition in sorted(due, key=lambda p: -(ages[p] or float("inf"))):
            await self._partition(records, topic, full, partition, spans[partition].end, done, tell)

    async def _partition(
        self,
        records: Records,
        topic: Topic,
        full: str,
        partition: int,
        end: int,
        done: Done,
        tell: Callable[[str], None],
    ) -> None:
        async with self._pool.acquire() as connection:
            held = await index.lease(connection, topic.name, self._settings().archive.epoch, partition, self._owner)
        if held is None:
            return
        at_end = False
        try:
            if held.plan is not None:
                held = await self._settle(held, held.plan)
            while held.next < end:
                span = await records.span(full, partition, again=True)
                if span is None:
                    return
                if span.begin > held.next:
                    held = await self._pass_over(held, min(span.begin, end), done, lost=True)
                    continue
                held = await self._segment(records, full, held, end, done)
                tell(f"{topic.name} {partition}:{held.next}")
            at_end = True
        except LeaseLost as e:
            log.info("archive_lease_lost", topic=topic.name, partition=partition, error=str(e))
        finally:
            async with self._pool.acquire() as connection:
                await index.release(connection, held, at_end=at_end)

    async def _pass_over(self, held: Lease, next_: int, done: Done, *, lost: bool) -> Lease:
        async with self._pool.acquire() as connection:
            after = await index.pass_over(connection, held, next_, lost=lost)
        if lost:
            done.lost += next_ - held.next
            metrics.ARCHIVE_LOST.labels(held.topic).inc(next_ - held.next)
            log.error(
                "archive_came_too_late",
                topic=held.topic,
                partition=held.partition,
                offsets=f"{held.next} to {next_ - 1}",
                hint="Kafka had deleted them: a shorter archive.interval_s, or a longer retention",
            )
        return after

    async def _segment(self, records: Records, full: str, held: Lease, end: int, done: Done) -> Lease:
        """Archive the next file of a partition."""
        local = await asyncio.to_thread(self._local)
        try:
            segment = await self._make(records, full, held, end, local)
            if segment is None:
                return await self._pass_over(held, end, done, lost=False)
            async with self._pool.acquire() as connection:
                await index.plan(connection, held, segment)
            async with asyncio.timeout(UPLOAD_S):
                await asyncio.to_thread(self.files.put, local, segment.path)
            after = await self._record(held, segment)
            done.segments.append(segment)
            metrics.ARCHIVE_RECORDS.labels(held.topic).inc(segment.records)
            metrics.ARCHIVE_BYTES.labels(held.topic).inc(segment.file_bytes)
            return after
        finally:
            await asyncio.to_thread(local.unlink, True)
            _in_use.discard(local)

    def _local(self) -> Path:
        number, name = tempfile.mkstemp(prefix=f"{SPOOL}{os.getpid()}-", dir=self._spool)
        os.close(number)
        _in_use.add(Path(name))
        return Path(name)

    async def _record(self, held: Lease, segment: Segment) -> Lease:
        try:
            async with self._pool.acquire() as connection:
                return await index.record(connection, held, segment)
        except LeaseLost:
            # Somebody else has made this range, or is about to. What has another name than theirs is nobody's.
            async with self._pool.acquire() as connection:
                kept = await index.known(connection, [segment.path])
            if segment.path not in kept:
                await asyncio.to_thread(self.files.delete, segment.path)
            raise

    async def _make(self, records: Records, full: str, held: Lease, end: int, local: Path) -> Segment | None:
        """Write the next records to a local file; None where there are none up to `end`."""
        archive = self._settings().archive
        about = {"topic": held.topic, "epoch": held.epoch, "partition": held.partition, "first": held.next}
        writer = Writer(local, about)
        now_ms, day, next_ = time_ns() // 1_000_000, "", end
        renewed_s = monotonic()
        try:
            async for some in records.between(full, held.partition, held.next, end):
                cut = False
                for record in some:
                    if not writer.records:
                        day = first_day(record.timestamp, held.day, now_ms)
                    elif (
                        writer.records >= archive.segment_records_max
                        or writer.value_bytes >= archive.segment_bytes_max
                        or ends_day(record.timestamp, day, now_ms)
                    ):
                        next_, cut = record.offset, True
                        break
                    writer.add(record)
                if cut:
                    break
                if writer.full:
                    await asyncio.to_thread(writer.flush)
                else:
                    # What was fetched comes without a wait, and a worker has other things to do.
                    await asyncio.sleep(0)
                if monotonic() - renewed_s > RENEW_S:
                    renewed_s = monotonic()
                    async with self._pool.acquire() as connection:
                        await index.renew(connection, held)
            if not writer.records:
                return None
            sha256, size = await asyncio.to_thread(writer.close, next_)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(writer.abandon))
            raise
        assert writer.min_time_ms is not None
        assert writer.max_time_ms is not None
        return Segment(
            held.topic, held.epoch, held.partition, held.next, next_, day, writer.records, writer.value_bytes, size, sha256,
            max(0, writer.min_time_ms), max(0, writer.max_time_ms),
        )  # fmt: skip

    async def _settle(self, held: Lease, planned: Segment) -> Lease:
        """A file was planned and not recorded: record it where it is whole, else take it away. Gives the lease as it is now."""
        whole = False
        await asyncio.to_thread(self.files.clear, planned.path)
        if planned.first == held.next:
            size = await asyncio.to_thread(self.files.size, planned.path)
            if size == planned.file_bytes:
                digest, _ = await asyncio.to_thread(self.files.sha256, planned.path)
                whole = digest == planned.sha256
        log.info("archive_settles", path=planned.path, whole=whole)
        if whole:
            return await self._record(held, planned)
        await asyncio.to_thread(self.files.delete, planned.path)
        async with self._pool.acquire() as connection:
            await index.plan(connection, held, None)
        return held

    async def _expire(self, done: Done) -> None:
        """Delete files whose time is over: first nobody reads them any more, then they go."""
        archive = self._settings().archive
        if not archive.keep_days:
            return
        async with self._pool.acquire() as connection:
            names = sorted({summary.topic for summary in await index.summaries(connection)})
        for name in names:
            async with self._pool.acquire() as connection:
                over = await index.expire(connection, name, archive.keep_days)
            for segment in over:
                await asyncio.to_thread(self.files.delete, segment.path)
                async with self._pool.acquire() as connection:
                    await index.forget(connection, segment)
                done.deleted += 1


def _age_s(archived_at: int | None) -> float | None:
    """Seconds since a partition was archived to its end; None: it never was."""
    return None if archived_at is None else max(0.0, time_ns() / 1e9 - archived_at / 1e6)


def _is_due(age_s: float | None, interval_s: float) -> bool:
    """What was never archived may be about to be deleted."""
    return age_s is None or age_s >= interval_s
