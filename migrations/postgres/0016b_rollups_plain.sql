-- requires: plain
-- Roll-ups are refreshed piece by piece, by functions that both layouts have (0017): storage_maintain keeps partitions and retention alone.

DROP VIEW recent_activity, circular_1m, circular_1h, circular_1d, measurement_1m, measurement_1h, measurement_1d;
DROP FUNCTION refresh_rollups();
DROP FUNCTION refresh_rollup(text, text, interval, timestamptz, timestamptz);

-- One turn of the timer: partitions ahead, retention. Each job's outcome is a row of storage_runs.
-- Returns false where another worker is at it.
CREATE OR REPLACE FUNCTION storage_maintain(chunk_days integer, retention_days integer) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  job_name text;
  error text;
BEGIN
  IF NOT pg_try_advisory_xact_lock(7236481302) THEN
    RETURN false;
  END IF;
  -- A partition is dropped under an exclusive lock: give up soon rather than queue every writer behind it.
  PERFORM set_config('lock_timeout', '2s', true);
  FOREACH job_name IN ARRAY ARRAY['partitions', 'retention'] LOOP
    error := NULL;
    BEGIN
      CASE job_name
        WHEN 'partitions' THEN
          PERFORM ensure_partitions(now() - make_interval(days => retention_days), now() + make_interval(days => 3 * chunk_days + 2), chunk_days);
        WHEN 'retention' THEN
          PERFORM drop_partitions(now() - make_interval(days => retention_days));
          DELETE FROM rollup_1m WHERE bucket < now() - make_interval(days => 2 * retention_days);
          DELETE FROM rollup_1h WHERE bucket < now() - make_interval(days => 12 * retention_days);
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
