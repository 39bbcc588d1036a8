"""The back-test over a real PostgreSQL: the same as `DeviceAlarms` says, however it is cut into pieces and processes."""

import asyncio
import random

import asyncpg
import orjson
import pytest
from click.testing import CliRunner
from sink_support import NOW_US, live, message, migrated_database
from thread_support import in_thread

from preservarium.__main__ import cli
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rules import compile_rules
from preservarium.operations import backtest
from preservarium.operations.suggesting import suggest
from preservarium.settings import load
from preservarium.stores import history
from preservarium.stores.timescale import TimescaleStore

S = 1_000_000
T = NOW_US // (60 * S) * 60 * S - 86_400 * S
STEPS = 240
DEVICES = [f"dev-{n}" for n in range(7)]
RULE = {
    "name": "hot",
    "component_type": "temperature",
    "kind": "high",
    "severity": "major",
    "threshold": 25.0,
    "recipients": ["ops"],
}
DATATYPE = {"name": "temperature", "kind": "number", "unit": "°C"}
#: Live, in a group in which a tested rule may be.
MASTER = {**RULE, "name": "cold", "kind": "low", "threshold": 24.0, "group": "pump", "group_master": True}
NEW = {**RULE, "rev": 0, "deadband": 1.0, "on_delay_s": 120.0}


def fleet() -> list[dict]:
    """Messages in the order of their arrival: late ones, readings that failed, texts, several pins."""
    rng = random.Random(7)
    found = []
    for d, device in enumerate(DEVICES):
        values = [24.0, 25.0]
        for step in range(STEPS):
            values = [v + rng.uniform(-1, 1) + (25 - v) * 0.05 for v in values]
            readings = [{"value": v} for v in values]
            if step % 17 == 0:
                readings[0]["quality"] = 4
            if step % 23 == 0:
                readings[1] = {"value": None, "value_text": "error"}
            late = 3 * 60 * S if step % 11 == 0 else 0
            at = T + step * 60 * S + d
            found.append(message(device, *readings, at=at, offset=len(found) + 1, received_at=at + S + late))
    return sorted(found, key=lambda m: m["received_at"])


@pytest.fixture(scope="module")
def stored(postgres):
    """DSN of a database with the fleet's readings and a registry of all devices but the last."""

    async def fill(dsn):
        settings = live(postgres={"url": dsn})
        store = TimescaleStore(settings)
        result = await store.write(fleet(), {})
        assert not result.rejected
        await store.close()
        connection = await asyncpg.connect(dsn)
        insert = "nextval('registry_rev'), 1, $1, now(), 'test')"
        await connection.execute(
            "INSERT INTO manufacturers VALUES ('m', nextval('registry_rev'), 1, '{}', now(), 'test')"
        )
        await connection.execute(
            f"INSERT INTO datatypes VALUES ('temperature', 'number', '°C', {insert}", text(DATATYPE)
        )
        await connection.execute(
            f"INSERT INTO alarm_rules VALUES ('hot', 'temperature', 'major', true, {insert}", text(RULE)
        )
        await connection.execute(
            f"INSERT INTO alarm_rules VALUES ('cold', 'temperature', 'major', true, {insert}", text(MASTER)
        )
        await connection.execute(
            f"INSERT INTO device_types VALUES ('t', 'm', 'p', {insert}", text({"name": "t", "rules": ["hot", "cold"]})
        )
        ops = text({"name": "ops", "channel": "mail", "address": "ops@example.com"})
        await connection.execute(f"INSERT INTO recipients VALUES ('ops', 'mail', 'ops@example.com', {insert}", ops)
        for device in DEVICES[:-1]:
            doc = {"device_id": device, "type": "t", "enabled": True}
            if device == DEVICES[1]:
                doc["rules"] = {"hot": {"threshold": 26.0}}
            if device == DEVICES[2]:
                doc["rules"] = {"hot": None}
            await connection.execute(
                f"INSERT INTO devices VALUES ($2, 't', NULL, true, NULL, {insert}", text(doc), device
            )
        await connection.close()

    with migrated_database(postgres) as dsn:
        in_thread(fill(dsn))
        yield dsn


def text(document: dict) -> str:
    return orjson.dumps(document).decode()


def expected(rule: dict, **companions: dict) -> dict[str, list[dict]]:
    """Transitions by device, by `DeviceAlarms` itself over the messages in the order of their times."""
    found = {}
    for device in DEVICES[:-1]:
        override = {DEVICES[1]: {"threshold": 26.0}, DEVICES[2]: None}.get(device, {})
        doc = {"device_id": device, "rev": 1, "type": "t", "enabled": True, "rules": {"hot": override}}
        doc["rules"].update({name: {} for name in companions})
        rules = compile_rules(doc, None, {"hot": rule, **companions}.get, lambda _: {**DATATYPE, "rev": 1})
        alarms = DeviceAlarms(device)
        transitions = found[device] = []
        mine = sorted((m for m in fleet() if m["device_id"] == device), key=lambda m: m["timestamp"])
        for offset, one in enumerate(mine):
            transitions += alarms.observe({**one, "raw_offset": offset}, rules).transitions
    return found


