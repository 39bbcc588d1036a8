"""How the synchronization with ClickHouse stands, from the outside: Kafka's groups, ClickHouse's tables, a worker's breaker.

Nothing here needs a worker; what only a worker knows is asked of the one on this machine, where there is one.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import aiohttp
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError

from preservarium import topics
from preservarium.errors import PreservariumError, reason
from preservarium.operations.compared_tables import Compared
from preservarium.operations.topic_comparison import Replayed
from preservarium.settings import Settings
from preservarium.stages.sync import EMPLOYEES, EVENTS, MEASUREMENTS, TASK_EVENTS
from preservarium.streaming import kafka_clients
from preservarium.streaming.feeds import MEMORY, PLAN
from preservarium.topics import Topic

#: (stage, and suffix of its consumer group; topic; table)
STAGES: Final[tuple[tuple[str, Topic, str], ...]] = tuple(
    (t.stage, t.topic, t.name) for t in (MEASUREMENTS, *EVENTS, TASK_EVENTS, EMPLOYEES)
)

#: A server that does not answer within this time is told as unknown.
ASK_S: Final = 5.0
#: `Settled` waits so long for the sink: it is seconds behind, or it is down.
SETTLE_WAIT_S: Final = 15.0


class StatusError(PreservariumError):
    """Kafka or ClickHouse cannot be asked."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition of a stage's group."""

    committed: int | None  #: first offset that is not known to be written; None: nothing was ever committed
    planned: int | None  #: where the batch that begins there ends, where one is under way
    end: int  #: of the partition

    @property
    def lag(self) -> int:
        """Records that are still to be written."""
        return max(0, self.end - (self.committed or 0))


@dataclass(slots=True)
class StageStatus:
    """One stage and its table."""

    stage: str
    topic: str
    table: str
    partitions: dict[int, Partition] = field(default_factory=dict)
    exists: bool = False
    rows: int = 0  #: with those that a merge will remove
    bytes: int = 0  #: on disk
    last_insert: datetime | None = None  #: UTC, of the newest part that was not made by merging
    dedup_window: int = 0  #: blocks whose tokens the table remembers; 0: tokens are ignored

    @property
    def lag(self) -> int:
        """Records that are still to be written."""
        return sum(p.lag for p in self.partitions.values())


@dataclass(slots=True)
class Status:
    """Everything that `preservarium sync status` tells."""

    stages: list[StageStatus]
    pending: list[str]  #: migrations that are still to be applied
    breaker: str  #: up, trying or down, as the worker on this machine says; unknown where there is none
    breaker_reason: str = ""


async def group_positions(settings: Settings, stages: Sequence[tuple[str, Topic]]) -> dict[str, dict[int, Partition]]:
    """Where the groups of stages stand: suffix of the group -> partition -> position.

    Raises:
        StatusError: Kafka cannot be asked.
    """
    kafka = settings.kafka
    found: dict[str, dict[int, Partition]] = {}
    consumer = AIOKafkaConsumer(**kafka_clients.reading(kafka), enable_auto_commit=False)
    admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka))
    try:
        async with asyncio.timeout(6 * ASK_S):
            await consumer.start()
            await admin.start()
            # All topics are asked for: naming one that is missing makes it on brokers that auto-create.
            there = {t["topic"]: t["partitions"] for t in await admin.describe_topics(None) if not t["error_code"]}
            for suffix, topic in stages:
                full = topic.full(kafka.topic_prefix)
                if full not in there:
                    found[suffix] = {}
                    continue
                tps = [TopicPartition(full, p) for p in sorted(p["partition"] for p in there[full])]
                ends = await consumer.end_offsets(tps)
                committed = await _committed(admin, f"{kafka.group}-{suffix}", tps)
                found[suffix] = {tp.partition: _position(committed.get(tp), ends[tp]) for tp in tps}
    except (KafkaError, OSError, TimeoutError) as e:
        message = f"Kafka cannot be asked at {kafka.bootstrap_servers}: {reason(e)}"
        raise StatusError(message) from e
    finally:
        for client in (consumer, admin):
            await kafka_clients.stop(client, ASK_S)
    return found


async def _committed(admin: Any, group: str, tps: list[TopicPartition]) -> Mapping[TopicPartition, Any]:
    while True:
        try:
            found: Mapping[TopicPartition, Any] = await admin.list_consumer_group_offsets(group, partitions=tps)
        except GroupCoordinatorNotAvailableError:
            # A cluster that has had no group yet makes the topic for their offsets now.
            await asyncio.sleep(0.5)
        else:
            return found


