-- The work-flow of files (docs/TASKS.md). Every statement can be run again.
--
-- What is inserted into task_events goes on into the tables of the materialized views, in the same insert and under its
-- token: with deduplicate_blocks_in_dependent_materialized_views an insert that broke off in the middle is completed by
-- its repetition. Each of these tables is a set by its key, so that a repetition beyond the tokens changes nothing either.

CREATE TABLE IF NOT EXISTS task_events {{clickhouse.on_cluster}} (
  file_id        String                    CODEC(ZSTD(1)),
  event_id       String                    CODEC(ZSTD(1)),
  assigned_at    DateTime64(6, 'UTC')      CODEC(Delta, ZSTD(1)),
  version        UInt256                   CODEC(ZSTD(1)),
  stage          LowCardinality(String),
  status         LowCardinality(String),
  employee_code  LowCardinality(String),
  employee_name  LowCardinality(String),
  started_at     Nullable(DateTime64(6, 'UTC')),
  completed_at   Nullable(DateTime64(6, 'UTC')),
  changed_at     DateTime64(6, 'UTC')      CODEC(Delta, ZSTD(1)),
  task_id        String                    CODEC(ZSTD(1)),
  experiment_id  LowCardinality(String),
  deleted        UInt8
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version)
PARTITION BY toYear(assigned_at)
ORDER BY (file_id, assigned_at, event_id)
TTL toDateTime(assigned_at) + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}}, index_granularity = 1024;

-- The current row of each file: the one with the greatest version. Read with FINAL. Rows of deletions stay, so that a
-- late event does not bring a file back; forced merges keep FINAL at the cost of one part.
CREATE TABLE IF NOT EXISTS pipeline_state {{clickhouse.on_cluster}} (
  file_id        String                    CODEC(ZSTD(1)),
  event_id       String                    CODEC(ZSTD(1)),
  assigned_at    DateTime64(6, 'UTC')      CODEC(Delta, ZSTD(1)),
  version        UInt256                   CODEC(ZSTD(1)),
  stage          LowCardinality(String),
  status         LowCardinality(String),
  employee_code  LowCardinality(String),
  employee_name  LowCardinality(String),
  started_at     Nullable(DateTime64(6, 'UTC')),
  completed_at   Nullable(DateTime64(6, 'UTC')),
  changed_at     DateTime64(6, 'UTC')      CODEC(Delta, ZSTD(1)),
  task_id        String                    CODEC(ZSTD(1)),
  experiment_id  LowCardinality(String),
  deleted        UInt8
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version, deleted)
ORDER BY file_id
SETTINGS {{clickhouse.dedup_window}}, min_age_to_force_merge_seconds = 60;

CREATE MATERIALIZED VIEW IF NOT EXISTS pipeline_state_mv {{clickhouse.on_cluster}} TO pipeline_state AS
SELECT * FROM task_events;

-- Which file was completed at which stage on which day, once: its newest completion of that day.
CREATE TABLE IF NOT EXISTS stage_completions {{clickhouse.on_cluster}} (
  day            Date                      CODEC(Delta, ZSTD(1)),
  stage          LowCardinality(String),
  file_id        String                    CODEC(ZSTD(1)),
  version        UInt256                   CODEC(ZSTD(1)),
  employee_code  LowCardinality(String),
  assigned_at    DateTime64(6, 'UTC')      CODEC(Delta, ZSTD(1)),
  completed_at   DateTime64(6, 'UTC')      CODEC(Delta, ZSTD(1))
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version)
PARTITION BY toYYYYMM(day)
ORDER BY (day, stage, file_id)
TTL day + INTERVAL {{sync.retention_days}} DAY
SETTINGS {{clickhouse.dedup_window}};

CREATE MATERIALIZED VIEW IF NOT EXISTS stage_completions_mv {{clickhouse.on_cluster}} TO stage_completions AS
SELECT toDate(e.completed_at) AS day, e.stage AS stage, e.file_id AS file_id, e.version AS version,
       e.employee_code AS employee_code, e.assigned_at AS assigned_at, assumeNotNull(e.completed_at) AS completed_at
FROM task_events AS e
WHERE e.completed_at IS NOT NULL AND NOT e.deleted;

CREATE TABLE IF NOT EXISTS employees {{clickhouse.on_cluster}} (
  employee_code  String,
  version        UInt256,
  name           String,
  email          String,
  department     LowCardinality(String),
  active         UInt8,
  updated_at     DateTime64(6, 'UTC'),
  deleted        UInt8
) ENGINE = {{clickhouse.replicated}}ReplacingMergeTree(version, deleted)
ORDER BY employee_code
SETTINGS {{clickhouse.dedup_window}};

-- For queries of one's own: dictGetOrDefault('employee_names', 'name', employee_code, '?'). The views below join the table,
-- because a dictionary reads as the user `default`, which on a server may have a password.
CREATE DICTIONARY IF NOT EXISTS employee_names {{clickhouse.on_cluster}} (
  employee_code String,
  name          String,
  department    String
) PRIMARY KEY employee_code
SOURCE(CLICKHOUSE(QUERY 'SELECT employee_code, name, department FROM {{clickhouse.database}}.employees FINAL'))
LAYOUT(COMPLEX_KEY_HASHED())
LIFETIME(MIN 30 MAX 60);

-- What dashboards read; preservarium/stores/dashboards.sql has the same with parameters and limits.

CREATE VIEW IF NOT EXISTS current_files {{clickhouse.on_cluster}} AS
SELECT s.file_id AS file_id, s.stage AS stage, s.status AS status, s.employee_code AS employee_code,
       if(e.name = '', s.employee_name, e.name) AS employee_name, s.assigned_at AS assigned_at,
       s.started_at AS started_at, s.completed_at AS completed_at, s.changed_at AS changed_at,
       s.experiment_id AS experiment_id
FROM pipeline_state AS s FINAL
LEFT JOIN (SELECT employee_code, name FROM employees FINAL) AS e ON e.employee_code = s.employee_code;

CREATE VIEW IF NOT EXISTS files_per_stage {{clickhouse.on_cluster}} AS
SELECT stage, status, count() AS files, min(assigned_at) AS oldest_at
FROM pipeline_state FINAL
GROUP BY stage, status;

CREATE VIEW IF NOT EXISTS employee_load {{clickhouse.on_cluster}} AS
SELECT l.employee_code AS employee_code, if(e.name = '', l.name, e.name) AS employee_name, l.files AS files,
       l.oldest_at AS oldest_at
FROM (
  SELECT employee_code, any(employee_name) AS name, count() AS files, min(assigned_at) AS oldest_at
  FROM pipeline_state FINAL
  WHERE completed_at IS NULL AND employee_code != ''
  GROUP BY employee_code
) AS l
LEFT JOIN (SELECT employee_code, name FROM employees FINAL) AS e ON e.employee_code = l.employee_code;

CREATE VIEW IF NOT EXISTS throughput_per_day {{clickhouse.on_cluster}} AS
SELECT day, stage, count() AS files, uniqExact(employee_code) AS employees
FROM stage_completions FINAL
GROUP BY day, stage;

CREATE VIEW IF NOT EXISTS time_in_stage {{clickhouse.on_cluster}} AS
SELECT day, stage, count() AS files, avg(s) AS mean_s, quantileExact(0.5)(s) AS median_s, quantileExact(0.9)(s) AS p90_s
FROM (
  SELECT day, stage, dateDiff('microsecond', assigned_at, completed_at) / 1e6 AS s FROM stage_completions FINAL
)
GROUP BY day, stage;
