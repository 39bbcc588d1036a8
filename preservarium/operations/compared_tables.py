"""Tables that PostgreSQL and ClickHouse both have: which columns are the same, and the hash of a row in either.

The hash is the beginning of MD5 over the row's bytes, and both engines write the same bytes (see verification.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson

from preservarium.operations import topic_comparison
from preservarium.settings import Settings
from preservarium.stages import sync

#: PostgreSQL's epoch, 2000-01-01, in µs since ours: `timestamptz_send` counts from there.
_EPOCH_US: Final = 946_684_800_000_000

Kind = Literal["text", "integer", "instant", "number", "instant or null"]


@dataclass(frozen=True, slots=True)
class Field:
    """A column that both engines have."""

    name: str  #: ClickHouse's
    kind: Kind
    postgres: str  #: expression over the row


@dataclass(frozen=True, slots=True)
class Compared:
    """A table that both engines have."""

    name: str
    sink: str  #: name of the sink's stage, as `sink_offsets` has it
    group: str  #: suffix of sync's consumer group
    topic: str
    source: str  #: PostgreSQL's FROM
    devices: str  #: PostgreSQL's table to find the names of devices in
    fields: tuple[Field, ...]
    key: tuple[str, ...]  #: besides device_id and the instant
    at: str  #: the instant whose day counts
    received: str  #: the instant that says whether a row may be on its way
    partition: str  #: strftime of a partition's id
    types: Mapping[str, str]  #: ClickHouse's columns
    select: str  #: PostgreSQL's columns of a whole row
    columns: Callable[[Any], list[Any]]  #: of a PostgreSQL row: values in the order of `types`
    #: days that PostgreSQL keeps: what is older there is no surplus in ClickHouse
    kept_days: Callable[[Settings], int] = lambda settings: settings.sink.retention_days

    def postgres(self, name: str) -> str:
        """PostgreSQL's expression of a column."""
        return next(f.postgres for f in self.fields if f.name == name)


LATE_COLUMNS: Final = (
    "timestamp, received_at, raw_offset, value, series_id, derivation_id, raw_index, generation, raw_partition, quality,"
    " value_text, flags, unit, topic"
)
#: Rows that wait for their chunk are rows.
_MEASUREMENTS_SOURCE: Final = f"""(
  SELECT {LATE_COLUMNS}, revised FROM measurements UNION ALL
  SELECT {LATE_COLUMNS}, NULL FROM measurements_late l WHERE NOT EXISTS (
    SELECT FROM measurements x WHERE x.series_id = l.series_id AND x.timestamp = l.timestamp)
) m JOIN series s USING (series_id) JOIN derivations d USING (derivation_id)"""

_MEASUREMENT_FIELDS: Final = (
    Field("device_id", "text", "s.device_id"),
    Field("connector_mode", "text", "s.connector_mode"),
    Field("component_type", "text", "s.component_type"),
    Field("pin_position", "text", "s.pin_position"),
    Field("timestamp", "instant", "m.timestamp"),
    Field("value", "number", "m.value"),
    Field("value_text", "text", "coalesce(m.value_text, '')"),
    Field("unit", "text", "coalesce(m.unit, s.unit)"),
    Field("topic", "text", "coalesce(m.topic, s.topic)"),
    Field("quality", "integer", "m.quality"),
    Field("flags", "text", "coalesce(array_to_string(m.flags, ','), '')"),
    Field("parser", "text", "d.parser"),
    Field("config_rev", "integer", "d.config_rev"),
    Field("experiment_id", "text", "d.experiment_id"),
    Field("generation", "integer", "m.generation"),
    Field("received_at", "instant", "m.received_at"),
    Field("raw_partition", "integer", "m.raw_partition"),
    Field("raw_offset", "integer", "m.raw_offset"),
    Field("raw_index", "integer", "m.raw_index"),
    Field("revised", "integer", "(m.revised IS TRUE)::int"),
)


