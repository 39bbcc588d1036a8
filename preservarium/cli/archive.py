"""`preservarium archive`: raw records for longer than Kafka keeps them."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from preservarium.cli.instants import shown, shown_span, when, with_iso
from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load
from preservarium.errors import PreservariumError, reason
from preservarium.settings import SettingsError

if TYPE_CHECKING:
    from preservarium.settings import Settings

T = TypeVar("T")

#: Files that are printed; --json has more of them.
PRINTED_MAX: Final = 20

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_topic = click.option("--topic", help="Only this topic, by its declared name.")


def _load() -> "Settings":
    """Settings with an archive in them."""
    settings = load()
    if not settings.archive.url:
        message = "there is no archive: set PRESERVARIUM_ARCHIVE__URL to a folder, or s3://bucket/folder"
        raise SettingsError(message)
    return settings


def _run(work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; that the index is not to be had becomes one line."""
    import asyncpg

    try:
        return asyncio.run(work)
    except asyncpg.UndefinedTableError:
        message = "the database has no index of the archive yet: run `preservarium migrate`"
        raise PreservariumError(message) from None
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as e:
        message = f"the archive's index in PostgreSQL cannot be asked: {reason(e)}"
        raise PreservariumError(message) from None


@click.group()
def archive() -> None:
    """Keep raw records in files, verify them, and bring them back."""


@archive.command()
@_json
def status(as_json: bool) -> None:
    """Say what the archive has, how far it is behind Kafka, and what each tier keeps."""
    from preservarium.operations.archive.standing import status as ask

    document = _run(ask(load()))
    if as_json:
        print_json(with_iso(document))
        return
    out = console()
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("tier", "where", "for", "setting"):
        table.add_column(name, overflow="fold")
    for tier in document["tiers"]:
        table.add_row(tier["tier"], tier["where"], tier["for"], tier["setting"])
    out.print(table)
    if document["topics"]:
        table = Table(box=None, pad_edge=False)
        for name in ("topic", "epoch", "files", "records", "bytes in Kafka", "in files", "from", "to", "lost"):
            table.add_column(name, justify="left" if name in ("topic", "from", "to") else "right")
        for t in document["topics"]:
            table.add_row(
                t["topic"], str(t["epoch"]), f"{t['files']:,}", f"{t['records']:,}", f"{t['value_bytes']:,}", f"{t['file_bytes']:,}",
                shown(t["from"]), shown(t["to"]), f"{t['lost']:,}",
            )  # fmt: skip
        out.print(table)
    for lag in document["lags"]:
        text = f"{lag['topic']}: {lag['records']:,} records are in Kafka and in no file yet"
        if lag["records"]:
            text += f"; the partition that waits longest has waited for {shown_span(lag['seconds'])}"
        out.print(text)
        if lag["made_anew"]:
            out.print(
                f"{lag['topic']} ends before what is archived: it was made anew. Raise PRESERVARIUM_ARCHIVE__EPOCH."
            )
        if lag["about_to_be_lost"]:
            out.print(f"{lag['about_to_be_lost']:,} offsets of {lag['topic']} are neither in Kafka nor in a file.")


@archive.command()
@click.option("--follow", is_flag=True, help="Go on until stopped, as workers do.")
@_json
def run(follow: bool, as_json: bool) -> None:
    """Archive everything that Kafka holds now and no file has, whatever the interval says.

    Beside workers it does no harm: a partition is archived by one at a time. With --follow instead of them where
    PRESERVARIUM_ARCHIVE__IN_WORKER is false.
    """
    settings = _load()
    if follow:
        if as_json:
            message = "--follow has no end, and so nothing to print as JSON"
            raise click.UsageError(message)
        asyncio.run(_follow(settings))
        return
    with bar("archive", as_json) as progress:
        done = _run(_turn(settings, progress))
    if as_json:
        print_json(
            {"files": [s.document() | {"path": s.path} for s in done.segments], "records": done.records,
             "file_bytes": done.file_bytes, "lost": done.lost, "deleted": done.deleted}
        )  # fmt: skip
        return
    click.echo(f"{done.records:,} records in {len(done.segments):,} files, {done.file_bytes:,} bytes.")
    if done.deleted:
        click.echo(f"{done.deleted:,} files were older than PRESERVARIUM_ARCHIVE__KEEP_DAYS: deleted.")
    if done.lost:
        click.echo(f"{done.lost:,} offsets Kafka had deleted before they were archived.")


