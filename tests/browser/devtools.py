"""A real, headless Chromium driven through its own DevTools protocol: no driver, no download, one websocket."""

import asyncio
import base64
import contextlib
import itertools
import re
import shutil
import tempfile
import time
from pathlib import Path

import aiohttp

#: Chromium's start on a busy machine.
START_S = 60.0
CALL_S = 30.0
#: What moves focus or closes a dialog does so by its code.
VIRTUAL_KEYS = {"Tab": 9, "Escape": 27}

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--remote-allow-origins=*", "--hide-scrollbars", "--mute-audio",
)  # fmt: skip


def find() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    return None


class Page:
    """One tab: `go`, `js`, `until`, `key`, `screenshot`; what the page logged stands in `logged`."""

    def __init__(self, socket, session):
        self._socket = socket
        self._session = session
        self._ids = itertools.count(1)
        self._waiting = {}
        self.logged = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self._socket:
            data = message.json()
            if "id" in data and (future := self._waiting.pop(data["id"], None)) and not future.done():
                future.set_result(data)
            elif data.get("method") == "Runtime.exceptionThrown":
                details = data["params"]["exceptionDetails"]
                self.logged.append(details.get("exception", {}).get("description") or details["text"])
            elif data.get("method") == "Log.entryAdded":
                self.logged.append(data["params"]["entry"]["text"])

    async def call(self, method, **parameters):
        number = next(self._ids)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        await self._socket.send_json(command)
        answer = await asyncio.wait_for(future, CALL_S)
        assert "error" not in answer, answer
        return answer["result"]

    async def js(self, expression):
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression, timeout_s=60.0):
        deadline = time.monotonic() + timeout_s
        while not (value := await self.js(expression)):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {expression}"
            await asyncio.sleep(0.05)
        return value

    async def go(self, url):
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def size(self, width, height, *, mobile=False, scale=1):
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=mobile
        )

    async def scheme(self, name):
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    async def key(self, key, text=""):
        for kind in ("keyDown", "keyUp"):
            parameters = {"type": kind, "key": key, "code": key if len(key) > 1 else ""}
            if kind == "keyDown" and text:
                parameters["text"] = text
            if key in VIRTUAL_KEYS:
                parameters["windowsVirtualKeyCode"] = VIRTUAL_KEYS[key]
            await self.call("Input.dispatchKeyEvent", **parameters)

    async def screenshot(self, path: Path, *, whole=True):
        """The whole page, or what is seen of it at once."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def close(self):
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading


@contextlib.asynccontextmanager
async def chromium(executable):
    """Start it, open a tab, end it."""
    profile = tempfile.mkdtemp(prefix="preservarium-chromium-")
    process = await asyncio.create_subprocess_exec(
        executable, *FLAGS, f"--user-data-dir={profile}", "about:blank",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(START_S):
            while True:
                line = (await process.stderr.readline()).decode(errors="replace")
                assert line, "Chromium ended while starting"
                if found := re.search(r"DevTools listening on (ws://\S+)", line):
                    break
        draining = asyncio.create_task(process.stderr.read())
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(found[1], max_msg_size=64 << 20) as socket,
        ):
            browser = Page(socket, None)
            target = await browser.call("Target.createTarget", url="about:blank")
            attached = await browser.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            await browser.close()
            page = Page(socket, attached["sessionId"])
            page._ids = itertools.count(1000)
            for domain in ("Page", "Runtime", "Log"):
                await page.call(f"{domain}.enable")
            yield page
            await page.call("Browser.close")
            await page.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            if process.returncode is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 10)
            if process.returncode is None:
                process.kill()
        await process.wait()
        with contextlib.suppress(NameError):
            draining.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await draining
        shutil.rmtree(profile, ignore_errors=True)


def text_of(selector: str) -> str:
    """What a person reads there: a script."""
    return f"document.querySelector({selector!r}).innerText"


#: Texts that stand out less than WCAG 1.4.3 asks for, 4.5 to 1: a script.
LOW_CONTRAST = """(() => {
          const light = (c) => { const v = c.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
            .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
          const ground = (e) => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255, 255, 255)"; };
          const low = [];
          for (const e of document.querySelectorAll("body *")) {
            if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !e.checkVisibility()) continue;
            if (e.disabled || e.closest(".hidden")) continue;
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
            if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${e.tagName}.${e.className}: ${e.textContent.slice(0, 30)}`);
          }
          return low; })()"""
