-- The registry: what people edit. Every change is an event, its projection and an outbox row in one transaction.
-- Documents are `json`, not `jsonb`: that keeps the author's order of keys and the exact text that was hashed.

-- One sequence for the revision of every document, so that a later change has a larger `rev` whatever its kind.
CREATE SEQUENCE registry_rev AS bigint;

-- Events of a stream are numbered without gaps; the UNIQUE key is the optimistic lock. `hash` covers the event and
-- `prev_hash`, so an edited, removed or swapped event shows (stores/events.py: verify).
CREATE TABLE event_store (
  position  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  stream_id text        NOT NULL CHECK (length(stream_id) BETWEEN 1 AND 400),
  version   bigint      NOT NULL CHECK (version > 0),
  type      text        NOT NULL,
  data      json        NOT NULL,
  actor     text        NOT NULL,
  at        timestamptz NOT NULL,
  prev_hash bytea       NOT NULL CHECK (length(prev_hash) = 32),
  hash      bytea       NOT NULL CHECK (length(hash) = 32),
  UNIQUE (stream_id, version)
);
CREATE INDEX event_store_at ON event_store (at);

-- Events are facts: they are added and read, nothing else. (A superuser can still; then the chain tells.)
CREATE FUNCTION event_store_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'event_store is append-only';
END
$$;
CREATE TRIGGER event_store_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON event_store
  FOR EACH STATEMENT EXECUTE FUNCTION event_store_is_append_only();

-- The fold of a stream up to a version, so that reading a long stream starts there. May be deleted at any time.
CREATE TABLE event_snapshots (
  stream_id  text        NOT NULL,
  version    bigint      NOT NULL,
  state      json,
  hash       bytea       NOT NULL,
  created_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (stream_id, version)
);

-- Projections: the current state of each document. `version` is the last event's; `doc` is what the file said.

CREATE TABLE manufacturers (
  name       text PRIMARY KEY,
  rev        bigint      NOT NULL UNIQUE,
  version    bigint      NOT NULL,
  doc        json        NOT NULL,
  updated_at timestamptz NOT NULL,
  updated_by text        NOT NULL
);

CREATE TABLE datatypes (
  name       text PRIMARY KEY,
  kind       text        NOT NULL CHECK (kind IN ('number', 'text', 'boolean')),
  unit       text        NOT NULL,
  rev        bigint      NOT NULL UNIQUE,
  version    bigint      NOT NULL,
  doc        json        NOT NULL,
  updated_at timestamptz NOT NULL,
  updated_by text        NOT NULL
);

CREATE TABLE parsers (
  name           text        NOT NULL,
  parser_version integer     NOT NULL CHECK (parser_version > 0),
  kind           text        NOT NULL,
  status         text        NOT NULL CHECK (status IN ('draft', 'active', 'retired')),
  hash           text        NOT NULL CHECK (length(hash) = 64),
  rev            bigint      NOT NULL UNIQUE,
  version        bigint      NOT NULL,
  doc            json        NOT NULL,
  updated_at     timestamptz NOT NULL,
  updated_by     text        NOT NULL,
  PRIMARY KEY (name, parser_version)
);
CREATE UNIQUE INDEX parsers_one_active ON parsers (name) WHERE status = 'active';

CREATE TABLE recipients (
  name       text PRIMARY KEY,
  channel    text        NOT NULL,
  address    text        NOT NULL,
  rev        bigint      NOT NULL UNIQUE,
  version    bigint      NOT NULL,
  doc        json        NOT NULL,
  updated_at timestamptz NOT NULL,
  updated_by text        NOT NULL
);

CREATE TABLE alarm_rules (
  name           text PRIMARY KEY,
  component_type text        NOT NULL REFERENCES datatypes (name) DEFERRABLE INITIALLY DEFERRED,
  severity       text        NOT NULL,
  enabled        boolean     NOT NULL,
  rev            bigint      NOT NULL UNIQUE,
  version        bigint      NOT NULL,
  doc            json        NOT NULL,
  updated_at     timestamptz NOT NULL,
  updated_by     text        NOT NULL
);
CREATE INDEX alarm_rules_component_type ON alarm_rules (component_type);

