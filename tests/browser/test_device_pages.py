"""Devices, one device and refusals in a real Chromium: what they show, by keyboard and on a phone, in both themes."""

import re

import pytest
from devtools import LOW_CONTRAST, text_of
from test_console_page import EVIL, refused, shot, site

from preservarium.settings import Web

pytestmark = pytest.mark.browser

__all__ = ["site"]

ROWS = "document.querySelectorAll('#rows tr')"
DEVICE = "devices/0018b20000000001"
DRAWN = "document.querySelectorAll('#plots canvas').length >= 3 && document.querySelectorAll('#readings tr').length > 5 && document.querySelectorAll('#refusals details').length > 0"
NO_MARKUP = "document.querySelectorAll('img, main script').length"
UNNAMED = """[...document.querySelectorAll('button, input, select, a, summary')].filter(e => e.checkVisibility() &&
  !(e.getAttribute('aria-label') || e.innerText.trim() || document.querySelector(`label[for='${e.id}']`) || e.closest('label'))).map(e => e.outerHTML)"""


async def click(page, selector):
    await page.js(f"document.querySelector({selector!r}).click()")


async def test_devices_are_found_sorted_and_filtered_and_the_address_keeps_it(page, site):
    await page.size(1440, 900)
    await page.scheme("light")
    await page.go(f"{site.url}devices")
    await page.until(f"{ROWS}.length === 50")
    assert await page.js(text_of("#total")) == "60"
    await page.until("document.getElementById('tabs').innerText.includes('Silent 3')")
    assert await page.js(NO_MARKUP) == 0
    assert EVIL in await page.js(text_of("#rows"))
    assert "suspect" in await page.js(f"{ROWS}[1].innerText")
    assert "quality: fail" in await page.js(f"{ROWS}[2].innerText")
    await shot(page, "devices-light.png")
    await click(page, "th[data-sort=seen] button")
    await page.until("location.search === '?sort=seen'")
    assert await page.js("document.querySelector('th[data-sort=seen]').getAttribute('aria-sort')") == "descending"
    await click(page, "th[data-sort=seen] button")
    await page.until("location.search === '?sort=seen&order=asc'")
    await page.until(f"{ROWS}[0].innerText.includes('never')")
    await click(page, "[data-state=never]")
    await page.until(f"{ROWS}.length === 1")
    assert "nothing yet" in await page.js(text_of("#rows"))
    await page.go(await page.js("location.href"))  # as somebody who was given the address
    await page.until(f"{ROWS}.length === 1")
    assert await page.js("document.querySelector('[data-state=never]').getAttribute('aria-pressed')") == "true"
    await page.js("const t = document.getElementById('type'); t.value = 'DL-AQ5'; t.dispatchEvent(new Event('change'))")
    await page.until("!document.getElementById('empty').hidden")
    await click(page, "#empty button")
    await page.until(f"{ROWS}.length === 50")
    assert site.reads.asked[-1]["state"] == ""
    assert page.logged == []


async def test_search_as_you_type_pages_and_enter_by_keyboard(page, site):
    await page.go(f"{site.url}devices")
    await page.until(f"{ROWS}.length === 50")
    first = await page.js(f"{ROWS}[0].innerText")
    await page.until("!document.getElementById('next').disabled")
    await click(page, "#next")
    await page.until("document.getElementById('page').textContent === 'page 2'")
    await page.until(f"{ROWS}.length === 10")
    assert await page.js(f"{ROWS}[0].innerText") != first
    await page.key("/", "/")
    assert await page.js("document.activeElement.id") == "search"
    for character in "house 42":
        await page.key(character, character)
    await page.until(f"{ROWS}.length === 1 && location.search === '?q=house+42'")
    await page.key("Enter", "\r")
    await page.until("location.pathname === '/devices/0018b20000000042'")
    await page.until(DRAWN.split(" && document.querySelectorAll('#refusals")[0])
    assert page.logged == []


async def test_without_devices_the_page_says_what_would_fill_it(page, site):
    site.reads.empty = True
    await page.go(f"{site.url}devices")
    await page.until("!document.getElementById('empty').hidden")
    assert "preservarium registry apply" in await page.js(text_of("#empty"))
    await page.go(site.url)
    await page.until("!document.getElementById('fleet-note').hidden")
    assert "preservarium registry apply" in await page.js(text_of("#fleet-note"))
    site.refusals.clear()
    site.refusals.ready.set()
    await page.go(f"{site.url}refusals")
    await page.until("!document.getElementById('none').hidden")
    assert "iot_errors" in await page.js(text_of("#none"))
    assert page.logged == []


