"""Tasks and employees in ClickHouse compared with their topics, damaged on purpose, repaired and rebuilt: Kafka is real."""

import json
import random
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from sink_support import DAY_US, NOW_US, live

from preservarium.operations import derived, topic_comparison, verification
from preservarium.operations.sync_status import written
from preservarium.operations.topic_comparison import EMPLOYEES, TASK_EVENTS
from preservarium.operations.verification import Verdict, Verifier
from preservarium.stages.sync import EmployeeSync, TaskSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.streaming import topics_admin
from preservarium.streaming.stage import Batch

PARTITIONS = 3
AT_US = NOW_US // DAY_US * DAY_US - 3 * DAY_US
TABLES = {
    "task_events": "SELECT * FROM task_events FINAL ORDER BY ALL",
    "pipeline_state": "SELECT * FROM pipeline_state FINAL ORDER BY ALL",
    "stage_completions": "SELECT * FROM stage_completions FINAL ORDER BY ALL",
    "employees": "SELECT * FROM employees FINAL ORDER BY ALL",
}


@pytest.fixture
async def settings(dsn: str, kafka: str, clickhouse: str, clickhouse_database: str, topic_prefix: str) -> Any:
    made = live(
        postgres={"url": dsn}, clickhouse={"url": clickhouse, "database": clickhouse_database, "timeout_s": 30},
        kafka={"bootstrap_servers": kafka, "topic_prefix": topic_prefix, "group": f"{topic_prefix}g", "partitions": PARTITIONS},
    )  # fmt: skip
    await migrate_clickhouse(made())
    await topics_admin.create(made())
    return made


def events(rng: random.Random, files: int) -> list[tuple[bytes, bytes | None]]:
    """What a source tells of files: assignments, completions, repetitions, late ones, deletions, and a line of no use."""
    found: list[tuple[bytes, bytes | None]] = []
    for file in range(files):
        for number in range(rng.randint(1, 6)):
            at = AT_US + rng.randrange(DAY_US)
            line: dict[str, Any] = {
                "file_id": f"F'{file}\\ü", "stage": rng.choice(["scan", "ocr"]), "status": rng.choice(["assigned", "done"]), "assigned_at": at,
                "event_id": number, "employee_code": f"E{rng.randrange(3)}", "updated_at": at + 5_000_000, "deleted": rng.random() < 0.1,
                "started_at": at + 1 if rng.random() < 0.5 else None,
            }  # fmt: skip
            found.append((line["file_id"].encode(), orjson.dumps(line)))
            if rng.random() < 0.2:
                found.append(found[-1])
    found.append((b"x", b"not json"))
    return found


class World:
    """Topics, what the stages made of them, and how the groups stand."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.store = ClickHouseStore(settings)

    async def fill(self, replayed: Any, lines: list[tuple[bytes, bytes | None]]) -> None:
        """Into Kafka, through the stage's own code into ClickHouse, and acknowledged."""
        kafka = self.settings().kafka
        full = replayed.table.topic.full(kafka.topic_prefix)
        producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
        await producer.start()
        for key, value in lines:
            await producer.send(full, value, key=key, partition=sum(key) % PARTITIONS)
        await producer.stop()
        stage = (TaskSync if replayed is TASK_EVENTS else EmployeeSync)(self.store, self.settings)
        consumer = AIOKafkaConsumer(
            bootstrap_servers=kafka.bootstrap_servers,
            group_id=f"{kafka.group}-{replayed.table.stage}",
            enable_auto_commit=False,
        )
        await consumer.start()
        tps = [TopicPartition(full, p) for p in range(PARTITIONS)]
        consumer.assign(tps)
        await consumer.seek_to_beginning(*tps)
        ends = await consumer.end_offsets(tps)
        while any([await consumer.position(tp) < ends[tp] for tp in tps]):
            for tp, records in (await consumer.getmany(timeout_ms=1000)).items():
                await stage([Batch(replayed.table.topic.name, tp.partition, records)])
        await consumer.commit(ends)
        await consumer.stop()

    async def command(self, text: str) -> None:
        await self.store.query("SELECT 1")
        await self.store._client.command(text)

    async def rows(self) -> dict[str, list[Any]]:
        return {name: await self.store.query(text) for name, text in TABLES.items()}


