"""`preservarium topics`: declared topics against actual ones."""

import asyncio
import sys

import click

from preservarium.cli.output import console, print_json
from preservarium.settings import load


@click.command()
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0), default=0.0, help="Seconds to wait for brokers that are starting."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def topics(wait_s: float, as_json: bool) -> None:
    """Compare the declared topics with the cluster's; exit 1 where they differ."""
    from preservarium import topics_admin

    comparison = asyncio.run(topics_admin.compare(load(), wait_s=wait_s))
    if as_json:
        print_json(comparison.document())
    else:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("topic", "partitions", "replication", "cleanup", "retention", "state"):
            table.add_column(name, justify="right" if name in {"partitions", "replication", "retention"} else "left")
        differing = {line.split(":", 1)[0] for line in comparison.differences()}
        for declared, actual in comparison.topics:
            state = "missing" if actual is None else "differs" if declared.name in differing else "as declared"
            style = {"missing": "red", "differs": "yellow"}.get(state, "green")
            retention_ms = declared.config.get("retention.ms")
            table.add_row(
                declared.name,
                str(actual.partitions if actual else declared.create_partitions),
                str(actual.replication if actual else declared.create_replication),
                declared.config.get("cleanup.policy", "its owner's"),
                f"{int(retention_ms) / 3_600_000:g} h" if retention_ms else "",
                f"[{style}]{state}[/]",
            )
        console().print(table)
        for line in comparison.differences():
            click.echo(f"differs: {line}")
        if not comparison.config_known:
            click.echo("This broker does not tell its topics' configuration; only names and partitions were compared.")
    if not comparison.equal:
        sys.exit(1)


commands: list[click.Command] = [topics]
