-- Circular quantities (docs/DATATYPES.md): of a direction neither a sum nor a least nor a greatest value says anything, and the mean is that of
-- unit vectors. A series says its period; the sink writes it, since validated messages say it. Windows have theirs in each row.

ALTER TABLE series ADD COLUMN circular double precision CHECK (circular BETWEEN 1e-100 AND 1e100);
COMMENT ON COLUMN series.circular IS 'Period of a circular quantity, in the unit of its rows; NULL: none.';

ALTER TABLE aggregates
  ALTER COLUMN min DROP NOT NULL, ALTER COLUMN max DROP NOT NULL, ALTER COLUMN mean DROP NOT NULL, ALTER COLUMN sum DROP NOT NULL,
  ADD COLUMN circular double precision, ADD COLUMN spread double precision,
  ADD COLUMN cos_sum double precision, ADD COLUMN sin_sum double precision;
COMMENT ON COLUMN aggregates.circular IS 'Period of a circular quantity; then there are no min, max and sum.';
COMMENT ON COLUMN aggregates.mean IS 'Of a circular quantity the direction of the sum of unit vectors; NULL where they point all ways alike.';
COMMENT ON COLUMN aggregates.spread IS 'Circular standard deviation, of a circular quantity.';
COMMENT ON COLUMN aggregates.cos_sum IS 'With sin_sum the sum of unit vectors, of a circular quantity: windows are added up by them.';
COMMENT ON COLUMN aggregates.consumption IS 'Of a counter: the sum of its readings of consumption in the window.';

-- As in preservarium/domain/circular.py. The functions of degrees are exact at whole quarters, so opposite directions cancel out. PostgreSQL refuses
-- a product that is too large or too small, and one such value would stop the roll-ups of all: garbage has no direction, and next to nothing is 0.
CREATE FUNCTION circular_angle(value double precision, period double precision) RETURNS double precision LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN abs(value) < 1e-100 THEN 0 WHEN abs(value) <= 1e100 THEN value * (360 / period) END $$;

CREATE FUNCTION circular_mean(cos_sum double precision, sin_sum double precision, n double precision, period double precision)
RETURNS double precision LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN n > 0 AND (point(cos_sum, sin_sum) <-> point(0, 0)) >= 1e-9 * n
         -- A negative number that is almost 0 would be rounded up to the period.
         THEN CASE WHEN angle >= 0 THEN angle WHEN angle + period < period THEN angle + period ELSE 0 END END
  FROM (SELECT atan2d(sin_sum, cos_sum) * (period / 360)) AS a(angle) $$;

CREATE FUNCTION circular_spread(cos_sum double precision, sin_sum double precision, n double precision, period double precision)
RETURNS double precision LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN n > 0 AND length >= 1e-9 THEN sqrt(2 * ln(1 / least(length, 1))) * period / (2 * pi()) END
  FROM (SELECT (point(cos_sum, sin_sum) <-> point(0, 0)) / NULLIF(n, 0)) AS l(length) $$;
