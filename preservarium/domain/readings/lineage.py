"""Where a row comes from: raw coordinates, the identities made of them, and the watermark that skips a re-run.

A message is identified by its raw coordinates and generation; what is derived from it has an id computed from them,
so that a crash, a retry or a second worker computes the same id again. Ids are lower-case hexadecimal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID, uuid5

from preservarium.domain.readings.reading import PIN_POSITION_NONE

#: Namespace of every id made here (RFC 4122, version 5). Never change it: stored ids were computed with it.
NAMESPACE: Final = UUID("9a4f0d52-6f1c-5b0e-8d3b-2f7a1c9e4b60")

#: Generations whose state one device keeps: the live one, and the replays that may run at once. More than three
#: replays of one device at a time have no use, and each costs as much state as the live one.
GENERATIONS_MAX: Final = 4

#: The live generation is never displaced by a replay.
GENERATION_LIVE: Final = 0

_T = TypeVar("_T")


class Coordinates(NamedTuple):
    """Where a device message stands in `iot_raw_data`. Ordered within one partition."""

    partition: int
    offset: int
    line: int  #: line within the record, 0 for the first

    def __str__(self) -> str:
        return f"{self.partition}:{self.offset}:{self.line}"


def coordinates_of(message: Mapping[str, Any]) -> Coordinates:
    """The raw coordinates of a standardized or validated message, or of an alarm transition."""
    return Coordinates(message["raw_partition"], message["raw_offset"], message["raw_index"])


#: Source of the messages that were put into order; those of raw partitions are numbers.
RELEASED: Final = "released"


# --- the watermark ---------------------------------------------------------------------------------------------------

#: Source -> the last position applied, [offset, index]. A source is a raw partition, or another topic's partition.
#: One device's messages come from one raw partition as a rule (murmur2 of its address), from a few where a foreign
#: producer partitions differently: the size is bounded by the partition count.
Marks = dict[str, list[int]]


def is_applied(marks: Marks, source: str, offset: int, index: int) -> bool:
    """Whether this position, or a later one of the same source, was applied before.

    Order is kept within a partition from stage to stage, so what stands at or below the mark is a re-run.
    """
    mark = marks.get(source)
    return mark is not None and (offset < mark[0] or (offset == mark[0] and index <= mark[1]))


def applied(marks: Marks, source: str, offset: int, index: int) -> None:
    """Move the mark of `source` forward to this position; it never goes back."""
    mark = marks.get(source)
    if mark is None:
        marks[source] = [offset, index]
    elif offset > mark[0] or (offset == mark[0] and index > mark[1]):
        mark[0], mark[1] = offset, index


def advance(marks: Marks, source: str, offset: int, index: int) -> bool:
    """`is_applied` and `applied` in one: whether this position is news; then the mark of its source is moved to it."""
    mark = marks.get(source)
    if mark is None:
        marks[source] = [offset, index]
        return True
    if offset < mark[0] or (offset == mark[0] and index <= mark[1]):
        return False
    mark[0], mark[1] = offset, index
    return True


def take(marks: Marks, message: Mapping[str, Any]) -> bool:
    """Whether a validated message is news; then the mark of its source is moved to it.

    It stands by its raw coordinates, or where it was put into order (domain/quality/arrival.py) by those that it got when it
    was released.
    """
    released = message.get("released")
    if released is None:
        return advance(marks, str(message["raw_partition"]), message["raw_offset"], message["raw_index"])
    return advance(marks, RELEASED, released[0], released[1])


def generation_state(kept: dict[str, _T], generation: int, new: Callable[[], _T]) -> _T:
    """The state of `generation`, opened with `new` where there is none.

    At most `GENERATIONS_MAX` are kept: the replay that was opened first makes room, the live generation never does.
    Which one goes depends on the order of the messages alone, so any split into batches keeps the same ones.
    """
    key = str(generation)
    state = kept.get(key)
    if state is None:
        if len(kept) >= GENERATIONS_MAX:
            oldest = next(k for k in kept if k != str(GENERATION_LIVE))
            del kept[oldest]
        state = kept[key] = new()
    return state


# --- identities ------------------------------------------------------------------------------------------------------


def identity(*parts: object) -> str:
    """A deterministic id of `parts` (UUID version 5, hexadecimal); the same for equal parts in the same order."""
    # The length before each part keeps ("a", "bc") and ("ab", "c") apart.
    return uuid5(NAMESPACE, "".join(f"{len(text)}:{text}" for text in map(str, parts))).hex


def message_id(message: Mapping[str, Any]) -> str:
    """Id of a device message within its generation."""
    return identity("message", message["generation"], *coordinates_of(message))


def series_id(device_id: str, connector_mode: str, component_type: str, pin_position: str) -> str:
    """Id of a series, from its natural key."""
    return identity("series", device_id, connector_mode, component_type, pin_position)


def alarm_id(device_id: str, rule: str, pin_position: str, occurred_at: int, generation: int) -> str:
    """Id of one occurrence of an alarm; `occurred_at` in µs since the epoch, UTC."""
    return identity("alarm", device_id, rule, pin_position, occurred_at, generation)


def transition_id(alarm: str, transition: str, sequence: int) -> str:
    """Id of one transition of the occurrence `alarm`; `sequence` counts the transitions of that alarm."""
    return identity("transition", alarm, transition, sequence)


# --- derivation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Derivation:
    """What made a value: which raw bytes, read by which parser, under which configuration."""

    device_id: str
    connector_mode: str
    component_type: str
    pin_position: str
    timestamp: int  #: device time of the value, µs since the epoch, UTC
    received_at: int  #: µs since the epoch, UTC
    raw: Coordinates
    parser: str  #: name@version
    config_rev: int  #: revision of the device's configuration
    generation: int  #: 0 live; a deliberate replay opens a new one

    @property
    def series(self) -> str:
        """Id of the series that the value belongs to."""
        return series_id(self.device_id, self.connector_mode, self.component_type, self.pin_position)

    @property
    def id(self) -> str:
        """Id of this derivation: equal for a re-run, different for another generation."""
        return identity("derivation", self.series, self.timestamp, self.generation, *self.raw)


def derivation_of(message: Mapping[str, Any], reading: Mapping[str, Any]) -> Derivation:
    """The derivation of one reading of a standardized or validated message."""
    return Derivation(
        device_id=message["device_id"],
        connector_mode=message["connector_mode"],
        component_type=reading["component_type"],
        pin_position=reading.get("pin_position", PIN_POSITION_NONE),
        timestamp=reading.get("timestamp", message["timestamp"]),
        received_at=message["received_at"],
        raw=coordinates_of(message),
        parser=message["parser"],
        config_rev=message["config_rev"],
        generation=message["generation"],
    )
