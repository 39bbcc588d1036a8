"""PostgreSQL and ClickHouse compared, damaged on purpose, repaired and rebuilt: both engines are real."""

import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from sink_support import DAY_US, NOW_US, SECOND_US, batch, execute, live, message, record

from preservarium.clock import ManualClock
from preservarium.operations import derived, verification
from preservarium.operations.compared_tables import ALARM_EVENTS, LATE_COLUMNS, MEASUREMENTS, TABLES
from preservarium.operations.verification import Verifier, unreplicated
from preservarium.stages.sync import AGGREGATES as AGGREGATES_IN_CLICKHOUSE
from preservarium.stages.sync import ALARM_EVENTS as ALARMS_IN_CLICKHOUSE
from preservarium.stages.sync import ANOMALIES as ANOMALIES_IN_CLICKHOUSE
from preservarium.stages.sync import COMMAND_EVENTS as COMMANDS_IN_CLICKHOUSE
from preservarium.stages.sync import EventSync, ReadingSync
from preservarium.stores.base import Move
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.event_tables import EventStore
from preservarium.stores.maintenance import Maintenance
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.stores.tables import AGGREGATES as AGGREGATES_IN_POSTGRES
from preservarium.stores.tables import ALARM_EVENTS as ALARMS_IN_POSTGRES
from preservarium.stores.tables import ANOMALIES as ANOMALIES_IN_POSTGRES
from preservarium.stores.tables import COMMAND_EVENTS as COMMANDS_IN_POSTGRES
from preservarium.stores.timescale import TimescaleStore

T = "iot_validated_data"
#: Noon of the day before yesterday: rows around it are of one day, and nothing of it is on its way.
NOON_US = NOW_US // DAY_US * DAY_US - 2 * DAY_US + DAY_US // 2
DAY = datetime.fromtimestamp(NOON_US / 1e6, UTC).date()
FIRST, LAST = DAY - timedelta(days=2), DAY + timedelta(days=1)

ODD = (0.0, -0.0, 5e-324, -2.2250738585072014e-308, 1.7976931348623157e308, 0.1 + 0.2, 1e22, -1.5, 2**53 + 1.0, 1 / 3)
TEXTS = ("", "open", "offen, ünverschlossen", "日本\n語", 'it\'s \\ "quoted"', "\U0001f600" * 3, " ", "\u00a0", "a\tb")


@pytest.fixture
async def settings(dsn: str, clickhouse: str, clickhouse_database: str) -> Any:
    made = live(postgres={"url": dsn}, clickhouse={"url": clickhouse, "database": clickhouse_database, "timeout_s": 30})
    await migrate_clickhouse(made())
    return made


#: The tables that views fill, as their readers see them; and what their definition says over the source.
VIEWS = {
    "latest_values": "SELECT * FROM latest_values FINAL ORDER BY ALL",
    "measurement_days": "SELECT day, device_id, quality, generation, sum(rows) AS n FROM measurement_days GROUP BY ALL HAVING n != 0 ORDER BY ALL",
}  # fmt: skip
TRUTH = {
    "latest_values": "SELECT device_id, component_type, pin_position, connector_mode, timestamp, value, value_text, unit, quality, received_at,"
    " bitShiftLeft(toUInt256(toUnixTimestamp64Micro(timestamp)), 128) + bitShiftLeft(toUInt256(generation), 64)"
    " + toUInt64(9223372036854775807 + if(revised = 1, 1, -1) * toUnixTimestamp64Micro(received_at)) AS v FROM measurements FINAL"
    " ORDER BY timestamp DESC LIMIT 1 BY device_id, component_type, pin_position, connector_mode",
    "measurement_days": "SELECT toDate(timestamp), device_id, quality, generation, count() FROM measurements FINAL GROUP BY ALL ORDER BY ALL",
}  # fmt: skip


