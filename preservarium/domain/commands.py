"""Commands to devices: the state machine, and one device's queue.

The machine is the literal table `TRANSITIONS`, every state × every event; docs/command_states.md is generated from it
(`python -m preservarium.domain.commands`) and a test holds both equal.

A device has one command under way at a time. The next one is handed over when the one before has ended, in the order of
priority and then of arrival. A device that sleeps is handed its command when it has just been heard.

Ids are deterministic: a command's is made of the device and the idempotency key, an event's of the command and its
sequence number, a downlink's of the command and the number of its try. So what a crash repeats has the same ids again.

Instants are µs since the epoch, UTC. `now_us` is the clock of whoever calls.
"""

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import lru_cache
from math import isfinite
from typing import Any, Final, NoReturn, NotRequired, TypedDict

from preservarium.domain import state_pictures
from preservarium.domain.device import DeviceDoc, DeviceTypeDoc
from preservarium.domain.errors import ReasonCode, Reject
from preservarium.domain.expressions import ARITHMETIC_ERRORS, FUNCTIONS, ExpressionError, compile_expression
from preservarium.domain.lineage import GENERATION_LIVE, applied, identity, is_applied
from preservarium.domain.reading import TIMESTAMP_MAX_US, TIMESTAMP_MIN_US, Quality

#: Version of the state document; a document of another version is a defect, not something to guess at.
STATE_VERSION: Final = 1

#: Commands of one device that have not ended. A person queues a handful; with `LINE_BYTES_MAX` the document stays below
#: half of what a Kafka record may have.
OPEN_MAX: Final = 50
#: A line of `device_commands`. A LoRaWAN downlink has at most 242 bytes; a JSON configuration some thousand.
LINE_BYTES_MAX: Final = 8_192
#: An ended command is remembered for so long, and at least until it would have expired: the same idempotency key is the
#: same command. A client that tries again does so within minutes, an operator within the day.
MEMORY_S: Final = 86_400
#: Ended commands of one device that are remembered at most, the latest: some 30 KiB.
MEMORY_MAX: Final = 500
#: A command that waits for longer is of no use to anyone, and `device_downlinks` keeps records for a week.
EXPIRES_S_MAX: Final = 7 * 86_400
#: A week, for a device that reports daily and may miss some.
TIMEOUT_S_MAX: Final = 7 * 86_400
#: Each try is airtime, which is rationed in the bands that devices use.
TRIES_MAX: Final = 10
PRIORITY_MAX: Final = 9
#: What was handed over is reported within the downlink stage's retries; after its topic's retention no report can come.
LOST_AFTER_S: Final = 8 * 86_400
#: Names, keys, actors; the registry's own names are far shorter.
NAME_CHARS_MAX: Final = 255
#: A reason is a sentence of a codec or a network server.
REASON_CHARS_MAX: Final = 500
#: LoRaWAN application ports (TS001, 4.3.2).
PORT_MAX: Final = 255

_S_US: Final = 1_000_000
_QUALITY_UNUSABLE: Final = int(Quality.FAIL)


# --- the machine -----------------------------------------------------------------------------------------------------


class State(StrEnum):
    """Where a command stands."""

    QUEUED = "queued"  #: waits: for its turn, for the device to wake, or for the broker to take it
    SENT = "sent"  #: the broker has taken it
    DELIVERED = "delivered"  #: the network has transmitted it, or the device has acknowledged it
    SUCCESSFUL = "successful"  #: confirmed, in the way that was asked for
    TIMEOUT = "timeout"  #: it was sent, and no try was confirmed in time
    EXPIRED = "expired"  #: it waited for too long and was never sent
    FAILED = "failed"  #: it cannot be sent, or the network gave up
    CANCELLED = "cancelled"  #: somebody ended it; if it had been sent, the device may still carry it out


class Event(StrEnum):
    """What happens to a command after it was requested."""

    HAND_OVER = "hand_over"  #: its turn: a downlink goes to the downlink stage
    PUBLISH = "publish"  #: the broker has taken the downlink
    DELIVER = "deliver"  #: the network or the device acknowledges the downlink
    CONFIRM = "confirm"  #: what confirms it has come
    RETRY = "retry"  #: no confirmation in time, and a try is left
    TIME_OUT = "time_out"  #: no confirmation in time, and no try is left
    EXPIRE = "expire"  #: its time is over before it was sent
    FAIL = "fail"
    CANCEL = "cancel"


class Refusal(StrEnum):
    """Why an event is refused in a state; the text is for people."""

    NOT_SENT = "the command has not been sent"
    HANDED_OVER = "the command is being sent at this moment"
    ALREADY_SENT = "the command was sent already"
    ALREADY_DELIVERED = "the command was delivered already"
    IS_OVER = "the command has ended"
    UNKNOWN = "the device has no such command that has not ended"
    OTHER_TRY = "the report is of another try"


_S, _E, _R = State, Event, Refusal
_OVER_ROW: Final[Mapping[Event, State | Refusal]] = dict.fromkeys(Event, _R.IS_OVER)

