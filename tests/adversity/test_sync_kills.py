"""Kill -9 between an insert into ClickHouse and its acknowledgement: afterwards every row is there once, without merging."""

import asyncio
import json
import os
import sys
from pathlib import Path

import orjson
import pytest
from aiokafka import AIOKafkaProducer
from sink_support import NOW_US, live, message
from worker_support import ROOT, make_topics

from preservarium import topics
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.migrate import migrate_clickhouse

PARTITIONS = 4
HERE = Path(__file__).parent


async def produce(kafka: str, prefix: str, messages: int) -> list[int]:
    """Messages of two readings, some sent twice as a stage before would after a crash; where each partition ends."""
    ends = []
    producer = AIOKafkaProducer(bootstrap_servers=kafka, linger_ms=20)
    await producer.start()
    try:
        for partition in range(PARTITIONS):
            lines = [
                orjson.dumps(
                    message(f"d{partition}{i % 7}", float(i), 1.5, at=NOW_US + i, offset=i, raw_partition=partition)
                )
                for i in range(messages)
            ]
            for i in range(37, messages, 211):
                lines[i:i] = lines[i - 20 : i]
            ends.append(len(lines))
            await asyncio.gather(
                *[await producer.send(topics.VALIDATED.full(prefix), line, b"k", partition) for line in lines]
            )
    finally:
        await producer.stop()
    return ends


async def kill_and_check(kafka: str, clickhouse: str, prefix: str, groups: int, kills: int, seed: int) -> int:
    await make_topics(kafka, prefix, PARTITIONS, [topics.VALIDATED])
    # A life acknowledges two batches at most, so this is never used up before the last.
    records_max = 20
    messages = max(500, kills * 2 * records_max // PARTITIONS * 2)
    ends = await produce(kafka, prefix, messages)
    rows = PARTITIONS * messages * 2
    databases = [f"{prefix.strip('.')}_{i}" for i in range(groups)]
    stores = []
    for database in databases:
        settings = live(clickhouse={"url": clickhouse, "database": database})
        await migrate_clickhouse(settings())
        stores.append(ClickHouseStore(settings))
    plan = {
        "groups": databases, "kills": kills, "kafka": kafka, "prefix": prefix, "clickhouse": clickhouse, "seed": seed,
        "ends": ends, "records_max": records_max,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(HERE / "sync_kills.py"), json.dumps(plan),
        stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"},
    )  # fmt: skip
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 120 + kills * 40)
    finally:
        if process.returncode is None:
            process.kill()
    ended = json.loads(out.splitlines()[-1])
    assert ended == {"killed": groups * kills, "done": groups}
    for store, database in zip(stores, databases, strict=True):
        (found,) = await store.query(
            "SELECT count(), uniqExact(raw_partition, raw_offset, pin_position), (SELECT count() FROM measurements FINAL),"
            " (SELECT sum(rows) FROM measurement_days) FROM measurements"
        )
        assert tuple(found) == (rows, rows, rows, rows), database
        await store._client.command(f"DROP DATABASE {database} SYNC")
        await store.close()
    return ended["killed"]


async def test_a_sample_of_kills(kafka, clickhouse, topic_prefix):
    assert await kill_and_check(kafka, clickhouse, topic_prefix, groups=4, kills=2, seed=1) == 8


@pytest.mark.slow
async def test_two_hundred_kills(kafka, clickhouse, topic_prefix, capsys):
    killed = await kill_and_check(kafka, clickhouse, topic_prefix, groups=10, kills=20, seed=2)
    with capsys.disabled():
        print(f"\n  killed {killed} times between insert and acknowledgement: no row twice, none missing")
    assert killed == 200
