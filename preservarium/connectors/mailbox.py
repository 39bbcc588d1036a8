"""The mailbox of devices that fetch: downlinks wait on `device_mailbox` until their device asks over HTTP and has them.

The downlink stage puts them there as it gives others to the MQTT broker. Every process that serves `GET /ingest/commands`
follows the topic in memory, so a device may ask any of them. A downlink stays until its device names it, or a later one,
as the last that it has: an answer that was lost is given again, with the same ids.
"""

import asyncio
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, Final

import orjson
import structlog
from aiokafka import AIOKafkaConsumer
from mode import Service

from preservarium import kafka_clients, topics
from preservarium.domain.commands import OPEN_MAX
from preservarium.domain.errors import Retry
from preservarium.settings import LiveSettings
from preservarium.stage import Send

log = structlog.get_logger(__name__)

#: Devices with something waiting, those that were sent to last: some 20 MiB. A fleet that fetches has less under way.
DEVICES_MAX: Final = 50_000
#: Downlinks of one device that wait: as many as commands may be open.
WAITING_MAX: Final = OPEN_MAX
POLL_MS: Final = 500
REQUEST_TIMEOUT_MS: Final = 30_000
#: A consumer does not say that its brokers are gone, so they are asked this often, and given so long to answer.
PROBE_S: Final = 5.0
PROBE_TIMEOUT_S: Final = 10.0
BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 10.0

Publish = Callable[[Sequence[Send]], Awaitable[Any]]


class MailboxBroker:
    """The downlink stage's way into the mailbox; the topic of a downlink is its device's address."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish

    async def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> tuple[list[bool], str]:
        """Put downlinks there: whether Kafka has acknowledged them, and why not, or ""."""
        try:
            await self._publish([Send(topics.MAILBOX, device.encode(), line) for device, line, _ in messages])
        except Retry as e:
            return [False] * len(messages), str(e)
        return [True] * len(messages), ""


class Mailbox:
    """What waits for each device, in the order in which it was put there; fed line by line."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, dict[str, dict[str, Any]]] = OrderedDict()
        self._asking: dict[str, list[asyncio.Event]] = {}
        #: why what is here may not be everything; "" while it is followed
        self.trouble = "not read yet"

    def take(self, key: bytes | None, value: bytes | None) -> None:
        """Take a line of `device_mailbox`: a downlink, or `{"has": id}`, up to which the device has them."""
        try:
            device, line = (key or b"").decode(), orjson.loads(value or b"")
            has = line.get("has")
            if has is None and not (isinstance(line["id"], str) and type(line["expires_at"]) is int):
                raise ValueError(line)
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            log.warning("mailbox_line_unusable", error=repr(e))
            return
        if has is not None:
            self._had(device, has)
            return
        waiting = self._waiting.setdefault(device, {})
        waiting.setdefault(line["id"], line)
        self._waiting.move_to_end(device)
        while len(waiting) > WAITING_MAX:
            del waiting[next(iter(waiting))]
        while len(self._waiting) > DEVICES_MAX:
            self._waiting.popitem(last=False)
        for event in self._asking.pop(device, ()):
            event.set()

    def _had(self, device: str, identifier: str) -> None:
        waiting = self._waiting.get(device, {})
        if identifier in waiting:
            for each in [*waiting]:
                del waiting[each]
                if each == identifier:
                    break
        if not waiting:
            self._waiting.pop(device, None)

    def waiting(self, device: str, now_us: int) -> list[dict[str, Any]]:
        """Downlinks of a device whose time is not over, in order."""
        found = self._waiting.get(device, {})
        for identifier in [i for i, line in found.items() if line["expires_at"] <= now_us]:
            del found[identifier]
        return [*found.values()]

    def upto(self, device: str, identifier: str) -> list[str]:
        """Ids that a device has when it has this one; none where this one does not wait (any more)."""
        found = [*self._waiting.get(device, {})]
        return found[: found.index(identifier) + 1] if identifier in found else []

    async def wait(self, device: str, timeout_s: float) -> None:
        """Wait until something comes for a device, at most so long."""
        event = asyncio.Event()
        self._asking.setdefault(device, []).append(event)
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            events = self._asking.get(device, [])
            if event in events:
                events.remove(event)
            if not events:
                self._asking.pop(device, None)


class MailboxFollower(Service):  # type: ignore[misc]  # mode has no types
    """Keeps a mailbox current while the process runs."""

    def __init__(self, mailbox: Mailbox, live: LiveSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mailbox = mailbox
        self._live = live

    @Service.task  # type: ignore[untyped-decorator]
    async def _keep(self) -> None:
        pause_s = BACKOFF_FIRST_S
        while not self.should_stop:
            try:
                await self._follow()
            except Exception as e:
                if not self._mailbox.trouble or self._mailbox.trouble == "not read yet":
                    log.warning("mailbox_not_followed", error=f"{type(e).__name__}: {e}")
                    pause_s = BACKOFF_FIRST_S
                self._mailbox.trouble = str(e) if isinstance(e, Retry) else f"Kafka: {type(e).__name__}"
                await self.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    async def _follow(self) -> None:
        kafka = self._live().kafka
        name = topics.MAILBOX.full(kafka.topic_prefix)
        consumer = AIOKafkaConsumer(
            name,
            **kafka_clients.connection(kafka),
            client_id="preservarium-mailbox",
            group_id=None,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            metadata_max_age_ms=30_000,
        )
        try:
            await consumer.start()
            assigned = [*consumer.assignment()]
            if not assigned:
                message = f"topic {name} is not there: run `preservarium migrate`"
                raise Retry(message)
            # From its beginning, which is as long ago as a command can live.
            await consumer.seek_to_beginning(*assigned)
            ends = await consumer.end_offsets(assigned)
            probed_s = monotonic()
            while not self.should_stop:
                if monotonic() - probed_s > PROBE_S:
                    async with asyncio.timeout(PROBE_TIMEOUT_S):
                        await consumer.end_offsets(assigned[:1])
                    probed_s = monotonic()
                if self._mailbox.trouble and all([await consumer.position(tp) >= ends[tp] for tp in assigned]):
                    self._mailbox.trouble = ""
                for records in (await consumer.getmany(timeout_ms=POLL_MS)).values():
                    for record in records:
                        self._mailbox.take(record.key, record.value)
        finally:
            await kafka_clients.stop(consumer)
