"""The mailbox of devices that fetch: downlinks wait on `device_mailbox` until their device asks over HTTP and has them.

The downlink stage puts them there as it gives others to the MQTT broker. Every process that serves `GET /ingest/commands`
follows the topic in memory, so a device may ask any of them. A downlink stays until its device names it, or a later one,
as the last that it has: an answer that was lost is given again, with the same ids.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import orjson
import structlog

from preservarium import topics
from preservarium.domain.commands.device import OPEN_MAX
from preservarium.domain.readings.address import canonical_address
from preservarium.errors import Retry
from preservarium.settings import LiveSettings
from preservarium.streaming.following import Follower, follow
from preservarium.streaming.stage import Send
from preservarium.waiting import Waiters

log = structlog.get_logger(__name__)

#: Devices with something waiting, those that were sent to last: some 20 MiB. A fleet that fetches has less under way.
DEVICES_MAX: Final = 50_000
#: Downlinks of one device that wait: as many as commands may be open.
WAITING_MAX: Final = OPEN_MAX

Publish = Callable[[Sequence[Send]], Awaitable[Any]]


class MailboxBroker:
    """The downlink stage's way into the mailbox; the topic of a downlink is its device's address."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish

    async def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> tuple[list[bool], str]:
        """Put downlinks there: whether Kafka has acknowledged them, and why not, or ""."""
        try:
            await self._publish(
                [Send(topics.MAILBOX, canonical_address(device).encode(), line) for device, line, _ in messages]
            )
        except Retry as e:
            return [False] * len(messages), str(e)
        return [True] * len(messages), ""


class Mailbox:
    """What waits for each device, in the order in which it was put there; fed line by line.

    Devices are told by the canonical form of their address, so that one may spell its own as it likes.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, dict[str, dict[str, Any]]] = OrderedDict()
        self._asking = Waiters()
        #: why what is here may not be everything; "" while it is followed
        self.trouble = "not read yet"

    def take(self, key: bytes | None, value: bytes | None) -> None:
        """Take a line of `device_mailbox`: a downlink, or `{"has": id}`, up to which the device has them."""
        try:
            device, line = canonical_address((key or b"").decode()), orjson.loads(value or b"")
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
        self._asking.wake(device)

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
        found = self._waiting.get(canonical_address(device), {})
        for identifier in [i for i, line in found.items() if line["expires_at"] <= now_us]:
            del found[identifier]
        return [*found.values()]

    def upto(self, device: str, identifier: str) -> list[str]:
        """Ids that a device has when it has this one; none where this one does not wait (any more)."""
        found = [*self._waiting.get(canonical_address(device), {})]
        return found[: found.index(identifier) + 1] if identifier in found else []

    async def wait(self, device: str, timeout_s: float) -> None:
        """Wait until something comes for a device, at most so long."""
        await self._asking.wait(canonical_address(device), timeout_s)


class MailboxFollower(Follower):
    """Keeps a mailbox current while the process runs."""

    what = "mailbox"

    def __init__(self, mailbox: Mailbox, live: LiveSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mailbox = mailbox
        self._live = live

    @property
    def current(self) -> bool:
        """Whether every downlink that waits is in the mailbox."""
        return not self._mailbox.trouble

    def hindered(self, why: str) -> None:
        """Note in the mailbox why it may be old."""
        self._mailbox.trouble = why

    async def read(self) -> None:
        """Read the topic from its beginning, which is as long ago as a command can live."""
        mailbox, kafka = self._mailbox, self._live().kafka

        def take(records: Sequence[Any], _first: bool) -> None:
            for record in records:
                mailbox.take(record.key, record.value)

        def caught_up() -> None:
            mailbox.trouble = ""

        sources = {topics.MAILBOX.full(kafka.topic_prefix): None}
        await follow(kafka, sources, take, caught_up, client="preservarium-mailbox", stopped=lambda: self.should_stop)
