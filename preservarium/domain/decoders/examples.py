"""A parser's examples: an input and what it must decode into. They prove a parser before it is used.

```yaml
examples:
  - hex: "0210d300020c80"        # or json: {…}, or text: "…"
    port: 1                      # optional; also time (ISO 8601 or µs) and variables
    expect:
      Battery voltage: {value: 3.2, unit: V}
      Device ID: 4307            # the value alone, where the unit does not matter
      temperature:               # several of one name, in their order
        - {value: 21.0, pin: "1"}
        - {value: 22.0, pin: "2", time: "2024-06-01T12:00:00Z"}
  - hex: "ff"
    reject: true                 # must be refused
  - hex: "0210"                  # a script: what it returns, as codec repositories publish it
    output: {data: {battery: 3.2}}
```

Every decoded field must be expected, and every expected field decoded; a part of the input that cannot be read gives no field.
Numbers agree within a relative 1e-9. A cell of CSV may be expected as its text or as the number in it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from preservarium.domain.decoders.base import Decoded, failed, sorted_out
from preservarium.domain.decoders.kinds import compile_any, compile_parser
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import Written
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import Reject

#: What "equal" means for floats: published values are printed with 15 digits or fewer.
RELATIVE_TOLERANCE: Final = 1e-9
#: Received at, where an example gives no time. 2024-06-01T12:00:00Z.
RECEIVED_AT_US: Final = 1_717_243_200_000_000

_INPUTS: Final = ("hex", "json", "text")
#: Lines that say how a script's result differs: more help nobody.
DIFFERENCES_MAX: Final = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one example."""

    index: int
    differences: tuple[str, ...]  #: none: it holds

    @property
    def ok(self) -> bool:
        """Whether the example holds."""
        return not self.differences


def raw_message(
    payload: Any,
    *,
    device: str = "example",
    port: int | None = None,
    received_at: int = RECEIVED_AT_US,
    connector: str = "example",
) -> RawMessage:
    """A raw message around a payload, for trying a parser."""
    return {
        "device": device,
        "received_at": received_at,
        "connector": connector,
        "mode": "",
        "topic": "",
        "port": port,
        "payload": payload,
        "meta": {},
        "experiment_id": None,
        "raw_partition": 0,
        "raw_offset": 0,
        "raw_index": 0,
        "generation": 0,
    }


def example_input(example: Mapping[str, Any]) -> RawMessage:
    """The raw message of an example.

    Raises:
        ValueError: it has none, or one that cannot be read.
    """
    given = [key for key in _INPUTS if key in example]
    if len(given) != 1:
        message = f"an example has one of {', '.join(_INPUTS)}"
        raise ValueError(message)
    payload = bytes.fromhex(str(example["hex"])) if "hex" in example else example[given[0]]
    at = instant_us(example["time"]) if "time" in example else RECEIVED_AT_US
    if at is None:
        message = f"{example['time']!r} is no instant"
        raise ValueError(message)
    return raw_message(payload, port=example.get("port"), received_at=at)


def compare(decoded: Sequence[Decoded | Reject], expect: Mapping[str, Any]) -> list[str]:
    """What differs, a line each, for people."""
    found: dict[str, list[Decoded]] = {}
    fields, refused = sorted_out(decoded)
    for field in fields:
        found.setdefault(field.name, []).append(field)
    lines = [
        f"{name}: not expected, decoded {_shown(field)}"
        for name, fields in found.items()
        if name not in expect
        for field in fields
    ]
    for name, wanted in expect.items():
        fields = found.get(str(name), [])
        entries = wanted if isinstance(wanted, list) else [wanted]
        if len(fields) != len(entries):
            lines.append(f"{name}: expected {len(entries)}, decoded {len(fields)}")
            continue
        for field, entry in zip(fields, entries, strict=True):
            lines += _differences(str(name), field, entry if isinstance(entry, dict) else {"value": entry})
    return [*lines, *(f"refused: {part}" for part in refused)] if lines else lines


def _differences(name: str, field: Decoded, entry: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if unknown := entry.keys() - {"value", "unit", "pin", "time"}:
        lines.append(f"{name}: an example knows no {sorted(unknown)[0]}")
    if "value" in entry and not _equal(field.value, entry["value"]):
        lines.append(f"{name}: expected {entry['value']!r}, decoded {field.value!r}")
    if "unit" in entry and (entry["unit"] or None) != field.unit:
        lines.append(f"{name}: expected unit {entry['unit']!r}, decoded {field.unit!r}")
    if "pin" in entry and str(entry["pin"]) != field.pin:
        lines.append(f"{name}: expected pin {entry['pin']!r}, decoded {field.pin!r}")
    if "time" in entry and instant_us(entry["time"]) != field.timestamp:
        lines.append(f"{name}: expected time {entry['time']!r}, decoded {field.timestamp!r} µs")
    return lines


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, Written):
        # Which of the two it is says its datatype, which an example does not know.
        if isinstance(wanted, str):
            return str(found) == wanted
        found = bool(found.number) if isinstance(wanted, bool) and found.number in {0, 1} else found.number
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=RELATIVE_TOLERANCE, abs_tol=0.0) or (found != found != wanted)
    return type(found) is type(wanted) and bool(found == wanted)


