"""The archive's index on a real PostgreSQL: leases, positions, and which file has an offset."""

import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import asyncpg
import pytest
from sink_support import migrated_database

from preservarium.domain.archive import Segment
from preservarium.stores import archive_index as index

pytestmark = pytest.mark.postgres

RAW = "iot_raw_data"
NOW_MS = 1_764_547_200_000


def segment(first: int, next_: int, *, partition: int = 0, at_ms: int = NOW_MS, day: str = "2025-12-01") -> Segment:
    digest = f"{partition:04x}{first:020x}{next_:020x}".ljust(64, "0")[:64]
    digest = f"{hash((partition, first, next_)) & (2**64 - 1):016x}" + digest[16:]
    return Segment(RAW, 0, partition, first, next_, day, next_ - first, 10, 5, digest, at_ms, at_ms + next_ - first - 1)


@pytest.fixture(scope="module")
def database(postgres: str) -> Iterator[str]:
    with migrated_database(postgres) as dsn:
        yield dsn


@pytest.fixture
async def connection(database: str) -> AsyncIterator[Any]:
    made = await asyncpg.connect(database)
    await made.execute("TRUNCATE archive_segments, archive_positions, archive_gaps")
    yield made
    await made.close()


async def end_leases(connection: Any) -> None:
    await connection.execute("UPDATE archive_positions SET leased_until = now() - interval '1 second'")


async def test_a_partition_is_ones_until_the_lease_ends(connection: Any) -> None:
    await index.begin(connection, RAW, 0, {0: 5, 1: 7})
    await index.begin(connection, RAW, 0, {0: 9})  # known already
    mine = await index.lease(connection, RAW, 0, 0, "me")
    assert mine is not None
    assert (mine.next, mine.day, mine.plan) == (5, None, None)
    assert await index.lease(connection, RAW, 0, 0, "you") is None
    assert await index.lease(connection, RAW, 0, 0, "me") == mine
    assert await index.lease(connection, RAW, 0, 1, "you") is not None
    planned = segment(5, 9)
    await index.plan(connection, mine, planned)
    await end_leases(connection)
    yours = await index.lease(connection, RAW, 0, 0, "you")
    assert yours is not None
    assert yours.plan == planned
    for late in (
        index.renew(connection, mine),
        index.plan(connection, mine, None),
        index.pass_over(connection, mine, 9, lost=False),
        index.record(connection, mine, planned),
    ):
        with pytest.raises(index.LeaseLost):
            await late
    await index.release(connection, mine, at_end=True)
    assert await index.lease(connection, RAW, 0, 0, "third") is None
    after = await index.record(connection, yours, planned)
    assert (after.next, after.day, after.plan) == (9, "2025-12-01", None)
    # Its own, but from before: the same file is not recorded twice.
    with pytest.raises(index.LeaseLost):
        await index.record(connection, yours, planned)
    await index.release(connection, after, at_end=True)
    standing = await index.standings(connection, RAW, 0)
    assert (standing[0].next, standing[0].leased, standing[1].next) == (9, False, 7)
    assert await index.covering(connection, RAW, 0, 0, 0, 100) == [planned]


async def test_the_files_of_any_range_are_found(connection: Any) -> None:
    rng, at, made = random.Random(7), 0, []
    await index.begin(connection, RAW, 0, {0: 0})
    held = await index.lease(connection, RAW, 0, 0, "me")
    assert held is not None
    while len(made) < 40:
        next_ = at + rng.randint(1, 50)
        if rng.random() < 0.2:
            held = await index.pass_over(connection, held, next_, lost=rng.random() < 0.5)
        else:
            made.append(segment(at, next_, at_ms=NOW_MS + at))
            held = await index.record(connection, held, made[-1])
        at = next_
    for _ in range(200):
        begin = rng.randint(0, at + 10)
        end = begin + rng.randint(1, 200)
        wanted = [s for s in made if s.first < end and s.next > begin]
        assert await index.covering(connection, RAW, 0, 0, begin, end) == wanted
        found = await index.since(connection, RAW, 0, 0, NOW_MS + begin)
        assert found == next((s for s in made if s.max_time_ms >= NOW_MS + begin), None)
    assert await index.span(connection, RAW, 0, 0) == (made[0].first, made[-1].next)
    assert await index.span(connection, RAW, 0, 1) is None
    assert await index.segments(connection, RAW, from_ms=made[3].max_time_ms, to_ms=made[5].min_time_ms) == made[3:5]
    (summary,) = await index.summaries(connection)
    gaps = await index.gaps(connection, RAW, 0)
    assert summary.segments == 40
    assert summary.records == sum(s.records for s in made)
    assert (summary.gaps, summary.lost) == (len(gaps), sum(g.next - g.first for g in gaps if g.lost))


async def test_times_that_no_calendar_has_are_kept_within_it(connection: Any) -> None:
    odd = replace(segment(0, 5), min_time_ms=-1, max_time_ms=2**62)
    assert await index.adopt(connection, odd)
    (found,) = await index.segments(connection, RAW)
    assert (found.min_time_ms, found.max_time_ms) == (0, 253_402_300_799_999)


async def test_what_is_over_is_not_read_any_more_and_then_forgotten(connection: Any) -> None:
    old, young = segment(0, 5, day="2025-10-01", at_ms=NOW_MS - 70 * 86_400_000), segment(5, 9)
    await connection.execute("SELECT 1")
    assert await index.adopt(connection, old)
    assert await index.adopt(connection, young)
    days = await connection.fetchval("SELECT (now()::date - '2025-11-01'::date)::int")
    over = await index.expire(connection, RAW, days)
    assert [s.path for s in over] == [old.path]
    assert await index.covering(connection, RAW, 0, 0, 0, 100) == [young]
    # A crash before its file was deleted: it comes again.
    assert [s.path for s in await index.expire(connection, RAW, days)] == [old.path]
    await index.forget(connection, old)
    assert await index.expire(connection, RAW, days) == []
    await index.forget(connection, young)
    assert await index.known(connection, [old.path, young.path]) == {young.path}


async def test_files_are_adopted_in_any_order_and_never_over_another(connection: Any) -> None:
    parts = [segment(n, n + 10) for n in range(0, 100, 10)]
    shuffled = parts[:]
    random.Random(3).shuffle(shuffled)
    for one in shuffled:
        assert await index.adopt(connection, one)
        assert not await index.adopt(connection, one)
    assert not await index.adopt(connection, segment(5, 15))
    assert (await index.standings(connection, RAW, 0))[0].next == 100
    assert await index.covering(connection, RAW, 0, 0, 0, 1_000) == parts
    held = await index.lease(connection, RAW, 0, 0, "me")
    assert held is not None
    assert not await index.adopt(connection, segment(100, 110))
