-- What people asked all rows for, of the roll-ups: how many readings, of which time, with which mean. A few numbers a series and day are read, where
-- the old service's statements read every row. Days whose rows retention has dropped do not count, so that both say the same.

CREATE VIEW series_statistics AS
  SELECT s.series_id, s.device_id, s.connector_mode, s.component_type, s.pin_position, s.unit,
         r.records, r.n, r.sum, r.min, r.max,
         -- In the first of its days, which is one chunk.
         (SELECT m.timestamp FROM measurements m
          WHERE m.series_id = r.series_id AND m.timestamp >= r.first_day AND m.timestamp < r.first_day + INTERVAL '24 hours'
          ORDER BY m.timestamp LIMIT 1) AS first_record,
         l.timestamp AS latest_record
  FROM (SELECT series_id, min(bucket) AS first_day, sum(records)::bigint AS records, sum(n)::bigint AS n, sum(sum) AS sum, min(min) AS min, max(max) AS max
        FROM measurement_1d
        WHERE bucket >= (SELECT min(range_start) FROM measurement_chunks)
        GROUP BY series_id) r
  JOIN series s USING (series_id)
  LEFT JOIN latest l USING (series_id);
COMMENT ON VIEW series_statistics IS
  'Of each series with rows: how many, and their sum, extremes, first and last instant. As old as the roll-ups: of today at once, of other days within a minute.';

CREATE VIEW measurement_statistics AS
  SELECT device_id, component_type, sum(records)::bigint AS measurement_count, sum(sum) / NULLIF(sum(n), 0)::double precision AS avg_value,
         min(first_record) AS first_measurement, max(latest_record) AS last_measurement
  FROM series_statistics GROUP BY device_id, component_type;
COMMENT ON VIEW measurement_statistics IS 'The old service''s "performance statistics", of the roll-ups. The mean of a direction is none: see circular_1d.';

CREATE VIEW device_statistics AS
  SELECT device_id, sum(records)::bigint AS total_records, min(first_record) AS first_record, max(latest_record) AS latest_record
  FROM series_statistics GROUP BY device_id;
COMMENT ON VIEW device_statistics IS 'The old service''s "data distribution by device", of the roll-ups.';
