"""The reference pages say what the code says."""

from pathlib import Path

import pytest

from preservarium import reference
from preservarium.domain.errors import ReasonCode

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", sorted(reference.PAGES))
def test_page_equals_the_code(name):
    assert (DOCS / name).read_text(encoding="utf-8") == reference.PAGES[name](), (
        "run `python -m preservarium.reference` and commit docs/"
    )


def test_every_reason_code_has_a_meaning():
    assert set(reference.error_codes()) == {code.value for code in ReasonCode}
