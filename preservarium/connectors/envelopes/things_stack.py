"""The Things Stack v3 (The Things Network): application messages as its web hooks, its MQTT server and its storage write them.

Source: The Things Stack, "Data Formats". It leaves out empty fields. An uplink is recognised by `end_device_ids` and `uplink_message`;
all other messages (joins, acknowledgements, locations, MAC commands alone) are events of the network. The storage integration
puts `{"result": …}` around each, the event stream `{"name": "as.up…", "data": …}`.

`decoded_payload`, else `normalized_payload`, is what the codec in the network made of the payload.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import (
    DECODED,
    LORAWAN,
    Event,
    Format,
    Uplink,
    document,
    from_base64,
    heard,
    hertz,
    inner,
    instant,
    number,
    objects,
    put,
    word,
)
from preservarium.errors import ReasonCode, Reject


def unwrapped(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The application message in an object; None where there is none."""
    for found in (value, value.get("result"), value.get("data")):
        if isinstance(found, dict) and isinstance(found.get("end_device_ids"), dict):
            return found
    return None


def uplink(value: Mapping[str, Any]) -> Uplink | None:
    """The application uplink; None for one without a payload, and for other events.

    Raises:
        Reject: a field is broken.
    """
    ids = inner(value, "end_device_ids")
    message = inner(value, "uplink_message")
    decoded = document(message.get("decoded_payload")) or _normalized(message.get("normalized_payload"))
    if not message.get("frm_payload") and decoded is None:
        return None
    device = ids.get("dev_eui") or ids.get("device_id")
    if not isinstance(device, str):
        raise Reject(ReasonCode.ENVELOPE_NO_DEVICE, "end_device_ids has neither dev_eui nor device_id")
    settings = inner(message, "settings")
    meta = heard(
        "ttn",
        [
            (
                number(rx.get("rssi")) or number(rx.get("channel_rssi")),
                number(rx.get("snr")),
                inner(rx, "gateway_ids").get("gateway_id"),
            )
            for rx in objects(message, "rx_metadata")
        ],
    )
    put(meta, "time", instant(message.get("received_at") or value.get("received_at")))
    put(meta, "f_cnt", number(message.get("f_cnt")))
    put(meta, "sf", number(inner(inner(settings, "data_rate"), "lora").get("spreading_factor")))
    put(meta, "frequency", hertz(settings.get("frequency")))
    put(meta, "name", word(ids.get("device_id")))
    put(meta, "application", word(inner(ids, "application_ids").get("application_id")))
    port = _port(message.get("f_port"))
    if not message.get("frm_payload"):
        return Uplink(device, decoded, port, meta, LORAWAN)
    put(meta, DECODED, decoded)
    return Uplink(device, from_base64(message["frm_payload"], "frm_payload"), port, meta, LORAWAN)


def _normalized(value: Any) -> dict[str, Any] | None:
    # A list of measurements, each with a time of its own; the parser reads them one by one.
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        return {"normalized": [one for one in value if isinstance(one, dict)]}
    return document(value)


def _port(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"the port is no number: {value!r:.80}")
    return value


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of an event of The Things Stack."""
    value = unwrapped(event.value) if isinstance(event.value, dict) else None
    if value is None:
        return None
    found = uplink(value)
    return [] if found is None else [found]


FORMAT: Final = Format("ttn", "The Things Stack v3", read, frozenset({"end_device_ids", "result", "identifiers"}))
