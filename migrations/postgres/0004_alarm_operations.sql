-- What operators did, and all that is not normal. Written from alarm_answers (preservarium/stores/journal.py).

-- One row an action, also a refused one. The same is an event of the stream alarm/<device> in event_store, in one
-- transaction; this row is what keeps a repetition from becoming a second event.
CREATE TABLE alarm_operations (
  action_id    text PRIMARY KEY,
  device_id    text NOT NULL,
  rule         text NOT NULL,
  pin_position text NOT NULL,
  alarm_id     text NOT NULL,
  action       text NOT NULL,
  actor        text NOT NULL,
  comment      text NOT NULL,
  at           timestamptz NOT NULL,
  until        timestamptz,
  outcome      text NOT NULL CHECK (outcome IN ('done', 'refused')),
  code         text NOT NULL,
  reason       text NOT NULL,
  state        text NOT NULL,
  answered_at  timestamptz NOT NULL,
  detail       jsonb NOT NULL,
  stored_at    timestamptz NOT NULL DEFAULT now());
COMMENT ON COLUMN alarm_operations.alarm_id IS 'The occurrence that it was done to; empty where there was none.';
COMMENT ON COLUMN alarm_operations.at IS 'When, as the operator said.';
COMMENT ON COLUMN alarm_operations.state IS 'Of the alarm afterwards; empty where it is unknown.';
COMMENT ON COLUMN alarm_operations.detail IS 'The answer as it came.';
CREATE INDEX alarm_operations_by_alarm ON alarm_operations (device_id, rule, pin_position, at DESC);
CREATE INDEX alarm_operations_at ON alarm_operations (at DESC);

CREATE INDEX alarms_by_point ON alarms (device_id, rule, pin_position, occurred_at DESC);
CREATE INDEX alarms_standing ON alarms (occurred_at DESC) WHERE state <> 'normal';

-- All that is not normal: also returned and not acknowledged, latched, shelved, suppressed, out of service; and what people
-- set aside without its having been raised (its instants are those of the action).
CREATE OR REPLACE VIEW active_alarms AS
  SELECT a.alarm_id, a.device_id, a.rule, a.component_type, a.pin_position, a.severity, a.state, a.occurred_at, a.detected_at,
         a.value, a.unit, a.threshold, a.message, a.cleared_at, a.cleared_at IS NULL AS active, a.transition, a.updated_at,
         (SELECT o.until FROM alarm_operations o
          WHERE a.state = 'shelved' AND o.action = 'shelve' AND o.outcome = 'done' AND o.alarm_id = a.alarm_id
            AND (o.device_id, o.rule, o.pin_position) = (a.device_id, a.rule, a.pin_position)
          ORDER BY o.at DESC LIMIT 1) AS shelved_until
  FROM alarms a
  WHERE a.generation = 0 AND a.state IN ('unacknowledged', 'acknowledged', 'returned_unacknowledged', 'latched_unacknowledged',
                                         'latched', 'shelved', 'suppressed', 'out_of_service')
  UNION ALL
  SELECT '', o.device_id, o.rule, coalesce(r.component_type, 'unknown'), o.pin_position, coalesce(r.severity, 'indeterminate'), o.state,
         o.at, o.answered_at, NULL, '', NULL, '', NULL, false, o.action, o.answered_at, o.until
  FROM (SELECT DISTINCT ON (device_id, rule, pin_position) * FROM alarm_operations
        WHERE outcome = 'done' AND state <> ''
          AND action IN ('shelve', 'unshelve', 'suppress', 'unsuppress', 'out_of_service', 'return_to_service')
        ORDER BY device_id, rule, pin_position, at DESC, answered_at DESC) o
  LEFT JOIN alarm_rules r ON r.name = o.rule
  WHERE o.alarm_id = '' AND o.state IN ('shelved', 'suppressed', 'out_of_service') AND (o.until IS NULL OR o.until > now())
    AND NOT EXISTS (SELECT FROM alarms a WHERE a.generation = 0 AND a.state <> 'normal'
                    AND (a.device_id, a.rule, a.pin_position) = (o.device_id, o.rule, o.pin_position));
