"""InfluxDB line protocol: `measurement,tag=value field=1.5,other=2i timestamp` a line (InfluxData, "Line protocol reference").

A field is named `measurement.field`, or by the field alone where the source says `measurement: false`. The tag that the
source names with `pin_tag` is the pin.

| where | a backslash escapes | else |
|---|---|---|
| measurement | comma, blank | it stands for itself |
| tag, field key | comma, blank, equals sign | it stands for itself |
| string in quotes | quote, backslash | it stands for itself; a line end is part of the string |

A line that is none is refused by itself, and the others are read. Where a quote is not closed, the line ends where it ends;
where it was closed by the quote of a later line, too, and that line is read anew.

Lines end with LF or CR LF; empty ones and those that begin with `#` say nothing. A value is a float, a whole number with `i` or `u`
behind it, a string, or one of t, T, true, True, TRUE and f, F, false, False, FALSE. More than the reference allows: a plus sign,
whole numbers of more than 64 bits, and `NaN` or `Inf`, which refuse their field and not the message.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    ParserError,
    PartRefused,
    Value,
    is_word,
    sorted_out,
    source_of,
    text_of,
)
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import number_of, says_not_finite, whole_number, written
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import ReasonCode, Reject

_PRECISIONS: Final = {"ns", "us", "ms", "s"}
#: Where the precision that a request names stands in `meta`.
PRECISION: Final = "precision"
NAME_CHARACTERS_MAX: Final = 200
#: 64 bits and a sign.
_TIME_CHARACTERS_MAX: Final = 20
_BOOLEANS: Final = {
    "t": True, "T": True, "true": True, "True": True, "TRUE": True,
    "f": False, "F": False, "false": False, "False": False, "FALSE": False,
}  # fmt: skip

# The grammar of https://github.com/influxdata/line-protocol (line-protocol.ebnf), as expressions that are matched one after
# the other. Of several backslashes only the last can escape what follows.
_KEY: Final = r"(?:[^\x00-\x1f\x7f ,=\\]|\\+[^\x00-\x1f\x7f\\])+"
_NOTHING: Final = re.compile(r"(?:[ \r]*(?:#[^\n]*)?\n)*[ \r]*(?:#[^\n]*)?")
_MEASUREMENT: Final = re.compile(r"(?:[^\x00-\x1f\x7f ,\\]|\\+[^\x00-\x1f\x7f\\])+")
_TAG: Final = re.compile(f",({_KEY})=({_KEY})")
_BLANKS: Final = re.compile(" +")
_FIELD: Final = re.compile(rf'({_KEY})=(?:"((?:[^"\\]|\\.)*)"|([^, \r\n"]+))', re.DOTALL)
_END: Final = re.compile(r"(?: +(-?[0-9]+))? *\r*(?:\n|\Z)")
_OPEN_QUOTE: Final = re.compile(f'{_KEY}="')

_ESCAPED_IN_MEASUREMENT: Final = re.compile(r"\\([, ])")
_ESCAPED_IN_KEY: Final = re.compile(r"\\([,= ])")
_ESCAPED_IN_STRING: Final = re.compile(r'\\(["\\])')


def _plain(text: str, escaped: re.Pattern[str]) -> str:
    return escaped.sub(r"\1", text) if "\\" in text else text


class _Broken(Exception):
    """Here a text is no line protocol any more."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def _value(text: str, position: int) -> Value:
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    number = whole_number(text[:-1]) if text[-1] in "iu" else number_of(text)
    if number is not None and not (text[0] == "-" and text[-1] == "u"):
        return written(text.rstrip("iu"), number)
    if says_not_finite(text):
        return math.nan
    message = f"{text!r:.80} is no value"
    raise _Broken(message, position)


class Point(NamedTuple):
    """A point as it stands in a text, for whoever has to say what it is of."""

    measurement: str
    tags: dict[str, str]
    text: str  #: of the point, without the line end behind it


def points(text: str) -> Iterator[Point | PartRefused]:
    """The points of a text, in their order, and the lines that are none; values are not read.

    Args:
        text: line protocol.
    """
    position, number, counted = 0, 1, 0
    while (position := _match(_NOTHING, text, position).end()) < len(text):
        start = position
        try:
            measurement = _match(_MEASUREMENT, text, position)
            position = measurement.end()
            tags: dict[str, str] = {}
            while text.startswith(",", position):
                tag = _match(_TAG, text, position)
                position = tag.end()
                tags[_plain(tag[1], _ESCAPED_IN_KEY)] = _plain(tag[2], _ESCAPED_IN_KEY)
            position = _match(_BLANKS, text, position).end()
            while True:
                field = _match(_FIELD, text, position)
                position = field.end()
                if not text.startswith(",", position):
                    break
                position += 1
            end = _END.match(text, position)
            if end is None:
                if field[2] is not None and "\n" in field[2] and not text.startswith(" ", position):
                    raise _not_closed(text, field.start())
                message = f"{_shown(text, start)} is not measurement, fields and time"
                raise _Broken(message, position)
            position = end.end()
            yield Point(_plain(measurement[0], _ESCAPED_IN_MEASUREMENT), tags, text[start:position].rstrip("\r\n"))
        except _Broken as e:
            number, counted = number + text.count("\n", counted, start), start
            ends = text.find("\n", e.position)
            position = len(text) if ends < 0 else ends
            yield PartRefused(f"line {number}: {e}", text[start:position].encode())


