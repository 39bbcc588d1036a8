"""What is made of the registry for one device, remembered until the registry changes."""

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from cachetools import TTLCache

from preservarium import metrics
from preservarium.clock import Clock
from preservarium.domain.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, RuleDoc
from preservarium.domain.quality import CheckCompiler, DeviceChecks
from preservarium.settings import LiveSettings

T = TypeVar("T")


class Documents(Protocol):
    """What of a `Catalogue` the compilers need."""

    @property
    def rev(self) -> int:
        """Grows with every change."""
        ...

    def datatype(self, name: str) -> DatatypeDoc | None:
        """The datatype of that name."""
        ...

    def type(self, name: str) -> DeviceTypeDoc | None:
        """The device type of that name."""
        ...

    def rule(self, name: str) -> RuleDoc | None:
        """The alarm rule of that name."""
        ...

    async def ready(self) -> None:
        """Wait until everything was read once.

        Raises:
            Retry: it could not be read yet.
        """
        ...


#: (partition, device) -> its document where this worker knows it; asks no database.
Known = Callable[[int, str], DeviceDoc | None]


class CompiledDevices(Generic[T]):
    """Compiled configurations by device; for one stage and one event loop.

    A change of any document of the catalogue forgets all of them, a change of a device that device (`forget` is for
    `DeviceLookup.on_change`). A device that is unknown is looked up each time: it may be registered any moment.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[DeviceDoc | None], T],
        known: Known,
        documents: Documents,
        live: LiveSettings,
        clock: Clock,
    ) -> None:
        settings = live().normalize
        self._make = make
        self._known = known
        self._documents = documents
        self._rev = documents.rev
        self._cache: TTLCache[str, T] = TTLCache(
            settings.config_cache_devices_max, settings.config_cache_ttl_s, timer=clock.monotonic_s
        )
        self._unknown: T | None = None
        self._hits = metrics.CACHE.labels(name, "hit")
        self._misses = metrics.CACHE.labels(name, "miss")

    def get(self, partition: int, device_id: str) -> T:
        """The compiled configuration of a device; for an unknown one, what the catalogue alone gives."""
        if self._documents.rev != self._rev:
            self._rev = self._documents.rev
            self._cache.clear()
            self._unknown = None
        found = self._cache.get(device_id)
        if found is not None:
            self._hits.inc()
            return found
        self._misses.inc()
        device = self._known(partition, device_id)
        if device is None:
            if self._unknown is None:
                self._unknown = self._make(None)
            return self._unknown
        made = self._cache[device_id] = self._make(device)
        return made

    def forget(self, device_id: str) -> None:
        """Look a device up anew the next time."""
        self._cache.pop(device_id, None)


class CompiledChecks(CompiledDevices[DeviceChecks]):
    """How the readings of each device are judged (domain/quality.py); what datatypes say is compiled once for all of them."""

    def __init__(self, name: str, known: Known, documents: Documents, live: LiveSettings, clock: Clock) -> None:
        super().__init__(name, self._checks, known, documents, live, clock)
        self._compiler = CheckCompiler(documents.datatype)
        self._compiler_rev = documents.rev

    def _checks(self, device: DeviceDoc | None) -> DeviceChecks:
        if self._documents.rev != self._compiler_rev:
            self._compiler = CheckCompiler(self._documents.datatype)
            self._compiler_rev = self._documents.rev
        return self._compiler.device(device, self._documents.type(device["type"]) if device else None)

    def take_problems(self) -> list[str]:
        """What of the datatypes cannot be used, and was not taken yet; for people."""
        return self._compiler.take_problems()
