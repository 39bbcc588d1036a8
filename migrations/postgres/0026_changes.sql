-- Changes of what is stored: what a shadow replay derived otherwise, and what people corrected. A change is a list of rows, each as it stood and as it is to
-- be; it is carried out slot by slot, a transaction each, and taken back the same way. docs/decisions/0013-changes.md says why.

CREATE TABLE changes (
  change_id  integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  kind       text NOT NULL CHECK (kind IN ('replay', 'correction')),
  state      text NOT NULL CHECK (state IN ('deriving', 'ready', 'promoting', 'promoted', 'rolling_back', 'rolled_back', 'discarded')),
  generation integer NOT NULL UNIQUE CHECK (generation > 0),
  attempt    integer NOT NULL DEFAULT 0,
  plan       jsonb NOT NULL,
  summary    jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(),
  created_by text NOT NULL,
  updated_at timestamptz NOT NULL DEFAULT now());
COMMENT ON COLUMN changes.generation IS 'Of the rows that it makes: live rows and verdicts that come later do not overwrite them.';
COMMENT ON COLUMN changes.attempt IS 'How often it was begun to be promoted: names the inserts into ClickHouse.';

-- A row of `measurements` without its key. A type of its own, so that columns may be added to the table.
CREATE TYPE change_row AS (
  received_at timestamptz, raw_offset bigint, value double precision, derivation_id integer, raw_index integer, generation integer,
  raw_partition smallint, quality smallint, value_text text, flags text[], unit text, topic text, ingested_at timestamptz, revised boolean);

CREATE TABLE change_rows (
  change_id      integer NOT NULL REFERENCES changes ON DELETE CASCADE,
  series_id      integer NOT NULL,
  timestamp      timestamptz NOT NULL,
  before         change_row,
  after          change_row,
  slot           integer NOT NULL DEFAULT 0,
  swapped        boolean,
  ch_ingested_at timestamptz,
  ch_circular    double precision,
  PRIMARY KEY (change_id, series_id, timestamp));
CREATE INDEX change_rows_by_slot ON change_rows (change_id, slot);
COMMENT ON COLUMN change_rows.before IS 'What stood; NULL: nothing, the row is added.';
COMMENT ON COLUMN change_rows.after IS 'What is to stand; NULL: nothing, the row is removed.';
COMMENT ON COLUMN change_rows.swapped IS 'NULL: not yet. false: something else stood there by then, and was left alone.';
COMMENT ON COLUMN change_rows.ch_ingested_at IS 'What only ClickHouse knows of the row that stood, so that it can be restored as it was.';

-- 0: to be done. 1: what ClickHouse holds was read. 2: swapped in PostgreSQL. 3: and in ClickHouse. 4: back in PostgreSQL. 5: and in ClickHouse.
CREATE TABLE change_slots (
  change_id integer NOT NULL REFERENCES changes ON DELETE CASCADE,
  slot      integer NOT NULL,
  step      smallint NOT NULL DEFAULT 0,
  PRIMARY KEY (change_id, slot));

-- Windows that hold what was changed: made anew of the rows, at once where they are over, and once more when no correction of the aggregate stage can come.
CREATE TABLE change_windows (
  change_id      integer NOT NULL REFERENCES changes ON DELETE CASCADE,
  device_id      text NOT NULL,
  connector_mode text NOT NULL,
  component_type text NOT NULL,
  pin_position   text NOT NULL,
  unit           text NOT NULL,
  size_s         integer NOT NULL,
  hop_s          integer NOT NULL,
  window_start   timestamptz NOT NULL,
  due_at         timestamptz NOT NULL,
  step           smallint NOT NULL DEFAULT 0,
  settled        boolean NOT NULL DEFAULT false,
  PRIMARY KEY (change_id, device_id, component_type, pin_position, connector_mode, unit, size_s, hop_s, window_start));
CREATE INDEX change_windows_due ON change_windows (due_at) WHERE NOT settled;
COMMENT ON COLUMN change_windows.step IS '0: to be looked at. 1: PostgreSQL has it. 2: and ClickHouse.';

