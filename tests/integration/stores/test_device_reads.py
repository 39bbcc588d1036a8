"""What people read of devices, from a real, migrated PostgreSQL: the list in every order, curves from every level, readings, files."""

import asyncio
import itertools
import math
from datetime import UTC, datetime

import asyncpg
import pytest
from sink_support import migrated_database
from thread_support import in_thread

from preservarium.errors import Retry
from preservarium.settings import load
from preservarium.stores import device_reads
from preservarium.stores.device_reads import DAY_US, SORTS, STATES, US, DeviceReads

pytestmark = pytest.mark.postgres

#: Everything is told from here: whole hours, within what is kept.
NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
NOW_US = int(NOW.timestamp()) * US
MINUTE_US, HOUR_US = 60 * US, 3_600 * US
EUI = "70B3D57ED0AA0001"

REGISTRY = """
INSERT INTO manufacturers VALUES ('m', nextval('registry_rev'), 1, '{}', now(), 'test');
INSERT INTO datatypes VALUES
  ('temperature', 'number', '°C', nextval('registry_rev'), 1, '{"fail_span": {"min": -40, "max": 85}, "suspect_span": {"min": -10, "max": 50}}', now(), 'test'),
  ('wind', 'number', '°', nextval('registry_rev'), 1, '{"circular": 360}', now(), 'test');
INSERT INTO alarm_rules VALUES ('hot', 'temperature', 'major', true, nextval('registry_rev'), 1, '{"kind": "high", "threshold": 30}', now(), 'test');
INSERT INTO parsers VALUES ('p', 3, 'table', 'active', repeat('0', 64), nextval('registry_rev'), 1, '{}', now(), 'test');
INSERT INTO device_types VALUES
  ('box', 'm', 'p', nextval('registry_rev'), 1, '{"description": "a box", "rules": ["hot"], "datatypes": {"temperature": {"fail_span": {"min": 0, "max": 60}}}}', now(), 'test'),
  ('vane', 'm', 'q', nextval('registry_rev'), 1, '{}', now(), 'test');
INSERT INTO devices
  SELECT format('dev-%s', to_char(n, 'FM000')), CASE n % 5 WHEN 0 THEN 'vane' ELSE 'box' END,
         CASE n WHEN 7 THEN '50% of_it\\' WHEN 8 THEN NULL ELSE 'Name ' || n END,
         n <> 3, NULL, nextval('registry_rev'), 1, CASE n WHEN 1 THEN '{"rules": {"hot": {"threshold": 40}}, "meta": {"area": "hall"}}' ELSE '{}' END::json, now(), 'test'
  FROM generate_series(1, 25) AS n;
INSERT INTO devices VALUES ('70B3D57ED0AA0001', 'box', 'Ünder the roof', true, NULL, nextval('registry_rev'), 1, '{}', now(), 'test');
INSERT INTO derivations (parser, config_rev) VALUES ('p@3', 5);
-- Of dev-001 a temperature every minute, a gap of half an hour, and a direction around north; the others have a last value of some age.
INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit, circular)
  VALUES ('dev-001', 'HTTP', 'temperature', '-1', '°C', NULL), ('dev-001', 'HTTP', 'wind', '-1', '°', 360), ('dev-001', 'HTTP', 'zone', '-1', '', NULL),
         ('dev-001', 'HTTP', 'fast', '-1', 'g', NULL);
INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit)
  SELECT format('dev-%s', to_char(n, 'FM000')), 'MQTT', 'temperature', '-1', '°C' FROM generate_series(2, 20) AS n;
INSERT INTO latest SELECT series_id, now(), series_id, NULL,
    CASE device_id WHEN 'dev-002' THEN 4 WHEN 'dev-004' THEN 3 WHEN 'dev-005' THEN 4 ELSE 1 END,
    now() - CASE WHEN device_id IN ('dev-005', 'dev-006') THEN interval '2 hours' ELSE make_interval(secs => series_id) END
  FROM series;
"""
READINGS = """
INSERT INTO measurements (timestamp, received_at, raw_offset, value, series_id, derivation_id, raw_index, raw_partition, quality, flags)
SELECT $1::timestamptz - make_interval(mins => n), $1::timestamptz, n,
       CASE s.component_type WHEN 'wind' THEN CASE n % 2 WHEN 0 THEN 350 ELSE 20 END ELSE 20 + n % 10 END,
       s.series_id, 1, 0, 3, CASE WHEN n % 60 = 30 THEN 3 ELSE 1 END, CASE WHEN n % 60 = 30 THEN ARRAY['spike'] END
FROM generate_series(1, 2880) AS n, series s WHERE s.device_id = 'dev-001' AND s.component_type IN ('temperature', 'wind') AND NOT n BETWEEN 100 AND 129
"""
#: Once a second for ten minutes; every hundredth is suspect, one failed.
FAST = """
INSERT INTO measurements (timestamp, received_at, raw_offset, value, series_id, derivation_id, raw_index, raw_partition, quality)
SELECT $1::timestamptz - make_interval(secs => n), $1::timestamptz, 10000 + n, n, s.series_id, 1, 0, 3, CASE WHEN n = 250 THEN 4 WHEN n % 100 = 50 THEN 3 ELSE 1 END
FROM generate_series(1, 600) AS n, series s WHERE s.component_type = 'fast'
"""
ROLLED = """
INSERT INTO rollup_dirty SELECT $1::timestamptz - interval '50 hours', $1::timestamptz;
"""
OLD = """
INSERT INTO rollup_1d (series_id, bucket, records, n, sum, min, max, last)
SELECT s.series_id, date_bin('1 day', $1::timestamptz, '2000-01-01 00:00+00') - make_interval(days => n), 10, 10, 10 * n, n - 5, n + 5, n
FROM generate_series(10, 1500) AS n, series s WHERE s.device_id = 'dev-001' AND s.component_type = 'temperature'
"""
ALARMS = """
INSERT INTO alarms (alarm_id, device_id, rule, component_type, pin_position, severity, state, transition, occurred_at, detected_at, cleared_at, updated_at)
SELECT 'a' || n, 'dev-001', 'hot', 'temperature', '-1', 'major', 's', 'raised', $1::timestamptz - make_interval(hours => n), $1::timestamptz,
       CASE WHEN n > 1 THEN $1::timestamptz - make_interval(hours => n) + interval '10 minutes' END, $1::timestamptz FROM generate_series(1, 4) AS n
"""