async def _turn(settings: "Settings", progress: Any) -> Any:
    from preservarium.operations.archive.archiver import Archiver

    archiver = Archiver(lambda: settings)
    try:
        return await archiver.turn(now=True, progress=progress)
    finally:
        await archiver.close()


async def _follow(settings: "Settings") -> None:
    from preservarium import logs
    from preservarium.operations.archive.archiver import Archiver
    from preservarium.settings import LiveSettings

    live = LiveSettings(settings)
    logs.configure(settings.log_level, settings.log_format)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)

    async def wait(seconds: float) -> None:
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except TimeoutError:
            return

    archiver = Archiver(live)
    running = asyncio.ensure_future(archiver.run(wait, stop.is_set))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        # What is under way is settled by whoever comes next.
        running.cancel()
        await asyncio.wait({running})
    finally:
        stopping.cancel()
        await archiver.close()
    if not running.cancelled():
        running.result()


@archive.command()
@_topic
@click.option("--since", help="Only files with a record (Kafka's time) since then: ISO 8601, or 30m, 2h, 7d ago.")
@click.option("--until", help="Only files with a record before then.")
@click.option("--quick", is_flag=True, help="Only see that each file is there, with its bytes; read none.")
@_json
def verify(topic: str | None, since: str | None, until: str | None, quick: bool, as_json: bool) -> None:
    """Read every file and compare it with the index: checksum, offsets, holes, files that no row names.

    Exit code 1 where something is wrong.
    """
    from preservarium.operations.archive.checking import check

    settings = _load()
    from_ms, to_ms = _times(since, until)
    with bar("verify", as_json) as progress:
        found = _run(check(settings, topic=topic, from_ms=from_ms, to_ms=to_ms, quick=quick, progress=progress))
    if as_json:
        print_json(found.document())
    else:
        click.echo(
            f"{found.files:,} files, {found.records:,} records, {found.file_bytes:,} bytes: {'whole' if found.whole else 'NOT whole'}"
        )
        for name, faults in (("fault", found.faults), ("hole", found.holes)):
            for fault in faults[:PRINTED_MAX]:
                click.echo(f"  {name:<7}{fault.path}: {fault.what}")
            _more(len(faults))
        for path in found.orphans[:PRINTED_MAX]:
            click.echo(f"  no row {path}: `preservarium archive reindex` takes it in, where it may")
        _more(len(found.orphans))
        if found.lost:
            click.echo(f"  {found.lost:,} offsets Kafka had deleted before they were archived")
    if not found.whole:
        sys.exit(1)


def _more(count: int) -> None:
    if count > PRINTED_MAX:
        click.echo(f"  … and {count - PRINTED_MAX:,} more")


def _times(since: str | None, until: str | None) -> tuple[int | None, int | None]:
    from_ms = when(since, "--since") // 1_000 if since else None
    to_ms = when(until, "--until") // 1_000 if until else None
    if from_ms is not None and to_ms is not None and to_ms <= from_ms:
        message = "--until is not after --since"
        raise click.UsageError(message)
    return from_ms, to_ms


