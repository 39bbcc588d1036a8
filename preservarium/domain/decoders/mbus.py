"""Wired M-Bus: RSP_UD long frames with variable data (EN 13757-2, EN 13757-3), read by pyMeterBus.

The library is an optional extra (`pip install 'preservarium[mbus]'`).

A field is named by its quantity; what is not the current value says so behind it: `volume`, `volume.storage1`,
`power.maximum`, `energy.tariff2`. Several of one name are told apart by their pin. What is specific to the
manufacturer is in the records, but no field.
"""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import Decoded, ParserError, Value, failed, payload_bytes, source_of
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import Reject

#: Start, length, length, start; C, A, CI; the header of 12 bytes; checksum, stop.
_SHORTEST: Final = 4 + 3 + 12 + 2
_VARIABLE: Final = 0x72
_FIXED: Final = 0x73
#: A long frame's length field is one byte.
FRAME_BYTES_MAX: Final = 261
#: Modes of the configuration word (EN 13757-7): DES, AES-CBC, AES-CMAC, TLS. Old meters leave a signature there, which is
#: none of these; decrypted data begins with two fill bytes.
_ENCRYPTED: Final = frozenset({2, 3, 5, 7, 13})
#: What a VIF's name says besides the quantity.
_SUFFIXES: Final = ("_wh", "_j", "_w", "_j_h", "_kg", "_general")
#: The library's units that mean something else elsewhere (C: coulomb), or no unit.
_UNITS: Final = {
    "C": "°C", "m^3": "m³", "m^3/h": "m³/h", "m^3/min": "m³/min", "m^3/s": "m³/s", "seconds": "s", "minutes": "min", "hours": "h",
    "days": "d", "none": None, "None": None, "": None, "date": None, "time": None, "date time": None, "date time to second": None,
}  # fmt: skip
_FUNCTIONS: Final = {
    "INSTANTANEOUS_VALUE": "", "MAXIMUM_VALUE": "maximum", "MINIMUM_VALUE": "minimum", "ERROR_STATE_VALUE": "error",
}  # fmt: skip


class MbusDecoder:
    """Payloads are bytes, or their hexadecimal or base64 text.

    Args:
        library: the module `meterbus`.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def records(self, raw: RawMessage) -> dict[str, Any]:
        """The frame as it is: its header, and each record with value, unit, function and storage number.

        Raises:
            Reject: DECODE_FAILED, it is no whole frame with variable data, or it is encrypted.
        """
        data = payload_bytes(raw["payload"])
        _check(data)
        try:
            telegram = self._library.TelegramLong.parse(data)
            header = telegram.body.bodyHeader.interpreted
            # The library lists a record twice that both ends the data and says that more follow.
            records = [_record(r) for r in {id(r): r for r in telegram.records}.values()]
        except Reject:
            raise
        except Exception:  # the library raises whatever a torn frame brings about, in words of its own code
            message = "no M-Bus frame: a record in it is torn, or of a kind that cannot be read"
            raise failed(message) from None
        return {
            "manufacturer": header["manufacturer"],
            "id": data[7:11][::-1].hex(),
            "version": data[13],
            "medium": data[14],
            "access_number": data[15],
            "status": data[16],
            "records": records,
        }

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The values of a frame.

        Raises:
            Reject: see `records`.
        """
        named: dict[str, list[tuple[Value, str | None]]] = {}
        for record in self.records(raw)["records"]:
            if record["quantity"] is None or record["value"] is None:
                continue
            name = record["quantity"]
            if suffix := _FUNCTIONS.get(record["function"], record["function"].lower()):
                name += f".{suffix}"
            for key, word in (("storage_number", "storage"), ("tariff", "tariff"), ("subunit", "subunit")):
                if record[key]:
                    name += f".{word}{record[key]}"
            named.setdefault(name, []).append((record["value"], record["unit"]))
        out: list[Decoded] = []
        for name, values in named.items():
            for i, (value, unit) in enumerate(values, 1):
                out.append(Decoded(name, value, unit, None, str(i) if len(values) > 1 else None))
        if not out:
            message = "the frame holds no values"
            raise failed(message)
        return out


