"""A back-up beside running workers.

What is copied first is never ahead of what is copied later: positions, then the stores that they are about, then state, then
topics. So whatever a restored stage reads again has had no effect that the back-up does not know, or one that is recognised.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from aiokafka import TopicPartition

from preservarium import __version__
from preservarium.operations.backup import databases, files
from preservarium.operations.backup.files import BackupError, EntryWriter, Manifest, Position, Span
from preservarium.operations.backup.kafka import (
    Cluster,
    Reader,
    changelogs,
    copied,
    entry_of,
    group_name,
    starts,
)
from preservarium.settings import Settings

#: (done, total, what)
Progress = Callable[[int, int, str], None]
#: Of `Progress`: positions, ClickHouse, state, topics, PostgreSQL, digests.
STEPS = 6


async def create(
    settings: Settings,
    directory: Path,
    readers: Sequence[Reader],
    progress: Progress,
    *,
    without: Collection[str] = (),
) -> Manifest:
    """Copy the whole system into an empty directory. Workers may run.

    Args:
        settings: where the system is.
        directory: is made; only its owner may enter it.
        readers: every stage that reads a topic, and in which group.
        progress: told of each step.
        without: databases (postgres, clickhouse) that their own tools copy: PostgreSQL's copy must be of this moment or a later one.

    Raises:
        BackupError: the directory is not empty, or something cannot be copied. What is there then is no back-up.
        MigrationError: a database cannot be reached.
    """
    await asyncio.to_thread(_make, directory)
    manifest = Manifest(__version__, datetime.now(UTC).isoformat(timespec="seconds"))
    manifest.without = sorted(without)
    work = _Work(settings, directory, manifest, progress)
    async with Cluster(settings) as cluster:
        with work.step("positions"):
            await work.positions(cluster, readers)
        async with databases.snapshot(settings) as taken:
            manifest.sinks, manifest.timescaledb = taken.sinks, taken.timescaledb
            if "clickhouse" not in without:
                with work.step("clickhouse"):
                    await work.clickhouse()
            with work.step("state"):
                await work.state(cluster)
            with work.step("topics"):
                await work.topics(cluster, readers)
            if "postgres" not in without:
                with work.step("postgres"):
                    await databases.dump(settings, taken, directory / files.POSTGRES)
    with work.step("digests"):
        await asyncio.to_thread(files.seal, directory, manifest)
    return manifest


def _make(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(directory.iterdir()):
        message = f"{directory} is not empty: a back-up is made into a directory of its own"
        raise BackupError(message)


class _Work:
    """The steps of one back-up."""

    def __init__(self, settings: Settings, directory: Path, manifest: Manifest, progress: Progress) -> None:
        self._settings = settings
        self._directory = directory
        self._manifest = manifest
        self._progress = progress
        self._done = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._progress(self._done, STEPS, name)
        began_s = monotonic()
        yield
        self._manifest.seconds[name] = round(monotonic() - began_s, 2)
        self._done += 1
        self._progress(self._done, STEPS, name)

    def _say(self, what: str) -> None:
        self._progress(self._done, STEPS, what)

    async def positions(self, cluster: Cluster, readers: Sequence[Reader]) -> None:
        """Where every group stands; of compacted topics nothing is noted, because they are read from their beginning."""
        names = {full: topic.name for topic, full in copied(self._settings) if not topic.compacted}
        for suffix in sorted({reader.group for reader in readers}):
            found: dict[str, dict[int, Position]] = {}
            for tp, at in (await cluster.committed(group_name(self._settings, suffix))).items():
                if (topic := names.get(tp.topic)) is not None:
                    found.setdefault(topic, {})[tp.partition] = at
            self._manifest.groups[suffix] = found

    async def clickhouse(self) -> None:
        if not self._settings.clickhouse.enabled:
            return
        async with databases.ClickHouseFiles(self._settings) as store:
            for table in databases.TABLES:
                self._manifest.clickhouse[table] = await store.partitions(table)
                for partition in self._manifest.clickhouse[table]:
                    self._say(f"clickhouse {table} {partition}")
                    await store.export(table, partition, files.clickhouse_file(self._directory, table, partition))

    async def state(self, cluster: Cluster) -> None:
        there = await cluster.partitions()
        tables = {table: full for table, full in changelogs(self._settings).items() if full in there}
        counts = {full: there[full] for full in tables.values()}
        ends, begins = await cluster.ends(counts), await cluster.begins(counts)
        for table, full in tables.items():
            self._say(f"state {table}")
            self._manifest.changelogs[table] = {}
            for partition in range(there[full]):
                tp = TopicPartition(full, partition)
                values = await cluster.values(tp, begins[tp], ends[tp])
                with EntryWriter(files.changelog_file(self._directory, table, partition)) as file:
                    await asyncio.to_thread(file.add, values)
                self._manifest.changelogs[table][partition] = len(values)

    async def topics(self, cluster: Cluster, readers: Sequence[Reader]) -> None:
        there = await cluster.partitions()
        names = {topic.name: full for topic, full in copied(self._settings) if full in there}
        compacted = {topic.name for topic, _ in copied(self._settings) if topic.compacted}
        counts = {full: there[full] for full in names.values()}
        # All at once, and after the state: whatever the state knows of is below.
        ends, begins = await cluster.ends(counts), await cluster.begins(counts)
        for topic, full in names.items():
            self._say(f"topic {topic}")
            begin = {tp.partition: offset for tp, offset in begins.items() if tp.topic == full}
            first = starts(topic, readers, begin, self._manifest.groups, self._manifest.sinks)
            spans = self._manifest.topics[topic] = {}
            for partition in range(there[full]):
                tp = TopicPartition(full, partition)
                with EntryWriter(files.topic_file(self._directory, topic, partition)) as file:
                    if topic in compacted:
                        await asyncio.to_thread(file.add, await cluster.newest(tp, begins[tp], ends[tp]))
                        spans[partition] = Span(0, file.records, file.records)
                        continue
                    async for records in cluster.records(tp, first[partition], ends[tp]):
                        entries: list[Any] = [entry_of(record) for record in records]
                        await asyncio.to_thread(file.add, entries)
                    # A sink may stand behind the last record that it may read yet.
                    spans[partition] = Span(first[partition], max(first[partition], ends[tp]), file.records)
