"""`preservarium commands`: ask devices to do something, and see what became of it.

`send`, `cancel` and waiting need Kafka alone, but where PostgreSQL answers, `send` refuses a device that the registry does not
know; `list` and `show` read PostgreSQL.

Exit codes: 0 done; 1 it ended otherwise than successful, was refused, or a service cannot be reached; 2 wrong
arguments; 3 no end came within the time to wait.
"""

import asyncio
import base64
import binascii
import getpass
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import click
import orjson

from preservarium.cli.instants import readable, shown
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.domain.commands.confirm import CONFIRM_WORDS
from preservarium.domain.commands.lines import PRIORITY_MAX
from preservarium.domain.commands.machine import OVER, State
from preservarium.errors import PreservariumError, reason
from preservarium.settings import LiveSettings

EXIT_FAILED: Final = 1
EXIT_NO_END: Final = 3


class CommandFailed(PreservariumError):
    """The command cannot be asked for."""


@click.group("commands")
def group() -> None:
    """Send commands to devices, list, show and cancel them."""


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@asynccontextmanager
async def _desk() -> AsyncIterator[tuple[Any, Any]]:
    from preservarium.operations.command_desk import CommandDesk
    from preservarium.stores.views import Views
    from preservarium.streaming.publish import Publisher

    live = LiveSettings(load())
    publisher, views = Publisher(live), Views(lambda: live().postgres)
    await publisher.start()
    try:
        yield CommandDesk(publisher.publish, registered=views.registered), live()
    finally:
        await views.close()
        await publisher.stop()


