"""Readings into PostgreSQL, with TimescaleDB or without: rows and offsets in one transaction, by binary COPY.

The way of a write:

1. The messages, typed, become rows of PostgreSQL's binary COPY format in one pass: a prefix that is kept per series, and
   one call that makes the whole of a plain row. Rows sort by key as bytes.
2. In one transaction: compare-and-set of `sink_offsets`, `latest`, then COPY straight into `measurements`.
3. COPY meets a key that is stored: the same rows go through a temporary table and `ON CONFLICT DO NOTHING`.
4. PostgreSQL refuses the data: the rows are bisected under savepoints to those that it refuses; the rest commits.
5. Anything else is the database's fault, not the data's: `Retry`. Whether the transaction was committed shows in
   `sink_offsets`, which the caller reads again.

What overwrites takes paths of its own, because ON CONFLICT DO UPDATE into compressed chunks decompresses them: rows of
a later generation (a deliberate replay), and revisions (a later verdict on a reading that stands). Whatever the order of
arrival, the highest generation stays, in it a revision rather than the reading, and of several revisions the one whose
message was received last. Rows older than the compression horizon are staged in
`measurements_late` and merged by `maintain`, chunk by chunk.
"""

import asyncio
import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import asyncpg
import structlog
from msgspec import UNSET

from preservarium.clock import Clock
from preservarium.domain.errors import ReasonCode
from preservarium.domain.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Message
from preservarium.domain.stored import StoredMessage, StoredReading
from preservarium.settings import Settings
from preservarium.stores.base import (
    DAY_US,
    FUTURE_MAX_US,
    NAME_CHARS_MAX,
    TOPIC_CHARS_MAX,
    BeforeCommit,
    Moved,
    Moves,
    Rejected,
    WriteResult,
    derivation_fault,
    series_fault,
    text_fault,
    timestamp_code,
    value_fault,
)
from preservarium.stores.breaker import Breaker
from preservarium.stores.postgres import DATA_ERRORS, MOVED, OffsetStore, PostgresPool, count_of
from preservarium.stores.typed import Typed, typed

_log = structlog.get_logger(__name__)

#: The names of the series and derivations that are in memory. 200,000 series are about 60 MB; beyond, all are
#: forgotten and read again as they come.
CACHE_MAX: Final = 200_000
#: Messages encoded before others have their turn: a millisecond. So the rows of one flight are made while the database
#: works on those of another, and nothing else in the process waits for 5,000 rows.
SLICE_MESSAGES: Final = 500
#: Staged rows moved in one transaction: some 100 ms, so that live writes never wait long.
LATE_ROWS_MAX: Final = 20_000
#: A week of a large fleet is rolled up at some 100,000 rows a second; what takes longer goes on at the next turn.
REFRESH_TIMEOUT_S: Final = 600.0
#: One worker refreshes at a time: TimescaleDB refuses a second one.
_REFRESH_LOCK: Final = 7_236_481_303
_REFRESH_WINDOW: Final = """
SELECT date_bin('1 day', now() - make_interval(days => $1), '2000-01-01 00:00+00') + INTERVAL '1 day',
       date_bin('1 day', now(), '2000-01-01 00:00+00')"""

_COLUMNS: Final = (
    "series_id", "timestamp", "quality", "value", "value_text", "flags", "unit", "topic",
    "received_at", "raw_partition", "raw_offset", "raw_index", "generation", "derivation_id",
)  # fmt: skip
_COLUMN_LIST: Final = ", ".join(_COLUMNS)
#: Most rows have nothing in these; a batch without them leaves them out of its COPY.
_RARE_COLUMNS: Final = ("value_text", "flags", "unit", "topic")
_PLAIN_COLUMNS: Final = tuple(c for c in _COLUMNS if c not in _RARE_COLUMNS)

