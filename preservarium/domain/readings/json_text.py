"""JSON as devices write it, read and written without loss.

orjson reads almost all of it. It does not read what is around a text (a byte order mark, NUL of a C string) and `NaN` or `Infinity`
in place of a number, and it makes floats of whole numbers beyond 64 bits. Such texts are rare, and are read once more by the
standard library: the marks are taken off, a number that is not finite becomes a `NotFinite`, a long whole number keeps its
digits. Nothing else is forgiven.

A reader that is strict, and cannot be told otherwise, gets such a number as a marked text (`mark`), and gives it back as one
(`unmarked`).
"""

import codecs
import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

import orjson

#: Every byte that is no digit as a blank, every digit as 0: a run of digits is then found by a plain search.
_DIGITS: Final = bytes(0x30 if 0x30 <= byte <= 0x39 else 0x20 for byte in range(256))
#: A run of 19 digits, the fewest that may not fit into 64 bits, has nine at every other place, wherever it begins.
_RUN: Final = b"0" * 9
_LONG: Final = re.compile(rb"-[0-9]{19}|[0-9]{20}")
#: A text in quotes, or a word that stands for what is not finite: C writes `nan`, `inf` and `-inf`.
_WORD: Final = re.compile(r'("(?:[^"\\]|\\.)*")|([+-]?)\b(?:(nan)|inf(?:inity)?)\b', re.IGNORECASE | re.DOTALL)


#: What makes the second look at a text worth its while.
_MAY_BE_WORD: Final = re.compile(rb"nan|inf|[0-9]e\+?[0-9]{3}|[0-9]{309}", re.IGNORECASE)


#: Before a number that is not finite, in the text that stands for it: a character of private use.
MARK: Final = "\ue000"
_MARKED: Final = re.compile(f'"{MARK}(NaN|-?Infinity)"')


class NotFinite(float):
    """A number that JSON text gives as `NaN`, `Infinity`, `-Infinity`, or that no double holds.

    A class of its own, because orjson would write a plain one as null without a word.
    """

    __slots__ = ()


#: Type of a value -> what it is, for people. A boolean is a number to Python, so it stands before it.
_KINDS: Final = (
    (type(None), "null"),
    (bool, "a truth value"),
    (int | float, "a number"),
    (str, "text"),
    (bytes, "bytes"),
    (dict, "an object"),
    (list | tuple, "a list"),
)


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words and not in Python's: for the reason of a refusal."""
    return next((word for kind, word in _KINDS if isinstance(value, kind)), "a value that JSON has not")


def bare(text: bytes) -> bytes:
    """A text without what is around it: a byte order mark before it, NULs and line ends behind it."""
    return text.removeprefix(codecs.BOM_UTF8).rstrip(b"\0\r\n\t ")


def loads(text: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        orjson.JSONDecodeError: it is none; of what orjson says.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _forgiven(text)
    return value if _RUN not in text[::2].translate(_DIGITS) or not _LONG.search(text) else _exact(text.decode(), value)


def to_bytes(value: Any) -> bytes:
    """As `orjson.dumps`, in bytes that take no more memory than they have.

    What orjson returns keeps its buffer: 4 KiB for a text of 400 bytes, 12 for one of 1,400. A batch keeps hundreds of
    them until they are published, each on pages of its own: that took six times as long as the copy does.

    Raises:
        TypeError: it holds what JSON has not.
    """
    return b"%b" % orjson.dumps(value)


def dumps(value: Any, *, not_finite: str = "NaN") -> bytes:
    """A value as JSON text on one line; what `loads` read is written so that it reads the same again.

    Args:
        value: what `loads` returns, within what orjson writes.
        not_finite: what to write for a number that is not finite: `NaN` (and `Infinity`), `mark` where the reader is strict
            (see `mark`), or `null` where it is to see nothing.

    Raises:
        TypeError: it holds what JSON has not, or is nested too deep.
    """
    try:
        return to_bytes(value)
    except TypeError as e:
        if "64-bit" not in str(e) and NotFinite.__name__ not in str(e):
            raise
    if not_finite != "NaN":
        value = _replaced(value, _marked if not_finite == "mark" else lambda _: None)
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except (ValueError, RecursionError) as e:  # half a surrogate pair; too deep
        raise TypeError(str(e)) from None


def mark(value: Any) -> Any:
    """A value with a text in the place of each number that is not finite, which `unmarked` knows again."""
    return _replaced(value, _marked)


def unmarked(text: str) -> str:
    """JSON text with the numbers that are not finite in the place of the texts that stand for them."""
    return _MARKED.sub(r"\1", text) if MARK in text else text


def _forgiven(text: bytes) -> Any:
    inner = bare(text)
    if inner != text:
        return loads(inner)  # which gives the true reason where there is another fault
    if _MAY_BE_WORD.search(text):
        try:
            return _exact(_WORD.sub(_spelled, text.decode()), None)
        except (UnicodeDecodeError, orjson.JSONDecodeError):
            pass
    return orjson.loads(text)  # raises


def _spelled(match: re.Match[str]) -> str:
    if match[1] is not None:
        return match[1]
    return "NaN" if match[3] else f"{'-' if match[2] == '-' else ''}Infinity"


def _exact(text: str, otherwise: Any) -> Any:
    """What the standard library reads, which keeps all digits; `otherwise` where it must not be asked."""
    try:
        value = json.loads(text, parse_constant=NotFinite, parse_float=_float)
        # It takes half a surrogate pair, which is no text.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        if otherwise is None:
            message = "not JSON"
            raise orjson.JSONDecodeError(message, text, 0) from None
        return otherwise  # more digits than are a number
    return value


def _float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else NotFinite(number)


def _replaced(value: Any, with_: Callable[[float], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(inner, with_) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(inner, with_) for inner in value]
    return with_(value) if isinstance(value, float) and not math.isfinite(value) else value


def _marked(number: float) -> str:
    return MARK + ("NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity")
