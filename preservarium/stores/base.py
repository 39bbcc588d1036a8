"""What a store of readings promises, whatever is behind it.

A write ends in one of three ways: rows are accepted (or were there already), rows are rejected by index with a
reason, or the whole write is to be tried again. There is no fourth way, so nothing can be lost between them.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Message
from preservarium.domain.readings.stored import StoredMessage
from preservarium.errors import ReasonCode, Retry

#: Readings ahead of the clock by more than this are not stored: retention would never reach them. validate is far
#: stricter (`quality.future_skew_s`); this is the net for what does not pass it.
FUTURE_MAX_US: Final = 86_400_000_000
DAY_US: Final = 86_400_000_000
#: A text value is a state, a message, a position; more is a document and belongs elsewhere.
TEXT_CHARS_MAX: Final = 16_384
#: Names of tests that did not say good: there are about a dozen.
FLAGS_MAX: Final = 64
#: Width of a name in every table; the longest real address, an MQTT client id or a URN, is under 128.
NAME_CHARS_MAX: Final = 255
#: As the connectors take it: MQTT allows 65,535 bytes, and a longer one than this is an attack.
TOPIC_CHARS_MAX: Final = 1_024


@dataclass(frozen=True, slots=True)
class Move:
    """How far one partition gets with a write."""

    expected: int | None  #: next offset that the store must hold now; None: it holds none yet
    next: int  #: next offset after the write


#: (topic without prefix, partition) -> Move
Moves = Mapping[tuple[str, int], Move]


@dataclass(frozen=True, slots=True)
class Rejected:
    """One reading that the store will never take."""

    message: int  #: index in the messages written
    reading: int  #: index in that message's readings
    code: ReasonCode
    text: str  #: what exactly, for people


@dataclass(slots=True)
class WriteResult:
    """What became of the readings of one write; the three counts add up to them."""

    accepted: int = 0  #: rows stored
    duplicates: int = 0  #: readings whose key was stored already, or came again later in the same write
    rejected: list[Rejected] = field(default_factory=list)


#: Told what is rejected, before anything is committed: what it does (an error line to Kafka, acknowledged) is then done
#: wherever the rows are stored, and may be done twice. What it raises undoes the write.
BeforeCommit = Callable[[Sequence[Rejected]], Awaitable[None]]


class Moved(Retry):
    """Another writer moved the offsets of these partitions; read them and go on from there."""

    of_dependency = False

    def __init__(self, positions: Mapping[tuple[str, int], int | None]) -> None:
        super().__init__(
            "offsets moved by another writer: " + ", ".join(f"{t}[{p}]={n}" for (t, p), n in positions.items())
        )
        #: what the store holds now
        self.positions = dict(positions)


class Store(Protocol):
    """Keeps readings, each exactly once by its natural key (series, timestamp), and the offsets they came from."""

    async def offsets(self, topic: str, partitions: Sequence[int]) -> dict[int, int | None]:
        """The next offset of each partition; None where nothing of it was ever written.

        Raises:
            Retry: the store cannot be reached.
        """
        ...

    async def write(
        self, messages: Sequence[StoredMessage | Message], moves: Moves, *, before_commit: BeforeCommit | None = None
    ) -> WriteResult:
        """Store the readings and the offsets, or neither.

        Messages are typed (fast), or dictionaries that need not be what they should be but for a list of `readings`.

        Of readings with one key the first stays, within a write and of what is stored, unless the new one is of a later
        generation or, in the same, a revision (`revised`). Another value that came second in the same generation is
        rejected (`same_instant`), an equal one is a duplicate. Of several revisions that of the message received last
        stays, whatever the order in which they come. Writing the same again is harmless.

        Raises:
            Moved: the offsets are not what `moves` expects; nothing was written.
            Retry: the store cannot be reached; whether it was written shows in `offsets`.
        """
        ...

    async def close(self) -> None:
        """Give connections back. The store may be used again afterwards."""
        ...


def timestamp_code(timestamp: Any, *, oldest_us: int, newest_us: int) -> tuple[ReasonCode, str] | None:
    """Why a reading of this time is not stored; None where it is.

    Args:
        timestamp: µs since the epoch, or whatever stands in its place.
        oldest_us: the store's retention: a row older than it would falsify the roll-ups that are kept longer.
        newest_us: the latest time that is stored.
    """
    if type(timestamp) is not int or not TIMESTAMP_MIN_US <= timestamp < TIMESTAMP_MAX_US:
        return ReasonCode.TIMESTAMP_INVALID, f"timestamp {timestamp!r} is no instant in microseconds"
    if timestamp < oldest_us:
        return ReasonCode.LATE_BEYOND_RETENTION, f"timestamp {timestamp} is older than the store keeps ({oldest_us})"
    if timestamp > newest_us:
        return ReasonCode.TIMESTAMP_FUTURE, f"timestamp {timestamp} is later than {newest_us}"
    return None


def text_fault(value: Any, chars_max: int) -> str | None:
    """Why a store would not take it as text; None where it does. NUL and half a surrogate pair fail a whole batch."""
    if not isinstance(value, str):
        return f"is no text: {type(value).__name__}"
    if len(value) > chars_max:
        return f"has {len(value)} characters, more than {chars_max}"
    if "\0" in value:
        return "holds NUL"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair"
    return None


def series_fault(key: Sequence[Any], unit: Any, topic: Any) -> str | None:
    """Why these cannot name a series (device_id, connector_mode, component_type, pin_position); None where they can."""
    for name, value in zip(("device_id", "connector_mode", "component_type", "pin_position"), key, strict=True):
        if fault := text_fault(value, NAME_CHARS_MAX):
            return f"{name} {fault}"
    if not key[0]:
        return "device_id is empty"
    if fault := text_fault(unit, NAME_CHARS_MAX):
        return f"unit {fault}"
    if fault := text_fault(topic, TOPIC_CHARS_MAX):
        return f"topic {fault}"
    return None


def derivation_fault(key: Sequence[Any]) -> str | None:
    """Why these cannot name a derivation (parser, config_rev, experiment_id); None where they can."""
    parser, rev, experiment = key
    if fault := text_fault(parser, NAME_CHARS_MAX):
        return f"parser {fault}"
    if type(rev) is not int or not -(2**63) <= rev < 2**63:
        return f"config_rev {rev!r} is no integer"
    if experiment is not None and (fault := text_fault(experiment, NAME_CHARS_MAX)):
        return f"experiment_id {fault}"
    return None


def value_fault(value: float | None, text: str | None, flags: Sequence[str] | None) -> tuple[ReasonCode, str] | None:
    """Why a reading's value, text or flags cannot be stored; None where they can."""
    if value is not None and not float("-inf") < value < float("inf"):
        return ReasonCode.VALUE_NOT_FINITE, f"value {value}"
    if text is not None and (fault := text_fault(text, TEXT_CHARS_MAX)):
        return ReasonCode.STORE_REJECTED, f"value_text {fault}"
    if flags and (len(flags) > FLAGS_MAX or any(text_fault(f, NAME_CHARS_MAX) for f in flags)):
        return ReasonCode.STORE_REJECTED, "flags are not a short list of names"
    return None
