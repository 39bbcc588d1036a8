"""What a stage is: a handler from a batch to its effects. Feeds run it; the handler itself sends nothing.

The order in which a feed carries out effects is what makes a crash harmless:

1. every send is acknowledged by Kafka,
2. then the state is written (changelog acknowledged, then RocksDB),
3. then the batch is acknowledged.

A crash before 2 runs the batch again on the old state and sends the same records again (same coordinates, so the next
stage skips them). A crash after 2 runs it on the new state, whose watermark says that everything was sent.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from preservarium import topics
from preservarium.errors import Fatal
from preservarium.topics import Topic
from preservarium.waiting import alive


class Record(Protocol):
    """A Kafka record as the feeds hand it over (aiokafka's parsed record and its ConsumerRecord have this shape)."""

    @property
    def offset(self) -> int: ...  # noqa: D102
    @property
    def timestamp(self) -> int: ...  # noqa: D102  # ms since the epoch
    @property
    def key(self) -> bytes | None: ...  # noqa: D102
    @property
    def value(self) -> bytes | None: ...  # noqa: D102
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive records of one partition, in offset order, never empty."""

    topic: str  #: declared name, without prefix
    partition: int
    records: Sequence[Record]

    def part(self, records: Sequence[Record]) -> "Batch":
        """Some of the batch's records, as a batch."""
        return Batch(self.topic, self.partition, records)


@dataclass(slots=True)  # not frozen: that costs a microsecond for each of them
class Send:
    """A record to produce."""

    topic: Topic
    key: bytes | None
    value: bytes | None
    partition: int | None = None  #: None: murmur2(key) % partitions
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp_ms: int | None = None


@dataclass(slots=True)
class Effects:
    """Everything that a batch causes."""

    sends: list[Send] = field(default_factory=list)
    #: table name -> key -> new value (None deletes); always of the batch's partition
    puts: dict[str, dict[bytes, bytes | None]] = field(default_factory=dict)
    #: run in order after the batch is acknowledged: for caches; must not raise
    after: list[Callable[[], None]] = field(default_factory=list)
    #: reason code -> records refused, for the fuse and the metrics
    refused: dict[str, int] = field(default_factory=dict)

    def put(self, table: str, key: bytes, value: bytes | None) -> None:
        """Write `value` under `key` once the sends are acknowledged."""
        self.puts.setdefault(table, {})[key] = value


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes for one partition: what a stage does when no record comes."""

    partition: int
    now_us: int  #: the worker's clock, µs since the epoch, UTC
    first: bool  #: the first since the partition was assigned: what memory says of its state may be stale
    behind: bool  #: records wait to be handled, here or in a stage before this one, so silence says nothing
    #: everything that Kafka held then has been handled, µs by the worker's clock; None: as of `now_us`, unless `behind`
    handled_us: int | None = None


#: How a stage with a consumer group of its own knows after a crash where it stood; in the words of the documentation.
PLANNED: Final = "bounds of the batch under way, beside the group's offset"
STORED: Final = "offsets in the database, with the rows"


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a stage says of itself. The app holds it to that, and docs/reference/stages.md is made of it."""

    name: str
    topic: Topic  #: what it reads
    writes: tuple[Topic | str, ...] = ()  #: besides iot_errors; a text is a place outside of Kafka
    state: str | None = None  #: the one table that it may put to
    group: str = ""  #: suffix of a consumer group of its own; empty: the app's
    remembers: str = ""  #: PLANNED, STORED or nothing but the group's offset

    def check_sends(self, sends: Iterable[Send]) -> None:
        """Every record must be for a declared topic.

        Raises:
            Fatal: one is not: what the stage does and what is known of it differ.
        """
        allowed = {topic.name for topic in (*self.writes, topics.ERRORS) if isinstance(topic, Topic)}
        if undeclared := {send.topic.name for send in sends} - allowed:
            message = f"stage {self.name} does not declare that it writes {', '.join(sorted(undeclared))}"
            raise Fatal(message)

    def check_put(self, table: str) -> None:
        """State must be put to the declared table.

        Raises:
            Fatal: it is for another one, whose stages know nothing of this one.
        """
        if table != self.state:
            message = f"stage {self.name} does not declare the state {table}, and may not write it"
            raise Fatal(message)


#: One partition at a time: agents that own tables.
Handler = Callable[[Batch], Awaitable[Effects]]
#: In turn with the batches of its partition; must be harmless to repeat.
TickHandler = Callable[[Tick], Awaitable[Effects]]
#: Several partitions at once: agents that write to a store and have a consumer group of their own.
GroupHandler = Callable[[Sequence[Batch]], Awaitable[Effects]]

#: Records between two turns of the event loop: some 5 ms of work at a few readings a record.
RECORDS_A_TURN: Final = 250

#: Records that are parsed, taken and freed before the next, so that what they are made of stays in the processor's cache: a batch
#: of a thousand messages is some 5 MB of objects, and takes twice the time.
RECORDS_AT_ONCE: Final = 50

_T = TypeVar("_T")


async def in_turns(items: Iterable[_T], a_turn: int = RECORDS_A_TURN) -> AsyncIterator[_T]:
    """The items, in their order, with a turn of the event loop after every `a_turn` of them."""
    for number, item in enumerate(items, 1):
        yield item
        if number % a_turn == 0:
            alive()
            await asyncio.sleep(0)
