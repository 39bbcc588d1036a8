"""The broker is killed and comes back: the alarm list says that it may be old, and then is right again, also about what left it."""

import asyncio

import orjson
import pytest
from worker_support import make_topics, until

from preservarium import topics
from preservarium.console.follower import BoardFollower
from preservarium.embedded.kafka import Kafka
from preservarium.errors import Retry
from preservarium.operations.alarm_board import Board
from preservarium.settings import LiveSettings, load
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

PARTITIONS = 3
DEVICES = [f"dev-{n}" for n in range(20)]


def standing(device: str, state: str | None = "unacknowledged") -> Send:
    key = orjson.dumps([device, "hot", "-1"])
    alarm = {"device_id": device, "rule": "hot", "pin_position": "-1", "state": state, "severity": "major", "alarm_id": device,
             "transition": "raised", "detected_at": 1, "occurred_at": 1}  # fmt: skip
    return Send(
        topics.ALARM_STANDING, key, None if state is None else orjson.dumps(alarm), partition=len(device) % PARTITIONS
    )


def answer(action_id: str) -> Send:
    return Send(topics.ALARM_ANSWERS, b"dev-1", orjson.dumps({"action_id": action_id, "outcome": "done"}))


@pytest.mark.kafka
@pytest.mark.timeout(240)
async def test_the_list_says_that_it_may_be_old_and_heals(own_kafka: Kafka, topic_prefix: str) -> None:
    kafka = {"bootstrap_servers": own_kafka.bootstrap_servers, "topic_prefix": topic_prefix, "partitions": PARTITIONS}
    live = LiveSettings(load(kafka=kafka))
    await make_topics(
        own_kafka.bootstrap_servers, topic_prefix, PARTITIONS, [topics.ALARM_STANDING, topics.ALARM_ANSWERS]
    )
    publisher = Publisher(live)
    board = Board()
    follower = BoardFollower(board, live)

    async def send(*sends: Send) -> None:
        async with asyncio.timeout(90):
            while True:
                try:
                    return await publisher.publish(sends)
                except Retry:
                    await asyncio.sleep(0.2)

    try:
        await send(*(standing(device) for device in DEVICES), answer("before"))
        await follower.start()
        await until(lambda: board.complete and len(board.alarms()) == len(DEVICES), 40, board.note)
        assert board.answered("before") is not None
        await asyncio.to_thread(own_kafka.kill)
        await until(lambda: not board.complete, 60)
        assert "may be old" in (board.note() or "")
        assert len(board.alarms()) == len(DEVICES), "what was known stays"
        await asyncio.to_thread(own_kafka.start)
        await send(standing(DEVICES[0], None), standing(DEVICES[1], "acknowledged"), answer("after"))
        await until(lambda: board.complete and board.answered("after") is not None, 90, board.note)
        await until(lambda: board.get((DEVICES[0], "hot", "-1")) is None, 20)
        left = board.get((DEVICES[1], "hot", "-1"))
        assert left is not None
        assert left["state"] == "acknowledged"
        assert len(board.alarms()) == len(DEVICES) - 1
    finally:
        await follower.stop()
        await publisher.on_stop()
