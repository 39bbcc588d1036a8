"""A log of records in a file, in the place of Kafka, for what the archive does between a log and its own files and index.

What it stands in for are the few questions that `Records` asks a broker; tests/integration/archive/test_archive.py asks a real one. It lies in
a file, because a process that is killed has to have the same one.
"""

import pickle
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import asyncpg
import duckdb
import pytest

from preservarium import topics
from preservarium.operations.raw_records import Span
from preservarium.settings import Settings

PARTITIONS: Final = 3
#: Environment variable of a process that is to use one.
VARIABLE: Final = "TEST_ARCHIVE_LOG"


class Logged(NamedTuple):
    """A record."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]


class Log:
    """Partitions of one topic; offsets go on where records are deleted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            self._write({p: (0, 0, []) for p in range(PARTITIONS)})

    def _read(self) -> dict[int, tuple[int, int, list[Logged]]]:
        found: dict[int, tuple[int, int, list[Logged]]] = pickle.loads(self.path.read_bytes())
        return found

    def _write(self, state: dict[int, tuple[int, int, list[Logged]]]) -> None:
        self.path.write_bytes(pickle.dumps(state))

    def add(
        self, partition: int, *records: tuple[int, bytes | None, bytes | None, tuple[Any, ...]], skip: int = 0
    ) -> None:
        """Append (time in ms, key, value, headers); `skip`: offsets before them at which nothing stands."""
        state = self._read()
        begin, end, there = state[partition]
        for n, (at, key, value, headers) in enumerate(records):
            there.append(Logged(end + skip + n, at, key, value, headers))
        state[partition] = begin, end + skip + len(records), there
        self._write(state)

    def send(self, count: int, at_ms: int = 1_764_547_200_000) -> None:
        """Records of every kind that a topic may hold, in turn to the partitions."""
        for n in range(count):
            key = (b"k", None, b"")[n % 3]
            value = (b"\x00\xff" * n, None, b"line\nline", b'{"device":"d","payload":{"t":%d}}' % n, b"")[n % 5]
            headers = ((), (("attempt", b"2"),), (("x", b""), ("x", b"\xff"), ("é", None)))[n % 3]
            self.add(n % PARTITIONS, (at_ms + n, key, value, headers))

    def delete(self, before: int | None = None) -> None:
        """As retention does."""
        state = self._read()
        for p, (begin, end, there) in state.items():
            first = end if before is None else max(begin, min(before, end))
            state[p] = first, end, [r for r in there if r.offset >= first]
        self._write(state)

    def spans(self) -> dict[int, tuple[int, int]]:
        """Beginning and end of each partition."""
        return {p: (begin, end) for p, (begin, end, _) in self._read().items()}

    def records(self) -> dict[tuple[int, int], Logged]:
        """By coordinates."""
        return {(p, r.offset): r for p, (_, _, there) in self._read().items() for r in there}

    def install(self) -> pytest.MonkeyPatch:
        """Have the archive read this one; to be undone."""
        from preservarium.operations.archive import archiver, standing

        log = self

        class Records:
            def __init__(self, settings: Settings, *, archived: bool = True) -> None:
                assert not archived

            async def __aenter__(self) -> "Records":
                return self

            async def __aexit__(self, *_: object) -> None:
                return None

            async def partitions(self, topic: str) -> frozenset[int]:
                return frozenset(range(PARTITIONS)) if topic.endswith(topics.RAW.name) else frozenset()

            async def span(self, topic: str, partition: int, *, again: bool = False) -> Span | None:
                return Span(*log.spans()[partition])

            async def between(self, topic: str, partition: int, begin: int, end: int) -> AsyncIterator[Sequence[Any]]:
                found = [r for (p, o), r in sorted(log.records().items()) if p == partition and begin <= o < end]
                for start in range(0, len(found), 7):
                    yield found[start : start + 7]

        patch = pytest.MonkeyPatch()
        patch.setattr(archiver, "Records", Records)
        patch.setattr(standing, "Records", Records)
        return patch


def archived(folder: Path) -> dict[tuple[int, int], Logged]:
    """What the files of a folder have, by coordinates, as DuckDB reads them; that an offset is in two of them fails."""
    found: dict[tuple[int, int], Logged] = {}
    if not any(folder.rglob("*.parquet")):
        return found
    rows = duckdb.sql(
        'SELECT partition, "offset", epoch_ms(kafka_time), key, value, headers FROM'
        f" read_parquet('{folder}/**/*.parquet', hive_partitioning = true)"
    ).fetchall()
    for partition, offset, at, key, value, headers in rows:
        assert (partition, offset) not in found, f"{partition}:{offset} is in two files"
        found[partition, offset] = Logged(offset, at, key, value, tuple((h["name"], h["value"]) for h in headers or ()))
    return found


async def execute(dsn: str, statement: str, *arguments: Any) -> Any:
    """What a statement gives."""
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(statement, *arguments)
    finally:
        await connection.close()
