"""One worker at a time takes changes out of the source and makes Kafka records of them.

A PostgreSQL advisory lock makes one worker the leader, as for the registry's relay. Two that take themselves for the leader
for a moment do no harm: the events that both send have the same ids.

Each step: leave out versions that were sent, plan, send, wait for Kafka's acknowledgement, record. The next one is read
meanwhile, and planned in the transaction that records this one. What a crash leaves between plan and record is brought to what the source holds by the next leader.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
import orjson
import structlog
from aiokafka.partitioner import murmur2
from mode import Service

from preservarium import metrics, topics
from preservarium.errors import Retry
from preservarium.extract.ledger import GONE, Ledger, Pending, Sent
from preservarium.extract.named import SourceError
from preservarium.extract.source import (
    KEYS,
    STEP_ROWS,
    Change,
    Order,
    Position,
    Source,
    Step,
    Table,
    Woken,
)
from preservarium.settings import Settings
from preservarium.stores.connections import session
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

log = structlog.get_logger(__name__)

#: Session advisory lock of the leader.
LEADER_LOCK_KEY: Final = 0x5052_4553_4558  # "PRESEX"
#: How long the others wait before they ask for the lock again: the longest gap when a leader dies.
FOLLOW_S: Final = 5.0
#: Notices come in bursts; what one look finds is not worth several.
SETTLE_S: Final = 0.2
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0

TOPICS: Final = {"tasks": topics.TASK_EVENTS, "employees": topics.EMPLOYEES}


def event_id(order: Order) -> str:
    """As preservarium/domain/tasks.py orders them."""
    return f"{order[0]}-{order[1]}"


def after(order: Order, before: Order | None, observed_us: int) -> Order:
    """An event's order, greater than that of the row's last one."""
    if before is None or order > before:
        return order
    return before[0], max(before[1] + 1, observed_us)


def send_of(table: Table, change: Change, order: Order) -> Send:
    """The record that tells of a row."""
    line: dict[str, Any] = {"event_id": event_id(order), **change.fields}
    if change.version[0]:
        line["updated_at"] = change.version[0]
    if table == "tasks":
        line["task_id"] = change.id
    return Send(TOPICS[table], _key(change.fields.get(KEYS[table])), orjson.dumps(line))


def gone_of(table: Table, id: str, sent: Sent, order: Order) -> Send:
    """The record that tells that a row, as it was sent, is no more."""
    line: dict[str, Any] = {"event_id": event_id(order), KEYS[table]: sent.key, "deleted": True}
    if table == "tasks":
        line |= {"task_id": id, "assigned_at": sent.at_us}
    elif sent.version[0]:
        line["updated_at"] = sent.version[0]
    return Send(TOPICS[table], _key(sent.key), orjson.dumps(line))


def _key(value: Any) -> bytes | None:
    return None if value in (None, "") else str(value).encode()


def source_of(settings: Callable[[], Settings]) -> Source:
    """The source that the settings name.

    Raises:
        SourceError: the URL is of no kind that we know.
    """
    url = settings().extract.url.get_secret_value()
    scheme = url.partition(":")[0]
    if scheme in ("postgres", "postgresql"):
        from preservarium.extract.postgres import PostgresSource

        return PostgresSource(settings)
    if scheme in ("mongodb", "mongodb+srv"):
        from preservarium.extract.mongo import MongoSource

        return MongoSource(settings)
    message = f"PRESERVARIUM_EXTRACT__URL: {scheme!r} is none of postgresql, mongodb"
    raise SourceError(message)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A step as it is sent."""

    sends: Sequence[Send]
    sent: dict[str, Sent]  #: entries of its rows once it is acknowledged
    position: Position | None
    changed: int  #: of `sent`, without those that are gone
    read: int  #: rows that the source gave

    @property
    def events(self) -> list[Pending]:
        """What is planned."""
        return [Pending(id, s) for id, s in self.sent.items()]


