"""`preservarium registry`: what devices there are and how they are decoded, checked and watched."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preservarium.cli.instants import iso
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load, load_alone

#: As in preservarium/registry/starting.py, which is not imported for the help page; a test holds them equal.
STARTS = ("plain", "ttn", "chirpstack", "zigbee2mqtt")

if TYPE_CHECKING:
    from preservarium.domain.registry.checks import RegistryFile
    from preservarium.stores.registry import Change, Plan

#: Long values are cut in the printed difference; --json has them whole.
VALUE_CHARS_MAX = 120
#: Changes printed in full; of the others only the number.
CHANGES_SHOWN_MAX = 60


@click.group()
def registry() -> None:
    """Apply, check, export and inspect the registry."""


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_file = click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))


def _print_problems(file: "RegistryFile", *, err: bool) -> None:
    for problem in file.problems:
        click.echo(f"{problem.level}: {problem}" if problem.level == "warning" else str(problem), err=err)


def _value(value: Any) -> str:
    import orjson
    from rich.markup import escape

    text = orjson.dumps(value).decode()
    return escape(text if len(text) <= VALUE_CHARS_MAX else text[:VALUE_CHARS_MAX] + "…")


def _print_change(out: Any, change: "Change") -> None:
    from rich.markup import escape

    name = escape(change.stream)
    if change.action == "create":
        out.print(f"[green]+ {name}[/]")
    elif change.action == "remove":
        out.print(f"[red]- {name}[/]")
    else:
        out.print(f"[yellow]~ {name}[/]")
        assert change.before is not None
        assert change.after is not None
        for field in change.fields:
            before = _value(change.before[field]) if field in change.before else "[dim]absent[/]"
            after = _value(change.after[field]) if field in change.after else "[dim]absent[/]"
            out.print(f"    {escape(field)}: [red]{before}[/] → [green]{after}[/]")


def _print_plan(plan: "Plan") -> None:
    out = console()
    for change in plan.changes[:CHANGES_SHOWN_MAX]:
        _print_change(out, change)
    if len(plan.changes) > CHANGES_SHOWN_MAX:
        out.print(f"… and {len(plan.changes) - CHANGES_SHOWN_MAX} more")


def _change_document(change: "Change") -> dict[str, Any]:
    return {"stream": change.stream, "action": change.action, "before": change.before, "after": change.after}


@registry.command()
@_file
@click.option("--dry-run", is_flag=True, help="Show the difference and write nothing.")
@click.option("--prune", is_flag=True, help="Remove what the file does not name, in the sections that it has.")
@click.option("--actor", help="Who does it, for the history.  [default: user@host]")
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0), default=0.0, help="Seconds to wait for a PostgreSQL that is starting."
)
@_json
def apply(file: Path, dry_run: bool, prune: bool, actor: str | None, wait_s: float, as_json: bool) -> None:
    """Bring the registry to what FILE says. Applying it again changes nothing."""
    from preservarium.registry.apply import apply as apply_file

    done = asyncio.run(apply_file(load(), file, actor=actor, prune=prune, dry_run=dry_run, wait_s=wait_s))
    if as_json:
        print_json(
            {
                "changes": [_change_document(c) for c in done.plan.changes],
                "counts": done.plan.counts(),
                "extra": done.plan.extra,
                "warnings": [str(p) for p in done.file.problems],
                "dry_run": dry_run,
                "revisions": done.committed.revisions if done.committed else {},
                "records": done.records,
                "relay_s": round(done.relay_s, 4),
                "relay_error": done.relay_error,
            }
        )
        return
    _print_problems(done.file, err=True)
    _print_plan(done.plan)
    counts = done.plan.counts()
    if not done.plan.changes:
        click.echo(f"Nothing to change: {counts['unchanged']} documents are as the file says.")
    else:
        verb = "To create" if dry_run else "Created"
        click.echo(
            f"{verb} {counts['create']}, {'change' if dry_run else 'changed'} {counts['change']}, "
            f"{'remove' if dry_run else 'removed'} {counts['remove']}; {counts['unchanged']} unchanged."
        )
    if done.plan.extra:
        click.echo(f"{len(done.plan.extra)} documents are not in the file and stay; --prune removes them.")
    if done.records == "sent":
        click.echo(f"Sent to the workers in {done.relay_s:.2f} s.")
    elif done.records == "pending":
        click.echo(
            f"Saved. Kafka did not take the records yet ({done.relay_error}); a worker will send them.", err=True
        )


@registry.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option(
    "--for", "name", type=click.Choice(STARTS), default=STARTS[0], show_default=True, help="How the first device comes."
)
def init(file: Path | None, name: str) -> None:
    """Write a small registry file with comments to FILE, to begin with; print it where no FILE is named."""
    from preservarium.registry.starting import start_text, write_start

    if file is None:
        click.echo(start_text(name), nl=False)
        return
    written = write_start(name, file)
    click.echo(
        f"{'Written' if written else 'Already there'}: {file}. Change it, then: preservarium registry apply {file}"
    )


@registry.command()
@_file
@click.option(
    "--with-registry", is_flag=True, help="Let references go to what the registry holds already (needs PostgreSQL)."
)
@_json
def check(file: Path, with_registry: bool, as_json: bool) -> None:
    """Say everything that is wrong with FILE; exit 1 where something is."""
    from preservarium.registry.file import read
    from preservarium.registry.proving import check_scripts
    from preservarium.stores import registry as store

    found = read(file)
    if not found.errors:
        asyncio.run(check_scripts(found, load_alone()))
    if with_registry:
        asyncio.run(_plan_only(found))
    else:
        store.check(found)
    if as_json:
        documents = {kind: len(docs) for kind, docs in found.documents.items()}
        problems = [
            {"level": p.level, "line": p.line, "path": p.path, "message": p.message, "file": p.file}
            for p in found.problems
        ]
        print_json({"file": str(file), "ok": not found.errors, "documents": documents, "problems": problems})
    else:
        _print_problems(found, err=True)
        total = sum(len(docs) for docs in found.documents.values())
        click.echo(
            f"{file}: {len(found.errors)} errors, {len(found.problems) - len(found.errors)} warnings in {total} documents."
        )
    if found.errors:
        sys.exit(1)


async def _plan_only(file: "RegistryFile") -> None:
    from preservarium.domain.registry.checks import RegistryFileError
    from preservarium.registry.apply import connect
    from preservarium.stores import registry as store

    connection = await connect(load())
    try:
        await store.plan(connection, file)
    except RegistryFileError:
        return  # said by the problems
    finally:
        await connection.close(timeout=5)


async def _with_connection(work: Any) -> Any:
    from preservarium.registry.apply import connect

    connection = await connect(load())
    try:
        return await work(connection)
    finally:
        await connection.close(timeout=5)


@registry.command()
@_json
def export(as_json: bool) -> None:
    """Print the registry as a file that `apply` takes."""
    from preservarium.domain.registry.documents import DERIVED, SECTIONS
    from preservarium.registry.file import dump
    from preservarium.stores import registry as store

    documents = asyncio.run(_with_connection(store.export))
    if as_json:
        print_json(
            {
                section: [{k: v for k, v in d.items() if k not in DERIVED} for d in documents[kind]]
                for section, kind in SECTIONS.items()
                if documents[kind]
            }
        )
    else:
        dump(documents, sys.stdout)


@registry.command()
@click.argument("device")
@_json
def get(device: str, as_json: bool) -> None:
    """Print DEVICE with its type, parser, datatypes, rules and recipients."""
    from preservarium.stores import registry as store

    async def ask(connection: Any) -> Any:
        name = await store.spelled(connection, device)
        return (await store.composite(connection, [name])).get(name)

    found = asyncio.run(_with_connection(ask))
    if found is None:
        message = f"there is no device {device!r}"
        raise store.RegistryError(message)
    parts = {
        "device": found.device,
        "type": found.type,
        "parser": found.parser,
        "datatypes": found.datatypes,
        "rules": found.rules,
        "recipients": found.recipients,
    }
    if as_json:
        print_json(parts)
        return
    from preservarium.registry.yaml_tree import editor

    editor().dump({k: v for k, v in parts.items() if v}, sys.stdout)


@registry.command()
@click.argument("stream")
@_json
def history(stream: str, as_json: bool) -> None:
    """Print the events of STREAM, e.g. device/70B3D57BA0000123, type/DL-PR26, parser/dl-pr26 or parser/dl-pr26@2."""
    from dataclasses import asdict

    from preservarium.stores import events
    from preservarium.stores import registry as store

    async def ask(connection: Any) -> Any:
        kind, slash, name = stream.partition("/")
        if kind == "device":
            name = await store.spelled(connection, name)
        return await store.history(connection, f"{kind}{slash}{name}")

    found = asyncio.run(_with_connection(ask))
    if not found:
        message = f"there is no stream {stream!r}"
        raise store.RegistryError(message)
    if as_json:
        print_json([{**asdict(e), "at": events.instant(e.at_us)} for e in found])
        return
    from rich.markup import escape

    out = console()
    for e in found:
        at = iso(e.at_us)
        out.print(
            f"[bold]{escape(e.stream_id)}[/] {e.version}  {at}  {e.type} by {escape(e.actor)}  [dim]{e.hash[:12]}[/]"
        )
        for key, value in e.data.get("doc", e.data.get("set", {} if "unset" in e.data else e.data)).items():
            out.print(f"    {escape(key)}: {_value(value)}")
        for key in e.data.get("unset", ()):
            out.print(f"    {escape(key)}: [dim]taken away[/]")


@registry.command()
@_json
def verify(as_json: bool) -> None:
    """Check the hash chain of all events, and the current state against them; exit 1 where something does not fit."""
    from dataclasses import asdict

    from preservarium.stores import registry as store

    found = asyncio.run(_with_connection(store.verify))
    if as_json:
        print_json({**asdict(found), "ok": not found.faults})
    else:
        for fault in found.faults:
            click.echo(fault, err=True)
        click.echo(f"{found.events} events in {found.streams} streams: {len(found.faults)} faults.")
    if found.faults:
        sys.exit(1)


commands: list[click.Command] = [registry]
