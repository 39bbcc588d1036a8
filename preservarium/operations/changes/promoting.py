"""A change carried out, and taken back: slot by slot, first in PostgreSQL, then in ClickHouse, then what follows from the rows.

Whatever ends it, at whatever step, the same command goes on where it was: each slot says how far it is, each insert into ClickHouse has a token of its
slot, and what follows (windows, alarms, last values, roll-ups) is made of what is there. Rows that the live stages write meanwhile are left alone,
and leave these alone: a row is swapped only where what stands is what was seen, and what is put there is of a higher generation.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from preservarium.clock import SystemClock
from preservarium.operations import derived
from preservarium.operations.changes.following import Follower, mark
from preservarium.operations.compared_tables import ALARM_EVENTS as COMPARED_ALARMS
from preservarium.settings import Settings
from preservarium.stages.sync import ALARM_EVENTS as CLICKHOUSE_ALARMS
from preservarium.stages.sync import MEASUREMENTS, row_version
from preservarium.stores import changes
from preservarium.stores.changes import LOCK, Change, ChangeError, State
from preservarium.stores.events import instant, microseconds
from preservarium.stores.maintenance import Maintenance, literal
from preservarium.stores.tables import ALARM_EVENTS

#: ClickHouse is some seconds behind PostgreSQL as a rule: so long it is waited for.
BEHIND_S: Final = 60.0
#: Another one that is at work is waited for so long.
LOCK_S: Final = 5.0
#: A row in ClickHouse's last values is looked at twice, so far apart.
SETTLE_S: Final = 1.0
#: Alarms whose history is rewritten in one transaction.
ALARMS_AT_ONCE: Final = 500
#: Keys in one statement for ClickHouse: some 50 KB, of the 256 that it takes.
KEYS_AT_ONCE: Final = 500
#: Series whose last value is looked at together.
SERIES_AT_ONCE: Final = 500
#: Pieces of the roll-ups that are made at the end; what is left then is upkeep's.
ROLLUP_PIECES_MAX: Final = 10_000

Progress = Callable[[int, int, str], None]  #: (slots done, slots, what is done)


def _reached(step: str) -> None:
    """A step is done, and noted: tests end the process here, one step after the other."""


class Carrier:
    """Carries changes out and takes them back. For one task at a time.

    Args:
        settings: where the databases are.
        connection: of asyncpg; a session.
        clickhouse: None: it is switched off, and PostgreSQL is all.
    """

    def __init__(self, settings: Settings, connection: Any, clickhouse: Maintenance | None) -> None:
        self._settings, self._connection, self._clickhouse = settings, connection, clickhouse
        self._follower = Follower(settings, connection, clickhouse)
        self._clock = SystemClock()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        waited_s = 0.0
        # A process that was killed has its session for a moment longer.
        while not await self._connection.fetchval("SELECT pg_try_advisory_lock($1)", LOCK):
            if waited_s >= LOCK_S:
                message = "another change is being promoted or rolled back: wait for it"
                raise ChangeError(message)
            await asyncio.sleep(0.1)
            waited_s += 0.1
        try:
            yield
        finally:
            await self._connection.execute("SELECT pg_advisory_unlock($1)", LOCK)

    # --- there

    async def promote(self, change_id: int, *, actor: str, reason: str, progress: Progress = lambda *_: None) -> Change:
        """Carry a change out, or go on with it.

        Args:
            change_id: which.
            actor: who approves.
            reason: why.
            progress: told how far it is.

        Raises:
            ChangeError: it cannot be promoted as it is.
            VerificationError: ClickHouse refuses, or cannot be reached: the same again goes on.
        """
        async with self._alone():
            change = await changes.find(self._connection, change_id)
            if change.state is State.ROLLED_BACK:
                # What stood before is another one now.
                async with self._connection.transaction():
                    for table in ("change_windows", "change_window_rows", "change_alarms"):
                        await self._connection.execute(f"DELETE FROM {table} WHERE change_id = $1", change_id)
            if change.state is not State.PROMOTING:
                change = await changes.becomes(
                    self._connection, change, State.PROMOTING, expected=(State.READY, State.ROLLED_BACK), event="approved",
                    data={"reason": reason}, actor=actor, at_us=self._clock.now_us(), attempt=True,
                )  # fmt: skip
            return await self._promote(change, actor, progress)

    async def _promote(self, change: Change, actor: str, progress: Progress) -> Change:
        await self._count(change, counts=True)
        await self._slots(change, 3, self._forward, progress)
        await self._follow(change, progress)
        await self._alarms(change, undo=False)
        _reached("alarms")
        await self._finish(change, progress)
        left: int = await self._connection.fetchval(
            "SELECT count(*) FROM change_rows WHERE change_id = $1 AND NOT swapped", change.change_id
        )
        return await changes.becomes(
            self._connection, change, State.PROMOTED, expected=(State.PROMOTING,), event="promoted",
            data={"left_alone": left}, summary={"left_alone": left}, actor=actor, at_us=self._clock.now_us(),
        )  # fmt: skip

    # --- and back

    async def rollback(
        self, change_id: int, *, actor: str, reason: str, progress: Progress = lambda *_: None
    ) -> Change:
        """Put back what stood before a change, row by row; or go on with that. Raises as `promote` does."""
        async with self._alone():
            change = await changes.find(self._connection, change_id)
            if change.state is not State.ROLLING_BACK:
                if later := await changes.overlapping(self._connection, change_id, later=True):
                    message = (
                        f"later changes have made other rows of these: take back {', '.join(map(str, later))} first"
                    )
                    raise ChangeError(message)
                if change.state is State.PROMOTING:
                    # What is in PostgreSQL may be in ClickHouse or not: only what is in both can be taken back.
                    await self._slots(change, 3, self._forward, progress, begun=True)
                change = await changes.becomes(
                    self._connection, change, State.ROLLING_BACK, expected=(State.PROMOTED, State.PROMOTING), event="rollback_approved",
                    data={"reason": reason}, actor=actor, at_us=self._clock.now_us(),
                )  # fmt: skip
            await self._slots(change, 5, self._backward, progress, begun=True)
            await self._follower.restore(change)
            _reached("windows_back")
            await self._follower.follow(change, change.kind)
            await self._alarms(change, undo=True)
            _reached("alarms_back")
            await self._finish(change, progress)
            await self._count(change, counts=False)
            left: int = await self._connection.fetchval(
                "SELECT count(*) FROM change_rows WHERE change_id = $1 AND swapped", change.change_id
            )
            await self._connection.execute(
                "UPDATE change_windows SET settled = due_at <= now() WHERE change_id = $1", change.change_id
            )
            async with self._connection.transaction():
                await self._connection.execute(
                    "UPDATE change_slots SET step = 0 WHERE change_id = $1", change.change_id
                )
                await self._connection.execute(
                    "UPDATE change_rows SET swapped = NULL WHERE change_id = $1", change.change_id
                )
                return await changes.becomes(
                    self._connection, change, State.ROLLED_BACK, expected=(State.ROLLING_BACK,), event="rolled_back",
                    data={"left_alone": left}, summary={"not_restored": left}, actor=actor, at_us=self._clock.now_us(),
                )  # fmt: skip

    # --- rows

    async def _slots(self, change: Change, to_step: int, do: Any, progress: Progress, *, begun: bool = False) -> None:
        total: int = await self._connection.fetchval(
            "SELECT count(*) FROM change_slots WHERE change_id = $1", change.change_id
        )
        rows = await self._connection.fetch(
            "SELECT slot, step FROM change_slots WHERE change_id = $1 AND step < $2 AND ($3::boolean IS FALSE OR step >= 2) ORDER BY slot",
            change.change_id, to_step, begun,
        )  # fmt: skip
        for n, row in enumerate(rows):
            await do(change, row["slot"], row["step"])
            progress(total - len(rows) + n + 1, total, "rows")

    async def _forward(self, change: Change, slot: int, step: int) -> None:
        if step < 1:
            await self._read(change, slot)
            _reached("read")
        if step < 2:
            await self._swap(change, slot, undo=False)
            _reached("swapped")
        await self._bring(change, slot, undo=False)
        _reached("brought")

    async def _backward(self, change: Change, slot: int, step: int) -> None:
        if step < 4:
            await self._swap(change, slot, undo=True)
            _reached("swapped_back")
        await self._bring(change, slot, undo=True)
        _reached("brought_back")

    async def _swap(self, change: Change, slot: int, *, undo: bool) -> None:
        import asyncpg

        for attempt in range(5):
            try:
                async with self._connection.transaction():
                    await self._connection.execute("SET LOCAL statement_timeout = '120s'")
                    await self._connection.fetchval(
                        "SELECT change_swap($1, $2, $3)", change.change_id, slot, undo, timeout=150
                    )
                return
            except asyncpg.DeadlockDetectedError:
                # A live write had the same rows in another order: it goes first.
                await asyncio.sleep(0.1 * (attempt + 1))
        message = "live writes are in the way again and again: try again"
        raise ChangeError(message)

    async def _at(self, change: Change, slot: int, step: int) -> None:
        await self._connection.execute(
            "UPDATE change_slots SET step = $3 WHERE change_id = $1 AND slot = $2", change.change_id, slot, step
        )

    async def _rows(self, change: Change, slot: int, where: str) -> list[Any]:
        """Rows of a slot for ClickHouse; of what it drops for its age, none: it is not known when."""
        rows: list[Any] = await self._connection.fetch(
            f"""
