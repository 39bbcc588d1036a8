"""`preservarium canary`: a new version of a parser, or new bounds, first for a share of the devices."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preservarium.cli.instants import iso, now_us
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.domain.canary import CanaryDoc, Counts

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_actor = click.option("--actor", help="Who does it, for the history.  [default: user@host]")
_reason = click.option("--reason", required=True, help="Why, for the history.")


@click.group()
def canary() -> None:
    """Try a parser's new version, or new bounds, on a share of the devices.

    What is in force runs beside it on the same messages, and differences are counted. A person, or limits, promote it or roll it back.
    """


async def _with_connection(work: Any) -> Any:
    from preservarium.registry.apply import connect

    connection = await connect(load())
    try:
        return await work(connection)
    finally:
        await connection.close(timeout=5)


def _who(actor: str | None) -> str:
    from preservarium.registry.apply import default_actor

    return actor or default_actor()


@canary.command()
@click.argument("what", metavar="NAME@VERSION|FILE")
@click.option("--percent", type=click.IntRange(1, 100), default=1, show_default=True, help="Of the devices.")
@click.option(
    "--errors",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Rolled back beyond this share of messages that the candidate alone refuses.",
)
@click.option(
    "--differences",
    type=click.FloatRange(0, 1),
    help="Rolled back beyond this share of messages that come out otherwise.  [default: no limit]",
)
@click.option(
    "--messages",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Compared messages before anything is decided.",
)
@click.option(
    "--hold",
    "hold_s",
    type=click.FloatRange(0, 2_592_000),
    default=600.0,
    show_default=True,
    help="Seconds of a step, at least.",
)
@click.option("--auto", is_flag=True, help="Go on to 10, 50, 100 % and into force by itself, within the limits.")
@_reason
@_actor
@_json
def start(
    what: str, percent: int, errors: float, differences: float | None, messages: int, hold_s: float, auto: bool, reason: str,
    actor: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Show a share of the devices a parser's version (NAME@VERSION, a draft in the registry), or the one datatype that FILE changes."""
    from preservarium.operations import canaries

    limits: Any = {
        "errors": errors,
        "differences": differences,
        "messages_min": messages,
        "hold_s": hold_s,
        "auto": auto,
    }
    more: Any = {"actor": _who(actor), "reason": reason, "at_us": now_us()}
    path = Path(what)
    is_file = path.is_file()

    async def work(connection: Any) -> Any:
        if is_file:
            return await canaries.start_datatype(connection, path, percent, limits, **more)
        return await canaries.start_parser(connection, what, percent, limits, **more)

    made = asyncio.run(_with_connection(work))
    if as_json:
        print_json(made)
    else:
        click.echo(f"Canary {made['name']} is shown to {percent} % of the devices; a worker's relay tells the others.")


def _document(document: "CanaryDoc", counted: "Counts") -> dict[str, Any]:
    from dataclasses import asdict

    return {**document, "counts": {**asdict(counted), "share_different": round(counted.share(counted.different), 6),
                                   "share_broken": round(counted.share(counted.broken), 6)}}  # fmt: skip


@canary.command("list")
@_json
def list_(as_json: bool) -> None:
    """List what is under way, with what was compared at its present share."""
    from preservarium.stores import canaries

    async def work(connection: Any) -> Any:
        return [
            (one.document, await canaries.counts(connection, one.document))
            for one in await canaries.all_of_them(connection)
        ]

    found = asyncio.run(_with_connection(work))
    if as_json:
        print_json([_document(*one) for one in found])
        return
    for document, counted in found:
        _print(document, counted)
    if not found:
        click.echo("No canary is under way.")