# fmt: off
TRANSITIONS: Final[Mapping[State, Mapping[Event, State | Refusal]]] = {
    _S.QUEUED: {
        _E.HAND_OVER: _S.QUEUED,
        _E.PUBLISH:   _S.SENT,
        _E.DELIVER:   _S.DELIVERED,
        _E.CONFIRM:   _S.SUCCESSFUL,
        _E.RETRY:     _R.NOT_SENT,
        _E.TIME_OUT:  _S.TIMEOUT,
        _E.EXPIRE:    _S.EXPIRED,
        _E.FAIL:      _S.FAILED,
        _E.CANCEL:    _S.CANCELLED,
    },
    _S.SENT: {
        _E.HAND_OVER: _R.ALREADY_SENT,
        _E.PUBLISH:   _R.ALREADY_SENT,
        _E.DELIVER:   _S.DELIVERED,
        _E.CONFIRM:   _S.SUCCESSFUL,
        _E.RETRY:     _S.QUEUED,
        _E.TIME_OUT:  _S.TIMEOUT,
        _E.EXPIRE:    _R.ALREADY_SENT,
        _E.FAIL:      _S.FAILED,
        _E.CANCEL:    _S.CANCELLED,
    },
    _S.DELIVERED: {
        _E.HAND_OVER: _R.ALREADY_DELIVERED,
        _E.PUBLISH:   _R.ALREADY_DELIVERED,
        _E.DELIVER:   _R.ALREADY_DELIVERED,
        _E.CONFIRM:   _S.SUCCESSFUL,
        _E.RETRY:     _S.QUEUED,
        _E.TIME_OUT:  _S.TIMEOUT,
        _E.EXPIRE:    _R.ALREADY_DELIVERED,
        _E.FAIL:      _S.FAILED,
        _E.CANCEL:    _S.CANCELLED,
    },
    _S.SUCCESSFUL: _OVER_ROW,
    _S.TIMEOUT:    _OVER_ROW,
    _S.EXPIRED:    _OVER_ROW,
    _S.FAILED:     _OVER_ROW,
    _S.CANCELLED:  _OVER_ROW,
}
# fmt: on

#: States that a command does not leave.
OVER: Final = frozenset({_S.SUCCESSFUL, _S.TIMEOUT, _S.EXPIRED, _S.FAILED, _S.CANCELLED})
#: Event of a command's first line, which no state precedes.
REQUESTED: Final = "request"
#: A queued command that was not handed over yet knows none of these.
_AFTER_SENDING: Final = frozenset({_E.PUBLISH, _E.DELIVER, _E.CONFIRM, _E.TIME_OUT})
#: While the downlink stage has it, it is the one to say what became of it.
_BEFORE_SENDING: Final = frozenset({_E.HAND_OVER, _E.CANCEL})


def step(state: State, event: Event, *, tries: int, handed_over: bool) -> State | Refusal:
    """The state after an event, or why it is refused.

    Args:
        state: as it stands.
        event: what happens.
        tries: how often it was handed over so far.
        handed_over: whether the downlink stage has it and has not said what became of it.
    """
    target = TRANSITIONS[state][event]
    if state is State.QUEUED:
        if not tries and event in _AFTER_SENDING:
            return Refusal.NOT_SENT
        if handed_over and event in _BEFORE_SENDING:
            return Refusal.HANDED_OVER
        if not handed_over and event is Event.PUBLISH:
            return Refusal.OTHER_TRY
    return target


# --- what confirms a command -----------------------------------------------------------------------------------------

#: The broker's acknowledgement; the network's or the device's; any uplink. Else an object: readings.
CONFIRM_WORDS: Final = ("published", "delivered", "uplink")
_CONFIRM_FIELDS: Final = frozenset({"component_type", "pin_position", "equals", "tolerance", "min", "max", "field"})

Confirm = str | Mapping[str, Any]


