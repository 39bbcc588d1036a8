-- requires: timescaledb
-- blocking
-- Roll-ups as tables that upkeep keeps by what each write marks (docs/decisions, roll-ups), in the place of continuous aggregates: those could
-- not be told which buckets changed behind their watermark. What they hold is copied, since it is older than the rows that it was made of.

-- Their jobs first: to drop an aggregate ends one that runs, and what that one still writes would be in the way.
SELECT remove_continuous_aggregate_policy('rollup_1m', if_exists => true);
SELECT remove_continuous_aggregate_policy('rollup_1h', if_exists => true);
SELECT remove_continuous_aggregate_policy('rollup_1d', if_exists => true);
SELECT remove_continuous_aggregate_policy('rollup_circular_1h', if_exists => true);
SELECT remove_compression_policy('rollup_1m', if_exists => true);
SELECT remove_retention_policy('rollup_1m', if_exists => true);
SELECT remove_retention_policy('rollup_1h', if_exists => true);
DO $$
BEGIN
  FOR i IN 1..600 LOOP
    PERFORM pg_stat_clear_snapshot();
    EXIT WHEN NOT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'Refresh Continuous Aggregate Policy%');
    PERFORM pg_sleep(0.1);
  END LOOP;
END $$;

DROP VIEW recent_activity, circular_1m, circular_1h, circular_1d, measurement_1m, measurement_1h, measurement_1d;
ALTER MATERIALIZED VIEW rollup_1m RENAME TO former_1m;
ALTER MATERIALIZED VIEW rollup_1h RENAME TO former_1h;
ALTER MATERIALIZED VIEW rollup_1d RENAME TO former_1d;

CREATE TABLE rollup_1m (
  series_id integer NOT NULL, bucket timestamptz NOT NULL, records bigint NOT NULL, n bigint NOT NULL,
  sum double precision, min double precision, max double precision, last double precision,
  cos_sum double precision, sin_sum double precision,
  PRIMARY KEY (series_id, bucket));
CREATE TABLE rollup_1h (LIKE rollup_1m INCLUDING ALL);
CREATE TABLE rollup_1d (LIKE rollup_1m INCLUDING ALL);
SELECT create_hypertable('rollup_1m', by_range('bucket', INTERVAL '7 days'), create_default_indexes => false);
SELECT create_hypertable('rollup_1h', by_range('bucket', INTERVAL '90 days'), create_default_indexes => false);

INSERT INTO rollup_1m SELECT series_id, bucket, records, n, sum, min, max, last FROM former_1m;
INSERT INTO rollup_1h
  SELECT f.series_id, f.bucket, f.records, f.n, f.sum, f.min, f.max, f.last, c.cos_sum, c.sin_sum
  FROM former_1h f LEFT JOIN rollup_circular_1h c USING (series_id, bucket);
INSERT INTO rollup_1d
  SELECT f.series_id, f.bucket, f.records, f.n, f.sum, f.min, f.max, f.last, c.cos_sum, c.sin_sum
  FROM former_1d f LEFT JOIN (
    SELECT series_id, time_bucket(INTERVAL '1 day', bucket) AS bucket, sum(cos_sum) AS cos_sum, sum(sin_sum) AS sin_sum
    FROM rollup_circular_1h GROUP BY 1, 2) c USING (series_id, bucket);

DROP MATERIALIZED VIEW former_1d;
DROP MATERIALIZED VIEW rollup_circular_1h;
DROP MATERIALIZED VIEW former_1h;
DROP MATERIALIZED VIEW former_1m;

ALTER TABLE rollup_1m SET (timescaledb.compress = true, timescaledb.compress_segmentby = 'series_id', timescaledb.compress_orderby = 'bucket DESC');
SELECT add_compression_policy('rollup_1m', INTERVAL '7 days');
SELECT add_retention_policy('rollup_1m', INTERVAL '180 days');
SELECT add_retention_policy('rollup_1h', INTERVAL '3 years');

CREATE TABLE rollup_dirty (from_at timestamptz NOT NULL, to_at timestamptz NOT NULL);

-- What upkeep ran, as on plain PostgreSQL.
CREATE TABLE storage_runs (
  job            text PRIMARY KEY,
  last_run_at    timestamptz NOT NULL,
  succeeded      boolean NOT NULL,
  total_failures bigint NOT NULL DEFAULT 0,
  message        text);

