"""The sync stages: columns, tokens, and what they remember across a crash."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest
from record_fakes import Rec

from preservarium.errors import Retry
from preservarium.settings import Settings
from preservarium.stages.sync import ALARM_EVENTS, SEEN_MAX, EventSync, ReadingSync
from preservarium.streaming.stage import Batch


class Store:
    """Remembers inserts; a token that it has seen is dropped, as the engine does."""

    def __init__(self) -> None:
        self.inserts: dict[str, dict[str, list[Any]]] = {}
        self.down = False

    async def insert(
        self, table: str, columns: Mapping[str, Sequence[Any]], types: Mapping[str, str], *, token: str
    ) -> None:
        assert len({len(c) for c in columns.values()}) == 1, "columns of different length"
        assert set(columns) == set(types)
        if self.down:
            raise Retry("down")
        self.inserts.setdefault(token, {n: list(c) for n, c in columns.items()})

    def column(self, name: str) -> list[Any]:
        return [value for columns in self.inserts.values() for value in columns[name]]


def message(offset: int, *, readings: int = 2, raw_partition: int = 0, generation: int = 0) -> dict[str, Any]:
    return {
        "device_id": "d", "connector_mode": "MQTT", "topic": "t", "timestamp": 1_700_000_000_000_000 + offset,
        "received_at": 1_700_000_000_000_000, "raw_partition": raw_partition, "raw_offset": offset, "raw_index": 0,
        "parser": "p@1", "config_rev": 3, "generation": generation,
        "readings": [
            {"component_type": f"c{i}", "pin_position": "-1", "value": float(i), "unit": "V", "quality": 3, "flags": ["a", "b"]}
            for i in range(readings)
        ],
    }  # fmt: skip


def batch(messages: Sequence[dict[str, Any]], first: int = 0, topic: str = "iot_validated_data") -> Batch:
    return Batch(topic, 0, [Rec(first + i, value=orjson.dumps(m)) for i, m in enumerate(messages)])


def stage(store: Store) -> ReadingSync:
    return ReadingSync(store, Settings)  # type: ignore[arg-type]


async def run(sync: ReadingSync, given: Batch) -> Any:
    effects = await sync([given])
    for callback in effects.after:
        callback()
    return effects


async def test_readings_become_columns_under_a_token_that_names_the_range() -> None:
    store = Store()
    await run(stage(store), batch([message(0), message(1, readings=1)], first=10))
    assert list(store.inserts) == ["iot_validated_data-0-10-12"]
    assert store.column("raw_offset") == [0, 0, 1]
    assert store.column("component_type") == ["c0", "c1", "c0"]
    assert store.column("flags") == ["a,b"] * 3


async def test_what_a_stage_before_sent_twice_is_stored_once() -> None:
    store, messages = Store(), [message(i) for i in range(5)]
    sync = stage(store)
    await run(sync, batch(messages))
    await run(sync, batch([*messages[3:], message(5)], first=5))
    assert store.column("raw_offset") == [o for o in range(6) for _ in range(2)]


async def test_the_memory_beside_the_offset_survives_a_crash() -> None:
    store, messages = Store(), [message(i) for i in range(5)]
    sync = stage(store)
    await run(sync, batch(messages))
    after = stage(store)
    after.recall(0, sync.remember(0))
    await run(after, batch([*messages[2:], message(5)], first=5))
    assert store.column("raw_offset") == [o for o in range(6) for _ in range(2)]


async def test_a_batch_that_is_tried_again_is_the_same() -> None:
    store = Store()
    sync = stage(store)
    given = batch([message(0), message(1)])
    store.down = True
    with pytest.raises(Retry):
        await sync([given])
    store.down = False
    await run(sync, given)
    assert store.column("raw_offset") == [0, 0, 1, 1]


async def test_partitions_and_generations_are_told_apart() -> None:
    store = Store()
    await run(stage(store), batch([message(5), message(3, raw_partition=1), message(4, generation=1)]))
    assert store.column("raw_offset") == [5, 5, 3, 3, 4, 4]


async def test_a_line_that_cannot_be_stored_is_refused_and_the_rest_stands() -> None:
    store = Store()
    bad = message(1)
    bad["readings"][1]["value"] = "much"
    effects = await run(stage(store), batch([message(0), bad, message(2)]))
    assert effects.refused == {"store_rejected": 1}
    assert store.column("raw_offset") == [0, 0, 2, 2]


async def test_the_memory_is_bounded_and_keeps_the_newest() -> None:
    sync = stage(Store())
    await run(sync, batch([message(0, raw_partition=p) for p in range(SEEN_MAX * 3)]))
    text = sync.remember(0)
    assert len(text) < 3_900
    assert orjson.loads(text)[-1][1] == SEEN_MAX * 3 - 1


def test_a_foreign_text_is_forgotten() -> None:
    sync = stage(Store())
    for text in ("reset by hand", "{}", "[1]", '{"a": 1}', "[[1, 2]]"):
        sync.recall(0, text)
        assert sync.remember(0) == "[]"


async def test_alarm_transitions_become_columns() -> None:
    store = Store()
    line = {
        "transition_id": "t1", "alarm_id": "a1", "device_id": "d", "rule": "r", "rule_rev": 1, "component_type": "c",
        "pin_position": "-1", "severity": "major", "transition": "raised", "state": "unacknowledged", "occurred_at": 5,
        "detected_at": 6, "cleared_at": None, "value": 1, "unit": "V", "threshold": None, "message": "m",
        "generation": 0, "raw_partition": 0, "raw_offset": 1, "raw_index": 0,
    }  # fmt: skip
    sync = EventSync(ALARM_EVENTS, store, Settings)  # type: ignore[arg-type]
    await run(sync, batch([line], topic="iot_alerts"))  # type: ignore[arg-type]
    assert store.column("transition_id") == ["t1"]
    assert store.column("value") == [1.0]
    assert store.column("cleared_at") == [None]