async def evaluate(
    dsn: str, *, processes: int = 1, devices=None, rules=None, sorted_max=None, monkeypatch=None, **options
):
    settings = load(postgres={"url": dsn})
    connection = await asyncpg.connect(dsn)
    try:
        test = await backtest.prepare(
            connection,
            settings,
            rules or {"hot": NEW},
            from_us=T,
            to_us=T + STEPS * 60 * S,
            against_live=True,
            devices=devices,
            **options,
        )
        if sorted_max is not None:
            pieces = history.pieces

            async def small(*arguments):
                return await pieces(*arguments, sorted_max=sorted_max)

            monkeypatch.setattr(history, "pieces", small)
        told = []
        result = await backtest.run(connection, test, processes=processes, progress=lambda *now: told.append(now))
        await backtest.count_notices(connection, settings, test, result)
        return result.document(test), told
    finally:
        await connection.close()


async def test_the_back_test_says_what_the_live_code_says(stored):
    document, told = await evaluate(stored)
    for side, rule in (("rules", NEW), ("live", {**RULE, "rev": 2})):
        transitions = [t for each in expected(rule).values() for t in each]
        assert document[side]["hot"]["raised"] == sum(t["transition"] == "raised" for t in transitions)
        assert document[side]["hot"]["transitions"] == sum(
            t["transition"] in ("raised", "cleared") for t in transitions
        )
        lasted = sum(t["cleared_at"] - t["occurred_at"] for t in transitions if t["transition"] == "cleared")
        assert document[side]["hot"]["active_s"] >= lasted / 1e6
    assert document["rules"]["hot"]["raised"] < document["live"]["hot"]["raised"]
    assert document["devices"] == len(DEVICES) - 2  # one has the rule switched off, one is not in the registry
    assert document["unknown_devices"] == 1
    assert document["readings"] == told[-1][0] == len(DEVICES) * STEPS * 2
    assert document["transitions_told"] == {"ops": document["rules"]["hot"]["transitions"]}
    # Grouped: far fewer notices than transitions, and repeated for what stands.
    notices = document["notices"]["ops"]
    assert 1 <= notices["alarms"] < document["rules"]["hot"]["transitions"]
    difference = document["against_live"]["hot"]
    assert difference["both"] + difference["only_live"] == document["live"]["hot"]["raised"]
    assert difference["both"] + difference["only_new"] == document["rules"]["hot"]["raised"]
    per_alarm = {(a["device_id"], a["pin_position"]): a["raised"] for a in document["alarms"]}
    assert sum(per_alarm.values()) == document["rules"]["hot"]["raised"]
    for device, transitions in expected(NEW).items():
        for pin in ("0", "1"):
            raised = sum(t["transition"] == "raised" and t["pin_position"] == pin for t in transitions)
            assert per_alarm.get((device, pin), 0) == raised


async def test_pieces_and_processes_make_no_difference(stored, monkeypatch):
    whole, _ = await evaluate(stored)
    pieces, _ = await evaluate(stored, sorted_max=1, monkeypatch=monkeypatch)
    parallel, _ = await evaluate(stored, processes=2)
    assert whole == pieces
    assert whole == parallel


async def test_the_rule_that_is_live_differs_in_nothing_from_itself(stored):
    document, _ = await evaluate(stored, rules={"hot": {**RULE, "rev": 0}})
    assert document["alarms_differing"] == 0
    assert document["against_live"]["hot"]["both"] == document["live"]["hot"]["raised"] > 0
    assert document["against_live"]["hot"]["only_new"] == document["against_live"]["hot"]["only_live"] == 0


async def test_a_rule_that_nobody_has_watches_every_device_with_such_a_series(stored):
    document, _ = await evaluate(stored, rules={"warm": {**NEW, "name": "warm"}})
    assert document["devices"] == len(DEVICES) - 1
    assert document["against_live"]["warm"]["only_live"] == 0
    assert document["problems"] == ["rule warm: not live, so nothing to compare it with"]


async def test_the_live_rules_of_its_group_act_on_a_rule_as_they_do_live(stored):
    grouped = {**NEW, "on_delay_s": 0.0, "group": "pump"}
    document, _ = await evaluate(stored, rules={"hot": grouped})
    transitions = [
        t for one in expected(grouped, cold={**MASTER, "rev": 2}).values() for t in one if t["rule"] == "hot"
    ]
    hot = document["rules"]["hot"]
    assert hot["suppressed"] == sum(t["transition"] == "suppressed" for t in transitions) > 0
    assert hot["first_out"] == len({t["alarm_id"] for t in transitions if t["first_out"]}) > 0
    assert hot["first_out"] < hot["raised"]
    assert set(document["rules"]) == {"hot"}, "companions are not under test"
    assert {a["rule"] for a in document["alarms"]} == {"hot"}
    assert document["companions"] == {"cold": len(DEVICES) - 2}
    alone, _ = await evaluate(stored, rules={"hot": grouped}, companions=False)
    assert alone["companions"] is None
    assert alone["rules"]["hot"]["suppressed"] == 0
    assert alone["rules"]["hot"]["raised"] > hot["raised"]
    # The live rule is in no group.
    assert document["live"] == alone["live"]
    assert document["live"]["hot"]["suppressed"] == 0


