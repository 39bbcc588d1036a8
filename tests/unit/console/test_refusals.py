"""The views of refusals: what they show, where the bytes come from, and that Kafka is read only while somebody looks."""

import asyncio
from types import SimpleNamespace

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from console_support import body

from preservarium.clock import ManualClock
from preservarium.console import refusals as module
from preservarium.console.openapi import DOCUMENT
from preservarium.console.refusals import IDLE_S, SAMPLE_BYTES_MAX, RefusalsFollower, RefusalViews
from preservarium.operations import dlq
from preservarium.operations.refusals import Refusals
from preservarium.settings import Web

EVIL = "<script>alert(1)</script>"


def record(offset, at_us, **line):
    line = {"stage": "normalize", "code": "decode_failed", "message": EVIL, "device_id": "d/1", "last_seen": at_us, "topic": "iot_raw_data",
            "partition": 3, "offset": 7, "raw_partition": 3, "raw_offset": 7, "raw_index": 0, **line}  # fmt: skip
    return SimpleNamespace(partition=0, offset=offset, timestamp=at_us // 1_000, value=orjson.dumps(line))


@pytest.fixture
def stand():
    settings = SimpleNamespace(web=Web())
    return SimpleNamespace(clock=ManualClock(), live=lambda: settings, refusals=Refusals(), looked=0)


@pytest.fixture
async def client(stand):
    def asked():
        stand.looked += 1

    application = web.Application()
    RefusalViews(stand, stand.refusals, asked).mount(application)
    async with TestClient(TestServer(application)) as made:
        yield made


def read(stand, *records):
    stand.refusals.take(records)
    stand.refusals.ready.set()
    stand.refusals.trouble = ""


async def test_causes_and_the_newest_with_their_bytes(client, stand):
    now = stand.clock.now_us()
    read(
        stand,
        record(1, now, raw='{"t": 1'),
        record(2, now, code="value_range", stage="validate"),
        record(3, now, raw_b64="/wAB"),
    )
    found = await body(client, "/api/refusals")
    assert set(found) == set(DOCUMENT["components"]["schemas"]["Refusals"]["properties"])
    assert [(cause["stage"], cause["code"], cause["day"]) for cause in found["causes"]] == [("normalize", "decode_failed", 2), ("validate", "value_range", 1)]  # fmt: skip
    assert [refusal["id"] for refusal in found["refusals"]] == ["0:3", "0:2", "0:1"]
    assert [refusal["original"] for refusal in found["refusals"]] == [
        {"bytes": 3, "hex": "ff0001", "text": "\ufffd\u2400\x01", "cut": False}, None, {"bytes": 7, "hex": b'{"t": 1'.hex(), "text": '{"t": 1', "cut": False},
    ]  # fmt: skip
    assert found["refusals"][0]["message"] == EVIL
    assert (found["complete"], found["note"], stand.looked) == (True, None, 1)
    one = await body(client, "/api/refusals?device=d%2F1&code=decode_failed&limit=1")
    assert [refusal["id"] for refusal in one["refusals"]] == ["0:3"]
    more = await body(client, f"/api/refusals?device=d%2F1&code=decode_failed&limit=1&cursor={one['next_cursor']}")
    assert [refusal["id"] for refusal in more["refusals"]] == ["0:1"]
    assert (await body(client, "/api/refusals?cursor=WyJhIl0", 400))["status"] == 400


async def test_it_says_where_not_everything_is_shown(client, stand, monkeypatch):
    monkeypatch.setattr(module, "FIRST_S", 0.01)
    found = await body(client, "/api/refusals")
    assert (found["complete"], found["refusals"]) == (False, [])
    assert "are being read" in found["note"]
    read(stand)
    stand.refusals.cut = True
    assert "only the newest were read" in (await body(client, "/api/refusals"))["note"]
    stand.refusals.trouble = "Kafka: no broker answers"
    assert "no broker answers" in (await body(client, "/api/refusals"))["note"]


async def test_one_refusal_has_all_its_bytes_out_of_the_raw_topic_where_its_line_has_none(client, stand, monkeypatch):
    now = stand.clock.now_us()
    read(stand, record(1, now, raw="x" * 5_000), record(2, now, code="value_range"))
    listed = (await body(client, "/api/refusals"))["refusals"][1]["original"]
    assert (listed["bytes"], len(listed["hex"]), listed["cut"]) == (5_000, 2 * SAMPLE_BYTES_MAX, True)
    shown = await body(client, "/api/refusals/0:1")
    assert (shown["original"]["cut"], shown["original"]["text"]) == (False, "x" * 5_000)

    async def original(settings, letter):
        return b"\x01\x02" if letter.id == "0:2" else None

    async def letter(settings, identity):
        if identity == "0:9":
            raise dlq.NoSuchError("there is no error 0:9")
        if identity == "0:8":
            raise dlq.DlqError("Kafka cannot be reached: no broker answers")
        return dlq.Letter(identity, orjson.loads(record(7, now).value))

    monkeypatch.setattr(dlq, "original", original)
    monkeypatch.setattr(dlq, "letter", letter)
    assert (await body(client, "/api/refusals/0:2"))["original"]["hex"] == "0102"
    # Not kept in memory: Kafka has it, and has its bytes no more.
    assert (await body(client, "/api/refusals/0:7"))["original"] is None
    assert (await body(client, "/api/refusals/0:9", 404))["detail"] == "there is no error 0:9"
    assert "no broker answers" in (await body(client, "/api/refusals/0:8", 503))["detail"]


async def test_kafka_is_read_from_the_first_look_on_and_until_nobody_looks(stand, monkeypatch):
    reading, runs = asyncio.Event(), []

    async def follow(refusals, settings, *, now_us, stopped):
        runs.append(now_us)
        read(stand, record(len(runs), now_us))
        reading.set()
        while not stopped():
            await asyncio.sleep(0.01)
        reading.clear()

    monkeypatch.setattr(module, "follow", follow)
    follower = RefusalsFollower(stand.refusals, stand.live, stand.clock)
    await follower.start()
    try:
        await asyncio.sleep(0)
        assert runs == []
        follower.asked()
        async with asyncio.timeout(20):
            await reading.wait()
            assert follower.current
            stand.clock.advance(IDLE_S + 1)
            while stand.refusals.ready.is_set():
                await asyncio.sleep(0.01)
        assert stand.refusals.newest(limit=5) == ([], None)
        assert not follower.current
        follower.asked()
        async with asyncio.timeout(20):
            await reading.wait()
        assert len(runs) == 2
    finally:
        await follower.stop()


async def test_a_worker_that_nobody_looks_at_stops_at_once(stand):
    follower = RefusalsFollower(stand.refusals, stand.live, stand.clock)
    await follower.start()
    async with asyncio.timeout(10):
        await follower.stop()
