"""What the field's platforms publish, taken out of their envelopes (tests/cases/envelopes): over MQTT, over HTTP, by shape and by name."""

from base64 import b64decode
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from connector_fakes import MemoryPublisher

from preservarium.clock import ManualClock
from preservarium.connectors import http
from preservarium.connectors.base import Limits, formats_in
from preservarium.connectors.envelopes import FORMATS, formats_of
from preservarium.connectors.mqtt import patterns_of, sends_of
from preservarium.errors import ReasonCode, Reject
from preservarium.settings import Connector, LiveSettings, Settings, SettingsError

NOW_US = 1_795_993_300_000_000
LIMITS = Limits(payload_bytes_max=100_000, record_bytes_max=1_000_000)
CASES = [
    orjson.loads(line)
    for line in (Path(__file__).parents[2] / "cases/envelopes/published.jsonl").read_bytes().splitlines()
]
BY_TOPIC = [case for case in CASES if "topic" in case]
BY_HTTP = [case for case in CASES if "topic" not in case]


def data_of(case: dict[str, Any]) -> bytes:
    if "hex" in case:
        return bytes.fromhex(case["hex"])
    return case["text"].encode() if "text" in case else orjson.dumps(case["message"])


def held_to(case: dict[str, Any], values: list[bytes], mode: str) -> None:
    lines = [orjson.loads(value) for value in values]
    assert len(lines) == len(case["expect"]), lines
    for line, expected in zip(lines, case["expect"], strict=True):
        assert line["device"] == expected["device"]
        if "hex" in expected:
            assert b64decode(line["payload_b64"]).hex() == expected["hex"]
        else:
            assert line["payload"] == expected["payload"]
        assert line.get("port") == expected.get("port")
        assert line["mode"] == expected.get("mode", mode)
        assert line.get("meta", {}) == expected["meta"]


def test_every_format_has_cases_that_are_taken_left_out_and_refused():
    named = {case["id"].partition("/")[0] for case in CASES}
    assert named == set(FORMATS)
    assert any(case["expect"] == [] for case in CASES)
    assert {case["expect"] for case in CASES if isinstance(case["expect"], str)} == {
        "envelope_invalid",
        "envelope_no_device",
    }


@pytest.mark.parametrize("case", BY_TOPIC, ids=lambda case: case["id"])
def test_over_mqtt(case):
    formats = formats_of(case["format"]) if case.get("only") == "format" else None

    def sent() -> list[bytes]:
        patterns = patterns_of(case["pattern"])
        sends = sends_of(patterns, case["topic"], data_of(case), LIMITS, "MQTT", lambda: NOW_US, formats)
        return [send.value or b"" for send in sends]

    if isinstance(case["expect"], str):
        with pytest.raises(Reject) as caught:
            sent()
        assert caught.value.code == case["expect"]
    else:
        held_to(case, sent(), "MQTT")


class Door:
    def __init__(self, **connector: Any) -> None:
        self.publisher = MemoryPublisher()
        app = web.Application()
        live = LiveSettings(Settings(connector=Connector(**connector)))
        app.add_routes(http.routes(self.publisher, live, ManualClock(NOW_US)))
        self.client = TestClient(TestServer(app))

    async def post(self, path: str, data: bytes) -> tuple[int, Any, list[bytes]]:
        before = len(self.publisher.sends)
        async with self.client.post(path, data=data, headers={"Content-Type": "application/json"}) as response:
            return response.status, await response.json(), [s.value or b"" for s in self.publisher.sends[before:]]


@pytest.mark.parametrize("name", sorted({case["format"] for case in BY_HTTP}))
async def test_over_http_by_shape_and_by_name(name):
    door = Door()
    async with door.client:
        for case in (case for case in BY_HTTP if case["format"] == name):
            for path in ("/ingest", f"/ingest/{name}")[case.get("only") == "format" :]:
                status, answer, values = await door.post(path, data_of(case))
                if isinstance(case["expect"], str):
                    assert (status, answer["refused"][0]["code"]) == (400, case["expect"]), (case["id"], path)
                    continue
                assert status == 202, (case["id"], path, answer)
                assert answer.get("ignored", 0) == (not case["expect"]), (case["id"], path)
                held_to(case, values, "HTTP")