@canary.command()
@click.argument("name")
@_json
def show(name: str, as_json: bool) -> None:
    """Show the canary NAME (parser/acme): its share, what was compared, examples of what differs, and its history."""
    from preservarium.stores import canaries, events

    async def work(connection: Any) -> Any:
        history = await events.read(connection, canaries.stream_of(name))
        there = [one for one in await canaries.all_of_them(connection) if one.document["name"] == name]
        if not there and not history:
            await canaries.get(connection, name)  # says so
        return [(one.document, await canaries.counts(connection, one.document)) for one in there], history

    found, history = asyncio.run(_with_connection(work))
    if as_json:
        told = [{"at": e.at_us, "type": e.type, "actor": e.actor, **_history(e.data)} for e in history]
        print_json({"canary": _document(*found[0]) if found else None, "history": told})
        return
    for document, counted in found:
        _print(document, counted)
    for e in history:
        said = ", ".join(f"{key} {value}" for key, value in _history(e.data).items() if value not in (None, [], ""))
        click.echo(f"  {iso(e.at_us)}  {e.type} by {e.actor}: {said}")


def _history(data: dict[str, Any]) -> dict[str, Any]:
    changed = data.get("doc") or data.get("set") or {}
    found = {
        "outcome": data.get("outcome"),
        "percent": changed.get("percent", data.get("percent")),
        "reason": data.get("reason"),
    }
    return {**found, **{name: data[name] for name in ("compared", "different", "broken") if name in data}}


def _print(document: "CanaryDoc", counted: "Counts") -> None:
    from rich.markup import escape

    out, limits = console(), document["limits"]
    version = f"@{document['candidate']['version']}" if document["kind"] == "parser" else ""
    out.print(
        f"[bold]{escape(document['name'])}{version}[/]  {document['percent']} % of the devices, since {iso(document['step_at'])}"
    )
    out.print(
        f"  compared {counted.compared:,}: {counted.different:,} come out otherwise ({counted.share(counted.different):.2%}), of these"
        f" {counted.broken:,} refused by the candidate alone ({counted.share(counted.broken):.2%}), {counted.mended:,} refused before alone"
        + (f"; {counted.skipped:,} not compared" if counted.skipped else "")
    )
    most = "none" if limits["differences"] is None else f"{limits['differences']:.2%}"
    out.print(f"  limits: refused {limits['errors']:.2%}, differences {most}, after {limits['messages_min']} messages"
              + (f"; goes on by itself after {limits['hold_s']:g} s" if limits["auto"] else ""))  # fmt: skip
    for example in counted.examples:
        out.print(
            f"  {escape(example['device_id'])} raw {example['raw']}: {escape(example['difference'])}", soft_wrap=True
        )


@canary.command()
@click.argument("name")
@click.argument("percent", type=click.IntRange(1, 100))
@_reason
@_actor
def step(name: str, percent: int, reason: str, actor: str | None) -> None:
    """Show the candidate of NAME to PERCENT of the devices; fewer than now is allowed, too."""
    from preservarium.stores import canaries

    asyncio.run(
        _with_connection(lambda c: canaries.step(c, name, percent, actor=_who(actor), reason=reason, at_us=now_us()))
    )
    click.echo(f"Canary {name} is shown to {percent} % of the devices.")


def _end(name: str, promote: bool, reason: str, actor: str | None) -> None:
    from preservarium.stores import canaries

    asyncio.run(
        _with_connection(
            lambda c: canaries.end(c, name, promote=promote, actor=_who(actor), reason=reason, at_us=now_us())
        )
    )
    click.echo(f"Canary {name} is {'in force for all' if promote else 'rolled back'}.")


@canary.command()
@click.argument("name")
@_reason
@_actor
def promote(name: str, reason: str, actor: str | None) -> None:
    """Put the candidate of NAME in force for all devices."""
    _end(name, True, reason, actor)


@canary.command()
@click.argument("name")
@_reason
@_actor
def rollback(name: str, reason: str, actor: str | None) -> None:
    """Take the candidate of NAME back. What it made stays stored, with its version; what it refused can be redriven."""
    _end(name, False, reason, actor)


commands: list[click.Command] = [canary]
