"""The pages: what they load is served, what lies beside them is used, and what is filled in is escaped."""

import gzip
import hashlib
import re
from importlib import resources

import jinja2
import pytest

from preservarium.console import pages

FOLDER = {file.name: file for file in (resources.files("preservarium.console") / "page").iterdir()}


#: Not one of the static ones: it says why somebody was not let in.
LOGIN = pages.page("login_page.html", said="")


@pytest.fixture(scope="module")
def static():
    return pages.static()


def texts(static):
    return {path: body.decode() for path, (body, _, kind) in static.items() if kind == "text/html"}


#: In the order of the navigation; the latter ones under "More".
PAGES = [
    "/",
    "/devices",
    "/explore",
    "/alarms",
    "/refusals",
    "/registry",
    "/commands",
    "/unknown",
    "/messages",
    "/tables",
    "/lineage",
]
#: Of a page with all that it loads, packed: over a slow phone some seconds.
PAGE_BYTES_MAX = 150_000


def test_a_page_with_all_that_it_loads_is_small(static):
    for path, text in texts(static).items():
        loaded = {path, *re.findall(r'(?:src|href)="(/console/[^"]+)"', text)}
        assert sum(len(static[each][1]) for each in loaded) <= PAGE_BYTES_MAX, path


def test_what_is_packed_is_the_same(static):
    for body, packed, _ in static.values():
        assert gzip.decompress(packed) == body


def test_every_page_loads_what_is_served_and_everything_that_is_served_is_loaded(static):
    loaded = {
        target
        for text in (*texts(static).values(), LOGIN)
        for target in re.findall(r'(?:src|href)="(/console/[^"]+)"', text)
    }
    assert loaded == {path for path in static if path.startswith("/console/")}


def test_pages_lead_to_each_other_and_say_which_is_open(static):
    for path, text in texts(static).items():
        ways = re.findall(r'<a href="([^"]+)"( aria-current="page")?>', text.split("</nav>")[0].split("<nav")[1])
        assert [way for way, _ in ways] == PAGES
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


def test_no_script_takes_a_name_that_another_on_its_page_has(static):
    """Scripts of a page share one space of names: the second to declare one does not run at all."""
    declared = re.compile(r"^(?:const|let|class|(?:async )?function)\s+(?:\[([^\]]+)\]|(\w+))", re.MULTILINE)
    for path, text in texts(static).items():
        names: list[str] = []
        for source in re.findall(r'src="([^"]+)" defer', text):
            for several, one in declared.findall(static[source][0].decode()):
                names += [name.strip() for name in several.split(",")] if several else [one]
        assert len(names) == len(set(names)), (path, {name for name in names if names.count(name) > 1})


def test_every_template_is_of_a_page():
    used, waiting = set(), ["ack.html", "login_page.html", *pages._PAGES.values()]
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
    "codemirror.js": "224682724d6845116bc948a6f4f2a641193b79fced73775f26927597b3dcd8c5",
    "codemirror.LICENSE.txt": "71e882111013d9ed3cf5ad351c4842a85afdb1d6799edb2a090d8e9b24340e4d",
    "uplot.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uplot.LICENSE.txt": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


@pytest.mark.parametrize("name", VENDORED)
def test_what_others_wrote_is_as_it_was_published(name):
    assert hashlib.sha256(FOLDER[name].read_bytes()).hexdigest() == VENDORED[name]
    assert {file for file in FOLDER if file.startswith(("uplot", "codemirror"))} == set(VENDORED)
    assert b"v1.6.32" in FOLDER["uplot.js"].read_bytes()[:100]
    for licence in ("uplot.LICENSE.txt", "codemirror.LICENSE.txt"):
        assert b"Permission is hereby granted" in FOLDER[licence].read_bytes()
