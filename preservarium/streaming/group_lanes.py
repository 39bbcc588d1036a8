"""Lanes of group feeds: one partition of a stage that has a consumer group of its own."""

from collections import deque
from collections.abc import Sequence
from time import monotonic

from preservarium.streaming.positions import OnGap, Standing
from preservarium.streaming.runner import Progress
from preservarium.streaming.stage import Record


class GroupLane(Standing):
    """One partition of a group stage."""

    __slots__ = (
        "_batches",
        "_on_gap",
        "closing",
        "end",
        "flying",
        "known",
        "pending_records",
        "plan",
        "planned",
        "progress",
        "revoked",
        "waiting_since_s",
    )

    def __init__(self, partition: int, on_gap: OnGap = lambda partition, expected, got: None) -> None:
        super().__init__(partition)
        self._on_gap = on_gap
        self._batches: deque[Sequence[Record]] = deque()
        self.pending_records = 0
        self.waiting_since_s = 0.0
        self.flying = False
        self.closing = False  #: being revoked: no further flight
        self.revoked = False
        self.known = False  #: on_assigned has said where to start
        #: (first, next) of the batch whose bounds are committed and which is not known to be written
        self.planned: tuple[int, int] | None = None
        self.plan: int | None = None  #: where the first batch must end: another worker may have written it
        self.end: int | None = None  #: of what may be read, as the last fetch said
        self.progress = Progress()

    @property
    def busy(self) -> bool:
        """Whether records wait, fly, or are not committed."""
        return self.flying or self.pending_records > 0 or self.uncommitted

    def push(self, records: Sequence[Record], after: int | None = None) -> None:
        """Add what a poll brought; what is known already is dropped.

        Args:
            records: of the poll.
            after: where the consumer goes on.
        """
        if self.closing:
            return
        new = self.take_on(records, after, self._on_gap)
        if not new:
            return
        if not self._batches:
            self.waiting_since_s = monotonic()
        self._batches.append(new)
        self.pending_records += len(new)

    def passed(self, offset: int) -> None:
        """The consumer has come to `offset` without records."""
        if not self.closing:
            self.pass_to(offset, self._on_gap)

    def take(self, records_max: int) -> Sequence[Record]:
        """Up to `records_max` of the records that wait, in order."""
        taken: Sequence[Record] = []
        while self._batches and len(taken) < records_max:
            records = self._batches.popleft()
            room = records_max - len(taken)
            if len(records) > room:
                self._batches.appendleft(records[room:])
                records = records[:room]
            taken = [*taken, *records] if taken else records
        self.pending_records -= len(taken)
        self.waiting_since_s = monotonic()
        return taken

    @property
    def plan_complete(self) -> bool:
        """Whether the batch that was planned before is all here, or what is left of it: compaction may take its last record."""
        return self.plan is None or (self.expected is not None and self.expected >= self.plan)

    def take_plan(self) -> list[Record]:
        """The batch that was planned before; what retention or compaction has deleted of it is gone."""
        assert self.plan is not None
        taken = [r for records in self._batches for r in records if r.offset < self.plan]
        self.skip_below(self.plan)
        self.plan = None
        self.waiting_since_s = monotonic()
        return taken

    def clear(self) -> None:
        """Forget what waits."""
        self._batches.clear()
        self.pending_records = 0

    def skip_below(self, offset: int) -> None:
        """Forget waiting records below `offset`."""
        kept = [[r for r in records if r.offset >= offset] for records in self._batches]
        self._batches = deque(records for records in kept if records)
        self.pending_records = sum(len(records) for records in self._batches)
