"""Wireless M-Bus (EN 13757-4, OMS): frames of format A or B, with or without their checksums, decrypted with the meter's key.

What is read:

| layer | what |
|---|---|
| link | C and T mode frames as receivers pass them on: `L C M A CI …`, a sync word (54CD, 543D) before it or not, checksums stripped or in it |
| extended link | CI 8C, 8D, 8E, 8F; AES-CTR |
| authentication | CI 90: the message authentication code is checked, where there is a key |
| transport | CI 72 (long header), 7A (short), 78 (none), 79, 73 and 7B (compact frames) |
| security | none; mode 5 (AES-CBC, IV of address and access number); mode 7 (AES-CBC with an ephemeral key, OMS profile B) |

The key is the device's secret `key`, 32 hexadecimal digits. The compact frames of a meter say only a signature of their layout: those of
`formats` in the source, hexadecimal DIFs and VIFs as the meter's full frames have them, are known besides the common ones.

Fields are named as those of `mbus`.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from preservarium.domain.decoders.base import Decoded, ParserError, failed, payload_bytes, source_of
from preservarium.domain.decoders.mbus import all_records, fields, manufacturer
from preservarium.domain.readings.reading import RawMessage
from preservarium.errors import Reject

#: L counts itself and no checksum, and is one byte; with checksums a frame has 290 bytes (EN 13757-4).
FRAME_BYTES_MAX: Final = 300
KEY_BYTES: Final = 16
#: L, C, M, A and CI.
_SHORTEST: Final = 11
#: Layouts of compact frames that one parser may name.
FORMATS_MAX: Final = 100

_LONG, _SHORT, _NONE = 0x72, 0x7A, 0x78
_COMPACT_LONG, _COMPACT_NONE, _COMPACT_SHORT = 0x73, 0x79, 0x7B
_ELL: Final = {0x8C: 2, 0x8D: 8, 0x8E: 10, 0x8F: 16}
_AFL: Final = 0x90
_SYNC: Final = (b"\x54\xcd", b"\x54\x3d")
_MODES: Final = {
    2: "DES",
    3: "DES",
    8: "AES-CTR",
    9: "AES-GCM",
    10: "AES-CCM",
    13: "TLS",
    14: "proprietary",
    15: "proprietary",
}
#: Kinds of message authentication codes (EN 13757-7): bytes of a CMAC.
_MAC_BYTES: Final = {3: 2, 4: 4, 5: 8, 6: 12, 7: 16}

#: Layouts of compact frames that meters in the field send.
LAYOUTS: Final = (
    "02ff2004134413", "02ff200413523b", "02ff2004134413615b6167", "02ff2004134413615b5167", "02ff20041392013ba1015b8101e7ff0f",
    "02ff2004134413a1015b8101e7ff0f", "04ff234413523b06ff1b426c61675167023b04138101e7ff0f",
    "02ff2004134413426c523b615b616751678101e7ff0f06ff1b",
    "04ff2304134413426c023b92013ba2013b06ff1ba1015b91015ba10167", "040404843c042b04ab3c", "030643060314426c022d01ff21",
    "030e430e0313426c022d01ff21", "040604ff0704ff080414043b0259025d04ff22026c44064414426c",
    "0406041404ff0704ff080259025d023b02ff22026c44064414426c",
    "040f04ff0704ff08041484401484804014043b0259025d142d84100f84200f04ff22026c440f4414c44014c4804014426c",
    "02f9ff15040604eeff0704eeff0804148440148480401402fd17026c426c44064414c44014c4804014043b0259025d",
    "040504fb827504853c04fb82f53c01fd17", "22691269026905ff0905ff0a02fd17",
    "030643060314426c022d01ff21", "030f430f0314426c022d01ff21",
    "040e04ff0704ff08041384401484804014043b0259025d142d84100e84200e04ff22026c440e4413c44014c4804014426c",
    "426c441301fd17840113c40113840213c40213840313c40313840413c40413840513c40513840613c40613840713c40713840813046d0413",
)  # fmt: skip


def crc16(data: bytes) -> int:
    """CRC-16/EN-13757."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x3D65 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc ^ 0xFFFF


class _Head(NamedTuple):
    """Who sends, as the link or the transport layer says."""

    address: bytes  #: M-field, then identification, version and device type: what keys and IVs are made with
    access: int = 0
    status: int = 0


