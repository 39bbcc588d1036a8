"""The sink's stages: from records to the store, each reading exactly once, and every refusal on `iot_errors`.

A handler call may be several transactions: rows are what a transaction costs, and a record may hold many. What is
stored is acknowledged by the store's own offsets, so a call that fails half-way goes on where the store stands. Error
lines are acknowledged by Kafka before the transaction that skips their input is committed.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from msgspec import to_builtins
from msgspec.structs import replace

from preservarium import metrics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.legacy import legacy_message
from preservarium.domain.readings.reading import ErrorLine
from preservarium.domain.readings.stored import StoredMessage, parse_messages
from preservarium.errors import ReasonCode, Reject
from preservarium.settings import Settings
from preservarium.stores.base import Move, Moves, Rejected, Store, WriteResult
from preservarium.streaming.records import error_line, error_send, generation_of, loads, parse_alone, parse_trusted
from preservarium.streaming.stage import Batch, Effects, Record, Send
from preservarium.waiting import alive

#: Sends records and returns when Kafka has acknowledged all of them; raises Retry where it cannot.
Publish = Callable[[Sequence[Send]], Awaitable[Any]]

#: Lines of each record, aligned with the batch, and error lines for what could not be read.
Parse = Callable[[Batch], tuple[list[list[Any]], list[ErrorLine]]]

#: Kafka's record times are milliseconds.
_MS_US: Final = 1_000


#: Line within its record, which of that line's readings is the first of this piece, and the piece: the line, or a part.
_Piece = tuple[int, int, Any]


@dataclass(slots=True)
class _Chunk:
    """What goes into one transaction."""

    messages: list[Any] = field(default_factory=list)
    sources: list["_Source"] = field(default_factory=list)
    errors: list[ErrorLine] = field(default_factory=list)
    nexts: dict[int, int] = field(default_factory=dict)  #: partition -> next offset
    rows: int = 0

    def add(self, batch: Batch, record: Record, piece: _Piece) -> None:
        """One message."""
        index, first, line = piece
        self.sources.append(_Source(len(self.messages), batch, (record,), index, first))
        self.messages.append(line)

    def source(self, message: int) -> tuple["_Source", Record]:
        """Where a message came from."""
        source = self.sources[bisect_right(self.sources, message, key=lambda s: s.message) - 1]
        return source, source.records[message - source.message]


class _Source(NamedTuple):
    """Where messages came from that follow each other, one of each record: without an entry for each."""

    message: int  #: index of the first of them
    batch: Batch
    records: Sequence[Record]
    line: int  #: within its record
    first: int  #: which reading of that line is the message's first


class _Stage:
    """What the sink's stages have in common: offsets that the store holds, chunks, error lines."""

    def __init__(
        self,
        name: str,
        topic: str,
        store: Any,
        publish: Publish,
        settings: Callable[[], Settings],
        *,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.topic = topic
        self.store = store
        self._publish = publish
        self._settings = settings
        self._clock = clock or SystemClock()
        #: partition -> next offset that the store holds; None: it holds none
        self._positions: dict[int, int | None] = {}

    async def on_assigned(self, partitions: list[int]) -> dict[int, int]:
        """Where to start: where the store stands, wherever Kafka's commit is; at the beginning where it holds nothing.

        Raises:
            Retry: the store cannot be reached.
        """
        offsets = await self.store.offsets(self.topic, partitions)
        self._positions.update(offsets)
        return {partition: offset or 0 for partition, offset in offsets.items()}

    async def __call__(self, batches: Sequence[Batch]) -> Effects:
        """Store what the batches hold.

        Raises:
            Retry: the store, or Kafka for error lines, cannot be reached; what is stored shows in `on_assigned`.
        """
        unknown = [b.partition for b in batches if b.partition not in self._positions]
        if unknown:
            await self.on_assigned(unknown)
        effects = Effects()
        chunk = _Chunk()
        records_max = self._settings().sink.rows_max
        for batch in batches:
            records = self._after(batch)
            for start in range(0, len(records), records_max):
                await asyncio.sleep(0)  # so many are a few milliseconds of parsing
                part = batch.part(records[start : start + records_max])
                chunk = await self._gather(part, chunk, effects)
        if chunk.nexts:
            await self._flush(chunk, effects)
        return effects

    async def _gather(self, batch: Batch, chunk: _Chunk, effects: Effects) -> _Chunk:
        """Add a batch to the chunk; where it has no room, that is stored before. Gives the chunk that is open."""
        rows_max = self._rows_max()
        records = batch.records
        plain = self._parse_plain(records, rows_max)
        if plain is not None:
            lines, rows = plain
            chunk = await self._with_room(chunk, rows, rows_max, effects)
            chunk.sources.append(_Source(len(chunk.messages), batch, records, 0, 0))
            chunk.messages += lines
            chunk.rows += rows
            chunk.nexts[batch.partition] = records[-1].offset + 1
            return chunk
        parsed, errors = self._parse(batch)
        errors_by_offset: dict[int, list[ErrorLine]] = {}
        for error in errors:
            errors_by_offset.setdefault(error["offset"], []).append(error)
        for record, lines in zip(records, parsed, strict=True):
            part, rows = self._measure(batch, record, lines, errors_by_offset)
            chunk = await self._with_room(chunk, rows, rows_max, effects)
            if rows > rows_max:
                part = await self._flush_pieces(batch, record, part, rows_max, effects)
                rows = sum(self._rows(line) for _, _, line in part)
            for piece in part:
                chunk.add(batch, record, piece)
            chunk.rows += rows
            if record.offset in errors_by_offset:
                chunk.errors += errors_by_offset[record.offset]
            chunk.nexts[batch.partition] = record.offset + 1
        return chunk

    async def _with_room(self, chunk: _Chunk, rows: int, rows_max: int, effects: Effects) -> _Chunk:
        """The chunk, or a new one once that is stored, where so many rows are too many for it."""
        if not chunk.rows or chunk.rows + rows <= rows_max:
            return chunk
        await self._flush(chunk, effects)
        return _Chunk()

    def _after(self, batch: Batch) -> Sequence[Record]:
        """The records that the store does not hold yet."""
        position = self._positions[batch.partition]
        if position is None or batch.records[0].offset >= position:
            return batch.records
        return [record for record in batch.records if record.offset >= position]

    def _measure(
        self, batch: Batch, record: Record, lines: list[Any], errors: dict[int, list[ErrorLine]]
    ) -> tuple[list[_Piece], int]:
        """The lines, and how many rows they are; a line that is not what it should be is an error."""
        part: list[_Piece] = []
        rows = 0
        for index, line in enumerate(lines):
            try:
                rows += self._rows(line)
            except (TypeError, KeyError, AttributeError) as e:
                errors.setdefault(record.offset, []).append(
                    self._error(
                        batch, record, index, ReasonCode.ENVELOPE_INVALID, f"{type(e).__name__}: {e}", line, None
                    )
                )
            else:
                part.append((index, 0, line))
        return part, rows

    async def _flush_pieces(
        self, batch: Batch, record: Record, part: list[_Piece], rows_max: int, effects: Effects
    ) -> list[_Piece]:
        """All but the last piece of a record too large for one transaction; gives the last piece.

        Only the last one moves the offset. A crash in between repeats the record, whose stored rows are duplicates
        then.
        """
        pieces = [(index, *piece) for index, _, line in part for piece in self._pieces(line, rows_max)]
        chunk, waiting = _Chunk(), 0
        for at, piece in enumerate(pieces):
            rows = self._rows(piece[2])
            if chunk.rows and chunk.rows + rows > rows_max:
                await self._flush(chunk, effects, stay=batch.partition)
                chunk, waiting = _Chunk(), at
            chunk.add(batch, record, piece)
            chunk.rows += rows
        return pieces[waiting:]

    async def _flush(self, chunk: _Chunk, effects: Effects, *, stay: int | None = None) -> None:
        """One transaction.

        Args:
            chunk: its content.
            effects: counts what is refused.
            stay: the partition whose offset does not move yet: a writer that is behind must still be found out.
        """
        moves: dict[tuple[str, int], Move] = {}
        for partition, next_offset in chunk.nexts.items():
            moves[self.topic, partition] = Move(self._positions[partition], next_offset)
        if stay is not None and (held := self._positions[stay]) is not None:
            moves[self.topic, stay] = Move(held, held)

        refused: list[ErrorLine] = []

        async def tell(rejected: Sequence[Rejected]) -> None:
            refused[:] = [*chunk.errors, *(self._rejected(chunk, r) for r in rejected)]
            if refused:
                record_bytes_max = self._settings().kafka.record_bytes_max
                await self._publish([error_send(line, record_bytes_max=record_bytes_max) for line in refused])

        try:
            result = await self._store(chunk.messages, moves, tell)
        except BaseException:
            # Whether it was committed is not known: ask before the next try.
            for partition in (*chunk.nexts, *(() if stay is None else (stay,))):
                self._positions.pop(partition, None)
            raise
        self._positions.update(chunk.nexts)
        alive()
        metrics.READINGS.labels(self.name).inc(result.accepted)
        for error in refused:
            effects.refused[error["code"]] = effects.refused.get(error["code"], 0) + 1

    def _rejected(self, chunk: _Chunk, rejected: Rejected) -> ErrorLine:
        source, record = chunk.source(rejected.message)
        line = self._one(chunk.messages[rejected.message], record, source.line, source.first + rejected.reading)
        return self._error(source.batch, record, source.line, rejected.code, rejected.text, line, line)

    def _error(
        self, batch: Batch, record: Record, index: int, code: ReasonCode, text: str, raw: Any, message: Any
    ) -> ErrorLine:
        try:
            original = to_bytes(raw)
        except TypeError:
            original = record.value or b""
        coordinates = {}
        if isinstance(message, dict):
            names = ("raw_partition", "raw_offset", "raw_index", "config_rev", "generation")
            coordinates = {name: message[name] for name in names if type(message.get(name)) is int}
            coordinates |= {n: message[n] for n in ("device_id", "parser") if isinstance(message.get(n), str)}
        return error_line(
            self.name,
            code,
            text,
            topic=batch.topic,
            partition=batch.partition,
            record=record,
            index=index,
            raw=original,
            now_us=self._clock.now_us(),
            **({"device_id": record.key.decode("utf-8", "replace") if record.key else None} | coordinates),
        )

    # --- what differs

    def _rows_max(self) -> int:
        """Rows of one transaction."""
        return self._settings().sink.rows_max

    def _parse_plain(self, records: Sequence[Record], rows_max: int) -> tuple[list[Any], int] | None:
        """The lines of records of one line each, and how many rows they are together; None where that is too simple."""
        return None

    def _parse(self, batch: Batch) -> tuple[list[list[Any]], list[ErrorLine]]:
        return parse_trusted(batch, stage=self.name, now_us=self._clock.now_us())

    def _rows(self, line: Any) -> int:
        """Rows that a line becomes; raises TypeError, KeyError or AttributeError where it is none."""
        raise NotImplementedError

    def _pieces(self, line: Any, rows_max: int) -> list[tuple[int, Any]]:
        """The line, or, where it is too large for one transaction, several that say the same; with their first reading."""
        return [(0, line)]

    def _one(self, line: Any, record: Record, index: int, reading: int) -> Any:
        """The part of a record's line that one rejected row came from, so that it can be sent again alone."""
        return line

    async def _store(self, lines: list[Any], moves: Moves, tell: Callable[[Sequence[Rejected]], Any]) -> WriteResult:
        raise NotImplementedError


class _ReadingStage(_Stage):
    """Whatever becomes readings in the store."""

    store: Store

    def _rows_max(self) -> int:
        return self._settings().sink.transaction_rows_max

    def _rows(self, line: Any) -> int:
        readings = _readings(line)
        if type(readings) is not list:
            message = "readings is no list"
            raise TypeError(message)
        return len(readings)

    def _pieces(self, line: Any, rows_max: int) -> list[tuple[int, Any]]:
        readings = _readings(line)
        if len(readings) <= rows_max:
            return [(0, line)]
        return [
            (first, _with_readings(line, readings[first : first + rows_max]))
            for first in range(0, len(readings), rows_max)
        ]

    async def _store(self, lines: list[Any], moves: Moves, tell: Callable[[Sequence[Rejected]], Any]) -> WriteResult:
        return await self.store.write(lines, moves, before_commit=tell)


def _readings(line: Any) -> Any:
    return line.readings if isinstance(line, StoredMessage) else line["readings"]


def _with_readings(line: Any, readings: list[Any]) -> Any:
    if isinstance(line, StoredMessage):
        return replace(line, readings=readings)
    return {**line, "readings": readings}


class ReadingSink(_ReadingStage):
    """Validated messages into the store.

    Args:
        name: of the stage, in error lines and metrics.
        topic: declared name of what it reads.
        store: where to.
        publish: for error lines.
        settings: asked each time.
        clock: stamps error lines.
    """

    def _parse_plain(self, records: Sequence[Record], rows_max: int) -> tuple[list[Any], int] | None:
        lines = parse_alone(records, parse_messages)
        if lines is None:
            return None
        rows = sum([len(line.readings) for line in lines])
        return (lines, rows) if rows <= rows_max else None

    def _parse(self, batch: Batch) -> tuple[list[list[Any]], list[ErrorLine]]:
        return parse_trusted(batch, stage=self.name, now_us=self._clock.now_us(), parse=parse_messages)

    def _one(self, line: Any, record: Record, index: int, reading: int) -> Any:
        # As it came: what is typed holds only what is stored.
        try:
            original = loads((record.value or b"").split(b"\n")[index])
        except Reject:  # too deep, say, in a field that the typed parser passes over
            return to_builtins(line)
        return _with_readings(original, original["readings"][reading : reading + 1])


class LegacySink(_ReadingStage):
    """The old service's messages into the store, with the same guarantees."""

    def _parse(self, batch: Batch) -> tuple[list[list[Any]], list[ErrorLine]]:
        parsed: list[list[Any]] = []
        errors: list[ErrorLine] = []
        for record in batch.records:
            messages = []
            for index, raw in enumerate((record.value or b"").split(b"\n")):
                if not raw.strip() and index:
                    continue
                try:
                    messages.append(
                        legacy_message(
                            loads(raw),
                            received_at=record.timestamp * _MS_US,
                            partition=batch.partition,
                            offset=record.offset,
                            index=index,
                            generation=generation_of(record),
                        )
                    )
                except Reject as e:
                    errors.append(
                        error_line(
                            self.name,
                            ReasonCode.LEGACY_INVALID,
                            str(e),
                            topic=batch.topic,
                            partition=batch.partition,
                            record=record,
                            index=index,
                            raw=raw,
                            device_id=record.key.decode("utf-8", "replace") if record.key else None,
                            now_us=self._clock.now_us(),
                        )
                    )
            parsed.append(messages)
        return parsed, errors


class EventStoring(Protocol):
    """Keeps the events of one topic, each exactly once by its key."""

    async def offsets(self, topic: str, partitions: Sequence[int]) -> dict[int, int | None]:
        """As `Store.offsets`."""
        ...

    async def write(
        self,
        lines: Sequence[Mapping[str, Any]],
        moves: Moves,
        *,
        before_commit: Callable[[Sequence[Rejected]], Awaitable[None]] | None = None,
    ) -> WriteResult:
        """As `Store.write`; a line is an event."""
        ...


class EventSink(_Stage):
    """Events into their table (preservarium/stores/tables.py)."""

    store: EventStoring

    def _rows(self, line: Any) -> int:
        if type(line) is not dict:
            message = "not an object"
            raise TypeError(message)
        return 1

    async def _store(self, lines: list[Any], moves: Moves, tell: Callable[[Sequence[Rejected]], Any]) -> WriteResult:
        return await self.store.write(lines, moves, before_commit=tell)
