"""Every page on stand-ins: nothing in the console, nothing that axe-core finds, in both themes, at a desk and on a phone; and what they do.

`PAGES=device,explore` looks at these alone; `SHOTS_DIR` keeps a picture of each. `PICTURES=docs/guides/console` makes those of the guide anew.
"""

import asyncio
import os
from pathlib import Path

import pytest
from devtools import text_of
from test_console_page import alarm, shot, site, stand

from preservarium.settings import Web

pytestmark = pytest.mark.browser

__all__ = ["site"]

AXE = Path(__file__).parent / "axe" / "axe.min.js"
WIDE, PHONE = (1440, 900), (390, 844)
#: Of a picture in the guide: it is as wide as a page that shows it, and a repository keeps every version.
SCALE = 0.6

#: Page -> path, and when it shows what there is: a script.
PAGES = {
    "overview": ("", "document.querySelectorAll('#fleet li').length >= 5 && document.querySelectorAll('#refused .line').length > 0"),
    "devices": ("devices?state=sending", "document.querySelectorAll('#rows tr').length === 50 && document.querySelectorAll('.spark').length > 3"),
    "device": ("devices/0018b20000000001", "document.querySelectorAll('#plots canvas').length >= 3 && document.querySelectorAll('#readings a').length > 5 && document.querySelectorAll('#refusals details').length > 0"),
    "explore": ("explore?series=10,20,30", "document.querySelectorAll('#plots canvas').length === 1 && document.querySelectorAll('#results li').length > 3"),
    "explore-map": ("explore?series=10,20,30&view=map", "document.querySelectorAll('.map canvas').length === 1 && document.querySelectorAll('.map-names li').length === 3"),
    "explore-empty": ("explore?q=nobody", "!document.getElementById('nothing').hidden"),
    "alarms": ("alarms", "document.querySelectorAll('tr.alarm').length >= 1"),
    "refusals": ("refusals?stage=normalize&code=unknown_device", "document.querySelectorAll('#causes tr').length >= 1 && document.querySelectorAll('#refusals details').length > 0"),
    "commands": ("commands", "document.getElementById('live').textContent !== 'connecting …'"),
    "unknown": ("unknown", "document.querySelectorAll('#unknown > li').length === 1"),
    "messages": ("messages", "document.querySelectorAll('.record').length >= 20 && document.querySelectorAll('#topic option').length === 3"),
    "tables": ("tables?table=device_configs&key=a1", "document.querySelectorAll('.partitions li').length === 3 && !document.getElementById('value').hidden"),
    "registry": ("registry?kind=parser&name=ex-script", "document.getElementById('status').textContent.startsWith('right') && document.querySelectorAll('#versions li').length === 2"),
    "lineage": ("lineage?device=0018b20000000001&type=air-temperature&at=1760000000000000", "document.querySelectorAll('.steps > li').length >= 7"),
    "lineage-empty": ("lineage", "document.getElementById('live').textContent === 'ready'"),
}  # fmt: skip

RUN_AXE = """(async () => {
  const found = await axe.run(document, {resultTypes: ['violations']});
  return found.violations.map((v) => `${v.id} (${v.impact}): ${v.nodes.slice(0, 3).map((n) => `${n.target.join(' ')} ${n.failureSummary}`).join(' | ')}`);
})()"""


async def drawn(page):
    await page.js("new Promise(r => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(r)), 60))")


