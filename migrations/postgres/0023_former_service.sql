-- The table of the service that this replaces: taken over with its rows (`preservarium adopt`), and still written by its name. A row that cannot be
-- stored is kept as it came, with the reason, instead of failing the batch that it is a part of.

CREATE TABLE iot_measurements_refused (
  refused_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  source     text NOT NULL,
  code       text NOT NULL,
  message    text NOT NULL DEFAULT '',
  original   jsonb NOT NULL);
CREATE INDEX iot_measurements_refused_at ON iot_measurements_refused (refused_at);
COMMENT ON TABLE iot_measurements_refused IS
  'Rows of the old service that were not stored, as they came: inserted by SQL (source insert), or in its table (adopt). Kept for sink.retention_days.';
COMMENT ON COLUMN iot_measurements_refused.code IS 'A reason code, as in iot_errors.';

-- What functions must know of the settings: the upkeep of a worker brings it up to date.
CREATE TABLE storage_limits (
  one            boolean PRIMARY KEY DEFAULT true CHECK (one),
  retention_days integer NOT NULL);
INSERT INTO storage_limits (retention_days) VALUES ({{sink.retention_days}});

-- There is no raw record behind such a row: it came by SQL, or was in the old service's table.
INSERT INTO derivations (parser, config_rev) VALUES ('iot_measurements@1', 0);

-- Why a row of the old service is not stored; NULL: it can be.
CREATE FUNCTION iot_measurements_fault(
  at timestamptz, device text, mode text, component text, pin text, value double precision, unit text, topic text, keep_from timestamptz)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE
    WHEN at IS NULL OR at < '2000-01-01 00:00+00' OR at >= '2100-01-01 00:00+00' THEN 'timestamp_invalid'
    WHEN at < keep_from THEN 'late_beyond_retention'
    WHEN value IN ('NaN', 'Infinity', '-Infinity') THEN 'value_not_finite'
    WHEN coalesce(device, '') = '' OR char_length(device) > 255 OR char_length(mode) > 255 OR char_length(component) > 255
      OR char_length(pin) > 255 OR char_length(unit) > 255 OR char_length(topic) > 1024 THEN 'store_rejected'
  END $$;

-- INSERT and COPY into the old name. What stands stays: the same row again is none, another value at its instant is refused.
CREATE FUNCTION iot_measurements_insert() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
  epoch CONSTANT timestamptz := '2000-01-01 00:00+00';
  mode CONSTANT text := coalesce(NEW.connector_mode, 'unknown');
  component CONSTANT text := coalesce(NEW.component_type, 'unknown');
  pin CONSTANT text := coalesce(NEW.pin_position, '-1');
  fault text;
  told text := '';
  sid integer;
  known_unit text;
  known_topic text;
  derived integer;
  standing double precision;
  mark text;
