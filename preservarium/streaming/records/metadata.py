"""What a record says besides its value: its device, its generation, which try it is, and when it was written."""

import re
from typing import Any, Final

from preservarium.domain.readings.reading import TIMESTAMP_MAX_US
from preservarium.streaming.stage import Record

#: Column width in the databases; the longest real address, an MQTT client id or a URN, is under 128.
DEVICE_CHARS_MAX: Final = 255
#: Generations are opened by hand.
GENERATION_MAX: Final = 2**31 - 1
GENERATION_HEADER: Final = "generation"
TRACE_HEADER: Final = "trace"
#: On a raw record that was redriven: 2 for the first time.
ATTEMPT_HEADER: Final = "attempt"
ATTEMPT_MAX: Final = 1_000_000
#: On a raw record that was redriven: when it was first received, ms since the epoch. The record's own time is that of the
#: redriving, for by it Kafka's retention would take what is redriven late before anybody has read it.
RECEIVED_HEADER: Final = "received"
#: Bound once: a method of an imported name is bound anew at each call, which costs every text a tenth of a microsecond.
find_control: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]").search


def generation_of(record: Record) -> int:
    """The generation in a record's headers; 0, live, where there is none or it is no number."""
    for name, value in record.headers or ():
        if name == GENERATION_HEADER and value is not None:
            # isdigit on bytes is ASCII only: int() alone would also take "1_0", " 1" and "-1".
            number = int(value) if value.isdigit() and len(value) <= 10 else 0
            return number if number <= GENERATION_MAX else 0
    return 0


def attempt_of(record: Record) -> int:
    """Which try of its input a record is: 1, or more where it was redriven."""
    for name, value in record.headers or ():
        if name == ATTEMPT_HEADER and value is not None and value.isdigit() and len(value) <= 7:
            return min(max(1, int(value)), ATTEMPT_MAX)
    return 1


def received_ms(record: Record) -> int:
    """When a record was received, ms since the epoch: its own time, or the one that it had before it was redriven."""
    for name, value in record.headers or ():
        if name == RECEIVED_HEADER and value is not None and value.isdigit() and len(value) <= 14:
            return int(value)
    return record.timestamp


def headers_of(record: Record) -> tuple[tuple[str, bytes], ...]:
    """The headers that a stage passes on to what it makes of a record: generation and trace."""
    headers = record.headers
    if not headers:
        return ()
    return tuple((name, value) for name, value in headers if name in (GENERATION_HEADER, TRACE_HEADER))


def device_of_key(record: Record) -> str | None:
    """The device that a record's key names; None where it names none."""
    key = record.key
    if not key:
        return None
    try:
        device = key.decode()
    except UnicodeDecodeError:
        return None
    return device if device_fault(device) is None else None


def device_fault(device: Any) -> str | None:
    """Why this cannot be a device's address; None where it can."""
    if not isinstance(device, str):
        return "device is not a string"
    if not device.strip():
        return "device is blank"
    if len(device) > DEVICE_CHARS_MAX:
        return f"device has {len(device)} characters; it may have {DEVICE_CHARS_MAX}"
    # Most text holds nothing odd, which is told faster.
    if not device.isprintable() and find_control(device):
        return "device holds a control character"
    return None


def seen_us(record: Record) -> int:
    """When a record was written, µs since the epoch, brought into what can be stored."""
    # A stranger may stamp anything, also what 64 bits do not hold in microseconds.
    return min(max(record.timestamp * 1_000, 0), TIMESTAMP_MAX_US)