@pytest.fixture(scope="module")
def filled(postgres):
    with migrated_database(postgres) as dsn:
        in_thread(_fill(dsn))
        yield dsn


async def _fill(dsn):
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(REGISTRY)
        for statement in (READINGS, FAST, ALARMS):
            await connection.execute(statement, NOW)
        await connection.execute(ROLLED, NOW)
        while await connection.fetchval("SELECT refresh_rollups(5000, INTERVAL '1 hour')"):
            pass
        await connection.execute(OLD, NOW)
    finally:
        await connection.close()


@pytest.fixture
async def reads(filled):
    settings = load(postgres={"url": filled}, kafka={"bootstrap_servers": "127.0.0.1:1"}, clickhouse={"enabled": False})
    reads = DeviceReads(lambda: settings)
    yield reads
    await reads.close()


@pytest.fixture
async def connection(filled):
    connection = await asyncpg.connect(filled)
    yield connection
    await connection.close()


async def everything(reads, **wanted):
    found, after = [], None
    while True:
        page = await reads.devices(after=after, limit=7, **wanted)
        assert page["total"] == (await reads.devices(limit=1, **wanted))["total"]
        found += page["devices"]
        if (after := page["next"]) is None:
            assert len(found) == page["total"]
            return found


@pytest.mark.parametrize(("sort", "descending"), [*itertools.product(SORTS, (False, True))])
async def test_every_order_is_paged_without_gap_or_repeat(reads, sort, descending):
    found = await everything(reads, sort=sort, descending=descending)
    assert sorted(d["device_id"] for d in found) == sorted([EUI, *(f"dev-{n:03}" for n in range(1, 26))])
    rank = {4: 4, 3: 3, 9: 2, 2: 1, 1: 0, None: -1}
    value = {
        "device": lambda d: d["device_id"], "name": lambda d: d["name"] or d["device_id"], "type": lambda d: d["type"],
        "seen": lambda d: d["last_seen"] or 0, "quality": lambda d: rank[d["quality"]],
    }[sort]  # fmt: skip
    order = [value(d) for d in found]
    if sort != "name":  # the database's own collation
        assert order == sorted(order, reverse=descending)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({"q": "dev-01"}, 10), ({"q": "DEV-025"}, 1), ({"q": "name 2"}, 7), ({"q": "%"}, 1), ({"q": "_"}, 1), ({"q": "50% OF_it\\"}, 1), ({"q": "\\"}, 1),
        ({"q": "'; --"}, 0), ({"q": "VANE"}, 5), ({"q": "the ROOF"}, 1), ({"q": "70:b3:d5:7e:d0:aa:00:01"}, 1), ({"type_name": "vane"}, 5), ({"type_name": "none"}, 0),
        ({"type_name": "vane", "q": "dev-02"}, 2), ({"state": "off"}, 1), ({"state": "failing"}, 1), ({"state": "silent"}, 2), ({"state": "never"}, 6),
        ({"state": "sending"}, 16), ({"state": "sending", "q": "dev-004"}, 1),
    ],
)  # fmt: skip
async def test_devices_are_found_by_address_name_and_type_and_filtered_by_state(reads, wanted, found):
    page = await reads.devices(limit=100, **wanted)
    assert (len(page["devices"]), page["total"]) == (found, found)


