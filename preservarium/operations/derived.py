"""The tables that ClickHouse's materialized views fill: do they still say what their source says, and if not, making them.

A materialized view sees inserts. What is deleted from its source, or put in the place of a partition, passes it by; so do
rows that come twice and are one in the source once it has merged. Here each such table has a definition over its source
as that stands, read with FINAL; what differs from it is replaced, row by row, while the worker goes on writing.

Between source and view an insert is for a moment in one and not in the other. So what differs is looked at twice, and is
only taken for different if it stays so. Whatever is done can be done again, also from the middle: the next look starts from
what is there.

Memory depends on a range of keys, never on the rows.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from preservarium.stores.maintenance import Maintenance, literal

#: Devices or files whose keys are compared by one query: some megabytes in the engine.
OWNERS_MAX: Final = 5_000
#: Rows that are mended at once: some 100 KiB of statement.
ROWS_MAX: Final = 500
#: A wrong row may hide another one that was never merged.
PASSES_MAX: Final = 3
#: Later than every instant.
FOREVER_US: Final = 2**62
_WRAP: Final = 2**64


@dataclass(frozen=True, slots=True)
class Newest:
    """A table with the newest row of each key of its source: a ReplacingMergeTree(version), read with FINAL."""

    name: str
    source: str
    owner: str  #: the first column of the key: what ranges are made of
    key: tuple[str, ...]
    at: str  #: an instant that both have; rows outside the range that is asked for are not judged
    columns: Mapping[str, str]  #: column -> expression over the source; with `version`
    where: str = "1"  #: rows of the source that count
    gone: str = "0"  #: 1 where the newest row says that there is none
    #: The instant orders the rows of a key, so that what is newer than the range stays out of it. Otherwise the range has no end.
    ends: bool = True


@dataclass(frozen=True, slots=True)
class Counts:
    """`measurement_days`: sums of what each insert brought. Corrections are added to them, so that no reader sees a gap."""

    name: str = "measurement_days"
    source: str = "measurements"


@dataclass(frozen=True, slots=True)
class Drift:
    """Where a table is not what its source makes of it, and how many rows it should have and has there."""

    owner: str
    at_us: int
    expected: int
    found: int
    repaired: bool = False


_VERSION: Final = (
    "bitShiftLeft(toUInt256(toUnixTimestamp64Micro(s.timestamp)), 128) + bitShiftLeft(toUInt256(s.generation), 64)"
    " + toUInt64(9223372036854775807 + if(s.revised = 1, 1, -1) * toUnixTimestamp64Micro(s.received_at))"
)


def _same(*names: str) -> dict[str, str]:
    return {name: f"s.{name}" for name in names}


LATEST_VALUES: Final = Newest(
    "latest_values", "measurements", "device_id", ("device_id", "component_type", "pin_position", "connector_mode"), "timestamp",
    _same("device_id", "component_type", "pin_position", "connector_mode", "timestamp", "value", "value_text", "unit", "quality",
          "received_at") | {"version": _VERSION},
)  # fmt: skip
MEASUREMENT_DAYS: Final = Counts()

#: Source -> the tables that its views fill.
#: A deletion is a row, and a file may come back with an earlier one: there is no range that such a key lies in, only a first day.
PIPELINE_STATE: Final = Newest(
    "pipeline_state", "task_events", "file_id", ("file_id",), "assigned_at",
    _same("file_id", "event_id", "assigned_at", "version", "stage", "status", "employee_code", "employee_name", "started_at",
          "completed_at", "changed_at", "task_id", "experiment_id", "deleted"),
    gone="s.deleted = 1", ends=False,
)  # fmt: skip
STAGE_COMPLETIONS: Final = Newest(
    "stage_completions", "task_events", "file_id", ("day", "stage", "file_id"), "assigned_at",
    {"day": "toDate(s.completed_at)"} | _same("stage", "file_id", "version", "employee_code", "assigned_at")
    | {"completed_at": "assumeNotNull(s.completed_at)"},
    where="s.completed_at IS NOT NULL AND NOT s.deleted", ends=False,
)  # fmt: skip

DERIVED: Final[Mapping[str, tuple[Newest | Counts, ...]]] = {
    "measurements": (LATEST_VALUES, MEASUREMENT_DAYS),
    "task_events": (PIPELINE_STATE, STAGE_COMPLETIONS),
}


async def drifts(
    engine: Maintenance, table: Newest | Counts, days_us: Sequence[int], *, repair: bool, settle_s: float
) -> AsyncIterator[Drift]:
    """What differs in the days that begin at `days_us` (µs, UTC, in order, without gaps); mended where `repair`.

    What differs still after `settle_s` seconds differs.

    Raises:
        VerificationError: ClickHouse refuses a statement.
    """
    span = days_us[0], days_us[-1] + 86_400_000_000
    if isinstance(table, Counts):
        for day_us in days_us:
            async for drift in _counts(engine, table, day_us, repair=repair, settle_s=settle_s):
                yield drift
        return
    low = ""
    while True:
        # The range ends with the source's own key: it is what most rows are of.
        last = await engine.query(
            f"SELECT max(o) FROM (SELECT {table.owner} AS o FROM {table.source} WHERE {table.owner} > {{low:String}}"
            f" GROUP BY o ORDER BY o LIMIT {OWNERS_MAX}) HAVING count() = {OWNERS_MAX}",
            {"low": low},
        )
        high = str(last[0][0]) if last else ""
        async for drift in _newest(engine, table, low, high, span, repair=repair, settle_s=settle_s):
            yield drift
        if not high:
            return
        low = high


# --- the newest row of each key


def _hash(table: Newest, expressions: Mapping[str, str]) -> str:
    parts = []
    for name, expression in expressions.items():
        if name == "value":
            # Bit by bit: -0 is not 0, and NULL neither.
            parts += [f"isNull({expression})", f"reinterpretAsUInt64(ifNull({expression}, 0.))"]
        elif name in ("started_at", "completed_at"):
            parts.append(f"ifNull(toInt64(toUnixTimestamp64Micro({expression})), -1)")
        else:
            parts.append(f"toString({expression})")
    return f"cityHash64({', '.join(parts)})"


def _key(table: Newest, expressions: Mapping[str, str]) -> str:
    return f"tuple({', '.join(f'toString({expressions[k]})' for k in table.key)})"


def _compared(table: Newest, *, bounded: bool, listed: str = "") -> str:
    """(key, version expected or 0, version found or 0, instant) of what differs, of a range of owners or of the keys listed."""
    mine = {name: f"t.{name}" for name in table.columns}
    owners = (
        f"{{a}}.{table.owner} >= {{low:String}}"  # the range before may have ended with a name of which rows came since
    )
    if bounded:
        owners += f" AND {{a}}.{table.owner} <= {{high:String}}"
    begins = f"{{a}}.{table.at} >= fromUnixTimestamp64Micro({{from:Int64}}, 'UTC')"
    ends = f"{{a}}.{table.at} < fromUnixTimestamp64Micro({{to:Int64}}, 'UTC')"
    late = f"t.{table.at} >= fromUnixTimestamp64Micro({{to:Int64}}, 'UTC')" if table.ends else "0"
    where_s = f"({table.where}) AND {owners.replace('{a}', 's')} AND {begins.replace('{a}', 's')}"
    if table.ends:
        where_s += f" AND {ends.replace('{a}', 's')}"
    where_t = f"{owners.replace('{a}', 't')} AND {begins.replace('{a}', 't')}"
    if listed:
        where_s += f" AND {_key(table, table.columns)} IN ({listed})"
        where_t += f" AND {_key(table, mine)} IN ({listed})"
    version = table.columns["version"]
    return f"""
