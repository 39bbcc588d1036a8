"""What goes over the wire to ClickHouse: few connections, compressed, each insert answered for what it stored, in bounded time."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import pytest
from aiohttp import web
from sink_support import NOW_US, batch, live, message, record

from preservarium import topics
from preservarium.breaker import State
from preservarium.clock import ManualClock
from preservarium.errors import Retry
from preservarium.stages.sync import ReadingSync
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.migrate import migrate_clickhouse

T = topics.VALIDATED.name


class Proxy:
    """Passes requests on to the engine and writes down what it saw; may hold answers or refuse."""

    def __init__(self, url: str) -> None:
        self.target = url
        self.requests: list[tuple[dict[str, str], dict[str, str]]] = []  # query string, headers
        self.peers: set[Any] = set()
        self.under_way = 0
        self.under_way_max = 0
        self.hold_s = 0.0
        self.status = 0  #: answer with this instead of asking

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((dict(request.query), dict(request.headers)))
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        self.under_way += 1
        self.under_way_max = max(self.under_way_max, self.under_way)
        try:
            body = await request.read()
            await asyncio.sleep(self.hold_s)
            if self.status:
                return web.Response(
                    status=self.status, text="Code: 241. DB::Exception: Memory limit (MEMORY_LIMIT_EXCEEDED)"
                )
            headers = {
                k: v
                for k, v in request.headers.items()
                if k.lower() not in ("host", "content-length", "transfer-encoding")
            }
            async with (
                aiohttp.ClientSession(auto_decompress=False) as session,
                session.request(request.method, self.target + request.path_qs, data=body, headers=headers) as answer,
            ):
                kept = {
                    k: v for k, v in answer.headers.items() if k.lower() not in ("content-length", "transfer-encoding")
                }
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
        finally:
            self.under_way -= 1


@pytest.fixture
async def proxy(clickhouse: str) -> AsyncIterator[Proxy]:
    u = urlsplit(clickhouse)
    made = Proxy(f"http://{u.hostname}:{u.port}")
    application = web.Application(client_max_size=2**30)
    application.router.add_route("*", "/{path:.*}", made.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    made.url = urlunsplit(u._replace(netloc=f"{u.username}:{u.password}@127.0.0.1:{port}"))  # type: ignore[attr-defined]
    yield made
    await runner.cleanup()


def settings_of(proxy: Any, clickhouse_database: str, **breaker: Any) -> Any:
    return live(
        clickhouse={"url": proxy.url, "database": clickhouse_database, "pool_max": 3, "timeout_s": 1.5},
        breaker={"failures_max": 2, "open_s": 10.0} | breaker,
    )


async def insert(stage: ReadingSync, partition: int) -> None:
    await stage(
        [batch(T, partition, [record(0, message(f"d{partition}", 1.0, 2.0, at=NOW_US, raw_partition=partition))])]
    )


async def test_inserts_share_few_connections_and_are_compressed_and_synchronous(proxy, clickhouse, clickhouse_database):
    await migrate_clickhouse(live(clickhouse={"url": clickhouse, "database": clickhouse_database})())
    settings = settings_of(proxy, clickhouse_database)
    store = ClickHouseStore(settings)
    stage = ReadingSync(store, settings)
    proxy.hold_s = 0.05
    for _ in range(3):
        await asyncio.gather(*(insert(stage, partition) for partition in range(12)))
    assert (await store.query("SELECT count() FROM measurements"))[0][0] == 24
    assert proxy.under_way_max == 3
    assert len(proxy.peers) == 3
    inserts = [(query, headers) for query, headers in proxy.requests if "insert_deduplication_token" in query]
    assert len(inserts) >= 12
    assert {q["async_insert"] for q, _ in inserts} == {"0"}
    assert {q["deduplicate_blocks_in_dependent_materialized_views"] for q, _ in inserts} == {"1"}
    assert {h.get("Content-Encoding") for _, h in inserts} == {"lz4"}
    # The last request was the query: its answer may be compressed, too.
    assert "lz4" in proxy.requests[-1][1]["Accept-Encoding"]
    await store.close()


class Column(list[Any]):
    """A list that can be followed."""


async def test_rows_are_free_when_they_are_stored_without_the_cycle_collector(clickhouse, clickhouse_database):
    settings = live(clickhouse={"url": clickhouse, "database": clickhouse_database})
    store = ClickHouseStore(settings)
    await store.query("SELECT 1")
    await store._client.command("CREATE TABLE t (a UInt64, b String) ENGINE = MergeTree ORDER BY a")

    async def stored() -> list[weakref.ref[Column]]:
        columns = {"a": Column(range(100)), "b": Column("x" * 100)}
        await store.insert("t", columns, {"a": "UInt64", "b": "String"}, token="t")
        return [weakref.ref(column) for column in columns.values()]

    gc.disable()
    try:
        alive = [column() for column in await stored()]
    finally:
        gc.enable()
    assert alive == [None, None]
    assert (await store.query("SELECT count(), max(a), any(b) FROM t"))[0] == (100, 99, "x")
    await store.close()


async def test_a_server_that_does_not_answer_is_given_up_in_time(proxy, clickhouse, clickhouse_database):
    await migrate_clickhouse(live(clickhouse={"url": clickhouse, "database": clickhouse_database})())
    settings = settings_of(proxy, clickhouse_database)
    store = ClickHouseStore(settings)
    stage = ReadingSync(store, settings)
    await insert(stage, 0)
    proxy.hold_s = 60.0
    async with asyncio.timeout(8):
        with pytest.raises(Retry):
            await insert(stage, 1)
    proxy.hold_s = 0.0
    await insert(stage, 1)
    assert (await store.query("SELECT count() FROM measurements"))[0][0] == 4
    await store.close()


async def test_a_server_that_refuses_opens_the_breaker_and_is_left_alone_until_it_may_be_tried(
    proxy, clickhouse, clickhouse_database
):
    await migrate_clickhouse(live(clickhouse={"url": clickhouse, "database": clickhouse_database})())
    settings = settings_of(proxy, clickhouse_database)
    clock = ManualClock(NOW_US)
    store = ClickHouseStore(settings, clock=clock)
    stage = ReadingSync(store, settings, clock=clock)
    await insert(stage, 0)
    proxy.status = 500
    for _ in range(2):
        with pytest.raises(Retry):
            await insert(stage, 1)
    assert store.breaker.state is State.OPEN
    asked = len(proxy.requests)
    for _ in range(5):
        with pytest.raises(Retry):
            await insert(stage, 1)
    assert len(proxy.requests) == asked
    proxy.status = 0
    clock.advance(20)
    await insert(stage, 1)
    assert store.breaker.state is State.CLOSED
    assert (await store.query("SELECT count() FROM measurements"))[0][0] == 4
    await store.close()
