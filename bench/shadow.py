"""How fast a shadow replay derives, on one core: readings for each second of CPU, of the messages and the registry that bench/e2e.py has.

    python -m bench.shadow [--messages 60000] [--devices 500] [--readings 4] [--runs 3] [--json]

Raw records in memory become validated readings, alarm transitions and rows of binary COPY: all that a process of the shadow replay does but for fetching
from Kafka and waiting for PostgreSQL. The CPU of the process counts, so that other work beside it does not; the first run warms up and is left out.
"""

import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Any

import click
import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.e2e import messages, registry_file
from preservarium.domain.registry.documents import SECTIONS
from preservarium.operations.changes.deriving import Configuration, Deriver, Registry, Span
from preservarium.operations.changes.shadow_rows import Encoder
from preservarium.registry.file import read
from preservarium.settings import load

#: As the reader of raw records hands them over.
RECORDS_AT_ONCE = 500


def documents(devices: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """(documents by kind and name, devices) of bench/e2e.py."""
    with tempfile.TemporaryDirectory() as directory:
        file = read(registry_file(Path(directory), devices))
    found = {
        kind: {doc["name"]: {**doc, "rev": 1} for doc in file.documents.get(kind, [])}
        for kind in (SECTIONS[section] for section in ("datatypes", "parsers", "device_types", "rules"))
    }
    return found, {doc["device_id"]: {**doc, "rev": 1} for doc in file.documents[SECTIONS["devices"]]}


async def run(records: list[Any], registry: Any, devices: Any) -> tuple[int, float]:
    """(readings, seconds of CPU)."""
    settings = load()
    configuration = Configuration(settings, Registry(registry), alarms=True)
    encoder, transitions = Encoder(1, 0), []
    span = Span(0, 1 << 60, 1 << 60)
    deriver = Deriver(settings, configuration, configuration, devices, span, encoder.take, transitions.extend)
    began = process_time()
    for start in range(0, len(records), RECORDS_AT_ONCE):
        await deriver.take(records[start : start + RECORDS_AT_ONCE], 0)
        if encoder.rows >= 20_000:
            encoder.message()
    await deriver.finish()
    encoder.message()
    return deriver.counts.readings, process_time() - began


@click.command()
@click.option("--messages", "count", default=60_000, show_default=True)
@click.option("--devices", default=500, show_default=True)
@click.option("--readings", default=4, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(count: int, devices: int, readings: int, runs: int, as_json: bool) -> None:
    """Print readings for each second of CPU."""
    registry, known = documents(devices)
    records = [
        SimpleNamespace(
            offset=n, timestamp=line["received_at"] // 1_000, key=device.encode(), value=orjson.dumps(line), headers=()
        )
        for n, (device, line) in enumerate(messages(count, devices, 7, readings))
    ]
    rates = []
    for n in range(runs + 1):
        done, cpu_s = asyncio.run(run(records, registry, known))
        if n:
            rates.append(done / cpu_s)
    found = {"readings": done, "readings_per_cpu_s": round(statistics.median(rates)), "cpu_us_a_reading": round(1e6 / statistics.median(rates), 2),
             "runs": [round(rate) for rate in rates]}  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    print(
        f"{found['readings']:,} readings: {found['readings_per_cpu_s']:,} for each second of CPU, {found['cpu_us_a_reading']} µs each; runs {found['runs']}"
    )


if __name__ == "__main__":
    main()
