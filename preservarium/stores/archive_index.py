"""The archive's index in PostgreSQL: which file has which offsets, and how far each partition is.

Functions work on a connection of asyncpg that the caller has; each is one transaction. Whoever archives a partition holds a lease on its
row, whose time is the database's; a lease that ran out is another's to take, and whoever had it finds out before it records anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import orjson

from preservarium.domain.archive import Segment
from preservarium.errors import PreservariumError

#: Time for making and uploading one file; renewed with each.
LEASE_S: Final = 600.0
#: Segments that are read at once.
PAGE: Final = 1_000

_SEGMENT: Final = "topic, epoch, partition, first_offset, next_offset, day, records, value_bytes, file_bytes, sha256, min_time, max_time"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
#: PostgreSQL's and Python's calendars end; a record's time need not.
_TIME_MAX_MS: Final = 253_402_300_799_999


class LeaseLost(PreservariumError):
    """Another worker archives this partition now: what was made is not recorded."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A partition that is ours to archive, for a while."""

    topic: str
    epoch: int
    partition: int
    owner: str
    next: int  #: first offset that is in no file
    day: str | None  #: of the last file
    plan: Segment | None  #: a file that somebody was uploading


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a partition is archived."""

    next: int
    archived_at: int | None  #: when it was last at its end, µs since the epoch, UTC; None: never
    leased: bool  #: somebody is at it


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets between the files that are in none."""

    partition: int
    first: int
    next: int
    lost: bool  #: Kafka had deleted them; otherwise nothing ever stood there


@dataclass(frozen=True, slots=True)
class Summary:
    """What the archive has of a topic."""

    topic: str
    epoch: int
    partitions: int
    segments: int
    records: int
    value_bytes: int
    file_bytes: int
    from_us: int | None  #: Kafka's time of the oldest record, µs since the epoch, UTC
    to_us: int | None
    gaps: int
    lost: int  #: offsets that Kafka had deleted before they were archived


def _time(time_ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=min(max(time_ms, 0), _TIME_MAX_MS))


def _ms(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(milliseconds=1)


def _us(at: datetime | None) -> int | None:
    return None if at is None else (at - _EPOCH) // timedelta(microseconds=1)


def _segment(row: Any) -> Segment:
    return Segment(
        row["topic"], row["epoch"], row["partition"], row["first_offset"], row["next_offset"], row["day"].isoformat(),
        row["records"], row["value_bytes"], row["file_bytes"], row["sha256"], _ms(row["min_time"]), _ms(row["max_time"]),
    )  # fmt: skip


async def standings(connection: Any, topic: str, epoch: int) -> dict[int, Standing]:
    """How far each partition of a topic is."""
    rows = await connection.fetch(
        "SELECT partition, next_offset, archived_at, coalesce(leased_until > now(), false) AS leased FROM archive_positions"
        " WHERE topic = $1 AND epoch = $2",
        topic, epoch,
    )  # fmt: skip
    return {r["partition"]: Standing(r["next_offset"], _us(r["archived_at"]), r["leased"]) for r in rows}


async def begin(connection: Any, topic: str, epoch: int, partitions: dict[int, int]) -> None:
    """Note where partitions begin that have no position yet."""
    await connection.executemany(
        "INSERT INTO archive_positions (topic, epoch, partition, next_offset) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        [(topic, epoch, p, offset) for p, offset in sorted(partitions.items())],
    )


async def lease(connection: Any, topic: str, epoch: int, partition: int, owner: str) -> Lease | None:
    """Take a partition on; None: another is at it."""
    row = await connection.fetchrow(
        "UPDATE archive_positions SET owner = $4, leased_until = now() + make_interval(secs => $5)"
        " WHERE topic = $1 AND epoch = $2 AND partition = $3 AND (owner = $4 OR leased_until IS NULL OR leased_until < now())"
        " RETURNING next_offset, day, plan",
        topic, epoch, partition, owner, LEASE_S,
    )  # fmt: skip
    if row is None:
        return None
    plan = Segment.of(orjson.loads(row["plan"])) if row["plan"] is not None else None
    day = row["day"].isoformat() if row["day"] is not None else None
    return Lease(topic, epoch, partition, owner, row["next_offset"], day, plan)


async def renew(connection: Any, held: Lease) -> None:
    """Have a lease last longer.

    Raises:
        LeaseLost: it is not ours any more.
    """
    await _update(connection, held, "leased_until = now() + make_interval(secs => $6)", LEASE_S)


async def plan(connection: Any, held: Lease, segment: Segment | None) -> None:
    """Note the file that is about to be uploaded, or that there is none.

    Raises:
        LeaseLost: the partition is not ours any more.
    """
    text = None if segment is None else orjson.dumps(segment.document()).decode()
    await _update(connection, held, "plan = $6::jsonb, leased_until = now() + make_interval(secs => $7)", text, LEASE_S)


async def record(connection: Any, held: Lease, segment: Segment) -> Lease:
    """A file is uploaded: it counts, and the partition stands behind it. Gives the lease as it is now.

    Raises:
        LeaseLost: the partition is not ours any more, and nothing is recorded.
    """
    async with connection.transaction():
        await _update(
            connection, held, "next_offset = $6, day = $7, plan = NULL, leased_until = now() + make_interval(secs => $8)",
            segment.next, date.fromisoformat(segment.day), LEASE_S,
        )  # fmt: skip
        await _insert(connection, [segment])
    return Lease(held.topic, held.epoch, held.partition, held.owner, segment.next, segment.day, None)


async def _insert(connection: Any, segments: Sequence[Segment]) -> None:
    await connection.executemany(
        f"INSERT INTO archive_segments ({_SEGMENT}, path) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        [
            (
                s.topic, s.epoch, s.partition, s.first, s.next, date.fromisoformat(s.day), s.records, s.value_bytes,
                s.file_bytes, s.sha256, _time(s.min_time_ms), _time(s.max_time_ms), s.path,
            )
            for s in segments
        ],
    )  # fmt: skip


