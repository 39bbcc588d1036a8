-- When a row was inserted; the engine sets it. A repeated insert is told by its token, not by its content, so this
-- column does not make it another one. Rows from before are given the time of this migration.

ALTER TABLE measurements {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS ingested_at DateTime64(6, 'UTC') DEFAULT now64(6) CODEC(DoubleDelta, ZSTD(1));
ALTER TABLE measurements {{clickhouse.on_cluster}} MATERIALIZE COLUMN ingested_at;
