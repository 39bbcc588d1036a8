"""Every page of a whole running system: no error in the console, nothing that axe-core finds, in both themes, at a desk and on a phone.

`PICTURES=docs/guides/console` keeps a picture of each page there, as docs/guides/console.md shows them.
"""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from up_support import Run

pytestmark = [pytest.mark.browser, pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse]

AXE = Path(__file__).parent / "axe" / "axe.min.js"
WIDE, PHONE = (1440, 900), (390, 844)
#: A picture is looked at in a guide, and a repository keeps every version.
SCALE = 0.6
PICTURE_BYTES_MAX = 150_000

#: Page -> when it shows what there is: a script.
PAGES = {
    "overview": ("/", "document.querySelectorAll('#fleet li').length >= 5 && document.querySelectorAll('.stage').length > 5"),
    "devices": ("/devices", "document.querySelectorAll('#rows tr').length > 10 && document.querySelectorAll('.spark').length > 3"),
    "device": (None, "document.querySelectorAll('#plots canvas').length >= 1 && document.querySelectorAll('#readings a').length > 5"),
    "explore": (None, "document.querySelectorAll('#plots canvas').length >= 1 && document.querySelectorAll('#results li').length > 3"),
    "explore-map": (None, "document.querySelectorAll('.map canvas').length >= 1 && document.querySelectorAll('.map-names li').length > 3"),
    "alarms": ("/alarms", "document.querySelectorAll('tr.alarm').length >= 1"),
    "refusals": ("/refusals?code=decode_failed", "document.querySelectorAll('#causes tr').length >= 1"),
    "commands": ("/commands", "document.getElementById('live').textContent !== 'connecting …'"),
    "unknown": ("/unknown", "document.querySelectorAll('#unknown > li').length >= 1"),
    "messages": ("/messages?topic=iot_validated_data", "document.querySelectorAll('.record').length >= 20 && document.querySelectorAll('#topic option').length > 10"),
    "tables": (None, "document.querySelectorAll('.partitions li').length > 5 && !document.getElementById('value').hidden"),
    "registry": (None, "document.getElementById('status').textContent.startsWith('right') && document.querySelectorAll('#versions li').length >= 1"),
    "lineage": (None, "document.querySelectorAll('.steps > li').length >= 5"),
}  # fmt: skip

RUN_AXE = """(async () => {
  const found = await axe.run(document, {resultTypes: ['violations']});
  return found.violations.map((v) => `${v.id} (${v.impact}): ${v.nodes.slice(0, 3).map((n) => `${n.target.join(' ')} ${n.failureSummary}`).join(' | ')}`);
})()"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    running = Run(tmp_path_factory.mktemp("up"), "--rate=50")
    try:
        running.said("devices send")
        running.until(lambda: (running.get("/api/fleet") or {}).get("states", {}).get("sending", 0) > 40, 180)
        yield running
        running.process.send_signal(signal.SIGINT)
        code, _ = running.end()
        assert code == 0
    finally:
        running.process.kill()


def _places(run):
    """Paths of the pages that are about something: a device with a series of numbers, its last reading, a parser."""
    series = run.until(lambda: (run.get("/api/series?component=air-temperature&limit=12") or {}).get("series"))
    one = series[0]
    ids = ",".join(str(each["series_id"]) for each in series)
    reading = run.get(f"/api/devices/{one['device_id']}/readings?series={one['series_id']}&limit=1")["readings"][0]
    parsers = run.get("/api/registry/parser?limit=200")["documents"]
    script = next(each["name"] for each in parsers if each["about"].startswith("javascript"))
    return {
        "device": f"/devices/{one['device_id']}?span=3600",
        "explore": f"/explore?span=3600&component=air-temperature&series={ids}",
        "explore-map": f"/explore?span=3600&view=map&component=air-temperature&series={ids}",
        "tables": f"/tables?table=series_states&key={one['device_id']}",
        "registry": f"/registry?kind=parser&name={script}",
        "lineage": f"/lineage?device={one['device_id']}&type={reading['component_type']}&at={reading['timestamp']}"
        f"&pin={reading['pin_position']}&mode={reading['connector_mode']}",
    }


async def test_every_page_is_right_in_both_themes_and_at_both_widths(page, run):
    places = await asyncio.to_thread(_places, run)
    kept = os.environ.get("PICTURES")
    script = AXE.read_text()
    faults = []
    for name, (path, is_there) in PAGES.items():
        page.logged.clear()
        await page.size(*WIDE)
        await page.scheme("light")
        await page.go(f"http://127.0.0.1:{run.port}{path or places[name]}")
        try:
            await page.until(is_there, 60)
        except AssertionError as e:
            said = await page.js("document.querySelector('main').innerText")
            faults.append(f"{name}: {e}; it says {said[:400]!r}")
            continue
        if kept:
            await page.size(*WIDE, scale=SCALE)
            picture = Path(kept) / f"{name}.png"
            await page.screenshot(picture, whole=False)
            assert picture.stat().st_size < PICTURE_BYTES_MAX, picture
        await page.js(script + "; null")
        for width, height in (WIDE, PHONE):
            await page.size(width, height, mobile=width < 1_000)
            for scheme in ("light", "dark"):
                await page.scheme(scheme)
                await page.js("new Promise(r => setTimeout(() => requestAnimationFrame(r), 60))")
                faults += [f"{name} {width} {scheme}: {each}" for each in await page.js(RUN_AXE)]
                wide = await page.js("document.documentElement.scrollWidth")
                if wide > width:
                    faults.append(f"{name} {width} {scheme}: is {wide} wide")
        # On a machine that does much else, a look at the database may have been given up; the page asks again.
        faults += [f"{name} logged: {line}" for line in page.logged if "503" not in line]
    assert faults == [], "\n".join(faults)
