"""Every dashboard, for Grafana 10 and later: rows of panels, each an expression over the metrics that there are.

A datasource and an instance are chosen on the page; nothing names a server.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from preservarium.cli.monitoring.names import used

#: Grafana's schema of dashboards that these are written for.
SCHEMA_VERSION: Final = 39
#: A page has 24 columns.
WIDTH: Final = 24
HEIGHT: Final = 8


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture."""

    title: str
    queries: tuple[tuple[str, str], ...]  #: expression, legend
    unit: str = "short"  #: Grafana's name: s, bytes, percentunit, reqps, …
    says: str = ""  #: how to read it
    kind: str = "timeseries"  #: or stat, table
    width: int = 8
    limit: float | None = None  #: beyond it, it is red
    low: bool = False  #: below it, rather
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...] = field(default=())


_I: Final = 'instance=~"$instance"'


def _rate(metric: str, by: str, labels: str = "", *, over: str = "$__rate_interval") -> str:
    inside = ",".join(part for part in (_I, labels) if part)
    return f"sum by ({by}) (rate({metric}{{{inside}}}[{over}]))"


def _quantile(q: float, metric: str, by: str = "", labels: str = "") -> str:
    inside = ",".join(part for part in (_I, labels) if part)
    names = f"le, {by}" if by else "le"
    return f"histogram_quantile({q:g}, sum by ({names}) (rate({metric}_bucket{{{inside}}}[$__rate_interval])))"


def _max(metric: str, by: str, labels: str = "") -> str:
    inside = ",".join(part for part in (_I, labels) if part)
    return f"max by ({by}) ({metric}{{{inside}}})"


def _age(to: str) -> tuple[tuple[str, str], ...]:
    labels = f'to="{to}",since="receipt"'
    return tuple(
        (_quantile(q, "preservarium_end_to_end_seconds", labels=labels), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)
    )


