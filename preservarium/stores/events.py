"""The event store: streams of facts with optimistic concurrency, a hash chain and snapshots.

Every function works on a connection that the caller has, inside the caller's transaction, so that events, their
projection and the outbox row are one commit. Instants are µs since the epoch, UTC.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
import orjson

from preservarium.domain.registry import changes as domain
from preservarium.errors import PreservariumError

#: The `prev_hash` of a stream's first event.
GENESIS: Final = bytes(32)
#: A snapshot is written at each multiple of this version: a fold reads at most so many events.
SNAPSHOT_EVERY: Final = 50
#: Rows that `verify` holds at once.
VERIFY_ROWS: Final = 1_000

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class ConflictError(PreservariumError):
    """Someone else changed the same document meanwhile."""


def instant(us: int) -> datetime:
    """An aware datetime from µs since the epoch, without a detour over floating point."""
    return _EPOCH + timedelta(microseconds=us)


def microseconds(at: datetime) -> int:
    """µs since the epoch of an aware datetime."""
    return (at - _EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to append."""

    stream_id: str
    expected_version: int  #: the stream's version that the decision was made on; 0: the stream is new
    type: str
    data: Mapping[str, Any]
    state: Mapping[str, Any] | None = None  #: the fold after this event, for snapshots


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it is stored."""

    position: int  #: order over all streams
    stream_id: str
    version: int  #: 1 for the first of its stream
    type: str
    data: dict[str, Any]
    actor: str
    at_us: int
    hash: str  #: hexadecimal


def canonical(data: object) -> bytes:
    """JSON with sorted keys: the text that is stored and hashed."""
    return orjson.dumps(data, option=orjson.OPT_SORT_KEYS)


def event_hash(prev_hash: bytes, stream_id: str, version: int, kind: str, data: bytes, actor: str, at_us: int) -> bytes:
    """SHA-256 over the event and its predecessor's hash; each field with its length, so that none can shift."""
    digest = hashlib.sha256()
    for part in (prev_hash, stream_id.encode(), b"%d" % version, kind.encode(), data, actor.encode(), b"%d" % at_us):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


async def heads(connection: Any, stream_ids: Sequence[str]) -> dict[str, tuple[int, bytes]]:
    """Give for each stream (version, hash) of its last event; streams without events are left out."""
    rows = await connection.fetch(
        """
        SELECT s.id, e.version, e.hash FROM unnest($1::text[]) AS s (id)
        CROSS JOIN LATERAL (
          SELECT version, hash FROM event_store WHERE stream_id = s.id ORDER BY version DESC LIMIT 1) AS e
        """,
        list(stream_ids),
    )
    return {r[0]: (r[1], bytes(r[2])) for r in rows}


async def append(connection: Any, events: Sequence[NewEvent], *, actor: str, at_us: int) -> dict[str, int]:
    """Append at most one event to each stream; returns the streams' new versions. Call it in a transaction.

    Raises:
        ConflictError: a stream is not at its expected version. The transaction is to be rolled back.
    """
    known = await heads(connection, [e.stream_id for e in events])
    at = instant(at_us)
    rows: list[tuple[Any, ...]] = []
    snapshots: list[tuple[Any, ...]] = []
    versions: dict[str, int] = {}
    for e in events:
        version, prev_hash = known.get(e.stream_id, (0, GENESIS))
        if e.stream_id in versions:
            message = f"two events for {e.stream_id} in one append"
            raise ValueError(message)
        if version != e.expected_version:
            raise ConflictError(_conflict(e.stream_id))
        version += 1
        versions[e.stream_id] = version
        data = canonical(e.data)
        hashed = event_hash(prev_hash, e.stream_id, version, e.type, data, actor, at_us)
        rows.append((e.stream_id, version, e.type, data.decode(), actor, at, prev_hash, hashed))
        if version % SNAPSHOT_EVERY == 0:
            state = None if e.state is None else canonical(e.state).decode()
            snapshots.append((e.stream_id, version, state, hashed))
    try:
        await connection.executemany(
            "INSERT INTO event_store (stream_id, version, type, data, actor, at, prev_hash, hash) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            rows,
        )
    except asyncpg.UniqueViolationError as e:
        raise ConflictError(_conflict(str(getattr(e, "detail", None) or "a stream"))) from e
    if snapshots:
        await connection.executemany(
            "INSERT INTO event_snapshots (stream_id, version, state, hash) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            snapshots,
        )
    return versions


