-- Merge more parts at once in the tables that every insert goes into. The engine takes small parts together when there are
-- as many as the base, and each insert makes one in each of these tables: with the base of 5 that it has by itself each row
-- was merged ten times in the first half million, with 12 three times (docs/PERFORMANCE.md). Reading with FINAL is as fast
-- as before: there are some 12 parts instead of 6 while rows arrive, and one where parts are merged for their age.

ALTER TABLE measurements {{clickhouse.on_cluster}} MODIFY SETTING merge_selector_base = 12;
ALTER TABLE latest_values {{clickhouse.on_cluster}} MODIFY SETTING merge_selector_base = 12;
ALTER TABLE measurement_days {{clickhouse.on_cluster}} MODIFY SETTING merge_selector_base = 12;
ALTER TABLE aggregates {{clickhouse.on_cluster}} MODIFY SETTING merge_selector_base = 12;
ALTER TABLE task_events {{clickhouse.on_cluster}} MODIFY SETTING merge_selector_base = 12;
ALTER TABLE pipeline_state {{clickhouse.on_cluster}} MODIFY SETTING merge_selector_base = 12;
ALTER TABLE stage_completions {{clickhouse.on_cluster}} MODIFY SETTING merge_selector_base = 12;
