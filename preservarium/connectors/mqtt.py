"""MQTT in: QoS 1, a persistent session, and a PUBACK only after Kafka has acknowledged.

aiomqtt acknowledges when a message is queued, so a crash would lose the queue (aiomqtt #345). Under it paho-mqtt is set
to manual acknowledgement. A broker redelivers only when a persistent session reconnects (MQTT 3.1.1, 4.4): when
Kafka does not take a message, the connection is dropped and made again, and the broker sends it once more.

One message, one record. Messages are taken in batches, delivered, and acknowledged in the order in which they came
(MQTT 3.1.1, 4.6). The inbox is bounded: when it is full the socket is not read, and the broker holds the rest.
Messages that were published at QoS 0 have no acknowledgement; those in a failed batch are kept in memory and sent first
after the reconnect.

Retained messages that the broker sends because of the subscription are left out: they are of unknown age, and would
look fresh.
"""

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast
from urllib.parse import unquote, urlsplit

import aiomqtt
import structlog

from preservarium import metrics, tls
from preservarium.clock import Clock
from preservarium.connectors.base import (
    Backoff,
    Limits,
    Publishes,
    RawProducer,
    envelope_send,
    formats_in,
    message_send,
    pause,
    refused_send,
    report_send,
)
from preservarium.connectors.envelopes import AUTO, NOT_UPLINK, Formats, Uplink, comes_by, formats_of, required
from preservarium.domain.commands.downlinks import server_report
from preservarium.errors import ReasonCode, Reject, Retry
from preservarium.settings import LiveSettings, Mqtt, Settings, SettingsError
from preservarium.streaming.records import is_envelope, payload_of
from preservarium.streaming.stage import Send

log = structlog.get_logger(__name__)

CONNECTOR: Final = "mqtt"
#: What the broker must answer within: CONNACK, SUBACK.
TIMEOUT_S: Final = 10.0
#: A connection that is lost sooner than this after its subscription was probably taken over by a client of the same id.
TAKEN_OVER_S: Final = 2.0
DEFAULT_PORT: Final = {"mqtt": 1883, "mqtts": 8883}
#: SUBACK return codes of MQTT 3.1.1, 3.9.3: 0 to 2 are the granted QoS, 128 is a refusal.
SUBACK_FAILURE: Final = 128

