"""Canaries on a real PostgreSQL: started, compared on the same messages, moved and ended by people and by limits, each with its reason."""

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from click.testing import CliRunner
from record_fakes import RawRec
from sink_support import NOW_US, fetch

from preservarium import topics
from preservarium.__main__ import cli
from preservarium.clock import ManualClock
from preservarium.domain.canary import LIMITS, sees
from preservarium.operations import canaries as operation
from preservarium.operations.canary_watch import Watch
from preservarium.registry.apply import apply
from preservarium.registry.catalogue import Catalogue
from preservarium.settings import load
from preservarium.stores import canaries, events, registry
from preservarium.stores.canaries import CanaryError
from preservarium.stores.registry_past import Past
from preservarium.streaming.records import parse_raw, raw_line

REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes: [{name: temperature, kind: number, unit: degC, fail_span: {min: -40, max: 60}}]
parsers:
  - {name: acme, kind: json, source: {fields: [{name: t, path: t, unit: degC}]}, status: STATUS}
device_types: [{name: T1, manufacturer: Acme, parser: acme, mapping: {t: {component_type: temperature}}}]
devices: [DEVICES]
"""
DEVICES = [f"d{n}" for n in range(40)]


class World:
    """The registry, and what a worker knows of it."""

    def __init__(self, settings: Any, connection: Any, directory: Path) -> None:
        self.settings, self.connection = settings, connection
        self.file = directory / "registry.yaml"
        self.catalogue = Catalogue()
        self.clock = ManualClock(NOW_US)
        self.devices: dict[str, Any] = {}
        self.watch = Watch(self.catalogue, lambda _, device: self.devices.get(device), lambda: settings, self.clock)

    async def apply(self, path: str = "t", status: str = "active", bound: str = "60") -> None:
        devices = ", ".join(f"{{device_id: {d}, type: T1}}" for d in DEVICES)
        text = REGISTRY.replace("DEVICES", devices).replace("STATUS", status)
        self.file.write_text(text.replace("path: t", f"path: {path}").replace("max: 60", f"max: {bound}"))
        await apply(self.settings, self.file)

    async def follow(self) -> None:
        """What the relay and the worker would do with the outbox."""
        for row in await self.connection.fetch("SELECT topic, key, value, rev FROM registry_outbox ORDER BY id"):
            key, value = bytes(row["key"]), None if row["value"] is None else bytes(row["value"])
            if row["topic"] == "iot_type_registry":
                self.catalogue.apply(key, value, rev=row["rev"])
            elif value is not None:
                self.devices[key.decode()] = orjson.loads(value)

    def send(self, *payloads: Any) -> None:
        for n, payload in enumerate(payloads):
            lines = (raw_line(d, payload, received_at=NOW_US, connector="test", mode="MQTT") for d in DEVICES)
            record = RawRec(b"\n".join(lines), offset=n)
            messages, errors = parse_raw(record, topics.RAW.name, 0, payload_bytes_max=10_000)
            assert not errors
            self.watch.saw(0, messages)


@pytest.fixture
async def world(dsn: str, tmp_path: Path):
    settings = load(postgres={"url": dsn}, kafka={"bootstrap_servers": "127.0.0.1:1"}, clickhouse={"enabled": False})
    connection = await asyncpg.connect(dsn)
    made = World(settings, connection, tmp_path)
    await made.apply()
    yield made
    await made.watch.close()
    await connection.close()


def by(**more: Any) -> dict[str, Any]:
    return {"actor": "ann", "reason": "drill", "at_us": NOW_US, **more}


async def test_a_broken_candidate_is_rolled_back_by_the_limits_with_a_reason(world: World) -> None:
    await world.apply(path="other", status="draft")
    with pytest.raises(CanaryError, match="in force already"):
        await operation.start_parser(world.connection, "acme@1", 50, LIMITS, **by())
    with pytest.raises(CanaryError, match="has no acme@9"):
        await operation.start_parser(world.connection, "acme@9", 50, LIMITS, **by())
    started = await operation.start_parser(world.connection, "acme@2", 50, {**LIMITS, "messages_min": 10}, **by())
    with pytest.raises(CanaryError, match="under way"):
        await operation.start_parser(world.connection, "acme@2", 50, LIMITS, **by())
    await world.follow()
    share = [d for d in DEVICES if sees(started, d)]
    assert 5 < len(share) < 35
    world.send({"t": 20})
    await world.watch.turn()
    assert await canaries.all_of_them(world.connection) == []
    told = await events.read(world.connection, "canary/parser/acme")
    assert [(e.type, e.actor) for e in told] == [("created", "ann"), ("removed", "preservarium (limits)")]
    ended = told[-1].data
    assert (ended["outcome"], ended["compared"], ended["different"]) == ("rolled_back", len(share), len(share))
    assert "are refused by the candidate alone: 100.00%, and 1.00% is the limit" in ended["reason"]
    assert ended["examples"][0]["difference"] == "refused now, and not before"
    statuses = {
        stream: s.document["status"]
        for stream, s in (await registry.load(world.connection, ["parser"]))["parser"].items()
    }
    assert statuses == {"parser/acme@1": "active", "parser/acme@2": "draft"}
    await world.follow()
    assert world.catalogue.canaries == {}


async def test_differences_are_counted_shown_and_the_candidate_promoted_by_a_person(world: World) -> None:
    await world.apply(path="u", status="draft")
    await operation.start_parser(world.connection, "acme@2", 100, {**LIMITS, "errors": 1.0}, **by())
    await world.follow()
    world.send({"t": 20, "u": 20}, {"t": 20, "u": 21}, {"u": 5})
    await world.watch.turn()
    (stored,) = await canaries.all_of_them(world.connection)
    counts = await canaries.counts(world.connection, stored.document)
    assert (counts.compared, counts.different, counts.broken, counts.mended) == (120, 80, 0, 40)
    environment = {
        "PRESERVARIUM_POSTGRES__URL": world.settings.postgres.dsn,
        "PRESERVARIUM_CLICKHOUSE__ENABLED": "false",
    }

    async def run(*arguments: str) -> Any:
        return await asyncio.to_thread(CliRunner(env=environment).invoke, cli, ["canary", *arguments])

    (listed,) = orjson.loads((await run("list", "--json")).stdout)
    assert (listed["name"], listed["counts"]["different"], listed["counts"]["share_different"]) == (
        "parser/acme",
        80,
        0.666667,
    )
    shown = await run("show", "parser/acme")
    assert "compared 120: 80 come out otherwise" in shown.stdout
    assert "temperature[-1]: 20.0 °C" in shown.stdout
    assert (await run("step", "parser/acme", "10", "--reason", "too fast", "--actor", "bob")).exit_code == 0
    assert (await run("promote", "parser/acme", "--reason", "it is right", "--actor", "bob")).exit_code == 0
    assert (await run("promote", "parser/acme", "--reason", "again")).exit_code == 1
    await world.follow()
    assert world.catalogue.parser("acme")["version"] == 2  # type: ignore[index]
    assert world.catalogue.canaries == {}
    history = orjson.loads((await run("show", "parser/acme", "--json")).stdout)["history"]
    assert [(e["actor"], e["outcome"], e["percent"]) for e in history] == [
        ("ann", None, 100),
        ("bob", None, 10),
        ("bob", "promoted", 10),
    ]
    assert (await registry.verify(world.connection)).faults == []


async def test_bounds_go_up_by_themselves_within_the_limits_and_the_past_knows_them(
    world: World, tmp_path: Path
) -> None:
    narrow = tmp_path / "bounds.yaml"
    narrow.write_text("datatypes: [{name: temperature, kind: number, unit: degC, fail_span: {min: -40, max: 50}}]\n")
    both = tmp_path / "both.yaml"
    both.write_text(narrow.read_text() + "manufacturers: [{name: Other}]\n")
    with pytest.raises(CanaryError, match="changes one datatype"):
        await operation.start_datatype(world.connection, both, 1, LIMITS, **by())
    limits = {**LIMITS, "auto": True, "messages_min": 1, "hold_s": 10.0, "differences": 0.5}
    started = await operation.start_datatype(world.connection, narrow, 50, limits, **by())
    await world.follow()
    inside = next(d for d in DEVICES if sees(started, d))
    outside = next(d for d in DEVICES if not sees(started, d))
    past = Past(world.connection)
    bounds = [(await past.at(d, None)).datatypes["temperature"]["fail_span"]["max"] for d in (inside, outside)]  # type: ignore[typeddict-item]
    assert bounds == [50, 60]
    world.send({"t": 20}, {"t": 30}, {"t": 55})
    await world.watch.turn()
    (stored,) = await canaries.all_of_them(world.connection)
    assert stored.document["percent"] == 50
    counts = await canaries.counts(world.connection, stored.document)
    assert counts.compared == 3 * counts.different  # beyond 50 °C it fails now
    for percent in (100, None):
        world.clock.advance(11)
        await world.watch.turn()
        await world.follow()
        found = await canaries.all_of_them(world.connection)
        assert [one.document["percent"] for one in found] == ([] if percent is None else [percent])
        world.send({"t": 20}, {"t": 30}, {"t": 55})
        await world.watch.turn()
    assert world.catalogue.datatype("temperature")["fail_span"]["max"] == 50  # type: ignore[index, typeddict-item]
    told = await events.read(world.connection, "canary/datatype/temperature")
    assert [e.data.get("outcome") for e in told] == [None, None, "promoted"]
    assert all("within the limits" in e.data["reason"] for e in told[1:])


async def test_what_is_too_much_at_once_is_skipped_and_said_and_what_cannot_be_told_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.apply(path="u", status="draft")
    await operation.start_parser(world.connection, "acme@2", 100, {**LIMITS, "errors": 1.0}, **by())
    await world.follow()
    monkeypatch.setattr("preservarium.operations.canary_watch.WAITING_MAX", 30)
    world.send({"t": 1, "u": 1})

    async def away(*_: Any) -> None:
        raise OSError

    with monkeypatch.context() as patched:
        patched.setattr(canaries, "add_counts", away)
        await world.watch.turn()
    await world.watch.turn()
    (row,) = await fetch(world.settings.postgres.dsn, "SELECT compared, skipped, different FROM canary_counts")
    assert tuple(row) == (30, 10, 0)
    # After the loss of the topic, the records of the registry say the canaries, too.
    assert [key for _, key, _, _ in await registry.current_records(world.connection) if key.startswith(b"canary/")] == [
        b"canary/parser/acme"
    ]
