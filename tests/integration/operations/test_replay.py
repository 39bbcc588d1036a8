"""Topics read again on real servers: by the command, and by whoever sets offsets with Kafka's own tools."""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import asyncpg
import orjson
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from lineage_support import PARTITIONS, Pipeline, command, environment, pipeline
from sink_support import fetch, migrated_database, until
from structlog.testing import capture_logs
from thread_support import in_thread

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.settings import LiveSettings
from preservarium.stages.sink import ReadingSink
from preservarium.stages.sync import ReadingSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.stores.timescale import TimescaleStore
from preservarium.streaming.feeds import GroupFeed
from preservarium.streaming.publish import Publisher
from preservarium.streaming.records import raw_line
from preservarium.streaming.runner import Runner
from preservarium.streaming.stage import Send

pytestmark = pytest.mark.kafka

NOW_US = time.time_ns() // 1_000_000_000 * 1_000_000
MESSAGES = 60
REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes:
  - {name: t, kind: number, unit: degC, fail_span: {min: -40, max: 20}}
parsers: [{name: acme, kind: json, source: {fields: [{name: t, path: t}]}}]
device_types: [{name: T1, manufacturer: Acme, parser: acme}]
devices: [{device_id: d0, type: T1}, {device_id: d1, type: T1}, {device_id: d2, type: T1}, {device_id: d3, type: T1}]
"""


@pytest.fixture(scope="module")
def world(kafka: str, postgres: str, clickhouse: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Validated messages in Kafka, of which no store has anything; a third of the values is above the bound."""
    prefix, database = f"t{uuid.uuid4().hex[:10]}.", f"test_{uuid.uuid4().hex[:12]}"
    with migrated_database(postgres) as dsn:
        variables = environment(kafka, prefix, dsn, clickhouse, database) | {
            "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": "6",
            "PRESERVARIUM_KAFKA__COMMIT_INTERVAL_S": "0.2",
        }
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        made = pipeline(tmp_path_factory.mktemp("replay"))
        try:
            in_thread(_fill(made))
            yield SimpleNamespace(pipeline=made, settings=made.settings, dsn=dsn, kafka=kafka)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


async def _fill(made: Pipeline) -> None:
    await migrate_clickhouse(made.settings)
    await made.create()
    await made.register(REGISTRY)
    sends = []
    for n in range(MESSAGES):
        at = NOW_US - 3_600_000_000 + n * 1_000_000
        line = raw_line(f"d{n % 4}", {"t": n % 30}, received_at=at, connector="test", mode="LAN")
        sends.append(Send(topics.RAW, f"d{n % 4}".encode(), line))
    await made.send(sends)
    await made.run(store=False)


def live(world: Any) -> LiveSettings:
    return LiveSettings(world.settings)


@asynccontextmanager
async def worker(world: Any, stage: str, store: Any, handler: Any, **options: Any) -> AsyncIterator[GroupFeed]:
    """A stage in its consumer group, as a worker runs it."""
    settings, publisher = live(world), Publisher(live(world))

    async def put_state(*_: Any) -> None:
        raise AssertionError

    async def planned(batches: Any) -> Any:
        if options.get("planned"):
            await feed.record_plan(batches)
        return await handler(batches)

    feed = GroupFeed(
        stage, topics.VALIDATED.name, kafka_topic=topics.VALIDATED.full(world.settings.kafka.topic_prefix),
        group=f"{world.settings.kafka.group}-{stage}", live=settings, records_max=lambda: 7, linger_s=lambda: 0.0, flights=1,
        runner=Runner(stage, planned, publisher=publisher, put_state=put_state, live=settings, clock=SystemClock()),
        **{"on_assigned": None} | options,
    )  # fmt: skip
    task = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        task.cancel()
        await asyncio.wait([task])
        await store.close()
        await publisher.on_stop()


def sinking(world: Any) -> Any:
    store = TimescaleStore(live(world))
    sink = ReadingSink("sink", topics.VALIDATED.name, store, Publisher(live(world)).publish, live(world))
    return worker(world, "sink", store, sink, on_assigned=sink.on_assigned)


def syncing(world: Any) -> Any:
    store = ClickHouseStore(live(world))
    sync = ReadingSync(store, live(world))
    return worker(world, "sync", store, sync, planned=True, memory=sync)


async def done(feed: GroupFeed) -> None:
    """All that the topic holds is handled and committed."""

    async def idle() -> bool:
        lanes = list(feed.lanes.values())
        return len(lanes) == PARTITIONS and all(
            lane.known and not lane.busy and (lane.committed if lane.committed is not None else 0) >= (lane.end or 0)
            and lane.end is not None
            for lane in lanes
        )  # fmt: skip

    await until(idle, 60)


async def set_by_kafkas_tools(world: Any, stage: str, offset: int = 0) -> None:
    """What `kafka-consumer-groups.sh --reset-offsets --to-offset … --execute` does."""
    full, group = topics.VALIDATED.full(world.settings.kafka.topic_prefix), f"{world.settings.kafka.group}-{stage}"
    consumer = AIOKafkaConsumer(bootstrap_servers=world.kafka, group_id=group, enable_auto_commit=False)
    await consumer.start()
    tps = [TopicPartition(full, p) for p in range(PARTITIONS)]
    consumer.assign(tps)
    await consumer.commit(dict.fromkeys(tps, (offset, "")))
    await consumer.stop()


