"""ESPHome over MQTT: `PREFIX/COMPONENT/NAME/state`. Source: ESPHome, "MQTT Client Component".

The prefix is the device's name, and may have slashes. `PREFIX/status` is `{"online": …}`; commands and logs are nothing.
"""

from collections.abc import Sequence
from typing import Final

from preservarium.connectors.envelopes.base import Event, Format, Uplink, nested, online, scalar, text_of

COMPONENTS: Final = frozenset({
    "alarm_control_panel", "binary_sensor", "button", "climate", "cover", "date", "datetime", "event", "fan", "light", "lock",
    "number", "select", "sensor", "switch", "text", "text_sensor", "time", "update", "valve",
})  # fmt: skip
_WORDS: Final = ("online", "offline")


def _place(levels: Sequence[str]) -> int | None:
    """Where the component stands in the topic of a value; None where it is none."""
    if len(levels) >= 4 and levels[-1] == "state":
        for place in (len(levels) - 3, len(levels) - 4):
            if place > 0 and levels[place] in COMPONENTS:
                return place
    return None


def topic(levels: Sequence[str]) -> bool:
    """Whether a topic is one of ESPHome's."""
    return _place(levels) is not None or (len(levels) >= 2 and levels[-1] == "status")


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a topic of ESPHome."""
    levels = event.levels[event.base if event.forced else 0 :]
    if len(levels) >= 2 and levels[-1] == "status" and (word := text_of(event.value).lower()) in _WORDS:
        return online(event, "/".join(levels[:-1]), word == "online")
    place = _place(levels)
    if place is None:
        return [] if event.forced and len(levels) >= 2 else None
    found = scalar(event.value)
    if found is None:
        return []
    device = event.device or "/".join(levels[:place])
    return [Uplink(device, nested(levels[place + 1 : -1], found), by_topic=True)]


FORMAT: Final = Format("esphome", "ESPHome", read, topic=topic)
