"""Topics looked into page by page on a real Kafka."""

import asyncio
import time

import orjson
import pytest
from worker_support import make_topics

from preservarium import topics
from preservarium.operations import browse
from preservarium.operations.browse import TopicUnknown, Wanted
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
