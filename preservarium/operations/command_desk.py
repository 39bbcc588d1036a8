"""Where people ask for commands: a request or a cancel, checked and sent to `device_commands`; and what became of it.

Nothing here depends on a database: a command's id is made of the device and the idempotency key, and its events are read
from Kafka. Where the registry can be asked at once, a command to a device that it does not know is refused here.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from preservarium import topics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.commands.device import command_id
from preservarium.domain.commands.lines import CONTENTS, LINE_BYTES_MAX, PRESETS, parse_line
from preservarium.domain.commands.machine import OVER
from preservarium.errors import ReasonCode, Reject, Retry, reason
from preservarium.settings import Settings
from preservarium.stages.commands import command_send
from preservarium.streaming import kafka_clients
from preservarium.streaming.stage import Send

#: Sends records and returns when Kafka has acknowledged all of them; raises Retry where it cannot.
Publish = Callable[[Sequence[Send]], Awaitable[Any]]

#: What a request may say.
REQUEST_FIELDS: Final = frozenset({"command", "idempotency_key", "actor", *PRESETS, *CONTENTS})
#: Kafka must let itself be read within this time.
READ_S: Final = 20.0
#: The registry says within this time whether there is such a device, or the command stages find out.
REGISTRY_S: Final = 3.0


@dataclass(slots=True)
class CommandDesk:
    """Checks requests and cancels, and sends them.

    Args:
        publish: to Kafka, acknowledged.
        clock: says when.
        registered: what the registry has of a device, None where it has none; raises Retry where it cannot be asked.
    """

    publish: Publish
    clock: Clock = field(default_factory=SystemClock)
    registered: Callable[[str], Awaitable[Any]] | None = None

    def prepared(self, device_id: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The line of a request, checked, with its idempotency key; `command_id` of it is its id.

        Args:
            device_id: the address.
            asked: fields of `REQUEST_FIELDS`.

        Raises:
            Reject: it is not well formed; the message names the field.
        """
        if unknown := sorted(asked.keys() - REQUEST_FIELDS):
            text = f"no such field: {', '.join(unknown)[:200]}; there are {', '.join(sorted(REQUEST_FIELDS))}"
            raise Reject(ReasonCode.COMMAND_INVALID, text)
        key = asked.get("idempotency_key") or uuid.uuid4().hex
        line = {**asked, "kind": "request", "device_id": device_id, "idempotency_key": key, "at": self.clock.now_us()}
        return self._checked(line)

    async def request(self, device_id: str, asked: Mapping[str, Any]) -> dict[str, str]:
        """Send a request: `{command_id, idempotency_key}`. With the same key it may be repeated: it is the same command.

        Raises:
            Reject: it is not well formed, and the message names the field; or the registry knows no such device.
            Retry: Kafka did not acknowledge it; it may have been taken all the same, so repeat it with the same key.
        """
        line = self.prepared(device_id, asked)
        await self._check_registered(device_id)
        await self.publish([command_send(line)])
        key = line["idempotency_key"]
        return {"command_id": command_id(device_id, key), "idempotency_key": key}

    async def cancel(self, device_id: str, command: str, actor: str) -> None:
        """Send a cancel. Whether it could be done shows in the command's events, or in `iot_errors`.

        Raises:
            Reject: it is not well formed.
            Retry: Kafka did not acknowledge it; repeat it.
        """
        line = {
            "kind": "cancel",
            "device_id": device_id,
            "command_id": command,
            "actor": actor,
            "at": self.clock.now_us(),
        }
        await self.publish([command_send(self._checked(line))])

    async def _check_registered(self, device_id: str) -> None:
        if self.registered is None:
            return
        with contextlib.suppress(Retry, TimeoutError):
            async with asyncio.timeout(REGISTRY_S):
                found = await self.registered(device_id)
            if found is None:
                message = f"the registry knows no device {device_id!r}: register it first"
                raise Reject(ReasonCode.UNKNOWN_DEVICE, message)

    def _checked(self, line: dict[str, Any]) -> dict[str, Any]:
        parse_line(line, device_id=None, at=line["at"], key="-")
        try:
            size = len(orjson.dumps(line))
        except TypeError as e:
            raise Reject(ReasonCode.COMMAND_INVALID, reason(e)) from None
        if size > LINE_BYTES_MAX:
            message = f"a command of {size} bytes; it may have {LINE_BYTES_MAX}"
            raise Reject(ReasonCode.COMMAND_INVALID, message)
        return line


class Watch:
    """Events of commands, from when the watch began."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer

    async def events(self, command: str) -> AsyncIterator[dict[str, Any]]:
        """Events of one command, each once, until it has ended."""
        seen = 0
        while True:
            for records in (await self._consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    event = orjson.loads(record.value)
                    # What a crash repeats comes again.
                    if event["command_id"] != command or event["sequence"] <= seen:
                        continue
                    seen = event["sequence"]
                    yield event
                    if event["state"] in OVER:
                        return


@asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[Watch]:
    """Watch the events of commands from now on: of all partitions, because they are keyed by the device as it is registered.

    Raises:
        Retry: Kafka cannot be read.
    """
    from aiokafka import AIOKafkaConsumer, TopicPartition
    from aiokafka.errors import KafkaError

    kafka = settings.kafka
    consumer = AIOKafkaConsumer(**kafka_clients.reading(kafka), enable_auto_commit=False)
    topic = topics.COMMAND_EVENTS.full(kafka.topic_prefix)
    all_of_it = [TopicPartition(topic, partition) for partition in range(kafka.partitions)]
    try:
        try:
            async with asyncio.timeout(READ_S):
                await consumer.start()
                consumer.assign(all_of_it)
                await consumer.seek_to_end(*all_of_it)
                for tp in all_of_it:
                    await consumer.position(tp)
        except (KafkaError, OSError, TimeoutError) as e:
            message = f"{topic} cannot be read from {kafka.bootstrap_servers}: {reason(e)}"
            raise Retry(message) from e
        yield Watch(consumer)
    finally:
        await kafka_clients.stop(consumer)