-- Policies of ours that have not done their work for longer than their interval, and are not at it: the server has no worker for them, or ends each run
-- with an error. Upkeep runs those. `grace` is what the server has beyond the interval, and after its start.
CREATE FUNCTION storage_overdue(grace interval) RETURNS TABLE (job_id integer, job text) LANGUAGE sql STABLE AS $$
  SELECT j.job_id, j.proc_name || ' ' || j.hypertable_name
  FROM timescaledb_information.jobs j JOIN timescaledb_information.job_stats s USING (job_id)
  LEFT JOIN storage_runs r ON r.job = 'job ' || j.job_id
  WHERE j.scheduled AND s.job_status IS DISTINCT FROM 'Running'
    AND j.proc_name IN ('policy_compression', 'policy_retention') AND j.hypertable_name IN ('measurements', 'rollup_1m', 'rollup_1h')
    AND greatest(
      coalesce(s.last_successful_finish, '-infinity') + j.schedule_interval,
      r.last_run_at + CASE WHEN r.succeeded THEN j.schedule_interval ELSE least(j.schedule_interval, INTERVAL '1 hour') END,
      pg_postmaster_start_time()) < now() - grace
  ORDER BY s.last_successful_finish NULLS FIRST, j.job_id $$;

-- A job whose work upkeep does does not fail, whatever the server says of its own tries.
CREATE OR REPLACE VIEW storage_jobs AS
  SELECT j.proc_name || ' ' || coalesce(j.hypertable_name::text, '') AS job, greatest(s.last_run_started_at, r.last_run_at) AS last_run_at,
         s.last_run_status = 'Success' OR coalesce(r.succeeded AND r.last_run_at > now() - j.schedule_interval - INTERVAL '1 hour', false) AS succeeded,
         s.total_failures, s.next_start
  FROM timescaledb_information.jobs j JOIN timescaledb_information.job_stats s USING (job_id)
  LEFT JOIN storage_runs r ON r.job = 'job ' || j.job_id
  UNION ALL
  SELECT job, last_run_at, succeeded, total_failures, NULL FROM storage_runs WHERE job NOT LIKE 'job %';

-- As in 0002a, one caller at a time. What is as it should be is left alone, and what is changed is changed in its place: to remove a policy ends its running job.
CREATE OR REPLACE FUNCTION storage_policies(chunk_days integer, compress_after_days integer, retention_days integer) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  w record;
  found_id integer;
  found_config jsonb;
BEGIN
  PERFORM pg_advisory_xact_lock(7236481304);
  IF (SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'measurements' AND dimension_number = 1)
     IS DISTINCT FROM make_interval(days => chunk_days) THEN
    PERFORM set_chunk_time_interval('measurements', make_interval(days => chunk_days));
  END IF;
  FOR w IN SELECT * FROM (VALUES ('policy_compression', 'compress_after', make_interval(days => compress_after_days)),
                                 ('policy_retention', 'drop_after', make_interval(days => retention_days))) AS v(proc, key, after) LOOP
    SELECT j.job_id, j.config INTO found_id, found_config
    FROM timescaledb_information.jobs j WHERE j.proc_name = w.proc AND j.hypertable_name = 'measurements';
    IF found_id IS NULL AND w.key = 'compress_after' THEN
      PERFORM add_compression_policy('measurements', w.after);
    ELSIF found_id IS NULL THEN
      PERFORM add_retention_policy('measurements', w.after);
    ELSIF (found_config ->> w.key)::interval IS DISTINCT FROM w.after THEN
      PERFORM alter_job(found_id, config => found_config || jsonb_build_object(w.key, w.after::text));
    END IF;
  END LOOP;
END $$;

-- The aggregates may lack what came behind their watermark: upkeep makes all that there are rows of once more, a bounded piece at a time (see 0017).
ALTER TABLE rollup_dirty ADD COLUMN visible boolean NOT NULL DEFAULT true;
INSERT INTO rollup_dirty (from_at, to_at, visible)
  SELECT range_start, range_end, false FROM timescaledb_information.chunks WHERE hypertable_name = 'measurements';
