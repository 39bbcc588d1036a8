"""Roll-ups say what the rows say, on plain PostgreSQL and on TimescaleDB, whatever comes in whichever order."""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest
from sink_support import DAY_US, SECOND_US, execute, fetch, live, message

from preservarium.stores import upkeep
from preservarium.stores.timescale import TimescaleStore

HOUR_US = 3600 * SECOND_US

#: Buckets of which a level and the rows differ: of no value, too, and those that only one of them has.
DIFFERENT = """
WITH raw AS (
  SELECT m.series_id, date_bin($1, m.timestamp, '2000-01-01 00:00+00') AS bucket, count(*) AS records, count(m.value) AS n,
         sum(m.value) AS sum, min(m.value) AS min, max(m.value) AS max,
         (array_agg(m.value ORDER BY m.timestamp DESC) FILTER (WHERE m.value IS NOT NULL))[1] AS last
  FROM measurements m GROUP BY 1, 2)
SELECT * FROM raw r FULL JOIN {level} v USING (series_id, bucket)
WHERE bucket >= $2 AND ((r.records, r.n, r.min, r.max, r.last) IS DISTINCT FROM (v.records, v.n, v.min, v.max, v.last)
  OR (r.sum IS NULL) <> (v.sum IS NULL) OR abs(r.sum - v.sum) > 1e-9 * (1 + abs(r.sum)))"""
LEVELS = {"measurement_1m": "1 minute", "measurement_1h": "1 hour", "measurement_1d": "1 day"}


async def different(dsn: str, since: str = "-infinity") -> dict[str, list[Any]]:
    """Level -> its buckets that are not what the rows are."""
    found = {}
    for level, width in LEVELS.items():
        query = DIFFERENT.format(level=level).replace("$1", f"INTERVAL '{width}'").replace("$2", since)
        if rows := await fetch(dsn, query):
            found[level] = [tuple(row) for row in rows[:3]]
    return found


async def today(dsn: str) -> dict[str, list[Any]]:
    return await different(dsn, "date_bin('1 day', now(), '2000-01-01 00:00+00')")


async def everywhere(dsn: str) -> dict[str, list[Any]]:
    return await different(dsn, "'-infinity'")


async def settle(store: TimescaleStore, dsn: str) -> None:
    """As many turns of upkeep as it takes; one, on a machine that has nothing else to do."""
    waiting = "SELECT FROM rollup_dirty WHERE series IS NOT NULL UNION ALL SELECT FROM measurements_late"
    for _ in range(20):
        await store.maintain()
        if not await fetch(dsn, waiting):
            return
    pytest.fail("upkeep comes to no end")


@pytest.fixture
async def stores(dsn):
    made = [TimescaleStore(live(postgres={"url": dsn})) for _ in range(2)]
    yield made
    for store in made:
        await store.close()


@pytest.fixture
async def store(stores):
    return stores[0]


async def compress(dsn: str) -> None:
    """What TimescaleDB's policies do in time, done at once."""
    await execute(
        dsn,
        "DO $$ DECLARE c regclass; BEGIN IF storage_engine() = 'timescaledb' THEN"
        " FOR c IN SELECT show_chunks('measurements') UNION ALL SELECT show_chunks('rollup_1m') LOOP"
        "  PERFORM compress_chunk(c, if_not_compressed => true); END LOOP; END IF; END $$",
    )


class Script:
    """Random doings; each is a coroutine function without arguments."""

    def __init__(self, dsn: str, stores: list[TimescaleStore], rng: random.Random) -> None:
        self.dsn, self.stores, self.rng = dsn, stores, rng
        self.sent: list[Any] = []

    def doings(self) -> list[Callable[[], Any]]:
        return [self.now, self.now, self.earlier_today, self.old, self.scattered, self.again, self.correct, self.revise,
                self.upkeep, self.upkeep_of_both, self.policies]  # fmt: skip

    async def write(self, ages_us: list[int]) -> None:
        now_us = time.time_ns() // 1000
        messages = [
            message(f"d{self.rng.randrange(5)}", self.value(), self.value(), at=now_us - age - self.rng.randrange(60))
            for age in ages_us
        ]
        self.sent += messages
        await self.rng.choice(self.stores).write(messages, {})

    def value(self) -> Any:
        return self.rng.uniform(-50, 50) if self.rng.random() < 0.9 else {"value": None, "value_text": "open"}

    async def now(self) -> None:
        await self.write([self.rng.randrange(-30 * SECOND_US, 90 * SECOND_US) for _ in range(30)])

    async def earlier_today(self) -> None:
        start = self.rng.randrange(24 * HOUR_US)
        await self.write([start + i * 20 * SECOND_US for i in range(30)])

    async def old(self) -> None:
        start = self.rng.randrange(12 * DAY_US)
        await self.write([start + i * 600 * SECOND_US for i in range(20)])

    async def scattered(self) -> None:
        await self.write([self.rng.randrange(12 * DAY_US) for _ in range(20)])

    async def again(self) -> None:
        if self.sent:
            await self.rng.choice(self.stores).write(self.rng.choices(self.sent, k=10), {})

    async def correct(self) -> None:
        if self.sent:
            some = self.rng.sample(self.sent, min(5, len(self.sent)))
            generation = self.rng.randint(1, 3)
            again = [m | {"generation": generation, "readings": [r | {"value": self.rng.uniform(-50, 50), "value_text": None}
                                                                 for r in m["readings"]]} for m in some]  # fmt: skip
            await self.rng.choice(self.stores).write(again, {})

    async def revise(self) -> None:
        if self.sent:
            some = self.rng.sample(self.sent, min(5, len(self.sent)))
            later = {
                "revised": True,
                "quality": 3,
                "flags": ["spike"],
                "value": self.rng.uniform(-50, 50),
                "value_text": None,
            }
            verdicts = [m | {"readings": [r | later | {"timestamp": m["timestamp"]} for r in m["readings"]],
                             "received_at": m["received_at"] + SECOND_US} for m in some]  # fmt: skip
            await self.rng.choice(self.stores).write(verdicts, {})

    async def upkeep(self) -> None:
        await self.rng.choice(self.stores).maintain()

    async def upkeep_of_both(self) -> None:
        await asyncio.gather(*(store.maintain() for store in self.stores), self.now())

    async def policies(self) -> None:
        await asyncio.gather(*(store.apply_policies() for store in self.stores))
        await compress(self.dsn)


