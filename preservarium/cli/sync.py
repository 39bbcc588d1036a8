"""`preservarium sync`: how ClickHouse stands, whether it holds what PostgreSQL holds, and mending it."""

import asyncio
import sys
from dataclasses import asdict
from datetime import UTC, date, datetime
from functools import partial
from typing import Any, Final

import click

from preservarium.cli.instants import shown
from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load
from preservarium.settings import Settings

#: Differences that are printed; all of them are in the JSON.
PRINTED_MAX: Final = 50
#: Of preservarium/operations/verification.py, which is not imported before it is needed.
TABLE_NAMES: Final = (
    "measurements",
    "alarm_events",
    "anomalies",
    "aggregates",
    "command_events",
    "task_events",
    "employees",
)

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _range(function: Any) -> Any:
    day = click.DateTime(["%Y-%m-%d"])
    for option in (
        click.option("--to", "last", type=day, help="Last day, UTC.  [default: tomorrow, for devices that are ahead]"),
        click.option("--from", "first", type=day, help="First day, UTC.  [default: the first that PostgreSQL keeps]"),
        click.option("--table", "names", multiple=True, type=click.Choice(TABLE_NAMES),
                     help="Only this table; may be repeated.  [default: all]"),
    ):  # fmt: skip
        function = option(function)
    return function


@click.group("sync")
def sync() -> None:
    """See and mend what is in ClickHouse."""


@sync.command()
@_json
def status(as_json: bool) -> None:
    """Say how each sync stage and its table stand; exit 1 where a table is missing or ignores tokens."""
    from preservarium.operations.sync_status import status as ask

    settings = _enabled()
    found = asyncio.run(ask(settings))
    healthy = all(s.exists and s.dedup_window for s in found.stages) and not found.pending
    if as_json:
        document = asdict(found)
        for stage, told in zip(found.stages, document["stages"], strict=True):
            told["lag"] = stage.lag
        print_json(document | {"healthy": healthy})
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in (
            "stage",
            "topic",
            "lag",
            "bounds of the last batch",
            "table",
            "rows",
            "MB",
            "last insert",
            "tokens",
        ):
            table.add_column(
                name, justify="right" if name in {"lag", "rows", "MB", "tokens"} else "left", overflow="fold"
            )
        for s in found.stages:
            bounds = ", ".join(
                f"{p}:{at.committed}" + (f"-{at.planned}" if at.planned else "")
                for p, at in s.partitions.items()
                if at.committed is not None
            )
            table.add_row(
                s.stage, s.topic, f"{s.lag:,}", bounds or "-", s.table if s.exists else f"{s.table} (missing)",
                f"{s.rows:,}", f"{s.bytes / 1e6:,.1f}", shown(s.last_insert) or "-",
                f"{s.dedup_window:,}",
            )  # fmt: skip
        out = console()
        out.print(table)
        reason = f" ({found.breaker_reason})" if found.breaker_reason else ""
        out.print(f"breaker: {found.breaker}{reason}")
        out.print(f"migrations: {'pending: ' + ', '.join(found.pending) if found.pending else 'all applied'}")
    if not healthy:
        sys.exit(1)


@sync.command()
@_range
@click.option("--repair", is_flag=True, help="Bring ClickHouse to what PostgreSQL holds, row by row.")
@click.option("--settle", "settle_s", type=click.FloatRange(0), default=60.0, show_default=True,
              help="Leave out what was received in the last so many seconds: it may be on its way.")  # fmt: skip
@_json
def verify(
    names: tuple[str, ...], first: datetime | None, last: datetime | None, repair: bool, settle_s: float, as_json: bool
) -> None:
    """Compare ClickHouse with PostgreSQL, by device and day, and tasks and employees with what Kafka still holds of them.

    Exit code 1 where they differ (after the repair).
    """
    settings = _enabled()
    verdict = asyncio.run(_verify(settings, names, first, last, repair, settle_s, as_json))
    _print_verdict(verdict, as_json)
    if not verdict.same:
        sys.exit(1)


