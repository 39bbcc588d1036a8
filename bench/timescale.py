"""The old service's table and ours on one server, with the same rows: its ten queries, the bytes of a row, and rows a second.

    .venv/bin/python -m bench.timescale [ROWS] [--dsn URL] [--runs 5] [--devices 200] [--write-rows 50000] [--compressed] [--keep] [--json]

ROWS (a million by default) readings of 200 devices with ten series each, a message a minute, the last one now. Each design has a database of
its own, made anew. With TimescaleDB the old one is what its manual says: chunks of seven days, five indexes, compressed by device and component;
without the extension it is a table with its indexes. The queries are the manual's, through `iot_measurements` in both; those that a roll-up or
`latest` answers are also asked of our views (`ours, view`); of the last hour no roll-up is smaller than its rows here. Each query is asked of both in turn, `--runs` times after one that warms; medians are printed.

`--compressed` compresses every chunk that has ended at noon today and asks the queries once more. The rate is that of committed rows through each
service's own way of writing, alternately, into tables that hold the rest already. The figures to trust are the ratios of one run.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from bench.peers import old_sink
from bench.sink import SERVER, as_old, calm, inputs, lanes_of, run_ours
from preservarium.embedded.postgres import Postgres
from preservarium.settings import LiveSettings, load
from preservarium.stores.migrate import migrate_postgres
from preservarium.stores.timescale import TimescaleStore

SERIES_PER_DEVICE: Final = 10
#: One hour ago, for both alike: `now()` would be another instant at each call, and a fill takes minutes.
_HOUR: Final = "'{end}'::timestamptz - INTERVAL '1 hour'"
_DAY: Final = "'{end}'::timestamptz - INTERVAL '24 hours'"

#: name -> (the manual's statement, ours for the same answer where a view has it)
QUERIES: Final[dict[str, tuple[str, str | None]]] = {
    "recent 100": (f"SELECT * FROM iot_measurements WHERE timestamp > {_HOUR} ORDER BY timestamp DESC LIMIT 100", None),
    "performance statistics": (
        "SELECT device_id, component_type, COUNT(*) AS measurement_count, AVG(value) AS avg_value, MIN(timestamp) AS first_measurement,"
        " MAX(timestamp) AS last_measurement FROM iot_measurements GROUP BY device_id, component_type ORDER BY measurement_count DESC",
        "SELECT * FROM measurement_statistics ORDER BY measurement_count DESC",
    ),
    "ingestion rate": (
        f"SELECT date_trunc('minute', timestamp) AS minute, COUNT(*) AS records_per_minute FROM iot_measurements WHERE timestamp > {_HOUR}"
        " GROUP BY minute ORDER BY minute DESC LIMIT 10",
        None,
    ),
    "distribution by device": (
        "SELECT device_id, COUNT(*) AS total_records, MIN(timestamp) AS first_record, MAX(timestamp) AS latest_record FROM iot_measurements"
        " GROUP BY device_id ORDER BY total_records DESC",
        "SELECT * FROM device_statistics ORDER BY total_records DESC",
    ),
    "latest of a device": (
        "SELECT * FROM iot_measurements WHERE device_id = '{device}' ORDER BY timestamp DESC LIMIT 10",
        "SELECT * FROM newest_readings('{device}', 10)",
    ),
    "average temperature": (
        "SELECT date_trunc('minute', timestamp) AS minute, AVG(value) AS avg_temp FROM iot_measurements WHERE component_type = 'temperature_0'"
        f" AND timestamp > {_HOUR} GROUP BY minute ORDER BY minute",
        None,
    ),
    "device activity": (
        "SELECT device_id, component_type, COUNT(*) AS readings, AVG(value) AS avg_value, MIN(value) AS min_value, MAX(value) AS max_value"
        f" FROM iot_measurements WHERE timestamp > {_DAY} GROUP BY device_id, component_type ORDER BY device_id, component_type",
        "SELECT s.device_id, s.component_type, sum(r.records) AS readings, sum(r.sum) / nullif(sum(r.n), 0) AS avg_value, min(r.min), max(r.max)"
        f" FROM measurement_1h r JOIN series s USING (series_id) WHERE r.bucket > {_DAY} GROUP BY 1, 2 ORDER BY 1, 2",
    ),
    "gaps": (
        "SELECT device_id, component_type, timestamp, LAG(timestamp) OVER (PARTITION BY device_id, component_type ORDER BY timestamp) AS prev,"
        " timestamp - LAG(timestamp) OVER (PARTITION BY device_id, component_type ORDER BY timestamp) AS gap FROM iot_measurements"
        f" WHERE timestamp > {_HOUR} ORDER BY device_id, component_type, timestamp",
        None,
    ),
    "invalid values": (
        "SELECT device_id, component_type, COUNT(*) AS total, COUNT(value) AS valid_values, COUNT(*) - COUNT(value) AS null_values"
        f" FROM iot_measurements WHERE timestamp > {_HOUR} GROUP BY device_id, component_type",
        None,
    ),
    # By the way: a device that nobody knows, or that is silent for long.
    "latest of an unknown device": (
        "SELECT * FROM iot_measurements WHERE device_id = 'nobody' ORDER BY timestamp DESC LIMIT 10",
        "SELECT * FROM newest_readings('nobody', 10)",
    ),
    "count": ("SELECT count(*) FROM iot_measurements", "SELECT sum(total_records) FROM device_statistics"),
}  # fmt: skip

#: The same rows for both: a walk of hundredths for each series, receipts a quarter of a second later, a message of ten readings.
_SOURCE: Final = """
  SELECT d, c, '{end}'::timestamptz - (n * 60 + d * 60.0 / {devices}) * INTERVAL '1 second' AS timestamp,
         round((20 + 5 * sin(n / 200.0 + c) + ((n * 7919 + d * 104729 + c * 1299709) % 21) / 100.0)::numeric, 2)::float8 AS value,
         0.2 + ((n * 31 + d * 17) % 1000) / 10000.0 AS delay_s
  FROM generate_series({first}, {last}) AS n, generate_series(0, {devices} - 1) AS d, generate_series(0, 9) AS c"""
_OLD_FILL: Final = f"""
INSERT INTO iot_measurements SELECT timestamp, 'f2-' || lpad(to_hex(d), 12, '0'), 'LoRaWAN', 'temperature_' || c, '-1', value, '°C',
  'devices/f2-' || lpad(to_hex(d), 12, '0') || '/up' FROM ({_SOURCE}) AS r ORDER BY timestamp"""
_NEW_FILL: Final = f"""
INSERT INTO measurements (series_id, timestamp, value, quality, received_at, raw_partition, raw_offset, raw_index, generation, derivation_id,
                          ingested_at)
