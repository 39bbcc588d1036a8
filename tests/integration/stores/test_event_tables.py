"""Topics of events as tables: once each, the highest revision, bad rows alone, offsets with the rows, retention."""

import random
from typing import Any

import asyncpg
import orjson
import pytest
from sink_support import DAY_US, NOW_US, FakeRecord, batch, execute, fetch, live, record

from preservarium.errors import ReasonCode, Retry
from preservarium.stages.sink import EventSink
from preservarium.stores.base import Move, Moved
from preservarium.stores.event_tables import EventStore
from preservarium.stores.tables import AGGREGATES, ANOMALIES, EVENT_TABLES

SERIES = {"device_id": "d1", "connector_mode": "LoRaWAN", "component_type": "t", "pin_position": "-1", "unit": "°C"}


def anomaly(number: int, **fields: Any) -> dict[str, Any]:
    return SERIES | {
        "anomaly_id": f"a{number}", "state": "begins", "timestamp": NOW_US + number, "value": 40, "expected": 20.5, "score": 3.1,
        "threshold": 2.5, "raw_partition": 1, "raw_offset": number, "raw_index": 0, "generation": 0,
    } | fields  # fmt: skip


def window(number: int, revision: int, **fields: Any) -> dict[str, Any]:
    return SERIES | {
        "window_id": f"w{number}", "revision": revision, "window_start": NOW_US, "window_end": NOW_US + 3_600_000_000,
        "size_s": 3600, "hop_s": 3600, "count": 3 + revision, "min": 1.0, "max": 3.0, "mean": 2.0, "sum": 6.0, "last": 3.0,
        "last_at": NOW_US + 5, "closed_by": "watermark", "generation": 0,
    } | fields  # fmt: skip


@pytest.fixture
async def anomalies(dsn):
    made = EventStore(ANOMALIES, live(postgres={"url": dsn}), sink="sink-anomalies")
    yield made
    await made.close()


@pytest.fixture
async def windows(dsn):
    made = EventStore(AGGREGATES, live(postgres={"url": dsn}), sink="sink-aggregates")
    yield made
    await made.close()


async def test_every_column_comes_back(dsn, anomalies, windows):
    await anomalies.write([anomaly(1)], {})
    none = dict.fromkeys(("consumption", "circular", "spread", "cos_sum", "sin_sum"))
    linear = window(1, 0, consumption=7.5)
    directions = window(2, 0, circular=360.0, mean=10.0, spread=3.0, cos_sum=2.9, sin_sum=0.4)
    for name in ("min", "max", "sum"):
        del directions[name]
    undecided = {k: v for k, v in directions.items() if k != "spread"} | {"window_id": "w3", "mean": None}
    await windows.write([linear, directions, undecided], {})
    (row,) = await fetch(dsn, "SELECT * FROM anomalies")
    found = dict(row) | {"timestamp": round(row["timestamp"].timestamp() * 1e6)}
    del found["stored_at"]
    assert found == anomaly(1)
    rows = await fetch(dsn, "SELECT * FROM aggregates ORDER BY window_id")
    absent = dict.fromkeys(("min", "max", "sum"))
    for row, sent in zip(rows, (none | linear, none | absent | directions, none | absent | undecided), strict=True):
        found = {k: round(v.timestamp() * 1e6) if hasattr(v, "timestamp") else v for k, v in row.items()}
        del found["stored_at"]
        assert found == sent


async def test_an_event_that_comes_again_changes_nothing(dsn, anomalies):
    first = await anomalies.write([anomaly(i) for i in (1, 2, 2)], {})
    again = await anomalies.write([anomaly(2, value=99), anomaly(3)], {})
    assert (first.accepted, first.duplicates, again.accepted, again.duplicates) == (2, 1, 1, 1)
    assert [r[0] for r in await fetch(dsn, "SELECT value FROM anomalies ORDER BY anomaly_id")] == [40.0] * 3


async def test_the_highest_revision_wins_whatever_the_order(dsn, windows):
    rng = random.Random(8)
    sent = [window(n, r, sum=float(r)) for n in range(10) for r in range(6)]
    rng.shuffle(sent)
    position = 0
    while position < len(sent):
        start, end = max(0, position - rng.randrange(9)), min(len(sent), position + rng.randrange(1, 12))
        await windows.write(sent[start:end], {})
        position = end
    rows = await fetch(dsn, "SELECT revision, count, sum FROM aggregates")
    assert [tuple(r) for r in rows] == [(5, 8, 5.0)] * 10


async def test_of_equal_revisions_the_later_counts_and_the_same_is_a_duplicate(dsn, windows):
    await windows.write([window(1, 2, sum=1.0)], {})
    result = await windows.write([window(1, 2, sum=1.0)], {})
    assert (result.accepted, result.duplicates) == (0, 1)
    result = await windows.write([window(1, 2, sum=2.0), window(1, 2, sum=3.0), window(1, 1, sum=4.0)], {})
    assert (result.accepted, result.duplicates) == (1, 2)
    assert [r[0] for r in await fetch(dsn, "SELECT sum FROM aggregates")] == [3.0]


@pytest.mark.parametrize(
    "fields",
    [{"anomaly_id": None}, {"anomaly_id": 5}, {"timestamp": "now"}, {"timestamp": 7}, {"value": "x"}, {"value": True},
     {"value": float("nan")}, {"raw_offset": 2**70}, {"raw_offset": 1.5}, {"unit": "a\0"}, {"unit": "a\ud800"}, {"score": None}],
)  # fmt: skip
async def test_a_bad_event_takes_no_other_with_it(dsn, anomalies, fields):
    result = await anomalies.write(
        [anomaly(1), anomaly(2) | fields, anomaly(3)], {("anomaly_alerts", 0): Move(None, 3)}
    )
    assert [(r.message, r.reading, r.code) for r in result.rejected] == [(1, 0, ReasonCode.STORE_REJECTED)]
    assert (result.accepted, result.duplicates) == (2, 0)
    assert await anomalies.offsets("anomaly_alerts", [0]) == {0: 3}


