"""End to end: raw records in Kafka to rows in both stores, beside two peers on the same input in the same run.

    .venv/bin/python -m bench.e2e [--runs 5] [--messages 60000] [--readings 4] [--json]

Each run takes the contestants one after the other (interleaved, so that a slow minute of the machine hits them all), each
with a fresh topic prefix, fresh databases and its input already in Kafka:

- preservarium: one worker, every agent on.
- plain: a plain Faust app, one event a message, one agent a stage (bench/peers/plain_faust.py; ClickHouse alone in batches).
- old: the replaced sink's design (bench/peers/old_sink.py), which only stores: one reading a message, PostgreSQL alone.

A contestant's rate is taken from its own rows: from the first that is seen in any store it writes to until all are in each.
CPU is that of its process (and children) over the same span. The figure to trust is the
ratio between contestants of one run; medians over the runs are printed.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import asyncpg
import clickhouse_connect
import orjson
import psutil
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bench.peers import old_sink
from preservarium.embedded.clickhouse import ClickHouse
from preservarium.embedded.kafka import Kafka
from preservarium.embedded.postgres import Postgres
from preservarium.embedded.service import free_port

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
#: field -> component type, unit, low, high, alarm threshold, dead-band
FIELDS = {
    "temperature": ["temperature", "°C", -60.0, 120.0, 45.0, 1.0],
    "humidity": ["humidity", "%", 0.0, 100.0, 95.0, 2.0],
    "pressure": ["pressure", "hPa", 300.0, 1200.0, None, 0.0],
    "co2": ["co2", "ppm", 0.0, 10000.0, 2000.0, 50.0],
    "battery": ["battery_voltage", "V", 0.0, 20.0, None, 0.0],
}
#: A contestant that has not stored everything this long after its first row is measured by what it has stored.
WINDOW_S = 180.0


@dataclass
class Result:
    contestant: str
    readings_per_s: float
    cpu_us_per_reading: float
    rss_mib: float
    stored: int
    stored_clickhouse: int | None


class Services:
    """The three services, started once for the whole benchmark."""

    def __init__(self, directory: Path) -> None:
        self.kafka = Kafka(directory / "kafka")
        self.postgres = Postgres(directory / "postgres")
        self.clickhouse = ClickHouse(directory / "clickhouse")

    def __enter__(self) -> "Services":
        for service in (self.kafka, self.postgres, self.clickhouse):
            service.start()
        return self

    def __exit__(self, *_: object) -> None:
        for service in (self.clickhouse, self.postgres, self.kafka):
            service.stop()


def messages(count: int, devices: int, seed: int, readings: int):
    """(device, raw line) with so many readings each; every (device, instant) is unique."""
    rng = random.Random(seed)
    start_us = time.time_ns() // 1000 - count * 2_000
    for i in range(count):
        device = f"bench-{i % devices:05d}"
        payload = {
            "temperature": round(rng.gauss(22, 6), 2),
            "humidity": round(min(100.0, max(0.0, rng.gauss(50, 15))), 1),
            "pressure": round(rng.gauss(1013, 8), 1),
            "co2": round(abs(rng.gauss(700, 300)), 0),
            "battery": round(rng.uniform(2.4, 3.6), 3),
        }
        line = {
            "device": device,
            "received_at": start_us + i * 2_000,
            "connector": "bench",
            "mode": "MQTT",
            "topic": f"devices/{device}/up",
            "port": None,
            "payload": dict(list(payload.items())[:readings]),
            "meta": {},
        }
        yield device, line


async def load(
    services: Services, prefix: str, partitions: int, count: int, devices: int, readings: int, old: bool
) -> int:
    """Fill the contestant's input topic; returns the readings in it."""
    admin = AIOKafkaAdminClient(bootstrap_servers=services.kafka.bootstrap_servers)
    await admin.start()
    topic = prefix + ("decoded_iot_data" if old else "iot_raw_data")
    extra = [] if old else [prefix + "plain_standardized", prefix + "plain_validated"]
    if prefix.endswith("preservarium."):
        extra = []  # `preservarium migrate` makes its own
    try:
        existing = set(await admin.list_topics())
        new = [NewTopic(t, partitions, 1) for t in [topic, *extra] if t not in existing]
        if new:
            await admin.create_topics(new)
    finally:
        await admin.close()
    producer = AIOKafkaProducer(
        bootstrap_servers=services.kafka.bootstrap_servers, linger_ms=20, max_batch_size=262_144, compression_type="lz4"
    )
    await producer.start()
    total = 0
    try:
        for i, (device, line) in enumerate(messages(count, devices, 7, readings)):
            if old:
                for field, value in line["payload"].items():
                    body = {
                        "mac_address": device, "mode": "MQTT", "data_point_label": FIELDS[field][0], "pin": "-1",
                        "value": value, "unit": FIELDS[field][1], "original_topic": line["topic"],
                        "timestamp": line["received_at"] / 1e6,
                    }  # fmt: skip
                    future = await producer.send(topic, orjson.dumps(body), key=device.encode())
            else:
                future = await producer.send(topic, orjson.dumps(line), key=device.encode())
            total += readings
            if i % 5_000 == 4_999:
                await future
        await producer.flush()
    finally:
        await producer.stop()
    return total


