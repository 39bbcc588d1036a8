"""State tables: Faust Tables (recovery, changelog, standby, `faust tables` stay stock) with our own way of writing.

Stock Faust writes RocksDB first and lets the changelog follow unseen; a crash between loses the change for the next
owner. `put_many` sends the changelog, waits for its acknowledgement, and then writes RocksDB together with the changelog
offset, in one RocksDB batch: at every instant the changelog holds at least what the local store holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

import orjson
import rocksdict
import structlog
from faust.stores.rocksdb import RocksDBOptions

from preservarium.domain.errors import Fatal

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
#: A buffer grows by so much; RocksDB's own eighth of it, times some hundred tables, would be the whole limit.
_ARENA_BYTES: Final = 64 << 10


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

    async def append(self, topic: str, partition: int, items: Sequence[tuple[bytes, bytes | None]]) -> int | None:
        """Produce to one partition; the offset of the last record when all are acknowledged."""
        ...


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


def load_state(value: bytes | None, version: int) -> dict[str, Any] | None:
    """A state document.

    Raises:
        Fatal: it is of another version: an older worker must not overwrite what a newer one wrote.
    """
    if value is None:
        return None
    document: dict[str, Any] = orjson.loads(value)
    if document.get("v") != version:
        message = f"state of version {document.get('v')}, this worker reads version {version}: use one release"
        raise Fatal(message)
    return document


class StateTable:
    """Bytes by key, a store for each partition; only the stage that owns the partition writes."""

    def __init__(self, table: Any, publisher: Appending) -> None:
        self.table = table
        self._publisher = publisher

    @property
    def name(self) -> str:
        """The table's name."""
        return str(self.table.name)

    def share(self, memory: SharedMemory) -> None:
        """Open the table's databases within a limit that others keep, too; before the first is opened."""
        if hasattr(self.table.data, "rocksdb_options"):
            self.table.data.rocksdb_options = memory

    def get(self, partition: int, key: bytes) -> bytes | None:
        """The value of a key, a few µs; None where there is none. `partition` must be assigned to this worker."""
        store = self.table.data
        if hasattr(store, "_db_for_partition"):
            value: bytes | None = store._db_for_partition(partition).get(key)
            return value
        found: bytes | None = store.data.get(key)
        return found

    def items(self, partition: int) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value of a partition, for inspection; the memory store does not tell partitions apart."""
        store = self.table.data
        if hasattr(store, "_db_for_partition"):
            yield from ((k, v) for k, v in store._db_for_partition(partition).items() if k != store.offset_key)
        else:
            yield from list(store.data.items())

    def partitions(self) -> list[int]:
        """Partitions whose store is open in this worker (active and standby)."""
        return sorted(getattr(self.table.data, "_dbs", {}))

    async def put_many(self, partition: int, items: Mapping[bytes, bytes | None]) -> None:
        """Write values (None deletes); return when changelog and store hold them.

        Raises:
            Retry: Kafka did not acknowledge; the store is untouched.
            Reject: a value is larger than a record may be.
        """
        if not items:
            return
        offset = await self._publisher.append(self.table.changelog_topic_name, partition, list(items.items()))
        apply(self.table.data, partition, items.items(), offset)


def apply(store: Any, partition: int, items: Sequence[tuple[bytes, bytes | None]] | Any, offset: int | None) -> None:
    """Write items and the changelog offset that they end at, in one atomic batch."""
    if not hasattr(store, "_db_for_partition"):
        # Faust's memory store: one dictionary and no offset, so that a restart recovers everything.
        for key, value in items:
            if value is None:
                store.data.pop(key, None)
            else:
                store.data[key] = value
        return
    batch = rocksdict.WriteBatch(raw_mode=True)
    for key, value in items:
        if value is None:
            batch.delete(key)
        else:
            batch.put(key, value)
    if offset is not None:
        batch.put(store.offset_key, b"%d" % offset)
    store._db_for_partition(partition).write(batch)
