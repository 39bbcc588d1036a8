"""Wired M-Bus: RSP_UD long frames (EN 13757-2) with variable data (EN 13757-3) or, of old meters, fixed data (CI 73).

A field is named by its quantity; what is not the current value says so behind it: `volume`, `volume.storage1`,
`power.maximum`, `energy.tariff2`. Several of one name are told apart by their pin. What is specific to the
manufacturer is in the records, but no field.

The radio variant is in `wmbus`; records are in `mbus_records`, for both.
"""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import Decoded, ParserError, Value, failed, payload_bytes, source_of
from preservarium.domain.decoders.mbus_records import Record, Torn, records, scaled
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import Reject

#: Start, length, length, start; C, A, CI; the header of 12 bytes; checksum, stop.
_SHORTEST: Final = 4 + 3 + 12 + 2
_VARIABLE: Final = 0x72
_FIXED: Final = 0x73
#: Behind the CI field of fixed data: identification, access number, status, medium and units, two counters.
_FIXED_BYTES: Final = 16
#: A long frame's length field is one byte.
FRAME_BYTES_MAX: Final = 261
#: Modes of the configuration word (EN 13757-7): DES, AES-CBC, AES-CMAC, TLS. Old meters leave a signature there, which is
#: none of these; decrypted data begins with two fill bytes.
_ENCRYPTED: Final = frozenset({2, 3, 5, 7, 13})
_FUNCTIONS: Final = {
    "INSTANTANEOUS_VALUE": "", "MAXIMUM_VALUE": "maximum", "MINIMUM_VALUE": "minimum", "ERROR_STATE_VALUE": "error",
}  # fmt: skip


class MbusDecoder:
    """Payloads are bytes, or their hexadecimal or base64 text."""

    def records(self, raw: RawMessage) -> dict[str, Any]:
        """The frame as it is: its header, and each record with value, unit, function and storage number.

        Raises:
            Reject: DECODE_FAILED, it is no whole frame with data, or it is encrypted.
        """
        data = payload_bytes(raw["payload"])
        _check(data)
        if data[6] == _FIXED:
            return _fixed(data[7:-2])
        found, torn = all_records(data[19:-2])
        return {
            "manufacturer": manufacturer(data[11:13]),
            "id": data[7:11][::-1].hex(),
            "version": data[13],
            "medium": data[14],
            "access_number": data[15],
            "status": data[16],
            "records": found,
            **({"warnings": torn} if torn else {}),
        }

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The values of a frame, and why the rest of it cannot be read.

        Raises:
            Reject: see `records`.
        """
        return fields(self.records(raw))


def all_records(data: bytes, layout: bytes | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of a frame as documents, and why what stands behind them cannot be read.

    Raises:
        Reject: DECODE_FAILED, none can be read.
    """
    found: list[dict[str, Any]] = []
    try:
        for record in records(data, layout):
            found.append(as_document(record))
    except Torn as e:
        message = f"a record of the frame cannot be read: {e}"
        if not any(record["value"] is not None for record in found):
            raise failed(message) from None
        return found, [message]
    return found, []


def fields(frame: Mapping[str, Any]) -> list[Decoded | Reject]:
    """The records of a frame as fields, and why the rest of it cannot be read.

    Raises:
        Reject: DECODE_FAILED, none holds a value.
    """
    named: dict[str, list[tuple[Value, str | None]]] = {}
    for record in frame["records"]:
        if record["quantity"] is None or record["value"] is None:
            continue
        name = record["quantity"]
        if suffix := _FUNCTIONS.get(record["function"], record["function"].lower()):
            name += f".{suffix}"
        for key, word in (("storage_number", "storage"), ("tariff", "tariff"), ("subunit", "subunit")):
            if record[key]:
                name += f".{word}{record[key]}"
        named.setdefault(name, []).append((record["value"], record["unit"]))
    out: list[Decoded | Reject] = []
    for name, values in named.items():
        for i, (value, unit) in enumerate(values, 1):
            out.append(Decoded(name, value, unit, None, str(i) if len(values) > 1 else None))
    if not out:
        message = "the frame holds no values"
        raise failed(message)
    out += [failed(message) for message in frame.get("warnings", ())]
    return out


