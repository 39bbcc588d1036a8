"""The service that this replaces, taken over: its database recognised, its readers and writers served, its rows carried over.

Runs on plain PostgreSQL, and on TimescaleDB where the server has it.
"""

import asyncio
import csv
import io
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from sink_support import execute, fetch, leave_alone, live, message, migrated_database, on_server
from thread_support import in_thread

from preservarium.settings import load
from preservarium.stores import adoption
from preservarium.stores.adoption import Adoption, AdoptionError
from preservarium.stores.migrate import MigrationError, former, migrate_postgres
from preservarium.stores.timescale import TimescaleStore

TABLE = """
CREATE TABLE IF NOT EXISTS iot_measurements (
    timestamp TIMESTAMPTZ NOT NULL,
    device_id VARCHAR(50) NOT NULL,
    connector_mode VARCHAR(50) NOT NULL,
    component_type VARCHAR(50) NOT NULL,
    pin_position VARCHAR(10),
    value DOUBLE PRECISION,
    unit VARCHAR(20),
    topic VARCHAR(255),
    PRIMARY KEY (timestamp, device_id, connector_mode, component_type, pin_position));
"""
HYPERTABLE = """
SELECT create_hypertable('iot_measurements', 'timestamp', if_not_exists => TRUE);
ALTER TABLE iot_measurements SET (timescaledb.compress, timescaledb.compress_segmentby = 'device_id,component_type',
  timescaledb.compress_orderby = 'timestamp DESC');
-- Not at once: what they do is not what is tried here.
SELECT add_compression_policy('iot_measurements', INTERVAL '1 day', initial_start => now() + INTERVAL '1 day');
SELECT add_retention_policy('iot_measurements', INTERVAL '30 days', initial_start => now() + INTERVAL '1 day');
"""
INDEXES = """
CREATE INDEX IF NOT EXISTS idx_iot_device_id ON iot_measurements (device_id, timestamp DESC);
CREATE INDEX IF NOT EXISTS idx_iot_component ON iot_measurements (component_type, timestamp DESC);
CREATE INDEX IF NOT EXISTS idx_iot_mode ON iot_measurements (connector_mode, timestamp DESC);
CREATE VIEW recent_activity AS SELECT date_trunc('minute', timestamp) AS minute, device_id, COUNT(*) AS records
  FROM iot_measurements WHERE timestamp > NOW() - INTERVAL '1 hour' GROUP BY minute, device_id ORDER BY minute DESC;
CREATE VIEW warm AS SELECT device_id, timestamp, value FROM iot_measurements WHERE value > 20;
CREATE VIEW "Warm devices" AS SELECT DISTINCT device_id FROM warm;
CREATE MATERIALIZED VIEW frozen AS SELECT device_id, count(*) AS n FROM iot_measurements GROUP BY 1;
"""
#: 6,000 rows of ten days, and what an old table may hold besides.
ROWS = """
INSERT INTO iot_measurements
SELECT date_bin('1 second', now(), '2000-01-01') - i * INTERVAL '144 seconds', 'f2-' || i % 7, 'LoRaWAN', 'Temperature', '-1', i % 40, '°C', 'a/b'
FROM generate_series(1, 6000) AS i;
INSERT INTO iot_measurements VALUES
  (now() - INTERVAL '3 hours', 'f2-0', 'LoRaWAN', 'Temperature', '2', NULL, NULL, NULL),
  (now() - INTERVAL '3 hours', 'f2-0', 'LoRaWAN', 'Temperature', '3', 'NaN', '', ''),
  (now() - INTERVAL '2 hours', 'f2-0', 'LoRaWAN', 'Temperature', '3', 1, 'K', 'other'),
  ('infinity', 'f2-0', 'LoRaWAN', 'Temperature', '3', 1, '', ''),
  ('1970-01-01 00:00+00', 'f2-0', 'LoRaWAN', 'Temperature', '3', 1, '', '');
"""
REFUSED = 3


async def has_timescale(maintenance: str) -> bool:
    return bool(await fetch(maintenance, "SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb'"))


async def make_old(maintenance: str, dsn: str) -> bool:
    """The old service's database; whether its table is a hypertable."""
    hyper = await has_timescale(maintenance)
    if hyper:
        await execute(dsn, "CREATE EXTENSION IF NOT EXISTS timescaledb")
    await execute(dsn, TABLE + (HYPERTABLE if hyper else "") + INDEXES)
    await execute(dsn, ROWS)
    return hyper


