"""Ruuvi Gateway, over MQTT (`ruuvi/GATEWAY/TAG`) and HTTP. Source: Ruuvi, "GW Data formats".

The payload is what the tag says for Ruuvi (company 0x0499) in its advertisement, from the byte of the data format on; where there is nothing of that
kind, the whole advertisement. Fields that the gateway has decoded itself are for parsers of kind `network`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import (
    DECODED,
    Event,
    Format,
    Uplink,
    from_hex,
    heard,
    inner,
    instant,
    limited,
    number,
    put,
    required_device,
)
from preservarium.errors import ReasonCode, Reject

#: Type of an advertisement's part for a manufacturer, and Ruuvi's company number, little-endian.
_MANUFACTURER: Final = 0xFF
_COMPANY: Final = b"\x99\x04"
#: Not measured: what the gateway says of itself and of the way.
_AROUND: Final = frozenset({
    "gw_mac", "rssi", "aoa", "gwts", "ts", "timestamp", "data", "coords", "coordinates", "id", "name", "dataFormat",
    "ble_phy", "ble_chan", "ble_tx_power", "nonce",
})  # fmt: skip


def said(advertisement: bytes) -> bytes:
    """What an advertisement says for Ruuvi; all of it where there is nothing."""
    position = 0
    while position + 1 < len(advertisement):
        size = advertisement[position]
        part = advertisement[position + 1 : position + 1 + size]
        if part[:1] == bytes([_MANUFACTURER]) and part[1:3] == _COMPANY:
            return part[3:]
        if size == 0:
            break
        position += 1 + size
    return advertisement


def _message(device: str, gateway: Any, value: Mapping[str, Any], time: Any) -> Uplink | None:
    decoded = {k: v for k, v in value.items() if k not in _AROUND and isinstance(v, int | float | str)}
    data = value.get("data")
    if not data and not decoded:
        return None
    meta = heard("ruuvi", [(number(value.get("rssi")), None, gateway)])
    put(meta, "time", instant(time))
    if not data:
        return Uplink(device, decoded, None, meta)
    put(meta, DECODED, decoded or None)
    return Uplink(device, said(from_hex(data, "data")), None, meta)


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a Ruuvi Gateway."""
    value = event.value
    if not isinstance(value, dict):
        return None
    data = value.get("data")
    if isinstance(data, dict) and isinstance(data.get("tags"), dict) and "gw_mac" in data:
        return limited(_collected(data), "a post")
    if "gw_mac" not in value:
        return None
    if event.device is None and len(event.levels) < 2:
        raise Reject(
            ReasonCode.ENVELOPE_NO_DEVICE, "the tag is named by the topic ruuvi/GATEWAY/TAG, and there is none"
        )
    device = required_device(event.device or event.levels[-1], "the last level of the topic is empty")
    if device in ("gw_status", "gw_configuration"):
        return []
    one = _message(device, value["gw_mac"], value, value.get("ts") or value.get("gwts"))
    return [] if one is None else [Uplink(one.device, one.payload, None, one.meta, by_topic=True)]


def _collected(data: Mapping[str, Any]) -> Iterator[Uplink]:
    for tag, value in inner(data, "tags").items():
        if isinstance(value, dict):
            time = value.get("timestamp") or data.get("timestamp")
            found = _message(required_device(tag, "a tag without an address"), data.get("gw_mac"), value, time)
            if found is not None:
                yield found


FORMAT: Final = Format("ruuvi", "Ruuvi Gateway", read, frozenset({"gw_mac", "data"}))
