"""What people read of devices: the list of all, one device with its registry and series, its curves, its readings.

Read only, bounded in rows and time, on connections of its own, so that a curve of five years keeps no list waiting. The one thing that
is written is `device_overview`, a table made of others (migrations/postgres/0020_device_overview.sql), and only while somebody looks at a list.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, Final

import asyncpg
import orjson
from cachetools import TTLCache

from preservarium.domain.readings.address import canonical_address, spellings
from preservarium.domain.registry.device import datatype_of
from preservarium.errors import Retry, reason
from preservarium.settings import Settings
from preservarium.stores.connections import Pool
from preservarium.stores.registry import SPELLED

#: A list and a curve at the same time; more viewers wait a few milliseconds.
CONNECTIONS_MAX: Final = 2
#: A page gives up on an answer after eight seconds, a view after five.
STATEMENT_TIMEOUT_S: Final = 4.0
#: Of the one statement that reads the last values of all series: a million take a second or two.
REFRESH_TIMEOUT_S: Final = 60.0
#: How old the order and the filters of the list may be while somebody looks …
OVERVIEW_AGE_S: Final = 20.0
#: … and where making them takes long, so many times as long: 2 % of one core of the database.
OVERVIEW_REST: Final = 50.0
#: A list that was never made is waited for so long.
OVERVIEW_FIRST_S: Final = 2.0

#: How many devices a filter finds is counted this often at most, of so many filters: half of what a page of the list costs.
TOTAL_AGE_S: Final = 5.0
TOTALS_MAX: Final = 200

#: Nothing received for so long: silent. Most devices send at least every quarter of an hour.
SILENT_S: Final = 3_600
#: Last values of the devices of one page.
VALUES_MAX: Final = 5_000
#: Device types and their numbers beside the list.
TYPES_MAX: Final = 200
#: Series of one device that are looked at; state has a limit of 500 a device.
SERIES_MAX: Final = 500
#: Series of one question for curves: more nobody tells apart.
CURVES_MAX: Final = 8
POINTS_MIN: Final = 10
POINTS_MAX: Final = 5_000
#: Alarms of a device that are drawn behind its curves.
BANDS_MAX: Final = 200
#: Lines of one file, and of one look for them.
EXPORT_ROWS_MAX: Final = 200_000
EXPORT_PAGE: Final = 5_000

US: Final = 1_000_000
DAY_US: Final = 86_400 * US
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
#: What `measurements` takes; a span beyond it is cut.
_FIRST_US: Final = 946_684_800 * US
_LAST_US: Final = 4_102_444_800 * US

#: Word of a filter -> condition. Of one device exactly one holds.
_SENDING: Final = f"o.enabled AND o.last_seen >= now() - make_interval(secs => {SILENT_S})"
STATES: Final[Mapping[str, str]] = {
    "sending": f"{_SENDING} AND o.quality <> 4",
    "failing": f"{_SENDING} AND o.quality = 4",
    "silent": f"o.enabled AND o.last_seen < now() - make_interval(secs => {SILENT_S})",
    "never": "o.enabled AND o.last_seen IS NULL",
    "off": "NOT o.enabled",
}
#: Word of an order -> what is compared, and its type. Best first: descending begins with the worst, the newest, the last.
_SORTS: Final[Mapping[str, tuple[str, str]]] = {
    "device": ("o.device_id", "text"),
    "name": ("coalesce(o.name, o.device_id)", "text"),
    "type": ("o.type", "text"),
    "seen": ("coalesce(o.last_seen, '1970-01-01 00:00+00')", "timestamptz"),
    "quality": ("CASE o.quality WHEN 4 THEN 4 WHEN 3 THEN 3 WHEN 9 THEN 2 WHEN 2 THEN 1 WHEN 1 THEN 0 ELSE -1 END", "bigint"),
}  # fmt: skip
SORTS: Final = tuple(_SORTS)

#: The pattern is made once, and not for each row.
_MATCHING: Final = "($1 = '' OR o.words LIKE (SELECT lower($2)) OR o.device_id = ANY ($3)) AND ($4 = '' OR o.type = $4)"
_VALUES: Final = """
SELECT s.device_id, s.series_id, s.component_type, s.pin_position, l.value, l.value_text, s.unit, l.timestamp, l.received_at, l.quality
FROM series s JOIN latest l USING (series_id) WHERE s.device_id = ANY ($1)
ORDER BY s.device_id, s.component_type, s.pin_position LIMIT $2
"""
_STATE: Final = """
SELECT extract(epoch FROM clock_timestamp() - refreshed_at)::float8 AS age_s, extract(epoch FROM took)::float8 AS took_s, refreshed_at
FROM device_overview_state
"""
_FLEET: Final = "SELECT count(*) AS devices, {} FROM device_overview o".format(
    ", ".join(f'count(*) FILTER (WHERE {condition}) AS "{name}"' for name, condition in STATES.items())
)
_TYPES: Final = "SELECT type, count(*) AS devices FROM device_overview GROUP BY type ORDER BY 2 DESC, 1 LIMIT $1"
_DOCUMENTS: Final = """
SELECT d.device_id, d.doc::text AS device, d.enabled, d.name, d.type, d.rev, d.updated_at, d.updated_by, t.doc::text AS type_doc, t.parser, t.manufacturer,
       p.parser_version, p.kind AS parser_kind
