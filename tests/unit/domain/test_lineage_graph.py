"""Names and edges of the lineage graph: the same whoever makes them, and few."""

from types import SimpleNamespace

import pytest

from preservarium.domain.lineage_graph import (
    Edge,
    alarm_edge,
    as_range,
    batch_edges,
    batch_id,
    event_edges,
    replay_edges,
    span_of,
)

VALIDATED = "iot_validated_data"


def message(partition: int, offset: int, generation: int = 0, experiment: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(raw_partition=partition, raw_offset=offset, generation=generation, experiment_id=experiment)


def test_a_batch_has_two_edges_a_partition_however_many_readings_it_has() -> None:
    moved = {(VALIDATED, 3): (100, 150), (VALIDATED, 4): (7, 7)}
    messages = [message(3, 1_000 + n % 40) for n in range(50)]
    edges = batch_edges("sink", moved, messages)
    batch = f"batch:{batch_id('sink', moved)}"
    assert edges == [
        Edge("validated:3:100-149", batch, "stored", "sink"),
        Edge("raw:3:1000-1039", "validated:3:100-149", "validated", "normalize+validate"),
    ]
    assert batch_edges("sink", moved, messages[::-1]) == edges
    assert batch_id("sink", dict(reversed(moved.items()))) == batch_id("sink", moved) != batch_id("other", moved)
    assert batch_edges("sink", {(VALIDATED, 4): (7, 7)}, messages) == []


def test_replays_experiments_and_foreign_partitions_are_named() -> None:
    moved = {(VALIDATED, 3): (0, 2)}
    batch = f"batch:{batch_id('sink', moved)}"
    some = [
        message(3, 5, 2, "run 1"),
        message(9, 8, 0, "run\0"),
        message(9, 6, 0, "\ud800"),
        message(9, 7, 0, "x" * 256),
    ]
    assert batch_edges("sink", moved, some) == [
        Edge("validated:3:0-1", batch, "stored", "sink"),
        Edge("raw:3:5-5", "validated:3:0-1", "validated", "generation:2"),
        Edge("generation:2", batch, "derived", "sink"),
        Edge("raw:9:6-8", batch, "validated", "normalize+validate"),
        Edge(batch, "experiment:run 1", "belongs_to", "sink"),
    ]
    many = [message(3, n, experiment=str(n)) for n in range(500)]
    assert sum(edge.relationship_type == "belongs_to" for edge in batch_edges("sink", moved, many)) == 100


def test_events_alarms_and_replays() -> None:
    (edge,) = event_edges("sink-alarms", {("iot_alerts", 1): (4, 9), ("iot_alerts", 2): (4, 4)})
    assert edge[0] == "iot_alerts:1:4-8"
    transition = {"alarm_id": "a", "rule": "hot", "raw_partition": 1, "raw_offset": 2}
    assert alarm_edge(transition) == Edge("raw:1:2-2", "alarm:a", "raised", "rule:hot")
    for wrong in (None, "2", -1, True):
        assert alarm_edge({**transition, "raw_offset": wrong}) is None
    assert replay_edges(3, {0: 5, 1: 9}, {0: 8, 1: 9}, "ann") == [
        Edge("raw:0:5-7", "generation:3", "replayed", "by:ann")
    ]


@pytest.mark.parametrize(
    ("node", "span"),
    [
        ("raw:0:5-7", (5, 8)), ("raw:2:5", (2 * 2**44 + 5, 2 * 2**44 + 6)), ("iot_raw_data:0:1-1", (1, 2)), ("raw:0:7-5", None), ("raw:0:", None),
        ("raw:0", None), ("raw", None), ("batch:0123", None), ("raw:0:5-", None), ("raw:-1:5", None), ("raw:0:²", None), ("raw:0:9999999999999999999999", None),
        (f"raw:0:{2**44}", None), (f"raw:{2**18}:0", None), (f"raw:{2**18 - 1}:{2**44 - 1}", ((2**18 - 1) * 2**44 + 2**44 - 1, 2**62)), (":0:1", None),
    ],
)  # fmt: skip
def test_ranges(node: str, span: tuple[int, int] | None) -> None:
    assert span_of(node) == span
    found = as_range(node)
    assert found is None or as_range(str(found)) == found
