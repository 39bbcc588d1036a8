"""MQTT out: downlinks, as a rule at QoS 1, each awaited until its PUBACK.

One connection a worker, made when the first downlink comes and made anew after any trouble: what was under way on the
old one is then unknown, and its owner sends it again (MQTT 3.1.1, 4.4: the message may be delivered twice). The session is
clean, because Kafka and not the broker keeps what is not acknowledged.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import aiomqtt
import structlog

from preservarium.breaker import Breaker
from preservarium.clock import Clock
from preservarium.connectors.mqtt import DEFAULT_PORT, tls_context
from preservarium.errors import Retry
from preservarium.settings import LiveSettings, Settings, SettingsError
from preservarium.waiting import alive

log = structlog.get_logger(__name__)

#: A goodbye to a broker takes this long at most.
CLOSE_S: Final = 2.0


class Broker:
    """A connection for publishing, for one event loop.

    Args:
        live: settings.
        clock: for the breaker's waits.
    """

    def __init__(self, live: LiveSettings, clock: Clock) -> None:
        self._live = live
        self._breaker = Breaker("mqtt", lambda: live().breaker, clock=clock)
        self._client: aiomqtt.Client | None = None
        #: ends when the connection does
        self._watch: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def publish(self, messages: Sequence[tuple[str, bytes, int]]) -> tuple[list[bool], str]:
        """Publish messages, several at once.

        Args:
            messages: topic, payload and quality of service; 0 is acknowledged when it is written to the connection.

        Returns:
            Which of them the broker acknowledged, and why not all of them, or "".
        """
        acknowledged = [False] * len(messages)
        if not messages:
            return acknowledged, ""
        try:
            async with self._turn, self._breaker:
                await self._publish(messages, acknowledged)
        except Retry as e:
            return acknowledged, str(e)
        return acknowledged, ""

    async def close(self) -> None:
        """Disconnect."""
        async with self._turn:
            await self._drop()

    async def _publish(self, messages: Sequence[tuple[str, bytes, int]], acknowledged: list[bool]) -> None:
        settings = self._live()
        try:
            client, watch = await self._connected(settings)
            places = asyncio.Semaphore(settings.commands.flights)

            async def one(number: int) -> None:
                topic, payload, qos = messages[number]
                async with places:
                    await client.publish(topic, payload, qos=qos, timeout=settings.commands.puback_timeout_s)
                acknowledged[number] = True
                alive()

            everything = asyncio.gather(*(one(n) for n in range(len(messages))), return_exceptions=True)
            try:
                # aiomqtt lets a publish wait for its whole time when the connection is lost meanwhile.
                ends: list[asyncio.Future[Any]] = [everything, watch]
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if not everything.done():
                    message = "the connection was lost"
                    raise aiomqtt.MqttError(message)
                for result in everything.result():
                    if result is not None:
                        raise result
            finally:
                everything.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await everything
        except (aiomqtt.MqttError, OSError, TimeoutError, ValueError) as e:
            # ValueError: asyncio's word for a socket that closed while it was being registered.
            await self._drop()
            message = f"the broker does not take downlinks: {e}"
            raise Retry(message) from e
        except BaseException:
            await self._drop()
            raise

    async def _connected(self, settings: Settings) -> tuple[aiomqtt.Client, asyncio.Task[None]]:
        if self._client is not None and self._watch is not None and not self._watch.done():
            return self._client, self._watch
        await self._drop()
        client = _client(settings)
        await client.__aenter__()
        self._client = client

        async def watch() -> None:
            with contextlib.suppress(aiomqtt.MqttError):
                async for _ in client.messages:
                    pass  # nothing is subscribed to; the loop ends with the connection

        self._watch = asyncio.create_task(watch(), name="downlink-connection")
        log.info("mqtt_connected_for_downlinks")
        return client, self._watch

    async def _drop(self) -> None:
        client, self._client = self._client, None
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        if client is not None:
            with contextlib.suppress(aiomqtt.MqttError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await client.__aexit__(None, None, None)


def _client(settings: Settings) -> aiomqtt.Client:
    url = urlsplit(settings.mqtt.url.get_secret_value())
    if url.scheme not in DEFAULT_PORT or not url.hostname:
        message = "PRESERVARIUM_MQTT__URL: not of the form mqtt(s)://[user[:password]@]host[:port]"
        raise SettingsError(message)
    client = aiomqtt.Client(
        url.hostname,
        url.port or DEFAULT_PORT[url.scheme],
        username=unquote(url.username) if url.username is not None else None,
        password=unquote(url.password) if url.password is not None else None,
        # Never the connector's own id, which would take its session over; nor another worker's.
        identifier=f"{settings.mqtt.client_id}-down-{uuid.uuid4().hex[:12]}",
        clean_session=True,
        tls_context=tls_context(settings.mqtt) if url.scheme == "mqtts" else None,
        keepalive=settings.mqtt.keepalive_s,
        timeout=settings.commands.puback_timeout_s,
    )
    # More calls at once than this are logged; ours are bounded by the setting.
    client.pending_calls_threshold = settings.commands.flights
    return client
