"""What every client of Kafka in this process has in common."""

import asyncio
import contextlib
from typing import Any, Final

#: For a client that was told to stop: to leave its group and to end its own tasks.
STOP_S: Final = 10.0


async def stop(client: Any, within_s: float = STOP_S) -> None:
    """Stop a client of aiokafka; whatever becomes of it is nobody's trouble.

    Never to be awaited as `client.stop()` where the caller lives on: while a broker is gone, aiokafka cancels its own
    fetches and lets their CancelledError out of `stop()`, so that the caller ends as if it had been cancelled itself,
    without a word. So it runs in a task of its own.
    """
    stopping = asyncio.ensure_future(client.stop() if hasattr(client, "stop") else client.close())
    try:
        done, _ = await asyncio.wait({stopping}, timeout=within_s)
    except asyncio.CancelledError:
        stopping.cancel()
        raise
    if not done:
        stopping.cancel()
        await asyncio.wait({stopping}, timeout=1.0)
    if stopping.done() and not stopping.cancelled():
        with contextlib.suppress(Exception):
            stopping.result()
