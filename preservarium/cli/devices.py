"""`preservarium devices`: who sends without being registered."""

import asyncio
from typing import Any

import click

from preservarium.cli.instants import shown, when, with_iso
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load

#: Characters of a payload, and parsers of an address, that are printed; --json has them whole.
PAYLOAD_CHARACTERS_MAX = 60
PARSERS_SHOWN_MAX = 5


@click.group("devices")
def devices() -> None:
    """Devices that nobody registered yet."""


@devices.command()
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000),
    default=20,
    show_default=True,
    help="At most so many addresses, the busiest.",
)
@click.option("--since", help="First seen since then: ISO 8601, or 30m, 2h, 7d ago.")
@click.option("--device", help="One address alone.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def unknown(limit: int, since: str | None, device: str | None, as_json: bool) -> None:
    """List addresses that send and are not registered: how often, the last payload, and which parsers understand it.

    Registered, their messages are brought in by `preservarium dlq redrive --code unknown_device`.
    """
    from contextlib import aclosing

    from preservarium.errors import Fatal
    from preservarium.operations import unknown_devices
    from preservarium.operations.dlq import Select, letters
    from preservarium.registry.apply import connect
    from preservarium.sandbox.pool import Limits, SandboxPool
    from preservarium.stores import registry as store

    settings = load()
    select = Select(unknown_devices.CODES, device, when(since, "--since") if since else 0)

    async def ask() -> tuple[Any, Any, Any, int]:
        async with aclosing(letters(settings, select)) as selected:
            tally = await unknown_devices.tally(selected, settings.normalize.payload_bytes_max)
        connection = await connect(settings)
        try:
            documents = await store.export(connection)
        finally:
            await connection.close(timeout=5)
        left = tally.without(d["device_id"] for d in documents["device"])
        asked = left[:limit]
        sandbox = SandboxPool(Limits.of(settings))
        try:
            try:
                fits = await unknown_devices.Matcher(documents, sandbox).fits(asked)
            except Fatal as e:
                click.echo(f"scripts are left out: {e}", err=True)
                fits = await unknown_devices.Matcher(documents, None).fits(asked)
        finally:
            await sandbox.close()
        return asked, fits, tally, len(left)

    asked, fits, tally, left = asyncio.run(ask())
    if as_json:
        found = [unknown_devices.document(one, of) for one, of in zip(asked, fits, strict=True)]
        print_json({"unknown": [with_iso(one) for one in found], "addresses": left, "others": tally.others})
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("device", "messages", "last seen", "mode", "port", "last payload", "parsers"):
        table.add_column(name, overflow="fold")
    for one, of in zip(asked, fits, strict=True):
        last = one.last
        parsers = "; ".join(
            f"{fit.parser} ({fit.taken} of {fit.tried}, {fit.plausible} of {fit.readings} readings plausible)"
            for fit in of[:PARSERS_SHOWN_MAX]
        )
        cells = (
            one.device, one.count, shown(one.last_seen), (last["mode"] or last["connector"]) if last else "",
            "" if last is None or last["port"] is None else last["port"],
            unknown_devices.payload_text(last, PAYLOAD_CHARACTERS_MAX), parsers or "none",
        )  # fmt: skip
        table.add_row(*(escape(str(cell)) for cell in cells))
    console().print(table)
    click.echo(
        f"{left:,} addresses are not registered."
        + (f" {tally.others:,} messages are of still others." if tally.others else "")
    )


commands: list[click.Command] = [devices]
