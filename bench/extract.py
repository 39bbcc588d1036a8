"""What extracting tasks costs: memory by the number of rows, rows a second, and what it costs when nothing changes.

    python -m bench.extract [--rows 10000,1000000,10000000] [--idle-s 60] [--no-kafka] [--json]

A real PostgreSQL holds the source and our ledger, a real Kafka takes the events; each size is read by a fresh process from the
first row to the last, and then looked at again while nothing changes. `peak` is the process's largest resident memory, its
`growth` that beyond what it had after its first 5,000 rows. With --no-kafka events are counted and not sent, which leaves
the reading and the ledger. The idle process is the service as a worker runs it, with `interval_max_s` at its default: CPU of
the process and rows written in the database.
"""

import argparse
import asyncio
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import uvloop
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from preservarium import logs, topics
from preservarium.embedded.kafka import Kafka
from preservarium.embedded.postgres import Postgres
from preservarium.extract.ledger import Ledger
from preservarium.extract.postgres import PostgresSource
from preservarium.extract.service import Extractor, ExtractService
from preservarium.settings import LiveSettings, load
from preservarium.stores.migrate import MIGRATIONS, migrate_postgres
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

PARTITIONS = 4
#: Rows after which a process has everything that it needs: connections, caches, modules.
WARM_ROWS = 5_000
TASKS = """
CREATE TABLE tasks (id bigint PRIMARY KEY, file_id text, stage text, status text, employee_code text, assigned_at timestamptz,
                    updated_at timestamptz)"""
ROWS = """
INSERT INTO tasks SELECT i, 'file-' || i % 1000000, 'stage-' || i % 7, 'assigned', 'E' || i % 300, t, t
FROM (SELECT i, timestamptz '2025-01-01' + i * INTERVAL '1 second' AS t FROM generate_series($1::bigint, $2::bigint) i) x"""


def settings(dsn: str, kafka: str, prefix: str) -> LiveSettings:
    return LiveSettings(
        load(
            postgres={"url": dsn},
            kafka={"bootstrap_servers": kafka, "topic_prefix": prefix, "partitions": PARTITIONS},
            extract={"url": dsn, "employees_table": ""},
        )
    )


async def read(live: LiveSettings, with_kafka: bool) -> dict[str, Any]:
    """One turn over everything, in this process."""
    process = psutil.Process()
    publisher = Publisher(live)
    source = PostgresSource(live)
    await source.open()
    connection = await asyncpg.connect(live().postgres.dsn)
    sent = 0
    warm_bytes = 0

    async def publish(sends: Sequence[Send]) -> None:
        nonlocal sent, warm_bytes
        if with_kafka:
            await publisher.publish(sends)
        sent += len(sends)
        if sent >= WARM_ROWS and not warm_bytes:
            warm_bytes = process.memory_info().rss

    extractor = Extractor(source, Ledger(connection), publish, partitions=PARTITIONS)
    started, cpu = time.monotonic(), time.process_time()
    await extractor.turn()
    took_s, cpu_s = time.monotonic() - started, time.process_time() - cpu
    again = time.monotonic()
    same = await extractor.turn()
    look_s = time.monotonic() - again
    await source.close()
    await connection.close()
    await publisher.on_stop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows": sent, "seconds": took_s, "rows_per_s": sent / took_s, "cpu_us_per_row": cpu_s / sent * 1e6,
        "peak_mb": peak / 1e6, "warm_mb": warm_bytes / 1e6, "sent_again": same, "look_ms": look_s * 1e3,
    }  # fmt: skip


async def idle(live: LiveSettings, seconds: float) -> dict[str, Any]:
    """The service while nothing changes, from when it has looked often enough to be at its longest interval."""
    connection = await asyncpg.connect(live().postgres.dsn)
    writes = "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del) FROM pg_stat_user_tables"
    service = ExtractService(live, Publisher(live))
    await service.start()
    # 2, 4, 8, 16 s: after half a minute a look is 32 s away.
    await asyncio.sleep(32)
    before = await connection.fetchval(writes)
    started, cpu = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    cpu_s, took_s = time.process_time() - cpu, time.monotonic() - started
    await asyncio.sleep(2)
    written = int(await connection.fetchval(writes) - before)
    await service.stop()
    await connection.close()
    return {"seconds": took_s, "cpu_percent": cpu_s / took_s * 100, "rows_written": written}


