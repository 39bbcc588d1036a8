-- Commands to devices as people see them: one row a command, one row an event of it. Written from command_events by the sink.

CREATE TABLE device_commands (
  command_id      text PRIMARY KEY,
  device_id       text NOT NULL,
  command         text NOT NULL,
  state           text NOT NULL,
  sequence        integer NOT NULL,
  reason          text NOT NULL DEFAULT '',
  attempt         integer NOT NULL DEFAULT 0,
  priority        integer NOT NULL DEFAULT 0,
  requested_at    timestamptz NOT NULL,
  requested_by    text NOT NULL,
  idempotency_key text NOT NULL,
  cause           text,
  expires_at      timestamptz NOT NULL,
  ended_at        timestamptz,
  content         jsonb NOT NULL,
  confirm         jsonb NOT NULL,
  updated_at      timestamptz NOT NULL) WITH (fillfactor = 70);
COMMENT ON TABLE device_commands IS 'Each command as it stands after its last event.';
COMMENT ON COLUMN device_commands.sequence IS 'Of the last event.';
COMMENT ON COLUMN device_commands.cause IS 'The alarm transition that asked for it.';
CREATE INDEX device_commands_by_device ON device_commands (device_id, requested_at DESC, command_id DESC);
CREATE INDEX device_commands_open ON device_commands (requested_at DESC) WHERE ended_at IS NULL;

CREATE TABLE command_events (
  event_id   text PRIMARY KEY,
  command_id text NOT NULL,
  sequence   integer NOT NULL,
  device_id  text NOT NULL,
  event      text NOT NULL,
  state      text NOT NULL,
  at         timestamptz NOT NULL,
  actor      text NOT NULL DEFAULT '',
  reason     text NOT NULL DEFAULT '',
  attempt    integer NOT NULL DEFAULT 0,
  detail     jsonb NOT NULL,
  stored_at  timestamptz NOT NULL DEFAULT now());
COMMENT ON COLUMN command_events.detail IS 'The event as it came.';
CREATE INDEX command_events_by_command ON command_events (command_id, sequence);
