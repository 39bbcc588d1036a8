"""What a rule knows between readings, and what a reading makes of it."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


@dataclass(slots=True)
class Watch:
    """What one rule knows about one pin between readings. Instants are µs of event time."""

    at: int = 0  #: last reading evaluated; 0: none yet
    active: bool = False  #: the condition, after dead-band and delays
    #: when the opposite was first seen, while its delay runs; of a silence, while there is none, when a reading was
    #: received that came after its own deadline
    since: int | None = None
    higher: list["Watch"] = field(default_factory=list)  #: of the graver levels; their `at` is not used
    times: list[int] = field(default_factory=list)  #: of a repeat count: readings that met the condition
    past: list[list[Any]] = field(default_factory=list)  #: of a rate: [instant, value] of its window, and one before


def level_of(watch: Watch) -> int:
    """The gravest level that holds; 0 is the first."""
    level = 0
    for one in watch.higher:
        level += one.active
    return level


class Evaluation(StrEnum):
    """What a reading did to a watch."""

    UNCHANGED = "unchanged"
    PENDING = "pending"  #: a delay runs
    LATE = "late"  #: not younger than the last reading evaluated: nothing was changed
    RAISED = "raised"  #: the condition is now true
    RETURNED = "returned"  #: the condition is no longer true
    GRAVER = "graver"  #: the condition is true, and now of a graver level
    LESS_GRAVE = "less_grave"  #: it is true still, of a less grave level


class Verdict(NamedTuple):
    """An evaluation with its instant."""

    evaluation: Evaluation
    at: int  #: when the condition changed, µs of event time: the end of the delay; else the reading's time
    level: int = 0  #: which holds after it; of RETURNED, which held before
    value: float | None = None  #: what was compared, where that is not the reading itself
