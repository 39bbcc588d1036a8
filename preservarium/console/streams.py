"""Server-sent events: what a page is told while it is open. A stream ends by itself after a while, and the page asks again."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, Final

import orjson
from aiohttp import web

from preservarium.console import access
from preservarium.errors import Retry

#: Streams of one worker at the same time: each holds a connection and asks a server every second.
STREAMS_MAX: Final = 32
#: Then the page connects again: rights may have changed, and proxies forget a connection that is older.
STREAM_S: Final = 300.0
#: Nothing to tell for so long: a comment, by which both sides notice that the other is gone.
BEAT_S: Final = 10.0


class Streams:
    """The streams of one worker; a semaphore with a name."""

    def __init__(self, most: int = STREAMS_MAX) -> None:
        self._most = most
        self._open = 0

    async def send(self, request: web.Request, events: AsyncIterator[Any]) -> web.StreamResponse:
        """Tell what `events` gives, each as one event of JSON, until it ends, the page goes, or `STREAM_S` have passed.

        `None` is nothing to tell. What goes wrong before the first event is answered as everywhere; after it, the stream ends.

        Raises:
            Retry: too many streams are open.
        """
        if self._open >= self._most:
            message = f"{self._most} pages are told already what comes; this one asks by itself"
            raise Retry(message)
        self._open += 1
        try:
            first = await anext(events, None)
            response = web.StreamResponse(headers={**access.HEADERS, "Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})  # fmt: skip
            await response.prepare(request)
            await self._tell(response, first)
            began_s = beat_s = monotonic()
            try:
                async for event in events:
                    if event is not None:
                        await self._tell(response, event)
                        beat_s = monotonic()
                    elif monotonic() - beat_s > BEAT_S:
                        await response.write(b": still here\n\n")
                        beat_s = monotonic()
                    if monotonic() - began_s > STREAM_S:
                        break
            except (Retry, TimeoutError, ConnectionError):
                # The page notices, and asks again by itself.
                if request.transport is not None:
                    request.transport.abort()
            return response
        finally:
            self._open -= 1
            close = getattr(events, "aclose", None)
            if close is not None:
                # The asker may be gone: what the events hold is given back all the same.
                await asyncio.shield(close())

    async def _tell(self, response: web.StreamResponse, event: Any) -> None:
        if event is not None:
            await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
