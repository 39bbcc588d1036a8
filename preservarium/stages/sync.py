"""The sync stages: from records to ClickHouse's columns, each row exactly once.

One insert for each Kafka partition of a flight, with a token made of the range of offsets that it comes from. The range
is committed to Kafka before (preservarium/streaming/feeds.py, planned), so whoever repeats the batch repeats the insert as it was.

Kafka may hold a message twice, because a stage before us crashed between sending and acknowledging. Such a repetition is a
run of earlier messages, so the last raw coordinates of each raw partition tell it from news. They are committed beside the
offset: a batch that is done again starts from the same ones, and is the same.

Where somebody else has moved the group's offset back, or it is not known, what comes may be written already, in batches of other
bounds that no token tells. For the tables themselves that is harmless, they keep one row of each key; but `measurement_days` adds
up what each insert brings. So of such records only the rows that ClickHouse does not hold are inserted (`ReadingSync.reread`).
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import orjson

from preservarium import metrics, topics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.readings.json_text import to_bytes
from preservarium.domain.readings.reading import ErrorLine
from preservarium.domain.tasks import employee_row, task_rows
from preservarium.errors import ReasonCode, Reject
from preservarium.settings import Settings
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.maintenance import literal
from preservarium.streaming.records import error_line, lines_of, loads, parse_trusted, refuse
from preservarium.streaming.stage import RECORDS_AT_ONCE, Batch, Effects, Record
from preservarium.topics import Topic
from preservarium.waiting import alive

#: Rows of one insert. Fixed, and not a setting: a batch that is done again must be cut as before.
INSERT_ROWS_MAX: Final = 100_000
#: Records of events and tasks in one flight. What an insert costs is hardly its rows, and there is one for each partition: with few
#: records in a flight, a dozen partitions take their turns. Some 1 KiB each in memory.
EVENTS_MAX: Final = 10_000

#: (generation, raw partition) pairs whose last coordinates are kept for a partition: one or a few in practice, since
#: normalize writes by key. 40 of them are at most 2.5 KiB of the 4 KiB that a broker takes as metadata.
SEEN_MAX: Final = 40

#: Rows whose instants are nearer than this are looked up together, by one query for the range that they lie in …
STANDING_GAP_US: Final = 60_000_000
#: … which is no longer than this, and of no more devices, so that an answer is not much more than was asked for.
STANDING_SPAN_US: Final = 3_600_000_000
STANDING_DEVICES_MAX: Final = 2_000

_DAY_US: Final = 86_400_000_000

_TEXT: Final = "LowCardinality(String)"
_TIME: Final = "DateTime64(6, 'UTC')"


@dataclass(frozen=True, slots=True)
class Table:
    """One topic's table in ClickHouse: with its migration, all that a further topic of events needs."""

    topic: Topic
    stage: str  #: name of the stage and of its consumer group
    name: str
    #: column -> type; for events (`EventSync`) also the names of the line's fields
    types: Mapping[str, str]


MEASUREMENTS: Final = Table(topics.VALIDATED, "sync", "measurements", {
    "timestamp": _TIME,
    "device_id": _TEXT,
    "connector_mode": _TEXT,
    "component_type": _TEXT,
    "pin_position": _TEXT,
    "value": "Nullable(Float64)",
    "value_text": _TEXT,
    "unit": _TEXT,
    "topic": _TEXT,
    "quality": "UInt8",
    "flags": _TEXT,
    "revised": "UInt8",
    "parser": _TEXT,
    "config_rev": "Int64",
    "experiment_id": _TEXT,
    "generation": "UInt32",
    "received_at": _TIME,
    "raw_partition": "UInt32",
    "raw_offset": "UInt64",
    "raw_index": "UInt32",
    "circular": "Float64",
})  # fmt: skip

