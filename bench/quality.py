"""How fast validation, rules, windows and anomalies are, on one core: readings per second, and bytes of state.

    python bench/quality.py [--readings 200000] [--runs 5]

`pure` is the domain alone on parsed messages; `stage` is the handler with everything but Kafka: parsing the batch, state
from a table in memory, the output packed and the state written. Medians of the runs.
"""

import asyncio
import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time as perf_counter  # other processes do not count
from typing import Any

import click
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preservarium import topics
from preservarium.clock import ManualClock
from preservarium.domain.alarms.device import DeviceAlarms
from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.quality.checks import compile_checks
from preservarium.domain.quality.validation import Limits, new_state, validate
from preservarium.registry.catalogue import Catalogue
from preservarium.settings import LiveSettings, load
from preservarium.stages.aggregate import Aggregation
from preservarium.stages.alarm import Alarming
from preservarium.stages.anomaly import Detection
from preservarium.stages.validate import Validation
from preservarium.streaming.stage import Batch

S = 1_000_000
T = 1_700_000_000 * S
#: As a sensor node sends them.
READINGS_A_MESSAGE = 5
DEVICES = 500
MESSAGES_A_BATCH = 5_000

FIVE_TESTS = {
    "fail_span": {"min": -100, "max": 100},
    "suspect_span": {"min": -50, "max": 60},
    "tests": {
        "rate_of_change": {"threshold": 5, "fail_threshold": 50},
        "spike": {"suspect_threshold": 20, "fail_threshold": 40},
        "flat_line": {"suspect_threshold": 3_600, "fail_threshold": 7_200, "tolerance": 0.01},
    },
}


class Record:
    def __init__(self, offset: int, key: bytes, value: bytes) -> None:
        self.offset, self.key, self.value, self.headers, self.timestamp = offset, key, value, (), T // 1_000