async def test_a_device_shows_curves_readings_alarms_refusals_and_its_registry(page, site):
    await page.size(1440, 900)
    await page.scheme("light")
    await page.go(f"{site.url}{DEVICE}")
    await page.until(DRAWN)
    assert (await page.js("document.title")) == "Greenhouse 1 · Preservarium"
    assert "dl-aq5@3" in await page.js(text_of("#what"))
    series = await page.js(text_of("#series"))
    for words in ("air-temperature", "usual ≤ 45", "possible -40 … 85", "spike", "suspect", "auto", "circular, 360"):
        assert words in series
    readings = await page.js(text_of("#readings"))
    assert "⚑ suspect, spike" in readings
    assert "3:1000" in readings.replace("\xa0", "")
    assert "dl-aq5@3" in readings
    assert "hot: air-temperature high 30" in (await page.js(text_of("#rules"))).replace("\n", " ")
    labels = await page.js("[...document.querySelectorAll('#plots .canvas')].map(c => c.getAttribute('aria-label'))")
    assert re.search(r"air-temperature: 105 points from .* least .* greatest .* °C", labels[0])
    assert "single readings" in await page.js(text_of("#curves-note"))
    assert "1 alarm in this span" in await page.js(text_of("#curves-note"))
    # Something is drawn in each.
    assert await page.js(
        "[...document.querySelectorAll('#plots canvas')].every(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v))"
    )
    assert await page.js(NO_MARKUP) == 0
    await shot(page, "device-light.png")
    await page.scheme("dark")
    await page.js("new Promise(r => setTimeout(() => requestAnimationFrame(r)))")
    await shot(page, "device-dark.png")
    assert page.logged == []


async def test_spans_zoom_and_moves_ask_for_what_is_shown_and_the_address_keeps_it(page, site):
    await page.size(1440, 900)
    await page.go(f"{site.url}{DEVICE}")
    await page.until(DRAWN)

    async def asked(change, is_it=lambda asked: True):
        # An open page asks by itself now and then: `is_it` tells what the change asks from that.
        count = len(site.reads.asked)
        await page.js(change)
        await page.until("true")
        for _ in range(200):
            if found := [one for one in site.reads.asked[count:] if is_it(one)]:
                return found[-1]
            await page.js("new Promise(r => setTimeout(r, 25))")
        raise AssertionError(change)

    def spans(wanted_us):
        return lambda asked: asked["to"] - asked["from"] == wanted_us

    year = await asked("document.querySelector('[data-span=\"31536000\"]').click()", spans(31_536_000_000_000))
    assert year["points"] <= 2_000
    await page.until("document.getElementById('curves-note').innerText.includes('points of 60 min, from hours')")
    assert "span=31536000" in await page.js("location.search")
    closer = await asked("document.getElementById('closer').click()", spans(15_768_000_000_000))
    earlier = await asked(
        "document.getElementById('back').click()", lambda asked: asked["to"] < closer["to"] - 7_000_000_000_000
    )
    assert await page.js("document.getElementById('now').getAttribute('aria-pressed')") == "false"
    # By dragging over a curve.
    await page.until("document.querySelectorAll('#plots .u-over').length >= 3")
    box = await page.js(
        "(() => { const o = document.querySelector('#plots .u-over'); o.scrollIntoView({block: 'center'}); const b = o.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
    )
    count = len(site.reads.asked)
    for kind, part in (("mousePressed", 0.25), ("mouseMoved", 0.5), ("mouseReleased", 0.5)):
        await page.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=box[0] + box[2] * part,
            y=box[1] + box[3] / 2,
            button="left",
            buttons=1,
            clickCount=1,
        )
    for _ in range(200):
        if len(site.reads.asked) > count:
            break
        await page.js("new Promise(r => setTimeout(r, 25))")
    dragged = site.reads.asked[-1]
    assert (dragged["to"] - dragged["from"]) / (earlier["to"] - earlier["from"]) == pytest.approx(0.25, abs=0.02)
    one = await asked(
        "document.querySelectorAll('#chosen input:checked')[0].click()", lambda asked: len(asked["series"]) == 3
    )
    kept = await page.js("location.href")
    await page.go(f"{site.url}alarms")
    await page.go(kept)
    await page.until("document.querySelectorAll('#plots canvas').length >= 2")
    assert site.reads.asked[-1]["series"] == one["series"]
    assert (site.reads.asked[-1]["to"], site.reads.asked[-1]["from"]) == (one["to"], one["from"])
    # Nothing is drawn where nothing is chosen.
    await page.js("document.querySelectorAll('#chosen input:checked').forEach(b => b.click())")
    await page.until("document.querySelectorAll('#plots canvas').length === 0")
    assert await page.js(text_of("#curves-note")) == "Choose a series to draw."
    assert page.logged == []


async def test_keys_move_the_curves_and_refusals_open_with_their_bytes(page, site):
    await page.go(f"{site.url}{DEVICE}")
    await page.until(DRAWN)
    await page.key("ArrowLeft")
    await page.until("document.getElementById('now').getAttribute('aria-pressed') === 'false'")
    await page.key("n", "n")
    await page.until("document.getElementById('now').getAttribute('aria-pressed') === 'true'")
    await page.js("document.querySelector('#refusals summary').focus()")
    await page.key("Enter", "\r")
    await page.until("document.querySelector('#refusals pre.hex') !== null")
    assert (await page.js(text_of("#refusals pre.hex"))).startswith(
        "0000  01 02 ff 00 01 02 ff 00 01 02 ff 00 01 02 ff 00"
    )
    assert EVIL in await page.js(text_of("#refusals"))
    # It stays open while the list goes on.
    site.refusals.take([refused(900, 0, raw="new one")])
    await page.until("document.querySelector('#refusals details').dataset.id === '0:900'", 30)
    assert await page.js("document.querySelector('#refusals details[open]').dataset.id") == "0:0"
    assert page.logged == []


