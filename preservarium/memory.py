"""Memory that is free and yet held: given back to the system.

What a backlog, a rebalance or a large message needed is freed in pieces, and glibc keeps the pages between what is still in
use: a worker's resident size stays near its highest, and grows with each new peak.
"""

import ctypes
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The function of glibc; None where the C library is another one."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def give_back() -> bool:
    """Give free pages back; whether there were any. Milliseconds, where it is done often; call it in a thread.

    Other threads go on meanwhile, and wait where they allocate. Without effect where the C library is not glibc.
    """
    trim = _malloc_trim()
    return trim is not None and trim(0) == 1