SELECT s.series_id, timestamp, value, 1, timestamp + delay_s * INTERVAL '1 second', d % 12, 1000000000 - (extract(epoch FROM '{{end}}'::timestamptz - timestamp) * 10)::bigint,
       0, 0, 1, date_bin('100 milliseconds', timestamp, '2000-01-01 00:00+00') + INTERVAL '1.1 seconds'
FROM ({_SOURCE}) AS r JOIN series s ON s.device_id = 'f2-' || lpad(to_hex(d), 12, '0') AND s.component_type = 'temperature_' || c ORDER BY timestamp"""
_NEW_SERIES: Final = """
INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit, topic)
SELECT 'f2-' || lpad(to_hex(d), 12, '0'), 'LoRaWAN', 'temperature_' || c, '-1', '°C', 'devices/f2-' || lpad(to_hex(d), 12, '0') || '/up'
FROM generate_series(0, {devices} - 1) AS d, generate_series(0, 9) AS c"""
_NEW_LATEST: Final = """
INSERT INTO latest (series_id, timestamp, value, quality, received_at)
SELECT s.series_id, m.timestamp, m.value, m.quality, m.received_at FROM series s
CROSS JOIN LATERAL (SELECT * FROM measurements m WHERE m.series_id = s.series_id ORDER BY timestamp DESC LIMIT 1) m
ON CONFLICT DO NOTHING"""
#: Minutes of each series that one statement of the fill brings: some 200,000 rows with 200 devices.
STEP: Final = 100


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


async def make(maintenance: str, database: str) -> str:
    connection = await asyncpg.connect(maintenance)
    await connection.execute(f'CREATE DATABASE "{database}"')
    await connection.close()
    return urlunsplit(urlsplit(maintenance)._replace(path=f"/{database}"))


async def make_old(dsn: str) -> bool:
    """The old service's table; returns whether it is a hypertable."""
    connection = await asyncpg.connect(dsn)
    hyper = bool(
        await connection.fetchval("SELECT EXISTS (SELECT FROM pg_available_extensions WHERE name = 'timescaledb')")
    )
    if hyper:
        await connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
        await connection.close()
        connection = await asyncpg.connect(dsn)
    await connection.execute(old_sink.SCHEMA.format(table="iot_measurements"))
    if hyper:
        await connection.execute("SELECT create_hypertable('iot_measurements', 'timestamp', if_not_exists => TRUE)")
        await connection.execute(
            "ALTER TABLE iot_measurements SET (timescaledb.compress, timescaledb.compress_segmentby = 'device_id,component_type',"
            " timescaledb.compress_orderby = 'timestamp DESC')"
        )
    await connection.close()
    return hyper


