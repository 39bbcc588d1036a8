"""Dead letters on a real Kafka: listed, shown, and redriven each once."""

import json

import orjson
import pytest
from click.testing import CliRunner
from worker_support import make_topics, read_all

from preservarium import topics
from preservarium.cli.dlq import commands
from preservarium.clock import ManualClock
from preservarium.normalizer import Normalizer
from preservarium.publish import Publisher
from preservarium.records import raw_line
from preservarium.registry_file import plain_file
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.stage import Batch, Send

pytestmark = pytest.mark.kafka

PARTITIONS = 3
NOW = 1_760_000_000_000_000


class World:
    """A registry in memory."""

    rev = 1

    def __init__(self):
        self.devices = {}

    def datatype(self, name):
        return None

    def parser(self, name):
        return {"name": "json", "version": 1, "rev": 1, "kind": "json", "status": "active", "source": {}, "hash": "h"}

    def type(self, name):
        return {"name": name, "rev": 1, "manufacturer": "m", "parser": "json"}

    async def lookup_many(self, partition, ids):
        return {i: self.devices[i] for i in ids if i in self.devices}

    async def ready(self):
        return


@pytest.fixture
def live(kafka, topic_prefix, monkeypatch):
    fields = {"bootstrap_servers": kafka, "topic_prefix": topic_prefix, "partitions": PARTITIONS}
    for name, value in fields.items():
        monkeypatch.setenv(f"PRESERVARIUM_KAFKA__{name.upper()}", str(value))
    monkeypatch.setenv("PRESERVARIUM_ENV_FILE", "/dev/null")
    return LiveSettings(Settings(kafka=Kafka(**fields)))


async def command(*args):
    # In a thread: commands have an event loop of their own.
    import asyncio

    (group,) = commands
    result = await asyncio.to_thread(CliRunner().invoke, group, [*args, "--json"] if args[0] != "show" else list(args))
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(result.stdout)


