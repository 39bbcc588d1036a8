"""Worker processes for tests that need a whole worker: started, watched and killed as an operator would."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from preservarium import topics
from preservarium.settings import LiveSettings, load
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send
from preservarium.topics import Topic

ROOT = Path(__file__).parents[1]
READY = "worker_ready"
#: Of the topics of `Worker`.
PARTITIONS = 3


async def make_topics(kafka: str, prefix: str, partitions: int, wanted: list[Topic]) -> None:
    """Make topics, without waiting for anything but the answer."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic.full(prefix), partitions, 1) for topic in wanted])
    finally:
        await admin.close()


class Workers:
    """Worker processes with a life of their own."""

    def __init__(self, module: Path, environment: dict[str, str], directory: Path) -> None:
        self.module = module
        self.environment = environment
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []

    def start(self, **extra: str) -> int:
        """Start one; its number."""
        number = len(self.processes)
        path = self.directory / f"worker-{number}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "faust", "-A", self.module.stem, "worker", "--without-web"],
                cwd=self.module.parent,
                env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT), **extra},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        self.logs.append(path)
        return number

    def signal(self, number: int, which: signal.Signals) -> None:
        self.processes[number].send_signal(which)

    def log(self, number: int) -> str:
        return self.logs[number].read_text(errors="replace")

    async def ready(self, number: int, within_s: float = 45) -> None:
        await until(
            lambda: READY in self.log(number), within_s, lambda: f"worker {number}:\n{self.log(number)[-3000:]}"
        )

    async def ended(self, number: int, within_s: float = 30) -> int:
        process = self.processes[number]
        await until(
            lambda: process.poll() is not None,
            within_s,
            lambda: f"worker {number} runs on:\n{self.log(number)[-3000:]}",
        )
        assert process.returncode is not None
        return process.returncode

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


class Worker:
    """Topics, settings and processes of one test; WORKER_MODE says which stages the worker_app has."""

    def __init__(self, kafka: str, prefix: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kafka, self.prefix, self.directory = kafka, prefix, directory
        self.report_file = directory / "report.json"
        self.env_file = directory / "worker.env"
        environment = {
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
            "PRESERVARIUM_KAFKA__GROUP": f"{prefix}worker",
            "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
            "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": "6",
            "PRESERVARIUM_KAFKA__COMMIT_INTERVAL_S": "0.3",
            "PRESERVARIUM_AGENTS__BACKOFF_S": "0.05",
            "PRESERVARIUM_AGENTS__BACKOFF_MAX_S": "0.2",
            "PRESERVARIUM_DATA_DIR": str(directory / "data"),
            "PRESERVARIUM_LOG_FORMAT": "json",
            "PRESERVARIUM_ENV_FILE": str(self.env_file),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        self.live = LiveSettings(load())
        self.workers = Workers(
            ROOT / "tests" / "integration" / "streaming" / "worker_app.py",
            {**environment, "WORKER_REPORT": str(self.report_file)},
            directory,
        )

    async def make_topics(self) -> None:
        used = [topics.RAW, topics.STANDARDIZED, topics.VALIDATED, topics.ERRORS]
        await make_topics(self.kafka, self.prefix, PARTITIONS, used)

    async def publish(self, sends: list[Send]) -> None:
        publisher = Publisher(self.live)
        try:
            for start in range(0, len(sends), 5_000):
                await publisher.publish(sends[start : start + 5_000])
        finally:
            await publisher.stop()

    def report(self) -> dict[str, Any]:
        return json.loads(self.report_file.read_text()) if self.report_file.exists() else {}

    def stage(self, name: str) -> dict[str, Any]:
        return self.report().get("stages", {}).get(name, {})

    async def ready(self, mode: str, **extra: str) -> int:
        self.report_file.unlink(missing_ok=True)
        number = self.workers.start(WORKER_MODE=mode, **extra)
        await self.workers.ready(number)
        await until(self.report_file.exists, 10)
        return number

    async def stop(self, number: int) -> None:
        self.workers.signal(number, signal.SIGTERM)
        assert await self.workers.ended(number) == 0, self.workers.log(number)[-3_000:]


async def until(
    condition: Callable[[], Any] | Callable[[], Awaitable[Any]], within_s: float, say: Callable[[], str] = str
) -> None:
    deadline = time.monotonic() + within_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s:.0f} s: {say()}")
        await asyncio.sleep(0.1)


async def read_all(kafka: str, topic: str, partitions: int) -> list[Any]:
    """Every record of a topic, partition by partition."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka, auto_offset_reset="earliest", max_partition_fetch_bytes=8 << 20
    )
    await consumer.start()
    try:
        tps = [TopicPartition(topic, p) for p in range(partitions)]
        consumer.assign(tps)
        ends = await consumer.end_offsets(tps)
        records: list[Any] = []
        while any([await consumer.position(tp) < ends[tp] for tp in tps]):
            for found in (await consumer.getmany(timeout_ms=500)).values():
                records += found
        return records
    finally:
        await consumer.stop()
