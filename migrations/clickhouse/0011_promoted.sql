-- Generations whose rows count as live ones: those of changes that were promoted (docs/REPLAY.md). Of one the newest word stays. Can be run again.

CREATE TABLE IF NOT EXISTS promoted_generations {{clickhouse.on_cluster}} (
  generation     UInt32,
  counts         UInt8,
  version        UInt64
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version)
ORDER BY generation;
