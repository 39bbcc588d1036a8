"""The one contract of every parser: a raw message in, decoded fields or a reason out."""

import base64
import binascii
import codecs
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import THOUSANDS
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.readings.wall_clock import WallClock, wall_clock
from preservarium.errors import ReasonCode, Reject

#: Fields that one message may decode into, whatever the settings say: a bound for decoders that expand (repeats, TLV).
DECODED_MAX: Final = 100_000

#: Of many reasons why nothing of a message can be used, so many are said.
REASONS_MAX: Final = 5

Value = float | int | str | bool | None


#: Encodings of Python's that are no character sets.
_NO_ENCODINGS: Final = {"idna", "mbcs", "oem", "punycode", "raw-unicode-escape", "unicode-escape", "undefined"}


class Decoded(NamedTuple):
    """One field as a parser found it, before any mapping."""

    name: str  #: the parser's name for it
    value: Value  #: text is a number.Written where its format has a number in it; NaN where the payload's numbers allow no answer
    unit: str | None  #: as the device or the parser spells it; None where it has none
    timestamp: int | None  #: µs; None: the message's
    pin: str | None  #: which of several; None: the mapping says


_DECODED: Final = frozenset({Decoded})


class PartRefused(Reject):
    """A part of a payload that can stand by itself, a line or a record, is not of the parser's format.

    Args:
        message: why, for people.
        payload: the part, as a payload of its own.
    """

    def __init__(self, message: str, payload: bytes) -> None:
        super().__init__(ReasonCode.DECODE_FAILED, message)
        self.payload = payload


class Decoder(Protocol):
    """A compiled parser.

    Pure and deterministic: the same message gives the same fields in the same order. `raw` is not altered.
    """

    def decode(self, raw: RawMessage) -> Sequence[Decoded | Reject]:
        """The fields of a message, and of its parts that are not of this format why not.

        Raises:
            Reject: the payload is not of this format (DECODE_FAILED), nor is any part of it, or it becomes too much
                (DECODE_LIMIT).
        """
        ...


#: What of a field does not depend on the message: name, unit, pin.
Head = tuple[str, str | None, str | None]


class Layout:
    """The heads of fields that many messages have in common, in their order. Compared by identity, so that it is found fast.

    Args:
        heads: of the fields; None for one that is never looked at, whatever its value.
    """

    __slots__ = ("heads",)

    def __init__(self, heads: Sequence[Head | None]) -> None:
        self.heads = tuple(heads)


#: (their heads, their values in the same order, None for what is absent, the instant of all of them in µs or None)
Row = tuple[Layout, Sequence[Any], int | None]

#: The short way of a decoder, its attribute `row`: the fields of a message whose heads are known beforehand. What is in a row is
#: what `decode` gives, unless a value is something else than a float, a whole number, a boolean or a text: then only `decode` knows,
#: as it does where there is no row (None). Raises Reject only where `decode` does.
RowReader = Callable[[RawMessage], Row | None]


class ParserError(ValueError):
    """The parser itself is wrong: it cannot be compiled."""


def failed(message: str) -> Reject:
    """The payload is not of the parser's format."""
    return Reject(ReasonCode.DECODE_FAILED, message)


def sorted_out(found: Sequence[Decoded | Reject]) -> tuple[Sequence[Decoded], list[Reject]]:
    """What a parser found: the fields, and why other parts gave none.

    Raises:
        Reject: there is no field at all.
    """
    if _DECODED.issuperset(map(type, found)):
        return cast(Sequence[Decoded], found), []
    refused = [one for one in found if isinstance(one, Reject)]
    fields = [one for one in found if not isinstance(one, Reject)]
    if not fields:
        raise nothing_left(refused)
    return fields, refused


def nothing_left(refused: Sequence[Reject]) -> Reject:
    """Why nothing of a message can be used: the reasons for its parts, with the code of the first."""
    return Reject(refused[0].code, "; ".join(map(str, refused[:REASONS_MAX])))


def base_time(raw: RawMessage) -> int:
    """The instant that relative times of a payload count from: the network's, else when it was received."""
    return message_time(raw)[0]