class WmbusDecoder:
    """Payloads are bytes, or their hexadecimal or base64 text.

    Args:
        key: of the meter; None: its frames are not encrypted.
        layouts: signature of a compact frame -> its DIFs and VIFs.
    """

    def __init__(self, key: bytes | None, layouts: Mapping[int, bytes]) -> None:
        self._key = key
        self._layouts = layouts

    def records(self, raw: RawMessage) -> dict[str, Any]:
        """The frame as it is: its header, and each record with value, unit, function and storage number.

        Raises:
            Reject: DECODE_FAILED, it is torn, or cannot be decrypted, or of a kind that cannot be read.
        """
        frame = link_frame(payload_bytes(raw["payload"]))
        if len(frame) < _SHORTEST:
            message = f"no wireless M-Bus frame: {len(frame)} bytes without checksums"
            raise failed(message)
        head = _Head(frame[2:10])
        ci, data = frame[10], frame[11:]
        if ci in _ELL:
            ci, data, head = self._extended(ci, data, head)
        authentication = None
        if ci == _AFL:
            authentication, data = _authentication(data)
            if not data:
                message = "the frame ends behind its authentication layer"
                raise failed(message)
            ci, data = data[0], data[1:]
        head, data = self._transport(ci, data, head, authentication)
        if ci in (_COMPACT_LONG, _COMPACT_NONE, _COMPACT_SHORT):
            found, torn = all_records(*self._expanded(data))
        else:
            found, torn = all_records(data)
        return {
            "manufacturer": manufacturer(head.address[:2]),
            "id": head.address[2:6][::-1].hex(),
            "version": head.address[6],
            "medium": head.address[7],
            "access_number": head.access,
            "status": head.status,
            "records": found,
            **({"warnings": torn} if torn else {}),
        }

    def decode(self, raw: RawMessage) -> list[Decoded | Reject]:
        """The values of a frame, and why the rest of it cannot be read.

        Raises:
            Reject: see `records`.
        """
        return fields(self.records(raw))

    def _needed(self, what: str) -> bytes:
        if self._key is None:
            message = f"the frame is encrypted ({what}): give the device its secret `key`"
            raise failed(message)
        return self._key

    def _extended(self, ci: int, data: bytes, head: _Head) -> tuple[int, bytes, _Head]:
        size = _ELL[ci]
        needed = size + (1 if ci in (0x8C, 0x8E) else 0)
        if len(data) < needed:
            message = "the frame ends inside its extended link layer"
            raise failed(message)
        control, access = data[0], data[1]
        address = data[2:10] if ci in (0x8E, 0x8F) else head.address
        head = _Head(address, access)
        if ci in (0x8C, 0x8E):
            return data[size], data[size + 1 :], head
        session = data[size - 6 : size - 2]
        body = data[size - 2 :]
        mode = session[3] >> 5
        if mode and _checked(body):
            mode = 0  # a receiver has decrypted it
        if mode == 1:
            cipher = _aes()
            # Counter block: address, communication control without its hop and repeat bits, session, and counters of zero.
            block = address + bytes([control & 0xED]) + session + b"\0\0\0"
            body = cipher.new(
                self._needed("AES-CTR"), cipher.MODE_CTR, nonce=block[:8], initial_value=block[8:]
            ).decrypt(body)
        elif mode:
            message = f"encryption {mode} of the extended link layer cannot be read"
            raise failed(message)
        if len(body) < 3:
            message = "the frame ends inside its extended link layer"
            raise failed(message)
        if not _checked(body):
            message = "the payload's checksum is wrong" + (": is it this meter's key?" if mode else "")
            raise failed(message)
        return body[2], body[3:], head

    def _transport(
        self, ci: int, data: bytes, head: _Head, authentication: "_Authentication | None"
    ) -> tuple[_Head, bytes]:
        """The header's address, and the records decrypted."""
        tpl = bytes([ci]) + data
        if ci in (_LONG, _COMPACT_LONG):
            if len(data) < 12:
                message = "the frame is too short for its header"
                raise failed(message)
            head, data = _Head(data[4:6] + data[:4] + data[6:8], data[8], data[9]), data[10:]
        elif ci in (_SHORT, _COMPACT_SHORT):
            if len(data) < 4:
                message = "the frame is too short for its header"
                raise failed(message)
            head, data = head._replace(access=data[0], status=data[1]), data[2:]
        elif ci in (_NONE, _COMPACT_NONE):
            return head, data
        else:
            what = "specific to the manufacturer" if 0xA0 <= ci <= 0xB7 else "no data of a meter that is known"
            message = f"CI field {ci:02X}: {what}"
            raise failed(message)
        configuration, data = data[:2], data[2:]
        mode = configuration[1] & 0x1F
        if mode == 0 or (mode not in (5, 7) and data[:2] == b"\x2f\x2f"):
            return head, data
        blocks = configuration[0] >> 4
        if mode == 7:
            data = data[1:]  # the extension of the configuration field
        elif mode != 5:
            message = f"security mode {mode} ({_MODES.get(mode, 'unknown')}) cannot be read"
            raise failed(message)
        if data[:2] == b"\x2f\x2f":
            return head, data  # a receiver has decrypted it
        return head, self._decrypted(mode, blocks, data, head, tpl, authentication)

    def _decrypted(
        self, mode: int, blocks: int, data: bytes, head: _Head, tpl: bytes, authentication: "_Authentication | None"
    ) -> bytes:
        key = self._needed(f"mode {mode}")
        size = blocks * 16 if blocks else len(data) - len(data) % 16
        if not 16 <= size <= len(data):
            message = f"the frame is torn: {size} bytes of it are encrypted, and there are {len(data)}"
            raise failed(message)
        cipher = _aes()
        iv = bytes(16)
        if mode == 7:
            if authentication is None or authentication.counter is None:
                message = "security mode 7 needs the message counter of an authentication layer"
                raise failed(message)
            derived = authentication.counter + head.address[2:6] + b"\x07" * 7
            if authentication.code:
                made = _cmac(_cmac(key, b"\x01" + derived), authentication.covered + tpl)
                if made[: len(authentication.code)] != authentication.code:
                    message = "the message authentication code is wrong: is it this meter's key?"
                    raise failed(message)
            key = _cmac(key, b"\x00" + derived)
        else:
            iv = head.address + bytes([head.access]) * 8
        plain: bytes = cipher.new(key, cipher.MODE_CBC, iv=iv).decrypt(data[:size])
        if plain[:2] != b"\x2f\x2f":
            message = "the decrypted data do not begin with 2F2F: is it this meter's key?"
            raise failed(message)
        return plain + data[size:]

    def _expanded(self, data: bytes) -> tuple[bytes, bytes]:
        """(the data, the layout) of a compact frame."""
        if len(data) < 4:
            message = "the frame is too short for a compact one"
            raise failed(message)
        # Fill bytes of the encryption stand before the signature.
        while data[:1] == b"\x2f":
            data = data[1:]
        layout = self._layouts.get(int.from_bytes(data[:2], "little"))
        if layout is None:
            message = (
                f"a compact frame of layout {data[1::-1].hex()}, which is not known: "
                "give the DIFs and VIFs of the meter's full frames in `formats`"
            )
            raise failed(message)
        return data[4:], layout


