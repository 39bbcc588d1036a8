"""Windows that follow a change: made anew of the stored readings, by the code that makes them live.

A window that a change touches is made at once where it is over, once more when the aggregate stage has told of it (by a trigger of its table), and
when that can correct it no longer: whatever came late has its part then. What comes out of the readings as it stands is left as it is, so all of this may be done again at any time. Records of such windows
have a revision above all that the stage gives (`MADE_REVISION`), because the stage's own state knows nothing of the change.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, Final

import orjson

from preservarium.domain.quality.checks import CheckCompiler, DeviceChecks
from preservarium.domain.quality.meter import CONSUMPTION_SUFFIX
from preservarium.domain.readings.lineage import GENERATION_LIVE
from preservarium.domain.windows import MADE_REVISION, Nature, Plan, Spec, Stored, of_stored
from preservarium.operations.compared_tables import AGGREGATES
from preservarium.settings import LiveSettings, Settings
from preservarium.stages.aggregate import plan_of
from preservarium.stages.sync import AGGREGATES as CLICKHOUSE
from preservarium.stores import registry
from preservarium.stores.changes import Change
from preservarium.stores.events import microseconds
from preservarium.stores.maintenance import Maintenance, literal
from preservarium.stores.tables import AGGREGATES as DECLARED

#: Windows of one series that are made of one reading of its rows.
WINDOWS_AT_ONCE: Final = 500
#: Windows whose change goes to the stores together.
STORED_AT_ONCE: Final = 500
#: Windows that one turn settles.
SETTLED_MAX: Final = 5_000
#: A window closes by the clock a while after its end where its device is silent.
GRACE: Final = timedelta(minutes=10)

_WINDOW: Final = (
    "device_id",
    "component_type",
    "pin_position",
    "connector_mode",
    "unit",
    "size_s",
    "hop_s",
    "window_start",
)
_KEY: Final = ", ".join(_WINDOW)
_ROW: Final = tuple(column.name for column in DECLARED.columns)
#: What a window says, apart from how it came about.
_SAYS: Final = (
    "count",
    "min",
    "max",
    "mean",
    "sum",
    "last",
    "last_at",
    "consumption",
    "circular",
    "spread",
    "cos_sum",
    "sin_sum",
)

_MARK: Final = f"""
INSERT INTO change_windows (change_id, {_KEY}, due_at)
SELECT DISTINCT $1::integer, s.device_id, t.component_type, s.pin_position, s.connector_mode, u.unit, p.size_s, p.hop_s, w,
       w + make_interval(secs => p.size_s) + $4::interval
FROM change_rows c JOIN series s USING (series_id)
CROSS JOIN LATERAL (SELECT DISTINCT unit FROM (VALUES (CASE WHEN (c.before).received_at IS NOT NULL THEN coalesce((c.before).unit, s.unit) END),
                                                      (CASE WHEN (c.after).received_at IS NOT NULL THEN coalesce((c.after).unit, s.unit) END)) AS v(unit)
                    WHERE unit IS NOT NULL) AS u
CROSS JOIN LATERAL (SELECT s.component_type UNION SELECT left(s.component_type, -length($5::text)) WHERE s.component_type LIKE '%' || $5) AS t(component_type)
CROSS JOIN unnest($2::integer[], $3::integer[]) AS p(size_s, hop_s)
CROSS JOIN LATERAL generate_series(
  date_bin(make_interval(secs => p.hop_s), c.timestamp, '1970-01-01 00:00+00') - make_interval(secs => p.size_s - p.hop_s),
  date_bin(make_interval(secs => p.hop_s), c.timestamp, '1970-01-01 00:00+00'), make_interval(secs => p.hop_s)) AS w
WHERE c.change_id = $1 AND c.swapped
ON CONFLICT DO NOTHING"""

_READINGS: Final = """
SELECT m.timestamp, m.value, m.quality, m.flags, m.revised, coalesce(m.unit, s.unit) AS unit
FROM series s CROSS JOIN LATERAL (
  SELECT timestamp, value, quality, flags, revised, unit FROM measurements WHERE series_id = s.series_id AND timestamp >= $5 AND timestamp < $6) m
