"""Waiting: for a server that is starting, for something that is to come."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Final

from preservarium.errors import PreservariumError, reason

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 2.0
#: Who stands in line says so this often; well within what any step may take.
LINE_S: Final = 5.0

#: Who is told that the work which is under way in this context goes on.
watcher: Final[ContextVar[Callable[[], None] | None]] = ContextVar("watcher", default=None)


def alive() -> None:
    """Say that work goes on: called between the steps of something long, so that it is not taken for stuck."""
    if (told := watcher.get()) is not None:
        told()


async def until_up(
    what: str,
    attempt: Callable[[], Awaitable[Any]],
    *,
    not_yet: tuple[type[Exception], ...],
    wait_s: float,
    error: type[PreservariumError],
) -> Any:
    """What `attempt` returns, tried again with back-off and jitter while it raises one of `not_yet`.

    Args:
        what: the server, for people.
        attempt: connects.
        not_yet: errors of a server that is starting or cannot be reached; any other is final.
        wait_s: how long to go on trying; 0 tries once.
        error: what is raised in the end.

    Raises:
        PreservariumError: of class `error`: not up within `wait_s`, or it refuses us.
    """
    deadline = time.monotonic() + wait_s
    pause_s = BACKOFF_FIRST_S
    while True:
        try:
            return await attempt()
        except not_yet as e:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                message = f"{what} cannot be reached ({one_line(e)})" + (f"; tried for {wait_s:g} s" if wait_s else "")
                raise error(message) from e
            # Jitter, so that several processes started together do not knock together.
            await asyncio.sleep(min(pause_s * random.uniform(0.5, 1.0), left_s))
            pause_s = min(pause_s * 2, BACKOFF_MAX_S)
        except Exception as e:
            message = f"{what} refuses: {one_line(e)}"
            raise error(message) from e


@asynccontextmanager
async def in_line(lock: asyncio.Lock) -> AsyncIterator[None]:
    """Hold a lock. Whoever stands in line for it is alive: how long that takes is the affair of the one who has it."""
    if lock.locked():
        acquiring = asyncio.create_task(_acquire(lock))
        try:
            while not (await asyncio.wait({acquiring}, timeout=LINE_S))[0]:
                alive()
        except asyncio.CancelledError:
            if not acquiring.cancel():
                lock.release()
            raise
    else:
        await lock.acquire()
    try:
        yield
    finally:
        lock.release()


async def _acquire(lock: asyncio.Lock) -> None:
    await lock.acquire()


class Waiters(dict[str, list[asyncio.Event]]):
    """Who waits for what, by key; a key is there while somebody waits for it."""

    def wake(self, key: str) -> None:
        """Let all who wait for it go on."""
        for event in self.pop(key, ()):
            event.set()

    async def wait(self, key: str, timeout_s: float) -> None:
        """Wait until it is woken, at most so long."""
        event = asyncio.Event()
        self.setdefault(key, []).append(event)
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            events = self.get(key, [])
            if event in events:
                events.remove(event)
            if not events:
                self.pop(key, None)


class Broadcast:
    """Wakes everybody who waits for it; whoever comes later waits anew. For one event loop."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Timeout] = set()

    def wake(self) -> None:
        """Let all who wait go on."""
        waiting, self._waiting = self._waiting, set()
        for pause in waiting:
            pause.reschedule(asyncio.get_running_loop().time())

    async def or_after(self, pause: Awaitable[None]) -> None:
        """Return when `pause` is over, or earlier when somebody wakes us."""
        try:
            async with asyncio.timeout(None) as limit:
                self._waiting.add(limit)
                try:
                    await pause
                finally:
                    self._waiting.discard(limit)
        except TimeoutError:
            pass  # woken


def one_line(e: BaseException) -> str:
    """Why, for people; `errors.reason`."""
    return reason(e)
