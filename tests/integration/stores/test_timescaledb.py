"""What TimescaleDB alone does: runs where the server has the extension, and says so loudly where it has not.

The traps of compression and retention are those of TimescaleDB 2.18–2.29.
"""

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sink_support import DAY_US, NOW_US, SECOND_US, execute, fetch, live, message, migrated_database, on_server
from thread_support import in_thread

from preservarium.errors import ReasonCode
from preservarium.settings import load
from preservarium.stores import upkeep
from preservarium.stores.migrate import load_files, migrate_postgres
from preservarium.stores.timescale import TimescaleStore

pytestmark = pytest.mark.timescale


@pytest.fixture
def server(postgres: str) -> str:
    """DSN of the maintenance database of a server with the extension."""
    found: list[Any] = []

    async def look() -> None:
        found.extend(await fetch(postgres, "SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb'"))

    in_thread(look())
    if not found:
        pytest.skip("missing: TimescaleDB (give TEST_POSTGRES_URL of a server that has it)")
    return postgres


@pytest.fixture
def dsn(server: str) -> Iterator[str]:
    with migrated_database(server) as made:
        yield made


@pytest.fixture
async def store(dsn: str) -> AsyncIterator[TimescaleStore]:
    made = TimescaleStore(live(postgres={"url": dsn}))
    yield made
    await made.close()


async def compress(dsn: str) -> None:
    await execute(
        dsn,
        "DO $$ DECLARE c regclass; BEGIN FOR c IN SELECT show_chunks('measurements') UNION ALL SELECT show_chunks('rollup_1m') LOOP"
        " PERFORM compress_chunk(c, if_not_compressed => true); END LOOP; END $$",
    )