async def test_values_are_of_now_and_the_fleet_adds_up(reads):
    one = (await reads.devices(q="dev-001", limit=5))["devices"][0]
    assert [v["component_type"] for v in one["values"]] == ["fast", "temperature", "wind", "zone"]
    assert one["values"][0].keys() >= {"value", "value_text", "unit", "timestamp", "quality", "series_id"}
    fleet = await reads.fleet()
    assert fleet["devices"] == sum(fleet["states"].values()) == 26
    assert fleet["states"] == {"sending": 16, "failing": 1, "silent": 2, "never": 6, "off": 1}
    assert set(fleet["states"]) == set(STATES)
    assert fleet["types"] == [{"type": "box", "devices": 21}, {"type": "vane", "devices": 5}]


async def test_what_the_registry_changes_is_found_at_once_and_what_it_removes_soon(reads, connection, monkeypatch):
    await reads.fleet()
    await connection.execute("INSERT INTO devices VALUES ('new-1', 'box', 'Just now', true, NULL, nextval('registry_rev'), 1, '{}', now(), 'test')")  # fmt: skip
    assert (await reads.devices(q="just NOW", limit=5))["total"] == 1
    await connection.execute(
        "UPDATE devices SET name = 'Other', rev = nextval('registry_rev') WHERE device_id = 'new-1'"
    )
    assert [d["name"] for d in (await reads.devices(q="new-1", limit=5))["devices"]] == ["Other"]
    await connection.execute("DELETE FROM devices WHERE device_id = 'new-1'")
    before = (await reads.fleet())["refreshed_at"]
    monkeypatch.setattr(device_reads, "OVERVIEW_AGE_S", 0.0)
    monkeypatch.setattr(device_reads, "OVERVIEW_REST", 0.0)
    async with asyncio.timeout(30):
        while (await reads.devices(q="new-1", limit=5))["total"]:
            await asyncio.sleep(0.05)
    assert (await reads.fleet())["refreshed_at"] > before
    # A crash of the server empties what is not logged.
    await connection.execute("TRUNCATE device_overview, device_overview_state")
    assert (await reads.devices(q="dev-0", limit=5))["total"] == 25


async def test_many_who_look_at_once_make_it_once(reads, connection):
    await connection.execute("TRUNCATE device_overview, device_overview_state")
    pages = await asyncio.gather(*[reads.devices(limit=50) for _ in range(8)])
    assert {page["total"] for page in pages} == {26}