# Binary COPY (PostgreSQL manual, COPY, "Binary Format"): a count of fields, then length and bytes of each; -1 is NULL.
# Rows are kept without the count; a plain row is one of _PLAIN_COLUMNS with a value, and no other has its length.
_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER: Final = struct.pack(">h", -1)
_PREFIX: Final = struct.Struct(">iii")  # 4 series_id | length of the timestamp
_VALUE: Final = struct.Struct(">qihid")  # timestamp | 2 quality | 8 value
_NO_VALUE: Final = struct.Struct(">qihi").pack  # timestamp | 2 quality | -1
_TAIL: Final = struct.Struct(">iqihiqii")  # 8 received_at | 2 raw_partition | 8 raw_offset | 4 raw_index
_DERIVATION: Final = struct.Struct(">iiii")  # 4 generation | 4 derivation_id
_NULL: Final = struct.pack(">i", -1)
_NULLS: Final = _NULL * len(_RARE_COLUMNS)
_TAIL_BYTES: Final = _TAIL.size + _DERIVATION.size
_RARE_AT: Final = _PREFIX.size + _VALUE.size  #: where the rare columns belong in a plain row
_ROW: Final = struct.Struct(">12sq10sdiq10sqii16s")  #: a plain row: prefix | _VALUE | _TAIL | _DERIVATION
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
_Series = tuple[bytes, str, str]
#: (series prefix, timestamp) -> row
_Rows = dict[tuple[bytes, int], bytes]

#: What a connection needs before it is used here.
PREPARE: Final = "CREATE TEMP TABLE IF NOT EXISTS sink_staging (LIKE measurements) ON COMMIT DELETE ROWS"
#: Only where one transaction merges twice is there anything to clear.
_CLEAR_STAGING: Final = "DELETE FROM sink_staging"
_MERGE: Final = f"""
INSERT INTO measurements ({_COLUMN_LIST}) SELECT {_COLUMN_LIST} FROM sink_staging
ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO NOTHING"""
_MERGE_LATE: Final = f"""
INSERT INTO measurements_late ({_COLUMN_LIST}) SELECT {_COLUMN_LIST} FROM sink_staging
ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO NOTHING"""
_SET: Final = ", ".join(f"{c} = excluded.{c}" for c in _COLUMNS[2:])
_CORRECT: Final = f"""
INSERT INTO measurements AS m ({_COLUMN_LIST}) SELECT {_COLUMN_LIST} FROM sink_staging
ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO UPDATE
SET {_SET}, revised = NULL WHERE m.generation < excluded.generation"""
_REVISE: Final = f"""
INSERT INTO measurements AS m ({_COLUMN_LIST}, revised) SELECT {_COLUMN_LIST}, true FROM sink_staging
ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO UPDATE
SET {_SET}, revised = true WHERE m.generation < excluded.generation OR (m.generation = excluded.generation AND (
  m.revised IS NOT TRUE OR (m.received_at, m.raw_partition, m.raw_offset, m.raw_index)
    < (excluded.received_at, excluded.raw_partition, excluded.raw_offset, excluded.raw_index)))"""
#: After one of the two: what overwrote a newest reading is the newest reading.
_CORRECT_LATEST: Final = """
UPDATE latest AS l SET value = m.value, value_text = m.value_text, quality = m.quality, received_at = m.received_at
FROM sink_staging AS c JOIN measurements AS m USING (series_id, timestamp)
WHERE l.series_id = m.series_id AND l.timestamp = m.timestamp"""
_EPOCH_SQL: Final = "'2000-01-01 00:00+00'::timestamptz"

_DIRTY: Final = f"""
dirty AS (
  INSERT INTO rollup_dirty SELECT {_EPOCH_SQL} + f * INTERVAL '1 microsecond', {_EPOCH_SQL} + t * INTERVAL '1 microsecond'
  FROM unnest($13::bigint[], $14::bigint[]) AS u(f, t)),"""
_NEWEST: Final = f"""(
  SELECT s, {_EPOCH_SQL} + t * INTERVAL '1 microsecond' AS t, v, x, q, {_EPOCH_SQL} + r * INTERVAL '1 microsecond' AS r
  FROM unnest($7::int[], $8::bigint[], $9::float8[], $10::text[], $11::int[], $12::bigint[]) AS u(s, t, v, x, q, r))"""
#: Where every series is known to have its row: a third cheaper than to look first.
_UPDATE_LATEST: Final = f"""
  UPDATE latest AS l SET timestamp = t, value = v, value_text = x, quality = q, received_at = r
  FROM {_NEWEST} AS u WHERE l.series_id = s AND t > l.timestamp"""
