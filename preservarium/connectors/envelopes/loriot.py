"""LORIOT: messages of its application output. Source: LORIOT, "Application API", Uplink data message.

`rx` is sent at once, `gw` a moment later with all gateways; enable one of them in LORIOT: of both, the second is the first sent again
where they have one `ts`. Everything else (`tx`, `txd`, `join`, `geo`, …) is an event of the network. A payload that LORIOT has no key for comes
as `encdata`, and is refused.
"""

from collections.abc import Sequence
from typing import Final

from preservarium.connectors.envelopes.base import Event, Format, Table, Uplink, from_hex, paths
from preservarium.errors import ReasonCode, Reject

TABLE: Final = Table(
    "loriot",
    device=paths("EUI"),
    payload=paths("data"),
    encoding=from_hex,
    port=paths("port"),
    time=paths("ts"),
    time_unit="ms",
    f_cnt=paths("fcnt"),
    frequency=paths("freq"),
    decoded=paths("decoded.data", "decoded"),
    receptions=paths("gws"),
    rssi=paths("rssi"),
    snr=paths("snr"),
    gateway=paths("gweui"),
)


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of what LORIOT sends."""
    value = event.value
    if not isinstance(value, dict) or not isinstance(value.get("cmd"), str) or "EUI" not in value:
        return None
    if value["cmd"] not in ("rx", "gw"):
        return []
    if value.get("encdata") and not value.get("data"):
        raise Reject(ReasonCode.ENVELOPE_INVALID, "the payload is encrypted: LORIOT has no AppSKey of this device")
    uplink = TABLE.uplink(value)
    return [] if uplink is None else [uplink]


FORMAT: Final = Format("loriot", "LORIOT", read, frozenset({"cmd"}))
