"""Topics over HTTP: which there are, what is in them page by page, and what comes. For operators: values are what devices said.

| request | what it answers |
|---|---|
| `GET /api/topics` | our topics: key, record, partitions, offsets |
| `GET /api/topics/{name}/messages` | a page: `?partition`, `?key`, `?text`, `?from`, `?offset`, `?limit`, `?cursor` |
| `GET /api/topics/{name}/live` | what comes, as server-sent events: `?partition`, `?key`, `?text` |

Without `from` and `offset` the newest come first, and each further page is older; with one of them, pages go on in time.
"""

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any, Final

from aiohttp import web

from preservarium.console.host import Host
from preservarium.console.replies import (
    answer,
    bad,
    cursor_of,
    instant_of,
    limit_of,
    missing,
    number_of,
    pack,
    text_of,
    wrapped,
)
from preservarium.console.streams import STREAM_S, Streams
from preservarium.errors import Retry
from preservarium.operations import browse
from preservarium.serving.rights import Right

#: Looks into Kafka at the same time, each with connections of its own.
LOOKS_MAX: Final = 3
LOOK_TIMEOUT_S: Final = 20.0
PARTITION_MAX: Final = 2**31 - 1
OFFSET_MAX: Final = 10**18 - 1


class MessageViews:
    """The views of one worker."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._looks = asyncio.Semaphore(LOOKS_MAX)
        self._streams = Streams(8)

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        get = application.router.add_get
        view = functools.partial(wrapped, right=Right.OPERATE, live=self._host.live, problems=True)
        get("/api/topics", view(self.topics, timeout_s=LOOK_TIMEOUT_S))
        get("/api/topics/{name}/messages", view(self.messages, timeout_s=LOOK_TIMEOUT_S))
        get("/api/topics/{name}/live", view(self.live, timeout_s=STREAM_S + 60))

    async def topics(self, _request: web.Request) -> web.Response:
        """Our topics, and what Kafka holds of them."""
        await self._enter()
        async with self._looks:
            found = await browse.listed(self._host.live())
        return answer({"topics": found, "at": self._host.clock.now_us()})

    async def messages(self, request: web.Request) -> web.Response:
        """A page of a topic."""
        wanted = self._wanted(request)
        cursor, at = cursor_of(request), None
        if cursor is not None:
            if len(cursor) % 2 or any(type(each) is not int or each < 0 for each in cursor):
                bad("cursor is not one of ours")
            at = dict(zip(cursor[::2], cursor[1::2], strict=True))
        await self._enter()
        async with self._looks:
            try:
                page = await browse.page(self._host.live(), request.match_info["name"], wanted, at)
            except browse.TopicUnknown as e:
                missing(str(e))
        following = [number for place in (page.next or {}).items() for number in place]
        return answer(
            {
                "records": page.records,
                "next_cursor": pack(following) if following else None,
                "scanned": page.scanned,
                "partitions": page.partitions,
                "onward": wanted.onward,
                "at": self._host.clock.now_us(),
            }
        )

    async def live(self, request: web.Request) -> web.StreamResponse:
        """What comes into a topic, as it comes."""
        wanted = self._wanted(request)
        name = request.match_info["name"]
        try:
            browse.full_name(self._host.live(), name)
        except browse.TopicUnknown as e:
            missing(str(e))

        async def events() -> AsyncIterator[dict[str, Any]]:
            try:
                async for came in browse.live(self._host.live(), name, wanted):
                    yield came
            except browse.TopicUnknown as e:
                raise Retry(str(e)) from None

        return await self._streams.send(request, events())

    def _wanted(self, request: web.Request) -> browse.Wanted:
        partition = number_of(request, "partition", -1, 0, PARTITION_MAX)
        offset = number_of(request, "offset", -1, 0, OFFSET_MAX)
        from_us = instant_of(request, "from", -1)
        if from_us >= 0 and offset >= 0:
            bad("from or offset, not both")
        return browse.Wanted(
            partition=None if partition < 0 else partition,
            key=text_of(request, "key"),
            text=text_of(request, "text"),
            from_us=None if from_us < 0 else from_us,
            offset=None if offset < 0 else offset,
            limit=limit_of(request),
        )

    async def _enter(self) -> None:
        if self._looks.locked():
            message = "others are looking into Kafka"
            raise Retry(message)