_PLACEHOLDERS: Final = frozenset({"device", "mode", "port"})


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of `mqtt.subscriptions`."""

    text: str
    filter: str  #: what is subscribed to, `$share/group/` included
    expression: re.Pattern[str]  #: matches a topic; named groups are the placeholders
    base: int  #: levels before what `#` stands for; 0 where it has none

    def match(self, topic: str) -> dict[str, str] | None:
        """What the placeholders stand for in `topic`; None where it does not match."""
        found = self.expression.fullmatch(topic)
        return found.groupdict() if found else None


def patterns_of(subscriptions: str) -> list[Pattern]:
    """The patterns of `mqtt.subscriptions`, in order: the first that matches a topic is used.

    Raises:
        SettingsError: an entry is no topic pattern.
    """
    return [_pattern(text.strip()) for text in subscriptions.split(",") if text.strip()]


def _pattern(text: str) -> Pattern:
    levels = text.split("/")
    prefix: list[str] = []
    if levels[0] == "$share":
        prefix, levels = levels[:2], levels[2:]
        if len(prefix) < 2 or not prefix[1] or not levels:
            _wrong(text, "a shared subscription is $share/GROUP/TOPIC")
    topic: list[str] = []
    expression: list[str] = []
    seen: set[str] = set()
    for position, level in enumerate(levels):
        name = level[1:-1] if level.startswith("{") and level.endswith("}") else None
        if name is not None:
            if name not in _PLACEHOLDERS or name in seen:
                _wrong(text, f"{level} is not one of {{device}}, {{mode}}, {{port}}, or stands there twice")
            seen.add(name)
            topic.append("+")
            expression.append(f"(?P<{name}>[^/]*)")
        elif level == "+":
            topic.append(level)
            expression.append("[^/]*")
        elif level == "#":
            if position != len(levels) - 1:
                _wrong(text, "# may only be the last level")
            topic.append(level)
            expression.append(".*")
        elif any(c in level for c in "+#{}\0"):
            _wrong(text, f"a wildcard or placeholder is a whole level: {level!r}")
        else:
            topic.append(level)
            expression.append(re.escape(level))
    body = "/".join(expression)
    if topic[-1] == "#" and len(topic) > 1:
        # "sport/#" also matches the parent level "sport" (MQTT 3.1.1, 4.7.1.2).
        body = "/".join(expression[:-1]) + "(?:/.*)?"
    base = len(topic) - 1 if topic[-1] == "#" else 0
    return Pattern(text, "/".join([*prefix, *topic]), re.compile(body, re.DOTALL), base)


def _wrong(text: str, why: str) -> NoReturn:
    message = f"PRESERVARIUM_MQTT__SUBSCRIPTIONS: {text!r}: {why}"
    raise SettingsError(message)


def sends_of(
    patterns: Iterable[Pattern],
    topic: str,
    data: bytes,
    limits: Limits,
    mode: str,
    now: Callable[[], int],
    formats: Formats | None = None,
) -> list[Send]:
    """The records of one MQTT message, each with an instant of receipt of its own (`now`, µs); none of a network's own event.

    A message in a platform's envelope names its device itself, or its topic does as that platform has it; what a network server says of a downlink of ours
    becomes a report in `device_commands`; both must be of the device that the topic names, where its pattern has `{device}`. Otherwise the topic
    names the device; where its pattern has no `{device}`, the message must be our envelope, or an array of them.

    Args:
        patterns: of the subscriptions; the first that matches counts.
        topic: of the message.
        data: what was published.
        limits: sizes.
        mode: connector mode where neither the pattern nor the envelope names one.
        now: the clock.
        formats: envelopes that are looked for; None: all.

    Raises:
        Reject: it cannot be a raw message; the connector acknowledges it all the same and says so in `iot_errors`.
    """
    formats = formats or formats_of(AUTO)
    pattern, names = next(
        ((pattern, found) for pattern in patterns if (found := pattern.match(topic)) is not None), (None, None)
    )
    if pattern is None or names is None:
        raise Reject(
            ReasonCode.ENVELOPE_NO_DEVICE, f"no pattern of mqtt.subscriptions matches the topic {topic!r:.200}"
        )
    value = payload_of(data)
    report = server_report(value)
    if report is not None:
        _require_own(names, topic, report["device_id"], value)
        return [report_send(report)]
    named, levels = names.get("device"), tuple(topic.split("/"))
    if named is None and isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [
            send
            for item in value
            for send in _sends_of_one(pattern, names, topic, levels, item, limits, mode, now, formats)
        ]
    return _sends_of_one(pattern, names, topic, levels, value, limits, mode, now, formats)


def _sends_of_one(
    pattern: Pattern,
    names: Mapping[str, str],
    topic: str,
    levels: tuple[str, ...],
    value: Any,
    limits: Limits,
    mode: str,
    now: Callable[[], int],
    formats: Formats,
) -> list[Send]:
    named, mode_of_topic = names.get("device"), names.get("mode")
    ours = named is None and is_envelope(value)
    found = None if ours else formats.read(value, levels, named, pattern.base)
    if formats.forced is not None and not ours:
        found = required(found, formats.forced.name)
    if found is not None:
        for uplink in found:
            _require_own(names, topic, uplink.device, value)
        return [_uplink_send(uplink, limits, mode_of_topic or uplink.mode or mode, topic, now()) for uplink in found]
    mode = mode_of_topic or mode
    if named is not None:
        port = _port(names.get("port"))
        return [message_send(named, value, limits, CONNECTOR, mode, now(), topic=topic, port=port)]
    if not ours:
        what = "the pattern names no device, and the message is neither in a platform's envelope nor in ours"
        raise Reject(ReasonCode.ENVELOPE_NO_DEVICE, what)
    return [envelope_send(value, limits, CONNECTOR, mode, now(), topic=topic)]


def _uplink_send(uplink: Uplink, limits: Limits, mode: str, topic: str, now_us: int) -> Send:
    return message_send(
        uplink.device, uplink.payload, limits, CONNECTOR, mode, now_us, topic=topic, port=uplink.port, meta=uplink.meta
    )


def _require_own(names: Mapping[str, str], topic: str, device: str, event: Any) -> None:
    """Refuse a network server's event about another device than its topic names.

    Raises:
        Reject: ENVELOPE_INVALID.
    """
    named = names.get("device")
    if named is not None and not comes_by(topic, named, device, event):
        text = (
            f"an event of {device!r:.80} under the topic of {named!r:.80}: where the event is to name the device, "
            "the pattern of mqtt.subscriptions has + in the place of {device}"
        )
        raise Reject(ReasonCode.ENVELOPE_INVALID, text)


def _port(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 3):
        raise Reject(ReasonCode.ENVELOPE_INVALID, f"the port in the topic is no number: {text!r:.80}")
    return int(text)


def tls_context(mqtt: Mqtt) -> ssl.SSLContext:
    """Of every client of the broker.

    Raises:
        SettingsError: a file of the settings cannot be used.
    """
    return tls.client_context(
        "mqtt",
        ca_file=mqtt.ssl_ca_file,
        cert_file=mqtt.ssl_cert_file,
        key_file=mqtt.ssl_key_file,
        key_password=mqtt.ssl_key_password.get_secret_value(),
    )


class _Inbox(asyncio.Queue[aiomqtt.Message]):
    """Bounded by asking for a pause, never by discarding (what aiomqtt does with a full queue)."""

    def __init__(self, messages_max: int, on_full: Callable[[], None]) -> None:
        super().__init__()
        self._messages_max = messages_max
        self._on_full = on_full

    def put_nowait(self, item: aiomqtt.Message) -> None:
        super().put_nowait(item)
        if self.qsize() >= self._messages_max:
            self._on_full()

    def drain(self, first: aiomqtt.Message) -> list[aiomqtt.Message]:
        messages = [first]
        while not self.empty():
            messages.append(self.get_nowait())
        return messages


class _Connection:
    """One connection: aiomqtt's client, with manual acknowledgement and a socket that can be left unread."""

    def __init__(self, settings: Settings) -> None:
        self.inbox = _Inbox(settings.mqtt.inflight_max, self._pause)
        url = urlsplit(settings.mqtt.url.get_secret_value())
        if url.scheme not in DEFAULT_PORT or not url.hostname:
            message = "PRESERVARIUM_MQTT__URL: not of the form mqtt(s)://[user[:password]@]host[:port]"
            raise SettingsError(message)
        self.address = f"{url.hostname}:{url.port or DEFAULT_PORT[url.scheme]}"
        self.client = aiomqtt.Client(
            url.hostname,
            url.port or DEFAULT_PORT[url.scheme],
            username=unquote(url.username) if url.username is not None else None,
            password=unquote(url.password) if url.password is not None else None,
            identifier=settings.mqtt.client_id,
            clean_session=False,
            queue_type=cast(Any, lambda maxsize: self.inbox),
            tls_context=tls_context(settings.mqtt) if url.scheme == "mqtts" else None,
            keepalive=settings.mqtt.keepalive_s,
            timeout=TIMEOUT_S,
        )
        # Private: aiomqtt offers no manual acknowledgement, paho below it does. tests/contract holds the attribute.
        self._paho = self.client._client
        self._paho.manual_ack_set(True)
        self._loop = asyncio.get_running_loop()
        self._paused: int | None = None

    def ack(self, message: aiomqtt.Message) -> None:
        """Send the PUBACK; on a connection that is gone it does nothing, and the broker redelivers."""
        if message.qos:
            self._paho.ack(message.mid, message.qos)

    def resume(self) -> None:
        """Read the socket again."""
        if self._paused is None:
            return
        fileno, self._paused = self._paused, None
        sock = self._paho.socket()
        if sock is not None and sock.fileno() == fileno:
            self._loop.add_reader(fileno, self._read)
            self._read()  # what TLS has already decrypted makes no socket readable

    def drop(self) -> None:
        """Close the socket of a connection that was never accepted; else its reader would stay in the loop."""
        self._paho.disconnect()

    def _pause(self) -> None:
        sock = self._paho.socket()
        if self._paused is None and sock is not None and sock.fileno() >= 0:
            self._paused = sock.fileno()
            self._loop.remove_reader(self._paused)

    def _read(self) -> None:
        while self._paused is None:
            try:
                self._paho.loop_read()
            except Exception as e:
                # paho reports what a network does by its callbacks; this is a packet that it cannot read.
                log.warning("mqtt packet cannot be read", error=repr(e))
                self.drop()
                return
            sock = self._paho.socket()
            pending = getattr(sock, "pending", None)
            if pending is None or pending() == 0:
                return