async def looked_at(page, site, name):
    """What is wrong with a page, a line each."""
    path, is_there = PAGES[name]
    page.logged.clear()
    await page.size(*WIDE)
    await page.scheme("light")
    await page.go(f"{site.url}{path}")
    try:
        await page.until(is_there, 30)
    except AssertionError as e:
        return [f"{e}; it says {await page.js(text_of('main'))!r:.600}", *page.logged]
    if (kept := os.environ.get("PICTURES")) and "-empty" not in name:
        await page.size(*WIDE, scale=SCALE)
        await drawn(page)
        await page.screenshot(Path(kept) / f"{name}.png", whole=False)
    # What is folded is looked at, too.
    await page.js(
        "for (const d of document.querySelectorAll('main details:not(.record, .refusal)')) d.open = true;"
        "[...document.querySelectorAll('.record, .refusal')].slice(0, 2).forEach((d) => { d.open = true; })"
    )
    await page.js(AXE.read_text() + "; null")
    faults = []
    for width, height in (WIDE, PHONE):
        await page.size(width, height, mobile=width < 1_000)
        for scheme in ("light", "dark"):
            await page.scheme(scheme)
            await drawn(page)
            await shot(page, f"{name}-{width}-{scheme}.png")
            faults += [f"{width} {scheme}: {each}" for each in await page.js(RUN_AXE)]
            wide = await page.js("document.documentElement.scrollWidth")
            if wide > width:
                faults.append(f"{width} {scheme}: is {wide} wide")
    return [*faults, *(f"logged: {line}" for line in page.logged)]


async def test_every_page_is_right_in_both_themes_and_at_both_widths(page, site):
    stand(site.board, alarm(5), alarm(6, severity="critical"), alarm(7, state="shelved"))
    site.workers.trouble = ""
    wanted = os.environ.get("PAGES", "").split(",")
    faults = [
        f"{name}: {fault}"
        for name in PAGES
        if wanted == [""] or name in wanted
        for fault in await looked_at(page, site, name)
    ]
    assert faults == [], "\n".join(faults)


async def click(page, selector):
    await page.js(f"document.querySelector({selector!r}).click()")


async def fill(page, selector, text):
    await page.js(
        f"(() => {{ const e = document.querySelector({selector!r}); e.value = {text!r}; e.dispatchEvent(new Event('input', {{bubbles: true}})); e.dispatchEvent(new Event('change', {{bubbles: true}})); }})()"
    )


async def test_any_series_are_found_shown_and_shared_by_the_address(page, site):
    await page.size(*WIDE)
    await page.go(f"{site.url}explore")
    await page.until("document.querySelectorAll('#results li').length > 10")
    await page.js("(() => { const c = document.getElementById('component'); c.value = 'air-temperature'; c.dispatchEvent(new Event('change')); })()")  # fmt: skip
    await page.until("[...document.querySelectorAll('#results b')].every(b => b.textContent === 'air-temperature') && document.querySelectorAll('#results li').length === 11")  # fmt: skip
    await click(page, "#add-all")
    await page.until("document.querySelectorAll('#chosen li').length === 11 && document.querySelectorAll('#plots canvas').length === 1")  # fmt: skip
    await click(page, "[data-view=map]")
    await page.until("document.querySelectorAll('.map-names li').length === 11")
    assert await page.js("(() => { const c = document.querySelector('.map canvas'); return c.getContext('2d').getImageData(5, 5, 1, 1).data[3]; })()") == 255  # fmt: skip
    await click(page, "#chosen button")
    await page.until("document.querySelectorAll('.map-names li').length === 10")
    shared = await page.js("location.href")
    await page.go(f"{site.url}alarms")
    await page.go(shared)
    await page.until("document.querySelectorAll('.map-names li').length === 10")
    await fill(page, "#label", "area=north")
    for _ in range(100):
        if any(each.get("find", ("",) * 4)[3] == ("area", "north") for each in site.reads.asked):
            break
        await asyncio.sleep(0.05)
    assert any(each.get("find", ("",) * 4)[3] == ("area", "north") for each in site.reads.asked)
    assert page.logged == []


