"""Readings into PostgreSQL, with TimescaleDB or without: rows and offsets in one transaction, by binary COPY.

The way of a write:

1. The messages, typed, become rows of PostgreSQL's binary COPY format in one pass (timescale_rows.py).
2. In one transaction: compare-and-set of `sink_offsets`, `latest`, then COPY straight into `measurements`.
3. COPY meets a key that is stored: the same rows go through a temporary table and `ON CONFLICT DO NOTHING`, and what stands
   with another value is told. Where the write before met nothing new, the rows are looked up first.
4. PostgreSQL refuses the data: the rows are bisected under savepoints to those that it refuses; the rest commits.
5. Anything else is the database's fault, not the data's: `Retry`. Whether the transaction was committed shows in
   `sink_offsets`, which the caller reads again.

What overwrites takes paths of its own, because ON CONFLICT DO UPDATE into compressed chunks decompresses them: rows of
a later generation (a deliberate replay), and revisions (a later verdict on a reading that stands). Whatever the order of
arrival, the highest generation stays, in it a revision rather than the reading, and of several revisions the one whose
message was received last. Rows older than the compression horizon are staged in `measurements_late`, where none stands in
either table, and merged by `maintain`, chunk by chunk. What the roll-ups must look at again is marked in the transaction of the
rows; `maintain` looks at that and at nothing else (upkeep.py).
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final

from preservarium.breaker import Breaker
from preservarium.clock import Clock
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Message
from preservarium.domain.readings.stored import StoredMessage
from preservarium.settings import Settings
from preservarium.stores.base import (
    DAY_US,
    FUTURE_MAX_US,
    BeforeCommit,
    Moved,
    Moves,
    WriteResult,
    derivation_fault,
    series_fault,
)
from preservarium.stores.postgres import DATA_ERRORS, MOVED, OffsetStore, PostgresPool, count_of
from preservarium.stores.timescale_rows import (
    COLUMN_LIST,
    COLUMNS,
    DERIVATION,
    PREFIX,
    Bounds,
    CopyMessage,
    DerivationKey,
    Encoded,
    Latest,
    Names,
    Series,
    SeriesKey,
    Standing,
    encode,
    find_refused,
    find_second,
    latest_of,
    staged,
)
from preservarium.stores.typed import Typed, typed
from preservarium.stores.upkeep import Upkeep

#: The names of the series and derivations that are in memory. 200,000 series are about 60 MB; beyond, all are
#: forgotten and read again as they come.
CACHE_MAX: Final = 200_000
#: What is this old is not current: it marks the hours of its own series, not minutes of all (see `Marks`). Devices that
#: send at once are within it.
CURRENT_US: Final = 600_000_000
#: After midnight, the views of the roll-ups still know at once of the day before, until its last rows are there.
MIDNIGHT_US: Final = 3_600_000_000

#: What a connection needs before it is used here.
STAGING: Final = "sink_staging (LIKE measurements)"
#: Only where one transaction merges twice is there anything to clear.
_CLEAR_STAGING: Final = "DELETE FROM sink_staging"


def _standing(came: str, tables: str) -> str:
    """What stands where rows of the temporary table came, and whether that is another value of the same generation.

    A revised row has overwritten one on purpose.
    """
    return f"""
  SELECT c.series_id, c.timestamp, m.value, m.value_text, m.generation = c.generation AND m.revised IS NOT TRUE
    AND (m.value IS DISTINCT FROM c.value OR m.value_text IS DISTINCT FROM c.value_text) AS is_other
  FROM {came} AS c CROSS JOIN LATERAL ({tables} LIMIT 1) AS m"""


#: LIMIT has each row looked up by its key. A join would be planned by what is known of a temporary table, nothing, and may read
#: all of `measurements`. $1 and $2 are the first and the last instant of the rows: partitions without any are not looked at.
_BY_KEY: Final = "series_id = c.series_id AND timestamp = c.timestamp AND timestamp BETWEEN $1 AND $2"
_LIVE: Final = f"SELECT value, value_text, quality, received_at, generation, revised FROM measurements WHERE {_BY_KEY}"
#: A row that is staged counts where none is in the live table: `merge_late` would not overwrite that one.
_LATE: Final = f"""{_LIVE}
  UNION ALL SELECT value, value_text, quality, received_at, generation, NULL FROM measurements_late WHERE {_BY_KEY}"""
#: How many rows stand, and of those with another value the keys (series, µs since the epoch) and what they say.
_STOOD: Final = """
  count(*), array_agg(series_id) FILTER (WHERE is_other),
  array_agg((extract(epoch FROM timestamp) * 1000000)::bigint) FILTER (WHERE is_other),
  array_agg(value) FILTER (WHERE is_other), array_agg(value_text) FILTER (WHERE is_other) FROM stands"""
#: What an INSERT has just stored is not seen by the statement that it is a part of: a lookup finds what stood before.
_MERGE: Final = f"""
WITH new AS (
  INSERT INTO measurements ({COLUMN_LIST}) SELECT {COLUMN_LIST} FROM sink_staging
  ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO NOTHING RETURNING series_id, timestamp),