@archive.command()
@click.option("--topic", default="iot_raw_data", show_default=True, help="Whose records, by its declared name.")
@click.option("--since", help="Records (Kafka's time) since then: ISO 8601, or 30m, 2h, 7d ago.  [default: all]")
@click.option("--until", help="Records before then.  [default: all]")
@click.option(
    "--partition", "partitions", type=click.IntRange(0), multiple=True, help="Only this partition; may be repeated."
)
@click.option("--epoch", type=click.IntRange(0), help="Of a topic that was made anew: the archive.epoch before.")
@click.option(
    "--to-topic", help="Write the records into this topic, which must be there: each into the partition of its number."
)
@click.option("--to-place", help="Copy the files that have them to this folder, or s3://bucket/folder.")
@click.option("--s3-endpoint", help="Of --to-place, where its store is another one than the archive's.")
@click.option("--dry-run", is_flag=True, help="Say what would be brought, and do nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
def restore(
    topic: str,
    since: str | None,
    until: str | None,
    partitions: tuple[int, ...],
    epoch: int | None,
    to_topic: str | None,
    to_place: str | None,
    s3_endpoint: str | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Bring archived records into a topic, or as files to another place.

    For deriving readings anew it is not needed: `preservarium replay reset` reads the archive by itself.
    """
    from preservarium.operations.archive import restoring

    settings = _load()
    if (to_topic is None) == (to_place is None):
        message = "say where to: --to-topic or --to-place"
        raise click.UsageError(message)
    if as_json and not (yes or dry_run):
        message = "--json does not ask: say --yes, or --dry-run"
        raise click.UsageError(message)
    place = _place(settings, to_place, s3_endpoint) if to_place is not None else None
    wanted = restoring.Wanted(topic, *_times(since, until), tuple(sorted(set(partitions))), epoch)
    segments = _run(restoring.select(settings, wanted))
    records = sum(s.records for s in segments)
    told = {
        "topic": topic,
        "to": to_topic or to_place,
        "files": len(segments),
        "records_at_most": records,
        "dry_run": dry_run,
    }
    if not as_json:
        click.echo(
            f"{len(segments):,} files with {records:,} records of {topic}"
            + (f", {shown(segments[0].min_time_ms * 1_000)} and later" if segments else "")
        )
    if dry_run or not segments:
        if as_json:
            print_json({**told, "restored": None})
        return
    if not yes:
        click.confirm(f"Bring them to {to_topic or to_place}?", abort=True, err=True)
    with bar("restore", as_json) as progress:
        if place is not None:
            done = _run(restoring.to_place(settings, segments, place, progress=progress))
        else:
            assert to_topic is not None
            done = _run(restoring.to_topic(settings, segments, wanted, to_topic, progress=progress))
    if as_json:
        print_json({**told, "restored": done.document()})
    elif place is not None:
        click.echo(f"{done.files:,} files copied ({done.bytes:,} bytes), {done.there:,} were there already.")
    else:
        click.echo(
            f"{done.records:,} records written to {to_topic}; the header {restoring.ORIGIN_HEADER} says where each stood."
        )


def _place(settings: "Settings", url: str, s3_endpoint: str | None) -> Any:
    """Another place, with the archive's way to log in where both are of S3."""
    from pydantic import ValidationError

    from preservarium.settings import Archive

    given: dict[str, Any] = {"url": url}
    if url.startswith("s3://"):
        names = ("s3_endpoint", "s3_region", "s3_access_key", "s3_secret_key")
        given |= {name: getattr(settings.archive, name) for name in names}
        if s3_endpoint is not None:
            given["s3_endpoint"] = s3_endpoint
    try:
        return Archive(**given)
    except ValidationError as e:
        message = f"--to-place: {e.errors()[0]['msg'].removeprefix('Value error, ')}"
        raise click.UsageError(message) from None


@archive.command()
@_json
def reindex(as_json: bool) -> None:
    """Take files into the index that it does not have: it was lost, or restored from before they were made.

    Exit code 1 where one was left.
    """
    from preservarium.operations.archive.checking import reindex as take

    settings = _load()
    with bar("reindex", as_json) as progress:
        done = _run(take(settings, progress=progress))
    if as_json:
        print_json(done.document())
    else:
        click.echo(f"{len(done.adopted):,} files taken in, {len(done.left):,} left.")
        for fault in done.left[:PRINTED_MAX]:
            click.echo(f"  {fault.path}: {fault.what}")
        _more(len(done.left))
    if done.left:
        sys.exit(1)


commands: list[click.Command] = [archive]
