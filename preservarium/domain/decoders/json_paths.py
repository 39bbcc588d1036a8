"""JSON payloads by path mapping.

```yaml
time: sent.at            # optional; the instant of the message
time_unit: ms            # s, ms, us, ns; absent: ISO 8601 text, or told by the size
fields:                  # absent: every number, text and boolean of the document, named by its path
  - {path: temperature, unit: °C}
  - {path: "air.0.pm25", name: pm2_5, unit: µg/m³, pin: "1"}
each:                    # optional: a list (or an object's values), each element read by itself
  - path: "sensors[*]"
    name: "{type}"       # filled in from the element
    pin: "{channel}"
    time: t
    fields: [{path: value, unit_path: unit}]
```

A path is keys with dots between them; `[2]` or `.2` is an element of a list, `[*]` every one; a key with dots in it is
written `["a.b"]`. What is absent or null gives no field: devices leave out what they did not measure.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from preservarium.domain import expressions
from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    ParserError,
    Value,
    failed,
    source_of,
)
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.expressions import ExpressionError
from preservarium.domain.instant import UNITS_US, instant_us
from preservarium.domain.reading import RawMessage

#: Fields of one mapping, and levels of a document that is taken as it is.
FIELDS_MAX: Final = 2_000
DEPTH_MAX: Final = 16
#: Text longer than this is a document, not a reading.
TEXT_CHARACTERS_MAX: Final = 4_096
NAME_CHARACTERS_MAX: Final = 200

_STEP: Final = re.compile(r'\.?(?:\[(?:(?P<index>-?\d{1,6})|(?P<all>\*)|"(?P<quoted>[^"]+)")\]|(?P<key>[^.\[\]]+))')
_TEMPLATE: Final = re.compile(r"\{([^{}]+)\}")
_SOURCE_KEYS: Final = {"time", "time_unit", "fields", "each", "root", "description", "ignore"}
_EACH_KEYS: Final = {"path", "name", "pin", "time", "time_unit", "unit", "fields", "description"}
_FIELD_KEYS: Final = {"path", "name", "unit", "unit_path", "pin", "scale", "offset", "expr", "required", "description"}

#: A step of a path: a key, an index, or None for every element.
Step = str | int | None


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

    def of(self, value: Any) -> int | None:
        given = find(value, self.steps)
        if given is None:
            return None
        at = instant_us(given, self.unit)
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

    __slots__ = ("_each", "_fields", "_ignore", "_root", "_time")

    def __init__(self, source: Mapping[str, Any]) -> None:
        _known(source, _SOURCE_KEYS, "json")
        self._time = _time(source, "time")
        self._root = parse_path(source["root"], "root") if "root" in source else ()
        each = source.get("each")
        if each is not None and not isinstance(each, list):
            message = "each: a list is expected"
            raise ParserError(message)
        self._each = tuple(_each(e, f"each[{i}]") for i, e in enumerate(each or []))
        given = source.get("fields")
        self._fields = None if given is None and not self._each else _fields([] if given is None else given, "fields")
        ignore = source.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(i, str) for i in ignore):
            message = "ignore: a list of names"
            raise ParserError(message)
        self._ignore = {*ignore, *([_joined(self._time.steps)] if self._time else [])}

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The fields of a document.

        Raises:
            Reject: DECODE_FAILED, or DECODE_LIMIT.
        """
        document = raw["payload"]
        if isinstance(document, bytes):
            try:
                document = orjson.loads(document)
            except orjson.JSONDecodeError as e:
                message = f"the payload is not JSON: {e.msg}"
                raise failed(message) from None
        if self._root:
            document = find(document, self._root)
        if not isinstance(document, dict | list):
            message = f"a JSON object or array is expected, not {type(document).__name__}"
            raise failed(message)
        out: list[Decoded] = []
        # A list of objects is several measurements, each with its own time.
        for part in document if isinstance(document, list) and self._whole(document) else (document,):
            at = self._time.of(part) if self._time else None
            if self._fields is None:
                _flatten(part, "", None, at, out, 0, self._ignore)
            else:
                _read(self._fields, part, at, None, None, None, out)
            for each in self._each:
                _read_each(each, part, at, out)
            if len(out) > DECODED_MAX:
                raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")
        return out

    def _whole(self, document: list[Any]) -> bool:
        return all(isinstance(part, dict) for part in document) and not any(
            each.steps[:1] and not isinstance(each.steps[0], str) for each in self._each
        )


def _read_each(each: _Each, part: Any, at: int | None, out: list[Decoded]) -> None:
    for element, index in find_all(part, each.steps):
        if element is None:
            continue
        own = each.time.of(element) if each.time else None
        name = _fill(each.name, element)
        if each.name is not None and name is None:
            message = f"an element has nothing to name it by ({each.name})"
            raise failed(message)
        pin = _fill(each.pin, element) if each.pin is not None else index
        _read(each.fields, element, own if own is not None else at, name, pin, each.unit, out)
        if len(out) > DECODED_MAX:
            raise Reject(ReasonCode.DECODE_LIMIT, f"more than {DECODED_MAX} fields")


