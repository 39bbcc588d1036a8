"""Back-fill from files: CSV and NDJSON, plain or gzip, resumable.

The position is saved after Kafka has acknowledged what stands before it, so a back-fill that was interrupted goes on
where it was; at most one batch is sent twice, and rows have a natural key in the stores.

NDJSON: a line is our envelope (`device` and `payload` or `payload_b64`; its own `received_at` is kept), or an object
whose fields the mapping names. CSV: the first row names the columns (RFC 4180); its cells are text, and what is a number among them
says their datatype. A row that cannot be used goes to `iot_errors` with the file's name, its line number and its text; its neighbours live.
"""

import asyncio
import binascii
import codecs
import csv
import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal, NoReturn, cast

import orjson

from preservarium.clock import Clock
from preservarium.connectors.base import (
    Backoff,
    Limits,
    RawProducer,
    envelope_send,
    message_send,
    pause,
    refused_send,
)
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import required_instant_us
from preservarium.domain.readings.number import number_of
from preservarium.errors import PreservariumError, ReasonCode, Reject, Retry, reason
from preservarium.streaming.records import is_envelope, loads, payload_of
from preservarium.streaming.stage import Send

CONNECTOR: Final = "files"
MODE: Final = "FILE"
#: Rows sent and acknowledged together; the position is saved after each.
BATCH_ROWS: Final = 1_000
#: A longer line is no row: something is wrong with the file. Larger than any payload that is decoded.
ROW_BYTES_MAX: Final = 2_000_000
#: Lines that one quoted CSV row may span. A stray quote would otherwise swallow the rest of the file.
ROW_LINES_MAX: Final = 1_000
#: The first bytes tell whether a file is the one that a position was saved for.
FINGERPRINT_BYTES: Final = 4_096
#: Under a rate limit, a batch is what is due in this time, so that the flow is even.
RATE_TICK_S: Final = 0.2

#: What reading a file may bring about: a disk, a torn or damaged gzip, another encoding.
_UNREADABLE: Final = (OSError, EOFError, zlib.error, UnicodeError)

Format = Literal["csv", "ndjson"]


class FileError(PreservariumError):
    """A file cannot be read."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns (CSV) or fields (NDJSON) are what. Names are taken as they stand in the file."""

    device: str | None = None  #: column of the address
    device_id: str | None = None  #: the one address of the whole file
    time: str | None = None  #: column of the instant: ISO 8601 (UTC where it has no offset), or s, ms, µs, ns
    payload: str | None = None  #: column of the payload: JSON object or array, else text
    payload_hex: str | None = None  #: column of the payload as hexadecimal
    payload_b64: str | None = None  #: column of the payload as base64
    port: str | None = None  #: column of the port
    mode: str = MODE  #: connector mode
    delimiter: str = ","  #: of CSV
    encoding: str | None = None  #: None: UTF-8, or UTF-16 where a byte order mark says so
    #: without a payload column, the payload is an object of these columns; empty: all that have no other use
    columns: tuple[str, ...] = ()

    def used(self) -> set[str]:
        """Columns that are not part of the payload."""
        return {c for c in (self.device, self.time, self.port) if c is not None}


@dataclass(slots=True)
class Totals:
    """What became of the rows."""

    rows: int = 0  #: read, those of earlier runs included
    sent: int = 0  #: acknowledged by Kafka in this run
    refused: int = 0  #: of `rows`
    #: the first few refusals, for people
    examples: list[str] = field(default_factory=list)

    def refuse(self, where: str, e: Reject) -> None:
        """Count a refusal."""
        self.refused += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {e.code}: {e}")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    raw: bytes
    line: int  #: number of its first line, from 1
    end: int  #: byte offset behind it, in the uncompressed file


@dataclass(frozen=True, slots=True)
class Position:
    """How far a file has been sent."""

    offset: int = 0  #: bytes, uncompressed
    line: int = 0  #: lines before `offset`
    rows: int = 0
    refused: int = 0


