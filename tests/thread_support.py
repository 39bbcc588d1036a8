"""Coroutines in synchronous fixtures."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any


def in_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end from a synchronous fixture, without touching the test's own event loop."""
    result: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(coroutine))
        except BaseException as e:
            error.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if error:
        raise error[0]
    return result[0]
