"""`preservarium connect`: connectors as processes of their own."""

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import click

from preservarium.cli.output import print_json

if TYPE_CHECKING:
    from preservarium.cli.process import Process
    from preservarium.connectors.files import Columns, Totals
    from preservarium.errors import Retry

#: The worker's own port has the console on it; a connector alone stands beside it.
HTTP_PORT: Final = 8080


@click.group()
def connect() -> None:
    """Take device messages into Kafka: by MQTT, by HTTP, from files."""


@connect.command()
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
def mqtt(as_json: bool) -> None:
    """Bring a broker's messages to Kafka until SIGTERM; settings PRESERVARIUM_MQTT__…"""
    from preservarium.cli.process import run
    from preservarium.connectors.mqtt import MqttConnector

    started = time.monotonic()

    async def main(process: "Process") -> dict[str, Any]:
        connector = MqttConnector(process.publisher, process.live, process.clock)
        watch = asyncio.create_task(_stop_with(process.stop, connector.stop))
        try:
            await connector.run()
        finally:
            watch.cancel()
        return {"connector": "mqtt", "taken": connector.taken, "reconnects": connector.reconnects}

    _summary(run(main), started, as_json)


@connect.command()
@click.option("--host", help="Address to bind; default: web.host.")
@click.option("--port", type=click.IntRange(0, 65_535), default=HTTP_PORT, show_default=True, help="Port to bind.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON at the end.")
def http(host: str | None, port: int, as_json: bool) -> None:
    """Serve POST /ingest and GET /ingest/commands until SIGTERM, with /health and /metrics; settings PRESERVARIUM_HTTP__…"""
    from aiohttp import web
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    from preservarium.cli.process import run
    from preservarium.connectors.base import RawProducer
    from preservarium.connectors.http import CONNECTOR, Fetch, Ingest
    from preservarium.connectors.mailbox import Mailbox, MailboxFollower
    from preservarium.serving import server

    started = time.monotonic()

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "OK"})

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def main(process: "Process") -> dict[str, Any]:
        producer = RawProducer(process.publisher, CONNECTOR)
        app = web.Application()
        app.add_routes(Ingest(producer, process.live, process.clock).routes())
        mailbox = Mailbox()
        follower = MailboxFollower(mailbox, process.live)
        fetch = Fetch(process.publisher, process.live, process.clock, mailbox)
        app.add_routes(fetch.routes())
        app.add_routes([web.get("/health", health), web.get("/metrics", metrics)])
        runner = server.install(app, process.live, bound=host)
        await runner.setup()
        try:
            site = web.TCPSite(runner, host or process.live().web.host, port)
            try:
                await site.start()
            except OSError as e:
                message = f"cannot listen on {host or process.live().web.host}:{port}: {e.strerror}"
                raise click.ClickException(message) from None
            name, bound = runner.addresses[0][:2]
            click.echo(f"POST http://{name}:{bound}/ingest", err=True)
            await follower.start()
            await process.stop.wait()
        finally:
            await runner.cleanup()  # lets requests under way end
            await follower.stop()
        return {"connector": "http", "taken": producer.sent}

    _summary(run(main), started, as_json)


@connect.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--format", "form", type=click.Choice(["csv", "ndjson"]), help="Default: by the file's name.")
@click.option("--device", help="Column (field) of the device's address.")
@click.option("--device-id", help="The one device that all rows are of.")
@click.option("--time", "time_column", help="Column of the time: ISO 8601 (UTC without offset), s, ms, µs or ns.")
@click.option("--payload", help="Column of the payload: JSON, else text.")
@click.option("--payload-hex", help="Column of the payload, hexadecimal.")
@click.option("--payload-b64", help="Column of the payload, base64.")
@click.option("--column", "columns", multiple=True, help="A column of the payload object; default: all the others.")
@click.option("--port", help="Column of the port.")
@click.option("--mode", default="FILE", show_default=True, help="Connector mode.")
@click.option("--delimiter", default=",", show_default=True, help=r"Of CSV; \t for a tabulator.")
@click.option("--encoding", help="Of the file; default: UTF-8, or UTF-16 where a byte order mark says so.")
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), help="Rows a second; default: as Kafka takes them."
)
@click.option("--restart", is_flag=True, help="Begin at the start, whatever was sent before.")
@click.option("--dry-run", is_flag=True, help="Read and check only; nothing is sent or saved.")
@click.option("--state", type=click.Path(file_okay=False, path_type=Path), help="Where positions are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def files(
    paths: tuple[Path, ...],
    form: str | None,
    device: str | None,
    device_id: str | None,
    time_column: str | None,
    payload: str | None,
    payload_hex: str | None,
    payload_b64: str | None,
    columns: tuple[str, ...],
    port: str | None,
    mode: str,
    delimiter: str,
    encoding: str | None,
    rate: float | None,
    restart: bool,
    dry_run: bool,
    state: Path | None,
    as_json: bool,
) -> None:
    """Back-fill CSV or NDJSON files (.gz too); interrupted, it goes on where it was.

    An NDJSON line is an envelope (device, payload or payload_b64, received_at), or an object whose fields the options
    name. Exit 1 where rows were refused (they stand in iot_errors) or the back-fill was interrupted.
    """
    from preservarium.connectors.files import Columns
    from preservarium.domain.decoders.base import encoding_of

    if device is not None and device_id is not None:
        _usage("--device or --device-id, not both")
    if sum(p is not None for p in (payload, payload_hex, payload_b64)) + bool(columns) > 1:
        _usage("one of --payload, --payload-hex, --payload-b64, --column")
    delimiter = delimiter.replace("\\t", "\t")
    if len(delimiter) != 1 or delimiter in '"\r\n':
        _usage("the delimiter is one character")
    if encoding is not None:
        try:
            encoding = encoding_of(encoding)
        except ValueError as e:
            _usage(str(e))
    mapping = Columns(
        device=device,
        device_id=device_id,
        time=time_column,
        payload=payload,
        payload_hex=payload_hex,
        payload_b64=payload_b64,
        port=port,
        mode=mode,
        delimiter=delimiter,
        encoding=encoding,
        columns=columns,
    )
    _files(paths, form, mapping, rate, restart, dry_run, state, as_json)