_ALARM_FIELDS: Final = (
    Field("device_id", "text", "e.device_id"),
    Field("transition_id", "text", "e.transition_id"),
    Field("alarm_id", "text", "e.alarm_id"),
    Field("rule", "text", "e.rule"),
    Field("transition", "text", "e.transition"),
    Field("state", "text", "e.state"),
    Field("severity", "text", "e.severity"),
    Field("occurred_at", "instant", "e.occurred_at"),
    Field("detected_at", "instant", "e.detected_at"),
    Field("value", "number", "e.value"),
    Field("message", "text", "coalesce(e.detail->>'message', '')"),
    Field("generation", "integer", "e.generation"),
    Field("raw_partition", "integer", "coalesce(e.raw_partition, 0)"),
    Field("raw_offset", "integer", "coalesce(e.raw_offset, 0)"),
    Field("raw_index", "integer", "coalesce(e.raw_index, 0)"),
)


def epoch_us(sql: str) -> str:
    """PostgreSQL's expression for an instant in µs since the epoch."""
    return f"(extract(epoch FROM {sql}) * 1000000)::bigint"


def _selected(fields: Sequence[Field]) -> str:
    return ", ".join(
        f"{epoch_us(f.postgres) if f.kind in ('instant', 'instant or null') else f.postgres} AS {f.name}"
        for f in fields
    )


def _alarm_columns(row: Any) -> list[Any]:
    # The columns win over the document: jsonb's numbers know no -0.
    line = orjson.loads(row["detail"]) | {f.name: row[f.name] for f in _ALARM_FIELDS}
    values: list[Any] = []
    for name, kind in sync.ALARM_EVENTS.types.items():
        value = line.get(name)
        if kind.startswith("Nullable"):
            values.append(float(value) if value is not None and "Float" in kind else value)
        elif kind.endswith(("String", "String)")):
            values.append("" if value is None else str(value))
        else:
            values.append(int(value or 0))
    return values


MEASUREMENTS: Final = Compared(
    "measurements",
    "sink",
    "sync",
    "iot_validated_data",
    _MEASUREMENTS_SOURCE,
    "series",
    _MEASUREMENT_FIELDS,
    ("connector_mode", "component_type", "pin_position"),
    "timestamp",
    "received_at",
    "%Y%m%d",
    sync.MEASUREMENTS.types,
    # Not compared: PostgreSQL has it of the series, and only since its last reading.
    _selected(_MEASUREMENT_FIELDS) + ", coalesce(s.circular, 0) AS circular",
    lambda row: [row[name] for name in sync.MEASUREMENTS.types],
)

ALARM_EVENTS: Final = Compared(
    "alarm_events",
    "sink-alarms",
    "sync-alarms",
    "iot_alerts",
    "alarm_events e",
    "alarm_events",
    _ALARM_FIELDS,
    ("transition_id",),
    "occurred_at",
    "detected_at",
    "%Y%m",
    sync.ALARM_EVENTS.types,
    _selected(_ALARM_FIELDS) + ", e.detail",
    _alarm_columns,
)


def _event_fields(table: sync.Table, alias: str, named: Mapping[str, str] | None = None) -> tuple[Field, ...]:
    """Fields of a table whose columns have the same names and values in PostgreSQL, but for those that are `named`."""
    found = []
    for name, kind in table.types.items():
        postgres = (named or {}).get(name, f"{alias}.{name}")
        if "DateTime" in kind:
            found.append(Field(name, "instant or null" if kind.startswith("Nullable") else "instant", postgres))
        elif "Float" in kind:
            found.append(Field(name, "number", postgres))
        elif kind.endswith(("String", "String)")):
            found.append(Field(name, "text", postgres))
        else:
            # What no message brought has no coordinates.
            found.append(Field(name, "integer", f"coalesce({postgres}, 0)" if name.startswith("raw_") else postgres))
    return tuple(found)


def _columns(types: Mapping[str, str]) -> Callable[[Any], list[Any]]:
    return lambda row: [row[name] for name in types]


def _events(
    table: sync.Table,
    sink: str,
    key: tuple[str, ...],
    at: str,
    received: str,
    kept_days: Callable[[Settings], int],
    *,
    source: str | None = None,
    named: Mapping[str, str] | None = None,
) -> Compared:
    """A table of events, which PostgreSQL has by the same name; `e` is its row in `named` (see `_event_fields`)."""
    fields = _event_fields(table, "e", named)
    return Compared(
        table.name,
        sink,
        table.stage,
        table.topic.name,
        f"{source or table.name} e",
        table.name,
        fields,
        key,
        at,
        received,
        "%Y%m",
        table.types,
        _selected(fields),
        _columns(table.types),
        kept_days,
    )


