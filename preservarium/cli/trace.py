"""`preservarium trace` and `preservarium lineage`: where a reading comes from, and whether it comes out of its bytes again."""

import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from preservarium.cli.instants import iso, now_us, when, with_iso
from preservarium.cli.output import bar, console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from rich.console import Console

    from preservarium.operations.lineage_check import Report
    from preservarium.settings import Settings

#: Characters of a raw message that are printed; --json has more of it.
RAW_CHARS_MAX: Final = 600
#: Decoded fields and rows that are printed; --json has all of them.
PRINTED_MAX: Final = 40

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _coordinates(text: str) -> tuple[int, int, int | None]:
    """PARTITION:OFFSET[:LINE].

    Raises:
        UsageError: it is none.
    """
    parts = text.replace("/", ":").split(":")
    if not 2 <= len(parts) <= 3 or not all(p.isascii() and p.isdigit() and len(p) <= 19 for p in parts):
        message = f"--raw: {text!r} is not PARTITION:OFFSET or PARTITION:OFFSET:LINE"
        raise click.UsageError(message)
    numbers = [int(p) for p in parts]
    if numbers[0] >= 2**31 or numbers[1] >= 2**63 or (len(numbers) == 3 and numbers[2] >= 2**31):
        message = f"--raw: {text!r} names no partition or offset that Kafka can have"
        raise click.UsageError(message)
    return numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else None


@click.command()
@click.option("--device", help="Address of the device, in any spelling.")
@click.option("--type", "component_type", help="Component type of the reading: what is measured.")
@click.option("--pin", help="Its pin.  [default: whichever there is]")
@click.option("--mode", help="Its connector mode.  [default: whichever there is]")
@click.option(
    "--at",
    help="Its instant, the device's time: ISO 8601, or µs since the epoch. To the second or millisecond will do.",
)
@click.option("--raw", help="Instead: PARTITION:OFFSET[:LINE] of iot_raw_data; says what became of it.")
@_json
def trace(
    device: str | None,
    component_type: str | None,
    pin: str | None,
    mode: str | None,
    at: str | None,
    raw: str | None,
    as_json: bool,
) -> None:
    """Say where one stored reading comes from, step by step; or what became of a raw record (--raw).

    It is derived again from its raw bytes, and compared bit by bit with what is stored. Exit code 1 where it differs, or where
    there is nothing to trace.
    """
    if raw is not None:
        if any(one is not None for one in (device, component_type, pin, mode, at)):
            message = "--raw goes alone: the record says whose it is"
            raise click.UsageError(message)
        document = asyncio.run(_forward(load(), *_coordinates(raw)))
    else:
        if device is None or component_type is None or at is None:
            message = "name a reading by --device, --type and --at, or a raw record by --raw"
            raise click.UsageError(message)
        document = asyncio.run(_reading(load(), device, component_type, pin, mode, when(at, "--at")))
    if as_json:
        print_json(with_iso(document))
    elif raw is not None:
        _print_forward(console(), document)
    else:
        _print_reading(console(), document)
    if document.get("rederivation", {}).get("status") == "different":
        sys.exit(1)


async def _tracing(settings: "Settings", ask: Any) -> dict[str, Any]:
    from preservarium.operations.trace import Tracer
    from preservarium.stores.clickhouse import ClickHouseStore
    from preservarium.stores.migrate import connect_postgres

    connection = await connect_postgres(settings, what="a trace")
    clickhouse = ClickHouseStore(lambda: settings) if settings.clickhouse.enabled else None
    tracer = Tracer(settings, connection, clickhouse)
    try:
        document: dict[str, Any] = await ask(tracer)
        return document
    finally:
        await tracer.close()
        if clickhouse is not None:
            await clickhouse.close()
        await connection.close(timeout=5)


async def _reading(
    settings: "Settings", device: str, component_type: str, pin: str | None, mode: str | None, at_us: int
) -> dict[str, Any]:
    from preservarium.operations.trace import Point

    return await _tracing(settings, lambda tracer: tracer.reading(Point(device, component_type, at_us, pin, mode)))