_UPSERT_LATEST: Final = f"""
  INSERT INTO latest AS l (series_id, timestamp, value, value_text, quality, received_at) SELECT s, t, v, x, q, r FROM {_NEWEST} AS u
  ON CONFLICT (series_id) DO UPDATE SET timestamp = excluded.timestamp, value = excluded.value, value_text = excluded.value_text,
    quality = excluded.quality, received_at = excluded.received_at
  WHERE excluded.timestamp > l.timestamp"""
_SELECT_SERIES: Final = """
SELECT s.series_id, s.device_id, s.connector_mode, s.component_type, s.pin_position, s.unit, s.topic
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS u(d, m, c, p)
JOIN series s ON s.device_id = u.d AND s.connector_mode = u.m AND s.component_type = u.c AND s.pin_position = u.p"""
_INSERT_SERIES: Final = """
INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit, topic)
SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) AS u(d, m, c, p, unit, topic)
ORDER BY d, c, p, m ON CONFLICT (device_id, component_type, pin_position, connector_mode) DO NOTHING
RETURNING series_id, device_id, connector_mode, component_type, pin_position, unit, topic"""
_SELECT_DERIVATIONS: Final = """
SELECT d.derivation_id, d.parser, d.config_rev, d.experiment_id FROM unnest($1::text[], $2::bigint[], $3::text[]) AS u(p, r, e)
JOIN derivations d ON d.parser = u.p AND d.config_rev = u.r AND d.experiment_id = u.e"""
_INSERT_DERIVATIONS: Final = """
INSERT INTO derivations (parser, config_rev, experiment_id)
SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[]) AS u(p, r, e) ORDER BY p, r, e
ON CONFLICT (parser, config_rev, experiment_id) DO NOTHING
RETURNING derivation_id, parser, config_rev, experiment_id"""


