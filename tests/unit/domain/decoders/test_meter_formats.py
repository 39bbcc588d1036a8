"""M-Bus, Sparkplug B and DSMR telegrams: built here by their standards, whole, torn, flipped, encrypted."""

import json

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from meter_messages import LINES, METRICS, RECORDS, field, mbus, payload, telegram

from preservarium.cli.decode import commands
from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import Decoded
from preservarium.domain.decoders.dsmr import crc16
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.errors import ReasonCode, Reject

pytest.importorskip("meterbus")


def decoder(kind, source=None, variables=None):
    return compile_parser({"name": "p", "version": 1, "kind": kind, "source": source or {}}, variables)


def decode(kind, payload, source=None, variables=None):
    return decoder(kind, source, variables).decode(examples.raw_message(payload))


def refused(kind, payload):
    with pytest.raises(Reject) as e:
        decode(kind, payload)
    assert e.value.code is ReasonCode.DECODE_FAILED
    return str(e.value)


# --- M-Bus ---


def test_an_mbus_frames_values():
    fields = {(f.name, f.pin): (f.value, f.unit) for f in decode("mbus", mbus(RECORDS))}
    assert fields["energy", None] == (100_000_000, "Wh")
    assert fields["flow_temperature", None] == (20.4, "°C")
    assert fields["volume", "1"] == (12345.678, "m³")
    assert fields["volume", "2"] == (0.005, "m³")
    assert fields["volume.maximum", None] == (0.1, "m³")
    assert fields["volume.tariff1", None] == (0.011, "m³")
    assert len(fields) == 7


def test_decode_prints_a_frames_records():
    command = next(c for c in commands if c.name == "decode")
    printed = json.loads(CliRunner().invoke(command, ["--format", "mbus", "--hex", mbus(RECORDS).hex()]).stdout)["data"]
    assert (printed["id"], printed["manufacturer"], printed["medium"]) == ("12345678", "HYD", 4)
    assert len(printed["records"]) == 8
    assert printed["records"][0] == {
        "quantity": "energy", "value": 100_000_000, "unit": "Wh", "function": "INSTANTANEOUS_VALUE",
        "storage_number": 0, "tariff": None, "subunit": None,
    }  # fmt: skip
    assert printed["records"][3]["storage_number"] == 1
    assert printed["records"][7] == {**printed["records"][7], "function": "MANUFACTURER_SPECIFIC", "value": "aabb"}


def test_a_date_and_time_with_seconds_and_a_code_nobody_knows():
    records = bytes.fromhex("066d 1e2d 0a df 2c 00") + bytes.fromhex("027b 2e01")
    fields = decode("mbus", mbus(records))
    assert [(f.name, f.value) for f in fields] == [("date_time", "2022-12-31T10:45:30"), ("vif_7b", 302)]


def test_a_number_of_more_than_64_bits_is_a_float():
    (field_,) = decode("mbus", mbus(bytes.fromhex("0707 ffffffffffffff7f")))
    assert field_.value == float((2**63 - 1) * 10_000)


def test_mbus_frames_that_carry_nothing_say_why():
    whole = mbus(RECORDS)
    assert "torn" in refused("mbus", whole[:-4])
    assert "checksum" in refused("mbus", whole[:20] + b"\xff" + whole[21:])
    assert "encrypted (mode 5)" in refused("mbus", mbus(b"\x17" * 16, configuration=b"\x10\x05"))
    assert "fixed data" in refused("mbus", mbus(RECORDS, ci=0x73))
    assert "CI field 78" in refused("mbus", mbus(RECORDS, ci=0x78))
    assert "68 LL LL 68" in refused("mbus", b"\xe5")
    assert "no values" in refused("mbus", mbus(b""))


# --- Sparkplug B ---


def test_a_sparkplug_payloads_metrics():
    at = 1_700_000_000_000_000
    assert decode("sparkplug_b", payload(*METRICS)) == [
        Decoded("temperature", 21.5, "°C", at, None),
        Decoded("level", -10, None, at + 500_000, None),
        Decoded("cut", -10, None, at, None),
        Decoded("big", -5, None, at, None),
        Decoded("total", 2**63, None, at, None),
        Decoded("on", True, None, at, None),
        Decoded("state", "läuft", None, at, None),
        Decoded("float", 0.5, None, at, None),
    ]


def test_aliases_are_named_by_the_parser_and_the_device():
    data = payload(field(2, 1) + field(13, 2.0), field(2, 2) + field(10, 0xFFFF), field(2, 9) + field(10, 7))
    source = {"aliases": {"1": "a", "2": "b"}}
    found = decode("sparkplug_b", data, source, {"aliases": {"2": {"name": "c", "type": "Int16"}}})
    assert [(f.name, f.value) for f in found] == [("a", 2.0), ("c", -1), ("alias_9", 7)]
    for wrong in (
        {"aliases": {"x": "a"}},
        {"aliases": {"1": {"name": "a", "type": "Int99"}}},
        {"alias": {}},
        {"aliases": 5},
    ):
        with pytest.raises(Reject) as e:
            decoder("sparkplug_b", wrong)
        assert e.value.code is ReasonCode.NO_PARSER


def test_torn_sparkplug_payloads_are_refused():
    whole = payload(METRICS[0])
    assert "torn" in refused("sparkplug_b", whole[:-12])
    assert "field number 0" in refused("sparkplug_b", b"\x00\x00")
    assert "no metric" in refused("sparkplug_b", field(1, 5))
    assert "a timestamp of" in refused("sparkplug_b", payload(METRICS[0], at_ms=2**63))
    assert "neither name nor alias" in refused("sparkplug_b", payload(field(13, 1.0)))


