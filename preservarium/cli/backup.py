"""`preservarium backup`: copy the whole system beside its workers, and fill empty servers with the copy."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from preservarium.cli.output import bar, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.operations.backup.files import Manifest
    from preservarium.operations.backup.kafka import Reader
    from preservarium.operations.backup.restore import Restored

_directory = click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("backup")
def backup() -> None:
    """Copy the whole system, and restore the copy on empty servers."""


@backup.command()
@_directory
@click.option("--without", multiple=True, type=click.Choice(["postgres", "clickhouse"]),
              help="Leave this database to its own tools; may be repeated. PostgreSQL's copy must be as new as this one, or newer.")  # fmt: skip
@_json
def create(directory: Path, without: tuple[str, ...], as_json: bool) -> None:
    """Copy registry, events, measurements, positions, state and what is under way into DIRECTORY, while workers run.

    DIRECTORY is made, or is empty. It is a back-up once it has its manifest.json, which is written last.
    """
    from preservarium.operations.backup.create import create as make

    settings = load()
    readers = _readers()
    with bar("backup", as_json) as progress:
        manifest = asyncio.run(make(settings, directory, readers, progress, without=without))
    if as_json:
        print_json(msgspec.to_builtins(manifest))
        return
    click.echo(f"{directory}: {_what(manifest)}")
    click.echo(_times(manifest.seconds))


@backup.command()
@_directory
@click.option("--dry-run", is_flag=True, help="Check the back-up's files and the servers; change nothing.")
@click.option("--keep-postgres", is_flag=True,
              help="PostgreSQL is restored already, by its own tools, to the back-up's moment or a later one.")  # fmt: skip
@click.option("--keep-clickhouse", is_flag=True,
              help="ClickHouse is restored already, or will be filled by `sync rebuild`.")  # fmt: skip
@_json
def restore(directory: Path, dry_run: bool, keep_postgres: bool, keep_clickhouse: bool, as_json: bool) -> None:
    """Fill empty servers with the back-up in DIRECTORY; then start workers.

    Refused where a database has tables, a topic records, or workers have run. One that broke off is begun again with empty servers.
    """
    from preservarium.operations.backup.restore import restore as fill

    settings = load()
    with bar("restore", as_json) as progress:
        done = asyncio.run(
            fill(
                settings,
                directory,
                progress,
                keep_postgres=keep_postgres,
                keep_clickhouse=keep_clickhouse,
                dry_run=dry_run,
            )
        )
    if as_json:
        print_json(document(done) | {"dry_run": dry_run})
        return
    if dry_run:
        click.echo(f"the files are whole, and these servers can take them: {_what(done.manifest)}")
        return
    for line in told(done):
        click.echo(line)


def document(done: "Restored") -> dict[str, object]:
    """A restore for JSON."""
    return {
        "taken_at": done.manifest.taken_at,
        "records": done.records,
        "fillers": done.fillers,
        "values": done.values,
        "registry": done.registry,
        "seconds": done.seconds,
    }


def told(done: "Restored") -> list[str]:
    """A restore for people."""
    return [
        f"restored as of {done.manifest.taken_at}: {done.records:,} records of topics, {done.values:,} values of state, "
        f"{done.registry:,} records of the registry; {done.fillers:,} offsets passed over",
        _times(done.seconds),
    ]


def _what(manifest: "Manifest") -> str:
    records = sum(span.records for spans in manifest.topics.values() for span in spans.values())
    values = sum(sum(partitions.values()) for partitions in manifest.changelogs.values())
    return (
        f"as of {manifest.taken_at}, {records:,} records of topics, {values:,} values of state, "
        f"{len(manifest.files):,} files, {manifest.bytes / 1e6:,.1f} MB"
    )


def _times(seconds: dict[str, float]) -> str:
    return f"{sum(seconds.values()):.1f} s: " + ", ".join(f"{step} {took:.1f}" for step, took in seconds.items())


def _readers() -> "list[Reader]":
    """Every stage of this system that reads a topic, as its agents declare it."""
    import agents
    from preservarium.operations.backup.kafka import Reader
    from preservarium.streaming.app import app
    from preservarium.streaming.stage import STORED

    agents.load()
    return [
        Reader(stage.topic.name, stage.group, stage.name if stage.remembers == STORED else "")
        for stage in app.declared.values()
    ]


commands: list[click.Command] = [backup]
