import math

import cbor2
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import ParserError, message_time
from preservarium.domain.decoders.kinds import KINDS, compile_parser
from preservarium.domain.readings.instant import instant_us
from preservarium.errors import ReasonCode, Reject

T = examples.RECEIVED_AT_US


def decode(kind, payload, source=None, **more):
    doc = {"name": "p", "version": 1, "kind": kind, "source": source or {}}
    return compile_parser(doc).decode(examples.raw_message(payload, **more))


def short(kind, payload, source=None, **more):
    return [(d.name, d.value, d.unit, d.pin) for d in decode(kind, payload, source, **more)]


def reject(kind, payload, source=None):
    with pytest.raises(Reject) as e:
        decode(kind, payload, source)
    assert e.value.code == ReasonCode.DECODE_FAILED
    return str(e.value)


def wrong(kind, source):
    with pytest.raises(ParserError) as e:
        KINDS[kind]({"name": "p", "version": 1, "kind": kind, "source": source}, None)
    return str(e.value)


SOURCES = {
    "table": [{"fields": [{"name": "a", "type": "u16"}]}],
    "json": [
        {},
        {"time": "t", "fields": [{"path": "a", "scale": 2}, {"path": "b[*].c"}], "each": [{"path": "b", "fields": [{"path": "c", "unit_path": "u"}]}]},
    ],
    "senml": [{}, {"names": "full"}],
    "senml_cbor": [{}],
    "csv": [{}, {"delimiter": ";", "decimal": ",", "columns": ["t", None, {"name": "x", "unit": "V", "pin": 1}], "time": "t"}],
    "influx": [{}, {"measurement": False, "pin_tag": "a", "precision": "s"}],
}  # fmt: skip
ALL = [
    (kind, compile_parser({"name": "p", "version": 1, "kind": kind, "source": s}))
    for kind in KINDS
    for s in SOURCES.get(kind, [{}])
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["a", "b", "c", "t", "u", "n", "v", "vs", "vb", "vd", "bn", "bt", "bu", "s", "bver", "x_", ""]), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip
PAYLOADS = st.one_of(
    st.binary(max_size=60),
    JSON,
    JSON.map(lambda v: orjson.dumps(v)),
    JSON.map(lambda v: cbor2.dumps(v)),
    st.lists(st.dictionaries(st.integers(-7, 9), st.one_of(st.text(max_size=4), st.floats(), st.integers(), st.binary(max_size=3)), max_size=5), max_size=4).map(cbor2.dumps),
    st.text(alphabet='ab,; ="\\\n0123456789.-tie#', max_size=60),
    st.text(max_size=40),
)  # fmt: skip


def becomes_fields_or_a_reject(decoder, payload):
    try:
        fields = decoder.decode(examples.raw_message(payload))
    except Reject as e:
        assert e.code in {ReasonCode.DECODE_FAILED, ReasonCode.DECODE_LIMIT}  # noqa: PT017  # both ways are right
        return
    assert any(not isinstance(field, Reject) for field in fields) or not fields
    for field in fields:
        if isinstance(field, Reject):
            assert field.code is ReasonCode.DECODE_FAILED
            continue
        assert field.value is None or isinstance(field.value, int | float | str)
        assert isinstance(field.name, str)
        assert field.name
        assert field.unit is None or isinstance(field.unit, str)
        assert field.pin is None or isinstance(field.pin, str)
        assert field.timestamp is None or abs(field.timestamp) < 2**63


@settings(max_examples=1500, deadline=None)
@given(which=st.integers(0, len(ALL) - 1), payload=PAYLOADS)
def test_any_payload_becomes_fields_or_a_reject(which, payload):
    becomes_fields_or_a_reject(ALL[which][1], payload)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=100_000, deadline=None)
