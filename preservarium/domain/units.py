"""Units as devices spell them, their one canonical spelling, and the numbers that convert one into another.

pint is asked once for each pair that a configuration needs, when the configuration is compiled; what a reading costs is a
multiplication and an addition. The spellings are those of SenML (RFC 8428, RFC 8798), of data sheets (`µS⋅cm⁻¹`), and
of people (`uS/cm`).
"""

import re
import unicodedata
from functools import lru_cache
from typing import Any, Final, NamedTuple

#: Longest text that is taken for a unit.
UNIT_CHARACTERS_MAX: Final = 40
#: Pairs and spellings kept: some dozens in a fleet, more only where a device invents them.
_CACHE_MAX: Final = 4_096


class Linear(NamedTuple):
    """y = x · factor + offset."""

    factor: float
    offset: float


#: canonical spelling -> (what pint calls it, other spellings). Case counts: `mm` and `Mm` are nine powers of ten apart.
_UNITS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    # temperature
    "°C": ("degC", ("Cel", "degC", "celsius", "Celsius", "deg C", "degree_Celsius", "C deg", "º C", "ºC")),
    "°F": ("degF", ("degF", "fahrenheit", "Fahrenheit", "ºF")),
    "K": ("kelvin", ("kelvin", "Kelvin")),
    # ratio
    "%": ("percent", ("%RH", "% RH", "%rh", "RH%", "percent", "Percent", "pct", "%EL", "%VWC", "% VWC", "%LEL")),
    "‰": ("permille", ("permille",)),
    "ppm": ("ppm", ("PPM", "ppmv", "µmol/mol", "umol/mol")),
    "ppb": ("ppb", ("PPB", "ppbv", "nmol/mol")),
    "m³/m³": ("m**3/m**3", ("m3/m3",)),
    "m/m": ("m/m", ()),
    "µm/m": ("um/m", ("um/m", "µε", "ue", "microstrain")),
    # length, area, volume
    "m": ("m", ("meter", "metre", "meters")),
    "km": ("km", ()),
    "cm": ("cm", ()),
    "mm": ("mm", ()),
    "µm": ("um", ("um", "micron")),
    "nm": ("nm", ()),
    "in": ("inch", ("inch", '"')),
    "ft": ("foot", ("foot", "feet")),
    "mi": ("mile", ("mile",)),
    "m²": ("m**2", ("m2",)),
    "m³": ("m**3", ("m3",)),
    "cm³": ("cm**3", ("cm3", "ccm")),
    "L": ("liter", ("l", "ltr", "liter", "litre", "Liter")),
    "mL": ("milliliter", ("ml",)),
    "gal": ("gallon", ("gallon", "gallons")),
    # time, frequency
    "s": ("s", ("sec", "second", "seconds")),
    "ms": ("ms", ("msec", "millisecond")),
    "µs": ("us", ("us",)),
    "min": ("minute", ("minute", "minutes")),
    "h": ("hour", ("hr", "hour", "hours")),
    "d": ("day", ("day", "days")),
    "Hz": ("hertz", ("hz", "1/s")),
    "kHz": ("kilohertz", ("khz",)),
    "MHz": ("megahertz", ()),
    "GHz": ("gigahertz", ()),
    "rpm": ("revolutions_per_minute", ("RPM", "U/min", "1/min", "r/min")),
    "bpm": ("count/minute", ("beat/min", "bpm")),
    # mass, density, force, pressure
    "kg": ("kg", ()),
    "g": ("g", ("gram",)),
    "mg": ("mg", ()),
    "t": ("metric_ton", ("tonne",)),
    "lb": ("pound", ("lbs",)),
    "oz": ("ounce", ()),
    "kg/m³": ("kg/m**3", ("kg/m3",)),
    "g/m³": ("g/m**3", ("g/m3",)),
    "mg/m³": ("mg/m**3", ("mg/m3",)),
    "µg/m³": ("ug/m**3", ("ug/m3",)),
    "g/L": ("g/liter", ("g/l",)),
    "mg/L": ("mg/liter", ("mg/l",)),
    "µg/L": ("ug/liter", ("ug/l", "µg/l")),
    "1/cm³": ("1/cm**3", ("1/cm3", "#/cm³", "#/cm3")),
    "1/m³": ("1/m**3", ("1/m3", "#/m³")),
    "N": ("newton", ()),
    "kN": ("kilonewton", ()),
    "N⋅m": ("newton*m", ("Nm",)),
    "Pa": ("pascal", ("pascal",)),
    "hPa": ("hectopascal", ("HPa", "hpa")),
    "kPa": ("kilopascal", ("kpa", "KPa")),
    "MPa": ("megapascal", ()),
    "bar": ("bar", ("Bar",)),
    "mbar": ("millibar", ("mBar",)),
    "psi": ("psi", ("PSI",)),
    "mmHg": ("mmHg", ()),
    "inHg": ("inHg", ()),
    "atm": ("atm", ()),
    # motion, flow
    "m/s": ("m/s", ("mps",)),
    "km/h": ("km/hour", ("kph", "kmh", "km/hr")),
    "cm/h": ("cm/hour", ()),
    "mm/h": ("mm/hour", ("mm/hr",)),
    "mph": ("mile/hour", ("mi/h",)),
    "kn": ("knot", ("knot", "knots", "kt")),
    "m/s²": ("m/s**2", ("m/s2",)),
    "gn": ("standard_gravity", ("g_n", "g-force", "gforce")),
    "°": ("degree", ("deg", "degree", "degrees", "º", "lat", "lon")),
    "rad": ("radian", ("radian",)),
    "°/s": ("degree/s", ("deg/s", "dps")),
    "m³/h": ("m**3/hour", ("m3/h", "cmh")),
    "m³/s": ("m**3/s", ("m3/s",)),
    "L/h": ("liter/hour", ("l/h",)),
    "L/min": ("liter/minute", ("l/min", "lpm", "LPM")),
    "L/s": ("liter/s", ("l/s",)),
    # electricity
    "V": ("volt", ("volt", "Volt", "volts")),
    "mV": ("millivolt", ("mv",)),
    "kV": ("kilovolt", ()),
    "A": ("ampere", ("amp", "Amp", "ampere")),
    "mA": ("milliampere", ("ma",)),
    "µA": ("microampere", ("uA",)),
    "Ω": ("ohm", ("ohm", "Ohm", "ohms")),
    "kΩ": ("kiloohm", ("kohm", "kOhm")),
    "MΩ": ("megaohm", ("Mohm", "MOhm")),
    "W": ("watt", ("watt", "Watt")),
    "mW": ("milliwatt", ()),
    "kW": ("kilowatt", ()),
    "MW": ("megawatt", ()),
    "VA": ("volt*ampere", ()),
    "kVA": ("kilovolt*ampere", ()),
    "var": ("volt*ampere", ("VAr", "VAR")),
    "kvar": ("kilovolt*ampere", ("kVAr",)),
    "J": ("joule", ()),
    "kJ": ("kilojoule", ()),
    "MJ": ("megajoule", ()),
    "GJ": ("gigajoule", ()),
    "Wh": ("watt*hour", ()),
    "kWh": ("kilowatt*hour", ("kwh", "KWh")),
    "MWh": ("megawatt*hour", ()),
    "Ah": ("ampere*hour", ()),
    "mAh": ("milliampere*hour", ()),
    "C": ("coulomb", ("coulomb",)),
    "F": ("farad", ("farad",)),
    "H": ("henry", ("henry",)),
    "T": ("tesla", ("tesla",)),
    "µT": ("microtesla", ("uT",)),
    "S/m": ("siemens/m", ()),
    "mS/cm": ("millisiemens/cm", ()),
    "µS/cm": ("microsiemens/cm", ("uS/cm",)),
    "dS/m": ("decisiemens/m", ()),
    "mS/m": ("millisiemens/m", ()),
    # light, radiation
    "lx": ("lux", ("lux", "Lux", "LUX")),
    "klx": ("kilolux", ("klux",)),
    "lm": ("lumen", ("lumen",)),
    "cd": ("candela", ()),
    "W/m²": ("watt/m**2", ("W/m2",)),
    "kWh/m²": ("kilowatt*hour/m**2", ("kWh/m2",)),
    "J/m²": ("joule/m**2", ("J/m2",)),
    "µmol/m²/s": ("micromole/m**2/s", ("umol/m2/s", "µmol/(m²*s)", "µmol/m²s", "umol/m²/s", "µmol/s/m²", "umol/s/m2")),
    "Bq": ("becquerel", ()),
    "Bq/m³": ("becquerel/m**3", ("Bq/m3",)),
    "Sv": ("sievert", ()),
    "µSv/h": ("microsievert/hour", ("uSv/h",)),
    "mol": ("mole", ()),
    "mol/L": ("mole/liter", ("mol/l",)),
    # information
    "B": ("byte", ("byte", "bytes")),
    "kB": ("kilobyte", ("KB",)),
    "MB": ("megabyte", ()),
    "bit": ("bit", ()),
    "bit/s": ("bit/s", ("bps",)),
    # Scales and counts of their own: they convert into nothing, not even into each other.
    **{
        unit: ("", spellings)
        for unit, spellings in {
            "dB": ("db",), "dBA": ("dB(A)", "dBa", "dbA"), "dBm": ("dbm",), "dBW": (), "pH": (), "NTU": ("ntu",),
            "FNU": ("fnu",), "FAU": ("fau",), "PSU": ("psu",), "UVI": ("uvi",), "AQI": ("aqi",), "count": ("counts", "pulses"),
        }.items()
    },
}  # fmt: skip

