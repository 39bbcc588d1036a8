"""Segments of the archive: ranges of offsets of one partition, each a file whose name says which, and where one ends.

A path is `topic=…/epoch=…/day=YYYY-MM-DD/partition=…/FIRST-NEXT-HASH.parquet`: what DuckDB and ClickHouse read as columns, and enough
to make the index anew. HASH is of the file's bytes, so that two workers that write one name write one content.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from typing import Any, Final

#: Characters of the file's SHA-256 in its name.
HASH_CHARS: Final = 16
SUFFIX: Final = ".parquet"
#: A record's time may be this far ahead of the clock and still begin a day: producers' clocks differ.
AHEAD_MAX_MS: Final = 3_600_000
#: Latest day that Python's dates can say; a record may have any time.
_TIME_MAX_MS: Final = 253_402_300_799_999

_PATH: Final = re.compile(
    r"topic=(?P<topic>[A-Za-z0-9._-]{1,249})/epoch=(?P<epoch>\d{1,7})/day=(?P<day>\d{4}-\d\d-\d\d)/partition=(?P<partition>\d{1,10})/"
    r"(?P<first>\d{20})-(?P<next>\d{20})-(?P<hash>[0-9a-f]{16})\.parquet"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the archive."""

    topic: str  #: declared name
    epoch: int
    partition: int
    first: int  #: offset of the first record that may be in it
    next: int  #: the offset that it ends before
    day: str  #: ISO 8601
    records: int
    value_bytes: int  #: of keys and values
    file_bytes: int
    sha256: str  #: of the file, hexadecimal
    min_time_ms: int  #: Kafka's time of the oldest record
    max_time_ms: int

    @property
    def path(self) -> str:
        """Where it lies, below the archive's URL."""
        name = f"{self.first:020d}-{self.next:020d}-{self.sha256[:HASH_CHARS]}{SUFFIX}"
        return f"{folder(self.topic, self.epoch, self.day, self.partition)}/{name}"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Segment":
        """What `document` gave."""
        return cls(**document)


@dataclass(frozen=True, slots=True)
class Named:
    """What a path says."""

    topic: str
    epoch: int
    day: str
    partition: int
    first: int
    next: int
    hash: str


def folder(topic: str, epoch: int, day: str, partition: int) -> str:
    """The folder of a day's files of a partition."""
    return f"topic={topic}/epoch={epoch}/day={day}/partition={partition}"


def named(path: str) -> Named | None:
    """What a path below the archive's URL says; None where it is none of ours."""
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    try:
        date.fromisoformat(found["day"])
    except ValueError:
        return None
    first, next_ = int(found["first"]), int(found["next"])
    if first >= next_:
        return None
    return Named(
        found["topic"], int(found["epoch"]), found["day"], int(found["partition"]), first, next_, found["hash"]
    )


def day_of(time_ms: int) -> str:
    """The day, UTC, of a record's time; times that no calendar has count as the nearest that it has."""
    at = datetime.fromtimestamp(min(max(time_ms, 0), _TIME_MAX_MS) // 1000, UTC)
    return at.date().isoformat()


def first_day(time_ms: int, before: str | None, now_ms: int) -> str:
    """The day of a segment that begins with a record of this time.

    Days of a partition do not go back, and a producer whose clock is far ahead does not take them along: so each day's files are
    next to each other in the order of offsets, and a stray record makes no file of its own. What times a file has is in the index.

    Args:
        time_ms: of the record.
        before: the day of the segment before; None: there is none.
        now_ms: the clock.
    """
    day = day_of(min(time_ms, now_ms + AHEAD_MAX_MS))
    return day if before is None or day > before else before


def ends_day(time_ms: int, day: str, now_ms: int) -> bool:
    """Whether a record of this time begins another day's segment."""
    return time_ms <= now_ms + AHEAD_MAX_MS and day_of(time_ms) > day
