"""Whether stored readings come out of their raw bytes bit by bit as they are stored: all of a time, or a sample.

All of them are read in the order of their raw coordinates, so that each raw record is fetched once and Kafka is read from its
beginning to its end. A sample is drawn series by series, and its records are sought one by one. Memory depends on neither.

What Kafka holds no more cannot be verified and is counted as such, as is what other messages decided, too.
"""

import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

from preservarium import topics
from preservarium.domain.quality.rederivation import Status, StoredReading
from preservarium.domain.readings import legacy
from preservarium.operations.raw_records import Records
from preservarium.operations.rederive import LEARNT_US, Rederiver, Verdict
from preservarium.operations.trace import full_name
from preservarium.settings import Settings
from preservarium.stores import lineage
from preservarium.stores.registry_past import Past

#: Readings that are derived at once: some 5 MB with their records.
ROWS_AT_ONCE: Final = 2_000
#: Differences that are listed one by one.
EXAMPLES_MAX: Final = 20
#: Draws for a sample: several may meet one row, and then it is drawn again. Of few rows a sample may stay short.
ROUNDS_MAX: Final = 20

Progress = Callable[[int, int, str], None]  #: (readings done, readings, what is looked at)


@dataclass(frozen=True, slots=True)
class Example:
    """A reading that came out otherwise."""

    reading: StoredReading
    verdict: Verdict


@dataclass(slots=True)
class Report:
    """What a verification found."""

    from_us: int
    to_us: int
    stored: int = 0  #: readings that are stored in this time; of a sample, that were to be drawn
    identical: int = 0
    different: int = 0
    unverifiable: Counter[str] = field(default_factory=Counter)  #: why -> readings
    examples: list[Example] = field(default_factory=list)  #: the first that are different

    @property
    def checked(self) -> int:
        """Readings that were looked at."""
        return self.identical + self.different + self.unverifiable.total()

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.different == 0

    def add(self, reading: StoredReading, verdict: Verdict) -> None:
        """Count a reading."""
        if verdict.status is Status.IDENTICAL:
            self.identical += 1
        elif verdict.status is Status.DIFFERENT:
            self.different += 1
            if len(self.examples) < EXAMPLES_MAX:
                self.examples.append(Example(reading, verdict))
        else:
            self.unverifiable[str(verdict.why)] += 1

    def share(self, count: int) -> float:
        """A count as a share of what was looked at; 0 where nothing was."""
        return count / self.checked if self.checked else 0.0


class Checker:
    """Verifies stored readings. For one task at a time.

    Args:
        settings: where Kafka is, and limits.
        connection: of asyncpg, for the readings; in no transaction.
        registry: another one, because the first is in the middle of an answer while the registry is asked.
    """

    def __init__(self, settings: Settings, connection: Any, registry: Any) -> None:
        self._settings = settings
        self._connection = connection
        self._past = Past(registry)

    async def check(
        self, from_us: int, to_us: int, *, sample: int | None, progress: Progress = lambda *_: None
    ) -> Report:
        """Verify the readings of a time.

        Args:
            from_us: the device's time of the first, µs since the epoch, UTC.
            to_us: of the last.
            sample: so many, drawn by chance; None: all.
            progress: told how far it is.

        Raises:
            RecordsError: Kafka cannot be asked.
        """
        report = Report(from_us, to_us)
        # What was sent late was received in the time; what the device dates ahead, before it.
        await self._past.prepare(from_us - 2 * LEARNT_US)
        rederiver = Rederiver(self._settings, self._past)
        try:
            async with Records(self._settings) as records:
                if sample is None:
                    report.stored = await lineage.count(self._connection, from_us, to_us)
                    rows = lineage.all_rows(self._connection, from_us, to_us, ROWS_AT_ONCE)
                else:
                    report.stored = sample
                    rows = self._sample(from_us, to_us, sample)
                progress(0, report.stored, "")
                async with aclosing(rows):
                    async for some in rows:
                        await self._verify(records, rederiver, some, report)
                        progress(report.checked, max(report.stored, report.checked), _where(some[-1]))
                if sample is not None:
                    report.stored = report.checked
        finally:
            await rederiver.close()
        return report

    async def _verify(
        self, records: Records, rederiver: Rederiver, rows: Sequence[StoredReading], report: Report
    ) -> None:
        ordered = sorted(rows, key=lambda row: (row.parser == legacy.PARSER, row.raw))
        for (old, partition), group in groupby(
            ordered, key=lambda row: (row.parser == legacy.PARSER, row.raw.partition)
        ):
            some = list(group)
            full = full_name(self._settings, topics.DECODED if old else topics.RAW)
            found: Mapping[int, Any] = await records.at(full, partition, {row.raw.offset for row in some})
            pairs = [(row, found.get(row.raw.offset)) for row in some]
            for row, verdict in zip(some, await rederiver.verify_many(pairs), strict=True):
                report.add(row, verdict)

    async def _sample(self, from_us: int, to_us: int, sample: int) -> AsyncGenerator[list[StoredReading], None]:
        """Readings drawn by chance: of series drawn by chance, each at an instant drawn by chance."""
        found = await lineage.drawn_series(self._connection, sample)
        series = [(one, min(to_us, newest)) for one, newest in found if newest >= from_us]
        seen: set[tuple[str, str, str, str, int]] = set()
        if not series:
            return
        for _ in range(ROUNDS_MAX):
            missing = sample - len(seen)
            for start in range(0, missing, ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, missing - start)
                chosen = random.choices(series, k=count)
                drawn = [(one, random.randint(from_us, end)) for one, end in chosen]
                fresh = []
                for row in await lineage.sampled(self._connection, drawn, from_us, to_us):
                    key = row.device_id, row.component_type, row.pin_position, row.connector_mode, row.timestamp
                    if key not in seen:
                        seen.add(key)
                        fresh.append(row)
                if fresh:
                    yield fresh
            if len(seen) >= sample:
                return


def _where(row: StoredReading) -> str:
    return f"raw {row.raw.partition}:{row.raw.offset}"
