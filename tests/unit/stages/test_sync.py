"""The sync stages: columns, tokens, and what they remember across a crash."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest
from record_fakes import Rec

from preservarium.clock import ManualClock
from preservarium.errors import Retry
from preservarium.settings import Settings
from preservarium.stages.sync import (
    ALARM_EVENTS,
    SEEN_MAX,
    STANDING_GAP_US,
    EventSync,
    ReadingSync,
    _ranges,
    row_version,
)
from preservarium.streaming.stage import Batch

KEY = ("device_id", "component_type", "pin_position", "connector_mode", "timestamp")
NOW_US = 1_700_000_000_000_000


class Store:
    """Remembers inserts; a token that it has seen is dropped, as the engine does."""

    def __init__(self) -> None:
        self.inserts: dict[str, dict[str, list[Any]]] = {}
        self.down = False
        #: rows that stand from before: key -> version; None: the table is as `inserts` say
        self.standing: dict[tuple[Any, ...], int] | None = None
        self.asked: list[str] = []
        #: the server's clock, and by it when each insert came
        self.now_us = NOW_US + 3_600_000_000
        self.came: dict[str, int] = {}

    async def insert(
        self, table: str, columns: Mapping[str, Sequence[Any]], types: Mapping[str, str], *, token: str
    ) -> None:
        assert len({len(c) for c in columns.values()}) == 1, "columns of different length"
        assert set(columns) == set(types)
        if self.down:
            raise Retry("down")
        self.now_us += 1
        if token not in self.inserts:
            self.inserts[token], self.came[token] = {n: list(c) for n, c in columns.items()}, self.now_us

    async def ask(self, text: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        self.asked.append(text)
        if self.down:
            raise Retry("down")
        self.now_us += 1
        if parameters is None:
            return [(self.now_us, 1 if self.rows(self.now_us) else 0)]
        return [
            (*key, version)
            for key, version in self.rows(parameters["since"]).items()
            if parameters["from"] <= key[4] <= parameters["to"]
        ]

    def rows(self, before_us: int) -> dict[tuple[Any, ...], int]:
        """Key -> the version that stays, of what was there before an instant."""
        if self.standing is not None:
            return self.standing
        found: dict[tuple[Any, ...], int] = {}
        for token, c in self.inserts.items():
            if self.came[token] >= before_us:
                continue
            for row in zip(*(c[n] for n in (*KEY, "generation", "revised", "received_at")), strict=True):
                key, version = row[:5], row_version(*row[5:])
                found[key] = max(version, found.get(key, version))
        return found

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
    return ReadingSync(store, Settings, clock=ManualClock(NOW_US))  # type: ignore[arg-type]


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


async def test_what_stands_is_not_inserted_again_when_the_offset_was_set_back() -> None:
    """In batches of other bounds, which no token tells."""
    store, messages = Store(), [message(i) for i in range(10)]
    await run(stage(store), batch(messages))
    again = stage(store)
    again.recall(0, "")
    await again.reread({0: 10})
    await run(again, batch(messages[:7]))
    await run(again, batch([*messages[7:], message(10)], first=7))
    assert store.column("raw_offset") == [o for o in range(11) for _ in range(2)]
    # It was read to where it had been, and what comes is news.
    asked = len(store.asked)
    await run(again, batch([message(11)], first=11))
    assert len(store.asked) == asked
    assert store.column("raw_offset")[-2:] == [11, 11]


async def test_what_is_missing_is_inserted_when_the_offset_was_set_back_also_under_bounds_of_before() -> None:
    store, messages = Store(), [message(i) for i in range(4)]
    await run(stage(store), batch(messages))
    # Somebody has deleted rows; the engine still knows the token of the insert.
    store.standing = {key: version for key, version in store.rows(store.now_us + 1).items() if key[1] == "c0"}
    again = stage(store)
    again.recall(0, "")
    await again.reread({0: 4})
    await run(again, batch(messages))
    (first, second) = store.inserts
    assert second.startswith(first)
    assert second != first
    assert store.inserts[second]["component_type"] == ["c1"] * 4


async def test_a_row_that_was_overwritten_stands() -> None:
    store = Store()
    store.standing = {
        ("d", "c0", "-1", "MQTT", NOW_US + 1): row_version(0, 1, NOW_US),  # by a later verdict
        ("d", "c0", "-1", "MQTT", NOW_US + 2): row_version(1, 0, NOW_US),  # by a later generation
        ("d", "c0", "-1", "MQTT", NOW_US + 3): row_version(0, 0, NOW_US + 9),  # by nothing: it was received later
    }
    again = stage(store)
    await again.reread({0: 4})
    await run(again, batch([message(i, readings=1) for i in (1, 2, 3)], first=1))
    assert store.column("raw_offset") == [3]


async def test_what_the_table_drops_for_its_age_is_not_counted_again() -> None:
    store, old = Store(), message(0)
    old["timestamp"] = store.now_us - (Settings().sync.retention_days + 1) * 86_400_000_000
    store.standing = {("x", "c", "-1", "m", NOW_US): 0}
    again = stage(store)
    await again.reread({0: 2})
    await run(again, batch([old, message(1)]))
    assert store.column("raw_offset") == [1, 1]


async def test_into_an_empty_table_goes_everything_and_nothing_is_looked_up() -> None:
    store = Store()
    sync = stage(store)
    sync.recall(0, "")
    await sync.reread({0: 100})
    await run(sync, batch([message(0), message(1)]))
    assert store.column("raw_offset") == [0, 0, 1, 1]
    assert len(store.asked) == 1


async def test_a_second_reading_goes_on_after_a_crash() -> None:
    store, messages = Store(), [message(i) for i in range(6)]
    await run(stage(store), batch(messages))
    again = stage(store)
    again.recall(0, "")
    await again.reread({0: 6})
    await run(again, batch(messages[:2]))
    text = again.remember(0)
    assert len(text) < 3_900
    after = stage(store)
    after.recall(0, text)
    await run(after, batch(messages[1:], first=1))
    assert store.column("raw_offset") == [o for o in range(6) for _ in range(2)]
    # What was read to its end is forgotten.
    assert orjson.loads(after.remember(0)) == [[0, 0, 5, 0]]


@pytest.mark.parametrize("crash", [False, True])
async def test_a_batch_of_a_second_reading_that_is_done_again_is_the_same_insert(crash: bool) -> None:
    """A try that broke off may have stored rows, and not yet have told its views: only the same insert completes them."""
    store, messages = Store(), [message(i) for i in range(3)]
    await run(stage(store), batch(messages[:1]))
    again = stage(store)
    await again.reread({0: 3})
    given, noted = batch(messages), again.remember(0)
    insert, tried = store.insert, []

    async def breaks_off(table: str, columns: Any, types: Any, *, token: str) -> None:
        tried.append((token, {name: list(values) for name, values in columns.items()}))
        await insert(table, columns, types, token=token)
        if len(tried) == 1:
            raise Retry("the answer was lost")

    store.insert = breaks_off  # type: ignore[method-assign]
    with pytest.raises(Retry):
        await again([given])
    if crash:
        again = stage(store)
        again.recall(0, noted)
    await run(again, given)
    assert tried[0] == tried[1]
    assert tried[0][1]["raw_offset"] == [1, 1, 2, 2]
    assert store.column("raw_offset") == [0, 0, 1, 1, 2, 2]


async def test_clickhouse_that_does_not_answer_a_look_up_is_waited_for() -> None:
    store = Store()
    store.standing = {("d", "c0", "-1", "MQTT", NOW_US): 0}
    again = stage(store)
    store.down = True
    with pytest.raises(Retry):
        await again.reread({0: 3})
    store.down = False
    await again.reread({0: 3})
    store.down = True
    with pytest.raises(Retry):
        await again([batch([message(0)])])
    store.down = False
    await run(again, batch([message(1)]))
    assert store.column("raw_offset") == [1, 1]


def test_rows_are_looked_up_by_ranges_of_their_instants() -> None:
    second = 1_000_000
    at = [5 * second, 0, 4_000 * second, 1, 4_000 * second + STANDING_GAP_US]
    assert list(_ranges(at)) == [[1, 3, 0], [2, 4]]
    assert list(_ranges([])) == []
    # A long row of near ones is cut, too.
    parts = list(_ranges([n * 30 * second for n in range(300)]))
    assert [len(part) for part in parts] == [121, 121, 58]


def test_a_foreign_text_is_forgotten() -> None:
    sync = stage(Store())
    for text in (
        "reset by hand",
        "{}",
        "[1]",
        '{"a": 1}',
        "[[1, 2]]",
        '{"below": 1, "since": 2, "seen": 3}',
        '{"below"',
    ):
        sync.recall(0, text)
        assert sync.remember(0).endswith("[]" if 'below": 1' not in text else "[]}"), text


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
