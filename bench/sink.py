"""The sink's speed, each figure beside the replaced service's design (bench/peers/old_sink.py) in the same run.

    .venv/bin/python -m bench.sink [store|kafka|backfill …] [--runs 5] [--rows 100000] [--json]

**store**: parsed messages of one reading in memory → committed rows, each contestant into fresh tables of one server. The
contestants of a run follow each other, so that a slow minute of the machine hits them all.

- old: a pydantic model a message, execute_batch of 100 rows and a commit, wide table, its key and three indexes.
- copy: our store over one connection, transactions of `--batch` rows, offsets and latest values in the transaction; two batches
  are under way, so that one is encoded while the other is stored. serial: one batch after the other.
- copy2: the same over two connections. four: copy2 with four readings a message, as devices send them.
- merge, unnest: what the store might do instead: a temporary table, arrays (each with ON CONFLICT DO NOTHING).
- replay: rows that are all stored already. offsets: batches of 1,000 rows, every other one with an offset to move.

**kafka**: the same messages waiting in Kafka → committed rows: one worker with only the agent sink; the old service; a loop
by hand (bench/peers/copy_loop.py). CPU is the consumer's, from its first row to its last. Then the worker at half of the rate
it had: from a record's append to the commit of its row.

**backfill**: what a live write of 500 rows takes alone, and while a week of old rows is written as fast as it goes.

The figure to trust is the ratio between contestants of one run; medians over the runs are printed.
"""

import argparse
import asyncio
import bisect
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import psutil
import uvloop
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bench.peers import old_sink
from bench.producing import paced, producer_of
from preservarium import logs, topics
from preservarium.domain.readings.stored import StoredMessage, parse_messages
from preservarium.embedded.kafka import Kafka
from preservarium.embedded.postgres import Postgres
from preservarium.embedded.service import free_port
from preservarium.settings import LiveSettings, Sink, load
from preservarium.stores.base import Move
from preservarium.stores.migrate import migrate_postgres
from preservarium.stores.timescale import TimescaleStore

ROOT = Path(__file__).resolve().parent.parent
#: The same for every contestant; durable commits, as each of them has in production.
SERVER = {"shared_buffers": "1GB", "max_wal_size": "8GB", "track_commit_timestamp": "on"}
PARTITIONS = 12
DAY_US = 86_400_000_000


