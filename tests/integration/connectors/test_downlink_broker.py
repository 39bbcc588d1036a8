"""Downlinks to a real Mosquitto: acknowledged, with the broker gone, and back."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiomqtt
import pytest
from pydantic import SecretStr

from preservarium.clock import SystemClock
from preservarium.connectors.commands import Broker
from preservarium.embedded.mosquitto import Mosquitto
from preservarium.settings import Breaker, Commands, LiveSettings, Mqtt, Settings


def settings(url: str, **fields: Any) -> LiveSettings:
    return LiveSettings(
        Settings(
            mqtt=Mqtt(url=SecretStr(url)),
            commands=Commands(puback_timeout_s=2.0, **fields),
            breaker=Breaker(open_s=0.05, open_max_s=0.1),
        )
    )


async def until_taken(broker: Broker, messages: list[tuple[str, bytes, int]], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while messages:
            acknowledged, _ = await broker.publish(messages)
            messages = [m for m, done in zip(messages, acknowledged, strict=True) if not done]
            await asyncio.sleep(0.02)


@pytest.fixture
async def listener(mosquitto: str) -> AsyncIterator[tuple[str, aiomqtt.Client]]:
    url, root = urlsplit(mosquitto), f"t{uuid.uuid4().hex[:8]}"
    async with aiomqtt.Client(url.hostname or "", url.port or 1883) as client:
        await client.subscribe(f"{root}/#", qos=1)
        yield root, client


async def test_every_downlink_is_acknowledged_and_arrives(mosquitto: str, listener: Any) -> None:
    root, client = listener
    broker = Broker(settings(mosquitto, flights=5), SystemClock())
    messages = [(f"{root}/{n}/down", b"%d" % n, n % 2) for n in range(100)]
    try:
        acknowledged, trouble = await broker.publish(messages)
        assert (all(acknowledged), trouble) == (True, "")
        got: dict[str, bytes] = {}
        async with asyncio.timeout(10):
            async for message in client.messages:
                got[str(message.topic)] = bytes(message.payload)
                if len(got) == 100:
                    break
        assert got == {topic: payload for topic, payload, _ in messages}
    finally:
        await broker.close()


async def test_a_broker_that_is_not_there_is_no_error() -> None:
    broker = Broker(settings("mqtt://127.0.0.1:1"), SystemClock())
    acknowledged, trouble = await broker.publish([("a", b"", 1)])
    assert acknowledged == [False]
    assert "does not take downlinks" in trouble
    await broker.close()


async def test_a_broker_that_was_killed_takes_downlinks_when_it_is_back(tmp_path: Any) -> None:
    service = Mosquitto(tmp_path)
    service.start()
    broker = Broker(settings(service.url), SystemClock())
    try:
        await until_taken(broker, [("a/down", b"1", 1)])
        service.kill()
        acknowledged, trouble = await broker.publish([("a/down", b"2", 1)])
        assert acknowledged == [False]
        assert trouble
        service.start()
        await until_taken(broker, [("a/down", b"2", 1), ("a/down", b"3", 1)])
    finally:
        await broker.close()
        service.stop()
