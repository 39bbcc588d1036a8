"""What TimescaleDB alone does: runs where the server has the extension, and says so loudly where it has not.

The traps of continuous aggregates, compression and retention are those of TimescaleDB 2.18–2.29.
"""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from sink_support import DAY_US, NOW_US, SECOND_US, execute, fetch, live, message, on_server
from thread_support import in_thread

from preservarium.errors import ReasonCode
from preservarium.settings import load
from preservarium.stores.migrate import migrate_postgres
from preservarium.stores.timescale import TimescaleStore

pytestmark = pytest.mark.timescale


@pytest.fixture
def dsn(postgres: str) -> Iterator[str]:
    found: list[Any] = []

    async def look() -> None:
        found.extend(await fetch(postgres, "SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb'"))

    in_thread(look())
    if not found:
        pytest.skip("missing: TimescaleDB (give TEST_POSTGRES_URL of a server that has it)")
    name = f"test_{uuid.uuid4().hex[:12]}"
    in_thread(execute(postgres, f'CREATE DATABASE "{name}"'))
    made = on_server(postgres, name)
    in_thread(migrate_postgres(load(postgres={"url": made})))
    yield made
    in_thread(execute(postgres, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[TimescaleStore]:
    made = TimescaleStore(live(postgres={"url": dsn}))
    yield made
    await made.close()


async def compress(dsn: str) -> None:
    await execute(
        dsn,
        "DO $$ DECLARE c regclass; BEGIN FOR c IN SELECT show_chunks('measurements') LOOP"
        " PERFORM compress_chunk(c, if_not_compressed => true); END LOOP; END $$",
    )


async def refresh(dsn: str, level: str, start: datetime | None, end: datetime) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        f"CALL refresh_continuous_aggregate('rollup_{level}', $1::timestamptz, $2::timestamptz)", start, end
    )
    await connection.close()


def at(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


async def test_the_layout_and_its_jobs(dsn, store):
    assert (await fetch(dsn, "SELECT storage_engine()"))[0][0] == "timescaledb"
    jobs = {
        r[0]
        for r in await fetch(
            dsn, "SELECT proc_name FROM timescaledb_information.jobs WHERE hypertable_name IS NOT NULL"
        )
    }
    assert {"policy_compression", "policy_retention", "policy_refresh_continuous_aggregate"} <= jobs
    await store.apply_policies()
    await store.apply_policies()
    assert await store.failing_jobs() == []


async def test_repeated_rows_in_compressed_chunks_change_nothing(dsn, store):
    messages = [message(f"d{i % 300}", float(i), at=NOW_US - i * SECOND_US) for i in range(3000)]
    assert (await store.write(messages, {})).accepted == 3000
    await compress(dsn)
    again = await store.write(messages, {})
    assert (again.accepted, again.duplicates) == (0, 3000)


async def test_a_replay_overwrites_beyond_the_limit_of_decompressed_rows(dsn, store):
    """ON CONFLICT DO UPDATE fails above 100,000 decompressed rows unless the limit is lifted for the transaction."""
    messages = [message(f"d{i % 300}", 1.0, at=NOW_US - i // 300 * SECOND_US) for i in range(120_000)]
    for start in range(0, len(messages), 5000):
        await store.write(messages[start : start + 5000], {})
    await compress(dsn)
    replay = [m | {"generation": 1, "readings": [m["readings"][0] | {"value": 2.0}]} for m in messages[:300]]
    assert (await store.write(replay, {})).accepted == 300
    assert (await fetch(dsn, "SELECT count(*) FROM measurements WHERE value = 2"))[0][0] == 300


async def test_late_rows_are_staged_and_merged_into_compressed_chunks(dsn, store):
    await store.write([message("a", 1.0, at=NOW_US - 5 * DAY_US)], {})
    await store.maintain()
    await compress(dsn)
    result = await store.write([message("a", float(i), at=NOW_US - 5 * DAY_US + i) for i in range(50)], {})
    assert (result.accepted, [(r.message, r.code) for r in result.rejected]) == (49, [(0, ReasonCode.SAME_INSTANT)])
    await store.maintain()
    rows = await fetch(dsn, "SELECT (SELECT count(*) FROM measurements), (SELECT count(*) FROM measurements_late)")
    assert tuple(rows[0]) == (50, 0)


async def test_rows_older_than_the_retention_are_refused_because_a_refresh_would_falsify_the_roll_ups(store):
    result = await store.write([message("a", 1.0, at=NOW_US - 91 * DAY_US)], {})
    assert [r.code for r in result.rejected] == [ReasonCode.LATE_BEYOND_RETENTION]


async def test_history_is_visible_after_a_refresh_and_the_open_bucket_at_once(dsn, store):
    await store.write([message("a", float(i), at=NOW_US - i * 3600 * SECOND_US) for i in range(100)], {})
    await store.maintain()
    past = at(NOW_US - NOW_US % DAY_US)
    for level in ("1m", "1h", "1d"):  # bottom level first, and with an end in the past: never NULL
        await refresh(dsn, level, None, past)
    for level in ("1m", "1h", "1d"):
        assert (await fetch(dsn, f"SELECT sum(records)::bigint FROM measurement_{level}"))[0][0] == 100
    await store.write([message("b", 1.0)], {})
    assert (
        await fetch(dsn, "SELECT count(*) FROM measurement_1m JOIN series USING (series_id) WHERE device_id = 'b'")
    )[0][0] == 1


async def test_monitoring_views_run(dsn, store):
    await store.write([message("a", 1.0)], {})
    await compress(dsn)
    for view in ("recent_activity", "compression_stats", "measurement_chunks", "storage_jobs"):
        await fetch(dsn, f"SELECT * FROM {view}")
    assert (await fetch(dsn, "SELECT count(*) FROM compression_stats WHERE after_bytes IS NOT NULL"))[0][0] >= 1


async def records(dsn: str, where: str = "true") -> list[int]:
    """Rows that each level of the roll-ups knows of."""
    return [
        (await fetch(dsn, f"SELECT coalesce(sum(records), 0)::bigint FROM measurement_{level} WHERE {where}"))[0][0]
        for level in ("1m", "1h", "1d")
    ]


async def test_a_back_fill_reaches_the_roll_ups_though_the_policies_have_passed_it(dsn, store):
    """Late rows lie below the watermark and before every start_offset: without a refresh they stay invisible."""
    await store.write([message("a", 1.0, at=NOW_US - 3600 * SECOND_US)], {})
    await store.maintain()
    await store.write([message("a", float(i), at=NOW_US - 20 * DAY_US + i * 60 * SECOND_US) for i in range(50)], {})
    await store.maintain()
    assert await records(dsn, "bucket < now() - INTERVAL '15 days'") == [50] * 3
    await store.write([message("a", 9.0, at=NOW_US - 20 * DAY_US + 1)], {})
    await store.maintain()
    assert await records(dsn, "bucket < now() - INTERVAL '15 days'") == [51] * 3


async def test_the_open_bucket_stays_visible_after_a_refresh(dsn, store):
    """A refresh to the end moves the watermark past the open bucket, and the newest rows are missing until it closes."""
    await store.write([message("a", 1.0, at=NOW_US - 10 * DAY_US), message("a", 2.0)], {})
    await store.maintain()
    await store.write([message("a", 3.0, at=NOW_US + 1), message("b", 4.0)], {})
    assert await records(dsn) == [4] * 3


async def test_a_refresh_does_not_delete_what_outlives_its_rows(dsn):
    """A refresh over a range whose rows retention has dropped deletes its aggregates at every level."""
    long = TimescaleStore(live(postgres={"url": dsn}))
    await long.write([message("a", float(i), at=NOW_US - 40 * DAY_US + i) for i in range(30)], {})
    await long.maintain()
    await long.close()
    assert await records(dsn) == [30] * 3
    await execute(dsn, "SELECT drop_chunks('measurements', older_than => INTERVAL '30 days')")
    assert (await fetch(dsn, "SELECT count(*) FROM measurements"))[0][0] == 0
    short = TimescaleStore(live(postgres={"url": dsn}, sink={"retention_days": 30}))
    result = await short.write(
        [message("a", 1.0, at=NOW_US - 5 * DAY_US), message("a", 1.0, at=NOW_US - 40 * DAY_US + 7)], {}
    )
    # One late row into the dropped range, refreshed, would stand for its whole day.
    assert [r.code for r in result.rejected] == [ReasonCode.LATE_BEYOND_RETENTION]
    await short.maintain()
    await short.close()
    assert await records(dsn) == [31] * 3


async def test_every_policy_looks_at_two_buckets_and_at_nothing_that_retention_drops(dsn):
    rows = await fetch(
        dsn,
        "SELECT h.view_name, (j.config->>'start_offset')::interval, (j.config->>'end_offset')::interval"
        " FROM timescaledb_information.jobs j JOIN timescaledb_information.continuous_aggregates h"
        " ON j.hypertable_name IN (h.materialization_hypertable_name, h.view_name)"  # which one: by version
        " WHERE j.proc_name = 'policy_refresh_continuous_aggregate'",
    )
    widths = {
        "rollup_1m": timedelta(minutes=1),
        "rollup_1h": timedelta(hours=1),
        "rollup_1d": timedelta(days=1),
        "rollup_circular_1h": timedelta(hours=1),
    }
    assert {r[0] for r in rows} == set(widths)
    retention = timedelta(days=load().sink.retention_days)
    for name, start, end in rows:
        assert start - end >= 2 * widths[name]
        assert start < retention


async def test_several_workers_may_refresh_at_once(dsn, store):
    other = TimescaleStore(live(postgres={"url": dsn}))
    await store.write([message("a", float(i), at=NOW_US - 9 * DAY_US + i) for i in range(20)], {})
    await asyncio.gather(store.maintain(), other.maintain())
    await store.maintain()
    assert await records(dsn) == [20] * 3
    await other.close()


async def test_a_verdict_overwrites_a_row_in_a_compressed_chunk(dsn, store):
    old = NOW_US - 6 * DAY_US
    await store.write([message("a", 1.0, at=old)], {})
    await store.maintain()
    await compress(dsn)
    verdict = {"value": 1.0, "quality": 3, "flags": ["spike"], "timestamp": old, "revised": True}
    result = await store.write([message("a", verdict, at=old + SECOND_US)], {})
    assert result.accepted == 1
    assert [tuple(r) for r in await fetch(dsn, "SELECT quality, revised FROM measurements")] == [(3, True)]


async def test_a_job_that_fails_is_seen(dsn, store):
    """The views of jobs must tell what TimescaleDB keeps silent: the work may be done, and the job yet fail."""
    await execute(
        dsn,
        "CREATE FUNCTION broken(job_id integer, config jsonb) RETURNS void LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'on purpose'; END $$",
    )
    (row,) = await fetch(dsn, "SELECT add_job('broken', INTERVAL '1 hour', initial_start => now())")
    async with asyncio.timeout(60):
        while not any("broken" in job for job in await store.failing_jobs()):
            await asyncio.sleep(0.2)
    await execute(dsn, f"SELECT delete_job({row[0]})")


async def test_a_circular_series_has_vector_means_and_no_extremes_also_far_back(dsn, store):
    far = NOW_US // DAY_US * DAY_US - 30 * DAY_US
    for begin in (far, NOW_US - 120 * SECOND_US):
        await store.write(
            [
                message("a", float((1, 359)[i % 2]), at=begin + i * SECOND_US, circular={"temperature": 360.0})
                for i in range(60)
            ],
            {},
        )
    await store.write([message("b", 5.0, at=far)], {})
    await store.maintain()
    for level in ("1m", "1h", "1d"):
        linear = await fetch(
            dsn,
            f"SELECT s.device_id, r.n, r.sum, r.min, r.max, r.last FROM measurement_{level} r JOIN series s USING (series_id)"
            f" WHERE r.bucket <= '{at(far)}' ORDER BY 1",
        )
        assert [tuple(row) for row in linear] == [("a", 60, None, None, None, 359), ("b", 1, 5, 5, 5, 5)]
        found = await fetch(
            dsn, f"SELECT n, mean, spread, last, cos_sum, sin_sum FROM circular_{level} ORDER BY bucket"
        )
        assert sum(row["n"] for row in found) == 120
        first = found[0]
        assert (first["n"], first["mean"], first["last"], first["sin_sum"]) == (60, 0, 359, 0)
        assert first["spread"] == pytest.approx(1, abs=1e-3)
        assert first["cos_sum"] == pytest.approx(60 * math.cos(math.radians(1)))
