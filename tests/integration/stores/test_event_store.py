"""The event store on a real PostgreSQL: what was taken out shows, the past is what it was, projections come out of their events again."""

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from click.testing import CliRunner
from sink_support import NOW_US, SECOND_US, execute, fetch, live

from preservarium.__main__ import cli
from preservarium.cli import events as command
from preservarium.registry.apply import apply
from preservarium.settings import load
from preservarium.stores import events, projections, registry
from preservarium.stores.event_tables import EventStore, EventTable
from preservarium.stores.events import NewEvent
from preservarium.stores.journal import ALARM_OPERATIONS, Journal
from preservarium.stores.tables import ALARM_EVENTS, COMMAND_EVENTS

REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes: [{name: temperature, kind: number, unit: degC}]
parsers: [{name: acme, kind: json}]
device_types: [{name: T1, manufacturer: Acme, parser: acme, mapping: {t: {component_type: temperature}}}]
rules: [{name: hot, kind: high, component_type: temperature, severity: major, threshold: 60}]
devices: [{device_id: "0001", type: T1}, {device_id: "0002", type: T1}]
"""


@pytest.fixture
async def connection(dsn: str):
    made = await asyncpg.connect(dsn)
    yield made
    await made.close()


async def _told(connection: Any, stream: str, count: int, *, at_us: int = NOW_US) -> None:
    for n in range(count):
        kind, data = ("created", {"doc": {"n": 0}}) if n == 0 else ("changed", {"set": {"n": n}})
        async with connection.transaction():
            await events.append(connection, [NewEvent(stream, n, kind, data)], actor="ann", at_us=at_us + n * SECOND_US)


async def _vandal(dsn: str, *statements: str) -> None:
    """Past the triggers, as a superuser can."""
    await execute(dsn, "SET session_replication_role = replica; " + "; ".join(statements))


async def _run(dsn: str, *arguments: str) -> Any:
    environment = {"PRESERVARIUM_POSTGRES__URL": dsn, "PRESERVARIUM_CLICKHOUSE__ENABLED": "false"}
    return await asyncio.to_thread(CliRunner(env=environment).invoke, cli, ["events", *arguments])


@pytest.mark.parametrize(
    ("statements", "fault"),
    [
        (["DELETE FROM event_store WHERE stream_id = 'device/a' AND version = 3"], "the events end at 2, and the last one was 3"),
        (["DELETE FROM event_store WHERE stream_id = 'device/a'"], "device/a: the stream is missing with all of its 3 events"),
        (["DELETE FROM event_store WHERE stream_id = 'device/a' AND version = 1"], "version 2 follows 0: events are missing"),
        (["UPDATE event_store SET data = '{\"set\":{\"n\":9}}' WHERE stream_id = 'device/a' AND version = 3"], "version 3 was altered"),
        (["DELETE FROM event_heads WHERE stream_id = 'device/a'"], "device/a: no end is noted of it"),
        (["UPDATE event_heads SET hash = decode(repeat('00', 32), 'hex') WHERE stream_id = 'device/a'"], "is not the one that is noted"),
        (
            [f"UPDATE event_store SET version = {new} WHERE stream_id = 'device/a' AND version = {old}" for old, new in ((1, 9), (2, 1), (9, 2))],
            "does not continue the chain",
        ),
    ],
)  # fmt: skip
async def test_what_was_taken_out_or_altered_shows(
    dsn: str, connection: Any, statements: list[str], fault: str
) -> None:
    await _told(connection, "device/a", 3)
    await _told(connection, "stable/b", 2)
    assert (await events.verify(connection)) == events.Verified(2, 5, [])
    await _vandal(dsn, *statements)
    found = await events.verify(connection)
    assert any(fault in one for one in found.faults), found.faults
    assert all(one.startswith("device/a") for one in found.faults)
    assert (await events.verify(connection, prefix="stable/")).faults == []


async def test_a_chain_that_was_written_anew_shows_against_ends_that_were_kept_elsewhere(
    dsn: str, connection: Any, tmp_path: Path
) -> None:
    await _told(connection, "device/a", 3)
    kept = tmp_path / "ends"
    assert (await _run(dsn, "verify", "--keep", str(kept))).exit_code == 0
    await _told(connection, "device/b", 1)  # what is new since does not count
    same = await _run(dsn, "verify", "--against", str(kept), "--json")
    assert orjson.loads(same.stdout) == {"streams": 2, "events": 4, "compared": 1, "faults": [], "ok": True}
    await _vandal(dsn, "TRUNCATE event_store, event_heads")
    await _told(connection, "device/a", 3, at_us=NOW_US + 1)
    other = await _run(dsn, "verify", "--against", str(kept))
    assert other.exit_code == 1
    assert "device/a: version 3 is another one than it was" in other.output
    kept.write_text('["device/a", 3]\n')
    assert "line 1: not what" in (await _run(dsn, "verify", "--against", str(kept))).output


async def test_a_document_as_of_any_version_and_instant(dsn: str, connection: Any) -> None:
    await _told(connection, "device/a", 120)
    assert [s["version"] for s in await fetch(dsn, "SELECT version FROM event_snapshots ORDER BY 1")] == [50, 100]
    for version in (1, 49, 50, 51, 100, 120):
        assert await events.state_at(connection, "device/a", version=version) == ({"n": version - 1}, version)
        at = NOW_US + (version - 1) * SECOND_US
        assert await events.state_at(connection, "device/a", until_us=at) == ({"n": version - 1}, version)
    assert await events.state_at(connection, "device/a", until_us=NOW_US - 1) == (None, 0)
    # A clock that went back: what is before an event in its stream was there when it happened.
    async with connection.transaction():
        await events.append(
            connection, [NewEvent("device/a", 120, "changed", {"set": {"n": "back"}})], actor="bob", at_us=NOW_US
        )
    assert await events.state_at(connection, "device/a", until_us=NOW_US) == ({"n": "back"}, 121)
    printed = await _run(dsn, "state-at", "device/a", "--version", "7", "--json")
    assert orjson.loads(printed.stdout)["document"] == {"n": 6}
    assert (await _run(dsn, "state-at", "device/a", "--version", "122")).exit_code == 1
    shown = orjson.loads((await _run(dsn, "show", "device/a", "--from", "120", "--json")).stdout)
    assert [(e["version"], e["data"]["set"]["n"]) for e in shown] == [(120, 119), (121, "back")]
    newest = orjson.loads((await _run(dsn, "log", "--stream", "device/", "--actor", "bob", "--json")).stdout)
    assert [e["version"] for e in newest] == [121]
    after = orjson.loads((await _run(dsn, "log", "--after", "118", "--limit", "2", "--json")).stdout)
    assert [e["position"] for e in after] == [119, 120]
    assert "has no event" in (await _run(dsn, "show", "device/none")).output


async def test_streams_of_other_kinds_have_a_state_and_snapshots(connection: Any) -> None:
    for n in range(101):
        data = {"command_id": "c", "sequence": n, "state": str(n)}
        async with connection.transaction():
            await events.append(connection, [NewEvent("command/c", n, "publish", data)], actor="x", at_us=NOW_US)
            await events.append(connection, [NewEvent("other/c", n, "seen", {"n": n})], actor="x", at_us=NOW_US)
    # A release before this one left snapshots without a state.
    await connection.execute("UPDATE event_snapshots SET state = NULL WHERE version = 100 AND stream_id = 'other/c'")
    state, _ = await events.state_at(connection, "command/c")
    assert state is not None
    assert state["state"] == "100"
    assert await events.state_at(connection, "other/c") == (
        {"events": 101, "last": {"type": "seen", "data": {"n": 100}}}, 101,
    )  # fmt: skip


def _store(dsn: str, declared: EventTable, sink: str) -> EventStore:
    kind = EventStore if declared is ALARM_EVENTS else Journal
    return kind(declared, live(postgres={"url": dsn}), sink=sink)


def _transition(alarm: str, n: int, state: str) -> dict[str, Any]:
    return {
        "alarm_id": alarm, "transition_id": f"{alarm}-{n}", "sequence": n, "device_id": "0001", "rule": "hot", "pin_position": "-1",
        "severity": "major", "transition": "x", "state": state, "occurred_at": NOW_US, "detected_at": NOW_US + n, "cleared_at": None,
        "value": 61.5, "unit": "°C", "threshold": 60.0, "message": "hot", "generation": 0, "component_type": "temperature",
    }  # fmt: skip


def _action(n: int) -> dict[str, Any]:
    return {
        "action_id": f"x{n}", "device_id": "0001", "rule": "hot", "pin_position": "-1", "alarm_id": "a1", "action": "acknowledge",
        "actor": "ann", "comment": "", "at": NOW_US + n, "until": None, "outcome": "done", "code": "", "reason": "",
        "state": "acknowledged", "answered_at": NOW_US + n,
    }  # fmt: skip


def _command(sequence: int, state: str, ended: int | None = None) -> dict[str, Any]:
    return {
        "event_id": f"e{sequence}", "command_id": "c1", "sequence": sequence, "device_id": "0001", "event": "x", "state": state,
        "at": NOW_US + sequence, "actor": "ann" if sequence == 1 else "", "command": "set", "priority": 5, "requested_at": NOW_US,
        "requested_by": "ann", "idempotency_key": "k", "cause": None, "expires_at": NOW_US + 1, "ended_at": ended, "content": {"on": 1},
        "confirm": "published",
    }  # fmt: skip


async def test_projections_made_anew_are_equal_to_what_stands_and_mend_what_is_not(
    dsn: str, connection: Any, tmp_path: Path
) -> None:
    settings = load(postgres={"url": dsn}, kafka={"bootstrap_servers": "127.0.0.1:1"}, clickhouse={"enabled": False})
    file = tmp_path / "registry.yaml"
    for old, new in (("60", "60"), ("60", "61"), (', {device_id: "0002", type: T1}', "")):
        file.write_text(REGISTRY.replace(old, new))
        await apply(settings, file, prune=True)
    written = {
        ALARM_EVENTS: [_transition("a1", 1, "active"), _transition("a2", 1, "active"), _transition("a1", 2, "acknowledged")],
        ALARM_OPERATIONS: [_action(1), _action(2)],
        COMMAND_EVENTS: [_command(2, "queued"), _command(1, "queued"), _command(4, "successful", NOW_US), _command(3, "sent")],
    }  # fmt: skip
    for number, (declared, lines) in enumerate(written.items()):
        store = _store(dsn, declared, f"sink-{number}")
        try:
            for line in lines:  # one at a time and then all again: it makes no difference
                await store.write([line], {})
            await store.write(lines, {})
        finally:
            await store.close()
    assert [e.actor for e in await events.read(connection, "command/c1")] == [
        "preservarium", "ann", "preservarium", "preservarium",
    ]  # fmt: skip
    assert (await events.verify(connection)).faults == []
    before = await connection.fetch("SELECT * FROM alarms ORDER BY 1")
    found = await projections.rebuild(connection)
    assert [(one.name, one.events, one.rows, one.equal, one.named) for one in found] == [
        ("registry", 10, 6, True, []), ("actions", 2, 2, True, []), ("alarms", 3, 2, True, []), ("commands", 4, 1, True, []),
    ]  # fmt: skip
    assert await connection.fetch("SELECT * FROM alarms ORDER BY 1") == before

    await _vandal(
        dsn,
        "UPDATE alarm_rules SET doc = (doc::jsonb || '{\"threshold\": 1}')::json WHERE name = 'hot'",
        "DELETE FROM devices WHERE device_id = '0001'",
        "DELETE FROM alarm_operations WHERE action_id = 'x1'",
        'INSERT INTO alarm_operations SELECT (jsonb_populate_record(o, \'{"action_id": "false"}\')).* FROM alarm_operations o',
        "UPDATE alarms SET state = 'normal' WHERE alarm_id = 'a1'",
        "UPDATE device_commands SET requested_by = 'mallory'",
        'INSERT INTO device_commands SELECT (jsonb_populate_record(c, \'{"command_id": "old"}\')).* FROM device_commands c',
    )
    printed = await _run(dsn, "replay", "--json")
    assert printed.exit_code == 1
    told = {one["name"]: one for one in orjson.loads(printed.stdout)["projections"]}
    counts = {name: (one["different"], one["missing"], one["extra"], one["untold"]) for name, one in told.items()}
    assert counts == {
        "registry": (1, 1, 0, 0),
        "actions": (0, 1, 1, 0),
        "alarms": (1, 0, 0, 0),
        "commands": (1, 0, 0, 1),
    }
    assert "rule/hot: differs in threshold" in told["registry"]["named"]
    assert "device/0001: does not stand, and its events say it does" in told["registry"]["named"]
    assert (await _run(dsn, "replay", "--write")).exit_code == 2  # a reason is needed
    mended = await _run(dsn, "replay", "--write", "--reason", "drill", "--actor", "bob")
    assert mended.exit_code == 1  # what no event explains stays, for people to look at
    assert "alarm_operations false: stands, and no event says so" in mended.output
    await _vandal(dsn, "DELETE FROM alarm_operations WHERE action_id = 'false'")
    assert (await _run(dsn, "replay")).exit_code == 0
    assert (await registry.verify(connection)).faults == []
    noted = await events.read(connection, projections.STREAM)
    assert [(e.actor, e.data["projection"], e.data["reason"], e.data["rows"]) for e in noted] == [
        ("bob", "registry", "drill", 2), ("bob", "actions", "drill", 1), ("bob", "alarms", "drill", 1), ("bob", "commands", "drill", 1),
    ]  # fmt: skip
    # Workers are told of what was mended in the registry.
    told_rows = await fetch(
        dsn, "SELECT convert_from(key, 'UTF8') AS key FROM registry_outbox ORDER BY id DESC LIMIT 2"
    )
    assert {row["key"] for row in told_rows} == {"rule/hot", "0001"}


def test_the_command_offers_every_projection() -> None:
    assert command.PROJECTIONS == projections.NAMES
