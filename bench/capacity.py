"""What a reading takes on disks and in Kafka, and how lag goes under bursts, failures and rolling restarts.

    .venv/bin/python -m bench.capacity size [--messages 50000] [--readings 4]
    .venv/bin/python -m bench.capacity simulate [--json]

**size**: messages as validate passes them on, into an embedded PostgreSQL by the sink's own store: bytes a row of table and indexes, before
compression. The same messages as records of the three topics that each goes through, a hundred a batch, packed with zstd as the producer does.

**simulate**: seconds of a day in a model, no server: workers of measured capacity (preservarium/domain/capacity.py), partitions shared out
evenly, the autoscaler's rule and its waits as deploy/helm has them. Figures are the model's, not a measurement of a system of that size.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import cramjam
import orjson

from preservarium.domain.capacity import Costs, Load, plan, wanted_share, workers_wanted
from preservarium.domain.readings.stored import parse_messages
from preservarium.embedded.postgres import Postgres
from preservarium.settings import LiveSettings, load
from preservarium.stores.base import Move
from preservarium.stores.migrate import migrate_postgres
from preservarium.stores.timescale import TimescaleStore

NAMES = ("temperature", "humidity", "co2", "battery", "pressure", "power", "voltage", "level")


def messages(count: int, readings: int, devices: int = 500) -> list[dict[str, Any]]:
    """Messages of a fleet, in the order of time."""
    rng = random.Random(7)
    start_us = time.time_ns() // 1_000 - 3 * 3_600_000_000
    made = []
    for number in range(count):
        at = start_us + number * 60_000_000 // devices
        made.append(
            {
                "device_id": f"a84041{number % devices:010x}", "connector_mode": "MQTT", "topic": "v3/plant/up", "timestamp": at,
                "received_at": at + rng.randrange(200_000), "raw_partition": number % 12, "raw_offset": number // 12, "raw_index": 0,
                "parser": "decentlab@3", "config_rev": 17, "generation": 0,
                "readings": [
                    {"component_type": name, "pin_position": "-1", "value": round(rng.gauss(20, 5), 2), "unit": "°C", "quality": 1}
                    for name in NAMES[:readings]
                ],
            }
        )  # fmt: skip
    return made


async def postgres_row_bytes(made: list[dict[str, Any]], directory: Path) -> float:
    server = Postgres(directory)
    server.start()
    try:
        dsn = server.dsn()
        live = LiveSettings(load(postgres={"url": dsn}))
        await migrate_postgres(live())
        store = TimescaleStore(live)
        lines = parse_messages(orjson.dumps(made))
        assert lines is not None
        expected = None
        for start in range(0, len(lines), 5_000):
            await store.write(lines[start : start + 5_000], {("iot_validated_data", 0): Move(expected, start + 5_000)})
            expected = start + 5_000
        await store.close()
        connection = await asyncpg.connect(dsn)
        try:
            rows = await connection.fetchval("SELECT count(*) FROM measurements")
            used = await connection.fetchval(
                "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c WHERE c.relkind = 'r' AND c.relname LIKE 'measurements%'"
            )
        finally:
            await connection.close()
        return float(used) / rows
    finally:
        server.stop()


def kafka_message_bytes(made: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes of a message in each topic, packed in batches of a hundred."""
    rng = random.Random(7)
    raw = [
        orjson.dumps(
            {
                "device": m["device_id"],
                "payload": rng.randbytes(20).hex(),
                "port": 2,
                "topic": m["topic"],
                "received_at": m["received_at"],
            }
        )
        for m in made
    ]
    lines = [orjson.dumps(m) for m in made]
    overhead = 40  # key, offsets and times of a record

    def packed(values: list[bytes]) -> float:
        total = 0
        for start in range(0, len(values), 100):
            batch = b"".join(b"k" * overhead + value for value in values[start : start + 100])
            total += len(bytes(cramjam.zstd.compress(batch)))
        return total / len(values)

    return {"iot_raw_data": packed(raw), "iot_standardized_data": packed(lines), "iot_validated_data": packed(lines)}


# --- simulation


#: A worker that dies is missed after the session's time-out (kafka.session_timeout_s); then the group is assigned anew.
SESSION_S = 20
ASSIGN_S = 5
#: A new worker is started and has restored its state after this time.
START_S = 40


@dataclass(frozen=True)
class Run:
    """One scenario, in seconds."""

    name: str
    seconds: int
    rate: Callable[[int], float]  #: second -> readings that come
    dies: tuple[int, float] | None = None  #: when, and which share of the workers; others take their place
    rolls: int | None = None  #: when all are restarted, one after the other
    outage: tuple[int, int] | None = None  #: from when to when the databases are away


