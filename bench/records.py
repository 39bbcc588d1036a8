"""Speed of the record mapping: lines a second of CPU time of one core, median of runs.

python bench/records.py [lines]
"""

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from preservarium.streaming import records
from preservarium.streaming.stage import Batch

NOW_US = 1_700_000_000_000_000
RUNS = 7


@dataclass(frozen=True)
class Rec:
    value: bytes
    key: bytes
    offset: int
    timestamp: int = NOW_US // 1_000
    headers: tuple[tuple[str, bytes], ...] = ()


def message(i: int) -> dict[str, Any]:
    return {
        "device_id": f"70b3d57ba000{i % 5000:04x}", "connector_mode": "LoRaWAN", "topic": "", "timestamp": NOW_US + i,
        "received_at": NOW_US + i, "raw_partition": 3, "raw_offset": i, "raw_index": 0, "parser": "dl-trh@1",
        "config_rev": 7, "generation": 0,
        "readings": [
            {"component_type": "temperature", "pin_position": "-1", "value": 21.5, "unit": "Cel"},
        ],
    }  # fmt: skip


def drop(results: Iterable[object]) -> None:
    deque(results, maxlen=0)  # as a stage does: a batch is gone before the next one comes


def measure(name: str, lines: int, size: float, run: Callable[[], object]) -> None:
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    median = statistics.median(times)
    print(f"{name:44} {lines / median:>10,.0f} lines/s  {median / lines * 1e6:5.2f} µs/line  {size:4.0f} bytes/line")


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    messages = [message(i) for i in range(n)]
    singles = [Rec(records.pack([m]), m["device_id"].encode(), i) for i, m in enumerate(messages)]
    packed = [Rec(records.pack(messages[i : i + 50]), b"gw", i) for i in range(0, n, 50)]
    size = sum(len(r.value) for r in singles) / n
    batches = [Batch("t", 0, singles[i : i + 5_000]) for i in range(0, n, 5_000)]
    measure("parse_trusted, one line a record", n, size, lambda: drop(records.parse_trusted(b) for b in batches))
    many = [Batch("t", 0, packed[i : i + 100]) for i in range(0, len(packed), 100)]
    measure("parse_trusted, 50 lines a record", n, size, lambda: drop(records.parse_trusted(b) for b in many))
    measure("pack, one line a record", n, size, lambda: drop(records.pack([m]) for m in messages))

    def raw(payload: object) -> list[Rec]:
        return [
            Rec(
                records.raw_line(m["device_id"], payload, received_at=NOW_US, connector="mqtt", mode="LoRaWAN", port=1),
                m["device_id"].encode(),
                i,
            )
            for i, m in enumerate(messages)
        ]

    for name, payload in (
        ("bytes", bytes(range(30))),
        ("JSON", {"temperature": 21.5, "humidity": 40.1, "battery": 3.3}),
    ):
        raws = raw(payload)
        size = sum(len(r.value) for r in raws) / n
        measure(
            f"parse_raw, {name}, one line a record", n, size,
            lambda raws=raws: drop(records.parse_raw(r, "iot_raw_data", 0, payload_bytes_max=262_144) for r in raws),
        )  # fmt: skip
        measure(f"raw_line, {name}", n, size, lambda payload=payload: raw(payload))


if __name__ == "__main__":
    main()
