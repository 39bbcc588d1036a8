-- Whether a row is a later verdict on its reading (QARTOD's spike test judges a reading when the next one comes). Without it, which of
-- reading and verdict stays would depend on the order in which they come again.

ALTER TABLE measurements ADD COLUMN revised boolean;
COMMENT ON COLUMN measurements.revised IS 'True where a later message brought this verdict on an earlier reading; else NULL.';

CREATE OR REPLACE VIEW iot_measurements AS
  SELECT m.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, m.value,
         coalesce(m.unit, s.unit) AS unit, coalesce(m.topic, s.topic) AS topic,
         m.value_text, m.quality, m.flags, m.received_at, m.raw_partition, m.raw_offset, m.raw_index,
         d.parser, d.config_rev, m.generation, d.experiment_id, m.series_id, m.ingested_at, m.revised IS TRUE AS revised
  FROM measurements m JOIN series s USING (series_id) JOIN derivations d USING (derivation_id);
