"""Whether a worker is alive and ready: a pure judgement over the engine's report and the breakers.

Alive asks only for what a restart can mend: a stage that has work and makes no progress, a lost group membership, a
blown fuse. A database that is down does not make a worker dead: its partitions are paused, and Kafka keeps the data.
Ready asks for the dependencies too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from preservarium.stores.breaker import breakers

#: A stage that has work and has committed nothing for so long is stuck: the longest handler has a time limit of 30 s,
#: a rebalance may take 60 s, and a batch that is retried for a dependency pauses its partitions and is not counted.
STALLED_S: Final = 120.0

#: The way of the data; stages that are not named stand behind.
ORDER: Final = (
    "normalize",
    "validate",
    "alarm",
    "route",
    "group",
    "notify",
    "sink",
    "sync",
    "aggregate",
    "anomaly",
    "registry",
)

_BREAKER: Final = {0: "up", 1: "trying", 2: "down"}


@dataclass(frozen=True, slots=True)
class Dependency:
    """Something that the worker needs."""

    name: str
    state: str  #: up, trying, down, unknown (not asked yet)
    detail: str = ""  #: what it said last, for people
    optional: bool = False  #: a worker without it is ready all the same


@dataclass(frozen=True, slots=True)
class Health:
    """The judgement."""

    alive_reasons: list[str]  #: why not alive
    ready_reasons: list[str]  #: why not ready, though alive
    stalled: frozenset[str]  #: stages without progress
    dependencies: list[Dependency]

    @property
    def alive(self) -> bool:
        """Whether the worker should go on."""
        return not self.alive_reasons

    @property
    def ready(self) -> bool:
        """Whether it can work now."""
        return self.alive and not self.ready_reasons

    @property
    def reasons(self) -> list[str]:
        """Everything that is wrong."""
        return [*self.alive_reasons, *self.ready_reasons]


def in_order(names: Iterable[str]) -> list[str]:
    """Stage names in the order of the flow."""
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def judge(report: Mapping[str, Any], needs: Sequence[Dependency]) -> Health:
    """Judge a worker.

    Args:
        report: `app.health_report()`.
        needs: the dependencies and how they are.
    """
    alive: list[str] = [*report["problems"]]
    ready: list[str] = []
    stalled = set()
    for name, stage in report["stages"].items():
        waiting = {reason for reason in stage["paused"].values() if reason}
        if stage["fuse"]["blown"]:
            continue  # among the problems already
        if stage["paused"]:
            ready.append(f"{name} waits: {'; '.join(sorted(waiting)[:3]) or 'for a dependency'}")
        elif stage["commit_age_s"] > STALLED_S and (stage["pending"] or stage["lag"]):
            stalled.add(name)
            alive.append(
                f"{name}: nothing committed for {stage['commit_age_s']:.0f} s with {stage['pending']} records pending"
            )
    if report["recovering"]:
        ready.append("tables are being restored")
    elif report["rebalancing"]:
        ready.append("partitions are being assigned")
    elif not report["assignment"]:
        # More workers than partitions is one reason; a group that cannot be joined is another.
        ready.append("no partition is assigned to this worker")
    ready += [f"{need.name} is down" for need in needs if need.state == "down" and not need.optional]
    kafka = Dependency("kafka", "up" if report["assignment"] else "trying", "" if report["assignment"] else "joining")
    return Health(alive, ready, frozenset(stalled), [kafka, *needs])


def dependencies() -> list[Dependency]:
    """What the circuit breakers of this process say."""
    return [Dependency(b.name, _BREAKER[int(b.state)], b.reason if b.state else "", b.optional) for b in breakers()]
