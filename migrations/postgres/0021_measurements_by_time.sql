-- blocking
-- Readers who ask by time: the last hour, the last day. The key begins with the series, so each of them read every series, or all rows. Rows come nearly in
-- the order of their time, so the least and the greatest of each stretch of the table are enough: a B-tree makes each row that is written dearer by a
-- third, and would be walked from the newest row on for those of a device that is silent (docs/decisions, the former service).

CREATE INDEX measurements_time ON measurements USING brin (timestamp) WITH (pages_per_range = 32, autosummarize = on);

-- The newest readings of a device, whatever it has sent since when: of each series as many, then the newest of those.
CREATE FUNCTION newest_readings(device text, rows_max integer DEFAULT 10) RETURNS SETOF iot_measurements LANGUAGE sql STABLE AS $$
  SELECT m.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, m.value,
         coalesce(m.unit, s.unit), coalesce(m.topic, s.topic), m.value_text, m.quality, m.flags, m.received_at, m.raw_partition, m.raw_offset, m.raw_index,
         d.parser, d.config_rev, m.generation, d.experiment_id, m.series_id, m.ingested_at, m.revised IS TRUE
  FROM series s
  CROSS JOIN LATERAL (SELECT * FROM measurements WHERE series_id = s.series_id ORDER BY timestamp DESC LIMIT rows_max) m
  LEFT JOIN derivations d USING (derivation_id)
  WHERE s.device_id = device ORDER BY m.timestamp DESC LIMIT rows_max $$;
COMMENT ON FUNCTION newest_readings(text, integer) IS
  'SELECT * FROM iot_measurements WHERE device_id = … ORDER BY timestamp DESC LIMIT …, without reading all that the device ever sent.';
