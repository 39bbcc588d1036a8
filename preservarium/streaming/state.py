"""State tables: Faust Tables (recovery, changelog, standby, `faust tables` stay stock) with our own way of writing.

Stock Faust writes RocksDB first and lets the changelog follow unseen; a crash between loses the change for the next
owner. `put_many` sends the changelog, waits for its acknowledgement, and then writes RocksDB together with the changelog
offset, in one RocksDB batch: at every instant the changelog holds at least what the local store holds. A worker that does not
own the partition any more cannot write: fencing.py.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn, Protocol

import orjson
import rocksdict
import structlog
from faust.stores.rocksdb import RocksDBOptions

from preservarium import metrics
from preservarium.errors import Fatal, Retry
from preservarium.streaming.fencing import FENCE_HEADER, FENCE_KEY, Change
from preservarium.streaming.local_store import Store

log = structlog.get_logger(__name__)

#: RocksDB keeps one database a table and partition; a worker owns 7 tables × 12 partitions, or more. Faust's defaults would
#: give each 2 GiB of cache and 192 MiB of write buffers. All of a worker's share one cache instead, which also counts their
#: indexes, filters and what is not on disk yet. What is read again soon is hit; the rest is in the operating system's cache.
MEMORY_BYTES_MAX: Final = 128 << 20
#: Of it for what is not on disk yet: beyond, the table that is written to next writes its part out.
UNWRITTEN_BYTES_MAX: Final = 48 << 20
ROCKSDB_OPTIONS: Final[Mapping[str, Any]] = {
    "write_buffer_size": 4 << 20,
    "max_write_buffer_number": 2,
    "target_file_size_base": 16 << 20,
    "max_open_files": 128,
    "bloom_filter_size": 10,
}
#: Values of a stale worker that are written over in one go.
REPAIRS_AT_ONCE: Final = 500
#: A buffer grows by so much; RocksDB's own eighth of it, times some hundred tables, would be the whole limit.
_ARENA_BYTES: Final = 64 << 10


Headers = tuple[tuple[str, bytes], ...]


class SharedMemory(RocksDBOptions):
    """Faust's options of a RocksDB table, with one limit of memory for all tables that are opened with them."""

    def __init__(self) -> None:
        super().__init__(**ROCKSDB_OPTIONS)
        self.cache = rocksdict.Cache(MEMORY_BYTES_MAX)
        self.unwritten = rocksdict.WriteBufferManager.new_write_buffer_manager_with_cache(
            UNWRITTEN_BYTES_MAX, allow_stall=False, cache=self.cache
        )

    def as_options(self) -> Any:
        """The options of one more database."""
        options = super().as_options()
        blocks = rocksdict.BlockBasedOptions()
        blocks.set_bloom_filter(self.bloom_filter_size, False)
        blocks.set_block_cache(self.cache)
        blocks.set_cache_index_and_filter_blocks(True)
        blocks.set_pin_l0_filter_and_index_blocks_in_cache(True)
        options.set_block_based_table_factory(blocks)
        options.set_write_buffer_manager(self.unwritten)
        options.set_arena_block_size(_ARENA_BYTES)
        return options


class Appending(Protocol):
    """What a state table needs of a publisher."""

    async def append(
        self, topic: str, partition: int, items: Sequence[tuple[bytes, bytes | None]], headers: Headers = ()
    ) -> int | None:
        """Produce to one partition; the offset of the last record when all are acknowledged."""
        ...


#: Records of a topic's partition from one offset to another, read anew: (topic, partition, first, end or None for all there is).
ReadSpan = Callable[[str, int, int, int | None], Awaitable[list[Change]]]


class Table(Protocol):
    """What a stage reads of its state; it writes by its effects."""

    @property
    def name(self) -> str:
        """Of the table."""
        ...

    def get(self, partition: int, key: bytes) -> bytes | None:
        """The value of a key."""
        ...

    def items(self, partition: int) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value of a partition."""
        ...


def load_state(
    value: bytes | None, version: int, upgrades: Mapping[int, Callable[[dict[str, Any]], None]] = MappingProxyType({})
) -> dict[str, Any] | None:
    """A state document.

    Args:
        value: as it was stored.
        version: that this worker reads and writes.
        upgrades: older version -> what brings a document of it to `version`, in place.

    Raises:
        Fatal: it is of another version: an older worker must not overwrite what a newer one wrote.
    """
    if value is None:
        return None
    document: dict[str, Any] = orjson.loads(value)
    if (upgrade := upgrades.get(document.get("v", version))) is not None:
        upgrade(document)
    if document.get("v") != version:
        message = f"state of version {document.get('v')}, this worker reads version {version}: use one release"
        raise Fatal(message)
    return document


@dataclass(slots=True)
class _Turn:
    """This worker's right to write a partition of a table."""

    fence: int  #: offset of its fence
    generation: int  #: of the consumer group, when it was assigned
    restored: bool = False  #: the store holds everything up to the fence


