"""Who is one client, and how much of what is shared each has."""

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: A provider gives a customer at least so many bits' worth of IPv6 addresses (RFC 6177): all of them are one client.
CLIENT_PREFIX_BITS: Final = 64


def client_of(address: str | None) -> str:
    """Whom a peer's address stands for: the address, or of IPv6 its network; "" where there is none (a Unix socket)."""
    try:
        found = ipaddress.ip_address((address or "").partition("%")[0])
    except ValueError:
        return address or ""
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, CLIENT_PREFIX_BITS), strict=False))
    return str(found)


class Places:
    """How many places each client has taken."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self.total = 0

    def of(self, client: str) -> int:
        """Places that a client has."""
        return self._taken[client]

    def take(self, client: str) -> None:
        """One more."""
        self._taken[client] += 1
        self.total += 1

    def give_back(self, client: str) -> None:
        """One less."""
        self._taken[client] -= 1
        self.total -= 1
        if self._taken[client] <= 0:
            del self._taken[client]

    @contextmanager
    def taken(self, client: str) -> Iterator[None]:
        """A place for as long as the block lasts."""
        self.take(client)
        try:
            yield
        finally:
            self.give_back(client)
