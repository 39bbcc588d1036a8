"""Every query that the replaced sink service documented runs on our schema.

Copied from its manual; where a statement could never run, or ran and was wrong, its correction stands here with the
reason. Statements that only TimescaleDB knows run where it is installed.
"""

import time
from collections.abc import Iterator

import pytest
from sink_support import SECOND_US, fetch, live, message, migrated_database

from preservarium.stores.timescale import TimescaleStore

QUERIES = {
    "query recent measurements": """
        SELECT * FROM iot_measurements
        WHERE timestamp > NOW() - INTERVAL '1 hour'
        ORDER BY timestamp DESC LIMIT 100;""",
    "query performance statistics": """
        SELECT
            device_id,
            component_type,
            COUNT(*) as measurement_count,
            AVG(value) as avg_value,
            MIN(timestamp) as first_measurement,
            MAX(timestamp) as last_measurement
        FROM iot_measurements
        GROUP BY device_id, component_type
        ORDER BY measurement_count DESC;""",
    "recent data ingestion rate": """
        SELECT
            date_trunc('minute', timestamp) AS minute,
            COUNT(*) AS records_per_minute
        FROM iot_measurements
        WHERE timestamp > NOW() - INTERVAL '1 hour'
        GROUP BY minute
        ORDER BY minute DESC
        LIMIT 10;""",
    "data distribution by device": """
        SELECT
            device_id,
            COUNT(*) AS total_records,
            MIN(timestamp) AS first_record,
            MAX(timestamp) AS latest_record
        FROM iot_measurements
        GROUP BY device_id
        ORDER BY total_records DESC;""",
    "latest readings for a device": """
        SELECT * FROM iot_measurements
        WHERE device_id = 'f2-e4fd45f654be'
        ORDER BY timestamp DESC
        LIMIT 10;""",
    "average temperature over last hour": """
        SELECT
            date_trunc('minute', timestamp) AS minute,
            AVG(value) AS avg_temp
        FROM iot_measurements
        WHERE component_type = 'Temperature'
          AND timestamp > NOW() - INTERVAL '1 hour'
        GROUP BY minute
        ORDER BY minute;""",
    "device activity summary": """
        SELECT
            device_id,
            component_type,
            COUNT(*) AS readings,
            AVG(value) AS avg_value,
            MIN(value) AS min_value,
            MAX(value) AS max_value
        FROM iot_measurements
        WHERE timestamp > NOW() - INTERVAL '24 hours'
        GROUP BY device_id, component_type
        ORDER BY device_id, component_type;""",
    "check for data gaps": """
        SELECT
            device_id,
            component_type,
            timestamp,
            LAG(timestamp) OVER (PARTITION BY device_id, component_type ORDER BY timestamp) AS prev_timestamp,
            timestamp - LAG(timestamp) OVER (PARTITION BY device_id, component_type ORDER BY timestamp) AS gap
        FROM iot_measurements
        WHERE timestamp > NOW() - INTERVAL '1 hour'
        ORDER BY device_id, component_type, timestamp;""",
    "check for invalid values": """
        SELECT
            device_id,
            component_type,
            COUNT(*) AS total,
            COUNT(value) AS valid_values,
            COUNT(*) - COUNT(value) AS null_values
        FROM iot_measurements
        WHERE timestamp > NOW() - INTERVAL '1 hour'
        GROUP BY device_id, component_type;""",
    # Was a view over the raw rows with no upper bound (rows dated 2099 came first); ours reads the 1-minute roll-up.
    "view recent_activity": "SELECT minute, device_id, records FROM recent_activity ORDER BY minute DESC;",
    # Read columns that do not exist; ours is made of the functions that do.
    "view compression_stats": "SELECT chunk_name, before_bytes, after_bytes, after_pct FROM compression_stats;",
    # Asked timescaledb_information for compressed_chunk_id, which it does not have.
    "check chunk information": """
        SELECT name, range_start, range_end, is_compressed
        FROM measurement_chunks ORDER BY range_start DESC LIMIT 10;""",
    # Did not count chunks or partitions: 40 kB for 3 MB.
    "view database size": """
        SELECT sum(pg_total_relation_size(c.oid)) AS bytes FROM pg_class c
        JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'public' AND c.relkind IN ('r', 'm');""",
    "check active connections": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database();",
    "check for constraint violations": "SELECT * FROM pg_stat_activity WHERE state = 'active';",
}


@pytest.fixture(scope="module")
def dsn(postgres: str) -> Iterator[str]:
    with migrated_database(postgres) as made:
        yield made


@pytest.fixture(scope="module")
def now_us() -> int:
    """Now, when these tests begin: the queries look back from the server's clock, however late in a run that is."""
    return time.time_ns() // 1000


@pytest.fixture
async def filled(dsn: str, now_us: int) -> str:
    store = TimescaleStore(live(postgres={"url": dsn}))
    reading = {"component_type": "Temperature", "pin_position": "-1"}
    await store.write(
        [
            message(device, reading | {"value": float(i)}, at=now_us - i * 60 * SECOND_US)
            for device in ("f2-e4fd45f654be", "f2-e4fd45f654bf")
            for i in range(30)
        ],
        {},
    )
    await store.maintain()
    await store.close()
    return dsn


@pytest.mark.parametrize("name", QUERIES)
async def test_documented_query(filled, name):
    assert await fetch(filled, QUERIES[name])


async def test_the_old_columns_come_first_in_their_order(filled):
    row = (await fetch(filled, "SELECT * FROM iot_measurements LIMIT 1"))[0]
    assert list(row.keys())[:8] == [
        "timestamp", "device_id", "connector_mode", "component_type", "pin_position", "value", "unit", "topic",
    ]  # fmt: skip


async def test_answers_are_right(filled):
    rows = await fetch(filled, QUERIES["device activity summary"])
    assert [tuple(r)[2:] for r in rows] == [(30, 14.5, 0.0, 29.0)] * 2
    assert [r["records"] for r in await fetch(filled, QUERIES["view recent_activity"])] == [1] * 60
    gaps = {r["gap"] for r in await fetch(filled, QUERIES["check for data gaps"])}
    assert {None if g is None else g.total_seconds() for g in gaps} == {None, 60.0}
