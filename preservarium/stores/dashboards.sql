-- The queries that dashboards use, by name. Instants are µs since the epoch, UTC. A parameter's line has its name, its type,
-- its default where it may be left out, and what it means; `limit` is in every query that could answer with many rows.

-- name: stages
-- Files at each stage by status, and since when the oldest is there.
SELECT stage, status, count() AS files, toUnixTimestamp64Micro(min(assigned_at)) AS oldest_at
FROM pipeline_state FINAL
GROUP BY stage, status
ORDER BY stage, status
LIMIT 1000;

-- name: files
-- Files by id with what they are at now, and who has them.
-- param: stage String = '': only of this stage
-- param: status String = '': only of this status
-- param: employee String = '': only those of this employee code
-- param: after String = '': only ids after this one: the next page
-- param: limit UInt32 = 50: most rows
SELECT f.file_id AS file_id, f.stage AS stage, f.status AS status, f.employee_code AS employee_code,
       if(e.name = '', f.name, e.name) AS employee_name, f.assigned AS assigned_at, f.completed AS completed_at
FROM (
  SELECT file_id, stage, status, employee_code, employee_name AS name, toUnixTimestamp64Micro(assigned_at) AS assigned,
         toUnixTimestamp64Micro(completed_at) AS completed
  FROM pipeline_state FINAL
  WHERE file_id > {after:String}
    AND ({stage:String} = '' OR stage = {stage:String})
    AND ({status:String} = '' OR status = {status:String})
    AND ({employee:String} = '' OR employee_code = {employee:String})
  ORDER BY file_id
  LIMIT {limit:UInt32}
) AS f
LEFT JOIN (SELECT employee_code, name FROM employees FINAL) AS e ON e.employee_code = f.employee_code
ORDER BY file_id;

-- name: waiting
-- Files that are not completed, those that were assigned longest ago first.
-- param: stage String = '': only of this stage
-- param: limit UInt32 = 50: most rows
SELECT file_id, stage, status, employee_code, employee_name, toUnixTimestamp64Micro(assigned_at) AS assigned_at
FROM (
  SELECT file_id, stage, status, employee_code, employee_name, assigned_at
  FROM pipeline_state FINAL
  WHERE completed_at IS NULL AND ({stage:String} = '' OR stage = {stage:String})
  ORDER BY assigned_at, file_id
  LIMIT {limit:UInt32}
)
ORDER BY assigned_at, file_id;

-- name: file
-- One file's way: each stage that it came to, when first and last, how often assigned, to how many.
-- param: file_id String: the file
SELECT stage, toUnixTimestamp64Micro(min(assigned_at)) AS first, toUnixTimestamp64Micro(max(assigned_at)) AS last,
       toUnixTimestamp64Micro(max(completed_at)) AS completed, uniqExact(e.assigned_at) AS assigned_times,
       uniqExact(e.employee_code) AS employee_count, argMax(e.status, version) AS status,
       argMax(e.employee_code, version) AS employee_code
FROM task_events AS e
WHERE file_id = {file_id:String} AND NOT deleted
GROUP BY stage
ORDER BY first
LIMIT 1000;

-- name: history
-- One file's events, newest first.
-- param: file_id String: the file
-- param: limit UInt32 = 100: most rows
SELECT toUnixTimestamp64Micro(assigned_at) AS at, event_id, stage, status, employee_code, employee_name,
       toUnixTimestamp64Micro(completed_at) AS completed, toUnixTimestamp64Micro(changed_at) AS changed, deleted
FROM task_events FINAL
WHERE file_id = {file_id:String}
ORDER BY version DESC
LIMIT {limit:UInt32};

-- name: load
-- Files that each employee has and has not completed, most first.
-- param: limit UInt32 = 200: most rows
SELECT l.employee_code AS employee_code, if(e.name = '', l.name, e.name) AS employee_name, l.files AS files,
       l.oldest AS oldest_at
FROM (
  SELECT employee_code, any(employee_name) AS name, count() AS files, toUnixTimestamp64Micro(min(assigned_at)) AS oldest
  FROM pipeline_state FINAL
  WHERE completed_at IS NULL AND employee_code != ''
  GROUP BY employee_code
  ORDER BY files DESC, employee_code
  LIMIT {limit:UInt32}
) AS l
LEFT JOIN (SELECT employee_code, name FROM employees FINAL) AS e ON e.employee_code = l.employee_code
ORDER BY files DESC, employee_code;

