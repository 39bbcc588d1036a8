"""Lines of `iot_raw_data`, which strangers may write: our envelope, and what is in none.

How a line of `iot_raw_data` is recognised (`parse_raw`):

1. The whole value is tried first, so that pretty-printed JSON over several lines is one message.
2. A JSON object with `device` and one of `payload`, `payload_b64` is our envelope. `device` may be null: then the
   record's key names the device. Where both name one, the envelope wins (a gateway packs many devices in a record).
3. Any other JSON object or array is foreign: the payload of the device that the key names.
4. Where the whole is no JSON, but any line is an object or an array, the record is text: each line stands for
   itself, and the bad ones become error lines.
5. What begins like JSON and is none is a torn line, not a payload.
6. Everything else is bytes: the payload of the device that the key names.
"""

import binascii
import re
from base64 import b64encode
from collections.abc import Mapping
from typing import Any, Final, cast

from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import required_instant_us
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, ErrorLine, RawMessage
from preservarium.errors import ReasonCode, Reject
from preservarium.streaming.records.error_lines import RECORD_BYTES_MAX, error_line
from preservarium.streaming.records.metadata import (
    DEVICE_CHARS_MAX,
    device_fault,
    device_of_key,
    find_control,
    generation_of,
    received_ms,
    seen_us,
)
from preservarium.streaming.records.strict_json import check_tree, is_utf8, loads, reject
from preservarium.streaming.stage import Record

#: Room for everything in a line but its payload: five names of at most 1 KiB, and `meta` (a gateway list is 1–8 KiB).
ENVELOPE_BYTES_MAX: Final = 65_536
#: Connector and mode are words of ours.
NAME_CHARS_MAX: Final = 64
#: MQTT allows 65,535 bytes; a topic longer than this is an attack, and the topic is stored with every series.
TOPIC_CHARS_MAX: Final = 1_024
#: LoRaWAN fPort is one byte (LoRaWAN L2 1.0.4, 4.3.2).
PORT_MAX: Final = 255
#: Connector of a record that somebody else wrote into the raw topic.
FOREIGN_CONNECTOR: Final = "kafka"
# `{"` cannot be chance: a payload of two given bytes. A lone `[` can, so more is asked of it in _looks_like_json.
_OBJECT_START: Final = re.compile(rb'\s*\{\s*["}]')
_ARRAY_START: Final = re.compile(rb'\s*\[\s*[\[{"\-0-9tfn\]]')
_BINARY: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_WHITESPACE: Final = b" \t\r\n"


def line_bytes_max(payload_bytes_max: int) -> int:
    """Largest line of `iot_raw_data` in bytes: a payload of `payload_bytes_max` as base64, and its envelope."""
    return (payload_bytes_max + 2) // 3 * 4 + ENVELOPE_BYTES_MAX


def raw_line(
    device: str,
    payload: Any,
    *,
    received_at: int,
    connector: str,
    mode: str,
    topic: str = "",
    port: int | None = None,
    meta: Mapping[str, Any] | None = None,
    experiment_id: str | None = None,
    payload_bytes_max: int | None = None,
) -> bytes:
    """A line of `iot_raw_data` as connectors produce it; `parse_raw` takes everything that this returns.

    Args:
        device: the address, as the device or the network sent it.
        payload: bytes, or any JSON value.
        received_at: when the connector took the message, µs since the epoch, UTC.
        connector: the connector's name.
        mode: connector mode; "" leaves it to the device's type.
        topic: original topic, where there is one.
        port: LoRaWAN fPort.
        meta: what the network says about the message.
        experiment_id: laboratory experiment.
        payload_bytes_max: refuse larger payloads here, where the sender can still be told.

    Raises:
        Reject: the message cannot be a line; the code says why.
    """
    fields: dict[str, Any] = {"device": device, "received_at": received_at, "connector": connector, "mode": mode}
    if topic:
        fields["topic"] = topic
    if port is not None:
        fields["port"] = port
    if meta:
        fields["meta"] = dict(meta)
    if experiment_id is not None:
        fields["experiment_id"] = experiment_id
    if isinstance(payload, bytes | bytearray | memoryview):
        fields["payload_b64"] = b64encode(payload).decode("ascii")
    else:
        fields["payload"] = payload
    if type(received_at) is not int or not TIMESTAMP_MIN_US <= received_at <= TIMESTAMP_MAX_US:
        reject(ReasonCode.TIMESTAMP_INVALID, f"received_at {received_at!r} is no instant in microseconds")
    try:
        line = json_text.dumps(fields)
    except TypeError as e:
        code = ReasonCode.ENVELOPE_TOO_DEEP if "ecursion" in str(e) else ReasonCode.ENVELOPE_INVALID
        raise Reject(code, f"the message cannot be written as JSON: {e}") from None
    check_tree(line, fields)
    parse_envelope(fields, key_device=None, size=len(line), payload_bytes_max=payload_bytes_max or RECORD_BYTES_MAX)
    return line


