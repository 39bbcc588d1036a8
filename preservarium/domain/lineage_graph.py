"""The lineage graph: which ranges of records became which batches, and what was made of single messages.

Its nodes have names that say what they are, and are the same whoever makes them, however often:

| node | what |
|---|---|
| `raw:P:A-B`, `validated:P:A-B`, `TOPIC:P:A-B` | records of a topic's partition P, from offset A to B, both included |
| `batch:ID` | one transaction of a sink: its id is made of the sink and of the offsets that it moves |
| `alarm:ID`, `generation:N`, `experiment:ID` | an alarm, a replay, an experiment |

An edge goes from what was there to what came of it. There is no node for standardized records: where a message stood there is kept nowhere, and
`transformation_id` names both stages between a raw record and a validated one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from preservarium.domain.readings.lineage import identity

#: Short names of topics in nodes; others are called as they are.
SHORT: Final[Mapping[str, str]] = {"iot_raw_data": "raw", "iot_validated_data": "validated"}

#: `relationship_type`.
VALIDATED: Final = "validated"  #: raw records became validated ones
STORED: Final = "stored"  #: records were stored by a batch
RAISED: Final = "raised"  #: a message raised an alarm, or moved it
REPLAYED: Final = "replayed"  #: raw records were derived anew
DERIVED: Final = "derived"  #: a batch holds rows of that replay
BELONGS: Final = "belongs_to"  #: a batch holds rows of that experiment
RELATIONSHIPS: Final = (VALIDATED, STORED, RAISED, REPLAYED, DERIVED, BELONGS)

#: Experiments of one batch that are noted: more are no experiments.
EXPERIMENTS_MAX: Final = 100
#: Characters of an experiment's name in a node; the store takes no longer ones.
NAME_CHARS_MAX: Final = 255
#: Offsets that fit into the index of ranges: a partition's number stands above them.
OFFSET_BITS: Final = 44
_OFFSET_MAX: Final = (1 << OFFSET_BITS) - 1
_PARTITION_MAX: Final = (1 << 18) - 1


class Edge(NamedTuple):
    """A row of `data_lineage`, without its time."""

    source_id: str
    target_id: str
    relationship_type: str
    transformation_id: str


class Stored(Protocol):
    """What is looked at of a message that is stored."""

    raw_partition: int
    raw_offset: int
    generation: int
    experiment_id: str | None


@dataclass(frozen=True, slots=True)
class Range:
    """Records of a partition, both ends included."""

    topic: str  #: short name
    partition: int
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.partition}:{self.first}-{self.last}"


def range_node(topic: str, partition: int, first: int, last: int) -> str:
    """The name of a range of records."""
    return f"{SHORT.get(topic, topic)}:{partition}:{first}-{last}"


def as_range(node: str) -> Range | None:
    """The range that a name says; also of one record (`raw:3:1042`). None where it says none."""
    topic, _, rest = node.partition(":")
    partition, _, offsets = rest.partition(":")
    first, dash, last = offsets.partition("-")
    numbers = (partition, first, last if dash else first)
    if not topic or not all(n.isascii() and n.isdigit() and len(n) <= 19 for n in numbers):
        return None
    p, a, b = map(int, numbers)
    if p > _PARTITION_MAX or b > _OFFSET_MAX or a > b:
        return None
    return Range(SHORT.get(topic, topic), p, a, b)


def span_of(node: str) -> tuple[int, int] | None:
    """The range as one of whole numbers, end excluded, in which partitions do not overlap; None where it is none."""
    found = as_range(node)
    if found is None:
        return None
    base = found.partition << OFFSET_BITS
    return base + found.first, base + found.last + 1


def batch_id(sink: str, moved: Mapping[tuple[str, int], tuple[int, int]]) -> str:
    """The id of a transaction.

    Args:
        sink: whose.
        moved: (topic, partition) -> (offset before, offset afterwards).
    """
    return identity("batch", sink, *(part for key in sorted(moved) for part in (*key, *moved[key])))


def batch_edges(sink: str, moved: Mapping[tuple[str, int], tuple[int, int]], messages: Sequence[Stored]) -> list[Edge]:
    """The edges of one transaction of readings: some two a partition, however many readings it has.

    Args:
        sink: whose.
        moved: (topic, partition) -> (offset before, offset afterwards); those that do not move have no edge.
        messages: what is stored.
    """
    moves = {key: move for key, move in moved.items() if move[1] > move[0]}
    if not moves:
        return []
    batch = f"batch:{batch_id(sink, moved)}"
    nodes = {key: range_node(*key, move[0], move[1] - 1) for key, move in moves.items()}
    by_partition = {partition: node for (_, partition), node in nodes.items()}
    edges = [Edge(node, batch, STORED, sink) for node in nodes.values()]
    ranges: dict[tuple[int, int], list[int]] = {}
    experiments: set[str] = set()
    for message in messages:
        key, offset = (message.raw_partition, message.generation), message.raw_offset
        found = ranges.get(key)
        if found is None:
            ranges[key] = [offset, offset]
        elif offset > found[1]:
            found[1] = offset
        elif offset < found[0]:
            found[0] = offset
        if message.experiment_id and len(experiments) < EXPERIMENTS_MAX:
            experiments.add(message.experiment_id)
    # What the store refuses as a name (NUL, half a surrogate pair) is no node either.
    experiments = {one for one in experiments if one.isprintable() and len(one) <= NAME_CHARS_MAX}
    for (partition, generation), (first, last) in sorted(ranges.items()):
        how = f"generation:{generation}" if generation else "normalize+validate"
        # What a foreign producer put elsewhere comes by another partition than its own.
        edges.append(
            Edge(range_node("iot_raw_data", partition, first, last), by_partition.get(partition, batch), VALIDATED, how)
        )
        if generation:
            edges.append(Edge(f"generation:{generation}", batch, DERIVED, sink))
    edges += [Edge(batch, f"experiment:{experiment}", BELONGS, sink) for experiment in sorted(experiments)]
    return list(dict.fromkeys(edges))


def event_edges(sink: str, moved: Mapping[tuple[str, int], tuple[int, int]]) -> list[Edge]:
    """The edges of one transaction of events: which records it stored."""
    batch = f"batch:{batch_id(sink, moved)}"
    return [
        Edge(range_node(*key, move[0], move[1] - 1), batch, STORED, sink)
        for key, move in sorted(moved.items())
        if move[1] > move[0]
    ]


def alarm_edge(transition: Mapping[str, Any]) -> Edge | None:
    """The edge from the message that moved an alarm to that alarm; None where time or a person did."""
    partition, offset = transition.get("raw_partition"), transition.get("raw_offset")
    if type(partition) is not int or type(offset) is not int or partition < 0 or offset < 0:
        return None
    node = range_node("iot_raw_data", partition, offset, offset)
    return Edge(node, f"alarm:{transition['alarm_id']}", RAISED, f"rule:{transition['rule']}")


def replay_edges(generation: int, starts: Mapping[int, int], ends: Mapping[int, int], actor: str) -> list[Edge]:
    """The edges of a replay that is opened: which raw records it derives anew."""
    return [
        Edge(
            range_node("iot_raw_data", partition, start, ends[partition] - 1),
            f"generation:{generation}",
            REPLAYED,
            f"by:{actor}",
        )
        for partition, start in sorted(starts.items())
        if ends.get(partition, start) > start
    ]
