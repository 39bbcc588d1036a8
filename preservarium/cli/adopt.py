"""`preservarium adopt`: the service that this replaces, taken over: its rows, and the place of its consumers."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.settings import Settings
    from preservarium.stores.adoption import Adoption, Progress

T = TypeVar("T")

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("adopt")
def adopt() -> None:
    """Take over the rows and the consumers of the service that this replaces.

    `preservarium migrate` comes first: it recognises the old service's table, and makes it iot_measurements_old.
    """


def _with(work: "Callable[[Adoption, Any, Settings], Awaitable[T]]") -> T:
    async def go() -> T:
        from preservarium.stores.adoption import Adoption
        from preservarium.stores.migrate import connect_postgres

        settings = load()
        connection = await connect_postgres(settings, what="carrying over the old service's rows")
        try:
            return await work(await Adoption.of(connection, settings), connection, settings)
        finally:
            await connection.close(timeout=5)

    return asyncio.run(go())


def _document(found: "Progress") -> dict[str, Any]:
    return {**asdict(found), "done": found.done}


@adopt.command()
@_json
def status(as_json: bool) -> None:
    """Say what was found of the old service, and how far its rows are carried over; exit 1 where some are left."""

    async def work(one: "Adoption", _: Any, settings: "Settings") -> "tuple[Progress, Any, Settings]":
        return await one.progress(), one.found, settings

    found, former, settings = _with(work)
    if as_json:
        print_json({"former": asdict(former), "progress": _document(found)})
    else:
        kind = f"a hypertable with chunks of {former.chunk_interval}" if former.hypertable else "a table"
        click.echo(f"{former.table}: {kind}, {found.rows_total:,} rows")
        for said, had, setting, days in (
            ("compressed after", former.compress_after, "COMPRESS_AFTER_DAYS", settings.sink.compress_after_days),
            ("kept for", former.drop_after, "RETENTION_DAYS", settings.sink.retention_days),
        ):
            if former.hypertable:
                click.echo(
                    f"  {said}: {had or 'for ever' if said == 'kept for' else had or 'never'} there; here PRESERVARIUM_SINK__{setting}={days}"
                )
        if former.paused_jobs:
            click.echo(f"  its policies are paused: jobs {', '.join(map(str, former.paused_jobs))}")
        again = [view["name"] for view in asdict(former)["views"] if view["made_again"]]
        if again:
            click.echo(f"  views that were made again on iot_measurements: {', '.join(again)}")
        replaced = [view["name"] for view in asdict(former)["views"] if not view["made_again"]]
        if replaced:
            click.echo(f"  views in whose place ours stand: {', '.join(replaced)}")
        if former.left:
            click.echo(f"  what reads the old table on, to be made anew by hand: {', '.join(former.left)}")
        _print(found)
    if not found.done:
        sys.exit(1)


def _print(found: "Progress") -> None:
    click.echo(
        f"{found.rows:,} of {found.rows_total:,} rows looked at in {found.pieces:,} pieces: {found.stored:,} stored, {found.stood:,} were there,"
        f" {found.refused:,} refused (iot_measurements_refused), {found.too_old:,} too old. Checksum {found.checksum:x}."
    )
    if found.done:
        click.echo(
            "All of it is carried over. `preservarium adopt verify` looks at every row once more; `adopt drop` drops the old table."
        )


@adopt.command()
@click.option("--leave-older", is_flag=True, help="Leave in the old table what is older than sink.retention_days.")
@click.option("--again", is_flag=True, help="Look at every row once more, from the beginning.")
@click.option("--rest", type=click.FloatRange(0, 100), default=0.25, show_default=True,
              help="Rest after each piece, for the workers: so much of the time that it took.")  # fmt: skip
@_json
def run(leave_older: bool, again: bool, rest: float, as_json: bool) -> None:
    """Carry over the rows of the old table, the newest first; goes on where it was interrupted.

    Workers may run. A piece is one transaction, in which what was stored is read back and compared: rows, and checksum of keys and values.
    """

    async def work(one: "Adoption", _: Any, __: "Settings") -> "Progress":
        if again:
            await one.again()
        with bar("carrying over", as_json) as told:
            return await one.run(leave_older=leave_older, rest=rest, told=told)

    found = _with(work)
    if as_json:
        print_json(_document(found))
    else:
        _print(found)


@adopt.command()
@_json
def verify(as_json: bool) -> None:
    """Compare both tables row by row, with counts and checksums; exit 1 where they differ."""
    from preservarium.stores.adoption import Verified

    async def work(one: "Adoption", _: Any, __: "Settings") -> Verified:
        with bar("comparing", as_json) as told:
            return await one.verify(told)

    found = _with(work)
    if as_json:
        print_json({**asdict(found), "same": found.same})
    else:
        click.echo(
            f"{found.rows:,} rows in {found.pieces:,} pieces: {found.present:,} stand with their value, {found.refused:,} refused, {found.too_old:,} too old"
        )
        for begin, end, rows, present in found.differ[:50]:
            click.echo(
                f"  differs: {begin} to {end}: {rows:,} rows, {present:,} present; `adopt run --again` brings them"
            )
        if found.uncovered:
            click.echo(f"  {found.uncovered:,} rows are in no piece: run `preservarium adopt run`")
    if not found.same:
        sys.exit(1)


@adopt.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(yes: bool) -> None:
    """Drop the old table, once all of it is carried over."""

    async def work(one: "Adoption", _: Any, __: "Settings") -> str:
        if not yes:
            click.confirm(f"Drop {one.found.table}, for ever?", abort=True, err=True)
        await one.drop()
        return one.found.table

    click.echo(f"{_with(work)} is dropped")


@adopt.command()
@click.option("--group", default="timescale_sink_group", show_default=True, help="Consumer group of the old service.")
@click.option("--overlap", type=click.IntRange(0), default=10_000, show_default=True,
              help="Begin so many records earlier: the old service committed what it had not stored yet.")  # fmt: skip
@click.option("--force", is_flag=True, help="Although our stages have begun somewhere.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, and do nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
def offsets(group: str, overlap: int, force: bool, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Have our stages read decoded_iot_data from where the old service's group stands.

    With the old service stopped, and before the first worker is started: sink-decoded (PostgreSQL) and sync-decoded (ClickHouse) begin there.
    """
    if as_json and not (yes or dry_run):
        msg = "--json does not ask: say --yes, or --dry-run"
        raise click.UsageError(msg)
    asyncio.run(_offsets(load(), group, overlap, force, dry_run, yes, as_json))


