"""The short way from a payload to readings says what the long one says, whatever is in a payload."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import Layout
from preservarium.domain.decoders.json_paths import LAYOUTS_MAX
from preservarium.domain.readings.json_text import NotFinite
from preservarium.domain.readings.mapping import PLANS_MAX, TEXT_CHARACTERS_MAX, Mapper
from preservarium.domain.readings.normalize import compile_device, normalize, standardize
from preservarium.errors import Reject

NAMES = ("a", "b", "c", "d", "e")
DATATYPES = {
    "kelvin": {"name": "kelvin", "rev": 1, "kind": "number", "unit": "K"},
    "fahrenheit": {"name": "fahrenheit", "rev": 1, "kind": "number", "unit": "°F"},
    "plain": {"name": "plain", "rev": 1, "kind": "number", "unit": ""},
    "flag": {"name": "flag", "rev": 1, "kind": "boolean", "unit": ""},
    "words": {"name": "words", "rev": 1, "kind": "text", "unit": ""},
}
UNITS = st.sampled_from([None, "", "°C", "Cel", "°F", "K", "%", "no such unit"])

numbers = (
    st.floats()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 3)
    | st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1, 10**400, -0.0, 0.1, 21.45, 1e300, 5e-324, 1e9, 1e16, 2.0**60])
)
values = (
    numbers
    | st.none()
    | st.booleans()
    | st.sampled_from(["on", "12.5", "1e3", "abc", "", "nan", "x" * (TEXT_CHARACTERS_MAX + 1), NotFinite("nan"), NotFinite("inf")])
    | st.text(max_size=5)
    | st.sampled_from([{}, [], {"a": 1.5}, [2.5, {"b": 1}]])
)  # fmt: skip
instants = st.sampled_from([None, 1_717_243_200, "2024-06-01T12:00:00Z", "no instant", True])
payloads = st.dictionaries(st.sampled_from([*NAMES, "deep", "t", "", "x" * 300]), values | instants, max_size=7)
mappings = st.dictionaries(
    st.sampled_from(NAMES),
    st.none()
    | st.fixed_dictionaries(
        {"component_type": st.sampled_from([*DATATYPES, "other"])},
        optional={
            "unit": UNITS.filter(bool),
            "scale": st.sampled_from([0, 0.1, -2, 1e-7, 3, 1e300]),
            "offset": st.sampled_from([0.5, -273.15, 1e10]),
            "pin_position": st.sampled_from(["1", "2"]),
        },
    ),
)
fields = st.lists(
    st.fixed_dictionaries(
        {"path": st.sampled_from([*NAMES, "deep.a", "deep[0]", "$"])},
        optional={
            "name": st.sampled_from(NAMES),
            "unit": UNITS.filter(lambda unit: unit is not None),
            "pin": st.sampled_from(["", "1", 2]),
            "required": st.booleans(),
            "scale": st.sampled_from([0.1, 2]),
            "expr": st.sampled_from(["x + 1", "1 / x", "log(x)"]),
        },
    ),
    max_size=5,
)
sources = st.fixed_dictionaries(
    {},
    optional={
        "fields": fields,
        "time": st.sampled_from(["t", "deep.a"]),
        "root": st.just("deep"),
        "ignore": st.lists(st.sampled_from([*NAMES, "x" * 300]), max_size=2),
        "decimal": st.just(","),
    },
)


def compiled(kind, source, mapping):
    parser = {"name": "p", "version": 1, "rev": 1, "kind": kind, "status": "active", "source": source, "hash": "h"}
    device_type = {"name": "t", "rev": 1, "manufacturer": "m", "parser": "p", "mapping": mapping}
    device = {"device_id": "d", "rev": 1, "type": "t"}
    return compile_device(device, device_type, parser, DATATYPES.get)


def outcome(way):
    """What a way says, with the order of keys, the types of numbers and the sign of zeros."""
    try:
        message, refused = way()
    except Reject as e:
        return e.code, str(e)
    return repr(message), [(e.code, str(e)) for e in refused]


def short_and_long(raw, device, readings_max=10_000):
    return (
        outcome(lambda: normalize(raw, device, 0, readings_max)),
        outcome(lambda: standardize(raw, device, device.decoder.decode(raw), readings_max)),
    )


@settings(deadline=None)  # pint takes a moment to load
@given(sources, mappings, st.lists(payloads, min_size=1, max_size=3), st.integers(1, 6))
def test_json_says_the_same_either_way(source, mapping, given_payloads, readings_max):
    device = compiled("json", source, mapping)
    for payload in given_payloads:
        short, long = short_and_long(examples.raw_message(payload), device, readings_max)
        assert short == long


@pytest.mark.parametrize("text", [b'{"a":1.5,"b":null,"c":"x"}', b'{"a":', b"[1]", b'\xef\xbb\xbf{"a":NaN}', b"7"])
@pytest.mark.parametrize("source", [{}, {"fields": [{"path": "a"}, {"path": "c"}]}, {"root": "a"}])
def test_so_do_bytes_that_hold_json(source, text):
    short, long = short_and_long(examples.raw_message(text), compiled("json", source, {}))
    assert short == long


heads = st.tuples(st.sampled_from(NAMES), UNITS, st.sampled_from([None, "1", "2"]))


@settings(deadline=None)  # pint takes a moment to load
@given(st.lists(st.tuples(heads, values), max_size=6), mappings)
def test_a_row_becomes_what_its_fields_become_one_by_one(row, mapping):
    mapper = Mapper({}, {"mapping": mapping}, DATATYPES.get)
    found = mapper.readings(Layout([head for head, _ in row]), [value for _, value in row])
    if found is None:
        return  # the long way says why, or what
    expected = []
    for head, value in row:
        target = mapper.target(*head)
        if target is not None and value is not None:
            expected.append(target.reading(value, head[0]))
    assert repr(found) == repr(expected)


@settings(deadline=None)  # pint takes a moment to load
@given(st.floats(-1e300, 1e300) | st.integers(-(2**53), 2**53), st.sampled_from(["°C", "K", "Cel"]))
def test_every_finite_number_of_a_known_unit_takes_the_short_way(value, unit):
    mapper = Mapper({}, {"mapping": {"a": {"component_type": "fahrenheit"}}}, DATATYPES.get)
    (reading,) = mapper.readings(Layout([("a", unit, None)]), [value])
    assert repr(reading) == repr(mapper.target("a", unit, None).reading(value, "a"))


def test_two_fields_of_one_series_take_the_long_way_only_where_both_are_there():
    mapper = Mapper({}, {"mapping": {n: {"component_type": "plain"} for n in "ab"}}, DATATYPES.get)
    layout = Layout([("a", None, None), ("b", None, None)])
    assert mapper.readings(layout, [1.0, 2.0]) is None
    assert [r["value"] for r in mapper.readings(layout, [None, 2.0])] == [2.0]


def test_a_document_with_names_of_its_own_each_time_does_not_fill_the_memory():
    device = compiled("json", {}, {})
    for i in range(PLANS_MAX + 50):
        short, long = short_and_long(examples.raw_message({f"n{i}": 1.5}), device)
        assert short == long
    assert len(device.decoder._layouts) == LAYOUTS_MAX
    assert len(device.mapper._plans) <= PLANS_MAX


@pytest.mark.parametrize("mapping", [{}, {"a": {"component_type": "kelvin", "unit": "°C"}}])
@pytest.mark.parametrize("value", [math.nan, math.inf, NotFinite("nan"), NotFinite("-inf")])
def test_a_value_that_is_not_finite_is_refused_and_the_others_kept(value, mapping):
    message, refused = normalize(examples.raw_message({"a": value, "b": 2.5}), compiled("json", {}, mapping), 0)
    assert [r["component_type"] for r in message["readings"]] == ["b"]
    assert [str(e) for e in refused] == ["a has no finite value"]
