"""The event store: streams of facts with optimistic concurrency, a hash chain and snapshots.

Every function works on a connection that the caller has, inside the caller's transaction, so that events, their
projection and the outbox row are one commit. Instants are µs since the epoch, UTC.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg
import orjson

from preservarium.domain import folds
from preservarium.errors import PreservariumError

#: The `prev_hash` of a stream's first event.
GENESIS: Final = bytes(32)
#: A snapshot is written at each multiple of this version: a fold reads at most so many events.
SNAPSHOT_EVERY: Final = 50
#: Rows that `verify` holds at once.
VERIFY_ROWS: Final = 1_000

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class EventsError(PreservariumError):
    """The event store has not what was asked for."""


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
    state: Mapping[str, Any] | None = None  #: the fold after this event, for snapshots; None: it is made of the events


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
    """Append events by one actor at one instant; returns the streams' new versions. Call it in a transaction.

    Raises:
        ConflictError: a stream is not at its expected version. The transaction is to be rolled back.
    """
    return await append_all(connection, [(event, actor, at_us) for event in events])


async def append_all(connection: Any, events: Sequence[tuple[NewEvent, str, int]]) -> dict[str, int]:
    """Append events, each with its actor and its instant in µs; of one stream in the order of their expected versions.

    Returns:
        The streams' new versions.

    Raises:
        ConflictError: a stream is not at its expected version. The transaction is to be rolled back.
    """
    at_head = await heads(connection, list(dict.fromkeys(e.stream_id for e, _, _ in events)))
    rows: list[tuple[Any, ...]] = []
    snapshots: list[tuple[NewEvent, int, bytes]] = []
    for e, actor, at_us in events:
        version, prev_hash = at_head.get(e.stream_id, (0, GENESIS))
        if version != e.expected_version:
            raise ConflictError(_conflict(e.stream_id))
        version += 1
        data = canonical(e.data)
        hashed = event_hash(prev_hash, e.stream_id, version, e.type, data, actor, at_us)
        at_head[e.stream_id] = version, hashed
        rows.append((e.stream_id, version, e.type, data.decode(), actor, instant(at_us), prev_hash, hashed))
        if version % SNAPSHOT_EVERY == 0:
            snapshots.append((e, version, hashed))
    if not rows:
        return {}
    try:
        # One statement: the order of its rows is the order of their positions.
        await connection.execute(_APPEND, *map(list, zip(*rows, strict=True)))
    except asyncpg.UniqueViolationError as e:
        raise ConflictError(_conflict(str(getattr(e, "detail", None) or "a stream"))) from e
    for event, version, hashed in snapshots:
        state = event.state
        if state is None:
            try:
                state, _ = await state_at(connection, event.stream_id, version=version)
            except (ValueError, KeyError, TypeError):
                continue  # a snapshot saves reading, and nothing else: who asks for the state is told what does not fit
        await connection.execute(
            "INSERT INTO event_snapshots (stream_id, version, state, hash) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            event.stream_id, version, None if state is None else canonical(state).decode(), hashed,
        )  # fmt: skip
    return {stream: version for stream, (version, _) in at_head.items()}


_APPEND: Final = """
INSERT INTO event_store (stream_id, version, type, data, actor, at, prev_hash, hash)
SELECT s, v, t, d, a, at, p, h
FROM unnest($1::text[], $2::bigint[], $3::text[], $4::json[], $5::text[], $6::timestamptz[], $7::bytea[], $8::bytea[])
  WITH ORDINALITY AS u(s, v, t, d, a, at, p, h, nth) ORDER BY nth"""


def _conflict(what: str) -> str:
    return f"{what} was changed by someone else meanwhile; nothing was written: look at it and try again"


def _event(row: Any) -> Event:
    return Event(
        row["position"], row["stream_id"], row["version"], row["type"], orjson.loads(row["data"]), row["actor"],
        microseconds(row["at"]), bytes(row["hash"]).hex(),
    )  # fmt: skip


_COLUMNS: Final = "position, stream_id, version, type, data, actor, at, hash"


async def read(
    connection: Any,
    stream_id: str,
    *,
    after_version: int = 0,
    until_us: int | None = None,
    until_version: int | None = None,
    limit: int = 1_000,
) -> list[Event]:
    """Events of one stream in order.

    Args:
        connection: any.
        stream_id: the stream.
        after_version: leave out the events up to this one.
        until_us: leave out events later than this instant.
        until_version: leave out events after this one.
        limit: at most so many.
    """
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM event_store
        WHERE stream_id = $1 AND version > $2 AND ($3::timestamptz IS NULL OR at <= $3) AND ($5::bigint IS NULL OR version <= $5)
        ORDER BY version LIMIT $4
        """,
        stream_id, after_version, None if until_us is None else instant(until_us), limit, until_version,
    )  # fmt: skip
    return [_event(r) for r in rows]


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events of all streams."""

    prefix: str = ""  #: of the streams' names
    type: str | None = None
    actor: str | None = None
    since_us: int | None = None
    until_us: int | None = None


async def log(
    connection: Any,
    which: Filter,
    *,
    after: int | None = None,
    before: int | None = None,
    limit: int,
    newest: bool = False,
) -> list[Event]:
    """Events of all streams in the order of their positions, which is that in which they were written.

    Args:
        connection: any.
        which: those that are meant.
        after: leave out those up to this position.
        before: leave out those from this position on.
        limit: at most so many.
        newest: the last ones instead of the first; in order all the same.
    """
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM event_store
        WHERE position > $1 AND position < $2 AND starts_with(stream_id, $3) AND ($4::text IS NULL OR type = $4)
          AND ($5::text IS NULL OR actor = $5) AND ($6::timestamptz IS NULL OR at >= $6) AND ($7::timestamptz IS NULL OR at <= $7)
        ORDER BY position {"DESC" if newest else ""} LIMIT $8
        """,
        0 if after is None else after, 2**63 - 1 if before is None else before, which.prefix, which.type, which.actor,
        None if which.since_us is None else instant(which.since_us),
        None if which.until_us is None else instant(which.until_us), limit,
    )  # fmt: skip
    return [_event(r) for r in (reversed(rows) if newest else rows)]


