import copy
import math

import pytest

from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import Decoded
from preservarium.domain.readings.mapping import Mapper, default_component
from preservarium.domain.readings.normalize import compile_device, normalize, standardize
from preservarium.errors import ReasonCode, Reject

T = examples.RECEIVED_AT_US
DATATYPES = {
    "air_temperature": {"name": "air_temperature", "rev": 1, "kind": "number", "unit": "°C"},
    "humidity": {"name": "humidity", "rev": 1, "kind": "number", "unit": "%"},
    "pressure": {"name": "pressure", "rev": 1, "kind": "number", "unit": "hPa"},
    "door": {"name": "door", "rev": 1, "kind": "boolean", "unit": ""},
    "state": {"name": "state", "rev": 1, "kind": "text", "unit": ""},
}
TYPE = {
    "name": "t", "rev": 1, "manufacturer": "m", "parser": "p", "mode": "LoRaWAN",
    "mapping": {"temp": {"component_type": "air_temperature"}, "secret": None},
}  # fmt: skip
DEVICE = {"device_id": "d1", "rev": 7, "type": "t", "enabled": True}
PARSER = {"name": "p", "version": 3, "rev": 1, "kind": "json", "status": "active", "source": {}, "hash": "h"}


def device(**more):
    return compile_device({**DEVICE, **more}, TYPE, PARSER, DATATYPES.get)


def raw(payload, **more):
    return {**examples.raw_message(payload, device="d1"), **more}


def readings(payload, **more):
    return normalize(raw(payload), device(**more), T).message["readings"]


def one(value, name="x", unit=None, **more):
    field = Decoded(name, value, unit, None, None)
    return standardize(raw({}), device(**more), [field]).message["readings"][0]


def test_a_message_carries_what_identifies_it():
    message, refused = normalize(
        raw(
            {"temp": 21.5},
            raw_partition=3,
            raw_offset=9,
            raw_index=2,
            generation=4,
            experiment_id="e",
            topic="a/b",
            mode="MQTT",
        ),
        device(),
        T,
    )
    assert refused == ()
    assert message == {
        "device_id": "d1", "connector_mode": "MQTT", "topic": "a/b", "timestamp": T, "received_at": T, "raw_partition": 3, "raw_offset": 9, "raw_index": 2,
        "parser": "p@3", "config_rev": 7, "generation": 4, "experiment_id": "e", "clock": "received",
        "readings": [{"component_type": "air_temperature", "pin_position": "-1", "value": 21.5, "unit": "°C"}],
    }  # fmt: skip


def test_mode_and_experiment_come_from_the_device_where_the_message_names_none():
    message = normalize(raw({"a": 1}), device(), T).message
    assert message["connector_mode"] == "LoRaWAN"
    assert "experiment_id" not in message
    message = normalize(raw({"a": 1}), device(mode="Serial", experiment_id="e9"), T).message
    assert (message["connector_mode"], message["experiment_id"]) == ("Serial", "e9")


def test_the_devices_mapping_wins_over_the_types_and_a_name_stands_for_itself():
    payload = {"temp": 1, "secret": 2, "airTemperature": 3, "other": 4}
    assert [(r["component_type"], r["pin_position"]) for r in readings(payload)][:1] == [("air_temperature", "-1")]
    got = readings(
        payload,
        mapping={
            "temp": {"component_type": "humidity", "pin_position": "2"},
            "other": None,
            "secret": {"component_type": "s"},
        },
    )
    assert [(r["component_type"], r["pin_position"], r["value"]) for r in got] == [
        ("humidity", "2", 1),
        ("s", "-1", 2),
        ("air_temperature", "-1", 3),
    ]


@pytest.mark.parametrize(
    ("name", "component"),
    [("Air temperature", "air_temperature"), ("airTemperature", "air_temperature"), ("CH4: NO2 (we)", "ch4_no2_we"), ("pH", "ph"), ("a.b", "a_b"), ("温度", "温度"), ("::", "unknown"), ("x" * 500, "x" * 120)],
)  # fmt: skip
def test_default_component(name, component):
    assert default_component(name) == component


def test_units_are_converted_into_the_datatypes():
    assert one(68.0, "temp", "°F")["value"] == pytest.approx(20.0)
    assert one(68.0, "temp", "°F")["unit"] == "°C"
    assert one(101.3, "pressure", "kPa") == {
        "component_type": "pressure",
        "pin_position": "-1",
        "value": 1013.0,
        "unit": "hPa",
    }
    assert one(5, "pressure") == {"component_type": "pressure", "pin_position": "-1", "value": 5, "unit": "hPa"}
    assert one(5, "mine", "uS/cm")["unit"] == "µS/cm"


def test_scale_offset_and_unit_of_a_mapping():
    mapping = {"p": {"component_type": "pressure", "unit": "kPa", "scale": 0.1, "offset": 100}}
    assert one(13, "p", mapping=mapping)["value"] == pytest.approx(1013.0)
    # The parser's unit wins: the mapping's is for parsers that say none.
    assert one(13, "p", "hPa", mapping=mapping)["value"] == pytest.approx(101.3)


def test_a_unit_that_is_not_known_is_kept_and_flagged():
    assert one(5, "pressure", "zorg") == {
        "component_type": "pressure",
        "pin_position": "-1",
        "value": 5,
        "unit": "zorg",
        "flags": ["unit_unknown"],
    }
    assert one(5, "pressure", "V")["flags"] == ["unit_mismatch"]
    assert one(5, "mine", "zorg")["flags"] == ["unit_unknown"]
    assert one("a", "state", "zorg")["flags"] == ["unit_unknown"]


