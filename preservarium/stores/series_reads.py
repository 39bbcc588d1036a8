"""Series of any devices: finding them, their curves, small curves beside a list, and what is new of a device.

As `device_reads`, whose connections it shares, and whose curves these are.
"""

from collections.abc import Sequence
from typing import Any, Final

from preservarium.domain.readings.address import spellings
from preservarium.stores.device_reads import (
    _FIRST_US,
    _LAST_US,
    DeviceReads,
    _containing,
    _document,
    _instant,
    levels,
)

#: Series of one question; a heat map has a row for each.
MAP_SERIES_MAX: Final = 60
#: Small curves of one question: a page of the list has 50 devices.
SPARKS_MAX: Final = 60
SPARK_US: Final = 3_600_000_000
#: Of a small curve: two minutes each.
SPARK_POINTS: Final = 30

_FOUND: Final = """
SELECT s.series_id, s.device_id, o.name, o.type, s.connector_mode, s.component_type, s.pin_position, s.unit, s.circular,
       l.timestamp, l.value, l.quality
FROM series s JOIN device_overview o USING (device_id) LEFT JOIN latest l USING (series_id)
{joined}
WHERE ($1 = '' OR o.words LIKE lower($2) OR o.device_id = ANY ($3)) AND ($4 = '' OR o.type = $4)
  AND ($5 = '' OR s.component_type = $5) AND (l.timestamp IS NULL OR l.value IS NOT NULL) AND (o.device_id, s.series_id) > ($6, $7) {label}
ORDER BY o.device_id, s.series_id LIMIT $8
"""
_COMPONENTS: Final = (
    "SELECT component_type, unit, count(*) AS series FROM series GROUP BY 1, 2 ORDER BY 3 DESC, 1 LIMIT $1"
)
_NAMED: Final = """
SELECT s.series_id, s.device_id, d.name, s.connector_mode, s.component_type, s.pin_position, s.unit, s.circular
FROM series s LEFT JOIN devices d USING (device_id) WHERE s.series_id = ANY ($1)
"""
_SPARKS: Final = """
SELECT series_id, floor(extract(epoch FROM timestamp - $2) / $3)::int AS bin, avg(value) AS mean FROM measurements
WHERE series_id = ANY ($1) AND timestamp >= $2 AND timestamp < $4 AND value IS NOT NULL GROUP BY 1, 2 ORDER BY 1, 2
"""
_NEWS: Final = """
SELECT s.series_id, s.component_type, s.pin_position, s.unit, l.value, l.value_text, l.quality, l.timestamp, l.received_at
FROM series s JOIN latest l USING (series_id) WHERE s.device_id = ANY ($1) AND l.received_at > $2 ORDER BY l.received_at LIMIT 500
"""
_CORRECTED: Final = """
SELECT series_id, timestamp, value, quality, generation, revised IS TRUE AS revised FROM measurements
WHERE series_id = ANY ($1) AND timestamp >= $2 AND timestamp < $3 AND (revised OR generation > 0) ORDER BY timestamp DESC LIMIT $4
"""
#: Corrections of one question that are marked on curves.
CORRECTIONS_MAX: Final = 500


class SeriesReads(DeviceReads):
    """Reads of devices, and of series whosesoever they are."""

    async def find_series(
        self,
        *,
        q: str = "",
        type_name: str = "",
        component: str = "",
        label: tuple[str, str] | None = None,
        after: tuple[str, int] | None = None,
        limit: int,
    ) -> dict[str, Any]:
        """Series of numbers, in the order of their devices.

        Args:
            q: part of a device's address, name or type; "" for all.
            type_name: of this device type; "" for all.
            component: of this component type; "" for all.
            label: (name, value) that the device's `meta` has.
            after: (address, series id) of the last one of the page before.
            limit: most series.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        await self._current()
        query = _FOUND.format(
            joined="JOIN devices d ON d.device_id = o.device_id" if label else "",
            label="AND d.doc -> 'meta' ->> $9 = $10" if label else "",
        )
        device_id, series_id = after or ("", 0)
        arguments = (
            q,
            _containing(q),
            spellings(q) if q else [],
            type_name,
            component,
            device_id,
            series_id,
            limit + 1,
        )
        rows = await self._fetch(query, *arguments, *(label or ()))
        page = [_document(row) for row in rows[:limit]]
        following = (page[-1]["device_id"], page[-1]["series_id"]) if len(rows) > limit else None
        return {"series": page, "next": following}

    async def components(self, limit: int) -> list[dict[str, Any]]:
        """Component types with their units, the most frequent first.

        Raises:
            Retry: PostgreSQL cannot be asked, or has not been migrated.
        """
        return [_document(row) for row in await self._fetch(_COMPONENTS, limit)]

    async def curves_of(
        self, series: Sequence[int], *, from_us: int, to_us: int, points: int, now_us: int
    ) -> list[dict[str, Any]]:
        """Curves of series of any devices, in the order in which they are asked for; see `curves`. What is not there is left out.

        Raises:
            Retry: PostgreSQL cannot be asked in time, or has not been migrated.
        """
        rows = {row["series_id"]: row for row in await self._fetch(_NAMED, [*series][:MAP_SERIES_MAX])}
        from_us, to_us = max(from_us, _FIRST_US), min(to_us, _LAST_US)
        return [
            await self._curve(rows[each], from_us, to_us, points, now_us)
            for each in dict.fromkeys(series)
            if each in rows
        ]

    async def corrections(
        self, series: Sequence[int], *, from_us: int, to_us: int, now_us: int
    ) -> list[dict[str, Any]]:
        """Readings of a span that were judged anew, or derived again, newest first; none where readings are no longer kept.

        Raises:
            Retry: PostgreSQL cannot be asked in time, or has not been migrated.
        """
        kept = now_us - levels(self._settings().sink.retention_days)[0].kept_us
        from_us, to_us = max(from_us, kept, _FIRST_US), min(to_us, _LAST_US)
        if from_us >= to_us:
            return []
        rows = await self._fetch(_CORRECTED, [*series], _instant(from_us), _instant(to_us), CORRECTIONS_MAX)
        return [_document(row) for row in rows]

    async def sparks(self, series: Sequence[int], *, now_us: int) -> dict[int, list[float | None]]:
        """The last hour of series, as `SPARK_POINTS` means each; None where nothing came.

        Raises:
            Retry: PostgreSQL cannot be asked in time, or has not been migrated.
        """
        width_us = SPARK_US // SPARK_POINTS
        end_us = now_us // width_us * width_us + width_us
        begin = _instant(end_us - SPARK_US)
        rows = await self._fetch(_SPARKS, [*series][:SPARKS_MAX], begin, width_us / 1e6, _instant(end_us))
        found: dict[int, list[float | None]] = {}
        for row in rows:
            curve = found.setdefault(row["series_id"], [None] * SPARK_POINTS)
            curve[min(row["bin"], SPARK_POINTS - 1)] = row["mean"]
        return found

    async def news(self, device_id: str, *, since_us: int) -> list[dict[str, Any]]:
        """The last reading of each series of a device that was received after an instant, oldest first.

        Raises:
            Retry: PostgreSQL cannot be asked in time, or has not been migrated.
        """
        rows = await self._fetch(_NEWS, await self._spelled(device_id), _instant(max(since_us, _FIRST_US)))
        return [_document(row) for row in rows]
