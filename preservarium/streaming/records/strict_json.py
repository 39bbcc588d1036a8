"""One JSON value that a stranger wrote: what it may hold, and how deep it may go."""

from typing import Any, Final, NoReturn

import orjson

from preservarium.domain.readings import json_text
from preservarium.errors import ReasonCode, Reject

#: No sensor format nests deeper than 8. orjson reads 1,024 levels and writes 254: what was read must stay writable
#: after it was wrapped a few times.
DEPTH_MAX: Final = 64


def loads(text: bytes, *, ours: bool = False) -> Any:
    """One JSON value that a stranger wrote; see domain/readings/json_text.py for what is forgiven.

    Args:
        text: the text.
        ours: only we write such texts: nothing is forgiven.

    Raises:
        Reject: not UTF-8, NUL or a lone surrogate in it, not JSON, or nested too deep.
    """
    try:
        value = orjson.loads(text) if ours else json_text.loads(text)
    except orjson.JSONDecodeError as e:
        what = str(e)
        if "depth limit" in what:
            raise Reject(ReasonCode.ENVELOPE_TOO_DEEP, f"nested deeper than {DEPTH_MAX}") from None
        if b"\0" in json_text.bare(text):
            raise Reject(ReasonCode.ENVELOPE_NOT_UTF8, "holds NUL") from None
        if "UTF-8" in what or not is_utf8(text):
            raise Reject(ReasonCode.ENVELOPE_NOT_UTF8, "not UTF-8") from None
        if "surrogate" in what:
            raise Reject(ReasonCode.ENVELOPE_NOT_UTF8, f"a lone surrogate: {what}") from None
        raise Reject(ReasonCode.ENVELOPE_NOT_JSON, f"not JSON: {what}") from None
    check_tree(text, value)
    return value


def payload_of(data: bytes) -> Any:
    """What a device sent: a JSON object or array as such, anything else as the bytes that it is.

    A bare number or word stays bytes, because two raw bytes may happen to be two digits.
    """
    try:
        value = loads(data)
    except Reject:
        return data
    return value if isinstance(value, dict | list) else data


def check_tree(text: bytes, value: Any) -> None:
    """Depth and NUL, looked for only where the text says that they could be there."""
    if text.count(b"[") + text.count(b"{") > DEPTH_MAX and _depth_over(value, DEPTH_MAX):
        reject(ReasonCode.ENVELOPE_TOO_DEEP, f"nested deeper than {DEPTH_MAX}")
    # A backslash is rare, and one byte is found faster than six.
    if b"\\" in text and b"\\u0000" in text and _holds_nul(value):
        reject(ReasonCode.ENVELOPE_NOT_UTF8, "holds NUL")


def _depth_over(value: Any, depth_max: int) -> bool:
    # Level by level and without recursion: the input decides how deep it goes.
    level = [value]
    for _ in range(depth_max):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _holds_nul(value: Any) -> bool:
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            if "\0" in node:
                return True
        elif isinstance(node, dict):
            stack.extend(node)
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return False


def is_utf8(text: bytes) -> bool:
    """Whether it is text at all."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def reject(code: ReasonCode, message: str) -> NoReturn:
    """Raise Reject."""
    raise Reject(code, message)
