"""The commands' page in a real Chromium: what it shows, by keyboard and on a phone; and asking and cancelling for real."""

import asyncio
import os
import time
from types import SimpleNamespace

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner
from devtools import LOW_CONTRAST, text_of
from operators_support import Plant
from test_console_page import EVIL, shot
from worker_support import ROOT

from preservarium.__main__ import cli
from preservarium.clock import SystemClock
from preservarium.console.commands import Commands
from preservarium.console.tables import TableReader
from preservarium.console.views import Console
from preservarium.domain.commands.machine import State
from preservarium.errors import Retry
from preservarium.operations.command_desk import CommandDesk
from preservarium.settings import Commands as CommandSettings
from preservarium.settings import Web

pytestmark = pytest.mark.browser

ROWS = "document.querySelectorAll('#rows tr.alarm')"


def command(n, state, **fields):
    at = time.time_ns() // 1000 - n * 60_000_000
    return {
        "command_id": f"c{n}", "device_id": f"relay-{n}", "command": "fan_on", "state": state, "reason": "", "attempt": 1, "priority": 0,
        "requested_at": at, "requested_by": "ann", "idempotency_key": f"k{n}", "cause": None, "expires_at": at + 86_400_000_000,
        "ended_at": None, "updated_at": at, "content": {"fields": {"fan": 1}}, "confirm": {"component_type": "fan", "field": "fan"},
    } | fields  # fmt: skip


class Reads:
    def __init__(self):
        self.down = False
        self.all = [
            command(1, "queued"), command(2, "sent"), command(3, "delivered", device_id="70b3d57ed0000001"), command(4, "successful"),
            command(5, "timeout", attempt=3, reason="no confirmation within 10 s"),
            command(6, "expired", reason="it was not sent in time", attempt=0), command(7, "failed", command="", reason=EVIL, content={"payload": EVIL}),
            command(8, "cancelled", requested_by="rule hot_cabinet", cause="t1"),
        ]  # fmt: skip

    async def commands(self, *, device_id, states, before, limit):
        if self.down:
            raise Retry("PostgreSQL: connection refused")
        wanted = [c for c in self.all if device_id in ("", c["device_id"]) and (not states or c["state"] in states)]
        return {"commands": wanted[:limit], "next": None}

    async def command(self, command_id, *, limit):
        (found,) = [c for c in self.all if c["command_id"] == command_id]
        events = [
            {"sequence": 1, "event": "request", "state": "queued", "at": found["requested_at"], "actor": "ann", "reason": "", "attempt": 0},
            {"sequence": 2, "event": "fail", "state": found["state"], "at": found["requested_at"] + 5, "actor": None, "reason": EVIL, "attempt": 1},
        ]  # fmt: skip
        return {**found, "events": events}

    async def registered(self, device_id):
        downlink = {
            "tries": 3,
            "timeout_s": 10,
            "commands": {"fan_on": {"fields": {"fan": 1}, "priority": 5}, "set": {}},
        }
        if not device_id.startswith("relay"):
            return None
        return {"device_id": device_id, "type": "relay", "enabled": True, "name": EVIL}, {
            "parser": "p",
            "downlink": downlink,
        }


@pytest.fixture
async def site():
    reads, sent = Reads(), []
    settings = SimpleNamespace(web=Web(), commands=CommandSettings())
    host = SimpleNamespace(live=lambda: settings, clock=SystemClock(), health_report=dict, guards=dict, reset_fuse=bool)

    async def publish(sends):
        sent.extend(orjson.loads(send.value) for send in sends)
        for line in sent:
            if line["kind"] == "cancel":
                for each in reads.all:
                    if each["command_id"] == line["command_id"]:
                        each["state"] = "cancelled"

    application = web.Application()
    Console(host, reads, TableReader(dict, lambda key: 0)).mount(application)
    Commands(host, CommandDesk(publish, host.clock), reads).mount(application)
    async with TestServer(application) as server:
        yield SimpleNamespace(url=str(server.make_url("/commands")), reads=reads, sent=sent, settings=settings)


async def opened(page, site, rows=8):
    await page.go(site.url)
    await page.until(f"{ROWS}.length === {rows}")


