"""Commands from request to answer: a worker, Kafka, Mosquitto and devices that answer, or do not."""

import asyncio
import os
import random
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import aiomqtt
import orjson
import pytest
from worker_support import ROOT, Workers, make_topics, read_all, until

from preservarium import topics
from preservarium.clock import SystemClock
from preservarium.domain.commands.device import command_id
from preservarium.domain.commands.machine import OVER
from preservarium.embedded.mosquitto import Mosquitto
from preservarium.embedded.service import free_port
from preservarium.settings import LiveSettings, load
from preservarium.streaming.publish import Publisher
from preservarium.streaming.stage import Send

PARTITIONS = 2
CODEC = """
function decodeUplink(input) { return {data: {relay: input.bytes[0]}}; }
function encodeDownlink(input) {
  if (input.data.relay !== 0 && input.data.relay !== 1) return {errors: ['relay is 0 or 1']};
  return {bytes: [input.data.relay], fPort: 2};
}
"""
CONFIRM = {"component_type": "relay", "field": "relay"}


class Devices:
    """Every device of the test, on one connection: remembers what it is sent, and answers as it is told."""

    def __init__(self, url: str, root: str) -> None:
        self._url = urlsplit(url)
        self._root = root
        self.got: list[tuple[str, bytes]] = []
        self.answers = True
        self.client: aiomqtt.Client | None = None
        self._task: asyncio.Task[None] | None = None

    async def _run(self) -> None:
        while True:
            try:
                async with aiomqtt.Client(
                    self._url.hostname or "",
                    self._url.port or 1883,
                    identifier=f"devices-{self._root}",
                    clean_session=False,
                ) as client:
                    await client.subscribe(f"{self._root}/+/down", qos=1)
                    self.client = client
                    async for message in client.messages:
                        device = str(message.topic).split("/")[1]
                        self.got.append((device, bytes(message.payload)))
                        if self.answers:
                            await self.say(device, bytes(message.payload))
            except aiomqtt.MqttError:
                self.client = None
                await asyncio.sleep(0.1)

    async def __aenter__(self) -> "Devices":
        self._task = asyncio.create_task(self._run())
        await until(lambda: self.client is not None, 20, lambda: "no broker")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def say(self, device: str, payload: bytes) -> None:
        assert self.client is not None
        await self.client.publish(f"{self._root}/{device}/up", payload, qos=1)


