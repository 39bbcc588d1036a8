"""Finding a device: its worker's RocksDB table first, one database query as the net for one registered a moment ago.

In the steady state no message causes a query; a database that is down makes unknown what is not in the table, and
stops nothing.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, cast

import asyncpg
import orjson
import structlog
from cachetools import TTLCache

from preservarium import metrics
from preservarium.catalogue import Catalogue
from preservarium.clock import Clock, SystemClock
from preservarium.domain.device import DeviceDoc
from preservarium.domain.errors import Retry
from preservarium.domain.registry import DELETED
from preservarium.settings import Settings
from preservarium.stores import registry as store
from preservarium.stores.breaker import Breaker

log = structlog.get_logger(__name__)

#: Answers remembered, of either kind. A flood of foreign addresses must not fill the memory.
REMEMBERED_MAX: Final = 20_000
#: Devices asked for in one query: a megabyte or so of answer.
QUERY_DEVICES_MAX: Final = 200
#: A query that takes longer is no net: the batch goes on without the answer.
QUERY_TIMEOUT_S: Final = 5.0
#: One query at a time is the rule, since waiting callers share it; a second for another agent.
CONNECTIONS_MAX: Final = 2
#: An idle connection is given back: in the steady state there is no query at all.
CONNECTION_IDLE_S: Final = 60.0

_CACHE: Final = "device_config"


class DeviceLookup:
    """Looks devices up. For one event loop.

    Args:
        stored: the table's value of (partition, key).
        settings: asked each time.
        catalogue: is offered the types, parsers and rules that a query brings along.
        clock: for the waits of what is remembered.
    """

    def __init__(
        self,
        stored: Callable[[int, bytes], bytes | None],
        settings: Callable[[], Settings],
        *,
        catalogue: Catalogue | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._stored = stored
        self._settings = settings
        self._catalogue = catalogue
        self._clock = clock or SystemClock()
        ttl_s = settings().normalize.unknown_cache_ttl_s
        #: device -> what the database said (None: it does not know it either)
        self._remembered: TTLCache[str, DeviceDoc | None] = TTLCache(
            REMEMBERED_MAX, ttl_s, timer=self._clock.monotonic_s
        )
        self._flights: dict[str, asyncio.Task[dict[str, DeviceDoc] | None]] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._breaker = Breaker("registry", lambda: settings().breaker, clock=self._clock)
        self._pool: Any = None
        self._pool_lock = asyncio.Lock()

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call `listener(device_id)` whenever a device's configuration changed; it must not raise."""
        self._listeners.append(listener)

    def changed(self, device_id: str) -> None:
        """Forget what is remembered of a device. The registry agent calls it after it wrote the device's row."""
        self._remembered.pop(device_id, None)
        for listener in self._listeners:
            listener(device_id)

    async def lookup(self, partition: int, device_id: str) -> DeviceDoc | None:
        """The device's document, or None where it is not registered (or cannot be found out now). Never raises Retry.

        Args:
            partition: of the message, which is where the device's row is if the message was keyed rightly.
            device_id: the address.
        """
        return (await self.lookup_many(partition, (device_id,))).get(device_id)

    def known(self, partition: int, device_id: str) -> DeviceDoc | None:
        """The device's document, without asking the database: for the stages that wait for none."""
        return self._local(partition, device_id)[1]

    async def lookup_many(self, partition: int, device_ids: Iterable[str]) -> dict[str, DeviceDoc]:
        """Documents of those devices that are registered. One query for all that are not in the table."""
        found: dict[str, DeviceDoc] = {}
        missing: list[str] = []
        for device_id in dict.fromkeys(device_ids):
            outcome, document = self._local(partition, device_id)
            if outcome == "":
                missing.append(device_id)
                continue
            metrics.CACHE.labels(_CACHE, outcome).inc()
            if document is not None:
                found[device_id] = document
        if missing:
            await self._ask(missing, found)
        return found

    def _local(self, partition: int, device_id: str) -> tuple[str, DeviceDoc | None]:
        """(outcome, document); no outcome: nothing here knows."""
        value = self._stored(partition, device_id.encode())
        if value is not None:
            document = orjson.loads(value)
            if document.get(DELETED):
                return "negative", None
            return "table", cast(DeviceDoc, document)
        if device_id in self._remembered:
            remembered = self._remembered[device_id]
            return ("negative", None) if remembered is None else ("query", remembered)
        return "", None

    # --- the net ----------------------------------------------------------------------------------------------------

    async def _ask(self, missing: Sequence[str], found: dict[str, DeviceDoc]) -> None:
        new = [d for d in missing if d not in self._flights]
        for start in range(0, len(new), QUERY_DEVICES_MAX):
            part = new[start : start + QUERY_DEVICES_MAX]
            # A task of its own: a caller that is cancelled (a rebalance) leaves the answer to the others.
            task = asyncio.create_task(self._query(part))
            for device_id in part:
                self._flights[device_id] = task
            task.add_done_callback(lambda _, part=part: self._landed(part))  # type: ignore[misc]
        flights = {device_id: self._flights[device_id] for device_id in missing}
        for device_id, task in flights.items():
            answer = await asyncio.shield(task)
            if answer is None:
                metrics.CACHE.labels(_CACHE, "unavailable").inc()
                continue
            metrics.CACHE.labels(_CACHE, "query").inc()
            if device_id in answer:
                found[device_id] = answer[device_id]

    def _landed(self, device_ids: Sequence[str]) -> None:
        for device_id in device_ids:
            self._flights.pop(device_id, None)

    async def _query(self, device_ids: Sequence[str]) -> dict[str, DeviceDoc] | None:
        """What the database says; None where it cannot be asked."""
        try:
            async with self._breaker:
                composites = await self._fetch(device_ids)
        except Retry:
            return None
        answer: dict[str, DeviceDoc] = {}
        for device_id in device_ids:
            composite = composites.get(device_id)
            if composite is None:
                self._remembered[device_id] = None
                continue
            answer[device_id] = cast(DeviceDoc, composite.device)
            self._remembered[device_id] = answer[device_id]
            if self._catalogue is not None:
                for kind, document in composite.documents():
                    self._catalogue.offer(kind, document)
        return answer

    async def _fetch(self, device_ids: Sequence[str]) -> dict[str, store.Composite]:
        try:
            async with asyncio.timeout(QUERY_TIMEOUT_S):
                pool = await self._connected()
                async with pool.acquire() as connection:
                    return await store.composite(connection, device_ids)
        except (
            OSError,
            TimeoutError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            # asyncpg's own word for a connection that died a moment ago.
            asyncpg.InternalClientError,
        ) as e:
            message = f"the registry's database does not answer: {type(e).__name__}: {e}"
            raise Retry(message) from e

    async def _connected(self) -> Any:
        async with self._pool_lock:
            if self._pool is None:
                postgres = self._settings().postgres
                self._pool = await asyncpg.create_pool(
                    postgres.dsn,
                    min_size=0,
                    max_size=CONNECTIONS_MAX,
                    max_inactive_connection_lifetime=CONNECTION_IDLE_S,
                    timeout=postgres.connect_timeout_s,
                    command_timeout=QUERY_TIMEOUT_S,
                )
            return self._pool

    async def close(self) -> None:
        """End what is under way and give the connections back."""
        for task in set(self._flights.values()):
            task.cancel()
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(5):
                    await pool.close()
            except TimeoutError:
                pool.terminate()
