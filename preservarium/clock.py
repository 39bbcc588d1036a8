"""Time as a dependency: agents ask a Clock, the domain receives `now` as an argument.

All instants are whole microseconds since 1970-01-01T00:00:00Z, because that is what records carry.
"""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC. May step when the machine's clock is corrected."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back, for durations."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`; cancellable."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        return time.time_ns() // 1_000

    def monotonic_s(self) -> float:
        """Seconds on the monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleep on the event loop."""
        await asyncio.sleep(seconds)


class ManualClock:
    """A clock that tests set: sleeping advances it, so nothing waits."""

    def __init__(self, now_us: int = 1_700_000_000_000_000) -> None:
        self._now_us = now_us
        self._start_us = now_us

    def now_us(self) -> int:
        """The instant last set, in microseconds since the epoch."""
        return self._now_us

    def monotonic_s(self) -> float:
        """Seconds advanced since construction."""
        return (self._now_us - self._start_us) / 1e6

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` (not negative)."""
        if seconds < 0:
            message = f"a clock does not go back: {seconds} s"
            raise ValueError(message)
        self._now_us += round(seconds * 1e6)

    async def sleep(self, seconds: float) -> None:
        """Advance instead of waiting, and yield once to the event loop."""
        self.advance(seconds)
        await asyncio.sleep(0)
