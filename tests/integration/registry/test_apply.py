"""The registry on a real PostgreSQL: applying, exporting, history, conflicts, tampering, the composite query."""

import asyncio
import io
import shutil
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest

from preservarium.domain.registry.checks import RegistryFileError
from preservarium.registry.apply import apply, connect
from preservarium.registry.file import dump, read
from preservarium.settings import Settings, load
from preservarium.stores import events
from preservarium.stores import registry as store
from preservarium.stores.migrate import MIGRATIONS, connect_postgres, migrate_postgres

REGISTRY = """\
manufacturers:
  - name: Acme
datatypes:
  - {name: temperature, kind: number, unit: degC, fail_span: {min: -40, max: 125}}
  - {name: humidity, kind: number, unit: "%"}
  - {name: unused, kind: text, unit: ""}
parsers:
  - {name: acme, kind: table, source: {fields: [{name: t, type: u8}]}, examples: [{hex: "00", expect: {t: 0}}]}
recipients:
  - {name: ops, channel: mail, address: ops@example.org}
  - {name: hook, channel: webhook, address: "https://example.org/hook"}
rules:
  - {name: hot, kind: high, component_type: temperature, severity: major, threshold: 60, recipients: [ops]}
  - {name: wet, kind: high, component_type: humidity, severity: minor, threshold: 90}
device_types:
  - {name: T1, manufacturer: Acme, parser: acme, mapping: {t: {component_type: temperature}, b: null}, rules: [hot]}
experiments:
  - {name: run-1, title: First}
devices:
  - {device_id: "0001", type: T1, name: Lab, experiment_id: run-1, rules: {wet: {threshold: 80}}}
  - {device_id: "0002", type: T1, enabled: false}
"""


@pytest.fixture
async def settings(pg_dsn: str, tmp_path: Path) -> Settings:
    # Kafka is not there: these tests are about the database alone.
    settings = load(postgres={"url": pg_dsn}, kafka={"bootstrap_servers": "127.0.0.1:1"}, clickhouse={"enabled": False})
    # The registry's own migration is enough, and much faster than all.
    (tmp_path / "migrations" / "postgres").mkdir(parents=True)
    shutil.copy(MIGRATIONS / "postgres" / "0001_registry.sql", tmp_path / "migrations" / "postgres")
    await migrate_postgres(settings, directory=tmp_path / "migrations")
    return settings


@pytest.fixture
async def connection(settings: Settings) -> Any:
    connection = await connect(settings)
    yield connection
    await connection.close()


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str = REGISTRY, *edits: tuple[str, str], name: str = "registry.yaml") -> Path:
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


async def _outbox(connection: Any) -> list[tuple[str, str, Any]]:
    rows = await connection.fetch("SELECT topic, key, value FROM registry_outbox ORDER BY id")
    return [(r[0], bytes(r[1]).decode(), None if r[2] is None else orjson.loads(r[2])) for r in rows]


async def test_applying_twice_changes_nothing_the_second_time(settings: Settings, file: Any, connection: Any) -> None:
    first = await apply(settings, file(), actor="ann")
    assert first.plan.counts() == {"create": 13, "change": 0, "remove": 0, "unchanged": 0}
    assert first.records == "pending"  # Kafka is down, and the change is saved
    before = await connection.fetchval("SELECT count(*) FROM event_store")
    second = await apply(settings, file(), actor="bob")
    assert second.plan.changes == []
    assert second.plan.unchanged == 13
    assert second.records == "none"
    assert await connection.fetchval("SELECT count(*) FROM event_store") == before == 13


async def test_each_change_is_event_projection_and_outbox_row(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file(), actor="ann")
    rows = await _outbox(connection)
    # Manufacturers and experiments concern no worker.
    assert [(t, k) for t, k, _ in rows] == [
        ("iot_type_registry", "datatype/temperature"), ("iot_type_registry", "datatype/humidity"),
        ("iot_type_registry", "datatype/unused"), ("iot_type_registry", "parser/acme"),
        ("iot_type_registry", "recipient/ops"), ("iot_type_registry", "recipient/hook"),
        ("iot_type_registry", "rule/hot"), ("iot_type_registry", "rule/wet"), ("iot_type_registry", "type/T1"),
        ("iot_device_registry", "0001"), ("iot_device_registry", "0002"),
    ]  # fmt: skip
    revs = [value["rev"] for _, _, value in rows]
    assert revs == sorted(revs)
    assert rows[-1][2] == {"device_id": "0002", "type": "T1", "enabled": False, "rev": revs[-1]}
    projected = await connection.fetchrow(
        "SELECT type, enabled, rev, version, updated_by FROM devices WHERE device_id = '0002'"
    )
    assert tuple(projected) == ("T1", False, revs[-1], 1, "ann")