async def _verify(
    settings: Settings,
    names: tuple[str, ...],
    first: datetime | None,
    last: datetime | None,
    repair: bool,
    settle_s: float,
    quiet: bool,
) -> Any:
    from preservarium.operations import topic_comparison
    from preservarium.operations.compared_tables import ALL_TABLES, TABLES
    from preservarium.operations.sync_status import settled, written
    from preservarium.operations.verification import Verdict, Verifier

    title = "repair" if repair else "verify"
    async with Verifier(settings, settled=partial(settled, settings), settle_s=settle_s) as verifier:
        verdict = Verdict()
        if tables := [TABLES[n] for n in names or TABLES if n in TABLES]:
            begin, end = _days(verifier.default_range(), first, last)
            with bar(title, quiet) as progress:
                verdict = await verifier.verify(tables, begin, end, repair=repair, progress=progress)
        for name in names or ALL_TABLES:
            if name in topic_comparison.TABLES:
                replayed = topic_comparison.TABLES[name]
                with bar(f"{title} {name}", quiet) as progress:
                    ends = await written(settings, replayed)
                    await verifier.verify_topic(replayed, ends, verdict, repair=repair, progress=progress)
        return verdict


@sync.command()
@_range
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
def rebuild(names: tuple[str, ...], first: datetime | None, last: datetime | None, yes: bool, as_json: bool) -> None:
    """Make the tables anew from PostgreSQL, a partition at a time, each put in its place in one step; then compare.

    Into tables of tasks and employees, all that Kafka holds is inserted again, whatever the days; what it holds no more stays.
    Where it was interrupted, start it again --from the day that it was at: what came before is done.
    """
    from preservarium.operations import topic_comparison
    from preservarium.operations.compared_tables import ALL_TABLES, TABLES
    from preservarium.operations.sync_status import settled, written
    from preservarium.operations.verification import SETTLE_S, Verifier

    settings = _enabled()
    if not yes and not as_json:
        click.confirm(
            "Replace these partitions in ClickHouse with what PostgreSQL or Kafka holds?", abort=True, err=True
        )

    async def run() -> tuple[dict[str, dict[str, int]], Any]:
        made: dict[str, dict[str, int]] = {}
        async with Verifier(settings, settled=partial(settled, settings)) as verifier:
            begin, end = _days(verifier.default_range(), first, last)
            for name in names or ALL_TABLES:
                with bar(f"rebuild {name}", as_json) as progress:
                    if name in TABLES:
                        made[name] = await verifier.rebuild(TABLES[name], begin, end, progress=progress)
                        continue
                    replayed = topic_comparison.TABLES[name]
                    ends = await written(settings, replayed)
                    made[name] = {"all": await verifier.replay(replayed, ends, progress=progress)}
            if end >= datetime.now(UTC).date():
                # What the worker inserted while a partition was being replaced is compared once it has settled.
                await asyncio.sleep(SETTLE_S)
        verdict = await _verify(settings, names, first, last, True, SETTLE_S, as_json)
        return made, verdict

    made, verdict = asyncio.run(run())
    if as_json:
        print_json({"partitions": made, "verdict": _document(verdict)})
    else:
        for name, partitions in made.items():
            click.echo(f"{name}: {len(partitions)} partitions, {sum(partitions.values()):,} rows")
        _print_verdict(verdict, False)
    if not verdict.same:
        sys.exit(1)


# --- parts


def _enabled() -> Settings:
    settings = load()
    if not settings.clickhouse.enabled:
        message = "ClickHouse is not enabled (PRESERVARIUM_CLICKHOUSE__ENABLED)"
        raise click.UsageError(message)
    return settings