ALARM_EVENTS: Final = Table(topics.ALERTS, "sync-alarms", "alarm_events", {
    "transition_id": "String",
    "alarm_id": "String",
    "device_id": _TEXT,
    "rule": _TEXT,
    "rule_rev": "Int64",
    "component_type": _TEXT,
    "pin_position": _TEXT,
    "severity": _TEXT,
    "transition": _TEXT,
    "state": _TEXT,
    "occurred_at": _TIME,
    "detected_at": _TIME,
    "cleared_at": f"Nullable({_TIME})",
    "value": "Nullable(Float64)",
    "unit": _TEXT,
    "threshold": "Nullable(Float64)",
    "message": "String",
    "generation": "UInt32",
    "raw_partition": "UInt32",
    "raw_offset": "UInt64",
    "raw_index": "UInt32",
    "sequence": "UInt32",
    "transition_at": f"Nullable({_TIME})",
    "kind": _TEXT,
    "actor": _TEXT,
    "comment": "String",
})  # fmt: skip

#: Of a window that comes again the highest revision stays once the table has merged.
AGGREGATES: Final = Table(topics.AGGREGATES, "sync-aggregates", "aggregates", {
    "window_id": "String",
    "revision": "UInt32",
    "device_id": _TEXT,
    "connector_mode": _TEXT,
    "component_type": _TEXT,
    "pin_position": _TEXT,
    "unit": _TEXT,
    "window_start": _TIME,
    "window_end": _TIME,
    "size_s": "UInt32",
    "hop_s": "UInt32",
    "count": "UInt64",
    "min": "Nullable(Float64)",
    "max": "Nullable(Float64)",
    "mean": "Nullable(Float64)",
    "sum": "Nullable(Float64)",
    "last": "Float64",
    "last_at": _TIME,
    "consumption": "Nullable(Float64)",
    "closed_by": _TEXT,
    "generation": "UInt32",
    "circular": "Nullable(Float64)",
    "spread": "Nullable(Float64)",
    "cos_sum": "Nullable(Float64)",
    "sin_sum": "Nullable(Float64)",
})  # fmt: skip

ANOMALIES: Final = Table(topics.ANOMALIES, "sync-anomalies", "anomalies", {
    "anomaly_id": "String",
    "device_id": _TEXT,
    "connector_mode": _TEXT,
    "component_type": _TEXT,
    "pin_position": _TEXT,
    "state": _TEXT,
    "timestamp": _TIME,
    "value": "Nullable(Float64)",
    "unit": _TEXT,
    "expected": "Nullable(Float64)",
    "score": "Nullable(Float64)",
    "threshold": "Nullable(Float64)",
    "generation": "UInt32",
    "raw_partition": "UInt32",
    "raw_offset": "UInt64",
    "raw_index": "UInt32",
})  # fmt: skip

#: What was sent stays in PostgreSQL.
COMMAND_EVENTS: Final = Table(topics.COMMAND_EVENTS, "sync-commands", "command_events", {
    "event_id": "String",
    "command_id": "String",
    "sequence": "UInt32",
    "device_id": _TEXT,
    "event": _TEXT,
    "state": _TEXT,
    "at": _TIME,
    "actor": _TEXT,
    "reason": "String",
    "attempt": "UInt32",
    "command": _TEXT,
    "priority": "UInt32",
    "requested_at": _TIME,
    "requested_by": _TEXT,
    "cause": "String",
    "expires_at": _TIME,
    "ended_at": f"Nullable({_TIME})",
})  # fmt: skip

#: Topics of events that only we write: a line is a row, its fields the columns.
EVENTS: Final[tuple[Table, ...]] = (ALARM_EVENTS, AGGREGATES, ANOMALIES, COMMAND_EVENTS)

#: Columns in the order of TaskRow and EmployeeRow.
TASK_EVENTS: Final = Table(topics.TASK_EVENTS, "sync-tasks", "task_events", {
    "file_id": "String",
    "event_id": "String",
    "assigned_at": _TIME,
    "version": "UInt256",
    "stage": _TEXT,
    "status": _TEXT,
    "employee_code": _TEXT,
    "employee_name": _TEXT,
    "started_at": f"Nullable({_TIME})",
    "completed_at": f"Nullable({_TIME})",
    "changed_at": _TIME,
    "task_id": "String",
    "experiment_id": _TEXT,
    "deleted": "UInt8",
})  # fmt: skip