async def test_payloads_of_an_unknown_device_come_in_once_it_is_registered(kafka, topic_prefix, live):
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS, topics.REDRIVEN])
    world = World()
    stage = Normalizer(world, world, ManualClock(NOW), live)
    publisher = Publisher(live)

    async def normalize_all():
        made = []
        for partition in range(PARTITIONS):
            records = [
                r for r in await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS) if r.partition == partition
            ]
            fresh = [r for r in records if (partition, r.offset) not in seen]
            seen.update((partition, r.offset) for r in fresh)
            if fresh:
                effects = await stage(Batch(topics.RAW.name, partition, fresh))
                await publisher.publish([s for s in effects.sends if s.topic is topics.ERRORS])
                made += [orjson.loads(s.value) for s in effects.sends if s.topic is topics.STANDARDIZED]
        return made

    seen = set()
    try:
        lines = [
            raw_line(d, {"t": n}, received_at=NOW + n, connector="test", mode="LAN")
            for d in ("new", "never")
            for n in range(3)
        ]
        await publisher.publish([Send(topics.RAW, orjson.loads(line)["device"].encode(), line) for line in lines])
        # Somebody else's record: bytes, with the device in the key.
        await publisher.publish([Send(topics.RAW, b"new", b'{"t": 9}', timestamp_ms=NOW // 1000)])
        assert await normalize_all() == []

        listed = await command("list", "--code", "unknown_device", "--device", "new")
        assert {e["code"] for e in listed} == {"unknown_device"}
        assert [e["attempt"] for e in listed] == [1] * 4
        assert (await command("show", listed[0]["id"]))["device_id"] == "new"

        chosen = ("--code", "unknown_device", "--device", "new")
        dry = await command("redrive", *chosen, "--dry-run")
        assert dry == {"matched": 4, "sent": 4, "already": 0, "unusable": 0, "dry_run": True}
        # Too early: refused again, as a second try, with the bytes as they were.
        assert (await command("redrive", *chosen, "--limit", "1"))["sent"] == 1
        assert await normalize_all() == []
        again = [e for e in await command("list", *chosen) if e["attempt"] == 2]
        assert [e["raw"] for e in again] == [listed[0]["raw"]]

        world.devices["new"] = {"device_id": "new", "rev": 1, "type": "x", "enabled": True}
        done = await command("redrive", *chosen)
        assert (done["matched"], done["sent"], done["already"]) == (5, 4, 1)
        made = await normalize_all()
        assert sorted(m["readings"][0]["value"] for m in made) == [0, 1, 2, 9]
        assert {m["received_at"] for m in made} == {NOW, NOW + 1, NOW + 2}
        assert all(m["device_id"] == "new" for m in made)

        assert (await command("redrive", *chosen))["sent"] == 0
        assert await normalize_all() == []
    finally:
        await publisher.on_stop()


async def test_what_carries_no_input_is_counted_and_not_sent(kafka, topic_prefix, live):
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS, topics.REDRIVEN])
    base = {"stage": "normalize", "code": "decode_failed", "device_id": "d", "topic": "iot_raw_data", "partition": 0,
            "offset": 1, "index": 0, "raw_partition": 0, "raw_index": 0, "attempt": 1, "generation": 0, "first_seen": NOW}  # fmt: skip
    errors = [
        {**base, "raw_offset": 1, "message": "no such frame", "raw_b64": "AAE="},
        {**base, "raw_offset": 2, "message": "too large [first 5 of 9 bytes kept]", "raw": "12345"},
        {**base, "raw_offset": 3, "message": "of another stage", "topic": "iot_standardized_data", "raw": "{}"},
        {**base, "raw_offset": 1, "message": "no such frame", "raw_b64": "AAE="},
    ]
    publisher = Publisher(live)
    try:
        await publisher.publish(
            [Send(topics.ERRORS, b"d", orjson.dumps(e)) for e in errors] + [Send(topics.ERRORS, b"d", b"{torn")]
        )
    finally:
        await publisher.on_stop()
    assert await command("redrive") == {"matched": 4, "sent": 1, "already": 1, "unusable": 2, "dry_run": False}
    (record,) = await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS)
    assert (record.key, record.value, record.headers) == (b"d", b"\x00\x01", (("attempt", b"2"),))


async def test_a_refused_payload_becomes_an_example(kafka, topic_prefix, live, tmp_path):
    from preservarium.cli.decode import commands as decode_commands

    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS])
    line = raw_line("d", b"\x02\x15", received_at=NOW, connector="test", mode="LAN", port=5).decode()
    error = {"stage": "normalize", "code": "decode_failed", "message": "too short", "device_id": "d", "topic": "iot_raw_data",
             "partition": 0, "offset": 1, "index": 0, "raw_partition": 0, "raw_offset": 1, "raw_index": 0, "attempt": 1,
             "generation": 0, "first_seen": NOW, "raw": line}  # fmt: skip
    publisher = Publisher(live)
    try:
        await publisher.publish([Send(topics.ERRORS, b"d", orjson.dumps(error))])
    finally:
        await publisher.on_stop()
    (listed,) = await command("list")
    path = tmp_path / "p.yaml"
    path.write_text("# ours\nname: p\nkind: table\nsource:\n  fields: [{name: a, type: u16, unit: V}]  # big-endian\n")
    group = next(c for c in decode_commands if c.name == "decoders")

    def run(*args):
        return CliRunner().invoke(group, [str(a) for a in args])

    import asyncio

    added = await asyncio.to_thread(run, "add-example", "--from-error", listed["id"], "--codec", path)
    assert added.exit_code == 0, added.output
    text = path.read_text()
    assert text.startswith("# ours\n")
    assert "# big-endian" in text
    (example,) = plain_file(path)["examples"]
    assert example == {
        "hex": "0215", "time": "2025-10-09T08:53:20.000Z", "port": 5, "expect": {"a": {"value": 533, "unit": "V"}},
        "description": "decode_failed: too short",
    }  # fmt: skip
    tested = await asyncio.to_thread(run, "test", path)
    assert "1 examples, 0 do not hold" in tested.output
