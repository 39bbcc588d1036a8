"""`preservarium up` as a user runs it: a process, real services, a kill, a Ctrl-C, and an accounting that adds up."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from up_support import Run, data_directory, left_behind, plain_environment

from preservarium.embedded.running import FILE, find
from preservarium.embedded.service import free_port

pytestmark = [pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return data_directory(tmp_path_factory, "up")


def test_a_killed_worker_comes_back_and_the_accounting_adds_up(data_dir):
    run = Run(data_dir, "--for=20", "--devices=50", "--rate=200")
    run.said("devices send")
    run.until(lambda: (status := run.get("/api/status")) and status["readings_per_s"] > 0)
    first = run.worker()
    os.kill(first, signal.SIGKILL)
    run.said("died; starting it again")
    code, facts = run.end()
    assert code == 0, (facts, run.errors.read_text())
    assert facts["adds_up"] is True
    assert facts["drained"] is True
    assert facts["worker_restarts"] == 1
    assert facts["raw_messages"] >= facts["messages_sent"] >= 20 * 200 * 0.5
    assert facts["readings_in"] == facts["standardized"] > facts["raw_messages"]
    assert facts["stored"] == {"postgres": facts["to_store"], "clickhouse": facts["to_store"]}
    # The line that changes ends with the numbers of the accounting, whoever was killed.
    last = [line for line in run.errors.read_text().splitlines() if "  messages " in line][-1]
    assert (
        f"  messages {facts['raw_messages']:,}  standardized {facts['standardized']:,}  validated {facts['validated']:,}"
        f"  PostgreSQL {facts['to_store']:,}  ClickHouse {facts['to_store']:,}  errors {facts['errors']:,}  lag 0"
    ) in last
    assert left_behind(data_dir) == []


def test_the_next_start_goes_on_and_takes_a_reading_of_our_own(data_dir):
    run = Run(data_dir, "--no-simulator")
    run.said("Console:")
    run.until(lambda: run.get("/ready"))
    with urllib.request.urlopen(f"http://127.0.0.1:{run.port}/", timeout=10) as response:
        assert "<title>Preservarium</title>" in response.read().decode()  # ours, not Faust's
    request = urllib.request.Request(
        f"http://127.0.0.1:{run.port}/ingest",
        data=b'{"device": "demo-1", "payload": {"temperature": 21.4}}',
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.status == 202
    # The only message of this run is nobody's but ours, and the line that changes says so.
    run.said("  messages 1  standardized 1  validated 1  PostgreSQL 1  ClickHouse 1  ")
    values = run.until(lambda: (page := run.get("/api/devices?q=demo-1")) and page["devices"][0]["values"])
    assert [(v["component_type"], v["value"], v["unit"]) for v in values] == [("temperature", 21.4, "°C")]
    assert run.get("/api/devices?limit=1")["total"] > 50  # those of the run before
    note = find(data_dir)
    assert note is not None
    assert (note.state, note.web) == ("running", f"http://127.0.0.1:{run.port}")
    for address in note.addresses.values():
        assert address in run.errors.read_text()
    second = subprocess.run(
        [sys.executable, "-m", "preservarium", "up", f"--data-dir={data_dir}", f"--web-port={free_port()}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert second.returncode == 1
    assert f"a system is running in {data_dir} already: {note.web} (pid {run.process.pid})" in " ".join(
        second.stderr.split()
    )
    run.process.send_signal(signal.SIGINT)
    code, _ = run.end()
    assert code == 0
    assert not (data_dir / FILE).exists()
    assert left_behind(data_dir) == []
    # A stop in order says nothing of errors, such as clients that nobody has closed.
    _, _, farewell = (data_dir / "workers" / "0" / "worker-0.log").read_text().rpartition('"event": "worker_stops"')
    assert farewell
    assert '"level": "error"' not in farewell


#: Longest time that a stop may take where other work keeps every core busy; on quiet cores it is a few seconds.
STOP_MAX_S = 60.0


@pytest.mark.parametrize("after", ["nothing", "started in", "kafka       started", "schema ", "worker  "])
def test_a_start_is_given_up_in_order_wherever_it_is(data_dir, after):
    run = Run(data_dir)
    run.until(lambda: (data_dir / FILE).exists() if after == "nothing" else after in run.errors.read_text())
    begun = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    code, _ = run.end()
    took_s = time.monotonic() - begun
    assert took_s < STOP_MAX_S, run.errors.read_text()
    # What is ready when the signal comes has run, and ends well.
    assert code == 128 + signal.SIGTERM or (after == "worker  " and code == 0), run.errors.read_text()
    assert "Traceback" not in run.errors.read_text()
    assert not (data_dir / FILE).exists()
    assert left_behind(data_dir) == []


def test_a_run_that_is_ended_before_its_time_ends_soon_and_is_not_accounted_for(data_dir):
    run = Run(data_dir, "--for=600", "--rate=200")
    run.said("devices send")
    run.until(lambda: (status := run.get("/api/status")) and status["readings_per_s"] > 0)
    begun = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    code, facts = run.end()
    took_s = time.monotonic() - begun
    assert code == 128 + signal.SIGTERM
    assert "adds_up" not in facts
    assert facts["messages_sent"] > 0
    assert "it is not accounted for" in run.errors.read_text()
    assert took_s < STOP_MAX_S
    assert left_behind(data_dir) == []


# --- a system of one's own, and a second shell -----------------------------------------------------------------------

OWN = """
manufacturers: [{name: Own}]
datatypes:
  - {name: humidity, kind: number, unit: "g/m³", description: "Named as one of the sample's, and something else"}
