"""Writes what watches a system: `deploy/prometheus`, `deploy/grafana` and `docs/RUNBOOK.md`, or the same for an operator's own directory.

`python -m preservarium.cli.monitoring.write` does the former; a test holds the files to it. `preservarium monitoring DIRECTORY` the latter.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from preservarium.cli.monitoring.alerts import ALERTS, RECORDED, SCRAPE_S, Alert, Series, check
from preservarium.cli.monitoring.dashboards import dashboards
from preservarium.cli.monitoring.names import used

ROOT: Final = Path(__file__).parents[3]
#: Where a runbook's sections are, when nothing else is said: beside the rules in a checkout.
RUNBOOK: Final = "docs/RUNBOOK.md"
JOB: Final = "preservarium"
_MADE: Final = (
    "Made by `python -m preservarium.cli.monitoring.write` from preservarium/cli/monitoring; do not edit it here.\n"
)
#: Distance of the samples in the rules' tests, and of the looks: a shorter one takes promtool minutes.
STEP_S: Final = 60
#: What grows in a test does so by what is declared in this time.
GROWTH_S: Final = 15
GROUPS: Final[Mapping[str, str]] = {
    "dependencies": "Servers",
    "workers": "Workers",
    "pipeline": "The way of the data",
    "latency": "Time",
    "stores": "Stores",
    "people": "People",
}


def _yaml(document: Any) -> str:
    yaml = YAML()
    yaml.width = 4_096
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(document, text)
    return f"# {_MADE}{text.getvalue()}"


def _labels(alert: Alert) -> dict[str, str]:
    return {"severity": alert.severity}


def _annotations(alert: Alert, runbook: str, summary: str) -> dict[str, str]:
    return {"summary": summary, "description": alert.means, "runbook_url": f"{runbook}#{alert.name.lower()}"}


def rules(runbook: str = RUNBOOK, job: str = JOB) -> str:
    """`rules.yml`: recording rules and alerts.

    Args:
        runbook: where docs/RUNBOOK.md is to be found, without the anchor.
        job: Prometheus' name of the workers' job.
    """
    check()
    groups: list[dict[str, Any]] = [
        {
            "name": "preservarium-recorded",
            "rules": [{"record": r.name, "expr": _of_job(r.expression, job)} for r in RECORDED],
        }
    ]
    groups += [
        {
            "name": f"preservarium-{group}",
            "rules": [
                {
                    "alert": alert.name,
                    "expr": _of_job(alert.expression, job),
                    "for": alert.hold,
                    "labels": _labels(alert),
                    "annotations": _annotations(alert, runbook, alert.summary),
                }
                for alert in ALERTS
                if alert.group == group
            ],
        }
        for group in GROUPS
    ]
    return _yaml({"groups": groups})


def _of_job(expression: str, job: str) -> str:
    return expression.replace(f'job="{JOB}"', f'job="{job}"')


def rules_test() -> str:
    """`rules_test.yml` for `promtool test rules`: each alert fires and resolves, and is silent before."""
    return _yaml(
        {
            "rule_files": ["rules.yml"],
            "evaluation_interval": f"{STEP_S}s",
            "tests": [_test(alert) for alert in ALERTS],
        }
    )


def _test(alert: Alert) -> dict[str, Any]:
    good, bad = alert.good_minutes * 60 // STEP_S, alert.bad_minutes * 60 // STEP_S
    # What looks back, a quarter of an hour as a rule, must have forgotten before it can have ended.
    after = good + 16 * 60 // STEP_S
    fires = (good + bad - 1) * STEP_S
    expected = {
        "exp_labels": {**_labels(alert), **dict(alert.labels)},
        "exp_annotations": _annotations(alert, RUNBOOK, alert.shown or alert.summary),
    }
    at = [(good - 1) * STEP_S, fires, (good + bad + after - 1) * STEP_S]
    return {
        "interval": f"{STEP_S}s",
        "name": alert.name,
        "input_series": [{"series": s.name, "values": _values(s, (good, bad, after))} for s in alert.test],
        "alert_rule_test": [
            {"eval_time": f"{when}s", "alertname": alert.name, "exp_alerts": [expected] if when == fires else []}
            for when in at
        ],
    }


def _values(series: Series, counts: tuple[int, int, int]) -> str:
    """The samples while all is well, while it is not, and afterwards, in promtool's notation (`a+bxn` are n + 1 samples)."""
    parts: list[str] = []
    at = 0.0
    for number, (declared, count) in enumerate(zip((series.good, series.bad, series.good), counts, strict=True)):
        if not series.grows:
            parts.append(f"{declared:g}+0x{count - 1}")
            continue
        each = declared * STEP_S / GROWTH_S
        if number == 2 and series.back:
            at = -each
        parts.append(
            f"{at + each:g}+{each:g}x{count - 1}" if at + each < 1e6 else f"{at + each:.3f}+{each:g}x{count - 1}"
        )
        at += each * count
    return " ".join(parts)


