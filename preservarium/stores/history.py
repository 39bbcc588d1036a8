"""Stored readings, device by device in the order of event time, as fast as PostgreSQL gives them out.

PostgreSQL sorts, the rows come by binary COPY and are handed on while they come: what is held here is a few kilobytes,
however many they are. The caller bounds what one query sorts (`Plan`).
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

#: Readings that one query sorts: some 100 MB in the server, so that it needs no disk.
SORTED_MAX: Final = 1_000_000
#: Series that one query reads: their devices' documents are in memory, a few KB each.
SERIES_MAX: Final = 2_000
#: What such a sort takes in the server, so that it stays in memory.
_WORK_MEM: Final = "160MB"

#: What the times of a row count from: PostgreSQL's 2000-01-01, µs since the epoch.
EPOCH_US: Final = 946_684_800_000_000
_HEADER_BYTES: Final = 19
#: count of fields, then each with its length: number, timestamp, value, quality
_ROW: Final = struct.Struct(">2x4xi4xq4xd4xh")

#: Added to the quality of a reading in a unit that is not the datatype's; QARTOD's flags are below 10.
UNIT_UNKNOWN: Final = 256

#: (place in the list of series, event time, value or NaN where it is text, quality and perhaps `UNIT_UNKNOWN`)
Row = tuple[int, int, float, int]


class Series(NamedTuple):
    """A stored series."""

    series_id: int
    device_id: str
    component_type: str
    pin_position: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of devices whose readings one query sorts; both ends belong to it."""

    first: str
    last: str
    readings: int  #: about


_SELECTED: Final = """
FROM series s WHERE s.component_type = ANY($1) AND ($2::text[] IS NULL OR s.device_id = ANY($2))"""


async def pieces(
    connection: Any,
    component_types: Sequence[str],
    devices: Sequence[str] | None,
    from_us: int,
    to_us: int,
    *,
    sorted_max: int = SORTED_MAX,
) -> list[Piece]:
    """Cut the devices that have such series into ranges of some `sorted_max` readings, by the planner's estimate, and `SERIES_MAX` series.

    Args:
        connection: of asyncpg.
        component_types: what is read.
        devices: of which devices; None: of all.
        from_us: begin, µs.
        to_us: end, µs; not part of it.
        sorted_max: how many readings a piece has at most, about; a single device may have more.
    """
    series = await connection.fetchval(f"SELECT count(*) {_SELECTED}", component_types, devices)
    if not series:
        return []
    every = max(1, await connection.fetchval("SELECT count(*) FROM series"))
    plan = await connection.fetchval(
        "EXPLAIN (FORMAT JSON) SELECT 1 FROM measurements"
        f" WHERE timestamp >= {_instant(from_us)} AND timestamp < {_instant(to_us)}"
    )
    a_series = max(1.0, orjson.loads(plan)[0]["Plan"]["Plan Rows"] / every)
    cut: list[Piece] = []
    first, held, last, number = "", 0.0, "", 0
    async with connection.transaction(readonly=True):
        async for device_id, count in connection.cursor(
            f'SELECT s.device_id, count(*) {_SELECTED} GROUP BY s.device_id ORDER BY s.device_id COLLATE "C"',
            component_types,
            devices,
            prefetch=5_000,
        ):
            rows = count * a_series
            if held and (held + rows > sorted_max or number + count > SERIES_MAX):
                cut.append(Piece(first, last, round(held)))
                held, number = 0.0, 0
            first = first if held else device_id
            last = device_id
            held += rows
            number += count
    cut.append(Piece(first, last, round(held)))
    return cut


async def series_of(
    connection: Any, piece: Piece, component_types: Sequence[str], devices: Sequence[str] | None
) -> list[Series]:
    """The series of a piece, by device."""
    rows = await connection.fetch(
        f"SELECT s.series_id, s.device_id, s.component_type, s.pin_position {_SELECTED}"
        " AND s.device_id COLLATE \"C\" >= $3 AND s.device_id COLLATE \"C\" <= $4"
        " ORDER BY s.device_id COLLATE \"C\", s.component_type COLLATE \"C\", s.pin_position COLLATE \"C\", s.series_id",
        component_types, devices, piece.first, piece.last,
    )  # fmt: skip
    return [Series(*row) for row in rows]


async def read(
    connection: Any, series: Sequence[Series], from_us: int, to_us: int, take: Callable[[Iterator[Row]], None]
) -> None:
    """Hand the readings of `series` to `take`, many at a time; by device, event time, then place in the list.

    Times are µs since 2000-01-01 as PostgreSQL has them: add `EPOCH_US`.

    Args:
        connection: of asyncpg.
        series: which; those of a device stand together.
        from_us: begin, µs since the epoch, UTC.
        to_us: end; not part of it.
        take: called with some rows at a time, and must use them up.
    """
    if not series:
        return
    places: dict[str, int] = {}
    devices = [places.setdefault(one.device_id, len(places)) for one in series]
    # Old rows wait in `measurements_late` until they are merged.
    stored = " UNION ALL ".join(
        f"SELECT series_id, timestamp, value, quality, flags FROM {table} WHERE series_id = ANY($1)"
        f" AND timestamp >= {_instant(from_us)} AND timestamp < {_instant(to_us)}"
        for table in ("measurements", "measurements_late")
    )
    query = f"""
    SELECT w.number, m.timestamp, coalesce(m.value, 'NaN'),
           CASE WHEN m.flags @> '{{unit_unknown}}' THEN m.quality + {UNIT_UNKNOWN}::smallint ELSE m.quality END
    FROM ({stored}) AS m JOIN unnest($1::int[], $2::int[], $3::int[]) AS w(series_id, device, number) USING (series_id)
    ORDER BY w.device, m.timestamp, w.number"""
    rest = b""
    skip = _HEADER_BYTES

    async def output(data: bytes) -> None:
        nonlocal rest, skip
        data = rest + data
        if skip:
            if len(data) < skip:
                rest = data
                return
            data, skip = data[skip:], 0
        whole = len(data) - len(data) % _ROW.size
        rest = data[whole:]
        take(_ROW.iter_unpack(memoryview(data)[:whole]))

    async with connection.transaction(readonly=True):
        # We are as many as there are cores: helpers of the server would only take turns with us. And a merge join would
        # sort everything by series first, only to sort it again.
        await connection.execute(
            f"SET LOCAL work_mem = '{_WORK_MEM}'; SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL enable_mergejoin = off"
        )
        await connection.copy_from_query(
            query, [one.series_id for one in series], devices, list(range(len(series))), output=output, format="binary"
        )
    assert rest in (b"", b"\xff\xff"), "PostgreSQL sent something other than rows"


def _instant(us: int) -> str:
    """As SQL; exact, which a float of seconds would not be."""
    return f"('2000-01-01 00:00+00'::timestamptz + INTERVAL '1 microsecond' * {us - EPOCH_US})"
