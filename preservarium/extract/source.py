"""What a source of tasks and employees is.

A source reads and never writes. It gives changes in steps of at most `STEP_ROWS`, each with the position after it; a step
is recorded once Kafka has acknowledged it, and the source is asked for one more meanwhile. What fails ends the reading, and
`open` begins again at what is recorded. It may give a row more than once: the ledger leaves out versions that were sent.

**Which event of a row is newer.** Not the one with the greater `updated_at`: a transaction that began earlier may write
last, with the time of its beginning, and so may a writer whose clock is behind. What was seen later is newer. An event's
id is made of the row's version alone as long as that grows, so that a repetition after a crash has the same id; where it
does not, of the time when it was seen.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

#: Rows of a step. Two steps are in memory at once: one that is being sent, and the next.
STEP_ROWS: Final = 500

Table = Literal["tasks", "employees"]
#: Where a source goes on, as JSON; None: from the beginning.
Position = dict[str, Any]
#: (updated_at in µs since the epoch, 0 where there is none; which of several changes of one instant)
Version = tuple[int, int]
#: Orders the events of a row: two numbers, the first µs since the epoch. Its text is the event's id.
Order = tuple[int, int]

#: Fields of a task and of an employee that are taken over where the source has them (preservarium/domain/tasks.py).
FIELDS: Final[dict[Table, tuple[str, ...]]] = {
    "tasks": (
        "file_id", "stage", "status", "employee_code", "employee_name", "assigned_at", "started_at", "completed_at",
        "experiment_id",
    ),
    "employees": ("employee_code", "name", "email", "department", "active"),
}  # fmt: skip
#: The field that a record's key is.
KEYS: Final[dict[Table, str]] = {"tasks": "file_id", "employees": "employee_code"}
INSTANTS: Final = frozenset({"assigned_at", "started_at", "completed_at"})


@dataclass(frozen=True, slots=True)
class Change:
    """A row as it is now."""

    id: str  #: the source's key of the row
    version: Version
    #: where its event belongs among those of the row; the service makes it greater where an earlier one was as great
    order: Order
    fields: dict[str, Any]  #: of FIELDS; instants in µs since the epoch, UTC


@dataclass(frozen=True, slots=True)
class Step:
    """Some changes, and where to go on after them."""

    changes: Sequence[Change] = ()
    gone: Sequence[str] = ()  #: ids of rows that are no more
    position: Position | None = None  #: None: as before
    observed_us: int = 0  #: the source's clock when this was seen, µs since the epoch


@dataclass(slots=True)
class Woken:
    """What a source was told while it waited."""

    #: ids that may be gone
    gone: dict[Table, set[str]] = field(default_factory=dict)
    #: more was told than is kept in memory: every key must be compared
    overflow: bool = False


class Source(Protocol):
    """A database that tasks and employees are taken from. For one task at a time; used again after an error by `open`."""

    @property
    def tables(self) -> Sequence[Table]:
        """What it has, in the order in which it should be read."""
        ...

    async def open(self) -> None:
        """Connect and look whether everything is there.

        Raises:
            SourceError: it is not as the settings say.
            OSError, TimeoutError and the driver's errors: it cannot be reached.
        """
        ...

    def read(self, table: Table, position: Position | None) -> AsyncIterator[Step]:
        """What changed since `position`; costs one cheap query, and gives nothing, where nothing did."""
        ...

    def versions(self, table: Table) -> AsyncIterator[list[tuple[str, Version | None]]]:
        """Id and version of every row; the version is None where the source cannot tell."""
        ...

    async def rows(self, table: Table, ids: Sequence[str]) -> list[Change]:
        """The rows of these ids that there are."""
        ...

    async def now_us(self) -> int:
        """The source's clock, µs since the epoch."""
        ...

    async def wait(self, timeout_s: float) -> Woken:
        """Return when something may have changed, or after `timeout_s`."""
        ...

    async def close(self) -> None:
        """Disconnect."""
        ...
