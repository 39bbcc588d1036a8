"""The lineage graph on a real PostgreSQL: written with the data or not at all, asked both ways, pruned, and given as OpenLineage events."""

import asyncio
import json
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from click.testing import CliRunner
from sink_support import NOW_US, execute, fetch, live, message

from preservarium.__main__ import cli
from preservarium.stores import lineage_graph, positions
from preservarium.stores.base import Move
from preservarium.stores.event_tables import EventStore
from preservarium.stores.tables import ALARM_EVENTS
from preservarium.stores.timescale import TimescaleStore

VALIDATED = "iot_validated_data"


@pytest.fixture
async def connection(dsn: str):
    made = await asyncpg.connect(dsn)
    yield made
    await made.close()


@pytest.fixture
async def store(dsn: str):
    made = TimescaleStore(live(postgres={"url": dsn}))
    yield made
    await made.close()


def sent(offset: int, **fields: Any) -> Any:
    return message("0000000000000001", 20.0 + offset, at=NOW_US + offset * 1_000_000, offset=offset, **fields)


async def _edges(dsn: str) -> list[tuple[str, ...]]:
    rows = await fetch(
        dsn, "SELECT source_id, target_id, relationship_type, transformation_id FROM data_lineage ORDER BY 1, 2"
    )
    return [tuple(row) for row in rows]


async def test_edges_are_written_with_the_data_once_or_not_at_all(dsn, store, connection) -> None:
    moves = {(VALIDATED, 3): Move(None, 3)}

    async def fail(_rejected: Any) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await store.write([sent(n) for n in range(3)], moves, before_commit=fail)
    assert await _edges(dsn) == []
    await store.write([sent(n) for n in range(3)], moves)
    first = await _edges(dsn)
    assert [(edge[0], edge[2]) for edge in first] == [("raw:3:0-2", "validated"), ("validated:3:0-2", "stored")]
    # The same again, after somebody set the offsets back: the same names, so nothing new.
    await execute(dsn, "DELETE FROM sink_offsets")
    await store.write([sent(n) for n in range(3)], moves)
    assert await _edges(dsn) == first
    # All ways of the store: rows that stand, and one that PostgreSQL refuses.
    await store.write([sent(n) for n in range(2, 5)], {(VALIDATED, 3): Move(3, 6)})
    await store.write([sent(7), sent(8, experiment_id="run 1")], {(VALIDATED, 3): Move(6, 8)})
    batches = {edge[1] for edge in await _edges(dsn) if edge[2] == "stored"}
    assert len(batches) == 3
    down = await lineage_graph.walk(connection, "raw:3:8", down=True)
    assert [(one.edge.target_id.partition(":")[0], one.depth) for one in down.edges] == [
        ("validated", 1),
        ("batch", 2),
        ("experiment", 3),
    ]
    up = await lineage_graph.walk(connection, "experiment:run 1", down=False)
    assert [one.edge.source_id for one in up.edges][1:] == ["validated:3:6-7", "raw:3:7-8"]
    # A record that two batches hold, and one that none does.
    assert (
        len({one.edge.target_id for one in (await lineage_graph.walk(connection, "raw:3:2", down=True, depth=1)).edges})
        == 2
    )
    assert (await lineage_graph.walk(connection, "raw:3:99", down=True)).edges == []
    assert [
        one.edge.source_id for one in (await lineage_graph.walk(connection, "validated:3:7", down=False)).edges
    ] == ["raw:3:7-8"]
    cut = await lineage_graph.walk(connection, "experiment:run 1", down=False, limit=1)
    assert (len(cut.edges), cut.cut) == (1, True)
    assert await store.prune_lineage() == 0
    await execute(dsn, "UPDATE data_lineage SET created_at = now() - INTERVAL '31 days' WHERE source_id LIKE 'raw:%'")
    assert await store.prune_lineage() == 3
    assert {edge[2] for edge in await _edges(dsn)} == {"stored", "belongs_to"}


async def test_none_is_written_where_that_is_set(dsn) -> None:
    store = TimescaleStore(live(postgres={"url": dsn}, sink={"lineage_days": 0}))
    try:
        await store.write([sent(1)], {(VALIDATED, 3): Move(None, 1)})
    finally:
        await store.close()
    assert await _edges(dsn) == []


async def test_alarms_and_replays_and_commands_for_people(dsn, connection, tmp_path: Path) -> None:
    store = EventStore(ALARM_EVENTS, live(postgres={"url": dsn}), sink="sink-alarms")
    lines = [
        {"alarm_id": "a1", "transition_id": f"t{n}", "device_id": "d", "rule": "hot", "transition": "x", "state": "x", "severity": "major",
         "occurred_at": NOW_US, "detected_at": NOW_US, "generation": 0, "raw_partition": 2, "raw_offset": n, "raw_index": 0}
        for n in (5, 6)
    ]  # fmt: skip
    try:
        await store.write([*lines, {**lines[0], "transition_id": "t9", "severity": None, "raw_offset": 9}], {("iot_alerts", 2): Move(None, 3)})  # fmt: skip
    finally:
        await store.close()
    await positions.open_replay(connection, 1, {2: 0}, {2: 100}, actor="ann", at_us=NOW_US)
    environment = {"PRESERVARIUM_POSTGRES__URL": dsn, "PRESERVARIUM_CLICKHOUSE__ENABLED": "false"}

    async def run(*arguments: str) -> Any:
        return await asyncio.to_thread(CliRunner(env=environment).invoke, cli, ["lineage", *arguments])

    up = json.loads((await run("up", "alarm:a1", "--json")).stdout)
    assert [(e["source_id"], e["transformation_id"]) for e in up["edges"]] == [
        ("raw:2:5-5", "rule:hot"),
        ("raw:2:6-6", "rule:hot"),
    ]
    down = json.loads((await run("down", "raw:2:5", "--json")).stdout)
    assert {e["target_id"] for e in down["edges"]} == {"alarm:a1", "generation:1"}
    printed = await run("down", "raw:2:5")
    assert "raw:2:5-5 → alarm:a1  raised by rule:hot" in printed.stdout
    assert (await run("up", "nothing")).exit_code == 2
    pytest.importorskip("openlineage", reason="missing: openlineage-python")
    file = tmp_path / "events.jsonl"
    assert json.loads((await run("openlineage", "--file", str(file), "--json")).stdout) == {"events": 1}
    (event,) = map(json.loads, file.read_text().splitlines())
    assert (event["job"]["name"], event["inputs"][0]["name"]) == ("sink-alarms", "iot_alerts")
    assert event["outputs"][0]["name"].endswith(".public.alarm_events")
    assert (await run("openlineage")).exit_code == 2
