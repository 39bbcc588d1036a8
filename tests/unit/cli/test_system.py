"""Whose servers a command asks: the settings', or those of the `up` that runs in the data directory. Never a mixture."""

import os
from dataclasses import replace

import pytest

from preservarium.cli import system
from preservarium.embedded.joining import SystemNotReady, join_as_worker
from preservarium.embedded.running import Running
from preservarium.settings import PREFIX, SettingsError, load

KAFKA, POSTGRES, CLICKHOUSE = "127.0.0.1:20001", "127.0.0.1:20003", "127.0.0.1:20002"


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Variables as they are, put back at the end: what is taken from a system goes into them."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ[f"{PREFIX}DATA_DIR"] = str(tmp_path / ".preservarium")
    (tmp_path / ".preservarium").mkdir()
    monkeypatch.chdir(tmp_path)
    return os.environ


@pytest.fixture
def up(environment, tmp_path):
    """A system that runs: its note."""
    directory = tmp_path / ".preservarium"
    (directory / "password").write_text("s3cret\n")
    (directory / "url").write_text(f"http://default:t0psecret@{CLICKHOUSE}\n")
    reach = {
        "kafka": {"KAFKA__BOOTSTRAP_SERVERS": KAFKA},
        "postgres": {
            "POSTGRES__HOST": "127.0.0.1", "POSTGRES__PORT": "20003", "POSTGRES__DATABASE": "preservarium",
            "POSTGRES__USER": "preservarium", "POSTGRES__PASSWORD_FILE": str(directory / "password"),
        },
        "clickhouse": {"CLICKHOUSE__URL_FILE": str(directory / "url")},
    }  # fmt: skip
    embedded = {s: {f"{PREFIX}{n}": v for n, v in variables.items()} for s, variables in reach.items()}
    before = {**environment}
    environment.update({name: value for variables in embedded.values() for name, value in variables.items()})
    environment[f"{PREFIX}KAFKA__TOPIC_PREFIX"] = "site1."
    note = Running.ours(directory, "http://127.0.0.1:6066").serving(load(), embedded)
    environment.clear()
    environment.update(before)
    note.write()
    return note


def test_a_command_finds_the_system_and_says_so_once(up, capsys):
    settings = system.load()
    assert settings.kafka.bootstrap_servers == KAFKA
    assert settings.kafka.topic_prefix == "site1."
    assert settings.postgres.dsn == f"postgresql://preservarium:s3cret@{POSTGRES}/preservarium"
    assert settings.clickhouse.parts[:4] == ("127.0.0.1", 20002, "default", "t0psecret")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "using the system that runs in .preservarium\n")
    assert system.load() == settings
    assert load() == settings  # so it is after a reload
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "given",
    [
        {"KAFKA__BOOTSTRAP_SERVERS": "broker:9092"},
        {"POSTGRES__HOST": "db"},
        {"POSTGRES__URL": "postgresql://ann@db/x"},
        {"CLICKHOUSE__URL": "http://ch:8123"},
        {"KAFKA__BOOTSTRAP_SERVERS": KAFKA, "POSTGRES__HOST": "127.0.0.1", "POSTGRES__PORT": "5432"},
    ],
)
def test_an_address_that_is_given_wins_and_nothing_is_mixed(up, environment, capsys, given):
    environment.update({f"{PREFIX}{name}": value for name, value in given.items()})
    expected = load()
    assert system.load() == expected
    assert capsys.readouterr() == ("", "")


def test_the_system_s_own_address_may_be_given(up, environment, capsys):
    environment[f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS"] = KAFKA
    settings = system.load()
    assert settings.postgres.port == 20003
    assert capsys.readouterr().err == "using the system that runs in .preservarium\n"


def test_a_setting_that_is_no_address_is_kept(up, environment):
    environment[f"{PREFIX}KAFKA__PARTITIONS"] = "3"
    environment[f"{PREFIX}POSTGRES__DATABASE"] = "other"  # of another server: here it would be half of one
    settings = system.load()
    assert settings.kafka.partitions == 3
    assert settings.postgres.database == "preservarium"


def test_an_env_file_gives_addresses_too(up, environment, tmp_path, capsys):
    (tmp_path / "own.env").write_text(f"{PREFIX}POSTGRES__HOST=db.example.org\n")
    environment[f"{PREFIX}ENV_FILE"] = str(tmp_path / "own.env")
    assert system.load().kafka.bootstrap_servers == "localhost:9092"
    assert capsys.readouterr() == ("", "")


def test_nothing_runs_nothing_is_said(environment, capsys):
    assert system.load() == load()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("state", ["starting", "stopping"])
def test_a_system_that_is_not_ready_is_waited_for_by_people(up, environment, state):
    Running.ours(up.directory, up.web).write() if state == "starting" else replace(up, state=state).write()
    with pytest.raises(system.SystemNotReady, match=rf"the system in \.preservarium is {state}: try again"):
        system.load()
    environment[f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS"] = "broker:9092"
    assert system.load().kafka.bootstrap_servers == "broker:9092"


def test_a_secret_that_only_the_system_s_environment_has_is_asked_for(environment, tmp_path):
    directory = tmp_path / ".preservarium"
    environment[f"{PREFIX}POSTGRES__URL"] = "postgresql://ann:pw@db.example.org:5433/x"
    note = Running.ours(directory, "").serving(load(), {"kafka": {f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS": KAFKA}})
    note.write()
    del environment[f"{PREFIX}POSTGRES__URL"]
    with pytest.raises(
        SettingsError, match=r"postgres of its own settings \(db\.example\.org:5433/x\).*POSTGRES__… here"
    ):
        system.load()
    environment[f"{PREFIX}POSTGRES__URL"] = "postgresql://ann:pw@db.example.org:5433/x"
    assert system.load().kafka.bootstrap_servers == KAFKA


def test_a_worker_that_is_started_by_hand_is_one_more_of_the_system(up, environment):
    said = join_as_worker()
    settings = load()
    assert said == (
        f"using the system that runs in .preservarium; this worker's console is at port {settings.web.port}, "
        "where --web-port names no other"
    )
    assert (settings.kafka.bootstrap_servers, settings.mqtt.enabled) == (KAFKA, False)
    assert settings.web.port != 6066
    assert join_as_worker() == ""  # it has joined


def test_what_a_worker_is_given_wins(up, environment):
    environment.update({f"{PREFIX}WEB__PORT": "7071", f"{PREFIX}MQTT__ENABLED": "true"})
    assert join_as_worker() == "using the system that runs in .preservarium"
    assert (load().web.port, load().mqtt.enabled) == (7071, True)
    environment[f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS"] = "broker:9092"
    assert join_as_worker() == ""


def test_a_worker_does_not_wait_for_a_system_that_is_not_ready(up, environment):
    replace(up, state="stopping").write()
    with pytest.raises(SystemNotReady, match="is stopping: try again"):
        join_as_worker()


def test_a_worker_of_its_own_system_looks_no_further(environment, capsys):
    before = {**environment}
    assert join_as_worker() == ""
    assert environment == before
