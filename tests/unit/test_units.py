import pytest
from hypothesis import given
from hypothesis import strategies as st

from preservarium.domain import units
from preservarium.domain.units import canonical, conversion


@pytest.mark.parametrize("unit", units._UNITS)
def test_every_spelling_of_the_table_has_one_canonical_unit(unit):
    expression, spellings = units._UNITS[unit]
    assert canonical(unit) == (unit, True)
    for spelling in spellings:
        assert canonical(spelling) == (unit, True), spelling
    if expression:
        assert units._parsed(expression) is not None, f"pint does not know {expression}"
        assert conversion(unit, unit) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("spelled", "wanted"),
    [
        ("µS⋅cm⁻¹", "µS/cm"), ("μS·cm-1", "µS/cm"), ("uS/cm", "µS/cm"), ("m³⋅m⁻³", "m³/m³"), ("W⋅m⁻²", "W/m²"), ("W m-2", "W/m²"), ("W/m^2", "W/m²"),
        ("µmol⋅m⁻²⋅s⁻¹", "µmol/m²/s"), ("1⋅cm⁻³", "1/cm³"), ("mg⋅L⁻¹", "mg/L"), ("l⋅h⁻¹", "L/h"), ("m⋅s⁻¹", "m/s"), ("m s-1", "m/s"), ("℃", "°C"), (" Cel ", "°C"),
        ("%RH", "%"), ("Ω", "Ω"), ("kg/m**3", "kg/m³"), (None, ""), ("", ""), ("/", ""), ("None", ""),
    ],
)  # fmt: skip
def test_spellings_of_data_sheets(spelled, wanted):
    assert canonical(spelled) == (wanted, True)


@pytest.mark.parametrize(
    ("given_unit", "wanted", "value", "result"),
    [
        ("°F", "°C", 212.0, 100.0), ("K", "°C", 273.15, 0.0), ("Cel", "K", 0.0, 273.15), ("kPa", "hPa", 101.325, 1013.25), ("mbar", "hPa", 1013.0, 1013.0), ("inHg", "hPa", 29.92, 1013.2075),
        ("mS⋅cm⁻¹", "µS/cm", 1.5, 1500.0), ("dS/m", "mS/cm", 1.0, 1.0), ("%", "m³/m³", 25.0, 0.25), ("ppb", "ppm", 500.0, 0.5), ("km/h", "m/s", 36.0, 10.0), ("mph", "m/s", 1.0, 0.44704),
        ("kn", "m/s", 1.0, 0.514444444), ("kWh", "J", 1.0, 3.6e6), ("l", "m³", 1000.0, 1.0), ("in", "mm", 1.0, 25.4), ("psi", "bar", 14.5037738, 1.0), ("g/L", "mg/L", 1.0, 1000.0), ("min", "s", 2.0, 120.0), ("/", "%", 0.5, 50.0),
    ],
)  # fmt: skip
def test_conversions(given_unit, wanted, value, result):
    linear = conversion(given_unit, wanted)
    assert linear is not None
    assert value * linear.factor + linear.offset == pytest.approx(result, rel=1e-6, abs=1e-9)


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
    ],
)
def test_what_does_not_measure_the_same_has_no_conversion(a, b):
    assert conversion(a, b) is None


def test_factors_carry_no_noise_of_the_arithmetic():
    assert conversion("kPa", "hPa") == (10.0, 0.0)
    assert conversion("V", "mV") == (1000.0, 0.0)
    assert conversion("°C", "K") == (1.0, 273.15)


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
