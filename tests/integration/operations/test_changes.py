"""Shadow replay, promotion, rollback and corrections on real servers: beside a world that was right from the beginning, and killed at every step."""

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import orjson
import pytest
from lineage_support import Pipeline, command, environment
from sink_support import FakeRecord, fetch, migrated_database
from thread_support import in_thread

from preservarium import topics
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.quality.checks import CheckCompiler
from preservarium.domain.windows import Nature, new_state, observe, silence
from preservarium.settings import LiveSettings, load
from preservarium.stages.aggregate import plan_of
from preservarium.stages.sync import AGGREGATES as CH_AGGREGATES
from preservarium.stages.sync import ALARM_EVENTS as CH_ALARMS
from preservarium.stages.sync import EventSync
from preservarium.stores import changes, registry
from preservarium.stores import events as event_store
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.event_tables import EventStore
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.stores.tables import AGGREGATES, ALARM_EVENTS
from preservarium.streaming.records import raw_line
from preservarium.streaming.stage import Batch, Send

pytestmark = pytest.mark.kafka

MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
#: Whole hours, and long enough ago that their windows are closed.
BEGIN_US = time.time_ns() // 1_000 // HOUR_US * HOUR_US - 4 * HOUR_US
MESSAGES = 120
DEVICES = [f"d{n}" for n in range(6)]  # the last one has another parser, which is right

REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes:
  - {name: temperature, kind: number, unit: degC, fail_span: {min: -60, max: 90}, suspect_span: {min: -50, max: 60}}
  - {name: humidity, kind: number, unit: "%", fail_span: {min: 0, max: 100}}
  - {name: energy, kind: number, unit: kWh, counter: {}, fail_span: {min: 0, max: 10000000}}
parsers:
  - {name: acme, version: 1, kind: table, STATUS1, source: {fields: [
      {name: s, type: u8, emit: false}, {name: temperature, type: u16, div: 10, unit: degC}, {name: humidity, type: u8, unit: "%"},
      {name: energy, type: u32, expr: "x / (100 - 90 * bit(s, 1))", unit: kWh}]}}
  - {name: acme, version: 2, kind: table, STATUS2, source: {fields: [
      {name: s, type: u8, emit: false}, {name: temperature, type: i16, div: 10, unit: degC},
      {when: "bit(s, 0)", fields: [{name: unused, type: u8, emit: false}], else: [{name: humidity, type: u8, unit: "%"}]},
      {name: energy, type: u32, div: 100, unit: kWh}]}}
  - {name: right, version: 1, kind: table, source: {fields: [
      {name: s, type: u8, emit: false}, {name: temperature, type: i16, div: 10, unit: degC}, {name: humidity, type: u8, unit: "%"},
      {name: energy, type: u32, div: 100, unit: kWh}]}}
rules:
  - {name: wet, component_type: humidity, kind: high, severity: major, threshold: 95, deadband: 2}
  - {name: frost, component_type: temperature, kind: low, severity: minor, threshold: -5, deadband: 1}
device_types:
  - {name: T1, manufacturer: Acme, parser: acme, rules: [wet, frost]}
  - {name: T2, manufacturer: Acme, parser: right, rules: [wet, frost]}
