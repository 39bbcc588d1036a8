"""The simulated fleet: what it sends decodes to what it says, moves, and is the same for the same seed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from connector_fakes import MemoryPublisher
from test_records import Rec

from preservarium import registry_file
from preservarium.clock import ManualClock
from preservarium.connectors import simulator
from preservarium.connectors.base import Limits, RawProducer
from preservarium.connectors.simulator import Catalogue, Simulator, SimulatorError, fleet, players
from preservarium.domain.normalize import compile_device, normalize
from preservarium.records import parse_raw
from preservarium.stage import Send

NOW_US = 1_700_000_000_000_000
LIMITS = Limits(10_000, 100_000)
ROOT = Path(__file__).parents[2]

DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "datatype": [{"name": "temperature", "kind": "number", "unit": "°C"}],
    "parser": [
        {
            "name": "station",
            "version": 1,
            "kind": "json",
            "source": {"time": "at.s", "fields": [{"path": "t", "name": "temperature", "unit": "°C"}, {"path": "id"}]},
            "examples": [{"json": {"at": {"s": 1717243200}, "t": 20.5, "id": 7, "label": "x"}}],
        },
        {
            "name": "probe",
            "version": 1,
            "kind": "table",
            "source": {
                "fields": [
                    {"name": "id", "type": "u16"},
                    {"name": "temperature", "type": "i16", "div": 100, "unit": "°C"},
                    {"name": "state", "type": "u8"},
                ]
            },
            "examples": [{"hex": "02df081c01", "port": 3}, {"hex": "zz"}, {"hex": "02"}],
        },
        {"name": "senml", "version": 1, "kind": "senml", "source": {}},
        {"name": "silent", "version": 1, "kind": "csv", "source": {"columns": [{"name": "a"}]}},
        {"name": "script", "version": 1, "kind": "javascript", "source": "x", "examples": [{"hex": "00"}]},
    ],
    "type": [
        {"name": "station", "manufacturer": "m", "parser": "station", "rules": ["hot"]},
        {"name": "probe", "manufacturer": "m", "parser": "probe", "mode": "LoRaWAN"},
        {"name": "senml", "manufacturer": "m", "parser": "senml"},
        {"name": "silent", "manufacturer": "m", "parser": "silent"},
        {"name": "script", "manufacturer": "m", "parser": "script"},
    ],
    "rule": [
        {"name": "hot", "component_type": "temperature", "kind": "high", "severity": "major", "threshold": 30.0, "deadband": 1.0}
    ],
    "device": [
        {"device_id": "own", "type": "station", "enabled": True, "meta": {"simulated": False}},
        {"device_id": "off", "type": "station", "enabled": False},
        {"device_id": "s", "type": "station", "enabled": True},
        {"device_id": "p", "type": "probe", "enabled": True},
    ],
}  # fmt: skip


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(DOCUMENTS)


async def play(
    playing: list[simulator.Player], messages: int, rate: float = 10.0
) -> tuple[list[Send], simulator.Totals]:
    publisher = MemoryPublisher()
    fleet_ = Simulator(playing, rate)
    totals = await fleet_.run(
        RawProducer(publisher, "simulator"), ManualClock(NOW_US), LIMITS, stop=asyncio.Event(), messages_max=messages
    )
    return publisher.sends, totals


def decode(sends: list[Send], documents: dict[str, Any]) -> list[Any]:
    """What normalize makes of them, as in the pipeline."""
    by = {kind: {d["name"]: d for d in documents[kind]} for kind in ("type", "parser", "datatype")}
    types = {d["device_id"]: d for d in documents["device"]}
    compiled: dict[str, Any] = {}
    found = []
    for i, send in enumerate(sends):
        messages, errors = parse_raw(Rec(send.value, send.key, offset=i), "iot_raw_data", 0, payload_bytes_max=10_000)
        assert errors == []
        raw = messages[0]
        if raw["device"] not in compiled:
            device = types[raw["device"]]
            kind = by["type"][device["type"]]
            parser = {"version": 1, "rev": 1, **by["parser"][kind["parser"]]}
            compiled[raw["device"]] = compile_device(
                {"rev": 1, **device},  # type: ignore[typeddict-item]
                {"rev": 1, **kind},  # type: ignore[typeddict-item]
                parser,  # type: ignore[arg-type]
                by["datatype"].get,  # type: ignore[arg-type]
            )
        message, refused = normalize(raw, compiled[raw["device"]], NOW_US)
        assert refused == ()
        found.append((raw, message))
    return found


def test_measurements_are_found_by_trying(catalogue: Catalogue) -> None:
    station = catalogue.templates({"device_id": "x", "type": "station"})
    assert [(leaf.path, leaf.series) for leaf in station[0].leaves] == [(("t",), ("temperature", "-1"))]
    assert station[0].leaves[0].alarm == pytest.approx(32.0)
    probe = catalogue.templates({"device_id": "x", "type": "probe"})
    assert [(t.port, [leaf.path for leaf in t.leaves], t.readings) for t in probe] == [(3, [(2,)], 3)]
    assert catalogue.types == ["station", "probe", "senml"]


async def test_messages_decode_to_the_readings_that_were_expected_and_are_of_their_instant(
    catalogue: Catalogue,
) -> None:
    sends, totals = await play(players(catalogue, catalogue.devices, 1), 200)
    decoded = decode(sends, DOCUMENTS)
    assert totals.messages == len(decoded) == 200
    assert totals.readings == sum(len(message["readings"]) for _, message in decoded)
    assert {raw["device"] for raw, _ in decoded} == {"s", "p"}
    assert [raw["received_at"] for raw, _ in decoded] == [NOW_US + i * 100_000 for i in range(200)]
    assert all(abs(message["timestamp"] - raw["received_at"]) <= 1 for raw, message in decoded)
    for device in ("s", "p"):
        values = [m["readings"][0 if device == "s" else 1]["value"] for raw, m in decoded if raw["device"] == device]
        assert len(set(values)) > 20  # they move


async def test_a_watched_value_passes_its_threshold_and_comes_back(catalogue: Catalogue) -> None:
    devices = fleet(catalogue, 40, ["station"])
    documents = {**DOCUMENTS, "device": devices}
    sends, _ = await play(players(catalogue, devices, 3), 40 * 300, rate=40.0)  # a full period, one message a second
    hot: dict[str, list[bool]] = {}
    for raw, message in decode(sends, documents):
        hot.setdefault(raw["device"], []).append(message["readings"][0]["value"] > 30.0)
    prone = [device for device, states in hot.items() if any(states)]
    assert 2 <= len(prone) <= 16
    for device in prone:
        changes = sum(a != b for a, b in zip(hot[device], hot[device][1:], strict=False))
        assert 1 <= changes <= 4
        assert 20 <= sum(hot[device]) <= 45


async def test_the_same_seed_gives_the_same_messages_and_another_one_does_not(catalogue: Catalogue) -> None:
    first, _ = await play(players(catalogue, catalogue.devices, 1), 100)
    again, _ = await play(players(catalogue, catalogue.devices, 1), 100)
    other, _ = await play(players(catalogue, catalogue.devices, 2), 100)
    assert first == again
    assert first != other


async def test_the_rate_is_a_schedule_and_kafka_being_away_holds_it_up(catalogue: Catalogue) -> None:
    publisher, clock = MemoryPublisher(), ManualClock(NOW_US)
    publisher.failures = 2
    run = Simulator(players(catalogue, catalogue.devices, 1), 500.0)
    totals = await run.run(RawProducer(publisher, "simulator"), clock, LIMITS, stop=asyncio.Event(), for_s=20.0)
    assert (totals.messages, totals.retries, len(publisher.sends)) == (10_000, 2, 10_000)
    assert clock.monotonic_s() == pytest.approx(20.0, abs=2.5)
    instants = [line["received_at"] for line in publisher.lines()]
    assert instants == sorted(set(instants))


async def test_a_schedule_that_fell_far_behind_is_moved(catalogue: Catalogue) -> None:
    publisher, clock = MemoryPublisher(), ManualClock(NOW_US)
    publisher.failures = 8  # half a minute and more
    run = Simulator(players(catalogue, catalogue.devices, 1), 100.0)
    totals = await run.run(RawProducer(publisher, "simulator"), clock, LIMITS, stop=asyncio.Event(), messages_max=1_000)
    assert totals.messages == 1_000
    assert totals.behind_s > 10
    instants = [line["received_at"] for line in publisher.lines()]
    assert instants == sorted(set(instants))
    assert instants[-1] <= clock.now_us()


def test_a_synthetic_fleet_takes_turns_through_the_types(catalogue: Catalogue) -> None:
    devices = fleet(catalogue, 5)
    assert [(d["device_id"], d["type"]) for d in devices] == [
        ("sim-00001", "station"),
        ("sim-00002", "probe"),
        ("sim-00003", "senml"),
        ("sim-00004", "station"),
        ("sim-00005", "probe"),
    ]
    for types in (["nothing"], ["silent"], ["script"]):
        with pytest.raises(SimulatorError):
            fleet(catalogue, 1, types)
    with pytest.raises(SimulatorError):
        fleet(catalogue, 100_000)
    with pytest.raises(SimulatorError):
        players(catalogue, [DOCUMENTS["device"][1]], 1)


async def test_the_sample_registry_can_be_played_whole() -> None:
    file = registry_file.read(ROOT / "examples" / "registry.yaml")
    file.raise_for_errors()
    catalogue = Catalogue(file.documents)
    playing = players(catalogue, catalogue.devices, 1)
    assert len(playing) > 70
    sends, totals = await play(playing, 10 * len(playing))
    decoded = decode(sends, file.documents)
    assert totals.readings == sum(len(message["readings"]) for _, message in decoded)
    keys = [
        (m["device_id"], r["component_type"], r["pin_position"], r.get("timestamp", m["timestamp"]))
        for _, m in decoded
        for r in m["readings"]
    ]
    assert len(keys) == len(set(keys))  # every reading is a row of its own
    assert "demo-1" not in {raw["device"] for raw, _ in decoded}


def test_the_fleet_can_be_written_and_read_as_a_registry_file(catalogue: Catalogue, tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    with path.open("w") as file:
        registry_file.dump({"device": fleet(catalogue, 3)}, file)
    read = registry_file.read(path)
    assert read.errors == []
    assert read.documents["device"] == fleet(catalogue, 3)
