"""The migration runner against a real PostgreSQL and the real ClickHouse engine."""

import asyncio
import time
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from preservarium.embedded.service import free_port
from preservarium.settings import Settings, load
from preservarium.stores.migrate import (
    MIGRATIONS,
    MigrationError,
    connect_postgres,
    load_files,
    migrate_all,
    migrate_clickhouse,
    migrate_postgres,
    postgres_status,
)


@pytest.fixture
def settings(pg_dsn: str) -> Settings:
    return load(postgres={"url": pg_dsn}, clickhouse={"enabled": False})


@pytest.fixture
def files(tmp_path: Path) -> Any:
    def write(store: str = "postgres", **texts: str) -> Path:
        (tmp_path / store).mkdir(exist_ok=True)
        for name, text in texts.items():
            (tmp_path / store / f"{name}.sql").write_text(text)
        return tmp_path

    return write


_CATALOG = """
SELECT 'column', table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns
  WHERE table_schema = 'public'
UNION ALL SELECT 'index', tablename, indexname, indexdef, '', '' FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', ''
  FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'function', proname, pg_get_function_arguments(oid), prosrc, '', '' FROM pg_proc
  WHERE pronamespace = 'public'::regnamespace AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = oid AND d.deptype = 'e')
UNION ALL SELECT 'trigger', tgrelid::regclass::text, tgname, pg_get_triggerdef(oid), '', '' FROM pg_trigger
  WHERE NOT tgisinternal
UNION ALL SELECT 'view', viewname, definition, '', '', '' FROM pg_views WHERE schemaname = 'public'
ORDER BY 1, 2, 3
"""


async def _schema(settings: Settings) -> list[tuple[Any, ...]]:
    connection = await connect_postgres(settings)
    try:
        return [tuple(r) for r in await connection.fetch(_CATALOG)]
    finally:
        await connection.close()


async def test_a_fresh_schema_equals_one_that_was_migrated_step_by_step(
    settings: Settings, postgres: str, tmp_path: Path
) -> None:
    await migrate_postgres(settings)
    fresh = await _schema(settings)

    maintenance = await asyncpg.connect(postgres)
    await maintenance.execute("DROP DATABASE IF EXISTS step_by_step")
    await maintenance.execute("CREATE DATABASE step_by_step")
    try:
        stepwise = load(
            postgres={"url": settings.postgres.dsn.rpartition("/")[0] + "/step_by_step" + _query(settings.postgres.dsn)}
        )
        folder = tmp_path / "postgres"
        folder.mkdir()
        for migration in load_files("postgres"):
            (folder / migration.file).write_text(migration.text)
            await migrate_postgres(stepwise, directory=tmp_path)
        migrated = await _schema(stepwise)
    finally:
        await maintenance.execute("DROP DATABASE step_by_step WITH (FORCE)")
        await maintenance.close()
    assert migrated == fresh
    assert len(fresh) > 100


def _query(dsn: str) -> str:
    return "?" + dsn.partition("?")[2] if "?" in dsn else ""


async def test_the_second_run_does_nothing(settings: Settings) -> None:
    first = await migrate_postgres(settings)
    second = await migrate_postgres(settings)
    assert first.applied == [f.file for f in first.files if f.status == "completed"]
    assert first.layout in {"timescaledb", "plain"}
    assert second.applied == []
    assert second.pending == []
    assert second.layout_remembered


async def test_runners_at_the_same_time_apply_each_file_once(settings: Settings, files: Any) -> None:
    # The second file would fail if it ran twice, and the first gives the others time to come in between.
    directory = files(
        **{"0001_a": "SELECT pg_sleep(0.3); CREATE TABLE a (x int);", "0002_b": "CREATE TABLE b (x int);"}
    )
    reports = await asyncio.gather(*(migrate_postgres(settings, directory=directory) for _ in range(4)))
    assert sorted(r.applied for r in reports) == [[], [], [], ["0001_a.sql", "0002_b.sql"]]


