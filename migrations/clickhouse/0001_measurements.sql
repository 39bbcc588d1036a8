-- Readings and alarms as the dashboards read them. Every statement can be run again.
--
-- Batches arrive exactly once by their tokens (docs/decisions/0004-clickhouse-exactly-once.md), which the engine only
-- heeds where the table has a window for them (its size and why: DEDUP_BLOCKS in preservarium/stores/migrate.py).
-- ReplacingMergeTree is the second net: of equal keys the newest generation stays, in it the latest verdict on the reading
-- (revised), else what was received first.

CREATE TABLE IF NOT EXISTS measurements {{clickhouse.on_cluster}} (
  timestamp      DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  device_id      LowCardinality(String),
  connector_mode LowCardinality(String),
  component_type LowCardinality(String),
  pin_position   LowCardinality(String),
  value          Nullable(Float64)         CODEC(Gorilla, ZSTD(1)),
  value_text     LowCardinality(String)    DEFAULT '',
  unit           LowCardinality(String),
  topic          LowCardinality(String),
  quality        UInt8,
  flags          LowCardinality(String)    DEFAULT '',
  parser         LowCardinality(String),
  config_rev     Int64                     CODEC(Delta, ZSTD(1)),
  experiment_id  LowCardinality(String)    DEFAULT '',
  generation     UInt32,
  received_at    DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  raw_partition  UInt32,
  raw_offset     UInt64                    CODEC(Delta, ZSTD(1)),
  raw_index      UInt32,
  revised        UInt8                     DEFAULT 0,
  version        Int64 MATERIALIZED toInt64(generation) * 10000000000000000
                   + if(revised = 1, 1, -1) * toUnixTimestamp64Micro(received_at)
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version)
PARTITION BY toYYYYMMDD(timestamp)
ORDER BY (device_id, component_type, pin_position, connector_mode, timestamp)
TTL toDateTime(timestamp) + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}}, ttl_only_drop_parts = 1;

CREATE TABLE IF NOT EXISTS alarm_events {{clickhouse.on_cluster}} (
  transition_id  String,
  alarm_id       String,
  device_id      LowCardinality(String),
  rule           LowCardinality(String),
  rule_rev       Int64,
  component_type LowCardinality(String),
  pin_position   LowCardinality(String),
  severity       LowCardinality(String),
  transition     LowCardinality(String),
  state          LowCardinality(String),
  occurred_at    DateTime64(6, 'UTC'),
  detected_at    DateTime64(6, 'UTC'),
  cleared_at     Nullable(DateTime64(6, 'UTC')),
  value          Nullable(Float64),
  unit           LowCardinality(String),
  threshold      Nullable(Float64),
  message        String,
  generation     UInt32,
  raw_partition  UInt32,
  raw_offset     UInt64,
  raw_index      UInt32
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree
PARTITION BY toYYYYMM(occurred_at)
ORDER BY (device_id, rule, occurred_at, transition_id)
TTL toDateTime(occurred_at) + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}};