devices:
""" + "".join(f"  - {{device_id: {d}, type: {'T2' if d == DEVICES[-1] else 'T1'}}}\n" for d in DEVICES)


def registry_text(active: int) -> str:
    """The registry with one version of the parser active, and the other a draft or gone."""
    one = "status: active" if active == 1 else "status: retired"
    two = "status: active" if active == 2 else "status: draft"
    return REGISTRY.replace("STATUS1", one).replace("STATUS2", two)


def payload(n: int, message: int) -> bytes:
    """Below zero for a part of each hour; humidity that says nothing, and energy in tenths, now and then."""
    freezes = message % 60 in range(20, 35)
    no_humidity = message % 40 == 7
    tenths = message % 50 == 13
    status = (1 if no_humidity else 0) | (2 if tenths else 0)
    temperature = -80 - n if freezes else 150 + message % 7
    humidity = 100 if no_humidity else 40 + message % 10
    return (
        bytes([status])
        + temperature.to_bytes(2, "big", signed=True)
        + bytes([humidity])
        + (100_000 + 25 * message + n).to_bytes(4, "big")
    )


class World:
    """Both stores, and the topics of one run."""

    def __init__(self, variables: Mapping[str, str], directory: Path, dsn: str) -> None:
        self.variables, self.dsn = dict(variables), dsn
        self.directory = directory
        self.pipeline: Pipeline = self._in(lambda: Pipeline(load(), directory))

    def _in(self, make: Any) -> Any:
        before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)
        try:
            return make()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    @property
    def settings(self) -> Any:
        return self.pipeline.settings

    async def fill(self, active: int) -> None:
        await migrate_clickhouse(self.settings)
        await self.pipeline.create()
        await self.pipeline.register(registry_text(active))
        sends = []
        for message in range(MESSAGES):
            for n, device in enumerate(DEVICES):
                at = BEGIN_US + message * MINUTE_US + n
                line = raw_line(device, payload(n, message), received_at=at, connector="test", mode="LAN", topic="t")
                sends.append(Send(topics.RAW, device.encode(), line))
        await self.pipeline.send(sends)
        await self.pipeline.run(store=False)
        found = await self.pipeline.fresh(topics.VALIDATED)
        await self.pipeline.store(found)
        await self.derive(found)
        await self.rollups()

    async def derive(self, found: Mapping[int, Sequence[Any]]) -> None:
        """Windows and alarms of validated messages, as their stages make them, into both stores."""
        connection = await asyncpg.connect(self.dsn)
        live = LiveSettings(self.settings)
        plan = plan_of(live)
        documents = {
            kind: {str(o.document["name"]): {**o.document, "rev": o.rev} for o in stored.values()}
            for kind, stored in (await registry.load(connection, ("datatype", "rule", "type"))).items()
        }
        known = await registry.composite(connection, DEVICES)
        await connection.close()
        compiler = CheckCompiler(documents["datatype"].get)  # type: ignore[arg-type]
        windows: list[dict[str, Any]] = []
        transitions: list[dict[str, Any]] = []
        states: dict[str, Any] = {}
        alarms: dict[str, DeviceAlarms] = {}
        natures: dict[str, Any] = {}
        for records in found.values():
            for message in (orjson.loads(line) for record in records for line in record.value.split(b"\n")):
                device: Any = message["device_id"]
                one: Any = known[device]
                checks = compiler.device(one.device, one.type)

                def nature(name: str, checks: Any = checks) -> Nature:
                    check = checks.series(name)
                    return Nature(check.counter is not None, check.circular)

                windows += observe(message, states.setdefault(device, new_state()), plan, nature).windows
                rules = self._rules.setdefault(
                    device, compile_rules(one.device, one.type, documents["rule"].get, documents["datatype"].get)  # type: ignore[arg-type]
                )  # fmt: skip
                natures[device] = nature
                transitions += alarms.setdefault(device, DeviceAlarms(device)).observe(message, rules).transitions  # type: ignore[arg-type]
        for device, state in states.items():
            windows += silence(device, state, time.time_ns() // 1_000, plan, natures[device])
        clickhouse = ClickHouseStore(live)
        try:
            for table, of_clickhouse, lines in (
                (AGGREGATES, CH_AGGREGATES, windows),
                (ALARM_EVENTS, CH_ALARMS, transitions),
            ):
                await EventStore(table, live, sink="test").write(lines, {})
                sync = EventSync(of_clickhouse, clickhouse, live)
                await sync(
                    [Batch(table.topic.name, 0, [FakeRecord(n, orjson.dumps(line)) for n, line in enumerate(lines)])]
                )
        finally:
            await clickhouse.close()

    _rules: dict[str, Any] = {}  # noqa: RUF012

    async def rollups(self) -> None:
        while await fetch_one(self.dsn, "SELECT refresh_rollups(5000, make_interval(mins => 60))"):
            pass

    async def clickhouse(self, query: str) -> list[Any]:
        store = ClickHouseStore(LiveSettings(self.settings))
        try:
            return sorted(map(repr, await store.query(query)))
        finally:
            await store.close()

    async def everything(self) -> dict[str, list[str]]:
        """All that a change may touch, byte by byte."""
        found: dict[str, list[str]] = {}
        for table in (
            "measurements",
            "latest",
            "rollup_1m",
            "rollup_1h",
            "rollup_1d",
            "aggregates",
            "alarm_events",
            "alarms",
        ):
            found[table] = sorted(r[0] for r in await fetch(self.dsn, f"SELECT t::text FROM {table} t"))
        for view in ("measurement_1m", "measurement_1h", "measurement_1d", "latest_measurements"):
            found[view] = sorted(r[0] for r in await fetch(self.dsn, f"SELECT t::text FROM {view} t"))
        found["ch measurements"] = await self.clickhouse("SELECT *, version FROM measurements FINAL")
        found["ch latest_values"] = await self.clickhouse("SELECT * FROM latest_values FINAL")
        found["ch measurement_days"] = await self.clickhouse(
            "SELECT day, device_id, quality, generation, sum(rows) AS n FROM measurement_days GROUP BY ALL HAVING n != 0"
        )
        found["ch aggregates"] = await self.clickhouse("SELECT *, version FROM aggregates FINAL")
        found["ch alarm_events"] = await self.clickhouse("SELECT * FROM alarm_events FINAL")
        return found

    async def meaning(self) -> dict[str, list[str]]:
        """What both stores say, without what tells how it came about: generation, parser, revisions and when it was stored."""
        found: dict[str, list[str]] = {}

        async def put(name: str, query: str) -> None:
            found[name] = sorted(r[0] for r in await fetch(self.dsn, f"SELECT t::text FROM ({query}) t"))

        series = "s.device_id, s.connector_mode, s.component_type, s.pin_position"
        await put(
            "measurements",
            f"SELECT {series}, timestamp, m.value, m.value_text, coalesce(m.unit, s.unit) AS unit, coalesce(m.topic, s.topic) AS topic, m.quality, m.flags,"
            " m.received_at, m.raw_partition, m.raw_offset, m.raw_index, m.revised FROM measurements m JOIN series s USING (series_id)",
        )
        await put(
            "latest",
            "SELECT device_id, connector_mode, component_type, pin_position, timestamp, value, value_text, quality, received_at FROM latest_measurements",
        )
        for view in ("measurement_1m", "measurement_1h", "measurement_1d"):
            await put(
                view,
                f"SELECT {series}, bucket, records, n, sum, min, max, last FROM {view} JOIN series s USING (series_id)",
            )
        says = "device_id, connector_mode, component_type, pin_position, unit, window_start, window_end, size_s, hop_s, count, min, max, mean, sum, last, last_at, consumption"
        await put("aggregates", f"SELECT window_id, {says} FROM aggregates")
        events = "transition_id, alarm_id, device_id, rule, transition, state, severity, occurred_at, detected_at, value, raw_partition, raw_offset, raw_index"
        await put("alarm_events", f"SELECT {events}, detail ->> 'message' FROM alarm_events")
        await put(
            "alarms",
            "SELECT a.*, NULL AS rule_rev FROM (SELECT alarm_id, device_id, rule, state, severity, occurred_at, cleared_at, value, transitions FROM alarms) a",
        )
        found["ch measurements"] = await self.clickhouse(
            "SELECT device_id, connector_mode, component_type, pin_position, timestamp, value, value_text, unit, topic, quality, flags, revised,"
            " received_at, raw_partition, raw_offset, raw_index, circular FROM measurements FINAL"
        )
        found["ch latest_values"] = await self.clickhouse(
            "SELECT device_id, component_type, pin_position, connector_mode, timestamp, value, value_text, unit, quality, received_at FROM latest_values FINAL"
        )
        found["ch fleet"] = await self.clickhouse(
            "SELECT day, device_id, quality, sum(rows) AS n FROM measurement_days WHERE generation = 0 OR generation IN"
            " (SELECT generation FROM promoted_generations FINAL WHERE counts = 1) GROUP BY ALL HAVING n != 0"
        )
        found["ch aggregates"] = await self.clickhouse(f"SELECT window_id, {says} FROM aggregates FINAL")
        found["ch alarm_events"] = await self.clickhouse(f"SELECT {events}, message FROM alarm_events FINAL")
        return found


async def fetch_one(dsn: str, query: str) -> Any:
    return (await fetch(dsn, query))[0][0]


@pytest.fixture(scope="module")
def worlds(kafka: str, postgres: str, clickhouse: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One world with the seeded bug, and one that was right from the beginning, of the same raw records."""
    with migrated_database(postgres) as buggy_dsn, migrated_database(postgres) as right_dsn:
        made = []
        for dsn in (buggy_dsn, right_dsn):
            variables = environment(
                kafka, f"t{uuid.uuid4().hex[:10]}.", dsn, clickhouse, f"test_{uuid.uuid4().hex[:12]}"
            )
            # All of them are over, whenever this runs.
            variables["PRESERVARIUM_AGGREGATE__WINDOWS"] = "10m,1h,1h/20m"
            made.append(World(variables, tmp_path_factory.mktemp("world"), dsn))
        buggy, right = made
        before = {name: os.environ.get(name) for name in buggy.variables}
        os.environ.update(buggy.variables)
        try:
            in_thread(right.fill(2))
            in_thread(buggy.fill(1))
            yield SimpleNamespace(buggy=buggy, right=right)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def differing(a: Mapping[str, list[str]], b: Mapping[str, list[str]]) -> dict[str, Any]:
    """Where two dumps differ, with the first rows of either."""
    return {
        name: (
            sorted(set(a[name]) - set(b[name]))[:3],
            sorted(set(b[name]) - set(a[name]))[:3],
            len(a[name]),
            len(b[name]),
        )
        for name in a
        if a[name] != b[name]
    }