async def test_a_wrong_statement_is_named_and_its_file_leaves_nothing(settings: Settings, files: Any) -> None:
    directory = files(
        **{"0001_a": "CREATE TABLE a (x int);", "0002_b": "CREATE TABLE b (x int);\nCREATE TABLE a (x int);"}
    )
    with pytest.raises(
        MigrationError, match=r"postgres/0002_b\.sql: statement 2 \(line 2\): relation \"a\" already exists"
    ):
        await migrate_postgres(settings, directory=directory)
    status = await postgres_status(settings, directory=directory)
    assert [f.status for f in status.files] == ["completed", "not_started"]
    assert not [row for row in await _schema(settings) if row[1] == "b"]
    files(**{"0002_b": "CREATE TABLE b (x int);"})
    assert (await migrate_postgres(settings, directory=directory)).applied == ["0002_b.sql"]


async def test_an_edited_file_is_an_error(settings: Settings, files: Any) -> None:
    directory = files(**{"0001_a": "CREATE TABLE a (x int);"})
    await migrate_postgres(settings, directory=directory)
    files(**{"0001_a": "CREATE TABLE a (x bigint);"})
    with pytest.raises(MigrationError, match="was edited after it was applied"):
        await migrate_postgres(settings, directory=directory)


async def test_a_file_below_an_applied_one_is_an_error(settings: Settings, files: Any) -> None:
    directory = files(**{"0002_b": "CREATE TABLE b (x int);"})
    await migrate_postgres(settings, directory=directory)
    files(**{"0001_a": "CREATE TABLE a (x int);"})
    with pytest.raises(MigrationError, match="give it a higher number"):
        await migrate_postgres(settings, directory=directory)


async def test_a_missing_file_is_an_error_and_a_newer_database_is_not(settings: Settings, files: Any) -> None:
    directory = files(**{f"000{i}_t": f"CREATE TABLE t{i} (x int);" for i in (1, 2, 3)})
    await migrate_postgres(settings, directory=directory)
    (directory / "postgres" / "0003_t.sql").unlink()
    assert (await migrate_postgres(settings, directory=directory)).newer == ["0003"]
    (directory / "postgres" / "0001_t.sql").unlink()
    with pytest.raises(MigrationError, match="0001 was applied and its file is missing"):
        await migrate_postgres(settings, directory=directory)


async def test_layouts_choose_files(settings: Settings, files: Any) -> None:
    directory = files(
        **{
            "0001_both": "CREATE TABLE a (x int);",
            "0001a_ts": "-- requires: timescaledb\nCREATE TABLE ts (x int);",
            "0001b_plain": "-- requires: plain\nCREATE TABLE plain (x int);",
        }
    )
    report = await migrate_postgres(settings, directory=directory)
    wanted = {"timescaledb": "0001a_ts.sql", "plain": "0001b_plain.sql"}[str(report.layout)]
    assert report.applied == ["0001_both.sql", wanted]
    assert sorted(f.status for f in report.files) == ["completed", "completed", "not_needed"]


async def test_the_remembered_layout_wins_over_what_the_server_can_do(settings: Settings, files: Any) -> None:
    directory = files(**{"0001_a": "CREATE TABLE a (x int);"})
    await migrate_postgres(settings, directory=directory)
    connection = await connect_postgres(settings)
    await connection.execute("UPDATE schema_facts SET value = 'timescaledb' WHERE name = 'layout'")
    await connection.close()
    files(**{"0002_p": "-- requires: plain\nCREATE TABLE p (x int);"})
    report = await migrate_postgres(settings, directory=directory)
    assert report.layout == "timescaledb"
    assert report.applied == []


async def test_what_the_apache_edition_of_timescaledb_left_halfway_is_laid_out_anew(
    settings: Settings, tmp_path: Path
) -> None:
    """A server says its edition in a setting, with the extension or without; a run that did not know it ended at 0002a."""
    connection = await connect_postgres(settings)
    try:
        if await connection.fetchval("SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')"):
            pytest.skip("the extension's own setting can be changed in the server's file alone")
        name = await connection.fetchval("SELECT current_database()")
        (tmp_path / "postgres").mkdir()
        for file in load_files("postgres"):
            if file.version <= "0002":
                (tmp_path / "postgres" / file.file).write_text(file.text)
        await migrate_postgres(settings, directory=tmp_path)
        await connection.execute("UPDATE schema_facts SET value = 'timescaledb' WHERE name = 'layout'")
        assert (await postgres_status(settings)).layout == "timescaledb"
        await connection.execute(f"ALTER DATABASE \"{name}\" SET timescaledb.license = 'apache'")
    finally:
        await connection.close()
    assert (await postgres_status(settings)).layout == "plain"
    report = await migrate_postgres(settings)
    assert (report.layout, report.layout_remembered, report.pending) == ("plain", True, [])
    assert (await postgres_status(settings)).layout == "plain"


