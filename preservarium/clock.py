"""Time as a dependency: agents ask a Clock, the domain receives `now` as an argument.

All instants are whole microseconds since 1970-01-01T00:00:00Z, because that is what records carry.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from preservarium import metrics

log = structlog.get_logger(__name__)

#: A machine's clock that is set back by less than this is waited for, a µs a message; by more, it is followed.
BACK_MAX_US: Final = 10_000_000

#: A comparison that took longer says too little: what it may be wrong by is half of it.
COMPARED_WITHIN_S: Final = 10.0
#: A worker waits so long for the first comparison before it acts on the time without one; its first word to Kafka and
#: hearing it takes a second or two.
FIRST_WAIT_S: Final = 15.0


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


class StampClock:
    """A clock that says no instant twice, for what has no instant of its own: each later by 1 µs at least.

    For one process. Where the clock is set back by more than `BACK_MAX_US`, it is followed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_us = 0

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC, later than what was said before."""
        now_us = self._clock.now_us()
        if self._last_us - BACK_MAX_US < now_us <= self._last_us:
            now_us = self._last_us + 1
        self._last_us = now_us
        return now_us

    def monotonic_s(self) -> float:
        """Seconds on the monotonic clock."""
        return self._clock.monotonic_s()

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        await self._clock.sleep(seconds)


class ClockCheck:
    """Whether this machine's clock can be acted on: compared with Kafka's, and by the monotonic clock in between.

    What a worker sends comes back with the broker's time of its arrival. Since the monotonic clock only goes on, one such
    comparison is enough to see at once that the other one jumps, and that it is back. As long as nothing was compared, the
    clock is trusted, except for the first moments of a worker that is about to compare.

    Args:
        clock: the worker's.
        skew_max_s: from which difference on nothing is done for reasons of time; 0: it always is.
    """

    def __init__(self, clock: Clock, skew_max_s: Callable[[], float]) -> None:
        self._clock = clock
        self._skew_max_s = skew_max_s
        #: what to add to the monotonic clock, s, for Kafka's time, s; None: not known
        self._ahead_s: float | None = None
        self._wait_until_s: float | None = None
        self._told = True

    def expect(self) -> None:
        """A comparison is on its way."""
        self._wait_until_s = self._clock.monotonic_s() + FIRST_WAIT_S

    def compare(self, broker_us: int, sent_s: float) -> None:
        """Take a comparison: a broker's time in µs, asked for at `sent_s` of the monotonic clock, heard of now."""
        heard_s = self._clock.monotonic_s()
        if 0 <= heard_s - sent_s <= COMPARED_WITHIN_S:
            self._ahead_s = broker_us / 1e6 - (sent_s + heard_s) / 2
            self.is_sound()

    @property
    def skew_s(self) -> float | None:
        """How far the worker's clock is ahead of Kafka's; None: not known."""
        if self._ahead_s is None:
            return None
        return self._clock.now_us() / 1e6 - (self._clock.monotonic_s() + self._ahead_s)

    def is_sound(self) -> bool:
        """Whether something may be done because of what the clock says; a change is told."""
        skew_s, skew_max_s = self.skew_s, self._skew_max_s()
        if skew_s is None:
            return self._wait_until_s is None or self._clock.monotonic_s() >= self._wait_until_s
        metrics.CLOCK_SKEW_SECONDS.set(skew_s)
        sound = not skew_max_s or abs(skew_s) <= skew_max_s
        if sound and not self._told:
            log.info("clock_right_again", skew_s=round(skew_s, 1))
        elif not sound and self._told:
            log.error(
                "clock_wrong",
                skew_s=round(skew_s, 1),
                action="set this machine's clock. Nothing that time alone causes is done here until then",
            )
        self._told = sound
        return sound

    @property
    def problem(self) -> str:
        """What is wrong, for people; "" where nothing is."""
        skew_s = self.skew_s
        if skew_s is None or self.is_sound():
            return ""
        return (
            f"this machine's clock is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} Kafka's: "
            "nothing that time alone causes is done here"
        )


class ManualClock:
    """A clock that tests set: sleeping advances it, so nothing waits."""

    def __init__(self, now_us: int = 1_700_000_000_000_000) -> None:
        self._now_us = now_us
        self._start_us = now_us
        self._off_us = 0

    def now_us(self) -> int:
        """The instant last set, in microseconds since the epoch, and what `jump` has made of it."""
        return self._now_us + self._off_us

    def monotonic_s(self) -> float:
        """Seconds advanced since construction."""
        return (self._now_us - self._start_us) / 1e6

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back; the monotonic clock knows nothing of it."""
        self._off_us += round(seconds * 1e6)

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