EMPLOYEES: Final = Table(topics.EMPLOYEES, "sync-employees", "employees", {
    "employee_code": "String",
    "version": "UInt256",
    "name": "String",
    "email": "String",
    "department": _TEXT,
    "active": "UInt8",
    "updated_at": _TIME,
    "deleted": "UInt8",
})  # fmt: skip

Columns = dict[str, list[Any]]
#: (generation, raw partition) -> (raw offset, raw index) of the last message applied, the newest pairs last.
Seen = dict[tuple[int, int], tuple[int, int]]


class _Stage:
    """What the sync stages have in common: one insert a partition, tokens, plans, error lines."""

    def __init__(
        self, table: Table, store: ClickHouseStore, settings: Callable[[], Settings], *, clock: Clock | None = None
    ) -> None:
        self.name = table.stage
        self.table = table
        self._store = store
        self._settings = settings
        self._clock = clock or SystemClock()
        self._seen: dict[int, Seen] = {}
        self._parsing = asyncio.Lock()

    # --- memory (preservarium/streaming/feeds.py)

    def recall(self, partition: int, text: str) -> None:
        """What was seen of a partition up to the group's offset."""
        try:
            self._seen[partition] = {(g, p): (o, i) for g, p, o, i in orjson.loads(text or "[]")}
        except (ValueError, TypeError):
            self._seen[partition] = {}  # another tool has set the offset, with a text of its own

    def remember(self, partition: int) -> str:
        """What was seen of a partition, for `recall`."""
        seen = list(self._seen.get(partition, {}).items())[-SEEN_MAX:]
        return orjson.dumps([[*source, *at] for source, at in seen]).decode()

    # --- handler

    async def __call__(self, batches: Sequence[Batch]) -> Effects:
        """Insert what the batches hold.

        Raises:
            Retry: ClickHouse cannot be reached.
        """
        effects = Effects()
        await asyncio.gather(*(self._batch(batch, effects) for batch in batches))
        return effects

    async def _batch(self, batch: Batch, effects: Effects) -> None:
        columns: Columns = {name: [] for name in self.table.types}
        seen = dict(self._seen.get(batch.partition, {}))
        errors: list[ErrorLine] = []
        # One after the other: ClickHouse inserts the first while the others are parsed. In turns, all would be ready at
        # the end, and before that ClickHouse idle.
        async with self._parsing:
            for start in range(0, len(batch.records), RECORDS_AT_ONCE):
                part = batch.part(batch.records[start : start + RECORDS_AT_ONCE])
                errors += self._fill(columns, part, seen)
                await asyncio.sleep(0)
        first, end = batch.records[0].offset, batch.records[-1].offset + 1
        token = f"{batch.topic}-{batch.partition}-{first}-{end}"
        columns, token = await self._left(batch, columns, token, effects)
        rows = len(columns[next(iter(columns))])
        for start in range(0, rows, INSERT_ROWS_MAX):
            whole = rows <= INSERT_ROWS_MAX
            cut = columns if whole else {n: c[start : start + INSERT_ROWS_MAX] for n, c in columns.items()}
            await self._store.insert(
                self.table.name, cut, self.table.types, token=token if whole else f"{token}#{start}"
            )
            alive()
        metrics.READINGS.labels(self.name).inc(rows)
        limit = self._settings().kafka.record_bytes_max
        for error in errors:
            refuse(effects, error, record_bytes_max=limit)
        # Once it is acknowledged: a batch that is tried again must find what it found before.
        effects.after.append(partial(self._seen.__setitem__, batch.partition, seen))

    async def _left(self, batch: Batch, columns: Columns, token: str, effects: Effects) -> tuple[Columns, str]:
        """The rows of a batch that are to be inserted, and under which token."""
        return columns, token

    def _fill(self, columns: Columns, batch: Batch, seen: Seen) -> list[ErrorLine]:
        """Put a batch's rows into the columns; gives an error line for every line that is none."""
        parsed, errors = parse_trusted(batch, stage=self.name, now_us=self._clock.now_us())
        for record, lines in zip(batch.records, parsed, strict=True):
            for index, line in enumerate(lines):
                try:
                    self._append(columns, line, seen)
                except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as e:
                    text = f"{type(e).__name__}: {e}"
                    errors.append(self._refused(batch, record, index, to_bytes(line), ReasonCode.STORE_REJECTED, text))
        return errors

    def _refused(
        self, batch: Batch, record: Record, index: int, raw: bytes, code: ReasonCode, message: str
    ) -> ErrorLine:
        return error_line(
            self.name,
            code,
            message,
            topic=batch.topic,
            partition=batch.partition,
            now_us=self._clock.now_us(),
            record=record,
            index=index,
            raw=raw,
            device_id=record.key.decode("utf-8", "replace") if record.key else None,
        )

    def _append(self, columns: Columns, line: Any, seen: Seen) -> None:
        """Add a line's rows to the columns, or raise before anything is added."""
        raise NotImplementedError


