"""Commands that alarms ask for: what a rule may say, and the lines that a transition becomes."""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.commands.fields import NAME_CHARS_MAX, refuse
from preservarium.domain.commands.lines import CONTENTS, PRESETS, check_line
from preservarium.domain.readings.lineage import GENERATION_LIVE
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US

#: Commands that one rule asks for; more are a sequence, which a queue does better.
RULE_COMMANDS_MAX: Final = 20


def check_rule_commands(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `commands` of a rule: each with `on` (raised, cleared), `command` or content, and further fields of a request.

    `device_id` names another device than the alarm's.

    Raises:
        ValueError: the message names the field.
    """
    if not isinstance(value, list) or not all(isinstance(asked, dict) for asked in value):
        refuse("not a list of objects")
    if len(value) > RULE_COMMANDS_MAX:
        refuse(f"a rule may ask for {RULE_COMMANDS_MAX} commands")
    for number, asked in enumerate(value):
        if asked.get("on") not in ("raised", "cleared"):
            refuse(f"{number}.on: not one of raised, cleared")
        if unknown := asked.keys() - PRESETS - set(CONTENTS) - {"on", "command", "device_id"}:
            refuse(f"{number}: there is no {sorted(unknown)[0]!r:.100}")
        rest = {name: given for name, given in asked.items() if name != "on"}
        check_line({"device_id": "-", **rest}, None, TIMESTAMP_MAX_US, "-")
    return value


def alarm_requests(transition: Mapping[str, Any], commands: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of `device_commands` for an alarm's transition, by its rule's `commands`.

    The idempotency key is made of the transition, and `at` is the transition's own instant: what is read again is
    the same command, and what is read again long after is expired. Only live transitions ask for anything.
    """
    if transition["generation"] != GENERATION_LIVE:
        return []
    lines: list[dict[str, Any]] = []
    for number, asked in enumerate(commands):
        if asked["on"] != transition["transition"]:
            continue
        lines.append(
            {
                "kind": "request",
                "device_id": asked.get("device_id") or transition["device_id"],
                "at": transition["detected_at"],
                "actor": f"alarm {transition['rule']}"[:NAME_CHARS_MAX],
                "cause": transition["transition_id"],
                "idempotency_key": f"{transition['transition_id']}/{number}",
                **{k: v for k, v in asked.items() if k not in ("on", "device_id")},
            }
        )
    return lines
