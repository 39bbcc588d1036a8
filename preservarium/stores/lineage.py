"""What the databases know of where a reading came from: rows by series and instant, windows, transitions, notices.

Every question goes by an index: a series and an instant, a device and a time, an alarm. None looks for raw coordinates alone, of
which there is no index. Functions work on a connection of asyncpg that the caller has; instants are µs since the epoch, UTC.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from preservarium.domain.quality.rederivation import StoredReading
from preservarium.domain.readings.address import canonical_address, spellings
from preservarium.domain.readings.lineage import Coordinates
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.events import instant, microseconds
from preservarium.stores.registry import SPELLED

#: Series of one device that are looked at: pins and modes of one component type, or all that a message may have brought.
SERIES_MAX: Final = 1_000
#: Rows of one answer that are told one by one.
ROWS_MAX: Final = 1_000
#: Windows that hold a reading: a few sizes, hopping ones several times.
WINDOWS_MAX: Final = 100
#: Transitions that one message brought: its device's rules.
TRANSITIONS_MAX: Final = 200
#: A transition is stored after its message was received; the alarm's last transition may be much later.
_TRANSITION_BEFORE: Final = timedelta(days=1)

_COLUMNS: Final = """
 s.device_id, s.connector_mode, s.component_type, s.pin_position, m.timestamp, m.value, m.value_text,
 coalesce(m.unit, s.unit) AS unit, coalesce(m.topic, s.topic) AS topic, m.quality, m.flags, m.received_at,
 m.raw_partition, m.raw_offset, m.raw_index, d.parser, d.config_rev, d.experiment_id, m.generation"""
_LIVE: Final = f"{_COLUMNS}, m.revised, m.ingested_at"
#: Rows that wait to be merged are neither revised nor is it noted when they came.
_LATE: Final = f"{_COLUMNS}, NULL::boolean AS revised, NULL::timestamptz AS ingested_at"
_JOINED: Final = "JOIN series s USING (series_id) JOIN derivations d USING (derivation_id)"

_SERIES: Final = """
SELECT series_id, connector_mode, component_type, pin_position FROM series
WHERE device_id = ANY ($1) AND ($2::text IS NULL OR component_type = $2) AND ($3::text IS NULL OR pin_position = $3)
  AND ($4::text IS NULL OR connector_mode = $4)
ORDER BY component_type, pin_position, connector_mode LIMIT $5"""
#: By the key of each series: a join would be planned as if the range held much.
_ROWS: Final = f"""
SELECT {_LIVE} FROM unnest($1::int[]) AS w(id)
CROSS JOIN LATERAL (SELECT * FROM measurements WHERE series_id = w.id AND timestamp BETWEEN $2 AND $3 ORDER BY timestamp LIMIT $4) AS m
{_JOINED}
UNION ALL
SELECT {_LATE} FROM unnest($1::int[]) AS w(id)
CROSS JOIN LATERAL (SELECT * FROM measurements_late WHERE series_id = w.id AND timestamp BETWEEN $2 AND $3 ORDER BY timestamp LIMIT $4) AS m
{_JOINED}"""
#: The last row of each series before an instant: what a later message may have brought a verdict on.
_BEFORE: Final = f"""
SELECT {_LIVE} FROM unnest($1::int[]) AS w(id)
CROSS JOIN LATERAL (SELECT * FROM measurements WHERE series_id = w.id AND timestamp < $2 ORDER BY timestamp DESC LIMIT 1) AS m
{_JOINED}"""
_NEAREST: Final = """
SELECT (SELECT max(timestamp) FROM measurements WHERE series_id = $1 AND timestamp < $2),
       (SELECT min(timestamp) FROM measurements WHERE series_id = $1 AND timestamp > $2)"""
_WINDOWS: Final = """
SELECT window_id, revision, size_s, hop_s, window_start, window_end, count, closed_by, generation, unit, stored_at FROM aggregates
WHERE device_id = $1 AND component_type = $2 AND pin_position = $3 AND connector_mode = $4
  AND window_start <= $5 AND window_start > $5 - INTERVAL '32 days' AND window_end > $5
ORDER BY size_s, window_start, generation LIMIT $6"""
_ROLLUPS: Final = """
SELECT '1m' AS name, bucket, records, n FROM measurement_1m WHERE series_id = $1 AND bucket = date_bin('1 minute', $2::timestamptz, '2000-01-01 00:00+00')
UNION ALL
SELECT '1h', bucket, records, n FROM measurement_1h WHERE series_id = $1 AND bucket = date_bin('1 hour', $2::timestamptz, '2000-01-01 00:00+00')
UNION ALL
SELECT '1d', bucket, records, n FROM measurement_1d WHERE series_id = $1 AND bucket = date_bin('1 day', $2::timestamptz, '2000-01-01 00:00+00')"""
_TRANSITIONS: Final = """
SELECT e.transition_id, e.alarm_id, e.rule, e.transition, e.state, e.severity, e.occurred_at, e.detected_at, e.value, e.generation,
       e.raw_index, e.detail ->> 'message' AS message, e.stored_at
