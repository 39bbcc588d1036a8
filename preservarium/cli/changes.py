"""`preservarium replay shadow|diff|promote|rollback|discard`, and `preservarium correct`: changes of what is stored, looked at before and taken back after."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from preservarium.cli.instants import iso, now_us, shown, when
from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.operations.changes.correcting import Corrected, Correcting, Series, Time
    from preservarium.operations.changes.promoting import Carrier
    from preservarium.settings import Settings
    from preservarium.stores.changes import Change

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_actor = click.option("--actor", help="Who does it, for the history.  [default: user@host]")
_reason = click.option("--reason", required=True, help="Why, for the history.")
_yes = click.option("--yes", is_flag=True, help="Do not ask.")
_change_id = click.argument("change_id", type=click.IntRange(1), metavar="CHANGE")

#: Rows and series that are printed; --json has more of them.
PRINTED_MAX: Final = 40


def _who(actor: str | None) -> str:
    from preservarium.registry.apply import default_actor

    return actor or default_actor()


def _asks(yes: bool, as_json: bool, question: str) -> None:
    if as_json and not yes:
        message = "--json does not ask: say --yes"
        raise click.UsageError(message)
    if not yes:
        click.confirm(question, abort=True, err=True)


def _span(text: str, option: str) -> int:
    """µs of a length of time: 30m, 2h, 7d; 0."""
    at = now_us()
    return 0 if text.strip() == "0" else max(0, at - when(text, option))


@asynccontextmanager
async def _connected(settings: "Settings", what: str) -> AsyncIterator[Any]:
    from preservarium.stores.connections import session

    connection = await session(settings.postgres, what)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


@asynccontextmanager
async def _carrier(settings: "Settings", connection: Any) -> AsyncIterator["Carrier"]:
    from preservarium.operations.changes.promoting import Carrier
    from preservarium.stores.maintenance import Maintenance

    if not settings.clickhouse.enabled:
        yield Carrier(settings, connection, None)
        return
    clickhouse = Maintenance(settings)
    await clickhouse.connect()
    try:
        yield Carrier(settings, connection, clickhouse)
    finally:
        await clickhouse.close()


# --- shadow replay


@click.command()
@click.option(
    "--parser", help="NAME@VERSION: this version reads, whatever its status; of devices whose type has the parser NAME."
)
@click.option(
    "--bounds",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Registry file: its datatypes judge, by its bounds and tests.",
)
@click.option(
    "--rule",
    "rules",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Registry file: its alarm rules watch.",
)
@click.option("--device", "devices", multiple=True, help="Only this device; may be repeated.")
@click.option("--type", "types", multiple=True, help="Only devices of this type; may be repeated.")
@click.option("--from", "from_", required=True, help="Received since: ISO 8601, or 2h, 1d ago.")
@click.option("--to", default=None, help="Received before.  [default: now]")
@click.option(
    "--warm-up",
    default="1d",
    show_default=True,
    help="So much before is read as it is, so that tests, counters and alarms have their past.",
)
@click.option(
    "--run-on", default="1h", show_default=True, help="So much after is read as it is: what changes of later messages."
)
@click.option("--reach", default="7d", show_default=True, help="Readings may be so much older than their receipt.")
@click.option("--processes", type=click.IntRange(1, 64), help="How many at once.  [default: one a core]")
@click.option("--reason", default="", help="Why, for the history.")
@_actor
@_json
def shadow(
    parser: str | None,
    bounds: Path | None,
    rules: Path | None,
    devices: tuple[str, ...],
    types: tuple[str, ...],
    from_: str,
    to: str | None,
    warm_up: str,
    run_on: str,
    reach: str,
    processes: int | None,
    reason: str,
    actor: str | None,
    as_json: bool,
) -> None:
    """Derive raw records with a candidate beside the live stream, and note what it would change.

    Nothing that is stored is touched: look at it with `replay diff`, have it with `replay promote`. Without a candidate the registry as it is now is
    compared with what is stored.
    """
    from preservarium.operations.changes import shadow as operation

    wanted = operation.Wanted(
        when(from_, "--from"), now_us() if to is None else when(to, "--to"), devices, types, _span(warm_up, "--warm-up"),
        _span(run_on, "--run-on"), _span(reach, "--reach"),
    )  # fmt: skip
    settings = load()

    async def run() -> "Change":
        async with _connected(settings, "a shadow replay") as connection:
            candidate = operation.Candidate(
                None if parser is None else await operation.parser_document(connection, parser),
                {} if bounds is None else operation.documents_of(bounds, "datatypes"),
                {} if rules is None else operation.documents_of(rules, "rules"),
            )
            with bar("shadow replay", as_json) as progress:
                found = await operation.make(
                    settings,
                    connection,
                    candidate,
                    wanted,
                    actor=_who(actor),
                    reason=reason,
                    processes=processes,
                    progress=progress,
                )
            return found.change

    change = asyncio.run(run())
    if as_json:
        print_json(change.document())
        return
    said = change.summary
    click.echo(
        f"Change {change.change_id}: {said['raw_records']:,} raw records, {said['readings']:,} readings derived. The candidate adds {said['added']:,} rows, "
        f"removes {said['removed']:,} and changes {said['changed']:,}, of {said['devices']:,} devices; alarm transitions: {said['alarms']['added']:,} more, "
        f"{said['alarms']['removed']:,} less."
    )
    if change.plan["incomplete"]:
        click.echo(
            f"Kafka has deleted the beginning of that time in partition {', '.join(map(str, change.plan['incomplete']))}."
        )
    if said["unexplained"]:
        click.echo(
            f"{said['unexplained']:,} rows are not what the registry of their time makes of them either: `preservarium lineage verify`."
        )
    if said["corrected_kept"]:
        click.echo(f"{said['corrected_kept']:,} rows that people corrected stay as they are.")
    if said["alarms"]["kept"]:
        click.echo(f"{said['alarms']['kept']:,} alarms stay as they are: they stand, or somebody has answered them.")
    click.echo(
        f"Look: preservarium replay diff {change.change_id}. Have it: preservarium replay promote {change.change_id} --reason …"
    )


@click.command()
@_change_id
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Numbers that differ by no more, absolutely or relatively, are only counted.",
)
@click.option("--device", help="Only this device.")
@click.option("--type", "component_type", help="Only this component type.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=1_000,
    show_default=True,
    help="Rows that are listed one by one.",
)
@_json
def diff(
    change_id: int, tolerance: float, device: str | None, component_type: str | None, limit: int, as_json: bool
) -> None:
    """Show what a change does: rows added, removed and changed, and what alarms would have said."""
    settings = load()

    async def run() -> dict[str, Any]:
        from preservarium.operations.changes import showing
        from preservarium.stores import changes

        async with _connected(settings, "a comparison") as connection:
            change = await changes.find(connection, change_id)
            found = await showing.report(
                connection, change, tolerance=tolerance, device=device, component_type=component_type, limit=limit
            )
            found["history"] = [
                {"at": event.at_us, "event": event.type, "actor": event.actor, "reason": event.data.get("reason", "")}
                for event in await changes.history(connection, change_id)
            ]
            return found

    found = asyncio.run(run())
    if as_json:
        print_json(found)
        return
    _print_diff(found)


def _print_diff(found: Mapping[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out, sums = console(), found["sums"]
    out.print(
        f"Change {found['change_id']} ({found['state']}, generation {found['generation']}): {sums['added']:,} rows added, {sums['removed']:,} removed, "
        f"{sums['changed']:,} changed"
        + (f", {sums['within_tolerance']:,} within the tolerance" if found["tolerance"] else "")
        + "."
    )
    table = Table(box=None, pad_edge=False)
    for name in ("device", "type", "pin", "added", "removed", "changed", "first", "last", "largest difference"):
        table.add_column(
            name,
            justify="right" if name in ("added", "removed", "changed", "largest difference") else "left",
            overflow="fold",
        )
    for one in found["series"][:PRINTED_MAX]:
        largest = "" if one["largest"] is None else f"{one['largest']:+g}"
        table.add_row(
            escape(one["device_id"]), escape(one["component_type"]), escape(one["pin_position"]), f"{one['added']:,}", f"{one['removed']:,}",
            f"{one['changed']:,}", shown(one["first"]), shown(one["last"]), largest,
        )  # fmt: skip
    out.print(table)
    if len(found["series"]) > PRINTED_MAX:
        out.print(f"… and {len(found['series']) - PRINTED_MAX} series more: --json has them.")
    rows = Table(box=None, pad_edge=False)
    for name in ("", "device", "type", "at", "stands", "would be"):
        rows.add_column(name, overflow="fold")
    for row in found["rows"][:PRINTED_MAX]:
        rows.add_row(
            {"added": "+", "removed": "-", "changed": "~"}[row["op"]], escape(row["device_id"]), escape(row["component_type"]), iso(row["timestamp"]),
            escape(_said(row["before"])), escape(_said(row["after"])),
        )  # fmt: skip
    out.print(rows)
    if len(found["rows"]) > PRINTED_MAX:
        out.print(f"… and {len(found['rows']) - PRINTED_MAX} rows more: --json has them.")
    for event in found["alarms"][:PRINTED_MAX]:
        sign = "+" if event["op"] == "added" else "-"
        out.print(
            escape(
                f"{sign} alarm {event['rule']} of {event['device_id']} {event['transition']} at {iso(event['detected_at'])}: {event['message'] or ''}"
            ),
            soft_wrap=True,
        )
    for event in found["history"]:
        out.print(
            escape(
                f"{shown(event['at'])} {event['event']} by {event['actor']}"
                + (f": {event['reason']}" if event["reason"] else "")
            ),
            soft_wrap=True,
        )


def _said(side: Mapping[str, Any] | None) -> str:
    if side is None:
        return ""
    value = side["value_text"] if side["value"] is None else f"{side['value']!r}"
    flags = f" [{', '.join(side['flags'])}]" if side["flags"] else ""
    return f"{'' if value is None else value} {side['unit']} q{side['quality']}{flags}".strip()


def _carry(
    change_id: int, what: str, actor: str | None, reason: str, as_json: bool, kind: str | None = None
) -> "Change":
    settings = load()

    async def run() -> "Change":
        from preservarium.stores import changes
        from preservarium.stores.changes import ChangeError

        async with _connected(settings, "a change") as connection, _carrier(settings, connection) as carrier:
            change = await changes.find(connection, change_id)
            if kind is not None and change.kind != kind:
                message = f"change {change_id} is a {change.kind}: see `preservarium {'correct' if change.kind == 'correction' else 'replay'} --help`"
                raise ChangeError(message)
            with bar(f"{what} {change_id}", as_json) as progress:
                do: Callable[..., Awaitable[Change]] = carrier.promote if what == "promote" else carrier.rollback
                return await do(change_id, actor=_who(actor), reason=reason, progress=progress)

    return asyncio.run(run())


def _print_done(change: "Change", as_json: bool) -> None:
    if as_json:
        print_json(change.document())
        return
    click.echo(f"Change {change.change_id} is {change.state}.")
    if left := change.summary.get("left_alone"):
        click.echo(f"{left:,} rows were another by then, and were left alone.")
    if left := change.summary.get("not_restored"):
        click.echo(f"{left:,} rows were overwritten meanwhile (a later generation), and were left alone.")


@click.command()
@_change_id
@_reason
@_actor
@_yes
@_json
def promote(change_id: int, reason: str, actor: str | None, yes: bool, as_json: bool) -> None:
    """Put what a change derived in the place of what stands, in both databases, with all that follows.

    What was interrupted is gone on with by the same command.
    """
    _asks(yes, as_json, f"Promote change {change_id}? `replay rollback {change_id}` takes it back.")
    _print_done(_carry(change_id, "promote", actor, reason, as_json, "replay"), as_json)


@click.command()
@_change_id
@_reason
@_actor
@_yes
@_json
def rollback(change_id: int, reason: str, actor: str | None, yes: bool, as_json: bool) -> None:
    """Put back what stood before a change, row by row. What was interrupted is gone on with by the same command."""
    _asks(yes, as_json, f"Take change {change_id} back?")
    _print_done(_carry(change_id, "rollback", actor, reason, as_json, "replay"), as_json)


@click.command()
@_change_id
@_reason
@_actor
@_json
def discard(change_id: int, reason: str, actor: str | None, as_json: bool) -> None:
    """Let a change go that is not carried out; its rows are deleted, its history stays."""
    settings = load()

    async def run() -> "Change":
        from preservarium.stores import changes

        async with _connected(settings, "a change") as connection:
            change = await changes.find(connection, change_id)
            return await changes.discard(connection, change, actor=_who(actor), reason=reason, at_us=now_us())

    _print_done(asyncio.run(run()), as_json)


async def listed(settings: "Settings", kind: str) -> "list[Change]":
    """The changes of a kind."""
    from preservarium.stores import changes

    async with _connected(settings, "a list") as connection:
        return await changes.listed(connection, kind)


def print_changes(found: "list[Change]") -> None:
    """Changes as a table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("change", "state", "generation", "made", "by", "rows", "what"):
        table.add_column(name, justify="right" if name in ("change", "generation", "rows") else "left", overflow="fold")
    for one in found:
        table.add_row(
            str(one.change_id), str(one.state), str(one.generation), shown(one.created_at), escape(one.created_by),
            f"{one.summary.get('rows', 0):,}", escape(_what(one)),
        )  # fmt: skip
    console().print(table)


