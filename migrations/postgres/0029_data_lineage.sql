-- The lineage graph, of batches: some rows a transaction, none a reading (preservarium/domain/lineage_graph.py says what the names mean).

CREATE TABLE data_lineage (
  source_id         text        NOT NULL CHECK (length(source_id) <= 1000),
  target_id         text        NOT NULL CHECK (length(target_id) <= 1000),
  relationship_type text        NOT NULL,
  transformation_id text        NOT NULL DEFAULT '',
  created_at        timestamptz NOT NULL DEFAULT now(),
  span              int8range,
  PRIMARY KEY (source_id, target_id, relationship_type));
COMMENT ON COLUMN data_lineage.span IS 'Of a source that is a range of records: its offsets, above its partition times 2^44.';
CREATE INDEX data_lineage_target ON data_lineage (target_id, created_at);
CREATE INDEX data_lineage_created_at ON data_lineage (created_at);
-- Which ranges hold a record. Those of different topics may have the same numbers: they are told apart by their names.
CREATE INDEX data_lineage_span ON data_lineage USING gist (span) WHERE span IS NOT NULL;
