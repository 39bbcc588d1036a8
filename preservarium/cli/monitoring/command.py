"""`preservarium monitoring`: rules, dashboards and a configuration of Prometheus for one's own system."""

import re
import sys
from pathlib import Path

import click

from preservarium.cli.output import print_json

#: host:port as Prometheus takes targets.
_TARGET = re.compile(r"[\w.\-\[\]:]+:\d{1,5}")


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="HOST:PORT",
    help="A worker's web port; repeat it. [default: all addresses of the name worker]",
)
@click.option("--job", default="preservarium", show_default=True, help="Prometheus' name for the workers.")
@click.option(
    "--runbook-url",
    default="docs/RUNBOOK.md",
    show_default=True,
    help="Where docs/RUNBOOK.md is to be read, for the links in alerts.",
)
@click.option("--force", is_flag=True, help="Overwrite what is there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the files written.")
def monitoring(
    directory: Path, targets: tuple[str, ...], job: str, runbook_url: str, force: bool, as_json: bool
) -> None:
    """Write alert rules, Prometheus' and Alertmanager's configuration, and Grafana's dashboards into DIRECTORY.

    They fit this version: every metric that they name is one of its workers'. Rules are loaded by `rule_files`, dashboards from
    DIRECTORY/grafana/dashboards.
    """
    from preservarium.cli.monitoring import write

    for target in targets:
        if not _TARGET.fullmatch(target):
            message = f"--target: {target!r} is not HOST:PORT"
            raise click.UsageError(message)
    if not re.fullmatch(r"[\w.:/-]{1,100}", job):
        message = f"--job: {job!r} is no name for a job: letters, digits and . : / - _"
        raise click.UsageError(message)
    made = write.files(runbook_url, job, targets)
    there = [name for name in made if (directory / name).exists()]
    if there and not force:
        click.echo(f"preservarium: {directory / there[0]} is there already; --force overwrites", err=True)
        sys.exit(1)
    written = [str(path) for path in write.write(directory, made)]
    if as_json:
        print_json({"files": written})
        return
    for name in written:
        click.echo(name)


commands: list[click.Command] = [monitoring]
