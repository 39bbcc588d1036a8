"""Agents: thin Faust wiring, one file a stage. Run from a checkout or an editable install; no wheel carries this name."""

import importlib
from pathlib import Path
from typing import Final

if not (Path(__file__).parent.parent / "preservarium").is_dir():
    raise ImportError(f"this is not Preservarium's package `agents`: {__file__}")  # noqa: EM102

#: Every agent, in the order of the flow.
AGENTS: Final = (
    "registry",
    "employees",
    "normalize",
    "validate",
    "aggregate",
    "anomaly",
    "alarm",
    "notices",
    "notify",
    "commands",
    "downlink",
    "sink",
    "sync",
    "extract",
)


def load() -> None:
    """Import the agents that the settings enable; importing one declares its stage.

    Raises:
        ValueError: the setting names an agent that there is not.
    """
    from preservarium.streaming.app import app

    enabled = app.live().agents.enabled
    chosen = [name.strip() for name in enabled.split(",") if name.strip()] or AGENTS
    unknown = sorted(set(chosen) - set(AGENTS))
    if unknown:
        message = f"PRESERVARIUM_AGENTS__ENABLED: no such agent: {', '.join(unknown)}; there are: {', '.join(AGENTS)}"
        raise ValueError(message)
    for name in AGENTS:
        if name in chosen:
            importlib.import_module(f"agents.{name}")