def _files(
    paths: tuple[Path, ...],
    form: str | None,
    mapping: "Columns",
    rate: float | None,
    restart: bool,
    dry_run: bool,
    state: Path | None,
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from preservarium.connectors import files as connector
    from preservarium.connectors.base import Limits, RawProducer
    from preservarium.errors import Retry

    started = time.monotonic()
    forms = {path: connector.format_of(path) if form is None else cast(connector.Format, form) for path in paths}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )

    async def back_fill(process: "Process | None") -> list[dict[str, Any]]:
        from preservarium.cli.system import load_alone
        from preservarium.clock import SystemClock

        settings = process.live() if process else load_alone()
        stop = process.stop if process else asyncio.Event()
        producer = RawProducer(process.publisher, connector.CONNECTOR) if process else None
        positions = connector.Positions(state or Path(settings.data_dir) / "files") if process else None
        results: list[dict[str, Any]] = []
        for path in paths:
            if stop.is_set():
                break
            task = bar.add_task(path.name, total=1.0, rows=0)
            if positions is not None and restart:
                positions.forget(path)
            done = False

            def progress(share: float, totals: "Totals", task: Any = task) -> None:
                bar.update(task, completed=share, rows=totals.rows)

            def wait(e: "Retry", wait_s: float, task: Any = task, path: Path = path) -> None:
                bar.console.print(f"{path.name}: Kafka does not answer, next attempt in {wait_s:.1f} s: {e}")

            totals = connector.Totals()
            try:
                await connector.backfill(
                    path,
                    forms[path],
                    mapping,
                    producer,
                    positions,
                    Limits.of(settings),
                    process.clock if process else SystemClock(),
                    totals=totals,
                    rate=rate,
                    stop=stop,
                    on_progress=progress,
                    on_wait=wait,
                )
                done = not stop.is_set()
            except Retry:
                done = False  # it was told to stop while Kafka was away
            results.append(
                {
                    "path": str(path),
                    "rows": totals.rows,
                    "sent": totals.sent,
                    "refused": totals.refused,
                    "complete": done,
                    "examples": totals.examples,
                }
            )
        return results

    with bar:
        if dry_run:
            results = asyncio.run(back_fill(None))
        else:
            from preservarium.cli.process import run

            results = run(back_fill)
    seconds = time.monotonic() - started
    if as_json:
        print_json({"connector": "files", "dry_run": dry_run, "seconds": round(seconds, 3), "files": results})
    else:
        for r in results:
            sent = "would be sent" if dry_run else "sent now"
            end = "" if r["complete"] else "; interrupted, call it again to go on"
            click.echo(f"{r['path']}: {r['rows']:,} rows read, {r['sent']:,} {sent}, {r['refused']:,} refused{end}")
            for example in r["examples"]:
                click.echo(f"  {example}")
    if len(results) < len(paths) or any(r["refused"] or not r["complete"] for r in results):
        sys.exit(1)


def _usage(message: str) -> NoReturn:
    raise click.UsageError(message)


async def _stop_with(event: asyncio.Event, stop: Any) -> None:
    await event.wait()
    stop()


def _summary(document: dict[str, Any], started: float, as_json: bool) -> None:
    document["seconds"] = round(time.monotonic() - started, 3)
    if as_json:
        print_json(document)
    else:
        facts = ", ".join(f"{name} {value:,}" for name, value in document.items() if isinstance(value, int))
        click.echo(f"{document['connector']}: {facts} in {document['seconds']:.1f} s")


commands: list[click.Command] = [connect]
