"""Corrections by people: what they say of stored readings made a change, which is promoted like a shadow replay's and undone the same way.

Originals stay in the change. Of a counter the consumption follows; windows, roll-ups, last values and ClickHouse follow by the promotion. The history of
alarms stays: it says what people were told.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Final

import orjson

from preservarium.clock import SystemClock
from preservarium.domain.quality import correction
from preservarium.domain.quality.checks import CheckCompiler, DeviceChecks, SeriesCheck
from preservarium.domain.quality.correction import CorrectionError, Row
from preservarium.domain.quality.meter import CONSUMPTION_SUFFIX
from preservarium.operations.changes.shadow import merge_late, next_generation
from preservarium.settings import Settings
from preservarium.stores import changes, registry
from preservarium.stores.changes import ROW_COLUMNS, After, Change, ChangeError, State
from preservarium.stores.events import instant, microseconds

#: Rows that one correction changes: they are held in memory.
ROWS_MAX: Final = 1_000_000
#: States of a counter that are read before and after what is corrected: its usual step is known by then, and its doubts are over.
AROUND: Final = 64
#: Series of one device.
SERIES_MAX: Final = 1_000


@dataclass(frozen=True, slots=True)
class Series:
    """Which series of a device: all that fit."""

    device: str
    component_type: str | None = None
    pin: str | None = None
    mode: str | None = None


@dataclass(frozen=True, slots=True)
class Time:
    """[from, to) of the device's time, µs since the epoch, UTC."""

    from_us: int
    to_us: int


@dataclass(slots=True)
class _Found:
    """A stored row with its series."""

    series_id: int
    about: tuple[str, str, str, str]  #: device, mode, component type, pin
    unit: str  #: of the series
    topic: str
    row: Row
    stored: dict[str, Any]  #: its columns

    @property
    def at(self) -> int:
        return self.row.at


Corrected = dict[tuple[int, int], After]  #: (series, instant) -> the row as it is to be


