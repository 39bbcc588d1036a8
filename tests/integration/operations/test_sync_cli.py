"""`preservarium sync` before real servers: what is told, and the exit codes."""

import asyncio
import json
import sys
from typing import Any

import pytest
from aiohttp import web
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from click.testing import CliRunner
from sink_support import DAY_US, NOW_US, batch, live, message, record

from preservarium.__main__ import cli
from preservarium.operations.compared_tables import MEASUREMENTS
from preservarium.operations.sync_status import settled, status
from preservarium.stages.sync import ReadingSync
from preservarium.stores.base import Move
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.stores.timescale import TimescaleStore
from preservarium.streaming import topics_admin

T = "iot_validated_data"
AT_US = NOW_US - 2 * DAY_US


@pytest.fixture
async def settings(
    dsn: str, kafka: str, clickhouse: str, clickhouse_database: str, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Any:
    values = {
        "postgres": {"url": dsn},
        "clickhouse": {"url": clickhouse, "database": clickhouse_database, "timeout_s": 30},
        "kafka": {"bootstrap_servers": kafka, "topic_prefix": topic_prefix, "group": f"{topic_prefix}g", "partitions": 2},
        "web": {"port": 9},
    }  # fmt: skip
    for section, fields in values.items():
        for name, value in fields.items():
            monkeypatch.setenv(f"PRESERVARIUM_{section}__{name}".upper(), str(value))
    made = live(**values)
    await migrate_clickhouse(made())
    await topics_admin.create(made())
    return made


async def positions(settings: Any, records: int, committed: dict[int, tuple[int, str]]) -> None:
    """Records in the topic, and what the group of sync has committed."""
    kafka = settings().kafka
    full = f"{kafka.topic_prefix}{T}"
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    await producer.start()
    for partition in range(2):
        for _ in range(records):
            await producer.send_and_wait(full, b"x", partition=partition)
    await producer.stop()
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers, group_id=f"{kafka.group}-sync", enable_auto_commit=False)  # fmt: skip
    await consumer.start()
    consumer.assign([TopicPartition(full, p) for p in range(2)])
    await consumer.commit({TopicPartition(full, p): at for p, at in committed.items()})
    await consumer.stop()


async def run(*arguments: str) -> tuple[int, Any]:
    """(exit code, the JSON that was printed); the command has a loop of its own."""
    result = await asyncio.to_thread(CliRunner().invoke, cli, ["sync", *arguments, "--json"])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, json.loads(result.stdout)


async def test_status(settings: Any) -> None:
    await positions(settings, 10, {0: (4, "planned:9|[[0,1,2,3]]"), 1: (7, "")})
    store = ClickHouseStore(settings)
    await ReadingSync(store, settings)([batch(T, 0, [record(0, message("a", 1.0, 2.0, at=AT_US))])])
    await store.close()
    code, told = await run("status")
    stage = next(s for s in told["stages"] if s["stage"] == "sync")
    assert (code, told["healthy"], told["pending"]) == (0, True, [])
    assert (stage["lag"], stage["rows"], stage["exists"], stage["dedup_window"]) == (9, 2, True, 10_000)
    assert stage["partitions"]["0"] == {"committed": 4, "planned": 9, "end": 10}
    assert stage["partitions"]["1"] == {"committed": 7, "planned": None, "end": 10}
    assert stage["last_insert"] is not None
    assert told["breaker"] == "unknown"


async def test_a_table_that_ignores_tokens_is_told(settings: Any) -> None:
    store = ClickHouseStore(settings)
    await store.query("SELECT 1")
    await store._client.command("DROP TABLE alarm_events SYNC")
    await store._client.command("ALTER TABLE measurements RESET SETTING non_replicated_deduplication_window")
    await store.close()
    code, told = await run("status")
    assert (code, told["healthy"]) == (1, False)
    found = {s["stage"]: (s["exists"], s["dedup_window"]) for s in told["stages"]}
    assert (found["sync"], found["sync-alarms"]) == ((True, 0), (False, 0))


async def test_the_breaker_is_asked_of_the_worker_on_this_machine(settings: Any, unused_tcp_port: int) -> None:
    async def ready(_request: web.Request) -> web.Response:
        needs = [{"name": "kafka", "state": "up"}, {"name": "clickhouse", "state": "down", "reason": "refused"}]
        return web.json_response({"ready": False, "dependencies": needs}, status=503)

    application = web.Application()
    application.router.add_get("/ready", ready)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
    try:
        asked = settings().model_copy(update={"web": settings().web.model_copy(update={"port": unused_tcp_port})})
        found = await status(asked)
    finally:
        await runner.cleanup()
    assert (found.breaker, found.breaker_reason) == ("down", "refused")


async def test_verify_and_repair(settings: Any) -> None:
    postgres, store = TimescaleStore(settings), ClickHouseStore(settings)
    lines = [message(f"d{i}", float(i), at=AT_US + i, offset=i) for i in range(20)]
    await postgres.write(lines, {})
    await ReadingSync(store, settings)([batch(T, 0, [record(0, *lines[:15])])])
    await store.close()
    await postgres.close()
    code, told = await run("verify", "--table", "measurements")
    assert (code, told["same"], told["differing"], {d["what"] for d in told["differences"]}) == (
        1,
        False,
        5,
        {"missing"},
    )
    code, told = await run("verify", "--repair")
    assert (code, told["same"], told["repaired"]) == (0, True, 5)
    assert (await run("verify"))[0] == 0


async def test_rebuild(settings: Any) -> None:
    postgres = TimescaleStore(settings)
    await postgres.write([message(f"d{i}", float(i), at=AT_US + i, offset=i) for i in range(20)], {})
    await postgres.close()
    day = f"{(AT_US // DAY_US):d}"
    from datetime import date, timedelta

    text = str(date(1970, 1, 1) + timedelta(days=int(day)))
    code, told = await run("rebuild", "--table", "measurements", "--from", text, "--to", text)
    assert (code, told["verdict"]["same"]) == (0, True)
    assert told["partitions"] == {"measurements": {text.replace("-", ""): 20}}


async def test_settled_means_that_the_sink_has_what_sync_had(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["preservarium.operations.sync_status"], "SETTLE_WAIT_S", 0.6)
    assert await settled(settings(), MEASUREMENTS)
    await positions(settings, 10, {0: (4, "planned:9"), 1: (7, "")})
    assert not await settled(settings(), MEASUREMENTS)
    postgres = TimescaleStore(settings)
    await postgres.write([message("a", 1.0)], {(T, 0): Move(None, 8), (T, 1): Move(None, 7)})
    assert not await settled(settings(), MEASUREMENTS)  # the batch that was planned may be written
    await postgres.write([message("a", 1.0)], {(T, 0): Move(8, 9)})
    assert await settled(settings(), MEASUREMENTS)
    await postgres.close()
    gone = settings().model_copy(
        update={"kafka": settings().kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9"})}
    )
    assert not await settled(gone, MEASUREMENTS)