@given(which=st.integers(0, len(ALL) - 1), payload=PAYLOADS)
def test_any_payload_becomes_fields_or_a_reject_at_length(which, payload):
    becomes_fields_or_a_reject(ALL[which][1], payload)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_without_fields_gives_every_leaf_by_its_path():
    payload = {
        "temp": 21.5,
        "air": {"pm25": 7, "label": "x", "none": None},
        "door": True,
        "list": [1, [2]],
        "rows": [{"v": 3}, {"v": 4}],
    }
    assert short("json", payload) == [
        ("temp", 21.5, None, None),
        ("air.pm25", 7, None, None),
        ("air.label", "x", None, None),
        ("door", True, None, None),
        ("list", 1, None, "0"),
        ("list", 2, None, "1.0"),
        ("rows.v", 3, None, "0"),
        ("rows.v", 4, None, "1"),
    ]  # fmt: skip
    assert short("json", orjson.dumps({"a": 1})) == [("a", 1, None, None)]
    assert short("json", {"a": 1, "t": 5}, {"time": "t", "ignore": ["a"]}) == []


def test_json_paths():
    payload = {"a": {"b.c": [10, {"d": 11}]}, "list": [{"v": 1}, {"v": 2}], "map": {"x": {"v": 3}, "y": {}}}
    fields = [
        {"path": 'a["b.c"][0]', "name": "first", "unit": "V"},
        {"path": '$.a["b.c"].1.d', "name": "second", "scale": 0.5, "offset": 1},
        {"path": 'a["b.c"][-1].d', "name": "last", "expr": "x ** 2", "pin": 7},
        {"path": "list[*].v"},
        {"path": "map[*].v", "name": "m"},
        {"path": "not.there"},
    ]
    assert short("json", payload, {"fields": fields}) == [
        ("first", 10, "V", None), ("second", 6.5, None, None), ("last", 121, None, "7"), ("list.v", 1, None, "0"),
        ("list.v", 2, None, "1"), ("m", 3, None, "x"),
    ]  # fmt: skip
    assert "is missing" in reject("json", payload, {"fields": [{"path": "not.there", "required": True}]})
    assert "is an object" in reject("json", payload, {"fields": [{"path": "a"}]})


def test_json_elements_name_themselves():
    source = {
        "time": "sent",
        "each": [{"path": "sensors", "fields": []}],
    }
    assert "fields" in wrong("json", source)
    source["each"] = [
        {
            "path": "sensors[*]",
            "name": "{type}",
            "pin": "ch{ch}",
            "time": "at",
            "fields": [{"path": "value", "unit_path": "u"}, {"path": "min", "name": "min"}],
        }
    ]
    payload = {
        "sent": "2024-06-01T12:00:00Z",
        "sensors": [
            {"type": "temp", "ch": 1, "value": 20, "u": "°C", "min": 19},
            {"type": "hum", "ch": 2, "value": 40, "u": 5, "at": 1717243260},
        ],
    }
    assert [tuple(d) for d in decode("json", payload, source)] == [
        ("temp", 20, "°C", T, "ch1"),
        ("temp_min", 19, None, T, "ch1"),
        ("hum", 40, None, T + 60_000_000, "ch2"),
    ]
    payload["sensors"][0].pop("type")
    nameless, field = decode("json", payload, source)
    assert "nothing to name it by" in str(nameless)
    assert field.name == "hum"
    payload["sensors"][1].pop("type")
    assert "nothing to name it by" in reject("json", payload, source)


def test_a_json_list_is_several_measurements():
    payload = [{"ts": 1717243200, "a": 1}, {"ts": 1717243260000, "a": 2}]
    assert [(d.value, d.timestamp) for d in decode("json", payload, {"time": "ts"})] == [(1, T), (2, T + 60_000_000)]
    assert "no instant" in reject("json", [{"ts": "soon", "a": 1}], {"time": "ts"})


def test_json_text_that_is_a_number_is_calculated_with():
    fields = {"fields": [{"path": "a", "scale": 10}, {"path": "b", "scale": 10}, {"path": "c", "expr": "log(x)"}]}
    got = {d.name: d.value for d in decode("json", {"a": "2.5", "b": "n/a", "c": -1}, fields)}
    assert (got["a"], got["b"]) == (25.0, "n/a")
    assert math.isnan(got["c"])


@pytest.mark.parametrize("payload", [b"{", b"\xff", 5, "text", None, b"5", b'"a"'])
def test_what_is_no_json_document_is_refused(payload):
    assert reject("json", payload)


