-- requires: plain
-- Measurements natively partitioned by time: functions here do what TimescaleDB's background jobs do, called by a worker's timer.

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
  PRIMARY KEY (series_id, timestamp)) PARTITION BY RANGE (timestamp);
-- The net: a row without partition would fail its whole batch. Partitions are made ahead, so it stays empty.
CREATE TABLE measurements_default PARTITION OF measurements DEFAULT;

CREATE TABLE measurement_partitions (
  name        text PRIMARY KEY,
  range_start timestamptz NOT NULL UNIQUE,
  range_end   timestamptz NOT NULL CHECK (range_end > range_start));

-- Makes the partitions of [from_at, to_at) that are missing. Existing ones keep their bounds when `chunk_days` changes.
-- Returns how many were made. Call it under one lock: storage_maintain does.
CREATE FUNCTION ensure_partitions(from_at timestamptz, to_at timestamptz, chunk_days integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  chunk interval := make_interval(days => chunk_days);
  at timestamptz := date_bin(chunk, from_at, '2000-01-01 00:00+00');
  upper_at timestamptz;
  name text;
  made integer := 0;
BEGIN
  PERFORM set_config('timezone', 'UTC', true);
  WHILE at < to_at LOOP
    SELECT p.range_end INTO upper_at FROM measurement_partitions p WHERE p.range_start <= at AND p.range_end > at;
    IF upper_at IS NULL THEN
      upper_at := date_bin(chunk, at, '2000-01-01 00:00+00') + chunk;
      SELECT least(upper_at, min(p.range_start)) INTO upper_at FROM measurement_partitions p WHERE p.range_start > at;
      name := 'measurements_' || to_char(at, 'YYYYMMDD');
      EXECUTE format('CREATE TABLE %I (LIKE measurements INCLUDING ALL)', name);
      EXECUTE format('WITH moved AS (DELETE FROM measurements_default WHERE timestamp >= %L AND timestamp < %L RETURNING *)
                      INSERT INTO %I SELECT * FROM moved', at, upper_at, name);
      EXECUTE format('ALTER TABLE measurements ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, at, upper_at);
      INSERT INTO measurement_partitions VALUES (name, at, upper_at);
      made := made + 1;
    END IF;
    at := upper_at;
  END LOOP;
  RETURN made;
END $$;

-- Drops the partitions whose last row is older than `before`, and such rows from the net. Returns how many partitions went.
CREATE FUNCTION drop_partitions(before timestamptz) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  p record;
  dropped integer := 0;
BEGIN
  FOR p IN SELECT name FROM measurement_partitions WHERE range_end <= before ORDER BY range_start LOOP
    EXECUTE format('DROP TABLE %I', p.name);
    DELETE FROM measurement_partitions WHERE name = p.name;
    dropped := dropped + 1;
  END LOOP;
  DELETE FROM measurements_default WHERE timestamp < before;
  RETURN dropped;
END $$;

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

-- Minutes (or, after a back-fill, hours and days) whose rows changed: written in the transaction of the rows.
-- No key, so that writers never wait for each other here.
CREATE TABLE rollup_dirty (from_at timestamptz NOT NULL, to_at timestamptz NOT NULL);

CREATE TABLE rollup_1m (
  series_id integer NOT NULL, bucket timestamptz NOT NULL, records bigint NOT NULL, n bigint NOT NULL,
  sum double precision, min double precision, max double precision, last double precision,
  PRIMARY KEY (series_id, bucket));
CREATE TABLE rollup_1h (LIKE rollup_1m INCLUDING ALL);
CREATE TABLE rollup_1d (LIKE rollup_1m INCLUDING ALL);
CREATE VIEW measurement_1m AS SELECT * FROM rollup_1m;
CREATE VIEW measurement_1h AS SELECT * FROM rollup_1h;
CREATE VIEW measurement_1d AS SELECT * FROM rollup_1d;

-- One level from the level below, for the buckets that [from_at, to_at) touches.
CREATE FUNCTION refresh_rollup(target text, source text, width interval, from_at timestamptz, to_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  from_at := date_bin(width, from_at, '2000-01-01 00:00+00');
  to_at := date_bin(width, to_at - INTERVAL '1 microsecond', '2000-01-01 00:00+00') + width;
  -- Series by series through the primary key: there is no index by time alone, and a scan would grow with the day.
  EXECUTE format('
    INSERT INTO %I AS r (series_id, bucket, records, n, sum, min, max, last)
    SELECT b.* FROM latest l CROSS JOIN LATERAL (
      SELECT m.series_id, date_bin($1, m.bucket, ''2000-01-01 00:00+00'') AS bucket, sum(m.records), sum(m.n), sum(m.sum), min(m.min), max(m.max),
             (array_agg(m.last ORDER BY m.bucket DESC) FILTER (WHERE m.last IS NOT NULL))[1]
      FROM %s AS m WHERE m.series_id = l.series_id AND m.bucket >= $2 AND m.bucket < $3 GROUP BY 1, 2 OFFSET 0) b
    WHERE l.timestamp >= $2
    ON CONFLICT (series_id, bucket) DO UPDATE
      SET records = excluded.records, n = excluded.n, sum = excluded.sum, min = excluded.min, max = excluded.max, last = excluded.last
      WHERE (r.records, r.n, r.sum, r.min, r.max, r.last) IS DISTINCT FROM (excluded.records, excluded.n, excluded.sum, excluded.min, excluded.max, excluded.last)',
    target, source) USING width, from_at, to_at;
END $$;

-- Brings the roll-ups up to every committed row. Returns how many ranges were refreshed.
CREATE FUNCTION refresh_rollups() RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  raw CONSTANT text := '(SELECT series_id, timestamp AS bucket, 1 AS records, (value IS NOT NULL)::int AS n, value AS sum, value AS min, value AS max, value AS last FROM measurements)';
  dirty tstzmultirange;
  r tstzrange;
  refreshed integer := 0;
BEGIN
  WITH gone AS (DELETE FROM rollup_dirty RETURNING from_at, to_at)
  SELECT range_agg(tstzrange(from_at, to_at)) INTO dirty FROM gone;
  IF dirty IS NULL THEN
    RETURN 0;
  END IF;
  FOR r IN SELECT unnest(dirty) LOOP
    PERFORM refresh_rollup('rollup_1m', raw, INTERVAL '1 minute', lower(r), upper(r));
    refreshed := refreshed + 1;
  END LOOP;
  -- The levels above: each bucket once, however many minutes of it changed.
  FOR r IN SELECT unnest(range_agg(tstzrange(date_bin('1 hour', lower(x), '2000-01-01 00:00+00'),
             date_bin('1 hour', upper(x) - INTERVAL '1 microsecond', '2000-01-01 00:00+00') + INTERVAL '1 hour'))) FROM unnest(dirty) AS x LOOP
    PERFORM refresh_rollup('rollup_1h', 'rollup_1m', INTERVAL '1 hour', lower(r), upper(r));
  END LOOP;
  FOR r IN SELECT unnest(range_agg(tstzrange(date_bin('1 day', lower(x), '2000-01-01 00:00+00'),
             date_bin('1 day', upper(x) - INTERVAL '1 microsecond', '2000-01-01 00:00+00') + INTERVAL '1 day'))) FROM unnest(dirty) AS x LOOP
    PERFORM refresh_rollup('rollup_1d', 'rollup_1h', INTERVAL '1 day', lower(r), upper(r));
  END LOOP;
  RETURN refreshed;
END $$;

CREATE VIEW recent_activity AS
  SELECT r.bucket AS minute, s.device_id, sum(r.records)::bigint AS records
  FROM measurement_1m r JOIN series s USING (series_id)
  WHERE r.bucket > now() - INTERVAL '1 hour' AND r.bucket <= now() + INTERVAL '5 minutes'
  GROUP BY 1, 2;

CREATE VIEW compression_stats AS
  SELECT 'public'::text AS chunk_schema, name AS chunk_name, 'Uncompressed'::text AS compression_status,
         pg_total_relation_size(to_regclass(quote_ident(name))) AS before_bytes, NULL::bigint AS after_bytes, NULL::numeric AS after_pct
  FROM measurement_partitions;

CREATE VIEW measurement_chunks AS
  SELECT name, range_start, range_end, false AS is_compressed FROM measurement_partitions;

CREATE TABLE storage_runs (
  job            text PRIMARY KEY,
  last_run_at    timestamptz NOT NULL,
  succeeded      boolean NOT NULL,
  total_failures bigint NOT NULL DEFAULT 0,
  message        text);
CREATE VIEW storage_jobs AS
  SELECT job, last_run_at, succeeded, total_failures, NULL::timestamptz AS next_start FROM storage_runs;

CREATE FUNCTION storage_engine() RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'plain' $$;

-- One turn of the timer: partitions ahead, retention, roll-ups. Each job's outcome is a row of storage_runs.
-- Returns false where another worker is at it.
CREATE FUNCTION storage_maintain(chunk_days integer, retention_days integer) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  job_name text;
  error text;
BEGIN
  IF NOT pg_try_advisory_xact_lock(7236481302) THEN
    RETURN false;
  END IF;
  -- A partition is dropped under an exclusive lock: give up soon rather than queue every writer behind it.
  PERFORM set_config('lock_timeout', '2s', true);
  FOREACH job_name IN ARRAY ARRAY['partitions', 'retention', 'rollups'] LOOP
    error := NULL;
    BEGIN
      CASE job_name
        WHEN 'partitions' THEN
          PERFORM ensure_partitions(now() - make_interval(days => retention_days), now() + make_interval(days => 3 * chunk_days + 2), chunk_days);
        WHEN 'retention' THEN
          PERFORM drop_partitions(now() - make_interval(days => retention_days));
          DELETE FROM rollup_1m WHERE bucket < now() - make_interval(days => 2 * retention_days);
          DELETE FROM rollup_1h WHERE bucket < now() - make_interval(days => 12 * retention_days);
        WHEN 'rollups' THEN
          PERFORM refresh_rollups();
      END CASE;
    EXCEPTION WHEN OTHERS THEN
      error := SQLERRM;
    END;
    INSERT INTO storage_runs AS s (job, last_run_at, succeeded, total_failures, message)
    VALUES (job_name, now(), error IS NULL, (error IS NOT NULL)::int, error)
    ON CONFLICT (job) DO UPDATE
      SET last_run_at = excluded.last_run_at, succeeded = excluded.succeeded, message = excluded.message,
          total_failures = s.total_failures + excluded.total_failures;
  END LOOP;
  RETURN true;
END $$;

SELECT storage_maintain({{sink.chunk_days}}, {{sink.retention_days}});