async def test_only_what_differs_is_written(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file())
    changed = file(REGISTRY, ("threshold: 60", "threshold: 65"), ("enabled: false", "name: Yard"))
    done = await apply(settings, changed, actor="bob")
    assert [(c.stream, c.action, c.fields) for c in done.plan.changes] == [
        ("rule/hot", "change", ["threshold"]),
        ("device/0002", "change", ["enabled", "name"]),
    ]
    history = await store.history(connection, "device/0002")
    assert [(e.version, e.type, e.actor) for e in history][1:] == [(2, "changed", "bob")]
    assert history[1].data == {"set": {"enabled": True, "name": "Yard"}}
    state, version = await events.state_at(connection, "device/0002", until_us=history[0].at_us)
    assert (state, version) == ({"device_id": "0002", "type": "T1", "enabled": False}, 1)
    rows = await _outbox(connection)
    assert [(k, v["rev"]) for _, k, v in rows[-2:]] == [("rule/hot", 14), ("0002", 15)]


async def test_a_dry_run_writes_nothing(settings: Settings, file: Any, connection: Any) -> None:
    done = await apply(settings, file(), dry_run=True)
    assert done.committed is None
    assert done.plan.counts()["create"] == 13
    assert await connection.fetchval("SELECT count(*) FROM event_store") == 0


async def test_export_round_trips(settings: Settings, file: Any, connection: Any, tmp_path: Path) -> None:
    await apply(settings, file())
    out = io.StringIO()
    dump(await store.export(connection), out)
    exported = tmp_path / "exported.yaml"
    exported.write_text(out.getvalue())
    done = await apply(settings, exported, prune=True)
    assert done.plan.changes == []
    assert done.plan.unchanged == 13


async def test_a_new_source_is_a_new_version_and_the_old_one_retires(
    settings: Settings, file: Any, connection: Any
) -> None:
    await apply(settings, file())
    done = await apply(settings, file(REGISTRY, ("type: u8}", "type: u8, unit: degC}")))
    assert [(c.stream, c.action) for c in done.plan.changes] == [
        ("parser/acme@2", "create"),
        ("parser/acme@1", "change"),
    ]
    rows = await connection.fetch("SELECT parser_version, status FROM parsers WHERE name = 'acme' ORDER BY 1")
    assert [tuple(r) for r in rows] == [(1, "retired"), (2, "active")]
    (_, key, value) = (await _outbox(connection))[-1]
    assert (key, value["version"], value["source"]) == (
        "parser/acme",
        2,
        {"fields": [{"name": "t", "type": "u8", "unit": "degC"}]},
    )
    assert [e.stream_id for e in await store.history(connection, "parser/acme")] == [
        "parser/acme@1",
        "parser/acme@2",
        "parser/acme@1",
    ]

    # Back to the old text: its version is active again, no third one is made.
    back = await apply(settings, file())
    assert [(c.stream, c.after and c.after["status"]) for c in back.plan.changes] == [
        ("parser/acme@1", "active"),
        ("parser/acme@2", "retired"),
    ]
    (_, key, again) = (await _outbox(connection))[-1]
    assert (key, again["version"]) == ("parser/acme", 1)
    assert again["rev"] > value["rev"]


async def test_a_draft_reaches_no_worker(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file())
    before = len(await _outbox(connection))
    await apply(settings, file(REGISTRY, ("type: u8}", "type: i8}"), ("kind: table,", "kind: table, status: draft,")))
    rows = await connection.fetch("SELECT parser_version, status FROM parsers ORDER BY 1")
    assert [tuple(r) for r in rows] == [(1, "active"), (2, "draft")]
    assert len(await _outbox(connection)) == before


