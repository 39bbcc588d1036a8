"""Where notices may go: a recipient in the registry names an address, and must not reach into our own network by it.

Webhooks and Apprise reach public addresses, and of private ones those that `notices.private_destinations` names. What is looked
at is the address that a socket is about to be connected to, not the name that it was made of: a name may stand for another
address a moment later, and a server may send a client elsewhere.

For webhooks we make the sockets ourselves (aiohttp's `socket_factory`). Apprise's senders bring their own libraries; so in the
threads that they run in, Python's own audit of sockets is listened to, which every library's sockets pass.
"""

import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, Final
from urllib.parse import urlsplit
from urllib.request import getproxies

from preservarium import urls

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

SETTING: Final = "PRESERVARIUM_NOTICES__PRIVATE_DESTINATIONS"

#: IPv4 addresses as gateways translate them (RFC 6052), and as they stood in IPv6 before (RFC 4291, 2.5.5.1).
_TRANSLATED: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))


#: Of special use by IANA's registries, or once, and not said to be so by every Python: among them are addresses of the metadata
#: services of clouds.
_SPECIAL: Final = tuple(
    ipaddress.ip_network(each)
    for each in ("192.0.0.0/24", "192.88.99.0/24", "fec0::/10", "64:ff9b:1::/48", "5f00::/16", "3fff::/20")
)


class DestinationRefused(PermissionError):
    """A socket was about to be connected to an address that notices may not reach."""


@dataclass(frozen=True, slots=True)
class Destinations:
    """What `notices.private_destinations` says."""

    networks: tuple[urls.Network, ...]
    names: tuple[str, ...]

    @staticmethod
    @lru_cache(maxsize=8)
    def of(text: str) -> "Destinations":
        """Read the setting.

        Raises:
            ValueError: an entry is neither a network, nor an address, nor a name.
        """
        return Destinations(*urls.networks_and_names(text))

    def names_host(self, host: str) -> bool:
        """Whether a host is named, itself or by a name that it is below (`.example.org`)."""
        host = host.lower().rstrip(".")
        return any(host == name or (name.startswith(".") and host.endswith(name)) for name in self.names)

    def refusal(self, address: str) -> str:
        """Why an address may not be reached; "" where it may."""
        try:
            found = plain(ipaddress.ip_address(address.partition("%")[0]))
        except ValueError:
            # Not resolved yet: whatever it will stand for is not known.
            return f"{address[:100]!r} is no address: {_advice(address)}"
        if is_public(found) or any(found in network for network in self.networks if network.version == found.version):
            return ""
        return f"{found} is {_kind(found)}: {_advice(str(found))}"


def plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, where it does; else the address."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in _TRANSLATED) and int(address) > 1:  # not :: and ::1
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether the whole internet may have this address, and one machine only."""
    return address.is_global and not (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or any(address in network for network in _SPECIAL)
    )


def _kind(address: Address) -> str:
    for kind in ("unspecified", "loopback", "link_local", "multicast"):
        if getattr(address, f"is_{kind}"):
            return kind.replace("_", "-")
    return "private"


def _advice(what: str) -> str:
    return f"where notices are meant to go there, add {what} to {SETTING}"


@dataclass(slots=True)
class Errand:
    """One notice under way: where it may go, and what was refused."""

    destinations: Destinations
    #: addresses that a host which the settings name stands for
    hosts: frozenset[str] = frozenset()
    #: addresses and ports of the environment's proxies
    proxies: frozenset[tuple[str, int]] = frozenset()
    refused: list[str] = field(default_factory=list)  #: why, for each socket that was not connected

    def check(self, address: str, port: int) -> None:
        """Look at where a socket is about to be connected to.

        Raises:
            DestinationRefused: not there.
        """
        if address in self.hosts or (address, port) in self.proxies:
            return
        if why := self.destinations.refusal(address):
            self.refused.append(why)
            raise DestinationRefused(why)


def host_of(address: str) -> str:
    """The host that a URL names; "" where it names none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def addresses(host: str, port: int = 0) -> set[str]:
    """What a host stands for now; nothing where it cannot be found. Blocks."""
    try:
        return {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return set()


def proxies() -> set[tuple[str, int]]:
    """Addresses and ports of the proxies that the environment names: who set it may send us there. Blocks where there are some."""
    found: set[tuple[str, int]] = set()
    for name, url in getproxies().items():
        if name == "no":
            continue
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            continue
        found |= {(address, port) for address in addresses(host, port)}
    return found


def errand(destinations: Destinations, host: str) -> Errand:
    """An errand to a host. Blocks: the host, where the settings name it, and proxies are looked up."""
    named = addresses(host) if destinations.names_host(host) else ()
    return Errand(destinations, frozenset(named), frozenset(proxies()))


# --- threads whose sockets are others' ----------------------------------------------------------------------------------

_errand: ContextVar[Errand | None] = ContextVar("errand", default=None)
_INHERITED: Final = "_preservarium_errand"
_listening = threading.Lock()
_listens = False


@contextmanager
def watched(under_way: Errand) -> Iterator[None]:
    """Every socket that is connected in the block, in this thread and in those that it starts, is checked."""
    global _listens
    with _listening:
        if not _listens:
            # Neither can be taken away again, and both ask little: whether an event is a socket's, whether an errand is run.
            sys.addaudithook(_hear)
            threading.Thread.start = _inheriting(threading.Thread.start)  # type: ignore[method-assign, assignment]
            _listens = True
    before = _errand.set(under_way)
    try:
        yield
    finally:
        _errand.reset(before)


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and (current := _current()) is not None:
        _check(current, arguments[1])


def _inheriting(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Of threads: one that an errand starts has a context of its own, in which nothing is set, so it is told of the errand."""

    @wraps(start)
    def inherit(thread: threading.Thread) -> None:
        if (current := _current()) is not None:
            setattr(thread, _INHERITED, current)
        start(thread)

    return inherit


def _current() -> Errand | None:
    found = _errand.get()
    if found is None:
        found = getattr(threading.current_thread(), _INHERITED, None)
    return found


def _check(under_way: Errand, where: Any) -> None:
    if where is None:
        return  # sendmsg on a socket that is connected, and was checked
    if not isinstance(where, tuple) or len(where) < 2:
        what = f"{where!r:.100} is no address of the internet"
        under_way.refused.append(what)
        raise DestinationRefused(what)
    under_way.check(str(where[0]), int(where[1]))


def reasons(refused: Iterable[str]) -> str:
    """Why nothing was sent, for people: each reason once."""
    return "; ".join(dict.fromkeys(refused))