SELECT k, toString(max(ev)), toString(max(fv)), max(at), max(e), max(f) FROM (
  SELECT {_key(table, table.columns)} AS k, argMax(if({table.gone}, 0, 1), {version}) AS e,
         argMax(if({table.gone}, 0, {_hash(table, table.columns)}), {version}) AS eh, max({version}) AS ev,
         max(toUnixTimestamp64Micro(s.{table.at})) AS at, 0 AS f, toUInt64(0) AS fh, toUInt256(0) AS fv, 0 AS late
  FROM {table.source} AS s FINAL WHERE {where_s} GROUP BY k
  UNION ALL
  SELECT {_key(table, mine)} AS k, 0, toUInt64(0), toUInt256(0), toUnixTimestamp64Micro(t.{table.at}), 1,
         {_hash(table, mine)}, t.version, {late}
  FROM {table.name} AS t FINAL WHERE {where_t}
) GROUP BY k HAVING max(late) = 0 AND (max(e) != max(f) OR max(eh) != max(fh)) ORDER BY k"""


async def _newest(
    engine: Maintenance, table: Newest, low: str, high: str, span: tuple[int, int], *, repair: bool, settle_s: float
) -> AsyncIterator[Drift]:
    parameters = {"low": low, "high": high, "from": span[0], "to": span[1]}
    first = {tuple(r[0]): tuple(r[1:]) for r in await engine.query(_compared(table, bounded=bool(high)), parameters)}
    if not first:
        return
    await asyncio.sleep(settle_s)
    keys = sorted(first)
    for start in range(0, len(keys), ROWS_MAX):
        part = keys[start : start + ROWS_MAX]
        listed = ", ".join(f"tuple({', '.join(map(literal, key))})" for key in part)
        text = _compared(table, bounded=bool(high), listed=listed)
        again = {tuple(r[0]): tuple(r[1:]) for r in await engine.query(text, parameters)}
        wrong = {key: seen for key, seen in again.items() if seen == first[key]}
        left = wrong
        for _ in range(PASSES_MAX if repair else 0):
            if not left:
                break
            await _mend(engine, table, left, span)
            found = {tuple(r[0]): tuple(r[1:]) for r in await engine.query(text, parameters)}
            left = {key: seen for key, seen in found.items() if key in wrong}
        owners: dict[str, list[tuple[Any, ...]]] = {}
        for key in wrong:
            owners.setdefault(key[table.key.index(table.owner)], []).append(key)
        for owner, of in owners.items():
            yield Drift(
                owner,
                max(wrong[key][2] for key in of),
                sum(wrong[key][3] for key in of),
                sum(wrong[key][4] for key in of),
                repair and not any(key in left for key in of),
            )


async def _mend(
    engine: Maintenance, table: Newest, wrong: Mapping[tuple[Any, ...], tuple[Any, ...]], span: tuple[int, int]
) -> None:
    """Insert what should be there, then delete what hides it: nobody sees neither, unless a merge comes between."""
    values = ", ".join(table.columns.values())
    # Of a key that has nothing in the range, whatever is before it counts.
    for keys, range_us in (
        ([k for k, seen in wrong.items() if seen[0] != "0"], span),
        ([k for k, seen in wrong.items() if seen[0] == "0"], (0, span[0])),
    ):
        if keys:
            listed = ", ".join(f"tuple({', '.join(map(literal, key))})" for key in keys)
            owners = ", ".join(literal(o) for o in {key[table.key.index(table.owner)] for key in keys})
            until = f" AND s.{table.at} < fromUnixTimestamp64Micro({range_us[1]}, 'UTC')" if table.ends else ""
            await engine.command(
                f"INSERT INTO {table.name} ({', '.join(table.columns)})"
                f" SELECT {', '.join(f'newest.{n}' for n in range(1, len(table.columns) + 1))} FROM ("
                f"SELECT argMax(({values}), {table.columns['version']}) AS newest FROM {table.source} AS s FINAL"
                f" WHERE ({table.where}) AND s.{table.owner} IN ({owners}) AND {_key(table, table.columns)} IN ({listed})"
                f" AND s.{table.at} >= fromUnixTimestamp64Micro({range_us[0]}, 'UTC'){until}"
                f" GROUP BY {_key(table, table.columns)})",
                do_not_merge_across_partitions_select_final=1,
                max_partitions_per_insert_block=0,
            )
    plain = {name: name for name in table.columns}
    hiding = [(*key, seen[1]) for key, seen in wrong.items() if int(seen[1]) > int(seen[0])]
    if hiding:
        listed = ", ".join(f"({', '.join(map(literal, row))})" for row in hiding)
        owners = ", ".join(literal(o) for o in {row[table.key.index(table.owner)] for row in hiding})
        key = ", ".join(f"toString({plain[k]})" for k in table.key)
        await engine.command(
            f"DELETE FROM {table.name} WHERE {table.owner} IN ({owners}) AND ({key}, toString(version)) IN ({listed})"
        )


# --- counts


def _counted(table: Counts, devices: str = "") -> str:
    among = f" AND device_id IN ({devices})" if devices else ""
    return f"""