def around(raw: RawMessage) -> dict[str, Any]:
    """What `raw_line` takes to put another payload in the place of this message's: all but that and the device.

    Of `meta` only the time, which is all that parsers ask for whose payloads have parts.
    """
    fields: dict[str, Any] = {name: raw[name] for name in ("received_at", "connector", "mode")}
    for name in ("topic", "port", "experiment_id"):
        if raw[name]:
            fields[name] = raw[name]
    if raw["meta"] and "time" in raw["meta"]:
        fields["meta"] = {"time": raw["meta"]["time"]}
    return fields


def parse_raw(
    record: Record,
    topic: str,
    partition: int,
    *,
    payload_bytes_max: int,
    stage: str = "normalize",
    now_us: int | None = None,
) -> tuple[list[RawMessage], list[ErrorLine]]:
    """The messages of one record of `iot_raw_data`, and an error line for every line that is none. Never raises.

    Args:
        record: what anyone may have written.
        topic: its topic, without prefix.
        partition: its partition.
        payload_bytes_max: largest payload in bytes.
        stage: named in error lines.
        now_us: named in error lines; the record's own time where absent, so that a second pass says the same.

    Returns:
        Messages in the order of their lines, raw coordinates filled in (`raw_index` counts every physical line from
        0, blank ones too), and error lines likewise.
    """
    value = record.value or b""
    line_max = line_bytes_max(payload_bytes_max)
    whole: Any
    if len(value) > line_max and b"\n" not in value:
        whole = Reject(ReasonCode.ENVELOPE_TOO_LARGE, f"{len(value)} bytes; a line may have {line_max}")
    else:
        try:
            whole = loads(value)
        except Reject as e:
            whole = e
        else:
            if len(value) <= line_max and isinstance(whole, dict | list):
                # What almost every record is: one message, and nothing wrong with it.
                try:
                    return [_message(whole, value, 0, record, partition, payload_bytes_max)], []
                except Reject:
                    pass  # told below, with all that an error line says
    lines = _Lines(record, topic, partition, payload_bytes_max, stage, now_us)
    lines.read(value, whole, line_max)
    return lines.messages, lines.errors


def _message(
    parsed: Any, line: bytes, index: int, record: Record, partition: int, payload_bytes_max: int
) -> RawMessage:
    """The message that a line is, with its coordinates.

    Raises:
        Reject: it is none.
    """
    if is_envelope(parsed):
        key_device = device_of_key(record) if parsed["device"] is None else None
        fields = parse_envelope(parsed, key_device=key_device, size=len(line), payload_bytes_max=payload_bytes_max)
    elif isinstance(parsed, dict | list | bytes):
        fields = _foreign(parsed, record, device_of_key(record), len(line), payload_bytes_max)
    else:
        reject(ReasonCode.ENVELOPE_INVALID, "a line is a JSON object or array")
    if fields["received_at"] is None:
        fields["received_at"] = _stamped(record)
    fields["raw_partition"] = partition
    fields["raw_offset"] = record.offset
    fields["raw_index"] = index
    fields["generation"] = generation_of(record)
    return cast(RawMessage, fields)


