"""Sparkplug B payloads (Eclipse Tahu `sparkplug_b.proto`), by a small reader of protocol buffers.

A metric is a field of its own name. Its unit is the property `engUnit`, its time its own or the payload's. A metric that
comes by alias only (DATA after BIRTH) is named by the parser's source:

```yaml
kind: sparkplug_b
source:
  aliases:
    1: temperature                       # or with the type that the birth certificate gives, for signed numbers
    2: {name: level, type: Int16}
```

Unknown aliases become `alias_N`. Data sets, templates and metrics that are null are left out. A metric that cannot be read is refused by
itself, where the payload around it can be.
"""

import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    ParserError,
    PartRefused,
    Value,
    failed,
    is_word,
    payload_bytes,
    sorted_out,
    source_of,
)
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import ReasonCode, Reject

_TYPES: Final = {
    "Int8": 1, "Int16": 2, "Int32": 3, "Int64": 4, "UInt8": 5, "UInt16": 6, "UInt32": 7, "UInt64": 8, "Float": 9,
    "Double": 10, "Boolean": 11, "String": 12, "DateTime": 13, "Text": 14, "UUID": 15,
}  # fmt: skip
#: Bits of the signed types: they travel as unsigned numbers of 32 or 64 bits, some senders cut them to their own width.
_SIGNED: Final = {1: 8, 2: 16, 3: 32, 4: 64}
_UNITS: Final = frozenset({"engUnit", "engineeringUnits", "Engineering Units", "unit", "units"})
_BOOLEAN: Final = 11
#: The year 9999, where calendars end.
_MS_MAX: Final = 253_402_300_799_999


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            message = "torn: a number does not end"
            raise failed(message)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7


def _written(number: int) -> bytes:
    """A number as `_varint` reads it."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a message's fields; fixed-width values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            message = "no protocol buffer: field number 0"
            raise failed(message)
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            message = f"no protocol buffer: wire type {wire}"
            raise failed(message)
        if at + size > len(data):
            message = f"torn: field {number} needs {size} bytes, {len(data) - at} are left"
            raise failed(message)
        yield number, data[at : at + size]
        at += size


def _text(value: int | bytes) -> str:
    if isinstance(value, int):
        message = "a number where text is needed"
        raise failed(message)
    return value.decode("utf-8", "replace")


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        message = "bytes where a number is needed"
        raise failed(message)
    return value


def _instant(value: int | bytes) -> int | None:
    """µs of a timestamp in milliseconds; a number of 64 bits may be more than any instant."""
    ms = _number(value)
    if ms > _MS_MAX:
        message = f"a timestamp of {ms} ms"
        raise failed(message)
    return instant_us(ms, "ms")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        message = "a number where a message is needed"
        raise failed(message)
    return value


def _float(value: int | bytes, width: int) -> float:
    if isinstance(value, int) or len(value) != width:
        message = f"a floating point number has {width} bytes"
        raise failed(message)
    return float(struct.unpack("<f" if width == 4 else "<d", value)[0])


class SparkplugDecoder:
    """Payloads are bytes, or their hexadecimal or base64 text.

    Args:
        aliases: alias -> (name, type or 0).
    """

    def __init__(self, aliases: Mapping[int, tuple[str, int]]) -> None:
        self._aliases = aliases

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The metrics of a payload, and those that cannot be read.

        Raises:
            Reject: DECODE_FAILED, it is no Sparkplug B payload or holds no values; DECODE_LIMIT.
        """
        data = payload_bytes(raw["payload"])
        at: int | None = None
        time = b""
        metrics: list[bytes] = []
        for number, value in _fields(data):
            if number == 1:
                at, time = _instant(value), b"\x08" + _written(_number(value))
            elif number == 2:
                metrics.append(_message(value))
        if len(metrics) > DECODED_MAX:
            raise Reject(ReasonCode.DECODE_LIMIT, f"{len(metrics)} metrics, more than {DECODED_MAX}")
        out: list[Decoded | Reject] = []
        for index, metric in enumerate(metrics, 1):
            try:
                field = self._metric(metric, at)
            except Reject as e:
                alone = time + b"\x12" + _written(len(metric)) + metric
                out.append(PartRefused(f"metric {index}: {e}", alone))
                continue
            if field is not None:
                out.append(field)
        sorted_out(out)
        if not out:
            message = "the payload holds no metric with a value"
            raise failed(message)
        return out

    def _metric(self, data: bytes, at: int | None) -> Decoded | None:
        name, unit = "", None
        alias: int | None = None
        datatype = 0
        null = False
        found: tuple[int, int | bytes] | None = None
        for number, value in _fields(data):
            if number == 1:
                name = _text(value)
            elif number == 2:
                alias = _number(value)
            elif number == 3:
                at = _instant(value)
            elif number == 4:
                datatype = _number(value)
            elif number == 7:
                null = bool(value)
            elif number == 9:
                unit = _unit(_message(value))
            elif 10 <= number <= 15:
                found = number, value
        if null or found is None:
            return None
        if alias is not None:
            known = self._aliases.get(alias, ("", 0))
            name, datatype = name or known[0] or f"alias_{alias}", datatype or known[1]
        if not name:
            message = "a metric has neither name nor alias"
            raise failed(message)
        return Decoded(name, _value(datatype, *found), unit, at, None)


def _value(datatype: int, number: int, value: int | bytes) -> Value:
    if number == 12:
        return _float(value, 4)
    if number == 13:
        return _float(value, 8)
    if number == 15:
        return _text(value)
    whole = _number(value)
    if number == 14 or datatype == _BOOLEAN:
        return bool(whole)
    bits = _SIGNED.get(datatype)
    if bits is not None:
        whole &= (1 << bits) - 1
        if whole >> (bits - 1):
            whole -= 1 << bits
    return whole


def _unit(data: bytes) -> str | None:
    """The unit in a metric's properties."""
    keys: list[str] = []
    values: list[bytes] = []
    for number, value in _fields(data):
        if number == 1:
            keys.append(_text(value))
        elif number == 2:
            values.append(_message(value))
    for key, property_value in zip(keys, values, strict=False):
        if key in _UNITS:
            for number, value in _fields(property_value):
                if number == 8:
                    return _text(value) or None
    return None


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> SparkplugDecoder:
    """The decoder of a `sparkplug_b` parser; a device's variable `aliases` adds to the source's.

    Raises:
        ParserError: an alias is no number, or its type is unknown.
    """
    source = source_of(doc)
    if unknown := source.keys() - {"description", "aliases"}:
        message = f"a sparkplug_b parser has no setting {sorted(unknown)[0]!r}"
        raise ParserError(message)
    aliases: dict[int, tuple[str, int]] = {}
    for given in (source.get("aliases"), (variables or {}).get("aliases")):
        if given is None:
            continue
        if not isinstance(given, dict):
            message = "aliases is a mapping"
            raise ParserError(message)
        for key, entry in given.items():
            named = entry if isinstance(entry, dict) else {"name": entry}
            kind = named.get("type")
            if (
                not str(key).isdigit()
                or not isinstance(named.get("name"), str)
                or (kind is not None and not is_word(kind, _TYPES))
            ):
                message = f"alias {key}: a number, and its name, or {{name, type}} with a type of Sparkplug"
                raise ParserError(message)
            aliases[int(key)] = named["name"], _TYPES[kind] if kind is not None else 0
    return SparkplugDecoder(aliases)