def _position(committed: Any, end: int) -> Partition:
    if committed is None or committed.offset < 0:
        return Partition(None, None, end)
    plan = committed.metadata.partition(MEMORY)[0]
    number = plan.removeprefix(PLAN)
    planned = int(number) if number != plan and number.isdigit() and int(number) > committed.offset else None
    return Partition(committed.offset, planned, end)


async def written(settings: Settings, replayed: Replayed) -> dict[int, int]:
    """Up to where sync has written a topic, by partition; a batch that is under way may be beyond it.

    Raises:
        StatusError: Kafka cannot be asked.
    """
    positions = await group_positions(settings, [(replayed.table.stage, replayed.table.topic)])
    return {p: at.committed for p, at in positions[replayed.table.stage].items() if at.committed is not None}


async def status(settings: Settings) -> Status:
    """How every sync stage stands.

    Raises:
        StatusError, MigrationError: Kafka or ClickHouse cannot be asked.
    """
    from preservarium.stores.migrate import connect_clickhouse, migrate_clickhouse

    positions = await group_positions(settings, [(name, topic) for name, topic, _ in STAGES])
    report = await migrate_clickhouse(settings, dry_run=True)
    stages = [StageStatus(name, topic.name, table, positions[name]) for name, topic, table in STAGES]
    # Not the settings' database: it may not be there yet.
    client = await connect_clickhouse(settings)
    try:
        for stage in stages:
            await _table(client, settings.clickhouse.database, stage)
    finally:
        await client.close()
    state, reason = await _breaker(settings)
    return Status(stages, [f.file for f in report.pending], state, reason)


_WINDOW: Final = re.compile(r"replicated_deduplication_window = (\d+)")


async def _table(client: Any, database: str, stage: StageStatus) -> None:
    where = {"d": database, "t": stage.table}
    engine = (
        await client.query(
            "SELECT engine_full FROM system.tables WHERE database = {d:String} AND name = {t:String}", parameters=where
        )
    ).result_rows
    if not engine:
        return
    stage.exists = True
    window = _WINDOW.search(engine[0][0])
    stage.dedup_window = int(window[1]) if window else 0
    rows, size, inserted = (
        await client.query(
            # A part of one block was not merged yet.
            "SELECT sum(rows), sum(bytes_on_disk), toUnixTimestamp(maxIf(modification_time, min_block_number = max_block_number)) FROM system.parts"
            " WHERE database = {d:String} AND table = {t:String} AND active",
            parameters=where,
        )
    ).result_rows[0]
    stage.rows, stage.bytes = int(rows), int(size)
    if inserted:
        stage.last_insert = datetime.fromtimestamp(inserted, UTC)


async def _breaker(settings: Settings) -> tuple[str, str]:
    """ClickHouse as the worker on this machine sees it."""
    host = settings.web.host if settings.web.host not in ("", "0.0.0.0", "::") else "127.0.0.1"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_S)) as session,
            session.get(f"http://{host}:{settings.web.port}/ready") as answer,
        ):
            document: Mapping[str, Any] = await answer.json(content_type=None)
        needs = {need["name"]: need for need in document.get("dependencies", ())}
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, TypeError, KeyError, AttributeError):
        return "unknown", "no worker answers on this machine"
    need = needs.get("clickhouse")
    if need is None:
        return "unknown", "the worker on this machine does not run sync"
    return str(need.get("state", "unknown")), str(need.get("reason", ""))


async def settled(settings: Settings, table: Compared) -> bool:
    """Whether PostgreSQL has, or comes to have within seconds, everything that sync has written of a table by now.

    False where that cannot be found out.
    """
    from preservarium.stores.migrate import MigrationError, connect_postgres

    try:
        written = (await group_positions(settings, [(table.group, topics.BY_NAME[table.topic])]))[table.group]
        connection = await connect_postgres(settings)
    except (StatusError, MigrationError):
        return False
    # A batch that is under way may be written, whole or in part.
    needed = {p: position.planned or position.committed or 0 for p, position in written.items()}
    try:
        deadline = asyncio.get_running_loop().time() + SETTLE_WAIT_S
        while True:
            rows = await connection.fetch(
                "SELECT partition, next_offset FROM sink_offsets WHERE sink = $1 AND topic = $2 AND generation = $3",
                table.sink, table.topic, settings.sink.generation,
            )  # fmt: skip
            stored = {r[0]: r[1] for r in rows}
            if all(stored.get(p, 0) >= offset for p, offset in needed.items()):
                return True
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.5)
    finally:
        await connection.close(timeout=ASK_S)
