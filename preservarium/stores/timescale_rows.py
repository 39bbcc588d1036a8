"""Rows of readings in PostgreSQL's binary COPY format, as TimescaleStore sends them (timescale.py).

Messages, typed, become rows in one pass: a prefix that is kept per series, and one call that makes the whole of a plain
row. Rows sort by key as bytes. From the rows comes what a write says besides: newest values, and what the roll-ups must look
at again.
"""

import asyncio
import struct
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import floordiv, itemgetter
from typing import Any, Final

from msgspec import UNSET

from preservarium.domain.readings.reading import TIMESTAMP_MIN_US
from preservarium.domain.readings.stored import StoredMessage, StoredReading
from preservarium.errors import ReasonCode
from preservarium.stores.base import (
    NAME_CHARS_MAX,
    TOPIC_CHARS_MAX,
    Rejected,
    derivation_fault,
    series_fault,
    text_fault,
    timestamp_code,
    value_fault,
)

#: Messages encoded before others have their turn: a millisecond. So the rows of one flight are made while the database
#: works on those of another, and nothing else in the process waits for 5,000 rows.
SLICE_MESSAGES: Final = 500

COLUMNS: Final = (
    "series_id", "timestamp", "quality", "value", "value_text", "flags", "unit", "topic",
    "received_at", "raw_partition", "raw_offset", "raw_index", "generation", "derivation_id",
)  # fmt: skip
COLUMN_LIST: Final = ", ".join(COLUMNS)
#: Most rows have nothing in these; a batch without them leaves them out of its COPY.
_RARE_COLUMNS: Final = ("value_text", "flags", "unit", "topic")
_PLAIN_COLUMNS: Final = tuple(c for c in COLUMNS if c not in _RARE_COLUMNS)

# Binary COPY (PostgreSQL manual, COPY, "Binary Format"): a count of fields, then length and bytes of each; -1 is NULL.
# Rows are kept without the count; a plain row is one of _PLAIN_COLUMNS with a value, and no other has its length.
_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER: Final = struct.pack(">h", -1)
PREFIX: Final = struct.Struct(">iii")  # 4 series_id | length of the timestamp
_KEY_BYTES: Final = PREFIX.size + 8  #: a row begins with its key
_VALUE: Final = struct.Struct(">qihid")  # timestamp | 2 quality | 8 value
_NO_VALUE: Final = struct.Struct(">qihi").pack  # timestamp | 2 quality | -1
_TAIL: Final = struct.Struct(">iqihiqii")  # 8 received_at | 2 raw_partition | 8 raw_offset | 4 raw_index
DERIVATION: Final = struct.Struct(">iiii")  # 4 generation | 4 derivation_id
_NULL: Final = struct.pack(">i", -1)
_NULLS: Final = _NULL * len(_RARE_COLUMNS)
_TAIL_BYTES: Final = _TAIL.size + DERIVATION.size
_RARE_AT: Final = PREFIX.size + _VALUE.size  #: where the rare columns belong in a plain row
_ROW: Final = struct.Struct(">12sq10sdiq10sqii16s")  #: a plain row: prefix | _VALUE | _TAIL | DERIVATION
#: Quality and raw partition as a plain row has them, with the lengths around them: a pack of fewer parts is faster. What is
#: not here makes a row of the general kind. Few topics have so many partitions; half a megabyte.
_SHORTS: Final = {n: struct.pack(">ihi", 2, n, 8) for n in range(4096)}
_PLAIN: Final = struct.Struct(">4xi4xq4xh4xd4xq42x")  # series_id, timestamp, quality, value, received_at of a plain row
assert _PLAIN.size == _ROW.size == _RARE_AT + _TAIL_BYTES, "a plain row is read as it is written"
_TEXT_OID: Final = 25

#: (device_id, connector_mode, component_type, pin_position)
SeriesKey = tuple[str, str, str, str]
#: (parser, config_rev, experiment_id)
DerivationKey = tuple[str, int, str | None]
#: (row prefix, unit, topic)
Series = tuple[bytes, str, str]
#: (series prefix, timestamp) -> row
Rows = dict[tuple[bytes, int], bytes]
#: (series prefix, timestamp) -> number and text of the row that stands where another came
Standing = dict[tuple[bytes, int], tuple[float | None, str | None]]