@pytest.mark.parametrize(
    "source",
    [
        {"field": []}, {"fields": {}}, {"fields": [5]}, {"fields": [{"name": "a"}]}, {"fields": [{"path": ""}]}, {"fields": [{"path": "a[x]"}]},
        {"fields": [{"path": "a", "expr": "y"}]}, {"fields": [{"path": "a", "scale": "2"}]}, {"fields": [{"path": "a", "nam": "b"}]},
        {"time": 5}, {"time": "t", "time_unit": "weeks"}, {"each": {}}, {"each": [{"path": "a", "name": 5, "fields": [{"path": "b"}]}]}, {"ignore": "a"},
    ],
)  # fmt: skip
def test_a_wrong_json_mapping_is_refused(source):
    assert wrong("json", source)


# --- SenML -----------------------------------------------------------------------------------------------------------


def test_senml_fields_are_named_by_their_own_part_or_their_unit():
    pack = [
        {"bn": "urn:dev:1:", "bu": "Cel", "n": "temp", "v": 1},
        {"n": "state", "vs": "ok"},
        {"n": "open", "vb": True},
        {"n": "blob", "vd": "aGk"},
        {"v": 2},
        {"u": "%RH", "v": 3},
        {"n": "e", "u": "W", "s": 5},
        {"n": "f", "u": "W", "v": 0.5, "s": 0},
    ]
    assert short("senml", pack) == [
        ("temp", 1, "Cel", None), ("state", "ok", "Cel", None), ("open", True, "Cel", None), ("blob", "aGk", "Cel", None),
        ("temperature", 2, "Cel", None), ("humidity", 3, "%RH", None), ("e.sum", 5, "W*s", None), ("f", 0.5, "W", None),
    ]  # fmt: skip
    assert short("senml", [{"bn": "urn:dev:1:", "n": "temp", "v": 1}], {"names": "full"})[0][0] == "urn:dev:1:temp"


def test_senml_times():
    pack = [
        {"bn": "a", "n": "x", "v": 1},
        {"n": "y", "v": 1, "t": -1.5},
        {"n": "z", "v": 1, "t": 1717243200.5},
        {"bt": 1717243200, "n": "w", "t": 0.25, "v": 1},
    ]
    assert [d.timestamp for d in decode("senml", pack)] == [None, T - 1_500_000, T + 500_000, T + 250_000]


@pytest.mark.parametrize(
    "pack",
    [
        [{"n": "a b", "v": 1}], [{"v": 1}], [{"n": "a", "v": "1"}], [{"n": "a", "v": True}], [{"n": "a", "vs": 1}], [{"n": "a", "vb": 1}],
        [{"n": "a", "vd": "%%%"}], [{"n": "a", "v": 1, "crit_": 1}], [{"bver": 11, "n": "a", "v": 1}], [{"n": 5, "v": 1}], [5], "x", 5, b"", b"\x81",
        b"\x81\xa1", b"[", [{"n": "a", "v": 1, "t": 1e300}], [{"n": "a", "v": 1, "t": math.inf}], b"\x83\xd8\x1c\x01", b"\xbf", cbor2.dumps([{(1, 2): 3}]),
    ],
)  # fmt: skip
def test_what_is_no_senml_is_refused(pack):
    assert reject("senml", pack)


def test_unassigned_cbor_labels_are_optional():
    assert short("senml", cbor2.dumps([{0: "a", 2: 5, 99: "x", -99: 1}])) == [("a", 5, None, None)]


# --- Cayenne LPP, BTHome -----------------------------------------------------------------------------------------------


def test_cayenne():
    # The examples of the specification: two temperatures; a temperature and an accelerometer; a place.
    assert short("cayenne_lpp", "03670110056700ff") == [
        ("temperature", 27.2, "°C", "3"),
        ("temperature", 25.5, "°C", "5"),
    ]
    assert [v for _, v, _, _ in short("cayenne_lpp", "0167ffd7067104d2fb2e0000")] == [-4.1, 1.234, -1.234, 0.0]
    assert [v for _, v, _, _ in short("cayenne_lpp", "018806765ff2960a0003e8")] == [42.3519, -87.9094, 10.0]
    assert short("cayenne_lpp", "006801 0000") == [("humidity", 0.5, "%", "0")]
    assert "too short" in reject("cayenne_lpp", "036701")
    assert "too short" in reject("cayenne_lpp", "03")
    assert "type 99" in reject("cayenne_lpp", "0363 00")


