"""What TimescaleDB alone does: runs where the server has the extension, and says so loudly where it has not.

The traps of continuous aggregates, compression and retention are those of TimescaleDB 2.18–2.29.
"""

import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from sink_support import DAY_US, NOW_US, SECOND_US, execute, fetch, in_thread, live, message, on_server

from preservarium.domain.errors import ReasonCode
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
    await connection.execute(f"CALL refresh_continuous_aggregate('measurement_{level}', $1, $2)", start, end)
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
    assert result.accepted + result.duplicates == 50
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