#: Stands for a raw partition where messages were put into order: their positions are those of their release.
_RELEASED: Final = -1


class ReadingSync(_Stage):
    """Validated messages into `measurements`."""

    def __init__(self, store: ClickHouseStore, settings: Callable[[], Settings], *, clock: Clock | None = None) -> None:
        super().__init__(MEASUREMENTS, store, settings, clock=clock)
        #: partition -> (offset below which rows may stand already, the server's time when that was found out, µs)
        self._again: dict[int, tuple[int, int]] = {}

    # --- records that are read a second time

    def recall(self, partition: int, text: str) -> None:
        """What was seen of a partition up to the group's offset, and how far it is read a second time."""
        self._again.pop(partition, None)
        seen = text
        if text.startswith("{"):
            try:
                noted = orjson.loads(text)
                below, since, kept = int(noted["below"]), int(noted["since"]), noted["seen"]
            except (ValueError, TypeError, KeyError):
                seen = ""
            else:
                self._again[partition] = below, since
                seen = orjson.dumps(kept).decode()
        super().recall(partition, seen)

    def remember(self, partition: int) -> str:
        """What was seen of a partition, and how far it is read a second time, for `recall`."""
        seen, again = super().remember(partition), self._again.get(partition)
        if again is None:
            return seen
        return f'{{"below":{again[0]},"since":{again[1]},"seen":{seen}}}'

    async def reread(self, below: Mapping[int, int]) -> None:
        """Rows of records before the offsets given may stand already: insert those that do not.

        Raises:
            Retry: ClickHouse cannot be asked.
        """
        ((now_us, rows),) = await self._store.ask(
            f"SELECT toUnixTimestamp64Micro(now64(6)), (SELECT count() FROM (SELECT 1 FROM {self.table.name} LIMIT 1))"
        )
        # Into an empty table everything goes.
        self._again.update({p: (offset, int(now_us)) for p, offset in below.items() if offset > 0 and rows})

    async def _left(self, batch: Batch, columns: Columns, token: str, effects: Effects) -> tuple[Columns, str]:
        again = self._again.get(batch.partition)
        if again is None:
            return columns, token
        below, since_us = again
        if batch.records[-1].offset + 1 >= below:
            effects.after.append(lambda: self._forget(batch.partition))
        if batch.records[0].offset >= below:
            return columns, token
        missing = await self._missing(columns, since_us)
        left = len(columns["timestamp"]) - len(missing["timestamp"])
        if left:
            metrics.STORE_ROWS.labels("clickhouse", "duplicate").inc(left)
        # Never a token of before: the engine would take what was deleted since for what it has.
        return missing, f"{token}-{since_us}"

    def _forget(self, partition: int) -> None:
        """All of it was read a second time."""
        self._again.pop(partition, None)

    async def _missing(self, columns: Columns, since_us: int) -> Columns:
        """The rows of which ClickHouse held neither the same nor one that has overwritten it, at the server's time `since_us`.

        What was inserted since is of this second reading: a batch that is done again after a crash finds the same rows
        missing, and is the same insert, which also completes what was left out of its views' tables.

        Raises:
            Retry: ClickHouse cannot be reached.
        """
        # It drops what is older, and would count it once more until it does.
        oldest_us = since_us - self._settings().sync.retention_days * _DAY_US
        names = ("device_id", "component_type", "pin_position", "connector_mode", "timestamp")
        keys = list(zip(*(columns[name] for name in names), strict=True))
        kept: list[int] = []
        for rows in _ranges(columns["timestamp"]):
            standing = await self._standing([keys[row] for row in rows], since_us)
            for row in rows:
                version = row_version(columns["generation"][row], columns["revised"][row], columns["received_at"][row])
                if keys[row][4] >= oldest_us and standing.get(keys[row], version - 1) < version:
                    kept.append(row)
            alive()
        kept.sort()
        return {name: [values[row] for row in kept] for name, values in columns.items()}

    async def _standing(self, keys: Sequence[tuple[Any, ...]], since_us: int) -> dict[tuple[Any, ...], int]:
        """Key -> the highest version of its rows of then, of the devices and the time that the keys are of."""
        found: dict[tuple[Any, ...], int] = {}
        devices = sorted({key[0] for key in keys})
        for start in range(0, len(devices), STANDING_DEVICES_MAX):
            listed = ", ".join(map(literal, devices[start : start + STANDING_DEVICES_MAX]))
            rows = await self._store.ask(
                "SELECT device_id, component_type, pin_position, connector_mode, toUnixTimestamp64Micro(timestamp) AS at, max(version)"
                f" FROM {self.table.name} WHERE device_id IN ({listed})"
                " AND timestamp >= fromUnixTimestamp64Micro({from:Int64}, 'UTC')"
                " AND timestamp <= fromUnixTimestamp64Micro({to:Int64}, 'UTC')"
                " AND ingested_at < fromUnixTimestamp64Micro({since:Int64}, 'UTC')"
                " GROUP BY device_id, component_type, pin_position, connector_mode, timestamp",
                {"from": min(key[4] for key in keys), "to": max(key[4] for key in keys), "since": since_us},
            )
            found.update({tuple(row[:5]): int(row[5]) for row in rows})
        return found

    def _append(self, columns: Columns, line: Any, seen: Seen) -> None:
        released = line.get("released")
        source = int(line["generation"]), int(line["raw_partition"]) if released is None else _RELEASED
        at = (
            (int(line["raw_offset"]), int(line["raw_index"]))
            if released is None
            else (int(released[0]), int(released[1]))
        )
        if at <= seen.get(source, (-1, -1)):
            metrics.STORE_ROWS.labels("clickhouse", "duplicate").inc(len(line["readings"]))
            return
        message_at = line["timestamp"]
        rows = []
        for reading in line["readings"]:
            value = reading.get("value")
            flags = reading.get("flags")
            rows.append(
                (
                    int(reading.get("timestamp", message_at)),
                    str(reading["component_type"]),
                    str(reading["pin_position"]),
                    None if value is None else float(value),
                    reading.get("value_text") or "",
                    reading.get("unit") or "",
                    int(reading.get("quality", 2)),
                    ",".join(flags) if flags else "",
                    1 if reading.get("revised") else 0,
                )
            )
        count = len(rows)
        if count:
            same = (
                ("device_id", str(line["device_id"])),
                ("connector_mode", str(line["connector_mode"])),
                ("topic", line["topic"] or ""),
                ("parser", line["parser"] or ""),
                ("config_rev", int(line["config_rev"])),
                ("experiment_id", line.get("experiment_id") or ""),
                ("generation", source[0]),
                ("received_at", int(line["received_at"])),
                ("raw_partition", int(line["raw_partition"])),
                ("raw_offset", int(line["raw_offset"])),
                ("raw_index", int(line["raw_index"])),
            )
            for name, values in zip(_OF_READING, zip(*rows, strict=True), strict=True):
                columns[name].extend(values)
            for name, constant in same:
                columns[name].extend((constant,) * count)
            periods = line.get("circular")
            columns["circular"].extend([periods.get(row[1], 0.0) for row in rows] if periods else (0.0,) * count)
        seen.pop(source, None)
        seen[source] = at


