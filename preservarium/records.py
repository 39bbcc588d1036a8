"""The only mapping between Kafka record values and lines: newline-delimited JSON through orjson.

A value is one line or many; every line of ours is a JSON object. What strangers can write (`iot_raw_data`) is parsed
record by record and line by line, so that one bad line takes nothing else with it. Topics that only we write are
parsed in one call for a whole batch.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar, cast

import orjson

from preservarium import topics
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, ErrorLine, RawMessage
from preservarium.stage import Batch, Effects, Record, Send

L = TypeVar("L")
#: Lines of a JSON array; None where it is none, or holds something else.
ParseArray = Callable[[bytes], list[L] | None]

#: What a Kafka broker takes unless told otherwise is 1 MiB with its framing; `kafka.record_bytes_max` is the setting.
RECORD_BYTES_MAX: Final = 1_000_000
#: Room for everything in a line but its payload: five names of at most 1 KiB, and `meta` (a gateway list is 1–8 KiB).
ENVELOPE_BYTES_MAX: Final = 65_536
#: No sensor format nests deeper than 8. orjson reads 1,024 levels and writes 254: what was read must stay writable
#: after it was wrapped a few times.
DEPTH_MAX: Final = 64
#: Column width in the databases; the longest real address, an MQTT client id or a URN, is under 128.
DEVICE_CHARS_MAX: Final = 255
#: Connector and mode are words of ours.
NAME_CHARS_MAX: Final = 64
#: MQTT allows 65,535 bytes; a topic longer than this is an attack, and the topic is stored with every series.
TOPIC_CHARS_MAX: Final = 1_024
#: LoRaWAN fPort is one byte (LoRaWAN L2 1.0.4, 4.3.2).
PORT_MAX: Final = 255
#: More original bytes than this are cut from an error line; base64 makes them 870 KB, which Kafka still takes.
ERROR_RAW_BYTES_MAX: Final = 650_000
#: An error message is for people.
ERROR_MESSAGE_CHARS_MAX: Final = 1_000
#: Generations are opened by hand.
GENERATION_MAX: Final = 2**31 - 1

GENERATION_HEADER: Final = "generation"
TRACE_HEADER: Final = "trace"
#: On a raw record that was redriven: 2 for the first time.
ATTEMPT_HEADER: Final = "attempt"
ATTEMPT_MAX: Final = 1_000_000
#: Connector of a record that somebody else wrote into the raw topic.
FOREIGN_CONNECTOR: Final = "kafka"

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# `{"` cannot be chance: a payload of two given bytes. A lone `[` can, so more is asked of it in _looks_like_json.
_OBJECT_START: Final = re.compile(rb'\s*\{\s*["}]')
_ARRAY_START: Final = re.compile(rb'\s*\[\s*[\[{"\-0-9tfn\]]')
_BINARY: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_WHITESPACE: Final = b" \t\r\n"


def line_bytes_max(payload_bytes_max: int) -> int:
    """Largest line of `iot_raw_data` in bytes: a payload of `payload_bytes_max` as base64, and its envelope."""
    return (payload_bytes_max + 2) // 3 * 4 + ENVELOPE_BYTES_MAX


# --- lines to values -------------------------------------------------------------------------------------------------


def pack(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """One value of many lines, without a newline at the end.

    Raises:
        TypeError: a line holds what JSON cannot (a defect of the caller: parsed lines never do).
    """
    return b"\n".join([orjson.dumps(line) for line in lines])


def split(lines: Iterable[Mapping[str, Any]], record_bytes_max: int) -> Iterator[bytes]:
    """As few values as possible, in order, none larger than `record_bytes_max` bytes.

    Raises:
        Reject: `output_too_large`, before anything is yielded: a single line is larger than a record may be.
    """
    values: list[bytes] = []
    pending: list[bytes] = []
    size = -1  # the first line has no newline before it
    for line in lines:
        text = orjson.dumps(line)
        if len(text) > record_bytes_max:
            _reject(ReasonCode.OUTPUT_TOO_LARGE, f"a line of {len(text)} bytes; a record may have {record_bytes_max}")
        if pending and size + 1 + len(text) > record_bytes_max:
            values.append(b"\n".join(pending))
            pending, size = [], -1
        pending.append(text)
        size += 1 + len(text)
    if pending:
        values.append(b"\n".join(pending))
    return iter(values)


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
        _reject(ReasonCode.TIMESTAMP_INVALID, f"received_at {received_at!r} is no instant in microseconds")
    try:
        line = orjson.dumps(fields)
    except TypeError as e:
        code = ReasonCode.ENVELOPE_TOO_DEEP if "ecursion" in str(e) else ReasonCode.ENVELOPE_INVALID
        raise Reject(code, f"the message cannot be written as JSON: {e}") from None
    _check_tree(line, fields)
    parse_envelope(fields, key_device=None, size=len(line), payload_bytes_max=payload_bytes_max or RECORD_BYTES_MAX)
    return line


def error_line(
    stage: str,
    code: ReasonCode,
    message: str,
    *,
    topic: str,
    partition: int,
    now_us: int,
    record: Record | None = None,
    offset: int | None = None,
    index: int = 0,
    raw: bytes | None = None,
    device_id: str | None = None,
    raw_partition: int | None = None,
    raw_offset: int | None = None,
    raw_index: int | None = None,
    attempt: int | None = None,
    parser: str | None = None,
    config_rev: int | None = None,
    generation: int | None = None,
    first_seen: int | None = None,
) -> ErrorLine:
    """A line of `iot_errors`.

    Args:
        stage: which agent says so.
        code: why, from the closed list.
        message: what exactly, for people; cut at `ERROR_MESSAGE_CHARS_MAX`.
        topic: topic that the input came from, without prefix.
        partition: its partition.
        now_us: µs since the epoch, UTC.
        record: the input; gives offset, generation and bytes where they are not given.
        offset: offset of the input.
        index: line within the record.
        raw: the original line; more than `ERROR_RAW_BYTES_MAX` is cut, and the message says so.
        device_id: address, where it is known.
        raw_partition: coordinates in `iot_raw_data`; taken from the input where that is the raw topic.
        raw_offset: see raw_partition.
        raw_index: see raw_partition.
        attempt: 1 for the first time; a redrive adds one. Taken from the record where it is not given.
        parser: `name@version`.
        config_rev: revision of the device's configuration.
        generation: 0 live.
        first_seen: µs; `now_us` where it is the first time.
    """
    if record is not None:
        offset = record.offset if offset is None else offset
        raw = record.value if raw is None else raw
        generation = generation_of(record) if generation is None else generation
    if offset is None:
        text = "an error line needs an offset or a record"
        raise ValueError(text)
    line: ErrorLine = {
        "stage": stage,
        "code": str(code),
        "message": message[:ERROR_MESSAGE_CHARS_MAX],
        "device_id": device_id,
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "index": index,
        "attempt": attempt if attempt is not None else 1 if record is None else attempt_of(record),
        "generation": generation or 0,
        "first_seen": now_us if first_seen is None else first_seen,
        "last_seen": now_us,
    }
    if topic == topics.RAW.name:
        raw_partition, raw_offset, raw_index = partition, offset, index
    if raw_partition is not None and raw_offset is not None:
        line["raw_partition"], line["raw_offset"], line["raw_index"] = raw_partition, raw_offset, raw_index or 0
    if parser is not None:
        line["parser"] = parser
    if config_rev is not None:
        line["config_rev"] = config_rev
    if raw is not None:
        _attach(line, raw, ERROR_RAW_BYTES_MAX)
    return line


def message_error(
    stage: str,
    code: ReasonCode,
    text: str,
    batch: Batch,
    record: Record,
    index: int,
    message: Mapping[str, Any],
    *,
    raw: bytes | None,
    now_us: int,
) -> ErrorLine:
    """A line of `iot_errors` about a message that comes from a batch of ours: device and lineage are the message's.

    Args:
        stage: which agent says so.
        code: why.
        text: what exactly, for people.
        batch: the batch.
        record: of the batch.
        index: line within the record.
        message: what is known of it: `device_id`, coordinates, `parser`, `config_rev`, `generation`.
        raw: what a redrive needs, where there is something to redrive.
        now_us: µs since the epoch, UTC.
    """
    return error_line(
        stage,
        code,
        text,
        topic=batch.topic,
        partition=batch.partition,
        offset=record.offset,
        index=index,
        raw=raw,
        device_id=message.get("device_id"),
        raw_partition=message.get("raw_partition"),
        raw_offset=message.get("raw_offset"),
        raw_index=message.get("raw_index"),
        parser=message.get("parser"),
        config_rev=message.get("config_rev"),
        generation=message.get("generation"),
        now_us=now_us,
    )


def refuse(effects: Effects, line: ErrorLine, *, record_bytes_max: int = RECORD_BYTES_MAX) -> None:
    """Tell an error line in `iot_errors`, and count it for the fuse and the metrics."""
    effects.sends.append(error_send(line, record_bytes_max=record_bytes_max))
    effects.refused[line["code"]] = effects.refused.get(line["code"], 0) + 1


def error_send(line: ErrorLine, *, record_bytes_max: int = RECORD_BYTES_MAX) -> Send:
    """The record for `iot_errors`, keyed by device where one is known.

    A line that is larger than `record_bytes_max` bytes loses the end of its original bytes, never its reason.
    """
    device_id = line.get("device_id")
    value = orjson.dumps(line)
    if len(value) > record_bytes_max:
        raw = line["raw"].encode() if "raw" in line else binascii.a2b_base64(line.get("raw_b64", ""))
        bare = cast(ErrorLine, {k: v for k, v in line.items() if k not in ("raw", "raw_b64")})
        # base64 needs 4/3; the rest is for the note and the field's name.
        room = max(0, (record_bytes_max - len(orjson.dumps(bare)) - 256) * 3 // 4)
        _attach(bare, raw, room, force_b64=True)
        value = orjson.dumps(bare)
    return Send(topics.ERRORS, device_id.encode() if device_id else None, value)


def _attach(line: ErrorLine, raw: bytes, bytes_max: int, *, force_b64: bool = False) -> None:
    if len(raw) > bytes_max:
        note = f" [first {bytes_max} of {len(raw)} bytes kept]"
        line["message"] = line["message"][: ERROR_MESSAGE_CHARS_MAX - len(note)] + note
        raw = raw[:bytes_max]
    if not force_b64 and b"\0" not in raw:  # NUL is no text for PostgreSQL
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            pass
        else:
            # Control characters grow sixfold when escaped; base64 keeps to 4/3.
            if len(raw) < ERROR_RAW_BYTES_MAX // 6 or len(orjson.dumps(text)) <= ERROR_RAW_BYTES_MAX * 4 // 3:
                line["raw"] = text
                return
    line["raw_b64"] = b64encode(raw).decode("ascii")


# --- values to lines -------------------------------------------------------------------------------------------------


def generation_of(record: Record) -> int:
    """The generation in a record's headers; 0, live, where there is none or it is no number."""
    for name, value in record.headers or ():
        if name == GENERATION_HEADER and value is not None:
            # isdigit on bytes is ASCII only: int() alone would also take "1_0", " 1" and "-1".
            number = int(value) if value.isdigit() and len(value) <= 10 else 0
            return number if number <= GENERATION_MAX else 0
    return 0