BEGIN
  IF num_nonnulls(NEW.value_text, NEW.quality, NEW.flags, NEW.received_at, NEW.raw_partition, NEW.raw_offset, NEW.raw_index, NEW.parser,
                  NEW.config_rev, NEW.generation, NEW.experiment_id, NEW.series_id, NEW.ingested_at, NEW.revised) > 0 THEN
    RAISE EXCEPTION 'iot_measurements takes the eight columns of the old service: timestamp, device_id, connector_mode, component_type, pin_position, value, unit, topic'
      USING HINT = 'Readings with more than these come by Kafka, MQTT or HTTP.';
  END IF;
  fault := iot_measurements_fault(NEW.timestamp, NEW.device_id, mode, component, pin, NEW.value, NEW.unit, NEW.topic,
                                  now() - (SELECT make_interval(days => retention_days) FROM storage_limits));
  IF fault IS NULL AND NEW.timestamp > now() + INTERVAL '24 hours' THEN
    fault := 'timestamp_future';
  END IF;
  IF fault IS NULL THEN
    FOR attempt IN 1..2 LOOP
      -- The second look is for what another transaction made meanwhile.
      SELECT s.series_id, s.unit, s.topic INTO sid, known_unit, known_topic FROM series s
      WHERE s.device_id = NEW.device_id AND s.component_type = component AND s.pin_position = pin AND s.connector_mode = mode;
      EXIT WHEN sid IS NOT NULL;
      INSERT INTO series AS s (device_id, connector_mode, component_type, pin_position, unit, topic)
      VALUES (NEW.device_id, mode, component, pin, coalesce(NEW.unit, ''), coalesce(NEW.topic, ''))
      ON CONFLICT DO NOTHING RETURNING s.series_id, s.unit, s.topic INTO sid, known_unit, known_topic;
      EXIT WHEN sid IS NOT NULL;
    END LOOP;
    IF sid IS NULL THEN
      RAISE EXCEPTION 'the series of % is being made by another transaction', NEW.device_id USING ERRCODE = 'serialization_failure';
    END IF;
    SELECT derivation_id INTO derived FROM derivations WHERE parser = 'iot_measurements@1' AND config_rev = 0 AND experiment_id = '';
    -- In the order of the sink: first the row of `latest`, then the reading. Otherwise each of two could wait for the other.
    INSERT INTO latest (series_id, timestamp, quality, received_at) VALUES (sid, '-infinity', 2, clock_timestamp()) ON CONFLICT DO NOTHING;
    PERFORM FROM latest l WHERE l.series_id = sid FOR UPDATE;
    -- What waits for its chunk stands, too.
    SELECT l.value INTO standing FROM measurements_late l WHERE l.series_id = sid AND l.timestamp = NEW.timestamp;
    IF NOT FOUND THEN
      INSERT INTO measurements (series_id, timestamp, value, quality, received_at, raw_partition, raw_offset, raw_index, generation, derivation_id, unit, topic)
      VALUES (sid, NEW.timestamp, NEW.value, 2, clock_timestamp(), 0, 0, 0, 0, derived,
              NULLIF(coalesce(NEW.unit, ''), known_unit), NULLIF(coalesce(NEW.topic, ''), known_topic))
      ON CONFLICT (series_id, timestamp) DO NOTHING;
      IF FOUND THEN
        UPDATE latest l SET timestamp = NEW.timestamp, value = NEW.value, value_text = NULL, quality = 2, received_at = clock_timestamp()
        WHERE l.series_id = sid AND NEW.timestamp > l.timestamp;
        -- As the sink marks (docs/decisions, roll-ups). A transaction remembers the last of its marks: a batch is mostly of one minute.
        IF NEW.timestamp >= now() - INTERVAL '10 minutes' THEN
          mark := 'm' || date_bin('1 minute', NEW.timestamp, epoch);
          IF mark IS DISTINCT FROM current_setting('preservarium.marked', true) THEN
            INSERT INTO rollup_dirty (from_at, to_at)
            VALUES (date_bin('1 minute', NEW.timestamp, epoch), date_bin('1 minute', NEW.timestamp, epoch) + INTERVAL '1 minute');
          END IF;
        ELSE
          mark := sid || ' ' || date_bin('1 hour', NEW.timestamp, epoch);
          IF mark IS DISTINCT FROM current_setting('preservarium.marked', true) THEN
            INSERT INTO rollup_dirty (from_at, to_at, series, hours, visible)
            VALUES (date_bin('1 hour', NEW.timestamp, epoch), date_bin('1 hour', NEW.timestamp, epoch) + INTERVAL '1 hour', ARRAY[sid],
                    ARRAY[(extract(epoch FROM date_bin('1 hour', NEW.timestamp, epoch) - epoch) / 3600)::integer],
                    NEW.timestamp >= date_bin('1 day', now() - INTERVAL '1 hour', epoch));
          END IF;
        END IF;
        PERFORM set_config('preservarium.marked', mark, true);
        RETURN NEW;
      END IF;
      SELECT m.value INTO standing FROM measurements m WHERE m.series_id = sid AND m.timestamp = NEW.timestamp;
    END IF;
    DELETE FROM latest l WHERE l.series_id = sid AND l.timestamp = '-infinity';
    IF standing IS NOT DISTINCT FROM NEW.value THEN
      RETURN NULL;
    END IF;
    fault := 'same_instant';
    told := coalesce(standing::text, 'no number') || ' stands at this instant';
  END IF;
  INSERT INTO iot_measurements_refused (source, code, message, original) VALUES ('insert', fault, told, jsonb_strip_nulls(to_jsonb(NEW)));
  RAISE WARNING 'a row of % was not stored (%): it is in iot_measurements_refused', NEW.device_id, fault;
  RETURN NULL;
