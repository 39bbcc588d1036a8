import asyncio
import json
from dataclasses import dataclass, field

import orjson
import pytest

from preservarium import metrics, topics
from preservarium.clock import ManualClock
from preservarium.domain.readings.address import canonical_address
from preservarium.errors import Fatal, Retry
from preservarium.operations.dlq import Letter
from preservarium.sandbox.pool import Limits, SandboxPool
from preservarium.settings import LiveSettings, Settings
from preservarium.stages.normalize import Normalizer
from preservarium.streaming.records import ERROR_RAW_BYTES_MAX, parse_raw, raw_line
from preservarium.streaming.stage import Batch

NOW = 1_717_243_200_000_000
TABLE = {
    "fields": [
        {"name": "temperature", "type": "i16", "div": 100, "unit": "°C"},
        {"name": "scaled", "type": "u8", "expr": "x * k"},
    ],
    "parameters": {"k": 2},
}


@dataclass
class Rec:
    value: bytes | None
    offset: int = 0
    key: bytes | None = None
    timestamp: int = NOW // 1000
    headers: tuple = ()


@dataclass
class Devices:
    known: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    hold: asyncio.Event | None = None

    async def lookup_many(self, partition, device_ids):
        ids = list(device_ids)
        self.asked.append(ids)
        found = {d: self.known[d] for d in ids if d in self.known}
        if self.hold is not None:
            await self.hold.wait()
        return found


@dataclass
class Types:
    rev: int = 1
    parsers: dict = field(default_factory=dict)
    types: dict = field(default_factory=dict)
    fault: Exception | None = None

    def datatype(self, name):
        return {"name": name, "rev": 1, "kind": "number", "unit": "K"} if name == "temperature" else None

    def parser(self, name):
        return self.parsers.get(name)

    def type(self, name):
        return self.types.get(name)

    async def ready(self):
        if self.fault is not None:
            raise self.fault


def parser(name, kind, source, version=1):
    return {
        "name": name,
        "version": version,
        "rev": 1,
        "kind": kind,
        "status": "active",
        "source": source,
        "hash": f"{name}{version}",
    }


@pytest.fixture
def world():
    devices = Devices(
        {
            d: {"device_id": d, "rev": 5, "type": t, "enabled": True}
            for d, t in (("a", "bin"), ("b", "bin"), ("j", "json"), ("n", "none"), ("w", "wrong"))
        }
    )
    devices.known["b"]["variables"] = {"k": 10}
    devices.known["off"] = {"device_id": "off", "rev": 1, "type": "json", "enabled": False}
    types = Types(
        parsers={"table": parser("table", "table", TABLE), "json": parser("json", "json", {}), "wrong": parser("wrong", "table", {"fields": 5})},
        types={n: {"name": n, "rev": 1, "manufacturer": "m", "parser": p, "mode": "X"} for n, p in (("bin", "table"), ("json", "json"), ("none", "gone"), ("wrong", "wrong"))},
    )  # fmt: skip
    return devices, types, ManualClock(NOW)


def normalizer(world, **settings):
    devices, types, clock = world
    return Normalizer(devices, types, clock, LiveSettings(Settings(**settings)))


def line(device, payload, **more):
    return raw_line(device, payload, received_at=NOW, connector="test", mode="", **more)


def batch(*records, partition=3):
    return Batch(topics.RAW.name, partition, [Rec(r, i) if isinstance(r, bytes) else r for i, r in enumerate(records)])


def split(effects):
    out = [s for s in effects.sends if s.topic is topics.STANDARDIZED]
    errors = [orjson.loads(s.value) for s in effects.sends if s.topic is topics.ERRORS]
    assert len(out) + len(errors) == len(effects.sends)
    assert sum(effects.refused.values()) == len(errors)
    return out, errors


def messages(send):
    return [orjson.loads(v) for v in send.value.split(b"\n")]


