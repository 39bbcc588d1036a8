"""`preservarium capacity`: what a load needs, what is full first, and what to do."""

import asyncio
import re
import sys
import time
from dataclasses import asdict, replace
from typing import Any, Final

import click

from preservarium.cli.output import console, print_json
from preservarium.cli.system import load, running
from preservarium.domain.capacity import Costs, Load, Plan, plan
from preservarium.errors import PreservariumError

#: A scrape of a worker is some 300 kB.
SCRAPE_BYTES_MAX: Final = 20_000_000
_SERIES: Final = re.compile(r"^(?P<name>[a-z_]+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)$", re.MULTILINE)


class NotMeasured(PreservariumError):
    """What runs there says nothing of what a reading costs: no readings came while we looked."""


@click.command()
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Messages a second that are to be carried. [default: what comes now]",
)
@click.option(
    "--readings",
    type=click.FloatRange(min=0.01, max=10_000),
    help="Readings in a message. [default: as they come now, else 4]",
)
@click.option(
    "--rules",
    type=click.FloatRange(min=0, max=1_000),
    default=0.0,
    show_default=True,
    help="Alarm rules of a series, beyond the present ones.",
)
@click.option(
    "--peak",
    type=click.FloatRange(min=1, max=100),
    default=2.0,
    show_default=True,
    help="The busiest minute, as a multiple of the rate.",
)
@click.option(
    "--worker",
    "urls",
    multiple=True,
    metavar="URL",
    help="A worker's web port, to measure what a reading costs there; repeat it for all of them.",
)
@click.option(
    "--for",
    "seconds",
    type=click.FloatRange(min=2, max=600),
    default=10.0,
    show_default=True,
    help="Look at the workers for so long.",
)
@click.option(
    "--price",
    "prices",
    multiple=True,
    metavar="WHAT=AMOUNT",
    help="Price of a month: worker=, broker=, gb=; for the costs of a month.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def capacity(
    rate: float | None, readings: float | None, rules: float, peak: float, urls: tuple[str, ...], seconds: float, prices: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Say how many workers, partitions and brokers a load needs, how large the databases grow, and what is full first.

    Costs are measured at the workers named by --worker (beside `preservarium up`: at its worker), else those of docs/PERFORMANCE.md. Exit code
    1 where what runs now does not carry the load.
    """
    paid = _prices(prices)
    settings = load()
    found = running(settings)
    if not urls and found is not None and rate is None:
        urls = (found.web,)
    costs, measured = Costs(), None
    if urls:
        measured = asyncio.run(_measure(urls, seconds))
        rate = rate if rate is not None else measured["messages_per_s"]
        readings = readings if readings is not None else measured["readings"]
        # Of what a message costs there, our own shares.
        scale = measured["message_us"] / (costs.message_us + measured["readings"] * costs.reading_us)
        costs = replace(costs, message_us=costs.message_us * scale, reading_us=costs.reading_us * scale)
    if rate is None:
        message = "give --rate, or --worker to take what comes now"
        raise click.UsageError(message)
    wanted = Load(rate, readings or 4.0, rules, replication=settings.kafka.replication, peak=peak)
    have = len(urls) or None
    made = plan(wanted, costs, workers=have, partitions=settings.kafka.partitions if have else None)
    document: dict[str, Any] = {
        **asdict(made),
        "messages_per_s": rate,
        "readings": wanted.readings,
        "peak": peak,
        "replication": wanted.replication,
        "costs": "measured" if measured else "docs/PERFORMANCE.md",
        "measured": measured,
        "there": {"workers": have, "partitions": settings.kafka.partitions} if have else None,
        "month": _month(made, paid),
    }
    if as_json:
        print_json(document)
    else:
        _print(made, document, have)
    if have and made.bottleneck.used > 1:
        sys.exit(1)


def _prices(prices: tuple[str, ...]) -> dict[str, float]:
    paid: dict[str, float] = {}
    for price in prices:
        what, _, amount = price.partition("=")
        try:
            paid[what] = float(amount)
        except ValueError:
            paid[what] = -1.0
        if what not in ("worker", "broker", "gb") or paid[what] < 0:
            message = f"--price: {price!r} is not worker=, broker= or gb= with a number"
            raise click.UsageError(message)
    return paid


def _month(made: Plan, paid: dict[str, float]) -> dict[str, float] | None:
    """What a month costs by these prices; storage is what a month brings, not compressed."""
    if not paid:
        return None
    gigabytes = (made.kafka_gb or 0.0) + 30 * ((made.postgres_gb_per_day or 0.0) + (made.clickhouse_gb_per_day or 0.0))
    parts = {"worker": made.workers, "broker": made.brokers or 0, "gb": gigabytes}
    costs = {what: round(price * parts[what], 2) for what, price in paid.items()}
    return {**costs, "sum": round(sum(costs.values()), 2)}


async def _measure(urls: tuple[str, ...], seconds: float) -> dict[str, float]:
    """What a message costs: CPU of all these workers, over what they standardized meanwhile.

    Raises:
        NotMeasured: nothing came.
    """
    import aiohttp

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session:
        before, began_s = await asyncio.gather(*(_scrape(session, url) for url in urls)), time.monotonic()
        await asyncio.sleep(seconds)
        after, took_s = await asyncio.gather(*(_scrape(session, url) for url in urls)), time.monotonic() - began_s

    def grown(name: str) -> float:
        return sum(b.get(name, 0.0) - a.get(name, 0.0) for a, b in zip(before, after, strict=True))

    messages, readings, cpu_s = grown("messages"), grown("readings"), grown("cpu")
    if messages < 10 or readings <= 0:
        text = f"{messages:.0f} messages in {took_s:.0f} s say nothing of what one costs: look for longer (--for), or give --rate alone"
        raise NotMeasured(text)
    return {
        "messages_per_s": round(messages / took_s, 1),
        "readings": round(readings / messages, 2),
        "message_us": round(cpu_s / messages * 1e6, 1),
        "loop_utilisation": round(grown("loop") / took_s / len(urls), 3),
    }


async def _scrape(session: Any, url: str) -> dict[str, float]:
    async with session.get(f"{url.rstrip('/')}/metrics") as response:
        if response.status != 200:
            text = f"{url}/metrics answers {response.status}"
            raise NotMeasured(text)
        body = bytearray()
        async for part in response.content.iter_chunked(1 << 16):
            body += part
            if len(body) > SCRAPE_BYTES_MAX:
                text = f"{url}/metrics is larger than {SCRAPE_BYTES_MAX:,} bytes: is it a worker of ours?"
                raise NotMeasured(text)
    shown = body.decode(errors="replace")
    names = {
        "process_cpu_seconds_total": "cpu",
        "preservarium_loop_cpu_seconds_total": "loop",
        'preservarium_records_received_total{stage="normalize"}': "messages",
        'preservarium_readings_total{stage="normalize"}': "readings",
    }
    found: dict[str, float] = {}
    for match in _SERIES.finditer(shown):
        key = match["name"] + (f"{{{match['labels']}}}" if match["labels"] else "")
        if key in names:
            found[names[key]] = float(match["value"])
    return found


def _print(made: Plan, document: dict[str, Any], have: int | None) -> None:
    from rich.table import Table

    out = console()
    click.echo(
        f"{document['messages_per_s']:,.0f} messages/s of {document['readings']:g} readings = {made.readings_per_s:,.0f} readings/s,"
        f" {document['peak']:g} times as much at the peak; costs: {document['costs']}"
    )
    table = Table(box=None, show_header=False)
    rows = [
        (
            "workers",
            f"{made.workers}, each {made.worker_readings_per_s:,.0f} readings/s"
            + (f"; {have} are there" if have else ""),
        ),
        ("partitions", f"{made.partitions} of each topic"),
        (
            "brokers",
            f"{made.brokers}, {made.kafka_gb:,.0f} GB on all of them"
            if made.brokers is not None and made.kafka_gb is not None
            else "sizes are not known",
        ),
        (
            "PostgreSQL",
            f"{made.postgres_gb_per_day:,.1f} GB a day before compression"
            if made.postgres_gb_per_day
            else "size is not known",
        ),
        (
            "ClickHouse",
            f"{made.clickhouse_gb_per_day:,.1f} GB a day" if made.clickhouse_gb_per_day else "size is not known",
        ),
    ]
    if document["month"]:
        rows.append(("a month", ", ".join(f"{what} {amount:,.2f}" for what, amount in document["month"].items())))
    for name, text in rows:
        table.add_row(name, text)
    out.print(table)
    shown = Table(box=None)
    for title in ("at the peak", "used", "when it is full"):
        shown.add_column(title)
    for part in made.parts:
        shown.add_row(part.name, f"{part.used:.0%}", part.advice if part.used > 0.7 else "")
    out.print(shown)
    verb = "carries it" if made.bottleneck.used <= 1 else "does not carry it"
    click.echo(
        f"full first: {made.bottleneck.name}; what is planned or there {verb}, with room for {made.headroom:.2g} times the load"
    )


commands: list[click.Command] = [capacity]
