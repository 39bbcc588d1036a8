"""Sensor.Community (airRohr): posts of the firmware to an API of one's own. Source: opendata-stuttgart, "APIs".

The device is `esp8266-ID` or `esp32-ID`, as Sensor.Community itself calls it; values are named by their `value_type` (`SDS_P1`, `BME280_temperature`).
"""

from collections.abc import Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import Event, Format, Uplink, name_of, objects, required_device, scalar

_CHIPS: Final = ("esp8266", "esp32", "raspi")


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a post of airRohr."""
    value = event.value
    if not isinstance(value, dict) or not isinstance(value.get("sensordatavalues"), list):
        return None
    device = next((f"{chip}-{found}" for chip in _CHIPS if (found := name_of(value.get(f"{chip}id")))), None)
    named = name_of(value.get("sensor")) or name_of(value.get("id"))
    payload: dict[str, Any] = {}
    for one in objects(value, "sensordatavalues"):
        found = scalar(one.get("value"))
        if isinstance(one.get("value_type"), str) and found is not None and not isinstance(found, dict | list):
            payload[one["value_type"]] = found
    return [Uplink(required_device(device or named, "neither esp8266id nor esp32id"), payload)] if payload else []


FORMAT: Final = Format("sensor_community", "Sensor.Community", read, frozenset({"sensordatavalues"}))
