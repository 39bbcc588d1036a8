"""The one rule that makes numbers of text, and instants that are text."""

import math
from decimal import ROUND_FLOOR, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain.readings.instant import instant_us, required_instant_us, seconds_us
from preservarium.domain.readings.number import (
    THOUSANDS,
    Written,
    number_of,
    says_not_finite,
    whole_number,
    written,
)
from preservarium.errors import ReasonCode, Reject


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("21", 21), ("-21", -21), ("+21.5", 21.5), ("1.10", 1.1), (".5", 0.5), ("5.", 5.0), ("00123", 123), ("241408E4", 2414080000.0), ("1e-3", 0.001), (" 21\r\n", 21), ("\t-0.0 ", 0.0),
        ("89490200001234567890", 89490200001234567890), ("9007199254740993", 9007199254740993),
    ],
)  # fmt: skip
def test_numbers(text, number):
    assert number_of(text) == number
    assert type(number_of(text)) is type(number)


@pytest.mark.parametrize(
    "text",
    [
        "2_1", "1_000", "_1", "0x1F", "0b1", "1e", "e5", "+", "-", "", " ", ".", "+.", "--1", "1 2", "2,0", "1.2.3", "١٢", "１２", "２１.5", "1²", "Ⅻ", "infinity", "inf", "-inf", "nan", "NaN", "true", "1j", "1f", "1L",
        "− 5", "−5", "\xa021", "21°", "1" * 401,
    ],
)  # fmt: skip
def test_what_is_no_number(text):
    assert number_of(text) is None
    assert whole_number(text) is None


@pytest.mark.parametrize(
    ("text", "decimal", "thousands", "number"),
    [
        ("21,5", ",", "", 21.5), ("21.5", ",", "", None), ("1.234,5", ",", ".", 1234.5), ("1.234.567", ",", ".", 1234567), ("1234567,8", ",", ".", 1234567.8), ("1.23,5", ",", ".", None), ("12.34", ",", ".", None),
        ("1,234.5", ".", ",", 1234.5), ("1,234,5", ".", ",", None), ("1'234.5", ".", "'", 1234.5), ("1’234", ".", "'", 1234), ("1 234,5", ",", " ", 1234.5), ("1\xa0234\u202f567", ",", " ", 1234567), ("-1.234,5e-1", ",", ".", -123.45),
        ("2_1", ",", ".", None), (".123,5", ",", ".", None), ("1..234", ",", ".", None), (",5", ",", ".", 0.5),
    ],
)  # fmt: skip
def test_marks_of_ones_own(text, decimal, thousands, number):
    assert number_of(text, decimal, thousands) == number