def _check(data: bytes) -> None:
    """Raise for what the library would misread or not say clearly."""
    message = ""
    if len(data) < 9 or data[0] != 0x68 or data[3] != 0x68:
        message = "no M-Bus long frame: it starts with 68 LL LL 68"
    elif len(data) > FRAME_BYTES_MAX or data[1] != data[2] or data[1] + 6 != len(data) or data[-1] != 0x16:
        message = f"the frame is torn: it says {data[1]} and {data[2]} bytes, and has {len(data) - 6}"
    elif sum(data[4:-2]) & 0xFF != data[-2]:
        message = "the frame's checksum is wrong"
    elif data[6] == _FIXED:
        message = "a frame with fixed data (CI 73), which EN 13757-3 no longer has"
    elif data[6] != _VARIABLE:
        message = f"CI field {data[6]:02X}: only responses with variable data (CI 72) carry values"
    elif len(data) < _SHORTEST:
        message = "the frame is too short for its header"
    elif data[18] & 0x1F in _ENCRYPTED and data[19:21] != b"\x2f\x2f":
        message = f"the frame is encrypted (mode {data[18] & 0x1F}): decrypt it before it comes here"
    if message:
        raise failed(message)


def _record(record: Any) -> dict[str, Any]:
    if record.dib.is_eoud:
        value: Any = bytes(record.dataField.parts).hex()
        function = "MORE_RECORDS_FOLLOW" if record.dib.parts[0] == 0x1F and not value else "MANUFACTURER_SPECIFIC"
        return {"quantity": None, "value": value, "unit": None, "function": function, "storage_number": 0,
                "tariff": None, "subunit": None}  # fmt: skip
    try:
        told = record.interpreted
    except KeyError:
        return _bare(record)
    quantity = str(told["type"]).rpartition(".")[2].lower()
    for suffix in _SUFFIXES:
        quantity = quantity.removesuffix(suffix)
    if "unit_enh" in told:
        quantity += "." + str(told["unit_enh"]).rpartition(".")[2].lower()
    unit, parts = record.unit, record.dataField.parts
    return {
        "quantity": quantity,
        "value": _date_time(parts) if len(parts) == 6 and quantity == "date_time" else _value(told["value"]),
        "unit": _UNITS.get(str(unit), str(unit)),
        "function": str(told["function"]).rpartition(".")[2],
        "storage_number": told["storage_number"],
        "tariff": told.get("tariff"),
        "subunit": told.get("device"),
    }


def _bare(record: Any) -> dict[str, Any]:
    """A record whose value information nobody knows: the number as it stands, named by its code."""
    storage, tariff, subunit = record.dib.parse_dife()
    encoding, field = str(record.dib.length_encoding[1]).rpartition(".")[2], record.dataField
    value = {
        "ENCODING_INTEGER": lambda: field.decodeInt,
        "ENCODING_BCD": lambda: field.decodeBCD,
        "ENCODING_REAL": lambda: field.decodeReal,
    }.get(encoding, lambda: bytes(field.parts).hex())()
    return {
        "quantity": "vif_" + bytes(record.vib.parts).hex(),
        "value": _value(value),
        "unit": None,
        "function": str(record.dib.function_type).rpartition(".")[2],
        "storage_number": storage,
        "tariff": tariff,
        "subunit": subunit,
    }


def _date_time(parts: list[int]) -> str:
    """Type I of EN 13757-3: second, minute, hour, day, month and year in 48 bits; the library reads type F only."""
    second, minute, hour, day, month = parts[0] & 63, parts[1] & 63, parts[2] & 31, parts[3] & 31, parts[4] & 15
    year = 2000 + (parts[3] >> 5 | parts[4] >> 4 << 3)
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}"


def _value(given: Any) -> Value:
    if isinstance(given, int) and abs(given) >= 2**63:
        return float(given)  # eight bytes times a power of ten: more than JSON's readers take for a whole number
    if given is None or isinstance(given, bool | str | int):
        return given
    try:
        # The library multiplies by powers of ten in floating point; meters have at most 12 digits.
        number = float(f"{float(given):.12g}")
    except (TypeError, ValueError):
        return str(given)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> MbusDecoder:
    """The decoder of an `mbus` parser: there is nothing to set.

    Raises:
        ParserError: the source says something, or pyMeterBus is not installed.
    """
    if source_of(doc).keys() - {"description"}:
        message = "an mbus parser has no settings"
        raise ParserError(message)
    try:
        import meterbus
    except ImportError:
        message = "M-Bus needs pyMeterBus: pip install 'preservarium[mbus]'"
        raise ParserError(message) from None
    return MbusDecoder(meterbus)
