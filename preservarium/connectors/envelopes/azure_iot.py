"""Azure IoT Hub and IoT Central: device messages as Event Grid, message routing and data export write them.

Sources: Azure, "React to IoT Hub events by using Event Grid", "IoT Hub message routing", "IoT Central: Export data". A body is JSON, or base64 of what the device
sent. Device events without telemetry (created, connected, …) are events of the network. To let Event Grid in, the web hook answers its
validation with the code that it sends (http.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from preservarium.connectors.envelopes.base import (
    Event,
    Format,
    Uplink,
    from_base64,
    inner,
    instant,
    put,
    required_device,
    word,
)
from preservarium.errors import Reject

TELEMETRY: Final = "Microsoft.Devices.DeviceTelemetry"
_EVENTS: Final = "Microsoft.Devices."
#: The event that asks whether the web hook wants to be one.
VALIDATION: Final = "Microsoft.EventGrid.SubscriptionValidationEvent"


def validation_code(value: Any) -> str | None:
    """The code that Event Grid wants to hear back; None where it asks for none."""
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(one, dict) and one.get("eventType") == VALIDATION:
        return word(inner(one, "data").get("validationCode"))
    return None


def read(event: Event) -> Sequence[Uplink] | None:
    """The messages of an event of Azure IoT."""
    value = event.value
    if not isinstance(value, dict):
        return None
    kind = value.get("eventType") or value.get("type")
    if isinstance(kind, str) and kind.startswith(_EVENTS) and isinstance(value.get("data"), dict):
        if kind != TELEMETRY:
            return []
        data = value["data"]
        system = inner(data, "systemProperties")
        time = system.get("iothub-enqueuedtime") or value.get("eventTime") or value.get("time")
        device = system.get("iothub-connection-device-id") or _of_subject(value.get("subject"))
        return _message(device, time, data.get("body"), inner(data, "properties"))
    if kind == VALIDATION:
        return []
    system = inner(value, "SystemProperties")
    if system and "Body" in value:
        device = system.get("connectionDeviceId") or system.get("iothub-connection-device-id")
        time = system.get("enqueuedTime") or value.get("EnqueuedTimeUtc")
        return _message(device, time, value["Body"], inner(value, "Properties"))
    if isinstance(value.get("messageSource"), str) and "deviceId" in value:
        if value["messageSource"] != "telemetry":
            return []
        return _message(value["deviceId"], value.get("enqueuedTime"), value.get("telemetry"), {})
    return None


def _message(device: Any, time: Any, body: Any, properties: Mapping[str, Any]) -> list[Uplink]:
    if body in (None, "", {}):
        return []
    meta: dict[str, Any] = {"network": "azure_iot"}
    # A device that says when it measured says it in a property of its message.
    put(meta, "time", instant(properties.get("iothub-creation-time-utc") or time))
    if isinstance(body, str):
        try:
            body = from_base64(body, "body")
        except Reject:
            body = body.encode()
    return [Uplink(required_device(device, "no connection-device-id"), body, None, meta)]


def _of_subject(subject: Any) -> str | None:
    return word(subject.removeprefix("devices/").partition("/")[0]) if isinstance(subject, str) else None


FORMAT: Final = Format(
    "azure_iot",
    "Azure IoT Hub and IoT Central",
    read,
    frozenset({"eventType", "specversion", "SystemProperties", "messageSource"}),
)