class _Lines:
    """What becomes of a record that is not one good message: its lines as messages, and error lines for those that are none."""

    def __init__(
        self, record: Record, topic: str, partition: int, payload_bytes_max: int, stage: str, now_us: int | None
    ) -> None:
        self.messages: list[RawMessage] = []
        self.errors: list[ErrorLine] = []
        self._record = record
        self._topic = topic
        self._partition = partition
        self._payload_bytes_max = payload_bytes_max
        self._stage = stage
        self._now_us = seen_us(record) if now_us is None else now_us

    def read(self, value: bytes, whole: Any, line_max: int) -> None:
        """Take the record apart.

        Args:
            value: the record's.
            whole: what the whole of it is parsed to, or the Reject that says why not.
            line_max: most bytes of a line.
        """
        if not value.strip(_WHITESPACE):
            self._refuse(0, value, Reject(ReasonCode.ENVELOPE_INVALID, "the record has no value"))
            return
        if not isinstance(whole, Reject):
            if not isinstance(whole, dict | list):
                self._take(0, value, value)  # a bare number or word is text of the device's own format
            elif len(value) > line_max:
                message = f"{len(value)} bytes; a line may have {line_max}"
                self._refuse(0, value, Reject(ReasonCode.ENVELOPE_TOO_LARGE, message))
            else:
                self._take(0, value, whole)
            return
        lines = value.split(b"\n") if b"\n" in value else []
        outcomes = [(index, line, _try(line, line_max)) for index, line in enumerate(lines) if json_text.bare(line)]
        if any(isinstance(outcome, dict | list) for _, _, outcome in outcomes):
            for index, line, outcome in outcomes:
                if isinstance(outcome, Reject):
                    self._refuse(index, line, outcome)
                else:
                    self._take(index, line, outcome)
        elif whole.code in (ReasonCode.ENVELOPE_TOO_LARGE, ReasonCode.ENVELOPE_TOO_DEEP) or _looks_like_json(value):
            if outcomes and all(_looks_like_json(line) for _, line, _ in outcomes):
                for index, line, outcome in outcomes:
                    self._refuse(index, line, outcome if isinstance(outcome, Reject) else whole)
            else:
                self._refuse(0, value, whole)
        else:
            self._take(0, value, value)

    def _take(self, index: int, line: bytes, parsed: Any) -> None:
        try:
            message = _message(parsed, line, index, self._record, self._partition, self._payload_bytes_max)
        except Reject as e:
            named = parsed["device"] if is_envelope(parsed) else None
            self._refuse(index, line, e, named if named and device_fault(named) is None else None)
        else:
            self.messages.append(message)

    def _refuse(self, index: int, line: bytes, e: Reject, device: str | None = None) -> None:
        self.errors.append(
            error_line(
                self._stage,
                e.code,
                str(e),
                topic=self._topic,
                partition=self._partition,
                record=self._record,
                index=index,
                raw=line,
                device_id=device or device_of_key(self._record),
                generation=generation_of(self._record),
                now_us=self._now_us,
            )
        )


def original_line(value: bytes, index: int, *, alone: bool) -> bytes:
    """The bytes that a message of `parse_raw` came from.

    Args:
        value: of the record.
        index: the message's `raw_index`.
        alone: the record holds one message: then it is the whole, which may stand on several lines.
    """
    return value if alone else value.split(b"\n")[index]


def is_envelope(value: Any) -> bool:
    """Whether a parsed line is in our envelope: an object with `device` and one of `payload`, `payload_b64`."""
    return isinstance(value, dict) and "device" in value and ("payload" in value or "payload_b64" in value)


def parse_envelope(
    fields: Mapping[str, Any], *, key_device: str | None, size: int, payload_bytes_max: int
) -> dict[str, Any]:
    """Check an envelope's fields; unknown ones are left out.

    Args:
        fields: the parsed line.
        key_device: the device that the record's key names, for an envelope whose `device` is null.
        size: bytes of the line, so that a small one need not be measured again.
        payload_bytes_max: largest payload in bytes.

    Returns:
        `RawMessage` without coordinates. `received_at` is None where the line has none.

    Raises:
        Reject: a field is missing, of the wrong type or over its limit; TIMESTAMP_INVALID: `received_at` is no instant.
    """
    device = fields["device"] if fields["device"] is not None else key_device
    if device is None or device == "":
        reject(ReasonCode.ENVELOPE_NO_DEVICE, "neither the envelope nor the record's key names a device")
    if (fault := device_fault(device)) is not None:
        reject(ReasonCode.ENVELOPE_INVALID, fault)
    port = fields.get("port")
    if port is not None and (type(port) is not int or not 0 <= port <= PORT_MAX):
        reject(ReasonCode.ENVELOPE_INVALID, f"port is not a number from 0 to {PORT_MAX}: {port!r:.80}")
    meta = fields.get("meta")
    if meta is None:
        meta = {}
    elif not isinstance(meta, dict):
        reject(ReasonCode.ENVELOPE_INVALID, "meta is not an object")
    received_at = fields.get("received_at")
    if type(received_at) is not int or not TIMESTAMP_MIN_US <= received_at <= TIMESTAMP_MAX_US:
        # Ours are µs; others write s, ms, ns or ISO 8601.
        received_at = None if received_at is None else required_instant_us(received_at)
    experiment_id = fields.get("experiment_id")
    if experiment_id is not None:
        experiment_id = _text(fields, "experiment_id", DEVICE_CHARS_MAX)
    return {
        "device": device,
        "received_at": received_at,
        "connector": _text(fields, "connector", NAME_CHARS_MAX) or FOREIGN_CONNECTOR,
        "mode": _text(fields, "mode", NAME_CHARS_MAX),
        "topic": _text(fields, "topic", TOPIC_CHARS_MAX),
        "port": port,
        "payload": _payload(fields, size, payload_bytes_max),
        "meta": meta,
        "experiment_id": experiment_id,
    }