def _read(
    fields: tuple[_Field, ...],
    part: Any,
    at: int | None,
    name: str | None,
    pin: str | None,
    unit: str | None,
    out: list[Decoded],
) -> None:
    is_object = isinstance(part, dict)
    for field in fields:
        if field.many:
            for value, index in find_all(part, field.steps):
                _take(field, value, part, at, name, pin or index, unit, out)
            continue
        value = part.get(field.key) if is_object and field.key is not None else find(part, field.steps)
        _take(field, value, part, at, name, pin, unit, out)


def _take(
    field: _Field,
    value: Any,
    part: Any,
    at: int | None,
    name: str | None,
    pin: str | None,
    unit: str | None,
    out: list[Decoded],
) -> None:
    if value is None:
        if field.required:
            message = f"{_joined(field.steps)} is missing"
            raise failed(message)
        return
    if isinstance(value, dict | list):
        message = f"{_joined(field.steps)} is {'an object' if isinstance(value, dict) else 'a list'}, not a value"
        raise failed(message)
    if isinstance(value, str) and len(value) > TEXT_CHARACTERS_MAX:
        message = f"{_joined(field.steps)} is a text of {len(value)} characters"
        raise failed(message)
    if field.compute is not None:
        value = field.compute(value)
    spelled = field.unit
    if field.unit_steps is not None and isinstance(found := find(part, field.unit_steps), str):
        spelled = found[:NAME_CHARACTERS_MAX]
    full = field.name if name is None else f"{name}_{field.name}" if field.name else name
    out.append(Decoded(full, value, spelled or unit, at, field.pin if field.pin is not None else pin))


def _flatten(
    value: Any, name: str, pin: str | None, at: int | None, out: list[Decoded], depth: int, ignore: set[str]
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


def _time(item: Mapping[str, Any], where: str) -> _Time | None:
    unit = item.get("time_unit")
    if unit is not None and unit not in UNITS_US:
        message = f"{where}_unit: {unit!r} is not one of {', '.join(UNITS_US)}"
        raise ParserError(message)
    return _Time(parse_path(item["time"], where), unit) if "time" in item else None


def _fields(items: Any, where: str) -> tuple[_Field, ...]:
    if not isinstance(items, list) or len(items) > FIELDS_MAX:
        message = f"{where}: a list of at most {FIELDS_MAX} fields"
        raise ParserError(message)
    return tuple(_field(item, f"{where}[{i}]") for i, item in enumerate(items))


def _field(item: Any, where: str) -> _Field:
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
        steps, None in steps, key, name, unit, unit_steps, None if pin is None else str(pin), _compute(item, where),
        item.get("required") is True,
    )  # fmt: skip


def _compute(item: Mapping[str, Any], where: str) -> Callable[[Any], Any] | None:
    text = item.get("expr", "x" if {"scale", "offset"} & item.keys() else None)
    if text is None:
        return None
    for step, symbol in (("scale", "*"), ("offset", "+")):
        if step in item:
            if isinstance(item[step], bool) or not isinstance(item[step], int | float):
                message = f"{where}.{step}: {item[step]!r} is not a number"
                raise ParserError(message)
            text = f"({text}) {symbol} ({item[step]!r})"
    try:
        function = expressions.compile_expression(text, ("x",))
    except ExpressionError as e:
        message = f"{where}.expr: {e}"
        raise ParserError(message) from None

    def compute(value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return value
        if isinstance(value, int) and value.bit_length() > expressions.FIELD_BITS_MAX:
            return float("nan")
        try:
            return function(value)
        except expressions.ARITHMETIC_ERRORS:
            return float("nan")

    return compute


def _each(item: Any, where: str) -> _Each:
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
        [{**f, "name": f.get("name", "")} if named and isinstance(f, dict) else f for f in fields], f"{where}.fields"
    )
    return _Each(
        parse_path(item.get("path"), f"{where}.path"), item.get("name"), item.get("pin"), item.get("unit"),
        _time(item, f"{where}.time"), compiled,
    )  # fmt: skip


def _known(item: Mapping[str, Any], keys: set[str], where: str) -> None:
    if unknown := item.keys() - keys:
        message = f"{where}: {', '.join(sorted(map(str, unknown)))} is not known; known are {', '.join(sorted(keys))}"
        raise ParserError(message)


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> JsonDecoder:
    """The decoder of a `json` parser. Variables are not used.

    Raises:
        ParserError: the mapping is wrong.
    """
    return JsonDecoder(source_of(doc))
