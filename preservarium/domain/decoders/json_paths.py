"""JSON payloads by path mapping.

```yaml
time: sent.at            # optional; the instant of the message
time_unit: ms            # s, ms, us, ns; absent: ISO 8601 text, or told by the size
time_zone: Europe/Berlin # of instants in text without an offset; absent: UTC (a device's or a type's own counts first)
fields:                  # absent: every number, text and boolean of the document, named by its path
  - {path: temperature, unit: °C}
  - {path: "air.0.pm25", name: pm2_5, unit: µg/m³, pin: "1"}
each:                    # optional: a list (or an object's values), each element read by itself
  - path: "sensors[*]"
    name: "{type}"       # filled in from the element
    pin: "{channel}"
    time: t
    fields: [{path: value, unit_path: unit}]
decimal: ","             # optional: the decimal mark of numbers in text; absent: a point
thousands: "."           # optional: what parts their thousands; absent: nothing
```

A path is keys with dots between them; `[2]` or `.2` is an element of a list, `[*]` every one; a key with dots in it is
written `["a.b"]`. What is absent or null gives no field: devices leave out what they did not measure. Text stays text, unless something is
to be calculated with it (`scale`, `offset`, `expr`); whether it is a number says its datatype (domain/readings/mapping.py).

A list where a value belongs is several of one kind: each element is a pin, by its place. What cannot be read is refused by itself, and the rest is
read: a field, an element of a list or of `each`, an object of a list of objects.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from preservarium.domain import expressions
from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    Layout,
    ParserError,
    PartRefused,
    Row,
    RowReader,
    Value,
    clock_of,
    failed,
    is_word,
    marks_of,
    sorted_out,
    source_of,
    zone_in,
)
from preservarium.domain.expressions import ExpressionError
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import UNITS_US, instant_us
from preservarium.domain.readings.number import Written, number_of
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.readings.units import Linear
from preservarium.domain.readings.wall_clock import WallClock
from preservarium.errors import ReasonCode, Reject

#: Fields of one mapping, and levels of a document that is taken as it is.
FIELDS_MAX: Final = 2_000
DEPTH_MAX: Final = 16
#: Text longer than this is a document, not a reading.
TEXT_CHARACTERS_MAX: Final = 4_096
NAME_CHARACTERS_MAX: Final = 200
#: Sets of names remembered of documents that are taken as they are, and names of one: a device has a few kinds of messages.
LAYOUTS_MAX: Final = 256
LAYOUT_NAMES_MAX: Final = 256

_STEP: Final = re.compile(r'\.?(?:\[(?:(?P<index>-?\d{1,6})|(?P<all>\*)|"(?P<quoted>[^"]+)")\]|(?P<key>[^.\[\]]+))')
_TEMPLATE: Final = re.compile(r"\{([^{}]+)\}")
_SOURCE_KEYS: Final = {
    "time", "time_unit", "time_zone", "fields", "each", "root", "description", "ignore", "decimal", "thousands",
}  # fmt: skip
_EACH_KEYS: Final = {"path", "name", "pin", "time", "time_unit", "unit", "fields", "description"}
_FIELD_KEYS: Final = {"path", "name", "unit", "unit_path", "pin", "scale", "offset", "expr", "required", "description"}

#: A step of a path: a key, an index, or None for every element.
Step = str | int | None
#: How a text of the payload says a number.
Read = Callable[[str], float | None]


def parse_path(text: Any, where: str) -> tuple[Step, ...]:
    """The steps of a path.

    Raises:
        ParserError: it is none.
    """
    if not isinstance(text, str) or not text or len(text) > 1_000:
        message = f"{where}: a path is text, e.g. sensors[0].value"
        raise ParserError(message)
    text = text.removeprefix("$").removeprefix(".")
    steps: list[Step] = []
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None:
            message = f"{where}: {text!r} is no path at character {position}"
            raise ParserError(message)
        if match["index"] is not None:
            steps.append(int(match["index"]))
        elif match["all"]:
            steps.append(None)
        else:
            steps.append(match["quoted"] or match["key"])
        position = match.end()
    return tuple(steps)


def find(value: Any, steps: tuple[Step, ...]) -> Any:
    """What stands at a path without `[*]`; None where there is nothing."""
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step if isinstance(step, str) else str(step))
        elif isinstance(value, list):
            try:
                value = value[int(step)]  # type: ignore[arg-type]
            except (IndexError, ValueError, TypeError):
                return None
        else:
            return None
    return value


def find_all(value: Any, steps: tuple[Step, ...]) -> Iterator[tuple[Any, str | None]]:
    """(what stands there, the indices that `[*]` stood for, joined by dots) for every match."""
    for i, step in enumerate(steps):
        if step is None:
            inner = find(value, steps[:i])
            children: Iterator[tuple[Any, Any]]
            if isinstance(inner, list):
                children = iter(enumerate(inner))
            elif isinstance(inner, dict):
                children = iter(inner.items())
            else:
                return
            for key, child in children:
                for found, deeper in find_all(child, steps[i + 1 :]):
                    yield found, str(key) if deeper is None else f"{key}.{deeper}"
            return
    yield find(value, steps), None


@dataclass(frozen=True, slots=True)
class _Field:
    steps: tuple[Step, ...]
    many: bool
    key: str | None  #: the only step, where it is one key: the common case
    name: str
    unit: str | None
    unit_steps: tuple[Step, ...] | None
    pin: str | None
    compute: Callable[[Any], Any] | None
    required: bool


@dataclass(frozen=True, slots=True)
class _Each:
    steps: tuple[Step, ...]
    name: str | None
    pin: str | None
    unit: str | None
    time: "_Time | None"
    fields: tuple[_Field, ...]


@dataclass(frozen=True, slots=True)
class _Time:
    steps: tuple[Step, ...]
    unit: str | None
    clock: WallClock | None

    def of(self, value: Any, received_at: int, before: int | None = None) -> int | None:
        given = find(value, self.steps)
        if given is None:
            return None
        if self.clock is None:
            at = instant_us(given, self.unit)
        else:
            at = self.clock.instant(given, self.unit, received_at, before)
        if at is None:
            message = f"{given!r:.100} is no instant"
            raise failed(message)
        return at


def _fill(template: str | None, element: Any) -> str | None:
    """A template with what stands at its paths in the element; None where one of them is absent."""
    if template is None or "{" not in template:
        return template
    parts: list[str] = []
    end = 0
    for match in _TEMPLATE.finditer(template):
        found = find(element, parse_path(match[1], "template"))
        if found is None or isinstance(found, dict | list):
            return None
        parts += [template[end : match.start()], str(found)]
        end = match.end()
    return "".join([*parts, template[end:]])[:NAME_CHARACTERS_MAX]


def _scalar(value: Any) -> Value:
    """A value that a reading can hold; None for what it cannot."""
    if isinstance(value, str):
        return value if len(value) <= TEXT_CHARACTERS_MAX else None
    return value if isinstance(value, float | int | bool) else None


class JsonDecoder:
    """A compiled path mapping. Payloads are JSON values, or bytes that hold one document."""

    __slots__ = (
        "_computed", "_each", "_fields", "_ignore", "_keys", "_layout", "_layouts", "_read", "_required",
        "_root", "_time", "row",
    )  # fmt: skip

    def __init__(self, source: Mapping[str, Any], time_zone: Any = None) -> None:
        _known(source, _SOURCE_KEYS, "json")
        clock = clock_of(source, time_zone)
        self._time = _time(source, "time", clock)
        self._root = parse_path(source["root"], "root") if "root" in source else ()
        #: None: texts are read where they are mapped, by the common rule
        self._read = _reading(source)
        each = source.get("each")
        if each is not None and not isinstance(each, list):
            message = "each: a list is expected"
            raise ParserError(message)
        self._each = tuple(_each(e, f"each[{i}]", self._read or number_of, clock) for i, e in enumerate(each or []))
        given = source.get("fields")
        self._fields = (
            None
            if given is None and not self._each
            else _fields([] if given is None else given, "fields", self._read or number_of)
        )
        ignore = source.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(i, str) for i in ignore):
            message = "ignore: a list of names"
            raise ParserError(message)
        self._ignore = {*ignore, *([_joined(self._time.steps)] if self._time else [])}
        #: names of a document -> their layout; None: it has none
        self._layouts: dict[tuple[str, ...], Layout | None] = {}
        fields = self._fields or ()
        self._layout = Layout([(f.name, f.unit or None, f.pin) for f in fields])
        #: the paths of the fields, where each is one key
        keys = [f.key for f in fields if f.key is not None]
        self._keys = keys if len(keys) == len(fields) else None
        self._required = tuple(i for i, f in enumerate(fields) if f.required)
        self._computed = tuple((i, f.compute) for i, f in enumerate(fields) if f.compute is not None)
        #: see `base.RowReader`; None where names or times depend on the message
        self.row: RowReader | None = None
        if self._read is None and not self._each:
            if self._fields is None:
                self.row = self._row_as_it_is
            elif not any(f.many or f.unit_steps is not None for f in fields):
                self.row = self._row_of_fields

    def _given(self, raw: RawMessage) -> Any:
        """What is read of a message."""
        return raw["payload"]

    def _object(self, raw: RawMessage) -> tuple[dict[str, Any], int | None] | None:
        """(the object that the payload is or holds, its instant); None where it is none."""
        payload = self._given(raw)
        if isinstance(payload, bytes):
            try:
                payload = json_text.loads(payload)
            except orjson.JSONDecodeError:
                return None
        if self._root:
            payload = find(payload, self._root)
        if type(payload) is not dict:
            return None
        return payload, self._time.of(payload, raw["received_at"]) if self._time else None

    def _row_of_fields(self, raw: RawMessage) -> Row | None:
        found = self._object(raw)
        if found is None:
            return None
        document, at = found
        if self._keys is not None:
            values = [*map(document.get, self._keys)]
        else:
            values = [find(document, field.steps) for field in self._fields or ()]
        for i, compute in self._computed:
            value = values[i]
            if type(value) in (float, int, bool) or (type(value) is str and len(value) <= TEXT_CHARACTERS_MAX):
                values[i] = compute(value)
            elif value is not None:
                return None
        if self._required and any(values[i] is None for i in self._required):
            return None
        return self._layout, values, at

    def _row_as_it_is(self, raw: RawMessage) -> Row | None:
        found = self._object(raw)
        if found is None:
            return None
        document, at = found
        names = tuple(document)
        try:
            layout = self._layouts[names]
        except KeyError:
            layout = self._laid_out(document)
            if len(self._layouts) < LAYOUTS_MAX:
                self._layouts[names] = layout
        return None if layout is None else (layout, [*document.values()], at)

    def _laid_out(self, document: dict[str, Any]) -> Layout | None:
        # What is nested has the names of its parts, too, and most likely is nested again in the next message.
        if len(document) > LAYOUT_NAMES_MAX or "" in document or {dict, list} & set(map(type, document.values())):
            return None
        return Layout([None if n in self._ignore else (n[:NAME_CHARACTERS_MAX], None, None) for n in document])

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The fields of a document, and what of it cannot be read.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        document = self._given(raw)
        if isinstance(document, bytes):
            try:
                document = json_text.loads(document)
            except orjson.JSONDecodeError as e:
                message = f"the payload is not JSON: {e.msg}"
                raise failed(message) from None
        if self._root:
            document = find(document, self._root)
        if not isinstance(document, dict | list):
            message = f"a JSON object or array is expected, not {json_text.kind_of(document)}"
            raise failed(message)
        out: list[Decoded | Reject] = []
        received_at = raw["received_at"]
        # A list of objects is several measurements, each with its own time.
        if isinstance(document, list) and self._whole(document):
            last: int | None = None
            for i, part in enumerate(document):
                before = len(out)
                try:
                    last = self._part(part, out, received_at, last)
                except Reject as e:
                    if e.code is not ReasonCode.DECODE_FAILED:
                        raise
                    out[before:] = [PartRefused(f"element {i}: {e}", self._alone(part))]
        else:
            self._part(document, out, received_at, None)
        if (read := self._read) is not None:
            for i, field in enumerate(out):
                if type(field) is Decoded and type(field.value) is str:
                    out[i] = field._replace(value=Written(field.value, read(field.value), typed=False))
        sorted_out(out)
        return out

    def _part(self, part: Any, out: list[Decoded | Reject], received_at: int, last: int | None) -> int | None:
        """Read an object; its instant, or that of the one before it."""
        at = self._time.of(part, received_at, last) if self._time else None
        if self._fields is None:
            _flatten(part, "", None, at, out, 0, self._ignore)
        else:
            _read(self._fields, part, at, None, None, None, out)
        for each in self._each:
            _read_each(each, part, at, received_at, out)
        if len(out) > DECODED_MAX:
            raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")
        return last if at is None else at

    def _alone(self, part: Any) -> bytes:
        """A document that holds one object of the list, where `root` finds it: an index finds a key of an object, too."""
        document: Any = [part]
        for step in reversed(self._root):
            document = {str(step): document}
        return json_text.dumps(document)

    def _whole(self, document: list[Any]) -> bool:
        return all(isinstance(part, dict) for part in document) and not any(
            each.steps[:1] and not isinstance(each.steps[0], str) for each in self._each
        )


def _read_each(each: _Each, part: Any, at: int | None, received_at: int, out: list[Decoded | Reject]) -> None:
    last: int | None = None
    for element, index in find_all(part, each.steps):
        if element is None:
            continue
        before = len(out)
        try:
            own = each.time.of(element, received_at, last) if each.time else None
            last = last if own is None else own
            _read_element(each, element, index, at if own is None else own, out)
        except Reject as e:
            out[before:] = [failed(f"{_joined(each.steps)}, element {index or 0}: {e}")]
        if len(out) > DECODED_MAX:
            raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")


def _read_element(each: _Each, element: Any, index: str | None, at: int | None, out: list[Decoded | Reject]) -> None:
    name = _fill(each.name, element)
    if each.name is not None and name is None:
        message = f"it has nothing to name it by ({each.name})"
        raise failed(message)
    pin = _fill(each.pin, element) if each.pin is not None else index
    _read(each.fields, element, at, name, pin, each.unit, out)


def _read(
    fields: tuple[_Field, ...],
    part: Any,
    at: int | None,
    name: str | None,
    pin: str | None,
    unit: str | None,
    out: list[Decoded | Reject],
) -> None:
    is_object = isinstance(part, dict)
    around = _Around(part, at, name, unit, out)
    for field in fields:
        if field.many:
            for value, index in find_all(part, field.steps):
                _take(field, value, pin or index, around)
            continue
        value = part.get(field.key) if is_object and field.key is not None else find(part, field.steps)
        _take(field, value, pin, around)


class _Around(NamedTuple):
    """Where fields are read: the object, its instant, the name and unit that it gives them, and what is made of them."""

    part: Any
    at: int | None
    name: str | None
    unit: str | None
    out: list[Decoded | Reject]


def _take(field: _Field, value: Any, pin: str | None, around: _Around) -> None:
    if value is None:
        if field.required:
            message = f"{_joined(field.steps)} is missing"
            raise failed(message)
        return
    if isinstance(value, list):
        # Several of one kind, as Tasmota writes the channels of a meter: the place is the pin.
        if field.pin is None:
            for i, element in enumerate(value):
                if element is not None:
                    index = str(i) if pin is None else f"{pin}.{i}"
                    _take_one(field, element, index, around)
            return
        if len(value) == 1:
            (value,) = value
    _take_one(field, value, pin, around)


def _take_one(field: _Field, value: Any, pin: str | None, around: _Around) -> None:
    if value is None:
        return
    part, at, name, unit, out = around
    if isinstance(value, dict | list):
        message = f"{_joined(field.steps)} is {'an object' if isinstance(value, dict) else 'a list'}, not a value"
        out.append(failed(message))
        return
    if isinstance(value, str) and len(value) > TEXT_CHARACTERS_MAX:
        message = f"{_joined(field.steps)} is a text of {len(value)} characters"
        out.append(failed(message))
        return
    if field.compute is not None:
        value = field.compute(value)
    spelled = field.unit
    if field.unit_steps is not None and isinstance(found := find(part, field.unit_steps), str):
        spelled = found[:NAME_CHARACTERS_MAX]
    full = field.name if name is None else f"{name}_{field.name}" if field.name else name
    out.append(Decoded(full, value, spelled or unit, at, field.pin if field.pin is not None else pin))


def _flatten(
    value: Any, name: str, pin: str | None, at: int | None, out: list[Decoded | Reject], depth: int, ignore: set[str]
) -> None:
    if depth > DEPTH_MAX:
        message = f"nested deeper than {DEPTH_MAX}"
        raise failed(message)
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner is None:
                continue
            full = f"{name}.{key}" if name else key
            if full in ignore:
                continue
            if type(inner) is dict or type(inner) is list:
                _flatten(inner, full, pin, at, out, depth + 1, ignore)
            elif full and (scalar := _scalar(inner)) is not None:
                out.append(Decoded(full[:NAME_CHARACTERS_MAX], scalar, None, at, pin))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            index = str(i) if pin is None else f"{pin}.{i}"
            if isinstance(inner, dict | list):
                _flatten(inner, name, index, at, out, depth + 1, ignore)
            elif name and (scalar := _scalar(inner)) is not None:
                out.append(Decoded(name[:NAME_CHARACTERS_MAX], scalar, None, at, index))
    if len(out) > DECODED_MAX:
        raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")


def _joined(steps: tuple[Step, ...]) -> str:
    return ".".join("*" if s is None else str(s) for s in steps)


def _time(item: Mapping[str, Any], where: str, clock: WallClock | None) -> _Time | None:
    unit = item.get("time_unit")
    if unit is not None and not is_word(unit, UNITS_US):
        message = f"{where}_unit: {unit!r} is not one of {', '.join(UNITS_US)}"
        raise ParserError(message)
    return _Time(parse_path(item["time"], where), unit, clock) if "time" in item else None


def _reading(source: Mapping[str, Any]) -> Read | None:
    decimal, thousands = marks_of(source)
    return None if (decimal, thousands) == (".", "") else lambda text: number_of(text, decimal, thousands)


def _fields(items: Any, where: str, read: Read) -> tuple[_Field, ...]:
    if not isinstance(items, list) or len(items) > FIELDS_MAX:
        message = f"{where}: a list of at most {FIELDS_MAX} fields"
        raise ParserError(message)
    return tuple(_field(item, f"{where}[{i}]", read) for i, item in enumerate(items))


def _field(item: Any, where: str, read: Read) -> _Field:
    if not isinstance(item, dict):
        message = f"{where}: a mapping is expected"
        raise ParserError(message)
    _known(item, _FIELD_KEYS, where)
    steps = parse_path(item.get("path"), f"{where}.path")
    name = item.get("name", ".".join(s for s in steps if isinstance(s, str)))
    unit, pin = item.get("unit"), item.get("pin")
    if not isinstance(name, str) or len(name) > NAME_CHARACTERS_MAX or (unit is not None and not isinstance(unit, str)):
        message = f"{where}: name and unit are text"
        raise ParserError(message)
    key = steps[0] if len(steps) == 1 and isinstance(steps[0], str) else None
    unit_steps = parse_path(item["unit_path"], f"{where}.unit_path") if "unit_path" in item else None
    return _Field(
        steps, None in steps, key, name, unit, unit_steps, None if pin is None else str(pin), _compute(item, where, read),
        item.get("required") is True,
    )  # fmt: skip


def _compute(item: Mapping[str, Any], where: str, read: Read) -> Callable[[Any], Any] | None:
    if not {"scale", "offset", "expr"} & item.keys():
        return None
    for step in ("scale", "offset"):
        if step in item and (isinstance(item[step], bool) or not isinstance(item[step], int | float)):
            message = f"{where}.{step}: {item[step]!r} is not a number"
            raise ParserError(message)
    try:
        linear = Linear.of(item.get("scale", 1), item.get("offset", 0))
        function = expressions.compile_expression(item["expr"], ("x",)) if "expr" in item else None
    except ExpressionError as e:
        message = f"{where}.expr: {e}"
        raise ParserError(message) from None
    except (ValueError, OverflowError):
        message = f"{where}: scale and offset are finite numbers"
        raise ParserError(message) from None

    def compute(value: Any) -> Any:
        if isinstance(value, str):
            number = read(value)
            if number is None:
                return value
            value = number
        if isinstance(value, int) and value.bit_length() > expressions.FIELD_BITS_MAX:
            return math.nan
        try:
            if function is not None:
                value = function(value)
            # Exactly and rounded once: a tenth of 3 is 0.3.
            return value if linear.is_identity else linear.apply(int(value) if isinstance(value, bool) else value)
        except expressions.ARITHMETIC_ERRORS:
            return math.nan

    return compute


def _each(item: Any, where: str, read: Read, clock: WallClock | None) -> _Each:
    if not isinstance(item, dict):
        message = f"{where}: a mapping is expected"
        raise ParserError(message)
    _known(item, _EACH_KEYS, where)
    for key in ("name", "pin", "unit"):
        if key in item and not isinstance(item[key], str):
            message = f"{where}.{key}: text is expected"
            raise ParserError(message)
        for match in _TEMPLATE.finditer(item.get(key, "")):
            parse_path(match[1], f"{where}.{key}")
    fields = item.get("fields")
    if not isinstance(fields, list) or not fields:
        message = f"{where}.fields: a list is needed"
        raise ParserError(message)
    named = "name" in item
    compiled = _fields(
        [{**f, "name": f.get("name", "")} if named and isinstance(f, dict) else f for f in fields],
        f"{where}.fields",
        read,
    )
    return _Each(
        parse_path(item.get("path"), f"{where}.path"), item.get("name"), item.get("pin"), item.get("unit"),
        _time(item, f"{where}.time", clock), compiled,
    )  # fmt: skip


def _known(item: Mapping[str, Any], keys: set[str], where: str) -> None:
    if unknown := item.keys() - keys:
        message = f"{where}: {', '.join(sorted(map(str, unknown)))} is not known; known are {', '.join(sorted(keys))}"
        raise ParserError(message)


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> JsonDecoder:
    """The decoder of a `json` parser. Of the variables `time_zone` is used.

    Raises:
        ParserError: the mapping is wrong.
    """
    return JsonDecoder(source_of(doc), zone_in(variables))
