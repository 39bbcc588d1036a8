"""How readings are laid out on disk, for those who look after it: chunks, compression, retention, width of a chunk.

On TimescaleDB chunks are its own, and its policies compress and drop them; on plain PostgreSQL they are partitions, which upkeep makes and drops.
What the policies do is in the settings alone: workers bring the database to it at their start, and so does `apply` at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import asyncpg

from preservarium.clock import Clock, SystemClock
from preservarium.errors import PreservariumError, reason
from preservarium.settings import Settings

#: One chunk of a large fleet takes minutes to compress.
CHUNK_S: Final = 3_600.0
#: Compressing takes a lock that those who write to the chunk wait for: give up soon.
LOCK_S: Final = 10.0


class StorageError(PreservariumError):
    """It cannot be done; the message says why, and what can be."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stretch of time of the readings."""

    name: str  #: schema and name, quoted where they must be
    range_start: datetime  #: UTC
    range_end: datetime  #: UTC, not in it
    compressed: bool
    bytes: int  #: on disk now, with indexes
    before_bytes: int | None  #: of what is compressed, before


@dataclass(frozen=True, slots=True)
class Policy:
    """What the database does by itself, beside what the settings say."""

    name: str  #: compress, retention or interval
    setting: str  #: name of the environment variable
    wanted_days: int
    in_force: timedelta | None  #: None: there is no such policy

    @property
    def so(self) -> bool:
        """Whether they agree."""
        return self.in_force == timedelta(days=self.wanted_days)


