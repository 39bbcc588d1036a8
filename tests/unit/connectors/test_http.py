"""POST /ingest: what is taken, what is refused, and what the sender is told."""

import asyncio
import gzip
import io
import json
import zlib
from base64 import b64encode
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from backports import zstd
from connector_fakes import MemoryPublisher, OurServer
from network_messages import CHIRPSTACK_V4, PAYLOAD, TTN

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.settings import Http, LiveSettings, Settings, load

NOW_US = 1_700_000_000_000_000


class Door:
    def __init__(self, live: LiveSettings | None = None, **settings: Any) -> None:
        self.publisher = MemoryPublisher()
        self.clock = ManualClock(NOW_US)
        self.live = live = live or LiveSettings(Settings(http=Http(**settings)))
        # Faust's application has aiohttp's own limit of 1 MiB; ours must not depend on it.
        app = web.Application()
        app.add_routes(http.routes(self.publisher, live, self.clock))
        self.client = TestClient(OurServer(app, live))

    async def post(self, path: str, data: Any = None, **kwargs: Any) -> tuple[int, Any]:
        if isinstance(data, dict | list):
            data, kwargs["headers"] = (
                json.dumps(data),
                {"Content-Type": "application/json", **kwargs.get("headers", {})},
            )
        if isinstance(data, str):
            data = data.encode()
        if isinstance(data, bytes) and len(data) > 1_000_000:
            data = io.BytesIO(data)  # aiohttp's client warns of larger ones
        async with self.client.post(path, data=data, **kwargs) as response:
            body = await response.text()
            self.headers = response.headers
            return response.status, json.loads(body) if response.content_type == "application/json" else body


@pytest.fixture
async def door():
    door = Door()
    async with door.client:
        yield door


ONE = {"device": "d1", "payload": {"t": 21.5}, "port": 2}


async def test_a_single_envelope(door):
    assert await door.post("/ingest", ONE) == (202, {"accepted": 1, "refused": [], "refused_count": 0})
    assert door.publisher.lines() == [
        {
            "device": "d1",
            "received_at": NOW_US,
            "connector": "http",
            "mode": "HTTP",
            "port": 2,
            "payload": {"t": 21.5},
        }
    ]
    assert [s.key for s in door.publisher.sends] == [b"d1"]


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain"])
async def test_curl_may_say_any_content_type(door, content_type):
    status, _ = await door.post("/ingest", json.dumps(ONE).encode(), headers={"Content-Type": content_type})
    assert status == 202


@pytest.mark.parametrize("content_type", ["application/json", "application/x-ndjson"])
async def test_an_array_and_lines_name_their_bad_members(door, content_type):
    items = [ONE, {"device": "d2"}, {"device": "d3", "payload_b64": "AQI="}, 7, {"device": "", "payload": 1}]
    if content_type == "application/json":
        body = json.dumps(items)
    else:
        body = "\n".join(map(json.dumps, items)) + "\n{torn\n"
    status, answer = await door.post("/ingest", body, headers={"Content-Type": content_type})
    assert (status, answer["accepted"]) == (202, 2)
    expected = [(1, "envelope_invalid"), (3, "envelope_invalid"), (4, "envelope_no_device")]
    if content_type != "application/json":
        expected.append((5, "envelope_not_json"))
    assert [(r["index"], r["code"]) for r in answer["refused"]] == expected
    assert answer["refused_count"] == len(expected)
    assert [line["device"] for line in door.publisher.lines()] == ["d1", "d3"]


async def test_lines_are_recognised_without_a_content_type_and_pretty_json_is_one_message(door):
    lines = "\n".join(json.dumps({**ONE, "device": f"d{i}"}) for i in range(3))
    assert (await door.post("/ingest", lines))[1]["accepted"] == 3
    assert (await door.post("/ingest", json.dumps(ONE, indent=2)))[1]["accepted"] == 1


