-- What the anomaly and aggregate stages tell, one row an event. Old rows are deleted by a worker's timer
-- (sink.events_retention_days, sink.aggregates_retention_days): they are few beside the readings, and a window may be corrected.

CREATE TABLE anomalies (
  anomaly_id     text PRIMARY KEY,
  device_id      text NOT NULL,
  connector_mode text NOT NULL,
  component_type text NOT NULL,
  pin_position   text NOT NULL,
  unit           text NOT NULL,
  state          text NOT NULL,
  timestamp      timestamptz NOT NULL,
  value          double precision NOT NULL,
  expected       double precision NOT NULL,
  score          double precision NOT NULL,
  threshold      double precision NOT NULL,
  raw_partition  integer,
  raw_offset     bigint,
  raw_index      integer,
  generation     integer NOT NULL DEFAULT 0,
  stored_at      timestamptz NOT NULL DEFAULT now());
COMMENT ON TABLE anomalies IS 'Where readings begin and cease to be unlike the past of their series: a row for each.';
COMMENT ON COLUMN anomalies.state IS 'begins or ends';
CREATE INDEX anomalies_by_time ON anomalies (timestamp);
CREATE INDEX anomalies_by_device ON anomalies (device_id, timestamp DESC);

CREATE TABLE aggregates (
  window_id      text PRIMARY KEY,
  revision       integer NOT NULL,
  device_id      text NOT NULL,
  connector_mode text NOT NULL,
  component_type text NOT NULL,
  pin_position   text NOT NULL,
  unit           text NOT NULL,
  window_start   timestamptz NOT NULL,
  window_end     timestamptz NOT NULL CHECK (window_end > window_start),
  size_s         integer NOT NULL,
  hop_s          integer NOT NULL,
  count          bigint NOT NULL,
  min            double precision NOT NULL,
  max            double precision NOT NULL,
  mean           double precision NOT NULL,
  sum            double precision NOT NULL,
  last           double precision NOT NULL,
  last_at        timestamptz NOT NULL,
  consumption    double precision,
  closed_by      text NOT NULL,
  generation     integer NOT NULL DEFAULT 0,
  stored_at      timestamptz NOT NULL DEFAULT now()) WITH (fillfactor = 90);
COMMENT ON TABLE aggregates IS 'Windows of each series, corrected until their horizon: the highest revision of each.';
COMMENT ON COLUMN aggregates.consumption IS 'Of a counter, between its first and last reading in the window.';
CREATE INDEX aggregates_by_end ON aggregates (window_end);
CREATE INDEX aggregates_by_series ON aggregates (device_id, component_type, size_s, window_start DESC);
