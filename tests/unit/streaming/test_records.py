"""The NDJSON mapping: what we write survives, what strangers write never stops a partition."""

import itertools
import json
from base64 import b64decode
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_fakes import RawRec as Rec

from preservarium import topics
from preservarium.errors import ReasonCode, Reject
from preservarium.streaming import records
from preservarium.streaming.stage import Batch

NOW_US = 1_700_000_000_000_000
PAYLOAD_MAX = 4_096
RAW = topics.RAW.name


def parse(value: bytes | None, key: bytes | None = None, **kwargs: Any):
    return records.parse_raw(Rec(value, key, **kwargs), RAW, 3, payload_bytes_max=PAYLOAD_MAX)


def envelope(**fields: Any) -> bytes:
    return json.dumps({"device": "d1", "payload": {"t": 1}, **fields}).encode()


def codes(errors) -> list[str]:
    return [e["code"] for e in errors]


# --- round trips ---

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20),
)
json_values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), inner, max_size=4
        ),
    ),
    max_leaves=12,
)
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
devices = names.filter(lambda s: s.strip())
raw_messages = st.fixed_dictionaries(
    {
        "device": devices,
        "payload": st.one_of(st.binary(max_size=60), json_values),
        "received_at": st.integers(946_684_800_000_000, 4_102_444_800_000_000),
        "connector": names,
        "mode": names,
        "topic": names,
        "port": st.one_of(st.none(), st.integers(0, 255)),
        "meta": st.dictionaries(st.text("abc", max_size=3), scalars, max_size=3),
        "experiment_id": st.one_of(st.none(), names),
    }
)


@given(st.lists(raw_messages, min_size=1, max_size=8))
def test_any_raw_messages_survive_a_record(messages):
    value = b"\n".join(records.raw_line(**m) for m in messages)
    parsed, errors = records.parse_raw(Rec(value), RAW, 3, payload_bytes_max=100_000)
    assert errors == []
    expected = [
        {**m, "raw_partition": 3, "raw_offset": 7, "raw_index": i, "generation": 0} for i, m in enumerate(messages)
    ]
    assert parsed == expected


@given(
    st.lists(
        st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), min_size=1, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_any_lines_survive_pack_and_parse(lists):
    lists = orjson.loads(orjson.dumps(lists))  # integers beyond 64 bits are floats after the first reading
    batch = Batch("iot_validated_data", 0, [Rec(records.pack(lines), offset=i) for i, lines in enumerate(lists)])
    assert records.parse_trusted(batch) == (lists, [])


@given(
    st.lists(st.dictionaries(st.text("ab\n", max_size=5), st.text(max_size=20), max_size=3), max_size=12),
    st.integers(150, 400),
)
def test_split_keeps_every_line_in_order_and_under_the_limit(lines, limit):
    limit = max([limit, *(len(orjson.dumps(line)) for line in lines)])
    values = list(records.split(lines, limit))
    assert [orjson.loads(line) for value in values for line in value.split(b"\n")] == lines
    assert all(len(value) <= limit for value in values)
    # no two neighbours would have fitted into one
    assert all(len(a) + 1 + len(b.split(b"\n")[0]) > limit for a, b in itertools.pairwise(values))


def test_split_refuses_a_line_that_no_record_can_hold():
    with pytest.raises(Reject) as caught:
        records.split([{"a": 1}, {"a": "x" * 100}], 50)
    assert caught.value.code is ReasonCode.OUTPUT_TOO_LARGE


# --- strangers ---

hostile = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            json_values.map(lambda v: json.dumps(v).encode()),
            st.builds(
                lambda fields: json.dumps({"device": "d", "payload": 1, **fields}).encode(),
                st.dictionaries(
                    st.sampled_from(
                        [
                            "device",
                            "payload",
                            "payload_b64",
                            "received_at",
                            "port",
                            "meta",
                            "topic",
                            "mode",
                            "connector",
                            "experiment_id",
                        ]
                    ),
                    st.one_of(json_values, st.integers(), st.text()),
                    max_size=5,
                ),
            ),
        ),
        max_size=5,
    ).map(b"\n".join),
)


