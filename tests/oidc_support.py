"""A real OpenID provider: panva's oidc-provider, certified by the OpenID Foundation, from npm once per user."""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urljoin

import aiohttp

from preservarium.embedded.kafka import cache_directory
from preservarium.embedded.service import Service, ServiceUnavailable, port_answers

FOLDER: Final = Path(__file__).with_name("oidc")
INSTALL_S: Final = 180.0
#: Pages of a log-in at the provider: its form, its consent, and redirects between.
STEPS_MAX: Final = 12


class OidcProvider(Service):
    """One process; it keeps nothing."""

    name = "oidc-provider"
    start_s = 30.0
    stop_s = 5.0

    def __init__(self, directory: str | Path, redirect_uri: str) -> None:
        super().__init__(directory)
        self.port = 0
        self._redirect_uri = redirect_uri
        self._node = ""
        self._installed = Path()

    @property
    def issuer(self) -> str:
        """As it calls itself."""
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Fetch it where it is not here yet, and take a port."""
        self._node, npm = shutil.which("node") or "", shutil.which("npm")
        if not self._node:
            message = "Node.js for the OpenID provider of the tests (Debian: apt install nodejs npm)"
            raise ServiceUnavailable(message)
        lock = hashlib.sha256((FOLDER / "package-lock.json").read_bytes()).hexdigest()[:12]
        self._installed = cache_directory("").with_name(f"test-oidc-provider-{lock}")
        if not (self._installed / "done").exists():
            if npm is None:
                message = "npm, which fetches the OpenID provider of the tests (Debian: apt install npm)"
                raise ServiceUnavailable(message)
            self._install(npm)
        self.port = self.remembered_port()

    def _install(self, npm: str) -> None:
        self._installed.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(FOLDER / name, self._installed)
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        try:
            done = subprocess.run(
                command, cwd=self._installed, capture_output=True, text=True, timeout=INSTALL_S, check=False
            )
        except subprocess.TimeoutExpired:
            message = "the OpenID provider of the tests: npm took too long"
            raise ServiceUnavailable(message) from None
        if done.returncode:
            message = f"the OpenID provider of the tests: npm could not fetch it: {done.stderr.strip()[-200:]}"
            raise ServiceUnavailable(message)
        (self._installed / "done").touch()

    def command(self) -> Sequence[str]:
        """The server. Its modules are looked for beside the script, so it lies beside them."""
        script = self._installed / "provider.mjs"
        shutil.copy(FOLDER / "provider.mjs", script)
        return [self._node, str(script), str(self.port), self._redirect_uri]

    def healthy(self) -> bool:
        """Whether its port is open."""
        return port_answers(self.port)


async def log_in_there(http: aiohttp.ClientSession, url: str, account: str, *, until: str, allow: bool = True) -> str:
    """Do at the provider what somebody in a browser does; the address that it sends them back to.

    Args:
        http: with a cookie jar of its own.
        url: where the console sent the browser.
        account: whom to log in as.
        until: what the address begins with at which the provider lets go.
        allow: whether the person consents.
    """
    form: dict[str, Any] | None = None
    for _ in range(STEPS_MAX):
        if url.startswith(until):
            return url
        async with http.request("POST" if form else "GET", url, data=form, allow_redirects=False) as response:
            text, form = await response.text(), None
            if response.status in (302, 303):
                url = urljoin(url, response.headers["Location"])
                continue
        assert response.status == 200, (response.status, url, text[:500])
        if not allow and 'href="' in text and "abort" in text:
            url = urljoin(url, re.search(r'href="([^"]+/abort)"', text)[1])  # type: ignore[index]
            continue
        url = urljoin(url, re.search(r'action="([^"]+)"', text)[1])  # type: ignore[index]
        prompt = re.search(r'name="prompt" value="(\w+)"', text)[1]  # type: ignore[index]
        form = {"prompt": prompt, **({"login": account, "password": "any"} if prompt == "login" else {})}
    message = f"the provider did not let go: {url}"
    raise AssertionError(message)