def test_bthome():
    # The examples of the format's page.
    assert short("bthome", "40 02c409 03bf13") == [("temperature", 25.0, "°C", None), ("humidity", 50.55, "%", None)]
    assert short("bthome", "d2fc 40 02c409 02c509 1a01 5302 4869 540148") == [
        ("temperature", 25.0, "°C", "1"), ("temperature", 25.01, "°C", "2"), ("door", True, None, None), ("text", "Hi", None, None), ("raw", "48", None, None),
    ]  # fmt: skip
    assert "encrypted" in reject("bthome", "41 a47266c95f73001122337823")
    assert "version 1" in reject("bthome", "20 02c409")
    assert "0xff" in reject("bthome", "40 ff00")
    assert "too short" in reject("bthome", "40 02c4")
    assert "empty" in reject("bthome", "")


@pytest.mark.parametrize(
    ("hexadecimal", "found"),
    [
        ("40624099dfff", ("speed", -2.123456, "m/s", None)), ("40 62c0662000", ("speed", 2.123456, "m/s", None)), ("4058ea", ("temperature", -7.7, "°C", None)), ("405803", ("temperature", 1.05, "°C", None)),
        ("40587f", ("temperature", 44.45, "°C", None)), ("406402", ("light_level", 2, None, None)), ("42b2188d38c1a404138a01", ("pressure", 1008.83, "hPa", None)),
        ("d2fc42b2188d38c1a4 02c409", ("temperature", 25.0, "°C", None)),
    ],
)  # fmt: skip
def test_bthome_objects_and_the_address_before_them(hexadecimal, found):
    assert short("bthome", hexadecimal) == [found]


@pytest.mark.parametrize("rest", ["fe5d0903b718", "fe", "ff02c409"])
def test_of_a_bthome_payload_what_stands_before_an_unknown_object_is_read(rest):
    found = decode("bthome", "40015d" + rest)
    assert [f.value for f in found if not isinstance(f, Reject)] == [93]
    (refused,) = [f for f in found if isinstance(f, Reject)]
    assert "is not known" in str(refused)
    # What is cut off is not what the device has sent.
    for torn in ("40015d02c4", "40015d530541"):
        assert "too short" in reject("bthome", torn)


def test_bthome_of_an_address_alone_or_torn_has_no_field():
    for payload in ("42b2188d38c1a4", "42b218"):
        assert not decode("bthome", payload)


@pytest.mark.parametrize(
    "pack",
    [
        [{"bn": "/3303/0/", "bt": 1795200000, "n": "5700", "v": 21.4, "u": "Cel"}], [{"bn": "/", "n": "5700", "v": 21.4, "u": "Cel"}],
        [{"n": "/5700", "v": 21.4, "u": "Cel"}], [{"bn": "3303/0/", "n": "5700", "v": 21.4, "u": "Cel"}],
    ],
)  # fmt: skip
def test_lwm2m_names_of_senml_begin_with_a_slash(pack):
    assert [(f[0], f[1]) for f in short("senml", pack)] == [("5700", 21.4)]
    full = short("senml", pack, {"names": "full"})[0][0]
    assert full == (pack[0].get("bn", "") + pack[0]["n"]).strip("/")
    assert "no SenML name" in reject("senml", [{"n": "//x", "v": 1}])


# --- CSV, line protocol ----------------------------------------------------------------------------------------------


def test_csv():
    assert short("csv", "a,b\n1,x\n,true\n\n2.5,\n") == [
        ("a", "1", None, None),
        ("b", "x", None, None),
        ("b", "true", None, None),
        ("a", "2.5", None, None),
    ]
    source = {
        "delimiter": ";",
        "decimal": ",",
        "columns": ["t", None, {"name": "x", "unit": "V", "pin": 1}],
        "time": "t",
    }
    (field,) = decode("csv", "1717243200;foo;1,5\n1717243260;;\n", source)
    assert tuple(field) == ("x", "1,5", "V", T, "1")
    assert field.value.number == 1.5
    assert "no instant" in reject("csv", "soon;;1", source)
    assert "4 cells" in reject("csv", "1;2;3;4", source)
    assert "not CSV" in reject("csv", 'a\n"b')
    assert "UTF-8" in reject("csv", b"\xff\xfa")
    assert short("csv", "\ufeffa\n1".encode()) == [("a", "1", None, None)]