class Stores:
    """The same lines into both stores, through the stages' own code."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.postgres = TimescaleStore(settings)
        self.clickhouse = ClickHouseStore(settings)
        self.alarms = EventStore(ALARMS_IN_POSTGRES, settings, sink="sink-alarms")
        self._sync = ReadingSync(self.clickhouse, settings, clock=ManualClock(NOW_US))
        self._sync_alarms = EventSync(ALARMS_IN_CLICKHOUSE, self.clickhouse, settings)
        self._offset = self._alarm_offset = 0

    async def write(self, messages: list[Any]) -> None:
        result = await self.postgres.write(messages, {})
        assert not result.rejected
        await self.only_clickhouse(messages)

    async def only_clickhouse(self, messages: list[Any]) -> None:
        await self._sync([batch(T, 0, [record(self._offset, *messages)])])
        self._offset += 1

    async def write_alarms(self, lines: list[Any]) -> None:
        moves = {("iot_alerts", 0): Move(self._alarm_offset or None, self._alarm_offset + 1)}
        assert not (await self.alarms.write(lines, moves)).rejected
        await self._sync_alarms([batch("iot_alerts", 0, [record(self._alarm_offset, *lines)])])
        self._alarm_offset += 1

    async def command(self, text: str) -> None:
        await self.clickhouse.query("SELECT 1")
        await self.clickhouse._client.command(text)

    async def rows(self, table: str = "measurements", final: str = "FINAL") -> list[Any]:
        if table not in TABLES:
            return await self.clickhouse.query(VIEWS[table])
        columns = ", ".join(TABLES[table].types)
        return await self.clickhouse.query(f"SELECT {columns} FROM {table} {final} ORDER BY ALL")

    async def views_follow(self) -> bool:
        """Whether both tables are what `measurements` makes of them."""
        return all(
            [sorted(await self.rows(name)) == sorted(await self.clickhouse.query(TRUTH[name])) for name in VIEWS]
        )

    async def close(self) -> None:
        for store in (self.postgres, self.clickhouse, self.alarms):
            await store.close()


@pytest.fixture
async def stores(settings: Any) -> AsyncIterator[Stores]:
    made = Stores(settings)
    yield made
    await made.close()


async def always(_table: Any) -> bool:
    return True


@pytest.fixture
async def verifier(settings: Any, stores: Stores) -> AsyncIterator[Verifier]:
    async with Verifier(settings(), settled=always) as made:
        yield made


def fleet(rng: random.Random, messages: int = 300) -> list[Any]:
    """Messages of a dozen devices over three days, with every odd value there is."""
    found = []
    for i in range(messages):
        readings: list[Any] = [
            rng.choice(ODD),
            {"value": None, "quality": 9},
            {"value_text": rng.choice(TEXTS), "unit": ""},
            {"value": rng.uniform(-1e6, 1e6), "flags": rng.choice([[], ["spike"], ["a", "b,c"]])},
            {"value": 1.0, "unit": rng.choice(["Cel", "°C", "K"]), "revised": rng.random() < 0.2},
        ]
        found.append(
            message(
                f"d{i % 12}-é", *readings, at=NOON_US - rng.randrange(3) * DAY_US + i * 7_919, offset=i, raw_index=i % 3,
                topic=rng.choice(["devices/1/up", "", "ä/b"]), experiment_id=rng.choice(["", "x1"]), config_rev=rng.randrange(2**40),
            )
        )  # fmt: skip
    return found


def transition(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "alarm_id": f"a{number // 3}", "transition_id": f"t{number}", "device_id": f"d{number % 4}", "rule": "too hot",
        "rule_rev": 3, "component_type": "temperature", "pin_position": "0", "severity": "major", "transition": "raised",
        "state": "unacknowledged", "occurred_at": NOON_US + number, "detected_at": NOON_US + number + 5, "cleared_at": None,
        "value": ODD[number % len(ODD)], "unit": "Cel", "threshold": 0.1, "message": TEXTS[number % len(TEXTS)],
        "raw_partition": 1, "raw_offset": number, "raw_index": 0, "generation": 0,
    } | fields  # fmt: skip


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else writes: what differs is looked at again at once."""
    monkeypatch.setattr(verification, "VIEWS_SETTLE_S", 0.01)


async def verify(verifier: Verifier, *tables: Any, repair: bool = False) -> Any:
    return await verifier.verify(tables or list(TABLES.values()), FIRST, LAST, repair=repair)


def test_every_column_that_sync_writes_is_compared():
    assert {f.name for f in MEASUREMENTS.fields} | {"circular"} == MEASUREMENTS.types.keys()


