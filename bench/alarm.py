"""How fast rules of each kind are, on one core, what their state costs, and what ticks cost with many silent devices.

    python bench/alarm.py [--readings 200000] [--devices 200000] [--runs 3]

`rules` is the domain alone on parsed messages of five series, as in bench/quality.py, three rules a series. `deadlines` fills a
table with devices of five series that are watched for silence, and measures the look through it when a partition is
taken over, a tick at which nothing is due, and ticks that raise everything.
"""

import asyncio
import gc
import sys
from pathlib import Path
from statistics import median
from time import process_time as perf_counter  # other processes do not count
from typing import Any

import click
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quality import READINGS_A_MESSAGE, S, T, Table, messages, observed

from preservarium.clock import ManualClock
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rules import compile_rules
from preservarium.registry.catalogue import Catalogue
from preservarium.settings import LiveSettings, load
from preservarium.stages.alarm import DUE_A_TICK_MAX, Alarming
from preservarium.streaming.stage import Tick

PARTITION = 0

#: Name -> the three rules that watch each series.
KINDS: dict[str, list[dict[str, Any]]] = {
    "high, low": [
        {"kind": "low", "threshold": -5, "deadband": 1},
        {"kind": "high", "threshold": 25, "deadband": 1},
        {"kind": "high", "threshold": 35, "deadband": 1, "on_delay_s": 120},
    ],
    "levels": [
        {"kind": "high", "threshold": 20 + i, "deadband": 1, "levels": [{"threshold": 35, "severity": "critical"}]}
        for i in range(3)
    ],
    "rate": [{"kind": "rate", "threshold": 30 + i, "window_s": 3_600, "per_s": 3_600} for i in range(3)],
    "deviation": [{"kind": "deviation", "setpoint": 15, "threshold": 12 + i} for i in range(3)],
    "no_data": [{"kind": "no_data", "no_data_s": 600 + i} for i in range(3)],
    "expression": [
        {
            "kind": "expression",
            "expression": f"value + other > {40 + i}",
            "inputs": {"other": {"component_type": "c0"}},
            "inputs_max_age_s": 600,
        }
        for i in range(3)
    ],
    "lateness 5 min": [{"kind": "high", "threshold": 25 + i, "lateness_s": 300} for i in range(3)],
    "one of each": [
        {"kind": "high", "threshold": 25, "deadband": 1, "on_delay_s": 120},
        {"kind": "rate", "threshold": 30, "window_s": 3_600, "per_s": 3_600},
        {"kind": "no_data", "no_data_s": 600},
    ],
}


def compiled(docs: list[dict[str, Any]]) -> Any:
    found: Any = {
        f"r{c}-{n}": {"name": f"r{c}-{n}", "rev": 1, "component_type": f"c{c}", "severity": "minor", **doc}
        for c in range(READINGS_A_MESSAGE)
        for n, doc in enumerate(docs)
    }
    device: Any = {"device_id": "d", "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in found}}
    rules = compile_rules(device, None, found.get, lambda n: {"name": n, "rev": 1, "kind": "number", "unit": "m"})
    assert not rules.problems, rules.problems
    return rules


def pure(readings: int, docs: list[dict[str, Any]]) -> tuple[float, float]:
    """Readings per second, and bytes of state a series."""
    batch = messages(readings, 1)
    rules = compiled(docs)
    alarms, seconds = observed(batch, rules)
    sizes = sum(len(orjson.dumps(a.document())) for a in alarms.values())
    return readings / seconds, sizes / len(alarms) / READINGS_A_MESSAGE


async def deadlines(devices: int) -> dict[str, float]:
    """Seconds of CPU."""
    docs = [{"kind": "no_data", "no_data_s": 600}]
    catalogue = Catalogue()
    names = [f"r{c}-0" for c in range(READINGS_A_MESSAGE)]
    for c, name in enumerate(names):
        catalogue.offer("datatype", {"name": f"c{c}", "rev": 1, "kind": "number", "unit": "m"})
        rule = {"name": name, "rev": 1, "component_type": f"c{c}", "severity": "minor", **docs[0]}
        catalogue.offer("rule", rule)
    catalogue._ready.set()
    rules = compiled(docs)
    one = DeviceAlarms("d")
    one.observe(messages(READINGS_A_MESSAGE, 1)[0], rules)
    state = orjson.dumps(one.document())
    table = Table()
    table.held = {b"70b3d57b%08x" % i: state for i in range(devices)}
    known = lambda _, d: {"device_id": d, "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in names}}  # noqa: E731
    live = LiveSettings(load(alarm={"settle_s": 0}))
    stage = Alarming(table, known, catalogue, live, ManualClock())  # type: ignore[arg-type]

    async def tick(at_s: int, first: bool = False) -> float:
        start = perf_counter()
        effects = await stage.tick(Tick(PARTITION, T + at_s * S, first, False))
        table.held.update(effects.puts.get("t", {}))  # type: ignore[arg-type]
        for after in effects.after:
            after()
        return perf_counter() - start

    gc.collect()
    taken_over = await tick(0, first=True)
    quiet = await tick(1)
    raising = median([await tick(700) for _ in range(10)])
    return {"taken over": taken_over, "nothing due": quiet, f"{DUE_A_TICK_MAX} devices due": raising}


@click.command()
@click.option("--readings", default=200_000, show_default=True, help="Readings of one run.")
@click.option("--devices", default=200_000, show_default=True, help="Devices of five series each that are watched.")
@click.option("--runs", default=3, show_default=True, help="Runs of each case, interleaved.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON.")
def main(readings: int, devices: int, runs: int, as_json: bool) -> None:
    """Measure."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)  # as a worker has it (preservarium/streaming/app.py)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for _ in range(runs):
        for name, docs in KINDS.items():
            found[name].append(pure(readings, docs))
    ticks = asyncio.run(deadlines(devices))
    result = {
        "rules": {
            name: {
                "readings_per_s": round(median(f for f, _ in figures)),
                "state_bytes_a_series": round(max(s for _, s in figures)),
            }
            for name, figures in found.items()
        },
        "deadlines": {"devices": devices, **{name: round(seconds, 4) for name, seconds in ticks.items()}},
    }
    if as_json:
        click.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2))
        return
    click.echo(f"{'three rules a series':24}{'readings/s':>12}{'B/series':>10}")
    for name, figures in result["rules"].items():
        click.echo(f"{name:24}{figures['readings_per_s']:>12,}{figures['state_bytes_a_series']:>10,}")
    click.echo(f"\n{devices:,} devices of {READINGS_A_MESSAGE} series, seconds of CPU")
    for name, seconds in ticks.items():
        click.echo(f"{name:24}{seconds:>12.4f}")


if __name__ == "__main__":
    main()
