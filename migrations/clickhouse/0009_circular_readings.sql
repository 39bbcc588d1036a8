-- Readings say whether they are circular (docs/DATATYPES.md): the period of their datatype, 0 where it has none. Can be run again.

ALTER TABLE measurements {{clickhouse.on_cluster}} ADD COLUMN IF NOT EXISTS circular Float64 DEFAULT 0 CODEC(ZSTD(1));
