"""`preservarium topics`: declared topics against actual ones, and what is in them."""

import asyncio
import sys
from typing import Final

import click

from preservarium.cli.instants import when
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load

#: They are put into the order of time before they are shown.
LIMIT_MAX: Final = 100_000


@click.group(invoke_without_command=True)
@click.option(
    "--wait", "wait_s", type=click.FloatRange(0), default=0.0, help="Seconds to wait for brokers that are starting."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def topics(ctx: click.Context, wait_s: float, as_json: bool) -> None:
    """Compare the declared topics with the cluster's; exit 1 where they differ. `topics read` shows what is in one."""
    if ctx.invoked_subcommand is None:
        _compare(wait_s, as_json)


def _compare(wait_s: float, as_json: bool) -> None:
    from preservarium.streaming import topics_admin

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


@topics.command("read")
@click.argument("name")
@click.option("--key", help="Only records with this key; an address of a device in any spelling.")
@click.option(
    "--partition", "partitions", multiple=True, type=click.IntRange(0), help="Only this partition; may be repeated."
)
@click.option("--from", "since", help="From this time on: ISO 8601, or 30m, 2h, 7d ago; by the records' own time.")
@click.option("--to", "until", help="Up to this time, likewise.")
@click.option("--offset", type=int, help="From this offset on, of each partition; -5: the last five records of each.")
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), default=100, show_default=True,
              help="At most so many lines: the last ones, or with --from or --offset the first ones from there.")  # fmt: skip
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line: topic, place, time, key, value.")
def read(
    name: str, key: str | None, partitions: tuple[int, ...], since: str | None, until: str | None, offset: int | None,
    limit: int, follow: bool, as_json: bool,
) -> None:  # fmt: skip
    """Show what is in topic NAME, one message a line: time, partition:offset, key, value.

    Values are decoded: lines of JSON with each instant in ISO 8601 beside it (`…_iso`), other text as it is, bytes in
    base64. NAME is one of ours (without a prefix), or the full name of any topic of this Kafka.
    """
    import orjson

    from preservarium.cli.topic_lines import Line, Wanted
    from preservarium.cli.topic_lines import read as read_topic

    if since is not None and offset is not None:
        message = "--from or --offset, not both"
        raise click.UsageError(message)
    wanted = Wanted(
        partitions=partitions,
        key=key,
        since_us=when(since, "--from") if since else None,
        until_us=when(until, "--to") if until else None,
        offset=offset,
        limit=limit,
        follow=follow,
    )

    def show(line: Line) -> None:
        click.echo(orjson.dumps(line.document(name)).decode() if as_json else line.text())

    try:
        taken = asyncio.run(read_topic(load(), name, wanted, show))
    except KeyboardInterrupt:
        return  # the way to end --follow
    if not taken:
        click.echo("nothing matches", err=True)


commands: list[click.Command] = [topics]
