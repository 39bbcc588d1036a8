"""The console page in a real Chromium: it shows what the views say, escapes it, and works by keyboard and on a phone."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from devtools import LOW_CONTRAST

from preservarium import metrics
from preservarium.clock import SystemClock
from preservarium.console.operators import Operators
from preservarium.console.tables import TableReader
from preservarium.console.views import Console
from preservarium.console.workers import Workers
from preservarium.errors import Retry
from preservarium.operations.alarm_board import Board, Desk
from preservarium.settings import Web

pytestmark = pytest.mark.browser

EVIL = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'


class Reads:
    def __init__(self):
        self.down = False
        self.history = []

    async def devices(self, *, q, after, limit):
        if self.down:
            raise Retry("PostgreSQL: connection refused")
        now = time.time_ns() // 1000

        def device(n):
            name = EVIL if n == 3 else f"Greenhouse {n}"
            readings = [
                ("air-temperature", 21.4 + n, "°C", 1), ("air-humidity", 54.2, "%", 1), ("battery-voltage", 3.021, "V", 1),
                ("co2-concentration", 412 + n * 1000, "ppm", 3 if n == 1 else 1), ("pressure", 96812.0, "Pa", 4 if n == 2 else 1),
                ("soil-moisture", 0.233, "m³/m³", 1), ("leaf-wetness", None, "", 9), (EVIL, 1.0, EVIL, 1),
            ]  # fmt: skip
            return {
                "device_id": f"0018b200000{n:05}", "name": name, "type": "DL-AQ5", "enabled": True,
                "last_seen": now - n * 1_500_000,
                "values": [
                    {
                        "component_type": c, "pin_position": "-1", "value": v, "value_text": None, "unit": u,
                        "timestamp": now - n * 1_500_000, "quality": quality,
                    }
                    for c, v, u, quality in (readings if n % 2 else readings[:4 + n % 5])
                ],
            }  # fmt: skip

        found = [d for d in map(device, range(60)) if d["device_id"] > after and q in d["device_id"] + d["name"]]
        page = found[:limit]
        return {"devices": page, "next": page[-1]["device_id"] if len(found) > limit else None, "total": 60}

    async def standing(self, limit):
        return []

    async def alarms(self, *, active, before, limit, **wanted):
        return {"alarms": [], "next": None, "total": 0}

    async def alarm_history(self, *, device_id, rule, pin_position, limit):
        if self.down:
            raise Retry("PostgreSQL: connection refused")
        return [*self.history]


def alarm(n, **fields):
    now = time.time_ns() // 1000
    return {
        "alarm_id": f"a{n}", "device_id": f"0018b200000{n:05}", "device_name": f"Greenhouse {n}", "rule": "co2-high", "pin_position": "-1",
        "severity": "major", "state": "unacknowledged", "transition": "raised", "component_type": "co2", "occurred_at": now - n * 60_000_000,
        "detected_at": now - n * 60_000_000, "transition_at": now - n * 60_000_000, "cleared_at": None, "value": 4412.0, "threshold": 1500.0,
        "unit": "ppm", "message": "CO₂ 4412 ppm above 1500", "active": True, "shelved_until": None, "one_shot": False, "actor": None,
        "comment": None,
    } | fields  # fmt: skip


def stand(board, *alarms):
    for each in alarms:
        board.put((each["device_id"], each["rule"], each["pin_position"]), each)


@pytest.fixture
async def site():
    reads = Reads()
    report = {
        "problems": [],
        "kafka": {"state": "up", "detail": ""},
        "topics": [],
        "assignment": {"iot_raw_data": [0]},
        "recovering": False,
        "rebalancing": False,
        "stages": {},
    }
    resets = []
    guards = {
        "breakers": {
            "postgres": {"state": "open", "failures": 4, "reason": "OSError: connection refused", "tried_again_in_s": 12.5},
            "clickhouse": {"state": "closed", "failures": 0, "reason": "", "tried_again_in_s": 0.0},
        },
        "fuses": {
            "normalize": {"blown": False, "reason": "", "records": 900, "refused": 7, "refused_max": 500},
            "sink": {"blown": True, "reason": "store_rejected: 612 of 1000", "records": 1000, "refused": 612, "refused_max": 500},
        },
    }  # fmt: skip
    settings = SimpleNamespace(web=Web())
    host = SimpleNamespace(
        live=lambda: settings,
        clock=SystemClock(),
        health_report=lambda: report,
        guards=lambda: guards,
        reset_fuse=lambda stage: resets.append(stage) or True,
    )
    board = Board()
    board.ready.set()
    board.trouble = ""
    stand(
        board,
        alarm(3, device_name=EVIL, message=f"CO₂ 4412 ppm above 1500 {EVIL}"),
        alarm(9, severity="minor", message="battery low"),
    )
    sent = []

    async def publish(sends):
        sent.extend(sends)

    workers = Workers()
    console = Console(host, reads, TableReader(dict, lambda key: 0), workers)
    application = web.Application()
    console.mount(application)
    desk = Desk(board, publish, host.clock)
    Operators(host, desk, reads).mount(application)
    for stage, n in {"normalize": 900, "validate": 880, "alarm": 870, "notify": 2, "sink": 860, "sync": 850}.items():
        metrics.RECORDS_RECEIVED.labels(stage).inc(n)
        metrics.READINGS.labels(stage).inc(n * 5)
        metrics.LAG_RECORDS.labels(stage, "browser-test", "0").set(n // 10)
        metrics.PENDING_RECORDS.labels(stage).set(12)
    metrics.REFUSED.labels("normalize", "unknown_device").inc(7)
    metrics.CONNECTOR_MESSAGES.labels("http").inc(910)
    metrics.STORE_ROWS.labels("postgres", "stored").inc(4000)
    metrics.STORE_ROWS.labels("clickhouse", "stored").inc(4000)
    async with TestServer(application) as server:
        yield SimpleNamespace(
            url=str(server.make_url("/")),
            reads=reads,
            report=report,
            board=board,
            workers=workers,
            desk=desk,
            sent=sent,
            resets=resets,
            settings=settings,
        )
    for stage in ("normalize", "validate", "alarm", "notify", "sink", "sync"):
        metrics.LAG_RECORDS.labels(stage, "browser-test", "0").set(0)
        metrics.PENDING_RECORDS.labels(stage).set(0)


async def shot(page, name):
    """Keep a picture where PRESERVARIUM_SHOTS names a directory; always take it, so that drawing is tested."""
    directory = os.environ.get("SHOTS_DIR")
    path = Path(directory or os.devnull) / name if directory else Path(os.devnull)
    await page.screenshot(path)


async def test_the_page_shows_what_the_views_say(page, site):
    await page.size(1400, 1000)
    await page.scheme("light")
    await page.go(site.url)
    await page.until("document.querySelectorAll('#device-rows tr').length === 25")
    await page.until("document.getElementById('health').textContent === 'healthy'")
    metrics.RECORDS_RECEIVED.labels("normalize").inc(5000)
    metrics.READINGS.labels("normalize").inc(25000)
    await page.until("parseFloat(document.getElementById('fig-rate').textContent.replace(/,/g, '')) > 100")
    assert await page.js("document.getElementById('fig-devices').textContent") == "60"
    assert await page.js("document.getElementById('fig-alarms').textContent") == "2"
    flow = await page.js("document.getElementById('flow').innerText")
    for name in ("Connectors", "normalize", "validate", "alarm", "notify", "sink", "sync", "PostgreSQL", "ClickHouse"):
        assert name in flow
    assert "unknown_device" in await page.js("document.getElementById('error-rows').innerText")
    await shot(page, "light.png")
    await page.scheme("dark")
    await shot(page, "dark.png")
    assert page.logged == []


async def test_where_there_are_operators_the_overview_is_theirs(page, site):
    site.settings.web = Web(operators="ann:s3cret")
    await page.go(site.url)
    await page.until("!document.getElementById('login').hidden")
    assert await page.js("document.getElementById('health').innerText") == "for operators"
    assert await page.js("document.getElementById('banner').hidden")
    await page.js(
        "document.getElementById('l-token').value = 's3cret'; document.querySelector('#login button').click()"
    )
    await page.until(
        "document.getElementById('login').hidden && document.querySelectorAll('#device-rows tr').length > 5"
    )
    assert (
        await page.js("sessionStorage.getItem('operator-token') + localStorage.getItem('operator-token')")
        == "s3cretnull"
    )


async def test_names_and_messages_are_text_and_never_markup(page, site):
    await page.go(site.url)
    await page.until("document.getElementById('device-rows').innerText.includes('<img')")
    await page.until("document.getElementById('alarms').innerText.includes('<script>')")
    assert await page.js("document.querySelectorAll('img, #device-rows script, #alarms script').length") == 0
    assert await page.js("document.title") == "Preservarium"
    # Were something to slip through, the policy would still not run it.
    await page.js(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=`owned`'}))"
    )
    assert await page.js("document.title") == "Preservarium"
    assert any("Content Security Policy" in line for line in page.logged)


async def test_search_and_pages_work_by_keyboard(page, site):
    await page.go(site.url)
    await page.until("document.querySelectorAll('#device-rows tr').length === 25")
    await page.key("/", "/")
    assert await page.js("document.activeElement.id") == "search"
    for character in "00042":
        await page.key(character, character)
    await page.until("document.querySelectorAll('#device-rows tr').length === 1")
    assert "Greenhouse 42" in await page.js("document.getElementById('device-rows').innerText")
    await page.js("const s = document.getElementById('search'); s.value = ''; s.dispatchEvent(new Event('input'))")
    await page.until("document.querySelectorAll('#device-rows tr').length === 25")
    first = await page.js("document.querySelector('#device-rows tr').innerText")
    await page.until("!document.getElementById('next').disabled")
    await page.js("document.getElementById('next').focus(); document.activeElement.click()")
    await page.until("document.getElementById('page').textContent === 'page 2'")
    assert await page.js("document.querySelector('#device-rows tr').innerText") != first
    await page.js("document.getElementById('previous').click()")
    await page.until("document.getElementById('page').textContent === 'page 1'")
    # Everything that can be clicked can be reached.
    reached = set()
    await page.js("document.activeElement.blur()")
    for _ in range(12):
        await page.key("Tab")
        reached.add(await page.js("document.activeElement.id || document.activeElement.className"))
    assert {"skip", "theme", "search"} <= reached


async def test_a_phone_shows_everything_without_scrolling_sideways(page, site):
    await page.size(390, 844, mobile=True)
    await page.go(site.url)
    await page.until("document.querySelectorAll('#device-rows tr').length === 25")
    # Each box once: the flow's six stages and whatever else is counted (metrics are the process's, so also what other
    # tests ran), the connectors and the two stores.
    await page.until(
        "(async () => { const status = await (await fetch('/api/status')).json();"
        " const names = new Set(['normalize', 'validate', 'alarm', 'sink', 'sync', 'notify', ...status.stages.map(s => s.name)]);"
        " return document.querySelectorAll('.stage').length === names.size + 3; })()"
    )
    assert await page.js("document.documentElement.scrollWidth <= 390")
    await shot(page, "phone.png")
    assert page.logged == []


async def test_what_is_wrong_is_said(page, site):
    await page.go(site.url)
    await page.until("document.querySelectorAll('#device-rows tr').length === 25")
    site.reads.down = True
    await page.until("document.getElementById('devices-note').innerText.includes('does not answer')")
    site.report["problems"].append("sink: fuse blown: 600 of the last 1000 records refused")
    await page.until("document.getElementById('health').textContent === 'not healthy'")
    assert "fuse" in await page.js("document.getElementById('banner').innerText")
    await shot(page, "trouble.png")


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_text_stands_out_from_its_ground(page, site, theme):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text."""
    await page.scheme(theme)
    await page.go(site.url)
    await page.until("document.querySelectorAll('#device-rows tr').length === 25")
    low = await page.js(LOW_CONTRAST)
    assert low == []


