"""What the doctor says of a machine, without any server."""

import shutil
from collections import namedtuple
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner

from preservarium.__main__ import cli
from preservarium.cli.doctor import State, check_clock, check_disk, check_java, check_skew
from preservarium.embedded.service import free_port

P = "PRESERVARIUM_"
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "state"), [(100 << 30, State.GREEN), (5 << 30, State.YELLOW), (100 << 20, State.RED)])
def test_the_disk(free: int, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(200 << 30, 0, free))
    found = check_disk(tmp_path / "not" / "yet" / "there")
    assert (found.state, bool(found.advice)) == (state, state != State.GREEN)
    assert str(tmp_path) in found.found


@pytest.mark.parametrize(
    ("skew_s", "state"), [(0.2, State.GREEN), (-0.9, State.GREEN), (2, State.YELLOW), (-100, State.RED)]
)
def test_the_skew_counts_both_ways(skew_s: float, state: State) -> None:
    found = check_skew(1e9, 1e9 + skew_s)
    assert found.state == state
    assert ("ahead" in found.found) == (skew_s > 0)


def test_a_clock_that_was_never_set_is_red() -> None:
    assert check_clock(3600.0).state == State.RED
    assert check_clock().state == State.GREEN


def test_without_java_the_doctor_tells_of_the_in_memory_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    found = check_java()
    assert found.state == State.YELLOW
    assert "in-memory broker" in found.advice


def test_a_wrong_kafka_home_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"21.0.1\" 2024' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    found = check_java()
    assert (found.state, "Java 21" in found.found) == (State.RED, True)


def test_what_does_not_answer_is_red_with_advice_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{P}KAFKA__BOOTSTRAP_SERVERS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv(f"{P}POSTGRES__URL", f"postgresql://u:hush@127.0.0.1:{free_port()}/d")
    monkeypatch.setenv(f"{P}CLICKHOUSE__URL", f"http://u:hush@127.0.0.1:{free_port()}")
    monkeypatch.setenv(f"{P}MQTT__ENABLED", "true")
    monkeypatch.setenv(f"{P}MQTT__URL", f"mqtt://u:hush@127.0.0.1:{free_port()}")
    run = CliRunner().invoke(cli, ["doctor", "--json"])
    assert run.exit_code == 1, run.output
    answer = orjson.loads(run.stdout)
    assert answer["state"] == "red"
    red = {f["name"]: f for f in answer["findings"] if f["state"] == "red"}
    assert set(red) == {"kafka", "postgres", "clickhouse", "mqtt"}
    assert all(P in f["advice"] for f in red.values())
    assert "hush" not in run.output


def test_people_get_a_line_for_each_check(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(cli, ["doctor", "--up"])
    for name in ("python", "packages", "clock", "disk", "open files", "memory", "java", "engines"):
        assert sum(line[2:].startswith(name) for line in run.stdout.splitlines()) == 1, name
