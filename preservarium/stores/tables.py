"""The topics of events that are stored in PostgreSQL, one declaration each.

To store one more: make its table in a migration and declare it here; agents/sink.py gives each declaration a stage and
a consumer group of its own.
"""

from typing import Final

from preservarium import topics
from preservarium.stores.event_tables import EventTable, document, instant, integer, number, text
from preservarium.stores.journal import ALARM_OPERATIONS

_SERIES: Final = (text("device_id"), text("connector_mode"), text("component_type"), text("pin_position"), text("unit"))
_COORDINATES: Final = (
    integer("raw_partition", default=None),
    integer("raw_offset", default=None),
    integer("raw_index", default=None),
    integer("generation", default=0),
)

ALARM_EVENTS: Final = EventTable(
    topics.ALERTS,
    "alarm_events",
    ("transition_id",),
    (
        text("transition_id"), text("alarm_id"), text("device_id"), text("rule"), text("transition"), text("state"),
        text("severity"), instant("occurred_at"), instant("detected_at"), number("value", default=None), *_COORDINATES,
        document("detail", ""),
    ),
    # The first transition of an alarm makes its row, the last one decides its state.
    then="""
WITH new AS (
  SELECT e.*, u.nth FROM unnest($1::text[]) WITH ORDINALITY AS u(id, nth) JOIN alarm_events e ON e.transition_id = u.id),
first AS (
  SELECT DISTINCT ON (alarm_id) alarm_id, occurred_at, detected_at, value FROM new ORDER BY alarm_id, nth),
last AS (
  SELECT DISTINCT ON (alarm_id) *, count(*) OVER (PARTITION BY alarm_id) AS transitions FROM new ORDER BY alarm_id, nth DESC)
INSERT INTO alarms AS a (alarm_id, device_id, rule, rule_rev, component_type, pin_position, severity, state, transition, occurred_at,
                         detected_at, cleared_at, value, unit, threshold, message, generation, transitions, updated_at)
SELECT l.alarm_id, l.device_id, l.rule, coalesce((l.detail->>'rule_rev')::bigint, 0), coalesce(l.detail->>'component_type', 'unknown'),
       coalesce(l.detail->>'pin_position', '-1'), l.severity, l.state, l.transition, f.occurred_at, f.detected_at,
       '1970-01-01 00:00+00'::timestamptz + (l.detail->>'cleared_at')::bigint * INTERVAL '1 microsecond', f.value,
       coalesce(l.detail->>'unit', ''), (l.detail->>'threshold')::float8, coalesce(l.detail->>'message', ''), l.generation,
       l.transitions, l.detected_at
FROM last l JOIN first f USING (alarm_id) ORDER BY l.alarm_id
ON CONFLICT (alarm_id) DO UPDATE
SET severity = excluded.severity, state = excluded.state, transition = excluded.transition, cleared_at = excluded.cleared_at,
    message = excluded.message, transitions = a.transitions + excluded.transitions, updated_at = excluded.updated_at""",
)  # fmt: skip

ANOMALIES: Final = EventTable(
    topics.ANOMALIES,
    "anomalies",
    ("anomaly_id",),
    (
        text("anomaly_id"), *_SERIES, text("state"), instant("timestamp"), number("value"), number("expected"),
        number("score"), number("threshold"), *_COORDINATES,
    ),
    kept_by="timestamp",
    kept_days=lambda settings: settings.sink.events_retention_days,
)  # fmt: skip

AGGREGATES: Final = EventTable(
    topics.AGGREGATES,
    "aggregates",
    ("window_id",),
    (
        text("window_id"), integer("revision"), *_SERIES, instant("window_start"), instant("window_end"), integer("size_s"),
        integer("hop_s"), integer("count"), number("min", default=None),
        number("max", default=None), number("mean", default=None), number("sum", default=None), number("last"),
        instant("last_at"), number("consumption", default=None), text("closed_by"), integer("generation"),
        number("circular", default=None), number("spread", default=None), number("cos_sum", default=None), number("sin_sum", default=None),
    ),
    revision="revision",
    kept_by="window_end",
    kept_days=lambda settings: settings.sink.aggregates_retention_days,
)  # fmt: skip

NOTICES: Final = EventTable(
    topics.NOTICE_RECEIPTS,
    "notice_deliveries",
    ("delivery_id",),
    (
        text("delivery_id"), text("recipient"), text("channel"), text("address"), text("kind"), text("outcome"),
        text("answer"), integer("attempts"), instant("planned_at"), instant("settled_at"), text("subject"),
        document("alarms"), document("transitions"),
    ),
    kept_by="planned_at",
    kept_days=lambda settings: settings.sink.events_retention_days,
)  # fmt: skip

COMMAND_EVENTS: Final = EventTable(
    topics.COMMAND_EVENTS,
    "command_events",
    ("event_id",),
    (
        text("event_id"), text("command_id"), integer("sequence"), text("device_id"), text("event"), text("state"), instant("at"),
        text("actor", default=""), text("reason", default=""), integer("attempt", default=0), document("detail", ""),
    ),
    # The row of a command is what its latest event says; one that comes late tells of the past.
    then="""
WITH last AS (
  SELECT DISTINCT ON (e.command_id) e.* FROM unnest($1::text[]) AS u(id) JOIN command_events e ON e.event_id = u.id
  ORDER BY e.command_id, e.sequence DESC)
INSERT INTO device_commands AS c (command_id, device_id, command, state, sequence, reason, attempt, priority, requested_at, requested_by,
                                  idempotency_key, cause, expires_at, ended_at, content, confirm, updated_at)
SELECT l.command_id, l.device_id, l.detail->>'command', l.state, l.sequence, l.reason, l.attempt, (l.detail->>'priority')::int,
       '1970-01-01 00:00+00'::timestamptz + (l.detail->>'requested_at')::bigint * INTERVAL '1 microsecond', l.detail->>'requested_by',
       l.detail->>'idempotency_key', l.detail->>'cause',
       '1970-01-01 00:00+00'::timestamptz + (l.detail->>'expires_at')::bigint * INTERVAL '1 microsecond',
       '1970-01-01 00:00+00'::timestamptz + (l.detail->>'ended_at')::bigint * INTERVAL '1 microsecond',
       l.detail->'content', l.detail->'confirm', l.at
FROM last l ORDER BY l.command_id
ON CONFLICT (command_id) DO UPDATE
SET state = excluded.state, sequence = excluded.sequence, reason = excluded.reason, attempt = excluded.attempt,
    ended_at = excluded.ended_at, updated_at = excluded.updated_at
WHERE excluded.sequence > c.sequence""",
    kept_by="at",
    kept_days=lambda settings: settings.sink.events_retention_days,
    kept_with=(("device_commands", "ended_at"),),
)  # fmt: skip

#: suffix of the stage's name and of its consumer group, `sink-<suffix>` -> declaration
EVENT_TABLES: Final = {
    "alarms": ALARM_EVENTS,
    "actions": ALARM_OPERATIONS,
    "anomalies": ANOMALIES,
    "aggregates": AGGREGATES,
    "notices": NOTICES,
    "commands": COMMAND_EVENTS,
}