def _payload(fields: Mapping[str, Any], size: int, payload_bytes_max: int) -> Any:
    encoded = fields.get("payload_b64")
    if encoded is None:
        if "payload" not in fields:
            reject(ReasonCode.ENVELOPE_INVALID, "payload_b64 is null and there is no payload")
        payload = fields["payload"]
        if size > payload_bytes_max and (length := len(json_text.dumps(payload))) > payload_bytes_max:
            reject(ReasonCode.ENVELOPE_TOO_LARGE, f"a payload of {length} bytes; it may have {payload_bytes_max}")
        return payload
    if fields.get("payload") is not None:
        reject(ReasonCode.ENVELOPE_INVALID, "both payload and payload_b64 are given")
    if not isinstance(encoded, str):
        reject(ReasonCode.ENVELOPE_INVALID, "payload_b64 is not a string")
    try:
        decoded = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError as e:  # binascii.Error, and ValueError for text that is not ASCII
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"payload_b64 is not base64: {e}") from None
    if len(decoded) > payload_bytes_max:
        reject(ReasonCode.ENVELOPE_TOO_LARGE, f"a payload of {len(decoded)} bytes; it may have {payload_bytes_max}")
    return decoded


def _foreign(payload: Any, record: Record, key_device: str | None, size: int, payload_bytes_max: int) -> dict[str, Any]:
    if key_device is None:
        why = "the record has no key" if not record.key else "the record's key is no device address"
        reject(ReasonCode.ENVELOPE_NO_DEVICE, f"not in the envelope, and {why}")
    if size > payload_bytes_max:
        reject(ReasonCode.ENVELOPE_TOO_LARGE, f"a payload of {size} bytes; it may have {payload_bytes_max}")
    return {
        "device": key_device,
        "received_at": None,
        "connector": FOREIGN_CONNECTOR,
        "mode": "",
        "topic": "",
        "port": None,
        "payload": payload,
        "meta": {},
        "experiment_id": None,
    }


def _stamped(record: Record) -> int:
    stamped = received_ms(record) * 1_000
    if not TIMESTAMP_MIN_US <= stamped <= TIMESTAMP_MAX_US:
        reject(ReasonCode.TIMESTAMP_INVALID, "neither received_at nor the record's own time is an instant")
    return stamped


def _text(fields: Mapping[str, Any], name: str, chars_max: int) -> str:
    text = fields.get(name)
    if type(text) is str and len(text) <= chars_max and text.isprintable():
        return text
    if text is None:
        return ""
    if not isinstance(text, str):
        reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not a string")
    if len(text) > chars_max:
        reject(ReasonCode.ENVELOPE_INVALID, f"{name} has {len(text)} characters; it may have {chars_max}")
    if not text.isprintable() and find_control(text):
        reject(ReasonCode.ENVELOPE_INVALID, f"{name} holds a control character")
    return text


def _try(line: bytes, line_max: int) -> Any:
    """The parsed line, or the Reject that says why not."""
    try:
        if len(line) > line_max:
            reject(ReasonCode.ENVELOPE_TOO_LARGE, f"{len(line)} bytes; a line may have {line_max}")
        return loads(line)
    except Reject as e:
        return e


def _looks_like_json(value: bytes) -> bool:
    value = json_text.bare(value)
    if _OBJECT_START.match(value):
        return True
    return _ARRAY_START.match(value) is not None and not _BINARY.search(value) and is_utf8(value)
