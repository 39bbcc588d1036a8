"""Waiting: for a server that is starting, for something that is to come."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from preservarium.domain.errors import PreservariumError

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 2.0


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
                message = f"{what} cannot be reached ({one_line(e)}); tried for {wait_s:g} s"
                raise error(message) from e
            # Jitter, so that several processes started together do not knock together.
            await asyncio.sleep(min(pause_s * random.uniform(0.5, 1.0), left_s))
            pause_s = min(pause_s * 2, BACKOFF_MAX_S)
        except Exception as e:
            message = f"{what} refuses: {one_line(e)}"
            raise error(message) from e


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


def one_line(e: BaseException) -> str:
    """An exception's text without line breaks; its class where it has none."""
    return " ".join(str(e).split()) or e.__class__.__name__
