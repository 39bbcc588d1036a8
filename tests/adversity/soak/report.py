"""The tables of docs/RELIABILITY.md, made from the JSON of runs: `python -m soak.report RUN.json … [--into FILE]`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from soak.faults import KINDS

BEGIN: Final = "<!-- made by tests/adversity/soak/report.py -->"
END: Final = "<!-- end -->"

Run = dict[str, Any]


def tables(runs: Sequence[Run]) -> str:
    """Kinds of faults, what was found, and the runs."""
    return "\n\n".join(
        ("## Faults", _kinds(runs), "## What was found", _found(runs), "## The runs", _runs(runs), *_outages(runs))
    )  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _kinds(runs: Sequence[Run]) -> str:
    rows = []
    for kind in KINDS:
        faults = [fault for run in runs for fault in run["faults"] if fault["kind"] == kind.name]
        done = [fault for fault in faults if not fault["skipped"]]
        times = [
            fault["recovered_s"]
            for run in runs
            if run["options"]["alone"]
            for fault in run["faults"]
            if fault["kind"] == kind.name and fault["recovered_s"] is not None
        ]
        if done:
            took = (f"{median(times):.1f}", f"{max(times):.1f}") if times else ("–", "–")
            rows.append((f"**{kind.name}**: {kind.meaning}", f"{len(done):,}", *took))
    total = sum(not fault["skipped"] for run in runs for fault in run["faults"])
    rows.append(("all", f"{total:,}", "", ""))
    return _table(("fault", "injected", "alone: recovered after, s, median", "longest"), rows)


def _found(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run["result"]["verdicts"]))
    rows = []
    for name in names:
        verdicts = [run["result"]["verdicts"][name] for run in runs if name in run["result"]["verdicts"]]
        rows.append(
            (name, *(f"{sum(v[what] for v in verdicts):,}" for what in ("expected", "lost", "doubled", "wrong")))
        )
    return _table(("what", "expected", "lost", "doubled", "wrong"), rows)


def _runs(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        options, result = run["options"], run["result"]
        rss = max(run["watched"]["rss_bytes"].values(), default=0)
        done = sum(not fault["skipped"] for fault in run["faults"])
        rows.append(
            (
                options["seed"], ", ".join(options["only"]) or "all", f"{options['seconds'] / 60:g}", options["workers"],
                f"{options['rate']:g}", f"{done:,}", f"{result['produced']:,}", f"{rss / 2**20:.0f}",
                sum(len(deaths) for deaths in run["deaths"].values()),
                f"{result['mails_again']:,} of {result['mails']:,}", "yes" if result["good"] else "no",
            )
        )  # fmt: skip
    head = (
        "seed", "kinds", "minutes", "workers", "messages/s", "faults", "messages", "largest worker, MiB",
        "workers that ended by themselves", "mails sent again", "all well",
    )  # fmt: skip
    return _table(head, rows)


def _outages(runs: Sequence[Run]) -> Sequence[str]:
    """PostgreSQL down at a share of what the workers can do: of runs that measured that."""
    rows = []
    for run in (run for run in runs if run["options"]["share"]):
        for fault in run["faults"]:
            if fault["kind"] == "postgres down" and fault["recovered_s"]:
                took = fault["recovered_s"]
                rss = max(run["watched"]["rss_bytes"].values())
                rows.append(
                    (
                        f"{fault['for_s']:g}", run["options"]["workers"], f"{run['capacity']:,}", f"{run['rate']:,.0f}",
                        f"{took:.1f}", f"{(fault['for_s'] + took) / took:.1f} ×", f"{rss / 2**20:.0f}", f"{sum(run['rebalances']):.0f}",
                    )
                )  # fmt: skip
    if not rows:
        return ()
    head = (
        "PostgreSQL was down, s", "workers", "they can do, messages/s", "devices sent, messages/s", "caught up after, s",
        "stored meanwhile, by what came in", "largest worker, MiB", "rebalances",
    )  # fmt: skip
    return ("## PostgreSQL down under load", _table(head, rows))


def main() -> int:
    """Print the tables, or put them in their place."""
    parser = argparse.ArgumentParser(prog="soak.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="file with the marks between which the tables stand")
    given = parser.parse_args()
    made = tables([json.loads(path.read_text(encoding="utf-8")) for path in given.runs])
    if given.into is None:
        print(made)
        return 0
    text = given.into.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    given.into.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
