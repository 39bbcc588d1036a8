"""Milesight: gateways with a network server of their own, and the Development Platform's web hook.

The gateways write what ChirpStack v3 writes, with `mac` for the gateway (chirpstack.py reads it, `fPort` in text too). Source of the other: Milesight Development
Platform, "Webhook", event `DEVICE_DATA`: the platform has decoded the payload.
"""

from collections.abc import Sequence
from typing import Final

from preservarium.connectors.envelopes import chirpstack
from preservarium.connectors.envelopes.base import (
    LORAWAN,
    Event,
    Format,
    Uplink,
    document,
    inner,
    instant,
    put,
    required_device,
    word,
)


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of an event of Milesight."""
    value = event.value
    if not isinstance(value, dict):
        return None
    data = inner(value, "data")
    if not isinstance(value.get("eventType"), str) or not data:
        return chirpstack.read(event) if event.forced else None
    profile = inner(data, "deviceProfile")
    if value["eventType"] != "DEVICE_DATA" or not profile:
        return [] if profile or event.forced else None
    payload = document(data.get("payload"))
    if payload is None or data.get("type") not in (None, "PROPERTY"):
        return []
    meta: dict[str, object] = {"network": "milesight"}
    put(meta, "time", instant(data.get("ts") or value.get("eventCreatedTime")))
    put(meta, "name", word(profile.get("name")))
    device = required_device(profile.get("devEUI") or profile.get("sn"), "deviceProfile has neither devEUI nor sn")
    return [Uplink(device, payload, None, meta, LORAWAN)]


FORMAT: Final = Format("milesight", "Milesight gateways and Development Platform", read, frozenset({"eventType"}))