parsers: [{name: own, kind: json, source: {}}]
device_types: [{name: own, manufacturer: Own, parser: own}]
"""
OWN_DEVICES = """
devices: [{device_id: own-1, type: own, name: Mine}]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A system that begins with nothing but one's own."""
    directory = data_directory(tmp_path_factory, "own")
    for name, text in (("types.yaml", OWN), ("devices.yaml", OWN_DEVICES)):
        (directory / name).write_text(text)
    run = Run(
        directory / "data",
        "--no-sample",
        f"--registry={directory / 'types.yaml'}",
        f"--registry={directory / 'devices.yaml'}",
    )
    run.until(lambda: run.get("/ready"))
    yield run
    if run.process.poll() is None:
        run.process.send_signal(signal.SIGINT)
        assert run.end()[0] == 0
    assert left_behind(directory) == []


def second_shell(run, *arguments, check=True, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "preservarium", *arguments], capture_output=True, text=True, timeout=120, check=False,
        cwd=run.data_dir.parent,
        env=plain_environment(
            PRESERVARIUM_ENV_FILE=os.devnull, PRESERVARIUM_DATA_DIR="data", PYTHONPATH=os.getcwd(), **environment
        ),
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_sample_is_left_out_and_one_s_own_registry_is_there(own):
    assert own.get("/api/devices?limit=5")["total"] == 1
    said = own.errors.read_text()
    assert "registry: 5 documents new or changed" in said
    assert "devices send" not in said
    exported = json.loads(second_shell(own, "registry", "export", "--json").stdout)
    assert [d["name"] for d in exported["datatypes"]] == ["humidity"]
    assert exported["datatypes"][0]["unit"] == "g/m³"


def test_commands_of_a_second_shell_find_the_system(own):
    for arguments in (
        ["doctor", "--json"], ["topics", "--json"], ["migrate", "status", "--json"], ["registry", "verify", "--json"],
        ["dlq", "list", "--json"], ["alarms", "list", "--json"], ["commands", "list", "--json"], ["sync", "status", "--json"],
        ["sync", "query", "--json"], ["db", "postgres", "--json", "-c", "SELECT 1 AS one"], ["config", "show", "--json"],
    ):  # fmt: skip
        done = second_shell(own, *arguments)
        assert json.loads(done.stdout) is not None  # clean: JSON and nothing else
        said = [line for line in done.stderr.splitlines() if line != "using the system that runs in data"]
        assert said == [], arguments
    assert "using the system that runs in data\n" in second_shell(own, "topics").stderr


def test_what_a_second_shell_registers_is_taken_and_commanded_at_once(own, tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("devices: [{device_id: own-2, type: own, downlink: {format: http}}]\n")
    refused = second_shell(own, "commands", "send", "own-2", "--payload", "x", check=False)
    assert refused.returncode == 1
    assert "the registry knows no device 'own-2': register it first" in refused.stderr
    assert "Sent to the workers" in second_shell(own, "registry", "apply", str(file)).stdout
    made = json.loads(second_shell(own, "commands", "send", "own-2", "--payload", "x", "--json").stdout)
    own.until(lambda: own.get(f"/api/devices/own-2/commands/{made['command_id']}"))
    request = urllib.request.Request(
        f"http://127.0.0.1:{own.port}/ingest", data=b'{"device": "own-2", "payload": {"humidity": 9.5}}',
        headers={"content-type": "application/json"},
    )  # fmt: skip
    urllib.request.urlopen(request, timeout=10).close()

    def stored():
        read = second_shell(own, "topics", "read", "iot_validated_data", "--key", "own-2", "--json")
        return [json.loads(line) for line in read.stdout.splitlines()]

    (line,) = own.until(stored)
    reading = line["value"]["readings"][0]
    assert (reading["component_type"], reading["value"], reading["unit"]) == ("humidity", 9.5, "g/m³")
    assert line["value"]["received_at_iso"].startswith(line["time_iso"][:4])
    sql = "SELECT value, unit FROM {} WHERE device_id = 'own-2'"
    assert own.until(
        lambda: json.loads(second_shell(own, "db", "postgres", "--json", "-c", sql.format("iot_measurements")).stdout)
    ) == [{"value": 9.5, "unit": "g/m³"}]  # fmt: skip
    assert own.until(
        lambda: second_shell(own, "db", "clickhouse", "-c", sql.format("measurements")).stdout.splitlines()[1:]
    ) == ["9.5\tg/m³"]  # fmt: skip


def test_a_worker_that_is_started_by_hand_finds_the_system(own, tmp_path):
    with (tmp_path / "worker.log").open("w+") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "faust", "-A", "preservarium", "worker"], stdout=log, stderr=log, cwd=own.data_dir.parent,
            env=plain_environment(
                PRESERVARIUM_ENV_FILE=os.devnull, PRESERVARIUM_DATA_DIR="data", PYTHONPATH=os.getcwd()
            ),
        )  # fmt: skip
        try:
            # It takes its share: the system's own worker tells of it.
            other = own.until(lambda: [w for w in (own.get("/api/status") or {}).get("workers", ()) if not w["gone"]])
            said = (tmp_path / "worker.log").read_text()
            assert "using the system that runs in data; this worker's console is at port " in said
            assert other[0]["worker"] not in (None, own.get("/api/status")["worker"]["id"])
        finally:
            worker.send_signal(signal.SIGTERM)
            worker.wait(60)
    # It does not end what it found.
    assert own.until(lambda: own.get("/ready"))


def test_an_address_of_one_s_own_wins_and_a_wrong_one_is_not_mixed(own):
    done = second_shell(own, "topics", check=False, PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert done.returncode == 1
    assert "using the system" not in done.stderr
    assert "127.0.0.1:1 cannot be reached" in done.stderr
    done = second_shell(own, "registry", "export", check=False, PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert "PostgreSQL cannot be reached" in done.stderr  # not the running system's


def test_a_killed_system_is_no_system(own):
    own.process.kill()
    own.process.communicate(timeout=60)
    assert (own.data_dir / FILE).exists()
    done = second_shell(own, "topics", check=False)
    assert done.returncode == 1
    assert "using the system" not in done.stderr
    assert "Kafka at localhost:9092 cannot be reached" in done.stderr
    deadline = time.monotonic() + STOP_MAX_S
    while left_behind(own.data_dir):  # the guards stop what they guard
        assert time.monotonic() < deadline, left_behind(own.data_dir)
        time.sleep(0.2)


def test_a_foreign_directory_is_not_deleted(tmp_path):
    (tmp_path / "precious").touch()
    done = subprocess.run(
        [sys.executable, "-m", "preservarium", "up", "--fresh", f"--data-dir={tmp_path}", f"--web-port={free_port()}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "not deleted" in done.stderr
    assert (tmp_path / "precious").exists()


def test_security_without_brokers_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "preservarium", "up", f"--data-dir={tmp_path / 'up'}", f"--web-port={free_port()}"],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PRESERVARIUM_KAFKA__SECURITY_PROTOCOL": "SSL"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "no PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS are given" in " ".join(done.stderr.split())