@pytest.mark.parametrize(
    ("text", "number", "marks"),
    [
        ("00123", 123, {}), ("241408E4", 2414080000.0, {}), ("1.10", 1.1, {}), ("2,0", None, {}), ("2,0", 2.0, {"decimal": ","}), ("89490200001234567890", 89490200001234567890, {}),
        ("1.234,5", 1234.5, {"decimal": ",", "thousands": "."}), ("1 234", 1234, {"thousands": " "}), ("2_1", None, {}), ("1_000", None, {}), ("0x1F", None, {}), ("١٢", None, {}), ("１２", None, {}),
        ("infinity", None, {}), ("NaN", None, {}), ("+", None, {}), ("TRUE", 1, {}), ("false", 0, {}),
    ],
)  # fmt: skip
def test_a_cell_keeps_its_text_beside_its_number(text, number, marks):
    (field,) = decode("csv", f"a;b\n{text};\n", {"delimiter": ";", **marks})
    assert field.value == text
    assert field.value.number == number


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        ("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-16-be", "utf-16-be"), ("utf-16-le", "UTF-16LE"), ("cp1252", "cp1252"), ("cp1252", "windows-1252"), ("latin-1", "latin-1"), ("iso8859-15", "ISO-8859-15"),
        ("cp437", "IBM437"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("behind", ["", "\r\n", "\n\0", "\0\0"])
def test_csv_in_the_encoding_that_it_comes_in(encoding, declared, behind):
    payload = f"Straße;µ\r\nKöln;1,5{behind}".encode(encoding)
    source = {"delimiter": ";", "decimal": ",", **({"encoding": declared} if declared else {})}
    assert short("csv", payload, source) == [("Straße", "Köln", None, None), ("µ", "1,5", None, None)]


def test_csv_says_which_encoding_it_is_not():
    assert "UTF-8" in reject("csv", "ä\n1".encode("cp1252"))
    assert "CP1252" in reject("csv", b"a\n\x81", {"encoding": "cp1252"})
    for name in ("klingon", "rot13", "base64", "idna", "unicode_escape", 5, "", "a\0b"):
        assert "no encoding" in wrong("csv", {"encoding": name}), name


def test_csv_times_with_marks_of_their_own():
    source = {"delimiter": ";", "decimal": ",", "thousands": ".", "time": "t"}
    assert [
        d.timestamp for d in decode("csv", "t;a\n1.717.243.200,25;1\n1717243200;1\n2024-06-01T12:00:00z;1", source)
    ] == [T + 250_000, T, T]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_has_any_line_end(end):
    assert short("csv", f"a,b{end}1,2{end}{end}3,4") == [
        (n, v, None, None) for n, v in zip("abab", "1234", strict=True)
    ]


@pytest.mark.parametrize(
    "source",
    [
        {"delimiter": ";;"},
        {"decimal": ","},
        {"header": False},
        {"columns": [5]},
        {"columns": {}},
        {"time_unit": "weeks"},
        {"sep": ","},
        {"delimiter": ";", "thousands": "."},
        {"thousands": ","},
        {"thousands": "_"},
        {"decimal": []},
        {"decimal": ",", "delimiter": ";", "thousands": ","},
    ],
)
def test_a_wrong_csv_parser_is_refused(source):
    assert wrong("csv", source)


def test_influx():
    line = 'my\\ room,ch=2,site=a\\,b temp=21.5,n=3i,u=7u,ok=t,label="a \\"b\\" = c" 1717243200000000000\n# comment\n\nx v=1'
    assert [tuple(d) for d in decode("influx", line, {"pin_tag": "ch"})] == [
        ("my room.temp", 21.5, None, T, "2"),
        ("my room.n", 3, None, T, "2"),
        ("my room.u", 7, None, T, "2"),
        ("my room.ok", True, None, T, "2"),
        ("my room.label", 'a "b" = c', None, T, "2"),
        ("x.v", 1.0, None, None, None),
    ]
    for bad in (
        "x",
        "x v",
        "x v=",
        "x v=abc",
        'x v="a',
        "x v=1 soon",
        "x v=1 2 3",
        "x,a v=1",
        "x v=1 99999999999999999999999",
    ):
        assert reject("influx", bad), bad


# --- sources that people write ---


@pytest.mark.parametrize("other", [["s"], {"a": 1}, 5, None, "s s", True])
@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("influx", lambda word: {"precision": word}), ("json", lambda word: {"time": "t", "time_unit": word}), ("csv", lambda word: {"time_unit": word}), ("csv", lambda word: {"header": word, "columns": ["a"]}),
        ("senml", lambda word: {"names": word}), ("sparkplug_b", lambda word: {"aliases": {"1": {"name": "a", "type": word}}}), ("table", lambda word: {"fields": [], "rest": word}), ("table", lambda word: {"fields": [], "endian": word}),
        ("table", lambda word: {"fields": [{"name": "a", "type": "u8", "time": word}]}), ("table", lambda word: {"fields": [{"name": "a", "type": "u32", "endian": word}]}), ("table", lambda word: {"fields": [{"repeat": "end", "fields": word}]}),
        ("table", lambda word: {"fields": [{"when": "1", "fields": word}]}),
    ],
)  # fmt: skip
def test_a_source_may_hold_anything_where_a_word_belongs(kind, source, other):
    given = source(other)
    if (other is None and ("time_unit" in given or "aliases" in given)) or (other is True and "header" in given):
        return  # as if nothing were said, or what may be said
    assert wrong(kind, given)


