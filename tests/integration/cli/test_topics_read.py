"""`topics read`: the same of a real Kafka and of the in-memory broker, which knows less of what it holds."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from worker_support import make_topics

from preservarium import topics
from preservarium.cli.topic_lines import Line, Wanted, read
from preservarium.embedded.kafka import MockKafka
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

pytestmark = pytest.mark.kafka

HOUR_MS = 3_600_000


@pytest.fixture(params=["kafka", "in memory"])
async def filled(request, topic_prefix, tmp_path) -> AsyncIterator[Settings]:
    """A topic with records of two hours ago, of an hour ago and of now, in partitions 0, 1 and 2; partition 3 has none."""
    broker = MockKafka(tmp_path / "mock") if request.param == "in memory" else None
    if broker is not None:
        broker.start()
    servers = broker.bootstrap_servers if broker else request.getfixturevalue("kafka")
    kafka = Kafka(bootstrap_servers=servers, topic_prefix=topic_prefix, partitions=4)
    publisher = Publisher(LiveSettings(Settings(kafka=kafka)))
    now_ms = time.time_ns() // 1_000_000
    try:
        if broker is None:
            await make_topics(servers, topic_prefix, 4, [topics.RAW])
        for hours in (2, 1, 0):
            sends = [
                Send(topics.RAW, b"d%d" % p, b'{"hours":%d}' % hours, p, timestamp_ms=now_ms - hours * HOUR_MS)
                for p in range(3)
            ]
            await publisher.publish(sends)
        yield Settings(kafka=kafka)
    finally:
        await publisher.on_stop()
        if broker is not None:
            await asyncio.to_thread(broker.stop)


async def hours(settings: Settings, **wanted: object) -> list[int]:
    found: list[Line] = []
    assert await read(settings, "iot_raw_data", Wanted(**wanted), found.append) == len(found)  # type: ignore[arg-type]
    return [line.value["hours"] for line in found]


async def test_what_is_asked_for_is_read(filled):
    now_us = time.time_ns() // 1_000
    ago = {h: now_us - round(h * 3_600e6) for h in (0.5, 1.5, 2.5, -1)}
    assert await hours(filled) == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert await hours(filled, limit=4) == [1, 0, 0, 0]
    assert await hours(filled, key="d1") == [2, 1, 0]
    assert await hours(filled, partitions=[2], offset=1) == [1, 0]
    assert await hours(filled, offset=-1) == [0, 0, 0]
    assert await hours(filled, since_us=ago[2.5]) == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert await hours(filled, since_us=ago[1.5]) == [1, 1, 1, 0, 0, 0]
    assert await hours(filled, since_us=ago[1.5], limit=2) == [1, 1]
    assert await hours(filled, since_us=ago[1.5], until_us=ago[0.5]) == [1, 1, 1]
    assert await hours(filled, until_us=ago[1.5]) == [2, 2, 2]
    assert await hours(filled, since_us=ago[-1]) == []
    assert await hours(filled, partitions=[3], since_us=ago[2.5]) == []


async def test_what_comes_is_followed(filled):
    found: list[Line] = []
    came = asyncio.Event()

    def take(line: Line) -> None:
        found.append(line)
        if len(found) == 4:
            came.set()

    since_us = time.time_ns() // 1_000 - round(0.5 * 3_600e6)
    reading = asyncio.create_task(read(filled, "iot_raw_data", Wanted(since_us=since_us, follow=True), take))
    publisher = Publisher(LiveSettings(filled))
    try:
        await publisher.publish([Send(topics.RAW, b"d", b'{"hours":-1}', 3)])
        async with asyncio.timeout(30):
            await came.wait()
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        await publisher.on_stop()
    assert sorted(line.value["hours"] for line in found) == [-1, 0, 0, 0]
