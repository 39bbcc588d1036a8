"""Network servers' uplinks, and instants as strangers write them."""

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.connectors.envelopes import chirpstack, ttn, uplink_of
from preservarium.connectors.instants import instant_us
from preservarium.domain.errors import ReasonCode, Reject

PAYLOAD = bytes.fromhex("0202df000393710c60")
B64 = b64encode(PAYLOAD).decode()

TTN = {
    "end_device_ids": {
        "device_id": "soil-1",
        "application_ids": {"application_id": "farm"},
        "dev_eui": "0004A30B001C0530",
        "dev_addr": "00BCB929",
    },
    "received_at": "2024-02-12T15:15:46.200000000Z",
    "uplink_message": {
        "f_port": 2,
        "f_cnt": 39,
        "frm_payload": B64,
        "rx_metadata": [
            {"gateway_ids": {"gateway_id": "far"}, "rssi": -115, "snr": -4.2},
            {"gateway_ids": {"gateway_id": "near"}, "rssi": -42, "channel_rssi": -42, "snr": 7.5},
        ],
        "settings": {"data_rate": {"lora": {"bandwidth": 125000, "spreading_factor": 7}}, "frequency": "868300000"},
        "received_at": "2024-02-12T15:15:45.787654321Z",
    },
}
CHIRPSTACK_V4 = {
    "deduplicationId": "3ac7e3c4-4401-4b8d-9386-a5c902f9202d",
    "time": "2022-07-18T09:34:15.775023242+00:00",
    "deviceInfo": {"applicationName": "farm", "deviceName": "soil-1", "devEui": "0101010101010101"},
    "devAddr": "00189440",
    "dr": 1,
    "fCnt": 4,
    "fPort": 1,
    "data": B64,
    "rxInfo": [{"gatewayId": "0016c001f153a14c", "rssi": -36, "snr": 10.5}],
    "txInfo": {"frequency": 867100000},
}
CHIRPSTACK_V3 = {
    "applicationID": "123",
    "applicationName": "farm",
    "deviceName": "soil-1",
    "devEUI": "AgICAgICAgI=",
    "rxInfo": [{"gatewayID": "AwMDAwMDAwM=", "time": "2019-11-08T13:59:25.048445Z", "rssi": -48, "loRaSNR": 9}],
    "txInfo": {"frequency": 868100000, "dr": 5},
    "fCnt": 10,
    "fPort": 5,
    "data": B64,
}


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
    assert uplink_of(value) is None


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ({**TTN, "uplink_message": {"frm_payload": "A"}}, ReasonCode.ENVELOPE_INVALID),
        ({**TTN, "uplink_message": {"frm_payload": 1}}, ReasonCode.ENVELOPE_INVALID),
        ({**TTN, "uplink_message": {"f_port": "1"}}, ReasonCode.ENVELOPE_INVALID),
        ({**TTN, "end_device_ids": {}}, ReasonCode.ENVELOPE_NO_DEVICE),
        ({**CHIRPSTACK_V4, "deviceInfo": {"devEui": ""}}, ReasonCode.ENVELOPE_NO_DEVICE),
        ({**CHIRPSTACK_V3, "devEUI": 7}, ReasonCode.ENVELOPE_NO_DEVICE),
    ],
)
def test_a_broken_uplink_is_refused(value, code):
    with pytest.raises(Reject) as caught:
        uplink_of(value)
    assert caught.value.code is code


def test_left_out_fields_are_empty():
    uplink = ttn({"end_device_ids": {"device_id": "abp"}, "uplink_message": {}})
    assert uplink is not None
    assert (uplink.device, uplink.payload, uplink.port, uplink.meta) == (
        "abp",
        b"",
        None,
        {"network": "ttn", "name": "abp"},
    )


fragments = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "end_device_ids",
                    "uplink_message",
                    "dev_eui",
                    "rx_metadata",
                    "settings",
                    "data_rate",
                    "lora",
                    "frequency",
                    "received_at",
                    "frm_payload",
                    "deviceInfo",
                    "devEui",
                    "devEUI",
                    "data",
                    "fPort",
                    "rxInfo",
                    "txInfo",
                    "time",
                    "rssi",
                    "snr",
                    "gateway_ids",
                    "dr",
                ]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@given(fragments)
def test_any_json_is_an_uplink_or_none_or_refused(value):
    try:
        uplink = uplink_of(value)
    except Reject:
        return
    assert uplink is None or isinstance(uplink.payload, bytes)


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
