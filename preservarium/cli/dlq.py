"""`preservarium dlq`: what was refused and why, and bringing it in once its cause is mended."""

import asyncio
from typing import Any

import click

from preservarium.cli.instants import now_us, readable, shown, when, with_iso
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.errors import ReasonCode


def _selection(function: Any) -> Any:
    for option in (
        click.option("--limit", type=click.IntRange(1), help="At most so many."),
        click.option("--since", help="First seen since then: ISO 8601, or 30m, 2h, 7d ago."),
        click.option("--device", help="Address of the device."),
        click.option("--code", "codes", multiple=True, type=click.Choice([str(c) for c in ReasonCode]), metavar="CODE",
                     help="Reason code, e.g. unknown_device; may be repeated."),
    ):  # fmt: skip
        function = option(function)
    return function


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("dlq")
def dlq() -> None:
    """List, show and redrive what was refused (iot_errors)."""


@dlq.command("list")
@_selection
@_json
def list_(codes: tuple[str, ...], device: str | None, since: str | None, limit: int | None, as_json: bool) -> None:
    """List error lines, oldest first within a partition.  [default limit: 100]"""
    from preservarium.operations.dlq import Select, letters

    select = Select(codes, device, when(since, "--since") if since else 0, limit or 100)

    async def collect() -> list[Any]:
        return [each async for each in letters(load(), select)]

    found = asyncio.run(collect())
    if as_json:
        print_json([{"id": each.id, **with_iso(each.line)} for each in found])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("id", "first seen", "stage", "code", "device", "try", "message"):
        table.add_column(name, overflow="fold")
    for each in found:
        line = each.line
        cells = (each.id, shown(line.get("first_seen")), line.get("stage"), line.get("code"), line.get("device_id") or "",
                 line.get("attempt", 1), readable(line.get("message")))  # fmt: skip
        table.add_row(*(escape(str(cell)) for cell in cells))
    console().print(table)


@dlq.command()
@click.argument("identity", metavar="ID")
def show(identity: str) -> None:
    """Print the error line ID (PARTITION:OFFSET) as JSON."""
    from preservarium.operations.dlq import letter

    found = asyncio.run(letter(load(), identity))
    print_json({"id": found.id, **with_iso(found.line)})


@dlq.command()
@_selection
@click.option("--dry-run", is_flag=True, help="Count, and send nothing.")
@_json
def redrive(
    codes: tuple[str, ...], device: str | None, since: str | None, limit: int | None, dry_run: bool, as_json: bool
) -> None:
    """Send the original bytes of refused inputs to iot_raw_data again; each once, however often this is run."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from preservarium.operations.dlq import Redriven, Select
    from preservarium.operations.dlq import redrive as run

    select = Select(codes, device, when(since, "--since") if since else 0, limit)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} sent"), TimeElapsedColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=as_json or not errors.is_terminal) as bar:
        task = bar.add_task("redrive", total=None)

        def progress(so_far: Redriven) -> None:
            bar.update(task, completed=so_far.sent)

        done = asyncio.run(run(load(), select, now_us=now_us(), dry_run=dry_run, progress=progress))
    if as_json:
        print_json({**done.document(), "dry_run": dry_run})
        return
    click.echo(
        f"{done.matched:,} match: {done.sent:,} {'to send' if dry_run else 'sent'}, {done.already:,} sent before, "
        f"{done.unusable:,} without their input."
    )


commands: list[click.Command] = [dlq]