async def test_a_dry_run_writes_nothing(settings: Settings) -> None:
    report = await migrate_postgres(settings, dry_run=True)
    assert next(f.file for f in report.pending) == "0001_registry.sql"
    assert not report.layout_remembered
    assert await _schema(settings) == []


async def test_an_interrupted_file_without_transaction_is_run_again(settings: Settings, files: Any) -> None:
    text = "-- no-transaction\nCREATE TABLE IF NOT EXISTS a (x int);\nCREATE INDEX CONCURRENTLY IF NOT EXISTS a_x ON a ({});"
    directory = files(**{"0001_a": text.format("y")})
    with pytest.raises(MigrationError, match=r"statement 2 \(line 3\)"):
        await migrate_postgres(settings, directory=directory)
    assert (await postgres_status(settings, directory=directory)).files[0].status == "in_progress"
    files(**{"0001_a": text.format("x")})
    report = await migrate_postgres(settings, directory=directory)
    assert report.files[0].status == "completed"


async def test_blocking_files_need_leave_on_a_database_in_use(settings: Settings, files: Any) -> None:
    directory = files(**{"0001_a": "-- blocking\nCREATE TABLE a (x int);"})
    # Nothing can be blocked in a fresh database.
    await migrate_postgres(settings, directory=directory, allow_blocking=False)
    files(**{"0002_b": "-- blocking\nALTER TABLE a ADD y int;"})
    with pytest.raises(MigrationError, match="marked blocking"):
        await migrate_postgres(settings, directory=directory, allow_blocking=False)
    assert (await migrate_postgres(settings, directory=directory, allow_blocking=True)).applied == ["0002_b.sql"]


async def test_a_server_that_is_not_there_is_waited_for_and_then_given_up() -> None:
    settings = load(postgres={"host": "127.0.0.1", "port": free_port(), "password": "secret-word"})
    started = time.monotonic()
    with pytest.raises(MigrationError, match=r"PostgreSQL cannot be reached .* tried for 1 s") as caught:
        await migrate_postgres(settings, wait_s=1.0)
    assert 0.5 <= time.monotonic() - started < 10
    assert "secret-word" not in str(caught.value)


# --- ClickHouse


@pytest.fixture
def both(pg_dsn: str, clickhouse: str, clickhouse_database: str) -> Settings:
    return load(postgres={"url": pg_dsn}, clickhouse={"url": clickhouse, "database": clickhouse_database})


async def test_clickhouse_is_migrated_once(both: Settings) -> None:
    first = await migrate_all(both)
    second = await migrate_all(both)
    assert [r.store for r in first] == ["postgres", "clickhouse"]
    assert first[1].applied == [m.file for m in load_files("clickhouse", MIGRATIONS)]
    assert all(f.status == "completed" for f in second[1].files)
    assert second[1].applied == []


async def test_a_clickhouse_file_that_failed_halfway_is_run_again(both: Settings, files: Any) -> None:
    good = "CREATE TABLE IF NOT EXISTS a (x Int8) ENGINE = MergeTree ORDER BY x;\n"
    directory = files("clickhouse", **{"0001_a": good + "CREATE TABLE IF NOT EXISTS b (x NoSuchType) ENGINE = Memory;"})
    with pytest.raises(MigrationError, match=r"clickhouse/0001_a\.sql: statement 2 \(line 2\)"):
        await migrate_clickhouse(both, directory=directory)
    assert (await migrate_clickhouse(both, directory=directory, dry_run=True)).files[0].status == "in_progress"
    files("clickhouse", **{"0001_a": good})
    report = await migrate_clickhouse(both, directory=directory)
    assert report.files[0].status == "completed"
    assert report.files[0].applied_at is not None
