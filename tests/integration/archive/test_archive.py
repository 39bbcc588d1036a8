"""The archive on a real Kafka: what it has deleted is read, traced and replayed as if it had not."""

import asyncio
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic, RecordsToDelete
from archive_support import archived, execute
from lineage_support import PARTITIONS, Pipeline, command, environment, pipeline
from sink_support import fetch, migrated_database
from thread_support import in_thread
from worker_support import read_all

from preservarium import metrics, topics
from preservarium.operations.archive.archiver import Archiver
from preservarium.operations.raw_records import Records, source_of
from preservarium.settings import load
from preservarium.stores.archive_files import ArchivedRecord
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.streaming.records import raw_line
from preservarium.streaming.stage import Send

pytestmark = pytest.mark.kafka

NOW_US = time.time_ns() // 1_000_000_000 * 1_000_000
MESSAGES = 60
STORED = 2 * MESSAGES // 3 + 2  # t is n % 30, up to the bound of 20
REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes:
  - {name: t, kind: number, unit: degC, fail_span: {min: -40, max: 20}}
parsers: [{name: acme, kind: json, source: {fields: [{name: t, path: t}]}}]
device_types: [{name: T1, manufacturer: Acme, parser: acme}]
devices: [{device_id: d0, type: T1}, {device_id: d1, type: T1}, {device_id: d2, type: T1}, {device_id: d3, type: T1}]
"""
RAW = topics.RAW.name


class World:
    """A system of its own: topics, a database, an archive in a folder."""

    def __init__(self, made: Pipeline, dsn: str, kafka: str, folder: Path) -> None:
        self.pipeline = made
        self.dsn = dsn
        self.kafka = kafka
        self.folder = folder
        self.settings = made.settings
        self.full = topics.RAW.full(made.settings.kafka.topic_prefix)

    async def raw(self) -> dict[tuple[int, int], tuple[Any, ...]]:
        """What Kafka has, by coordinates."""
        return {
            (r.partition, r.offset): (r.timestamp, r.key, r.value, tuple(r.headers))
            for r in await read_all(self.kafka, self.full, PARTITIONS)
        }

    async def send(self, count: int) -> None:
        """Records of every kind that a topic may hold."""
        producer = AIOKafkaProducer(bootstrap_servers=self.kafka)
        await producer.start()
        sent = []
        for n in range(count):
            value = (
                b"\x00\xff" * n,
                raw_line("d1", {"t": n}, received_at=NOW_US + n, connector="test", mode="LAN"),
                None,
                b"line\nline",
            )
            headers = ((), (("attempt", b"2"),), (("x", b""), ("x", b"\xff")))[n % 3]
            sent.append(
                await producer.send(self.full, value[n % 4], (b"k", None)[n % 2], n % PARTITIONS, headers=list(headers))
            )
        await asyncio.gather(*sent)
        await producer.stop()

    async def delete(self, before: int | None = None) -> None:
        """What retention does: delete raw records, all or those before an offset."""
        async with Records(self.settings, archived=False) as records:
            ends = {p: (await records.span(self.full, p)).end for p in range(PARTITIONS)}  # type: ignore[union-attr]
        admin = AIOKafkaAdminClient(bootstrap_servers=self.kafka)
        await admin.start()
        wanted = {
            TopicPartition(self.full, p): RecordsToDelete(before_offset=end if before is None else min(before, end))
            for p, end in ends.items()
        }
        await admin.delete_records(wanted)
        await admin.close()

    async def archived(self) -> dict[tuple[int, int], tuple[Any, ...]]:
        """What the files have, by coordinates."""
        return {at: tuple(r)[1:] for at, r in archived(self.folder).items()}


@pytest.fixture(scope="module")
def database(postgres: str) -> Iterator[str]:
    with migrated_database(postgres) as dsn:
        yield dsn


@pytest.fixture
def world(kafka: str, database: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """Topics and an archive of the test's own; ClickHouse where the test asks for it."""
    house = request.getfixturevalue("clickhouse") if "clickhouse" in request.fixturenames else ""
    variables = environment(kafka, f"t{uuid.uuid4().hex[:10]}.", database, house, f"test_{uuid.uuid4().hex[:12]}") | {
        "PRESERVARIUM_ARCHIVE__URL": str(tmp_path / "archive"),
        "PRESERVARIUM_DATA_DIR": str(tmp_path / "state"),
    }
    if not house:
        variables |= {"PRESERVARIUM_CLICKHOUSE__URL": "http://127.0.0.1:1", "PRESERVARIUM_CLICKHOUSE__ENABLED": "false"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        made = World(pipeline(tmp_path), database, kafka, tmp_path / "archive")
        in_thread(made.pipeline.create())
        in_thread(execute(database, "TRUNCATE archive_segments, archive_positions, archive_gaps"))
        yield made
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


async def run() -> Any:
    return await command("archive", "run", "--json")


async def test_records_are_archived_once_and_read_as_if_kafka_still_had_them(world: World) -> None:
    await world.send(50)
    before = metrics.ARCHIVE_RECORDS.labels(RAW)._value.get()
    first = await run()
    assert first["records"] == 50
    assert metrics.ARCHIVE_RECORDS.labels(RAW)._value.get() == before + 50
    assert (await run())["records"] == 0
    await world.send(20)
    # What is not due waits.
    archiver = Archiver(load)
    assert (await archiver.turn()).records == 0
    assert (await archiver.turn(now=True)).records == 20
    await archiver.close()
    kafka = await world.raw()
    assert len(kafka) == 70
    assert await world.archived() == kafka

    await world.send(7)
    kafka = await world.raw()
    await world.delete(before=20)
    async with Records(world.settings) as records:
        for p in range(PARTITIONS):
            span = await records.span(world.full, p)
            assert span is not None
            assert (span.begin, span.kafka) == (0, 20)
            found = [r async for some in records.between(world.full, p, 3, span.end) for r in some]
            assert {(p, r.offset): (r.timestamp, r.key, r.value, tuple(r.headers)) for r in found} == {
                at: r for at, r in kafka.items() if at[0] == p and at[1] >= 3
            }
            assert [r.offset for r in found] == list(range(3, span.end))
            assert {source_of(r) for r in found if r.offset < 20} == {"archive"}
            some = await records.at(world.full, p, [1, 19, 20, 21, 9_999])
            assert sorted(some) == [1, 19, 20, 21]
            assert isinstance(some[19], ArchivedRecord)
            at_us = kafka[p, 5][0] * 1_000
            since = await records.since(world.full, [p], at_us)
            assert since[p] == min(o for (q, o), r in kafka.items() if q == p and r[0] * 1_000 >= at_us)
            assert (await records.since(world.full, [p], at_us + 3_600_000_000))[p] == span.end
    checked = await command("archive", "verify", "--json")
    assert (checked["whole"], checked["files"], checked["records"]) == (True, 2 * PARTITIONS, 70)
    said = await command("archive", "status", "--json")
    assert said["topics"][0] | {"from": 0, "to": 0, "value_bytes": 0, "file_bytes": 0, "from_iso": "", "to_iso": ""} == {
        "topic": RAW, "epoch": 0, "partitions": PARTITIONS, "files": 2 * PARTITIONS, "records": 70, "value_bytes": 0, "file_bytes": 0,
        "from": 0, "to": 0, "gaps": 0, "lost": 0, "from_iso": "", "to_iso": "",
    }  # fmt: skip
    assert (said["lags"][0]["records"], said["lags"][0]["about_to_be_lost"]) == (7, 0)
    assert "3 files" not in await command("archive", "status")


async def test_records_are_restored_to_a_topic_and_to_another_place(world: World, tmp_path: Path) -> None:
    await world.send(30)
    await run()
    await world.delete()
    refused = await command("archive", "restore", "--to-topic", world.full, "--yes", code=1)
    assert "preservarium replay reset" in refused
    assert "make it first" in await command("archive", "restore", "--to-topic", "nowhere", "--yes", code=1)
    target = f"{world.full}-again"
    admin = AIOKafkaAdminClient(bootstrap_servers=world.kafka)
    await admin.start()
    await admin.create_topics([NewTopic(target, PARTITIONS, 1)])
    await admin.close()
    dry = await command("archive", "restore", "--to-topic", target, "--dry-run", "--json")
    assert (dry["files"], dry["records_at_most"], dry["restored"]) == (PARTITIONS, 30, None)
    done = await command("archive", "restore", "--to-topic", target, "--partition", "1", "--yes", "--json")
    assert done["restored"]["records"] == 10
    archived = await world.archived()
    found = await read_all(world.kafka, target, PARTITIONS)
    for record in found:
        origin = dict(record.headers)["archived_from"].decode()
        partition, offset = (int(part) for part in origin.split(":"))
        assert archived[partition, offset] == (
            record.timestamp, record.key, record.value, tuple(h for h in record.headers if h[0] != "archived_from"),
        )  # fmt: skip
    assert sorted(int(dict(r.headers)["archived_from"].split(b":")[1]) for r in found) == list(range(10))
    place = tmp_path / "elsewhere"
    copied = await command("archive", "restore", "--to-place", str(place), "--yes", "--json")
    assert (copied["restored"]["files"], copied["restored"]["there"]) == (PARTITIONS, 0)
    again = await command("archive", "restore", "--to-place", str(place), "--yes", "--json")
    assert (again["restored"]["files"], again["restored"]["there"]) == (0, PARTITIONS)
    for path in world.folder.rglob("*.parquet"):
        assert (place / path.relative_to(world.folder)).read_bytes() == path.read_bytes()
    assert "is the archive itself" in await command(
        "archive", "restore", "--to-place", str(world.folder), "--yes", code=1
    )


async def test_a_day_that_kafka_has_deleted_is_replayed_through_to_both_stores(world: World, clickhouse: str) -> None:
    await migrate_clickhouse(world.settings)
    await world.pipeline.register(REGISTRY)
    sends = []
    for n in range(MESSAGES):
        at = NOW_US - 3_600_000_000 + n * 1_000_000
        line = raw_line(f"d{n % 4}", {"t": n % 30}, received_at=at, connector="test", mode="LAN")
        sends.append(Send(topics.RAW, f"d{n % 4}".encode(), line))
    await world.pipeline.send(sends)
    await world.pipeline.run()
    coordinates = (
        "SELECT device_id, timestamp, raw_partition, raw_offset, raw_index FROM iot_measurements ORDER BY 1, 2"
    )
    before = [tuple(row) for row in await fetch(world.dsn, coordinates)]
    assert len(before) == STORED
    assert (await run())["records"] == MESSAGES
    await world.delete()
    assert await world.raw() == {}

    # Where a number comes from is told all the same, and it comes out of its bytes again.
    at = NOW_US - 3_600_000_000
    traced = await command("trace", "--device", "d0", "--type", "t", "--at", str(at), "--json")
    assert (traced["raw"]["source"], traced["raw"]["available"]) == ("archive", True)
    assert traced["rederivation"]["status"] == "identical"
    assert ", from the archive" in await command("trace", "--device", "d0", "--type", "t", "--at", str(at))
    place = traced["raw"]
    forward = await command("trace", "--raw", f"{place['partition']}:{place['offset']}", "--json")
    assert (forward["raw"]["source"], len(forward["messages"][0]["readings"])) == ("archive", 1)
    verified = await command("lineage", "verify", "--all", "--json")
    assert (verified["checked"], verified["identical"]) == (STORED, STORED)
    sampled = await command("lineage", "verify", "--sample", "20", "--json")
    assert sampled["same"]

    # The bound was wrong: the day is derived anew.
    await world.pipeline.register(REGISTRY.replace("max: 20", "max: 50"))
    said = await command("replay", "reset", "--stage", "normalize", "--to", "2h", "--dry-run")
    assert f"{MESSAGES} of these records are Kafka's no more and come from the archive" in said
    done = await command("replay", "reset", "--stage", "normalize", "--to", "2h", "--yes", "--json")
    assert done["sent"] == {
        "generation": 1, "records": MESSAGES, "passed": 0, "messages": MESSAGES, "errors": 0, "archived": MESSAGES, "gone": 0,
    }  # fmt: skip
    await world.pipeline.run()
    after = [tuple(row) for row in await fetch(world.dsn, coordinates)]
    assert len(after) == len(set(after)) == MESSAGES
    assert set(before) <= set(after)
    rows = await fetch(world.dsn, "SELECT generation, count(*), max(value) FROM measurements GROUP BY 1")
    assert [tuple(row) for row in rows] == [(1, MESSAGES, 29.0)]
    store = ClickHouseStore(lambda: world.settings)
    try:
        counted = await store.query("SELECT count(), max(generation), max(value) FROM measurements FINAL")
        assert counted == [(MESSAGES, 1, 29.0)]
    finally:
        await store.close()
    verified = await command("lineage", "verify", "--all", "--json")
    assert (verified["checked"], verified["identical"]) == (MESSAGES, MESSAGES)
    # Interrupted and gone on with, from the archive: nothing doubles.
    async with asyncpg.create_pool(world.dsn, min_size=1, max_size=1) as pool:
        await pool.execute("ALTER TABLE event_store DISABLE TRIGGER USER")
        await pool.execute("DELETE FROM event_store WHERE stream_id = 'replay/generations' AND type = 'sent'")
        await pool.execute("ALTER TABLE event_store ENABLE TRIGGER USER")
    again = await command("replay", "reset", "--stage", "normalize", "--generation", "1", "--yes", "--json")
    assert again["sent"]["archived"] == MESSAGES
    await world.pipeline.run()
    assert [tuple(row) for row in await fetch(world.dsn, coordinates)] == after
