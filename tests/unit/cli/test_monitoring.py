"""Rules and dashboards: made from declarations, about metrics that there are, and each rule fires and resolves."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from preservarium.__main__ import cli
from preservarium.cli.monitoring import write
from preservarium.cli.monitoring.alerts import ALERTS, check
from preservarium.cli.monitoring.dashboards import BOARDS, WIDTH, dashboards, expressions
from preservarium.cli.monitoring.names import UnknownMetric, used

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("missing: promtool (Debian: apt install prometheus)")
    return found


def said(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_files_are_those_of_the_declarations() -> None:
    wanted = {f"deploy/{name}": text for name, text in write.files().items()}
    wanted |= {"deploy/prometheus/rules_test.yml": write.rules_test(), "docs/RUNBOOK.md": write.runbook()}
    for name, text in wanted.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, (
            f"{name}: run `python -m preservarium.cli.monitoring.write` and commit what it writes"
        )
    there = {
        path.relative_to(DEPLOY).as_posix()
        for room in ("prometheus", "grafana")
        for path in (DEPLOY / room).rglob("*.*")
    }
    assert there == {name.removeprefix("deploy/") for name in wanted if name.startswith("deploy/")}


def test_each_rule_fires_and_resolves_and_is_silent_before(promtool: str) -> None:
    said(promtool, "test", "rules", "rules_test.yml", cwd=DEPLOY / "prometheus")


def test_prometheus_takes_its_configuration(promtool: str) -> None:
    said(promtool, "check", "config", "prometheus.yml", cwd=DEPLOY / "prometheus")


def test_alertmanager_takes_its_configuration() -> None:
    amtool = shutil.which("amtool")
    if amtool is None:
        pytest.skip("missing: amtool (Debian: apt install prometheus-alertmanager)")
    said(amtool, "check-config", "alertmanager.yml", cwd=DEPLOY / "prometheus")


def test_a_rule_that_never_fires_is_found_out(promtool: str, tmp_path: Path) -> None:
    """The tests would not be worth much if promtool let a wrong rule pass."""
    (tmp_path / "rules.yml").write_text(
        write.rules().replace("preservarium_fuse_blown) == 1", "preservarium_fuse_blown) == 7")
    )
    document = YAML(typ="safe").load(write.rules_test())
    document["tests"] = [test for test in document["tests"] if test["name"] == "FuseBlown"]
    (tmp_path / "rules_test.yml").write_text(json.dumps(document))
    done = subprocess.run(
        [promtool, "test", "rules", "rules_test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "FuseBlown" in done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: a.name)
def test_an_alert_says_what_it_means_and_what_to_do(alert: Any) -> None:
    assert alert.do
    assert alert.means.endswith(".")
    assert f"### {alert.name}\n" in write.runbook()
    named = set(re.findall(r"\$labels\.(\w+)", alert.summary))
    assert named <= {name for name, _ in alert.labels}, "the summary names labels that the alert has not"
    assert alert.hold == "0s" or alert.hold[-1] in "sm"


def test_a_dependency_that_is_frozen_is_told_of_within_a_minute() -> None:
    from preservarium.cli.monitoring.alerts import SCRAPE_S
    from preservarium.streaming import kafka_watch, probing

    down = next(alert for alert in ALERTS if alert.name == "DependencyDown")
    for ours in (probing, kafka_watch):
        assert ours.ASK_S + ours.ANSWER_S + SCRAPE_S + 2 * SCRAPE_S + int(down.hold.removesuffix("s")) <= 60


def test_names_are_held_to_the_catalogue() -> None:
    assert used('sum by (stage) (rate(preservarium_refused_total{code="a{b}c",instance=~"x"}[5m]))') == {
        "preservarium_refused_total"
    }
    assert used('histogram_quantile(0.9, rate(preservarium_batch_seconds_bucket{le="1.0"}[5m]))') == {
        "preservarium_batch_seconds"
    }
    for wrong in (
        "preservarium_not_there > 0",
        "rate(preservarium_records_received_total_bucket[5m])",
        "preservarium_lag_seconds_count",
        'preservarium_lag_seconds{device="x"}',
        'data_processing_latency_seconds_bucket{stage="x"}',
    ):
        with pytest.raises(UnknownMetric):
            used(wrong)
    assert len(check()) > 25


# --- dashboards ---


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_places_of_their_own(name: str) -> None:
    panels = dashboards()[name]["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({board["uid"] for board in dashboards().values()}) == len(BOARDS)


def test_prometheus_takes_every_expression_of_every_panel(promtool: str, tmp_path: Path) -> None:
    chosen = {"$__rate_interval": "1m", "$instance": ".*", "$job": "preservarium"}
    rules = []
    for number, expression in enumerate(expressions()):
        for word, value in chosen.items():
            expression = expression.replace(word, value)
        assert "$" not in expression
        rules.append({"record": f"panel:{number}", "expr": expression})
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    said(promtool, "check", "rules", "panels.yml", cwd=tmp_path)


@pytest.mark.parametrize("name", BOARDS)
def test_grafana_takes_the_dashboard(name: str) -> None:
    """Grafana's own model of its dashboards takes it in and gives back all that it was given."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    board = dashboards()[name]
    back = json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(json.dumps(board)))))
    assert lost(board, back) == []


def lost(given: Any, back: Any, at: str = "") -> list[str]:
    """Where what came back lacks what was given."""
    if isinstance(given, dict):
        if not isinstance(back, dict):
            return [at]
        return [
            one
            for key, value in given.items()
            for one in (lost(value, back.get(key), f"{at}.{key}") if value not in (None, [], {}, "", False) else [])
        ]
    if isinstance(given, list):
        if not isinstance(back, list) or len(back) != len(given):
            return [at]
        return [one for i, (a, b) in enumerate(zip(given, back, strict=True)) for one in lost(a, b, f"{at}[{i}]")]
    return [] if given == back else [at]


# --- the command ---


def test_an_operator_writes_files_with_own_targets_and_links(tmp_path: Path) -> None:
    arguments = [
        "monitoring", str(tmp_path / "m"), "--target", "10.0.0.1:6066", "--target", "w2.example:6066", "--job", "iot",
        "--runbook-url", "https://wiki.example/runbook", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.output)["files"]) == len(write.files())
    configuration = YAML(typ="safe").load((tmp_path / "m/prometheus/prometheus.yml").read_text())
    assert configuration["scrape_configs"] == [
        {"job_name": "iot", "static_configs": [{"targets": ["10.0.0.1:6066", "w2.example:6066"]}]}
    ]
    rules = (tmp_path / "m/prometheus/rules.yml").read_text()
    assert 'job="preservarium"' not in rules
    assert "https://wiki.example/runbook#dependencydown" in rules
    assert CliRunner().invoke(cli, arguments).exit_code == 1  # nothing is overwritten unasked
    assert CliRunner().invoke(cli, [*arguments, "--force"]).exit_code == 0


@pytest.mark.parametrize(
    "wrong", [["--target", "nowhere"], ["--target", "a b:1"], ["--job", 'x"}'], ["--target", "x:1\n- y:2"]]
)
def test_what_would_break_the_files_is_refused(tmp_path: Path, wrong: list[str]) -> None:
    done = CliRunner().invoke(cli, ["monitoring", str(tmp_path), *wrong])
    assert done.exit_code == 2
    assert list(tmp_path.iterdir()) == []
