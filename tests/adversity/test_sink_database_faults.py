"""The sink while its database dies: whatever happens, every reading is stored once and offsets agree with rows."""

import asyncio
import contextlib
import random
from typing import Any

import asyncpg
import pytest
from sink_support import NOW_US, batch, fetch, live, message, migrated_database, record

from preservarium import topics
from preservarium.errors import Retry
from preservarium.stages.sink import ReadingSink
from preservarium.stores.timescale import TimescaleStore

T = topics.VALIDATED.name
#: The breaker must not slow the test down; its own tests are elsewhere.
QUICK = {"failures_max": 1000}


async def no_errors(sends: Any) -> None:
    raise AssertionError(sends)


def records(partition: int, start: int, end: int) -> list[Any]:
    return [
        record(i, message(f"p{partition}d{i % 9}", float(i), -float(i), at=NOW_US + i, offset=i))
        for i in range(start, end)
    ]


async def drive(stage: ReadingSink, partition: int, total: int, size: int, enough: asyncio.Event | None = None) -> int:
    """What the feed does: batches in order, each until it is stored. Returns how many tries failed."""
    failures = 0
    position = (await settle(stage, partition))[partition]
    while position < total and not (enough is not None and enough.is_set()):
        part = [batch(T, partition, records(partition, position, min(total, position + size)))]
        try:
            await stage(part)
            position = part[0].records[-1].offset + 1
        except Retry:
            failures += 1
            await asyncio.sleep(0.005)
            position = (await settle(stage, partition))[partition]
    return failures


async def settle(stage: ReadingSink, partition: int) -> dict[int, int]:
    while True:
        try:
            return await stage.on_assigned([partition])
        except Retry:
            await asyncio.sleep(0.02)


async def check(dsn: str, partitions: int, total: int) -> None:
    rows = await fetch(
        dsn,
        "SELECT count(*), sum(value), sum(abs(value)), count(DISTINCT (device_id, timestamp, pin_position)) FROM iot_measurements",
    )
    count = partitions * total * 2
    assert tuple(rows[0]) == (count, 0.0, partitions * total * (total - 1.0), count)
    offsets = await fetch(dsn, "SELECT partition, next_offset FROM sink_offsets ORDER BY 1")
    assert [tuple(r) for r in offsets] == [(p, total) for p in range(partitions)]
    stale = await fetch(
        dsn,
        "SELECT count(*) FROM latest l JOIN (SELECT series_id, max(timestamp) AS t FROM measurements GROUP BY 1) m"
        " USING (series_id) WHERE l.timestamp <> m.t",
    )
    assert stale[0][0] == 0


async def test_connections_killed_at_random_points(dsn, postgres):
    total, partitions = 1500, 3
    store = TimescaleStore(live(postgres={"url": dsn}, sink={"rows_max": 100}, breaker=QUICK))
    stage = ReadingSink("sink", T, store, no_errors, live(sink={"rows_max": 100}))
    rng = random.Random(11)
    killed = 0
    done = asyncio.Event()

    async def kill() -> None:
        nonlocal killed
        connection = await asyncpg.connect(postgres)
        # Bounded: on a slow machine no connection would ever live long enough for a write.
        while not done.is_set() and killed < 300:
            await asyncio.sleep(rng.uniform(0.001, 0.02))
            killed += await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'preservarium-sink'"
                " AND random() < 0.7"
            )
        await connection.close()

    killer = asyncio.create_task(kill())
    failures = await asyncio.gather(*(drive(stage, p, total, 100) for p in range(partitions)))
    done.set()
    await killer
    await store.close()
    # A slow machine makes fewer connections, and fewer of them die with a write under way; some must.
    assert killed > 20
    assert sum(failures) > 2
    await check(dsn, partitions, total)