FROM devices d LEFT JOIN device_types t ON t.name = d.type LEFT JOIN parsers p ON p.name = t.parser AND p.status = 'active'
WHERE d.device_id = ANY ($1) LIMIT 1
"""
_SERIES: Final = """
SELECT s.series_id, s.device_id, s.connector_mode, s.component_type, s.pin_position, s.unit, s.circular, s.first_seen,
       l.timestamp, l.received_at, l.value, l.value_text, l.quality
FROM series s LEFT JOIN latest l USING (series_id) WHERE s.device_id = ANY ($1)
ORDER BY s.component_type, s.pin_position, s.connector_mode LIMIT $2
"""
_DATATYPES: Final = "SELECT name, kind, unit, doc::text AS doc FROM datatypes WHERE name = ANY ($1)"
_RULES: Final = "SELECT name, component_type, severity, enabled, doc::text AS doc FROM alarm_rules WHERE name = ANY ($1) ORDER BY name"
_CHOSEN: Final = """
SELECT series_id, connector_mode, component_type, pin_position, unit, circular FROM series
WHERE device_id = ANY ($1) AND (cardinality($2::int[]) = 0 OR series_id = ANY ($2))
ORDER BY component_type, pin_position, connector_mode LIMIT $3
"""
_RAW: Final = """
SELECT timestamp AS at, value, quality FROM measurements WHERE series_id = $1 AND timestamp >= $2 AND timestamp < $3 ORDER BY timestamp LIMIT $4
"""
#: The worst verdict of a bin counts: fail (4), suspect (3), and whatever else there is.
_WORST: Final = "CASE WHEN bool_or(quality = 4) THEN 4 WHEN bool_or(quality = 3) THEN 3 ELSE min(quality) END::smallint"
_ORIGIN: Final = "'2000-01-01 00:00+00'::timestamptz"
_RAW_BINS: Final = f"""
SELECT date_bin($5, timestamp, {_ORIGIN}) AS at, avg(value) AS mean, min(value) AS min, max(value) AS max, count(value) AS n, {_WORST} AS quality
FROM measurements WHERE series_id = $1 AND timestamp >= $2 AND timestamp < $3 GROUP BY 1 ORDER BY 1 LIMIT $4
"""
_RAW_DIRECTIONS: Final = f"""
SELECT at, circular_mean(c, s, n, $6) AS mean, circular_spread(c, s, n, $6) AS spread, n, quality FROM (
  SELECT date_bin($5, timestamp, {_ORIGIN}) AS at, sum(cosd(circular_angle(value, $6))) AS c, sum(sind(circular_angle(value, $6))) AS s,
         count(value) AS n, {_WORST} AS quality
  FROM measurements WHERE series_id = $1 AND timestamp >= $2 AND timestamp < $3 GROUP BY 1) b ORDER BY 1 LIMIT $4
"""
_ROLLED: Final = f"""
SELECT date_bin($5, bucket, {_ORIGIN}) AS at, sum(sum) / nullif(sum(n), 0) AS mean, min(min) AS min, max(max) AS max, sum(n)::bigint AS n
FROM {{}} WHERE series_id = $1 AND bucket >= $2 AND bucket < $3 GROUP BY 1 ORDER BY 1 LIMIT $4
"""
_ROLLED_DIRECTIONS: Final = f"""
SELECT at, circular_mean(c, s, n, $6) AS mean, circular_spread(c, s, n, $6) AS spread, n FROM (
  SELECT date_bin($5, bucket, {_ORIGIN}) AS at, sum(cos_sum) AS c, sum(sin_sum) AS s, sum(n)::bigint AS n
  FROM {{}} WHERE series_id = $1 AND bucket >= $2 AND bucket < $3 GROUP BY 1) b ORDER BY 1 LIMIT $4
