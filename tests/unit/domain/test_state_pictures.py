"""The pages about state machines: those that are in docs/ are those of the tables, and their diagrams leave nothing out."""

from pathlib import Path
from typing import Any

import pytest

from preservarium.domain.alarms import machine as alarms
from preservarium.domain.commands import machine as commands
from preservarium.domain.state_pictures import StatePage

DOCS = Path(__file__).parents[3] / "docs" / "reference"
PAGES = [pytest.param(machine, id=machine.PAGE.title) for machine in (alarms, commands)]


@pytest.mark.parametrize("machine", PAGES)
def test_the_page_is_that_of_the_table(machine: Any) -> None:
    page: StatePage = machine.PAGE
    path = DOCS / f"{page.title.lower().replace(' ', '_')}.md"
    assert page.module == machine.__name__
    assert path.read_text(encoding="utf-8") == page.text(), (
        f"write it anew: python -m {page.module} > docs/reference/{path.name}"
    )


@pytest.mark.parametrize("machine", PAGES)
def test_the_diagram_draws_every_change_of_state(machine: Any) -> None:
    lines = machine.PAGE.diagram().splitlines()
    drawn = [line.strip().partition(": ") for line in lines if " --> " in line and "[*]" not in line]
    edges = {tuple(edge.split(" --> ")): set(events.split(", ")) for edge, _, events in drawn}
    expected: dict[tuple[str, str], set[str]] = {}
    for state, row in machine.TRANSITIONS.items():
        for event, target in row.items():
            # An alarm's withdrawal leads to normal from everywhere, and what leaves it as it is is not drawn.
            hidden = machine is alarms and (event is alarms.Event.WITHDRAW or target is state)
            if isinstance(target, machine.State) and not hidden:
                expected.setdefault((state, target), set()).add(event)
    assert edges == expected


def test_a_diagram_begins_and_ends_where_the_machine_does() -> None:
    lines = commands.PAGE.diagram().splitlines()
    assert lines[1] == "    [*] --> queued: request"
    assert {line.split()[0] for line in lines if line.endswith("--> [*]")} == commands.OVER
    assert alarms.PAGE.diagram().splitlines()[1] == "    [*] --> normal"
    assert "--> [*]" not in alarms.PAGE.diagram()
