"""One instant, one reading of a series: what becomes of messages that share one.

The stores keep one row of a series for an instant, so a second one must not come to it by accident.

- **A message without a time of its own** has the instant of its receipt, and that may be another message's, too: Kafka's records
  have milliseconds, and a gateway may give one instant to all that it packs. Such messages keep their order, and each gets an
  instant of its own, later by 1 µs where it must be (`give_instant`). The log alone decides which, so a re-run gives the same.
- **A device that says one instant twice** by its own clock, with different values, is a matter of its type (`same_instant`):
  `first`: the value that came first stays, the other is refused; `last`: the later value overwrites; `both`: the later message
  gets an instant of its own, as if the device had no clock. The values of a device's latest instant are remembered
  (`settle_second`, `remember`); a second value of an older instant is found by the store, which keeps the first.

Functions change the state that they are given, in place. They need the messages of a device in their order.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from preservarium.domain.readings.reading import PIN_POSITION_NONE

#: In a device's state: [instant as it came, instant that was given] of the latest message that got one.
_RUN: Final = "u"
#: In a device's state: [latest instant, {series: value}].
_LATEST: Final = "n"

#: A reading, its series, and its value as it came.
Came = tuple[dict[str, Any], str, Any]


def give_instant(message: dict[str, Any], generation: dict[str, Any]) -> None:
    """Give a message whose instant is not its own one that no message before it has.

    An older one than the latest has its own time, because it was held up on its way; so has one that is sent again on
    purpose (`attempt`), or each try would be another reading.

    Args:
        message: a standardized message that is new; its timestamp may move, and `moved_from` says so.
        generation: the device's state in the message's generation.
    """
    if message.get("attempt", 1) > 1:
        return
    came = message["timestamp"]
    run = generation.get(_RUN)
    if run is None or came > run[1]:
        generation[_RUN] = [came, came]
    elif came >= run[0]:
        # Of the same instant, or of one that the µs added before have reached.
        given = run[1] + 1
        message["timestamp"], message["moved_from"] = given, came
        generation[_RUN] = [came, given]


def settle_second(
    message: dict[str, Any], generation: Mapping[str, Any], *, overwrites: bool
) -> tuple[list[Came], list[dict[str, Any]]]:
    """Look whether the latest instant of a device's own clock is said once more.

    Args:
        message: a standardized message before its readings are judged. Readings that say the same again are put aside as
            `repeated`, those that say something else are marked `revised` or taken out.
        generation: the device's state in the message's generation.
        overwrites: the later value counts (`last`).

    Returns:
        What `remember` needs, and the readings that were taken out.
    """
    at = message["timestamp"]
    latest = generation.get(_LATEST)
    readings: list[dict[str, Any]] = message["readings"]
    if latest is not None and at < latest[0]:
        return [], []
    came = [_came(reading) for reading in readings if "timestamp" not in reading]
    if latest is None or at > latest[0]:
        return came, []
    known = latest[1]
    aside: set[int] = set()
    refused: list[dict[str, Any]] = []
    for reading, series, value in came:
        if series not in known:
            continue
        if known[series] == value:
            # Sent again on purpose, it is judged anew: the one before may have been refused by the store.
            if message.get("attempt", 1) == 1:
                aside.add(id(reading))
                message.setdefault("repeated", []).append(reading)
        elif overwrites:
            reading["revised"], reading["replaces"] = True, known[series]
        else:
            aside.add(id(reading))
            refused.append(reading)
    if aside:
        message["readings"] = [reading for reading in readings if id(reading) not in aside]
    return came, refused


def remember(came: Sequence[Came], message: Mapping[str, Any], generation: dict[str, Any]) -> None:
    """Note the values of the message's instant that were kept, once its readings are judged."""
    latest = generation.get(_LATEST)
    if latest is None or latest[0] != message["timestamp"]:
        latest = generation[_LATEST] = [message["timestamp"], {}]
    kept = {id(reading) for reading in message["readings"]}
    latest[1].update({series: value for reading, series, value in came if id(reading) in kept})


def _came(reading: dict[str, Any]) -> Came:
    component, pin, value = reading["component_type"], reading["pin_position"], reading.get("value")
    series = component if pin == PIN_POSITION_NONE else f"{component}\t{pin}"
    return reading, series, reading.get("value_text") if value is None else value
