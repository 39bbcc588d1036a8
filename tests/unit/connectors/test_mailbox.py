"""Devices that fetch: what waits for them, in order, until they have it; and what asking sends."""

import asyncio
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from connector_fakes import MemoryPublisher

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.connectors.mailbox import DEVICES_MAX, WAITING_MAX, Mailbox, MailboxBroker
from preservarium.domain.commands.device import DeviceCommands, Turn, downlink_id
from preservarium.domain.commands.lines import parse_line
from preservarium.domain.commands.profile import Profile, compile_profile
from preservarium.errors import Reject
from preservarium.settings import Http, LiveSettings, Settings

NOW_US = 1_700_000_000_000_000
S = 1_000_000


def put(mailbox: Mailbox, identifier: str, device: str = "d1", expires_s: float = 60) -> None:
    line = {
        "id": identifier,
        "command_id": "c",
        "attempt": 1,
        "port": None,
        "payload_b64": "AQ==",
        "expires_at": NOW_US + round(expires_s * S),
    }
    mailbox.take(device.encode(), orjson.dumps(line))


def ids(mailbox: Mailbox, device: str = "d1", at_s: float = 0) -> list[str]:
    return [line["id"] for line in mailbox.waiting(device, NOW_US + round(at_s * S))]


def test_downlinks_wait_in_order_until_their_device_has_them():
    mailbox = Mailbox()
    for identifier in ("a", "b", "a", "c"):
        put(mailbox, identifier)
    put(mailbox, "x", device="d2")
    assert ids(mailbox) == ["a", "b", "c"]
    assert (mailbox.upto("d1", "b"), mailbox.upto("d1", "x"), mailbox.upto("d3", "a")) == (["a", "b"], [], [])
    mailbox.take(b"d1", b'{"has": "b"}')
    assert ids(mailbox) == ["c"]
    mailbox.take(b"d1", b'{"has": "b"}')
    mailbox.take(b"d1", b'{"has": "c"}')
    assert (ids(mailbox), ids(mailbox, "d2")) == ([], ["x"])


def test_a_device_may_spell_its_address_as_it_likes():
    mailbox = Mailbox()
    put(mailbox, "a", device="70B3D57ED0AA0001")
    put(mailbox, "b", device="70-B3-D5-7E-D0-AA-00-01")
    assert ids(mailbox, "70b3d57ed0aa0001") == ids(mailbox, "70:B3:D5:7E:D0:AA:00:01") == ["a", "b"]
    assert mailbox.upto("70B3.D57E.D0AA.0001", "a") == ["a"]
    mailbox.take(b"70b3d57ed0aa0001", b'{"has": "a"}')
    assert ids(mailbox, "70B3D57ED0AA0001") == ["b"]


def test_what_is_over_is_not_given_and_there_are_limits():
    mailbox = Mailbox()
    put(mailbox, "old", expires_s=1)
    put(mailbox, "new", expires_s=2)
    assert ids(mailbox, at_s=1) == ["new"]
    for n in range(WAITING_MAX + 1):
        put(mailbox, f"i{n}")
    assert (len(ids(mailbox)), ids(mailbox)[0]) == (WAITING_MAX, "i1")
    for n in range(DEVICES_MAX):
        put(mailbox, "y", device=f"e{n}")
    assert (ids(mailbox), len(mailbox._waiting)) == ([], DEVICES_MAX)


@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b"5", b"{}", b'{"id": 5, "expires_at": 1}', b'{"id": "a"}'])
def test_what_is_no_line_of_ours_is_left_out(value):
    mailbox = Mailbox()
    mailbox.take(b"d1", value)
    mailbox.take(b"\xff", b'{"has": "a"}')
    assert mailbox._waiting == {}


async def test_the_downlink_stage_hands_over_keyed_by_device_and_hears_that_kafka_is_down():
    publisher = MemoryPublisher()
    broker = MailboxBroker(publisher.publish)
    assert await broker.publish([("d1", b"1", 1), ("d2", b"2", 1)]) == ([True, True], "")
    assert [(s.topic, s.key, s.value) for s in publisher.sends] == [
        (topics.MAILBOX, b"d1", b"1"),
        (topics.MAILBOX, b"d2", b"2"),
    ]
    publisher.failures = 1
    assert await broker.publish([("d1", b"1", 1)]) == ([False], "Kafka is down")


# --- asking


class Door:
    def __init__(self, **settings: Any) -> None:
        self.publisher, self.clock, self.mailbox = MemoryPublisher(), ManualClock(NOW_US), Mailbox()
        self.mailbox.trouble = ""
        app = web.Application()
        live = LiveSettings(Settings(http=Http(**settings)))
        app.add_routes(http.routes(self.publisher, live, self.clock, self.mailbox))
        self.client = TestClient(TestServer(app))

    async def ask(self, status: int = 200, headers: dict[str, str] | None = None, **query: str) -> Any:
        async with self.client.get(
            "/ingest/commands", params={"device": "d1", "wait_s": "0", **query}, headers=headers
        ) as response:
            assert response.status == status, await response.text()
            body = await response.read()
            return orjson.loads(body) if body else None

    def told(self) -> list[tuple[str, Any]]:
        found = [(line["kind"], line.get("downlink_id")) for line in self.publisher.lines(topics.COMMANDS)]
        found += [("has", line["has"]) for line in self.publisher.lines(topics.MAILBOX)]
        self.publisher.sends.clear()
        return found