async def clickhouse(world: Any, query: str) -> list[tuple[Any, ...]]:
    store = ClickHouseStore(live(world))
    try:
        return await store.query(query)
    finally:
        await store.close()


async def counted(world: Any) -> tuple[int, int, int]:
    """Rows in ClickHouse, those that stay, and what `measurement_days` has counted."""
    return (
        (await clickhouse(world, "SELECT count() FROM measurements"))[0][0],
        (await clickhouse(world, "SELECT count() FROM measurements FINAL"))[0][0],
        (await clickhouse(world, "SELECT sum(rows) FROM measurement_days"))[0][0],
    )


STORED = 2 * MESSAGES // 3 + 2  # t is n % 30, up to the bound of 20


async def test_a_reset_of_syncs_group_by_kafkas_tools_doubles_nothing(world: Any) -> None:
    async with syncing(world) as feed:
        await done(feed)
    assert await counted(world) == (STORED, STORED, STORED)
    await set_by_kafkas_tools(world, "sync")
    with capture_logs() as logs:
        # Other bounds than before: no token tells.
        async with syncing(world) as feed:
            feed._records_max = lambda: 5
            await done(feed)
    assert await counted(world) == (STORED, STORED, STORED)
    (told,) = [line for line in logs if line["event"] == "offsets_set_from_outside"]
    assert (told["stage"], told["action"]) == ("sync", "what is written already is left out")


async def test_a_group_that_was_deleted_doubles_nothing_and_what_is_missing_comes_back(world: Any) -> None:
    group = f"{world.settings.kafka.group}-sync"
    store = ClickHouseStore(live(world))
    try:
        await store.query("SELECT 1")
        await store._client.command("DELETE FROM measurements WHERE device_id = 'd1'")
        await store._client.command(
            "ALTER TABLE measurement_days DELETE WHERE device_id = 'd1' SETTINGS mutations_sync = 1"
        )
    finally:
        await store.close()
    rows, _, days = await counted(world)
    assert rows == days < STORED
    # As a group whose offsets are unknown: another name is as good as deleting it.
    renamed = world.settings.model_copy(
        update={"kafka": world.settings.kafka.model_copy(update={"group": f"{group}-new"})}
    )
    other = SimpleNamespace(settings=renamed, kafka=world.kafka)
    async with syncing(other) as feed:
        await done(feed)
    assert await counted(world) == (STORED, STORED, STORED)


async def test_the_command_sets_syncs_offset_only_while_no_worker_runs(world: Any) -> None:
    plan = await command("replay", "reset", "--stage", "sync", "--to", "earliest", "--dry-run", "--json")
    assert (plan["way"], plan["members"]) == ("group", 0)
    assert plan["records"] == sum(p["again"] for p in plan["partitions"].values()) > 0
    async with syncing(world) as feed:
        await done(feed)
        refused = await command("replay", "reset", "--stage", "sync", "--to", "earliest", "--yes", code=1)
        assert "stop the workers first" in refused.lower()
    said = await command("replay", "reset", "--stage", "sync", "--to", "earliest", "--yes", "--json")
    assert said["records"] == plan["records"]
    again = await command("replay", "reset", "--stage", "sync", "--to", "earliest", "--dry-run", "--json")
    assert {p["now"] for p in again["partitions"].values()} == {0}
    async with syncing(world) as feed:
        await done(feed)
    assert await counted(world) == (STORED, STORED, STORED)


async def test_a_reset_of_the_sinks_group_by_kafkas_tools_says_why_it_does_nothing(world: Any) -> None:
    async with sinking(world) as feed:
        await done(feed)
    await set_by_kafkas_tools(world, "sink")
    with capture_logs() as logs:
        async with sinking(world) as feed:
            await done(feed)
        async with sinking(world) as feed:
            await done(feed)
    (told,) = [line for line in logs if line["event"] == "offsets_set_from_outside"]
    assert set(told["offsets"].values()) == {0}
    assert "preservarium replay reset --stage sink" in told["action"]
    assert (await fetch(world.dsn, "SELECT count(*) FROM measurements"))[0][0] == STORED


async def test_the_command_moves_a_sink_that_runs_and_brings_back_what_is_missing(world: Any) -> None:
    async with sinking(world) as feed:
        await done(feed)
        await fetch(world.dsn, "DELETE FROM measurements WHERE value < 5")
        left = (await fetch(world.dsn, "SELECT count(*) FROM measurements"))[0][0]
        assert left < STORED
        said = await command("replay", "reset", "--stage", "sink", "--to", "earliest", "--yes", "--json")
        assert said["way"] == "database"
        assert said["members"] == 1

        async def whole() -> bool:
            return (await fetch(world.dsn, "SELECT count(*) FROM measurements"))[0][0] == STORED

        await until(whole, 60)
        assert said["taken_up"] is True
    forward = await command("replay", "reset", "--stage", "sink", "--to", "earliest", "--dry-run")
    assert "rows that stand stay as they are" in forward


