import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import ParserError
from preservarium.domain.decoders.field_table.decoder import TableDecoder
from preservarium.domain.decoders.field_table.language import TURNS_MAX, slug
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.errors import ReasonCode, Reject
from preservarium.registry.yaml_tree import plain_file

ROOT = Path(__file__).parents[4]
#: Files of one parser each; a folder of examples may also have a registry of its own.
FILES = sorted(
    f
    for folder in (ROOT / "examples", ROOT / "tests" / "cases")
    for f in folder.glob("*/*.yaml")
    if f.name != "registry.yaml"
)
PARSERS = {f"{f.parent.name}/{f.stem}": plain_file(f) for f in FILES}
TABLES = {name: doc for name, doc in PARSERS.items() if doc["kind"] == "table"}
_DECODERS = {name: compile_parser(doc) for name, doc in TABLES.items()}


def decode(source, payload, **more):
    if isinstance(payload, str):
        payload = bytes.fromhex(payload)
    return TableDecoder(source).decode(examples.raw_message(payload, **more))


def values(source, payload, **more):
    return {d.name: d.value for d in decode(source, payload, **more)}


def refused(reject):
    assert reject.code in {ReasonCode.DECODE_FAILED, ReasonCode.DECODE_LIMIT}


def wrong(source):
    with pytest.raises(ParserError) as e:
        TableDecoder(source)
    return str(e.value)


@pytest.mark.parametrize("name", PARSERS)
def test_every_example_of_every_parser_file_holds(name):
    doc = PARSERS[name]
    outcomes = examples.run(doc)
    assert outcomes, "a parser file has examples"
    assert [line for o in outcomes for line in o.differences] == []


@settings(max_examples=1500, deadline=None)
@given(
    name=st.sampled_from(sorted(TABLES)),
    data=st.binary(max_size=120),
    port=st.sampled_from([None, 1, 2, 200]),
    valid=st.booleans(),
)
def test_any_bytes_become_fields_or_a_reject(name, data, port, valid):
    prefix = bytes.fromhex(TABLES[name]["examples"][0]["hex"])[:5] if valid else b""
    try:
        fields = _DECODERS[name].decode(examples.raw_message(prefix + data, port=port))
    except Reject as e:
        refused(e)
        return
    for field in fields:
        assert isinstance(field.value, int | float | str)
        assert isinstance(field.name, str)
        assert field.timestamp is None or abs(field.timestamp) < 2**63


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=100_000, deadline=None)
@given(name=st.sampled_from(sorted(TABLES)), data=st.binary(max_size=250), port=st.sampled_from([None, 1, 2, 200]))
def test_any_bytes_become_fields_or_a_reject_at_length(name, data, port):
    try:
        _DECODERS[name].decode(examples.raw_message(data, port=port))
    except Reject as e:
        refused(e)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(TABLES)), data=st.data())
