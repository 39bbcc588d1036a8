"""A real Prometheus beside a real system: nothing fires while all is well, and a frozen dependency is told of within a minute."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_support import Prometheus
from up_support import Run, data_directory

#: Minutes of the default fleet without an alert.
MINUTES = float(os.environ.get("TEST_FLEET_MINUTES", "60"))
#: A loaded machine starts everything in its own time.
PATIENCE_S = 400.0
#: From the freeze to the alert.
TOLD_S = 60.0

pytestmark = [
    pytest.mark.slow, pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse,
    pytest.mark.timeout(round(MINUTES * 60) + 900),
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    made = Run(data_directory(tmp_path_factory, "alerts"))
    try:
        made.until(lambda: "devices send" in made.errors.read_text(), PATIENCE_S)
        made.until(lambda: (status := made.get("/api/status")) and status["readings_per_s"] > 0, PATIENCE_S)
        yield made
    finally:
        made.process.send_signal(signal.SIGINT)
        made.process.wait(120)


@pytest.fixture(scope="module")
def prometheus(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    made = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{run.port}")
    yield made
    made.stop()


def test_the_default_fleet_fires_nothing(run: Run, prometheus: Prometheus, told) -> None:
    began_s, looks = time.monotonic(), 0
    while (passed_s := time.monotonic() - began_s) < MINUTES * 60:
        assert prometheus.firing() == [], f"after {passed_s:.0f} s"
        looks += prometheus.get("alerts") is not None
        time.sleep(10)
    assert looks >= MINUTES * 3
    groups = prometheus.get("rules")["groups"]
    unhealthy = [(rule["name"], rule.get("lastError")) for g in groups for rule in g["rules"] if rule["health"] != "ok"]
    assert unhealthy == []
    assert all(target["health"] == "up" for target in prometheus.get("targets")["activeTargets"])
    told(f"{MINUTES:g} minutes of the default fleet: no alert, {looks} looks")


def test_a_frozen_dependency_is_told_of_within_a_minute_and_its_end_too(run: Run, prometheus: Prometheus, told) -> None:
    assert prometheus.until(lambda: prometheus.get("query?query=up")["result"], 60)
    postgres = _postgres(run.data_dir)
    began_s = time.monotonic()
    for process in postgres:
        process.suspend()
    try:
        found = prometheus.until(
            lambda: [a for a in prometheus.firing() if a["alertname"] == "DependencyDown"], TOLD_S + 60
        )
        took_s = time.monotonic() - began_s
    finally:
        for process in postgres:
            process.resume()
    assert found
    assert found[0]["dependency"] == "postgres"
    assert took_s <= TOLD_S
    assert prometheus.until(lambda: not [a for a in prometheus.firing() if a["alertname"] == "DependencyDown"], 60)
    told(f"a frozen PostgreSQL was told of after {took_s:.0f} s")


def _postgres(data_dir: Path) -> list[psutil.Process]:
    """The server of this system and all that belongs to it."""
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if line and line[0].endswith("postgres") and any(str(data_dir) in part for part in line):
            return [process, *process.children(recursive=True)]
    raise AssertionError(data_dir)
