"""The reference pages say what the declarations say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agents import AGENTS
from preservarium import topics
from preservarium.cli import reference
from preservarium.errors import ReasonCode

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs" / "reference"
MADE = ("errors.md", "metrics.md", "settings.md", "stages.md", "tables.md", "topics.md")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pages, made where another process's settings differ from the defaults: the app of a process is made once."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / ".env").write_text("PRESERVARIUM_KAFKA__GROUP=other\n")
    settings = {"PRESERVARIUM_CLICKHOUSE__ENABLED": "false", "PRESERVARIUM_KAFKA__GROUP": "another", "BATCH_SIZE": "1"}
    subprocess.run(
        [sys.executable, "-m", "preservarium.cli.reference", str(folder)],
        cwd=folder,
        env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return folder


@pytest.mark.parametrize("name", MADE)
def test_page_equals_the_declarations(made, name):
    assert (DOCS / name).read_text(encoding="utf-8") == (made / name).read_text(encoding="utf-8"), (
        "run `python -m preservarium.cli.reference` and commit docs/reference/"
    )


def test_every_page_that_is_made_is_compared(made):
    assert {path.name for path in made.glob("*.md")} == set(MADE)
    assert set(reference.PAGES) < set(MADE)


def test_every_agent_topic_and_table_has_its_place(made):
    stages, tables = ((made / name).read_text(encoding="utf-8") for name in ("stages.md", "tables.md"))
    for agent in AGENTS:
        assert f"`agents/{agent}.py`: " in stages
    for name in (path.stem for path in (ROOT / "tables").glob("*.py") if path.stem != "__init__"):
        assert f"| `{name}` | `tables/{name}.py` |" in tables
        assert f"| `{name}` |" in stages, "a state that no stage declares is written by nobody"
    rows = [line.split(" | ") for line in (made / "topics.md").read_text(encoding="utf-8").splitlines()]
    named = {row[0].removeprefix("| ").strip("`"): row[-2:] for row in rows if row[0].startswith("| `")}
    assert list(named) == list(topics.BY_NAME)
    for name, (writers, readers) in named.items():
        assert "–" not in (writers, readers.removesuffix(" |")), f"{name}: nobody writes or reads it"


def test_every_reason_code_has_a_meaning():
    assert set(reference.error_codes()) == {code.value for code in ReasonCode}
