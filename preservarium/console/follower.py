"""The worker's board of alarms: followed from its start to its end."""

import random
from collections.abc import Callable
from typing import Any, Final

import structlog
from mode import Service

from preservarium import metrics
from preservarium.clock import Clock, SystemClock
from preservarium.domain.errors import Retry
from preservarium.operating import Board, follow
from preservarium.settings import Settings

log = structlog.get_logger(__name__)

BACKOFF_FIRST_S: Final = 0.2
BACKOFF_MAX_S: Final = 10.0
#: Metrics of what stands are set this often; Prometheus asks every 15 s or so.
MEASURED_EVERY_S: Final = 5.0


class BoardFollower(Service):
    """Keeps a board current while the worker runs."""

    def __init__(self, board: Board, settings: Callable[[], Settings], clock: Clock | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self._board = board
        self._settings = settings
        self._clock = clock or SystemClock()

    @Service.task
    async def _follow(self) -> None:
        pause_s = BACKOFF_FIRST_S
        while not self.should_stop:
            try:
                await follow(
                    self._board, self._settings(), now_us=self._clock.now_us(), stopped=lambda: self.should_stop
                )
                pause_s = BACKOFF_FIRST_S
            except Exception as e:
                # What the board has stays, and it says that it may be old.
                if not self._board.trouble or not self._board.ready.is_set():
                    log.warning("alarm_board_not_followed", error=f"{type(e).__name__}: {e}")
                self._board.trouble = str(e) if isinstance(e, Retry) else f"Kafka: {type(e).__name__}"
                await self.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, BACKOFF_MAX_S)

    @Service.task
    async def _measure(self) -> None:
        while not self.should_stop:
            metrics.ALARM_BOARD_CURRENT.set(self._board.complete)
            if self._board.ready.is_set():
                self._board.measure(self._clock.now_us())
            await self.sleep(MEASURED_EVERY_S)
