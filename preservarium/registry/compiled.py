"""What is made of the registry for one device, remembered until the registry changes."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Generic, Protocol, TypeVar

import orjson

from preservarium import metrics
from preservarium.clock import Clock
from preservarium.domain.quality.checks import CheckCompiler, DeviceChecks
from preservarium.domain.registry.device import DatatypeDoc, DeviceDoc, DeviceTypeDoc, RuleDoc
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
#: (partition, devices): makes devices known that were registered a moment ago, by asking the database; never raises `Retry`.
LookupMany = Callable[[int, Iterable[str]], Awaitable[Any]]


async def ask_nobody(partition: int, device_ids: Iterable[str]) -> None:
    """A `LookupMany` where there is no database: what the worker does not know stays unknown."""


#: Hits are counted here and told to the metric so many at a time: a counter's lock costs more than the look-up.
_HITS_AT_ONCE: Final = 256


class CompiledDevices(Generic[T]):
    """Compiled configurations by device; for one stage and one event loop.

    What is made depends on some fields of the device's document and on the catalogue, so devices of a type that say
    nothing of their own share one: a device costs bytes, not a compilation. It must not be changed by whoever gets it.

    A change of any document of the catalogue forgets all of them, a change of a device that device (`forget` is for
    `DeviceLookup.on_change`). A device that is unknown is looked up each time: it may be registered any moment.

    Args:
        name: in metrics.
        make: of a device's document; None: of one that is unknown.
        says: what of the document counts for `make`, besides the type; empty for a device that says nothing of its own.
            None: everything, so that nothing is shared.
        known: the device's document.
        documents: the catalogue.
        live: settings.
        clock: for how long a device is kept.
        own: what a device has of its own in what it shares; where there is nothing, the shared one is given as it is.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[DeviceDoc | None], T],
        says: Callable[[DeviceDoc], Mapping[str, Any]] | None,
        known: Known,
        documents: Documents,
        live: LiveSettings,
        clock: Clock,
        *,
        own: Callable[[T, DeviceDoc], T] | None = None,
    ) -> None:
        settings = live().normalize
        self._make = make
        self._says = says
        self._own = own
        self._known = known
        self._documents = documents
        self._rev = documents.rev
        self._devices_max = settings.config_cache_devices_max
        self._ttl_s = settings.config_cache_ttl_s
        self._now_s = clock.monotonic_s
        #: device -> (kept until, its configuration); the oldest first
        self._cache: dict[str, tuple[float, T]] = {}
        #: type and the fields that count -> configuration
        self._shared: dict[tuple[str, bytes], T] = {}
        self._unknown: T | None = None
        self._hits = metrics.CACHE.labels(name, "hit")
        self._misses = metrics.CACHE.labels(name, "miss")
        self._untold_hits = 0

    def get(self, partition: int, device_id: str) -> T:
        """The compiled configuration of a device; for an unknown one, what the catalogue alone gives."""
        if self._documents.rev != self._rev:
            self._rev = self._documents.rev
            self._cache.clear()
            self._shared.clear()
            self._unknown = None
        now_s = self._now_s()
        entry = self._cache.get(device_id)
        if entry is not None and entry[0] > now_s:
            self._untold_hits += 1
            if self._untold_hits == _HITS_AT_ONCE:
                self._hits.inc(_HITS_AT_ONCE)
                self._untold_hits = 0
            return entry[1]
        self._misses.inc()
        device = self._known(partition, device_id)
        if device is None:
            if self._unknown is None:
                self._unknown = self._make(None)
            return self._unknown
        made = self._compiled(device)
        self._cache.pop(device_id, None)
        if len(self._cache) >= self._devices_max:
            del self._cache[next(iter(self._cache))]
        self._cache[device_id] = now_s + self._ttl_s, made
        return made

    def strangers(self, partition: int, device_ids: Iterable[str]) -> list[str]:
        """Those of the devices that this worker does not know."""
        cache, known = self._cache, self._known
        return [d for d in device_ids if d not in cache and known(partition, d) is None]

    def _compiled(self, device: DeviceDoc) -> T:
        if self._says is None:
            return self._make(device)
        said = self._says(device)
        key = device["type"], orjson.dumps(said, option=orjson.OPT_SORT_KEYS) if said else b""
        made = self._shared.get(key)
        if made is None:
            if len(self._shared) >= self._devices_max:
                self._shared.clear()
            made = self._shared[key] = self._make(device)
        return made if self._own is None else self._own(made, device)

    def forget(self, device_id: str) -> None:
        """Look a device up anew the next time."""
        self._cache.pop(device_id, None)


def fields_of(*names: str) -> Callable[[DeviceDoc], Mapping[str, Any]]:
    """What a device says in these fields."""
    return lambda device: {name: value for name in names if (value := device.get(name)) is not None}


_CHECKED: Final = fields_of("datatypes", "birth", "lateness_s")


def _of_checks(device: DeviceDoc) -> Mapping[str, Any]:
    # Of `meta` the place alone counts: notes for people differ from device to device.
    said, location = _CHECKED(device), (device.get("meta") or {}).get("location")
    return {**said, "location": location} if location else said


class CompiledChecks(CompiledDevices[DeviceChecks]):
    """How the readings of each device are judged (domain/quality/checks.py); what datatypes say is compiled once for all of them."""

    def __init__(self, name: str, known: Known, documents: Documents, live: LiveSettings, clock: Clock) -> None:
        super().__init__(name, self._checks, _of_checks, known, documents, live, clock)
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
