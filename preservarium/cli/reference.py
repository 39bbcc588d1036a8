"""The reference pages that are made from declarations: docs/reference/.

`python -m preservarium.cli.reference` writes them; a test keeps pages and declarations equal. The states of alarms and of
commands are drawn by their own modules (preservarium/domain/state_pictures.py).
"""

import importlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from preservarium import metrics, topics
from preservarium.errors import Fatal, ReasonCode, Reject, Retry
from preservarium.settings import LEGACY_NAMES, PREFIX, Settings, fields

if TYPE_CHECKING:
    from preservarium.streaming.app import App

_MEMBER: Final = re.compile(r'^\s+[A-Z0-9_]+ = "(?P<code>[a-z0-9_]+)"  #: (?P<meaning>.+)$', re.MULTILINE)
#: The comment lines of metrics.py that begin a group.
_GROUP: Final = re.compile(
    r"^# --- (?P<group>.+) ---$|^[A-Z0-9_]+ = _(?:counter|gauge|histogram)\(\s*\"(?P<name>\w+)\"", re.M
)
#: Stages that run only where a setting says so are in the documentation, too.
_SWITCHED_ON: Final = {f"{PREFIX}ANOMALY__ENABLED": "true"}


def error_codes() -> dict[str, str]:
    """Every reason code with its meaning, in the order of the list."""
    found = {m["code"]: m["meaning"] for m in _MEMBER.finditer(inspect.getsource(ReasonCode))}
    missing = [code.value for code in ReasonCode if code.value not in found]
    if missing:
        message = f"no meaning stands behind {', '.join(missing)} in errors.py"
        raise ValueError(message)
    return found


def errors_page() -> str:
    """docs/reference/errors.md."""
    lines = [
        "# Reason codes",
        "",
        "Why an input went to `iot_errors`. Made from `preservarium/errors.py`; do not edit it here.",
        "",
        *_table(("code", "meaning"), [(f"`{code}`", meaning) for code, meaning in error_codes().items()]),
        "",
        "A line of `iot_errors` also holds the stage, a message for people, the original line or bytes, its coordinates in",
        "Kafka and in `iot_raw_data`, the attempt, the parser and the configuration's revision: enough to mend the cause and",
        "send it again.",
        "",
        "## What the code raises",
        "",
        *_table(("class", "meaning"), [(f"`{c.__name__}`", _first_line(c)) for c in (Reject, Retry, Fatal)]),
        "",
        "Any other exception is a defect of ours: the batch is tried again, then bisected to the record that provokes it,",
        "which goes to `iot_errors` as `handler_failed`.",
    ]
    return _text(lines)


