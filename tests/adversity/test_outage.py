"""Both databases gone while devices go on sending: nothing but the two stores notices, and nothing is lost.

The worker is the real one, every agent on; its own PostgreSQL and ClickHouse are stopped and started under it.
"""

import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import asyncpg
import clickhouse_connect
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from preservarium.embedded.clickhouse import ClickHouse
from preservarium.embedded.postgres import Postgres
from preservarium.embedded.service import free_port
from preservarium.embedded.supervise import Worker
from preservarium.streaming.records import raw_line

#: Long enough for breakers to open, waits to reach their longest, and every time-out of a client to pass.
OUTAGE_S = float(os.environ.get("TEST_OUTAGE_S", "60"))
#: Few, for a machine with other work; the figures in docs/PERFORMANCE.md are of the most that the worker keeps up with.
MESSAGES_PER_S = int(os.environ.get("TEST_OUTAGE_MESSAGES_PER_S", "50"))
DEVICES = 20
PARTITIONS = 4
READINGS = 2  # of each message
RSS_BYTES_MAX = 512 * 2**20

REGISTRY = {
    "manufacturers": [{"name": "test"}],
    "datatypes": [
        {"name": "temperature", "kind": "number", "unit": "°C", "fail_span": {"min": -60, "max": 150}},
        {"name": "humidity", "kind": "number", "unit": "%", "fail_span": {"min": 0, "max": 100}},
    ],
    "parsers": [
        {
            "name": "weather",
            "version": 1,
            "kind": "json",
            "status": "active",
            "source": {
                "fields": [
                    {"name": "temperature", "path": "temperature", "unit": "°C"},
                    {"name": "humidity", "path": "humidity", "unit": "%"},
                ]
            },
        }
    ],
    "device_types": [{"name": "weather", "manufacturer": "test", "parser": "weather", "rules": ["hot"]}],
    "rules": [
        {
            "name": "hot", "component_type": "temperature", "kind": "high", "severity": "major",
            "threshold": 40, "deadband": 2,
        }
    ],
    "devices": [{"device_id": f"d{i:02d}", "type": "weather", "enabled": True, "mode": "HTTP"} for i in range(DEVICES)],
}  # fmt: skip


