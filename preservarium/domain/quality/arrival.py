"""How messages of one device arrive: those that came before are told, and those out of order are put into order.

Four things happen to a message before its readings are judged (domain/quality/tests.py):

- **Its raw coordinates** say whether it was applied before: a re-run after a crash, which is left out.
- **Its content** says whether the device, or a network on the way, sent it twice: same instant of the device's own clock, same
  readings, decoded alike, under other raw coordinates. Its readings are put aside as `repeated`: they are in the topic, but count
  nowhere, not in tests, windows, anomalies or alarms, and no store is asked about them. So many of a device's messages are
  remembered as the settings say. A redrive (`attempt`) is judged anew.
- **Its instant** is its own: see domain/quality/instants.py.
- **Its time** says where it belongs. With an allowed lateness, a message is held back until the device's watermark (the
  latest instant that it sent, less the lateness) has passed its timestamp, and what is due is released in event-time order.
  So everything behind this point sees the same order, however the messages of that span were shuffled on their way. A message that comes
  later than that is released at once, behind younger ones. Without an allowed lateness nothing is held.

What is released has new coordinates, `released`: offset and place in the record of `iot_standardized_data` that released it. Raw
coordinates only grow in the order of arrival; these grow in the order of release, so the stages behind can tell a re-run by
them (`lineage.take`). They are the same again after a crash because only records release: where a device falls silent, a
timer writes a record into its partition that says so (`silent`), and the log decides what came first.

Nothing here waits or reads a clock. Functions change the state documents that they are given, in place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

import orjson

from preservarium.domain.quality.instants import give_instant
from preservarium.domain.readings.lineage import advance, generation_state

#: A remembered message: "," + 13 hexadecimal digits of its µs + 8 of its content. Both must be equal, so a mistake needs two
#: messages of one device at one µs whose contents have the same CRC-32.
_TOKEN_CHARS: Final = 22


@dataclass(slots=True)
class Arrival:
    """What became of one message."""

    duplicate: bool = False  #: its raw coordinates were applied before; nothing else was done
    repeated: bool = False  #: its content came before
    due: Sequence[dict[str, Any]] = ()  #: messages to be judged now, in this order


@dataclass(frozen=True, slots=True)
class Order:
    """How a device's messages are put into order."""

    lateness_us: int = 0  #: 0: nothing is held back
    held_max: int = 500  #: messages of one device held at once; beyond it the oldest are released early
    repeats_max: int = 0  #: messages of one device whose content is remembered
    own_instants: bool = (
        False  #: each message gets an instant of its own, also by the device's clock (`same_instant: both`)
    )


#: Nothing is held back or remembered.
IN_ORDER_OF_ARRIVAL: Final = Order()


def arrive(
    message: dict[str, Any], generation: dict[str, Any], order: Order, at: tuple[int, int], *, own_time: bool
) -> Arrival:
    """Take one message in.

    Args:
        message: a standardized message; of one device they come in the order of their partition.
        generation: the device's state in the message's generation; changed in place unless the message is a duplicate.
        order: the settings.
        at: offset of the record that brought it, and how many messages that record has released before.
        own_time: whether its timestamp can be used: only then it moves the watermark, and is remembered where the
            device itself gave it.
    """
    marks = generation["m"]
    if not advance(marks, str(message["raw_partition"]), message["raw_offset"], message["raw_index"]):
        return Arrival(duplicate=True)
    clock = message.get("clock")
    repeated = False
    if own_time and order.repeats_max and clock == "device":
        token = _token(message)
        remembered = generation.get("r", "")
        if token in remembered:
            repeated = True
            message["repeated"], message["readings"] = message["readings"], []
        else:
            generation["r"] = (remembered + token)[-_TOKEN_CHARS * order.repeats_max :]
    if not repeated and (order.own_instants or clock == "received"):
        give_instant(message, generation)
    if not order.lateness_us and "h" not in generation:
        return Arrival(False, repeated, (message,))
    if repeated or not own_time:
        # It has no place in the order; released with what is due, so that positions only grow.
        due = [*_due(generation, order), message]
    else:
        generation["w"] = max(generation.get("w", message["timestamp"]), message["timestamp"])
        generation.setdefault("h", []).append([at[0], message])
        due = _due(generation, order)
    _stamp(due, at)
    return Arrival(False, repeated, due)


def _due(generation: dict[str, Any], order: Order) -> list[dict[str, Any]]:
    """Take out what is due: what the watermark has passed, and the oldest of too many."""
    held: list[list[Any]] = generation.get("h", [])
    until = generation.get("w", 0) - order.lateness_us
    waiting = [entry for entry in held if entry[1]["timestamp"] > until]
    if len(waiting) > order.held_max:
        waiting.sort(key=_event_order)
        waiting = waiting[len(waiting) - order.held_max :]
    kept = {id(entry) for entry in waiting}
    return _release(generation, [entry for entry in held if id(entry) not in kept], waiting)


def silent(generation: dict[str, Any], below: int, at: tuple[int, int]) -> list[dict[str, Any]]:
    """The device is silent: release what was held when that was found, in event-time order.

    Args:
        generation: the device's state in one generation; changed in place.
        below: offset of the last record held then: what came after it goes on waiting.
        at: offset of the record that says so, and how many messages it has released before.
    """
    held: list[list[Any]] = generation.get("h", [])
    due = [entry for entry in held if entry[0] <= below]
    released = _release(generation, due, [entry for entry in held if entry[0] > below])
    _stamp(released, at)
    return released


def _release(generation: dict[str, Any], due: list[list[Any]], waiting: list[list[Any]]) -> list[dict[str, Any]]:
    if waiting:
        generation["h"] = waiting
    else:
        generation.pop("h", None)
    return [entry[1] for entry in sorted(due, key=_event_order)]


def _stamp(messages: list[dict[str, Any]], at: tuple[int, int]) -> None:
    for place, message in enumerate(messages, at[1]):
        message["released"] = [at[0], place]


def held_below(state: Mapping[str, Any]) -> int | None:
    """Offset of the last record that a device's state holds back; None: it holds none."""
    below: int | None = None
    for generation in state["g"].values():
        if "h" in generation:
            last = max(entry[0] for entry in generation["h"])
            below = last if below is None or last > below else below
    return below


def generation_of(message: Mapping[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """The device's state in the message's generation, opened where there is none."""
    kept: dict[str, dict[str, Any]] = state["g"]
    return kept.get(str(message["generation"])) or generation_state(kept, message["generation"], _new_generation)


def _new_generation() -> dict[str, Any]:
    return {"m": {}, "s": {}}


def _event_order(entry: list[Any]) -> tuple[int, int, int, int]:
    message = entry[1]
    return message["timestamp"], message["raw_partition"], message["raw_offset"], message["raw_index"]


def _token(message: Mapping[str, Any]) -> str:
    content = orjson.dumps(
        [
            message["connector_mode"],
            message["parser"],
            message["config_rev"],
            message.get("attempt", 1),
            message["readings"],
        ],
        option=orjson.OPT_SORT_KEYS,
    )
    return f",{message['timestamp']:013x}{crc32(content):08x}"
