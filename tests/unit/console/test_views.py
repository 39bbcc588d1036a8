"""The console's views over a host that is made here: limits, cursors, access, health, and no trust in what is shown."""

import asyncio
import base64
import re
from types import SimpleNamespace

import orjson
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from console_support import body
from pydantic import SecretStr

from preservarium import metrics
from preservarium.breaker import Breaker
from preservarium.clock import ManualClock
from preservarium.console import health, samples
from preservarium.console.devices import DeviceViews
from preservarium.console.operators import Operators
from preservarium.console.replies import LIMIT_MAX
from preservarium.console.tables import TableReader
from preservarium.console.views import Console
from preservarium.errors import Retry
from preservarium.operations.alarm_board import Board, Desk
from preservarium.settings import Breaker as BreakerSettings
from preservarium.settings import Web

EVIL = "<img src=x onerror=alert(1)>"


class Reads:
    """A database of 450 devices; `down` makes it unreachable."""

    def __init__(self):
        self.down = False
        self.ids = [f"dev-{n:04}" for n in range(450)]

    async def devices(self, *, q, after, limit, **wanted):
        if self.down:
            raise Retry("PostgreSQL: refused")
        self.wanted = wanted
        found = [i for i in self.ids if (after is None or i > after[1]) and q in i]
        page = [
            {"device_id": i, "name": EVIL, "type": "t", "enabled": True, "last_seen": 1, "values": []}
            for i in found[:limit]
        ]
        last = page[-1]["device_id"] if len(found) > limit else None
        return {"devices": page, "next": last and (last, last), "total": len(self.ids), "refreshed_at": 5}

    async def alarms(self, *, active, before, limit, **wanted):
        if self.down:
            raise Retry("PostgreSQL: refused")
        self.asked, self.wanted = (active, before, limit), wanted
        return {"alarms": [], "next": (17, "a17"), "total": 0}

    async def standing(self, limit):
        if self.down:
            raise Retry("PostgreSQL: refused")
        return []

    async def alarm_history(self, *, device_id, rule, pin_position, limit):
        if self.down:
            raise Retry("PostgreSQL: refused")
        return []


class Table:
    def __init__(self, content):
        self.content = content

    def partitions(self):
        return sorted(self.content)

    def peek(self, partition, key):
        return self.content[partition].get(key)

    def peek_items(self, partition):
        return iter(sorted(self.content[partition].items()))


class Host:
    def __init__(self, token=""):
        self.clock = ManualClock()
        self.settings = SimpleNamespace(web=Web(operator_token=SecretStr(token)))
        self.report = report_of()
        self.sent, self.resets = [], []

    async def publish(self, sends):
        self.sent += sends

    def live(self):
        return self.settings

    def health_report(self):
        return self.report

    def reset_fuse(self, stage):
        self.resets.append(stage)
        return stage == "sink"

    def guards(self):
        return {"breakers": {}, "fuses": {"sink": {"blown": False}}}


@pytest.fixture
def reads():
    return Reads()


@pytest.fixture
def host():
    return Host()


@pytest.fixture
async def client(host, reads):
    tables = {
        "device_configs": Table(
            {
                0: {b"a1": orjson.dumps({"device_id": "a1", "name": "Aa", "type": "t", "enabled": True})},
                1: {b"b1": b"\xff\x00", b"b2": b"x" * 100_000, b"B3-D5-7E-D0-AA-01": b"7"},
            }
        )
    }
    reader = TableReader(lambda: tables, lambda key: {b"a"[0]: 0, b"b"[0]: 1, b"B"[0]: 1}.get(key[0], 2))
    console = Console(host, reader)
    application = web.Application()
    console.mount(application)
    DeviceViews(host, reads, reader).mount(application)
    Operators(host, Desk(Board(), host.publish, host.clock), reads).mount(application)

    # As Faust does: it too adds a view for `/`, after ours.
    async def faust(request):
        return web.Response(text="faust")

    application.router.add_get("/", faust)
    # The sampling task would advance the manual clock for ever.
    application.cleanup_ctx.clear()
    async with TestClient(TestServer(application)) as client:
        client.console = console
        yield client


