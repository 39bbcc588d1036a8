"""Finding a device: its worker's RocksDB table first, one database query as the net for one registered a moment ago.

A device is found by every spelling of its address (domain/readings/address.py); its document says how it is registered.

In the steady state no message causes a query. A database that cannot be asked holds up who asks for a device that is not in
the table, for a while (`normalize.registry_wait_s`): a server that is restarted refuses nobody. After that such devices are
unknown, and what is not there stops nothing.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, cast

import asyncpg
import orjson
import structlog
from cachetools import TTLCache

from preservarium import metrics
from preservarium.breaker import Breaker
from preservarium.clock import Clock, SystemClock
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.registry.changes import DELETED, device_keys
from preservarium.domain.registry.device import DeviceDoc
from preservarium.errors import Retry, reason
from preservarium.registry.catalogue import Catalogue
from preservarium.settings import Settings
from preservarium.stores import registry as store
from preservarium.stores.connections import Pool

log = structlog.get_logger(__name__)

#: Answers remembered, of either kind. A flood of foreign addresses must not fill the memory.
REMEMBERED_MAX: Final = 20_000
#: Devices asked for in one query: a megabyte or so of answer.
QUERY_DEVICES_MAX: Final = 200
#: A query that takes longer is no net: the batch goes on without the answer.
QUERY_TIMEOUT_S: Final = 5.0
#: One query at a time is the rule, since waiting callers share it; a second for another agent.
CONNECTIONS_MAX: Final = 2
#: Where nobody has asked for so long, nobody knows whether the database was back meanwhile: it is waited for anew.
AWAY_FORGOTTEN_S: Final = 600.0
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
        normalize, now_s = settings().normalize, self._clock.monotonic_s
        #: canonical address -> what the database said. Until the device's record is in the table, which takes as long as the
        #: relay, Kafka or the registry stage do, nothing else tells the stages that ask no database of it: validate and
        #: alarm would take a message that normalize has understood for one of an unknown device, which has no rules.
        self._found: TTLCache[str, DeviceDoc] = TTLCache(REMEMBERED_MAX, normalize.config_cache_ttl_s, timer=now_s)
        #: canonical addresses that the database does not know either
        self._unknown: TTLCache[str, None] = TTLCache(REMEMBERED_MAX, normalize.unknown_cache_ttl_s, timer=now_s)
        #: since when the database cannot be asked, and when it was asked last, s on the monotonic clock
        self._away_since_s: float | None = None
        self._away_last_s = 0.0
        self._flights: dict[str, asyncio.Task[dict[str, DeviceDoc] | None]] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._breaker = Breaker("registry", lambda: settings().breaker, clock=self._clock, server="postgres")
        self._pool = Pool(
            lambda: settings().postgres.dsn,
            connections_max=lambda: CONNECTIONS_MAX,
            connect_timeout_s=lambda: settings().postgres.connect_timeout_s,
            command_timeout_s=lambda: QUERY_TIMEOUT_S,
            server_settings={"application_name": "preservarium-lookup"},
            idle_s=CONNECTION_IDLE_S,
        )

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call `listener(device_id)` whenever a device's configuration changed; it must not raise."""
        self._listeners.append(listener)

    def changed(self, device_id: str) -> None:
        """Forget what is remembered of a device. The registry agent calls it after it wrote the device's row."""
        address = canonical_address(device_id)
        self._found.pop(address, None)
        self._unknown.pop(address, None)
        for listener in self._listeners:
            listener(device_id)

    async def lookup(self, partition: int, device_id: str) -> DeviceDoc | None:
        """The device's document, or None where it is not registered (or that cannot be found out).

        Args:
            partition: of the message, which is where the device's row is if the message was keyed rightly.
            device_id: the address, in any spelling.

        Raises:
            Retry: as `lookup_many`.
        """
        return (await self.lookup_many(partition, (device_id,))).get(device_id)

    def known(self, partition: int, device_id: str) -> DeviceDoc | None:
        """The device's document, without asking the database: for the stages that wait for none."""
        return self._local(partition, device_id)[1]

    def removed(self, partition: int, device_id: str) -> bool:
        """Whether the device was registered and is not any more; of one that nothing here knows: no."""
        value = self._stored(partition, device_id.encode())
        return value is not None and bool(orjson.loads(value).get(DELETED))

    async def lookup_many(self, partition: int, device_ids: Iterable[str]) -> dict[str, DeviceDoc]:
        """Documents of those devices that are registered. One query for all that are not in the table.

        Raises:
            Retry: the database cannot be asked, for less than `normalize.registry_wait_s` so far.
        """
        found: dict[str, DeviceDoc] = {}
        missing: list[str] = []
        outcomes: Counter[str] = Counter()
        for device_id in dict.fromkeys(device_ids):
            outcome, document = self._local(partition, device_id)
            if outcome == "":
                missing.append(device_id)
                continue
            outcomes[outcome] += 1
            if document is not None:
                found[device_id] = document
        for outcome, count in outcomes.items():
            metrics.CACHE.labels(_CACHE, outcome).inc(count)
        if missing:
            await self._ask(missing, found)
        return found

    def _local(self, partition: int, device_id: str) -> tuple[str, DeviceDoc | None]:
        """(outcome, document); no outcome: nothing here knows."""
        removed = False
        for key in device_keys(device_id):
            value = self._stored(partition, key.encode())
            if value is not None:
                document = orjson.loads(value)
                if not document.get(DELETED):
                    return "table", cast(DeviceDoc, document)
                removed = True
        if removed:
            return "negative", None
        address = canonical_address(device_id)
        if (found := self._found.get(address)) is not None:
            return "query", found
        return ("negative", None) if address in self._unknown else ("", None)

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
                if self._is_patient():
                    message = "the registry's database cannot be asked for devices that are not known here"
                    raise Retry(message)
                continue
            metrics.CACHE.labels(_CACHE, "query").inc()
            if device_id in answer:
                found[device_id] = answer[device_id]

    def _is_patient(self) -> bool:
        """Whether the database is away for so short a time that it is waited for."""
        now_s = self._clock.monotonic_s()
        if self._away_since_s is None or now_s - self._away_last_s > AWAY_FORGOTTEN_S:
            self._away_since_s = now_s
        self._away_last_s = now_s
        return now_s - self._away_since_s < self._settings().normalize.registry_wait_s

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
        self._away_since_s = None
        answer: dict[str, DeviceDoc] = {}
        for device_id in device_ids:
            composite = composites.get(device_id)
            address = canonical_address(device_id)
            if composite is None:
                self._unknown[address] = None
                continue
            answer[device_id] = cast(DeviceDoc, composite.device)
            self._found[address] = answer[device_id]
            self._unknown.pop(address, None)
            if self._catalogue is not None:
                for kind, document in composite.documents():
                    self._catalogue.offer(kind, document)
        return answer

    async def _fetch(self, device_ids: Sequence[str]) -> dict[str, store.Composite]:
        try:
            async with asyncio.timeout(QUERY_TIMEOUT_S):
                async with self._pool.acquire() as connection:
                    return await store.composite(connection, device_ids)
        except (
            OSError,
            TimeoutError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            # asyncpg's own word for a connection that died a moment ago.
            asyncpg.InternalClientError,
        ) as e:
            message = f"the registry's database does not answer: {reason(e)}"
            raise Retry(message) from e

    async def close(self) -> None:
        """End what is under way and give the connections back."""
        for task in set(self._flights.values()):
            task.cancel()
        await self._pool.close()