def _conflict(what: str) -> str:
    return f"{what} was changed by someone else meanwhile; nothing was written: look at it and try again"


def _event(row: Any) -> Event:
    return Event(
        row["position"], row["stream_id"], row["version"], row["type"], orjson.loads(row["data"]), row["actor"],
        microseconds(row["at"]), bytes(row["hash"]).hex(),
    )  # fmt: skip


async def read(
    connection: Any, stream_id: str, *, after_version: int = 0, until_us: int | None = None, limit: int = 1_000
) -> list[Event]:
    """Events of one stream in order.

    Args:
        connection: any.
        stream_id: the stream.
        after_version: leave out the events up to this one.
        until_us: leave out events later than this instant.
        limit: at most so many.
    """
    rows = await connection.fetch(
        """
        SELECT position, stream_id, version, type, data, actor, at, hash FROM event_store
        WHERE stream_id = $1 AND version > $2 AND ($3::timestamptz IS NULL OR at <= $3) ORDER BY version LIMIT $4
        """,
        stream_id, after_version, None if until_us is None else instant(until_us), limit,
    )  # fmt: skip
    return [_event(r) for r in rows]


async def streams(connection: Any, prefix: str, *, limit: int = 1_000) -> list[str]:
    """Names of the streams that start with `prefix`, sorted."""
    rows = await connection.fetch(
        "SELECT DISTINCT stream_id FROM event_store WHERE starts_with(stream_id, $1) ORDER BY 1 LIMIT $2", prefix, limit
    )
    return [r[0] for r in rows]


async def state_at(
    connection: Any, stream_id: str, *, until_us: int | None = None
) -> tuple[dict[str, Any] | None, int]:
    """(document, version) as of an instant; now where it is None. The document is None where there is none.

    Raises:
        ValueError: the stream's events do not fit together.
    """
    snapshot = await connection.fetchrow(
        """
        SELECT s.version, s.state FROM event_snapshots s
        JOIN event_store e ON e.stream_id = s.stream_id AND e.version = s.version AND e.hash = s.hash
        WHERE s.stream_id = $1 AND ($2::timestamptz IS NULL OR e.at <= $2) ORDER BY s.version DESC LIMIT 1
        """,
        stream_id, None if until_us is None else instant(until_us),
    )  # fmt: skip
    state: dict[str, Any] | None = None
    version = 0
    if snapshot is not None:
        version = snapshot["version"]
        state = None if snapshot["state"] is None else orjson.loads(snapshot["state"])
    while events := await read(connection, stream_id, after_version=version, until_us=until_us):
        state = domain.fold(state, ((e.type, e.data) for e in events))
        version = events[-1].version
    return state, version


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check of the hash chain found."""

    streams: int
    events: int
    faults: list[str]  #: one line each, at most `FAULTS_MAX`


#: More lines help nobody; the count of events tells the rest.
FAULTS_MAX: Final = 100


async def verify(connection: Any, *, prefix: str = "") -> Verified:
    """Check numbering, links and hashes of every stream that starts with `prefix`; constant memory.

    Events cut off at the end of a stream do not show here: the projections know the last version
    (stores/registry.py: verify).
    """
    faults: list[str] = []
    count = 0
    stream_count = 0
    stream = ""
    version, prev_hash = 0, GENESIS
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        cursor = connection.cursor(
            "SELECT stream_id, version, type, data::text AS data, actor, at, prev_hash, hash FROM event_store "
            "WHERE starts_with(stream_id, $1) ORDER BY stream_id, version",
            prefix,
            prefetch=VERIFY_ROWS,
        )
        async for row in cursor:
            count += 1
            if row["stream_id"] != stream:
                stream, version, prev_hash = row["stream_id"], 0, GENESIS
                stream_count += 1
            fault = ""
            if row["version"] != version + 1:
                fault = f"version {row['version']} follows {version}: events are missing"
            elif bytes(row["prev_hash"]) != prev_hash:
                fault = f"version {row['version']} does not continue the chain"
            elif bytes(row["hash"]) != event_hash(
                prev_hash, stream, row["version"], row["type"], row["data"].encode(), row["actor"], microseconds(row["at"])
            ):  # fmt: skip
                fault = f"version {row['version']} was altered: its hash does not fit"
            if fault and len(faults) < FAULTS_MAX:
                faults.append(f"{stream}: {fault}")
            version, prev_hash = row["version"], bytes(row["hash"])
    return Verified(stream_count, count, faults)
