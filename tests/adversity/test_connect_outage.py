"""Kafka goes away under a connector: senders are held back, and nothing that was taken is lost."""

import asyncio
import contextlib
import json
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import aiomqtt
import orjson
import pytest
from aiohttp import web
from aiokafka import AIOKafkaConsumer
from pydantic import SecretStr

from preservarium.clock import SystemClock
from preservarium.connectors.base import Backoff
from preservarium.connectors.http import routes
from preservarium.connectors.mqtt import MqttConnector
from preservarium.settings import Kafka, LiveSettings, Mqtt, Settings
from preservarium.streaming import topics_admin
from preservarium.streaming.publish import Publisher


async def read_devices(settings: Settings, wanted: set[str]) -> set[str]:
    consumer = AIOKafkaConsumer(
        f"{settings.kafka.topic_prefix}iot_raw_data",
        bootstrap_servers=settings.kafka.bootstrap_servers,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    found: set[str] = set()
    try:
        async with asyncio.timeout(60):
            while not wanted <= found:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found |= {orjson.loads(line)["device"] for r in records for line in r.value.split(b"\n")}
    finally:
        await consumer.stop()
    return found


@pytest.fixture
async def live(kafka: str, mosquitto: str, topic_prefix: str) -> LiveSettings:
    root = topic_prefix.strip(".")
    settings = Settings(
        # A short session makes an acknowledgement time out after 3 s, so that the outage is noticed in its course.
        kafka=Kafka(bootstrap_servers=kafka, topic_prefix=topic_prefix, partitions=3, session_timeout_s=4.0),
        mqtt=Mqtt(url=SecretStr(mosquitto), client_id=root, subscriptions=f"{root}/{{device}}/up"),
    )
    await topics_admin.create(settings)
    return LiveSettings(settings)


@pytest.mark.timeout(180)
async def test_kafka_stops_and_comes_back_under_mqtt_and_http(live: LiveSettings, kafka_service: Any) -> None:
    settings = live()
    publisher = Publisher(live)
    await publisher.start()
    connector = MqttConnector(publisher, live, SystemClock(), backoff=Backoff(0.2, 1.0))
    serving = asyncio.create_task(connector.run())
    app = web.Application()
    app.add_routes(routes(publisher, live, SystemClock()))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}/ingest"
    await asyncio.wait_for(connector.connected.wait(), 15)
    taken: set[str] = set()
    statuses: list[int] = []
    over = asyncio.Event()

    async def mqtt_devices() -> None:
        url = urlsplit(settings.mqtt.url.get_secret_value())
        async with aiomqtt.Client(url.hostname or "", url.port or 1883) as device:
            i = 0
            while not over.is_set():
                await device.publish(
                    f"{settings.mqtt.client_id}/m{i}/up", b"{}", qos=1
                )  # returns when Mosquitto has it
                taken.add(f"m{i}")
                i += 1
                await asyncio.sleep(0.05)

    async def http_sender() -> None:
        async with aiohttp.ClientSession() as session:
            i = 0
            while not over.is_set():
                async with session.post(address, data=json.dumps({"device": f"h{i}", "payload": 1})) as answer:
                    statuses.append(answer.status)
                    if answer.status == 202:
                        taken.add(f"h{i}")
                        i += 1
                await asyncio.sleep(0.05)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(mqtt_devices())
            group.create_task(http_sender())
            await asyncio.sleep(1)
            await asyncio.to_thread(kafka_service.stop)
            try:
                async with asyncio.timeout(60):
                    while 503 not in statuses or not connector.reconnects:
                        await asyncio.sleep(0.05)
            finally:
                await asyncio.to_thread(kafka_service.start)
            before = connector.taken
            async with asyncio.timeout(60):
                while statuses[-1] != 202 or connector.taken <= before:
                    await asyncio.sleep(0.05)
            over.set()
        assert taken <= await read_devices(settings, taken)
        assert {202, 503} == set(statuses)
    finally:
        over.set()
        connector.stop()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait_for(serving, 20)
        await runner.cleanup()
        await publisher.stop()
