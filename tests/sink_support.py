"""Messages, records and databases for the tests of the stores and their agents."""

import asyncio
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import orjson
from thread_support import in_thread

from preservarium.settings import LiveSettings, load
from preservarium.stores.migrate import migrate_postgres
from preservarium.streaming.stage import Batch

NOW_US = time.time_ns() // 1_000_000_000 * 1_000_000
SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US


def message(device: str = "0000000000000001", *values: Any, at: int = NOW_US, offset: int = 0, **fields: Any) -> Any:
    """A validated message; each value is a number, or a dict of fields of a reading."""
    readings = []
    for pin, value in enumerate(values):
        reading = {
            "component_type": "temperature",
            "pin_position": str(pin),
            "unit": "Cel",
            "quality": 1,
            "flags": [],
        }
        readings.append(reading | (value if isinstance(value, dict) else {"value": value}))
    return {
        "device_id": device,
        "connector_mode": "LoRaWAN",
        "topic": "devices/1/up",
        "timestamp": at,
        "received_at": at + 250_000,
        "raw_partition": 3,
        "raw_offset": offset,
        "raw_index": 0,
        "parser": "decentlab@1",
        "config_rev": 7,
        "generation": 0,
        "readings": readings,
    } | fields


@dataclass(frozen=True)
class FakeRecord:
    """A Kafka record as the feeds hand it over."""

    offset: int
    value: bytes | None
    key: bytes | None = b"0000000000000001"
    timestamp: int = NOW_US // 1000
    headers: tuple[tuple[str, bytes], ...] = ()


def record(offset: int, *lines: Any) -> FakeRecord:
    """A record of lines."""
    return FakeRecord(offset, b"\n".join(line if isinstance(line, bytes) else orjson.dumps(line) for line in lines))


def batch(topic: str, partition: int, records: Iterable[FakeRecord]) -> Batch:
    return Batch(topic, partition, list(records))


def live(**sections: Mapping[str, Any]) -> LiveSettings:
    return LiveSettings(load(**sections))


async def execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def fetch(dsn: str, query: str, *arguments: Any) -> list[Any]:
    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        return await connection.fetch(query, *arguments)
    finally:
        await connection.close()


def on_server(maintenance_dsn: str, database: str) -> str:
    return urlunsplit(urlsplit(maintenance_dsn)._replace(path=f"/{database}"))


_templates: dict[str, str] = {}


async def _leave_alone(maintenance_dsn: str, database: str) -> None:
    """Let nobody into a database that is to be copied: TimescaleDB's scheduler and its jobs are in each that has the extension."""
    connection = await asyncpg.connect(maintenance_dsn, timeout=10)
    try:
        await connection.execute(f'ALTER DATABASE "{database}" ALLOW_CONNECTIONS false')
        async with asyncio.timeout(30):
            while await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1", database
            ):
                await asyncio.sleep(0.05)
    finally:
        await connection.close()


@contextmanager
def migrated_database(maintenance_dsn: str) -> Iterator[str]:
    """DSN of a fresh database with the whole schema: a copy of one that was migrated once."""
    template = _templates.get(maintenance_dsn)
    if template is None:
        template = f"template_{uuid.uuid4().hex[:12]}"
        in_thread(execute(maintenance_dsn, f'CREATE DATABASE "{template}"'))
        in_thread(migrate_postgres(load(postgres={"url": on_server(maintenance_dsn, template)})))
        in_thread(_leave_alone(maintenance_dsn, template))
        _templates[maintenance_dsn] = template
    name = f"test_{uuid.uuid4().hex[:12]}"
    in_thread(execute(maintenance_dsn, f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
    try:
        yield on_server(maintenance_dsn, name)
    finally:
        in_thread(execute(maintenance_dsn, f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait until `condition` (a coroutine function) holds.

    Raises:
        TimeoutError: it never did.
    """
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(0.02)
