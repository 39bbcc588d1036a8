"""Notices through Apprise: chats, pagers and whatever else it knows by a URL. An optional extra."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import tzinfo
from typing import Any
from urllib.parse import urlsplit

from preservarium.domain.errors import ReasonCode, Reject
from preservarium.notices.channel import Notice, RefusedForNow
from preservarium.notices.words import tell
from preservarium.settings import Settings


def _sender(address: str) -> tuple[Any, bool]:
    import apprise

    sender = apprise.Apprise()
    return sender, bool(sender.add(address))


class AppriseChannel:
    """What Apprise can reach. Its senders block, so each runs in a thread of Apprise's own.

    Args:
        settings: asked for each notice.
        zone: of a recipient.
        link: (line, recipient) -> where it acknowledges the alarm.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        zone: Callable[[str], tzinfo],
        link: Callable[[Mapping[str, Any], str], str | None],
    ) -> None:
        self._settings = settings
        self._zone = zone
        self._link = link

    async def send(self, notice: Notice) -> str:
        """As `Channel.send`."""
        recipient = notice.delivery["recipient"]
        scheme = urlsplit(notice.address).scheme
        try:
            # In a thread: at first use it loads over a hundred modules.
            sender, known = await asyncio.to_thread(_sender, notice.address)
        except ImportError as e:
            message = f"{recipient}: {scheme}:// needs the extra `apprise`: pip install 'preservarium[apprise]'"
            raise Reject(ReasonCode.NOTICE_REFUSED, message) from e
        if not known:
            message = f"{recipient}: {scheme}:// is no address that Apprise knows"
            raise Reject(ReasonCode.NOTICE_REFUSED, message)
        words = tell(notice.delivery, self._zone(recipient), lambda line: self._link(line, recipient))
        raised = any(line["status"] == "raised" for line in notice.delivery["lines"])
        kind = "warning" if raised else "success"
        try:
            async with asyncio.timeout(self._settings().notices.endpoint_timeout_s):
                taken = await sender.async_notify(body=words.text, title=words.subject, notify_type=kind)
        except TimeoutError as e:
            message = f"{recipient}: {scheme}:// did not answer in time"
            raise RefusedForNow(message) from e
        if not taken:
            # Apprise does not say why, so it may be for now.
            message = f"{recipient}: {scheme}:// did not take it"
            raise RefusedForNow(message)
        return f"taken by {scheme}"

    async def close(self) -> None:
        """Nothing is kept open."""
