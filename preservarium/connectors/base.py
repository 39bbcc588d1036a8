"""What every connector needs: a way to Kafka that says when a message is safe, and a back-off.

A connector tells its sender "taken" (PUBACK, 202, a saved position) only after `RawProducer.send` has returned.
"""

import asyncio
import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import structlog

from preservarium import metrics, topics
from preservarium.clock import Clock
from preservarium.connectors.envelopes import Formats, formats_of
from preservarium.domain.readings.address import canonical_address
from preservarium.domain.readings.json_text import to_bytes
from preservarium.errors import ReasonCode, Reject, Retry
from preservarium.settings import Settings, SettingsError
from preservarium.streaming.records import (
    DEVICE_CHARS_MAX,
    TOPIC_CHARS_MAX,
    error_line,
    error_send,
    parse_envelope,
    raw_line,
)
from preservarium.streaming.stage import Send

log = structlog.get_logger(__name__)

#: Records of one call to Kafka: more would hold a partition's other senders up, and a call is acknowledged as a whole.
BATCH_RECORDS_MAX: Final = 5_000
#: Bytes waiting for Kafka in one process; a sender that comes on top of this waits until there is room.
PENDING_BYTES_MAX: Final = 32 * 1024 * 1024
#: Kafka's own fields of a record and ours of the producer: an upper bound, no less than what publish.py counts.
RECORD_OVERHEAD_BYTES: Final = 128
#: Field of `meta` for the instant, in µs, that the network or the gateway gives the message.
META_TIME: Final = "time"
#: First and longest wait between attempts.
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0


class Publishes(Protocol):
    """What delivers to Kafka: the worker's publisher, or one of a connector's own."""

    async def publish(self, sends: Sequence[Send], /) -> Any:
        """Return when every record is acknowledged.

        Raises:
            Retry: Kafka cannot be reached or did not acknowledge; some records may be there.
            Reject: a record is larger than Kafka takes; nothing of this call was sent.
        """
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that a message must keep to, taken from the settings in force."""

    payload_bytes_max: int
    record_bytes_max: int

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        """The limits that these settings say."""
        return cls(settings.normalize.payload_bytes_max, settings.kafka.record_bytes_max)


def formats_in(settings: Settings) -> Formats:
    """The envelopes that the settings look for.

    Raises:
        SettingsError: a name, or the rule that names devices, is none.
    """
    try:
        return formats_of(settings.connector.format, settings.connector.device_tags)
    except ValueError as e:
        message = f"PRESERVARIUM_CONNECTOR__FORMAT, PRESERVARIUM_CONNECTOR__DEVICE_TAGS: {e}"
        raise SettingsError(message) from None


def message_send(
    device: str, payload: Any, limits: Limits, connector: str, mode: str, received_at: int, **fields: Any
) -> Send:
    """The record of one raw message, keyed by device: by its canonical address, however it is spelled here.

    Args:
        device: the address.
        payload: bytes, or any JSON value.
        limits: sizes.
        connector: the connector's name.
        mode: connector mode.
        received_at: µs since the epoch, UTC.
        fields: `topic`, `port`, `meta`, `experiment_id`, as `raw_line` has them.

    Raises:
        Reject: the message cannot be a line of `iot_raw_data`.
    """
    line = raw_line(
        device,
        payload,
        received_at=received_at,
        connector=connector,
        mode=mode,
        payload_bytes_max=limits.payload_bytes_max,
        **fields,
    )
    key = canonical_address(device).encode()
    if (size := len(line) + len(key) + RECORD_OVERHEAD_BYTES) > limits.record_bytes_max:
        raise Reject(ReasonCode.ENVELOPE_TOO_LARGE, f"a record of {size} bytes; Kafka takes {limits.record_bytes_max}")
    return Send(topics.RAW, key, line)


def envelope_send(
    item: Mapping[str, Any],
    limits: Limits,
    connector: str,
    mode: str,
    now_us: int,
    *,
    topic: str = "",
    keep_received_at: bool = False,
) -> Send:
    """The record of a message that came in our own envelope; the connector stamps its name and time.

    Args:
        item: the envelope, see `records.is_envelope`.
        limits: sizes.
        connector: the connector's name.
        mode: connector mode where the envelope names none.
        now_us: µs since the epoch, UTC.
        topic: original topic where the envelope names none.
        keep_received_at: take the envelope's own `received_at` (a back-fill). Otherwise it becomes `meta.time`: what a
            sender says about the time must not pass for ours.

    Raises:
        Reject: a field is missing, of the wrong type or over its limit.
    """
    fields = parse_envelope(item, key_device=None, size=0, payload_bytes_max=limits.payload_bytes_max)
    meta, given = fields["meta"], fields["received_at"]
    if given is not None and not keep_received_at and META_TIME not in meta:
        meta = {**meta, META_TIME: given}
    return message_send(
        fields["device"],
        fields["payload"],
        limits,
        connector,
        fields["mode"] or mode,
        given if keep_received_at and given is not None else now_us,
        topic=fields["topic"] or topic,
        port=fields["port"],
        meta=meta,
        experiment_id=fields["experiment_id"],
    )


def report_send(line: Mapping[str, Any]) -> Send:
    """The record of what a network server, or a device that fetches, says of a downlink: keyed as the device's raw messages."""
    return Send(topics.COMMANDS, canonical_address(line["device_id"]).encode(), to_bytes(line))


