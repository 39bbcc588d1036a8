-- The last event of each stream, beside the events: so that verification finds events that were cut off at the end of a stream, and
-- streams that are gone whole. The chain alone shows neither.

CREATE TABLE event_heads (
  stream_id text   PRIMARY KEY,
  version   bigint NOT NULL,
  hash      bytea  NOT NULL CHECK (length(hash) = 32)) WITH (fillfactor = 70);
COMMENT ON TABLE event_heads IS 'Kept by a trigger of event_store; read by preservarium/stores/events.py: verify.';

CREATE FUNCTION event_store_moves_heads() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  -- Ordered: two writers of the same streams would otherwise wait for each other.
  INSERT INTO event_heads AS h (stream_id, version, hash)
  SELECT DISTINCT ON (stream_id) stream_id, version, hash FROM added ORDER BY stream_id, version DESC
  ON CONFLICT (stream_id) DO UPDATE SET version = excluded.version, hash = excluded.hash WHERE excluded.version > h.version;
  RETURN NULL;
END
$$;
CREATE TRIGGER event_store_moves_heads AFTER INSERT ON event_store REFERENCING NEW TABLE AS added
  FOR EACH STATEMENT EXECUTE FUNCTION event_store_moves_heads();

-- After the trigger: it waits until no writer is under way, and those that follow move their heads themselves.
INSERT INTO event_heads (stream_id, version, hash)
  SELECT DISTINCT ON (stream_id) stream_id, version, hash FROM event_store ORDER BY stream_id, version DESC;

-- `preservarium events log` looks for what one actor did, and for kinds of streams in the order of time.
CREATE INDEX event_store_by_actor ON event_store (actor, position);
