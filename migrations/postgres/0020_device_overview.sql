-- Devices as people look for them: a narrow row each, with what the registry says and how their series are, to be searched and put in order.
-- Nothing depends on it: it can be made again at any time from `devices`, `series` and `latest`, so it is not logged, and a crash of the server empties it.
-- It is brought up to date only while somebody looks at a list of devices.

CREATE UNLOGGED TABLE device_overview (
  device_id text PRIMARY KEY,
  rev       bigint NOT NULL,
  name      text,
  type      text NOT NULL,
  enabled   boolean NOT NULL,
  words     text NOT NULL,
  series    integer NOT NULL DEFAULT 0,
  last_seen timestamptz,
  quality   smallint) WITH (fillfactor = 60);
COMMENT ON TABLE device_overview IS 'What lists of devices are searched and ordered by: as old as device_overview_state says.';
COMMENT ON COLUMN device_overview.words IS 'Address, name and type in lower case.';
COMMENT ON COLUMN device_overview.last_seen IS 'When the last reading was received; NULL: never.';
COMMENT ON COLUMN device_overview.quality IS 'The worst of the last values: fail (4), suspect (3), missing (9), not evaluated (2), good (1).';
-- last_seen has none, so that what changes with every reading is changed in place.
CREATE INDEX device_overview_rev ON device_overview (rev);

-- A device is named by any spelling of its address, on every page and in every command: stores/registry.py, SPELLED.
CREATE INDEX devices_spelled ON devices (lower(translate(device_id, '-:. ', '')));

CREATE UNLOGGED TABLE device_overview_state (
  one          boolean PRIMARY KEY DEFAULT true CHECK (one),
  refreshed_at timestamptz NOT NULL,
  took         interval NOT NULL);

-- What the registry has changed since: few rows, found by their revision. Returns false where another is at it.
CREATE FUNCTION device_overview_registry() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  IF NOT pg_try_advisory_xact_lock(7236481303) THEN
    RETURN false;
  END IF;
  INSERT INTO device_overview AS o (device_id, rev, name, type, enabled, words)
  SELECT device_id, rev, name, type, enabled, lower(concat_ws(E'\n', device_id, name, type)) FROM devices
  WHERE rev > coalesce((SELECT max(rev) FROM device_overview), 0)
  ON CONFLICT (device_id) DO UPDATE
    SET rev = excluded.rev, name = excluded.name, type = excluded.type, enabled = excluded.enabled, words = excluded.words;
  RETURN true;
END $$;

-- Everything: also what was removed, what was committed behind a later revision, and how the series are. Returns false where another is at it.
CREATE FUNCTION device_overview_refresh() RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  began_at CONSTANT timestamptz := clock_timestamp();
BEGIN
  IF NOT pg_try_advisory_xact_lock(7236481303) THEN
    RETURN false;
  END IF;
  DELETE FROM device_overview o WHERE NOT EXISTS (SELECT FROM devices d WHERE d.device_id = o.device_id);
  INSERT INTO device_overview AS o (device_id, rev, name, type, enabled, words)
  SELECT d.device_id, d.rev, d.name, d.type, d.enabled, lower(concat_ws(E'\n', d.device_id, d.name, d.type))
  FROM devices d LEFT JOIN device_overview p USING (device_id) WHERE p.rev IS DISTINCT FROM d.rev
  ON CONFLICT (device_id) DO UPDATE
    SET rev = excluded.rev, name = excluded.name, type = excluded.type, enabled = excluded.enabled, words = excluded.words;
  UPDATE device_overview o SET series = n.series, last_seen = n.last_seen, quality = n.quality
  FROM (SELECT s.device_id, count(*)::int AS series, max(l.received_at) AS last_seen,
               CASE WHEN bool_or(l.quality = 4) THEN 4 WHEN bool_or(l.quality = 3) THEN 3 WHEN bool_or(l.quality = 9) THEN 9
                    WHEN bool_or(l.quality = 2) THEN 2 ELSE 1 END::smallint AS quality
        FROM latest l JOIN series s USING (series_id) GROUP BY s.device_id) n
  WHERE n.device_id = o.device_id AND (o.series, o.last_seen, o.quality) IS DISTINCT FROM (n.series, n.last_seen, n.quality);
  INSERT INTO device_overview_state AS s (refreshed_at, took) VALUES (began_at, clock_timestamp() - began_at)
  ON CONFLICT (one) DO UPDATE SET refreshed_at = excluded.refreshed_at, took = excluded.took;
  RETURN true;
END $$;