CREATE TABLE device_types (
  name         text PRIMARY KEY,
  manufacturer text        NOT NULL REFERENCES manufacturers (name) DEFERRABLE INITIALLY DEFERRED,
  -- Not a foreign key: the versions of a parser are rows of their own. Checked when a change is committed.
  parser       text        NOT NULL,
  rev          bigint      NOT NULL UNIQUE,
  version      bigint      NOT NULL,
  doc          json        NOT NULL,
  updated_at   timestamptz NOT NULL,
  updated_by   text        NOT NULL
);
CREATE INDEX device_types_manufacturer ON device_types (manufacturer);
CREATE INDEX device_types_parser ON device_types (parser);

CREATE TABLE experiments (
  experiment_id text PRIMARY KEY,
  rev           bigint      NOT NULL UNIQUE,
  version       bigint      NOT NULL,
  doc           json        NOT NULL,
  updated_at    timestamptz NOT NULL,
  updated_by    text        NOT NULL
);

CREATE TABLE devices (
  device_id     text PRIMARY KEY,
  type          text        NOT NULL REFERENCES device_types (name) DEFERRABLE INITIALLY DEFERRED,
  name          text,
  enabled       boolean     NOT NULL,
  experiment_id text REFERENCES experiments (experiment_id) DEFERRABLE INITIALLY DEFERRED,
  rev           bigint      NOT NULL UNIQUE,
  version       bigint      NOT NULL,
  doc           json        NOT NULL,
  updated_at    timestamptz NOT NULL,
  updated_by    text        NOT NULL
);
CREATE INDEX devices_type ON devices (type);
CREATE INDEX devices_experiment_id ON devices (experiment_id) WHERE experiment_id IS NOT NULL;

-- What becomes a record on Kafka, in the order of id. A row without value is a tombstone. `key` is the record's key.
CREATE TABLE registry_outbox (
  id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  topic      text        NOT NULL,
  key        bytea       NOT NULL,
  value      bytea,
  rev        bigint      NOT NULL,
  created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  sent_at    timestamptz
);
CREATE INDEX registry_outbox_unsent ON registry_outbox (id) WHERE sent_at IS NULL;
CREATE INDEX registry_outbox_sent_at ON registry_outbox (sent_at) WHERE sent_at IS NOT NULL;

-- Wakes the relays when the transaction commits. Notices with equal payload fold into one per transaction.
CREATE FUNCTION registry_outbox_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_notify('registry_outbox', '');
  RETURN NULL;
END
$$;
CREATE TRIGGER registry_outbox_notify AFTER INSERT ON registry_outbox
  FOR EACH STATEMENT EXECUTE FUNCTION registry_outbox_notify();

-- The work-flow of files: read by the incremental extract in the order (updated_at, id).

CREATE TABLE employees (
  employee_code text PRIMARY KEY,
  name          text        NOT NULL,
  email         text,
  department    text,
  active        boolean     NOT NULL DEFAULT true,
  meta          jsonb       NOT NULL DEFAULT '{}',
  created_at    timestamptz NOT NULL DEFAULT now(),
  updated_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX employees_updated_at ON employees (updated_at, employee_code);

CREATE TABLE tasks (
  id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  file_id       text        NOT NULL,
  stage         text        NOT NULL,
  -- No foreign key: assignments come from systems that may know an employee before we do.
  employee_code text,
  status        text        NOT NULL,
  assigned_at   timestamptz NOT NULL DEFAULT now(),
  started_at    timestamptz,
  completed_at  timestamptz,
  experiment_id text REFERENCES experiments (experiment_id) DEFERRABLE INITIALLY DEFERRED,
  meta          jsonb       NOT NULL DEFAULT '{}',
  created_at    timestamptz NOT NULL DEFAULT now(),
  updated_at    timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX tasks_updated_at ON tasks (updated_at, id);
CREATE INDEX tasks_file_id ON tasks (file_id, assigned_at DESC, id DESC);

-- `updated_at` is the extract's watermark, so no writer may forget it; and each change wakes the extract.
CREATE FUNCTION touch_and_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.updated_at := clock_timestamp();
  PERFORM pg_notify('task_changes', TG_TABLE_NAME);
  RETURN NEW;
END
$$;
CREATE TRIGGER employees_touch BEFORE INSERT OR UPDATE ON employees FOR EACH ROW EXECUTE FUNCTION touch_and_notify();
CREATE TRIGGER tasks_touch BEFORE INSERT OR UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION touch_and_notify();
