"""ChirpStack v4 and v3, as JSON and (v4) as protobuf, and the network server in Milesight's gateways, which writes the same.

| what | recognised by | payload |
|---|---|---|
| v4 | `deviceInfo.devEui` | `data`, base64; `object`: what the codec in ChirpStack made of it |
| v3 | `devEUI` and `applicationID`, or `devEUI` and `fPort` or `data` | likewise; `devEUI` hexadecimal or, with the `json` marshaler, base64; `objectJSON` |
| v4, protobuf | an MQTT topic `application/ID/device/EUI/event/up` | field 10 of `UplinkEvent` |

Sources: ChirpStack, `api/proto/integration/integration.proto` (v4) and `as/integration/integration.proto` (v3). Empty fields are left out.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import (
    DECODED,
    LORAWAN,
    Event,
    Format,
    Uplink,
    document,
    from_base64,
    heard,
    hertz,
    inner,
    instant,
    number,
    objects,
    port_of,
    put,
    whole,
    word,
)
from preservarium.errors import ReasonCode, Reject

#: EUI-64 is 8 bytes.
_EUI_BYTES: Final = 8


def is_event(value: Mapping[str, Any]) -> bool:
    """Whether an object is an event that ChirpStack publishes, with or without a payload."""
    info = value.get("deviceInfo")
    if isinstance(info, dict):
        return "devEui" in info
    return "devEUI" in value and not {"applicationID", "fPort", "data"}.isdisjoint(value)


def uplink(value: Mapping[str, Any]) -> Uplink | None:
    """The uplink event, v4 or v3; None for one without a payload, and for other events.

    Raises:
        Reject: a field is broken.
    """
    info = value.get("deviceInfo")
    decoded = document(value.get("object")) or document(value.get("objectJSON"))
    if not value.get("data") and decoded is None:
        return None
    data_rate = value.get("dr")
    if isinstance(info, dict):
        device = info.get("devEui")
        name, application = info.get("deviceName"), info.get("applicationName")
    else:
        device = _eui(value.get("devEUI"))
        name, application = value.get("deviceName"), value.get("applicationName")
        data_rate = value.get("dr", inner(value, "txInfo").get("dr"))
    if not isinstance(device, str) or not device:
        raise Reject(ReasonCode.ENVELOPE_NO_DEVICE, "no devEui")
    receptions = objects(value, "rxInfo")
    meta = heard(
        "milesight" if any("mac" in rx for rx in receptions) else "chirpstack",
        [
            (
                number(rx.get("rssi")),
                number(rx.get("snr")) if "snr" in rx else number(rx.get("loRaSNR")),
                rx.get("gatewayId") or rx.get("gatewayID") or rx.get("mac"),
            )
            for rx in receptions
        ],
    )
    time = value.get("time") or next((rx["time"] for rx in receptions if rx.get("time")), None)
    sent = inner(value, "txInfo")
    put(meta, "time", instant(time if time is not None else value.get("publishedAt")))
    put(meta, "f_cnt", number(value.get("fCnt")))
    put(meta, "dr", whole(data_rate))
    put(meta, "sf", whole(inner(sent, "dataRate").get("spreadFactor")))
    put(meta, "frequency", hertz(sent.get("frequency")))
    put(meta, "name", word(name))
    put(meta, "application", word(application))
    port = port_of(value.get("fPort"))
    if not value.get("data"):
        return Uplink(device, decoded, port, meta, LORAWAN)
    put(meta, DECODED, decoded)
    return Uplink(device, from_base64(value["data"], "data"), port, meta, LORAWAN)


def _eui(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    if len(value) == _EUI_BYTES * 2:
        return value
    try:
        decoded = from_base64(value, "devEUI")
    except Reject:
        return value
    return decoded.hex() if len(decoded) == _EUI_BYTES else value


# --- protobuf --------------------------------------------------------------------------------------------------------

#: Number of the field in UplinkEvent -> its name in JSON; of those in it likewise.
_DEVICE_INFO: Final = {4: "applicationName", 7: "deviceName", 8: "devEui"}
_RX_INFO: Final = {1: "gatewayId", 6: "rssi", 7: "snr"}
#: Levels of a Struct: as deep as JSON may be.
_STRUCT_DEPTH_MAX: Final = 32


class _Torn(ValueError):
    """These bytes are no protobuf."""


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            message = "a number has no end"
            raise _Torn(message)
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a message: a whole number, or bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        wire = tag & 7
        if wire == 0:
            value: Any
            value, position = _varint(data, position)
        else:
            if wire == 2:
                size, position = _varint(data, position)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                message = f"wire type {wire}"
                raise _Torn(message)
            if position + size > len(data) or not tag >> 3:
                message = "a field has no end"
                raise _Torn(message)
            value, position = data[position : position + size], position + size
        yield tag >> 3, value


def _texts(value: Any, names: Mapping[int, str]) -> dict[str, Any]:
    if not isinstance(value, bytes):
        message = "a message is expected"
        raise _Torn(message)
    found: dict[str, Any] = {}
    for number_, inside in _fields(value):
        name = names.get(number_)
        if name is None:
            continue
        if name == "snr":
            found[name] = (
                round(struct.unpack("<f", inside)[0], 2) if isinstance(inside, bytes) and len(inside) == 4 else None
            )
        elif isinstance(inside, bytes):
            found[name] = inside.decode()
        else:
            # int32 below zero is written as its 64 bits.
            found[name] = inside - 2**64 if inside >= 2**63 else inside
    return found


def _timestamp(value: Any) -> int | None:
    parts = dict(_fields(value)) if isinstance(value, bytes) else {}
    seconds, nanos = parts.get(1, 0), parts.get(2, 0)
    return seconds * 1_000_000 + nanos // 1_000 if isinstance(seconds, int) and isinstance(nanos, int) else None


def _struct(data: bytes, depth: int = 0) -> dict[str, Any]:
    """google.protobuf.Struct."""
    found: dict[str, Any] = {}
    for number_, entry in _fields(data):
        parts = dict(_fields(entry)) if number_ == 1 and isinstance(entry, bytes) else {}
        if isinstance(parts.get(1), bytes) and isinstance(parts.get(2), bytes):
            found[parts[1].decode()] = _value(parts[2], depth + 1)
    return found


def _value(data: bytes, depth: int) -> Any:
    if depth > _STRUCT_DEPTH_MAX:
        message = "nested too deep"
        raise _Torn(message)
    for kind, inside in _fields(data):
        if kind == 2 and isinstance(inside, bytes) and len(inside) == 8:
            plain: float = struct.unpack("<d", inside)[0]
            return int(plain) if plain.is_integer() and abs(plain) < 2**53 else plain
        if kind == 3 and isinstance(inside, bytes):
            return inside.decode()
        if kind == 4 and isinstance(inside, int):
            return bool(inside)
        if kind == 5 and isinstance(inside, bytes):
            return _struct(inside, depth)
        if kind == 6 and isinstance(inside, bytes):
            return [_value(one, depth + 1) for n, one in _fields(inside) if n == 1 and isinstance(one, bytes)]
    return None


def from_protobuf(data: bytes, dev_eui: str) -> dict[str, Any]:
    """An UplinkEvent of v4 as the JSON marshaler would write it, as far as it is read here.

    Args:
        data: the message.
        dev_eui: that the topic names, for one that names none.

    Raises:
        Reject: ENVELOPE_INVALID, these bytes are none.
    """
    event: dict[str, Any] = {"deviceInfo": {}, "rxInfo": []}
    try:
        for number_, value in _fields(data):
            if number_ == 2:
                event["time"] = _timestamp(value)
            elif number_ == 3:
                event["deviceInfo"] = _texts(value, _DEVICE_INFO)
            elif number_ in (6, 7, 8) and isinstance(value, int):
                event[{6: "dr", 7: "fCnt", 8: "fPort"}[number_]] = value
            elif number_ == 10 and isinstance(value, bytes):
                event["bytes"] = value
            elif number_ == 11 and isinstance(value, bytes):
                event["object"] = _struct(value)
            elif number_ == 12:
                event["rxInfo"].append(_texts(value, _RX_INFO))
            elif number_ == 13 and isinstance(value, bytes):
                event["txInfo"] = {"frequency": dict(_fields(value)).get(1)}
    except (_Torn, UnicodeDecodeError) as e:
        text = f"neither JSON nor protobuf: {e}; ChirpStack writes JSON with `json=true` in its MQTT integration"
        raise Reject(ReasonCode.ENVELOPE_INVALID, text) from None
    event["deviceInfo"].setdefault("devEui", dev_eui)
    return event


def topic(levels: Sequence[str]) -> bool:
    """Whether a topic is one of ChirpStack's: application/ID/device/EUI/event/WHAT."""
    return len(levels) >= 6 and levels[-2] == "event" and levels[-4] == "device" and levels[-6] == "application"


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of an event of ChirpStack."""
    value = event.value
    if isinstance(value, bytes):
        if not topic(event.levels):
            return None
        if event.levels[-1] != "up":
            return []
        value = from_protobuf(value, event.levels[-3])
        data = value.pop("bytes", b"")
        found = uplink({**value, "data": "AA=="} if data else value)
        if found is None:
            return []
        return [Uplink(found.device, data or found.payload, found.port, found.meta, LORAWAN)]
    if not isinstance(value, dict) or not is_event(value):
        return None
    found = uplink(value)
    return [] if found is None else [found]


FORMAT: Final = Format(
    "chirpstack", "ChirpStack v3 and v4", read, frozenset({"deviceInfo", "devEUI"}), topic, always=True
)
