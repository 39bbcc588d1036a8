"""State machines in the documentation, drawn from the tables that they run by: a Mermaid diagram and a table of every pair."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

#: State -> event -> the state after it, or why it is refused; both are StrEnums of different types.
Machine = Mapping[Any, Mapping[Any, Any]]


@dataclass(frozen=True, slots=True)
class StatePage:
    """A page of documentation about a state machine. `python -m` of its module prints it."""

    title: str
    module: str  #: that has the table
    introduction: Sequence[str]  #: lines
    machine: Machine
    refusals: Iterable[StrEnum]
    begin: str  #: what follows `[*] -->`: the first state, and its event where there is one
    #: (state, event, state after it) -> whether the diagram has it
    drawn: Callable[[Any, Any, Any], bool] = lambda *_: True
    over: Sequence[str] = ()  #: states that nothing leaves, where the diagram is to say so

    def diagram(self) -> str:
        """The table as a Mermaid state diagram."""
        lines = ["stateDiagram-v2", f"    [*] --> {self.begin}"]
        for state, row in self.machine.items():
            targets: dict[Any, list[Any]] = {}
            for event, target in row.items():
                if type(target) is type(state) and self.drawn(state, event, target):
                    targets.setdefault(target, []).append(event)
            lines += [f"    {state} --> {target}: {', '.join(events)}" for target, events in targets.items()]
        lines += [f"    {state} --> [*]" for state in self.over]
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        """The page: introduction, diagram, every state × event, and what the refusals say."""
        states = list(self.machine)
        table = ["| event | " + " | ".join(states) + " |", "|---" * (len(states) + 1) + "|"]
        for event in self.machine[states[0]]:
            found = [(state, self.machine[state][event]) for state in states]
            cells = [str(t) if type(t) is type(state) else f"– {t.name.lower()}" for state, t in found]
            table.append(f"| `{event}` | " + " | ".join(cells) + " |")
        source = f"`{self.module.replace('.', '/')}.py` by `python -m {self.module}`"
        parts = [
            [f"# {self.title}"],
            [f"Generated from {source}; a test keeps both equal.", *self.introduction],
            ["```mermaid", self.diagram().rstrip(), "```"],
            ["## Every state, every event"],
            ["A dash: refused, with the reason."],
            table,
            ["## Reasons"],
            [f"- {refusal.name.lower()}: {refusal}" for refusal in self.refusals],
        ]
        return "\n\n".join("\n".join(part) for part in parts) + "\n"