async def test_a_refusal_is_decoded_again_and_a_cause_redriven_or_set_aside(page, site):
    await page.go(f"{site.url}refusals?stage=normalize&code=decode_failed")
    await page.until("document.querySelectorAll('#refusals details').length > 3")
    await click(page, "#refusals summary")
    await page.until("document.querySelector('.bench') !== null")
    await fill(page, ".bench input", "ex-script")
    await page.js("document.querySelector('.bench').requestSubmit()")
    await page.until("document.querySelector('.decoded') !== null")
    assert "decoded" in await page.js(text_of(".decoded"))
    assert "air-temperature" in await page.js(text_of(".decoded"))  # bytes 01 02: 25.8 °C
    assert "25.8" in await page.js(text_of(".decoded"))
    await click(page, ".bench button[type=button]")
    await page.until("document.querySelector('.fits li') !== null")
    await click(page, "#redrive")
    await page.until("document.getElementById('d-preview').innerText.includes('4 would be sent')")
    await fill(page, "#d-actor", "ann")
    await click(page, "#d-do")
    await page.until("!document.getElementById('dialog').open")
    assert ("redrive", ["decode_failed"], None, True) in site.asked
    assert ("redrive", ["decode_failed"], None, False) in site.asked
    await click(page, "#discard")
    await page.until("document.getElementById('d-preview').innerText.includes('4 would be set aside')")
    await click(page, "#d-do")
    await page.until("document.getElementById('d-fault').innerText.includes('why')")
    await fill(page, "#d-reason", "a test device")
    await click(page, "#d-do")
    await page.until("!document.getElementById('dialog').open")
    assert ("discard", ["decode_failed"], "a test device", "ann", False) in site.asked
    assert page.logged == []


async def test_a_parser_is_edited_tried_while_typing_compared_and_saved(page, site):
    await page.size(*WIDE)
    await page.go(f"{site.url}registry?kind=parser&name=ex-script")
    await page.until("document.getElementById('status').textContent === 'right, 1 example holds'")
    content = "document.getElementById('editor').shadowRoot.querySelector('.cm-content')"
    # As somebody types it.
    await page.js(f"{content}.focus(); document.getElementById('editor').shadowRoot.getSelection?.()")
    await page.call("Input.insertText", text="# mine\n")
    await page.until("document.getElementById('status').textContent !== 'right, 1 example holds'")
    await page.until("document.getElementById('status').textContent === 'right, 1 example holds'")
    await page.call("Input.insertText", text="parsers: 5\n")
    await page.until("document.getElementById('status').textContent.includes('error')")
    assert await page.js("document.querySelectorAll('#problems li').length") >= 1
    assert await page.js("document.getElementById('review').disabled")
    await click(page, "#revert")
    await page.until("document.getElementById('status').textContent === 'right, 1 example holds'")
    await page.js("document.querySelector('#parser-versions li:nth-child(2) button').click()")
    await page.until("!document.getElementById('plan').hidden")
    assert "parser/ex-script@" in await page.js(text_of("#changes"))
    await fill(page, "#actor", "ann")
    await click(page, "#save")
    await page.until("!document.getElementById('said').hidden")
    assert "Saved" in await page.js(text_of("#said"))
    saved = [each for each in site.asked if each[0] == "apply" and not each[2]]
    assert saved[-1][1] == "ann"
    assert page.logged == []


async def test_where_the_registry_is_kept_in_files_nothing_can_be_saved(page, site):
    site.settings.web = Web(registry_editing=False)
    await page.go(f"{site.url}registry?kind=device&name=0018B20000000001")
    await page.until("document.querySelectorAll('#versions li').length === 2")
    assert await page.js("document.getElementById('live').textContent") == "kept in files"
    assert await page.js("['new', 'review', 'revert'].every(id => document.getElementById(id).hidden)")
    await click(page, "#versions li button")
    await page.until("document.querySelector('.diff .added') !== null")
    assert "Greenhouse 1" in await page.js(text_of(".diff .added"))
    said = await page.js("fetch('/api/registry/save', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'}).then(r => r.status)")  # fmt: skip
    assert said == 403