def prometheus(targets: Sequence[str] = (), job: str = JOB) -> str:
    """`prometheus.yml`: asks the workers every 10 s, and sends alerts to an Alertmanager.

    Args:
        targets: host:port of the workers' web ports; none: every address of the name `worker`, as compose.yaml has it.
        job: its name in Prometheus.
    """
    found: dict[str, Any] = (
        {"static_configs": [{"targets": list(targets)}]}
        if targets
        else {"dns_sd_configs": [{"names": ["worker"], "type": "A", "port": 6066, "refresh_interval": "15s"}]}
    )
    return _yaml(
        {
            "global": {
                "scrape_interval": f"{SCRAPE_S}s",
                "scrape_timeout": "8s",
                "evaluation_interval": f"{SCRAPE_S}s",
            },
            "rule_files": ["rules.yml"],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]},
            "scrape_configs": [{"job_name": job, **found}],
        }
    )


def alertmanager() -> str:
    """`alertmanager.yml` to begin with: critical ones at once, others gathered; the address of the receiver is to be filled in."""
    return _yaml(
        {
            "route": {
                "receiver": "operators",
                "group_by": ["alertname", "stage", "dependency"],
                "group_wait": "30s",
                "group_interval": "5m",
                "repeat_interval": "4h",
                "routes": [
                    {
                        "matchers": ['severity="critical"'],
                        "receiver": "operators",
                        "group_wait": "0s",
                        "repeat_interval": "1h",
                    },
                    {"matchers": ['severity="info"'], "receiver": "nobody"},
                ],
            },
            # What a server that is down brings with it need not be told besides.
            "inhibit_rules": [
                {
                    "source_matchers": ['alertname="DependencyDown"'],
                    "target_matchers": [
                        'alertname=~"BreakerOpen|StageBehind|SloBurnFast|ProcessingTimeExceeded|AlarmListOld"'
                    ],
                }
            ],
            "receivers": [
                {"name": "operators", "webhook_configs": [{"url": "http://localhost:9/set-your-receiver-here"}]},
                {"name": "nobody"},
            ],
        }
    )


def runbook() -> str:
    """docs/RUNBOOK.md: each alert, what it means, what to do."""
    lines = [
        "# Runbook",
        "",
        "What an alert means, and what to do. Made from `preservarium/cli/monitoring/alerts.py`; do not edit it here.",
        "",
        "Rules, dashboards and a Prometheus to begin with are in `deploy/prometheus` and `deploy/grafana`;"
        " `preservarium monitoring DIRECTORY` writes them with your own targets and links.",
        f"Prometheus asks every {SCRAPE_S} s and looks at the rules as often.",
        "**critical**: data waits, or people are not told, and somebody has to act. **warning**: it will become so, or a part suffers. **info**: for"
        " machines.",
        "",
        "| recorded | meaning |",
        "|---|---|",
        *(f"| `{r.name}` | {r.meaning} |" for r in RECORDED),
    ]
    for group, title in GROUPS.items():
        lines += ["", f"## {title}"]
        for alert in (a for a in ALERTS if a.group == group):
            lines += [
                "",
                f"### {alert.name}",
                "",
                f"**{alert.severity}**, once it has been so for {alert.hold}. {alert.means}",
                "",
                *(f"{number}. {step}" for number, step in enumerate(alert.do, 1)),
                "",
                f"Looks at {', '.join(f'`{name}`' for name in sorted(used(alert.expression))) or 'what is recorded above'}.",
            ]
    return "\n".join(lines) + "\n"


def grafana_provisioning() -> dict[str, str]:
    """Files by which Grafana finds Prometheus and the dashboards at its start."""
    return {
        "provisioning/datasources/prometheus.yml": _yaml(
            {
                "apiVersion": 1,
                "datasources": [
                    {
                        "name": "Prometheus",
                        "type": "prometheus",
                        "uid": "prometheus",
                        "access": "proxy",
                        "url": "http://prometheus:9090",
                        "isDefault": True,
                    }
                ],
            }
        ),
        "provisioning/dashboards/preservarium.yml": _yaml(
            {
                "apiVersion": 1,
                "providers": [
                    {
                        "name": "Preservarium",
                        "folder": "Preservarium",
                        "type": "file",
                        "options": {"path": "/var/lib/grafana/dashboards"},
                    }
                ],
            }
        ),
    }


def files(runbook_url: str = RUNBOOK, job: str = JOB, targets: Sequence[str] = ()) -> dict[str, str]:
    """Every file for Prometheus and Grafana by its path below `deploy/`."""
    made = {
        "prometheus/rules.yml": rules(runbook_url, job),
        "prometheus/prometheus.yml": prometheus(targets, job),
        "prometheus/alertmanager.yml": alertmanager(),
    }
    made |= {f"grafana/{name}": text for name, text in grafana_provisioning().items()}
    made |= {
        f"grafana/dashboards/{name}.json": json.dumps(board, indent=1, ensure_ascii=False) + "\n"
        for name, board in dashboards(job).items()
    }
    return made


def write(directory: Path, made: Mapping[str, str]) -> Iterable[Path]:
    """Write the files; gives each path that was written."""
    for name, text in made.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        yield path


if __name__ == "__main__":
    of_ours = {f"deploy/{name}": text for name, text in files().items()}
    of_ours |= {"deploy/prometheus/rules_test.yml": rules_test(), "docs/RUNBOOK.md": runbook()}
    for written in write(ROOT, of_ours):
        print(written.relative_to(ROOT))
