"""Refusals followed on a real Kafka: the newest of each partition, then what comes, and original bytes out of the raw topic."""

import asyncio
import time

import pytest
from worker_support import make_topics

from preservarium import topics
from preservarium.errors import ReasonCode
from preservarium.operations import dlq
from preservarium.operations import refusals as module
from preservarium.operations.refusals import Refusals, bytes_of, follow
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.streaming.publish import Publisher
from preservarium.streaming.records import error_line, raw_line
from preservarium.streaming.records.error_lines import error_send
from preservarium.streaming.stage import Send

pytestmark = pytest.mark.kafka

PARTITIONS = 3
DEVICES = 9


@pytest.fixture
def live(kafka, topic_prefix):
    return LiveSettings(
        Settings(kafka=Kafka(bootstrap_servers=kafka, topic_prefix=topic_prefix, partitions=PARTITIONS))
    )


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


async def test_the_newest_are_read_then_what_comes_and_bytes_are_found(kafka, topic_prefix, live, monkeypatch):
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS])
    monkeypatch.setattr(module, "RECORDS_MAX", 10)
    now_us = time.time_ns() // 1_000
    publisher = Publisher(live)

    def refused(n, **fields):
        made = error_line("validate", ReasonCode.VALUE_RANGE, f"too hot {n}", topic="iot_standardized_data", partition=0, offset=n, now_us=now_us + n,
                          device_id=f"d{n % DEVICES}", **fields)  # fmt: skip
        return error_send(made)

    refusals, stop = Refusals(), asyncio.Event()
    following = None
    try:
        raw = raw_line("d1", {"t": 999}, received_at=now_us, connector="test", mode="LAN")
        await publisher.publish([Send(topics.RAW, b"d1", raw)])
        await publisher.publish([refused(n) for n in range(180)])
        following = asyncio.create_task(follow(refusals, live(), now_us=now_us, stopped=stop.is_set))
        await asyncio.wait_for(refusals.ready.wait(), 60)
        (cause,) = refusals.causes(now_us)
        assert (cause["stage"], cause["code"]) == ("validate", "value_range")
        assert 10 <= cause["day"] <= 10 * PARTITIONS
        assert refusals.cut
        # What is read of a partition is its end.
        newest = {kept.line["offset"] for kept in refusals.newest(limit=200)[0]}
        assert 179 in newest
        assert 0 not in newest
        where = {f"raw_{name}": value for name, value in (await _place(kafka, topic_prefix)).items()}
        await publisher.publish([refused(DEVICES * 100 + 1, **where)])
        await until(lambda: cause["day"] < refusals.causes(now_us)[0]["day"])
        (latest, *_), _ = refusals.newest(device_id="d1", limit=1)
        assert bytes_of(latest.line) is None
        assert await dlq.original(live(), dlq.Letter(latest.id, latest.line)) == raw
        assert (await dlq.letter(live(), latest.id)).line == latest.line
        with pytest.raises(dlq.NoSuchError):
            await dlq.letter(live(), "0:999999")
    finally:
        stop.set()
        if following is not None:
            await asyncio.wait_for(following, 30)
        await publisher.on_stop()


async def _place(kafka, prefix):
    from worker_support import read_all

    (record,) = await read_all(kafka, topics.RAW.full(prefix), PARTITIONS)
    return {"partition": record.partition, "offset": record.offset, "index": 0}


async def test_a_topic_that_is_not_there_is_said(live):
    with pytest.raises(Exception, match="iot_errors is not there"):
        await follow(Refusals(), live(), now_us=time.time_ns() // 1_000, stopped=lambda: False)