async def test_a_body_that_does_not_come_whole_is_the_senders_fault(client):
    head = b"POST /api/alarms/actions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with structlog.testing.capture_logs() as logs:
        chunks = await asyncio.open_connection(client.host, client.port)
        chunks[1].write(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n")
        assert b" 400 " in await chunks[0].readline()
        torn = await asyncio.open_connection(client.host, client.port)
        torn[1].write(head + b"Content-Length: 100\r\n\r\n{")
        await asyncio.sleep(0.05)  # the handler waits for the rest by then
        for _, writer in (chunks, torn):
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(0.05)
    assert logs == []


async def test_the_page_is_ours_and_loads_nothing_from_elsewhere(client):
    for path, content_type in {
        "/": "text/html",
        "/console/console.css": "text/css",
        "/console/console.js": "text/javascript",
        "/console/common.js": "text/javascript",
        "/devices": "text/html",
        "/console/devices.js": "text/javascript",
        "/devices/any%2Fone": "text/html",
        "/console/device.js": "text/javascript",
        "/console/plots.js": "text/javascript",
        "/refusals": "text/html",
        "/console/refusals.js": "text/javascript",
        "/alarms": "text/html",
        "/console/alarms.js": "text/javascript",
    }.items():
        response = await client.get(path)
        text = await response.text()
        assert response.content_type == content_type
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        outside = re.findall(r"(?:https?:)?//[a-z][\w.]+", text.replace("http://www.w3.org/2000/svg", ""))
        assert outside == []
        assert "innerHTML" not in text
        assert "eval(" not in text
        # The policy forbids inline script and style, so there must be none to forbid.
        assert not re.search(r"<script(?! src)|<style|\son\w+=|\sstyle=", text) or path.endswith(".js")


async def test_devices_are_paged_by_cursor_without_gap_or_repeat(client, reads):
    seen, cursor = [], None
    while True:
        page = await body(client, "/api/devices", params={"limit": "100"} | ({"cursor": cursor} if cursor else {}))
        seen += [d["device_id"] for d in page["devices"]]
        if (cursor := page["next_cursor"]) is None:
            break
    assert seen == reads.ids
    assert page["total"] == 450


async def test_no_list_is_longer_than_the_limit(client):
    page = await body(client, "/api/devices?limit=999999")
    assert len(page["devices"]) == LIMIT_MAX


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=-1", "limit=x", "limit=1e3", "limit=" + "9" * 50, "cursor=%00", "cursor=abc", "cursor=" + "A" * 5000,
        "cursor=" + base64.urlsafe_b64encode(b"[1]").decode(), "cursor=" + base64.urlsafe_b64encode(b"{}").decode(),
        "q=" + "x" * 300, "q=a%00b",
    ],
)  # fmt: skip
async def test_a_bad_question_is_refused_with_a_reason(client, query):
    assert (await body(client, f"/api/devices?{query}", 400))["error"]


async def test_names_are_returned_as_data_never_as_html(client):
    response = await client.get("/api/devices?limit=1")
    assert response.content_type == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert (await response.json())["devices"][0]["name"] == EVIL


async def test_without_the_database_devices_come_from_the_table(client, reads):
    reads.down = True
    page = await body(client, "/api/devices")
    assert [d["device_id"] for d in page["devices"]] == ["a1"]
    assert page["source"] == "table"
    assert "does not answer" in page["note"]
    assert (await body(client, "/api/alarms", 503))["error"].startswith("not available now")


async def test_past_alarms_pass_state_and_cursor_on(client, reads):
    page = await body(client, "/api/alarms?state=cleared")
    assert reads.asked[0] is False
    await body(client, "/api/alarms?state=all&device=d%2F1&rule=r&severity=major,critical&q=x")
    assert reads.wanted == {"device_id": "d/1", "rule": "r", "severities": ["critical", "major"], "q": "x"}
    await body(client, f"/api/alarms?state=all&limit=7&cursor={page['next_cursor']}")
    assert reads.asked == (None, (17, "a17"), 7)
    await body(client, "/api/alarms?state=maybe", 400)
    await body(client, f"/api/alarms?state=all&cursor={base64.urlsafe_b64encode(b'[true, 5]').decode()}", 400)


async def test_status_shows_rates_lag_and_errors_by_stage(client, host):
    stage = "normalize"
    before = samples.read(0.0).stages.get(stage, samples.StageSample())
    refused = metrics.REFUSED.labels(stage, "unknown_device")
    refused_before = refused._value.get()  # counters are the process's: other tests count, too
    client.console.sample()
    metrics.RECORDS_RECEIVED.labels(stage).inc(500)
    metrics.READINGS.labels(stage).inc(2000)
    refused.inc(5)
    metrics.LAG_RECORDS.labels(stage, "iot_raw_data", "3").set(42)
    host.clock.advance(5)
    client.console.sample()
    status = await body(client, "/api/status")
    shown = next(s for s in status["stages"] if s["name"] == stage)
    assert shown["received_total"] == int(before.received) + 500
    assert shown["received_per_s"] == 100.0
    assert status["readings_per_s"] == 400.0
    assert shown["errors_per_s"] == 1.0
    assert shown["lag"] >= 42
    assert status["arriving_per_s"] >= 100.0  # what was read, and what waits
    assert status["errors"][0] == {"stage": stage, "code": "unknown_device", "recent": 5, "total": refused_before + 5}
    assert (await body(client, "/api/errors"))["errors"] == status["errors"]
    metrics.LAG_RECORDS.labels(stage, "iot_raw_data", "3").set(0)


