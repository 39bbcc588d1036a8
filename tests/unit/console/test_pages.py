"""The pages: what they load is served, what lies beside them is used, and what is filled in is escaped."""

import hashlib
import re
from importlib import resources

import jinja2
import pytest

from preservarium.console import pages

FOLDER = {file.name: file for file in (resources.files("preservarium.console") / "page").iterdir()}


@pytest.fixture(scope="module")
def static():
    return pages.static()


def texts(static):
    return {path: body.decode() for path, (body, kind) in static.items() if kind == "text/html"}


def test_every_page_loads_what_is_served_and_everything_that_is_served_is_loaded(static):
    loaded = {
        target for text in texts(static).values() for target in re.findall(r'(?:src|href)="(/console/[^"]+)"', text)
    }
    assert loaded == {path for path in static if path.startswith("/console/")}


def test_pages_lead_to_each_other_and_say_which_is_open(static):
    for path, text in texts(static).items():
        ways = re.findall(r'<a href="([^"]+)"( aria-current="page")?>', text.split("</nav>")[0].split("<nav")[1])
        assert [way for way, _ in ways] == ["/", "/devices", "/alarms", "/refusals", "/commands"]
        # One device is no page of its own there.
        assert [way for way, here in ways if here] == ([path] if path != pages.DEVICE else [])


def test_every_id_stands_once(static):
    for text in texts(static).values():
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert {"theme", "clock", "login"} <= set(ids)


def test_what_scripts_ask_for_by_id_is_there(static):
    """An id that is made by a script has a `$` or is set in one."""
    for path, text in texts(static).items():
        scripts = "".join(static[name][0].decode() for name in re.findall(r'src="([^"]+)"', text))
        there = set(re.findall(r'\bid="([^"]+)"', text))
        asked = set(re.findall(r'\$\("([\w-]+)"\)', scripts))
        shared = set(re.findall(r'\$\("([\w-]+)"\)', static["/console/common.js"][0].decode()))
        assert asked - shared <= there, path


def test_every_template_is_of_a_page():
    used, waiting = set(), ["ack.html", *pages._PAGES.values()]
    while waiting:
        name = waiting.pop()
        used.add(name)
        waiting += re.findall(r'{% (?:extends|include) "([^"]+)" %}', FOLDER[name].read_text(encoding="utf-8"))
    assert used == {name for name in FOLDER if name.endswith(".html")}


def test_what_is_filled_in_is_escaped_and_nothing_is_left_out():
    said = pages.page("ack.html", opened=None, alarm=None, said="<b>&", token="", path="/ack")
    assert "&lt;b&gt;&amp;" in said
    assert '<meta name="robots" content="noindex">' in said
    with pytest.raises(jinja2.UndefinedError):
        pages.page("ack.html", opened=None, alarm=None, said="", token="t")


#: What is taken over as it was published, uPlot 1.6.32 (MIT): a change would be lost with the next version, and a swap is not ours.
VENDORED = {
    "uplot.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uplot.LICENSE.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


@pytest.mark.parametrize("name", VENDORED)
def test_what_others_wrote_is_as_it_was_published(name):
    assert hashlib.sha256(FOLDER[name].read_bytes()).hexdigest() == VENDORED[name]
    assert {file for file in FOLDER if file.startswith("uplot")} == set(VENDORED)
    assert b"v1.6.32" in FOLDER["uplot.js"].read_bytes()[:100]
    assert b"Permission is hereby granted" in FOLDER["uplot.LICENSE.txt"].read_bytes()
