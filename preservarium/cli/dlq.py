"""`preservarium dlq`: what was refused and why, and bringing it in once its cause is mended."""

import asyncio
from typing import TYPE_CHECKING, Any, Final

import click

from preservarium.cli.instants import iso, now_us, readable, shown, when, with_iso
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.errors import ReasonCode

if TYPE_CHECKING:
    from preservarium.operations.dlq import Counts, Select

#: Bars that fit on a line beside the names.
BARS: Final = 48
_BAR: Final = " ▁▂▃▄▅▆▇█"


def _selection(function: Any) -> Any:
    for option in (
        click.option("--limit", type=click.IntRange(1), help="At most so many."),
        click.option("--until", help="First seen until then."),
        click.option("--since", help="First seen since then: ISO 8601, or 30m, 2h, 7d ago."),
        click.option("--parser", "parsers", multiple=True, metavar="NAME[@VERSION]",
                     help="Of messages that this parser read, in any version or in one; may be repeated."),
        click.option("--device", help="Address of the device."),
        click.option("--stage", "stages", multiple=True, metavar="STAGE",
                     help="Refused by this stage, e.g. validate; may be repeated."),
        click.option("--code", "codes", multiple=True, type=click.Choice([str(c) for c in ReasonCode]), metavar="CODE",
                     help="Reason code, e.g. unknown_device; may be repeated."),
    ):  # fmt: skip
        function = option(function)
    return function


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_open = click.option("--open", "open_only", is_flag=True, help="Without what was redriven or discarded.")
_id = click.option(
    "--id", "ids", multiple=True, metavar="ID", help="Only this one, as `list` prints it; may be repeated."
)


def _select(
    codes: tuple[str, ...], stages: tuple[str, ...], device: str | None, parsers: tuple[str, ...], since: str | None,
    until: str | None, limit: int | None, *, ids: tuple[str, ...] = (), open_only: bool = False,
) -> "Select":  # fmt: skip
    from preservarium.operations.dlq import Select

    since_us = when(since, "--since") if since else 0
    until_us = when(until, "--until") if until else None
    if until_us is not None and until_us < since_us:
        message = "--until is before --since"
        raise click.UsageError(message)
    return Select(
        codes, device, since_us, limit, until_us=until_us, stages=stages, parsers=parsers, ids=ids, open_only=open_only
    )


@click.group("dlq")
def dlq() -> None:
    """List, count, show, redrive and discard what was refused (iot_errors)."""


