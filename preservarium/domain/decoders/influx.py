"""InfluxDB line protocol: `measurement,tag=value field=1.5,other=2i timestamp` a line (InfluxData, "Line protocol reference").

A field is named `measurement.field`, or by the field alone where the source says `measurement: false`. The tag that the
source names with `pin_tag` is the pin.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import DECODED_MAX, Decoded, ParserError, Value, failed, source_of
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.instant import instant_us
from preservarium.domain.reading import RawMessage

_PRECISIONS: Final = {"ns", "us", "ms", "s"}
NAME_CHARACTERS_MAX: Final = 200
_INTEGER: Final = re.compile(r"[+-]?\d{1,20}[iu]")
_FLOAT: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_BOOLEANS: Final = {
    "t": True, "T": True, "true": True, "True": True, "TRUE": True,
    "f": False, "F": False, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


def _split(text: str, separator: str, quotes: bool) -> list[str]:
    """Split at separators that are neither escaped nor (with `quotes`) between double quotes; escapes stay."""
    parts: list[str] = []
    start = i = 0
    quoted = False
    while i < len(text):
        c = text[i]
        if c == "\\":
            i += 2
            continue
        if c == '"' and quotes:
            quoted = not quoted
        elif c == separator and not quoted:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    if quoted:
        message = "a quote is not closed"
        raise failed(message)
    parts.append(text[start:])
    return parts


def _plain(text: str) -> str:
    return re.sub(r"\\([,= \\])", r"\1", text)


def _pair(text: str) -> tuple[str, str]:
    parts = _split(text, "=", quotes=True)
    if len(parts) != 2 or not parts[0] or not parts[1]:
        message = f"{text!r:.80} is not key=value"
        raise failed(message)
    return _plain(parts[0]), parts[1]


def _value(text: str) -> Value:
    if text.startswith('"'):
        if len(text) < 2 or not text.endswith('"'):
            message = "a quote is not closed"
            raise failed(message)
        return re.sub(r'\\(["\\])', r"\1", text[1:-1])
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INTEGER.fullmatch(text):
        return int(text[:-1])
    if _FLOAT.fullmatch(text):
        return float(text)
    message = f"{text!r:.80} is no value"
    raise failed(message)


class InfluxDecoder:
    """Payloads are text or UTF-8 bytes of one line or many."""

    __slots__ = ("_measurement", "_pin_tag", "_precision")

    def __init__(self, source: Mapping[str, Any]) -> None:
        self._precision = source.get("precision", "ns")
        self._pin_tag = source.get("pin_tag")
        self._measurement = source.get("measurement", True)
        if (
            self._precision not in _PRECISIONS
            or not isinstance(self._measurement, bool)
            or not isinstance(self._pin_tag, str | None)
            or source.keys() - {"precision", "pin_tag", "measurement", "description"}
        ):
            message = (
                "an influx parser knows `precision` (ns, us, ms, s), `pin_tag` (a tag) and `measurement` (true, false)"
            )
            raise ParserError(message)

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The fields of every line.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        payload = raw["payload"]
        if isinstance(payload, bytes):
            try:
                payload = payload.decode()
            except UnicodeDecodeError:
                message = "the payload is not UTF-8"
                raise failed(message) from None
        if not isinstance(payload, str):
            message = f"line protocol is text, not {type(payload).__name__}"
            raise failed(message)
        out: list[Decoded] = []
        for line in payload.split("\n"):
            line = line.strip("\r ")
            if line and not line.startswith("#"):
                self._line(line, out)
            if len(out) > DECODED_MAX:
                raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")
        return out

    def _line(self, line: str, out: list[Decoded]) -> None:
        parts = [part for part in _split(line, " ", quotes=True) if part]
        if not 2 <= len(parts) <= 3:
            message = f"{line!r:.80} is not measurement, fields and time"
            raise failed(message)
        measurement, *tags = _split(parts[0], ",", quotes=False)
        pin = None
        for tag in tags:
            key, value = _pair(tag)
            if key == self._pin_tag:
                pin = _plain(value)
        at: int | None = None
        if len(parts) == 3:
            try:
                at = instant_us(int(parts[2]), self._precision)
            except ValueError:
                at = None
            if at is None:
                message = f"{parts[2]!r:.40} is no time"
                raise failed(message)
        for field in _split(parts[1], ",", quotes=True):
            key, text = _pair(field)
            name = f"{_plain(measurement)}.{key}" if self._measurement else key
            out.append(Decoded(name[:NAME_CHARACTERS_MAX], _value(text), None, at, pin))


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> InfluxDecoder:
    """The decoder of an `influx` parser. Variables are not used.

    Raises:
        ParserError: the source is wrong.
    """
    return InfluxDecoder(source_of(doc))
