"""A million series' alarm state in RocksDB: how much disk it takes, and how long a worker needs to take it over.

    python bench/alarm_state.py [--series 1000000] [--rules 3] [--json]

The documents are made by `DeviceAlarms` itself: devices of five series with some rules each; a tenth of the alarms were
raised, half of those are acknowledged, and every third device has a rule that waits for silence. They are written
through the project's state table (apply), closed, and opened by a new process. `open` is RocksDB alone, `deadlines` is
what the alarm stage looks through when it takes partitions over, `read` is one device's state, read and unpacked.
"""

import asyncio
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preservarium.clock import ManualClock
from preservarium.domain.alarms.action import parse_action
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rules import compile_rules
from preservarium.registry.catalogue import Catalogue
from preservarium.settings import LiveSettings, load
from preservarium.stages.alarm import Alarming
from preservarium.streaming.app import App
from preservarium.streaming.publish import partition_of
from preservarium.streaming.stage import Tick
from preservarium.streaming.state import StateTable

S = 1_000_000
T = 1_700_000_000 * S
SERIES_A_DEVICE = 5
DEVICES_A_BATCH = 2_000


def table(directory: Path) -> tuple[App, StateTable]:
    app = App(LiveSettings(load(data_dir=str(directory))))
    app.finalize()
    return app, app.state_table("alarm_states")


def rules_of(count: int) -> dict[str, Any]:
    found = {
        f"r{c}-{n}": {
            "name": f"r{c}-{n}", "rev": 1, "component_type": f"c{c}", "severity": "major", "kind": "high" if n else "low",
            "threshold": 30.0 + 10 * n if n else -5.0, "deadband": 1, "on_delay_s": 120 if n == 2 else 0,
            "message": "{name}: {component_type} is {value} {unit}, beyond {threshold} {unit}",
        }
        for c in range(SERIES_A_DEVICE) for n in range(count)
    }  # fmt: skip
    found["silent"] = {
        "name": "silent", "rev": 1, "component_type": "c0", "severity": "minor", "kind": "no_data", "no_data_s": 3_600,
    }  # fmt: skip
    return found


def device(number: int, rules: dict[str, Any], compiled: list[Any], rng: random.Random) -> bytes:
    """The state document of a device after some messages and perhaps an acknowledgement."""
    device_id = f"70b3d57ba{number:07x}"
    watching = compiled[number % 3 == 0]
    alarms = DeviceAlarms(device_id)
    hot = [rng.random() < 0.1 for _ in range(SERIES_A_DEVICE)]
    for step in range(2):
        at = T + step * 300 * S + rng.randrange(S)
        readings = [
            {"component_type": f"c{c}", "pin_position": "-1", "value": round(rng.uniform(41, 49) if hot[c] else rng.uniform(0, 29), 2), "quality": 1}
            for c in range(SERIES_A_DEVICE)
        ]  # fmt: skip
        alarms.observe(
            {"generation": 0, "raw_partition": number % 12, "raw_offset": 10_000_000 + number * 2 + step, "raw_index": 0,
             "timestamp": at, "received_at": at + S, "readings": readings},
            watching,
        )  # fmt: skip
    for c in range(SERIES_A_DEVICE):
        if hot[c] and f"r{c}-1" in rules and rng.random() < 0.5:
            action = {
                "device_id": device_id,
                "rule": f"r{c}-1",
                "action": "acknowledge",
                "actor": "operator",
                "at": T + 400 * S,
            }
            alarms.act(parse_action(action), watching, "a0", number, c)
    return orjson.dumps(alarms.document())