# --- DSMR ---


@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.encode(), lambda t: t.replace("\r", "")])
def test_a_telegrams_values(form):
    at, summer = 1_705_316_400_000_000, 1_721_034_000_000_000
    assert decode("dsmr", form(telegram())) == [
        Decoded("energy_import_tariff1", 123.456, "kWh", at, None),
        Decoded("energy_export_tariff1", 0.001, "kWh", at, None),
        Decoded("tariff", 2, None, at, None),
        Decoded("power_import", 0.313, "kW", at, None),
        Decoded("voltage_l1", 231.4, "V", at, None),
        Decoded("device_type", 3, None, at, "1"),
        Decoded("meter", 55.719, "m3", summer, "1"),
        Decoded("meter", 1.5, "GJ", 1_705_312_800_000_000, "2"),
        Decoded("1-0:200.7.1", 17, "x", at, None),
    ]


def test_an_old_telegram_has_no_checksum_and_its_gas_on_two_lines():
    text = "/ISk5\\2ME382\n\n1-0:1.8.1(00185.000*kWh)\n0-1:24.3.0(090212160000)(00)(60)(1)(0-1:24.2.1)(m3)\n(00001.001)\n!\n"
    assert [(f.name, f.value, f.unit, f.pin) for f in decode("dsmr", text)] == [
        ("energy_import_tariff1", 185.0, "kWh", None), ("meter", 1.001, "m3", "1"),
    ]  # fmt: skip


def test_checksums_without_their_zeros_in_front_and_numbers_in_their_place():
    body = LINES.replace("\n", "\r\n")
    # A line that makes the checksum begin with zeros.
    padded = next(
        text
        for n in range(5_000)
        if (text := body[:-1] + f"1-0:200.7.1({n:05d})\r\n!") and crc16(text.encode()) < 0x1000
    )
    short = f"{crc16(padded.encode()):X}"
    assert len(short) < 4
    for written in (short, short.lower(), short.rjust(4, "0")):
        assert decode("dsmr", padded + written + "\r\n") == decode("dsmr", padded + "\r\n")
    assert "checksum" in refused("dsmr", padded + f"{(int(short, 16) + 1):X}\r\n")
    # An EasyMeter says its number there.
    assert decode("dsmr", body + "25818685\r\n") == decode("dsmr", body + "\r\n")
    assert "checksum" in refused("dsmr", body + "2581868\r\n")


def test_telegrams_that_carry_nothing_say_why():
    assert "checksum" in refused("dsmr", telegram().replace("231.4", "231.5"))
    assert "torn" in refused("dsmr", LINES[:-1])
    assert "encrypted" in refused("dsmr", b"\xdb\x08SAG\x00\x00")
    assert "starts with /" in refused("dsmr", "1-0:1.8.1(1*kWh)")
    assert "not an object" in refused("dsmr", {"a": 1})
    assert "no values" in refused("dsmr", "/x\n\n!\n")
    assert decode("dsmr", "/x\n1-0:1.8.1(" + "9" * 15 + "*kWh)\n!")[0].value == 10**15 - 1


# --- whatever comes ---

WHOLE = {"mbus": mbus(RECORDS), "sparkplug_b": payload(*METRICS), "dsmr": telegram().encode()}
DECODERS = {kind: decoder(kind) for kind in WHOLE}


def damaged(kind, data):
    whole = bytearray(WHOLE[kind])
    for at, flip in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255)), max_size=4)):
        whole[at] ^= flip
    cut = data.draw(st.integers(0, len(whole)))
    whole = whole[:cut] if data.draw(st.booleans()) else whole
    if kind == "mbus" and len(whole) > 21 and data.draw(st.booleans()):
        # Behind a checksum that is right, the records themselves are read.
        whole = bytearray(mbus(bytes(whole[19:-2])))
    if kind == "dsmr" and data.draw(st.booleans()) and b"!" in whole:
        whole = whole[: whole.rindex(b"!") + 1]
    return bytes(whole)


def never_raises(kind, given):
    try:
        found = DECODERS[kind].decode(examples.raw_message(given))
    except Reject as e:
        assert e.code in (ReasonCode.DECODE_FAILED, ReasonCode.DECODE_LIMIT)  # noqa: PT017  # both ways are right
    else:
        found = [f for f in found if not isinstance(f, Reject)]
        assert found
        assert all(isinstance(f.value, int | float | str | bool) for f in found)
        assert all(f.timestamp is None or abs(f.timestamp) < 2**63 for f in found)
        orjson.dumps([f.value for f in found])  # no number beyond 64 bits


@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_a_damaged_payload_is_values_or_a_refusal(kind, data):
    never_raises(kind, damaged(kind, data))


@given(
    kind=st.sampled_from(sorted(WHOLE)), given_=st.one_of(st.binary(max_size=300), st.text(max_size=200), st.integers())
)
def test_any_payload_is_values_or_a_refusal(kind, given_):
    never_raises(kind, given_)


@pytest.mark.slow
@settings(max_examples=40_000, deadline=None)
@given(kind=st.sampled_from(sorted(WHOLE)), data=st.data())
def test_many_damaged_payloads(kind, data):
    never_raises(kind, damaged(kind, data))
