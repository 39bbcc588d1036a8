"""A back-test over ten million stored readings: how long, how much CPU, how much memory.

    python bench/backtest.py [--readings 10000000]… [--devices 2000] [--series 5] [--against-live] [--dsn postgresql://…] [--json]

Starts a PostgreSQL, loads the readings with binary COPY in the order of arrival (a reading of every series each five
minutes), writes a registry in which every device has the rule, and runs the command. Several `--readings` look at so
much of the same stored time. With `--dsn` an empty database is used instead of a server of our own. `cpu_s` is that of the
command's processes; PostgreSQL's is not in it.
"""

import asyncio
import os
import random
import resource
import shutil
import struct
import subprocess
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

from preservarium.embedded.postgres import Postgres
from preservarium.operations import backtest
from preservarium.settings import load
from preservarium.stores.history import EPOCH_US
from preservarium.stores.migrate import migrate_postgres

ROOT = Path(__file__).resolve().parent.parent
STEP_S = 300
COLUMNS = (
    "series_id", "timestamp", "quality", "value", "received_at", "raw_partition", "raw_offset", "raw_index", "generation",
    "derivation_id",
)  # fmt: skip
ROW = struct.Struct(">hiiiqihidiqihiqiiiiii").pack
LIVE: dict[str, Any] = {
    "name": "hot", "component_type": "temperature", "kind": "high", "severity": "major", "threshold": 28.0, "deadband": 0.5,
}  # fmt: skip
NEW: dict[str, Any] = {**LIVE, "deadband": 1.0, "on_delay_s": 600.0}


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


def command(dsn: str, file: Path, from_us: int, to_us: int, against_live: bool) -> dict[str, Any]:
    """Run the command as a user would: seconds, CPU of its processes, the most resident memory that one of them had."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    arguments = [
        "--rule",
        file,
        "--from",
        str(from_us),
        "--to",
        str(to_us),
        "--json",
        *(["--against", "live"] if against_live else []),
    ]
    environment = {**os.environ, "PRESERVARIUM_POSTGRES__URL": dsn, "PRESERVARIUM_ENV_FILE": "/dev/null"}
    most = 0
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            [sys.executable, "-m", "preservarium", "alarms", "backtest", *map(str, arguments)], cwd=ROOT, env=environment, stdout=output
        ) as running:  # fmt: skip
            while running.poll() is None:
                with suppress(psutil.Error):
                    main = psutil.Process(running.pid)
                    most = max([most, *(one.memory_info().rss for one in [main, *main.children(recursive=True)])])
                time.sleep(0.05)
        assert running.returncode == 0, running.returncode
        output.seek(0)
        document = orjson.loads(output.read())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "readings": document["readings"], "seconds": round(time.perf_counter() - began, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "rss_mib_a_process": round(most / 2**20, 1), "raised": document["rules"]["hot"]["raised"],
        "load_average": round(os.getloadavg()[0], 1),
    }  # fmt: skip


async def bench(dsn: str, devices: int, series: int, steps: list[int], against_live: bool, runs: int) -> dict[str, Any]:
    now_us = time.time_ns() // 1_000
    to_us = now_us - now_us % 1_000_000
    start_us = to_us - max(steps) * STEP_S * 1_000_000
    filled_s = await fill(dsn, devices, series, max(steps), start_us)
    found = []
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(orjson.dumps({"rules": [NEW]}))
        file.flush()
        for count in steps:
            for _ in range(runs):
                from_us = to_us - count * STEP_S * 1_000_000
                found.append(command(dsn, Path(file.name), from_us, to_us, against_live))
                assert found[-1]["readings"] == devices * series * count, found[-1]
    facts = {"devices": devices, "series_a_device": series, "against_live": against_live}
    return {**facts, "processes": backtest.default_processes(), "filled_s": round(filled_s, 1), "runs": found}


@click.command()
@click.option(
    "--readings", default=[10_000_000], multiple=True, show_default=True, help="May be repeated: so many of the newest."
)
@click.option("--devices", default=2_000, show_default=True)
@click.option("--series", default=5, show_default=True, help="Series a device.")
@click.option("--against-live", is_flag=True, help="Evaluate the live rule, too.")
@click.option("--runs", default=2, show_default=True)
@click.option("--dsn", default="", help="An empty database; without it a server is started.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON.")
def main(
    readings: tuple[int, ...], devices: int, series: int, against_live: bool, runs: int, dsn: str, as_json: bool
) -> None:
    """Measure."""
    arguments = (devices, series, [count // (devices * series) for count in readings], against_live, runs)
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
    found = figures.pop("runs")
    click.echo(", ".join(f"{name} {value}" for name, value in figures.items()))
    click.echo("".join(f"{name:>19}" for name in found[0]))
    for one in found:
        click.echo("".join(f"{value:>19,}" for value in one.values()))


if __name__ == "__main__":
    main()
