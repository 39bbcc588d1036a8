"""The sync stages: from records to ClickHouse's columns, each row exactly once.

One insert for each Kafka partition of a flight, with a token made of the range of offsets that it comes from. The range
is committed to Kafka before (preservarium/feeds.py, planned), so whoever repeats the batch repeats the insert as it was.

Kafka may hold a message twice, because a stage before us crashed between sending and acknowledging. Such a repetition is a
run of earlier messages, so the last raw coordinates of each raw partition tell it from news. They are committed beside the
offset: a batch that is done again starts from the same ones, and is the same.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import orjson

from preservarium import metrics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.errors import ReasonCode
from preservarium.domain.reading import ErrorLine
from preservarium.records import error_line, error_send, parse_trusted
from preservarium.settings import Settings
from preservarium.stage import Batch, Effects, Record
from preservarium.stores.clickhouse import ClickHouseStore

#: Rows of one insert. Fixed, and not a setting: a batch that is done again must be cut as before.
INSERT_ROWS_MAX: Final = 100_000

#: (generation, raw partition) pairs whose last coordinates are kept for a partition: one or a few in practice, since
#: normalize writes by key. 40 of them are at most 2.5 KiB of the 4 KiB that a broker takes as metadata.
SEEN_MAX: Final = 40

_TEXT: Final = "LowCardinality(String)"
_TIME: Final = "DateTime64(6, 'UTC')"

MEASUREMENT_TYPES: Final[Mapping[str, str]] = {
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
    "parser": _TEXT,
    "config_rev": "Int64",
    "experiment_id": _TEXT,
    "generation": "UInt32",
    "received_at": _TIME,
    "raw_partition": "UInt32",
    "raw_offset": "UInt64",
    "raw_index": "UInt32",
}

ALARM_EVENT_TYPES: Final[Mapping[str, str]] = {
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
}

Columns = dict[str, list[Any]]
#: (generation, raw partition) -> (raw offset, raw index) of the last message applied, the newest pairs last.
Seen = dict[tuple[int, int], tuple[int, int]]


class _Stage:
    """What the sync stages have in common: one insert a partition, tokens, plans, error lines."""

    table: str
    types: Mapping[str, str]

    def __init__(
        self, name: str, store: ClickHouseStore, settings: Callable[[], Settings], *, clock: Clock | None = None
    ) -> None:
        self.name = name
        self._store = store
        self._settings = settings
        self._clock = clock or SystemClock()
        self._seen: dict[int, Seen] = {}

    # --- memory (preservarium/feeds.py)

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
        columns: Columns = {name: [] for name in self.types}
        seen = dict(self._seen.get(batch.partition, {}))
        parsed, errors = parse_trusted(batch, stage=self.name, now_us=self._clock.now_us())
        for record, lines in zip(batch.records, parsed, strict=True):
            for index, line in enumerate(lines):
                try:
                    self._append(columns, line, seen)
                except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as e:
                    errors.append(self._refused(batch, record, index, line, e))
        first, end = batch.records[0].offset, batch.records[-1].offset + 1
        token = f"{batch.topic}-{batch.partition}-{first}-{end}"
        rows = len(columns[next(iter(columns))])
        for start in range(0, rows, INSERT_ROWS_MAX):
            whole = rows <= INSERT_ROWS_MAX
            part = columns if whole else {n: c[start : start + INSERT_ROWS_MAX] for n, c in columns.items()}
            await self._store.insert(self.table, part, self.types, token=token if whole else f"{token}#{start}")
        metrics.READINGS.labels(self.name).inc(rows)
        limit = self._settings().kafka.record_bytes_max
        for error in errors:
            effects.sends.append(error_send(error, record_bytes_max=limit))
            effects.refused[error["code"]] = effects.refused.get(error["code"], 0) + 1
        # Once it is acknowledged: a batch that is tried again must find what it found before.
        effects.after.append(partial(self._seen.__setitem__, batch.partition, seen))

    def _refused(self, batch: Batch, record: Record, index: int, line: Any, error: Exception) -> ErrorLine:
        return error_line(
            self.name,
            ReasonCode.STORE_REJECTED,
            f"{type(error).__name__}: {error}",
            topic=batch.topic,
            partition=batch.partition,
            now_us=self._clock.now_us(),
            record=record,
            index=index,
            raw=orjson.dumps(line),
            device_id=record.key.decode("utf-8", "replace") if record.key else None,
        )

    def _append(self, columns: Columns, line: Any, seen: Seen) -> None:
        """Add a line's rows to the columns, or raise before anything is added."""
        raise NotImplementedError


#: Stands for a raw partition where messages were put into order: their positions are those of their release.
_RELEASED: Final = -1


class ReadingSync(_Stage):
    """Validated messages into `measurements`."""

    table = "measurements"
    types = MEASUREMENT_TYPES

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
                ("raw_partition", source[1]),
                ("raw_offset", at[0]),
                ("raw_index", at[1]),
            )
            for name, values in zip(_OF_READING, zip(*rows, strict=True), strict=True):
                columns[name].extend(values)
            for name, constant in same:
                columns[name].extend((constant,) * count)
        seen.pop(source, None)
        seen[source] = at


_OF_READING: Final = (
    "timestamp",
    "component_type",
    "pin_position",
    "value",
    "value_text",
    "unit",
    "quality",
    "flags",
)


class AlarmSync(_Stage):
    """Alarm transitions into `alarm_events`; a transition that Kafka holds twice is one row once the table has merged."""

    table = "alarm_events"
    types = ALARM_EVENT_TYPES

    def _append(self, columns: Columns, line: Any, seen: Seen) -> None:
        row: list[Any] = []
        for name, kind in self.types.items():
            value = line.get(name)
            if kind.startswith("Nullable"):
                row.append(value if value is None or name == "cleared_at" else float(value))
            elif kind in (_TEXT, "String"):
                row.append("" if value is None else str(value))
            else:
                row.append(int(line[name]))
        for name, value in zip(self.types, row, strict=True):
            columns[name].append(value)
