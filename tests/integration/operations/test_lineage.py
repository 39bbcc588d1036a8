"""Where a number comes from, on real servers: traced back, traced forward, derived again and compared bit by bit."""

import os
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from lineage_support import Pipeline, command, environment, pipeline
from sink_support import execute, fetch, migrated_database
from thread_support import in_thread

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.console.trace import TraceViews
from preservarium.settings import LiveSettings
from preservarium.stores.event_tables import EventStore
from preservarium.stores.migrate import migrate_clickhouse
from preservarium.stores.tables import AGGREGATES, ALARM_EVENTS, NOTICES
from preservarium.streaming.publish import partition_of
from preservarium.streaming.records import raw_line
from preservarium.streaming.stage import Send

pytestmark = pytest.mark.kafka

NOW_US = time.time_ns() // 1_000_000_000 * 1_000_000
REGISTRY = """\
manufacturers: [{name: Acme}]
datatypes:
  - {name: temperature, kind: number, unit: degC, fail_span: {min: -40, max: 85}, suspect_span: {min: 0, max: 40}}
  - {name: energy, kind: number, unit: kWh, counter: {}}
  - {name: level, kind: number, unit: m}
parsers:
  - {name: acme, kind: json, source: {fields: [{name: t, path: t, unit: degF}, {name: e, path: e, unit: kWh}, {name: h, path: h}]}}
  - {name: script, kind: python, source: "def decode(payload, context):\\n    return [{'name': 'level', 'value': payload['mm'] / 1000, 'unit': 'm'}]\\n"}
device_types:
  - name: T1
    manufacturer: Acme
    parser: acme
    mapping: {t: {component_type: temperature}, e: {component_type: energy}, h: {component_type: level, scale: 0.1, unit: cm}}
  - {name: T2, manufacturer: Acme, parser: script}
devices:
  - {device_id: "70B3D57ED0AA0001", type: T1}
  - {device_id: scripted, type: T2}
"""
DEVICE = "70B3D57ED0AA0001"


def sent(device: str, payload: Any, at: int) -> bytes:
    return raw_line(device, payload, received_at=at, connector="mqtt-1", mode="MQTT", topic="plant/1")


def key(device: str) -> bytes:
    return device.lower().encode()


