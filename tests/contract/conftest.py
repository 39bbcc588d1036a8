"""Stores under test: the fake that ships, and the real one."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from sink_support import fetch, live, migrated_database

from preservarium.stores.memory import MemoryStore
from preservarium.stores.timescale import TimescaleStore

COLUMNS = (
    "timestamp", "device_id", "connector_mode", "component_type", "pin_position", "value", "unit", "topic", "value_text",
    "quality", "flags", "received_at", "raw_partition", "raw_offset", "raw_index", "parser", "config_rev", "generation",
    "experiment_id",
)  # fmt: skip


@dataclass
class UnderTest:
    """A store, and a look behind it."""

    store: Any
    dsn: str = ""

    async def rows(self) -> list[dict[str, Any]]:
        """Every row, as columns of iot_measurements, sorted by natural key; times in µs."""
        if isinstance(self.store, MemoryStore):
            found = [{c: row[c] for c in COLUMNS} for row in self.store.rows.values()]
        else:
            await self.store.maintain()  # what is staged
            rows = await fetch(self.dsn, f"SELECT {', '.join(COLUMNS)} FROM iot_measurements")
            found = [dict(row) for row in rows]
            for row in found:
                for column in ("timestamp", "received_at"):
                    row[column] = round(row[column].timestamp() * 1e6)
        return sorted(
            found, key=lambda r: tuple(r[c] for c in ("device_id", "component_type", "pin_position", "timestamp"))
        )


@pytest.fixture(params=["memory", "postgres", "late"])
def kind(request: pytest.FixtureRequest) -> str:
    """The fake, the real store, or that with every row older than the compression horizon."""
    return request.param


@pytest.fixture
def target(kind: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """DSN of the real store; empty for the fake."""
    if kind == "memory":
        yield ""
    else:
        with migrated_database(request.getfixturevalue("postgres")) as dsn:
            yield dsn


@pytest.fixture
async def under_test(kind: str, target: str) -> AsyncIterator[UnderTest]:
    store = MemoryStore() if kind == "memory" else made(target, late=kind == "late")
    yield UnderTest(store, target)
    await store.close()


def made(dsn: str, *, late: bool) -> TimescaleStore:
    """The real store."""
    settings = live(postgres={"url": dsn})()
    if late:
        sink = settings.sink.model_copy(update={"compress_after_days": -2})  # beyond what is stored of the future
        settings = settings.model_copy(update={"sink": sink})
    return TimescaleStore(lambda: settings, late_lane=late)