ANOMALIES: Final = _events(
    sync.ANOMALIES,
    "sink-anomalies",
    ("component_type", "pin_position", "anomaly_id"),
    "timestamp",
    "timestamp",
    lambda settings: settings.sink.events_retention_days,
)

_WINDOW: Final = "device_id, component_type, pin_position, connector_mode, unit, size_s, hop_s, window_start"

AGGREGATES: Final = _events(
    sync.AGGREGATES,
    "sink-aggregates",
    ("component_type", "pin_position", "connector_mode", "unit", "size_s", "hop_s"),
    "window_start",
    "window_end",
    lambda settings: settings.sink.aggregates_retention_days,
    # PostgreSQL keeps a window of each generation, ClickHouse that of the newest.
    source=f"(SELECT DISTINCT ON ({_WINDOW}) * FROM aggregates ORDER BY {_WINDOW}, generation DESC, revision DESC)",
)


def _detail_instant(name: str) -> str:
    return f"'1970-01-01 00:00+00'::timestamptz + (e.detail->>'{name}')::bigint * INTERVAL '1 microsecond'"


COMMAND_EVENTS: Final = _events(
    sync.COMMAND_EVENTS,
    "sink-commands",
    ("command_id", "sequence", "event_id"),
    "at",
    "at",
    lambda settings: settings.sink.events_retention_days,
    named={name: _detail_instant(name) for name in ("requested_at", "expires_at", "ended_at")}
    | {name: f"coalesce(e.detail->>'{name}', '')" for name in ("command", "requested_by", "cause")}
    | {"priority": "(e.detail->>'priority')::bigint"},
)

#: Tables of which PostgreSQL tells the truth; of the others Kafka does (preservarium/operations/topic_comparison.py).
TABLES: Final = {t.name: t for t in (MEASUREMENTS, ALARM_EVENTS, ANOMALIES, AGGREGATES, COMMAND_EVENTS)}
ALL_TABLES: Final[Mapping[str, Compared | topic_comparison.Replayed]] = {**TABLES, **topic_comparison.TABLES}


def postgres_hash(table: Compared) -> str:
    """PostgreSQL's expression for the hash of a row, a bigint."""
    parts = []
    for f in table.fields:
        e = f.postgres
        if f.kind == "text":
            parts.append(f"convert_to({e}, 'UTF8') || '\\x00'::bytea")
        elif f.kind == "integer":
            parts.append(f"int8send(({e})::bigint)")
        elif f.kind == "instant":
            parts.append(f"timestamptz_send({e})")
        else:
            send = "float8send" if f.kind == "number" else "timestamptz_send"
            parts.append(f"CASE WHEN {e} IS NULL THEN '\\x00'::bytea ELSE '\\x01'::bytea || {send}({e}) END")
    return f"('x' || substr(md5({' || '.join(parts)}), 1, 16))::bit(64)::bigint"


def clickhouse_hash(table: Compared) -> str:
    """ClickHouse's expression for the hash of a row, an Int64; the same number."""
    parts = []
    for f in table.fields:
        if f.kind == "text":
            parts.append(f"toString({f.name}), '\\0'")
        elif f.kind == "integer":
            parts.append(f"reinterpretAsFixedString(byteSwap(toInt64({f.name})))")
        elif f.kind == "instant":
            parts.append(f"reinterpretAsFixedString(byteSwap(toUnixTimestamp64Micro({f.name}) - {_EPOCH_US}))")
        else:
            held = f"assumeNotNull({f.name})"
            number = f.kind == "number"
            number_sql = f"reinterpretAsUInt64({held})" if number else f"toUnixTimestamp64Micro({held}) - {_EPOCH_US}"
            bits = f"reinterpretAsFixedString(byteSwap({number_sql}))"
            # Both branches are evaluated, and assumeNotNull gives an arbitrary number for what is thrown away.
            parts.append(f"if(isNull({f.name}), '\\0', concat('\\x01', {bits}))")
    return f"reinterpretAsInt64(byteSwap(reinterpretAsUInt64(substring(MD5(concat({', '.join(parts)})), 1, 8))))"
