"""Logging in, in a real Chromium: from a page there and back, acting under the name that is proven, and out again."""

import pytest
from devtools import text_of
from test_alarms_page import ROWS, fill
from test_console_page import READY, shot, site

from preservarium.serving import people
from preservarium.serving.people_file import edited
from preservarium.settings import Web

pytestmark = pytest.mark.browser

__all__ = ["site"]

PASSWORD = "correct horse battery"


@pytest.fixture
def users(site, tmp_path):
    path = tmp_path / "users.json"
    with edited(path) as document:
        document["users"] = {
            name: {"role": role, "password": people.hashed(PASSWORD)}
            for name, role in (("ann", "operator"), ("vera", "viewer"))
        }
    site.settings.web = Web(users_file=str(path))
    return path


async def arrived(page, expression):
    """Wait for it through pages that give way to each other meanwhile."""
    while True:
        try:
            return await page.until(expression)
        except AssertionError as e:
            if "navigated" not in str(e) and "context" not in str(e):
                raise


async def enter(page, name, password=PASSWORD):
    await arrived(page, "document.getElementById('by-password')?.hidden === false")
    await page.js(
        f"document.getElementById('name').value = {name!r}; document.getElementById('password').value = {password!r}"
    )
    await page.js("document.getElementById('enter').click()")


async def test_who_is_not_logged_in_is_led_there_and_back_and_acts_under_that_name(page, site, users):
    fill(site)
    await page.go(f"{site.url}alarms?q=")
    await page.until("!document.getElementById('l-in').hidden && !document.getElementById('login').hidden")
    # There are no tokens, so none is asked for.
    assert await page.js("document.getElementById('l-token').hidden")
    assert await page.js(f"{ROWS}.length") == 0
    await page.js("document.getElementById('l-in').click()")
    await enter(page, "ann", "not her password")
    await page.until("!document.getElementById('fault').hidden")
    assert await page.js(text_of("#fault")) == "the name or the password is wrong"
    assert await page.js("document.activeElement.id") == "password"
    await enter(page, "ann")
    await arrived(page, f"location.pathname === '/alarms' && {ROWS}.length === 7")
    assert await page.js(text_of("#who")) == "ann, operator"
    await page.js(f"{ROWS}[0].querySelector('[data-action=acknowledge]').click()")
    assert (
        await page.js("document.getElementById('d-actor').value + document.getElementById('d-actor').readOnly")
        == "anntrue"
    )
    await page.js("document.getElementById('d-do').click()")
    await page.until("!document.getElementById('dialog').open")
    assert b'"actor":"ann"' in site.sent[0].value
    # No script sees the cookie.
    assert await page.js("document.cookie") == ""
    await page.js("document.getElementById('log-out').click()")
    await arrived(page, "document.getElementById('by-password')?.hidden === false")
    assert await page.js(text_of("#said")) == "You have logged out."
    await page.go(f"{site.url}alarms")
    await page.until("!document.getElementById('login').hidden")
    assert await page.js(f"{ROWS}.length") == 0


async def test_a_viewer_sees_and_does_not_act(page, site, users):
    await page.go(f"{site.url}login?next=/")
    await enter(page, "vera")
    await arrived(page, f"location.pathname === '/' && {READY}")
    await page.js("resetFuse('sink')")
    await page.until("!document.getElementById('guards-note').hidden")
    assert "this is for an operator: vera is viewer" in await page.js(text_of("#guards-note"))


async def test_the_page_to_log_in_is_whole_in_both_themes_and_on_a_phone(page, site, users):
    for width, scheme in ((1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")):
        await page.size(width, 900)
        await page.scheme(scheme)
        await page.go(f"{site.url}login")
        await page.until("!document.getElementById('by-password').hidden")
        assert await page.js("document.documentElement.scrollWidth <= innerWidth")
        await shot(page, f"login-{scheme}-{width}.png")
    assert await page.js("document.activeElement.id") == "name"
    assert await page.js("[...document.querySelectorAll('input')].every(i => i.labels.length === 1)")
    assert page.logged == []


async def test_after_the_log_in_nobody_is_sent_to_a_strangers_page(page, site, users):
    for wanted in ("https://evil.example/", "//evil.example/", "/\\\\evil.example", "javascript:alert(1)"):
        await page.go(f"{site.url}login?said=out")
        await page.until("!document.getElementById('by-password').hidden")
        await page.js(f"history.replaceState(null, '', '/login?' + new URLSearchParams({{ next: '{wanted}' }}))")
        assert await page.js("target()") == "/"


async def test_where_nobody_is_configured_the_page_says_so(page, site):
    await page.go(f"{site.url}login")
    await page.until("!document.getElementById('nobody').hidden")
    assert await page.js("document.getElementById('by-password').hidden")