@dataclass(slots=True)
class _Encoded:
    """The rows of a write."""

    plain: list[bytes] = field(default_factory=list)  #: of the live table, in the order of arrival
    times: list[int] = field(default_factory=list)  #: their timestamps
    late: _Rows = field(default_factory=dict)
    corrections: _Rows = field(default_factory=dict)  #: of a later generation than the live one
    revisions: _Rows = field(default_factory=dict)  #: later verdicts on readings that stand
    #: of the rows of `corrections` and `revisions`: what decides between two of one key
    ranks: dict[tuple[bytes, int], tuple[int, ...]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    readings: int = 0
    missing: bool = False  #: a series or derivation is not known yet; the rest is incomplete
    _rows: _Rows | None = None
    _message: "_CopyMessage | None" = None
    _latest: "_Latest | None" = None
    _sorted: list[bytes] | None = None

    async def prepare(self) -> None:
        """Make what the transaction sends, so that no connection is held, and no lock, while Python works."""
        if not self.missing:
            self.message()
            await asyncio.sleep(0)
            self.latest()

    def rows(self) -> _Rows:
        """The rows of the live table by key, of two with one key the last.

        COPY does without: it meets the second one as it meets one that is stored, and then this is asked for.
        """
        if self._rows is None:
            self._rows = {(row[: _PREFIX.size], at): row for row, at in zip(self.plain, self.times, strict=True)}
            if len(self._rows) < len(self.plain):
                self.plain, self.times = list(self._rows.values()), [at for _, at in self._rows]
                self._message = self._latest = self._sorted = None
        return self._rows

    def message(self) -> "_CopyMessage":
        """The COPY of the live table's rows."""
        if self._message is None:
            self._message = _copy_message(self._ordered())
        return self._message

    def _ordered(self) -> list[bytes]:
        """The rows by key, sorted once for all who need them so."""
        if self._sorted is None:
            self._sorted = sorted(self.plain)
        return self._sorted

    def latest(self) -> "_Latest":
        """The newest values, and the changed ranges of time, of all parts."""
        if self._latest is None:
            others = self.others()
            if any(part for part, _ in others):
                self._latest = _latest([self.rows(), *(part for part, _ in others)])
            else:
                self._latest = _Latest.of(_newest_of(self._ordered()), self.times)
        return self._latest

    def others(self) -> tuple[tuple[_Rows, str], ...]:
        """Rows besides the live ones with the statement that merges them, in the order in which one may overwrite the other."""
        return ((self.late, _MERGE_LATE), (self.corrections, _CORRECT), (self.revisions, _REVISE))

    def overwrite(self, part: _Rows, key: tuple[bytes, int], row: bytes, rank: tuple[int, ...]) -> None:
        """Add a correction or revision; of two of one key the higher rank stays, of equal ones the later."""
        if key not in part or rank >= self.ranks[key]:
            part[key] = row
            self.ranks[key] = rank


class TimescaleStore(OffsetStore):
    """The store of readings (see preservarium/stores/base.py for what it promises).

    Args:
        settings: asked at each write.
        sink: whose offsets; each consumer group has its own.
        pool: shared connections, prepared by `PREPARE`; its own where none is given.
        clock: for retention.
        breaker: shared by all that use the database; its own where none is given.
        copy_first: False goes through the temporary table always (for measurements).
        late_lane: whether old rows are staged; None: where TimescaleDB compresses.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        *,
        sink: str = "sink",
        pool: PostgresPool | None = None,
        clock: Clock | None = None,
        breaker: Breaker | None = None,
        copy_first: bool = True,
        late_lane: bool | None = None,
    ) -> None:
        pool = pool or PostgresPool(settings, prepare=PREPARE)
        super().__init__(settings, sink=sink, pool=pool, clock=clock, breaker=breaker)
        self._copy_first = copy_first
        self._late_lane = late_lane
        self._merge_next = not copy_first
        #: rows came, here or in a process before, that the roll-ups' policies do not look at any more
        self._rollups_behind = True
        self._series: dict[SeriesKey, _Series] = {}
        #: prefixes of series that have a row in `latest`
        self._has_latest: set[bytes] = set()
        self._derivations: dict[DerivationKey, int] = {}
        #: (parser, config_rev, experiment_id, generation) -> the last 16 bytes of a row
        self._tails: dict[tuple[str, int, str | None, int], bytes] = {}

    async def write(
        self, messages: Sequence[StoredMessage | Message], moves: Moves, *, before_commit: BeforeCommit | None = None
    ) -> WriteResult:
        """Store readings and offsets, or neither; see `Store.write`."""
        return await self._counted(lambda: self._write(typed(messages), moves, before_commit))

    # --- one write

    async def _write(self, sent: Typed, moves: Moves, before_commit: BeforeCommit | None) -> WriteResult:
        await self._pool.ready()  # the engine decides about the late lane
        now_us = self._clock.now_us()
        sink = self._settings().sink
        bounds = _Bounds(
            oldest=max(TIMESTAMP_MIN_US, now_us - sink.retention_days * DAY_US),
            newest=min(TIMESTAMP_MAX_US - 1, now_us + FUTURE_MAX_US),
            late=now_us - sink.compress_after_days * DAY_US if self._stages_late() else TIMESTAMP_MIN_US,
        )
        encoded = await _encode(sent.messages, self._series.get, self._tails.get, bounds, None)
        await encoded.prepare()
        async with self._pool.acquire() as connection, self._fence(connection, moves):
            if not self._merge_next:
                try:
                    return await self._transaction(connection, sent, encoded, moves, bounds, before_commit, "copy")
                except asyncpg.UniqueViolationError:
                    self._merge_next = True
                except DATA_ERRORS:
                    pass
            try:
                result = await self._transaction(connection, sent, encoded, moves, bounds, before_commit, "merge")
            except DATA_ERRORS:
                result = await self._transaction(connection, sent, encoded, moves, bounds, before_commit, "bisect")
            if self._copy_first and not result.duplicates:
                self._merge_next = False
            return result

    async def _transaction(
        self,
        connection: Any,
        sent: Typed,
        encoded: _Encoded,
        moves: Moves,
        bounds: "_Bounds",
        before_commit: BeforeCommit | None,
        how: str,
    ) -> WriteResult:
        """One transaction. Names made in it are kept in memory only once it is committed."""
        names: _Names | None = None
        async with connection.transaction():
            if encoded.missing:
                names = await self._resolve(connection, sent.messages)
                encoded = await _encode(sent.messages, names.series.get, names.tails.get, bounds, names)
            refused: dict[tuple[bytes, int], str] = {}
            accepted = 0
            if how == "bisect":
                stored = []
                for part, statement in ((encoded.rows(), _MERGE), *encoded.others()):
                    accepted += await self._bisect(connection, sorted(part.items()), statement, refused)
                    stored.append({k: v for k, v in part.items() if k not in refused})
                newest = await self._advance(connection, moves, _latest(stored))
            else:
                live = {} if how == "copy" else encoded.rows()
                newest = await self._advance(connection, moves, encoded.latest())
                if how == "copy" and encoded.plain:
                    await _copy(connection, "measurements", encoded.message())
                    accepted += len(encoded.plain)
                for part, statement in ((live, _MERGE), *encoded.others()):
                    if part:
                        accepted += await self._merge(connection, part.values(), statement)
            found = encoded.rejected
            if refused:
                known = self._series if names is None else names.series
                found = sorted([*found, *_find(sent.messages, refused, known)], key=lambda r: (r.message, r.reading))
            rejected = sent.rejected(found)
            if before_commit is not None:
                await before_commit(rejected)
        if names is not None:
            self._keep(names)
        self._has_latest.update(newest)
        return WriteResult(accepted, encoded.readings - accepted - len(found), rejected)

    async def _advance(self, connection: Any, moves: Moves, latest: "_Latest") -> Collection[bytes]:
        """Compare-and-set of the offsets, newest values, and what the roll-ups must look at again.

        Returns:
            Prefixes of the series, all of which have a row in `latest` once this is committed.

        Raises:
            Moved: without positions: they are read when this transaction is undone.
        """
        known = await self._move_fresh(connection, moves)
        if not known and not latest.series:
            return ()
        arguments = [*(known or [self.sink, self._settings().sink.generation, [], [], [], []]), *latest.columns]
        plain = self._pool.engine != "timescaledb"
        if plain:
            arguments += [[f for f, _ in latest.dirty], [t for _, t in latest.dirty]]
        known_series = self._has_latest.issuperset(latest.series)
        upsert = _UPDATE_LATEST if known_series else _UPSERT_LATEST
        statement = f"{MOVED},{_DIRTY if plain else ''} newest AS ({upsert}) SELECT count(*) FROM moved"
        moved = await connection.fetchval(statement, *arguments)
        if moved != len(arguments[2]):
            raise Moved({})
        return latest.series

    async def _merge(self, connection: Any, rows: Iterable[bytes], statement: str) -> int:
        """Through the temporary table. Returns how many rows were stored."""
        overwrites = statement in (_CORRECT, _REVISE)
        if overwrites and self._pool.engine == "timescaledb":
            # A replay may touch more compressed rows than the limit that guards against accidents.
            await connection.execute("SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0")
        await connection.execute(_CLEAR_STAGING)
        await _copy(connection, "sink_staging", _copy_message(sorted(rows)))
        stored = count_of(await connection.execute(statement))
        if overwrites and stored:
            await connection.execute(_CORRECT_LATEST)
        return stored

    async def _bisect(
        self,
        connection: Any,
        items: list[tuple[tuple[bytes, int], bytes]],
        statement: str,
        refused: dict[tuple[bytes, int], str],
    ) -> int:
        """Store what can be stored of `items`; the others with PostgreSQL's reason go to `refused`."""
        if not items:
            return 0
        try:
            async with connection.transaction():
                return await self._merge(connection, [row for _, row in items], statement)
        except DATA_ERRORS as e:
            if len(items) == 1:
                refused[items[0][0]] = f"{type(e).__name__}: {e}"
                return 0
        half = len(items) // 2
        return await self._bisect(connection, items[:half], statement, refused) + await self._bisect(
            connection, items[half:], statement, refused
        )

    # --- names

    async def _resolve(self, connection: Any, messages: Sequence[StoredMessage]) -> "_Names":
        """Every series and derivation of the messages: known ones from memory, others read or made."""
        names = _Names()
        series: dict[SeriesKey, tuple[str, str]] = {}
        derivations: set[DerivationKey] = set()
        generations: set[tuple[DerivationKey, int]] = set()
        for message in messages:
            derivation = (message.parser, message.config_rev, message.experiment_id)
            if derivation in self._derivations:
                names.derivations[derivation] = self._derivations[derivation]
            elif derivation_fault(derivation) is None:
                derivations.add(derivation)
            generations.add((derivation, message.generation))
            for reading in message.readings:
                key = (message.device_id, message.connector_mode, reading.component_type, reading.pin_position)
                known = self._series.get(key)
                if known is not None:
                    names.series[key] = known
                elif key not in series and series_fault(key, reading.unit, message.topic) is None:
                    series[key] = (reading.unit, message.topic)
        await self._resolve_series(connection, series, names)
        await self._resolve_derivations(connection, derivations, names)
        for derivation, generation in generations:
            number = names.derivations.get(derivation)
            if number is not None and _is_int4(generation):
                names.tails[(*derivation, generation)] = _DERIVATION.pack(4, generation, 4, number)
        return names

    async def _resolve_series(self, connection: Any, wanted: dict[SeriesKey, tuple[str, str]], names: "_Names") -> None:
        for statement in (_SELECT_SERIES, _INSERT_SERIES, _SELECT_SERIES):
            # The last look is for what another transaction made meanwhile: one statement does not see it.
            missing = [key for key in wanted if key not in names.series]
            if not missing:
                return
            columns: list[list[str]] = [list(c) for c in zip(*missing, strict=True)]
            if statement is _INSERT_SERIES:
                columns += [[wanted[k][0] for k in missing], [wanted[k][1] for k in missing]]
            for number, device, mode, component, pin, unit, topic in await connection.fetch(statement, *columns):
                names.series[device, mode, component, pin] = (_PREFIX.pack(4, number, 8), unit, topic)

    async def _resolve_derivations(self, connection: Any, wanted: set[DerivationKey], names: "_Names") -> None:
        for statement in (_SELECT_DERIVATIONS, _INSERT_DERIVATIONS, _SELECT_DERIVATIONS):
            missing = [key for key in wanted if key not in names.derivations]
            if not missing:
                return
            keys = {(parser, rev, experiment or "") for parser, rev, experiment in missing}
            columns = [list(c) for c in zip(*keys, strict=True)]
            for number, parser, rev, experiment in await connection.fetch(statement, *columns):
                for key in ((parser, rev, experiment or None), (parser, rev, experiment)):
                    if key in wanted:
                        names.derivations[key] = number

    def _keep(self, names: "_Names") -> None:
        """Remember the names of a committed transaction."""
        if len(self._series) + len(names.series) > CACHE_MAX:
            self._series.clear()
            self._has_latest.clear()
        if len(self._derivations) > CACHE_MAX or len(self._tails) > CACHE_MAX:
            self._derivations.clear()
            self._tails.clear()
        self._series.update(names.series)
        self._derivations.update(names.derivations)
        self._tails.update(names.tails)

    def _forget(self) -> None:
        for cache in (self._series, self._derivations, self._tails, self._has_latest):
            cache.clear()

    def _stages_late(self) -> bool:
        return self._pool.engine == "timescaledb" if self._late_lane is None else self._late_lane

    # --- upkeep

    async def maintain(self) -> None:
        """One turn of the timer: partitions, retention and roll-ups where TimescaleDB does not, and the late lane.

        Several workers may call it: one does the work, the others return.

        Raises:
            Retry: the database cannot be reached.
        """
        s = self._settings().sink

        async def work(connection: Any) -> None:
            if self._pool.engine == "plain":
                await connection.fetchval("SELECT storage_maintain($1, $2)", s.chunk_days, s.retention_days)
            if self._stages_late():
                chunk = f"{s.chunk_days} days"
                merge = "SELECT merge_late($1::text::interval, $2)"
                while await connection.fetchval(merge, chunk, LATE_ROWS_MAX):
                    self._rollups_behind = True
            if self._rollups_behind and self._pool.engine == "timescaledb":
                self._rollups_behind = not await self._refresh_old(connection, s.retention_days)

        await self._ask(work)

    async def _refresh_old(self, connection: Any, retention_days: int) -> bool:
        """Bring TimescaleDB's roll-ups to the rows that came after the policies had passed their time.

        From the first whole day that retention keeps (a refresh over a dropped range would delete its aggregates) to
        the beginning of today (the open bucket must stay beyond the watermark, or it would be missing), the lower level
        first. Ranges in which nothing changed cost nothing: TimescaleDB knows them.

        Returns:
            Whether it was done; not where a refresh is under way elsewhere.
        """
        if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _REFRESH_LOCK):
            return False  # another worker is at it, and may have begun before our rows came
        try:
            start, end = await connection.fetchrow(_REFRESH_WINDOW, retention_days)
            for level in ("measurement_1m", "measurement_1h", "measurement_1d"):
                statement = f"CALL refresh_continuous_aggregate('{level}', $1::timestamptz, $2::timestamptz)"
                await connection.execute(statement, start, end, timeout=REFRESH_TIMEOUT_S)
        except asyncpg.PostgresError as e:
            _log.warning("roll-ups of late rows put off", error=repr(e), action="tried again at the next turn")
            return False
        finally:
            await connection.execute("SELECT pg_advisory_unlock($1)", _REFRESH_LOCK)
        return True

    async def apply_policies(self) -> None:
        """Bring TimescaleDB's chunk interval, compression and retention to what the settings say.

        Raises:
            Retry: the database cannot be reached.
        """
        s = self._settings().sink

        async def work(connection: Any) -> None:
            if self._pool.engine == "timescaledb":
                statement = "SELECT storage_policies($1, $2, $3)"
                await connection.execute(statement, s.chunk_days, s.compress_after_days, s.retention_days)

        await self._ask(work)

    async def failing_jobs(self) -> list[str]:
        """Background jobs whose last run failed, for health: they fail silently otherwise.

        Raises:
            Retry: the database cannot be reached.
        """

        async def look(connection: Any) -> list[str]:
            rows = await connection.fetch("SELECT job FROM storage_jobs WHERE NOT succeeded ORDER BY job")
            return [row[0] for row in rows]

        return await self._ask(look)


