"""Instants as devices, networks and people write them, to whole microseconds since the epoch, UTC.

A number counts seconds, milliseconds, microseconds or nanoseconds; as text it may have a fraction and an exponent. Any other text
is RFC 3339 or one of the further forms of ISO 8601: `T`, `t`, `_` or blanks between date and time, `Z`, `z`, `UTC`, `GMT` or an offset
behind it, the basic form without hyphens and colons, a week's day, a date alone (its midnight). Without an offset it is UTC.

What is finer than a microsecond is cut off, never rounded up: a reading is not younger than it says. A leap second (`23:59:60`) is the
second that follows it, because seconds since the epoch have no place for it.
"""

import math
import re
from datetime import UTC, date, datetime
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any, Final

from preservarium.domain.readings.number import BLANKS, number_of
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.errors import ReasonCode, Reject

#: Unit of a number by its size: 1e11 s is the year 5138, 1e11 ms is 1973; so every instant from 1973 on is unambiguous.
_SECONDS_BELOW: Final = 1e11
_MILLISECONDS_BELOW: Final = 1e14
_MICROSECONDS_BELOW: Final = 1e17
_NANOSECONDS_BELOW: Final = 1e20

#: Longest text that is read as an instant: ISO 8601 with nanoseconds and an offset has 35 characters.
_TEXT_CHARACTERS_MAX: Final = 64

UNITS_US: Final[dict[str, float]] = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
#: The same as powers of ten.
_EXPONENTS: Final = {"s": 6, "ms": 3, "us": 0, "ns": -3}

#: Every digit of a text of `_TEXT_CHARACTERS_MAX` characters below 1e20, so that nothing is rounded on the way.
_EXACT: Final = Context(prec=128, rounding=ROUND_FLOOR)
#: 2024-06-01T12:00:00Z, with 3, 6 or 9 digits of a fraction.
_USUAL_LENGTHS: Final = frozenset({20, 24, 27, 30})
_DAY_US: Final = 86_400_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()

_ISO: Final = re.compile(
    r"""
    (?:(?P<year>\d{4})(?:-(?P<month>\d\d)-(?P<day>\d\d)|(?P<month_>\d\d)(?P<day_>\d\d)))
    |(?:(?P<week_year>\d{4})-?W(?P<week>\d\d)(?:-?(?P<weekday>\d))?)
    """,
    re.VERBOSE | re.ASCII,
)
_TIME: Final = re.compile(
    r"""
    (?:[T_]|[ ]+)
    (?P<hour>\d\d)(?::(?P<minute>\d\d)(?::(?P<second>\d\d))?|(?P<minute_>\d\d)(?P<second_>\d\d)?)?
    (?:[.,](?P<fraction>\d+))?
    [ ]*(?:(?P<utc>Z|UTC|GMT)|(?P<sign>[+\-\u2212])(?P<off_hour>\d\d)(?::?(?P<off_minute>\d\d)(?::?(?P<off_second>\d\d))?)?)?
    """,
    re.VERBOSE | re.ASCII,
)


def instant_us(value: Any, unit: str | None = None) -> int | None:
    """Microseconds since the epoch, or None where `value` is no instant.

    Args:
        value: a number (or its text), or ISO 8601 text; without an offset it is UTC.
        unit: s, ms, us or ns for numbers; None tells by the size.
    """
    if isinstance(value, str):
        return _from_text(value, unit)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        if unit is None:
            size = abs(value)
            if size < _SECONDS_BELOW:
                return value * 1_000_000
            if size < _MILLISECONDS_BELOW:
                return value * 1_000
            if size < _MICROSECONDS_BELOW:
                return value
            return value // 1_000 if size < _NANOSECONDS_BELOW else None
        if abs(value) >= _NANOSECONDS_BELOW:
            return None
        exponent = _EXPONENTS[unit]
        return _stored(value * 10**exponent) if exponent >= 0 else value // 1_000
    if not math.isfinite(value):
        return None
    if unit == "s" or (unit is None and abs(value) < _SECONDS_BELOW):
        return _stored(seconds_us(value)) if abs(value) < _NANOSECONDS_BELOW else None
    return _from_decimal(Decimal(repr(value)), unit)


def seconds_us(seconds: float) -> int:
    """Whole microseconds in a finite number of seconds, what is finer cut off.

    A float is the shortest decimal that it stands for: what was written, where it was written with 15 digits or fewer.
    """
    if isinstance(seconds, int):
        return seconds * 1_000_000
    whole = round(seconds * 1e6)
    if whole / 1e6 == seconds:
        return whole
    return int(_EXACT.to_integral_value(_EXACT.scaleb(Decimal(repr(seconds)), 6)))


