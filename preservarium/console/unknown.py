"""Devices that send and that nobody registered, over HTTP, each with the parsers that understand it. For operators.

`GET /api/unknown-devices`: `?device` for one alone, `?limit`. All of `iot_errors` is looked through and payloads are tried with every
parser, so an answer is kept for a while, and `age_s` says for how long.
"""

import asyncio
from contextlib import aclosing
from time import monotonic
from typing import Any, Final

from aiohttp import web

from preservarium.console.decoding import Bench
from preservarium.console.host import Host
from preservarium.console.replies import answer, limit_of, text_of, wrapped
from preservarium.errors import Fatal, Retry
from preservarium.operations import dlq, unknown_devices
from preservarium.serving.rights import Right
from preservarium.stores.registry_reads import RegistryReads

#: An answer is given again for so long: a page asks often, and the work is some seconds.
KEPT_S: Final = 15.0
#: Addresses whose payloads are tried: each with every parser.
TRIED_MAX: Final = 50
TIMEOUT_S: Final = 55.0
#: Since when is looked: a device sends at least once a day.
SPAN_US: Final = 2 * 86_400_000_000


class UnknownViews:
    """The view of one worker."""

    def __init__(self, host: Host, reads: RegistryReads, bench: Bench) -> None:
        self._host = host
        self._reads = reads
        self._bench = bench
        self._turn = asyncio.Lock()
        self._kept: dict[str, tuple[float, dict[str, Any]]] = {}

    def mount(self, application: web.Application) -> None:
        """Add the route to an aiohttp application that has not started."""
        application.router.add_get(
            "/api/unknown-devices",
            wrapped(self.list, Right.OPERATE, self._host.live, timeout_s=TIMEOUT_S, problems=True),
        )

    async def list(self, request: web.Request) -> web.Response:
        """Addresses, the busiest first: `{unknown, addresses, others, types, age_s}`."""
        device, limit = text_of(request, "device"), min(limit_of(request), TRIED_MAX)
        # Whoever asks at the same time gets the same answer.
        async with self._turn:
            kept = self._kept.get(device)
            if kept is None or monotonic() - kept[0] > KEPT_S:
                found = await self._look(device)
                kept = monotonic(), found
                self._kept = {name: each for name, each in self._kept.items() if monotonic() - each[0] < KEPT_S}
                self._kept[device] = kept
        at_s, found = kept
        shown = {**found, "unknown": found["unknown"][:limit], "age_s": round(monotonic() - at_s, 1)}
        return answer({**shown, "at": self._host.clock.now_us()})

    async def _look(self, device: str) -> dict[str, Any]:
        settings = self._host.live()
        since_us = max(0, self._host.clock.now_us() - SPAN_US)
        select = dlq.Select(unknown_devices.CODES, device or None, since_us)
        try:
            async with aclosing(dlq.letters(settings, select)) as letters:
                tally = await unknown_devices.tally(letters, settings.normalize.payload_bytes_max)
        except dlq.DlqError as e:
            raise Retry(str(e)) from None
        addresses = [each.device for each in tally.by_address.values()]
        left = tally.without(await self._reads.registered(addresses) if addresses else ())
        documents = await self._reads.matching()
        asked = left[:TRIED_MAX]
        note = None
        try:
            fits = await unknown_devices.Matcher(documents, self._bench).fits(asked)
        except Fatal as e:
            note = f"Scripts are left out: {e}."
            fits = await unknown_devices.Matcher(documents, None).fits(asked)
        return {
            "unknown": [unknown_devices.document(one, of) for one, of in zip(asked, fits, strict=True)],
            "addresses": len(left),
            "others": tally.others,
            "types": sorted(each["name"] for each in documents["type"]),
            "note": note,
        }
