"""How fast records go through one worker: the batch transport beside stock Faust, on the same topic, in one run.

    python bench/transport.py [--records 300000] [--runs 5] [--kafka HOST:PORT]

receive   every record reaches the handler, and its offset is committed
forward   every record is also produced to another topic, acknowledged, before its offset is committed

Stock Faust is given a tenth of the records, or the run would take minutes; its rate does not depend on their number.
Without --kafka an embedded Apache Kafka is started. Rates are wall-clock of the worker alone, from the first record to
the last; µs are CPU of the worker (all threads) a record.
"""

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTITIONS = 12
VALUE = b'{"device":"70b3d57ba0000%03d","received_at":1700000000000000,"payload":{"t":21.5,"h":40.2},"pad":"%s"}'

WORKER = """
import asyncio, json, os, sys, time
mode, n = os.environ["BENCH_MODE"], int(os.environ["BENCH_RECORDS"])
seen, began, cpu = 0, 0.0, 0.0

def count(k):
    global seen, began, cpu
    if not seen:
        began, cpu = time.perf_counter(), time.process_time()
    seen += k

def finish():
    s = time.perf_counter() - began
    with open(os.environ["BENCH_RESULT"], "w") as file:  # stock Faust takes standard output for itself
        json.dump({"per_s": seen / s, "cpu_us": (time.process_time() - cpu) / seen * 1e6}, file)
    os._exit(0)

if mode.startswith("batch"):
    from preservarium import topics
    from preservarium.streaming.app import app
    from preservarium.streaming.stage import Effects, Send

    @app.stage(topics.RAW, name="bench", writes=(topics.STANDARDIZED,))
    async def bench(batch):
        count(len(batch.records))
        effects = Effects()
        if mode.endswith("forward"):
            effects.sends = [Send(topics.STANDARDIZED, r.key, r.value, batch.partition) for r in batch.records]
        if seen >= n:
            effects.after.append(finish)
        return effects
else:
    import faust

    kafka = os.environ["PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS"]
    app = faust.App(os.environ["PRESERVARIUM_KAFKA__GROUP"], broker=f"kafka://{kafka}", store="memory://",
                    topic_partitions=12, topic_allow_declare=True, topic_disable_leader=True, producer_linger=0.02,
                    producer_max_batch_size=262144, consumer_auto_offset_reset="earliest", broker_max_poll_records=5000,
                    datadir=os.environ["PRESERVARIUM_DATA_DIR"], worker_redirect_stdouts=False)
    raw = app.topic(os.environ["PRESERVARIUM_KAFKA__TOPIC_PREFIX"] + "iot_raw_data", value_type=bytes,
                    value_serializer="raw")
    out = app.topic(os.environ["PRESERVARIUM_KAFKA__TOPIC_PREFIX"] + "iot_standardized_data", value_type=bytes,
                    value_serializer="raw")

    @app.agent(raw)
    async def bench(stream):
        async for event in stream.events():
            count(1)
            if mode.endswith("forward"):
                await event.forward(out)
            if seen >= n:
                finish()
"""


async def fill(records: int) -> None:
    """Make the topics and produce the input."""
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    from preservarium import topics
    from preservarium.settings import LiveSettings, load
    from preservarium.streaming.publish import Publisher
    from preservarium.streaming.stage import Send

    live = LiveSettings(load())
    settings = live().kafka
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.bootstrap_servers)
    await admin.start()
    names = [t.full(settings.topic_prefix) for t in (topics.RAW, topics.STANDARDIZED)]
    await admin.create_topics([NewTopic(name, PARTITIONS, 1) for name in names])
    await admin.close()
    publisher = Publisher(live)
    pad = b"x" * 160
    for start in range(0, records, 5_000):
        ids = range(start, min(records, start + 5_000))
        await publisher.publish(
            [Send(topics.RAW, b"70b3d57ba0000%03d" % (i % 997), VALUE % (i % 997, pad)) for i in ids]
        )
    await publisher.stop()


def measure(mode: str, records: int, run: int, directory: Path) -> dict[str, float]:
    """One worker from start to last record."""
    app = directory / "bench_worker.py"
    app.write_text(WORKER)
    file = directory / f"{mode}-{run}.json"
    environment = {
        **os.environ,
        "BENCH_MODE": mode,
        "BENCH_RECORDS": str(records),
        "BENCH_RESULT": str(file),
        "PRESERVARIUM_KAFKA__GROUP": f"bench-{mode.replace(' ', '-')}-{run}",
        "PRESERVARIUM_DATA_DIR": str(directory / f"{mode.replace(' ', '-')}-{run}"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "faust", "-A", "bench_worker", "--loop", "uvloop", "worker", "--without-web"]
    result = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if file.exists():
        return dict(json.loads(file.read_text()))
    raise SystemExit(f"{mode}: no result\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")


def main() -> None:
    logging.getLogger("aiokafka").setLevel(logging.ERROR)  # a topic just made has no leaders for a moment
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kafka", default="")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(prefix="preservarium-bench-") as name:
        directory = Path(name)
        service = None
        kafka = arguments.kafka
        if not kafka:
            from preservarium.embedded.kafka import Kafka

            service = Kafka(directory / "kafka")
            service.start()
            kafka = service.bootstrap_servers
        os.environ |= {
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": f"bench{os.getpid()}.",
            "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
        }
        try:
            asyncio.run(fill(arguments.records))
            modes = {"batch receive": 1.0, "stock receive": 0.1, "batch forward": 1.0, "stock forward": 0.1}
            found: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
            for run in range(arguments.runs):  # interleaved: what else the machine does hits all alike
                for mode, share in modes.items():
                    found[mode].append(measure(mode, round(arguments.records * share), run, directory))
        finally:
            if service is not None:
                service.stop()
    medians = {
        mode: {k: statistics.median(r[k] for r in results) for k in ("per_s", "cpu_us")}
        for mode, results in found.items()
    }
    if arguments.json:
        print(json.dumps(medians))
        return
    print(f"{arguments.runs} interleaved runs, medians; {PARTITIONS} partitions, one worker\n")
    print(f"{'':<10}{'stock Faust':>24}{'batch transport':>26}{'ratio':>9}")
    for what in ("receive", "forward"):
        stock, batch = medians[f"stock {what}"], medians[f"batch {what}"]
        print(
            f"{what:<10}{stock['per_s']:>12,.0f}/s {stock['cpu_us']:>6.1f} µs"
            f"{batch['per_s']:>14,.0f}/s {batch['cpu_us']:>6.1f} µs{batch['per_s'] / stock['per_s']:>8.1f}×"
        )


if __name__ == "__main__":
    main()
