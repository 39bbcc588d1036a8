"""Network servers' uplinks, and instants as strangers write them."""

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from network_messages import CHIRPSTACK_V3, CHIRPSTACK_V4, PAYLOAD, TTN

from preservarium.connectors.base import Limits
from preservarium.connectors.envelopes import FORMATS as EVERY
from preservarium.connectors.envelopes import formats_of
from preservarium.connectors.envelopes.chirpstack import from_protobuf
from preservarium.connectors.envelopes.chirpstack import uplink as chirpstack
from preservarium.connectors.envelopes.things_stack import uplink as ttn
from preservarium.connectors.mqtt import patterns_of, sends_of
from preservarium.domain.readings.instant import required_instant_us as instant_us
from preservarium.errors import ReasonCode, Reject
from preservarium.streaming.records import raw_line

NOW_US = 1_700_000_000_000_000
LIMITS = Limits(payload_bytes_max=10_000, record_bytes_max=100_000)
FORMATS = formats_of("auto")


def test_the_things_stack():
    uplink = ttn(TTN)
    assert uplink is not None
    assert (uplink.device, uplink.payload, uplink.port, uplink.mode) == ("0004A30B001C0530", PAYLOAD, 2, "LoRaWAN")
    assert uplink.meta == {
        "network": "ttn",
        "rssi": -42,
        "snr": 7.5,
        "gateway": "near",
        "gateways": 2,
        "time": 1_707_750_945_787_654,
        "f_cnt": 39,
        "sf": 7,
        "frequency": 868_300_000,
        "name": "soil-1",
        "application": "farm",
    }


def test_chirpstack_4():
    uplink = chirpstack(CHIRPSTACK_V4)
    assert uplink is not None
    assert (uplink.device, uplink.payload, uplink.port) == ("0101010101010101", PAYLOAD, 1)
    assert uplink.meta == {
        "network": "chirpstack",
        "rssi": -36,
        "snr": 10.5,
        "gateway": "0016c001f153a14c",
        "gateways": 1,
        "time": 1_658_136_855_775_023,
        "f_cnt": 4,
        "dr": 1,
        "frequency": 867_100_000,
        "name": "soil-1",
        "application": "farm",
    }


@pytest.mark.parametrize(("eui", "device"), [("AgICAgICAgI=", "0202020202020202"), ("0202020202020202",) * 2])
def test_chirpstack_3_in_both_spellings(eui, device):
    uplink = chirpstack({**CHIRPSTACK_V3, "devEUI": eui})
    assert uplink is not None
    assert (uplink.device, uplink.payload, uplink.port) == (device, PAYLOAD, 5)
    assert (uplink.meta["snr"], uplink.meta["dr"], uplink.meta["time"]) == (9, 5, 1_573_221_565_048_445)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {"device": "x", "payload": 1},
        {"end_device_ids": TTN["end_device_ids"], "join_accept": {}},
        {"deviceInfo": CHIRPSTACK_V4["deviceInfo"], "devAddr": "00189440"},
        {"devEUI": "AgICAgICAgI=", "battery": 10},
        {"deviceInfo": "x"},
    ],
)
def test_what_is_no_uplink(value):
    assert not FORMATS.read(value)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({**TTN, "uplink_message": {"frm_payload": "A"}}, ReasonCode.ENVELOPE_INVALID),
        ({**TTN, "uplink_message": {"frm_payload": 1}}, ReasonCode.ENVELOPE_INVALID),
        ({**TTN, "uplink_message": {"f_port": "1", "frm_payload": "AQ=="}}, ReasonCode.ENVELOPE_INVALID),
        ({**CHIRPSTACK_V4, "data": 5}, ReasonCode.ENVELOPE_INVALID),
        ({**TTN, "end_device_ids": {}}, ReasonCode.ENVELOPE_NO_DEVICE),
        ({**CHIRPSTACK_V4, "deviceInfo": {"devEui": ""}}, ReasonCode.ENVELOPE_NO_DEVICE),
        ({**CHIRPSTACK_V3, "devEUI": 7}, ReasonCode.ENVELOPE_NO_DEVICE),
    ],
)
def test_a_broken_uplink_is_refused(value, code):
    with pytest.raises(Reject) as caught:
        FORMATS.read(value)
    assert caught.value.code is code


