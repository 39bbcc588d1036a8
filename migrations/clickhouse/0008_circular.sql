-- Circular quantities (docs/DATATYPES.md): windows have their period, and neither sum nor least nor greatest value, but the sums of unit
-- vectors. Every statement can be run again.

ALTER TABLE aggregates {{clickhouse.on_cluster}} MODIFY COLUMN min Nullable(Float64) CODEC(Gorilla, ZSTD(1));
ALTER TABLE aggregates {{clickhouse.on_cluster}} MODIFY COLUMN max Nullable(Float64) CODEC(Gorilla, ZSTD(1));
ALTER TABLE aggregates {{clickhouse.on_cluster}} MODIFY COLUMN mean Nullable(Float64) CODEC(Gorilla, ZSTD(1));
ALTER TABLE aggregates {{clickhouse.on_cluster}} MODIFY COLUMN sum Nullable(Float64) CODEC(Gorilla, ZSTD(1));
ALTER TABLE aggregates {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS circular Nullable(Float64);
ALTER TABLE aggregates {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS spread Nullable(Float64);
ALTER TABLE aggregates {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS cos_sum Nullable(Float64);
ALTER TABLE aggregates {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS sin_sum Nullable(Float64);