async def test_breakers_and_fuses_show_and_a_blown_fuse_can_be_closed(page, site):
    await page.go(site.url)
    await page.until("document.querySelectorAll('#guards li').length === 4")
    shown = await page.js("document.getElementById('guards').innerText")
    for words in (
        "postgres breaker",
        "open",
        "tried again in 13 s",
        "connection refused",
        "sink fuse",
        "blown",
        "612 of the last 1,000",
    ):
        assert words in shown
    assert await page.js("document.querySelectorAll('#guards button').length") == 1
    await page.js("document.querySelector('#guards button').click()")
    await page.until("document.getElementById('guards-note').innerText === 'sink: the fuse is closed again.'")
    assert site.resets == ["sink"]
    assert page.logged == []


async def test_the_other_workers_show_with_their_age_and_one_that_is_gone_is_marked(page, site):
    def says(worker, heard_s_ago, breaker="closed", blown=False):
        guards = {
            "breakers": {"postgres": {"state": breaker, "failures": 3, "reason": EVIL if breaker != "closed" else "", "tried_again_in_s": 4.0}},
            "fuses": {"sink": {"blown": blown, "reason": "store_rejected", "records": 1000, "refused": 600 * blown, "refused_max": 500},
                      "alarm": {"blown": False, "reason": "", "records": 10, "refused": 0, "refused_max": 500}},
        }  # fmt: skip
        line = {"worker": worker, "console": "10.0.0.7:6066", "alive": not blown, "ready": not blown, "guards": guards,
                "reasons": ["sink: fuse blown"] if blown else []}  # fmt: skip
        site.workers.hear(orjson.dumps(line), time.time_ns() // 1000 - round(heard_s_ago * 1e6))

    await page.size(1400, 1000)
    await page.scheme("light")
    await page.go(site.url)
    await page.until("document.getElementById('workers-note').innerText.includes('not heard now: not read yet')")
    site.workers.trouble = ""
    await page.until("document.getElementById('workers-note').innerText === 'There are none.'")
    says("one:11", 1)
    says("two:22", 2, "open", blown=True)
    says("three:33", 600)
    await page.until("document.querySelectorAll('#workers article').length === 3")
    cards = await page.js("[...document.querySelectorAll('#workers article')].map(a => a.innerText)")
    assert ["gone" in card for card in cards] == [False, True, False]
    assert "said nothing for 10 min" in cards[1]
    assert "well" in cards[0]
    assert "console at 10.0.0.7:6066" in cards[0]
    for words in (
        "not healthy",
        "postgres breaker",
        "open",
        EVIL,
        "sink fuse",
        "blown",
        "600 of the last 1,000",
        "sink: fuse blown",
    ):
        assert words in cards[2]
    assert await page.js("document.querySelectorAll('#workers img, #workers script, #workers button').length") == 0
    await page.js("document.querySelector('#workers summary').focus()")
    await page.js("document.querySelector('#workers details').open = true")
    says("four:44", 0)
    await page.until("document.querySelectorAll('#workers article').length === 4")
    await page.until(
        "[...document.querySelectorAll('#workers article')].some(a => a.innerText.includes('one:11') && a.querySelector('details').open)"
    )
    await page.js("document.getElementById('workers').scrollIntoView()")
    await shot(page, "workers.png")
    assert page.logged == []
