"""Schema migrations of PostgreSQL and ClickHouse: forward only, checksummed, one runner at a time.

The rules for the files are in migrations/README.md; `lint` checks a file against them. What was applied is recorded in
`schema_migrations` of each database; what the PostgreSQL database can do (TimescaleDB or plain partitions) is found out
at the first migration and remembered in `schema_facts`, because the two layouts do not mix.

Some SQL stands twice and must: `postgres/0002a_measurements_timescaledb.sql` and `postgres/0002b_measurements_plain.sql` both have
the columns of `measurements`, `iot_measurements`, `measurements_late`, `merge_late` and `recent_activity`. They are released and checksummed, and a
released file is never edited. What changes these objects in both layouts goes once, into a file of its own.

| file | what |
|---|---|
| files.py | files read, ordered, checked |
| statements.py | SQL cut into statements, settings put in |
| progress.py | files beside what was applied |
| postgres.py, clickhouse.py | each database's way |
| runner.py | both |
"""

from preservarium.stores.migrate.clickhouse import connect_clickhouse, migrate_clickhouse
from preservarium.stores.migrate.files import MIGRATIONS, Layout, Migration, Store, lint, load_files, parse_file
from preservarium.stores.migrate.postgres import (
    LOCK_KEY,
    LOCK_WAIT_S,
    TABLE_LOCK_WAIT_S,
    connect_postgres,
    detect_layout,
    migrate_postgres,
    postgres_status,
    runner_lock,
)
from preservarium.stores.migrate.progress import FileState, Report, Status
from preservarium.stores.migrate.runner import migrate_all
from preservarium.stores.migrate.statements import DEDUP_BLOCKS, MigrationError, Statement, split, substitute

__all__ = [
    "DEDUP_BLOCKS",
    "LOCK_KEY",
    "LOCK_WAIT_S",
    "MIGRATIONS",
    "TABLE_LOCK_WAIT_S",
    "FileState",
    "Layout",
    "Migration",
    "MigrationError",
    "Report",
    "Statement",
    "Status",
    "Store",
    "connect_clickhouse",
    "connect_postgres",
    "detect_layout",
    "lint",
    "load_files",
    "migrate_all",
    "migrate_clickhouse",
    "migrate_postgres",
    "parse_file",
    "postgres_status",
    "runner_lock",
    "split",
    "substitute",
]
