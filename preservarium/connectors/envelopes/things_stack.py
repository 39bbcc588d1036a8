"""Uplinks as LoRaWAN network servers publish them, by MQTT or web hook. Pure: no I/O, no clock.

| network server | recognised by | payload |
|---|---|---|
| The Things Stack v3 (TTN) | `end_device_ids` and `uplink_message` | `frm_payload`, base64 |
| ChirpStack v4 | `deviceInfo.devEui` | `data`, base64 |
| ChirpStack v3 | `devEUI` and `fPort` or `data` | `data`, base64; `devEUI` hexadecimal or, with the `json` marshaler, base64 |

Sources: The Things Stack, "Data Formats"; ChirpStack, `api/proto/integration/integration.proto` (v4) and
`as/integration/integration.proto` (v3). Both leave out empty fields.

What carries no payload of the device (joins, acknowledgements, states, locations, uplinks of MAC commands alone) is an event of the network
and no message: nothing is stored of it, and it is no fault.

What they say about the radio goes into `meta`: `network`, `time` (µs: when the network received it), `rssi` (dBm) and
`snr` (dB) of the gateway that heard it best, `gateway`, `gateways` (how many heard it), `f_cnt`, `dr` or `sf`,
`frequency` (Hz), `name` and `application`.
"""

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from preservarium.domain.readings.address import same_address
from preservarium.domain.readings.instant import required_instant_us
from preservarium.errors import ReasonCode, Reject

LORAWAN: Final = "LoRaWAN"
#: Gateways looked at for the best signal; a message heard by more is a network server's mistake.
GATEWAYS_MAX: Final = 1_000
#: An event of a network server that is no uplink: nothing to store, and no fault.
NOT_UPLINK: Final = "not_uplink"
#: EUI-64 is 8 bytes.
_EUI_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Uplink:
    """One device message out of a network server's envelope."""

    device: str  #: DevEUI as sent, in whatever spelling; the network's device name where it sends no EUI
    payload: bytes
    port: int | None
    meta: dict[str, Any]
    mode: str = LORAWAN


def is_network_event(value: Any) -> bool:
    """Whether a parsed JSON value is an event that a network server publishes, with or without a payload.

    What a network server has decoded itself is left to the parsers, where it is all that there is.
    """
    if not isinstance(value, dict):
        return False
    message, info = value.get("uplink_message"), value.get("deviceInfo")
    if isinstance(value.get("end_device_ids"), dict):
        return not (isinstance(message, dict) and message.get("decoded_payload") and not message.get("frm_payload"))
    if value.get("object") and not value.get("data"):
        return False
    if isinstance(info, dict):
        return isinstance(info.get("devEui"), str)
    return "devEUI" in value and "applicationID" in value


def uplink_of(value: Any) -> Uplink | None:
    """The uplink in a parsed JSON value; None where it is no network server's uplink, or one without a payload.

    Raises:
        Reject: it is one, and a field of it is broken.
    """
    if not isinstance(value, dict):
        return None
    if "end_device_ids" in value:
        return ttn(value)
    if "deviceInfo" in value or "devEUI" in value:
        return chirpstack(value)
    return None


def comes_by(topic: str, named: str, device: str, event: Mapping[str, Any]) -> bool:
    """Whether an event of `device` may come by an MQTT topic in which `named` stands for the device.

    Who may publish under the topic of one device must not speak for another by what it publishes there. The Things Stack's own topics,
    `v3/APPLICATION/devices/DEVICE/…`, name a device by the id that it has in its application; only that network server publishes there.
    """
    if same_address(named, device):
        return True
    levels, known_as = topic.split("/"), _inner(event, "end_device_ids").get("device_id")
    return any(
        level == "v3" and levels[i + 2 : i + 4] == ["devices", known_as] and known_as == named
        for i, level in enumerate(levels)
    )


def ttn(value: Mapping[str, Any]) -> Uplink | None:
    """The Things Stack's application uplink; None for one without a payload, and for its other events.

    Raises:
        Reject: a field is broken.
    """
    ids = value.get("end_device_ids")
    message = value.get("uplink_message")
    if not isinstance(ids, dict) or not isinstance(message, dict) or not message.get("frm_payload"):
        return None
    device = ids.get("dev_eui") or ids.get("device_id")
    if not isinstance(device, str):
        raise Reject(ReasonCode.ENVELOPE_NO_DEVICE, "end_device_ids has neither dev_eui nor device_id")
    heard = [
        (
            _number(rx, "rssi") or _number(rx, "channel_rssi"),
            _number(rx, "snr"),
            _inner(rx, "gateway_ids").get("gateway_id"),
        )
        for rx in _list(message, "rx_metadata")
    ]
    settings = _inner(message, "settings")
    lora = _inner(_inner(settings, "data_rate"), "lora")
    meta = _meta("ttn", heard)
    _put(meta, "time", _time(message.get("received_at") or value.get("received_at")))
    _put(meta, "f_cnt", _number(message, "f_cnt"))
    _put(meta, "sf", _number(lora, "spreading_factor"))
    _put(meta, "frequency", _frequency(settings.get("frequency")))
    _put(meta, "name", _word(ids.get("device_id")))
    _put(meta, "application", _word(_inner(ids, "application_ids").get("application_id")))
    return Uplink(device, _bytes(message, "frm_payload"), _port(message.get("f_port")), meta)


