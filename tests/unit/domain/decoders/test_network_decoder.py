"""What the network's own codec made of a payload; and lists in JSON where a value belongs."""

from typing import Any

import orjson
import pytest

from preservarium.domain.decoders.base import Decoded
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.domain.decoders.scripts import compile_script
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.errors import Reject


def raw(payload: Any, **meta: Any) -> Any:
    return {
        "device": "d1", "received_at": 1_795_000_000_000_000, "connector": "x", "mode": "", "topic": "", "port": 2, "payload": payload, "meta": meta,
        "experiment_id": None, "raw_partition": 0, "raw_offset": 0, "raw_index": 0, "generation": 0,
    }  # fmt: skip


def parser(kind: str, source: Any = None) -> Any:
    return {"name": "p", "version": 1, "rev": 1, "status": "active", "hash": "h", "kind": kind, "source": source or {}}


def compiled(kind: str, source: Any = None) -> Any:
    device: Any = {"device_id": "d1", "rev": 1, "type": "t", "enabled": True}
    return compile_device(
        device, {"name": "t", "rev": 1, "manufacturer": "m", "parser": "p"}, parser(kind, source), lambda name: None
    )


def fields(kind: str, source: Any, message: Any) -> list[tuple[Any, ...]]:
    return [
        (f.name, f.value, f.pin) if isinstance(f, Decoded) else (str(f),)
        for f in compile_parser(parser(kind, source)).decode(message)
    ]


DECODED = {
    "BatV": 3.301,
    "temp_SOIL": "13.25",
    "inner": {"a": 1},
    "list": [1, {"b": 2}],
    "t": {"value": 21.5, "unit": "°C"},
    "none": None,
}


@pytest.mark.parametrize(
    "message", [raw(b"\x01", decoded=DECODED), raw(DECODED), raw(orjson.dumps({"x": 1}), decoded=DECODED)]
)
def test_without_a_source_the_fields_are_those_of_the_codec_here(message):
    here = compile_script(parser("javascript", "x")).fields(orjson.dumps({"data": DECODED}).decode())
    assert list(compile_parser(parser("network")).decode(message)) == here
    assert Decoded("t", 21.5, "°C", None, None) in here


def test_a_source_is_that_of_a_json_parser():
    source = {"fields": [{"path": "inner.a", "name": "a"}, {"path": "list[0]", "name": "first"}]}
    assert fields("network", source, raw(b"\x01", decoded=DECODED)) == [("a", 1, None), ("first", 1, None)]


@pytest.mark.parametrize("message", [raw(b"\x01"), raw(b""), raw(b"\x01", decoded=None)])
def test_where_the_network_decoded_nothing_it_says_so(message):
    with pytest.raises(Reject, match="the network sent the payload alone"):
        compile_parser(parser("network")).decode(message)


@pytest.mark.parametrize("decoded", [{}, {"a": None}, {"a": {}}, [], "x", 5])
def test_what_holds_no_value_becomes_no_message(decoded):
    with pytest.raises(Reject):
        normalize(raw(b"\x01", decoded=decoded), compiled("network"), 0)


@pytest.mark.parametrize("decoded", [{"temperature": 21.5, "battery": 90}, DECODED])
def test_a_message_of_the_network_becomes_readings(decoded):
    message, refused = normalize(raw(b"\x01\x02", decoded=decoded, time=1_795_000_000_500_000), compiled("network"), 0)
    assert (message["timestamp"], message["clock"], refused) == (1_795_000_000_500_000, "device", ())
    assert len(message["readings"]) == (2 if decoded is not DECODED else 6)


# --- lists in JSON -----------------------------------------------------------------------------------------------------

METER = {"ENERGY": {"Total": [2.813, 0.254], "Power": [52, 5], "Voltage": 235, "Current": [0.278, None, 0.044]}}
PATHS = {"fields": [{"path": f"ENERGY.{name}", "name": name.lower()} for name in ("Power", "Voltage", "Current")]}


def test_the_elements_of_a_list_are_pins():
    assert fields("json", PATHS, raw(METER)) == [
        ("power", 52, "0"), ("power", 5, "1"), ("voltage", 235, None), ("current", 0.278, "0"), ("current", 0.044, "2"),
    ]  # fmt: skip
    assert fields("json", {}, raw(METER))[:3] == [
        ("ENERGY.Total", 2.813, "0"),
        ("ENERGY.Total", 0.254, "1"),
        ("ENERGY.Power", 52, "0"),
    ]


@pytest.mark.parametrize(
    ("power", "found"),
    [
        ([], []),
        ([52, {"w": 5}], [("power", 52, "0"), ("ENERGY.Power is an object, not a value",)]),
        ([[1, 2]], [("ENERGY.Power is a list, not a value",)]),
        ([52, "x" * 5_000], [("power", 52, "0"), ("ENERGY.Power is a text of 5000 characters",)]),
        ({"w": 5}, [("ENERGY.Power is an object, not a value",)]),
        ([None, None], []),
        (["52", True], [("power", "52", "0"), ("power", True, "1")]),
    ],
)
def test_what_cannot_be_read_loses_its_field_and_not_the_message(power, found):
    message = {"ENERGY": {**METER["ENERGY"], "Power": power}}
    expected = [*found, ("voltage", 235, None), ("current", 0.278, "0"), ("current", 0.044, "2")]
    assert fields("json", PATHS, raw(message)) == expected


def test_scale_and_pin_of_a_field_hold_for_lists():
    scaled = {"fields": [{"path": "Power", "scale": 0.1}]}
    assert fields("json", scaled, raw({"Power": [3, 20]})) == [("Power", 0.3, "0"), ("Power", 2.0, "1")]
    fixed = {"fields": [{"path": "Power", "pin": "a"}]}
    assert fields("json", fixed, raw({"Power": [3]})) == [("Power", 3, "a")]
    # Of several values one pin cannot be all.
    assert fields("json", {"fields": [*fixed["fields"], {"path": "V"}]}, raw({"Power": [3, 4], "V": 1})) == [
        ("Power is a list, not a value",),
        ("V", 1, None),
    ]


def test_a_list_in_an_element_of_each_has_pins_below_the_elements():
    source = {"each": [{"path": "rooms[*]", "name": "{type}", "fields": [{"path": "values"}]}]}
    message = {"rooms": [{"type": "t", "values": [20, 21]}, {"type": "t", "values": 22}]}
    assert fields("json", source, raw(message)) == [
        ("t", 20, "0.0"),
        ("t", 21, "0.1"),
        ("t", 22, "1"),
    ]


def test_readings_of_a_list_are_series_of_their_own():
    message, refused = normalize(raw(METER), compiled("json", PATHS), 0)
    assert refused == ()
    assert [(r["component_type"], r["pin_position"], r["value"]) for r in message["readings"]] == [
        ("power", "0", 52), ("power", "1", 5), ("voltage", "-1", 235), ("current", "0", 0.278), ("current", "2", 0.044),
    ]  # fmt: skip