def test_left_out_fields_are_left_out():
    uplink = ttn({"end_device_ids": {"device_id": "abp"}, "uplink_message": {"frm_payload": "AQ=="}})
    assert uplink is not None
    assert (uplink.device, uplink.payload, uplink.port, uplink.meta) == (
        "abp",
        b"\x01",
        None,
        {"network": "ttn", "name": "abp"},
    )


def without(event, *names):
    return {name: value for name, value in event.items() if name not in names}


TTN_IDS = {"end_device_ids": TTN["end_device_ids"]}
V4_INFO = {"deviceInfo": CHIRPSTACK_V4["deviceInfo"]}
V3_IDS = {"applicationID": "123", "deviceName": "soil-1", "devEUI": "AgICAgICAgI="}
#: What network servers say of a device without a payload of its own.
EVENTS = {
    "ttn, MAC commands alone": {**TTN, "uplink_message": without(TTN["uplink_message"], "frm_payload", "f_port")},
    "ttn, an empty payload": {**TTN, "uplink_message": {**TTN["uplink_message"], "frm_payload": ""}},
    "ttn, a port and no payload": {**TTN, "uplink_message": without(TTN["uplink_message"], "frm_payload")},
    "ttn, join": {**TTN_IDS, "join_accept": {"session_key_id": "AXA"}},
    "ttn, location": {**TTN_IDS, "location_solved": {"location": {"latitude": 1}}},
    "ttn, service data": {**TTN_IDS, "service_data": {"service": "lora-cloud"}},
    "chirpstack 4, MAC commands alone": without(CHIRPSTACK_V4, "data", "fPort"),
    "chirpstack 4, port 0": {**without(CHIRPSTACK_V4, "data"), "fPort": 0},
    "chirpstack 4, an empty payload": {**CHIRPSTACK_V4, "data": "", "object": {}},
    "chirpstack 4, join": {**V4_INFO, "devAddr": "00189440"},
    "chirpstack 4, status": {**V4_INFO, "margin": 7, "batteryLevel": 75.6},
    "chirpstack 4, log": {**V4_INFO, "level": "ERROR", "code": "UPLINK_CODEC", "description": "x"},
    "chirpstack 3, MAC commands alone": without(CHIRPSTACK_V3, "data", "fPort"),
    "chirpstack 3, join": {**V3_IDS, "devAddr": "ACAGUw=="},
    "chirpstack 3, status": {**V3_IDS, "margin": 6, "batteryLevel": 75.5},
    "chirpstack 3, error": {**V3_IDS, "type": "UPLINK_CODEC", "error": "x"},
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_an_event_without_a_payload_is_no_message_and_no_fault(event):
    assert FORMATS.read(event) == []
    for pattern in ("application/+/device/{device}/event/+", "v3/+/devices/{device}/#", "#"):
        topic = {"a": "application/1/device/x/event/up", "v": "v3/a/devices/x/up", "#": "any/topic"}[pattern[0]]
        assert sends_of(patterns_of(pattern), topic, orjson.dumps(event), LIMITS, "", lambda: NOW_US) == []


TXACK = {**V4_INFO, "queueItemId": "5ad3e8f4-9f2b-4f5e-8d5a-0a0b0c0d0e0f", "acknowledged": True}


def through(pattern, topic, event):
    return sends_of(patterns_of(pattern), topic, orjson.dumps(event), LIMITS, "", lambda: NOW_US)


@pytest.mark.parametrize("event", [TTN, CHIRPSTACK_V4, CHIRPSTACK_V3, TXACK])
@pytest.mark.parametrize("topic", ["devices/d1/up", "devices/0004A30B001C0531/up", "devices/v3/up", "devices//up"])
def test_no_device_speaks_for_another_by_an_envelope_under_its_own_topic(event, topic):
    with pytest.raises(Reject, match="under the topic of") as caught:
        through("devices/{device}/up", topic, event)
    assert caught.value.code is ReasonCode.ENVELOPE_INVALID
    # What calls itself by the topic's name and has another's EUI is another.
    forged = {**TTN, "end_device_ids": {"device_id": topic.split("/")[1], "dev_eui": "0004A30B001C0530"}}
    with pytest.raises(Reject, match="under the topic of"):
        through("devices/{device}/up", topic, forged)
    # Where the pattern leaves it to the event, the event says.
    assert len(through("devices/+/up", topic, event)) == 1


@pytest.mark.parametrize(
    ("pattern", "topic", "event"),
    [
        ("v3/+/devices/{device}/up", "v3/farm@ttn/devices/soil-1/up", TTN), ("bridge/v3/+/devices/{device}/#", "bridge/v3/farm@ttn/devices/soil-1/up", TTN), ("lora/{device}", "lora/00-04-a3-0b-00-1c-05-30", TTN),
        ("application/+/device/{device}/event/+", "application/1/device/0101010101010101/event/up", CHIRPSTACK_V4), ("application/+/device/{device}/event/+", "application/1/device/0202020202020202/event/up", CHIRPSTACK_V3),
        ("application/+/device/{device}/event/+", "application/1/device/0101010101010101/event/ack", TXACK),
    ],
)  # fmt: skip
def test_network_servers_own_topics_name_the_device_as_their_events_do(pattern, topic, event):
    assert len(through(pattern, topic, event)) == 1


@pytest.mark.parametrize(
    "value",
    [
        {"temperature": 21}, {"devEUI": "0202020202020202", "temperature": 21}, {"deviceInfo": {"firmware": "1.2"}, "temperature": 21}, {"end_device_ids": "x", "temperature": 21},
        {"method": {"a": 1}, "src": "x", "params": {}}, {"state": "ON"}, {"id": 1, "data": 5}, {"method": "x", "params": {}}, {"cmd": "rx"}, {"eventType": "boot"}, {"fields": [1]}, {"_type": 1},
    ],
)  # fmt: skip
def test_what_a_device_says_itself_is_its_payload(value):
    assert FORMATS.read(value) is None
    (send,) = sends_of(patterns_of("devices/{device}"), "devices/d1", orjson.dumps(value), LIMITS, "", lambda: NOW_US)
    assert send.key == b"d1"


@pytest.mark.parametrize(
    "spelled", ["0004A30B001C0530", "0004a30b001c0530", "00-04-A3-0B-00-1C-05-30", "0004.A30B.001C.0530"]
)
def test_a_device_has_one_key_however_it_is_spelled(spelled):
    event = {**TTN, "end_device_ids": {**TTN["end_device_ids"], "dev_eui": spelled}}
    (by_event,) = sends_of(patterns_of("#"), "v3/app/devices/x/up", orjson.dumps(event), LIMITS, "", lambda: NOW_US)
    (by_topic,) = sends_of(patterns_of("{device}"), spelled, b"{}", LIMITS, "", lambda: NOW_US)
    envelope = orjson.dumps({"device": spelled, "payload": 1})
    (by_envelope,) = sends_of(patterns_of("#"), "x", envelope, LIMITS, "", lambda: NOW_US)
    assert {s.key for s in (by_event, by_topic, by_envelope)} == {b"0004a30b001c0530"}
    assert {orjson.loads(s.value)["device"] for s in (by_event, by_topic, by_envelope)} == {spelled}


#: Keys that envelopes are recognised by, and those that are looked for in them.
KEYS = sorted({
    *FORMATS.by_key, "uplink_message", "dev_eui", "rx_metadata", "settings", "data_rate", "lora", "frequency", "received_at", "frm_payload",
    "decoded_payload", "devEui", "data", "fPort", "rxInfo", "txInfo", "time", "rssi", "snr", "gateway_ids", "dr", "object", "objectJSON",
    "DevEUI", "FPort", "payload_hex", "Lrrs", "Lrr", "payload", "port", "hotspots", "reported_at", "EUI", "gws", "device", "PayloadData",
    "LoRaWAN", "Gateways", "DevEui", "body", "systemProperties", "subject", "Body", "telemetry", "deviceId", "deviceProfile", "fCntUp",
    "gwInfo", "encodingType", "src", "params", "ts", "switch:0", "StatusSNS", "tst", "topic", "tags", "sensordatavalues", "value_type",
    "value", "esp8266id", "type", "observedAt", "coordinates", "reported", "latlng", "name", "timestamp",
})  # fmt: skip
fragments = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
        st.sampled_from(["rx", "NotifyStatus", "location", "Point", "Microsoft.Devices.DeviceTelemetry", "DEVICE_DATA", "AQ==", "00", "1A2B3C"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)),
    max_leaves=16,
)  # fmt: skip
topics = st.lists(
    st.sampled_from([
        "tele", "stat", "SENSOR", "LWT", "POWER1", "shellies", "relay", "0", "99", "status", "switch:0", "zigbee2mqtt", "bridge", "availability",
        "sensor", "state", "homie", "5", "$state", "homeassistant", "owntracks", "application", "device", "event", "up", "352093081452251", "", "x",
    ]), max_size=7,
).map(tuple)  # fmt: skip


def readable(found):
    for uplink in found or ():
        assert uplink.device
        assert isinstance(uplink.device, str)
        line = raw_line(
            uplink.device.replace("\0", "?"),
            uplink.payload,
            received_at=NOW_US,
            connector="x",
            mode=uplink.mode,
            port=None,
            meta=uplink.meta,
        )
        assert line


@settings(max_examples=300)
@given(
    st.one_of(fragments, st.binary(max_size=40)),
    topics,
    st.one_of(st.none(), st.just("d1")),
    st.sampled_from(["auto", *EVERY]),
)
def test_anything_is_messages_or_none_or_refused_in_every_format(value, levels, device, name):
    refused = None
    try:
        readable(formats_of(name).read(value, levels, device, min(len(levels), 1)))
    except Reject as e:
        refused = e.code
    # A device's name may be of control characters, a payload nested too deep.
    assert refused in {
        None, ReasonCode.ENVELOPE_INVALID, ReasonCode.ENVELOPE_NO_DEVICE, ReasonCode.ENVELOPE_NOT_UTF8, ReasonCode.ENVELOPE_TOO_DEEP,
    }  # fmt: skip


@given(st.binary(max_size=80))
def test_any_bytes_are_protobuf_or_refused(data):
    code = None
    try:
        assert "devEui" in from_protobuf(data, "24e124136c191969")["deviceInfo"]
    except Reject as e:
        code = e.code
    assert code in {None, ReasonCode.ENVELOPE_INVALID}