class Positions:
    """Saved positions, one small JSON file for each back-filled file."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _file(self, path: Path) -> Path:
        return self._directory / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"

    def load(self, path: Path) -> Position:
        """The saved position; the beginning where there is none, or the file is another one by now."""
        try:
            saved = orjson.loads(self._file(path).read_bytes())
            length = min(FINGERPRINT_BYTES, int(saved["fingerprint_bytes"]))
            if _fingerprint(path, length) != saved["fingerprint"]:
                return Position()
            return Position(int(saved["offset"]), int(saved["line"]), int(saved["rows"]), int(saved["refused"]))
        except (OSError, ValueError, KeyError, TypeError):
            return Position()

    def forget(self, path: Path) -> None:
        """Begin at the start the next time."""
        self._file(path).unlink(missing_ok=True)

    def save(self, path: Path, position: Position) -> None:
        """Replace the saved position; a crash leaves the old one or the new one, never half of one."""
        self._directory.mkdir(parents=True, exist_ok=True)
        length = min(FINGERPRINT_BYTES, path.stat().st_size)
        document = {
            "path": str(path.resolve()),
            "fingerprint": _fingerprint(path, length),
            "fingerprint_bytes": length,
            "offset": position.offset,
            "line": position.line,
            "rows": position.rows,
            "refused": position.refused,
        }
        target = self._file(path)
        temporary = target.with_suffix(".tmp")
        temporary.write_bytes(orjson.dumps(document))
        os.replace(temporary, target)


def _fingerprint(path: Path, length: int) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(length)).hexdigest()


def format_of(path: Path) -> Format:
    """CSV or NDJSON by the name's ending, `.gz` left out.

    Raises:
        FileError: neither.
    """
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv", ".txt")):
        return "csv"
    if name.endswith((".ndjson", ".jsonl", ".json")):
        return "ndjson"
    message = f"{path}: neither .csv nor .ndjson; say --format"
    raise FileError(message)


def _why(e: BaseException) -> str:
    """Why a file cannot be read, for people: which encoding it is not in, or what the disk or the unpacking says."""
    return f"not {e.encoding.upper()}" if isinstance(e, UnicodeDecodeError) else reason(e)


class _Recoded:
    """A file in another encoding, as lines of UTF-8.

    Offsets are of the UTF-8 that it is read as. Bytes that are none of the encoding stay as they are, so that their row alone is refused.
    """

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="\n")

    def readline(self, chars_max: int) -> bytes:
        return self._text.readline(chars_max).encode("utf-8", "surrogateescape")

    def seek(self, offset: int) -> None:
        self._text.seek(0)
        while offset > 0 and (line := self.readline(ROW_BYTES_MAX)):
            offset -= len(line)

    def close(self) -> None:
        self._text.close()


class Reader:
    """The rows of one file from a position on."""

    def __init__(self, path: Path, form: Format, mapping: Columns, start: Position) -> None:
        self._form = form
        self._mapping = mapping
        self._header: list[str] = []
        self._offset = start.offset
        self._line = start.line
        try:
            self._raw: IO[bytes] = path.open("rb")
            self._size = path.stat().st_size
        except OSError as e:
            message = f"{path}: {e.strerror}"
            raise FileError(message) from None
        packed = self._raw.read(2) == b"\x1f\x8b"
        self._raw.seek(0)
        plain = cast(IO[bytes], gzip.GzipFile(fileobj=self._raw)) if packed else self._raw
        self._file: IO[bytes] | _Recoded = plain
        try:
            encoding = mapping.encoding or _marked(plain)
            if encoding is not None:
                self._file = _Recoded(plain, encoding)
            if form == "csv":
                self._read_header(path, start)
            if start.offset:
                self._file.seek(start.offset)  # in a compressed file this reads forward to it
        except _UNREADABLE as e:
            self.close()
            message = f"{path}: {_why(e)}"
            raise FileError(message) from None
        except FileError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    @property
    def share(self) -> float:
        """How much of the file has been read, 0 to 1 (of the compressed bytes where it is compressed)."""
        return min(1.0, self._raw.tell() / self._size) if self._size else 1.0

    def _read_header(self, path: Path, start: Position) -> None:
        first = self._file.readline(ROW_BYTES_MAX)
        try:
            self._header = self._cells(first.decode().removeprefix("\ufeff"))
        except (UnicodeDecodeError, csv.Error) as e:
            message = f"{path}: the first line names no columns: {_why(e)}"
            raise FileError(message) from None
        if twice := sorted({c for c in self._header if self._header.count(c) > 1}):
            message = f"{path}: column {', '.join(twice)} stands there twice"
            raise FileError(message)
        wanted = {
            c
            for c in (
                *self._mapping.used(),
                self._mapping.payload,
                self._mapping.payload_hex,
                self._mapping.payload_b64,
            )
            if c is not None
        } | set(self._mapping.columns)
        if missing := sorted(wanted - set(self._header)):
            message = f"{path}: no column {', '.join(missing)}; there are: {', '.join(self._header)}"
            raise FileError(message)
        if start.offset == 0:
            self._offset, self._line = len(first), 1
        else:
            self._file.seek(0)

    def _cells(self, text: str) -> list[str]:
        return next(csv.reader([text.rstrip("\r\n")], delimiter=self._mapping.delimiter, strict=True), [])

    def rows(self) -> Iterator[Row]:
        """Rows in order, blank lines left out.

        Raises:
            FileError: the file cannot be read on (a torn gzip, a disk).
        """
        held: list[bytes] = []  # lines of a quoted row that turned out to be none
        while True:
            raw = held.pop(0) if held else self._readline()
            if not raw:
                return
            line = self._line + 1
            if self._form == "csv" and raw.count(b'"') % 2:
                more = self._quoted(raw, held)
                if more is not None:
                    raw = b"".join([raw, *more])
                    self._line += len(more)
            self._line += 1
            self._offset += len(raw)
            if json_text.bare(raw).strip():
                yield Row(raw, line, self._offset)

    def _quoted(self, raw: bytes, held: list[bytes]) -> list[bytes] | None:
        """The lines that close a quote which `raw` leaves open, taken from `held` and the file.

        None where nothing closes it: then `raw` alone is broken, and the lines looked at are put back into `held`.
        """
        more: list[bytes] = []
        quotes, size = raw.count(b'"'), len(raw)
        while quotes % 2 and len(more) < ROW_LINES_MAX and size <= ROW_BYTES_MAX:
            following = held.pop(0) if held else self._readline()
            if not following:
                break
            more.append(following)
            quotes += following.count(b'"')
            size += len(following)
        if quotes % 2:
            held[:0] = more
            return None
        return more

    def _readline(self) -> bytes:
        try:
            return self._file.readline(ROW_BYTES_MAX)
        except _UNREADABLE as e:
            message = f"cannot be read beyond byte {self._offset}: {_why(e)}"
            raise FileError(message) from None

    def position(self, row: Row, totals: Totals) -> Position:
        """The position behind `row`."""
        return Position(row.end, row.line + row.raw.rstrip(b"\n").count(b"\n"), totals.rows, totals.refused)

    def message(self, row: Row, limits: Limits, now_us: int) -> Send:
        """The record of a row.

        Raises:
            Reject: the row cannot be used.
        """
        if self._form == "csv":
            fields: Mapping[str, Any] = self._csv(row)
        else:
            value = loads(row.raw)
            if not isinstance(value, dict):
                _reject(ReasonCode.ENVELOPE_INVALID, "a line is a JSON object")
            if is_envelope(value) and self._mapping.device is None and self._mapping.device_id is None:
                return envelope_send(value, limits, CONNECTOR, self._mapping.mode, now_us, keep_received_at=True)
            fields = value
        return self._mapped(fields, limits, now_us)

    def _csv(self, row: Row) -> dict[str, str]:
        try:
            # A quoted cell may hold line breaks; as one string the reader takes them as they are.
            cells = next(
                csv.reader([row.raw.decode().rstrip("\0\r\n")], delimiter=self._mapping.delimiter, strict=True), []
            )
        except UnicodeDecodeError:
            _reject(ReasonCode.ENVELOPE_NOT_UTF8, f"not {self._mapping.encoding or 'UTF-8'}")
        except csv.Error as e:
            _reject(ReasonCode.ENVELOPE_INVALID, f"not CSV: {e}")
        if len(cells) != len(self._header):
            _reject(ReasonCode.ENVELOPE_INVALID, f"{len(cells)} cells under {len(self._header)} columns")
        return dict(zip(self._header, cells, strict=True))

    def _mapped(self, fields: Mapping[str, Any], limits: Limits, now_us: int) -> Send:
        m = self._mapping
        device: Any = m.device_id if m.device is None else fields.get(m.device)
        if device is None or device == "":
            _reject(ReasonCode.ENVELOPE_NO_DEVICE, f"no device in {m.device!r}" if m.device else "no device named")
        if isinstance(device, int) and not isinstance(device, bool):
            device = str(device)  # serial numbers are often written as numbers
        received_at = required_instant_us(fields.get(m.time)) if m.time is not None else now_us
        port = None
        if m.port is not None and fields.get(m.port) not in (None, ""):
            port = _port(fields[m.port])
        return message_send(device, self._payload(fields), limits, CONNECTOR, m.mode, received_at, port=port)

    def _payload(self, fields: Mapping[str, Any]) -> Any:
        m = self._mapping
        if m.payload_hex is not None:
            try:
                return bytes.fromhex(_text(fields, m.payload_hex))
            except ValueError:
                _reject(ReasonCode.ENVELOPE_INVALID, f"{m.payload_hex} is not hexadecimal")
        if m.payload_b64 is not None:
            try:
                return binascii.a2b_base64(_text(fields, m.payload_b64), strict_mode=True)
            except ValueError as e:
                _reject(ReasonCode.ENVELOPE_INVALID, f"{m.payload_b64} is not base64: {e}")
        if m.payload is not None:
            value = fields.get(m.payload)
            return payload_of(value.encode()) if isinstance(value, str) else value
        if m.columns:
            names = list(m.columns)
        else:
            used = m.used()
            names = [name for name in fields if name not in used]
        values = {name: fields.get(name) for name in names}
        if self._form == "csv":
            # An empty cell is no value: sensors that did not measure.
            return {name: value for name, value in values.items() if value not in (None, "")}
        return values


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        _reject(ReasonCode.ENVELOPE_INVALID, f"{name} is not a string")
    return value


def _port(given: Any) -> Any:
    number = number_of(given) if isinstance(given, str) else given
    if isinstance(number, float) and number.is_integer():
        return int(number)
    return given if number is None else number


def _marked(file: IO[bytes]) -> str | None:
    """The encoding that a byte order mark says, where it is not UTF-8."""
    start = file.read(2)
    file.seek(0)
    return "utf-16" if start in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE} else None


async def backfill(
    path: Path,
    form: Format,
    mapping: Columns,
    producer: RawProducer | None,
    positions: Positions | None,
    limits: Limits,
    clock: Clock,
    *,
    totals: Totals | None = None,
    rate: float | None = None,
    stop: asyncio.Event | None = None,
    on_progress: Callable[[float, Totals], None] = lambda share, totals: None,
    on_wait: Callable[[Retry, float], None] = lambda e, wait_s: None,
) -> Totals:
    """Send a file's rows from its saved position on.

    Args:
        path: the file.
        form: CSV or NDJSON.
        mapping: which columns are what.
        producer: None reads and checks only (a dry run).
        positions: where the position is saved; None begins at the start and saves nothing.
        limits: sizes.
        clock: time stamps rows without an instant, and paces.
        totals: counted up as it goes, for callers that want to know after an error, too.
        rate: rows a second; None as fast as Kafka takes them.
        stop: ends after the batch in hand.
        on_progress: told the share of the file and the totals after every batch.
        on_wait: told that Kafka does not answer, and the seconds until the next attempt.

    Raises:
        FileError: the file cannot be read.
        Retry: Kafka did not answer, and it was told to stop.
    """
    stop = stop or asyncio.Event()
    start = positions.load(path) if positions is not None else Position()
    totals = totals if totals is not None else Totals()
    totals.rows, totals.refused = start.rows, start.refused
    reader = Reader(path, form, mapping, start)
    batch_rows = BATCH_ROWS if rate is None else max(1, min(BATCH_ROWS, round(rate * RATE_TICK_S)))
    started_s = clock.monotonic_s()
    paced = 0
    sends: list[Send] = []
    last: Row | None = None
    rows = reader.rows()
    try:
        while not stop.is_set():
            last = None
            sends.clear()
            taken = usable = 0
            for row in rows:
                last = row
                totals.rows += 1
                taken += 1
                now_us = clock.now_us()
                try:
                    sends.append(reader.message(row, limits, now_us))
                    usable += 1
                except Reject as e:
                    totals.refuse(f"{path}:{row.line}", e)
                    if producer is not None:
                        source, raw = path.name, row.raw.rstrip(b"\r\n")
                        sends.append(
                            refused_send(
                                CONNECTOR, e, limits, raw=raw, device=None, source=source, index=row.line, now_us=now_us
                            )
                        )
                if taken >= batch_rows:
                    break
            if last is None:
                break
            if producer is not None:
                await _deliver(producer, sends, clock, stop, on_wait)
                if positions is not None:
                    positions.save(path, reader.position(last, totals))
            totals.sent += usable
            on_progress(reader.share, totals)
            if rate is not None:
                paced += taken
                await pause(clock, max(0.0, started_s + paced / rate - clock.monotonic_s()), stop)
            else:
                await asyncio.sleep(0)
    finally:
        reader.close()
    return totals


async def _deliver(
    producer: RawProducer,
    sends: list[Send],
    clock: Clock,
    stop: asyncio.Event,
    on_wait: Callable[[Retry, float], None],
) -> None:
    backoff = Backoff()
    while True:
        try:
            return await producer.send(sends)
        except Retry as e:
            if stop.is_set():
                raise
            wait_s = backoff.next_s()
            on_wait(e, wait_s)
            await pause(clock, wait_s, stop)


def _reject(code: ReasonCode, message: str) -> NoReturn:
    raise Reject(code, message)