def _value(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _content(fields: tuple[str, ...], payload: str | None, hexadecimal: str | None) -> dict[str, Any]:
    if (bool(fields), payload is not None, hexadecimal is not None).count(True) > 1:
        message = "give one of --field, --payload, --hex"
        raise click.UsageError(message)
    if fields:
        found: dict[str, Any] = {}
        for each in fields:
            name, equals, text = each.partition("=")
            if not equals or not name:
                message = f"--field {each!r}: not of the form NAME=VALUE"
                raise click.UsageError(message)
            found[name] = _value(text)
        return {"fields": found}
    if payload is not None:
        return {"payload": _value(payload)}
    if hexadecimal is not None:
        try:
            return {"payload_b64": base64.b64encode(binascii.unhexlify(hexadecimal.replace(" ", ""))).decode()}
        except binascii.Error as e:
            message = f"--hex: not hexadecimal: {reason(e)}"
            raise click.UsageError(message) from None
    return {}


@group.command("send")
@click.argument("device")
@click.argument("command", required=False)
@click.option(
    "--field",
    "fields",
    multiple=True,
    metavar="NAME=VALUE",
    help="For the encoder of the device type's codec; may be repeated.",
)
@click.option("--payload", help="JSON, or a text, that is sent as it is.")
@click.option("--hex", "hexadecimal", help="Bytes that are sent as they are.")
@click.option("--port", type=click.IntRange(1, 255), help="LoRaWAN fPort.")
@click.option("--confirmed", is_flag=True, help="LoRaWAN: the device is to acknowledge.")
@click.option("--confirm", help=f"What confirms it: {', '.join(CONFIRM_WORDS)}, or JSON that describes readings.")
@click.option("--timeout", "timeout_s", type=float, metavar="S", help="A try is confirmed within this time.")
@click.option("--tries", type=click.IntRange(1), help="How often it is sent at most.")
@click.option("--expires", "expires_s", type=float, metavar="S", help="It is not sent any more after this time.")
@click.option("--priority", type=click.IntRange(0, PRIORITY_MAX), help="Higher goes first.")
@click.option(
    "--key", "idempotency_key", help="Idempotency key: the same key is the same command.  [default: a new one]"
)
@click.option("--wait", "wait_s", type=float, metavar="S", help="Wait so long for its end, and show what happens.")
@click.option("--actor", default=None, help="Who asks.  [default: the user's name]")
@_json
def send(
    device: str, command: str | None, fields: tuple[str, ...], payload: str | None, hexadecimal: str | None,
    confirm: str | None, wait_s: float | None, actor: str | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Ask DEVICE to carry out COMMAND, one of its type's, or what --field, --payload or --hex say."""
    asked = {name: value for name, value in given.items() if value not in (None, False)}
    asked |= {**_content(fields, payload, hexadecimal), "actor": actor or getpass.getuser()}
    if command:
        asked["command"] = command
    if confirm:
        asked["confirm"] = _value(confirm)
    made, events = asyncio.run(_send(device, asked, wait_s, quiet=as_json))
    state = events[-1]["state"] if events else None
    if as_json:
        print_json({**made, "state": state, "events": events} if wait_s is not None else made)
    elif wait_s is None:
        click.echo(f"{made['command_id']}  asked; see: preservarium commands show {made['command_id']}")
    if wait_s is not None and state not in OVER:
        click.echo(f"preservarium: not ended within {wait_s:g} s; it goes on", err=True)
        sys.exit(EXIT_NO_END)
    if state in OVER and state != State.SUCCESSFUL:
        sys.exit(EXIT_FAILED)


async def _send(
    device: str, asked: dict[str, Any], wait_s: float | None, *, quiet: bool
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    from preservarium.operations.command_desk import watching

    events: list[dict[str, Any]] = []
    async with _desk() as (desk, settings):
        desk.prepared(device, asked)  # what is wrong with it is said before anything is connected
        if wait_s is None:
            return await desk.request(device, asked), events
        async with watching(settings) as watch:
            made: dict[str, str] = await desk.request(device, asked)
            try:
                async with asyncio.timeout(wait_s):
                    async for event in watch.events(made["command_id"]):
                        events.append(event)
                        if not quiet:
                            _show_event(event)
            except TimeoutError:
                pass
    return made, events


def _show_event(event: dict[str, Any]) -> None:
    why = f"  {readable(event['reason'])}" if event["reason"] else ""
    actor = f"  by {event['actor']}" if event["actor"] else ""
    click.echo(f"{shown(event['at'])}  {event['event']:<10} {event['state']:<10}{actor}{why}")


@group.command("cancel")
@click.argument("device")
@click.argument("command_id")
@click.option("--actor", default=None, help="Who asks.  [default: the user's name]")
@click.option(
    "--wait", "wait_s", type=float, default=10.0, show_default=True, metavar="S", help="Wait so long for the answer."
)
@_json
def cancel(device: str, command_id: str, actor: str | None, wait_s: float, as_json: bool) -> None:
    """Cancel the command COMMAND_ID of DEVICE; what is being sent at this moment cannot be."""

    async def ask() -> list[dict[str, Any]]:
        from preservarium.operations.command_desk import watching

        async with _desk() as (desk, settings), watching(settings) as watch:
            await desk.cancel(device, command_id, actor or getpass.getuser())
            events: list[dict[str, Any]] = []
            try:
                async with asyncio.timeout(wait_s):
                    async for event in watch.events(command_id):
                        events.append(event)
            except TimeoutError:
                pass
            return events

    events = asyncio.run(ask())
    state = events[-1]["state"] if events else None
    if as_json:
        print_json({"command_id": command_id, "state": state, "events": events})
    else:
        for event in events:
            _show_event(event)
    if state is None:
        click.echo("preservarium: nothing changed; iot_errors says why (preservarium dlq list)", err=True)
        sys.exit(EXIT_NO_END)
    if state != State.CANCELLED:
        sys.exit(EXIT_FAILED)


async def _read(method: str, *arguments: Any, **keywords: Any) -> Any:
    from preservarium.stores.views import Views

    views = Views(lambda: load().postgres)
    try:
        return await getattr(views, method)(*arguments, **keywords)
    finally:
        await views.close()


@group.command("list")
@click.option("--device", default="", help="Address of the device.")
@click.option("--state", "states", multiple=True, type=click.Choice([str(s) for s in State]), help="May be repeated.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="At most so many.")
@_json
def list_(device: str, states: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List commands, newest first."""
    found = asyncio.run(_read("commands", device_id=device, states=list(states), before=None, limit=limit))
    if as_json:
        print_json(found["commands"])
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("requested", "device", "command", "state", "tries", "by", "reason", "id")
    for each in found["commands"]:
        table.add_row(
            shown(each["requested_at"]),
            *(
                escape(str(each[name]))
                for name in ("device_id", "command", "state", "attempt", "requested_by", "reason")
            ),
            each["command_id"],
        )
    console().print(table)


@group.command("show")
@click.argument("command_id")
@_json
def show(command_id: str, as_json: bool) -> None:
    """Show one command and everything that happened to it."""
    found = asyncio.run(_read("command", command_id, limit=200))
    if found is None:
        message = f"the database knows no command {command_id} (yet)"
        raise CommandFailed(message)
    if as_json:
        print_json(found)
        return
    click.echo(f"{found['command']} of {found['device_id']}: {found['state']}, asked by {found['requested_by']}")
    click.echo(orjson.dumps({"content": found["content"], "confirm": found["confirm"]}).decode())
    for event in found["events"]:
        _show_event(event)


commands = [group]
