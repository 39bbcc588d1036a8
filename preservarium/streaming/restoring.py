"""Taking tables over: fences first, then restored from the changelogs, then open to stages.

Faust's recovery does the reading; this puts our steps before and behind it (fencing.py says why).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import structlog
from aiokafka.errors import KafkaError
from faust.tables.manager import TableManager
from faust.tables.recovery import RebalanceAgain, Recovery, ServiceStopped
from faust.types import TP

from preservarium import metrics
from preservarium.errors import Retry, reason
from preservarium.streaming.state import StateTable

log = structlog.get_logger(__name__)

#: Between two tries to reach Kafka; a rebalance or stop ends the wait.
RETRY_S: Final = 0.5


class FencedRecovery(Recovery):
    """Faust's recovery of tables, of partitions that are fenced before it looks how far to read."""

    async def _wait(self, coro: Any, timeout: Any = None) -> None:
        """A step: to its end, or until a rebalance or stop. One that fails is no reason to give up: all begin anew.

        Raises:
            RebalanceAgain: recovery begins anew.
            ServiceStopped: the worker stops.
        """
        # Hook: each step of recovery. Faust takes a time-out for a stop, and mode a cancelled future for the end of the task:
        # either ended recovery for good, silently, and the worker stayed in its group without ever working again.
        try:
            waited = await self.wait_first(coro, self.signal_recovery_start, timeout=timeout)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            why = "what it waited for was cancelled"
        except (KafkaError, OSError, TimeoutError) as e:
            why = reason(e)
        else:
            if self.should_stop:
                raise ServiceStopped
            if self.signal_recovery_start in waited.done:
                raise RebalanceAgain
            if not waited.stopped:
                return
            why = f"it took longer than {timeout} s"
        log.warning("restoring_begins_anew", reason=why)
        metrics.RESTORES_ANEW.inc()
        await asyncio.sleep(RETRY_S)
        self.signal_recovery_start.set()
        raise RebalanceAgain

    async def _build_highwaters(self, consumer: Any, tps: set[TP], destination: Any, title: str) -> None:
        # Hook: the first thing that recovery asks of the partitions that it is to restore.
        if title == "active":
            generation = self.app.consumer_generation_id
            await self._each(tps, lambda table, partition: table.fence(partition, generation))
        await super()._build_highwaters(consumer, tps, destination, title)

    async def on_recovery_completed(self, generation_id: int = 0) -> None:
        """Restored: open the tables, before streams resume."""
        if generation_id == self.app.consumer_generation_id:
            await self._each(self.active_tps, lambda table, partition: table.restored(partition))
        await super().on_recovery_completed(generation_id)

    async def _each(self, tps: Iterable[TP], step: Callable[[StateTable, int], Awaitable[None]]) -> None:
        tables = {table.changelog: table for table in self.app.state_tables.values()}
        generation = self.app.consumer_generation_id

        async def one(tp: TP) -> None:
            said = False
            while generation == self.app.consumer_generation_id and not self.should_stop:
                try:
                    await step(tables[tp.topic], tp.partition)
                    return
                except Retry as e:
                    if not said:
                        log.warning("table_not_taken_over", topic=tp.topic, partition=tp.partition, error=str(e))
                        said = True
                    await asyncio.sleep(RETRY_S)

        await asyncio.gather(*(one(tp) for tp in tps if tp.topic in tables))


class FencedTables(TableManager):
    """Faust's tables, recovered with fences."""

    _recovery: FencedRecovery | None

    @property
    def recovery(self) -> FencedRecovery:
        """The recovery service."""
        # Hook: where Faust makes it.
        if self._recovery is None:
            self._recovery = FencedRecovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery
