"""Frames and telegrams of meters, built by their standards: M-Bus, Sparkplug B, DSMR."""

import struct

from preservarium.domain.decoders.dsmr import crc16

# --- M-Bus ---


def mbus(records, *, ci=0x72, configuration=b"\0\0"):
    # Identification 12345678 (BCD), manufacturer HYD, version 0x28, medium heat, access 115, status 0.
    header = bytes.fromhex("78563412") + bytes.fromhex("2423") + b"\x28\x04\x73\x00" + configuration
    body = b"\x08\x01" + bytes([ci]) + header + records
    return b"\x68" + bytes([len(body)]) * 2 + b"\x68" + body + bytes([sum(body) & 0xFF]) + b"\x16"


RECORDS = bytes.fromhex(
    "0406 a0860100"  # 32 bits, energy in kWh: 100000
    "0c13 78563412"  # 8 digits BCD, volume in l: 12345678
    "025a cc00"  # 16 bits, flow temperature in 0.1 °C: 204
    "426c 5f2c"  # storage 1, date: 31.12.2010 (type G)
    "1c13 00010000"  # maximum, volume
    "8c1013 11000000"  # tariff 1, volume
    "0213 0500"  # a second volume
    "0f aabb"  # specific to the manufacturer
)


# --- Sparkplug B ---


def varint(n):
    out = b""
    while n > 0x7F:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def payload(*metrics, at_ms=1_700_000_000_000, seq=3):
    return field(1, at_ms) + b"".join(field(2, m) for m in metrics) + field(3, seq)


UNIT = field(9, field(1, "engUnit") + field(2, field(1, 12) + field(8, "°C")))
METRICS = (
    field(1, "temperature") + field(4, 10) + field(13, 21.5) + UNIT,
    field(1, "level") + field(3, 1_700_000_000_500) + field(4, 2) + field(10, 0xFFFFFFF6),
    field(1, "cut") + field(4, 1) + field(10, 0xF6),
    field(1, "big") + field(4, 4) + field(11, 2**64 - 5),
    field(1, "total") + field(4, 8) + field(11, 2**63),
    field(1, "on") + field(4, 11) + field(14, 1),
    field(1, "state") + field(4, 12) + field(15, "läuft"),
    field(1, "float") + field(4, 9) + varint(12 << 3 | 5) + struct.pack("<f", 0.5),
    field(1, "nothing") + field(4, 9) + field(7, 1),
    field(1, "rows") + field(4, 16) + field(17, b""),
)


# --- DSMR ---

LINES = """\
/KFM5KAIFA-METER

1-3:0.2.8(42)
0-0:1.0.0(240115120000W)
0-0:96.1.1(4530303033303030303030303030303030)
1-0:1.8.1(000123.456*kWh)
1-0:2.8.1(000000.001*kWh)
0-0:96.14.0(0002)
1-0:1.7.0(00.313*kW)
1-0:32.7.0(231.4*V)
0-0:96.13.0()
1-0:99.97.0(1)(0-0:96.7.19)(000101000001W)(2147483647*s)
0-1:24.1.0(003)
0-1:24.2.1(240715110000S)(00055.719*m3)
0-2:24.2.1(240115110000W)(00001.5*GJ)
1-0:200.7.1(17*x)
!"""


def telegram(text=LINES):
    text = text.replace("\n", "\r\n")
    return text + f"{crc16(text.encode()):04X}\r\n"
