-- Alarms as people see them: one row an alarm, one row a transition. Written from iot_alerts by the sink, never by the alarm agent.

CREATE TABLE alarms (
  alarm_id       text PRIMARY KEY,
  device_id      text NOT NULL,
  rule           text NOT NULL,
  rule_rev       bigint NOT NULL DEFAULT 0,
  component_type text NOT NULL DEFAULT 'unknown',
  pin_position   text NOT NULL DEFAULT '-1',
  severity       text NOT NULL,
  state          text NOT NULL,
  transition     text NOT NULL,
  occurred_at    timestamptz NOT NULL,
  detected_at    timestamptz NOT NULL,
  cleared_at     timestamptz,
  value          double precision,
  unit           text NOT NULL DEFAULT '',
  threshold      double precision,
  message        text NOT NULL DEFAULT '',
  generation     integer NOT NULL DEFAULT 0,
  transitions    integer NOT NULL DEFAULT 1,
  updated_at     timestamptz NOT NULL) WITH (fillfactor = 70);
COMMENT ON COLUMN alarms.transition IS 'The last one.';
COMMENT ON COLUMN alarms.value IS 'The reading that raised it.';
COMMENT ON COLUMN alarms.updated_at IS 'When the last transition was detected.';
CREATE INDEX alarms_active ON alarms (severity, occurred_at DESC) WHERE cleared_at IS NULL;
CREATE INDEX alarms_by_device ON alarms (device_id, occurred_at DESC);

CREATE TABLE alarm_events (
  transition_id text PRIMARY KEY,
  alarm_id      text NOT NULL,
  device_id     text NOT NULL,
  rule          text NOT NULL,
  transition    text NOT NULL,
  state         text NOT NULL,
  severity      text NOT NULL,
  occurred_at   timestamptz NOT NULL,
  detected_at   timestamptz NOT NULL,
  value         double precision,
  raw_partition integer,
  raw_offset    bigint,
  raw_index     integer,
  generation    integer NOT NULL DEFAULT 0,
  detail        jsonb NOT NULL,
  stored_at     timestamptz NOT NULL DEFAULT now());
COMMENT ON COLUMN alarm_events.detail IS 'The transition as it came.';
CREATE INDEX alarm_events_by_alarm ON alarm_events (alarm_id, detected_at);

CREATE VIEW active_alarms AS
  SELECT alarm_id, device_id, rule, component_type, pin_position, severity, state, occurred_at, detected_at, value, unit, threshold, message
  FROM alarms WHERE cleared_at IS NULL;
