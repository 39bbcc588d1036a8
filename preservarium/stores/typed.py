"""What a store is given, typed: whoever writes dictionaries, and what is not wholly what it should be."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, cast

import msgspec

from preservarium.domain.readings.reading import Message
from preservarium.domain.readings.stored import StoredMessage, StoredReading
from preservarium.errors import ReasonCode
from preservarium.stores.base import Rejected

#: What msgspec says of a value that it cannot take.
_FAULTS: Final = (msgspec.ValidationError, OverflowError)


@dataclass(frozen=True, slots=True)
class Typed:
    """Messages of a write, all typed, and what could not be."""

    messages: Sequence[StoredMessage]
    #: for each of `messages`: index of the message written, index in it of the first reading; None: each its own, whole
    _origins: list[tuple[int, int]] | None = None
    _rejected: list[Rejected] = field(default_factory=list)

    def rejected(self, found: Sequence[Rejected]) -> list[Rejected]:
        """What is refused of the messages written, in their order, given what is refused of `messages`."""
        if self._origins is None:
            return list(found)
        mapped = list(self._rejected)
        for r in found:
            index, first = self._origins[r.message]
            mapped.append(Rejected(index, first + r.reading, r.code, r.text))
        return sorted(mapped, key=lambda r: (r.message, r.reading))


def typed(messages: Sequence[StoredMessage | Message]) -> Typed:
    """Type what is not typed yet.

    Args:
        messages: typed messages, or dictionaries with a list of `readings` and whatever else.

    Returns:
        Every message typed; of one that is not wholly what it should be, each reading that is, as a message of its own.
    """
    if set(map(type, messages)) <= {StoredMessage}:
        return Typed(cast("Sequence[StoredMessage]", messages))
    out: list[StoredMessage] = []
    origins: list[tuple[int, int]] = []
    rejected: list[Rejected] = []
    for index, message in enumerate(messages):
        try:
            out.append(msgspec.convert(message, StoredMessage))
            origins.append((index, 0))
        except _FAULTS as e:
            for position, part in enumerate(_parts(cast("Mapping[str, Any]", message), e)):
                if isinstance(part, StoredMessage):
                    out.append(part)
                    origins.append((index, position))
                else:
                    rejected.append(Rejected(index, position, *part))
    return Typed(out, origins, rejected)


def _parts(message: Mapping[str, Any], fault: Exception) -> Iterator[StoredMessage | tuple[ReasonCode, str]]:
    """Each reading as a message of its own, or why it cannot be one."""
    head: StoredMessage | None = None
    with suppress(*_FAULTS):
        head = msgspec.convert({**message, "readings": []}, StoredMessage)
    for reading in message["readings"]:
        if head is None:
            yield _reason(fault)
            continue
        try:
            yield msgspec.structs.replace(head, readings=[msgspec.convert(reading, StoredReading)])
        except _FAULTS as e:
            yield _reason(e)


def _reason(fault: Exception) -> tuple[ReasonCode, str]:
    text = str(fault)
    return ReasonCode.TIMESTAMP_INVALID if text.endswith("`$.timestamp`") else ReasonCode.STORE_REJECTED, text