def test_datatypes_of_type_and_device_override():
    assert one(5, "pressure", "kPa", datatypes={"pressure": {"unit": "Pa"}})["value"] == 5000.0
    assert one(5, "state", datatypes={"state": {"kind": "number"}})["value"] == 5


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("free", True, {"value": 1.0}), ("free", False, {"value": 0.0}), ("free", "on", {"value_text": "on"}), ("free", 2**60, {"value": float(2**60)}), ("free", 2**53, {"value": 2**53}),
        ("door", True, {"value": 1.0}), ("door", 0, {"value": 0.0}), ("door", "OPEN", {"value": 1.0}), ("door", "off ", {"value": 0.0}),
        ("state", "a\0b", {"value_text": "ab"}), ("state", 5, {"value_text": "5"}), ("state", True, {"value_text": "true"}), ("state", "", {"value_text": ""}),
        ("humidity", "45.5", {"value": 45.5}), ("humidity", True, {"value": 1.0}),
    ],
)  # fmt: skip
def test_kinds_of_values(name, value, wanted):
    got = one(value, name)
    assert {k: got[k] for k in ("value", "value_text") if k in got} == wanted
    assert type(got.get("value")) is type(wanted.get("value"))


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("humidity", "wet", ReasonCode.VALUE_TYPE), ("door", 2, ReasonCode.VALUE_TYPE), ("door", "ajar", ReasonCode.VALUE_TYPE), ("door", math.nan, ReasonCode.VALUE_TYPE),
        ("humidity", math.nan, ReasonCode.VALUE_NOT_FINITE), ("free", math.inf, ReasonCode.VALUE_NOT_FINITE), ("humidity", "nan", ReasonCode.VALUE_NOT_FINITE),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_takes_no_other_with_it(name, value, code):
    fields = [Decoded(name, value, None, None, None), Decoded("good", 1, None, None, None)]
    message, refused = standardize(raw({}), device(), fields)
    assert [r["component_type"] for r in message["readings"]] == ["good"]
    assert [r.code for r in refused] == [code]
    assert name in str(refused[0])
    with pytest.raises(Reject) as e:
        standardize(raw({}), device(), fields[:1])
    assert e.value.code == code


def test_a_message_without_readings_is_refused():
    for payload in ({}, {"secret": 1}, {"a": None}):
        with pytest.raises(Reject) as e:
            normalize(raw(payload), device(), T)
        assert e.value.code == ReasonCode.MAPPING_FAILED


def test_too_many_readings_are_refused():
    with pytest.raises(Reject) as e:
        normalize(raw({"a": 1, "b": 2}), device(), T, readings_max=1)
    assert e.value.code == ReasonCode.DECODE_LIMIT


def test_a_device_that_is_switched_off_is_refused():
    with pytest.raises(Reject) as e:
        normalize(raw({"a": 1}), device(enabled=False), T)
    assert e.value.code == ReasonCode.DEVICE_DISABLED


def test_two_fields_of_one_series_do_not_overwrite_each_other():
    fields = [
        Decoded("A b", 1, None, None, None),
        Decoded("a_b", 2, None, None, None),
        Decoded("a.b", 1, None, None, None),
        Decoded("a b", 3, None, T - 1, None),
    ]
    message, refused = standardize(raw({}), device(), fields)
    assert [(r["value"], r.get("timestamp")) for r in message["readings"]] == [(1, None), (3, T - 1)]
    assert [r.code for r in refused] == [ReasonCode.MAPPING_FAILED]  # the same value once more is no loss


def times(*given, meta=None):
    fields = [Decoded(f"f{i}", i, None, at, None) for i, at in enumerate(given)]
    message = standardize(raw({}, meta=meta or {}), device(), fields).message
    return message["timestamp"], message["clock"], [r.get("timestamp") for r in message["readings"]]


def test_the_time_of_a_message():
    assert times(None) == (T, "received", [None])
    assert times(None, meta={"time": T - 5}) == (T - 5, "device", [None])
    assert times(5, 9, 7) == (9, "device", [5, None, 7])
    assert times(5, 5, meta={"time": T - 5}) == (5, "device", [None, None])
    assert times(None, T - 60, T) == (T, "received", [None, T - 60, None])


def test_a_pin_of_the_mapping_wins_over_the_parsers():
    mapper = Mapper(
        {**DEVICE, "mapping": {"a": {"component_type": "c", "pin_position": "5"}, "b": {"component_type": "c"}}},
        TYPE,
        DATATYPES.get,
    )
    assert [mapper.target(n, None, p).pin_position for n, p in (("a", "1"), ("b", "1"), ("b", None))] == [
        "5",
        "1",
        "-1",
    ]


def test_pins_and_units_hold_no_control_characters():
    assert Mapper(DEVICE, TYPE, DATATYPES.get).target("a", "k\0V\x07", "1\0\n2").pin_position == "12"
    assert one(1, "a", "zo\0rg")["unit"] == "zorg"


def test_names_that_never_repeat_do_not_fill_the_memory():
    mapper = Mapper(DEVICE, TYPE, DATATYPES.get)
    for i in range(5000):
        assert mapper.target(f"n{i}", None, None).component_type == f"n{i}"
    assert len(mapper._targets) == 4096


def test_the_same_message_becomes_the_same_and_is_not_altered():
    given = raw([{"bn": "x:", "n": "temp", "u": "Cel", "v": 1, "t": -3}, {"n": "b", "vb": True}])
    before = copy.deepcopy(given)
    compiled = compile_device(DEVICE, TYPE, {**PARSER, "kind": "senml"}, DATATYPES.get)
    assert normalize(given, compiled, T) == normalize(given, compiled, T + 10**9)
    assert given == before