SELECT s.device_id, s.component_type, s.pin_position, s.connector_mode, s.unit AS s_unit, s.topic AS s_topic, coalesce(s.circular, 0) AS s_circular,
       c.timestamp, c.before, c.after, c.ch_ingested_at, c.ch_circular,
       b.parser AS b_parser, b.config_rev AS b_config_rev, b.experiment_id AS b_experiment_id,
       a.parser AS a_parser, a.config_rev AS a_config_rev, a.experiment_id AS a_experiment_id
FROM change_rows c JOIN series s USING (series_id) LEFT JOIN derivations b ON b.derivation_id = (c.before).derivation_id
LEFT JOIN derivations a ON a.derivation_id = (c.after).derivation_id
WHERE c.change_id = $1 AND c.slot = $2 AND c.timestamp >= $3 AND {where} ORDER BY c.series_id, c.timestamp""",
            change.change_id, slot, instant(change.created_at) - timedelta(days=self._settings.sync.retention_days - 1),
        )  # fmt: skip
        return rows

    async def _read(self, change: Change, slot: int) -> None:
        """Note what only ClickHouse knows of the rows that stand; wait for those that are on their way there."""
        if self._clickhouse is not None:
            rows = await self._rows(change, slot, "(c.before).received_at IS NOT NULL")
            waited_s = 0.0
            while rows:
                found = await self._standing(rows)
                missing = [row for row in rows if found.get(_key(row), (None,))[0] != _version(row["before"])]
                if not missing:
                    await self._connection.executemany(
                        "UPDATE change_rows c SET ch_ingested_at = $5, ch_circular = $6 FROM series s WHERE c.change_id = $1 AND c.timestamp = $2"
                        " AND s.series_id = c.series_id AND (s.device_id, s.component_type, s.pin_position, s.connector_mode) = ($3, $4, $7, $8)",
                        [
                            (change.change_id, row["timestamp"], row["device_id"], row["component_type"], found[_key(row)][1],
                             found[_key(row)][2], row["pin_position"], row["connector_mode"])
                            for row in rows
                        ],
                    )  # fmt: skip
                    break
                # What has changed in PostgreSQL since is left alone there, and no reason to wait.
                rows = [row for row in rows if row not in missing] + await self._still(missing)
                if waited_s >= BEHIND_S:
                    message = (
                        f"ClickHouse has not {len(missing):,} of the rows that PostgreSQL has: when it has caught up (`preservarium sync status`), "
                        "or was mended (`preservarium sync verify --repair`), the same command goes on"
                    )
                    raise ChangeError(message)
                await asyncio.sleep(1.0)
                waited_s += 1.0
        await self._at(change, slot, 1)

    async def _still(self, rows: Sequence[Any]) -> list[Any]:
        """Those of the rows that PostgreSQL still has as they were seen."""
        found = []
        for row in rows:
            stands = await self._connection.fetchval(
                f"SELECT change_same({changes.AS_ROW}, $6::change_row) FROM measurements m JOIN series s USING (series_id)"
                " WHERE (s.device_id, s.component_type, s.pin_position, s.connector_mode) = ($1, $2, $3, $4) AND m.timestamp = $5",
                *(row[name] for name in _KEY), row["timestamp"], tuple(row["before"]),
            )  # fmt: skip
            if stands:
                found.append(row)
        return found

    async def _standing(self, rows: Sequence[Any]) -> dict[tuple[Any, ...], tuple[Any, ...]]:
        """Key -> (version, when it was inserted, period) of what ClickHouse holds."""
        assert self._clickhouse is not None
        found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for start in range(0, len(rows), KEYS_AT_ONCE):
            answer = await self._clickhouse.query(
                f"SELECT {', '.join(_KEY)}, toUnixTimestamp64Micro(timestamp), version, toUnixTimestamp64Micro(ingested_at), circular"
                f" FROM measurements FINAL WHERE {_where(rows[start : start + KEYS_AT_ONCE])}"
            )
            found.update({tuple(r[:5]): (int(r[5]), _datetime(r[6]), float(r[7])) for r in answer})
        return found

    async def _bring(self, change: Change, slot: int, *, undo: bool) -> None:
        """Have ClickHouse hold what PostgreSQL does of a slot; its counts follow by the same tokens."""
        if self._clickhouse is not None:
            # Of a slot that is taken back, `swapped` is NULL again; what could not be is left alone in both.
            rows = await self._rows(change, slot, "c.swapped IS NULL" if undo else "c.swapped")
            came = [row for row in rows if _is(row["before" if undo else "after"])]
            went = [row for row in rows if _is(row["after" if undo else "before"])]
            token = f"change-{change.change_id}-{change.attempt}-{slot}-{'back' if undo else 'there'}"
            if undo:
                await self._delete([row for row in rows if _is(row["after"])], f"generation = {change.generation}")
            if came:
                types = dict(MEASUREMENTS.types)
                values = [_values(row, "b" if undo else "a") for row in came]
                if undo:
                    types["ingested_at"] = "DateTime64(6, 'UTC')"
                    values = [[*one, microseconds(row["ch_ingested_at"]) if row["ch_ingested_at"] else microseconds(row["before"]["received_at"])]
                              for one, row in zip(values, came, strict=True)]  # fmt: skip
                await self._clickhouse.insert("measurements", types, values, token=token)
            taken: dict[tuple[Any, ...], int] = {}
            for row in went:
                was = row["after" if undo else "before"]
                about = microseconds(row["timestamp"]) // _DAY_US, row["device_id"], was["quality"], was["generation"]
                taken[about] = taken.get(about, 0) + 1
            if taken:
                await self._clickhouse.insert(
                    "measurement_days", _DAYS, [(*about, (-count) % 2**64) for about, count in sorted(taken.items())], token=f"{token}-days"
                )  # fmt: skip
            if not undo:
                await self._delete([row for row in rows if not _is(row["after"])], f"generation < {change.generation}")
        await self._at(change, slot, 5 if undo else 3)

    async def _delete(self, rows: Sequence[Any], which: str) -> None:
        assert self._clickhouse is not None
        for start in range(0, len(rows), KEYS_AT_ONCE):
            await self._clickhouse.command(
                f"DELETE FROM measurements WHERE {_where(rows[start : start + KEYS_AT_ONCE])} AND {which}"
            )

    # --- what follows

    async def _follow(self, change: Change, progress: Progress) -> None:
        progress(1, 1, "windows")
        await mark(self._connection, self._settings, change)
        await self._follower.follow(change, change.kind)
        _reached("windows")

    async def _alarms(self, change: Change, *, undo: bool) -> None:
        """Take transitions out of the history of alarms, and put others in; or back. ClickHouse follows."""
        connection = self._connection
        ids = [
            row[0]
            for row in await connection.fetch(
                "SELECT DISTINCT alarm_id FROM change_alarm_events WHERE change_id = $1 ORDER BY 1", change.change_id
            )
        ]
        columns = [row[0] for row in await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'alarm_events'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        )]  # fmt: skip
        of_alarms = [row[0] for row in await connection.fetch(
            "SELECT attname FROM pg_attribute WHERE attrelid = 'alarms'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        )]  # fmt: skip
        comes, goes = ("removed", "added") if undo else ("added", "removed")
        for start in range(0, len(ids), ALARMS_AT_ONCE):
            some = ids[start : start + ALARMS_AT_ONCE]
            async with connection.transaction():
                if not undo:
                    await connection.execute(
                        f"INSERT INTO change_alarms (change_id, {', '.join(of_alarms)}) SELECT $1, {', '.join(of_alarms)} FROM alarms"
                        " WHERE alarm_id = ANY ($2) AND NOT EXISTS (SELECT FROM change_alarm_events e JOIN alarm_events h USING (transition_id)"
                        "  WHERE e.change_id = $1 AND e.op = 'added' AND e.alarm_id = alarms.alarm_id AND h.stored_at = e.stored_at)"
                        " ON CONFLICT DO NOTHING",
                        change.change_id, some,
                    )  # fmt: skip
                await connection.execute(
                    "DELETE FROM alarm_events h USING change_alarm_events e WHERE e.change_id = $1 AND e.op = $2 AND e.alarm_id = ANY ($3)"
                    " AND h.transition_id = e.transition_id AND h.stored_at = e.stored_at",
                    change.change_id, goes, some,
                )  # fmt: skip
                await connection.execute(
                    f"INSERT INTO alarm_events ({', '.join(columns)}) SELECT {', '.join(columns)} FROM change_alarm_events"
                    " WHERE change_id = $1 AND op = $2 AND alarm_id = ANY ($3) ON CONFLICT DO NOTHING",
                    change.change_id, comes, some,
                )  # fmt: skip
                await connection.execute("DELETE FROM alarms WHERE alarm_id = ANY ($1)", some)
                if undo:
                    await connection.execute(
                        f"INSERT INTO alarms ({', '.join(of_alarms)}) SELECT {', '.join(of_alarms)} FROM change_alarms"
                        " WHERE change_id = $1 AND alarm_id = ANY ($2)"
                        # Where something happened to it since, it is made of its transitions.
                        " AND transitions = (SELECT count(*) FROM alarm_events h WHERE h.alarm_id = change_alarms.alarm_id)",
                        change.change_id, some,
                    )  # fmt: skip
                # As the sink makes them of events, one after the other.
                keys = [row[0] for row in await connection.fetch(
                    "SELECT transition_id FROM alarm_events WHERE alarm_id = ANY ($1) AND NOT ($2 AND EXISTS (SELECT FROM alarms a WHERE a.alarm_id = alarm_events.alarm_id))"
                    " ORDER BY alarm_id, (detail ->> 'sequence')::integer NULLS FIRST, detected_at",
                    some, undo,
                )]  # fmt: skip
                if keys:
                    await connection.execute(ALARM_EVENTS.then, keys)
            if self._clickhouse is not None:
                await self._bring_alarms(change, some, comes, goes)

    async def _bring_alarms(self, change: Change, some: Sequence[str], comes: str, goes: str) -> None:
        assert self._clickhouse is not None
        rows = await self._connection.fetch(
            "SELECT device_id, rule, transition_id FROM change_alarm_events WHERE change_id = $1 AND op = $2 AND alarm_id = ANY ($3)",
            change.change_id, goes, list(some),
        )  # fmt: skip
        for start in range(0, len(rows), 500):
            part = rows[start : start + 500]
            devices = ", ".join(sorted({literal(row["device_id"]) for row in part}))
            await self._clickhouse.command(
                f"DELETE FROM {CLICKHOUSE_ALARMS.name} WHERE device_id IN ({devices}) AND transition_id IN"
                f" ({', '.join(literal(row['transition_id']) for row in part)})"
            )
        right = await self._connection.fetch(
            f"SELECT {COMPARED_ALARMS.select} FROM {COMPARED_ALARMS.source} WHERE e.transition_id IN"
            " (SELECT transition_id FROM change_alarm_events WHERE change_id = $1 AND op = $2 AND alarm_id = ANY ($3))",
            change.change_id, comes, list(some),
        )  # fmt: skip
        if right:
            await self._clickhouse.insert(
                CLICKHOUSE_ALARMS.name, CLICKHOUSE_ALARMS.types, [COMPARED_ALARMS.columns(row) for row in right]
            )

    async def _count(self, change: Change, *, counts: bool) -> None:
        """Have dashboards count the rows of the change's generation, or not any more."""
        if self._clickhouse is not None:
            await self._clickhouse.insert(
                "promoted_generations", _PROMOTED, [(change.generation, int(counts), self._clock.now_us())]
            )

    async def _finish(self, change: Change, progress: Progress) -> None:
        """Last values in ClickHouse, and the roll-ups."""
        if self._clickhouse is not None:
            progress(1, 1, "last values")
            await self._last_values(change)
            _reached("last_values")
        progress(1, 1, "roll-ups")
        for _ in range(ROLLUP_PIECES_MAX):
            async with self._connection.transaction():
                more = await self._connection.fetchval(
                    "SELECT refresh_rollups(5000, make_interval(mins => 60))", timeout=120
                )
            if not more:
                break

    async def _last_values(self, change: Change) -> None:
        assert self._clickhouse is not None
        rows = await self._connection.fetch(
            "SELECT DISTINCT s.device_id, s.component_type, s.pin_position, s.connector_mode FROM change_rows c JOIN series s USING (series_id)"
            " WHERE c.change_id = $1 ORDER BY 1, 2, 3, 4",
            change.change_id,
        )
        for start in range(0, len(rows), SERIES_AT_ONCE):
            await derived.restore(
                self._clickhouse,
                derived.LATEST_VALUES,
                [tuple(row) for row in rows[start : start + SERIES_AT_ONCE]],
                settle_s=SETTLE_S,
            )


