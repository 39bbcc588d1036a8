"""Under which names we are served, and whose pages may ask.

A page of a stranger can let its own name resolve to our address (DNS rebinding); the browser then takes us for that page's
server and shows it what we answer. It cannot do so with a name that is not its own, nor with an address: so a `Host` is taken
that is an address, or a name that we know to be ours.
"""

import ipaddress
import socket
from typing import Final
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from preservarium.settings import Web

#: Under these a browser on this machine asks for us.
LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
#: Content types that a page may send to any origin without asking it first (Fetch standard, "CORS-safelisted").
SIMPLE_TYPES: Final = frozenset({"text/plain", "application/x-www-form-urlencoded", "multipart/form-data"})


def host_name(host: str) -> str:
    """A Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") <= 1 else host


def is_address(name: str) -> bool:
    """Whether it is an IP address as browsers write one."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _own_names(settings: Web) -> frozenset[str]:
    names = {"localhost", settings.host, urlsplit(settings.public_url).hostname or ""}
    if settings.host not in LOOPBACK_NAMES:
        # Bound to an address of this machine: then its name is ours.
        name = socket.gethostname()
        names |= {name, name.partition(".")[0]}
    return frozenset(name.lower().rstrip(".") for name in names) - {""}


def is_ours(host: str, settings: Web) -> bool:
    """Whether we are served under this Host header."""
    name = host_name(host).lower().rstrip(".")
    if not host or is_address(name) or name in _own_names(settings):
        # No name at all is sent by old programs, and by no browser.
        return True
    return any(
        entry in ("*", name) or (entry.startswith(".") and name.endswith(entry)) for entry in settings.allowed_names
    )


def misaddressed(request: web.Request, settings: Web) -> str:
    """Why a request is not for us; "" where it is."""
    hosts = request.headers.getall(hdrs.HOST, [])
    if len(hosts) > 1:
        return "a request has one Host"
    # The request line may name a host, too, as for a proxy; `request.host` is then that one.
    named = [*hosts, request.host] if "://" in request.raw_path.partition("?")[0] else hosts
    for host in named:
        if not is_ours(host, settings):
            name = host_name(host)[:100]
            return (
                f"this is not served under the name {name!r}: if it is yours, add it to PRESERVARIUM_WEB__ALLOWED_HOSTS"
            )
    return ""


def from_a_strangers_page(request: web.Request, settings: Web) -> bool:
    """Whether a browser sends this for a page that is not ours; programs that are no browsers send none of these headers."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = request.headers.get(hdrs.ORIGIN)
    return origin is not None and not _own_origin(origin, request, settings)


def _own_origin(origin: str, request: web.Request, settings: Web) -> bool:
    scheme, separator, place = origin.lower().partition("://")
    if not separator or not place:
        return False  # `null`: a sandboxed page, a file
    if place == request.host.lower():
        return True
    # A proxy may ask for us under another name than the one that people see.
    public = urlsplit(settings.public_url.lower())
    return bool(public.netloc) and (scheme, place) == (public.scheme, public.netloc)
