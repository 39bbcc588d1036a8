"""ClickHouse as sync fills it: dashboards beside the old service's text, insert rate, latency, and what idling costs.

    .venv/bin/python bench/sync.py [--events 10000000] [--files 200000] [--measurements 50000000] [--runs 200] [--json]

Everything in one embedded engine, and ratios from one run:

- queries: every dashboard (preservarium/stores/dashboards.sql) `--runs` times with parameters that change, interleaved with the old
  service's text on the same rows: argMax of each column over the whole history, by file or by series, and around it what the
  dashboard asks. The data are made in the engine; what the tables of the materialized views hold came through them.
- insert: batches of 50,000 readings in columns through the store, with tokens; rows a second of one core (this process and the
  engine bound to it) and of the wall clock. `stage`: the same from Kafka's records on, parsed.
- latency: events at half of the rate that one life of the feed reaches, from the producer's clock to the insert's acknowledgement,
  when the row is visible at the latest: queries look for some at once. To ask for all of them took a third of a core from the engine.
- idle: CPU of a process with every feed of sync and nothing to do, and rows inserted meanwhile.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import psutil
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from bench.producing import paced, producer_of
from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.embedded.clickhouse import ClickHouse
from preservarium.embedded.kafka import Kafka
from preservarium.settings import LiveSettings, load
from preservarium.stages import sync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.dashboards import DASHBOARDS
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.streaming.feeds import GroupFeed
from preservarium.streaming.runner import Runner
from preservarium.streaming.stage import Batch

STAGES = ("receive", "scan", "index", "ocr", "verify", "repair", "export", "archive")
DAY_US = 86_400_000_000
DEVICES = 1_000
#: The replaced service's text for "where is every file now" (its own columns, on task_events).
OLD_FILES = (
    "SELECT file_id, argMax(stage, assigned_at) AS stage, argMax(employee_code, assigned_at) AS employee_code,"
    " argMax(employee_name, assigned_at) AS employee_name, argMax(status, assigned_at) AS status,"
    " argMax(completed_at, assigned_at) AS completed, max(assigned_at) AS at FROM task_events GROUP BY file_id"
)
#: Every stage of every file likewise: what throughput and times were computed from.
OLD_STAGES = (
    "SELECT file_id, stage, argMax(employee_code, assigned_at) AS employee_code, argMax(status, assigned_at) AS status,"
    " argMax(completed_at, assigned_at) AS completed, argMax(assigned_at, assigned_at) AS at FROM task_events GROUP BY file_id, stage"
)
OLD_LATEST = (
    "SELECT device_id, component_type, pin_position, connector_mode, argMax(value, timestamp) AS value, argMax(unit, timestamp) AS unit,"
    " argMax(quality, timestamp) AS quality, max(timestamp) AS at FROM measurements"
    " GROUP BY device_id, component_type, pin_position, connector_mode"
)
OLD: dict[str, str] = {
    "stages": f"SELECT stage, status, count(), min(at) FROM ({OLD_FILES}) GROUP BY stage, status ORDER BY stage, status",
    "files": f"SELECT * FROM ({OLD_FILES}) WHERE stage = 'ocr' ORDER BY file_id LIMIT 50",
    "waiting": f"SELECT * FROM ({OLD_FILES}) WHERE completed IS NULL ORDER BY at LIMIT 50",
    "load": f"SELECT employee_code, count() FROM ({OLD_FILES}) WHERE completed IS NULL GROUP BY employee_code ORDER BY 2 DESC",
    "throughput": f"SELECT toDate(completed) AS d, stage, count() FROM ({OLD_STAGES}) WHERE d > today() - 30 GROUP BY d, stage",
    "time_in_stage": f"SELECT stage, avg(dateDiff('second', at, completed)) FROM ({OLD_STAGES})"
    " WHERE toDate(completed) > today() - 30 GROUP BY stage",
    "latest": f"SELECT * FROM ({OLD_LATEST}) ORDER BY device_id LIMIT 200",
    "fleet": "SELECT toDate(timestamp) AS d, count(), uniqExact(device_id), countIf(quality IN (3, 4, 9)) FROM measurements"
    " WHERE d > today() - 30 GROUP BY d",
}  # fmt: skip


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def generate(store: ClickHouseStore, events: int, files: int, measurements: int) -> dict[str, float]:
    """Task events of a year, each file going through its stages; readings of 30 days, a minute apart."""
    now_us = time.time_ns() // 1000
    command = store._client.command
    spent = {}
    began = time.perf_counter()
    step = max(1, 330 * DAY_US // events)
    start_us = now_us - step * events - 60_000_000
    stages = ", ".join(f"'{s}'" for s in STAGES)
    pieces = 20
    a_file = max(1, events // files)  # events of one file
    for piece in range(pieces):
        first, last = events * piece // pieces, events * (piece + 1) // pieces
        # Files begin one after the other and a few thousand are under way at a time; three events a stage, one in fifty of the
        # files stops somewhere. An event's number tells its file, its place in it and its time.
        await command(
            f"""INSERT INTO task_events SELECT concat('F', leftPad(toString(file), 8, '0')) AS file_id, toString(n) AS event_id,
              fromUnixTimestamp64Micro(at, 'UTC') AS assigned_at,
              bitShiftLeft(toUInt256(at), 192) + bitShiftLeft(toUInt256(n), 128) AS version,
              arrayElement([{stages}], stage_number + 1) AS stage, arrayElement(['assigned', 'started', 'done'], part + 1) AS status,
              concat('E', toString(cityHash64(file, stage_number) % 200)) AS employee_code, concat('N', employee_code) AS employee_name,
              NULL AS started_at, if(part = 2, fromUnixTimestamp64Micro(at + toInt64(cityHash64(n) % 7200000000), 'UTC'), NULL) AS completed_at,
              fromUnixTimestamp64Micro(at, 'UTC') AS changed_at, toString(n) AS task_id, '' AS experiment_id, 0 AS deleted
            FROM (SELECT number AS n, intDiv(n, {a_file} * 5000) AS wave, n % ({a_file} * 5000) AS w, wave * 5000 + w % 5000 AS file,
              intDiv(w, 5000) AS place, least(intDiv(place * 8, {a_file}), if(cityHash64(file) % 50 = 0, cityHash64(file) % 8, 7)) AS stage_number,
              if(stage_number < intDiv(place * 8, {a_file}), 1, place % 3) AS part, {start_us} + toInt64(n) * {step} AS at
              FROM numbers({first}, {last - first}))""",
            settings={"max_partitions_per_insert_block": 0},
        )
    spent["events_s"] = time.perf_counter() - began
    began = time.perf_counter()
    minutes = max(1, measurements // DEVICES // 2)
    spacing = 29 * DAY_US // minutes
    begin_us = now_us - 29 * DAY_US
    for piece in range(pieces):
        first, last = measurements * piece // pieces, measurements * (piece + 1) // pieces
        await command(
            f"""INSERT INTO measurements (timestamp, device_id, connector_mode, component_type, pin_position, value, unit, topic, quality,
              parser, config_rev, generation, received_at, raw_partition, raw_offset, raw_index)
            SELECT fromUnixTimestamp64Micro({begin_us} + toInt64(intDiv(number, {DEVICES * 2})) * {spacing}, 'UTC') AS at,
              concat('70b3d57ba000', leftPad(lower(hex(toUInt16(intDiv(number, 2) % {DEVICES}))), 4, '0')), 'LoRaWAN',
              if(number % 2 = 0, 'temperature', 'humidity'), '-1', 20 + sin(number / 1000) * 5, if(number % 2 = 0, 'Cel', '%'), 'up',
              if(cityHash64(number) % 100 = 0, 3, 1), 'p@1', 7, 0, at, number % 12, number, 0
            FROM numbers({first}, {last - first})""",
            settings={"max_partitions_per_insert_block": 0},
        )
    await command(
        f"""INSERT INTO aggregates SELECT hex(cityHash64(d, h)), 0, concat('70b3d57ba000', leftPad(lower(hex(toUInt16(d))), 4, '0')), 'LoRaWAN',
          'temperature', '-1', 'Cel', fromUnixTimestamp64Micro(toInt64({begin_us // 3_600_000_000} + h) * 3600000000, 'UTC') AS s,
          s + INTERVAL 1 HOUR, 3600, 3600, 60, 15, 25, 20, 1200, 20, s, NULL, 'watermark', 0
        FROM (SELECT number % {DEVICES} AS d, intDiv(number, {DEVICES}) AS h FROM numbers({DEVICES * 29 * 24}))"""
    )
    await command(
        f"""INSERT INTO anomalies SELECT toString(number), concat('70b3d57ba000', leftPad(lower(hex(toUInt16(number % {DEVICES}))), 4, '0')),
          'LoRaWAN', 'temperature', '-1', if(number % 2 = 0, 'begins', 'ends'),
          fromUnixTimestamp64Micro({begin_us} + toInt64(number) * 50000000, 'UTC'), 40, 'Cel', 20, 7, 6, 0, 0, number, 0 FROM numbers(50000)"""
    )
    await command(
        f"""INSERT INTO alarm_events (transition_id, alarm_id, device_id, rule, severity, transition, occurred_at, detected_at)
        SELECT toString(number), toString(intDiv(number, 2)), concat('70b3d57ba000', leftPad(lower(hex(toUInt16(number % {DEVICES}))), 4, '0')),
          'hot', 'major', if(number % 2 = 0, 'raised', 'cleared'),
          fromUnixTimestamp64Micro({begin_us} + toInt64(number) * 50000000, 'UTC') AS at, at FROM numbers(50000)"""
    )
    await command(
        "INSERT INTO employees SELECT concat('E', toString(number)), 1, concat('Name ', toString(number)), '', 'd', 1, now64(6), 0 FROM numbers(200)"
    )
    spent["measurements_s"] = time.perf_counter() - began
    return spent


async def settle(store: ClickHouseStore, within_s: float) -> None:
    """Wait for the merges that the tables' own settings bring about; what has not merged by then is measured as it is."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        (merging,) = (await store.query("SELECT count() FROM system.merges"))[0]
        (parts,) = (await store.query(
            "SELECT count() FROM system.parts WHERE active AND database = currentDatabase() AND table IN ('pipeline_state', 'latest_values')"
        ))[0]  # fmt: skip
        if not merging and parts <= 2:
            return
        await asyncio.sleep(1)


def parameters(rng: random.Random, files: int) -> dict[str, dict[str, Any]]:
    """Of every dashboard, other ones each time."""
    device = f"70b3d57ba000{rng.randrange(DEVICES):04x}"
    file_id = f"F{rng.randrange(files):08d}"
    start = time.time_ns() // 1000 - rng.randint(2, 25) * DAY_US
    common = {"device": device, "component": "temperature", "start": start, "end": start + DAY_US, "file_id": file_id}
    own: dict[str, dict[str, Any]] = {
        "waiting": {"stage": rng.choice(["", *STAGES])}, "files": {"stage": rng.choice(["", "ocr", "scan"]), "after": file_id},
        "latest": {"device": "", "after": device}, "windows": {"end": start + 4 * DAY_US},
    }  # fmt: skip
    return {
        name: {p.name: common[p.name] for p in dashboard.parameters if p.name in common} | own.get(name, {})
        for name, dashboard in DASHBOARDS.items()
    }


async def queries(
    store: ClickHouseStore, files: int, runs: int, old_runs: int, engine: psutil.Process
) -> dict[str, dict[str, float]]:
    """Times by the clock and the engine's CPU; `nothing` is SELECT 1: what the machine's other work adds to any of them."""
    rng = random.Random(1)
    spent: dict[str, list[float]] = {name: [] for name in DASHBOARDS}
    old: dict[str, list[float]] = {name: [] for name in OLD}

    cpu: dict[str, float] = dict.fromkeys(["nothing", *DASHBOARDS], 0.0)
    spent["nothing"] = []

    async def timed(into: list[float], text: str, given: Any = None) -> None:
        began = time.perf_counter()
        await store.select(text, given)
        into.append((time.perf_counter() - began) * 1000)

    async def costed(name: str, text: str, given: Any = None) -> None:
        before = sum(engine.cpu_times()[:2])
        await timed(spent[name], text, given)
        cpu[name] += sum(engine.cpu_times()[:2]) - before

    for run in range(runs):
        given = parameters(rng, files)
        await costed("nothing", "SELECT 1")
        for name, dashboard in DASHBOARDS.items():
            await costed(name, dashboard.text, dashboard.checked(given[name]))
        if run % max(1, runs // old_runs) == 0:
            for name, text in OLD.items():
                await timed(old[name], text)
    report = {}
    for name, values in spent.items():
        report[name] = {
            "median_ms": round(statistics.median(values), 1), "p99_ms": round(percentile(values, 0.99), 1), "max_ms": round(max(values), 1),
            "engine_cpu_ms": round(cpu[name] / len(values) * 1000, 1),
        }  # fmt: skip
        if name in old:
            report[name]["old_median_ms"] = round(statistics.median(old[name]), 1)
            report[name]["times_faster"] = round(statistics.median(old[name]) / statistics.median(values), 1)
    return report


def line(device: int, at: int, partition: int, offset: int, readings: int) -> dict[str, Any]:
    return {
        "device_id": f"70b3d57ba001{device:04x}", "connector_mode": "LoRaWAN", "topic": "up", "timestamp": at, "received_at": at,
        "raw_partition": partition, "raw_offset": offset, "raw_index": 0, "parser": "p@1", "config_rev": 7, "generation": 0,
        "readings": [
            {"component_type": "temperature", "pin_position": str(pin), "value": 20.0 + pin, "unit": "Cel", "quality": 1, "flags": []}
            for pin in range(readings)
        ],
    }  # fmt: skip


class Rec:
    """A Kafka record."""

    __slots__ = ("headers", "key", "offset", "timestamp", "value")

    def __init__(self, offset: int, value: bytes) -> None:
        self.offset, self.value = offset, value
        self.key, self.timestamp, self.headers = b"d", 0, ()


async def inserts(store: ClickHouseStore, settings: LiveSettings, engine_pid: int, runs: int) -> dict[str, float]:
    """Rows a second: of ready columns, and from records on; by the clock, and by the CPU of this process and the engine."""
    rows = 50_000
    now_us = time.time_ns() // 1000
    lines = [orjson.dumps(line(i % 500, now_us + i, 0, i, 5)) for i in range(rows // 5)]
    stage = sync.ReadingSync(store, settings)
    columns: Any = {name: [] for name in sync.MEASUREMENTS.types}
    stage._fill(columns, Batch(topics.VALIDATED.name, 0, [Rec(i, value) for i, value in enumerate(lines)]), {})
    numbers = itertools.count()
    engine = psutil.Process(engine_pid)

    async def columnar() -> None:
        await store.insert("measurements", columns, sync.MEASUREMENTS.types, token=f"bench-{next(numbers)}")

    async def staged() -> None:
        first = next(numbers) * 1_000_000
        batch = Batch(topics.VALIDATED.name, 0, [Rec(first + i, value) for i, value in enumerate(lines)])
        await sync.ReadingSync(store, settings)([batch])

    report: dict[str, float] = {}
    for name, go in (("columns", columnar), ("stage", staged)):
        await go()
        walls, cores = [], []
        for _ in range(runs):
            cpu = time.process_time() + sum(engine.cpu_times()[:2])
            began = time.perf_counter()
            await go()
            walls.append(rows / (time.perf_counter() - began))
            # The engine counts in hundredths of a second: of one insert that is coarse, of their median not.
            cores.append(rows / max(0.001, time.process_time() + sum(engine.cpu_times()[:2]) - cpu))
        report[f"{name}_rows_per_s"] = round(statistics.median(walls))
        report[f"{name}_rows_per_cpu_s"] = round(statistics.median(cores))
    return report


class Silent:
    """A publisher for stages that refuse nothing here."""

    async def publish(self, sends: Any) -> dict[str, int]:
        assert not sends, sends
        return {}


def feed_of(stage: Any, table: sync.Table, settings: LiveSettings, records_max: int) -> GroupFeed:
    """A feed of sync as agents/sync.py declares it, without the rest of a worker."""

    async def handler(batches: Any) -> Any:
        await feed.record_plan(batches)
        return await stage(batches)

    async def put_state(*_: Any) -> None:
        raise AssertionError

    runner = Runner(table.stage, handler, publisher=Silent(), put_state=put_state, live=settings, clock=SystemClock())
    feed = GroupFeed(
        table.stage, table.topic.name, kafka_topic=table.topic.full(settings().kafka.topic_prefix), group=f"bench-{table.stage}", runner=runner,
        live=settings, records_max=lambda: records_max, linger_s=lambda: settings().sync.linger_s, flights=settings().sync.flights, on_assigned=None, planned=True,
        memory=stage if table is sync.MEASUREMENTS else None,
    )  # fmt: skip
    return feed


class Timed:
    """The store of tasks; notes when each insert was acknowledged."""

    def __init__(self, store: ClickHouseStore) -> None:
        self._store = store
        self.rows = 0
        #: when, and of the rows when they were sent, s
        self.inserts: list[tuple[float, list[float]]] = []
        self.last_file = ""  #: whose row was acknowledged last

    async def insert(self, table: str, columns: Any, types: Any, *, token: str) -> None:
        await self._store.insert(table, columns, types, token=token)
        self.inserts.append((time.time(), [at / 1e6 for at in columns["assigned_at"]]))
        self.rows += len(columns["file_id"])
        self.last_file = columns["file_id"][-1]


async def until(condition: Callable[[], Awaitable[bool]], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        await asyncio.sleep(0.05)


def send(brokers: str, topic: str, partitions: int, first: int, end: int, rate: float = float("inf")) -> None:
    """Task events by number; the number tells the partition, `assigned_at` when it was sent."""
    producer = producer_of(brokers)

    def produce(n: int) -> None:
        event = {
            "file_id": f"L{n}", "stage": "scan", "status": "assigned", "employee_code": "E1", "assigned_at": time.time_ns() // 1000, "event_id": n,
        }  # fmt: skip
        producer.produce(topic, orjson.dumps(event), partition=n % partitions)

    paced(producer, produce, first, end, rate)


async def running(settings: LiveSettings, store: ClickHouseStore, seconds: float) -> dict[str, Any]:
    """Latency at half load, and the cost of idling, with every feed of sync in this process."""
    kafka = settings().kafka
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    await admin.start()
    tables = [sync.MEASUREMENTS, *sync.EVENTS, sync.TASK_EVENTS, sync.EMPLOYEES]
    await admin.create_topics([NewTopic(t.topic.full(kafka.topic_prefix), kafka.partitions, 1) for t in tables])
    await admin.close()
    timed: Any = Timed(store)
    feeds = [
        feed_of(sync.ReadingSync(store, settings), sync.MEASUREMENTS, settings, settings().sync.rows_max // 5),
        *(feed_of(sync.EventSync(t, store, settings), t, settings, sync.EVENTS_MAX) for t in sync.EVENTS),
        feed_of(sync.TaskSync(timed, settings), sync.TASK_EVENTS, settings, sync.EVENTS_MAX),
        feed_of(sync.EmployeeSync(store, settings), sync.EMPLOYEES, settings, sync.EVENTS_MAX),
    ]
    tasks = [asyncio.create_task(feed.run()) for feed in feeds]

    async def assigned() -> bool:
        return all(len(f.lanes) == kafka.partitions and all(x.known for x in f.lanes.values()) for f in feeds)

    await until(assigned, 60)
    topic = topics.TASK_EVENTS.full(kafka.topic_prefix)

    async def stored() -> int:
        return int(
            (await store.query("SELECT count() FROM pipeline_state WHERE file_id >= 'L' AND file_id < 'M'"))[0][0]
        )

    try:
        # Idle: nothing comes. Measured before there is a producer, which would cost as much.
        await asyncio.sleep(10)
        if profile := os.environ.get("BENCH_PROFILE"):
            import cProfile

            profiler = cProfile.Profile()
            profiler.enable()
            await asyncio.sleep(15)
            profiler.disable()
            profiler.dump_stats(profile)
        before = await store.query("SELECT sum(value) FROM system.events WHERE event = 'InsertedRows'")
        cpu, began = time.process_time(), time.perf_counter()
        await asyncio.sleep(60)
        idle = (time.process_time() - cpu) / (time.perf_counter() - began)
        after = await store.query("SELECT sum(value) FROM system.events WHERE event = 'InsertedRows'")
        # What it can do: a backlog, until all of it is there.
        backlog = 10_000 * kafka.partitions
        began = time.perf_counter()
        await asyncio.to_thread(send, kafka.bootstrap_servers, topic, kafka.partitions, 0, backlog)

        async def caught_up() -> bool:
            return bool(timed.rows >= backlog)

        await until(caught_up, 120)
        most = backlog / (time.perf_counter() - began)
        rate = most / 2
        total = backlog + int(rate * seconds)
        # In a process of its own, as devices are.
        arguments = kafka.bootstrap_servers, topic, kafka.partitions, backlog, total, rate
        sending = multiprocessing.get_context("spawn").Process(target=send, args=arguments)
        first = len(timed.inserts)
        sending.start()
        end, looked_for = time.monotonic() + seconds + 30, 0
        while timed.rows < total and time.monotonic() < end:
            await asyncio.sleep(1.0)
            rows = await store.query(
                "SELECT count() FROM pipeline_state WHERE file_id = {id:String}", {"id": timed.last_file}
            )
            assert rows[0][0] > 0, "acknowledged and not visible"
            looked_for += 1
        await asyncio.to_thread(sending.join)
        lost = total - await stored()
        latencies = [at - sent for at, all_sent in timed.inserts[first:] for sent in all_sent]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "latency": {
            "backlog_events_per_s": round(most), "rate_per_s": round(rate), "events": len(latencies), "not_seen": lost, "looked_for": looked_for,
            "median_s": round(statistics.median(latencies), 3), "p99_s": round(percentile(latencies, 0.99), 3), "max_s": round(max(latencies), 3),
        },
        "idle": {"cpu_percent": round(idle * 100, 3), "feeds": len(feeds), "rows_inserted": int(after[0][0] - before[0][0])},
    }  # fmt: skip


async def bench(arguments: argparse.Namespace, url: str, pid: int, kafka: Kafka | None) -> dict[str, Any]:
    settings = LiveSettings(
        load(
            clickhouse={"url": url, "database": "bench", "timeout_s": 600},
            kafka={"bootstrap_servers": kafka.bootstrap_servers if kafka else "", "topic_prefix": "bench."},
        )
    )
    await migrate_clickhouse(settings())
    store = ClickHouseStore(settings)
    await store.query("SELECT 1")
    report: dict[str, Any] = {}
    if "queries" in arguments.parts:
        report["generate"] = await generate(store, arguments.events, arguments.files, arguments.measurements)
        print("generated", report["generate"], file=sys.stderr, flush=True)
        await settle(store, arguments.settle_s)
        report["queries"] = await queries(
            store, arguments.files, arguments.runs, max(3, arguments.runs // 20), psutil.Process(pid)
        )
        print("queries done", file=sys.stderr, flush=True)
    if "inserts" in arguments.parts:
        report["inserts"] = await inserts(store, settings, pid, 15)
    if "running" in arguments.parts:
        report |= await running(settings, store, arguments.seconds)
    await store.close()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--measurements", type=int, default=50_000_000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--settle-s", type=float, default=180.0)
    parser.add_argument("--parts", default="queries,inserts,running")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="preservarium-bench-"))
    engine = ClickHouse(directory / "clickhouse")
    kafka = Kafka(directory / "kafka") if "running" in arguments.parts else None
    try:
        engine.start()
        if kafka is not None:
            kafka.start()
        # The process that owns the engine, and not the guard before it.
        pid = next(p.pid for p in psutil.process_iter(["cmdline"]) if f"--port={engine.port}" in (p.info["cmdline"] or []) and "preservarium.embedded.clickhouse_server" in p.info["cmdline"][1:3])  # fmt: skip
        report = asyncio.run(bench(arguments, engine.url, pid, kafka))
    finally:
        if kafka is not None:
            kafka.stop()
        engine.stop()
        shutil.rmtree(directory, ignore_errors=True)
    report = {"cpus": os.cpu_count(), "load": os.getloadavg(), **report}
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for name, figures in report.items():
        if name == "queries":
            for query, values in figures.items():
                print(f"  {query:14}", "  ".join(f"{k} {v}" for k, v in values.items()))
        else:
            print(f"{name:10}", figures)


if __name__ == "__main__":
    main()
