"""The lines of `device_commands`: what is asked of a device, called off, or reported."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NotRequired, TypedDict

from preservarium.domain.commands.confirm import check_confirm
from preservarium.domain.commands.fields import name_of, refuse, within
from preservarium.domain.readings.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.errors import ReasonCode, Reject

#: A line of `device_commands`. A LoRaWAN downlink has at most 242 bytes; a JSON configuration some thousand.
LINE_BYTES_MAX: Final = 8_192
#: A command that waits for longer is of no use to anyone, and `device_downlinks` keeps records for a week.
EXPIRES_S_MAX: Final = 7 * 86_400
#: A week, for a device that reports daily and may miss some.
TIMEOUT_S_MAX: Final = 7 * 86_400
#: Each try is airtime, which is rationed in the bands that devices use.
TRIES_MAX: Final = 10
PRIORITY_MAX: Final = 9
#: A reason is a sentence of a codec or a network server.
REASON_CHARS_MAX: Final = 500
#: LoRaWAN application ports (TS001, 4.3.2).
PORT_MAX: Final = 255


class CommandDoc(TypedDict):
    """A line of `device_commands`, keyed by device. Which fields are needed depends on `kind`."""

    kind: NotRequired[str]  #: request (where absent), cancel, report, wake (the device asks what waits for it)
    device_id: str
    at: NotRequired[int]  #: µs; absent: when Kafka took the record
    actor: NotRequired[str]  #: who
    # request
    command: NotRequired[str]  #: name; the device type may say what it means
    idempotency_key: NotRequired[str]  #: absent: the record's coordinates
    fields: NotRequired[dict[str, Any]]  #: for the encoder of the device type's codec
    payload: NotRequired[Any]  #: or JSON, sent as it is; a text is sent as its UTF-8
    payload_b64: NotRequired[str]  #: or bytes
    port: NotRequired[int]
    confirmed: NotRequired[bool]  #: LoRaWAN: the device is to acknowledge
    confirm: NotRequired[Any]  #: what confirms it, see `check_confirm`
    timeout_s: NotRequired[float]  #: a try is confirmed within this time after it was sent
    tries: NotRequired[int]
    expires_s: NotRequired[float]  #: after `at`; then it is not sent any more
    priority: NotRequired[int]  #: higher goes first
    cause: NotRequired[str]  #: id of the alarm transition that asks for it
    # cancel
    command_id: NotRequired[str]
    # report
    downlink_id: NotRequired[str]
    report: NotRequired[str]  #: a word of `REPORTS`
    reason: NotRequired[str]


#: What the downlink stage and the network servers report.
REPORTS: Final = (
    "sent",  #: the broker has taken it
    "expired",  #: its time was over before the broker took it
    "failed",  #: it cannot be sent, or the network server gave up
    "transmitted",  #: a gateway has sent it
    "acknowledged",  #: the device has acknowledged it
    "not_acknowledged",  #: the device has not
)


@dataclass(frozen=True, slots=True)
class Line:
    """A checked line of `device_commands`."""

    kind: str
    device_id: str
    at: int
    actor: str
    fields: Mapping[str, Any]  #: as `CommandDoc` has them, checked


#: Fields that a device type may preset for a command, or for all of them.
PRESETS: Final = frozenset({"port", "confirmed", "confirm", "timeout_s", "tries", "expires_s", "priority"})
CONTENTS: Final = ("fields", "payload", "payload_b64")


def check_settings(given: Mapping[str, Any]) -> None:
    """Check those of `PRESETS` and `CONTENTS` that are there.

    Raises:
        ValueError: the message names the field.
    """
    within(given, "expires_s", EXPIRES_S_MAX, least=0)
    within(given, "timeout_s", TIMEOUT_S_MAX)
    within(given, "tries", TRIES_MAX, least=1, whole=True)
    within(given, "priority", PRIORITY_MAX, least=0, whole=True)
    within(given, "port", PORT_MAX, least=1, whole=True)
    if not isinstance(given.get("confirmed", False), bool):
        refuse("confirmed: neither true nor false")
    if "confirm" in given:
        try:
            check_confirm(given["confirm"])
        except ValueError as e:
            refuse(f"confirm: {e}")
    if not isinstance(given.get("fields", {}), dict):
        refuse("fields: not an object")
    if not isinstance(given.get("payload_b64", ""), str):
        refuse("payload_b64: no text")
    if sum(name in given for name in CONTENTS) > 1:
        refuse(f"give one of {', '.join(CONTENTS)}")


def parse_line(line: Any, *, device_id: str | None, at: int, key: str) -> Line:
    """Check a line, which anyone may have written.

    Args:
        line: the parsed line.
        device_id: what the record's key says, where the line names no device.
        at: when Kafka took it, µs: the line's instant where it says none, or a later one.
        key: idempotency key where a request has none.

    Raises:
        Reject: `command_invalid`; the message names the field.
    """
    try:
        return check_line(line, device_id, at, key)
    except ValueError as e:
        raise Reject(ReasonCode.COMMAND_INVALID, str(e)) from None


def check_line(line: Any, device_id: str | None, taken_at: int, key: str) -> Line:
    """Check a line as `parse_line` does.

    Raises:
        ValueError: the message names the field.
    """
    if not isinstance(line, dict):
        refuse("a command is a JSON object")
    kind = line.get("kind", "request")
    device = name_of(line, "device_id", device_id)
    actor = name_of(line, "actor", "unknown")
    at = line.get("at", taken_at)
    if type(at) is not int or not TIMESTAMP_MIN_US <= at <= TIMESTAMP_MAX_US:
        refuse(f"at: {at!r:.100} is no instant in µs")
    at = min(at, taken_at)  # a clock that is ahead must not lengthen a command's life
    if kind == "cancel":
        return Line(kind, device, at, actor, {"command_id": name_of(line, "command_id")})
    if kind == "report":
        word = line.get("report")
        if word not in REPORTS:
            refuse(f"report: {word!r:.100} is not one of {', '.join(REPORTS)}")
        reason = str(line.get("reason") or "").replace("\0", "")[:REASON_CHARS_MAX]
        return Line(kind, device, at, actor, {
            "downlink_id": name_of(line, "downlink_id"), "report": word, "reason": reason,
        })  # fmt: skip
    if kind == "wake":
        return Line(kind, device, at, actor, {})
    if kind != "request":
        refuse(f"there is no kind {kind!r:.100}")
    found: dict[str, Any] = {
        "command": name_of(line, "command", "downlink" if any(name in line for name in CONTENTS) else None),
        "idempotency_key": name_of(line, "idempotency_key", key),
    }
    if line.get("cause") is not None:
        found["cause"] = name_of(line, "cause")
    for name in (*PRESETS, *CONTENTS):
        if line.get(name) is not None:
            found[name] = line[name]
    check_settings(found)
    return Line(kind, device, at, actor, found)
