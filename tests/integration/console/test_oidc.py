"""Logging in by a real OpenID provider: the whole way there and back, and everything that must not let anybody in."""

import shutil
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port
from conftest import running
from oidc_support import OidcProvider, log_in_there
from yarl import URL

from preservarium.clock import ManualClock
from preservarium.console import api
from preservarium.console.people import CALLBACK_PATH, PeopleViews
from preservarium.console.replies import OPERATOR, answer, wrapped
from preservarium.serving import server, sessions
from preservarium.serving.rights import Right
from preservarium.settings import Web

SECRET = "a secret of this test, long enough"
ROLES = "plant-admins=admin,plant=operator,guests=viewer"


@pytest.fixture(scope="module")
def console_port():
    return unused_port()


@pytest.fixture(scope="module")
def provider(tmp_path_factory, console_port):
    if shutil.which("node") is None:
        pytest.skip("missing: Node.js for the OpenID provider of the tests (Debian: apt install nodejs npm)")
    directory = tmp_path_factory.mktemp("oidc")
    yield from running(OidcProvider(directory, f"http://127.0.0.1:{console_port}{CALLBACK_PATH}"))


class Console:
    """The views of people on a port of their own, which the provider sends browsers back to."""

    def __init__(self, port: int, **settings: Any) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.told: list[tuple[str, str, dict[str, Any]]] = []
        self.settings = SimpleNamespace(web=Web(**settings))
        self.clock, self.waiting = ManualClock(), 0

    def live(self) -> Any:
        return self.settings

    def tell(self, event: str, name: str, **data: Any) -> None:
        self.told.append((event, name, data))

    async def start(self, port: int) -> None:
        application = web.Application()
        self.runner = server.install(application, self.live)
        me: Any = self
        PeopleViews(me, me, me).mount(application)

        async def who(request: web.Request) -> web.Response:
            return answer({"who": request[OPERATOR]})

        application.router.add_get("/api/operate", wrapped(who, Right.OPERATE, self.live))
        api.mount(application)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", port).start()


@pytest.fixture
async def console(provider, console_port):
    made = Console(
        console_port, oidc_issuer=provider.issuer, oidc_client_id="console", oidc_client_secret=SECRET, oidc_roles=ROLES
    )
    await made.start(console_port)
    yield made
    await made.runner.cleanup()


@pytest.fixture
async def browser():
    # Cookies of 127.0.0.1 are of all its ports, as in a browser.
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as made:
        yield made


async def leave(browser, console, path="/login/oidc?next=/devices%3Fq%3Da"):
    async with browser.get(console.url + path, allow_redirects=False) as response:
        assert response.status == 302, await response.text()
        return response.headers["Location"]


async def come_back(browser, url):
    async with browser.get(url, allow_redirects=False) as response:
        return response.status, response.headers.get("Location"), await response.text()


async def whole_way(browser, console, account, **options):
    there = await leave(browser, console)
    return await come_back(browser, await log_in_there(browser, there, account, until=console.url, **options))


async def session_of(browser, console):
    async with browser.get(f"{console.url}/api/v1/session") as response:
        return await response.json()


@pytest.mark.parametrize(
    ("account", "role", "operates"),
    [("ann.plant", "operator", 200), ("vera.guests", "viewer", 403), ("ada.guests.plant-admins.others", "admin", 200)],
)
async def test_whom_the_provider_knows_gets_the_role_that_the_claim_makes(console, browser, account, role, operates):
    there = await leave(browser, console)
    asked = {name: value for name, (value,) in parse_qs(urlsplit(there).query).items()}
    assert (asked["response_type"], asked["code_challenge_method"]) == ("code", "S256")
    assert min(len(asked[name]) for name in ("state", "nonce", "code_challenge")) >= 20
    status, to, _ = await whole_way(browser, console, account)
    assert (status, to) == (302, "/devices?q=a")
    said = await session_of(browser, console)
    assert (said["name"], said["role"], said["how"]) == (account.partition(".")[0], role, "oidc")
    async with browser.get(f"{console.url}/api/v1/operate") as response:
        assert response.status == operates
    event, name, data = console.told[-1]
    assert (event, name, data["how"], data["subject"], data["issuer"]) == (
        "logged_in", said["name"], "oidc", account, console.settings.web.oidc_issuer,
    )  # fmt: skip
    # Another provider, or none, ends it.
    console.settings.web = console.settings.web.model_copy(update={"oidc_client_id": "public"})
    assert (await session_of(browser, console))["name"] is None


