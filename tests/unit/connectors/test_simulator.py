"""The simulated fleet: what it sends decodes to what it says, moves, and is the same for the same seed."""

import asyncio
import base64
import random
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from connector_fakes import MemoryPublisher
from record_fakes import RawRec as Rec

from preservarium.clock import ManualClock
from preservarium.connectors import simulator
from preservarium.connectors.base import Limits, RawProducer
from preservarium.connectors.simulator import Catalogue, Simulator, SimulatorError, fleet, players
from preservarium.domain.readings.normalize import compile_device, normalize
from preservarium.registry import file as registry_file
from preservarium.streaming.records import parse_raw
from preservarium.streaming.stage import Send

NOW_US = 1_700_000_000_000_000
LIMITS = Limits(10_000, 100_000)
ROOT = Path(__file__).parents[3]

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


# --- what a device says of how it is to be played --------------------------------------------------------------------


async def test_a_device_may_say_when_which_measurement_leaves(catalogue: Catalogue) -> None:
    device = {"device_id": "d", "type": "station", "meta": {"simulated": {"away": "temperature", "at_s": 100}}}
    sends, _ = await play(players(catalogue, [device], 1), 700, rate=1.0)
    hot = [m["readings"][0]["value"] > 30.0 for _, m in decode(sends, {**DOCUMENTS, "device": [device]})]
    begins = [i for i in range(1, len(hot)) if hot[i] and not hot[i - 1]]
    assert [begin // 300 for begin in begins] == [0, 1]
    assert all(100 <= begin % 300 <= 105 for begin in begins)
    assert not any(hot[:100])
    # What no rule watches cannot leave.
    other = {**device, "meta": {"simulated": {"away": "humidity", "at_s": 0}}}
    sends, _ = await play(players(catalogue, [other], 1), 300, rate=1.0)
    assert not any(m["readings"][0]["value"] > 30.0 for _, m in decode(sends, {**DOCUMENTS, "device": [other]}))


async def test_a_meter_only_counts_up_also_from_one_start_to_the_next() -> None:
    documents: dict[str, Any] = {
        "datatype": [
            {"name": "energy", "kind": "number", "unit": "kWh", "counter": {}},
            {"name": "power", "kind": "number", "unit": "W"},
        ],
        "parser": [
            {
                "name": "meter", "version": 1, "kind": "json",
                "source": {"fields": [{"path": "e", "name": "energy", "unit": "kWh"}, {"path": "p", "name": "power", "unit": "W"}]},
                "examples": [{"json": {"e": 12_345.6, "p": 900.0}}],
            }
        ],
        "type": [{"name": "meter", "manufacturer": "m", "parser": "meter"}],
        "device": [{"device_id": "m", "type": "meter"}],
    }  # fmt: skip
    catalogue = Catalogue(documents)
    energies: list[float] = []
    for start_us in (NOW_US, NOW_US + 3_600_000_000):
        publisher = MemoryPublisher()
        await Simulator(players(catalogue, catalogue.devices, 1), 1.0).run(
            RawProducer(publisher, "simulator"), ManualClock(start_us), LIMITS, stop=asyncio.Event(), messages_max=60
        )
        lines = [m["readings"] for _, m in decode(publisher.sends, documents)]
        assert len({readings[1]["value"] for readings in lines}) > 20  # the power moves
        energies += [readings[0]["value"] for readings in lines]
    assert energies == sorted(energies)
    assert energies[60] - energies[0] == pytest.approx(simulator.COUNTED_AN_HOUR, abs=0.01)


def test_who_fetches_its_commands_is_known_from_type_and_device() -> None:
    types = [
        {"name": "http", "manufacturer": "m", "parser": "senml", "downlink": {"format": "http"}},
        {"name": "plain", "manufacturer": "m", "parser": "senml", "downlink": {"commands": {}}},
        {"name": "none", "manufacturer": "m", "parser": "senml"},
    ]
    catalogue = Catalogue({**DOCUMENTS, "type": types})
    devices = [
        ({"device_id": "a", "type": "http"}, True),
        ({"device_id": "b", "type": "http", "downlink": {"timeout_s": 5}}, True),
        ({"device_id": "c", "type": "http", "downlink": {"format": "plain"}}, False),
        ({"device_id": "d", "type": "plain", "downlink": {"format": "http"}}, True),
        ({"device_id": "e", "type": "plain"}, False),
        ({"device_id": "f", "type": "none"}, False),
        ({"device_id": "g", "type": "gone"}, False),
    ]
    for device, fetches in devices:
        assert catalogue.fetches(device) is fetches, device


class Worker:
    """The web port of a worker, as far as a device sees it."""

    def __init__(self, downlinks: list[dict[str, Any]], status: int = 200) -> None:
        self.waiting = downlinks
        self.status = status
        self.asked: list[dict[str, str]] = []
        self.posted: list[dict[str, Any]] = []
        self.authorization: set[str] = set()

    async def commands(self, request: web.Request) -> web.Response:
        self.asked.append(dict(request.query))
        self.authorization.add(request.headers.get("Authorization", ""))
        if self.status != 200:
            return web.Response(status=self.status)
        has = request.query.get("has")
        if has in [line["id"] for line in self.waiting]:
            while self.waiting.pop(0)["id"] != has:
                pass
        return web.json_response({"downlinks": self.waiting}) if self.waiting else web.Response(status=204)

    async def ingest(self, request: web.Request) -> web.Response:
        self.posted.append(await request.json())
        return web.json_response({"accepted": 1}, status=202)


def downlink(identifier: str, fields: Any) -> dict[str, Any]:
    return {"id": identifier, "payload_b64": base64.b64encode(orjson.dumps(fields)).decode()}


async def obeying(worker: Worker, until: Any, token: str = "") -> simulator.Obedient:
    application = web.Application()
    application.add_routes([web.get("/ingest/commands", worker.commands), web.post("/ingest", worker.ingest)])
    template = simulator.Template({"fan": 0, "temperature": 24.5}, None, (), 2)
    stop = asyncio.Event()
    async with TestServer(application) as server:
        device = simulator.Obedient(
            simulator.Player("fan-1", [template], random.Random(1)), f"http://127.0.0.1:{server.port}", token
        )
        running = asyncio.create_task(device.run(ManualClock(NOW_US), stop))
        async with asyncio.timeout(20):
            while not until(device):
                await asyncio.sleep(0.01)
            stop.set()
            await running
    return device


async def test_a_device_does_what_its_commands_say_tells_so_and_says_what_it_has() -> None:
    worker = Worker([downlink("a", {"fan": 1}), downlink("b", {"speed": 3})])
    device = await obeying(worker, lambda device: len(worker.asked) >= 3, token="t0ken")
    assert device.player.state == {"fan": 1, "speed": 3}
    assert device.obeyed == 2
    assert worker.posted[0] == {"device": "fan-1", "payload": {"fan": 1, "temperature": 24.5, "speed": 3}}
    assert worker.asked[0] == {"device": "fan-1", "wait_s": "10"}
    assert worker.asked[1]["has"] == "b"
    assert worker.authorization == {"Bearer t0ken"}
    payload, *_ = device.player.next(1.0, NOW_US)
    assert payload["fan"] == 1  # from then on


@pytest.mark.parametrize("status", [401, 429, 503])
async def test_a_worker_that_has_no_answer_is_asked_again(status: int) -> None:
    worker = Worker([], status)
    device = await obeying(worker, lambda device: len(worker.asked) >= 3)
    assert device.obeyed == 0


async def test_a_command_that_the_device_does_not_understand_changes_nothing() -> None:
    worker = Worker([downlink("a", [1, 2])])
    device = await obeying(worker, lambda device: device.obeyed == 1)
    assert device.player.state == {}