@given(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_every_number_reads_as_it_was_written(number):
    assert number_of(repr(number)) == number
    assert number_of(repr(number).replace(".", ","), ",") == number


@given(st.integers(-(10**20), 10**20), st.sampled_from(sorted(THOUSANDS)))
def test_groups_of_thousands(number, mark):
    assert number_of(f"{number:,}".replace(",", mark), "," if mark == "." else ".", mark) == number


@given(st.text(max_size=20))
def test_whatever_is_a_number_is_one_for_python_too(text):
    number = number_of(text)
    if number is not None:
        assert number == float(text) or abs(number) > 2**53
        assert text.isascii()
        assert "_" not in text


def test_numbers_beyond_a_double_are_infinite_and_words_are_told_apart():
    assert number_of("1e999") == math.inf
    assert number_of("1" + "0" * 350) == 10**350
    assert [says_not_finite(t) for t in ("nan", "-NaN", " +Infinity", "INF", "na", "info", "")] == [True] * 4 + [
        False
    ] * 3


def test_a_number_keeps_its_text_only_where_it_has_another():
    assert type(written("21.5", 21.5)) is float
    assert type(written("21", 21)) is int
    kept = written("00123", 123)
    assert (kept, kept.number, kept.typed) == ("00123", 123, True)
    assert isinstance(kept, Written)
    assert isinstance(written("1.10", 1.1), Written)
    assert isinstance(written("0.12345678901234567", float("0.12345678901234567")), Written)


# --- instants ---

T = 1_717_243_200_000_000  # 2024-06-01T12:00:00Z


@pytest.mark.parametrize(
    ("given_as", "us"),
    [
        # amcharts4 #2192: milliseconds written as a float. 1801… and 1768… begin like a year.
        ("1801011512345.0", 1_801_011_512_345_000), ("1768011512345.0", 1_768_011_512_345_000), ("1801011512345", 1_801_011_512_345_000), (1801011512345.0, 1_801_011_512_345_000), ("1801011512.345", 1_801_011_512_345_000),
        ("1.801011512345e12", 1_801_011_512_345_000), ("+1801011512", 1_801_011_512_000_000), (" 1801011512 ", 1_801_011_512_000_000), ("-1.5", -1_500_000),
        # RFC 3339, 5.6: T and Z may be lower case; the notes allow a blank.
        ("2024-06-01t12:00:00z", T), ("2024-06-01T12:00:00z", T), ("2024-06-01 12:00:00Z", T), ("2024-06-01_12:00:00Z", T), ("2024-06-01T14:00:00+02:00", T), ("2024-06-01T12:00:00-00:00", T), ("2024-06-01T12:00:00+00:00", T),
        ("2024-06-01T06:30:00-05:30", T), ("2024-06-01 14:00:00 +0200", T), ("2024-06-01T14+02", T), ("2024-06-01T12:00", T), ("20240601T120000Z", T), ("2024-W22-6T12:00:00Z", T), ("2024-06-01 12:00:00 UTC", T),
        ("2024-05-31T24:00:00Z", T - 43_200_000_000), ("2024-06-01", T - 43_200_000_000), ("2024-06-01T12:00:00,25Z", T + 250_000), ("2024-06-01T12:00:00−00:00", T),
        # Leap seconds: the following second (RFC 3339, 5.7 has both).
        ("1990-12-31T23:59:60Z", 662_688_000_000_000), ("1990-12-31T15:59:60-08:00", 662_688_000_000_000), ("2016-12-31T23:59:60.75Z", 1_483_228_800_750_000),
        # Nanoseconds are cut off, whichever way they are written.
        ("2024-06-01T12:00:00.999999999Z", T + 999_999), ("2024-06-01T12:00:00.1234567+00:00", T + 123_456), ("1717243200.999999999", T + 999_999), ("1717243200000.9999", T + 999), (T * 1000 + 999, T), (str(T * 1000 + 999), T),
        (1717243200.000001, T + 1), (1717243200.999999, T + 999_999), (1717243200000.5, T + 500), ("1717243200.0000001", T), ("-0.0000001", -1),
    ],
)  # fmt: skip
def test_instants(given_as, us):
    assert instant_us(given_as) == us


@pytest.mark.parametrize(
    "given_as",
    [
        "1_801_011_512", "١٨٠١٠١١٥١٢", "１８０１０１１５１２", "0x6b5a", "infinity", "nan", "1e999", "+", "-", "2024-13-01", "2024-02-30T00:00:00Z", "2024-06-01T25:00:00Z", "2024-06-01T12:60:00Z", "2024-06-01T12:00:61Z", "2024-06-01T24:00:01Z",
        "2024-06-01T12:00:00+24:00", "2024-06-01T12:00:00+00:60", "2024-06-01T12:00:00Zulu", "2024-06-01T12:0:0Z", "2024-6-1T12:00:00Z", "2024-06-01T12:00:00.Z", "2024-06-01T12.5Z", "24-06-01T12:00:00Z", "2024-W54-1", "٢٠٢٤-٠٦-٠١",
        "2024-06-01T", "T12:00:00Z", "12:00:00", "2024-06-01X12:00:00", "yesterday", "2024-06-01T12:00:00Z 5",
    ],
)  # fmt: skip
def test_what_is_no_instant(given_as):
    assert instant_us(given_as) is None
    with pytest.raises(Reject) as caught:
        required_instant_us(given_as)
    assert caught.value.code is ReasonCode.TIMESTAMP_INVALID


@given(st.decimals(0, 4_102_444_800, places=9), st.sampled_from(["s", "ms", "us", "ns"]))
def test_every_unit_and_every_way_of_writing_says_the_same_instant_cut_to_microseconds(seconds, unit):
    us = int(seconds * 1_000_000)
    scaled = seconds.scaleb({"s": 0, "ms": 3, "us": 6, "ns": 9}[unit])
    assert instant_us(format(scaled, "f"), unit) == us
    assert instant_us(f"{scaled:E}", unit) == us
    if scaled == scaled.to_integral_value():
        assert instant_us(int(scaled), unit) == us


@given(st.floats(-4e9, 4e9))
def test_seconds_are_the_decimal_that_they_are_written_as_and_never_rounded_up(seconds):
    exact = Decimal(repr(seconds)) * 1_000_000
    assert seconds_us(seconds) == int(exact.to_integral_value(ROUND_FLOOR))


@given(st.datetimes(), st.sampled_from(["T", "t", " "]), st.sampled_from(["Z", "z", "+00:00", "", " UTC"]))
def test_any_date_and_time_in_any_dress(at, between, behind):
    text = at.isoformat(between) + behind
    assert instant_us(text) == instant_us(at.isoformat() + "Z")
    assert instant_us(text) is not None
