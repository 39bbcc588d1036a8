"""A payload through a parser, to be looked at: nothing is sent, and nothing is stored. Scripts run in the sandbox, as in the stream."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, Final, Protocol, cast

from preservarium.domain.decoders.base import Decoded, sorted_out
from preservarium.domain.decoders.kinds import compile_any
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.readings.normalize import compile_device, standardize
from preservarium.domain.readings.number import shown
from preservarium.domain.readings.reading import RawMessage
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.errors import Reject
from preservarium.sandbox.pool import Call, Outcome
from preservarium.stages.normalize import script_call, script_fields

#: Fields and readings that are shown; a message has at most 10,000.
SHOWN_MAX: Final = 500
#: Characters of one value.
VALUE_CHARS_MAX: Final = 2_000


class Sandbox(Protocol):
    """Where scripts run."""

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcome of every call, in their order."""
        ...


async def attempt(
    parser: Mapping[str, Any],
    raw: RawMessage,
    sandbox: Sandbox,
    *,
    device: DeviceDoc | None = None,
    device_type: DeviceTypeDoc | None = None,
    datatypes: Mapping[str, DatatypeDoc] | None = None,
) -> dict[str, Any]:
    """Decode a message with a parser, and map what it finds; JSON.

    Args:
        parser: a `ParserDoc`; `version` and `rev` may be missing.
        raw: the message.
        sandbox: where scripts run.
        device: whose variables and mapping count; None: one that has none.
        device_type: its type; None: one that says nothing.
        datatypes: by name.

    Returns:
        `fields`: what the parser found; `readings`: what they become; `refused`: what of them cannot be used, with its code; `error`: why
        there is nothing at all, else None; `took_ms`, in which a script's way to the sandbox and back is.

    Raises:
        Fatal: the parser is a script, and the sandbox does not start.
    """
    began_s = perf_counter()
    doc = cast(ParserDoc, {"version": 1, "rev": 0, "status": "draft", **parser})
    document: dict[str, Any] = {"fields": [], "readings": [], "refused": [], "error": None}
    try:
        compiled = compile_any(doc, None if device is None else cast(Any, device).get("variables"))
        decoded: Sequence[Decoded | Reject]
        if isinstance(compiled, ScriptParser):
            (outcome,) = await sandbox.run([script_call(compiled, raw)])
            decoded = script_fields(compiled, outcome, raw["received_at"])
        else:
            decoded = compiled.decode(raw)
        fields, _ = sorted_out(decoded)
        document["fields"] = [_field(each) for each in fields[:SHOWN_MAX]]
        kind = device_type or cast(
            DeviceTypeDoc, {"name": doc["name"], "rev": 0, "manufacturer": "", "parser": doc["name"]}
        )
        one = device or cast(DeviceDoc, {"device_id": raw["device"], "rev": 0, "type": kind["name"], "enabled": True})
        known: Mapping[str, DatatypeDoc] = datatypes or {}
        configuration = compile_device(one, kind, doc, known.get, compiled)
        message, refused = standardize(raw, configuration, decoded)
        document["readings"] = [_reading(each) for each in message["readings"][:SHOWN_MAX]]
        document["refused"] = [{"code": str(each.code), "message": str(each)} for each in refused[:SHOWN_MAX]]
    except Reject as e:
        document["error"] = {"code": str(e.code), "message": str(e)}
    document["took_ms"] = round((perf_counter() - began_s) * 1_000, 2)
    return document


def _field(field: Decoded) -> dict[str, Any]:
    return {
        "name": field.name,
        "value": _cut(shown(field.value)),
        "unit": field.unit or None,
        "pin": field.pin,
    }


def _reading(reading: Mapping[str, Any]) -> dict[str, Any]:
    names = ("component_type", "pin_position", "value", "value_text", "unit", "timestamp", "flags")
    return {name: _cut(reading.get(name)) for name in names}


def _cut(value: Any) -> Any:
    if isinstance(value, str) and len(value) > VALUE_CHARS_MAX:
        return value[:VALUE_CHARS_MAX] + "…"
    if isinstance(value, bytes):
        return value[: VALUE_CHARS_MAX // 2].hex()
    if isinstance(value, float) and value != value:  # NaN is no JSON
        return None
    return value