async def test_a_device_has_what_its_registry_says_under_overrides(reads):
    found = await reads.device("dev-001")
    assert {name: found[name] for name in ("registered", "name", "type", "manufacturer", "parser", "parser_kind", "description", "meta")} == {
        "registered": True, "name": "Name 1", "type": "box", "manufacturer": "m", "parser": "p@3", "parser_kind": "table", "description": "a box", "meta": {"area": "hall"},
    }  # fmt: skip
    _, temperature, wind, zone = found["series"]
    assert temperature["datatype"]["fail_span"] == {"min": 0, "max": 60}
    assert temperature["datatype"]["suspect_span"] == {"min": -10, "max": 50}
    assert (wind["circular"], wind["datatype"]["circular"], zone["datatype"]) == (360, 360, None)
    assert [(rule["name"], rule["threshold"], rule["severity"], rule["enabled"]) for rule in found["rules"]] == [("hot", 40, "major", True)]  # fmt: skip
    assert (await reads.device("70-b3-d5-7e-d0-aa-00-01"))["device_id"] == EUI
    assert (await reads.device("dev-021"))["series"] == []
    assert await reads.device("nobody") is None


async def curve(reads, name, from_us, to_us, points=1_000):
    series = {s["component_type"]: s["series_id"] for s in (await reads.device("dev-001"))["series"]}
    found = await reads.curves(
        "dev-001", series=[series[name]], from_us=from_us, to_us=to_us, points=points, now_us=NOW_US
    )
    (one,) = found["series"]
    assert len(one["at"]) <= points + 1  # a bin may begin before the span
    assert one["at"] == sorted(set(one["at"]))
    assert {len(one[k]) for k in ("at", "mean", "min", "max", "n", "quality") if one[k] is not None} == {len(one["at"])}
    return one, found["alarms"]


async def test_few_readings_are_drawn_as_they_are_with_their_quality_and_gaps(reads):
    found, alarms = await curve(reads, "temperature", NOW_US - 3 * HOUR_US, NOW_US)
    assert (found["level"], found["width_us"], found["min"], len(found["at"])) == ("raw", 0, None, 150)
    assert found["quality"].count(3) == 3
    assert found["gap_us"] == 4 * MINUTE_US
    assert [
        later - earlier for earlier, later in itertools.pairwise(found["at"]) if later - earlier > found["gap_us"]
    ] == [31 * MINUTE_US]
    # One stands, two were raised within; the one of four hours ago had cleared before.
    assert [alarm["alarm_id"] for alarm in alarms] == ["a1", "a2", "a3"]
    assert alarms[0]["cleared_at"] is None


async def test_many_readings_are_put_into_bins_with_the_worst_quality_of_each(reads):
    found, _ = await curve(reads, "fast", NOW_US - 10 * MINUTE_US, NOW_US, points=100)
    assert (found["level"], found["width_us"], len(found["at"])) == ("raw", 6 * US, 100)
    assert set(found["n"]) == {6}
    assert sum(found["mean"]) / 100 == pytest.approx(300.5)
    assert (min(found["min"]), max(found["max"])) == (1, 600)
    assert sorted(found["quality"])[-7:] == [1, 3, 3, 3, 3, 3, 4]
    minutes, _ = await curve(reads, "temperature", NOW_US - 2 * HOUR_US, NOW_US, points=30)
    assert (minutes["level"], minutes["width_us"], minutes["quality"]) == ("1m", 4 * MINUTE_US, None)


async def test_roll_ups_have_mean_least_and_greatest_at_every_level(reads, connection):
    hours, _ = await curve(reads, "temperature", NOW_US - 2 * DAY_US, NOW_US, points=48)
    assert (hours["level"], hours["width_us"], hours["quality"]) == ("1h", HOUR_US, None)
    assert sum(hours["n"]) == 2850
    assert (min(hours["min"]), max(hours["max"])) == (20, 29)
    assert all(low <= mean <= high for low, mean, high in zip(hours["min"], hours["mean"], hours["max"], strict=True))
    exact = await connection.fetchval(
        "SELECT avg(value) FROM measurements JOIN series USING (series_id) WHERE component_type = 'temperature'"
    )
    assert sum(n * mean for n, mean in zip(hours["n"], hours["mean"], strict=True)) / sum(hours["n"]) == pytest.approx(
        exact
    )
    if await connection.fetchval("SELECT storage_engine()") != "plain":
        return  # years of readings are put into the roll-ups by hand, which a continuous aggregate does not take
    years, _ = await curve(reads, "temperature", NOW_US - 5 * 365 * DAY_US, NOW_US)
    assert (years["level"], years["width_us"]) == ("1d", 2 * DAY_US)
    assert 740 < len(years["at"]) < 760
    assert max(years["max"]) == 1505


