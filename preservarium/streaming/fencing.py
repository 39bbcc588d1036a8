"""Fences in changelogs: what a worker writes that does not own the partition any more has no effect.

A worker that was cut off or frozen does not know that its partitions went to another; what it had queued lands when it comes
back, behind what its successor wrote, and no timer can keep it from that. So the log itself says whose turn it is:

- **A fence** is a record with the key `FENCE_KEY`. Whoever is assigned a partition writes one before it restores the table, and
  restores it to beyond its own fence. The fence's offset is the writer's epoch: unique, growing, and decided by Kafka.
- **Every state record names the fence** of its writer in the header `fence`. Whoever reads the changelog (restore, standby) knows
  the latest fence that it has met and passes over records of an earlier one: they are stale.
- **A writer looks whether its records came to stand where it expected** (`Kept.next`). Where they did not, somebody else wrote: it
  reads what is between, by the same rule. If a later fence is there, its own records do not count, and it has not written them to
  its store, since that comes after the acknowledgement.
- **A fence that lands late**, of who owned the partition before, stands behind the owner's, so what the owner writes would count for nobody.
  Wherever the owner meets one, also among what it restores, it writes a new fence before anything else.
- **A stale record is the newest of its key for Kafka's compaction**, which would keep it and drop the right one. So its key is noted,
  and the owner writes what is right once more. Changelogs are not compacted for some minutes (`min.compaction.lag.ms`).

Here is the rule alone; local_store.py keeps what it needs with the table, state.py writes.
Idempotent: what was read before (below `next`) changes nothing when it comes again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

#: No key of a table begins like that: they are addresses, names and codes, without control characters.
RESERVED: Final = b"\0"
FENCE_KEY: Final = b"\0fence"
STALE_PREFIX: Final = b"\0stale\0"
FENCE_HEADER: Final = "fence"


class Change(NamedTuple):
    """A record of a changelog, as far as the rule looks."""

    offset: int
    key: bytes
    value: bytes | None
    fence: int | None  #: of its writer; None: of a release that knew none, which counts always


def change_of(record: Any) -> Change:
    """A record of Kafka's as a change."""
    fence = None
    for name, value in record.headers or ():
        if name == FENCE_HEADER and value is not None and value.isdigit():
            fence = int(value)
    return Change(record.offset, record.key, record.value, fence)


@dataclass(slots=True)
class Kept:
    """What is known of one partition of a changelog, kept beside the table's values."""

    fence: int | None = None  #: offset of the latest fence met
    next: int = 0  #: offset after the last record looked at
    stale: set[bytes] = field(default_factory=set)  #: keys whose newest record does not count

    def take(self, changes: Iterable[Change]) -> dict[bytes, bytes | None]:
        """Look at records in their order.

        Args:
            changes: consecutive records, as far as compaction has left them.

        Returns:
            What is to be written to the store, together with this: values by key, None to delete.
        """
        writes: dict[bytes, bytes | None] = {}
        for change in changes:
            if change.offset < self.next:
                continue
            self.next = change.offset + 1
            if change.key == FENCE_KEY:
                self.fence = change.offset
                writes[FENCE_KEY] = b"%d" % change.offset
            elif change.fence is not None and self.fence is not None and change.fence < self.fence:
                self.stale.add(change.key)
                writes[STALE_PREFIX + change.key] = b""
            else:
                if change.fence is not None and (self.fence is None or change.fence > self.fence):
                    # Compaction has dropped that fence: a later one stands further on.
                    self.fence = change.fence
                    writes[FENCE_KEY] = b"%d" % change.fence
                writes[change.key] = change.value
                if change.key in self.stale:
                    self.stale.discard(change.key)
                    writes[STALE_PREFIX + change.key] = None
        return writes