def message_time(raw: RawMessage) -> tuple[int, bool]:
    """(instant in µs, whether the device or its network gave it): `meta.time`, else `received_at`."""
    given = raw["meta"].get("time") if raw["meta"] else None
    if given is not None and (at := instant_us(given)) is not None:
        return at, True
    return raw["received_at"], False


def payload_bytes(payload: Any) -> bytes:
    """The bytes of a payload: as they are, or written as hexadecimal or base64 text.

    Raises:
        Reject: DECODE_FAILED, it is neither.
    """
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, str):
        text = payload.strip()
        try:
            return bytes.fromhex(text.removeprefix("0x"))
        except ValueError:
            pass
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            pass
        message = "the payload is text, and neither hexadecimal nor base64"
        raise failed(message)
    message = f"the payload is not bytes but {json_text.kind_of(payload)}"
    raise failed(message)


def text_of(payload: Any, what: str, encoding: str | None = None) -> str:
    """A payload of text, without a byte order mark before it and NULs or line ends behind it.

    Args:
        payload: text, or its bytes.
        what: the format's name, for the message.
        encoding: of bytes; None: UTF-8, or UTF-16 where a byte order mark says so.

    Raises:
        Reject: DECODE_FAILED, it is no text.
    """
    if isinstance(payload, bytes):
        if encoding is None:
            encoding = "utf-16" if payload.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
        try:
            payload = payload.decode(encoding)
        except UnicodeError:
            message = f"the payload is not {encoding.upper()}"
            raise failed(message) from None
    if not isinstance(payload, str):
        message = f"{what} is text, not {json_text.kind_of(payload)}"
        raise failed(message)
    return payload.removeprefix("\ufeff").rstrip("\0\r\n")


def marks_of(source: Mapping[str, Any]) -> tuple[str, str]:
    """(decimal mark, mark between thousands or "") of the numbers in a parser's texts: `decimal` and `thousands` of its source.

    Raises:
        ParserError: one is none, or both are the same.
    """
    decimal, thousands = source.get("decimal", "."), source.get("thousands", "")
    if decimal not in [".", ","] or thousands not in ["", *THOUSANDS] or thousands == decimal:
        message = f"decimal is . or , and thousands another one of {' '.join(THOUSANDS)} or a blank"
        raise ParserError(message)
    return decimal, thousands


def encoding_of(name: Any) -> str:
    """The name of a character set, as Python knows it.

    Raises:
        ValueError: it is none.
    """
    try:
        known = codecs.lookup(name).name if isinstance(name, str) else ""
        if known and known not in _NO_ENCODINGS:
            "".encode(known)  # LookupError for what makes bytes of bytes
            return known
    except (LookupError, ValueError):
        pass
    message = f"{name!r:.40} is no encoding; utf-8, cp1252, latin-1, utf-16 are some"
    raise ValueError(message)


def clock_of(source: Mapping[str, Any], time_zone: Any) -> WallClock | None:
    """The clock of instants without an offset: the device's or its type's, else the `time_zone` of the source; None: UTC.

    Args:
        source: of the parser.
        time_zone: of the device or its type, which may be anything.

    Raises:
        ParserError: there is no such zone.
    """
    name = time_zone if time_zone is not None else source.get("time_zone")
    if name is None:
        return None
    try:
        return wall_clock(name) if isinstance(name, str) else WallClock(name)
    except ValueError as e:
        message = f"time_zone: {e}"
        raise ParserError(message) from None


def zone_in(variables: Mapping[str, Any] | None) -> Any:
    """The `time_zone` among a device's variables, where its own and its type's stand (readings/normalize.py)."""
    return variables.get("time_zone") if variables else None


def is_word(value: Any, words: Container[str]) -> bool:
    """Whether a value out of a source, which may be anything, is one of these words."""
    return isinstance(value, str) and value in words


def source_of(doc: Mapping[str, Any]) -> dict[str, Any]:
    """A parser's source as data; an absent one is empty.

    Raises:
        ParserError: it is not a mapping.
    """
    source = doc.get("source")
    if source is None:
        return {}
    if not isinstance(source, dict):
        message = f"the source of a {doc.get('kind')} parser is a mapping, not {json_text.kind_of(source)}"
        raise ParserError(message)
    return source
