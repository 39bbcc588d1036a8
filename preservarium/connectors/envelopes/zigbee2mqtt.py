"""Zigbee2MQTT. Source: Zigbee2MQTT, "MQTT topics and messages".

| topic | what it becomes |
|---|---|
| `zigbee2mqtt/NAME` | the object that it is; a friendly name may have slashes |
| `zigbee2mqtt/NAME/ATTRIBUTE` (`output: attribute`) | `{"ATTRIBUTE": value}` |
| `zigbee2mqtt/NAME/availability` | `{"online": true}` or false |
| `zigbee2mqtt/bridge/…`, `…/set`, `…/get` | nothing |

`last_seen` is no time of the message: a state that was set from here is published with that of the last message of the device.
"""

from collections.abc import Sequence
from typing import Final

from preservarium.connectors.envelopes.base import Event, Format, Uplink, below, online, rooted, scalar, text_of

ROOT: Final = "zigbee2mqtt"
_ASKED: Final = frozenset({"set", "get"})


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a topic of Zigbee2MQTT."""
    rest = below(event, ROOT)
    if not rest:
        return None
    value = event.value
    if rest[0] == "bridge" or not _ASKED.isdisjoint(rest[1:]):
        return []
    name = "/".join(rest)
    if rest[-1] == "availability" and len(rest) > 1:
        state = value.get("state") if isinstance(value, dict) else text_of(value)
        return online(event, "/".join(rest[:-1]), state == "online")
    if isinstance(value, dict):
        return [Uplink(event.device or name, value, by_topic=True)] if value else []
    found = scalar(value)
    if found is None or len(rest) < 2:
        return []
    return [Uplink(event.device or "/".join(rest[:-1]), {rest[-1]: found}, by_topic=True)]


FORMAT: Final = Format("zigbee2mqtt", "Zigbee2MQTT", read, topic=rooted(ROOT))
