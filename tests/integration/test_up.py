"""`preservarium up` as a user runs it: a process, real services, a kill, a Ctrl-C, and an accounting that adds up."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from preservarium.embedded.kafka import find_java, resolve_jars
from preservarium.embedded.service import ServiceUnavailable, free_port

pytestmark = [pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    try:
        find_java()
        resolve_jars()
    except ServiceUnavailable as e:
        pytest.skip(f"missing: {e}")
    # Short: PostgreSQL's socket and Kafka's files have long names of their own.
    return tmp_path_factory.mktemp("up")


class Run:
    """A running `preservarium up`."""

    def __init__(self, data_dir: Path, *arguments: str) -> None:
        self.data_dir = data_dir
        self.port = free_port()
        self.errors = data_dir / "stderr.txt"
        data_dir.mkdir(exist_ok=True)
        (data_dir / ".preservarium-up").touch()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PRESERVARIUM_")}
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "preservarium", "up", f"--data-dir={data_dir}", f"--web-port={self.port}",
                    "--json", *arguments,
                ],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            )  # fmt: skip

    def until(self, what, timeout_s=120.0):
        deadline = time.monotonic() + timeout_s
        while not (found := what()):
            assert self.process.poll() is None, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.1)
        return found

    def said(self, text):
        return self.until(lambda: text in self.errors.read_text())

    def get(self, path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2) as response:
                return json.load(response)
        except OSError:
            return None

    def worker(self):
        return json.loads((self.data_dir / "workers" / "0" / "worker-0.pid").read_text())["pid"]

    def end(self):
        out, _ = self.process.communicate(timeout=300)
        return self.process.returncode, json.loads(out) if out.strip() else None


def left_behind(data_dir):
    return [
        p.cmdline()
        for p in psutil.process_iter()
        if p.status() != psutil.STATUS_ZOMBIE and any(str(data_dir) in a for a in _cmdline(p))
    ]


def _cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


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
    values = run.until(lambda: (page := run.get("/api/devices?q=demo-1")) and page["devices"][0]["values"])
    assert [(v["component_type"], v["value"], v["unit"]) for v in values] == [("temperature", 21.4, "°C")]
    assert run.get("/api/devices?limit=1")["total"] > 50  # those of the run before
    run.process.send_signal(signal.SIGINT)
    code, _ = run.end()
    assert code == 0
    assert left_behind(data_dir) == []


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