async def test_the_role_may_stand_deep_in_a_claim_and_a_client_may_be_public(console, browser):
    console.settings.web = console.settings.web.model_copy(
        update={
            "oidc_role_claim": "realm_access.roles",
            "oidc_client_id": "public",
            "oidc_client_secret": Web().oidc_client_secret,
        }
    )
    assert (await whole_way(browser, console, "ann.plant"))[0] == 302
    assert (await session_of(browser, console))["role"] == "operator"


@pytest.mark.parametrize(
    ("account", "why"),
    [("eve", "eve may not"), ("eve.root.admin", "eve may not"), ("nameless.plant", "does not say your name")],
)
async def test_who_has_no_role_or_no_name_here_is_not_let_in_and_hears_why(console, browser, account, why):
    status, _, text = await whole_way(browser, console, account)
    assert status == 403
    assert why in text
    assert (await session_of(browser, console))["name"] is None
    assert console.told[-1][:2] == ("login_refused", "?")
    console.settings.web = console.settings.web.model_copy(update={"oidc_default_role": "viewer"})
    if account == "eve":
        assert (await whole_way(browser, console, account))[0] == 302
        assert (await session_of(browser, console))["role"] == "viewer"


async def test_who_does_not_consent_is_not_let_in(console, browser):
    there = await leave(browser, console)
    back = await log_in_there(browser, there, "ann.plant", until=console.url, allow=False)
    assert "error=access_denied" in back
    status, _, text = await come_back(browser, back)
    assert status == 401
    assert "access_denied" in text


async def test_a_code_counts_once_and_in_the_browser_that_left(console, browser):
    there = await leave(browser, console)
    back = await log_in_there(browser, there, "ann.plant", until=console.url)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as victim:
        # Somebody else's way back, in a browser that never left: it would be logged in as that somebody.
        assert (await come_back(victim, back))[0] == 400
        await leave(victim, console)
        assert (await come_back(victim, back))[0] == 400
        assert (await session_of(victim, console))["name"] is None
    query = {name: value for name, (value,) in parse_qs(urlsplit(back).query).items()}
    for wrong in ({"state": "x"}, {"state": ""}, {"iss": "https://evil.example"}, {"code": "x" * 43}):
        kept = {c.key: c.value for c in browser.cookie_jar if c.key == sessions.FLOW_COOKIE}
        status, _, _ = await come_back(browser, f"{console.url}{CALLBACK_PATH}?{urlencode({**query, **wrong})}")
        assert status in (400, 403), wrong
        browser.cookie_jar.update_cookies(kept, URL(f"{console.url}{CALLBACK_PATH}"))
    assert (await session_of(browser, console))["name"] is None


@pytest.mark.parametrize(
    "update",
    [{"oidc_client_secret": "wrong"}, {"oidc_client_id": "elsewhere"}],
)
async def test_wrong_credentials_of_ours_let_nobody_in(console, browser, update):
    there = await leave(browser, console)
    back = await log_in_there(browser, there, "ann.plant", until=console.url)
    changed = {
        name: Web(**{name: value}).__getattribute__(name) if "secret" in name else value
        for name, value in update.items()
    }
    console.settings.web = console.settings.web.model_copy(update=changed)
    status, _, text = await come_back(browser, back)
    assert status == 403, text
    assert "does not prove who you are" in text
    assert SECRET not in text


async def test_an_issuer_that_is_not_there_or_calls_itself_otherwise_is_said(console, browser, provider):
    for issuer, why in (
        (f"http://127.0.0.1:{unused_port()}", "does not answer"),
        (provider.issuer.replace("127.0.0.1", "localhost"), "must be exactly that"),
    ):
        console.settings.web = console.settings.web.model_copy(update={"oidc_issuer": issuer})
        async with browser.get(f"{console.url}/login/oidc", allow_redirects=False) as response:
            assert response.status == 503
            assert why in await response.text()
