"""Kerlink Wanesy: uplinks as its push configuration and its API write them. Source: Wanesy Management Center, "DataUp".

`encodingType` says what the payload is written in. Downlink events have no `fCntUp` and are events of the network.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from preservarium.connectors.envelopes.base import Event, Format, Table, Uplink, from_base64, from_hex, inner, paths

TABLE: Final = Table(
    "kerlink",
    device=paths("endDevice.devEui"),
    payload=paths("payload"),
    encoding=from_hex,
    port=paths("fPort"),
    time=paths("recvTime"),
    time_unit="ms",
    f_cnt=paths("fCntUp"),
    frequency=paths("ulFrequency"),
    name=paths("endDevice.name"),
    application=paths("endDevice.cluster.name"),
    receptions=paths("gwInfo"),
    rssi=paths("rssi"),
    snr=paths("snr"),
    gateway=paths("gwEui"),
)
_BASE64: Final = replace(TABLE, encoding=from_base64)


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a push of Wanesy."""
    value = event.value
    if not isinstance(value, dict) or "devEui" not in inner(value, "endDevice"):
        return None
    if "fCntUp" not in value:
        return []
    encoding = value.get("encodingType")
    uplink = (_BASE64 if isinstance(encoding, str) and encoding.upper() == "BASE64" else TABLE).uplink(value)
    return [] if uplink is None else [uplink]


FORMAT: Final = Format("kerlink", "Kerlink Wanesy", read, frozenset({"endDevice"}))
