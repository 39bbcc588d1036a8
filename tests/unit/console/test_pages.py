"""The pages: what they load is served, what lies beside them is used, and what is filled in is escaped."""

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
        ways = re.findall(r'<a href="([^"]+)"( aria-current="page")?>', text.split("</nav>")[0])
        assert [way for way, _ in ways] == ["/", "/alarms", "/commands"]
        assert [way for way, here in ways if here] == [path]


def test_every_id_stands_once(static):
    for text in texts(static).values():
        ids = re.findall(r'\bid="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert {"theme", "clock", "search", "search-form", "previous", "next", "page"} <= set(ids)


def test_what_scripts_ask_for_by_id_is_there(static):
    """An id that is made by a script has a `$` or is set in one."""
    for path, text in texts(static).items():
        scripts = "".join(static[name][0].decode() for name in re.findall(r'src="([^"]+)"', text))
        there = set(re.findall(r'\bid="([^"]+)"', text))
        asked = set(re.findall(r'\$\("([\w-]+)"\)', scripts))
        shared = set(re.findall(r'\$\("([\w-]+)"\)', static["/console/common.js"][0].decode()))
        assert asked - shared <= there, path


def test_every_template_is_of_a_page():
    used, waiting = set(), ["ack.html", "index.html", "alarms.html", "commands.html"]
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
