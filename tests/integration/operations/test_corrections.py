"""Corrections in PostgreSQL: what is derived follows, nothing live is overwritten, and undone is as it was."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import pytest
from sink_support import DAY_US, NOW_US, fetch, message, migrated_database

from preservarium.domain.quality.correction import CorrectionError
from preservarium.domain.windows import MADE_REVISION
from preservarium.operations.changes import promoting
from preservarium.operations.changes.correcting import Corrected, Correcting, Series, Time
from preservarium.operations.changes.promoting import Carrier
from preservarium.operations.changes.settling import settle
from preservarium.registry.apply import apply
from preservarium.settings import LiveSettings, load
from preservarium.stores import changes
from preservarium.stores.changes import ChangeError, State
from preservarium.stores.event_tables import EventStore
from preservarium.stores.postgres import PostgresPool
from preservarium.stores.tables import AGGREGATES
from preservarium.stores.timescale import TimescaleStore

MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
BEGIN_US = NOW_US // HOUR_US * HOUR_US - 5 * HOUR_US
REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes:
  - {name: temperature, kind: number, unit: degC, fail_span: {min: -40, max: 300}}
  - {name: energy, kind: number, unit: kWh, counter: {}}
parsers: [{name: acme, kind: json, source: {fields: [{name: t, path: t}]}}]
device_types: [{name: T1, manufacturer: Acme, parser: acme}]
devices: [{device_id: a, type: T1}, {device_id: b, type: T1}]
"""


@pytest.fixture(scope="module")
def dsn(postgres: str) -> Iterator[str]:
    with migrated_database(postgres) as dsn, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRESERVARIUM_POSTGRES__URL", dsn)
        patch.setenv("PRESERVARIUM_CLICKHOUSE__ENABLED", "false")
        yield dsn


@pytest.fixture
async def world(dsn: str, tmp_path: Any) -> AsyncIterator[Any]:
    """Two devices of two hours, a reading a minute; and what corrects them."""
    path = tmp_path / "registry.yaml"
    path.write_text(REGISTRY)
    await apply(load(), path)
    store = TimescaleStore(LiveSettings(load()))
    lines = []
    for n in range(120):
        for device, base in (("a", 20.0), ("b", 50.0)):
            lines.append(line(device, n, base + n % 5, 100.0 + n / 4, offset=n))
    await store.write(lines, {})
    connection = await asyncpg.connect(dsn)
    await rollups(connection)
    yield connection, store
    for table in (
        "measurements",
        "latest",
        "rollup_1m",
        "rollup_1h",
        "rollup_1d",
        "rollup_dirty",
        "aggregates",
        "series",
    ):
        await connection.execute(f"DELETE FROM {table}")
    await connection.execute("UPDATE changes SET state = 'discarded'")
    await connection.execute("DELETE FROM change_rows; DELETE FROM change_windows")
    await connection.close()
    await store.close()


def line(device: str, n: int, temperature: float, energy: float, *, offset: int, at: int | None = None) -> Any:
    at = BEGIN_US + n * MINUTE_US if at is None else at
    readings: list[Any] = [
        {"component_type": "temperature", "pin_position": "-1", "unit": "Cel", "value": temperature},
        {"component_type": "energy", "pin_position": "-1", "unit": "kW.h", "value": energy, "quality": 2},
    ]
    if n:
        readings.append(
            {
                "component_type": "energy_consumption",
                "pin_position": "-1",
                "unit": "kW.h",
                "value": 0.25,
                "quality": 2,
                "derived": True,
            }
        )
    return message(device, *readings, at=at, offset=offset, received_at=at)


async def rollups(connection: Any) -> None:
    while await connection.fetchval("SELECT refresh_rollups(5000, make_interval(mins => 60))"):
        pass


async def everything(dsn: str) -> dict[str, list[str]]:
    found = {}
    for table in (
        "measurements",
        "latest",
        "rollup_1m",
        "rollup_1h",
        "rollup_1d",
        "aggregates",
        "measurement_1m",
        "measurement_1h",
        "measurement_1d",
    ):
        found[table] = sorted(r[0] for r in await fetch(dsn, f"SELECT t::text FROM {table} t"))
    return found


