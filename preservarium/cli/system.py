"""The settings of a command: those of the running `up` where the environment and `.env` name no servers."""

from typing import Final

import click

from preservarium import settings as ground
from preservarium.embedded.joining import SystemNotReady, join, running, shown
from preservarium.settings import Settings

__all__ = ["HELP", "SystemNotReady", "load", "load_alone", "running", "shown"]

#: Said in the help of every command.
HELP: Final = """\
Beside a running `preservarium up` (`make run`) every command finds its servers by itself, in the data directory: \
.preservarium here, or what PRESERVARIUM_DATA_DIR names. Addresses in the environment or in .env win over it."""


def load() -> Settings:
    """The settings in force for a command. What it takes from a running system is said in one line on stderr, once.

    Raises:
        SettingsError: a setting is wrong, or one is missing that only the running system's environment has.
        SystemNotReady: the system is starting or stopping.
    """
    given = ground.load()
    if said := join(given):
        click.echo(said, err=True)
        return ground.load()
    return given


def load_alone() -> Settings:
    """The settings of a command that speaks to no server, and so to no system.

    Raises:
        SettingsError: a setting is wrong.
    """
    return ground.load()
