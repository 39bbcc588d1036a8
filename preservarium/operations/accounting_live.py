"""How far a run is, counted while it goes, by the rules of the accounting (accounting.py) and from the same topics.

A message that a crash made a stage write twice counts once, what an earlier run left behind does not, and a record that
packs several messages counts as so many. Readings are stored once their stage has committed them; those that it refused are not.

Memory: a few numbers for each record that a store has not committed yet.
"""

import asyncio
import contextlib
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from preservarium import topics
from preservarium.domain.readings.normalize import has_payload
from preservarium.operations.accounting import Window, refused_messages, validated_readings
from preservarium.operations.accounting_facts import AUDITED
from preservarium.settings import Settings
from preservarium.streaming import kafka_clients, records
from preservarium.streaming.stage import Batch

#: Store -> the stage that fills it.
STORES: Final[Mapping[str, str]] = {"postgres": "sink", "clickhouse": "sync"}
#: Records of one look at Kafka, so that others have their turn between.
RECORDS_MAX: Final = 2_000
#: One look takes no longer than this; what has come since is counted by the next one.
LOOK_S: Final = 2.0
#: Error lines that are told apart; a crash repeats a batch's at most.
ERRORS_TOLD_APART: Final = 100_000


@dataclass(slots=True)
class Count:
    """How far a run is."""

    messages: int = 0
    standardized: int = 0  #: readings
    validated: int = 0  #: readings
    stored: dict[str, int] = field(default_factory=dict)  #: store -> readings
    errors: int = 0


@dataclass(slots=True)
class _ToStore:
    """Readings of one partition of the validated topic that belong into the stores, by where their records end."""

    ends: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)  #: of the record that ends there

    def take(self, committed: int) -> int:
        """How many are committed now that were not before; they are forgotten."""
        done = bisect_right(self.ends, committed)
        taken = sum(self.counts[:done])
        del self.ends[:done], self.counts[:done]
        return taken


class Tally:
    """The count of a run: give it the records of its topics in their order, and what the stores' groups have committed.

    Args:
        window: where the run begins.
        stores: names of the stores.
        payload_bytes_max: as normalize has it.
        store_failed: whether values flagged fail are stored.
    """

    def __init__(self, window: Window, stores: Iterable[str], *, payload_bytes_max: int, store_failed: bool) -> None:
        self._window = window
        self._payload_bytes_max = payload_bytes_max
        self._store_failed = store_failed
        self._count = Counter[str]()
        self._waiting: dict[tuple[str, int], _ToStore] = {
            (store, partition): _ToStore()
            for store in stores
            for partition in window.start.get(topics.VALIDATED.name, {})
        }
        self._stored = dict.fromkeys(stores, 0)
        self._refused = Counter[str]()
        #: (topic, partition, raw partition or release) -> what was counted last of it
        self._last: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._errors: set[int] = set()

    def count(self) -> Count:
        """How far it is."""
        stored = {store: max(0, n - self._refused[STORES[store]]) for store, n in self._stored.items()}
        c = self._count
        return Count(c["messages"], c["standardized"], c["validated"], stored, c["errors"])

    def take(self, batch: Batch) -> None:
        """Count records of one partition of one of the topics that are audited."""
        if batch.topic == topics.RAW.name:
            self._raw(batch)
            return
        parsed, _ = records.parse_trusted(batch)
        if batch.topic == topics.ERRORS.name:
            for lines in parsed:
                for line in lines:
                    self._error(line)
            return
        for record, lines in zip(batch.records, parsed, strict=True):
            to_store = 0
            for line in lines:
                if "silent_below" in line or not self._is_news(batch, line):
                    continue
                if batch.topic == topics.STANDARDIZED.name:
                    self._count["standardized"] += len(line["readings"])
                    continue
                self._count["validated"] += len(line.get("repeated", ()))
                for _, counted, stored in validated_readings(line, store_failed=self._store_failed):
                    self._count["validated"] += counted
                    to_store += stored
            if to_store:
                for store in self._stored:
                    waiting = self._waiting[store, batch.partition]
                    waiting.ends.append(record.offset + 1)
                    waiting.counts.append(to_store)

    def committed(self, store: str, offsets: Mapping[int, int]) -> None:
        """Note how far a store's stage has come: partition -> offset of the next record."""
        for partition, offset in offsets.items():
            if (waiting := self._waiting.get((store, partition))) is not None:
                self._stored[store] += waiting.take(offset)

    def _raw(self, batch: Batch) -> None:
        for record in batch.records:
            messages, refused = records.parse_raw(
                record, batch.topic, batch.partition, payload_bytes_max=self._payload_bytes_max
            )
            self._count["messages"] += len(refused) + sum(map(has_payload, messages))

    def _is_news(self, batch: Batch, line: Mapping[str, Any]) -> bool:
        """Whether a line is of the run and was not counted: what a crash repeats comes in the order that it had."""
        if line.get("generation", 0) or not self._window.holds(line["raw_partition"], line["raw_offset"]):
            return False
        # Messages that were put into order have the place of their release.
        released = line.get("released")
        source = line["raw_partition"] if released is None else -1
        at = (line["raw_offset"], line["raw_index"]) if released is None else (released[0], released[1])
        key = batch.topic, batch.partition, source
        if at <= self._last.get(key, (-1, -1)):
            return False
        self._last[key] = at
        return True

    def _error(self, line: Mapping[str, Any]) -> None:
        partition, offset = line.get("raw_partition"), line.get("raw_offset")
        if partition is None or offset is None or not self._window.holds(partition, offset):
            return
        same = hash(
            (partition, offset, line.get("raw_index"), *map(line.get, ("stage", "code", "message", "raw", "raw_b64")))
        )
        if same in self._errors:
            return
        if len(self._errors) < ERRORS_TOLD_APART:
            self._errors.add(same)
        self._count["errors"] += 1
        if line["stage"] in STORES.values():
            self._refused[line["stage"]] += sum(len(m["readings"]) for m in refused_messages(line))


