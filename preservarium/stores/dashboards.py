"""What dashboards ask of ClickHouse: queries by name, their parameters checked, their answers kept for a moment.

The queries are in `dashboards.sql` beside this file and nowhere else. Many who look at one dashboard cost one query: equal
questions that come while one is under way wait for its answer, and an answer is given again for `sync.query_ttl_s`.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

import orjson
from cachetools import TTLCache

from preservarium import metrics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.readings.address import spellings
from preservarium.errors import PreservariumError
from preservarium.settings import Settings
from preservarium.stores.clickhouse import ClickHouseStore

#: Longest text of a parameter; names have 255 characters.
TEXT_CHARS_MAX: Final = 255
#: A page of a dashboard; whoever needs more asks for the next one, or queries ClickHouse.
LIMIT_MAX: Final = 1_000
#: Most rows of any answer; every query limits itself to this or less.
ROWS_MAX: Final = 10_000
#: Ranges of whole numbers by type; those of µs are the instants that are stored at all.
_RANGES: Final[Mapping[str, tuple[int, int]]] = {"UInt32": (0, 1_000_000), "Int64": (0, 4_102_444_800_000_000)}
#: Parameters with a meaning of their own.
_LIMITS: Final[Mapping[str, tuple[int, int]]] = {
    "limit": (1, LIMIT_MAX),
    "points": (1, ROWS_MAX),
    "days": (1, 3_660),
}

_BLOCK: Final = re.compile(r"^-- name: (\w+)\n((?:-- [^\n]*\n)+)(.*?);\s*$", re.MULTILINE | re.DOTALL)
_PARAMETER: Final = re.compile(r"-- param: (\w+) (String|UInt32|Int64|Address)(?: = (\S+))?: (.+)")
#: Of which type an address is to ClickHouse: all its spellings, and none where no device is named.
_ADDRESS: Final = "Array(String)"


class DashboardUnknown(PreservariumError):
    """There is no dashboard of that name."""


class ParameterInvalid(PreservariumError):
    """A dashboard's parameter is missing, unknown or out of its range."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a query."""

    name: str
    type: str  #: String, UInt32, Int64 (µs since the epoch, UTC), or Address: of a device, in any spelling
    default: str | int | None  #: None: must be given
    meaning: str

    def checked(self, text: str | int | None) -> str | int:
        """The value of what was given.

        Raises:
            ParameterInvalid: it is missing, not of its type or out of its range.
        """
        if text is None:
            if self.default is None:
                message = f"{self.name} is missing: {self.meaning}"
                raise ParameterInvalid(message)
            return self.default
        if self.type in ("String", "Address"):
            value = str(text)
            if len(value) > TEXT_CHARS_MAX or "\0" in value:
                message = f"{self.name} is longer than {TEXT_CHARS_MAX} characters, or holds NUL"
                raise ParameterInvalid(message)
            return value
        least, greatest = _LIMITS.get(self.name, _RANGES[self.type])
        number = str(text)
        # Not int() alone: it takes underscores, spaces and other digits.
        if not (number.isascii() and number.isdigit() and len(number) <= 16 and least <= int(number) <= greatest):
            message = f"{self.name} is a whole number from {least} to {greatest}, not {number!r:.40}"
            raise ParameterInvalid(message)
        return int(number)


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One query."""

    name: str
    meaning: str
    parameters: tuple[Parameter, ...]
    text: str

    def checked(self, given: Mapping[str, str | int]) -> dict[str, str | int]:
        """A value for each parameter.

        Raises:
            ParameterInvalid: one is missing, unknown or out of its range.
        """
        if unknown := sorted(given.keys() - {p.name for p in self.parameters}):
            message = f"{self.name} has no parameter {', '.join(unknown)!r:.80}"
            raise ParameterInvalid(message)
        values = {p.name: p.checked(given.get(p.name)) for p in self.parameters}
        start, end = values.get("start"), values.get("end")
        if isinstance(start, int) and isinstance(end, int) and end <= start:
            message = "end is not after start"
            raise ParameterInvalid(message)
        return values

    def bound(self, values: Mapping[str, str | int]) -> dict[str, Any]:
        """Checked values as ClickHouse gets them."""
        addresses = {p.name for p in self.parameters if p.type == "Address"}
        return {
            name: value if name not in addresses else spellings(str(value)) if value else []
            for name, value in values.items()
        }

    def document(self) -> dict[str, Any]:
        """For a list of dashboards."""
        return {
            "name": self.name,
            "meaning": self.meaning,
            "parameters": [
                {"name": p.name, "type": p.type, "default": p.default, "meaning": p.meaning} for p in self.parameters
            ],
        }


def parse(text: str) -> dict[str, Dashboard]:
    """The queries of a file, by name.

    Raises:
        ValueError: something of it is not understood.
    """
    found: dict[str, Dashboard] = {}
    for name, comments, query in _BLOCK.findall(text):
        parameters = [
            Parameter(
                p, kind, None if not default else int(default) if default.isdigit() else default.strip("'"), meaning
            )
            for p, kind, default, meaning in _PARAMETER.findall(comments)
        ]
        meaning = " ".join(c.removeprefix("-- ") for c in comments.splitlines() if not c.startswith("-- param: "))
        used = set(re.findall(r"\{(\w+):(\w+)\}", query))
        if used != {(p.name, p.type) for p in parameters}:
            message = f"{name}: parameters are declared otherwise than used: {sorted(used)}"
            raise ValueError(message)
        found[name] = Dashboard(name, meaning, tuple(parameters), query.strip().replace(":Address}", f":{_ADDRESS}}}"))
    if len(found) != text.count("-- name: "):
        message = "a query is not of the form that is read"
        raise ValueError(message)
    return found


DASHBOARDS: Final = parse(resources.files("preservarium.stores").joinpath("dashboards.sql").read_text("utf-8"))


class Dashboards:
    """Answers by name, as JSON text. For one event loop.

    Args:
        store: where the tables are.
        settings: asked at the first answer for the cache's size and time.
        clock: for the cache.
    """

    def __init__(self, store: ClickHouseStore, settings: Callable[[], Settings], *, clock: Clock | None = None) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock or SystemClock()
        self._flights: dict[tuple[Any, ...], asyncio.Task[bytes]] = {}
        s = settings().sync
        self._cache: TTLCache[tuple[Any, ...], bytes] = TTLCache(
            s.query_cache_bytes_max, s.query_ttl_s, timer=self._clock.monotonic_s, getsizeof=len
        )

    async def answer(self, name: str, given: Mapping[str, str | int]) -> bytes:
        """`{name, parameters, columns, rows}` as JSON; rows are lists in the order of columns.

        As old as `sync.query_ttl_s` at most.

        Args:
            name: of the dashboard.
            given: parameters, as text or as their own type.

        Raises:
            DashboardUnknown: there is none of that name.
            ParameterInvalid: a parameter is missing, unknown or out of its range.
            Retry: ClickHouse cannot be reached.
        """
        dashboard = DASHBOARDS.get(name)
        if dashboard is None:
            message = f"there is no dashboard {name!r:.40}; there are: {', '.join(DASHBOARDS)}"
            raise DashboardUnknown(message)
        values = dashboard.checked(given)
        key = (name, *values.values())
        kept = self._cache.get(key)
        if kept is not None:
            metrics.DASHBOARD_ANSWERS.labels(name, "cached").inc()
            return kept
        flight = self._flights.get(key)
        metrics.DASHBOARD_ANSWERS.labels(name, "asked" if flight is None else "shared").inc()
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._ask(dashboard, values, key))
            flight.add_done_callback(lambda done: self._landed(key, done))
        # Shielded: who gives up waiting does not take the answer from the others.
        return await asyncio.shield(flight)

    def _landed(self, key: tuple[Any, ...], flight: asyncio.Task[bytes]) -> None:
        self._flights.pop(key, None)
        if not flight.cancelled():
            flight.exception()  # seen: whoever waited has had it

    async def _ask(self, dashboard: Dashboard, values: dict[str, str | int], key: tuple[Any, ...]) -> bytes:
        began_s = self._clock.monotonic_s()
        columns, rows = await self._store.select(dashboard.text, dashboard.bound(values))
        metrics.DASHBOARD_SECONDS.labels(dashboard.name).observe(self._clock.monotonic_s() - began_s)
        text = orjson.dumps({"name": dashboard.name, "parameters": values, "columns": columns, "rows": rows})
        s = self._settings().sync
        if len(rows) <= s.query_cache_rows_max and len(text) <= self._cache.maxsize // 4:
            self._cache[key] = text
            metrics.DASHBOARD_CACHE_BYTES.set(self._cache.currsize)
        return text

    async def close(self) -> None:
        """Give up what is under way."""
        for flight in [*self._flights.values()]:
            flight.cancel()
        await asyncio.gather(*self._flights.values(), return_exceptions=True)
