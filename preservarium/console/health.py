"""Whether a worker is alive and ready: a pure judgement over the engine's report and the breakers.

Alive asks only for what a restart can mend: a stage that has work and makes no progress, a lost group membership, a
blown fuse. A database that is down does not make a worker dead: its partitions are paused, and Kafka keeps the data.
Ready asks for the dependencies too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from preservarium.breaker import Breaker, State, breakers

#: A stage that has had work for so long, and neither a commit nor anybody who works on it, is stuck: a rebalance may take 60 s.
#: A handler that is at work has limits of its own (streaming/reports.py), and one that waits for a dependency pauses its
#: partitions.
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
    ready: list[str] = [*report["topics"]]
    stalled = set()
    kafka = Dependency("kafka", *_kafka(report))
    for name, stage in report["stages"].items():
        waiting = {reason for reason in stage["paused"].values() if reason}
        if stage["fuse"]["blown"]:
            continue  # among the problems already
        if stage.get("trouble"):
            ready.append(f"{name} is not connected: {stage['trouble']}")
        if stage["paused"]:
            ready.append(f"{name} waits: {'; '.join(sorted(waiting)[:3]) or 'for a dependency'}")
        elif stage["stalled_s"] > STALLED_S and kafka.state != "down":
            stalled.add(name)
            alive.append(f"{name}: no progress for {stage['stalled_s']:.0f} s with {stage['pending']} records pending")
    if report["recovering"]:
        ready.append("tables are being restored")
    elif report["rebalancing"]:
        ready.append("partitions are being assigned")
    elif not report["assignment"]:
        # More workers than partitions is one reason; a group that cannot be joined is another.
        ready.append("no partition is assigned to this worker")
    if problem := report.get("clock"):
        ready.append(problem)
    ready += [f"{need.name} is down" for need in (kafka, *needs) if need.state == "down" and not need.optional]
    return Health(alive, ready, frozenset(stalled), [kafka, *needs])


def _kafka(report: Mapping[str, Any]) -> tuple[str, str]:
    """Its state and what it said last: it answers, and the group has given this worker something to do."""
    kafka = report["kafka"]
    if kafka["state"] == "down":
        return "down", kafka["detail"]
    if not report["assignment"]:
        return "trying", "joining"
    return kafka["state"], ""


def dependencies() -> list[Dependency]:
    """What the circuit breakers of this process and their probes say."""
    return [Dependency(b.name, *_state(b), optional=b.optional) for b in breakers()]


def _state(breaker: Breaker) -> tuple[str, str]:
    if breaker.silence:
        return "down", breaker.silence
    if breaker.state is State.OPEN and breaker.open_for_s:
        return "down", breaker.reason
    # Nobody has tried since its wait was over: that alone says nothing against it.
    return ("up", "") if breaker.state is State.CLOSED else ("trying", breaker.reason)
