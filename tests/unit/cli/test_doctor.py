"""What the doctor says of a machine, without any server."""

import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preservarium.__main__ import cli
from preservarium.cli import doctor
from preservarium.cli.doctor import State, check_clock, check_disk, check_java, check_skew, jobs_finding
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


#: A word for each way in which an address can be wrong, or lead nowhere. None leaves this machine.
PLACES = ["", "127.0.0.1", "127.0.0.1:1", "localhost:1", "[::1]:1", "[::1", "no-such-host.invalid:1", "127.0.0.1:0", "127.0.0.1:99999", "127.0.0.1:x", "127.0.0.1:1,127.0.0.1:2",
          "999.999.999.999:1", "-:1", "a b:1", "é.invalid:1", "x" * 300 + ":1", "127.0.0.1:1/d", "/no/socket", "\udcff:1", "..:1"]  # fmt: skip
SCHEMES = [
    "",
    "http://",
    "https://",
    "postgresql://",
    "mqtt://",
    "mqtts://",
    "kafka://",
    "mongodb://",
    "://",
    "HTTP://",
]
USERS = ["", "u:hush-hush@", "u:hush@hush@", "u:hush/hush@", "u:%zz-hush@", "@", ":@"]
ADDRESSES = ["KAFKA__BOOTSTRAP_SERVERS", "POSTGRES__URL", "POSTGRES__HOST", "CLICKHOUSE__URL", "MQTT__URL"]


