"""Tells the event store what people do at the door, without letting them wait for it.

What is told stands in the log at once, and is written as soon as PostgreSQL takes it. A worker that is killed before that leaves the
line of the log alone.
"""

import asyncio
import contextlib
import random
import uuid
from collections import deque
from typing import Any, Final

import structlog
from mode import Service

from preservarium.clock import Clock
from preservarium.errors import Retry
from preservarium.serving import people
from preservarium.serving.people import Roll
from preservarium.settings import LiveSettings
from preservarium.stores.people_log import UNKNOWN, Done, PeopleLog

log = structlog.get_logger(__name__)

#: Waiting to be written while the database is away; the limits of log-ins keep it from being filled by one client.
WAITING_MAX: Final = 10_000
#: The file is looked at so often, whether somebody asks or not.
FILE_EVERY_S: Final = 5.0
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
#: A worker that stops waits so long for what is not written yet.
STOP_S: Final = 2.0


class Audit(Service):
    """Of one worker."""

    abstract = False

    def __init__(self, store: PeopleLog, live: LiveSettings, clock: Clock, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._store = store
        self._live = live
        self._clock = clock
        self._waiting: deque[Done] = deque()
        self._told = asyncio.Event()
        self._digest = ""
        self.lost = 0  #: that found no place

    def tell(self, event: str, name: str, **data: Any) -> None:
        """Something was done. `name`: of whom; of one that nobody has, none is kept."""
        log.info("people", event_name=event, name=name, **data)
        if len(self._waiting) >= WAITING_MAX:
            self.lost += 1
            log.error("people_event_lost", lost=self.lost, action="PostgreSQL takes none; the log has them")
            return
        self._waiting.append(Done(uuid.uuid4().hex, event, name, self._clock.now_us(), data))
        self._told.set()

    @property
    def waiting(self) -> int:
        """Events that are not written yet."""
        return len(self._waiting)

    def look(self) -> None:
        """Tell of the file of users where it is another one than it was."""
        try:
            roll = people.current(self._live().web)
        except people.PeopleError as e:
            log.error("users_file_not_read", error=str(e))
            return
        if roll.digest and roll.digest != self._digest:
            self._digest = roll.digest
            self.tell("users_changed", "", **_summary(roll))

    @Service.task
    async def _watch(self) -> None:
        while not self.should_stop:
            self.look()
            await self.sleep(FILE_EVERY_S)

    @Service.task
    async def _write(self) -> None:
        pause_s = BACKOFF_FIRST_S
        while not self.should_stop:
            try:
                await self.flush()
                pause_s = BACKOFF_FIRST_S
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._told.wait(), 1.0)
            except Retry as e:
                log.warning("people_events_wait", waiting=len(self._waiting), error=str(e))
                await self.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    async def flush(self) -> None:
        """Write what waits, in order.

        Raises:
            Retry: PostgreSQL takes none now.
        """
        self._told.clear()
        while self._waiting:
            await self._store.append(self._waiting[0])
            self._waiting.popleft()

    async def on_stop(self) -> None:
        """Write what waits, if that is quick."""
        with contextlib.suppress(Retry, TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self.flush()


def _summary(roll: Roll) -> dict[str, Any]:
    """Who there is, without any secret."""
    return {
        "digest": roll.digest,
        "users": {user.name: user.role for user in roll.users.values()},
        # Changes with a password, says nothing of it.
        "passwords": {user.name: user.mark for user in roll.users.values()},
        "tokens": {
            token.name: {"scopes": list(token.scopes), "expires_at": token.expires_at} for token in roll.tokens.values()
        },
    }


def known(roll: Roll, name: str) -> str:
    """The name as it is recorded: one that nobody has is not."""
    return name if name in roll.users or name in roll.tokens else UNKNOWN
