"""What the events of a stream add up to: a document for each kind of stream, as of any of its events.

The kind is what stands before the first slash of a stream's name. Documents of the registry are what people wrote; of the
other kinds the state is what is worth knowing at a glance. A kind that is not named here is folded as a document where its events are those
of one, else as a count with the last event.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from preservarium.domain.registry import changes

State = dict[str, Any]
#: (type, data), in the order of the stream.
Facts = Iterable[tuple[str, Mapping[str, Any]]]
Fold = Callable[[State | None, Facts], State | None]

_DOCUMENT_EVENTS: Final = frozenset({changes.CREATED, changes.CHANGED, changes.REMOVED})


def kind_of(stream_id: str) -> str:
    """What stands before the first slash; the whole name where there is none."""
    return stream_id.partition("/")[0]


def fold(stream_id: str, state: State | None, facts: Facts) -> State | None:
    """The state of a stream after events that follow `state`; None: there is nothing (any more).

    Raises:
        ValueError, KeyError, TypeError: the events do not fit together.
    """
    return _FOLDS.get(kind_of(stream_id), _anything)(state, facts)


def _actions(state: State | None, facts: Facts) -> State | None:
    """What operators did to the alarms of a device: how often, and the last that was done to each rule and pin."""
    for kind, data in facts:
        state = state or {"done": 0, "refused": 0, "last": {}}
        count = "done" if kind == "action_done" else "refused"
        last = state["last"]
        if count == "done":
            last = {**last, f"{data['rule']}/{data['pin_position']}": dict(data)}
        state = {**state, count: state[count] + 1, "last": last}
    return state


def _command(state: State | None, facts: Facts) -> State | None:
    """A command as its event with the highest sequence says; one that comes late tells of the past."""
    for _, data in facts:
        if state is None or data["sequence"] > state["sequence"]:
            state = dict(data)
    return state


def _replays(state: State | None, facts: Facts) -> State | None:
    """The generations that were opened, by number; `sent`: what was sent of one, None while it is not whole."""
    for kind, data in facts:
        state = dict(state or {})
        number = str(data["generation"])
        if kind == "opened":
            state[number] = {**data, "sent": None}
        elif kind == "sent" and number in state:
            state[number] = {**state[number], "sent": {k: v for k, v in data.items() if k != "generation"}}
    return state


def _anything(state: State | None, facts: Facts) -> State | None:
    for kind, data in facts:
        counted = state is not None and set(state) == {"events", "last"}
        if kind in _DOCUMENT_EVENTS and not counted:
            state = changes.fold(state, [(kind, data)])
        else:
            before = state["events"] if state is not None and counted else 0
            state = {"events": before + 1, "last": {"type": kind, "data": dict(data)}}
    return state


_FOLDS: Final[Mapping[str, Fold]] = {
    **dict.fromkeys(
        ("manufacturer", "datatype", "parser", "recipient", "rule", "type", "experiment", "device", "canary"),
        changes.fold,
    ),
    "alarm": _actions,
    "command": _command,
    "replay": _replays,
}
