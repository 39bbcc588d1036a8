"""What all stages with a state for each device do alike: the same cases for each of them."""

import gc
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from preservarium import metrics, topics
from preservarium.errors import Fatal, ReasonCode, Reject
from preservarium.stages.aggregate import Aggregation
from preservarium.stages.alarm import Alarming
from preservarium.stages.anomaly import Detection
from preservarium.stages.commands import Commanding
from preservarium.stages.keyed import KeyedWork, OnDemand, Waiting, parse_written, written_lines
from preservarium.stages.validate import Validation
from preservarium.streaming.publish import partition_of
from preservarium.streaming.stage import Batch, Effects, Tick
from tests.quality_support import StateTable, T, World, batch, catalogue, errors, live, message, reading, record

PARTITION = partition_of(b"dev-1", 12)
TESTS = {"anomaly": {"warm_up": 50, "window": 32}, "gap": {"threshold": 60}}
TEMP: dict[str, Any] = {"name": "temp", "kind": "number", "unit": "°C", "tests": TESTS}
HOT: dict[str, Any] = {"name": "hot", "component_type": "temp", "kind": "high", "threshold": 30, "severity": "minor"}
BOX: dict[str, Any] = {"name": "box", "manufacturer": "m", "parser": "p", "rules": ["hot"]}
REQUEST = {"kind": "request", "device_id": "dev-1", "fields": {"on": 1}, "actor": "me", "confirm": "uplink"}


async def lookup(partition: int, devices: Any) -> None:
    """Every device is known."""


class Stage:
    """One of the stages on a table `k`, with one batch that it has something to do with."""

    def __init__(self, name: str) -> None:
        self.world = World(catalogue(("datatype", TEMP), ("rule", HOT), ("type", BOX)))
        self.world.devices["dev-1"] = {"device_id": "dev-1", "rev": 1, "type": "box", "enabled": True}
        world, table = self.world, StateTable(self.world, "k")
        of: Any = (table, world.known, world.documents, live(aggregate={"windows": "60s"}), world.clock)
        self.stage: Any
        self.handle: Callable[[Batch], Awaitable[Effects]]
        topic, line = topics.VALIDATED, message(1, {**reading(40), "quality": 1})
        match name:
            case "validate":
                self.stage = Validation(*of)
                self.handle, topic, line = self.stage, topics.STANDARDIZED, message(1, reading(20))
            case "aggregate":
                self.stage = self.handle = Aggregation(*of)
            case "anomaly":
                self.stage = self.handle = Detection(*of)
            case "alarm":
                self.stage = Alarming(*of)
                self.handle = self.stage.observe
            case "commands":
                self.stage = Commanding(*of[:2], lookup, *of[2:])
                self.handle, topic, line = self.stage.lines, topics.COMMANDS, REQUEST
        self.batch = batch(topic, record(1, line), partition=PARTITION)

    def carry_out(self, effects: Effects) -> None:
        """As the runner does."""
        self.world.carry_out(effects, PARTITION)
        effects.after.clear()


NAMES = ["validate", "aggregate", "anomaly", "alarm", "commands"]


@pytest.mark.parametrize("name", NAMES)
async def test_what_came_before_is_counted_and_changes_neither_state_nor_what_is_told(name):
    stage = Stage(name)
    stage.carry_out(await stage.handle(stage.batch))
    known = dict(stage.world.tables)
    assert list(known) == [("k", PARTITION, b"dev-1")]
    counter = metrics.DUPLICATES.labels(name)
    before = counter._value.get()
    again = await stage.handle(stage.batch)
    assert (again.sends, again.puts) == ([], {})
    stage.carry_out(again)
    assert counter._value.get() == before + 1
    assert stage.world.tables == known


