"""`preservarium migrate` and `preservarium registry` as people and scripts call them, on a real PostgreSQL."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result

from preservarium.__main__ import cli
from preservarium.stores.migrate import load_files

REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes: [{name: temperature, kind: number, unit: degC}]
parsers: [{name: acme, kind: table, source: {fields: [{name: t, type: u8}]}}]
device_types: [{name: T1, manufacturer: Acme, parser: acme}]
devices: [{device_id: "0001", type: T1, name: Lab}]
"""


@pytest.fixture
def run(pg_dsn_module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__URL", pg_dsn_module)
    monkeypatch.setenv("PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("PRESERVARIUM_CLICKHOUSE__ENABLED", "false")

    def command(*args: str) -> Result:
        return CliRunner().invoke(cli, list(args))

    return command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "registry.yaml"
    path.write_text(REGISTRY)
    return path


def test_migrate_says_what_it_would_do_and_what_it_did(run: Any) -> None:
    files = [m.file for m in load_files("postgres")]
    assert run("migrate", "status").exit_code == 1  # something is pending
    planned = orjson.loads(run("migrate", "--only", "postgres", "--dry-run", "--json").stdout)["stores"][0]
    assert planned["pending"]
    assert set(planned["pending"]) <= set(files)
    done = run("migrate", "--only", "postgres", "--json")
    assert done.exit_code == 0
    assert orjson.loads(done.stdout)["stores"][0]["applied"] == planned["pending"]
    status = run("migrate", "status")
    assert status.exit_code == 0
    assert "TimescaleDB" in status.output
    assert "0001_registry.sql" in status.output


def test_registry_commands_tell_one_story(run: Any, file: Path) -> None:
    run("migrate", "--only", "postgres")
    checked = orjson.loads(run("registry", "check", str(file), "--json").stdout)
    assert (checked["ok"], checked["documents"]["device"]) == (True, 1)

    dry = run("registry", "apply", str(file), "--dry-run")
    assert "+ device/0001" in dry.output
    assert "To create 5" in dry.output
    applied = orjson.loads(run("registry", "apply", str(file), "--actor", "ann", "--json").stdout)
    assert applied["counts"] == {"create": 5, "change": 0, "remove": 0, "unchanged": 0}
    assert applied["records"] == "pending"  # Kafka is down
    again = run("registry", "apply", str(file))
    assert "Nothing to change: 5 documents are as the file says." in again.output

    file.write_text(REGISTRY.replace("name: Lab", "name: Yard"))
    changed = run("registry", "apply", str(file))
    assert changed.exit_code == 0
    assert 'name: "Lab" → "Yard"' in changed.output
    assert "a worker will send them" in changed.stderr

    got = orjson.loads(run("registry", "get", "0001", "--json").stdout)
    assert (got["device"]["name"], got["type"]["name"], got["parser"]["version"]) == ("Yard", "T1", 1)
    history = orjson.loads(run("registry", "history", "device/0001", "--json").stdout)
    assert (history[0]["version"], history[0]["type"], history[0]["actor"]) == (1, "created", "ann")
    assert history[1]["data"] == {"set": {"name": "Yard"}}
    assert "created by ann" in run("registry", "history", "device/0001").output
    assert orjson.loads(run("registry", "verify", "--json").stdout)["ok"]

    exported = run("registry", "export")
    assert exported.exit_code == 0
    file.write_text(exported.stdout)
    assert "Nothing to change" in run("registry", "apply", str(file), "--prune").output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("registry", "get", "nowhere"), "there is no device 'nowhere'"),
        (("registry", "history", "device/nowhere"), "there is no stream 'device/nowhere'"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_1(run: Any, args: tuple[str, ...], message: str) -> None:
    run("migrate", "--only", "postgres")
    result = run(*args)
    assert result.exit_code == 1
    assert result.stderr == f"preservarium: {message}\n"


def test_a_wrong_file_is_named_with_its_lines_and_exit_1(run: Any, file: Path) -> None:
    run("migrate", "--only", "postgres")
    file.write_text(REGISTRY.replace("type: T1, name", "type: T2, nam"))
    for command in ("check", "apply"):
        result = run("registry", command, str(file))
        assert result.exit_code == 1
        assert f"{file}:5: devices[0].nam: unknown key; did you mean name?" in result.stderr