@dataclass(slots=True)
class _Names:
    """Series and derivations of one write."""

    series: dict[SeriesKey, _Series] = field(default_factory=dict)
    derivations: dict[DerivationKey, int] = field(default_factory=dict)
    tails: dict[tuple[str, int, str | None, int], bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Times that are stored, µs since the epoch."""

    oldest: int
    newest: int
    late: int  #: rows older than this are staged


async def _encode(
    messages: Sequence[StoredMessage],
    series: Callable[[SeriesKey], _Series | None],
    tails: Callable[[tuple[str, int, str | None, int]], bytes | None],
    bounds: _Bounds,
    names: _Names | None,
) -> _Encoded:
    """Rows of the messages, made in slices between which others have their turn.

    Args:
        messages: readings.
        series: known series.
        tails: known derivations.
        bounds: times that are stored.
        names: given on the second pass, when everything that can be known is: what is missing then is invalid.
    """
    out = _Encoded()
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
    out: _Encoded,
    series: Callable[[SeriesKey], _Series | None],
    tails: Callable[[tuple[str, int, str | None, int]], bytes | None],
    bounds: _Bounds,
    names: _Names | None,
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
                        out.late[prefix, timestamp] = row
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
    reading: StoredReading, timestamp: int, known: _Series, topic: str, bounds: _Bounds
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


def _is_int4(value: Any) -> bool:
    return type(value) is int and -(2**31) <= value < 2**31


def _newest(parts: Sequence[_Rows]) -> dict[bytes, bytes]:
    """The newest row of each series by its prefix, in the order of the series; of equal times that of the last part."""
    rows = (row for part in parts for row in part.values())
    return _newest_of(sorted(rows, key=lambda row: row[: _PREFIX.size + 8]))


def _newest_of(rows: Iterable[bytes]) -> dict[bytes, bytes]:
    # Two writers in opposite orders would wait for each other, so rows are sorted anyway. As bytes they sort like their
    # keys: series numbers and times since 2000 are positive.
    return {row[: _PREFIX.size]: row for row in rows}


def _columns(rows: Collection[bytes]) -> list[Any]:
    """series_id, timestamp, value, value_text, quality, received_at of rows; times in µs since 2000."""
    if set(map(len, rows)) == {_PLAIN.size}:
        series, timestamps, qualities, values, received = zip(*_PLAIN.iter_unpack(b"".join(rows)), strict=True)
        return [series, timestamps, values, (), qualities, received]  # unnest fills the shorter array with NULL
    return list(zip(*map(_read_row, rows), strict=True))


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


def _find(
    messages: Sequence[StoredMessage], refused: Mapping[tuple[bytes, int], str], series: Mapping[SeriesKey, _Series]
) -> list[Rejected]:
    """Which readings the refused rows were: the last of those with the same key, as only that one was tried."""
    found: dict[tuple[bytes, int], Rejected] = {}
    for index, message in enumerate(messages):
        for position, reading in enumerate(message.readings):
            known = series.get(
                (message.device_id, message.connector_mode, reading.component_type, reading.pin_position)
            )
            if known is None:
                continue
            key = known[0], message.timestamp if reading.timestamp is UNSET else reading.timestamp
            if key in refused:
                found[key] = Rejected(index, position, ReasonCode.STORE_REJECTED, refused[key])
    return list(found.values())


@dataclass(frozen=True, slots=True)
class _CopyMessage:
    """What a binary COPY sends."""

    columns: tuple[str, ...]
    data: bytearray


def _copy_message(ordered: list[bytes]) -> _CopyMessage:
    """Of rows sorted by key: two writers in opposite orders would wait for each other."""
    columns = _PLAIN_COLUMNS
    if set(map(len, ordered)) != {_PLAIN.size}:
        columns = _COLUMNS
        ordered = [row[:_RARE_AT] + _NULLS + row[_RARE_AT:] if len(row) == _PLAIN.size else row for row in ordered]
    data = bytearray(_HEADER)
    data += struct.pack(">h", len(columns)).join([b"", *ordered])
    data += _TRAILER
    return _CopyMessage(columns, data)


async def _copy(connection: Any, table: str, message: _CopyMessage) -> None:
    await connection.copy_to_table(table, source=message.data, columns=message.columns, format="binary")


@dataclass(frozen=True, slots=True)
class _Latest:
    """What a write says of `latest` and of the roll-ups."""

    series: frozenset[bytes]  #: their prefixes
    columns: list[Any]  #: of their newest rows, see `_columns`
    dirty: list[tuple[int, int]]  #: changed ranges of time, see `_dirty_ranges`

    @classmethod
    def of(cls, newest: dict[bytes, bytes], times: Iterable[int]) -> "_Latest":
        """Of the newest row of each series, and the timestamps of all rows."""
        columns = _columns(newest.values()) if newest else [(), (), (), (), (), ()]
        return cls(frozenset(newest), columns, _dirty_ranges(times))


def _latest(parts: Sequence[_Rows]) -> _Latest:
    return _Latest.of(_newest(parts), (timestamp for part in parts for _, timestamp in part))


#: Ranges of changed minutes in one write; beyond it hours are marked, then days: a back-fill touches thousands.
_DIRTY_RANGES_MAX: Final = 64


def _dirty_ranges(times: Iterable[int]) -> list[tuple[int, int]]:
    """Time ranges, µs since 2000, in whole minutes, hours or days, that hold all `times`, µs since the epoch."""
    minute = 60_000_000
    minutes = {timestamp // minute for timestamp in times}
    ranges: list[tuple[int, int]] = []
    for width in (1, 60, 1440):
        buckets = sorted({m // width for m in minutes})
        ranges = []
        for bucket in buckets:
            if ranges and ranges[-1][1] == bucket:
                ranges[-1] = (ranges[-1][0], bucket + 1)
            else:
                ranges.append((bucket, bucket + 1))
        ranges = [(f * width * minute - TIMESTAMP_MIN_US, t * width * minute - TIMESTAMP_MIN_US) for f, t in ranges]
        if len(ranges) <= _DIRTY_RANGES_MAX:
            break
    return ranges
