"""compose.yaml, Dockerfile and Procfile name things that exist."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
from ruamel.yaml import YAML

from preservarium.__main__ import cli
from preservarium.embedded.kafka import pinned_version
from preservarium.settings import fields

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = YAML(typ="safe").load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VARIABLES = {f.variable for f in fields()}
PROCESSES = dict(
    line.split(": ", 1) for line in (ROOT / "Procfile").read_text(encoding="utf-8").splitlines() if line.strip()
)


def commands() -> dict[str, list[str]]:
    found = {name: s["command"] for name, s in SERVICES.items() if isinstance(s.get("command"), list)}
    return found | {f"Procfile {name}": text.split() for name, text in PROCESSES.items()}


@pytest.mark.parametrize(("name", "words"), commands().items())
def test_every_command_exists(name: str, words: list[str]) -> None:
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    program, *rest = words
    if program == "faust":
        assert rest[:3] == ["-A", "preservarium", "worker"]
        assert import_module("faust")
        return
    assert program == "preservarium"
    command: click.Command = cli
    context = click.Context(cli)
    # A group may be a command of its own, too: `preservarium migrate`.
    while isinstance(command, click.Group) and not (command.invoke_without_command and not rest):
        found = command.get_command(context, rest.pop(0))
        assert found is not None, f"{name}: no such command"
        command = found
    # Parsing is enough: a wrong option raises.
    command.make_context(name, rest)


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_of_ours_is_a_setting(name: str) -> None:
    environment = SERVICES[name].get("environment", {})
    ours = {v for v in environment if v.startswith("PRESERVARIUM_")}
    assert ours - VARIABLES == set()


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_waits_for_is_there_and_can_be_waited_for(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert other in SERVICES
        if how["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert how["condition"] == "service_completed_successfully"
            assert SERVICES[other]["restart"] in ("no", "on-failure")


def test_volumes_are_declared_and_used() -> None:
    used = {v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", []) if not v.startswith((".", "/"))}
    assert used == set(COMPOSE["volumes"])


def test_the_brokers_are_of_one_version() -> None:
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{pinned_version()}"


def test_no_secret_has_a_default() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    assert re.findall(r"\$\{\w*PASSWORD[^}]*\}", text)
    assert [m for m in re.findall(r"\$\{(\w*PASSWORD[^}]*)\}", text) if ":?" not in m] == []


def test_the_image_copies_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)
    assert sources
    assert [s for s in sources if not (ROOT / s).exists()] == []
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) <= allowed
