"""Workers join, leave by SIGTERM and are killed with -9, while handlers fail at random, under load: nothing is lost.

Checked afterwards, from durable facts only: every record produced is in the last topic and in the store (or, which only
chance can bring about, in `iot_errors`), the store holds each once, and the state of every key counts each record once.
"""

import asyncio
import json
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from worker_support import Workers, make_topics, read_all, until

from preservarium import topics
from preservarium.settings import LiveSettings, load
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

PARTITIONS = 6
KEYS = 200
SESSION_S = 6.0  # the least that a broker takes by default


class Load:
    """Produces ids 0, 1, 2, … and remembers what Kafka acknowledged."""

    def __init__(self, live: LiveSettings, rate: float) -> None:
        self.rate = rate
        self.produced = 0
        self._publisher = Publisher(live)
        self._stop = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._stop.set()
            await task
            await self._publisher.stop()

    async def _run(self) -> None:
        await self._publisher.start()
        tick_s = 0.05
        n = max(1, round(self.rate * tick_s))
        while not self._stop.is_set():
            began = time.monotonic()
            ids = range(self.produced, self.produced + n)
            await self._publisher.publish([Send(topics.RAW, b"k%d" % (i % KEYS), b"%d" % i) for i in ids])
            self.produced += n
            await asyncio.sleep(max(0, tick_s - (time.monotonic() - began)))


