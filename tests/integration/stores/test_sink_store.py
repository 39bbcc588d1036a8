"""What only a real PostgreSQL can show: the schema, the views, roll-ups, partitions, and the paths of a write."""

import asyncio
import itertools
import random
from datetime import UTC, datetime, timedelta
from math import cos, fsum, radians
from typing import Any

import asyncpg
import pytest
from sink_support import DAY_US, NOW_US, SECOND_US, execute, fetch, live, message

from preservarium.domain.circular import direction, unit_vector
from preservarium.errors import ReasonCode, Retry
from preservarium.stores import timescale
from preservarium.stores.base import Move
from preservarium.stores.event_tables import EventStore
from preservarium.stores.tables import ALARM_EVENTS
from preservarium.stores.timescale import TimescaleStore

T = "iot_validated_data"


@pytest.fixture
async def store(dsn):
    made = TimescaleStore(live(postgres={"url": dsn}))
    yield made
    await made.close()


@pytest.fixture
async def alarms(dsn):
    made = EventStore(ALARM_EVENTS, live(postgres={"url": dsn}), sink="sink-alarms")
    yield made
    await made.close()


@pytest.fixture
async def plain(dsn):
    """DSN of a database whose tables PostgreSQL itself partitions."""
    if (await fetch(dsn, "SELECT storage_engine()"))[0][0] != "plain":
        pytest.skip("not of this layout: TimescaleDB has no partitions of ours")
    return dsn


async def count(dsn: str, table: str) -> int:
    return (await fetch(dsn, f"SELECT count(*) FROM {table}"))[0][0]


def at(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


# --- paths of a write


async def test_what_only_the_database_refuses_is_bisected_to_the_row(dsn, store):
    await execute(dsn, "ALTER TABLE measurements ADD CONSTRAINT no_thirteen CHECK (value <> 13)")
    rng = random.Random(1)
    bad = set(rng.sample(range(3000), 9))
    messages = [message(f"d{i % 40}", 13.0 if i in bad else 1.0, at=NOW_US + i, offset=i) for i in range(3000)]
    result = await store.write(messages, {(T, 0): Move(None, 3000)})
    assert {r.message for r in result.rejected} == bad
    assert {r.code for r in result.rejected} == {ReasonCode.STORE_REJECTED}
    assert all("no_thirteen" in r.text for r in result.rejected)
    assert result.accepted == await count(dsn, "measurements") == 2991
    assert await store.offsets(T, [0]) == {0: 3000}


async def test_a_refused_row_is_not_a_latest_value(dsn, store):
    await execute(dsn, "ALTER TABLE measurements ADD CONSTRAINT no_thirteen CHECK (value <> 13)")
    await store.write([message("a", 1.0), message("a", 13.0, at=NOW_US + 5)], {})
    assert [r["value"] for r in await fetch(dsn, "SELECT value FROM latest")] == [1.0]


async def test_every_row_refused_leaves_the_offsets_moved(dsn, store):
    await execute(dsn, "ALTER TABLE measurements ADD CONSTRAINT none CHECK (value < 0)")
    result = await store.write([message("a", *range(20))], {(T, 0): Move(None, 1)})
    assert len(result.rejected) == 20
    assert await store.offsets(T, [0]) == {0: 1}


async def test_names_of_a_transaction_that_was_undone_are_not_kept(dsn, store):
    async def fail(_rejected: Any) -> None:
        message = "not now"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError):
        await store.write([message("a", 1.0)], {}, before_commit=fail)
    assert await count(dsn, "series") == 0
    await store.write([message("a", 1.0)], {})
    assert await fetch(dsn, "SELECT device_id FROM measurements JOIN series USING (series_id)") == [("a",)]


async def test_two_writers_that_make_the_same_series_share_them(dsn):
    stores = [TimescaleStore(live(postgres={"url": dsn})) for _ in range(4)]
    results = await asyncio.gather(
        *(
            s.write([message(f"d{i}", float(n), at=NOW_US + n) for i in random.Random(n).sample(range(50), 50)], {})
            for n, s in enumerate(stores)
        )
    )
    assert [r.accepted for r in results] == [50] * 4
    assert await count(dsn, "series") == 50
    for s in stores:
        await s.close()


