"""Corrections of stored readings: exact numbers, quality judged again, counters that follow."""

from fractions import Fraction

import pytest

from preservarium.domain.quality import correction
from preservarium.domain.quality.checks import CheckCompiler, SeriesCheck
from preservarium.domain.quality.correction import CorrectionError, Row
from preservarium.domain.quality.counter import Counter, Swap
from preservarium.domain.readings.reading import Quality

S = 1_000_000
BOUNDED = CheckCompiler(
    {
        "t": {
            "name": "t",
            "kind": "number",
            "unit": "°C",
            "fail_span": {"min": -40, "max": 300},
            "suspect_span": {"min": 0, "max": 250},
        }
    }.get  # type: ignore[arg-type]
).series("t", ())


def row(value: float | None, *flags: str, at: int = 0, quality: int = 1) -> Row:
    return Row(at, value, None, quality, flags)


def test_numbers_are_exact_and_rounded_once() -> None:
    assert correction.exact("1/1000") == Fraction(1, 1000)
    assert correction.exact(" -2.50 ") == Fraction(-5, 2)
    assert correction.exact("1e-3") == Fraction(1, 1000)
    ten = correction.linear(row(20.1), Fraction(10), Fraction(0), BOUNDED)
    assert ten is not None
    assert ten.value == 201.0
    third = correction.linear(row(0.3), Fraction(1, 3), Fraction(1, 10), BOUNDED)
    assert third is not None
    assert third.value == 0.2


@pytest.mark.parametrize("text", ["", "a", "nan", "inf", "1/0", "0x10", "1,5"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(CorrectionError, match="no number"):
        correction.exact(text)


def test_a_void_reading_says_so_and_nothing_else() -> None:
    made = correction.void(row(20.0, "spike", "gross_range", quality=3))
    assert (made.value, made.value_text, made.quality, made.flags) == (
        None,
        None,
        int(Quality.MISSING),
        ("spike", "voided"),
    )
    assert correction.void(made) == made


def test_quality_is_judged_again() -> None:
    assert correction.with_value(row(20.0), 21.0, BOUNDED) == Row(0, 21.0, None, int(Quality.GOOD), ("corrected",))
    suspect = correction.with_value(row(20.0), 260.0, BOUNDED)
    assert (suspect.quality, suspect.flags) == (int(Quality.SUSPECT), ("gross_range", "corrected"))
    # What the range had against the value before is over; what others found stays.
    back = correction.with_value(row(260.0, "gross_range", "gap", quality=3), 20.0, BOUNDED)
    assert (back.quality, back.flags) == (int(Quality.SUSPECT), ("gap", "corrected"))
    with pytest.raises(CorrectionError, match="outside"):
        correction.with_value(row(20.0), 301.0, BOUNDED)
    with pytest.raises(CorrectionError, match="outside"):
        correction.linear(row(20.0), Fraction(100), Fraction(0), BOUNDED)


def test_texts_have_no_factor_and_too_large_numbers_are_none() -> None:
    assert correction.linear(Row(0, None, "on", 1, ()), Fraction(2), Fraction(0), SeriesCheck("any")) is None
    with pytest.raises(CorrectionError, match="no number"):
        correction.linear(row(1e308), Fraction(10**10), Fraction(0), SeriesCheck("any"))


def states(*values: float | None, flags: tuple[str, ...] = ()) -> list[Row]:
    return [row(value, *flags, at=n * 60 * S, quality=2) for n, value in enumerate(values)]


def test_consumption_follows_a_state_that_was_wrong() -> None:
    before = states(100, 101, 102, 1020, 104, 105)
    after = list(before)
    after[3] = correction.with_value(before[3], 103.0, SeriesCheck("number"))
    found = correction.reconsumed(before, after, Counter())
    assert set(found) >= {3 * 60 * S}
    assert all(one is not None and one["value"] == 1.0 and "corrected" in one["flags"] for one in found.values())


def test_an_offset_changes_no_consumption_and_a_factor_all_of_it() -> None:
    before = states(100, 101, 103, 106)
    shifted = [correction.with_value(one, (one.value or 0) + 1000, SeriesCheck("number")) for one in before]
    assert correction.reconsumed(before, shifted, Counter()) == {}
    scaled = [correction.with_value(one, (one.value or 0) * 10, SeriesCheck("number")) for one in before]
    assert {
        at // (60 * S): one and one["value"] for at, one in correction.reconsumed(before, scaled, Counter()).items()
    } == {1: 10, 2: 20, 3: 30}


def test_a_void_state_hands_its_share_to_the_next() -> None:
    before = states(100, 101, 103, 106)
    after = [before[0], correction.void(before[1]), *before[2:]]
    found = correction.reconsumed(before, after, Counter())
    assert found[60 * S] is None
    assert found[120 * S] is not None
    assert found[120 * S]["value"] == 3.0  # type: ignore[index]


def test_an_exchange_counts_both_meters() -> None:
    before = states(990, 995, 2, 4)
    counter = correction.exchanged(Counter(), 90 * S, 998.0, 1.0)
    assert counter.swaps == (Swap(90 * S, 998.0, 1.0),)
    found = correction.reconsumed(before, before, Counter(), counter)
    assert found[120 * S] is not None
    assert found[120 * S]["value"] == 4.0  # type: ignore[index]
    with pytest.raises(CorrectionError, match="registered"):
        correction.exchanged(counter, 90 * S, None, 0.0)
