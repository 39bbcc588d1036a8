"""Who may see and do what, and the headers that keep a browser from being used against us."""

import hmac
import ipaddress
from typing import Final, NoReturn

import orjson
from aiohttp import web
from aiohttp.typedefs import Middleware

from preservarium.serving import hosts
from preservarium.serving.rights import Handler, Right, bearer, right_of
from preservarium.settings import LiveSettings, Web

#: The page is one document with its own script and style and talks to its own origin; nothing else is allowed.
CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS: Final = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Everything here is about now: a copy in a cache would lie.
    "Cache-Control": "no-store",
}

#: A request that a proxy passed on comes from the proxy's address, which says nothing about who asks.
_PROXY_HEADERS: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


def admit(request: web.Request, settings: Web, right: Right) -> str:
    """Let through who has the right, and say who it is. This is the one check of everything that the web port serves.

    Where operators are configured, `web.operators` or `web.operator_token`, one of their tokens must be shown as
    `Authorization: Bearer …`, whoever asks from wherever. Where none are, everybody may read, and operate may who asks from
    this machine itself: from its loopback address, under a loopback name, with no proxy in between, and with a page of ours
    where it is a browser (which sends the machine's own requests for any page that asks it to).

    Args:
        request: the request.
        settings: of the web port, in force now.
        right: what the handler needs. OPEN, LINK and SENDER are not asked for here.

    Returns:
        The name that the token proves. "" where none is proven: with `web.operator_token`, or without tokens, the actor is
        whoever the request names.

    Raises:
        web.HTTPUnauthorized: a token is needed, and is missing or wrong.
        web.HTTPForbidden: there are no operators, and the request does not come from this machine or not from our page.
    """
    if right not in (Right.READ, Right.OPERATE):
        return ""
    shared = settings.operator_token.get_secret_value()
    tokens = {**settings.operator_tokens, **({"": shared} if shared else {})}
    if tokens:
        given = bearer(request)
        # compare_digest: the time it takes says nothing about how much of a token was right; each is compared, so that it
        # says nothing about which.
        found = [name for name, token in tokens.items() if hmac.compare_digest(given, token.encode())]
        if given and found:
            return max(found)
        raise web.HTTPUnauthorized(
            text='{"error": "operator token missing or wrong"}',
            content_type="application/json",
            headers={"WWW-Authenticate": 'Bearer realm="preservarium"'},
        )
    if right is Right.OPERATE:
        if not _from_this_machine(request):
            _forbid("served to this machine only: set PRESERVARIUM_WEB__OPERATORS or PRESERVARIUM_WEB__OPERATOR_TOKEN")
        if hosts.from_a_strangers_page(request, settings):
            _forbid("asked by a page of another origin")
    return ""


def closed(live: LiveSettings) -> Middleware:
    """Keeps what says nothing of who may ask it, as Faust's own handlers, for operators. They raise for a table that is none."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is None and right_of(request.match_info.handler) is None:
            admit(request, live().web, Right.OPERATE)
            try:
                return await handler(request)
            except LookupError:
                raise web.HTTPNotFound(
                    text='{"error": "there is no table of that name"}', content_type="application/json"
                ) from None
        return await handler(request)

    return check


def _from_this_machine(request: web.Request) -> bool:
    try:
        address = ipaddress.ip_address(request.remote or "")
    except ValueError:
        return False
    # A socket that is bound to :: shows an IPv4 peer as ::ffff:127.0.0.1, which Python 3.11 does not call loopback.
    mapped = getattr(address, "ipv4_mapped", None)
    return (
        (mapped or address).is_loopback
        and hosts.host_name(request.host).lower() in hosts.LOOPBACK_NAMES
        and not any(name in request.headers for name in _PROXY_HEADERS)
    )


def _forbid(message: str) -> NoReturn:
    raise web.HTTPForbidden(text=orjson.dumps({"error": message}).decode(), content_type="application/json")