def at(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


POLICIES = {
    ("policy_compression", "measurements"),
    ("policy_retention", "measurements"),
    ("policy_compression", "rollup_1m"),
    ("policy_retention", "rollup_1m"),
    ("policy_retention", "rollup_1h"),
}


async def jobs(dsn: str) -> dict[tuple[str, str], Any]:
    """Jobs of ours by procedure and table."""
    rows = await fetch(
        dsn,
        "SELECT proc_name, hypertable_name, job_id, config FROM timescaledb_information.jobs WHERE hypertable_name IS NOT NULL",
    )
    return {(row[0], row[1]): tuple(row[2:]) for row in rows}


async def test_the_layout_and_its_jobs(dsn, store):
    assert (await fetch(dsn, "SELECT storage_engine()"))[0][0] == "timescaledb"
    before = await jobs(dsn)
    assert set(before) == POLICIES
    assert await fetch(dsn, "SELECT view_name FROM timescaledb_information.continuous_aggregates") == []
    await store.apply_policies()
    assert await jobs(dsn) == before
    assert await store.failing_jobs() == []


async def test_policies_follow_the_settings_in_their_place(dsn):
    """One that is removed and added again ends its running job, and two at once fail."""
    before = await jobs(dsn)
    sink = {"chunk_days": 2, "compress_after_days": 5, "retention_days": 30}
    stores = [TimescaleStore(live(postgres={"url": dsn}, sink=sink)) for _ in range(4)]
    await asyncio.gather(*(store.apply_policies() for store in stores))
    after = await jobs(dsn)
    assert {key: job_id for key, (job_id, _) in after.items()} == {key: job_id for key, (job_id, _) in before.items()}
    changed = [("policy_compression", "compress_after"), ("policy_retention", "drop_after")]
    for (proc, key), days in zip(changed, (5, 30), strict=True):
        config = after[proc, "measurements"][1]
        assert (await fetch(dsn, "SELECT ($1::jsonb ->> $2)::interval", config, key))[0][0] == timedelta(days=days)
    (width,) = await fetch(
        dsn, "SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'measurements'"
    )
    assert width[0] == timedelta(days=2)
    for store in stores:
        await store.close()


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


async def test_a_back_fill_reaches_the_roll_ups_of_compressed_days(dsn, store):
    await store.write([message("a", 1.0, at=NOW_US - 3600 * SECOND_US)], {})
    await store.maintain()
    await store.write([message("a", float(i), at=NOW_US - 20 * DAY_US + i * 60 * SECOND_US) for i in range(50)], {})
    await store.maintain()
    assert await records(dsn, "bucket < now() - INTERVAL '15 days'") == [50] * 3
    await compress(dsn)
    await store.write([message("a", 9.0, at=NOW_US - 20 * DAY_US + 1)], {})
    await store.maintain()
    assert await records(dsn, "bucket < now() - INTERVAL '15 days'") == [51] * 3


async def test_a_refresh_does_not_delete_what_outlives_its_rows(dsn):
    """What is kept longer than its rows must not be made anew of those that are left."""
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


async def test_several_workers_may_do_upkeep_at_once(dsn, store):
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


# --- jobs that the server does not run


@pytest.fixture
async def unattended(dsn: str) -> str:
    """DSN of a database in which no background worker runs."""
    await execute(dsn, "SELECT _timescaledb_functions.stop_background_workers()")
    return dsn


async def test_overdue_jobs_are_run_by_one_worker(unattended, store):
    await store.write([message("a", float(i), at=NOW_US - 20 * DAY_US + i) for i in range(50)], {})
    await store.maintain()
    assert await store.upkeep.run_overdue(grace_s=30 * 86_400) == []
    others = [TimescaleStore(live(postgres={"url": unattended})) for _ in range(2)]
    ran = await asyncio.gather(*(s.upkeep.run_overdue(grace_s=-86_400) for s in (store, *others)))
    assert sorted(name for names in ran for name in names) == sorted(" ".join(policy) for policy in POLICIES)
    assert (
        await fetch(
            unattended,
            "SELECT FROM measurement_chunks WHERE range_end < now() - INTERVAL '3 days' AND NOT is_compressed",
        )
        == []
    )
    assert await records(unattended) == [50] * 3
    assert await store.failing_jobs() == []
    # They were run now, by whomever: not again.
    assert await store.upkeep.run_overdue(grace_s=600) == []
    for s in others:
        await s.close()


async def test_an_overdue_job_that_fails_is_told_and_holds_up_no_other(unattended, store, monkeypatch):
    monkeypatch.setattr(upkeep, "JOB_LOCK_S", 0.5)
    await store.write([message("a", 1.0)], {})
    await execute(
        unattended,
        "INSERT INTO measurements (series_id, timestamp, received_at, raw_offset, derivation_id, raw_index, raw_partition, quality)"
        " SELECT series_id, now() - INTERVAL '200 days', now(), 0, 1, 0, 0, 1 FROM series",
    )
    reader = await asyncpg.connect(unattended)
    transaction = reader.transaction()
    await transaction.start()
    await reader.fetch("SELECT * FROM measurements")
    assert len(await store.upkeep.run_overdue(grace_s=-86_400)) == len(POLICIES)
    await transaction.rollback()
    await reader.close()
    (job_id, _) = (await jobs(unattended))["policy_retention", "measurements"]
    rows = {
        row[0]: tuple(row[1:])
        for row in await fetch(unattended, "SELECT job, succeeded, message FROM storage_runs WHERE job LIKE 'job %'")
    }
    failed = {job: message for job, (succeeded, message) in rows.items() if not succeeded}
    # A chunk that is read can be neither dropped nor compressed; the roll-ups' chunks can.
    assert (len(rows), len(failed)) == (len(POLICIES), 2)
    assert "lock timeout" in failed[f"job {job_id}"]
    await store.upkeep.run_overdue(grace_s=-86_400)
    assert (await fetch(unattended, "SELECT count(*) FROM measurements"))[0][0] == 1


# --- migration of continuous aggregates


async def test_continuous_aggregates_become_tables_that_hold_what_they_held_and_what_they_lacked(
    server, tmp_path: Path
):
    (tmp_path / "postgres").mkdir()
    for file in load_files("postgres"):
        if file.version < "0016":
            (tmp_path / "postgres" / file.file).write_text(file.text)
    name = f"test_{uuid.uuid4().hex[:12]}"
    await execute(server, f'CREATE DATABASE "{name}"')
    made = on_server(server, name)
    settings = load(postgres={"url": made})
    try:
        await migrate_postgres(settings, directory=tmp_path)
        insert = (
            "INSERT INTO measurements (series_id, timestamp, value, received_at, raw_offset, derivation_id, raw_index, raw_partition, quality)"
            " SELECT s, date_bin('1 hour', now(), '2000-01-01 00:00+00') - INTERVAL '{age}' + i * INTERVAL '1 second', {value}, now(), 0, 1, 0, 0, 1"
            " FROM generate_series(1, 2) AS s, generate_series({first}, {last}) AS i"
        )
        await execute(
            made,
            "INSERT INTO series (device_id, connector_mode, component_type, pin_position, circular)"
            " VALUES ('line', '', 't', '0', NULL), ('circle', '', 't', '0', 360);"
            "INSERT INTO derivations (parser, config_rev) VALUES ('p', 1);"
            "INSERT INTO latest (series_id, timestamp, quality, received_at) SELECT s, now(), 1, now() FROM generate_series(1, 2) AS s;"
            + ";".join(insert.format(age=age, value=90, first=0, last=29) for age in ("40 days", "5 days", "0 days")),
        )
        connection = await asyncpg.connect(made)
        for level in ("rollup_1m", "rollup_1h", "rollup_1d", "rollup_circular_1h"):
            await connection.execute(f"CALL refresh_continuous_aggregate('{level}', NULL, now() - INTERVAL '2 days')")
        await connection.execute("SELECT drop_chunks('measurements', older_than => INTERVAL '30 days')")
        await connection.close()
        await execute(made, insert.format(age="5 days", value=30, first=30, last=39))  # behind the watermark
        await migrate_postgres(settings)
        before = [30, 30, 30]
        held = "SELECT sum(records)::int FROM measurement_{level} WHERE series_id = 1 AND bucket {when}"
        old, lacking = "< now() - INTERVAL '30 days'", "BETWEEN now() - INTERVAL '7 days' AND now() - INTERVAL '3 days'"

        async def all_levels(when: str) -> list[int]:
            return [(await fetch(made, held.format(level=level, when=when)))[0][0] for level in ("1m", "1h", "1d")]

        assert (await all_levels(old), await all_levels(lacking)) == (before, before)
        store = TimescaleStore(live(postgres={"url": made}))
        for _ in range(20):  # of hours that are behind, as many turns as they take
            await store.maintain()
            if await all_levels(lacking) == [40, 40, 40]:
                break
        assert (await all_levels(old), await all_levels(lacking)) == (before, [40, 40, 40])
        assert await store.failing_jobs() == []
        await store.close()
        for level in ("1h", "1d"):
            rows = await fetch(made, f"SELECT n, sin_sum FROM circular_{level} WHERE bucket {old}")
            assert [tuple(row) for row in rows] == [(30, pytest.approx(30))]
            rows = await fetch(made, f"SELECT n, sin_sum FROM circular_{level} WHERE bucket {lacking}")
            assert [tuple(row) for row in rows] == [(40, pytest.approx(35))]
    finally:
        await execute(server, f'DROP DATABASE "{name}" WITH (FORCE)')