@dataclass(slots=True)
class Encoded:
    """The rows of a write."""

    plain: list[bytes] = field(default_factory=list)  #: of the live table, in the order of arrival
    times: list[int] = field(default_factory=list)  #: their timestamps
    late: Rows = field(default_factory=dict)
    corrections: Rows = field(default_factory=dict)  #: of a later generation than the live one
    revisions: Rows = field(default_factory=dict)  #: later verdicts on readings that stand
    #: of the rows of `corrections` and `revisions`: what decides between two of one key
    ranks: dict[tuple[bytes, int], tuple[int, ...]] = field(default_factory=dict)
    standing: Standing = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    readings: int = 0
    doubles: int = 0  #: rows of the live table that `settle` has taken out
    missing: bool = False  #: a series or derivation is not known yet; the rest is incomplete
    bounds: "Bounds | None" = None
    _message: "CopyMessage | None" = None
    _latest: "Latest | None" = None
    _sorted: list[bytes] | None = None

    async def prepare(self, *, settled: bool) -> None:
        """Make what the transaction sends, so that no connection is held, and no lock, while Python works.

        Args:
            settled: whether rows with one key must be told apart: COPY does without, it meets the second one as it meets one
                that is stored.
        """
        if not self.missing:
            if settled:
                self.settle()
            self.message()
            await asyncio.sleep(0)
            self.latest()

    def settle(self) -> None:
        """Of two rows of the live table with one key keep the first."""
        if len({row[:_KEY_BYTES] for row in self.plain}) == len(self.plain):
            return
        kept: Rows = {}
        for row, at in zip(self.plain, self.times, strict=True):
            self.keep_first(kept, (row[: PREFIX.size], at), row)
        self.doubles += len(self.plain) - len(kept)
        self.plain, self.times = list(kept.values()), [at for _, at in kept]
        self._message = self._latest = self._sorted = None

    def keep_first(self, part: Rows, key: tuple[bytes, int], row: bytes) -> None:
        """Add a row; of two of one key the first stays, and what it says is noted for whoever comes second."""
        first = part.setdefault(key, row)
        if first is not row:
            self.standing[key] = _value_of(first)

    def rows(self) -> Rows:
        """The rows of the live table by key."""
        self.settle()
        return {(row[: PREFIX.size], at): row for row, at in zip(self.plain, self.times, strict=True)}

    def message(self) -> "CopyMessage":
        """The COPY of the live table's rows."""
        if self._message is None:
            self._message = copy_message(self._ordered())
        return self._message

    def _ordered(self) -> list[bytes]:
        """The rows by key, sorted once for all who need them so."""
        if self._sorted is None:
            self._sorted = sorted(self.plain)
        return self._sorted

    def latest(self) -> "Latest":
        """The newest values of all parts, and what the roll-ups must look at again."""
        assert self.bounds is not None, "rows are made by `encode`"
        if self._latest is None:
            others = self.others()
            if any(others):
                self._latest = latest_of([self.rows(), *others], self.bounds)
            else:
                newest = _newest_of(self._ordered())
                self._latest = Latest.of(newest, marks_of(self.plain, self.times, newest, self.bounds))
        return self._latest

    def others(self) -> tuple[Rows, Rows, Rows]:
        """Rows besides the live ones (late, corrections, revisions), in the order in which one may overwrite the other."""
        return self.late, self.corrections, self.revisions

    def overwrite(self, part: Rows, key: tuple[bytes, int], row: bytes, rank: tuple[int, ...]) -> None:
        """Add a correction or revision; of two of one key the higher rank stays, of equal ones the later."""
        if key not in part or rank >= self.ranks[key]:
            part[key] = row
            self.ranks[key] = rank


