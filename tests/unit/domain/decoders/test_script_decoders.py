"""The two pure ends of a parser script's call."""

import orjson
import pytest

from preservarium.domain.decoders.base import Decoded, ParserError
from preservarium.domain.decoders.scripts import DEPTH_MAX, compile_script
from preservarium.errors import ReasonCode, Reject


def parser(kind="javascript", **variables):
    return compile_script({"kind": kind, "name": "p", "version": 3, "source": "…"}, variables)


def raw(payload=b"\x01\x02", **fields):
    return {
        "device": "d1", "received_at": 1_700_000_000_123_456, "connector": "c", "mode": "LoRaWAN", "topic": "t", "port": 5,
        "payload": payload, "meta": {}, "experiment_id": None, "raw_partition": 0, "raw_offset": 0, "raw_index": 0, "generation": 0,
        **fields,
    }  # fmt: skip


def test_javascript_is_given_what_ts013_says():
    given = orjson.loads(parser(offset=4).arguments(raw()))
    assert given == {"bytes": [1, 2], "fPort": 5, "recvTime": "2023-11-14T22:13:20.123Z", "variables": {"offset": 4}}


def test_python_is_given_the_payload_and_a_context():
    given = orjson.loads(parser("python").arguments(raw(payload={"t": 1})))
    assert given["payload"] == {"t": 1}
    assert given["context"]["device"] == "d1"
    assert given["context"]["port"] == 5


def test_nested_results_become_dotted_fields_and_measurements_keep_their_unit():
    text = orjson.dumps(
        {"data": {"a": 1, "b": {"c": "on", "d": [True, None, 2.5]}, "m": {"displayName": "M", "value": 3, "unit": "V"}}}
    ).decode()
    assert parser().fields(text) == [
        Decoded("a", 1, None, None, None),
        Decoded("b.c", "on", None, None, None),
        Decoded("b.d.0", True, None, None, None),
        Decoded("b.d.2", 2.5, None, None, None),
        Decoded("m", 3, "V", None, None),
    ]


def test_a_python_list_carries_unit_time_and_pin():
    rows = [
        {"name": "t", "value": 1.5, "unit": "Cel", "timestamp": 1_700_000_000, "pin": 2},
        {"name": "u", "value": "x"},
    ]
    assert parser("python").fields(orjson.dumps(rows).decode()) == [
        Decoded("t", 1.5, "Cel", 1_700_000_000_000_000, "2"),
        Decoded("u", "x", None, None, None),
    ]


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("javascript", {"errors": ["unknown port"]}),
        ("javascript", {"data": None}),
        ("javascript", {"data": {}}),
        ("javascript", 5),
        ("javascript", None),
        ("python", []),
        ("python", [{"value": 1}]),
        ("python", [{"name": "a", "value": [1]}]),
        ("python", [{"name": "a", "value": 1, "timestamp": "yesterday"}]),
        ("python", ["a"]),
    ],
)
def test_a_result_without_values_is_a_reasoned_refusal(kind, result):
    with pytest.raises(Reject) as e:
        parser(kind).fields(orjson.dumps(result).decode())
    assert e.value.code is ReasonCode.DECODE_FAILED


def test_nesting_ends_at_the_limit():
    value: object = 1
    for _ in range(DEPTH_MAX + 5):
        value = {"x": value}
    with pytest.raises(Reject):
        parser().fields(orjson.dumps({"data": value}).decode())


def test_a_script_without_a_source_is_refused():
    with pytest.raises(ParserError):
        compile_script({"kind": "javascript", "name": "p", "version": 1, "source": " "})
