"""Topics looked into page by page on a real Kafka, and refusals set aside with a reason."""

import asyncio
import time

import orjson
import pytest
from click.testing import CliRunner
from worker_support import make_topics, read_all

from preservarium import topics
from preservarium.cli.dlq import commands
from preservarium.operations import browse, discarding, dlq
from preservarium.operations.browse import TopicUnknown, Wanted
from preservarium.operations.refusals import Refusals
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

pytestmark = pytest.mark.kafka

PARTITIONS = 3
COUNT = 90
NOW = time.time_ns() // 1_000_000_000 * 1_000_000
STEP_MS = 1_000


@pytest.fixture
def live(kafka, topic_prefix, monkeypatch):
    fields = {"bootstrap_servers": kafka, "topic_prefix": topic_prefix, "partitions": PARTITIONS}
    for name, value in fields.items():
        monkeypatch.setenv(f"PRESERVARIUM_KAFKA__{name.upper()}", str(value))
    monkeypatch.setenv("PRESERVARIUM_ENV_FILE", "/dev/null")
    return LiveSettings(Settings(kafka=Kafka(**fields)))


async def pages(settings, wanted):
    found, at, count = [], None, 0
    while True:
        page = await browse.page(settings, "iot_validated_data", wanted, at)
        found += page.records
        count += 1
        assert count < 100
        if (at := page.next) is None:
            return found


async def test_a_topic_is_read_page_by_page_both_ways_by_key_text_time_and_offset(kafka, topic_prefix, live):
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.VALIDATED])
    settings, publisher = live(), Publisher(live)
    first_ms = NOW // 1_000 - COUNT * STEP_MS
    try:
        await publisher.publish(
            [
                Send(topics.VALIDATED, f"70B3D57ED0AA00{n % 7:02}".encode(), orjson.dumps({"n": n}) + (b"\n" + orjson.dumps({"m": n}) if n % 10 == 0 else b""), timestamp_ms=first_ms + n * STEP_MS)
                for n in range(COUNT)
            ]
        )  # fmt: skip
        with pytest.raises(TopicUnknown):
            await browse.page(settings, "somebody_elses", Wanted())
        with pytest.raises(TopicUnknown):
            await browse.page(settings, "iot_validated_data", Wanted(partition=7))
        back = await pages(settings, Wanted(limit=8))
        assert [r["value"][0]["n"] for r in back] == [*range(COUNT)][::-1]
        assert {len(r["value"]) for r in back} == {1, 2}
        onward = await pages(settings, Wanted(limit=8, offset=0))
        assert sorted((r["partition"], r["offset"]) for r in onward) == sorted((r["partition"], r["offset"]) for r in back)  # fmt: skip
        since = await pages(settings, Wanted(limit=8, from_us=(first_ms + 50 * STEP_MS) * 1_000))
        assert sorted(r["value"][0]["n"] for r in since) == [*range(50, COUNT)]
        # A device in another spelling, and a text of the value.
        mine = await pages(settings, Wanted(limit=3, key="70-b3-d5-7e-d0-aa-00-04"))
        assert [r["value"][0]["n"] for r in mine] == [n for n in range(COUNT) if n % 7 == 4][::-1]
        assert [r["value"][0]["n"] for r in await pages(settings, Wanted(text='"m":30'))] == [30]
        one = {r["partition"] for r in await pages(settings, Wanted(partition=1))}
        assert one == {1}
        listed = {each["name"]: each for each in await browse.listed(settings)}
        assert (listed["iot_validated_data"]["records"], listed["iot_validated_data"]["partitions"]) == (COUNT, PARTITIONS)  # fmt: skip
        assert listed["iot_raw_data"]["partitions"] == 0

        came = []

        async def follow():
            async for event in browse.live(settings, "iot_validated_data", Wanted(key="new")):
                came.append(event)
                if event["records"]:
                    return

        following = asyncio.create_task(follow())
        while not came:
            await asyncio.sleep(0.05)
        await publisher.publish([Send(topics.VALIDATED, b"other", b"{}"), Send(topics.VALIDATED, b"new", b'{"n": 1000}')])  # fmt: skip
        await asyncio.wait_for(following, 30)
        assert came[-1]["records"][0]["value"] == [{"n": 1000}]
    finally:
        await publisher.on_stop()


async def test_what_is_set_aside_is_kept_and_no_redrive_sends_it(kafka, topic_prefix, live):
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS, topics.REDRIVEN])
    settings, publisher = live(), Publisher(live)

    def line(n, code):
        return {"stage": "normalize", "code": code, "message": "no", "device_id": f"d{n}", "topic": "iot_raw_data", "partition": 0, "offset": n, "index": 0, "raw_partition": 0,
                "raw_offset": n, "raw_index": 0, "attempt": 1, "first_seen": NOW, "last_seen": NOW, "raw": '{"t": 1}'}  # fmt: skip

    try:
        await publisher.publish(
            [Send(topics.ERRORS, b"d", orjson.dumps(line(n, "decode_failed" if n < 4 else "value_range"))) for n in range(6)]
        )  # fmt: skip
        select = dlq.Select(("decode_failed",))
        with pytest.raises(discarding.ReasonMissing):
            await discarding.discard(settings, select, reason="  ", actor="ann", now_us=NOW)
        dry = await discarding.discard(settings, select, reason="test device", actor="ann", now_us=NOW, dry_run=True)
        assert dry.document() == {"matched": 4, "discarded": 4, "already": 0}
        assert (await dlq.redrive(settings, select, now_us=NOW, dry_run=True)).sent == 4
        done = await discarding.discard(settings, dlq.Select(("decode_failed",), "d1"), reason="test device", actor="ann", now_us=NOW)  # fmt: skip
        assert (done.matched, done.discarded) == (1, 1)
        (group,) = commands
        result = await asyncio.to_thread(CliRunner().invoke, group, ["discard", "--code", "decode_failed", "--reason", "old firmware", "--actor", "bob", "--json"])  # fmt: skip
        assert result.exit_code == 0, result.output
        assert orjson.loads(result.stdout) == {"matched": 4, "discarded": 3, "already": 1, "dry_run": False}
        assert (await dlq.redrive(settings, select, now_us=NOW)).document()["sent"] == 0
        assert (await dlq.redrive(settings, dlq.Select(("value_range",)), now_us=NOW)).sent == 2
        # Whoever looks sees what became of each.
        refusals = Refusals()
        refusals.settle(await read_all(kafka, topics.REDRIVEN.full(topic_prefix), PARTITIONS))
        assert refusals.settled(line(1, "decode_failed")) == {"how": "discarded", "at": NOW, "reason": "test device", "actor": "ann"}  # fmt: skip
        assert refusals.settled(line(2, "decode_failed"))["reason"] == "old firmware"
        assert refusals.settled(line(5, "value_range"))["how"] == "redriven"
        assert refusals.settled(line(9, "value_range")) is None
    finally:
        await publisher.on_stop()
