"""`preservarium lineage up|down|openlineage`: the graph of batches."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import click

from preservarium.cli.instants import iso, now_us, when
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.cli.trace import lineage

if TYPE_CHECKING:
    from preservarium.settings import Settings
    from preservarium.stores.lineage_graph import Graph

#: Batches that are made into events at once.
BATCHES_AT_ONCE = 500

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_node = click.argument("node")
_depth = click.option("--depth", type=click.IntRange(1, 8), default=8, show_default=True, help="Steps away from it.")
_limit = click.option("--limit", type=click.IntRange(1, 1_000), default=200, show_default=True, help="Edges at most.")


async def _connected(settings: "Settings", work: Any) -> Any:
    from preservarium.stores.migrate import connect_postgres

    connection = await connect_postgres(settings, what="the lineage graph")
    try:
        return await work(connection)
    finally:
        await connection.close(timeout=5)


def _walk(node: str, down: bool, depth: int, limit: int, as_json: bool) -> None:
    from preservarium.stores.lineage_graph import walk

    if ":" not in node or len(node) > 1_000:
        message = f"{node!r} is no node: raw:PARTITION:OFFSET, raw:P:A-B, validated:P:A-B, batch:ID, alarm:ID, generation:N or experiment:ID"
        raise click.UsageError(message)
    graph: Graph = asyncio.run(_connected(load(), lambda c: walk(c, node, down=down, depth=depth, limit=limit)))
    if as_json:
        print_json({"node": node, "down": down, "edges": [one.document() for one in graph.edges], "cut": graph.cut})
        return
    from rich.markup import escape

    out = console()
    for one in graph.edges:
        edge = one.edge
        shown, arrow = (edge.target_id, "→") if down else (edge.source_id, "←")
        other = edge.source_id if down else edge.target_id
        out.print(
            f"{'  ' * (one.depth - 1)}{escape(other)} {arrow} [bold]{escape(shown)}[/]  {escape(edge.relationship_type)}"
            f" by {escape(edge.transformation_id)}  [dim]{iso(one.created_at)}[/]",
            soft_wrap=True,
        )
    if graph.cut:
        click.echo("There is more: --limit, or begin further on.", err=True)
    if not graph.edges:
        click.echo(f"Nothing is noted {'below' if down else 'above'} {node}.")


@lineage.command()
@_node
@_depth
@_limit
@_json
def up(node: str, depth: int, limit: int, as_json: bool) -> None:
    """Say what NODE came of: the raw records of a batch, the message that raised an alarm.

    NODE is raw:P:A-B, validated:P:A-B, batch:ID, alarm:ID, generation:N or experiment:ID.
    """
    _walk(node, False, depth, limit, as_json)


@lineage.command()
@_node
@_depth
@_limit
@_json
def down(node: str, depth: int, limit: int, as_json: bool) -> None:
    """Say what came of NODE: in which batches a raw record went, which alarms it raised, which replays derived it anew.

    NODE is raw:PARTITION:OFFSET for one record, or as `up` has it.
    """
    _walk(node, True, depth, limit, as_json)


@lineage.command()
@click.option(
    "--since", default="1h", show_default=True, help="Batches stored since then: ISO 8601, or 30m, 2h, 7d ago."
)
@click.option("--until", help="Stored until then.  [default: now]")
@click.option(
    "--file", type=click.Path(dir_okay=False, writable=True), help="Add the events to this file, a line each."
)
@click.option("--url", help="Send them to this OpenLineage server.")
@click.option("--api-key", envvar="OPENLINEAGE_API_KEY", help="Of the server.  [or OPENLINEAGE_API_KEY]")
@_json
def openlineage(
    since: str, until: str | None, file: str | None, url: str | None, api_key: str | None, as_json: bool
) -> None:
    """Give the batches of a time as OpenLineage events, to a file or to a server; sent again, they are the same runs.

    Needs the extra `openlineage`.
    """
    if (file is None) == (url is None):
        message = "name a --file or a --url"
        raise click.UsageError(message)
    from_us, to_us = when(since, "--since"), when(until, "--until") if until else now_us()
    sent = asyncio.run(_connected(load(), lambda c: _emit(c, from_us, to_us, file, url, api_key)))
    if as_json:
        print_json({"events": sent})
    else:
        click.echo(f"{sent:,} events {'sent' if url else 'written'}.")


async def _emit(
    connection: Any, from_us: int, to_us: int, file: str | None, url: str | None, api_key: str | None
) -> int:
    from preservarium.operations import openlineage as operation

    settings = load()
    schema = await connection.fetchval("SELECT current_schema()")
    emitter, sent = operation.Emitter(url=url, file=file, api_key=api_key), 0
    try:
        async for some in _some(operation.batches(connection, from_us, to_us)):

            def work(some: list[Any] = some) -> None:
                for event in operation.events(settings, some, schema=schema):
                    emitter.emit(event)

            await asyncio.to_thread(work)
            sent += len(some)
    finally:
        emitter.close()
    return sent


async def _some(found: AsyncIterator[Any]) -> AsyncIterator[list[Any]]:
    waiting: list[Any] = []
    async for one in found:
        waiting.append(one)
        if len(waiting) >= BATCHES_AT_ONCE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


#: They are of the group `lineage`.
commands: list[click.Command] = []