WHERE s.device_id = $1 AND s.connector_mode = $2 AND s.component_type = $3 AND s.pin_position = $4"""


async def mark(connection: Any, settings: Settings, change: Change) -> None:
    """Note every window that holds a row which the change has swapped."""
    plan = plan_of(LiveSettings(settings))
    late = (
        timedelta(microseconds=plan.lateness_us + plan.horizon_us)
        + timedelta(seconds=settings.aggregate.silence_s)
        + GRACE
    )
    await connection.execute(
        _MARK,
        change.change_id,
        [spec.size_s for spec in plan.specs],
        [spec.hop_s for spec in plan.specs],
        late,
        CONSUMPTION_SUFFIX,
    )


@dataclass(frozen=True, slots=True)
class _Made:
    """A window as it is, and as it is to be."""

    mark: Mapping[str, Any]
    standing: Mapping[str, Any] | None
    record: dict[str, Any] | None


class Follower:
    """Makes windows anew. For one task at a time.

    Args:
        settings: the windows that there are.
        connection: of asyncpg; a session.
        clickhouse: None: there is none.
    """

    def __init__(self, settings: Settings, connection: Any, clickhouse: Maintenance | None) -> None:
        self._settings, self._connection, self._clickhouse = settings, connection, clickhouse
        self._plan: Plan = plan_of(LiveSettings(settings))
        self._checks: dict[str, DeviceChecks] = {}

    async def follow(self, change: Change, why: str) -> int:
        """Make the windows of a change that are over; how many are others now. What was interrupted is gone on with."""
        rows = await self._connection.fetch(
            f"SELECT change_id, {_KEY}, step FROM change_windows WHERE change_id = $1"
            f" AND window_start + make_interval(secs => size_s) + make_interval(secs => $2) <= now() ORDER BY {_KEY}",
            change.change_id, self._plan.lateness_us / 1e6,
        )  # fmt: skip
        return await self._make(rows, why)

    async def settle(self) -> int:
        """Make those once more that the aggregate stage can correct no longer, and have done with them; how many were looked at."""
        rows = await self._connection.fetch(
            f"SELECT w.change_id, {_KEY}, w.step, w.due_at, c.kind FROM change_windows w JOIN changes c USING (change_id)"
            f" WHERE NOT w.settled AND w.due_at <= now() AND c.state IN ('promoted', 'rolled_back') ORDER BY {_KEY} LIMIT $1",
            SETTLED_MAX,
        )
        for kind, some in groupby(
            sorted(rows, key=lambda row: (row["kind"], [row[name] for name in _WINDOW])), key=lambda row: row["kind"]
        ):
            part = list(some)
            await self._make(part, kind)
            # Where something was told of it meanwhile, it is due again.
            await self._connection.executemany(
                f"UPDATE change_windows SET settled = true WHERE change_id = $1 AND ({_KEY}) = ($2, $3, $4, $5, $6, $7, $8, $9) AND due_at = $10",
                [(row["change_id"], *(row[name] for name in _WINDOW), row["due_at"]) for row in part],
            )
        return len(rows)

    async def _make(self, rows: Sequence[Any], why: str) -> int:
        changed = 0
        waiting: list[_Made] = []
        for _, some in groupby(rows, key=lambda row: tuple(row[name] for name in _WINDOW[:5])):
            marks = list(some)
            for start in range(0, len(marks), WINDOWS_AT_ONCE):
                waiting += await self._of_series(marks[start : start + WINDOWS_AT_ONCE], why)
                if len(waiting) >= STORED_AT_ONCE:
                    changed += await self._store(waiting)
                    waiting = []
        return changed + await self._store(waiting)

    async def _of_series(self, marks: Sequence[Any], why: str) -> list[_Made]:
        first = marks[0]
        about = (
            first["device_id"],
            first["connector_mode"],
            first["component_type"],
            first["pin_position"],
            first["unit"],
        )
        begin = min(mark["window_start"] for mark in marks)
        end = max(mark["window_start"] + timedelta(seconds=mark["size_s"]) for mark in marks)
        check = (await self._device(about[0])).series(about[2])
        nature = Nature(counts=check.counter is not None, circular=check.circular)
        eaten: dict[Any, float] = {}
        if nature.counts:
            consumed = await self._connection.fetch(
                _READINGS, *about[:2], about[2] + CONSUMPTION_SUFFIX, about[3], begin, end
            )
            eaten = {row["timestamp"]: row["value"] for row in consumed if row["value"] is not None}
        readings = [
            Stored(
                microseconds(row["timestamp"]), row["value"], row["quality"], tuple(row["flags"] or ()), bool(row["revised"]),
                eaten.get(row["timestamp"]),
            )
            for row in await self._connection.fetch(_READINGS, *about[:4], begin, end)
            if row["unit"] == about[4]
        ]  # fmt: skip
        readings.sort()
        ats = [reading.at for reading in readings]
        standing = {
            (row["size_s"], row["hop_s"], row["window_start"]): row
            for row in await self._connection.fetch(
                f"SELECT DISTINCT ON (size_s, hop_s, window_start) {', '.join(_ROW)} FROM aggregates"
                f" WHERE device_id = $1 AND component_type = $2 AND pin_position = $3 AND connector_mode = $4 AND unit = $5"
                f" AND window_start >= $6 AND window_start < $7 ORDER BY size_s, hop_s, window_start, generation DESC, revision DESC",
                about[0], about[2], about[3], about[1], about[4], begin, end,
            )
        }  # fmt: skip
        made = []
        kept_since, told_by = await self._connection.fetchrow(
            "SELECT now() - make_interval(days => $1), now() - make_interval(secs => $2)",
            self._settings.sink.retention_days, self._plan.lateness_us / 1e6 + self._settings.aggregate.silence_s,
        )  # fmt: skip
        for mark in marks:
            if mark["window_start"] < kept_since:
                continue  # of what retention has dropped in part, no window is to be made
            stands = standing.get((mark["size_s"], mark["hop_s"], mark["window_start"]))
            if stands is None and mark["window_start"] + timedelta(seconds=mark["size_s"]) > told_by:
                continue  # the aggregate stage tells of it first, and then it is due again
            start_us = microseconds(mark["window_start"])
            record = of_stored(
                _between(readings, ats, start_us, start_us + mark["size_s"] * 1_000_000), about, Spec(mark["size_s"], mark["hop_s"]),
                start_us // 1_000_000, lambda _name: nature, generation=GENERATION_LIVE if stands is None else stands["generation"],
                revision=MADE_REVISION if stands is None else max(MADE_REVISION, stands["revision"] + 1), why=why,
            )  # fmt: skip
            made.append(_Made(mark, stands, record))
        return made

    async def _device(self, device_id: str) -> DeviceChecks:
        if device_id not in self._checks:
            found = (await registry.composite(self._connection, [device_id])).get(device_id)
            rows = await self._connection.fetch("SELECT name, doc FROM datatypes") if not self._checks else []
            if rows:
                documents: dict[str, Any] = {row["name"]: orjson.loads(row["doc"]) for row in rows}
                self._compiler = CheckCompiler(documents.get)
            elif not self._checks:
                self._compiler = CheckCompiler(lambda _name: None)
            if len(self._checks) > 10_000:
                self._checks = dict(list(self._checks.items())[-100:])
            self._checks[device_id] = self._compiler.device(
                None if found is None else found.device, None if found is None else found.type  # type: ignore[arg-type]
            )  # fmt: skip
        return self._checks[device_id]

    async def _store(self, made: Sequence[_Made]) -> int:
        """Into both stores: in PostgreSQL with what stood kept for ever, in ClickHouse what PostgreSQL has then."""
        others = [one for one in made if not _same(one)]
        connection = self._connection
        names = ", ".join(_ROW)
        async with connection.transaction():
            for one in others:
                change_id = one.mark["change_id"]
                if one.standing is not None:
                    # The first that a change met there is what it is taken back to.
                    if one.standing["revision"] < MADE_REVISION or not await self._is_ours(change_id, one.standing):
                        await connection.execute(
                            "INSERT INTO change_window_rows SELECT $1::integer, a.* FROM aggregates a WHERE window_id = $2 ON CONFLICT DO NOTHING",
                            change_id, one.standing["window_id"],
                        )  # fmt: skip
                    await connection.execute("DELETE FROM aggregates WHERE window_id = $1", one.standing["window_id"])
                if one.record is not None:
                    values = ", ".join(f"${n}::{column.type}" for n, column in enumerate(DECLARED.columns, 1))
                    await connection.execute(
                        f"INSERT INTO aggregates ({names}) VALUES ({values}) ON CONFLICT (window_id) DO UPDATE SET"
                        f" {', '.join(f'{name} = excluded.{name}' for name in _ROW if name != 'window_id')}",
                        *DECLARED.row(one.record),
                    )
            await self._step(made, 1)
        if self._clickhouse is not None:
            await bring_windows(
                connection, self._clickhouse, [one.mark for one in made if one.mark["step"] < 2 or not _same(one)]
            )
        await self._step(made, 2)
        return len(others)

    async def _is_ours(self, change_id: int, standing: Mapping[str, Any]) -> bool:
        """Whether this change has met the window before: then what it found first is kept already."""
        found: bool = await self._connection.fetchval(
            f"SELECT EXISTS (SELECT FROM change_windows WHERE change_id = $1 AND ({_KEY}) = ($2, $3, $4, $5, $6, $7, $8, $9) AND step > 0)",
            change_id, *(standing[name] for name in _WINDOW),
        )  # fmt: skip
        return found

    async def _step(self, made: Sequence[_Made], step: int) -> None:
        await self._connection.executemany(
            f"UPDATE change_windows SET step = $10 WHERE change_id = $1 AND ({_KEY}) = ($2, $3, $4, $5, $6, $7, $8, $9)",
            [(one.mark["change_id"], *(one.mark[name] for name in _WINDOW), step) for one in made],
        )

    async def restore(self, change: Change) -> None:
        """Put the windows back that stood before a change, in both stores; those that it has made go. To be followed by `follow`."""
        connection = self._connection
        rows = await connection.fetch(
            f"SELECT change_id, {_KEY}, step FROM change_windows WHERE change_id = $1 ORDER BY {_KEY}", change.change_id
        )
        names = await self._columns()
        columns, of_backup = ", ".join(names), ", ".join(f"c.{name}" for name in names)
        restored = ", ".join(f"{name} = excluded.{name}" for name in names if name != "window_id")
        for start in range(0, len(rows), STORED_AT_ONCE):
            part = rows[start : start + STORED_AT_ONCE]
            arrays = _arrays(part)
            async with connection.transaction():
                await connection.execute(
                    f"DELETE FROM aggregates a USING {arrays[0]} WHERE (a.device_id, a.component_type, a.pin_position, a.connector_mode, a.unit,"
                    f" a.size_s, a.hop_s, a.window_start) = (k.device_id, k.component_type, k.pin_position, k.connector_mode, k.unit, k.size_s, k.hop_s,"
                    f" k.window_start) AND a.revision >= {MADE_REVISION}",
                    *arrays[1],
                )  # fmt: skip
                await connection.execute(
                    f"INSERT INTO aggregates ({columns}) SELECT {of_backup} FROM change_window_rows c JOIN {arrays[0]}"
                    f" ON (c.device_id, c.component_type, c.pin_position, c.connector_mode, c.unit, c.size_s, c.hop_s, c.window_start)"
                    f" = (k.device_id, k.component_type, k.pin_position, k.connector_mode, k.unit, k.size_s, k.hop_s, k.window_start)"
                    f" WHERE c.change_id = {change.change_id} ON CONFLICT (window_id) DO UPDATE SET {restored}",
                    *arrays[1],
                )
            if self._clickhouse is not None:
                await bring_windows(connection, self._clickhouse, part)

    async def _columns(self) -> list[str]:
        rows = await self._connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'aggregates'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        )
        return [row[0] for row in rows]


def _arrays(marks: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """A FROM item `k` with the keys of windows, and its arguments."""
    types = ("text", "text", "text", "text", "text", "integer", "integer", "timestamptz")
    item = f"unnest({', '.join(f'${n}::{kind}[]' for n, kind in enumerate(types, 1))}) AS k({_KEY})"
    return item, [[mark[name] for mark in marks] for name in _WINDOW]


def _between(readings: Sequence[Stored], ats: Sequence[int], begin: int, end: int) -> Sequence[Stored]:
    from bisect import bisect_left

    return readings[bisect_left(ats, begin) : bisect_left(ats, end)]


def _same(made: _Made) -> bool:
    """Whether what stands says what the readings say."""
    if made.standing is None or made.record is None:
        return made.standing is None and made.record is None
    row = dict(zip(_ROW, DECLARED.row(made.record), strict=True))
    return all(_bits(made.standing[name]) == _bits(row[name]) for name in _SAYS)


def _bits(value: Any) -> Any:
    from preservarium.domain.quality.rederivation import bits

    return bits(value) if isinstance(value, float) else value


async def bring_windows(connection: Any, clickhouse: Maintenance, marks: Iterable[Mapping[str, Any]]) -> None:
    """Have ClickHouse hold of these windows what PostgreSQL holds: the newest of each, or none."""
    some = list(marks)
    if not some:
        return
    item, arguments = _arrays(some)
    mine = ", ".join(f"a.{name}" for name in _WINDOW)
    rows = await connection.fetch(
        f"SELECT {AGGREGATES.select} FROM (SELECT DISTINCT ON ({mine}) a.* FROM {item} JOIN aggregates a"
        f" ON ({mine}) = ({', '.join(f'k.{name}' for name in _WINDOW)}) ORDER BY {mine}, a.generation DESC, a.revision DESC) e",
        *arguments,
    )
    right = [AGGREGATES.columns(row) for row in rows]
    if right:
        await clickhouse.insert(CLICKHOUSE.name, CLICKHOUSE.types, right)
    names = list(CLICKHOUSE.types)
    at = [
        names.index(name)
        for name in (
            "device_id",
            "component_type",
            "pin_position",
            "connector_mode",
            "unit",
            "size_s",
            "hop_s",
            "window_start",
        )
    ]
    versions = {
        tuple(row[n] for n in at): (row[names.index("generation")] << 32) + row[names.index("revision")]
        for row in right
    }
    wrong = []
    for mark in some:
        key = (*(mark[name] for name in _WINDOW[:7]), microseconds(mark["window_start"]))
        # What is above the newest hides it, where a change was taken back; and where none is to stand, all of them.
        wrong.append((*key, versions.get(key, -1)))
    for start in range(0, len(wrong), 200):
        listed = " OR ".join(
            f"(({', '.join(_WINDOW[:7])}, toUnixTimestamp64Micro(window_start)) = ({', '.join(map(literal, one[:8]))})"
            f" AND toInt128(version) > {one[8]})"
            for one in wrong[start : start + 200]
        )
        devices = ", ".join(sorted({literal(one[0]) for one in wrong[start : start + 200]}))
        hidden = await clickhouse.query(
            f"SELECT count() FROM {CLICKHOUSE.name} WHERE device_id IN ({devices}) AND ({listed})"
        )
        if hidden[0][0]:
            await clickhouse.command(f"DELETE FROM {CLICKHOUSE.name} WHERE device_id IN ({devices}) AND ({listed})")
