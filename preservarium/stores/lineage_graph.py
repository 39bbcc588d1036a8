"""The lineage graph in PostgreSQL: written in the transaction of the data, asked upwards and downwards.

Functions work on a connection that the caller has. Each step of a question goes by an index, and is bounded.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

from preservarium.domain.lineage_graph import Edge, as_range, span_of
from preservarium.stores.base import Moves
from preservarium.stores.events import instant, microseconds

#: Steps away from where a question begins: raw, validated, batch, experiment are three.
DEPTH_MAX: Final = 8
#: Edges of an answer: an experiment of a year has a million batches, and nobody reads them.
EDGES_MAX: Final = 1_000
#: Old edges deleted in one statement: some 50 ms.
PRUNE_ROWS_MAX: Final = 10_000

_VALUES: Final = """
INSERT INTO data_lineage (source_id, target_id, relationship_type, transformation_id, span)
SELECT s, t, r, x, CASE WHEN a IS NULL THEN NULL ELSE int8range(a, b) END
FROM unnest(${0}::text[], ${1}::text[], ${2}::text[], ${3}::text[], ${4}::bigint[], ${5}::bigint[]) AS u(s, t, r, x, a, b)
ON CONFLICT DO NOTHING"""
_INSERT: Final = _VALUES.format(*range(1, 7))


def insert_at(first: int) -> str:
    """The statement that inserts edges, its arguments (see `columns`) from number `first` on: for a WITH of another one."""
    return _VALUES.format(*range(first, first + 6))


def columns(edges: Sequence[Edge]) -> list[list[Any]]:
    """The arguments of the statement."""
    # Ordered: two writers of the same edges would otherwise wait for each other.
    rows = [(*edge, *(span_of(edge.source_id) or (None, None))) for edge in sorted(edges)]
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(6)]


def moved_of(moves: Moves) -> dict[tuple[str, int], tuple[int, int]]:
    """(topic, partition) -> (offset before, offset afterwards) of a write; what was never written begins at 0."""
    return {key: (move.expected or 0, move.next) for key, move in moves.items()}


async def add(connection: Any, edges: Sequence[Edge]) -> None:
    """Add edges, within the caller's transaction; those that are there stay."""
    if edges:
        await connection.execute(_INSERT, *columns(edges))


@dataclass(frozen=True, slots=True)
class Found:
    """An edge with its time, and how many steps it is away."""

    edge: Edge
    created_at: int  #: µs since the epoch, UTC
    depth: int  #: 1: it touches where the question began

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.edge._asdict(), "created_at": self.created_at, "depth": self.depth}


@dataclass(slots=True)
class Graph:
    """What is above or below a node."""

    node: str
    edges: list[Found] = field(default_factory=list)  #: by depth
    cut: bool = False  #: there is more than was looked at


_SELECT: Final = "SELECT source_id, target_id, relationship_type, transformation_id, created_at FROM data_lineage"
_DOWN: Final = f"{_SELECT} WHERE source_id = ANY ($1) ORDER BY source_id, target_id LIMIT $2"
_UP: Final = f"{_SELECT} WHERE target_id = ANY ($1) ORDER BY target_id, created_at LIMIT $2"
#: The ranges of a topic that hold some of the records of a range.
_RANGES: Final = (
    f"{_SELECT} WHERE span && int8range($1, $2) AND starts_with(source_id, $3) ORDER BY source_id, target_id LIMIT $4"
)


async def walk(connection: Any, node: str, *, down: bool, depth: int = DEPTH_MAX, limit: int = EDGES_MAX) -> Graph:
    """What came of a node (`down`), or what it came of.

    A range of records stands for every range that shares a record with it, so `raw:3:1042` is found in the batch that took it.

    Args:
        connection: any.
        node: its name.
        down: which way.
        depth: steps at most.
        limit: edges at most.
    """
    graph = Graph(node)
    seen: set[Edge] = set()
    reached = {node}
    names: Collection[str] = [node]
    for step in range(1, depth + 1):
        room = limit - len(graph.edges) + 1
        rows = await connection.fetch(_DOWN if down else _UP, list(names), room)
        if step == 1:
            rows = [*rows, *await _overlapping(connection, node, down, room)]
        following: dict[str, None] = {}
        for row in rows:
            edge = Edge(*(row[name] for name in Edge._fields))
            if edge in seen:
                continue
            if len(graph.edges) >= limit:
                graph.cut = True
                return graph
            seen.add(edge)
            graph.edges.append(Found(edge, microseconds(row["created_at"]), step))
            other = edge.target_id if down else edge.source_id
            if other not in reached:
                reached.add(other)
                following[other] = None
        if not following:
            return graph
        names = following
    graph.cut = bool(names)
    return graph


async def _overlapping(connection: Any, node: str, down: bool, limit: int) -> list[Any]:
    """Edges of the ranges that share records with a range: down from them, or up from what they are the targets of."""
    found, span = as_range(node), span_of(node)
    if found is None or span is None:
        return []
    if found.topic == "raw" and not down:
        return []  # nothing is above a raw record
    rows = await connection.fetch(_RANGES, *span, f"{found.topic}:{found.partition}:", limit)
    if down:
        return list(rows)
    return list(await connection.fetch(_UP, list({row["source_id"] for row in rows}), limit))


async def between(connection: Any, from_us: int, to_us: int, after: tuple[int, str, str], limit: int) -> list[Found]:
    """Edges of batches that were stored in a time, by time; `after`: (time in µs, source, target) of the last one before."""
    rows = await connection.fetch(
        f"{_SELECT} WHERE created_at >= $1 AND created_at <= $2 AND relationship_type IN ('stored', 'validated')"
        " AND (created_at, source_id, target_id) > ($3, $4, $5) ORDER BY created_at, source_id, target_id LIMIT $6",
        instant(from_us), instant(to_us), instant(after[0]), after[1], after[2], limit,
    )  # fmt: skip
    return [Found(Edge(*(row[n] for n in Edge._fields)), microseconds(row["created_at"]), 0) for row in rows]


async def prune(connection: Any, now_us: int, days: int) -> int:
    """Delete some of the edges that are older; how many."""
    status = await connection.execute(
        "DELETE FROM data_lineage WHERE ctid = ANY(ARRAY(SELECT ctid FROM data_lineage WHERE created_at < least($1, now()) - $2::interval"
        " ORDER BY created_at LIMIT $3))",
        instant(now_us), timedelta(days=days), PRUNE_ROWS_MAX,
    )  # fmt: skip
    return int(status.rsplit(" ", 1)[1])
