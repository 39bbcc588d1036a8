"""Ids that were seen lately, in little room: what is kept where something may come a second time under another number.

A few bytes of each id's hash are kept. Two ids of a thousand have the same ones with a chance of 1 in 10**11.
"""

import base64
import binascii
from hashlib import blake2b
from typing import Final

#: Bytes of a hash; a multiple of three, so that each is a whole number of characters by itself.
_PRINT_BYTES: Final = 6
#: Characters that an id takes.
PRINT_CHARS: Final = _PRINT_BYTES * 4 // 3


class Remembered:
    """The last `ids_max` ids.

    Args:
        ids_max: the oldest beyond it is forgotten.
        text: as `text` gave it; what is no such text is forgotten, so that something may come twice and nothing is lost.
    """

    def __init__(self, ids_max: int, text: str = "") -> None:
        self._max = ids_max
        try:
            base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            text = ""
        whole = len(text) - len(text) % PRINT_CHARS
        self._prints = dict.fromkeys(text[at : at + PRINT_CHARS] for at in range(0, whole, PRINT_CHARS))

    def __contains__(self, one: str) -> bool:
        return _print(one) in self._prints

    def add(self, one: str) -> None:
        """Remember an id; one that is known becomes the newest."""
        print_ = _print(one)
        self._prints.pop(print_, None)
        self._prints[print_] = None
        if len(self._prints) > self._max:
            del self._prints[next(iter(self._prints))]

    def text(self) -> str:
        """All of it, `PRINT_CHARS` an id."""
        return "".join(self._prints)


def _print(one: str) -> str:
    return base64.b64encode(blake2b(one.encode(), digest_size=_PRINT_BYTES).digest()).decode()