def metrics_page() -> str:
    """docs/reference/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Served at `/metrics` on every worker's web port. Made from `preservarium/metrics.py`; do not edit it here.",
        "All names end in their unit; counters end in `_total` and start at 0 when a worker starts.",
    ]
    by_name = dict(metrics.CATALOGUE)
    groups: dict[str, list[tuple[str, ...]]] = {}
    for match in _GROUP.finditer(inspect.getsource(metrics)):
        if match["group"]:
            rows = groups.setdefault(match["group"], [])
            continue
        metric = by_name.pop(f"{metrics.NAMESPACE}_{match['name']}")
        rows.append((f"`{metric.name}`", metric.kind, _names(metric.labels), metric.meaning))
    if by_name:
        message = f"not under a group in metrics.py: {', '.join(by_name)}"
        raise ValueError(message)
    for group, rows in groups.items():
        lines += ["", f"## {group.capitalize()}", "", *_table(("metric", "kind", "labels", "meaning"), rows)]
    return _text(lines)


def settings_page() -> str:
    """docs/reference/settings.md."""
    lines = [
        "# Settings",
        "",
        "Every setting with its default. Made from `preservarium/settings.py`; do not edit it here. How they are given is in",
        "[OPERATING.md](../OPERATING.md#settings); `preservarium config` prints the same as a file to copy. A setting with a",
        "mark under *reload* changes on SIGHUP, the others need a restart.",
    ]
    by_section: dict[str, list[tuple[str, ...]]] = {}
    for field in fields():
        default = f"`{field.default}`" if field.default else ""
        row = (f"`{field.variable}`", default, "✓" if field.reload else "", field.description)
        by_section.setdefault(field.section, []).append(row)
    for section, rows in by_section.items():
        what = _first_line(Settings.model_fields[section].annotation) if section else "The process."
        lines += ["", f"## {section or 'general'}", "", what, ""]
        lines += _table(("variable", "default", "reload", "meaning"), rows)
    lines += ["", "## Names of the sink that this replaces", "", "A `PRESERVARIUM_` name wins over them.", ""]
    of_old = [(f"`{n}`", f"`{PREFIX}{s.upper()}__{f.upper()}`") for n, (s, f) in LEGACY_NAMES.items()]
    return _text([*lines, *_table(("variable", "same as"), of_old)])


def stages_page(app: "App", agents: Mapping[str, Sequence[str]]) -> str:
    """docs/reference/stages.md, of an app whose `agents` have declared the stages that they are given with."""
    lines = [
        "# Stages",
        "",
        "What each stage reads, writes and remembers. Made from what the agents declare (`agents/`); do not edit it here. The app holds",
        "a stage to it: a worker ends rather than send to a topic, or put to a table, that its stage does not declare. Every",
        "stage may also write iot_errors. The group of a stage is `kafka.group`, with the suffix that is given here where it",
        "has one of its own.",
        "",
    ]
    rows = []
    for agent, stages in agents.items():
        for name in stages:
            stage = app.declared[name]
            writes = [w if isinstance(w, str) else w.name for w in stage.writes]
            group = f"own: `-{stage.group}`" if stage.group else "shared"
            state = f"`{stage.state}`" if stage.state else stage.remembers
            rows.append((name, f"`agents/{agent}.py`", stage.topic.name, ", ".join(writes) or "–", group, state or "–"))
    lines += _table(("stage", "file", "reads", "writes", "consumer group", "state"), rows)
    lines += [
        "",
        "## What they do",
        "",
        "In the words of the files and of their stages; a file without one declares a service.",
    ]
    for agent, stages in agents.items():
        lines += ["", f"`agents/{agent}.py`: {_joined(inspect.getdoc(sys.modules[f'agents.{agent}']))}", ""]
        said: dict[str, list[str]] = {}
        for name in stages:
            said.setdefault(app.agents[name].help, []).append(name)
        lines += [f"- {', '.join(names)}: {text}" for text, names in said.items()]
    return _text([line for line, before in zip(lines, ["", *lines], strict=False) if line or before])


def topics_page(app: "App") -> str:
    """docs/reference/topics.md, of an app whose agents have declared their stages."""
    lines = [
        "# Topics",
        "",
        "Every Kafka topic. Made from `preservarium/topics.py` and what the agents declare; do not edit it here. A prefix",
        "(`kafka.topic_prefix`), partitions, replication and compression are settings. Stages are named as in",
        "[stages.md](stages.md); others stand behind them in italics.",
        "",
    ]
    rows = []
    for topic in topics.TOPICS:
        writers = [name for name, stage in app.declared.items() if topic in stage.writes]
        if topic is topics.ERRORS:
            writers = ["every stage"]
        writers += [f"*{topic.writers}*"] if topic.writers else []
        readers = [name for name, stage in app.declared.items() if stage.topic is topic]
        readers += [f"*{topic.readers}*"] if topic.readers else []
        kept = "the newest of each key" if topic.compacted else _span(topic.retention_ms)
        rows.append(
            (f"`{topic.name}`", topic.key, topic.record, kept, ", ".join(writers) or "–", ", ".join(readers) or "–")
        )
    return _text([*lines, *_table(("topic", "key", "a value, or a line of it", "kept", "written by", "read by"), rows)])


def tables_page(app: "App") -> str:
    """docs/reference/tables.md, of an app whose agents have declared their tables."""
    lines = [
        "# State tables",
        "",
        "What stages remember, on RocksDB with a changelog. Made from what `tables/` declares and who declares it as its state; do not edit",
        "it here. Nobody else can write a table: the app refuses it.",
        "",
    ]
    rows = []
    for name, table in sorted(app.state_tables.items()):
        owners = [stage.name for stage in app.declared.values() if stage.state == name]
        rows.append((f"`{name}`", f"`tables/{name}.py`", table.key, table.table.help, ", ".join(owners)))
    return _text([*lines, *_table(("table", "file", "key", "holds", "written by"), rows)])


def declared_app() -> tuple["App", dict[str, list[str]]]:
    """The app with every agent, by the defaults and not by this machine's settings; and the stages of each agent.

    The app of a process is made once, so this is for a process that does nothing else.
    """
    for name in [name for name in os.environ if name.startswith(PREFIX) or name in LEGACY_NAMES]:
        del os.environ[name]
    os.environ.update(_SWITCHED_ON)
    with tempfile.TemporaryDirectory() as empty, chdir(empty):  # where no .env is
        from agents import AGENTS
        from preservarium.streaming.app import app

        stages: dict[str, list[str]] = {}
        for agent in AGENTS:
            before = set(app.declared)
            importlib.import_module(f"agents.{agent}")
            stages[agent] = [name for name in app.declared if name not in before]
    return app, stages


def _first_line(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


def _joined(text: str | None) -> str:
    return " ".join((text or "").split())


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _span(ms: int | None) -> str:
    assert ms is not None, "only a compacted topic is kept for ever"
    hours, rest = divmod(ms, topics.HOUR_MS)
    assert not rest, "a topic is kept for whole hours"
    days, rest = divmod(hours, 24)
    return f"{hours} h" if rest or days < 2 else f"{days} days"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, *rows]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return [body[0], "|" + "---|" * len(head), *body[1:]]


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


#: Pages that any process can make.
PAGES: Final[Mapping[str, Callable[[], str]]] = {
    "errors.md": errors_page,
    "metrics.md": metrics_page,
    "settings.md": settings_page,
}


def main(folder: str = "") -> None:
    """Write all pages into `folder`; by default docs/reference/ of the checkout."""
    target = Path(folder or Path(__file__).resolve().parents[2] / "docs" / "reference").absolute()
    app, agents = declared_app()
    made = {name: page() for name, page in PAGES.items()}
    made |= {"stages.md": stages_page(app, agents), "topics.md": topics_page(app), "tables.md": tables_page(app)}
    for name, text in made.items():
        (target / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
