"""The `preservarium` command: one group, its commands in `preservarium/cli/`, one file a group."""

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any, Final

import click
import structlog

from preservarium import __version__
from preservarium.cli import system
from preservarium.errors import PreservariumError, reason
from preservarium.settings import SettingsError

#: Modules of preservarium.cli; each has `commands: list[click.Command]`. A literal list, so that what the program
#: offers can be read here and does not depend on what lies in a folder.
CLI_MODULES: Final[tuple[str, ...]] = (
    "migrate",
    "registry",
    "topics",
    "config",
    "up",
    "connect",
    "simulate",
    "decode",
    "dlq",
    "trace",
    "replay",
    "devices",
    "commands",
    "sync",
    "backup",
    "extract",
    "doctor",
    "db",
    "alarms",
    "alarms_analysis",
    "notices",
)

#: Commands that ask no server, and so no running system.
LOCAL: Final = frozenset({"up", "decode", "decoders"})

#: A wrong setting, as for wrong arguments: nothing was done.
EXIT_USAGE: Final = 2
#: The work failed, or a check found a difference.
EXIT_FAILED: Final = 1


#: Modules whose exceptions say what a server, or the way to it, has against us.
CLIENTS: Final = ("aiokafka.", "asyncpg.", "clickhouse_connect.", "aiohttp.")


def _not_text(args: Sequence[str]) -> str:
    """Says which argument is no text: bytes from the shell that are not UTF-8, which nothing of ours could carry further."""
    for number, arg in enumerate(args, 1):
        try:
            arg.encode()
        except UnicodeEncodeError:
            return f"argument {number} is not text in UTF-8: {arg.encode('utf-8', 'backslashreplace').decode()}"
    return ""


class _Group(click.Group):
    """Loads the command modules on first use and turns expected errors into one line."""

    _loaded = False

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for name in CLI_MODULES:
            module = importlib.import_module(f"preservarium.cli.{name}")
            for command in module.commands:
                if command.name not in LOCAL:
                    _explain(command)
                self.add_command(command)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        self._load()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        self._load()
        return super().get_command(ctx, cmd_name)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run; an expected error becomes one line on stderr and an exit code."""
        if wrong := _not_text(sys.argv[1:] if args is None else args):
            click.echo(f"preservarium: {wrong}", err=True)
            sys.exit(EXIT_USAGE)
        try:
            return super().main(args, *rest, **extra)
        except SettingsError as e:
            click.echo(f"preservarium: {e}", err=True)
            sys.exit(EXIT_USAGE)
        except PreservariumError as e:
            click.echo(f"preservarium: {e}", err=True)
            sys.exit(EXIT_FAILED)
        except Exception as e:
            # A server that goes away in the middle is no defect of ours: one line, where others have a traceback.
            if not isinstance(e, OSError) and not type(e).__module__.startswith(CLIENTS):
                raise
            click.echo(f"preservarium: {reason(e)}", err=True)
            sys.exit(EXIT_FAILED)


def _explain(command: click.Command) -> None:
    """Say in its help, and that of its parts, which servers it asks."""
    command.epilog = system.HELP
    for part in getattr(command, "commands", {}).values():
        _explain(part)


@click.group(
    cls=_Group, epilog=system.HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="preservarium")
def cli() -> None:
    """Preservarium: the stream engine for IoT readings."""
    # Standard output is for what the command prints, so that `--json` can be piped.
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
    # What a library says before it raises is said again by our one line. Commands that run services set up logging anew.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def main() -> None:
    """Entry point of the `preservarium` command."""
    cli(prog_name="preservarium")


if __name__ == "__main__":
    main()
