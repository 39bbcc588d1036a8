-- What dashboards ask of all measurements, kept ready by each insert. Every statement can be run again.

-- The last value of each series: of equal times as in measurements.
CREATE TABLE IF NOT EXISTS latest_values {{clickhouse.on_cluster}} (
  device_id      LowCardinality(String),
  component_type LowCardinality(String),
  pin_position   LowCardinality(String),
  connector_mode LowCardinality(String),
  timestamp      DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  value          Nullable(Float64)         CODEC(Gorilla, ZSTD(1)),
  value_text     String,
  unit           LowCardinality(String),
  quality        UInt8,
  received_at    DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  version        UInt256                   CODEC(ZSTD(1))
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version)
ORDER BY (device_id, component_type, pin_position, connector_mode)
SETTINGS {{clickhouse.dedup_window}}, min_age_to_force_merge_seconds = 60;

CREATE MATERIALIZED VIEW IF NOT EXISTS latest_values_mv {{clickhouse.on_cluster}} TO latest_values AS
SELECT device_id, component_type, pin_position, connector_mode, m.timestamp AS timestamp, value, value_text, unit, quality,
       received_at,
       bitShiftLeft(toUInt256(toUnixTimestamp64Micro(m.timestamp)), 128) + bitShiftLeft(toUInt256(generation), 64)
         + toUInt64(9223372036854775807 + if(revised = 1, 1, -1) * toUnixTimestamp64Micro(received_at)) AS version
FROM measurements AS m
-- Of an insert's rows of one series only the last can be it.
ORDER BY version DESC
LIMIT 1 BY device_id, component_type, pin_position, connector_mode;

-- How many rows of each quality a device sent on a day. Sums: exact as long as each insert counts once, which its token and
-- the raw coordinates beside the offset see to.
CREATE TABLE IF NOT EXISTS measurement_days {{clickhouse.on_cluster}} (
  day            Date,
  device_id      LowCardinality(String),
  quality        UInt8,
  generation     UInt32,
  rows           UInt64
) ENGINE = {{clickhouse.replicated}}SummingMergeTree(rows)
PARTITION BY toYYYYMM(day)
ORDER BY (day, device_id, quality, generation)
TTL day + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}};

CREATE MATERIALIZED VIEW IF NOT EXISTS measurement_days_mv {{clickhouse.on_cluster}} TO measurement_days AS
SELECT toDate(m.timestamp) AS day, device_id, quality, generation, count() AS rows
FROM measurements AS m
GROUP BY day, device_id, quality, generation;