async def test_a_device_that_nobody_knows_shows_what_was_refused_of_it(page, site):
    await page.go(f"{site.url}devices/stranger-1")
    await page.until("document.querySelectorAll('#refusals details').length === 1")
    assert "preservarium registry apply" in await page.js(text_of("#what"))
    assert "neither the registry nor a reading" in await page.js(text_of("#note"))
    assert all("404" in line for line in page.logged)


async def test_refusals_by_cause_with_why_and_what_to_do(page, site):
    await page.size(1440, 900)
    await page.scheme("light")
    await page.go(f"{site.url}refusals")
    await page.until("document.querySelectorAll('#causes tr').length === 3")
    assert "3 devices in no registry" in await page.js(text_of("#unknown"))
    causes = await page.js(text_of("#causes"))
    for words in (
        "decode_failed",
        "the parser says that the payload is not of its format",
        "value_range",
        "unknown_device",
    ):
        assert words in causes
    assert await page.js(
        "[...document.querySelectorAll('#causes .bars path')].every(p => p.getAttribute('d').length > 5)"
    )
    await click(page, '[data-cause="normalize unknown_device"]')
    await page.until("document.querySelectorAll('#refusals details').length === 3")
    assert "preservarium dlq redrive" in await page.js(text_of("#remedy"))
    assert await page.js("location.search") == "?stage=normalize&code=unknown_device"
    await click(page, "#refusals summary")
    await page.until("document.querySelector('#refusals pre') !== null")
    assert '"payload": {"t": 21.5}' in await page.js(text_of("#refusals pre"))
    await shot(page, "refusals-light.png")
    await page.scheme("dark")
    await shot(page, "refusals-dark.png")
    await click(page, "#all")
    await page.until(
        "document.querySelectorAll('#refusals details').length === 20 && !document.getElementById('next').disabled"
    )
    await click(page, "#next")
    await page.until("document.getElementById('page').textContent === 'page 2'")
    assert await page.js(NO_MARKUP) == 0
    assert page.logged == []


@pytest.mark.parametrize("path", ["devices", DEVICE, "refusals"])
async def test_on_a_phone_nothing_scrolls_sideways_and_everything_has_a_name(page, site, path):
    await page.size(390, 844, mobile=True)
    await page.go(f"{site.url}{path}")
    await page.until(
        {
            "devices": f"{ROWS}.length === 50",
            DEVICE: DRAWN,
            "refusals": "document.querySelectorAll('#causes tr').length === 3",
        }[path]
    )
    assert await page.js("document.documentElement.scrollWidth <= 390")
    assert await page.js(UNNAMED) == []
    assert await page.js("[...document.querySelectorAll('th')].every(t => ['col', 'row'].includes(t.scope))")
    await shot(page, f"phone-{path.split('/')[0]}{'-one' if '/' in path else ''}.png")
    assert page.logged == []


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_text_stands_out_from_its_ground(page, site, theme):
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text."""
    await page.scheme(theme)
    for path, there in (
        ("devices", f"{ROWS}.length === 50"),
        (DEVICE, DRAWN),
        ("refusals?code=decode_failed", "!document.getElementById('remedy').hidden"),
    ):
        await page.go(f"{site.url}{path}")
        await page.until(there)
        await page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert await page.js(LOW_CONTRAST) == []


async def test_where_there_are_operators_all_of_it_is_theirs(page, site):
    site.settings.web = Web(operators="ann:s3cret")
    for path in ("devices", DEVICE, "refusals"):
        await page.go(f"{site.url}{path}")
        await page.until(
            "!document.getElementById('login').hidden && document.getElementById('live').textContent === 'for operators'"
        )
        assert "Greenhouse" not in await page.js(text_of("main"))
    await page.js(
        "document.getElementById('l-token').value = 's3cret'; document.querySelector('#login button').click()"
    )
    await page.until("document.getElementById('login').hidden && document.querySelectorAll('#causes tr').length === 3")
    await page.go(f"{site.url}{DEVICE}")
    await page.until(DRAWN)


async def test_the_readings_come_as_a_file(page, site):
    await page.go(f"{site.url}{DEVICE}")
    await page.until(DRAWN)
    await page.js(
        "URL.createObjectURL = ((made) => (blob) => { blob.text().then((t) => { window.fileText = t; }); return made.call(URL, blob); })(URL.createObjectURL)"
    )
    await click(page, "#csv")
    await page.until("window.fileText !== undefined")
    lines = (await page.js("window.fileText")).splitlines()
    assert lines[0].startswith("timestamp,received_at,component_type")
    assert len(lines) == 11