class Site:
    """Workers without a database: the registry is what this test puts into its topics."""

    def __init__(self, kafka: str, url: str, directory: Path) -> None:
        name = f"c{uuid.uuid4().hex[:8]}"
        self.kafka, self.root, self.prefix = kafka, name, f"{name}."
        self.environment = {
            "PRESERVARIUM_ENV_FILE": "/dev/null",
            "PRESERVARIUM_KAFKA__BOOTSTRAP_SERVERS": kafka,
            "PRESERVARIUM_KAFKA__TOPIC_PREFIX": self.prefix,
            "PRESERVARIUM_KAFKA__GROUP": name,
            "PRESERVARIUM_KAFKA__PARTITIONS": str(PARTITIONS),
            "PRESERVARIUM_KAFKA__SESSION_TIMEOUT_S": "6",
            "PRESERVARIUM_AGENTS__ENABLED": "registry,normalize,validate,alarm,commands,downlink",
            "PRESERVARIUM_POSTGRES__URL": "postgresql://nobody@127.0.0.1:1/none",
            "PRESERVARIUM_MQTT__ENABLED": "true",
            "PRESERVARIUM_MQTT__URL": url,
            "PRESERVARIUM_MQTT__CLIENT_ID": name,
            "PRESERVARIUM_MQTT__SUBSCRIPTIONS": f"{name}/{{device}}/up",
            "PRESERVARIUM_COMMANDS__TOPIC": f"{name}/{{device}}/down",
            "PRESERVARIUM_BREAKER__OPEN_S": "0.2",
            "PRESERVARIUM_BREAKER__OPEN_MAX_S": "0.5",
            "PRESERVARIUM_DATA_DIR": str(directory / "data"),
        }
        self.live = LiveSettings(
            load(kafka={"bootstrap_servers": kafka, "topic_prefix": self.prefix, "partitions": PARTITIONS})
        )
        self.workers = Workers(ROOT / "preservarium", self.environment, directory)
        self.publisher = Publisher(self.live)
        self.devices = Devices(url, name)

    async def make(self, devices: int) -> None:
        await make_topics(self.kafka, self.prefix, PARTITIONS, list(topics.TOPICS))
        await self.publisher.start()
        types: dict[str, Any] = {
            "datatype/relay": {"name": "relay", "kind": "number", "unit": ""},
            "parser/relay": {
                "name": "relay", "version": 1, "kind": "javascript", "status": "active", "source": CODEC, "hash": "h",
            },
            "type/relay": {
                "name": "relay", "manufacturer": "m", "parser": "relay",
                "downlink": {"timeout_s": 60, "commands": {"switch": {"confirm": CONFIRM}}},
            },
            "rule/on": {
                "name": "on", "component_type": "relay", "kind": "high", "severity": "minor", "threshold": 0.5,
                "commands": [{"on": "raised", "device_id": "d5", "command": "switch", "fields": {"relay": 0}}],
            },
            "type/watched": {"name": "watched", "manufacturer": "m", "parser": "relay", "rules": ["on"]},
            "type/sleepy": {
                "name": "sleepy", "manufacturer": "m", "parser": "relay", "downlink": {"lorawan_class": "A", "confirm": CONFIRM},
            },
        }  # fmt: skip
        sends = [
            Send(topics.TYPE_REGISTRY, key.encode(), orjson.dumps({**document, "rev": n}), 0)
            for n, (key, document) in enumerate(types.items(), 1)
        ]
        for name in ["sleepy", "watched", *(f"d{n}" for n in range(devices))]:
            kind = name if name in ("sleepy", "watched") else "relay"
            document = {"device_id": name, "rev": 9, "type": kind, "enabled": True}
            sends.append(Send(topics.DEVICE_REGISTRY, name.encode(), orjson.dumps(document)))
        await self.publisher.publish(sends)

    async def ask(self, device: str, **fields: Any) -> str:
        """Send a request; its command's id."""
        key = uuid.uuid4().hex
        line = {"device_id": device, "idempotency_key": key, "actor": "test", "at": SystemClock().now_us(), **fields}
        await self.publisher.publish([Send(topics.COMMANDS, device.encode(), orjson.dumps(line))])
        return command_id(device, key)

    async def cli(self, *arguments: str) -> tuple[int, Any]:
        """Run `preservarium commands …  --json`: its exit code, and what it said."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "preservarium", "commands", *arguments, "--json",
            env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)}, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, orjson.loads(out)

    async def known(self, devices: list[str]) -> None:
        """Wait until the worker knows these devices: without a database, only the topic tells it of them."""
        missing = set(devices)
        sent = 0

        async def found() -> bool:
            probes = {
                await self.ask(device, command="probe", payload=1, confirm="published"): device for device in missing
            }
            states: dict[str, str] = {}

            async def over() -> bool:
                states.update({e["command_id"]: e["state"] for e in await self.events() if e["state"] in OVER})
                return probes.keys() <= states.keys()

            nonlocal sent
            await until(over, 30, lambda: self.workers.log(-1)[-3000:])
            reached = [device for probe, device in probes.items() if states[probe] == "successful"]
            missing.difference_update(reached)
            sent += len(reached)
            return not missing

        await until(found, 60, lambda: f"unknown: {missing}")
        # The broker acknowledges a message to its sender before it hands it on: a probe may come after it is successful.
        await until(lambda: len(self.devices.got) >= sent, 30, lambda: f"{self.devices.got} of {sent}")
        self.devices.got.clear()

    async def ask_asleep(self, device: str, **fields: Any) -> str:
        """Ask a device that takes nothing yet, again while the worker does not know it; the command that waits."""
        found = ""

        async def waits() -> bool:
            nonlocal found
            found = await self.ask(device, **fields)
            return await self.until_story(found, bool) == ["request"]

        await until(waits, 60, lambda: f"unknown: {device}")
        return found

    async def events(self) -> list[dict[str, Any]]:
        records = await read_all(self.kafka, topics.COMMAND_EVENTS.full(self.prefix), PARTITIONS)
        return [orjson.loads(r.value) for r in records]

    async def story(self, command: str) -> list[str]:
        found: dict[int, str] = {}
        for event in await self.events():
            if event["command_id"] == command:
                found.setdefault(event["sequence"], event["event"])
        return [event for _, event in sorted(found.items())]

    async def until_story(self, command: str, enough: Callable[[list[str]], bool], within_s: float = 120) -> list[str]:
        story: list[str] = []

        async def told() -> bool:
            nonlocal story
            story = await self.story(command)
            return enough(story)

        await until(told, within_s, lambda: f"{story}\n{self.workers.log(-1)[-3000:]}")
        return story


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    service = Mosquitto(tmp_path / "mosquitto")
    service.start()
    yield service
    service.stop()


@pytest.fixture
async def site(kafka: str, broker: Mosquitto, tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(kafka, broker.url, tmp_path)
    await made.make(devices=20)
    try:
        async with made.devices:
            yield made
    finally:
        made.workers.stop()
        await made.publisher.stop()


async def test_commands_reach_devices_and_are_confirmed_by_what_they_say(site: Site, broker: Mosquitto) -> None:
    await site.workers.ready(site.workers.start())
    await site.known(["d0", "d1", "d2", "d3", "d4", "d5"])

    switched = await site.ask("d0", command="switch", fields={"relay": 1})
    story = await site.until_story(switched, lambda s: "confirm" in s)
    # The answer may overtake the downlink stage's report.
    assert [e for e in story if e != "publish"] == ["request", "hand_over", "confirm"]
    assert site.devices.got == [("d0", b"\x01")]

    status, said = await site.cli("send", "d0", "switch", "--field", "relay=0", "--wait", "30")
    assert (status, said["state"], said["events"][-1]["event"]) == (0, "successful", "confirm")
    status, said = await site.cli("send", "d0", "switch", "--field", "relay=9", "--wait", "30")
    assert (status, said["state"], said["events"][-1]["reason"]) == (1, "failed", "the codec reports: relay is 0 or 1")

    wrong = await site.ask("d1", command="switch", fields={"relay": 7})
    assert await site.until_story(wrong, lambda s: "fail" in s) == ["request", "hand_over", "fail"]
    reasons = {e["command_id"]: e["reason"] for e in await site.events() if e["event"] == "fail"}
    assert reasons[wrong] == "the codec reports: relay is 0 or 1"

    asleep = await site.ask_asleep("sleepy", fields={"relay": 0})
    cancelled = await site.ask("sleepy", fields={"relay": 1})
    await site.until_story(cancelled, lambda s: s == ["request"])
    status, said = await site.cli("cancel", "sleepy", cancelled, "--actor", "ann")
    assert (status, said["events"][-1]["actor"]) == (0, "ann")
    assert await site.until_story(cancelled, lambda s: "cancel" in s) == ["request", "cancel"]
    assert await site.story(asleep) == ["request"]
    await site.devices.say("sleepy", b"\x01")
    await site.until_story(asleep, lambda s: "confirm" in s)
    assert site.devices.got[-1] == ("sleepy", b"\x00")

    # An alarm asks another device.
    await site.devices.say("watched", b"\x01")
    await until(lambda: site.devices.got[-1] == ("d5", b"\x00"), 30, lambda: site.workers.log(-1)[-3000:])
    (by_alarm,) = {e["command_id"] for e in await site.events() if e["requested_by"] == "alarm on"}
    await site.until_story(by_alarm, lambda s: "confirm" in s)

    site.devices.answers = False
    silent = await site.ask("d2", command="switch", fields={"relay": 1}, timeout_s=1, tries=2)
    assert await site.until_story(silent, lambda s: "time_out" in s) == [
        "request", "hand_over", "publish", "retry", "hand_over", "publish", "time_out",
    ]  # fmt: skip
    assert site.devices.got[-2:] == [("d2", b"\x01")] * 2
    site.devices.answers = True

    # A broker that is gone: what waits is sent when it is back, what expires meanwhile is not.
    broker.kill()
    brief = await site.ask("d3", command="switch", fields={"relay": 1}, expires_s=2)
    lasting = await site.ask("d4", command="switch", fields={"relay": 1})
    assert await site.until_story(brief, lambda s: "expire" in s) == ["request", "hand_over", "expire"]
    broker.start()
    await site.until_story(lasting, lambda s: "confirm" in s)
    assert [device for device, _ in site.devices.got if device in ("d3", "d4")] == ["d4"]


async def test_workers_that_are_killed_lose_no_command_and_repeat_none(site: Site) -> None:
    """Killed at random points, at random times: each command is sent, in order, and ends once."""
    rng = random.Random(7)
    number = site.workers.start()
    await site.workers.ready(number)
    await site.known([f"d{n}" for n in range(20)])
    asked: dict[str, list[str]] = {}
    for round_ in range(3):
        for n in range(20):
            for value in (0, 1):
                asked.setdefault(f"d{n}", []).append(await site.ask(f"d{n}", command="switch", fields={"relay": value}))
        await asyncio.sleep(rng.uniform(0.05, 0.8))
        site.workers.signal(number, signal.SIGKILL)
        await site.workers.ended(number)
        number = site.workers.start()
        if round_ % 2 == 0:
            await site.workers.ready(number)
    everything = {command for commands in asked.values() for command in commands}
    ended: dict[str, str] = {}

    async def over() -> bool:
        ended.update({e["command_id"]: e["state"] for e in await site.events() if e["state"] in OVER})
        return ended.keys() >= everything

    await until(over, 90, lambda: f"{len(ended)} of {len(everything)} ended\n{site.workers.log(number)[-3000:]}")
    ends = [e for e in await site.events() if e["command_id"] in everything and e["state"] in OVER]
    failed = [(e["device_id"], e["reason"]) for e in ends if e["event"] != "confirm"]
    assert failed == []
    records = await read_all(site.kafka, topics.DOWNLINKS.full(site.prefix), PARTITIONS)
    downlinks = [orjson.loads(r.value) for r in records]
    first_seen: dict[str, str] = {}
    for downlink in downlinks:
        first_seen.setdefault(downlink["downlink_id"], downlink["command_id"])
    for device, commands in asked.items():
        handed = [c for c in first_seen.values() if c in set(commands)]
        assert handed == commands, f"{device}: handed over once each, in the order of their requests"
    # What reached the devices: once each, but for a kill between the broker's acknowledgement and the commit, which may
    # repeat what was under way then: less than a batch for each of three kills.
    counts = Counter(device for device, _ in site.devices.got)
    assert all(counts[device] >= len(commands) for device, commands in asked.items())
    print(
        "REPEATED",
        sum(counts.values()) - len(everything),
        "of",
        len(everything),
        "records",
        len(downlinks),
        "ids",
        len(first_seen),
    )
    assert sum(counts.values()) - len(everything) <= 3 * len(asked)


async def test_a_device_that_fetches_gets_its_commands_in_order_and_says_that_it_has_them(site: Site) -> None:
    """No broker is asked: over HTTP alone, from the request to the word of the device."""
    types = {
        "name": "fetching",
        "manufacturer": "m",
        "parser": "relay",
        "rev": 20,
        "downlink": {"format": "http", "confirm": "delivered"},
    }
    device = {"device_id": "web-1", "rev": 9, "type": "fetching", "enabled": True}
    await site.publisher.publish([
        Send(topics.TYPE_REGISTRY, b"type/fetching", orjson.dumps(types), 0), Send(topics.DEVICE_REGISTRY, b"web-1", orjson.dumps(device)),
    ])  # fmt: skip
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "preservarium", "connect", "http", "--port", str(port),
        env={**os.environ, **site.environment, "PYTHONPATH": str(ROOT), "PRESERVARIUM_HTTP__TOKEN": "s3cret"},
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        await site.workers.ready(site.workers.start())
        first = await site.ask_asleep("web-1", fields={"relay": 1}, confirm="delivered")
        second = await site.ask("web-1", payload_b64="AgM=", confirm="delivered")
        # It sleeps until it asks.
        await site.until_story(second, lambda story: story == ["request"])
        assert await site.story(first) == ["request"]
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer s3cret"}) as http:

            async def fetch(**query: str) -> list[dict[str, Any]]:
                url = f"http://127.0.0.1:{port}/ingest/commands"
                async with http.get(url, params={"device": "web-1", "wait_s": "20", **query}) as response:
                    return (await response.json())["downlinks"] if response.status == 200 else []

            async def answered() -> bool:
                try:
                    got[:] = await fetch()
                except aiohttp.ClientError:
                    return False
                return bool(got)

            got: list[dict[str, Any]] = []
            await until(answered, 120, lambda: site.workers.log(-1)[-3000:])
            assert [(d["command_id"], d["attempt"], d["port"], d["payload_b64"]) for d in got] == [
                (first, 1, 2, "AQ==")
            ]
            # The answer was lost: the same again, and no further one before the device has it.
            assert await fetch() == got
            assert await site.until_story(first, lambda story: "publish" in story) == [
                "request",
                "hand_over",
                "publish",
            ]
            (following,) = await fetch(has=got[0]["id"])
            assert (following["command_id"], following["payload_b64"]) == (second, "AgM=")
            # The word of a device may overtake the downlink stage's report.
            await site.until_story(second, lambda story: "publish" in story)
            assert await fetch(has=following["id"], wait_s="0") == []
            for command in (first, second):
                story = await site.until_story(command, lambda story: "confirm" in story)
                assert story == ["request", "hand_over", "publish", "deliver", "confirm"]
            assert not [device for device, _ in site.devices.got if device == "web-1"]
    finally:
        process.terminate()
        await process.wait()
