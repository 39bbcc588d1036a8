"""Which metrics an expression of PromQL uses, and whether they and their labels exist."""

import re
from typing import Final

from preservarium import metrics

#: What Prometheus' client and Prometheus itself add to ours.
STANDARD: Final = frozenset(
    {"up", "process_cpu_seconds_total", "process_start_time_seconds", "process_open_fds", "process_max_fds"}
)
#: Labels that Prometheus puts to every series.
TARGET_LABELS: Final = frozenset({"job", "instance"})
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
#: A name of a metric; recording rules have colons, and are declared beside the alerts.
_NAME: Final = re.compile(
    r"(?<![\w:])(preservarium_\w+|data_processing_\w+|process_\w+|up)\b(?:\s*\{(?P<labels>[^}]*)\})?"
)
_LABEL: Final = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_SUFFIXES: Final = ("_bucket", "_sum", "_count")


class UnknownMetric(ValueError):
    """An expression names a metric, or a label of one, that there is not."""


def used(expression: str) -> set[str]:
    """The metrics that an expression asks for, as the catalogue names them.

    Raises:
        UnknownMetric: it names one, or a label, that there is not.
    """
    found: set[str] = set()
    for match in _NAME.finditer(_STRING.sub('""', expression)):
        name, labels = match[1], set(_LABEL.findall(match["labels"] or ""))
        if name in STANDARD:
            found.add(name)
            continue
        base = next((name.removesuffix(s) for s in _SUFFIXES if name.endswith(s)), name)
        metric = metrics.CATALOGUE.get(name) or metrics.CATALOGUE.get(base)
        if metric is None or (metric.name != name and metric.kind != "histogram"):
            message = f"there is no metric {name}, in: {expression}"
            raise UnknownMetric(message)
        allowed = {*metric.labels, *TARGET_LABELS, *({"le"} if name.endswith("_bucket") else ())}
        if labels - allowed:
            message = f"{name} has no label {', '.join(sorted(labels - allowed))}, in: {expression}"
            raise UnknownMetric(message)
        found.add(metric.name)
    return found
