"""A command that runs until it is told to stop: logs, signals, and a way to Kafka."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from preservarium import logs
from preservarium.clock import Clock, SystemClock
from preservarium.publish import Publisher
from preservarium.settings import LiveSettings, load

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Process:
    """What a running command has."""

    live: LiveSettings
    clock: Clock
    publisher: Publisher
    stop: asyncio.Event  #: set by SIGTERM and SIGINT


def run(main: Callable[[Process], Awaitable[T]]) -> T:
    """Run `main` until it returns; SIGTERM and SIGINT ask it to, and a second one ends at once.

    Raises:
        SettingsError: a setting is wrong.
    """
    live = LiveSettings(load())
    logs.configure(live().log_level, live().log_format)

    async def serve() -> T:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        current = asyncio.current_task()

        def asked() -> None:
            if stop.is_set() and current is not None:
                current.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked)
        publisher = Publisher(live)
        await publisher.start()
        try:
            return await main(Process(live, SystemClock(), publisher, stop))
        finally:
            await publisher.stop()

    return asyncio.run(serve())
