"""Cayenne Low Power Payload: channel, type, value, again and again (myDevices, "Cayenne LPP 2.0", and its IPSO extensions).

The field is named by the type; the channel is its pin.
"""

from collections.abc import Mapping
from typing import Any, Final

from preservarium.domain.decoders.base import Decoded, ParserError, failed, payload_bytes, source_of
from preservarium.domain.readings.reading import RawMessage

#: type -> (bytes, ((name, first byte, width, signed, divisor, unit), …)). Numbers are big-endian.
TYPES: Final[dict[int, tuple[int, tuple[tuple[str, int, int, bool, float, str | None], ...]]]] = {
    0: (1, (("digital_input", 0, 1, False, 1, None),)),
    1: (1, (("digital_output", 0, 1, False, 1, None),)),
    2: (2, (("analog_input", 0, 2, True, 100, None),)),
    3: (2, (("analog_output", 0, 2, True, 100, None),)),
    100: (4, (("generic_sensor", 0, 4, False, 1, None),)),
    101: (2, (("illuminance", 0, 2, False, 1, "lx"),)),
    102: (1, (("presence", 0, 1, False, 1, None),)),
    103: (2, (("temperature", 0, 2, True, 10, "°C"),)),
    104: (1, (("humidity", 0, 1, False, 2, "%"),)),
    113: (6, (("acceleration_x", 0, 2, True, 1000, "gn"), ("acceleration_y", 2, 2, True, 1000, "gn"),
              ("acceleration_z", 4, 2, True, 1000, "gn"))),
    115: (2, (("barometric_pressure", 0, 2, False, 10, "hPa"),)),
    116: (2, (("voltage", 0, 2, False, 100, "V"),)),
    117: (2, (("current", 0, 2, False, 1000, "A"),)),
    118: (4, (("frequency", 0, 4, False, 1, "Hz"),)),
    120: (1, (("percentage", 0, 1, False, 1, "%"),)),
    121: (2, (("altitude", 0, 2, True, 1, "m"),)),
    122: (3, (("load", 0, 3, False, 1000, "kg"),)),
    125: (2, (("concentration", 0, 2, False, 1, "ppm"),)),
    128: (2, (("power", 0, 2, False, 1, "W"),)),
    130: (4, (("distance", 0, 4, False, 1000, "m"),)),
    131: (4, (("energy", 0, 4, False, 1000, "kWh"),)),
    132: (2, (("direction", 0, 2, False, 1, "°"),)),
    133: (4, (("unix_time", 0, 4, False, 1, "s"),)),
    134: (6, (("gyrometer_x", 0, 2, True, 100, "°/s"), ("gyrometer_y", 2, 2, True, 100, "°/s"),
              ("gyrometer_z", 4, 2, True, 100, "°/s"))),
    135: (3, (("colour_red", 0, 1, False, 1, None), ("colour_green", 1, 1, False, 1, None),
              ("colour_blue", 2, 1, False, 1, None))),
    136: (9, (("latitude", 0, 3, True, 10_000, "°"), ("longitude", 3, 3, True, 10_000, "°"),
              ("altitude", 6, 3, True, 100, "m"))),
    142: (1, (("switch", 0, 1, False, 1, None),)),
}  # fmt: skip


class CayenneDecoder:
    """Payloads are bytes, or their hexadecimal or base64 text."""

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The values of a payload.

        Raises:
            Reject: DECODE_FAILED.
        """
        data = payload_bytes(raw["payload"])
        out: list[Decoded] = []
        position = 0
        while position < len(data):
            # Some senders fill a frame up with zeros.
            if not any(data[position:]) and len(data) - position < 3:
                break
            if position + 2 > len(data):
                message = f"the payload is too short: a channel without a type at byte {position}"
                raise failed(message)
            channel, kind = data[position], data[position + 1]
            known = TYPES.get(kind)
            if known is None:
                message = f"type {kind} at byte {position + 1} is not known"
                raise failed(message)
            size, values = known
            position += 2
            if position + size > len(data):
                message = f"the payload is too short: type {kind} needs {size} bytes at byte {position} of {len(data)}"
                raise failed(message)
            for name, first, width, signed, divisor, unit in values:
                at = position + first
                number = int.from_bytes(data[at : at + width], "big", signed=signed)
                out.append(Decoded(name, number if divisor == 1 else number / divisor, unit, None, str(channel)))
            position += size
        return out


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> CayenneDecoder:
    """The decoder of a `cayenne_lpp` parser: there is nothing to set.

    Raises:
        ParserError: the source says something.
    """
    if source_of(doc).keys() - {"description"}:
        message = "a cayenne_lpp parser has no settings"
        raise ParserError(message)
    return CayenneDecoder()
