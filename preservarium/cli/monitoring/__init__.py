"""What watches a system: alert rules, their tests, the runbook, dashboards and Prometheus' configuration, made from declarations.

| file | what |
|---|---|
| alerts.py | every alert: its condition, what it means, what to do, and the series by which its rule is tested |
| dashboards.py | every dashboard |
| names.py | holds each expression to the metrics that there are (preservarium/metrics.py) |
| write.py | the files |
| command.py | `preservarium monitoring` |

`python -m preservarium.cli.monitoring.write` writes `deploy/prometheus`, `deploy/grafana` and `docs/RUNBOOK.md` anew.
"""
