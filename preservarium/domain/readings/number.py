"""Numbers as the field writes them: one rule for every text that is to become a number.

A sign, ASCII digits, one decimal mark, perhaps an exponent; blanks around it do not count. What only Python takes for a number
(`1_000`, `infinity`, digits of other scripts) is none: a device that sends it means something else.
"""

import re
from functools import lru_cache
from typing import Any, Final

#: Longer texts are no numbers: a double written out in full has 309 digits before its mark.
NUMBER_CHARACTERS_MAX: Final = 400
#: What may stand around a number.
BLANKS: Final = " \t\r\n"

#: Marks that may part thousands, and what is written for them: a blank may be one that does not break.
THOUSANDS: Final = {".": r"\.", ",": ",", "'": "['\u2019]", " ": "[ \u00a0\u202f]"}

#: Python takes ten times as long to write a double of this many digits as one of a sensor's.
_REPR_DIGITS: Final = 17
_EXPONENT: Final = r"(?:[eE][+-]?[0-9]+)?"
_PLAIN: Final = re.compile(rf"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+){_EXPONENT}")
#: What a number begins and ends with: neither a blank nor a word.
_ENDS: Final = frozenset("0123456789+-.")
_WHOLE: Final = re.compile(r"[+-]?[0-9]+")
_WORDS: Final = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)


def number_of(text: str, decimal: str = ".", thousands: str = "") -> int | float | None:
    """The number that a text is; None where it is none.

    Args:
        text: as it was written.
        decimal: the mark before the fraction, `.` or `,`.
        thousands: the mark between groups of three digits, a key of `THOUSANDS`; "": there is none.

    Returns:
        A whole number exactly, in however many digits; any other as the nearest float, which is infinite beyond 1.8e308.
    """
    if len(text) > NUMBER_CHARACTERS_MAX:
        return None
    if decimal == "." and not thousands:
        # What most devices write takes the short way: Python's float() where it means the same.
        if text.isascii():
            if text.isdigit():
                return int(text)
            if text[:1] in _ENDS and text[-1:] in _ENDS and "." in text and "_" not in text:
                try:
                    return float(text)
                except ValueError:
                    return None
        text = text.strip(BLANKS)
        if _PLAIN.fullmatch(text) is None:
            return None
    else:
        text = text.strip(BLANKS)
        pattern, parting = _pattern(decimal, thousands)
        if pattern.fullmatch(text) is None:
            return None
        if parting is not None:
            text = parting.sub("", text)
        text = text.replace(decimal, ".")
    return int(text) if _WHOLE.fullmatch(text) else float(text)


def whole_number(text: str) -> int | None:
    """The whole number that a text is; None where it is none."""
    return int(text) if len(text) <= NUMBER_CHARACTERS_MAX and _WHOLE.fullmatch(text) else None


def says_not_finite(text: str) -> bool:
    """Whether a text is a word for what has no finite value: `NaN`, `-inf`, `Infinity`."""
    return _WORDS.fullmatch(text.strip(BLANKS)) is not None


class Written(str):
    """A value as it was written, beside the number that it is by the rules of its format.

    A string of its own, so that where text is wanted nothing of it is lost: `1.10` stays a version, `00123` a serial number.

    Args:
        text: as it was written.
        number: what it says; None: it is no number.
        typed: whether the format says that it is a number (line protocol), not only its look (CSV).
    """

    __slots__ = ("number", "typed")

    number: int | float | None
    typed: bool

    def __new__(cls, text: str, number: float | None, *, typed: bool) -> "Written":  # noqa: D102 - see the class
        written = super().__new__(cls, text)
        written.number, written.typed = number, typed
        return written


def written(text: str, number: float) -> int | float | Written:
    """A number out of a format that has numbers: by itself where it is written as we would write it, else with its text."""
    return number if len(text) < _REPR_DIGITS and str(number) == text else Written(text, number, typed=True)


def shown(value: Any) -> Any:
    """A value as people and JSON are to see it: a number where its format says that it is one, else its text."""
    return (value.number if value.typed else str(value)) if isinstance(value, Written) else value


@lru_cache(maxsize=16)
def _pattern(decimal: str, thousands: str) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    mark = re.escape(decimal)
    if not thousands:
        return re.compile(rf"[+-]?(?:[0-9]+(?:{mark}[0-9]*)?|{mark}[0-9]+){_EXPONENT}"), None
    part = THOUSANDS[thousands]
    whole = rf"(?:[0-9]{{1,3}}(?:{part}[0-9]{{3}})+|[0-9]+)"
    return re.compile(rf"[+-]?(?:{whole}(?:{mark}[0-9]*)?|{mark}[0-9]+){_EXPONENT}"), re.compile(part)