def row_version(generation: int, revised: int, received_at: int) -> int:
    """The version of a row of `measurements`, as its table computes it: of equal keys the highest stays."""
    return generation * 10_000_000_000_000_000 + (received_at if revised else -received_at)


def _ranges(timestamps: Sequence[int]) -> Iterator[list[int]]:
    """Indexes of rows in the order of their instants, cut where the next is far, or the range becomes long."""
    order = sorted(range(len(timestamps)), key=timestamps.__getitem__)
    part: list[int] = []
    for row in order:
        at = timestamps[row]
        if part and (at - timestamps[part[-1]] > STANDING_GAP_US or at - timestamps[part[0]] > STANDING_SPAN_US):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


_OF_READING: Final = (
    "timestamp",
    "component_type",
    "pin_position",
    "value",
    "value_text",
    "unit",
    "quality",
    "flags",
    "revised",
)


class EventSync(_Stage):
    """Events that only we write, into their table; one that Kafka holds twice is one row once the table has merged."""

    def _append(self, columns: Columns, line: Any, seen: Seen) -> None:
        row: list[Any] = []
        for name, kind in self.table.types.items():
            value = line.get(name)
            if kind in (_TEXT, "String"):
                row.append("" if value is None else str(value))
            elif kind == "Nullable(Float64)":
                row.append(None if value is None else float(value))
            elif kind == "Float64":
                row.append(float(line[name]))
            elif kind.startswith("Nullable"):
                row.append(None if value is None else int(value))
            elif value is None and name in _OPTIONAL:
                row.append(0)
            else:
                row.append(int(line[name]))
        for name, value in zip(self.table.types, row, strict=True):
            columns[name].append(value)