class Extractor:
    """Reads, sends and records. For one task at a time."""

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        publish: Callable[[Sequence[Send]], Coroutine[Any, Any, Any]],
        *,
        partitions: int,
    ) -> None:
        self._partitions = partitions
        self._recovered: set[Table] = set()
        self._source = source
        self._ledger = ledger
        self._publish = publish

    async def turn(self) -> int:
        """Bring the topics up to what the source holds now, as far as it tells; returns the events sent.

        Raises:
            Retry: Kafka did not acknowledge.
            Whatever the source's and our database's drivers raise.
        """
        total = 0
        for table in self._source.tables:
            if table not in self._recovered:
                total += await self._recover(table)
                self._recovered.add(table)
            position, _ = await self._ledger.position(table)
            sent = await self._apply(table, self._source.read(table, position))
            if position is None:
                # All of it was read just now: that was a comparison of all keys.
                await self._ledger.reconciled(table)
            metrics.EXTRACT_LOOKS.labels(table, "changed" if sent else "same").inc()
            total += sent
        return total

    async def gone(self, table: Table, ids: Iterable[str]) -> int:
        """Tell of rows that somebody says are gone, where they are; returns the events sent."""
        return await self._apply(table, self._missing(table, sorted(ids)))

    async def reconcile(self, table: Table) -> int:
        """Compare every key and version with what was sent; returns the events that this made necessary.

        Finds what a watermark cannot: rows that are gone, and changes that did not move it. Memory: a page of keys.
        """
        total = await self._apply(table, self._differing(table))
        async for page in self._ledger.pages(table):
            total += await self.gone(table, page)
        await self._ledger.reconciled(table)
        if total:
            log.info("extract_reconciled", table=table, events=total)
        return total

    async def _missing(self, table: Table, ids: Sequence[str]) -> AsyncIterator[Step]:
        for start in range(0, len(ids), STEP_ROWS):
            page = ids[start : start + STEP_ROWS]
            there = {change.id for change in await self._source.rows(table, page)}
            gone = [i for i in page if i not in there]
            if gone:
                yield Step(gone=gone, observed_us=await self._source.now_us())

    async def _differing(self, table: Table) -> AsyncIterator[Step]:
        async for versions in self._source.versions(table):
            sent = await self._ledger.sent(table, [id for id, _ in versions])
            missed = [
                id
                for id, version in versions
                if id not in sent or sent[id].gone or version not in (None, sent[id].version)
            ]
            if missed:
                yield Step(await self._source.rows(table, missed), observed_us=await self._source.now_us())

    async def _apply(self, table: Table, steps: AsyncIterator[Step]) -> int:
        """Send what is new of these steps, in their order; returns the events sent.

        While Kafka acknowledges a step, the next one is read and prepared. It is sent when the one before it is recorded
        and it is planned itself, which is one transaction. So never more than one step is on its way, and all of it is
        planned. Worth the more, the farther Kafka is (docs/PERFORMANCE.md).
        """
        total = 0
        way: _Prepared | None = None
        sending: asyncio.Task[Any] | None = None
        try:
            async for step in steps:
                # What is on its way is not recorded, but known.
                next_ = await self._prepared(table, step, {} if way is None else way.sent)
                if way is not None:
                    if sending is not None:
                        await sending
                    await self._record(table, way, next_)
                elif next_.sends:
                    await self._ledger.advance(table, {}, None, next_.events)
                sending = asyncio.create_task(self._publish(next_.sends)) if next_.sends else None
                way = next_
                total += len(next_.sends)
            if way is not None:
                if sending is not None:
                    await sending
                await self._record(table, way, None)
        finally:
            # Where the source or our database fails: what was planned is found by `_recover`, as after a crash.
            if sending is not None and not sending.done():
                sending.cancel()
                await asyncio.wait([sending])
        return total

    async def _prepared(self, table: Table, step: Step, under_way: Mapping[str, Sent]) -> "_Prepared":
        asked = [*(c.id for c in step.changes), *step.gone]
        known = await self._ledger.sent(table, asked) if asked else {}
        known |= {id: under_way[id] for id in asked if id in under_way}
        sends: list[Send] = []
        sent: dict[str, Sent] = {}
        for change in step.changes:
            before = known.get(change.id)
            if before is not None and before.version == change.version:
                continue
            key = str(change.fields.get(KEYS[table]) or "")
            order = after(change.order, None if before is None else before.order, step.observed_us)
            if before is not None and not before.gone and before.key not in ("", key):
                sends.append(gone_of(table, change.id, before, order))
            sends.append(send_of(table, change, order))
            at = change.fields.get("assigned_at")
            sent[change.id] = Sent(change.version, order, key, at if isinstance(at, int) else None)
        changed = len(sent)
        for id in step.gone:
            before = known.get(id)
            if before is not None and not before.gone:
                order = after((step.observed_us, step.observed_us), before.order, step.observed_us)
                if before.key:
                    sends.append(gone_of(table, id, before, order))
                sent[id] = Sent(GONE, order, before.key, step.observed_us)
        return _Prepared(self._placed(sends), sent, step.position, changed, len(step.changes))

    async def _record(self, table: Table, done: "_Prepared", next_: "_Prepared | None") -> None:
        planned = next_.events if next_ is not None and next_.sends else []
        if done.sent or done.position is not None or planned:
            await self._ledger.advance(table, done.sent, done.position, planned)
        metrics.EXTRACT_ROWS.labels(table, "sent").inc(done.changed)
        metrics.EXTRACT_ROWS.labels(table, "gone").inc(len(done.sent) - done.changed)
        metrics.EXTRACT_ROWS.labels(table, "known").inc(done.read - done.changed)

    async def _recover(self, table: Table) -> int:
        """Bring what a crash left half sent to what the source holds now."""
        pending = await self._ledger.pending(table)
        if not pending:
            return 0
        ids = list(dict.fromkeys(p.id for p in pending))
        rows: dict[str, Change] = {}
        for start in range(0, len(ids), STEP_ROWS):
            rows |= {c.id: c for c in await self._source.rows(table, ids[start : start + STEP_ROWS])}
        known = await self._ledger.sent(table, ids)
        now_us = await self._source.now_us()
        sends: list[Send] = []
        sent: dict[str, Sent] = {}
        for id in ids:
            told = [p.sent for p in pending if p.id == id]
            if id in known:
                told.insert(0, known[id])
            newest = max(told, key=lambda s: s.order)
            change = rows.get(id)
            if change is None:
                order = after((now_us, now_us), newest.order, now_us)
                sent[id] = Sent(GONE, order, newest.key, now_us)
                key = None
            else:
                key = str(change.fields.get(KEYS[table]) or "")
                same = newest.version == change.version and newest.key == key
                order = newest.order if same else after(change.order, newest.order, now_us)
                at = change.fields.get("assigned_at")
                sent[id] = Sent(change.version, order, key, at if isinstance(at, int) else None)
                sends.append(send_of(table, change, order))
            # Under every other key that may have been told of it, it is no more.
            others = {s.key: s for s in told if not s.gone and s.key not in ("", key)}
            sends += [gone_of(table, id, other, order) for other in others.values()]
        if sends:
            await self._ledger.advance(table, {}, None, [*pending, *(Pending(id, s) for id, s in sent.items())])
            await self._publish(self._placed(sends))
        await self._ledger.advance(table, sent, None, [])
        log.info("extract_recovered", table=table, rows=len(ids))
        return len(sends)

    def _placed(self, sends: Sequence[Send]) -> list[Send]:
        # Not by the publisher's cache of keys, which is for devices: files are too many, and each comes a few times.
        return [replace(s, partition=self._partition(s.key)) for s in sends]

    def _partition(self, key: bytes | None) -> int | None:
        return None if key is None else (int(murmur2(key)) & 0x7FFFFFFF) % self._partitions

    async def due(self, table: Table, reconcile_s: float) -> float:
        """Seconds until all keys of a table are to be compared; 0 where it is time."""
        _, at = await self._ledger.position(table)
        if at is None:
            return 0.0
        return max(0.0, reconcile_s - (datetime.now(UTC) - at).total_seconds())