async def test_metrics_are_those_of_the_catalogue(client):
    response = await client.get("/metrics")
    text = await response.text()
    assert response.headers["Content-Type"].startswith("text/plain")
    assert "preservarium_records_received_total" in text
    openmetrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert (await openmetrics.text()).endswith("# EOF\n")


async def test_unexpected_errors_tell_the_caller_nothing(client, reads, monkeypatch):
    async def broken(**_):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(reads, "devices", broken)
    said = await body(client, "/api/devices", 500)
    assert (said["error"], said["status"]) == ("internal error", 500)
    assert "secret" not in str(said)


# --- tables ---


async def test_tables_are_shown_to_loopback_when_no_token_is_set(client):
    assert (await body(client, "/api/tables"))["tables"] == [{"name": "device_configs", "partitions": [0, 1]}]
    found = await body(client, "/api/tables/device_configs/a1")
    assert found["value"]["name"] == "Aa"
    assert (await body(client, "/api/tables/device_configs/b1"))["value"] == "�\x00"
    cut = await body(client, "/api/tables/device_configs/b2")
    assert cut["cut"] is True
    assert cut["bytes"] == 100_000
    assert len(cut["value"]) == 65_536
    # A device is found by any spelling of its address, where this worker has it.
    for spelled in ("b3:d5:7e:d0:aa:01", "B3D57ED0AA01", "b3d57ed0aa01"):
        found = await body(client, f"/api/tables/device_configs/{spelled}")
        assert (found["key"], found["value"]) == ("B3-D5-7E-D0-AA-01", 7)
    assert "no such key" in (await body(client, "/api/tables/device_configs/a9", 404))["error"]
    assert "another worker" in (await body(client, "/api/tables/device_configs/c1", 404))["error"]
    assert "device_configs" in (await body(client, "/api/tables/nope/a1", 404))["error"]


async def test_table_pages_have_no_gap(client):
    first = await body(client, "/api/tables/device_configs?limit=2")
    assert [e["key"] for e in first["entries"]] == ["a1", "B3-D5-7E-D0-AA-01"]
    second = await body(client, f"/api/tables/device_configs?limit=2&cursor={first['next_cursor']}")
    assert [e["key"] for e in second["entries"]] == ["b1", "b2"]
    assert second["next_cursor"] is None


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"X-Forwarded-For": "10.0.0.9"},
        {"Forwarded": "for=1"},
    ],
)
async def test_loopback_means_this_machine_and_not_a_proxy_or_a_rebound_name(client, headers):
    await body(client, "/api/tables", 403, headers=headers)


@pytest.mark.parametrize("path", ["/api/tables", "/api/tables/device_configs", "/api/tables/device_configs/a1"])
async def test_a_token_is_asked_for_where_one_is_set(client, host, path):
    host.settings.web = Web(operator_token=SecretStr("s3cret-ü"))
    await body(client, path, 401)
    await body(client, path, 401, headers={"Authorization": "Bearer wrong"})
    await body(client, path, 401, headers={"Authorization": "Basic s3cret"})
    await body(client, path, 401, headers={"Authorization": "Bearer "})
    assert "name" in str(await body(client, path, headers={"Authorization": "Bearer s3cret-ü"}))


# --- health ---


def report_of(*problems, assignment=None, recovering=False, rebalancing=False, kafka="up", topics=(), **stages):
    empty = {"pending": 0, "lag": 0, "stalled_s": 0.0, "paused": {}, "fuse": {"blown": False, "reason": ""}}
    return {
        "kafka": {"state": kafka, "detail": "no answer in time" if kafka == "down" else ""},
        "topics": [*topics],
        "problems": [*problems],
        "assignment": {"iot_raw_data": [0]} if assignment is None else assignment,
        "recovering": recovering,
        "rebalancing": rebalancing,
        "stages": {name: {**empty, **stage} for name, stage in stages.items()},
    }


@pytest.mark.parametrize(
    ("stage", "alive", "ready"),
    [
        ({}, True, True),
        ({"stalled_s": 500.0, "pending": 5}, False, False),
        ({"stalled_s": 500.0, "pending": 5, "paused": {3: "refused"}}, True, False),  # a restart mends no database
        ({"stalled_s": 50.0, "lag": 50_000}, True, True),
        ({"trouble": "KafkaError"}, True, False),  # its consumer is made anew by itself
    ],
)
def test_health_of_a_stage(stage, alive, ready):
    h = health.judge(report_of(sink=stage), [])
    assert (h.alive, h.ready) == (alive, ready)
    assert bool(h.reasons) is not (alive and ready)