async def test_one_record_for_each_record_keyed_by_the_device(world):
    effects = await normalizer(world)(
        batch(line("a", b"\x09\xc4\x05"), line("b", b"\x09\xc4\x05"), line("j", {"x": 1}))
    )
    out, errors = split(effects)
    assert errors == []
    assert [s.key for s in out] == [b"a", b"b", b"j"]
    assert all(s.partition is None for s in out)  # by key: a foreign producer may have placed it elsewhere
    (first,), (second,) = messages(out[0]), messages(out[1])
    assert first["readings"][0] == {"component_type": "temperature", "pin_position": "-1", "value": 298.15, "unit": "K"}
    assert (first["readings"][1]["value"], second["readings"][1]["value"]) == (10, 50)
    assert (first["raw_partition"], first["raw_offset"], first["raw_index"], first["parser"], first["config_rev"]) == (
        3,
        0,
        0,
        "table@1",
        5,
    )


async def test_lines_of_one_record_stay_one_record_for_each_device(world):
    value = b"\n".join([line("j", {"x": 1}), line("a", b"\0\0\0"), b"", line("j", {"x": 2}), b"{torn"])
    out, errors = split(await normalizer(world)(batch(value)))
    assert [(s.key, [m["raw_index"] for m in messages(s)]) for s in out] == [(b"j", [0, 3]), (b"a", [1])]
    assert [(e["code"], e["index"], e["raw"]) for e in errors] == [("envelope_not_json", 4, "{torn")]


async def test_generation_trace_and_experiment_go_along(world):
    headers = (("generation", b"7"), ("trace", b"00-ab-cd-01"), ("other", b"x"))
    record = Rec(line("j", {"x": 1}, experiment_id="e1"), 4, headers=headers)
    out, _ = split(await normalizer(world)(batch(record)))
    assert out[0].headers == (("generation", b"7"), ("trace", b"00-ab-cd-01"))
    (message,) = messages(out[0])
    assert (message["generation"], message["experiment_id"]) == (7, "e1")


async def test_a_redrive_says_which_attempt_it_is(world):
    first, again = (Rec(line("j", {"x": 1}), i, headers=h) for i, h in enumerate([(), (("attempt", b"2"),)]))
    out, _ = split(await normalizer(world)(batch(first, again)))
    assert [m.get("attempt") for s in out for m in messages(s)] == [None, 2]


async def test_a_foreign_record_is_the_payload_of_its_key(world):
    out, errors = split(
        await normalizer(world)(batch(Rec(b'{"x": 5}', 0, key=b"j"), Rec(b"\x09\xc4\x05", 1, key=b"a")))
    )
    assert errors == []
    assert [messages(s)[0]["readings"][0]["value"] for s in out] == [5, 298.15]


@pytest.mark.parametrize(
    ("raw", "code", "device"),
    [
        (line("zzz", {"x": 1}), "unknown_device", "zzz"),
        (line("off", {"x": 1}), "device_disabled", "off"),
        (line("n", {"x": 1}), "no_parser", "n"),
        (line("w", b"\1"), "no_parser", "w"),
        (line("a", b"\1"), "decode_failed", "a"),
        (line("a", {"x": 1}), "decode_failed", "a"),
        (line("j", {"x": None}), "mapping_failed", "j"),
        (b'{"device": "j"', "envelope_not_json", None),
        (b"{}", "envelope_no_device", None),
    ],
)
async def test_what_cannot_be_used_becomes_an_error_line_with_the_original(world, raw, code, device):
    out, errors = split(await normalizer(world)(batch(raw)))
    assert out == []
    (error,) = errors
    assert (error["code"], error["stage"], error["device_id"], error["raw"].encode()) == (
        code,
        "normalize",
        device,
        raw,
    )
    assert (error["topic"], error["partition"], error["offset"], error["raw_partition"], error["raw_offset"]) == (
        topics.RAW.name,
        3,
        0,
        3,
        0,
    )
    assert error["message"]
    if code in {"decode_failed", "mapping_failed", "device_disabled"}:
        assert error["parser"] in {"table@1", "json@1"}
        assert error["config_rev"] in {1, 5}


async def test_a_refused_value_is_an_error_line_and_the_others_go_on(world):
    world[1].parsers["json"]["source"] = {"fields": [{"path": "x", "expr": "log(x)"}, {"path": "y"}]}
    out, errors = split(await normalizer(world)(batch(line("j", {"x": -1, "y": 2}))))
    assert [r["component_type"] for m in messages(out[0]) for r in m["readings"]] == ["y"]
    assert [e["code"] for e in errors] == ["value_not_finite"]


