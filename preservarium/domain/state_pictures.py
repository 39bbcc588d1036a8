"""State machines in the documentation, drawn from the tables that they run by: a Mermaid diagram and a table of every pair."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

#: State -> event -> the state after it, or why it is refused; both are StrEnums of different types.
Machine = Mapping[Any, Mapping[Any, Any]]


def diagram(
    machine: Machine, begin: str, *, drawn: Callable[[Any, Any, Any], bool] = lambda *_: True, over: Iterable[str] = ()
) -> str:
    """A Mermaid state diagram.

    Args:
        machine: the transition table.
        begin: what follows `[*] -->`: the first state, and its event where there is one.
        drawn: (state, event, state after it) -> whether it is drawn.
        over: states that nothing leaves, where the diagram is to say so.
    """
    lines = ["stateDiagram-v2", f"    [*] --> {begin}"]
    for state, row in machine.items():
        targets: dict[Any, list[Any]] = {}
        for event, target in row.items():
            if type(target) is type(state) and drawn(state, event, target):
                targets.setdefault(target, []).append(event)
        lines += [f"    {state} --> {target}: {', '.join(events)}" for target, events in targets.items()]
    lines += [f"    {state} --> [*]" for state in over]
    return "\n".join(lines) + "\n"


def page(title: str, introduction: Sequence[str], picture: str, machine: Machine, refusals: Iterable[StrEnum]) -> str:
    """A page of documentation: introduction, diagram, every state × event, and what the refusals say."""
    states = list(machine)
    table = ["| event | " + " | ".join(states) + " |", "|---" * (len(states) + 1) + "|"]
    for event in machine[states[0]]:
        found = [(state, machine[state][event]) for state in states]
        cells = [str(t) if type(t) is type(state) else f"– {t.name.lower()}" for state, t in found]
        table.append(f"| `{event}` | " + " | ".join(cells) + " |")
    parts = [
        [f"# {title}"],
        introduction,
        ["```mermaid", picture.rstrip(), "```"],
        ["## Every state, every event"],
        ["A dash: refused, with the reason."],
        table,
        ["## Reasons"],
        [f"- {refusal.name.lower()}: {refusal}" for refusal in refusals],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"
