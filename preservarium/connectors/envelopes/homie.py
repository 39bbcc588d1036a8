"""Homie 3, 4 and 5: `homie/DEVICE/NODE/PROPERTY`, and with 5 `homie/5/DEVICE/…`. Source: the Homie convention.

A value becomes `{"NODE": {"PROPERTY": value}}`, the device's `$state` `{"online": …}`; descriptions (`$…`) and `set` are nothing.
"""

from collections.abc import Sequence
from typing import Final

from preservarium.connectors.envelopes.base import Event, Format, Uplink, below, online, rooted, scalar, text_of

ROOT: Final = "homie"
#: States in which a device is there. While it says `init`, it has not said what it is.
_THERE: Final = frozenset({"ready", "sleeping", "alert"})
_GONE: Final = frozenset({"disconnected", "lost"})


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a topic of the Homie convention."""
    rest = below(event, ROOT)
    if not rest:
        return None
    if rest[0] == "5":
        rest = rest[1:]
    if len(rest) == 2 and rest[1] == "$state":
        state = text_of(event.value)
        return online(event, rest[0], state in _THERE) if state in _THERE or state in _GONE else []
    if len(rest) != 3 or any(level.startswith("$") or not level for level in rest):
        return []
    found = scalar(event.value)
    if found is None:
        return []
    return [Uplink(event.device or rest[0], {rest[1]: {rest[2]: found}}, by_topic=True)]


FORMAT: Final = Format("homie", "Homie", read, topic=rooted(ROOT))
