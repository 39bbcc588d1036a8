"""The commands that README and docs print, and which of them a test can run."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))

#: Page and beginning of a command that is printed there and not run here -> why. Said at the end of each run of the tests.
NOT_RUN: Final = {
    ("docs/ALARM_ANALYSIS.md", "preservarium alarms backtest --rule calmer.yaml"): "its output is of four days of 120 devices, "
    "which no sample fleet has sent within a minute; tests/integration/operations/test_backtest.py runs the command",
    ("docs/ALARM_ANALYSIS.md", "preservarium alarms suggest --device dev00150"): "its output is of a device of those days",
    ("docs/EXTRACT.md", "preservarium extract check"): "needs the database of somebody else, from which tasks are taken; "
    "tests/integration/extract/test_cli.py has one",
    ("docs/EXTRACT.md", "preservarium extract status"): "likewise",
    ("docs/EXTRACT.md", "preservarium extract again"): "likewise",
    ("docs/REPLAY.md", "preservarium trace --device"): "its device and instant are examples; tests/integration/operations/test_lineage.py "
    "traces one",
    ("docs/OPERATING.md", "preservarium backup"): "needs a directory of its own, and empty servers for the restore; "
    "tests/integration/operations/test_backup.py has both",
}  # fmt: skip

#: What is typed where a command asks.
ANSWERS: Final = "y\n"

_FENCE: Final = re.compile(r"^\s*```(\w*)\s*$")
#: A prompt may stand before a command, and what it is for behind it.
_COMMAND: Final = re.compile(r"^\s*(?:\$ )?((?:preservarium|python examples/) ?.*?)(?:\s{3,}.*)?$")


@dataclass(frozen=True)
class Documented:
    """A command as it is printed."""

    page: str
    line: int
    text: str

    @property
    def reason(self) -> str:
        """Why it is not run; "" where it is."""
        found = [why for (page, begin), why in NOT_RUN.items() if page == self.page and self.text.startswith(begin)]
        return found[0] if found else ""

    @property
    def background(self) -> bool:
        """Whether it goes on beside the next ones."""
        return self.text.endswith("&")


def documented() -> list[Documented]:
    """All of them, page by page, from above."""
    found: list[Documented] = []
    for page in PAGES:
        inside = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            if _FENCE.match(line):
                inside = not inside
            elif inside and (command := _COMMAND.match(line)):
                found.append(Documented(page.relative_to(ROOT).as_posix(), number, command[1].strip()))
        assert not inside, f"{page}: a fence is not closed"
    return found