@dlq.command("list")
@_selection
@_open
@_json
def list_(
    codes: tuple[str, ...], stages: tuple[str, ...], device: str | None, parsers: tuple[str, ...], since: str | None,
    until: str | None, limit: int | None, open_only: bool, as_json: bool,
) -> None:  # fmt: skip
    """List error lines, oldest first within a partition.  [default limit: 100]"""
    from preservarium.operations.dlq import letters

    select = _select(codes, stages, device, parsers, since, until, limit or 100, open_only=open_only)

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
@_selection
@click.option("--bucket", default="", help="Width of a bar: 15m, 1h, 1d.  [default: so that they fit on a line]")
@click.option("--by-parser", is_flag=True, help="Tell the versions of parsers apart.")
@_open
@_json
def counts(
    codes: tuple[str, ...], stages: tuple[str, ...], device: str | None, parsers: tuple[str, ...], since: str | None,
    until: str | None, limit: int | None, bucket: str, by_parser: bool, open_only: bool, as_json: bool,
) -> None:  # fmt: skip
    """Count refusals by cause over time: of the last day, unless --since says otherwise. --limit is of causes."""
    from preservarium.operations.dlq import counts as count

    select = _select(codes, stages, device, parsers, since or "24h", until, None, open_only=open_only)
    now = now_us()
    span_s = max(1, ((select.until_us or now) - select.since_us) // 1_000_000)
    # What is so long ago is an instant: its distance from now is the width.
    # Rounded up: the clock went on by some microseconds between the two.
    bucket_s = -((when(bucket, "--bucket") - now) // 1_000_000) if bucket else -(-span_s // BARS)
    if bucket_s < 1:
        message = f"--bucket: {bucket!r} is no width of a bar; 15m, 1h and 1d are"
        raise click.UsageError(message)
    found = asyncio.run(count(load(), select, now_us=now, bucket_s=bucket_s, by_parser=by_parser))
    causes = found.causes[:limit]
    if as_json:
        from dataclasses import asdict

        print_json(
            with_iso({"from": found.from_us, "bucket_s": bucket_s, "buckets": found.buckets, "complete": found.complete,
                      "causes": [asdict(cause) for cause in causes]})
        )  # fmt: skip
        return
    _print_counts(found, limit, by_parser)


def _print_counts(found: "Counts", limit: int | None, by_parser: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in (
        "stage",
        "code",
        *(["parser"] if by_parser else []),
        "all",
        "redriven",
        "discarded",
        "last",
        "over time",
    ):
        numeric = name in ("all", "redriven", "discarded")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=name == "over time")
    for cause in found.causes[:limit]:
        cells = [cause.stage, cause.code, *([cause.parser or "none"] if by_parser else []), f"{cause.total:,}",
                 f"{cause.redriven:,}", f"{cause.discarded:,}", shown(cause.last_us), _bars(cause.counts)]  # fmt: skip
        table.add_row(*(escape(cell) for cell in cells))
    console().print(table)
    width = found.bucket_us // 1_000_000
    click.echo(
        f"from {iso(found.from_us)}, a bar is {width // 60} min"
        if width % 60 == 0
        else f"from {iso(found.from_us)}, a bar is {width} s"
    )
    if not found.complete:
        click.echo("There are more causes than are told apart here: narrow the selection.", err=True)


def _bars(numbers: list[int]) -> str:
    """Counts as bars, the highest full; what is not nothing is never shown as nothing."""
    highest = max(numbers, default=0)
    return "".join(_BAR[-(-n * (len(_BAR) - 1) // highest)] if n else _BAR[0] for n in numbers).rstrip()


@dlq.command()
@click.argument("identity", metavar="ID")
def show(identity: str) -> None:
    """Print the error line ID (PARTITION:OFFSET) as JSON."""
    from preservarium.operations.dlq import letter

    found = asyncio.run(letter(load(), identity))
    print_json({"id": found.id, **with_iso(found.line)})


@dlq.command()
@_selection
@_id
@click.option("--dry-run", is_flag=True, help="Count, and send nothing.")
@click.option("--discarded", is_flag=True, help="What was discarded, too: undoes a discard.")
@_json
def redrive(
    codes: tuple[str, ...], stages: tuple[str, ...], device: str | None, parsers: tuple[str, ...], since: str | None,
    until: str | None, limit: int | None, ids: tuple[str, ...], dry_run: bool, discarded: bool, as_json: bool,
) -> None:  # fmt: skip
    """Send refused inputs again to the stage that failed; each once, however often this is run.

    Original bytes go to iot_raw_data; an event that a store refused goes to its topic.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from preservarium.operations.dlq import Redriven
    from preservarium.operations.dlq import redrive as run

    select = _select(codes, stages, device, parsers, since, until, limit, ids=ids)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} sent"), TimeElapsedColumn())
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=as_json or not errors.is_terminal) as bar:
        task = bar.add_task("redrive", total=None)

        def progress(so_far: Redriven) -> None:
            bar.update(task, completed=so_far.sent)

        done = asyncio.run(
            run(load(), select, now_us=now_us(), dry_run=dry_run, discarded=discarded, progress=progress)
        )
    if as_json:
        print_json({**done.document(), "dry_run": dry_run})
        return
    click.echo(
        f"{done.matched:,} match: {done.sent:,} {'to send' if dry_run else 'sent'}, {done.already:,} sent or discarded before, "
        f"{done.unusable:,} without their input."
    )


@dlq.command()
@_selection
@_id
@click.option("--reason", default="", help="Why nothing more is to be done about them; needed.")
@click.option("--actor", help="Who does it, for the history.  [default: user@host]")
@click.option("--dry-run", is_flag=True, help="Count, and discard nothing.")
@_json
def discard(
    codes: tuple[str, ...], stages: tuple[str, ...], device: str | None, parsers: tuple[str, ...], since: str | None,
    until: str | None, limit: int | None, ids: tuple[str, ...], reason: str, actor: str | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say that nothing more is to be done about refused inputs: they are not redriven, and counted apart.

    It is an event of the stream dlq/discards, with who and why. The lines stay in iot_errors; `redrive --discarded` takes it back.
    """
    from preservarium.operations.dlq import discard as run
    from preservarium.registry.apply import default_actor

    select = _select(codes, stages, device, parsers, since, until, limit, ids=ids)
    if not reason.strip() and not dry_run:
        message = "--reason is needed: it goes into the event store"
        raise click.UsageError(message)
    done = asyncio.run(
        run(load(), select, actor=actor or default_actor(), cause=reason, now_us=now_us(), dry_run=dry_run)
    )
    if as_json:
        print_json({**done.document(), "dry_run": dry_run})
        return
    said = f", version {done.version} of dlq/discards" if done.version is not None else ""
    click.echo(
        f"{done.matched:,} match: {done.discarded:,} {'to discard' if dry_run else 'discarded'}{said}, "
        f"{done.already:,} redriven or discarded before."
    )


commands: list[click.Command] = [dlq]
