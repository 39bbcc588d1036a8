"""`preservarium extract`: how the extract stands, whether its source is as the settings say, and having everything sent again."""

import asyncio
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any

import click

from preservarium.cli.instants import shown, told
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.errors import reason
from preservarium.settings import Settings

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("extract")
def extract() -> None:
    """See how tasks and employees are taken out of another database."""


@extract.command()
@_json
def status(as_json: bool) -> None:
    """Say what is recorded of each table, and whether a worker extracts now."""
    from preservarium.extract.status import status as ask

    found = _answer(ask(_enabled()))
    if as_json:
        print_json(asdict(found))
        return
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False)
    for name in ("table", "rows", "gone", "on their way", "moved", "all keys compared", "position"):
        table.add_column(name, justify="right" if name in {"rows", "gone", "on their way"} else "left", overflow="fold")
    for t in found.tables:
        position = "-" if t.position is None else ", ".join(f"{k} {told(v)}" for k, v in t.position.items())
        table.add_row(
            t.table, f"{t.rows:,}", f"{t.gone:,}", f"{t.pending:,}", _time(t.moved_at), _time(t.compared_at), position
        )
    if found.tables:
        out.print(table)
    else:
        out.print("nothing is recorded: no worker has extracted so far")
    out.print("a worker extracts" if found.leads else "no worker extracts now")


@extract.command()
@_json
def check(as_json: bool) -> None:
    """Open the source as a worker would and show a row of each table as it would be sent; nothing is sent."""
    from preservarium.extract.status import check as look

    settings = _enabled()
    found = _answer(look(lambda: settings))
    if as_json:
        print_json([asdict(f) for f in found])
        return
    for f in found:
        click.echo(f"{f.table}: " + ("no row" if f.example is None else "as it would be sent"))
        for name, value in (f.example or {}).items():
            click.echo(f"  {name:<16}{told(value)}")


@extract.command()
@click.option("--table", "names", multiple=True, type=click.Choice(["tasks", "employees"]),
              help="Only this table; may be repeated.  [default: both]")  # fmt: skip
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
def again(names: tuple[str, ...], yes: bool, as_json: bool) -> None:
    """Have everything sent again by the next worker; none may run now."""
    from preservarium.extract.status import again as send_again

    settings = _enabled()
    tables: list[Any] = list(names) or ["employees", "tasks"]
    if not yes:
        click.confirm(f"Everything of {' and '.join(tables)} will be sent again. Go on?", abort=True, err=True)
    rows = _answer(send_again(settings, tables))
    if as_json:
        print_json({"tables": tables, "rows": rows})
    else:
        click.echo(f"{rows:,} rows of {', '.join(tables)} were sent before; the next worker sends everything again")


def _enabled() -> Settings:
    settings = load()
    if not settings.extract.url.get_secret_value():
        message = "nothing is extracted: PRESERVARIUM_EXTRACT__URL is not set"
        raise click.ClickException(message)
    return settings


def _answer(asked: Coroutine[Any, Any, Any]) -> Any:
    """Its result; a database that cannot be asked is one line."""
    import asyncpg

    try:
        return asyncio.run(asked)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as e:
        message = f"the database cannot be asked: {reason(e)}"
        raise click.ClickException(message) from e
    except Exception as e:
        # PyMongo by its name: it is an extra.
        if not type(e).__module__.startswith("pymongo."):
            raise
        # What follows says the same of each server of the cluster.
        raise click.ClickException(str(e).partition(" (configured")[0]) from e


def _time(at: Any) -> str:
    return shown(at) or "-"


commands: list[click.Command] = [extract]
