"""Devices that number their readings.

Some are steady. The others send in a short burst around the healing of a cut and are silent before and after, so that
nothing that they send later covers up what went wrong with their state.

What was sent is read from the raw topic afterwards, not from here: a send whose acknowledgement was lost may or may not be there.
"""

import asyncio
import random
import time
from typing import Any, Final

import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from preservarium import topics
from preservarium.streaming.records import raw_line

TICK_S: Final = 0.05
COLD: Final = 20.0
HOT: Final = 50.0
THRESHOLD: Final = 40.0
#: A device is hot for so many readings, once in so many.
HOT_READINGS: Final = 6
#: A silence longer than this raises an alarm.
SILENT_S: Final = 15
#: Bursts: readings of each device, apart by so much.
BURST_READINGS: Final = 8
BURST_STEP_S: Final = 0.2
#: Devices of one burst: some for each partition.
BURST_DEVICES: Final = 20
#: Recipients, each for a share of the devices: a recipient is told of 300 alarms at once one by one, and of more by their number
#: (domain/notices.py), and here every transition is looked for. So the group stage has work in every partition, too.
RECIPIENTS: Final = 24
#: Devices that burst, all in all: so many that none comes again soon, for what is chattering is told less.
BURSTING: Final = 800


def steady(number: int) -> str:
    """Address of a steady device."""
    return f"steady-{number:03d}"


def bursting(number: int) -> str:
    """Address of a device that sends in bursts."""
    return f"burst-{number:04d}"


def new(number: int) -> str:
    """Address of a device that is registered during the run."""
    return f"new-{number:04d}"


def registry(devices: int, bursting_devices: int = BURSTING) -> dict[str, Any]:
    """What is registered before the run: so many steady devices, and those that burst."""
    addresses = [steady(n) for n in range(devices)] + [bursting(n) for n in range(bursting_devices)]
    return {
        "manufacturers": [{"name": "soak"}],
        "datatypes": [
            {"name": "temperature", "kind": "number", "unit": "°C", "fail_span": {"min": -60, "max": 150}},
            {"name": "number", "kind": "number", "unit": "", "fail_span": {"min": 0, "max": 1e12}},
        ],
        "parsers": [
            {
                "name": "numbered", "version": 1, "kind": "json", "status": "active",
                "source": {"fields": [{"name": "temperature", "path": "t", "unit": "°C"}, {"name": "number", "path": "n"}]},
            }
        ],
        "recipients": [
            {
                "name": f"operators-{n}", "channel": "mail", "address": f"operators-{n}@example.org", "group_by": ["alarm"],
                "group_wait_s": 0, "group_interval_s": 1, "limit": {"notices": 1_000, "window_s": 60},
            }
            for n in range(RECIPIENTS)
        ],
        "rules": [
            {
                "name": "hot", "component_type": "temperature", "kind": "high", "severity": "major",
                "threshold": THRESHOLD, "deadband": 2, "parameters": {"acknowledge": "auto"},
                "commands": [{"on": "raised", "command": "cool"}],
            },
            {
                "name": "silent", "component_type": "temperature", "kind": "no_data", "severity": "minor",
                "no_data_s": SILENT_S, "parameters": {"acknowledge": "auto"},
            },
        ],
        "device_types": [
            {
                "name": "numbered", "manufacturer": "soak", "parser": "numbered", "rules": ["hot", "silent"],
                "downlink": {"format": "http", "commands": {"cool": {"payload": {"fan": 1}}}},
            }
        ],
        "devices": [device(address) for address in addresses],
    }  # fmt: skip


def device(address: str, name: str = "") -> dict[str, Any]:
    """A device in the registry."""
    recipients = [f"operators-{hash_of(address) % RECIPIENTS}"]
    return {
        "device_id": address, "type": "numbered", "enabled": True, "mode": "HTTP", "name": name or address,
        "rules": {"hot": {"recipients": recipients}},
    }  # fmt: skip


