"""The app without a broker: declarations, watchdog, fences, reports."""

import asyncio
import inspect
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.cli import reset as faust_reset

from preservarium import metrics, topics
from preservarium.errors import Fatal, Retry
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.streaming import app as engine
from preservarium.streaming.app import EXIT_UNHEALTHY, App
from preservarium.streaming.stage import Batch, Effects, Handler, Send
from preservarium.streaming.state import MEMORY_BYTES_MAX, UNWRITTEN_BYTES_MAX


def make(**settings: Any) -> App:
    return App(LiveSettings(Settings(**settings)))


async def nothing(_: Any) -> Effects:
    """Do nothing.

    At all.
    """
    return Effects()


def test_an_app_with_several_brokers_and_a_prefix() -> None:
    app = make(kafka=Kafka(bootstrap_servers="a:9092, b:9093", topic_prefix="site1.", group="g1", partitions=5))
    assert [str(url) for url in app.conf.broker] == ["batch://a:9092", "batch://b:9093"]
    assert app.conf.id == "g1"
    app.stage(topics.RAW, name="one")(nothing)
    app.group_stage(topics.VALIDATED, name="two", group="sink")(nothing)
    table = app.state_table("states", help="…")
    assert [s.topic_full for s in app.stages] == ["site1.iot_raw_data"]
    assert app.agents["one"].channel.get_topic_name() == "site1.iot_raw_data"
    assert app.agents["two"].channel.get_topic_name() == "site1.iot_validated_data"
    assert app.agents["one"].help == app.agents["two"].help == "Do nothing."
    assert app.group_feeds["two"].group == "g1-sink"
    assert table.table.changelog_topic_name == "g1-states-changelog"
    assert table.table.changelog_topic.partitions == 5


def test_partitions_that_somebody_has_added_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make(kafka=Kafka(partitions=12))
    app.stage(topics.RAW, name="one")(nothing)
    app.group_stage(topics.VALIDATED, name="two", group="sink")(nothing)
    told: list[int] = []
    feed = app.group_feeds["two"]
    feed.lanes[0] = None  # type: ignore[assignment]  # one that works
    monkeypatch.setattr(feed, "topic_changed", told.append)

    def unread(topic: str) -> float:
        return metrics.PARTITIONS_UNREAD.labels(topic)._value.get()

    app._topic_found("iot_raw_data", 12)
    assert (app._misfits, unread("iot_raw_data"), told) == ({}, 0, [])
    app._topic_found("iot_raw_data", 14)
    assert (app._misfits, unread("iot_raw_data")) == ({"iot_raw_data": 14}, 2)
    app._topic_found("iot_validated_data", 15)  # only a group reads it: it is told, and misses nothing
    assert (app._misfits, told) == ({"iot_raw_data": 14}, [15])
    app._topic_found("somebody_else_s", 3)
    app._topic_found("iot_raw_data", 12)
    assert (app._misfits, unread("iot_raw_data")) == ({}, 0)


def test_two_stages_of_one_name_are_refused() -> None:
    app = make()
    app.stage(topics.RAW, name="one")(nothing)
    with pytest.raises(ValueError, match="declared twice"):
        app.group_stage(topics.RAW, name="one", group="g")(nothing)


def test_all_tables_of_a_worker_keep_one_limit_of_memory(tmp_path: Path) -> None:
    app = make(data_dir=str(tmp_path))
    tables = [app.state_table(name) for name in ("one", "two", "three")]
    app._take_slot()
    app._share_memory()
    (memory,) = {table.table.data.rocksdb_options for table in tables}
    stores = [table.table.data for table in tables]
    values = random.Random(1)
    most = 0
    for turn in range(8):
        for store in stores:
            for partition in range(12):
                items = [(b"%d-%d" % (turn, n), values.randbytes(4_096)) for n in range(64)]
                store.put(partition, items, turn)
                most = max(most, memory.unwritten.get_usage())
    # Written: 3 tables x 12 partitions x 2 MiB. A buffer that is being written out counts until it is.
    assert most <= UNWRITTEN_BYTES_MAX * 1.2
    for store in stores:
        for partition in range(12):
            for turn in range(8):
                for n in range(64):
                    assert len(store._db_for_partition(partition).get(b"%d-%d" % (turn, n))) == 4_096
    assert UNWRITTEN_BYTES_MAX < memory.cache.get_usage() <= MEMORY_BYTES_MAX * 1.05
    assert app._slot is not None
    app._slot.close()


def test_an_app_without_shared_stages_does_not_subscribe_to_nothing() -> None:
    app = make()
    app.group_stage(topics.RAW, name="one", group="g")(nothing)
    services = app.on_init_dependencies()
    assert services[0] is app.publisher
    assert app.boot_strategy.enable_kafka_consumer is False


async def test_a_group_stage_cannot_write_a_table() -> None:
    app = make()
    app.group_stage(topics.RAW, name="one", group="g")(nothing)
    with pytest.raises(Fatal, match="does not declare the state t"):
        await app.group_feeds["one"].runner._put_state("t", 0, {b"k": b"v"})


