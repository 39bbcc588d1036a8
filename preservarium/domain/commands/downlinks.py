"""Downlinks: from what a command says to the bytes that its device understands, in the envelope of its network server.

The encoder of a device type's codec runs in the sandbox, outside the domain; here are the two pure ends of its call.
JavaScript is the payload codec API of the LoRa Alliance (TS013): `encodeDownlink({data, fPort, variables})` returns
`{bytes, fPort, warnings, errors}`. Python is ours: `encode(fields, context)` returns bytes, a list of numbers, or
`{"bytes", "port"}`.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from uuid import UUID

import orjson

from preservarium.domain.commands.lines import PORT_MAX
from preservarium.domain.readings import json_text

#: Parser kind -> the function that encodes; a parser of another kind has none, and its fields go out as JSON.
ENCODERS: Final = {"javascript": "encodeDownlink", "python": "encode"}
#: A LoRaWAN payload has 242 bytes at most; a configuration over MQTT some thousand.
PAYLOAD_BYTES_MAX: Final = 65_536
#: Before our id in The Things Stack's correlation ids, to tell it from theirs.
CORRELATION: Final = "preservarium:downlink:"


class DownlinkError(ValueError):
    """The downlink cannot be made; the message says why, for people."""


@dataclass(frozen=True, slots=True)
class Payload:
    """What the device is to get."""

    data: bytes
    port: int | None


def plain_payload(content: Mapping[str, Any]) -> Payload:
    """The payload of a content that needs no encoder; `fields` become JSON.

    Raises:
        DownlinkError: it cannot be sent.
    """
    port = content.get("port")
    if "payload_b64" in content:
        try:
            return _sized(Payload(binascii.a2b_base64(content["payload_b64"], strict_mode=True), port))
        except ValueError as e:
            _refuse(f"payload_b64 is not base64: {e}")
    value = content.get("payload", content.get("fields"))
    return _sized(Payload(value.encode() if isinstance(value, str) else orjson.dumps(value), port))


def encoder_arguments(kind: str, device_id: str, content: Mapping[str, Any], variables: Mapping[str, Any]) -> str:
    """Arguments of the encoder as JSON text.

    Args:
        kind: of the parser.
        device_id: the address.
        content: of the command; its `fields` are encoded.
        variables: of the device.
    """
    given: dict[str, Any]
    if kind == "javascript":
        given = {"data": content["fields"], "variables": variables}
        if "port" in content:
            given["fPort"] = content["port"]
    else:
        context = {"port": content.get("port"), "device": device_id, "variables": variables}
        given = {"payload": content["fields"], "context": context}
    return orjson.dumps(given).decode()


def encoded(text: str, content: Mapping[str, Any]) -> Payload:
    """The payload that an encoder returned as JSON text; the command's port wins over the encoder's.

    Raises:
        DownlinkError: the encoder reports errors, or returned no bytes.
    """
    try:
        result = json_text.loads(text.encode())
    except (orjson.JSONDecodeError, UnicodeEncodeError) as e:
        message = f"what the codec returned cannot be read: {e}"
        raise DownlinkError(message) from None
    port = content.get("port")
    data = result
    if isinstance(result, dict):
        errors = result.get("errors")
        if errors:
            told = "; ".join(str(e) for e in errors[:5]) if isinstance(errors, list) else str(errors)
            _refuse(f"the codec reports: {told[:400]}")
        data = result.get("bytes")
        own = result.get("fPort", result.get("port"))
        if port is None and own is not None:
            port = int(own) if isinstance(own, float) and own.is_integer() else own
            if type(port) is not int or not 1 <= port <= PORT_MAX:
                _refuse(f"the codec's port is {own!r:.40}")
    if not isinstance(data, list):
        message = f"the codec returned {json_text.kind_of(data)} for bytes"
        raise DownlinkError(message)
    values = [int(b) if isinstance(b, float) and b.is_integer() else b for b in data]
    if not all(type(b) is int and 0 <= b <= 255 for b in values):
        _refuse("the codec returned what is no byte, 0 to 255")
    return _sized(Payload(bytes(values), port))


def envelope(downlink: Mapping[str, Any], payload: Payload) -> bytes:
    """The MQTT payload: the bytes themselves, or the network server's JSON.

    - `chirpstack`: command `down` of ChirpStack v4's MQTT integration, with our id, so that its events name it.
    - `http`: what waits in the mailbox until the device fetches it (connectors/mailbox.py).
    - `things_stack`: `down/push` of The Things Stack v3, with our id among the correlation ids.

    Raises:
        DownlinkError: the network server needs a port.
    """
    shape = downlink["format"]
    if shape == "plain":
        return payload.data
    if shape == "http":
        return orjson.dumps(
            {
                "id": downlink["downlink_id"],
                "command_id": downlink["command_id"],
                "attempt": downlink["attempt"],
                "port": payload.port,
                "payload_b64": base64.b64encode(payload.data).decode(),
                "expires_at": downlink["expires_at"],
            }
        )
    if payload.port is None:
        _refuse("neither the command, nor its type, nor the codec names a port")
    data = base64.b64encode(payload.data).decode()
    if shape == "chirpstack":
        return orjson.dumps(
            {
                "id": str(UUID(downlink["downlink_id"])),
                "devEui": downlink["device_id"],
                "confirmed": downlink["confirmed"],
                "fPort": payload.port,
                "data": data,
            }
        )
    message = {
        "f_port": payload.port,
        "frm_payload": data,
        "confirmed": downlink["confirmed"],
        "priority": "NORMAL",
        "correlation_ids": [CORRELATION + downlink["downlink_id"]],
    }
    return orjson.dumps({"downlinks": [message]})


# --- what network servers say of downlinks ---------------------------------------------------------------------------

#: The Things Stack's event -> report.
_THINGS_STACK: Final = {
    "downlink_sent": "transmitted",
    "downlink_ack": "acknowledged",
    "downlink_nack": "not_acknowledged",
    "downlink_failed": "failed",
}


def server_report(event: Any) -> dict[str, Any] | None:
    """A line of `device_commands` for an event of ChirpStack v4 or The Things Stack v3; None where it reports no downlink.

    ChirpStack's `txack` and `ack` name the queue item, whose id is our downlink's; The Things Stack's `down/…` carry our
    correlation id. Of downlinks that are not ours the line is without effect.
    """
    if not isinstance(event, dict):
        return None
    info, ids = event.get("deviceInfo"), event.get("end_device_ids")
    if isinstance(info, dict) and isinstance(info.get("devEui"), str) and "queueItemId" in event:
        word = "transmitted"
        if "downlinkId" not in event:
            word = "acknowledged" if event.get("acknowledged") else "not_acknowledged"
        try:
            downlink = UUID(str(event["queueItemId"])).hex
        except ValueError:
            return None
        return _report(info["devEui"], downlink, word, "")
    device_id = (ids.get("dev_eui") or ids.get("device_id")) if isinstance(ids, dict) else None
    if isinstance(device_id, str):
        for name, word in _THINGS_STACK.items():
            if isinstance(event.get(name), dict):
                inner = event[name]
                failed = inner.get("downlink") if isinstance(inner.get("downlink"), dict) else {}
                lists = [event.get("correlation_ids"), inner.get("correlation_ids"), failed.get("correlation_ids")]
                ours = [c for found in lists if isinstance(found, list) for c in found if _is_ours(c)]
                if not ours:
                    return None
                error = inner.get("error")
                reason = error.get("message_format", "") if isinstance(error, dict) else ""
                return _report(device_id, ours[0].removeprefix(CORRELATION), word, reason)
    return None


def _is_ours(correlation: Any) -> bool:
    return isinstance(correlation, str) and correlation.startswith(CORRELATION)


def _report(device_id: str, downlink: str, word: str, reason: Any) -> dict[str, Any]:
    line = {"kind": "report", "device_id": device_id, "downlink_id": downlink, "report": word, "actor": "network"}
    return {**line, "reason": str(reason)} if reason else line


def _sized(payload: Payload) -> Payload:
    if len(payload.data) > PAYLOAD_BYTES_MAX:
        _refuse(f"a payload of {len(payload.data)} bytes; it may have {PAYLOAD_BYTES_MAX}")
    return payload


def _refuse(text: str) -> NoReturn:
    raise DownlinkError(text)
