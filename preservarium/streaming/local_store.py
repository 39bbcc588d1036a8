"""The local store of a state table: RocksDB, with the changelog's offset and fence in the same write as the values.

A store is a copy of what the changelog holds, so a damaged one costs nothing but time: it is set aside and restored.
"""

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import rocksdict
import structlog
from faust.stores import STORES, rocksdb
from faust.types import TP

from preservarium import metrics
from preservarium.errors import Fatal, Retry
from preservarium.streaming.fencing import FENCE_KEY, RESERVED, STALE_PREFIX, Change, Kept, change_of

log = structlog.get_logger(__name__)

#: Damaged stores of a table that are kept for a look; older ones are deleted.
DAMAGED_MAX: Final = 2
#: How RocksDB says that the disk is full, and that its files are not what it wrote.
_FULL: Final = ("No space left", "NoSpace", "Disk quota exceeded")
_DAMAGE: Final = ("Corruption", "checksum mismatch")
#: That another process has the database open. ("block checksum mismatch" has the word "lock" in it, too.)
_LOCKED: Final = ("lock file", "lock hold by", "No locks available")


class Store(rocksdb.Store):  # type: ignore[misc]  # Faust has no types
    """Faust's store of a table, one database a partition; it takes changelog records by the rule of fencing.py."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: dict[int, Kept] = {}

    def kept(self, partition: int) -> Kept:
        """What is known of a partition's changelog."""
        known = self._kept.get(partition)
        if known is None:
            db = self._db_for_partition(partition)
            try:
                offset, fence = db.get(self.offset_key), db.get(FENCE_KEY)
                stale = {key[len(STALE_PREFIX) :] for key in _with_prefix(db, STALE_PREFIX)}
            except Exception as e:
                self._fault(partition, e)
                raise
            known = self._kept[partition] = Kept(
                None if fence is None else int(fence), 0 if offset is None else int(offset) + 1, stale
            )
        return known

    def persisted_offset(self, tp: TP) -> int | None:
        """Offset of the last changelog record that the store holds; None where it holds none. Faust asks."""
        return self.kept(tp.partition).next - 1 if self.kept(tp.partition).next else None

    def take(self, partition: int, changes: Iterable[Change]) -> None:
        """Take changelog records in: values, offset and fence in one atomic write."""
        kept = self.kept(partition)
        writes = kept.take(changes)
        if writes or kept.next:
            self._write(partition, writes, kept.next - 1)

    def put(self, partition: int, items: Iterable[tuple[bytes, bytes | None]], offset: int) -> None:
        """Write what this worker has just written to the changelog, up to `offset`, with nothing in between."""
        kept = self.kept(partition)
        writes = dict(items)
        for key in kept.stale & writes.keys():
            kept.stale.discard(key)
            writes[STALE_PREFIX + key] = None
        kept.next = offset + 1
        self._write(partition, writes, offset)

    def _write(self, partition: int, writes: Mapping[bytes, bytes | None], offset: int) -> None:
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, value in writes.items():
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        batch.put(self.offset_key, b"%d" % offset)
        try:
            self._db_for_partition(partition).write(batch)
        except Exception as e:
            # What is known in memory may be ahead of what is written now.
            self._kept.pop(partition, None)
            self._fault(partition, e)
            raise

    def get_value(self, partition: int, key: bytes) -> bytes | None:
        """The value of a key of a partition.

        Raises:
            Fatal: the store is damaged: it is set aside at the next start.
        """
        try:
            value: bytes | None = self._db_for_partition(partition).get(key)
        except Exception as e:
            self._fault(partition, e)
            raise
        return value

    def _fault(self, partition: int, error: Exception) -> None:
        """Say what is to be done about an error of the database; returns where nothing is known.

        Raises:
            Retry: the disk is full; others can take over meanwhile.
            Fatal: the store is damaged.
        """
        text = repr(error)
        if any(word in text for word in _FULL):
            message = f"no space for local state in {self.path}: {error}"
            raise Retry(message) from error
        if any(word in text for word in _DAMAGE):
            self._mark(partition).touch()
            message = f"the local state of {self.table_name}-{partition} is damaged; a restart restores it: {error}"
            raise Fatal(message) from error

    def _mark(self, partition: int) -> Path:
        """A file that says that a store was found damaged while it was in use."""
        path = Path(self.partition_path(partition))
        return path.with_name(f"{path.name}.damaged")

    def values_of(self, partition: int) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value of a partition.

        Raises:
            Fatal: the store is damaged, after what comes before the damage.
        """
        try:
            for key, value in _walk(self._db_for_partition(partition)):
                if not key.startswith(RESERVED) and key != self.offset_key:
                    yield key, value
        except Exception as e:
            self._fault(partition, e)
            raise

    # --- Faust's side

    def apply_changelog_batch(self, batch: Any, to_key: Any, to_value: Any) -> None:
        """Take what Faust read itself; what the batch transport has taken before changes nothing."""
        by_partition: dict[int, list[Change]] = {}
        for event in batch:
            by_partition.setdefault(event.message.partition, []).append(change_of(event.message))
        for partition, changes in by_partition.items():
            self.take(partition, changes)

    # Faust has the cycle collector close databases: at each rebalance, whether anything was revoked or not, it walked
    # through all that the worker holds once for each table, with the event loop standing still.

    def revoke_partitions(self, table: Any, tps: set[TP]) -> None:
        """Close the stores of partitions that went to another worker."""
        for tp in tps:
            if tp.topic in table.changelog_topic.topics:
                self._kept.pop(tp.partition, None)
                if (db := self._dbs.pop(tp.partition, None)) is not None:
                    db.close()

    async def stop(self) -> None:
        """Close every store."""
        self._kept.clear()
        while self._dbs:
            self._dbs.popitem()[1].close()

    def _open_for_partition(self, partition: int) -> Any:
        # Hook: where Faust opens a database. It would end every start at one that is damaged.
        path, mark = self.partition_path(partition), self._mark(partition)
        try:
            if mark.exists() and path.exists():
                message = "Corruption: found while in use"
                raise RuntimeError(message)
            return self._checked(super()._open_for_partition(partition))
        except Exception as e:
            text = repr(e)
            damaged = any(word in text for word in _DAMAGE)
            if not path.exists() or (not damaged and any(word in text for word in (*_LOCKED, *_FULL))):
                raise
            self._set_aside(path, partition, e)
            return super()._open_for_partition(partition)

    def _checked(self, db: Any) -> Any:
        """The database, once what every use needs was read from it."""
        try:
            for key in (self.offset_key, FENCE_KEY):
                value = db.get(key)
                if value is not None:
                    int(value)
        except Exception:
            db.close()  # its lock would be in the way of the one that replaces it
            raise
        return db

    def _set_aside(self, path: Path, partition: int, error: Exception) -> None:
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns() // 1_000_000}")
        path.rename(aside)
        self._mark(partition).unlink(missing_ok=True)
        metrics.STATE_DAMAGED.labels(self.table_name).inc()
        log.error(
            "local_state_damaged",
            action="set aside; it is restored from the changelog",
            table=self.table_name,
            partition=partition,
            kept_at=str(aside),
            error=repr(error),
        )
        others = sorted(path.parent.glob(f"{self.basename}-*.damaged-*"), key=lambda p: p.name.rsplit("-", 1)[1])
        for old in others[:-DAMAGED_MAX]:
            shutil.rmtree(old, ignore_errors=True)


def _walk(db: Any, first: bytes | None = None) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values in their order, from `first` on."""
    place = db.iter()
    if first is None:
        place.seek_to_first()
    else:
        place.seek(first)
    while place.valid():
        yield place.key(), place.value()
        place.next()
    # Where a block cannot be read it ends, too, and so would rocksdict's own iterators, silently.
    place.status()


def _with_prefix(db: Any, prefix: bytes) -> Iterator[bytes]:
    for key, _ in _walk(db, prefix):
        if not key.startswith(prefix):
            return
        yield key


# Faust finds a store by the scheme of its URL in this registry.
STORES.aliases["state"] = "preservarium.streaming.local_store:Store"
