"""`preservarium alarms backtest | kpis | suggest`: what alarm rules would have done, do, and should be."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from preservarium.cli.alarms import alarms
from preservarium.cli.instants import now_us, shown, shown_span, when
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load

if TYPE_CHECKING:
    from preservarium.operations.backtest import Result, Test

#: Alarms that the printed table names; --json has a thousand.
ALARMS_SHOWN_MAX = 20

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_from = click.option("--from", "from_", default="7d", show_default=True, metavar="WHEN",
                     help="Begin: ISO 8601, or 12h, 7d ago.")  # fmt: skip
_to = click.option("--to", metavar="WHEN", help="End; not part of it.  [default: now]")


def _times(from_: str, to: str | None) -> tuple[int, int]:
    return when(from_, "--from"), when(to, "--to") if to else now_us()


def _table(*names: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(
            name, justify="left" if name in ("rule", "alarm", "recipient", "first", "parameter") else "right"
        )
    return table


# --- back-test -------------------------------------------------------------------------------------------------------


@alarms.command()
@click.option("--rule", "file", required=True, metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A registry file; of it, the section `rules` is used.")  # fmt: skip
@click.option("--name", "names", multiple=True, help="Only this rule of the file; may be repeated.")
@_from
@_to
@click.option("--against", type=click.Choice(["live"]), help="Compare with the rule of the same name in the registry.")
@click.option("--device", "devices", multiple=True, metavar="ADDRESS", help="Only this device; may be repeated.")
@click.option("--alone", is_flag=True, help="Leave out the other rules of a rule's suppression group.")
@click.option("--processes", type=click.IntRange(1, 64), help="How many work at once.  [default: the cores, at most 4]")
@_json
def backtest(
    file: Path,
    names: tuple[str, ...],
    from_: str,
    to: str | None,
    against: str | None,
    devices: tuple[str, ...],
    alone: bool,
    processes: int | None,
    as_json: bool,
) -> None:
    """Evaluate rules over stored readings, by the code that runs live, and change nothing.

    A rule watches the devices to which the registry gives a rule of its name; a new one, every device that has such a
    series. The live rules of its suppression group take part, so that its master suppresses it. Nobody acknowledges in a
    back-test, and what came late is in its place.
    """
    import asyncpg
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from preservarium.operations import backtest as work
    from preservarium.stores.migrate import MigrationError, connect_postgres

    settings = load()
    from_us, to_us = _times(from_, to)
    columns = (TextColumn("{task.completed:,.0f} readings"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())

    async def evaluate() -> "tuple[Test, Result]":
        rules = work.rules_of(file, names)
        connection = await connect_postgres(settings)
        try:
            test = await work.prepare(
                connection,
                settings,
                rules,
                from_us=from_us,
                to_us=to_us,
                against_live=against == "live",
                devices=devices or None,
                companions=not alone,
            )
            errors = Console(stderr=True)
            with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
                task = bar.add_task("", total=None)
                result = await work.run(
                    connection,
                    test,
                    processes=processes,
                    progress=lambda done, of: bar.update(task, completed=done, total=of),
                )
            await work.count_notices(connection, settings, test, result)
            return test, result
        except asyncpg.UndefinedTableError as e:
            message = f"the database is not migrated ({e}): run `preservarium migrate`"
            raise MigrationError(message) from None
        finally:
            await connection.close(timeout=5)

    test, result = asyncio.run(evaluate())
    if as_json:
        print_json(result.document(test))
    else:
        _print_backtest(test, result)


def _print_backtest(test: "Test", result: "Result") -> None:
    from rich.markup import escape

    out = console()
    out.print(
        f"{result.readings:,} readings of {result.devices:,} devices,"
        f" {shown(test.from_us)} to {shown(test.to_us)}"
        + (f"; {result.unknown_devices:,} devices are not in the registry" if result.unknown_devices else "")
    )
    if not result.readings:
        out.print(f"Nothing is stored of {', '.join(map(escape, test.component_types))} in that time.")
    if result.companions:
        named = ", ".join(f"{escape(rule)} ({count:,} devices)" for rule, count in sorted(result.companions.items()))
        out.print(f"Live rules of its suppression groups that took part: {named}")
    names = (
        "rule",
        "raised",
        "transitions",
        "chatter",
        "standing",
        "first out",
        "suppressed",
        "mean",
        "longest",
        "in all",
    )
    table = _table(*names)
    shown_rules = [(rule, tally, "") for rule, tally in sorted(result.rules.items())]
    shown_rules += [(rule, tally, " (live)") for rule, tally in sorted(result.live.items())]
    for rule, tally, word in sorted(shown_rules, key=lambda one: one[0]):
        mean_s = tally.active_us / tally.raised / 1e6 if tally.raised else None
        table.add_row(escape(rule) + word, f"{tally.raised:,}", f"{tally.transitions:,}", f"{tally.chatter:,}", f"{tally.standing:,}",
                      f"{tally.first_out:,}", f"{tally.suppressed:,}", shown_span(mean_s), shown_span(tally.longest_us / 1e6), shown_span(tally.active_us / 1e6))  # fmt: skip
    out.print(table if table.row_count else "No alarm.")
    if test.against_live and result.difference:
        table = _table(
            "rule", "in both", "only new", "only live", "active, new", "active, live", "pairs: new lasts longer by"
        )
        for rule, one in sorted(result.difference.items()):
            sign = "-" if one.longer_us < 0 else ""
            table.add_row(escape(rule), f"{one.both:,}", f"{one.only_new:,}", f"{one.only_old:,}", shown_span(one.active_new_us / 1e6),
                          shown_span(one.active_old_us / 1e6), sign + shown_span(abs(one.longer_us) / 1e6))  # fmt: skip
        out.print(table)
    if result.alarms:
        table = _table("alarm", "raised", "chatter", "mean", "longest", "first")
        for key, tally in result.alarms[:ALARMS_SHOWN_MAX]:
            table.add_row(escape(f"{key.device_id} {key.rule} {key.pin_position}"), f"{tally.raised:,}", f"{tally.chatter:,}",
                          shown_span(tally.active_us / max(1, tally.raised) / 1e6), shown_span(tally.longest_us / 1e6),
                      shown(tally.first_at))  # fmt: skip
        out.print(table)
    if result.notices is None and result.told:
        out.print("Too many transitions to say which notices they would have made:")
    for recipient, count in sorted(result.told.items()):
        kinds = (result.notices or {}).get(recipient, {})
        notices = ", ".join(f"{n:,} of kind {kind}" for kind, n in kinds.items())
        out.print(
            f"{escape(recipient)}: {count:,} transitions"
            + (f" make {sum(kinds.values()):,} notices ({notices})" if kinds else "")
        )
    for problem in [*test.problems, *result.problems][:ALARMS_SHOWN_MAX]:
        out.print(f"[yellow]{escape(problem)}[/]")


# --- KPIs ------------------------------------------------------------------------------------------------------------


@alarms.command()
@_from
@_to
@_json
def kpis(from_: str, to: str | None, as_json: bool) -> None:
    """Print how the alarm system does: rates, floods, chattering, stale alarms, answers (ISA-18.2, EEMUA 191)."""
    import asyncpg

    from preservarium.stores import kpis as store
    from preservarium.stores.migrate import MigrationError, connect_postgres

    from_us, to_us = _times(from_, to)
    if to_us <= from_us:
        message = "the time to look at is empty: --to is not after --from"
        raise click.UsageError(message)

    async def ask() -> dict[str, Any]:
        connection = await connect_postgres(load())
        try:
            return await store.kpis(connection, from_us, to_us)
        except asyncpg.UndefinedTableError as e:
            message = f"the database is not migrated ({e}): run `preservarium migrate`"
            raise MigrationError(message) from None
        finally:
            await connection.close(timeout=5)

    found = asyncio.run(ask())
    if as_json:
        print_json(found)
    else:
        _print_kpis(found)


def _print_kpis(found: dict[str, Any]) -> None:
    from rich.markup import escape

    out = console()
    out.print(f"{found['annunciations']:,} annunciations, {shown(found['from'])} to {shown(found['to'])}")
    names = (
        "recipient",
        "in all",
        "10 min, mean",
        "10 min, most",
        "hour, most",
        "10 min above 10",
        "floods",
        "in flood",
    )
    table = _table(*names)
    for operator, one in found["operators"].items():
        table.add_row(escape(operator) or "everybody", f"{one['annunciations']:,}", f"{one['per_10min_mean']:.2f}", f"{one['per_10min_most']:,}",
                      f"{one['per_hour_most']:,}", f"{one['intervals_above_10']:,}", f"{one['floods']:,}", f"{one['time_in_flood']:.1%}")  # fmt: skip
    out.print(table)
    answers = found["acknowledgements"]
    out.print(
        f"acknowledged: {answers['acknowledged']:,}, after {shown_span(answers['median_s']) or '–'} (median),"
        f" {shown_span(answers['p90_s']) or '–'} (90 %); never: {answers['never']:,}"
    )
    shares = ", ".join(f"{name} {one['share']:.0%}" for name, one in found["priorities"].items())
    out.print(f"severities: {shares or '–'}")
    out.print(f"chattering: {found['chattering']['alarms']:,} alarms; stale: {found['stale']['alarms']:,} alarms")
    for one in found["chattering"]["listed"][:ALARMS_SHOWN_MAX]:
        name = escape(f"{one['device_id']} {one['rule']} {one['pin_position']}")
        out.print(f"  {name} chatters: {one['times']:,} times, up to {one['most_in_minute']} in a minute")
    if found["top"]["listed"]:
        out.print(f"the {len(found['top']['listed'])} most frequent alarms are {found['top']['share']:.0%} of all:")
        table = _table("alarm", "annunciations", "share")
        for one in found["top"]["listed"]:
            name = escape(f"{one['device_id']} {one['rule']} {one['pin_position']}")
            table.add_row(name, f"{one['annunciations']:,}", f"{one['share']:.1%}")
        out.print(table)


# --- suggestion ------------------------------------------------------------------------------------------------------


@alarms.command()
@click.option("--device", required=True, metavar="ADDRESS", help="Address of the device.")
@click.option("--rule", required=True, metavar="NAME", help="Name of the rule that chatters.")
@_from
@_to
@_json
def suggest(device: str, rule: str, from_: str, to: str | None, as_json: bool) -> None:
    """Find the dead-band or delay that would have spared 90 % of an alarm's transitions.

    Candidates are played over the stored readings by the code that runs live. At least 20 transitions are needed; the
    suggestion that changes least for how long the alarm stands comes first.
    """
    import asyncpg
    from rich.markup import escape

    from preservarium.operations.suggesting import Suggested
    from preservarium.operations.suggesting import suggest as work
    from preservarium.stores.migrate import MigrationError, connect_postgres

    from_us, to_us = _times(from_, to)

    async def ask() -> Suggested:
        connection = await connect_postgres(load())
        try:
            return await work(connection, device, rule, from_us=from_us, to_us=to_us)
        except asyncpg.UndefinedTableError as e:
            message = f"the database is not migrated ({e}): run `preservarium migrate`"
            raise MigrationError(message) from None
        finally:
            await connection.close(timeout=5)

    found = asyncio.run(ask())
    advice = found.advice
    if as_json:
        print_json({
            "device_id": device, "rule": rule, "from": found.from_us, "to": to_us, "messages": found.messages,
            "transitions": advice.transitions, "raised": advice.raised, "chatter": advice.chatter, "active_s": advice.active_us / 1e6,
            "calm": advice.calm, "tried": advice.tried, "suggestions": [one.document() for one in advice.suggestions],
        })  # fmt: skip
        return
    out = console()
    out.print(
        f"{escape(rule)} of {escape(device)}: {advice.transitions:,} transitions in {found.messages:,} messages since"
        f" {shown(found.from_us)}, raised {advice.raised:,} times, {advice.chatter:,} of them in a chatter;"
        f" it stood for {shown_span(advice.active_us / 1e6) or '0 s'}"
    )
    if not advice.suggestions:
        out.print("Too few to calm anything." if advice.calm else "No single dead-band or delay spares 90 % of them.")
        return
    table = _table("parameter", "now", "better", "transitions", "spared", "raised", "stands for")
    for one in advice.suggestions:
        table.add_row(one.parameter, f"{one.before:g}", f"{one.value:g}", f"{one.transitions:,}", f"{one.spared:.0%}", f"{one.raised:,}",
                      shown_span(one.active_us / 1e6))  # fmt: skip
    out.print(table)


commands: list[click.Command] = [alarms]
