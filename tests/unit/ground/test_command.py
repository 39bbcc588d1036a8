"""The `preservarium` command: what needs no server."""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner

from preservarium import __version__
from preservarium.__main__ import CLI_MODULES, cli
from preservarium.settings import env_example

ROOT = Path(__file__).resolve().parents[3]


def _run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "preservarium", *args],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_it_says_its_version() -> None:
    done = _run("--version")
    assert done.returncode == 0
    assert __version__ in done.stdout


def test_every_module_gives_commands_with_help() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in ("migrate", "registry", "topics", "config"):
        assert name in CLI_MODULES
        assert f"\n  {name} " in result.output


def test_every_command_explains_itself() -> None:
    context = cli.make_context("preservarium", [], resilient_parsing=True)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert command.help, f"{name} has no help"
        for sub_name, sub in getattr(command, "commands", {}).items():
            assert sub.help, f"{name} {sub_name} has no help"


def test_a_wrong_setting_is_one_line_and_exit_2() -> None:
    done = _run("topics", PRESERVARIUM_KAFKA__PARTITIONS="many")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "PRESERVARIUM_KAFKA__PARTITIONS" in done.stderr


def test_a_server_that_is_down_is_one_line_and_exit_1() -> None:
    done = _run("topics", PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Kafka at 127.0.0.1:1 cannot be reached" in done.stderr


def test_config_prints_the_example() -> None:
    result = CliRunner().invoke(cli, ["config"])
    assert result.output == env_example()


def test_the_example_in_the_checkout_is_the_program_s() -> None:
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == env_example()


def test_config_show_masks_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESERVARIUM_POSTGRES__PASSWORD", "hunter2")
    monkeypatch.setenv("PRESERVARIUM_SINK__ROWS_MAX", "77")
    plain = CliRunner().invoke(cli, ["config", "show"])
    assert "hunter2" not in plain.output
    assert "* PRESERVARIUM_POSTGRES__PASSWORD=********" in plain.output
    shown = orjson.loads(CliRunner().invoke(cli, ["config", "show", "--json"]).output)
    assert shown["PRESERVARIUM_SINK__ROWS_MAX"] == {"value": 77, "default": False}
    assert shown["PRESERVARIUM_POSTGRES__PORT"] == {"value": 5432, "default": True}
    assert shown["PRESERVARIUM_POSTGRES__URL"]["value"] == ""


def test_a_command_imports_no_stream_engine() -> None:
    code = "import sys; from preservarium.__main__ import cli; cli(['config'], standalone_mode=False); print('faust' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("arguments", [["commands", "send", b"\xff", "open"], ["dlq", "list", b"--device=a\xc3"]])
def test_bytes_that_are_no_text_are_refused_in_one_line(arguments: list[str | bytes]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "preservarium", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "is not text in UTF-8" in done.stderr


#: What asks a server, each in its shortest form.
ASKING = [
    ["topics"], ["topics", "read", "iot_errors"], ["migrate"], ["migrate", "status"], ["registry", "export"],
    ["registry", "verify"], ["dlq", "list"], ["dlq", "show", "0:1"], ["dlq", "redrive"], ["devices", "unknown"], ["alarms", "list"], ["alarms", "show", "a", "b"],
    ["alarms", "acknowledge", "a", "b"], ["alarms", "kpis", "--from", "7d"], ["commands", "list"], ["commands", "show", "x"],
    ["commands", "send", "a", "b"], ["commands", "cancel", "a", "b"], ["sync", "status"], ["sync", "verify"], ["sync", "query", "latest", "device=x"],
    ["db", "postgres", "--json", "-c", "select 1"], ["db", "clickhouse", "-c", "select 1"], ["notices", "test", "--recipient", "x"],
]  # fmt: skip


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
def test_what_cannot_be_reached_is_one_line_without_python(arguments: list[str]) -> None:
    done = _run(
        *arguments,
        PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1",
        PRESERVARIUM_POSTGRES__HOST="127.0.0.1",
        PRESERVARIUM_POSTGRES__PORT="1",
        PRESERVARIUM_CLICKHOUSE__URL="http://127.0.0.1:1",
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    for python in ("Error", "errno", "Errno", "Traceback", "('", "AddressFamily", ": \n"):
        assert python not in done.stderr