END $$;
-- The old service's user writes through it, with the rights of this schema's owner: nothing is looked up where that user could put something in the way.
DO $$ BEGIN
  EXECUTE format('ALTER FUNCTION iot_measurements_insert() SET search_path = pg_catalog, %I, pg_temp', current_schema());
END $$;
REVOKE EXECUTE ON FUNCTION iot_measurements_insert() FROM PUBLIC;
CREATE TRIGGER iot_measurements_insert INSTEAD OF INSERT ON iot_measurements FOR EACH ROW EXECUTE FUNCTION iot_measurements_insert();

-- --- its rows

CREATE TABLE adoption_pieces (
  from_at  timestamptz NOT NULL,
  to_at    timestamptz NOT NULL CHECK (to_at > from_at),
  rows     bigint NOT NULL,
  stored   bigint NOT NULL,
  stood    bigint NOT NULL,
  refused  bigint NOT NULL,
  too_old  bigint NOT NULL,
  checksum numeric NOT NULL,
  done_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (from_at));
COMMENT ON TABLE adoption_pieces IS 'Stretches of the old service''s table whose rows were carried over, each with what became of them, in the transaction of its rows.';
COMMENT ON COLUMN adoption_pieces.stood IS 'Rows that were there already, by the topic decoded_iot_data or a run before.';
COMMENT ON COLUMN adoption_pieces.too_old IS 'Rows older than sink.retention_days: they stay in the old table.';
COMMENT ON COLUMN adoption_pieces.checksum IS 'Sum of the hashes of the keys and values, the same in both tables.';