async def corrected(connection: Any, ask: Any, kind: str = "void") -> Any:
    settings = load()
    correcting = Correcting(settings, connection)
    generation = await correcting.prepare()
    rows: Corrected = await ask(correcting)
    change = await correcting.note(kind, {}, rows, actor="ann", reason="wrong", generation=generation)
    return await Carrier(settings, connection, None).promote(change.change_id, actor="ann", reason="wrong")


async def undone(connection: Any, change: Any) -> Any:
    return await Carrier(load(), connection, None).rollback(change.change_id, actor="ben", reason="was right")


async def of(connection: Any, device: str, component_type: str) -> dict[int, Any]:
    rows = await connection.fetch(
        "SELECT (extract(epoch FROM timestamp) * 1000000)::bigint AS at, value, quality, flags, generation FROM iot_measurements"
        " WHERE device_id = $1 AND component_type = $2",
        device, component_type,
    )  # fmt: skip
    return {(row["at"] - BEGIN_US) // MINUTE_US: row for row in rows}


TEMPERATURE_A = Series("a", "temperature")
TEN_MINUTES = Time(BEGIN_US + 10 * MINUTE_US, BEGIN_US + 20 * MINUTE_US)


async def test_void_readings_are_out_of_everything_and_come_back(world: Any, dsn: str) -> None:
    connection, _ = world
    before = await everything(dsn)
    change = await corrected(connection, lambda c: c.void(TEMPERATURE_A, TEN_MINUTES))
    assert change.state is State.PROMOTED
    rows = await of(connection, "a", "temperature")
    assert [n for n, row in rows.items() if row["value"] is None] == list(range(10, 20))
    assert {
        (row["quality"], tuple(row["flags"]), row["generation"]) for row in rows.values() if row["value"] is None
    } == {(9, ("voided",), change.generation)}
    hour = await connection.fetchrow(
        "SELECT r.records, r.n FROM measurement_1h r JOIN series s USING (series_id) WHERE s.device_id = 'a' AND component_type = 'temperature'"
        " ORDER BY bucket LIMIT 1"
    )
    assert tuple(hour) == (60, 50)
    window = await connection.fetchrow(
        "SELECT count, closed_by, revision FROM aggregates WHERE device_id = 'a' AND component_type = 'temperature' AND size_s = 3600 ORDER BY window_start"
    )
    assert tuple(window) == (50, "correction", MADE_REVISION)
    with pytest.raises(ChangeError, match="changes nothing"):
        await corrected(connection, lambda c: c.void(TEMPERATURE_A, TEN_MINUTES))
    assert (await undone(connection, change)).state is State.ROLLED_BACK
    await rollups(connection)
    after = await everything(dsn)
    # Windows were none before; the ones that are made of what stands are right.
    assert {name for name in before if before[name] != after[name]} <= {"aggregates"}
    events = await changes.history(connection, change.change_id)
    assert [(event.type, event.actor) for event in events] == [
        ("asked", "ann"), ("derived", "ann"), ("approved", "ann"), ("promoted", "ann"), ("rollback_approved", "ben"), ("rolled_back", "ben"),
    ]  # fmt: skip


async def test_a_factor_is_exact_and_the_consumption_follows(world: Any, dsn: str) -> None:
    connection, _ = world
    before = await everything(dsn)
    time = Time(BEGIN_US + 60 * MINUTE_US, BEGIN_US + 500 * MINUTE_US)
    change = await corrected(connection, lambda c: c.linear(Series("a", "energy"), time, factor="1/10"), "scale")
    energy, consumption = await of(connection, "a", "energy"), await of(connection, "a", "energy_consumption")
    assert energy[61]["value"] == 11.525
    # Within the time a tenth; where it begins, a fall that nobody can explain.
    assert consumption[70]["value"] == pytest.approx(0.025)
    assert consumption[59]["value"] == 0.25
    assert "corrected" in consumption[70]["flags"]
    assert consumption[60]["quality"] == 3
    other = await of(connection, "b", "energy_consumption")
    assert {row["value"] for row in other.values()} == {0.25}
    await undone(connection, change)
    await rollups(connection)
    after = await everything(dsn)
    assert {name for name in before if before[name] != after[name]} <= {"aggregates"}


async def test_two_devices_that_were_mistaken_for_each_other(world: Any, dsn: str) -> None:
    connection, store = world
    # One of them has a reading where the other has none.
    await store.write([line("a", 300, 7.0, 999.0, offset=900, at=BEGIN_US + 15 * MINUTE_US + 30_000_000)], {})
    await rollups(connection)
    before = await everything(dsn)
    change = await corrected(
        connection, lambda c: c.swap(TEMPERATURE_A, Series("b", "temperature"), TEN_MINUTES), "swap"
    )
    a, b = await of(connection, "a", "temperature"), await of(connection, "b", "temperature")
    assert [a[n]["value"] for n in range(9, 13)] == [24.0, 50.0, 51.0, 52.0]
    assert [b[n]["value"] for n in range(9, 13)] == [54.0, 20.0, 21.0, 22.0]
    moved = await connection.fetch(
        "SELECT device_id FROM iot_measurements WHERE value = 7.0 AND component_type = 'temperature'"
    )
    assert [row[0] for row in moved] == ["b"]
    await undone(connection, change)
    await rollups(connection)
    after = await everything(dsn)
    assert {name for name in before if before[name] != after[name]} <= {"aggregates"}


async def test_an_exchanged_meter(world: Any) -> None:
    connection, store = world
    await store.write([line("a", n, 1.0, float(n - 119), offset=n) for n in range(120, 125)], {})
    at = BEGIN_US + 119 * MINUTE_US + 30_000_000
    change = await corrected(
        connection, lambda c: c.exchange(Series("a", "energy"), at, final="130", initial="0"), "exchange"
    )
    consumption = await of(connection, "a", "energy_consumption")
    assert consumption[120]["value"] == pytest.approx(130 - 129.75 + 1)
    assert (await of(connection, "a", "energy"))[120]["value"] == 1.0, "the register is what it shows"
    await undone(connection, change)
    assert (await of(connection, "a", "energy_consumption"))[120]["value"] == 0.25


async def test_one_value_and_what_is_refused(world: Any) -> None:
    connection, _ = world
    correcting = Correcting(load(), connection)
    at = BEGIN_US + 3 * MINUTE_US
    with pytest.raises(CorrectionError, match="outside"):
        await correcting.replace(TEMPERATURE_A, at, "301")
    for ask, why in (
        (correcting.replace(TEMPERATURE_A, at + 1, "20"), "nothing is stored"),
        (correcting.void(Series("a", "pressure"), TEN_MINUTES), "it has energy, energy_consumption, temperature"),
        (correcting.void(Series("nobody"), TEN_MINUTES), "not known"),
        (correcting.swap(TEMPERATURE_A, TEMPERATURE_A, TEN_MINUTES), "one device"),
        (correcting.exchange(TEMPERATURE_A, at, final=None, initial="0"), "no counter"),
    ):
        with pytest.raises(ChangeError, match=why):
            await ask
    change = await corrected(connection, lambda c: c.replace(TEMPERATURE_A, at, "21.5"), "replace")
    assert (await of(connection, "a", "temperature"))[3]["value"] == 21.5
    # The newest reading is the last value, whoever said it.
    newest = await connection.fetchval(
        "SELECT max(timestamp) FROM latest_measurements WHERE device_id = 'a' AND component_type = 'temperature'"
    )
    last = await corrected(
        connection, lambda c: c.replace(TEMPERATURE_A, changes.microseconds(newest), "33"), "replace"
    )
    assert (
        await connection.fetchval(
            "SELECT value FROM latest_measurements WHERE device_id = 'a' AND component_type = 'temperature'"
        )
        == 33.0
    )
    # What was corrected again is taken back in its order.
    again = await corrected(connection, lambda c: c.replace(TEMPERATURE_A, at, "22"), "replace")
    with pytest.raises(ChangeError, match=f"take back {again.change_id} first"):
        await undone(connection, change)
    for one in (again, last, change):
        await undone(connection, one)
    assert (await of(connection, "a", "temperature"))[3]["value"] == 23.0


async def test_what_comes_meanwhile_is_neither_lost_nor_overwritten(world: Any, dsn: str) -> None:
    connection, store = world
    settings = load()
    correcting = Correcting(settings, connection)
    generation = await correcting.prepare()
    rows = await correcting.void(TEMPERATURE_A, TEN_MINUTES)
    change = await correcting.note("void", {}, rows, actor="ann", reason="wrong", generation=generation)
    # A later verdict on one of the rows, and new rows among them, while it waits to be promoted.
    verdict = line("a", 12, 22.0, 103.0, offset=5_000)
    verdict["readings"] = [{**verdict["readings"][0], "quality": 3, "flags": ["spike"], "revised": True}]
    late = line("a", 13, 21.0, 1.0, offset=5_001, at=BEGIN_US + 13 * MINUTE_US + 1)
    late["readings"] = late["readings"][:1]
    await store.write([verdict, late], {})
    change = await Carrier(settings, connection, None).promote(change.change_id, actor="ann", reason="wrong")
    assert change.summary["left_alone"] == 1
    rows_now = await connection.fetch(
        "SELECT timestamp, value, flags FROM iot_measurements WHERE device_id = 'a' AND component_type = 'temperature' AND generation = 0"
        " AND timestamp >= $1 AND timestamp < $2",
        changes.instant(TEN_MINUTES.from_us), changes.instant(TEN_MINUTES.to_us),
    )  # fmt: skip
    assert sorted((row["value"], tuple(row["flags"] or ())) for row in rows_now) == [(21.0, ()), (22.0, ("spike",))]
    # And afterwards: the same messages once more, and a verdict on a row that is void by now.
    verdict = line("a", 14, 24.0, 103.5, offset=5_002)
    verdict["readings"] = [{**verdict["readings"][0], "quality": 3, "flags": ["spike"], "revised": True}]
    await store.write([line("a", n, 20.0 + n % 5, 100.0 + n / 4, offset=n) for n in range(120)], {})
    await store.write([verdict], {})
    assert (await of(connection, "a", "temperature"))[14]["value"] is None
    await undone(connection, change)
    temperature = await of(connection, "a", "temperature")
    assert temperature[12]["flags"] == ["spike"]
    assert [temperature[n]["value"] for n in (10, 11, 14)] == [20.0, 21.0, 24.0]


async def test_an_emptied_series_has_no_last_value_and_no_rollups_and_goes_on_live(world: Any) -> None:
    connection, store = world
    whole = Time(BEGIN_US - DAY_US, BEGIN_US + DAY_US)
    # Everything of the one goes to a device that has nothing.
    change = await corrected(connection, lambda c: c.swap(TEMPERATURE_A, Series("b", "nothing"), whole), "swap")
    names = "SELECT count(*) FROM {} r JOIN series s USING (series_id) WHERE s.device_id = 'a' AND s.component_type = 'temperature'"
    assert [
        await connection.fetchval(names.format(table))
        for table in ("measurement_1m", "measurement_1h", "measurement_1d")
    ] == [0, 0, 0]
    assert not await connection.fetchval(
        "SELECT count(*) FROM latest_measurements WHERE device_id = 'a' AND component_type = 'temperature'"
    )
    # The sink of a worker that has known the series for long.
    await store.write([line("a", 400, 19.0, 300.0, offset=9_000)], {})
    assert (
        await connection.fetchval(
            "SELECT value FROM latest_measurements WHERE device_id = 'a' AND component_type = 'temperature'"
        )
        == 19.0
    )
    await undone(connection, change)
    assert len(await of(connection, "a", "temperature")) == 121


async def test_a_window_that_the_stage_tells_of_again_is_made_again(world: Any) -> None:
    connection, store = world
    change = await corrected(connection, lambda c: c.void(TEMPERATURE_A, TEN_MINUTES))
    of_window = "SELECT count, revision FROM aggregates WHERE device_id = 'a' AND component_type = 'temperature' AND window_start = $1 AND size_s = 3600"
    begin = changes.instant(BEGIN_US)
    assert tuple(await connection.fetchrow(of_window, begin)) == (50, MADE_REVISION)
    # A late reading: the stage corrects what it knows, which is nothing of the change.
    late = line("a", 5, 99.0, 1.0, offset=7_000, at=BEGIN_US + 5 * MINUTE_US + 1)
    late["readings"] = late["readings"][:1]
    await store.write([late], {})
    row = await connection.fetchrow(
        "SELECT * FROM aggregates WHERE device_id = 'a' AND component_type = 'temperature' AND window_start = $1 AND size_s = 3600",
        begin,
    )
    instants = {"window_start", "window_end", "last_at"}
    told = {
        name: changes.microseconds(value) if name in instants else value
        for name, value in dict(row).items()
        if name != "stored_at"
    }
    await EventStore(AGGREGATES, LiveSettings(load()), sink="test").write(
        [{**told, "revision": 3, "count": 61, "closed_by": "late"}], {}
    )
    assert tuple(await connection.fetchrow(of_window, begin)) == (50, MADE_REVISION), "what it says does not count"
    waiting = "SELECT count(*) FROM change_windows WHERE NOT settled AND due_at > now() AND due_at < now() + INTERVAL '3 minutes' AND window_start = $1"
    assert await connection.fetchval(waiting, begin) == 1
    await connection.execute("UPDATE change_windows SET due_at = now()")
    settings = LiveSettings(load())
    pool = PostgresPool(settings)
    try:
        assert await settle(load(), pool) > 0
        assert await settle(load(), pool) == 0
    finally:
        await pool.close()
    assert tuple(await connection.fetchrow(of_window, begin)) == (51, MADE_REVISION + 1)
    await undone(connection, change)
    assert await connection.fetchval(of_window, begin) == 61, "of what stands, the late one among it"


async def test_only_one_at_a_time(world: Any, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection, _ = world
    monkeypatch.setattr(promoting, "LOCK_S", 0.0)
    correcting = Correcting(load(), connection)
    generation = await correcting.prepare()
    change = await correcting.note(
        "void", {}, await correcting.void(TEMPERATURE_A, TEN_MINUTES), actor="ann", reason="x", generation=generation
    )
    other = await asyncpg.connect(dsn)
    await other.execute("SELECT pg_advisory_lock($1)", changes.LOCK)
    try:
        with pytest.raises(ChangeError, match="another change"):
            await Carrier(load(), connection, None).promote(change.change_id, actor="ann", reason="x")
    finally:
        await other.close()
    await asyncio.sleep(0)
    discarded = await changes.discard(connection, change, actor="ann", reason="never mind", at_us=NOW_US)
    assert discarded.state is State.DISCARDED
    with pytest.raises(ChangeError, match="discarded"):
        await Carrier(load(), connection, None).promote(change.change_id, actor="ann", reason="x")


@pytest.mark.parametrize(
    ("kept", "of", "besides"),
    [
        ("change_window_rows", "aggregates", {"change_id"}),
        ("change_alarm_events", "alarm_events", {"change_id", "op"}),
        ("change_alarms", "alarms", {"change_id"}),
    ],
)
async def test_what_a_change_keeps_has_the_columns_of_what_it_is_of(
    dsn: str, kept: str, of: str, besides: set[str]
) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        columns = [
            dict(
                await connection.fetch(
                    "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = $1::text::regclass"
                    " AND attnum > 0 AND NOT attisdropped",
                    table,
                )
            )
            for table in (kept, of)
        ]
    finally:
        await connection.close()
    assert {name: kind for name, kind in columns[0].items() if name not in besides} == columns[1]
