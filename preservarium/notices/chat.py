"""Notices through Apprise: chats, pagers and whatever else it knows by a URL. An optional extra."""

import asyncio
from collections.abc import Callable, Mapping
from datetime import tzinfo
from typing import Any

from preservarium.errors import ReasonCode, Reject
from preservarium.notices.channel import Notice, RefusedForNow, answer
from preservarium.notices.destinations import Destinations, errand, host_of, reasons, watched
from preservarium.notices.words import tell
from preservarium.settings import Settings


def _load() -> None:
    """Load Apprise: over a hundred modules, which is no part of a notice's time."""
    import apprise  # noqa: F401


def _notify(address: str, destinations: Destinations, words: Mapping[str, str]) -> tuple[bool, bool, list[str]]:
    """Whether Apprise knows the address, whether it was taken, and what may not be reached. Blocks."""
    import apprise

    sender = apprise.Apprise()
    under_way = errand(destinations, host_of(address))
    with watched(under_way):
        if not sender.add(address):
            return False, False, under_way.refused
        return True, bool(sender.notify(**words)), under_way.refused


class AppriseChannel:
    """What Apprise can reach. Its senders block, so they run in a thread, where each of their sockets is looked at: a sender goes
    wherever a server sends it.

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
        settings = self._settings().notices
        scheme = notice.address.partition("://")[0][:40]
        words = tell(notice.delivery, self._zone(recipient), lambda line: self._link(line, recipient))
        raised = any(line["status"] == "raised" for line in notice.delivery["lines"])
        kind = "warning" if raised else "success"
        given = {"body": words.text, "title": words.subject, "notify_type": kind}
        destinations = Destinations.of(settings.private_destinations)
        try:
            await asyncio.to_thread(_load)
            async with asyncio.timeout(settings.endpoint_timeout_s):
                known, taken, refused = await asyncio.to_thread(_notify, notice.address, destinations, given)
        except ImportError as e:
            message = f"{recipient}: {scheme}:// needs the extra `apprise`: pip install 'preservarium[apprise]'"
            raise Reject(ReasonCode.NOTICE_REFUSED, message) from e
        except TimeoutError as e:
            message = f"{recipient}: {scheme}:// did not answer in time"
            raise RefusedForNow(message) from e
        if not known:
            message = f"{recipient}: {scheme}:// is no address that Apprise knows"
            raise Reject(ReasonCode.NOTICE_REFUSED, message)
        if not taken and refused:
            message = answer(f"{recipient}: {scheme}:// may not be reached: {reasons(refused)}")
            raise RefusedForNow(message)
        if not taken:
            # Apprise does not say why, so it may be for now.
            message = f"{recipient}: {scheme}:// did not take it"
            raise RefusedForNow(message)
        return f"taken by {scheme}"

    async def close(self) -> None:
        """Nothing is kept open."""
