"""MQTT in, with a real Mosquitto and a real Kafka: a PUBACK only after Kafka's, and nothing lost."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import aiomqtt
import orjson
import pytest
from aiokafka import AIOKafkaConsumer
from pydantic import SecretStr

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.connectors.base import Backoff
from preservarium.connectors.mqtt import MqttConnector
from preservarium.errors import Retry
from preservarium.settings import Kafka, LiveSettings, Mqtt, Settings
from preservarium.streaming import topics_admin
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

PARTITIONS = 3


class Faulty:
    """The real publisher, with faults put in front of it: `before` records are not sent, `after` are, and said not to be."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.before = 0
        self.after = 0
        self.open = asyncio.Event()
        self.open.set()
        self.calls = 0

    async def publish(self, sends: Sequence[Send]) -> Any:
        self.calls += 1
        await self.open.wait()
        if self.before:
            self.before -= 1
            raise Retry("put in: not sent")
        result = await self._publisher.publish(sends)
        if self.after:
            self.after -= 1
            raise Retry("put in: sent, and not acknowledged")
        return result


class Site:
    """A connector between a broker and a Kafka of this test's own."""

    def __init__(self, live: LiveSettings, publisher: Publisher, url: str, root: str) -> None:
        self.live = live
        self.root = root  #: first level of this test's MQTT topics
        self._publisher = publisher
        self.faulty = Faulty(publisher)
        self.url = urlsplit(url)
        self._task: asyncio.Task[None] | None = None
        self.connector: MqttConnector | None = None

    async def start(self) -> MqttConnector:
        self.faulty = Faulty(self._publisher)  # what a killed one still had in hand is never sent
        self.connector = MqttConnector(self.faulty, self.live, SystemClock(), backoff=Backoff(0.05, 0.2))
        self._task = asyncio.create_task(self.connector.run())
        await self.until(lambda: self.connector is not None and self.connector.connected.is_set())
        return self.connector

    async def stop(self) -> None:
        assert self.connector is not None
        assert self._task is not None
        self.connector.stop()
        async with asyncio.timeout(10):
            await self._task

    async def kill(self) -> None:
        """End without a goodbye to anyone, as a killed process does."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    def device(self) -> aiomqtt.Client:
        return aiomqtt.Client(self.url.hostname or "", self.url.port or 1883, identifier=f"dev-{uuid.uuid4().hex[:8]}")

    async def until(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                if self._task is not None and self._task.done():
                    self._task.result()
                await asyncio.sleep(0.01)

    async def read(self, topic: topics.Topic, enough: Callable[[list[Any]], bool]) -> list[tuple[bytes | None, Any]]:
        kafka = self.live().kafka
        consumer = AIOKafkaConsumer(
            topic.full(kafka.topic_prefix), bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest"
        )
        await consumer.start()
        found: list[tuple[bytes | None, Any]] = []
        try:
            async with asyncio.timeout(15):
                while not enough(found):
                    for records in (await consumer.getmany(timeout_ms=200)).values():
                        found += [(r.key, orjson.loads(line)) for r in records for line in r.value.split(b"\n")]
        finally:
            await consumer.stop()
        return found


@pytest.fixture
async def site(kafka: str, mosquitto: str, topic_prefix: str) -> AsyncIterator[Site]:
    unique = topic_prefix.strip(".")
    settings = Settings(
        kafka=Kafka(bootstrap_servers=kafka, topic_prefix=topic_prefix, partitions=PARTITIONS, group=unique),
        mqtt=Mqtt(
            url=SecretStr(mosquitto),
            client_id=f"connector-{unique}",
            subscriptions=f"{unique}/devices/{{device}}/up, $share/g/{unique}/net/+/up, {unique}/{{mode}}/{{device}}/p/{{port}}, {unique}/zigbee2mqtt/#",
        ),
    )
    await topics_admin.create(settings)
    live = LiveSettings(settings)
    publisher = Publisher(live)
    await publisher.start()
    site = Site(live, publisher, mosquitto, unique)
    try:
        yield site
    finally:
        with contextlib.suppress(Exception):
            await site.stop()
        await publisher.stop()


def devices(found: list[tuple[bytes | None, Any]]) -> set[str]:
    return {line["device"] for _, line in found}


async def test_topics_name_device_mode_and_port_and_uplinks_name_themselves(site: Site) -> None:
    await site.start()
    async with site.device() as device:
        await device.publish(f"{site.root}/devices/d1/up", b'{"t":21.5}', qos=1)
        await device.publish(f"{site.root}/devices/d2/up", b"\x01\x02", qos=0)
        await device.publish(f"{site.root}/LAB/d3/p/7", b"[1]", qos=1)
        uplink = {"deviceInfo": {"devEui": "0101010101010101"}, "fPort": 3, "data": "AQI="}
        await device.publish(f"{site.root}/net/x/up", orjson.dumps(uplink), qos=1)
        await device.publish(
            f"{site.root}/net/x/up", b'[{"device":"d4","payload":1},{"device":"d5","payload_b64":"AQ=="}]', qos=1
        )
        # Topics of a platform: a name with a slash, and what says nothing of a device.
        await device.publish(f"{site.root}/zigbee2mqtt/bridge/state", b'{"state":"online"}', qos=1)
        await device.publish(f"{site.root}/zigbee2mqtt/kitchen/lamp/availability", b"offline", qos=1)
        await device.publish(f"{site.root}/zigbee2mqtt/kitchen/climate", b'{"temperature":21.4}', qos=1)
    found = await site.read(topics.RAW, lambda f: len(f) >= 8)
    lines = {line["device"]: line for _, line in found}
    assert {d: (x["mode"], x.get("port"), x.get("payload", x.get("payload_b64"))) for d, x in lines.items()} == {
        "d1": ("MQTT", None, {"t": 21.5}),
        "d2": ("MQTT", None, "AQI="),
        "d3": ("LAB", 7, [1]),
        "0101010101010101": ("LoRaWAN", 3, "AQI="),
        "d4": ("MQTT", None, 1),
        "d5": ("MQTT", None, "AQ=="),
        "kitchen/lamp": ("MQTT", None, {"online": False}),
        "kitchen/climate": ("MQTT", None, {"temperature": 21.4}),
    }
    assert lines["d1"]["topic"] == f"{site.root}/devices/d1/up"
    assert all(key == line["device"].encode() for key, line in found)


async def test_what_cannot_be_passed_on_is_acknowledged_and_stands_in_iot_errors(site: Site) -> None:
    connector = await site.start()
    async with site.device() as device:
        await device.publish(f"{site.root}/net/x/up", b'{"t":1}', qos=1)
        await device.publish(f"{site.root}/LAB/d3/p/x", b"{}", qos=1)
        await device.publish(f"{site.root}/devices/big/up", b"\x00" * 300_000, qos=1)
        await device.publish(f"{site.root}/devices/d1/up", b"{}", qos=1)
    await site.read(topics.RAW, lambda f: devices(f) == {"d1"})
    errors = [line for _, line in await site.read(topics.ERRORS, lambda f: len(f) >= 3)]
    assert sorted((e["code"], e["topic"].removeprefix(f"mqtt:{site.root}/")) for e in errors) == [
        ("envelope_invalid", "LAB/d3/p/x"),
        ("envelope_no_device", "net/x/up"),
        ("envelope_too_large", "devices/big/up"),
    ]
    assert connector.reconnects == 0


async def test_no_puback_before_kafka_and_redelivery_after_a_reconnect(site: Site) -> None:
    """Kafka does not take it: the broker still holds it, also for the next process; nothing is lost."""
    await site.start()
    site.faulty.open.clear()
    async with site.device() as device:
        for i in range(40):  # twice what Mosquitto has under way at once
            await device.publish(f"{site.root}/devices/d{i}/up", b"{}", qos=1)
    await site.until(lambda: site.faulty.calls > 0)
    await site.kill()  # nothing was acknowledged by Kafka, so nothing may be by us
    connector = await site.start()
    found = await site.read(topics.RAW, lambda f: len(devices(f)) == 40)
    assert len(found) == 40
    await site.until(lambda: connector.taken == 40)


async def test_kafka_failing_now_and_then_loses_nothing_in_order_of_each_device(site: Site) -> None:
    connector = await site.start()

    async with site.device() as device:
        for fault in ("", "before", "after", "", "after", "before"):
            if fault:
                setattr(site.faulty, fault, 1)
            first, taken = connector.taken, connector.taken + 50
            for i in range(first, taken):
                await device.publish(f"{site.root}/devices/d{i % 5}/up", orjson.dumps({"i": i}), qos=1)
            await site.until(lambda taken=taken: connector.taken >= taken)  # type: ignore[misc]
    found = await site.read(topics.RAW, lambda f: len({line["payload"]["i"] for _, line in f}) == 300)
    assert connector.reconnects == 4
    assert len(found) > 300  # what Kafka took without our being told came twice
    first_seen: dict[str, list[int]] = {}
    for _, line in found:
        seen = first_seen.setdefault(line["device"], [])
        if line["payload"]["i"] not in seen:
            seen.append(line["payload"]["i"])
    assert all(seen == sorted(seen) for seen in first_seen.values())


async def test_messages_published_while_the_connector_is_away_wait_for_it(site: Site) -> None:
    await site.start()
    await site.stop()
    async with site.device() as device:
        for i in range(10):
            await device.publish(f"{site.root}/devices/d{i}/up", b"{}", qos=1)
    await site.start()
    found = await site.read(topics.RAW, lambda f: len(devices(f)) == 10)
    assert len(found) == 10


async def test_a_full_inbox_stops_reading_and_a_retained_message_is_left_out(site: Site) -> None:
    async with site.device() as device:
        await device.publish(f"{site.root}/devices/old/up", b'{"t":0}', qos=1, retain=True)
    settings = site.live()
    small = settings.model_copy(update={"mqtt": settings.mqtt.model_copy(update={"inflight_max": 5})})
    site.live = LiveSettings(small)
    connector = await site.start()
    site.faulty.open.clear()
    async with site.device() as device:
        for i in range(200):  # QoS 0: only the socket can hold the sender back
            await device.publish(f"{site.root}/devices/q{i}/up", b"{}", qos=0)
        await device.publish(f"{site.root}/devices/last/up", b"{}", qos=1)
    await site.until(lambda: site.faulty.calls > 0)
    site.faulty.before = 1
    site.faulty.open.set()
    found = await site.read(topics.RAW, lambda f: "last" in devices(f))
    assert "old" not in devices(found)
    assert connector.reconnects == 1
    async with site.device() as device:
        await device.publish(f"{site.root}/devices/old/up", b"", qos=1, retain=True)


async def test_a_broker_that_is_away_is_waited_for(site: Site, mosquitto_service: Any) -> None:
    connector = await site.start()
    mosquitto_service.stop()
    await site.until(lambda: not connector.connected.is_set())
    mosquitto_service.start()
    await site.until(connector.connected.is_set)
    async with site.device() as device:
        await device.publish(f"{site.root}/devices/d1/up", b"{}", qos=1)
    await site.read(topics.RAW, lambda f: devices(f) == {"d1"})
