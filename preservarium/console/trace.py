"""`/api/trace`: where a stored reading comes from, or what became of a raw record, as JSON. For those who may read."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

import asyncpg
from aiohttp import web

from preservarium.breaker import Breaker
from preservarium.console.host import Host
from preservarium.console.replies import answer, bad, missing, text_of, wrapped
from preservarium.domain.readings.instant import instant_us
from preservarium.errors import Retry, reason
from preservarium.operations.raw_records import RecordsError
from preservarium.operations.trace import Point, TraceError, Tracer
from preservarium.serving.rights import Right
from preservarium.stores.clickhouse import ClickHouseStore
from preservarium.stores.connections import Pool

#: Traces that are made at once: each has a connection to the database and one to Kafka of its own for a moment.
TRACES_MAX: Final = 2
#: A trace asks for a dozen things, most of them in turn.
TIMEOUT_S: Final = 15.0
#: One statement of it.
STATEMENT_TIMEOUT_S: Final = 5.0


class Owner(Host, Protocol):
    """The app, which also closes what these views open."""

    def resource(self, closable: Any) -> Any:
        """Close it when the worker has stopped, last first."""
        ...


class _Reads:
    """A pool of its own: a trace is seldom, and must hold up neither the sink nor the pages."""

    def __init__(self, host: Host) -> None:
        self._pool = Pool(
            lambda: host.live().postgres.dsn,
            connections_max=lambda: TRACES_MAX,
            connect_timeout_s=lambda: host.live().postgres.connect_timeout_s,
            command_timeout_s=lambda: STATEMENT_TIMEOUT_S,
            server_settings={
                "application_name": "preservarium-trace",
                "default_transaction_read_only": "on",
                "timezone": "UTC",
            },
        )

    def acquire(self) -> Any:
        """A connection, for a while."""
        return self._pool.acquire()

    async def close(self) -> None:
        """Give the connections back."""
        self._pool.terminate()


class TraceViews:
    """The view of one worker."""

    def __init__(self, host: Owner) -> None:
        self._host = host
        live = host.live
        self._reads = host.resource(_Reads(host))
        self._clickhouse = host.resource(
            ClickHouseStore(
                live,
                breaker=Breaker("clickhouse-trace", lambda: live().breaker, clock=host.clock, server="clickhouse"),
                clock=host.clock,
            )
        )
        self._turns = asyncio.Semaphore(TRACES_MAX)

    def mount(self, application: web.Application) -> None:
        """Add the route to an aiohttp application that has not started."""
        application.router.add_get("/api/trace", wrapped(self.trace, Right.READ, self._host.live, timeout_s=TIMEOUT_S))

    async def trace(self, request: web.Request) -> web.Response:
        """`?device=…&type=…&at=…` with `pin` and `mode` where several series are meant; or `?raw=PARTITION:OFFSET[:LINE]`."""
        raw = text_of(request, "raw")
        if raw:
            partition, offset, line = _coordinates(raw)
            return await self._answer(lambda tracer: tracer.forward(partition, offset, line))
        device, component_type, at = (text_of(request, name) for name in ("device", "type", "at"))
        if not device or not component_type or not at:
            bad("name a reading by device, type and at, or a raw record by raw")
        at_us = instant_us(at)
        if at_us is None:
            bad("at is an instant: µs since the epoch, or ISO 8601")
        point = Point(device, component_type, at_us, text_of(request, "pin") or None, text_of(request, "mode") or None)
        return await self._answer(lambda tracer: tracer.reading(point))

    async def _answer(self, ask: Callable[[Tracer], Awaitable[dict[str, Any]]]) -> web.Response:
        try:
            return await self._ask(ask)
        except RecordsError as e:
            raise Retry(str(e)) from e
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as e:
            # OSError includes TimeoutError.
            message = f"PostgreSQL: {reason(e)}"
            raise Retry(message) from e

    async def _ask(self, ask: Callable[[Tracer], Awaitable[dict[str, Any]]]) -> web.Response:
        settings = self._host.live()
        clickhouse = self._clickhouse if settings.clickhouse.enabled else None
        async with self._turns, self._reads.acquire() as connection:
            tracer = Tracer(settings, connection, clickhouse)
            try:
                return answer(await ask(tracer))
            except TraceError as e:
                missing(str(e))
            finally:
                await tracer.close()


def _coordinates(text: str) -> tuple[int, int, int | None]:
    parts = text.split(":")
    if not 2 <= len(parts) <= 3 or not all(part.isascii() and part.isdigit() and len(part) <= 18 for part in parts):
        bad("raw is PARTITION:OFFSET or PARTITION:OFFSET:LINE")
    numbers = [int(part) for part in parts]
    if numbers[0] >= 2**31 or (len(numbers) == 3 and numbers[2] >= 2**31):
        bad("raw names no partition that Kafka can have")
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None
