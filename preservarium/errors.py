"""Errors, sorted by what the caller does with them.

| class  | what the caller does |
|--------|----------------------|
| Reject | sends this one input to `iot_errors` with its reason code, and goes on |
| Retry  | keeps the batch, pauses its partitions, and tries again without limit: a dependency is down |
| Fatal  | ends the worker: going on would lose or corrupt data |

Any other exception is a defect of ours: the batch is tried again a few times, then bisected to the record that
provokes it, which goes to `iot_errors` as `handler_failed`.
"""

import os
import re
from enum import StrEnum
from typing import ClassVar, Final


class ReasonCode(StrEnum):
    """Why an input went to `iot_errors`. The list is closed: dashboards and redrive select by it."""

    ENVELOPE_TOO_LARGE = "envelope_too_large"  #: the record or its payload is over the size limit
    ENVELOPE_NOT_UTF8 = "envelope_not_utf8"  #: text was expected and is not UTF-8, or holds NUL
    ENVELOPE_NOT_JSON = "envelope_not_json"  #: the line is not JSON (torn, truncated)
    ENVELOPE_TOO_DEEP = "envelope_too_deep"  #: JSON nested deeper than the limit
    ENVELOPE_INVALID = "envelope_invalid"  #: JSON, but a field is missing or of the wrong type
    ENVELOPE_NO_DEVICE = "envelope_no_device"  #: neither the envelope nor the record's key names a device
    UNKNOWN_DEVICE = "unknown_device"  #: the device is not in the registry; redriven when it is registered
    DEVICE_DISABLED = "device_disabled"  #: the device is registered and switched off
    NO_PARSER = "no_parser"  #: the device's type has no active parser
    DECODE_FAILED = "decode_failed"  #: the parser says that the payload is not of its format
    DECODE_LIMIT = "decode_limit"  #: more readings, or a larger result, than a message may have
    SCRIPT_FAULT = "script_fault"  #: a parser script raised
    SCRIPT_TIMEOUT = "script_timeout"  #: a parser script went over its time or memory limit
    SCRIPT_SUSPENDED = "script_suspended"  #: this script version faulted too often and is set aside
    MAPPING_FAILED = "mapping_failed"  #: decoded, but no field maps to a datatype
    VALUE_TYPE = "value_type"  #: the value is not of its datatype's kind
    VALUE_NOT_FINITE = "value_not_finite"  #: NaN or infinity where a number is needed
    VALUE_RANGE = "value_range"  #: outside the span that the sensor can report (QARTOD gross range: fail)
    COUNTER_NEGATIVE = "counter_negative"  #: a meter that only counts up shows less than zero
    QUALITY_FAIL = "quality_fail"  #: another quality test says fail
    TIMESTAMP_INVALID = "timestamp_invalid"  #: no instant, or outside 2000-01-01 … 2100-01-01
    TIMESTAMP_FUTURE = "timestamp_future"  #: later than the allowed clock skew
    TIMESTAMP_BEFORE_BIRTH = "timestamp_before_birth"  #: earlier than the device's registration allows
    SAME_INSTANT = "same_instant"  #: the series has another value at this instant, and its device type keeps the first
    LATE_BEYOND_RETENTION = "late_beyond_retention"  #: older than the store keeps: writing it would falsify rollups
    STORE_REJECTED = "store_rejected"  #: the database refused this one row
    OUTPUT_TOO_LARGE = "output_too_large"  #: what the record became is larger than Kafka takes
    STATE_LIMIT = "state_limit"  #: the device has more series or windows than its state may hold
    ACTION_INVALID = "action_invalid"  #: an operator's action that the alarm's state does not allow
    COMMAND_INVALID = "command_invalid"  #: a line of `device_commands` that cannot be read or does not apply
    NOTICE_REFUSED = "notice_refused"  #: a notice that its channel will not take: a wrong address, a refusal for good
    HANDLER_FAILED = "handler_failed"  #: a defect of ours, isolated to this record
    LEGACY_INVALID = "legacy_invalid"  #: a `decoded_iot_data` message that lacks or garbles a field