async def streams(connection: Any, prefix: str, *, limit: int = 1_000) -> list[str]:
    """Names of the streams that start with `prefix`, sorted."""
    rows = await connection.fetch(
        "SELECT DISTINCT stream_id FROM event_store WHERE starts_with(stream_id, $1) ORDER BY 1 LIMIT $2", prefix, limit
    )
    return [r[0] for r in rows]


async def state_at(
    connection: Any, stream_id: str, *, until_us: int | None = None, version: int | None = None
) -> tuple[dict[str, Any] | None, int]:
    """(document, version) of a stream as of an instant or a version; as it is now where neither is given.

    As of an instant it is the state after the last event that is not later: the events before that one belong to it, whatever
    the clock of who wrote them said. The document is None where there is none.

    Raises:
        ValueError, KeyError, TypeError: the stream's events do not fit together.
    """
    if until_us is not None:
        last = await connection.fetchval(
            "SELECT version FROM event_store WHERE stream_id = $1 AND at <= $2 ORDER BY version DESC LIMIT 1",
            stream_id, instant(until_us),
        )  # fmt: skip
        version = last or 0 if version is None else min(version, last or 0)
    # Without a state it is one of a release that made snapshots of documents only, unless the document was removed.
    snapshot = await connection.fetchrow(
        """
        SELECT s.version, s.state FROM event_snapshots s
        JOIN event_store e ON e.stream_id = s.stream_id AND e.version = s.version AND e.hash = s.hash
        WHERE s.stream_id = $1 AND ($2::bigint IS NULL OR s.version <= $2) AND (s.state IS NOT NULL OR e.type = 'removed')
        ORDER BY s.version DESC LIMIT 1
        """,
        stream_id, version,
    )  # fmt: skip
    state: dict[str, Any] | None = None
    reached = 0
    if snapshot is not None:
        reached = snapshot["version"]
        state = None if snapshot["state"] is None else orjson.loads(snapshot["state"])
    while events := await read(connection, stream_id, after_version=reached, until_version=version):
        state = folds.fold(stream_id, state, ((e.type, e.data) for e in events))
        reached = events[-1].version
    return state, reached


@dataclass(frozen=True, slots=True)
class Verified:
    """What a check of the hash chain found."""

    streams: int
    events: int
    faults: list[str]  #: one line each, at most `FAULTS_MAX`


#: More lines help nobody; the count of events tells the rest.
FAULTS_MAX: Final = 100


#: (events looked at, events)
Progress = Callable[[int, int], None]


