-- requires: timescaledb
-- Measurements as a hypertable: compression, retention and hierarchical roll-ups are TimescaleDB's background jobs.
-- A job that fails does so silently: the view storage_jobs shows it, and health turns yellow.

CREATE TABLE measurements (
  timestamp     timestamptz NOT NULL CHECK (timestamp >= '2000-01-01 00:00+00' AND timestamp < '2100-01-01 00:00+00'),
  received_at   timestamptz NOT NULL,
  raw_offset    bigint NOT NULL,
  -- NaN sorts above every number here, so the upper bound refuses it: one NaN would spoil every roll-up above it.
  value         double precision CHECK (value > '-Infinity' AND value < 'Infinity'),
  series_id     integer NOT NULL,
  derivation_id integer NOT NULL,
  raw_index     integer NOT NULL,
  generation    integer NOT NULL DEFAULT 0,
  raw_partition smallint NOT NULL,
  quality       smallint NOT NULL,
  value_text    text,
  flags         text[],
  unit          text,
  topic         text,
  PRIMARY KEY (series_id, timestamp));
SELECT create_hypertable('measurements', by_range('timestamp', make_interval(days => {{sink.chunk_days}})), create_default_indexes => false);
ALTER TABLE measurements SET (timescaledb.compress = true, timescaledb.compress_segmentby = 'series_id', timescaledb.compress_orderby = 'timestamp DESC');
SELECT add_compression_policy('measurements', make_interval(days => {{sink.compress_after_days}}));
SELECT add_retention_policy('measurements', make_interval(days => {{sink.retention_days}}));

CREATE VIEW iot_measurements AS
  SELECT m.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, m.value,
         coalesce(m.unit, s.unit) AS unit, coalesce(m.topic, s.topic) AS topic,
         m.value_text, m.quality, m.flags, m.received_at, m.raw_partition, m.raw_offset, m.raw_index,
         d.parser, d.config_rev, m.generation, d.experiment_id, m.series_id
  FROM measurements m JOIN series s USING (series_id) JOIN derivations d USING (derivation_id);
COMMENT ON VIEW iot_measurements IS 'The table of the service that this replaces, column for column, and what we know besides.';

CREATE TABLE measurements_late (LIKE measurements INCLUDING ALL);
COMMENT ON TABLE measurements_late IS
  'Rows older than the compression horizon wait here and are merged chunk by chunk, so that a back-fill does not slow live data.';

-- Moves up to `rows_max` staged rows, all of one chunk, the oldest first. Returns how many left the staging table.
CREATE FUNCTION merge_late(chunk interval, rows_max integer) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  oldest timestamptz;
  moved bigint;
BEGIN
  SELECT date_bin(chunk, min(timestamp), '2000-01-01 00:00+00') INTO oldest FROM measurements_late;
  IF oldest IS NULL THEN
    RETURN 0;
  END IF;
  WITH batch AS (
    DELETE FROM measurements_late WHERE (series_id, timestamp) IN (
      SELECT series_id, timestamp FROM measurements_late
      WHERE timestamp >= oldest AND timestamp < oldest + chunk ORDER BY series_id, timestamp LIMIT rows_max)
    RETURNING *),
  merged AS (
    INSERT INTO measurements (timestamp, received_at, raw_offset, value, series_id, derivation_id, raw_index, generation,
                              raw_partition, quality, value_text, flags, unit, topic)
    SELECT timestamp, received_at, raw_offset, value, series_id, derivation_id, raw_index, generation,
           raw_partition, quality, value_text, flags, unit, topic
    FROM batch ORDER BY series_id, timestamp ON CONFLICT DO NOTHING)
  SELECT count(*) INTO moved FROM batch;
  RETURN moved;
END $$;