-- name: throughput
-- Files completed on each of the last days, by stage.
-- param: days UInt32 = 30: days back, today included
SELECT toString(c.day) AS day, stage, count() AS files, uniqExact(employee_code) AS employees
FROM stage_completions AS c FINAL
WHERE c.day > today() - {days:UInt32}
GROUP BY c.day, stage
ORDER BY c.day, stage
LIMIT 10000;

-- name: time_in_stage
-- Seconds from assignment to completion of what was completed on the last days, by stage.
-- param: days UInt32 = 30: days back, today included
SELECT stage, count() AS files, round(avg(s), 3) AS mean_s, round(quantile(0.5)(s), 3) AS median_s, round(quantile(0.9)(s), 3) AS p90_s
FROM (
  SELECT stage, dateDiff('microsecond', assigned_at, completed_at) / 1e6 AS s
  FROM stage_completions FINAL
  WHERE day > today() - {days:UInt32}
)
GROUP BY stage
ORDER BY stage
LIMIT 1000;

-- name: latest
-- The last value of each series, of one device or of all.
-- param: device Address = '': only of this device
-- param: after String = '': only devices after this one: the next page
-- param: limit UInt32 = 200: most rows
SELECT device_id, component_type, pin_position, connector_mode, toUnixTimestamp64Micro(timestamp) AS at, value, value_text, unit,
       quality
FROM latest_values FINAL
WHERE device_id > {after:String} AND (empty({device:Address}) OR device_id IN {device:Address})
ORDER BY device_id, component_type, pin_position, connector_mode
LIMIT {limit:UInt32};

-- name: series
-- One series in so many equal steps: count, least, mean and greatest of the readings that did not fail; of a circular quantity, which
-- the newest reading tells (of those from before they did, the newest window), the mean of the directions, and neither least nor greatest.
-- param: device Address: address of the device
-- param: component String: what is measured
-- param: pin String = '-1': which of several equal components
-- param: start Int64: from then on
-- param: end Int64: to before then
-- param: points UInt32 = 500: most steps
WITH (SELECT argMax(circular, timestamp) FROM measurements
      WHERE device_id IN {device:Address} AND component_type = {component:String} AND pin_position = {pin:String}
        AND timestamp >= fromUnixTimestamp64Micro({start:Int64}, 'UTC') AND timestamp < fromUnixTimestamp64Micro({end:Int64}, 'UTC')) AS told,
     (SELECT argMax(ifNull(circular, 0), window_start) FROM aggregates
      WHERE device_id IN {device:Address} AND component_type = {component:String} AND pin_position = {pin:String}) AS windowed,
     if(told > 0, told, windowed) AS period
SELECT {start:Int64} + step * greatest(1, intDiv({end:Int64} - {start:Int64}, {points:UInt32})) AS at, count() AS readings,
       if(period > 0, NULL, min(value)) AS least,
       multiIf(period = 0, avg(value),
               hypot(avg(x), avg(y)) < 1e-9, NULL,
               -- Rounded, because a last bit below 0 would be almost a whole period.
               positiveModulo(round(atan2(avg(y), avg(x)) / (2 * pi()) * period, 9), nullIf(period, 0))) AS mean,
       if(period > 0, NULL, max(value)) AS greatest
FROM (
  SELECT intDiv(toUnixTimestamp64Micro(timestamp) - {start:Int64},
                greatest(1, intDiv({end:Int64} - {start:Int64}, {points:UInt32}))) AS step, value,
         2 * pi() * value / nullIf(period, 0) AS angle, cos(angle) AS x, sin(angle) AS y
  FROM measurements FINAL
  WHERE device_id IN {device:Address} AND component_type = {component:String} AND pin_position = {pin:String}
    AND timestamp >= fromUnixTimestamp64Micro({start:Int64}, 'UTC') AND timestamp < fromUnixTimestamp64Micro({end:Int64}, 'UTC')
    AND value IS NOT NULL AND quality NOT IN (4, 9)
)
GROUP BY step
ORDER BY step
LIMIT 10000;