def inputs(rows: int, series: int, readings: int = 1, start_us: int | None = None) -> list[dict[str, Any]]:
    """Validated messages of so many readings."""
    start_us = start_us or time.time_ns() // 1000 - 3_600_000_000
    messages = []
    for i in range(rows // readings):
        devices = series // readings
        device, at_us = f"70b3d57ba000{i % devices:04x}", start_us + i // devices * 1_000_000 + i % devices
        messages.append(
            {
                "device_id": device, "connector_mode": "LoRaWAN", "topic": f"devices/{device}/up", "timestamp": at_us,
                "received_at": at_us + 250_000, "raw_partition": i % PARTITIONS, "raw_offset": i, "raw_index": 0,
                "parser": "decentlab@3", "config_rev": 7, "generation": 0,
                "readings": [
                    {"component_type": "temperature", "pin_position": str(pin), "value": 20 + i % 1000 / 100, "unit": "°C", "quality": 1}
                    for pin in range(readings)
                ],
            }
        )  # fmt: skip
    return orjson.loads(orjson.dumps(messages))


def as_old(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same readings in the old service's format."""
    old = [
        {
            "mac_address": m["device_id"], "mode": m["connector_mode"], "data_point_label": r["component_type"],
            "pin": r["pin_position"], "value": r["value"], "unit": r["unit"], "original_topic": m["topic"], "timestamp": m["timestamp"] / 1e6,
        }
        for m in messages
        for r in m["readings"]
    ]  # fmt: skip
    return orjson.loads(orjson.dumps(old))


# --- the store alone


def parsed(messages: list[dict[str, Any]]) -> list[StoredMessage]:
    """As the stage has them."""
    return parse_messages(orjson.dumps(messages)) or []


def lanes_of(messages: list[dict[str, Any]], flights: int) -> list[list[StoredMessage]]:
    """A partition is in one flight at a time, and a device's messages are in one partition: each lane has its devices."""
    devices = {device: n for n, device in enumerate(dict.fromkeys(m["device_id"] for m in messages))}
    return [parsed([m for m in messages if devices[m["device_id"]] % flights == lane]) for lane in range(flights)]


async def run_ours(store: TimescaleStore, lanes: list[list[StoredMessage]], batch: int) -> None:
    async def write(partition: int, part: list[StoredMessage]) -> None:
        expected = (await store.offsets("bench", [partition]))[partition]
        next_offset = expected or 0
        each = max(1, batch // len(part[0].readings))
        for start in range(0, len(part), each):
            chunk = part[start : start + each]
            result = await store.write(chunk, {("bench", partition): Move(expected, next_offset + len(chunk))})
            assert not result.rejected, result
            expected = next_offset = next_offset + len(chunk)

    await asyncio.gather(*(write(partition, part) for partition, part in enumerate(lanes)))


UNNEST = """
INSERT INTO measurements (series_id, timestamp, value, quality, received_at, raw_partition, raw_offset, raw_index, generation,
                          derivation_id)
SELECT * FROM unnest($1::int[], $2::timestamptz[], $3::float8[], $4::smallint[], $5::timestamptz[], $6::smallint[], $7::bigint[],
                     $8::int[], $9::int[], $10::int[]) ON CONFLICT DO NOTHING"""


def instant(us: int) -> datetime:
    return datetime.fromtimestamp(us // 1_000_000, UTC).replace(microsecond=us % 1_000_000)


async def run_unnest(dsn: str, messages: list[dict[str, Any]], batch: int) -> None:
    connection = await asyncpg.connect(dsn)
    rows = await connection.fetch(
        "SELECT series_id, device_id, connector_mode, component_type, pin_position FROM series"
    )
    ids = {tuple(r)[1:]: r[0] for r in rows}
    for start in range(0, len(messages), batch):
        tuples = []
        for m in messages[start : start + batch]:
            for r in m["readings"]:
                key = (m["device_id"], m["connector_mode"], r["component_type"], r["pin_position"])
                tuples.append(
                    (
                        ids[key], instant(r.get("timestamp", m["timestamp"])), r["value"], r["quality"],
                        instant(m["received_at"]), m["raw_partition"], m["raw_offset"], m["raw_index"], m["generation"], 1,
                    )
                )  # fmt: skip
        tuples.sort(key=lambda t: t[:2])
        async with connection.transaction():
            await connection.execute(
                "INSERT INTO sink_offsets VALUES ('unnest', 'bench', 0, 0, $1) ON CONFLICT (sink, topic, partition, generation)"
                " DO UPDATE SET next_offset = excluded.next_offset",
                start + batch,
            )
            await connection.execute(UNNEST, *map(list, zip(*tuples, strict=True)))
    await connection.close()


async def reset(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("TRUNCATE measurements, rollup_dirty, sink_offsets")
    await connection.execute(f"DROP TABLE IF EXISTS {old_sink.TABLE}")
    await connection.execute(old_sink.SCHEMA.format(table=old_sink.TABLE))
    await connection.execute("CHECKPOINT")
    await connection.close()


async def latency_ms(store: TimescaleStore, messages: list[StoredMessage]) -> list[float]:
    """Of each write of 100 rows."""
    spent = []
    for start in range(0, min(len(messages), 10_000), 100):
        began = time.perf_counter()
        await store.write(messages[start : start + 100], {})
        spent.append((time.perf_counter() - began) * 1000)
    return spent


def calm() -> None:
    """What the worker does at its start (preservarium/streaming/app.py), for every contestant in this process."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


async def bench_store(dsn: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    settings = LiveSettings(load(postgres={"url": dsn}))
    await migrate_postgres(settings())
    ours = inputs(arguments.rows, arguments.series)
    four = inputs(arguments.rows, arguments.series, 4, ours[0]["timestamp"] - DAY_US)
    old = as_old(ours)
    calm()
    single = TimescaleStore(LiveSettings(load(postgres={"url": dsn, "pool_max": 1})))
    double = TimescaleStore(LiveSettings(load(postgres={"url": dsn, "pool_max": 2})))
    always = TimescaleStore(settings, copy_first=False)
    batch = arguments.batch
    one, two, three, fours = lanes_of(ours, 1), lanes_of(ours, 2), lanes_of(ours, 3), lanes_of(four, 3)

    contestants: dict[str, tuple[Callable[[], Awaitable[None]], bool]] = {
        "old": (lambda: asyncio.to_thread(old_sink.write_all, dsn, old), True),
        "serial": (lambda: run_ours(single, one, batch), True),
        "copy": (lambda: run_ours(single, two, batch), True),
        "replay": (lambda: run_ours(single, two, batch), False),
        "copy2": (lambda: run_ours(double, three, batch), True),
        "four": (lambda: run_ours(double, fours, batch), True),
        "merge": (lambda: run_ours(always, one, batch), True),
        "unnest": (lambda: run_unnest(dsn, ours, batch), True),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    cpus: dict[str, list[float]] = {name: [] for name in contestants}
    milliseconds: list[float] = []
    moved: list[float] = []
    bare: list[float] = []
    for messages in (ours[: arguments.series], four[: arguments.series // 4]):
        await single.write(messages, {})  # the series exist: their making is not what is measured
        await double.write(messages, {})
        await always.write(messages, {})
    for _ in range(arguments.runs):
        for name, (go, fresh) in contestants.items():
            if fresh:
                await reset(dsn)
            cpu, began = time.process_time(), time.perf_counter()
            await go()
            spent = time.perf_counter() - began
            rates[name].append(arguments.rows / spent)
            cpus[name].append((time.process_time() - cpu) / arguments.rows * 1e6)
        await reset(dsn)
        milliseconds += await latency_ms(single, one[0])
        await reset(dsn)
        expected: int | None = None
        for n, start in enumerate(range(0, len(one[0]), 1000)):
            moves = {("offsets", 0): Move(expected, start + 1)} if n % 2 else {}
            began = time.perf_counter()
            await single.write(one[0][start : start + 1000], moves)
            (moved if moves else bare).append((time.perf_counter() - began) * 1000)
            expected = start + 1 if moves else expected
    for store in (single, double, always):
        await store.close()
    report: dict[str, dict[str, float]] = {}
    for name in contestants:
        ratios = [r / o for r, o in zip(rates[name], rates["old"], strict=True)]
        report[name] = {
            "rows_per_s": round(statistics.median(rates[name])),
            "ratio_to_old": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
            "client_cpu_us_per_row": round(statistics.median(cpus[name]), 2),
        }
    report["offsets"] = {
        "cost_at_1000_rows": round(statistics.median(moved) / statistics.median(bare) - 1, 3),
        "ms_with": round(statistics.median(moved), 2),
        "ms_without": round(statistics.median(bare), 2),
    }
    for other in ("merge", "unnest"):
        gain = [c / m for c, m in zip(rates["serial"], rates[other], strict=True)]
        report["serial"][f"ratio_to_{other}"] = round(statistics.median(gain), 2)
    report["batch of 100"] = {
        "ms_median": round(statistics.median(milliseconds), 2),
        "ms_p99": round(statistics.quantiles(milliseconds, n=100)[98], 2),
    }
    return report


# --- live data beside a back-fill


async def bench_backfill(dsn: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    settings = LiveSettings(load(postgres={"url": dsn}))
    await migrate_postgres(settings())
    now_us = time.time_ns() // 1000
    week = inputs(arguments.rows, arguments.series, 1, now_us - 7 * DAY_US)
    for i, message in enumerate(week):
        message["timestamp"] += i * (6 * DAY_US) // len(week)
    live = inputs(arguments.rows, arguments.series, 1, now_us - 300_000_000)
    calm()
    spent: dict[str, list[float]] = {"alone": [], "staged": [], "merged": []}
    stored = 0.0
    for _ in range(arguments.runs):
        for how in spent:
            await reset(dsn)
            store, other = TimescaleStore(settings), TimescaleStore(settings, late_lane=True)
            await store.write(live[:500], {})
            done = asyncio.Event()

            async def fill(store: TimescaleStore = other, done: asyncio.Event = done, how: str = how) -> int:
                written = 0
                for start in itertools.count(0, 2_000):
                    if done.is_set():
                        break
                    part = week[start % len(week) : start % len(week) + 2_000]
                    await store.write(part, {})
                    written += len(part)
                    if how == "merged":
                        await store.maintain()
                return written

            filling = asyncio.create_task(fill()) if how != "alone" else None
            began = time.perf_counter()
            for start in range(500, 500 * 121, 500):
                at = start % len(live)
                before = time.perf_counter()
                await store.write(live[at : at + 500], {})
                spent[how].append((time.perf_counter() - before) * 1000)
                await asyncio.sleep(0.05)
            done.set()
            if filling is not None:
                stored += await filling / (time.perf_counter() - began)
            await store.close()
            await other.close()
    report = {
        f"live, {how}": {
            "ms_median": round(statistics.median(times), 1),
            "ms_p99": round(statistics.quantiles(times, n=100)[98], 1),
        }
        for how, times in spent.items()
    }
    report["back-fill"] = {"rows_per_s": round(stored / arguments.runs / 2)}
    return report


# --- from Kafka


class Consumer:
    """A process under measurement."""

    def __init__(self, argv: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log.open("wb")
        self.process = subprocess.Popen(argv, env=environment, cwd=log.parent, stdout=self._log, stderr=self._log)
        self._root = psutil.Process(self.process.pid)

    def cpu_s(self) -> float:
        times = [p.cpu_times() for p in (self._root, *self._root.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    async def measure(self, connection: asyncpg.Connection, table: str, total: int) -> tuple[float, float]:
        """Rows a second and µs of CPU a row, from the first commit with rows to the last.

        The database says afterwards when each was committed: to count the rows while they come takes the processors
        from the contestants, from the fastest the most.
        """
        used: list[tuple[float, float]] = []
        deadline = time.monotonic() + 180
        written, still = None, 0
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"ended by itself or stands still; see {self._log.name}")
            if not used or time.time() - used[-1][0] >= 0.1:  # looking takes processor time as well
                used.append((time.time(), self.cpu_s()))
            now = await connection.fetchval("SELECT pg_current_wal_insert_lsn()")
            written, still = now, still + 1 if now == written else 0
            if still == 20:
                still = 0
                if await connection.fetchval(f"SELECT count(*) FROM {table}") >= total:
                    break
            await asyncio.sleep(0.02)
        commits = await connection.fetch(
            "SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8, n"
            f" FROM (SELECT xmin, count(*) AS n FROM {table} GROUP BY xmin) AS x ORDER BY 1"
        )
        begin, end = commits[0][0], commits[-1][0]
        rows = sum(n for _, n in commits[1:])
        return rows / (end - begin), (interpolated(used, end) - interpolated(used, begin)) / rows * 1e6

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def interpolated(points: list[tuple[float, float]], x: float) -> float:
    """The second coordinate at `x` between points in order of their first."""
    n = min(max(bisect.bisect_left(points, (x,)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[n - 1], points[n]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


async def make_topics(kafka: Kafka, names: list[str]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    stamped = {"message.timestamp.type": "LogAppendTime"}
    await admin.create_topics([NewTopic(name, PARTITIONS, 1, topic_configs=stamped) for name in names])
    await admin.close()


def fill(kafka: Kafka, topic: str, messages: list[dict[str, Any]], device: str) -> None:
    producer = producer_of(kafka.bootstrap_servers)
    for i, message in enumerate(messages):
        producer.produce(topic, orjson.dumps(message), message[device].encode(), i % PARTITIONS)
    producer.flush()


async def run_kafka(
    name: str, number: int, kafka: Kafka, server: Postgres, arguments: argparse.Namespace, directory: Path
) -> tuple[float, float, list[float]]:
    """Rate, CPU a row, and of the worker the delays at half the rate, in ms."""
    prefix, database = f"s{number}.{name}.", f"bench_{number}_{name}"
    admin = await asyncpg.connect(server.dsn())
    await admin.execute(f'CREATE DATABASE "{database}"')
    await admin.close()
    dsn = server.dsn(database)
    work = directory / f"{number}-{name}"
    work.mkdir()
    settings = load(postgres={"url": dsn})
    await migrate_postgres(settings)
    ours = inputs(arguments.rows, arguments.series)
    store = TimescaleStore(lambda: settings)
    await store.write(ours[: arguments.series], {})
    await store.close()
    await reset(dsn)
    old = as_old(ours[: arguments.rows // 4])
    topic = prefix + ("decoded_iot_data" if name == "old" else topics.VALIDATED.name)
    declared = [topic] if name != "worker" else [t.full(prefix) for t in topics.TOPICS]
    await make_topics(kafka, declared)
    await asyncio.to_thread(
        fill, kafka, topic, old if name == "old" else ours, "mac_address" if name == "old" else "device_id"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "PEER_PREFIX": prefix, "PEER_BROKER": kafka.bootstrap_servers, "PEER_POSTGRES": dsn,
        "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers, "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
        "PRESERVARIUM_KAFKA__GROUP": f"{prefix}group", "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
        "PRESERVARIUM_POSTGRES__URL": dsn, "PRESERVARIUM_DATA_DIR": str(work / "data"), "PRESERVARIUM_AGENTS__ENABLED": "sink",
        "PRESERVARIUM_WEB__PORT": str(free_port()), "PRESERVARIUM_LOG_LEVEL": "WARNING", "PRESERVARIUM_ENV_FILE": os.devnull,
    }  # fmt: skip
    argv = {
        "old": [sys.executable, str(ROOT / "bench/peers/old_sink.py")],
        "loop": [sys.executable, str(ROOT / "bench/peers/copy_loop.py")],
        "worker": [str(Path(sys.executable).with_name("faust")), "-A", "preservarium", "worker", "-l", "warn"],
    }[name]
    connection = await asyncpg.connect(dsn)
    table = old_sink.TABLE if name == "old" else "measurements"
    consumer = Consumer(argv, environment, work / "log")
    delays: list[float] = []
    try:
        rate, cpu_us = await consumer.measure(connection, table, len(old) if name == "old" else len(ours))
        if name == "worker":
            delays = await delays_ms(kafka, topic, connection, rate / 2, arguments.series)
    finally:
        consumer.stop()
        await connection.close()
    return rate, cpu_us, delays


def send(brokers: str, topic: str, rate: float, series: int, total: int, start_us: int) -> None:
    """So many messages, evenly over time."""
    keyed = [(m["device_id"].encode(), orjson.dumps(m)) for m in inputs(total, series, 1, start_us)]
    producer = producer_of(brokers)

    def produce(n: int) -> None:
        key, value = keyed[n]
        producer.produce(topic, value, key, n % PARTITIONS)

    paced(producer, produce, 0, total, rate)


async def delays_ms(
    kafka: Kafka, topic: str, connection: asyncpg.Connection, rate: float, series: int, seconds: float = 8.0
) -> list[float]:
    """From the append of a record to the commit of its row, for all records of so many seconds.

    The producer is a process of its own, as devices are, and the database says afterwards when each row was committed:
    to look while they come takes the processors, and is late where they are busy.
    """
    total, start_us = int(rate * seconds), time.time_ns() // 1000
    held = "SELECT partition, next_offset FROM sink_offsets WHERE sink = 'sink'"
    starts: dict[int, int] = dict(await connection.fetch(held))
    arguments = kafka.bootstrap_servers, topic, rate, series, total, start_us
    sending = multiprocessing.get_context("spawn").Process(target=send, args=arguments)
    sending.start()
    deadline = time.monotonic() + seconds + 90
    while sum(dict(await connection.fetch(held)).values()) - sum(starts.values()) < total:
        if time.monotonic() > deadline:
            raise SystemExit("not everything was stored")
        await asyncio.sleep(0.5)
    await asyncio.to_thread(sending.join)
    appended = await appended_at(kafka, topic, starts, total)
    commits = await connection.fetch(
        "SELECT raw_partition, raw_offset, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM measurements"
        " WHERE received_at > $1",
        instant(start_us),
    )
    # The number of a message is its raw offset here, and its partitions take turns.
    return [(at - appended[partition][starts[partition] + n // PARTITIONS]) * 1000 for partition, n, at in commits]


async def appended_at(kafka: Kafka, topic: str, starts: dict[int, int], total: int) -> dict[int, dict[int, float]]:
    """When the broker appended each record, by partition and offset, seconds since the epoch."""
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka.bootstrap_servers)
    await consumer.start()
    consumer.assign([TopicPartition(topic, p) for p in starts])
    for partition, start in starts.items():
        consumer.seek(TopicPartition(topic, partition), start)
    found: dict[int, dict[int, float]] = {p: {} for p in starts}
    while sum(map(len, found.values())) < total:
        for tp, records in (await consumer.getmany(timeout_ms=1000)).items():
            found[tp.partition].update((r.offset, r.timestamp / 1000) for r in records)
    await consumer.stop()
    return found


async def bench_kafka(server: Postgres, arguments: argparse.Namespace, directory: Path) -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[float, float, list[float]]]] = {"old": [], "loop": [], "worker": []}
    with_kafka = Kafka(directory / "kafka")
    with_kafka.start()
    try:
        for number in range(arguments.runs):
            for name, results in found.items():
                results.append(await run_kafka(name, number, with_kafka, server, arguments, directory))
                rate, cpu_us, _ = results[-1]
                print(f"run {number} {name:8} {rate:9,.0f} rows/s {cpu_us:6.1f} µs", file=sys.stderr, flush=True)
    finally:
        with_kafka.stop()
    report: dict[str, dict[str, float]] = {}
    for name, results in found.items():
        report[f"kafka, {name}"] = {
            "rows_per_s": round(statistics.median(r[0] for r in results)),
            "cpu_us_per_row": round(statistics.median(r[1] for r in results), 2),
        }
    for name in ("loop", "worker"):
        pairs = list(zip(found[name], found["old"], strict=True))
        report[f"kafka, {name}"]["ratio_to_old"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 2)
        report[f"kafka, {name}"]["cpu_share_of_old"] = round(statistics.median(a[1] / b[1] for a, b in pairs), 3)
    pairs = list(zip(found["worker"], found["loop"], strict=True))
    report["kafka, worker"]["cpu_to_loop"] = round(statistics.median(a[1] / b[1] for a, b in pairs), 2)
    p99s = [statistics.quantiles(delays, n=100)[98] for _, _, delays in found["worker"]]
    report["half load"] = {
        "rows_per_s": round(statistics.median(r[0] for r in found["worker"]) / 2),
        "ms_median": round(statistics.median(statistics.median(r[2]) for r in found["worker"])),
        "ms_p99": round(statistics.median(p99s)),
        "ms_p99_worst_run": round(max(p99s)),
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["store", "kafka", "backfill"], help="store, kafka, backfill")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--series", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=Sink().transaction_rows_max)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logs.set_level("WARNING")
    directory = Path(tempfile.mkdtemp(prefix="preservarium-bench-"))
    directory.chmod(0o755)
    server = Postgres(directory / "postgres", settings=SERVER)
    report: dict[str, dict[str, float]] = {}
    server.start()
    try:
        if "store" in arguments.parts:
            report |= uvloop.run(bench_store(server.dsn(), arguments))
        if "kafka" in arguments.parts:
            report |= uvloop.run(bench_kafka(server, arguments, directory))
        if "backfill" in arguments.parts:
            report |= uvloop.run(bench_backfill(server.dsn(), arguments))
    finally:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        json.dump({"cpus": os.cpu_count(), "python": sys.version.split()[0], **report}, sys.stdout, indent=2)
        print()
        return
    for name, figures in report.items():
        print(f"{name:14}", "  ".join(f"{k} {v}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
