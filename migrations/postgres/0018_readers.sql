-- The old service's table, read by columns: a join to a unique key of which no column is asked for costs nothing where it is a LEFT JOIN, and every row has both.

CREATE OR REPLACE VIEW iot_measurements AS
  SELECT m.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, m.value,
         coalesce(m.unit, s.unit) AS unit, coalesce(m.topic, s.topic) AS topic,
         m.value_text, m.quality, m.flags, m.received_at, m.raw_partition, m.raw_offset, m.raw_index,
         d.parser, d.config_rev, m.generation, d.experiment_id, m.series_id, m.ingested_at, m.revised IS TRUE AS revised
  FROM measurements m LEFT JOIN series s USING (series_id) LEFT JOIN derivations d USING (derivation_id);
