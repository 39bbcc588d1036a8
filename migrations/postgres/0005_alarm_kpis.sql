-- What ISA-18.2 (section 16) and EEMUA 191 ask of an alarm system, over what is stored. Generation 0 only: replays annunciate nothing.
-- Annunciations count when they were told (detected_at); how a process behaves (chattering) is told in its own time (occurred_at).

CREATE INDEX alarm_events_raised ON alarm_events (detected_at) WHERE transition = 'raised';
CREATE INDEX alarms_occurred ON alarms (occurred_at);

-- One row an annunciation. `operators` are the recipients of its rule; `area` is what the device's meta says.
CREATE VIEW alarm_annunciations AS
  SELECT e.detected_at AS at, e.alarm_id, e.device_id, e.rule, coalesce(e.detail ->> 'pin_position', '-1') AS pin_position, e.severity,
         coalesce(d.doc #>> '{meta,area}', '') AS area,
         ARRAY(SELECT DISTINCT r FROM jsonb_array_elements_text(
           CASE jsonb_typeof(e.detail -> 'recipients') WHEN 'array' THEN e.detail -> 'recipients' ELSE '[]' END) AS r) AS operators
  FROM alarm_events e LEFT JOIN devices d USING (device_id)
  WHERE e.transition = 'raised' AND e.generation = 0;

-- How many, by operator; operator '' is everybody, and there each annunciation counts once. Empty intervals have no row.
CREATE VIEW alarm_rate_10m AS
  SELECT date_bin('10 minutes', a.at, '2000-01-01 00:00+00') AS bucket, o.operator, a.area, a.severity, count(*) AS annunciations
  FROM alarm_annunciations a CROSS JOIN LATERAL unnest(a.operators || ''::text) AS o(operator) GROUP BY 1, 2, 3, 4;
CREATE VIEW alarm_rate_1h AS
  SELECT date_bin('1 hour', a.at, '2000-01-01 00:00+00') AS bucket, o.operator, a.area, a.severity, count(*) AS annunciations
  FROM alarm_annunciations a CROSS JOIN LATERAL unnest(a.operators || ''::text) AS o(operator) GROUP BY 1, 2, 3, 4;

-- Floods: from the annunciation that makes more than 10 in the last 10 minutes until fewer than 5 are left in them.
-- An annunciation counts for 10 minutes: the count changes where one comes and where one has grown old.
CREATE VIEW alarm_floods AS
  WITH changes AS (
    SELECT o.operator, c.at, sum(c.step) AS step
    FROM alarm_annunciations a
    CROSS JOIN LATERAL unnest(a.operators || ''::text) AS o(operator)
    CROSS JOIN LATERAL (VALUES (a.at, 1), (a.at + INTERVAL '10 minutes', -1)) AS c(at, step)
    GROUP BY 1, 2),
  counts AS (SELECT operator, at, sum(step) OVER (PARTITION BY operator ORDER BY at) AS n FROM changes),
  marks AS (SELECT operator, at, n, CASE WHEN n > 10 THEN 1 WHEN n < 5 THEN 0 END AS mark FROM counts),
  -- What lies between both limits is what the last mark said.
  runs AS (SELECT operator, at, n, mark, count(mark) OVER (PARTITION BY operator ORDER BY at) AS run FROM marks),
  states AS (SELECT operator, at, n, max(mark) OVER (PARTITION BY operator, run) AS flood FROM runs),
  steps AS (
    SELECT operator, at, n, flood,
           count(*) FILTER (WHERE flood = 0) OVER (PARTITION BY operator ORDER BY at ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS calm,
           lead(at) OVER (PARTITION BY operator ORDER BY at) AS next_at
    FROM states)
  SELECT f.operator, f.begins_at, f.ends_at, f.most,
         (SELECT count(*) FROM alarm_annunciations a
          WHERE a.at >= f.begins_at AND a.at < f.ends_at AND (f.operator = '' OR f.operator = ANY (a.operators))) AS annunciations
  FROM (SELECT operator, min(at) AS begins_at, max(next_at) AS ends_at, max(n)::bigint AS most
        FROM steps WHERE flood = 1 GROUP BY operator, calm) f;
COMMENT ON COLUMN alarm_floods.most IS 'The most annunciations within 10 minutes.';
COMMENT ON COLUMN alarm_floods.ends_at IS 'In the future where it lasts: when it will be over if nothing more comes.';

-- Each time that an alarm was raised as the third or a later one within a minute.
CREATE VIEW alarm_chatter AS
  SELECT * FROM (
    SELECT occurred_at, alarm_id, device_id, rule, pin_position, severity,
           count(*) OVER (PARTITION BY device_id, rule, pin_position ORDER BY occurred_at
                          RANGE BETWEEN INTERVAL '1 minute' PRECEDING AND CURRENT ROW) AS raised_in_minute
    FROM alarms WHERE generation = 0) c
  WHERE raised_in_minute >= 3;

-- Raised more than a day ago and true ever since, annunciated all the while.
CREATE VIEW alarm_stale AS
  SELECT alarm_id, device_id, rule, pin_position, severity, state, occurred_at, now() - occurred_at AS age
  FROM alarms
  WHERE generation = 0 AND cleared_at IS NULL AND state IN ('unacknowledged', 'acknowledged') AND occurred_at < now() - INTERVAL '24 hours';

-- How long an annunciation waited for its first acknowledgement; NULL: it still waits, or it was never asked for.
CREATE VIEW alarm_acknowledgements AS
  SELECT r.alarm_id, r.device_id, r.rule, r.severity, r.detected_at AS raised_at, a.detected_at AS acknowledged_at,
         a.detail ->> 'actor' AS actor, a.detected_at - r.detected_at AS waited
  FROM (SELECT DISTINCT ON (alarm_id) * FROM alarm_events WHERE transition = 'raised' AND generation = 0
        ORDER BY alarm_id, detected_at) r
  LEFT JOIN LATERAL (
    SELECT e.detected_at, e.detail FROM alarm_events e
    WHERE e.alarm_id = r.alarm_id AND e.transition = 'acknowledged' ORDER BY e.detected_at LIMIT 1) a ON true;

-- The alarms that were annunciated most often in a time, each with its share of all; the first ten are what to mend.
CREATE FUNCTION alarm_top(from_at timestamptz, to_at timestamptz)
RETURNS TABLE (device_id text, rule text, pin_position text, annunciations bigint, share double precision) LANGUAGE sql STABLE AS $$
  SELECT a.device_id, a.rule, a.pin_position, count(*), count(*) / sum(count(*)) OVER ()::double precision
  FROM alarm_annunciations a WHERE a.at >= from_at AND a.at < to_at
  GROUP BY 1, 2, 3 ORDER BY 4 DESC, 1, 2, 3
$$;
