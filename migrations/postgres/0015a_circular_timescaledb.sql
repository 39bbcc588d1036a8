-- requires: timescaledb
-- Roll-ups of circular series. A continuous aggregate cannot be altered, and what it holds is older than the rows that it was made of: so
-- the three stay as they are under other names, and views hide what says nothing. The sums of unit vectors are one more, of an hour: minutes
-- are read from the rows, days from the hours, since each aggregate costs a background job.

ALTER MATERIALIZED VIEW measurement_1m RENAME TO rollup_1m;
ALTER MATERIALIZED VIEW measurement_1h RENAME TO rollup_1h;
ALTER MATERIALIZED VIEW measurement_1d RENAME TO rollup_1d;

CREATE VIEW measurement_1m AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_1m r LEFT JOIN series s USING (series_id);
CREATE VIEW measurement_1h AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_1h r LEFT JOIN series s USING (series_id);
CREATE VIEW measurement_1d AS
  SELECT r.series_id, r.bucket, r.records, r.n, CASE WHEN s.circular IS NULL THEN r.sum END AS sum,
         CASE WHEN s.circular IS NULL THEN r.min END AS min, CASE WHEN s.circular IS NULL THEN r.max END AS max, r.last
  FROM rollup_1d r LEFT JOIN series s USING (series_id);

CREATE MATERIALIZED VIEW rollup_circular_1h WITH (timescaledb.continuous, timescaledb.materialized_only = false) AS
  SELECT m.series_id, time_bucket(INTERVAL '1 hour', m.timestamp) AS bucket, count(m.value) AS n,
         sum(cosd(circular_angle(m.value, s.circular))) AS cos_sum, sum(sind(circular_angle(m.value, s.circular))) AS sin_sum,
         last(m.value, m.timestamp) AS last
  FROM measurements m JOIN series s ON s.series_id = m.series_id
  WHERE s.circular IS NOT NULL GROUP BY 1, 2 WITH NO DATA;
SELECT add_continuous_aggregate_policy('rollup_circular_1h', start_offset => INTERVAL '3 days', end_offset => INTERVAL '1 hour', schedule_interval => INTERVAL '15 minutes');

CREATE VIEW circular_1m AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, r.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, r.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM (SELECT m.series_id, time_bucket(INTERVAL '1 minute', m.timestamp) AS bucket, s.circular, count(m.value) AS n,
               sum(cosd(circular_angle(m.value, s.circular))) AS cos_sum, sum(sind(circular_angle(m.value, s.circular))) AS sin_sum,
               last(m.value, m.timestamp) AS last
        FROM measurements m JOIN series s USING (series_id) WHERE s.circular IS NOT NULL GROUP BY 1, 2, 3) r;
CREATE VIEW circular_1h AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, s.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, s.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM rollup_circular_1h r JOIN series s USING (series_id) WHERE s.circular IS NOT NULL;
CREATE VIEW circular_1d AS
  SELECT r.series_id, r.bucket, r.n, circular_mean(r.cos_sum, r.sin_sum, r.n, r.circular) AS mean,
         circular_spread(r.cos_sum, r.sin_sum, r.n, r.circular) AS spread, r.cos_sum, r.sin_sum, r.last
  FROM (SELECT h.series_id, time_bucket(INTERVAL '1 day', h.bucket) AS bucket, s.circular, sum(h.n)::bigint AS n,
               sum(h.cos_sum) AS cos_sum, sum(h.sin_sum) AS sin_sum, last(h.last, h.bucket) AS last
        FROM rollup_circular_1h h JOIN series s USING (series_id) WHERE s.circular IS NOT NULL GROUP BY 1, 2, 3) r;
COMMENT ON VIEW circular_1h IS 'Directions of each hour: mean and spread of the unit vectors, and their sums, by which hours are added up.';