_KEY: Final = ("device_id", "component_type", "pin_position", "connector_mode")
_DAY_US: Final = 86_400_000_000
_DAYS: Final = {
    "day": "Date",
    "device_id": "LowCardinality(String)",
    "quality": "UInt8",
    "generation": "UInt32",
    "rows": "UInt64",
}
_PROMOTED: Final = {"generation": "UInt32", "counts": "UInt8", "version": "UInt64"}


def _is(row: Any) -> bool:
    """Whether there is such a row."""
    return row is not None and row["received_at"] is not None


def _datetime(us: int) -> datetime:
    return datetime.fromtimestamp(us // 1_000_000, UTC).replace(microsecond=us % 1_000_000)


def _key(row: Any) -> tuple[Any, ...]:
    return (*(row[name] for name in _KEY), microseconds(row["timestamp"]))


def _version(row: Any) -> int:
    return row_version(row["generation"], 1 if row["revised"] else 0, microseconds(row["received_at"]))


def _where(rows: Sequence[Any]) -> str:
    """ClickHouse's condition for the keys of rows: by devices and days first, which its index knows."""
    devices = ", ".join(sorted({literal(row["device_id"]) for row in rows}))
    ats = [microseconds(row["timestamp"]) for row in rows]
    listed = ", ".join(f"({', '.join(literal(part) for part in _key(row))})" for row in rows)
    return (
        f"device_id IN ({devices}) AND timestamp >= fromUnixTimestamp64Micro({min(ats)}, 'UTC')"
        f" AND timestamp <= fromUnixTimestamp64Micro({max(ats)}, 'UTC')"
        f" AND ({', '.join(_KEY)}, toUnixTimestamp64Micro(timestamp)) IN ({listed})"
    )


def _values(row: Any, side: str) -> list[Any]:
    """A row of `measurements` in ClickHouse, as it was (`b`) or is to be (`a`)."""
    said = row["before" if side == "b" else "after"]
    about = {
        "timestamp": microseconds(row["timestamp"]),
        **{name: row[name] for name in _KEY},
        "value": said["value"],
        "value_text": said["value_text"] or "",
        "unit": row["s_unit"] if said["unit"] is None else said["unit"],
        "topic": row["s_topic"] if said["topic"] is None else said["topic"],
        "quality": said["quality"],
        "flags": ",".join(said["flags"] or ()),
        "revised": 1 if said["revised"] else 0,
        "parser": row[f"{side}_parser"],
        "config_rev": row[f"{side}_config_rev"],
        "experiment_id": row[f"{side}_experiment_id"],
        "generation": said["generation"],
        "received_at": microseconds(said["received_at"]),
        "raw_partition": said["raw_partition"],
        "raw_offset": said["raw_offset"],
        "raw_index": said["raw_index"],
        "circular": row["s_circular"] if row["ch_circular"] is None else row["ch_circular"],
    }
    return [about[name] for name in MEASUREMENTS.types]