@pytest.mark.parametrize(
    "span_us", [HOUR_US, 6 * HOUR_US, DAY_US, 7 * DAY_US, 30 * DAY_US, 365 * DAY_US, 5 * 365 * DAY_US]
)
async def test_every_span_can_be_drawn_of_every_series(reads, span_us):
    for name in ("fast", "temperature", "wind", "zone"):
        for points in (10, 300):
            await curve(reads, name, NOW_US - span_us, NOW_US, points=points)


async def test_a_direction_has_the_mean_of_its_directions_and_no_extremes(reads):
    for span_us, points, level in ((2 * HOUR_US, 30, "raw"), (2 * DAY_US, 48, "1h"), (2 * DAY_US, 10, "1h")):
        found, _ = await curve(reads, "wind", NOW_US - span_us, NOW_US, points=points)
        assert (found["level"], found["min"], found["max"]) == (level, None, None)
        # 350° and 20° are 5° on average, and not 185°; a bin at an edge may have one more of either.
        assert all(mean < 20.1 or mean > 349.9 for mean in found["mean"])
        assert any(math.isclose(mean, 5, abs_tol=0.01) for mean in found["mean"])


async def test_readings_come_newest_first_of_all_series_in_pages_without_gap(reads):
    found, before = [], None
    while len(found) < 900:
        page = await reads.readings("dev-001", series=[], from_us=0, before=before, limit=90)
        found += page["readings"]
        before = page["next"]
    keys = [(r["timestamp"], r["series_id"]) for r in found]
    assert keys == sorted(set(keys), reverse=True)
    assert found[0].keys() >= {
        "component_type",
        "unit",
        "flags",
        "parser",
        "raw_partition",
        "raw_offset",
        "raw_index",
        "received_at",
        "revised",
    }
    assert (found[0]["parser"], found[0]["raw_partition"], found[0]["raw_offset"]) == ("p@3", 3, 10_001)
    assert {tuple(r["flags"]) for r in found if r["flags"]} == {("spike",)}
    minutely = next(r["series_id"] for r in found if r["component_type"] == "wind")
    late = await reads.readings("dev-001", series=[minutely], from_us=NOW_US - 5 * MINUTE_US, before=None, limit=90)
    assert (len(late["readings"]), late["next"]) == (5, None)
    # An id of another device is none of this one's.
    assert await reads.readings("dev-002", series=[found[0]["series_id"]], from_us=0, before=None, limit=9) is None
    assert (
        await reads.curves("dev-002", series=[found[0]["series_id"]], from_us=0, to_us=NOW_US, points=10, now_us=NOW_US)
        is None
    )


async def test_a_file_has_every_reading_of_the_span_and_says_where_it_is_cut(reads, monkeypatch):
    monkeypatch.setattr(device_reads, "EXPORT_PAGE", 700)

    async def exported(from_us):
        return [row async for page in reads.export("dev-001", series=[], from_us=from_us, to_us=NOW_US) for row in page]

    rows = await exported(0)
    assert len(rows) == 2 * 2850 + 600
    keys = [(row["component_type"], row["timestamp"]) for row in rows]
    assert keys == sorted(set(keys))
    assert len(await exported(NOW_US - 10 * MINUTE_US)) == 20 + 600
    monkeypatch.setattr(device_reads, "EXPORT_ROWS_MAX", 1_500)
    rows = await exported(0)
    assert (len(rows), rows[-1]) == (1_501, {"cut": True})


async def test_it_reads_only_but_for_its_own_table_and_a_database_that_is_away_is_a_retry(reads):
    with pytest.raises(Retry, match="read-only"):
        await reads._fetch("DELETE FROM alarms")
    away = DeviceReads(lambda: load(postgres={"host": "127.0.0.1", "port": 1}))
    for asked in (
        away.fleet(),
        away.devices(limit=1),
        away.device("d"),
        away.readings("d", series=[], from_us=0, before=None, limit=1),
    ):
        with pytest.raises(Retry, match="PostgreSQL"):
            await asked
    await away.close()


async def test_a_cursor_of_another_order_is_refused(reads):
    for sort, after in (("device", (5, "d")), ("seen", ("d", "d"))):
        with pytest.raises(ValueError, match="another order"):
            await reads.devices(sort=sort, after=after, limit=1)