def messages(readings: int, quality: int | None) -> list[dict[str, Any]]:
    rng = random.Random(1)
    values = {(d, c): rng.uniform(0, 30) for d in range(DEVICES) for c in range(READINGS_A_MESSAGE)}
    made = []
    for i in range(readings // READINGS_A_MESSAGE):
        device = i % DEVICES
        at = T + (i // DEVICES) * 60 * S
        found = []
        for c in range(READINGS_A_MESSAGE):
            values[device, c] += rng.uniform(-0.5, 0.5)
            one = {"component_type": f"c{c}", "pin_position": "-1", "value": round(values[device, c], 3), "unit": "m"}
            found.append(one if quality is None else {**one, "quality": quality})
        made.append(
            {
                "device_id": f"70b3d57ba000{device:04x}", "connector_mode": "LoRaWAN", "topic": "devices/x/up",
                "timestamp": at, "received_at": at + S, "raw_partition": 0, "raw_offset": i, "raw_index": 0,
                "parser": "p@1", "config_rev": 1, "generation": 0, "readings": found,
            }
        )  # fmt: skip
    return made


class Table:
    """A state table in memory."""

    name = "t"

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    def get(self, partition: int, key: bytes) -> bytes | None:
        return self.held.get(key)

    def items(self, partition: int) -> Any:
        return iter(list(self.held.items()))


def datatype(name: str, tests: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "rev": 1, "kind": "number", "unit": "m", **tests}


def rule(number: int, component: int) -> dict[str, Any]:
    return {
        "name": f"r{component}-{number}", "rev": 1, "component_type": f"c{component}", "severity": "major",
        "kind": "low" if number == 0 else "high", "threshold": [-5, 25, 35][number], "deadband": 1,
        "on_delay_s": [0, 0, 120][number],
    }  # fmt: skip


RULES = {r["name"]: r for c in range(READINGS_A_MESSAGE) for r in (rule(n, c) for n in range(3))}


def device_doc(device_id: str) -> Any:
    return {"device_id": device_id, "rev": 1, "type": "t", "enabled": True, "rules": {name: {} for name in RULES}}


def pure_validation(readings: int, tests: dict[str, Any]) -> tuple[float, float]:
    batch = messages(readings, None)
    checks = compile_checks(None, lambda name: datatype(name, tests))  # type: ignore[arg-type, return-value]
    states: dict[str, Any] = {}
    limits = Limits(300 * S, False, 500)
    gc.collect()
    start = perf_counter()
    for message in batch:
        device_id = message["device_id"]
        state = states.get(device_id)
        if state is None:
            state = states[device_id] = new_state()
        validate(message, checks, state, limits)
    seconds = perf_counter() - start
    size = max(len(orjson.dumps(s)) for s in states.values()) / READINGS_A_MESSAGE
    return readings / seconds, size


def observed(batch: list[dict[str, Any]], rules: DeviceRules) -> tuple[dict[str, DeviceAlarms], float]:
    """The alarms of each device after a batch, and how long that took, s."""
    alarms: dict[str, DeviceAlarms] = {}
    gc.collect()
    start = perf_counter()
    for message in batch:
        device_id = message["device_id"]
        one = alarms.get(device_id)
        if one is None:
            one = alarms[device_id] = DeviceAlarms(device_id)
        one.observe(message, rules)
    return alarms, perf_counter() - start


def pure_rules(readings: int) -> tuple[float, float]:
    batch = messages(readings, 1)
    rules = compile_rules(device_doc("d"), None, RULES.get, lambda name: datatype(name, {}))  # type: ignore[arg-type, return-value]
    alarms, seconds = observed(batch, rules)
    size = max(len(orjson.dumps(a.document())) for a in alarms.values()) / READINGS_A_MESSAGE
    return readings / seconds, size


def stage(readings: int, which: str, tests: dict[str, Any]) -> tuple[float, float]:
    catalogue = Catalogue()
    for c in range(READINGS_A_MESSAGE):
        catalogue.offer("datatype", datatype(f"c{c}", tests))
    for one in RULES.values():
        catalogue.offer("rule", one)
    catalogue._ready.set()
    state = Table()
    table = state.held
    live = LiveSettings(load())
    known = lambda _, device_id: device_doc(device_id)  # noqa: E731
    arguments: Any = (state, known, catalogue, live, ManualClock())
    handlers: dict[str, Callable[[], Any]] = {
        "validate": lambda: Validation(*arguments),
        "alarm": lambda: Alarming(*arguments).observe,
        "aggregate": lambda: Aggregation(*arguments),
        "anomaly": lambda: Detection(*arguments),
    }
    handler = handlers[which]()
    topic = topics.STANDARDIZED if which == "validate" else topics.VALIDATED
    records = [
        Record(i, m["device_id"].encode(), orjson.dumps(m))
        for i, m in enumerate(messages(readings, None if which == "validate" else 1))
    ]
    batches = [
        Batch(topic.name, 0, records[i : i + MESSAGES_A_BATCH])  # type: ignore[arg-type]
        for i in range(0, len(records), MESSAGES_A_BATCH)
    ]

    async def run() -> float:
        start = perf_counter()
        for batch in batches:
            effects = await handler(batch)
            table.update(effects.puts.get("t", {}))  # type: ignore[arg-type]
        return perf_counter() - start

    gc.collect()
    seconds = asyncio.run(run())
    return readings / seconds, max(map(len, table.values()), default=0) / READINGS_A_MESSAGE


@click.command()
@click.option("--readings", default=200_000, show_default=True, help="Readings of one run.")
@click.option("--runs", default=5, show_default=True, help="Runs of each case, interleaved.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON.")
def main(readings: int, runs: int, as_json: bool) -> None:
    """Measure."""
    # As a worker has it (preservarium/streaming/app.py).
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    range_only = {"fail_span": FIVE_TESTS["fail_span"]}
    cases = {
        "validate, pure, gross range": lambda: pure_validation(readings, range_only),
        "validate, pure, five tests": lambda: pure_validation(readings, FIVE_TESTS),
        "validate, stage, gross range": lambda: stage(readings, "validate", range_only),
        "validate, stage, five tests": lambda: stage(readings, "validate", FIVE_TESTS),
        "alarm, pure, 3 rules a series": lambda: pure_rules(readings),
        "aggregate, stage, 1h and 24h": lambda: stage(readings, "aggregate", {}),
        "anomaly, stage, off": lambda: stage(readings, "anomaly", {}),
        "anomaly, stage": lambda: stage(readings, "anomaly", {"tests": {"anomaly": {"warm_up": 64}}}),
        "alarm, stage, 3 rules a series": lambda: stage(readings, "alarm", range_only),
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, case in cases.items():
            figures[name].append(case())
    result = {
        name: {
            "readings_per_s": round(median(f for f, _ in found)),
            "least": round(min(f for f, _ in found)),
            "most": round(max(f for f, _ in found)),
            "state_bytes_a_series": round(max(s for _, s in found)),
        }
        for name, found in figures.items()
    }
    if as_json:
        click.echo(orjson.dumps({"readings": readings, "runs": runs, "cases": result}, option=orjson.OPT_INDENT_2))
        return
    click.echo(f"{'median of ' + str(runs) + ' runs':34}{'readings/s':>12}{'least':>12}{'most':>12}{'B/series':>10}")
    for name, f in result.items():
        click.echo(
            f"{name:34}{f['readings_per_s']:>12,}{f['least']:>12,}{f['most']:>12,}{f['state_bytes_a_series']:>10,}"
        )


if __name__ == "__main__":
    main()
