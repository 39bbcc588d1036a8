"""A client that is stopped takes nobody with it, whatever it does."""

import asyncio

import pytest

from preservarium import kafka_clients


class Client:
    def __init__(self, error: BaseException | None = None, *, hangs: bool = False) -> None:
        self.error, self.hangs, self.stopped = error, hangs, False

    async def stop(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        self.stopped = True


@pytest.mark.parametrize("error", [asyncio.CancelledError(), OSError("gone"), None])
async def test_what_stop_raises_stays_there(error: BaseException | None) -> None:
    client = Client(error)
    await kafka_clients.stop(client)
    assert client.stopped is (error is None)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_one_that_hangs_is_left() -> None:
    began = asyncio.get_running_loop().time()
    await kafka_clients.stop(Client(hangs=True), within_s=0.05)
    assert 0.05 <= asyncio.get_running_loop().time() - began < 5


async def test_who_is_cancelled_meanwhile_is_cancelled() -> None:
    task = asyncio.create_task(kafka_clients.stop(Client(hangs=True)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