def attempt_of(record: Record) -> int:
    """Which try of its input a record is: 1, or more where it was redriven."""
    for name, value in record.headers or ():
        if name == ATTEMPT_HEADER and value is not None and value.isdigit() and len(value) <= 7:
            return min(max(1, int(value)), ATTEMPT_MAX)
    return 1


def parse_objects(array: bytes) -> list[dict[str, Any]] | None:
    """The objects of a JSON array; None where any of them is something else."""
    try:
        lines = orjson.loads(array)
    except orjson.JSONDecodeError:
        return None
    return lines if set(map(type, lines)) == {dict} else None


def parse_trusted(
    batch: Batch, *, stage: str = "records", now_us: int | None = None, parse: ParseArray[Any] = parse_objects
) -> tuple[list[list[Any]], list[ErrorLine]]:
    """Lines of a topic that only we write: one call of the parser for the batch, on any failure each record alone.

    Args:
        batch: the records.
        parse: makes lines of a JSON array; where it cannot, they are dictionaries.
        stage: named in error lines.
        now_us: named in error lines; the record's own time where absent.

    Returns:
        Lines for each record, aligned with `batch.records`, and an error line for each record that is not
        newline-delimited JSON objects; such a record has no lines.
    """
    alone = parse_alone(batch.records, parse)
    if alone is not None:
        return [[line] for line in alone], []
    values = [record.value or b"" for record in batch.records]
    # A packed value holds no newline but between its lines (JSON escapes them), so commas make an array of it.
    lines = parse(b"[%b]" % b"\n".join(values).replace(b"\n", b","))
    counts = [value.count(b"\n") + 1 for value in values]
    if lines is not None and sum(counts) == len(lines):
        parsed: list[list[Any]] = []
        position = 0
        for count in counts:
            parsed.append(lines[position : position + count])
            position += count
        return parsed, []
    return _parse_each(batch, stage, now_us)