SELECT device_id, quality, generation, sum(e) AS expected, sum(f) AS found, sum(r) AS replaced FROM (
  SELECT device_id, quality, generation, count() AS e, toUInt64(0) AS f, countIf(revised = 1 OR generation > 0) AS r FROM {table.source} FINAL
  WHERE timestamp >= fromUnixTimestamp64Micro({{from:Int64}}, 'UTC') AND timestamp < fromUnixTimestamp64Micro({{to:Int64}}, 'UTC'){among}
  GROUP BY device_id, quality, generation
  UNION ALL
  SELECT device_id, quality, generation, toUInt64(0), sum(rows), toUInt64(0) FROM {table.name}
  WHERE day = toDate(fromUnixTimestamp64Micro({{from:Int64}}, 'UTC')){among} GROUP BY device_id, quality, generation
) GROUP BY device_id, quality, generation"""


def _different(table: Counts, after: str, devices: str = "") -> str:
    # A reading that was corrected or replayed was counted each time it came, and only its last row is left: no more than that
    # is no fault.
    return (
        f"SELECT device_id, sum(expected), sum(found) FROM ({_counted(table, devices)}) WHERE device_id > {after}"
        " GROUP BY device_id HAVING sum(expected != found) > 0"
        " AND NOT (sum(replaced) > 0 AND sum(found) BETWEEN sum(expected) AND sum(expected) + sum(replaced) * (1 + max(generation)))"
        f" ORDER BY device_id LIMIT {ROWS_MAX}"
    )


async def _counts(
    engine: Maintenance, table: Counts, day_us: int, *, repair: bool, settle_s: float
) -> AsyncIterator[Drift]:
    parameters = {"from": day_us, "to": day_us + 86_400_000_000}
    after = "''"
    while True:
        first = {r[0]: (r[1], r[2]) for r in await engine.query(_different(table, after), parameters)}
        if not first:
            return
        await asyncio.sleep(settle_s)
        devices = ", ".join(map(literal, first))
        again = {r[0]: (r[1], r[2]) for r in await engine.query(_different(table, "''", devices), parameters)}
        # Of a day that grows the numbers move, and their distance stays.
        wrong = {
            device: seen for device, seen in again.items() if seen[0] - seen[1] == first[device][0] - first[device][1]
        }
        left: set[str] = set()
        if repair and wrong:
            await _recount(engine, table, wrong, parameters)
            left = {
                r[0] for r in await engine.query(_different(table, "''", ", ".join(map(literal, wrong))), parameters)
            }
        for device, (expected, found) in wrong.items():
            yield Drift(device, day_us, int(expected), int(found), repair and device not in left)
        after = literal(max(first, key=str.encode))


async def _recount(
    engine: Maintenance, table: Counts, devices: Mapping[str, Any], parameters: Mapping[str, Any]
) -> None:
    rows = [
        # Sums wrap around as the engine's do, so that a number of 64 bits without a sign takes away as well.
        (parameters["from"] // 86_400_000_000, device, quality, generation, (expected - found) % _WRAP)
        for device, quality, generation, expected, found, _ in await engine.query(
            _counted(table, ", ".join(map(literal, devices))), parameters
        )
        if expected != found
    ]
    types = {
        "day": "Date",
        "device_id": "LowCardinality(String)",
        "quality": "UInt8",
        "generation": "UInt32",
        "rows": "UInt64",
    }
    if rows:
        await engine.insert(table.name, types, rows)
