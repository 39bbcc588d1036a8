"""A publisher in memory, for connectors; what it keeps is what Kafka would have acknowledged. Our web server, for tests' clients."""

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web
from aiohttp.test_utils import TestServer

from preservarium import topics
from preservarium.errors import ReasonCode, Reject, Retry
from preservarium.serving import server
from preservarium.settings import LiveSettings
from preservarium.streaming.stage import Send


class MemoryPublisher:
    """Acknowledges everything, unless told to fail; `gate` holds calls back until it is set."""

    def __init__(self) -> None:
        self.sends: list[Send] = []
        self.calls: list[int] = []
        self.failures = 0
        self.value_bytes_max: int | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish(self, sends: Sequence[Send]) -> None:
        self.calls.append(len(sends))
        await self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise Retry("Kafka is down")
        if self.value_bytes_max is not None and any(len(s.value or b"") > self.value_bytes_max for s in sends):
            raise Reject(ReasonCode.OUTPUT_TOO_LARGE, "too large")
        self.sends += sends

    def lines(self, topic: topics.Topic = topics.RAW) -> list[dict[str, Any]]:
        return [orjson.loads(line) for s in self.sends if s.topic is topic for line in (s.value or b"").split(b"\n")]


class OurServer(TestServer):
    """An application behind our door, as workers and `preservarium connect http` serve it."""

    __test__ = False

    def __init__(self, application: web.Application, live: LiveSettings, **keywords: Any) -> None:
        super().__init__(application, **keywords)
        self._ours = server.install(application, live)

    async def _make_runner(self, **_keywords: Any) -> web.BaseRunner:
        return self._ours
