"""`preservarium migrate`: schema and topics."""

import asyncio
import sys
from dataclasses import asdict
from typing import Any

import click

from preservarium.cli.instants import shown
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.settings import Settings


def _document(report: Any) -> dict[str, Any]:
    return {**asdict(report), "pending": [f.file for f in report.pending]}


_STATUS_STYLE = {"completed": "green", "in_progress": "yellow", "not_started": "cyan", "not_needed": "dim"}


def _print_report(report: Any) -> None:
    from rich.table import Table

    title = {"postgres": "PostgreSQL", "clickhouse": "ClickHouse"}[report.store]
    if report.layout:
        using = "TimescaleDB" if report.layout == "timescaledb" else "native partitioning (no TimescaleDB)"
        title += f": {using}" + ("" if report.layout_remembered else ", to be chosen at the first migration")
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("file", "status", "statements", "applied", "ms"):
        table.add_column(name, justify="right" if name in {"statements", "ms"} else "left")
    for f in report.files:
        style = _STATUS_STYLE[f.status]
        status = f.status + (" (blocking)" if f.blocking and f.status != "completed" else "")
        table.add_row(
            f.file,
            f"[{style}]{status}[/]",
            str(f.statements),
            shown(f.applied_at),
            "" if f.duration_ms is None else str(f.duration_ms),
        )
    out = console()
    out.print(table)
    if report.newer:
        out.print(f"The database is newer than this checkout: it has {', '.join(report.newer)}.")


@click.group(invoke_without_command=True)
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0), default=0.0, help="Seconds to wait for servers that are starting."
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--allow-blocking", is_flag=True, help="Run files marked blocking on a database in use too.")
@click.option(
    "--only",
    type=click.Choice(["postgres", "clickhouse", "kafka"]),
    multiple=True,
    help="Leave out what is not named (repeatable).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def migrate(
    ctx: click.Context, wait_s: float, dry_run: bool, allow_blocking: bool, only: tuple[str, ...], as_json: bool
) -> None:
    """Bring PostgreSQL, ClickHouse and the Kafka topics to what this version needs."""
    if ctx.invoked_subcommand is None:
        asyncio.run(_migrate(load(), wait_s, dry_run, allow_blocking, only, as_json))


async def _migrate(
    settings: Settings, wait_s: float, dry_run: bool, allow_blocking: bool, only: tuple[str, ...], as_json: bool
) -> None:
    from preservarium.stores.migrate import Store, migrate_all
    from preservarium.streaming import topics_admin

    stores: list[Store] = [s for s in ("postgres", "clickhouse") if not only or s in only]
    say = (lambda _: None) if as_json else (lambda file: click.echo(f"applied {file}"))
    reports = await migrate_all(
        settings, stores=stores, dry_run=dry_run, allow_blocking=allow_blocking, wait_s=wait_s, progress=say
    )
    topics = None
    if not only or "kafka" in only:
        if dry_run:
            topics = await topics_admin.compare(settings, wait_s=wait_s)
        else:
            topics = await topics_admin.create(settings, wait_s=wait_s)
    if as_json:
        print_json({"stores": [_document(r) for r in reports], "topics": topics.document() if topics else None})
        return
    for report in reports:
        _print_report(report)
    if topics is not None:
        verb = "missing" if dry_run else "created"
        names = topics.missing if dry_run else topics.created
        click.echo(f"Kafka: {len(topics.topics)} topics, {len(names)} {verb}{': ' if names else ''}{', '.join(names)}")
        for line in topics.altered:
            click.echo(f"  altered: {line}")
        for line in topics.differences():
            click.echo(f"  differs: {line}")


@migrate.command()
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0), default=0.0, help="Seconds to wait for servers that are starting."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(wait_s: float, as_json: bool) -> None:
    """Say what was applied; exit 1 where something is pending."""
    reports = asyncio.run(_status(load(), wait_s))
    if as_json:
        print_json({"stores": [_document(r) for r in reports]})
    else:
        for report in reports:
            _print_report(report)
    if any(r.pending for r in reports):
        sys.exit(1)


async def _status(settings: Settings, wait_s: float) -> list[Any]:
    from preservarium.stores.migrate import migrate_all

    return list(await migrate_all(settings, dry_run=True, wait_s=wait_s))


commands: list[click.Command] = [migrate]
