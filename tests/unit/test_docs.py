"""The documents name nothing that there is not: metrics, settings, stages, files, links."""

import re
from pathlib import Path

import pytest

from preservarium import metrics, settings, topics

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.parametrize("name", TEXTS)
def test_metrics_and_settings_that_are_named_exist(name):
    known = {field.variable for field in settings.fields()}
    sections = {field.section for field in settings.fields()}
    for metric in re.findall(r"\bpreservarium_[a-z_]+[a-z]\b", TEXTS[name]):
        assert metric in metrics.CATALOGUE
    for variable in re.findall(r"\bPRESERVARIUM_[A-Z_]+[A-Z]\b", TEXTS[name]):
        assert {variable, variable.removesuffix("_FILE")} & known, variable
    for section, field in re.findall(r"`([a-z]+)\.([a-z_]+)`", TEXTS[name]):
        if section in sections:
            assert f"PRESERVARIUM_{section.upper()}__{field.upper()}" in known


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_paths_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name]):
        assert (page.parent / target).exists(), target
    for path in re.findall(
        r"`((?:preservarium|agents|tables|docs|examples|migrations|tests|bench)/[\w./-]+)`", TEXTS[name]
    ):
        assert (ROOT / path).exists(), path


def test_topics_that_are_named_are_declared():
    for text in TEXTS.values():
        for topic in re.findall(r"\biot_(?!measurements)\w+", text):
            assert topic in topics.BY_NAME, topic


def test_every_stage_stands_in_the_architecture():
    declared = set()
    for file in (ROOT / "agents").glob("*.py"):
        declared |= set(re.findall(r'name="([a-z-]+)"', file.read_text(encoding="utf-8")))
    assert declared
    table = [line for line in TEXTS["docs/ARCHITECTURE.md"].splitlines() if "| agents/" in line]
    named = {name.strip() for line in table for name in line.split("|")[1].split(",")}
    assert declared <= named


def test_readme_is_short_before_the_reader_has_seen_it_run():
    lines = TEXTS["README.md"].splitlines()
    head = "\n".join(lines[:62])
    for needed in ("make run", "make test", "curl", "adds up: yes", "iot_raw_data"):
        assert needed in head
    assert max(map(len, lines)) <= 160