def check_confirm(confirm: Any) -> Confirm:
    """A confirmation as it may be asked for.

    One of `CONFIRM_WORDS`; or readings of one message: `{component_type, pin_position?}` with `equals` (and
    `tolerance`), with `min` and/or `max`, or with `field`, the name of a field of the command that the reading
    must equal; or `{expression, pin_position?}` over component types, true where all of them are in the message.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(confirm, str):
        if confirm not in CONFIRM_WORDS:
            _refuse(f"{confirm!r:.100} is not one of {', '.join(CONFIRM_WORDS)}, and no object")
        return confirm
    if not isinstance(confirm, Mapping):
        _refuse("neither a word nor an object")
    if "pin_position" in confirm and not isinstance(confirm["pin_position"], str):
        _refuse("pin_position is no text")
    if "expression" in confirm:
        if unknown := confirm.keys() - {"expression", "pin_position"}:
            _refuse(f"{sorted(unknown)[0]} does not go with expression")
        if not isinstance(confirm["expression"], str):
            _refuse("expression is no text")
        _compiled(confirm["expression"])
        return confirm
    if unknown := confirm.keys() - _CONFIRM_FIELDS:
        _refuse(f"there is no {sorted(unknown)[0]!r:.100}")
    if not isinstance(confirm.get("component_type"), str):
        _refuse("component_type is missing")
    ways = [("equals" in confirm), ("min" in confirm or "max" in confirm), ("field" in confirm)]
    if sum(ways) != 1:
        _refuse("give one of equals, min and max, field")
    for name in ("tolerance", "min", "max"):
        if name in confirm and not _is_number(confirm[name]):
            _refuse(f"{name} is no number")
    if "equals" in confirm and not (_is_number(confirm["equals"]) or isinstance(confirm["equals"], str | bool)):
        _refuse("equals is neither a number nor a text")
    if "field" in confirm and not isinstance(confirm["field"], str):
        _refuse("field is no text")
    return confirm


def resolve_confirm(confirm: Confirm, given: Mapping[str, Any]) -> Confirm:
    """The same confirmation with `field` replaced by the value that the command gives it.

    Raises:
        ValueError: the command does not have the field, or it is neither a number nor a text.
    """
    if isinstance(confirm, str) or "field" not in confirm:
        return confirm
    name = confirm["field"]
    if name not in given:
        _refuse(f"the confirmation wants the field {name!r:.100}")
    kept = {k: v for k, v in confirm.items() if k != "field"}
    return check_confirm({**kept, "equals": given[name]})


def is_confirmed(confirm: Confirm, readings: list[Mapping[str, Any]]) -> bool:
    """Whether a message with these validated readings confirms the command; failed and revised readings say nothing."""
    if isinstance(confirm, str):
        return confirm == "uplink"
    pin = confirm.get("pin_position")
    usable = [
        r
        for r in readings
        if r.get("quality", 0) < _QUALITY_UNUSABLE
        and not r.get("revised")
        and (pin is None or r["pin_position"] == pin)
    ]
    if "expression" in confirm:
        names, evaluate = _compiled(confirm["expression"])
        values: dict[str, Any] = {}
        for reading in usable:
            if reading.get("value") is not None:
                values.setdefault(reading["component_type"], reading["value"])
        if not all(name in values for name in names):
            return False
        try:
            return bool(evaluate(*(values[name] for name in names)))
        except ARITHMETIC_ERRORS:
            return False
    return any(r["component_type"] == confirm["component_type"] and _matches(confirm, r) for r in usable)


def _matches(confirm: Mapping[str, Any], reading: Mapping[str, Any]) -> bool:
    value = reading.get("value")
    if "equals" in confirm:
        wanted = confirm["equals"]
        if isinstance(wanted, str):
            return bool(reading.get("value_text") == wanted)
        return value is not None and abs(value - wanted) <= confirm.get("tolerance", 0)
    return value is not None and confirm.get("min", value) <= value <= confirm.get("max", value)


@lru_cache(maxsize=1_000)
def _compiled(text: str) -> tuple[tuple[str, ...], Callable[..., Any]]:
    """The component types that an expression names, and its function of them."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        message = f"{text!r:.100}: not an expression"
        raise ExpressionError(message) from None
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - FUNCTIONS.keys()
    names = tuple(sorted(found))
    if not names:
        message = f"{text!r:.100}: it names no component type"
        raise ExpressionError(message)
    return names, compile_expression(text, names)


# --- how a device takes commands -------------------------------------------------------------------------------------

#: Shape of a downlink -> topic where neither the device nor its type names one; plain MQTT's is a setting.
TOPICS: Final[Mapping[str, str]] = {
    "plain": "",
    "chirpstack": "application/{application}/device/{device}/command/down",
    "things_stack": "v3/{application}/devices/{device}/down/push",
    "http": "{device}",
}
#: MQTT quality of service, where it is not 1: The Things Stack's broker knows 0 only (its documentation, "MQTT Server").
QOS: Final[Mapping[str, int]] = {"things_stack": 0}
_PLACEHOLDER: Final = re.compile(r"\{(\w+)\}")

#: Where nothing is said: the broker's word is all that plain MQTT gives.
CONFIRM_DEFAULT: Final = "published"
EXPIRES_S_DEFAULT: Final = 86_400.0
TIMEOUT_S_DEFAULT: Final = 300.0


@dataclass(frozen=True, slots=True)
class Profile:
    """How a device takes commands: its own `downlink` section over that of its type."""

    problem: str = ""  #: why it can take none, for people
    format: str = "plain"
    topic: str = ""  #: MQTT topic, complete
    qos: int = 1  #: of MQTT; with 0 nobody says that the broker has taken it
    parser: str = ""  #: its type's, whose encoder makes the bytes
    variables: Mapping[str, Any] = field(default_factory=dict)
    sleeps: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)  #: what a command may say differently
    commands: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    known: bool = True  #: whether the registry has it; one that is not known (yet) keeps what waits


def compile_profile(device: DeviceDoc | None, device_type: DeviceTypeDoc | None, topic: str) -> Profile:
    """The profile of a device.

    Args:
        device: its document; None where it is not registered.
        device_type: its type's.
        topic: template of the MQTT topic of plain devices.
    """
    if device is None:
        return Profile("the device is not registered", known=False)
    if not device["enabled"]:
        return Profile("the device is switched off")
    if device_type is None:
        return Profile(f"there is no device type {device['type']!r}")
    common: dict[str, Any] = device_type.get("downlink") or {}
    own: dict[str, Any] = device.get("downlink") or {}
    given = {**common, **own}
    shape = given.pop("format", "plain")
    variables = device.get("variables") or {}
    known = {**variables, "device": device["device_id"]}
    template = given.pop("topic", None) or TOPICS.get(shape) or topic
    commands = {**common.get("commands", {}), **own.get("commands", {})}
    given.pop("commands", None)
    lorawan_class = given.pop("lorawan_class", None)
    sleeps = bool(given.pop("sleeps", lorawan_class == "A" or shape == "http"))
    missing = [name for name in _PLACEHOLDER.findall(template) if not isinstance(known.get(name), str | int)]
    full = _PLACEHOLDER.sub(lambda m: str(known.get(m[1])), template)
    problem = ""
    if missing:
        problem = f"its downlink topic {template!r} wants the variable {missing[0]!r}, which the device has not"
    elif shape != "http" and (not full or any(c in full for c in "+#\0")):
        # A wildcard or NUL cannot be in a topic that is published to (MQTT 3.1.1, 4.7.1).
        problem = f"{full!r:.200} is no topic to publish to"
    qos = given.pop("qos", QOS.get(shape, 1))
    return Profile(problem, shape, full, qos, device_type["parser"], variables, sleeps, given, commands)


