"""What would calm an alarm, from stored readings: see `preservarium.domain.alarms.suggestion`."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

import asyncpg
import orjson

from preservarium.domain.alarms.rule import DeviceRules
from preservarium.domain.alarms.rules import compile_rules
from preservarium.domain.alarms.suggestion import Advice, advise
from preservarium.domain.registry.device import DeviceDoc, DeviceTypeDoc, RuleDoc
from preservarium.operations.backtest import Assembler, BacktestError, Documents, needs
from preservarium.stores import history
from preservarium.stores.registry import spelled

#: Messages of the device that are looked at, the newest ones: each candidate is played through all of them, which takes
#: some seconds in all, and they are held in memory, some 100 MB.
MESSAGES_MAX: Final = 100_000


class Suggested(NamedTuple):
    """Advice with what it is about."""

    advice: Advice
    rule: Mapping[str, Any]  #: with the device's overrides
    from_us: int  #: later than was asked where there were too many messages
    messages: int


async def suggest(
    connection: asyncpg.Connection,
    device_id: str,
    rule: str,
    *,
    from_us: int,
    to_us: int,
    messages_max: int = MESSAGES_MAX,
) -> Suggested:
    """Advise on the rule of the registry as the device has it.

    Raises:
        BacktestError: the device is not known, or the rule does not watch it.
    """
    if to_us <= from_us:
        message = "the time to look at is empty: --to is not after --from"
        raise BacktestError(message)
    documents = await Documents.load(connection)
    device_id = await spelled(connection, device_id)
    row = await connection.fetchrow("SELECT rev, doc FROM devices WHERE device_id = $1", device_id)
    if row is None:
        message = f"device {device_id} is not in the registry"
        raise BacktestError(message)
    device = cast(DeviceDoc, {**orjson.loads(row["doc"]), "rev": row["rev"]})
    device_type = documents.type(device["type"])
    live = compile_rules(device, device_type, documents.rule, documents.datatype)
    if rule not in live.by_name:
        problems = [problem for problem in live.problems if problem.startswith(f"rule {rule}:")]
        message = f"rule {rule} does not watch device {device_id}" + (f" ({problems[0]})" if problems else "")
        raise BacktestError(message)
    merged = {**cast(Any, documents.rule(rule)), **((device.get("rules") or {}).get(rule) or {}), "name": rule}

    def compiled(changed: Mapping[str, Any]) -> DeviceRules:
        alone = cast(DeviceDoc, {**device, "rules": {rule: {}}})
        of_type = cast(DeviceTypeDoc, {**device_type, "rules": []}) if device_type else None
        found = compile_rules(alone, of_type, {rule: cast(RuleDoc, changed)}.get, documents.datatype)
        if found.problems:
            raise ValueError(found.problems[0])
        return found

    types = sorted(needs(compiled(merged)))
    series = await history.series_of(connection, history.Piece(device_id, device_id, 0), types, [device_id])
    messages: list[dict[str, Any]] = []
    dropped = False

    def take(_device_id: str, message: dict[str, Any]) -> None:
        nonlocal dropped
        messages.append(message)
        if len(messages) >= 2 * messages_max:
            del messages[:-messages_max]
            dropped = True

    assembler = Assembler(series, take, readings_max=1)
    await history.read(connection, series, from_us, to_us, lambda rows: cast(None, assembler.take(rows)))
    assembler.finish()
    dropped = dropped or len(messages) > messages_max
    del messages[:-messages_max]
    begins = messages[0]["timestamp"] if dropped else from_us
    return Suggested(advise(messages, device_id, merged, compiled, to_us), merged, begins, len(messages))