def run_doctor() -> Result:
    run = CliRunner().invoke(cli, ["doctor", "--json"])
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    assert "Traceback" not in run.output
    assert "hush" not in run.output
    if run.exit_code == 2:
        # Before there is anything to check: a line that names the setting.
        assert re.fullmatch(r"preservarium: PRESERVARIUM_\w+: [^\n]+\n", run.output), run.output
    else:
        answer = orjson.loads(run.stdout)
        assert run.exit_code == (1 if answer["state"] == "red" else 0)
        # What goes wrong in a check is found by the check, with what to do.
        assert not [f for f in answer["findings"] if "cannot be checked" in f["found"]], run.output
        assert all(f["advice"] for f in answer["findings"] if f["state"] == "red")
    return run


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing answers, and nobody is waited for."""
    monkeypatch.setattr(doctor, "PROBE_S", 0.3)
    for name in ("KAFKA__BOOTSTRAP_SERVERS", "POSTGRES__HOST"):
        monkeypatch.setenv(P + name, "127.0.0.1")
    monkeypatch.setenv(f"{P}KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv(f"{P}POSTGRES__PORT", "1")
    monkeypatch.setenv(f"{P}CLICKHOUSE__URL", "http://127.0.0.1:1")
    monkeypatch.setenv(f"{P}MQTT__ENABLED", "true")
    monkeypatch.setenv(f"{P}MQTT__URL", "mqtt://127.0.0.1:1")
    return monkeypatch


@pytest.mark.parametrize("name", ADDRESSES)
def test_no_address_ends_the_doctor_in_a_traceback(name: str, nowhere: pytest.MonkeyPatch) -> None:
    scheme = {"POSTGRES__URL": "postgresql://", "CLICKHOUSE__URL": "http://", "MQTT__URL": "mqtt://"}.get(name, "")
    for place in PLACES:
        nowhere.setenv(P + name, scheme + place)
        run_doctor()


@given(
    name=st.sampled_from(ADDRESSES),
    scheme=st.sampled_from(SCHEMES),
    user=st.sampled_from(USERS),
    place=st.sampled_from(PLACES),
    tail=st.text("/?#&=%@ :é[", max_size=6),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nor_does_any_mixture(
    nowhere: pytest.MonkeyPatch, name: str, scheme: str, user: str, place: str, tail: str
) -> None:
    with nowhere.context() as changed:
        changed.setenv(P + name, scheme + user + place + tail)
        run_doctor()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POSTGRES__SSL_CA_FILE", "/no/such/file"), ("CLICKHOUSE__SSL_CA_FILE", "/no/such/file"), ("MQTT__SSL_CA_FILE", "/no/such/file"),
        ("KAFKA__SSL_CA_FILE", "/no/such/file"), ("KAFKA__SSL_CERT_FILE", "/dev/null"), ("DATA_DIR", "/proc/nothing/there"), ("DATA_DIR", "x" * 5_000),
        ("POSTGRES__PASSWORD_FILE", "/no/such/file"), ("POSTGRES__PORT", "port"), ("KAFKA__PARTITIONS", "many"), ("NOTHING__LIKE_IT", "1"), ("KAFKA", "1"),
    ],
)  # fmt: skip
def test_nor_do_files_and_numbers(name: str, value: str, nowhere: pytest.MonkeyPatch) -> None:
    if name == "POSTGRES__SSL_CA_FILE":
        nowhere.setenv(f"{P}POSTGRES__SSL_MODE", "verify-full")
    if name == "CLICKHOUSE__SSL_CA_FILE":
        nowhere.setenv(f"{P}CLICKHOUSE__URL", "https://127.0.0.1:1")
    if name == "MQTT__SSL_CA_FILE":
        nowhere.setenv(f"{P}MQTT__URL", "mqtts://127.0.0.1:1")
    if name.startswith("KAFKA__SSL"):
        nowhere.setenv(f"{P}KAFKA__SECURITY_PROTOCOL", "SSL")
    nowhere.setenv(P + name, value)
    assert run_doctor().exit_code in (1, 2)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"PRESERVARIUM_LOG_LEVEL='", b"=\n=\n"])
def test_nor_does_a_broken_env_file(content: bytes, tmp_path: Path, nowhere: pytest.MonkeyPatch) -> None:
    file = tmp_path / "env"
    file.write_bytes(content)
    nowhere.setenv(f"{P}ENV_FILE", str(file))
    run_doctor()


def test_a_check_that_stumbles_is_a_finding_and_hides_what_is_secret(nowhere: pytest.MonkeyPatch) -> None:
    async def stumbles(settings: Any) -> Any:
        raise ZeroDivisionError("the driver says postgresql://u:a-secret-word@h")

    nowhere.setattr(doctor, "check_postgres", stumbles)
    nowhere.setattr(doctor, "check_python", lambda: 1 / 0)
    nowhere.setenv(f"{P}POSTGRES__PASSWORD", "a-secret-word")
    run = CliRunner().invoke(cli, ["doctor", "--json"])
    found = {f["name"]: f for f in orjson.loads(run.stdout)["findings"]}
    assert found["python"]["found"] == "cannot be checked: division by zero"
    assert found["postgres"]["found"] == "cannot be checked: the driver says postgresql://u:…@h"
    assert "kafka" in found


def test_people_get_a_line_for_each_check(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(cli, ["doctor", "--up"])
    for name in ("python", "packages", "clock", "disk", "open files", "memory", "java", "engines"):
        assert sum(line[2:].startswith(name) for line in run.stdout.splitlines()) == 1, name


def test_why_the_jobs_of_timescaledb_do_not_run_and_what_to_do() -> None:
    def of(failed: int = 0, *errors: str, slots: int = 27) -> Any:
        return jobs_finding("2.28.3", "15.20 (Debian)", failed, errors, slots=slots, workers=16, parallel=8)

    assert (of().state, of().advice) == (State.GREEN, "")
    assert of(0, "cannot drop portal", slots=27).state == State.GREEN, "it failed once, and succeeds now"
    portal = of(5, 'cannot drop portal "" while it is being set up')
    assert (portal.state, "PostgreSQL 15.20 ends" in portal.advice) == (State.YELLOW, True)
    few = of(slots=26)
    assert (few.state, "max_worker_processes is 26" in few.advice, "Set it to 27" in few.advice) == (
        State.YELLOW,
        True,
        True,
    )
    assert "max_worker_processes" in of(3, "failed to start job", slots=8).advice
    other = of(1, "permission denied")
    assert (other.state, "permission denied" in other.advice) == (State.YELLOW, True)
