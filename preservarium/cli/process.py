"""A command that runs until it is told to stop: logs, signals, and a way to Kafka."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog

from preservarium import logs
from preservarium.cli.system import load
from preservarium.clock import Clock, StampClock, SystemClock
from preservarium.settings import LiveSettings, SettingsError
from preservarium.streaming.publish import Publisher

T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Process:
    """What a running command has."""

    live: LiveSettings
    clock: Clock  #: says no instant twice: messages get theirs of it
    publisher: Publisher
    stop: asyncio.Event  #: set by SIGTERM and SIGINT


def reload(live: LiveSettings) -> None:
    """Read the settings again and say what changed; a wrong value changes nothing."""
    try:
        changes = live.reload()
    except SettingsError as e:
        log.error("settings_not_reloaded", error=str(e))
        return
    for change in changes:
        event = "setting_changed" if change.applied else "setting_needs_restart"
        log.warning(event, variable=change.variable, old=change.old, new=change.new)
    logs.set_level(live().log_level)


def run(main: Callable[[Process], Awaitable[T]]) -> T:
    """Run `main` until it returns; SIGTERM and SIGINT ask it to, and a second one ends at once. SIGHUP reads the settings again.

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
        loop.add_signal_handler(signal.SIGHUP, reload, live)
        publisher = Publisher(live)
        await publisher.start()
        try:
            return await main(Process(live, StampClock(SystemClock()), publisher, stop))
        finally:
            await publisher.stop()

    return asyncio.run(serve())
