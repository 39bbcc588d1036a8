"""Through a real PgBouncer: what works through a pooler in transaction mode, and what is refused in a sentence."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pooler_support import pgbouncer
from sink_support import NOW_US, execute, fetch, live, message, migrated_database

from preservarium.cli.doctor import State, check_postgres
from preservarium.embedded.service import free_port
from preservarium.errors import Retry
from preservarium.extract.named import SourceError
from preservarium.extract.postgres import PostgresSource
from preservarium.registry.device_lookup import DeviceLookup
from preservarium.registry.relay import RelayService
from preservarium.stores import connections
from preservarium.stores.base import Move
from preservarium.stores.connections import Link, NeedsSession, look, session
from preservarium.stores.device_reads import DeviceReads
from preservarium.stores.event_tables import EventStore
from preservarium.stores.migrate.files import MigrationError
from preservarium.stores.migrate.postgres import connect_postgres
from preservarium.stores.tables import ALARM_EVENTS
from preservarium.stores.timescale import TimescaleStore
from preservarium.stores.views import Views

T = "iot_validated_data"


@pytest.fixture(scope="module")
def dsn(postgres: str) -> Iterator[str]:
    with migrated_database(postgres) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    connections.forget()
    yield
    connections.forget()


@pytest.fixture
async def empty(dsn: str) -> str:
    await execute(dsn, "TRUNCATE measurements, latest, series, derivations, sink_offsets, alarm_events, alarms CASCADE")
    return dsn


#: What a pooler may be set to: one connection for all, some, and those handed out in turn.
POOLS: list[dict[str, Any]] = [
    {"default_pool_size": 1},
    {"default_pool_size": 4},
    {"default_pool_size": 4, "server_round_robin": 1},
    {"default_pool_size": 4, "server_reset_query_always": 1},
]


@pytest.mark.parametrize("settings", POOLS)
async def test_what_stands_before_the_server_is_seen(tmp_path: Path, dsn: str, settings: dict[str, Any]):
    assert await look(dsn, timeout=10) is Link.DIRECT
    with pgbouncer(tmp_path, dsn, "transaction", **settings) as pooled:
        # Others use it, too, so that it has several connections.
        others = [await asyncpg.connect(pooled, statement_cache_size=0) for _ in range(3)]
        await asyncio.gather(*(one.execute("SELECT pg_sleep(0.05)") for one in others))
        assert await look(pooled, timeout=10) is Link.TRANSACTION
        for one in others:
            await one.close()
    connections.forget()
    if settings["default_pool_size"] > 1:
        with pgbouncer(tmp_path, dsn, "session", **settings) as pooled:
            assert await look(pooled, timeout=10) is Link.SESSION


@pytest.mark.parametrize(("mode", "settings"), [*(("transaction", one) for one in POOLS), ("session", POOLS[1])])
async def test_rows_are_stored_exactly_once_without_an_error(
    tmp_path: Path, empty: str, mode: str, settings: dict[str, Any]
):
    with pgbouncer(tmp_path, empty, mode, **settings) as pooled:
        stores = [
            TimescaleStore(live(postgres={"url": pooled, "pool_max": 1 if mode == "session" else 3}), sink=f"sink-{n}")
            for n in range(2)
        ]
        try:

            async def write(n: int) -> int:
                stored = 0
                for turn in range(15):
                    many = [message(f"d{i}-{n}", float(turn), at=NOW_US + turn * 1_000_000 + i) for i in range(20)]
                    move = Move(None if turn == 0 else turn, turn + 1)
                    stored += (await stores[n].write(many, {(T, n): move})).accepted
                    # The same once more, and corrected: through the temporary table.
                    again = await stores[n].write(many[:5], {})
                    assert (again.accepted, again.duplicates) == (0, 5)
                return stored

            assert await asyncio.gather(write(0), write(1)) == [300, 300]
            assert await stores[0].offsets(T, [0]) == {0: 15}
            await stores[1].maintain()
        finally:
            for store in stores:
                await store.close()
        # A store tries nothing again by itself: what fails is raised here.
        assert [store.breaker.state.name for store in stores] == ["CLOSED"] * 2
    assert (await fetch(empty, "SELECT count(*), count(DISTINCT (series_id, timestamp)) FROM measurements"))[0][:] == (
        600,
        600,
    )


async def test_taken_for_a_direct_connection_it_would_fail(tmp_path: Path, empty: str):
    """That the tests above could fail: what a pooler in transaction mode does to statements that are remembered."""
    with pgbouncer(tmp_path, empty, "transaction", default_pool_size=4, server_round_robin=1) as pooled:
        connections._found[pooled] = Link.DIRECT
        store = TimescaleStore(live(postgres={"url": pooled}))

        async def write(n: int) -> None:
            for turn in range(15):
                await store.write([message(f"d{n}", float(turn), at=NOW_US + turn)], {})

        failed = await asyncio.gather(*(write(n) for n in range(4)), return_exceptions=True)
        assert any(isinstance(one, Retry) for one in failed), failed
        await store.close()


async def test_what_the_database_refuses_is_bisected_to_the_row(tmp_path: Path, empty: str):
    await execute(empty, "ALTER TABLE measurements ADD CONSTRAINT no_thirteen CHECK (value <> 13)")
    try:
        with pgbouncer(tmp_path, empty, "transaction") as pooled:
            store = TimescaleStore(live(postgres={"url": pooled}))
            bad = {7, 8, 150}
            many = [message(f"d{i % 9}", 13.0 if i in bad else 1.0, at=NOW_US + i, offset=i) for i in range(200)]
            result = await store.write(many, {(T, 0): Move(None, 200)})
            assert {r.message for r in result.rejected} == bad
            assert result.accepted == 197
            # Nothing of an attempt that failed stays, and a moved offset is seen.
            with pytest.raises(Exception, match=r".*") as moved:
                await store.write(many[:1], {(T, 0): Move(5, 6)})
            assert type(moved.value).__name__ == "Moved"
            assert await store.offsets(T, [0]) == {0: 200}
            await store.close()
    finally:
        await execute(empty, "ALTER TABLE measurements DROP CONSTRAINT no_thirteen")


async def test_a_pooler_that_ends_its_connections_costs_a_retry_and_no_row(tmp_path: Path, empty: str):
    with pgbouncer(tmp_path, empty, "transaction") as pooled:
        store = TimescaleStore(live(postgres={"url": pooled}))
        await store.write([message("a", 1.0)], {(T, 0): Move(None, 1)})
        await execute(
            empty,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        for _ in range(10):
            try:
                await store.write([message("a", 2.0, at=NOW_US + 1)], {(T, 0): Move(1, 2)})
                break
            except Exception:
                await asyncio.sleep(0.2)
        assert await store.offsets(T, [0]) == {0: 2}
        await store.close()
    assert (await fetch(empty, "SELECT count(*) FROM measurements"))[0][0] == 2


async def test_pages_the_registry_and_events_work_through_it(tmp_path: Path, empty: str):
    with pgbouncer(tmp_path, empty, "transaction") as pooled:
        settings = live(postgres={"url": pooled})
        views, lookup = Views(lambda: settings().postgres), DeviceLookup(lambda _p, _k: None, settings)
        reads = DeviceReads(settings)
        events = EventStore(ALARM_EVENTS, settings, sink="sink-alarms")
        try:
            found = await asyncio.gather(*(reads.devices(limit=10) for _ in range(8)))
            assert all(one["devices"] == [] for one in found)
            assert (await views.alarms(active=None, before=None, limit=10))["alarms"] == []
            async with views._pool.acquire() as connection:
                assert await connection.fetchval("SHOW timezone") == "UTC"
                assert await connection.fetchval("SHOW transaction_read_only") == "on"
            assert await asyncio.gather(*(lookup.lookup(0, f"d{n}") for n in range(8))) == [None] * 8
            assert lookup._breaker.state.name == "CLOSED"
            assert await events.offsets("iot_alerts", [0, 1]) == {0: None, 1: None}
            await events.prune()
        finally:
            await views.close()
            await reads.close()
            await lookup.close()
            await events.close()
    # Nothing of a transaction stays with the server's connection.
    assert (await fetch(empty, "SELECT count(*) FROM pg_class WHERE relname = 'sink_staging'"))[0][0] == 0


async def test_what_needs_a_session_is_refused_in_a_sentence_or_goes_to_the_server(tmp_path: Path, dsn: str):
    sentence = (
        "needs a session of its own, and this is a pooler in transaction mode: set PRESERVARIUM_POSTGRES__DIRECT_URL"
    )
    with pgbouncer(tmp_path, dsn, "transaction") as pooled:
        settings = live(postgres={"url": pooled}, extract={"url": pooled})
        with pytest.raises(MigrationError, match=sentence):
            await connect_postgres(settings(), wait_s=30.0)
        with pytest.raises(NeedsSession, match=f"relaying changes of the registry {sentence}"):
            await RelayService(settings)._session()
        with pytest.raises(SourceError, match="EXTRACT__URL leads to a pooler in transaction mode"):
            await PostgresSource(settings)._connect()
        both = live(postgres={"url": pooled, "direct_url": dsn})
        connection = await session(both().postgres, "this")
        assert connection.get_server_pid() == await connection.fetchval("SELECT pg_backend_pid()")
        await connection.close()
        with pytest.raises(NeedsSession, match="leads to a pooler in transaction mode, too"):
            await session(live(postgres={"url": dsn, "direct_url": pooled})().postgres, "this")


@pytest.mark.parametrize(
    ("url", "direct", "state", "words"),
    [
        ("dsn", "", State.GREEN, "reached directly"),
        ("session", "", State.GREEN, "through a pooler in session mode"),
        ("transaction", "", State.YELLOW, "through a pooler in transaction mode"),
        ("transaction", "dsn", State.GREEN, "through a pooler in transaction mode; sessions directly"),
        ("transaction", "transaction", State.RED, "through a pooler in transaction mode"),
        ("transaction", "nowhere", State.RED, "through a pooler in transaction mode"),
    ],
)
async def test_the_doctor_says_what_stands_there(
    tmp_path: Path, dsn: str, url: str, direct: str, state: State, words: str
):
    with pgbouncer(tmp_path, dsn, "transaction") as transaction, pgbouncer(tmp_path, dsn, "session") as in_session:
        known = {
            "dsn": dsn, "session": in_session, "transaction": transaction, "": "",
            "nowhere": f"postgresql://a:b@127.0.0.1:{free_port()}/c",
        }  # fmt: skip
        findings = await check_postgres(live(postgres={"url": known[url], "direct_url": known[direct]})())
        (finding,) = (one for one in findings if one.name == "pooler")
        assert (finding.state, words in finding.found) == (state, True), finding
        if state is not State.GREEN:
            assert "POSTGRES__DIRECT_URL" in finding.advice


async def test_on_a_direct_connection_statements_are_remembered_and_a_use_is_no_transaction(dsn: str):
    store = TimescaleStore(live(postgres={"url": dsn}))
    async with store._pool.acquire() as connection:
        assert not connection.is_in_transaction()
        await connection.fetchval("SELECT 1 + $1::int", 1)
        names = await connection.fetch("SELECT name FROM pg_prepared_statements")
        assert names
    await store.close()