@pytest.mark.parametrize("name", [name for name in NAMES if name != "commands"])
async def test_a_device_that_another_worker_has_met_is_asked_for_once(name):
    """It may have been registered, and heard by the worker that normalized its message, before this worker reads of it."""
    first, second = Stage(name), Stage(name)
    document, asked = second.world.devices.pop("dev-1"), []

    async def ask(partition: int, devices: Any) -> None:
        asked.append((partition, [*devices]))
        second.world.devices["dev-1"] = document

    second.stage._lookup = ask
    expected = await first.handle(first.batch)
    effects = await second.handle(second.batch)
    assert asked == [(PARTITION, ["dev-1"])]
    assert (effects.sends, effects.puts) == (expected.sends, expected.puts)
    second.carry_out(effects)
    await second.handle(second.batch)
    assert len(asked) == 1


@pytest.mark.parametrize("name", NAMES)
async def test_state_of_another_release_is_left_alone(name):
    stage = Stage(name)
    stage.world.tables["k", PARTITION, b"dev-1"] = orjson.dumps({"v": 99, "g": {}})
    with pytest.raises(Fatal, match="version 99"):
        await stage.handle(stage.batch)


@pytest.mark.parametrize("name", NAMES)
async def test_what_a_batch_read_is_free_without_the_cycle_collector(name):
    stage = Stage(name)
    stage.carry_out(await stage.handle(stage.batch))
    gc.collect()
    gc.disable()
    try:
        stage.carry_out(await stage.handle(stage.batch))
        tick = getattr(stage.stage, "tick", None)
        if tick is not None:
            for first in (True, False):
                stage.carry_out(await tick(Tick(PARTITION, T + 10**9, first, False)))
        left = [one for one in gc.get_objects() if isinstance(one, KeyedWork)]
    finally:
        gc.enable()
    assert left == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "commands"])
async def test_a_record_of_ours_that_is_none_is_refused_and_the_others_are_taken(name):
    stage = Stage(name)
    torn = record(0, b'{"device_id": "dev-1", ')
    effects = await stage.handle(Batch(stage.batch.topic, PARTITION, [torn, *stage.batch.records]))
    assert [code for code, _ in errors(effects.sends)] == ["envelope_not_json"]
    assert list(effects.puts["k"]) == [b"dev-1"]


def test_lines_that_anyone_wrote_keep_their_index():
    given = batch(topics.ALARM_ACTIONS, record(7, b"a", b"", b"  ", b"b"), record(8), record(9, b"c"))
    assert [(r.offset, index, line) for r, index, line in written_lines(given)] == [
        (7, 0, b"a"), (7, 3, b"b"), (9, 0, b"c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "code"), [(b'"' + b"x" * 7 + b'"', ReasonCode.ENVELOPE_TOO_LARGE), (b"{", ReasonCode.ENVELOPE_NOT_JSON)]
)
def test_a_line_that_anyone_wrote_may_be_refused(line, code):
    with pytest.raises(Reject, match="a thing") as refused:
        parse_written(line, 8, "a thing")
    assert refused.value.code is code
    assert parse_written(b'"xxxxxx"', 8, "a thing") == "xxxxxx"


def test_what_is_needed_on_demand_is_made_once_also_where_it_is_nothing():
    asked: list[str] = []

    def make(name: str) -> str | None:
        asked.append(name)
        return None if name == "none" else name.upper()

    known: OnDemand[str | None] = OnDemand(make)
    assert [known[name] for name in ("a", "none", "a", "none")] == ["A", None, "A", None]
    assert asked == ["a", "none"]


def test_what_waits_is_known_by_partition():
    waiting: Waiting[int] = Waiting()
    waiting.put(1, {"a": 5, "b": 6})
    waiting.put(2, {"a": 7})
    waiting.put(1, {"a": None, "b": 8, "c": None})
    assert (waiting.of(1), waiting.of(2), waiting.of(3)) == ({"b": 8}, {"a": 7}, {})
    waiting.begin(1, {"d": 9})
    assert waiting.of(1) == {"d": 9}