def _shown(field: Decoded) -> str:
    return f"{field.value!r}{f' {field.unit}' if field.unit else ''}{f' (pin {field.pin})' if field.pin else ''}"


def run(
    doc: Mapping[str, Any],
    decode: Callable[[Mapping[str, Any], RawMessage], Sequence[Decoded | Reject]] | None = None,
) -> list[Outcome]:
    """Run the examples of a parser document, each by itself.

    Args:
        doc: a `ParserDoc`, or a parser file's content.
        decode: how to decode, where parsers do not run in this process.

    A parser that cannot be compiled fails every example with the reason.
    """
    outcomes: list[Outcome] = []
    for index, example in enumerate(doc.get("examples") or []):
        if not isinstance(example, dict):
            outcomes.append(Outcome(index, ("an example is a mapping",)))
            continue
        outcomes.append(Outcome(index, tuple(_run(doc, example, decode))))
    return outcomes


def _run(
    doc: Mapping[str, Any],
    example: Mapping[str, Any],
    decode: Callable[[Mapping[str, Any], RawMessage], Sequence[Decoded | Reject]] | None,
) -> list[str]:
    expect, reject = example.get("expect"), example.get("reject", False)
    if (expect is None) == (not reject) or (expect is not None and not isinstance(expect, dict)):
        return ["an example has either `expect`, a mapping, or `reject: true`"]
    try:
        raw = example_input(example)
    except ValueError as e:
        return [str(e)]
    try:
        if decode is None:
            decoded = compile_parser(doc, example.get("variables")).decode(raw)
        else:
            decoded = decode(doc, raw)
    except Reject as e:
        return [] if reject else [f"refused ({e.code}): {e}"]
    if expect is None:
        return [f"expected to be refused, decoded {len(decoded)} fields"]
    return compare(decoded, expect)


# --- scripts -------------------------------------------------------------------------------------------------------
#
# They run elsewhere and many at once, so an example has two ends here: the call that it asks for, and the verdict on
# what came back.


@dataclass(frozen=True, slots=True)
class Asked:
    """The call of a script that an example asks for."""

    index: int
    parser: ScriptParser
    arguments: str  #: JSON text


def ask(doc: Mapping[str, Any]) -> tuple[list[Asked], list[Outcome]]:
    """The calls of a script's examples, and the outcomes of those that cannot be called."""
    asked: list[Asked] = []
    outcomes: list[Outcome] = []
    for index, example in enumerate(doc.get("examples") or []):
        if not isinstance(example, dict) or sum(key in example for key in ("expect", "output", "reject")) != 1:
            text = "an example of a script is a mapping with one of `expect`, `output` and `reject: true`"
            outcomes.append(Outcome(index, (text,)))
            continue
        try:
            parser = compile_any({"version": 1, **doc}, example.get("variables"))
            assert isinstance(parser, ScriptParser)
            asked.append(Asked(index, parser, parser.arguments(example_input(example))))
        except (Reject, ValueError) as e:
            outcomes.append(Outcome(index, (str(e),)))
    return asked, outcomes


def judge(asked: Asked, example: Mapping[str, Any], text: str | None, fault: str) -> Outcome:
    """Whether an example holds.

    Args:
        asked: its call.
        example: it.
        text: what the script returned, JSON text; None: it gave no result.
        fault: why not.
    """
    if "output" in example and text is not None:
        return Outcome(asked.index, tuple(_output_differences(_loads(text), example["output"])))
    try:
        if text is None:
            raise failed(fault)
        decoded = asked.parser.fields(text)
    except Reject as e:
        return Outcome(asked.index, () if example.get("reject") else (f"refused: {e}",))
    if example.get("reject"):
        return Outcome(asked.index, (f"expected to be refused, decoded {len(decoded)} fields",))
    if not isinstance(example.get("expect"), dict):
        return Outcome(asked.index, ("`expect` is a mapping",))
    return Outcome(asked.index, tuple(compare(decoded, example["expect"])))


def _loads(text: str) -> Any:
    try:
        # What is not finite is null in what codec repositories publish.
        return orjson.loads(json_text.dumps(json_text.loads(text.encode()), not_finite="null"))
    except orjson.JSONDecodeError as e:
        return f"(cannot be read: {e.msg})"


def _output_differences(found: Any, wanted: Any) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        # An empty list of warnings or errors says what an absent one says.
        optional = ("warnings", "errors")
        found = {k: v for k, v in found.items() if v or k not in optional}
        wanted = {k: v for k, v in wanted.items() if v or k not in optional}
    return list(_json_differences("", found, wanted))[:DIFFERENCES_MAX]


def _json_differences(path: str, found: Any, wanted: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in wanted.keys() - found.keys():
            yield f"{path}.{key}".lstrip(".") + f": expected {wanted[key]!r}, not returned"
        for key, value in found.items():
            name = f"{path}.{key}".lstrip(".")
            if key not in wanted:
                yield f"{name}: not expected, returned {value!r}"
            else:
                yield from _json_differences(name, value, wanted[key])
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _json_differences(f"{path}[{i}]", one, other)
    elif not _equal(found, wanted):
        yield f"{path or 'the result'}: expected {wanted!r}, returned {found!r}"
