-- Roll-ups of both layouts. Each write marks in its transaction what it changes, the views make what is marked of the rows themselves, and upkeep
-- (`refresh_rollups`, a worker's timer) makes the tables of it and takes the marks away, in one transaction: so a view says what the rows say, whether
-- upkeep has been there or not. docs/decisions says why (roll-ups).

ALTER TABLE rollup_dirty
  ADD COLUMN level smallint NOT NULL DEFAULT 0 CHECK (level BETWEEN 0 AND 2),
  ADD COLUMN series integer[],
  ADD COLUMN hours integer[],
  ADD COLUMN IF NOT EXISTS visible boolean NOT NULL DEFAULT true,
  ALTER COLUMN series SET STORAGE EXTERNAL,
  ALTER COLUMN hours SET STORAGE EXTERNAL,
  ADD CHECK (cardinality(series) = cardinality(hours)),
  SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
COMMENT ON TABLE rollup_dirty IS 'What the roll-ups must look at again. No key, so that writers never wait for each other here.';
COMMENT ON COLUMN rollup_dirty.level IS '0: minutes, to be made of the rows; 1: hours, of minutes; 2: days, of hours.';
COMMENT ON COLUMN rollup_dirty.series IS 'NULL: all series. Else with hours, element by element: a series and the hour of it, counted since 2000.';
COMMENT ON COLUMN rollup_dirty.visible IS 'Whether the views make it of the rows until upkeep was there: all of today does. Else they show the tables.';

-- For readers of all series, and retention. No B-tree: where little is known of a table yet, one would be taken for looking up an hour of a single series.
CREATE INDEX rollup_1m_bucket ON rollup_1m USING brin (bucket) WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX rollup_1h_bucket ON rollup_1h USING brin (bucket) WITH (pages_per_range = 16, autosummarize = on);

-- What a level's view must not take from its table: whole buckets of it, of a week, so that it is known without asking which chunks have none of them.
-- (A day is 24 hours here and below: '1 day' would follow the session's time zone.)
CREATE FUNCTION rollup_pending(of_level integer) RETURNS tstzmultirange LANGUAGE sql STABLE AS $$
  SELECT coalesce(range_agg(tstzrange(date_bin(w, from_at, '2000-01-01 00:00+00'),
                                      date_bin(w, to_at - INTERVAL '1 microsecond', '2000-01-01 00:00+00') + w)), '{}')
         * tstzmultirange(tstzrange(date_bin('1 day', now() - INTERVAL '168 hours', '2000-01-01 00:00+00'), NULL))
  FROM rollup_dirty, (SELECT (ARRAY[INTERVAL '1 minute', INTERVAL '1 hour', INTERVAL '24 hours'])[of_level + 1]) AS l(w)
  WHERE visible AND level <= of_level $$;

CREATE VIEW rollup_live_1m AS
  SELECT series_id, bucket, records, n, sum, min, max, last, cos_sum, sin_sum FROM rollup_1m
  WHERE NOT bucket <@ (SELECT rollup_pending(0))
  UNION ALL
  SELECT m.series_id, date_bin('1 minute', m.timestamp, '2000-01-01 00:00+00'), count(*), count(m.value),
         sum(m.value) FILTER (WHERE s.circular IS NULL), min(m.value) FILTER (WHERE s.circular IS NULL), max(m.value) FILTER (WHERE s.circular IS NULL),
         (array_agg(m.value ORDER BY m.timestamp DESC) FILTER (WHERE m.value IS NOT NULL))[1],
         sum(cosd(circular_angle(m.value, s.circular))) FILTER (WHERE s.circular IS NOT NULL),
         sum(sind(circular_angle(m.value, s.circular))) FILTER (WHERE s.circular IS NOT NULL)
  FROM measurements m JOIN series s ON s.series_id = m.series_id
  WHERE m.timestamp >= (SELECT lower(rollup_pending(0))) AND m.timestamp < (SELECT upper(rollup_pending(0)))
    AND m.timestamp <@ (SELECT rollup_pending(0))
    AND m.timestamp >= date_bin('1 day', now() - INTERVAL '168 hours', '2000-01-01 00:00+00')
  GROUP BY 1, 2;
CREATE VIEW rollup_live_1h AS
  SELECT series_id, bucket, records, n, sum, min, max, last, cos_sum, sin_sum FROM rollup_1h
  WHERE NOT bucket <@ (SELECT rollup_pending(1))
  UNION ALL
  SELECT series_id, date_bin('1 hour', bucket, '2000-01-01 00:00+00'), sum(records)::bigint, sum(n)::bigint, sum(sum), min(min), max(max),
         (array_agg(last ORDER BY bucket DESC) FILTER (WHERE last IS NOT NULL))[1], sum(cos_sum), sum(sin_sum)
  FROM rollup_live_1m
  WHERE bucket >= (SELECT lower(rollup_pending(1))) AND bucket < (SELECT upper(rollup_pending(1))) AND bucket <@ (SELECT rollup_pending(1))
  GROUP BY 1, 2;
CREATE VIEW rollup_live_1d AS
  SELECT series_id, bucket, records, n, sum, min, max, last, cos_sum, sin_sum FROM rollup_1d
  WHERE NOT bucket <@ (SELECT rollup_pending(2))
  UNION ALL
  SELECT series_id, date_bin('1 day', bucket, '2000-01-01 00:00+00'), sum(records)::bigint, sum(n)::bigint, sum(sum), min(min), max(max),
         (array_agg(last ORDER BY bucket DESC) FILTER (WHERE last IS NOT NULL))[1], sum(cos_sum), sum(sin_sum)
  FROM rollup_live_1h
  WHERE bucket >= (SELECT lower(rollup_pending(2))) AND bucket < (SELECT upper(rollup_pending(2))) AND bucket <@ (SELECT rollup_pending(2))
  GROUP BY 1, 2;

-- Rows from before a series was circular have a sum and extremes: hidden, as they say nothing.
CREATE VIEW measurement_1m AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_live_1m r LEFT JOIN series s USING (series_id);
CREATE VIEW measurement_1h AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_live_1h r LEFT JOIN series s USING (series_id);
CREATE VIEW measurement_1d AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_live_1d r LEFT JOIN series s USING (series_id);

CREATE VIEW circular_1m AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, s.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, s.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM rollup_live_1m r JOIN series s USING (series_id) WHERE s.circular IS NOT NULL AND r.cos_sum IS NOT NULL;
CREATE VIEW circular_1h AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, s.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, s.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM rollup_live_1h r JOIN series s USING (series_id) WHERE s.circular IS NOT NULL AND r.cos_sum IS NOT NULL;
CREATE VIEW circular_1d AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, s.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, s.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM rollup_live_1d r JOIN series s USING (series_id) WHERE s.circular IS NOT NULL AND r.cos_sum IS NOT NULL;
COMMENT ON VIEW circular_1h IS 'Directions of each hour: mean and spread of the unit vectors, and their sums, by which hours are added up.';

CREATE VIEW recent_activity AS
  SELECT r.bucket AS minute, s.device_id, sum(r.records)::bigint AS records
  FROM measurement_1m r JOIN series s USING (series_id)
  WHERE r.bucket > now() - INTERVAL '1 hour' AND r.bucket <= now() + INTERVAL '5 minutes'
  GROUP BY 1, 2;

-- One level's buckets that begin in [from_at, to_at), of all series; or those of some series: of each the hour (of the highest level the day) that
-- begins at its element of `ats`. Buckets without rows stay as they are: what is kept longer than its rows is not to be made anew.
CREATE FUNCTION make_rollup(of_level integer, from_at timestamptz, to_at timestamptz, ids integer[], ats timestamptz[]) RETURNS void
LANGUAGE plpgsql SET jit = off AS $$
BEGIN
  -- Series by series through the primary key, and the bounds once more, so that whole partitions and chunks are left out when this is planned.
  EXECUTE format('
    INSERT INTO %I AS r (series_id, bucket, records, n, sum, min, max, last, cos_sum, sin_sum)
    SELECT b.* FROM (%s) AS k CROSS JOIN LATERAL (
      SELECT m.series_id, date_bin($1, m.bucket, ''2000-01-01 00:00+00'') AS bucket, sum(m.records), sum(m.n), sum(m.sum), min(m.min), max(m.max),
             (array_agg(m.last ORDER BY m.bucket DESC) FILTER (WHERE m.last IS NOT NULL))[1], sum(m.cos_sum), sum(m.sin_sum)
      FROM %s AS m
      WHERE m.series_id = k.series_id AND m.bucket >= k.begins AND m.bucket < k.ends AND m.bucket >= $2 AND m.bucket < $3 GROUP BY 1, 2 OFFSET 0) b
    ON CONFLICT (series_id, bucket) DO UPDATE
      SET records = excluded.records, n = excluded.n, sum = excluded.sum, min = excluded.min, max = excluded.max, last = excluded.last,
          cos_sum = excluded.cos_sum, sin_sum = excluded.sin_sum
      WHERE (r.records, r.n, r.sum, r.min, r.max, r.last, r.cos_sum, r.sin_sum)
        IS DISTINCT FROM (excluded.records, excluded.n, excluded.sum, excluded.min, excluded.max, excluded.last, excluded.cos_sum, excluded.sin_sum)',
    (ARRAY['rollup_1m', 'rollup_1h', 'rollup_1d'])[of_level + 1],
    CASE WHEN ids IS NULL
      THEN 'SELECT s.series_id, s.circular, $2 AS begins, $3 AS ends FROM latest l JOIN series s USING (series_id) WHERE l.timestamp >= $2'
      ELSE 'SELECT s.series_id, s.circular, u.at AS begins, u.at + $6 AS ends
            FROM unnest($4::integer[], $5::timestamptz[]) AS u(series_id, at) JOIN series s USING (series_id)' END,
    (ARRAY['(SELECT series_id, timestamp AS bucket, 1 AS records, (value IS NOT NULL)::int AS n, line AS sum, line AS min, line AS max, value AS last,
                    CASE WHEN k.circular IS NOT NULL THEN cosd(circular_angle(value, k.circular)) END AS cos_sum,
                    CASE WHEN k.circular IS NOT NULL THEN sind(circular_angle(value, k.circular)) END AS sin_sum
             FROM measurements CROSS JOIN LATERAL (SELECT CASE WHEN k.circular IS NULL THEN value END) AS x(line))',
           'rollup_1m', 'rollup_1h'])[of_level + 1])
  USING (ARRAY[INTERVAL '1 minute', INTERVAL '1 hour', INTERVAL '24 hours'])[of_level + 1], from_at, to_at, ids, ats,
        (ARRAY[INTERVAL '1 hour', INTERVAL '1 hour', INTERVAL '24 hours'])[of_level + 1];
END $$;

-- Ranges of one level that are over, the newest first, at most `width_max` of them; the level above is marked. Returns whether there was anything.
CREATE FUNCTION refresh_ranges(of_level integer, shown boolean, width_max interval) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  width CONSTANT interval := (ARRAY[INTERVAL '1 minute', INTERVAL '1 hour', INTERVAL '24 hours'])[of_level + 1];
  above CONSTANT interval := (ARRAY[INTERVAL '1 hour', INTERVAL '24 hours', NULL])[of_level + 1];
  -- What is not over changes with every write: until then the views make it of the level below.
  ended CONSTANT timestamptz := date_bin(width, now() - (ARRAY[INTERVAL '30 seconds', INTERVAL '5 minutes', INTERVAL '10 minutes'])[of_level + 1],
                                        '2000-01-01 00:00+00');
  dirty tstzmultirange;
  piece tstzmultirange;
  r tstzrange;
BEGIN
  IF NOT EXISTS (SELECT FROM rollup_dirty WHERE series IS NULL AND level = of_level AND visible = shown AND from_at < ended) THEN
    RETURN false;
  END IF;
  WITH gone AS (
    DELETE FROM rollup_dirty WHERE series IS NULL AND level = of_level AND visible = shown RETURNING from_at, to_at)
  SELECT range_agg(tstzrange(date_bin(width, from_at, '2000-01-01 00:00+00'),
                             date_bin(width, to_at - INTERVAL '1 microsecond', '2000-01-01 00:00+00') + width)) INTO dirty FROM gone;
  piece := dirty * tstzmultirange(tstzrange('-infinity', ended));
  piece := piece * tstzmultirange(tstzrange(date_bin(width_max, upper(piece) - INTERVAL '1 microsecond', '2000-01-01 00:00+00'), upper(piece)));
  INSERT INTO rollup_dirty (from_at, to_at, level, visible) SELECT lower(u), upper(u), of_level, shown FROM unnest(dirty - piece) AS u;
  FOR r IN SELECT unnest(piece) LOOP
    PERFORM make_rollup(of_level, lower(r), upper(r), NULL, NULL);
  END LOOP;
  IF above IS NOT NULL THEN
    INSERT INTO rollup_dirty (from_at, to_at, level, visible)
    SELECT DISTINCT at, at + above, of_level + 1, shown
    FROM unnest(piece) AS u, generate_series(date_bin(above, lower(u), '2000-01-01 00:00+00'), upper(u) - INTERVAL '1 microsecond', above) AS at
    WHERE NOT EXISTS (SELECT FROM rollup_dirty d WHERE d.series IS NULL AND d.level = of_level + 1 AND d.visible = shown
                      AND d.from_at <= at AND d.to_at >= at + above);
  END IF;
  RETURN true;
END $$;

-- Hours of single series, the newest first, at most `pairs_max` of them and a week. Returns whether there was anything.
CREATE FUNCTION refresh_late(pairs_max integer) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  epoch CONSTANT timestamptz := '2000-01-01 00:00+00';
  of_today CONSTANT integer := extract(epoch FROM date_bin('1 day', now() - INTERVAL '1 hour', epoch) - epoch) / 3600;
  ids integer[];
  hs integer[];
  ats timestamptz[];
  n integer;
  taken integer;
  shown integer;
BEGIN
  -- Those of one time together: many writes mark the same hours, each of which is made once.
  WITH gone AS (
    DELETE FROM rollup_dirty WHERE ctid = ANY (ARRAY(
      SELECT ctid FROM rollup_dirty WHERE series IS NOT NULL ORDER BY to_at DESC LIMIT 200)) RETURNING series, hours),
  pairs AS (SELECT DISTINCT s, h FROM gone CROSS JOIN LATERAL unnest(series, hours) AS u(s, h))
  SELECT array_agg(s ORDER BY h DESC, s), array_agg(h ORDER BY h DESC, s), count(*) INTO ids, hs, n FROM pairs;
  IF n = 0 THEN
    RETURN false;
  END IF;
  SELECT count(*) INTO taken FROM unnest(hs[1:pairs_max]) AS h WHERE h > hs[1] - 168;
  SELECT count(*) INTO shown FROM unnest(hs) AS h WHERE h >= of_today;
  INSERT INTO rollup_dirty (from_at, to_at, series, hours, visible)
  SELECT epoch + hs[last] * INTERVAL '1 hour', epoch + (hs[i] + 1) * INTERVAL '1 hour', ids[i:last], hs[i:last], hs[i] >= of_today
  FROM (SELECT i, least(i + 999, shown) FROM generate_series(taken + 1, shown, 1000) AS i
        UNION ALL SELECT i, least(i + 999, n) FROM generate_series(greatest(taken, shown) + 1, n, 1000) AS i) AS l(i, last);
  ids := ids[1:taken];
  hs := hs[1:taken];
  SELECT array_agg(epoch + h * INTERVAL '1 hour' ORDER BY i) INTO ats FROM unnest(hs) WITH ORDINALITY AS u(h, i);
  PERFORM make_rollup(0, ats[taken], ats[1] + INTERVAL '1 hour', ids, ats);
  PERFORM make_rollup(1, ats[taken], ats[1] + INTERVAL '1 hour', ids, ats);
  SELECT array_agg(s), array_agg(d) INTO ids, ats
  FROM (SELECT DISTINCT s, date_bin('1 day', at, epoch) AS d FROM unnest(ids, ats) AS u(s, at)) AS x;
  PERFORM make_rollup(2, (SELECT min(d) FROM unnest(ats) AS d), (SELECT max(d) FROM unnest(ats) AS d) + INTERVAL '24 hours', ids, ats);
  RETURN true;
END $$;

-- One bounded piece of what is marked, the newest first, what nobody sees meanwhile last. Returns whether there was anything that is over; NULL where
-- another worker is at it. To be called in transactions of its own until it says false.
CREATE FUNCTION refresh_rollups(pairs_max integer, width_max interval) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  IF NOT pg_try_advisory_xact_lock(7236481302) THEN
    RETURN NULL;
  END IF;
  IF storage_engine() = 'timescaledb' THEN
    -- An old hour may touch more compressed buckets than the limit that guards against accidents.
    PERFORM set_config('timescaledb.max_tuples_decompressed_per_dml_transaction', '0', true);
  END IF;
  IF refresh_ranges(0, true, width_max) THEN RETURN true; END IF;
  IF refresh_late(pairs_max) THEN RETURN true; END IF;
  IF refresh_ranges(1, true, INTERVAL '1 hour') THEN RETURN true; END IF;
  IF refresh_ranges(2, true, INTERVAL '24 hours') THEN RETURN true; END IF;
  IF refresh_ranges(0, false, width_max) THEN RETURN true; END IF;
  IF refresh_ranges(1, false, INTERVAL '1 hour') THEN RETURN true; END IF;
  RETURN refresh_ranges(2, false, INTERVAL '24 hours');
END $$;

-- As in 0002a and 0002b, one caller at a time (NULL where another is at it), and what is merged is marked: it was in no roll-up until now. Rows from before
-- `keep_from` go without: of what retention has dropped, a single row would stand for its whole day.
DROP FUNCTION merge_late(interval, integer);
CREATE FUNCTION merge_late(chunk interval, rows_max integer, keep_from timestamptz DEFAULT '-infinity') RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  oldest timestamptz;
  moved bigint;
BEGIN
  IF NOT pg_try_advisory_xact_lock(7236481302) THEN
    RETURN NULL;
  END IF;
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
    FROM batch WHERE timestamp >= keep_from ORDER BY series_id, timestamp ON CONFLICT DO NOTHING RETURNING series_id, timestamp),
  pairs AS (
    SELECT s, at, (row_number() OVER (ORDER BY at, s) - 1) / 1000 AS slice
    FROM (SELECT DISTINCT series_id AS s, date_bin('1 hour', timestamp, '2000-01-01 00:00+00') AS at FROM merged) AS x),
  marked AS (
    INSERT INTO rollup_dirty (from_at, to_at, series, hours, visible)
    SELECT min(at), max(at) + INTERVAL '1 hour', array_agg(s ORDER BY at, s),
           array_agg((extract(epoch FROM at - '2000-01-01 00:00+00'::timestamptz) / 3600)::integer ORDER BY at, s),
           max(at) >= date_bin('1 day', now() - INTERVAL '1 hour', '2000-01-01 00:00+00')
    FROM pairs GROUP BY slice)
  SELECT count(*) INTO moved FROM batch;
  RETURN moved;
END $$;

-- What became of something that upkeep does.
CREATE FUNCTION storage_ran(what text, fault text) RETURNS void LANGUAGE sql AS $$
  INSERT INTO storage_runs AS s (job, last_run_at, succeeded, total_failures, message)
  VALUES (what, now(), fault IS NULL, (fault IS NOT NULL)::int, fault)
  ON CONFLICT (job) DO UPDATE
    SET last_run_at = excluded.last_run_at, succeeded = excluded.succeeded, message = excluded.message,
        total_failures = s.total_failures + excluded.total_failures $$;