async def fresh_database(services: Services, name: str) -> str:
    connection = await asyncpg.connect(services.postgres.dsn())
    await connection.execute(f'DROP DATABASE IF EXISTS "{name}"')
    await connection.execute(f'CREATE DATABASE "{name}"')
    await connection.close()
    return services.postgres.dsn(name)


def registry_file(directory: Path, devices: int) -> Path:
    """The benchmark's devices as a registry file."""
    import ruamel.yaml

    document = {
        "manufacturers": [{"name": "bench"}],
        "datatypes": [
            {"name": c, "kind": "number", "unit": u, "fail_span": {"min": lo, "max": hi}}
            for c, u, lo, hi, _, _ in FIELDS.values()
        ],
        "parsers": [
            {
                "name": "bench-json",
                "version": 1,
                "kind": "json",
                "status": "active",
                "source": {"fields": [{"name": f, "path": f, "unit": v[1]} for f, v in FIELDS.items()]},
            }
        ],
        "device_types": [
            {
                "name": "bench",
                "manufacturer": "bench",
                "parser": "bench-json",
                "mapping": {f: {"component_type": v[0], "unit": v[1]} for f, v in FIELDS.items()},
                "rules": [f"{v[0]}-high" for v in FIELDS.values() if v[4] is not None],
            }
        ],
        "rules": [
            {
                "name": f"{v[0]}-high",
                "component_type": v[0],
                "kind": "high",
                "severity": "minor",
                "threshold": v[4],
                "deadband": v[5],
            }
            for v in FIELDS.values()
            if v[4] is not None
        ],
        "devices": [
            {"device_id": f"bench-{i:05d}", "type": "bench", "enabled": True, "mode": "MQTT"} for i in range(devices)
        ],
    }
    path = directory / "registry.yaml"
    with path.open("w", encoding="utf-8") as f:
        ruamel.yaml.YAML(typ="safe").dump(document, f)
    return path


