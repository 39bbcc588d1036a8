-- requires: plain
-- Roll-ups of circular series: the sums of their unit vectors instead of sum, least and greatest value.

ALTER TABLE rollup_1m ADD COLUMN cos_sum double precision, ADD COLUMN sin_sum double precision;
ALTER TABLE rollup_1h ADD COLUMN cos_sum double precision, ADD COLUMN sin_sum double precision;
ALTER TABLE rollup_1d ADD COLUMN cos_sum double precision, ADD COLUMN sin_sum double precision;

-- Rows from before a series was circular have a sum and extremes: hidden, as they say nothing.
CREATE OR REPLACE VIEW measurement_1m AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_1m r LEFT JOIN series s USING (series_id);
CREATE OR REPLACE VIEW measurement_1h AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_1h r LEFT JOIN series s USING (series_id);
CREATE OR REPLACE VIEW measurement_1d AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_1d r LEFT JOIN series s USING (series_id);

CREATE VIEW circular_1m AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, s.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, s.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM rollup_1m r JOIN series s USING (series_id) WHERE s.circular IS NOT NULL AND r.cos_sum IS NOT NULL;
CREATE VIEW circular_1h AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, s.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, s.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM rollup_1h r JOIN series s USING (series_id) WHERE s.circular IS NOT NULL AND r.cos_sum IS NOT NULL;
CREATE VIEW circular_1d AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, s.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, s.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM rollup_1d r JOIN series s USING (series_id) WHERE s.circular IS NOT NULL AND r.cos_sum IS NOT NULL;
COMMENT ON VIEW circular_1h IS 'Directions of each hour: mean and spread of the unit vectors, and their sums, by which hours are added up.';

-- As in 0002b, with the sums of unit vectors. `l` is the series, for a source that asks its period.
CREATE OR REPLACE FUNCTION refresh_rollup(target text, source text, width interval, from_at timestamptz, to_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  from_at := date_bin(width, from_at, '2000-01-01 00:00+00');
  to_at := date_bin(width, to_at - INTERVAL '1 microsecond', '2000-01-01 00:00+00') + width;
  -- Series by series through the primary key: there is no index by time alone, and a scan would grow with the day.
  EXECUTE format('
    INSERT INTO %I AS r (series_id, bucket, records, n, sum, min, max, last, cos_sum, sin_sum)
    SELECT b.* FROM (SELECT series_id, timestamp, circular FROM latest JOIN series USING (series_id)) l CROSS JOIN LATERAL (
      SELECT m.series_id, date_bin($1, m.bucket, ''2000-01-01 00:00+00'') AS bucket, sum(m.records), sum(m.n), sum(m.sum), min(m.min), max(m.max),
             (array_agg(m.last ORDER BY m.bucket DESC) FILTER (WHERE m.last IS NOT NULL))[1], sum(m.cos_sum), sum(m.sin_sum)
      FROM %s AS m WHERE m.series_id = l.series_id AND m.bucket >= $2 AND m.bucket < $3 GROUP BY 1, 2 OFFSET 0) b
    WHERE l.timestamp >= $2
    ON CONFLICT (series_id, bucket) DO UPDATE
      SET records = excluded.records, n = excluded.n, sum = excluded.sum, min = excluded.min, max = excluded.max, last = excluded.last,
          cos_sum = excluded.cos_sum, sin_sum = excluded.sin_sum
      WHERE (r.records, r.n, r.sum, r.min, r.max, r.last, r.cos_sum, r.sin_sum)
        IS DISTINCT FROM (excluded.records, excluded.n, excluded.sum, excluded.min, excluded.max, excluded.last, excluded.cos_sum, excluded.sin_sum)',
    target, source) USING width, from_at, to_at;
END $$;

CREATE OR REPLACE FUNCTION refresh_rollups() RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  raw CONSTANT text := '(SELECT series_id, timestamp AS bucket, 1 AS records, (value IS NOT NULL)::int AS n, line AS sum, line AS min, line AS max, value AS last,
                                cosd(circular_angle(value, l.circular)) AS cos_sum, sind(circular_angle(value, l.circular)) AS sin_sum
                         FROM measurements CROSS JOIN LATERAL (SELECT CASE WHEN l.circular IS NULL THEN value END) AS x(line))';
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
