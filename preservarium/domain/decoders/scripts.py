"""Parser scripts: what they are given, and how what they return becomes decoded fields.

The scripts themselves run in the sandbox, outside the domain. Here are the two pure ends of a call: `arguments` before
it and `fields` after it. JavaScript follows the payload codec API of the LoRa Alliance (TS013) as network servers publish
it: `decodeUplink({bytes, fPort, recvTime, variables})` returns `{data, warnings, errors}`. Python is ours:
`decode(payload, context)` returns a list of `{"name", "value", "unit", "timestamp", "pin"}` or a dict of name to value.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from preservarium.domain.decoders.base import (
    DECODED_MAX,
    Decoded,
    ParserError,
    base_time,
    clock_of,
    failed,
    payload_bytes,
    sorted_out,
    zone_in,
)
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.readings.wall_clock import WallClock
from preservarium.errors import ReasonCode, Reject

#: Parser kind -> the function that decodes.
FUNCTIONS: Final = {"javascript": "decodeUplink", "python": "decode"}
#: Objects nested deeper than this are no measurement any more.
DEPTH_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class ScriptParser:
    """One version of a parser script, with a device's variables."""

    kind: str  #: javascript or python
    name: str  #: name@version
    source: str
    script_id: str  #: SHA-256 of kind and source: equal sources share one context
    variables: Mapping[str, Any]
    clock: WallClock | None = None  #: of instants without an offset that a Python script returns; None: UTC

    @property
    def function(self) -> str:
        """The function to call."""
        return FUNCTIONS[self.kind]

    def arguments(self, raw: RawMessage) -> str:
        """The call's arguments as JSON text; a number that is not finite is marked (json_text.py).

        A payload of bytes (or hexadecimal or base64 text) is `bytes`, a list of numbers; any other JSON is `payload`.

        Raises:
            Reject: TIMESTAMP_INVALID, the message's time is none that a calendar has.
        """
        given: dict[str, Any] = {}
        try:
            given["bytes"] = list(payload_bytes(raw["payload"]))
        except Reject:
            given["payload"] = raw["payload"]
        try:
            at = datetime.fromtimestamp(base_time(raw) // 1_000 / 1e3, UTC).isoformat(timespec="milliseconds")
        except (ValueError, OverflowError, OSError):
            raise Reject(ReasonCode.TIMESTAMP_INVALID, f"{base_time(raw)} µs is outside the calendar") from None
        at = at.replace("+00:00", "Z")
        if self.kind == "javascript":
            given |= {
                "fPort": raw["port"] if raw["port"] is not None else 1,
                "recvTime": at,
                "variables": self.variables,
            }
        else:
            context = {"port": raw["port"], "received_at": at, "device": raw["device"], "topic": raw["topic"]}
            given["context"] = {**context, "variables": self.variables, "meta": raw["meta"]}
        return json_text.dumps(given, not_finite="mark").decode()

    def fields(self, text: str, received_at: int = 0) -> list[Decoded | Reject]:
        """The fields of a result (JSON text), and the items of a Python script's list that are none.

        Args:
            text: of the result.
            received_at: when the message was received, µs; needed where instants are of a wall clock.

        Raises:
            Reject: DECODE_FAILED, the script reported errors or returned nothing that holds a value; DECODE_LIMIT.
        """
        try:
            result = json_text.loads(text.encode())
        except (orjson.JSONDecodeError, UnicodeEncodeError) as e:
            # JavaScript may make what JSON text cannot carry on: half a surrogate pair, a thousand levels.
            message = f"the result cannot be read: {e}"
            raise failed(message) from None
        if self.kind == "javascript":
            result = _data(result)
        found: list[Decoded | Reject] = []
        found += (
            _python_fields(result, self.clock, received_at) if isinstance(result, list) else flat("", result, None, 0)
        )
        if len(found) > DECODED_MAX:
            raise Reject(ReasonCode.DECODE_LIMIT, f"{len(found)} fields, more than {DECODED_MAX}")
        if not found:
            message = "the script returned no values"
            raise failed(message)
        sorted_out(found)
        return found


def compile_script(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> ScriptParser:
    """A script parser from its document.

    Raises:
        ParserError: the source is not text, or there is no such time zone.
    """
    source = doc.get("source")
    if not isinstance(source, str) or not source.strip():
        message = f"the source of a {doc['kind']} parser is its text"
        raise ParserError(message)
    digest = hashlib.sha256(f"{doc['kind']}\0{source}".encode()).hexdigest()
    clock = clock_of({}, zone_in(variables))
    return ScriptParser(doc["kind"], f"{doc['name']}@{doc['version']}", source, digest, dict(variables or {}), clock)


def _data(result: Any) -> Any:
    """`data` of a TS013 result."""
    if not isinstance(result, dict):
        message = f"the script returned {json_text.kind_of(result)}, not an object"
        raise failed(message)
    errors = result.get("errors")
    if errors:
        text = "; ".join(str(e) for e in errors[:5]) if isinstance(errors, list) else str(errors)
        message = f"the script reports: {text[:500]}"
        raise failed(message)
    data = result.get("data")
    if data is None:
        message = "the script returned no data"
        raise failed(message)
    return data


def flat(name: str, value: Any, unit: str | None, depth: int) -> Iterator[Decoded]:
    """What a codec returns, as fields: nested objects and lists are named `outer.inner`, `list.0`."""
    if isinstance(value, str | int | float | bool):
        yield Decoded(name or "value", value, unit, None, None)
    elif depth >= DEPTH_MAX or value is None:
        return
    elif isinstance(value, dict):
        # {value, unit}: how several makers write a measurement (displayName besides).
        if "value" in value and not isinstance(value["value"], dict | list) and set(value) <= _MEASUREMENT:
            given = value.get("unit")
            yield from flat(name, value["value"], given if isinstance(given, str) and given else None, depth + 1)
            return
        for key, inner in value.items():
            yield from flat(f"{name}.{key}" if name else str(key), inner, None, depth + 1)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from flat(f"{name}.{i}" if name else str(i), inner, None, depth + 1)


_MEASUREMENT: Final = frozenset({"value", "unit", "displayName", "name", "label", "type"})


def _python_fields(rows: list[Any], clock: WallClock | None, received_at: int) -> Iterator[Decoded | Reject]:
    last: int | None = None
    for i, row in enumerate(rows):
        try:
            field = _python_field(row, clock, received_at, last)
            last = last if field.timestamp is None else field.timestamp
            yield field
        except Reject as e:
            yield failed(f"item {i} of the script's list {e}")


def _python_field(row: Any, clock: WallClock | None, received_at: int, last: int | None) -> Decoded:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        message = "has no name"
        raise failed(message)
    timestamp = None
    if row.get("timestamp") is not None:
        given = row["timestamp"]
        timestamp = instant_us(given) if clock is None else clock.instant(given, None, received_at, last)
        if timestamp is None:
            message = "has a timestamp that is no instant"
            raise failed(message)
    value = row.get("value")
    if isinstance(value, dict | list):
        message = f"has {json_text.kind_of(value)} for a value"
        raise failed(message)
    unit, pin = row.get("unit"), row.get("pin")
    return Decoded(row["name"], value, str(unit) if unit else None, timestamp, str(pin) if pin is not None else None)