async def test_a_part_that_cannot_be_read_is_an_error_line_with_its_own_bytes_and_comes_in_alone(world):
    world[1].parsers["json"] = parser("json", "influx", {})
    whole = line(
        "j", "m x=1\nm y=\nm z=3\nsoon", topic="t/1", port=3, experiment_id="e", meta={"time": NOW - 5, "rssi": -80}
    )
    out, errors = split(await normalizer(world)(batch(whole)))
    assert [r["component_type"] for m in messages(out[0]) for r in m["readings"]] == ["m_x", "m_z"]
    assert [(e["code"], e["raw"], e["part"], e["device_id"], e["raw_offset"]) for e in errors] == [
        ("decode_failed", "m y=", 1, "j", 0), ("decode_failed", "soon", 2, "j", 0),
    ]  # fmt: skip
    letters = [Letter(f"0:{i}", e) for i, e in enumerate(errors)]
    assert [each.coordinates for each in letters] == ["3/0/0/1", "3/0/0/2"]
    # What a redrive sends is that part alone, as the message was; a later parser may understand it.
    for each, payload in zip(letters, ("m y=", "soon"), strict=True):
        (alone,), _ = parse_raw(Rec(each.input), topics.RAW.name, 0, payload_bytes_max=1_000)
        (before,), _ = parse_raw(Rec(whole), topics.RAW.name, 0, payload_bytes_max=1_000)
        assert alone == {**before, "payload": payload.encode(), "meta": {"time": NOW - 5}}


async def test_a_part_of_bytes_and_one_of_a_foreign_record_come_in_alone_too(world):
    world[1].parsers["json"] = parser("json", "csv", {"encoding": "cp1252", "time": "ts"})
    foreign = "ts,ä\nfrüh,1\n1760000000,2".encode("cp1252")
    out, (error,) = split(await normalizer(world)(batch(Rec(foreign, 7, b"j"))))
    assert [m["readings"][0]["value_text"] for m in messages(out[0])] == ["2"]
    (alone,), _ = parse_raw(Rec(Letter("0:0", error).input), topics.RAW.name, 0, payload_bytes_max=1_000)
    assert (alone["payload"], alone["connector"], alone["received_at"]) == (
        "ts,ä\nfrüh,1\n".encode("cp1252"),
        "kafka",
        NOW,
    )


async def test_many_refused_values_of_a_large_message_do_not_repeat_it_for_each(world):
    world[1].parsers["json"]["source"] = {}
    payload = {**{f"t{i}": 1e999 for i in range(2_000)}, "good": 1, "text": "x" * 4_000}
    raw = line("j", orjson.dumps(payload, default=None).replace(b"null", b"NaN"))
    out, errors = split(await normalizer(world)(batch(raw)))
    assert [r["component_type"] for m in messages(out[0]) for r in m["readings"]] == ["good", "text"]
    assert {e["code"] for e in errors} == {"value_not_finite"}
    assert len({e["message"] for e in errors}) == 2_000
    assert "raw" in errors[0]
    assert sum(len(orjson.dumps(e)) for e in errors) < 2_000 * 600 + ERROR_RAW_BYTES_MAX + 2 * len(raw)
    few = {"a": 1, "b": float("nan"), "c": float("nan")}
    out, errors = split(await normalizer(world)(batch(line("j", json.dumps(few).encode()))))
    assert len(errors) == 2
    assert all("raw" in e for e in errors)


async def test_a_configuration_is_looked_up_once_until_it_changes(world):
    devices, types, clock = world
    run = normalizer(world, normalize={"config_cache_ttl_s": 60})
    records = batch(line("j", {"x": 1}), line("j", {"x": 2}), line("a", b"\0\0\0"))
    await run(records)
    await run(records)
    assert devices.asked == [["a", "j"]]
    run.forget("j")
    devices.known["j"] = {**devices.known["j"], "rev": 6, "mapping": {"x": {"component_type": "y"}}}
    out, _ = split(await run(records))
    assert devices.asked[1:] == [["j"]]
    assert {m["config_rev"] for s in out for m in messages(s)} == {5, 6}
    types.rev += 1
    await run(records)
    assert devices.asked[2:] == [["a", "j"]]
    clock.advance(61)
    await run(records)
    assert devices.asked[3:] == [["a", "j"]]