class PreservariumError(Exception):
    """Something went wrong in Preservarium."""

    def __init__(self, message: str | None = None) -> None:
        # The docstring is the default message, so that documentation and error cannot drift.
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class Reject(PreservariumError):
    """This input cannot be used.

    Attributes:
        code: why, from the closed list.
    """

    def __init__(self, code: ReasonCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Retry(PreservariumError):
    """A dependency cannot be reached now; the same batch is tried again."""

    #: Whether the dependency is at fault, so that a circuit breaker counts it.
    of_dependency: ClassVar[bool] = True


class Fatal(PreservariumError):
    """Going on would lose or corrupt data; the worker ends."""


# --- why, for people -------------------------------------------------------------------------------------------------

#: What exceptions mean that say nothing, or nothing to people. The first that fits; the special ones before the general.
_MEANINGS: Final[tuple[tuple[type[BaseException], str], ...]] = (
    (TimeoutError, "no answer in time"),
    (ConnectionRefusedError, "connection refused"),
    (ConnectionResetError, "the other side cut the connection"),
    (BrokenPipeError, "the other side cut the connection"),
    (ConnectionAbortedError, "the connection was given up"),
    (ConnectionError, "the connection was lost"),
    (EOFError, "the other side ended the connection"),
    (UnicodeError, "it is not text in UTF-8"),
    (RecursionError, "it is nested too deep"),
    (MemoryError, "there is not enough memory"),
)
#: What libraries say in the words of their own code.
_OF_LIBRARIES: Final = (
    (re.compile(r"Unable to bootstrap from|NoBrokersAvailable"), "no broker answers"),
    (re.compile(r"Cannot connect to host|Connect call failed"), "no server answers there"),
    (re.compile(r"surrogates not allowed|is not valid UTF-8"), "it is not text in UTF-8"),
    (re.compile(r"pool is (closing|closed)"), "the connections are being closed"),
)
#: In the text, because `errno` of errors of TLS and of the resolver has numbers that mean other things there.
_ERRNO: Final = re.compile(r"\[Errno (\d{1,5})\]")
#: What OpenSSL says, wherever it stands: its code, and the same in words.
_TLS: Final = re.compile(r"\[[A-Z0-9]+: (\w+)\] (.+?)\.? \(_ssl\.c:\d+\)")
#: Codes of an answer that is no TLS.
_NO_TLS: Final = frozenset(("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"))
#: What is no word for people: numbers of errors (aiokafka's errors begin with the broker's) and lines of C.
_NO_WORDS: Final = re.compile(r"^\[Error \d+\] |\[Errno -?\d+\] ?| \(_ssl\.c:\d+\)")


def reason(e: BaseException) -> str:
    """Why, for people: one line, never empty.

    What the exception says, unless that is Python's own (addresses in brackets, names of classes); where it says nothing,
    what its class means.
    """
    text = " ".join(str(e).split())
    if tls := _TLS.search(text):
        return _of_tls(*tls.groups())
    library = next((meaning for pattern, meaning in _OF_LIBRARIES if pattern.search(text)), "")
    if isinstance(e.__cause__, OSError) and (library or isinstance(e, OSError)):
        return reason(e.__cause__)  # it says where, or which library tried; why says the one beneath
    if isinstance(e, OSError):
        # Where several addresses were tried, each has said something.
        known = sorted({os.strerror(int(n)) for n in _ERRNO.findall(text)})
        if known:
            what = " and ".join(known)
            what = what[0].lower() + what[1:]
            return f"{what}: {e.filename}" if isinstance(e.filename, str) else what
    if library:
        return library
    if isinstance(e, KeyError) and e.args:
        return f"{' '.join(str(e.args[0]).split()) or 'a field'} is missing"
    text = _NO_WORDS.sub("", text).removeprefix(type(e).__name__).removeprefix(":").strip()
    if text and not isinstance(e, UnicodeError):
        return text
    for kind, meaning in _MEANINGS:
        if isinstance(e, kind):
            return meaning
    # The words of its name: KafkaTimeoutError is a kafka timeout.
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|[a-z]+|\d+", type(e).__name__.removesuffix("Error"))
    return " ".join(words).lower() or "unknown"


def _of_tls(code: str, words: str) -> str:
    """What OpenSSL says, for people."""
    if code in _NO_TLS:
        return f"what answers there speaks no TLS ({words})"
    if code == "UNEXPECTED_EOF_WHILE_READING":
        return "the other side ended the connection"
    return words if code == "CERTIFICATE_VERIFY_FAILED" else f"TLS: {words}"
