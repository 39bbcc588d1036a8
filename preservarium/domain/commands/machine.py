"""The life of a command: its state machine.

The machine is the literal table `TRANSITIONS`, every state × every event, and `step`; docs/reference/command_states.md is generated from it
(`python -m preservarium.domain.commands.machine`) and a test holds both equal.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from preservarium.domain.state_pictures import StatePage


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


#: docs/reference/command_states.md.
PAGE: Final = StatePage(
    title="Command states",
    module="preservarium.domain.commands.machine",
    introduction=(
        "Three guards on `queued`: a command that was never handed over knows no "
        + ", ".join(f"`{e}`" for e in Event if e in _AFTER_SENDING)
        + " (not_sent);",
        "one that the downlink stage has takes no "
        + ", ".join(f"`{e}`" for e in Event if e in _BEFORE_SENDING)
        + " (handed_over);",
        "`publish` is of a try that it has (other_try).",
    ),
    machine=TRANSITIONS,
    refusals=Refusal,
    begin=f"{State.QUEUED}: {REQUESTED}",
    over=tuple(state for state in State if state in OVER),
)

if __name__ == "__main__":
    print(PAGE.text(), end="")
