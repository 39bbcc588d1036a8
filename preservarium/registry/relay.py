"""The relay: outbox rows of the registry become Kafka records, in order, each at least once.

It runs in every worker; a PostgreSQL advisory lock makes one of them the leader. LISTEN/NOTIFY wakes it when a change
commits, a poll catches what a lost notice would not. A row is marked sent only after Kafka has acknowledged it, so a
crash in between sends it again: consumers skip what is not newer than what they have (`rev`).
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import asyncpg
import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from mode import Service

from preservarium import metrics
from preservarium.settings import Settings
from preservarium.stores.connections import session
from preservarium.streaming import kafka_clients
from preservarium.streaming.topics_admin import RECORD_OVERHEAD_BYTES

log = structlog.get_logger(__name__)

#: Channel that migrations/postgres/0001_registry.sql notifies.
CHANNEL: Final = "registry_outbox"
#: Session advisory lock of the leader.
LEADER_LOCK_KEY: Final = 0x5052_4553_524C  # "PRESRL"
#: Records under way at once. Their sum stays below the memory of a worker at the largest document.
BATCH_ROWS: Final = 200
#: A look at the outbox without a notice: how late a change can be where the notice was lost.
POLL_S: Final = 2.0
#: How long the others wait before they ask for the lock again: the longest gap when a leader dies.
FOLLOW_S: Final = 3.0
#: Kafka must acknowledge a batch within this time, or it is sent again.
ACK_TIMEOUT_S: Final = 30.0
#: Sent rows are kept so long, for people who ask what was sent.
KEEP_DAYS: Final = 7
PRUNE_EVERY_S: Final = 3_600.0
BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 10.0

#: The header that carries a record's revision: a tombstone has no value to hold it.
REV_HEADER: Final = "rev"

_LOST: Final = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    KafkaError,
)


class Relay:
    """Moves rows from the outbox to Kafka. Not safe for use by two tasks at once."""

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._producer: Any = None

    async def try_lead(self, connection: Any) -> bool:
        """Take the leader's lock on this connection if it is free."""
        return bool(await connection.fetchval("SELECT pg_try_advisory_lock($1)", LEADER_LOCK_KEY))

    async def resign(self, connection: Any) -> None:
        """Give the lock back."""
        await connection.execute("SELECT pg_advisory_unlock($1)", LEADER_LOCK_KEY)

    async def drain(self, connection: Any) -> int:
        """Send everything that is unsent; returns the number of records. Only for the leader.

        Raises:
            KafkaError, TimeoutError: not acknowledged; the rows stay unsent.
            asyncpg.PostgresError, OSError: the database is gone; rows that were acknowledged are sent again later.
        """
        total = 0
        while True:
            rows = await connection.fetch(
                "SELECT id, topic, key, value, rev FROM registry_outbox WHERE sent_at IS NULL ORDER BY id LIMIT $1",
                BATCH_ROWS,
            )
            if not rows:
                metrics.REGISTRY_OUTBOX.set(0)
                return total
            metrics.REGISTRY_OUTBOX.set(len(rows))
            await self._send(rows)
            await connection.execute(
                "UPDATE registry_outbox SET sent_at = clock_timestamp() WHERE id = ANY ($1::bigint[])",
                [r["id"] for r in rows],
            )
            metrics.REGISTRY_RELAYED.inc(len(rows))
            total += len(rows)

    async def _send(self, rows: Sequence[Any]) -> None:
        prefix = self._settings().kafka.topic_prefix
        try:
            producer = await self._started()
            async with asyncio.timeout(ACK_TIMEOUT_S):
                acknowledged = [
                    await producer.send(
                        prefix + row["topic"],
                        value=row["value"],
                        key=row["key"],
                        headers=[(REV_HEADER, b"%d" % row["rev"])],
                    )
                    for row in rows
                ]
                await asyncio.gather(*acknowledged)
        except BaseException:
            # An idempotent producer may be unusable after an error; the next batch gets a new one.
            await self.close()
            raise

    async def _started(self) -> Any:
        if self._producer is None:
            kafka = self._settings().kafka
            producer = AIOKafkaProducer(
                **kafka_clients.connection(kafka),
                client_id="preservarium-registry-relay",
                acks="all",
                enable_idempotence=True,
                compression_type=None if kafka.compression == "none" else kafka.compression,
                max_request_size=kafka.record_bytes_max + RECORD_OVERHEAD_BYTES,
                request_timeout_ms=int(ACK_TIMEOUT_S * 1_000),
            )
            try:
                await producer.start()
            except BaseException:
                await kafka_clients.stop(producer)
                raise
            self._producer = producer
        return self._producer

    async def prune(self, connection: Any) -> None:
        """Remove rows that were sent long ago."""
        await connection.execute(
            "DELETE FROM registry_outbox WHERE sent_at < clock_timestamp() - make_interval(days => $1)", KEEP_DAYS
        )

    async def close(self) -> None:
        """Close the producer. The relay can be used again."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await kafka_clients.stop(producer, 5)


class RelayService(Service):
    """Runs a relay for as long as the worker runs; whatever is down, it tries again."""

    def __init__(self, settings: Callable[[], Settings], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._settings = settings
        self._relay = Relay(settings)

    @Service.task
    async def _work(self) -> None:
        pause_s = BACKOFF_FIRST_S
        healthy = True
        while not self.should_stop:
            try:
                await self._session()
                pause_s = BACKOFF_FIRST_S
                healthy = True
            except Exception as e:
                # Whatever it is, also a defect of ours: people's edits wait, the stream does not stop for them.
                if not isinstance(e, _LOST):
                    log.exception("registry relay failed")
                elif healthy:
                    log.warning("registry relay interrupted", error=f"{type(e).__name__}: {e}")
                healthy = False
                await self.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    async def _session(self) -> None:
        """One connection's life: returns when it ends or the worker stops."""
        postgres = self._settings().postgres
        connection = await session(
            postgres, "relaying changes of the registry", command_timeout=postgres.command_timeout_s
        )
        woken = asyncio.Event()
        try:

            def wake(*_: object) -> None:
                woken.set()

            connection.add_termination_listener(wake)
            await connection.add_listener(CHANNEL, wake)
            leader = False
            pruned_at = 0.0
            loop = asyncio.get_running_loop()
            while not self.should_stop and not connection.is_closed():
                woken.clear()
                if not leader and await self._relay.try_lead(connection):
                    leader = True
                    log.info("registry relay leads")
                if leader:
                    await self._relay.drain(connection)
                    if loop.time() - pruned_at > PRUNE_EVERY_S:
                        await self._relay.prune(connection)
                        pruned_at = loop.time()
                await self._wait(woken, POLL_S if leader else FOLLOW_S)
        finally:
            await self._relay.close()
            with suppress(*_LOST):
                await connection.close(timeout=2)

    async def _wait(self, woken: asyncio.Event, timeout_s: float) -> None:
        await self.wait_first(woken.wait(), timeout=timeout_s)

    async def on_stop(self) -> None:
        """Close the producer."""
        await self._relay.close()