def test_every_truncation_and_every_flipped_bit_is_handled(name, data):
    example = data.draw(st.sampled_from(TABLES[name]["examples"]))
    payload = bytearray(bytes.fromhex(example["hex"]))
    cut = data.draw(st.integers(0, len(payload)))
    bit = data.draw(st.integers(0, len(payload) * 8 - 1)) if payload else 0
    payload[bit // 8] ^= 1 << bit % 8
    for candidate in (bytes(payload), bytes(payload[:cut])):
        try:
            fields = _DECODERS[name].decode(examples.raw_message(candidate, port=example.get("port")))
        except Reject as e:
            refused(e)
        else:
            assert all(isinstance(f.name, str) for f in fields)


def test_the_same_payload_decodes_the_same():
    doc = TABLES["decentlab/atm41"]
    payload = bytes.fromhex(doc["examples"][0]["hex"])
    first, second = (_DECODERS["decentlab/atm41"].decode(examples.raw_message(payload)) for _ in range(2))
    assert first == second
    assert [d.name for d in first][:3] == ["Protocol version", "Device ID", "Solar radiation"]


def test_a_formula_without_an_answer_spoils_its_field_and_no_other():
    # A thermistor that is torn off: the bridge ratio is 0, the logarithm has no answer.
    got = {
        d.name: d.value
        for d in _DECODERS["decentlab/blg"].decode(examples.raw_message(bytes.fromhex("0230c50003000000800c60")))
    }
    assert math.isnan(got["Temperature"])
    assert math.isnan(got["Thermistor resistance"])
    assert got["Battery voltage"] == 3.168


def test_payload_text_is_hexadecimal_or_base64():
    source = {"fields": [{"name": "a", "type": "u16"}]}
    assert values(source, "0102") == values(source, b"\x01\x02") == {"a": 258}
    assert TableDecoder(source).decode(examples.raw_message("AQI="))[0].value == 258
    for payload in ("no payload", {"a": 1}, 5, None):
        with pytest.raises(Reject) as e:
            TableDecoder(source).decode(examples.raw_message(payload))
        assert e.value.code == ReasonCode.DECODE_FAILED


def test_rest_is_refused_unless_it_is_ignored():
    fields = [{"name": "a", "type": "u8"}]
    with pytest.raises(Reject, match="1 bytes after the end of the format, at byte 1"):
        decode({"fields": fields}, "0102")
    assert values({"fields": fields, "rest": "ignore"}, "0102") == {"a": 1}


def test_invalid_numbers_say_not_measured():
    source = {"fields": [{"name": "a", "type": "i16", "invalid": [-32768, 32767]}, {"name": "b", "type": "u8"}]}
    assert values(source, "8000 01") == {"b": 1}
    assert values(source, "7ffe 01") == {"a": 32766, "b": 1}


def test_ports_choose_a_format():
    source = {"ports": {"1": [{"name": "a", "type": "u8"}], "0x02": [{"name": "b", "type": "u8"}]}}
    assert values(source, "05", port=2) == {"b": 5}
    with pytest.raises(Reject, match="nothing is known of port 3"):
        decode(source, "05", port=3)
    source["ports"]["default"] = []
    assert values(source, "", port=3) == {}


def test_scale_div_offset_and_round_in_this_order():
    source = {
        "fields": [{"name": "a", "type": "u8", "expr": "x + 1", "scale": 3, "div": 2, "offset": -0.05, "round": 1}]
    }
    assert values(source, "01") == {"a": 3.0}


def test_an_integer_stays_an_integer_and_a_wide_one_becomes_a_float():
    source = {
        "fields": [
            {"name": "a", "type": "u64", "scale": 2},
            {"name": "b", "expr": "a * a"},
            {"name": "c", "expr": "b * b * b"},
        ]
    }
    got = values(source, "ffffffffffffffff")
    assert got["a"] == 2 * (2**64 - 1)
    assert isinstance(got["a"], int)
    assert isinstance(got["c"], float)


def test_whole_numbers_cannot_grow_from_field_to_field():
    # Squared 40 times, a whole number of 8 bits would have 8 · 2^40.
    fields = [{"name": "a0", "type": "u8"}] + [{"name": f"a{i + 1}", "expr": f"a{i} * a{i}"} for i in range(40)]
    got = values({"fields": fields}, "ff")
    assert math.isinf(got["a40"]) or math.isnan(got["a40"])


@pytest.mark.parametrize(
    "source",
    [
        {"fields": [{"repeat": 10**9, "fields": [{"name": "a", "expr": "i"}]}]},
        {"fields": [{"repeat": 2000, "fields": [{"repeat": 2000, "fields": []}]}]},
        {"fields": [{"name": "n", "type": "u32"}, {"repeat": "n", "fields": []}]},
    ],
)
def test_a_payload_cannot_make_a_loop_turn_for_ever(source):
    with pytest.raises(Reject) as e:
        decode(source, "ffffffff")
    assert e.value.code == ReasonCode.DECODE_LIMIT
    assert str(TURNS_MAX) in str(e.value)


def test_a_turn_that_takes_nothing_ends_the_payload():
    source = {"fields": [{"repeat": "end", "fields": [{"name": "a", "expr": "1"}]}]}
    with pytest.raises(Reject) as e:
        decode(source, "00")
    assert e.value.code == ReasonCode.DECODE_FAILED


@pytest.mark.parametrize("length", ["0 - 1", "1 / 0", "1e300", "log(0 - 1)"])
def test_a_length_without_an_answer_refuses_the_payload(length):
    with pytest.raises(Reject) as e:
        decode({"fields": [{"name": "a", "type": "hex", "length": length}]}, "00")
    assert e.value.code == ReasonCode.DECODE_FAILED


def test_a_time_far_away_refuses_the_payload():
    with pytest.raises(Reject, match="out of range"):
        decode({"fields": [{"name": "t", "type": "u64", "time": "s"}]}, "ff" * 8)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({}, "either `fields` or `ports`"),
        ({"fields": [], "ports": {}}, "either `fields` or `ports`"),
        ({"fields": {}}, "a list of items"),
        ({"fields": [5]}, "fields[0]: an item is a mapping"),
        ({"fields": [{"name": "a"}]}, "neither a field"),
        ({"fields": [{"name": "a", "type": "u12"}]}, "not of whole bytes"),
        ({"fields": [{"name": "a", "type": "u136"}]}, "not of whole bytes"),
        ({"fields": [{"name": "a", "type": "quux"}]}, "is not u8"),
        ({"fields": [{"name": "a", "type": "bcd3"}]}, "even"),
        ({"fields": [{"type": "u8"}]}, "a name"),
        ({"fields": [{"name": "a", "type": "u8", "scal": 2}]}, "scal is not known"),
        ({"fields": [{"name": "a", "type": "u8", "scale": "2"}]}, "is not a number"),
        ({"fields": [{"name": "a", "type": "u8", "div": 0}]}, "is 0"),
        ({"fields": [{"name": "a", "type": "u8", "expr": "b"}]}, "fields[0] (a).expr: 'b': b is not known here"),
        ({"fields": [{"name": "a", "type": "u8", "expr": "a"}]}, "a is not known here"),
        ({"fields": [{"name": "a", "type": "u8", "expr": "x.real"}]}, "Attribute is not allowed"),
        ({"fields": [{"name": "a", "type": "string"}]}, "needs a length"),
        ({"fields": [{"name": "a", "type": "string", "at": 0, "length": "end"}]}, "length"),
        ({"fields": [{"name": "a", "type": "u8", "length": 3}]}, "has its length in its name"),
        ({"fields": [{"name": "a", "type": "u8", "at": "x"}]}, "a byte offset"),
        ({"fields": [{"name": "a", "type": "u8", "endian": "middle"}]}, "'middle' is not one of"),
        ({"fields": [{"name": "a", "type": "u24", "endian": "words-little"}]}, "whole 16-bit words"),
        ({"fields": [{"name": "a", "type": "u8", "bits": [{"name": "b", "bits": [4, 8]}]}]}, "bits 4 to 8 of a number of 8"),
        ({"fields": [{"name": "a", "type": "u8", "bits": [{"name": "b"}]}]}, "`bit: n`"),
        ({"fields": [{"name": "a", "type": "u8", "enum": {"x": "y"}}]}, "is not a whole number"),
        ({"fields": [{"name": "{b}", "type": "u8"}]}, "{b} is not known here"),
        ({"fields": [{"when": "b", "fields": []}]}, "b is not known here"),
        ({"fields": [{"when": "1", "fields": [{"name": "a", "type": "u8"}]}, {"name": "b", "expr": "a"}]}, "a is not known here"),
        ({"fields": [{"switch": "1", "cases": {}}]}, "cases: a mapping"),
        ({"fields": [{"switch": "1", "cases": {"a": []}}]}, "is not a whole number"),
        ({"fields": [{"name": "s", "type": "string", "length": 2, "scale": 2}]}, "text has no scale"),
        ({"fields": [{"name": "a", "type": "u8", "time": "weeks"}]}, "'weeks' is not one of"),
        ({"fields": [{"name": "a", "type": "u8", "equals": {}}]}, "numbers or text"),
        ({"fields": [{"name": "a", "type": "f32", "equals": float("inf")}]}, "equals: inf is not a number"),
        ({"fields": [{"name": "a", "type": "f32", "equals": [1, float("nan")]}]}, "equals: nan is not a number"),
        ({"parameters": {"k": 10**400}, "fields": [{"name": "a", "type": "u8"}]}, "000 is not a number"),
        ({"fields": [{"name": "a", "expr": "1", "equals": 1}]}, "is of a field that is read"),
        ({"fields": [], "parameters": {"a b": 1}}, "is not an identifier"),
        ({"fields": [], "parameters": {"a": "x"}}, "is not a number"),
        ({"fields": [{"name": "a", "type": "u8"}] * 2001}, "more than 2000 items"),
        ({"ports": {}}, "ports: a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named_with_its_place(source, says):
    assert says in wrong(source)


def test_levels_are_limited():
    fields = [{"name": "a", "type": "u8"}]
    for _ in range(9):
        fields = [{"repeat": 1, "fields": fields}]
    assert "levels" in wrong({"fields": fields})


def test_names_in_a_table_reach_no_generated_name():
    # "b", "out", "n", "p" and "D" are variables of the generated function.
    for name in ("b", "out", "n", "p", "D", "ERRORS", "from_bytes", "r1", "_pow", "__builtins__"):
        assert "not known here" in wrong({"fields": [{"name": "v", "type": "u8"}, {"name": "a", "expr": name}]})


@pytest.mark.parametrize("text", ["'); import os; ('", '"""', "\\", "\n", "{{", "' + str(1) + '", "a\0b"])
def test_names_and_units_are_only_text(text):
    source = {"fields": [{"name": text + "n", "key": "k", "type": "u8", "unit": text, "pin": text, "enum": {1: text}}]}
    (field,) = decode(source, "01")
    assert (field.name, field.unit, field.pin, field.value) == (text + "n", text, text, text or "1")


def test_a_parser_that_cannot_be_used_is_a_reject():
    with pytest.raises(Reject) as e:
        compile_parser({"name": "p", "version": 1, "kind": "table", "source": {"fields": [{"name": "a"}]}})
    assert e.value.code == ReasonCode.NO_PARSER
    with pytest.raises(Reject) as e:
        compile_parser({"name": "p", "version": 1, "kind": "cobol", "source": {}})
    assert e.value.code == ReasonCode.NO_PARSER


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("CH4: NO2 (we)", "ch4_no2_we"),
        ("Température", "temp_rature"),
        ("10th percentile", "n10th_percentile"),
        ("µm", "um"),
    ],
)
def test_slug(name, key):
    assert slug(name) == key


def test_variables_of_a_device_stand_for_parameters():
    doc = TABLES["decentlab/pr36"]
    payload = bytes.fromhex(doc["examples"][0]["hex"])
    given = compile_parser(doc, {"kp": 4096, "unused": "x"}).decode(examples.raw_message(payload))
    standard = _DECODERS["decentlab/pr36"].decode(examples.raw_message(payload))
    assert {d.name: d.value for d in given}["Pressure"] == 2 * {d.name: d.value for d in standard}["Pressure"]