async def fill(old: str, new: str, devices: int, minutes: int, end: str) -> None:
    """The rows, a stretch of both at a time, the oldest first."""
    connections = [await asyncpg.connect(dsn) for dsn in (old, new)]
    await connections[1].execute(_NEW_SERIES.format(devices=devices))
    await connections[1].execute("INSERT INTO derivations (parser, config_rev) VALUES ('decentlab@3', 7)")
    for last in range(minutes - 1, -1, -STEP):
        words = {"devices": devices, "first": max(0, last - STEP + 1), "last": last, "end": end}
        for connection, statement in zip(connections, (_OLD_FILL, _NEW_FILL), strict=True):
            await connection.execute(statement.format(**words), timeout=None)
    await connections[1].execute(_NEW_LATEST)
    await connections[1].execute(
        "INSERT INTO rollup_dirty (from_at, to_at) SELECT min(timestamp), max(timestamp) + INTERVAL '1 microsecond' FROM measurements"
    )
    for connection in connections:
        await connection.execute("VACUUM ANALYZE", timeout=None)
        await connection.close()


async def make_rollups(dsn: str) -> None:
    store = TimescaleStore(LiveSettings(load(postgres={"url": dsn})))
    connection = await asyncpg.connect(dsn)
    for _ in range(10_000):
        await store.maintain()
        # What is not over stays marked: the views make it of the rows.
        if not await connection.fetchval(
            "SELECT EXISTS (SELECT FROM rollup_dirty WHERE to_at < now() - INTERVAL '1 day' OR NOT visible)"
        ):
            more = await connection.fetchval("SELECT refresh_rollups(5000, INTERVAL '60 minutes')")
            if not more:
                break
    await connection.execute("VACUUM ANALYZE", timeout=None)
    await connection.close()
    await store.close()


async def ask(connection: Any, statement: str) -> float:
    began = time.perf_counter()
    await connection.fetch(statement, timeout=None)
    return (time.perf_counter() - began) * 1000


async def ask_all(old: str, new: str, runs: int, words: dict[str, str]) -> dict[str, dict[str, float]]:
    """Median ms of each query in both designs, and the ratios."""
    report: dict[str, dict[str, float]] = {}
    before, after = await asyncpg.connect(old), await asyncpg.connect(new)
    for name, (statement, view) in QUERIES.items():
        spent: dict[str, list[float]] = {"old": [], "ours": [], **({"ours, view": []} if view else {})}
        for run in range(runs + 1):
            for who, connection, text in (
                ("old", before, statement),
                ("ours", after, statement),
                ("ours, view", after, view),
            ):
                if text is not None:
                    took = await ask(connection, text.format(**words))
                    if run:
                        spent[who].append(took)
        row = {who: round(statistics.median(times), 2) for who, times in spent.items()}
        row["old / ours"] = round(row["old"] / row["ours"], 2)
        if view:
            row["old / view"] = round(row["old"] / row["ours, view"], 2)
        report[name] = row
        say(f"{name}: {row}")
    await before.close()
    await after.close()
    return report


async def bytes_of(dsn: str, table: str, hyper: bool) -> int:
    connection = await asyncpg.connect(dsn)
    of = (
        f"SELECT hypertable_size('{table}')" if hyper
        else f"SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('{table}')"
        if await connection.fetchval("SELECT relkind = 'p' FROM pg_class WHERE oid = $1::text::regclass", table)
        else f"SELECT pg_total_relation_size('{table}')"
    )  # fmt: skip
    found = int(await connection.fetchval(of))
    await connection.close()
    return found


async def compress(dsn: str, table: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        f"DO $$ DECLARE c regclass; BEGIN FOR c IN SELECT show_chunks('{table}') LOOP PERFORM compress_chunk(c, if_not_compressed => true); END LOOP; END $$",
        timeout=None,
    )
    await connection.execute("VACUUM ANALYZE", timeout=None)
    await connection.close()