class StateTable:
    """Bytes by key, a store for each partition; only the stage that owns the partition writes.

    A partition is owned from `restored` to `revoked`, and proves it with every write (fencing.py).
    """

    def __init__(self, table: Any, publisher: Appending, read_span: ReadSpan, *, key: str = "") -> None:
        self.table = table
        self.key = key  #: what the key is, in words
        self._publisher = publisher
        self._read_span = read_span
        self._turns: dict[int, _Turn] = {}
        #: partition -> its writes, and its repairs, one after the other
        self._writing: dict[int, asyncio.Lock] = {}

    @property
    def name(self) -> str:
        """The table's name."""
        return str(self.table.name)

    @property
    def changelog(self) -> str:
        """The full name of its changelog topic."""
        return str(self.table.changelog_topic_name)

    def share(self, memory: SharedMemory) -> None:
        """Open the table's databases within a limit that others keep, too; before the first is opened."""
        if hasattr(self.table.data, "rocksdb_options"):
            self.table.data.rocksdb_options = memory

    def get(self, partition: int, key: bytes) -> bytes | None:
        """The value of a key, a few µs; None where there is none.

        Raises:
            Retry: the partition is not this worker's, or not restored yet.
        """
        self._require(partition)
        return self.peek(partition, key)

    def items(self, partition: int) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value of a partition; the memory store does not tell partitions apart.

        Raises:
            Retry: as `get`.
        """
        self._require(partition)
        return self.peek_items(partition)

    def peek(self, partition: int, key: bytes) -> bytes | None:
        """The value of a key in the local store, whoever owns the partition: for inspection."""
        store = self.table.data
        if isinstance(store, Store):
            return store.get_value(partition, key)
        found: bytes | None = store.data.get(key)
        return found

    def peek_items(self, partition: int) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value of a partition in the local store, whoever owns it: for inspection."""
        store = self.table.data
        if isinstance(store, Store):
            yield from store.values_of(partition)
        else:
            yield from list(store.data.items())

    def partitions(self) -> list[int]:
        """Partitions whose store is open in this worker (active and standby)."""
        return sorted(getattr(self.table.data, "_dbs", {}))

    def owned(self) -> list[int]:
        """Partitions that this worker's stages read and write."""
        return sorted(partition for partition, turn in self._turns.items() if turn.restored)

    async def put_many(self, partition: int, items: Mapping[bytes, bytes | None]) -> None:
        """Write values (None deletes); return when changelog and store hold them.

        Raises:
            Retry: Kafka did not acknowledge, or the partition is another worker's by now; the store is untouched, and what
                the changelog holds of it does not count.
            Reject: a value is larger than a record may be.
        """
        if not items:
            return
        async with self._writing.setdefault(partition, asyncio.Lock()):
            await self._write(partition, list(items.items()))

    async def prove(self, partition: int) -> None:
        """Make sure that the partition is this worker's now, by a fence of its own that comes to stand where it must.

        For what depends on the time and not on the log alone: a worker that was frozen must not tell it.

        Raises:
            Retry: it is another worker's by now, or Kafka did not acknowledge.
        """
        store = self.table.data
        if not isinstance(store, Store):
            return
        async with self._writing.setdefault(partition, asyncio.Lock()):
            turn = self._require(partition)
            offset = await self._append_fence(partition, turn)
            if offset != store.kept(partition).next:
                await self._catch_up(partition, turn, offset)
                return
            turn.fence = offset
            store.take(partition, [Change(offset, FENCE_KEY, None, None)])

    # --- ownership

    async def fence(self, partition: int, generation: int) -> None:
        """Assigned: write the fence that keeps out who owned the partition before. Restore the table after it.

        Raises:
            Retry: Kafka did not acknowledge.
        """
        turn = _Turn(-1, generation)
        turn.fence = await self._append_fence(partition, turn)
        self._turns[partition] = turn

    async def restored(self, partition: int) -> None:
        """The store holds the changelog to beyond the fence: from now on the partition may be read and written.

        Values that a stale worker has covered are written once more.

        Raises:
            Retry: Kafka did not acknowledge.
        """
        turn = self._turns.get(partition)
        if turn is None:
            return  # revoked meanwhile
        store = self.table.data
        if isinstance(store, Store):
            if store.kept(partition).next <= turn.fence:
                message = f"{self.name}-{partition} is restored to {store.kept(partition).next}, not to its fence {turn.fence}"
                raise Retry(message)
            async with self._writing.setdefault(partition, asyncio.Lock()):
                turn.restored = True
                if _overtaken(store, partition, turn):
                    # The fence of a worker before us landed while the table was restored.
                    await self._catch_up(partition, turn, None)
                else:
                    await self._repair(partition)
        turn.restored = True

    def revoked(self, partition: int) -> None:
        """The partition is not this worker's any more."""
        self._turns.pop(partition, None)

    async def look(self, partition: int, end: int) -> None:
        """Look at what the changelog holds that this worker has not written, where nothing else was written meanwhile.

        Args:
            partition: of the table.
            end: offset after the changelog's last record.

        Raises:
            Retry: as `put_many`.
        """
        store = self.table.data
        lock = self._writing.setdefault(partition, asyncio.Lock())
        if lock.locked() or not isinstance(store, Store):
            return
        async with lock:
            turn = self._turns.get(partition)
            if turn is not None and turn.restored and store.kept(partition).next < end:
                await self._catch_up(partition, turn, end - 1)

    def _require(self, partition: int) -> _Turn:
        turn = self._turns.get(partition)
        if turn is None or not turn.restored:
            self._not_ours(partition)
        return turn

    def _not_ours(self, partition: int) -> NoReturn:
        state = "not restored yet" if partition in self._turns else "not assigned to this worker"
        message = f"table {self.name}: partition {partition} is {state}"
        raise Retry(message)

    # --- writing

    async def _write(self, partition: int, items: list[tuple[bytes, bytes | None]]) -> None:
        store = self.table.data
        if not isinstance(store, Store):
            await self._publisher.append(self.changelog, partition, items)
            _to_memory(store, items)
            return
        turn = self._require(partition)
        if _overtaken(store, partition, turn):
            await self._catch_up(partition, turn, None)
        headers = ((FENCE_HEADER, b"%d" % turn.fence),)
        last = await self._publisher.append(self.changelog, partition, items, headers)
        expected = store.kept(partition).next + len(items) - 1
        if last == expected and self._turns.get(partition) is turn:
            store.put(partition, items, last)
            return
        # Somebody else wrote, or Kafka did not say where (a repeated request): the log tells.
        fence = turn.fence
        await self._catch_up(partition, turn, last)
        if turn.fence != fence:
            # Our own came behind a late fence, so they do not count.
            await self._write(partition, items)

    async def _catch_up(self, partition: int, turn: _Turn, last: int | None) -> None:
        """Read what others wrote, up to and with `last`; take it by the rule, and mend what a stale worker covered.

        Raises:
            Retry: a later fence is there: the partition is another worker's.
        """
        store: Store = self.table.data
        # What was taken of a fence behind ours does not say whose it is.
        first = turn.fence + 1 if _overtaken(store, partition, turn) else store.kept(partition).next
        changes = await self._read_span(self.changelog, partition, first, None if last is None else last + 1)
        if self._turns.get(partition) is not turn:
            self._not_ours(partition)
        fences = [change for change in changes if change.key == FENCE_KEY and change.offset > turn.fence]
        later = [change for change in fences if _generation(change.value) > turn.generation]
        if later:
            self._turns.pop(partition, None)
            metrics.STATE_FENCED.labels(self.name).inc()
            log.error(
                "state_fenced",
                action="another worker has taken the partition over; nothing of this one counts any more",
                table=self.name,
                partition=partition,
                generation=turn.generation,
                by_generation=_generation(later[-1].value),
            )
            self._not_ours(partition)
        store.take(partition, changes)
        if _overtaken(store, partition, turn):
            # A fence of a worker that was assigned before us, landed late; or our own (`prove`).
            offset = await self._append_fence(partition, turn)
            turn.fence = offset
            if offset == store.kept(partition).next:
                store.take(partition, [Change(offset, FENCE_KEY, None, None)])
            else:
                await self._catch_up(partition, turn, offset)
        await self._repair(partition)

    async def _repair(self, partition: int) -> None:
        store: Store = self.table.data
        stale = sorted(store.kept(partition).stale)
        if not stale:
            return
        metrics.STATE_REPAIRED.labels(self.name).inc(len(stale))
        log.warning("state_repaired", table=self.name, partition=partition, values=len(stale))
        for start in range(0, len(stale), REPAIRS_AT_ONCE):
            part = stale[start : start + REPAIRS_AT_ONCE]
            await self._write(partition, [(key, store.get_value(partition, key)) for key in part])

    async def _append_fence(self, partition: int, turn: _Turn) -> int:
        value = b"%d" % turn.generation
        offset = await self._publisher.append(self.changelog, partition, [(FENCE_KEY, value)])
        if offset is None:
            message = f"Kafka does not say where the fence of {self.name}-{partition} is"
            raise Retry(message)
        return offset


def _overtaken(store: Store, partition: int, turn: _Turn) -> bool:
    """Whether the store has met a fence behind the worker's own, so that what it writes would count for nobody."""
    fence = store.kept(partition).fence
    return fence is not None and fence > turn.fence


def _generation(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else -1


def _to_memory(store: Any, items: Iterable[tuple[bytes, bytes | None]]) -> None:
    """Into Faust's memory store: one dictionary and no offset, so that a restart recovers everything."""
    for key, value in items:
        if value is None:
            store.data.pop(key, None)
        else:
            store.data[key] = value