def test_what_is_refused_is_named_as_people_name_it():
    assert "is a mapping, not a list" in wrong("influx", [1])
    assert "an item is a mapping, not a number" in wrong("table", {"fields": [1.5]})
    assert "a list of items is expected, not null" in wrong("table", {"fields": [{"repeat": "end"}]})
    assert "not null" in reject("json", b"null")
    assert "not a truth value" in reject("json", b"true")
    assert "the payload is not bytes but an object" in reject("bthome", {"a": 1})
    assert "n is text, not a number" in reject("senml", [{"n": 5, "v": 1}])
    for variables in ([1], "x", 5):
        with pytest.raises(Reject, match="the variables are an object, not "):
            compile_parser({"name": "p", "version": 1, "kind": "table", "source": {"fields": []}}, variables)


# --- instants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "unit", "us"),
    [
        (1717243200, None, T), (1717243200.5, None, T + 500_000), (1717243200000, None, T), (T, None, T), (T * 1000 + 999, None, T),
        ("1717243200", None, T), ("1717243200.25", None, T + 250_000), ("2024-06-01T12:00:00Z", None, T), ("2024-06-01T14:00:00+02:00", None, T),
        ("2024-06-01 12:00:00", None, T), ("2024-06-01T12:00:00.123456789Z", None, T + 123_456), ("2024-06-01T12:00:00.5Z", None, T + 500_000),
        (90_000, "s", 90_000_000_000), (90_000, "ms", 90_000_000), (5, "us", 5), (5000, "ns", 5), ("5", "ms", 5000),
        ("soon", None, None), ("", None, None), ("x" * 100, None, None), (math.nan, None, None), (math.inf, None, None), (True, None, None), (None, None, None),
        (1e300, None, None), (10**30, None, None), ("1e99999999", None, None), ("-1e999999999999999999999", None, None), ("1e-99999999", None, 0), (1795993320000000000, "s", None), (-1e19, "s", None), ("1e19", "ms", None), ("9" * 60, None, None), ([], None, None), ("0001-01-01T00:00:00+14:00", None, -62135647200000000),
    ],
)  # fmt: skip
def test_instants(given, unit, us):
    assert instant_us(given, unit) == us


@given(
    st.one_of(st.text(max_size=70), st.floats(), st.integers(), st.datetimes().map(str), st.from_regex(r"-?\d{1,9}e-?\d{1,9}", fullmatch=True)),
    st.sampled_from([None, "s", "ms", "us", "ns"]),
)  # fmt: skip
def test_anything_is_an_instant_of_64_bits_or_none(given, unit):
    at = instant_us(given, unit)
    assert at is None or -(2**63) <= at < 2**63


def test_the_networks_time_is_the_messages():
    raw = examples.raw_message(b"")
    assert message_time(raw) == (T, False)
    raw["meta"] = {"time": "2024-06-01T11:59:59.5Z"}
    assert message_time(raw) == (T - 500_000, True)
    raw["meta"] = {"time": "yesterday"}
    assert message_time(raw) == (T, False)
