"""Preservarium: the stream engine for IoT readings.

`faust -A preservarium worker` finds the app as `preservarium.app`. It is made on first use (PEP 562), so
importing a domain module loads neither Faust nor a driver.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preservarium.streaming.app import app as app

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "app":
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    import importlib

    _join()
    engine = importlib.import_module("preservarium.streaming.app")
    # Agents import the app from the engine, so they are imported after it and by name:
    # the direction of imports stays agents -> tables -> engine.
    importlib.import_module("agents").load()
    for room in ("console", "connectors"):
        importlib.import_module(f"preservarium.{room}.wiring").install(engine.app)
    # Kept as an attribute: from now on Python finds it without asking here, so nothing is installed twice.
    globals()["app"] = engine.app
    return engine.app


def _join() -> None:
    """Make a worker that is started by hand one of the `up` that runs here; said in one line on stderr."""
    import sys

    from preservarium.embedded.joining import join_as_worker
    from preservarium.errors import PreservariumError
    from preservarium.settings import SettingsError

    try:
        said = join_as_worker()
    except (PreservariumError, SettingsError) as e:
        print(f"preservarium: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    if said:
        print(said, file=sys.stderr)
