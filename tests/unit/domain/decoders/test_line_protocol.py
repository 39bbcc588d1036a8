"""Line protocol, whole: the published grammar (github.com/influxdata/line-protocol) and InfluxData's reference, and what was written is read."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.decoders import examples
from preservarium.domain.decoders.influx import InfluxDecoder
from preservarium.domain.readings.number import shown
from preservarium.errors import ReasonCode, Reject

T = examples.RECEIVED_AT_US


def read(payload, **source):
    fields = InfluxDecoder(source).decode(examples.raw_message(payload))
    return [(f.name, shown(f.value), f.timestamp, f.pin) for f in fields]


def values(payload, **source):
    return [(name, value) for name, value, _, _ in read(payload, **source)]


# --- what the reference and the grammar's own tests publish ---


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ('myMeasurement,tag1=value1,tag2=value2 fieldKey="fieldValue" 1556813561098000000', [("myMeasurement.fieldKey", "fieldValue")]),
        ("myMeasurement fieldKey=1.0", [("myMeasurement.fieldKey", 1.0)]), ("myMeasurement fieldKey=1", [("myMeasurement.fieldKey", 1)]),
        ("myMeasurement fieldKey=-1.234456e+78", [("myMeasurement.fieldKey", -1.234456e78)]), ("m f=1.234456E-78", [("m.f", 1.234456e-78)]), ("m f=.5,g=5.,h=-.5", [("m.f", 0.5), ("m.g", 5.0), ("m.h", -0.5)]),
        ("myMeasurement fieldKey=1i", [("myMeasurement.fieldKey", 1)]), ("myMeasurement fieldKey=12485903i", [("myMeasurement.fieldKey", 12485903)]), ("m f=-12485903i", [("m.f", -12485903)]),
        ("m f=1u,g=18446744073709551615u", [("m.f", 1), ("m.g", 18446744073709551615)]), ('m f="this is a string"', [("m.f", "this is a string")]),
        *[(f"m f={word}", [("m.f", True)]) for word in ("t", "T", "true", "True", "TRUE")], *[(f"m f={word}", [("m.f", False)]) for word in ("f", "F", "false", "False", "FALSE")],
        # Special characters.
        ("my\\ Measurement fieldKey=1i", [("my Measurement.fieldKey", 1)]), ("my\\,m f=1i", [("my,m.f", 1)]), ("my=m f=1i", [("my=m.f", 1)]), ("my\\=m f=1i", [("my\\=m.f", 1)]),
        ('myMeasurement fieldKey="\\"string\\" within a string"', [("myMeasurement.fieldKey", '"string" within a string')]),
        ("myMeasurement,tag\\ Key1=tag\\ Value1,tag\\ Key2=tag\\ Value2 fieldKey=100", [("myMeasurement.fieldKey", 100)]), ("m k\\ e\\,y\\=1=1i", [("m.k e,y=1", 1)]),
        ('myMeasurement,tagKey=🍭 fieldKey="Launch 🚀" 1556813561098000000', [("myMeasurement.fieldKey", "Launch 🚀")]),
        # Backslashes in strings, one to five: "too hot\cold" and so on.
        ('m t="too hot\\cold"', [("m.t", "too hot\\cold")]), ('m t="too hot\\\\cold"', [("m.t", "too hot\\cold")]), ('m t="too hot\\\\\\cold"', [("m.t", "too hot\\\\cold")]),
        ('m t="too hot\\\\\\\\cold"', [("m.t", "too hot\\\\cold")]), ('m t="too hot\\\\\\\\\\cold"', [("m.t", "too hot\\\\\\cold")]),
        # Backslashes elsewhere stand for themselves, several of them, too; only the last can escape.
        ("C:\\temp f=1i", [("C:\\temp.f", 1)]), ("a\\\\b f=1i", [("a\\\\b.f", 1)]), ("a\\\\\\ b f=1i", [("a\\\\ b.f", 1)]), ("m,k=a\\b f\\x=1i", [("m.f\\x", 1)]),
        # Quotes elsewhere are characters.
        ('"m" "f"=1i', [('"m"."f"', 1)]), ('m,t="x" f=1i', [("m.f", 1)]),
        # Line ends in strings (telegraf #4942, influxdb #3565).
        ('weather temp_x=82i,s="a\nb" 1795993269000000000', [("weather.temp_x", 82), ("weather.s", "a\nb")]), ('m f="hello\ngoodbye\nx",g=1', [("m.f", "hello\ngoodbye\nx"), ("m.g", 1)]),
        ('m s="a\r\n#b\n\nc d=e,f" 1\nn v=2i', [("m.s", "a\r\n#b\n\nc d=e,f"), ("n.v", 2)]), ('m s="comma, blank = quote\\""', [("m.s", 'comma, blank = quote"')]),
        # Comments, empty lines, blanks, line ends.
        ("# comment\nm x=1\n# last", [("m.x", 1)]), ("\n\n  # comment\r\n m x=1 \r\n\r\n  \nn y=2  5\r\n", [("m.x", 1), ("n.y", 2)]), ("m x=1\r\n", [("m.x", 1)]), ("m x=1\r", [("m.x", 1)]), ("9 f=-7 ", [("9.f", -7)]),
        ("  m,tag1=val1  x=1,y=2   1602841605822791506\n", [("m.x", 1), ("m.y", 2)]), ("", []), ("\n", []), ("# only a comment", []), ("\r\n \r\n", []),
    ],
)  # fmt: skip
def test_what_is_published(text, fields):
    assert values(text) == fields
    assert values(text.encode()) == fields
    assert values(b"\xef\xbb\xbf" + text.encode() + b"\0") == fields


@pytest.mark.parametrize(
    "text",
    [
        "m", "m,", "m,t", "m,t=", "m,=v f=1", "m,t=v", "m,t=v, f=1", "m ", "m f", "m f=", "m =1", "m f=1,", "m f=1,,g=2", "m f=1, g=2", "m,t=a=b f=1", "m f=g=1", ",t=v f=1", "m f=abc", "m f=tRUE", "m f=1a", "m f=0x1F", "m f=1_0",
        "m f=１２", "m f=１２i", "m f=1.5i", "m f=1e3i", "m f=-1u", "m f=i", "m f=-", "m f=.", "m f=1e", "m f='x'", 'm f="x', 'm f="x\\"', 'm f="a"b', 'm f="a" "b"', "m f=1 soon", "m f=1 1 2", "m f=1 1.5", "m f=1 1_0", "m f=1 +1",
        "m f=1 99999999999999999999999", "m\tf=1", "m f\x01=1", "m,t\x02=v f=1", "# comment\nbroken", 'n g="a\nb', "m f=\x00",
    ],
)  # fmt: skip
def test_what_is_no_line_protocol(text):
    with pytest.raises(Reject) as caught:
        read(text)
    assert caught.value.code is ReasonCode.DECODE_FAILED
    assert str(caught.value)


def test_an_open_quote_is_named():
    with pytest.raises(Reject, match="a quote is not closed"):
        read('m a=1,s="b\nc')


@pytest.mark.parametrize(("precision", "factor"), [("ns", 1000), ("us", 1), ("ms", 1 / 1000), ("s", 1 / 1_000_000)])
def test_precisions(precision, factor):
    assert read(f"m f=1 {int(T * factor)}", precision=precision)[0][2] == T


def test_negative_and_absent_times_and_the_pin():
    assert read("m,ch=a\\ b,x=1 f=1 -1500") == [("m.f", 1, -2, None)]
    assert read("m,ch=a\\ b,x=1 f=1", pin_tag="ch", measurement=False) == [("f", 1, None, "a b")]
    assert read("m,c\\,h=7 f=1", pin_tag="c,h")[0][3] == "7"


def test_a_number_that_is_not_finite_refuses_its_field_only():
    (first, bad, worse, last) = values("m a=1,b=NaN,c=-Inf,d=2")
    assert (first, last) == (("m.a", 1), ("m.d", 2))
    assert math.isnan(bad[1])
    assert math.isnan(worse[1])
    assert values("m a=1e999")[0][1] == math.inf


@pytest.mark.parametrize("text", ["00123", "241408E4", "1.10", "89490200001234567890", "+5", "5."])
def test_a_number_keeps_its_digits_for_a_datatype_of_text(text):
    (field,) = InfluxDecoder({}).decode(examples.raw_message(f"m v={text}"))
    assert str(field.value) == text
    assert float(field.value.number) == float(text)
    assert field.value.typed


# --- what was written is read ---

printable = st.characters(exclude_categories=["Cs", "Cc"])
# A backslash at the end of a name would escape what follows it: the format has no way to write one.
names = st.text(printable, min_size=1, max_size=12).filter(lambda s: not s.endswith("\\") and "\x7f" not in s)
measurements = names.filter(lambda s: not s.startswith(("#", " ")))
field_values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
points = st.tuples(
    measurements,
    st.dictionaries(names, names, max_size=3),
    st.dictionaries(names, field_values, min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
)


def escaped(text, characters):
    return "".join(f"\\{c}" if c in characters else c for c in text)


def line(point):
    measurement, tags, fields, at = point
    head = escaped(measurement, ", ") + "".join(f",{escaped(k, ',= ')}={escaped(v, ',= ')}" for k, v in tags.items())
    body = ",".join(f"{escaped(k, ',= ')}={value(v)}" for k, v in fields.items())
    return f"{head} {body}" + ("" if at is None else f" {at}")


def value(given_value):
    if isinstance(given_value, bool):
        return "true" if given_value else "F"
    if isinstance(given_value, int):
        return f"{given_value}i"
    return repr(given_value) if isinstance(given_value, float) else f'"{escaped(given_value, chr(34) + chr(92))}"'


@given(
    st.lists(points, max_size=5),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n# between\n", " \n"]),
    st.sampled_from(["", "\n", "\r\n", "\0"]),
)
def test_what_was_written_is_read(written, between, behind):
    payload = (between.join(map(line, written)) + behind).encode()
    expected = [
        (f"{measurement}.{key}"[:200], one, None if at is None else at // 1_000)
        for measurement, _, fields, at in written
        for key, one in fields.items()
    ]
    found = [(f.name, shown(f.value), f.timestamp) for f in InfluxDecoder({}).decode(examples.raw_message(payload))]
    assert found == expected


@given(st.text(st.sampled_from('ab,=\\" \n\r#01.-eiut'), max_size=60))
def test_any_text_of_its_characters_is_points_or_a_reject(text):
    try:
        read(text)
    except Reject as e:
        assert e.code is ReasonCode.DECODE_FAILED  # noqa: PT017  # both ways are right
