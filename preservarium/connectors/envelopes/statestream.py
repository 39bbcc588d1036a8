"""Home Assistant's MQTT Statestream: `homeassistant/DOMAIN/OBJECT/ATTRIBUTE`. Source: Home Assistant, "MQTT Statestream".

The device is the entity, `sensor.kitchen`; a value becomes `{"state": 21.4}` or `{"ATTRIBUTE": value}`. A state `unavailable` is `{"online": false}`.
What describes the entity (its name, its unit, its class, when it changed) and discovery (`…/config`) is nothing. Attributes are JSON: text stands in quotes.
"""

from collections.abc import Sequence
from typing import Final

import orjson

from preservarium.connectors.envelopes.base import Event, Format, Uplink, below, online, rooted, scalar, text_of

ROOT: Final = "homeassistant"
_DESCRIPTIONS: Final = frozenset({
    "attribution", "config", "device_class", "entity_picture", "friendly_name", "icon", "last_changed", "last_updated",
    "options", "restored", "state_class", "supported_features", "unit_of_measurement",
})  # fmt: skip


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a topic of Statestream."""
    rest = below(event, ROOT)
    if not rest:
        return None
    if len(rest) != 3 or not all(rest) or rest[2] in _DESCRIPTIONS:
        return []
    entity, attribute = f"{rest[0]}.{rest[1]}", rest[2]
    value = event.value
    text = text_of(value)
    if attribute == "state" and text in ("unavailable", "unknown"):
        return online(event, entity, is_online=False) if text == "unavailable" else []
    if text[:1] == '"':
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError:
            value = text
    found = scalar(value)
    if found is None or text == "null":
        return []
    return [Uplink(event.device or entity, {attribute: found}, by_topic=True)]


FORMAT: Final = Format("statestream", "Home Assistant Statestream", read, topic=rooted(ROOT))
