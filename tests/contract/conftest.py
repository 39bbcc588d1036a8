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
            rows = await fetch(self.dsn, f"SELECT {', '.join(COLUMNS)} FROM iot_measurements")
            found = [dict(row) for row in rows]
            for row in found:
                for column in ("timestamp", "received_at"):
                    row[column] = round(row[column].timestamp() * 1e6)
        return sorted(
            found, key=lambda r: tuple(r[c] for c in ("device_id", "component_type", "pin_position", "timestamp"))
        )


@pytest.fixture(params=["memory", "postgres"])
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """DSN of the real store; empty for the fake."""
    if request.param == "memory":
        yield ""
    else:
        with migrated_database(request.getfixturevalue("postgres")) as dsn:
            yield dsn


@pytest.fixture
async def under_test(target: str) -> AsyncIterator[UnderTest]:
    store = TimescaleStore(live(postgres={"url": target})) if target else MemoryStore()
    yield UnderTest(store, target)
    await store.close()
