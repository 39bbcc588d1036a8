-- Commands: their events, and each as the last of them left it. Every statement can be run again.

CREATE TABLE IF NOT EXISTS command_events {{clickhouse.on_cluster}} (
  event_id       String,
  command_id     String,
  sequence       UInt32,
  device_id      LowCardinality(String),
  event          LowCardinality(String),
  state          LowCardinality(String),
  at             DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  actor          LowCardinality(String),
  reason         String,
  attempt        UInt32,
  command        LowCardinality(String),
  priority       UInt32,
  requested_at   DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  requested_by   LowCardinality(String),
  cause          String,
  expires_at     DateTime64(6, 'UTC')      CODEC(DoubleDelta, ZSTD(1)),
  ended_at       Nullable(DateTime64(6, 'UTC'))
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree
PARTITION BY toYYYYMM(at)
ORDER BY (device_id, command_id, sequence, event_id)
TTL toDateTime(at) + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}};

CREATE VIEW IF NOT EXISTS device_commands {{clickhouse.on_cluster}} AS
SELECT command_id, device_id, command, state, event, sequence, reason, attempt, priority, requested_at, requested_by, cause,
       expires_at, ended_at, at AS updated_at
FROM command_events
ORDER BY sequence DESC
LIMIT 1 BY command_id;