async def test_writers_with_the_same_keys_in_opposite_orders_both_end(dsn):
    stores = [TimescaleStore(live(postgres={"url": dsn})) for _ in range(2)]
    messages = [message(f"d{i}", 1.0, 2.0) for i in range(300)]
    for round_ in range(5):
        turn = [m | {"timestamp": NOW_US + round_} for m in messages]
        a, b = await asyncio.gather(stores[0].write(turn, {}), stores[1].write(turn[::-1], {}))
        assert a.accepted + b.accepted == 600
        assert a.duplicates + b.duplicates == 600
    assert await count(dsn, "measurements") == 3000
    for s in stores:
        await s.close()


@pytest.mark.parametrize("fields", [{"copy_first": False}, {"late_lane": True}])
async def test_a_second_value_that_another_writer_stores_meanwhile_is_told(dsn, fields):
    stores = [TimescaleStore(live(postgres={"url": dsn}), **fields) for _ in range(2)]
    at_us = NOW_US - 5 * DAY_US  # late, where there is a lane for it
    for s in stores:
        await s.write([message(f"d{i}", 0.0, at=at_us) for i in range(300)], {})
    for round_ in range(1, 6):
        first, second = ([message(f"d{i}", value, at=at_us + round_) for i in range(300)] for value in (1.0, 2.0))
        a, b = await asyncio.gather(stores[0].write(first, {}), stores[1].write(second, {}))
        assert (a.accepted + b.accepted, len(a.rejected) + len(b.rejected)) == (300, 300)
        assert {r.code for r in [*a.rejected, *b.rejected]} == {ReasonCode.SAME_INSTANT}
    for s in stores:
        await s.close()


@pytest.mark.parametrize("statement", [*timescale._LOOK, *timescale._LOOK.values(), timescale._CORRECT_LATEST])
async def test_what_stands_is_looked_up_by_its_key(plain, statement):
    """Whatever is known of the temporary table: a join may read every partition for one row."""
    connection = await asyncpg.connect(plain)
    await connection.execute(f"CREATE TEMP TABLE {timescale.STAGING}")
    plan = await connection.fetch(f"EXPLAIN {statement}", at(NOW_US - DAY_US), at(NOW_US))
    await connection.close()
    lines = [row[0] for row in plan]
    scans = [line for line in lines if " on measurements" in line and "Insert on" not in line]
    assert scans
    assert all("Index Scan" in line for line in scans), lines


async def test_a_database_that_was_not_migrated_is_waited_for(pg_dsn):
    store = TimescaleStore(live(postgres={"url": pg_dsn}))
    with pytest.raises(Retry, match="preservarium migrate"):
        await store.write([message("a", 1.0)], {})
    await store.close()


# --- latest


async def test_latest_goes_by_measurement_time_and_not_by_arrival(dsn, store):
    await store.write([message("a", 1.0, at=NOW_US), message("a", 0.5, at=NOW_US - 9)], {})
    await store.write([message("a", 2.0, at=NOW_US - 5)], {})
    await store.write([message("b", {"value_text": "open", "quality": 3})], {})
    rows = await fetch(
        dsn, "SELECT device_id, timestamp, value, value_text, quality FROM latest_measurements ORDER BY 1"
    )
    assert [tuple(r) for r in rows] == [("a", at(NOW_US), 1.0, None, 1), ("b", at(NOW_US), None, "open", 3)]
    await store.write([message("a", 3.0, at=NOW_US + 1)], {})
    assert (await fetch(dsn, "SELECT value FROM latest_measurements WHERE device_id = 'a'"))[0][0] == 3.0


async def test_a_later_verdict_on_the_newest_reading_is_the_newest(dsn, store):
    await store.write([message("a", 9.0)], {})
    verdict = {"value": 9.0, "quality": 3, "flags": ["spike"], "timestamp": NOW_US, "revised": True}
    await store.write([message("a", verdict, at=NOW_US + 1)], {})
    assert [tuple(r) for r in await fetch(dsn, "SELECT timestamp, value, quality FROM latest")] == [
        (at(NOW_US), 9.0, 3)
    ]


# --- late lane