@pytest.mark.parametrize("seed", [1, 2])
async def test_roll_ups_equal_the_rows_in_any_order_of_doings(dsn, stores, seed):
    rng = random.Random(seed)
    script = Script(dsn, stores, rng)
    for _ in range(4):
        for _ in range(8):
            await rng.choice(script.doings())()
        assert await today(dsn) == {}, "at once, without upkeep"
        await settle(stores[0], dsn)
        assert await everywhere(dsn) == {}
        assert await stores[0].failing_jobs() == []
    assert len(await fetch(dsn, "SELECT DISTINCT bucket FROM measurement_1d")) > 4


async def test_the_tables_are_made_of_what_is_over_and_the_views_of_the_rest(dsn, store):
    """Otherwise the views would make everything of the rows, for ever, and be right."""
    now_us = time.time_ns() // 1000
    ages = [0, 90 * SECOND_US, 3 * HOUR_US, 26 * HOUR_US, 50 * DAY_US]
    await store.write([message("a", 1.0, at=now_us - age) for age in ages], {})
    await store.maintain()
    (row,) = await fetch(
        dsn, "SELECT (SELECT count(*) FROM rollup_1m), (SELECT count(*) FROM rollup_1h), (SELECT count(*) FROM rollup_1d)"
    )  # fmt: skip
    # The minute that runs is in no table; the hour of it, and of 90 s ago, may be over or not.
    assert row[0] >= 4
    assert (row[1] in (3, 4), row[2] >= 2) == (True, True)
    assert await everywhere(dsn) == {}
    assert await fetch(dsn, "SELECT FROM rollup_dirty WHERE series IS NOT NULL") == []


async def test_a_device_that_was_away_costs_its_own_hours(dsn, store):
    now_us = time.time_ns() // 1000
    others = [message(f"d{i}", 1.0, at=now_us - age * HOUR_US) for i in range(20) for age in range(30)]
    await store.write(others, {})
    await store.maintain()
    await execute(dsn, "UPDATE rollup_1h SET records = -1")
    await store.write([message("d7", 2.0, at=now_us - age * HOUR_US + 1) for age in range(20, 25)], {})
    await store.maintain()
    rows = await fetch(
        dsn,
        "SELECT DISTINCT device_id, count(*) FROM rollup_1h JOIN series USING (series_id) WHERE records > 0 GROUP BY 1",
    )
    touched = {row[0]: row[1] for row in rows}
    assert touched.pop("d7") in (5, 6)
    assert sum(touched.values()) <= 20, "of the hour that has just ended, where it has"


async def test_marks_that_pile_up_are_made_once_and_in_pieces(dsn, store, monkeypatch):
    monkeypatch.setattr(upkeep, "PAIRS_MAX", 7)
    store.upkeep._pairs = 7
    now_us = time.time_ns() // 1000
    for turn in range(6):
        await store.write(
            [message("a", 1.0, at=now_us - age * HOUR_US - turn * 900) for age in range(24, 24 * 40, 11)], {}
        )
    await settle(store, dsn)
    assert await everywhere(dsn) == {}