class ExtractService(Service):
    """Runs an extractor for as long as the worker runs; whatever is down, it tries again."""

    def __init__(self, settings: Callable[[], Settings], publisher: Publisher, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._settings = settings
        self._publisher = publisher

    @Service.task
    async def _work(self) -> None:
        pause_s = BACKOFF_FIRST_S
        said = ""
        while not self.should_stop:
            try:
                await self._session()
                pause_s, said = BACKOFF_FIRST_S, ""
            except Exception as e:
                # Whatever it is, also a defect of ours: the stream does not stop for it.
                text = f"{type(e).__name__}: {e}"
                if text != said:
                    # PyMongo by its name: it is an extra.
                    expected = type(e).__module__.startswith("pymongo.") or isinstance(
                        e, SourceError | Retry | OSError | TimeoutError | asyncpg.PostgresError | asyncpg.InterfaceError
                    )
                    log.warning("extract_interrupted", error=text, exc_info=None if expected else e)
                said = text
                metrics.EXTRACT_LEADS.set(0)
                await self.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    async def _session(self) -> None:
        """One connection's life as follower and then leader: returns when it ends or the worker stops."""
        postgres = self._settings().postgres
        connection = await session(postgres, "extracting", command_timeout=postgres.command_timeout_s)
        source: Source | None = None
        try:
            while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", LEADER_LOCK_KEY):
                await self.sleep(FOLLOW_S)
                if self.should_stop:
                    return
            source = source_of(self._settings)
            await source.open()
            metrics.EXTRACT_LEADS.set(1)
            log.info("extract_leads", tables=list(source.tables))
            partitions = self._settings().kafka.partitions
            extractor = Extractor(source, Ledger(connection), self._publisher.publish, partitions=partitions)
            # The connection that holds the lock is the one that records: without the lock nothing is recorded.
            await self._lead(source, extractor)
        finally:
            metrics.EXTRACT_LEADS.set(0)
            if source is not None:
                await source.close()
            with suppress(
                asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError
            ):
                await connection.close(timeout=2)

    async def _lead(self, source: Source, extractor: Extractor) -> None:
        wait_s = self._settings().extract.interval_min_s
        woken = Woken()
        while not self.should_stop:
            s = self._settings().extract
            sent = await extractor.turn()
            for table, ids in woken.gone.items():
                sent += await extractor.gone(table, ids)
            due_s = s.interval_max_s
            for table in source.tables:
                if woken.overflow or await extractor.due(table, s.reconcile_s) <= 0:
                    sent += await extractor.reconcile(table)
                due_s = min(due_s, await extractor.due(table, s.reconcile_s))
            wait_s = s.interval_min_s if sent else min(s.interval_max_s, wait_s * 2)
            woken = await self._waited(source, max(0.01, min(wait_s, due_s)))
            if not self.should_stop:
                await self.sleep(SETTLE_S)

    async def _waited(self, source: Source, timeout_s: float) -> Woken:
        """What the source tells, or nothing where the worker stops meanwhile."""
        task = asyncio.ensure_future(source.wait(timeout_s))
        try:
            await self.wait_first(asyncio.wait([task]))
            return task.result() if task.done() else Woken()
        finally:
            # Also where this service's own task is cancelled.
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