async def test_the_query_names_the_device_and_the_body_is_the_payload(door):
    senml = [{"bn": "urn:dev:1", "n": "t", "v": 1}]
    assert (await door.post("/ingest?device=a&port=7&mode=LAB", senml))[0] == 202
    binary = {"Content-Type": "application/octet-stream"}
    assert (await door.post("/ingest?device=b", b"\x01\x02", headers=binary))[0] == 202
    ndjson = {"Content-Type": "application/x-ndjson"}
    assert (await door.post("/ingest?device=c", b'{"t":1}\n{"t":2}\n{torn', headers=ndjson))[1]["accepted"] == 2
    assert (await door.post("/ingest?device=d", b"21.5"))[0] == 202
    lines = door.publisher.lines()
    assert [(x["device"], x.get("payload", x.get("payload_b64"))) for x in lines] == [
        ("a", senml),
        ("b", "AQI="),
        ("c", {"t": 1}),
        ("c", {"t": 2}),
        ("d", b64encode(b"21.5").decode()),
    ]
    assert (lines[0]["port"], lines[0]["mode"]) == (7, "LAB")


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/ingest", b"", "envelope_not_json"),
        ("/ingest", b"{torn", "envelope_not_json"),
        ("/ingest", b"\xff\xfe", "envelope_not_utf8"),
        ("/ingest", b"[" * 3000, "envelope_too_deep"),
        ("/ingest?device=x", b"", "envelope_invalid"),
    ],
)
async def test_a_body_that_is_nothing_is_400_with_its_reason(door, path, body, code):
    status, answer = await door.post(path, body, headers={"Content-Type": "text/plain"})
    assert (status, answer["error"], door.publisher.sends) == (400, code, [])


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/ingest?device=x&port=abc", "envelope_invalid"),
        ("/ingest?device=x&port=999", "envelope_invalid"),
        ("/ingest?device=", "envelope_no_device"),
        ("/ingest?device=a%00b", "envelope_not_utf8"),
        ("/ingest", "envelope_invalid"),
    ],
)
async def test_where_nothing_can_be_taken_it_is_400_and_says_why(door, path, code):
    status, answer = await door.post(path, {"t": 1})
    assert (status, answer["accepted"], answer["refused"][0]["code"]) == (400, 0, code)


async def test_an_empty_array_is_no_fault(door):
    assert await door.post("/ingest", []) == (202, {"accepted": 0, "refused": [], "refused_count": 0})


async def test_web_hooks(door):
    assert (await door.post("/ingest/ttn", TTN))[1]["accepted"] == 1
    assert (await door.post("/ingest/chirpstack?event=up", CHIRPSTACK_V4))[1]["accepted"] == 1
    assert (await door.post("/ingest", TTN))[1]["accepted"] == 1
    join = {"end_device_ids": TTN["end_device_ids"], "join_accept": {}}
    assert await door.post("/ingest/ttn", join) == (
        202,
        {"accepted": 0, "refused": [], "refused_count": 0, "ignored": 1},
    )
    status, answer = await door.post("/ingest/ttn", {**TTN, "uplink_message": {"frm_payload": "A"}})
    assert (status, answer["refused"][0]["code"]) == (400, "envelope_invalid")
    lines = door.publisher.lines()
    assert [(x["device"], x["mode"], x["port"], x["payload_b64"]) for x in lines] == [
        ("0004A30B001C0530", "LoRaWAN", 2, b64encode(PAYLOAD).decode()),
        ("0101010101010101", "LoRaWAN", 1, b64encode(PAYLOAD).decode()),
        ("0004A30B001C0530", "LoRaWAN", 2, b64encode(PAYLOAD).decode()),
    ]
    assert lines[0]["meta"]["time"] == 1_707_750_945_787_654


async def test_the_token_is_asked_for():
    door = Door(token="s3cret-ü")
    async with door.client:
        assert (await door.post("/ingest", ONE))[0] == 401
        assert door.headers["WWW-Authenticate"] == "Bearer"
        assert (await door.post("/ingest", ONE, headers={"Authorization": "Bearer wrong"}))[0] == 401
        assert (await door.post("/ingest/ttn", TTN, headers={"Authorization": "Basic s3cret"}))[0] == 401
        assert (await door.post("/ingest", ONE, headers={"Authorization": "Bearer s3cret-ü"}))[0] == 202


