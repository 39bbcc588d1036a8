import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.domain.readings import units
from preservarium.domain.readings.json_text import NotFinite
from preservarium.domain.readings.units import IDENTITY, Linear, canonical, conversion


@pytest.mark.parametrize("unit", units._UNITS)
def test_every_spelling_of_the_table_has_one_canonical_unit(unit):
    expression, spellings = units._UNITS[unit]
    assert canonical(unit) == (unit, True)
    for spelling in spellings:
        assert canonical(spelling) == (unit, True), spelling
    if expression:
        assert units._parsed(expression) is not None, f"pint does not know {expression}"
        assert conversion(unit, unit) is IDENTITY


@pytest.mark.parametrize(
    ("spelled", "wanted"),
    [
        ("µS⋅cm⁻¹", "µS/cm"), ("μS·cm-1", "µS/cm"), ("uS/cm", "µS/cm"), ("m³⋅m⁻³", "m³/m³"), ("W⋅m⁻²", "W/m²"), ("W m-2", "W/m²"), ("W/m^2", "W/m²"),
        ("µmol⋅m⁻²⋅s⁻¹", "µmol/m²/s"), ("1⋅cm⁻³", "1/cm³"), ("mg⋅L⁻¹", "mg/L"), ("l⋅h⁻¹", "L/h"), ("m⋅s⁻¹", "m/s"), ("m s-1", "m/s"), ("℃", "°C"), (" Cel ", "°C"),
        ("%RH", "%"), ("Ω", "Ω"), ("° C", "°C"), ("ºC", "°C"), ("˚ C", "°C"), ("degrees C", "°C"), ("deg C", "°C"), ("Deg. C", "°C"), ("degree Celsius", "°C"),
        ("CELSIUS", "°C"), ("°K", "K"), ("degrees Fahrenheit", "°F"), ("KWH", "kWh"), ("kwh", "kWh"), ("Kwh", "kWh"), ("kW h", "kWh"), ("m3/h", "m³/h"), ("M3/H", "m³/h"), ("m³", "m³"), ("M3", "m³"),
        ("µg/m3", "µg/m³"), ("μg/m3", "µg/m³"), ("UG/M3", "µg/m³"), ("percent", "%"), ("PERCENT", "%"), ("% rH", "%"), ("l/min", "L/min"), ("L/MIN", "L/min"), ("Liter", "L"), ("LITRES", "L"),
        ("HPA", "hPa"), ("KPA", "kPa"), ("MPA", "MPa"), ("KM/H", "km/h"), ("CM", "cm"), ("Volts", "V"), ("AMPS", "A"), ("hrs", "h"), ("Minutes", "min"), ("µS/CM", "µS/cm"), ("kg/m**3", "kg/m³"), (None, ""), ("", ""), ("/", ""), ("None", ""),
    ],
)  # fmt: skip
def test_spellings_of_data_sheets(spelled, wanted):
    assert canonical(spelled) == (wanted, True)


@pytest.mark.parametrize(
    ("given_unit", "wanted", "value", "result"),
    [
        ("°F", "°C", 212.0, 100.0), ("K", "°C", 273.15, 0.0), ("Cel", "K", 0.0, 273.15), ("kPa", "hPa", 101.325, 1013.25), ("mbar", "hPa", 1013.0, 1013.0), ("inHg", "hPa", 29.92, 1013.2075),
        ("mS⋅cm⁻¹", "µS/cm", 1.5, 1500.0), ("dS/m", "mS/cm", 1.0, 1.0), ("%", "m³/m³", 25.0, 0.25), ("ppb", "ppm", 500.0, 0.5), ("km/h", "m/s", 36.0, 10.0), ("mph", "m/s", 1.0, 0.44704),
        ("kn", "m/s", 1.0, 0.514444444), ("kWh", "J", 1.0, 3.6e6), ("l", "m³", 1000.0, 1.0), ("in", "mm", 1.0, 25.4), ("psi", "bar", 14.5037738, 1.0), ("g/L", "mg/L", 1.0, 1000.0), ("min", "s", 2.0, 120.0), ("Hz", "rpm", 50.0, 3000.0), ("C", "°F", 100.0, 212.0), ("F", "°C", 50.0, 10.0), ("L/m²", "mm", 3.0, 3.0), ("/", "%", 0.5, 50.0),
    ],
)  # fmt: skip
def test_conversions(given_unit, wanted, value, result):
    linear = conversion(given_unit, wanted)
    assert linear is not None
    assert linear.apply(value) == pytest.approx(result, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("°C", "V"),
        ("dB", "%"),
        ("NTU", "FNU"),
        ("dBm", "W"),
        ("foo", "V"),
        ("V", "foo"),
        ("pH", ""),
        ("lx", "W/m²"),
        ("g", "gn"),
        # Dimensions alone would let these pass: an angle, an amount of information and a ratio, the powers of alternating current.
        ("°", "%"),
        ("rad", "ppm"),
        ("B", "%"),
        ("bit", "°"),
        ("°/s", "Hz"),
        ("VA", "W"),
        ("var", "VA"),
        ("lm", "cd"),
        # Milli and mega are told apart by their case alone, and these have none that says which.
        ("mpa", "MPa"),
        ("mhz", "MHz"),
        ("C", "V"),
    ],
)
def test_what_does_not_measure_the_same_has_no_conversion(a, b):
    assert conversion(a, b) is None