def as_document(record: Record) -> dict[str, Any]:
    """A record as `preservarium decode` prints it."""
    return {
        "quantity": record.quantity, "value": record.value, "unit": record.unit, "function": record.function,
        "storage_number": record.storage, "tariff": record.tariff, "subunit": record.subunit,
    }  # fmt: skip


def manufacturer(field: bytes) -> str:
    """Three letters out of two bytes (EN 62056-21)."""
    number = int.from_bytes(field, "little")
    return "".join(chr((number >> shift & 31) + 64) for shift in (10, 5, 0))


def _check(data: bytes) -> None:
    """Raise for what is no frame that carries values."""
    message = ""
    if len(data) < 9 or data[0] != 0x68 or data[3] != 0x68:
        message = "no M-Bus long frame: it starts with 68 LL LL 68"
    elif len(data) > FRAME_BYTES_MAX or data[1] != data[2] or data[1] + 6 != len(data) or data[-1] != 0x16:
        message = f"the frame is torn: it says {data[1]} and {data[2]} bytes, and has {len(data) - 6}"
    elif sum(data[4:-2]) & 0xFF != data[-2]:
        message = "the frame's checksum is wrong"
    elif data[6] == _FIXED:
        if len(data) != 4 + 3 + _FIXED_BYTES + 2:
            message = f"a frame with fixed data (CI 73) has {_FIXED_BYTES} bytes of it"
    elif data[6] != _VARIABLE:
        message = f"CI field {data[6]:02X}: only responses with data (CI 72, CI 73) carry values"
    elif len(data) < _SHORTEST:
        message = "the frame is too short for its header"
    elif data[18] & 0x1F in _ENCRYPTED and data[19:21] != b"\x2f\x2f":
        message = f"the frame is encrypted (mode {data[18] & 0x1F}): decrypt it before it comes here"
    if message:
        raise failed(message)


# --- fixed data (EN 1434-3, M-Bus 6.2) ---------------------------------------------------------------------------------

#: Unit codes, the first of each decade: (code, how many, quantity, power of ten, unit).
_FIXED_UNITS: Final = (
    (0x02, 9, "energy", 0, "Wh"), (0x0B, 9, "energy", 3, "J"), (0x14, 9, "power", 0, "W"), (0x1D, 9, "power", 3, "J/h"),
    (0x26, 9, "volume", -6, "m³"), (0x2F, 9, "volume_flow", -6, "m³/h"), (0x38, 1, "temperature", -3, "°C"),
    (0x39, 1, "units_for_hca", 0, "H.C.A"),
)  # fmt: skip
_SAME_BUT_HISTORIC: Final = 0x3E
_BINARY, _STORED = 0x01, 0x02


def _fixed(data: bytes) -> dict[str, Any]:
    status, units = data[5], [data[6] & 0x3F, data[7] & 0x3F]
    found = []
    for i, code in enumerate(units):
        counter = data[8 + 4 * i : 12 + 4 * i]
        quantity, exponent, unit = _fixed_unit(units[0] if code == _SAME_BUT_HISTORIC else code)
        value: Value = None
        if status & _BINARY:
            value = scaled(int.from_bytes(counter, "little", signed=True), exponent)
        elif (digits := counter[::-1].hex()).isdigit():
            value = scaled(int(digits), exponent)
        historic = bool(status & _STORED) or (i == 1 and code == _SAME_BUT_HISTORIC)
        found.append(
            as_document(Record(quantity, value, unit, "INSTANTANEOUS_VALUE", int(historic), None, None, f"{code:02x}"))
        )
    return {
        "manufacturer": "", "id": data[:4][::-1].hex(), "version": 0, "medium": data[6] >> 6 | data[7] >> 6 << 2,
        "access_number": data[4], "status": status, "records": found,
    }  # fmt: skip


def _fixed_unit(code: int) -> tuple[str | None, int, str | None]:
    for first, count, quantity, exponent, unit in _FIXED_UNITS:
        if first <= code < first + count:
            return quantity, exponent + code - first, unit
    return f"counter_unit_{code:02x}", 0, None


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> MbusDecoder:
    """The decoder of an `mbus` parser: there is nothing to set.

    Raises:
        ParserError: the source says something.
    """
    if source_of(doc).keys() - {"description"}:
        message = "an mbus parser has no settings"
        raise ParserError(message)
    return MbusDecoder()