async def test_an_unknown_device_is_registered_by_one_click_and_brought_in(page, site):
    await page.go(f"{site.url}unknown")
    await page.until("document.querySelectorAll('#unknown > li').length === 1")
    card = await page.js(text_of("#unknown > li"))
    for words in ("stranger-1", "00 d7", "ex-script", "temperature 21.5", "1 of 1 readings plausible"):
        assert words in card
    assert await page.js("document.querySelector('#unknown select').value") == "EX-1"
    await fill(page, "#actor", "ann")
    await click(page, "#unknown button[type=submit]")
    await page.until("document.querySelector('#unknown .done') !== null")
    assert site.registry.documents["device"]["stranger-1"]["type"] == "EX-1"
    await click(page, "#unknown .done button")
    await page.until("document.querySelector('#unknown .done').innerText.includes('4 messages brought in')")
    assert ("redrive", ["unknown_device"], "stranger-1", False) in site.asked
    assert page.logged == []


async def test_messages_are_looked_for_opened_and_followed(page, site):
    await page.go(f"{site.url}messages")
    await page.until("document.querySelectorAll('.record').length === 42 && !document.getElementById('next').disabled")
    await click(page, ".record summary")
    await page.until("document.querySelector('.record pre') !== null")
    assert '"air-temperature"' in await page.js(text_of(".record pre"))
    assert "2025-10-09 08:53:20 UTC" in await page.js(text_of(".record pre"))
    await fill(page, "#search", "0018B20000000007")
    await page.js("document.getElementById('search-form').requestSubmit()")
    await page.until("document.querySelectorAll('.record').length === 1")
    assert "key=0018B20000000007" in await page.js("location.search")
    await fill(page, "#from", "2026-01-31T12:00:00")
    await page.js("document.getElementById('search-form').requestSubmit()")
    await page.until("document.getElementById('said-page').innerText.includes('going on in time')")
    assert site.asked[-1][2].from_us == 1_769_860_800_000_000
    await fill(page, "#search", "")
    await click(page, "#follow")
    await page.until("document.querySelectorAll('.record').length === 1 && document.getElementById('said-page').innerText.includes('3 came since, of which 2 are not shown')")  # fmt: skip
    assert await page.js("document.getElementById('live').textContent") == "following"
    await click(page, "#follow")
    assert page.logged == []


async def test_a_reading_leads_to_its_bytes_by_one_click_and_what_comes_is_told(page, site):
    await page.size(*WIDE)
    await page.go(f"{site.url}devices/0018b20000000001")
    await page.until(PAGES["device"][1])
    assert "1 corrected" in await page.js(text_of("#curves-note"))
    assert "gap" in await page.js(text_of("#curves-note"))
    await page.until("document.getElementById('live').title.startsWith('told')")
    asked = len(site.reads.asked)
    site.reads.news_to_tell = [{"series_id": 10, "received_at": 1_760_000_000_000_000}]
    for _ in range(100):
        if len(site.reads.asked) > asked:
            break
        await asyncio.sleep(0.05)
    await click(page, "#readings a")
    await page.until("location.pathname === '/lineage' && document.querySelectorAll('.steps > li').length >= 7")
    chain = await page.js(text_of("#steps"))
    for words in ("00 d7 ff", "ex-script@2", "temperature", "the type", "good", "identical"):
        assert words in chain
    assert page.logged == []


async def test_a_view_of_devices_is_kept_and_a_table_tells_where_a_key_is(page, site):
    await page.go(f"{site.url}devices?state=sending&sort=seen")
    await page.until("document.querySelectorAll('#rows tr').length === 50")
    await page.js("window.prompt = () => 'mine'; document.getElementById('keep').click()")
    assert await page.js("document.querySelector('#kept a').getAttribute('href')") == "/devices?state=sending&sort=seen"
    await page.go(f"{site.url}devices")
    await page.until("document.querySelector('#kept a') !== null")
    await page.go(f"{site.url}tables?table=device_configs&key=b1")
    await page.until("!document.getElementById('value').hidden")
    assert "a copy of worker-1:7" in await page.js(text_of("#where"))
    assert await page.js(text_of("#value")) == "7"
    assert page.logged == []
