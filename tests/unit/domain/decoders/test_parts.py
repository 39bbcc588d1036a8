"""What of a payload cannot be read is refused by itself: the rest is kept, and the part can be read alone once it is mended."""

import cbor2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.decoders import examples
from preservarium.domain.decoders.base import PartRefused
from preservarium.domain.decoders.kinds import compile_parser
from preservarium.errors import ReasonCode, Reject

T = examples.RECEIVED_AT_US


def decode(kind, payload, source=None):
    return compile_parser({"name": "p", "version": 1, "kind": kind, "source": source or {}}).decode(
        examples.raw_message(payload)
    )


def sorted_by(found):
    """(fields by name, reasons)."""
    fields = [(f.name, f.value) for f in found if not isinstance(f, Reject)]
    return fields, [str(f) for f in found if isinstance(f, Reject)]


def number(data):
    out = bytearray()
    while data > 0x7F:
        out.append(data & 0x7F | 0x80)
        data >>= 7
    return bytes([*out, data])


def field(n, data):
    return number(n << 3 | 2) + number(len(data)) + data if isinstance(data, bytes) else number(n << 3) + number(data)


def metric(name, value, *more):
    return field(2, field(1, name) + b"".join(more) + field(11, value))


AT_MS = field(1, T // 1_000)

#: (kind, source, payload, fields that are kept, words of each refusal, bytes of each part that is refused)
PARTS = {
    "influx": ("influx", {}, "m a=1 5\nbroken\nm b=2i\nm c=1 soon\n", ["m.a", "m.b"], ["line 2", "line 4"], [b"broken", b"m c=1 soon"]),
    "influx, an open quote": ("influx", {}, 'm a=1\nm s="torn\nm b="x",c=3\n', ["m.a", "m.b", "m.c"], ["line 2: a quote is not closed"], [b'm s="torn']),
    "influx, an open quote at the end": ("influx", {}, 'm a=1\r\nm s="torn\r\n', ["m.a"], ["a quote is not closed"], [b'm s="torn']),
    "influx, behind a text of lines": ("influx", {}, 'm s="a\nb=1 x=1\n" never\nm b=2\n', ["m.b"], ["line 1"], [b'm s="a\nb=1 x=1\n" never']),
    "influx, a value": ("influx", {}, "m a=1,b=0x1F\n#\n\nm c=2", ["m.c"], ["line 1: '0x1F' is no value"], [b"m a=1,b=0x1F"]),
    "csv": ("csv", {"time": "ts"}, "ts,a\n1717243200,1\nsoon,2\n1717243260,3,4\n1717243320,5\n", ["a", "a"], ["row 2: 'soon' is no instant", "row 3: 3 cells"], [b"ts,a\nsoon,2\n", b"ts,a\n1717243260,3,4\n"]),
    "csv, an open quote": ("csv", {}, 'a,b\n1,2\n3,"torn\n5,"x"\n7,8\n', ["a", "b", "a", "b", "a", "b"], ["row 2: not CSV"], [b'a,b\n3,"torn\n']),
    "csv, an open quote at the end": ("csv", {"columns": ["a", "b"]}, '1,2\n3,"torn', ["a", "b"], ["row 1: not CSV"], [b'3,"torn']),
    "csv in another encoding": ("csv", {"encoding": "cp1252", "time": "ts"}, "ts,ä\nfrüh,1\n1717243200,2".encode("cp1252"), ["ä"], ["früh"], ["ts,ä\nfrüh,1\n".encode("cp1252")]),
    "senml": ("senml", {}, [{"bn": "d:", "bt": T / 1e6, "n": "a", "v": 1}, {"n": "b", "v": "2"}, {"n": "c", "vd": "!"}, {"n": "d", "v": 4}], ["a", "d"], ["record 2: v is a number", "record 3: vd"], [None, None]),
    "senml, the first": ("senml", {}, [{"bn": "d:", "bu": "V", "n": "a", "t": "now"}, {"n": "!", "v": 1}, {"n": "c", "v": 1}], ["c"], ["record 1: '"], [None]),
    "senml as CBOR": ("senml_cbor", {}, cbor2.dumps([{-2: "d:", 0: "a", 2: 1}, {0: "b", 4: 1}]), ["a"], ["record 2: vb is true or false"], [None]),
    "sparkplug": ("sparkplug_b", {}, AT_MS + metric(b"a", 1) + metric(b"", 2) + field(2, field(1, b"b") + b"\x5b") + metric(b"c", 3), ["a", "c"], ["metric 2: a metric has neither", "metric 3: no protocol buffer"], [AT_MS + metric(b"", 2), AT_MS + field(2, field(1, b"b") + b"\x5b")]),
    "sparkplug, a time": ("sparkplug_b", {}, metric(b"a", 1, field(3, 2**63)) + metric(b"b", 2), ["b"], ["metric 1: a timestamp of"], [metric(b"a", 1, field(3, 2**63))]),
    "json, a list": ("json", {"time": "ts"}, [{"ts": 1717243200, "a": 1}, {"ts": "soon", "a": 2}, {"ts": 1717243260, "a": 3}], ["a", "a"], ["element 1: 'soon' is no instant"], [b'[{"ts":"soon","a":2}]']),
    "json, a list below": ("json", {"root": "up[1].list", "fields": [{"path": "a", "required": True}]}, {"up": [0, {"list": [{"a": 1}, {"b": 2}]}]}, ["a"], ["element 1: a is missing"], [b'{"up":{"1":{"list":[{"b":2}]}}}']),
    "json, not finite": ("json", {"time": "ts"}, b'[{"ts": 1, "a": 1}, {"ts": "x", "a": NaN, "b": 90000000000000000001}]', ["a"], ["element 1"], [b'[{"ts":"x","a":NaN,"b":90000000000000000001}]']),
}  # fmt: skip

#: The same for what cannot stand by itself.
WITHIN = {
    "json, a field": ("json", {"fields": [{"path": "a"}, {"path": "b"}, {"path": "c"}]}, {"a": 1, "b": {"x": 1}, "c": "x" * 5_000}, ["a"], ["b is an object", "c is a text of 5000 characters"]),
    "json, each": ("json", {"each": [{"path": "s[*]", "time": "t", "fields": [{"path": "v"}]}]}, {"s": [{"t": 1717243200, "v": 1}, {"t": [], "v": 2}, {"v": 3}]}, ["v", "v"], ["s.*, element 1: "]),
    "csv that came as text": ("csv", {"encoding": "cp1252"}, "a\n1\n2,✓\n", ["a"], ["row 2: 2 cells"]),
    "senml with what JSON has not": ("senml", {}, cbor2.dumps([{0: "a", 2: 1}, {0: "b", 3: b"\0"}]), ["a"], ["record 2: vs is text"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS.values(), ids=PARTS.keys())
def test_the_rest_is_kept_and_a_part_stands_by_itself(case):
    kind, source, payload, names, words, parts = case
    found = decode(kind, payload, source)
    fields, reasons = sorted_by(found)
    assert [name for name, _ in fields] == names
    refused = [one for one in found if isinstance(one, Reject)]
    assert len(refused) == len(words) == len(parts), reasons
    for one, word, part in zip(refused, words, parts, strict=True):
        assert word in str(one)
        assert one.code is ReasonCode.DECODE_FAILED
        assert part in (None, one.payload)
        # Alone it is refused for the same; where a quote is not closed, that depends on what follows.
        with pytest.raises(Reject) as again:
            decode(kind, one.payload, source)
        assert "not CSV" in word or str(again.value).partition(": ")[2] == str(one).partition(": ")[2]


@pytest.mark.parametrize("case", WITHIN.values(), ids=WITHIN.keys())
def test_what_says_nothing_alone_is_refused_with_its_message(case):
    kind, source, payload, names, words = case
    found = decode(kind, payload, source)
    fields, reasons = sorted_by(found)
    assert [name for name, _ in fields] == names
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))
    assert not any(isinstance(one, PartRefused) for one in found)


def test_a_part_keeps_what_stood_for_it_in_the_whole():
    pack = [{"bn": "urn:", "bt": 1717243200, "bu": "Cel", "n": "a", "v": 1}, {"n": "b", "v": "2", "t": 60}]
    (_, refused) = decode("senml", pack)
    (mended,) = decode("senml", refused.payload.replace(b'"2"', b"2"))
    assert (mended.name, mended.value, mended.unit, mended.timestamp) == ("b", 2, "Cel", T + 60_000_000)
    refused = decode("csv", "ts,a,b\n1717243200,1,2\n1717243260,3,4,5\n", {"time": "ts"})[-1]
    assert [(f.name, f.value, f.timestamp) for f in decode("csv", refused.payload[:-2], {"time": "ts"})] == [
        ("a", "3", T + 60_000_000), ("b", "4", T + 60_000_000),
    ]  # fmt: skip
    (_, refused) = decode("sparkplug_b", AT_MS + metric(b"a", 1) + metric(b"", 2))
    (mended,) = decode(
        "sparkplug_b", AT_MS + refused.payload[len(AT_MS) :].replace(b"\x12\x04\n\0", b"\x12\x05\n\x01b")
    )
    assert (mended.name, mended.value, mended.timestamp) == ("b", 2, T)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        ([{"bn": 5, "n": "a", "v": 1}, {"n": "b", "v": 2}], "bn is text"),
        ([{"n": "a", "v": 1}, {"n": "b", "v": 2, "bt": "x"}, {"n": "c", "v": 3}], "bt is a number"),
        ([{"n": "a", "v": 1}, {"n": "b", "v": 2, "x_": 1}], "x_ must be understood"),
        ([{"n": "a", "v": 1}, {"bver": 11, "n": "b", "v": 2}], "version 11"),
    ],
)
def test_what_is_said_for_the_records_behind_refuses_a_pack(payload, why):
    with pytest.raises(Reject, match=why):
        decode("senml", payload)


