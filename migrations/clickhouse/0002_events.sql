-- Anomalies and windows (docs/ARCHITECTURE.md, "Records"). Every statement can be run again.

CREATE TABLE IF NOT EXISTS anomalies {{clickhouse.on_cluster}} (
  anomaly_id     String,
  device_id      LowCardinality(String),
  connector_mode LowCardinality(String),
  component_type LowCardinality(String),
  pin_position   LowCardinality(String),
  state          LowCardinality(String),
  timestamp      DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  value          Nullable(Float64),
  unit           LowCardinality(String),
  expected       Nullable(Float64),
  score          Nullable(Float64),
  threshold      Nullable(Float64),
  generation     UInt32,
  raw_partition  UInt32,
  raw_offset     UInt64,
  raw_index      UInt32
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree
PARTITION BY toYYYYMM(timestamp)
ORDER BY (device_id, component_type, pin_position, timestamp, anomaly_id)
TTL toDateTime(timestamp) + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}};

-- Of a window the newest generation counts, in it the highest revision.
CREATE TABLE IF NOT EXISTS aggregates {{clickhouse.on_cluster}} (
  window_id      String,
  revision       UInt32,
  device_id      LowCardinality(String),
  connector_mode LowCardinality(String),
  component_type LowCardinality(String),
  pin_position   LowCardinality(String),
  unit           LowCardinality(String),
  window_start   DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  window_end     DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  size_s         UInt32,
  hop_s          UInt32,
  count          UInt64,
  min            Float64                   CODEC(Gorilla, ZSTD(1)),
  max            Float64                   CODEC(Gorilla, ZSTD(1)),
  mean           Float64                   CODEC(Gorilla, ZSTD(1)),
  sum            Float64                   CODEC(Gorilla, ZSTD(1)),
  last           Float64                   CODEC(Gorilla, ZSTD(1)),
  last_at        DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  consumption    Nullable(Float64),
  closed_by      LowCardinality(String),
  generation     UInt32,
  version        UInt64 MATERIALIZED bitShiftLeft(toUInt64(generation), 32) + revision
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version)
PARTITION BY toYYYYMM(window_start)
ORDER BY (device_id, component_type, pin_position, connector_mode, unit, size_s, hop_s, window_start)
TTL toDateTime(window_start) + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}};

-- What transitions tell besides: their place in the occurrence, when they happened, whose doing they were.
ALTER TABLE alarm_events {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS sequence UInt32 DEFAULT 0;
ALTER TABLE alarm_events {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS transition_at Nullable(DateTime64(6, 'UTC'));
ALTER TABLE alarm_events {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS kind LowCardinality(String) DEFAULT '';
ALTER TABLE alarm_events {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS actor LowCardinality(String) DEFAULT '';
ALTER TABLE alarm_events {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS comment String DEFAULT '';