def iso(us: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(us // 1_000_000))


def killed(change_id: int, what: str, *steps: str) -> list[int]:
    """Exit codes of processes that end after these steps, and of the one that finishes."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "adversity" / "change_kill_app.py"), str(change_id), what, ",".join(steps)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    codes: list[int] = json.loads(done.stdout)
    assert codes[-1] == 0, (codes, done.stderr[-3000:])
    return codes


async def test_a_seeded_bug_is_found_mended_and_put_back(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    buggy, right = worlds.buggy, worlds.right
    before = await buggy.everything()
    assert differing(await buggy.meaning(), await right.meaning()), "the bug shows"
    monkeypatch.setattr(changes, "SLOT_ROWS", 60)

    made = await command(
        "replay", "shadow", "--parser", "acme@2", "--from", iso(BEGIN_US - HOUR_US), "--warm-up", "1h", "--processes", "2", "--json"
    )  # fmt: skip
    assert await buggy.everything() == before, "a shadow touches nothing"
    change_id = made["change_id"]
    assert made["summary"]["unexplained"] == 0
    found = await command("replay", "diff", str(change_id), "--limit", "100000", "--json")

    # Exactly what differs between both worlds.
    keys = "device_id, component_type, pin_position, connector_mode, (extract(epoch FROM timestamp) * 1000000)::bigint, value, quality, flags"
    query = f"SELECT {keys} FROM measurements m JOIN series s USING (series_id)"
    wrong = {tuple(r[:5]): (r[5], r[6], tuple(r[7] or ())) for r in await fetch(buggy.dsn, query)}
    true = {tuple(r[:5]): (r[5], r[6], tuple(r[7] or ())) for r in await fetch(right.dsn, query)}
    expected = {
        key: (wrong.get(key), true.get(key)) for key in wrong.keys() | true.keys() if wrong.get(key) != true.get(key)
    }

    def of(side: Any) -> Any:
        return None if side is None else (side["value"], side["quality"], tuple(side["flags"]))

    shown = {
        (r["device_id"], r["component_type"], r["pin_position"], r["connector_mode"], r["timestamp"]): (
            of(r["before"]),
            of(r["after"]),
        )
        for r in found["rows"]
    }
    assert shown == expected
    assert {row["op"] for row in found["rows"]} == {"added", "removed", "changed"}
    assert {key[0] for key in shown} == set(DEVICES[:-1])
    assert {event["op"] for event in found["alarms"]} == {"added", "removed"}

    # Carried out, by processes that end after one step after the other.
    codes = await asyncio.to_thread(
        killed, change_id, "promote", "read", "swapped", "brought", "windows", "alarms", "last_values"
    )
    assert codes == [99] * 6 + [0]
    await buggy.rollups()
    assert differing(await buggy.meaning(), await right.meaning()) == {}
    rows = await fetch(
        buggy.dsn,
        "SELECT DISTINCT d.parser, m.generation FROM measurements m JOIN derivations d USING (derivation_id) WHERE m.generation > 0",
    )
    assert [tuple(row) for row in rows] == [("acme@2", made["generation"])]

    # And put back, likewise.
    codes = await asyncio.to_thread(
        killed, change_id, "rollback", "swapped_back", "brought_back", "windows_back", "alarms_back"
    )
    assert codes == [99] * 4 + [0]
    await buggy.rollups()
    assert differing(await buggy.everything(), before) == {}

    events = (await command("replay", "diff", str(change_id), "--json"))["history"]
    assert [event["event"] for event in events] == [
        "asked",
        "derived",
        "approved",
        "promoted",
        "rollback_approved",
        "rolled_back",
    ]
    assert [event["reason"] for event in events if event["event"] == "approved"] == ["killed"]
    connection = await asyncpg.connect(buggy.dsn)
    verified = await event_store.verify(connection, prefix=f"change/{change_id}")
    await connection.close()
    assert (verified.streams, verified.events, verified.faults) == (1, len(events), [])
