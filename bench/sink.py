"""The store alone: readings in memory to committed rows, beside the replaced service's design in the same run.

    .venv/bin/python bench/sink.py [--runs 5] [--rows 100000] [--series 2000] [--dsn postgresql://…] [--json]

Each run takes the contestants one after the other (interleaved, so that a slow minute of the machine hits them all),
each into fresh tables of the same server, one reading a message:

- old: pydantic model a message, psycopg2 execute_batch of 100 rows and a commit, wide table with its key and three
  indexes (ON CONFLICT DO NOTHING added, so that its count is fair).
- copy: our store, batches of `--batch` rows, offsets and latest values in the transaction, one connection.
- copy2: the same with two batches in flight.
- merge: always through the temporary table and ON CONFLICT DO NOTHING.
- unnest: always arrays and ON CONFLICT DO NOTHING, in a transaction with the offsets and nothing else (no latest values).
- replay: rows that are all stored already (what a redelivery costs).
- bare: our store without offsets to move, 1,000 rows a batch, and offsets: with them.

The figure to trust is the ratio between contestants of one run; medians over the runs are printed. CPU is this process's.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import orjson
import psycopg2
from psycopg2.extras import execute_batch
from pydantic import BaseModel, Field, field_validator

from preservarium.embedded.postgres import Postgres
from preservarium.settings import LiveSettings, load
from preservarium.stores.base import Move
from preservarium.stores.migrate import migrate_postgres
from preservarium.stores.timescale import TimescaleStore

OLD_SCHEMA = """
DROP TABLE IF EXISTS old_measurements;
CREATE TABLE old_measurements (
    timestamp TIMESTAMPTZ NOT NULL, device_id VARCHAR(50) NOT NULL, connector_mode VARCHAR(50) NOT NULL,
    component_type VARCHAR(50) NOT NULL, pin_position VARCHAR(10), value DOUBLE PRECISION, unit VARCHAR(20),
    topic VARCHAR(255), PRIMARY KEY (timestamp, device_id, connector_mode, component_type, pin_position));
CREATE INDEX ON old_measurements (device_id, timestamp DESC);
CREATE INDEX ON old_measurements (component_type, timestamp DESC);
CREATE INDEX ON old_measurements (connector_mode, timestamp DESC);
"""


class IotMeasurement(BaseModel):
    timestamp: datetime
    device_id: str = Field(alias="mac_address")
    connector_mode: str = Field("unknown", alias="mode")
    component_type: str = Field("unknown", alias="data_point_label")
    pin_position: str = Field("-1", alias="pin")
    value: float | None = None
    unit: str = ""
    topic: str = Field("", alias="original_topic")

    @field_validator("timestamp", mode="before")
    @classmethod
    def convert_timestamp(cls, v):
        return datetime.fromtimestamp(v, UTC) if isinstance(v, int | float) else v

    @field_validator("value", mode="before")
    @classmethod
    def convert_value(cls, v):
        return float(v) if v is not None else None


def inputs(rows: int, series: int) -> tuple[list[dict], list[dict]]:
    """The same readings as our messages and as the old service's; parsed from JSON as both would have them."""
    start_us = time.time_ns() // 1000 - 3_600_000_000
    ours, old = [], []
    for i in range(rows):
        device, pin = f"70b3d57ba000{i % series // 10:04x}", i % 10
        at_us = start_us + i // series * 1_000_000 + i % series
        value = 20 + i % 1000 / 100
        ours.append(
            {
                "device_id": device, "connector_mode": "LoRaWAN", "topic": f"devices/{device}/up", "timestamp": at_us,
                "received_at": at_us + 250_000, "raw_partition": i % 12, "raw_offset": i, "raw_index": 0,
                "parser": "decentlab@3", "config_rev": 7, "generation": 0,
                "readings": [{"component_type": "temperature", "pin_position": str(pin), "value": value, "unit": "°C", "quality": 1, "flags": []}],
            }
        )  # fmt: skip
        old.append(
            {
                "mac_address": device, "mode": "LoRaWAN", "data_point_label": "temperature", "pin": str(pin), "value": value,
                "unit": "°C", "original_topic": f"devices/{device}/up", "timestamp": at_us / 1e6,
            }
        )  # fmt: skip
    return orjson.loads(orjson.dumps(ours)), orjson.loads(orjson.dumps(old))


def run_old(dsn: str, messages: list[dict]) -> None:
    connection = psycopg2.connect(dsn)
    columns = list(IotMeasurement.model_fields)
    statement = (
        f"INSERT INTO old_measurements ({', '.join(columns)}) VALUES ({', '.join(['%s'] * len(columns))})"
        " ON CONFLICT DO NOTHING"
    )
    for start in range(0, len(messages), 100):
        models = [IotMeasurement(**m) for m in messages[start : start + 100]]
        with connection.cursor() as cursor:
            execute_batch(cursor, statement, [tuple(getattr(m, c) for c in columns) for m in models], page_size=100)
        connection.commit()
    connection.close()


