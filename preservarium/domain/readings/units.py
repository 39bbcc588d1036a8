"""Units as devices spell them, their one canonical spelling, and the exact arithmetic that converts one into another.

pint is asked once for each pair that a configuration needs, when the configuration is compiled; what a reading costs is some
arithmetic of whole numbers. The spellings are those of SenML (RFC 8428, RFC 8798), of data sheets (`µS⋅cm⁻¹`), and
of people (`uS/cm`, `KWH`, `degrees C`).
"""

import math
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import Any, Final

#: Longest text that is taken for a unit.
UNIT_CHARACTERS_MAX: Final = 40
#: Pairs and spellings kept: some dozens in a fleet, more only where a device invents them.
_CACHE_MAX: Final = 4_096


#: Decimal places that the quick way of `Linear` knows, as a factor: sensors write fewer.
_SCALE: Final = 10**6
#: A decimal of at most 15 digits survives the way through a double (DBL_DIG).
_DIGITS_MAX: Final = 15
#: Sums of whole numbers up to here are exact as doubles, each of them being below half of 2**53.
_EXACT: Final = 2**52
#: Added and taken away again, it rounds a double below 2**51 to a whole number.
ROUNDS: Final = 1.5 * 2.0**52


class Linear:
    """y = x · factor + offset, worked out exactly and rounded once, so that what is at a bound stays there: 104 °F is 40 °C.

    A number of at most 15 significant digits is taken for the decimal that it was written as (4.35 m is 435 cm, though the
    double is a little less than 4.35); a longer one for what the double holds.
    """

    __slots__ = (
        "_denominator",
        "_numerator",
        "_scaled_denominator",
        "_scaled_shift",
        "_shift",
        "divisor",
        "factor",
        "multiplier",
        "offset",
        "summand",
    )

    def __init__(self, factor: Fraction | int, offset: Fraction | int = 0) -> None:
        self.factor, self.offset = Fraction(factor), Fraction(offset)
        self._denominator = math.lcm(self.factor.denominator, self.offset.denominator)
        self._numerator = int(self.factor * self._denominator)
        self._shift = int(self.offset * self._denominator)
        # The same for x · 10⁶, and in doubles; where they do not hold all of it, NaN, which compares with nothing.
        self._scaled_shift, self._scaled_denominator = self._shift * _SCALE, self._denominator * _SCALE
        fits = max(abs(self._numerator), abs(self._scaled_shift), self._scaled_denominator) <= _EXACT
        self.multiplier, self.summand, self.divisor = (
            (float(self._numerator), float(self._scaled_shift), float(self._scaled_denominator))
            if fits
            else (math.nan, 0.0, 1.0)
        )

    @classmethod
    def of(cls, factor: float, offset: float = 0.0) -> "Linear":
        """Of numbers as people write them: 0.1 is a tenth.

        Raises:
            ValueError, OverflowError: one of them is not finite.
        """
        return cls(Fraction(*_ratio(factor)), Fraction(*_ratio(offset)))

    def apply(self, x: float) -> float:
        """The correctly rounded result, as a float; infinite or NaN where there is none."""
        if type(x) is float:
            # A decimal of six places or fewer is a whole number of millionths: nothing is lost from here on but by the division.
            whole = x * 1e6 + ROUNDS - ROUNDS
            product = whole * self.multiplier
            if -1e15 < product < 1e15 and whole / 1e6 == x:
                return (product + self.summand) / self.divisor
            if -1e15 < whole < 1e15 and whole / 1e6 == x:
                return (int(whole) * self._numerator + self._scaled_shift) / self._scaled_denominator
            if not math.isfinite(x):
                return x * (self._numerator or 1)
            top, below = _ratio(x)
        else:
            try:
                top, below = int(x), 1
            except (ValueError, OverflowError):  # of a class of its own: json_text.NotFinite
                return self.apply(float(x))
        top = top * self._numerator + below * self._shift
        try:
            # Python divides whole numbers of any size exactly, and rounds once.
            return top / (below * self._denominator)
        except OverflowError:
            return math.inf if top > 0 else -math.inf

    def then(self, other: "Linear") -> "Linear":
        """This one, and the other one on its result."""
        return Linear(self.factor * other.factor, self.offset * other.factor + other.offset)

    @property
    def is_identity(self) -> bool:
        """Whether there is nothing to calculate."""
        return self.factor == 1 and not self.offset

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Linear) and (self.factor, self.offset) == (other.factor, other.offset)

    def __hash__(self) -> int:
        return hash((self.factor, self.offset))

    def __repr__(self) -> str:
        return f"Linear({self.factor}, {self.offset})"