# --- what the registry says ------------------------------------------------------------------------------------------

_DOWNLINK_FIELDS: Final = frozenset({"format", "topic", "qos", "sleeps", "lorawan_class", "commands"})
#: Commands that one rule asks for; more are a sequence, which a queue does better.
RULE_COMMANDS_MAX: Final = 20


def check_downlink(value: dict[str, Any]) -> dict[str, Any]:
    """The `downlink` section of a device type or a device: how it takes commands.

    `format` (plain, chirpstack, things_stack, http), `topic` with placeholders `{device}` and the device's variables, `qos`,
    `sleeps`, `lorawan_class` (A, which sleeps, B or C), what a command has where it says nothing (`PRESETS`), and
    `commands`: name -> presets and content.

    Raises:
        ValueError: the message names the field.
    """
    if unknown := value.keys() - _DOWNLINK_FIELDS - PRESETS:
        _refuse(f"there is no {sorted(unknown)[0]!r:.100}")
    if value.get("format", "plain") not in TOPICS:
        _refuse(f"format: not one of {', '.join(TOPICS)}")
    if not isinstance(value.get("topic", ""), str):
        _refuse("topic: no text")
    if type(value.get("qos", 1)) is not int or value.get("qos", 1) not in (0, 1):
        _refuse("qos: neither 0 nor 1")
    if not isinstance(value.get("sleeps", False), bool):
        _refuse("sleeps: neither true nor false")
    if value.get("lorawan_class", "A") not in ("A", "B", "C"):
        _refuse("lorawan_class: not one of A, B, C")
    check_settings({name: preset for name, preset in value.items() if name in PRESETS})
    commands = value.get("commands", {})
    if not isinstance(commands, dict):
        _refuse("commands: not an object")
    for name, preset in commands.items():
        if not isinstance(preset, dict):
            _refuse(f"commands.{name}: not an object")
        if unknown := preset.keys() - PRESETS - set(CONTENTS):
            _refuse(f"commands.{name}: there is no {sorted(unknown)[0]!r:.100}")
        try:
            check_settings(preset)
        except ValueError as e:
            _refuse(f"commands.{name}.{e}")
    return value


