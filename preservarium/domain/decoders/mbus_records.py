"""Records of the M-Bus application layer (EN 13757-3): data information, value information, data. Pure; for wire and radio alike.

A record's quantity is what its VIF says, with what its VIFEs say besides behind it (`energy.negative_accumulation`). Numbers are scaled in
decimal. What the standard marks as invalid (a signed number of which only the sign is set, digits beyond 9, a date of 31.15.) has no value.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Final, NamedTuple

from preservarium.domain.decoders.base import Value

#: DIFEs and VIFEs of one record (EN 13757-3, 6.3.3).
EXTENSIONS_MAX: Final = 10
#: Records of one frame: one takes two bytes or more.
RECORDS_MAX: Final = 200

_FILL: Final = 0x2F
_MANUFACTURER: Final = (0x0F, 0x1F)
_FUNCTIONS: Final = ("INSTANTANEOUS_VALUE", "MAXIMUM_VALUE", "MINIMUM_VALUE", "ERROR_STATE_VALUE")
_SIZES: Final = (0, 1, 2, 3, 4, 4, 6, 8, 0, 1, 2, 3, 4, -1, 6, 0)
_SECONDS: Final = (1, 60, 3_600, 86_400)
#: Mean Gregorian month and year.
_MONTH: Final = 2_629_746
_YEAR: Final = 31_556_952


class Torn(ValueError):
    """The data end inside a record, or a record is none of EN 13757-3."""


class Record(NamedTuple):
    """One value of a frame."""

    quantity: str | None  #: None: specific to the manufacturer
    value: Value
    unit: str | None
    function: str
    storage: int
    tariff: int | None  #: None where there is no DIFE
    subunit: int | None
    code: str  #: DIF, DIFEs, VIF and VIFEs, hexadecimal


class _Meaning(NamedTuple):
    quantity: str
    exponent: int = 0
    unit: str | None = None
    factor: int = 1
    form: str = "number"


def _decades(table: dict[int, _Meaning], first: int, count: int, quantity: str, exponent: int, unit: str) -> None:
    for i in range(count):
        table[first + i] = _Meaning(quantity, exponent + i, unit)


def _times(table: dict[int, _Meaning], first: int, quantity: str, factors: Sequence[int] = _SECONDS) -> None:
    for i, factor in enumerate(factors):
        table[first + i] = _Meaning(quantity, 0, "s", factor)


def _primary() -> dict[int, _Meaning]:
    table: dict[int, _Meaning] = {}
    _decades(table, 0x00, 8, "energy", -3, "Wh")
    _decades(table, 0x08, 8, "energy", 0, "J")
    _decades(table, 0x10, 8, "volume", -6, "m³")
    _decades(table, 0x18, 8, "mass", -3, "kg")
    _times(table, 0x20, "on_time")
    _times(table, 0x24, "operating_time")
    _decades(table, 0x28, 8, "power", -3, "W")
    _decades(table, 0x30, 8, "power", 0, "J/h")
    _decades(table, 0x38, 8, "volume_flow", -6, "m³/h")
    _decades(table, 0x40, 8, "volume_flow_ext", -7, "m³/min")
    _decades(table, 0x48, 8, "volume_flow_ext_s", -9, "m³/s")
    _decades(table, 0x50, 8, "mass_flow", -3, "kg/h")
    _decades(table, 0x58, 4, "flow_temperature", -3, "°C")
    _decades(table, 0x5C, 4, "return_temperature", -3, "°C")
    _decades(table, 0x60, 4, "temperature_difference", -3, "K")
    _decades(table, 0x64, 4, "external_temperature", -3, "°C")
    _decades(table, 0x68, 4, "pressure", -3, "bar")
    table[0x6C] = _Meaning("date", form="date")
    table[0x6D] = _Meaning("date_time", form="date")
    table[0x6E] = _Meaning("units_for_hca", 0, "H.C.A")
    _times(table, 0x70, "avg_duration")
    _times(table, 0x74, "actuality_duration")
    for code, name in ((0x78, "fabrication_no"), (0x79, "identification"), (0x7A, "address")):
        table[code] = _Meaning(name, form="plain")
    table[0x7E] = _Meaning("any_vif")
    return table


def _second() -> dict[int, _Meaning]:
    """VIF FD."""
    table: dict[int, _Meaning] = {}
    _decades(table, 0x00, 4, "currency_credit", -3, "Currency unit")
    _decades(table, 0x04, 4, "currency_debit", -3, "Currency unit")
    plain = (
        "access_number", "medium", "manufacturer", "parameter_set_id", "model_version", "hardware_version", "firmware_version",
        "software_version", "customer_location", "customer", "access_code_user", "access_code_operator",
        "access_code_system_operator", "access_code_developer", "password", "error_flags", "error_masks", "reserved",
        "digital_output", "digital_input",
    )  # fmt: skip
    for i, name in enumerate(plain):
        table[0x08 + i] = _Meaning(name, form="plain")
    table[0x1C] = _Meaning("baudrate", 0, "Baud")
    table[0x1D] = _Meaning("response_delay", 0, "Bittimes")
    table[0x1E] = _Meaning("retry")
    for code, name in ((0x20, "first_storage_nr"), (0x21, "last_storage_nr"), (0x22, "size_of_storage_block")):
        table[code] = _Meaning(name, form="plain")
    _times(table, 0x24, "storage_interval", (*_SECONDS, _MONTH, _YEAR))
    _times(table, 0x2C, "duration_since_last_readout")
    table[0x30] = _Meaning("start_of_tariff", form="date")
    _times(table, 0x31, "duration_of_tariff", _SECONDS[1:])
    _times(table, 0x34, "period_of_tariff", (*_SECONDS, _MONTH, _YEAR))
    table[0x3A] = _Meaning("dimensionless")
    _times(table, 0x3C, "period_of_transmission")
    _decades(table, 0x40, 16, "volts", -9, "V")
    _decades(table, 0x50, 16, "ampere", -12, "A")
    for code, name in ((0x60, "reset_counter"), (0x61, "cumulation_counter"), (0x62, "control_signal"), (0x63, "day_of_week"),
                       (0x64, "week_number"), (0x65, "time_point_of_day_change"), (0x66, "state_of_parameter_activation"),
                       (0x67, "special_supplier_information")):  # fmt: skip
        table[code] = _Meaning(name, form="plain")
    _times(table, 0x68, "duration_since_last_cumulation", (3_600, 86_400, _MONTH, _YEAR))
    _times(table, 0x6C, "operating_time_battery", (3_600, 86_400, _MONTH, _YEAR))
    table[0x70] = _Meaning("date_time_of_battery_change", form="date")
    table[0x71] = _Meaning("rssi", 0, "dBm", form="rssi")
    table[0x72] = _Meaning("daylight_saving", form="plain")
    table[0x74] = _Meaning("remaining_battery_life", 0, "d")
    table[0x75] = _Meaning("stops", form="plain")
    return table


def _first() -> dict[int, _Meaning]:
    """VIF FB (and 7B)."""
    table: dict[int, _Meaning] = {}
    _decades(table, 0x00, 2, "energy", 5, "Wh")
    _decades(table, 0x02, 2, "reactive_energy", 0, "kvarh")
    _decades(table, 0x04, 2, "apparent_energy", 0, "kVAh")
    _decades(table, 0x08, 2, "energy", 8, "J")
    _decades(table, 0x0C, 4, "energy", -1, "Mcal")
    _decades(table, 0x10, 2, "volume", 2, "m³")
    _decades(table, 0x14, 4, "reactive_power", -3, "kvar")
    _decades(table, 0x18, 2, "mass", 5, "kg")
    _decades(table, 0x1A, 2, "relative_humidity", -1, "%")
    table[0x20] = _Meaning("volume", 0, "feet^3")
    table[0x21] = _Meaning("volume", -1, "feet^3")
    _decades(table, 0x22, 2, "volume", -1, "American gallon")
    table[0x24] = _Meaning("volume_flow", -3, "American gallon/min")
    table[0x25] = _Meaning("volume_flow", 0, "American gallon/min")
    table[0x26] = _Meaning("volume_flow", 0, "American gallon/h")
    _decades(table, 0x28, 2, "power", 5, "W")
    table[0x2A] = _Meaning("phase_voltage_to_voltage", -1, "°")
    table[0x2B] = _Meaning("phase_voltage_to_current", -1, "°")
    _decades(table, 0x2C, 4, "frequency", -3, "Hz")
    _decades(table, 0x30, 2, "power", 8, "J/h")
    _decades(table, 0x34, 4, "apparent_power", -3, "kVA")
    for first, name in ((0x58, "flow_temperature"), (0x5C, "return_temperature"), (0x60, "temperature_difference"),
                        (0x64, "external_temperature"), (0x70, "temperature_limit")):  # fmt: skip
        _decades(table, first, 4, name, -3, "degF")
    _decades(table, 0x74, 4, "temperature_limit", -3, "°C")
    _decades(table, 0x78, 8, "cumul_count_max_power", -3, "W")
    return table


PRIMARY: Final = _primary()
FIRST: Final = _first()
SECOND: Final = _second()

#: VIFEs that say more of a quantity (EN 13757-3, table 15).
_MORE: Final = {
    0x20: "per_second", 0x21: "per_minute", 0x22: "per_hour", 0x23: "per_day", 0x24: "per_week", 0x25: "per_month", 0x26: "per_year",
    0x27: "per_revolution", 0x28: "per_input_pulse0", 0x29: "per_input_pulse1", 0x2A: "per_output_pulse0", 0x2B: "per_output_pulse1",
    0x2C: "per_liter", 0x2D: "per_m3", 0x2E: "per_kg", 0x2F: "per_kelvin", 0x30: "per_kwh", 0x31: "per_gj", 0x32: "per_kw",
    0x33: "per_kelvin_liter", 0x34: "per_volt", 0x35: "per_ampere", 0x36: "mult_sek", 0x37: "mult_sek_per_volt",
    0x38: "mult_sek_per_ampere", 0x39: "start_date_time", 0x3A: "uncorrected_unit", 0x3B: "positive_accumulation",
    0x3C: "negative_accumulation", 0x40: "lower_limit", 0x48: "upper_limit", 0x41: "exceeds_of_lower_limit",
    0x49: "exceeds_of_upper_limit", 0x7E: "future",
}  # fmt: skip
_PHASES: Final = {0x01: "l1", 0x02: "l2", 0x03: "l3", 0x04: "neutral", 0x05: "l1_l2", 0x06: "l2_l3", 0x07: "l3_l1"}
#: VIFEs whose record has a date instead of a number: the beginning or the end of something.
_DATED: Final = frozenset({0x39, *range(0x42, 0x48), *range(0x4A, 0x50), *range(0x68, 0x70)} - {0x6A, 0x6B})
#: VIFEs under which a number is a duration, by their last two bits.
_LASTS: Final = frozenset(range(0x50, 0x68))
#: VIFEs that say why there is no value (EN 13757-3, table 16).
_FAULTS: Final = frozenset({0x0B, 0x0C, 0x15, 0x16, 0x17, 0x18})


def records(data: bytes, layout: bytes | None = None) -> Iterator[Record]:
    """The records of a frame, in their order.

    Args:
        data: behind the frame's header, decrypted.
        layout: DIFs and VIFs, where `data` has none (compact frames).

    Raises:
        Torn: they end inside a record; those before it were given.
    """
    head, position, at = (data if layout is None else layout), 0, 0
    apart = layout is not None
    count = 0
    while position < len(head):
        first = head[position]
        if first == _FILL:
            position += 1
            continue
        if first in _MANUFACTURER:
            rest = data[at if apart else position + 1 :]
            more = first == _MANUFACTURER[1] and not rest
            function = "MORE_RECORDS_FOLLOW" if more else "MANUFACTURER_SPECIFIC"
            yield Record(None, rest.hex(), None, function, 0, None, None, f"{first:02x}")
            return
        if first & 0x0F == 0x0F:
            message = f"a data field {first:02X} is reserved"
            raise Torn(message)
        count += 1
        if count > RECORDS_MAX:
            message = f"more than {RECORDS_MAX} records"
            raise Torn(message)
        record, position, at = _record(head, position, data, at, apart=apart)
        yield record


def _chain(head: bytes, position: int, what: str) -> tuple[bytes, int]:
    """A byte and those that its extension bit says follow."""
    start = position
    while True:
        if position >= len(head):
            message = f"the data end inside a {what}"
            raise Torn(message)
        if position - start > EXTENSIONS_MAX:
            message = f"more than {EXTENSIONS_MAX} extensions of a {what}"
            raise Torn(message)
        position += 1
        if not head[position - 1] & 0x80:
            return head[start:position], position


def _record(head: bytes, position: int, data: bytes, at: int, *, apart: bool) -> tuple[Record, int, int]:
    start = position
    dif, position = _chain(head, position, "DIF")
    vif, text, position = _value_information(head, position)
    code = head[start:position].hex()
    if not apart:
        at = position
    size = _SIZES[dif[0] & 0x0F]
    kind = "bcd" if dif[0] & 0x0F in (9, 10, 11, 12, 14) else "real" if dif[0] & 0x0F == 5 else "integer"
    if size < 0:
        if at >= len(data):
            message = "the data end before a length"
            raise Torn(message)
        kind, size = _variable(data[at])
        at += 1
    if at + size > len(data):
        message = f"the data end inside a value: {size} bytes are needed, {len(data) - at} are there"
        raise Torn(message)
    raw, at = data[at : at + size], at + size
    storage, tariff, subunit = _numbers(dif)
    quantity, value, unit = _meant(vif, text, kind, raw)
    record = Record(quantity, value, unit, _FUNCTIONS[dif[0] >> 4 & 3], storage, tariff, subunit, code)
    return record, position if apart else at, at


def _value_information(head: bytes, position: int) -> tuple[bytes, str | None, int]:
    """(VIF and VIFEs, the unit as plain text where it is given so, what stands behind them)."""
    if position >= len(head):
        message = "the data end before a VIF"
        raise Torn(message)
    if head[position] & 0x7F != 0x7C:
        vif, position = _chain(head, position, "VIF")
        return vif, None, position
    # The text stands behind the VIF, before the VIFEs, its last character first.
    vif = head[position : position + 1]
    size = head[position + 1] if position + 1 < len(head) else 0
    text = head[position + 2 : position + 2 + size]
    if len(text) < size:
        message = "the data end inside a unit"
        raise Torn(message)
    position += 2 + size
    if vif[0] & 0x80:
        extensions, position = _chain(head, position, "VIF")
        vif += extensions
    return vif, text[::-1].decode("latin-1").strip("\0 "), position


def _variable(length: int) -> tuple[str, int]:
    """(kind, bytes) that an LVAR says (EN 13757-3, 6.3.5)."""
    if length <= 0xBF:
        return "text", length
    if length <= 0xC9:
        return "bcd", length - 0xC0
    if 0xD0 <= length <= 0xD9:
        return "-bcd", length - 0xD0
    if 0xE0 <= length <= 0xEF:
        return "bytes", length - 0xE0
    if 0xF0 <= length <= 0xF4:
        return "bytes", 4 * (length - 0xEC)
    if length in (0xF5, 0xF6):
        return "bytes", 48 if length == 0xF5 else 64
    message = f"a length of {length:02X} is reserved"
    raise Torn(message)


def _numbers(dif: bytes) -> tuple[int, int | None, int | None]:
    storage = dif[0] >> 6 & 1
    tariff = subunit = None
    for i, one in enumerate(dif[1:]):
        storage |= (one & 0x0F) << (1 + 4 * i)
        tariff = (tariff or 0) | (one >> 4 & 3) << (2 * i)
        subunit = (subunit or 0) | (one >> 6 & 1) << i
    return storage, tariff, subunit


def _meant(vif: bytes, text: str | None, kind: str, raw: bytes) -> tuple[str, Value, str | None]:
    first = vif[0] & 0x7F
    rest = vif[1:]
    meaning: _Meaning | None
    if text is not None:
        meaning = _Meaning("variable_vif", 0, text or None)
    elif first == 0x7F:
        # Everything behind it is the manufacturer's own.
        quantity = ".".join(("manufacturer_spec", *(f"{one & 0x7F:02x}" for one in rest)))
        return quantity, _value(_Meaning(quantity), kind, raw, 0), None
    elif first == 0x7B or first == 0x7D:
        code = rest[0] & 0x7F if rest else -1
        meaning, rest = (FIRST if first == 0x7B else SECOND).get(code), rest[1:]
    else:
        meaning = PRIMARY.get(first)
    if meaning is None:
        quantity = "vif_" + vif.hex()
        return quantity, _value(_Meaning(quantity), kind, raw, 0), None
    if text is not None:
        meaning = meaning._replace(quantity="variable_vif")
    return _extended(meaning, rest, kind, raw)


def _extended(meaning: _Meaning, extensions: bytes, kind: str, raw: bytes) -> tuple[str, Value, str | None]:
    words, exponent, known = [meaning.quantity], meaning.exponent, True
    position = 0
    while position < len(extensions):
        one = extensions[position] & 0x7F
        position += 1
        if one == 0x7C and position < len(extensions):
            # The next one is of the second table: the phase that a value is of.
            two = extensions[position] & 0x7F
            position += 1
            words.append(_PHASES.get(two, f"vife_7c{two:02x}"))
        elif 0x70 <= one <= 0x77:
            exponent += (one & 7) - 6
        elif one == 0x7D:
            exponent += 3
        elif one == 0x7F:
            words += [f"{other & 0x7F:02x}" for other in extensions[position:]]
            break
        elif one in _FAULTS:
            known = False
        elif one < 0x20 or one == 0x3D or 0x78 <= one <= 0x7B:
            # A note on the record, or a constant to be added, which is of another accuracy: the number is what the meter shows.
            words.append(f"vife_{one:02x}")
        else:
            words.append(_MORE.get(one, f"vife_{one:02x}"))
            if one in _DATED:
                meaning = meaning._replace(form="date", unit=None)
            elif one in _LASTS:
                meaning, exponent = meaning._replace(unit="s", factor=_SECONDS[one & 3], form="number"), 0
    value = _value(meaning, kind, raw, exponent) if known else None
    unit = meaning.unit if meaning.form in ("number", "rssi") else None
    return ".".join(words), value, unit


def _value(meaning: _Meaning, kind: str, raw: bytes, exponent: int) -> Value:
    if not raw:
        return None
    if kind == "text":
        shown = raw[::-1].decode("latin-1").strip("\0 ")
        # A quantity with a unit is no text: a series of values packed into one record (compact profiles).
        return shown if meaning.unit is None and shown.isprintable() else raw.hex()
    if kind == "bytes" and (len(raw) > 8 or meaning.form == "plain"):
        return raw[::-1].hex()
    if meaning.form == "date" and kind in ("integer", "bytes"):
        return date(raw)
    if kind == "real":
        number: float = struct.unpack("<f", raw)[0]
        return _short(number * meaning.factor, exponent) if math.isfinite(number) else None
    whole = _digits(raw, kind) if kind.endswith("bcd") else _integer(raw, signed=meaning.form != "plain")
    if whole is None:
        return None
    if meaning.form == "rssi":
        return whole * 2 - 130 if whole >= 0 else whole
    return scaled(whole * meaning.factor, exponent)


def _integer(raw: bytes, *, signed: bool) -> int | None:
    number = int.from_bytes(raw, "little", signed=signed)
    # Of a signed number only the sign: invalid (EN 13757-3, type B). Of one byte it is a value of old meters, too.
    return None if signed and len(raw) > 1 and number == -(1 << (8 * len(raw) - 1)) else number


def _digits(raw: bytes, kind: str) -> int | None:
    """A number of decimal digits, the lowest first; F before them is a minus (EN 13757-3, type A)."""
    text = raw[::-1].hex()
    negative = kind == "-bcd"
    if text[0] == "f" and not negative:
        negative, text = True, text[1:]
    if not text.isdigit():
        return None
    return -int(text) if negative else int(text)


def scaled(whole: int, exponent: int) -> int | float:
    """`whole` times a power of ten, exactly where that is a whole number, else the nearest float."""
    if exponent >= 0:
        number: int = whole * 10**exponent
        return number if abs(number) < 2**63 else float(number)
    power: int = 10**-exponent
    if whole % power == 0:
        return whole // power
    return float(f"{whole}e{exponent}")


def _short(number: float, exponent: int) -> int | float:
    """A float of 32 bits with the digits that it has, scaled."""
    for digits in range(6, 10):
        text = f"{number:.{digits}g}"
        if struct.pack("<f", float(text)) == struct.pack("<f", number):
            break
    exact = float(Decimal(text).scaleb(exponent))
    return int(exact) if exact.is_integer() and abs(exact) < 2**53 else exact


def date(raw: bytes) -> str | None:
    """Types G (2 bytes), J (3), F (4) and I (6): as ISO 8601, local time of the meter; None where it is invalid or set to "every"."""
    if len(raw) == 3:
        second, minute, hour = raw[0] & 63, raw[1] & 63, raw[2] & 31
        return f"{hour:02}:{minute:02}:{second:02}" if hour < 24 and minute < 60 and second < 60 else None
    if len(raw) == 2:
        return _day(raw[0], raw[1])
    if len(raw) == 4:
        minute, hour = raw[0] & 63, raw[1] & 31
        day = None if raw[0] & 0x80 else _day(raw[2], raw[3], century=raw[1] >> 5 & 3)
        return f"{day}T{hour:02}:{minute:02}" if day and hour < 24 and minute < 60 else None
    if len(raw) == 6:
        second, minute, hour = raw[0] & 63, raw[1] & 63, raw[2] & 31
        day = None if raw[1] & 0x80 else _day(raw[3], raw[4])
        return f"{day}T{hour:02}:{minute:02}:{second:02}" if day and hour < 24 and minute < 60 and second < 60 else None
    return None


def _day(low: int, high: int, century: int = 0) -> str | None:
    day, month, year = low & 31, high & 15, low >> 5 | high >> 4 << 3
    if not 1 <= day <= 31 or not 1 <= month <= 12 or year > 99:
        return None
    # Two bits of a type F say the century since 1900; some meters count it from 1800, most leave it out: years below 81 are of this one.
    full = 2000 + year if century == 1 or year < 81 else 1900 + year
    return f"{full:04}-{month:02}-{day:02}"