async def test_a_large_body_is_refused_whether_announced_streamed_or_compressed():
    door = Door(body_bytes_max=2_000_000)
    fits, over = {"device": "d", "payload": "x" * 200_000}, b" " * 2_000_001

    async def dripping():
        for _ in range(21):
            yield b" " * 100_000

    async with door.client:
        assert (await door.post("/ingest", [fits] * 9))[1]["accepted"] == 9  # 1.8 MB: over aiohttp's own limit
        assert (await door.post("/ingest", over))[0] == 413
        assert (await door.post("/ingest", dripping()))[0] == 413
        bomb = gzip.compress(b" " * 50_000_000)
        assert (await door.post("/ingest", bomb, headers={"Content-Encoding": "gzip"}))[0] == 413
        packed = gzip.compress(json.dumps(ONE).encode())
        assert (await door.post("/ingest", packed, headers={"Content-Encoding": "gzip"}))[0] == 202
        assert (await door.post("/ingest", b"no gzip", headers={"Content-Encoding": "gzip"}))[0] == 400


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "zstd"])
async def test_a_torn_body_is_refused_as_a_whole(door, encoding):
    lines = b"\n".join(json.dumps({**ONE, "device": f"d{n}"}).encode() for n in range(400))
    packed = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}[encoding](lines)
    headers = {"Content-Encoding": encoding, "Content-Type": "application/x-ndjson"}
    for torn in (packed[: len(packed) // 2], packed[:-1], packed[:-4], packed + b"\0", b""):
        status, answer = await door.post("/ingest", torn, headers=headers)
        assert (status, answer["error"]) == (400, "envelope_invalid")
        assert encoding in answer["message"] or "behind the end" in answer["message"]
    assert door.publisher.sends == []
    assert (await door.post("/ingest", packed, headers=headers))[1]["accepted"] == 400


async def test_a_damaged_body_is_refused_as_a_whole(door):
    packed = bytearray(gzip.compress(json.dumps(ONE).encode()))
    packed[-6] ^= 1  # of the checksum
    status, answer = await door.post("/ingest", bytes(packed), headers={"Content-Encoding": "gzip"})
    assert (status, answer["error"], door.publisher.sends) == (400, "envelope_invalid", [])


@pytest.mark.parametrize("encoding", ["br", "compress", "gzip, br", "gzip, gzip", "x-unknown", "gzip;q=1"])
@pytest.mark.parametrize("path", ["/ingest", "/ingest/ttn", "/ingest/chirpstack", "/ingest?device=d"])
async def test_an_encoding_that_is_not_understood_is_415_and_nothing_in_the_log(door, encoding, path, caplog, capsys):
    status, answer = await door.post(path, b"anything", headers={"Content-Encoding": encoding})
    assert (status, answer["error"]) == (415, "unsupported_encoding")
    assert encoding in answer["message"]
    assert door.headers["Accept-Encoding"] == "gzip, deflate, zstd"
    assert (caplog.records, capsys.readouterr().out) == ([], "")


@pytest.mark.parametrize("encoding", ["", "identity", "GZIP", "x-gzip", "identity, gzip"])
async def test_encodings_are_read_as_http_writes_them(door, encoding):
    body = json.dumps(ONE).encode()
    packed = gzip.compress(body) if "gzip" in encoding.lower() else body
    assert (await door.post("/ingest", packed, headers={"Content-Encoding": encoding}))[0] == 202


SEQUENCE = {"Content-Type": "application/json-seq"}


async def test_a_json_text_sequence_has_texts_of_many_lines(door):
    texts = [json.dumps({**ONE, "device": f"d{n}"}, indent=n or None) for n in range(3)]
    body = "".join(f"\x1e{text}\n" for text in texts)
    assert (await door.post("/ingest", body, headers=SEQUENCE))[1]["accepted"] == 3
    # Separators in a row are one; a text that says where it ends may lack its line feed.
    assert (await door.post("/ingest", f"\x1e\x1e\n\x1e{texts[0]}\x1e{texts[1]}", headers=SEQUENCE))[1]["accepted"] == 2
    assert [line["device"] for line in door.publisher.lines()] == ["d0", "d1", "d2", "d0", "d1"]


async def test_of_a_sequence_what_is_torn_is_refused_and_its_neighbours_are_taken(door):
    one = json.dumps(ONE)
    body = f"{one}\n\x1e{one}\n\x1e{one[:20]}\x1e{one}\n\x1etrue"
    status, answer = await door.post("/ingest", body, headers=SEQUENCE)
    assert (status, answer["accepted"]) == (202, 2)
    assert [(r["index"], r["code"]) for r in answer["refused"]] == [(n, "envelope_not_json") for n in (0, 2, 4)]
    assert "record separator" in answer["refused"][0]["message"]
    assert "torn" in answer["refused"][2]["message"]


async def test_a_sequence_of_payloads_of_one_device(door):
    status, answer = await door.post("/ingest?device=d", b'\x1e{"t":\n1}\n\x1e21\n\x1e22', headers=SEQUENCE)
    assert (status, answer["accepted"], answer["refused_count"]) == (202, 2, 1)
    assert [line["payload"] for line in door.publisher.lines()] == [{"t": 1}, 21]


#: What a browser sends for a page of another origin: a form, a beacon, a script, an image.
STRANGERS = [
    {"Origin": "http://evil.example", "Content-Type": "text/plain"},
    {"Origin": "http://evil.example", "Content-Type": "application/x-www-form-urlencoded"},
    {"Origin": "http://evil.example", "Content-Type": "multipart/form-data; boundary=x"},
    {"Origin": "http://evil.example", "Content-Type": "application/json"},
    {"Origin": "null", "Content-Type": "text/plain"},
    {"Origin": "http://127.0.0.1:3000", "Content-Type": "application/json"},
    {"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"},
    {"Sec-Fetch-Site": "same-site", "Content-Type": "application/octet-stream"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
]


@pytest.mark.parametrize("headers", STRANGERS, ids=str)
@pytest.mark.parametrize("path", ["/ingest", "/ingest?device=d", "/ingest/ttn", "/ingest/chirpstack"])
async def test_without_a_token_what_a_browser_sends_for_strangers_is_refused(door, headers, path):
    status, answer = await door.post(path, json.dumps(ONE), headers=headers)
    assert (status, answer["error"], door.publisher.sends) == (403, "forbidden", [])
    assert "PRESERVARIUM_HTTP__TOKEN" in answer["message"]


async def test_a_page_of_our_own_may_send_json_but_no_form(door):
    own = str(door.client.make_url("/")).rstrip("/")
    headers = {"Origin": own, "Sec-Fetch-Site": "same-origin"}
    assert (await door.post("/ingest", ONE, headers=headers))[0] == 202
    assert (await door.post("/ingest", json.dumps(ONE), headers={**headers, "Content-Type": "text/plain"}))[0] == 403


async def test_with_a_token_no_page_can_send_what_it_does_not_know():
    door = Door(token="s3cret")
    async with door.client:
        for headers in STRANGERS:
            assert (await door.post("/ingest", json.dumps(ONE), headers=headers))[0] == 401
        # A browser asks before it sends the token, and is not let in then; a program may say what it likes.
        shown = {**STRANGERS[0], "Authorization": "Bearer s3cret"}
        assert (await door.post("/ingest", json.dumps(ONE), headers=shown))[0] == 202


async def test_a_token_is_changed_without_a_restart(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("first\n")
    monkeypatch.setenv("PRESERVARIUM_HTTP__TOKEN_FILE", str(file))
    door = Door(live=LiveSettings(load()))
    async with door.client:
        assert (await door.post("/ingest", ONE, headers={"Authorization": "Bearer first"}))[0] == 202
        file.write_text("second\n")
        (change,) = door.live.reload()
        assert (change.variable, change.applied, "first" in change.old) == ("PRESERVARIUM_HTTP__TOKEN", True, False)
        assert (await door.post("/ingest", ONE, headers={"Authorization": "Bearer first"}))[0] == 401
        assert (await door.post("/ingest", ONE, headers={"Authorization": "Bearer second"}))[0] == 202


@pytest.mark.parametrize("given", [b"Bearer \xff\xfe", b"Bearer", b"", b"bearer  s3cret ", b"\xc3", b"Basic s3cret"])
async def test_any_bytes_for_a_token_are_right_or_wrong_and_no_fault(given):
    door = Door(token="s3cret")
    async with door.client:
        reader, writer = await asyncio.open_connection(door.client.host, door.client.port)
        writer.write(
            b"POST /ingest HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nAuthorization: " + given + b"\r\n\r\n[]"
        )
        assert (await reader.readline()).split()[1] == (
            b"202" if given.strip().endswith(b"s3cret") and b"earer" in given else b"401"
        )
        writer.close()


async def test_a_payload_over_the_limit_is_refused_alone(door):
    status, answer = await door.post("/ingest", [ONE, {"device": "d2", "payload": "x" * 300_000}])
    assert (status, answer["accepted"], answer["refused"][0]["code"]) == (202, 1, "envelope_too_large")


async def test_more_messages_than_a_request_may_have(door):
    status, answer = await door.post(
        "/ingest?device=d", b"{}\n" * 20_001, headers={"Content-Type": "application/x-ndjson"}
    )
    assert (status, answer["error"], door.publisher.sends) == (413, "too_many_messages", [])


async def test_requests_over_the_limit_are_429_and_the_others_wait_for_kafka():
    door = Door(inflight_max=2)
    door.publisher.gate.clear()
    async with door.client:
        under_way = [asyncio.create_task(door.post("/ingest", ONE)) for _ in range(2)]
        while not door.publisher.calls:
            await asyncio.sleep(0.001)
        status, _ = await door.post("/ingest", ONE)
        assert (status, door.headers["Retry-After"]) == (429, "5")
        assert not any(task.done() for task in under_way)
        door.publisher.gate.set()
        assert [status for status, _ in await asyncio.gather(*under_way)] == [202, 202]
        assert (await door.post("/ingest", ONE))[0] == 202


async def test_503_where_kafka_does_not_acknowledge(door):
    door.publisher.failures = 1
    status, answer = await door.post("/ingest", ONE)
    assert (status, answer["error"], door.headers["Retry-After"]) == (503, "unavailable", "5")
    assert (await door.post("/ingest", ONE))[0] == 202


async def test_a_body_that_does_not_come_is_given_up(monkeypatch):
    monkeypatch.setattr(http, "BODY_TIMEOUT_S", 0.05)
    door = Door()
    forever = asyncio.Event()

    async def body():
        yield b"{"
        await forever.wait()

    async with door.client:
        assert (await door.post("/ingest", body()))[0] == 408
    assert door.publisher.lines(topics.RAW) == []


async def test_what_a_network_server_says_of_our_downlink_is_a_report(door):
    downlink = "0123456789abcdef0123456789abcdef"
    event = {"deviceInfo": {"devEui": "e1"}, "queueItemId": downlink, "acknowledged": True}
    assert (await door.post("/ingest/chirpstack?event=ack", event))[0] == 202
    (send,) = door.publisher.sends
    line = json.loads(send.value)
    assert (send.topic, send.key) == (topics.COMMANDS, b"e1")
    assert (line["kind"], line["report"], line["downlink_id"]) == ("report", "acknowledged", downlink)


async def test_an_event_without_a_payload_is_taken_and_left_out(door):
    join = {"end_device_ids": TTN["end_device_ids"], "join_accept": {}}
    empty = {name: value for name, value in CHIRPSTACK_V4.items() if name not in {"data", "fPort"}}
    for path, event in (("/ingest", join), ("/ingest", empty), ("/ingest/ttn", join), ("/ingest/chirpstack", empty)):
        answer = {"accepted": 0, "refused": [], "refused_count": 0, "ignored": 1}
        assert await door.post(path, event) == (202, answer)
    status, answer = await door.post("/ingest", [join, TTN, empty, ONE])
    assert (status, answer["accepted"], answer["ignored"]) == (202, 2, 2)
    assert [s.key for s in door.publisher.sends] == [b"0004a30b001c0530", b"d1"]


async def test_received_at_of_an_envelope_becomes_the_networks_time_however_it_is_written(door):
    for given, us in ((1_700_000_000, 1_700_000_000_000_000), ("2023-11-14T22:13:20.5z", 1_700_000_000_500_000)):
        assert (await door.post("/ingest", {**ONE, "received_at": given}))[0] == 202
        line = door.publisher.lines()[-1]
        assert (line["received_at"], line["meta"]) == (NOW_US, {"time": us})
    status, answer = await door.post("/ingest", {**ONE, "received_at": "soon"})
    assert (status, answer["refused"][0]["code"]) == (400, "timestamp_invalid")
