"""compose.yaml, Dockerfile and Procfile name things that exist."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click
import pytest
from ruamel.yaml import YAML

from preservarium.__main__ import cli
from preservarium.embedded.kafka import pinned_version
from preservarium.serving.hosts import is_ours
from preservarium.settings import fields, load

ROOT = Path(__file__).parents[3]
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


def interpolated(value: str, variables: dict[str, str]) -> str:
    """As compose does: once, over what YAML has read."""

    def stand_in(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        if default.startswith(":?"):
            assert variables.get(name), f"compose would refuse: {default[2:]}"
        return variables.get(name) or default.removeprefix(":-").removeprefix(":?")

    return re.sub(r"\$\{(\w+)(:[-?][^}]*)\}", stand_in, value)


@pytest.mark.parametrize(
    "password", [*"@:/#%$'\" &é?[]{}\\", "a@b:c/d#e%f$g'h\"i j&ké", "${HOME}", "$$", "%41", " x ", "]]>", "x\ty"]
)
@pytest.mark.parametrize("name", ["worker", "migrate", "connector-http", "connector-mqtt"])
def test_passwords_of_any_characters_reach_the_workers(
    name: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"POSTGRES_PASSWORD": password, "CLICKHOUSE_PASSWORD": password}
    for variable, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(variable, interpolated(value, variables))
    found = load()
    assert found.clickhouse.parts == ("clickhouse", 8123, "preservarium", password, False)
    assert found.postgres.password.get_secret_value() == password
    user, _, written = found.postgres.dsn.removeprefix("postgresql://").rpartition("@")[0].partition(":")
    assert (user, unquote(written)) == ("preservarium", password)
    # The servers are given the same, each in its own variable.
    assert interpolated(SERVICES["timescaledb"]["environment"]["POSTGRES_PASSWORD"], variables) == password
    assert interpolated(SERVICES["clickhouse"]["environment"]["CLICKHOUSE_PASSWORD"], variables) == password
    assert SERVICES["clickhouse"]["environment"]["CLICKHOUSE_USER"] == "preservarium"


def test_containers_may_ask_for_each_other_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in SERVICES["worker"]["environment"].items():
        monkeypatch.setenv(
            variable,
            interpolated(
                value, {"POSTGRES_PASSWORD": "p", "CLICKHOUSE_PASSWORD": "p", "ALLOWED_HOSTS": "plant.example"}
            ),
        )
    served = {name for name in ("worker", "connector-http") if is_ours(f"{name}:6066", load().web)}
    assert served == {"worker", "connector-http"}
    assert served <= set(SERVICES)
    assert is_ours("plant.example", load().web)
    assert not is_ours("evil.example", load().web)


def test_no_password_stands_in_a_url() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    assert re.findall(r"\w+://\S*\$\{\w*PASSWORD", text) == []


def test_the_image_copies_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)
    assert sources
    assert [s for s in sources if not (ROOT / s).exists()] == []
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(sources) <= allowed


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-worker.lock"])
def test_a_lock_says_when_it_was_resolved(name: str) -> None:
    """What `make audit` reads, and `make lock` writes."""
    first, *rest = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"# Resolved on \d{4}-\d\d-\d\d\.", first)
    assert not any(line.startswith("#") for line in rest), "of an earlier time"
