"""Where a stage stands in one partition: what was handed over, what is acknowledged, what is committed.

Offsets have gaps: a transaction's markers, its records where it was aborted, what compaction took. A consumer passes over
them in silence, so its own position, and not the last record's offset, says what lies behind it.
"""

from collections.abc import Callable, Sequence
from time import monotonic

from preservarium.errors import Fatal
from preservarium.streaming.stage import Record

#: Told of offsets that came without records: (partition, first of them, the one that came instead).
OnGap = Callable[[int, int, int], None]


class Standing:
    """The offsets of a lane, in the order handed over ≥ acknowledged ≥ committed."""

    __slots__ = (
        "_ended",
        "advanced_s",
        "committed",
        "committed_s",
        "expected",
        "partition",
        "position",
        "since_s",
        "uncommitted_s",
    )

    def __init__(self, partition: int) -> None:
        self.partition = partition
        #: offset from which the consumer goes on; what is below and was not handed over is a gap
        self.expected: int | None = None
        #: offset of the first record that is not acknowledged; None before the first acknowledgement
        self.position: int | None = None
        self.committed: int | None = None
        #: monotonic times of the last acknowledgement and of the last commit, or of the beginning
        self.advanced_s = self.committed_s = monotonic()
        #: since when the first record that is not acknowledged is the first; None where all are
        self.since_s: float | None = None
        #: since when something is acknowledged and not committed; None where all of it is
        self.uncommitted_s: float | None = None
        self._ended: int | None = None  # offset after the last record that was handed over

    @property
    def uncommitted(self) -> bool:
        """Whether records are acknowledged and not yet committed."""
        return self.position is not None and (self.committed is None or self.position > self.committed)

    def take_on(self, records: Sequence[Record], after: int | None, on_gap: OnGap) -> Sequence[Record]:
        """What of a fetch is new; it counts as handed over.

        Args:
            records: in offset order, at least one.
            after: where the consumer goes on; None: behind the last record.
            on_gap: told where the first one is not the one that was expected.
        """
        expected, first = self.expected, records[0].offset
        if expected is not None and first != expected:
            if first > expected:
                on_gap(self.partition, expected, first)
            else:
                records = [record for record in records if record.offset >= expected]
                if not records:
                    return records
        self._ended = ended = records[-1].offset + 1
        self.expected = ended if after is None or after < ended else after
        if self.since_s is None:
            self.since_s = monotonic()
        return records

    def pass_to(self, offset: int, on_gap: OnGap) -> None:
        """The consumer has come to `offset`, and what it had not handed over below it does not exist (any more)."""
        expected = self.expected
        if expected is not None:
            if offset <= expected:
                return
            on_gap(self.partition, expected, offset)
        self.expected = offset
        if self.since_s is None and (self.position is None or self.position < offset):
            self._advance(offset)

    def acknowledge(self, records: Sequence[Record], what: str) -> None:
        """Everything up to the last of these records is done; so is a gap that follows it.

        Raises:
            Fatal: it was done before, so the order is not kept.
        """
        offset = records[-1].offset + 1
        if self.position is not None and offset <= self.position:
            message = f"acknowledged {offset} after {self.position} in {what}-{self.partition}"
            raise Fatal(message)
        if offset == self._ended:
            assert self.expected is not None
            self._advance(self.expected)
            self.since_s = None
        else:
            self._advance(offset)
            self.since_s = self.advanced_s

    def note_commit(self, offset: int) -> None:
        """Kafka holds `offset`."""
        self.committed = offset
        self.committed_s = monotonic()
        self.uncommitted_s = self.committed_s if self.uncommitted else None

    def move_to(self, offset: int) -> None:
        """Somebody else says that everything below `offset` is done."""
        if self.expected is None or self.expected < offset:
            self.expected = offset
        if self._ended is None or self._ended <= offset:
            self.since_s = None
        if self.position is None or self.position < offset:
            self._advance(offset)

    def start_at(self, offset: int | None) -> None:
        """Nothing is handed over, and `offset` comes first; None: the first that there is."""
        self.expected = offset
        self.position = self._ended = self.since_s = self.uncommitted_s = None

    def unacknowledged_age_s(self, now_s: float) -> float:
        """How long the first record that is not acknowledged has been the first, s; 0 where there is none."""
        return 0.0 if self.since_s is None else now_s - self.since_s

    def uncommitted_age_s(self, now_s: float) -> float:
        """How long something has been acknowledged and not committed, s; 0 where all of it is."""
        return 0.0 if self.uncommitted_s is None else now_s - self.uncommitted_s

    def _advance(self, offset: int) -> None:
        self.position = offset
        self.advanced_s = monotonic()
        if self.uncommitted_s is None and self.uncommitted:
            self.uncommitted_s = self.advanced_s