async def test_what_cannot_be_tested_is_refused_with_its_reason(stored):
    for rules, options, said in (
        ({"x": {**NEW, "name": "x", "component_type": "humidity"}}, {}, "humidity is stored; there are: temperature"),
        ({"hot": NEW}, {"devices": ["dev-0", "nobody"]}, "not in the registry: nobody"),
    ):
        with pytest.raises(backtest.BacktestError, match=said):
            await evaluate(stored, rules=rules, **options)


def test_the_command_prints_the_same_for_people_and_for_programs(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", stored)
    file = tmp_path / "rules.yaml"
    file.write_bytes(orjson.dumps({"rules": [{**RULE, "on_delay_s": 120, "deadband": 1}]}))
    arguments = [
        "alarms",
        "backtest",
        "--rule",
        str(file),
        "--from",
        str(T),
        "--to",
        str(T + STEPS * 60 * S),
        "--against",
        "live",
    ]
    as_json = CliRunner().invoke(cli, [*arguments, "--json"])
    assert as_json.exit_code == 0, as_json.output
    document = orjson.loads(as_json.stdout)
    whole, _ = asyncio.run(evaluate(stored))
    assert document == whole
    printed = CliRunner().invoke(cli, arguments)
    assert printed.exit_code == 0, printed.output
    assert f"{document['rules']['hot']['raised']}" in printed.stdout
    assert "only live" in printed.stdout
    one = CliRunner().invoke(cli, [*arguments, "--device", DEVICES[0], "--json"])
    assert orjson.loads(one.stdout)["devices"] == 1
    wrong = CliRunner().invoke(cli, [*arguments, "--name", "warm"])
    assert wrong.exit_code == 1
    nothing = CliRunner().invoke(cli, [*arguments[:5], str(T - 9 * S), "--to", str(T - S)])
    assert nothing.exit_code == 0, nothing.output
    assert "Nothing is stored of temperature in that time." in nothing.stdout
    ancient = CliRunner().invoke(cli, [*arguments[:5], "9999999d"])
    assert ancient.exit_code == 2
    assert "before 1970" in ancient.output


async def test_a_suggestion_is_what_the_back_test_of_it_says(stored):
    connection = await asyncpg.connect(stored)
    try:
        found = await suggest(connection, DEVICES[0], "hot", from_us=T, to_us=T + STEPS * 60 * S)
    finally:
        await connection.close()
    assert found.messages == STEPS
    assert found.advice.suggestions
    for one in found.advice.suggestions:
        changed = {**RULE, "rev": 0, one.parameter: one.value}
        document, _ = await evaluate(stored, rules={"hot": changed}, devices=[DEVICES[0]])
        assert document["rules"]["hot"]["transitions"] == one.transitions
        assert document["live"]["hot"]["transitions"] == found.advice.transitions
        assert one.transitions <= found.advice.transitions * 0.1
        assert document["rules"]["hot"]["active_s"] == pytest.approx(one.active_us / 1e6)


def test_the_command_suggests(stored, monkeypatch):
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", stored)
    arguments = [
        "alarms",
        "suggest",
        "--device",
        DEVICES[0],
        "--rule",
        "hot",
        "--from",
        str(T),
        "--to",
        str(T + STEPS * 60 * S),
    ]
    as_json = CliRunner().invoke(cli, [*arguments, "--json"])
    assert as_json.exit_code == 0, as_json.output
    document = orjson.loads(as_json.stdout)
    printed = CliRunner().invoke(cli, arguments)
    assert printed.exit_code == 0, printed.output
    for one in document["suggestions"]:
        assert one["spared"] >= 0.9
        assert one["parameter"] in printed.stdout
    unknown = CliRunner().invoke(cli, [*arguments, "--device", DEVICES[-1]])
    assert unknown.exit_code == 1
    assert "not in the registry" in unknown.output
    off = CliRunner().invoke(cli, [*arguments, "--device", DEVICES[2]])
    assert "does not watch" in off.output


async def test_the_newest_messages_are_looked_at_where_there_are_too_many(stored):
    connection = await asyncpg.connect(stored)
    try:
        found = await suggest(connection, DEVICES[0], "hot", from_us=T, to_us=T + STEPS * 60 * S, messages_max=50)
    finally:
        await connection.close()
    assert found.messages == 50
    assert found.from_us == T + (STEPS - 50) * 60 * S