@given(
    hostile,
    st.one_of(st.none(), st.binary(max_size=12)),
    st.integers(-(2**62), 2**62),
    st.lists(st.tuples(st.sampled_from(["generation", "x"]), st.binary(max_size=12)), max_size=2),
)
@settings(max_examples=500)
def test_any_bytes_become_messages_or_error_lines_and_never_raise(value, key, timestamp, headers):
    messages, errors = parse(value, key, timestamp=timestamp, headers=tuple(headers))
    # Every line with something in it is accounted for at least once; none is both message and error.
    assert messages or errors
    assert not {m["raw_index"] for m in messages} & {e["index"] for e in errors}
    for message in messages:
        assert 0 < len(message["device"]) <= records.DEVICE_CHARS_MAX
        assert "\0" not in message["device"]
        orjson.dumps({**message, "payload": None})
    for error in errors:
        assert error["code"] in set(ReasonCode)
        assert len(records.error_send(error).value or b"") <= records.RECORD_BYTES_MAX


@given(st.lists(hostile, min_size=1, max_size=4))
def test_one_record_never_leaks_into_the_next(values):
    batch = Batch("t", 0, [Rec(v, offset=i) for i, v in enumerate(values)])
    together, _ = records.parse_trusted(batch)
    alone = [records.parse_trusted(Batch("t", 0, [r]))[0][0] for r in batch.records]
    assert len(together) == len(values)
    if all(alone):
        assert together == alone


def test_a_record_that_would_swallow_its_neighbour_fails_alone():
    batch = Batch("t", 2, [Rec(b'{"a":"x', offset=1), Rec(b'y"}', offset=2), Rec(b'{"b":1}\n{"c":2}', offset=3)])
    lines, errors = records.parse_trusted(batch)
    assert lines == [[], [], [{"b": 1}, {"c": 2}]]
    assert [(e["offset"], e["code"], e["raw"]) for e in errors] == [
        (1, "envelope_not_json", '{"a":"x'),
        (2, "envelope_not_json", 'y"}'),
    ]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"device":"d1","payl', ReasonCode.ENVELOPE_NOT_JSON),
        (b'{"device":"d1","payload":"\xff\xfe"}', ReasonCode.ENVELOPE_NOT_UTF8),
        (b'{"device":"d1","payload":"a\x00b"}', ReasonCode.ENVELOPE_NOT_UTF8),
        (b'{"device":"d1","payload":"a\\u0000b"}', ReasonCode.ENVELOPE_NOT_UTF8),
        (b'{"device":"d1","payload":"\\ud800"}', ReasonCode.ENVELOPE_NOT_UTF8),
        (b'{"device":"d1","payload":' + b"[" * 64 + b"]" * 64 + b"}", ReasonCode.ENVELOPE_TOO_DEEP),
        (b'{"device":"d1","payload":' + b"[" * 5000, ReasonCode.ENVELOPE_TOO_DEEP),
        (envelope(payload="x" * (PAYLOAD_MAX + 1)), ReasonCode.ENVELOPE_TOO_LARGE),
        (envelope(payload="x" * 200_000), ReasonCode.ENVELOPE_TOO_LARGE),
        (b'{"device":"d1","payload_b64":"' + b"AAAA" * 1_400 + b'"}', ReasonCode.ENVELOPE_TOO_LARGE),
        (envelope(payload_b64="AA=="), ReasonCode.ENVELOPE_INVALID),
        (b'{"device":"d1","payload_b64":"AA=A"}', ReasonCode.ENVELOPE_INVALID),
        (b'{"device":"d1","payload_b64":"AA"}', ReasonCode.ENVELOPE_INVALID),
        (b'{"device":"d1","payload_b64":"A A="}', ReasonCode.ENVELOPE_INVALID),
        (b'{"device":"d1","payload_b64":"\xc3\xa4AA="}', ReasonCode.ENVELOPE_INVALID),
        (b'{"device":"d1","payload_b64":7}', ReasonCode.ENVELOPE_INVALID),
        (b'{"device":"d1","payload_b64":null}', ReasonCode.ENVELOPE_INVALID),
        (envelope(device=7), ReasonCode.ENVELOPE_INVALID),
        (envelope(device="x" * 256), ReasonCode.ENVELOPE_INVALID),
        (envelope(device="a\nb"), ReasonCode.ENVELOPE_INVALID),
        (envelope(device="  "), ReasonCode.ENVELOPE_INVALID),
        (envelope(device=""), ReasonCode.ENVELOPE_NO_DEVICE),
        (envelope(device=None), ReasonCode.ENVELOPE_NO_DEVICE),
        (envelope(port=256), ReasonCode.ENVELOPE_INVALID),
        (envelope(port=True), ReasonCode.ENVELOPE_INVALID),
        (envelope(port="1"), ReasonCode.ENVELOPE_INVALID),
        (envelope(meta=[1]), ReasonCode.ENVELOPE_INVALID),
        (envelope(topic="t" * 1_025), ReasonCode.ENVELOPE_INVALID),
        (envelope(mode=1), ReasonCode.ENVELOPE_INVALID),
        (envelope(experiment_id={}), ReasonCode.ENVELOPE_INVALID),
        (b'"word"', ReasonCode.ENVELOPE_INVALID),
        (b"12", ReasonCode.ENVELOPE_INVALID),
        (b"garbage", ReasonCode.ENVELOPE_NOT_JSON),
        (b'{"t":1}', ReasonCode.ENVELOPE_NO_DEVICE),
    ],
)
def test_a_bad_line_is_refused_with_its_code_and_its_neighbours_live(line, code):
    value = b"\n".join([envelope(device="before"), line, b"", envelope(device="after")])
    messages, errors = parse(value)
    assert [(m["device"], m["raw_index"]) for m in messages] == [("before", 0), ("after", 3)]
    assert codes(errors) == [code]
    error = errors[0]
    assert (error["index"], error["raw_partition"], error["raw_offset"], error["raw_index"]) == (1, 3, 7, 1)
    kept = error["raw"].encode() if "raw" in error else b64decode(error["raw_b64"])
    assert kept == line