async def test_a_new_parser_version_is_used_at_once(world):
    _, types, _ = world
    run = normalizer(world)
    await run(batch(line("j", {"x": 1})))
    types.parsers["json"] = parser("json", "json", {"fields": [{"path": "x", "scale": 100}]}, version=2)
    types.rev += 1
    out, _ = split(await run(batch(line("j", {"x": 1}))))
    (message,) = messages(out[0])
    assert (message["parser"], message["readings"][0]["value"]) == ("json@2", 100)


async def test_an_unknown_device_is_asked_for_again(world):
    devices, _, _ = world
    run = normalizer(world)
    _, errors = split(await run(batch(line("new", {"x": 1}))))
    assert [e["code"] for e in errors] == ["unknown_device"]
    devices.known["new"] = {"device_id": "new", "rev": 1, "type": "json", "enabled": True}
    out, errors = split(await run(batch(line("new", {"x": 1}))))
    assert (len(out), errors) == (1, [])


async def test_a_change_during_the_look_up_is_not_forgotten(world):
    devices, _, _ = world
    devices.hold = asyncio.Event()
    run = normalizer(world)
    task = asyncio.create_task(run(batch(line("j", {"x": 1}))))
    while not devices.asked:
        await asyncio.sleep(0)
    run.forget("j")
    devices.hold.set()
    await task
    await run(batch(line("j", {"x": 1})))
    assert devices.asked == [["j"], ["j"]]


async def test_nothing_is_decoded_before_the_registry_was_read(world):
    world[1].fault = Retry("not yet")
    with pytest.raises(Retry):
        await normalizer(world)(batch(line("j", {"x": 1})))


async def test_the_same_batch_gives_the_same_records(world):
    records = batch(
        line("j", {"x": 1}), line("a", b"\1"), line("zzz", 1), b"\n".join([line("a", b"\0\0\0"), line("b", b"\0\0\0")])
    )
    run = normalizer(world)
    assert (await run(records)).sends == (await run(records)).sends


async def test_no_record_is_larger_than_kafka_takes(world):
    many = b"\n".join(line("j", {f"field_{i}": i for i in range(40)}) for _ in range(20))
    huge = line("j", {f"field_{i}": "x" * 4000 for i in range(5)})
    run = normalizer(world, kafka={"record_bytes_max": 10_000})
    out, errors = split(await run(batch(many, huge)))
    assert len(out) > 1
    assert all(len(s.value) <= 10_000 for s in out)
    assert [m["raw_index"] for s in out for m in messages(s)] == list(range(20))
    assert [e["code"] for e in errors] == ["output_too_large"]


async def test_limits_of_the_settings_are_kept(world):
    run = normalizer(world, normalize={"readings_max": 2, "payload_bytes_max": 256})
    _, errors = split(await run(batch(line("j", {"a": 1, "b": 2, "c": 3}), line("j", {"a": "x" * 300}))))
    assert sorted(e["code"] for e in errors) == ["decode_limit", "envelope_too_large"]


async def test_a_large_batch_lets_others_run(world):
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await normalizer(world)(batch(*[line("j", {"x": i}) for i in range(2000)]))
    task.cancel()
    assert turns >= 8


# --- scripts ---

GOOD = "function decodeUplink(input) { return {data: {temperature: {value: input.bytes[0], unit: '°C'}, port: input.fPort}}; }"
THROWS = "function decodeUplink(input) {\n  throw new Error('no such frame');\n}"
REGEX_BOMB = "function decodeUplink(i) { return {data: {n: /^(a+)+$/.test('a'.repeat(40) + 'b')}}; }"
PYTHON = (
    "def decode(payload, context):\n    return [{'name': 'temperature', 'value': payload['t'] / 10, 'unit': '°C'}]\n"
)


@pytest.fixture
async def sandbox():
    pytest.importorskip("quickjs")
    pytest.importorskip("RestrictedPython")
    pool = SandboxPool(Limits(cpu_s=0.1, wall_s=0.4))
    yield pool
    await pool.close()