def _what(change: "Change") -> str:
    plan = change.plan
    if change.kind == "correction":
        return f"{plan['correction']}: {plan['reason']}"
    candidate = plan["candidate"]
    named = [
        candidate["parser"],
        *(f"bounds of {one}" for one in candidate["bounds"]),
        *(f"rule {one}" for one in candidate["rules"]),
    ]
    return ", ".join(filter(None, named)) or "the registry as it was then"


# --- corrections


@click.group()
def correct() -> None:
    """Correct stored readings by hand: originals stay, what is derived of them follows, and each correction can be undone."""


def _series_options(function: Any) -> Any:
    for option in (
        click.option("--mode", help="Connector mode, where several are meant."),
        click.option("--pin", help="Pin, where several are meant."),
        click.option("--type", "component_type", help="Component type.  [default: all of the device]"),
        click.option("--device", required=True, help="The device, by any spelling of its address."),
    ):
        function = option(function)
    return function


def _ways(function: Any) -> Any:
    for option in (
        _json,
        _yes,
        _actor,
        _reason,
        click.option("--dry-run", is_flag=True, help="Say what would be changed, and change nothing."),
    ):
        function = option(function)
    return function


_from = click.option("--from", "from_", required=True, help="Of the device's time: ISO 8601, or 2h, 1d ago.")
_to = click.option("--to", required=True, help="Before this instant.")


