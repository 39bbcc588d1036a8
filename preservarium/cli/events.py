"""`preservarium events`: the event store: who did what when, how things stood then, and whether all of it is there."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from preservarium.cli.instants import iso, now_us, when
from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.stores.events import Event
    from preservarium.stores.projections import Rebuilt

#: Long values are cut in what is printed; --json has them whole.
VALUE_CHARS_MAX: Final = 160
#: Differences that are printed; --json has more.
PRINTED_MAX: Final = 20
#: Projections, as in preservarium/stores/projections.py, which is not imported for the help page; a test holds them equal.
PROJECTIONS: Final = ("registry", "actions", "alarms", "commands")

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("events")
def events() -> None:
    """Read, check and replay the event store.

    Every change of the registry, every action on an alarm, every step of a command and every replay is an event in it, chained by
    SHA-256 to the one before in its stream (device/…, type/…, alarm/…, command/…, replay/…).
    """


async def _with_connection(work: Any) -> Any:
    from preservarium.registry.apply import connect

    connection = await connect(load())
    try:
        return await work(connection)
    finally:
        await connection.close(timeout=5)


def _document(e: "Event") -> dict[str, Any]:
    return {"position": e.position, "stream": e.stream_id, "version": e.version, "type": e.type, "actor": e.actor, "at": e.at_us,
            "at_iso": iso(e.at_us), "hash": e.hash, "data": e.data}  # fmt: skip


def _value(value: Any) -> str:
    import orjson
    from rich.markup import escape

    text = orjson.dumps(value).decode()
    return escape(text if len(text) <= VALUE_CHARS_MAX else text[:VALUE_CHARS_MAX] + "…")


@events.command()
@click.option("--stream", "prefix", default="", help="Streams whose name begins so: device/, alarm/70B3…, command/.")
@click.option("--type", "kind", help="Type of the event: created, changed, removed, action_done, …")
@click.option("--actor", help="Who did it.")
@click.option("--since", help="Then or later: ISO 8601, or 30m, 2h, 7d ago.")
@click.option("--until", help="Then or earlier.")
@click.option(
    "--after", type=click.IntRange(0), help="Only beyond this position, oldest first: to read on where one stopped."
)
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="At most so many.")
@_json
def log(
    prefix: str, kind: str | None, actor: str | None, since: str | None, until: str | None, after: int | None, limit: int, as_json: bool
) -> None:  # fmt: skip
    """List events of all streams in the order in which they were written: the newest, or those beyond --after."""
    from preservarium.stores import events as store

    which = store.Filter(
        prefix, kind, actor, when(since, "--since") if since else None, when(until, "--until") if until else None
    )
    found = asyncio.run(_with_connection(lambda c: store.log(c, which, after=after, limit=limit, newest=after is None)))
    if as_json:
        print_json([_document(e) for e in found])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("position", "at", "stream", "version", "type", "by", "what"):
        table.add_column(name, overflow="fold", no_wrap=name in ("position", "at", "version"))
    for e in found:
        what = ", ".join(sorted([*e.data.get("set", ()), *e.data.get("unset", ())])) if e.type == "changed" else ""
        table.add_row(
            str(e.position),
            iso(e.at_us),
            escape(e.stream_id),
            str(e.version),
            escape(e.type),
            escape(e.actor),
            escape(what),
        )
    console().print(table)


@events.command()
@click.argument("stream")
@click.option(
    "--from", "from_version", type=click.IntRange(1), default=1, show_default=True, help="Begin at this version."
)
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="At most so many.")
@_json
def show(stream: str, from_version: int, limit: int, as_json: bool) -> None:
    """Print the events of STREAM in full, from a version on. A parser's stream is parser/NAME@VERSION."""
    from preservarium.stores import events as store

    found = asyncio.run(_with_connection(lambda c: store.read(c, stream, after_version=from_version - 1, limit=limit)))
    if not found:
        message = (
            f"stream {stream!r} has no event {'' if from_version == 1 else f'from version {from_version} on'}".rstrip()
        )
        raise store.EventsError(message)
    if as_json:
        print_json([_document(e) for e in found])
        return
    from rich.markup import escape

    out = console()
    for e in found:
        out.print(
            f"[bold]{escape(e.stream_id)}[/] {e.version}  {iso(e.at_us)}  {escape(e.type)} by {escape(e.actor)}"
            f"  [dim]position {e.position}, hash {e.hash}[/]"
        )
        for key, value in e.data.items():
            inner = value if key in ("doc", "set") and isinstance(value, dict) else {key: value}
            for name, each in inner.items():
                out.print(f"    {escape(str(name))}: {_value(each)}")


@events.command("state-at")
@click.argument("stream")
@click.option("--at", help="As of this instant: ISO 8601, or 30m, 2h, 7d ago.  [default: now]")
@click.option("--version", type=click.IntRange(1), help="As of this version.")
@_json
def state_at(stream: str, at: str | None, version: int | None, as_json: bool) -> None:
    """Print the document of STREAM as it was at an instant, or as of a version. Exit code 1 where there was none."""
    from preservarium.stores import events as store

    if at is not None and version is not None:
        message = "--at and --version exclude each other"
        raise click.UsageError(message)
    until_us = when(at, "--at") if at else None
    document, reached = asyncio.run(
        _with_connection(lambda c: store.state_at(c, stream, until_us=until_us, version=version))
    )
    if version is not None and reached < version:
        message = f"stream {stream!r} has no version {version}" + (f": its last one is {reached}" if reached else "")
        raise store.EventsError(message)
    if as_json:
        print_json({"stream": stream, "version": reached, "at": until_us, "document": document})
    elif document is not None:
        click.echo(f"{stream}, version {reached}", err=True)
        print_json(document)
    if document is None:
        if not as_json:
            click.echo(f"{stream}: there was none" + (f" (version {reached} removed it)" if reached else ""), err=True)
        sys.exit(1)


