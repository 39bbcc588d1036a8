"""The console page in a real Chromium: it shows what the views say, escapes it, and works by keyboard and on a phone."""

import base64
import math
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
from preservarium.console.commands import Commands
from preservarium.console.devices import DeviceViews
from preservarium.console.operators import Operators
from preservarium.console.refusals import RefusalViews
from preservarium.console.tables import TableReader
from preservarium.console.views import Console
from preservarium.console.workers import Workers
from preservarium.errors import Retry
from preservarium.operations.alarm_board import Board, Desk
from preservarium.operations.command_desk import CommandDesk
from preservarium.operations.refusals import Refusals
from preservarium.settings import Web

pytestmark = pytest.mark.browser

EVIL = '<img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'


def values(n):
    now = time.time_ns() // 1000
    readings = [
        ("air-temperature", 21.4 + n, "°C", 1), ("air-humidity", 54.2, "%", 1), ("battery-voltage", 3.021, "V", 1),
        ("co2-concentration", 412 + n * 1000, "ppm", 3 if n == 1 else 1), ("pressure", 96812.0, "Pa", 4 if n == 2 else 1),
        ("soil-moisture", 0.233, "m³/m³", 1), ("leaf-wetness", None, "", 9), (EVIL, 1.0, EVIL, 1),
    ]  # fmt: skip
    return [
        {
            "series_id": n * 10 + i, "component_type": c, "pin_position": "-1", "value": v, "value_text": None, "unit": u,
            "timestamp": now - n * 1_500_000, "quality": quality,
        }
        for i, (c, v, u, quality) in enumerate(readings if n % 2 else readings[: 4 + n % 5])
    ]  # fmt: skip


