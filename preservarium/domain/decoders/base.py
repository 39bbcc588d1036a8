"""The one contract of every parser: a raw message in, decoded fields or a reason out."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.instant import instant_us
from preservarium.domain.reading import RawMessage

#: Fields that one message may decode into, whatever the settings say: a bound for decoders that expand (repeats, TLV).
DECODED_MAX: Final = 100_000

Value = float | int | str | bool | None


class Decoded(NamedTuple):
    """One field as a parser found it, before any mapping."""

    name: str  #: the parser's name for it
    value: Value  #: NaN where the payload's numbers allow no answer
    unit: str | None  #: as the device or the parser spells it; None where it has none
    timestamp: int | None  #: µs; None: the message's
    pin: str | None  #: which of several; None: the mapping says


class Decoder(Protocol):
    """A compiled parser.

    Pure and deterministic: the same message gives the same fields in the same order. `raw` is not altered.
    """

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The fields of a message.

        Raises:
            Reject: the payload is not of this format (DECODE_FAILED), or becomes too much (DECODE_LIMIT).
        """
        ...


class ParserError(ValueError):
    """The parser itself is wrong: it cannot be compiled."""


def failed(message: str) -> Reject:
    """The payload is not of the parser's format."""
    return Reject(ReasonCode.DECODE_FAILED, message)


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
    message = f"the payload is not bytes but {type(payload).__name__}"
    raise failed(message)


def source_of(doc: Mapping[str, Any]) -> dict[str, Any]:
    """A parser's source as data; an absent one is empty.

    Raises:
        ParserError: it is not a mapping.
    """
    source = doc.get("source")
    if source is None:
        return {}
    if not isinstance(source, dict):
        message = f"the source of a {doc.get('kind')} parser is a mapping, not {type(source).__name__}"
        raise ParserError(message)
    return source