async def pass_over(connection: Any, held: Lease, next_: int, *, lost: bool) -> Lease:
    """Offsets to before `next_` are in no file, because Kafka has none of them (any more). Gives the lease as it is now.

    Raises:
        LeaseLost: the partition is not ours any more.
    """
    async with connection.transaction():
        await _update(connection, held, "next_offset = $6, plan = NULL", next_)
        await connection.execute(
            "INSERT INTO archive_gaps (topic, epoch, partition, first_offset, next_offset, lost) VALUES ($1, $2, $3, $4, $5, $6)",
            held.topic, held.epoch, held.partition, held.next, next_, lost,
        )  # fmt: skip
    return Lease(held.topic, held.epoch, held.partition, held.owner, next_, held.day, None)


async def release(connection: Any, held: Lease, *, at_end: bool) -> None:
    """Give a partition back; `at_end`: it is archived to where it ended. Nothing where it is not ours any more."""
    await connection.execute(
        "UPDATE archive_positions SET owner = NULL, leased_until = NULL, archived_at = CASE WHEN $5 THEN now() ELSE archived_at END"
        " WHERE topic = $1 AND epoch = $2 AND partition = $3 AND owner = $4",
        held.topic, held.epoch, held.partition, held.owner, at_end,
    )  # fmt: skip


async def _update(connection: Any, held: Lease, what: str, *values: Any) -> None:
    done = await connection.fetchval(
        f"UPDATE archive_positions SET {what} WHERE topic = $1 AND epoch = $2 AND partition = $3 AND owner = $4"
        " AND next_offset = $5 RETURNING 1",
        held.topic, held.epoch, held.partition, held.owner, held.next, *values,
    )  # fmt: skip
    if done is None:
        message = f"{held.topic}[{held.partition}] is archived by another worker by now"
        raise LeaseLost(message)


# --- looking


async def covering(connection: Any, topic: str, epoch: int, partition: int, begin: int, end: int) -> list[Segment]:
    """Segments that have offsets from `begin` to before `end`, in their order; at most `PAGE`."""
    rows = await connection.fetch(
        f"SELECT {_SEGMENT} FROM archive_segments WHERE topic = $1 AND epoch = $2 AND partition = $3 AND first_offset < $5"
        " AND first_offset >= coalesce((SELECT max(first_offset) FROM archive_segments"
        "   WHERE topic = $1 AND epoch = $2 AND partition = $3 AND first_offset <= $4), 0)"
        " AND next_offset > $4 AND deleted_at IS NULL ORDER BY first_offset LIMIT $6",
        topic, epoch, partition, begin, end, PAGE,
    )  # fmt: skip
    return [_segment(row) for row in rows]