async def test_each_state_is_said_by_word_and_mark_and_what_happened_is_told(page, site):
    await page.size(1400, 900)
    await page.scheme("light")
    await opened(page, site)
    assert [
        text.split()[-1] for text in await page.js(f"[...{ROWS}].map(r => r.querySelector('.pill').innerText)")
    ] == [*State]
    assert len(set(await page.js(f"[...{ROWS}].map(r => r.querySelector('.pill span').innerText)"))) == 8
    assert (
        await page.js(f"[...{ROWS}].map(r => r.querySelectorAll('[data-action=cancel]').length).join('')") == "11100000"
    )
    assert "no confirmation within 10 s" in await page.js(f"{ROWS}[4].innerText")
    assert EVIL in await page.js(f"{ROWS}[6].innerText")
    assert await page.js("document.querySelectorAll('#rows img, #rows script').length") == 0
    await page.js(f"{ROWS}[6].querySelector('.details').click()")
    await page.until("document.querySelectorAll('.history li b').length === 2")
    assert "failed" in await page.js(text_of(".history"))
    assert '"component_type":"fan"' in await page.js(text_of(".facts"))
    await shot(page, "commands-light.png")
    await page.scheme("dark")
    await shot(page, "commands-dark.png")
    assert page.logged == []


async def test_lists_by_state_and_by_device(page, site):
    await opened(page, site)

    async def listed(click, rows):
        await page.js(click)
        await page.until(f"{ROWS}.length === {rows}")

    await listed("document.querySelector('[data-tab=\"1\"]').click()", 3)
    await listed("document.querySelector('[data-tab=\"3\"]').click()", 3)
    await listed(
        "const s = document.getElementById('state'); s.value = 'expired'; s.dispatchEvent(new Event('change'))", 1
    )
    assert await page.js("document.querySelectorAll('#tabs [aria-pressed=true]').length") == 0
    await listed("document.querySelector('[data-tab=\"0\"]').click()", 8)
    await page.js("document.activeElement.blur()")
    await page.key("/", "/")
    for character in "relay-2":
        await page.key(character, character)
    await page.until(f"{ROWS}.length === 1")
    await page.go(f"{site.url}?device=relay-9")
    await page.until("!document.getElementById('empty').hidden")
    assert await page.js(text_of("#empty")) == "No command of this device is like that."
    site.reads.down = True
    await page.until("document.getElementById('live').innerText === 'no answer'")
    assert "may be old" in await page.js(text_of("#note"))


async def test_a_command_is_asked_for_with_what_the_registry_gives_to_choose_from(page, site):
    await page.size(1400, 900)
    await page.scheme("light")
    await opened(page, site)
    await page.js("document.activeElement.blur()")
    await page.key("n", "n")
    await page.until("document.getElementById('dialog').open")
    assert await page.js("document.activeElement.id") == "d-device"
    await page.js("document.getElementById('d-do').click()")
    assert await page.js(text_of("#d-fault")) == "Which device?"

    async def give(field, value):
        await page.js(
            f"(() => {{ const e = document.getElementById('{field}'); e.value = {value!r}; e.dispatchEvent(new Event('change')); }})()"
        )

    await give("d-device", "unknown")
    await page.until("document.getElementById('d-registered').innerText.includes('no such device')")
    await give("d-device", "relay-1")
    await page.until("document.getElementById('d-command').options.length === 3")
    assert await page.js("[...document.getElementById('d-command').options].map(o => o.value)") == ["fan_on", "set", ""]
    assert 'as the registry says: {"fan":1}' in await page.js(
        "document.getElementById('d-kind').options[0].textContent"
    )
    assert (
        await page.js(
            "document.getElementById('d-tries').placeholder + document.getElementById('d-priority').placeholder"
        )
        == "35"
    )
    await shot(page, "commands-new.png")
    await give("d-actor", "ann")
    await give("d-kind", "fields")
    await give("d-content", "[1]")
    await page.js("document.getElementById('d-do').click()")
    assert "Fields are a JSON object" in await page.js(text_of("#d-fault"))
    await give("d-kind", "hex")
    await give("d-content", "01 fz")
    await page.js("document.getElementById('d-do').click()")
    assert "hexadecimal" in await page.js(text_of("#d-fault"))
    await give("d-content", "01 ff")
    await give("d-tries", "99")
    await page.js("document.getElementById('d-do').click()")
    # What the API refuses is said in the form, which stays.
    await page.until("document.getElementById('d-fault').innerText.includes('tries')")
    await give("d-tries", "2")
    await give("d-confirm", '{"component_type": "fan", "equals": 1}')
    await page.js("document.getElementById('d-do').click()")
    await page.until("!document.getElementById('dialog').open")
    assert await page.js(text_of("#said")) == "fan_on: asked of relay-1."
    (line,) = site.sent
    assert (line["kind"], line["device_id"], line["command"], line["payload_b64"], line["tries"], line["confirm"], line["actor"]) == (
        "request", "relay-1", "fan_on", "Af8=", 2, {"component_type": "fan", "equals": 1}, "ann",
    )  # fmt: skip
    assert len(line["idempotency_key"]) == 36
    # The browser logs that the API refused.
    assert all("400" in line or "404" in line for line in page.logged)


