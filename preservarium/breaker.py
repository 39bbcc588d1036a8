"""Circuit breaker: stops asking a dependency that is down, and finds out when it is back.

CLOSED: everything passes. After `failures_max` failures in a row: OPEN, nothing passes until a wait is over; waits
double, with jitter, up to a limit. Then HALF_OPEN: one caller tries; its success closes the breaker, its failure opens
it for longer. Only failures of the dependency count (`Retry`), never an input's fault or a defect of ours.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from enum import IntEnum
from types import TracebackType
from typing import Any, Final, Self

import structlog

from preservarium import metrics
from preservarium.clock import Clock, SystemClock
from preservarium.errors import Retry, reason
from preservarium.settings import Breaker as BreakerSettings
from preservarium.waiting import Broadcast

_log = structlog.get_logger(__name__)

#: Two workers that lost the same database must not come back in step.
_JITTER: Final = 0.25


class State(IntEnum):
    """A breaker's state; the numbers are the metric's."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


#: Wakes whoever waits for a dependency, when one that was down answers again.
back: Final = Broadcast()

#: name -> breaker, for health and console
_registered: dict[str, "Breaker"] = {}


def breakers() -> list["Breaker"]:
    """Every breaker of this process, by name."""
    return [_registered[name] for name in sorted(_registered)]


def is_infrastructure(error: BaseException) -> bool:
    """Whether an error says that the dependency, not the input, is at fault."""
    return error.of_dependency if isinstance(error, Retry) else isinstance(error, OSError | TimeoutError)


class Breaker:
    """Guards one dependency: `async with breaker: …` raises Retry without entering while it is open.

    Not for several event loops at once. Entering and leaving never wait.

    Args:
        name: the dependency, as metrics and health show it; a new breaker of a name replaces the old one there.
        settings: asked each time, so that a reload takes effect.
        clock: for the waits.
        counts: which exceptions open it.
        optional: a worker without it is ready all the same.
        server: what it is a part of; its own name where nothing is given. Breakers of one server come back together.
        probe: asks whether the server answers, and raises where it does not; called every few seconds, so that a worker
            with nothing to do knows it, too.
    """

    def __init__(
        self,
        name: str,
        settings: Callable[[], BreakerSettings],
        *,
        clock: Clock | None = None,
        counts: Callable[[BaseException], bool] = is_infrastructure,
        rng: random.Random | None = None,
        optional: bool = False,
        server: str = "",
        probe: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.name = name
        self.server = server or name
        self.probe = probe
        #: why the probe failed last; empty where it did not
        self.silence = ""
        self.optional = optional
        self.state = State.CLOSED
        #: what opened it last, for people
        self.reason = ""
        self._settings = settings
        self._clock = clock or SystemClock()
        self._counts = counts
        self._rng = rng or random.Random()
        self._failures = 0
        self._openings = 0  # in a row; the wait doubles with each
        self._open_until_s = 0.0
        self._probe: asyncio.Task[Any] | None = None
        _registered[name] = self
        metrics.BREAKER_STATE.labels(name).set(State.CLOSED)

    @property
    def open_for_s(self) -> float:
        """Seconds until it is tried again; 0 where it is not open."""
        if self.state is not State.OPEN:
            return 0.0
        return max(0.0, self._open_until_s - self._clock.monotonic_s())

    def report(self) -> dict[str, Any]:
        """How it stands, for people and as JSON: `state` (closed, half_open, open), `failures` in a row, `reason` (what
        opened it; empty while closed) and `tried_again_in_s`.
        """
        return {
            "state": self.state.name.lower(),
            "failures": self._failures,
            "reason": "" if self.state is State.CLOSED else self.reason,
            "tried_again_in_s": round(self.open_for_s, 3),
        }

    async def __aenter__(self) -> Self:
        """Enter.

        Raises:
            Retry: it is open, or somebody else is trying.
        """
        if self.state is State.OPEN:
            if self._clock.monotonic_s() < self._open_until_s:
                message = f"{self.name} is down, tried again in {self.open_for_s:.1f} s: {self.reason}"
                raise Retry(message)
            self._set(State.HALF_OPEN)
        if self.state is State.HALF_OPEN:
            if self._probe is not None:
                message = f"{self.name} is down, and is being tried: {self.reason}"
                raise Retry(message)
            self._probe = asyncio.current_task()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave: count what happened. A cancelled attempt says nothing about the dependency."""
        is_probe = self._probe is not None and self._probe is asyncio.current_task()
        if is_probe:
            self._probe = None
        elif self.state is not State.CLOSED:
            return  # began before it opened: the probe decides
        if error is not None and self._counts(error):
            self._failures += 1
            self.reason = reason(error)
            if is_probe or self._failures >= self._settings().failures_max:
                self._open()
        elif error is None or isinstance(error, Exception):
            self._close()

    def try_now(self) -> None:
        """Its server answers again: whoever comes next may try, whatever wait was left."""
        self._open_until_s = self._clock.monotonic_s()
        self._openings = 0

    def _open(self) -> None:
        limits = self._settings()
        # 2**16 times the first wait is over a day: beyond every limit that makes sense.
        wait_s = min(limits.open_max_s, limits.open_s * 2 ** min(self._openings, 16))
        wait_s *= 1 + _JITTER * self._rng.uniform(-1, 1)
        self._openings += 1
        self._open_until_s = self._clock.monotonic_s() + wait_s
        metrics.BREAKER_OPENED.labels(self.name).inc()
        self._set(State.OPEN)
        _log.warning("breaker opened", dependency=self.name, wait_s=round(wait_s, 2), reason=self.reason)

    def _close(self) -> None:
        was_open = self.state is not State.CLOSED
        self._failures = self._openings = 0
        self._set(State.CLOSED)
        if was_open:
            _log.info("breaker closed", dependency=self.name)
            # One has tried, and was let through; the others were sent away meanwhile.
            back.wake()

    def _set(self, state: State) -> None:
        self.state = state
        metrics.BREAKER_STATE.labels(self.name).set(state)