def parse_alone(records: Sequence[Record], parse: ParseArray[L]) -> list[L] | None:
    """Lines of records that hold one each, aligned with them; None where any holds more, or something else.

    Much of what a stage costs where devices send single readings, so there is nothing for each record but the parser's
    work.
    """
    joined = b",".join([record.value or b"" for record in records])
    if b"\n" in joined:
        return None
    lines = parse(b"[%b]" % joined)
    return lines if lines is not None and len(lines) == len(records) else None


def _parse_each(batch: Batch, stage: str, now_us: int | None) -> tuple[list[list[dict[str, Any]]], list[ErrorLine]]:
    parsed: list[list[dict[str, Any]]] = []
    errors: list[ErrorLine] = []
    for record in batch.records:
        value = record.value or b""
        try:
            lines = [loads(line) for line in value.split(b"\n")]
            if set(map(type, lines)) != {dict}:
                _reject(ReasonCode.ENVELOPE_INVALID, "not newline-delimited JSON objects")
        except Reject as e:
            parsed.append([])
            errors.append(
                error_line(
                    stage,
                    e.code,
                    str(e),
                    topic=batch.topic,
                    partition=batch.partition,
                    record=record,
                    device_id=_key_device(record),
                    now_us=_seen_us(record) if now_us is None else now_us,
                )
            )
        else:
            parsed.append(lines)
    return parsed, errors


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
    messages: list[RawMessage] = []
    errors: list[ErrorLine] = []
    value = record.value
    key_device = _key_device(record)
    generation = generation_of(record)
    line_max = line_bytes_max(payload_bytes_max)

    def refuse(index: int, raw: bytes, e: Reject, device: str | None = None) -> None:
        errors.append(
            error_line(
                stage,
                e.code,
                str(e),
                topic=topic,
                partition=partition,
                record=record,
                index=index,
                raw=raw,
                device_id=device or key_device,
                generation=generation,
                now_us=_seen_us(record) if now_us is None else now_us,
            )
        )

    def take(index: int, raw: bytes, parsed: Any) -> None:
        try:
            if is_envelope(parsed):
                fields = parse_envelope(
                    parsed, key_device=key_device, size=len(raw), payload_bytes_max=payload_bytes_max
                )
            elif isinstance(parsed, dict | list | bytes):
                fields = _foreign(parsed, record, key_device, len(raw), payload_bytes_max)
            else:
                _reject(ReasonCode.ENVELOPE_INVALID, "a line is a JSON object or array")
            received_at = _received_at(fields["received_at"], record)
        except Reject as e:
            named = parsed["device"] if is_envelope(parsed) else None
            refuse(index, raw, e, named if named and _device_fault(named) is None else None)
            return
        fields["received_at"] = received_at
        fields["raw_partition"] = partition
        fields["raw_offset"] = record.offset
        fields["raw_index"] = index
        fields["generation"] = generation
        messages.append(cast(RawMessage, fields))

    if value is None or not value.strip(_WHITESPACE):
        refuse(0, value or b"", Reject(ReasonCode.ENVELOPE_INVALID, "the record has no value"))
        return messages, errors

    whole: Any
    try:
        if len(value) > line_max and b"\n" not in value:
            _reject(ReasonCode.ENVELOPE_TOO_LARGE, f"{len(value)} bytes; a line may have {line_max}")
        whole = loads(value)
    except Reject as e:
        fault = e
    else:
        if isinstance(whole, dict | list):
            if len(value) > line_max:
                message = f"{len(value)} bytes; a line may have {line_max}"
                refuse(0, value, Reject(ReasonCode.ENVELOPE_TOO_LARGE, message))
            else:
                take(0, value, whole)
        else:
            take(0, value, value)  # a bare number or word is text of the device's own format
        return messages, errors

    lines = value.split(b"\n") if b"\n" in value else []
    outcomes = [(index, line, _try(line, line_max)) for index, line in enumerate(lines) if line.strip(_WHITESPACE)]
    if any(isinstance(outcome, dict | list) for _, _, outcome in outcomes):
        for index, line, outcome in outcomes:
            if isinstance(outcome, Reject):
                refuse(index, line, outcome)
            else:
                take(index, line, outcome)
    elif fault.code in (ReasonCode.ENVELOPE_TOO_LARGE, ReasonCode.ENVELOPE_TOO_DEEP) or _looks_like_json(value):
        if outcomes and all(_looks_like_json(line) for _, line, _ in outcomes):
            for index, line, outcome in outcomes:
                refuse(index, line, outcome if isinstance(outcome, Reject) else fault)
        else:
            refuse(0, value, fault)
    else:
        take(0, value, value)
    return messages, errors


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
        `RawMessage` without coordinates. `received_at` is None where the line has none that can be used.

    Raises:
        Reject: a field is missing, of the wrong type or over its limit.
    """
    device = fields["device"] if fields["device"] is not None else key_device
    if device is None or device == "":
        _reject(ReasonCode.ENVELOPE_NO_DEVICE, "neither the envelope nor the record's key names a device")
    if (fault := _device_fault(device)) is not None:
        _reject(ReasonCode.ENVELOPE_INVALID, fault)
    port = fields.get("port")
    if port is not None and (type(port) is not int or not 0 <= port <= PORT_MAX):
        _reject(ReasonCode.ENVELOPE_INVALID, f"port is not a number from 0 to {PORT_MAX}: {port!r:.80}")
    meta = fields.get("meta")
    if meta is None:
        meta = {}
    elif not isinstance(meta, dict):
        _reject(ReasonCode.ENVELOPE_INVALID, "meta is not an object")
    received_at = fields.get("received_at")
    if type(received_at) is not int or not TIMESTAMP_MIN_US <= received_at <= TIMESTAMP_MAX_US:
        received_at = None
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
            _reject(ReasonCode.ENVELOPE_INVALID, "payload_b64 is null and there is no payload")
        payload = fields["payload"]
        if size > payload_bytes_max and (length := len(orjson.dumps(payload))) > payload_bytes_max:
            _reject(ReasonCode.ENVELOPE_TOO_LARGE, f"a payload of {length} bytes; it may have {payload_bytes_max}")
        return payload
    if fields.get("payload") is not None:
        _reject(ReasonCode.ENVELOPE_INVALID, "both payload and payload_b64 are given")
    if not isinstance(encoded, str):
        _reject(ReasonCode.ENVELOPE_INVALID, "payload_b64 is not a string")
    try:
        decoded = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError as e:  # binascii.Error, and ValueError for text that is not ASCII
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"payload_b64 is not base64: {e}") from None
    if len(decoded) > payload_bytes_max:
        _reject(ReasonCode.ENVELOPE_TOO_LARGE, f"a payload of {len(decoded)} bytes; it may have {payload_bytes_max}")
    return decoded


def _foreign(payload: Any, record: Record, key_device: str | None, size: int, payload_bytes_max: int) -> dict[str, Any]:
    if key_device is None:
        why = "the record has no key" if not record.key else "the record's key is no device address"
        _reject(ReasonCode.ENVELOPE_NO_DEVICE, f"not in the envelope, and {why}")
    if size > payload_bytes_max:
        _reject(ReasonCode.ENVELOPE_TOO_LARGE, f"a payload of {size} bytes; it may have {payload_bytes_max}")
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


def _seen_us(record: Record) -> int:
    # A stranger may stamp anything, also what 64 bits do not hold in microseconds.
    return min(max(record.timestamp * 1_000, 0), TIMESTAMP_MAX_US)


def _received_at(given: int | None, record: Record) -> int:
    if given is not None:
        return given
    stamped = record.timestamp * 1_000
    if not TIMESTAMP_MIN_US <= stamped <= TIMESTAMP_MAX_US:
        _reject(ReasonCode.TIMESTAMP_INVALID, "neither received_at nor the record's own time is an instant")
    return stamped


def _text(fields: Mapping[str, Any], name: str, chars_max: int) -> str:
    text = fields.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        _reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not a string")
    if len(text) > chars_max:
        _reject(ReasonCode.ENVELOPE_INVALID, f"{name} has {len(text)} characters; it may have {chars_max}")
    if _CONTROL.search(text):
        _reject(ReasonCode.ENVELOPE_INVALID, f"{name} holds a control character")
    return text


def _device_fault(device: Any) -> str | None:
    """Why this cannot be a device's address; None where it can."""
    if not isinstance(device, str):
        return "device is not a string"
    if not device.strip():
        return "device is blank"
    if len(device) > DEVICE_CHARS_MAX:
        return f"device has {len(device)} characters; it may have {DEVICE_CHARS_MAX}"
    if _CONTROL.search(device):
        return "device holds a control character"
    return None