class Correcting:
    """Makes one change of one correction. For one task at a time.

    Args:
        settings: limits.
        connection: of asyncpg; a session.
    """

    def __init__(self, settings: Settings, connection: Any) -> None:
        self._settings, self._connection = settings, connection
        self._generation = 0
        self._compiler: CheckCompiler | None = None
        self._checks: dict[str, DeviceChecks] = {}

    # --- what is asked for

    async def void(self, which: Series, time: Time) -> Corrected:
        """Values of a time that are none of their device."""
        return await self._each(which, time, lambda row, _check: correction.void(row))

    async def replace(self, which: Series, at_us: int, value: str) -> Corrected:
        """The value of one reading.

        Raises:
            CorrectionError: it is no number, or the datatype's bounds refuse it.
            ChangeError: the series is not one, or has no row there.
        """
        number = float(correction.exact(value))
        return await self._each(
            which, Time(at_us, at_us + 1), lambda row, check: correction.with_value(row, number, check)
        )

    async def linear(self, which: Series, time: Time, *, factor: str = "1", offset: str = "0") -> Corrected:
        """Values of a time times a factor, plus an offset; numbers as people write them."""
        times, plus = correction.exact(factor), correction.exact(offset)
        if times == 0:
            message = "a factor of 0 leaves nothing: void the readings"
            raise CorrectionError(message)
        if (times, plus) == (Fraction(1), Fraction(0)):
            message = "that changes nothing: give a factor or an offset"
            raise CorrectionError(message)
        return await self._each(which, time, lambda row, check: correction.linear(row, times, plus, check))

    async def swap(self, one: Series, other: Series, time: Time) -> Corrected:
        """Two devices that were mistaken for each other: what each has of a time is the other's.

        Raises:
            ChangeError: a device is unknown, both are the same, or there is nothing.
        """
        first, second = await self._spelled(one.device), await self._spelled(other.device)
        if first == second:
            message = "that is one device by two spellings"
            raise ChangeError(message)
        out: Corrected = {}
        rows: dict[str, list[_Found]] = {}
        for mine, device in ((one, first), (other, second)):
            rows[device] = await self._rows(replace(mine, device=device), time, empty_is_fine=True)
        if not any(rows.values()):
            message = "neither has a reading in that time"
            raise ChangeError(message)
        there = {device: {(f.about[1:], f.at) for f in found} for device, found in rows.items()}
        for device, to in ((first, second), (second, first)):
            for found in rows[device]:
                series_id, unit, topic = await self._series((to, *found.about[1:]), found)
                row = correction.moved(found.row)
                stored = found.stored
                stored_unit = found.unit if stored["unit"] is None else stored["unit"]
                stored_topic = found.topic if stored["topic"] is None else stored["topic"]
                out[series_id, found.at] = self._after(
                    series_id,
                    row,
                    {**stored, "unit": _unless(stored_unit, unit), "topic": _unless(stored_topic, topic)},
                )
                if (found.about[1:], found.at) not in there[to]:
                    out.setdefault((found.series_id, found.at), After(found.series_id, found.at, None))
        return out

    async def exchange(self, which: Series, at_us: int, *, final: str | None, initial: str) -> Corrected:
        """A meter that was exchanged: what was consumed between its last reading and the new one's first.

        Raises:
            CorrectionError: a number is none, or an exchange is registered there.
            ChangeError: the series is no counter's, or has no readings on both sides.
        """
        if which.component_type is None:
            message = "say which counter: --type"
            raise ChangeError(message)
        series = await self._of(which)
        check = (await self._device(series[0]["device_id"])).series(which.component_type)
        if check.counter is None:
            message = f"{which.component_type} is no counter: its datatype declares none"
            raise ChangeError(message)
        counter = correction.exchanged(
            check.counter,
            at_us,
            None if final is None else float(correction.exact(final)),
            float(correction.exact(initial)),
        )
        out: Corrected = {}
        for one in series:
            states = await self._around(one, Time(at_us, at_us + 1))
            if not any(s.at < at_us for s in states) or not any(s.at >= at_us for s in states):
                continue
            rows = [s.row for s in states]
            await self._consumed(one, states, correction.reconsumed(rows, rows, check.counter, counter), out)
        if not out:
            message = "nothing follows: there are no readings on both sides, or what was consumed is stored so already"
            raise ChangeError(message)
        return out

    # --- making a change of it

    async def note(
        self, kind: str, said: Mapping[str, Any], rows: Corrected, *, actor: str, reason: str, generation: int
    ) -> Change:
        """A change that is ready to be promoted.

        Raises:
            ChangeError: there is nothing to change, or too much.
        """
        now_us = SystemClock().now_us()
        change = await changes.create(
            self._connection,
            "correction",
            {"correction": kind, **said, "reason": reason},
            generation,
            actor=actor,
            at_us=now_us,
        )
        await changes.put_rows(self._connection, change.change_id, list(rows.values()))
        # What is to be removed and is not there is nothing.
        await self._connection.execute(
            "DELETE FROM change_rows WHERE change_id = $1 AND (before).received_at IS NULL AND (after).received_at IS NULL",
            change.change_id,
        )
        count = await changes.lay_out(self._connection, change.change_id)
        summary = {"rows": count}
        return await changes.becomes(
            self._connection, change, State.READY, expected=(State.DERIVING,), event="derived", data=summary, summary=summary, actor=actor,
            at_us=now_us,
        )  # fmt: skip

    async def prepare(self) -> int:
        """To be called before anything is asked for; gives the generation that the rows get."""
        await merge_late(self._settings, self._connection)
        self._generation = await next_generation(self._connection)
        return self._generation

    # --- rows

    async def _each(self, which: Series, time: Time, make: Callable[[Row, SeriesCheck], Row | None]) -> Corrected:
        out: Corrected = {}
        rows = await self._rows(which, time)
        by_series: dict[int, list[_Found]] = {}
        for found in rows:
            by_series.setdefault(found.series_id, []).append(found)
        for series_id, some in by_series.items():
            device_id, mode, component_type, pin = some[0].about
            check = (await self._device(device_id)).series(component_type)
            corrected: dict[int, Row] = {}
            for found in some:
                row = make(found.row, check)
                if row is not None and row != found.row:
                    corrected[found.at] = row
                    out[series_id, found.at] = self._after(series_id, row, found.stored)
            if check.counter is not None and corrected:
                one = {
                    "series_id": series_id,
                    "device_id": device_id,
                    "connector_mode": mode,
                    "component_type": component_type,
                    "pin_position": pin,
                }
                states = await self._around(one, Time(min(corrected), max(corrected) + 1))
                before = [state.row for state in states]
                after = [corrected.get(state.at, state.row) for state in states]
                await self._consumed(one, states, correction.reconsumed(before, after, check.counter), out)
        if not out:
            message = "that changes nothing of what is stored"
            raise ChangeError(message)
        return out

    async def _consumed(
        self,
        counter: Mapping[str, Any],
        states: Sequence[_Found],
        wanted: Mapping[int, Mapping[str, Any] | None],
        out: Corrected,
    ) -> None:
        """Add what a counter consumed by the correction."""
        about = (
            counter["device_id"],
            counter["connector_mode"],
            counter["component_type"] + CONSUMPTION_SUFFIX,
            counter["pin_position"],
        )
        by_at = {state.at: state for state in states}
        for at, reading in wanted.items():
            state = by_at[at]
            series_id, unit, topic = await self._series(about, state)
            if (series_id, at) in out:
                continue  # somebody says what it is
            if reading is None:
                out[series_id, at] = After(series_id, at, None)
                continue
            said = {**state.stored, "unit": _unless(state.unit if state.stored["unit"] is None else state.stored["unit"], unit),
                    "topic": _unless(state.topic if state.stored["topic"] is None else state.stored["topic"], topic)}  # fmt: skip
            row = Row(at, reading["value"], None, reading["quality"], tuple(reading.get("flags", ())))
            out[series_id, at] = self._after(series_id, row, said)

    def _after(self, series_id: int, row: Row, stored: Mapping[str, Any]) -> After:
        said = {
            **stored, "value": row.value, "value_text": row.value_text, "quality": row.quality, "flags": list(row.flags) or None,
            "generation": self._generation, "ingested_at": None, "revised": None,
        }  # fmt: skip
        return After(series_id, row.at, tuple(said[name] for name in ROW_COLUMNS))

    async def _rows(self, which: Series, time: Time, *, empty_is_fine: bool = False) -> list[_Found]:
        series = await self._of(which, empty_is_fine=empty_is_fine)
        rows = await self._connection.fetch(
            f"SELECT s.*, {', '.join(f'm.{name} AS m_{name}' for name in ROW_COLUMNS)}, m.timestamp FROM series s CROSS JOIN LATERAL ("
            f" SELECT * FROM measurements WHERE series_id = s.series_id AND timestamp >= $2 AND timestamp < $3) m"
            f" WHERE s.series_id = ANY ($1) ORDER BY s.series_id, m.timestamp LIMIT $4",
            [one["series_id"] for one in series], instant(time.from_us), instant(time.to_us), ROWS_MAX + 1,
        )  # fmt: skip
        if len(rows) > ROWS_MAX:
            message = f"more than {ROWS_MAX:,} readings: name a shorter time, or one series"
            raise ChangeError(message)
        if not rows and not empty_is_fine:
            message = "nothing is stored there"
            raise ChangeError(message)
        return [_found(row) for row in rows]

    async def _of(self, which: Series, *, empty_is_fine: bool = False) -> list[Any]:
        device = await self._spelled(which.device)
        rows: list[Any] = await self._connection.fetch(
            "SELECT * FROM series WHERE device_id = $1 AND ($2::text IS NULL OR component_type = $2) AND ($3::text IS NULL OR pin_position = $3)"
            " AND ($4::text IS NULL OR connector_mode = $4) ORDER BY series_id LIMIT $5",
            device, which.component_type, which.pin, which.mode, SERIES_MAX,
        )  # fmt: skip
        if not rows and not empty_is_fine:
            there = await self._connection.fetch(
                "SELECT DISTINCT component_type FROM series WHERE device_id = $1 ORDER BY 1 LIMIT 50", device
            )
            known = ", ".join(row[0] for row in there)
            message = f"{device} has no such series" + (f"; it has {known}" if known else ": nothing is stored of it")
            raise ChangeError(message)
        return rows

    async def _around(self, series: Mapping[str, Any], time: Time) -> list[_Found]:
        """The rows of a counter from well before a time to well after it, in their order."""
        names = ", ".join(f"m.{name} AS m_{name}" for name in ROW_COLUMNS)
        sides = []
        for where, order, limit in (
            ("timestamp < $2", "DESC", AROUND),
            ("timestamp >= $2 AND timestamp < $3", "ASC", ROWS_MAX),
            ("timestamp >= $3", "ASC", AROUND),
        ):
            rows = await self._connection.fetch(
                f"SELECT s.*, {names}, m.timestamp FROM series s CROSS JOIN LATERAL (SELECT * FROM measurements WHERE series_id = s.series_id AND {where}"
                f" AND $2::timestamptz IS NOT NULL AND $3::timestamptz IS NOT NULL ORDER BY timestamp {order} LIMIT {limit}) m WHERE s.series_id = $1",
                series["series_id"], instant(time.from_us), instant(time.to_us),
            )  # fmt: skip
            sides += [_found(row) for row in rows]
        return sorted(sides, key=lambda found: found.at)

    async def _series(self, about: tuple[str, str, str, str], like: _Found) -> tuple[int, str, str]:
        """(number, unit, topic) of a series, made where there is none."""
        for _ in range(2):
            row = await self._connection.fetchrow(
                "SELECT series_id, unit, topic FROM series WHERE (device_id, connector_mode, component_type, pin_position) = ($1, $2, $3, $4)",
                *about,
            )
            if row is not None:
                return row["series_id"], row["unit"], row["topic"]
            unit = like.unit if like.stored["unit"] is None else like.stored["unit"]
            await self._connection.execute(
                "INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit, topic) VALUES ($1, $2, $3, $4, $5, $6)"
                " ON CONFLICT (device_id, component_type, pin_position, connector_mode) DO NOTHING",
                *about, unit, like.topic,
            )  # fmt: skip
        message = f"series {about} cannot be made"
        raise ChangeError(message)

    async def _spelled(self, device_id: str) -> str:
        device = await registry.spelled(self._connection, device_id)
        known = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM devices WHERE device_id = $1) OR EXISTS (SELECT FROM series WHERE device_id = $1)",
            device,
        )
        if not known:
            message = f"device {device_id} is not known"
            raise ChangeError(message)
        return device

    async def _device(self, device_id: str) -> DeviceChecks:
        if self._compiler is None:
            rows = await self._connection.fetch("SELECT name, doc FROM datatypes")
            documents: dict[str, Any] = {row["name"]: orjson.loads(row["doc"]) for row in rows}
            self._compiler = CheckCompiler(documents.get)
        if device_id not in self._checks:
            found: Any = (await registry.composite(self._connection, [device_id])).get(device_id)
            self._checks[device_id] = self._compiler.device(
                None if found is None else found.device, None if found is None else found.type
            )
        return self._checks[device_id]


def _unless(said: str, of_series: str) -> str | None:
    """What a row says where its series does not."""
    return None if said == of_series else said


def _found(row: Any) -> _Found:
    stored = {name: row[f"m_{name}"] for name in ROW_COLUMNS}
    return _Found(
        row["series_id"],
        (row["device_id"], row["connector_mode"], row["component_type"], row["pin_position"]),
        row["unit"],
        row["topic"],
        Row(
            microseconds(row["timestamp"]),
            stored["value"],
            stored["value_text"],
            stored["quality"],
            tuple(stored["flags"] or ()),
        ),
        stored,
    )