async def test_a_strangers_page_asks_for_no_device():
    # An image on any page would do: asking acknowledges what the device is said to have.
    door = Door()
    async with door.client:
        put(door.mailbox, "a")
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
            assert (await door.ask(403, headers=headers, has="a"))["error"] == "forbidden"
        assert door.told() == []
        assert [line["id"] for line in (await door.ask())["downlinks"]] == ["a"]


@pytest.fixture
async def door():
    door = Door()
    async with door.client:
        yield door


async def test_a_device_gets_the_same_until_it_says_that_it_has_it(door):
    assert await door.ask(204) is None
    assert door.told() == [("wake", None)]
    put(door.mailbox, "a")
    put(door.mailbox, "b")
    for _ in range(2):  # the answer was lost: it is given again
        assert [d["id"] for d in (await door.ask())["downlinks"]] == ["a", "b"]
    assert door.told() == []
    assert [d["id"] for d in (await door.ask(has="a"))["downlinks"]] == ["b"]
    assert door.told() == [("report", "a"), ("has", "a")]
    door.mailbox.take(b"d1", b'{"has": "a"}')
    # Repeated, it tells nothing twice.
    assert [d["id"] for d in (await door.ask(has="a"))["downlinks"]] == ["b"]
    assert door.told() == []
    assert await door.ask(204, has="b") is None
    assert door.told() == [("report", "b"), ("wake", None), ("has", "b")]


async def test_what_comes_while_the_device_asks_is_the_answer(door):
    asking = asyncio.create_task(door.ask(wait_s="20"))
    while "d1" not in door.mailbox._asking:
        await asyncio.sleep(0)
    put(door.mailbox, "z", device="d2")
    put(door.mailbox, "a")
    assert (await asking)["downlinks"] == [
        {"id": "a", "command_id": "c", "attempt": 1, "port": None, "payload_b64": "AQ==", "expires_at": NOW_US + 60 * S}
    ]
    assert door.mailbox._asking == {}
    assert await door.ask(204, device="d3", wait_s="0.01") is None
    assert door.mailbox._asking == {}


async def test_who_may_ask_and_what_is_refused():
    door = Door(token="s3cret")
    async with door.client:
        await door.ask(401)
        await door.ask(401, headers={"Authorization": "Bearer no"})
        mine = {"Authorization": "Bearer s3cret"}
        await door.ask(204, headers=mine)
        for wrong in (
            {"device": ""},
            {"device": "x" * 300},
            {"wait_s": "26"},
            {"wait_s": "nan"},
            {"wait_s": "x"},
            {"has": "x" * 300},
            {"device": "a\0"},
        ):
            assert (await door.ask(400, headers=mine, **wrong))["error"] == "envelope_invalid"
        door.publisher.failures = 1
        await door.ask(503, headers=mine)
        door.mailbox.trouble = "not read yet"
        assert "not read yet" in (await door.ask(503, headers=mine))["message"]


# --- what asking does


def test_asking_wakes_what_waits_and_nothing_else():
    device = {"device_id": "a+b", "type": "t", "enabled": True}
    profile = compile_profile(device, {"parser": "p", "downlink": {"format": "http"}}, "devices/{device}/down")  # type: ignore[typeddict-item]
    assert (profile.problem, profile.format, profile.topic, profile.sleeps) == ("", "http", "a+b", True)
    commands = DeviceCommands("a+b")

    def line(number: int, **fields: Any) -> Any:
        return parse_line({"device_id": "a+b", "at": NOW_US, **fields}, device_id=None, at=NOW_US + number, key="k")

    asked = commands.request(line(1, command="x", payload=1, confirm="delivered"), profile, Turn(NOW_US), "c0", 1, 0)
    assert (asked.downlinks, [e["event"] for e in asked.events]) == ([], ["request"])
    late = commands.wake(line(2, kind="wake"), profile, Turn(NOW_US + 31 * S), "c0", 2, 0, awake_us=30 * S)
    assert late.downlinks == []
    woken = commands.wake(line(3, kind="wake"), profile, Turn(NOW_US), "c0", 3, 0, awake_us=30 * S)
    (downlink,) = woken.downlinks
    assert (downlink["topic"], downlink["downlink_id"]) == ("a+b", downlink_id(asked.events[0]["command_id"], 1))
    assert commands.wake(line(3, kind="wake"), profile, Turn(NOW_US), "c0", 3, 0, awake_us=30 * S).duplicate
    for number, word in ((4, "sent"), (5, "acknowledged")):
        told = commands.report(
            line(number, kind="report", downlink_id=downlink["downlink_id"], report=word),
            profile,
            Turn(NOW_US),
            "c0",
            number,
            0,
        )
    assert [e["state"] for e in told.events] == ["delivered", "successful"]
    with pytest.raises(Reject):
        line(6, kind="sleep")
    assert Profile().sleeps is False