async def span(connection: Any, topic: str, epoch: int, partition: int) -> tuple[int, int] | None:
    """The first offset in a file, and the one behind the last; None: there is no file."""
    row = await connection.fetchrow(
        "SELECT min(first_offset) AS first, max(next_offset) AS next FROM archive_segments"
        " WHERE topic = $1 AND epoch = $2 AND partition = $3 AND deleted_at IS NULL",
        topic, epoch, partition,
    )  # fmt: skip
    return None if row["first"] is None else (row["first"], row["next"])


async def since(connection: Any, topic: str, epoch: int, partition: int, time_ms: int) -> Segment | None:
    """The first segment with a record of a time or later."""
    row = await connection.fetchrow(
        f"SELECT {_SEGMENT} FROM archive_segments WHERE topic = $1 AND epoch = $2 AND partition = $3 AND max_time >= $4"
        " AND deleted_at IS NULL ORDER BY first_offset LIMIT 1",
        topic, epoch, partition, _time(time_ms),
    )  # fmt: skip
    return None if row is None else _segment(row)


async def segments(
    connection: Any,
    topic: str | None = None,
    *,
    epoch: int | None = None,
    partitions: Sequence[int] = (),
    from_ms: int | None = None,
    to_ms: int | None = None,
    after: tuple[str, int, int, int] = ("", -1, -1, -1),
) -> list[Segment]:
    """Segments in the order of topic, epoch, partition and offset, at most `PAGE`.

    Args:
        connection: of asyncpg.
        topic: declared name; None: all.
        epoch: None: all.
        partitions: none: all.
        from_ms: with a record of this time (Kafka's) or later.
        to_ms: with a record before this time.
        after: topic, epoch, partition and first offset of the last one that was given.
    """
    rows = await connection.fetch(
        f"SELECT {_SEGMENT} FROM archive_segments WHERE deleted_at IS NULL AND ($1::text IS NULL OR topic = $1)"
        " AND ($2::int IS NULL OR epoch = $2) AND (cardinality($3::int[]) = 0 OR partition = ANY($3::int[]))"
        " AND ($4::timestamptz IS NULL OR max_time >= $4) AND ($5::timestamptz IS NULL OR min_time < $5)"
        " AND (topic, epoch, partition, first_offset) > ($6::text, $7::int, $8::int, $9::bigint)"
        " ORDER BY topic, epoch, partition, first_offset LIMIT $10",
        topic, epoch, list(partitions), None if from_ms is None else _time(from_ms),
        None if to_ms is None else _time(to_ms), *after, PAGE,
    )  # fmt: skip
    return [_segment(row) for row in rows]


async def gaps(connection: Any, topic: str, epoch: int) -> list[Gap]:
    """Offsets of a topic that are in no file, in their order; at most `PAGE`."""
    rows = await connection.fetch(
        "SELECT partition, first_offset, next_offset, lost FROM archive_gaps WHERE topic = $1 AND epoch = $2"
        " ORDER BY partition, first_offset LIMIT $3",
        topic, epoch, PAGE,
    )  # fmt: skip
    return [Gap(r["partition"], r["first_offset"], r["next_offset"], r["lost"]) for r in rows]


async def gaps_between(connection: Any, segment: Segment, begin: int) -> list[tuple[int, int]]:
    """Noted gaps of a segment's partition from offset `begin` to the segment, in their order."""
    rows = await connection.fetch(
        "SELECT first_offset, next_offset FROM archive_gaps WHERE topic = $1 AND epoch = $2 AND partition = $3"
        " AND next_offset > $4 AND first_offset < $5 ORDER BY first_offset",
        segment.topic, segment.epoch, segment.partition, begin, segment.first,
    )  # fmt: skip
    return [(r["first_offset"], r["next_offset"]) for r in rows]


