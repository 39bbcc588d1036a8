"""Types of fields: how a number or text lies in the payload, and how `struct` reads it."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from preservarium.domain.decoders.base import ParserError
from preservarium.domain.decoders.field_table.language import WIDTH_BYTES_MAX, choice_of
from preservarium.domain.decoders.field_table.writer import Writer

ENDIANS: Final = {"big", "little", "words-little"}
_TYPE: Final = re.compile(
    r"(?P<int>[ui])(?P<bits>\d{1,3})|(?P<excess>ob)(?P<excess_bits>\d{1,3})|(?P<float>f)(?P<float_bits>16|32|64)"
    r"|(?P<bcd>bcd)(?P<bcd_digits>\d{1,2})|(?P<bool>bool)|(?P<other>string|hex|skip)"
)
_STRUCT: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_STRUCT_FLOAT: Final = {2: "e", 4: "f", 8: "d"}
ENCODINGS: Final = {"utf-8", "ascii", "latin-1", "utf-16-le", "utf-16-be"}


@dataclass(frozen=True, slots=True)
class Width:
    """How a type lies in the payload."""

    kind: str  #: uint, int, excess, float, bcd, bool, string, hex, skip
    size: int  #: bytes; 0: given by `length`

    @property
    def bits(self) -> int:
        """How many bits a number of it may have; 0 where it is no whole number."""
        return 0 if self.kind == "float" else self.size * 8


def width_of(text: Any, where: str) -> Width:
    """The width of a type by its name.

    Raises:
        ParserError: there is no such type.
    """
    match = _TYPE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        message = (
            f"{where}: type {text!r} is not u8 … u128, i8 …, ob16 …, f16, f32, f64, bcd2 …, bool, string, hex or skip"
        )
        raise ParserError(message)
    if match["other"]:
        return Width(match["other"], 0)
    if match["bool"]:
        return Width("bool", 1)
    if match["float"]:
        return Width("float", int(match["float_bits"]) // 8)
    if match["bcd"]:
        digits = int(match["bcd_digits"])
        if not digits or digits % 2:
            message = f"{where}: {text} has two digits a byte, so their number is even"
            raise ParserError(message)
        return Width("bcd", digits // 2)
    bits = int(match["bits"] or match["excess_bits"])
    if bits % 8 or not 8 <= bits <= WIDTH_BYTES_MAX * 8:
        message = (
            f"{where}: {text} is not of whole bytes, 8 to {WIDTH_BYTES_MAX * 8} bits; take smaller ones with `bits`"
        )
        raise ParserError(message)
    return Width("excess" if match["excess"] else "int" if match["int"] == "i" else "uint", bits // 8)


def check_length(item: Mapping[str, Any], width: Width, where: str) -> None:
    """Refuse a `length` beside a type that has its own.

    Raises:
        ParserError: there is one.
    """
    if width.size and "length" in item:
        message = f"{where}: {item['type']} has its length in its name"
        raise ParserError(message)


def order_of(item: Mapping[str, Any], default: str, where: str) -> str:
    """Struct's mark of an item's byte order.

    Raises:
        ParserError: its `endian` is none.
    """
    return "<" if choice_of(item.get("endian", default), ENDIANS, f"{where}.endian") == "little" else ">"


class Layout(NamedTuple):
    """How a field is unpacked."""

    format: str  #: of struct, without its byte order
    targets: list[str]  #: variables that it fills
    source: str | None  #: of the raw value; None: padding


def layout_of(item: Mapping[str, Any], width: Width, default: str, writer: Writer, where: str) -> Layout:
    """The layout of a field.

    Args:
        item: the field.
        width: of its type, with its length.
        default: the byte order where the field says none.
        writer: gives names of variables and takes constants.
        where: names the field for messages.

    Raises:
        ParserError: byte order or encoding are wrong.
    """
    endian = choice_of(item.get("endian", default), ENDIANS, f"{where}.endian")
    size, raw = width.size, writer.fresh("r")
    match width.kind:
        case "skip":
            return Layout(f"{size}x", [], None)
        case "float":
            return _float_layout(endian, size, raw, writer)
        case "bool":
            return Layout("B", [raw], f"bool({raw})")
        case "string" | "hex":
            return Layout(f"{size}s", [raw], text_source(item, width, raw, where))
        case "bcd":
            return Layout(f"{size}s", [raw], f"bcd({raw})" if endian == "big" else f"bcd({raw}[::-1])")
    return _int_layout(endian, width, raw, where)


def text_source(item: Mapping[str, Any], width: Width, raw: str, where: str) -> str:
    """Source of the text or the hexadecimal that bytes are.

    Raises:
        ParserError: the encoding is wrong.
    """
    if width.kind == "hex":
        return f"{raw}.hex()"
    encoding = choice_of(item.get("encoding", "utf-8"), ENCODINGS, f"{where}.encoding")
    # Bytes after a NUL are what the sender's buffer held before.
    return f"{raw}.decode({encoding!r}, 'replace').partition('\\0')[0].strip()"


def _float_layout(endian: str, size: int, raw: str, writer: Writer) -> Layout:
    if endian != "words-little" or size == 2:
        return Layout(_STRUCT_FLOAT[size], [raw], raw)
    words = ", ".join(f"{raw}[{i}:{i + 2}]" for i in range(size - 2, -1, -2))
    unpack = writer.constant(struct.Struct(">" + _STRUCT_FLOAT[size]).unpack, "u")
    join = writer.constant(b"".join, "j")
    return Layout(f"{size}s", [raw], f"{unpack}({join}(({words})))[0]")


def _int_layout(endian: str, width: Width, raw: str, where: str) -> Layout:
    size = width.size
    if endian == "words-little" and size > 2:
        if size % 2:
            message = f"{where}: words-little is of whole 16-bit words"
            raise ParserError(message)
        names = [f"{raw}_{i}" for i in range(size // 2)]
        source = "(" + " | ".join(f"{n} << {16 * i}" if i else n for i, n in enumerate(names)) + ")"
        return Layout("H" * len(names), names, _signed(width, source))
    if size in _STRUCT:
        code = _STRUCT[size]
        if width.kind == "int":
            return Layout(code.lower(), [raw], raw)
        return Layout(code, [raw], f"({raw} - {1 << (size * 8 - 1)})" if width.kind == "excess" else raw)
    order = "little" if endian == "little" else "big"
    if width.kind == "int":
        return Layout(f"{size}s", [raw], f"from_bytes({raw}, {order!r}, signed=True)")
    return Layout(f"{size}s", [raw], _signed(width, f"from_bytes({raw}, {order!r})"))


def _signed(width: Width, source: str) -> str:
    bits = width.size * 8
    if width.kind == "excess":
        return f"({source} - {1 << (bits - 1)})"
    return f"_signed({source}, {bits})" if width.kind == "int" else source
