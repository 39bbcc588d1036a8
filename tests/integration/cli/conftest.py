"""Says at the end what the documents print and no test has run."""

from typing import Any

from documented import NOT_RUN


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    if not any("test_documented_commands.py" in report.nodeid for report in reports):
        return
    terminalreporter.section("NOT RUN: commands in the documents", sep="=", yellow=True, bold=True)
    for (page, command), why in NOT_RUN.items():
        terminalreporter.line(f"{page}: {command} …: {why}", yellow=True)