def _key_device(record: Record) -> str | None:
    key = record.key
    if not key:
        return None
    try:
        device = key.decode()
    except UnicodeDecodeError:
        return None
    return device if _device_fault(device) is None else None


def _try(line: bytes, line_max: int) -> Any:
    """The parsed line, or the Reject that says why not."""
    try:
        if len(line) > line_max:
            _reject(ReasonCode.ENVELOPE_TOO_LARGE, f"{len(line)} bytes; a line may have {line_max}")
        return loads(line)
    except Reject as e:
        return e


def loads(text: bytes) -> Any:
    """One JSON value that a stranger wrote.

    Raises:
        Reject: not UTF-8, NUL or a lone surrogate in it, not JSON, or nested too deep.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as e:
        what = str(e)
        if "depth limit" in what:
            raise Reject(ReasonCode.ENVELOPE_TOO_DEEP, f"nested deeper than {DEPTH_MAX}") from None
        if b"\0" in text:
            raise Reject(ReasonCode.ENVELOPE_NOT_UTF8, "holds NUL") from None
        if "UTF-8" in what or not _is_utf8(text):
            raise Reject(ReasonCode.ENVELOPE_NOT_UTF8, "not UTF-8") from None
        if "surrogate" in what:
            raise Reject(ReasonCode.ENVELOPE_NOT_UTF8, f"a lone surrogate: {what}") from None
        raise Reject(ReasonCode.ENVELOPE_NOT_JSON, f"not JSON: {what}") from None
    _check_tree(text, value)
    return value


def lines_of(value: bytes | None) -> Iterator[bytes | None]:
    """The lines of a record that others wrote; None for a tombstone. An object that is written over several lines is one of them."""
    if value is None:
        yield None
        return
    if b"\n" in value:
        try:
            orjson.loads(value)
        except orjson.JSONDecodeError:
            yield from (line for line in value.split(b"\n") if line.strip())
            return
    yield value


def payload_of(data: bytes) -> Any:
    """What a device sent: a JSON object or array as such, anything else as the bytes that it is.

    A bare number or word stays bytes, because two raw bytes may happen to be two digits.
    """
    try:
        value = loads(data)
    except Reject:
        return data
    return value if isinstance(value, dict | list) else data


def _check_tree(text: bytes, value: Any) -> None:
    """Depth and NUL, looked for only where the text says that they could be there."""
    if text.count(b"[") + text.count(b"{") > DEPTH_MAX and _depth_over(value, DEPTH_MAX):
        _reject(ReasonCode.ENVELOPE_TOO_DEEP, f"nested deeper than {DEPTH_MAX}")
    if b"\\u0000" in text and _holds_nul(value):
        _reject(ReasonCode.ENVELOPE_NOT_UTF8, "holds NUL")


def _depth_over(value: Any, depth_max: int) -> bool:
    # Level by level and without recursion: the input decides how deep it goes.
    level = [value]
    for _ in range(depth_max):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _holds_nul(value: Any) -> bool:
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            if "\0" in node:
                return True
        elif isinstance(node, dict):
            stack.extend(node)
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return False


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _looks_like_json(value: bytes) -> bool:
    if _OBJECT_START.match(value):
        return True
    return _ARRAY_START.match(value) is not None and not _BINARY.search(value) and _is_utf8(value)


def _reject(code: ReasonCode, message: str) -> NoReturn:
    raise Reject(code, message)


def headers_of(record: Record) -> tuple[tuple[str, bytes], ...]:
    """The headers that a stage passes on to what it makes of a record: generation and trace."""
    return tuple((name, value) for name, value in record.headers or () if name in (GENERATION_HEADER, TRACE_HEADER))


def message_count(records: Sequence[Record]) -> int:
    """Lines in records of a topic that only we write."""
    return sum(record.value.count(b"\n") + 1 for record in records if record.value)