@pytest.fixture(scope="module")
def world(kafka: str, postgres: str, clickhouse: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Messages of three minutes, stored, with an alarm, a notice and a window of them."""
    prefix, database = f"t{uuid.uuid4().hex[:10]}.", f"test_{uuid.uuid4().hex[:12]}"
    with migrated_database(postgres) as dsn:
        variables = environment(kafka, prefix, dsn, clickhouse, database)
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        made = pipeline(tmp_path_factory.mktemp("lineage"))
        try:
            in_thread(_fill(made))
            yield SimpleNamespace(pipeline=made, dsn=dsn, prefix=prefix, variables=variables)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


async def _fill(made: Pipeline) -> None:
    await migrate_clickhouse(made.settings)
    await made.create()
    await made.register(REGISTRY)
    first, second, third = NOW_US - 180_000_000, NOW_US - 120_000_000, NOW_US - 60_000_000
    await made.send(
        [
            Send(topics.RAW, key(DEVICE), sent(DEVICE, {"t": 70.7, "e": 100.5, "h": 1234}, first)),
            # A suspect value, and one that fails; two lines in one record.
            Send(
                topics.RAW,
                key(DEVICE),
                sent(DEVICE, {"t": 120, "e": 101.75}, second) + b"\n" + sent(DEVICE, {"t": 500, "e": 102.0}, third),
            ),
            Send(topics.RAW, b"scripted", sent("scripted", {"mm": 1337}, third)),
            Send(topics.RAW, b"stranger", sent("stranger", {"t": 1}, third)),
        ]
    )
    await made.run()
    place = partition_of(key(DEVICE), made.settings.kafka.partitions)
    live = LiveSettings(made.settings)
    alarm = {
        "transition_id": "tr1", "alarm_id": "al1", "device_id": DEVICE, "rule": "hot", "rule_rev": 1, "component_type": "temperature",
        "pin_position": "-1", "severity": "major", "transition": "raised", "state": "unacknowledged", "occurred_at": second,
        "detected_at": second, "cleared_at": None, "value": 48.9, "unit": "°C", "threshold": 40, "message": "hot", "generation": 0,
        "raw_partition": place, "raw_offset": 1, "raw_index": 0, "sequence": 1, "transition_at": second, "kind": "high",
    }  # fmt: skip
    notice = {
        "delivery_id": "n1", "recipient": "ann", "channel": "mail", "address": "a@x", "kind": "alarm", "outcome": "sent", "answer": "250",
        "attempts": 1, "planned_at": second, "settled_at": second, "subject": "hot", "alarms": ["al1"], "transitions": ["tr1"],
    }  # fmt: skip
    window = {
        "device_id": DEVICE, "connector_mode": "MQTT", "component_type": "temperature", "pin_position": "-1", "unit": "°C", "window_id": "w1",
        "revision": 2, "window_start": NOW_US - 3_600_000_000, "window_end": NOW_US, "size_s": 3600, "hop_s": 3600, "count": 2, "min": 1.0,
        "max": 3.0, "mean": 2.0, "sum": 6.0, "last": 3.0, "last_at": NOW_US, "closed_by": "watermark", "generation": 0,
    }  # fmt: skip
    for table, line in ((ALARM_EVENTS, alarm), (NOTICES, notice), (AGGREGATES, window)):
        store = EventStore(table, live, sink="test")
        result = await store.write([line], {})
        assert (result.accepted, result.rejected) == (1, [])
        await store.close()


def point(component_type: str, at: int, device: str = DEVICE) -> tuple[str, ...]:
    return ("trace", "--device", device, "--type", component_type, "--at", str(at))


async def test_a_reading_is_traced_to_its_bytes(world: Any) -> None:
    at = NOW_US - 120_000_000
    # In another spelling of the address.
    found = await command(*point("temperature", at, "70:b3:d5:7e:d0:aa:00:01"), "--json")
    assert found["reading"]["timestamp"] == at
    raw = found["raw"]
    assert (raw["offset"], raw["line"], raw["available"], raw["connector"], raw["mqtt_topic"]) == (
        1, 0, True, "mqtt-1", "plant/1",
    )  # fmt: skip
    assert orjson.loads(raw["text"])["payload"] == {"t": 120, "e": 101.75}
    assert raw["received_at"] == at
    assert found["parser"]["parser"] == "acme@1"
    assert found["parser"]["kind"] == "json"
    assert len(found["parser"]["hash"]) == 64
    fields = {f["name"]: (f["value"], f["unit"]) for f in found["decoded"]["fields"]}
    assert fields == {"t": (120, "degF"), "e": (101.75, "kWh")}
    mapping = found["mapping"]
    assert (mapping["field"], mapping["by"], mapping["conversion"]) == (
        "t", "the type", {"factor": "5/9", "offset": "-160/9"},
    )  # fmt: skip
    validated = found["validated"]
    assert (validated["quality_name"], validated["flags"], validated["unit"]) == ("suspect", ["gross_range"], "°C")
    assert validated["tests"][0] | {"unit": ""} == {
        "test": "gross_range", "unit": "", "fail_min": -40, "fail_max": 85, "suspect_min": 0, "suspect_max": 40,
    }  # fmt: skip
    assert found["rederivation"]["status"] == "identical"
    assert found["rederivation"]["differences"] == []
    assert [w["window_id"] for w in found["windows"]] == ["w1"]
    assert [(a["transition_id"], a["rule"]) for a in found["alarms"]] == [("tr1", "hot")]
    assert [(n["recipient"], n["outcome"], n["told"]) for n in found["notices"]] == [("ann", "sent", ["tr1"])]
    row = found["stored"]["postgres"]
    assert row["value"] == pytest.approx(48.8889, abs=1e-4)
    assert row["ingested_at"] > at
    clickhouse = found["stored"]["clickhouse"]
    assert (clickhouse["asked"], clickhouse["same"], clickhouse["row"]["value"]) == (True, True, row["value"])


async def test_what_is_printed_for_people(world: Any) -> None:
    printed = await command(*point("temperature", NOW_US - 120_000_000))
    for text in (
        "raw bytes", "connector     mqtt-1 (mode MQTT, topic plant/1)", "decoded       t = 120 degF", "mapping       t → temperature",
        "× 5/9 + -160/9", "flag          gross_range: fail_min -40", "bit by bit the same", "window        3600 s",
        "alarm         hot: raised, major", "notice        alarm to ann by mail: sent", "ClickHouse", ": the same",
    ):  # fmt: skip
        assert text in printed, printed


async def test_what_a_counter_consumed_is_of_two_messages(world: Any) -> None:
    found = await command(*point("energy_consumption", NOW_US - 120_000_000), "--json")
    assert found["stored"]["postgres"]["value"] == 1.25
    assert (found["rederivation"]["status"], found["rederivation"]["why"]) == ("unverifiable", "other_messages")
    assert (await command(*point("energy", NOW_US - 120_000_000), "--json"))["rederivation"]["status"] == "identical"


async def test_a_script_runs_again_in_the_sandbox(world: Any) -> None:
    found = await command(*point("level", NOW_US - 60_000_000, "scripted"), "--json")
    assert (found["stored"]["postgres"]["value"], found["rederivation"]["status"]) == (1.337, "identical")
    assert found["decoded"]["fields"][0]["value"] == 1.337


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (point("temperature", NOW_US - 7), "the nearest is at"),
        (point("humidity", NOW_US), "has no series humidity; it has: energy (pin -1)"),
        (point("temperature", NOW_US, "nobody"), "nor any other"),
        (("trace", "--raw", "0:999999"), "ends at offset"),
        (("trace", "--raw", "77:1"), "no partition 77"),
    ],
)
async def test_what_there_is_not_is_one_line_and_exit_1(world: Any, arguments: tuple[str, ...], said: str) -> None:
    printed = await command(*arguments, code=1)
    assert said in printed
    assert printed.count("\n") == 1


async def test_what_became_of_a_raw_record(world: Any) -> None:
    place = partition_of(key(DEVICE), 3)
    found = await command("trace", "--raw", f"{place}:1", "--json")
    first, second = found["messages"]
    assert {r["component_type"] for r in first["readings"]} == {"temperature", "energy", "energy_consumption"}
    assert [a["transition_id"] for a in first["alarms"]] == ["tr1"]
    assert first["not_stored"] == []
    # The second line's temperature is out of its bounds.
    assert {r["component_type"] for r in second["readings"]} == {"energy", "energy_consumption"}
    assert [(r["component_type"], r["why"].split(":")[0]) for r in second["not_stored"]] == [("temperature", "refused")]
    assert [(e["stage"], e["code"], e["raw_index"]) for e in found["errors"]] == [("validate", "value_range", 1)]
    assert found["errors_complete"] is True
    only = await command("trace", "--raw", f"{place}:1:0", "--json")
    assert (len(only["messages"]), only["errors"]) == (1, [])
    printed = await command("trace", "--raw", f"{place}:1")
    assert "not stored    temperature" in printed
    assert "validate: value_range" in printed
    assert "has no line 7" in await command("trace", "--raw", f"{place}:1:7", code=1)


async def test_what_was_refused_as_a_whole_is_told(world: Any) -> None:
    place = partition_of(b"stranger", 3)
    for offset in range(4):
        found = await command("trace", "--raw", f"{place}:{offset}", "--json", code=None)
        if found["messages"][0]["device_id"] == "stranger":
            break
    assert found["messages"][0]["refused"] == "device stranger is not registered"
    assert found["messages"][0]["readings"] == []
    assert [(e["stage"], e["code"]) for e in found["errors"]] == [("normalize", "unknown_device")]


async def test_all_that_is_stored_comes_out_of_its_bytes(world: Any) -> None:
    found = await command("lineage", "verify", "--all", "--json")
    rows = (await fetch(world.dsn, "SELECT count(*) FROM measurements"))[0][0]
    assert (found["checked"], found["different"], found["same"]) == (rows, 0, True)
    assert found["unverifiable"] == {"other_messages": 2}
    assert found["identical"] == rows - 2
    sampled = await command("lineage", "verify", "--sample", "4", "--json")
    assert 1 <= sampled["checked"] <= 4
    assert sampled["same"] is True
    assert "identical" in await command("lineage", "verify")


async def test_a_bit_that_was_changed_is_found(world: Any) -> None:
    change = "UPDATE measurements SET value = {} WHERE value BETWEEN 48 AND 49"
    before = (await fetch(world.dsn, "SELECT value FROM measurements WHERE value BETWEEN 48 AND 49"))[0][0]
    # The next double.
    await execute(world.dsn, change.format("value + 7.2e-15"))
    try:
        found = await command("lineage", "verify", "--all", "--json", code=1)
        assert (found["different"], found["same"]) == (1, False)
        (example,) = found["examples"]
        assert (example["device_id"], example["component_type"]) == (DEVICE, "temperature")
        assert "DIFFERENT in value" in example["text"]
        traced = await command(*point("temperature", NOW_US - 120_000_000), "--json", code=1)
        assert traced["rederivation"]["differences"][0]["field"] == "value"
        assert traced["stored"]["clickhouse"]["differs_in"] == ["value"]
    finally:
        await execute(world.dsn, change.format(repr(before)))
    assert (await command("lineage", "verify", "--all", "--json"))["same"] is True


async def test_a_configuration_that_has_changed_since_is_looked_up_as_it_was(world: Any) -> None:
    at = NOW_US - 180_000_000
    assert (await command(*point("level", at), "--json"))["stored"]["postgres"]["value"] == 1.234
    # The rows were received before the registry was made, so that it is that of their storing which counts.
    changed = (
        REGISTRY.replace("scale: 0.1", "scale: 1")
        .replace("max: 85", "max: 20")
        .replace("max: 40", "max: 10")
        .replace("path: t, unit: degF", "path: t, unit: degC")
    )
    await world.pipeline.register(changed)
    found = await command("lineage", "verify", "--all", "--json")
    assert (found["different"], found["unverifiable"]) == (0, {"other_messages": 2}), found["examples"]
    traced = await command(*point("level", at), "--json")
    assert traced["rederivation"]["status"] == "identical"
    assert traced["rederivation"]["registry_as_of"] == traced["stored"]["postgres"]["ingested_at"]
    assert traced["mapping"]["entry"]["scale"] == 0.1
    assert traced["parser"]["parser"] == "acme@1"
    bounds = (await command(*point("temperature", at), "--json"))["validated"]["bounds"]
    assert bounds["fail_max"] == 85


class Host:
    """What the view needs of the app."""

    def __init__(self, settings: Any) -> None:
        self.live = LiveSettings(settings)
        self.clock = SystemClock()
        self.opened: list[Any] = []

    def resource(self, closable: Any) -> Any:
        self.opened.append(closable)
        return closable


async def test_over_http(world: Any) -> None:
    host = Host(world.pipeline.settings)
    application = web.Application()
    TraceViews(host).mount(application)
    async with TestClient(TestServer(application)) as client:

        async def ask(status: int = 200, **query: str) -> Any:
            answer = await client.get("/api/trace", params=query)
            assert answer.status == status, await answer.text()
            return await answer.json()

        at = NOW_US - 120_000_000
        found = await ask(device=DEVICE, type="temperature", at=str(at))
        assert found["rederivation"]["status"] == "identical"
        assert found["stored"]["clickhouse"]["same"] is True
        place = partition_of(key(DEVICE), 3)
        assert len((await ask(raw=f"{place}:1"))["messages"]) == 2
        assert "no series" in (await ask(404, device=DEVICE, type="x", at=str(at)))["error"]
        for wrong in (
            {},
            {"device": DEVICE},
            {"device": DEVICE, "type": "t", "at": "soon"},
            {"raw": "1"},
            {"raw": "1:x"},
        ):
            assert (await ask(400, **wrong))["error"]
    for closable in reversed(host.opened):
        await closable.close()


async def test_what_kafka_has_deleted_is_said_plainly(world: Any) -> None:
    place = partition_of(key(DEVICE), 3)
    admin = AIOKafkaAdminClient(bootstrap_servers=world.variables["PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS"])
    await admin.start()
    tp = TopicPartition(topics.RAW.full(world.prefix), place)
    await admin.delete_records({tp: RecordsToDelete(before_offset=1)})
    await admin.close()
    found = await command(*point("level", NOW_US - 180_000_000), "--json")
    assert found["raw"]["available"] is False
    assert f"partition {place} begins at offset 1" in found["raw"]["gone"]
    assert (found["rederivation"]["status"], found["rederivation"]["why"]) == ("unverifiable", "raw_gone")
    assert found["stored"]["postgres"]["value"] == 1.234
    assert "Kafka has deleted it" in await command(*point("level", NOW_US - 180_000_000))
    assert "Kafka has deleted it" in await command("trace", "--raw", f"{place}:0", code=1)
    verified = await command("lineage", "verify", "--all", "--json")
    assert (verified["same"], verified["unverifiable"]) == (True, {"raw_gone": 3, "other_messages": 2})
