"""Refusals over HTTP: what was refused of late, by cause, with its original bytes, why, and what to do.

Followed from Kafka by the worker that is asked, from the first question on and until nobody has asked for a while.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

from aiohttp import web

from preservarium.clock import Clock
from preservarium.console.host import Host
from preservarium.console.replies import answer, bad, cursor_of, limit_of, missing, pack, text_of, wrapped
from preservarium.errors import Retry
from preservarium.operations import dlq
from preservarium.operations.refusals import BUCKET_S, SPAN_S, Kept, Refusals, bytes_of, follow
from preservarium.serving.rights import Right
from preservarium.settings import Settings
from preservarium.streaming.following import Follower

#: A page asks every few seconds; a tab that is hidden for so long is read anew when it is looked at.
IDLE_S: Final = 120.0
#: The first questions wait so long for what is being read.
FIRST_S: Final = 3.0
#: Original bytes in a list, and of one refusal.
SAMPLE_BYTES_MAX: Final = 2_048
ORIGINAL_BYTES_MAX: Final = 65_536
#: Looks into Kafka for one refusal, each with a connection of its own.
LOOKS_MAX: Final = 2
LOOK_TIMEOUT_S: Final = 15.0


class RefusalsFollower(Follower):
    """Keeps `Refusals` current for as long as somebody asks for them."""

    what = "refusals"

    def __init__(self, refusals: Refusals, settings: Callable[[], Settings], clock: Clock, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._refusals = refusals
        self._settings = settings
        self._clock = clock
        self._asked = asyncio.Event()
        self._asked_s = 0.0

    def asked(self) -> None:
        """Somebody looks."""
        self._asked_s = self._clock.monotonic_s()
        self._asked.set()

    @property
    def current(self) -> bool:
        """Whether everything was read, and is followed."""
        return self._refusals.ready.is_set() and not self._refusals.trouble

    def hindered(self, why: str) -> None:
        """What was read stays, and it is said that it may be old."""
        self._refusals.trouble = why

    def _idle(self) -> bool:
        return self._clock.monotonic_s() - self._asked_s > IDLE_S

    async def read(self) -> None:
        """Wait until somebody asks, then follow until nobody does."""
        await self.wait(self._asked.wait())
        if self.should_stop:
            return
        now_us = self._clock.now_us()
        await follow(
            self._refusals, self._settings(), now_us=now_us, stopped=lambda: bool(self.should_stop) or self._idle()
        )
        if self._idle():
            self._asked.clear()
            self._refusals.clear()
            self._refusals.trouble = "not read yet"


class RefusalViews:
    """The views of one worker.

    Args:
        host: the app.
        refusals: what is followed.
        asked: told each time that somebody looks.
    """

    def __init__(self, host: Host, refusals: Refusals, asked: Callable[[], None]) -> None:
        self._host = host
        self._refusals = refusals
        self._asked = asked
        self._looks = asyncio.Semaphore(LOOKS_MAX)
        self._began_s: float | None = None  #: when somebody began to wait for the first reading, monotonic

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        read = functools.partial(wrapped, right=Right.READ, live=self._host.live, problems=True)
        application.router.add_get("/api/refusals", read(self.list))
        application.router.add_get("/api/refusals/{refusal_id}", read(self.show, timeout_s=LOOK_TIMEOUT_S + 5))

    async def list(self, request: web.Request) -> web.Response:
        """Causes of the last day over time, and the newest refusals: `?stage`, `?code`, `?device`, `?limit`, `?cursor`."""
        stage, code, device = (text_of(request, name) for name in ("stage", "code", "device"))
        cursor, limit = cursor_of(request), limit_of(request)
        if cursor is not None and (len(cursor) != 2 or any(type(each) is not int for each in cursor)):
            bad("cursor is not one of ours")
        self._asked()
        refusals = self._refusals
        await self._read()
        page, following = refusals.newest(
            stage=stage, code=code, device_id=device, before=(cursor[0], cursor[1]) if cursor else None, limit=limit
        )
        now_us = self._host.clock.now_us()
        return answer(
            {
                "causes": refusals.causes(now_us),
                "span_s": SPAN_S,
                "bucket_s": BUCKET_S,
                "refusals": [_document(kept.id, kept.line, SAMPLE_BYTES_MAX) for kept in page],
                "next_cursor": pack([*following]) if following else None,
                "unknown_devices": refusals.unknown(now_us),
                "since": refusals.since_us,
                "complete": refusals.ready.is_set() and not refusals.trouble and not refusals.cut,
                "note": self._note(),
                "at": now_us,
            }
        )

    async def _read(self) -> None:
        """Wait for the first reading, of all who ask together no longer than `FIRST_S`: a page asks again."""
        if self._refusals.ready.is_set():
            self._began_s = None
            return
        now_s = monotonic()
        if self._began_s is None:
            self._began_s = now_s
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._refusals.ready.wait(), max(0.0, self._began_s + FIRST_S - now_s))

    def _note(self) -> str | None:
        if not self._refusals.ready.is_set():
            return f"The refusals are being read from Kafka ({self._refusals.trouble})."
        if self._refusals.trouble:
            return f"The refusals are not followed now ({self._refusals.trouble}): what is shown may be old."
        if self._refusals.cut:
            return "There were more than are shown here: only the newest were read. `preservarium dlq list` reads all."
        return None

    async def show(self, request: web.Request) -> web.Response:
        """One refusal with its original bytes, out of `iot_raw_data` where its line has none."""
        identity = request.match_info["refusal_id"]
        kept: Kept | None = self._refusals.get(identity)
        settings = self._host.live()
        if self._looks.locked():
            message = "others are looking into Kafka"
            raise Retry(message)
        async with self._looks, asyncio.timeout(LOOK_TIMEOUT_S):
            try:
                letter = dlq.Letter(identity, kept.line) if kept else await dlq.letter(settings, identity)
                original = bytes_of(letter.line)
                if original is None:
                    original = await dlq.original(settings, letter)
            except dlq.NoSuchError as e:
                missing(str(e))
            except dlq.DlqError as e:
                raise Retry(str(e)) from None
        return answer(_document(identity, letter.line, ORIGINAL_BYTES_MAX, original))


def _document(identity: str, line: Mapping[str, Any], bytes_max: int, original: bytes | None = None) -> dict[str, Any]:
    """A refusal as JSON: its line, with the original bytes as hexadecimal and as text."""
    original = bytes_of(line) if original is None else original
    cut = (original or b"")[:bytes_max]
    return {
        "id": identity,
        **{name: value for name, value in line.items() if name not in ("raw", "raw_b64", "envelope")},
        "at": line.get("last_seen"),
        "original": None
        if original is None
        else {"bytes": len(original), "hex": cut.hex(), "text": _text(cut), "cut": len(cut) < len(original)},
    }


def _text(data: bytes) -> str:
    """As text; what is none is shown as such."""
    return data.decode("utf-8", "replace").replace("\0", "␀")
