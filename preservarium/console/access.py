"""Who may see what: the operator token, and the headers that keep a browser from being used against us."""

import hmac
import ipaddress
from typing import Final, NoReturn

from aiohttp import web

from preservarium.settings import Web

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

#: Names under which a browser on this machine asks for us. Any other name that resolves to 127.0.0.1 may have been
#: made to by a page of a stranger (DNS rebinding).
_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
#: A request that a proxy passed on comes from the proxy's address, which says nothing about who asks.
_PROXY_HEADERS: Final = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


def _host_name(host: str) -> str:
    """The Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") <= 1 else host


def _is_loopback(address: str | None) -> bool:
    try:
        return ipaddress.ip_address(address or "").is_loopback
    except ValueError:
        return False


def _unauthorized() -> NoReturn:
    raise web.HTTPUnauthorized(
        text='{"error": "operator token missing or wrong"}',
        content_type="application/json",
        headers={"WWW-Authenticate": 'Bearer realm="preservarium"'},
    )


def require_operator(request: web.Request, token: str) -> None:
    """Let operators through.

    With a token set, the request must show it as `Authorization: Bearer …`. With none, only a request from this
    machine itself passes: loopback address, loopback host name, no proxy in between.

    Args:
        request: the request.
        token: `web.operator_token`, empty where none is set.

    Raises:
        web.HTTPUnauthorized: the token is missing or wrong.
        web.HTTPForbidden: no token is set and the request does not come from this machine.
    """
    if token:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # compare_digest: the time it takes says nothing about how much of the token was right.
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
            return
        _unauthorized()
    if (
        _is_loopback(request.remote)
        and _host_name(request.host).lower() in _LOOPBACK_NAMES
        and not any(name in request.headers for name in _PROXY_HEADERS)
    ):
        return
    raise web.HTTPForbidden(
        text='{"error": "served to loopback only: set PRESERVARIUM_WEB__OPERATOR_TOKEN"}',
        content_type="application/json",
    )


def operator_of(request: web.Request, settings: Web) -> str:
    """Let operators through who act, and say who it is.

    A token of `web.operators` proves a name; `web.operator_token`, or the machine itself where no token is set, proves
    none, and the actor is whoever the request names. Where no token is asked for, the request must come from a page of
    our own (a browser sends the machine's own requests for any page that asks it to).

    Returns:
        The name that the token proves, or "".

    Raises:
        web.HTTPUnauthorized: a token is needed, and is missing or wrong.
        web.HTTPForbidden: as `require_operator`, or a page of another origin asks.
    """
    token = settings.operator_token.get_secret_value()
    named = settings.operator_tokens
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if named and scheme.lower() == "bearer":
        # Each is compared, so that the time says nothing about which.
        found = [name for name, each in named.items() if hmac.compare_digest(given.strip().encode(), each.encode())]
        if found:
            return found[0]
    if named and not token:
        _unauthorized()
    require_operator(request, token)
    if not token:
        _require_own_page(request)
    return ""


def _require_own_page(request: web.Request) -> None:
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    origin = request.headers.get("Origin")
    if site not in ("same-origin", "none") or (origin is not None and origin.partition("://")[2] != request.host):
        raise web.HTTPForbidden(text='{"error": "asked by a page of another origin"}', content_type="application/json")
