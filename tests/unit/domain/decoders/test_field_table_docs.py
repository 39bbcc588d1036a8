import re
from pathlib import Path

from preservarium.domain import expressions
from preservarium.domain.decoders.field_table import language

TEXT = (Path(__file__).parents[4] / "docs" / "FIELD_TABLES.md").read_text()


def test_the_page_names_every_key_and_function():
    words = set(re.findall(r"[a-z_0-9]+", TEXT))
    keys = (
        language.FIELD_KEYS
        | language.PART_KEYS
        | language.GROUP_KEYS
        | language.REPEAT_KEYS
        | language.CHOICE_KEYS
        | language.TABLE_KEYS
    )
    assert keys - words == {"description"}
    assert expressions.FUNCTIONS.keys() - words == set()
