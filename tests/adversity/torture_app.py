"""The worker that the torture test runs: two chained stages with state on the shared feed, one group stage with a store.

    faust -A torture_app worker

TORTURE_STORE     SQLite file that plays the database: rows and offsets in one transaction
TORTURE_FAILURES  share of batches whose handler fails
TORTURE_DUMP      file: write every state found after recovery to it, and exit
"""

import json
import os
import random
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from preservarium import topics
from preservarium.errors import Retry
from preservarium.streaming.app import app
from preservarium.streaming.stage import Batch, Effects, Send

FAILURES = float(os.environ.get("TORTURE_FAILURES", "0"))
counters = app.state_table("counters", help="Records of each key, with the offset that the count goes up to.")


def maybe_fail() -> None:
    """As a flaky dependency or a defect would, before or after effects were decided."""
    chance = random.random()
    if chance < FAILURES / 2:
        raise Retry("torture")
    if chance < FAILURES:
        raise RuntimeError("torture")


@app.stage(topics.RAW, name="count", writes=(topics.STANDARDIZED,), state=counters)
async def count(batch: Batch) -> Effects:
    """Count the records of each key; pass every record on, again where it comes again."""
    maybe_fail()
    effects = Effects()
    states: dict[bytes, tuple[int, int]] = {}
    for record in batch.records:
        key = record.key
        assert key is not None
        if key not in states:
            value = counters.get(batch.partition, key)
            states[key] = tuple(json.loads(value)) if value else (0, -1)  # type: ignore[assignment]
        number, watermark = states[key]
        if record.offset > watermark:
            states[key] = (number + 1, record.offset)
        effects.sends.append(Send(topics.STANDARDIZED, key, record.value, batch.partition))
    for key, state in states.items():
        effects.put("counters", key, json.dumps(state).encode())
    maybe_fail()
    return effects


@app.stage(topics.STANDARDIZED, name="relay", writes=(topics.VALIDATED,))
async def relay(batch: Batch) -> Effects:
    """Pass every record on by key, as normalize does."""
    maybe_fail()
    return Effects([Send(topics.VALIDATED, record.key, record.value) for record in batch.records])


class Store:
    """SQLite as the database: several processes, one transaction a flight."""

    def __init__(self) -> None:
        self._connection: sqlite3.Connection | None = None

    @property
    def connection(self) -> sqlite3.Connection:
        """Connected on first use."""
        if self._connection is None:
            self._connection = sqlite3.connect(os.environ["TORTURE_STORE"], timeout=30, isolation_level=None)
        return self._connection

    def offsets(self, partitions: Sequence[int]) -> dict[int, int]:
        """The first offset not in the store, of each partition that it knows."""
        rows = self.connection.execute("SELECT partition, next_offset FROM offsets").fetchall()
        return {partition: offset for partition, offset in rows if partition in partitions}

    def write(self, batches: Sequence[Batch]) -> None:
        """Rows and offsets together; a record below the stored offset, or from a stale worker, changes nothing."""
        c = self.connection
        c.execute("BEGIN IMMEDIATE")
        try:
            stored = self.offsets([batch.partition for batch in batches])
            for batch in batches:
                start = stored.get(batch.partition, 0)
                rows = [(r.value.decode(),) for r in batch.records if r.offset >= start and r.value is not None]
                c.executemany("INSERT INTO rows VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET copies = copies + 1", rows)
                end = batch.records[-1].offset + 1
                if end > start:
                    if batch.records[0].offset > start and start:
                        c.execute(
                            "INSERT INTO gaps VALUES (?, ?, ?)", (batch.partition, start, batch.records[0].offset)
                        )
                    c.execute("INSERT OR REPLACE INTO offsets VALUES (?, ?)", (batch.partition, end))
            c.execute("COMMIT")
        except BaseException:
            c.execute("ROLLBACK")
            raise

    async def close(self) -> None:
        """Disconnect."""
        if self._connection is not None:
            self._connection.close()


store = app.resource(Store())


async def on_assigned(partitions: list[int]) -> Mapping[int, int]:
    """The store's offsets win over Kafka's."""
    if random.random() < FAILURES:
        raise Retry("torture")
    return store.offsets(partitions)


@app.group_stage(
    topics.VALIDATED,
    name="keep",
    group="keep",
    records_max=lambda: 1_000,
    linger_s=lambda: 0.05,
    flights=2,
    on_assigned=on_assigned,
)
async def keep(batches: Sequence[Batch]) -> Effects:
    """Write to the store."""
    maybe_fail()
    store.write(batches)
    maybe_fail()  # after the commit: the answer was lost
    return Effects()


if dump := os.environ.get("TORTURE_DUMP"):

    @app.task
    async def write_dump() -> None:
        """After recovery."""
        found: dict[str, Any] = {}
        for partition in counters.partitions():
            for key, value in counters.items(partition):
                found[key.decode()] = [*json.loads(value), partition]
        with open(dump + ".part", "w") as file:
            json.dump(found, file)
        os.rename(dump + ".part", dump)
