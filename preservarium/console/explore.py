"""Series of any devices over HTTP: finding them, their curves in one answer, and small curves beside a list.

| request | what it answers |
|---|---|
| `GET /api/series` | series of numbers: `?q`, `?type`, `?component`, `?label` (`name=value` of a device's `meta`), `?limit`, `?cursor` |
| `GET /api/series/components` | component types and units that there are |
| `GET /api/series/curves` | curves: `?series`, `?from`, `?to`, `?points` |
| `GET /api/series/sparks` | the last hour of some series, thirty points each: `?series` |
| `GET /api/devices/{device_id}/corrections` | readings that were judged anew or derived again: `?series`, `?from`, `?to` |
| `GET /api/devices/{device_id}/live` | what is new of a device, as server-sent events |
"""

import asyncio
import functools
from collections.abc import AsyncIterator
from typing import Any, Final

from aiohttp import web

from preservarium.console.devices import POINTS_DEFAULT, device_name, series_ids, span_of
from preservarium.console.host import Host
from preservarium.console.replies import answer, bad, cursor_of, limit_of, missing, number_of, pack, text_of, wrapped
from preservarium.console.streams import STREAM_S, Streams
from preservarium.serving.rights import Right
from preservarium.stores.device_reads import POINTS_MAX, POINTS_MIN
from preservarium.stores.series_reads import MAP_SERIES_MAX, SPARK_POINTS, SPARK_US, SPARKS_MAX, SeriesReads

#: Component types that are told: more than there are words for.
COMPONENTS_MAX: Final = 500
#: A device is looked at so often for those who look at it.
NEWS_EVERY_S: Final = 1.0


class ExploreViews:
    """The views of one worker."""

    def __init__(self, host: Host, reads: SeriesReads) -> None:
        self._host = host
        self._reads = reads
        self._streams = Streams()

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        get = application.router.add_get
        read = functools.partial(wrapped, right=Right.READ, live=self._host.live, problems=True)
        get("/api/series", read(self.find))
        get("/api/series/components", read(self.components))
        get("/api/series/curves", read(self.curves, timeout_s=15.0))
        get("/api/series/sparks", read(self.sparks))
        get("/api/devices/{device_id}/corrections", read(self.corrections))
        get("/api/devices/{device_id}/live", read(self.live, timeout_s=STREAM_S + 60))

    async def find(self, request: web.Request) -> web.Response:
        """Series, in the order of their devices."""
        cursor, after = cursor_of(request), None
        if cursor is not None:
            if len(cursor) != 2 or not isinstance(cursor[0], str) or "\0" in cursor[0] or type(cursor[1]) is not int:
                bad("cursor is not one of ours")
            if not 0 <= cursor[1] < 2**31:
                bad("cursor is not one of ours")
            after = (cursor[0], cursor[1])
        label, text = None, text_of(request, "label")
        if text:
            name, is_there, value = text.partition("=")
            if not is_there or not name:
                bad("label is name=value, as a device's `meta` has it")
            label = (name, value)
        found = await self._reads.find_series(
            q=text_of(request, "q"), type_name=text_of(request, "type"), component=text_of(request, "component"),
            label=label, after=after, limit=limit_of(request),
        )  # fmt: skip
        return answer(
            {
                "series": found["series"],
                "next_cursor": pack([*found["next"]]) if found["next"] else None,
                "at": self._host.clock.now_us(),
            }
        )

    async def components(self, _request: web.Request) -> web.Response:
        """Component types, the most frequent first."""
        return answer({"components": await self._reads.components(COMPONENTS_MAX)})

    async def curves(self, request: web.Request) -> web.Response:
        """Curves of a span; the last day where none is named."""
        now_us = self._host.clock.now_us()
        from_us, to_us = span_of(request, now_us)
        series = series_ids(request, MAP_SERIES_MAX)
        if not series:
            bad("series is a list of the ids of series, separated by commas")
        points = number_of(request, "points", POINTS_DEFAULT, POINTS_MIN, POINTS_MAX)
        found = await self._reads.curves_of(series, from_us=from_us, to_us=to_us, points=points, now_us=now_us)
        if not found:
            missing("there are no such series")
        return answer({"series": found, "from": from_us, "to": to_us, "points": points, "at": now_us})

    async def sparks(self, request: web.Request) -> web.Response:
        """Small curves of the last hour: `{series_id: [mean, …]}`, null where nothing came; series without any are left out."""
        now_us = self._host.clock.now_us()
        found = await self._reads.sparks(series_ids(request, SPARKS_MAX), now_us=now_us)
        sparks: dict[str, Any] = {str(series_id): curve for series_id, curve in found.items()}
        return answer({"sparks": sparks, "points": SPARK_POINTS, "span_s": SPARK_US // 1_000_000, "at": now_us})

    async def corrections(self, request: web.Request) -> web.Response:
        """Readings of a span that are not what they were at first."""
        now_us = self._host.clock.now_us()
        from_us, to_us = span_of(request, now_us)
        series = series_ids(request, MAP_SERIES_MAX)
        found = await self._reads.corrections(series, from_us=from_us, to_us=to_us, now_us=now_us) if series else []
        return answer({"corrections": found, "from": from_us, "to": to_us, "at": now_us})

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Each second the series that were received since: `{values, at}`; nothing where nothing came."""
        device_id = device_name(request)

        async def events() -> AsyncIterator[dict[str, Any] | None]:
            since_us = self._host.clock.now_us()
            yield {"values": [], "at": since_us}
            while True:
                await asyncio.sleep(NEWS_EVERY_S)
                values = await self._reads.news(device_id, since_us=since_us)
                since_us = max([since_us, *(each["received_at"] for each in values)])
                yield {"values": values, "at": self._host.clock.now_us()} if values else None

        return await self._streams.send(request, events())
