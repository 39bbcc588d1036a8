import pytest

from preservarium.domain.readings.legacy import legacy_message
from preservarium.errors import ReasonCode, Reject

FULL = {
    "mac_address": "f2-e4fd45f654be", "mode": "LoRa", "data_point_label": "Temperature", "pin": "A0", "value": 21.5,
    "unit": "°C", "original_topic": "lora/f2/up", "timestamp": 1_700_000_000,
}  # fmt: skip


def convert(**changes):
    fields = {k: v for k, v in (FULL | changes).items() if v is not ...}
    return legacy_message(fields, received_at=1, partition=2, offset=3, index=4, generation=5)


def test_every_field():
    message = convert()
    assert message == {
        "device_id": "f2-e4fd45f654be", "connector_mode": "LoRa", "topic": "lora/f2/up", "timestamp": 1_700_000_000_000_000,
        "received_at": 1, "raw_partition": 2, "raw_offset": 3, "raw_index": 4, "parser": "decoded_iot_data@1", "config_rev": 0,
        "generation": 5,
        "readings": [{"component_type": "Temperature", "pin_position": "A0", "value": 21.5, "unit": "°C", "quality": 2}],
    }  # fmt: skip


@pytest.mark.parametrize("absent", [..., None])
def test_the_old_services_defaults(absent):
    message = convert(
        mode=absent, data_point_label=absent, pin=absent, unit=absent, original_topic=absent, value=absent
    )
    assert (message["connector_mode"], message["topic"]) == ("unknown", "")
    assert message["readings"] == [
        {"component_type": "unknown", "pin_position": "-1", "value": None, "unit": "", "quality": 2}
    ]


@pytest.mark.parametrize(
    ("timestamp", "us"),
    [
        (1_700_000_000, 1_700_000_000_000_000),
        (1_700_000_000.25, 1_700_000_000_250_000),
        (1_700_000_000_123, 1_700_000_000_123_000),
        ("1700000000", 1_700_000_000_000_000),
        ("2023-11-14T22:13:20Z", 1_700_000_000_000_000),
        ("2023-11-14T23:13:20.5+01:00", 1_700_000_000_500_000),
        ("2023-11-14T22:13:20", 1_700_000_000_000_000),
        ("2023-11-14 22:13:20.123456", 1_700_000_000_123_456),
    ],
)
def test_instants(timestamp, us):
    assert convert(timestamp=timestamp)["timestamp"] == us


@pytest.mark.parametrize(("value", "number"), [("21.5", 21.5), (" 7 ", 7.0), (True, 1.0), (3, 3.0), ("-1e-3", -0.001)])
def test_values(value, number):
    assert convert(value=value)["readings"][0]["value"] == number


def test_a_pin_may_be_a_number():
    assert convert(pin=3)["readings"][0]["pin_position"] == "3"


@pytest.mark.parametrize(
    "changes",
    [
        {"mac_address": ...}, {"mac_address": None}, {"mac_address": ""}, {"mac_address": ["a"]}, {"mac_address": True},
        {"timestamp": ...}, {"timestamp": "soon"}, {"timestamp": True}, {"timestamp": {}}, {"timestamp": float("nan")},
        {"value": "warm"}, {"value": float("nan")}, {"value": "inf"}, {"value": [1]}, {"value": ""}, {"value": 10**400},
        {"unit": 1.5}, {"mode": {}}, {"original_topic": []},
    ],
)  # fmt: skip
def test_what_is_garbled_is_refused(changes):
    with pytest.raises(Reject) as e:
        convert(**changes)
    assert e.value.code is ReasonCode.LEGACY_INVALID


@pytest.mark.parametrize("fields", [None, 5, "x", [FULL]])
def test_only_objects(fields):
    with pytest.raises(Reject):
        legacy_message(fields, received_at=1, partition=2, offset=3, index=4)
