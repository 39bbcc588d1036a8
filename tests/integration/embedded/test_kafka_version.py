"""The pinned Kafka and our Faust and aiokafka understand each other: topics, groups, commits, changelog recovery.

Another version is tried with TEST_KAFKA_VERSION=4.1.1; docs/decisions/0001-kafka-version.md holds what came of it.
"""

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from preservarium.embedded.kafka import Kafka, pinned_version
from preservarium.embedded.service import ServiceUnavailable

pytestmark = pytest.mark.kafka

KEYS = [f"device-{n}".encode() for n in range(20)]
PARTITIONS = 4

APP = """
import os, sys
import faust

class App(faust.App):
    def on_rebalance_end(self):
        # Recovered, and reading from the committed offsets: only now does a partition count as held.
        super().on_rebalance_end()
        mine = sorted(tp.partition for tp in self.assignor.assigned_actives() if tp.topic == "events")
        with open(os.environ["DATADIR"] + ".assigned", "w") as f:
            print(*mine, file=f)

app = App(
    "counting", broker="kafka://" + os.environ["BROKER"], store="rocksdb://", topic_partitions=4,
    datadir=os.environ["DATADIR"], topic_disable_leader=True,
    broker_session_timeout=6.0, broker_heartbeat_interval=1.0, broker_request_timeout=15.0, broker_commit_interval=0.3,
    producer_compression_type="lz4", worker_redirect_stdouts=False,
)
events = app.topic("events", key_type=bytes, value_type=bytes, value_serializer="raw")
results = app.topic("results", key_type=bytes, value_type=bytes, value_serializer="raw")
counts = app.Table("counts", key_type=bytes, default=lambda: [-1, 0], partitions=4)

@app.agent(events, name="count")
async def count(stream):
    # Delivery is at least once: the state carries the last number that it applied, and an older one changes nothing.
    async for key, number in stream.items():
        last, count = counts[key]
        if int(number) > last:
            counts[key] = [int(number), count + 1]
        await results.send(key=key, value=str(counts[key][1]).encode())

sys.argv = ["counting", "worker", "-l", "warn", "--without-web"]
app.main()
"""


class Worker:
    """The small app in a process of its own."""

    def __init__(self, directory: Path, bootstrap: str) -> None:
        self.data = directory
        self.data.mkdir(parents=True, exist_ok=True)
        self.log = directory.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", APP],
                env={**os.environ, "BROKER": bootstrap, "DATADIR": str(directory)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def assigned(self) -> list[int]:
        file = self.data.with_suffix(".assigned")
        return [int(n) for n in file.read_text().split()] if file.exists() else []

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(40)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Kafka]:
    service = Kafka(tmp_path / "kafka", version=os.environ.get("TEST_KAFKA_VERSION") or None)
    try:
        await asyncio.to_thread(service.start)
    except ServiceUnavailable as e:
        pytest.skip(f"missing: {e}")
    yield service
    await asyncio.to_thread(service.stop)


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.1)


async def test_faust_counts_right_through_kill_wipe_and_recovery(broker: Kafka, tmp_path: Path) -> None:
    bootstrap = broker.bootstrap_servers
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    for name in ("events", "results"):
        answer = await admin.create_topics([NewTopic(name, PARTITIONS, 1, topic_configs={"compression.type": "lz4"})])
        assert [code for _, code, *_ in answer.topic_errors] == [0]
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, compression_type="lz4", enable_idempotence=True)
    await producer.start()
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    consumer.assign([TopicPartition("results", p) for p in range(PARTITIONS)])
    seen: Counter[bytes] = Counter()

    numbers = itertools.count()

    async def send(times: int) -> None:
        for number in itertools.islice(numbers, times):
            await asyncio.gather(*[await producer.send("events", b"%d" % number, key=key) for key in KEYS])

    async def counted(count: int) -> bool:
        assert workers[-1].process.poll() is None, "a worker ended by itself"
        for records in (await consumer.getmany(timeout_ms=200)).values():
            for record in records:
                seen[record.key] = max(seen[record.key], int(record.value))
        return all(seen[key] >= count for key in KEYS)

    ends_of = AIOKafkaConsumer(bootstrap_servers=bootstrap)
    await ends_of.start()

    async def committed() -> bool:
        ends = await ends_of.end_offsets([TopicPartition("events", p) for p in range(PARTITIONS)])
        offsets = await admin.list_consumer_group_offsets("counting")
        return all(end == 0 or (tp in offsets and offsets[tp].offset == end) for tp, end in ends.items())

    workers: list[Worker] = []
    try:
        first = Worker(tmp_path / "first", bootstrap)
        workers.append(first)

        async def settled() -> bool:
            return first.assigned == list(range(PARTITIONS))

        await until(settled, "the first worker holding every partition")
        await send(10)
        await until(lambda: counted(10), "the first counts")
        await until(committed, "the commit")
        assert first.end(signal.SIGKILL) == -signal.SIGKILL

        # Two workers without local state, so that the second one's join may meet the first one's recovery: what they count
        # from stands in the changelog.
        shutil.rmtree(tmp_path / "first")
        second, third = Worker(tmp_path / "second", bootstrap), Worker(tmp_path / "third", bootstrap)
        workers += [second, third]

        async def shared() -> bool:
            both = sorted(second.assigned + third.assigned)
            return both == list(range(PARTITIONS)) and bool(second.assigned) and bool(third.assigned)

        await until(shared, "two workers sharing the partitions")
        # Not earlier: see the decision.
        await send(1)
        await until(lambda: counted(11), "counts that go on where the changelog ended")
        await until(committed, "the second commit")
        assert set(seen.values()) == {11}, "the recovered state is exact"

        # Taking over from a worker that leaves in good order, with the standby's state.
        assert second.end(signal.SIGTERM) == 0

        async def all_of_them() -> bool:
            return third.assigned == list(range(PARTITIONS))

        await until(all_of_them, "the last worker taking over")
        await send(1)
        await until(lambda: counted(12), "counts after the take-over")
        assert set(seen.values()) == {12}
        assert third.end(signal.SIGTERM) == 0
    except BaseException:
        # Who stood still: the workers (events uncommitted), or we who read their results?
        print("seen", sorted(seen.values()), "committed", await admin.list_consumer_group_offsets("counting"))
        both = [TopicPartition(topic, p) for topic in ("events", "results") for p in range(PARTITIONS)]
        print("ends", await ends_of.end_offsets(both))
        print("read to", [await consumer.position(tp) for tp in both[PARTITIONS:]])
        for worker in workers:
            print(worker.log.read_text()[-3000:])
        raise
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait(10)
        await ends_of.stop()
        await consumer.stop()
        await producer.stop()
        await admin.close()


def test_the_decision_names_the_pinned_version() -> None:
    text = (Path(__file__).parents[3] / "docs" / "decisions" / "0001-kafka-version.md").read_text()
    assert f"Kafka {pinned_version()}" in text
