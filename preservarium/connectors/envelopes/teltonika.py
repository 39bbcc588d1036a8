"""Teltonika trackers that publish JSON over MQTT (`IMEI/data`). Source: Teltonika, "AWS IoT Core Configuration".

`state.reported` holds AVL ids and their values, `ts` in milliseconds and `latlng`; it becomes one object with `latitude` and `longitude`. The binary
codecs (8, 8 Extended) need a TCP server and are not read.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import (
    Event,
    Format,
    Uplink,
    inner,
    instant,
    number,
    put,
    required_device,
    scalar,
)

_IMEI: Final = re.compile(r"\d{15}")


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a tracker."""
    reported = inner(inner(event.value, "state"), "reported")
    if not reported or not ("latlng" in reported or (event.forced and "ts" in reported)):
        return None
    imei = next((level for level in event.levels if _IMEI.fullmatch(level)), None)
    device = required_device(event.device or imei, "the topic names no IMEI")
    payload = {k: scalar(v) for k, v in reported.items() if k not in ("ts", "latlng")}
    latitude, comma, longitude = str(reported.get("latlng", "")).partition(",")
    here = number(latitude.strip()), number(longitude.strip())
    # 0,0 is what it says without a fix.
    if comma and here[0] is not None and here[1] is not None and here != (0, 0):
        payload["latitude"], payload["longitude"] = here
    meta: dict[str, Any] = {"network": "teltonika"}
    put(meta, "time", instant(reported.get("ts"), "ms"))
    return [Uplink(device, payload, None, meta, by_topic=True)] if payload else []


FORMAT: Final = Format("teltonika", "Teltonika trackers", read, frozenset({"state"}))