class MqttConnector:
    """Keeps a session with a broker and brings its messages to Kafka, until stopped."""

    def __init__(
        self, publisher: Publishes, live: LiveSettings, clock: Clock, *, backoff: Backoff | None = None
    ) -> None:
        self._producer = RawProducer(publisher, CONNECTOR)
        self._live = live
        self._clock = clock
        self._backoff = backoff or Backoff()
        self._patterns = patterns_of(live().mqtt.subscriptions)
        self._formats = formats_in(live())
        #: QoS 0 messages of a batch that Kafka did not take: the broker will not send them again
        self._kept: list[aiomqtt.Message] = []
        self._stop = asyncio.Event()
        #: times that the connection was lost, or given up to get a redelivery
        self.reconnects = 0
        self.connected = asyncio.Event()

    @property
    def taken(self) -> int:
        """Messages acknowledged by Kafka since the start."""
        return self._producer.sent

    def stop(self) -> None:
        """Finish the batch in hand and disconnect; the session stays with the broker."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until `stop` is called.

        Raises:
            SettingsError: the URL or a subscription is wrong.
            Fatal: Kafka's topics are not as declared.
        """
        while not self._stop.is_set():
            try:
                await self._session()
            except (aiomqtt.MqttError, Retry, OSError, TimeoutError, ValueError) as e:
                # ValueError: asyncio's word for a socket that closed while it was being registered.
                self.reconnects += 1
                metrics.CONNECTOR_RECONNECTS.labels(CONNECTOR).inc()
                wait_s = self._backoff.next_s()
                log.warning("mqtt connection given up, will be made again", error=str(e), wait_s=round(wait_s, 2))
                await pause(self._clock, wait_s, self._stop)
            finally:
                self.connected.clear()

    async def _session(self) -> None:
        settings = self._live()
        connection = _Connection(settings)
        client = connection.client
        try:
            await client.__aenter__()
        except aiomqtt.MqttError:
            connection.drop()
            raise
        try:
            await self._subscribe(client)
            log.info("mqtt connected", broker=connection.address, client_id=settings.mqtt.client_id)
            since_s = self._clock.monotonic_s()
            self.connected.set()
            try:
                await self._serve(connection)
            except aiomqtt.MqttError:
                if self._clock.monotonic_s() - since_s < TAKEN_OVER_S:
                    log.warning("mqtt connection lost at once: another client with this id?", broker=connection.address)
                raise
        finally:
            # A goodbye that fails changes nothing: the session and what it owes us are the broker's to keep.
            with contextlib.suppress(aiomqtt.MqttError):
                await client.__aexit__(None, None, None)

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        if not self._patterns:
            return
        granted = await client.subscribe([(pattern.filter, 1) for pattern in self._patterns])
        for pattern, code in zip(self._patterns, granted, strict=True):
            if int(cast(Any, getattr(code, "value", code))) >= SUBACK_FAILURE:
                message = f"the broker refuses the subscription {pattern.filter!r}"
                raise aiomqtt.MqttError(message)

    async def _serve(self, connection: _Connection) -> None:
        if self._kept:
            kept, self._kept = self._kept, []
            await self._take(connection, kept)
        stop = asyncio.ensure_future(self._stop.wait())
        messages = connection.client.messages
        try:
            while not self._stop.is_set():
                following = asyncio.ensure_future(anext(messages))
                try:
                    await asyncio.wait({following, stop}, return_when=asyncio.FIRST_COMPLETED)
                    if not following.done():
                        return
                    batch = connection.inbox.drain(following.result())
                finally:
                    if not following.done():
                        following.cancel()
                        # Its own task in the queue ends with it; nothing is lost, the broker has no PUBACK.
                        with contextlib.suppress(asyncio.CancelledError):
                            await following
                connection.resume()
                await self._take(connection, batch)
                self._backoff.reset()
        finally:
            stop.cancel()

    async def _take(self, connection: _Connection, batch: Sequence[aiomqtt.Message]) -> None:
        sends = self._sends(batch)
        try:
            await self._producer.send(sends)
        except BaseException:
            waiting = [] if connection.inbox.empty() else connection.inbox.drain(connection.inbox.get_nowait())
            self._kept = [m for m in [*batch, *waiting] if not m.qos and not m.retain]
            raise
        for message in batch:
            connection.ack(message)

    def _sends(self, batch: Sequence[aiomqtt.Message]) -> list[Send]:
        settings = self._live()
        limits = Limits.of(settings)
        sends: list[Send] = []
        for message in batch:
            topic = str(message.topic)
            data = bytes(message.payload) if isinstance(message.payload, bytes | bytearray) else b""
            if message.retain:
                metrics.CONNECTOR_REFUSED.labels(CONNECTOR, "retained").inc()
                continue
            try:
                made = sends_of(
                    self._patterns, topic, data, limits, settings.mqtt.mode, self._clock.now_us, self._formats
                )
                sends += made
                if not made:
                    metrics.CONNECTOR_REFUSED.labels(CONNECTOR, NOT_UPLINK).inc()
            except Reject as e:
                now_us = self._clock.now_us()
                sends.append(
                    refused_send(CONNECTOR, e, limits, raw=data, device=None, source=topic, index=0, now_us=now_us)
                )
        return sends
