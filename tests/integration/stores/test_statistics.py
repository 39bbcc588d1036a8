"""Views and functions that answer of the roll-ups and by the key what the old service's manual asked all rows for."""

from typing import Any

import pytest
from sink_support import DAY_US, NOW_US, SECOND_US, execute, fetch, live, message

from preservarium.stores.timescale import TimescaleStore

ALL = {
    "device_statistics": "SELECT device_id, count(*) AS total_records, min(timestamp) AS first_record, max(timestamp) AS latest_record"
    " FROM iot_measurements GROUP BY device_id",
    "measurement_statistics": "SELECT device_id, component_type, count(*) AS measurement_count, avg(value) AS avg_value, min(timestamp) AS first_measurement,"
    " max(timestamp) AS last_measurement FROM iot_measurements GROUP BY device_id, component_type",
}  # fmt: skip


async def same(dsn: str) -> None:
    for view, statement in ALL.items():
        mine = sorted(map(tuple, await fetch(dsn, f"SELECT * FROM {view}")))
        rows = sorted(map(tuple, await fetch(dsn, statement)))
        assert [r[:2] for r in mine] == [r[:2] for r in rows]
        for one, other in zip(mine, rows, strict=True):
            assert [v if not isinstance(v, float) else pytest.approx(v) for v in one] == list(other)


@pytest.fixture
async def store(dsn: str) -> Any:
    made = TimescaleStore(live(postgres={"url": dsn}))
    yield made
    await made.close()


async def test_statistics_of_the_roll_ups_are_those_of_the_rows(dsn, store):
    assert await fetch(dsn, "SELECT * FROM series_statistics") == []
    rows = [
        message(f"d{i % 3}", float(i), None if i % 4 else i / 7, at=NOW_US - i * 20_000 * SECOND_US, offset=i)
        for i in range(24)
    ]
    # What stands still is not what is asked for: old days are late, and merged.
    await store.write(rows, {})
    await store.maintain()
    await store.maintain()
    await same(dsn)
    # Of today at once.
    await store.write([message("d9", 1.0, at=NOW_US - SECOND_US), message("d1", 2.0, at=NOW_US - 2 * SECOND_US)], {})
    await same(dsn)


async def test_days_whose_rows_are_dropped_do_not_count(dsn, store):
    await store.write([message("a", 1.0, at=NOW_US - 40 * DAY_US), message("a", 2.0, at=NOW_US - DAY_US)], {})
    await store.maintain()
    await store.maintain()
    if (await fetch(dsn, "SELECT storage_engine() = 'plain'"))[0][0]:
        await execute(dsn, "SELECT drop_partitions(now() - INTERVAL '30 days')")
    else:
        await execute(dsn, "SELECT drop_chunks('measurements', older_than => INTERVAL '30 days')")
    assert (await fetch(dsn, "SELECT sum(records)::int FROM measurement_1d"))[0][0] == 2
    await same(dsn)


async def test_the_newest_readings_of_a_device_are_those_of_the_view(dsn, store):
    await store.write(
        [message(f"d{i % 2}", float(i), -float(i), at=NOW_US - i * 60 * SECOND_US, offset=i) for i in range(60)], {}
    )
    found = await fetch(dsn, "SELECT * FROM newest_readings('d1', 7)")
    view = await fetch(dsn, "SELECT * FROM iot_measurements WHERE device_id = 'd1' ORDER BY timestamp DESC LIMIT 7")
    assert [r.keys() for r in found] == [r.keys() for r in view]
    assert [r["timestamp"] for r in found] == [r["timestamp"] for r in view]
    assert len(await fetch(dsn, "SELECT * FROM newest_readings('d1')")) == 10
    assert await fetch(dsn, "SELECT * FROM newest_readings('nobody')") == []


async def test_who_asks_by_time_reads_no_more_than_that_time(dsn, store):
    """The index by time is there in every chunk and partition, and the planner knows it."""
    await store.write([message("a", *range(20), at=NOW_US - i * 60 * SECOND_US, offset=i) for i in range(600)], {})
    await execute(dsn, "ANALYZE")
    plan = await fetch(
        dsn, "EXPLAIN SELECT count(*) FROM iot_measurements WHERE timestamp > now() - INTERVAL '5 minutes'"
    )
    assert any("measurements_time" in row[0] or "timestamp_idx" in row[0] for row in plan), plan