class Field:
    """Topics, store, workers and load of one torture."""

    def __init__(self, kafka: str, prefix: str, directory: Path, monkeypatch: pytest.MonkeyPatch, failures: float):
        self.kafka = kafka
        self.prefix = prefix
        self.group = f"{prefix}torture"
        self.store = directory / "store.sqlite"
        self.directory = directory
        environment = {
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": prefix,
            "PRESERVARIUM_KAFKA__GROUP": self.group,
            "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
            "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": str(SESSION_S),
            "PRESERVARIUM_KAFKA__COMMIT_INTERVAL_S": "0.5",
            "PRESERVARIUM_AGENTS__BACKOFF_S": "0.05",
            "PRESERVARIUM_AGENTS__BACKOFF_MAX_S": "0.5",
            "PRESERVARIUM_DATA_DIR": str(directory / "data"),
            "PRESERVARIUM_LOG_FORMAT": "json",
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        environment |= {"TORTURE_STORE": str(self.store), "TORTURE_FAILURES": str(failures)}
        self.workers = Workers(Path(__file__).parent / "torture_app.py", environment, directory)
        self.live = LiveSettings(load())
        connection = sqlite3.connect(self.store)
        connection.executescript(
            "PRAGMA journal_mode = WAL;"
            "CREATE TABLE rows (id INTEGER PRIMARY KEY, copies INTEGER);"
            "CREATE TABLE offsets (partition INTEGER PRIMARY KEY, next_offset INTEGER);"
            "CREATE TABLE gaps (partition INTEGER, expected INTEGER, got INTEGER);"
        )
        connection.close()

    async def make_topics(self) -> None:
        used = [topics.RAW, topics.STANDARDIZED, topics.VALIDATED, topics.ERRORS]
        await make_topics(self.kafka, self.prefix, PARTITIONS, used)

    def stored(self) -> dict[int, int]:
        connection = sqlite3.connect(self.store, timeout=30)
        rows = dict(connection.execute("SELECT id, copies FROM rows").fetchall())
        connection.close()
        return rows

    async def drained(self, produced: int, within_s: float) -> None:
        """Wait until the store has everything, or until nothing has come for a while."""
        last, since = -1, time.monotonic()
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            count = len(self.stored())
            if count >= produced:
                return
            if count != last:
                last, since = count, time.monotonic()
            elif time.monotonic() - since > 3 * SESSION_S:
                return
            await asyncio.sleep(0.2)

    async def check(self, produced: int, capsys: pytest.CaptureFixture[str], *, exact_store: bool = True) -> None:
        """Compare what was produced with what is there."""
        raw, passed, validated, errors = await asyncio.gather(
            *(
                read_all(self.kafka, t.full(self.prefix), PARTITIONS)
                for t in (topics.RAW, topics.STANDARDIZED, topics.VALIDATED, topics.ERRORS)
            )
        )
        assert len(raw) == produced
        set_aside = [json.loads(line) for record in errors for line in record.value.splitlines()]
        stored = self.stored()
        ids = {int(r.value) for r in validated}
        lost = set(range(produced)) - ids
        missing = set(range(produced)) - set(stored)
        first: dict[bytes, list[int]] = {}
        for record in passed:
            first.setdefault(record.key, []).append(int(record.value))
        with capsys.disabled():
            print(
                f"\n  produced {produced:,}; lost {len(lost)}; set aside {len(set_aside)}; duplicates:"
                f" {len(passed) - len({int(r.value) for r in passed}):,} after count,"
                f" {len(validated) - len(ids):,} after relay; stored {len(stored):,},"
                f" twice {sum(copies > 1 for copies in stored.values())}"
            )
        excused = {int(line["raw"]) for line in set_aside}
        assert lost <= excused
        assert missing <= excused
        in_order(first)

        dump = self.directory / "dump.json"
        number = self.workers.start(
            TORTURE_DUMP=str(dump), TORTURE_FAILURES="0", PRESERVARIUM_DATA_DIR=str(dump.parent / "fresh")
        )
        await until(dump.exists, 60, lambda: self.workers.log(number)[-3000:])
        self.workers.signal(number, signal.SIGTERM)
        states = json.loads(dump.read_text())
        expected = Counter(record.key.decode() for record in raw)
        for line in set_aside:
            if line["stage"] == "count":
                expected[f"k{int(line['raw']) % KEYS}"] -= 1
        assert {key: number for key, (number, _, _) in states.items()} == dict(expected)
        gaps = sqlite3.connect(self.store).execute("SELECT * FROM gaps").fetchall()
        assert not gaps
        if exact_store:
            # Duplicates of a record have offsets of their own, so the store may count them; never twice one offset.
            offsets = dict(sqlite3.connect(self.store).execute("SELECT partition, next_offset FROM offsets").fetchall())
            assert sum(offsets.values()) == sum(stored.values()) == len(validated)
        assert await self.workers.ended(number) == 0


def in_order(first: dict[bytes, list[int]]) -> None:
    """Without its duplicates, what a key's records became is in the order in which they were produced."""
    for ids in first.values():
        seen = list(dict.fromkeys(ids))
        assert seen == sorted(seen)


async def play(field: Field, script: list[tuple[str, int]], pause_s: float) -> None:
    for action, number in script:
        if action == "start":
            assert field.workers.start() == number
            await field.workers.ready(number)
        elif action == "kill":
            field.workers.signal(number, signal.SIGKILL)
        elif action == "term":
            field.workers.signal(number, signal.SIGTERM)
        elif action == "freeze":
            field.workers.signal(number, signal.SIGSTOP)
        elif action == "thaw":
            field.workers.signal(number, signal.SIGCONT)
        await asyncio.sleep(pause_s)


SHORT = [("start", 0), ("start", 1), ("kill", 0), ("start", 2), ("term", 1), ("start", 3), ("kill", 2)]
LONG = [
    *SHORT,
    ("start", 4),
    ("freeze", 3),
    ("start", 5),
    ("thaw", 3),
    ("kill", 4),
    ("start", 6),
    ("term", 5),
    ("start", 7),
    ("kill", 6),
    ("start", 8),
    ("term", 7),
]


@pytest.mark.timeout(240)
async def test_nothing_is_lost_when_workers_come_and_go(
    kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await torture(Field(kafka, topic_prefix, tmp_path, monkeypatch, failures=0.1), SHORT, 1.5, 2_000, capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_nothing_is_lost_in_a_long_torture(
    kafka: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await torture(Field(kafka, topic_prefix, tmp_path, monkeypatch, failures=0.2), LONG, 8, 3_000, capsys)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("apart_s", [0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 2.0])
async def test_workers_that_start_together_leave_no_partition_unread(
    kafka: str,
    topic_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    apart_s: float,
) -> None:
    """A join that meets another's recovery: with stock Faust, partitions stayed unread for minutes now and then."""
    field = Field(kafka, topic_prefix, tmp_path, monkeypatch, failures=0)
    await field.make_topics()
    load = Load(field.live, 500)
    try:
        async with load.running():
            for _ in range(3):
                field.workers.start()
                await asyncio.sleep(apart_s)
            for number in range(3):
                await field.workers.ready(number, within_s=90)
            await asyncio.sleep(2)
        await until(
            lambda: len(field.stored()) == load.produced, 20, lambda: f"{len(field.stored())} of {load.produced}"
        )
    finally:
        field.workers.stop()


async def torture(
    field: Field, script: list[tuple[str, int]], pause_s: float, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    await field.make_topics()
    load = Load(field.live, rate)
    try:
        async with load.running():
            await play(field, script, pause_s)
        await field.drained(load.produced, 60)
        terminated = [number for action, number in script if action == "term"]
        for number, process in enumerate(field.workers.processes):
            if process.poll() is None and number not in terminated:
                field.workers.signal(number, signal.SIGTERM)
                terminated.append(number)
        for number in terminated:
            assert await field.workers.ended(number) == 0, field.workers.log(number)[-3000:]
        for number in range(len(field.workers.processes)):
            assert "offsets_skipped" not in field.workers.log(number)
        await field.check(load.produced, capsys)
    finally:
        field.workers.stop()
