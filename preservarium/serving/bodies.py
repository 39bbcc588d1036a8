"""Bodies of requests, read and unpacked under limits.

aiohttp would unpack a body as it comes and does not ask whether the packed stream has come to its end; so our server leaves
bodies as they are (server.py), and what is torn, damaged or followed by something else is refused here as a whole.
"""

import asyncio
import sys
import zlib
from collections.abc import Callable
from typing import Any, Final, Protocol

from aiohttp import hdrs, web

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: What we unpack; said to a sender whose encoding is another.
ENCODINGS: Final = ("gzip", "deflate", "zstd")
#: Unpacked at once: some milliseconds, after which the event loop is given free.
SLICE_BYTES: Final = 262_144
#: Packed bytes that a decompressor is given at once. What it leaves of them is copied.
CHUNK_BYTES: Final = 16_384
#: A packed body may be several streams, one after the other (RFC 1952, 2.2). Each costs some microseconds, whatever is in it.
STREAMS_MAX: Final = 1_000
#: RFC 9659: who receives zstd over HTTP must manage windows of 8 MiB; a stream may ask for 2 GiB of memory.
ZSTD_WINDOW_LOG_MAX: Final = 23


class BodyRefused(Exception):
    """A body that is not taken: `status` and `code` for the sender's program, the message for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class TooLarge(BodyRefused):
    """Over the limit, packed or unpacked."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, "too_large", f"the body may have {limit} bytes, unpacked too")


class Torn(BodyRefused):
    """It is not what its encoding says, or not all of it."""

    def __init__(self, message: str) -> None:
        super().__init__(400, "envelope_invalid", f"the body cannot be read: {message}")


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


async def read(request: web.Request, limit: int) -> bytes:
    """The body, unpacked.

    Args:
        request: of a server that leaves bodies packed.
        limit: most bytes, packed and unpacked.

    Raises:
        BodyRefused: too large, of an encoding that is not understood, torn, damaged, or followed by something else.
    """
    encoding = encoding_of(request)
    if request.content_length is not None and request.content_length > limit:
        raise TooLarge(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.content.iter_any():
            size += len(part)
            if size > limit:
                raise TooLarge(limit)
            parts.append(part)
    except (web.RequestPayloadError, ConnectionError) as e:
        # A sender that went away, or chunks that are none.
        raise Torn(str(e)) from e
    body = b"".join(parts)
    return body if encoding == "identity" else await unpack(encoding, body, limit)


def encoding_of(request: web.Request) -> str:
    """How the body is packed: one of ENCODINGS, or `identity`.

    Raises:
        BodyRefused: 415, in another way or in several.
    """
    given = [word.strip().lower() for word in ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, [])).split(",")]
    packed = ["gzip" if word == "x-gzip" else word for word in given if word not in ("", "identity")]
    transfer = ",".join(request.headers.getall(hdrs.TRANSFER_ENCODING, [])).strip().lower()
    if transfer not in ("", "chunked"):
        raise BodyRefused(
            415, "unsupported_encoding", f"Transfer-Encoding {transfer[:80]!r} is not understood: chunked is"
        )
    if not packed:
        return "identity"
    if len(packed) > 1 or packed[0] not in ENCODINGS:
        text = f"Content-Encoding {', '.join(packed)[:80]!r} is not understood: send one of {', '.join(ENCODINGS)}, or none"
        raise BodyRefused(415, "unsupported_encoding", text)
    return packed[0]


async def unpack(encoding: str, body: bytes, limit: int) -> bytes:
    """A packed body, unpacked.

    Raises:
        BodyRefused: over `limit`, torn, damaged, or followed by something else.
    """
    left = memoryview(body)
    parts: list[bytes] = []
    size = streams = since = idle = 0
    while left or not streams:
        if streams == STREAMS_MAX or (streams and encoding == "deflate"):
            text = f"{len(left)} bytes behind the end of what is packed"
            raise Torn(text)
        streams += 1
        stream, step = _MAKERS[encoding](left)
        while not stream.eof:
            try:
                part, taken = step(left[:CHUNK_BYTES])
            except (zlib.error, zstd.ZstdError) as e:
                text = f"it is not {encoding}: {e}"
                raise Torn(text) from e
            idle = 0 if part or taken else idle + 1
            if idle > 1 and not stream.eof:
                text = f"the end of what is packed is missing ({encoding})"
                raise Torn(text)
            left = left[taken:]
            parts.append(part)
            size += len(part)
            since += len(part) + 256
            if size > limit:
                raise TooLarge(limit)
            if since > SLICE_BYTES:
                await asyncio.sleep(0)
                since = 0
    return b"".join(parts)


_Step = Callable[[memoryview], tuple[bytes, int]]


def _zlib(window_bits: int) -> tuple[_Decompressor, _Step]:
    stream: Any = zlib.decompressobj(window_bits)

    def step(chunk: memoryview) -> tuple[bytes, int]:
        part = stream.decompress(chunk, SLICE_BYTES)
        return part, len(chunk) - len(stream.unconsumed_tail) - len(stream.unused_data)

    return stream, step


def _gzip(_body: memoryview) -> tuple[_Decompressor, _Step]:
    return _zlib(16 + zlib.MAX_WBITS)


def _deflate(body: memoryview) -> tuple[_Decompressor, _Step]:
    # RFC 9110 means zlib's format; some senders leave its header and checksum out. The header is told by its own check.
    wrapped = len(body) >= 2 and body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
    return _zlib(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)


def _zstd(_body: memoryview) -> tuple[_Decompressor, _Step]:
    stream = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX})

    def step(chunk: memoryview) -> tuple[bytes, int]:
        # It keeps what it was given and did not use: then it is given nothing.
        given = chunk if stream.needs_input else chunk[:0]
        part = stream.decompress(given, SLICE_BYTES)
        return part, len(given) - (len(stream.unused_data) if stream.eof else 0)

    return stream, step


_MAKERS: Final[dict[str, Callable[[memoryview], tuple[_Decompressor, _Step]]]] = {
    "gzip": _gzip,
    "deflate": _deflate,
    "zstd": _zstd,
}
