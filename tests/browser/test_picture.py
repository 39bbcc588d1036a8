"""The console of a whole running system: what README shows. `PICTURE=docs/console.png` keeps the picture there."""

import asyncio
import os
import signal
import struct
from pathlib import Path

import pytest
from up_support import Run

pytestmark = [pytest.mark.browser, pytest.mark.kafka, pytest.mark.postgres, pytest.mark.clickhouse]

#: README is opened again and again, and a repository keeps every version.
PICTURE_BYTES_MAX = 200_000
#: Of the window, and how much of it a pixel of the picture is: as wide as a page that shows it.
WIDTH, HEIGHT, SCALE = 1440, 900, 0.75

#: Readings have flowed for long enough to make curves, both stores have rows, and alarms stand: a script.
ALIVE = r"""(() => {
  const at = (name, part) => [...document.querySelectorAll('.stage')].find((s) => s.querySelector('h3 span').textContent === name)?.querySelector(part).innerText;
  return document.getElementById('health').textContent === 'healthy' && /up ([4-9]\d s|\d+ min)/.test(document.getElementById('worker').textContent)
    && at('Connectors', '.mark') === 'sending' && ['normalize', 'validate', 'alarm', 'sink', 'sync'].every((name) => at(name, '.mark') === 'running')
    && ['PostgreSQL', 'ClickHouse'].every((name) => at(name, '.detail').includes('stored'))
    && document.querySelectorAll('#alarms li .severity').length >= 3 && document.querySelectorAll('#refused .line').length >= 1
    && Number(document.querySelector('#fleet a.good b')?.textContent) > 40;
})()"""


async def test_the_console_of_a_running_system_as_readme_shows_it(page, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("up"), "--rate=50")
    try:
        await asyncio.to_thread(run.said, "devices send")
        await page.size(WIDTH, HEIGHT, scale=SCALE)
        await page.scheme("light")
        await page.go(f"http://127.0.0.1:{run.port}/")
        await page.until(ALIVE, 180)
        # Which machine made the picture is nobody's concern.
        await page.js(
            "const w = document.getElementById('worker'); w.textContent = w.textContent.replace(/^[^:]*/, 'worker')"
        )
        kept = Path(os.environ.get("PICTURE") or tmp_path_factory.mktemp("picture") / "console.png")
        await page.screenshot(kept, whole=False)
        # On a machine that does much else, a look at the database may have been given up; the page asks again.
        assert [line for line in page.logged if "503" not in line] == []
        run.process.send_signal(signal.SIGINT)
        code, _ = await asyncio.to_thread(run.end)
        assert code == 0
    finally:
        run.process.kill()
    picture = kept.read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (round(WIDTH * SCALE), round(HEIGHT * SCALE))
    assert len(picture) < PICTURE_BYTES_MAX