FROM alarms a JOIN alarm_events e USING (alarm_id)
WHERE a.device_id = $1 AND a.updated_at >= $5 AND (e.raw_partition, e.raw_offset) = ($2, $3) AND ($4::int IS NULL OR e.raw_index = $4)
ORDER BY e.detected_at, e.transition_id LIMIT $6"""
_NOTICES: Final = """
SELECT delivery_id, recipient, channel, kind, outcome, answer, planned_at, settled_at, subject,
       (SELECT array_agg(t) FROM jsonb_array_elements_text(transitions) AS t WHERE t = ANY ($2)) AS told
FROM notice_deliveries
WHERE alarms ?| $1 AND EXISTS (SELECT FROM jsonb_array_elements_text(transitions) AS t WHERE t = ANY ($2))
ORDER BY planned_at, delivery_id LIMIT $3"""

#: A row of each of many series at or after an instant, else the one before it: a sample that goes by the key.
_SAMPLE: Final = f"""
SELECT {_LIVE} FROM unnest($1::int[], $2::timestamptz[]) AS w(id, at)
CROSS JOIN LATERAL (
  (SELECT * FROM measurements WHERE series_id = w.id AND timestamp >= w.at AND timestamp <= $4 ORDER BY timestamp LIMIT 1)
  UNION ALL
  (SELECT * FROM measurements WHERE series_id = w.id AND timestamp < w.at AND timestamp >= $3 ORDER BY timestamp DESC LIMIT 1)
  LIMIT 1) AS m
{_JOINED}"""
_ALL: Final = f"""
SELECT * FROM (
  SELECT {_LIVE} FROM measurements m {_JOINED} WHERE m.timestamp BETWEEN $1 AND $2
  UNION ALL
  SELECT {_LATE} FROM measurements_late m {_JOINED} WHERE m.timestamp BETWEEN $1 AND $2) AS r
ORDER BY raw_partition, raw_offset, raw_index"""
_COUNT: Final = """
SELECT (SELECT count(*) FROM measurements WHERE timestamp BETWEEN $1 AND $2)
     + (SELECT count(*) FROM measurements_late WHERE timestamp BETWEEN $1 AND $2)"""


def us(at: datetime | None) -> int | None:
    """µs of an instant; None where there is none."""
    return None if at is None else microseconds(at)


def bounded(at_us: int) -> datetime:
    """An instant as PostgreSQL takes it, within what rows may have."""
    return instant(min(max(at_us, TIMESTAMP_MIN_US), TIMESTAMP_MAX_US))


def reading_of(row: Mapping[str, Any]) -> StoredReading:
    """A row of these queries."""
    return StoredReading(
        device_id=row["device_id"],
        connector_mode=row["connector_mode"],
        component_type=row["component_type"],
        pin_position=row["pin_position"],
        timestamp=microseconds(row["timestamp"]),
        value=row["value"],
        value_text=row["value_text"],
        unit=row["unit"],
        topic=row["topic"],
        quality=row["quality"],
        flags=tuple(row["flags"] or ()),
        received_at=microseconds(row["received_at"]),
        raw=Coordinates(row["raw_partition"], row["raw_offset"], row["raw_index"]),
        parser=row["parser"],
        config_rev=row["config_rev"],
        experiment_id=row["experiment_id"],
        generation=row["generation"],
        revised=bool(row["revised"]),
        ingested_at=us(row["ingested_at"]),
    )


async def spelled(connection: Any, device_id: str) -> list[str]:
    """How a device may be written in the tables, that is named by any spelling of its address."""
    usual = spellings(device_id)
    if len(usual) < 2:
        return [device_id]
    found = [row["device_id"] for row in await connection.fetch(SPELLED, canonical_address(device_id))]
    return list(dict.fromkeys([*found, device_id, *usual]))


async def series_of(
    connection: Any, devices: Sequence[str], component_type: str | None, pin: str | None, mode: str | None
) -> list[Mapping[str, Any]]:
    """Series of a device in any of its spellings: `series_id`, `connector_mode`, `component_type`, `pin_position`."""
    rows: list[Mapping[str, Any]] = await connection.fetch(
        _SERIES, list(devices), component_type, pin, mode, SERIES_MAX
    )
    return rows


async def rows_between(connection: Any, series_ids: Sequence[int], from_us: int, to_us: int) -> list[StoredReading]:
    """Rows of series with an instant from `from_us` to `to_us`, both included; `ROWS_MAX` of each series."""
    rows = await connection.fetch(_ROWS, list(series_ids), bounded(from_us), bounded(to_us), ROWS_MAX)
    return sorted(map(reading_of, rows), key=lambda r: (r.timestamp, r.component_type, r.pin_position))


async def rows_before(connection: Any, series_ids: Sequence[int], at_us: int) -> list[StoredReading]:
    """The last row of each series before an instant."""
    rows = await connection.fetch(_BEFORE, list(series_ids), bounded(at_us))
    return [reading_of(row) for row in rows]


async def nearest(connection: Any, series_id: int, at_us: int) -> tuple[int | None, int | None]:
    """Instants of the rows of a series before and after an instant."""
    row = await connection.fetchrow(_NEAREST, series_id, bounded(at_us))
    return us(row[0]), us(row[1])


async def windows(connection: Any, stored: StoredReading) -> list[dict[str, Any]]:
    """Windows of the reading's series that hold its instant, of every size up to a month and every generation."""
    rows = await connection.fetch(
        _WINDOWS, stored.device_id, stored.component_type, stored.pin_position, stored.connector_mode,
        bounded(stored.timestamp), WINDOWS_MAX,
    )  # fmt: skip
    return [_plain(row) for row in rows]


