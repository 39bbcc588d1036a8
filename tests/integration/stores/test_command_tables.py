"""Commands in PostgreSQL: a row as the last event left it, whatever the order in which events came."""

import time
from typing import Any

import asyncpg
import pytest
from quality_support import S, T
from sink_support import fetch, live

from preservarium.domain.commands.device import DeviceCommands, Turn, downlink_id
from preservarium.domain.commands.lines import parse_line
from preservarium.domain.commands.profile import Profile
from preservarium.stores.event_tables import EventStore
from preservarium.stores.tables import COMMAND_EVENTS
from preservarium.stores.views import Views


@pytest.fixture
async def store(dsn):
    made = EventStore(COMMAND_EVENTS, live(postgres={"url": dsn}), sink="sink-commands")
    yield made
    await made.close()


def story() -> list[Any]:
    """Events of one command from request to confirmation, as the stage tells them."""
    device, events = DeviceCommands("d1"), []
    lines = [
        {
            "command": "set",
            "actor": "ann",
            "fields": {"on": 1},
            "confirm": "published",
            "port": 3,
            "idempotency_key": "k",
        }
    ]
    for number in (1, 2):
        line = parse_line(lines[-1], device_id="d1", at=T + number * S, key="x")
        act = getattr(device, line.kind)
        events += act(line, Profile(topic="t"), Turn(T + number * S), "c0", number, 0).events
        downlink = downlink_id(events[0]["command_id"], 1)
        lines.append({"kind": "report", "report": "sent", "downlink_id": downlink})
    return events


async def test_the_row_is_what_the_last_event_says(dsn, store):
    events = story()
    assert [e["state"] for e in events] == ["queued", "queued", "sent", "successful"]
    await store.write(events[:2], {})
    (row,) = await fetch(dsn, "SELECT * FROM device_commands")
    assert (row["state"], row["ended_at"], row["attempt"], row["sequence"]) == ("queued", None, 1, 2)
    await store.write(events[1:], {})
    (row,) = await fetch(dsn, "SELECT * FROM device_commands")
    assert (row["state"], row["sequence"], row["command"], row["requested_by"]) == ("successful", 4, "set", "ann")
    assert row["ended_at"].timestamp() == (T + 2 * S) / 1e6
    assert row["content"] == '{"port": 3, "fields": {"on": 1}}'
    assert [r[0] for r in await fetch(dsn, "SELECT event FROM command_events ORDER BY sequence")] == [
        "request", "hand_over", "publish", "confirm",
    ]  # fmt: skip


async def test_what_comes_late_or_again_changes_nothing(dsn, store):
    events = story()
    await store.write(events[3:], {})
    again = await store.write(events[::-1], {})
    assert (again.accepted, again.duplicates) == (3, 1)
    (row,) = await fetch(dsn, "SELECT state, sequence FROM device_commands")
    assert tuple(row) == ("successful", 4)
    assert len(await fetch(dsn, "SELECT 1 FROM command_events")) == 4


async def test_what_ended_long_ago_is_deleted_and_what_waits_stays(dsn, store):
    ended, waiting = story(), [{**event, "event_id": f"w{i}", "command_id": "w"} for i, event in enumerate(story()[:2])]
    recent_us = time.time_ns() // 1_000 - 86_400 * S
    recent = [{**event, "event_id": f"r{i}", "command_id": "r", "at": recent_us} for i, event in enumerate(story())]
    recent[-1]["ended_at"] = recent_us
    await store.write([*ended, *waiting, *recent], {})
    assert await store.prune() == 6 + 1  # events, and the row of the one that has ended
    assert await store.prune() == 0
    left = await fetch(dsn, "SELECT command_id, state FROM device_commands ORDER BY 1")
    assert [tuple(row) for row in left] == [("r", "successful"), ("w", "queued")]
    assert [r[0] for r in await fetch(dsn, "SELECT DISTINCT command_id FROM command_events")] == ["r"]


async def test_people_see_commands_and_their_events(dsn, store):
    await store.write(story(), {})
    views = Views(lambda: live(postgres={"url": dsn})().postgres)
    try:
        page = await views.commands(device_id="d1", states=["successful"], before=None, limit=10)
        (command,) = page["commands"]
        assert (command["command"], command["requested_at"], command["content"]) == (
            "set",
            T + S,
            {"port": 3, "fields": {"on": 1}},
        )
        assert (command["confirm"], page["next"]) == ("published", None)
        before = (command["requested_at"], command["command_id"])
        assert (await views.commands(device_id="", states=[], before=before, limit=1))["commands"] == []
        assert (await views.commands(device_id="", states=["queued", "sent"], before=None, limit=1))["commands"] == []
        found = await views.command(command["command_id"], limit=2)
        assert [e["event"] for e in found["events"]] == ["request", "hand_over"]
        assert await views.command("none", limit=2) is None
    finally:
        await views.close()


async def test_what_is_under_way_is_found_and_what_the_registry_gives_a_device(dsn, store):
    await store.write(story()[:2], {})
    views = Views(lambda: live(postgres={"url": dsn})().postgres)
    try:
        page = await views.commands(device_id="", states=["queued", "sent"], before=None, limit=1)
        assert [c["state"] for c in page["commands"]] == ["queued"]
        assert (await views.commands(device_id="", states=["queued", "failed"], before=None, limit=1))["commands"]
        assert await views.registered("d1") is None
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            """
            INSERT INTO manufacturers VALUES ('m', nextval('registry_rev'), 1, '{}', now(), 'test');
            INSERT INTO device_types VALUES ('t', 'm', 'p', nextval('registry_rev'), 1, '{"downlink": {"tries": 3}}', now(), 'test');
            INSERT INTO devices VALUES ('d1', 't', 'Name', false, NULL, nextval('registry_rev'), 1, '{"name": "Name"}', now(), 'test');
            """
        )
        await connection.close()
        assert await views.registered("d1") == (
            {"name": "Name", "device_id": "d1", "type": "t", "enabled": False},
            {"downlink": {"tries": 3}, "parser": "p"},
        )
    finally:
        await views.close()
