"""Commands over HTTP: what is sent to Kafka, what is refused, and who may ask."""

import asyncio
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from preservarium.clock import ManualClock
from preservarium.console.commands import Commands
from preservarium.domain.commands.device import command_id
from preservarium.domain.commands.lines import LINE_BYTES_MAX
from preservarium.errors import Retry
from preservarium.operations import command_desk
from preservarium.operations.command_desk import CommandDesk
from preservarium.settings import Commands as CommandSettings
from preservarium.settings import Web

BASE = "/api/devices/dev-1/commands"


class Reads:
    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def commands(self, **asked: Any) -> dict[str, Any]:
        self.asked.append(asked)
        return {"commands": [{"command_id": "c1"}], "next": (5, "c1")}

    async def command(self, command: str, *, limit: int) -> dict[str, Any] | None:
        return {"command_id": command, "device_id": "dev-1", "events": []} if command == "c1" else None

    async def registered(self, device_id: str) -> Any:
        kinds = {"commands": {"open": {"fields": {"valve": 1}}, "set": {}}, "lorawan_class": "A", "tries": 2}
        device = {"device_id": device_id, "type": "valve", "enabled": device_id != "off", "name": "Valve"}
        return None if device_id == "none" else (device, {"parser": "p", "downlink": kinds})


@pytest.fixture
def host():
    host = SimpleNamespace(
        settings=SimpleNamespace(web=Web(), commands=CommandSettings()),
        clock=ManualClock(),
        sent=[],
        down=False,
        reads=Reads(),
    )
    host.live = lambda: host.settings

    async def publish(sends):
        if host.down:
            raise Retry("Kafka: gone")
        host.sent += sends

    host.desk = CommandDesk(publish, host.clock, host.reads.registered)
    return host


@pytest.fixture
async def client(host):
    application = web.Application()
    Commands(host, host.desk, host.reads).mount(application)
    async with TestClient(TestServer(application)) as made:
        yield made


def line(host: Any) -> dict[str, Any]:
    (send,) = host.sent
    assert send.key == b"dev-1"
    found: dict[str, Any] = orjson.loads(send.value)
    return found


async def test_a_request_is_sent_and_its_id_is_known_at_once(host, client):
    asked = {"command": "open", "fields": {"valve": 1}, "tries": 2}
    response = await client.post(BASE, json=asked, headers={"Idempotency-Key": "k1"})
    assert response.status == 202
    made = await response.json()
    assert made["command_id"] == command_id("dev-1", "k1")
    assert response.headers["Location"] == made["command"] == f"{BASE}/{made['command_id']}"
    assert line(host) == {
        **asked, "kind": "request", "device_id": "dev-1", "idempotency_key": "k1", "actor": "operator",
        "at": host.clock.now_us(),
    }  # fmt: skip
    again = await client.post(BASE, json=asked, headers={"Idempotency-Key": "k1"})
    assert (await again.json())["command_id"] == made["command_id"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400), ({"command": "x", "wish": 1}, 400), ({"command": "x", "tries": 0}, 400), ([], 400),
        ({"command": "x", "kind": "report"}, 400), ({"command": "x", "device_id": "other"}, 400),
        ({"payload": "x" * LINE_BYTES_MAX}, 413),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_refused_at_the_door(host, client, body, status):
    response = await client.post(BASE, json=body)
    assert response.status == status
    assert (await response.json())["error"]
    assert host.sent == []


async def test_an_unknown_device_is_refused_at_once_and_a_registry_that_is_away_refuses_nobody(
    host, client, monkeypatch
):
    response = await client.post("/api/devices/none/commands", json={"command": "open"})
    assert response.status == 404
    assert await response.json() == {
        "error": "the registry knows no device 'none': register it first", "code": "unknown_device",
    }  # fmt: skip
    assert host.sent == []

    async def away(device_id):
        raise Retry("PostgreSQL: gone")

    async def hangs(device_id):
        await asyncio.sleep(3_600)

    monkeypatch.setattr(command_desk, "REGISTRY_S", 0.05)
    for registry in (away, hangs):
        host.desk.registered = registry
        assert (await client.post("/api/devices/none/commands", json={"command": "open"})).status == 202
    assert len(host.sent) == 2


async def test_forms_and_strangers_are_refused(host, client):
    assert (await client.post(BASE, data=b'{"command": "x"}')).status == 415
    response = await client.post(BASE, json={"command": "x"}, headers={"Origin": "http://evil.example"})
    assert response.status == 403
    host.settings.web = Web(operator_token="secret-0123456789")
    assert (await client.post(BASE, json={"command": "x"})).status == 401
    assert (await client.get(BASE)).status == 401
    assert host.sent == []


async def test_a_token_proves_who_asks(host, client):
    host.settings.web = Web(operators="ann:0123456789abcdef")
    headers = {"Authorization": "Bearer 0123456789abcdef"}
    assert (await client.post(BASE, json={"command": "x"}, headers=headers)).status == 202
    assert line(host)["actor"] == "ann"
    assert (await client.post(BASE, json={"command": "x", "actor": "bob"}, headers=headers)).status == 403


async def test_cancelling(host, client):
    assert (await client.post(f"{BASE}/c1/cancel", json={"actor": "ann"})).status == 202
    sent = line(host)
    assert (sent["kind"], sent["command_id"], sent["actor"]) == ("cancel", "c1", "ann")


async def test_kafka_that_is_down_is_said(host, client):
    host.down = True
    assert (await client.post(BASE, json={"command": "x"})).status == 503


async def test_lists_and_one_command(host, client):
    page = await (await client.get(BASE, params={"state": "queued,sent", "limit": "7"})).json()
    assert page["commands"] == [{"command_id": "c1"}]
    await client.get(BASE, params={"cursor": page["next_cursor"]})
    assert host.reads.asked == [
        {"device_id": "dev-1", "states": ["queued", "sent"], "before": None, "limit": 7},
        {"device_id": "dev-1", "states": [], "before": (5, "c1"), "limit": 50},
    ]
    assert (await client.get(BASE, params={"state": "lost"})).status == 400
    assert (await (await client.get(f"{BASE}/c1")).json())["command_id"] == "c1"
    assert (await client.get(f"{BASE}/c2")).status == 404
    assert (await client.get("/api/devices/other/commands/c1")).status == 404


async def test_commands_of_all_devices_or_of_one_that_the_query_names(host, client):
    page = await (await client.get("/api/commands", params={"state": "failed", "limit": "3"})).json()
    await client.get("/api/commands", params={"device": "dev/1", "cursor": page["next_cursor"]})
    assert host.reads.asked == [
        {"device_id": "", "states": ["failed"], "before": None, "limit": 3},
        {"device_id": "dev/1", "states": [], "before": (5, "c1"), "limit": 50},
    ]
    assert (await client.get("/api/commands", params={"device": "x" * 300})).status == 400
    host.settings.web = Web(operator_token="secret-0123456789")
    assert (await client.get("/api/commands")).status == 401


async def test_a_form_learns_what_there_is_to_choose_from(client):
    found = await (await client.get(f"{BASE}/choices")).json()
    assert found == {
        "device_id": "dev-1", "name": "Valve", "type": "valve", "problem": None, "format": "plain", "sleeps": True, "given": {"tries": 2},
        "commands": [{"command": "open", "fields": {"valve": 1}}, {"command": "set"}],
    }  # fmt: skip
    assert "switched off" in (await (await client.get("/api/devices/off/commands/choices")).json())["problem"]
    assert (await client.get("/api/devices/none/commands/choices")).status == 404