async def test_a_retired_parser_leaves_a_tombstone(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file())
    await apply(settings, file(REGISTRY, ("kind: table,", "kind: table, status: retired,")))
    assert (await _outbox(connection))[-1] == ("iot_type_registry", "parser/acme", None)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([("kind: table,", "kind: table, version: 1,"), ("type: u8}", "type: i8}")], "a version does not change"),
        ([("kind: table,", "kind: table, version: 1, status: draft,")], "cannot become a draft again"),
        ([("parser: acme", "parser: none")], "there is no parser 'none'"),
    ],
)
async def test_what_may_not_be_is_refused_and_nothing_is_written(
    settings: Settings, file: Any, connection: Any, edits: list[tuple[str, str]], message: str
) -> None:
    await apply(settings, file())
    with pytest.raises(RegistryFileError, match=message):
        await apply(settings, file(REGISTRY, *edits))
    assert await connection.fetchval("SELECT count(*) FROM event_store") == 13


async def test_only_prune_removes_and_only_in_sections_of_the_file(
    settings: Settings, file: Any, connection: Any
) -> None:
    await apply(settings, file())
    fewer = file(
        'devices:\n  - {device_id: "0001", type: T1, name: Lab, experiment_id: run-1, rules: {wet: {threshold: 80}}}\n'
    )
    kept = await apply(settings, fewer)
    assert kept.plan.changes == []
    assert kept.plan.extra == ["device/0002"]
    pruned = await apply(settings, fewer, prune=True)
    assert [(c.stream, c.action) for c in pruned.plan.changes] == [("device/0002", "remove")]
    assert (await _outbox(connection))[-1] == ("iot_device_registry", "0002", None)
    assert await connection.fetchval("SELECT count(*) FROM device_types") == 1

    # Registered again: the stream goes on, and the revision is larger than the removal's.
    removal_rev = await connection.fetchval("SELECT max(rev) FROM registry_outbox")
    again = await apply(settings, file())
    assert [(c.stream, c.action, c.expected_version) for c in again.plan.changes] == [("device/0002", "create", 2)]
    assert (await _outbox(connection))[-1][2]["rev"] > removal_rev


async def test_what_others_need_cannot_be_pruned(settings: Settings, file: Any) -> None:
    await apply(settings, file())
    without = REGISTRY.replace('  - {name: humidity, kind: number, unit: "%"}\n', "")
    with pytest.raises(RegistryFileError, match="there is no datatype 'humidity'"):
        await apply(settings, file(without), prune=True)


async def test_pruned_parsers_retire(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file())
    await apply(settings, file("parsers:\n  - {name: other, kind: senml}\n"), prune=True)
    rows = await connection.fetch("SELECT name, status FROM parsers ORDER BY 1")
    assert [tuple(r) for r in rows] == [("acme", "retired"), ("other", "active")]


# --- two people at once


async def test_of_two_changes_of_a_document_the_second_fails_whole(
    settings: Settings, file: Any, connection: Any
) -> None:
    await apply(settings, file())
    ann = read(file(REGISTRY, ("threshold: 60", "threshold: 61")))
    bob = read(file(REGISTRY, ("threshold: 60", "threshold: 62"), ("title: First", "title: Second")))
    plan_a, plan_b = await store.plan(connection, ann), await store.plan(connection, bob)
    await store.commit(connection, plan_a, actor="ann", at_us=1_700_000_000_000_000)
    with pytest.raises(events.ConflictError, match="changed by someone else meanwhile"):
        await store.commit(connection, plan_b, actor="bob", at_us=1_700_000_000_000_001)
    assert await connection.fetchval("SELECT doc ->> 'threshold' FROM alarm_rules WHERE name = 'hot'") == "61.0"
    # Nothing of the failed commit, the undisputed document neither.
    assert await connection.fetchval("SELECT doc ->> 'title' FROM experiments") == "First"
    assert (await store.verify(connection)).faults == []


async def test_many_at_once_each_win_or_conflict_and_never_mix(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file())
    paths = [file(REGISTRY, ("threshold: 60", f"threshold: {50 + i}"), name=f"{i}.yaml") for i in range(5)]
    results = await asyncio.gather(
        *(apply(settings, p, actor=f"p{i}") for i, p in enumerate(paths)), return_exceptions=True
    )
    assert all(isinstance(r, events.ConflictError) or not isinstance(r, BaseException) for r in results)
    won = [i for i, r in enumerate(results) if not isinstance(r, BaseException)]
    assert won
    history = await store.history(connection, "rule/hot")
    assert [e.version for e in history] == list(range(1, len(history) + 1))
    assert {e.actor for e in history[1:]} == {f"p{i}" for i in won}
    revs = [r["rev"] for r in await connection.fetch("SELECT rev FROM registry_outbox ORDER BY id")]
    assert revs == sorted(revs)
    assert (await store.verify(connection)).faults == []