class InfluxDecoder:
    """Payloads are text or UTF-8 bytes of one line or many; a point has a line, or more where a string has line ends in it."""

    __slots__ = ("_measurement", "_pin_tag", "_precision")

    def __init__(self, source: Mapping[str, Any]) -> None:
        self._precision = source.get("precision", "ns")
        self._pin_tag = source.get("pin_tag")
        self._measurement = source.get("measurement", True)
        if (
            not is_word(self._precision, _PRECISIONS)
            or not isinstance(self._measurement, bool)
            or not isinstance(self._pin_tag, str | None)
            or source.keys() - {"precision", "pin_tag", "measurement", "description"}
        ):
            message = (
                "an influx parser knows `precision` (ns, us, ms, s), `pin_tag` (a tag) and `measurement` (true, false)"
            )
            raise ParserError(message)

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The fields of every line, and the lines that are none.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        text = text_of(raw["payload"], "line protocol")
        # What the sender said of all its points counts before what the parser says of all its devices.
        said = raw["meta"].get(PRECISION) if raw["meta"] else None
        precision: str = said if isinstance(said, str) and said in _PRECISIONS else self._precision
        out: list[Decoded | Reject] = []
        position = counted = 0
        number = 1
        while (position := _match(_NOTHING, text, position).end()) < len(text):
            try:
                position = self._point(text, position, precision, out)
            except _Broken as e:
                number, counted = number + text.count("\n", counted, position), position
                end = text.find("\n", e.position)
                end = len(text) if end < 0 else end
                message = f"line {number}: {e}"
                out.append(PartRefused(message, text[position:end].encode()))
                position = end
            if len(out) > DECODED_MAX:
                raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")
        sorted_out(out)
        return out

    def _point(self, text: str, position: int, precision: str, out: list[Decoded | Reject]) -> int:
        """Read the point at a position; where it ends."""
        start = position
        measurement = _match(_MEASUREMENT, text, position)
        position, pin = measurement.end(), None
        while text.startswith(",", position):
            tag = _match(_TAG, text, position)
            position = tag.end()
            if self._pin_tag is not None and _plain(tag[1], _ESCAPED_IN_KEY) == self._pin_tag:
                pin = _plain(tag[2], _ESCAPED_IN_KEY)
        position = _match(_BLANKS, text, position).end()
        prefix = f"{_plain(measurement[0], _ESCAPED_IN_MEASUREMENT)}." if self._measurement else ""
        fields: list[tuple[str, Value]] = []
        while True:
            field = _match(_FIELD, text, position)
            position = field.end()
            name = (prefix + _plain(field[1], _ESCAPED_IN_KEY))[:NAME_CHARACTERS_MAX]
            fields.append(
                (name, _value(field[3], position) if field[2] is None else _plain(field[2], _ESCAPED_IN_STRING))
            )
            if not text.startswith(",", position):
                break
            position += 1
        end = _END.match(text, position)
        if end is None:
            if field[2] is not None and "\n" in field[2] and not text.startswith(" ", position):
                # A quote of another line has closed it.
                raise _not_closed(text, field.start())
            message = f"{_shown(text, start)} is not measurement, fields and time"
            raise _Broken(message, position)
        at: int | None = None
        if end[1] is not None:
            at = instant_us(int(end[1]), precision) if len(end[1]) <= _TIME_CHARACTERS_MAX else None
            if at is None:
                message = f"{end[1]!r:.40} is no time"
                raise _Broken(message, end.start(1))
        out += [Decoded(name, value, None, at, pin) for name, value in fields]
        return end.end()


def _match(expected: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    match = expected.match(text, position)
    if match is None:
        if expected is _FIELD and _OPEN_QUOTE.match(text, position):
            raise _not_closed(text, position)
        what = _EXPECTED[expected]
        message = f"{what} is expected at {_shown(text, position)}"
        raise _Broken(message, position)
    return match


def _not_closed(text: str, position: int) -> _Broken:
    return _Broken(f"a quote is not closed: {_shown(text, position)}", position)


def _shown(text: str, position: int) -> str:
    shown = text[position : position + 80].partition("\n")[0].rstrip("\r")
    return repr(shown) if shown else "the end"


_EXPECTED: Final = {
    _MEASUREMENT: "a measurement",
    _TAG: "key=value",
    _BLANKS: "a blank and fields",
    _FIELD: "key=value",
}


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> InfluxDecoder:
    """The decoder of an `influx` parser. Variables are not used.

    Raises:
        ParserError: the source is wrong.
    """
    return InfluxDecoder(source_of(doc))