@pytest.fixture
async def world(settings: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(verification, "VIEWS_SETTLE_S", 0.01)
    made = World(settings)
    await made.fill(TASK_EVENTS, events(random.Random(1), 60))
    people = [
        (b"E%d" % i, orjson.dumps({"employee_code": f"E{i}", "name": f"Name {i}", "updated_at": AT_US + i}))
        for i in range(3)
    ]
    await made.fill(EMPLOYEES, [*people, (b"E2", None)])
    yield made
    await made.store.close()


async def verify(world: World, *, repair: bool = False) -> Verdict:
    verdict = Verdict()
    async with Verifier(world.settings()) as verifier:
        for replayed in topic_comparison.TABLES.values():
            await verifier.verify_topic(replayed, await written(world.settings(), replayed), verdict, repair=repair)
    return verdict


DAMAGES = {
    "events are missing": ("task_events", "DELETE FROM task_events WHERE cityHash64(file_id) % 3 = 0"),
    "all events are missing": ("task_events", "TRUNCATE TABLE task_events"),
    "an event is altered": ("task_events", "ALTER TABLE task_events UPDATE status = 'lost' WHERE stage = 'ocr' SETTINGS mutations_sync = 2"),
    "files are missing": ("pipeline_state", "DELETE FROM pipeline_state WHERE stage = 'scan'"),
    "a file that is none": (
        "pipeline_state",
        "INSERT INTO pipeline_state SELECT * REPLACE ('ghost' AS file_id) FROM pipeline_state FINAL LIMIT 2 SETTINGS insert_deduplication_token = 'a'",
    ),
    "a newer state that is none": (
        "pipeline_state",
        "INSERT INTO pipeline_state SELECT * REPLACE (version + 1 AS version, 'lost' AS stage) FROM pipeline_state FINAL"
        " SETTINGS insert_deduplication_token = 'b'",
    ),
    "a file is altered": ("pipeline_state", "ALTER TABLE pipeline_state UPDATE started_at = NULL WHERE 1 SETTINGS mutations_sync = 2"),
    "completions are missing": ("stage_completions", "TRUNCATE TABLE stage_completions"),
    "a completion that is none": (
        "stage_completions",
        "INSERT INTO stage_completions SELECT * REPLACE ('lost' AS stage) FROM stage_completions FINAL LIMIT 2 SETTINGS insert_deduplication_token = 'c'",
    ),
    "employees are missing": ("employees", "TRUNCATE TABLE employees"),
    "an employee is altered": ("employees", "ALTER TABLE employees UPDATE name = 'X' WHERE employee_code = 'E1' SETTINGS mutations_sync = 2"),
}  # fmt: skip


async def test_damage_is_found_and_repaired(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and ranges at their smallest, so that there are many."""
    monkeypatch.setattr(topic_comparison, "ROWS_MAX", 60)
    monkeypatch.setattr(derived, "OWNERS_MAX", 25)
    before = await world.rows()
    assert all(before.values())
    assert [row[0] for row in before["employees"]] == ["E0", "E1"]
    verdict = await verify(world)
    assert (verdict.differences, verdict.same) == ([], True)
    assert verdict.rows >= len(before["task_events"])
    for damage, (table, statement) in DAMAGES.items():
        await world.command(statement)
        assert await world.rows() != before, damage
        found = await verify(world)
        assert not found.same, damage
        assert table in {d.table for d in found.differences}, damage
        repaired = await verify(world, repair=True)
        assert (damage, repaired.same) == (damage, True)
        assert await world.rows() == before, damage
    assert (await verify(world)).differences == []


async def test_a_table_is_rebuilt_from_its_topic(world: World) -> None:
    before = await world.rows()
    for table in TABLES:
        await world.command(f"TRUNCATE TABLE {table}")
    async with Verifier(world.settings()) as verifier:
        for _ in range(2):
            for replayed in topic_comparison.TABLES.values():
                ends = await written(world.settings(), replayed)
                assert await verifier.replay(replayed, ends) >= len(before[replayed.name])
            assert await world.rows() == before


async def test_what_sync_has_not_acknowledged_is_not_missed(world: World) -> None:
    kafka = world.settings().kafka
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    await producer.start()
    line = {"file_id": "new", "stage": "scan", "status": "assigned", "assigned_at": AT_US}
    await producer.send_and_wait(
        TASK_EVENTS.table.topic.full(kafka.topic_prefix), json.dumps(line).encode(), partition=1
    )
    await producer.stop()
    assert (await verify(world)).differences == []