-- n, sum, min, max and last are kept and never an average: an average of averages is wrong.
-- Raw retention (at least 8 days) exceeds every start_offset: a refresh over a dropped range would delete its aggregates.
CREATE MATERIALIZED VIEW measurement_1m WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
  SELECT series_id, time_bucket(INTERVAL '1 minute', timestamp) AS bucket, count(*) AS records, count(value) AS n,
         sum(value) AS sum, min(value) AS min, max(value) AS max, last(value, timestamp) AS last
  FROM measurements GROUP BY 1, 2 WITH NO DATA;
CREATE MATERIALIZED VIEW measurement_1h WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
  SELECT series_id, time_bucket(INTERVAL '1 hour', bucket) AS bucket, sum(records) AS records, sum(n) AS n,
         sum(sum) AS sum, min(min) AS min, max(max) AS max, last(last, bucket) AS last
  FROM measurement_1m GROUP BY 1, 2 WITH NO DATA;
CREATE MATERIALIZED VIEW measurement_1d WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
  SELECT series_id, time_bucket(INTERVAL '1 day', bucket) AS bucket, sum(records) AS records, sum(n) AS n,
         sum(sum) AS sum, min(min) AS min, max(max) AS max, last(last, bucket) AS last
  FROM measurement_1h GROUP BY 1, 2 WITH NO DATA;
SELECT add_continuous_aggregate_policy('measurement_1m', start_offset => INTERVAL '2 days', end_offset => INTERVAL '1 minute', schedule_interval => INTERVAL '1 minute');
SELECT add_continuous_aggregate_policy('measurement_1h', start_offset => INTERVAL '3 days', end_offset => INTERVAL '1 hour', schedule_interval => INTERVAL '15 minutes');
SELECT add_continuous_aggregate_policy('measurement_1d', start_offset => INTERVAL '7 days', end_offset => INTERVAL '1 day', schedule_interval => INTERVAL '6 hours');
ALTER MATERIALIZED VIEW measurement_1m SET (timescaledb.compress = true);
SELECT add_compression_policy('measurement_1m', INTERVAL '7 days');
SELECT add_retention_policy('measurement_1m', INTERVAL '180 days');
SELECT add_retention_policy('measurement_1h', INTERVAL '3 years');

CREATE VIEW recent_activity AS
  SELECT r.bucket AS minute, s.device_id, sum(r.records)::bigint AS records
  FROM measurement_1m r JOIN series s USING (series_id)
  WHERE r.bucket > now() - INTERVAL '1 hour' AND r.bucket <= now() + INTERVAL '5 minutes'
  GROUP BY 1, 2;

CREATE VIEW compression_stats AS
  SELECT chunk_schema::text, chunk_name::text, compression_status, before_compression_total_bytes AS before_bytes,
         after_compression_total_bytes AS after_bytes,
         round(100.0 * after_compression_total_bytes / NULLIF(before_compression_total_bytes, 0), 2) AS after_pct
  FROM chunk_compression_stats('measurements');

CREATE VIEW measurement_chunks AS
  SELECT chunk_name::text AS name, range_start, range_end, is_compressed
  FROM timescaledb_information.chunks WHERE hypertable_name = 'measurements';

CREATE VIEW storage_jobs AS
  SELECT j.proc_name || ' ' || coalesce(j.hypertable_name::text, '') AS job, s.last_run_started_at AS last_run_at,
         s.last_run_status = 'Success' AS succeeded, s.total_failures, s.next_start
  FROM timescaledb_information.jobs j JOIN timescaledb_information.job_stats s USING (job_id);

CREATE FUNCTION storage_engine() RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'timescaledb' $$;

-- Brings the policies to what the settings say now. Adding one that exists with other arguments only warns, so it is removed first.
CREATE FUNCTION storage_policies(chunk_days integer, compress_after_days integer, retention_days integer) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM set_chunk_time_interval('measurements', make_interval(days => chunk_days));
  PERFORM remove_compression_policy('measurements', if_exists => true);
  PERFORM add_compression_policy('measurements', make_interval(days => compress_after_days));
  PERFORM remove_retention_policy('measurements', if_exists => true);
  PERFORM add_retention_policy('measurements', make_interval(days => retention_days));
END $$;
