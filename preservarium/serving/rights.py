"""What a handler says of who may ask it. A handler that says nothing is for operators alone."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Final

from aiohttp import hdrs, web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_ATTRIBUTE: Final = "preservarium_right"


class Right(StrEnum):
    """Who may ask; preservarium/console/access.py decides, and connectors/http.py for senders."""

    OPEN = (
        "open"  #: everybody: health, metrics, the pages without what they show, the description of the API, logging in
    )
    LINK = "link"  #: whoever has a signed link: the handler checks it
    SENDER = "send"  #: devices and gateways: `http.token` or a token with the scope `send`, which the handler checks
    READ = "read"  #: viewers, and all above them
    OPERATE = "operate"  #: operators: alarms, commands, fuses, state tables
    ENGINEER = "engineer"  #: engineers: what the registry says
    ADMIN = "admin"  #: administrators: who there is, and what they did


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