async def test_the_same_rows_are_the_same_in_both_engines(stores, verifier):
    await stores.write(fleet(random.Random(1)))
    await stores.write_alarms([transition(i, value=None if i % 5 == 0 else ODD[i % len(ODD)]) for i in range(40)])
    verdict = await verify(verifier)
    assert (verdict.same, verdict.differences, verdict.rows, verdict.unmerged) == (True, [], 1_540, {})


async def test_a_number_has_the_same_bits_in_both_engines(stores, verifier):
    """-0 and 0 are told apart, and so are neighbours; a device each, because in a sum two faults could meet."""
    values = [*ODD, None]
    await stores.write([message(f"d{i}", {"value": v}, at=NOON_US, offset=i) for i, v in enumerate(values)])
    assert (await verify(verifier)).same
    await stores.command(
        "ALTER TABLE measurements UPDATE value = multiIf(isNull(value), 0., value = 0, -value, value * (1 + 2.220446049250313e-16))"
        " WHERE abs(value) > 1e-300 OR value = 0 OR isNull(value) SETTINGS mutations_sync = 2"
    )
    found = (await verify(verifier)).differences
    assert {d.what for d in found} == {"altered"}
    # The smallest number has no neighbour that a product would reach, and the largest becomes infinite: different enough.
    assert {d.device_id for d in found} == {
        f"d{i}" for i, v in enumerate(values) if v is None or not 0 < abs(v) < 1e-300
    }