def _ratio(x: float) -> tuple[int, int]:
    """A number as numerator and denominator: the decimal that it was written as, where it has few enough digits to be one."""
    mantissa, _, exponent = repr(x).partition("e")
    whole, _, fraction = mantissa.partition(".")
    if len((whole + fraction).strip("-0")) > _DIGITS_MAX:
        return x.as_integer_ratio()
    power = int(exponent or 0) - len(fraction)
    return (int(whole + fraction) * 10**power, 1) if power >= 0 else (int(whole + fraction), 10**-power)


IDENTITY: Final = Linear(1)


#: canonical spelling -> (what pint calls it, other spellings). Case counts: `mm` and `Mm` are nine powers of ten apart.
_UNITS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    # temperature
    "°C": ("degC", ("Cel", "degC", "celsius", "Celcius", "degree_Celsius", "C deg", "C°", "deg.C")),
    "°F": ("degF", ("degF", "fahrenheit", "degree_Fahrenheit", "F deg", "F°", "deg.F")),
    "K": ("kelvin", ("kelvin", "°K", "degK")),
    # ratio
    "%": ("percent", ("%RH", "% RH", "RH%", "RH %", "%r.H.", "% r.H.", "%rF", "% r.F.", "percent", "per cent", "percentage", "pct", "%EL", "%VWC", "% VWC", "%LEL")),
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
    "m³": ("m**3", ("m3", "M3", "cbm")),
    "cm³": ("cm**3", ("cm3", "ccm")),
    "L": ("liter", ("l", "ltr", "liter", "litre")),
    "mL": ("milliliter", ("ml", "milliliter", "millilitre")),
    "gal": ("gallon", ("gallon", "gallons")),
    # time, frequency
    "s": ("s", ("sec", "secs", "second")),
    "ms": ("ms", ("msec", "millisecond")),
    "µs": ("us", ("us",)),
    "min": ("minute", ("mins", "minute")),
    "h": ("hour", ("hr", "hrs", "hour")),
    "d": ("day", ("day", "days")),
    "Hz": ("hertz", ("hz", "1/s")),
    "kHz": ("kilohertz", ("khz",)),
    "MHz": ("megahertz", ()),
    "GHz": ("gigahertz", ()),
    # Revolutions are counted: 50 Hz are 3000 rpm. pint would take the angle for a factor of its own.
    "rpm": ("count/minute", ("RPM", "U/min", "1/min", "r/min")),
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
    "µg/m³": ("ug/m**3", ("ug/m3", "mcg/m3")),
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
    "°": ("plane_angle*degree", ("deg", "degree", "degrees", "º", "lat", "lon")),
    "rad": ("plane_angle*radian", ("radian", "radians")),
    "mrad": ("plane_angle*milliradian", ()),
    "°/s": ("plane_angle*degree/s", ("deg/s", "dps")),
    "m³/h": ("m**3/hour", ("m3/h", "m3/hr", "M3/H", "M3/h", "cmh", "cbm/h")),
    "m³/s": ("m**3/s", ("m3/s",)),
    "L/h": ("liter/hour", ("l/h",)),
    "L/min": ("liter/minute", ("l/min", "lpm", "LPM")),
    "L/s": ("liter/s", ("l/s",)),
    # electricity
    "V": ("volt", ("volt", "Volt", "volts")),
    "mV": ("millivolt", ("mv",)),
    "kV": ("kilovolt", ()),
    "A": ("ampere", ("amp", "amps", "ampere")),
    "mA": ("milliampere", ("ma",)),
    "µA": ("microampere", ("uA",)),
    "Ω": ("ohm", ("ohm", "Ohm", "ohms")),
    "kΩ": ("kiloohm", ("kohm", "kOhm")),
    "MΩ": ("megaohm", ("Mohm", "MOhm")),
    "W": ("watt", ("watt", "Watt")),
    "mW": ("milliwatt", ()),
    "kW": ("kilowatt", ()),
    "MW": ("megawatt", ()),
    "VA": ("apparent*volt*ampere", ()),
    "kVA": ("apparent*kilovolt*ampere", ()),
    "var": ("reactive*volt*ampere", ("VAr", "VAR")),
    "kvar": ("reactive*kilovolt*ampere", ("kVAr",)),
    "J": ("joule", ()),
    "kJ": ("kilojoule", ()),
    "MJ": ("megajoule", ()),
    "GJ": ("gigajoule", ()),
    "Wh": ("watt*hour", ("W⋅h",)),
    "kWh": ("kilowatt*hour", ("kwh", "kW⋅h")),
    "MWh": ("megawatt*hour", ("MW⋅h",)),
    "Ah": ("ampere*hour", ()),
    "mAh": ("milliampere*hour", ()),
    "C": ("coulomb", ("coulomb",)),
    "F": ("farad", ("farad",)),
    "H": ("henry", ("henry",)),
    "T": ("tesla", ("tesla",)),
    "µT": ("microtesla", ("uT",)),
    "S/m": ("siemens/m", ()),
    "mS/cm": ("millisiemens/cm", ()),
    "µS/cm": ("microsiemens/cm", ("uS/cm", "us/cm", "µs/cm")),
    "dS/m": ("decisiemens/m", ()),
    "mS/m": ("millisiemens/m", ()),
    # light, radiation
    "lx": ("lux", ("lux", "Lux", "LUX")),
    "klx": ("kilolux", ("klux",)),
    "lm": ("plane_angle**2*lumen", ("lumen",)),
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
    "B": ("information*byte", ("byte", "bytes")),
    "kB": ("information*kilobyte", ("KB",)),
    "MB": ("information*megabyte", ()),
    "bit": ("information*bit", ()),
    "bit/s": ("information*bit/s", ("bps",)),
    "kbit/s": ("information*kilobit/s", ("kbps",)),
    "Mbit/s": ("information*megabit/s", ("Mbps",)),
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
_SIGNS: Final = {
    0x03BC: "µ", 0x2126: "Ω", 0x2103: "°C", 0x2109: "°F", 0x2212: "-", 0x2030: "‰",
    # Not degree signs, but what stands in their place: the masculine ordinal, the ring above.
    0x00BA: "°", 0x02DA: "°",
}  # fmt: skip
_SUPERSCRIPT: Final = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUBSCRIPT_MARKS: Final = re.compile(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
#: What a data sheet writes between factors: dot operator, middle dot, bullet, times.
_DOTS: Final = re.compile(r"[⋅·•×∙*]|(?<=[A-Za-z0-9]) (?=[A-Za-z])")
_COMPOSED: Final = re.compile(r"(?:1|[A-Za-zµΩ]+(?:[²³]|\^\d)?)(?:[⋅/][A-Za-zµΩ]+(?:[²³]|\^\d)?)*")
_FACTOR: Final = re.compile(r"(?P<unit>[^\d\s*/^+-]+?)(?:\^?(?P<power>[+-]?\d))?$|1$")


def _plain(text: str) -> str:
    """One form for the many ways to write the same characters: micro, ohm and degree signs, degree letters, blanks."""
    text = text.strip().translate(_SIGNS)
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

#: Spelling without its case -> spellings of the table.
_FOLDED: Final[dict[str, set[str]]] = {}
for _spelling in _SPELLINGS:
    _FOLDED.setdefault(_spelling.casefold(), set()).add(_spelling)

_DEGREES: Final = re.compile(
    r"(?:°|deg(?:ree)?s?|grad)[ ._]*(?:(c)(?:el[sc]ius)?|(f)(?:ahrenheit)?|k(?:elvin)?)", re.IGNORECASE
)
#: What else a unit may mean where its first meaning does not fit: nobody sends coulombs for a temperature.
_OTHERWISE: Final = {"C": "°C", "F": "°F", "c": "°C", "f": "°F"}
#: Spellings of fewer letters are symbols: an s at their end is a second, and m and M before them are milli and mega.
_WORD_LETTERS_MIN: Final = 4


@lru_cache(maxsize=_CACHE_MAX)
def canonical(unit: str | None) -> tuple[str, bool]:
    """(canonical spelling, whether the unit is known); "" where there is none.

    A spelling counts as it stands before it counts in another case. An unknown unit keeps its own spelling, tidied up.
    """
    if unit is None or (text := _plain(unit)) in _NONE:
        return "", True
    tidy = _tidy(text)
    known = _SPELLINGS.get(text) or _SPELLINGS.get(tidy) or _SPELLINGS.get(_singular(text))
    if known is None and (degrees := _DEGREES.fullmatch(text)) is not None:
        known = "°C" if degrees[1] else "°F" if degrees[2] else "K"
    if known is not None:
        return known, True
    if _registered(text) is not None:
        return text[:UNIT_CHARACTERS_MAX].strip(), True
    known = _in_another_case(text) or _in_another_case(tidy)
    return (known, True) if known is not None else (text[:UNIT_CHARACTERS_MAX].strip(), False)


def _singular(text: str) -> str:
    return text[:-1] if len(text) > _WORD_LETTERS_MIN and text.endswith("s") and text.isalpha() else text


def _in_another_case(text: str) -> str | None:
    """The unit of a spelling in another case or in the plural; None where there is none, or more than one."""
    folded = text.casefold()
    for spelling in (folded, _singular(folded)):
        found = {
            _SPELLINGS[each]
            for each in _FOLDED.get(spelling, ())
            if each[0] not in "mM" or each[0] == text[0] or (len(each) > _WORD_LETTERS_MIN and each.isalpha())
        }
        if len(found) == 1:
            return found.pop()
    return None


@lru_cache(maxsize=1)
def _registry() -> Any:
    # pint takes 0.4 s to load its definitions: only where a conversion is asked for.
    import pint

    registry: Any = pint.UnitRegistry(cache_folder=None, non_int_type=Fraction)
    registry.define("ppb = 1e-9")
    # To pint an angle, an amount of information and a ratio are one, as are the three powers of alternating current.
    for apart in ("plane_angle", "information", "apparent", "reactive"):
        registry.define(f"{apart} = [{apart}]")
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
    """How to get from one unit to another; None where they do not measure the same, or one is not known."""
    source, known = canonical(given)
    target, target_known = canonical(wanted)
    if source == target:
        return IDENTITY
    if not known or not target_known:
        return None
    linear = _linear(source, target)
    return linear if linear is not None or source not in _OTHERWISE else _linear(_OTHERWISE[source], target)


def _linear(source: str, target: str) -> Linear | None:
    if source == target:
        return IDENTITY
    from_unit, to_unit = _unit(source), _unit(target)
    if from_unit is None or to_unit is None:
        return None
    quantity = _registry().Quantity
    try:
        zero, one, far = (Fraction(quantity(Fraction(x), from_unit).to(to_unit).magnitude) for x in (0, 1, 1_000_000))
    except Exception:  # another dimension, or a scale of pint's that cannot be multiplied
        return None
    linear = Linear(one - zero, zero)
    # A logarithmic scale is not linear: two points would agree with any line.
    return linear if linear.factor and far == linear.factor * 1_000_000 + linear.offset else None
