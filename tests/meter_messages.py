"""Frames and telegrams of meters, built by their standards: M-Bus, Sparkplug B, DSMR."""

import struct

from preservarium.domain.decoders.dsmr import crc16
from preservarium.domain.decoders.wmbus import crc16 as radio_crc

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


# --- wireless M-Bus ---

#: Manufacturer HYD, identification 12345678, version 0x28, device type heat.
RADIO_ADDRESS = bytes.fromhex("2423") + bytes.fromhex("78563412") + b"\x28\x04"
RADIO_KEY = bytes(range(16))
RADIO_RECORDS = bytes.fromhex("0c13 785634120406 a0860100025a cc00446d 2e2d df2c")


def radio(body, *, control=0x44):
    """A frame with its length, without checksums."""
    frame = bytes([control]) + RADIO_ADDRESS + body
    return bytes([len(frame)]) + frame


def format_a(frame):
    """With the checksums of format A."""
    blocks = [frame[:10], *(frame[i : i + 16] for i in range(10, len(frame), 16))]
    return b"".join(block + radio_crc(block).to_bytes(2, "big") for block in blocks)


def format_b(frame):
    """With the checksum of format B, which its length counts."""
    frame = bytes([frame[0] + 2]) + frame[1:]
    return frame + radio_crc(frame).to_bytes(2, "big")


def padded(records):
    plain = b"\x2f\x2f" + records
    return plain + b"\x2f" * (-len(plain) % 16)


def short_header(mode, blocks, *, access=0x55):
    return bytes([0x7A, access, 0x00, blocks << 4, mode])


def mode_5(records=RADIO_RECORDS, key=RADIO_KEY, *, access=0x55):
    from Crypto.Cipher import AES

    plain = padded(records)
    sealed = AES.new(key, AES.MODE_CBC, iv=RADIO_ADDRESS + bytes([access]) * 8).encrypt(plain)
    return radio(short_header(5, len(plain) // 16, access=access) + sealed)


def mode_7(records=RADIO_RECORDS, key=RADIO_KEY, *, counter=b"\x0a\x00\x00\x00"):
    from Crypto.Cipher import AES
    from Crypto.Hash import CMAC

    def cmac(with_key, data):
        return CMAC.new(with_key, data, ciphermod=AES).digest()

    plain, derived = padded(records), counter + RADIO_ADDRESS[2:6] + b"\x07" * 7
    sealed = AES.new(cmac(key, b"\x00" + derived), AES.MODE_CBC, iv=bytes(16)).encrypt(plain)
    transport = short_header(7, len(plain) // 16) + b"\x10" + sealed
    kind = b"\x25"  # a counter, and a CMAC of 8 bytes
    code = cmac(cmac(key, b"\x01" + derived), kind + counter + transport)[:8]
    layer = (0x2C00).to_bytes(2, "little") + kind + counter + code
    return radio(b"\x90" + bytes([len(layer)]) + layer + transport)


def extended(inner, key=RADIO_KEY, *, session=b"\x01\x02\x03\x20", control=0x20):
    """CI 8D: an extended link layer whose payload is encrypted by AES-CTR."""
    from Crypto.Cipher import AES

    plain = radio_crc(inner).to_bytes(2, "little") + inner
    block = RADIO_ADDRESS + bytes([control]) + session + b"\0\0\0"
    sealed = AES.new(key, AES.MODE_CTR, nonce=block[:8], initial_value=block[8:]).encrypt(plain)
    return radio(bytes([0x8D, control, 0x42]) + session + (sealed if key else plain))
