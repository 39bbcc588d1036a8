"""Declarative binary field tables: a payload format as data, compiled once to straight Python.

A table is a list of items, read in order from the first byte. docs/FIELD_TABLES.md describes the language for users.

| item | keys |
|------|------|
| field | `name`, `type`, and how the number becomes a value: `scale`, `div`, `offset`, `expr`, `enum`, … |
| computed field | `name`, `expr` over earlier fields and parameters, no `type` |
| group | `when` (a condition), `fields`, optional `else`; `within` (a length in bytes) bounds it |
| repeat | `repeat` (a number, an expression or `end`), `fields`; `i` counts from 0 |
| choice | `switch` (an expression), `cases` (number -> fields), optional `default` |

The compiler checks the whole table first and generates one function: runs of fixed-width fields become one
`struct.unpack_from`, expressions become inlined arithmetic. A generated function holds nothing but names that the compiler made,
`repr()` of constants, and the functions of `expressions.NAMESPACE`.
"""

import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from preservarium.domain import expressions
from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    ParserError,
    base_time,
    failed,
    payload_bytes,
    source_of,
)
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.expressions import ExpressionError, Name
from preservarium.domain.instant import UNITS_US
from preservarium.domain.reading import RawMessage

#: Items in one table, all levels: the longest real one (a multi-depth soil probe) has about 60.
ITEMS_MAX: Final = 2_000
#: Levels of groups, repeats and choices.
DEPTH_MAX: Final = 8
#: Turns of all loops of one payload together; no LoRaWAN payload has more than 242 bytes, gateways' files some thousands.
TURNS_MAX: Final = 20_000
#: Longest number in bytes.
WIDTH_BYTES_MAX: Final = 16
#: Longest name, text length and enumeration of a table.
NAME_CHARACTERS_MAX: Final = 200
ENUM_MAX: Final = 4_096

_FIELD_KEYS: Final = {
    "name", "key", "type", "endian", "at", "length", "scale", "div", "offset", "expr", "unit", "pin", "emit", "enum",
    "bits", "equals", "invalid", "time", "epoch", "encoding", "when", "description", "round",
}  # fmt: skip
_PART_KEYS: Final = {
    "name", "key", "bit", "bits", "signed", "scale", "div", "offset", "expr", "unit", "pin", "emit", "enum", "equals",
    "invalid", "description", "round",
}  # fmt: skip
_GROUP_KEYS: Final = {"when", "fields", "else", "within", "time_offset_s", "description"}
_REPEAT_KEYS: Final = {"repeat", "fields", "when", "time_offset_s", "description"}
_CHOICE_KEYS: Final = {"switch", "cases", "default", "when", "description"}
_TABLE_KEYS: Final = {"endian", "rest", "parameters", "fields", "ports", "description"}
_ENDIANS: Final = {"big", "little", "words-little"}
_TYPE: Final = re.compile(
    r"(?P<int>[ui])(?P<bits>\d{1,3})|(?P<excess>ob)(?P<excess_bits>\d{1,3})|(?P<float>f)(?P<float_bits>16|32|64)"
    r"|(?P<bcd>bcd)(?P<bcd_digits>\d{1,2})|(?P<bool>bool)|(?P<other>string|hex|skip)"
)
_IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TEMPLATE: Final = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")
_STRUCT: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
_STRUCT_FLOAT: Final = {2: "e", 4: "f", 8: "d"}
_ENCODINGS: Final = {"utf-8", "ascii", "latin-1", "utf-16-le", "utf-16-be"}
_EPOCHS: Final = {"unix": 0, "gps": 315_964_800, "2000": 946_684_800}
#: An instant beyond this is no device's time whatever its unit; it keeps sums within 64 bits.
_INSTANT_US_MAX: Final = 2**62


def slug(name: str) -> str:
    """A name as an identifier: lower case, runs of other characters become one underscore.

    `CH4: NO2 (we)` becomes `ch4_no2_we`.
    """
    text = re.sub(r"[^0-9a-z]+", "_", name.replace("µ", "u").replace("°", "deg").lower()).strip("_")
    return text if not text[:1].isdigit() else f"n{text}"


@dataclass(frozen=True, slots=True)
class _Width:
    """How a type lies in the payload."""

    kind: str  #: uint, int, excess, float, bcd, bool, string, hex, skip
    size: int  #: bytes; 0: given by `length`

    @property
    def bits(self) -> int:
        return 0 if self.kind == "float" else self.size * 8


