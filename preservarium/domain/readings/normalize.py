"""From a raw message to a standardized one: decode, map, convert. Pure and deterministic.

The time of a message is the device's own where it gives one, else the network's (`meta.time`), else when it was received,
and then `clock` says so. Readings carry a time of their own only where it differs from the message's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from preservarium.domain.decoders.base import (
    Decoded,
    Decoder,
    RowReader,
    message_time,
    nothing_left,
    sorted_out,
)
from preservarium.domain.decoders.kinds import compile_any
from preservarium.domain.decoders.scripts import ScriptParser
from preservarium.domain.readings.mapping import DatatypeLookup, Mapper
from preservarium.domain.readings.reading import UNKNOWN, Message, RawMessage
from preservarium.domain.readings.wall_clock import TIME_AMBIGUOUS, Twice
from preservarium.domain.registry.device import DeviceDoc, DeviceTypeDoc, ParserDoc
from preservarium.errors import ReasonCode, Reject


@dataclass(slots=True)  # not frozen: that costs a microsecond for each of them
class CompiledDevice:
    """A device's configuration, ready to use. Nobody changes it; the mapper has a cache of its own."""

    device_id: str
    rev: int
    enabled: bool
    decoder: Decoder | ScriptParser  #: a script runs in the sandbox: between `arguments` and `fields`
    parser: str  #: name@version
    mode: str  #: connector mode where the message names none
    experiment_id: str | None
    mapper: Mapper
    row: RowReader | None = None  #: the decoder's short way, where it has one


class Normalized(NamedTuple):
    """What became of a raw message."""

    message: Message
    refused: tuple[Reject, ...]  #: parts and values that could not be used; the others are in the message


def compile_device(
    device: DeviceDoc,
    device_type: DeviceTypeDoc,
    parser: ParserDoc,
    datatype: DatatypeLookup,
    decoder: Decoder | ScriptParser | None = None,
    mapper: Mapper | None = None,
) -> CompiledDevice:
    """Compile a device's configuration.

    Args:
        device: the device.
        device_type: its type.
        parser: the active version of the type's parser.
        datatype: finds a datatype by its name.
        decoder: the parser, compiled for the device's variables, where one is at hand.
        mapper: the mapping, where one is at hand that is the same for this device.

    Raises:
        Reject: NO_PARSER, the parser cannot be compiled.
    """
    if decoder is None:
        decoder = compile_any(parser, variables_of(device, device_type))
    return CompiledDevice(
        device["device_id"],
        device["rev"],
        device.get("enabled", True),
        decoder,
        f"{parser['name']}@{parser['version']}",
        device.get("mode") or device_type.get("mode") or UNKNOWN,
        device.get("experiment_id"),
        mapper if mapper is not None else Mapper(device, device_type, datatype),
        getattr(decoder, "row", None),
    )


def variables_of(device: Mapping[str, Any], device_type: Mapping[str, Any]) -> dict[str, Any]:
    """What a parser is compiled for: the device's variables, and among them as `time_zone` its own or its type's."""
    zone = device.get("time_zone") or device_type.get("time_zone")
    variables = device.get("variables") or {}
    return {**variables, "time_zone": zone} if zone else variables


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
    if not compiled.enabled:
        require_enabled(compiled)
    if compiled.row is not None and (row := compiled.row(raw)) is not None:
        layout, values, at = row
        # Where there is no reading, decoding field by field says why.
        if len(values) <= readings_max and (readings := compiled.mapper.readings(layout, values)):
            own = at is not None
            if at is None:
                at, own = message_time(raw)
            elif type(at) is Twice:
                for reading in readings:
                    _flag(reading)
            return Normalized(_message(raw, compiled, at, own, readings), ())
    if isinstance(compiled.decoder, ScriptParser):
        raise Reject(ReasonCode.NO_PARSER, f"{compiled.parser} is a script, and scripts run in the sandbox only")
    return standardize(raw, compiled, compiled.decoder.decode(raw), readings_max)


def has_payload(raw: RawMessage) -> bool:
    """Whether a message carries anything of its device: an event of the network alone is none of its readings, and no fault."""
    payload = raw["payload"]
    return payload is not None and payload != b"" and payload != ""


def require_enabled(compiled: CompiledDevice) -> None:
    """Refuse what comes from a device that is switched off.

    Raises:
        Reject: DEVICE_DISABLED.
    """
    if not compiled.enabled:
        raise Reject(ReasonCode.DEVICE_DISABLED, f"device {compiled.device_id} is switched off")


def standardize(
    raw: RawMessage, compiled: CompiledDevice, decoded: Sequence[Decoded | Reject], readings_max: int = 10_000
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
    fields, refused = sorted_out(decoded)
    at, own = _time(raw, fields)
    target_of = compiled.mapper.target
    readings: list[dict[str, Any]] = []
    taken: dict[tuple[str, str, int], dict[str, Any]] = {}
    for name, value, unit, timestamp, pin in fields:
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
        if type(timestamp) is Twice:
            _flag(reading)
        if timestamp is not None and timestamp != at:
            reading["timestamp"] = timestamp
        readings.append(reading)
    if not readings:
        if refused:
            raise nothing_left(refused)
        raise Reject(ReasonCode.MAPPING_FAILED, f"none of {len(fields)} decoded fields becomes a reading")
    return Normalized(_message(raw, compiled, at, own, readings), tuple(refused))


def _flag(reading: dict[str, Any]) -> None:
    """Tell that the wall clock has shown the reading's time twice."""
    reading["flags"] = [*reading.get("flags", ()), TIME_AMBIGUOUS]


def _message(raw: RawMessage, compiled: CompiledDevice, at: int, own: bool, readings: list[dict[str, Any]]) -> Message:
    """A standardized message of the instant `at`, µs; `own`: which the device or its network gave."""
    line: Any = {
        "device_id": compiled.device_id,
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
        "clock": "device" if own else "received",
        "readings": readings,
    }
    experiment = raw["experiment_id"] or compiled.experiment_id
    if experiment is not None:
        line["experiment_id"] = experiment
    return line  # type: ignore[no-any-return]


def _time(raw: RawMessage, decoded: Sequence[Decoded]) -> tuple[int, bool]:
    """(the instant of the message in µs, whether the device or its network gave it)."""
    times = {field[3] for field in decoded}
    if times and None not in times:
        return max(cast(set[int], times)), True
    return message_time(raw)
