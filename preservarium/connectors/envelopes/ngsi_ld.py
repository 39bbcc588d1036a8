"""NGSI-LD and NGSIv2: notifications of a context broker, and entities. Sources: ETSI GS CIM 009, FIWARE NGSIv2.

Each entity is a device, called by its `id`; each property a field, normalized or key-values. Properties that were observed at one instant (`observedAt`;
`TimeInstant`, `dateObserved`) are one message of that time. Relationships, and what describes the entity, are left out; of a point there are
`latitude` and `longitude`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import Event, Format, Uplink, inner, instant, limited, put, required_device

_DESCRIPTIONS: Final = frozenset(
    {"id", "type", "@context", "scope", "createdAt", "modifiedAt", "TimeInstant", "dateObserved"}
)


def _is_entity(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("id"), str) and isinstance(value.get("type"), str)


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of a notification or an entity."""
    value = event.value
    if not isinstance(value, dict):
        return None
    data = value.get("data")
    if isinstance(data, list) and ("subscriptionId" in value or value.get("type") == "Notification"):
        return limited((one for entity in data if _is_entity(entity) for one in _entity(entity)), "a notification")
    if _is_entity(value) and (value["id"].startswith("urn:ngsi-ld:") or "@context" in value or event.forced):
        return limited(_entity(value), "an entity")
    return None


def _entity(entity: Mapping[str, Any]) -> Iterator[Uplink]:
    device = required_device(entity["id"], "an entity without id")
    common = instant(_plain(entity.get("TimeInstant")) or _plain(entity.get("dateObserved")))
    by_time: dict[int | None, dict[str, Any]] = {}
    for name, found in entity.items():
        if name in _DESCRIPTIONS:
            continue
        # Several values of one property, told apart by `datasetId`: pins.
        several = isinstance(found, list) and any(isinstance(one, dict) for one in found)
        values = [_value(one) for one in found] if several else [_value(found)]
        observed = found[0] if several else found
        at = common
        if isinstance(observed, dict):
            time = observed.get("observedAt") or inner(inner(observed, "metadata"), "TimeInstant").get("value")
            at = instant(time) if time is not None else common
        payload = by_time.setdefault(at, {})
        if values[0] is _POINT and (place := _point(observed)) is not None:
            payload["latitude"], payload["longitude"] = place
        elif any(v is not None for v in values):
            payload[name] = values if several else values[0]
    for at, payload in by_time.items():
        if payload:
            meta: dict[str, Any] = {"network": "ngsi_ld"}
            put(meta, "time", at)
            yield Uplink(device, payload, None, meta)


_POINT: Final = object()


def _value(attribute: Any) -> Any:
    """The value of an attribute; None for what is none."""
    if not isinstance(attribute, dict):
        return attribute
    if attribute.get("type") == "Relationship":
        return None
    if _point(attribute) is not None:
        return _POINT
    value = attribute.get("value")
    return None if attribute.get("type") in ("GeoProperty", "geo:json", "Polygon") else value


def _point(attribute: Any) -> tuple[float, float] | None:
    place = attribute if attribute.get("type") == "Point" else inner(attribute, "value")
    at = place.get("coordinates")
    if (
        place.get("type") == "Point"
        and isinstance(at, list)
        and len(at) >= 2
        and all(type(c) in (int, float) for c in at)
    ):
        return at[1], at[0]
    return None


def _plain(attribute: Any) -> Any:
    return attribute.get("value") if isinstance(attribute, dict) else attribute


FORMAT: Final = Format("ngsi_ld", "NGSI-LD and NGSIv2", read, frozenset({"subscriptionId", "@context", "id"}))