class Reads:
    """A database of sixty devices, with curves as they were asked for."""

    def __init__(self):
        self.down = False
        self.empty = False
        self.history = []
        self.asked = []

    def _up(self):
        if self.down:
            raise Retry("PostgreSQL: connection refused")

    def _devices(self):
        now = time.time_ns() // 1000

        def device(n):
            return {
                "device_id": f"0018b200000{n:05}", "name": EVIL if n == 3 else f"Greenhouse {n}", "type": "DL-AQ5" if n % 2 else "DL-SM3",
                "enabled": n != 9, "last_seen": None if n == 8 else now - n * 1_500_000 - (n == 7) * 7_200_000_000, "values": [] if n == 8 else values(n),
            }  # fmt: skip

        return [] if self.empty else [device(n) for n in range(60)]

    async def devices(self, *, q, state, type_name, sort, descending, after, limit):
        self._up()
        self.asked.append({"q": q, "state": state, "type": type_name, "sort": sort, "descending": descending})
        found = [
            d
            for d in self._devices()
            if q.lower() in (d["device_id"] + d["name"] + d["type"]).lower() and type_name in ("", d["type"])
        ]
        found = [d for d in found if not state or (d["last_seen"] is None) == (state == "never")]
        found.sort(key=lambda d: d["last_seen"] or 0 if sort == "seen" else d["device_id"], reverse=descending)
        first = 0 if after is None else 1 + next(i for i, d in enumerate(found) if d["device_id"] == after[1])
        page = found[first : first + limit]
        following = (page[-1]["device_id"], page[-1]["device_id"]) if len(found) > first + limit else None
        return {"devices": page, "next": following, "total": len(found), "refreshed_at": time.time_ns() // 1000}

    async def fleet(self):
        self._up()
        states = (
            {"sending": 54, "failing": 1, "silent": 3, "never": 1, "off": 1}
            if not self.empty
            else dict.fromkeys(("sending", "failing", "silent", "never", "off"), 0)
        )
        return {"devices": sum(states.values()), "states": states, "types": [{"type": t, "devices": 30} for t in ("DL-AQ5", "DL-SM3") if not self.empty],
                "silent_after_s": 3600, "refreshed_at": time.time_ns() // 1000}  # fmt: skip

    async def device(self, device_id):
        self._up()
        found = next((d for d in self._devices() if d["device_id"] == device_id), None)
        if found is None:
            return None
        datatype = {
            "kind": "number",
            "unit": "°C",
            "fail_span": {"min": -40, "max": 85},
            "suspect_span": {"min": None, "max": 45},
            "tests": {"spike": {}},
        }
        series = [
            {
                **v,
                "device_id": device_id,
                "connector_mode": "HTTP",
                "circular": None,
                "received_at": v["timestamp"],
                "datatype": datatype,
            }
            for v in found["values"]
        ]
        if series:
            series.append(
                {
                    **series[0],
                    "series_id": 999,
                    "component_type": "wind-direction",
                    "unit": "°",
                    "circular": 360.0,
                    "value": 355.0,
                    "datatype": {"kind": "number"},
                }
            )
            series.append(
                {
                    **series[0],
                    "series_id": 998,
                    "component_type": "mode",
                    "unit": "",
                    "value": None,
                    "value_text": "auto",
                    "datatype": {"kind": "text"},
                }
            )
        return {
            "device_id": device_id, "registered": True, "name": found["name"], "enabled": True, "type": found["type"], "manufacturer": "Decentlab", "description": None,
            "parser": "dl-aq5@3", "parser_kind": "table", "meta": {"area": EVIL}, "rev": 7, "updated_at": 1_760_000_000_000_000, "updated_by": "ann",
            "last_seen": found["last_seen"], "series": series,
            "rules": [{"name": "hot", "component_type": "air-temperature", "severity": "major", "enabled": True, "kind": "high", "threshold": 30.0,
                       "deadband": None, "message": None, "pin_position": None}] if series else [],
        }  # fmt: skip

    async def curves(self, device_id, *, series, from_us, to_us, points, now_us):
        self._up()
        self.asked.append({"series": series, "from": from_us, "to": to_us, "points": points})
        wide = to_us - from_us > 7 * 86_400_000_000
        curves = []
        for v in (await self.device(device_id))["series"]:
            if v["series_id"] not in series:
                continue
            step = (to_us - from_us) // 120
            at = [from_us + i * step for i in range(120) if not 40 <= i < 55]
            mean = [
                (350 + i * 3) % 360 if v["circular"] else 20 + v["series_id"] % 7 + 5 * math.sin(i / 9)
                for i in range(len(at))
            ]
            curves.append({
                **{name: v[name] for name in ("series_id", "component_type", "pin_position", "unit", "circular")}, "connector_mode": "HTTP",
                "level": "1h" if wide else "raw", "width_us": 3_600_000_000 if wide else 0, "gap_us": 4 * step, "at": at, "mean": mean,
                "min": [m - 2 for m in mean] if wide and not v["circular"] else None, "max": [m + 2 for m in mean] if wide and not v["circular"] else None,
                "n": [60] * len(at) if wide else None, "quality": None if wide else [3 if i == 20 else 4 if i == 70 else 1 for i in range(len(at))],
            })  # fmt: skip
        band = {"alarm_id": "a", "rule": "hot", "component_type": "air-temperature", "pin_position": "-1", "severity": "major", "state": "acknowledged",
                "occurred_at": to_us - (to_us - from_us) // 4, "cleared_at": None, "threshold": 30.0, "message": "hot"}  # fmt: skip
        return {"series": curves, "alarms": [band]}

    async def readings(self, device_id, *, series, from_us, before, limit):
        self._up()
        now = time.time_ns() // 1000
        found = [
            {**v, "timestamp": now - i * 60_000_000, "received_at": now - i * 60_000_000 + 900_000, "connector_mode": "HTTP", "topic": "", "flags": ["spike"] if i == 1 else None,
             "quality": 3 if i == 1 else 1, "raw_partition": 3, "raw_offset": 1_000 - i, "raw_index": 0, "generation": 0, "revised": False, "parser": "dl-aq5@3", "config_rev": 7}
            for i, v in enumerate(values(1) * 4)
        ]  # fmt: skip
        start = 0 if before is None else before[1]
        return {
            "readings": found[start : start + limit],
            "next": (1, start + limit) if len(found) > start + limit else None,
        }

    async def export(self, device_id, *, series, from_us, to_us):
        yield (await self.readings(device_id, series=series, from_us=from_us, before=None, limit=10))["readings"]

    async def commands(self, *, device_id, states, before, limit):
        return {"commands": [], "next": None}

    async def standing(self, limit):
        return []

    async def alarms(self, *, active, before, limit, **wanted):
        return {"alarms": [], "next": None, "total": 0}

    async def alarm_history(self, *, device_id, rule, pin_position, limit):
        self._up()
        return [*self.history]


def refused(offset, ago_s, **line):
    now = time.time_ns() // 1000
    at = now - round(ago_s * 1e6)
    line = {"stage": "normalize", "code": "decode_failed", "message": f"byte 3: no such channel {EVIL}", "device_id": "0018b20000000001", "topic": "iot_raw_data",
            "partition": 0, "offset": offset, "index": 0, "raw_partition": 0, "raw_offset": offset, "raw_index": 0, "attempt": 1, "first_seen": at, "last_seen": at,
            "parser": "dl-aq5@3", **line}  # fmt: skip
    return SimpleNamespace(partition=0, offset=offset, timestamp=at // 1000, value=orjson.dumps(line))


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
    tables = TableReader(dict, lambda key: 0)
    refusals = Refusals()
    refusals.take([
        *(refused(n, 60 * n, raw_b64=base64.b64encode(bytes([1, 2, 255, 0]) * 9).decode()) for n in range(40)),
        *(refused(100 + n, 5 + n, code="unknown_device", message="the registry knows no such device", device_id=f"stranger-{n}", raw='{"device": "stranger", "payload": {"t": 21.5}}') for n in range(3)),
        refused(200, 4_000, stage="validate", code="value_range", device_id="0018b20000000002", message="temperature 999 °C: outside -40 … 85", raw="x"),
    ])  # fmt: skip
    refusals.ready.set()
    refusals.trouble = ""
    application = web.Application()
    Console(host, tables, workers).mount(application)
    DeviceViews(host, reads, tables).mount(application)
    RefusalViews(host, refusals, lambda: None).mount(application)
    desk = Desk(board, publish, host.clock)
    Operators(host, desk, reads).mount(application)
    Commands(host, CommandDesk(publish, host.clock), reads).mount(application)
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
            refusals=refusals,
        )
    for stage in ("normalize", "validate", "alarm", "notify", "sink", "sync"):
        metrics.LAG_RECORDS.labels(stage, "browser-test", "0").set(0)
        metrics.PENDING_RECORDS.labels(stage).set(0)


async def shot(page, name):
    """Keep a picture where PRESERVARIUM_SHOTS names a directory; always take it, so that drawing is tested."""
    directory = os.environ.get("SHOTS_DIR")
    path = Path(directory or os.devnull) / name if directory else Path(os.devnull)
    await page.screenshot(path)


READY = "document.querySelectorAll('#fleet li').length >= 5 && document.querySelectorAll('#refused .line').length > 0"


async def test_the_page_shows_what_the_views_say_on_one_screen(page, site):
    await page.size(1440, 900)
    await page.scheme("light")
    await page.go(site.url)
    await page.until(READY)
    await page.until("document.getElementById('health').textContent === 'healthy'")
    metrics.RECORDS_RECEIVED.labels("normalize").inc(5000)
    metrics.READINGS.labels("normalize").inc(25000)
    await page.until("parseFloat(document.getElementById('fig-rate').textContent.replace(/,/g, '')) > 100")
    assert await page.js("document.getElementById('fig-devices').textContent") == "60"
    assert await page.js("document.getElementById('fig-alarms').textContent") == "2"
    flow = await page.js("document.getElementById('flow').innerText")
    for name in ("Connectors", "normalize", "validate", "alarm", "notify", "sink", "sync", "PostgreSQL", "ClickHouse"):
        assert name in flow
    await page.until("document.getElementById('fleet').innerText.includes('3 in no registry')")
    for text in ("54 sending", "1 failing quality", "3 silent for an hour", "1 never seen"):
        assert text in await page.js("document.getElementById('fleet').innerText")
    refused_ = await page.js("document.getElementById('refused').innerText")
    assert "decode_failed" in refused_
    assert EVIL in refused_
    await shot(page, "overview.png")
    assert await page.js("document.documentElement.scrollHeight <= 900"), await page.js(
        "document.documentElement.scrollHeight"
    )
    assert await page.js("document.documentElement.scrollWidth <= 1440")
    await shot(page, "light.png")
    await page.scheme("dark")
    await shot(page, "dark.png")
    assert page.logged == []


async def test_helpers_stand_behind_their_stage_and_show_where_they_have_something_to_say(page, site):
    metrics.RECORDS_RECEIVED.labels("sink-alarms").inc(5)
    metrics.RECORDS_RECEIVED.labels("sync-alarms").inc(5)
    await page.go(site.url)
    await page.until(
        "document.querySelectorAll('.helpers').length > 5 && document.querySelectorAll('.helpers:not([hidden])').length >= 2"
    )
    behind = "[...document.querySelectorAll('.stage')].find(s => s.querySelector('h3 span').textContent === 'sink')"
    assert await page.js(f"{behind}.querySelector('.helpers summary').textContent.includes('helper')")
    assert await page.js("document.querySelectorAll('.stage').length") == 9
    metrics.LAG_RECORDS.labels("sink-alarms", "browser-test", "0").set(90_000)
    await page.until(f"{behind}.querySelector('.loud').innerText.includes('sink-alarms behind')")
    metrics.LAG_RECORDS.labels("sink-alarms", "browser-test", "0").set(0)
    await page.until(f"!{behind}.querySelector('.loud').innerText.includes('sink-alarms')")
    await page.js(f"{behind}.querySelector('.helpers summary').click()")
    await page.until(f"{behind}.querySelector('.helpers li') !== null")
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
    await page.until(f"document.getElementById('login').hidden && {READY}")
    assert (
        await page.js("sessionStorage.getItem('operator-token') + localStorage.getItem('operator-token')")
        == "s3cretnull"
    )


async def test_names_and_messages_are_text_and_never_markup(page, site):
    await page.go(site.url)
    await page.until("document.getElementById('refused').innerText.includes('<img')")
    await page.until("document.getElementById('alarms').innerText.includes('<script>')")
    assert await page.js("document.querySelectorAll('img, #refused script, #alarms script').length") == 0
    assert await page.js("document.title") == "Preservarium"
    # Were something to slip through, the policy would still not run it.
    await page.js(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title=`owned`'}))"
    )
    assert await page.js("document.title") == "Preservarium"
    assert any("Content Security Policy" in line for line in page.logged)


async def test_a_phone_shows_everything_without_scrolling_sideways(page, site):
    await page.size(390, 844, mobile=True)
    await page.go(site.url)
    await page.until(READY)
    assert await page.js("document.documentElement.scrollWidth <= 390")
    assert await page.js("document.documentElement.scrollHeight < 4000"), await page.js(
        "document.documentElement.scrollHeight"
    )
    await shot(page, "phone.png")
    assert page.logged == []


async def test_finding_a_device_leads_to_the_list(page, site):
    await page.go(site.url)
    await page.until(READY)
    await page.key("/", "/")
    assert await page.js("document.activeElement.id") == "search"
    for character in "00042":
        await page.key(character, character)
    await page.key("Enter", "\r")
    await page.until("location.pathname === '/devices' && location.search === '?q=00042'")
    await page.until("document.querySelectorAll('#rows tr').length === 1")


async def test_what_is_wrong_is_said(page, site):
    await page.go(site.url)
    await page.until(READY)
    site.reads.down = True
    await page.until("document.getElementById('fleet-note').innerText.includes('connection refused')")
    site.report["problems"].append("sink: fuse blown: 600 of the last 1000 records refused")
    await page.until("document.getElementById('health').textContent === 'not healthy'")
    assert "fuse" in await page.js("document.getElementById('banner').innerText")
    await shot(page, "trouble.png")


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_text_stands_out_from_its_ground(page, site, theme):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text."""
    await page.scheme(theme)
    await page.go(site.url)
    await page.until(READY)
    low = await page.js(LOW_CONTRAST)
    assert low == []


async def test_breakers_and_fuses_show_and_a_blown_fuse_can_be_closed(page, site):
    await page.go(site.url)
    # Only what is wrong: a breaker that is closed and a fuse that is whole say nothing.
    await page.until("document.querySelectorAll('#guards li').length === 2")
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
    cards = await page.js("[...document.querySelectorAll('#workers article')].map(a => a.textContent)")
    # What is wrong first; what is well is folded.
    assert ["gone" in card for card in cards] == [True, False, False]
    assert "said nothing for 10 min" in cards[0]
    assert "well" in cards[2]
    assert "console at 10.0.0.7:6066" in cards[2]
    assert await page.js("document.querySelector('#workers .helpers summary').innerText") == "1 well"
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
        assert words in cards[1]
    assert await page.js("document.querySelectorAll('#workers img, #workers script, #workers button').length") == 0
    await page.js("document.querySelector('#workers > .helpers').open = true")
    says("four:44", 0)
    await page.until("document.querySelectorAll('#workers article').length === 4")
    await page.until("document.querySelector('#workers > .helpers').open")
    await page.js("document.getElementById('workers').scrollIntoView()")
    await shot(page, "workers.png")
    assert page.logged == []