def test_a_payload_of_which_nothing_can_be_read_is_refused_as_a_whole():
    for kind, payload in [
        ("influx", "a\nb\n" * 40),
        ("csv", "x,y\n" + "1,2,3\n" * 40),
        ("senml", [{"n": "!", "v": 1}] * 40),
    ]:
        with pytest.raises(Reject) as e:
            decode(kind, payload)
        assert not isinstance(e.value, PartRefused)
        assert len(str(e.value)) < 1_000


def test_many_bad_lines_take_no_longer_than_good_ones():
    # 100,000 fields and parts are the most that one message may become.
    found = decode("influx", "m a=1\n" + 'm s="\\"x\n' * 50_000 + "m b=2\n")
    assert len(found) == 50_002
    assert str(found[-2]).startswith("line 50001: ")
    found = decode("csv", "a\n1\n" + "1,2\n" * 50_000 + "3\n")
    assert [f.value.number for f in found if not isinstance(f, Reject)] == [1, 3]


texts = st.text(alphabet='abm ,="\\\n\r#0123456789.-tie', max_size=80)


@given(st.lists(texts, max_size=3), st.integers(0, 3))
def test_a_good_line_before_others_is_read_whatever_they_are(lines, number):
    found = decode("influx", "\n".join(["good v=1i", *lines]))
    assert (found[0].name, found[0].value) == ("good.v", 1)


@given(
    st.lists(
        st.integers(0, 9) | st.sampled_from(["broken", "m f=", "m f=1,", "m f=0x1", "m,t f=1"]), min_size=1, max_size=12
    )
)
def test_every_good_line_between_bad_ones_is_read(lines):
    text = "\n".join(one if isinstance(one, str) else f"m f={one}i" for one in lines)
    good = [one for one in lines if not isinstance(one, str)]
    try:
        found = decode("influx", text)
    except Reject:
        assert not good
        return
    assert [f.value for f in found if not isinstance(f, Reject)] == good
    assert [f.payload.decode() for f in found if isinstance(f, Reject)] == [
        one for one in lines if isinstance(one, str)
    ]
    assert orjson.dumps([f.payload.decode() for f in found if isinstance(f, Reject)])