def _days(kept: tuple[date, date], first: datetime | None, last: datetime | None) -> tuple[date, date]:
    """The days asked for, within what PostgreSQL keeps: of what is older, only ClickHouse could tell."""
    begin = max(kept[0], first.date()) if first else kept[0]
    end = min(kept[1], last.date()) if last else kept[1]
    if begin > end:
        message = f"no day between them is kept by PostgreSQL, which has {kept[0]} to {kept[1]}"
        raise click.UsageError(message)
    return begin, end


def _document(verdict: Any) -> dict[str, Any]:
    document = asdict(verdict) | {"same": verdict.same}
    for difference, told in zip(verdict.differences, document["differences"], strict=True):
        told["what"] = difference.what
        for side in ("expected", "found"):
            # A sum may be larger than JSON's numbers.
            told[side]["checksum"] = str(told[side]["checksum"])
    return document


def _print_verdict(verdict: Any, as_json: bool) -> None:
    if as_json:
        print_json(_document(verdict))
        return
    out = console()
    if verdict.differences:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("table", "device, file", "day", "expected", "found", "what", "done"):
            table.add_column(name, justify="right" if name in {"expected", "found"} else "left", overflow="fold")
        for d in verdict.differences[:PRINTED_MAX]:
            done = (
                f"{d.inserted} inserted, {d.deleted} deleted"
                if d.inserted or d.deleted
                else "made anew"
                if d.repaired
                else ""
            )
            if d.kept:
                done += f"{', ' if done else ''}{d.kept} left: the sink is behind"
            table.add_row(d.table, d.device_id, str(d.day), f"{d.expected.rows:,}", f"{d.found.rows:,}", d.what, done)
        out.print(table)
        if len(verdict.differences) > PRINTED_MAX:
            out.print(f"… and {verdict.differing + verdict.repaired - PRINTED_MAX:,} more")
    for name, rows in verdict.unmerged.items():
        if rows:
            out.print(f"{name}: {rows:,} rows are stored more than once, until ClickHouse merges them")
    out.print(
        f"{verdict.days} days, {verdict.rows:,} rows compared: "
        + ("the same" if verdict.same else f"{verdict.differing:,} device-days differ")
        + (f", {verdict.repaired:,} repaired" if verdict.repaired else "")
    )


@sync.command()
@click.argument("name", required=False)
@click.argument("parameters", nargs=-1, metavar="[PARAMETER=VALUE]...")
@_json
def query(name: str | None, parameters: tuple[str, ...], as_json: bool) -> None:
    """Ask what a dashboard asks; without a name, say which dashboards there are."""
    import orjson

    from preservarium.stores.clickhouse import ClickHouseStore
    from preservarium.stores.dashboards import DASHBOARDS, Dashboards

    if name is None:
        _print_dashboards([d.document() for d in DASHBOARDS.values()], as_json=as_json)
        return
    given: dict[str, str] = {}
    for parameter in parameters:
        key, equals, value = parameter.partition("=")
        if not equals:
            message = f"{parameter!r} is not of the form PARAMETER=VALUE"
            raise click.UsageError(message)
        given[key] = value
    settings = _enabled()

    async def ask() -> Any:
        store = ClickHouseStore(lambda: settings)
        try:
            return orjson.loads(await Dashboards(store, lambda: settings).answer(name, given))
        finally:
            await store.close()

    found = asyncio.run(ask())
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in found["columns"]:
        table.add_column(column)
    for row in found["rows"]:
        table.add_row(*("" if value is None else str(value) for value in row))
    console().print(table)


def _print_dashboards(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("dashboard", "parameters", "answers"):
        table.add_column(column)
    for dashboard in found:
        parameters = " ".join(
            p["name"] if p["default"] is None else f"[{p['name']}={p['default']}]" for p in dashboard["parameters"]
        )
        table.add_row(dashboard["name"], parameters.replace("[", "\\["), dashboard["meaning"])
    console().print(table)


commands: list[click.Command] = [sync]