-- What the aggregate stage tells of a window that a change has touched does not know of the change (and is of a lower revision: 1,000,000 and more are those
-- made of the rows). So the window is made once more, when the reading that it tells of is stored as well.
CREATE INDEX change_windows_by_window ON change_windows (device_id, component_type, window_start);
CREATE FUNCTION change_window_again() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  UPDATE change_windows w SET settled = false, due_at = now() + INTERVAL '2 minutes'
  WHERE w.device_id = NEW.device_id AND w.component_type = NEW.component_type AND w.window_start = NEW.window_start AND w.pin_position = NEW.pin_position
    AND w.connector_mode = NEW.connector_mode AND w.unit = NEW.unit AND w.size_s = NEW.size_s AND w.hop_s = NEW.hop_s;
  RETURN NEW;
END $$;
CREATE TRIGGER change_window_again BEFORE INSERT ON aggregates FOR EACH ROW WHEN (NEW.revision < 1000000) EXECUTE FUNCTION change_window_again();

-- As they stood before a change first touched them. (As `aggregates`, `alarm_events` and `alarms` are: a test holds their columns together.)
CREATE TABLE change_window_rows (change_id integer NOT NULL REFERENCES changes ON DELETE CASCADE, LIKE aggregates, PRIMARY KEY (change_id, window_id));
CREATE TABLE change_alarm_events (
  change_id integer NOT NULL REFERENCES changes ON DELETE CASCADE,
  op        text NOT NULL CHECK (op IN ('added', 'removed')),
  LIKE alarm_events,
  PRIMARY KEY (change_id, op, transition_id));
CREATE TABLE change_alarms (change_id integer NOT NULL REFERENCES changes ON DELETE CASCADE, LIKE alarms, PRIMARY KEY (change_id, alarm_id));

-- What a shadow replay derives: the candidate's (side 0) and, of devices that differ, the standing configuration's (side 1). Made again at any time, so not logged.
CREATE UNLOGGED TABLE shadow_rows (
  change_id      integer NOT NULL,
  side           smallint NOT NULL,
  device_id      text NOT NULL,
  connector_mode text NOT NULL,
  component_type text NOT NULL,
  pin_position   text NOT NULL,
  unit           text NOT NULL,
  at             bigint NOT NULL,
  value          double precision,
  value_text     text,
  flags          text[],
  quality        smallint NOT NULL,
  revised        boolean NOT NULL,
  topic          text NOT NULL,
  parser         text NOT NULL,
  config_rev     bigint NOT NULL,
  experiment_id  text NOT NULL,
  received_at    bigint NOT NULL,
  raw_partition  integer NOT NULL,
  raw_offset     bigint NOT NULL,
  raw_index      integer NOT NULL);
CREATE INDEX shadow_rows_by_key ON shadow_rows (change_id, side, device_id, component_type, pin_position, connector_mode, at);
COMMENT ON COLUMN shadow_rows.at IS 'The device''s time, as received_at in µs since the epoch, UTC.';
CREATE UNLOGGED TABLE shadow_alarms (
  change_id     integer NOT NULL,
  side          smallint NOT NULL,
  device_id     text NOT NULL,
  transition_id text NOT NULL,
  line          jsonb NOT NULL,
  PRIMARY KEY (change_id, side, transition_id));

-- What is empty by a removal has no place in the lists of last values; a worker that knows the series needs its row there.
CREATE OR REPLACE VIEW latest_measurements AS
  SELECT l.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, l.value, s.unit, s.topic,
         l.value_text, l.quality, l.received_at, l.series_id
  FROM latest l JOIN series s USING (series_id) WHERE l.timestamp > '2000-01-01 00:00+00';

