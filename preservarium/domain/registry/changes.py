"""Changes of registry documents: the difference of two states as an event, and events folded back into a state.

A stream holds the life of one document (`device/70B3D5…`, `parser/name@2`). `created` carries the whole document,
`changed` the top-level fields that were set and those that were taken away, `removed` nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import orjson

from preservarium.domain.readings.address import canonical_address

CREATED: Final = "created"
CHANGED: Final = "changed"
REMOVED: Final = "removed"

Document = dict[str, Any]


def difference(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[str, Document] | None:
    """The event (type, data) that leads from one state to the other; None where they are equal.

    The order of keys within a document does not count.
    """
    if after is None:
        return None if before is None else (REMOVED, {})
    if before is None:
        return CREATED, {"doc": dict(after)}
    if same(before, after):
        return None
    changed = {k: v for k, v in after.items() if k not in before or not same(before[k], v)}
    data: Document = {"set": changed}
    if unset := [k for k in before if k not in after]:
        data["unset"] = unset
    return CHANGED, data


def same(a: object, b: object) -> bool:
    """Whether two values are the same JSON: unlike in Python, true is not 1."""
    return a == b and orjson.dumps(a, option=orjson.OPT_SORT_KEYS) == orjson.dumps(b, option=orjson.OPT_SORT_KEYS)


def fold(state: Document | None, events: Iterable[tuple[str, Mapping[str, Any]]]) -> Document | None:
    """The state after `events` (type, data), in order, on top of `state`; None: there is no document.

    Raises:
        ValueError: an event does not fit the state, or is of an unknown type.
    """
    for kind, data in events:
        if kind == CREATED and state is None:
            state = dict(data["doc"])
        elif kind == CHANGED and state is not None:
            unset = set(data.get("unset", ()))
            state = {**{k: v for k, v in state.items() if k not in unset}, **data["set"]}
        elif kind == REMOVED and state is not None:
            state = None
        else:
            message = (
                f"event {kind!r} does not fit a document that {'exists' if state is not None else 'does not exist'}"
            )
            raise ValueError(message)
    return state


def is_newer(rev: int, known_rev: int | None) -> bool:
    """Whether a record of revision `rev` counts where `known_rev` was applied.

    The relay may send a record again, and an old leader may send late: what is not newer is skipped.
    """
    return known_rev is None or rev > known_rev


#: A removed device leaves a mark with the revision of its removal, so that an older record that comes again does not
#: bring it back.
DELETED: Final = "deleted"


def rev_of(value: bytes | None) -> int | None:
    """The revision of a stored device or of its mark; None where there is no value.

    Raises:
        ValueError: the value is not what the registry writes.
    """
    if value is None:
        return None
    document = orjson.loads(value)
    rev = document.get("rev") if isinstance(document, dict) else None
    if not isinstance(rev, int) or isinstance(rev, bool):
        message = "a registry document without a revision"
        raise ValueError(message)
    return rev


def _names(key: str, device_id: Any) -> bool:
    """Whether a key is a device's: its id as registered, or the canonical form of it."""
    return key == device_id or (isinstance(device_id, str) and key == canonical_address(device_id))


def device_keys(device_id: str) -> tuple[str, ...]:
    """Keys of a device's records on `iot_device_registry`.

    Its id as registered, which is the key of its messages from normalize on; and where that is another, the canonical form of
    its address, which is the key of its raw messages: either is found on the partition that it is looked up on.
    """
    return tuple(dict.fromkeys((device_id, canonical_address(device_id))))


def fold_devices(
    records: Iterable[tuple[bytes | None, bytes | None, int | None]], stored: Callable[[bytes], bytes | None]
) -> tuple[dict[bytes, bytes | None], dict[int, str]]:
    """What records of `iot_device_registry` make of the stored devices.

    Args:
        records: (key, value, revision from the header), in offset order.
        stored: the value that the table has for a key.

    Returns:
        New values by key (only of devices that change), and what is wrong by index of the record.
    """
    puts: dict[bytes, bytes | None] = {}
    known: dict[bytes, int | None] = {}
    faults: dict[int, str] = {}
    for i, (key, value, header_rev) in enumerate(records):
        if not key:
            faults[i] = "a record of the device registry needs the device's address as its key"
            continue
        try:
            rev = rev_of(value) if value is not None else header_rev
            device_id = key.decode()
            if value is not None and not _names(device_id, orjson.loads(value).get("device_id")):
                faults[i] = "the key is not the document's device_id"
                continue
        except ValueError as e:  # JSON's and UTF-8's errors are ValueErrors
            faults[i] = f"not a device document: {e}"
            continue
        if key not in known:
            try:
                known[key] = rev_of(stored(key))
            except ValueError:
                known[key] = None  # what is there cannot be read: anything is better
        if value is None and rev is None:
            # A tombstone that somebody else wrote: it says nothing about order, and is obeyed.
            puts[key], known[key] = None, None
        elif rev is not None and is_newer(rev, known[key]):
            known[key] = rev
            mark = {"device_id": device_id, "rev": rev, DELETED: True}
            puts[key] = orjson.dumps(mark) if value is None else value
    return puts, faults