@asynccontextmanager
async def counting(settings: Settings, window: Window) -> AsyncIterator[Callable[[], Awaitable[Count]]]:
    """Gives a function that tells how far the run is, by what is new in Kafka since it was asked last; where Kafka does not
    answer, what it told last.

    Raises:
        KafkaError: Kafka cannot be reached at first.
    """
    from aiokafka import AIOKafkaConsumer, TopicPartition
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.errors import KafkaError

    kafka = settings.kafka
    stores = STORES if settings.clickhouse.enabled else ("postgres",)
    tally = Tally(
        window,
        stores,
        payload_bytes_max=settings.normalize.payload_bytes_max,
        store_failed=settings.quality.store_failed,
    )
    names = {topic.full(kafka.topic_prefix): topic for topic in AUDITED}
    begins = {
        TopicPartition(name, partition): offset
        for name, topic in names.items()
        for partition, offset in window.start[topic.name].items()
    }
    stored = [tp for tp in begins if names[tp.topic] is topics.VALIDATED]
    consumer = AIOKafkaConsumer(
        **kafka_clients.reading(kafka), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    admin = AIOKafkaAdminClient(**kafka_clients.connection(kafka))

    async def look() -> None:
        until = monotonic() + LOOK_S
        # Asked first: of what is committed now, all is read below.
        committed = {store: await _committed(admin, f"{kafka.group}-{STORES[store]}", stored) for store in stores}
        ends = await consumer.end_offsets([*begins])
        while monotonic() < until:
            behind = [tp for tp, end in ends.items() if await consumer.position(tp) < end]
            if not behind:
                break
            found = await consumer.getmany(*behind, timeout_ms=200, max_records=RECORDS_MAX)
            for tp, batch in found.items():
                tally.take(Batch(names[tp.topic].name, tp.partition, batch))
        for store, offsets in committed.items():
            tally.committed(store, offsets)

    async def count() -> Count:
        with contextlib.suppress(KafkaError, OSError, TimeoutError):
            async with asyncio.timeout(2 * LOOK_S):
                await look()
        return tally.count()

    try:
        await consumer.start()
        consumer.assign([*begins])
        for tp, offset in begins.items():
            consumer.seek(tp, offset)
        await admin.start()
        yield count
    finally:
        await admin.close()
        await kafka_clients.stop(consumer)


async def _committed(admin: Any, group: str, partitions: list[Any]) -> dict[int, int]:
    found = await admin.list_consumer_group_offsets(group, partitions=partitions)
    return {tp.partition: position.offset for tp, position in found.items() if position.offset >= 0}
