"""`preservarium dlq`: what was refused and why, and bringing it in once its cause is mended."""

import asyncio
import re
import time
from typing import Any, Final

import click

from preservarium.cli.output import console, print_json
from preservarium.domain.errors import ReasonCode
from preservarium.domain.instant import instant_us
from preservarium.settings import load

_SPAN: Final = re.compile(r"(\d+)([smhd])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def _now_us() -> int:
    return time.time_ns() // 1_000


def _since(text: str | None) -> int:
    """µs of an ISO 8601 instant, or of so long ago (30m, 2h, 7d)."""
    if not text:
        return 0
    if span := _SPAN.fullmatch(text.strip()):
        return _now_us() - int(span[1]) * _SECONDS[span[2]] * 1_000_000
    at = instant_us(text)
    if at is None:
        message = f"--since: {text!r} is neither an instant (ISO 8601) nor a time like 30m, 2h, 7d"
        raise click.UsageError(message)
    return at


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


def _instant(us: Any) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(us / 1e6, UTC).isoformat(timespec="seconds") if isinstance(us, int) else ""


@dlq.command("list")
@_selection
@_json
def list_(codes: tuple[str, ...], device: str | None, since: str | None, limit: int | None, as_json: bool) -> None:
    """List error lines, oldest first within a partition.  [default limit: 100]"""
    from preservarium.dlq import Select, letters

    select = Select(codes, device, _since(since), limit or 100)

    async def collect() -> list[Any]:
        return [each async for each in letters(load(), select)]

    found = asyncio.run(collect())
    if as_json:
        print_json([{"id": each.id, **each.line} for each in found])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("id", "first seen", "stage", "code", "device", "try", "message"):
        table.add_column(name, overflow="fold")
    for each in found:
        line = each.line
        cells = (each.id, _instant(line.get("first_seen")), line.get("stage"), line.get("code"), line.get("device_id") or "",
                 line.get("attempt", 1), line.get("message"))  # fmt: skip
        table.add_row(*(escape(str(cell)) for cell in cells))
    console().print(table)


@dlq.command()
@click.argument("identity", metavar="ID")
def show(identity: str) -> None:
    """Print the error line ID (PARTITION:OFFSET) as JSON."""
    from preservarium.dlq import letter

    found = asyncio.run(letter(load(), identity))
    print_json({"id": found.id, **found.line})


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

    from preservarium.dlq import Redriven, Select
    from preservarium.dlq import redrive as run

    select = Select(codes, device, _since(since), limit)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} sent"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("redrive", total=None)

        def progress(so_far: Redriven) -> None:
            bar.update(task, completed=so_far.sent)

        done = asyncio.run(run(load(), select, now_us=_now_us(), dry_run=dry_run, progress=progress))
    if as_json:
        print_json({**done.document(), "dry_run": dry_run})
        return
    click.echo(
        f"{done.matched:,} match: {done.sent:,} {'to send' if dry_run else 'sent'}, {done.already:,} sent before, "
        f"{done.unusable:,} without their input."
    )


commands: list[click.Command] = [dlq]