def chirpstack(value: Mapping[str, Any]) -> Uplink | None:
    """ChirpStack's uplink event, v4 or v3; None for one without a payload, and for its other events.

    Raises:
        Reject: a field is broken.
    """
    info = value.get("deviceInfo")
    if isinstance(info, dict):
        if not value.get("data"):
            return None
        device = info.get("devEui")
        name, application, data_rate = info.get("deviceName"), info.get("applicationName"), value.get("dr")
    elif "devEUI" in value:
        if not value.get("data"):
            return None
        device = _eui(value["devEUI"])
        name, application = value.get("deviceName"), value.get("applicationName")
        data_rate = value.get("dr", _inner(value, "txInfo").get("dr"))
    else:
        return None
    if not isinstance(device, str) or not device:
        raise Reject(ReasonCode.ENVELOPE_NO_DEVICE, "no devEui")
    receptions = _list(value, "rxInfo")
    heard = [
        (
            _number(rx, "rssi"),
            _number(rx, "snr") if "snr" in rx else _number(rx, "loRaSNR"),
            rx.get("gatewayId") or rx.get("gatewayID"),
        )
        for rx in receptions
    ]
    meta = _meta("chirpstack", heard)
    time = value.get("time") or next((rx["time"] for rx in receptions if rx.get("time")), None)
    _put(meta, "time", _time(time if time is not None else value.get("publishedAt")))
    _put(meta, "f_cnt", _number(value, "fCnt"))
    _put(meta, "dr", data_rate if type(data_rate) is int else None)
    _put(meta, "frequency", _frequency(_inner(value, "txInfo").get("frequency")))
    _put(meta, "name", _word(name))
    _put(meta, "application", _word(application))
    return Uplink(device, _bytes(value, "data"), _port(value.get("fPort")), meta)


def _meta(network: str, heard: Sequence[tuple[float | None, float | None, Any]]) -> dict[str, Any]:
    meta: dict[str, Any] = {"network": network}
    if not heard:
        return meta
    rssi, snr, gateway = max(heard, key=lambda h: h[0] if h[0] is not None else -1e9)
    _put(meta, "rssi", rssi)
    _put(meta, "snr", snr)
    _put(meta, "gateway", _word(gateway))
    meta["gateways"] = len(heard)
    return meta


def _put(meta: dict[str, Any], name: str, value: Any) -> None:
    if value is not None:
        meta[name] = value


def _inner(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    inner = value.get(name)
    return inner if isinstance(inner, dict) else {}


def _list(value: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    inner = value.get(name)
    return [item for item in inner[:GATEWAYS_MAX] if isinstance(item, dict)] if isinstance(inner, list) else []


def _number(value: Mapping[str, Any], name: str) -> float | None:
    number = value.get(name)
    return number if isinstance(number, int | float) and not isinstance(number, bool) else None


def _word(value: Any) -> str | None:
    return value[:255] if isinstance(value, str) and value else None


def _frequency(value: Any) -> int | None:
    # The Things Stack writes 64-bit numbers as text, as protobuf's JSON mapping says.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        return int(value)
    return value if type(value) is int else None


def _time(value: Any) -> int | None:
    if value is None:
        return None
    try:
        return required_instant_us(value)
    except Reject:
        return None  # a network server without a clock still delivers good payloads


def _port(value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int:
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"the port is no number: {value!r:.80}")
    return value


def _bytes(value: Mapping[str, Any], name: str) -> bytes:
    encoded = value.get(name)
    if not isinstance(encoded, str):
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not a string")
    try:
        return binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError as e:
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not base64: {e}") from None


def _eui(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    if len(value) == _EUI_BYTES * 2:
        return value
    try:
        decoded = binascii.a2b_base64(value, strict_mode=True)
    except ValueError:
        return value
    return decoded.hex() if len(decoded) == _EUI_BYTES else value
