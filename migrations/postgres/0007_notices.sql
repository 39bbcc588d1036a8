-- What became of every notice: the proof that somebody was told, or why not. Written from notice_receipts by the sink.

CREATE TABLE notice_deliveries (
  delivery_id text NOT NULL,
  recipient   text NOT NULL,
  channel     text NOT NULL,
  address     text NOT NULL,
  kind        text NOT NULL,
  outcome     text NOT NULL,
  answer      text NOT NULL,
  attempts    integer NOT NULL,
  planned_at  timestamptz NOT NULL,
  settled_at  timestamptz NOT NULL,
  subject     text NOT NULL,
  alarms      jsonb NOT NULL,
  transitions jsonb NOT NULL,
  stored_at   timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (delivery_id));
COMMENT ON TABLE notice_deliveries IS 'One row a notice that was taken over by its channel, or refused for good.';
COMMENT ON COLUMN notice_deliveries.outcome IS 'sent or refused';
COMMENT ON COLUMN notice_deliveries.answer IS 'What the server said.';
COMMENT ON COLUMN notice_deliveries.attempts IS 'Tries of the process that settled it.';
COMMENT ON COLUMN notice_deliveries.alarms IS 'Ids of the alarms that it lists.';
COMMENT ON COLUMN notice_deliveries.transitions IS 'Ids of the transitions that it tells, the last 20 of each alarm.';
CREATE INDEX notice_deliveries_by_time ON notice_deliveries (planned_at);
CREATE INDEX notice_deliveries_by_recipient ON notice_deliveries (recipient, planned_at DESC);
CREATE INDEX notice_deliveries_by_alarm ON notice_deliveries USING gin (alarms);