@events.command()
@click.option("--stream", "prefix", default="", help="Only streams whose name begins so.")
@click.option(
    "--keep",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the end of each stream to this file, for a place that the database's owner cannot reach.",
)
@click.option(
    "--against",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare with a file that --keep wrote.",
)
@_json
def verify(prefix: str, keep: Path | None, against: Path | None, as_json: bool) -> None:
    """Check that no event was altered, taken out, swapped or cut off. Exit code 1 where one was.

    The chain has no secret: who may write the database may write all of it anew. Against that helps a file of --keep that lies elsewhere.
    """
    from preservarium.stores import events as store

    async def work(connection: Any) -> Any:
        kept = _read_ends(against) if against is not None else []
        with bar("verify", as_json) as progress:
            found = await store.verify(connection, prefix=prefix, progress=lambda done, of: progress(done, of, ""))
        faults = [*found.faults, *await store.against(connection, kept)]
        if keep is not None and not faults:
            ends = [end async for end in store.ends(connection, prefix=prefix)]
            await asyncio.to_thread(_write_ends, keep, ends)
        return found, faults, len(kept)

    found, faults, compared = asyncio.run(_with_connection(work))
    if as_json:
        print_json(
            {"streams": found.streams, "events": found.events, "compared": compared, "faults": faults, "ok": not faults}
        )
    else:
        for fault in faults:
            click.echo(fault, err=True)
        more = f", {compared:,} ends compared" if against is not None else ""
        click.echo(f"{found.events:,} events in {found.streams:,} streams{more}: {len(faults)} faults.")
        if keep is not None:
            click.echo(f"Not written: {keep}" if faults else f"Written: {keep}", err=bool(faults))
    if faults:
        sys.exit(1)


def _write_ends(path: Path, ends: list[tuple[str, int, str]]) -> None:
    import orjson

    whole = path.with_name(f".{path.name}.part")
    whole.write_bytes(b"".join(orjson.dumps(end) + b"\n" for end in ends))
    whole.replace(path)


def _read_ends(path: Path) -> list[tuple[str, int, str]]:
    import orjson

    from preservarium.stores.events import EventsError

    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            stream, version, hashed = orjson.loads(line)
            bytes.fromhex(hashed)
            if type(stream) is not str or type(version) is not int or len(hashed) != 64 or not 0 < version < 2**63:
                raise ValueError
        except (ValueError, TypeError):
            message = f"{path}, line {number}: not what `preservarium events verify --keep` writes"
            raise EventsError(message) from None
        found.append((stream, version, hashed))
    return found


@events.command()
@click.option(
    "--projection", "names", multiple=True, type=click.Choice(PROJECTIONS), help="Only this one; may be repeated."
)
@click.option("--write", is_flag=True, help="Write rows anew that differ or are missing.")
@click.option("--reason", default="", help="Why, for the history; needed with --write.")
@click.option("--actor", help="Who does it, for the history.  [default: user@host]")
@_json
def replay(names: tuple[str, ...], write: bool, reason: str, actor: str | None, as_json: bool) -> None:
    """Make the projections anew of their events, and compare them with what stands. Exit code 1 where they differ.

    registry: the documents; actions: what operators did; alarms: the alarms, of their transitions; commands: the commands. Nothing that
    stands is touched without --write. Rows that follow from no event are named, and left.
    """
    from preservarium.registry.apply import default_actor
    from preservarium.stores import projections

    if write and not reason.strip():
        message = "--write needs a --reason: it goes into the event store"
        raise click.UsageError(message)
    mend = projections.Mending(actor or default_actor(), reason.strip(), now_us()) if write else None

    async def work(connection: Any) -> list["Rebuilt"]:
        with bar("replay", as_json) as progress:
            return await projections.rebuild(
                connection, names or PROJECTIONS, mend=mend, progress=lambda name, done, of: progress(done, of, name)
            )

    found: list[Rebuilt] = asyncio.run(_with_connection(work))
    left = [
        one for one in found if not one.equal and (not write or one.mended < one.different + one.missing or one.extra)
    ]
    if as_json:
        from dataclasses import asdict

        print_json(
            {"projections": [{**asdict(one), "equal": one.equal} for one in found], "equal": not left, "written": write}
        )
    else:
        _print_replay(found)
    if left:
        sys.exit(1)


def _print_replay(found: list["Rebuilt"]) -> None:
    for one in found:
        counts = {"different": one.different, "missing": one.missing, "extra": one.extra, "mended": one.mended,
                  "from before they were told": one.untold}  # fmt: skip
        said = ", ".join(f"{n:,} {word}" for word, n in counts.items() if n)
        verdict = "equal" if one.equal else "not equal"
        click.echo(
            f"{one.name:<10}{one.events:>10,} events{one.rows:>10,} rows  {verdict}{f': {said}' if said else ''}"
        )
        for text in one.named[:PRINTED_MAX]:
            click.echo(f"  {text}")
        if len(one.named) > PRINTED_MAX:
            click.echo("  … --json names more")


commands: list[click.Command] = [events]