async def rates(old: str, new: str, rows: int, runs: int) -> dict[str, Any]:
    """Rows a second of each service's own way of writing, in turns: batches of 100 and a commit each; our store."""
    settings = LiveSettings(load(postgres={"url": new}))
    store = TimescaleStore(settings)
    found: dict[str, list[float]] = {"old": [], "ours": []}
    table, old_sink.TABLE = old_sink.TABLE, "iot_measurements"
    calm()
    try:
        for run in range(runs):
            ours = inputs(rows, 200, 1, time.time_ns() // 1000 - (run + 1) * 120_000_000 - 300_000_000)
            messages = as_old(ours)
            lanes = lanes_of(ours, 2)
            began = time.perf_counter()
            await asyncio.to_thread(old_sink.write_all, old, messages)
            found["old"].append(rows / (time.perf_counter() - began))
            connection = await asyncpg.connect(new)
            await connection.execute("DELETE FROM sink_offsets")
            await connection.close()
            began = time.perf_counter()
            await run_ours(store, lanes, 5_000)
            found["ours"].append(rows / (time.perf_counter() - began))
    finally:
        old_sink.TABLE = table
        await store.close()
    ratios = [o / b for o, b in zip(found["ours"], found["old"], strict=True)]
    return {who: round(statistics.median(each)) for who, each in found.items()} | {
        "ours / old": round(statistics.median(ratios), 2)
    }


async def bench(maintenance: str, arguments: argparse.Namespace) -> dict[str, Any]:
    devices = arguments.devices
    minutes = max(1, arguments.rows // (devices * SERIES_PER_DEVICE))
    rows = minutes * devices * SERIES_PER_DEVICE
    mark = uuid.uuid4().hex[:8]
    old, new = await make(maintenance, f"bench_old_{mark}"), await make(maintenance, f"bench_new_{mark}")
    report: dict[str, Any] = {"rows": rows}
    try:
        hyper = await make_old(old)
        await migrate_postgres(load(postgres={"url": new}))
        connection = await asyncpg.connect(new)
        report["server"] = await connection.fetchval("SELECT version()")
        report["timescaledb"] = await connection.fetchval(
            "SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'"
        )
        end = str(await connection.fetchval("SELECT date_trunc('minute', now())"))
        await connection.close()
        say(f"{rows:,} rows of {devices} devices into both; TimescaleDB: {report['timescaledb'] or 'none'}")
        await fill(old, new, devices, minutes, end)
        report["raw bytes a row"] = {
            "old": round(await bytes_of(old, "iot_measurements", hyper) / rows, 1),
            "ours": round(await bytes_of(new, "measurements", hyper) / rows, 1),
        }
        say(f"bytes a row: {report['raw bytes a row']}; making the roll-ups")
        await make_rollups(new)
        words = {"end": end, "device": f"f2-{devices // 2:012x}"}
        report["queries, ms"] = await ask_all(old, new, arguments.runs, words)
        if hyper and arguments.compressed:
            for dsn, table in ((old, "iot_measurements"), (new, "measurements")):
                await compress(dsn, table)
            report["compressed bytes a row"] = {
                "old": round(await bytes_of(old, "iot_measurements", hyper) / rows, 2),
                "ours": round(await bytes_of(new, "measurements", hyper) / rows, 2),
            }
            say(f"compressed: {report['compressed bytes a row']}")
            report["queries on compressed chunks, ms"] = await ask_all(old, new, arguments.runs, words)
        if arguments.write_rows:
            report["rows a second"] = await rates(old, new, arguments.write_rows, arguments.runs)
            say(f"rows a second: {report['rows a second']}")
    finally:
        if arguments.keep:
            say(f"kept: {old} {new}")
        else:
            connection = await asyncpg.connect(maintenance)
            for dsn in (old, new):
                await connection.execute(f'DROP DATABASE IF EXISTS "{urlsplit(dsn).path[1:]}" WITH (FORCE)')
            await connection.close()
    return report


def show(report: dict[str, Any]) -> None:
    for name, value in report.items():
        if not isinstance(value, dict):
            print(f"{name}: {value}")
        elif name.startswith("queries"):
            print(f"\n| {name} | old | ours | old / ours | view | old / view |\n|---|---:|---:|---:|---:|---:|")
            for query, r in value.items():
                cells = [r["old"], r["ours"], r["old / ours"], r.get("ours, view", ""), r.get("old / view", "")]
                print(f"| {query} | " + " | ".join(map(str, cells)) + " |")
            print()
        else:
            print(f"{name}: " + ", ".join(f"{who} {n:,}" for who, n in value.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--dsn", help="maintenance database of a server to use; else one is started")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--write-rows", type=int, default=50_000)
    parser.add_argument("--compressed", action="store_true")
    parser.add_argument("--keep", action="store_true", help="leave the databases")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.dsn:
        report = asyncio.run(bench(arguments.dsn, arguments))
    else:
        with tempfile.TemporaryDirectory() as directory:
            server = Postgres(Path(directory) / "postgres", settings=SERVER)
            server.start()
            try:
                report = asyncio.run(bench(server.dsn(), arguments))
            finally:
                server.stop()
    if arguments.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show(report)


if __name__ == "__main__":
    main()