async def _offsets(
    settings: "Settings", group: str, overlap: int, force: bool, dry_run: bool, yes: bool, as_json: bool
) -> None:
    from preservarium.operations import former_offsets
    from preservarium.stores.migrate import connect_postgres

    connection = await connect_postgres(settings, what="switching consumers over")
    try:
        made = await former_offsets.plan(settings, connection, group=group, overlap=overlap)
        if not as_json:
            from rich.table import Table

            table = Table(title=f"{made.topic}, group {made.group}", title_justify="left", box=None, pad_edge=False)
            for name in ("partition", "Kafka holds", "old group", "sink-decoded", "sync-decoded", "to"):
                table.add_column(name, justify="right")
            for partition, at in sorted(made.places.items()):
                stands = ["-" if n is None else f"{n:,}" for n in (at.old, at.sink, at.sync)]
                table.add_row(str(partition), f"{at.begin:,} to {at.end:,}", *stands, f"{at.to:,}")
            console().print(table)
        if not dry_run:
            if not yes:
                click.confirm("Have our stages begin there?", abort=True, err=True)
            await former_offsets.switch(settings, connection, made, force=force)
        if as_json:
            print_json({**made.document(), "dry_run": dry_run})
        elif not dry_run:
            click.echo("Done: start the workers.")
    finally:
        await connection.close(timeout=5)


commands: list[click.Command] = [adopt]