async def _forward(settings: "Settings", partition: int, offset: int, line: int | None) -> dict[str, Any]:
    return await _tracing(settings, lambda tracer: tracer.forward(partition, offset, line))


# --- printing


def _at(us: Any) -> str:
    return iso(us) if isinstance(us, int) else "not noted"


def _value(found: dict[str, Any]) -> str:
    value = found.get("value")
    shown = repr(value) if value is not None else repr(found.get("value_text"))
    return f"{shown} {found.get('unit') or ''}".rstrip()


class _Out:
    """Sections of lines, each with a name before it."""

    def __init__(self, out: "Console") -> None:
        self._out = out

    def head(self, text: str) -> None:
        from rich.markup import escape

        self._out.print(f"[bold]{escape(text)}[/]")

    def line(self, name: str, text: Any) -> None:
        from rich.markup import escape

        self._out.print(f"  {name:<14}{escape(str(text))}", soft_wrap=True)


def _print_raw(out: _Out, raw: dict[str, Any]) -> None:
    where = f"{raw['topic']} {raw['partition']}:{raw['offset']}:{raw['line']}" if "topic" in raw else ""
    if not raw.get("available", True):
        out.line("raw bytes", f"{where}: {raw['gone']}")
        return
    if "gone" in raw:
        out.line("raw bytes", f"{where}: {raw['gone']}")
        return
    shown = raw.get("text", raw.get("b64", ""))
    cut = shown if len(shown) <= RAW_CHARS_MAX else shown[:RAW_CHARS_MAX] + "…"
    out.line("raw bytes", f"{where}  {raw['bytes']:,} bytes, SHA-256 {raw['sha256']}".strip())
    out.line("", cut if "text" in raw else f"base64: {cut}")
    if "connector" in raw:
        way = ", ".join(
            f"{name} {raw[key]}" for name, key in (("mode", "mode"), ("topic", "mqtt_topic"), ("port", "port")) if raw[key] is not None
        )  # fmt: skip
        out.line("connector", raw["connector"] + (f" ({way})" if way else ""))
        again = f", attempt {raw['attempt']}" if raw["attempt"] > 1 else ""
        out.line("received", f"{_at(raw['received_at'])}, in Kafka {_at(raw['kafka_time'])}{again}")