def test_a_line_that_names_its_device_says_so_in_the_error():
    _, errors = parse(envelope(port=999), key=b"gateway")
    assert errors[0]["device_id"] == "d1"
    assert records.error_send(errors[0]).key == b"d1"


@pytest.mark.parametrize("value", [None, b"", b" \n\n"])
def test_a_record_without_a_value_is_an_error(value):
    messages, errors = parse(value, b"d1")
    assert (messages, codes(errors)) == ([], ["envelope_invalid"])


@pytest.mark.parametrize(
    ("value", "payloads"),
    [
        (b'{"t": 21.5}', [{"t": 21.5}]),
        (b"[1, 2]", [[1, 2]]),
        (b'{\n  "t": 21.5,\n  "u": [\n    1\n  ]\n}\n', [{"t": 21.5, "u": [1]}]),
        (b'{"t":1}\r\n{"t":2}\n', [{"t": 1}, {"t": 2}]),
        (b"\x02\x02\xdf\x00\x03", [b"\x02\x02\xdf\x00\x03"]),
        (b"\x00\n\x01\n", [b"\x00\n\x01\n"]),
        (b"21.5", [b"21.5"]),
        (b"{", [b"{"]),
        (b"[\x01\x02", [b"[\x01\x02"]),
        (b'{"device":"other"}', [{"device": "other"}]),
    ],
)
def test_a_foreign_record_is_the_payload_of_the_device_that_its_key_names(value, payloads):
    messages, errors = parse(value, b"A8-40")
    assert errors == []
    assert [m["payload"] for m in messages] == payloads
    assert {(m["device"], m["connector"], m["mode"], m["received_at"]) for m in messages} == {
        ("A8-40", "kafka", "", NOW_US)
    }


@pytest.mark.parametrize("key", [None, b"", b"\xff\xfe", b"a\x00", b"x" * 300])
@pytest.mark.parametrize("value", [b'{"t":1}', b"\x01\x02", b"[1]"])
def test_a_foreign_record_without_a_usable_key_has_no_device(value, key):
    messages, errors = parse(value, key)
    assert (messages, codes(errors)) == ([], ["envelope_no_device"])


@pytest.mark.parametrize("value", [b'{"t": 1', b'{"t": 1, "u', b'[{"t": 1}, {', b'{"t":\x001}', b'{"t":"\xff"}'])
def test_torn_json_is_not_taken_for_a_payload(value):
    messages, errors = parse(value, b"d1")
    assert messages == []
    assert codes(errors)[0] in ("envelope_not_json", "envelope_not_utf8")


def test_every_line_of_a_torn_file_is_named():
    _, errors = parse(b'{"t": 1\n{"t": 2', b"d1")
    assert [(e["index"], e["raw"]) for e in errors] == [(0, '{"t": 1'), (1, '{"t": 2')]


def test_a_null_device_is_named_by_the_key_and_else_the_envelope_wins():
    messages, _ = parse(envelope(device=None) + b"\n" + envelope(device="own"), key=b"keyed")
    assert [m["device"] for m in messages] == ["keyed", "own"]


