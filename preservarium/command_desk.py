"""Where people ask for commands: a request or a cancel, checked and sent to `device_commands`; and what became of it.

Nothing here waits for a database: a command's id is made of the device and the idempotency key, and its events are read
from Kafka.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from preservarium import kafka_clients, topics
from preservarium.clock import Clock, SystemClock
from preservarium.commanding import command_send
from preservarium.domain.commands import CONTENTS, LINE_BYTES_MAX, OVER, PRESETS, command_id, parse_line
from preservarium.domain.errors import ReasonCode, Reject, Retry
from preservarium.publish import partition_of
from preservarium.settings import Settings
from preservarium.stage import Send

#: Sends records and returns when Kafka has acknowledged all of them; raises Retry where it cannot.
Publish = Callable[[Sequence[Send]], Awaitable[Any]]

#: What a request may say.
REQUEST_FIELDS: Final = frozenset({"command", "idempotency_key", "actor", *PRESETS, *CONTENTS})
#: Kafka must let itself be read within this time.
READ_S: Final = 20.0


@dataclass(slots=True)
class CommandDesk:
    """Checks requests and cancels, and sends them.

    Args:
        publish: to Kafka, acknowledged.
        clock: says when.
    """

    publish: Publish
    clock: Clock = field(default_factory=SystemClock)

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
            Reject: it is not well formed; the message names the field.
            Retry: Kafka did not acknowledge it; it may have been taken all the same, so repeat it with the same key.
        """
        line = self.prepared(device_id, asked)
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

    def _checked(self, line: dict[str, Any]) -> dict[str, Any]:
        parse_line(line, device_id=None, at=line["at"], key="-")
        try:
            size = len(orjson.dumps(line))
        except TypeError as e:
            raise Reject(ReasonCode.COMMAND_INVALID, str(e)) from None
        if size > LINE_BYTES_MAX:
            message = f"a command of {size} bytes; it may have {LINE_BYTES_MAX}"
            raise Reject(ReasonCode.COMMAND_INVALID, message)
        return line


class Watch:
    """Events of one device's commands, from when the watch began."""

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
async def watching(settings: Settings, device_id: str) -> AsyncIterator[Watch]:
    """Watch the events of a device's commands from now on.

    Raises:
        Retry: Kafka cannot be read.
    """
    from aiokafka import AIOKafkaConsumer, TopicPartition
    from aiokafka.errors import KafkaError

    kafka = settings.kafka
    consumer = AIOKafkaConsumer(**kafka_clients.connection(kafka), enable_auto_commit=False)
    at = TopicPartition(
        topics.COMMAND_EVENTS.full(kafka.topic_prefix), partition_of(device_id.encode(), kafka.partitions)
    )
    try:
        try:
            async with asyncio.timeout(READ_S):
                await consumer.start()
                consumer.assign([at])
                await consumer.seek_to_end(at)
                await consumer.position(at)
        except (KafkaError, OSError, TimeoutError) as e:
            message = f"{at.topic} cannot be read from {kafka.bootstrap_servers}: {e or type(e).__name__}"
            raise Retry(message) from e
        yield Watch(consumer)
    finally:
        await kafka_clients.stop(consumer)