def _width(text: Any, where: str) -> _Width:
    match = _TYPE.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        message = (
            f"{where}: type {text!r} is not u8 … u128, i8 …, ob16 …, f16, f32, f64, bcd2 …, bool, string, hex or skip"
        )
        raise ParserError(message)
    if match["other"]:
        return _Width(match["other"], 0)
    if match["bool"]:
        return _Width("bool", 1)
    if match["float"]:
        return _Width("float", int(match["float_bits"]) // 8)
    if match["bcd"]:
        digits = int(match["bcd_digits"])
        if not digits or digits % 2:
            message = f"{where}: {text} has two digits a byte, so their number is even"
            raise ParserError(message)
        return _Width("bcd", digits // 2)
    bits = int(match["bits"] or match["excess_bits"])
    if bits % 8 or not 8 <= bits <= WIDTH_BYTES_MAX * 8:
        message = (
            f"{where}: {text} is not of whole bytes, 8 to {WIDTH_BYTES_MAX * 8} bits; take smaller ones with `bits`"
        )
        raise ParserError(message)
    return _Width("excess" if match["excess"] else "int" if match["int"] == "i" else "uint", bits // 8)


def _bcd(data: bytes) -> int:
    text = data.hex()
    if not text.isdigit():
        message = f"{text} is not binary-coded decimal"
        raise failed(message)
    return int(text)


def _short(size: int, position: int, length: int) -> Reject:
    return failed(f"the payload is too short: {size} more bytes are needed at byte {position} of {length}")


def _unequal(name: str, found: Any, wanted: Any) -> Reject:
    return failed(f"{name} is {found}, not {wanted}")


def _rest(position: int, length: int) -> Reject:
    return failed(f"{length - position} bytes after the end of the format, at byte {position}")


def _no_case(value: Any, position: int) -> Reject:
    return failed(f"nothing is known of tag {value!r} before byte {position}")


def _no_port(port: Any) -> Reject:
    return failed(f"nothing is known of port {port}")


def _too_much() -> Reject:
    return Reject(ReasonCode.DECODE_LIMIT, f"more than {TURNS_MAX} turns of a repeat, or {DECODED_MAX} fields")


def _instant(value: Any, factor: float, epoch_s: int) -> int:
    at = int(value) * int(factor) if factor >= 1 and isinstance(value, int) else round(value * factor)
    at += epoch_s * 1_000_000
    if not -_INSTANT_US_MAX < at < _INSTANT_US_MAX:
        message = f"the time {value} is out of range"
        raise failed(message)
    return at


def _count(value: Any) -> int:
    """A number of turns or bytes that an expression gave."""
    count = int(value)
    if count < 0:
        message = f"a count or length is negative: {count}"
        raise failed(message)
    return min(count, TURNS_MAX + 1_000_000)


_NAMESPACE: Final[dict[str, Any]] = {
    **expressions.NAMESPACE,
    "D": partial(tuple.__new__, Decoded),
    "len": len,
    "str": str,
    "bool": bool,
    "float": float,
    "from_bytes": int.from_bytes,
    "bcd": _bcd,
    "short": _short,
    "unequal": _unequal,
    "rest": _rest,
    "no_case": _no_case,
    "no_port": _no_port,
    "too_much": _too_much,
    "instant": _instant,
    "count": _count,
    "range": range,
    "NAN": math.nan,
    "ERRORS": expressions.ARITHMETIC_ERRORS,
}

Parse = Callable[[bytes, int | None, int], list[Decoded]]


class _Compiler:
    """One table to one function. Emits Python lines; `where` names the item for messages."""

    def __init__(self, source: Mapping[str, Any], parameters: Mapping[str, float]) -> None:
        self.source = source
        self.lines: list[str] = []
        self.level = 1
        self.constants: dict[str, Any] = dict(_NAMESPACE)
        self.counter = 0
        self.items = 0
        self.depth = 0
        self.scope: dict[str, Name] = {}
        self.pending: list[str] = []  # tuples that wait for one `out +=`
        self.position: int | None = 0  # known offset of the cursor, or None where `p` holds it
        self.endian = _choice(source.get("endian", "big"), _ENDIANS, "endian")
        self.has_time = False
        for name, value in parameters.items():
            self.scope[name] = Name(f"({value!r})", bits=value.bit_length() if isinstance(value, int) else 0)

    # --- output ---

    def line(self, text: str) -> None:
        self.lines.append("    " * self.level + text)

    def fresh(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"

    def constant(self, value: Any, prefix: str = "c") -> str:
        name = self.fresh(prefix)
        self.constants[name] = value
        return name

    def flush(self) -> None:
        if self.pending:
            self.line(f"out += ({', '.join(self.pending)},)")
            self.pending = []

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """An indented block with a scope of its own: what may not be defined is not known outside."""
        self.flush()
        self.dynamic()
        self.depth += 1
        if self.depth > DEPTH_MAX:
            message = f"more than {DEPTH_MAX} levels"
            raise ParserError(message)
        self.line(header)
        self.level += 1
        outer = dict(self.scope)
        before = len(self.lines)
        yield
        self.flush()
        if len(self.lines) == before:
            self.line("pass")
        self.scope = outer
        self.level -= 1
        self.depth -= 1

    def dynamic(self) -> None:
        """From here on the cursor is a variable."""
        if self.position is not None:
            self.line(f"p = {self.position}")
            self.position = None

    def take(self, size: int, where_known: bool = True) -> str:
        """Check that `size` bytes are there and return the source of their offset; the cursor moves on."""
        if self.position is not None and where_known:
            at = self.position
            self.line(f"if n < {at + size}: raise short({size}, {at}, n)")
            self.position = at + size
            return str(at)
        self.dynamic()
        self.line(f"if n < p + {size}: raise short({size}, p, n)")
        self.line(f"p += {size}")
        return f"p - {size}"

    # --- expressions ---

    def check(self, text: Any, where: str, extra: Mapping[str, Name] | None = None) -> expressions.Expression:
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            message = f"{where}: an expression is text or a number, not {type(text).__name__}"
            raise ParserError(message)
        try:
            return expressions.check(text, {**self.scope, **(extra or {})})
        except ExpressionError as e:
            message = f"{where}: {e}"
            raise ParserError(message) from None

    def evaluate(self, checked: expressions.Expression, prefix: str, fallback: str | None) -> Name:
        """Assign an expression to a variable; where it has no answer: `fallback`, or (None) the payload is refused."""
        name = self.fresh(prefix)
        source, bits = checked.source, checked.bits
        if bits > expressions.FIELD_BITS_MAX:
            source, bits = f"float({source})", 0
        if (checked.risky or source != checked.source) and fallback is not None:
            self.line(f"try: {name} = {source}")
            self.line(f"except ERRORS: {name} = {fallback}")
        else:
            self.line(f"{name} = {source}")
        return Name(name, checked.kind, bits)

    def template(self, text: str, where: str) -> str:
        """Source of a text whose {names} are filled in."""
        parts: list[str] = []
        end = 0
        for match in _TEMPLATE.finditer(text):
            known = self.scope.get(match[1])
            if known is None:
                message = f"{where}: {match[0]} is not known here"
                raise ParserError(message)
            if match.start() > end:
                parts.append(repr(text[end : match.start()]))
            parts.append(f"str({known.source})")
            end = match.end()
        if end < len(text) or not parts:
            parts.append(repr(text[end:]))
        return " + ".join(parts)

    # --- items ---

    def fields(self, items: Any, where: str) -> None:
        if not isinstance(items, list):
            message = f"{where}: a list of items is expected, not {type(items).__name__}"
            raise ParserError(message)
        i = 0
        while i < len(items):
            item = items[i]
            at = f"{where}[{i}]"
            if not isinstance(item, dict):
                message = f"{at}: an item is a mapping, not {type(item).__name__}"
                raise ParserError(message)
            self.count_item()
            run: list[tuple[dict[str, Any], _Width, str]] = []
            while i < len(items) and (member := self.of_run(items[i], f"{where}[{i}]", run)):
                run.append(member)
                i += 1
                self.count_item()
            if run:
                self.run(run)
                continue
            self.item(item, at)
            i += 1

    def count_item(self) -> None:
        self.items += 1
        if self.items > ITEMS_MAX:
            message = f"more than {ITEMS_MAX} items"
            raise ParserError(message)

    def item(self, item: dict[str, Any], where: str) -> None:
        if "repeat" in item:
            _known(item, _REPEAT_KEYS, where)
            self.guarded(item, where, self.repeat)
        elif "switch" in item:
            _known(item, _CHOICE_KEYS, where)
            self.guarded(item, where, self.choice)
        elif "fields" in item:
            _known(item, _GROUP_KEYS, where)
            self.group(item, where)
        elif "type" in item:
            _known(item, _FIELD_KEYS, where)
            self.guarded(item, where, self.single)
        elif "expr" in item:
            _known(item, _FIELD_KEYS, where)
            self.guarded(item, where, self.computed)
        else:
            message = f"{where}: neither a field (type, expr) nor a group, repeat or switch: {sorted(item)}"
            raise ParserError(message)

    def guarded(self, item: dict[str, Any], where: str, compile_item: Callable[[dict[str, Any], str], None]) -> None:
        if "when" not in item:
            compile_item(item, where)
            return
        condition = self.condition(item["when"], where)
        with self.block(f"if {condition}:"):
            compile_item(item, where)

    def condition(self, text: Any, where: str) -> str:
        checked = self.check(str(text).lower() if isinstance(text, bool) else text, f"{where}.when")
        if checked.kind != "number":
            message = f"{where}.when: a condition is a number or a comparison"
            raise ParserError(message)
        if not checked.risky:
            return checked.source
        self.flush()
        return self.evaluate(checked, "w", "0").source

    def of_run(
        self, item: Any, where: str, run: list[tuple[dict[str, Any], _Width, str]]
    ) -> tuple[dict[str, Any], _Width, str] | None:
        """The item with its width, where it can join the fixed-width fields of `run`."""
        if (
            not isinstance(item, dict)
            or "type" not in item
            or {"when", "at", "repeat", "switch", "fields"} & item.keys()
        ):
            return None
        _known(item, _FIELD_KEYS, where)
        width = _width(item["type"], where)
        _no_length(item, width, where)
        if not width.size:
            length = item.get("length")
            if isinstance(length, bool) or not isinstance(length, int) or not 0 < length <= 65_536:
                return None
            width = _Width(width.kind, length)
        if run and _order(item, self.endian, where) != _order(run[0][0], self.endian, where):
            return None
        return item, width, where

    def run(self, run: list[tuple[dict[str, Any], _Width, str]]) -> None:
        """Fixed-width fields side by side: one unpack."""
        little = _order(run[0][0], self.endian, run[0][2]) == "<"
        formats, targets, sources = "", [], []
        for item, width, where in run:
            fmt, names, source = self.layout(item, width, where)
            formats += fmt
            targets += names
            sources.append(source)
        size = struct.calcsize(("<" if little else ">") + formats)
        assert size == sum(width.size for _, width, _ in run), "a layout has another size than its type"
        at = self.take(size)
        if targets:
            unpack = self.constant(struct.Struct(("<" if little else ">") + formats).unpack_from, "u")
            self.line(f"{', '.join(targets)}, = {unpack}(b, {at})")
        for (item, width, where), source in zip(run, sources, strict=True):
            if source is not None:
                self.value(item, width, source, where)

    def layout(self, item: dict[str, Any], width: _Width, where: str) -> tuple[str, list[str], str | None]:
        """(struct format, variables it fills, source of the raw value)."""
        endian = _choice(item.get("endian", self.endian), _ENDIANS, f"{where}.endian")
        size, raw = width.size, self.fresh("r")
        match width.kind:
            case "skip":
                return f"{size}x", [], None
            case "float":
                return self.float_layout(endian, size, raw)
            case "bool":
                return "B", [raw], f"bool({raw})"
            case "string":
                encoding = _choice(item.get("encoding", "utf-8"), _ENCODINGS, f"{where}.encoding")
                # Bytes after a NUL are what the sender's buffer held before.
                return f"{size}s", [raw], f"{raw}.decode({encoding!r}, 'replace').partition('\\0')[0].strip()"
            case "hex":
                return f"{size}s", [raw], f"{raw}.hex()"
            case "bcd":
                return f"{size}s", [raw], f"bcd({raw})" if endian == "big" else f"bcd({raw}[::-1])"
        return self.int_layout(endian, width, raw, where)

    def float_layout(self, endian: str, size: int, raw: str) -> tuple[str, list[str], str]:
        if endian != "words-little" or size == 2:
            return _STRUCT_FLOAT[size], [raw], raw
        words = ", ".join(f"{raw}[{i}:{i + 2}]" for i in range(size - 2, -1, -2))
        unpack = self.constant(struct.Struct(">" + _STRUCT_FLOAT[size]).unpack, "u")
        join = self.constant(b"".join, "j")
        return f"{size}s", [raw], f"{unpack}({join}(({words})))[0]"

    def int_layout(self, endian: str, width: _Width, raw: str, where: str) -> tuple[str, list[str], str]:
        size = width.size
        if endian == "words-little" and size > 2:
            if size % 2:
                message = f"{where}: words-little is of whole 16-bit words"
                raise ParserError(message)
            names = [f"{raw}_{i}" for i in range(size // 2)]
            source = "(" + " | ".join(f"{n} << {16 * i}" if i else n for i, n in enumerate(names)) + ")"
            return "H" * len(names), names, self.sign(width, source)
        if size in _STRUCT:
            code = _STRUCT[size]
            if width.kind == "int":
                return code.lower(), [raw], raw
            return code, [raw], f"({raw} - {1 << (size * 8 - 1)})" if width.kind == "excess" else raw
        order = "little" if endian == "little" else "big"
        if width.kind == "int":
            return f"{size}s", [raw], f"from_bytes({raw}, {order!r}, signed=True)"
        source = f"from_bytes({raw}, {order!r})"
        return f"{size}s", [raw], self.sign(width, source)

    def sign(self, width: _Width, source: str) -> str:
        bits = width.size * 8
        if width.kind == "excess":
            return f"({source} - {1 << (bits - 1)})"
        return f"_signed({source}, {bits})" if width.kind == "int" else source

    def single(self, item: dict[str, Any], where: str) -> None:
        """A field that stands alone: at a place of its own, or with a length that earlier bytes give."""
        width = _width(item["type"], where)
        _no_length(item, width, where)
        if not width.size and "length" not in item:
            message = f"{where}: {item['type']} needs a length"
            raise ParserError(message)
        if not width.size and "at" not in item:
            self.counted(item, width, where)
            return
        if not width.size:
            if not isinstance(item["length"], int) or not 0 < item["length"] <= 65_536:
                message = f"{where}.length: a number of bytes, where the place is given by `at`"
                raise ParserError(message)
            width = _Width(width.kind, item["length"])
        if "at" not in item:
            self.run([(item, width, where)])
            return
        at = item["at"]
        if isinstance(at, bool) or not isinstance(at, int) or abs(at) > 65_536:
            message = f"{where}.at: a byte offset, negative from the end"
            raise ParserError(message)
        self.flush()
        offset = str(at) if at >= 0 else f"n - {-at}"
        self.line(f"if not 0 <= {offset} <= n - {width.size}: raise short({width.size}, {offset}, n)")
        fmt, targets, source = self.layout(item, width, where)
        if source is None:
            return
        mark = _order(item, self.endian, where)
        unpack = self.constant(struct.Struct(mark + fmt).unpack_from, "u")
        self.line(f"{', '.join(targets)}, = {unpack}(b, {offset})")
        self.value(item, width, source, where)

    def counted(self, item: dict[str, Any], width: _Width, where: str) -> None:
        """Text, hexadecimal or padding of a length that an expression gives; `end`: all that is left."""
        self.flush()
        self.dynamic()
        size = self.fresh("z")
        if item["length"] == "end":
            self.line(f"{size} = n - p")
        else:
            self.line(f"{size} = count({self.check(item['length'], where + '.length').source})")
            self.line(f"if n < p + {size}: raise short({size}, p, n)")
        raw = self.fresh("r")
        self.line(f"{raw} = b[p:p + {size}]")
        self.line(f"p += {size}")
        if width.kind == "hex":
            self.value(item, width, f"{raw}.hex()", where)
        elif width.kind == "string":
            encoding = _choice(item.get("encoding", "utf-8"), _ENCODINGS, f"{where}.encoding")
            self.value(item, width, f"{raw}.decode({encoding!r}, 'replace').partition('\\0')[0].strip()", where)

    def computed(self, item: dict[str, Any], where: str) -> None:
        self.value(item, None, None, where)

    def value(self, item: Mapping[str, Any], width: _Width | None, raw: str | None, where: str) -> None:
        """From the raw value to what is emitted and what later expressions may refer to."""
        name = item.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX:
            message = f"{where}: a name of 1 to {NAME_CHARACTERS_MAX} characters is needed"
            raise ParserError(message)
        where = f"{where} ({name})"
        key = item.get("key", slug(_TEMPLATE.sub("", name)))
        if not isinstance(key, str) or ("key" in item and not _IDENTIFIER.fullmatch(key)):
            message = f"{where}.key: {key!r} is not an identifier"
            raise ParserError(message)
        text = width is not None and width.kind in {"string", "hex"}
        x: Name | None = None
        if raw is not None and width is not None:
            if not _IDENTIFIER.fullmatch(raw):
                variable = self.fresh("x")
                self.line(f"{variable} = {raw}")
                raw = variable
            x = Name(raw, "text" if text else "number", 1 if width.kind == "bool" else width.bits)
        self.tests(item, name, x, where)
        if isinstance(item.get("bits"), list):
            if x is None or text:
                message = f"{where}.bits: parts are of a whole number"
                raise ParserError(message)
            if key:
                self.scope[key] = x
            for i, part in enumerate(item["bits"]):
                self.part(part, x, f"{where}.bits[{i}]")
            return
        known = self.scaled(item, x, where)
        if key:
            self.scope[key] = known
        if "time" in item:
            self.time(item, known, where)
            return
        self.emit(item, name, known, x, width is not None and width.kind == "bool", where)

    def tests(self, item: Mapping[str, Any], name: str, x: Name | None, where: str) -> None:
        if "equals" not in item:
            return
        if x is None:
            message = f"{where}.equals: is of a field that is read"
            raise ParserError(message)
        wanted = item["equals"]
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if not all(isinstance(w, int | float | str) for w in allowed):
            message = f"{where}.equals: numbers or text"
            raise ParserError(message)
        self.flush()
        constants = ", ".join(repr(w) for w in allowed)
        test = f"{x.source} != {constants}" if len(allowed) == 1 else f"{x.source} not in ({constants},)"
        self.line(f"if {test}: raise unequal({name!r}, {x.source}, {' or '.join(map(str, allowed))!r})")

    def scaled(self, item: Mapping[str, Any], x: Name | None, where: str) -> Name:
        """`expr` over x, then × scale ÷ div + offset, then round."""
        steps = {k: _number(item[k], f"{where}.{k}") for k in ("scale", "div", "offset") if k in item}
        if steps.get("div") == 0:
            message = f"{where}.div: is 0"
            raise ParserError(message)
        extra = {"x": x} if x is not None else {}
        if "expr" in item:
            checked = self.check(item["expr"], f"{where}.expr", extra)
        elif x is None:
            message = f"{where}: an expr is needed"
            raise ParserError(message)
        elif not steps and "round" not in item:
            return x
        else:
            checked = expressions.Expression(x.source, x.kind, x.bits, False, frozenset())
        if checked.kind == "text":
            if steps or "round" in item:
                message = f"{where}: text has no scale"
                raise ParserError(message)
            return self.evaluate(checked, "e", "''")
        source, bits, risky = checked.source, checked.bits, checked.risky
        if "scale" in steps:
            source, bits = f"({source} * {steps['scale']!r})", 0 if isinstance(steps["scale"], float) else bits + 64
        if "div" in steps:
            source, bits = f"({source} / {steps['div']!r})", 0
        if "offset" in steps:
            source, bits = f"({source} + {steps['offset']!r})", 0 if isinstance(steps["offset"], float) else bits + 1
        if "round" in item:
            digits = item["round"]
            if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= 12:
                message = f"{where}.round: 0 to 12 digits"
                raise ParserError(message)
            source, risky = f"_round({source}, {digits})", True
        return self.evaluate(expressions.Expression(source, "number", bits, risky, checked.names), "e", "NAN")

    def part(self, part: Any, whole: Name, where: str) -> None:
        """Some bits of a whole number: `bit: n`, or `bits: [low, high]`, both counted from the least significant."""
        if not isinstance(part, dict):
            message = f"{where}: a mapping is expected"
            raise ParserError(message)
        self.count_item()
        _known(part, _PART_KEYS, where)
        span = [part["bit"], part["bit"]] if "bit" in part else part.get("bits")
        if not (isinstance(span, list) and len(span) == 2 and all(type(s) is int for s in span)):
            message = f"{where}: `bit: n` or `bits: [low, high]` is needed"
            raise ParserError(message)
        low, high = span
        if not 0 <= low <= high < max(whole.bits, 1):
            message = f"{where}: bits {low} to {high} of a number of {whole.bits}"
            raise ParserError(message)
        count = high - low + 1
        shifted = f"{whole.source} >> {low}" if low else whole.source
        source = f"({shifted}) & {(1 << count) - 1}"
        if part.get("signed"):
            source = f"_signed({source}, {count})"
        flag = "bit" in part and not {"scale", "div", "offset", "expr", "enum"} & part.keys()
        name = self.fresh("q")
        self.line(f"{name} = {source}")
        item = {k: v for k, v in part.items() if k not in {"bit", "bits", "signed"}}
        self.value(item, _Width("bool" if flag else "uint", (count + 7) // 8), f"bool({name})" if flag else name, where)

    def time(self, item: Mapping[str, Any], known: Name, where: str) -> None:
        """An instant in the payload: what follows in this block was measured then."""
        unit = _choice(item["time"], set(UNITS_US), f"{where}.time")
        epoch = _EPOCHS[_choice(str(item.get("epoch", "unix")), set(_EPOCHS), f"{where}.epoch")]
        if known.kind != "number":
            message = f"{where}.time: is of a number"
            raise ParserError(message)
        self.flush()
        self.line(f"t = base = instant({known.source}, {UNITS_US[unit]!r}, {epoch})")
        if self.depth == 0:
            # What was emitted before it belongs to the same instant.
            self.has_time = True
            self.line("tm = t")

    def emit(self, item: Mapping[str, Any], name: str, known: Name, x: Name | None, flag: bool, where: str) -> None:
        emitted = item.get("emit", True)
        if not isinstance(emitted, bool):
            message = f"{where}.emit: is true or false"
            raise ParserError(message)
        if not emitted:
            return
        value = known.source
        if "enum" in item:
            enum = self.enumeration(item["enum"], where)
            value = f"{enum}({known.source}, None) or str({known.source})"
        elif flag and x is known and not value.startswith("bool("):
            value = f"bool({value})"
        unit = item.get("unit")
        if unit is not None and not isinstance(unit, str):
            message = f"{where}.unit: is text"
            raise ParserError(message)
        pin = item.get("pin")
        shown = "None" if pin is None else self.template(str(pin), f"{where}.pin")
        decoded = f"D(({self.template(name, where)}, {value}, {unit!r}, t, {shown}))"
        if "invalid" in item and x is not None:
            sentinels = item["invalid"] if isinstance(item["invalid"], list) else [item["invalid"]]
            if not all(isinstance(s, int | float | str) for s in sentinels):
                message = f"{where}.invalid: numbers or text"
                raise ParserError(message)
            self.flush()
            self.line(f"if {x.source} not in ({', '.join(map(repr, sentinels))},): out.append({decoded})")
            return
        self.pending.append(decoded)

    def enumeration(self, given: Any, where: str) -> str:
        if not isinstance(given, dict) or not 0 < len(given) <= ENUM_MAX:
            message = f"{where}.enum: a mapping of 1 to {ENUM_MAX} numbers to text"
            raise ParserError(message)
        table: dict[Any, str] = {}
        for number, text in given.items():
            try:
                table[int(number, 0) if isinstance(number, str) else int(number)] = str(text)
            except ValueError:
                message = f"{where}.enum: {number!r} is not a whole number"
                raise ParserError(message) from None
        return self.constant(table.get, "m")

    # --- structure ---

    def offset_time(self, item: Mapping[str, Any], where: str) -> None:
        if "time_offset_s" not in item:
            return
        checked = self.check(item["time_offset_s"], f"{where}.time_offset_s")
        self.flush()
        self.line(f"t = base + instant({checked.source}, 1000000.0, 0)")

    def group(self, item: dict[str, Any], where: str) -> None:
        header = f"if {self.condition(item['when'], where)}:" if "when" in item else "if True:"
        with self.block(header):
            self.bounded(item, where)
        if "else" in item:
            if "when" not in item:
                message = f"{where}.else: without a `when`"
                raise ParserError(message)
            with self.block("else:"):
                self.fields(item["else"], f"{where}.else")

    def bounded(self, item: dict[str, Any], where: str) -> None:
        saved: str | None = None
        times = self.saved_times(item)
        if "within" in item:
            saved, end = self.fresh("n"), self.fresh("z")
            self.line(f"{end} = p + count({self.check(item['within'], where + '.within').source})")
            self.line(f"if n < {end}: raise short({end} - p, p, n)")
            self.line(f"{saved} = n")
            self.line(f"n = {end}")
        self.offset_time(item, where)
        self.fields(item["fields"], f"{where}.fields")
        self.flush()
        if saved is not None:
            # The length leads on to the next item, also past bytes that this table does not know.
            self.line("p = n")
            self.line(f"n = {saved}")
        self.restore_times(times)

    def saved_times(self, item: Mapping[str, Any]) -> tuple[str, str] | None:
        """Inside a group with times of its own, `t` and `base` change and are put back."""
        if "time_offset_s" not in item and not _sets_time(item.get("fields")):
            return None
        t, base = self.fresh("t"), self.fresh("t")
        self.line(f"{t} = t; {base} = base")
        return t, base

    def restore_times(self, saved: tuple[str, str] | None) -> None:
        if saved is not None:
            self.line(f"t = {saved[0]}; base = {saved[1]}")

    def repeat(self, item: dict[str, Any], where: str) -> None:
        self.flush()
        self.dynamic()
        index = self.fresh("i")
        times = self.saved_times(item)
        if item["repeat"] == "end":
            self.line(f"{index} = -1")
            header = "while p < n:"
        else:
            checked = self.check(item["repeat"], f"{where}.repeat")
            header = f"for {index} in range(count({checked.source})):"
        with self.block(header):
            self.line("k += 1")
            self.line(f"if k > {TURNS_MAX} or len(out) > {DECODED_MAX}: raise too_much()")
            if item["repeat"] == "end":
                self.line(f"{index} += 1")
                start = self.fresh("p")
                self.line(f"{start} = p")
            self.scope["i"] = Name(index, bits=16)
            self.offset_time(item, where)
            self.fields(item["fields"], f"{where}.fields")
            self.flush()
            if item["repeat"] == "end":
                # A turn that takes nothing would turn for ever.
                self.line(f"if p == {start}: raise rest(p, n)")
        self.restore_times(times)

    def choice(self, item: dict[str, Any], where: str) -> None:
        checked = self.check(item["switch"], f"{where}.switch")
        self.flush()
        chosen = self.evaluate(checked, "s", None)
        cases = item.get("cases")
        if not isinstance(cases, dict) or not cases:
            message = f"{where}.cases: a mapping is expected"
            raise ParserError(message)
        self.dynamic()
        word = "if"
        for given, fields in cases.items():
            label = _case(given, chosen.kind, f"{where}.cases")
            with self.block(f"{word} {chosen.source} == {label!r}:"):
                self.fields(fields, f"{where}.cases[{given}]")
            word = "elif"
        default = item.get("default", "reject")
        if default == "reject":
            with self.block("else:"):
                self.line(f"raise no_case({chosen.source}, p)")
        elif default == "stop":
            # What comes after an unknown tag of unknown length cannot be read.
            with self.block("else:"):
                self.line("p = n")
        elif default != "ignore":
            with self.block("else:"):
                self.fields(default, f"{where}.default")

    # --- the whole ---

    def table(self) -> tuple[str, Parse]:
        _known(self.source, _TABLE_KEYS, "table")
        self.line("n = len(b)")
        self.line("out = []")
        self.line("p = k = 0")
        self.line("t = tm = None")
        rest = _choice(self.source.get("rest", "reject"), {"reject", "ignore"}, "rest")
        if ("fields" in self.source) == ("ports" in self.source):
            message = "a table has either `fields` or `ports`"
            raise ParserError(message)
        if "fields" in self.source:
            self.fields(self.source["fields"], "fields")
        else:
            self.ports(self.source["ports"])
        self.flush()
        if rest == "reject":
            end = "p" if self.position is None else str(self.position)
            self.line(f"if {end} != n: raise rest({end}, n)")
        if self.has_time:
            self.line(
                "if tm is not None: return [D((d[0], d[1], d[2], tm if d[3] is None else d[3], d[4])) for d in out]"
            )
        self.line("return out")
        text = "def parse(b, port, base):\n" + "\n".join(self.lines) + "\n"
        namespace = dict(self.constants)
        # Every name in it was made above, every constant is repr() of a number or text: see the module's docstring.
        exec(compile(text, "<field table>", "exec"), namespace)
        parse: Parse = namespace["parse"]
        return text, parse

    def ports(self, ports: Any) -> None:
        if not isinstance(ports, dict) or not ports:
            message = "ports: a mapping of port numbers to fields"
            raise ParserError(message)
        word = "if"
        default: Any = None
        self.dynamic()
        for given, fields in ports.items():
            if given in {"default", None}:
                default = fields
                continue
            label = _case(given, "number", "ports")
            self.depth -= 1  # a port is the whole payload: its time is the message's
            with self.block(f"{word} port == {label!r}:"):
                self.fields(fields, f"ports[{given}]")
            self.depth += 1
            word = "elif"
        if default is not None and word == "elif":
            with self.block("else:"):
                self.fields(default, "ports[default]")
        elif word == "elif":
            with self.block("else:"):
                self.line("raise no_port(port)")
        else:
            self.fields(default, "ports[default]")


def _choice(value: Any, allowed: set[str], where: str) -> str:
    if value not in allowed:
        message = f"{where}: {value!r} is not one of {', '.join(sorted(allowed))}"
        raise ParserError(message)
    return str(value)


def _known(item: Mapping[str, Any], keys: set[str], where: str) -> None:
    if unknown := item.keys() - keys:
        message = f"{where}: {', '.join(sorted(map(str, unknown)))} is not known; known are {', '.join(sorted(keys))}"
        raise ParserError(message)


def _number(value: Any, where: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        message = f"{where}: {value!r} is not a number"
        raise ParserError(message)
    if isinstance(value, int) and value.bit_length() > 64:
        return float(value)
    return value


def _case(given: Any, kind: str, where: str) -> int | str:
    if kind == "text":
        return str(given)
    try:
        return int(given, 0) if isinstance(given, str) else int(given)
    except (TypeError, ValueError):
        message = f"{where}: {given!r} is not a whole number"
        raise ParserError(message) from None


def _no_length(item: Mapping[str, Any], width: _Width, where: str) -> None:
    if width.size and "length" in item:
        message = f"{where}: {item['type']} has its length in its name"
        raise ParserError(message)


def _order(item: Mapping[str, Any], default: str, where: str) -> str:
    return "<" if _choice(item.get("endian", default), _ENDIANS, f"{where}.endian") == "little" else ">"


def _sets_time(items: Any) -> bool:
    if not isinstance(items, list):
        return False
    return any(
        (isinstance(i, dict) and ("time" in i or any(_sets_time(i.get(k)) for k in ("fields", "else", "default"))))
        or (
            isinstance(i, dict) and isinstance(i.get("cases"), dict) and any(_sets_time(c) for c in i["cases"].values())
        )
        for i in items
    )


def compile_table(source: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> tuple[str, Parse]:
    """Compile a table.

    Args:
        source: the table, as data.
        variables: a device's values for the table's `parameters`; others are not looked at.

    Returns:
        The generated source, and the function (payload, port, base time in µs) -> fields.

    Raises:
        ParserError: the table is wrong; the message names the item.
    """
    given = source.get("parameters") or {}
    if not isinstance(given, dict):
        message = "parameters: a mapping of names to numbers"
        raise ParserError(message)
    parameters: dict[str, float] = {}
    for name, default in given.items():
        if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
            message = f"parameters: {name!r} is not an identifier"
            raise ParserError(message)
        parameters[name] = _number((variables or {}).get(name, default), f"parameters.{name}")
    return _Compiler(source, parameters).table()


class TableDecoder:
    """A compiled field table. Payloads are bytes, or their hexadecimal or base64 text."""

    __slots__ = ("_parse", "generated")

    def __init__(self, source: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> None:
        self.generated, self._parse = compile_table(source, variables)

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The fields of a payload.

        Raises:
            Reject: DECODE_FAILED or DECODE_LIMIT.
        """
        payload = raw["payload"]
        try:
            return self._parse(
                payload if type(payload) is bytes else payload_bytes(payload), raw["port"], base_time(raw)
            )
        except Reject:
            raise
        except expressions.ARITHMETIC_ERRORS as e:
            # A length, count or tag of this payload has no answer.
            message = f"the payload's numbers allow no answer ({type(e).__name__}: {e})"
            raise failed(message) from None


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> TableDecoder:
    """The decoder of a `table` parser.

    Raises:
        ParserError: the table is wrong.
    """
    return TableDecoder(source_of(doc), variables)
