"""`preservarium replay`: have a stage read its topic again, or derive readings anew under a new generation."""

import asyncio
from typing import TYPE_CHECKING, Any, Final

import click

from preservarium.cli.instants import iso, shown, when
from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.operations.replay import Plan, Target
    from preservarium.settings import Settings

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

#: Partitions that are printed; --json has all of them.
PRINTED_MAX: Final = 50


@click.group()
def replay() -> None:
    """Set stages back, and derive readings anew."""


def _target(text: str) -> "Target":
    """What `--to` names.

    Raises:
        UsageError: it is neither.
    """
    from preservarium.operations.replay import Target

    if text == "earliest":
        return Target(earliest=True)
    if text.isascii() and text.isdigit() and len(text) < 14:
        return Target(offset=int(text))
    return Target(at_us=when(text, "--to"))


@replay.command()
@click.option("--stage", required=True, help="Name of the stage: sink, sync, normalize, …")
@click.option(
    "--to",
    "to",
    help="earliest; a time (ISO 8601, or 2h, 1d ago) by Kafka's time of the records; or an offset of one --partition.",
)
@click.option(
    "--partition",
    "partitions",
    type=click.IntRange(0),
    multiple=True,
    help="Only this partition; may be repeated.  [default: all]",
)
@click.option(
    "--generation",
    type=click.IntRange(1),
    help="Of normalize and what follows it: go on with this generation, which was interrupted; or a number of your own.",
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Of a generation: raw records a second at most.")
@click.option("--skip", is_flag=True, help="Also move forward: what lies between is never stored.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, and do nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--actor", help="Who does it, for the history.  [default: user@host]")
@_json
def reset(
    stage: str,
    to: str | None,
    partitions: tuple[int, ...],
    generation: int | None,
    rate: float | None,
    skip: bool,
    dry_run: bool,
    yes: bool,
    actor: str | None,
    as_json: bool,
) -> None:
    """Have STAGE read again from a place in its topic; says what will happen, and asks.

    sink… stand in PostgreSQL, sync… in Kafka; what they have they do not store twice. normalize, validate, alarm, aggregate and
    anomaly derive nothing by an offset: for them a new generation is opened, and the raw records from there on are derived anew.
    """
    from preservarium.operations.replay import Way, way_of

    way = way_of(stage)
    if to is None and generation is None:
        message = "say where to: --to earliest, a time, or an offset"
        raise click.UsageError(message)
    if rate is not None and way is not Way.GENERATION:
        message = "--rate is of a generation"
        raise click.UsageError(message)
    if as_json and not (yes or dry_run):
        message = "--json does not ask: say --yes, or --dry-run"
        raise click.UsageError(message)
    target = _target(to or "earliest")
    asyncio.run(_reset(load(), stage, target, partitions, generation, rate, skip, dry_run, yes, actor, as_json))


async def _reset(
    settings: "Settings",
    stage: str,
    target: "Target",
    partitions: tuple[int, ...],
    generation: int | None,
    rate: float | None,
    skip: bool,
    dry_run: bool,
    yes: bool,
    actor: str | None,
    as_json: bool,
) -> None:
    from preservarium.operations import replay as operation
    from preservarium.registry.apply import default_actor
    from preservarium.stores.migrate import connect_postgres

    connection = await connect_postgres(settings, what="a replay")
    try:
        made = await operation.plan(settings, connection, stage, target, only=partitions, generation=generation)
        if not as_json:
            _print_plan(made)
        if dry_run:
            if as_json:
                print_json({**made.document(), "dry_run": True})
            return
        if made.way is operation.Way.GENERATION:
            if not made.records:
                message = "there are no raw records to derive anew"
                raise operation.ReplayError(message)
            _ask(yes, "Derive these records anew?")
            with bar(f"generation {made.generation}", as_json) as progress:
                done = await operation.send(
                    settings, connection, made, actor=actor or default_actor(), rate=rate, progress=progress
                )
            if as_json:
                print_json({**made.document(), "dry_run": False, "sent": done.document()})
                return
            click.echo(
                f"Generation {done.generation}: {done.records:,} raw records became {done.messages:,} records and {done.errors:,} error "
                "lines. The stages are working on them: `preservarium sync status`, and the lag on the console, say how far."
            )
            if done.gone:
                click.echo(
                    f"{done.gone:,} offsets had no record any more: Kafka's retention has deleted them meanwhile, or they never had one."
                )
            return
        if made.moves and not (made.way is operation.Way.GROUP and made.members):
            _ask(yes, "Move these positions?")
        taken = await operation.move(settings, connection, made, skip=skip)
        if as_json:
            print_json({**made.document(), "dry_run": False, "taken_up": taken})
        elif made.moves:
            click.echo(
                "Moved; the workers have taken it up."
                if taken
                else "Moved. Workers that run take it up with their next record, or when they are started again."
                if made.members
                else "Moved. The stage begins there when a worker starts."
            )
    finally:
        await connection.close(timeout=5)


def _ask(yes: bool, question: str) -> None:
    if not yes:
        click.confirm(question, abort=True, err=True)


def _print_plan(made: "Plan") -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    for text in made.says:
        out.print(escape(text), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    names = ("partition", "Kafka holds", "stands at", "to", "again")
    for name in names:
        table.add_column(name, justify="right")
    of_generation = made.generation is not None
    for partition, at in sorted(made.places.items())[:PRINTED_MAX]:
        again = max(0, at.end - at.to) if of_generation else at.again
        stands = "" if of_generation else "-" if at.now is None else f"{at.now:,}"
        table.add_row(str(partition), f"{at.begin:,} to {at.end:,}", stands, f"{at.to:,}", f"{again:,}")
    out.print(table)
    if len(made.places) > PRINTED_MAX:
        out.print(f"… and {len(made.places) - PRINTED_MAX} partitions more")


@replay.command("list")
@_json
def list_(as_json: bool) -> None:
    """List the generations that were opened by `replay reset`."""
    found = asyncio.run(_list(load()))
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("No generation was opened yet.")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("generation", "opened", "by", "raw records", "sent"):
        table.add_column(name, justify="right" if name in ("generation", "raw records") else "left", overflow="fold")
    for one in found:
        table.add_row(
            str(one["generation"]), shown(one["opened_at"]), one["actor"], f"{one['records']:,}",
            iso(one["sent_at"]) if one["sent_at"] else f"not whole: `replay reset --stage normalize --generation {one['generation']}` goes on",
        )  # fmt: skip
    console().print(table)


async def _list(settings: "Settings") -> list[dict[str, Any]]:
    from preservarium.stores import positions
    from preservarium.stores.migrate import connect_postgres

    connection = await connect_postgres(settings)
    try:
        return [
            {
                "generation": one.generation,
                "actor": one.actor,
                "opened_at": one.opened_at,
                "sent_at": one.sent_at,
                "records": sum(max(0, one.ends[p] - start) for p, start in one.starts.items() if p in one.ends),
                "starts": {str(p): o for p, o in one.starts.items()},
                "ends": {str(p): o for p, o in one.ends.items()},
            }
            for one in await positions.replays(connection)
        ]
    finally:
        await connection.close(timeout=5)


commands: list[click.Command] = [replay]
