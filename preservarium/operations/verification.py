"""Whether ClickHouse holds what PostgreSQL holds: compared by device and day, repaired row by row, rebuilt by partition.

**Comparing.** Each engine counts the rows of a day and adds up a 64-bit hash of each; only where the sums differ is the
day looked at device by device. The hash is the beginning of MD5 over the row's bytes, and both engines write the same bytes:
integers and instants as 8 bytes, most significant first, numbers as IEEE 754 bits (so -0 differs from 0, and no decimal text
is involved), what may be null after a byte that says so, texts in UTF-8 ended by NUL, which no PostgreSQL text holds. A sum tells a doubled row, and rows moved
between devices; both sums are exact (numeric, Int256). ClickHouse is read with FINAL, as its readers do.

**What is still on its way** is left out on both sides: rows that were received in the last `settle_s` seconds.

**Repairing** works on rows, while the worker runs:

- What is missing is read from PostgreSQL and inserted with a token that was never used: the engine remembers the tokens and
  the content of earlier inserts, and would drop the very rows that somebody deleted since (`insert_deduplicate=0` does
  not keep current versions from it).
- A row that should not be there is deleted by its key and its hash, so that only what was looked at goes, and never what the
  worker has written since. The right row is inserted before the wrong one is deleted: nobody sees neither.
- Nothing is deleted before PostgreSQL has everything that sync had written when it was looked at (`settled`): a row that
  the sink is yet to store is not surplus.

The worker's tokens stay what they are: a batch of it that comes again is recognised, or merged away by the table's key.

**Rebuilding** fills a shadow table with one partition from PostgreSQL, adds what ClickHouse has received since, and puts it
in the place of the live partition in one step (REPLACE PARTITION). Partitions older than what PostgreSQL keeps stay as
they are, which exchanging whole tables would lose. What the worker inserted between the last two steps is found missing
by the comparison that follows, and repaired.

**What views have made** of a table (preservarium/operations/derived.py) is compared and mended after it, since a view sees inserts only.

Memory does not depend on the rows: ranges of devices, ranges of time and batches have limits.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import structlog

from preservarium.errors import reason
from preservarium.operations import derived, topic_comparison
from preservarium.operations.compared_tables import TABLES, Compared, clickhouse_hash, epoch_us, postgres_hash
from preservarium.settings import Settings
from preservarium.stores.maintenance import STATEMENT_S, Maintenance, VerificationError, literal, new_token

log = structlog.get_logger(__name__)

#: Devices compared by one query: a range of them is some megabytes of answers.
DEVICES_MAX: Final = 5_000
#: Rows of a device whose keys are compared in memory; a longer range is halved.
ROWS_MAX: Final = 10_000
#: Rows named in one DELETE: some 100 KiB of text, below the server's limit for a statement.
DELETE_ROWS_MAX: Final = 1_000
#: Rows of one insert of a rebuild: they are all of it that takes memory, some 3 MiB; four times as many took 13, and no less time.
INSERT_ROWS_MAX: Final = 5_000
#: Rows read from PostgreSQL at once.
FETCH_ROWS: Final = 5_000
#: A row received in the last minute may be on its way; workers at half their load need a second.
SETTLE_S: Final = 60.0
#: A wrong row may hide another one that was never merged.
PASSES_MAX: Final = 3
DAY_US: Final = 86_400_000_000
#: An insert is through all views of its table within this time, on a server that is not overloaded.
VIEWS_SETTLE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Sums:
    """Rows, and the sum of their hashes."""

    rows: int = 0
    checksum: int = 0


@dataclass(slots=True)
class Difference:
    """A device's day that is not the same in both, and what was done about it."""

    table: str
    device_id: str  #: of task tables the file, or the employee
    day: date  #: UTC
    expected: Sums  #: what PostgreSQL holds; of a table that a view fills, what its source makes of it
    found: Sums
    inserted: int = 0  #: rows that were missing or wrong, inserted from PostgreSQL
    deleted: int = 0  #: rows that were wrong or surplus, deleted
    kept: int = 0  #: surplus or wrong rows that stay, because PostgreSQL may be yet to store them
    repaired: bool = False  #: both are the same now

    @property
    def what(self) -> str:
        """In a word: missing, surplus or altered rows in ClickHouse."""
        if self.found.rows < self.expected.rows:
            return "missing"
        return "surplus" if self.found.rows > self.expected.rows else "altered"


