-- What every reading becomes, on TimescaleDB and on plain PostgreSQL alike.
-- The table `measurements` itself is made by the file of the engine in use.

CREATE TABLE series (
  series_id      integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  device_id      text NOT NULL CHECK (char_length(device_id) BETWEEN 1 AND 255),
  connector_mode text NOT NULL CHECK (char_length(connector_mode) <= 255),
  component_type text NOT NULL CHECK (char_length(component_type) <= 255),
  pin_position   text NOT NULL CHECK (char_length(pin_position) <= 255),
  unit           text NOT NULL DEFAULT '',
  topic          text NOT NULL DEFAULT '',
  first_seen     timestamptz NOT NULL DEFAULT now(),
  UNIQUE (device_id, component_type, pin_position, connector_mode));
COMMENT ON TABLE series IS 'One row a series: what the old service repeated in every row.';
COMMENT ON COLUMN series.unit IS 'Unit of its rows, except where measurements.unit says otherwise.';
COMMENT ON COLUMN series.topic IS 'Original topic of its rows, except where measurements.topic says otherwise.';

CREATE TABLE derivations (
  derivation_id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  parser        text NOT NULL CHECK (char_length(parser) <= 255),
  config_rev    bigint NOT NULL,
  experiment_id text NOT NULL DEFAULT '' CHECK (char_length(experiment_id) <= 255),
  UNIQUE (parser, config_rev, experiment_id));
COMMENT ON TABLE derivations IS 'Which parser version and device configuration made a row, and for which experiment.';

CREATE TABLE sink_offsets (
  sink        text NOT NULL,
  topic       text NOT NULL,
  partition   integer NOT NULL,
  generation  integer NOT NULL DEFAULT 0,
  next_offset bigint NOT NULL CHECK (next_offset >= 0),
  updated_at  timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (sink, topic, partition, generation)) WITH (fillfactor = 50);
COMMENT ON TABLE sink_offsets IS
  'How far each partition is stored: written in the transaction of its rows, so it is the truth, and Kafka''s offset a hint.';

CREATE TABLE latest (
  series_id   integer PRIMARY KEY,
  timestamp   timestamptz NOT NULL,
  value       double precision,
  value_text  text,
  quality     smallint NOT NULL,
  received_at timestamptz NOT NULL) WITH (fillfactor = 50);
COMMENT ON TABLE latest IS 'The newest reading of each series by measurement time, whatever the order of arrival.';

CREATE VIEW latest_measurements AS
  SELECT l.timestamp, s.device_id, s.connector_mode, s.component_type, s.pin_position, l.value, s.unit, s.topic,
         l.value_text, l.quality, l.received_at, l.series_id
  FROM latest l JOIN series s USING (series_id);