@pytest.fixture
def old(postgres: str) -> Iterator[str]:
    """DSN of a database of the old service."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    in_thread(execute(postgres, f'CREATE DATABASE "{name}"'))
    dsn = on_server(postgres, name)
    try:
        in_thread(make_old(postgres, dsn))
        yield dsn
    finally:
        in_thread(execute(postgres, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@pytest.fixture(scope="module")
def template(postgres: str) -> Iterator[str]:
    """Name of a database of the old service that was migrated, to be copied."""
    name = f"former_{uuid.uuid4().hex[:12]}"
    in_thread(execute(postgres, f'CREATE DATABASE "{name}"'))
    in_thread(make_old(postgres, on_server(postgres, name)))
    in_thread(migrate_postgres(load(postgres={"url": on_server(postgres, name)})))
    in_thread(leave_alone(postgres, name))
    yield name
    in_thread(execute(postgres, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@pytest.fixture
def migrated(postgres: str, template: str) -> Iterator[str]:
    """DSN of a database of the old service that was migrated."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    in_thread(execute(postgres, f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    yield on_server(postgres, name)
    in_thread(execute(postgres, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


@pytest.fixture
async def session(migrated: str) -> AsyncIterator[Any]:
    """A connection to the old service's database, migrated."""
    connection = await asyncpg.connect(migrated)
    yield connection
    await connection.close()


async def adopted(connection: Any, **sink: Any) -> Adoption:
    return await Adoption.of(connection, load(sink=sink))


COMPARED = """
SELECT count(*) FROM iot_measurements_old o FULL JOIN iot_measurements n
  ON (n.timestamp, n.device_id, n.connector_mode, n.component_type, n.pin_position)
   = (o.timestamp, o.device_id, o.connector_mode, o.component_type, o.pin_position)
WHERE (n.value, n.unit, n.topic) IS DISTINCT FROM (o.value, coalesce(o.unit, ''), coalesce(o.topic, ''))
  AND NOT EXISTS (SELECT FROM iot_measurements_refused r WHERE (r.original ->> 'timestamp')::timestamptz = o.timestamp)"""


# --- the database is recognised


async def test_the_old_database_is_migrated_and_its_views_and_rights_go_over(postgres, old):
    role = f"reader_{uuid.uuid4().hex[:8]}"
    await execute(postgres, f'CREATE ROLE "{role}"')
    try:
        await execute(old, f'GRANT SELECT, INSERT ON iot_measurements TO "{role}"; GRANT SELECT ON warm TO "{role}"')
        report = await migrate_postgres(load(postgres={"url": old}), dry_run=True)
        assert report.former
        report = await migrate_postgres(load(postgres={"url": old}))
        assert report.former
        assert not report.pending
        found = await fetch(old, "SELECT count(*) FROM iot_measurements_old")
        assert found[0][0] == 6005
        await execute(
            old,
            f"SET ROLE \"{role}\"; INSERT INTO iot_measurements VALUES (now(), 'new', 'm', 'Temperature', '1', 30, '', '');"
            " SELECT * FROM warm; SELECT * FROM iot_measurements LIMIT 1",
        )
        # Views of the old name read the new rows; that of our name is ours.
        assert [r[0] for r in await fetch(old, 'SELECT * FROM "Warm devices"')] == ["new"]
        assert [r["records"] for r in await fetch(old, "SELECT * FROM recent_activity")] == [1]
        connection = await asyncpg.connect(old)
        made = await former.known(connection)
        await connection.close()
        assert made is not None
        assert made.left == ["frozen"]
        assert [(v.name, v.made_again) for v in made.views] == [
            ("recent_activity", False),
            ("warm", True),
            ('"Warm devices"', True),
        ]
        # Again: nothing is to be done.
        assert (await migrate_postgres(load(postgres={"url": old}))).applied == []
    finally:
        await execute(old, f'DROP OWNED BY "{role}"')
        await execute(postgres, f'DROP ROLE "{role}"')


async def test_policies_of_the_old_table_are_known_and_paused(postgres, session):
    if not await has_timescale(postgres):
        pytest.skip("missing: TimescaleDB (give TEST_POSTGRES_URL of a server that has it)")
    found = await former.known(session)
    assert found is not None
    assert (found.hypertable, found.chunk_interval, found.compress_after, found.drop_after) == (
        True, "7 days", "1 day", "30 days",
    )  # fmt: skip
    jobs = await session.fetch(
        "SELECT scheduled FROM timescaledb_information.jobs WHERE hypertable_name = 'iot_measurements_old'"
    )
    assert [row[0] for row in jobs] == [False, False]


async def test_a_name_that_is_taken_is_told_before_anything_is_done(old):
    await execute(old, "CREATE TABLE iot_measurements_old (a int)")
    with pytest.raises(MigrationError, match="rename that one"):
        await migrate_postgres(load(postgres={"url": old}))
    assert (await fetch(old, "SELECT to_regclass('series') IS NULL, count(*) FROM iot_measurements"))[0][1] == 6005


async def test_another_table_of_that_name_is_not_taken_for_the_old_services(pg_dsn):
    await execute(pg_dsn, "CREATE TABLE iot_measurements (id int, what text)")
    with pytest.raises(MigrationError, match="already exists"):
        await migrate_postgres(load(postgres={"url": pg_dsn}))
    assert await fetch(pg_dsn, "SELECT id FROM iot_measurements") == []


# --- old writers


@pytest.fixture
def fresh(postgres: str) -> Iterator[str]:
    """DSN of a migrated database."""
    with migrated_database(postgres) as made:
        yield made


INSERT = "INSERT INTO iot_measurements (timestamp, device_id, connector_mode, component_type, pin_position, value, unit, topic) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"


def row(minutes: float = 0, device: str = "f2-1", value: float | None = 21.5, **fields: Any) -> tuple[Any, ...]:
    at = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=minutes)
    named = {
        "at": at,
        "device": device,
        "mode": "LoRaWAN",
        "component": "Temperature",
        "pin": "-1",
        "value": value,
        "unit": "°C",
        "topic": "t",
    }
    return tuple((named | fields).values())


async def levels(dsn: str) -> list[Any]:
    return [
        tuple((await fetch(dsn, f"SELECT sum(records)::int, sum(sum) FROM measurement_{level}"))[0])
        for level in ("1m", "1h", "1d")
    ]


async def test_an_old_writers_batch_is_stored_with_its_roll_ups_and_latest(fresh):
    connection = await asyncpg.connect(fresh)
    await connection.executemany(INSERT, [row(m, f"f2-{m % 3}", float(m)) for m in range(0, 3000, 7)])
    n, total = len(range(0, 3000, 7)), float(sum(range(0, 3000, 7)))
    store = TimescaleStore(live(postgres={"url": fresh}))
    await store.maintain()
    assert await levels(fresh) == [(n, total)] * 3
    newest = await connection.fetch("SELECT device_id, value, unit FROM latest_measurements ORDER BY 1")
    assert [tuple(r) for r in newest] == [("f2-0", 0.0, "°C"), ("f2-1", 7.0, "°C"), ("f2-2", 14.0, "°C")]
    # Now at once, behind no upkeep.
    await connection.execute(INSERT, *row(-0.1, "f2-0", 5.0))
    assert (await levels(fresh))[0] == (n + 1, total + 5)
    await connection.close()
    await store.close()


async def test_an_old_writers_copy_goes_through_the_view(fresh):
    connection = await asyncpg.connect(fresh)
    text = io.StringIO()
    csv.writer(text).writerows([*row(m, topic="a, b")] for m in range(50))
    names = ("timestamp", "device_id", "connector_mode", "component_type", "pin_position", "value", "unit", "topic")
    await connection.copy_to_table(
        "iot_measurements", source=io.BytesIO(text.getvalue().encode()), format="csv", columns=names
    )
    found = await connection.fetchrow("SELECT count(*), min(topic), max(quality) FROM iot_measurements")
    assert tuple(found) == (50, "a, b", 2)
    await connection.close()


async def test_a_row_that_cannot_be_stored_is_kept_and_fails_no_batch(fresh):
    connection = await asyncpg.connect(fresh)
    first = row(5)
    rows = [
        first, first,  # the same again is none
        (*first[:5], 22.0, *first[6:]),  # another value at its instant
        row(6, value=float("nan")), row(7, value=float("inf")), row(8, device=""), row(9, device="x" * 256),
        row(200 * 1440), row(-2 * 1440), row(0, at=datetime(1970, 1, 1, tzinfo=UTC)), row(10, mode=None, component=None, pin=None, unit=None, topic=None),
    ]  # fmt: skip
    async with connection.transaction():
        await connection.executemany(INSERT, rows)
    stored = await connection.fetch(
        "SELECT connector_mode, component_type, pin_position, unit, value FROM iot_measurements ORDER BY timestamp"
    )
    assert [tuple(r) for r in stored] == [
        ("unknown", "unknown", "-1", "", 21.5),
        ("LoRaWAN", "Temperature", "-1", "°C", 21.5),
    ]
    refused = await connection.fetch(
        "SELECT code, original ->> 'device_id' FROM iot_measurements_refused ORDER BY refused_at"
    )
    assert [r[0] for r in refused] == [
        "same_instant", "value_not_finite", "value_not_finite", "store_rejected", "store_rejected", "late_beyond_retention",
        "timestamp_future", "timestamp_invalid",
    ]  # fmt: skip
    with pytest.raises(asyncpg.RaiseError, match="eight columns"):
        await connection.execute("INSERT INTO iot_measurements (timestamp, device_id, quality) VALUES (now(), 'a', 1)")
    await connection.close()


async def test_marks_are_those_of_the_transaction_that_is_committed(fresh):
    """A mark that was made in what is rolled back must not stand for what comes after it."""
    connection = await asyncpg.connect(fresh)
    async with connection.transaction():
        undone = connection.transaction()
        await undone.start()
        await connection.execute(INSERT, *row(2000))
        await undone.rollback()
        await connection.execute(INSERT, *row(2000))
    assert (await connection.fetchval("SELECT count(*) FROM rollup_dirty")) == 1
    await connection.close()


async def test_old_writers_and_the_sink_at_once_double_and_lose_nothing(fresh):
    store = TimescaleStore(live(postgres={"url": fresh}))
    base = int(time.time()) * 1_000_000
    reading = {"component_type": "Temperature", "pin_position": "-1", "unit": "°C", "value": 1.0}

    async def old_writer(n: int) -> None:
        connection = await asyncpg.connect(fresh)
        for i in range(n, 200, 2):
            at = datetime.fromtimestamp((base - i * 1_000_000) / 1e6, UTC)
            await connection.execute(
                INSERT, at, f"f2-{i % 5}", "LoRaWAN", "Temperature", "-1", 1.0, "°C", "devices/1/up"
            )
        await connection.close()

    async def sink() -> None:
        for start in range(0, 200, 20):
            some = [message(f"f2-{i % 5}", reading, at=base - i * 1_000_000) for i in range(start, start + 20)]
            assert not (await store.write(some, {})).rejected

    await asyncio.gather(old_writer(0), old_writer(1), sink())
    await store.maintain()
    assert (await levels(fresh))[2] == (200, 200.0)
    assert (await fetch(fresh, "SELECT count(*) FROM iot_measurements_refused"))[0][0] == 0
    await store.close()


# --- the rows


async def test_rows_are_carried_over_while_the_sink_writes_and_are_what_they_were(migrated, session):
    store = TimescaleStore(live(postgres={"url": migrated}))
    stop = asyncio.Event()
    written = 0

    async def sink() -> None:
        nonlocal written
        while not stop.is_set():
            at = time.time_ns() // 1000 + written
            await store.write([message("live", 1.0, at=at), message("f2-1", 1.0, at=at)], {})
            written += 2
            await asyncio.sleep(0.01)

    writing = asyncio.create_task(sink())
    one = await adopted(session)
    seen: list[tuple[int, int, str]] = []
    with pytest.raises(AdoptionError, match=r"older than sink\.retention_days=9"):
        await (await adopted(session, retention_days=9)).run()
    found = await one.run(rest=0, told=lambda *at: seen.append(at))
    stop.set()
    await writing
    assert (found.rows, found.stored, found.refused, found.done) == (6005, 6005 - REFUSED, REFUSED, True)
    assert [n for n, _, _ in seen] == sorted(n for n, _, _ in seen)
    assert seen[-1][:2] == (6005, 6005)
    differ = await session.fetchval(
        COMPARED.replace("WHERE (n.value", "WHERE n.device_id <> 'live' AND n.topic <> 'devices/1/up' AND (n.value")
    )
    assert differ == 0
    assert await session.fetchval("SELECT count(*) FROM iot_measurements") == 6005 - REFUSED + written
    verified = await one.verify()
    assert (verified.same, verified.present) == (True, 6005 - REFUSED)
    for _ in range(30):
        await store.maintain()
        if (await levels(migrated))[2][0] == 6005 - REFUSED + written:
            break
    total = await session.fetchval("SELECT sum(value) FROM iot_measurements")
    assert await levels(migrated) == [(6005 - REFUSED + written, total)] * 3
    await store.close()
    # The views of before see what was carried over.
    assert len(await session.fetch('SELECT * FROM "Warm devices"')) == 7
    with pytest.raises(AdoptionError, match="frozen"):
        await one.drop()
    await session.execute("DROP MATERIALIZED VIEW frozen")
    await one.drop()
    assert await session.fetchval("SELECT count(*) FROM iot_measurements") == 6005 - REFUSED + written


async def test_a_run_that_is_interrupted_goes_on_and_one_that_is_repeated_changes_nothing(
    migrated, session, monkeypatch
):
    monkeypatch.setattr(adoption, "ROWS_WANTED", 500)
    one = await adopted(session)

    class Interrupted(Exception):
        pass

    def stop_soon(done: int, total: int, what: str) -> None:
        if done > 2000:
            raise Interrupted

    with pytest.raises(Interrupted):
        await one.run(rest=0, told=stop_soon)
    halfway = await one.progress()
    assert 2000 < halfway.rows < 6005
    assert not halfway.done
    newest = await session.fetchval("SELECT min(timestamp) FROM iot_measurements")
    left = await session.fetchval(
        "SELECT count(*) FROM iot_measurements_old WHERE timestamp >= $1 AND isfinite(timestamp)", newest
    )
    assert await session.fetchval("SELECT count(*) FROM iot_measurements") == left - (halfway.refused - 2)
    found = await one.run(rest=0)
    assert (found.stored, found.stood, found.refused) == (6005 - REFUSED, 0, REFUSED)
    await one.again()
    again = await one.run(rest=0)
    assert (again.stored, again.stood, again.refused, again.checksum) == (0, 6005 - REFUSED, REFUSED, found.checksum)
    assert await session.fetchval(COMPARED) == 0


async def test_what_the_topic_brought_already_stands_and_another_value_is_told(migrated, session):
    store = TimescaleStore(live(postgres={"url": migrated}))
    rows = await session.fetch(
        "SELECT * FROM iot_measurements_old WHERE timestamp < now() - INTERVAL '5 days' AND timestamp > '2000-01-01' ORDER BY timestamp DESC LIMIT 20"
    )

    def brought(row: Any, value: float) -> Any:
        at = round(row["timestamp"].timestamp() * 1_000_000)
        reading = {"component_type": "Temperature", "pin_position": "-1", "unit": "°C", "value": value, "quality": 2}
        return message(row["device_id"], reading, at=at, topic="a/b")

    await store.write([brought(r, r["value"] + (i % 10 == 0)) for i, r in enumerate(rows)], {})
    await store.close()
    one = await adopted(session)
    found = await one.run(rest=0)
    assert (found.stored, found.stood, found.refused) == (6005 - REFUSED - 20, 18, REFUSED + 2)
    codes = await session.fetch("SELECT code, count(*) FROM iot_measurements_refused GROUP BY 1 ORDER BY 1")
    assert [tuple(r) for r in codes] == [("same_instant", 2), ("timestamp_invalid", 2), ("value_not_finite", 1)]
    assert (await one.verify()).same


async def test_a_row_that_is_lost_or_changed_afterwards_is_found_by_verify(migrated, session):
    one = await adopted(session)
    await one.run(rest=0)
    await session.execute(
        "DELETE FROM measurements WHERE timestamp = (SELECT max(timestamp) FROM iot_measurements WHERE device_id = 'f2-3')"
    )
    await session.execute(
        "UPDATE measurements SET value = 999 WHERE timestamp = (SELECT max(timestamp) FROM iot_measurements WHERE device_id = 'f2-4')"
    )
    verified = await one.verify()
    assert not verified.same
    assert verified.present == 6005 - REFUSED - 2
    await one.again()
    again = await one.run(rest=0)
    assert (again.stored, again.refused) == (1, REFUSED + 1)


async def test_what_is_older_than_the_retention_stays_in_the_old_table(migrated, session):
    one = await adopted(session, retention_days=9)
    found = await one.run(leave_older=True, rest=0)
    assert found.done
    assert found.too_old == await session.fetchval(
        "SELECT count(*) FROM iot_measurements_old WHERE timestamp < now() - INTERVAL '9 days' AND timestamp > '2000-01-01'"
    )
    with pytest.raises(AdoptionError, match="are nowhere else"):
        await one.drop()


async def test_without_an_old_service_there_is_nothing_to_carry_over(fresh):
    connection = await asyncpg.connect(fresh)
    with pytest.raises(AdoptionError, match="no old service was found"):
        await Adoption.of(connection, load())
    await connection.close()