class Storage:
    """The layout of one database. For one task at a time.

    Args:
        connection: a session of the database's owner.
        settings: what is wanted.
        clock: for what is old.
    """

    def __init__(self, connection: Any, settings: Settings, *, clock: Clock | None = None) -> None:
        self._connection = connection
        self._settings = settings
        self._clock = clock or SystemClock()

    async def engine(self) -> str:
        """`timescaledb` or `plain`.

        Raises:
            StorageError: the database is not migrated.
        """
        try:
            found: str = await self._connection.fetchval("SELECT storage_engine()")
        except asyncpg.UndefinedFunctionError:
            msg = "the database is not migrated: run `preservarium migrate`"
            raise StorageError(msg) from None
        return found

    async def chunks(self) -> list[Chunk]:
        """Every chunk, the newest first."""
        if await self.engine() == "timescaledb":
            rows = await self._connection.fetch(
                "SELECT format('%I.%I', c.chunk_schema, c.chunk_name), c.range_start, c.range_end, c.is_compressed, s.total_bytes,"
                " z.before_compression_total_bytes FROM timescaledb_information.chunks c"
                " LEFT JOIN chunks_detailed_size('measurements') s USING (chunk_schema, chunk_name)"
                " LEFT JOIN chunk_compression_stats('measurements') z USING (chunk_schema, chunk_name)"
                " WHERE c.hypertable_schema = current_schema() AND c.hypertable_name = 'measurements' ORDER BY c.range_start DESC"
            )
        else:
            rows = await self._connection.fetch(
                "SELECT quote_ident(name), range_start, range_end, false, pg_total_relation_size(to_regclass(quote_ident(name))), NULL::bigint"
                " FROM measurement_partitions ORDER BY range_start DESC"
            )
        return [Chunk(name, start, end, bool(done), size or 0, before) for name, start, end, done, size, before in rows]

    async def compress(
        self, older_days: float, told: Callable[[int, int, str], None] = lambda done, total, what: None
    ) -> list[str]:
        """Compress every chunk that has ended so long ago, the oldest first. Returns the names of those that were.

        A chunk is a transaction of its own: one that is interrupted is as it was, and the next call goes on.

        Raises:
            StorageError: plain PostgreSQL does not compress; a chunk is in use, or takes too long.
        """
        if await self.engine() != "timescaledb":
            msg = "plain PostgreSQL does not compress: this needs TimescaleDB"
            raise StorageError(msg)
        before = datetime.fromtimestamp(self._clock.now_us() / 1e6, UTC) - timedelta(days=older_days)
        wanted = [c for c in reversed(await self.chunks()) if not c.compressed and c.range_end <= before]
        done: list[str] = []
        await self._connection.execute(f"SET lock_timeout = '{LOCK_S:g}s'")
        for chunk in wanted:
            told(len(done), len(wanted), f"{chunk.range_start:%Y-%m-%d}")
            try:
                await self._connection.execute(
                    "SELECT compress_chunk($1::text::regclass, if_not_compressed => true)", chunk.name, timeout=CHUNK_S
                )
            except (asyncpg.PostgresError, TimeoutError) as e:
                message = f"{len(done)} of {len(wanted)} chunks are compressed; {chunk.name} is not: {reason(e)}"
                raise StorageError(message) from e
            done.append(chunk.name)
        told(len(done), len(wanted), "")
        return done

    async def policies(self) -> dict[str, Policy]:
        """What the settings want, and what is in force."""
        s = self._settings.sink
        found: dict[str, timedelta | None] = {"compress": None, "retention": None, "interval": None}
        if await self.engine() == "timescaledb":
            row = await self._connection.fetchrow(
                "SELECT (SELECT (config ->> 'compress_after')::interval FROM timescaledb_information.jobs"
                "         WHERE proc_name = 'policy_compression' AND hypertable_name = 'measurements'),"
                " (SELECT (config ->> 'drop_after')::interval FROM timescaledb_information.jobs"
                "   WHERE proc_name = 'policy_retention' AND hypertable_name = 'measurements'),"
                " (SELECT time_interval FROM timescaledb_information.dimensions"
                "   WHERE hypertable_name = 'measurements' AND dimension_number = 1)"
            )
            found = dict(zip(found, row, strict=True))
        else:
            # Upkeep is told at each turn.
            days = await self._connection.fetchval("SELECT retention_days FROM storage_limits")
            found["retention"] = timedelta(days=days)
            found["interval"] = timedelta(days=s.chunk_days)
        return {
            name: Policy(name, f"PRESERVARIUM_SINK__{setting.upper()}", getattr(s, setting), found[name])
            for name, setting in (
                ("compress", "compress_after_days"),
                ("retention", "retention_days"),
                ("interval", "chunk_days"),
            )
        }

    async def apply(self) -> None:
        """Bring what is in force to the settings, as a worker does at its start.

        Raises:
            StorageError: the database refuses.
        """
        s = self._settings.sink
        try:
            await self._connection.execute(
                "UPDATE storage_limits SET retention_days = $1 WHERE retention_days <> $1", s.retention_days
            )
            if await self.engine() == "timescaledb":
                await self._connection.execute(
                    "SELECT storage_policies($1, $2, $3)", s.chunk_days, s.compress_after_days, s.retention_days
                )
        except asyncpg.PostgresError as e:
            raise StorageError(reason(e)) from e

    async def drop_old(self) -> int:
        """Drop now what is older than the settings keep, instead of waiting for the policy. Returns how many chunks went.

        Raises:
            StorageError: a chunk is in use, or another worker is at it.
        """
        before = len(await self.chunks())
        s = self._settings.sink
        await self._connection.execute(f"SET lock_timeout = '{LOCK_S:g}s'")
        try:
            if await self.engine() == "timescaledb":
                await self._connection.execute(
                    "SELECT drop_chunks('measurements', older_than => make_interval(days => $1))",
                    s.retention_days,
                    timeout=CHUNK_S,
                )
            else:
                await self._connection.execute(
                    "SELECT drop_partitions(now() - make_interval(days => $1))", s.retention_days, timeout=CHUNK_S
                )
        except (asyncpg.PostgresError, TimeoutError) as e:
            msg = f"not all of it is dropped: {reason(e)}"
            raise StorageError(msg) from e
        return before - len(await self.chunks())
