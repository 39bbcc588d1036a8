"""The reference pages that are made from the code: docs/metrics.md and docs/errors.md.

`python -m preservarium.reference` writes them; a test keeps pages and code equal.
"""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from preservarium import metrics
from preservarium.domain.errors import Fatal, ReasonCode, Reject, Retry

_MEMBER: Final = re.compile(r'^\s+[A-Z0-9_]+ = "(?P<code>[a-z0-9_]+)"  #: (?P<meaning>.+)$', re.MULTILINE)
#: The comment lines of metrics.py that begin a group.
_GROUP: Final = re.compile(
    r"^# --- (?P<group>.+) ---$|^[A-Z0-9_]+ = _(?:counter|gauge|histogram)\(\s*\"(?P<name>\w+)\"", re.M
)


def error_codes() -> dict[str, str]:
    """Every reason code with its meaning, in the order of the list."""
    found = {m["code"]: m["meaning"] for m in _MEMBER.finditer(inspect.getsource(ReasonCode))}
    missing = [code.value for code in ReasonCode if code.value not in found]
    if missing:
        message = f"no meaning stands behind {', '.join(missing)} in domain/errors.py"
        raise ValueError(message)
    return found


def errors_page() -> str:
    """docs/errors.md."""
    lines = [
        "# Reason codes",
        "",
        "Why an input went to `iot_errors`. Made from `preservarium/domain/errors.py`; do not edit it here.",
        "",
        "| code | meaning |",
        "|---|---|",
        *(f"| `{code}` | {_cell(meaning)} |" for code, meaning in error_codes().items()),
        "",
        "A line of `iot_errors` also holds the stage, a message for people, the original line or bytes, its coordinates in",
        "Kafka and in `iot_raw_data`, the attempt, the parser and the configuration's revision: enough to mend the cause and",
        "send it again.",
        "",
        "## What the code raises",
        "",
        "| class | meaning |",
        "|---|---|",
        *(f"| `{c.__name__}` | {_cell((c.__doc__ or '').strip().splitlines()[0])} |" for c in (Reject, Retry, Fatal)),
        "",
        "Any other exception is a defect of ours: the batch is tried again, then bisected to the record that provokes it,",
        "which goes to `iot_errors` as `handler_failed`.",
    ]
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics` on every worker's web port. Made from `preservarium/metrics.py`; do not edit it here.",
        "All names end in their unit; counters end in `_total` and start at 0 when a worker starts.",
    ]
    by_name = dict(metrics.CATALOGUE)
    for match in _GROUP.finditer(inspect.getsource(metrics)):
        if match["group"]:
            lines += [
                "",
                f"## {match['group'].capitalize()}",
                "",
                "| metric | kind | labels | meaning |",
                "|---|---|---|---|",
            ]
            continue
        metric = by_name.pop(f"{metrics.NAMESPACE}_{match['name']}")
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {_cell(metric.meaning)} |")
    if by_name:
        message = f"not under a group in metrics.py: {', '.join(by_name)}"
        raise ValueError(message)
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES: Final[dict[str, Callable[[], str]]] = {"metrics.md": metrics_page, "errors.md": errors_page}


def main() -> None:
    """Write the pages into docs/ of the checkout."""
    docs = Path(__file__).resolve().parent.parent / "docs"
    for name, page in PAGES.items():
        (docs / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
