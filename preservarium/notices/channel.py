"""What every channel is: it takes one notice for one address, or says why not.

Three ways to fail: the server that all notices go through is in trouble (`Retry`: everything waits), this recipient is refused
or out of reach for now (`RefusedForNow`: tried for a time), or this notice is refused for good (`Reject`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from preservarium.errors import PreservariumError

#: Of what a server answers: enough to know what it means.
ANSWER_CHARS_MAX: Final = 500


class RefusedForNow(PreservariumError):
    """The recipient is refused for now; later it may not be."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One notice to one address."""

    delivery: Mapping[str, Any]  #: line of `notices`
    channel: str
    address: str

    @property
    def id(self) -> str:
        """Of the delivery: the same however often it is sent."""
        return str(self.delivery["delivery_id"])


class Channel(Protocol):
    """What sends."""

    async def send(self, notice: Notice) -> str:
        """Hand one notice over; the server's answer when it has taken it.

        Raises:
            Retry: nothing can be sent to anyone now.
            RefusedForNow: nothing can be sent to this address now.
            Reject: `notice_refused`: refused for good.
        """
        ...


def answer(text: str) -> str:
    """A server's answer on one line, cut."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:ANSWER_CHARS_MAX]
