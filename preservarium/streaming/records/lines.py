"""Lines of topics that only we write: packed into values, and parsed in one call for a whole batch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import orjson

from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.reading import ErrorLine
from preservarium.errors import ReasonCode, Reject
from preservarium.streaming.records.error_lines import error_line
from preservarium.streaming.records.metadata import device_of_key, seen_us
from preservarium.streaming.records.strict_json import loads, reject
from preservarium.streaming.stage import Batch, Record

L = TypeVar("L")
#: Lines of a JSON array; None where it is none, or holds something else.
ParseArray = Callable[[bytes], list[L] | None]


def pack(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """One value of many lines, without a newline at the end.

    Raises:
        TypeError: a line holds what JSON cannot (a defect of the caller: parsed lines never do).
    """
    return b"\n".join([to_bytes(line) for line in lines])


def split(lines: Iterable[Mapping[str, Any]], record_bytes_max: int) -> Iterator[bytes]:
    """As few values as possible, in order, none larger than `record_bytes_max` bytes.

    Raises:
        Reject: `output_too_large`, before anything is yielded: a single line is larger than a record may be.
    """
    values: list[bytes] = []
    pending: list[bytes] = []
    size = -1  # the first line has no newline before it
    for line in lines:
        text = to_bytes(line)
        if len(text) > record_bytes_max:
            reject(ReasonCode.OUTPUT_TOO_LARGE, f"a line of {len(text)} bytes; a record may have {record_bytes_max}")
        if pending and size + 1 + len(text) > record_bytes_max:
            values.append(b"\n".join(pending))
            pending, size = [], -1
        pending.append(text)
        size += 1 + len(text)
    if pending:
        values.append(b"\n".join(pending))
    return iter(values)


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
            lines = [loads(line, ours=True) for line in value.split(b"\n")]
            if set(map(type, lines)) != {dict}:
                reject(ReasonCode.ENVELOPE_INVALID, "not newline-delimited JSON objects")
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
                    device_id=device_of_key(record),
                    now_us=seen_us(record) if now_us is None else now_us,
                )
            )
        else:
            parsed.append(lines)
    return parsed, errors


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


def message_count(records: Sequence[Record]) -> int:
    """Lines in records of a topic that only we write."""
    return sum(record.value.count(b"\n") + 1 for record in records if record.value)
