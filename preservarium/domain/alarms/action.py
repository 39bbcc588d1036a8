"""What operators do to alarms: the lines of `alarm_actions`, which anyone may write, and of `alarm_answers`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NotRequired, TypedDict

from preservarium.domain.alarms.machine import Event
from preservarium.domain.readings.reading import PIN_POSITION_NONE, TIMESTAMP_MAX_US, TIMESTAMP_MIN_US
from preservarium.errors import ReasonCode, Reject

#: A shelved alarm comes back by itself. A week spans a planned outage; whoever needs longer takes it out of service.
SHELVE_S_MAX: Final = 7 * 86_400

#: Where the operator names no time.
SHELVE_S_DEFAULT: Final = 3_600

#: A comment is a note, not a report.
COMMENT_CHARS_MAX: Final = 2_000

#: Names in an action; the registry's own names are far shorter.
NAME_CHARS_MAX: Final = 255

#: An action's id is a UUID or what else its sender makes unique.
ACTION_ID_CHARS_MAX: Final = 64

#: Word of an action -> event.
ACTIONS: Final[Mapping[str, Event]] = {
    "acknowledge": Event.ACKNOWLEDGE,
    "clear": Event.CLEAR,
    "comment": Event.COMMENT,
    "shelve": Event.SHELVE,
    "unshelve": Event.UNSHELVE,
    "suppress": Event.SUPPRESS,
    "unsuppress": Event.UNSUPPRESS,
    "out_of_service": Event.REMOVE,
    "return_to_service": Event.RESTORE,
}


class ActionDoc(TypedDict):
    """A line of `alarm_actions`, keyed by device."""

    action_id: NotRequired[str]  #: the same again is one action
    device_id: str
    rule: str
    pin_position: NotRequired[str]  #: absent: "-1"
    action: str  #: a word of `ACTIONS`
    actor: str  #: who
    at: int  #: when, µs since the epoch, UTC
    comment: NotRequired[str]
    duration_s: NotRequired[float]  #: shelve; absent: an hour
    one_shot: NotRequired[bool]  #: shelve: also ends when the condition returns to normal
    alarm_id: NotRequired[str]  #: the occurrence that the operator saw; another one is not touched


#: Two machines' clocks differ by less as a rule; a shelf of an operator whose clock is further ahead counts from now.
CLOCKS_DIFFER_US: Final = 60_000_000


@dataclass(frozen=True, slots=True)
class Action:
    """A checked action."""

    device_id: str
    rule: str
    pin_position: str
    event: Event
    actor: str
    at: int  #: µs
    comment: str = ""
    until: int | None = None  #: µs
    one_shot: bool = False
    alarm_id: str | None = None
    action_id: str = ""

    def by(self, now_us: int) -> "Action":
        """The action where a shelf ends no later than its duration from now, whatever the clock says of who shelves."""
        ahead_us = self.at - now_us
        if self.until is None or ahead_us <= CLOCKS_DIFFER_US:
            return self
        return replace(self, until=self.until - ahead_us)


def parse_action(line: Mapping[str, Any], device_id: str | None = None) -> Action:
    """Check a line of `alarm_actions`, which anyone may have written.

    Args:
        line: the parsed line.
        device_id: what the record's key says, where the line names no device.

    Raises:
        Reject: `action_invalid`; the message names the field.
    """
    word = line.get("action")
    event = ACTIONS.get(word) if isinstance(word, str) else None
    if event is None:
        raise Reject(ReasonCode.ACTION_INVALID, f"there is no action {word!r:.100}")
    at = line.get("at")
    if type(at) is not int or not TIMESTAMP_MIN_US <= at <= TIMESTAMP_MAX_US:
        raise Reject(ReasonCode.ACTION_INVALID, f"at: {at!r:.100} is no instant in µs")
    until = None
    if event is Event.SHELVE:
        duration_s = line.get("duration_s", SHELVE_S_DEFAULT)
        # `not (a < b)` also refuses NaN.
        if type(duration_s) not in (int, float) or not 0 < duration_s <= SHELVE_S_MAX:
            text = f"duration_s: {duration_s!r:.100} is not over 0 and at most {SHELVE_S_MAX}"
            raise Reject(ReasonCode.ACTION_INVALID, text)
        until = at + round(duration_s * 1e6)
    one_shot = line.get("one_shot", False)
    if not isinstance(one_shot, bool):
        raise Reject(ReasonCode.ACTION_INVALID, f"one_shot: {one_shot!r:.100} is no boolean")
    occurrence, action_id = line.get("alarm_id"), line.get("action_id")
    return Action(
        device_id=_name(line, "device_id", device_id),
        rule=_name(line, "rule"),
        pin_position=_name(line, "pin_position", PIN_POSITION_NONE),
        event=event,
        actor=_name(line, "actor"),
        at=at,
        comment=_name(line, "comment", "", COMMENT_CHARS_MAX, empty=event is not Event.COMMENT),
        until=until,
        one_shot=one_shot,
        alarm_id=None if occurrence is None else _name(line, "alarm_id"),
        action_id="" if action_id is None else _name(line, "action_id", chars_max=ACTION_ID_CHARS_MAX),
    )


def _name(
    line: Mapping[str, Any],
    key: str,
    default: str | None = None,
    chars_max: int = NAME_CHARS_MAX,
    *,
    empty: bool = False,
) -> str:
    value = line.get(key)
    if value is None:
        value = default
    if not isinstance(value, str) or len(value) > chars_max or "\0" in value or not (value or empty):
        raise Reject(ReasonCode.ACTION_INVALID, f"{key}: {value!r:.100} is no text of at most {chars_max} characters")
    return value


class AnswerDoc(TypedDict):
    """A line of `alarm_answers`: what became of an operator's action. Instants are µs since the epoch, UTC."""

    action_id: str
    device_id: str
    rule: str
    pin_position: str
    alarm_id: str  #: the occurrence that it was done to; "" where there was none
    action: str
    actor: str
    comment: str
    at: int  #: when, as the operator said
    until: int | None  #: shelved until
    one_shot: bool
    outcome: str  #: done or refused
    code: str  #: why refused, e.g. already_acknowledged; "" where done
    reason: str  #: the same for people
    state: str  #: of the alarm after it; "" where it is unknown
    transitions: list[str]  #: ids of the transitions that it caused
    answered_at: int
