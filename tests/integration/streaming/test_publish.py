"""The publisher against a real Kafka: order, limits, and what it does when Kafka is not there."""

import asyncio
import time

import pytest
from aiokafka.partitioner import DefaultPartitioner
from worker_support import make_topics, read_all

from preservarium import topics
from preservarium.embedded.service import free_port
from preservarium.errors import Fatal, ReasonCode, Reject, Retry
from preservarium.settings import Kafka, LiveSettings, Settings
from preservarium.streaming.publish import BATCH_BYTES_MAX, Publisher, partition_of
from preservarium.streaming.stage import Send

PARTITIONS = 3


def publisher(kafka: str, prefix: str, **settings: object) -> Publisher:
    fields = {"bootstrap_servers": kafka, "topic_prefix": prefix, "partitions": PARTITIONS, **settings}
    return Publisher(LiveSettings(Settings(kafka=Kafka(**fields))))


def test_keys_go_where_aiokafka_and_java_put_them() -> None:
    partitions = list(range(12))
    for i in range(500):
        key = b"device-%d" % i * (i % 3 + 1)
        assert partition_of(key, 12) == DefaultPartitioner()(key, partitions, partitions)
    # Apache Kafka, UtilsTest.testMurmur2
    assert partition_of(b"21", 1_000) == (-973932308 & 0x7FFFFFFF) % 1_000
    assert partition_of(b"foobar", 1_000) == (-790332482 & 0x7FFFFFFF) % 1_000


def test_keyless_records_are_spread() -> None:
    assert {partition_of(None, 4) for _ in range(8)} == {0, 1, 2, 3}


async def test_what_is_published_is_there_when_the_call_returns_in_order(kafka: str, topic_prefix: str) -> None:
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW, topics.ERRORS])
    p = publisher(kafka, topic_prefix)
    an_hour_ago = time.time_ns() // 1_000_000 - 3_600_000
    # Several batches for one partition, several partitions, two topics; incompressible, or batches would be few.
    pad = bytes(range(256)) * 2
    sends = [
        Send(topics.RAW, b"k%d" % (i % 7), b"%d " % i + pad, partition=i % 2, headers=(("generation", b"%d" % i),))
        for i in range(4_000)
    ] + [Send(topics.ERRORS, None, b"e", timestamp_ms=an_hour_ago)]
    assert sum(len(s.value or b"") for s in sends) > 6 * BATCH_BYTES_MAX
    try:
        counts = await p.publish(sends)
        assert counts == {"iot_raw_data": 4_000, "iot_errors": 1}
        assert p.acknowledged == 4_001
        records = await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS)
        for partition in (0, 1):
            values = [int(r.value.split()[0]) for r in records if r.partition == partition]
            assert values == list(range(partition, 4_000, 2))
        assert all(r.headers == (("generation", r.value.split()[0]),) for r in records)
        (error,) = await read_all(kafka, topics.ERRORS.full(topic_prefix), PARTITIONS)
        assert (error.key, error.timestamp) == (None, an_hour_ago)
    finally:
        await p.stop()


async def test_concurrent_calls_keep_their_own_order(kafka: str, topic_prefix: str) -> None:
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW])
    p = publisher(kafka, topic_prefix)

    async def lane(name: int) -> None:
        for turn in range(20):
            await p.publish([Send(topics.RAW, b"%d" % name, b"%d %d" % (turn, i), partition=0) for i in range(20)])

    try:
        await asyncio.gather(*(lane(name) for name in range(8)))
        records = await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS)
        for name in range(8):
            mine = [tuple(map(int, r.value.split())) for r in records if r.key == b"%d" % name]
            assert mine == [(turn, i) for turn in range(20) for i in range(20)]
    finally:
        await p.stop()


async def test_the_offset_of_the_last_state_is_given_back(kafka: str, topic_prefix: str) -> None:
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW])
    p = publisher(kafka, topic_prefix)
    topic = topics.RAW.full(topic_prefix)
    try:
        assert await p.append(topic, 1, [(b"a", b"1"), (b"b", None), (b"a", b"2")]) == 2
        assert await p.append(topic, 1, [(b"c", b"x" * 1_000)] * 1_000) == 1_002
        assert await p.append(topic, 2, [(b"a", b"1")]) == 0
    finally:
        await p.stop()