def check_rule_commands(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `commands` of a rule: each with `on` (raised, cleared), `command` or content, and further fields of a request.

    `device_id` names another device than the alarm's.

    Raises:
        ValueError: the message names the field.
    """
    if not isinstance(value, list) or not all(isinstance(asked, dict) for asked in value):
        _refuse("not a list of objects")
    if len(value) > RULE_COMMANDS_MAX:
        _refuse(f"a rule may ask for {RULE_COMMANDS_MAX} commands")
    for number, asked in enumerate(value):
        if asked.get("on") not in ("raised", "cleared"):
            _refuse(f"{number}.on: not one of raised, cleared")
        if unknown := asked.keys() - PRESETS - set(CONTENTS) - {"on", "command", "device_id"}:
            _refuse(f"{number}: there is no {sorted(unknown)[0]!r:.100}")
        rest = {name: given for name, given in asked.items() if name != "on"}
        _parse({"device_id": "-", **rest}, None, TIMESTAMP_MAX_US, "-")
    return value


# --- the lines of device_commands ------------------------------------------------------------------------------------


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
    _within(given, "expires_s", EXPIRES_S_MAX, least=0)
    _within(given, "timeout_s", TIMEOUT_S_MAX)
    _within(given, "tries", TRIES_MAX, least=1, whole=True)
    _within(given, "priority", PRIORITY_MAX, least=0, whole=True)
    _within(given, "port", PORT_MAX, least=1, whole=True)
    if not isinstance(given.get("confirmed", False), bool):
        _refuse("confirmed: neither true nor false")
    if "confirm" in given:
        try:
            check_confirm(given["confirm"])
        except ValueError as e:
            _refuse(f"confirm: {e}")
    if not isinstance(given.get("fields", {}), dict):
        _refuse("fields: not an object")
    if not isinstance(given.get("payload_b64", ""), str):
        _refuse("payload_b64: no text")
    if sum(name in given for name in CONTENTS) > 1:
        _refuse(f"give one of {', '.join(CONTENTS)}")


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
        return _parse(line, device_id, at, key)
    except ValueError as e:
        raise Reject(ReasonCode.COMMAND_INVALID, str(e)) from None


def _parse(line: Any, device_id: str | None, taken_at: int, key: str) -> Line:
    if not isinstance(line, dict):
        _refuse("a command is a JSON object")
    kind = line.get("kind", "request")
    device = _name(line, "device_id", device_id)
    actor = _name(line, "actor", "unknown")
    at = line.get("at", taken_at)
    if type(at) is not int or not TIMESTAMP_MIN_US <= at <= TIMESTAMP_MAX_US:
        _refuse(f"at: {at!r:.100} is no instant in µs")
    at = min(at, taken_at)  # a clock that is ahead must not lengthen a command's life
    if kind == "cancel":
        return Line(kind, device, at, actor, {"command_id": _name(line, "command_id")})
    if kind == "report":
        word = line.get("report")
        if word not in REPORTS:
            _refuse(f"report: {word!r:.100} is not one of {', '.join(REPORTS)}")
        reason = str(line.get("reason") or "").replace("\0", "")[:REASON_CHARS_MAX]
        return Line(kind, device, at, actor, {
            "downlink_id": _name(line, "downlink_id"), "report": word, "reason": reason,
        })  # fmt: skip
    if kind == "wake":
        return Line(kind, device, at, actor, {})
    if kind != "request":
        _refuse(f"there is no kind {kind!r:.100}")
    found: dict[str, Any] = {
        "command": _name(line, "command", "downlink" if any(name in line for name in CONTENTS) else None),
        "idempotency_key": _name(line, "idempotency_key", key),
    }
    if line.get("cause") is not None:
        found["cause"] = _name(line, "cause")
    for name in (*PRESETS, *CONTENTS):
        if line.get(name) is not None:
            found[name] = line[name]
    check_settings(found)
    return Line(kind, device, at, actor, found)


def _name(line: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = line.get(name)
    if value is None:
        value = default
    if not isinstance(value, str) or not 0 < len(value) <= NAME_CHARS_MAX or "\0" in value:
        _refuse(f"{name}: {value!r:.100} is no text of 1 to {NAME_CHARS_MAX} characters")
    return value


def _within(
    given: Mapping[str, Any], name: str, most: float, *, least: float | None = None, whole: bool = False
) -> None:
    if name not in given:
        return
    value = given[name]
    good = type(value) is int if whole else _is_number(value)
    if not good or value > most or (value < least if least is not None else value <= 0):
        _refuse(f"{name}: {value!r:.100} is not {'over 0' if least is None else f'{least:g}'} to {most:g}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


# --- the commands of one device --------------------------------------------------------------------------------------


def command_id(device_id: str, idempotency_key: str) -> str:
    """Id of a command."""
    return identity("command", device_id, idempotency_key)


def downlink_id(command: str, attempt: int) -> str:
    """Id of one try of a command; `attempt` counts from 1."""
    return identity("downlink", command, attempt)


class CommandEventDoc(TypedDict):
    """A line of `command_events`: one transition, and the command as it stands after it. Instants in µs."""

    event_id: str
    command_id: str
    sequence: int  #: 1 for the request, then one more each
    device_id: str
    event: str
    state: str  #: after the event
    at: int  #: of the event
    reason: str  #: for people; "" where the event says it all
    actor: str  #: who did this; "" where nobody did
    command: str
    requested_at: int
    requested_by: str
    idempotency_key: str
    cause: str | None  #: id of the alarm transition that asked for it
    priority: int
    expires_at: int
    attempt: int  #: tries so far
    ended_at: int | None
    content: dict[str, Any]  #: what was asked for: fields, payload or payload_b64; port
    confirm: Any


class DownlinkDoc(TypedDict):
    """A line of `device_downlinks`: one try of a command."""

    downlink_id: str
    command_id: str
    device_id: str
    attempt: int
    expires_at: int  #: µs; after it, it is not sent any more
    format: str
    topic: str  #: of MQTT
    qos: int
    parser: str  #: name; its encoder makes the bytes of `fields`
    variables: dict[str, Any]  #: the device's, for the encoder
    content: dict[str, Any]
    confirmed: bool


@dataclass(slots=True)
class Command:
    """A command that has not ended."""

    id: str
    name: str
    key: str
    actor: str
    requested_at: int
    expires_at: int
    content: dict[str, Any]
    confirm: Any
    timeout_us: int
    tries: int
    priority: int
    confirmed: bool
    cause: str | None = None
    state: State = State.QUEUED
    sequence: int = 0
    attempt: int = 0  #: tries so far
    handed_over: bool = False  #: the downlink stage has it
    first_at: int = 0  #: when it was handed over first; an uplink from before confirms nothing
    since: int = 0  #: when it was handed over, or sent, or delivered last

    @property
    def waits(self) -> bool:
        """Whether it waits for its turn or for the device."""
        return self.state is State.QUEUED and not self.handed_over


@dataclass(frozen=True, slots=True)
class Turn:
    """When something is done, and what may follow from it at once."""

    now_us: int
    may_send: bool = True  #: commands may be handed over; else it is due at the next tick
    may_time_out: bool = True  #: False while confirmations may wait unread in Kafka
    #: When what is done now may have been done before, by a worker that died before it wrote that down; None: now
    since_us: int | None = None


@dataclass(slots=True)
class Outcome:
    """What a line, an uplink or the time caused."""

    duplicate: bool = False  #: applied before; nothing was done
    changed: bool = False  #: the state document differs
    events: list[CommandEventDoc] = field(default_factory=list)
    downlinks: list[DownlinkDoc] = field(default_factory=list)
    refusal: Refusal | None = None  #: of a cancel or a report
    repeated: State | None = None  #: of a request whose key is known: where that command stands


# {"v": 1, "m": marks, "q": [open commands in the order of arrival], "r": {id of an ended one: [state, until]}}


class DeviceCommands:
    """The commands of one device: takes lines, uplinks and the time in order, and gives what they cause.

    Made of the state document, which `document` gives back; how the input is cut into batches makes no difference.
    Not to be shared between tasks.
    """

    def __init__(self, device_id: str, document: Mapping[str, Any] | None = None) -> None:
        self._device_id = device_id
        document = document or {}
        self._marks: dict[str, list[int]] = dict(document.get("m", {}))
        self._open = [_unpack(row) for row in document.get("q", ())]
        self._ended: dict[str, list[Any]] = dict(document.get("r", {}))

    def document(self) -> dict[str, Any] | None:
        """The state as JSON-able data; None where there is nothing to be kept."""
        if not self._open and not self._ended:
            return None
        return {
            "v": STATE_VERSION,
            "m": self._marks,
            "q": [_pack(command) for command in self._open],
            "r": self._ended,
        }

    @property
    def open(self) -> tuple[Command, ...]:
        """Commands that have not ended, in the order of their arrival."""
        return tuple(self._open)

    def due_us(self, profile: Profile) -> int | None:
        """When `tick` has something to do; None where it never has. 0: now."""
        if not self._open:
            # Only what is remembered: forgotten all at once, so that a quiet device costs one more look.
            return max((until for _, until in self._ended.values()), default=None)
        times = [command.expires_at for command in self._open if command.waits]
        under_way = self._under_way()
        if under_way is not None and under_way.handed_over:
            times.append(_lost_at(under_way))
        elif under_way is not None and not under_way.waits:
            times.append(under_way.since + under_way.timeout_us)
        elif not profile.sleeps:
            times.append(0)
        return min(times)

    def request(self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int) -> Outcome:
        """Take a request. One that cannot be carried out becomes a command that has failed, with the reason.

        Args:
            line: of kind request.
            profile: of the device.
            turn: when, and what may be done.
            source: which partition it came from, for the watermark.
            offset: offset in it.
            index: line within the record.
        """
        outcome = self._begin(source, offset, index)
        if outcome.duplicate:
            return outcome
        identifier = command_id(self._device_id, line.fields["idempotency_key"])
        known = self._ended.get(identifier)
        waiting = next((command for command in self._open if command.id == identifier), None)
        if known is not None or waiting is not None:
            outcome.repeated = State(known[0]) if known is not None else waiting.state if waiting else None
            return outcome
        command, problem = _made(identifier, line, profile)
        if not problem and len(self._open) >= OPEN_MAX:
            problem = f"the device has {OPEN_MAX} commands that have not ended"
        self._open.append(command)
        command.sequence = 1
        outcome.events.append(self._line(command, REQUESTED, line.at, actor=line.actor))
        if problem:
            self._apply(command, Event.FAIL, turn.now_us, outcome, reason=problem)
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    def cancel(self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int) -> Outcome:
        """Take a cancel, as `request`; an outcome whose `refusal` says why nothing changed, where that is so."""
        outcome = self._begin(source, offset, index)
        if outcome.duplicate:
            return outcome
        wanted = line.fields["command_id"]
        command = next((command for command in self._open if command.id == wanted), None)
        if command is None:
            outcome.refusal = Refusal.IS_OVER if wanted in self._ended else Refusal.UNKNOWN
            return outcome
        self._apply(command, Event.CANCEL, line.at, outcome, actor=line.actor)
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    def report(self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int) -> Outcome:
        """Take a report of the downlink stage or of a network server, as `cancel`."""
        outcome = self._begin(source, offset, index)
        if outcome.duplicate:
            return outcome
        command = self._under_way()
        attempt = 0
        if command is not None:
            attempts = range(command.attempt, 0, -1)
            attempt = next((n for n in attempts if downlink_id(command.id, n) == line.fields["downlink_id"]), 0)
        if command is None or not attempt:
            outcome.refusal = Refusal.UNKNOWN
            return outcome
        self._reported(command, attempt, line, outcome)
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    def wake(
        self, line: Line, profile: Profile, turn: Turn, source: str, offset: int, index: int, *, awake_us: int
    ) -> Outcome:
        """The device asks what waits for it: it is awake for `awake_us`, as after an uplink. Otherwise as `cancel`."""
        outcome = self._begin(source, offset, index)
        if not outcome.duplicate:
            self._advance(profile, turn, outcome, awake=turn.now_us - line.at <= awake_us)
        return outcome

    def _reported(self, command: Command, attempt: int, line: Line, outcome: Outcome) -> None:
        word, reason = line.fields["report"], line.fields["reason"]
        if word in ("sent", "expired") and attempt != command.attempt:
            outcome.refusal = Refusal.OTHER_TRY
            return
        match word:
            case "sent":
                if self._apply(command, Event.PUBLISH, line.at, outcome) and command.confirm == "published":
                    self._apply(command, Event.CONFIRM, line.at, outcome)
            case "expired":
                event = Event.EXPIRE if attempt == 1 else Event.TIME_OUT
                self._apply(command, event, line.at, outcome, reason=reason)
            case "failed":
                self._apply(command, Event.FAIL, line.at, outcome, reason=reason)
            case "transmitted" | "acknowledged":
                self._apply(command, Event.DELIVER, line.at, outcome)
                if command.confirm == "delivered" and (word == "acknowledged" or not command.confirmed):
                    outcome.refusal = None  # delivered already by the gateway's word
                    self._apply(command, Event.CONFIRM, line.at, outcome)
            case "not_acknowledged":
                if attempt != command.attempt:
                    outcome.refusal = Refusal.OTHER_TRY
                elif command.attempt < command.tries and line.at < command.expires_at and not command.waits:
                    self._apply(command, Event.RETRY, line.at, outcome, reason=reason)
                else:
                    self._apply(command, Event.FAIL, line.at, outcome, reason=reason)

    def uplink(self, message: Mapping[str, Any], profile: Profile, turn: Turn, *, awake_us: int) -> Outcome:
        """Take a validated message of the device: it may confirm what is under way, and says that the device is awake.

        A message confirms only what was handed over before it was received. A device that sleeps is awake for
        `awake_us` after a message was received; one that comes later, out of a backlog, wakes nothing.
        """
        if not self._open or message["generation"] != GENERATION_LIVE:
            return Outcome()
        source = str(message["raw_partition"])
        outcome = self._begin(f"u{source}", message["raw_offset"], message["raw_index"])
        if outcome.duplicate:
            return outcome
        command, received_at = self._under_way(), message["received_at"]
        if (
            command is not None
            and received_at > command.first_at
            and is_confirmed(command.confirm, message["readings"])
        ):
            self._apply(command, Event.CONFIRM, received_at, outcome)
        self._advance(profile, turn, outcome, awake=turn.now_us - received_at <= awake_us)
        return outcome

    def tick(self, profile: Profile, turn: Turn) -> Outcome:
        """Let time do its work: expiry, time-outs and tries, forgetting what has ended."""
        outcome = Outcome()
        self._advance(profile, turn, outcome, awake=False)
        return outcome

    # --- what follows from everything ---

    def _advance(self, profile: Profile, turn: Turn, outcome: Outcome, *, awake: bool) -> None:
        now_us = turn.now_us
        for command in [c for c in self._open if c.waits and c.expires_at <= now_us]:
            self._apply(command, Event.TIME_OUT if command.attempt else Event.EXPIRE, now_us, outcome)
        if turn.may_time_out:
            self._time_out(now_us, outcome)
        while turn.may_send and profile.known and (awake or not profile.sleeps):
            following = self._next()
            if following is None:
                break
            if profile.problem:
                self._apply(following, Event.FAIL, now_us, outcome, reason=profile.problem)
            else:
                self._hand_over(following, profile, turn, outcome)
        self._forget(now_us, outcome)

    def _time_out(self, now_us: int, outcome: Outcome) -> None:
        command = self._under_way()
        if command is None or command.waits:
            return
        if command.handed_over:
            if now_us >= _lost_at(command):
                self._apply(command, Event.FAIL, now_us, outcome, reason="no report of the downlink came")
        elif now_us >= command.since + command.timeout_us:
            again = command.attempt < command.tries and now_us < command.expires_at
            self._apply(command, Event.RETRY if again else Event.TIME_OUT, now_us, outcome)

    def _hand_over(self, command: Command, profile: Profile, turn: Turn, outcome: Outcome) -> None:
        now_us = turn.now_us
        command.attempt += 1
        # Of a hand-over that is repeated, the answer may have come already.
        since_us = now_us if turn.since_us is None else max(turn.since_us, command.requested_at)
        command.first_at = command.first_at or min(now_us, since_us)
        self._apply(command, Event.HAND_OVER, now_us, outcome)
        outcome.downlinks.append(
            {
                "downlink_id": downlink_id(command.id, command.attempt),
                "command_id": command.id,
                "device_id": self._device_id,
                "attempt": command.attempt,
                "expires_at": command.expires_at,
                "format": profile.format,
                "topic": profile.topic,
                "qos": profile.qos,
                "parser": profile.parser,
                "variables": dict(profile.variables),
                "content": command.content,
                "confirmed": command.confirmed,
            }
        )

    def _under_way(self) -> Command | None:
        """The one command that was handed over at least once."""
        return next((command for command in self._open if command.attempt), None)

    def _next(self) -> Command | None:
        """Whose turn it is: a further try first, then by priority and arrival; None where one is under way."""
        under_way = self._under_way()
        if under_way is not None:
            return under_way if under_way.waits else None
        return max(self._open, key=lambda command: command.priority, default=None)

    def _apply(
        self, command: Command, event: Event, at: int, outcome: Outcome, *, reason: str = "", actor: str = ""
    ) -> bool:
        target = step(command.state, event, tries=command.attempt, handed_over=command.handed_over)
        if isinstance(target, Refusal):
            outcome.refusal = target
            return False
        outcome.changed = True
        command.state = target
        command.sequence += 1
        command.handed_over = event is Event.HAND_OVER
        command.since = at
        outcome.events.append(self._line(command, event, at, reason=reason, actor=actor))
        if target in OVER:
            self._open.remove(command)
            self._ended.pop(command.id, None)
            self._ended[command.id] = [target, max(at + MEMORY_S * _S_US, command.expires_at)]
        return True

    def _forget(self, now_us: int, outcome: Outcome) -> None:
        over = [identifier for identifier, (_, until) in self._ended.items() if until <= now_us]
        over += list(self._ended)[: max(0, len(self._ended) - MEMORY_MAX)]
        for identifier in over:
            outcome.changed |= self._ended.pop(identifier, None) is not None

    def _begin(self, source: str, offset: int, index: int) -> Outcome:
        if is_applied(self._marks, source, offset, index):
            return Outcome(duplicate=True)
        applied(self._marks, source, offset, index)
        return Outcome(changed=True)

    def _line(self, command: Command, event: str, at: int, *, reason: str = "", actor: str = "") -> CommandEventDoc:
        return {
            "event_id": identity("command event", command.id, command.sequence),
            "command_id": command.id,
            "sequence": command.sequence,
            "device_id": self._device_id,
            "event": str(event),
            "state": str(command.state),
            "at": at,
            "reason": reason,
            "actor": actor,
            "command": command.name,
            "requested_at": command.requested_at,
            "requested_by": command.actor,
            "idempotency_key": command.key,
            "cause": command.cause,
            "priority": command.priority,
            "expires_at": command.expires_at,
            "attempt": command.attempt,
            "ended_at": at if command.state in OVER else None,
            "content": command.content,
            "confirm": command.confirm,
        }


def _lost_at(command: Command) -> int:
    return max(command.since, command.expires_at) + LOST_AFTER_S * _S_US


def _made(identifier: str, line: Line, profile: Profile) -> tuple[Command, str]:
    """The command that a request asks for, and why it cannot be, or ""."""
    asked = line.fields
    preset = profile.commands.get(asked["command"], {})
    merged = {**profile.given, **preset, **{k: v for k, v in asked.items() if k in PRESETS}}
    content, problem = _content(asked, preset)
    if not problem and asked["command"] not in profile.commands and not content:
        problem = f"there is no command {asked['command']!r:.100} of the device's type, and no content is given"
    content = content or {"fields": {}}
    confirm: Confirm = CONFIRM_DEFAULT
    try:
        check_settings({k: v for k, v in merged.items() if k in PRESETS})
        confirm = resolve_confirm(merged.get("confirm", CONFIRM_DEFAULT), content.get("fields", {}))
    except ValueError as e:
        problem = problem or str(e)
        merged = {k: v for k, v in merged.items() if k not in PRESETS}
    if "port" in merged:
        content["port"] = merged["port"]
    command = Command(
        id=identifier,
        name=asked["command"],
        key=asked["idempotency_key"],
        actor=line.actor,
        requested_at=line.at,
        expires_at=line.at + round(merged.get("expires_s", EXPIRES_S_DEFAULT) * 1e6),
        content=content,
        confirm=confirm,
        timeout_us=round(merged.get("timeout_s", TIMEOUT_S_DEFAULT) * 1e6),
        tries=merged.get("tries", 1),
        priority=merged.get("priority", 0),
        confirmed=merged.get("confirmed", False),
        cause=asked.get("cause"),
    )
    return command, profile.problem or problem


def _content(asked: Mapping[str, Any], preset: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What is to be sent: the request's own, else the command's, fields merged; and what is wrong with it."""
    own = {name: asked[name] for name in CONTENTS if name in asked}
    common = {name: preset[name] for name in CONTENTS if name in preset}
    if not own:
        return common, ""
    if "fields" in own and "fields" in common:
        return {"fields": {**common["fields"], **own["fields"]}}, ""
    if common and own.keys() != common.keys():
        return own, f"the command {asked['command']!r:.100} takes {', '.join(common)}"
    return own, ""


_DEFAULTS: Final = {f.name: f.default for f in fields(Command)}


def _pack(command: Command) -> dict[str, Any]:
    """Without what is as it was at first: most commands wait."""
    row = {name: getattr(command, name) for name in _DEFAULTS}
    return {name: value for name, value in row.items() if value != _DEFAULTS[name]}


def _unpack(row: Mapping[str, Any]) -> Command:
    command = Command(**row)
    return replace(command, state=State(command.state), content=dict(command.content))


# --- alarms that ask for commands ------------------------------------------------------------------------------------


def alarm_requests(transition: Mapping[str, Any], commands: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Lines of `device_commands` for an alarm's transition, by its rule's `commands`.

    The idempotency key is made of the transition, and `at` is the transition's own instant: what is read again is
    the same command, and what is read again long after is expired. Only live transitions ask for anything.
    """
    if transition["generation"] != GENERATION_LIVE:
        return []
    lines: list[dict[str, Any]] = []
    for number, asked in enumerate(commands):
        if asked["on"] != transition["transition"]:
            continue
        lines.append(
            {
                "kind": "request",
                "device_id": asked.get("device_id") or transition["device_id"],
                "at": transition["detected_at"],
                "actor": f"alarm {transition['rule']}"[:NAME_CHARS_MAX],
                "cause": transition["transition_id"],
                "idempotency_key": f"{transition['transition_id']}/{number}",
                **{k: v for k, v in asked.items() if k not in ("on", "device_id")},
            }
        )
    return lines


# --- the picture -----------------------------------------------------------------------------------------------------


def diagram() -> str:
    """The transition table as a Mermaid state diagram."""
    over = [state for state in State if state in OVER]
    return state_pictures.diagram(TRANSITIONS, f"{State.QUEUED}: {REQUESTED}", over=over)


def documentation() -> str:
    """docs/command_states.md."""
    introduction = [
        "Generated from `preservarium/domain/commands.py` by `python -m preservarium.domain.commands`; a test keeps both",
        "equal. Three guards on `queued`: a command that was never handed over knows no "
        + ", ".join(f"`{e}`" for e in Event if e in _AFTER_SENDING)
        + " (not_sent);",
        "one that the downlink stage has takes no "
        + ", ".join(f"`{e}`" for e in Event if e in _BEFORE_SENDING)
        + " (handed_over);",
        "`publish` is of a try that it has (other_try).",
    ]
    return state_pictures.page("Command states", introduction, diagram(), TRANSITIONS, Refusal)


if __name__ == "__main__":
    print(documentation(), end="")
