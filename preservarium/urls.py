"""Addresses in settings, with users and passwords in them: read strictly, so that a wrong one is told of where it was written.

A URL has meanings of its own for `/ ? # @ : % [ ]` and blanks. Where a password holds one that is not written as `%2F`, …, drivers
take another host, another database or another password than was meant, each in its own way. What can be seen to be meant
otherwise is refused; messages never hold what was given.
"""

import ipaddress
import re
from typing import Final
from urllib.parse import SplitResult, quote, unquote, urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: What a password in a URL is written as. The order is that of a table for people.
ENCODED: Final = "@ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as %25, [ as %5B, ] as %5D, a blank as %20"
PORT_MAX: Final = 65_535
#: A name, an IPv4 address, an IPv6 address in brackets; what a resolver makes of a name is its own matter.
_HOST: Final = re.compile(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s:/?#@\[\]\\]*)")
_PLACE: Final = re.compile(rf"(?P<host>{_HOST.pattern})(?::(?P<port>[0-9]*))?")


def port_of(text: str | None) -> int | None:
    """A port, None where there is none.

    Raises:
        ValueError: it is no port.
    """
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 5 or not 1 <= int(text) <= PORT_MAX:
        message = f"a port is a number from 1 to {PORT_MAX}"
        raise ValueError(message)
    return int(text)


def places(text: str, *, wants_host: bool = True) -> list[tuple[str, int | None]]:
    """Hosts and ports of `host[:port],host[:port]`; brackets of IPv6 addresses are left out.

    Raises:
        ValueError: one is none.
    """
    found = []
    for place in text.split(","):
        match = _PLACE.fullmatch(place.strip())
        if match is None or (wants_host and not match["host"]):
            message = "is not of the form host[:port]; an IPv6 address stands in brackets"
            raise ValueError(message)
        found.append((match["host"].strip("[]"), port_of(match["port"])))
    return found


def read(url: str, *schemes: str, wants_host: bool = True, many: bool = False) -> SplitResult:
    """A URL `scheme://[user[:password]@]host[:port][/path][?query]`, checked.

    Args:
        url: as it was given.
        schemes: that it may have.
        wants_host: whether it must name a host.
        many: whether it may name several, separated by commas. `port` of what is returned cannot be asked for then.

    Raises:
        ValueError: it is none, or a password in it may be meant otherwise than it would be read; one sentence.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() not in schemes:
        message = f"is not of the form {'|'.join(schemes)}://[user[:password]@]host[:port]"
        raise ValueError(message)
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    behind = rest[len(authority) :]
    if "#" in behind or "@" in behind or any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(_meant_otherwise())
    try:
        found = urlsplit(url)
    except ValueError:
        raise ValueError(_meant_otherwise()) from None
    hosts = authority.rpartition("@")[2]
    try:
        if len(places(hosts, wants_host=wants_host)) > 1 and not many:
            message = "names several hosts, and one is needed"
            raise ValueError(message)
    except ValueError as e:
        # Without an `@`, what is no port may be a password that a `/` was taken to end.
        message = f"{e}; {_meant_otherwise()}"
        raise ValueError(message) from None
    return found


def user_of(url: SplitResult) -> tuple[str | None, str | None]:
    """User and password as they are meant; None where there is none."""
    user, password = url.username, url.password
    return unquote(user) if user is not None else None, unquote(password) if password is not None else None


def escaped(url: str) -> str:
    """A URL that was read, with user and password so that every driver takes them as they are meant: some end them at the first `@`."""
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, hosts = authority.rpartition("@")
    parts = [quote(unquote(part), safe="") for part in user.split(":", 1)]
    return f"{scheme}://{':'.join(parts)}{at}{hosts}{rest[len(authority) :]}"


def host(text: str) -> str:
    """A host alone: a name or an address, an IPv6 address without brackets.

    Raises:
        ValueError: it is none, or has a port.
    """
    if ":" in text:
        try:
            ipaddress.IPv6Address(text)
        except ValueError:
            message = "is a host without a port, which has a setting of its own"
            raise ValueError(message) from None
    elif "," in text or places(text)[0] != (text, None):
        message = "is one host"
        raise ValueError(message)
    return text


def networks_and_names(text: str) -> tuple[tuple[Network, ...], tuple[str, ...]]:
    """What a list of networks, addresses and host names holds, separated by commas; names in lower case.

    Raises:
        ValueError: an entry is none of these.
    """
    networks: list[Network] = []
    names: list[str] = []
    for entry in filter(None, (entry.strip().lower() for entry in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
        except ValueError:
            if not re.fullmatch(r"\.?[\w-]+(\.[\w-]+)*\.?", entry) or re.search(r"(^|\.)[0-9]+\.?$", entry):
                message = f"{entry!r} is neither a network (10.0.0.0/8), nor an address, nor a host name"
                raise ValueError(message) from None
            names.append(entry.rstrip("."))
    return tuple(networks), tuple(names)


def bracketed(host: str) -> str:
    """A host as a URL has it."""
    return f"[{host}]" if ":" in host else quote(host, safe="")


def _meant_otherwise() -> str:
    return f"in a URL, a user and a password are written with {ENCODED}"
