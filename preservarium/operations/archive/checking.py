"""Whether the archive is whole: every file as its index says, no hole between them, and no file without a row. And an index made anew."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from preservarium.domain.archive import HASH_CHARS, Segment, named
from preservarium.operations.archive.reading import connections
from preservarium.settings import Settings
from preservarium.stores import archive_index as index
from preservarium.stores.archive_files import ArchiveError, Files, Reader, verify
from preservarium.stores.connections import Pool

#: Findings that are listed one by one.
LISTED_MAX: Final = 1_000
#: Files that are looked up in the index at once.
PAGE: Final = 500

Progress = Callable[[int, int, str], None]  #: (files done, files, which)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong."""

    path: str
    what: str

    def document(self) -> dict[str, str]:
        """As JSON."""
        return {"path": self.path, "what": self.what}


@dataclass(slots=True)
class Checked:
    """What a verification found."""

    files: int = 0
    records: int = 0
    file_bytes: int = 0
    faults: list[Fault] = field(default_factory=list)  #: at most `LISTED_MAX`
    holes: list[Fault] = field(default_factory=list)  #: offsets that are in no file, and nobody noted why
    orphans: list[str] = field(default_factory=list)  #: files that no row names
    lost: int = 0  #: offsets that are noted as deleted by Kafka before they were archived

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong. An orphan is: whoever reads the files by their names gets its records twice."""
        return not (self.faults or self.holes or self.orphans)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "files": self.files,
            "records": self.records,
            "file_bytes": self.file_bytes,
            "faults": [fault.document() for fault in self.faults],
            "holes": [hole.document() for hole in self.holes],
            "orphans": self.orphans,
            "lost": self.lost,
            "whole": self.whole,
        }


async def check(
    settings: Settings,
    *,
    topic: str | None = None,
    from_ms: int | None = None,
    to_ms: int | None = None,
    quick: bool = False,
    orphans: bool = True,
    progress: Progress = lambda *_: None,
) -> Checked:
    """Verify files and index.

    Args:
        settings: where they are.
        topic: only this one, by its declared name.
        from_ms: only files with a record of this time (Kafka's, ms) or later.
        to_ms: only files with a record before this time.
        quick: only that files are there, with the bytes that they should have; otherwise all of each is read.
        orphans: also list the files that no row names.
        progress: told how far it is.

    Raises:
        ArchiveError: the place cannot be asked.
    """
    found, files, pool = (
        Checked(),
        Files(settings.archive),
        connections(lambda: settings, "preservarium-archive-verify"),
    )
    try:
        async with pool.acquire() as connection:
            total = sum(s.segments for s in await index.summaries(connection) if topic in (None, s.topic))
        before: Segment | None = None
        after = ("", -1, -1, -1)
        while True:
            async with pool.acquire() as connection:
                page = await index.segments(connection, topic, from_ms=from_ms, to_ms=to_ms, after=after)
            for segment in page:
                progress(found.files, total, segment.path)
                _note(found.faults, segment.path, await asyncio.to_thread(verify, files, segment, quick=quick))
                if from_ms is None and to_ms is None and before is not None and _same(before, segment):
                    await _hole(pool, before, segment, found)
                found.files += 1
                found.records += segment.records
                found.file_bytes += segment.file_bytes
                before = segment
            if len(page) < index.PAGE:
                break
            last = page[-1]
            after = last.topic, last.epoch, last.partition, last.first
        if orphans:
            found.orphans = await _orphans(pool, files, topic)
        async with pool.acquire() as connection:
            found.lost = sum(s.lost for s in await index.summaries(connection) if topic in (None, s.topic))
        progress(found.files, max(total, found.files), "")
    finally:
        await pool.close()
    return found


def _same(before: Segment, segment: Segment) -> bool:
    return (before.topic, before.epoch, before.partition) == (segment.topic, segment.epoch, segment.partition)


def _note(faults: list[Fault], path: str, what: str) -> None:
    if what and len(faults) < LISTED_MAX:
        faults.append(Fault(path, what))


async def _hole(pool: Pool, before: Segment, segment: Segment, found: Checked) -> None:
    at = before.next
    if at > segment.first:
        _note(found.holes, segment.path, f"offsets {segment.first} to {at - 1} are in the file before it, too")
        return
    if at == segment.first:
        return
    async with pool.acquire() as connection:
        noted = await index.gaps_between(connection, segment, at)
    for first, next_ in noted:
        if first > at:
            break
        at = max(at, next_)
    if at < segment.first:
        _note(found.holes, segment.path, f"offsets {at} to {segment.first - 1} are in no file")


async def _orphans(pool: Pool, files: Files, topic: str | None) -> list[str]:
    found: list[str] = []

    async def look(paths: Sequence[str]) -> None:
        async with pool.acquire() as connection:
            known = await index.known(connection, paths)
        found.extend(path for path in paths if path not in known)

    page: list[str] = []
    for path, _ in await asyncio.to_thread(lambda: list(files.list())):
        if topic is not None and not path.startswith(f"topic={topic}/"):
            continue
        page.append(path)
        if len(page) == PAGE:
            await look(page)
            page = []
    await look(page)
    return sorted(found)[:LISTED_MAX]


# --- an index made anew


@dataclass(slots=True)
class Reindexed:
    """What became of the files that the index did not have."""

    adopted: list[str] = field(default_factory=list)
    left: list[Fault] = field(default_factory=list)  #: why not

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"adopted": self.adopted, "left": [fault.document() for fault in self.left]}


async def reindex(settings: Settings, *, progress: Progress = lambda *_: None) -> Reindexed:
    """Take files into the index that it does not have: it was lost, or restored from before they were made.

    Each is read whole, because its name says the hash that it should have. A file that overlaps another one of the index is left.
    Idempotent. Workers may run; a partition that is being archived at this moment is left.

    Raises:
        ArchiveError: the place cannot be asked.
    """
    done, files, pool = (
        Reindexed(),
        Files(settings.archive),
        connections(lambda: settings, "preservarium-archive-reindex"),
    )
    try:
        paths = await _orphans(pool, files, None)
        for n, path in enumerate(paths):
            progress(n, len(paths), path)
            if (name := named(path)) is None:
                done.left.append(Fault(path, "its name is none of the archive's"))
                continue
            try:
                segment = await asyncio.to_thread(_read_segment, files, path)
            except ArchiveError as e:
                done.left.append(Fault(path, str(e)))
                continue
            if segment.sha256[:HASH_CHARS] != name.hash:
                done.left.append(Fault(path, f"the file's SHA-256 is {segment.sha256}: it is damaged"))
                continue
            async with pool.acquire() as connection:
                taken = await index.adopt(connection, segment)
            if taken:
                done.adopted.append(path)
            else:
                done.left.append(
                    Fault(path, "the index has its offsets in another file, or the partition is being archived")
                )
        progress(len(paths), len(paths), "")
    finally:
        await pool.close()
    return done


def _read_segment(files: Files, path: str) -> Segment:
    """What a file says of itself, and what is in it."""
    name = named(path)
    assert name is not None
    digest, size = files.sha256(path)
    reader = Reader(files, path)
    try:
        records, value_bytes, low, high = 0, 0, 2**63, -1
        for some in reader.records(0, 2**63 - 1):
            records += len(some)
            value_bytes += sum(len(r.key or b"") + len(r.value or b"") for r in some)
            low = min([low, *(r.timestamp for r in some)])
            high = max([high, *(r.timestamp for r in some)])
    finally:
        reader.close()
    return Segment(
        name.topic, name.epoch, name.partition, name.first, name.next, name.day, records, value_bytes, size, digest,
        max(0, low), max(0, high),
    )  # fmt: skip
