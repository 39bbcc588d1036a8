"""Packed bodies: what is whole is unpacked, what is torn, damaged or followed by something is refused; nothing is unpacked beyond the limit."""

import asyncio
import gzip
import random
import zlib

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from preservarium.serving.bodies import STREAMS_MAX, ZSTD_WINDOW_LOG_MAX, BodyRefused, TooLarge, Torn, unpack

LIMIT = 1_000_000


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def zstd_with_checksum(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


PACKERS = {
    "gzip": ("gzip", gzip.compress),
    "gzip of several streams": ("gzip", lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:])),
    "gzip with a name": ("gzip", lambda data: b"\x1f\x8b\x08\x08" + bytes(6) + b"name\0" + gzip.compress(data, mtime=0)[10:]),
    "zlib": ("deflate", zlib.compress),
    "zlib, stored": ("deflate", lambda data: zlib.compress(data, 0)),
    "deflate without a header": ("deflate", raw_deflate),
    "zstd": ("zstd", zstd.compress),
    "zstd with a checksum": ("zstd", zstd_with_checksum),
    "zstd of several frames": ("zstd", lambda data: zstd.compress(data[:100]) + zstd.compress(data[100:])),
}  # fmt: skip
#: Formats in which a changed byte is found by a checksum.
CHECKED = ["gzip", "gzip of several streams", "zlib", "zlib, stored", "zstd with a checksum"]
#: Not too regular, so that the packed form has some length, and not too irregular, so that it is packed at all.
DATA = b"\n".join(b'{"device": "d%d", "payload": {"t": %d}}' % (n, n * 7919 % 1000) for n in range(400))


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(900_000), random.Random(1).randbytes(500_000)], ids=len)
async def test_what_is_whole_is_unpacked(packer, data):
    encoding, pack = PACKERS[packer]
    assert await unpack(encoding, pack(data), LIMIT) == data


@pytest.mark.parametrize("packer", PACKERS)
async def test_what_is_torn_anywhere_is_refused(packer):
    encoding, pack = PACKERS[packer]
    packed = pack(DATA)
    # Where one stream of several ends, the rest is as if it had never been.
    seams = {len(PACKERS[encoding][1](DATA[:100]))} if "several" in packer else set()
    places = {*range(40), *range(40, len(packed) - 40, 97), *range(len(packed) - 40, len(packed))} - seams
    for place in places:
        with pytest.raises(Torn):
            await unpack(encoding, packed[:place], LIMIT)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("rest", [b"\0", b"\n", b"{}", b"\x1f\x8b", bytes(600), b"garbage" * 5_000], ids=repr)
async def test_what_stands_behind_the_end_is_refused(packer, rest):
    encoding, pack = PACKERS[packer]
    with pytest.raises(Torn):
        await unpack(encoding, pack(DATA) + rest, LIMIT)


@pytest.mark.parametrize("packer", CHECKED)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
async def test_a_changed_bit_is_found_or_changes_nothing(packer, place, bit):
    encoding, pack = PACKERS[packer]
    packed = bytearray(pack(DATA))
    packed[place % len(packed)] ^= 1 << bit
    try:
        found = await unpack(encoding, bytes(packed), LIMIT)
    except BodyRefused:
        return
    assert found == DATA, "a field of the header that says nothing of the content"


@given(body=st.binary(max_size=300), encoding=st.sampled_from(["gzip", "deflate", "zstd"]))
@settings(max_examples=300, deadline=None)
async def test_any_bytes_are_unpacked_or_refused(body, encoding):
    try:
        assert len(await unpack(encoding, body, 10_000)) <= 10_000
    except (Torn, TooLarge):
        return


@pytest.mark.parametrize("packer", [name for name in PACKERS if "several" not in name])
async def test_a_bomb_is_not_unpacked_beyond_the_limit(packer):
    encoding, pack = PACKERS[packer]
    bomb = pack(bytes(LIMIT * 40))
    with pytest.raises(TooLarge):
        await unpack(encoding, bomb, LIMIT)
    # Exactly the limit fits.
    assert len(await unpack(encoding, pack(bytes(LIMIT)), LIMIT)) == LIMIT


async def test_empty_streams_without_end_are_refused():
    for encoding, pack in (("gzip", gzip.compress), ("zstd", zstd.compress)):
        assert await unpack(encoding, pack(b"") * STREAMS_MAX, LIMIT) == b""
        with pytest.raises(Torn, match="behind the end"):
            await unpack(encoding, pack(b"") * (STREAMS_MAX + 1), LIMIT)


async def test_a_stream_that_asks_for_much_memory_is_refused():
    large = {
        zstd.CompressionParameter.window_log: ZSTD_WINDOW_LOG_MAX + 4,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    packer = zstd.ZstdCompressor(options=large)
    packed = packer.compress(DATA) + packer.flush()
    with pytest.raises(Torn, match="zstd"):
        await unpack("zstd", packed, LIMIT)


async def test_the_event_loop_is_given_free_meanwhile():
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await unpack("gzip", gzip.compress(bytes(20_000_000)), 20_000_000)
    task.cancel()
    assert turns > 20
