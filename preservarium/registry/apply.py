"""Applying a registry file, from reading it to the moment when the workers can see it."""

import asyncio
import getpass
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import asyncpg
from aiokafka.errors import KafkaError

from preservarium.clock import Clock, SystemClock
from preservarium.domain.registry.checks import RegistryFile
from preservarium.errors import reason
from preservarium.registry.file import read
from preservarium.registry.proving import check_scripts
from preservarium.registry.relay import Relay
from preservarium.settings import Settings
from preservarium.stores import registry as store
from preservarium.stores.migrate import connect_postgres

#: After a commit we wait so long for the records to be sent; then a worker's relay will do it.
RELAY_WAIT_S: Final = 10.0


@dataclass(slots=True)
class Applied:
    """What `apply` did."""

    file: RegistryFile
    plan: store.Plan
    committed: store.Committed | None = None  #: None for a dry run
    #: sent: Kafka has acknowledged every record. pending: they are in the outbox, for a worker to send.
    records: Literal["none", "sent", "pending"] = "none"
    relay_s: float = 0.0  #: from commit to the last acknowledgement
    relay_error: str = ""


def default_actor() -> str:
    """user@host of this process, for the history."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


async def apply(
    settings: Settings,
    path: str | Path,
    *,
    actor: str | None = None,
    prune: bool = False,
    dry_run: bool = False,
    wait_s: float = 0.0,
    clock: Clock | None = None,
) -> Applied:
    """Bring the registry to what a file says; where it already says so, nothing is written.

    Args:
        settings: where PostgreSQL and Kafka are.
        path: the registry file.
        actor: who does it; the process's user@host where it is None.
        prune: remove what the file does not name, in the sections that it has.
        dry_run: only plan.
        wait_s: how long to wait for a PostgreSQL that is starting.
        clock: for the events' instants.

    Raises:
        RegistryFileError: the file is wrong.
        ConflictError: someone changed the same document meanwhile; nothing was written.
        RegistryError, MigrationError: the database refuses or cannot be reached.
    """
    # The parser of YAML is slow and pure Python; nobody else waits for this event loop but the caller's worker may.
    file = await asyncio.to_thread(read, path)
    file.raise_for_errors()
    await check_scripts(file, settings)
    file.raise_for_errors()
    connection = await connect(settings, wait_s=wait_s)
    try:
        planned = await store.plan(connection, file, prune=prune)
        result = Applied(file, planned)
        if dry_run:
            return result
        now_us = (clock or SystemClock()).now_us()
        result.committed = await store.commit(connection, planned, actor=actor or default_actor(), at_us=now_us)
        if result.committed.outbox_ids:
            await _relay(connection, settings, result, result.committed.outbox_ids)
        return result
    finally:
        await connection.close(timeout=5)


async def connect(settings: Settings, *, wait_s: float = 0.0) -> Any:
    """A connection to the registry's database.

    Raises:
        MigrationError: it cannot be reached.
        RegistryError: it has no registry yet.
    """
    connection = await connect_postgres(settings, wait_s=wait_s)
    if not await connection.fetchval("SELECT to_regclass('registry_outbox') IS NOT NULL"):
        await connection.close(timeout=5)
        message = "the database has no registry yet: run `preservarium migrate`"
        raise store.RegistryError(message)
    return connection


async def _relay(connection: Any, settings: Settings, result: Applied, ids: list[int]) -> None:
    """Send our records if no worker leads, else wait until the leader has."""
    started = time.monotonic()
    relay = Relay(lambda: settings)
    result.records = "pending"
    try:
        async with asyncio.timeout(RELAY_WAIT_S):
            while True:
                if await relay.try_lead(connection):
                    try:
                        await relay.drain(connection)
                    finally:
                        await relay.resign(connection)
                unsent = await connection.fetchval(
                    "SELECT count(*) FROM registry_outbox WHERE id = ANY ($1::bigint[]) AND sent_at IS NULL", ids
                )
                if not unsent:
                    result.records = "sent"
                    return
                await asyncio.sleep(0.02)
    except (KafkaError, OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as e:
        # The change is committed; what is left is the relay's business in any worker.
        result.relay_error = reason(e)
    finally:
        result.relay_s = time.monotonic() - started
        await relay.close()