def test_factors_are_exact():
    assert conversion("kPa", "hPa") == Linear(10)
    assert conversion("V", "mV") == Linear(1000)
    assert conversion("°C", "K") == Linear(1, Fraction(5463, 20))
    assert conversion("°F", "°C") == Linear(Fraction(5, 9), Fraction(-160, 9))
    assert conversion("kWh", "J") == Linear(3_600_000)
    assert Linear.of(0.1, -40.0) == Linear(Fraction(1, 10), -40)


@pytest.mark.parametrize(
    ("given_unit", "wanted", "value", "result"),
    [
        # Published: UDUNITS-2 #35, ConvertAll #4, alchemist #16.
        ("degF", "°C", 185, 85.0), ("degF", "°C", 185.0, 85.0), ("degF", "°C", 104, 40.0), ("degF", "°C", 68, 20.0), ("degF", "°C", 68.0, 20.0), ("°F", "°C", -40, -40.0),
        # Decimals that no double holds, of which the double's product is not the decimal's.
        ("°F", "°C", 104.18, 40.1), ("°F", "°C", 97.88, 36.6), ("°F", "°C", 98.6, 37.0), ("°C", "°F", 36.6, 97.88), ("°C", "K", 0.1, 273.25), ("K", "°C", 273.25, 0.1), ("m", "cm", 4.35, 435.0), ("kPa", "Pa", 1.001, 1001.0),
        ("cm", "m", 0.7, 0.007), ("kPa", "hPa", 101.325, 1013.25), ("mV", "V", 3299.9, 3.2999), ("%", "m³/m³", 28.7, 0.287), ("km/h", "m/s", 36.9, 10.25), ("kWh", "MWh", 1234.56, 1.23456), ("µT", "T", 2.5e-8, 2.5e-14),
    ],
)  # fmt: skip
def test_what_stands_at_a_bound_stays_there(given_unit, wanted, value, result):
    assert conversion(given_unit, wanted).apply(value) == result


def exact(x):
    """What a number says: the decimal, where it has 15 significant digits at most, else what the double holds."""
    if isinstance(x, int):
        return Fraction(x)
    digits = repr(x).partition("e")[0].replace(".", "").strip("-0")
    return Fraction(repr(x)) if len(digits) <= 15 else Fraction(x)


def rounded(x):
    return x.numerator / x.denominator  # Python divides whole numbers with one rounding


PAIRS = [
    (a, b, linear)
    for a, b in itertools.product([unit for unit, (expression, _) in units._UNITS.items() if expression], repeat=2)
    if a not in units._OTHERWISE and (linear := conversion(a, b)) is not None
]
VALUES = st.one_of(
    st.integers(-(10**12), 10**12),
    st.decimals(-(10**6), 10**6, places=3).map(float),
    st.decimals(-1, 1, places=9).map(float),
    st.floats(-1e30, 1e30),
)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_every_conversion_is_the_rational_result_rounded_once(value):
    assert len(PAIRS) > 500
    for a, b, linear in PAIRS:
        assert linear.apply(value) == rounded(exact(value) * linear.factor + linear.offset), (a, b)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_every_conversion_has_its_way_back(value):
    for a, b, linear in PAIRS:
        back = conversion(b, a)
        assert linear.then(back).is_identity, (a, b)
        there = linear.apply(value)
        # Each way rounds once; what the first lost of the sum, the second cannot find again.
        lost = math.ulp(there) * abs(back.factor) + math.ulp(value)
        assert abs(back.apply(there) - value) <= lost, (a, b)


@given(st.integers(-(10**9), 10**9))
def test_whole_degrees_come_back(value):
    assert conversion("°C", "°F").apply(conversion("°F", "°C").apply(value)) == pytest.approx(value, rel=0, abs=1e-6)
    assert conversion("°F", "°C").apply(conversion("°C", "°F").apply(value)) == value


def test_what_has_no_result_is_not_finite():
    linear = conversion("°F", "°C")
    assert math.isnan(linear.apply(math.nan))
    assert linear.apply(math.inf) == math.inf
    assert linear.apply(-(10**400)) == -math.inf
    assert conversion("km", "nm").apply(1e300) == math.inf
    for wrong in (math.nan, math.inf):
        with pytest.raises((ValueError, OverflowError)):
            Linear.of(wrong)


def test_a_spelling_counts_as_it_stands_before_it_counts_in_another_case():
    assert canonical("MW")[0] == "MW"
    assert canonical("mW")[0] == "mW"
    assert conversion("MV", "V").apply(1) == 1e6  # a megavolt is a unit
    assert canonical("mbar")[0] == "mbar"
    assert canonical("MHz")[0] == "MHz"
    assert canonical("mhz") == ("mhz", False)
    assert canonical("Ws") == ("Ws", False)  # a watt second, and no plural of watts
    assert conversion("W s", "J").apply(2) == 2


@pytest.mark.parametrize(
    "text",
    [
        "m**9**9**9",
        "9**9**9**9",
        "m^99999999",
        "m" * 500,
        "__import__('os')",
        "m/" * 30,
        "lambda: 0",
        "((((((",
    ],
)
def test_what_a_device_calls_a_unit_costs_nothing(text):
    spelled, known = canonical(text)
    assert len(spelled) <= units.UNIT_CHARACTERS_MAX
    assert not known
    assert conversion(text, "m") is None


@given(st.text(max_size=60))
def test_any_text_is_a_unit_or_is_not(text):
    spelled, _ = canonical(text)
    assert len(spelled) <= max(units.UNIT_CHARACTERS_MAX, 1)
    assert canonical(spelled)[0] == spelled


@pytest.mark.parametrize("factor", [0, 2, -2])
@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_what_json_gives_for_a_number_that_is_not_finite_stays_one(word, factor):
    assert not math.isfinite(Linear(factor, 1).apply(NotFinite(word)))
