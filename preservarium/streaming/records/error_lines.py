"""Lines of `iot_errors`: what was refused, why, and what a redrive needs."""

import binascii
from base64 import b64encode
from collections.abc import Mapping
from typing import Any, Final, cast

import orjson

from preservarium import topics
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, ErrorLine
from preservarium.errors import ReasonCode
from preservarium.streaming.records.metadata import attempt_of, generation_of, received_ms
from preservarium.streaming.stage import Batch, Effects, Record, Send

#: What a Kafka broker takes unless told otherwise is 1 MiB with its framing; `kafka.record_bytes_max` is the setting.
RECORD_BYTES_MAX: Final = 1_000_000
#: More original bytes than this are cut from an error line; base64 makes them 870 KB, which Kafka still takes.
ERROR_RAW_BYTES_MAX: Final = 650_000
#: An error message is for people.
ERROR_MESSAGE_CHARS_MAX: Final = 1_000


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
    part: int | None = None,
    envelope: dict[str, Any] | None = None,
    bare: bool = False,
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
        part: which part of a message `raw` is, from 1; None: it is the whole.
        envelope: what was around that part, see `raw.around`.
        bare: without the original bytes: another line of the same input and code has them.
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
        if record is not None and TIMESTAMP_MIN_US <= (received := received_ms(record) * 1_000) <= TIMESTAMP_MAX_US:
            line["received_at"] = received
    if raw_partition is not None and raw_offset is not None:
        line["raw_partition"], line["raw_offset"], line["raw_index"] = raw_partition, raw_offset, raw_index or 0
    if parser is not None:
        line["parser"] = parser
    if config_rev is not None:
        line["config_rev"] = config_rev
    if part is not None and envelope is not None:
        line["part"], line["envelope"] = part, envelope
    if raw is not None and not bare:
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
    value = to_bytes(line)
    if len(value) > record_bytes_max:
        raw = line["raw"].encode() if "raw" in line else binascii.a2b_base64(line.get("raw_b64", ""))
        bare = cast(ErrorLine, {k: v for k, v in line.items() if k not in ("raw", "raw_b64")})
        # base64 needs 4/3; the rest is for the note and the field's name.
        room = max(0, (record_bytes_max - len(orjson.dumps(bare)) - 256) * 3 // 4)
        _attach(bare, raw, room, force_b64=True)
        value = to_bytes(bare)
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
