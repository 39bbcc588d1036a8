"""Shelly: Gen1 devices, a topic a value, and Gen2 and later, notifications of RPC. Source: Shelly, "Gen1 MQTT", "Gen2 MQTT" and "Notifications".

| topic | what it becomes |
|---|---|
| `shellies/ID/relay/0/power` | `{"relay": [{"power": 12.3}]}`: a number in the topic is a pin |
| `shellies/ID/online`, `ID/online` | `{"online": true}` or false |
| `ID/events/rpc`: `NotifyStatus`, `NotifyFullStatus` | `{"switch": [{"apower": 12.3, …}]}` of `switch:0`; `ts` is its time |
| `ID/events/rpc`: `NotifyEvent` | `{"input": [{"event": "single_push"}]}` |
| `ID/status/switch:0` | as in `NotifyStatus` |
| `…/command`, `announce`, `info`, `ID/rpc`, `ID/debug/log` | nothing |
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import (
    PINS_MAX,
    Event,
    Format,
    Uplink,
    instant,
    nested,
    objects,
    online,
    put,
    required_device,
    scalar,
    text_of,
)

ROOT: Final = "shellies"
#: What says nothing that is measured.
_SILENT: Final = frozenset({"announce", "command", "info", "rpc", "debug", "settings"})
#: Components that are the device's housekeeping.
_HOUSEKEEPING: Final = frozenset(
    {"sys", "cloud", "mqtt", "ws", "ble", "bthome", "ui", "knx", "matter", "script", "schedule", "wd"}
)
_NOTIFICATIONS: Final = frozenset({"NotifyStatus", "NotifyFullStatus", "NotifyEvent"})


def _component(name: str, value: Any, payload: dict[str, Any]) -> None:
    """Add `switch:0` and its values to a payload: the number is a pin."""
    kind, colon, number = name.partition(":")
    if kind in _HOUSEKEEPING or not isinstance(value, dict):
        return
    value = {k: v for k, v in value.items() if k != "id"}
    if not value:
        return
    if not colon or not number.isascii() or not number.isdigit() or int(number) >= PINS_MAX:
        payload[name] = value
        return
    channels = payload.setdefault(kind, [])
    if isinstance(channels, list):
        channels += [None] * (int(number) + 1 - len(channels))
        channels[int(number)] = value


def _notification(event: Event, value: Mapping[str, Any]) -> list[Uplink]:
    params = value.get("params")
    if not isinstance(params, dict):
        return []
    payload: dict[str, Any] = {}
    if value["method"] == "NotifyEvent":
        for one in objects(params, "events"):
            if isinstance(one.get("component"), str) and isinstance(one.get("event"), str):
                _component(one["component"], {"event": one["event"]}, payload)
    else:
        for name, found in params.items():
            _component(name, found, payload)
    if not payload:
        return []
    meta: dict[str, Any] = {"network": "shelly"}
    put(meta, "time", instant(params.get("ts"), "s"))
    return [Uplink(required_device(value.get("src"), "no src"), payload, None, meta)]


def is_notification(value: Any) -> bool:
    """Whether an object is a notification of a Gen2 device."""
    if not isinstance(value, dict) or "src" not in value or "params" not in value:
        return False
    method = value.get("method")
    return isinstance(method, str) and method in _NOTIFICATIONS


def topic(levels: Sequence[str]) -> bool:
    """Whether a topic is one of a Shelly's."""
    return len(levels) >= 2 and (levels[0] == ROOT or levels[0].lower().startswith("shelly"))


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a Shelly."""
    value = event.value
    if is_notification(value):
        return _notification(event, value)
    levels = event.levels[event.base if event.forced and event.levels[:1] != (ROOT,) else 0 :]
    if not (topic(levels) or (event.forced and len(levels) >= 2)):
        return None
    if levels[0] != ROOT:
        device, rest = levels[0], levels[1:]
        if rest == ("online",):
            return online(event, device, text_of(value).lower() == "true")
        payload: dict[str, Any] = {}
        if len(rest) == 2 and rest[0] == "status":
            _component(rest[1], value, payload)
        return [Uplink(event.device or device, payload, by_topic=True)] if payload else []
    if len(levels) < 3 or not _SILENT.isdisjoint(levels[2:]):
        return []
    device, rest = levels[1], levels[2:]
    if rest == ("online",):
        return online(event, device, text_of(value).lower() == "true")
    found = scalar(value)
    if found is None or rest[0].isdigit() or not all(rest):
        return []
    return [Uplink(event.device or device, nested(rest, found), by_topic=True)]


FORMAT: Final = Format("shelly", "Shelly Gen1 and Gen2", read, frozenset({"method"}), topic)
