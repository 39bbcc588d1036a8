"""Free pages go back to the system."""

import ctypes
import random
from pathlib import Path

import pytest

from preservarium import memory

STATM = Path("/proc/self/statm")


def resident_mib() -> float:
    return int(STATM.read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not STATM.exists(), reason="missing: /proc of Linux")
def test_what_lies_free_between_what_is_used_is_given_back():
    if memory._malloc_trim() is None:
        pytest.skip("missing: glibc")
    draw = random.Random(7)
    # Larger than what Python keeps in arenas of its own, smaller than what is mapped by itself.
    used = [bytes(draw.choice((700, 3_000, 12_000, 60_000))) for _ in range(8_000)]
    draw.shuffle(used)
    kept = used[:1_000]
    del used
    before = resident_mib()
    assert memory.give_back()
    assert resident_mib() < before - 50
    assert len(kept) == 1_000


def test_another_c_library_has_no_such_function(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory._malloc_trim.cache_clear()
    try:
        assert memory.give_back() is False
    finally:
        memory._malloc_trim.cache_clear()