async def prepare(dsn: str, rows: int, kafka: str | None, prefix: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(TASKS)
    for start in range(1, rows + 1, 1_000_000):
        await connection.execute(ROWS, start, min(rows, start + 999_999))
    await connection.execute("CREATE INDEX ON tasks (updated_at, id)")
    await connection.execute("ANALYZE tasks")
    await connection.close()
    if kafka:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        await admin.create_topics([NewTopic(prefix + topics.TASK_EVENTS.name, PARTITIONS, 1)])
        await admin.close()


async def child(what: str, *arguments: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.extract", "--child", what, *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    if process.returncode:
        message = f"{what} failed: {process.returncode}"
        raise SystemExit(message)
    found: dict[str, Any] = json.loads(out)
    return found


async def run(sizes: list[int], idle_s: float, with_kafka: bool) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix="bench-extract-"))
    migrations = directory / "migrations"
    (migrations / "postgres").mkdir(parents=True)
    shutil.copy(MIGRATIONS / "postgres" / "0012_extract.sql", migrations / "postgres")
    server = Postgres(directory / "postgres", settings={"shared_buffers": "512MB", "max_wal_size": "4GB"})
    broker = Kafka(directory / "kafka") if with_kafka else None
    result: dict[str, Any] = {"kafka": with_kafka, "sizes": []}
    try:
        server.start()
        if broker:
            broker.start()
        bootstrap = broker.bootstrap_servers if broker else "127.0.0.1:9"
        for rows in sizes:
            name = f"bench_{rows}"
            connection = await asyncpg.connect(server.dsn())
            await connection.execute(f"CREATE DATABASE {name}")
            await connection.close()
            dsn = server.dsn(name)
            await migrate_postgres(settings(dsn, bootstrap, "")(), directory=migrations)
            await prepare(dsn, rows, bootstrap if broker else None, f"b{rows}.")
            found = await child("read", dsn, bootstrap, f"b{rows}.", "1" if with_kafka else "0")
            result["sizes"].append(found)
            print(
                f"{found['rows']:>11,} rows  {found['rows_per_s']:>8,.0f} rows/s  {found['cpu_us_per_row']:.0f} µs CPU a row"
                f"  peak {found['peak_mb']:.1f} MB (after {WARM_ROWS:,} rows {found['warm_mb']:.1f})"
                f"  look without change {found['look_ms']:.1f} ms",
                file=sys.stderr,
            )
            if rows is sizes[-1] and idle_s:
                result["idle"] = await child("idle", dsn, bootstrap, f"b{rows}.", str(idle_s))
                print(f"idle: {result['idle']}", file=sys.stderr)
    finally:
        server.stop()
        if broker:
            broker.stop()
        shutil.rmtree(directory, ignore_errors=True)
    peaks = [s["peak_mb"] for s in result["sizes"]]
    result["peak_ratio"] = max(peaks) / min(peaks)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,1000000,10000000")
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--no-kafka", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logs.configure("ERROR", "console")
    if arguments.child:
        what, dsn, kafka, prefix, last = arguments.child
        live = settings(dsn, kafka, prefix)
        task = read(live, last == "1") if what == "read" else idle(live, float(last))
        print(json.dumps(uvloop.run(task)))
        return
    sizes = [int(n) for n in arguments.rows.split(",")]
    result = uvloop.run(run(sizes, arguments.idle_s, not arguments.no_kafka))
    print(
        json.dumps(result, indent=2) if arguments.json else f"largest peak / smallest peak: {result['peak_ratio']:.3f}"
    )


if __name__ == "__main__":
    main()
