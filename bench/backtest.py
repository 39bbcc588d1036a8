"""A back-test over ten million stored readings: how long, how much CPU, how much memory.

    python bench/backtest.py [--readings 10000000] [--devices 2000] [--series 5] [--against-live] [--dsn postgresql://…] [--json]

Starts a PostgreSQL, loads the readings with binary COPY in the order of arrival (a reading of every series each five
minutes), writes a registry in which every device has the rule, and runs the back-test as the command does. With
`--dsn` an empty database is used instead of a server of our own. `cpu` is that of our processes; PostgreSQL's is not in it.
"""

import asyncio
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import click
import orjson
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preservarium import backtest
from preservarium.embedded.postgres import Postgres
from preservarium.settings import load
from preservarium.stores.history import EPOCH_US
from preservarium.stores.migrate import migrate_postgres

STEP_S = 300
COLUMNS = (
    "series_id", "timestamp", "quality", "value", "received_at", "raw_partition", "raw_offset", "raw_index", "generation",
    "derivation_id",
)  # fmt: skip
ROW = struct.Struct(">hiiiqihidiqihiqiiiiii").pack
LIVE: dict[str, Any] = {
    "name": "hot", "component_type": "temperature", "kind": "high", "severity": "major", "threshold": 28.0, "deadband": 0.5,
}  # fmt: skip
NEW: dict[str, Any] = {**LIVE, "rev": 0, "deadband": 1.0, "on_delay_s": 600.0}


async def rows(devices: int, series: int, steps: int, start_us: int) -> AsyncIterator[bytes]:
    """Random walks that come back, so that some alarms are raised and most readings raise none."""
    yield b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
    rng = random.Random(1)
    count = devices * series
    values = [20 + rng.random() * 8 for _ in range(count)]
    for step in range(steps):
        made = []
        for number in range(count):
            value = values[number] = values[number] * 0.99 + 0.24 + rng.uniform(-0.5, 0.5)
            at = start_us + step * STEP_S * 1_000_000 + number // series * 1_000 - EPOCH_US
            made.append(
                ROW(10, 4, number + 1, 8, at, 2, 1, 8, value, 8, at + 250_000, 2, number % 12, 8, step * count + number, 4, 0, 4, 0, 4, 1)
            )  # fmt: skip
        yield b"".join(made)
    yield struct.pack(">h", -1)


async def fill(dsn: str, devices: int, series: int, steps: int, start_us: int) -> float:
    await migrate_postgres(load(postgres={"url": dsn}))
    connection = await asyncpg.connect(dsn)
    name = "to_char(n, 'FM\"dev-\"000000')"
    await connection.execute(
        f"""
        INSERT INTO manufacturers VALUES ('m', nextval('registry_rev'), 1, '{{"name": "m"}}', now(), 'bench');
        INSERT INTO datatypes VALUES ('temperature', 'number', '°C', nextval('registry_rev'), 1,
          '{{"name": "temperature", "kind": "number", "unit": "°C"}}', now(), 'bench');
        INSERT INTO alarm_rules VALUES ('hot', 'temperature', 'major', true, nextval('registry_rev'), 1,
          '{orjson.dumps(LIVE).decode()}', now(), 'bench');
        INSERT INTO device_types VALUES ('t', 'm', 'p', nextval('registry_rev'), 1, '{{"name": "t", "rules": ["hot"]}}', now(), 'bench');
        INSERT INTO devices SELECT {name}, 't', NULL, true, NULL, nextval('registry_rev'), 1,
          json_build_object('device_id', {name}, 'type', 't', 'enabled', true), now(), 'bench' FROM generate_series(1, {devices}) n;
        INSERT INTO series (device_id, connector_mode, component_type, pin_position, unit)
          SELECT {name}, 'LoRaWAN', 'temperature', pin::text, '°C'
          FROM generate_series(1, {devices}) n, generate_series(1, {series}) pin ORDER BY n, pin;
        INSERT INTO derivations (parser, config_rev) VALUES ('p@1', 1);
        """
    )
    began = time.perf_counter()
    source = rows(devices, series, steps, start_us)
    await connection.copy_to_table("measurements", source=source, columns=COLUMNS, format="binary", timeout=3_600)
    spent = time.perf_counter() - began
    await connection.execute("ANALYZE measurements")
    await connection.close()
    return spent


def cpu_s() -> float:
    """CPU seconds of us and our ended children."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


class Memory:
    """The most resident memory that one of the back-test's processes had; ru_maxrss would begin with that of its parent."""

    def __init__(self) -> None:
        self._others = set(psutil.Process().children())
        self.most_mib = 0.0

    def look(self, *_progress: int) -> None:
        for child in set(psutil.Process().children()) - self._others:
            with suppress(psutil.Error):
                self.most_mib = max(self.most_mib, child.memory_info().rss / 2**20)


async def bench(dsn: str, devices: int, series: int, steps: int, against_live: bool, runs: int) -> dict[str, Any]:
    now_us = time.time_ns() // 1_000
    start_us = now_us - now_us % 1_000_000 - (steps + 1) * STEP_S * 1_000_000
    filled_s = await fill(dsn, devices, series, steps, start_us)
    settings = load(postgres={"url": dsn})
    connection = await asyncpg.connect(dsn)
    spent, cpu, memory = [], [], Memory()
    for _ in range(runs):
        before = cpu_s()
        began = time.perf_counter()
        test = await backtest.prepare(
            connection, settings, {"hot": NEW}, from_us=start_us, to_us=now_us, against_live=against_live
        )  # type: ignore[dict-item]
        result = await backtest.run(connection, test, progress=memory.look)
        spent.append(time.perf_counter() - began)
        cpu.append(cpu_s() - before)
        assert result.readings == devices * series * steps, result.readings
    document = result.document(test)
    await connection.close()
    return {
        "readings": result.readings, "devices": devices, "series_a_device": series, "against_live": against_live,
        "processes": backtest.default_processes(), "load_average": round(os.getloadavg()[0], 1), "filled_s": round(filled_s, 1),
        "seconds": [round(s, 1) for s in spent], "readings_per_s": round(result.readings / min(spent)),
        "cpu_s": [round(s, 1) for s in cpu], "rss_mib_a_process": round(memory.most_mib), "raised": document["rules"]["hot"]["raised"],
    }  # fmt: skip


@click.command()
@click.option("--readings", default=10_000_000, show_default=True)
@click.option("--devices", default=2_000, show_default=True)
@click.option("--series", default=5, show_default=True, help="Series a device.")
@click.option("--against-live", is_flag=True, help="Evaluate the live rule, too.")
@click.option("--runs", default=2, show_default=True)
@click.option("--dsn", default="", help="An empty database; without it a server is started.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON.")
def main(readings: int, devices: int, series: int, against_live: bool, runs: int, dsn: str, as_json: bool) -> None:
    """Measure."""
    arguments = (devices, series, readings // (devices * series), against_live, runs)
    if dsn:
        figures = asyncio.run(bench(dsn, *arguments))
    else:
        directory = Path(tempfile.mkdtemp(prefix="preservarium-bench-"))
        server = Postgres(directory, settings={"max_wal_size": "8GB"})
        server.start()
        try:
            figures = asyncio.run(bench(server.dsn(), *arguments))
        finally:
            server.stop()
            shutil.rmtree(directory, ignore_errors=True)
    if as_json:
        click.echo(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
        return
    for name, value in figures.items():
        click.echo(f"{name:20}{value}")


if __name__ == "__main__":
    main()
