"""InfluxDB's write API: points of line protocol over HTTP, as its clients send them."""

import base64
import gzip
import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from connector_fakes import MemoryPublisher, OurServer
from hypothesis import given
from hypothesis import strategies as st

from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.domain.decoders.base import PartRefused
from preservarium.domain.decoders.influx import Point, compile_parser, points
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.errors import Reject
from preservarium.settings import Connector, Http, LiveSettings, Settings

NOW_US = 1_795_993_300_000_000
AT_US = 1_795_200_000_123_456


class Door:
    def __init__(self, connector: dict[str, Any] | None = None, **settings: Any) -> None:
        self.publisher = MemoryPublisher()
        live = LiveSettings(Settings(http=Http(**settings), connector=Connector(**connector or {})))
        app = web.Application()
        app.add_routes(http.routes(self.publisher, live, ManualClock(NOW_US)))
        self.client = TestClient(OurServer(app, live))

    async def write(self, path: str, body: str | bytes, **headers: str) -> tuple[int, Any]:
        data = body.encode() if isinstance(body, str) else body
        async with self.client.post(path, data=data, headers={"Content-Type": "text/plain", **headers}) as response:
            text = await response.text()
            self.headers = response.headers
            return response.status, json.loads(text) if text else None


@pytest.fixture
async def door():
    door = Door()
    async with door.client:
        yield door


BATCH = f"""cpu,host=web-1,cpu=cpu0 usage_idle=91.5,usage_user=3i {AT_US}000
cpu,host=web-2 usage_idle=81.5 {AT_US}000
# a comment

mem,host=web-1 used=5i,note="two\\"words
and a line" {AT_US}001
"""


@pytest.mark.parametrize(
    "path",
    [
        "/write?db=machines",
        "/api/v2/write?bucket=machines&org=x&precision=ns",
        "/write?db=machines&rp=autogen&precision=n",
    ],
)
async def test_a_batch_is_a_message_a_device_in_order(door, path):
    status, body = await door.write(path, BATCH)
    assert (status, body) == (204, None)
    first, second = door.publisher.lines()
    assert (first["device"], first["mode"], first.get("meta")) == ("web-1", "machines", None)
    assert first["payload"].split("\n", 1)[0] == BATCH.split("\n")[0]
    assert first["payload"].endswith(f'and a line" {AT_US}001')
    assert (second["device"], second["payload"]) == ("web-2", BATCH.split("\n")[1])