@pytest.mark.parametrize(
    ("given", "us"),
    [
        (None, NOW_US), (NOW_US - 5, NOW_US - 5), (1.7e15, NOW_US), ("2024-01-01T00:00:00Z", 1_704_067_200_000_000), ("2024-01-01t00:00:00.1234569z", 1_704_067_200_123_456),
        (1_600_000_000, 1_600_000_000_000_000), (1_600_000_000_123, 1_600_000_000_123_000), (1_600_000_000_123_456_789, 1_600_000_000_123_456), ("1600000000.5", 1_600_000_000_500_000),
    ],
)  # fmt: skip
def test_received_at_is_honoured_however_it_is_written(given, us):
    messages, errors = parse(envelope(received_at=given))
    assert (messages[0]["received_at"], errors) == (us, [])


@pytest.mark.parametrize(
    "given", [0, -1, True, 2**63, "", "soon", "1_600_000_000", [], {}, 946_684_799, "2100-01-02T00:00:00Z"]
)
def test_a_received_at_that_is_no_instant_is_refused_with_its_reason(given):
    messages, errors = parse(envelope(received_at=given))
    assert (messages, codes(errors)) == ([], ["timestamp_invalid"])
    assert "instant" in errors[0]["message"] or "outside" in errors[0]["message"]


def test_without_any_instant_a_line_is_refused():
    _, errors = parse(envelope(), timestamp=-1)
    assert codes(errors) == ["timestamp_invalid"]


@pytest.mark.parametrize(
    ("header", "generation"),
    [(b"3", 3), (b"", 0), (b"-1", 0), (b"1_0", 0), (b"x", 0), (b"9" * 40, 0), (b"2147483648", 0), (b"\xb2", 0)],
)
def test_generation_is_read_from_the_header(header, generation):
    messages, _ = parse(envelope(), headers=(("x", b"1"), ("generation", header)))
    assert messages[0]["generation"] == generation


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"device": ""}, ReasonCode.ENVELOPE_NO_DEVICE),
        ({"device": "a\0"}, ReasonCode.ENVELOPE_NOT_UTF8),
        ({"device": "\ud800"}, ReasonCode.ENVELOPE_INVALID),
        ({"port": 300}, ReasonCode.ENVELOPE_INVALID),
        ({"payload": {1, 2}}, ReasonCode.ENVELOPE_INVALID),
        ({"payload": b"x" * 11, "payload_bytes_max": 10}, ReasonCode.ENVELOPE_TOO_LARGE),
        ({"payload": json.loads("[" * 64 + "]" * 64)}, ReasonCode.ENVELOPE_TOO_DEEP),
        ({"payload": json.loads("[" * 500 + "]" * 500)}, ReasonCode.ENVELOPE_TOO_DEEP),
        ({"received_at": 1_700_000_000}, ReasonCode.TIMESTAMP_INVALID),
    ],
)
def test_a_connector_is_told_at_the_door_what_cannot_be_a_line(fields, code):
    arguments = {"device": "d", "payload": 1, "received_at": NOW_US, "connector": "http", "mode": "HTTP", **fields}
    with pytest.raises(Reject) as caught:
        records.raw_line(arguments.pop("device"), arguments.pop("payload"), **arguments)
    assert caught.value.code is code


@pytest.mark.parametrize("raw", [b"x" * 2_000_000, b"\x01" * 640_000, b"\xff" * 700_000, "é".encode() * 400_000])
@pytest.mark.parametrize("limit", [records.RECORD_BYTES_MAX, 10_000])
def test_an_error_line_always_fits_a_record_and_keeps_its_reason(raw, limit):
    line = records.error_line(
        "s", ReasonCode.HANDLER_FAILED, "m" * 5_000, topic="t", partition=0, offset=1, raw=raw, now_us=NOW_US
    )
    send = records.error_send(line, record_bytes_max=limit)
    assert send.value is not None
    assert len(send.value) <= limit
    assert send.key is None
    parsed = orjson.loads(send.value)
    assert parsed["code"] == "handler_failed"
    kept = parsed["raw"].encode() if "raw" in parsed else b64decode(parsed["raw_b64"])
    assert raw.startswith(kept)
    assert len(kept) == len(raw) or f"of {len(raw)} bytes kept" in parsed["message"] or limit == 10_000


def test_headers_that_a_stage_passes_on():
    record = Rec(b"{}", headers=(("trace", b"00-ab"), ("other", b"x"), ("generation", b"2")))
    assert records.headers_of(record) == (("trace", b"00-ab"), ("generation", b"2"))
    assert records.message_count([Rec(b"{}\n{}"), Rec(None), record]) == 3


def test_payload_of_tells_json_from_bytes():
    assert records.payload_of(b'{"a":1}') == {"a": 1}
    assert records.payload_of(b"[1]") == [1]
    assert records.payload_of(b"12") == b"12"
    assert records.payload_of(b'{"a":') == b'{"a":'