async def verify(connection: Any, *, prefix: str = "", progress: Progress = lambda *_: None) -> Verified:
    """Check numbering, links, hashes and ends of every stream that starts with `prefix`; constant memory.

    What was cut off at the end of a stream, or is gone with the whole of it, shows by `event_heads`. Whoever may write the database
    may write that anew as well: `against` compares with what was kept elsewhere.
    """
    faults: list[str] = []
    count = 0
    stream_count = 0
    stream = ""
    version, prev_hash = 0, GENESIS
    head: tuple[int, bytes] | None = None

    def fault_in(name: str, text: str) -> None:
        if len(faults) < FAULTS_MAX:
            faults.append(f"{name}: {text}")

    def end() -> None:
        """Compare the last event of a stream with what is noted of it."""
        if stream and has_heads:
            if head is None:
                fault_in(stream, "no end is noted of it")
            elif head[0] > version:
                fault_in(
                    stream,
                    f"the events end at {version}, and the last one was {head[0]}: events are missing at its end",
                )
            elif head != (version, prev_hash):
                fault_in(stream, f"the last event is not the one that is noted (version {head[0]})")

    async with connection.transaction(isolation="repeatable_read", readonly=True):
        has_heads: bool = await connection.fetchval("SELECT to_regclass('event_heads') IS NOT NULL")
        total = await connection.fetchval("SELECT count(*) FROM event_store WHERE starts_with(stream_id, $1)", prefix)
        heads_of = ("h.version AS head, h.hash AS head_hash", "LEFT JOIN event_heads h USING (stream_id)")
        columns, join = heads_of if has_heads else ("NULL AS head, NULL AS head_hash", "")
        cursor = connection.cursor(
            f"SELECT stream_id, e.version, type, data::text AS data, actor, at, prev_hash, e.hash, {columns} "
            f"FROM event_store e {join} WHERE starts_with(stream_id, $1) ORDER BY stream_id, e.version",
            prefix,
            prefetch=VERIFY_ROWS,
        )
        async for row in cursor:
            count += 1
            if count % VERIFY_ROWS == 0:
                progress(count, total)
            if row["stream_id"] != stream:
                end()
                stream, version, prev_hash = row["stream_id"], 0, GENESIS
                head = None if row["head"] is None else (row["head"], bytes(row["head_hash"]))
                stream_count += 1
            if row["version"] != version + 1:
                fault_in(stream, f"version {row['version']} follows {version}: events are missing")
            elif bytes(row["prev_hash"]) != prev_hash:
                fault_in(stream, f"version {row['version']} does not continue the chain")
            elif bytes(row["hash"]) != event_hash(
                prev_hash, stream, row["version"], row["type"], row["data"].encode(), row["actor"], microseconds(row["at"])
            ):  # fmt: skip
                fault_in(stream, f"version {row['version']} was altered: its hash does not fit")
            version, prev_hash = row["version"], bytes(row["hash"])
        end()
        if has_heads:
            gone = await connection.fetch(
                "SELECT stream_id, version FROM event_heads h WHERE starts_with(stream_id, $1)"
                " AND NOT EXISTS (SELECT FROM event_store e WHERE e.stream_id = h.stream_id) ORDER BY 1 LIMIT $2",
                prefix, FAULTS_MAX,
            )  # fmt: skip
            for row in gone:
                fault_in(row["stream_id"], f"the stream is missing with all of its {row['version']} events")
    progress(count, total)
    return Verified(stream_count, count, faults)


#: The end of a stream as it is kept elsewhere: (stream, version, hash in hexadecimal).
End = tuple[str, int, str]
#: Ends that are compared in one question.
ENDS_AT_ONCE: Final = 1_000


async def ends(connection: Any, *, prefix: str = "") -> AsyncIterator[End]:
    """The last event of each stream, as it is now: to be kept where the database's owner cannot reach."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        async for row in connection.cursor(
            "SELECT DISTINCT ON (stream_id) stream_id, version, hash FROM event_store WHERE starts_with(stream_id, $1)"
            " ORDER BY stream_id, version DESC",
            prefix,
            prefetch=VERIFY_ROWS,
        ):
            yield row["stream_id"], row["version"], bytes(row["hash"]).hex()


async def against(connection: Any, kept: Sequence[End]) -> list[str]:
    """What differs from ends that were kept; a line each, at most `FAULTS_MAX`. Later events do not count."""
    faults: list[str] = []
    for start in range(0, len(kept), ENDS_AT_ONCE):
        part = kept[start : start + ENDS_AT_ONCE]
        rows = await connection.fetch(
            "SELECT u.s, u.v, e.hash FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS u(s, v, nth)"
            " LEFT JOIN event_store e ON e.stream_id = u.s AND e.version = u.v ORDER BY nth",
            [end[0] for end in part], [end[1] for end in part],
        )  # fmt: skip
        for (stream, version, hashed), row in zip(part, rows, strict=True):
            if row["hash"] is None:
                faults.append(f"{stream}: version {version} was there and is missing")
            elif bytes(row["hash"]).hex() != hashed:
                faults.append(f"{stream}: version {version} is another one than it was")
    return faults[:FAULTS_MAX]
