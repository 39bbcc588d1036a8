"""Records out of the archive, by their offsets: what Kafka has deleted.

The index says which file has an offset, the file's own index which part of it; that part is read, and nothing else. Files and index are
asked when something is wanted of them, and not before.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import asyncpg

from preservarium import topics
from preservarium.domain.archive import Segment
from preservarium.errors import reason
from preservarium.settings import Settings
from preservarium.stores import archive_index as index
from preservarium.stores.archive_files import ArchivedRecord, ArchiveError, Files, Reader
from preservarium.stores.connections import Pool

T = TypeVar("T")

#: Records that are given at once.
RECORDS_MAX: Final = 500
#: Files that stay open: what is wanted next stands in one of them as a rule.
READERS_MAX: Final = 8


def connections(settings: Callable[[], Settings], name: str) -> Pool:
    """One connection to the index, also behind a pooler."""
    return Pool(
        lambda: settings().postgres.dsn,
        connections_max=lambda: 1,
        connect_timeout_s=lambda: settings().postgres.connect_timeout_s,
        command_timeout_s=lambda: settings().postgres.command_timeout_s,
        server_settings={"application_name": name},
    )


class ArchivedRecords:
    """Reads archived records. For one task at a time; to be closed.

    Args:
        settings: where the archive and its index are.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = Files(settings.archive)
        self._pool: Pool | None = None
        self._readers: dict[str, Reader] = {}
        prefix = settings.kafka.topic_prefix
        self._names = {topic.full(prefix): topic.name for topic in topics.TOPICS}
        if settings.normalize.decoded_topic:
            self._names[settings.normalize.decoded_topic] = topics.DECODED.name

    async def close(self) -> None:
        """Close files and connections."""
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            await asyncio.to_thread(reader.close)
        if self._pool is not None:
            await self._pool.close()

    async def span(self, full: str, partition: int) -> tuple[int, int] | None:
        """The first archived offset of a partition, and the one behind the last; None where nothing is archived.

        Raises:
            ArchiveError: the index cannot be asked.
        """
        name = self._names.get(full)
        if name is None:
            return None
        return await self._asked(lambda c: index.span(c, name, self._settings.archive.epoch, partition))

    async def at(self, full: str, partition: int, offsets: Iterable[int]) -> dict[int, ArchivedRecord]:
        """Records by their offsets; those that are not archived are left out.

        Raises:
            ArchiveError: index or file cannot be read.
        """
        wanted = sorted(set(offsets))
        found: dict[int, ArchivedRecord] = {}
        n = 0
        while n < len(wanted):
            segments = await self._covering(full, partition, wanted[n], wanted[-1] + 1)
            if not segments:
                break
            for segment in segments:
                mine = {offset for offset in wanted[n:] if segment.first <= offset < segment.next}
                if mine:
                    reader = await self._reader(segment)
                    found |= await asyncio.to_thread(reader.at, mine)
            n += sum(offset < segments[-1].next for offset in wanted[n:])
        return found

    async def between(self, full: str, partition: int, begin: int, end: int) -> AsyncIterator[Sequence[ArchivedRecord]]:
        """Archived records from offset `begin` to before `end`, some at a time.

        Raises:
            ArchiveError: index or file cannot be read.
        """
        at = begin
        while at < end:
            segments = await self._covering(full, partition, at, end)
            if not segments:
                return
            for segment in segments:
                reader = await self._reader(segment)
                groups = reader.records(at, min(end, segment.next))
                while (group := await asyncio.to_thread(next, groups, None)) is not None:
                    for start in range(0, len(group), RECORDS_MAX):
                        yield group[start : start + RECORDS_MAX]
                at = segment.next

    async def since(self, full: str, partition: int, at_us: int) -> int | None:
        """The offset of the first archived record of a time (Kafka's) or later; None where none is so late.

        Raises:
            ArchiveError: index or file cannot be read.
        """
        name = self._names.get(full)
        if name is None:
            return None
        time_ms = max(0, at_us // 1_000)
        segment = await self._asked(lambda c: index.since(c, name, self._settings.archive.epoch, partition, time_ms))
        if segment is None:
            return None
        if segment.min_time_ms >= time_ms:
            return segment.first
        reader = await self._reader(segment)
        return await asyncio.to_thread(reader.since, time_ms)

    async def _covering(self, full: str, partition: int, begin: int, end: int) -> list[Segment]:
        name = self._names.get(full)
        if name is None:
            return []
        epoch = self._settings.archive.epoch
        return await self._asked(lambda c: index.covering(c, name, epoch, partition, begin, end))

    async def _asked(self, question: Callable[[Any], Awaitable[T]]) -> T:
        if self._pool is None:
            self._pool = connections(lambda: self._settings, "preservarium-archive-reading")
        try:
            async with self._pool.acquire() as connection:
                return await question(connection)
        except asyncpg.UndefinedTableError:
            message = "the archive has no index here yet: run `preservarium migrate`"
            raise ArchiveError(message) from None
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as e:
            message = f"the archive's index cannot be asked: {reason(e)}"
            raise ArchiveError(message) from None

    async def _reader(self, segment: Segment) -> Reader:
        reader = self._readers.get(segment.path)
        if reader is None:
            while len(self._readers) >= READERS_MAX:
                await asyncio.to_thread(self._readers.pop(next(iter(self._readers))).close)
            reader = self._readers[segment.path] = await asyncio.to_thread(Reader, self._files, segment.path)
        return reader
