"""The worker's board of alarms: followed from its start to its end."""

from collections.abc import Callable
from typing import Any, Final

from mode import Service

from preservarium import metrics
from preservarium.clock import Clock, SystemClock
from preservarium.operations.alarm_board import Board, follow
from preservarium.settings import Settings
from preservarium.streaming.following import Follower

#: Metrics of what stands are set this often; Prometheus asks every 15 s or so.
MEASURED_EVERY_S: Final = 5.0


class BoardFollower(Follower):
    """Keeps a board current while the worker runs."""

    what = "alarm list"

    def __init__(self, board: Board, settings: Callable[[], Settings], clock: Clock | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self._board = board
        self._settings = settings
        self._clock = clock or SystemClock()

    @property
    def current(self) -> bool:
        """Whether the board is complete and followed."""
        return self._board.ready.is_set() and not self._board.trouble

    def hindered(self, why: str) -> None:
        """What the board has stays, and it says that it may be old."""
        self._board.trouble = why

    async def read(self) -> None:
        """Follow what stands, and what became of actions."""
        await follow(self._board, self._settings(), now_us=self._clock.now_us(), stopped=lambda: self.should_stop)

    @Service.task
    async def _measure(self) -> None:
        while not self.should_stop:
            metrics.ALARM_BOARD_CURRENT.set(self._board.complete)
            if self._board.ready.is_set():
                self._board.measure(self._clock.now_us())
            await self.sleep(MEASURED_EVERY_S)