class Contestant:
    """One process under measurement."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], count: Callable, count_clickhouse: Callable | None
    ) -> None:
        self.name, self.process, self.count, self.count_clickhouse = name, process, count, count_clickhouse

    def cpu_s(self) -> float:
        root = psutil.Process(self.process.pid)
        total = 0.0
        for p in [root, *root.children(recursive=True)]:
            t = p.cpu_times()
            total += t.user + t.system
        return total

    def rss_mib(self) -> float:
        root = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / 2**20

    async def measure(self, total: int) -> Result:
        """Poll rows and CPU until everything is stored or the window is over."""
        samples: list[tuple[float, int, float]] = []
        low = (0.0, 0, 0.0)
        rss = 0.0
        first: float | None = None
        deadline = time.monotonic() + 120
        while True:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended by itself with {self.process.returncode}; see its log")
            now = time.monotonic()
            rows = seen = await self.count()
            if self.count_clickhouse is not None:
                # A row counts when both stores have it. Time counts from the first row in either: one store gets its rows in
                # larger pieces than the other, and what was done for the first piece must not be left out.
                synced = await self.count_clickhouse()
                rows, seen = min(rows, synced), max(rows, synced)
            samples.append((now, rows, self.cpu_s()))
            if os.environ.get("BENCH_TRACE"):
                print(f"{self.name} {now - (first or now):6.1f} s {rows:9,d} rows", file=sys.stderr)
            rss = max(rss, self.rss_mib())
            if seen and first is None:
                first, low = now, samples[-1]
            if rows >= total or (first is not None and now - first > WINDOW_S):
                break
            if first is None and now > deadline:
                raise SystemExit(f"{self.name} stored nothing in 120 s; see its log")
            await asyncio.sleep(0.25)
        stored = samples[-1][1]
        high = samples[-1]
        rows = high[1] - low[1]
        return Result(
            self.name,
            rows / (high[0] - low[0]),
            (high[2] - low[2]) / rows * 1e6,
            rss,
            stored,
            await self.count_clickhouse() if self.count_clickhouse else None,
        )

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


async def run_one(services: Services, name: str, number: int, arguments: argparse.Namespace, directory: Path) -> Result:
    prefix = f"b{number}.{name}."
    database = f"bench_{number}_{name}"
    dsn = await fresh_database(services, database)
    work = directory / f"{number}-{name}"
    work.mkdir()
    log = (work / "log").open("wb")
    clickhouse = await clickhouse_connect.get_async_client(dsn=services.clickhouse.url)
    await clickhouse.command(f"DROP DATABASE IF EXISTS {database}")
    await clickhouse.command(f"CREATE DATABASE {database}")
    connection = await asyncpg.connect(dsn)
    url = services.clickhouse.url.rstrip("/")
    environment = {
        **os.environ,
        "PEER_PREFIX": prefix,
        "PEER_PARTITIONS": str(arguments.partitions),
        "PEER_BROKER": services.kafka.bootstrap_servers,
        "PEER_POSTGRES": dsn,
        "PEER_CLICKHOUSE": f"{url}/{database}",
        "PEER_DATADIR": str(work / "data"),
        "PEER_FIELDS": json.dumps(FIELDS),
        "PYTHONPATH": str(ROOT),
    }

    async def count(table: str) -> int:
        return await connection.fetchval(f"SELECT count(*) FROM {table}")

    async def count_clickhouse(table: str) -> int:
        return int((await clickhouse.query(f"SELECT count() FROM {database}.{table}")).result_rows[0][0])

    if name == "preservarium":
        environment |= {
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": services.kafka.bootstrap_servers,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
            "PRESERVARIUM_KAFKA__GROUP": f"{prefix}group",
            "PRESERVARIUM_KAFKA__PARTITIONS": str(arguments.partitions),
            "PRESERVARIUM_POSTGRES__URL": dsn,
            "PRESERVARIUM_CLICKHOUSE__URL": url,
            "PRESERVARIUM_CLICKHOUSE__DATABASE": database,
            "PRESERVARIUM_DATA_DIR": str(work / "data"),
            "PRESERVARIUM_WEB__PORT": str(free_port()),
            "PRESERVARIUM_LOG_LEVEL": "WARNING",
        }
        for command in (["migrate"], ["registry", "apply", str(registry_file(work, arguments.devices))]):
            subprocess.run(
                [PYTHON, "-m", "preservarium", *command], env=environment, cwd=ROOT, check=True, stdout=log, stderr=log
            )
        total = await load(
            services, prefix, arguments.partitions, arguments.messages, arguments.devices, arguments.readings, old=False
        )
        argv = [str(Path(PYTHON).with_name("faust")), "-A", "preservarium", "worker", "-l", "warn"]
        contestant = Contestant(
            name,
            subprocess.Popen(argv, env=environment, cwd=ROOT, stdout=log, stderr=log),
            lambda: count("measurements"),
            lambda: count_clickhouse("measurements"),
        )
    elif name == "plain":
        await connection.execute(old_sink.SCHEMA.format(table="peer_measurements"))
        await clickhouse.command(
            f"CREATE TABLE {database}.peer_measurements (timestamp DateTime64(6, 'UTC'), device_id LowCardinality(String), "
            "connector_mode LowCardinality(String), component_type LowCardinality(String), pin_position LowCardinality(String), "
            "value Float64, unit LowCardinality(String), topic LowCardinality(String)) ENGINE = MergeTree "
            "PARTITION BY toDate(timestamp) ORDER BY (device_id, component_type, timestamp)"
        )
        total = await load(
            services, prefix, arguments.partitions, arguments.messages, arguments.devices, arguments.readings, old=False
        )
        argv = [PYTHON, str(ROOT / "bench/peers/plain_faust.py"), "worker", "-l", "warn", "--without-web"]
        contestant = Contestant(
            name,
            subprocess.Popen(argv, env=environment, cwd=work, stdout=log, stderr=log),
            lambda: count("peer_measurements"),
            lambda: count_clickhouse("peer_measurements"),
        )
    else:
        await connection.execute(old_sink.SCHEMA.format(table=old_sink.TABLE))
        total = await load(
            services, prefix, arguments.partitions, arguments.messages, arguments.devices, arguments.readings, old=True
        )
        argv = [PYTHON, str(ROOT / "bench/peers/old_sink.py")]
        contestant = Contestant(
            name,
            subprocess.Popen(argv, env=environment, cwd=work, stdout=log, stderr=log),
            lambda: count(old_sink.TABLE),
            None,
        )
    try:
        return await contestant.measure(total)
    finally:
        contestant.stop()
        await connection.close()
        await clickhouse.close()
        log.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--messages", type=int, default=60_000, help="device messages")
    parser.add_argument(
        "--readings", type=int, default=4, choices=range(1, 6), help="readings of a message; the sample fleet has 3.8"
    )
    parser.add_argument("--devices", type=int, default=500)
    parser.add_argument("--partitions", type=int, default=12)
    parser.add_argument("--contestants", default="preservarium,plain,old")
    parser.add_argument("--keep", action="store_true", help="leave the logs and data")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="preservarium-bench-"))
    directory.chmod(0o755)
    results: list[Result] = []
    try:
        with Services(directory) as services:
            for number in range(arguments.runs):
                for name in arguments.contestants.split(","):
                    result = await run_one(services, name, number, arguments, directory)
                    results.append(result)
                    print(
                        f"run {number} {name:13} {result.readings_per_s:9,.0f} readings/s  "
                        f"{result.cpu_us_per_reading:7.1f} µs CPU a reading  {result.rss_mib:5.0f} MiB",
                        file=sys.stderr,
                        flush=True,
                    )
    except BaseException:
        print(f"logs and data are in {directory}", file=sys.stderr)
        arguments.keep = True
        raise
    finally:
        if not arguments.keep:
            shutil.rmtree(directory, ignore_errors=True)
    summary = {}
    for name in arguments.contestants.split(","):
        mine = [r for r in results if r.contestant == name]
        summary[name] = {
            "readings_per_s": statistics.median(r.readings_per_s for r in mine),
            "cpu_us_per_reading": statistics.median(r.cpu_us_per_reading for r in mine),
            "rss_mib_max": max(r.rss_mib for r in mine),
        }
    if arguments.json:
        print(json.dumps({"runs": [asdict(r) for r in results], "median": summary}, indent=1))
        return
    base = summary.get("preservarium")
    print(f"{'contestant':14}{'readings/s':>12}{'CPU µs/reading':>16}{'RSS MiB':>9}{'Preservarium is':>20}")
    for name, s in summary.items():
        ratio = (
            f"{base['readings_per_s'] / s['readings_per_s']:.1f} × as fast" if base and name != "preservarium" else ""
        )
        print(f"{name:14}{s['readings_per_s']:12,.0f}{s['cpu_us_per_reading']:16.1f}{s['rss_mib_max']:9.0f}{ratio:>20}")


if __name__ == "__main__":
    asyncio.run(main())