async def test_a_reference_taken_away_meanwhile_fails_the_commit(
    settings: Settings, file: Any, connection: Any
) -> None:
    await apply(settings, file())
    plan = await store.plan(
        connection, read(file('devices:\n  - {device_id: "0003", type: T1, experiment_id: run-1}\n', name="new.yaml"))
    )
    without = REGISTRY.replace("  - {name: run-1, title: First}\n", "").replace(", experiment_id: run-1", "")
    await apply(settings, file(without), prune=True)
    with pytest.raises(store.RegistryError, match="a reference does not hold"):
        await store.commit(connection, plan, actor="ann", at_us=1_700_000_000_000_000)
    assert await connection.fetchval("SELECT count(*) FROM event_store WHERE stream_id = 'device/0003'") == 0


# --- the chain


async def _as_vandal(settings: Settings, statement: str) -> None:
    connection = await connect_postgres(settings)
    try:
        await connection.execute("SET session_replication_role = replica")  # past the triggers, as a superuser can
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        (
            "UPDATE event_store SET data = '{\"set\":{\"threshold\":1.0}}' WHERE stream_id = 'rule/hot' AND version = 2",
            "rule/hot: version 2 was altered",
        ),
        ("UPDATE event_store SET actor = 'mallory' WHERE stream_id = 'rule/hot' AND version = 1", "rule/hot: version 1 was altered"),
        ("UPDATE event_store SET at = at + interval '1 us' WHERE stream_id = 'rule/hot' AND version = 1", "version 1 was altered"),
        ("DELETE FROM event_store WHERE stream_id = 'rule/hot' AND version = 2", "version 3 follows 1: events are missing"),
        (
            "DELETE FROM event_store WHERE stream_id = 'rule/hot' AND version = 3",
            "the projection is at version 3, the events end at 2",
        ),
        (
            "UPDATE alarm_rules SET doc = '{\"name\":\"hot\"}' WHERE name = 'hot'",
            "rule/hot: the projection is not what its events say",
        ),
        ("UPDATE event_store SET prev_hash = hash WHERE stream_id = 'rule/hot' AND version = 2", "does not continue the chain"),
    ],
)  # fmt: skip
async def test_tampering_shows(settings: Settings, file: Any, connection: Any, statement: str, fault: str) -> None:
    for threshold in (60, 61, 62):
        await apply(settings, file(REGISTRY, ("threshold: 60", f"threshold: {threshold}")))
    assert (await store.verify(connection)).faults == []
    await _as_vandal(settings, statement)
    found = await store.verify(connection)
    assert any(fault in f for f in found.faults), found.faults
    assert all(f.startswith("rule/hot") for f in found.faults)


async def test_events_cannot_be_changed_by_mistake(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file())
    for statement in ("UPDATE event_store SET actor = 'x'", "DELETE FROM event_store", "TRUNCATE event_store"):
        with pytest.raises(asyncpg.RaiseError, match="append-only"):
            await connection.execute(statement)


async def test_long_streams_are_read_from_a_snapshot(settings: Settings, connection: Any) -> None:
    stream = "device/long"
    state: dict[str, Any] = {}
    for version in range(1, 121):
        event, data = ("created", {"doc": {"n": 1}}) if version == 1 else ("changed", {"set": {"n": version}})
        state = {"n": version}
        new = events.NewEvent(stream, version - 1, event, data, state)
        async with connection.transaction():
            await events.append(connection, [new], actor="ann", at_us=1_700_000_000_000_000 + version)
    snapshots = await connection.fetch("SELECT version FROM event_snapshots WHERE stream_id = $1 ORDER BY 1", stream)
    assert [r[0] for r in snapshots] == [50, 100]
    assert await events.state_at(connection, stream) == ({"n": 120}, 120)
    assert await events.state_at(connection, stream, until_us=1_700_000_000_000_077) == ({"n": 77}, 77)
    # A snapshot that does not belong to its event is not believed; one that does is used.
    await connection.execute("UPDATE event_snapshots SET state = '{\"n\": -1}', hash = sha256('x')")
    assert await events.state_at(connection, stream) == ({"n": 120}, 120)


# --- the composite query