async def test_cancelling_by_keyboard_waits_for_the_machine(page, site):
    await opened(page, site)
    await page.key("ArrowDown")
    await page.key("ArrowDown")
    await page.key("x", "x")
    await page.until("document.getElementById('dialog').open")
    assert "may still carry it out" in await page.js(text_of("#d-about"))
    await page.js("document.getElementById('d-actor').value = 'ann'; document.getElementById('d-do').click()")
    await page.until("document.getElementById('said').innerText === 'fan_on of relay-2: cancelled.'")
    assert [(line["kind"], line["command_id"], line["actor"]) for line in site.sent] == [("cancel", "c2", "ann")]
    await page.until(f"{ROWS}[1].innerText.includes('cancelled')")
    assert await page.js(f"document.activeElement === {ROWS}[1]")
    assert page.logged == []


async def test_commands_are_for_operators(page, site):
    site.settings.web = Web(operators="ann:s3cret")
    await page.go(site.url)
    await page.until("!document.getElementById('login').hidden")
    await page.js(
        "document.getElementById('l-token').value = 's3cret'; document.querySelector('#login button').click()"
    )
    await page.until(f"{ROWS}.length === 8")
    assert await page.js("document.getElementById('login').hidden")


async def test_a_phone_and_names_for_all_controls(page, site):
    await page.size(390, 844, mobile=True)
    await opened(page, site)
    assert await page.js("document.documentElement.scrollWidth") <= 390
    small = await page.js(
        f"[...{ROWS}].flatMap(r => [...r.querySelectorAll('button')]).map(b => b.getBoundingClientRect().height).filter(h => h < 40)"
    )
    assert small == []
    unnamed = await page.js(
        "[...document.querySelectorAll('button, input, select, textarea, a')].filter(e => e.id !== 'd-do' && "
        "!(e.getAttribute('aria-label') || e.innerText.trim() || document.querySelector(`label[for='${e.id}']`) || e.closest('label'))).map(e => e.outerHTML)"
    )
    assert unnamed == []
    await shot(page, "commands-phone.png")
    await page.js("document.getElementById('new').click(); document.querySelector('#d-new details').open = true")
    assert await page.js("document.documentElement.scrollWidth") <= 390
    await shot(page, "commands-phone-new.png")
    assert page.logged == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_words_stand_out_from_their_ground(page, site, scheme):
    """WCAG 2.1, 1.4.3: at least 4.5:1."""
    await page.size(1400, 900)
    await page.scheme(scheme)
    await opened(page, site)
    low = await page.js(LOW_CONTRAST)
    assert low == []


async def test_an_operator_asks_and_cancels_on_a_real_worker(page, kafka, topic_prefix, pg_dsn, tmp_path, monkeypatch):
    """Without a broker a command waits, and can be cancelled."""
    plant = Plant(kafka, topic_prefix, pg_dsn, tmp_path)
    try:
        await plant.open()
        for name, value in plant.environment.items():
            monkeypatch.setenv(name, value)
        applied = await asyncio.to_thread(
            CliRunner().invoke, cli, ["registry", "apply", os.fspath(ROOT / "examples" / "commands" / "registry.yaml")]
        )
        assert applied.exit_code == 0, applied.output
        url = await plant.start(PRESERVARIUM_AGENTS__ENABLED="registry,commands,sink")
        await page.size(1400, 900)
        await page.go(f"{url}/commands")
        await page.until("!document.getElementById('empty').hidden")
        await page.js("document.getElementById('new').click()")
        await page.js(
            "(() => { const e = document.getElementById('d-device'); e.value = '70b3d57ed0000001'; e.dispatchEvent(new Event('change')); })()"
        )
        await page.until("document.getElementById('d-command').options.length === 3")
        await page.js("document.getElementById('d-actor').value = 'ann'; document.getElementById('d-do').click()")
        await page.until(f"{ROWS}.length === 1", 90)
        # It sleeps: nothing is sent until it is heard.
        assert "queued" in await page.js(f"{ROWS}[0].innerText")
        await page.js(f"{ROWS}[0].querySelector('[data-action=cancel]').click()")
        await page.js("document.getElementById('d-do').click()")
        await page.until("document.getElementById('said').innerText.includes(': cancelled.')", 60)
        await page.until(f"{ROWS}[0].innerText.includes('cancelled')")
        await page.js(f"{ROWS}[0].querySelector('.details').click()")
        await page.until("document.querySelectorAll('.history li b').length === 2")
        assert await page.js("[...document.querySelectorAll('.history li b')].map(b => b.textContent)") == [
            "queued",
            "cancelled",
        ]
        assert page.logged == []
    finally:
        await plant.close()