async def test_upkeep_that_takes_too_long_is_ended_on_the_server_and_counts_nothing_against_writes(
    dsn, store, monkeypatch
):
    monkeypatch.setattr(upkeep, "PIECE_S", 0.5)
    await store.write([message("a", 1.0, at=time.time_ns() // 1000 - 30 * HOUR_US)], {})
    blocker = await asyncpg.connect(dsn)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("LOCK TABLE rollup_1h IN EXCLUSIVE MODE")
    for turn in range(1, 3):
        await store.maintain()
        assert (store.upkeep._pairs, store.upkeep._minutes) == (upkeep.PAIRS_MAX >> turn, upkeep.MINUTES_MAX >> turn)
    assert "rollups" in await store.failing_jobs()
    assert store.breaker.report()["failures"] == 0
    under_way = "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle' AND query LIKE '%refresh_rollups%' AND pid <> pg_backend_pid()"
    assert [row[0] for row in await fetch(dsn, under_way)] == []
    assert (
        await fetch(
            dsn,
            "SELECT FROM pg_locks JOIN pg_database d ON d.oid = database WHERE datname = current_database() AND locktype = 'advisory'",
        )
        == []
    )
    await store.write([message("a", 2.0)], {})  # meanwhile
    await transaction.rollback()
    await blocker.close()
    await store.maintain()
    assert await store.failing_jobs() == []
    assert await everywhere(dsn) == {}


async def test_workers_that_do_upkeep_at_once_do_not_meet(dsn):
    """Late rows of one chunk, merged by four workers at once, deadlocked."""
    stores = [TimescaleStore(live(postgres={"url": dsn}), late_lane=True) for _ in range(4)]
    now_us = time.time_ns() // 1000
    for round_ in range(4):
        await stores[0].write(
            [message(f"d{i}", 1.0, at=now_us - (5 + i % 3) * DAY_US - round_ * 1000 - i) for i in range(300)], {}
        )
        await asyncio.gather(*(store.maintain() for store in stores), *(store.apply_policies() for store in stores))
    await settle(stores[0], dsn)
    assert (await fetch(dsn, "SELECT count(*), (SELECT count(*) FROM measurements_late) FROM measurements"))[0][:] == (
        1200,
        0,
    )
    assert await everywhere(dsn) == {}
    assert await stores[0].failing_jobs() == []
    for store in stores:
        await store.close()


async def test_what_is_staged_is_in_the_roll_ups_once_it_is_merged(dsn):
    """Its write marks nothing that an upkeep before the merge could take for done."""
    store = TimescaleStore(live(postgres={"url": dsn}), late_lane=True)
    await store.write([message("a", 1.0, at=time.time_ns() // 1000 - 9 * DAY_US)], {})
    await fetch(dsn, "SELECT refresh_rollups(1000, INTERVAL '1 hour')")
    assert await fetch(dsn, "SELECT FROM measurement_1d") == []
    await store.maintain()
    assert [row[0] for row in await fetch(dsn, "SELECT records FROM measurement_1d")] == [1]
    await store.close()


async def test_a_late_row_of_a_day_that_is_gone_does_not_stand_for_it(dsn):
    """Accepted at the very end of its retention and merged after it: its bucket keeps what all the rows had said."""
    store = TimescaleStore(live(postgres={"url": dsn}), late_lane=True)
    old_us = time.time_ns() // 1000 - 40 * DAY_US
    await store.write([message("a", float(i), at=old_us + i) for i in range(30)], {})
    await store.maintain()
    await execute(dsn, "DELETE FROM measurements")
    await store.write([message("a", 7.0, at=old_us + 99)], {})
    await store.close()
    short = TimescaleStore(live(postgres={"url": dsn}, sink={"retention_days": 30}), late_lane=True)
    await short.maintain()
    assert [row[0] for row in await fetch(dsn, "SELECT records FROM measurement_1d")] == [30]
    assert await fetch(dsn, "SELECT FROM measurements_late") == []
    await short.close()


async def test_rows_of_a_clock_that_is_ahead_are_seen_and_made_when_their_time_is_over(dsn, store):
    ahead = time.time_ns() // 1000 + 2 * HOUR_US
    await store.write([message("a", float(i), at=ahead + i * 60 * SECOND_US) for i in range(200)], {})
    await store.maintain()
    await store.maintain()
    assert await everywhere(dsn) == {}
    assert await fetch(dsn, "SELECT FROM rollup_1m") == []


async def test_the_views_of_one_series_read_no_other_rows(dsn, store):
    """Else each look at a device would read all that came in since upkeep."""
    await store.write([message(f"d{i}", 1.0) for i in range(5)], {})
    for level in LEVELS:
        plan = [
            row[0]
            for row in await fetch(
                dsn,
                f"EXPLAIN (COSTS OFF) SELECT * FROM {level} WHERE series_id = 1 AND bucket > now() - INTERVAL '1 day'",
            )
        ]
        scans = [
            i
            for i, line in enumerate(plan)
            if "Scan" in line
            and "ChunkAppend" not in line
            and ("measurements" in line or "_hyper" in line or "rollup_1" in line)
        ]
        assert scans
        for i in scans:
            assert any("series_id = 1" in line for line in plan[i : i + 3]), plan
