-- The third time of a row. `timestamp` is the device's, `received_at` a connector's, `ingested_at` says when the row was
-- stored (the begin of its transaction). The database sets it, so it costs a write nothing; rows from before have none.

ALTER TABLE measurements ADD COLUMN ingested_at timestamptz;
ALTER TABLE measurements ALTER COLUMN ingested_at SET DEFAULT now();

CREATE OR REPLACE VIEW iot_measurements AS
  SELECT m.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, m.value,
         coalesce(m.unit, s.unit) AS unit, coalesce(m.topic, s.topic) AS topic,
         m.value_text, m.quality, m.flags, m.received_at, m.raw_partition, m.raw_offset, m.raw_index,
         d.parser, d.config_rev, m.generation, d.experiment_id, m.series_id, m.ingested_at
  FROM measurements m JOIN series s USING (series_id) JOIN derivations d USING (derivation_id);