async def test_moving_forward_needs_a_word_more(world: Any) -> None:
    connection = await asyncpg.connect(world.dsn)
    before = await connection.fetch("SELECT partition, next_offset FROM sink_offsets WHERE sink = 'sink' ORDER BY 1")
    partition = next(row["partition"] for row in before if row["next_offset"] > 1)
    one = ("replay", "reset", "--stage", "sink", "--partition", str(partition), "--yes")
    await command(*one, "--to", "0", "--json")
    # Nobody runs: the position is where it was set.
    assert (
        await connection.fetchval(
            "SELECT next_offset FROM sink_offsets WHERE sink = 'sink' AND partition = $1", partition
        )
        == 0
    )
    assert "would never be stored" in (await command(*one, "--to", "1", code=1)).lower()
    await command(*one, "--to", "1", "--skip", "--json")
    assert (
        await connection.fetchval(
            "SELECT next_offset FROM sink_offsets WHERE sink = 'sink' AND partition = $1", partition
        )
        == 1
    )
    assert "holds offsets 0 to" in await command(*one, "--to", "99999", code=1)
    assert "an offset is of one partition" in await command(
        "replay", "reset", "--stage", "sink", "--to", "5", "--yes", code=1
    )
    await connection.executemany(
        "UPDATE sink_offsets SET next_offset = $2 WHERE sink = 'sink' AND partition = $1",
        [tuple(row) for row in before],
    )
    await connection.close()


async def test_a_new_generation_brings_in_what_a_bound_had_refused(world: Any) -> None:
    refused = await command("replay", "reset", "--stage", "notify", "--to", "earliest", "--yes", code=1)
    assert "notices would be sent again" in refused
    await world.pipeline.register(REGISTRY.replace("max: 20", "max: 50"))
    said = await command("replay", "reset", "--stage", "validate", "--to", "earliest", "--dry-run")
    assert "Setting back the offset of validate would derive nothing" in said
    # Nothing was opened by asking.
    assert await command("replay", "list", "--json") == []
    done_ = await command(
        "replay", "reset", "--stage", "validate", "--to", "earliest", "--yes", "--json", "--actor", "ann"
    )
    assert done_["generation"] == 1
    assert done_["sent"] == {
        "generation": 1,
        "records": MESSAGES,
        "passed": 0,
        "messages": MESSAGES,
        "errors": 0,
        "gone": 0,
    }
    (opened,) = await command("replay", "list", "--json")
    assert (opened["generation"], opened["actor"], opened["records"]) == (1, "ann", MESSAGES)
    assert opened["sent_at"] is not None
    await world.pipeline.fresh(topics.VALIDATED)
    await world.pipeline.run()
    rows = await fetch(world.dsn, "SELECT generation, count(*), max(value) FROM measurements GROUP BY 1")
    assert [tuple(row) for row in rows] == [(1, MESSAGES, 29.0)]
    # The row names the bytes that it came from at first, and comes out of them again.
    verified = await command("lineage", "verify", "--all", "--json")
    assert (verified["checked"], verified["identical"]) == (MESSAGES, MESSAGES)
    # What dashboards count is as it was.
    live_days = await clickhouse(world, "SELECT sum(rows) FROM measurement_days WHERE generation = 0")
    assert live_days[0][0] == STORED
    assert (await counted(world))[1] == MESSAGES


async def test_a_replay_that_was_interrupted_is_gone_on_with_and_counts_nothing_twice(world: Any) -> None:
    first = await command("replay", "reset", "--stage", "normalize", "--to", "earliest", "--yes", "--json")
    number = first["generation"]
    # As if it had been killed before its end was noted.
    async with asyncpg.create_pool(world.dsn, min_size=1, max_size=1) as pool:
        await pool.execute("ALTER TABLE event_store DISABLE TRIGGER USER")
        await pool.execute(
            "DELETE FROM event_store WHERE stream_id = 'replay/generations' AND type = 'sent' AND (data ->> 'generation')::int = $1",
            number,
        )
        await pool.execute("ALTER TABLE event_store ENABLE TRIGGER USER")
    again = await command("replay", "reset", "--stage", "normalize", "--generation", str(number), "--yes", "--json")
    assert again["sent"]["records"] == MESSAGES
    assert "was sent whole" in await command(
        "replay", "reset", "--stage", "normalize", "--generation", str(number), "--yes", code=1
    )
    found = await world.pipeline.fresh(topics.STANDARDIZED)
    sent = [orjson.loads(r.value)["generation"] for records in found.values() for r in records]
    assert sent.count(number) == 2 * MESSAGES
    for (topic, partition), offset in list(world.pipeline._read.items()):
        if topic == topics.STANDARDIZED.name:
            world.pipeline._read[topic, partition] = offset - len(found.get(partition, ()))
    await world.pipeline.run(store=False)
    validated = [
        orjson.loads(line)
        for records in (await world.pipeline.fresh(topics.VALIDATED)).values()
        for record in records
        for line in record.value.split(b"\n")
    ]
    assert len([m for m in validated if m["generation"] == number]) == MESSAGES