async def test_late_rows_are_staged_and_merged_chunk_by_chunk(dsn):
    store = TimescaleStore(live(postgres={"url": dsn}), late_lane=True)
    messages = [message("a", float(i), at=NOW_US - i * DAY_US // 2) for i in range(20)]
    result = await store.write(messages, {(T, 0): Move(None, 20)})
    assert result.accepted == 20
    assert await count(dsn, "measurements") + await count(dsn, "measurements_late") == 20
    assert await count(dsn, "measurements_late") >= 14
    again = await store.write(messages, {})
    assert (again.accepted, again.duplicates) == (0, 20)
    await store.maintain()
    assert (await count(dsn, "measurements"), await count(dsn, "measurements_late")) == (20, 0)
    await store.write(messages, {})
    await store.maintain()
    assert (await count(dsn, "measurements"), await count(dsn, "measurements_late")) == (20, 0)
    await store.close()


async def test_late_second_values_are_told_of_rows_that_wait_and_of_rows_that_are_merged(dsn):
    store = TimescaleStore(live(postgres={"url": dsn}), late_lane=True)
    old = NOW_US - 5 * DAY_US
    await store.write([message("a", 1.0, at=old), message("b", 2.0, at=old)], {})
    for merged in (False, True):
        if merged:
            await store.maintain()
        result = await store.write(
            [message("a", 1.0, at=old), message("b", 2.5, at=old), message("c", float(merged), at=old)], {}
        )
        assert [(r.message, r.code, r.text) for r in result.rejected] == [
            (1, ReasonCode.SAME_INSTANT, "2.0 stands at this instant"),
            *[(2, ReasonCode.SAME_INSTANT, "0.0 stands at this instant")] * merged,
        ]
        assert (result.accepted, result.duplicates) == ((0, 1) if merged else (1, 1))
        assert await count(dsn, "measurements_late") == (0 if merged else 3)
    rows = await fetch(dsn, "SELECT value FROM measurements ORDER BY series_id")
    assert [r[0] for r in rows] == [1.0, 2.0, 0.0]
    await store.close()


async def test_a_verdict_on_a_row_that_is_staged_wins_over_it(dsn):
    store = TimescaleStore(live(postgres={"url": dsn}), late_lane=True)
    old = NOW_US - 5 * DAY_US
    verdict = {"value": 1.0, "quality": 3, "flags": ["spike"], "timestamp": old, "revised": True}
    await store.write([message("a", 1.0, at=old)], {})
    await store.write([message("a", verdict, at=old + 1)], {})
    await store.maintain()
    rows = await fetch(dsn, "SELECT quality, revised FROM measurements")
    assert ([tuple(r) for r in rows], await count(dsn, "measurements_late")) == ([(3, True)], 0)
    await store.close()


# --- roll-ups


def brute_force(rows: list[Any], width_us: int) -> dict[tuple[str, int], tuple[Any, ...]]:
    buckets: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for device, us, value in rows:
        buckets.setdefault((device, us // width_us * width_us), []).append((us, value))
    return {
        key: (
            len(v),
            len(v),
            pytest.approx(sum(x for _, x in v)),
            min(x for _, x in v),
            max(x for _, x in v),
            max(v)[1],
        )
        for key, v in buckets.items()
    }


async def rollup(dsn: str, name: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    rows = await fetch(
        dsn, f"SELECT device_id, bucket, records, n, sum, min, max, last FROM {name} JOIN series USING (series_id)"
    )
    return {(r[0], round(r[1].timestamp() * 1e6)): tuple(r[2:]) for r in rows}


async def test_rollups_equal_the_rows_after_late_and_repeated_writes(dsn, store):
    rng = random.Random(3)
    sent: list[Any] = []
    for _ in range(6):
        fresh = [
            (
                f"d{rng.randrange(4)}",
                NOW_US - rng.randrange(12 * 3600) * SECOND_US - rng.randrange(9),
                rng.uniform(-5, 5),
            )
            for _ in range(400)
        ]
        sent += fresh
        await store.write([message(d, v, at=us) for d, us, v in fresh + rng.sample(sent, 50)], {})
        await store.maintain()
    rows = [
        (r[0], round(r[1].timestamp() * 1e6), r[2])
        for r in await fetch(dsn, "SELECT device_id, timestamp, value FROM iot_measurements")
    ]
    assert len(rows) == len({(d, us) for d, us, _ in sent})
    assert await rollup(dsn, "measurement_1m") == brute_force(rows, 60 * SECOND_US)
    assert await rollup(dsn, "measurement_1h") == brute_force(rows, 3600 * SECOND_US)
    assert await rollup(dsn, "measurement_1d") == brute_force(rows, DAY_US)
    # What is over is made, and nothing of it is left to do.
    assert await count(dsn, "rollup_dirty WHERE series IS NOT NULL OR to_at < now() - INTERVAL '26 hours'") == 0


def turning(device: str, *values: float, at: int, period: float = 360.0) -> list[Any]:
    circular = {"temperature": period}
    return [message(device, value, at=at + i * SECOND_US, circular=circular) for i, value in enumerate(values)]


async def test_a_circular_series_has_vector_means_and_no_extremes(dsn, store):
    begin = NOW_US // DAY_US * DAY_US - DAY_US
    await store.write([*turning("a", *[1.0, 359.0] * 30, at=begin), message("b", 5.0, at=begin)], {})
    await store.write(turning("c", 23.0, 2.0, at=begin, period=24.0) + turning("d", 0.0, 180.0, at=begin), {})
    # What PostgreSQL could not multiply must not stop the roll-ups.
    await store.write(
        turning("e", 1e308, 5e-324, at=begin, period=400.0) + turning("f", -1e-320, at=begin, period=24.0), {}
    )
    await store.maintain()
    for level in ("1m", "1h", "1d"):
        found = await rollup(dsn, f"measurement_{level}")
        assert found == {
            ("a", begin): (60, 60, None, None, None, 359),
            ("b", begin): (1, 1, 5, 5, 5, 5),
            ("c", begin): (2, 2, None, None, None, 2),
            ("d", begin): (2, 2, None, None, None, 180),
            ("e", begin): (2, 2, None, None, None, 5e-324),
            ("f", begin): (1, 1, None, None, None, -1e-320),
        }
        directions = {
            row["device_id"]: row
            for row in await fetch(dsn, f"SELECT device_id, r.* FROM circular_{level} r JOIN series USING (series_id)")
        }
        assert directions.keys() == {"a", "c", "d", "e", "f"}
        assert (directions["a"]["n"], directions["a"]["mean"], directions["a"]["last"]) == (60, 0, 359)
        assert directions["a"]["spread"] == pytest.approx(1, abs=1e-3)
        assert (directions["a"]["cos_sum"], directions["a"]["sin_sum"]) == (pytest.approx(60 * cos(radians(1))), 0)
        assert directions["c"]["mean"] == pytest.approx(0.5)
        assert (directions["d"]["mean"], directions["d"]["spread"]) == (None, None)
        assert [directions[device]["mean"] for device in "ef"] == [0, 0]


async def test_sql_says_of_directions_what_the_domain_says(dsn):
    rng = random.Random(7)
    for period in (360.0, 24.0, 6.25, 400.0):
        for _ in range(50):
            values = [rng.uniform(-2, 2) * period for _ in range(rng.randint(1, 6))]
            sums = [fsum(part) for part in zip(*(unit_vector(value, period) for value in values), strict=True)]
            expected = direction(*sums, len(values), period)
            arguments = ", ".join(f"{x!r}::float8" for x in (*sums, float(len(values)), period))
            (row,) = await fetch(dsn, f"SELECT circular_mean({arguments}), circular_spread({arguments})")
            assert tuple(row) == (pytest.approx(expected.mean, abs=1e-9), pytest.approx(expected.spread, abs=1e-5))
    for sums in ((1.0, -1e-300), (1.0, -0.0), (1.0, 0.0)):
        arguments = f"{sums[0]!r}::float8, {sums[1]!r}::float8, 1, 360"
        assert tuple((await fetch(dsn, f"SELECT circular_mean({arguments}), circular_spread({arguments})"))[0]) == (
            0,
            0,
        )


async def test_a_series_that_becomes_circular_is_told_by_its_messages_from_then_on(dsn, store):
    begin = NOW_US // DAY_US * DAY_US - DAY_US
    minute = 60 * SECOND_US
    await store.write([message("a", 350.0, at=begin), message("a", 10.0, at=begin + SECOND_US)], {})
    await store.maintain()
    assert (await rollup(dsn, "measurement_1m"))["a", begin] == (2, 2, 360, 10, 350, 10)
    await store.write(turning("a", 350.0, 10.0, at=begin + minute), {})
    again = TimescaleStore(live(postgres={"url": dsn}))  # a worker that does not know it yet
    await again.write(turning("a", 20.0, at=begin + minute + 5 * SECOND_US), {})
    await again.close()
    await store.maintain()
    assert (await rollup(dsn, "measurement_1m"))["a", begin] == (2, 2, None, None, None, 10)
    sums = [fsum(part) for part in zip(*(unit_vector(value, 360) for value in (350, 10, 20)), strict=True)]
    # The hour was made anew, with the minute in which nobody knew it.
    rows = await fetch(dsn, "SELECT n, mean FROM circular_1m ORDER BY bucket")
    assert [tuple(row) for row in rows] == [(2, 0), (3, pytest.approx(direction(*sums, 3, 360).mean))]
    assert (await fetch(dsn, "SELECT circular FROM series"))[0][0] == 360


async def test_a_back_fill_marks_hours_or_days_not_thousands_of_minutes(dsn, store):
    await store.write([message("a", 1.0, at=NOW_US - i * 7 * 60 * SECOND_US) for i in range(5000)], {})
    assert await count(dsn, "rollup_dirty") <= 64
    await store.maintain()
    assert (await fetch(dsn, "SELECT sum(records) FROM measurement_1h"))[0][0] == 5000


# --- partitions of the plain layout


async def test_partitions_are_made_ahead_and_dropped_by_retention(plain):
    dsn = plain
    settings = live(postgres={"url": dsn}, sink={"retention_days": 30})
    store = TimescaleStore(settings)
    await store.write([message("a", 1.0), message("a", 2.0, at=NOW_US - 29 * DAY_US)], {})
    assert await count(dsn, "measurements_default") == 0
    await execute(
        dsn,
        "INSERT INTO measurements (series_id, timestamp, received_at, raw_offset, derivation_id, raw_index, raw_partition, quality)"
        " SELECT series_id, now() - INTERVAL '60 days', now(), 0, 1, 0, 0, 1 FROM series",
    )
    before = await count(dsn, "measurement_chunks")
    await store.maintain()
    oldest, newest, chunks = (
        await fetch(dsn, "SELECT min(range_start), max(range_end), count(*) FROM measurement_chunks")
    )[0]
    now = datetime.now(UTC)
    assert chunks < before
    assert now - timedelta(days=32) < oldest < now - timedelta(days=29)
    assert newest > now + timedelta(days=3)
    assert await count(dsn, "measurements") == 2
    assert await store.failing_jobs() == []
    await store.close()


async def test_rows_in_the_net_move_when_their_partition_is_made(plain, store):
    dsn = plain
    await store.write([message("a", 1.0)], {})
    far = "now() + INTERVAL '20 days'"
    await execute(
        dsn,
        "INSERT INTO measurements (series_id, timestamp, received_at, raw_offset, derivation_id, raw_index, raw_partition, quality)"
        f" SELECT series_id, {far}, now(), 0, 1, 0, 0, 1 FROM series",
    )
    assert await count(dsn, "measurements_default") == 1
    await execute(dsn, "SELECT ensure_partitions(now(), now() + INTERVAL '21 days', 1)")
    assert (await count(dsn, "measurements_default"), await count(dsn, "measurements")) == (0, 2)


async def test_partitions_follow_a_changed_width_without_gaps(plain):
    dsn = plain
    await execute(dsn, "SELECT ensure_partitions(now(), now() + INTERVAL '40 days', 7)")
    rows = await fetch(dsn, "SELECT range_start, range_end FROM measurement_chunks ORDER BY 1")
    assert all(a[1] == b[0] for a, b in itertools.pairwise(rows))
    assert rows[-1][1] >= datetime.now(UTC) + timedelta(days=40)


async def test_a_job_that_fails_is_seen(plain, store):
    await execute(plain, "DROP TABLE rollup_1m CASCADE")
    await store.maintain()
    assert await store.failing_jobs() == ["retention"]


async def test_the_database_refuses_what_the_store_should_have(dsn):
    insert = (
        "INSERT INTO measurements (series_id, timestamp, value, received_at, raw_offset, derivation_id, raw_index, raw_partition, quality)"
        " VALUES (1, $1, $2, now(), 0, 1, 0, 0, 1)"
    )
    connection = await asyncpg.connect(dsn)
    now = datetime.now(UTC)
    for when, value in [(now, float("nan")), (now, float("inf")), (now, float("-inf")),
                        (datetime(1970, 1, 1, tzinfo=UTC), 1.0), (datetime(2100, 1, 1, tzinfo=UTC), 1.0)]:  # fmt: skip
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(insert, when, value)
    await connection.close()


# --- alarms


def transition(number: int, what: str, **fields: Any) -> dict[str, Any]:
    return {
        "alarm_id": "a1", "transition_id": f"t{number}", "device_id": "d1", "rule": "too hot", "rule_rev": 3,
        "component_type": "temperature", "pin_position": "0", "severity": "major", "transition": what,
        "state": "unacknowledged" if what == "raised" else "returned", "occurred_at": NOW_US, "detected_at": NOW_US + number,
        "cleared_at": NOW_US + number if what == "cleared" else None, "value": 40.0 + number, "unit": "Cel", "threshold": 40.0,
        "message": "hot", "recipients": ["ops"], "raw_partition": 1, "raw_offset": number, "raw_index": 0, "generation": 0,
    } | fields  # fmt: skip


async def test_alarm_transitions_are_stored_once_and_decide_the_alarm(dsn, alarms):
    events = [transition(1, "raised"), transition(2, "cleared")]
    first = await alarms.write(events[:1], {("iot_alerts", 0): Move(None, 1)})
    assert [tuple(r) for r in await fetch(dsn, "SELECT alarm_id, value FROM active_alarms")] == [("a1", 41.0)]
    second = await alarms.write(events, {("iot_alerts", 0): Move(1, 2)})
    assert (first.accepted, second.accepted, second.duplicates) == (1, 1, 1)
    (alarm,) = await fetch(dsn, "SELECT * FROM alarms")
    assert (alarm["transition"], alarm["state"], alarm["transitions"], alarm["value"]) == (
        "cleared",
        "returned",
        2,
        41.0,
    )
    assert (alarm["cleared_at"], alarm["updated_at"]) == (at(NOW_US + 2), at(NOW_US + 2))
    assert (alarm["occurred_at"], alarm["detected_at"]) == (at(NOW_US), at(NOW_US + 1))
    assert await count(dsn, "alarm_events") == 2
    assert await count(dsn, "active_alarms") == 0


async def test_raised_and_cleared_in_one_batch(dsn, alarms):
    await alarms.write([transition(1, "raised"), transition(2, "cleared"), transition(3, "raised", alarm_id="a2")], {})
    rows = await fetch(dsn, "SELECT alarm_id, transition, value, transitions FROM alarms ORDER BY 1")
    assert [tuple(r) for r in rows] == [("a1", "cleared", 41.0, 2), ("a2", "raised", 43.0, 1)]


@pytest.mark.parametrize(
    "fields",
    [{"alarm_id": None}, {"severity": 5}, {"detected_at": None}, {"detected_at": 7}, {"message": "a\0"}, {"value": "x"},
     {"raw_offset": 2**70}, {"message": "a\ud800"}, {"rule_rev": "x"}],
)  # fmt: skip
async def test_a_bad_transition_takes_no_other_with_it(alarms, dsn, fields):
    events = [
        transition(1, "raised"),
        transition(2, "raised", alarm_id="a2") | fields,
        transition(3, "raised", alarm_id="a3"),
    ]
    result = await alarms.write(events, {("iot_alerts", 0): Move(None, 3)})
    assert ([r.message for r in result.rejected], result.accepted) == ([1], 2)
    assert await count(dsn, "alarms") == 2