class Kept:
    """Kafka and RocksDB as far as a runner sees them."""

    def __init__(self) -> None:
        self.topics: list[str] = []
        self.puts: dict[bytes, bytes | None] = {}

    async def publish(self, sends: Sequence[Send]) -> dict[str, int]:
        self.topics += [send.topic.name for send in sends]
        return {}

    async def put_many(self, partition: int, items: Mapping[bytes, bytes | None]) -> None:
        self.puts.update(items)


def declaring(*effects: Effects) -> tuple[App, Kept]:
    """An app whose one stage declares a topic and a table, and has these effects, batch by batch."""
    kept = Kept()
    app = make()
    app.publisher.publish = kept.publish  # type: ignore[method-assign]
    states, _ = (app.state_table(name, key="device", help="…") for name in ("states", "others"))
    app.state_tables = dict.fromkeys(("states", "others"), kept)  # type: ignore[arg-type]
    turns = iter(effects)

    async def handler(_: Batch) -> Effects:
        return next(turns)

    app.stage(topics.RAW, name="one", writes=(topics.STANDARDIZED,), state=states)(handler)
    return app, kept


async def run(app: App) -> None:
    record = SimpleNamespace(offset=0, timestamp=0, key=b"d", value=b"{}", headers=())
    (stage,) = app.stages
    await stage.runner.process([Batch(topics.RAW.name, 0, [record])], lambda _: None)


async def test_a_stage_writes_what_it_declares_and_error_lines() -> None:
    effects = Effects([Send(topic, b"d", b"{}") for topic in (topics.STANDARDIZED, topics.ERRORS)])
    effects.put("states", b"d", b"1")
    app, kept = declaring(effects)
    await run(app)
    assert kept.topics == ["iot_standardized_data", "iot_errors"]
    assert kept.puts == {b"d": b"1"}
    assert app.declared["one"].state == "states"


async def test_a_stage_that_writes_what_it_does_not_declare_ends_the_worker_and_nothing_is_written() -> None:
    stray = Effects([Send(topics.STANDARDIZED, b"d", b"{}"), Send(topics.VALIDATED, b"d", b"{}")])
    wrong = Effects()
    wrong.put("others", b"d", b"1")
    app, kept = declaring(stray, wrong)
    with pytest.raises(Fatal, match="stage one does not declare that it writes iot_validated_data"):
        await run(app)
    with pytest.raises(Fatal, match="stage one does not declare the state others"):
        await run(app)
    assert kept.topics == []
    assert kept.puts == {}


async def test_stages_with_one_state_take_turns_on_a_partition() -> None:
    app = make()
    states = app.state_table("states")
    working: list[str] = []
    together: list[tuple[str, ...]] = []

    def stage(name: str) -> Handler:
        async def handler(batch: Batch) -> Effects:
            working.append(name)
            for _ in range(5):
                together.append(tuple(working))
                await asyncio.sleep(0)
            working.remove(name)
            return Effects()

        return handler

    for name, topic, state in (
        ("one", topics.RAW, states),
        ("two", topics.VALIDATED, states),
        ("free", topics.ALERTS, None),
    ):
        app.stage(topic, name=name, state=state)(stage(name))
    record = SimpleNamespace(offset=0, timestamp=0, key=b"d", value=b"{}", headers=())
    await asyncio.gather(
        *(each.runner.process([Batch("t", 3, [record])], lambda _: None) for each in app.stages),
    )
    assert {"one", "two", "free"} == {name for names in together for name in names}
    assert not [names for names in together if {"one", "two"} <= set(names)]
    assert [names for names in together if "free" in names and len(names) > 1], "without state nobody is waited for"


def test_workers_of_one_machine_take_directories_of_their_own(tmp_path: Path) -> None:
    first, second = make(data_dir=str(tmp_path)), make(data_dir=str(tmp_path))
    first._take_slot()
    second._take_slot()
    assert first.conf.datadir == tmp_path / "worker-0"
    assert second.conf.datadir == tmp_path / "worker-1"
    assert first._slot is not None
    first._slot.close()
    third = make(data_dir=str(tmp_path))
    third._take_slot()
    assert third.conf.datadir == tmp_path / "worker-0"
    for app in (second, third):
        assert app._slot is not None
        app._slot.close()


def test_a_data_directory_on_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("F_DATADIR", str(tmp_path / "mine"))
    app = make(data_dir=str(tmp_path))
    app._take_slot()
    assert app.conf.datadir == tmp_path / "mine"


class Coordinator:
    """aiokafka's, as far as the watchdog looks."""

    def __init__(self, task: asyncio.Future[None]) -> None:
        self._pending_exception: Exception | None = None
        self._coordination_task = task

    def check_errors(self) -> None:
        if (error := self._pending_exception) is not None:
            self._pending_exception = None
            raise error