def _time(from_: str, to: str) -> "Time":
    from preservarium.operations.changes.correcting import Time

    begin, end = when(from_, "--from"), when(to, "--to")
    if end <= begin:
        message = "the time is empty: --to is not after --from"
        raise click.UsageError(message)
    return Time(begin, end)


def _which(device: str, component_type: str | None, pin: str | None, mode: str | None) -> "Series":
    from preservarium.operations.changes.correcting import Series

    return Series(device, component_type, pin, mode)


def _correct(
    kind: str,
    said: Mapping[str, Any],
    ask: "Callable[[Correcting], Awaitable[Corrected]]",
    *,
    reason: str,
    actor: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    if as_json and not (yes or dry_run):
        message = "--json does not ask: say --yes, or --dry-run"
        raise click.UsageError(message)
    settings = load()

    async def run() -> None:
        from preservarium.domain.quality.correction import CorrectionError
        from preservarium.operations.changes import showing
        from preservarium.operations.changes.correcting import Correcting
        from preservarium.stores import changes
        from preservarium.stores.changes import ChangeError

        async with _connected(settings, "a correction") as connection, _carrier(settings, connection) as carrier:
            correcting = Correcting(settings, connection)
            generation = await correcting.prepare()
            try:
                rows = await ask(correcting)
            except CorrectionError as e:
                raise ChangeError(str(e)) from None
            change = await correcting.note(kind, said, rows, actor=_who(actor), reason=reason, generation=generation)
            done = False
            try:
                found = await showing.report(connection, change)
                found["history"] = []
                if not as_json:
                    _print_diff(found)
                if dry_run:
                    if as_json:
                        print_json({**found, "dry_run": True})
                    return
                if not yes:
                    click.confirm("Correct this?", abort=True, err=True)
                done = True
            finally:
                if not done:
                    await changes.discard(
                        connection, change, actor=_who(actor), reason="not carried out", at_us=now_us()
                    )
            with bar(f"correction {change.change_id}", as_json) as progress:
                change = await carrier.promote(change.change_id, actor=_who(actor), reason=reason, progress=progress)
            if as_json:
                print_json({**found, **change.document(), "dry_run": False})
            else:
                click.echo(
                    f"Corrected: change {change.change_id}. `preservarium correct undo {change.change_id} --reason …` takes it back."
                )

    asyncio.run(run())


@correct.command()
@_series_options
@_from
@_to
@_ways
def void(
    device: str, component_type: str | None, pin: str | None, mode: str | None, from_: str, to: str, **ways: Any
) -> None:
    """Void readings: their values were none of their device. The rows stay, without a value and flagged."""
    which, time = _which(device, component_type, pin, mode), _time(from_, to)
    _correct("void", {**_about(which), "from": time.from_us, "to": time.to_us}, lambda c: c.void(which, time), **ways)


@correct.command("replace")
@_series_options
@click.option("--at", required=True, help="The reading's instant, exactly: ISO 8601.")
@click.option("--value", required=True, help="What it is to be.")
@_ways
def replace_(
    device: str, component_type: str | None, pin: str | None, mode: str | None, at: str, value: str, **ways: Any
) -> None:
    """Replace the value of one reading."""
    if component_type is None:
        message = "say which: --type"
        raise click.UsageError(message)
    which, at_us = _which(device, component_type, pin, mode), when(at, "--at")
    _correct(
        "replace", {**_about(which), "at": at_us, "value": value}, lambda c: c.replace(which, at_us, value), **ways
    )


@correct.command()
@_series_options
@_from
@_to
@click.option("--by", "factor", required=True, help="Factor: 0.1, 1000, 1/60.")
@_ways
def scale(
    device: str,
    component_type: str | None,
    pin: str | None,
    mode: str | None,
    from_: str,
    to: str,
    factor: str,
    **ways: Any,
) -> None:
    """Multiply the values of a time by a factor."""
    which, time = _which(device, component_type, pin, mode), _time(from_, to)
    said = {**_about(which), "from": time.from_us, "to": time.to_us, "factor": factor}
    _correct("scale", said, lambda c: c.linear(which, time, factor=factor), **ways)


@correct.command()
@_series_options
@_from
@_to
@click.option("--by", "amount", required=True, help="What is added: -2.5, 1/3.")
@_ways
def offset(
    device: str,
    component_type: str | None,
    pin: str | None,
    mode: str | None,
    from_: str,
    to: str,
    amount: str,
    **ways: Any,
) -> None:
    """Add an amount to the values of a time."""
    which, time = _which(device, component_type, pin, mode), _time(from_, to)
    said = {**_about(which), "from": time.from_us, "to": time.to_us, "offset": amount}
    _correct("offset", said, lambda c: c.linear(which, time, offset=amount), **ways)


@correct.command()
@_series_options
@click.option("--with", "other", required=True, help="The other device.")
@_from
@_to
@_ways
def swap(
    device: str,
    component_type: str | None,
    pin: str | None,
    mode: str | None,
    other: str,
    from_: str,
    to: str,
    **ways: Any,
) -> None:
    """Swap the readings of two devices that were mistaken for each other for a time."""
    one, two, time = (
        _which(device, component_type, pin, mode),
        _which(other, component_type, pin, mode),
        _time(from_, to),
    )
    said = {**_about(one), "with": other, "from": time.from_us, "to": time.to_us}
    _correct("swap", said, lambda c: c.swap(one, two, time), **ways)


@correct.command()
@_series_options
@click.option("--at", required=True, help="When the meter was exchanged.")
@click.option("--final", help="What the old one showed at the end.  [default: nobody read it]")
@click.option("--initial", default="0", show_default=True, help="What the new one began with.")
@_ways
def exchange(
    device: str,
    component_type: str | None,
    pin: str | None,
    mode: str | None,
    at: str,
    final: str | None,
    initial: str,
    **ways: Any,
) -> None:
    """Note that a meter was exchanged: what was consumed across the exchange follows.

    Of readings that are stored; register the exchange with the device as well (`counter: {swaps: …}` in the registry), for those that come.
    """
    which, at_us = _which(device, component_type, pin, mode), when(at, "--at")
    said = {**_about(which), "at": at_us, "final": final, "initial": initial}
    _correct("exchange", said, lambda c: c.exchange(which, at_us, final=final, initial=initial), **ways)


def _about(which: "Series") -> dict[str, Any]:
    return {"device": which.device, "type": which.component_type, "pin": which.pin, "mode": which.mode}


@correct.command()
@_change_id
@_reason
@_actor
@_yes
@_json
def undo(change_id: int, reason: str, actor: str | None, yes: bool, as_json: bool) -> None:
    """Take a correction back: the originals stand again, with all that follows."""
    _asks(yes, as_json, f"Take correction {change_id} back?")
    _print_done(_carry(change_id, "undo", actor, reason, as_json, "correction"), as_json)


@correct.command()
@_change_id
@_reason
@_actor
@_yes
@_json
def resume(change_id: int, reason: str, actor: str | None, yes: bool, as_json: bool) -> None:
    """Go on with a correction that was interrupted, or have one again that was undone."""
    _asks(yes, as_json, f"Carry correction {change_id} out?")
    _print_done(_carry(change_id, "promote", actor, reason, as_json, "correction"), as_json)


@correct.command("list")
@_json
def list_(as_json: bool) -> None:
    """List the corrections, the newest first."""
    found = asyncio.run(listed(load(), "correction"))
    if as_json:
        print_json([one.document() for one in found])
    elif found:
        print_changes(found)
    else:
        click.echo("Nothing was corrected yet.")


#: Of `preservarium replay`.
of_replay: list[click.Command] = [shadow, diff, promote, rollback, discard]
commands: list[click.Command] = [correct]