-- name: windows
-- The windows of one series, as aggregate made them.
-- param: device Address: address of the device
-- param: component String: what is measured
-- param: pin String = '-1': which of several equal components
-- param: size_s UInt32 = 3600: size of the windows in seconds
-- param: start Int64: from then on
-- param: end Int64: to before then
SELECT toUnixTimestamp64Micro(window_start) AS at, count AS readings, min AS least, mean, max AS greatest, sum, last, consumption
FROM aggregates FINAL
WHERE device_id IN {device:Address} AND component_type = {component:String} AND pin_position = {pin:String}
  AND size_s = {size_s:UInt32}
  AND window_start >= fromUnixTimestamp64Micro({start:Int64}, 'UTC') AND window_start < fromUnixTimestamp64Micro({end:Int64}, 'UTC')
ORDER BY window_start
LIMIT 10000;

-- name: fleet
-- Rows, devices, and the share of rows that are suspect or worse, on each of the last days. A replay's rows are not counted.
-- param: days UInt32 = 30: days back, today included
SELECT toString(d.day) AS day, sum(rows) AS readings, uniqExact(device_id) AS devices,
       round(sumIf(rows, quality IN (3, 4, 9)) / readings, 6) AS bad_share
FROM measurement_days AS d
WHERE d.day > today() - {days:UInt32} AND generation = 0
GROUP BY d.day
ORDER BY d.day
LIMIT 10000;

-- name: alarms
-- Alarm transitions on each of the last days, by severity.
-- param: days UInt32 = 30: days back, today included
SELECT toString(toDate(occurred_at)) AS day, severity, transition, count() AS transitions, uniqExact(device_id) AS devices
FROM alarm_events FINAL
WHERE occurred_at >= toDateTime64(today() - {days:UInt32} + 1, 6, 'UTC')
GROUP BY day, severity, transition
ORDER BY day, severity, transition
LIMIT 10000;

-- name: alarm_rate
-- Annunciated alarms in each 10 minutes by severity; intervals without one are left out. A replay's are not counted.
-- param: start Int64: from then on
-- param: end Int64: to before then
SELECT intDiv(toUnixTimestamp64Micro(detected_at), 600000000) * 600000000 AS at, severity, count() AS annunciations
FROM alarm_events FINAL
WHERE transition = 'raised' AND generation = 0
  AND detected_at >= fromUnixTimestamp64Micro({start:Int64}, 'UTC') AND detected_at < fromUnixTimestamp64Micro({end:Int64}, 'UTC')
GROUP BY at, severity
ORDER BY at, severity
LIMIT 10000;

-- name: alarm_top
-- The alarms that were annunciated most often, each with its share of all.
-- param: start Int64: from then on
-- param: end Int64: to before then
-- param: limit UInt32 = 10: most rows
SELECT device_id, rule, pin_position, annunciations, annunciations / sum(annunciations) OVER () AS share
FROM (
  SELECT device_id, rule, pin_position, count() AS annunciations
  FROM alarm_events FINAL
  WHERE transition = 'raised' AND generation = 0
    AND detected_at >= fromUnixTimestamp64Micro({start:Int64}, 'UTC') AND detected_at < fromUnixTimestamp64Micro({end:Int64}, 'UTC')
  GROUP BY device_id, rule, pin_position
)
ORDER BY annunciations DESC, device_id, rule, pin_position
LIMIT {limit:UInt32};

-- name: alarm_chatter
-- Alarms that were raised for the third or a later time within a minute: how often, and the most in a minute.
-- param: start Int64: from then on
-- param: end Int64: to before then
-- param: limit UInt32 = 100: most rows
SELECT device_id, rule, pin_position, count() AS times, max(raised) AS most_in_minute
FROM (
  SELECT device_id, rule, pin_position, at,
         count() OVER (PARTITION BY device_id, rule, pin_position ORDER BY at RANGE BETWEEN 60000000 PRECEDING AND CURRENT ROW) AS raised
  FROM (
    SELECT DISTINCT alarm_id, device_id, rule, pin_position, toUnixTimestamp64Micro(occurred_at) AS at
    FROM alarm_events FINAL
    WHERE transition = 'raised' AND generation = 0
      AND occurred_at >= fromUnixTimestamp64Micro({start:Int64} - 60000000, 'UTC')
      AND occurred_at < fromUnixTimestamp64Micro({end:Int64}, 'UTC')
  )
)
WHERE raised >= 3 AND at >= {start:Int64}
GROUP BY device_id, rule, pin_position
ORDER BY times DESC, device_id, rule, pin_position
LIMIT {limit:UInt32};