async def test_one_query_brings_a_device_with_everything(settings: Settings, file: Any, connection: Any) -> None:
    await apply(settings, file())
    found = await store.composite(connection, ["0001", "0002", "none"])
    assert set(found) == {"0001", "0002"}
    one = found["0001"]
    assert one.device["name"] == "Lab"
    assert one.device["rev"] > one.type["rev"] > 0
    assert (one.type["name"], one.parser and one.parser["version"]) == ("T1", 1)
    assert [d["name"] for d in one.datatypes] == ["humidity", "temperature"]
    assert [r["name"] for r in one.rules] == ["hot", "wet"]
    assert [r["name"] for r in one.recipients] == ["ops"]
    assert [r["name"] for r in found["0002"].rules] == ["hot"]
    assert {kind for kind, _ in one.documents()} == {"type", "parser", "datatype", "rule", "recipient"}


async def test_a_database_without_registry_is_named(pg_dsn: str, file: Any) -> None:
    with pytest.raises(store.RegistryError, match="run `preservarium migrate`"):
        await apply(load(postgres={"url": pg_dsn}), file())


async def test_a_script_whose_examples_fail_is_refused_with_the_difference(
    settings: Settings, connection: Any, file: Any, tmp_path: Path
) -> None:
    pytest.importorskip("quickjs")
    codec = tmp_path / "acme.js"
    codec.write_text("function decodeUplink(input) { return {data: {t: input.bytes[0]}}; }")
    bundle = tmp_path / "acme-codec.yaml"
    text = "uplinkDecoder: {fileName: acme.js, examples: [{input: {fPort: 1, bytes: [7]}, output: {data: {t: 8}}}]}\n"
    bundle.write_text(text)
    table = (
        '- {name: acme, kind: table, source: {fields: [{name: t, type: u8}]}, examples: [{hex: "00", expect: {t: 0}}]}'
    )
    path = file(REGISTRY, (table, "- {name: acme, kind: javascript, file: acme-codec.yaml}"))
    with pytest.raises(RegistryFileError, match=r"examples\[0\]: data\.t: expected 8, returned 7"):
        await apply(settings, path)
    assert await connection.fetchval("SELECT count(*) FROM event_store") == 0
    bundle.write_text(text.replace("t: 8", "t: 7"))
    assert (await apply(settings, path)).plan.counts()["create"] > 0
    stored = await store.load(connection, ("parser",))
    (parser,) = stored["parser"].values()
    assert parser.document["source"] == codec.read_text()
    assert parser.document["examples"] == [{"hex": "07", "output": {"data": {"t": 7}}, "port": 1}]


async def test_a_device_is_on_its_topic_by_the_canonical_form_of_its_address_too(
    settings: Settings, file: Any, connection: Any
) -> None:
    spelled, eui = "70-B3-D5-7E-D0-AA-00-01", "70b3d57ed0aa0001"
    await apply(settings, file(REGISTRY, ('"0001"', f'"{spelled}"')))
    found = {key: value for topic, key, value in await _outbox(connection) if topic == "iot_device_registry"}
    assert found.keys() == {spelled, eui, "0002"}
    assert found[spelled] == found[eui]
    assert found[eui]["device_id"] == spelled
    for asked in (spelled, eui, "70B3D57ED0AA0001", "70:b3:d5:7e:d0:aa:00:01"):
        composites = await store.composite(connection, [asked, "0002", "0003"])
        assert {key: one.device["device_id"] for key, one in composites.items()} == {asked: spelled, "0002": "0002"}
    # Once more in another spelling is refused, unless the first one goes.
    renamed = file(REGISTRY, ('"0001"', f'"{eui}"'))
    with pytest.raises(RegistryFileError, match="the registry has this address as '70-B3"):
        await apply(settings, renamed)
    await apply(settings, renamed, prune=True)
    latest = {key: value for _, key, value in await _outbox(connection)}
    assert latest[spelled] is None
    assert latest[eui]["device_id"] == eui  # the old one's removal does not hide it
    await apply(settings, file(REGISTRY, ('"0001"', '"70B3D57ED0AA0001"')), prune=True)
    latest = {key: value for _, key, value in await _outbox(connection)}
    assert latest[eui]["device_id"] == latest["70B3D57ED0AA0001"]["device_id"] == "70B3D57ED0AA0001"
    await apply(
        settings,
        file(
            REGISTRY,
            ('  - {device_id: "0001", type: T1, name: Lab, experiment_id: run-1, rules: {wet: {threshold: 80}}}\n', ""),
        ),
        prune=True,
    )
    latest = {key: value for _, key, value in await _outbox(connection)}
    assert (latest[eui], latest["70B3D57ED0AA0001"]) == (None, None)