async def watched(app: App, monkeypatch: pytest.MonkeyPatch) -> tuple[Coordinator, asyncio.Task[None]]:
    coordinator = Coordinator(asyncio.get_running_loop().create_future())

    async def call_thread(function: Any, *arguments: Any) -> Any:
        return await function(*arguments)

    thread = SimpleNamespace(_consumer=SimpleNamespace(_coordinator=coordinator), call_thread=call_thread)
    app._consumer = SimpleNamespace(_thread=thread)
    monkeypatch.setattr("preservarium.streaming.app.WATCH_S", 0.001)
    return coordinator, asyncio.create_task(App._watch_group.fun(app))


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def test_the_watchdog_unparks_a_group_error(monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator, task = await watched(make(), monkeypatch)
    coordinator._pending_exception = RuntimeError("unknown error from SyncGroup")
    await until(lambda: coordinator._pending_exception is None)
    assert not task.done()
    task.cancel()


async def test_the_watchdog_ends_a_worker_that_cannot_be_healed(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []

    class LeftError(Exception):
        """Here, leaving must end the task and not the tests."""

    def leave(code: int) -> None:
        exits.append(code)
        raise LeftError

    monkeypatch.setattr("os._exit", leave)
    app = make()
    coordinator, task = await watched(app, monkeypatch)
    task.add_done_callback(lambda t: t.exception())
    coordinator._coordination_task.set_result(None)
    await until(lambda: exits)
    assert exits == [EXIT_UNHEALTHY] == [70]


async def test_a_stop_that_hangs_ends_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    said: list[Any] = []
    monkeypatch.setattr("os._exit", exits.append)
    monkeypatch.setattr(engine, "STOP_MAX_S", 0.05)
    monkeypatch.setattr(engine.log, "error", lambda event, **fields: said.append((event, fields)))
    app = make()

    class Culprit:
        async def hangs_here(self) -> None:
            await asyncio.Event().wait()

    task = asyncio.create_task(Culprit().hangs_here(), name="the culprit")
    await asyncio.sleep(0)
    await app.on_stop()
    await until(lambda: exits)
    task.cancel()
    assert exits == [EXIT_UNHEALTHY]
    ((event, fields),) = said
    assert event == "worker_stop_hangs"
    (place,) = [each for each in fields["tasks"] if each.startswith("the culprit: ")]
    assert re.fullmatch(r"the culprit: Culprit\.hangs_here:\d+ > Event\.wait:\d+", place)


async def test_a_stop_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)
    monkeypatch.setattr(engine, "STOP_MAX_S", 0.05)
    app = make()
    await app.on_stop()
    await app.on_shutdown()
    assert app._stop_timer is not None
    await asyncio.to_thread(app._stop_timer.join, 5)
    assert not app._stop_timer.is_alive()
    assert exits == []


async def test_a_worker_that_was_frozen_writes_no_state_before_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make(kafka=Kafka(session_timeout_s=20))
    app._check_thawed()
    app._beat_s -= 14
    app._check_thawed()
    app._beat_s -= 2
    with pytest.raises(Retry, match="frozen"):
        app._check_thawed()


def test_a_report_before_anything_runs() -> None:
    app = make()
    app.stage(topics.RAW, name="one")(nothing)
    app.group_stage(topics.VALIDATED, name="two", group="g")(nothing)
    report = app.health_report()
    assert report["ok"]
    assert report["stages"]["one"]["lag"] == 0
    assert report["stages"]["two"]["trouble"] == "not started"
    app.stages.of("iot_raw_data")[0].runner.fuse.reason = "because"
    app.stages.of("iot_raw_data")[0].runner.fuse._closed.clear()
    report = app.health_report()
    assert report["problems"] == ["one: fuse blown: because"]
    fuse = app.guards()["fuses"]["one"]
    assert fuse | {"refused_max": 0} == {
        "blown": True,
        "reason": "because",
        "records": 0,
        "refused": 0,
        "refused_max": 0,
    }
    assert app.reset_fuse("one")
    assert not app.guards()["fuses"]["one"]["blown"]
    assert not app.reset_fuse("nobody")
    assert app.health_report()["ok"]


def test_faust_reset_finds_the_databases_of_this_machine_s_workers(tmp_path, monkeypatch, capsys):
    """Hook: `faust reset` calls reset_state of each table of the app."""
    app = make(data_dir=str(tmp_path))
    tables = [app.state_table(name) for name in ("one", "two")]
    gone = tmp_path / "state" / "worker-0" / "v1" / "tables" / "one-3.db"
    gone.mkdir(parents=True)
    for table in tables:
        table.table.reset_state()
    assert not gone.exists()
    told = capsys.readouterr().out
    assert "worker-0: 1 databases deleted" in told
    assert f"no database of two is in {tmp_path}, nothing was deleted" in told
    assert "reset_state" in inspect.getsource(faust_reset.reset.reset_tables)


def test_faust_reset_with_a_directory_of_its_own_deletes_that_one(tmp_path, monkeypatch):
    monkeypatch.setenv("F_DATADIR", str(tmp_path / "given"))
    app = make(data_dir=str(tmp_path / "other"))
    table = app.state_table("one")
    gone = Path(app.conf.tabledir) / "one-0.db"
    kept = tmp_path / "other" / "worker-0" / "v1" / "tables" / "one-0.db"
    for path in (gone, kept):
        path.mkdir(parents=True)
    table.table.reset_state()
    assert not gone.exists()
    assert kept.exists()