@dataclass(slots=True)
class Names:
    """Series and derivations of one write."""

    series: dict[SeriesKey, Series] = field(default_factory=dict)
    derivations: dict[DerivationKey, int] = field(default_factory=dict)
    tails: dict[tuple[str, int, str | None, int], bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Times that are stored, µs since the epoch."""

    oldest: int
    newest: int
    late: int  #: rows older than this are staged
    current: int = TIMESTAMP_MIN_US  #: rows since this mark a minute of all series, older ones the hour of their own
    today: int = TIMESTAMP_MIN_US  #: of what is marked since this, the views of the roll-ups know at once


async def encode(
    messages: Sequence[StoredMessage],
    series: Callable[[SeriesKey], Series | None],
    tails: Callable[[tuple[str, int, str | None, int]], bytes | None],
    bounds: Bounds,
    names: Names | None,
) -> Encoded:
    """Rows of the messages, made in slices between which others have their turn.

    Args:
        messages: readings.
        series: known series.
        tails: known derivations.
        bounds: times that are stored.
        names: given on the second pass, when everything that can be known is: what is missing then is invalid.
    """
    out = Encoded(bounds=bounds)
    for start in range(0, len(messages), SLICE_MESSAGES):
        if start:
            await asyncio.sleep(0)
        _encode_slice(messages[start : start + SLICE_MESSAGES], start, out, series, tails, bounds, names)
        if out.missing:
            break
    return out


def _encode_slice(
    messages: Sequence[StoredMessage],
    first: int,
    out: Encoded,
    series: Callable[[SeriesKey], Series | None],
    tails: Callable[[tuple[str, int, str | None, int]], bytes | None],
    bounds: Bounds,
    names: Names | None,
) -> None:
    """Add the rows of messages to `out`. The one loop that runs for every reading: it looks dull because it is fast.

    `first` is the index of the first message.
    """
    add, add_time, pack, shorts = out.plain.append, out.times.append, _ROW.pack, _SHORTS.get
    epoch, negative, positive = TIMESTAMP_MIN_US, float("-inf"), float("inf")
    oldest, newest = max(bounds.oldest, bounds.late), bounds.newest
    last: Any = None
    derivation: bytes | None = None
    out.readings += sum([len(message.readings) for message in messages])
    for index, message in enumerate(messages, first):
        readings, generation = message.readings, message.generation
        origin = message.parser, message.config_rev, message.experiment_id, generation
        if origin != last:
            derivation = tails(origin)
            last = origin
        if derivation is None:
            if names is None:
                out.missing = True
                return
            text = derivation_fault(origin[:3]) or f"generation {generation}"
            out.rejected += [Rejected(index, n, ReasonCode.STORE_REJECTED, text) for n in range(len(readings))]
            continue
        device, mode, topic = message.device_id, message.connector_mode, message.topic
        for reading in readings:
            key = device, mode, reading.component_type, reading.pin_position
            known = series(key)
            if known is None:
                if names is None:
                    out.missing = True
                    return
                text = series_fault(key, reading.unit, topic) or "series"
                out.rejected.append(Rejected(index, _place(readings, reading), ReasonCode.STORE_REJECTED, text))
                continue
            prefix, series_unit, series_topic = known
            value, timestamp = reading.value, reading.timestamp
            if timestamp is UNSET:
                timestamp = message.timestamp
            try:
                if (
                    value is not None
                    and negative < value < positive
                    and oldest <= timestamp <= newest
                    and reading.unit == series_unit
                    and topic == series_topic
                    and not reading.flags
                    and not generation
                    and not reading.revised
                    and reading.value_text is None
                ):
                    quality, partition = shorts(reading.quality), shorts(message.raw_partition)
                    if quality and partition:
                        # One call that makes the whole row: twice as fast as two whose bytes are joined.
                        add(pack(
                            prefix, timestamp - epoch, quality, value, 8, message.received_at - epoch, partition,
                            message.raw_offset, 4, message.raw_index, derivation,
                        ))  # fmt: skip
                        add_time(timestamp)
                        continue
                rare = _encode_rare(reading, timestamp, known, topic, bounds)
                if isinstance(rare, bytes):
                    coordinates = message.received_at, message.raw_partition, message.raw_offset, message.raw_index
                    received, part, offset, line = coordinates
                    row = rare + _TAIL.pack(8, received - epoch, 2, part, 8, offset, 4, line) + derivation
                    if reading.revised:
                        out.overwrite(out.revisions, (prefix, timestamp), row, (generation, *coordinates))
                    elif generation:
                        out.overwrite(out.corrections, (prefix, timestamp), row, (generation,))
                    elif timestamp < bounds.late:
                        out.keep_first(out.late, (prefix, timestamp), row)
                    else:
                        add(row)
                        add_time(timestamp)
                    continue
            except (struct.error, OverflowError) as e:
                rare = ReasonCode.STORE_REJECTED, f"{type(e).__name__}: {e}"
            out.rejected.append(Rejected(index, _place(readings, reading), *rare))


def _place(readings: Sequence[StoredReading], reading: StoredReading) -> int:
    """Which of the readings this one is; equal ones are not the same. Counting would cost every reading."""
    return next(n for n, other in enumerate(readings) if other is reading)


def _encode_rare(
    reading: StoredReading, timestamp: int, known: Series, topic: str, bounds: Bounds
) -> bytes | tuple[ReasonCode, str]:
    """A row with text, flags or another unit, up to its tail; or why there is none."""
    value, text, flags = reading.value, reading.value_text, reading.flags
    fault = timestamp_code(timestamp, oldest_us=bounds.oldest, newest_us=bounds.newest)
    fault = fault or value_fault(value, text, flags)
    if fault is not None:
        return fault
    prefix, unit, series_topic = known
    if value is None:
        row = prefix + _NO_VALUE(timestamp - TIMESTAMP_MIN_US, 2, reading.quality, -1)
    else:
        row = prefix + _VALUE.pack(timestamp - TIMESTAMP_MIN_US, 2, reading.quality, 8, value)
    if flags:
        items = b"".join(_text(flag) for flag in flags)
        # Array (PostgreSQL source, array_send): dimensions, has-null flag, element type; then length, lower bound.
        array = struct.pack(">iiiii", 1, 0, _TEXT_OID, len(flags), 1) + items
        packed_flags = struct.pack(">i", len(array)) + array
    else:
        packed_flags = _NULL
    own_unit = own_topic = _NULL
    if reading.unit != unit:
        if fault_text := text_fault(reading.unit, NAME_CHARS_MAX):
            return ReasonCode.STORE_REJECTED, f"unit {fault_text}"
        own_unit = _text(reading.unit)
    if topic != series_topic:
        if fault_text := text_fault(topic, TOPIC_CHARS_MAX):
            return ReasonCode.STORE_REJECTED, f"topic {fault_text}"
        own_topic = _text(topic)
    return row + (_NULL if text is None else _text(text)) + packed_flags + own_unit + own_topic


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack(">i", len(encoded)) + encoded


def _newest(parts: Sequence[Rows]) -> dict[bytes, bytes]:
    """The newest row of each series by its prefix, in the order of the series; of equal times that of the last part."""
    rows = (row for part in parts for row in part.values())
    return _newest_of(sorted(rows, key=lambda row: row[:_KEY_BYTES]))


def _newest_of(rows: Iterable[bytes]) -> dict[bytes, bytes]:
    # Two writers in opposite orders would wait for each other, so rows are sorted anyway. As bytes they sort like their
    # keys: series numbers and times since 2000 are positive.
    return {row[: PREFIX.size]: row for row in rows}


def _columns(rows: Collection[bytes]) -> list[Any]:
    """series_id, timestamp, value, value_text, quality, received_at of rows; times in µs since 2000."""
    if set(map(len, rows)) == {_PLAIN.size}:
        series, timestamps, qualities, values, received = zip(*_PLAIN.iter_unpack(b"".join(rows)), strict=True)
        return [series, timestamps, values, (), qualities, received]  # unnest fills the shorter array with NULL
    return list(zip(*map(_read_row, rows), strict=True))


def _value_of(row: bytes) -> tuple[float | None, str | None]:
    """Number and text of a row."""
    _, _, value, text, _, _ = _read_row(row)
    return value, text


def _read_row(row: bytes) -> tuple[int, int, float | None, str | None, int, int]:
    if len(row) == _PLAIN.size:
        series_id, timestamp, quality, value, received_at = _PLAIN.unpack(row)
        return series_id, timestamp, value, None, quality, received_at
    _, series_id, _, timestamp, _, quality, length = struct.unpack_from(">iiiqihi", row)
    at = struct.calcsize(">iiiqihi")
    value, text = None, None
    if length == 8:
        value = struct.unpack_from(">d", row, at)[0]
        at += 8
    length = int.from_bytes(row[at : at + 4], signed=True)
    if length >= 0:
        text = row[at + 4 : at + 4 + length].decode()
    received_at = struct.unpack_from(">q", row, len(row) - _TAIL_BYTES + 4)[0]
    return series_id, timestamp, value, text, quality, received_at


def find_refused(
    messages: Sequence[StoredMessage], refused: Mapping[tuple[bytes, int], str], series: Mapping[SeriesKey, Series]
) -> list[Rejected]:
    """Which readings the refused rows were: of those with the same key the one that was tried."""
    found: dict[tuple[bytes, int], Rejected] = {}
    for index, position, message, reading, key in _keyed(messages, series):
        if key in refused and (key not in found or reading.revised or message.generation):
            found[key] = Rejected(index, position, ReasonCode.STORE_REJECTED, refused[key])
    return list(found.values())


def find_second(
    messages: Sequence[StoredMessage],
    standing: Standing,
    series: Mapping[SeriesKey, Series],
) -> list[Rejected]:
    """Which readings are second values at an instant of their series."""
    found = []
    for index, position, message, reading, key in _keyed(messages, series):
        if key in standing and not reading.revised and not message.generation:
            value, text = standing[key]
            if reading.value != value or reading.value_text != text:
                there = text if value is None else value
                found.append(
                    Rejected(index, position, ReasonCode.SAME_INSTANT, f"{there!r:.200} stands at this instant")
                )
    return found


def _keyed(
    messages: Sequence[StoredMessage], series: Mapping[SeriesKey, Series]
) -> Iterator[tuple[int, int, StoredMessage, StoredReading, tuple[bytes, int]]]:
    """Every reading of a known series with its place and its row's key."""
    for index, message in enumerate(messages):
        for position, reading in enumerate(message.readings):
            known = series.get(
                (message.device_id, message.connector_mode, reading.component_type, reading.pin_position)
            )
            if known is not None:
                at = message.timestamp if reading.timestamp is UNSET else reading.timestamp
                yield index, position, message, reading, (known[0], at)


@dataclass(frozen=True, slots=True)
class CopyMessage:
    """What a binary COPY sends."""

    columns: tuple[str, ...]
    data: bytearray


def copy_message(ordered: list[bytes]) -> CopyMessage:
    """Of rows sorted by key: two writers in opposite orders would wait for each other."""
    columns = _PLAIN_COLUMNS
    if set(map(len, ordered)) != {_PLAIN.size}:
        columns = COLUMNS
        ordered = [row[:_RARE_AT] + _NULLS + row[_RARE_AT:] if len(row) == _PLAIN.size else row for row in ordered]
    data = bytearray(_HEADER)
    data += struct.pack(">h", len(columns)).join([b"", *ordered])
    data += _TRAILER
    return CopyMessage(columns, data)


def staged(part: Rows) -> tuple[CopyMessage, list[int]]:
    """The COPY of some rows, and their timestamps."""
    return copy_message(sorted(part.values())), [at for _, at in part]


#: Ranges of changed minutes in one write; beyond it hours are marked, then days: a clock that is ahead may touch many.
_RANGES_MAX: Final = 64
#: A write of so few minutes or hours marks all of them, whatever its rows are.
_MINUTES_WHOLE: Final = 3
_HOURS_WHOLE: Final = 2
#: Pairs of series and hour in one row of `rollup_dirty`.
_PAIRS_MAX: Final = 1_000
_MINUTE_US: Final = 60_000_000
_HOUR_US: Final = 60 * _MINUTE_US


@dataclass(frozen=True, slots=True)
class Marks:
    """What the roll-ups must look at again (the table `rollup_dirty`).

    What comes as it is measured marks minutes of all series: most have a row in them, and they are few. What comes later marks
    hours of its own series, so that one device that was away costs what its rows cost.
    """

    #: of all series: begin and end, µs since 2000
    ranges: list[tuple[int, int]]
    #: series, and beside each the hour of it, counted since 2000; the oldest first
    series: list[int]
    hours: list[int]
    #: the same cut into rows of the table: number of the first, of the last (1 is the first), whether views look at it
    slices: list[tuple[int, int, bool]]


#: The number of its series, in the first bytes of a row.
_SERIES_OF: Final = itemgetter(slice(4, 8))


def marks_of(rows: Sequence[bytes], times: Sequence[int], series: Collection[bytes], bounds: Bounds) -> Marks:
    """The marks of rows.

    A write of one or two hours marks them for each of its series: that asks nothing of the single row, and to make an hour again
    that has not changed is cheap. More hours (a back-fill) are marked for the series that have a row in them.

    Args:
        rows: each row, or the prefix that it begins with.
        times: their timestamps, µs since the epoch.
        series: the prefixes of the rows, each once, in order.
        bounds: what is current, and what is of today.
    """
    if not times:
        return Marks([], [], [], [])
    oldest, newest = min(times), max(times)
    first = bounds.current // _MINUTE_US
    current = first * _MINUTE_US
    minutes: Collection[int] = ()
    if newest >= current:
        begin, end = max(oldest // _MINUTE_US, first), newest // _MINUTE_US + 1
        minutes = range(begin, end)
        if len(minutes) > _MINUTES_WHOLE:
            minutes = {m for m in map(floordiv, times, repeat(_MINUTE_US)) if m >= first}
    if oldest >= current:
        return Marks(_ranges(minutes), [], [], [])
    late = range(oldest // _HOUR_US, min(newest, current - 1) // _HOUR_US + 1)
    if len(late) <= _HOURS_WHOLE:
        numbers = [prefix[4:8] for prefix in series]
        pairs = [(hour, number) for hour in late for number in numbers]
    else:
        # Functions of C over whole columns: half the time of a loop, and all rows of a back-fill come here.
        found = zip(map(floordiv, times, repeat(_HOUR_US)), map(_SERIES_OF, rows), strict=True)
        if newest >= current:
            pairs = sorted({pair for pair, at in zip(found, times, strict=True) if at < current})
        else:
            pairs = sorted(set(found))
    origin = TIMESTAMP_MIN_US // _HOUR_US
    hours = [hour - origin for hour, _ in pairs]
    numbers_of = list(struct.unpack(f">{len(pairs)}i", b"".join([number for _, number in pairs])))
    # Some are shown by the views at once: they stand in rows of their own.
    old = bisect_left(hours, bounds.today // _HOUR_US - origin)
    slices = [
        (begin + 1, min(begin + _PAIRS_MAX, end), shown)
        for start, end, shown in ((0, old, False), (old, len(hours), True))
        for begin in range(start, end, _PAIRS_MAX)
    ]
    return Marks(_ranges(minutes), numbers_of, hours, slices)


def _ranges(minutes: Collection[int]) -> list[tuple[int, int]]:
    """Time ranges, µs since 2000, in whole minutes, hours or days, that hold all `minutes`, counted since the epoch."""
    ranges: list[tuple[int, int]] = []
    for width in (1, 60, 1440):
        ranges = []
        for bucket in sorted({m // width for m in minutes}):
            if ranges and ranges[-1][1] == bucket:
                ranges[-1] = (ranges[-1][0], bucket + 1)
            else:
                ranges.append((bucket, bucket + 1))
        in_us = width * _MINUTE_US
        ranges = [(begin * in_us - TIMESTAMP_MIN_US, end * in_us - TIMESTAMP_MIN_US) for begin, end in ranges]
        if len(ranges) <= _RANGES_MAX:
            break
    return ranges


@dataclass(frozen=True, slots=True)
class Latest:
    """What a write says of `latest` and of the roll-ups."""

    series: frozenset[bytes]  #: their prefixes
    columns: list[Any]  #: of their newest rows, see `_columns`
    marks: Marks

    @classmethod
    def of(cls, newest: dict[bytes, bytes], marks: Marks) -> "Latest":
        """Of the newest row of each series."""
        columns = _columns(newest.values()) if newest else [(), (), (), (), (), ()]
        return cls(frozenset(newest), columns, marks)


def latest_of(parts: Sequence[Rows], bounds: Bounds) -> Latest:
    """Of the rows of the live table and `Encoded.others`; of two of one key that of the last part counts."""
    live, _, *others = parts  # what is staged is marked when it is merged: until then it is in no roll-up
    keys = [key for part in (live, *others) for key in part]
    prefixes = [prefix for prefix, _ in keys]
    marks = marks_of(prefixes, [at for _, at in keys], sorted(set(prefixes)), bounds)
    return Latest.of(_newest(parts), marks)