@pytest.mark.parametrize(
    ("spelled", "stamp"),
    [
        ("s", AT_US // 10**6),
        ("ms", AT_US // 1000),
        ("us", AT_US),
        ("u", AT_US),
        ("ns", AT_US * 1000),
        ("", AT_US * 1000),
    ],
)
async def test_the_precision_of_the_request_goes_with_the_message(door, spelled, stamp):
    assert (await door.write(f"/write?db=d&precision={spelled}", f"m,host=a v=1 {stamp}"))[0] == 204
    (line,) = door.publisher.lines()
    message, _ = normalize(raw(line), compiled(), 0)
    rounding = {"s": 10**6, "ms": 10**3}.get(spelled, 1)
    assert message["timestamp"] == AT_US // rounding * rounding
    assert [(r["component_type"], r["value"]) for r in message["readings"]] == [("m_v", 1)]


@pytest.mark.parametrize("precision", ["h", "m", "year", "%00"])
async def test_a_precision_that_is_none_is_refused(door, precision):
    status, body = await door.write(f"/write?db=d&precision={precision}", "m,host=a v=1")
    assert (status, "precision is one of" in body["message"], door.publisher.sends) == (400, True, [])


async def test_lines_that_are_none_are_a_partial_write(door):
    status, body = await door.write("/write?db=d", "m,host=a v=1\nno line\nm v=2\nm,host=b v=3\n")
    assert status == 400
    assert body["error"] == body["message"]
    assert body["error"].startswith("partial write: line 2:")
    assert body["error"].endswith("dropped=2")
    assert [line["device"] for line in door.publisher.lines()] == ["a", "b"]
    status, body = await door.write("/write?db=d", "m v=2")
    assert status == 400
    assert body["error"].startswith("unable to parse: none of the tags device,device_id,host names the device")


@pytest.mark.parametrize("body", ["", "\n\n", "# nothing\n"])
async def test_nothing_is_no_fault(door, body):
    assert (await door.write("/write?db=d", body))[0] == 204
    assert door.publisher.sends == []


async def test_packed_and_damaged_bodies(door):
    packed = gzip.compress(BATCH.encode())
    assert (await door.write("/write?db=d", packed, **{"Content-Encoding": "gzip"}))[0] == 204
    assert (await door.write("/write?db=d", packed[:-5], **{"Content-Encoding": "gzip"}))[0] == 400
    assert (await door.write("/write?db=d", b"m,host=\xff v=1"))[0] == 400


@pytest.mark.parametrize(
    ("rule", "device"),
    [("rack,{site}-{host}", "north-a"), ("host", "a"), ("{measurement}", "m"), ("sensor.id,site", "north")],
)
async def test_the_rule_says_which_tag_names_the_device(rule, device):
    door = Door({"device_tags": rule})
    async with door.client:
        assert (await door.write("/write?db=d", "m,site=north,host=a v=1"))[0] == 204
        assert [line["device"] for line in door.publisher.lines()] == [device]


BASIC = base64.b64encode(b"anybody:s3cret").decode()


@pytest.mark.parametrize(
    ("query", "headers", "status"),
    [
        ("", {}, 401), ("", {"Authorization": "Token s3cret"}, 204), ("", {"Authorization": "Token anybody:s3cret"}, 204), ("", {"Authorization": "Bearer s3cret"}, 204),
        ("", {"Authorization": f"Basic {BASIC}"}, 204), ("&u=anybody&p=s3cret", {}, 204), ("&u=anybody&p=wrong", {}, 401), ("", {"Authorization": "Token wrong"}, 401),
        ("", {"Authorization": "Basic s3cret"}, 401), ("", {"Authorization": "Basic"}, 401), ("&p=s3cret", {"Authorization": "Bearer wrong"}, 401),
    ],
)  # fmt: skip
async def test_the_token_as_influxdbs_clients_show_it(query, headers, status):
    door = Door(token="s3cret")
    async with door.client:
        assert (await door.write(f"/write?db=d{query}", "m,host=a v=1", **headers))[0] == status
        assert (await door.client.get(f"/ping?x=1{query}", headers=headers)).status == status
        # At /ingest the password of a query opens nothing.
        if query:
            assert (await door.client.post(f"/ingest?x=1{query}", json={"device": "d", "payload": 1})).status == 401


async def test_what_clients_ask_at_their_start(door):
    assert (await door.client.get("/ping")).status == 204
    async with door.client.post("/query?q=CREATE%20DATABASE%20%22telegraf%22") as response:
        assert (response.status, await response.json()) == (200, {"results": [{"statement_id": 0}]})
    async with door.client.post("/query", data={"q": 'CREATE DATABASE "telegraf"'}) as response:
        assert response.status == 200
    for query in ("SELECT * FROM cpu", "", "DROP DATABASE x"):
        assert (await door.client.get("/query", params={"q": query})).status == 400
    assert (await door.client.post("/query", data={"q": "x" * 5_000})).status == 413


async def test_many_points_of_a_device_are_several_messages_and_none_is_lost():
    door = Door(body_bytes_max=2_000_000)
    async with door.client:
        lines = [f'm,host=a text="{"x" * 300}",v={i}i {AT_US + i}000' for i in range(2_500)]
        assert (await door.write("/write?db=d", "\n".join(lines)))[0] == 204
        sent = door.publisher.lines()
        assert len(sent) > 2
        assert [line for one in sent for line in one["payload"].split("\n")] == lines


async def test_503_where_kafka_does_not_acknowledge(door):
    door.publisher.failures = 1
    assert (await door.write("/write?db=d", "m,host=a v=1"))[0] == 503
    assert (await door.write("/write?db=d", "m,host=a v=1"))[0] == 204


async def test_pages_of_strangers_are_refused_without_a_token(door):
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert (await door.write("/write?db=d", "m,host=a v=1", **headers))[0] == 403
    assert door.publisher.sends == []


# --- points ------------------------------------------------------------------------------------------------------------


def raw(line: Any) -> Any:
    return {
        "port": None,
        "meta": {},
        "experiment_id": None,
        "topic": "",
        "raw_partition": 0,
        "raw_offset": 0,
        "raw_index": 0,
        "generation": 0,
        **line,
    }


def compiled() -> Any:
    device: Any = {"device_id": "a", "rev": 1, "type": "t", "enabled": True}
    doc: Any = {"name": "p", "version": 1, "rev": 1, "kind": "influx", "status": "active", "hash": "h", "source": {}}
    return compile_device(device, {"name": "t", "rev": 1, "manufacturer": "m", "parser": "p"}, doc, lambda name: None)


def test_points_say_their_tags_as_they_are_written():
    text = 'my\\ meas,ta\\,g=a\\=b,host=x\\ y v="a,b c" 5'
    assert list(points(text)) == [Point("my meas", {"ta,g": "a=b", "host": "x y"}, text)]


@given(st.lists(st.one_of(
    st.sampled_from(["m,host=a v=1", "m v=1i,w=t 5", 'm,t=x s="a\\"b" 7', 'm s="open', "broken", "# c", "", " ", 'm s="two\nlines"', 'm,host=a v="x" 5 6']),
    st.text("m,=\"\\ \n#v1ti-", max_size=12),
), max_size=8))  # fmt: skip
def test_the_points_of_a_text_are_those_that_the_decoder_reads(given_lines):
    text = "\n".join(given_lines)
    decoder = compile_parser({"kind": "influx", "source": {}})

    def decoded(payload: str) -> list[Any]:
        try:
            return list(decoder.decode(raw({"payload": payload, "meta": {}})))
        except Reject:
            return []

    whole = [f for f in decoded(text) if not isinstance(f, Reject)]
    found = list(points(text))
    alone = [f for p in found if isinstance(p, Point) for f in decoded(p.text) if not isinstance(f, Reject)]
    assert alone == whole
    assert all(isinstance(p, Point | PartRefused) for p in found)