#: Units that say "a number, nothing more".
_NONE: Final = {"", "/", "1", "none", "None", "null", "-", "unitless", "dimensionless"}
_SUPERSCRIPT: Final = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPT_MARKS: Final = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
#: What a data sheet writes between factors: dot operator, middle dot, bullet, times.
_DOTS: Final = re.compile(r"[⋅·•×∙*]|(?<=[A-Za-z0-9]) (?=[A-Za-z])")
_COMPOSED: Final = re.compile(r"(?:1|[A-Za-zµΩ]+(?:[²³]|\^\d)?)(?:[⋅/][A-Za-zµΩ]+(?:[²³]|\^\d)?)*")
_FACTOR: Final = re.compile(r"(?P<unit>[^\d\s*/^+-]+?)(?:\^?(?P<power>[+-]?\d))?$|1$")


def _plain(text: str) -> str:
    """One form for the many ways to write the same characters: micro signs, ohm signs, degree letters, blanks."""
    text = text.strip().translate({0x03BC: "µ", 0x2126: "Ω", 0x2103: "°C", 0x2109: "°F", 0x2212: "-", 0x2030: "‰"})
    text = "".join(c for c in text if c.isprintable() or c.isspace())
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _tidy(text: str) -> str:
    """`µS⋅cm⁻¹` as `µS/cm`, `m3/m3` as `m³/m³`: powers as superscripts, negative ones behind a stroke."""
    text = _SUBSCRIPT_MARKS.sub(lambda m: m[0].translate(_SUPERSCRIPT), text).replace("**", "^")
    above: list[str] = []
    below: list[str] = []
    for i, side in enumerate(text.replace("(", "").replace(")", "").split("/")):
        for factor in _DOTS.split(side):
            match = _FACTOR.fullmatch(factor.strip())
            if match is None:
                return text
            if match["unit"] is None:
                continue
            power = int(match["power"] or 1) * (1 if i == 0 else -1)
            shown = match["unit"] + {1: "", 2: "²", 3: "³"}.get(abs(power), f"^{abs(power)}")
            (above if power > 0 else below).append(shown)
    return "⋅".join(above) + "".join(f"/{b}" for b in below) if above else "1" + "".join(f"/{b}" for b in below)