def _print_reading(out_to: "Console", d: dict[str, Any]) -> None:
    out, r = _Out(out_to), d["reading"]
    out.head(
        f"{r['device_id']}  {r['component_type']} (pin {r['pin_position']}, mode {r['connector_mode']})  {_at(r['timestamp'])}"
    )
    _print_raw(out, d["raw"])
    parser = d["parser"]
    out.line(
        "parser",
        f"{parser['parser']}" + (f", {parser['kind']}, source SHA-256 {parser['hash']}" if parser["hash"] else ""),
    )
    if (decoded := d["decoded"]) is not None:
        for n, f in enumerate(decoded["fields"][:PRINTED_MAX]):
            at = f" at {_at(f['timestamp'])}" if f["timestamp"] is not None else ""
            out.line("decoded" if n == 0 else "", f"{f['name']} = {f['value']!r} {f['unit'] or ''}".rstrip() + at)
        left = len(decoded["fields"]) - PRINTED_MAX + decoded["more"]
        if left > 0:
            out.line("", f"… and {left:,} fields more")
        for text in decoded["refused"]:
            out.line("refused", text)
    if (m := d["mapping"]) is not None:
        out.line(
            "mapping",
            f"{m['field']} → {m['component_type']} (pin {m['pin_position']}), by {m['by']}"
            + (f" {m['entry']}" if m["entry"] else ""),
        )
        change = m["conversion"]
        if change is not None:
            out.line(
                "conversion",
                f"{m['value_before']!r} {m['unit_before'] or ''} × {change['factor']} + {change['offset']} → {m['unit']}",
            )
        else:
            out.line("conversion", f"none ({m['unit'] or 'no unit'})")
    v = d["validated"]
    out.line(
        "validated",
        f"{_value(v)}, quality {v['quality']} {v['quality_name']}" + (", a later verdict" if v["revised"] else ""),
    )
    if v.get("bounds"):
        out.line("bounds", ", ".join(f"{name} {bound:g}" for name, bound in v["bounds"].items()))
    for test in v.get("tests", [{"test": flag} for flag in v["flags"]]):
        of = ", ".join(
            f"{name} {bound}" for name, bound in test.items() if name not in ("test", "unit") and bound is not None
        )
        out.line("flag", test["test"] + (f": {of}" if of else ""))
    out.line("again", d["rederivation"]["text"])
    for w in d["windows"]:
        out.line("window", f"{w['size_s']} s from {_at(w['window_start'])}: {w['count']} readings, revision {w['revision']}, closed by {w['closed_by']}"
                 + (f", generation {w['generation']}" if w["generation"] else ""))  # fmt: skip
    for w in d["rollups"]:
        out.line("roll-up", f"{w['name']} from {_at(w['bucket'])}: {w['records']} readings")
    _print_alarms(out, d)
    pg = d["stored"]["postgres"]
    out.line("PostgreSQL", f"{_value(pg)}  device {_at(pg['timestamp'])}, received {_at(pg['received_at'])}, stored {_at(pg['ingested_at'])}"
             f", generation {pg['generation']}")  # fmt: skip
    ch = d["stored"]["clickhouse"]
    if not ch["asked"]:
        out.line("ClickHouse", f"not asked: {ch['why']}")
    elif ch["row"] is None:
        out.line("ClickHouse", "has no such row")
    else:
        row = ch["row"]
        said = "the same" if ch["same"] else f"differs in {', '.join(ch['differs_in'])}"
        out.line(
            "ClickHouse",
            f"{_value(row)}  device {_at(row['timestamp'])}, received {_at(row['received_at'])}, stored {_at(row['ingested_at'])}: {said}",
        )


def _print_alarms(out: _Out, d: dict[str, Any]) -> None:
    for a in d["alarms"]:
        out.line(
            "alarm",
            f"{a['rule']}: {a['transition']}, {a['severity']}, at {_at(a['occurred_at'])}: {a['message'] or ''}".rstrip(
                ": "
            ),
        )
    for n in d["notices"]:
        out.line("notice", f"{n['kind']} to {n['recipient']} by {n['channel']}: {n['outcome']} {_at(n['settled_at'])}")


def _print_forward(out_to: "Console", d: dict[str, Any]) -> None:
    out, raw = _Out(out_to), d["raw"]
    generation = f", generation {raw['generation']}" if raw["generation"] else ""
    out.head(
        f"{raw['topic']} {raw['partition']}:{raw['offset']}  {_at(raw['kafka_time'])}, {raw['bytes']:,} bytes, {raw['lines']} lines{generation}"
    )
    for m in d["messages"]:
        out.head(f"device {m['device_id']}")
        _print_raw(out, m["raw"])
        if m["refused"]:
            out.line("refused", m["refused"])
        for n, r in enumerate(m["readings"]):
            if n == PRINTED_MAX:
                out.line("", f"… and {len(m['readings']) - PRINTED_MAX:,} readings more")
                break
            more = ", a later verdict" if r["revised"] else ""
            more += f", generation {r['generation']}" if r["generation"] else ""
            out.line("reading", f"{r['component_type']} (pin {r['pin_position']}) = {_value(r)}, quality {r['quality']}"
                     + (f" {','.join(r['flags'])}" if r["flags"] else "") + f", {_at(r['timestamp'])}, stored {_at(r['ingested_at'])}{more}")  # fmt: skip
        for r in m["not_stored"][:PRINTED_MAX]:
            out.line(
                "not stored", f"{r['component_type']} (pin {r['pin_position']}), {_at(r['timestamp'])}: {r['why']}"
            )
        _print_alarms(out, m)
    if d["lines_not_shown"]:
        out.line("", f"… and {d['lines_not_shown']:,} lines more; name one by --raw PARTITION:OFFSET:LINE")
    for e in d["errors"]:
        out.line("error", f"{e['id']}  {e['stage']}: {e['code']}: {e['message']}  ({_at(e['first_seen'])})")
    if not d["errors_complete"]:
        out.line("", "not every error line since then was looked at: `preservarium dlq list --device …` has all")
    if not d["messages"] and not d["errors"]:
        out.line("", "nothing came of it")