@pytest.mark.parametrize(
    ("report", "alive"),
    [
        (report_of("sink: fuse blown: 600 of 1000 refused"), False),
        (report_of(assignment={}), True),
        (report_of(recovering=True), True),
        (report_of(rebalancing=True), True),
        (report_of(kafka="down"), True),
        (report_of(kafka="down", sink={"stalled_s": 500.0, "pending": 5}), True),  # for want of Kafka
        (report_of(topics=["iot_raw_data has 16 partitions, and 12 are declared"]), True),
    ],
)
def test_a_worker_that_cannot_work_is_not_ready_and_dead_only_where_a_restart_helps(report, alive):
    h = health.judge(report, [])
    assert (h.alive, h.ready) == (alive, False)


def test_a_database_that_is_down_makes_a_worker_not_ready_but_not_dead():
    h = health.judge(report_of(), [health.Dependency("postgres", "down", "refused")])
    assert (h.alive, h.ready) == (True, False)
    assert h.reasons == ["postgres is down"]


def test_kafka_is_named_where_it_does_not_answer():
    h = health.judge(report_of(kafka="down"), [])
    assert h.reasons == ["kafka is down"]
    assert h.dependencies == [health.Dependency("kafka", "down", "no answer in time")]
    assert health.judge(report_of(kafka="unknown"), []).ready, "not asked yet"
    assert health.judge(report_of(assignment={}), []).dependencies[0].state == "trying"


async def test_a_breaker_is_down_while_it_is_open_or_its_probe_hears_nothing(monkeypatch):
    monkeypatch.setattr("preservarium.breaker._registered", {})
    clock = ManualClock()
    down = Breaker("pg-test", lambda: BreakerSettings(failures_max=1, open_s=5.0), clock=clock, server="pg")

    def state():
        (need,) = health.dependencies()
        return need.state, need.detail

    assert state() == ("up", "")
    with pytest.raises(OSError, match="refused"):
        async with down:
            raise OSError("refused")
    assert state() == ("down", "refused")
    clock.advance(10)
    assert state()[0] == "trying", "nobody has tried since, which says nothing against it"
    async with down:
        pass
    assert state() == ("up", "")
    down.silence = "no answer in time"
    assert state() == ("down", "no answer in time")


def test_a_worker_is_ready_without_what_is_optional():
    assert health.judge(report_of(), [health.Dependency("plots", "down", "slow", optional=True)]).ready


async def test_health_and_ready_answer_503_with_reasons(client, host):
    assert (await body(client, "/health"))["alive"] is True
    assert (await body(client, "/ready"))["ready"] is True
    host.report = report_of("validate: fuse blown: too much is refused")
    for path in ("/health", "/ready"):
        assert "fuse blown" in (await body(client, path, 503))["reasons"][0]


# --- samples ---


def test_rates_are_over_the_last_seconds_and_never_negative():
    history = samples.History()
    for second in range(100):
        history.add(
            samples.Sample(float(second), {"s": samples.StageSample(received=second * 10.0)}, {}, {}, {}, {}, {})
        )
    assert history.rates("s")["received"] == 10.0
    assert history.curve("s") == [10.0] * samples.HISTORY_POINTS
    history.add(samples.Sample(100.0, {"s": samples.StageSample(received=0)}, {}, {}, {}, {}, {}))
    assert history.rates("s")["received"] == 0.0
    with pytest.raises(ValueError, match="order of time"):
        history.add(samples.Sample(5.0, {}, {}, {}, {}, {}, {}))


def test_history_is_bounded():
    history = samples.History()
    for second in range(samples.SAMPLES_MAX + 50):
        history.add(samples.Sample(float(second), {}, {}, {}, {}, {}, {}))
    assert history.span_s == samples.SAMPLES_MAX - 1


async def test_operators_close_a_fuse_again_and_strangers_do_not(client, host):
    async def reset(stage, status, **kwargs):
        response = await client.post(f"/api/fuses/{stage}/reset", **kwargs)
        assert response.status == status, await response.text()

    await reset("sink", 415, data=b"{}")
    await reset("sink", 403, json={}, headers={"Origin": "http://evil.example"})
    host.settings.web = Web(operators="ann:t1")
    await reset("sink", 401, json={})
    assert host.resets == []
    await reset("sink", 200, json={}, headers={"Authorization": "Bearer t1"})
    await reset("none", 404, json={}, headers={"Authorization": "Bearer t1"})
    assert host.resets == ["sink", "none"]