DAMAGES = {
    "missing": "DELETE FROM measurements WHERE device_id = 'd3-é' AND component_type = 'temperature' AND pin_position = '0'",
    "a whole day": f"ALTER TABLE measurements DROP PARTITION ID '{DAY:%Y%m%d}'",
    "everything": "TRUNCATE TABLE measurements",
    "a value": "ALTER TABLE measurements UPDATE value = 42 WHERE device_id = 'd1-é' SETTINGS mutations_sync = 2",
    "a text": "ALTER TABLE measurements UPDATE value_text = 'shut' WHERE device_id = 'd2-é' SETTINGS mutations_sync = 2",
    "a surplus row": "INSERT INTO measurements (timestamp, device_id, component_type, value) SELECT timestamp + 1, device_id, 'ghost', 7"
    " FROM measurements WHERE device_id = 'd4-é'",
    "a surplus device": "INSERT INTO measurements (timestamp, device_id, component_type, value) SELECT timestamp, 'zz', 'ghost', 7"
    " FROM measurements LIMIT 30",
    "a newer version": "INSERT INTO measurements (timestamp, device_id, connector_mode, component_type, pin_position, value, generation)"
    " SELECT timestamp, device_id, connector_mode, component_type, pin_position, 99, 5 FROM measurements WHERE device_id = 'd5-é'",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
async def test_damage_is_found_and_repaired(stores, verifier, damage):
    await stores.write(fleet(random.Random(2)))
    before = await stores.rows()
    await stores.command(DAMAGES[damage])
    assert await stores.rows() != before
    found = await verify(verifier)
    assert not found.same
    assert found.differing == len(found.differences)
    repaired = await verify(verifier, repair=True)
    assert repaired.same
    assert repaired.repaired == len(repaired.differences)
    # Views differ before where rows are gone, and after where they came again: other ones.
    ours = [[(d.device_id, d.day) for d in v.differences if d.table == "measurements"] for v in (found, repaired)]
    assert ours[0] == ours[1] != []
    assert await stores.rows() == before
    again = await verify(verifier)
    assert (again.same, again.differences) == (True, [])


async def test_what_is_told_of_a_difference(stores, verifier):
    await stores.write([message("a", 1.0, 2.0, 3.0, at=NOON_US), message("b", 1.0, at=NOON_US, offset=1)])
    await stores.command("DELETE FROM measurements WHERE device_id = 'a' AND pin_position = '1'")
    difference, *views = (await verify(verifier)).differences
    assert {d.table for d in views} == VIEWS.keys()  # they count a row that is gone
    assert (difference.device_id, difference.day, difference.what) == ("a", DAY, "missing")
    assert (difference.expected.rows, difference.found.rows) == (3, 2)
    difference, *views = (await verify(verifier, repair=True)).differences
    assert (difference.inserted, difference.deleted, difference.repaired) == (1, 0, True)
    assert [(d.table, d.expected.rows, d.found.rows) for d in views] == [("measurement_days", 3, 4)]


async def test_doubled_rows_are_told_and_merged(stores, verifier):
    await stores.write(fleet(random.Random(3)))
    await stores.command("SYSTEM STOP MERGES measurements")
    columns = ", ".join(MEASUREMENTS.types)
    await stores.command(
        f"INSERT INTO measurements ({columns}) SELECT {columns} FROM measurements SETTINGS insert_deduplication_token = 'again'"
    )
    await stores.command("SYSTEM START MERGES measurements")
    assert len(await stores.rows(final="")) > len(await stores.rows())
    verdict = await verify(verifier)
    # A background merge may come between; what is left of the doubles is told. The view counted each insert.
    assert {(d.table, d.found.rows / d.expected.rows) for d in verdict.differences} == {("measurement_days", 2)}
    verdict = await verify(verifier, repair=True)
    assert (verdict.same, verdict.unmerged.get("measurements", 0)) == (True, 0)
    assert len(await stores.rows(final="")) == len(await stores.rows()) == 1_500


async def test_a_repair_is_not_swallowed_by_the_window_of_tokens(stores, verifier):
    """The same rows as an insert that the engine remembers, deleted since: inserted again they must arrive."""
    await stores.write([message("a", 1.0, at=NOON_US)])
    for _ in range(3):
        await stores.command("DELETE FROM measurements WHERE 1")
        assert (await verify(verifier, repair=True)).same
        assert len(await stores.rows()) == 1


async def test_a_worker_that_writes_meanwhile_loses_nothing(stores, settings, monkeypatch):
    """At every delete of the repair, sync stores more of the same device and day."""
    await stores.write(fleet(random.Random(4)))
    await stores.command(DAMAGES["a newer version"])
    await stores.command(DAMAGES["a value"])
    command, written = Maintenance.command, []

    async def meanwhile(self: Maintenance, statement: str, **more: Any) -> None:
        if statement.startswith("DELETE FROM measurements "):
            await stores.write(
                [message("d5-é", 5.5, at=NOON_US + SECOND_US + len(written), offset=1_000 + len(written))]
            )
            written.append(statement)
        await command(self, statement, **more)

    monkeypatch.setattr(Maintenance, "command", meanwhile)
    async with Verifier(settings(), settled=always) as verifier:
        await verify(verifier, repair=True)
        assert written
        assert (await verify(verifier)).same
        assert len([r for r in await stores.rows() if r[5] == 5.5]) == len(written)


async def test_nothing_is_deleted_while_the_sink_is_behind(stores, settings):
    await stores.write([message("a", 1.0, at=NOON_US)])
    late = [message("a", 2.0, at=NOON_US + 5, offset=1)]
    await stores.only_clickhouse(late)
    for settled in (None, never):
        async with Verifier(settings(), settled=settled) as verifier:
            (difference,) = (await verify(verifier, repair=True)).differences
            assert (difference.kept, difference.deleted, difference.repaired) == (1, 0, False)
    await stores.postgres.write(late, {})
    async with Verifier(settings(), settled=never) as verifier:
        assert (await verify(verifier)).same
    assert len(await stores.rows()) == 2


async def never(_table: Any) -> bool:
    return False


async def test_what_was_received_just_now_is_left_out(stores, verifier):
    await stores.only_clickhouse([message("a", 2.0, at=NOON_US, received_at=time.time_ns() // 1_000)])
    assert (await verify(verifier)).same


async def test_rows_that_wait_to_be_merged_are_rows(stores, verifier, dsn):
    await stores.write([message("a", 1.0, 2.0, at=NOON_US)])
    await execute(dsn, f"INSERT INTO measurements_late ({LATE_COLUMNS}) SELECT {LATE_COLUMNS}"
                       " FROM measurements; DELETE FROM measurements WHERE value = 1")  # fmt: skip
    assert (await verify(verifier)).same


async def test_ranges_of_devices_and_of_time_are_cut(stores, verifier, monkeypatch):
    """The limits at their smallest: every device a range of its own, every row a range of time."""
    monkeypatch.setattr(verification, "DEVICES_MAX", 1)
    monkeypatch.setattr(verification, "ROWS_MAX", 2)
    monkeypatch.setattr(verification, "DELETE_ROWS_MAX", 1)
    messages = fleet(random.Random(5), 40)
    await stores.write(messages)
    before = await stores.rows()
    for damage in ("a surplus device", "a value", "missing"):
        await stores.command(DAMAGES[damage])
    differences = [d for d in (await verify(verifier)).differences if d.table == "measurements"]
    assert {d.device_id for d in differences} == {"d1-é", "d3-é", "zz"}
    assert (await verify(verifier, repair=True)).same
    assert await stores.rows() == before


async def test_alarm_events_are_repaired_from_the_transition_as_it_came(stores, verifier):
    await stores.write_alarms([transition(i, cleared_at=NOON_US if i % 2 else None) for i in range(30)])
    before = await stores.rows("alarm_events")
    await stores.command("DELETE FROM alarm_events WHERE device_id = 'd1'")
    await stores.command(
        "ALTER TABLE alarm_events UPDATE severity = 'minor' WHERE device_id = 'd2' SETTINGS mutations_sync = 2"
    )
    await stores.command(
        "INSERT INTO alarm_events (transition_id, device_id, rule, occurred_at) SELECT 'ghost', device_id, rule, occurred_at"
        " FROM alarm_events WHERE device_id = 'd3' LIMIT 1"
    )
    found = {d.device_id: d.what for d in (await verify(verifier)).differences}
    assert found == {"d1": "missing", "d2": "altered", "d3": "surplus"}
    assert (await verify(verifier, repair=True)).same
    assert await stores.rows("alarm_events") == before


@pytest.mark.parametrize("damage", ["missing", "a whole day", "a newer version"])
async def test_a_rebuilt_table_is_the_table(stores, verifier, damage):
    await stores.write(fleet(random.Random(6)))
    before = await stores.rows()
    await stores.command(DAMAGES[damage])
    made = await verifier.rebuild(MEASUREMENTS, FIRST, LAST)
    assert (list(made), sum(made.values())) == ([f"{DAY - timedelta(days=n):%Y%m%d}" for n in (2, 1, 0)], 1_500)
    assert await stores.rows() == before
    assert (await verify(verifier)).same
    tables = await stores.clickhouse.query(
        "SELECT name FROM system.tables WHERE database = currentDatabase() AND name LIKE '%rebuild%'"
    )
    assert tables == []


async def test_what_came_during_a_rebuild_is_kept(stores, settings, monkeypatch):
    await stores.write(fleet(random.Random(7), 60))
    fill = Verifier._fill
    now_us = datetime.now(UTC).timestamp() * 1e6

    async def meanwhile(self: Verifier, *arguments: Any) -> int:
        rows = await fill(self, *arguments)
        await stores.write([message("new", 5.5, at=NOON_US + 9, received_at=int(now_us))])
        return rows

    monkeypatch.setattr(Verifier, "_fill", meanwhile)
    async with Verifier(settings(), settled=always, settle_s=-60) as verifier:
        await verifier.rebuild(MEASUREMENTS, DAY, DAY)
        assert [r[1] for r in await stores.rows() if r[5] == 5.5 and r[1] == "new"] == ["new"]
        assert (await verify(verifier)).same


async def test_a_partition_that_postgres_has_nothing_of_stays(stores, verifier):
    await stores.only_clickhouse([message("a", 2.0, at=NOON_US)])
    assert await verifier.rebuild(MEASUREMENTS, FIRST, LAST) == {}
    assert len(await stores.rows()) == 1


async def test_alarm_events_are_rebuilt_by_month(stores, verifier):
    await stores.write_alarms([transition(i) for i in range(30)])
    before = await stores.rows("alarm_events")
    await stores.command("TRUNCATE TABLE alarm_events")
    month = DAY.replace(day=1)
    made = await verifier.rebuild(ALARM_EVENTS, month, date.fromordinal(month.toordinal() + 40))
    assert made == {f"{month:%Y%m}": 30}
    assert await stores.rows("alarm_events") == before


@pytest.mark.parametrize(
    ("engine", "plain"),
    [
        ("ReplacingMergeTree(version) PARTITION BY x", "ReplacingMergeTree(version) PARTITION BY x"),
        ("ReplicatedReplacingMergeTree('/t/{uuid}/{shard}', '{replica}', version) ORDER BY x", "ReplacingMergeTree(version) ORDER BY x"),
        ("ReplicatedReplacingMergeTree('/t/{uuid}/{shard}', '{replica}') ORDER BY x", "ReplacingMergeTree() ORDER BY x"),
        ("ReplicatedMergeTree ORDER BY x", "MergeTree ORDER BY x"),
        ("ReplicatedReplacingMergeTree(version) ORDER BY x", "ReplacingMergeTree(version) ORDER BY x"),
    ],
)  # fmt: skip
def test_a_shadow_is_not_replicated(engine, plain):
    assert unreplicated(engine) == plain


VIEW_DAMAGES = {
    "a series is missing": "DELETE FROM latest_values WHERE device_id = 'd3-é' AND pin_position = '0'",
    "all series are missing": "TRUNCATE TABLE latest_values",
    "a series that is none": "INSERT INTO latest_values SELECT * REPLACE ('ghost' AS device_id) FROM latest_values LIMIT 3",
    "a value": "ALTER TABLE latest_values UPDATE value = 42, value_text = '' WHERE device_id = 'd1-é' SETTINGS mutations_sync = 2",
    "a newer row that is none": "INSERT INTO latest_values SELECT * REPLACE (timestamp + 9 AS timestamp, version + bitShiftLeft(toUInt256(9000000), 128)"
    " AS version, 7 AS value) FROM latest_values FINAL WHERE device_id = 'd5-é'",
    "an older row": "DELETE FROM latest_values WHERE 1; INSERT INTO latest_values SELECT * FROM (SELECT device_id, component_type, pin_position,"
    " connector_mode, timestamp, value, value_text, unit, quality, received_at, 1 FROM measurements ORDER BY timestamp LIMIT 1 BY 1, 2, 3, 4)",
    "a day is missing": f"DELETE FROM measurement_days WHERE day = '{DAY}'",
    "all days are missing": "TRUNCATE TABLE measurement_days",
    "a day counted twice": "INSERT INTO measurement_days SELECT * FROM measurement_days WHERE device_id = 'd0-é'",
    "days of a device that is none": "INSERT INTO measurement_days SELECT * REPLACE ('ghost' AS device_id) FROM measurement_days LIMIT 3",
    "another quality": "ALTER TABLE measurement_days UPDATE rows = rows + 5 WHERE device_id = 'd2-é' AND quality = 9 SETTINGS mutations_sync = 2",
}  # fmt: skip


@pytest.mark.parametrize("damage", VIEW_DAMAGES)
async def test_what_views_have_made_is_found_and_made_anew(stores, verifier, damage):
    await stores.write(fleet(random.Random(8)))
    assert await stores.views_follow()
    for number, statement in enumerate(VIEW_DAMAGES[damage].split("; ")):
        await stores.command(
            statement + f" SETTINGS insert_deduplication_token = 'd{number}'" if "INSERT" in statement else statement
        )
    assert not await stores.views_follow()
    found = await verify(verifier, MEASUREMENTS)
    assert not found.same
    assert len({d.table for d in found.differences} & VIEWS.keys()) == 1
    repaired = await verify(verifier, MEASUREMENTS, repair=True)
    assert (repaired.same, repaired.repaired) == (True, found.differing)
    assert await stores.views_follow()
    assert (await verify(verifier)).differences == []


@pytest.mark.parametrize(
    ("how", "damage"),
    [("repair", "everything"), ("repair", "a surplus device"), ("repair", "a newer version"), ("repair", "a value"),
     ("rebuild", "a whole day"), ("rebuild", "a surplus row"), ("rebuild", "a newer version")],
)  # fmt: skip
async def test_views_follow_a_repair_and_a_rebuild(stores, verifier, damage, how):
    await stores.write(fleet(random.Random(9)))
    await stores.command(DAMAGES[damage])
    if how == "rebuild":
        await verifier.rebuild(MEASUREMENTS, FIRST, LAST)
    assert (await verify(verifier, repair=True)).same
    assert await stores.views_follow()
    assert (await verify(verifier)).differences == []


class Killed(BaseException):
    """As if the process ended there."""


async def test_a_repair_that_is_killed_anywhere_can_be_run_again(stores, settings, monkeypatch):
    """At each statement that writes, before it and after it, until one repair comes through."""
    await stores.write(fleet(random.Random(10), 120))
    for damage in ("a newer version", "a surplus device", "missing"):
        await stores.command(DAMAGES[damage])
    await stores.command(VIEW_DAMAGES["a day counted twice"])
    done = [0]
    deadly = [0]

    def mortal(method: Any) -> Any:
        async def call(self: Maintenance, *arguments: Any, **more: Any) -> None:
            done[0] += 1
            if done[0] == deadly[0] and done[0] % 2:
                raise Killed
            await method(self, *arguments, **more)
            if done[0] == deadly[0]:
                raise Killed

        return call

    monkeypatch.setattr(Maintenance, "command", mortal(Maintenance.command))
    monkeypatch.setattr(Maintenance, "insert", mortal(Maintenance.insert))
    kills = 0
    while True:
        done[0], deadly[0] = 0, kills % 4 + 1
        try:
            async with Verifier(settings(), settled=always) as verifier:
                verdict = await verify(verifier, repair=True)
            break
        except Killed:
            kills += 1
            assert kills < 200
    assert kills > 8
    assert verdict.same
    assert await stores.views_follow()


async def test_a_correction_that_was_counted_when_it_came_is_no_fault(stores, verifier):
    """A reading and its later verdict are two inserts and one row."""
    await stores.write([message("a", 1.0, 2.0, at=NOON_US)])
    await stores.write([message("a", {"value": 1.0, "quality": 4, "revised": True}, at=NOON_US, offset=1)])
    assert sum(row[4] for row in await stores.rows("measurement_days")) == 3
    assert (await verify(verifier)).same


async def test_ranges_of_devices_are_cut_for_views(stores, verifier, monkeypatch):
    monkeypatch.setattr(derived, "OWNERS_MAX", 1)
    monkeypatch.setattr(derived, "ROWS_MAX", 1)
    await stores.write(fleet(random.Random(11), 40))
    for damage in ("a series that is none", "a value", "all days are missing"):
        await stores.command(VIEW_DAMAGES[damage])
    found = await verify(verifier, MEASUREMENTS, repair=True)
    assert found.same
    assert {d.device_id for d in found.differences if d.table == "latest_values"} == {"d1-é", "ghost"}
    assert len([d for d in found.differences if d.table == "measurement_days"]) > 12
    assert await stores.views_follow()


SERIES = {
    "device_id": "d", "connector_mode": "LoRaWAN", "component_type": "t", "pin_position": "-1", "unit": "°C", "generation": 0,
}  # fmt: skip


def anomaly(number: int, **fields: Any) -> dict[str, Any]:
    return SERIES | {
        "device_id": f"d{number % 4}", "anomaly_id": f"a{number}", "state": "begins", "timestamp": NOON_US + number, "value": -0.0,
        "expected": 0.1 + 0.2, "score": 3.1, "threshold": 2.5, "raw_partition": 1 if number % 3 else None, "raw_offset": number, "raw_index": 0,
    } | fields  # fmt: skip


#: What differs where the quantity is circular.
DIRECTIONS: dict[str, Any] = dict.fromkeys(("min", "max", "sum", "consumption")) | {
    "mean": 0.1, "circular": 360.0, "spread": 3.2, "cos_sum": 1 / 3, "sin_sum": -0.0,
}  # fmt: skip


def window(number: int, **fields: Any) -> dict[str, Any]:
    start = NOON_US + number // 4 * 60_000_000
    return SERIES | {
        "device_id": f"d{number % 4}", "window_id": f"w{number}", "revision": 0, "window_start": start, "window_end": start + 60_000_000,
        "size_s": 60, "hop_s": 60, "count": 3, "min": 1.0, "max": 1 / 3, "mean": 2.0, "sum": 6.0, "last": 3.0, "last_at": start + 5,
        "closed_by": "watermark", "consumption": 7.5 if number % 2 else None,
    } | (DIRECTIONS if number % 5 == 0 else {}) | fields  # fmt: skip


def command_event(number: int, **fields: Any) -> dict[str, Any]:
    ended = NOON_US + number + 3 if number % 3 == 2 else None
    return {
        "event_id": f"e{number}", "command_id": f"c{number // 3}", "sequence": number % 3, "device_id": f"d{number // 3 % 4}",
        "event": ("requested", "sent", "timed_out")[number % 3], "state": ("pending", "sent", "failed")[number % 3], "at": NOON_US + number,
        "reason": TEXTS[number % len(TEXTS)], "attempt": number % 3, "command": "close ü", "priority": 7, "requested_at": NOON_US - 1,
        "requested_by": "ann", "cause": None if number % 2 else "t1", "expires_at": NOON_US + DAY_US, "ended_at": ended,
        "idempotency_key": "", "content": {"json": {"valve": number}}, "confirm": None,
    } | fields  # fmt: skip


#: table -> its declarations for PostgreSQL and ClickHouse, and what to alter and to forge in it
EVENT_TABLES: dict[str, tuple[Any, Any, str, str]] = {
    "anomalies": (ANOMALIES_IN_POSTGRES, ANOMALIES_IN_CLICKHOUSE, "score = 4", "anomaly_id"),
    "aggregates": (AGGREGATES_IN_POSTGRES, AGGREGATES_IN_CLICKHOUSE, "mean = 4", "component_type"),
    "command_events": (COMMANDS_IN_POSTGRES, COMMANDS_IN_CLICKHOUSE, "ended_at = now64(6)", "event_id"),
}


@pytest.mark.parametrize("table", EVENT_TABLES)
async def test_other_events_are_compared_repaired_and_rebuilt(stores, settings, verifier, table):
    """What came twice, corrected, and in a replay besides."""
    declared, in_clickhouse, altered, forged = EVENT_TABLES[table]
    if table == "anomalies":
        lines = [anomaly(i) for i in range(40)]
    elif table == "command_events":
        lines = [command_event(i) for i in range(40)]
    else:
        lines = [window(i) for i in range(40)] + [window(i, revision=1, count=4) for i in range(0, 40, 3)]
        lines += [window(i, window_id=f"replayed{i}", generation=1, count=9) for i in range(0, 40, 7)]
    events = EventStore(declared, settings, sink=TABLES[table].sink)
    assert not (await events.write([*lines, *lines[:5]], {})).rejected
    await events.close()
    await EventSync(in_clickhouse, stores.clickhouse, settings)(
        [batch(declared.topic.name, 0, [record(i, line) for i, line in enumerate([*lines, *lines[:5]])])]
    )
    compared = TABLES[table]
    assert (compared.topic, compared.group) == (in_clickhouse.topic.name, in_clickhouse.stage)
    assert {f.name for f in compared.fields} == compared.types.keys()
    before = await stores.rows(table)
    verdict = await verify(verifier, compared)
    assert (verdict.differences, verdict.rows) == ([], 40)
    await stores.command(f"DELETE FROM {table} WHERE device_id = 'd1'")
    await stores.command(f"ALTER TABLE {table} UPDATE {altered} WHERE device_id = 'd2' SETTINGS mutations_sync = 2")
    await stores.command(
        f"INSERT INTO {table} SELECT * REPLACE ('ghost' AS {forged}) FROM {table} WHERE device_id = 'd3' LIMIT 1"
    )
    found = {d.device_id: d.what for d in (await verify(verifier, compared)).differences}
    assert found == {"d1": "missing", "d2": "altered", "d3": "surplus"}
    assert (await verify(verifier, compared, repair=True)).same
    assert await stores.rows(table) == before
    await stores.command(f"TRUNCATE TABLE {table}")
    month = DAY.replace(day=1)
    assert await verifier.rebuild(compared, month, date.fromordinal(month.toordinal() + 40)) == {f"{month:%Y%m}": 40}
    assert await stores.rows(table) == before


async def test_days_that_postgres_does_not_keep_are_left_alone(stores, settings):
    """Anomalies are kept for other days than readings: older ones in ClickHouse are no surplus."""
    short = live(**settings().model_dump(include={"postgres", "clickhouse"}) | {"sink": {"events_retention_days": 1}})
    await EventSync(ANOMALIES_IN_CLICKHOUSE, stores.clickhouse, settings)(
        [batch("anomaly_alerts", 0, [record(0, anomaly(1))])]
    )
    async with Verifier(short(), settled=always) as verifier:
        assert (await verify(verifier, TABLES["anomalies"], repair=True)).same
    assert len(await stores.rows("anomalies")) == 1