#: Whole numbers that a line may lack: an operator's action was brought by no message.
_OPTIONAL: Final = frozenset({"raw_partition", "raw_offset", "raw_index", "sequence"})


class _ForeignSync(_Stage):
    """Records that others write: parsed one by one, tombstones too, and each line that is of no use told with its reason."""

    def _fill(self, columns: Columns, batch: Batch, seen: Seen) -> list[ErrorLine]:
        errors: list[ErrorLine] = []
        for record in batch.records:
            for index, raw in enumerate(lines_of(record.value)):
                try:
                    rows = self._rows(record, None if raw is None else loads(raw), index)
                except Reject as e:
                    errors.append(self._refused(batch, record, index, raw or b"", e.code, str(e)))
                    continue
                for row in rows:
                    for name, value in row.items():
                        columns[name].append(value)
        return errors

    def _rows(self, record: Record, value: Any, index: int) -> Sequence[Mapping[str, Any]]:
        """The rows of a parsed line, their fields named as the columns are.

        Raises:
            Reject: it cannot be used.
        """
        raise NotImplementedError


class TaskSync(_ForeignSync):
    """Task events into `task_events`, and through its materialized views into the current row of each file."""

    def __init__(self, store: ClickHouseStore, settings: Callable[[], Settings], *, clock: Clock | None = None) -> None:
        super().__init__(TASK_EVENTS, store, settings, clock=clock)

    def _rows(self, record: Record, value: Any, index: int) -> Sequence[Mapping[str, Any]]:
        return task_rows(record.key, value, offset=record.offset, index=index, recorded_at=record.timestamp * 1_000)


class EmployeeSync(_ForeignSync):
    """Employees into `employees`; of one employee the newest change stays once the table has merged."""

    def __init__(self, store: ClickHouseStore, settings: Callable[[], Settings], *, clock: Clock | None = None) -> None:
        super().__init__(EMPLOYEES, store, settings, clock=clock)

    def _rows(self, record: Record, value: Any, index: int) -> Sequence[Mapping[str, Any]]:
        row = employee_row(record.key, value, offset=record.offset, index=index, recorded_at=record.timestamp * 1_000)
        return () if row is None else (row,)
