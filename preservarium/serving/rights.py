"""What a handler says of who may ask it. A handler that says nothing is for operators alone."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

from aiohttp import hdrs, web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ATTRIBUTE: Final = "preservarium_right"


class Right(StrEnum):
    """Who may ask; preservarium/console/access.py decides, and connectors/http.py for senders."""

    OPEN = "open"  #: everybody: health, metrics, the pages without what they show, the description of the API
    LINK = "link"  #: whoever has a signed link: the handler checks it
    SENDER = "sender"  #: devices and gateways: `http.token`, which the handler checks
    READ = "read"  #: operators; everybody where there are none
    OPERATE = "operate"  #: operators; this machine alone where there are none


def needs(right: Right, handler: Handler) -> Handler:
    """The handler, which says of itself who may ask it."""
    setattr(handler, _ATTRIBUTE, right)
    return handler


def right_of(handler: object) -> Right | None:
    """What a handler says of itself."""
    found = getattr(handler, _ATTRIBUTE, None)
    return found if isinstance(found, Right) else None


def bearer(request: web.Request) -> bytes:
    """The token that a request shows, as bytes: compare_digest takes no other text than ASCII; b"" where there is none."""
    scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return given.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
