"""The kinds of faults, and the plan that a seed makes of them. Pure: the same arguments are the same plan."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final


class Lane(StrEnum):
    """What a fault happens to. Faults of one lane come one after the other, those of different lanes at once."""

    WORKER = "worker"
    LINK = "link"  #: beside the worker's own faults: what one of its connections suffers
    KAFKA = "kafka"
    POSTGRES = "postgres"
    CLICKHOUSE = "clickhouse"
    RECORDS = "records"
    REGISTRY = "registry"


@dataclass(frozen=True, slots=True)
class Kind:
    """What can go wrong."""

    name: str
    lane: Lane
    meaning: str
    weight: float  #: how often, beside the others of its lane
    for_s: tuple[float, float] = (0.0, 0.0)  #: how long it lasts; 0: it is over at once
    details: Sequence[str] = ("",)  #: variants
    ready: bool = False  #: the worker must be ready first: what dies while it starts proves little


#: Workers' sessions end after this time (`kafka.session_timeout_s`): shorter cuts are survived, longer ones cost the partitions.
SESSION_S: Final = 10.0

STORES: Final = ("postgres", "clickhouse")
LINKS: Final = ("kafka", *STORES)

KINDS: Final = (
    Kind("kill", Lane.WORKER, "kill -9 of a ready worker", 6, ready=True),
    Kind("cut", Lane.WORKER, "a live worker cut off from Kafka for longer than its session, then healed: what it had queued lands late", 5, (12, 18), ready=True),
    Kind("freeze", Lane.WORKER, "SIGSTOP of a worker for longer than its session, then SIGCONT", 2.5, (12, 18), ready=True),
    Kind("term", Lane.WORKER, "SIGTERM of a worker, as in a rolling restart", 2, ready=True),
    Kind("state lost", Lane.WORKER, "kill -9, and the state directory is gone at the next start", 1, ready=True),
    Kind("state damaged", Lane.WORKER, "kill -9, and RocksDB's files are damaged at the next start", 1, details=("torn", "flipped", "missing", "emptied"), ready=True),
    Kind("disk full", Lane.WORKER, "the file system of the state directory is full for a while", 1, (4, 10), ready=True),
    Kind("clock", Lane.WORKER, "the worker's clock jumps, and back later", 1, (4, 12), details=("+3600", "-3600", "+90", "-5"), ready=True),
    Kind("short cut", Lane.LINK, "a link of a worker is dead for less than a session", 2, (1, 4), LINKS),
    Kind("slow", Lane.LINK, "each piece of data on a link of a worker is late by a quarter of a second", 1, (3, 8), LINKS),
    Kind("reset", Lane.LINK, "all connections of a link are reset", 4, details=LINKS),
    Kind("reply swallowed", Lane.LINK, "requests arrive, their replies do not, then the connections are reset", 6, details=LINKS),
    Kind("store cut", Lane.LINK, "a worker is cut off from a store, past its time-outs' first", 1, (6, 15), STORES),
    Kind("broker killed", Lane.KAFKA, "kill -9 of the broker, and started again", 1),
    Kind("broker restarted", Lane.KAFKA, "the broker is stopped and started again", 1),
    Kind("broker frozen", Lane.KAFKA, "SIGSTOP of the broker, then SIGCONT", 2, (3, 12)),
    Kind("backends terminated", Lane.POSTGRES, "pg_terminate_backend of all connections", 12),
    Kind("postgres frozen", Lane.POSTGRES, "SIGSTOP of PostgreSQL with all its backends, then SIGCONT", 1, (3, 12)),
    Kind("postgres killed", Lane.POSTGRES, "kill -9 of PostgreSQL, started again", 1, (1, 5)),
    Kind("postgres down", Lane.POSTGRES, "PostgreSQL is stopped for a while", 0.5, (20, 40)),
    Kind("clickhouse frozen", Lane.CLICKHOUSE, "SIGSTOP of ClickHouse, then SIGCONT", 1, (3, 12)),
    Kind("clickhouse killed", Lane.CLICKHOUSE, "kill -9 of ClickHouse, started again", 1, (1, 5)),
    Kind("poison", Lane.RECORDS, "a record in the raw topic that nothing can be made of", 1, details=(
        "empty", "null", "no json", "torn", "not utf-8", "deep", "huge", "nul", "a number", "no key", "bad key", "nan", "infinite",
        "text", "big integer", "unknown device", "future", "batch with a bad line", "bad received_at", "payload missing",
    )),
    Kind("registered in flight", Lane.REGISTRY, "a device is registered and sends at once", 2),
    Kind("registry changed", Lane.REGISTRY, "devices' documents change while they send", 2),
    Kind("registry refused", Lane.REGISTRY, "a registry file with an error in it is refused as a whole", 0.5),
)  # fmt: skip

BY_NAME: Final = {kind.name: kind for kind in KINDS}

#: Between two faults of a lane, seconds, uniformly. Workers are given time to become ready again besides.
GAPS_S: Final = {
    Lane.WORKER: (2.0, 8.0),
    Lane.LINK: (3.0, 8.0),
    Lane.KAFKA: (50.0, 90.0),
    Lane.POSTGRES: (8.0, 20.0),
    Lane.CLICKHOUSE: (25.0, 50.0),
    Lane.RECORDS: (1.0, 4.0),
    Lane.REGISTRY: (20.0, 40.0),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. Instants are seconds since the load began; a lane that is behind does the rest later."""

    at_s: float
    kind: str
    target: str  #: "worker-1", "kafka", …
    for_s: float = 0.0
    detail: str = ""
    seed: int = 0  #: of what the fault itself draws

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def plan(seed: int, seconds: float, workers: int, only: Iterable[str] = (), pace: float = 1.0) -> list[Fault]:
    """Faults in the order of their time.

    Args:
        seed: the same one makes the same plan.
        seconds: how long faults begin.
        workers: how many there are.
        only: names of kinds; empty: all.
        pace: gaps between faults are divided by it.

    Raises:
        ValueError: a name is no kind's.
    """
    wanted = set(only)
    if unknown := wanted - BY_NAME.keys():
        message = f"no kind of fault: {', '.join(sorted(unknown))}"
        raise ValueError(message)
    faults: list[Fault] = []
    for lane in Lane:
        kinds = [kind for kind in KINDS if kind.lane is lane and (not wanted or kind.name in wanted)]
        many = lane in (Lane.WORKER, Lane.LINK)
        targets = [f"worker-{n}" for n in range(workers)] if many else [lane.value]
        for target in targets if kinds else ():
            # One source for each, so that leaving a kind out changes no other lane.
            draw = random.Random(f"{seed} {lane} {target}")
            at_s = draw.uniform(*GAPS_S[lane]) / pace
            turn: list[Kind] = []
            while at_s < seconds:
                if not turn:
                    # Each turn has every kind once at least, so that a short run leaves none out for long.
                    turn = _turn(draw, kinds)
                kind = turn.pop()
                for_s = round(draw.uniform(*kind.for_s), 2)
                faults.append(
                    Fault(round(at_s, 2), kind.name, target, for_s, draw.choice(kind.details), draw.randrange(2**31))
                )
                at_s += for_s + draw.uniform(*GAPS_S[lane]) / pace
    return sorted(faults, key=lambda fault: (fault.at_s, fault.target, fault.kind))


def singles(seed: int, workers: int, only: Iterable[str] = ()) -> list[Fault]:
    """Each kind once, for one after the other: what comes next waits until the one before is recovered from.

    Args:
        seed: of order, targets, durations and details.
        workers: how many there are.
        only: names of kinds; empty: all.
    """
    draw = random.Random(f"{seed} singles")
    wanted = set(only)
    kinds = [kind for kind in KINDS if not wanted or kind.name in wanted]
    draw.shuffle(kinds)
    return [
        Fault(
            0.0, kind.name,
            f"worker-{draw.randrange(workers)}" if kind.lane in (Lane.WORKER, Lane.LINK) else kind.lane.value,
            round(draw.uniform(*kind.for_s), 2), draw.choice(kind.details), draw.randrange(2**31),
        )
        for kind in kinds
    ]  # fmt: skip


def _turn(draw: random.Random, kinds: Sequence[Kind]) -> list[Kind]:
    least = min(kind.weight for kind in kinds)
    turn = [kind for kind in kinds for _ in range(round(kind.weight / least))]
    draw.shuffle(turn)
    return turn