def simulate(run: Run, worker_full: float, *, start: int, most: int) -> dict[str, float]:
    """The largest lag of any partition, and how long it is above 10 s; the workers follow as deploy/helm's autoscaler does."""
    workers, starting = start, 0
    backlog = orphans = 0.0  #: readings that wait; of them those of partitions that nobody has
    ready_at: list[int] = []
    last_up = last_down = -10_000
    lag_max, over_10, most_workers = 0.0, 0, start
    recent = [run.rate(0)] * 60
    low_since: int | None = None
    paused_until = -1
    dead, dead_share = 0, 0.0
    for second in range(run.seconds):
        came = run.rate(second)
        recent = [*recent[1:], came]
        if ready_at and ready_at[0] <= second:
            joined = sum(1 for at in ready_at if at <= second)
            ready_at = [at for at in ready_at if at > second]
            workers, starting = workers + joined, starting - joined
            paused_until = second + ASSIGN_S
        if run.dies is not None:
            at, share = run.dies
            if second == at:
                dead = max(1, round(workers * share))
                dead_share = dead / workers
                workers, starting = workers - dead, starting + dead
                ready_at = sorted([*ready_at, *[second + START_S] * dead])
            if second == at + SESSION_S:
                backlog, orphans, dead_share = backlog + orphans, 0.0, 0.0
                paused_until = second + ASSIGN_S
        here = workers
        if run.rolls is not None and run.rolls <= second < run.rolls + 15 * start:
            # Each stops in order: its partitions go to the others at once, and come back when it is there again.
            here -= 1
            if (second - run.rolls) % 15 in (0, 10):
                paused_until = second + ASSIGN_S
        away = run.outage is not None and run.outage[0] <= second < run.outage[1]
        able = 0.0 if second < paused_until or away else worker_full * here
        orphans += came * dead_share
        mine = came * (1 - dead_share)
        done = min(backlog + mine, able)
        backlog += mine - done
        rate = max(1.0, sum(recent) / len(recent))
        lag = max(backlog / rate / max(1e-9, 1 - dead_share), orphans / rate / dead_share if dead_share else 0.0)
        lag_max = max(lag_max, lag)
        over_10 += lag > 10
        busy = done / able if able else 0.0
        if second % 30 == 0 and not (run.dies or run.rolls):
            # While a database is away its stages are paused, and ask for nobody.
            wanted = workers_wanted(wanted_share(busy, 0.0 if away else lag) * workers, least=2, most=most)
            if wanted > workers + starting and second - last_up >= 300:
                more = min(wanted - workers - starting, max(2, workers))
                ready_at = sorted([*ready_at, *[second + START_S] * more])
                starting, last_up = starting + more, second
            low_since = (low_since if low_since is not None else second) if wanted < workers and not away else None
            if low_since is not None and second - low_since >= 600 and second - last_down >= 600:
                workers, last_down, paused_until = workers - 1, second, second + ASSIGN_S
        most_workers = max(most_workers, workers)
    return {"lag_max_s": round(lag_max, 1), "over_10_s": over_10, "workers_max": most_workers, "workers_end": workers}


def scenarios(rate: float) -> list[Run]:
    hour = 3_600

    def steady(_: int) -> float:
        return rate

    return [
        Run("steady", hour, steady),
        Run("twice as much for 5 minutes", hour, lambda s: rate * (2 if 600 <= s < 900 else 1)),
        Run("five times as much for 1 minute", hour, lambda s: rate * (5 if 600 <= s < 660 else 1)),
        Run("doubles and stays", 2 * hour, lambda s: rate * (2 if s >= 600 else 1)),
        Run("one worker dies", hour, steady, dies=(600, 1e-9)),
        Run("a third of the workers die", hour, steady, dies=(600, 1 / 3)),
        Run("rolling restart", 3 * hour, steady, rolls=600),
        Run("databases away for 10 minutes", 2 * hour, steady, outage=(600, 1_200)),
    ]


def simulated() -> list[dict[str, Any]]:
    costs = Costs()
    found = []
    for rate in (1e5, 1e6, 1e7):
        wanted = plan(Load(rate / 4, peak=1.5), costs)
        full = wanted.worker_readings_per_s / 0.7
        for run in scenarios(rate):
            result = simulate(run, full, start=wanted.workers, most=wanted.partitions)
            found.append({"readings_per_s": int(rate), "workers": wanted.workers, "scenario": run.name, **result})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["size", "simulate"])
    parser.add_argument("--messages", type=int, default=50_000)
    parser.add_argument("--readings", type=int, default=4, choices=range(1, len(NAMES) + 1))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.part == "simulate":
        rows = simulated()
        if arguments.json:
            print(json.dumps(rows, indent=1))
            return
        print(
            "| readings/s | workers | what happens | largest lag, s | seconds above 10 s | most workers |\n|---|---|---|---|---|---|"
        )
        for r in rows:
            print(
                f"| {r['readings_per_s']:,} | {r['workers']} | {r['scenario']} | {r['lag_max_s']:g} | {r['over_10_s']} | {r['workers_max']} |"
            )
        return
    made = messages(arguments.messages, arguments.readings)
    with tempfile.TemporaryDirectory() as directory:
        row_bytes = asyncio.run(postgres_row_bytes(made, Path(directory) / "postgres"))
    topics = kafka_message_bytes(made[:10_000])
    found = {"postgres_row_bytes": round(row_bytes, 1), "kafka_message_bytes": {k: round(v, 1) for k, v in topics.items()},
             "kafka_message_bytes_sum": round(sum(topics.values()), 1), "readings": arguments.readings}  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