class System:
    """A worker with databases of its own, on the session's Kafka."""

    def __init__(self, directory: Path, kafka: str, prefix: str) -> None:
        self.kafka, self.prefix = kafka, prefix
        self.postgres = Postgres(directory / "postgres")
        self.clickhouse = ClickHouse(directory / "clickhouse")
        self.directory = directory
        self.sent = 0
        self.hot = 0
        self._producer: AIOKafkaProducer | None = None

    def start(self) -> None:
        self.postgres.start()
        self.clickhouse.start()
        prefix = "PRESERVARIUM_"
        self.environment = {
            f"{prefix}KAFKA__BOOTSTRAP_SERVERS": self.kafka,
            f"{prefix}KAFKA__TOPIC_PREFIX": self.prefix,
            f"{prefix}KAFKA__GROUP": f"{self.prefix}app",
            f"{prefix}KAFKA__PARTITIONS": str(PARTITIONS),
            f"{prefix}KAFKA__SESSION_TIMEOUT_S": "6",
            f"{prefix}POSTGRES__URL": self.postgres.dsn(),
            f"{prefix}CLICKHOUSE__URL": self.clickhouse.url,
            f"{prefix}DATA_DIR": str(self.directory / "state"),
            f"{prefix}ENV_FILE": os.devnull,
        }
        registry = self.directory / "registry.yaml"
        registry.write_text(json.dumps(REGISTRY), encoding="utf-8")  # JSON is YAML
        for command in (["migrate"], ["registry", "apply", str(registry)]):
            done = subprocess.run(
                [sys.executable, "-m", "preservarium", *command],
                env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
        self.worker = Worker(self.directory, 0, free_port(), self.environment)
        self.worker.start()

    def stop(self) -> None:
        for service in (getattr(self, "worker", None), self.clickhouse, self.postgres):
            if service is not None:
                service.stop()

    async def send(self, count: int) -> None:
        """Messages of rising time; every 50th is hot and the next cool, so that alarms come and go."""
        if self._producer is None:
            self._producer = AIOKafkaProducer(bootstrap_servers=self.kafka, linger_ms=5)
            await self._producer.start()
        for _ in range(count):
            n = self.sent
            device = f"d{n % DEVICES:02d}"
            hot = (n // DEVICES) % 10 == 9
            self.hot += hot
            line = raw_line(
                device, {"temperature": 50.0 if hot else 20.0, "humidity": 40 + n % 20},
                received_at=time.time_ns() // 1000, connector="test", mode="HTTP",
            )  # fmt: skip
            await self._producer.send(f"{self.prefix}iot_raw_data", line, key=device.encode())
            self.sent += 1
        await self._producer.flush()

    async def close(self) -> None:
        if self._producer is not None:
            await self._producer.stop()

    async def end_offset(self, topic: str) -> int:
        """Records ever written to a topic."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.kafka)
        await consumer.start()
        try:
            partitions = [TopicPartition(f"{self.prefix}{topic}", p) for p in range(PARTITIONS)]
            return sum((await consumer.end_offsets(partitions)).values())
        finally:
            await consumer.stop()

    async def rows(self) -> int:
        connection = await asyncpg.connect(self.postgres.dsn())
        try:
            return await connection.fetchval("SELECT count(*) FROM measurements")
        finally:
            await connection.close()

    async def rows_clickhouse(self) -> int:
        client = await clickhouse_connect.get_async_client(dsn=self.clickhouse.url, database="preservarium")
        try:
            return int((await client.query("SELECT count() FROM measurements FINAL")).result_rows[0][0])
        finally:
            await client.close()

    async def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.worker.url}/metrics") as response:
            text = await response.text()
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def eventually(what: str, ask: Callable[[], object], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    seen: object = None
    while time.monotonic() < deadline:
        seen = await ask()  # type: ignore[misc]
        if seen is True:
            return
        await asyncio.sleep(0.25)
    pytest.fail(f"{what}: not within {within_s} s; last seen: {seen}")


@pytest.fixture
def system(tmp_path: Path, kafka: str, topic_prefix: str) -> Iterator[System]:
    made = System(tmp_path, kafka, topic_prefix)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
async def sender(system: System) -> AsyncIterator[System]:
    yield system
    await system.close()


async def all_stored(system: System) -> object:
    rows, columns = await system.rows(), await system.rows_clickhouse()
    want = system.sent * READINGS
    return (rows, columns) == (want, want) or f"{rows} and {columns} of {want}"


@pytest.mark.timeout(OUTAGE_S * (1 + MESSAGES_PER_S / 200) + 240)
async def test_stores_that_are_down_stop_no_stage_and_lose_nothing(sender: System) -> None:
    system = sender
    await system.send(200)
    await eventually("the first rows in both stores", lambda: all_stored(system), within_s=60)
    validated, alerts = await system.end_offset("iot_validated_data"), await system.end_offset("iot_alerts")
    rebalances = await system.metric("preservarium_rebalances_total")
    pid = system.worker.pid

    await asyncio.to_thread(system.postgres.stop)
    await asyncio.to_thread(system.clickhouse.stop)
    begun = time.monotonic()
    rss_bytes = 0
    for second in itertools.count(1):
        if time.monotonic() - begun >= OUTAGE_S:
            break
        await system.send(MESSAGES_PER_S)
        rss_bytes = max(rss_bytes, psutil.Process(pid).memory_info().rss)
        await asyncio.sleep(max(0.0, begun + second - time.monotonic()))

    # While both are down: what depends on Kafka alone has kept up.
    async def kept_up() -> object:
        done = await system.end_offset("iot_validated_data")
        return done == system.sent or f"{done} of {system.sent} validated"

    await eventually("normalize and validate keep up", kept_up, within_s=15 + system.sent / 1000)
    assert await system.end_offset("iot_validated_data") > validated
    assert await system.end_offset("iot_alerts") > alerts, "the alarm stage raised nothing in the outage"
    assert await system.metric("preservarium_breaker_state") > 0, "no breaker is open though both stores are down"

    await asyncio.to_thread(system.postgres.start)
    await asyncio.to_thread(system.clickhouse.start)
    back = time.monotonic()
    stored_within_s = 90 + system.sent / 500

    async def caught_up() -> object:
        nonlocal rss_bytes
        rss_bytes = max(rss_bytes, psutil.Process(pid).memory_info().rss)
        return await all_stored(system)

    await eventually("everything stored after the outage", caught_up, within_s=stored_within_s)
    caught_up_s = time.monotonic() - back
    assert await system.end_offset("iot_errors") == 0
    assert await system.metric("preservarium_rebalances_total") == rebalances, "an outage must not cost a rebalance"
    assert system.worker.pid == pid, "the worker was restarted"
    print(
        f"{system.sent} messages at {MESSAGES_PER_S}/s, stored {caught_up_s:.1f} s after the servers were back"
        f" ({system.sent / caught_up_s:.0f}/s), {rss_bytes / 2**20:.0f} MiB at most"
    )
    assert rss_bytes < RSS_BYTES_MAX


@pytest.mark.timeout(300)
async def test_a_worker_killed_under_load_doubles_and_loses_nothing(sender: System) -> None:
    system = sender
    await system.send(300)
    for _ in range(3):
        sending = asyncio.create_task(system.send(1_000))
        await asyncio.sleep(0.7)
        await asyncio.to_thread(system.worker.kill)
        await sending
        await asyncio.to_thread(system.worker.start)
    await eventually("everything stored after three kills", lambda: all_stored(system), within_s=120)
    client = await clickhouse_connect.get_async_client(dsn=system.clickhouse.url, database="preservarium")
    try:
        # Without FINAL: the tokens alone kept the duplicates out.
        count = int((await client.query("SELECT count() FROM measurements")).result_rows[0][0])
    finally:
        await client.close()
    assert count == system.sent * READINGS
    assert await system.end_offset("iot_errors") == 0
