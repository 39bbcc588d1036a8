"""A step of recovery that fails, is cut off or takes too long: all begin anew, and nothing ends for good."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiokafka.errors import KafkaTimeoutError
from faust.tables.recovery import RebalanceAgain, ServiceStopped
from mode import Service

from preservarium.streaming import restoring
from preservarium.streaming.restoring import FencedRecovery


@pytest.fixture
async def recovery(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FencedRecovery]:
    """Only its waits: a service that has not been started, without app and tables."""
    monkeypatch.setattr(restoring, "RETRY_S", 0.001)
    one = FencedRecovery.__new__(FencedRecovery)
    Service.__init__(one)
    one._signal_recovery_start = asyncio.Event()
    yield one
    one._stopped.set()


async def failing(error: BaseException) -> None:
    raise error


async def cut_off() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


async def test_a_step_that_ends_is_done(recovery: FencedRecovery) -> None:
    await recovery._wait(asyncio.sleep(0), timeout=5)
    assert not recovery.signal_recovery_start.is_set()


@pytest.mark.parametrize(
    "step",
    [
        lambda: asyncio.sleep(60),  # beyond its time-out
        lambda: failing(KafkaTimeoutError()),
        lambda: failing(OSError(104, "reset")),
        lambda: failing(TimeoutError()),
        cut_off,
    ],
)
async def test_a_step_that_fails_has_recovery_begin_anew(recovery: FencedRecovery, step: Any) -> None:
    with pytest.raises(RebalanceAgain):
        await recovery._wait(step(), timeout=0.05)
    assert recovery.signal_recovery_start.is_set(), "or the loop waits for a rebalance that need not come"


async def test_a_rebalance_ends_a_step(recovery: FencedRecovery) -> None:
    asyncio.get_running_loop().call_later(0.01, recovery.signal_recovery_start.set)
    with pytest.raises(RebalanceAgain):
        await recovery._wait(asyncio.sleep(60), timeout=60)


async def test_a_stop_ends_a_step(recovery: FencedRecovery) -> None:
    asyncio.get_running_loop().call_later(0.01, recovery._stopped.set)
    with pytest.raises(ServiceStopped):
        await recovery._wait(asyncio.sleep(60), timeout=60)


async def test_a_task_that_is_ended_ends(recovery: FencedRecovery) -> None:
    task = asyncio.create_task(recovery._wait(asyncio.sleep(60), timeout=60))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not recovery.signal_recovery_start.is_set()


async def test_a_defect_is_not_hidden(recovery: FencedRecovery) -> None:
    with pytest.raises(ZeroDivisionError):
        await recovery._wait(failing(ZeroDivisionError()), timeout=5)