@pytest.mark.parametrize(
    "given_as",
    [
        "2024-02-12T15:15:45.787654321Z",
        "2024-02-12T16:15:45.787654+01:00",
        "2024-02-12 15:15:45.787654",
        1_707_750_945_787_654,
        "1707750945787654",
        1_707_750_945_787_654_321,
    ],
)
def test_one_instant_in_many_spellings(given_as):
    assert instant_us(given_as) == 1_707_750_945_787_654


@pytest.mark.parametrize(
    ("given_as", "us"),
    [
        (1_707_750_945, 1_707_750_945_000_000),
        ("1707750945.5", 1_707_750_945_500_000),
        (1_707_750_945_787, 1_707_750_945_787_000),
        ("1710121512345", 1_710_121_512_345_000),
        ("2024-02-12", 1_707_696_000_000_000),
    ],
)
def test_units_are_told_by_magnitude(given_as, us):
    assert instant_us(given_as) == us


@pytest.mark.parametrize(
    "given_as",
    [
        None,
        True,
        "",
        "soon",
        float("nan"),
        float("inf"),
        "nan",
        -1,
        0,
        "1899-01-01",
        10**25,
        "9" * 40,
        [],
        "2200-01-01",
    ],
)
def test_no_instants(given_as):
    with pytest.raises(Reject) as caught:
        instant_us(given_as)
    assert caught.value.code is ReasonCode.TIMESTAMP_INVALID


@given(st.one_of(st.integers(), st.floats(), st.text()))
def test_any_value_is_an_instant_or_refused(value):
    try:
        us = instant_us(value)
    except Reject:
        return
    assert 946_684_800_000_000 <= us <= 4_102_444_800_000_000