async def summaries(connection: Any) -> list[Summary]:
    """What the archive has, by topic and epoch."""
    rows = await connection.fetch(
        "SELECT p.topic, p.epoch, p.partitions, coalesce(s.segments, 0) AS segments, coalesce(s.records, 0) AS records,"
        " coalesce(s.value_bytes, 0) AS value_bytes, coalesce(s.file_bytes, 0) AS file_bytes, s.min_time, s.max_time,"
        " coalesce(g.gaps, 0) AS gaps, coalesce(g.lost, 0) AS lost"
        " FROM (SELECT topic, epoch, count(*) AS partitions FROM archive_positions GROUP BY 1, 2) p"
        " LEFT JOIN (SELECT topic, epoch, count(*) AS segments, sum(records)::bigint AS records,"
        "   sum(value_bytes)::bigint AS value_bytes, sum(file_bytes)::bigint AS file_bytes, min(min_time) AS min_time,"
        "   max(max_time) AS max_time FROM archive_segments WHERE deleted_at IS NULL GROUP BY 1, 2) s USING (topic, epoch)"
        " LEFT JOIN (SELECT topic, epoch, count(*) AS gaps,"
        "   coalesce(sum(next_offset - first_offset) FILTER (WHERE lost), 0)::bigint AS lost FROM archive_gaps GROUP BY 1, 2) g"
        " USING (topic, epoch) ORDER BY 1, 2"
    )
    return [
        Summary(
            r["topic"], r["epoch"], r["partitions"], r["segments"], r["records"], r["value_bytes"], r["file_bytes"],
            _us(r["min_time"]), _us(r["max_time"]), r["gaps"], r["lost"],
        )
        for r in rows
    ]  # fmt: skip


# --- retention


async def expire(connection: Any, topic: str, keep_days: int) -> list[Segment]:
    """Segments of a topic whose records are all older: nobody reads them any more from now on; their files are to be deleted.

    Also those that were to be deleted before and are there still. At most `PAGE`.
    """
    rows = await connection.fetch(
        f"WITH old AS (SELECT topic, epoch, partition, first_offset FROM archive_segments WHERE topic = $1"
        "   AND (deleted_at IS NOT NULL OR greatest(max_time, day + interval '1 day') < now() - make_interval(days => $2)) LIMIT $3)"
        " UPDATE archive_segments s SET deleted_at = coalesce(s.deleted_at, now()) FROM old"
        " WHERE (s.topic, s.epoch, s.partition, s.first_offset) = (old.topic, old.epoch, old.partition, old.first_offset)"
        f" RETURNING {', '.join(f's.{name}' for name in _SEGMENT.split(', '))}",
        topic, keep_days, PAGE,
    )  # fmt: skip
    return [_segment(row) for row in rows]


async def forget(connection: Any, segment: Segment) -> None:
    """The file of a segment that is over is gone."""
    await connection.execute("DELETE FROM archive_segments WHERE path = $1 AND deleted_at IS NOT NULL", segment.path)


# --- an index that was lost


async def known(connection: Any, paths: Sequence[str]) -> set[str]:
    """Those of these files that the index has, or whose upload is under way."""
    rows = await connection.fetch("SELECT path FROM archive_segments WHERE path = ANY($1::text[])", list(paths))
    found = {row["path"] for row in rows}
    planned = await connection.fetch("SELECT plan FROM archive_positions WHERE plan IS NOT NULL")
    return found | {Segment.of(orjson.loads(row["plan"])).path for row in planned}


async def adopt(connection: Any, segment: Segment) -> bool:
    """Take a file into the index that follows what it has of the partition, or whose partition it does not have; whether it did.

    Idempotent. A file that overlaps what the index has is left out.
    """
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO archive_positions (topic, epoch, partition, next_offset) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            segment.topic, segment.epoch, segment.partition, segment.first,
        )  # fmt: skip
        row = await connection.fetchrow(
            "SELECT next_offset, coalesce(leased_until > now(), false) AS leased FROM archive_positions"
            " WHERE topic = $1 AND epoch = $2 AND partition = $3 FOR UPDATE",
            segment.topic, segment.epoch, segment.partition,
        )  # fmt: skip
        overlaps = await connection.fetchval(
            "SELECT EXISTS (SELECT FROM archive_segments WHERE topic = $1 AND epoch = $2 AND partition = $3"
            " AND first_offset < $5 AND next_offset > $4)",
            segment.topic, segment.epoch, segment.partition, segment.first, segment.next,
        )  # fmt: skip
        if overlaps or row["leased"]:
            return False
        await _insert(connection, [segment])
        await connection.execute(
            "DELETE FROM archive_gaps WHERE topic = $1 AND epoch = $2 AND partition = $3 AND first_offset >= $4 AND next_offset <= $5",
            segment.topic, segment.epoch, segment.partition, segment.first, segment.next,
        )  # fmt: skip
        await connection.execute(
            "UPDATE archive_positions SET next_offset = greatest(next_offset, $4), day = greatest(day, $5)"
            " WHERE topic = $1 AND epoch = $2 AND partition = $3",
            segment.topic, segment.epoch, segment.partition, segment.next, date.fromisoformat(segment.day),
        )  # fmt: skip
    return True
