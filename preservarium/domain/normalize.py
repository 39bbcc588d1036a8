"""From a raw message to a standardized one: decode, map, convert. Pure and deterministic.

The time of a message is the device's own where it gives one, else the network's (`meta.time`), else when it was received,
and then `clock` says so. Readings carry a time of their own only where it differs from the message's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from preservarium.domain.decoders import Decoded, Decoder, ScriptParser, compile_any
from preservarium.domain.decoders.base import message_time
from preservarium.domain.device import DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.mapping import DatatypeLookup, Mapper
from preservarium.domain.reading import UNKNOWN, Message, RawMessage


@dataclass(frozen=True, slots=True)
class CompiledDevice:
    """A device's configuration, ready to use. Immutable but for the mapper's own cache."""

    device_id: str
    rev: int
    enabled: bool
    decoder: Decoder | ScriptParser  #: a script runs in the sandbox: between `arguments` and `fields`
    parser: str  #: name@version
    mode: str  #: connector mode where the message names none
    experiment_id: str | None
    mapper: Mapper


class Normalized(NamedTuple):
    """What became of a raw message."""

    message: Message
    refused: tuple[Reject, ...]  #: values that could not be used; the others are in the message


def compile_device(
    device: DeviceDoc,
    device_type: DeviceTypeDoc,
    parser: ParserDoc,
    datatype: DatatypeLookup,
    decoder: Decoder | ScriptParser | None = None,
) -> CompiledDevice:
    """Compile a device's configuration.

    Args:
        device: the device.
        device_type: its type.
        parser: the active version of the type's parser.
        datatype: finds a datatype by its name.
        decoder: the parser, compiled for the device's variables, where one is at hand.

    Raises:
        Reject: NO_PARSER, the parser cannot be compiled.
    """
    return CompiledDevice(
        device["device_id"],
        device["rev"],
        device.get("enabled", True),
        decoder if decoder is not None else compile_any(parser, device.get("variables")),
        f"{parser['name']}@{parser['version']}",
        device.get("mode") or device_type.get("mode") or UNKNOWN,
        device.get("experiment_id"),
        Mapper(device, device_type, datatype),
    )


def normalize(raw: RawMessage, compiled: CompiledDevice, now_us: int, readings_max: int = 10_000) -> Normalized:
    """Decode and standardize one message of a device whose parser is no script.

    Args:
        raw: the message.
        compiled: its device's configuration.
        now_us: the current time, µs; not used by any parser yet, since a second pass must say the same as the first.
        readings_max: most readings that it may become.

    Raises:
        Reject: the message as a whole cannot be used.
    """
    require_enabled(compiled)
    if isinstance(compiled.decoder, ScriptParser):
        raise Reject(ReasonCode.NO_PARSER, f"{compiled.parser} is a script, and scripts run in the sandbox only")
    return standardize(raw, compiled, compiled.decoder.decode(raw), readings_max)


def require_enabled(compiled: CompiledDevice) -> None:
    """Refuse what comes from a device that is switched off.

    Raises:
        Reject: DEVICE_DISABLED.
    """
    if not compiled.enabled:
        raise Reject(ReasonCode.DEVICE_DISABLED, f"device {compiled.device_id} is switched off")


def standardize(
    raw: RawMessage, compiled: CompiledDevice, decoded: Sequence[Decoded], readings_max: int = 10_000
) -> Normalized:
    """Map decoded fields to readings.

    Args:
        raw: the message that they came from.
        compiled: its device's configuration.
        decoded: what the parser found, wherever it ran.
        readings_max: most readings that the message may become.

    Raises:
        Reject: DECODE_LIMIT, too many; or no field became a reading: MAPPING_FAILED, or what the first value was
            refused for.
    """
    if len(decoded) > readings_max:
        raise Reject(ReasonCode.DECODE_LIMIT, f"{len(decoded)} fields; a message may have {readings_max} readings")
    at, clock = _time(raw, decoded)
    target_of = compiled.mapper.target
    readings: list[dict[str, Any]] = []
    refused: list[Reject] = []
    taken: dict[tuple[str, str, int], dict[str, Any]] = {}
    for name, value, unit, timestamp, pin in decoded:
        target = target_of(name, unit, pin)
        if target is None or value is None:
            continue
        try:
            reading = target.reading(value, name)
        except Reject as e:
            refused.append(e)
            continue
        key = (target.component_type, target.pin_position, at if timestamp is None else timestamp)
        if key in taken:
            # One series has one value at one instant: the second would overwrite the first in every store.
            first = taken[key]
            if first.get("value") != reading.get("value") or first.get("value_text") != reading.get("value_text"):
                message = f"{name} would be a second {key[0]} (pin {key[1]}) at the same instant: map it to another pin"
                refused.append(Reject(ReasonCode.MAPPING_FAILED, message))
            continue
        taken[key] = reading
        if timestamp is not None and timestamp != at:
            reading["timestamp"] = timestamp
        readings.append(reading)
    if not readings:
        if refused:
            raise Reject(refused[0].code, "; ".join(str(r) for r in refused[:5]))
        raise Reject(ReasonCode.MAPPING_FAILED, f"none of {len(decoded)} decoded fields becomes a reading")
    line: dict[str, Any] = {
        "device_id": raw["device"],
        "connector_mode": raw["mode"] or compiled.mode,
        "topic": raw["topic"],
        "timestamp": at,
        "received_at": raw["received_at"],
        "raw_partition": raw["raw_partition"],
        "raw_offset": raw["raw_offset"],
        "raw_index": raw["raw_index"],
        "parser": compiled.parser,
        "config_rev": compiled.rev,
        "generation": raw["generation"],
        "clock": clock,
        "readings": readings,
    }
    experiment = raw["experiment_id"] or compiled.experiment_id
    if experiment is not None:
        line["experiment_id"] = experiment
    return Normalized(cast(Message, line), tuple(refused))


def _time(raw: RawMessage, decoded: Sequence[Decoded]) -> tuple[int, str]:
    """(µs, "device" or "received")."""
    times = {field[3] for field in decoded}
    if times and None not in times:
        return max(cast(set[int], times)), "device"
    at, own = message_time(raw)
    return at, "device" if own else "received"
