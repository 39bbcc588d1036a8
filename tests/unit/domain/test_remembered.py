"""Ids that were seen lately."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.notices import HEARD_MAX
from preservarium.domain.remembered import PRINT_CHARS, Remembered


@given(st.lists(st.integers(0, 30).map(str), max_size=60), st.integers(1, 10))
def test_the_last_ones_are_known_also_after_they_were_written_down(ids: list[str], ids_max: int):
    remembered = Remembered(ids_max)
    for one in ids:
        remembered.add(one)
        remembered = Remembered(ids_max, remembered.text())
    last = list(dict.fromkeys(reversed(ids)))
    assert [one for one in last if one in remembered] == last[:ids_max]
    assert len(remembered.text()) <= ids_max * PRINT_CHARS


@pytest.mark.parametrize("text", ["ä", "abc", "!!!!!!!!", "AAAAAAA"])
def test_what_cannot_be_read_is_forgotten(text: str):
    assert Remembered(5, text).text() in ("", text[: len(text) - len(text) % PRINT_CHARS])


def test_a_thousand_ids_are_told_apart():
    remembered = Remembered(HEARD_MAX)
    for n in range(2 * HEARD_MAX):
        assert f"{n:032x}" not in remembered
        remembered.add(f"{n:032x}")
