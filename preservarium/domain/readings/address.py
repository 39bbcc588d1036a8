"""Addresses of devices: one form for what is the same address in another spelling.

An EUI-64 is eight bytes and a MAC address is six, not the text that a network server, a label or a person writes for them. What is
neither is the text that it is: serial numbers, parts of topics, client ids.

The canonical form is what addresses are compared by, and the key of raw records, so that a device stays on one partition. What is
shown and stored is the spelling of the registry.
"""

import re
from functools import lru_cache
from typing import Final

#: Spellings kept: more than a worker has devices.
_CACHE_MAX: Final = 100_000
#: What stands between the bytes (70:b3:d5…), or between pairs of them (70b3.d57e.…).
SEPARATORS: Final = ("-", ":", ".", " ")

_BYTE: Final = "[0-9a-fA-F]{2}"
_MARK: Final = "[-:. ]"
_HARDWARE: Final = re.compile(
    rf"{_BYTE}(?P<a>{_MARK}?){_BYTE}(?:(?P=a){_BYTE}){{4}}(?:(?:(?P=a){_BYTE}){{2}})?"
    rf"|{_BYTE}{_BYTE}(?P<b>{_MARK}){_BYTE}{_BYTE}(?P=b){_BYTE}{_BYTE}(?:(?P=b){_BYTE}{_BYTE})?"
)
_MARKS: Final = str.maketrans("", "", "".join(SEPARATORS))


@lru_cache(maxsize=_CACHE_MAX)
def canonical_address(address: str) -> str:
    """The form of an address that all its spellings share: of an EUI-64 or a MAC lower-case hexadecimal, else the address."""
    return address.translate(_MARKS).lower() if _HARDWARE.fullmatch(address) else address


def same_address(one: str, other: str) -> bool:
    """Whether two texts are spellings of one address."""
    return one == other or canonical_address(one) == canonical_address(other)


def spellings(address: str) -> list[str]:
    """The usual spellings of an address, itself and its canonical form first."""
    canonical = canonical_address(address)
    found = [address, canonical]
    if _HARDWARE.fullmatch(address):
        for width, separators in ((2, ("", *SEPARATORS)), (4, SEPARATORS)):
            parts = [canonical[i : i + width] for i in range(0, len(canonical), width)]
            for separator in separators:
                text = separator.join(parts)
                found += [text, text.upper()]
    return list(dict.fromkeys(found))
