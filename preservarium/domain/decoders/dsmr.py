"""Telegrams of smart meters' customer port: OBIS lines as IEC 62056-21 mode D writes them (DSMR 2.2 to 5, ESMR, P1).

A field is named by its OBIS code in words where the table knows it, else by the code. What a meter on the M-Bus says
(`0-1:24.2.1`) has its channel for pin, and the time that stands beside it. Times are local: S is summer time, UTC+2, W is
winter time, UTC+1.
"""

import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from preservarium.domain.decoders.base import Decoded, ParserError, Value, failed, source_of
from preservarium.domain.readings import json_text
from preservarium.domain.readings.instant import instant_us
from preservarium.domain.readings.number import number_of
from preservarium.domain.readings.reading import RawMessage

#: C.D.E -> name; the A-B part tells channel and phase apart.
NAMES: Final = {
    "1.8.0": "energy_import", "1.8.1": "energy_import_tariff1", "1.8.2": "energy_import_tariff2",
    "2.8.0": "energy_export", "2.8.1": "energy_export_tariff1", "2.8.2": "energy_export_tariff2",
    "1.7.0": "power_import", "2.7.0": "power_export", "96.14.0": "tariff",
    "21.7.0": "power_import_l1", "41.7.0": "power_import_l2", "61.7.0": "power_import_l3",
    "22.7.0": "power_export_l1", "42.7.0": "power_export_l2", "62.7.0": "power_export_l3",
    "31.7.0": "current_l1", "51.7.0": "current_l2", "71.7.0": "current_l3",
    "32.7.0": "voltage_l1", "52.7.0": "voltage_l2", "72.7.0": "voltage_l3",
    "32.32.0": "voltage_sags_l1", "52.32.0": "voltage_sags_l2", "72.32.0": "voltage_sags_l3",
    "32.36.0": "voltage_swells_l1", "52.36.0": "voltage_swells_l2", "72.36.0": "voltage_swells_l3",
    "96.7.21": "power_failures", "96.7.9": "long_power_failures", "96.3.10": "switch", "17.0.0": "power_limit",
    "24.2.1": "meter", "24.2.3": "meter", "24.3.0": "meter", "24.1.0": "device_type",
}  # fmt: skip
#: A telegram with four meters and its failure log has some 2 kB.
TELEGRAM_BYTES_MAX: Final = 16_384
_LINE: Final = re.compile(r"([0-9]{1,3})-([0-9]{1,3}):([0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3})((?:\([^()]*\))+)")
_GROUP: Final = re.compile(r"\(([^()]*)\)")
_NUMBER: Final = re.compile(r"-?[0-9]{1,15}(?:\.[0-9]{1,9})?")
_TIME: Final = re.compile(r"(\d{2})(\d{2})(\d{2})(\d{2})(\d{2})(\d{2})([SW]?)", re.ASCII)
#: Identifications, messages to people, logs: no measurements.
_LEFT_OUT: Final = re.compile(r"0\.2\.8|1\.0\.0|96\.1\.\d+|96\.13\.\d+|99\.97\.0|96\.50\.\d+|0\.0\.\d+")
_ENCRYPTED: Final = 0xDB
_SERIAL: Final = re.compile(r"[0-9]{8}")


class DsmrDecoder:
    """Payloads are the telegram's text, or its bytes."""

    def decode(self, raw: RawMessage) -> list[Decoded]:
        """The values of a telegram.

        Raises:
            Reject: DECODE_FAILED, it is no telegram, its checksum is wrong, it is encrypted, or holds no values.
        """
        text = _telegram(raw["payload"])
        _check(text)
        out: list[Decoded] = []
        at: int | None = None
        body = text.replace("\r", "")
        # DSMR 3 puts a gas meter's value on a line of its own.
        body = re.sub(r"\)\n\(", ")(", body)
        for line in body.split("\n"):
            match = _LINE.fullmatch(line.strip())
            if match is None:
                continue
            code, groups = match[3], _GROUP.findall(match[4])
            if code == "1.0.0" and match[1] == "0":
                at = _instant(groups[0])
                continue
            if _LEFT_OUT.fullmatch(code):
                continue
            field = _field(match[1], match[2], code, groups)
            if field is not None:
                out.append(field)
        if not out:
            message = "the telegram holds no values"
            raise failed(message)
        return [f if f.timestamp is not None or at is None else f._replace(timestamp=at) for f in out]


def _telegram(payload: Any) -> str:
    if isinstance(payload, bytes):
        if payload[:1] == bytes((_ENCRYPTED,)):
            message = "the telegram is encrypted (general-glo-ciphering): decrypt it before it comes here"
            raise failed(message)
        payload = payload.decode("latin-1")
    if not isinstance(payload, str):
        message = f"a telegram is text, not {json_text.kind_of(payload)}"
        raise failed(message)
    start = payload.find("/")
    if start < 0 or len(payload) > TELEGRAM_BYTES_MAX:
        message = "no telegram: it starts with / and the meter's identification"
        raise failed(message)
    return payload[start:]


def _check(text: str) -> None:
    end = text.rfind("!")
    if end < 0:
        message = "the telegram is torn: it has no end (!)"
        raise failed(message)
    given = text[end + 1 :].strip()
    if not given or _SERIAL.fullmatch(given):
        return  # before DSMR 4 there is no checksum; an EasyMeter says its number there
    # Some meters leave out zeros at the front.
    expected = given.upper().rjust(4, "0")
    # Bridges that pass a telegram on as text often change its line ends, which the checksum covers.
    for body in (text[: end + 1], text[: end + 1].replace("\r", "").replace("\n", "\r\n")):
        if f"{crc16(body.encode('latin-1', 'replace')):04X}" == expected:
            return
    message = f"the telegram's checksum is wrong: it says {given[:8]}"
    raise failed(message)


def crc16(data: bytes) -> int:
    """CRC-16/ARC, from / to ! (DSMR 5.0.2, 6.2)."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc


def _field(medium: str, channel: str, code: str, groups: list[str]) -> Decoded | None:
    at = None
    if len(groups) > 1:
        at = _instant(groups[0])
    text, _, unit = groups[-1].partition("*")
    if len(groups) > 2 and not unit:
        # DSMR 3: the unit is in the group before the value.
        unit = next((g for g in groups[1:-1] if g and not g[0].isdigit()), "")
    if not text:
        return None
    value: Value = text
    if _NUMBER.fullmatch(text):
        value = number_of(text)
    name = NAMES.get(code, f"{medium}-{channel}:{code}")
    pin = channel if medium == "0" and channel != "0" else None
    return Decoded(name, value, unit or None, at, pin)


def _instant(text: str) -> int | None:
    """YYMMDDhhmmss with S or W, as µs."""
    match = _TIME.fullmatch(text)
    if match is None or not match[7]:
        return None
    year, month, day, hour, minute, second = (int(g) for g in match.groups()[:6])
    zone = timezone(timedelta(hours=2 if match[7] == "S" else 1))
    try:
        return instant_us(datetime(2000 + year, month, day, hour, minute, second, tzinfo=zone).isoformat())
    except ValueError:
        return None


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> DsmrDecoder:
    """The decoder of a `dsmr` parser: there is nothing to set.

    Raises:
        ParserError: the source says something.
    """
    if source_of(doc).keys() - {"description"}:
        message = "a dsmr parser has no settings"
        raise ParserError(message)
    return DsmrDecoder()
