"""A system is copied while messages flow, goes on and dies; another one begins with the copy, and devices send again what it lacks.

What counts at the end: each reading once in both stores, registry and events as they were, and the alarm that stood goes on.
"""

import http.client
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sink_support import fetch
from thread_support import in_thread
from up_support import Run, data_directory, left_behind

pytestmark = [
    pytest.mark.slow,
    pytest.mark.kafka,
    pytest.mark.postgres,
    pytest.mark.clickhouse,
    pytest.mark.timeout(900),
]

REGISTRY = """
manufacturers: [{name: Own}]
datatypes:
  - {name: number, kind: number, unit: ""}
  - {name: level, kind: number, unit: mm}
parsers: [{name: own, kind: json, status: active, source: {time: time}}]
rules: [{name: level-high, component_type: level, kind: high, severity: major, threshold: %d, deadband: 1}]
device_types: [{name: own, manufacturer: Own, parser: own, rules: [level-high]}]
devices:
  - {device_id: boiler, type: own}
  - {device_id: dev-0, type: own}
  - {device_id: dev-1, type: own}
  - {device_id: dev-2, type: own}
  - {device_id: dev-3, type: own}
  - {device_id: dev-4, type: own}
"""
BEGAN = datetime.now(UTC) - timedelta(hours=2)
#: A system that is copied has done something before.
BEFORE = 150
#: Messages that are sent again although the copy has them, as devices do that heard no answer.
AGAIN = 20


