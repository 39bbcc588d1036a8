import asyncio
import random

import pytest

from preservarium.breaker import Breaker, State, breakers
from preservarium.clock import ManualClock
from preservarium.errors import ReasonCode, Reject, Retry
from preservarium.settings import Breaker as Limits
from preservarium.stores.base import Moved


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def breaker(clock):
    limits = Limits(failures_max=3, open_s=2.0, open_max_s=30.0)
    return Breaker("test", lambda: limits, clock=clock, rng=random.Random(1))


async def attempt(breaker: Breaker, error: BaseException | None = None) -> None:
    async with breaker:
        if error is not None:
            raise error


async def fail(breaker: Breaker, times: int, error: BaseException | None = None) -> None:
    for _ in range(times):
        with pytest.raises(BaseException):
            await attempt(breaker, error or Retry("down"))


async def test_opens_after_failures_in_a_row_and_refuses_without_entering(breaker):
    await fail(breaker, 2)
    await attempt(breaker)
    await fail(breaker, 2)
    assert breaker.state is State.CLOSED
    await fail(breaker, 1)
    assert breaker.state is State.OPEN
    entered = []
    with pytest.raises(Retry, match=r"test is down.*: down"):
        async with breaker:
            entered.append(1)
    assert entered == []


@pytest.mark.parametrize(
    "error", [Reject(ReasonCode.STORE_REJECTED, "bad"), ValueError("defect"), Moved({}), asyncio.CancelledError()]
)
async def test_only_the_dependency_counts(breaker, error):
    await fail(breaker, 20, error)
    assert breaker.state is State.CLOSED


@pytest.mark.parametrize("error", [Retry("x"), OSError("x"), TimeoutError()])
async def test_what_counts(breaker, error):
    await fail(breaker, 3, error)
    assert breaker.state is State.OPEN


async def test_one_probe_at_a_time_closes_it(breaker, clock):
    await fail(breaker, 3)
    clock.advance(2.6)
    inside, release = asyncio.Event(), asyncio.Event()

    async def probe() -> None:
        async with breaker:
            inside.set()
            await release.wait()

    task = asyncio.create_task(probe())
    await inside.wait()
    assert breaker.state is State.HALF_OPEN
    with pytest.raises(Retry, match="being tried"):
        await attempt(breaker)
    release.set()
    await task
    assert breaker.state is State.CLOSED
    await attempt(breaker)


async def test_waits_double_with_jitter_up_to_the_limit(breaker, clock):
    await fail(breaker, 3)
    waits = [breaker.open_for_s]
    for _ in range(6):
        clock.advance(breaker.open_for_s + 0.001)
        await fail(breaker, 1)
        assert breaker.state is State.OPEN
        waits.append(breaker.open_for_s)
    for wait, base in zip(waits, [2, 4, 8, 16, 30, 30, 30], strict=True):
        assert base * 0.75 <= wait <= base * 1.25
    assert len(set(waits)) == 7


async def test_a_probe_that_is_cancelled_leaves_the_next_one_to_try(breaker, clock):
    await fail(breaker, 3)
    clock.advance(3)
    await fail(breaker, 1, asyncio.CancelledError())
    assert breaker.state is State.HALF_OPEN
    await attempt(breaker)
    assert breaker.state is State.CLOSED


async def test_what_began_before_it_opened_decides_nothing(breaker, clock):
    started, release = asyncio.Event(), asyncio.Event()

    async def slow(error: BaseException | None) -> None:
        async with breaker:
            started.set()
            await release.wait()
            if error is not None:
                raise error

    tasks = [asyncio.create_task(slow(e)) for e in (None, Retry("late"))]
    await started.wait()
    await fail(breaker, 3)
    wait_s = breaker.open_for_s
    release.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert breaker.state is State.OPEN
    assert breaker.open_for_s == wait_s


async def test_a_success_starts_the_waits_anew(breaker, clock):
    for _ in range(2):
        await fail(breaker, 3)
        assert breaker.open_for_s <= 2.5
        clock.advance(3)
        await attempt(breaker)


def test_health_finds_them_by_name(breaker):
    assert breaker in breakers()


async def test_its_report_says_what_opened_it_and_when_it_is_tried_again(breaker, clock):
    assert breaker.report() == {"state": "closed", "failures": 0, "reason": "", "tried_again_in_s": 0.0}
    await fail(breaker, 3)
    report = breaker.report()
    assert 1.5 <= report.pop("tried_again_in_s") <= 2.5
    assert report == {"state": "open", "failures": 3, "reason": "down"}
    clock.advance(3)
    await attempt(breaker)
    assert breaker.report() == {"state": "closed", "failures": 0, "reason": "", "tried_again_in_s": 0.0}