class _Authentication(NamedTuple):
    counter: bytes | None
    code: bytes
    covered: bytes  #: of the layer, before the transport layer


def _authentication(data: bytes) -> tuple[_Authentication, bytes]:
    """The authentication and fragmentation layer, and what stands behind it."""
    size = data[0] if data else 0
    layer, rest = data[1 : 1 + size], data[1 + size :]
    if len(layer) < max(size, 2):
        message = "the frame ends inside its authentication layer"
        raise failed(message)
    control, position = int.from_bytes(layer[:2], "little"), 2
    if control & 0x4000:
        message = "a frame of several fragments cannot be read"
        raise failed(message)
    kind = layer[position : position + 1] if control & 0x2000 else b""
    position += len(kind)
    if control & 0x0200:
        position += 2
    counter = layer[position : position + 4] if control & 0x0800 else None
    position += 4 if counter is not None else 0
    bytes_ = _MAC_BYTES.get(kind[0] & 0x0F, 0) if kind and control & 0x0400 else 0
    code = layer[position : position + bytes_]
    position += bytes_
    length = layer[position : position + 2] if control & 0x1000 else b""
    if len(code) < bytes_ or (counter is not None and len(counter) < 4):
        message = "the authentication layer is torn"
        raise failed(message)
    covered = kind + (counter or b"") + (length if kind and kind[0] & 0x40 else b"")
    return _Authentication(counter, code, covered), rest