class Devices:
    """They number what they send, and keep it until somebody says that it was taken."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sent = 0  #: numbers below are taken
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def post(self, device: str, at: datetime, **payload: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            body = {"device": device, "payload": {"time": at.isoformat(), **payload}}
            connection.request("POST", "/ingest", json.dumps(body), {"content-type": "application/json"})
            response = connection.getresponse()
            assert response.status == 202, response.read()
        finally:
            connection.close()

    def number(self, n: int) -> None:
        self.post(f"dev-{n % 5}", BEGAN + timedelta(milliseconds=n), number=n)

    def send(self, count: int) -> None:
        for _ in range(count):
            self.number(self.sent)
            self.sent += 1

    def __enter__(self) -> "Devices":
        def work() -> None:
            while not self._stop.is_set():
                self.send(1)
                time.sleep(0.05)

        self._thread = threading.Thread(target=work)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()


class Starting:
    """Starts systems, and stops at the end what still runs."""

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def __call__(self, directory: Path, *options: str) -> Run:
        run = Run(directory, "--no-sample", "--no-simulator", *options)
        self._runs.append(run)
        run.until(lambda: run.get("/ready"))
        return run

    def stop(self) -> None:
        for run in self._runs:
            if run.process.poll() is None:
                run.process.kill()
                run.process.communicate(timeout=60)
            deadline = time.monotonic() + 60
            while left_behind(run.data_dir):  # the guards stop what they guard
                assert time.monotonic() < deadline, left_behind(run.data_dir)
                time.sleep(0.2)


@pytest.fixture
def start() -> Iterator[Starting]:
    starting = Starting()
    yield starting
    starting.stop()


def rows(run: Run, sql: str) -> list[dict[str, Any]]:
    place = json.loads((run.data_dir / "running.json").read_text())["addresses"]["postgres"]
    password = (run.data_dir / "postgres" / "password").read_text().strip()
    return [dict(row) for row in in_thread(fetch(f"postgresql://preservarium:{password}@{place}", sql))]


def numbers(run: Run) -> list[int]:
    found = rows(run, "SELECT value FROM iot_measurements WHERE component_type = 'number' ORDER BY value")
    return [int(row["value"]) for row in found]


def transitions(run: Run) -> list[tuple[str, str]]:
    found = rows(
        run, "SELECT alarm_id, transition FROM alarm_events WHERE device_id = 'boiler' ORDER BY detected_at, stored_at"
    )
    return [(row["transition"], row["alarm_id"]) for row in found]


HISTORY = "SELECT count(*) AS events, encode(sha256(string_agg(encode(hash, 'hex'), ',' ORDER BY position)::bytea), 'hex') AS chain FROM event_store"
DOCUMENTS = (
    "SELECT device_id AS name, rev, doc::text FROM devices UNION ALL SELECT name, rev, doc::text FROM alarm_rules"
    " UNION ALL SELECT name, rev, doc::text FROM parsers ORDER BY 2"
)


def test_a_restored_system_goes_on_with_nothing_lost_and_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, start: Starting
) -> None:
    directory = data_directory(tmp_path_factory, "backup")
    registry = directory / "registry.yaml"
    registry.write_text(REGISTRY % 50)
    copy = directory / "copy"
    first = start(directory / "a", f"--registry={registry}")
    devices = Devices(first.port)
    devices.send(BEFORE)
    devices.post("boiler", BEGAN, level=10)
    devices.post("boiler", BEGAN + timedelta(seconds=1), level=99)
    first.until(lambda: (page := first.get("/api/alarms")) and page["total"])
    first.shell("alarms", "acknowledge", "boiler", "level-high", "--comment", "on my way")
    first.until(lambda: [name for name, _ in transitions(first)] == ["raised", "acknowledged"])
    first.until(lambda: len(numbers(first)) == BEFORE)
    history, documents = rows(first, HISTORY), rows(first, DOCUMENTS)
    raised = transitions(first)[0][1]

    with devices:
        time.sleep(1)
        taken = devices.sent
        made = json.loads(first.shell("backup", "create", str(copy), "--json"))
        later = devices.sent
        time.sleep(2)
    lost_by_death = devices.sent
    assert taken < later < lost_by_death, "messages flowed before, during and after"
    start.stop()
    spans = made["topics"]["iot_raw_data"].values()
    assert sum(span["begin"] for span in spans) > BEFORE // 2, "what has had its effect was not copied"

    second = start(directory / "b", f"--restore={copy}")
    second.until(lambda: len(numbers(second)) >= taken)
    there = numbers(second)
    assert there == list(range(len(there))), "all that was taken before the copy, and a part of what came meanwhile"
    assert rows(second, HISTORY) == history
    assert rows(second, DOCUMENTS) == documents
    (standing,) = second.get("/api/alarms")["alarms"]
    assert (standing["device_id"], standing["state"]) == ("boiler", "acknowledged")

    with pytest.raises(subprocess.CalledProcessError) as refused:
        second.shell("backup", "restore", str(copy), "--dry-run")
    assert "the database in PostgreSQL has tables already" in refused.value.stderr

    devices.port = second.port
    for n in range(taken - AGAIN, lost_by_death):
        devices.number(n)
    devices.send(BEFORE)
    devices.post("boiler", BEGAN + timedelta(seconds=2), level=99)
    devices.post("boiler", BEGAN + timedelta(seconds=3), level=5)
    everything = list(range(lost_by_death + BEFORE))
    second.until(lambda: len(numbers(second)) >= len(everything))
    assert numbers(second) == everything
    second.until(lambda: len(transitions(second)) == 3)
    assert transitions(second) == [("raised", raised), ("acknowledged", raised), ("cleared", raised)]
    coordinates = (
        "SELECT count(*) - count(DISTINCT (raw_partition, raw_offset, raw_index)) AS shared FROM iot_measurements"
    )
    assert rows(second, coordinates) == [{"shared": 0}], "no two messages have one place in the raw log"

    def in_clickhouse() -> list[dict[str, object]]:
        sql = "SELECT count() AS n, uniqExact(value) AS values FROM measurements FINAL WHERE component_type = 'number'"
        return [
            {name: int(value) for name, value in row.items()}
            for row in json.loads(second.shell("db", "clickhouse", "--json", "-c", sql))
        ]

    second.until(lambda: in_clickhouse() == [{"n": len(everything), "values": len(everything)}])
    second.shell("sync", "verify", "--repair", "--settle", "0")
    verdict = json.loads(second.shell("sync", "verify", "--settle", "0", "--json"))
    assert verdict["same"]
    assert verdict["rows"] >= len(everything)

    # What people change now is newer than all that was restored.
    registry.write_text(REGISTRY % 4)
    second.shell("registry", "apply", str(registry))
    second.shell("registry", "verify")
    devices.post("boiler", BEGAN + timedelta(seconds=4), level=10)
    second.until(lambda: [name for name, _ in transitions(second)].count("raised") == 2)
