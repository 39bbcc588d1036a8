"""Damages samples. All chance comes from one generator, so that an input comes again with its seed."""

import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

#: Larger inputs are cut: what is slow in proportion to its length is no hang.
BYTES_MAX: Final = 65_536
#: What parsers stumble over.
TOKENS: Final = (
    b"", b" ", b"\0", b"\n", b"\r\n", b"\t", b"\x1e", b"\xff", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3\x28", b"\\u0000", b"\\ud800", b"\\",
    b'"', b"'", b",", b";", b"=", b":", b"/", b"..", b"#", b"%", b"&", b"*", b"<", b"{", b"}", b"[", b"]", b"(", b")", b"[" * 80, b'{"a":' * 80, b"[" * 2_000, b"null", b"true",
    b"{}", b"[]", b"NaN", b"nan", b"-Infinity", b"inf", b"1e999", b"-1e999", b"1e-999", b"-0", b"-0.0", b"0x10", b"1_000", b"1,5", b"1.", b".5", b"+1", b"--1", b"00", b"1e5",
    b"9" * 19, b"9" * 40, b"9" * 400, b"1" * 5_000, b"18446744073709551616", b"-9223372036854775809", b"2147483648", b"4294967296", b"255", b"256", b"65536",
    "１２".encode(), "٣".encode(), "İ".encode(), "ß".encode(), "\u2028".encode(), "\u202e".encode(), "\ufeff".encode(), "😀".encode(), "é".encode("latin-1"), "µ°²".encode(),
    b"2024-02-30T25:61:61Z", b"0001-01-01T00:00:00Z", b"9999-12-31T23:59:60+99:99", b"2024-01-01", b"1970-01-01T00:00:00.000000001Z", b"1e18", b"1717243200", b"*" * 300, b"a" * 300, b"a." * 500,
)  # fmt: skip
#: Leaves that a tree may be given.
LEAVES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 255, 256, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**30, 0.1, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", " ", "\0", "\ud800", "a" * 300, "NaN", "1e999", "-1", "1,5", "12", "*", "**", "x ** x", "9" * 60, "2024-02-30T25:61:61Z", "2024-06-01T12:00:00Z", 1_717_243_200, "😀", "\u202e", [], {}, [[]], [{}],
    {"": ""}, [1, "a", None], {"a": {"b": [1]}}, "../../etc/passwd", "http://127.0.0.1:1/", "%s%n", "{0}", "{i}", "(a+)+$",
)  # fmt: skip
#: Bytes that end fields and begin others.
EDGES: Final = (0, 1, 0x0A, 0x20, 0x22, 0x2C, 0x30, 0x39, 0x3D, 0x5C, 0x7F, 0x80, 0xFE, 0xFF)
_NUMBER: Final = re.compile(rb"[0-9]+")


class Mutator:
    """Damages samples.

    Args:
        rng: where chance comes from.
    """

    def __init__(self, rng: Random) -> None:
        self.rng = rng

    def one(self, choices: Sequence[Any]) -> Any:
        """One of several."""
        return choices[int(self.rng.random() * len(choices))]

    def often(self, share: float) -> bool:
        """Whether, in this share of all cases."""
        return self.rng.random() < share

    # --- bytes and texts ---

    def data(self, samples: Sequence[bytes], *, most: int = 4) -> bytes:
        """A sample with up to `most` damages; sometimes none."""
        found = bytearray(self.one(samples))
        for _ in range(int(self.rng.random() * (most + 1))):
            self._damage(found, samples)
        return bytes(found[:BYTES_MAX])

    def text(self, samples: Sequence[str], *, most: int = 2) -> str:
        """A text with up to `most` damages; what is no UTF-8 any more is replaced."""
        damaged = self.data([sample.encode("utf-8", "surrogatepass") for sample in samples], most=most)
        return damaged.decode("utf-8", "replace")

    def _damage(self, found: bytearray, samples: Sequence[bytes]) -> None:
        rng = self.rng
        at = int(rng.random() * (len(found) + 1))
        end = min(len(found), at + 1 + int(rng.random() ** 3 * 32))
        match int(rng.random() * 11):
            case 0 if at < len(found):
                found[at] ^= 1 << int(rng.random() * 8)
            case 1 if at < len(found):
                found[at] = self.one(EDGES)
            case 2:
                del found[at:end]
            case 3:
                found[at:at] = rng.randbytes(1 + int(rng.random() ** 3 * 16))
            case 4:
                found[at:at] = self.one(TOKENS)
            case 5:
                found[at:end] = self.one(TOKENS)
            case 6:  # once more
                found[at:at] = found[at:end]
            case 7:  # many times
                part = bytes(found[at:end])
                found[at:at] = part * min(1 + int(rng.random() ** 4 * 2_000), 20_000 // (len(part) or 1))
            case 8:  # torn
                del found[at:]
            case 9:  # the end of another one
                other = self.one(samples)
                found[at:] = other[int(rng.random() * (len(other) + 1)) :]
            case _:  # another number
                numbers = list(_NUMBER.finditer(found[:4_096]))
                if numbers:
                    where = self.one(numbers)
                    found[where.start() : where.end()] = self.one(TOKENS[43:68])

    # --- trees ---

    def tree(self, samples: Sequence[Any], *, most: int = 3) -> Any:
        """A sample of JSON values with up to `most` damages; the samples stay as they are."""
        found = [_copied(self.one(samples))]
        for _ in range(int(self.rng.random() * (most + 1))):
            self._graft(found, samples)
        return found[0]

    def _graft(self, root: list[Any], samples: Sequence[Any]) -> None:
        holder, key = self._place(root)
        value = holder[key]
        match int(self.rng.random() * 10):
            case 0 | 1:
                holder[key] = _copied(self.one(LEAVES))
            case 2 if holder is not root:
                del holder[key]
            case 3 if isinstance(value, str):
                holder[key] = self.text([value])
            case 3 | 4 if isinstance(value, int | float):
                holder[key] = self.one((-value, value * 1e300, str(value), value + 0.5, [value], bool(value)))
            case 5:
                holder[key] = self.one(([value], {"a": value}, {"value": value}, [value, value]))
            case 6 if isinstance(value, list) and value:
                holder[key] = value * min(1 + int(self.rng.random() ** 4 * 300), 3_000 // len(value) + 1)
            case 7 if isinstance(value, dict) and value:
                name = self.one(list(value))
                value[self.text([str(name)])] = value[name]
            case 8:
                for _ in range(1 + int(self.rng.random() ** 3 * 120)):
                    value = [value] if self.often(0.5) else {"a": value}
                holder[key] = value
            case _:
                other, name = self._place([_copied(self.one(samples))])
                holder[key] = other[name]

    def _place(self, root: list[Any]) -> tuple[Any, Any]:
        """A place in a tree: what holds it, and where."""
        holder: Any = root
        key: Any = 0
        while isinstance(holder[key], dict | list) and holder[key] and not self.often(0.25):
            holder = holder[key]
            key = self.one(list(holder)) if isinstance(holder, dict) else int(self.rng.random() * len(holder))
        return holder, key

    def json(self, samples: Sequence[Any]) -> bytes:
        """A damaged tree as JSON text, which itself may be damaged."""
        text = dumped(self.tree(samples))
        return self.data([text], most=2) if self.often(0.3) else text[:BYTES_MAX]


def dumped(value: Any) -> bytes:
    """JSON text of anything, as Python writes it."""
    return json.dumps(value, default=repr).encode()


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


#: Makes an input out of chance.
Make = Callable[[Mutator], Any]