_SPELLINGS: Final[dict[str, str]] = {}
for _canonical, (_, _others) in _UNITS.items():
    for _spelling in (_canonical, *_others):
        _SPELLINGS.setdefault(_plain(_spelling), _canonical)
        _SPELLINGS.setdefault(_tidy(_plain(_spelling)), _canonical)


@lru_cache(maxsize=_CACHE_MAX)
def canonical(unit: str | None) -> tuple[str, bool]:
    """(canonical spelling, whether the unit is known); "" where there is none.

    An unknown unit keeps its own spelling, tidied up.
    """
    if unit is None or (text := _plain(unit)) in _NONE:
        return "", True
    known = _SPELLINGS.get(text) or _SPELLINGS.get(_tidy(text))
    if known is not None:
        return known, True
    return text[:UNIT_CHARACTERS_MAX].strip(), _registered(text) is not None


@lru_cache(maxsize=1)
def _registry() -> Any:
    # pint takes 0.4 s to load its definitions: only where a conversion is asked for.
    import pint

    registry: Any = pint.UnitRegistry(cache_folder=None)
    registry.define("ppb = 1e-9")
    return registry


def _registered(text: str) -> Any:
    """What pint makes of a spelling that is not in the table; None where it is no unit."""
    # A device may write anything here, and pint evaluates powers: only products of names with one-digit powers go on.
    tidy = _tidy(text) if len(text) <= UNIT_CHARACTERS_MAX else ""
    if not _COMPOSED.fullmatch(tidy):
        return None
    return _parsed(tidy.replace("⋅", "*").replace("²", "**2").replace("³", "**3").replace("^", "**"))


@lru_cache(maxsize=_CACHE_MAX)
def _parsed(expression: str) -> Any:
    try:
        return _registry().Unit(expression)
    except Exception:  # pint raises its own errors, tokenize's and ast's for what it cannot read
        return None


def _unit(spelling: str) -> Any:
    if spelling == "":
        return _parsed("dimensionless")
    entry = _UNITS.get(spelling)
    if entry is None:
        return _registered(spelling)
    return _parsed(entry[0]) if entry[0] else None


@lru_cache(maxsize=_CACHE_MAX)
def conversion(given: str | None, wanted: str | None) -> Linear | None:
    """How to get from one unit to another; None where they do not measure the same, or one is not known.

    The numbers are rounded to 15 digits, so that kPa to hPa is 10 and not 10.000000000000002.
    """
    source, known = canonical(given)
    target, target_known = canonical(wanted)
    if source == target:
        return Linear(1.0, 0.0)
    if not known or not target_known:
        return None
    from_unit, to_unit = _unit(source), _unit(target)
    if from_unit is None or to_unit is None:
        return None
    quantity = _registry().Quantity
    try:
        zero, one = (float(quantity(x, from_unit).to(to_unit).magnitude) for x in (0.0, 1.0))
        far = float(quantity(1e6, from_unit).to(to_unit).magnitude)
    except Exception:  # another dimension, or a scale of pint's that cannot be multiplied
        return None
    factor, offset = _rounded((far - zero) / 1e6 if zero else one), _rounded(zero)
    # A logarithmic scale is not linear: two points would agree with any line.
    if abs(far - (1e6 * factor + offset)) > 1e-9 * max(abs(far), 1.0) or not factor:
        return None
    return Linear(factor, offset)


def _rounded(number: float) -> float:
    return float(f"{number:.15g}")
