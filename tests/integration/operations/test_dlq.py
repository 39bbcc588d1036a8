"""Dead letters on a real Kafka: listed, shown, and redriven each once."""

import json
import time
from datetime import UTC, datetime

import orjson
import pytest
from click.testing import CliRunner
from worker_support import make_topics, read_all

from preservarium import topics
from preservarium.cli.dlq import commands
from preservarium.clock import ManualClock
from preservarium.errors import ReasonCode
from preservarium.registry.yaml_tree import plain_file
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.stages.normalize import Normalizer
from preservarium.streaming.publish import Publisher
from preservarium.streaming.records import error_line, parse_raw, raw_line
from preservarium.streaming.stage import Batch, Send

pytestmark = pytest.mark.kafka

PARTITIONS = 3
#: Of today: Kafka's retention goes by the times that records have.
NOW = time.time_ns() // 1_000_000_000 * 1_000_000


def utc(us):
    return datetime.fromtimestamp(us // 1_000_000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


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
        # Somebody else's has the ms that Kafka gave it, and in it an instant that no other message has.
        by_value = {m["readings"][0]["value"]: m["received_at"] for m in made}
        assert [by_value[n] for n in range(3)] == [NOW, NOW + 1, NOW + 2]
        assert NOW + 500 <= by_value[9] < NOW + 1_000
        assert all(m["device_id"] == "new" for m in made)

        assert (await command("redrive", *chosen))["sent"] == 0
        assert await normalize_all() == []
    finally:
        await publisher.on_stop()


async def test_the_parts_of_one_message_are_redriven_each_once(kafka, topic_prefix, live):
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS, topics.REDRIVEN])
    around = {"received_at": NOW + 3, "connector": "mqtt", "mode": "LAN", "topic": "t/1"}
    base = {"stage": "normalize", "code": "decode_failed", "device_id": "D", "topic": "iot_raw_data", "partition": 0, "offset": 1, "index": 0,
            "raw_partition": 0, "raw_offset": 1, "raw_index": 0, "attempt": 1, "generation": 0, "first_seen": NOW, "received_at": NOW}  # fmt: skip
    errors = [
        {**base, "message": "line 2: no", "part": 1, "envelope": around, "raw": "m y="},
        {**base, "message": "line 4: no", "part": 2, "envelope": around, "raw_b64": "AAE="},
        {**base, "message": "line 2: no", "part": 1, "envelope": around, "raw": "m y="},
        {**base, "message": "not to be read", "part": 3, "envelope": {}, "raw": "m"},
    ]
    publisher = Publisher(live)
    try:
        await publisher.publish([Send(topics.ERRORS, b"D", orjson.dumps(e)) for e in errors])
    finally:
        await publisher.on_stop()
    assert await command("redrive") == {"matched": 4, "sent": 2, "already": 1, "unusable": 1, "dry_run": False}
    records = await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS)
    sent = [orjson.loads(r.value) for r in records]
    assert sorted(sent, key=lambda one: one["payload_b64"]) == [
        {"device": "D", **around, "payload_b64": payload} for payload in ("AAE=", "bSB5PQ==")
    ]
    # What was refused a month ago is not over for Kafka before anybody has read it.
    assert all(r.timestamp > time.time() * 1_000 - 600_000 for r in records)


async def test_an_old_input_is_received_when_it_was_received(kafka, topic_prefix, live):
    month_ago = NOW - 30 * 86_400_000_000
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS, topics.REDRIVEN])
    base = {"stage": "normalize", "message": "too long", "device_id": "D", "topic": "iot_raw_data", "partition": 0, "offset": 1, "index": 0,
            "raw_partition": 0, "raw_index": 0, "attempt": 1, "generation": 0, "first_seen": month_ago + 9, "received_at": month_ago}  # fmt: skip
    errors = [
        {**base, "code": "envelope_too_large", "raw_offset": 1, "raw": '{"t":1}'},
        {**base, "code": "unknown_device", "raw_offset": 2, "raw": '{"t":2}'},
    ]
    publisher = Publisher(live)
    try:
        await publisher.publish([Send(topics.ERRORS, b"D", orjson.dumps(e)) for e in errors])
    finally:
        await publisher.on_stop()
    assert (await command("redrive"))["sent"] == 2
    records = await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS)
    assert all(r.timestamp > time.time() * 1_000 - 600_000 for r in records)
    read = [parse_raw(r, topics.RAW.name, r.partition, payload_bytes_max=1_000) for r in records]
    assert [message["received_at"] // 1_000 for messages, _ in read for message in messages] == [month_ago // 1_000] * 2
    # Refused again, it says the same.
    refused = [
        error_line(
            "normalize",
            ReasonCode.DECODE_FAILED,
            "no",
            topic=topics.RAW.name,
            partition=r.partition,
            now_us=NOW,
            record=r,
        )
        for r in records
    ]
    assert [line["received_at"] for line in refused] == [month_ago] * 2


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
    assert (record.key, record.headers) == (b"d", (("attempt", b"2"), ("received", b"%d" % (NOW // 1_000))))
    envelope = orjson.loads(record.value)
    assert (envelope["device"], envelope["payload_b64"]) == ("d", "AAE=")
    assert envelope["received_at"] // 1_000 == NOW // 1_000


async def test_what_a_later_stage_refused_is_read_from_the_raw_topic(kafka, topic_prefix, live):
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS, topics.REDRIVEN])
    envelope = raw_line("d", {"t": 20}, received_at=NOW, connector="test", mode="LAN")
    packed = raw_line("e", {"t": 21}, received_at=NOW + 7, connector="test", mode="LAN")
    foreign = b'{"t": 90000000000000000001}'
    base = {"stage": "validate", "code": "same_instant", "message": "another value", "topic": "iot_standardized_data",
            "partition": 0, "offset": 1, "index": 0, "attempt": 1, "generation": 0, "first_seen": NOW, "raw": "{}"}  # fmt: skip
    publisher = Publisher(live)
    try:
        await publisher.publish(
            [
                Send(topics.RAW, b"d", envelope, 0),
                Send(topics.RAW, b"d", envelope + b"\n" + packed, 0),
                Send(topics.RAW, b"f", foreign, 1, timestamp_ms=NOW // 1_000),
            ]
        )
        wanted = [("d", 0, 0, 0), ("e", 0, 1, 1), ("f", 1, 0, 0), ("gone", 2, 99, 0)]
        errors = [
            {**base, "device_id": d, "raw_partition": p, "raw_offset": o, "raw_index": i} for d, p, o, i in wanted
        ]
        await publisher.publish([Send(topics.ERRORS, b"d", orjson.dumps(e)) for e in errors])
    finally:
        await publisher.on_stop()
    done = await command("redrive", "--code", "same_instant")
    assert done == {"matched": 4, "sent": 3, "already": 0, "unusable": 1, "dry_run": False}
    again = [r for r in await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS) if r.headers]
    values = {r.key: r.value for r in again}
    assert values[b"d"] == envelope
    assert values[b"e"] == packed
    assert values[b"f"].endswith(b',"payload":' + foreign + b"}")
    assert orjson.loads(values[b"f"])["received_at"] // 1_000 == NOW // 1_000


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
        "hex": "0215", "time": utc(NOW), "port": 5, "expect": {"a": {"value": 533, "unit": "V"}},
        "description": "decode_failed: too short",
    }  # fmt: skip
    tested = await asyncio.to_thread(run, "test", path)
    assert "1 examples, 0 do not hold" in tested.output