@dataclass(slots=True)
class Verdict:
    """What a comparison found."""

    days: int = 0
    rows: int = 0  #: of PostgreSQL, compared
    differences: list[Difference] = field(default_factory=list)  #: the first DIFFERENCES_KEPT
    differing: int = 0  #: device-days that differ, those repaired not among them
    repaired: int = 0
    #: table -> rows that ClickHouse holds more than once, until it merges; readers with FINAL do not see them
    unmerged: dict[str, int] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether both stores hold the same now."""
        return self.differing == 0

    def add(self, difference: Difference) -> None:
        """Count a difference, and list it where it is one of the first."""
        if difference.repaired:
            self.repaired += 1
        else:
            self.differing += 1
        if len(self.differences) < DIFFERENCES_KEPT:
            self.differences.append(difference)


#: Differences that are listed one by one; a table that is lost altogether is told by its number of them.
DIFFERENCES_KEPT: Final = 10_000

#: Says whether PostgreSQL has by now everything that sync had written when it was asked.
Settled = Callable[[Compared], Awaitable[bool]]
Progress = Callable[[int, int, str], None]  #: (days done, days, what is looked at)


def _datetime(us: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us)


def _day_us(day: date) -> int:
    return (day - date(1970, 1, 1)).days * DAY_US


class Verifier:
    """Compares, repairs and rebuilds. For one task at a time.

    Args:
        settings: where the stores are.
        settled: see `Settled`; without it nothing is ever deleted.
        settle_s: rows received less than so long ago are not compared.
    """

    def __init__(self, settings: Settings, *, settled: Settled | None = None, settle_s: float = SETTLE_S) -> None:
        self._settings = settings
        self._settled = settled
        self._settle_s = settle_s
        self._postgres: Any = None
        self._clickhouse = Maintenance(settings)

    async def __aenter__(self) -> "Verifier":
        """Connect.

        Raises:
            MigrationError: a store cannot be reached.
        """
        from preservarium.stores.migrate import connect_postgres

        self._postgres = await connect_postgres(self._settings)
        try:
            await self._postgres.execute("SET timezone = 'UTC'")
            # The optimiser's compiler costs more than it saves on an expression this long.
            await self._postgres.execute("SET jit = off")
            await self._clickhouse.connect()
        except BaseException:
            await self._postgres.close(timeout=5)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect."""
        await self._clickhouse.close()
        await self._postgres.close(timeout=5)

    # --- comparing

    def default_range(self) -> tuple[date, date]:
        """First and last day that PostgreSQL keeps whole of any table: [first, last]."""
        today = datetime.now(UTC).date()
        return min(self._first(table) for table in TABLES.values()), today + timedelta(days=1)

    def _first(self, table: Compared) -> date:
        """The first day that PostgreSQL keeps whole."""
        return datetime.now(UTC).date() - timedelta(days=table.kept_days(self._settings) - 1)

    async def verify_topic(
        self,
        replayed: topic_comparison.Replayed,
        ends: Mapping[int, int],
        verdict: Verdict,
        *,
        repair: bool = False,
        progress: Progress = lambda *_: None,
    ) -> None:
        """Compare a table with its topic, up to the offsets `ends` (by partition) that sync has written, and then what views have
        made of the table with all of it.

        Raises:
            VerificationError: Kafka or ClickHouse cannot be asked.
        """
        oldest_us = self._oldest_us(replayed)
        async for rows in topic_comparison.rows_of(self._settings, replayed, ends, progress):
            kept = [row for row in rows if row[replayed.at] >= oldest_us]
            verdict.rows += len(kept)
            if kept:
                for drift in await topic_comparison.compare(self._clickhouse, replayed, kept, repair=repair):
                    verdict.add(_difference(replayed.name, drift))
        for view in derived.DERIVED.get(replayed.name, ()):
            progress(0, 1, view.name)
            async for difference in self._view(view, [oldest_us], repair=repair):
                verdict.add(difference)
        progress(1, 1, "")

    async def replay(
        self, replayed: topic_comparison.Replayed, ends: Mapping[int, int], *, progress: Progress = lambda *_: None
    ) -> int:
        """Insert again all that a topic holds, and make anew what views have made of the table; rows. Raises as `verify_topic`.

        Rows that Kafka holds no more stay as they are.
        """
        oldest_us, rows = self._oldest_us(replayed), 0
        async for part in topic_comparison.rows_of(self._settings, replayed, ends, progress):
            await topic_comparison.insert(self._clickhouse, replayed, part)
            rows += len(part)
        for view in derived.DERIVED.get(replayed.name, ()):
            progress(0, 1, view.name)
            async for _ in self._view(view, [oldest_us], repair=True):
                pass
        return rows

    def _oldest_us(self, replayed: topic_comparison.Replayed) -> int:
        """Where ClickHouse keeps rows from; a day later, because it drops them at times of its own."""
        if not replayed.expires:
            return 0
        today = datetime.now(UTC).date()
        return max(0, _day_us(today - timedelta(days=self._settings.sync.retention_days - 1)))

    async def verify(
        self,
        tables: Sequence[Compared],
        first: date,
        last: date,
        *,
        repair: bool = False,
        progress: Progress = lambda *_: None,
    ) -> Verdict:
        """Compare the days from `first` to `last`, both included; repair what differs where `repair`.

        Raises:
            VerificationError: a store refuses a query.
        """
        verdict = Verdict(days=(last - first).days + 1)
        cutoff_us = time.time_ns() // 1_000 - round(self._settle_s * 1e6)
        days_us = [_day_us(first) + n * DAY_US for n in range(verdict.days)]
        total = sum(verdict.days + len(derived.DERIVED.get(table.name, ())) for table in tables)
        done = 0
        for table in tables:
            present = await self._present(table)
            for number in range(verdict.days):
                day = first + timedelta(days=number)
                progress(done, total, f"{table.name} {day}")
                if not present[0] <= days_us[number] < present[1]:
                    done += 1
                    continue
                async for difference in self._day(table, day, cutoff_us, verdict, repair=repair):
                    verdict.add(difference)
                done += 1
            # After the table that they are made of: a repair of it passes its views by.
            kept_us = [us for us in days_us if us >= _day_us(self._first(table))]
            for view in derived.DERIVED.get(table.name, ()) if kept_us else ():
                progress(done, total, view.name)
                async for difference in self._view(view, kept_us, repair=repair):
                    verdict.add(difference)
                done += 1
        progress(done, total, "")
        return verdict

    async def _present(self, table: Compared) -> tuple[int, int]:
        """[from, to) in µs, whole days, outside of which neither engine has rows that are to be compared."""
        first, last = _day_us(self._first(table)), _day_us(date(2100, 1, 1))
        if table.devices == "series":
            # Every day has readings, and looking for the first takes longer than counting a day.
            return first, last
        at = f"toUnixTimestamp64Micro({table.at})"
        ours, theirs = await asyncio.gather(
            self._fetch(f"SELECT min({epoch_us(table.at)}), max({epoch_us(table.at)}) FROM {table.devices}"),
            self._clickhouse.query(f"SELECT min({at}), max({at}) FROM {table.name} HAVING count() > 0"),
        )
        found = [row for row in (*ours, *theirs) if row[0] is not None]
        if not found:
            return first, first
        return (
            max(first, min(row[0] for row in found) // DAY_US * DAY_US),
            (max(row[1] for row in found) // DAY_US + 1) * DAY_US,
        )

    async def _view(
        self, view: derived.Newest | derived.Counts, days_us: Sequence[int], *, repair: bool
    ) -> AsyncIterator[Difference]:
        async for drift in derived.drifts(self._clickhouse, view, days_us, repair=repair, settle_s=VIEWS_SETTLE_S):
            yield _difference(view.name, drift)

    async def _day(
        self, table: Compared, day: date, cutoff_us: int, verdict: Verdict, *, repair: bool
    ) -> AsyncIterator[Difference]:
        from_us = _day_us(day)
        span = from_us, from_us + DAY_US
        (postgres, clickhouse), stored = await asyncio.gather(
            self._sums(table, span, cutoff_us), self._stored(table, span, cutoff_us)
        )
        verdict.rows += postgres.rows
        if postgres != clickhouse:
            async for device, ours, theirs in self._devices(table, span, cutoff_us):
                difference = Difference(table.name, device, day, ours, theirs)
                if repair:
                    await self._repair(table, difference, span, cutoff_us)
                yield difference
        surplus = stored - clickhouse.rows
        if surplus > 0:
            if repair:
                await self._clickhouse.command(
                    f"OPTIMIZE TABLE {table.name} PARTITION ID '{day.strftime(table.partition)}' FINAL"
                )
                surplus = await self._stored(table, span, cutoff_us)
                surplus -= (await self._clickhouse_sums(table, span, cutoff_us)).rows
            verdict.unmerged[table.name] = verdict.unmerged.get(table.name, 0) + surplus

    async def _sums(
        self, table: Compared, span: tuple[int, int], cutoff_us: int, device: str | None = None
    ) -> tuple[Sums, Sums]:
        return await asyncio.gather(
            self._postgres_sums(table, span, cutoff_us, device), self._clickhouse_sums(table, span, cutoff_us, device)
        )

    async def _postgres_sums(
        self, table: Compared, span: tuple[int, int], cutoff_us: int, device: str | None = None
    ) -> Sums:
        where, arguments = self._postgres_where(table, span, cutoff_us, device)
        row = await self._fetch(
            f"SELECT count(*), coalesce(sum({postgres_hash(table)}), 0)::text FROM {table.source} WHERE {where}",
            *arguments,
        )
        return Sums(row[0][0], int(row[0][1]))

    async def _clickhouse_sums(
        self, table: Compared, span: tuple[int, int], cutoff_us: int, device: str | None = None
    ) -> Sums:
        row = await self._clickhouse.query(
            f"SELECT count(), toString(sum(toInt256({clickhouse_hash(table)}))) FROM {table.name} FINAL"
            f" WHERE {self._clickhouse_where(table)}{'' if device is None else ' AND device_id = {device:String}'}",
            self._parameters(span, cutoff_us) | ({} if device is None else {"device": device}),
        )
        return Sums(row[0][0], int(row[0][1]))

    async def _stored(self, table: Compared, span: tuple[int, int], cutoff_us: int) -> int:
        """Rows of ClickHouse, those among them that a merge will remove."""
        row = await self._clickhouse.query(
            f"SELECT count() FROM {table.name} WHERE {self._clickhouse_where(table)}", self._parameters(span, cutoff_us)
        )
        return int(row[0][0])

    async def _devices(
        self, table: Compared, span: tuple[int, int], cutoff_us: int
    ) -> AsyncIterator[tuple[str, Sums, Sums]]:
        """Devices whose rows differ, in the order of their names' bytes, a range of them at a time."""
        low: str | None = None
        while True:
            high = await self._next_device(table, low)
            bounds = self._parameters(span, cutoff_us) | {"low": low or "", "high": high or ""}
            where, arguments = self._postgres_where(table, span, cutoff_us, None)
            device = table.postgres("device_id")
            if low is not None:
                arguments.append(low)
                where += f' AND {device} > ${len(arguments)} COLLATE "C"'
            if high is not None:
                arguments.append(high)
                where += f' AND {device} <= ${len(arguments)} COLLATE "C"'
            ours, theirs = await asyncio.gather(
                self._fetch(
                    f"SELECT {device}, count(*), sum({postgres_hash(table)})::text FROM {table.source}"
                    f" WHERE {where} GROUP BY 1",
                    *arguments,
                ),
                self._clickhouse.query(
                    f"SELECT device_id, count(), toString(sum(toInt256({clickhouse_hash(table)}))) FROM {table.name} FINAL"
                    f" WHERE {self._clickhouse_where(table)}"
                    f"{'' if low is None else ' AND device_id > {low:String}'}"
                    f"{'' if high is None else ' AND device_id <= {high:String}'} GROUP BY device_id",
                    bounds,
                ),
            )
            left = {r[0]: Sums(r[1], int(r[2])) for r in ours}
            right = {r[0]: Sums(r[1], int(r[2])) for r in theirs}
            for name in sorted(left.keys() | right.keys(), key=str.encode):
                if left.get(name) != right.get(name):
                    yield name, left.get(name, Sums()), right.get(name, Sums())
            if high is None:
                return
            low = high

    async def _next_device(self, table: Compared, low: str | None) -> str | None:
        """The last name of the next range; None where the range is the last."""
        rows = await self._fetch(
            f'SELECT device_id FROM (SELECT DISTINCT device_id COLLATE "C" AS device_id FROM {table.devices}'
            f' WHERE $1::text IS NULL OR device_id > $1 COLLATE "C") s ORDER BY 1 OFFSET {DEVICES_MAX - 1} LIMIT 1',
            low,
        )
        return rows[0][0] if rows else None

    # --- repairing

    async def _repair(self, table: Compared, difference: Difference, span: tuple[int, int], cutoff_us: int) -> None:
        for _ in range(PASSES_MAX):
            await self._repair_range(table, difference, span, cutoff_us)
            ours, theirs = await self._sums(table, span, cutoff_us, difference.device_id)
            if ours == theirs:
                difference.repaired = True
                log.info("device_day_repaired", table=table.name, device_id=difference.device_id, day=str(difference.day),
                         inserted=difference.inserted, deleted=difference.deleted)  # fmt: skip
                return
            if difference.kept:
                return

    async def _repair_range(
        self, table: Compared, difference: Difference, span: tuple[int, int], cutoff_us: int
    ) -> None:
        """Halve the time until what differs is short enough to be compared row by row."""
        ours, theirs = await self._sums(table, span, cutoff_us, difference.device_id)
        if ours == theirs:
            return
        if max(ours.rows, theirs.rows) > ROWS_MAX and span[1] - span[0] > 1:
            middle = (span[0] + span[1]) // 2
            await self._repair_range(table, difference, (span[0], middle), cutoff_us)
            await self._repair_range(table, difference, (middle, span[1]), cutoff_us)
            return
        await self._repair_rows(table, difference, span, cutoff_us)

    async def _repair_rows(
        self, table: Compared, difference: Difference, span: tuple[int, int], cutoff_us: int
    ) -> None:
        device = difference.device_id
        theirs = {
            tuple(r[:-1]): r[-1]
            for r in await self._clickhouse.query(
                f"SELECT {self._clickhouse_key(table)}, {clickhouse_hash(table)} FROM {table.name} FINAL"
                f" WHERE {self._clickhouse_where(table)} AND device_id = {{device:String}}",
                self._parameters(span, cutoff_us) | {"device": device},
            )
        }
        ours = await self._postgres_rows(table, span, cutoff_us, device)
        right = [row for key, (hashed, row) in ours.items() if theirs.get(key) != hashed]
        wrong = [(*key, hashed) for key, hashed in theirs.items() if key not in ours or ours[key][0] != hashed]
        if wrong:
            if self._settled is not None and await self._settled(table):
                # What the sink has stored since is no surplus.
                ours = await self._postgres_rows(table, span, cutoff_us, device)
                right = [row for key, (hashed, row) in ours.items() if theirs.get(key) != hashed]
                wrong = [w for w in wrong if w[:-1] not in ours or ours[w[:-1]][0] != w[-1]]
            else:
                difference.kept += len(wrong)
                stay = {w[:-1] for w in wrong}
                right = [row for key, (_, row) in ours.items() if key not in theirs and key not in stay]
                wrong = []
        if right:
            await self._clickhouse.insert(table.name, table.types, [table.columns(row) for row in right])
            difference.inserted += len(right)
        for start in range(0, len(wrong), DELETE_ROWS_MAX):
            part = wrong[start : start + DELETE_ROWS_MAX]
            listed = ", ".join("(" + ", ".join(literal(v) for v in row) + ")" for row in part)
            await self._clickhouse.command(
                f"DELETE FROM {table.name} WHERE device_id = {literal(device)}"
                f" AND {table.at} >= fromUnixTimestamp64Micro({span[0]}, 'UTC')"
                f" AND {table.at} < fromUnixTimestamp64Micro({span[1]}, 'UTC')"
                f" AND ({self._clickhouse_key(table)}, {clickhouse_hash(table)}) IN ({listed})"
            )
            difference.deleted += len(part)

    async def _postgres_rows(
        self, table: Compared, span: tuple[int, int], cutoff_us: int, device: str
    ) -> dict[tuple[Any, ...], tuple[int, Any]]:
        """Key -> (hash, row)."""
        where, arguments = self._postgres_where(table, span, cutoff_us, device)
        key = ", ".join(f"({table.postgres(name)})::text AS key_{n}" for n, name in enumerate(table.key))
        rows = await self._fetch(
            f"SELECT {key}, {epoch_us(table.postgres(table.at))} AS key_at, {postgres_hash(table)} AS hashed, {table.select}"
            f" FROM {table.source} WHERE {where}",
            *arguments,
        )
        names = [f"key_{n}" for n in range(len(table.key))]
        return {(*(r[n] for n in names), r["key_at"]): (r["hashed"], r) for r in rows}

    # --- rebuilding

    async def rebuild(
        self, table: Compared, first: date, last: date, *, progress: Progress = lambda *_: None
    ) -> dict[str, int]:
        """Make the partitions that lie in [first, last] anew from PostgreSQL; partition id -> rows.

        The tables that views fill from it follow. A partition of which PostgreSQL has nothing stays as it is. Interrupted, it can be started again from the partition
        that it was at: those before it are done, and that one is as it was.

        Raises:
            VerificationError: a store refuses a statement.
        """
        shadow = f"{table.name}_rebuild"
        partitions = _partitions(table, max(first, self._first(table)), last)
        made: dict[str, int] = {}
        await self._clickhouse.command(f"DROP TABLE IF EXISTS {shadow} SYNC")
        engine = (
            await self._clickhouse.query(
                "SELECT engine_full FROM system.tables WHERE database = currentDatabase() AND name = {n:String}",
                {"n": table.name},
            )
        )[0][0]
        try:
            for number, (identity, from_us, to_us) in enumerate(partitions):
                progress(number, len(partitions), f"{table.name} {identity}")
                await self._clickhouse.command(
                    f"CREATE TABLE IF NOT EXISTS {shadow} AS {table.name} ENGINE = {unreplicated(engine)}"
                )
                started_us = time.time_ns() // 1_000
                rows = await self._fill(table, shadow, (from_us, to_us))
                if rows:
                    since_us = started_us - round(SETTLE_S * 1e6)
                    await self._clickhouse.command(
                        f"INSERT INTO {shadow} SELECT * FROM {table.name}"
                        f" WHERE {table.at} >= fromUnixTimestamp64Micro({from_us}, 'UTC')"
                        f" AND {table.at} < fromUnixTimestamp64Micro({to_us}, 'UTC')"
                        f" AND {table.received} >= fromUnixTimestamp64Micro({since_us}, 'UTC')",
                        insert_deduplication_token=new_token(),
                    )
                    await self._clickhouse.command(
                        f"ALTER TABLE {table.name} REPLACE PARTITION ID '{identity}' FROM {shadow}"
                    )
                    # What is replaced passes the views by.
                    for view in derived.DERIVED.get(table.name, ()):
                        async for _ in self._view(view, range(from_us, to_us, DAY_US), repair=True):
                            pass
                    made[identity] = rows
                    log.info("partition_rebuilt", table=table.name, partition=identity, rows=rows)
                await self._clickhouse.command(f"DROP TABLE IF EXISTS {shadow} SYNC")
        finally:
            await self._clickhouse.command(f"DROP TABLE IF EXISTS {shadow} SYNC")
        progress(len(partitions), len(partitions), "")
        return made

    async def _fill(self, table: Compared, target: str, span: tuple[int, int]) -> int:
        where, arguments = self._postgres_where(table, span, None, None)
        rows = 0
        waiting: list[list[Any]] = []
        # Read only, one picture: rows that come meanwhile are taken from ClickHouse afterwards.
        async with self._postgres.transaction(isolation="repeatable_read", readonly=True):
            query = f"SELECT {table.select} FROM {table.source} WHERE {where}"
            async for row in self._postgres.cursor(query, *arguments, prefetch=FETCH_ROWS, timeout=STATEMENT_S):
                waiting.append(table.columns(row))
                if len(waiting) >= INSERT_ROWS_MAX:
                    await self._clickhouse.insert(target, table.types, waiting)
                    rows += len(waiting)
                    waiting = []
        if waiting:
            await self._clickhouse.insert(target, table.types, waiting)
        return rows + len(waiting)

    # --- both engines

    def _postgres_where(
        self, table: Compared, span: tuple[int, int], cutoff_us: int | None, device: str | None
    ) -> tuple[str, list[Any]]:
        at = table.postgres(table.at)
        where, arguments = f"{at} >= $1 AND {at} < $2", [_datetime(span[0]), _datetime(span[1])]
        values: list[Any] = arguments
        if cutoff_us is not None:
            values.append(_datetime(cutoff_us))
            where += f" AND {table.postgres(table.received)} < ${len(values)}"
        if device is not None:
            values.append(device)
            where += f" AND {table.postgres('device_id')} = ${len(values)}"
        return where, values

    @staticmethod
    def _clickhouse_where(table: Compared) -> str:
        return (
            f"{table.at} >= fromUnixTimestamp64Micro({{from:Int64}}, 'UTC') AND {table.at} <"
            f" fromUnixTimestamp64Micro({{to:Int64}}, 'UTC') AND {table.received} <"
            f" fromUnixTimestamp64Micro({{cutoff:Int64}}, 'UTC')"
        )

    @staticmethod
    def _parameters(span: tuple[int, int], cutoff_us: int) -> dict[str, Any]:
        return {"from": span[0], "to": span[1], "cutoff": cutoff_us}

    @staticmethod
    def _clickhouse_key(table: Compared) -> str:
        return ", ".join([*(f"toString({name})" for name in table.key), f"toUnixTimestamp64Micro({table.at})"])

    async def _fetch(self, query: str, *arguments: Any) -> list[Any]:
        import asyncpg

        try:
            rows: list[Any] = await self._postgres.fetch(query, *arguments, timeout=STATEMENT_S)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as e:
            message = f"PostgreSQL: {reason(e)}"
            raise VerificationError(message) from e
        return rows


def _difference(table: str, drift: derived.Drift) -> Difference:
    day = _datetime(drift.at_us).date()
    return Difference(table, drift.owner, day, Sums(drift.expected), Sums(drift.found), repaired=drift.repaired)


def _partitions(table: Compared, first: date, last: date) -> list[tuple[str, int, int]]:
    """(id, from, to in µs) of the partitions that lie wholly in [first, last], in order."""
    found: list[tuple[str, int, int]] = []
    day = first
    while day <= last:
        if table.partition == "%Y%m":
            begin = day.replace(day=1)
            end = (begin + timedelta(days=32)).replace(day=1)
        else:
            begin, end = day, day + timedelta(days=1)
        if begin >= first and (end - timedelta(days=1) <= last or end > datetime.now(UTC).date()):
            found.append((begin.strftime(table.partition), _day_us(begin), _day_us(end)))
        day = end
    return found


_REPLICATED: Final = re.compile(r"^Replicated(\w*MergeTree)(?:\('[^']*',\s*'[^']*'(?:,\s*)?)?")


def unreplicated(engine: str) -> str:
    """An engine as `system.tables` gives it, without replication: a shadow is filled and gone before a replica would have it."""
    match = _REPLICATED.match(engine)
    if match is None:
        return engine
    rest = engine[match.end() :]
    had_arguments = match[0].endswith(("'", ",", " "))
    # 'path', 'replica' were the first arguments; what is left of the list follows.
    return f"{match[1]}({rest}" if had_arguments else f"{match[1]}{rest}"