async def test_what_only_the_database_refuses_is_bisected_to_the_row(dsn, windows):
    await execute(dsn, "ALTER TABLE aggregates ADD CONSTRAINT no_thirteen CHECK (sum <> 13)")
    bad = set(random.Random(2).sample(range(1000), 7))
    result = await windows.write([window(i, 0, sum=13.0 if i in bad else 1.0) for i in range(1000)], {})
    assert {r.message for r in result.rejected} == bad
    assert all("no_thirteen" in r.text for r in result.rejected)
    assert result.accepted == (await fetch(dsn, "SELECT count(*) FROM aggregates"))[0][0] == 993


async def test_a_stale_writer_writes_nothing_and_learns_where_the_other_is(dsn, anomalies):
    topic = ANOMALIES.topic.name
    await anomalies.write([anomaly(1)], {(topic, 0): Move(None, 10), (topic, 1): Move(None, 4)})
    for moves in (
        {(topic, 0): Move(9, 12)},
        {(topic, 0): Move(None, 12)},
        {(topic, 0): Move(10, 12), (topic, 1): Move(3, 5)},
    ):
        with pytest.raises(Moved) as e:
            await anomalies.write([anomaly(2)], moves)
        assert e.value.positions == {key: {0: 10, 1: 4}[key[1]] for key in moves}
    assert (await fetch(dsn, "SELECT count(*) FROM anomalies"))[0][0] == 1
    assert await anomalies.offsets(topic, [0, 1, 2]) == {0: 10, 1: 4, 2: None}


async def test_a_connection_lost_in_the_middle_loses_and_doubles_nothing(dsn, postgres, windows):
    topic, admin = AGGREGATES.topic.name, await asyncpg.connect(postgres)

    async def no_errors(sends: Any) -> None:
        raise AssertionError(sends)

    settings = live(postgres={"url": dsn}, breaker={"failures_max": 1000})
    stage = EventSink("sink-aggregates", topic, windows, no_errors, settings)
    insert, calls = windows._insert, []

    async def flaky(connection: Any, items: Any) -> int:
        stored = await insert(connection, items)
        calls.append(1)
        if len(calls) % 2:
            await admin.execute("SELECT pg_terminate_backend($1, 2000)", connection.get_server_pid())
        return stored

    windows._insert = flaky
    windows.breaker._settings = lambda: settings().breaker
    position = failures = 0
    while position < 60:
        records = [record(i, window(i, 0), window(i + 1, 1)) for i in range(position, position + 10)]
        try:
            await stage([batch(topic, 0, records)])
            position += 10
        except Retry:
            failures += 1
            position = (await stage.on_assigned([0]))[0]
    await admin.close()
    assert failures == 6
    rows = await fetch(dsn, "SELECT revision, count(*) FROM aggregates GROUP BY 1 ORDER BY 1")
    assert [tuple(r) for r in rows] == [(0, 1), (1, 60)]
    assert await windows.offsets(topic, [0]) == {0: 60}


async def test_refused_events_are_told_before_the_commit_and_may_be_sent_again(dsn, anomalies):
    told: list[Any] = []

    async def publish(sends: Any) -> None:
        assert (await fetch(dsn, "SELECT count(*) FROM anomalies"))[0][0] == 0
        told.extend(orjson.loads(s.value) for s in sends)

    topic = ANOMALIES.topic.name
    stage = EventSink("sink-anomalies", topic, anomalies, publish, live())
    effects = await stage(
        [batch(topic, 0, [record(0, anomaly(1), anomaly(2, value="x")), FakeRecord(1, b"{torn"), record(2, [1])])]
    )
    assert [(line["code"], line["offset"], line["index"]) for line in told] == [
        ("envelope_not_json", 1, 0), ("envelope_invalid", 2, 0), ("store_rejected", 0, 1),
    ]  # fmt: skip
    assert orjson.loads(told[2]["raw"]) == anomaly(2, value="x")
    assert sum(effects.refused.values()) == 3
    assert await anomalies.offsets(topic, [0]) == {0: 3}


async def test_old_rows_are_deleted_and_others_stay(dsn):
    store = EventStore(ANOMALIES, live(postgres={"url": dsn}, sink={"events_retention_days": 30}), sink="s")
    await store.write([anomaly(i, timestamp=NOW_US - i * DAY_US) for i in range(20, 41)], {})
    assert await store.prune() == 11
    assert await store.prune() == 0
    left = await fetch(dsn, "SELECT min(timestamp) > now() - INTERVAL '31 days', count(*) FROM anomalies")
    assert tuple(left[0]) == (True, 10)
    await store.close()


@pytest.mark.parametrize("suffix", EVENT_TABLES)
async def test_a_declaration_fits_its_table(dsn, suffix):
    declared = EVENT_TABLES[suffix]
    connection = await asyncpg.connect(dsn)
    await connection.prepare(declared.insert)
    if declared.then:
        await connection.prepare(declared.then)
    if declared.kept_by:
        for statement in declared.prunes:
            await connection.prepare(statement)
    rows = await connection.fetch(
        "SELECT column_name FROM information_schema.columns WHERE table_name = $1 AND is_nullable = 'NO'"
        " AND column_default IS NULL AND is_identity = 'NO'",
        declared.table,
    )
    await connection.close()
    assert {r[0] for r in rows} <= {column.name for column in declared.columns}