-- One slot of a change, there or back, in the caller's transaction. A row is swapped only where what stands is what is expected to stand; whatever came
-- meanwhile is left alone. Roll-ups are marked (buckets that are empty by it go at once, because upkeep leaves those without rows as they are), and
-- `latest` follows. The lock is that of the roll-ups' upkeep, so that no bucket is made of what was there before. Returns how many rows were swapped.
CREATE FUNCTION change_swap(change integer, of_slot integer, undo boolean) RETURNS bigint LANGUAGE plpgsql SET jit = off AS $$
DECLARE
  epoch CONSTANT timestamptz := '2000-01-01 00:00+00';
  lo timestamptz;
  hi timestamptz;
  n bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(7236481302);
  IF storage_engine() = 'timescaledb' THEN
    PERFORM set_config('timescaledb.max_tuples_decompressed_per_dml_transaction', '0', true);
  END IF;
  SELECT min(timestamp), max(timestamp) INTO lo, hi FROM change_rows WHERE change_id = change AND slot = of_slot;
  -- Writers hold these rows until their own are committed.
  PERFORM FROM latest WHERE series_id IN (SELECT series_id FROM change_rows WHERE change_id = change AND slot = of_slot) ORDER BY series_id FOR UPDATE;
  CREATE TEMP TABLE IF NOT EXISTS change_at_work (series_id integer, timestamp timestamptz, was change_row, wanted change_row, done boolean) ON COMMIT DELETE ROWS;
  DELETE FROM change_at_work;
  INSERT INTO change_at_work
    SELECT series_id, timestamp, CASE WHEN undo THEN after ELSE before END, CASE WHEN undo THEN before ELSE after END, false
    FROM change_rows WHERE change_id = change AND slot = of_slot AND CASE WHEN undo THEN swapped ELSE swapped IS NULL END;
  IF NOT undo THEN
    UPDATE change_at_work SET wanted.ingested_at = now() WHERE (wanted).received_at IS NOT NULL;
  END IF;
  ANALYZE change_at_work;
  WITH gone AS (
    DELETE FROM measurements m USING change_at_work w
    WHERE (w.wanted).received_at IS NULL AND m.series_id = w.series_id AND m.timestamp = w.timestamp AND m.timestamp BETWEEN lo AND hi
      AND change_same(ROW(m.received_at, m.raw_offset, m.value, m.derivation_id, m.raw_index, m.generation, m.raw_partition, m.quality,
                          m.value_text, m.flags, m.unit, m.topic, NULL, m.revised)::change_row, w.was)
    RETURNING m.series_id, m.timestamp)
  UPDATE change_at_work w SET done = true FROM gone g WHERE g.series_id = w.series_id AND g.timestamp = w.timestamp;
  WITH changed AS (
    UPDATE measurements m SET received_at = (w.wanted).received_at, raw_offset = (w.wanted).raw_offset, value = (w.wanted).value,
      derivation_id = (w.wanted).derivation_id, raw_index = (w.wanted).raw_index, generation = (w.wanted).generation, raw_partition = (w.wanted).raw_partition,
      quality = (w.wanted).quality, value_text = (w.wanted).value_text, flags = (w.wanted).flags, unit = (w.wanted).unit, topic = (w.wanted).topic,
      ingested_at = (w.wanted).ingested_at, revised = (w.wanted).revised
    FROM change_at_work w
    WHERE (w.wanted).received_at IS NOT NULL AND (w.was).received_at IS NOT NULL
      AND m.series_id = w.series_id AND m.timestamp = w.timestamp AND m.timestamp BETWEEN lo AND hi
      AND change_same(ROW(m.received_at, m.raw_offset, m.value, m.derivation_id, m.raw_index, m.generation, m.raw_partition, m.quality,
                          m.value_text, m.flags, m.unit, m.topic, NULL, m.revised)::change_row, w.was)
    RETURNING m.series_id, m.timestamp)
  UPDATE change_at_work w SET done = true FROM changed g WHERE g.series_id = w.series_id AND g.timestamp = w.timestamp;
  WITH added AS (
    INSERT INTO measurements (series_id, timestamp, received_at, raw_offset, value, derivation_id, raw_index, generation, raw_partition, quality,
                              value_text, flags, unit, topic, ingested_at, revised)
    SELECT series_id, timestamp, (wanted).* FROM change_at_work WHERE (wanted).received_at IS NOT NULL AND (was).received_at IS NULL
    ORDER BY series_id, timestamp ON CONFLICT (series_id, timestamp) DO NOTHING RETURNING series_id, timestamp)
  UPDATE change_at_work w SET done = true FROM added g WHERE g.series_id = w.series_id AND g.timestamp = w.timestamp;
  SELECT count(*) INTO n FROM change_at_work WHERE done;

  -- Buckets without rows.
  DELETE FROM rollup_1m r USING (SELECT DISTINCT series_id, date_bin('1 minute', timestamp, epoch) AS b FROM change_at_work WHERE done AND (wanted).received_at IS NULL) g
  WHERE r.series_id = g.series_id AND r.bucket = g.b
    AND NOT EXISTS (SELECT FROM measurements m WHERE m.series_id = g.series_id AND m.timestamp >= g.b AND m.timestamp < g.b + INTERVAL '1 minute');
  DELETE FROM rollup_1h r USING (SELECT DISTINCT series_id, date_bin('1 hour', timestamp, epoch) AS b FROM change_at_work WHERE done AND (wanted).received_at IS NULL) g
  WHERE r.series_id = g.series_id AND r.bucket = g.b
    AND NOT EXISTS (SELECT FROM measurements m WHERE m.series_id = g.series_id AND m.timestamp >= g.b AND m.timestamp < g.b + INTERVAL '1 hour');
  DELETE FROM rollup_1d r USING (SELECT DISTINCT series_id, date_bin('24 hours', timestamp, epoch) AS b FROM change_at_work WHERE done AND (wanted).received_at IS NULL) g
  WHERE r.series_id = g.series_id AND r.bucket = g.b
    AND NOT EXISTS (SELECT FROM measurements m WHERE m.series_id = g.series_id AND m.timestamp >= g.b AND m.timestamp < g.b + INTERVAL '24 hours');

  -- All others are made again: as every write marks them.
  WITH pairs AS (
    SELECT s, at, (row_number() OVER (ORDER BY at, s) - 1) / 1000 AS slice
    FROM (SELECT DISTINCT series_id AS s, date_bin('1 hour', timestamp, epoch) AS at FROM change_at_work WHERE done) AS x)
  INSERT INTO rollup_dirty (from_at, to_at, series, hours, visible)
  SELECT min(at), max(at) + INTERVAL '1 hour', array_agg(s ORDER BY at, s),
         array_agg((extract(epoch FROM at - epoch) / 3600)::integer ORDER BY at, s), max(at) >= date_bin('1 day', now() - INTERVAL '1 hour', epoch)
  FROM pairs GROUP BY slice;

  -- The newest of each series, where it may be another one now.
  WITH touched AS (
    SELECT w.series_id FROM change_at_work w LEFT JOIN latest l USING (series_id) WHERE w.done
    GROUP BY w.series_id, l.timestamp HAVING l.timestamp IS NULL OR max(w.timestamp) >= l.timestamp),
  newest AS (
    SELECT t.series_id, m.* FROM touched t LEFT JOIN LATERAL (
      SELECT timestamp, value, value_text, quality, received_at FROM measurements WHERE series_id = t.series_id ORDER BY timestamp DESC LIMIT 1) m ON true),
  emptied AS (DELETE FROM latest l USING newest e WHERE undo AND e.timestamp IS NULL AND l.series_id = e.series_id)
  INSERT INTO latest AS l (series_id, timestamp, value, value_text, quality, received_at)
  SELECT series_id, coalesce(timestamp, epoch), value, value_text, coalesce(quality, 9), coalesce(received_at, epoch) FROM newest
  WHERE timestamp IS NOT NULL OR NOT undo ORDER BY series_id
  ON CONFLICT (series_id) DO UPDATE SET timestamp = excluded.timestamp, value = excluded.value, value_text = excluded.value_text,
    quality = excluded.quality, received_at = excluded.received_at;

  IF undo THEN
    UPDATE change_rows c SET swapped = NULL FROM change_at_work w
    WHERE c.change_id = change AND c.series_id = w.series_id AND c.timestamp = w.timestamp AND w.done;
  ELSE
    UPDATE change_rows c SET swapped = w.done, after = CASE WHEN (w.wanted).received_at IS NULL THEN c.after ELSE w.wanted END FROM change_at_work w
    WHERE c.change_id = change AND c.series_id = w.series_id AND c.timestamp = w.timestamp;
  END IF;
  UPDATE change_slots SET step = CASE WHEN undo THEN 4 ELSE 2 END WHERE change_id = change AND slot = of_slot;
  RETURN n;
END $$;

-- Whether two rows are the same, but for when they were stored.
CREATE FUNCTION change_same(a change_row, b change_row) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
  SELECT (a.received_at, a.raw_partition, a.raw_offset, a.raw_index, a.derivation_id, a.generation, a.quality, a.revised IS TRUE)
       = (b.received_at, b.raw_partition, b.raw_offset, b.raw_index, b.derivation_id, b.generation, b.quality, b.revised IS TRUE)
     AND float8send(a.value) IS NOT DISTINCT FROM float8send(b.value) AND a.value_text IS NOT DISTINCT FROM b.value_text
     AND a.flags IS NOT DISTINCT FROM b.flags AND a.unit IS NOT DISTINCT FROM b.unit AND a.topic IS NOT DISTINCT FROM b.topic $$;
