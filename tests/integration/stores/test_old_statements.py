"""Every line of the guide's tables: what the old service's manual has, and what it says stands for it here.

On a database of the old service that was migrated and whose rows were carried over.
"""

import asyncio
import io
import re
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from documented import ROOT
from sink_support import execute, fetch, leave_alone, on_server
from thread_support import in_thread

from preservarium.__main__ import cli
from preservarium.settings import load
from preservarium.stores.adoption import Adoption
from preservarium.stores.migrate import migrate_postgres

GUIDE = ROOT / "docs/guides/timescale.md"
_ROW = re.compile(r"^\| (?P<old>.+?) \| (?P<new>.+) \|$")
_CODE = re.compile(r"`([^`]+)`")
_SQL = ("SELECT", "INSERT", "COPY")
OLD = """
CREATE TABLE iot_measurements (timestamp TIMESTAMPTZ NOT NULL, device_id VARCHAR(50) NOT NULL, connector_mode VARCHAR(50) NOT NULL,
  component_type VARCHAR(50) NOT NULL, pin_position VARCHAR(10), value DOUBLE PRECISION, unit VARCHAR(20), topic VARCHAR(255),
  PRIMARY KEY (timestamp, device_id, connector_mode, component_type, pin_position));
INSERT INTO iot_measurements SELECT now() - i * INTERVAL '10 minutes', 'f2-e4fd45f654be', 'LoRaWAN', 'Temperature', '-1', i, '°C', 'a/b'
  FROM generate_series(1, 500) AS i;
"""


def sections() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The lines of the table of statements, and of that of the shell."""
    _, statements, shell = re.split(r"^\| old \| new \|\n\|---\|---\|\n", GUIDE.read_text(encoding="utf-8"), flags=re.M)
    found = []
    for text in (statements, shell):
        lines = text.split("\n\n")[0].splitlines()
        matches = [_ROW.match(line.replace(r"\|", "¦")) for line in lines]
        assert all(matches), lines
        found.append([(m["old"].replace("¦", "|"), m["new"].replace("¦", "|")) for m in matches if m])
    return found[0], found[1]


STATEMENTS, SHELL = sections()


async def carry_over(dsn: str) -> None:
    await migrate_postgres(load(postgres={"url": dsn}))
    connection = await asyncpg.connect(dsn)
    found = await (await Adoption.of(connection, load())).run(rest=0)
    assert (found.stored, found.done) == (500, True)
    await connection.close()


@pytest.fixture(scope="module")
def carried(postgres: str) -> Iterator[str]:
    """DSN of the old service's database, taken over."""
    name = "test_old_statements"
    in_thread(execute(postgres, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
    in_thread(execute(postgres, f'CREATE DATABASE "{name}"'))
    dsn = on_server(postgres, name)
    in_thread(execute(dsn, OLD))
    in_thread(carry_over(dsn))
    yield dsn
    in_thread(leave_alone(postgres, name))
    in_thread(execute(postgres, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


def run(command: str) -> str:
    """Run one of our commands as the guide prints it."""
    arguments = re.findall(r'"[^"]*"|\S+', command.removeprefix("preservarium "))
    done = CliRunner().invoke(cli, [a.strip('"') for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, (command, done.output)
    return done.output


async def ask(dsn: str, statement: str) -> Any:
    if not statement.startswith("COPY"):
        return await fetch(dsn, statement)
    connection = await asyncpg.connect(dsn)
    columns = re.findall(r"\w+", statement.split("(")[1].split(")")[0])
    line = b"now,f2-e4fd45f654be,LoRaWAN,Temperature,-1,1,C,a\n"
    done = await connection.copy_to_table("iot_measurements", source=io.BytesIO(line), columns=columns, format="csv")
    await connection.close()
    return done


def test_the_guide_has_every_statement_of_the_manual():
    old = " ".join(statement for statement, _ in STATEMENTS)
    for word in (
        "CREATE TABLE", "create_hypertable", "idx_iot_device_id", "INSERT INTO", "copy_from", "LIMIT 100", "hypertables", "measurement_count",
        "timescaledb_information.chunks", "compress_segmentby", "add_compression_policy", "set_chunk_time_interval", "add_retention_policy",
        "compressed_chunk_id", "compression_settings", "records_per_minute", "total_records", "LIMIT 10", "avg_temp", "avg_value", "compress_chunk",
        "pg_total_relation_size", "pg_stat_activity", "pg_stat_statements", "LAG(", "null_values", "recent_activity", "compression_stats", "\\d",
    ):  # fmt: skip
        assert word in old, word
    assert len(STATEMENTS) == 30
    assert len(SHELL) == 3


@pytest.mark.parametrize("number", range(len(STATEMENTS)))
async def test_an_old_statement_and_what_stands_for_it(postgres, carried, number, monkeypatch):
    old, new = STATEMENTS[number]
    hyper = bool(await fetch(postgres, "SELECT 1 FROM pg_available_extensions WHERE name = 'timescaledb'"))
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", carried)
    if "†" in old and not hyper:
        pytest.skip("missing: TimescaleDB (give TEST_POSTGRES_URL of a server that has it)")
    wanted = [code for code in _CODE.findall(new) if code.startswith((*_SQL, "preservarium "))]
    if new.startswith("the same"):
        (statement,) = _CODE.findall(old)
        wanted.insert(0, statement)
    if "pg_stat_statements" in old:
        return  # an extension that needs a setting of the server
    assert wanted, new
    answers = []
    for one in wanted:
        if one.startswith("preservarium "):
            answers.append(await asyncio.to_thread(run, one))
        else:
            answers.append(await ask(carried, one))
    # What answers of rows has an answer.
    if "iot_measurements" in wanted[0] and wanted[0].startswith("SELECT"):
        assert answers[0]
    if new.startswith("the same; ") and "of whole hours" not in new:
        assert len(answers[0]) == len(answers[1])