-- name: alarm_answers
-- How long annunciations waited for their first acknowledgement, in seconds, and how many never had one.
-- param: start Int64: from then on
-- param: end Int64: to before then
SELECT countIf(acknowledged > 0) AS answered, countIf(acknowledged = 0) AS never,
       quantileExactInclusiveOrNullIf(0.5)((acknowledged - raised) / 1e6, acknowledged > 0) AS median_s,
       quantileExactInclusiveOrNullIf(0.9)((acknowledged - raised) / 1e6, acknowledged > 0) AS p90_s,
       maxOrNullIf((acknowledged - raised) / 1e6, acknowledged > 0) AS longest_s
FROM (
  SELECT alarm_id, minIf(toUnixTimestamp64Micro(detected_at), transition = 'raised') AS raised,
         minIf(toUnixTimestamp64Micro(detected_at), transition = 'acknowledged') AS acknowledged
  FROM alarm_events FINAL
  WHERE generation = 0 AND transition IN ('raised', 'acknowledged')
    -- An acknowledgement comes at any time later, so only the alarms can be limited.
    AND alarm_id IN (
      SELECT alarm_id FROM alarm_events
      WHERE generation = 0 AND transition = 'raised'
        AND detected_at >= fromUnixTimestamp64Micro({start:Int64}, 'UTC') AND detected_at < fromUnixTimestamp64Micro({end:Int64}, 'UTC')
    )
  GROUP BY alarm_id
)
WHERE raised >= {start:Int64} AND raised < {end:Int64}
LIMIT 1;

-- name: alarm_floods
-- Floods of the whole system: from above 10 annunciations within 10 minutes until below 5. One that lasts ends in the future.
-- param: start Int64: from then on
-- param: end Int64: to before then
-- param: limit UInt32 = 100: most rows
SELECT min(at) AS begins_at, max(next_at) AS ends_at, max(raised) AS most
FROM (
  SELECT at, raised, flood,
         sum(flood = 0) OVER (ORDER BY at ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS calm,
         leadInFrame(at) OVER (ORDER BY at ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS next_at
  FROM (
    SELECT at, raised, max(mark) OVER (PARTITION BY run) AS flood
    FROM (
      SELECT at, raised, mark, sum(mark >= 0) OVER (ORDER BY at) AS run
      FROM (
        SELECT at, raised, multiIf(raised > 10, 1, raised < 5, 0, -1) AS mark
        FROM (
          SELECT at, sum(step) OVER (ORDER BY at) AS raised
          FROM (
            SELECT change.1 AS at, sum(change.2) AS step
            FROM (
              SELECT arrayJoin([(told, 1), (told + 600000000, -1)]) AS change
              FROM (
                SELECT toUnixTimestamp64Micro(detected_at) AS told
                FROM alarm_events FINAL
                WHERE transition = 'raised' AND generation = 0
                  AND detected_at >= fromUnixTimestamp64Micro({start:Int64} - 86400000000, 'UTC')
                  AND detected_at < fromUnixTimestamp64Micro({end:Int64}, 'UTC')
              )
            )
            GROUP BY at
          )
        )
      )
    )
  )
)
WHERE flood = 1
GROUP BY calm
HAVING ends_at > {start:Int64}
ORDER BY begins_at
LIMIT {limit:UInt32};

-- name: anomalies
-- Beginnings and ends of anomalies, newest first.
-- param: device Address = '': only of this device
-- param: days UInt32 = 7: days back, today included
-- param: limit UInt32 = 100: most rows
SELECT toUnixTimestamp64Micro(timestamp) AS at, device_id, component_type, pin_position, state, value, unit, expected, score
FROM anomalies FINAL
WHERE (empty({device:Address}) OR device_id IN {device:Address})
  AND timestamp >= toDateTime64(today() - {days:UInt32} + 1, 6, 'UTC')
ORDER BY timestamp DESC, anomaly_id
LIMIT {limit:UInt32};