class Fleet:
    """Sends for all devices, in the order of its own clock for each.

    Args:
        bootstrap_servers: of Kafka, without a proxy: what a producer suffers is not what is looked at.
        prefix: of the topics.
        devices: the steady ones.
        rate: readings of the steady devices a second.
        seed: of what is drawn.

    Attributes:
        sent: messages given to the producer.
        refused: messages that the producer gave up.
    """

    def __init__(self, bootstrap_servers: str, prefix: str, devices: int, rate: float, seed: int) -> None:
        self.devices = devices
        self.rate = rate
        self.sent = self.refused = 0
        self.acknowledged = bytearray()  #: one for each number that Kafka acknowledged
        self._bootstrap_servers = bootstrap_servers
        self._topic = topics.RAW.full(prefix)
        self._draw = random.Random(f"{seed} fleet")
        self._producer: AIOKafkaProducer | None = None
        self._last_us: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._bursts = 0
        self._registered = 0
        self._locks: dict[str, asyncio.Lock] = {}

    async def start(self) -> None:
        """Connect."""
        # Patient, and idempotent: what is not acknowledged is sent again until it is, in the order in which it was sent.
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self._bootstrap_servers, linger_ms=5, enable_idempotence=True, request_timeout_ms=300_000
        )
        await self._producer.start()

    async def stop(self) -> None:
        """Wait for every acknowledgement."""
        if self._producer is not None:
            await self._producer.stop()

    async def settle(self) -> None:
        """Wait until Kafka has answered for everything."""
        assert self._producer is not None
        await self._producer.flush()

    async def run(self, stop: asyncio.Event) -> None:
        """Steady devices, until told to stop."""
        began = time.monotonic()
        done = 0
        while not stop.is_set():
            due = int((time.monotonic() - began) * self.rate)
            # After a while in which Kafka took nothing, the devices do not send what they would have sent.
            done = max(done, due - int(self.rate))
            while done < due:
                await self.send(steady(done % self.devices))
                done += 1
            await asyncio.sleep(TICK_S)

    async def burst(self, heals_in_s: float) -> None:
        """Devices that were silent send around an instant, and are silent again.

        Every third one of them stops just before, every third one begins just after.
        """
        half_s = BURST_READINGS * BURST_STEP_S / 2
        await asyncio.sleep(max(0.0, heals_in_s - half_s))
        first, self._bursts = self._bursts, self._bursts + BURST_DEVICES
        chosen = [bursting((first + n) % BURSTING) for n in range(BURST_DEVICES)]
        for step in range(BURST_READINGS):
            for n, address in enumerate(chosen):
                before = step < BURST_READINGS // 2
                if n % 3 == 0 or (n % 3 == 1) == before:
                    # Cold, hot, cold, whichever part of it the device sends.
                    hot = 3 <= step <= 4 if n % 3 == 0 else step % (BURST_READINGS // 2) in (1, 2)
                    await self.send(address, HOT if hot else COLD)
            await asyncio.sleep(BURST_STEP_S * self._draw.uniform(0.5, 1.5))

    def next_new(self) -> str:
        """Address of the next device to be registered."""
        self._registered += 1
        return new(self._registered)

    async def send(self, address: str, temperature: float | None = None) -> None:
        """One message with the next number, at the device's next instant."""
        assert self._producer is not None
        async with self._locks.setdefault(address, asyncio.Lock()):
            count = self._counts[address] = self._counts.get(address, -1) + 1
            if temperature is None:
                # About one excursion a minute and device, spread.
                each = max(3 * HOT_READINGS, round(60 * self.rate / self.devices))
                phase = hash_of(address) % each
                temperature = HOT if (count + phase) % each < HOT_READINGS else COLD
            at_us = self._last_us[address] = max(time.time_ns() // 1000, self._last_us.get(address, 0) + 1)
            number, self.sent = self.sent, self.sent + 1
            self.acknowledged.append(0)
            line = raw_line(
                address, {"t": temperature, "n": number}, received_at=at_us, connector="soak", mode="HTTP"
            )  # fmt: skip
            future = await self._producer.send(self._topic, line, key=address.encode())
        future.add_done_callback(lambda done: self._told(number, done))

    def _told(self, number: int, future: "asyncio.Future[Any]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.acknowledged[number] = 1
        else:
            self.refused += 1

    async def poison(self, value: bytes | None, key: bytes | None, headers: list[tuple[str, bytes]]) -> tuple[int, int]:
        """A record of any bytes; its partition and offset."""
        assert self._producer is not None
        while True:
            try:
                metadata = await self._producer.send_and_wait(self._topic, value, key=key, headers=headers)
                return metadata.partition, metadata.offset
            except KafkaError:
                await asyncio.sleep(0.5)


def hash_of(address: str) -> int:
    """A number of an address, the same in every process."""
    return sum(ord(letter) * (n + 1) for n, letter in enumerate(address))


def parse(value: bytes) -> tuple[str, int, int, float] | None:
    """(address, instant, number, temperature) of a raw record of ours; None: a poison."""
    try:
        line = orjson.loads(value)
        if line["connector"] != "soak":
            return None
        return line["device"], line["received_at"], line["payload"]["n"], line["payload"]["t"]
    except (ValueError, KeyError, TypeError):
        return None