"""
_BANDS: Final = """
SELECT alarm_id, rule, component_type, pin_position, severity, state, occurred_at, cleared_at, threshold, message FROM alarms
WHERE device_id = ANY ($1) AND generation = 0 AND occurred_at < $3 AND (cleared_at IS NULL OR cleared_at > $2) ORDER BY occurred_at DESC LIMIT $4
"""
_READINGS: Final = """
SELECT s.component_type, s.pin_position, s.connector_mode, coalesce(m.unit, s.unit) AS unit, coalesce(m.topic, s.topic) AS topic, m.series_id, m.timestamp,
       m.received_at, m.ingested_at, m.value, m.value_text, m.quality, m.flags, m.raw_partition, m.raw_offset, m.raw_index, m.generation,
       m.revised IS TRUE AS revised, d.parser, d.config_rev
FROM series s CROSS JOIN LATERAL (
  SELECT * FROM measurements r WHERE r.series_id = s.series_id AND r.timestamp >= $2 AND r.timestamp <= $3 AND (r.timestamp < $3 OR s.series_id < $4)
  ORDER BY r.timestamp DESC LIMIT $5) m JOIN derivations d USING (derivation_id)
WHERE s.series_id = ANY ($1) ORDER BY m.timestamp DESC, m.series_id DESC LIMIT $5
"""
_EXPORT: Final = """
SELECT m.timestamp, m.received_at, m.value, m.value_text, coalesce(m.unit, s.unit) AS unit, m.quality, m.flags
FROM measurements m JOIN series s USING (series_id)
WHERE m.series_id = $1 AND m.timestamp >= $2 AND m.timestamp < $3 ORDER BY m.timestamp LIMIT $4
"""


@dataclass(frozen=True, slots=True)
class Level:
    """What a curve can be drawn from."""

    name: str  #: raw, 1m, 1h, 1d
    width_us: int  #: of its buckets; 0: single readings
    kept_us: int  #: how far back it reaches; 0: for ever


def levels(retention_days: int) -> tuple[Level, ...]:
    """Finest first, each with how far back it surely reaches: of both engines the one that keeps less (migrations 0002a, 0002b)."""
    return (
        Level("raw", 0, retention_days * DAY_US),
        Level("1m", 60 * US, min(180, 2 * retention_days) * DAY_US),
        Level("1h", 3_600 * US, min(3 * 365, 12 * retention_days) * DAY_US),
        Level("1d", DAY_US, 0),
    )


def plan(from_us: int, to_us: int, points: int, now_us: int, retention_days: int) -> tuple[Level, int]:
    """The level that a span is drawn from, and the width of its bins in µs, so that there are at most `points` of them.

    The coarsest level whose buckets are not wider than a point; where that does not reach back so far, the finest one that does.
    """
    wanted = max(1, -(-(to_us - from_us) // points))
    reaching = [level for level in levels(retention_days) if not level.kept_us or from_us >= now_us - level.kept_us]
    level = next((level for level in reversed(reaching) if level.width_us <= wanted), reaching[0])
    if not level.width_us:
        return level, wanted
    return level, -(-wanted // level.width_us) * level.width_us


class DeviceReads:
    """Reads of devices. Connects on first use; may be used again after `close`.

    Args:
        settings: asked at each connect, and for how long readings are kept.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        shared: dict[str, Any] = {
            "dsn": lambda: settings().postgres.dsn,
            "connect_timeout_s": lambda: settings().postgres.connect_timeout_s,
        }
        self._pool = Pool(
            **shared,
            connections_max=lambda: CONNECTIONS_MAX,
            command_timeout_s=lambda: STATEMENT_TIMEOUT_S,
            server_settings={
                "application_name": "preservarium-devices",
                "default_transaction_read_only": "on",
                "timezone": "UTC",
            },
        )
        self._writer = Pool(
            **shared,
            connections_max=lambda: CONNECTIONS_MAX,
            command_timeout_s=lambda: REFRESH_TIMEOUT_S,
            server_settings={"application_name": "preservarium-overview", "timezone": "UTC"},
            idle_s=60.0,
        )
        self._refreshing: asyncio.Task[None] | None = None
        #: condition, text and type -> devices
        self._totals: TTLCache[tuple[str, str, str], int] = TTLCache(TOTALS_MAX, TOTAL_AGE_S)

    # --- the list ---

    async def devices(
        self,
        *,
        q: str = "",
        state: str = "",
        type_name: str = "",
        sort: str = "device",
        descending: bool = False,
        after: tuple[Any, str] | None = None,
        limit: int,
    ) -> dict[str, Any]:
        """Registered devices with the last value of each series. Order and filters are as old as `refreshed_at`, values are of now.

        Args:
            q: part of an address, a name or a type, any case, or an address in any spelling; "" for all.
            state: one of `STATES`; "" for all.
            type_name: of this device type; "" for all.
            sort: one of `SORTS`.
            descending: the other way round.
            after: (what is compared, address) of the last device of the page before.
            limit: most devices.

        Returns:
            `devices`; `next`: `after` of the next page or None; `total`: devices that are wanted, some seconds old; `refreshed_at`.
            Instants in µs.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
            ValueError: `after` is not of this order.
        """
        refreshed_at = await self._current()
        key, kind = _SORTS[sort]
        if after is not None and (kind == "text") is not isinstance(after[0], str):
            message = "a cursor of another order"
            raise ValueError(message)
        where = f"{_MATCHING} AND ({STATES[state] if state else 'true'})"
        sign, way = ("<", "DESC") if descending else (">", "ASC")
        wanted = (q, _containing(q), await self._spelled(q), type_name)
        at, device_id = after or (None, None)
        if kind == "timestamptz" and at is not None:
            at = _instant(at)
        columns = f"o.device_id, o.name, o.type, o.enabled, o.last_seen, o.quality, {key} AS key"
        behind = f"($5::{kind} IS NULL OR ({{0}}, o.device_id) {sign} ($5, $6))"
        order = f"ORDER BY {{0}} {way}, o.device_id {way} LIMIT $7"
        if q:
            # One look at every row. In the order of an index, a text that is rare would be looked for all over the table.
            rows = await self._fetch(
                f"WITH found AS MATERIALIZED (SELECT {columns} FROM device_overview o WHERE {where})"
                f" SELECT o.*, (SELECT count(*) FROM found) AS total FROM found o WHERE {behind.format('o.key')} {order.format('o.key')}",
                *wanted, at, device_id, limit + 1,
            )  # fmt: skip
            total = rows[0]["total"] if rows else 0 if after is None else await self._total(where, wanted)
        else:
            rows, total = await asyncio.gather(
                self._fetch(
                    f"SELECT {columns} FROM device_overview o WHERE {where} AND {behind.format(key)} {order.format(key)}",
                    *wanted, at, device_id, limit + 1,
                ),
                self._total(where, wanted),
            )  # fmt: skip
        page = rows[:limit]
        found = {row["device_id"]: _document(row) | {"values": []} for row in page}
        for device in found.values():
            del device["key"]
            device.pop("total", None)
        for value in await self._fetch(_VALUES, [*found], VALUES_MAX):
            device = found[value["device_id"]]
            device["last_seen"] = max(device["last_seen"] or 0, _us(value["received_at"]))
            device["values"].append(
                {k: v for k, v in _document(value).items() if k not in ("device_id", "received_at")}
            )
        last = _document(page[-1]) if len(rows) > limit else None
        return {
            "devices": [*found.values()],
            "next": (last["key"], last["device_id"]) if last else None,
            "total": total,
            "refreshed_at": refreshed_at,
        }

    async def _total(self, where: str, wanted: tuple[Any, ...]) -> int:
        """How many devices are wanted, some seconds old: whoever turns pages or looks on asks for the same again."""
        asked = (where, wanted[0], wanted[3])
        if (known := self._totals.get(asked)) is None:
            rows = await self._fetch(f"SELECT count(*) FROM device_overview o WHERE {where}", *wanted)
            known = self._totals[asked] = rows[0][0]
        return known

    async def fleet(self) -> dict[str, Any]:
        """How many devices there are in each of `STATES`, and of each type; as old as `refreshed_at`, µs.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        refreshed_at = await self._current()
        row = (await self._fetch(_FLEET))[0]
        types = await self._fetch(_TYPES, TYPES_MAX)
        return {
            "devices": row["devices"],
            "states": {name: row[name] for name in STATES},
            "types": [_document(each) for each in types],
            "silent_after_s": SILENT_S,
            "refreshed_at": refreshed_at,
        }

    async def _current(self) -> int | None:
        """Take over what the registry changed, have the rest made anew where it is old, and say how old it is."""
        if self._refreshing is None or self._refreshing.done():
            await self._write("SELECT device_overview_registry()")
        rows = await self._fetch(_STATE)
        if not rows:
            # The first time, after a restart of a crashed server too. Another worker may be at it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._refresh()), OVERVIEW_FIRST_S)
            rows = await self._fetch(_STATE)
            return _us(rows[0]["refreshed_at"]) if rows else None
        if rows[0]["age_s"] > max(OVERVIEW_AGE_S, OVERVIEW_REST * rows[0]["took_s"]):
            self._refresh()
        return _us(rows[0]["refreshed_at"])

    def _refresh(self) -> asyncio.Task[None]:
        """One refresh at a time; nobody but the first viewer waits for it."""

        async def refresh() -> None:
            with contextlib.suppress(Retry):  # what stands in the way is said to whoever asks next
                await self._write("SELECT device_overview_refresh()")

        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(refresh(), name="device-overview")
        return self._refreshing

    # --- one device ---

    async def device(self, device_id: str) -> dict[str, Any] | None:
        """A device with its registry and the last reading of each series; None where neither the registry nor a series knows it.

        `series` are at most `SERIES_MAX`, each with `datatype`: what its values are held to, under the overrides of type and device.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        spelled = await self._spelled(device_id)
        documents = await self._fetch(_DOCUMENTS, spelled)
        series = await self._fetch(_SERIES, spelled, SERIES_MAX)
        if not documents and not series:
            return None
        row = documents[0] if documents else None
        doc: dict[str, Any] = orjson.loads(row["device"]) if row else {}
        type_doc: dict[str, Any] = orjson.loads(row["type_doc"]) if row and row["type_doc"] else {}
        names = sorted({each["component_type"] for each in series})
        datatypes = {each["name"]: each for each in await self._fetch(_DATATYPES, names)}
        return {
            "device_id": row["device_id"] if row else series[0]["device_id"],
            "registered": row is not None,
            "name": row["name"] if row else None,
            "enabled": row["enabled"] if row else None,
            "type": row["type"] if row else None,
            "manufacturer": row["manufacturer"] if row else None,
            "description": type_doc.get("description"),
            "parser": f"{row['parser']}@{row['parser_version']}" if row and row["parser_version"] else row and row["parser"],
            "parser_kind": row["parser_kind"] if row else None,
            "meta": doc.get("meta") or {},
            "rev": row["rev"] if row else None,
            "updated_at": _us(row["updated_at"]) if row else None,
            "updated_by": row["updated_by"] if row else None,
            "last_seen": max((_us(each["received_at"]) for each in series if each["received_at"]), default=None),
            "series": [
                _document(each) | {"datatype": _held_to(datatypes.get(each["component_type"]), type_doc, doc)}
                for each in series
            ],
            "rules": await self._rules(type_doc, doc),
        }  # fmt: skip

    async def _rules(self, type_doc: Mapping[str, Any], doc: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The alarm rules that watch a device, under its own overrides."""
        own: Mapping[str, Any] = doc.get("rules") or {}
        names = sorted({*(type_doc.get("rules") or []), *own})
        found = []
        for row in await self._fetch(_RULES, names) if names else []:
            override = own.get(row["name"], {})
            rule = {**orjson.loads(row["doc"]), **(override or {})}
            shown = {name: rule.get(name) for name in ("kind", "threshold", "deadband", "message", "pin_position")}
            found.append({
                "name": row["name"], "component_type": row["component_type"], "severity": rule.get("severity", row["severity"]),
                "enabled": row["enabled"] and override is not None, **shown,
            })  # fmt: skip
        return found

    # --- curves ---

    async def curves(
        self, device_id: str, *, series: Sequence[int], from_us: int, to_us: int, points: int, now_us: int
    ) -> dict[str, Any] | None:
        """Curves of a device's series within [from_us, to_us), each of at most `points` points, in the order of time.

        A series that has few enough readings is drawn from them, each with its quality; else it is put into bins, from the readings or
        from the roll-ups of a minute, an hour or a day. Of a circular series a bin has the mean of its directions and no extremes.

        Args:
            device_id: in any spelling.
            series: ids; none: the first `CURVES_MAX`. What is not of this device is left out.
            from_us: begin, µs.
            to_us: end, µs.
            points: most points of a curve.
            now_us: now, µs.

        Returns:
            `series`, and `alarms`: what was raised within the span. None where the device has no such series.

        Raises:
            Retry: PostgreSQL cannot be asked in time, or has not been migrated.
        """
        spelled = await self._spelled(device_id)
        chosen = await self._fetch(_CHOSEN, spelled, [*series], CURVES_MAX)
        if not chosen:
            return None
        from_us, to_us = max(from_us, _FIRST_US), min(to_us, _LAST_US)
        curves = [await self._curve(row, from_us, to_us, points, now_us) for row in chosen]
        bands = await self._fetch(_BANDS, spelled, _instant(from_us), _instant(to_us), BANDS_MAX)
        return {"series": curves, "alarms": [_document(band) for band in bands]}

    async def _curve(self, row: asyncpg.Record, from_us: int, to_us: int, points: int, now_us: int) -> dict[str, Any]:
        level, width_us = plan(from_us, to_us, points, now_us, self._settings().sink.retention_days)
        series_id, circular = row["series_id"], row["circular"]
        head = _document(row)
        if from_us >= now_us - levels(self._settings().sink.retention_days)[0].kept_us:
            rows = await self._fetch(_RAW, series_id, _instant(from_us), _instant(to_us), points + 1)
            if len(rows) <= points:
                at = [_us(r["at"]) for r in rows]
                return head | {
                    "level": "raw", "width_us": 0, "gap_us": _gap(at, 0), "at": at, "mean": [r["value"] for r in rows],
                    "min": None, "max": None, "n": None, "quality": [r["quality"] for r in rows],
                }  # fmt: skip
        if circular is not None and level.name == "1m":
            # Minutes of directions are read from the readings anyway, and reach as far back as these.
            raw = levels(self._settings().sink.retention_days)[0]
            level = raw if from_us >= now_us - raw.kept_us else levels(self._settings().sink.retention_days)[2]
            width_us = max(width_us, level.width_us)
        first = _binned(from_us, width_us)
        span = (series_id, _instant(first), _instant(to_us), points + 2, timedelta(microseconds=width_us))
        if circular is not None:
            query = _RAW_DIRECTIONS if level.name == "raw" else _ROLLED_DIRECTIONS.format(f"circular_{level.name}")
            rows = await self._fetch(query, *span, circular)
        else:
            query = _RAW_BINS if level.name == "raw" else _ROLLED.format(f"measurement_{level.name}")
            rows = await self._fetch(query, *span)
        at = [_us(r["at"]) for r in rows]
        extremes = {name: None if circular is not None else [r[name] for r in rows] for name in ("min", "max")}
        return head | extremes | {
            "level": level.name, "width_us": width_us, "gap_us": _gap(at, width_us), "at": at, "mean": [r["mean"] for r in rows],
            "n": [r["n"] for r in rows], "quality": [r["quality"] for r in rows] if level.name == "raw" else None,
        }  # fmt: skip

    # --- readings ---

    async def readings(
        self,
        device_id: str,
        *,
        series: Sequence[int],
        from_us: int,
        before: tuple[int, int] | None,
        limit: int,
    ) -> dict[str, Any] | None:
        """Readings of a device, newest first by their own time; None where it has no such series.

        Args:
            device_id: in any spelling.
            series: ids; none: all.
            from_us: not before, µs.
            before: (timestamp, series id) of the last one of the page before.
            limit: most readings.

        Returns:
            `readings`; `next`: `before` of the next page or None. Instants in µs.

        Raises:
            Retry: PostgreSQL cannot be asked in time, or has not been migrated.
        """
        chosen = await self._fetch(_CHOSEN, await self._spelled(device_id), [*series], SERIES_MAX)
        if not chosen:
            return None
        at_us, last = before or (_LAST_US, 0)
        ids = [row["series_id"] for row in chosen]
        rows = await self._fetch(
            _READINGS, ids, _instant(max(from_us, _FIRST_US)), _instant(min(at_us, _LAST_US)), last, limit + 1
        )
        page = [_document(row) for row in rows[:limit]]
        following = (page[-1]["timestamp"], page[-1]["series_id"]) if len(rows) > limit else None
        return {"readings": page, "next": following}

    async def export(
        self, device_id: str, *, series: Sequence[int], from_us: int, to_us: int
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """The readings of a span, series by series in the order of time, in pages; at most `EXPORT_ROWS_MAX`.

        The last page is short of a row `cut` where there were more.

        Raises:
            Retry: PostgreSQL cannot be asked in time, or has not been migrated.
        """
        rest = EXPORT_ROWS_MAX
        for row in await self._fetch(_CHOSEN, await self._spelled(device_id), [*series], SERIES_MAX):
            named = {name: row[name] for name in ("component_type", "pin_position", "connector_mode")}
            begin, end = _instant(max(from_us, _FIRST_US)), _instant(min(to_us, _LAST_US))
            while True:
                if rest <= 0:
                    yield [{"cut": True}]
                    return
                rows = await self._fetch(_EXPORT, row["series_id"], begin, end, min(EXPORT_PAGE, rest))
                rest -= len(rows)
                if rows:
                    yield [named | _document(each) for each in rows]
                if len(rows) < EXPORT_PAGE and rest > 0:
                    break
                if rows:
                    # A series has one reading at an instant.
                    begin = rows[-1]["timestamp"] + timedelta(microseconds=1)

    # --- asking ---

    async def close(self) -> None:
        """Give the connections back."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        # Not close(): that waits for a query that may hang.
        self._pool.terminate()
        self._writer.terminate()

    async def _spelled(self, device_id: str) -> list[str]:
        """How a device may be written: as it is registered, else the usual spellings of its address."""
        usual = spellings(device_id) if device_id else []
        if len(usual) < 2:
            return usual
        return [row["device_id"] for row in await self._fetch(SPELLED, canonical_address(device_id))] or usual

    async def _fetch(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        return await _asked(self._pool, query, arguments)

    async def _write(self, query: str) -> None:
        await _asked(self._writer, query, ())


async def _asked(pool: Pool, query: str, arguments: tuple[Any, ...]) -> list[asyncpg.Record]:
    try:
        async with pool.acquire() as connection:
            rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
            return rows
    except (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.UndefinedFunctionError) as e:
        message = f"PostgreSQL is not migrated: {e}"
        raise Retry(message) from e
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
        # OSError includes TimeoutError. A pool may hand out a connection that died; the next call gets another.
        message = f"PostgreSQL: {reason(e)}"
        raise Retry(message) from e


def _held_to(row: asyncpg.Record | None, type_doc: Mapping[str, Any], doc: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a series' values are held to; None where the registry has no such datatype."""
    if row is None:
        return None
    made: Any = {"name": row["name"], "kind": row["kind"], "unit": row["unit"], **orjson.loads(row["doc"])}
    found = datatype_of(made, row["name"], type_doc, doc) or made
    shown = (
        "kind",
        "unit",
        "description",
        "fail_span",
        "suspect_span",
        "tests",
        "counter",
        "circular",
        "stale_after_s",
    )
    return {name: found.get(name) for name in shown}


def _gap(at: Sequence[int], width_us: int) -> int:
    """How far apart two points are that a line must not join, µs: four times what is usual, and more than a bin."""
    if len(at) < 3:
        return max(2 * width_us, 0)
    usual = median(later - earlier for earlier, later in itertools.pairwise(at))
    return max(round(4 * usual), 2 * width_us)


def _binned(at_us: int, width_us: int) -> int:
    """The begin of the bin of an instant, as date_bin puts it."""
    return _FIRST_US + (at_us - _FIRST_US) // width_us * width_us


def _containing(text: str) -> str:
    """A LIKE pattern for texts that contain this one literally."""
    escaped = text.replace("\\", r"\\").replace("%", r"\%").replace("_", r"\_")
    return f"%{escaped}%"


def _document(row: asyncpg.Record) -> dict[str, Any]:
    return {key: _us(value) if isinstance(value, datetime) else value for key, value in row.items()}


def _instant(at_us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=at_us)


def _us(instant: datetime) -> int:
    return (instant - _EPOCH) // timedelta(microseconds=1)