async def run_ours(store: TimescaleStore, messages: list[dict], batch: int, flights: int, offsets: bool = True) -> None:
    async def lane(partition: int) -> None:
        # A partition is in one flight at a time: each lane is a partition with its share of the readings.
        expected = (await store.offsets("bench", [partition]))[partition] if offsets else None
        next_offset = expected or 0
        part = messages[partition * len(messages) // flights : (partition + 1) * len(messages) // flights]
        for start in range(0, len(part), batch):
            chunk = part[start : start + batch]
            moves = {("bench", partition): Move(expected, next_offset + len(chunk))} if offsets else {}
            result = await store.write(chunk, moves)
            assert result.accepted + result.duplicates == len(chunk), result
            expected = next_offset = next_offset + len(chunk)

    await asyncio.gather(*(lane(p) for p in range(flights)))


UNNEST = """
INSERT INTO measurements (series_id, timestamp, value, quality, received_at, raw_partition, raw_offset, raw_index, generation,
                          derivation_id)
SELECT * FROM unnest($1::int[], $2::timestamptz[], $3::float8[], $4::smallint[], $5::timestamptz[], $6::smallint[], $7::bigint[],
                     $8::int[], $9::int[], $10::int[]) ON CONFLICT DO NOTHING"""


def instant(us: int) -> datetime:
    return datetime.fromtimestamp(us // 1_000_000, UTC).replace(microsecond=us % 1_000_000)


async def run_unnest(dsn: str, messages: list[dict], batch: int) -> None:
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
    await connection.execute(OLD_SCHEMA)
    await connection.execute("CHECKPOINT")
    await connection.close()


async def latency(store: TimescaleStore, messages: list[dict]) -> float:
    """Median of writing 100 rows, milliseconds."""
    spent = []
    for start in range(0, min(len(messages), 10_000), 100):
        began = time.perf_counter()
        await store.write(messages[start : start + 100], {})
        spent.append((time.perf_counter() - began) * 1000)
    return statistics.median(spent)


async def bench(dsn: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    settings = LiveSettings(load(postgres={"url": dsn}))
    await migrate_postgres(settings())
    ours, old = inputs(arguments.rows, arguments.series)
    old = old[: arguments.rows // 4]
    first = TimescaleStore(settings)
    always = TimescaleStore(settings, copy_first=False)

    async def copy(flights: int = 1, batch: int = arguments.batch, offsets: bool = True) -> None:
        await run_ours(first, ours, batch, flights, offsets)

    contestants = {
        "old": (len(old), lambda: asyncio.to_thread(run_old, dsn, old), True),
        "copy": (len(ours), copy, True),
        "replay": (len(ours), copy, False),
        "copy2": (len(ours), lambda: copy(flights=2), True),
        "merge": (len(ours), lambda: run_ours(always, ours, arguments.batch, 1), True),
        "unnest": (len(ours), lambda: run_unnest(dsn, ours, arguments.batch), True),
        "bare": (len(ours), lambda: copy(batch=1000, offsets=False), True),
        "offsets": (len(ours), lambda: copy(batch=1000), True),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    cpus: dict[str, list[float]] = {name: [] for name in contestants}
    milliseconds = []
    await first.write(ours[: arguments.series], {})  # the series exist: their making is not what is measured
    for _ in range(arguments.runs):
        for name, (rows, go, fresh) in contestants.items():
            if fresh:
                await reset(dsn)
            cpu, began = time.process_time(), time.perf_counter()
            await go()
            spent = time.perf_counter() - began
            rates[name].append(rows / spent)
            cpus[name].append((time.process_time() - cpu) / rows * 1e6)
        await reset(dsn)
        milliseconds.append(await latency(first, ours))
    await first.close()
    await always.close()
    ratios = {name: [r / o for r, o in zip(rates[name], rates["old"], strict=True)] for name in contestants}
    report = {
        name: {
            "rows_per_s": round(statistics.median(rates[name])),
            "ratio_to_old": round(statistics.median(ratios[name]), 2),
            "ratio_min": round(min(ratios[name]), 2),
            "ratio_max": round(max(ratios[name]), 2),
            "client_cpu_us_per_row": round(statistics.median(cpus[name]), 2),
        }
        for name in contestants
    }
    cost = [1 - o / b for o, b in zip(rates["offsets"], rates["bare"], strict=True)]
    report["offsets"]["cost_of_offsets"] = round(statistics.median(cost), 3)
    gain = [c / m for c, m in zip(rates["copy"], rates["merge"], strict=True)]
    report["copy"]["ratio_to_merge"] = round(statistics.median(gain), 2)
    gain = [c / m for c, m in zip(rates["copy"], rates["unnest"], strict=True)]
    report["copy"]["ratio_to_unnest"] = round(statistics.median(gain), 2)
    report["batch of 100"] = {"milliseconds": round(statistics.median(milliseconds), 2)}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--series", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=5_000)
    parser.add_argument("--dsn", default="", help="an empty database; without it a server is started")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.dsn:
        report = asyncio.run(bench(arguments.dsn, arguments))
    else:
        directory = Path(tempfile.mkdtemp(prefix="preservarium-bench-"))
        server = Postgres(directory, settings={"shared_buffers": "1GB", "max_wal_size": "8GB"})
        server.start()
        try:
            report = asyncio.run(bench(server.dsn(), arguments))
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
