"""OwnTracks: locations over MQTT and HTTP. Source: OwnTracks, "JSON".

`_type: location` is a message of the device USER/DEVICE of its topic `owntracks/USER/DEVICE`, which HTTP has in the body; `tst` is its time. `lwt` is `{"online": false}`.
Other types (cards, waypoints, transitions, commands) are nothing. What is encrypted is refused.
"""

from collections.abc import Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import (
    Event,
    Format,
    Uplink,
    instant,
    online,
    put,
    required_device,
    rooted,
    word,
)
from preservarium.errors import ReasonCode, Reject

ROOT: Final = "owntracks"


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of what OwnTracks publishes."""
    value = event.value
    if not isinstance(value, dict) or not isinstance(value.get("_type"), str):
        return [] if ROOT in event.levels or event.forced else None
    levels = event.levels or tuple((word(value.get("topic")) or "").split("/"))
    start = levels.index(ROOT) + 1 if ROOT in levels else event.base
    device: Any = event.device or "/".join(levels[start : start + 2])
    kind = value["_type"]
    if kind == "encrypted":
        raise Reject(
            ReasonCode.ENVELOPE_INVALID, "the message is encrypted: switch off payload encryption in OwnTracks"
        )
    if kind == "lwt":
        return online(event, required_device(device, "no topic owntracks/USER/DEVICE"), is_online=False)
    if kind != "location":
        return []
    meta: dict[str, Any] = {"network": "owntracks"}
    put(meta, "time", instant(value.get("tst"), "s"))
    payload = {k: v for k, v in value.items() if k not in ("_type", "topic", "tst", "created_at")}
    return [Uplink(required_device(device, "no topic owntracks/USER/DEVICE"), payload, None, meta, by_topic=True)]


FORMAT: Final = Format("owntracks", "OwnTracks", read, frozenset({"_type"}), rooted(ROOT))