# --- verification


@click.group()
def lineage() -> None:
    """Check that stored readings come out of their raw bytes."""


@lineage.command()
@click.option("--sample", type=click.IntRange(1, 1_000_000), help="So many readings, drawn by chance.  [default: 1000]")
@click.option("--all", "every", is_flag=True, help="Every reading of the time.")
@click.option(
    "--since", default="24h", show_default=True, help="With an instant since then: ISO 8601, or 30m, 2h, 7d ago."
)
@click.option("--until", help="With an instant until then.  [default: a day ahead of now]")
@_json
def verify(sample: int | None, every: bool, since: str, until: str | None, as_json: bool) -> None:
    """Derive stored readings again from their raw bytes, and compare them bit by bit.

    Exit code 1 where one differs. Kafka keeps raw messages for a day unless told otherwise: what is older cannot be verified.
    """
    if every and sample is not None:
        message = "--sample and --all exclude each other"
        raise click.UsageError(message)
    from_us = when(since, "--since")
    to_us = when(until, "--until") if until else now_us() + 86_400_000_000
    if to_us < from_us:
        message = "--until is before --since"
        raise click.UsageError(message)
    report = asyncio.run(_verify(load(), from_us, to_us, None if every else sample or 1_000, as_json))
    if as_json:
        print_json(with_iso(_document(report)))
    else:
        _print_report(report)
    if not report.same:
        sys.exit(1)


async def _verify(settings: "Settings", from_us: int, to_us: int, sample: int | None, quiet: bool) -> "Report":
    from preservarium.operations.lineage_check import Checker
    from preservarium.stores.migrate import connect_postgres

    opened: list[Any] = []
    try:
        for _ in range(2):
            opened.append(await connect_postgres(settings, what="a verification"))
        with bar("verify", quiet) as progress:
            return await Checker(settings, *opened).check(from_us, to_us, sample=sample, progress=progress)
    finally:
        for connection in opened:
            await connection.close(timeout=5)


def _document(report: "Report") -> dict[str, Any]:
    from preservarium.operations.trace import rederivation_text

    return {
        "from": report.from_us,
        "to": report.to_us,
        "checked": report.checked,
        "identical": report.identical,
        "different": report.different,
        "unverifiable": dict(sorted(report.unverifiable.items())),
        "share_identical": round(report.share(report.identical), 6),
        "same": report.same,
        "examples": [
            {
                "device_id": e.reading.device_id,
                "connector_mode": e.reading.connector_mode,
                "component_type": e.reading.component_type,
                "pin_position": e.reading.pin_position,
                "timestamp": e.reading.timestamp,
                "raw": str(e.reading.raw),
                "text": rederivation_text(e.verdict),
            }
            for e in report.examples
        ],
    }


def _print_report(report: "Report") -> None:
    from preservarium.operations.trace import rederivation_text

    def share(count: int) -> str:
        return f"{count:>12,}  {report.share(count):.2%}"

    rows: Sequence[tuple[str, int]] = (
        ("identical", report.identical),
        *((f"unverifiable: {why.replace('_', ' ')}", n) for why, n in sorted(report.unverifiable.items())),
        ("different", report.different),
    )
    click.echo(f"  {'readings looked at':<32}{report.checked:>12,}")
    for name, n in rows:
        click.echo(f"  {name:<32}{share(n)}")
    for e in report.examples:
        r = e.reading
        click.echo(
            f"  {r.device_id} {r.component_type} (pin {r.pin_position}) {iso(r.timestamp)}, raw {r.raw}: {rederivation_text(e.verdict)}"
        )
    if not report.checked:
        click.echo("  nothing is stored of this time")


commands: list[click.Command] = [trace, lineage]