BOARDS: Final[dict[str, tuple[str, str, tuple[Row, ...]]]] = {
    "overview": ("Overview", "Is it well, and does everything come through?", (
        Row("Now", (
            Panel("Workers there", (('sum(up{job="$job"})', "workers"),), kind="stat", width=4),
            Panel("Workers wanted", (("preservarium:workers_wanted", "wanted"),), kind="stat", width=4, says="By load and lag."),
            Panel("Readings a second", (('sum(rate(preservarium_readings_total{stage="validate"}[1m]))', "validated"),), kind="stat", width=4),
            Panel("Largest lag", (("max(preservarium_lag_seconds)", "lag"),), unit="s", kind="stat", width=4, limit=60),
            Panel("Dependencies down", (("count(min by (dependency) (preservarium_dependency_answers) == 0) or vector(0)", "down"),), kind="stat", width=4, limit=1),
            Panel("Alerts firing", (('count(ALERTS{alertstate="firing"}) or vector(0)', "alerts"),), kind="stat", width=4, limit=1),
        )),
        Row("Flow", (
            Panel("Readings", ((_rate("preservarium_readings_total", "stage"), "{{stage}}"),), unit="cps", width=12),
            Panel("Lag", ((_max("preservarium_lag_seconds", "stage"), "{{stage}}"),), unit="s", width=12, limit=60),
            Panel("From reception to PostgreSQL", _age("postgres"), unit="s"),
            Panel("From reception to ClickHouse", _age("clickhouse"), unit="s"),
            Panel("Refused, share of each stage", (("preservarium:refused:ratio_rate5m", "{{stage}}"),), unit="percentunit", limit=0.05),
        )),
        Row("What is wrong", (
            Panel("Alerts", (('ALERTS{alertstate="firing"}', "{{alertname}} {{stage}} {{dependency}}"),), kind="table", width=24),
        )),
    )),
    "stages": ("Stages", "Each stage: what it gets, how long a batch takes, how far it is behind.", (
        Row("Work", (
            Panel("Records received", ((_rate("preservarium_records_received_total", "stage"), "{{stage}}"),), unit="cps"),
            Panel("Records sent", ((_rate("preservarium_records_sent_total", "stage, topic"), "{{stage}} → {{topic}}"),), unit="cps"),
            Panel("Refused", ((_rate("preservarium_refused_total", "stage, code"), "{{stage}} {{code}}"),), unit="cps"),
            Panel("Batch, 95th percentile", ((_quantile(0.95, "preservarium_batch_seconds", "stage"), "{{stage}}"),), unit="s"),
            Panel("Busy lanes", ((_rate("preservarium_batch_seconds_sum", "stage"), "{{stage}}"),), says="Seconds of batches under way in each second: 3 are three partitions at work all the time."),
            Panel("Records a batch", ((f"{_rate('preservarium_records_received_total', 'stage')} / {_rate('preservarium_batch_seconds_count', 'stage')}", "{{stage}}"),), says="Near agents.records_max (or the sink's) batches are full: there is a backlog."),
        )),
        Row("Behind", (
            Panel("Lag, seconds", ((_max("preservarium_lag_seconds", "stage"), "{{stage}}"),), unit="s"),
            Panel("Lag, records", ((f"sum by (stage) (preservarium_lag_records{{{_I}}})", "{{stage}}"),)),
            Panel("Lag of retention", (("max by (stage) (preservarium_lag_seconds) / max by (stage) (preservarium_retention_seconds)", "{{stage}}"),), unit="percentunit", limit=0.5),
            Panel("Age of the watermark", ((_max("preservarium_watermark_age_seconds", "stage"), "{{stage}}"),), unit="s", says="Since the newest message was received that the stage has done with; grows while nothing comes."),
            Panel("Oldest uncommitted", ((_max("preservarium_commit_age_seconds", "stage"), "{{stage}}"),), unit="s", limit=120),
            Panel("Partitions paused", ((f"sum by (stage) (preservarium_partitions_paused{{{_I}}})", "{{stage}}"),)),
        )),
        Row("Ends", (
            Panel("From reception, 95th percentile", ((_quantile(0.95, "preservarium_end_to_end_seconds", "to", 'since="receipt"'), "{{to}}"),), unit="s", width=12),
            Panel("From the device's own time, 95th percentile", ((_quantile(0.95, "preservarium_end_to_end_seconds", "to", 'since="device"'), "{{to}}"),), unit="s", width=12, says="With what devices and networks hold back, and with wrong clocks."),
        )),
        Row("Troubles", (
            Panel("Retries", ((_rate("preservarium_batch_retries_total", "stage, kind"), "{{stage}} {{kind}}"),), unit="cps"),
            Panel("Sent twice, skipped", ((_rate("preservarium_duplicates_total", "stage"), "{{stage}}"),), unit="cps"),
            Panel("Rebalances", ((f"sum by (group) (increase(preservarium_rebalances_total{{{_I}}}[5m]))", "{{group}}"),)),
        )),
    )),
    "stores": ("Stores", "PostgreSQL, ClickHouse, dashboards and topics.", (
        Row("Writing", (
            Panel("Rows", ((_rate("preservarium_store_rows_total", "store, outcome"), "{{store}} {{outcome}}"),), unit="cps"),
            Panel("One write, 95th percentile", ((_quantile(0.95, "preservarium_store_seconds", "store"), "{{store}}"),), unit="s"),
            Panel("Breakers", ((_max("preservarium_breaker_state", "dependency"), "{{dependency}}"),), says="0 closed, 1 half-open, 2 open.", limit=2),
            Panel("Answers", (("min by (dependency) (preservarium_dependency_answers)", "{{dependency}}"),), limit=1, low=True),
            Panel("Connections of the pools", ((f"sum by (pool, state) (preservarium_pool_connections{{{_I}}})", "{{pool}} {{state}}"),)),
            Panel("Waiting for a connection", ((f"sum by (pool) (preservarium_pool_waiting{{{_I}}})", "{{pool}}"),)),
        )),
        Row("Upkeep", (
            Panel("Storage jobs that fail", (("max(preservarium_storage_jobs_failing)", "jobs"),), limit=1),
            Panel("Jobs that a worker ran", ((f"sum by (outcome) (increase(preservarium_storage_jobs_run_total{{{_I}}}[1h]))", "{{outcome}}"),)),
            Panel("Registry waits", (("max(preservarium_registry_outbox_rows)", "rows"),)),
        )),
        Row("Dashboards", (
            Panel("Queries, 95th percentile", ((_quantile(0.95, "preservarium_dashboard_seconds", "dashboard"), "{{dashboard}}"),), unit="s", limit=2),
            Panel("Answers by origin", ((_rate("preservarium_dashboard_answers_total", "origin"), "{{origin}}"),), unit="cps"),
            Panel("Kept answers", ((f"sum(preservarium_dashboard_cache_bytes{{{_I}}})", "bytes"),), unit="bytes"),
        )),
        Row("Topics", (
            Panel("Records written", (("sum by (topic) (rate(preservarium_topic_end_offsets[$__rate_interval]))", "{{topic}}"),), unit="cps", width=12),
            Panel("Partitions under replicated", (("max by (topic) (preservarium_under_replicated_partitions)", "{{topic}}"),), width=12, limit=1),
        )),
    )),
    "quality": ("Devices and quality", "What devices send, and what can be said of it.", (
        Row("In", (
            Panel("Messages taken", ((_rate("preservarium_connector_messages_total", "connector"), "{{connector}}"),), unit="cps"),
            Panel("Refused at the door", ((_rate("preservarium_connector_refused_total", "connector, reason"), "{{connector}} {{reason}}"),), unit="cps"),
            Panel("Connections lost", ((f"sum by (connector) (increase(preservarium_connector_reconnects_total{{{_I}}}[5m]))", "{{connector}}"),)),
        )),
        Row("Quality", (
            Panel("Refused by reason", ((_rate("preservarium_refused_total", "code"), "{{code}}"),), unit="cps", width=12),
            Panel("Sent twice by devices", ((f"sum(rate(preservarium_repeated_total{{{_I}}}[$__rate_interval]))", "messages"),), unit="cps", width=6),
            Panel("Without payload", ((f"sum(rate(preservarium_messages_without_payload_total{{{_I}}}[$__rate_interval]))", "messages"),), unit="cps", width=6),
            Panel("Anomalies", ((f"sum(increase(preservarium_anomalies_total{{{_I}}}[1h]))", "an hour"),)),
            Panel("Windows", ((_rate("preservarium_windows_total", "cause"), "{{cause}}"),), unit="cps"),
            Panel("Late readings", ((_rate("preservarium_aggregate_late_total", "outcome"), "{{outcome}}"),), unit="cps"),
        )),
        Row("Decoding", (
            Panel("Look-ups found in memory", ((_rate("preservarium_cache_total", "cache", 'outcome="hit"') + " / " + _rate("preservarium_cache_total", "cache"), "{{cache}}"),), unit="percentunit", limit=0.7, low=True),
            Panel("Scripts, 95th percentile of a round trip", ((_quantile(0.95, "preservarium_sandbox_seconds", "lane"), "{{lane}}"),), unit="s"),
            Panel("Faults of scripts", ((_rate("preservarium_script_faults_total", "code"), "{{code}}"),), unit="cps"),
        )),
    )),
    "alarms": ("Alarms", "How the alarm system does, in the measures of ISA-18.2.", (
        Row("Now", (
            Panel("Standing", (("max by (severity) (preservarium_alarms_standing)", "{{severity}}"),), stacked=True),
            Panel("Not acknowledged", (("max by (severity) (preservarium_alarms_waiting)", "{{severity}}"),), stacked=True),
            Panel("Chattering", (("max(preservarium_alarms_chattering)", "alarms"),), says="ISA-18.2: an alarm that comes and goes three times a minute; the aim is none."),
        )),
        Row("Load of operators", (
            Panel("Annunciations in 10 minutes", (("max by (recipient) (preservarium_alarms_recent)", "{{recipient}}"),), says="ISA-18.2: 1 is very likely acceptable, 2 the most that can be managed, above 10 a flood.", limit=10),
            Panel("Floods", (("max by (recipient) (preservarium_alarm_flood)", "{{recipient}}"),), limit=1),
            Panel("By severity, last hour", (("sum by (severity) (increase(preservarium_alarm_transitions_total{transition=\"raised\"}[1h]))", "{{severity}}"),), says="ISA-18.2 asks for some 5 % of the highest, 15 % of the middle, 80 % of the lowest priority."),
            Panel("Transitions", ((_rate("preservarium_alarm_transitions_total", "transition"), "{{transition}}"),), unit="cps"),
            Panel("Operators' actions", ((_rate("preservarium_alarm_actions_total", "action, outcome"), "{{action}} {{outcome}}"),), unit="cps"),
            Panel("Answer to an action, 95th percentile", ((_quantile(0.95, "preservarium_alarm_answer_seconds"), "p95"),), unit="s"),
        )),
        Row("Telling people", (
            Panel("Notices", ((_rate("preservarium_notices_total", "channel, outcome"), "{{channel}} {{outcome}}"),), unit="cps"),
            Panel("From the plan to the channel, 95th percentile", ((_quantile(0.95, "preservarium_notice_seconds", "channel"), "{{channel}}"),), unit="s"),
            Panel("From reception to the alarm, to the notice", ((_quantile(0.95, "preservarium_end_to_end_seconds", "to", 'to=~"alarm|notice",since="receipt"'), "{{to}}"),), unit="s", says="A notice has what rules, groups and escalations ask to wait for in it."),
            Panel("Commands", ((_rate("preservarium_command_events_total", "event"), "{{event}}"),), unit="cps"),
            Panel("Downlinks", ((_rate("preservarium_downlinks_total", "outcome"), "{{outcome}}"),), unit="cps"),
            Panel("Alarm list is of now", ((_max("preservarium_alarm_board_current", "instance"), "{{instance}}"),), limit=1, low=True),
        )),
    )),
    "resources": ("Resources", "What workers use of what they may use.", (
        Row("Workers", (
            Panel("Event loop, share of a core", ((f"rate(preservarium_loop_cpu_seconds_total{{{_I}}}[$__rate_interval])", "{{instance}}"),), unit="percentunit", limit=0.8, says="1 is all that one worker can do: start more well before."),
            Panel("CPU, cores", ((f'rate(process_cpu_seconds_total{{job="$job",{_I}}}[$__rate_interval])', "{{instance}}"),)),
            Panel("Event loop late, 99th percentile", ((_quantile(0.99, "preservarium_loop_delay_seconds", "instance"), "{{instance}}"),), unit="s"),
            Panel("Memory", ((f"preservarium_memory_bytes{{{_I}}}", "{{instance}}"), (f"preservarium_memory_limit_bytes{{{_I}}}", "limit {{instance}}")), unit="bytes"),
            Panel("Disk free", ((f"preservarium_disk_free_bytes{{{_I}}} / preservarium_disk_size_bytes{{{_I}}}", "{{instance}}"),), unit="percentunit", limit=0.1, low=True),
            Panel("Open files", ((f'process_open_fds{{job="$job",{_I}}} / process_max_fds{{job="$job",{_I}}}', "{{instance}}"),), unit="percentunit", limit=0.8),
            Panel("Disk", ((_rate("preservarium_io_bytes_total", "instance, direction"), "{{instance}} {{direction}}"),), unit="Bps"),
            Panel("Network", ((_rate("preservarium_network_bytes_total", "instance, direction"), "{{instance}} {{direction}}"),), unit="Bps"),
            Panel("Clock ahead of Kafka's", ((f"preservarium_clock_skew_seconds{{{_I}}}", "{{instance}}"),), unit="s"),
        )),
        Row("Scaling", (
            Panel("Share of the workers wanted", ((f"preservarium_workers_wanted{{{_I}}}", "{{instance}}"),), says="1: as busy as it should be."),
            Panel("Wanted and there", (("preservarium:workers_wanted", "wanted"), ('sum(up{job="$job"})', "there"))),
            Panel("Workers by what they say", (("max by (state) (preservarium_workers)", "{{state}}"),)),
        )),
        Row("Web ports", (
            Panel("Requests", ((_rate("preservarium_http_seconds_count", "route, code"), "{{route}} {{code}}"),), unit="reqps", width=12),
            Panel("Requests, 95th percentile", ((_quantile(0.95, "preservarium_http_seconds", "route"), "{{route}}"),), unit="s", width=12),
        )),
        Row("Versions", (Panel("Workers by version", ((f"sum by (version) (preservarium_build_info{{{_I}}})", "{{version}}"),), width=24),)),
    )),
    "slo": ("Service levels", "Stored in time: the share of batches that were in PostgreSQL within 10 s of their reception; the aim is 99 %.", (
        Row("Stored in time", (
            Panel("Last hour", (("preservarium:stored_in_time:ratio_rate1h", "in time"),), unit="percentunit", kind="stat", width=6, limit=0.99, low=True),
            Panel("Last 30 days", (("avg_over_time(preservarium:stored_in_time:ratio_rate5m[30d])", "in time"),), unit="percentunit", kind="stat", width=6, limit=0.99, low=True),
            Panel("Allowance left of 30 days", (("1 - (1 - avg_over_time(preservarium:stored_in_time:ratio_rate5m[30d])) / 0.01", "left"),), unit="percentunit", kind="stat", width=6, limit=0.2, low=True),
            Panel("Burn rate of an hour", (("(1 - preservarium:stored_in_time:ratio_rate1h) / 0.01", "times"),), kind="stat", width=6, limit=14.4),
            Panel("In time", (("preservarium:stored_in_time:ratio_rate5m", "5 minutes"), ("preservarium:stored_in_time:ratio_rate1h", "1 hour")), unit="percentunit", width=12),
            Panel("data_processing_latency_seconds", (
                (_quantile(0.5, "data_processing_latency_seconds"), "p50"),
                (_quantile(0.95, "data_processing_latency_seconds"), "p95"),
                (_quantile(0.99, "data_processing_latency_seconds"), "p99"),
            ), unit="s", width=12),
        )),
        Row("Nothing lost", (
            Panel("Records that Kafka deleted unread", ((f"sum by (stage) (increase(preservarium_records_skipped_total{{{_I}}}[1h]))", "{{stage}}"),), limit=1, width=12),
            Panel("Workers up", ((f'avg_over_time(up{{job="$job",{_I}}}[1h])', "{{instance}}"),), unit="percentunit", width=12),
        )),
    )),
}  # fmt: skip


