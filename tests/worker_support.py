"""Worker processes for tests that need a whole worker: started, watched and killed as an operator would."""

import asyncio
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

from preservarium.topics import Topic

ROOT = Path(__file__).parents[1]
READY = "worker_ready"


async def make_topics(kafka: str, prefix: str, partitions: int, topics: list[Topic]) -> None:
    """Make topics, without waiting for anything but the answer."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic.full(prefix), partitions, 1) for topic in topics])
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