@pytest.fixture
def scripts(world):
    devices, types, clock = world
    for name, kind, source in (
        ("good", "javascript", GOOD),
        ("throws", "javascript", THROWS),
        ("bomb", "javascript", REGEX_BOMB),
        ("py", "python", PYTHON),
        ("blank", "python", " "),
    ):
        types.parsers[name] = parser(name, kind, source, version=2)
        types.types[name] = {"name": name, "rev": 1, "manufacturer": "m", "parser": name, "mode": "LoRaWAN"}
        devices.known[name] = {"device_id": name, "rev": 4, "type": name, "enabled": True}
    devices.known["good-off"] = {**devices.known["good"], "device_id": "good-off", "enabled": False}
    return devices, types, clock


class Counted:
    def __init__(self, pool):
        self.pool, self.batches = pool, []

    async def run(self, calls):
        self.batches.append(len(calls))
        return await self.pool.run(calls)


def scripted(world, sandbox):
    devices, types, clock = world
    return Normalizer(devices, types, clock, LiveSettings(Settings()), sandbox)


async def test_a_batchs_scripts_run_in_one_round_trip_beside_other_parsers(scripts, sandbox):
    counted = Counted(sandbox)
    value = b"\n".join(
        [line("good", b"\x14", port=5), line("j", {"x": 1}), line("py", {"t": 215}), line("good", b"\x15")]
    )
    out, errors = split(await scripted(scripts, counted)(batch(value)))
    assert (counted.batches, errors) == ([3], [])
    made = {s.key: messages(s) for s in out}
    assert [[r["value"] for r in m["readings"]] for m in made[b"good"]] == [[293.15, 5], [294.15, 1]]
    assert made[b"py"][0]["readings"][0]["value"] == 294.65
    assert (made[b"good"][0]["parser"], made[b"good"][0]["config_rev"]) == ("good@2", 4)
    assert made[b"j"][0]["readings"][0]["value"] == 1


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("javascript", "function decodeUplink(i) { return {data: {a: 1, torn: Math.log(-1), none: null, over: 1 / 0}}; }"),
        ("python", "def decode(payload, context):\n    return {'a': 1, 'torn': float('nan'), 'none': None, 'over': -1e308 * 10}"),
    ],
)  # fmt: skip
async def test_a_value_of_a_script_that_is_not_finite_is_refused_and_the_others_go_on(scripts, sandbox, kind, source):
    scripts[1].parsers["good"] = parser("good", kind, source, version=3)
    out, errors = split(await scripted(scripts, sandbox)(batch(line("good", b"\x14"))))
    assert [(r["component_type"], r["value"]) for m in messages(out[0]) for r in m["readings"]] == [("a", 1)]
    assert [(e["code"], e["message"]) for e in errors] == [
        ("value_not_finite", "torn has no finite value"), ("value_not_finite", "over has no finite value"),
    ]  # fmt: skip


async def test_a_scripts_fault_names_version_line_and_input_and_stops_nobody_else(scripts, sandbox):
    lines = [
        line("throws", b"\x01"),
        line("good", b"\x01"),
        line("blank", b"\x01"),
        line("good-off", b"\x01"),
        line("py", []),
    ]
    out, errors = split(await scripted(scripts, sandbox)(batch(*lines)))
    assert [s.key for s in out] == [b"good"]
    found = {e["device_id"]: e for e in errors}
    assert found["throws"]["code"] == "script_fault"
    assert found["throws"]["message"] == "throws@2, line 2: Error: no such frame"
    assert found["throws"]["raw"].encode() == lines[0]
    assert found["throws"]["parser"] == "throws@2"
    assert {d: e["code"] for d, e in found.items()} == {
        "throws": "script_fault", "blank": "no_parser", "good-off": "device_disabled", "py": "script_fault",
    }  # fmt: skip


async def test_a_bomb_is_set_aside_and_the_others_of_its_batches_are_decoded(scripts, sandbox):
    stage = scripted(scripts, sandbox)
    codes = []
    for n in range(5):
        out, errors = split(await stage(batch(line("bomb", bytes([n])), line("good", bytes([n])))))
        assert [s.key for s in out] == [b"good"]
        codes += [e["code"] for e in errors]
    assert codes == ["script_timeout"] * 3 + ["script_suspended"] * 2