def required_instant_us(value: Any) -> int:
    """Microseconds since the epoch of an instant that a message must have; see `instant_us`.

    Raises:
        Reject: TIMESTAMP_INVALID: no instant, or outside 2000-01-01 … 2100-01-01.
    """
    us = instant_us(value)
    if us is None or not TIMESTAMP_MIN_US <= us <= TIMESTAMP_MAX_US:
        why = "no instant" if us is None else "outside 2000 … 2100"
        raise Reject(ReasonCode.TIMESTAMP_INVALID, f"{why}: {str(value)[:80]!r}")
    return us


def _from_decimal(number: Decimal, unit: str | None) -> int | None:
    size = abs(number)
    if size >= _NANOSECONDS_BELOW:
        return None
    if unit is None:
        unit = (
            "s" if size < _SECONDS_BELOW
            else "ms" if size < _MILLISECONDS_BELOW
            else "us" if size < _MICROSECONDS_BELOW
            else "ns"
        )  # fmt: skip
    # Of a number that is far smaller than a microsecond the digits that are lost here are cut off anyway.
    return _stored(int(_EXACT.to_integral_value(_EXACT.scaleb(number, _EXPONENTS[unit]))))


def _stored(us: int) -> int | None:
    """The instant where 64 bits hold it, and with them every message and every store; else it is none."""
    return us if -(2**63) <= us < 2**63 else None


def _from_text(text: str, unit: str | None) -> int | None:
    if not text or len(text) > _TEXT_CHARACTERS_MAX:
        return None
    if len(text) in _USUAL_LENGTHS and text[10] == "T" and text[-1] == "Z":
        # What most write is read faster by the standard library, which cuts a fraction to microseconds, too.
        try:
            return _since_epoch(datetime.fromisoformat(text))
        except ValueError:
            return iso_us(text)
    text = text.strip(BLANKS)
    # Numbers first: ISO 8601's basic form of a date is a number of eight digits, and devices send numbers.
    number = number_of(text)
    if number is None:
        return iso_us(text)
    if isinstance(number, int):
        return instant_us(number, unit)
    # Of one that no double holds no decimal is made either.
    return _from_decimal(_EXACT.create_decimal(text), unit) if math.isfinite(number) else None


def _since_epoch(at: datetime) -> int:
    delta = at - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def iso_us(text: str, *, with_offset: bool = False) -> int | None:
    """Microseconds since the epoch of ISO 8601 text; None where it is none.

    Args:
        text: as it was written.
        with_offset: whether it must say how far it is from UTC; otherwise it is UTC where it does not.
    """
    text = text.strip(BLANKS).upper()
    on = _ISO.match(text)
    if on is None:
        return None
    try:
        if on["week"] is not None:
            day = date.fromisocalendar(int(on["week_year"]), int(on["week"]), int(on["weekday"] or 1))
        else:
            day = date(int(on["year"]), int(on["month"] or on["month_"]), int(on["day"] or on["day_"]))
    except ValueError:
        return None
    midnight_us = (day.toordinal() - _EPOCH_DAY) * _DAY_US
    if on.end() == len(text):
        return None if with_offset else midnight_us
    at = _TIME.fullmatch(text, on.end())
    if at is None or (with_offset and at["utc"] is None and at["sign"] is None):
        return None
    hour, minute = int(at["hour"]), int(at["minute"] or at["minute_"] or 0)
    given_second = at["second"] or at["second_"]
    second, fraction = int(given_second or 0), at["fraction"] or ""
    if fraction and given_second is None:
        return None
    # 24:00 is the midnight that ends the day (ISO 8601, 4.2.3).
    if minute > 59 or second > 60 or hour > 24 or (hour == 24 and (minute or second or int(fraction or 0))):
        return None
    offset_s = 0
    if at["sign"] is not None:
        off_hour, off_minute, off_second = (int(at[name] or 0) for name in ("off_hour", "off_minute", "off_second"))
        if off_hour > 23 or off_minute > 59 or off_second > 59:
            return None
        offset_s = (off_hour * 3_600 + off_minute * 60 + off_second) * (1 if at["sign"] == "+" else -1)
    seconds = hour * 3_600 + minute * 60 + second - offset_s
    return midnight_us + seconds * 1_000_000 + int(fraction[:6].ljust(6, "0"))
