"""Tasmota: telemetry, state and last will. Source: Tasmota, "MQTT".

| topic | what it becomes |
|---|---|
| `tele/X/SENSOR`, `tele/X/STATE` | the object that it is |
| `tele/X/LWT` | `{"online": true}` or false |
| `stat/X/POWER1` | `{"POWER1": "ON"}` |
| `stat/X/STATUS8`, `STATUS10` | the sensors in it |
| `cmnd/…`, other `stat/…`, `INFO1` to `INFO3` | nothing: they repeat it, or ask |

`X` may have slashes, and may stand first (`X/tele/SENSOR`). `Time` is local and without its offset: the parser says `time: Time` and
`time_zone`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import Event, Format, Uplink, inner, online, scalar, text_of

_PREFIXES: Final = frozenset({"tele", "stat", "cmnd"})
_SENSORS: Final = frozenset({"SENSOR", "STATE"})
_POWER: Final = re.compile(r"POWER\d{0,2}")
_WORD: Final = re.compile(r"[A-Z][A-Z0-9_]*")


def split(levels: Sequence[str]) -> tuple[str, str, str] | None:
    """(prefix, device, last level) of a topic of Tasmota; None where it is none."""
    if len(levels) < 3 or _WORD.fullmatch(levels[-1]) is None:
        return None
    if levels[0] in _PREFIXES:
        return levels[0], "/".join(levels[1:-1]), levels[-1]
    if levels[-2] in _PREFIXES:
        return levels[-2], "/".join(levels[:-2]), levels[-1]
    return None


def _split(event: Event) -> tuple[str, str, str] | None:
    # A prefix of one's own (`%prefix%` in a longer FullTopic) stands somewhere in the middle.
    for start in range(event.base if event.forced else 0, -1, -1):
        if (found := split(event.levels[start:])) is not None:
            return found
    return None


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a topic of Tasmota."""
    found = _split(event)
    if found is None:
        return None
    prefix, device, last = found
    value = event.value
    if prefix == "tele" and last == "LWT":
        return online(event, device, text_of(value).lower() == "online")
    payload: Mapping[str, Any] | None = None
    if prefix == "tele" and last in _SENSORS and isinstance(value, dict):
        payload = value
    elif prefix == "stat" and last in ("STATUS8", "STATUS10"):
        payload = inner(value, "StatusSNS")
    elif prefix == "stat" and _POWER.fullmatch(last) and not isinstance(value, dict | list):
        payload = {last: state} if (state := scalar(value)) is not None else None
    return [Uplink(event.device or device, payload, by_topic=True)] if payload else []


FORMAT: Final = Format("tasmota", "Tasmota", read, topic=lambda levels: split(levels) is not None)
