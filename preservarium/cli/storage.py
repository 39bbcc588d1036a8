"""`preservarium storage`: chunks of readings, their compression and retention, as the old service's manual had them in SQL."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import click

from preservarium.cli.instants import shown
from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.stores.storage import Storage

T = TypeVar("T")

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_apply = click.option("--apply", is_flag=True, help="Bring the database to what the settings say, at once.")


@click.group("storage")
def storage() -> None:
    """See and keep how readings are stored: chunks, compression, retention."""


def _with(work: "Callable[[Storage], Awaitable[T]]") -> T:
    async def go() -> T:
        from preservarium.stores.migrate import connect_postgres
        from preservarium.stores.storage import Storage

        settings = load()
        connection = await connect_postgres(settings, what="looking after the storage")
        try:
            return await work(Storage(connection, settings))
        finally:
            await connection.close(timeout=5)

    return asyncio.run(go())


@storage.command()
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="So many, the newest first.")
@_json
def chunks(limit: int, as_json: bool) -> None:
    """List the chunks: their time, size, and whether they are compressed."""
    found = _with(lambda one: one.chunks())
    some = found[:limit]
    if as_json:
        print_json([asdict(chunk) for chunk in some])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("from", "to", "compressed", "MB", "MB before", "chunk"):
        table.add_column(name, justify="right" if name.startswith("MB") else "left", overflow="fold")
    for c in some:
        table.add_row(
            shown(c.range_start),
            shown(c.range_end),
            "yes" if c.compressed else "no",
            f"{c.bytes / 1e6:,.1f}",
            "" if c.before_bytes is None else f"{c.before_bytes / 1e6:,.1f}",
            c.name,
        )
    console().print(table)
    total = sum(c.bytes for c in found) / 1e6
    click.echo(f"{len(found)} chunks, {sum(c.compressed for c in found)} compressed, {total:,.1f} MB")


@storage.command()
@click.option(
    "--older-than-days",
    "older_days",
    type=click.FloatRange(0),
    help="Compress now what has ended so many days ago.  [default: only say what the policy is]",
)
@_apply
@_json
def compress(older_days: float | None, apply: bool, as_json: bool) -> None:
    """Say when chunks are compressed; or compress old ones now."""
    if older_days is None:
        _policy("compress", apply, as_json)
        return
    if apply:
        msg = "--apply is of the policy: say it without --older-than-days"
        raise click.UsageError(msg)

    async def work(one: "Storage") -> list[str]:
        with bar("compressing", as_json) as told:
            return await one.compress(older_days, told)

    done = _with(work)
    if as_json:
        print_json({"compressed": done})
    else:
        click.echo(f"{len(done)} chunks compressed" + ("" if done else ": none was left that has ended so long ago"))


@storage.command()
@click.option("--now", is_flag=True, help="Drop what is too old at once, instead of when the policy's time has come.")
@_apply
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
def retention(now: bool, apply: bool, yes: bool, as_json: bool) -> None:
    """Say how long readings are kept; or drop what is older now."""
    if not now:
        _policy("retention", apply, as_json)
        return
    if apply:
        msg = "--apply is of the policy: say it without --now"
        raise click.UsageError(msg)
    days = load().sink.retention_days
    if not yes:
        if as_json:
            msg = "--json does not ask: say --yes"
            raise click.UsageError(msg)
        click.confirm(f"Drop the readings that are older than {days} days, for ever?", abort=True, err=True)
    dropped = _with(lambda one: one.drop_old())
    if as_json:
        print_json({"dropped": dropped})
    else:
        click.echo(f"{dropped} chunks dropped that ended more than {days} days ago")


@storage.command()
@_apply
@_json
def interval(apply: bool, as_json: bool) -> None:
    """Say how wide a chunk is; what is there keeps its width."""
    _policy("interval", apply, as_json)


_SAYS = {
    "compress": "Chunks are compressed {} after their end",
    "retention": "Readings are kept for {}",
    "interval": "A new chunk is {} wide",
}


def _policy(name: str, apply: bool, as_json: bool) -> None:
    async def work(one: "Storage") -> tuple[str, Any]:
        if apply:
            await one.apply()
        return await one.engine(), (await one.policies())[name]

    engine, policy = _with(work)
    if as_json:
        in_force = None if policy.in_force is None else policy.in_force.total_seconds() / 86_400
        print_json({
            "policy": name, "engine": engine, "in_force_days": in_force, "setting": policy.setting, "wanted_days": policy.wanted_days,
            "so": policy.so,
        })  # fmt: skip
        return
    if policy.in_force is None:
        click.echo(
            "Plain PostgreSQL does not compress."
            if engine == "plain"
            else f"There is no policy for it ({name}): --apply makes it."
        )
        return
    days = f"{policy.in_force.total_seconds() / 86_400:g} days"
    click.echo(f"{_SAYS[name].format(days)}; {policy.setting}={policy.wanted_days}.")
    if not policy.so:
        click.echo("The database is not what the settings say: --apply brings it there, or the next start of a worker.")


commands: list[click.Command] = [storage]