-- The rows of a stretch, as they are to be stored: keys as the old service filled them in.
CREATE FUNCTION adoption_source(old text) RETURNS text LANGUAGE sql IMMUTABLE AS $$
  SELECT format('SELECT timestamp, device_id::text AS device_id, coalesce(connector_mode::text, ''unknown'') AS connector_mode,
                        coalesce(component_type::text, ''unknown'') AS component_type, coalesce(pin_position::text, ''-1'') AS pin_position,
                        value::double precision AS value, coalesce(unit::text, '''') AS unit, coalesce(topic::text, '''') AS topic
                 FROM %s', old) $$;

CREATE FUNCTION adoption_hash(at timestamptz, device text, mode text, component text, pin text, value double precision) RETURNS numeric LANGUAGE sql IMMUTABLE AS $$
  SELECT hashtextextended(concat_ws(E'\x1f', extract(epoch FROM at)::text, device, mode, component, pin, coalesce(value::text, '-')), 0)::numeric $$;

-- Carries over what is older than `to_at` and not older than `from_at`, and sees that it is there: counts and checksum of what the old table says are those
-- of what is stored, or nothing of it is. One transaction; done again it changes nothing.
CREATE FUNCTION adopt_piece(old text, begins timestamptz, ends timestamptz, keep_from timestamptz) RETURNS adoption_pieces LANGUAGE plpgsql SET jit = off AS $$
DECLARE
  epoch CONSTANT timestamptz := '2000-01-01 00:00+00';
  today CONSTANT timestamptz := date_bin('1 day', now() - INTERVAL '1 hour', epoch);
  piece adoption_pieces;
  there record;
  derived integer;
BEGIN
  CREATE TEMP TABLE IF NOT EXISTS adopting (
    timestamp timestamptz, device_id text, connector_mode text, component_type text, pin_position text, value double precision, unit text, topic text,
    fault text, series_id integer) ON COMMIT DELETE ROWS;
  DELETE FROM adopting;
  EXECUTE 'INSERT INTO adopting SELECT r.*, iot_measurements_fault(timestamp, device_id, connector_mode, component_type, pin_position, value, unit, topic, $3)
           FROM (' || adoption_source(old) || ') AS r WHERE timestamp >= $1 AND (timestamp < $2 OR $2 = ''infinity'')' USING begins, ends, keep_from;
  piece.from_at := begins;
  piece.to_at := ends;
  piece.done_at := clock_timestamp();
  SELECT count(*), count(*) FILTER (WHERE fault = 'late_beyond_retention'), count(*) FILTER (WHERE fault <> 'late_beyond_retention')
  INTO piece.rows, piece.too_old, piece.refused FROM adopting;

  INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit, topic)
  SELECT DISTINCT ON (device_id, component_type, pin_position, connector_mode) device_id, connector_mode, component_type, pin_position, unit, topic
  FROM adopting a WHERE fault IS NULL AND NOT EXISTS (
    SELECT FROM series s WHERE s.device_id = a.device_id AND s.component_type = a.component_type AND s.pin_position = a.pin_position
      AND s.connector_mode = a.connector_mode)
  ORDER BY device_id, component_type, pin_position, connector_mode, timestamp DESC
  ON CONFLICT (device_id, component_type, pin_position, connector_mode) DO NOTHING;
  UPDATE adopting a SET series_id = s.series_id FROM series s
  WHERE a.fault IS NULL AND s.device_id = a.device_id AND s.component_type = a.component_type AND s.pin_position = a.pin_position
    AND s.connector_mode = a.connector_mode;
  SELECT derivation_id INTO derived FROM derivations WHERE parser = 'iot_measurements@1' AND config_rev = 0 AND experiment_id = '';

  -- In the order of the sink, as above.
  PERFORM FROM latest WHERE series_id IN (SELECT series_id FROM adopting) ORDER BY series_id FOR UPDATE;
  -- The old service kept no time of receipt: that of the measurement stands for it.
  INSERT INTO measurements (series_id, timestamp, value, quality, received_at, raw_partition, raw_offset, raw_index, generation, derivation_id, unit, topic)
  SELECT a.series_id, a.timestamp, a.value, 2, a.timestamp, 0, 0, 0, 0, derived, NULLIF(a.unit, s.unit), NULLIF(a.topic, s.topic)
  FROM adopting a JOIN series s USING (series_id)
  WHERE NOT EXISTS (SELECT FROM measurements_late l WHERE l.series_id = a.series_id AND l.timestamp = a.timestamp)
  ORDER BY a.series_id, a.timestamp ON CONFLICT (series_id, timestamp) DO NOTHING;
  GET DIAGNOSTICS piece.stored = ROW_COUNT;

  -- What is read back. LIMIT has each row looked up by its key.
  CREATE TEMP TABLE IF NOT EXISTS adopted (timestamp timestamptz, series_id integer, value double precision, same boolean) ON COMMIT DELETE ROWS;
  DELETE FROM adopted;
  INSERT INTO adopted
  SELECT a.timestamp, a.series_id, m.value, m.value IS NOT DISTINCT FROM a.value
  FROM adopting a CROSS JOIN LATERAL (
    SELECT value FROM measurements WHERE series_id = a.series_id AND timestamp = a.timestamp AND timestamp >= begins AND timestamp < ends
    UNION ALL SELECT value FROM measurements_late WHERE series_id = a.series_id AND timestamp = a.timestamp LIMIT 1) m
  WHERE a.series_id IS NOT NULL;
  INSERT INTO iot_measurements_refused (source, code, message, original)
  SELECT 'adopt', coalesce(fault, 'same_instant'), '', to_jsonb(a) - 'fault' - 'series_id'
  FROM adopting a WHERE fault <> 'late_beyond_retention'
    OR (fault IS NULL AND EXISTS (SELECT FROM adopted d WHERE d.series_id = a.series_id AND d.timestamp = a.timestamp AND NOT d.same
                                  AND d.value IS DISTINCT FROM a.value));
  SELECT count(*) AS found, count(*) FILTER (WHERE NOT same) AS others INTO there FROM adopted;
  piece.refused := piece.refused + there.others;
  piece.stood := there.found - there.others - piece.stored;
  SELECT coalesce(sum(adoption_hash(a.timestamp, a.device_id, a.connector_mode, a.component_type, a.pin_position, a.value)), 0) INTO piece.checksum
  FROM adopting a WHERE fault IS NULL AND NOT EXISTS (
    SELECT FROM adopted d WHERE d.series_id = a.series_id AND d.timestamp = a.timestamp AND NOT d.same AND d.value IS DISTINCT FROM a.value);
  IF piece.rows <> piece.stored + piece.stood + piece.refused + piece.too_old OR piece.stood < 0 OR piece.checksum IS DISTINCT FROM (
    SELECT coalesce(sum(adoption_hash(d.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, d.value)), 0)
    FROM adopted d JOIN series s USING (series_id) WHERE d.same) THEN
    RAISE EXCEPTION 'rows of % from % to % were not carried over as they are: %', old, begins, ends, piece;
  END IF;

  INSERT INTO latest AS l (series_id, timestamp, value, quality, received_at)
  SELECT DISTINCT ON (series_id) series_id, timestamp, value, 2, timestamp FROM adopted WHERE same ORDER BY series_id, timestamp DESC
  ON CONFLICT (series_id) DO UPDATE
    SET timestamp = excluded.timestamp, value = excluded.value, value_text = NULL, quality = excluded.quality, received_at = excluded.received_at
    WHERE excluded.timestamp > l.timestamp;
  IF piece.stored > 0 THEN
    -- Days before today are marked as nobody's sight: upkeep makes them behind what is current.
    INSERT INTO rollup_dirty (from_at, to_at, visible)
    SELECT date_bin('1 minute', min(timestamp), epoch), date_bin('1 minute', max(timestamp), epoch) + INTERVAL '1 minute', shown
    FROM (SELECT timestamp, timestamp >= today AS shown FROM adopted) AS x GROUP BY shown;
  END IF;
  INSERT INTO adoption_pieces AS p SELECT (piece).*
  ON CONFLICT (from_at) DO UPDATE
    SET to_at = excluded.to_at, rows = excluded.rows, stored = p.stored + excluded.stored, stood = excluded.stood - p.stored, refused = excluded.refused,
        too_old = excluded.too_old, checksum = excluded.checksum, done_at = excluded.done_at;
  RETURN piece;
END $$;

-- What both tables say of a stretch: rows of the old one, how many of them stand with their value, and both checksums, without the rows that another
-- value stands in the way of. Reads only.
CREATE FUNCTION adoption_compared(old text, begins timestamptz, ends timestamptz, keep_from timestamptz,
  OUT in_old bigint, OUT present bigint, OUT old_sum numeric, OUT new_sum numeric) LANGUAGE plpgsql SET jit = off AS $$
BEGIN
  EXECUTE 'WITH r AS (SELECT * FROM (' || adoption_source(old) || ') AS r WHERE timestamp >= $1 AND (timestamp < $2 OR $2 = ''infinity'')),
    f AS (SELECT r.*, m.value AS stands, m.found,
                 iot_measurements_fault(r.timestamp, r.device_id, r.connector_mode, r.component_type, r.pin_position, r.value, r.unit, r.topic, $3) AS fault
          FROM r LEFT JOIN series s ON s.device_id = r.device_id AND s.component_type = r.component_type AND s.pin_position = r.pin_position
            AND s.connector_mode = r.connector_mode
          LEFT JOIN LATERAL (
            SELECT value, true AS found FROM measurements WHERE series_id = s.series_id AND timestamp = r.timestamp AND timestamp >= $1 AND timestamp < $2
            UNION ALL SELECT value, true FROM measurements_late WHERE series_id = s.series_id AND timestamp = r.timestamp LIMIT 1) m ON true)
    SELECT count(*), count(*) FILTER (WHERE found AND stands IS NOT DISTINCT FROM value),
           coalesce(sum(adoption_hash(timestamp, device_id, connector_mode, component_type, pin_position, value)) FILTER (WHERE fault IS NULL AND NOT (found IS TRUE AND stands IS DISTINCT FROM value)), 0),
           coalesce(sum(adoption_hash(timestamp, device_id, connector_mode, component_type, pin_position, stands)) FILTER (WHERE fault IS NULL AND found AND stands IS NOT DISTINCT FROM value), 0)
    FROM f' INTO in_old, present, old_sum, new_sum USING begins, ends, keep_from;
END $$;
