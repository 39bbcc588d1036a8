import re
from pathlib import Path

from preservarium.domain import expressions
from preservarium.domain.decoders import field_table

TEXT = (Path(__file__).parents[2] / "docs" / "FIELD_TABLES.md").read_text()


def test_the_page_names_every_key_and_function():
    words = set(re.findall(r"[a-z_0-9]+", TEXT))
    keys = (
        field_table._FIELD_KEYS
        | field_table._PART_KEYS
        | field_table._GROUP_KEYS
        | field_table._REPEAT_KEYS
        | field_table._CHOICE_KEYS
        | field_table._TABLE_KEYS
    )
    assert keys - words == {"description"}
    assert expressions.FUNCTIONS.keys() - words == set()
