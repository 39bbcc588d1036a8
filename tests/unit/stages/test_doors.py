"""Payloads of text through every door: what they say is the same, whichever way they come (tests/cases/doors)."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from connector_fakes import MemoryPublisher
from record_fakes import RawRec

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.connectors.base import Limits, RawProducer
from preservarium.connectors.files import Columns, backfill
from preservarium.connectors.mqtt import patterns_of, sends_of
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.validation import Limits as QualityLimits
from preservarium.domain.quality.validation import new_state, validate
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.errors import Reject
from preservarium.settings import LiveSettings, Settings
from preservarium.streaming.records import parse_raw

NOW_US = 1_795_993_300_000_000
LIMITS = Limits(payload_bytes_max=100_000, record_bytes_max=1_000_000)
CASES = [
    orjson.loads(line) for line in (Path(__file__).parents[2] / "cases/doors/text.jsonl").read_bytes().splitlines()
]
DATATYPES: dict[str, Any] = {
    name: {"name": name, "rev": 1, "kind": kind, "unit": unit, **more}
    for name, kind, unit, more in (
        ("room_temp", "number", "°C", {"fail_span": {"min": -60, "max": 85}}),
        ("humidity", "number", "%", {"fail_span": {"min": 0, "max": 100}}),
        ("energy", "number", "kWh", {}),
        ("battery", "number", "V", {}),
        ("counter_x", "number", "", {}),
        ("serial", "text", "", {}),
        ("firmware", "text", "", {}),
    )
}
HOT: Any = {
    "name": "hot", "rev": 1, "component_type": "room_temp", "kind": "high", "severity": "major", "threshold": 40, "recipients": ["ops"],
}  # fmt: skip
TYPE: Any = {"name": "t", "rev": 1, "manufacturer": "m", "parser": "p"}
DEVICE: Any = {"device_id": "d1", "rev": 1, "type": "t", "enabled": True, "rules": {"hot": {}}}
FAR = QualityLimits(future_skew_us=10**15, store_failed=False, series_max=500)


def payload_of(case: dict[str, Any]) -> bytes:
    return bytes.fromhex(case["hex"]) if "hex" in case else case["text"].encode()


def held_to(case: dict[str, Any], value: bytes | None, key: bytes | None) -> None:
    """What stands on `iot_raw_data` becomes what the case says: normalized, validated, watched."""
    messages, errors = parse_raw(
        RawRec(value, key, timestamp=NOW_US // 1_000), topics.RAW.name, 0, payload_bytes_max=100_000
    )
    assert errors == []
    (raw,) = messages
    parser: Any = {"name": "p", "version": 1, "rev": 1, "status": "active", "hash": "h", **case["parser"]}
    compiled = compile_device(DEVICE, TYPE, {"source": {}, **parser}, DATATYPES.get)
    message, refused = normalize(raw, compiled, NOW_US)
    assert [r.code for r in refused] == case.get("refused", [])
    found: dict[str, Any] = {}
    for reading in message["readings"]:
        found.setdefault(reading["component_type"], []).append(reading.get("value", reading.get("value_text")))
        assert reading.get("flags", []) == case.get("flags", {}).get(reading["component_type"], [])
        if reading["component_type"] in case.get("units", {}):
            assert reading["unit"] == case["units"][reading["component_type"]]
    assert found == {name: one if isinstance(one, list) else [one] for name, one in case["expect"].items()}
    if "time" in case:
        assert message["timestamp"] == case["time"]
    line: dict[str, Any] = dict(message)
    outcome = validate(line, compile_checks(None, DATATYPES.get), new_state(), FAR)
    assert outcome.failures == []
    alarms = DeviceAlarms("d1")
    raised = alarms.observe(line, compile_rules(DEVICE, None, {"hot": HOT}.get, DATATYPES.get)).transitions
    if "alarms" in case:
        assert [t["rule"] for t in raised] == case["alarms"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_from_somebody_elses_producer(case):
    held_to(case, payload_of(case), b"d1")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_over_mqtt(case):
    (send,) = sends_of(
        patterns_of("devices/{device}/up"), "devices/d1/up", payload_of(case), LIMITS, "MQTT", lambda: NOW_US
    )
    held_to(case, send.value, send.key)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "application/octet-stream", "text/csv"])
async def test_over_http(case, content_type):
    publisher = MemoryPublisher()
    app = web.Application()
    app.add_routes(http.routes(publisher, LiveSettings(Settings()), ManualClock(NOW_US)))
    async with TestClient(TestServer(app)) as client:
        response = await client.post("/ingest?device=d1", data=payload_of(case), headers={"Content-Type": content_type})
        assert response.status == 202, await response.text()
    (send,) = publisher.sends
    held_to(case, send.value, send.key)


@pytest.mark.parametrize("case", [c for c in CASES if c["parser"]["kind"] == "json"], ids=lambda case: case["id"])
@pytest.mark.parametrize("encoding", [None, "utf-16"])
async def test_out_of_a_file_of_lines(case, encoding, tmp_path):
    path = tmp_path / "a.ndjson"
    text = payload_of(case).decode().strip("\r\n") + "\r\n"
    path.write_bytes(text.encode(encoding or "utf-8"))
    publisher = MemoryPublisher()
    columns = Columns(device_id="d1", encoding=encoding)
    totals = await backfill(path, "ndjson", columns, RawProducer(publisher, "files"), None, LIMITS, ManualClock(NOW_US))
    assert (totals.sent, totals.refused) == (1, 0), totals.examples
    (send,) = publisher.sends
    held_to(case, send.value, send.key)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
async def test_out_of_a_csv_file_text_stays_text(encoding, tmp_path):
    """F16 at the file's door: the parser is one of JSON objects there, and the datatypes say what the cells are."""
    path = tmp_path / "a.csv"
    text = "device;at;serial;firmware;room_temp;note\r\nd1;2026-11-30t00:01:54z;00123;1.10;21.50;Küche\r\nd1;1795996920.0;241408E4;2,0;1_000;x\r\n"
    path.write_bytes(text.encode(encoding))
    publisher = MemoryPublisher()
    columns = Columns(device="device", time="at", delimiter=";", encoding="cp1252" if encoding == "cp1252" else None)
    await backfill(path, "csv", columns, RawProducer(publisher, "files"), None, LIMITS, ManualClock(NOW_US))
    first, second = publisher.sends
    case: dict[str, Any] = {"parser": {"kind": "json"}}
    held_to(
        {
            **case,
            "expect": {"serial": "00123", "firmware": "1.10", "room_temp": 21.5, "note": "Küche"},
            "time": 1795996914000000,
        },
        first.value,
        first.key,
    )
    held_to(
        {**case, "expect": {"serial": "241408E4", "firmware": "2,0", "note": "x"}, "refused": ["value_type"]},
        second.value,
        second.key,
    )


