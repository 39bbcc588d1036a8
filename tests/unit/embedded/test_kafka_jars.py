"""Fetching a broker's jars: once, however many start at the same time."""

import threading
import time
from pathlib import Path

import pytest

from preservarium.embedded.kafka import POM, fetch_jars
from preservarium.embedded.service import Interrupted, ServiceError

#: In place of Maven: notes that it was called, takes its time, and gives a jar.
MAVEN = """#!/bin/sh
echo call >> "{calls}"
sleep {takes_s}
[ -e "{broken}" ] && {{ echo "no such artifact"; exit 1; }}
mkdir -p lib
echo jar > lib/kafka_2.13.jar
"""


@pytest.fixture
def maven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "bin" / "mvn"
    script.parent.mkdir()
    script.write_text(MAVEN.format(calls=tmp_path / "calls", broken=tmp_path / "broken", takes_s=0.5))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    return tmp_path


def calls(maven: Path) -> int:
    return len((maven / "calls").read_text().splitlines())


def test_first_starts_at_once_fetch_once_and_none_loses_its_jars(maven: Path) -> None:
    found: list[str] = []

    def start() -> None:
        jars = fetch_jars(POM, maven / "cache", "the broker")
        for _ in range(20):  # a broker loads classes all the time
            found.append((jars / "kafka_2.13.jar").read_text())
            time.sleep(0.02)

    starts = [threading.Thread(target=start) for _ in range(4)]
    for thread in starts:
        thread.start()
        time.sleep(0.15)
    for thread in starts:
        thread.join(30)
    assert found == ["jar\n"] * 80
    assert calls(maven) == 1


def test_what_a_fetch_left_that_was_cut_off_is_fetched_again(maven: Path) -> None:
    (maven / "cache" / "lib").mkdir(parents=True)
    (maven / "cache" / "lib" / "torn.jar").touch()
    jars = fetch_jars(POM, maven / "cache", "the broker")
    assert [jar.name for jar in jars.iterdir()] == ["kafka_2.13.jar"]


def test_a_failure_is_told_and_the_next_start_tries_again(maven: Path) -> None:
    (maven / "broken").touch()
    with pytest.raises(ServiceError, match=r"Maven could not fetch the broker:\nno such artifact"):
        fetch_jars(POM, maven / "cache", "the broker")
    (maven / "broken").unlink()
    assert (fetch_jars(POM, maven / "cache", "the broker") / "kafka_2.13.jar").exists()


def test_whoever_waits_for_another_can_be_interrupted(maven: Path) -> None:
    other = threading.Thread(target=fetch_jars, args=(POM, maven / "cache", "the broker"))
    other.start()
    while not (maven / "calls").exists():
        time.sleep(0.01)
    interrupted = threading.Event()
    interrupted.set()
    with pytest.raises(Interrupted):
        fetch_jars(POM, maven / "cache", "the broker", interrupted=interrupted)
    other.join(30)
    assert calls(maven) == 1
