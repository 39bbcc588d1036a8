"""Downlinks: payloads, the envelopes of network servers, and what they report."""

import base64
from uuid import UUID

import orjson
import pytest

from preservarium import topics
from preservarium.connectors.base import Limits
from preservarium.connectors.mqtt import patterns_of, sends_of
from preservarium.domain.commands.downlinks import (
    PAYLOAD_BYTES_MAX,
    DownlinkError,
    Payload,
    encoded,
    encoder_arguments,
    envelope,
    plain_payload,
    server_report,
)
from preservarium.domain.commands.lines import REPORTS, parse_line
from preservarium.sandbox.python_scripts import PythonScript

ID = "0123456789abcdef0123456789abcdef"
EUI = "70b3d57ed0000001"


def downlink(shape: str) -> dict[str, object]:
    return {"downlink_id": ID, "device_id": EUI, "format": shape, "confirmed": True}


@pytest.mark.parametrize(
    ("content", "data"),
    [
        ({"payload_b64": "AQI="}, b"\x01\x02"),
        ({"payload": "reboot"}, b"reboot"),
        ({"payload": {"on": True}}, b'{"on":true}'),
        ({"payload": 5}, b"5"),
        ({"fields": {"on": 1}}, b'{"on":1}'),
    ],
)
def test_payloads_that_need_no_codec(content, data):
    assert plain_payload({**content, "port": 3}) == Payload(data, 3)


@pytest.mark.parametrize("content", [{"payload_b64": "?"}, {"payload": "x" * (PAYLOAD_BYTES_MAX + 1)}])
def test_payloads_that_cannot_be_sent(content):
    with pytest.raises(DownlinkError):
        plain_payload(content)


def test_encoders_are_given_what_ts013_says():
    given = orjson.loads(encoder_arguments("javascript", EUI, {"fields": {"on": 1}, "port": 2}, {"k": "v"}))
    assert given == {"data": {"on": 1}, "fPort": 2, "variables": {"k": "v"}}
    given = orjson.loads(encoder_arguments("python", EUI, {"fields": {"on": 1}}, {}))
    assert given == {"payload": {"on": 1}, "context": {"port": None, "device": EUI, "variables": {}}}


@pytest.mark.parametrize(
    ("result", "content", "payload"),
    [
        ({"bytes": [1, 2.0], "fPort": 7, "warnings": ["w"]}, {}, Payload(b"\x01\x02", 7)),
        ({"bytes": [1], "fPort": 7}, {"port": 9}, Payload(b"\x01", 9)),
        ([255], {}, Payload(b"\xff", None)),
        ({"bytes": []}, {}, Payload(b"", None)),
    ],
)
def test_what_encoders_return(result, content, payload):
    assert encoded(orjson.dumps(result).decode(), content) == payload


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ({"errors": ["too hot", "x"]}, "the codec reports: too hot; x"),
        ({"bytes": [256]}, "no byte"),
        ({"bytes": [1.5]}, "no byte"),
        ({"bytes": "AQ=="}, "returned text"),
        (None, "returned null"),
        ({"bytes": [1], "fPort": 0}, "port is 0"),
    ],
)
def test_what_encoders_must_not_return(result, why):
    with pytest.raises(DownlinkError, match=why):
        encoded(orjson.dumps(result).decode(), {})


def test_python_encoders_may_return_bytes():
    source = (
        "def decode(payload, context):\n    return []\ndef encode(fields, context):\n    return bytes([fields['on']])\n"
    )
    text = PythonScript(source, 1.0).call("encode", encoder_arguments("python", EUI, {"fields": {"on": 5}}, {}), 1_000)
    assert encoded(text, {"port": 1}) == Payload(b"\x05", 1)


def test_envelopes():
    payload = Payload(b"\x01\x02", 10)
    assert envelope(downlink("plain"), payload) == b"\x01\x02"
    assert orjson.loads(envelope(downlink("chirpstack"), payload)) == {
        "id": str(UUID(ID)), "devEui": EUI, "confirmed": True, "fPort": 10, "data": base64.b64encode(b"\x01\x02").decode(),
    }  # fmt: skip
    assert orjson.loads(envelope(downlink("things_stack"), payload)) == {
        "downlinks": [
            {
                "f_port": 10, "frm_payload": "AQI=", "confirmed": True, "priority": "NORMAL",
                "correlation_ids": [f"preservarium:downlink:{ID}"],
            }
        ]
    }  # fmt: skip
    for shape in ("chirpstack", "things_stack"):
        with pytest.raises(DownlinkError, match="port"):
            envelope(downlink(shape), Payload(b"", None))


CHIRPSTACK = {"deviceInfo": {"devEui": EUI}, "queueItemId": str(UUID(ID)), "fCntDown": 3}
STACK = {"end_device_ids": {"device_id": "dev", "dev_eui": EUI}}
OURS = ["as:x", f"preservarium:downlink:{ID}"]


@pytest.mark.parametrize(
    ("event", "word", "reason"),
    [
        ({**CHIRPSTACK, "downlinkId": 5, "gatewayId": "g"}, "transmitted", None),
        ({**CHIRPSTACK, "acknowledged": True}, "acknowledged", None),
        (CHIRPSTACK, "not_acknowledged", None),  # protobuf's JSON leaves false out
        ({**STACK, "downlink_sent": {"correlation_ids": OURS}}, "transmitted", None),
        ({**STACK, "correlation_ids": OURS, "downlink_ack": {}}, "acknowledged", None),
        ({**STACK, "correlation_ids": OURS, "downlink_nack": {}}, "not_acknowledged", None),
        (
            {**STACK, "downlink_failed": {"downlink": {"correlation_ids": OURS}, "error": {"message_format": "full"}}},
            "failed", "full",
        ),
    ],
)  # fmt: skip
def test_network_servers_report(event, word, reason):
    line = server_report(event)
    assert line is not None
    assert (line["device_id"], line["downlink_id"], line["report"], line.get("reason")) == (EUI, ID, word, reason)
    assert word in REPORTS
    parse_line(line, device_id=None, at=1_700_000_000_000_000, key="k")


@pytest.mark.parametrize(
    "event",
    [
        None, [], {}, {"deviceInfo": {"devEui": EUI}, "data": "AQ=="}, {**CHIRPSTACK, "queueItemId": "other"},
        {**STACK, "uplink_message": {}}, {**STACK, "downlink_sent": {"correlation_ids": ["theirs"]}},
        {**STACK, "downlink_queued": {"correlation_ids": OURS}}, {"end_device_ids": {}, "downlink_ack": {}},
    ],
)  # fmt: skip
def test_other_events_report_nothing(event):
    assert server_report(event) is None


def test_the_mqtt_connector_takes_reports_where_uplinks_come():
    patterns = patterns_of("application/+/device/+/event/+")
    limits = Limits(payload_bytes_max=1_000, record_bytes_max=10_000)
    (send,) = sends_of(
        patterns, "application/a/device/e/event/ack", orjson.dumps(CHIRPSTACK), limits, "MQTT", lambda: 5
    )
    assert (send.topic, send.key) == (topics.COMMANDS, EUI.encode())
    assert orjson.loads(send.value or b"")["report"] == "not_acknowledged"
