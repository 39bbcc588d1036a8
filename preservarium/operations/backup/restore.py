"""A back-up into empty servers: offsets as they were, so that positions, coordinates and plans mean what they meant."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time_ns
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from preservarium import topics
from preservarium.domain.registry.changes import fold_devices
from preservarium.operations.backup import databases, files
from preservarium.operations.backup.files import BackupError, Entry, Manifest
from preservarium.operations.backup.kafka import (
    DEVICE_TABLE,
    FROM_REGISTRY,
    Cluster,
    changelogs,
    copied,
    group_name,
)
from preservarium.registry.relay import REV_HEADER
from preservarium.settings import Settings
from preservarium.stores import registry
from preservarium.stores.migrate import connect_postgres, migrate_all
from preservarium.streaming import kafka_clients, topics_admin
from preservarium.streaming.publish import partition_of
from preservarium.streaming.records import RECEIVED_HEADER
from preservarium.streaming.same_offsets import Writer
from preservarium.topics import Topic

#: (done, total, what)
Progress = Callable[[int, int, str], None]
#: Of `Progress`: check, PostgreSQL, schema, ClickHouse, topics, state, registry, positions.
STEPS: Final = 8


@dataclass(slots=True)
class Restored:
    """What a restore has done."""

    manifest: Manifest
    records: int = 0  #: of topics
    fillers: int = 0  #: offsets below the first records
    values: int = 0  #: of state tables
    registry: int = 0  #: records of the registry
    seconds: dict[str, float] = field(default_factory=dict)  #: by step


async def restore(
    settings: Settings,
    directory: Path,
    progress: Progress,
    *,
    keep_postgres: bool = False,
    keep_clickhouse: bool = False,
    dry_run: bool = False,
) -> Restored:
    """Fill empty servers with a back-up; start workers afterwards.

    Not idempotent: one that broke off is begun again with empty servers.

    Args:
        settings: where the servers are; prefix and group may be others than they were.
        directory: of the back-up.
        progress: told of each step.
        keep_postgres: PostgreSQL is restored already, by its own tools, to any moment from the back-up's on.
        keep_clickhouse: ClickHouse is restored already, or is to be filled by `sync rebuild`.
        dry_run: check the files and the servers, and change nothing.

    Raises:
        BackupError: the back-up is damaged, the servers are not empty or do not fit it, or do not take it.
        OffsetsDifferError: somebody else writes to the topics.
        MigrationError, TopicsError: a server cannot be reached, or refuses.
    """
    work = _Work(settings, directory, progress)
    with work.step("check"):
        manifest = work.done.manifest = await asyncio.to_thread(files.unseal, directory)
        await work.check(keep_postgres=keep_postgres, keep_clickhouse=keep_clickhouse)
    if dry_run:
        return work.done
    with work.step("postgres"):
        if not keep_postgres:
            await databases.load(settings, directory / files.POSTGRES, timescaledb=manifest.timescaledb)
    with work.step("schema"):
        await migrate_all(settings)
        await topics_admin.create(settings)
    with work.step("clickhouse"):
        if settings.clickhouse.enabled and not keep_clickhouse:
            await work.clickhouse()
    writer = Writer(settings.kafka)
    async with Cluster(settings) as cluster:
        try:
            await writer.start()
            with work.step("topics"):
                await work.topics(cluster, writer)
            with work.step("state"):
                await work.state(writer)
            with work.step("registry"):
                await work.registry(writer)
        finally:
            await writer.stop()
        with work.step("positions"):
            await work.positions(cluster)
    return work.done


class _Work:
    """The steps of one restore."""

    def __init__(self, settings: Settings, directory: Path, progress: Progress) -> None:
        self._settings = settings
        self._directory = directory
        self._progress = progress
        self.done = Restored(Manifest("", ""))

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self._progress(len(self.done.seconds), STEPS, name)
        began_s = monotonic()
        yield
        self.done.seconds[name] = round(monotonic() - began_s, 2)
        self._progress(len(self.done.seconds), STEPS, name)

    async def check(self, *, keep_postgres: bool, keep_clickhouse: bool) -> None:
        """Whether these servers can take the back-up.

        Raises:
            BackupError: they cannot.
        """
        settings, manifest = self._settings, self.done.manifest
        kept = {"postgres": keep_postgres, "clickhouse": keep_clickhouse or not settings.clickhouse.enabled}
        if missing := [name for name in manifest.without if not kept[name]]:
            message = f"the back-up was made without {', '.join(missing)}: restore that first, then --keep-{missing[0]}"
            raise BackupError(message)
        counts = {len(spans) for name, spans in manifest.topics.items() if name != topics.DECODED.name}
        if counts and counts != {settings.kafka.partitions}:
            message = (
                f"the back-up has topics of {', '.join(map(str, sorted(counts)))} partitions, kafka.partitions is "
                f"{settings.kafka.partitions}: a key would have another place"
            )
            raise BackupError(message)
        if keep_postgres == await databases.is_empty(settings):
            message = (
                "PostgreSQL is to be kept, and has no tables: restore it first"
                if keep_postgres
                else "the database in PostgreSQL has tables already: a restore needs an empty one"
            )
            raise BackupError(message)
        if settings.clickhouse.enabled and not keep_clickhouse:
            async with databases.ClickHouseFiles(settings) as store:
                if full := [table for table in databases.TABLES if await store.partitions(table)]:
                    message = f"ClickHouse has rows already, in {', '.join(full)}: a restore needs empty tables"
                    raise BackupError(message)
        async with Cluster(settings) as cluster:
            ours = {group_name(settings, suffix) for suffix in (*manifest.groups, "")}
            if there := ours & await cluster.groups():
                message = (
                    f"Kafka has consumer groups of ours already ({', '.join(sorted(there))}): workers run, or have run"
                )
                raise BackupError(message)
            names = (
                {full for _, full in copied(settings)}
                | set(changelogs(settings).values())
                | set(self._registry_topics())
            )
            found = {name: count for name, count in (await cluster.partitions()).items() if name in names}
            if full := sorted({tp.topic for tp, end in (await cluster.ends(found)).items() if end}):
                message = f"Kafka has records already, in {', '.join(full)}: a restore needs empty topics, or none"
                raise BackupError(message)

    def _registry_topics(self) -> list[str]:
        prefix = self._settings.kafka.topic_prefix
        return [
            *(topics.BY_NAME[name].full(prefix) for name in FROM_REGISTRY),
            topics.changelog(DEVICE_TABLE, self._settings.kafka.group),
        ]

    async def clickhouse(self) -> None:
        async with databases.ClickHouseFiles(self._settings) as store:
            for table, partitions in self.done.manifest.clickhouse.items():
                for partition in partitions:
                    await store.insert(table, files.clickhouse_file(self._directory, table, partition))

    async def topics(self, cluster: Cluster, writer: Writer) -> None:
        """Every record at the offset that it had, and the next one beyond what any store has seen."""
        manifest, there = self.done.manifest, await cluster.partitions()
        stored = await self._stored()
        for topic, full in copied(self._settings):
            spans = manifest.topics.get(topic.name, {})
            if spans and there.get(full) != len(spans):
                message = f"topic {full} has {there.get(full)} partitions, in the back-up it has {len(spans)}"
                raise BackupError(message)
            if topic.compacted:
                for partition in spans:
                    async for some in _entries(files.topic_file(self._directory, topic.name, partition)):
                        await writer.append(full, partition, some)
                        self.done.records += len(some)
                continue
            positions = stored.get(topic.name, {})
            if behind := {p: offset for p, offset in positions.items() if p in spans and offset < spans[p].begin}:
                message = f"PostgreSQL stands at {behind} in {topic.name}, before the back-up begins: it is older than the back-up"
                raise BackupError(message)

            async def rewrite(
                partition: int, topic: str = topic.name, full: str = full, positions: Any = positions
            ) -> int:
                span = manifest.topics[topic][partition]
                end = max(span.end, positions.get(partition, 0))
                entries = _kept(_entries(files.topic_file(self._directory, topic, partition)), topics.BY_NAME[topic])
                self.done.fillers += span.begin
                return await writer.rewrite(full, partition, span.begin, end, entries)

            self.done.records += sum(await asyncio.gather(*(rewrite(partition) for partition in spans)))

    async def _stored(self) -> dict[str, dict[int, int]]:
        """Topic -> partition -> the furthest that a sink of the restored database stands."""
        connection = await connect_postgres(self._settings, what="a restore")
        try:
            sinks = await databases.sink_positions(connection, self._settings.sink.generation)
        finally:
            await connection.close(timeout=5)
        found: dict[str, dict[int, int]] = {}
        for by_topic in sinks.values():
            for topic, partitions in by_topic.items():
                for partition, offset in partitions.items():
                    known = found.setdefault(topic, {})
                    known[partition] = max(offset, known.get(partition, 0))
        return found

    async def state(self, writer: Writer) -> None:
        """The values of the tables, without fences: who is assigned a partition writes the first."""
        names = changelogs(self._settings)
        for table, partitions in self.done.manifest.changelogs.items():
            for partition in partitions if table in names else ():
                async for some in _entries(files.changelog_file(self._directory, table, partition)):
                    await writer.append(names[table], partition, some)
                    self.done.values += len(some)

    async def registry(self, writer: Writer) -> None:
        """What the relay would send of all documents, and what workers would make of it: no alarm ends for want of a rule."""
        connection = await connect_postgres(self._settings, what="a restore")
        try:
            rows = await registry.current_records(connection)
        finally:
            await connection.close(timeout=5)
        prefix, count = self._settings.kafka.topic_prefix, self._settings.kafka.partitions
        records = [(topic, Entry(0, -1, key, value, ((REV_HEADER, b"%d" % rev),))) for topic, key, value, rev in rows]
        devices = topics.DEVICE_REGISTRY.name
        known, _ = fold_devices(
            [(key, value, rev) for topic, key, value, rev in rows if topic == devices], lambda _: None
        )
        named = [(topics.BY_NAME[topic].full(prefix), entry) for topic, entry in records]
        table = topics.changelog(DEVICE_TABLE, self._settings.kafka.group)
        named += [(table, Entry(0, -1, key, value)) for key, value in known.items()]
        placed: dict[tuple[str, int], list[Entry]] = {}
        for full, entry in named:
            placed.setdefault((full, partition_of(entry.key, count)), []).append(entry)
        for (full, partition), entries in placed.items():
            await writer.append(full, partition, entries)
        self.done.registry = len(rows)

    async def positions(self, cluster: Cluster) -> None:
        """Where the groups stood, with what they had noted beside it."""
        names = {topic.name: full for topic, full in copied(self._settings)}
        for suffix, by_topic in self.done.manifest.groups.items():
            positions: Mapping[Any, Any] = {
                TopicPartition(names[topic], partition): OffsetAndMetadata(at.offset, at.metadata)
                for topic, partitions in by_topic.items()
                if topic in names
                for partition, at in partitions.items()
            }
            if positions:
                group = group_name(self._settings, suffix)
                await cluster.committed(group)  # waits for a cluster that has had no group yet
                await _commit(self._settings, group, positions)


async def _commit(settings: Settings, group: str, positions: Mapping[Any, Any]) -> None:
    consumer = AIOKafkaConsumer(**kafka_clients.reading(settings.kafka), group_id=group, enable_auto_commit=False)
    try:
        await consumer.start()
        consumer.assign(list(positions))
        await consumer.commit(dict(positions))
    finally:
        await kafka_clients.stop(consumer)


def unexpired(entries: Sequence[Entry], topic: Topic, now_ms: int) -> list[Entry]:
    """Records as they are to be written: what Kafka's retention would soon take is written as of now.

    A back-up holds what was not worked off. Where it is restored days later, Kafka would delete that by its times, perhaps
    before a worker has read it. A raw record says in a header when it was received.
    """
    if topic.retention_ms is None:
        return list(entries)
    oldest_ms = now_ms - topic.retention_ms // 2
    return [_as_of_now(entry, topic) if 0 <= entry.timestamp_ms < oldest_ms else entry for entry in entries]


def _as_of_now(entry: Entry, topic: Topic) -> Entry:
    headers = entry.headers
    if topic is topics.RAW and not any(name == RECEIVED_HEADER for name, _ in headers):
        headers = (*headers, (RECEIVED_HEADER, b"%d" % entry.timestamp_ms))
    return Entry(entry.offset, -1, entry.key, entry.value, headers)


async def _kept(read: AsyncIterator[Sequence[Entry]], topic: Topic) -> AsyncIterator[Sequence[Entry]]:
    now_ms = time_ns() // 1_000_000
    async for some in read:
        yield unexpired(some, topic, now_ms)


async def _entries(path: Path) -> AsyncIterator[Sequence[Any]]:
    reading = files.read_entries(path)
    while (some := await asyncio.to_thread(next, reading, None)) is not None:
        yield some
