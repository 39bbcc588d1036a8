"""What is done about refusals, over HTTP: sending them through again, or setting them aside with a reason. For operators.

| request | what it does |
|---|---|
| `POST /api/refusals/redrive` | sends the original bytes of a selection again, each once |
| `POST /api/refusals/discard` | marks a selection as not wanted, with a reason: no redrive sends it |

Both take `{codes, device, since, limit, dry_run}`; with `dry_run` they only count. They are safe to repeat.
"""

import asyncio
import functools
from typing import Any, Final

import structlog
from aiohttp import web

from preservarium.console.acting import REASON_CHARS_MAX, actor_of, body_of, flag, only, string, whole
from preservarium.console.host import Host
from preservarium.console.replies import TEXT_MAX, answer, bad, wrapped
from preservarium.errors import ReasonCode, Retry
from preservarium.operations import discarding, dlq
from preservarium.serving.rights import Right

log = structlog.get_logger(__name__)

BODY_BYTES_MAX: Final = 16_384
#: Inputs of one request: some seconds' work. A page asks again for what is left.
LIMIT_MAX: Final = 10_000
#: All of `iot_errors` is looked through, two weeks of it.
TIMEOUT_S: Final = 110.0

_CODES: Final = frozenset(map(str, ReasonCode))
_SELECTION: Final = frozenset(("codes", "device", "since", "limit", "dry_run", "actor"))


class RedriveViews:
    """The views of one worker; one such work at a time, since each reads a whole topic."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._turn = asyncio.Lock()

    def mount(self, application: web.Application) -> None:
        """Add the routes to an aiohttp application that has not started."""
        view = functools.partial(wrapped, right=Right.OPERATE, live=self._host.live, problems=True, timeout_s=TIMEOUT_S)
        application.router.add_post("/api/refusals/redrive", view(self.redrive))
        application.router.add_post("/api/refusals/discard", view(self.discard))

    async def redrive(self, request: web.Request) -> web.Response:
        """Send a selection again: `{matched, sent, already, unusable, dry_run}`."""
        asked = await body_of(request, BODY_BYTES_MAX)
        only(asked, _SELECTION)
        select, dry_run = _select(asked), flag(asked, "dry_run", default=True)
        actor = "" if dry_run else actor_of(request, asked)
        async with self._alone():
            try:
                done = await dlq.redrive(self._host.live(), select, now_us=self._host.clock.now_us(), dry_run=dry_run)
            except dlq.DlqError as e:
                raise Retry(str(e)) from None
        if not dry_run:
            log.info("redriven_by_hand", actor=actor, codes=[*select.codes], device=select.device, **done.document())
        return answer({**done.document(), "dry_run": dry_run, "limit": select.limit})

    async def discard(self, request: web.Request) -> web.Response:
        """Set a selection aside: `{matched, discarded, already, dry_run}`."""
        asked = await body_of(request, BODY_BYTES_MAX)
        only(asked, _SELECTION | {"reason"})
        select, dry_run = _select(asked), flag(asked, "dry_run", default=True)
        reason = string(asked, "reason", REASON_CHARS_MAX, default="")
        if not dry_run and not reason:
            bad("reason says why nobody wants them")
        actor = "preview" if dry_run else actor_of(request, asked)
        async with self._alone():
            try:
                done = await discarding.discard(
                    self._host.live(),
                    select,
                    reason=reason or "preview",
                    actor=actor,
                    now_us=self._host.clock.now_us(),
                    dry_run=dry_run,
                )
            except dlq.DlqError as e:
                raise Retry(str(e)) from None
        return answer({**done.document(), "dry_run": dry_run, "limit": select.limit})

    def _alone(self) -> asyncio.Lock:
        if self._turn.locked():
            message = "somebody else's redrive is under way in this worker"
            raise Retry(message)
        return self._turn


def _select(asked: dict[str, Any]) -> dlq.Select:
    codes = asked.get("codes", [])
    if not isinstance(codes, list) or not all(isinstance(code, str) and code in _CODES for code in codes):
        bad("codes is a list of reason codes, as docs/reference/errors.md has them")
    device = string(asked, "device", TEXT_MAX, default="")
    if not codes and not device:
        bad("name codes or a device: everything at once is never meant")
    since = whole(asked, "since", 0, 1 << 62) or 0
    limit = whole(asked, "limit", 1, LIMIT_MAX) or LIMIT_MAX
    return dlq.Select(tuple(codes), device or None, since, limit)