async def test_a_record_that_is_too_large_is_rejected_before_anything_is_sent(kafka: str, topic_prefix: str) -> None:
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW])
    p = publisher(kafka, topic_prefix, record_bytes_max=20_000)
    try:
        with pytest.raises(Reject, match="a record of 20000 bytes for iot_raw_data is over 20000") as e:
            await p.publish([Send(topics.RAW, b"k", b"small", 0), Send(topics.RAW, b"", b"x" * 20_000, 0)])
        assert e.value.code is ReasonCode.OUTPUT_TOO_LARGE
        with pytest.raises(Reject, match="a state of 20000 bytes"):
            await p.append(topics.RAW.full(topic_prefix), 0, [(b"k", b"x" * 20_000)])
        assert await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS) == []
        await p.publish([Send(topics.RAW, b"k", b"x" * 19_900, 0)])
    finally:
        await p.stop()


async def test_a_topic_with_other_partitions_than_declared_ends_the_worker(kafka: str, topic_prefix: str) -> None:
    await make_topics(kafka, topic_prefix, 2, [topics.RAW])
    p = publisher(kafka, topic_prefix)
    try:
        with pytest.raises(Fatal, match="has 2 partitions, 3 are declared"):
            await p.publish([Send(topics.RAW, b"k", b"v")])
    finally:
        await p.stop()


async def test_a_missing_topic_is_tried_again(kafka: str, topic_prefix: str) -> None:
    p = publisher(kafka, topic_prefix, session_timeout_s=2)
    try:
        with pytest.raises(Retry, match="is not there"):
            await p.publish([Send(topics.RAW, b"k", b"v")])
        await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW])
        async with asyncio.timeout(20):
            while True:
                try:
                    await p.publish([Send(topics.RAW, b"k", b"v")])
                    break
                except Retry:
                    continue
    finally:
        await p.stop()


async def test_a_kafka_that_is_not_there_is_a_retry_soon(topic_prefix: str) -> None:
    p = publisher(f"127.0.0.1:{free_port()}", topic_prefix, session_timeout_s=2)
    began = time.monotonic()
    with pytest.raises(Retry, match="Kafka cannot be reached"):
        await p.publish([Send(topics.RAW, b"k", b"v")])
    assert time.monotonic() - began < 5
    await p.stop()


async def test_a_producer_that_hangs_is_given_up_and_a_new_one_goes_on(kafka: str, topic_prefix: str) -> None:
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW])
    p = publisher(kafka, topic_prefix, session_timeout_s=2)
    try:
        await p.publish([Send(topics.RAW, b"k", b"0", 0)])
        connection = p._connection
        assert connection is not None
        # As a broker does that stops answering: requests go out, nothing comes back.
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def hang(*_: object, **__: object) -> None:
            await never

        connection.producer.client.send = hang
        began = time.monotonic()
        with pytest.raises(Retry, match="did not acknowledge"):
            await p.publish([Send(topics.RAW, b"k", b"lost?", 0)])
        assert time.monotonic() - began < 4
        await p.publish([Send(topics.RAW, b"k", b"1", 0)])
        assert p._connection is not connection
        never.cancel()
        values = [r.value for r in await read_all(kafka, topics.RAW.full(topic_prefix), PARTITIONS)]
        assert values == [b"0", b"1"], "what was queued when the producer was given up never goes out"
    finally:
        await p.stop()


async def test_cancelling_a_call_leaves_the_publisher_usable(kafka: str, topic_prefix: str) -> None:
    await make_topics(kafka, topic_prefix, PARTITIONS, [topics.RAW])
    p = publisher(kafka, topic_prefix)
    try:
        await p.publish([Send(topics.RAW, b"k", b"0", 0)])
        task = asyncio.create_task(p.publish([Send(topics.RAW, b"k", b"x" * 500_000, 0)] * 10))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await p.publish([Send(topics.RAW, b"k", b"1", 0)])
    finally:
        await p.stop()