async def test_without_a_sandbox_script_devices_are_refused_and_kept(scripts):
    class Missing:
        tries = 0

        async def run(self, calls):
            self.tries += 1
            raise Fatal("pip install 'preservarium[scripts]'")

    missing = Missing()
    stage = scripted(scripts, missing)
    for _ in range(2):
        out, errors = split(await stage(batch(line("good", b"\x01"), line("j", {"x": 1}))))
        assert [s.key for s in out] == [b"j"]
        assert [(e["code"], e["message"]) for e in errors] == [("no_parser", "pip install 'preservarium[scripts]'")]
    assert missing.tries == 1
    scripts[2].advance(61)
    await stage(batch(line("good", b"\x01")))
    assert missing.tries == 2
    _, errors = split(await scripted(scripts, None)(batch(line("good", b"\x01"))))
    assert errors[0]["code"] == "no_parser"


# --- addresses, and messages without a payload ---

EUI = "70b3d57ed0aa0001"
SPELLINGS = ("70b3d57ed0aa0001", "70B3D57ED0AA0001", "70-B3-D5-7E-D0-AA-00-01", "70b3.d57e.d0aa.0001")


class ByAddress(Devices):
    """As the look-up finds them: by any spelling."""

    async def lookup_many(self, partition, device_ids):
        ids = list(device_ids)
        self.asked.append(ids)
        by_address = {canonical_address(d): doc for d, doc in self.known.items()}
        return {d: by_address[canonical_address(d)] for d in ids if canonical_address(d) in by_address}


@pytest.mark.parametrize("registered", SPELLINGS)
async def test_a_device_is_found_by_any_spelling_and_called_as_it_is_registered(world, registered):
    _, types, clock = world
    devices = ByAddress({registered: {"device_id": registered, "rev": 5, "type": "json", "enabled": True}})
    run = Normalizer(devices, types, clock, LiveSettings(Settings()))
    out, errors = split(await run(batch(*(line(spelled, {"x": i}) for i, spelled in enumerate(SPELLINGS)))))
    assert errors == []
    assert {s.key for s in out} == {registered.encode()}
    assert [(m["device_id"], m["readings"][0]["value"]) for s in out for m in messages(s)] == [
        (registered, i) for i in range(4)
    ]
    _, errors = split(await run(batch(line(SPELLINGS[1], {"x": None}))))
    assert [(e["device_id"], orjson.loads(e["raw"])["device"]) for e in errors] == [(registered, SPELLINGS[1])]
    # One configuration for all of them: what changes is forgotten by whatever name it changes.
    run.forget(SPELLINGS[2])
    devices.known[registered] = {**devices.known[registered], "rev": 6}
    out, _ = split(await run(batch(*(line(spelled, {"x": 1}) for spelled in SPELLINGS))))
    assert {m["config_rev"] for s in out for m in messages(s)} == {6}


@pytest.mark.parametrize("device", ["a", "j", "js", "zzz", "off"])
async def test_a_message_without_a_payload_calls_no_codec_stores_nothing_and_is_no_error(world, device):
    devices, types, clock = world
    types.parsers["script"] = parser("script", "javascript", "function decodeUplink() { return {data: {x: 1}}; }")
    types.types["js"] = {"name": "js", "rev": 1, "manufacturer": "m", "parser": "script"}
    devices.known["js"] = {"device_id": "js", "rev": 1, "type": "js", "enabled": True}

    class NoSandbox:
        async def run(self, calls):
            raise AssertionError(calls)

    before = metrics.WITHOUT_PAYLOAD._value.get()
    run = Normalizer(devices, types, clock, LiveSettings(Settings()), NoSandbox())
    records = [line(device, b""), line(device, None), line(device, "")]
    effects = await run(batch(*records, b"\n".join([line(device, b""), line("j", {"x": 7})])))
    out, errors = split(effects)
    assert errors == []
    assert [(s.key, messages(s)[0]["raw_index"]) for s in out] == [(b"j", 1)]
    assert metrics.WITHOUT_PAYLOAD._value.get() - before == 4
