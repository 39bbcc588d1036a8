"""BTHome version 2, unencrypted: device information byte, then object id and value, again and again (bthome.io/format).

A second object of one kind gets the next pin: two temperatures are pins "1" and "2"; a single one has no pin. Objects have no length of their own: where one
is not known, what stands before it is read, and it and the rest are refused; what is cut off is refused as a whole. A MAC address before the objects (bit 1 of the device information) is no
measurement.
"""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import Decoded, ParserError, Value, failed, payload_bytes, source_of
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import Reject

#: Service data may come with its 16-bit UUID 0xFCD2 (little-endian) before it.
_UUID: Final = b"\xd2\xfc"
_ENCRYPTED: Final = 0x01
_HAS_MAC: Final = 0x02
_MAC_BYTES: Final = 6
_VERSION: Final = 2

#: object id -> (name, bytes, signed, factor, unit). Numbers are little-endian.
NUMBERS: Final[dict[int, tuple[str, int, bool, float, str | None]]] = {
    0x00: ("packet_id", 1, False, 1, None),
    0x01: ("battery", 1, False, 1, "%"),
    0x02: ("temperature", 2, True, 100, "°C"),
    0x03: ("humidity", 2, False, 100, "%"),
    0x04: ("pressure", 3, False, 100, "hPa"),
    0x05: ("illuminance", 3, False, 100, "lx"),
    0x06: ("mass", 2, False, 100, "kg"),
    0x07: ("mass", 2, False, 100, "lb"),
    0x08: ("dewpoint", 2, True, 100, "°C"),
    0x09: ("count", 1, False, 1, None),
    0x0A: ("energy", 3, False, 1000, "kWh"),
    0x0B: ("power", 3, False, 100, "W"),
    0x0C: ("voltage", 2, False, 1000, "V"),
    0x0D: ("pm2_5", 2, False, 1, "µg/m³"),
    0x0E: ("pm10", 2, False, 1, "µg/m³"),
    0x12: ("co2", 2, False, 1, "ppm"),
    0x13: ("tvoc", 2, False, 1, "µg/m³"),
    0x14: ("moisture", 2, False, 100, "%"),
    0x2E: ("humidity", 1, False, 1, "%"),
    0x2F: ("moisture", 1, False, 1, "%"),
    0x3A: ("button", 1, False, 1, None),
    0x3D: ("count", 2, False, 1, None),
    0x3E: ("count", 4, False, 1, None),
    0x3F: ("rotation", 2, True, 10, "°"),
    0x40: ("distance", 2, False, 1, "mm"),
    0x41: ("distance", 2, False, 10, "m"),
    0x42: ("duration", 3, False, 1000, "s"),
    0x43: ("current", 2, False, 1000, "A"),
    0x44: ("speed", 2, False, 100, "m/s"),
    0x45: ("temperature", 2, True, 10, "°C"),
    0x46: ("uv_index", 1, False, 10, None),
    0x47: ("volume", 2, False, 10, "L"),
    0x48: ("volume", 2, False, 1, "mL"),
    0x49: ("volume_flow_rate", 2, False, 1000, "m³/h"),
    0x4A: ("voltage", 2, False, 10, "V"),
    0x4B: ("gas", 3, False, 1000, "m³"),
    0x4C: ("gas", 4, False, 1000, "m³"),
    0x4D: ("energy", 4, False, 1000, "kWh"),
    0x4E: ("volume", 4, False, 1000, "L"),
    0x4F: ("water", 4, False, 1000, "L"),
    0x50: ("timestamp", 4, False, 1, "s"),
    0x51: ("acceleration", 2, False, 1000, "m/s²"),
    0x52: ("gyroscope", 2, False, 1000, "°/s"),
    0x55: ("volume_storage", 4, False, 1000, "L"),
    0x56: ("conductivity", 2, False, 1, "µS/cm"),
    0x57: ("temperature", 1, True, 1, "°C"),
    0x58: ("temperature", 1, True, 100 / 35, "°C"),
    0x59: ("count", 1, True, 1, None),
    0x5A: ("count", 2, True, 1, None),
    0x5B: ("count", 4, True, 1, None),
    0x5C: ("power", 4, True, 100, "W"),
    0x5D: ("current", 2, True, 1000, "A"),
    0x5E: ("direction", 2, False, 100, "°"),
    0x5F: ("precipitation", 2, False, 10, "mm"),
    0x60: ("channel", 1, False, 1, None),
    0x62: ("speed", 4, True, 1_000_000, "m/s"),
    0x64: ("light_level", 1, False, 1, None),
    0xF0: ("device_type_id", 2, False, 1, None),
    0xF1: ("firmware_version", 4, False, 1, None),
    0xF2: ("firmware_version", 3, False, 1, None),
}
#: object id -> name of a state that is on or off, one byte.
STATES: Final[dict[int, str]] = {
    0x0F: "generic", 0x10: "power_state", 0x11: "opening", 0x15: "battery_low", 0x16: "battery_charging",
    0x17: "carbon_monoxide", 0x18: "cold", 0x19: "connectivity", 0x1A: "door", 0x1B: "garage_door", 0x1C: "gas_detected",
    0x1D: "heat", 0x1E: "light", 0x1F: "lock", 0x20: "moisture_detected", 0x21: "motion", 0x22: "moving",
    0x23: "occupancy", 0x24: "plug", 0x25: "presence", 0x26: "problem", 0x27: "running", 0x28: "safety", 0x29: "smoke",
    0x2A: "sound", 0x2B: "tamper", 0x2C: "vibration", 0x2D: "window",
}  # fmt: skip
#: A factor of its own where the divisor is none: thousandths of a kilometre and the like do not occur in version 2.
_TEXT: Final = 0x53
_RAW: Final = 0x54
_DIMMER: Final = 0x3C