def expressions() -> list[str]:
    """Every expression of every panel, with Grafana's own words in it."""
    return [
        query for _, _, rows in BOARDS.values() for row in rows for panel in row.panels for query, _ in panel.queries
    ]


def dashboards(job: str = "preservarium") -> dict[str, dict[str, Any]]:
    """The dashboards as Grafana takes them, by file name.

    Args:
        job: chosen where the page is opened.

    Raises:
        UnknownMetric: an expression names a metric or a label that there is not.
    """
    for expression in expressions():
        used(expression)
    return {name: _board(name, title, says, rows, job) for name, (title, says, rows) in BOARDS.items()}


def _board(name: str, title: str, says: str, rows: Sequence[Row], job: str) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": [],
             "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y}}
        )  # fmt: skip
        y += 1
        x = 0
        height = HEIGHT if any(p.kind != "stat" for p in row.panels) else 4
        for panel in row.panels:
            own = 4 if panel.kind == "stat" else height
            if x + panel.width > WIDTH:
                x, y = 0, y + height
            panels.append(_panel(len(panels) + 1, panel, {"h": own, "w": panel.width, "x": x, "y": y}))
            x += panel.width
        y += height
    return {
        "uid": f"preservarium-{name}",
        "title": f"Preservarium: {title}",
        "description": says,
        "tags": ["preservarium"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,
        "links": [
            {"type": "dashboards", "tags": ["preservarium"], "title": "Preservarium", "asDropdown": True, "icon": "external link",
             "includeVars": True, "keepTime": True, "targetBlank": False, "tooltip": "", "url": ""}
        ],
        "annotations": {"list": []},
        "templating": {"list": [
            {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus", "hide": 0},
            {"name": "job", "type": "constant", "query": job, "hide": 2,
             "current": {"selected": False, "text": job, "value": job}},
            {"name": "instance", "type": "query", "label": "Worker", "hide": 0, "includeAll": True, "multi": True, "allValue": ".*",
             "datasource": {"type": "prometheus", "uid": "${datasource}"}, "refresh": 2, "sort": 1,
             "query": "label_values(preservarium_build_info, instance)",
             "current": {"selected": True, "text": ["All"], "value": ["$__all"]}},
        ]},
        "panels": panels,
    }  # fmt: skip


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    steps: list[dict[str, Any]] = [{"color": "red" if panel.low else "green", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "green" if panel.low else "red", "value": panel.limit})
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.says,
        "gridPos": place,
        "datasource": source,
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": query, "legendFormat": legend,
             "instant": panel.kind != "timeseries", "range": panel.kind == "timeseries", "format": "table" if panel.kind == "table" else "time_series",
             "exemplar": "_bucket" in query and panel.kind == "timeseries"}
            for i, (query, legend) in enumerate(panel.queries)
        ],
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}},
            "overrides": [],
        },
    }  # fmt: skip
    defaults = made["fieldConfig"]["defaults"]
    if panel.unit == "s" and "Clock" in panel.title:
        del defaults["min"]
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "fillOpacity": 20 if panel.stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.limit is None else "line"},
        }
        if panel.limit is None:
            defaults["thresholds"]["steps"] = [{"color": "green", "value": None}]
        made["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        made["options"] = {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "textMode": "auto",
            "orientation": "auto",
        }
    return made
