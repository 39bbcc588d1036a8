"""Group commit: order, back-pressure, and who hears of a failure."""

import asyncio
import random

import pytest
from connector_fakes import MemoryPublisher

from preservarium import topics
from preservarium.connectors.base import Backoff, Limits, RawProducer, envelope_send, message_send, refused_send
from preservarium.errors import ReasonCode, Reject, Retry
from preservarium.streaming.stage import Send

NOW_US = 1_700_000_000_000_000
LIMITS = Limits(payload_bytes_max=1_000, record_bytes_max=2_000)


def record(i: int, size: int = 10) -> Send:
    return Send(topics.RAW, str(i).encode(), b"x" * size)


async def test_what_arrives_while_kafka_is_busy_leaves_together_and_in_order():
    publisher = MemoryPublisher()
    publisher.gate.clear()
    producer = RawProducer(publisher, "test")
    waiting = [asyncio.create_task(producer.send([record(i), record(i)])) for i in range(50)]
    await asyncio.sleep(0)
    while not publisher.calls:
        await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    publisher.gate.set()
    await asyncio.gather(*waiting)
    assert [int(s.key or b"") for s in publisher.sends] == [i for i in range(50) for _ in range(2)]
    assert len(publisher.calls) <= 3
    assert producer.sent == 100


async def test_a_failed_call_is_told_to_everyone_in_it_and_to_nobody_after_it():
    publisher = MemoryPublisher()
    publisher.failures = 1
    producer = RawProducer(publisher, "test")
    results = await asyncio.gather(*(producer.send([record(i)]) for i in range(3)), return_exceptions=True)
    assert all(isinstance(r, Retry) for r in results)
    await producer.send([record(9)])
    assert [s.key for s in publisher.sends] == [b"9"]


async def test_a_record_too_large_fails_its_sender_alone():
    publisher = MemoryPublisher()
    publisher.value_bytes_max = 100
    publisher.gate.clear()
    producer = RawProducer(publisher, "test")
    tasks = [asyncio.create_task(producer.send([record(i, 10 if i != 2 else 500)])) for i in range(5)]
    while not publisher.calls:
        await asyncio.sleep(0)
    publisher.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(r) for r in results] == [type(None), type(None), Reject, type(None), type(None)]
    assert [s.key for s in publisher.sends] == [b"0", b"1", b"3", b"4"]


async def test_pending_bytes_are_bounded_and_the_sender_waits():
    publisher = MemoryPublisher()
    publisher.gate.clear()
    producer = RawProducer(publisher, "test", pending_bytes_max=100)
    first = asyncio.create_task(producer.send([record(0, 90)]))
    second = asyncio.create_task(producer.send([record(1, 90)]))
    for _ in range(20):
        await asyncio.sleep(0)
    assert publisher.calls == [1]
    publisher.gate.set()
    await asyncio.gather(first, second)
    assert publisher.calls == [1, 1]
    # one that is larger than the whole bound still goes, alone
    await producer.send([record(2, 500)])
    assert len(publisher.sends) == 3


async def test_a_cancelled_sender_gives_its_room_back():
    publisher = MemoryPublisher()
    publisher.gate.clear()
    producer = RawProducer(publisher, "test", pending_bytes_max=100)
    first = asyncio.create_task(producer.send([record(0, 90)]))
    while not publisher.calls:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    publisher.gate.set()
    await producer.send([record(1, 90)])
    await producer.close()
    assert first.cancelled()
    assert [s.key for s in publisher.sends] == [b"0", b"1"]


def test_a_message_that_no_record_can_hold_is_refused_before_kafka_sees_it():
    with pytest.raises(Reject) as caught:
        message_send("d", "x" * 900, Limits(1_000, 1_000), "test", "T", NOW_US)
    assert caught.value.code is ReasonCode.ENVELOPE_TOO_LARGE


def test_a_senders_own_time_does_not_pass_for_ours():
    envelope = {"device": "d", "payload": 1, "received_at": NOW_US - 5}
    stamped = envelope_send(envelope, LIMITS, "http", "HTTP", NOW_US)
    assert stamped.value == (
        b'{"device":"d","received_at":1700000000000000,"connector":"http","mode":"HTTP",'
        b'"meta":{"time":1699999999999995},"payload":1}'
    )
    kept = envelope_send(envelope, LIMITS, "files", "FILE", NOW_US, keep_received_at=True)
    assert kept.value == (
        b'{"device":"d","received_at":1699999999999995,"connector":"files","mode":"FILE","payload":1}'
    )


def test_what_a_connector_cannot_pass_on_becomes_an_error_record_that_fits():
    refusal = Reject(ReasonCode.ENVELOPE_TOO_LARGE, "too large")
    send = refused_send("mqtt", refusal, LIMITS, raw=b"y" * 5_000, device=None, source="a/b", index=3, now_us=NOW_US)
    assert send.topic is topics.ERRORS
    assert len(send.value or b"") < LIMITS.record_bytes_max
    assert b'"topic":"mqtt:a/b","partition":-1,"offset":-1,"index":3' in (send.value or b"")


def test_waits_double_with_jitter_up_to_the_limit():
    backoff = Backoff(1.0, 8.0, random.Random(1))
    waits = [backoff.next_s() for _ in range(6)]
    for wait, step in zip(waits, [1, 2, 4, 8, 8, 8], strict=True):
        assert step / 2 <= wait <= step
    backoff.reset()
    assert backoff.next_s() <= 1.0