def _factor(number: int, divisor: float) -> Value:
    if divisor == 1:
        return number
    # Steps of 0.35 °C: of the quotient only the digits of the step are meant.
    return number / divisor if float(divisor).is_integer() else round(number / divisor, 2)


class BThomeDecoder:
    """Payloads are service data as bytes, or their hexadecimal or base64 text."""

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The objects of an advertisement, and why the rest cannot be read.

        Raises:
            Reject: DECODE_FAILED: encrypted, of another version, cut off, or nothing of it is known.
        """
        data = payload_bytes(raw["payload"])
        data = data[2:] if data.startswith(_UUID) else data
        if not data:
            message = "the payload is empty"
            raise failed(message)
        if data[0] >> 5 != _VERSION:
            message = f"BTHome version {data[0] >> 5}; {_VERSION} is known"
            raise failed(message)
        if data[0] & _ENCRYPTED:
            message = "the advertisement is encrypted"
            raise failed(message)
        found: list[tuple[str, Value, str | None]] = []
        position = 1 + (_MAC_BYTES if data[0] & _HAS_MAC else 0)
        refused: list[Reject] = []
        while position < len(data):
            if not _known(data[position]):
                message = f"object {data[position]:#04x} at byte {position} is not known"
                refused.append(failed(message))
                break
            position = self._object(data, position, found)
        if refused and not found:
            raise refused[0]
        names = [name for name, _, _ in found]
        seen: dict[str, int] = {}
        out: list[Decoded | Reject] = [*refused]
        for name, value, unit in found:
            seen[name] = seen.get(name, 0) + 1
            out.append(Decoded(name, value, unit, None, str(seen[name]) if names.count(name) > 1 else None))
        return out

    def _object(self, data: bytes, position: int, found: list[tuple[str, Value, str | None]]) -> int:
        kind = data[position]
        position += 1
        if kind in NUMBERS:
            name, size, signed, divisor, unit = NUMBERS[kind]
            value = _take(data, position, size)
            found.append((name, _factor(int.from_bytes(value, "little", signed=signed), divisor), unit))
            return position + size
        if kind in STATES:
            found.append((STATES[kind], _take(data, position, 1) != b"\0", None))
            return position + 1
        if kind == _DIMMER:
            value = _take(data, position, 2)
            found += [("dimmer", value[0], None), ("dimmer_steps", value[1], None)]
            return position + 2
        if kind in {_TEXT, _RAW}:
            size = _take(data, position, 1)[0]
            value = _take(data, position + 1, size)
            found.append(
                ("text", value.decode("utf-8", "replace").replace("\0", ""), None)
                if kind == _TEXT
                else ("raw", value.hex(), None)
            )
            return position + 1 + size
        raise AssertionError(kind)


def _known(kind: int) -> bool:
    return kind in NUMBERS or kind in STATES or kind in {_DIMMER, _TEXT, _RAW}


def _take(data: bytes, position: int, size: int) -> bytes:
    if position + size > len(data):
        message = f"the payload is too short: {size} bytes are needed at byte {position} of {len(data)}"
        raise failed(message)
    return data[position : position + size]


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> BThomeDecoder:
    """The decoder of a `bthome` parser: there is nothing to set.

    Raises:
        ParserError: the source says something.
    """
    if source_of(doc).keys() - {"description"}:
        message = "a bthome parser has no settings"
        raise ParserError(message)
    return BThomeDecoder()
