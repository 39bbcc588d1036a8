"""The documents name nothing that there is not: metrics, settings, stages, files, links."""

import re
import tomllib
from pathlib import Path

import pytest

from preservarium import metrics, settings, topics

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = ("preservarium", "agents", "tables", "docs", "examples", "migrations", "tests", "bench")
FILES = [path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.*")]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.parametrize("name", TEXTS)
def test_metrics_and_settings_that_are_named_exist(name):
    known = {field.variable for field in settings.fields()}
    sections = {field.section for field in settings.fields()}
    defaults = {field.default for field in settings.fields()}
    for metric in re.findall(r"\bpreservarium_[a-z_]+[a-z]\b", TEXTS[name]):
        assert metric in metrics.CATALOGUE or metric in defaults
    for variable in re.findall(r"\bPRESERVARIUM_[A-Z_]+[A-Z]\b", TEXTS[name]):
        assert {variable, variable.removesuffix("_FILE")} & known, variable
    for section, field in re.findall(r"`([a-z]+)\.([a-z_]+)`", TEXTS[name]):
        if section in sections:
            assert f"PRESERVARIUM_{section.upper()}__{field.upper()}" in known


def anchors(text):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", TEXTS[name]):
        assert (page.parent / target).exists(), target
        if anchor:
            assert anchor in anchors((page.parent / target if target else page).read_text(encoding="utf-8")), anchor


def paths_in(text):
    """Wherever a path begins that is of this tree: in a sentence, a table, a picture or a command, but not in a literal."""
    found = re.findall(rf"(?<![\w./:\"'{{}}$-])(?:{'|'.join(ROOMS)})/[\w./*{{}},-]*", text)
    return [path.rstrip(".,-").rstrip("/") for path in found]


@pytest.mark.parametrize("name", TEXTS)
def test_paths_and_files_that_are_named_exist(name):
    for path in paths_in(TEXTS[name]):
        assert list(ROOT.glob(path)), path
    for file in re.findall(r"`([\w/.-]+\.(?:py|sql|js|html|css))`", TEXTS[name]):
        assert any(f"/{each}".endswith(f"/{file}") for each in FILES), file


def test_paths_that_comments_in_the_code_name_exist():
    # A migration is never edited once released: what it names may have moved since.
    code = [
        file
        for file in FILES
        if file.endswith((".py", ".js", ".html", ".css", ".yaml", ".jinja")) and "migrations/" not in file
    ]
    gone = [
        (file, path)
        for file in [*code, "pyproject.toml", "Makefile", "Procfile", "Dockerfile", "compose.yaml", ".env.example"]
        for path in paths_in((ROOT / file).read_text(encoding="utf-8"))
        if not set("{}") & set(path) and not list(ROOT.glob(path))
    ]
    assert gone == []


def test_topics_that_are_named_are_declared():
    for text in TEXTS.values():
        for topic in re.findall(r"\biot_(?!measurements)\w+", text):
            assert topic in topics.BY_NAME, topic


def test_the_map_has_every_folder_and_the_layers_in_the_order_of_their_imports():
    text = TEXTS["docs/ARCHITECTURE.md"].split("## The map")[1].split("\n## ")[0]
    picture, table = text.split("```")[1], text.split("```")[2]
    rooms = {path.parent.name for path in (ROOT / "preservarium").glob("*/__init__.py")}
    for room in rooms:
        assert f"| `preservarium/{room}/` |" in table, room
    places = {}
    for row, line in enumerate(picture.strip().splitlines()):
        for name in re.findall(r"\w+", line.split("│")[0]):  # in words behind it
            places.setdefault(name, row)
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = [re.findall(r"\w+", layer) for layer in contract[0]["layers"]]
    rows = [{places[name] for name in layer} for layer in layers]
    assert all(len(row) == 1 for row in rows), "rooms of one layer stand in one line"
    order = [row.pop() for row in rows]
    assert order == sorted(set(order)), "an upper line imports a lower one"
    assert set(places) == {name for layer in layers for name in layer} | {"agents", "tables"}
    assert places["cli"] < places["agents"] == places["tables"] < places["stages"]


def test_readme_is_short_before_the_reader_has_seen_it_run():
    lines = TEXTS["README.md"].splitlines()
    head = "\n".join(lines[:62])
    for needed in ("make run", "make test", "curl", "adds up: yes", "iot_raw_data"):
        assert needed in head
    assert max(map(len, lines)) <= 160
