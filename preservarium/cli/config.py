"""`preservarium config`: what can be set, and what is set."""

from typing import Any

import click
from pydantic import SecretStr

from preservarium.cli.output import print_json
from preservarium.cli.system import load
from preservarium.settings import env_example, fields

MASK = "********"


@click.group(invoke_without_command=True)
@click.pass_context
def config(ctx: click.Context) -> None:
    """Print the commented .env.example; `config show` prints the values in force."""
    if ctx.invoked_subcommand is None:
        click.echo(env_example(), nl=False)


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(as_json: bool) -> None:
    """Print the values in force, with secrets masked; a * marks what is not the default."""
    settings = load()
    rows: list[tuple[str, Any, bool]] = []
    for field in fields():
        holder = getattr(settings, field.section) if field.section else settings
        value = getattr(holder, field.name)
        default = type(holder).model_fields[field.name].default
        shown: Any = value
        if isinstance(value, SecretStr):
            shown = MASK if value.get_secret_value() else ""
        rows.append((field.variable, shown, value != default))
    if as_json:
        document = {variable: {"value": value, "default": not changed} for variable, value, changed in rows}
        print_json(document)
        return
    for variable, value, changed in rows:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        click.echo(f"{'*' if changed else ' '} {variable}={text}")


commands: list[click.Command] = [config]
