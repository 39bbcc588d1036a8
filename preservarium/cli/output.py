"""How commands print: tables for people, JSON for programs."""

import sys
from typing import TYPE_CHECKING, Any

import click
import orjson

if TYPE_CHECKING:
    from rich.console import Console

#: Where output goes to a file or a pipe there is no window to fit: nothing is cut off.
PIPE_WIDTH = 200


def console() -> "Console":
    """A console on stdout, as wide as the terminal or wide enough."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(width=PIPE_WIDTH, highlight=False)


def print_json(value: Any) -> None:
    """Print JSON, indented; dates as ISO 8601."""
    click.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str).decode())
