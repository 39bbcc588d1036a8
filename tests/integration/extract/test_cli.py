"""`preservarium extract` as a user meets it, on a real PostgreSQL."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from click.testing import CliRunner, Result
from sink_support import live

from preservarium.__main__ import cli
from preservarium.extract.service import LEADER_LOCK_KEY
from preservarium.stores.migrate import MIGRATIONS, migrate_postgres


class Shell:
    """Runs commands with the settings of one database, the ledger's and the source's."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.environment = {
            "PRESERVARIUM_POSTGRES__URL": dsn, "PRESERVARIUM_EXTRACT__URL": dsn, "PRESERVARIUM_EXTRACT__EMPLOYEES_TABLE": "",
        }  # fmt: skip

    def __call__(self, *arguments: str, answer: str = "", **environment: str) -> Result:
        given = self.environment | {f"PRESERVARIUM_{name}": value for name, value in environment.items()}
        return CliRunner().invoke(cli, ["extract", *arguments], input=answer, env=given)

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return orjson.loads(result.stdout)

    def execute(self, statement: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(self.dsn, timeout=10)
            await connection.execute(statement)
            await connection.close()

        asyncio.run(run())


@pytest.fixture
def shell(pg_dsn: str, tmp_path: Path) -> Shell:
    (tmp_path / "postgres").mkdir()
    shutil.copy(MIGRATIONS / "postgres" / "0012_extract.sql", tmp_path / "postgres")
    asyncio.run(migrate_postgres(live(postgres={"url": pg_dsn})(), directory=tmp_path))
    return Shell(pg_dsn)


def test_a_look_at_the_source(shell: Shell) -> None:
    refused = shell("check")
    assert (refused.exit_code, refused.stderr) == (1, "preservarium: there is no table tasks in the source\n")
    shell.execute("CREATE TABLE tasks (id bigint PRIMARY KEY, file_id text, stage text, updated_at timestamptz)")
    assert shell.json("check") == [{"table": "tasks", "example": None}]
    shell.execute("INSERT INTO tasks SELECT i, 'f1', 's', '2026-01-03 00:00+00' FROM generate_series(1, 700) i")
    ((found),) = shell.json("check")
    assert found["example"]["file_id"] == "f1"
    assert found["example"]["updated_at"] == 1767398400000000
    assert "file_id         f1" in shell("check").output
    assert shell.json("status")["tables"] == []


@pytest.mark.parametrize(
    ("url", "code", "told"),
    [
        ("", 1, "PRESERVARIUM_EXTRACT__URL is not set"),
        # A setting that is wrong whatever the database says.
        (
            "mysql://host/db",
            2,
            "PRESERVARIUM_EXTRACT__URL: is not of the form postgresql|postgres|mongodb|mongodb+srv://",
        ),
        ("postgresql://user:secret@host:port/db", 2, "PRESERVARIUM_EXTRACT__URL: is not of the form host[:port]"),
        ("postgresql://user:secret@127.0.0.1:9/db", 1, "the database cannot be asked: connection refused"),
        ("mongodb://127.0.0.1:9/", 1, "names no database"),
    ],
)
def test_mistakes_are_one_line_without_the_password(shell: Shell, url: str, code: int, told: str) -> None:
    result = shell("check", EXTRACT__URL=url)
    assert result.exit_code == code
    assert told in result.stderr
    assert result.stderr.count("\n") == 1
    assert "secret" not in result.output


def test_status_and_having_everything_sent_again(shell: Shell) -> None:
    shell.execute(
        "INSERT INTO extract_positions (source, position, pending) VALUES ('tasks', '{\"at\": \"2026-01-01\"}', '[[1], [2]]'), ('employees', '{}', NULL);"
        "INSERT INTO extract_rows SELECT 'tasks', i::text, CASE WHEN i < 4 THEN -1 ELSE 1 END, 0, 0, 0, 'f', 0 FROM generate_series(1, 50) i"
    )
    found = shell.json("status")
    assert not found["leads"]
    tasks = found["tables"][1]
    assert (tasks["rows"], tasks["gone"], tasks["pending"], tasks["position"]) == (47, 3, 2, {"at": "2026-01-01"})
    assert "no worker extracts now" in shell("status").output
    assert shell("again", "--table", "tasks", answer="n\n").exit_code == 1
    assert shell.json("status")["tables"][1] == tasks
    assert shell.json("again", "--table", "tasks", "--yes") == {"tables": ["tasks"], "rows": 47}
    employees, tasks = shell.json("status")["tables"]
    assert (employees["position"], tasks["position"], tasks["rows"]) == (None, {"again": True}, 47)


async def test_nothing_is_sent_again_while_a_worker_extracts(shell: Shell) -> None:
    worker = await asyncpg.connect(shell.dsn)
    await worker.execute("SELECT pg_advisory_lock($1)", LEADER_LOCK_KEY)
    assert (await asyncio.to_thread(shell.json, "status"))["leads"]
    result = await asyncio.to_thread(shell, "again", "--yes")
    assert (result.exit_code, result.stderr) == (
        1,
        "preservarium: a worker extracts now: stop the workers first\n",
    )
    await worker.close()