def refused_send(
    connector: str, e: Reject, limits: Limits, *, raw: bytes, device: str | None, source: str, index: int, now_us: int
) -> Send:
    """The error record of a message that a connector had to take and cannot pass on.

    It was never in Kafka, so it has no coordinates there: partition and offset are -1, and `topic` says where it came
    from, in the connector's own words.
    """
    line = error_line(
        connector,
        e.code,
        str(e),
        topic=f"{connector}:{source}"[:TOPIC_CHARS_MAX],
        partition=-1,
        offset=-1,
        index=index,
        raw=raw,
        device_id=device,
        now_us=now_us,
    )
    metrics.CONNECTOR_REFUSED.labels(connector, e.code).inc()
    # The key is not in the value's size, and a device's address has at most 255 characters.
    return error_send(line, record_bytes_max=limits.record_bytes_max - 4 * DEVICE_CHARS_MAX - RECORD_OVERHEAD_BYTES)


class Backoff:
    """Waits that double up to a limit, each with jitter so that a fleet of connectors does not come back at once."""

    def __init__(
        self, first_s: float = BACKOFF_FIRST_S, max_s: float = BACKOFF_MAX_S, rng: random.Random | None = None
    ) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._rng = rng or random.Random()
        self._next_s = first_s

    def reset(self) -> None:
        """Begin again with the first wait: it worked."""
        self._next_s = self._first_s

    def next_s(self) -> float:
        """Seconds to wait now: between half of the step and all of it."""
        step_s, self._next_s = self._next_s, min(self._next_s * 2, self._max_s)
        return step_s * self._rng.uniform(0.5, 1.0)


async def pause(clock: Clock, seconds: float, stop: asyncio.Event) -> None:
    """Wait for `seconds`, or until `stop` is set."""
    waits = {asyncio.ensure_future(clock.sleep(seconds)), asyncio.ensure_future(stop.wait())}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


@dataclass(slots=True, eq=False)
class _Waiting:
    sends: Sequence[Send]
    size: int
    done: asyncio.Future[None]


class RawProducer:
    """Group commit to Kafka: while one call is under way, what arrives waits and goes with the next one.

    So a single message leaves at once and a thousand concurrent ones leave together. Order is kept: what was sent
    first is in Kafka first. Pending bytes are bounded; `send` waits where they are full, which is what a connector's
    sender feels as back-pressure.
    """

    def __init__(self, publisher: Publishes, connector: str, *, pending_bytes_max: int = PENDING_BYTES_MAX) -> None:
        self._publisher = publisher
        self._connector = connector
        self._pending_bytes_max = pending_bytes_max
        self._pending_bytes = 0
        self._queue: deque[_Waiting] = deque()
        self._room = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        #: records acknowledged since the start, without error records
        self.sent = 0

    async def send(self, sends: Sequence[Send]) -> None:
        """Return when Kafka has acknowledged all of `sends`.

        A cancelled call may still be delivered.

        Raises:
            Retry: Kafka cannot be reached or did not acknowledge; some of them may be there all the same.
            Reject: one is larger than Kafka takes; none was sent.
        """
        if not sends:
            return
        size = sum(len(send.value or b"") + len(send.key or b"") for send in sends)
        async with self._room:
            # One call that alone is over the limit still goes, when nothing else is pending.
            await self._room.wait_for(
                lambda: self._pending_bytes == 0 or self._pending_bytes + size <= self._pending_bytes_max
            )
            self._pending_bytes += size
        waiting = _Waiting(sends, size, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        try:
            await waiting.done
        finally:
            async with self._room:
                self._pending_bytes -= size
                self._room.notify_all()
        taken = sum(send.topic is topics.RAW for send in sends)
        self.sent += taken
        metrics.CONNECTOR_MESSAGES.labels(self._connector).inc(taken)

    async def close(self) -> None:
        """Wait until everything that was handed over is acknowledged or failed."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _drain(self) -> None:
        try:
            while self._queue:
                group: list[_Waiting] = []
                records = 0
                while self._queue and (not group or records + len(self._queue[0].sends) <= BATCH_RECORDS_MAX):
                    group.append(self._queue.popleft())
                    records += len(group[-1].sends)
                await self._deliver(group)
        finally:
            self._task = None

    async def _deliver(self, group: list[_Waiting]) -> None:
        try:
            await self._publisher.publish([send for waiting in group for send in waiting.sends])
        except Reject as e:
            if len(group) == 1:
                _settle(group, e)
                return
            # Nothing was sent. One sender's record is too large: the others must not hear of it.
            for waiting in group:
                await self._deliver([waiting])
        except asyncio.CancelledError:
            _settle(group, Retry("the connector is stopping"))
            raise
        except Exception as e:
            # Retry and Fatal are for the senders to act on; anything else is a defect, and they must not wait for ever.
            _settle(group, e)
        else:
            _settle(group, None)


def _settle(group: list[_Waiting], error: BaseException | None) -> None:
    for waiting in group:
        if waiting.done.done():
            continue
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
