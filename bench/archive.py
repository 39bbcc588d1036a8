"""What archiving takes, without a network: messages of the sample fleet, as Kafka's batches, into files.

    python bench/archive.py [--messages 60000] [--devices 500]

Prints bytes a reading in the files, and the CPU a message of parsing Kafka's batches, taking the records and writing the files.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from aiokafka.partitioner import murmur2
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from preservarium.connectors import simulator
from preservarium.connectors.base import Limits
from preservarium.registry.file import read
from preservarium.settings import load
from preservarium.stores.archive_files import Writer

ROOT = Path(__file__).resolve().parents[1]
PARTITIONS = 12
START_US = 1_764_547_200_000_000
#: Records of one of the producer's batches.
BATCH = 100
ZSTD = 4


def fleet(messages: int, devices: int) -> tuple[dict[int, list[Any]], int]:
    """Records by partition, and the readings that they become."""
    documents = {kind: list(found) for kind, found in read(ROOT / "examples" / "registry.yaml").documents.items()}
    catalogue = simulator.Catalogue(documents)
    played = [*documents["device"], *simulator.fleet(catalogue, devices)]
    playing = simulator.Simulator(simulator.players(catalogue, played, 1), 2_000.0)
    found: dict[int, list[Any]] = {}
    readings = 0
    for first in range(0, messages, 5_000):
        sends, count = playing._batch(first, min(messages, first + 5_000), START_US, Limits.of(load()))
        readings += count
        for send in sends:
            found.setdefault((murmur2(send.key) & 0x7FFFFFFF) % PARTITIONS, []).append(send)
    return found, readings


def batches(records: list[Any]) -> list[bytes]:
    """As a producer packs them."""
    made = []
    for start in range(0, len(records), BATCH):
        builder = DefaultRecordBatchBuilder(2, ZSTD, 0, -1, -1, -1, 1 << 20)
        for n, send in enumerate(records[start : start + BATCH]):
            builder.append(n, START_US // 1_000 + 6 * (start + n), send.key, send.value, [])
        made.append(bytes(builder.build()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=60_000)
    parser.add_argument("--devices", type=int, default=500)
    options = parser.parse_args()
    found, readings = fleet(options.messages, options.devices)
    packed = [batches(records) for _, records in sorted(found.items())]
    with tempfile.TemporaryDirectory() as folder:
        for turn in ("first", "second"):
            size, began_s = 0, time.process_time()
            for number, some in enumerate(packed):
                writer = Writer(Path(folder) / str(number), {"partition": number})
                for data in some:
                    there = MemoryRecords(data)
                    while there.has_next():
                        for record in there.next_batch():
                            writer.add(record)
                    if writer.full:
                        writer.flush()
                size += writer.close(writer.records)[1]
            cpu_us = (time.process_time() - began_s) / options.messages * 1e6
            print(
                f"{turn}: {size / readings:.2f} bytes a reading, {cpu_us:.2f} µs of CPU a message ({readings:,} readings of {options.messages:,} messages)"
            )


if __name__ == "__main__":
    main()