async def rollups(connection: Any, series_id: int, at_us: int) -> list[dict[str, Any]]:
    """The minute, hour and day of the storage's roll-ups that hold an instant, as far as they are made."""
    return [_plain(row) for row in await connection.fetch(_ROLLUPS, series_id, bounded(at_us))]


async def transitions(
    connection: Any, device_id: str, raw: Coordinates, received_at: int, *, whole_record: bool = False
) -> list[dict[str, Any]]:
    """Alarm transitions that a message of the device brought; `whole_record`: any line of its raw record."""
    rows = await connection.fetch(
        _TRANSITIONS, device_id, raw.partition, raw.offset, None if whole_record else raw.line,
        bounded(received_at) - _TRANSITION_BEFORE, TRANSITIONS_MAX,
    )  # fmt: skip
    return [_plain(row) for row in rows]


async def notices(
    connection: Any, alarm_ids: Sequence[str], transition_ids: Sequence[str], limit: int
) -> list[dict[str, Any]]:
    """Notices that told of any of these transitions, with what became of them."""
    if not transition_ids:
        return []
    rows = await connection.fetch(_NOTICES, list(alarm_ids), list(transition_ids), limit)
    return [_plain(row) for row in rows]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: microseconds(value) if isinstance(value, datetime) else value for name, value in row.items()}


# --- many rows


async def count(connection: Any, from_us: int, to_us: int) -> int:
    """How many readings are stored with an instant from `from_us` to `to_us`."""
    found: int = await connection.fetchval(_COUNT, bounded(from_us), bounded(to_us))
    return found


async def all_rows(
    connection: Any, from_us: int, to_us: int, at_once: int
) -> AsyncGenerator[list[StoredReading], None]:
    """All stored readings of a time, in the order of their raw coordinates, some at a time.

    The server sorts; what is held here is `at_once` rows.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        cursor = await connection.cursor(_ALL, bounded(from_us), bounded(to_us))
        while rows := await cursor.fetch(at_once):
            yield [reading_of(row) for row in rows]


async def drawn_series(connection: Any, limit: int) -> list[tuple[int, int]]:
    """Some series, drawn by chance, each with the instant of its newest row."""
    rows = await connection.fetch("SELECT series_id, timestamp FROM latest ORDER BY random() LIMIT $1", limit)
    return [(row["series_id"], microseconds(row["timestamp"])) for row in rows]


async def sampled(connection: Any, drawn: Sequence[tuple[int, int]], from_us: int, to_us: int) -> list[StoredReading]:
    """Of each (series, instant in µs) the row there, or the next one, else the one before; within the time."""
    ids, ats = [one[0] for one in drawn], [bounded(one[1]) for one in drawn]
    return [reading_of(row) for row in await connection.fetch(_SAMPLE, ids, ats, bounded(from_us), bounded(to_us))]


# --- ClickHouse

_CLICKHOUSE_NAMES: Final = (
    "value", "value_text", "unit", "quality", "flags", "parser", "config_rev", "generation", "revised", "raw_partition", "raw_offset",
    "raw_index", "timestamp", "received_at", "ingested_at",
)  # fmt: skip
_CLICKHOUSE_ROW: Final = """
SELECT value, value_text, unit, quality, flags, parser, config_rev, generation, revised, raw_partition, raw_offset, raw_index,
       toUnixTimestamp64Micro(timestamp), toUnixTimestamp64Micro(received_at), toUnixTimestamp64Micro(ingested_at)
FROM measurements FINAL
WHERE device_id = {device:String} AND component_type = {component:String} AND pin_position = {pin:String}
  AND connector_mode = {mode:String} AND timestamp = fromUnixTimestamp64Micro({at:Int64}, 'UTC')
LIMIT 1"""


async def clickhouse_row(store: ClickHouseStore, stored: StoredReading) -> dict[str, Any] | None:
    """The row of a reading in ClickHouse, by its natural key; None where there is none. Instants in µs.

    Raises:
        Retry: ClickHouse cannot be asked.
    """
    rows = await store.ask(
        _CLICKHOUSE_ROW,
        {
            "device": stored.device_id,
            "component": stored.component_type,
            "pin": stored.pin_position,
            "mode": stored.connector_mode,
            "at": stored.timestamp,
        },
    )
    if not rows:
        return None
    found = dict(zip(_CLICKHOUSE_NAMES, rows[0], strict=True))
    found["flags"] = [flag for flag in str(found["flags"]).split(",") if flag]
    found["value_text"] = found["value_text"] or None
    found["revised"] = bool(found["revised"])
    return found