old AS (
  SELECT series_id, timestamp, generation, value, value_text FROM sink_staging AS c
  WHERE NOT EXISTS (SELECT FROM new WHERE new.series_id = c.series_id AND new.timestamp = c.timestamp)),
stands AS ({_standing("old", _LIVE)})
SELECT (SELECT count(*) FROM new), {_STOOD}"""
_MERGE_LATE: Final = f"""
WITH stands AS MATERIALIZED ({_standing("sink_staging", _LATE)}),
new AS (
  INSERT INTO measurements_late ({COLUMN_LIST}) SELECT {COLUMN_LIST} FROM sink_staging AS c
  WHERE NOT EXISTS (SELECT FROM stands WHERE stands.series_id = c.series_id AND stands.timestamp = c.timestamp)
  ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO NOTHING RETURNING 1)
SELECT (SELECT count(*) FROM new), {_STOOD}"""
#: Of a merge: what it is to find, asked without storing anything.
_LOOK: Final = {
    _MERGE: f"WITH stands AS ({_standing('sink_staging', _LIVE)}) SELECT 0, {_STOOD}",
    _MERGE_LATE: f"WITH stands AS ({_standing('sink_staging', _LATE)}) SELECT 0, {_STOOD}",
}
_SET: Final = ", ".join(f"{c} = excluded.{c}" for c in COLUMNS[2:])
_CORRECT: Final = f"""
INSERT INTO measurements AS m ({COLUMN_LIST}) SELECT {COLUMN_LIST} FROM sink_staging
ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO UPDATE
SET {_SET}, revised = NULL WHERE m.generation < excluded.generation"""
_REVISE: Final = f"""
INSERT INTO measurements AS m ({COLUMN_LIST}, revised) SELECT {COLUMN_LIST}, true FROM sink_staging
ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO UPDATE
SET {_SET}, revised = true WHERE m.generation < excluded.generation OR (m.generation = excluded.generation AND (
  m.revised IS NOT TRUE OR (m.received_at, m.raw_partition, m.raw_offset, m.raw_index)
    < (excluded.received_at, excluded.raw_partition, excluded.raw_offset, excluded.raw_index)))"""
#: For `Encoded.others`, in its order.
_OTHERS: Final = (_MERGE_LATE, _CORRECT, _REVISE)
#: After a correction or a revision: what overwrote a newest reading is the newest reading.
_CORRECT_LATEST: Final = f"""
UPDATE latest AS l SET value = m.value, value_text = m.value_text, quality = m.quality, received_at = m.received_at
FROM sink_staging AS c CROSS JOIN LATERAL ({_LIVE} LIMIT 1) AS m WHERE l.series_id = c.series_id AND l.timestamp = c.timestamp"""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_SQL: Final = "'2000-01-01 00:00+00'::timestamptz"

#: What the roll-ups must look at again: see `Marks`.
_DIRTY: Final = f"""
dirty AS (
  INSERT INTO rollup_dirty (from_at, to_at)
  SELECT {_EPOCH_SQL} + f * INTERVAL '1 microsecond', {_EPOCH_SQL} + t * INTERVAL '1 microsecond'
  FROM unnest($13::bigint[], $14::bigint[]) AS u(f, t)),"""
_DIRTY_LATE: Final = f"""
dirty_late AS (
  INSERT INTO rollup_dirty (from_at, to_at, series, hours, visible)
  SELECT {_EPOCH_SQL} + ($16::int[])[f] * INTERVAL '1 hour', {_EPOCH_SQL} + (($16::int[])[t] + 1) * INTERVAL '1 hour',
         ($15::int[])[f:t], ($16::int[])[f:t], v
  FROM unnest($17::int[], $18::int[], $19::bool[]) AS u(f, t, v)),"""
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
#: Messages say which of their readings are circular; roll-ups go by the series.
_SET_CIRCULAR: Final = """
UPDATE series AS s SET circular = u.p FROM unnest($1::int[], $2::float8[]) AS u(s, p)
WHERE s.series_id = u.s AND s.circular IS DISTINCT FROM u.p"""
_SELECT_DERIVATIONS: Final = """
SELECT d.derivation_id, d.parser, d.config_rev, d.experiment_id FROM unnest($1::text[], $2::bigint[], $3::text[]) AS u(p, r, e)
JOIN derivations d ON d.parser = u.p AND d.config_rev = u.r AND d.experiment_id = u.e"""
_INSERT_DERIVATIONS: Final = """
INSERT INTO derivations (parser, config_rev, experiment_id)
SELECT * FROM unnest($1::text[], $2::bigint[], $3::text[]) AS u(p, r, e) ORDER BY p, r, e
ON CONFLICT (parser, config_rev, experiment_id) DO NOTHING
RETURNING derivation_id, parser, config_rev, experiment_id"""


class _Way(Enum):
    """How the rows of a write reach the live table. Each write takes the way that suited the one before."""

    COPY = "copy"  #: straight: none stands
    MERGE = "merge"  #: through the temporary table: some stand
    LOOK = "look"  #: looked up first: all stand
    BISECT = "bisect"  #: part by part: PostgreSQL refuses some

    @classmethod
    def after(cls, stood: int, *, of: int) -> "_Way":
        """The next way, where so many of the rows stood."""
        return cls.COPY if stood == 0 else cls.LOOK if stood == of else cls.MERGE


class TimescaleStore(OffsetStore):
    """The store of readings (see preservarium/stores/base.py for what it promises).

    Args:
        settings: asked at each write.
        sink: whose offsets; each consumer group has its own.
        pool: shared connections, with the temporary table `STAGING`; its own where none is given.
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
        pool = pool or PostgresPool(settings, temporary=STAGING)
        super().__init__(settings, sink=sink, pool=pool, clock=clock, breaker=breaker)
        self._copy_first = copy_first
        self._late_lane = late_lane
        #: what a worker's timers do
        self.upkeep = Upkeep(
            settings, pool=pool, clock=self._clock, breaker=self.breaker, stages_late=self._stages_late
        )
        self._way = _Way.COPY if copy_first else _Way.MERGE
        self._series: dict[SeriesKey, Series] = {}
        #: prefixes of series that have a row in `latest`
        self._has_latest: set[bytes] = set()
        self._derivations: dict[DerivationKey, int] = {}
        #: periods of circular series, as they are stored
        self._periods: dict[SeriesKey, float] = {}
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
        bounds = Bounds(
            oldest=max(TIMESTAMP_MIN_US, now_us - sink.retention_days * DAY_US),
            newest=min(TIMESTAMP_MAX_US - 1, now_us + FUTURE_MAX_US),
            late=now_us - sink.compress_after_days * DAY_US if self._stages_late() else TIMESTAMP_MIN_US,
            current=now_us - CURRENT_US,
            today=(now_us - MIDNIGHT_US) // DAY_US * DAY_US,
        )
        encoded = await encode(sent.messages, self._series.get, self._tails.get, bounds, None)
        await encoded.prepare(settled=self._way is not _Way.COPY)
        async with self._pool.acquire() as connection, self._fence(connection, moves):
            for way in dict.fromkeys((self._way, _Way.MERGE)):
                with suppress(*DATA_ERRORS):
                    return await self._transaction(connection, sent, encoded, moves, bounds, before_commit, way)
            return await self._transaction(connection, sent, encoded, moves, bounds, before_commit, _Way.BISECT)

    async def _transaction(
        self,
        connection: Any,
        sent: Typed,
        encoded: Encoded,
        moves: Moves,
        bounds: Bounds,
        before_commit: BeforeCommit | None,
        way: "_Way",
    ) -> WriteResult:
        """One transaction. Names made in it are kept in memory only once it is committed."""
        names: Names | None = None
        async with connection.transaction():
            if encoded.missing:
                names = await self._resolve(connection, sent.messages)
                encoded = await encode(sent.messages, names.series.get, names.tails.get, bounds, names)
            periods = await self._set_circular(connection, sent.messages, names)
            if way is not _Way.COPY:
                encoded.settle()
            refused: dict[tuple[bytes, int], str] = {}
            if way is _Way.BISECT:
                accepted, newest = await self._store_good(connection, moves, encoded, bounds, refused)
                stood = sum(key not in refused for key in encoded.rows()) - accepted[0]
            else:
                newest = await self._advance(connection, moves, encoded.latest())
                accepted = await self._store(connection, encoded, way)
                stood = len(encoded.plain) - accepted[0]
            found = encoded.rejected
            if refused or encoded.standing:
                known = self._series if names is None else names.series
                found = [*found, *find_refused(sent.messages, refused, known)]
                found += find_second(sent.messages, encoded.standing, known)
                found.sort(key=lambda r: (r.message, r.reading))
            rejected = sent.rejected(found)
            if before_commit is not None:
                await before_commit(rejected)
        if names is not None:
            self._keep(names)
        self._has_latest.update(newest)
        self._periods.update(periods)
        if self._copy_first and encoded.plain:
            self._way = _Way.after(stood + encoded.doubles, of=len(encoded.plain) + encoded.doubles)
        return WriteResult(sum(accepted), encoded.readings - sum(accepted) - len(found), rejected)

    async def _store(self, connection: Any, encoded: Encoded, way: "_Way") -> list[int]:
        """Store the rows. Returns how many of each part were stored: the live table's, then `Encoded.others`."""
        stored = 0
        if encoded.plain and way is _Way.COPY:
            await _copy(connection, "measurements", encoded.message())
            stored = len(encoded.plain)
        elif encoded.plain:
            look = way is _Way.LOOK
            stored = await self._merge(
                connection, encoded.message(), encoded.times, _MERGE, encoded.standing, look=look
            )
        return [
            stored,
            *[
                await self._merge(connection, *staged(part), statement, encoded.standing) if part else 0
                for part, statement in zip(encoded.others(), _OTHERS, strict=True)
            ],
        ]

    async def _store_good(
        self,
        connection: Any,
        moves: Moves,
        encoded: Encoded,
        bounds: Bounds,
        refused: dict[tuple[bytes, int], str],
    ) -> tuple[list[int], Collection[bytes]]:
        """Store the rows that PostgreSQL takes; the others with its reason go to `refused`. Returns as `_store`, and `_advance`."""
        accepted, stored = [], []
        for part, statement in zip((encoded.rows(), *encoded.others()), (_MERGE, *_OTHERS), strict=True):
            accepted.append(await self._bisect(connection, sorted(part.items()), statement, encoded.standing, refused))
            stored.append({k: v for k, v in part.items() if k not in refused})
        return accepted, await self._advance(connection, moves, latest_of(stored, bounds))

    async def _advance(self, connection: Any, moves: Moves, latest: Latest) -> Collection[bytes]:
        """Compare-and-set of the offsets, newest values, and what the roll-ups must look at again.

        Returns:
            Prefixes of the series, all of which have a row in `latest` once this is committed.

        Raises:
            Moved: without positions: they are read when this transaction is undone.
        """
        known = await self._move_fresh(connection, moves)
        if not known and not latest.series:
            return ()
        marks = latest.marks
        arguments = [*(known or [self.sink, self._settings().sink.generation, [], [], [], []]), *latest.columns]
        arguments += [[begin for begin, _ in marks.ranges], [end for _, end in marks.ranges]]
        dirty = _DIRTY
        if marks.slices:
            arguments += [marks.series, marks.hours, *map(list, zip(*marks.slices, strict=True))]
            dirty += _DIRTY_LATE
        known_series = self._has_latest.issuperset(latest.series)
        upsert = _UPDATE_LATEST if known_series else _UPSERT_LATEST
        statement = f"{MOVED},{dirty} newest AS ({upsert}) SELECT count(*) FROM moved"
        moved = await connection.fetchval(statement, *arguments)
        if moved != len(arguments[2]):
            raise Moved({})
        return latest.series

    async def _merge(
        self,
        connection: Any,
        message: CopyMessage,
        times: Collection[int],
        statement: str,
        standing: Standing,
        *,
        look: bool = False,
    ) -> int:
        """Through the temporary table.

        Args:
            connection: within the transaction.
            message: rows of different keys.
            times: their timestamps.
            statement: what becomes of them.
            standing: is told what stands where a row came with another value; not where the statement overwrites.
            look: whether all of them are thought to stand: then a look does, which costs less than to try to store them.

        Returns:
            How many rows were stored.
        """
        await connection.execute(_CLEAR_STAGING)
        await _copy(connection, "sink_staging", message)
        bounds = _instant(min(times)), _instant(max(times))
        if statement in (_CORRECT, _REVISE):
            if self._pool.engine == "timescaledb":
                # A replay may touch more compressed rows than the limit that guards against accidents.
                await connection.execute("SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0")
            stored = count_of(await connection.execute(statement))
            if stored:
                await connection.execute(_CORRECT_LATEST, *bounds)
            return stored
        stored, stood = 0, 0
        if look:
            _, stood = await _tell(connection, _LOOK[statement], bounds, standing)
        if stood < len(times):
            stored, stood = await _tell(connection, statement, bounds, standing)
        if stored + stood < len(times):
            # Others have stored some meanwhile: a statement sees what was committed when it began.
            await _tell(connection, _LOOK[statement], bounds, standing)
        return stored

    async def _bisect(
        self,
        connection: Any,
        items: list[tuple[tuple[bytes, int], bytes]],
        statement: str,
        standing: Standing,
        refused: dict[tuple[bytes, int], str],
    ) -> int:
        """Store what can be stored of `items`; the others with PostgreSQL's reason go to `refused`."""
        if not items:
            return 0
        try:
            async with connection.transaction():
                return await self._merge(connection, *staged(dict(items)), statement, standing)
        except DATA_ERRORS as e:
            if len(items) == 1:
                refused[items[0][0]] = f"{type(e).__name__}: {e}"
                return 0
        half = len(items) // 2
        return sum(
            [
                await self._bisect(connection, part, statement, standing, refused)
                for part in (items[:half], items[half:])
            ]
        )

    # --- names

    async def _resolve(self, connection: Any, messages: Sequence[StoredMessage]) -> Names:
        """Every series and derivation of the messages: known ones from memory, others read or made."""
        names = Names()
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
                names.tails[(*derivation, generation)] = DERIVATION.pack(4, generation, 4, number)
        return names

    async def _resolve_series(self, connection: Any, wanted: dict[SeriesKey, tuple[str, str]], names: Names) -> None:
        for statement in (_SELECT_SERIES, _INSERT_SERIES, _SELECT_SERIES):
            # The last look is for what another transaction made meanwhile: one statement does not see it.
            missing = [key for key in wanted if key not in names.series]
            if not missing:
                return
            columns: list[list[str]] = [list(c) for c in zip(*missing, strict=True)]
            if statement is _INSERT_SERIES:
                columns += [[wanted[k][0] for k in missing], [wanted[k][1] for k in missing]]
            for number, device, mode, component, pin, unit, topic in await connection.fetch(statement, *columns):
                names.series[device, mode, component, pin] = (PREFIX.pack(4, number, 8), unit, topic)

    async def _resolve_derivations(self, connection: Any, wanted: set[DerivationKey], names: Names) -> None:
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

    async def _set_circular(
        self, connection: Any, messages: Sequence[StoredMessage], names: Names | None
    ) -> dict[SeriesKey, float]:
        """Have the series of circular readings say their period; those that are new or have another one now."""
        series = self._series if names is None else names.series
        found: dict[SeriesKey, float] = {}
        for message in messages:
            if message.circular:
                for reading in message.readings:
                    key = (message.device_id, message.connector_mode, reading.component_type, reading.pin_position)
                    period = message.circular.get(reading.component_type)
                    if period is not None and key in series and self._periods.get(key) != period:
                        found[key] = period
        if found:
            ids = {PREFIX.unpack(series[key][0])[1]: period for key, period in found.items()}
            await connection.execute(_SET_CIRCULAR, sorted(ids), [ids[number] for number in sorted(ids)])
        return found

    def _keep(self, names: Names) -> None:
        """Remember the names of a committed transaction."""
        if len(self._series) + len(names.series) > CACHE_MAX:
            self._series.clear()
            self._has_latest.clear()
            self._periods.clear()
        if len(self._derivations) > CACHE_MAX or len(self._tails) > CACHE_MAX:
            self._derivations.clear()
            self._tails.clear()
        self._series.update(names.series)
        self._derivations.update(names.derivations)
        self._tails.update(names.tails)

    def _forget(self) -> None:
        for cache in (self._series, self._derivations, self._tails, self._has_latest, self._periods):
            cache.clear()

    def _stages_late(self) -> bool:
        return self._pool.engine == "timescaledb" if self._late_lane is None else self._late_lane

    # --- upkeep

    async def maintain(self) -> None:
        """See `Upkeep.turn`."""
        await self.upkeep.turn()

    async def apply_policies(self) -> None:
        """See `Upkeep.apply_policies`."""
        await self.upkeep.apply_policies()

    async def failing_jobs(self) -> list[str]:
        """See `Upkeep.failing_jobs`."""
        return await self.upkeep.failing_jobs()


async def _tell(
    connection: Any, statement: str, bounds: tuple[datetime, datetime], standing: Standing
) -> tuple[int, int]:
    """What a merge, or a look, finds: rows stored, rows that stood; those with another value go to `standing`."""
    stored, stood, *others = await connection.fetchrow(statement, *bounds)
    for series_id, at, value, text in zip(*[column or () for column in others], strict=True):
        standing[PREFIX.pack(4, series_id, 8), at] = value, text
    return stored, stood


def _instant(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)


async def _copy(connection: Any, table: str, message: CopyMessage) -> None:
    await connection.copy_to_table(table, source=message.data, columns=message.columns, format="binary")


def _is_int4(value: Any) -> bool:
    return type(value) is int and -(2**31) <= value < 2**31