def link_frame(data: bytes) -> bytes:
    """A frame without its sync word and its checksums.

    Raises:
        Reject: DECODE_FAILED, it is torn, or its checksums are wrong.
    """
    if data[:2] in _SYNC:
        data = data[2:]
    if len(data) > FRAME_BYTES_MAX or len(data) < 12:
        message = f"no wireless M-Bus frame: {len(data)} bytes"
        raise failed(message)
    if data[0] == 0x68 and data[3:4] == b"\x68" and data[1] == data[2]:
        message = "a frame of the wired M-Bus: its parser is of kind mbus"
        raise failed(message)
    length = data[0] + 1
    checked = length + 2 * (1 + -(-max(length - 10, 0) // 16))
    if len(data) >= checked and (without := _format_a(data[:checked])) is not None:
        return without
    if len(data) < length:
        message = f"the frame is torn: it says {length} bytes, and has {len(data)}"
        raise failed(message)
    if len(data) - length > 2 and len(data) < checked:
        message = f"no wireless M-Bus frame: it says {length} bytes, and has {len(data)}"
        raise failed(message)
    # Behind it some receivers put how strong it was.
    return _format_b(data[:length])


def _format_a(data: bytes) -> bytes | None:
    """Blocks of 10 and then 16 bytes, each with its checksum; None where these are none."""
    out, position, size = b"", 0, 10
    while position < len(data):
        block = data[position : position + size + 2]
        if crc16(block[:-2]) != int.from_bytes(block[-2:], "big"):
            return None
        out += block[:-2]
        position += size + 2
        size = 16
    return out


def _format_b(data: bytes) -> bytes:
    """Of up to 128 bytes one checksum, of what is longer a second one: taken out where they are right."""
    if len(data) > 128:
        first, second = data[:128], data[128:]
        if crc16(first[:-2]) == int.from_bytes(first[-2:], "big") and len(second) > 2:
            return first[:-2] + (second[:-2] if crc16(second[:-2]) == int.from_bytes(second[-2:], "big") else second)
        return data
    return data[:-2] if crc16(data[:-2]) == int.from_bytes(data[-2:], "big") else data


def _checked(body: bytes) -> bool:
    """Whether a payload is what its checksum, the two bytes before it, says."""
    return len(body) > 2 and crc16(body[2:]) == int.from_bytes(body[:2], "little")


def _aes() -> Any:
    from Crypto.Cipher import AES

    return AES


def _cmac(key: bytes, data: bytes) -> bytes:
    from Crypto.Hash import CMAC

    return CMAC.new(key, data, ciphermod=_aes()).digest()  # type: ignore[no-any-return]


def key_of(given: Any, name: str, size: int = KEY_BYTES) -> bytes | None:
    """A key among a device's secrets, or None.

    Raises:
        ParserError: it is not so many bytes in hexadecimal; the message does not repeat it.
    """
    if given is None:
        return None
    try:
        key = bytes.fromhex(given) if isinstance(given, str) else b""
    except ValueError:
        key = b""
    if len(key) != size:
        message = f"the secret {name} is {2 * size} hexadecimal digits"
        raise ParserError(message)
    return key


def compile_parser(doc: Mapping[str, Any], variables: Mapping[str, Any] | None = None) -> WmbusDecoder:
    """The decoder of a `wmbus` parser for a meter with its `key`.

    Raises:
        ParserError: the source or the key is wrong.
    """
    source = source_of(doc)
    if unknown := source.keys() - {"description", "formats"}:
        message = f"a wmbus parser has no {sorted(unknown)[0]!r}; it has formats"
        raise ParserError(message)
    given = source.get("formats") or []
    if not isinstance(given, list) or len(given) > FORMATS_MAX or not all(isinstance(one, str) for one in given):
        message = f"formats is a list of up to {FORMATS_MAX} texts, hexadecimal DIFs and VIFs"
        raise ParserError(message)
    layouts = {}
    for one in (*LAYOUTS, *given):
        try:
            layout = bytes.fromhex(one)
        except ValueError:
            message = f"formats: {one!r:.60} is not hexadecimal"
            raise ParserError(message) from None
        layouts[crc16(layout)] = layout
    return WmbusDecoder(key_of((variables or {}).get("key"), "key"), layouts)


__all__ = ["FRAME_BYTES_MAX", "Reject", "WmbusDecoder", "compile_parser", "crc16", "key_of", "link_frame"]
