-- What was taken out of databases that have no change feed: how far, and which version of each row.
-- What is about to be sent is written before, and what was sent after Kafka has acknowledged it: a crash in between sends it again.

CREATE TABLE extract_positions (
  source        text PRIMARY KEY,
  position      jsonb NOT NULL,
  pending       jsonb,
  reconciled_at timestamptz,
  updated_at    timestamptz NOT NULL DEFAULT now());
COMMENT ON COLUMN extract_positions.source IS 'tasks or employees.';
COMMENT ON COLUMN extract_positions.pending IS 'The events that are being sent: [id, key, at_us, changed_us, place, order_us, order_place] each.';
COMMENT ON COLUMN extract_positions.reconciled_at IS 'When every key was last compared with the source.';

CREATE TABLE extract_rows (
  source      text NOT NULL,
  id          text COLLATE "C" NOT NULL,
  changed_us  bigint NOT NULL,
  place       bigint NOT NULL,
  order_us    bigint NOT NULL,
  order_place bigint NOT NULL,
  key         text NOT NULL,
  at_us       bigint,
  PRIMARY KEY (source, id));
COMMENT ON TABLE extract_rows IS
  'The version of each row that was sent: what is the same is not sent again, and what the source has no more is told as deleted.';
COMMENT ON COLUMN extract_rows.changed_us IS 'The row''s updated_at, µs since the epoch; 0 where it has none, -1 where the row is gone.';
COMMENT ON COLUMN extract_rows.place IS 'With changed_us the row''s version: the transaction that wrote it.';
COMMENT ON COLUMN extract_rows.order_us IS 'With order_place the id of its last event; every further one is greater.';
COMMENT ON COLUMN extract_rows.key IS 'Key of its records: file_id or employee_code.';
COMMENT ON COLUMN extract_rows.at_us IS 'assigned_at of a task, for the event that tells of its deletion; of a row that is gone, when that was seen.';