def fill(directory: Path, series: int, rule_count: int) -> dict[str, Any]:
    rules = rules_of(rule_count)
    rng = random.Random(1)
    plain = {name: {} for name in rules if name != "silent"}
    compiled = [
        compile_rules(
            {"device_id": "d", "name": "A device with a name", "rev": 1, "type": "t", "enabled": True, "rules": chosen},
            None,
            rules.get,
            lambda name: {"name": name, "rev": 1, "kind": "number", "unit": "°C"},
        )
        for chosen in (plain, {name: {} for name in rules})
    ]
    assert not any(one.problems for one in compiled)
    app, state = table(directory)
    app.conf.tabledir.mkdir(parents=True, exist_ok=True)
    partitions = app.live().kafka.partitions
    batches: list[dict[bytes, bytes]] = [{} for _ in range(partitions)]
    value_bytes = 0
    offset = 0
    devices = series // SERIES_A_DEVICE
    with click.progressbar(range(devices), label="making states", file=sys.stderr) as numbers:
        for number in numbers:
            key = f"70b3d57ba{number:07x}".encode()
            value = device(number, rules, compiled, rng)
            value_bytes += len(value)
            partition = partition_of(key, partitions)
            batches[partition][key] = value
            if len(batches[partition]) >= DEVICES_A_BATCH:
                offset += DEVICES_A_BATCH
                state.table.data.put(partition, batches[partition].items(), offset)
                batches[partition] = {}
    for partition, batch in enumerate(batches):
        state.table.data.put(partition, batch.items(), offset)
    # Faust closes them by forgetting them.
    for db in state.table.data._dbs.values():
        db.close()
    return {"devices": devices, "value_bytes_a_series": value_bytes / series}


def take_over(directory: Path) -> dict[str, Any]:
    """Open everything as a worker that has all partitions; run in a process of its own."""
    app, state = table(directory)
    partitions = range(app.live().kafka.partitions)
    began = perf_counter()
    for partition in partitions:
        state.get(partition, b"nothing")
    opened = perf_counter()
    catalogue = Catalogue()
    catalogue._ready.set()
    handler = Alarming(state, lambda _p, _d: None, catalogue, app.live, ManualClock(T))

    async def deadlines() -> None:
        for partition in partitions:
            await handler._find_deadlines(Tick(partition, T, True, False))

    asyncio.run(deadlines())
    found = perf_counter()
    keys = [
        key
        for partition in partitions
        for key, _ in zip((k for k, _ in state.items(partition)), range(500), strict=False)
    ]
    random.Random(2).shuffle(keys)
    spent = []
    for key in keys:
        start = perf_counter()
        value = state.get(partition_of(key, len(partitions)), key)
        assert value is not None
        one = DeviceAlarms(key.decode(), orjson.loads(value))
        assert sum(1 for _ in one.alarms()) >= 1
        spent.append(perf_counter() - start)
    return {
        "open_s": opened - began,
        "deadlines_s": found - opened,
        "read_us": median(spent) * 1e6,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@click.command()
@click.option("--series", default=1_000_000, show_default=True)
@click.option("--rules", default=3, show_default=True, help="Rules a series.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON.")
@click.option("--open", "opened", type=click.Path(path_type=Path), hidden=True)
def main(series: int, rules: int, as_json: bool, opened: Path | None) -> None:
    """Measure."""
    if opened is not None:
        click.echo(orjson.dumps(take_over(opened)))
        return
    directory = Path(tempfile.mkdtemp(prefix="preservarium-bench-"))
    try:
        figures: dict[str, Any] = fill(directory, series, rules)
        figures["disk_bytes_a_series"] = disk_bytes(directory) / series
        again = subprocess.run(
            [sys.executable, __file__, "--open", str(directory)], check=True, stdout=subprocess.PIPE, env=os.environ
        )
        figures |= orjson.loads(again.stdout)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    figures = {"series": series, "rules_a_series": rules, **figures}
    if as_json:
        click.echo(orjson.dumps(figures, option=orjson.OPT_INDENT_2))
        return
    for name, value in figures.items():
        click.echo(f"{name:24}{value:>14,.3f}" if isinstance(value, float) else f"{name:24}{value:>14,}")


if __name__ == "__main__":
    main()
