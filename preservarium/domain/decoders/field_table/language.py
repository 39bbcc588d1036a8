"""The language of field tables: its keys, its limits, and the checks of single entries."""

import math
import re
from collections.abc import Mapping
from typing import Any, Final, cast

from preservarium.domain.decoders.base import ParserError, is_word

#: Items in one table, all levels: the longest real one (a multi-depth soil probe) has about 60.
ITEMS_MAX: Final = 2_000
#: Levels of groups, repeats and choices.
DEPTH_MAX: Final = 8
#: Turns of all loops of one payload together; no LoRaWAN payload has more than 242 bytes, gateways' files some thousands.
TURNS_MAX: Final = 20_000
#: Longest number in bytes.
WIDTH_BYTES_MAX: Final = 16
#: Longest name, text length and enumeration of a table.
NAME_CHARACTERS_MAX: Final = 200
ENUM_MAX: Final = 4_096

FIELD_KEYS: Final = {
    "name", "key", "type", "endian", "at", "length", "scale", "div", "offset", "expr", "unit", "pin", "emit", "enum",
    "bits", "equals", "invalid", "time", "epoch", "encoding", "when", "description", "round",
}  # fmt: skip
PART_KEYS: Final = {
    "name", "key", "bit", "bits", "signed", "scale", "div", "offset", "expr", "unit", "pin", "emit", "enum", "equals",
    "invalid", "description", "round",
}  # fmt: skip
GROUP_KEYS: Final = {"when", "fields", "else", "within", "time_offset_s", "description"}
REPEAT_KEYS: Final = {"repeat", "fields", "when", "time_offset_s", "description"}
CHOICE_KEYS: Final = {"switch", "cases", "default", "when", "description"}
TABLE_KEYS: Final = {"endian", "rest", "parameters", "fields", "ports", "description"}
IDENTIFIER: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
TEMPLATE: Final = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")
EPOCHS: Final = {"unix": 0, "gps": 315_964_800, "2000": 946_684_800}


def slug(name: str) -> str:
    """A name as an identifier: lower case, runs of other characters become one underscore.

    `CH4: NO2 (we)` becomes `ch4_no2_we`.
    """
    text = re.sub(r"[^0-9a-z]+", "_", name.replace("µ", "u").replace("°", "deg").lower()).strip("_")
    return text if not text[:1].isdigit() else f"n{text}"


def choice_of(value: Any, allowed: set[str], where: str) -> str:
    """A word of a closed list.

    Raises:
        ParserError: it is another.
    """
    if not is_word(value, allowed):
        message = f"{where}: {value!r} is not one of {', '.join(sorted(allowed))}"
        raise ParserError(message)
    return cast(str, value)


def check_keys(item: Mapping[str, Any], keys: set[str], where: str) -> None:
    """Refuse keys that an item has not.

    Raises:
        ParserError: there is one.
    """
    if unknown := item.keys() - keys:
        message = f"{where}: {', '.join(sorted(map(str, unknown)))} is not known; known are {', '.join(sorted(keys))}"
        raise ParserError(message)


def number_of(value: Any, where: str) -> int | float:
    """A number; a whole one of more than 64 bits becomes a float.

    Raises:
        ParserError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
        message = f"{where}: {value!r:.60} is not a number"
        raise ParserError(message)
    if isinstance(value, int) and value.bit_length() > 64:
        return float(value)
    return value


def is_finite(value: int | float) -> bool:
    """Whether a double can hold a number; a whole one of a file may have any length."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def case_of(given: Any, kind: str, where: str) -> int | str:
    """The key of a case as the value that it is compared with: a text, or a whole number.

    Raises:
        ParserError: it is no whole number.
    """
    if kind == "text":
        return str(given)
    try:
        return int(given, 0) if isinstance(given, str) else int(given)
    except (TypeError, ValueError):
        message = f"{where}: {given!r} is not a whole number"
        raise ParserError(message) from None


def sets_time(items: Any) -> bool:
    """Whether one of the items, at any level, is a time."""
    if not isinstance(items, list):
        return False
    return any(
        (isinstance(i, dict) and ("time" in i or any(sets_time(i.get(k)) for k in ("fields", "else", "default"))))
        or (isinstance(i, dict) and isinstance(i.get("cases"), dict) and any(sets_time(c) for c in i["cases"].values()))
        for i in items
    )
