"""`preservarium alarms`: what is not normal, and what an operator does about it. Needs Kafka alone.

Exit codes: 0 done; 1 refused, or Kafka cannot be reached; 2 wrong arguments; 3 sent, but no answer came in time.
"""

import asyncio
import getpass
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import click

from preservarium.cli.instants import shown
from preservarium.cli.output import console, print_json
from preservarium.cli.system import load
from preservarium.domain.alarms.action import SHELVE_S_DEFAULT
from preservarium.domain.alarms.rule import SEVERITIES, measured
from preservarium.errors import PreservariumError, reason
from preservarium.settings import Settings

EXIT_REFUSED: Final = 1
EXIT_NO_ANSWER: Final = 3
#: The machine answers within a second; a worker that is being started or a rebalance takes longer.
ANSWER_S: Final = 30.0
#: Kafka must let itself be read within this time.
READ_S: Final = 30.0

_SPAN: Final = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


class AlarmsError(PreservariumError):
    """Kafka cannot be read."""


@click.group("alarms")
def alarms() -> None:
    """List alarms, and acknowledge, shelve, comment, … them."""


# --- what the commands share -----------------------------------------------------------------------------------------


@asynccontextmanager
async def _board(settings: Settings) -> AsyncIterator[Any]:
    """The board, read to its end and followed until the block is left."""
    from aiokafka.errors import KafkaError

    from preservarium.operations.alarm_board import Board, follow

    board = Board()
    following = asyncio.create_task(
        follow(board, settings, now_us=time.time_ns() // 1_000, stopped=lambda: False), name="alarm-board"
    )
    ready = asyncio.create_task(board.ready.wait())
    try:
        await asyncio.wait([following, ready], timeout=READ_S, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
        if not ready.done():
            message = f"alarm_standing could not be read from {settings.kafka.bootstrap_servers} in {READ_S:g} s"
            raise AlarmsError(message)
        yield board
    except (KafkaError, OSError) as e:
        message = f"Kafka cannot be reached at {settings.kafka.bootstrap_servers}: {reason(e)}"
        raise AlarmsError(message) from None
    finally:
        for task in (ready, following):
            task.cancel()
            with suppress(asyncio.CancelledError, KafkaError, OSError, PreservariumError):
                await task


def _span_s(_context: Any, _parameter: Any, text: str | float) -> float:
    found = _SPAN.fullmatch(str(text).strip())
    if not found:
        message = f"{text!r} is no time like 90s, 30m, 2h, 1d"
        raise click.BadParameter(message)
    return float(found[1]) * _SECONDS[found[2]]


def _filter(state: str, severity: str, device: str, rule: str, q: str) -> Any:
    from preservarium.operations.alarm_board import STATES, Filter

    words = [word.strip().replace("-", "_") for word in state.split(",")]
    severities = frozenset(word.strip() for word in severity.split(",") if word.strip())
    if unknown := [word for word in words if word not in STATES] + sorted(severities - set(SEVERITIES)):
        message = f"there is no {unknown[0]!r}; see --help"
        raise click.UsageError(message)
    return Filter(frozenset[str]().union(*(STATES[word] for word in words)), severities, device, rule, q)


_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_pin = click.option("--pin", "pin", default="-1", show_default=True, help="Pin, where the device has more than one.")


# --- looking ---------------------------------------------------------------------------------------------------------


@alarms.command("list")
@click.option("--state", default="standing", show_default=True, help="States, separated by commas: standing (all that is not normal), waiting "
              "(for somebody), active, unacknowledged, acknowledged, returned-unacknowledged, latched, shelved, suppressed, out-of-service.")  # fmt: skip
@click.option("--severity", default="", help=f"Severities, separated by commas: {', '.join(SEVERITIES)}.")
@click.option("--device", default="", help="Address of a device.")
@click.option("--rule", default="", help="Name of a rule.")
@click.option("--search", "q", default="", help="Part of an address, a name, a rule or a message.")
@click.option(
    "--sort", default="priority", type=click.Choice(["priority", "severity", "newest", "oldest", "device", "state"])
)
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@_json
def list_(state: str, severity: str, device: str, rule: str, q: str, sort: str, limit: int, as_json: bool) -> None:
    """List the alarms that are not normal, of the whole system; what needs somebody comes first."""
    wanted = _filter(state, severity, device, rule, q)

    async def read() -> Any:
        async with _board(load()) as board:
            return board.page(wanted, order=sort, after=None, limit=limit), board.counts(), board.note()

    page, counts, note = asyncio.run(read())
    if note:
        click.echo(note, err=True)
    if as_json:
        print_json({"alarms": page.alarms, "total": page.total, "counts": counts})
        return
    if not page.total:
        click.echo("No alarm is there.")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("severity", "state", "since", "device", "rule", "value", "threshold", "message"):
        table.add_column(name, overflow="fold")
    for a in page.alarms:
        pin = "" if a["pin_position"] == "-1" else f" [{a['pin_position']}]"
        until = f" until {shown(a['shelved_until'])}" if a.get("shelved_until") else ""
        marks = "".join(
            f" ({word})" for word, field in (("first out", "first_out"), ("chattering", "chattering")) if a.get(field)
        )
        cells = (a["severity"], a["state"].replace("_", " ") + until, shown(a["occurred_at"] or a["transition_at"]), a["device_id"],
                 a["rule"] + pin, measured(a["value"], a["unit"]), measured(a["threshold"], a["unit"]), a["message"] + marks)  # fmt: skip
        table.add_row(*(escape(str(cell)) for cell in cells))
    console().print(table)
    if page.total > len(page.alarms):
        click.echo(f"{len(page.alarms):,} of {page.total:,}: raise --limit", err=True)


@alarms.command()
@click.argument("device")
@click.argument("rule")
@_pin
@_json
def show(device: str, rule: str, pin: str, as_json: bool) -> None:
    """Show one alarm as it stands, and its history where the database can be asked."""
    from preservarium.errors import Retry
    from preservarium.stores.views import Views

    async def read() -> Any:
        settings = load()
        async with _board(settings) as board:
            alarm = board.get((device, rule, pin))
        views = Views(lambda: settings.postgres)
        try:
            return alarm, await views.alarm_history(device_id=device, rule=rule, pin_position=pin, limit=100), ""
        except Retry as e:
            return alarm, None, f"no history: {e}"
        finally:
            await views.close()

    alarm, history, note = asyncio.run(read())
    if note:
        click.echo(note, err=True)
    if alarm is not None:
        device = alarm["device_id"]
    if as_json:
        print_json({"device_id": device, "rule": rule, "pin_position": pin, "state": alarm["state"] if alarm else "normal",
                    "alarm": alarm, "history": history})  # fmt: skip
        return
    from rich.markup import escape
    from rich.table import Table

    if alarm is None:
        click.echo(f"{device} {rule}: normal")
    else:
        click.echo(f"{device} {rule}: {alarm['state'].replace('_', ' ')} ({alarm['severity']}) since "
                   f"{shown(alarm['occurred_at'] or alarm['transition_at'])}\n{alarm['message']}")  # fmt: skip
        if alarm["shelved_until"]:
            click.echo(f"shelved until {shown(alarm['shelved_until'])}")
    if history:
        table = Table(box=None, pad_edge=False)
        for name in ("at", "what", "state", "who", "comment"):
            table.add_column(name, overflow="fold")
        for line in history:
            said = line["comment"] or ""
            cells = (shown(line["at"]), line["name"], line["state"].replace("_", " "), line["actor"] or "",
                     f"refused: {line['reason']} {said}" if line["reason"] else said)  # fmt: skip
            table.add_row(*(escape(str(cell)) for cell in cells))
        console().print(table)


# --- acting ----------------------------------------------------------------------------------------------------------


def _act(line: dict[str, Any], timeout_s: float, as_json: bool) -> None:
    """Send an action, wait for its answer, say it, and exit."""
    from preservarium.operations.alarm_board import Board, Desk
    from preservarium.settings import LiveSettings
    from preservarium.streaming.publish import Publisher

    async def send(board: Any, settings: Settings) -> str:
        publisher = Publisher(LiveSettings(settings))
        try:
            return await Desk(board, publisher.publish).act(line)
        finally:
            await publisher.on_stop()

    async def run() -> tuple[str, Any]:
        settings = load()
        if timeout_s <= 0:
            return await send(Board(), settings), None
        # Followed before it is sent, so that the answer cannot be missed.
        async with _board(settings) as board:
            action_id = await send(board, settings)
            return action_id, await board.wait(action_id, timeout_s)

    action_id, answer = asyncio.run(run())
    if as_json:
        print_json(answer or {"action_id": action_id, "outcome": "pending"})
    elif answer is None:
        click.echo(
            f"sent: {action_id}" if timeout_s <= 0 else f"no answer within {timeout_s:g} s: {action_id}",
            err=timeout_s > 0,
        )
    elif answer["outcome"] == "done":
        click.echo(f"done: {answer['device_id']} {answer['rule']} is {answer['state'].replace('_', ' ')}")
    else:
        click.echo(f"preservarium: refused: {answer['reason']}", err=True)
    if answer is None and timeout_s > 0:
        sys.exit(EXIT_NO_ANSWER)
    if answer is not None and answer["outcome"] != "done":
        sys.exit(EXIT_REFUSED)


def _act_on_many(
    word: str, wanted: dict[str, str], line: dict[str, Any], *, limit: int, yes: bool, timeout_s: float, as_json: bool
) -> None:
    """Find alarms, say how many, ask, send an action for each, say what became of them, and exit."""
    from preservarium.operations.alarm_board import BULK, Desk, tally
    from preservarium.settings import LiveSettings
    from preservarium.streaming.publish import Publisher

    found = _filter(**{**wanted, "state": wanted["state"] or BULK[word]})
    request_id = line.pop("action_id", None) or uuid.uuid4().hex

    async def run() -> dict[str, Any]:
        settings = load()
        async with _board(settings) as board:
            page = board.page(found, after=None, limit=limit)
            if board.note():
                click.echo(board.note(), err=True)
            kinds = Counter(alarm["severity"] for alarm in page.alarms)
            kinds_text = ", ".join(f"{kinds[name]} {name}" for name in SEVERITIES if kinds[name])
            beyond = f" of {page.total:,}" if page.total > len(page.alarms) else ""
            click.echo(f"{len(page.alarms):,}{beyond} alarms{f': {kinds_text}' if kinds_text else ''}", err=True)
            said = {"request_id": request_id, "matched": page.total}
            if not page.alarms:
                return {**said, **tally(()), "results": []}
            # What is raised while the question stands is not among them.
            if not yes:
                await asyncio.to_thread(click.confirm, f"{word} {len(page.alarms):,}?", abort=True, err=True)
            publisher = Publisher(LiveSettings(settings))
            try:
                desk = Desk(board, publisher.publish)
                results = await desk.act_many(request_id, line, page.alarms)
                await desk.wait_many(results, timeout_s)
            finally:
                await publisher.on_stop()
            return {**said, **tally(results), "results": results}

    said = asyncio.run(run())
    if as_json:
        print_json(said)
    else:
        for result in said["results"]:
            if result["outcome"] == "refused":
                click.echo(f"refused: {result['device_id']} {result['rule']}: {result['reason']}", err=True)
        pending = f", {said['pending']:,} {'sent' if timeout_s <= 0 else 'not answered'}" if said["pending"] else ""
        click.echo(f"done: {said['done']:,}, refused: {said['refused']:,}{pending}")
    if said["refused"]:
        sys.exit(EXIT_REFUSED)
    if said["pending"] and timeout_s > 0:
        sys.exit(EXIT_NO_ANSWER)


_many: Final = (
    click.option("--yes", is_flag=True, help="Many alarms: do not ask."),
    click.option("--limit", type=click.IntRange(1, 500), default=500, show_default=True, help="Many alarms: at most so many."),
    click.option("--search", "q", default="", help="Many alarms: part of an address, a name, a rule or a message."),
    click.option("--state", "of_state", default="", help="Many alarms: of these states; as the list has them."),
    click.option("--severity", default="", help="Many alarms: of these severities, separated by commas."),
    click.option("--rule", "of_rule", default="", help="Many alarms: of this rule."),
    click.option("--device", "of_device", default="", help="Many alarms: of this device."),
)  # fmt: skip


def _action_on_one_or_many(word: str, help_text: str, *options: Callable[[Any], Any]) -> click.Command:
    """An action that takes DEVICE and RULE, or a filter."""

    def run(
        line: dict[str, Any], timeout_s: float, as_json: bool, of_device: str, of_rule: str, severity: str, of_state: str, q: str,
        limit: int, yes: bool,
    ) -> None:  # fmt: skip
        wanted = {"device": of_device, "rule": of_rule, "severity": severity, "state": of_state, "q": q}
        if line["device_id"] and line["rule"] and not any(wanted.values()):
            _act(line, timeout_s, as_json)
            return
        one = {name: line.pop(name, None) for name in ("device_id", "rule", "pin_position", "alarm_id")}
        if one != {**dict.fromkeys(one), "pin_position": "-1"} or not any(wanted.values()):
            message = "name one alarm by DEVICE and RULE, or many by --device, --rule, --severity, --state, --search"
            raise click.UsageError(message)
        _act_on_many(word, wanted, line, limit=limit, yes=yes, timeout_s=timeout_s, as_json=as_json)

    help_text += """

    One alarm, by DEVICE and RULE; or many, by --device, --rule, --severity, --state, --search: how many they are is shown,
    and asked about without --yes. Those that stand then are meant, not what is raised meanwhile.
    """
    return _action(word, help_text, *_many, *options, required=False, act=run)


def _action(
    word: str, help_text: str, *options: Callable[[Any], Any], required: bool = True, act: Callable[..., None] = _act
) -> click.Command:
    def run(device: str | None, rule: str | None, pin: str, actor: str, comment: str, alarm_id: str | None, action_id: str | None,
            timeout_s: float, no_wait: bool, as_json: bool, duration_s: float | None = None, one_shot: bool = False, **more: Any) -> None:  # fmt: skip
        line: dict[str, Any] = {"device_id": device, "rule": rule, "pin_position": pin, "action": word, "actor": actor}
        line |= {k: v for k, v in (("comment", comment), ("alarm_id", alarm_id), ("action_id", action_id)) if v}
        line |= {} if duration_s is None else {"duration_s": duration_s, "one_shot": one_shot}
        act(line, 0.0 if no_wait else timeout_s, as_json, **more)

    run.__doc__ = help_text
    for option in (
        _json,
        click.option("--no-wait", is_flag=True, help="Return when Kafka has it."),
        click.option("--timeout", "timeout_s", default=str(ANSWER_S), callback=_span_s, help="Wait so long for the answer.  [default: 30s]"),
        click.option("--action-id", help="An id of yours: the same again is done once."),
        click.option("--alarm-id", help="The occurrence that was seen: another one is not touched."),
        click.option("--comment", default="", help="Why.", required=word == "comment"),
        click.option("--actor", default=getpass.getuser, help="Who.  [default: your user name]"),
        _pin,
        *options,
        click.argument("rule", required=required),
        click.argument("device", required=required),
    ):  # fmt: skip
        run = option(run)
    return alarms.command(word.replace("_", "-"))(run)


_action_on_one_or_many("acknowledge", "Say that you know of an alarm and see to it.")
_action("clear", "Reset a latched alarm whose condition is over.")
_action_on_one_or_many("comment", "Add a comment to an alarm.")
_action_on_one_or_many(
    "shelve",
    "Set an alarm aside for a time; it comes back by itself.",
    click.option("--one-shot", is_flag=True, help="At the latest when the condition returns to normal."),
    click.option("--for", "duration_s", default=f"{SHELVE_S_DEFAULT}s", callback=_span_s, help="90s, 30m, 2h, 1d.  [default: 1h]"),
)  # fmt: skip
_action_on_one_or_many("unshelve", "Bring a shelved alarm back.")
_action("suppress", "Suppress an alarm by design, as a plant's logic would.")
_action("unsuppress", "End the suppression of an alarm.")
_action("out_of_service", "Take an alarm out of service, for maintenance.")
_action("return_to_service", "Bring an alarm back into service.")

commands: list[click.Command] = [alarms]