async def test_several_in_an_array_are_each_what_they_are():
    ttn = next(case for case in CASES if case["id"] == "ttn/capital DevEUI")["message"]
    loriot = next(case for case in CASES if case["id"] == "loriot/rx")["message"]
    join = {"end_device_ids": {"dev_eui": "70b3d57ed005b89b"}, "join_accept": {}}
    door = Door()
    async with door.client:
        body = orjson.dumps([ttn, join, {"device": "d1", "payload": 1}, loriot, {"nothing": 1}])
        status, answer, values = await door.post("/ingest", body)
        assert (status, answer["accepted"], answer["ignored"], answer["refused_count"]) == (202, 3, 1, 1)
        assert [orjson.loads(v)["device"] for v in values] == ["70B3D57ED005B89B", "d1", "0004A30B0021D2A1"]
        # Over MQTT the same, but that one without an envelope refuses the message.
        sends = sends_of(patterns_of("#"), "x", orjson.dumps([ttn, join, loriot]), LIMITS, "", lambda: NOW_US)
        assert [s.key for s in sends] == [b"70b3d57ed005b89b", b"0004a30b0021d2a1"]
        with pytest.raises(Reject, match="neither in a platform's envelope nor in ours"):
            sends_of(patterns_of("#"), "x", body, LIMITS, "", lambda: NOW_US)


async def test_by_the_name_of_a_platform_nothing_else_is_taken():
    door = Door()
    async with door.client:
        for body in (b'{"temperature": 21}', b"5", b'"text"', b"[[]]", b'{"device": "d1", "payload": 1}'):
            status, answer, values = await door.post("/ingest/ttn", body)
            assert (status, answer["refused"][0]["code"], values) == (400, "envelope_invalid", [])
            assert "The Things Stack" in answer["refused"][0]["message"]
        assert (await door.client.post("/ingest/nobody", data=b"{}")).status in (404, 405)


async def test_the_setting_says_which_envelopes_are_looked_for():
    ttn, loriot = (next(c for c in CASES if c["id"] == i)["message"] for i in ("ttn/capital DevEUI", "loriot/rx"))
    door = Door(format="loriot, chirpstack")
    async with door.client:
        assert (await door.post("/ingest", orjson.dumps(loriot)))[0] == 202
        assert (await door.post("/ingest", orjson.dumps(ttn)))[0] == 400
        # By its name it is taken all the same.
        assert (await door.post("/ingest/ttn", orjson.dumps(ttn)))[0] == 202
    only = Door(format="loriot")
    async with only.client:
        assert (await only.post("/ingest", b'{"device": "d1", "payload": 1}'))[0] == 202
        status, answer, _ = await only.post("/ingest", orjson.dumps(ttn))
        assert (status, answer["refused"][0]["code"]) == (400, "envelope_invalid")
        assert "LORIOT" in answer["refused"][0]["message"]


@pytest.mark.parametrize(
    "wrong", [{"format": "tnt"}, {"device_tags": "{"}, {"device_tags": ""}, {"device_tags": "{a}b}"}]
)
def test_a_setting_that_is_none_is_told_at_the_start(wrong):
    with pytest.raises(SettingsError, match="PRESERVARIUM_CONNECTOR__"):
        formats_in(Settings(connector=Connector(**wrong)))


async def test_event_grid_hears_its_code_back():
    asked = [
        {
            "id": "1",
            "eventType": "Microsoft.EventGrid.SubscriptionValidationEvent",
            "data": {"validationCode": "512d38b6"},
        }
    ]
    door = Door()
    async with door.client:
        status, answer, values = await door.post("/ingest/azure_iot", orjson.dumps(asked))
        assert (status, answer, values) == (200, {"validationResponse": "512d38b6"}, [])


async def test_a_rule_names_the_device_of_metrics():
    metric = {"fields": {"v": 1}, "name": "cpu", "tags": {"site": "north", "host": "a"}, "timestamp": 1_795_200_000}
    for rule, device in (("rack,{site}-{host}", "north-a"), ("host", "a"), ("{measurement}@{site}", "cpu@north")):
        door = Door(device_tags=rule)
        async with door.client:
            _, _, (value,) = await door.post("/ingest", orjson.dumps(metric))
            assert orjson.loads(value)["device"] == device


def test_an_envelope_of_too_many_messages_is_refused():
    tags = {f"AABBCC{i:06X}": {"rssi": -1, "data": "00"} for i in range(5_001)}
    with pytest.raises(Reject) as caught:
        formats_of("auto").read({"data": {"gw_mac": "x", "tags": tags}})
    assert caught.value.code is ReasonCode.ENVELOPE_TOO_LARGE
