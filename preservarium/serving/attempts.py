"""Log-ins that failed: who has tried too often waits. Pure but for the counts; the time is given."""

import math
from collections import deque
from typing import Final

import cachetools

#: Failures that count are not older than this.
SPAN_S: Final = 900.0
#: Of one name from one client: a person mistypes twice.
PAIR_MAX: Final = 5
#: Of all names from one client: a proxy is one client, behind which many people may be.
CLIENT_MAX: Final = 50
#: Of one name from all clients: an attacker with many addresses. More than PAIR_MAX, or one of them could lock anybody out at once.
NAME_MAX: Final = 50
#: Names and clients whose failures are kept; the oldest give way.
KEYS_MAX: Final = 20_000


class Attempts:
    """Failures of late, in this worker."""

    def __init__(self) -> None:
        self._failed: cachetools.LRUCache[tuple[str, ...], deque[float]] = cachetools.LRUCache(KEYS_MAX)

    def wait_s(self, client: str, name: str, now_s: float) -> int:
        """How long this client must wait before it tries this name, in whole seconds; 0: not at all. `now_s`: monotonic."""
        return max(self._wait_s(key, most, now_s) for key, most in _keys(client, name))

    def _wait_s(self, key: tuple[str, ...], most: int, now_s: float) -> int:
        failed = self._failed.get(key)
        if not failed:
            return 0
        while failed and failed[0] <= now_s - SPAN_S:
            failed.popleft()
        return math.ceil(failed[0] + SPAN_S - now_s) if len(failed) >= most else 0

    def failed(self, client: str, name: str, now_s: float) -> None:
        """It was the wrong password. Told before the answer is known, and taken back by `succeeded`: many at once are counted, too."""
        for key, most in _keys(client, name):
            self._failed.setdefault(key, deque(maxlen=most)).append(now_s)

    def succeeded(self, client: str, name: str) -> None:
        """It was the right one: what was counted for it is forgotten, but not what the client did to others."""
        for key, _ in _keys(client, name):
            if key[0] == "pair":
                self._failed.pop(key, None)
            elif failed := self._failed.get(key):
                failed.pop()


def _keys(client: str, name: str) -> tuple[tuple[tuple[str, ...], int], ...]:
    return (("pair", client, name), PAIR_MAX), (("client", client), CLIENT_MAX), (("name", name), NAME_MAX)