def test_the_raw_topic_keeps_what_was_sent():
    """What a connector writes reads the same again: no digit and no NaN is lost on the way."""
    data = b'{"a":89490200001234567890,"b":NaN,"c":-Infinity,"d":[1e400,0.1],"e":"NaN 12345678901234567890"}'
    (send,) = sends_of(patterns_of("{device}"), "d1", data, LIMITS, "", lambda: NOW_US)
    (raw,), _ = parse_raw(RawRec(send.value, send.key), topics.RAW.name, 0, payload_bytes_max=100_000)
    payload = raw["payload"]
    assert (payload["a"], payload["e"]) == (89490200001234567890, "NaN 12345678901234567890")
    assert repr([payload["b"], payload["c"], *payload["d"]]) == "[nan, -inf, inf, 0.1]"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'\xef\xbb\xbf{"a":', "envelope_not_json"), (b'{"a":NaN,}', "envelope_not_json"), (b'{"a":nano}', "envelope_not_json"), (b'{"a":NaN,"b":"\xff"}', "envelope_not_utf8"), (b'{"a":"\xff"}\0', "envelope_not_utf8"),
        (b'{"a":1}\0{"b":2}', "envelope_not_utf8"), (b'{"a":NaN,"b":"\\ud800"}', "envelope_not_json"), (b'{"a":' + b"[" * 70 + b"NaN" + b"]" * 70 + b"}", "envelope_too_deep"), (b'{"a":NaN,"b":"\\u0000"}', "envelope_not_utf8"),
    ],
)  # fmt: skip
def test_what_is_forgiven_hides_no_other_fault(data, code):
    messages, errors = parse_raw(RawRec(data, b"d1"), topics.RAW.name, 0, payload_bytes_max=100_000)
    assert (messages, [e["code"] for e in errors]) == ([], [code])


def test_lines_have_their_marks_each():
    data = b'\xef\xbb\xbf{"room_temp":22}\r\n{"room_temp":NaN}\n\xef\xbb\xbf{"serial":89490200001234567890}\n\0'
    messages, errors = parse_raw(RawRec(data, b"d1"), topics.RAW.name, 0, payload_bytes_max=100_000)
    assert errors == []
    assert [m["raw_index"] for m in messages] == [0, 1, 2]
    assert messages[2]["payload"] == {"serial": 89490200001234567890}


def test_a_field_that_alone_is_not_finite_refuses_its_message_with_that_reason():
    messages, _ = parse_raw(RawRec(b'{"room_temp":NaN}', b"d1"), topics.RAW.name, 0, payload_bytes_max=100_000)
    parser: Any = {"name": "p", "version": 1, "rev": 1, "status": "active", "hash": "h", "kind": "json", "source": {}}
    with pytest.raises(Reject) as caught:
        normalize(messages[0], compile_device(DEVICE, TYPE, parser, DATATYPES.get), NOW_US)
    assert caught.value.code == "value_not_finite"
