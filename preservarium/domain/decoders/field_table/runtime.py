"""What a generated function calls: checks of the payload that fail, and a few conversions."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from preservarium.domain import expressions
from preservarium.domain.decoders.base import DECODED_MAX, Decoded, failed
from preservarium.domain.decoders.field_table.language import TURNS_MAX
from preservarium.errors import ReasonCode, Reject

#: An instant beyond this is no device's time whatever its unit; it keeps sums within 64 bits.
_INSTANT_US_MAX: Final = 2**62


def _bcd(data: bytes) -> int:
    text = data.hex()
    if not text.isdigit():
        message = f"{text} is not binary-coded decimal"
        raise failed(message)
    return int(text)


def _short(size: int, position: int, length: int) -> Reject:
    return failed(f"the payload is too short: {size} more bytes are needed at byte {position} of {length}")


def _unequal(name: str, found: Any, wanted: Any) -> Reject:
    return failed(f"{name} is {found}, not {wanted}")


def _rest(position: int, length: int) -> Reject:
    return failed(f"{length - position} bytes after the end of the format, at byte {position}")


def _no_case(value: Any, position: int) -> Reject:
    return failed(f"nothing is known of tag {value!r} before byte {position}")


def _no_port(port: Any) -> Reject:
    return failed(f"nothing is known of port {port}")


def _too_much() -> Reject:
    return Reject(ReasonCode.DECODE_LIMIT, f"more than {TURNS_MAX} turns of a repeat, or {DECODED_MAX} fields")


def _instant(value: Any, factor: float, epoch_s: int) -> int:
    at = int(value) * int(factor) if factor >= 1 and isinstance(value, int) else round(value * factor)
    at += epoch_s * 1_000_000
    if not -_INSTANT_US_MAX < at < _INSTANT_US_MAX:
        message = f"the time {value} is out of range"
        raise failed(message)
    return at


def _count(value: Any) -> int:
    """A number of turns or bytes that an expression gave."""
    count = int(value)
    if count < 0:
        message = f"a count or length is negative: {count}"
        raise failed(message)
    return min(count, TURNS_MAX + 1_000_000)


NAMESPACE: Final[dict[str, Any]] = {
    **expressions.NAMESPACE,
    "D": partial(tuple.__new__, Decoded),
    "len": len,
    "str": str,
    "bool": bool,
    "float": float,
    "from_bytes": int.from_bytes,
    "bcd": _bcd,
    "short": _short,
    "unequal": _unequal,
    "rest": _rest,
    "no_case": _no_case,
    "no_port": _no_port,
    "too_much": _too_much,
    "instant": _instant,
    "count": _count,
    "range": range,
    "NAN": math.nan,
    "ERRORS": expressions.ARITHMETIC_ERRORS,
}

Parse = Callable[[bytes, int | None, int], list[Decoded]]