@pytest.mark.parametrize("statement", ["begin", "advance", "copy", "commit_before", "commit_after"])
async def test_connection_lost_at_every_statement(dsn, postgres, monkeypatch, statement):
    """Deterministic: the backend is ended right before or after one statement of the transaction, again and again."""
    total = 400
    store = TimescaleStore(live(postgres={"url": dsn}, breaker=QUICK))
    stage = ReadingSink("sink", T, store, no_errors, live())
    admin = await asyncpg.connect(postgres)
    countdown = {"left": 0}

    async def end(connection: Any) -> None:
        countdown["left"] -= 1
        if countdown["left"] % 2 == 0:
            await admin.execute("SELECT pg_terminate_backend($1, 2000)", connection.get_server_pid())

    from asyncpg.transaction import Transaction

    from preservarium.stores import timescale

    if statement == "begin":
        start = Transaction.start

        async def begin(self: Any) -> None:
            await end(self._connection)
            await start(self)

        monkeypatch.setattr(Transaction, "start", begin)
    elif statement.startswith("commit"):
        leave = Transaction.__aexit__

        async def around(self: Any, kind: Any, *rest: Any) -> None:
            connection, outermost = self._connection, not self._nested
            if statement == "commit_before" and outermost and kind is None:
                await end(connection)
            await leave(self, kind, *rest)
            if statement == "commit_after" and outermost and kind is None:
                await end(connection)
                await connection.execute("SELECT 1")  # as if the answer had been lost

        monkeypatch.setattr(Transaction, "__aexit__", around)
    elif statement == "copy":
        copy = timescale._copy

        async def ended(connection: Any, *args: Any) -> None:
            await end(connection)
            await copy(connection, *args)

        monkeypatch.setattr(timescale, "_copy", ended)
    else:
        advance = TimescaleStore._advance

        async def after(self: Any, connection: Any, *args: Any) -> Any:
            result = await advance(self, connection, *args)
            await end(connection)
            return result

        monkeypatch.setattr(TimescaleStore, "_advance", after)
    failures = await drive(stage, 0, total, 20)
    monkeypatch.undo()
    await admin.close()
    await store.close()
    assert failures >= 10
    await check(dsn, 1, total)


async def test_the_database_is_restarted_under_load(postgres_service, postgres):
    if postgres != postgres_service.dsn():
        pytest.skip("missing: an embedded PostgreSQL that may be restarted")
    with migrated_database(postgres) as dsn:
        partitions = 2
        store = TimescaleStore(live(postgres={"url": dsn, "connect_timeout_s": 2}, breaker=QUICK))
        stage = ReadingSink("sink", T, store, no_errors, live())
        enough = asyncio.Event()
        tasks = [asyncio.create_task(drive(stage, p, 10**9, 50, enough)) for p in range(partitions)]
        for how in (postgres_service.stop, postgres_service.kill):
            await asyncio.sleep(0.3)
            try:
                await asyncio.to_thread(how)
                await asyncio.sleep(0.3)
            finally:
                await asyncio.to_thread(postgres_service.start)
        enough.set()
        assert min(await asyncio.gather(*tasks)) >= 2, "each met both ends"
        total = 50 + max([(await settle(stage, p))[p] for p in range(partitions)])
        await asyncio.gather(*(drive(stage, p, total, 50) for p in range(partitions)))
        await store.close()
        await check(dsn, partitions, total)


async def test_two_workers_that_both_believe_they_own_a_partition(dsn):
    """A worker that was paused too long wakes up: both go on, neither stores anything twice or leaves a gap."""
    total = 600
    stores = [TimescaleStore(live(postgres={"url": dsn}, breaker=QUICK)) for _ in range(2)]
    stages = [ReadingSink("sink", T, s, no_errors, live()) for s in stores]
    await asyncio.gather(drive(stages[0], 0, total, 7), drive(stages[1], 0, total, 11))
    for s in stores:
        await s.close()
    await check(dsn, 1, total)


async def test_a_frozen_transaction_is_given_up_and_its_connection_not_reused(dsn):
    settings = live(postgres={"url": dsn, "command_timeout_s": 0.3}, breaker=QUICK)
    store = TimescaleStore(settings)
    stage = ReadingSink("sink", T, store, no_errors, settings)
    await drive(stage, 0, 10, 10)
    blocker = await asyncpg.connect(dsn)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("UPDATE sink_offsets SET updated_at = now()")  # holds the row that the sink must move
    with pytest.raises(Retry):
        await stage([batch(T, 0, records(0, 10, 20))])
    await transaction.rollback()
    await blocker.close()
    await drive(stage, 0, 20, 10)
    await store.close()
    await check(dsn, 1, 20)


async def test_a_write_that_is_cancelled_leaves_nothing_half_done(dsn):
    settings = live(postgres={"url": dsn}, breaker=QUICK)
    store = TimescaleStore(settings)
    stage = ReadingSink("sink", T, store, no_errors, settings)
    rng = random.Random(4)
    for _ in range(40):
        task = asyncio.create_task(drive(stage, 0, 2000, 100))
        await asyncio.sleep(rng.uniform(0, 0.03))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await drive(stage, 0, 2000, 100)
    await store.close()
    await check(dsn, 1, 2000)
