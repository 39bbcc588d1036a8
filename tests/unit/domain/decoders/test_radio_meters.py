"""Wireless M-Bus by its standards: link layers with and without checksums, encryption, compact frames; records of every kind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from meter_messages import (
    RADIO_KEY,
    RADIO_RECORDS,
    extended,
    format_a,
    format_b,
    mbus,
    mode_5,
    mode_7,
    radio,
    radio_crc,
    short_header,
)

from preservarium.domain.decoders import examples
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.domain.decoders.mbus_records import Torn, records
from preservarium.errors import ReasonCode, Reject

VALUES = {
    "volume": 12345.678,
    "energy": 100_000_000,
    "flow_temperature": 20.4,
    "date_time.storage1": "2022-12-31T13:46",
}


def decoder(key=None, **source):
    variables = {} if key is None else {"key": key.hex()}
    return compile_parser({"name": "p", "version": 1, "kind": "wmbus", "source": source}, variables)


def decode(payload, key=None, **source):
    found = decoder(key, **source).decode(examples.raw_message(payload))
    return {f.name if f.pin is None else f"{f.name}#{f.pin}": f.value for f in found if not isinstance(f, Reject)}


def refused(payload, key=None, **source):
    with pytest.raises(Reject) as e:
        decode(payload, key, **source)
    assert e.value.code is ReasonCode.DECODE_FAILED
    return str(e.value)


PLAIN = radio(short_header(0, 0) + RADIO_RECORDS)


def test_a_frame_that_is_not_encrypted():
    assert decode(PLAIN) == VALUES
    assert decode(PLAIN.hex()) == VALUES
    assert decode(radio(b"\x78" + RADIO_RECORDS)) == VALUES
    head = decoder().records(examples.raw_message(PLAIN))
    assert (head["manufacturer"], head["id"], head["version"], head["medium"]) == ("HYD", "12345678", 0x28, 4)


@pytest.mark.parametrize("sync", [b"", b"\x54\xcd", b"\x54\x3d"])
@pytest.mark.parametrize("written", [lambda f: f, format_a, format_b, lambda f: f + b"\x80"])
def test_frames_as_receivers_pass_them_on(sync, written):
    assert decode(sync + written(PLAIN)) == VALUES


def test_frames_are_decrypted_with_their_meters_key():
    assert decode(mode_5(), RADIO_KEY) == VALUES
    assert decode(format_a(mode_5()), RADIO_KEY) == VALUES
    assert decode(mode_7(), RADIO_KEY) == VALUES
    assert decode(extended(b"\x78" + RADIO_RECORDS), RADIO_KEY) == VALUES
    # A receiver has decrypted it, and left the header as it was.
    assert decode(radio(short_header(5, 2) + b"\x2f\x2f" + RADIO_RECORDS)) == VALUES
    long = b"\x72" + bytes.fromhex("78563412 2423 28 04 55 00 0000") + RADIO_RECORDS
    assert decode(radio(b"\x8c\x20\x42" + long)) == VALUES


def test_without_the_right_key_nothing_is_made_up():
    other = bytes(16)
    for frame, layer in ((mode_5(), "mode 5"), (mode_7(), "mode 7"), (extended(b"\x78" + RADIO_RECORDS), "AES-CTR")):
        assert f"encrypted ({layer})" in refused(frame)
        assert "this meter's key?" in refused(frame, other)
    forged = bytearray(mode_7())
    forged[-1] ^= 1
    assert "authentication code is wrong" in refused(bytes(forged), RADIO_KEY)
    for wrong in ("00", "zz" * 16, 7, RADIO_KEY.hex() + "00"):
        with pytest.raises(Reject) as e:
            compile_parser({"name": "p", "version": 1, "kind": "wmbus", "source": {}}, {"key": wrong})
        assert e.value.code is ReasonCode.NO_PARSER
        assert str(wrong) not in str(e.value) or wrong in ("00", 7)


def test_compact_frames_have_the_layout_of_the_full_ones():
    layout, data = "0c13 0406 025a".replace(" ", ""), bytes.fromhex("78563412 a0860100 cc00")
    signature = radio_crc(bytes.fromhex(layout)).to_bytes(2, "little")
    frame = radio(b"\x79" + signature + b"\0\0" + data)
    assert decode(frame, formats=[layout]) == {k: v for k, v in VALUES.items() if "date" not in k}
    assert "layout" in refused(frame)
    known = bytes.fromhex("02ff2004134413")
    frame = radio(b"\x79" + radio_crc(known).to_bytes(2, "little") + b"\0\0" + bytes.fromhex("0000 39300000 a0860100"))
    assert decode(frame) == {"manufacturer_spec.20": 0, "volume": 12.345, "volume.storage1": 100}
    for wrong in (5, ["xy"], [1], ["00"] * 101):
        with pytest.raises(Reject) as e:
            decoder(formats=wrong)
        assert e.value.code is ReasonCode.NO_PARSER


def test_frames_that_carry_nothing_say_why():
    assert "specific to the manufacturer" in refused(radio(b"\xa2\x01\x02\x03"))
    assert "torn" in refused(PLAIN[:-3])
    assert "10 bytes" in refused(PLAIN[:10])
    assert "without checksums" in refused(b"\x04" + bytes(14))
    assert "wired" in refused(mbus(RADIO_RECORDS))
    assert "mode 13 (TLS)" in refused(radio(short_header(13, 1) + bytes(20)))
    assert "no values" in refused(radio(b"\x78" + bytes.fromhex("0f 0102")))
    assert "fragments" in refused(radio(b"\x90\x02\x00\x40\x7a" + bytes(8)))


@given(st.binary(max_size=300), st.booleans())
def test_whatever_comes_is_values_or_a_refusal(data, framed):
    payload = radio(data[:240]) if framed else data
    for one in (DECODER, SEALED):
        try:
            assert one.decode(examples.raw_message(payload))
        except Reject as e:
            assert e.code is ReasonCode.DECODE_FAILED  # noqa: PT017  # both ways are right


DECODER, SEALED = decoder(), decoder(RADIO_KEY)


# --- records ---


@pytest.mark.parametrize(
    ("hexadecimal", "expected"),
    [
        (
            "0d7c 02 5750 f0 96075b2a27a693013db51ab3dcd13e17",
            ("variable_vif", "173ed1dcb31ab53d0193a6272a5b0796", "PW"),
        ),
        ("0d78 c4 78563412", ("fabrication_no", 12345678, None)),
        ("0d13 d2 3412", ("volume", -1.234, "m³")),
        ("0d13 e3 010000", ("volume", 0.001, "m³")),
        ("0d fd10 03 434241", ("customer_location", "ABC", None)),
        ("0b13 ff3412", None),
        ("0913 f1", ("volume", -0.001, "m³")),
        ("0c13 a8563412", ("volume", None, "m³")),
        ("0413 00000080", ("volume", None, "m³")),
        ("0113 80", ("volume", -0.128, "m³")),
        ("0526 0000803f", ("operating_time", 3600, "s")),
        ("055b cdcca441", ("flow_temperature", 20.6, "°C")),
        ("055b 0000c07f", ("flow_temperature", None, "°C")),
        ("02 fd17 0080", ("error_flags", 0x8000, None)),
        ("02 9313 0100", None),
        ("02 9372 0100", ("volume", 0.0000001, "m³")),
        ("02 957d 0100", ("volume", 100, "m³")),
        ("02 ab3c 0100", ("power.negative_accumulation", 1, "W")),
        ("02 fdc8fc01 ea00", ("volts.l1", 23.4, "V")),
        ("02 fd48 ea00", ("volts", 23.4, "V")),
        ("02 fb01 0100", ("energy", 1_000_000, "Wh")),
        ("02 fb8275 3f00", ("reactive_energy", 6.3, "kvarh")),
        ("02 9315 0100", ("volume", None, "m³")),
        ("02 6c ffff", ("date", None, None)),
        ("02 6c 5f2c", ("date", "2018-12-31", None)),
        ("03 6d 1e2d0a", ("date_time", "10:45:30", None)),
        ("04 6d 2248 4136", ("date_time", "2026-06-01T08:34", None)),
        ("04 6d 8001 4136", ("date_time", None, None)),
        ("08 13", ("volume", None, "m³")),
        ("02 ff2c 0100", ("manufacturer_spec.2c", 1, None)),
        ("02 ef01 0100", ("vif_ef01", 1, None)),
    ],
)
def test_a_record_of_each_kind(hexadecimal, expected):
    found = list(records(bytes.fromhex(hexadecimal.replace(" ", ""))))
    assert len(found) == 1
    if expected is not None:
        assert (found[0].quantity, found[0].value, found[0].unit) == expected


def test_storage_tariff_subunit_and_function():
    (found,) = records(bytes.fromhex("dc b0 41 13 01000000"))
    assert (found.function, found.storage, found.tariff, found.subunit) == ("MAXIMUM_VALUE", 33, 3, 2)


@pytest.mark.parametrize(
    "hexadecimal",
    [
        "04",
        "0413 00",
        "0d13",
        "0d13 05 01",
        "0d13 fb",
        "047c 05 41",
        "84" * 12 + "13",
        "0493" + "93" * 12,
        "3f13",
        "ff",
    ],
)
def test_torn_records(hexadecimal):
    with pytest.raises(Torn):
        list(records(bytes.fromhex(hexadecimal.replace(" ", ""))))


def test_what_stands_before_a_torn_record_is_read():
    found = decoder().decode(examples.raw_message(radio(b"\x78" + RADIO_RECORDS + b"\x04\x13\x01")))
    fields = [f for f in found if not isinstance(f, Reject)]
    assert len(fields) == 4
    (reject,) = [f for f in found if isinstance(f, Reject)]
    assert "cannot be read" in str(reject)


# --- wired: fixed data ---


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("78563412 0a 00 e97e 01000000 35010000", [("volume", 0.001, "m³"), ("volume.storage1", 0.135, "m³")]),
        ("78563412 0a 01 0529 00010000 ffffffff", [("energy", 256_000, "Wh"), ("volume", -0.001, "m³")]),
        ("78563412 0a 02 0529 00010000 a0000000", [("energy.storage1", 100_000, "Wh")]),
    ],
)
def test_a_frame_with_fixed_data(body, expected):
    data = b"\x08\x05\x73" + bytes.fromhex(body)
    frame = b"\x68" + bytes([len(data)]) * 2 + b"\x68" + data + bytes([sum(data) & 0xFF]) + b"\x16"
    found = compile_parser({"name": "p", "version": 1, "kind": "mbus", "source": {}}).decode(
        examples.raw_message(frame)
    )
    assert [(f.name, f.value, f.unit) for f in found] == expected
